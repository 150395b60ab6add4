// The part of CUDA that csrc/ uses, on a CPU. It proves indexing, arithmetic and the order of what kernels wait
// for, with asynchronous work done as late or as early as the rules allow; not speed, and not every race.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101,
                      cudaErrorNotSupported = 801, cudaErrorLaunchTimeout = 702,
                      cudaErrorLaunchFailure = 719,
                      cudaErrorDeviceUninitialized = 201;

enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int cooperative, programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace emulator {
inline thread_local int device = 0;
inline thread_local bool has_context = false;  // the driver's functions need one, which cudaSetDevice binds
inline int launched_on = -1;                   // the device of the last launch
inline int encode_error = 0;                   // what the driver says to every tensor map
inline int told_shared = 0;                    // calls that allow a kernel its shared memory
inline int early_launches = 0;                 // that may have begun before the kernel before them had ended
inline bool is_after_kernel = true;            // what was launched last is a kernel
constexpr int kMultiprocessors = 3;  // few, so that persistent blocks take several tiles and an odd number
}  // namespace emulator

// Blocks run one after the other, with a seed in any order, but for those of a cluster or of a cooperative grid.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  emulator::launched_on = emulator::device;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  if (config->dynamicSmemBytes > 227 << 10) return cudaErrorInvalidValue;
  emulator::body = [=] { kernel(arguments...); };
  unsigned group = 1;
  bool early = false, cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) group = attribute.val.clusterDim.x;
    if (attribute.id == cudaLaunchAttributeCooperative && attribute.val.cooperative) {
      group = gridDim.x * gridDim.y * gridDim.z;
      cooperative = true;
    }
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      early = attribute.val.programmaticStreamSerializationAllowed != 0;
    }
  }
  if (early && (cooperative || !emulator::is_after_kernel)) return cudaErrorInvalidValue;  // what csrc/ does not do
  emulator::is_after_kernel = true;
  emulator::early_launches += early;
  bool triggered = true;
  if (gridDim.x * gridDim.y * gridDim.z % group != 0) return cudaErrorInvalidValue;
  std::vector<std::vector<dim3>> together(1);
  for (unsigned z = 0; z < gridDim.z; ++z) {
    for (unsigned y = 0; y < gridDim.y; ++y) {
      for (unsigned x = 0; x < gridDim.x; ++x) {
        if (together.back().size() == group) together.emplace_back();
        together.back().emplace_back(x, y, z);
      }
    }
  }
  if (emulator::seed != 0) emulator::shuffle(together);
  for (const std::vector<dim3>& indices : together) {
    if (!emulator::run(indices, blockDim.x, early)) return cudaErrorLaunchTimeout;
    if (early && !emulator::all_waited()) return cudaErrorLaunchFailure;
    triggered = triggered && emulator::all_triggered();
  }
  emulator::triggered += triggered;
  return cudaSuccess;
}

#define CUDART_VERSION 13000
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = emulator::device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  if (device > 1) return cudaErrorInvalidDevice;
  emulator::has_context = true;
  return emulator::device = device, cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulator::kMultiprocessors
                                                       : attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  ++emulator::told_shared;
  return bytes <= 227 << 10 ? cudaSuccess : cudaErrorInvalidValue;
}
struct cudaFuncAttributes {
  int ptxVersion, binaryVersion;
};
// Device 0 has what its driver made of PTX of sm_80.
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {emulator::device == 0 ? 80 : 90, 90};
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 2, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  emulator::is_after_kernel = false;
  return std::memset(pointer, value, bytes), cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal"
         : error == cudaErrorLaunchTimeout ? "the threads wait for each other forever"
         : error == cudaErrorLaunchFailure ? "a thread has not waited for the kernel before"
         : error == cudaErrorDeviceUninitialized ? "invalid device context"
                                           : "invalid argument";
}

using std::max;
using std::min;

inline void __syncthreads() {
  if (emulator::fault & emulator::kBlockBarrier) return;
  emulator::wait(emulator::block().all, blockDim.x);
}
inline void __syncwarp() { emulator::sync_warp(); }
inline void __threadfence() {}

// What every lane of the calling warp gave, at the call of any of them: [lane][i].
template <typename T, size_t N>
std::array<std::array<T, N>, 32> of_warp(const T (&values)[N]) {
  static_assert(sizeof(T) == 4 && N <= emulator::kLaneWords, "lanes hold a few words of 32 bits");
  auto& lanes = emulator::block().lanes;
  std::memcpy(&lanes[threadIdx.x * emulator::kLaneWords], values, sizeof(values));
  emulator::sync_warp();
  std::array<std::array<T, N>, 32> all;
  for (unsigned lane = 0; lane < 32; ++lane) {
    std::memcpy(&all[lane], &lanes[(threadIdx.x / 32 * 32 + lane) * emulator::kLaneWords], sizeof(values));
  }
  emulator::sync_warp();
  return all;
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return of_warp<T, 1>({value})[threadIdx.x % 32 ^ mask][0];
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return of_warp<T, 1>({value})[lane % 32][0];
}
inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  uint32_t largest = 0;
  for (const auto& lane : of_warp<uint32_t, 1>({value})) largest = std::max(largest, lane[0]);
  return largest;
}
inline uint32_t atomicMax(uint32_t* address, uint32_t value) {
  const uint32_t old = *address;
  *address = std::max(old, value);
  return old;
}
template <typename T>
T atomicAdd(T* address, T value) {
  emulator::moved = true;
  const T old = *address;
  *address += value;
  return old;
}
template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}

#include "numbers.h"
