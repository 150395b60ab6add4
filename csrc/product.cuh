// A product as the kernels see it: what the host prepares once for every tile.
#pragma once

#include "epilogue.cuh"
#include "launch.h"

namespace ldmq {

constexpr int kGroup = 64;  // input channels that share a multiplier of an int4 weight

enum class Kind { kLinear, kConv2d, kLinearInt4 };

// Where the pixels of a convolution are.
struct Pictures {
  int height, width, out_height, out_width;
  int kernel_width, stride_height, stride_width, dilation_height, dilation_width, pad_top, pad_left, upsample;
};

inline Epilogue epilogue_of(const ldmq_product& product) {
  Epilogue epilogue = {};
  epilogue.x_scale = product.x_scale;
  epilogue.weight_scale = product.weight_scale;
  epilogue.bias = product.bias;
  epilogue.sample_bias = product.sample_bias;
  epilogue.residual = product.residual;
  epilogue.out_inv_scale = product.out_inv_scale;
  epilogue.out_inv_scale_step = product.out_inv_scale_count == 1 ? 0 : 1;
  epilogue.out = product.out;
  epilogue.rows = static_cast<int>(product.rows);
  epilogue.columns = static_cast<int>(product.columns);
  epilogue.scale_rows = static_cast<int>(product.scale_rows);
  epilogue.sample_rows = static_cast<int>(product.samples > 0 ? product.rows / product.samples : product.rows);
  return epilogue;
}

inline Pictures pictures_of(const ldmq_product& product) {
  return {static_cast<int>(product.height), static_cast<int>(product.width), static_cast<int>(product.out_height),
          static_cast<int>(product.out_width), product.kernel_width, product.stride_height, product.stride_width,
          product.dilation_height, product.dilation_width, product.pad_top, product.pad_left, product.upsample};
}

// Calls `body` with a value of the type that is stored.
template <typename Body>
int with_out_type(ldmq_dtype dtype, Body body) {
  switch (dtype) {
    case LDMQ_FLOAT32:
      return body(float());
    case LDMQ_FLOAT16:
      return body(__half());
    case LDMQ_BFLOAT16:
      return body(__nv_bfloat16());
    case LDMQ_INT8:
      return body(int8_t());
  }
  return cudaErrorInvalidValue;
}

inline int taps_of(const ldmq_product& product) {
  return product.kernel_height > 0 ? product.kernel_height * product.kernel_width : 1;
}

// Tiles in the order that keeps what neighbours share in the second-level cache: bands of a few rows of tiles, and
// within a band column after column.
struct Order {
  int tile_rows, tile_columns;

  __device__ __forceinline__ void place(int tile, int& tile_row, int& tile_column) const {
    constexpr int kBand = 8;
    const int band = tile / (kBand * tile_columns), in_band = tile - band * kBand * tile_columns;
    const int height = min(kBand, tile_rows - band * kBand);
    tile_row = band * kBand + in_band % height;
    tile_column = in_band / height;
  }
  __host__ __device__ int count() const { return tile_rows * tile_columns; }
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
