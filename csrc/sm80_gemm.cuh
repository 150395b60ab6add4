// GEMMs on mma.sync: of int8 for every GPU from sm_80 on, of e4m3 from sm_89 on.
//
// A block makes one tile of the output. cp.async brings its operands into a ring of STAGES steps of 64 input channels,
// with zeros for what lies outside: the padding of a convolution, and what is beyond m, n and k. Each warp
// reads its rows of x and of the weight by ldmatrix, and multiplies. An int4 weight stays packed in shared memory, and
// becomes int8 in registers.
#pragma once

#include <griddepcontrol.cuh>
#include <ptx_sm80.cuh>

#include "gemm.cuh"
#include "tiles.h"

namespace ldmq::sm80 {

constexpr int kK = 64, kChunk = 16;  // bytes of a step, and of a copy

template <Kind KIND, Element ELEMENT, int M, int N, int WARP_M, int WARP_N, int STAGES>
struct Tile {
  using Accumulator = AccumulatorOf<ELEMENT>;
  static constexpr Kind kKind = KIND;
  static constexpr Element kElement = ELEMENT;
  static constexpr int kFamily = ELEMENT == Element::kInt8 ? 80 : 89;
  static constexpr bool kGated = KIND == Kind::kGeglu;  // of a warp's columns the first half, and then their gates
  static constexpr int kM = M, kN = N, kOutN = kGated ? N / 2 : N, kStages = STAGES;
  static constexpr int kWarpM = WARP_M, kWarpN = WARP_N;
  static constexpr int kWarpsM = M / WARP_M, kThreads = 32 * kWarpsM * (N / WARP_N);
  static constexpr int kWeightBytes = KIND == Kind::kLinearInt4 ? kK / 2 : kK;  // of a column and step
  static constexpr int kStageBytes = M * kK + N * kWeightBytes;
  static constexpr int kSharedBytes = STAGES * kStageBytes;
  // Blocks of a multiprocessor that registers must be left for; 0: as many as the compiler chooses. For the small FP8
  // tile it would choose five, and spill, where shared memory has room for two or three; for the small one of GEGLU
  // three, where sm_86 has room for two, and in FP8 two, where sm_90 has registers for one.
  static constexpr int kBlocks = kGated && M == 64                              ? (ELEMENT == Element::kE4m3 ? 1 : 2)
                                 : ELEMENT == Element::kE4m3 && kThreads == 128 ? 3
                                                                                : 0;
  static_assert(WARP_M % 16 == 0 && WARP_N % 32 == 0, "a warp has whole runs of the epilogue");
};

struct Parameters {
  const uint8_t* x;
  const uint8_t* weight;
  const uint8_t* multiplier;
  int channels, taps, groups;
  TileScheduler scheduler;
  ConvShape conv;
  Epilogue epilogue;
};

// Byte of a chunk of 16 in rows of 64 (or 32) bytes, permuted so that eight rows of one chunk meet no bank twice.
template <int ROW_BYTES>
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  return ROW_BYTES == 64 ? row * 64 + (chunk ^ (row >> 1 & 3)) * kChunk : row * 32 + (chunk ^ (row >> 2 & 1)) * kChunk;
}

// What a thread copies of x in every step: a chunk of each of a few rows.
template <typename Tile>
class ActivationCopies {
  static constexpr int kChunks = kK / kChunk;
  static constexpr int kCount = (Tile::kM * kChunks + Tile::kThreads - 1) / Tile::kThreads;

 public:
  __device__ __forceinline__ ActivationCopies(const Parameters& parameters, int first_row) {
    const int thread = static_cast<int>(threadIdx.x);
    chunk_ = thread % kChunks;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = (thread + i * Tile::kThreads) / kChunks, at = first_row + row;
      valid_[i] = row < Tile::kM && at < parameters.epilogue.m;
      if constexpr (Tile::kKind == Kind::kConv2d) {
        const ConvShape& p = parameters.conv;
        const int sample = at / (p.out_height * p.out_width), pixel = at - sample * (p.out_height * p.out_width);
        const int out_y = pixel / p.out_width;
        y_[i] = out_y * p.stride_height - p.pad_top;
        x_[i] = (pixel - out_y * p.out_width) * p.stride_width - p.pad_left;
        base_[i] = static_cast<int64_t>(sample) * p.height * p.width * parameters.channels;
      } else {
        base_[i] = static_cast<int64_t>(at) * parameters.channels;
      }
    }
  }

  __device__ __forceinline__ void start(const Parameters& parameters, char* target, const Step& step) const {
    const int offset = step.channel + chunk_ * kChunk;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = (static_cast<int>(threadIdx.x) + i * Tile::kThreads) / kChunks;
      if (row >= Tile::kM) continue;
      bool valid = valid_[i] && offset < parameters.channels;
      int64_t at = base_[i] + offset;
      if constexpr (Tile::kKind == Kind::kConv2d) {
        const ConvShape& p = parameters.conv;
        const int y = y_[i] + step.tap_y * p.dilation_height, x = x_[i] + step.tap_x * p.dilation_width;
        valid = valid && y >= 0 && x >= 0 && y < p.height * p.upsample && x < p.width * p.upsample;
        const int source_y = p.upsample == 2 ? y >> 1 : y, source_x = p.upsample == 2 ? x >> 1 : x;
        at += (static_cast<int64_t>(source_y) * p.width + source_x) * parameters.channels;
      }
      cp_async_16(target + chunk_at<kK>(row, chunk_), parameters.x + (valid ? at : 0), valid);
    }
  }

 private:
  int chunk_;
  bool valid_[kCount];
  int64_t base_[kCount];
  int y_[kCount], x_[kCount];
};

// The same of the weight, whose rows are the output's columns.
template <typename Tile>
class WeightCopies {
  static constexpr int kChunks = Tile::kWeightBytes / kChunk, kPacked = Tile::kKind == Kind::kLinearInt4 ? 2 : 1;
  static constexpr int kColumnStep = Tile::kThreads / kChunks;
  static constexpr int kCount = (Tile::kN + kColumnStep - 1) / kColumnStep;
  static_assert(Tile::kThreads % kChunks == 0, "a thread has the same chunk of all its columns");

 public:
  __device__ __forceinline__ WeightCopies(const Parameters& parameters, int first_column) {
    const int thread = static_cast<int>(threadIdx.x);
    column_ = thread / kChunks;
    chunk_ = thread % kChunks;
    row_bytes_ = parameters.channels / kPacked;
    left_ = parameters.epilogue.n - first_column;
    const int64_t column_bytes = static_cast<int64_t>(parameters.taps) * row_bytes_;
    int64_t row = first_column + column_;
    if constexpr (Tile::kGated) {
      static_assert(kColumnStep % Tile::kWarpN == 0, "a thread has values of all warps, or gates of all");
      row = first_column + in_half(column_);
      if (column_ % Tile::kWarpN >= Tile::kWarpN / 2) row += parameters.epilogue.n;
    }
    from_ = parameters.weight + row * column_bytes + chunk_ * kChunk;
    step_bytes_ = (Tile::kGated ? kColumnStep / 2 : kColumnStep) * column_bytes;
  }

  __device__ __forceinline__ void start(const Parameters& parameters, char* target, const Step& step) const {
    const int offset = step.channel / kPacked;
    const uint8_t* from = from_ + static_cast<int64_t>(step.tap) * row_bytes_ + offset;
    const bool inside = offset + chunk_ * kChunk < row_bytes_;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int column = column_ + i * kColumnStep;
      if (Tile::kN % kColumnStep != 0 && column >= Tile::kN) continue;
      const bool valid = inside && in_half(column) < left_;
      cp_async_16(target + chunk_at<Tile::kWeightBytes>(column, chunk_),
                  valid ? from + i * step_bytes_ : parameters.weight, valid);
    }
  }

 private:
  // The column of the output that a tile's column, of values or of gates, belongs to.
  __device__ __forceinline__ static int in_half(int column) {
    constexpr int kHalf = Tile::kWarpN / 2;
    return Tile::kGated ? column / Tile::kWarpN * kHalf + column % kHalf : column;
  }

  int column_, chunk_, row_bytes_, left_;
  const uint8_t* from_;
  int64_t step_bytes_;
};

// The registers of 32 columns of the weight for one half of a step, as operand b: two of every eight columns.
template <typename Tile>
__device__ __forceinline__ void load_weights(uint32_t (&b)[4][2], const char* columns, int first, int half,
                                             const uint32_t (&multiplier)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int block = 0; block < 4; ++block) {
    if constexpr (Tile::kKind == Kind::kLinearInt4) {
      const char* chunk = columns + chunk_at<32>(first + block * 8 + lane / 4, half) + lane % 4 * 2;
      unpack_lane(b[block][0], b[block][1], *reinterpret_cast<const uint16_t*>(chunk),
                  *reinterpret_cast<const uint16_t*>(chunk + 8), multiplier[block]);
    } else if (block % 2 == 0) {
      uint32_t value[4];
      const int column = first + block * 8 + lane / 16 * 8 + lane % 8;
      ldmatrix_x4(value, columns + chunk_at<64>(column, half * 2 + lane / 8 % 2));
      b[block][0] = value[0], b[block][1] = value[1], b[block + 1][0] = value[2], b[block + 1][1] = value[3];
    }
  }
}

// sum += a * b^T.
__device__ __forceinline__ void multiply(int (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_m16n8k32(sum, a, b0, b1);
}
// The tensor cores of sm_89 keep 13 bits of the mantissa of what they add e4m3 to, as those of sm_90 do
// (SageAttention2, arXiv 2411.10958): each mma.sync begins at zero, and its result is added in float32.
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  float partial[4] = {};
  mma_m16n8k32(partial, a, b0, b1);
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += partial[i];
}

template <typename Tile, typename Out>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    gemm_kernel(const __grid_constant__ Parameters parameters) {
  constexpr int kBands = Tile::kWarpM / 16, kRuns = Tile::kWarpN / 32;
  char* shared = shared_memory();
  int tile = static_cast<int>(blockIdx.x), tile_m, tile_n;
  const Steps part = parameters.scheduler.steps_of<Out>(tile);
  parameters.scheduler.coordinates(tile, tile_m, tile_n);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int warp_m = warp % Tile::kWarpsM * Tile::kWarpM;
  const int warp_n = warp / Tile::kWarpsM * Tile::kWarpN;
  const int first_row = tile_m * Tile::kM, first_column = tile_n * Tile::kOutN;

  const ActivationCopies<Tile> rows(parameters, first_row);
  const WeightCopies<Tile> weights(parameters, first_column);
  const int steps = part.count, kernel_width = parameters.conv.kernel_width;
  int next = 0;
  Step next_step = Step::at<kK>(part.first, parameters.channels, kernel_width);
  const auto start_next = [&] {
    if (next < steps) {
      char* stage = shared + next % Tile::kStages * Tile::kStageBytes;
      rows.start(parameters, stage, next_step);
      weights.start(parameters, stage + Tile::kM * kK, next_step);
      next_step.advance<kK>(parameters.channels, kernel_width);
    }
    ++next;
    cp_async_commit();
  };
  griddepcontrol_wait();
#pragma unroll
  for (int i = 0; i < Tile::kStages - 1; ++i) start_next();

  typename Tile::Accumulator sum[kBands][kRuns * 4][4] = {};
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // this step is there for all, and all are done with the one before, which is now filled anew
    start_next();
    const char* x = shared + step % Tile::kStages * Tile::kStageBytes;
    const char* columns = x + Tile::kM * kK;
    uint32_t multiplier[kRuns][4] = {};
    if constexpr (Tile::kKind == Kind::kLinearInt4) {  // a step is one group
#pragma unroll
      for (int block = 0; block < kRuns * 4; ++block) {
        const int column = first_column + warp_n + block * 8 + lane / 4;
        if (column < parameters.epilogue.n) {
          multiplier[block / 4][block % 4] =
              __ldg(parameters.multiplier + static_cast<int64_t>(column) * parameters.groups + step);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[kBands][4];
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
        ldmatrix_x4(a[band], x + chunk_at<64>(warp_m + band * 16 + lane % 16, half * 2 + lane / 16));
      }
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        uint32_t b[4][2];
        load_weights<Tile>(b, columns, warp_n + run * 32, half, multiplier[run]);
#pragma unroll
        for (int band = 0; band < kBands; ++band) {
#pragma unroll
          for (int block = 0; block < 4; ++block) {
            multiply(sum[band][run * 4 + block], a[band], b[block][0], b[block][1]);
          }
        }
      }
    }
  }
  cp_async_wait<0>();
  griddepcontrol_launch_dependents();
#pragma unroll
  for (int band = 0; band < kBands; ++band) {
    const int row = first_row + warp_m + band * 16;
    const auto accumulator = [&](int i) { return sum[band][i / 4][i % 4]; };
    if constexpr (Tile::kGated) {
      finish_gated<Out, kRuns * 4>(parameters.epilogue, row, first_column + warp_n / 2, accumulator);
    } else if constexpr (std::is_same_v<Out, PartialSums>) {
      store_sums<kRuns * 4>(parameters.epilogue, part.split, row, first_column + warp_n, accumulator);
    } else {
      finish_rows<Out, kRuns * 4, Tile::kKind != Kind::kConv2d>(parameters.epilogue, row, first_column + warp_n,
                                                                accumulator);
    }
  }
}

template <typename Tile>
int run(const ldmq_gemm& gemm, const Stream& stream) {
  Parameters parameters = {};
  parameters.x = static_cast<const uint8_t*>(gemm.x);
  parameters.weight = static_cast<const uint8_t*>(gemm.weight);
  parameters.multiplier = gemm.multiplier;
  parameters.channels = static_cast<int>(gemm.channels);
  parameters.taps = taps_of(gemm);
  parameters.groups = static_cast<int>(ceil_div(gemm.channels, kGroup));
  parameters.scheduler = {static_cast<int>(ceil_div(gemm.m, Tile::kM)),
                          static_cast<int>(ceil_div(gemm.n, Tile::kOutN)),
                          static_cast<int>(ceil_div(gemm.channels, kK)) * parameters.taps};
  parameters.conv = conv_shape_of(gemm);
  parameters.epilogue = epilogue_of(gemm);
  if (gemm.split_k > 1) parameters.scheduler.split(gemm.split_k);
  const Shape shape = {dim3(static_cast<unsigned>(parameters.scheduler.count())), Tile::kThreads, Tile::kSharedBytes};
  const int error = with_stored_type<Tile::kKind, Tile::kElement>(gemm, [&](auto out) {
    return launch(gemm_kernel<Tile, decltype(out)>, shape, stream, parameters);
  });
  return error == cudaSuccess ? reduce_if_split<Tile::kElement>(gemm, parameters.scheduler, stream) : error;
}

template <typename Tile>
CompiledTile compiled(const char* op) {
  return {{op, Tile::kFamily, Tile::kM, Tile::kN, kK, Tile::kStages, 1, 0}, run<Tile>};
}

}  // namespace ldmq::sm80
