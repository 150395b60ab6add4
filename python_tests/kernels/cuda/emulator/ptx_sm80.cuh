// csrc/ptx/ptx_sm80.cuh on a CPU. Copies to shared memory happen when they are waited for; with a seed now and then
// before, each for itself.
#pragma once

#include <cuda_runtime.h>

inline char* shared_memory() { return emulator::shared_base() + emulator::current->rank * emulator::kSharedBytes; }
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - emulator::shared_base());
}

inline void grid_sync() {
  if (emulator::fault & emulator::kGridBarrier) return;
  emulator::wait(emulator::together, blockDim.x * static_cast<unsigned>(emulator::blocks.size()));
}

inline void cp_async_16(void* target, const void* source, bool valid) {
  auto work = [=] {
    if (valid) {
      std::memcpy(target, source, 16);
    } else {
      std::memset(target, 0, 16);
    }
  };
  if (emulator::eager || (emulator::seed != 0 && emulator::drawn(2) == 0)) return work();
  emulator::current->copies.back().push_back(work);
}
inline void cp_async_commit() { emulator::current->copies.emplace_back(); }
template <int Left>
void cp_async_wait() {
  if (emulator::fault & emulator::kCopies) return;
  emulator::finish_groups(emulator::current->copies, Left);
}

inline void ldmatrix_x4(uint32_t (&value)[4], const void* row) {
  const auto address = reinterpret_cast<uintptr_t>(row);
  const auto rows = of_warp<uint32_t, 2>({static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32)});
  for (int matrix = 0; matrix < 4; ++matrix) {
    const int lane = matrix * 8 + static_cast<int>(threadIdx.x % 32) / 4;
    const auto* source = reinterpret_cast<const char*>(static_cast<uintptr_t>(rows[lane][1]) << 32 | rows[lane][0]);
    if (reinterpret_cast<uintptr_t>(source) % 16 != 0) __builtin_trap();
    std::memcpy(&value[matrix], source + threadIdx.x % 4 * 4, 4);
  }
}

// D (16, 8) += A (16, 32) * B (8, 32)^T; of A, a lane holds rows lane / 4 and 8 more, bytes 4 (lane % 4) and 16 more.
// D of int: of int8; of float: of e4m3.
template <typename Sum>
void mma_m16n8k32(Sum (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto lanes = of_warp<uint32_t, 6>({a[0], a[1], a[2], a[3], b0, b1});
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    uint8_t x[32], w[32];
    for (int k = 0; k < 32; ++k) {
      const int owner = k % 16 / 4, byte = k % 4, half = k / 16;
      x[k] = static_cast<uint8_t>(lanes[row % 8 * 4 + owner][row / 8 + 2 * half] >> 8 * byte);
      w[k] = static_cast<uint8_t>(lanes[column * 4 + owner][4 + half] >> 8 * byte);
    }
    d[i] = dot_32(d[i], x, w);
  }
}
