// int8 GEMMs on wgmma for sm_90a: persistent blocks whose warpgroups have one task each.
//
// One warp loads: the tensor memory accelerator brings the steps of one tile after the other into a ring in shared
// memory. Two warpgroups multiply straight from there. Either each has tiles of its own, and one multiplies while the
// other stores (ping-pong), or both share the rows of a tile that is too large for one (cooperative). The two blocks of
// a cluster have tiles one below the other, which need the same columns: each loads half of them for both.
//
// Operand a is x, operand b the weight. With an int4 weight they change places: the packed weight is unpacked into
// registers, which wgmma takes as operand a alone, and the output is transposed in the epilogue.
#pragma once

#include <ptx_sm90.cuh>

#include "gemm.cuh"
#include "tensor_map.h"
#include "tiles.h"

namespace ldmq::sm90 {

constexpr int kWarpgroup = 128, kThreads = 3 * kWarpgroup, kAlignment = 1024;
constexpr int kLoadRegisters = 40, kMultiplyRegisters = 232;  // of a thread: 504 for three, of 512

template <Kind KIND, int A_ROWS, int B_ROWS, int K, int STAGES, bool COOPERATIVE, int CLUSTER>
struct Tile {
  static constexpr Kind kKind = KIND;
  static constexpr bool kInt4 = KIND == Kind::kLinearInt4, kCooperative = COOPERATIVE;
  static constexpr int kARows = A_ROWS, kBRows = B_ROWS, kK = K, kStages = STAGES, kCluster = CLUSTER;
  static constexpr int kM = kInt4 ? B_ROWS : A_ROWS, kN = kInt4 ? A_ROWS : B_ROWS;  // of the output
  static constexpr int kGroupRows = COOPERATIVE ? A_ROWS / 2 : A_ROWS;                       // of a warpgroup
  static constexpr int kARowBytes = kInt4 ? K / 2 : K;
  static constexpr int kABytes = A_ROWS * kARowBytes, kBBytes = B_ROWS * K, kStageBytes = kABytes + kBBytes;
  static constexpr int kSharedBytes = STAGES * kStageBytes + (2 * STAGES + 2) * 8;
  static_assert(kGroupRows % 64 == 0 && B_ROWS % 32 == 0 && kABytes % kAlignment == 0);
  static_assert(kBBytes / CLUSTER % kAlignment == 0, "each part of operand b begins where a swizzle does");
  static_assert(kSharedBytes <= 227 << 10 && A_ROWS <= 256 && B_ROWS <= 256);
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
template <typename Tile>
__device__ __forceinline__ void load_tiles(const Parameters& parameters, const Shared<Tile>& shared, int rank) {
  constexpr int kPart = Tile::kBRows / Tile::kCluster;  // of operand b, loaded by this block for all of its cluster
  const int cluster = static_cast<int>(blockIdx.x) / Tile::kCluster;
  const int clusters = static_cast<int>(gridDim.x) / Tile::kCluster, tiles = parameters.scheduler.count();
  prefetch_tensormap(&parameters.a);
  prefetch_tensormap(&parameters.b);
  Ring<Tile::kStages> ring;
  for (int tile = cluster; tile < tiles; tile += clusters) {
    int a_tile, b_tile;
    parameters.scheduler.coordinates(tile, a_tile, b_tile);
    const int a_row = (a_tile * Tile::kCluster + rank) * Tile::kARows, b_row = b_tile * Tile::kBRows + rank * kPart;
    int base_w = 0, base_h = 0, sample = 0;
    if constexpr (Tile::kKind == Kind::kConv2d) {
      const ConvShape& p = parameters.conv;
      const int row = a_row / p.out_width;
      sample = row / p.out_height;
      base_w = (a_row - row * p.out_width) * p.stride_width - p.pad_left;
      base_h = (row - sample * p.out_height) * p.stride_height - p.pad_top;
    }
    for (int tap = 0; tap < parameters.taps; ++tap) {
      uint16_t tap_w = 0, tap_h = 0;
      if constexpr (Tile::kKind == Kind::kConv2d) {
        const ConvShape& p = parameters.conv;
        const int tap_y = tap / p.kernel_width, tap_x = tap - tap_y * p.kernel_width;
        tap_w = static_cast<uint16_t>(tap_x * p.dilation_width);
        tap_h = static_cast<uint16_t>(tap_y * p.dilation_height);
      }
      for (int channel = 0; channel < parameters.channels; channel += Tile::kK) {
        uint64_t* full = shared.full + ring.stage;
        mbarrier_wait(shared.empty + ring.stage, ring.parity ^ 1u);
        mbarrier_arrive_expect_tx(full, Tile::kStageBytes);
        if constexpr (Tile::kKind == Kind::kConv2d) {
          tma_load_im2col(shared.a(ring.stage), &parameters.a, full, channel, base_w, base_h, sample, tap_w, tap_h);
        } else {
          tma_load_2d(shared.a(ring.stage), &parameters.a, full, Tile::kInt4 ? channel / 2 : channel, a_row);
        }
        char* target = shared.b(ring.stage) + rank * kPart * Tile::kK;
        const int b_column = tap * parameters.channels + channel;
        if constexpr (Tile::kCluster > 1) {
          tma_load_2d_multicast(target, &parameters.b, full, b_column, b_row, (1 << Tile::kCluster) - 1);
        } else {
          tma_load_2d(target, &parameters.b, full, b_column, b_row);
        }
        ring.advance(1);
      }
    }
  }
}

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

// The wgmmas of one step with an int8 operand a, issued and committed. `first_row` is of the warpgroup in the tile.
template <typename Tile, int BANDS>
__device__ __forceinline__ void multiply_step(const Shared<Tile>& shared, int stage, int first_row, bool accumulate,
                                              int (&sum)[BANDS][Tile::kBRows / 2]) {
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

// One warpgroup: multiplies and stores the tiles, or the rows of tiles, that are its own.
template <typename Tile, typename Out>
__device__ __forceinline__ void multiply_tiles(const Parameters& parameters, const Shared<Tile>& shared, int rank,
                                               int group) {
  constexpr int kBands = Tile::kGroupRows / 64;
  const int cluster = static_cast<int>(blockIdx.x) / Tile::kCluster;
  const int clusters = static_cast<int>(gridDim.x) / Tile::kCluster, tiles = parameters.scheduler.count();
  const int steps_of_tap = (parameters.channels + Tile::kK - 1) / Tile::kK, steps = steps_of_tap * parameters.taps;
  const int warp_row = static_cast<int>(threadIdx.x) % kWarpgroup / 32 * 16;
  const int group_row = Tile::kCooperative ? group * Tile::kGroupRows : 0;
  const auto release = [&](int stage) {  // to all blocks that load into it
    if (threadIdx.x % kWarpgroup < Tile::kCluster) mbarrier_arrive(shared.empty + stage, threadIdx.x % kWarpgroup);
  };
  Ring<Tile::kStages> ring;
  int round = 0;
  for (int tile = cluster; tile < tiles; tile += clusters, ++round) {
    if (!Tile::kCooperative && round % 2 != group) {
      ring.advance(steps);
      continue;
    }
    int a_tile, b_tile;
    parameters.scheduler.coordinates(tile, a_tile, b_tile);
    const int a_row = (a_tile * Tile::kCluster + rank) * Tile::kARows;
    // An mbarrier tells one phase from the next alone: whose turn it is not yet would take an old phase for its own.
    if (!Tile::kCooperative) mbarrier_wait(shared.turn + group, static_cast<uint32_t>(round / 2 + group + 1) & 1u);
    int sum[kBands][Tile::kBRows / 2];
    [[maybe_unused]] Unpacked<Tile, kBands> even, odd;  // wgmmas read one of them while the other is written
    int before = 0;
    const auto end_step = [&](int step) {  // while its wgmmas are in flight, those of the step before are done
      wgmma_wait<1>();
      if (step > 0) release(before);
      before = ring.stage;
      ring.advance(1);
    };
    if constexpr (Tile::kInt4) {
      const int lane_row = a_row + group_row + warp_row + static_cast<int>(threadIdx.x) % 32 / 4;
      Multipliers<Tile, kBands> multipliers(parameters, lane_row);
      const auto make_step = [&](int step, Unpacked<Tile, kBands>& a, Unpacked<Tile, kBands>& a_before) {
        mbarrier_wait(shared.full + ring.stage, ring.parity);
        unpack_step(shared, ring.stage, group_row, multipliers, a);
        multipliers.load(step + 1);
        multiply_unpacked_step(shared, ring.stage, step > 0, a, sum);
        end_step(step);
        a_before.keep();
      };
#pragma unroll 1
      for (int step = 0;;) {
        make_step(step, even, odd);
        if (++step == steps) break;
        make_step(step, odd, even);
        if (++step == steps) break;
      }
    } else {
      for (int step = 0; step < steps; ++step) {
        mbarrier_wait(shared.full + ring.stage, ring.parity);
        multiply_step<Tile, kBands>(shared, ring.stage, group_row, step > 0, sum);
        end_step(step);
      }
    }
    // Of every warp, so that none is still before its turn when the next one begins.
    if (!Tile::kCooperative && threadIdx.x % 32 == 0) mbarrier_arrive(shared.turn + 1 - group, rank);
    wgmma_wait<0>();
    if constexpr (Tile::kInt4) {
      even.keep();
      odd.keep();
    }
    release(before);
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
      keep_registers(sum[band]);
      const int a_first = a_row + group_row + band * 64 + warp_row, b_first = b_tile * Tile::kBRows;
      const auto accumulator = [&](int i) { return sum[band][i]; };
      if constexpr (Tile::kInt4) {
        finish_transposed<Out, Tile::kBRows / 8>(parameters.epilogue, b_first, a_first, accumulator);
      } else {
        finish_rows<Out, Tile::kBRows / 8>(parameters.epilogue, a_first, b_first, accumulator);
      }
    }
  }
}

template <typename Tile, typename Out>
__global__ void __launch_bounds__(kThreads, 1) gemm_kernel(const __grid_constant__ Parameters parameters) {
  const Shared<Tile> shared;
  const int rank = Tile::kCluster > 1 ? static_cast<int>(cluster_rank()) : 0;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      mbarrier_init(shared.full + stage, 1);
      mbarrier_init(shared.empty + stage, (Tile::kCooperative ? 2 : 1) * Tile::kCluster);
    }
    mbarrier_init(shared.turn, kWarpgroup / 32);
    mbarrier_init(shared.turn + 1, kWarpgroup / 32);
    fence_mbarrier_init();
  }
  if constexpr (Tile::kCluster > 1) {
    cluster_meet();
  } else {
    __syncthreads();
  }
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == 0) {
    setmaxnreg_dec<kLoadRegisters>();
    if (threadIdx.x == 0) load_tiles(parameters, shared, rank);
  } else {
    setmaxnreg_inc<kMultiplyRegisters>();
    multiply_tiles<Tile, Out>(parameters, shared, rank, warpgroup - 1);
  }
  // a block stays until nobody loads into it or arrives at its mbarriers any more
  if constexpr (Tile::kCluster > 1) {
    __syncwarp();
    cluster_sync();
  }
}

template <typename Tile>
int run(const ldmq_gemm& gemm, void* stream) {
  Parameters parameters = {};
  const int taps = taps_of(gemm);
  cudaError_t error;
  if constexpr (Tile::kInt4) {
    error = encode_tiled(&parameters.a, gemm.weight, gemm.n, gemm.channels / 2, Tile::kARows,
                          Tile::kARowBytes);
  } else if constexpr (Tile::kKind == Kind::kConv2d) {
    error = encode_im2col(&parameters.a, gemm, Tile::kARows, Tile::kK);
  } else {
    error = encode_tiled(&parameters.a, gemm.x, gemm.m, gemm.channels, Tile::kARows, Tile::kK);
  }
  if (error != cudaSuccess) return error;
  const void* b = Tile::kInt4 ? static_cast<const void*>(gemm.x) : gemm.weight;
  const int64_t a_rows = Tile::kInt4 ? gemm.n : gemm.m;
  const int64_t b_rows = Tile::kInt4 ? gemm.m : gemm.n;
  error = encode_tiled(&parameters.b, b, b_rows, taps * gemm.channels, Tile::kBRows / Tile::kCluster, Tile::kK);
  if (error != cudaSuccess) return error;
  parameters.multiplier = gemm.multiplier;
  parameters.channels = static_cast<int>(gemm.channels);
  parameters.taps = taps;
  parameters.groups = static_cast<int>(ceil_div(gemm.channels, kGroup));
  parameters.a_rows = static_cast<int>(a_rows);
  parameters.scheduler = {static_cast<int>(ceil_div(a_rows, Tile::kARows * Tile::kCluster)),
                          static_cast<int>(ceil_div(b_rows, Tile::kBRows))};
  parameters.conv = conv_shape_of(gemm);
  parameters.epilogue = epilogue_of(gemm);
  int device = 0, multiprocessors = 0;
  error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return error;
  const int clusters = std::max(1, std::min(parameters.scheduler.count(), multiprocessors / Tile::kCluster));
  const Shape shape = {dim3(static_cast<unsigned>(clusters * Tile::kCluster)), kThreads, Tile::kSharedBytes,
                       Tile::kCluster};
  return with_out_type(gemm.out_dtype, [&](auto out) {
    return launch(gemm_kernel<Tile, decltype(out)>, shape, stream, parameters);
  });
}

template <typename Tile>
CompiledTile compiled(const char* op) {
  return {{op, 90, Tile::kM, Tile::kN, Tile::kK, Tile::kStages, Tile::kCluster, Tile::kCooperative},
          run<Tile>};
}

}  // namespace ldmq::sm90
