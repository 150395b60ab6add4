// Floating numbers to and from memory, and the rounding to int8 and FP8 that every backend shares.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "ldmq_cuda.h"

namespace ldmq {

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

__device__ __forceinline__ float to_float(int x) { return __int2float_rn(x); }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void from_float(float& x, float value) { x = value; }
__device__ __forceinline__ void from_float(__half& x, float value) { x = __float2half_rn(value); }
__device__ __forceinline__ void from_float(__nv_bfloat16& x, float value) { x = __float2bfloat16_rn(value); }

// x (1 + erf(x / sqrt(2))) / 2 by half of erfc(z) = t (a + t (b + ...)) exp(-z^2), t = 1 / (1 + 0.3275911 z), z >= 0,
// within 1.5e-7: Abramowitz and Stegun, 7.1.26. erff takes twice as many instructions.
__device__ __forceinline__ float gelu(float x) {
  const float size = fabsf(x), t = __fdividef(1.0f, 1.0f + 0.231641888f * size);
  const float tail =
      t * (0.127414796f + t * (-0.142248368f + t * (0.7107068705f + t * (-0.7265760135f + t * 0.5307027145f))));
  return fmaxf(x, 0.0f) - fminf(size, 16.0f) * (tail * __expf(-0.5f * x * x));  // whose factor is 0 from there on
}

__device__ __forceinline__ int8_t round_to_int8(float y) {
  const int rounded = __float2int_rn(y);
  return static_cast<int8_t>(min(max(rounded, -127), 127));
}
__device__ __forceinline__ void from_float(int8_t& x, float value) { x = round_to_int8(value); }

// e4m3: clamped to [-448, 448] and rounded to nearest, half to even; NaN stays NaN.
struct Float8 {
  __nv_fp8_storage_t raw;
};
__device__ __forceinline__ void from_float(Float8& x, float value) {
  x.raw = __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
}

template <typename T, int V>
__device__ __forceinline__ void from_floats(Pack<T, V>& pack, const float* value) {
#pragma unroll
  for (int i = 0; i < V; ++i) from_float(pack.value[i], value[i]);
}
// The instruction converts two at once.
template <int V, std::enable_if_t<V % 2 == 0, int> = 0>
__device__ __forceinline__ void from_floats(Pack<Float8, V>& pack, const float* value) {
#pragma unroll
  for (int i = 0; i < V; i += 2) {
    const __nv_fp8x2_storage_t two =
        __nv_cvt_float2_to_fp8x2(make_float2(value[i], value[i + 1]), __NV_SATFINITE, __NV_E4M3);
    pack.value[i].raw = static_cast<__nv_fp8_storage_t>(two & 0xffu);
    pack.value[i + 1].raw = static_cast<__nv_fp8_storage_t>(two >> 8);
  }
}

// Calls `body` with a value of the type that is quantized to.
template <typename Body>
cudaError_t with_quantized(ldmq_dtype dtype, Body body) {
  if (dtype == LDMQ_INT8) return body(int8_t());
  if (dtype == LDMQ_FLOAT8) return body(Float8());
  return cudaErrorInvalidValue;
}

// V neighbours as they lie in memory, in accesses of 16 bytes or less; addresses are aligned to that.
template <int V, typename T>
struct Run {
  static constexpr int kPart = sizeof(T) * V > 16 ? 16 / sizeof(T) : V;
  Pack<T, kPart> parts[V / kPart];

  __device__ __forceinline__ void load(const T* data) {
#pragma unroll
    for (int i = 0; i < V / kPart; ++i) parts[i] = *reinterpret_cast<const Pack<T, kPart>*>(data + i * kPart);
  }
  __device__ __forceinline__ float at(int i) const { return to_float(parts[i / kPart].value[i % kPart]); }
};

template <int V, typename T>
__device__ __forceinline__ void load_run(float (&value)[V], const T* data) {
  Run<V, T> run;
  run.load(data);
#pragma unroll
  for (int i = 0; i < V; ++i) value[i] = run.at(i);
}
template <int V, typename T>
__device__ __forceinline__ void store_run(const float (&value)[V], T* data) {
  constexpr int kPart = sizeof(T) * V > 16 ? 16 / sizeof(T) : V;
#pragma unroll
  for (int part = 0; part < V; part += kPart) {
    Pack<T, kPart> pack;
    from_floats(pack, value + part);
    *reinterpret_cast<Pack<T, kPart>*>(data + part) = pack;
  }
}

// Bits of |y|: ordered as the values are, with NaN above infinity, so an integer maximum keeps a NaN.
__device__ __forceinline__ uint32_t magnitude(float y) { return __float_as_uint(y) & 0x7fffffffu; }

// scale = max(absmax, floor) / 127, of FP8 / 448, by IEEE division; the floor is ABSMAX_FLOOR of the reference backend.
template <typename Q>
__device__ __forceinline__ float measured_scale(uint32_t absmax) {
  constexpr float kLargest = std::is_same_v<Q, Float8> ? 448.0f : 127.0f;
  return __fdiv_rn(__uint_as_float(max(absmax, __float_as_uint(1e-12f))), kLargest);
}

}  // namespace ldmq
