// What a warpgroup does with the steps of a tile, by the element: from a full stage of the ring to sums in registers.
//
// The loops take two functions: `release(stage)` gives a stage back to the warps that load, and `hand_over()` gives the
// turn to the other warpgroup, where each has tiles of its own, while the last wgmmas are in flight.
#pragma once

#include "sm90_load.cuh"

namespace ldmq::sm90 {

// An int4 operand a of 64 rows and 32 channels, from packed bytes in shared memory to registers.
template <int ROW_BYTES>
__device__ __forceinline__ void unpack_rows(uint32_t (&a)[4], const char* rows, int first_row, int offset,
                                            const uint32_t (&multiplier)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + half * 8 + lane / 4;
    const int chunk = (offset ^ (row * ROW_BYTES >> 3 & (ROW_BYTES / 16 - 1) << 4)) + lane % 4 * 2;
    const char* bytes = rows + row * ROW_BYTES + chunk;
    unpack_lane(a[half], a[half + 2], *reinterpret_cast<const uint16_t*>(bytes),
                *reinterpret_cast<const uint16_t*>(bytes + 8), multiplier[half]);
  }
}

// The wgmmas of one step with an operand a in shared memory, issued and committed. `first_row` is of the warpgroup in
// the tile.
template <typename Tile, int BANDS>
__device__ __forceinline__ void multiply_step(const Shared<Tile>& shared, int stage, int first_row, bool accumulate,
                                              typename Tile::Accumulator (&sum)[BANDS][Tile::kBRows / 2]) {
  const uint64_t a = describe(shared.a(stage) + first_row * Tile::kK, Tile::kK);
  const uint64_t b = describe(shared.b(stage), Tile::kK);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < Tile::kK / 32; ++k) {
#pragma unroll
    for (int band = 0; band < BANDS; ++band) {
      const auto row = static_cast<uint64_t>(band * 64 * Tile::kK >> 4), column = static_cast<uint64_t>(k * 2);
      wgmma_m64k32<Tile::kBRows>(sum[band], a + row + column, b + column, accumulate || k > 0);
    }
  }
  wgmma_commit();
}

// The multipliers of one step that a lane needs: of its two rows of each band, and of each group of input channels.
// What lies outside gets those of the last row and group: they are multiplied by zeros, or are not stored.
template <typename Tile, int BANDS>
class Multipliers {
  static constexpr int kGroups = Tile::kK / kGroup;

 public:
  uint32_t value[BANDS][kGroups][2];

  __device__ __forceinline__ Multipliers(const Parameters& parameters, int lane_row) : last_(parameters.groups - 1) {
#pragma unroll
    for (int i = 0; i < BANDS * 2; ++i) {
      const int row = min(lane_row + i / 2 * 64 + i % 2 * 8, parameters.a_rows - 1);
      row_[i / 2][i % 2] = parameters.multiplier + static_cast<int64_t>(row) * parameters.groups;
    }
    load(0);
  }

  __device__ __forceinline__ void load(int step) {
#pragma unroll
    for (int i = 0; i < BANDS * kGroups * 2; ++i) {
      const int band = i / 2 / kGroups, group = i / 2 % kGroups;
      value[band][group][i % 2] = __ldg(row_[band][i % 2] + min(step * kGroups + group, last_));
    }
  }

 private:
  const uint8_t* row_[BANDS][2];
  int last_;
};

// The registers of operand a for one step.
template <typename Tile, int BANDS>
struct Unpacked {
  uint32_t value[BANDS][Tile::kK / 32][4];

  __device__ __forceinline__ void keep() {
#pragma unroll
    for (int i = 0; i < BANDS * (Tile::kK / 32); ++i) keep_registers(value[i % BANDS][i / BANDS]);
  }
};

template <typename Tile, int BANDS>
__device__ __forceinline__ void unpack_step(const Shared<Tile>& shared, int stage, int first_row,
                                            const Multipliers<Tile, BANDS>& multipliers, Unpacked<Tile, BANDS>& a) {
  constexpr int kSteps = Tile::kK / 32;
  const int warp_row = first_row + static_cast<int>(threadIdx.x) % kWarpgroup / 32 * 16;
#pragma unroll
  for (int band = 0; band < BANDS; ++band) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      unpack_rows<Tile::kARowBytes>(a.value[band][k], shared.a(stage), warp_row + band * 64, k * 16,
                                    multipliers.value[band][k * 32 / kGroup]);
    }
  }
}

// The same wgmmas as in multiply_step, with an operand a in registers, which must stay as they are until it is done.
template <typename Tile, int BANDS>
__device__ __forceinline__ void multiply_unpacked_step(const Shared<Tile>& shared, int stage, bool accumulate,
                                                       const Unpacked<Tile, BANDS>& a,
                                                       int (&sum)[BANDS][Tile::kBRows / 2]) {
  constexpr int kSteps = Tile::kK / 32;
  const uint64_t b = describe(shared.b(stage), Tile::kK);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int band = 0; band < BANDS; ++band) {
      wgmma_m64k32<Tile::kBRows>(sum[band], a.value[band][k], b + static_cast<uint64_t>(k * 2), accumulate || k > 0);
    }
  }
  wgmma_commit();
}

// int8: while the wgmmas of a step are in flight, those of the step before are done.
template <typename Tile, int BANDS, typename Release, typename HandOver>
__device__ __forceinline__ void multiply_int8(const Shared<Tile>& shared, Ring<Tile::kStages>& ring, int steps,
                                              int group_row, const Release& release, const HandOver& hand_over,
                                              int (&sum)[BANDS][Tile::kBRows / 2]) {
  int before = 0;
  for (int step = 0; step < steps; ++step) {
    mbarrier_wait(shared.full + ring.stage, ring.parity);
    multiply_step<Tile, BANDS>(shared, ring.stage, group_row, step > 0, sum);
    wgmma_wait<1>();
    if (step > 0) release(before);
    before = ring.stage;
    ring.advance(1);
  }
  hand_over();
  wgmma_wait<0>();
  release(before);
}

// The same with an int4 operand a. `lane_row`: the first row of operand a that this lane unpacks.
template <typename Tile, int BANDS, typename Release, typename HandOver>
__device__ __forceinline__ void multiply_int4(const Parameters& parameters, const Shared<Tile>& shared,
                                              Ring<Tile::kStages>& ring, int steps, int group_row, int lane_row,
                                              const Release& release, const HandOver& hand_over,
                                              int (&sum)[BANDS][Tile::kBRows / 2]) {
  Unpacked<Tile, BANDS> even, odd;  // wgmmas read one of them while the other is written
  Multipliers<Tile, BANDS> multipliers(parameters, lane_row);
  int before = 0;
  const auto make_step = [&](int step, Unpacked<Tile, BANDS>& a, Unpacked<Tile, BANDS>& a_before) {
    mbarrier_wait(shared.full + ring.stage, ring.parity);
    unpack_step(shared, ring.stage, group_row, multipliers, a);
    multipliers.load(step + 1);
    multiply_unpacked_step(shared, ring.stage, step > 0, a, sum);
    wgmma_wait<1>();
    if (step > 0) release(before);
    before = ring.stage;
    ring.advance(1);
    a_before.keep();
  };
#pragma unroll 1
  for (int step = 0;;) {
    make_step(step, even, odd);
    if (++step == steps) break;
    make_step(step, odd, even);
    if (++step == steps) break;
  }
  hand_over();
  wgmma_wait<0>();
  even.keep();
  odd.keep();
  release(before);
}

// Adds the sums of one step, whose wgmmas are done, in float32.
template <int N>
__device__ __forceinline__ void promote(float (&sum)[N], float (&partial)[N]) {
  keep_registers(partial);
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] += partial[i];
}

// e4m3: the tensor cores of sm_90 add its products with about 14 bits of the largest (DeepSeek-V3, arXiv 2412.19437,
// section 3.3.2), so wgmmas sum one step, of at most 128 channels, and float32 registers sum the steps, as CUTLASS does
// (fp8_accumulation.hpp, four wgmmas). Where a warpgroup has registers for two such sums beside its own, the wgmmas of
// the next step are in flight while one is added. Else it waits, and the other warpgroup's are in flight meanwhile.
template <typename Tile, int BANDS, typename Release>
__device__ __forceinline__ void multiply_e4m3(const Shared<Tile>& shared, Ring<Tile::kStages>& ring, int steps,
                                              int group_row, const Release& release,
                                              float (&sum)[BANDS][Tile::kBRows / 2]) {
  static_assert(Tile::kK <= 128, "more channels lose bits");
#pragma unroll
  for (int i = 0; i < BANDS * (Tile::kBRows / 2); ++i) sum[i % BANDS][i / BANDS] = 0.0f;
  if constexpr (Tile::kTwoInFlight) {
    float even[1][Tile::kBRows / 2], odd[1][Tile::kBRows / 2];  // wgmmas write one of them while the other is added
    int before = 0;
    const auto issue = [&](float (&partial)[1][Tile::kBRows / 2]) {
      mbarrier_wait(shared.full + ring.stage, ring.parity);
      multiply_step<Tile, 1>(shared, ring.stage, group_row, false, partial);
    };
    const auto finish = [&](float (&partial)[1][Tile::kBRows / 2]) {
      release(before);
      before = ring.stage;
      ring.advance(1);
      promote(sum[0], partial[0]);
    };
    issue(even);
    before = ring.stage;
    ring.advance(1);
#pragma unroll 1
    for (int step = 1;;) {
      if (step++ == steps) {
        wgmma_wait<0>();
        release(before);
        return promote(sum[0], even[0]);
      }
      issue(odd);
      wgmma_wait<1>();
      finish(even);
      if (step++ == steps) {
        wgmma_wait<0>();
        release(before);
        return promote(sum[0], odd[0]);
      }
      issue(even);
      wgmma_wait<1>();
      finish(odd);
    }
  } else {
    for (int step = 0; step < steps; ++step) {
      mbarrier_wait(shared.full + ring.stage, ring.parity);
#pragma unroll
      for (int band = 0; band < BANDS; ++band) {
        float partial[1][Tile::kBRows / 2];
        multiply_step<Tile, 1>(shared, ring.stage, group_row + band * 64, false, partial);
        wgmma_wait<0>();
        if (band == BANDS - 1) release(ring.stage);
        promote(sum[band], partial[0]);
      }
      ring.advance(1);
    }
  }
}

}  // namespace ldmq::sm90
