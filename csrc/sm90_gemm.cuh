// GEMMs of int8 or e4m3 on wgmma for sm_90a: persistent blocks whose warpgroups have one task each.
//
// One warp loads: the tensor memory accelerator brings the steps of one tile after the other into a ring in shared
// memory. Two warpgroups multiply straight from there. Either each has tiles of its own, and one multiplies while the
// other stores (ping-pong), or both share the rows of a tile that is too large for one (cooperative). The two blocks of
// a cluster have tiles one below the other, which need the same columns: each loads half of them for both.
//
// Operand a is x, operand b the weight. With an int4 weight they change places: the packed weight is unpacked into
// registers, which wgmma takes as operand a alone, and the output is transposed in the epilogue.
#pragma once

#include <algorithm>

#include "sm90_multiply.cuh"
#include "tensor_map.h"
#include "tiles.h"

namespace ldmq::sm90 {

// One warpgroup: multiplies and stores the tiles, or the rows of tiles, that are its own.
template <typename Tile, typename Out>
__device__ __forceinline__ void multiply_tiles(const Parameters& parameters, const Shared<Tile>& shared, int rank,
                                               int group) {
  constexpr int kBands = Tile::kGroupRows / 64;
  constexpr bool kGate = Tile::kKind != Kind::kConv2d;
  const int cluster = static_cast<int>(blockIdx.x) / Tile::kCluster;
  const int clusters = static_cast<int>(gridDim.x) / Tile::kCluster, tiles = parameters.scheduler.count();
  const int warp_row = static_cast<int>(threadIdx.x) % kWarpgroup / 32 * 16;
  const int group_row = Tile::kCooperative ? group * Tile::kGroupRows : 0;
  const auto release = [&](int stage) {  // to all blocks that load into it
    if (threadIdx.x % kWarpgroup < Tile::kCluster) mbarrier_arrive(shared.empty + stage, threadIdx.x % kWarpgroup);
  };
  Ring<Tile::kStages> ring;
  int round = 0;
  for (int work = cluster; work < tiles; work += clusters, ++round) {
    int tile = work;
    const Steps part = parameters.scheduler.steps_of<Out>(tile);
    const int steps = part.count;
    if (!Tile::kCooperative && round % 2 != group) {
      ring.advance(steps);
      continue;
    }
    int a_tile, b_tile;
    parameters.scheduler.coordinates(tile, a_tile, b_tile);
    const int a_row = (a_tile * Tile::kCluster + rank) * Tile::kARows;
    // An mbarrier tells one phase from the next alone: whose turn it is not yet would take an old phase for its own.
    if (!Tile::kCooperative) mbarrier_wait(shared.turn + group, static_cast<uint32_t>(round / 2 + group + 1) & 1u);
    typename Tile::Accumulator sum[kBands][Tile::kBRows / 2];
    // Of every warp, so that none is still before its turn when the next one begins.
    const auto hand_over = [&] {
      if (!Tile::kCooperative && threadIdx.x % 32 == 0) mbarrier_arrive(shared.turn + 1 - group, rank);
    };
    if constexpr (Tile::kElement == Element::kE4m3) {
      multiply_e4m3<Tile, kBands>(shared, ring, steps, group_row, release, sum);
    } else if constexpr (Tile::kInt4) {
      const int lane_row = a_row + group_row + warp_row + static_cast<int>(threadIdx.x) % 32 / 4;
      multiply_int4<Tile, kBands>(parameters, shared, ring, steps, group_row, lane_row, release, hand_over, sum);
    } else {
      multiply_int8<Tile, kBands>(shared, ring, steps, group_row, release, hand_over, sum);
    }
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
      keep_registers(sum[band]);
      const int a_first = a_row + group_row + band * 64 + warp_row, b_first = b_tile * Tile::kBStep;
      const auto accumulator = [&](int i) { return sum[band][i]; };
      if constexpr (Tile::kInt4) {
        finish_transposed<Out, Tile::kBRows / 8, kGate>(parameters.epilogue, b_first, a_first, accumulator);
      } else if constexpr (Tile::kGated) {
        finish_gated<Out, Tile::kBRows / 8>(parameters.epilogue, a_first, b_first, accumulator);
      } else if constexpr (std::is_same_v<Out, PartialSums>) {
        store_sums<Tile::kBRows / 8>(parameters.epilogue, part.split, a_first, b_first, accumulator);
      } else {
        finish_rows<Out, Tile::kBRows / 8, kGate>(parameters.epilogue, a_first, b_first, accumulator);
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
    prefetch_tensormap(&parameters.a);
    prefetch_tensormap(&parameters.b);
  }
  if constexpr (Tile::kCluster > 1) {
    cluster_meet();
  } else {
    __syncthreads();
  }
  griddepcontrol_wait();
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == 0) {
    setmaxnreg_dec<kLoadRegisters>();
    if (threadIdx.x == 0) load_tiles<Tile, Out>(parameters, shared, rank);
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
int run(const ldmq_gemm& gemm, const Stream& stream) {
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
  const int64_t b_rows = Tile::kInt4 ? gemm.m : Tile::kGated ? 2 * gemm.n : gemm.n;
  error = encode_tiled(&parameters.b, b, b_rows, taps * gemm.channels, Tile::kBPart, Tile::kK);
  if (error != cudaSuccess) return error;
  parameters.multiplier = gemm.multiplier;
  parameters.channels = static_cast<int>(gemm.channels);
  parameters.taps = taps;
  parameters.groups = static_cast<int>(ceil_div(gemm.channels, kGroup));
  parameters.a_rows = static_cast<int>(a_rows);
  parameters.scheduler = {static_cast<int>(ceil_div(a_rows, Tile::kARows * Tile::kCluster)),
                          static_cast<int>(ceil_div(b_rows, Tile::kBRows)),
                          static_cast<int>(ceil_div(gemm.channels, Tile::kK)) * taps};
  if (gemm.split_k > 1) parameters.scheduler.split(gemm.split_k);
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
  const int launched = with_stored_type<Tile::kKind, Tile::kElement>(gemm, [&](auto out) {
    return launch(gemm_kernel<Tile, decltype(out)>, shape, stream, parameters);
  });
  return launched == cudaSuccess ? reduce_if_split<Tile::kElement>(gemm, parameters.scheduler, stream) : launched;
}

template <typename Tile>
CompiledTile compiled(const char* op) {
  return {{op, 90, Tile::kM, Tile::kN, Tile::kK, Tile::kStages, Tile::kCluster, Tile::kCooperative},
          run<Tile>};
}

}  // namespace ldmq::sm90
