// What happens to the accumulators of a tile, int32 or float32: scales, bias, sample vector or gate, residual, and one
// rounding; or GEGLU of the two halves of its columns.
//
// The tensor cores leave a lane with two neighbouring columns of every eight. Lanes trade them by shuffles until each
// has eight neighbouring columns of one row, so that memory is read and written 16 bytes at a time.
#pragma once

#include <type_traits>

#include "numbers.cuh"

namespace ldmq {

constexpr int kRun = 8;  // neighbouring columns that a lane reads and writes at once

// The part of ldmq_gemm that the epilogue reads, in the kernel's own parameters.
struct Epilogue {
  const float* x_scale;
  const float* weight_scale;
  ldmq_added bias;
  // (m / vector_rows, n) of out's dtype: added to the rows of a convolution, multiplied with those of a linear
  const void* vector;
  const void* residual;
  const float* out_inv_scale;
  void* out;  // or partial sums
  int m, n, scale_rows, vector_rows, out_inv_scale_step;
};

// The terms of eight columns that all rows share.
template <typename T>
struct ColumnTerms {
  static constexpr bool kInt8 = std::is_same_v<T, int8_t>;
  float scale[kRun], bias[kRun], inv_scale[kInt8 ? kRun : 1];

  __device__ __forceinline__ ColumnTerms(const Epilogue& epilogue, int first) {
    if (first >= epilogue.n) return;
    load_run(scale, epilogue.weight_scale + first);
    if (!epilogue.bias.data) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) bias[i] = 0.0f;
    } else if (epilogue.bias.dtype == LDMQ_FLOAT32) {
      load_run(bias, static_cast<const float*>(epilogue.bias.data) + first);
    } else if (epilogue.bias.dtype == LDMQ_FLOAT16) {
      load_run(bias, static_cast<const __half*>(epilogue.bias.data) + first);
    } else {
      load_run(bias, static_cast<const __nv_bfloat16*>(epilogue.bias.data) + first);
    }
    if constexpr (kInt8) {
      if (epilogue.out_inv_scale_step == 0) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) inv_scale[i] = *epilogue.out_inv_scale;
      } else {
        load_run(inv_scale, epilogue.out_inv_scale + first);
      }
    }
  }
};

// The terms of a row that all columns share. A row beyond the end is taken for the first, and not stored.
struct RowTerms {
  float scale;
  int vector;  // row of the vectors
  int64_t at;
  bool valid;

  __device__ __forceinline__ RowTerms(const Epilogue& epilogue, int row)
      : vector(0), at(0), valid(row < epilogue.m) {
    if (!valid) return;
    at = static_cast<int64_t>(row) * epilogue.n;
    scale = epilogue.x_scale[epilogue.scale_rows == 0 ? 0 : epilogue.scale_rows == 1 ? row : row / epilogue.scale_rows];
    if (epilogue.vector) vector = row / epilogue.vector_rows;
  }
};

// Eight columns of a residual of 16-bit numbers, which come from memory while lanes trade. There are no registers for
// more beside the accumulators: float32 is read when it is added.
template <typename T>
struct Residual {
  static constexpr bool kAhead = sizeof(T) == 2;
  uint4 words;

  __device__ __forceinline__ Residual(const Epilogue& epilogue, const RowTerms& row, int first) {
    if (!kAhead || !epilogue.residual) return;
    const int column = min(first, epilogue.n - kRun);
    words = *reinterpret_cast<const uint4*>(static_cast<const T*>(epilogue.residual) + row.at + column);
  }

  __device__ __forceinline__ void add_to(float (&value)[kRun], const Epilogue& epilogue, const RowTerms& row,
                                         int first) {
    float added[kRun];
    if constexpr (kAhead) {
      // else they are widened as soon as they come, and take twice the registers
      asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
      load_run(added, reinterpret_cast<const T*>(&words));
    } else {
      load_run(added, static_cast<const T*>(epilogue.residual) + row.at + first);
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) value[i] += added[i];
  }
};

// Eight columns of one row from `first` on, from accumulators to memory. T: what is stored, and what is added.
template <typename T, bool GATE, typename Sum>
__device__ __forceinline__ void finish_run(const Epilogue& epilogue, const ColumnTerms<T>& column, const RowTerms& row,
                                           int first, Residual<T>& residual, const Sum (&accumulator)[kRun]) {
  if (!row.valid || first >= epilogue.n) return;
  float value[kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    value[i] = to_float(accumulator[i]) * row.scale * column.scale[i] + column.bias[i];
  }
  if constexpr (std::is_same_v<T, int8_t>) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) value[i] = __fmul_rn(value[i], column.inv_scale[i]);
  } else {
    if (epilogue.vector) {
      float vector[kRun];
      load_run(vector, static_cast<const T*>(epilogue.vector) + static_cast<int64_t>(row.vector) * epilogue.n + first);
#pragma unroll
      for (int i = 0; i < kRun; ++i) value[i] = GATE ? value[i] * vector[i] : value[i] + vector[i];
    }
    if (epilogue.residual) residual.add_to(value, epilogue, row, first);
  }
  store_run(value, static_cast<T*>(epilogue.out) + row.at + first);
}

// Lanes that differ in this bit of their number trade halves, as one step of a transposition.
template <typename Sum>
__device__ __forceinline__ void trade(Sum& low, Sum& high, int lane_bit) {
  const bool upper = threadIdx.x & lane_bit;
  const Sum sent = upper ? low : high;
  const Sum received = __shfl_xor_sync(0xffffffffu, sent, lane_bit);
  (upper ? low : high) = received;
}

// In: of four blocks of eight columns, the two that this lane has of a row. Out: eight neighbours of the row, of the
// block whose number is the lane's place among the four lanes of the row.
template <typename Sum>
__device__ __forceinline__ void gather_columns(Sum (&run)[kRun]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      if (block & bit) continue;
      trade(run[2 * block], run[2 * (block + bit)], bit);
      trade(run[2 * block + 1], run[2 * (block + bit) + 1], bit);
    }
  }
}

// In: of eight columns, the values that this lane has in its row of eight. Out: all eight rows of one of the columns,
// that whose number is lane / 4.
template <typename Sum>
__device__ __forceinline__ void gather_rows(Sum (&run)[kRun]) {
#pragma unroll
  for (int bit = 1; bit < 8; bit *= 2) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (!(i & bit)) trade(run[i], run[i + bit], 4 * bit);
    }
  }
}

// The accumulators of 16 rows x BLOCKS * 8 columns of a warp, as mma_m16n8k32 leaves them: four of a block.
template <typename T, int BLOCKS, bool GATE, typename Accumulator>
__device__ __forceinline__ void finish_rows(const Epilogue& epilogue, int first_row, int first_column,
                                            const Accumulator& accumulator) {
  using Sum = decltype(accumulator(0));
  static_assert(BLOCKS % 4 == 0, "runs are gathered from four blocks");
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const RowTerms rows[2] = {{epilogue, first_row + lane / 4}, {epilogue, first_row + lane / 4 + 8}};
#pragma unroll
  for (int group = 0; group < BLOCKS; group += 4) {
    const int first = first_column + (group + lane % 4) * 8;
    Residual<T> residual[2] = {{epilogue, rows[0], first}, {epilogue, rows[1], first}};
    const ColumnTerms<T> column(epilogue, first);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Sum run[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) run[i] = accumulator((group + i / 2) * 4 + half * 2 + i % 2);
      gather_columns(run);
      finish_run<T, GATE>(epilogue, column, rows[half], first, residual[half], run);
    }
  }
}

// The accumulators themselves, by split-K: of this part of k in (splits, m, n). Four lanes have the eight columns of a
// block, a whole sector.
template <int BLOCKS, typename Accumulator>
__device__ __forceinline__ void store_sums(const Epilogue& epilogue, int split, int first_row, int first_column,
                                           const Accumulator& accumulator) {
  using Sum = decltype(accumulator(0));
  const int lane = static_cast<int>(threadIdx.x) % 32, column = first_column + lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + lane / 4 + half * 8;
    if (row >= epilogue.m) continue;
    Sum* out = static_cast<Sum*>(epilogue.out) +
               (static_cast<int64_t>(split) * epilogue.m + row) * epilogue.n + column;
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
      if (column + block * 8 >= epilogue.n) continue;
      *reinterpret_cast<Pack<Sum, 2>*>(out + block * 8) = {
          {accumulator(block * 4 + half * 2), accumulator(block * 4 + half * 2 + 1)}};
    }
  }
}

// The terms of two neighbouring columns of the product, and of the output where that is quantized.
struct PairTerms {
  float scale[2] = {}, bias[2] = {};

  __device__ __forceinline__ PairTerms(const Epilogue& epilogue, int first, bool valid) {
    if (!valid) return;
    load_run(scale, epilogue.weight_scale + first);
    if (!epilogue.bias.data) return;
    if (epilogue.bias.dtype == LDMQ_FLOAT32) {
      load_run(bias, static_cast<const float*>(epilogue.bias.data) + first);
    } else if (epilogue.bias.dtype == LDMQ_FLOAT16) {
      load_run(bias, static_cast<const __half*>(epilogue.bias.data) + first);
    } else {
      load_run(bias, static_cast<const __nv_bfloat16*>(epilogue.bias.data) + first);
    }
  }
  template <typename Sum>
  __device__ __forceinline__ float of(Sum sum, const RowTerms& row, int i) const {
    return to_float(sum) * row.scale * scale[i] + bias[i];
  }
};

// Eight columns of a row from those that its four lanes have in four blocks: each stores a block. Numbers of 8 and 16
// bits trade places in pairs.
template <typename T>
__device__ __forceinline__ void store_traded(float (&value)[kRun], bool valid, T* target) {
  if constexpr (sizeof(T) == 4) {
    gather_columns(value);
    if (valid) store_run(value, target);
  } else {
    using Bits = std::conditional_t<sizeof(T) == 1, uint16_t, uint32_t>;
    uint32_t pair[4];
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      Pack<T, 2> pack;
      from_floats(pack, value + 2 * block);
      pair[block] = *reinterpret_cast<const Bits*>(&pack);
    }
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
#pragma unroll
      for (int block = 0; block < 4; ++block) {
        if (!(block & bit)) trade(pair[block], pair[block + bit], bit);
      }
    }
    if (!valid) return;
    if constexpr (sizeof(T) == 1) {
      *reinterpret_cast<uint2*>(target) = {pair[0] | pair[1] << 16, pair[2] | pair[3] << 16};
    } else {
      *reinterpret_cast<uint4*>(target) = {pair[0], pair[1], pair[2], pair[3]};
    }
  }
}

// The same as finish_rows with GEGLU: the first half of the blocks are of values, and the others of their gates. Lanes
// trade the results, which are half as many as the sums, and mostly narrower.
template <typename T, int BLOCKS, typename Accumulator>
__device__ __forceinline__ void finish_gated(const Epilogue& epilogue, int first_row, int first_column,
                                             const Accumulator& accumulator) {
  constexpr bool kQuantized = sizeof(T) == 1;
  static_assert(BLOCKS % 8 == 0, "four blocks of values are stored at once");
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const RowTerms rows[2] = {{epilogue, first_row + lane / 4}, {epilogue, first_row + lane / 4 + 8}};
#pragma unroll
  for (int group = 0; group < BLOCKS / 2; group += 4) {
    float out[2][kRun];
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      const int first = first_column + (group + block) * 8 + lane % 4 * 2;
      const bool valid = first < epilogue.n;
      const PairTerms of_value(epilogue, first, valid), of_gate(epilogue, epilogue.n + first, valid);
      float inv_scale[2] = {};
      if (kQuantized && valid) {
        if (epilogue.out_inv_scale_step == 0) {
          inv_scale[0] = inv_scale[1] = *epilogue.out_inv_scale;
        } else {
          load_run(inv_scale, epilogue.out_inv_scale + first);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // two columns of two rows
        const int at = (group + block) * 4 + i, column = i % 2;
        const RowTerms& row = rows[i / 2];
        const float gate = of_gate.of(accumulator(BLOCKS * 2 + at), row, column);
        float gated = of_value.of(accumulator(at), row, column) * gelu(gate);
        if constexpr (kQuantized) gated = __fmul_rn(gated, inv_scale[column]);
        out[i / 2][block * 2 + column] = gated;
      }
    }
    const int first = first_column + (group + lane % 4) * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      store_traded(out[half], rows[half].valid && first < epilogue.n,
                   static_cast<T*>(epilogue.out) + rows[half].at + first);
    }
  }
}

// The same for a transposed GEMM: the accumulators' 16 rows are columns of the output, and their columns its rows.
// Two neighbouring lanes have the 16 columns of the same two rows, so that they write whole sectors.
template <typename T, int BLOCKS, bool GATE, typename Accumulator>
__device__ __forceinline__ void finish_transposed(const Epilogue& epilogue, int first_row, int first_column,
                                                  const Accumulator& accumulator) {
  using Sum = decltype(accumulator(0));
  static_assert(BLOCKS % 4 == 0, "runs are gathered from four blocks");
  const int lane = static_cast<int>(threadIdx.x) % 32, place = lane / 4;
  const int first = first_column + lane % 2 * 8;
  const ColumnTerms<T> column(epilogue, first);
#pragma unroll
  for (int group = 0; group < BLOCKS; group += 4) {
    const int row = first_row + (group + place / 2) * 8 + lane / 2 % 2 * 4 + place % 2;
    const RowTerms rows[2] = {{epilogue, row}, {epilogue, row + 2}};
    Residual<T> residual[2] = {{epilogue, rows[0], first}, {epilogue, rows[1], first}};
    Sum run[2][kRun];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) run[half][i] = accumulator((group + i / 2) * 4 + half * 2 + i % 2);
      gather_rows(run[half]);
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) trade(run[0][i], run[1][i], 1);  // halves of the columns for rows
#pragma unroll
    for (int i = 0; i < 2; ++i) finish_run<T, GATE>(epilogue, column, rows[i], first, residual[i], run[i]);
  }
}

}  // namespace ldmq
