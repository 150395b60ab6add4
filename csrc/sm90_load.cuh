// What the kernels on wgmma have in shared memory, and the warp that brings it there by the tensor memory accelerator.
#pragma once

#include <griddepcontrol.cuh>
#include <ptx_sm90.cuh>

#include "gemm.cuh"

namespace ldmq::sm90 {

constexpr int kWarpgroup = 128, kThreads = 3 * kWarpgroup, kAlignment = 1024;
constexpr int kLoadRegisters = 40, kMultiplyRegisters = 232;  // of a thread: 504 for three, of 512

template <Kind KIND, Element ELEMENT, int A_ROWS, int B_ROWS, int K, int STAGES, bool COOPERATIVE, int CLUSTER>
struct Tile {
  using Accumulator = AccumulatorOf<ELEMENT>;
  static constexpr Kind kKind = KIND;
  static constexpr Element kElement = ELEMENT;
  static constexpr bool kInt4 = KIND == Kind::kLinearInt4, kGated = KIND == Kind::kGeglu, kCooperative = COOPERATIVE;
  static constexpr int kARows = A_ROWS, kBRows = B_ROWS, kK = K, kStages = STAGES, kCluster = CLUSTER;
  // With gates operand b is two halves of rows, n apart in the weight: each is a part that is loaded at once.
  static constexpr int kBPart = B_ROWS / (kGated ? 2 : CLUSTER), kBStep = kGated ? B_ROWS / 2 : B_ROWS;
  static constexpr int kBParts = B_ROWS / kBPart / CLUSTER;  // that this block loads, for all of its cluster
  static constexpr int kM = kInt4 ? B_ROWS : A_ROWS, kN = kInt4 ? A_ROWS : B_ROWS;  // of the output
  static constexpr int kGroupRows = COOPERATIVE ? A_ROWS / 2 : A_ROWS;                       // of a warpgroup
  // of e4m3 sums: 192 accumulators of a thread leave 40 of its registers to all else
  static constexpr bool kTwoInFlight = ELEMENT == Element::kE4m3 && kGroupRows == 64 && 3 * B_ROWS / 2 <= 192;
  static constexpr int kARowBytes = kInt4 ? K / 2 : K;
  static constexpr int kABytes = A_ROWS * kARowBytes, kBBytes = B_ROWS * K, kStageBytes = kABytes + kBBytes;
  static constexpr int kSharedBytes = STAGES * kStageBytes + (2 * STAGES + 2) * 8;
  static_assert(kGroupRows % 64 == 0 && B_ROWS % 32 == 0 && kABytes % kAlignment == 0);
  static_assert(kBPart * K % kAlignment == 0, "each part of operand b begins where a swizzle does");
  static_assert(!kGated || CLUSTER <= 2, "each block of a cluster loads one half at least");
  static_assert(kSharedBytes <= 227 << 10 && A_ROWS <= 256 && B_ROWS <= 256);
  static_assert(ELEMENT == Element::kInt8 || COOPERATIVE, "one warpgroup multiplies while the other promotes its sums");
};

struct Parameters {
  CUtensorMap a, b;
  const uint8_t* multiplier;
  int channels, taps, groups, a_rows;
  TileScheduler scheduler;  // rows of tiles are those of a cluster
  ConvShape conv;
  Epilogue epilogue;
};

// Where a warp stands in the ring: steps come in the same order for those that load and those that multiply.
template <int STAGES>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int steps) {
    const int beyond = stage + steps;
    parity ^= static_cast<uint32_t>(beyond / STAGES) & 1u;
    stage = beyond % STAGES;
  }
};

// A matrix in shared memory as wgmma reads it: K-major, rows of `row_bytes`, swizzled as they were loaded.
__device__ __forceinline__ uint64_t describe(const char* rows, int row_bytes) {
  const uint64_t layout = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
  return static_cast<uint64_t>(shared_address(rows) >> 4 & 0x3fff) | 1ull << 16 |
         static_cast<uint64_t>(row_bytes * 8 >> 4) << 32 | layout << 62;
}

template <typename Tile>
struct Shared {
  char* stages = shared_memory();
  uint64_t* full = reinterpret_cast<uint64_t*>(stages + Tile::kStages * Tile::kStageBytes);
  uint64_t* empty = full + Tile::kStages;
  uint64_t* turn = empty + Tile::kStages;  // of each warpgroup, where each has its own tiles
  __device__ __forceinline__ char* a(int stage) const { return stages + stage * Tile::kStageBytes; }
  __device__ __forceinline__ char* b(int stage) const { return a(stage) + Tile::kABytes; }
};

// One thread: loads every step of every tile of this block.
template <typename Tile, typename Out>
__device__ __forceinline__ void load_tiles(const Parameters& parameters, const Shared<Tile>& shared, int rank) {
  const int cluster = static_cast<int>(blockIdx.x) / Tile::kCluster;
  const int clusters = static_cast<int>(gridDim.x) / Tile::kCluster, tiles = parameters.scheduler.count();
  const ConvShape& p = parameters.conv;
  Ring<Tile::kStages> ring;
  for (int work = cluster; work < tiles; work += clusters) {
    int tile = work, a_tile, b_tile;
    const Steps steps = parameters.scheduler.steps_of<Out>(tile);
    parameters.scheduler.coordinates(tile, a_tile, b_tile);
    const int a_row = (a_tile * Tile::kCluster + rank) * Tile::kARows, b_row = b_tile * Tile::kBStep;
    const int part_step = Tile::kGated ? parameters.epilogue.n : Tile::kBPart;
    int base_w = 0, base_h = 0, sample = 0;
    if constexpr (Tile::kKind == Kind::kConv2d) {
      const int row = a_row / p.out_width;
      sample = row / p.out_height;
      base_w = (a_row - row * p.out_width) * p.stride_width - p.pad_left;
      base_h = (row - sample * p.out_height) * p.stride_height - p.pad_top;
    }
    Step step = Step::at<Tile::kK>(steps.first, parameters.channels, p.kernel_width);
    for (int left = steps.count; left > 0; --left) {
      uint64_t* full = shared.full + ring.stage;
      mbarrier_wait(shared.empty + ring.stage, ring.parity ^ 1u);
      mbarrier_arrive_expect_tx(full, Tile::kStageBytes);
      if constexpr (Tile::kKind == Kind::kConv2d) {
        tma_load_im2col(shared.a(ring.stage), &parameters.a, full, step.channel, base_w, base_h, sample,
                        static_cast<uint16_t>(step.tap_x * p.dilation_width),
                        static_cast<uint16_t>(step.tap_y * p.dilation_height));
      } else {
        tma_load_2d(shared.a(ring.stage), &parameters.a, full, Tile::kInt4 ? step.channel / 2 : step.channel, a_row);
      }
      const int b_column = step.tap * parameters.channels + step.channel;
#pragma unroll
      for (int i = 0; i < Tile::kBParts; ++i) {
        const int part = rank * Tile::kBParts + i, row = b_row + part * part_step;
        char* target = shared.b(ring.stage) + part * Tile::kBPart * Tile::kK;
        if constexpr (Tile::kCluster > 1) {
          tma_load_2d_multicast(target, &parameters.b, full, b_column, row, (1 << Tile::kCluster) - 1);
        } else {
          tma_load_2d(target, &parameters.b, full, b_column, row);
        }
      }
      step.advance<Tile::kK>(parameters.channels, p.kernel_width);
      ring.advance(1);
    }
  }
  griddepcontrol_launch_dependents();
}

}  // namespace ldmq::sm90
