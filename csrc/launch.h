// What every kernel's host side shares: the device that it runs on, and the launch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace ldmq {

// Makes `device` current, and gives the caller's device back at the end. The call is made even where it is current
// already: it binds the device's context to this thread, which the driver's own functions need.
class DeviceGuard {
  int previous_ = 0;  // before `error`, whose initialization asks for it
  bool changed_ = false;

 public:
  explicit DeviceGuard(int device) : error(cudaGetDevice(&previous_)) {
    if (error == cudaSuccess) error = cudaSetDevice(device);
    changed_ = error == cudaSuccess && device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Lets a kernel take so many bytes of dynamic shared memory on the current device, which is told once.
inline cudaError_t allow_shared_memory(const void* kernel, size_t bytes) {
  constexpr size_t kAlways = 48 << 10;
  if (bytes <= kAlways) return cudaSuccess;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;  // by kernel and device
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) most = bytes;
  return error;
}

// A stream of the current device, and whether kernels may be launched there before the one in front of them has ended.
struct Stream {
  void* handle;
  bool dependent;
};

// The architecture that a kernel's code was compiled for, on the current device, which is asked once: sm_90 is 90. Code
// that the driver made of older PTX is as old as that: it has no griddepcontrol.wait.
inline cudaError_t compiled_for(const void* kernel, int* architecture) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> known;  // by kernel and device
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  int& found = known[{kernel, device}];
  if (found == 0) {
    cudaFuncAttributes attributes = {};
    error = cudaFuncGetAttributes(&attributes, kernel);
    if (error == cudaSuccess) found = std::min(attributes.ptxVersion, attributes.binaryVersion);
  }
  *architecture = found;
  return error;
}

// Blocks, their threads, their dynamic shared memory, and what runs together: a cluster, or the whole grid.
struct Shape {
  dim3 grid;
  unsigned threads;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
  bool cooperative = false;
};

// A kernel that may be launched early waits itself, see ptx/griddepcontrol.cuh. A cooperative one is never: all of its
// blocks have to fit beside what still runs.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Shape& shape, const Stream& stream, Arguments... arguments) {
  const auto* code = reinterpret_cast<const void*>(kernel);
  cudaError_t error = allow_shared_memory(code, shape.shared_bytes);
  int architecture = 0;
  if (error == cudaSuccess && stream.dependent) error = compiled_for(code, &architecture);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[3] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (shape.cooperative) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else if (architecture >= 90) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace ldmq
