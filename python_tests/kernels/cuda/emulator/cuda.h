// Tensor maps of the driver, on a CPU: the fields as they are, checked by the driver's own rules.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

using CUresult = int;
constexpr CUresult CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1, CUDA_ERROR_INVALID_CONTEXT = 201;
using cuuint64_t = uint64_t;
using cuuint32_t = uint32_t;
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_UINT8 = 0 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle {
  CU_TENSOR_MAP_SWIZZLE_NONE = 0,
  CU_TENSOR_MAP_SWIZZLE_32B,
  CU_TENSOR_MAP_SWIZZLE_64B,
  CU_TENSOR_MAP_SWIZZLE_128B
};
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_NONE = 0, CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

struct alignas(64) CUtensorMap {
  const uint8_t* base;
  uint32_t rank, box[5], channels, pixels, step[5];
  uint64_t size[5], stride[5];  // elements, and bytes
  int lower[3], upper[3];
  CUtensorMapSwizzle swizzle;
  bool im2col;
};

namespace emulator {

inline CUresult check_map(const CUtensorMap& map, uint32_t inner, bool valid) {
  if (encode_error != CUDA_SUCCESS || !has_context) return encode_error ? encode_error : CUDA_ERROR_INVALID_CONTEXT;
  const uint32_t limit = map.swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 256 : 16u << map.swizzle;
  valid = valid && reinterpret_cast<uintptr_t>(map.base) % 16 == 0 && inner <= limit && inner % 16 == 0;
  for (uint32_t i = 0; i < map.rank; ++i) {
    valid = valid && map.size[i] > 0 && map.size[i] <= 1ull << 32 && map.step[i] >= 1 && map.step[i] <= 8;
    if (i > 0) valid = valid && map.stride[i] % 16 == 0 && map.stride[i] < 1ull << 40;
  }
  return valid ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace emulator

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base,
                                       const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                                       const cuuint32_t* step, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  *map = CUtensorMap();
  map->base = static_cast<const uint8_t*>(base);
  map->rank = rank;
  map->swizzle = swizzle;
  map->stride[0] = 1;
  bool valid = true;
  for (uint32_t i = 0; i < rank; ++i) {
    map->size[i] = size[i];
    map->box[i] = box[i];
    map->step[i] = step[i];
    if (i > 0) map->stride[i] = stride[i - 1];
    valid = valid && box[i] >= 1 && box[i] <= 256;
  }
  return emulator::check_map(*map, box[0], valid);
}

inline CUresult cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base,
                                        const cuuint64_t* size, const cuuint64_t* stride, const int* lower,
                                        const int* upper, cuuint32_t channels, cuuint32_t pixels,
                                        const cuuint32_t* step, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                        CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  *map = CUtensorMap();
  map->base = static_cast<const uint8_t*>(base);
  map->rank = rank;
  map->swizzle = swizzle;
  map->im2col = true;
  map->channels = channels;
  map->pixels = pixels;
  map->stride[0] = 1;
  bool valid = rank == 4 && channels <= 256 && pixels <= 1024;
  for (uint32_t i = 0; i < rank; ++i) {
    map->size[i] = size[i];
    map->step[i] = step[i];
    if (i > 0) map->stride[i] = stride[i - 1];
  }
  for (int i = 0; i < 2; ++i) {
    map->lower[i] = lower[i];
    map->upper[i] = upper[i];
    valid = valid && lower[i] >= -128 && lower[i] < 128 && upper[i] >= -128 && upper[i] < 128;
  }
  return emulator::check_map(*map, channels, valid);
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
constexpr int cudaEnableDefault = 0;
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* status) {
  const bool tiled = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function =
      tiled ? reinterpret_cast<void*>(cuTensorMapEncodeTiled) : reinterpret_cast<void*>(cuTensorMapEncodeIm2col);
  *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
