// Tensor maps: what the tensor memory accelerator knows of an operand. The driver encodes them; its functions are
// found through the runtime, so that the library needs no libcuda to load.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "gemm.cuh"

namespace ldmq {

template <typename Function>
Function* driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status;
  if (cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &status) != cudaSuccess) return nullptr;
  return status == cudaDriverEntryPointSuccess ? reinterpret_cast<Function*>(found) : nullptr;
}

inline CUtensorMapSwizzle swizzle_of(int row_bytes) {
  return row_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B
         : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                           : CU_TENSOR_MAP_SWIZZLE_32B;
}

// Boxes of box_rows x box_bytes of a matrix of bytes, contiguous; zeros outside.
inline cudaError_t encode_tiled(CUtensorMap* map, const void* data, int64_t rows, int64_t row_bytes, int box_rows,
                                 int box_bytes) {
  static const auto encode = driver_function<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t size[] = {static_cast<cuuint64_t>(row_bytes), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_bytes), static_cast<cuuint32_t>(box_rows)}, step[] = {1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(data), size, stride, box, step,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(box_bytes), CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return static_cast<cudaError_t>(result);  // both have the same numbers for the same errors
}

// Runs of `pixels` input pixels under one tap of a convolution, in the order of the output's pixels. The base pixels
// are those under the first tap: they begin at minus the padding, and end where the last tap still fits.
inline cudaError_t encode_im2col(CUtensorMap* map, const ldmq_gemm& gemm, int pixels, int channels) {
  static const auto encode = driver_function<decltype(cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  if (!encode) return cudaErrorNotSupported;
  const auto channels_in = static_cast<cuuint64_t>(gemm.channels), width = static_cast<cuuint64_t>(gemm.width),
             height = static_cast<cuuint64_t>(gemm.height);
  const cuuint64_t size[] = {channels_in, width, height, static_cast<cuuint64_t>(gemm.samples)};
  const cuuint64_t stride[] = {channels_in, channels_in * width, channels_in * width * height};
  const auto last = [](int64_t out, int stride, int pad, int64_t in) {  // of the base pixels, from the last input on
    return static_cast<int>((out - 1) * stride - pad - (in - 1));
  };
  const int lower[] = {-gemm.pad_left, -gemm.pad_top};
  const int upper[] = {last(gemm.out_width, gemm.stride_width, gemm.pad_left, gemm.width),
                       last(gemm.out_height, gemm.stride_height, gemm.pad_top, gemm.height)};
  const cuuint32_t step[] = {1, static_cast<cuuint32_t>(gemm.stride_width),
                             static_cast<cuuint32_t>(gemm.stride_height), 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 4, const_cast<void*>(gemm.x), size, stride, lower, upper,
             static_cast<cuuint32_t>(channels), static_cast<cuuint32_t>(pixels), step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle_of(channels), CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return static_cast<cudaError_t>(result);  // both have the same numbers for the same errors
}

}  // namespace ldmq
