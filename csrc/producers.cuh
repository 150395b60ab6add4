// What the producers share: how their float results become int8 or FP8, and the choice of element type and vector
// width.
#pragma once

#include <type_traits>

#include "launch.h"
#include "ldmq_cuda.h"
#include "numbers.cuh"

namespace ldmq {

constexpr int kLanes = 32;  // of a warp
constexpr unsigned kAllLanes = 0xffffffffu;

// What a result is multiplied by in each channel: a calibrated inv_scale, a inv_smooth vector, or one.
struct Factors {
  const float* data;  // null: one
  bool one_for_all;

  explicit Factors(const ldmq_quantization& to)
      : data(to.inv_scale ? to.inv_scale : to.inv_smooth), one_for_all(to.inv_scale && to.inv_scale_count == 1) {}

  template <int V>
  __device__ __forceinline__ void load(float (&factor)[V], int64_t channel) const {
    if (data && !one_for_all) return load_run(factor, data + channel);
    const float one = data ? *data : 1.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) factor[i] = one;
  }
};

// The largest of a row that `warps` neighbouring warps hold, known to all of them. Every thread of the block calls it;
// `largest_of_warp` has a place for each warp of the block.
__device__ __forceinline__ uint32_t row_maximum(uint32_t largest, int warps, uint32_t* largest_of_warp) {
  largest = __reduce_max_sync(kAllLanes, largest);
  if (warps == 1) return largest;
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  if (threadIdx.x % kLanes == 0) largest_of_warp[warp] = largest;
  __syncthreads();
  const int first = warp / warps * warps;
  const int end = min(first + warps, static_cast<int>(blockDim.x) / kLanes);
  for (int i = first; i < end; ++i) largest = max(largest, largest_of_warp[i]);
  __syncthreads();
  return largest;
}

template <int V>
__device__ __forceinline__ void multiply(float (&y)[V], const float (&factor)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) y[i] = __fmul_rn(y[i], factor[i]);
}

// Rounds y * inverse, of a measured scale; for a calibrated one `inverse` is one.
template <int V, typename Q>
__device__ __forceinline__ void store_quantized(const float (&y)[V], float inverse, Q* q) {
  float scaled[V];
#pragma unroll
  for (int i = 0; i < V; ++i) scaled[i] = __fmul_rn(y[i], inverse);
  store_run(scaled, q);
}

// Calls `body` with a pointer of the element type and the widest vector that channels and addresses allow.
template <typename T, typename Body>
cudaError_t with_widest(const void* x, const ldmq_quantization& to, int64_t channels, Body body) {
  constexpr int kWide = 16 / sizeof(T);
  const auto* typed = static_cast<const T*>(x);
  const Factors factors(to);
  if (channels % kWide == 0 && is_aligned(x, 16) && is_aligned(to.q, kWide) &&
      (factors.one_for_all || is_aligned(factors.data, 16))) {
    return body(typed, std::integral_constant<int, kWide>());
  }
  return body(typed, std::integral_constant<int, 1>());
}

template <typename Body>
cudaError_t with_type(const void* x, ldmq_dtype dtype, const ldmq_quantization& to, int64_t channels, Body body) {
  switch (dtype) {
    case LDMQ_FLOAT32:
      return with_widest<float>(x, to, channels, body);
    case LDMQ_FLOAT16:
      return with_widest<__half>(x, to, channels, body);
    case LDMQ_BFLOAT16:
      return with_widest<__nv_bfloat16>(x, to, channels, body);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace ldmq
