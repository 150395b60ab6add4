// Numbers as a GPU computes them: bit casts, conversions and products with their rounding.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
struct alignas(16) float4 {
  float x, y, z, w;
};

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
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __expf(float a) { return std::exp(a); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline int __float2int_rn(float value) {
  if (std::isnan(value)) return 0;
  const float rounded = std::nearbyint(value);
  if (rounded >= 2147483648.0f) return std::numeric_limits<int>::max();
  return rounded < -2147483648.0f ? std::numeric_limits<int>::min() : static_cast<int>(rounded);
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}

struct __nv_bfloat16 {
  uint16_t raw;
};
struct __half {
  uint16_t raw;
};
inline float __bfloat162float(__nv_bfloat16 value) { return bits<float>(static_cast<uint32_t>(value.raw) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t raw = bits<uint32_t>(value);
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<uint16_t>((raw + 0x7fff + (raw >> 16 & 1)) >> 16)};
}
inline float __half2float(__half value) {
  const int exponent = value.raw >> 10 & 31, mantissa = value.raw & 1023;
  float size = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
  if (exponent == 31) size = mantissa ? NAN : INFINITY;
  return value.raw & 0x8000 ? -size : size;
}
inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(value)) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (size < 6.103515625e-05f) return {static_cast<uint16_t>(sign | std::lrint(std::ldexp(size, 24)))};
  const int exponent = std::ilogb(size);
  const long mantissa = std::lrint(std::ldexp(size, 10 - exponent));  // 1024..2048, and 2048 carries by itself
  return {static_cast<uint16_t>(sign | (static_cast<long>(exponent + 14) << 10) + mantissa)};
}

inline const std::array<float, 256> kE4m3 = [] {
  std::array<float, 256> values;
  for (int raw = 0; raw < 256; ++raw) {
    const int exponent = raw >> 3 & 15, mantissa = raw & 7;
    float size = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(mantissa + 8, exponent - 10);
    if ((raw & 0x7f) == 0x7f) size = NAN;
    values[static_cast<size_t>(raw)] = raw & 0x80 ? -size : size;
  }
  return values;
}();

using __nv_fp8_storage_t = uint8_t;
using __nv_fp8x2_storage_t = uint16_t;
enum __nv_saturation_t { __NV_NOSAT, __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };
// To e4m3 alone, and finite; every NaN becomes the positive one, as by cvt.rn.satfinite.
inline __nv_fp8_storage_t __nv_cvt_float_to_fp8(float value, __nv_saturation_t, __nv_fp8_interpretation_t) {
  if (std::isnan(value)) return 0x7f;
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  const float size = std::fmin(std::fabs(value), 448.0f);
  if (size < 0.015625f) return static_cast<uint8_t>(sign | std::lrint(std::ldexp(size, 9)));  // 8 carries by itself
  const int exponent = std::ilogb(size);
  const long mantissa = std::lrint(std::ldexp(size, 3 - exponent));  // 8..16, and 16 carries by itself
  return static_cast<uint8_t>(sign | ((static_cast<long>(exponent + 6) << 3) + mantissa));
}
inline __nv_fp8x2_storage_t __nv_cvt_float2_to_fp8x2(float2 value, __nv_saturation_t saturation,
                                                     __nv_fp8_interpretation_t to) {
  return static_cast<uint16_t>(__nv_cvt_float_to_fp8(value.x, saturation, to) |
                               __nv_cvt_float_to_fp8(value.y, saturation, to) << 8);
}

// d plus the dot product of 32 values, as the tensor cores add: of int8 exactly; of e4m3 what is left of each term when
// it is aligned with the largest and cut to 14 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
inline int dot_32(int d, const uint8_t (&a)[32], const uint8_t (&b)[32]) {
  for (int k = 0; k < 32; ++k) d += static_cast<int8_t>(a[k]) * static_cast<int8_t>(b[k]);
  return d;
}
inline float dot_32(float d, const uint8_t (&a)[32], const uint8_t (&b)[32]) {
  float terms[33] = {d}, largest = std::fabs(d), all = d;
  for (int k = 0; k < 32; ++k) {
    terms[k + 1] = kE4m3[a[k]] * kE4m3[b[k]];
    largest = std::max(largest, std::fabs(terms[k + 1]));
    all += terms[k + 1];
  }
  if (largest == 0.0f || std::isnan(all)) return all;
  const int last = std::ilogb(largest) - 13;
  const float inverse = std::ldexp(1.0f, -last);
  int sum = 0;  // each term has at most 14 bits
  for (const float term : terms) sum += static_cast<int>(term * inverse);
  return std::ldexp(static_cast<float>(sum), last);
}
