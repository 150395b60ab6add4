// A GEMM as the kernels see it: what the host prepares once for every tile.
#pragma once

#include <type_traits>

#include "epilogue.cuh"
#include "launch.h"

namespace ldmq {

constexpr int kGroup = 64;  // input channels that share a multiplier of an int4 weight

enum class Kind { kLinear, kConv2d, kLinearInt4, kGeglu };
enum class Element { kInt8, kE4m3 };  // of both operands, as the tensor cores read them

// int8 is summed exactly, e4m3 in float32.
template <Element ELEMENT>
using AccumulatorOf = std::conditional_t<ELEMENT == Element::kInt8, int, float>;

// The shape of a convolution: of its images, kernel and output.
struct ConvShape {
  int height, width, out_height, out_width;
  int kernel_width, stride_height, stride_width, dilation_height, dilation_width, pad_top, pad_left, upsample;
};

inline Epilogue epilogue_of(const ldmq_gemm& gemm) {
  Epilogue epilogue = {};
  epilogue.x_scale = gemm.x_scale;
  epilogue.weight_scale = gemm.weight_scale;
  epilogue.bias = gemm.bias;
  epilogue.vector = gemm.vector;
  epilogue.residual = gemm.residual;
  epilogue.out_inv_scale = gemm.out_inv_scale;
  epilogue.out_inv_scale_step = gemm.out_inv_scale_count == 1 ? 0 : 1;
  epilogue.out = gemm.split_k > 1 ? gemm.partial : gemm.out;
  epilogue.m = static_cast<int>(gemm.m);
  epilogue.n = static_cast<int>(gemm.n);
  epilogue.scale_rows = static_cast<int>(gemm.scale_rows);
  epilogue.vector_rows = static_cast<int>(gemm.vectors > 0 ? gemm.m / gemm.vectors : gemm.m);
  return epilogue;
}

inline ConvShape conv_shape_of(const ldmq_gemm& gemm) {
  return {static_cast<int>(gemm.height), static_cast<int>(gemm.width), static_cast<int>(gemm.out_height),
          static_cast<int>(gemm.out_width), gemm.kernel_width, gemm.stride_height, gemm.stride_width,
          gemm.dilation_height, gemm.dilation_width, gemm.pad_top, gemm.pad_left, gemm.upsample};
}

// Calls `body` with a value of the type that is stored: int8 for the next layer of int8, by GEGLU for any next layer.
template <Kind KIND, Element ELEMENT, typename Body>
int with_out_type(ldmq_dtype dtype, Body body) {
  switch (dtype) {
    case LDMQ_FLOAT32:
      return body(float());
    case LDMQ_FLOAT16:
      return body(__half());
    case LDMQ_BFLOAT16:
      return body(__nv_bfloat16());
    case LDMQ_INT8:
      if constexpr (ELEMENT == Element::kInt8 || KIND == Kind::kGeglu) return body(int8_t());
      break;
    case LDMQ_FLOAT8:
      if constexpr (KIND == Kind::kGeglu) return body(Float8());
  }
  return cudaErrorInvalidValue;
}

inline int taps_of(const ldmq_gemm& gemm) {
  return gemm.kernel_height > 0 ? gemm.kernel_height * gemm.kernel_width : 1;
}

// What is stored in place of an output where several blocks share the k of a tile: its accumulators as they are.
struct PartialSums {};

// Calls `body` with a value of the type that is stored, by split-K that of sums.
template <Kind KIND, Element ELEMENT, typename Body>
int with_stored_type(const ldmq_gemm& gemm, Body body) {
  if constexpr (KIND == Kind::kConv2d) {
    if (gemm.split_k > 1) return body(PartialSums());
  }
  return with_out_type<KIND, ELEMENT>(gemm.out_dtype, body);
}

// The steps of the main loop that one block makes of a tile: all of them, or by split-K a part.
struct Steps {
  int first, count, split;
};

// Tiles in the order that keeps what neighbours share in the second-level cache: bands of a few rows of tiles, and
// within a band column after column. By split-K all tiles come with their first part of k, then all with the next one.
struct TileScheduler {
  int tiles_m, tiles_n, steps;
  int splits = 1, split_steps = 0;  // parts of k, and the steps of each but the last

  // As many parts as have a step to make, of at most `split_k`.
  void split(int split_k) {
    split_steps = (steps + split_k - 1) / split_k;
    splits = (steps + split_steps - 1) / split_steps;
  }
  // Takes the part from the number of a block's work, and leaves that of its tile.
  template <typename Out>
  __device__ __forceinline__ Steps steps_of(int& tile) const {
    if constexpr (!std::is_same_v<Out, PartialSums>) return {0, steps, 0};
    const int split = tile / (tiles_m * tiles_n), first = split * split_steps;
    tile -= split * tiles_m * tiles_n;
    return {first, min(split_steps, steps - first), split};
  }

  __device__ __forceinline__ void coordinates(int tile, int& tile_m, int& tile_n) const {
    constexpr int kBand = 8;
    const int band = tile / (kBand * tiles_n), in_band = tile - band * kBand * tiles_n;
    const int height = min(kBand, tiles_m - band * kBand);
    tile_m = band * kBand + in_band % height;
    tile_n = in_band / height;
  }
  __host__ __device__ int count() const { return tiles_m * tiles_n * splits; }
};

// out of the partial sums of a convolution's `splits` parts of k, added from the first to the last.
template <typename Sum>
int reduce_partial_sums(const ldmq_gemm& gemm, int splits, const Stream& stream);

// The second launch of split-K; nothing where a tile's own blocks stored the output.
template <Element ELEMENT>
int reduce_if_split(const ldmq_gemm& gemm, const TileScheduler& scheduler, const Stream& stream) {
  return gemm.split_k > 1 ? reduce_partial_sums<AccumulatorOf<ELEMENT>>(gemm, scheduler.splits, stream) : cudaSuccess;
}

// A step of a convolution's main loop: a tap, and some of its input channels.
struct Step {
  int tap, tap_y, tap_x, channel;

  // The step of this number, of K channels each: its divisions are made once, before the loop.
  template <int K>
  static __device__ __forceinline__ Step at(int number, int channels, int kernel_width) {
    if (number == 0) return {0, 0, 0, 0};
    const int steps_of_tap = (channels + K - 1) / K, tap = number / steps_of_tap;
    return {tap, tap / kernel_width, tap % kernel_width, (number - tap * steps_of_tap) * K};
  }
  template <int K>
  __device__ __forceinline__ void advance(int channels, int kernel_width) {
    channel += K;
    if (channel < channels) return;
    channel = 0;
    ++tap;
    if (++tap_x < kernel_width) return;
    tap_x = 0;
    ++tap_y;
  }
};

// Four int4 in -7..7, with 7 added to each, in four bytes, times a multiplier of 1 to 18: four int8.
// Each byte of the product stays below 256, so one multiplication serves four bytes; what is subtracted for the added,
// 7 * multiplier, is subtracted byte by byte without borrowing.
__device__ __forceinline__ uint32_t times_multiplier(uint32_t raised, uint32_t multiplier) {
  const uint32_t product = raised * multiplier, seven = 7u * 0x01010101u * multiplier;
  return ((product | 0x80808080u) - seven) ^ (~product & 0x80808080u);
}

// The packed bytes 2 and 2 of a lane (four int4, and the four that are 16 further) to registers of the tensor cores.
__device__ __forceinline__ void unpack_lane(uint32_t& low, uint32_t& high, uint32_t near, uint32_t far,
                                            uint32_t multiplier) {
  const uint32_t raised = ((near | far << 16) ^ 0x88888888u) - 0x11111111u;  // by 7, in each half of a byte
  const uint32_t even = raised & 0x0f0f0f0fu, odd = raised >> 4 & 0x0f0f0f0fu;
  low = times_multiplier(__byte_perm(even, odd, 0x5140), multiplier);
  high = times_multiplier(__byte_perm(even, odd, 0x7362), multiplier);
}

}  // namespace ldmq
