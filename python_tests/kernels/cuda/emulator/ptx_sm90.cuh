// csrc/ptx/ptx_sm90.cuh on a CPU: mbarriers, the tensor memory accelerator and wgmma. Swizzles are those of the
// hardware, on addresses: what is written one way must be read the same way.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <ptx_sm80.cuh>

namespace emulator {

struct Mbarrier {  // the 8 bytes of an mbarrier
  uint16_t phase, count, pending, unused;
};
inline int32_t outstanding[16 * kSharedBytes / 8];  // bytes that a barrier still waits for

inline char* at(uint32_t address) { return shared_base() + address; }
inline Mbarrier& word(uint32_t barrier) { return *reinterpret_cast<Mbarrier*>(at(barrier)); }

inline void settle(uint32_t barrier) {
  Mbarrier& state = word(barrier);
  if (state.pending != 0 || outstanding[barrier / 8] != 0) return;
  ++state.phase;
  state.pending = state.count;
  moved = true;
}
inline void arrive(uint32_t barrier) {
  if (word(barrier).pending == 0) fail();  // more arrivals than the barrier counts
  --word(barrier).pending;
  settle(barrier);
}

inline uint32_t swizzled(uint32_t address, uint32_t row_bytes) {
  const uint32_t bits = row_bytes / 16 - 1;  // 128: three bits, 64: two, 32: one
  return address ^ ((address >> 3) & bits << 4);
}

// One row of `bytes` to the same place in the shared memory of every block of `mask`.
inline void deliver(uint32_t target, uint32_t row, uint32_t bytes, const uint8_t* source, uint32_t valid,
                    uint16_t mask) {
  for (uint32_t rank = 0; rank < 16; ++rank) {
    if (!(mask >> rank & 1)) continue;
    for (uint32_t i = 0; i < bytes; ++i) {
      const uint32_t inside = target % kSharedBytes + row * bytes + i;
      *at(rank * static_cast<uint32_t>(kSharedBytes) + swizzled(inside, bytes)) = i < valid ? source[i] : 0;
    }
  }
}
inline void start_copy(uint32_t barrier, uint32_t bytes, uint16_t mask, std::function<void()> copy) {
  for (uint32_t rank = 0; rank < 16; ++rank) {
    if (!(mask >> rank & 1)) continue;
    const uint32_t theirs = rank * static_cast<uint32_t>(kSharedBytes) + barrier % kSharedBytes;
    auto work = [=] {
      copy();
      outstanding[theirs / 8] -= static_cast<int32_t>(bytes);
      settle(theirs);
    };
    if (eager || (seed != 0 && drawn(2) == 0)) {
      work();
    } else {
      in_flight.push_back({theirs, work});
    }
  }
}
inline uint16_t mine() { return static_cast<uint16_t>(1u << current->rank); }

inline void copy_tiled(const CUtensorMap& map, uint32_t target, uint32_t barrier, int x, int y, uint16_t mask) {
  if (map.im2col || map.rank != 2 || target % 128 != 0) __builtin_trap();
  start_copy(barrier, map.box[0] * map.box[1], mask, [=] {
    for (uint32_t row = 0; row < map.box[1]; ++row) {
      const int64_t line = y + static_cast<int64_t>(row);
      const bool inside = line >= 0 && line < static_cast<int64_t>(map.size[1]);
      const int64_t left = static_cast<int64_t>(map.size[0]) - x;
      const auto valid = static_cast<uint32_t>(inside ? std::clamp<int64_t>(left, 0, map.box[0]) : 0);
      const uint8_t* source = map.base + (valid > 0 ? line * static_cast<int64_t>(map.stride[1]) + x : 0);
      deliver(target, row, map.box[0], source, valid, mask);
    }
  });
}

// Pixels in the order of the output, from a base pixel on: each step goes along the bounding box, row after row,
// image after image; the offsets of the tap are added last, and what lies outside of the tensor is zero.
inline void copy_im2col(const CUtensorMap& map, uint32_t target, uint32_t barrier, int c, int w, int h, int n,
                        uint16_t tap_w, uint16_t tap_h) {
  if (!map.im2col || target % 128 != 0) __builtin_trap();
  start_copy(barrier, map.channels * map.pixels, mine(), [=] {
    const int last_w = static_cast<int>(map.size[1]) - 1 + map.upper[0];
    const int last_h = static_cast<int>(map.size[2]) - 1 + map.upper[1];
    int base_w = w, base_h = h, base_n = n;
    for (uint32_t pixel = 0; pixel < map.pixels; ++pixel) {
      const int64_t x = base_w + tap_w, y = base_h + tap_h;
      const bool inside = base_n < static_cast<int>(map.size[3]) && x >= 0 && y >= 0 &&
                          x < static_cast<int64_t>(map.size[1]) && y < static_cast<int64_t>(map.size[2]);
      const int64_t left = static_cast<int64_t>(map.size[0]) - c;
      const auto valid = static_cast<uint32_t>(inside ? std::clamp<int64_t>(left, 0, map.channels) : 0);
      const int64_t offset = inside ? base_n * static_cast<int64_t>(map.stride[3]) +
                                          y * static_cast<int64_t>(map.stride[2]) +
                                          x * static_cast<int64_t>(map.stride[1]) + c
                                    : 0;
      deliver(target, pixel, map.channels, map.base + offset, valid, mine());
      base_w += static_cast<int>(map.step[1]);
      if (base_w <= last_w) continue;
      base_w = map.lower[0];
      base_h += static_cast<int>(map.step[2]);
      if (base_h <= last_h) continue;
      base_h = map.lower[1];
      ++base_n;
    }
  });
}

// 32 bytes of a row of an operand that a descriptor of wgmma describes: K-major, rows in groups of eight.
inline void load_row(uint8_t (&bytes)[32], uint64_t descriptor, uint32_t row) {
  const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t layout = static_cast<uint32_t>(descriptor >> 62);
  const uint32_t row_bytes = layout == 1 ? 128 : layout == 2 ? 64 : 32;
  if (layout == 0 || (descriptor >> 49 & 7) != 0) __builtin_trap();
  const uint32_t base = current->rank * static_cast<uint32_t>(kSharedBytes);
  const uint32_t first = start + row / 8 * stride + row % 8 * row_bytes;
  for (uint32_t k = 0; k < 32; k += 16) std::memcpy(bytes + k, at(base + swizzled(first + k, row_bytes)), 16);
}

template <int N, typename Sum, typename Row>
void multiply(Sum (&d)[N / 2], uint64_t b, bool accumulate, Row a) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int half = 0; half < 2; ++half) {
    uint8_t x[32], w[32];
    a(half, x);
    for (int block = 0; block < N / 8; ++block) {
      for (int i = 0; i < 2; ++i) {
        const auto column = static_cast<uint32_t>(block * 8 + lane % 4 * 2 + i);
        Sum& sum = d[block * 4 + half * 2 + i];
        load_row(w, b, column);
        sum = dot_32(accumulate ? sum : Sum(), x, w);
      }
    }
  }
}

// A wgmma comes after those that its warpgroup issued before.
inline void start_product(std::function<void()> work) {
  if (eager) return work();
  current->wgmmas.back().push_back(std::move(work));
  if (is_early()) finish_all(current->wgmmas);
}

}  // namespace emulator

inline uint32_t cluster_rank() { return emulator::current->rank; }
inline void cluster_sync() {
  emulator::wait(emulator::together, blockDim.x * static_cast<unsigned>(emulator::blocks.size()));
}
inline void cluster_meet() { cluster_sync(); }

inline void mbarrier_init(uint64_t* barrier, uint32_t count) {
  const uint32_t address = shared_address(barrier);
  emulator::word(address) = {0, static_cast<uint16_t>(count), static_cast<uint16_t>(count), 0};
  emulator::outstanding[address / 8] = 0;
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  const uint32_t address = shared_address(barrier);
  emulator::outstanding[address / 8] += static_cast<int32_t>(bytes);
  emulator::arrive(address);
}
inline void mbarrier_arrive(uint64_t* barrier, uint32_t rank) {
  emulator::arrive(shared_address(barrier) % emulator::kSharedBytes +
                   rank * static_cast<uint32_t>(emulator::kSharedBytes));
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  const uint32_t address = shared_address(barrier);
  if (emulator::fault & (threadIdx.x < emulator::kWarpgroup ? emulator::kEmptyStages : emulator::kFullStages)) return;
  for (;;) {
    auto& flying = emulator::in_flight;
    if (emulator::seed != 0) emulator::shuffle(flying);
    for (size_t i = 0; i < flying.size();) {
      if (flying[i].barrier != address) {
        ++i;
        continue;
      }
      auto work = flying[i].work;
      flying.erase(flying.begin() + static_cast<std::ptrdiff_t>(i));
      work();
    }
    if ((emulator::word(address).phase & 1u) != parity) return;
    emulator::yield();
  }
}

inline void tma_load_2d(void* target, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
  emulator::copy_tiled(*map, shared_address(target), shared_address(barrier), x, y, emulator::mine());
}
inline void tma_load_2d_multicast(void* target, const CUtensorMap* map, uint64_t* barrier, int x, int y,
                                  uint16_t mask) {
  emulator::copy_tiled(*map, shared_address(target), shared_address(barrier), x, y, mask);
}
inline void tma_load_im2col(void* target, const CUtensorMap* map, uint64_t* barrier, int c, int w, int h, int n,
                            uint16_t tap_w, uint16_t tap_h) {
  emulator::copy_im2col(*map, shared_address(target), shared_address(barrier), c, w, h, n, tap_w, tap_h);
}
inline void prefetch_tensormap(const CUtensorMap*) {}

template <int>
void setmaxnreg_dec() {}
template <int>
void setmaxnreg_inc() {}

inline void wgmma_fence() { emulator::sync_warp(); }
inline void wgmma_commit() {
  emulator::current->wgmmas.emplace_back();
  if (emulator::is_early()) emulator::finish_all(emulator::current->wgmmas);
}
// The wgmma of a warpgroup's four warps is one instruction, which is done for all of them at once.
template <int Left>
void wgmma_wait() {
  const bool left_out = Left > 0 && (emulator::fault & emulator::kProductsInLoop);
  if (!left_out) emulator::finish_groups(emulator::current->wgmmas, Left);
  if (emulator::is_early()) emulator::finish_all(emulator::current->wgmmas);
  emulator::sync_warpgroup();
}
template <typename T, size_t N>
void keep_registers(T (&)[N]) {}

template <int N, typename Sum>
void wgmma_m64k32_of_shared(Sum (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  auto work = [=, &d] {
    const auto row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    emulator::multiply<N>(d, b, accumulate, [&](int half, uint8_t (&x)[32]) {
      emulator::load_row(x, a, row + 8u * static_cast<unsigned>(half));
    });
  };
  emulator::start_product(work);
}
template <int N>
void wgmma_m64k32(int (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  wgmma_m64k32_of_shared<N>(d, a, b, accumulate);
}
template <int N>
void wgmma_m64k32(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  wgmma_m64k32_of_shared<N>(d, a, b, accumulate);
}
template <int N>
void wgmma_m64k32(int (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  auto work = [=, &d, &a] {
    const auto lanes = of_warp(a);  // what the registers hold when the wgmma happens
    emulator::multiply<N>(d, b, accumulate, [&](int half, uint8_t (&x)[32]) {
      for (int k = 0; k < 32; ++k) {
        x[k] = static_cast<uint8_t>(lanes[threadIdx.x % 32 / 4 * 4 + k % 16 / 4][half + 2 * (k / 16)] >> 8 * (k % 4));
      }
    });
  };
  emulator::start_product(work);
}
