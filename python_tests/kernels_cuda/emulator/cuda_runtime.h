// The part of CUDA that csrc/ uses, on a CPU: the threads of a block are fibers that take turns, and
// wait for each other where the kernel says so. It proves indexing and arithmetic, not races or speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

inline int device = 0;
inline ucontext_t scheduler;

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(32 << 10);
  bool done = false;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Barrier> barriers;  // one a warp, and the block's at the end
inline std::vector<uint32_t> lanes;
inline std::function<void()> body;

inline void entry() {
  body();
  fibers[threadIdx.x]->done = true;
}

inline void wait(Barrier& barrier, unsigned count) {
  const unsigned mine = barrier.generation, thread = threadIdx.x;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == mine) swapcontext(&fibers[thread]->context, &scheduler);
}

inline void run_block(unsigned threads) {
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  barriers.assign(threads / 32 + 1, Barrier());
  lanes.assign(threads, 0);
  for (unsigned thread = 0; thread < threads; ++thread) {
    Fiber& fiber = *fibers[thread];
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, entry, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (unsigned thread = 0; thread < threads; ++thread) {
      if (fibers[thread]->done) continue;
      threadIdx.x = thread;
      swapcontext(&scheduler, &fibers[thread]->context);
      running = true;
    }
  }
}

}  // namespace emulator

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  emulator::body = [=] { kernel(arguments...); };
  for (unsigned z = 0; z < gridDim.z; ++z) {
    for (unsigned y = 0; y < gridDim.y; ++y) {
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = dim3(x, y, z);
        emulator::run_block(blockDim.x);
      }
    }
  }
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) { return *device = emulator::device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  if (device > 1) return cudaErrorInvalidDevice;
  return emulator::device = device, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  return std::memset(pointer, value, bytes), cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid argument";
}

using std::max;
using std::min;

inline void __syncthreads() { emulator::wait(emulator::barriers.back(), blockDim.x); }
inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  const unsigned first = threadIdx.x / 32 * 32;
  emulator::lanes[threadIdx.x] = value;
  emulator::wait(emulator::barriers[first / 32], 32);
  const uint32_t largest = *std::max_element(&emulator::lanes[first], &emulator::lanes[first] + 32);
  emulator::wait(emulator::barriers[first / 32], 32);
  return largest;
}
inline uint32_t atomicMax(uint32_t* address, uint32_t value) {
  const uint32_t old = *address;
  *address = std::max(old, value);
  return old;
}

template <typename To, typename From>
To bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "bits keeps the size");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}
inline uint32_t __float_as_uint(float value) { return bits<uint32_t>(value); }
inline float __uint_as_float(uint32_t value) { return bits<float>(value); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rn(float value) {
  if (std::isnan(value)) return 0;
  const float rounded = std::nearbyint(value);
  if (rounded >= 2147483648.0f) return std::numeric_limits<int>::max();
  return rounded < -2147483648.0f ? std::numeric_limits<int>::min() : static_cast<int>(rounded);
}

struct __nv_bfloat16 {
  uint16_t raw;
};
struct __half {
  uint16_t raw;
};
inline float __bfloat162float(__nv_bfloat16 value) { return bits<float>(static_cast<uint32_t>(value.raw) << 16); }
inline float __half2float(__half value) {
  const int exponent = value.raw >> 10 & 31, mantissa = value.raw & 1023;
  float size = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
  if (exponent == 31) size = mantissa ? NAN : INFINITY;
  return value.raw & 0x8000 ? -size : size;
}
