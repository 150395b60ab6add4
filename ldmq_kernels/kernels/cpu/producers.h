// What `activations.c`, `layer_norm.c` and `group_norm.c` share: rows as float32, activation functions, the quantization.
//
// Plain loops over a row in a thread's own memory, which compilers make vectors of: no call, no branch, no sum over the
// row, so that a value's bits depend on itself alone. Pointers named "maybe" are null where there is no such operand.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { DONE = 0, HAS_NAN = 1, NO_MEMORY = 2 };  // what a call returns; what has no memory is not computed

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float widened(uint16_t value) { return of_bits((uint32_t)value << 16); }

// Floating values, float32 or bfloat16, from the element `at` on.
static inline void widen(const void *values, int is_bfloat16, int64_t at, int64_t count, float *restrict out) {
  if (is_bfloat16) {
    const uint16_t *restrict from = (const uint16_t *)values + at;
    for (int64_t i = 0; i < count; ++i) out[i] = widened(from[i]);
  } else {
    memcpy(out, (const float *)values + at, (size_t)count * sizeof(float));
  }
}

// -- activation functions -----------------------------------------------------------------------------------------

// a * b + c, rounded once where the processor can: these functions are approximations, and no backend's bits
static inline float fused(float a, float b, float c) {
#ifdef __FMA__
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

#define ROUNDER 12582912.0f  // 1.5 * 2^23: what is added to it is rounded half to even, into its lowest bits

// The lesser of x and a positive bound, which is the bound of NaN: one comparison of integers, in whose order positive
// values are, where one of values would be three to know NaN.
static inline float at_most(float x, float bound) {
  const int32_t bits = (int32_t)bits_of(x), most = (int32_t)bits_of(bound);
  return of_bits((uint32_t)(bits < most ? bits : most));
}

// The same with a negative bound: the more negative a value is, the larger are its bits.
static inline float at_least(float x, float bound) {
  const uint32_t bits = bits_of(x), most = bits_of(bound);
  return of_bits(bits < most ? bits : most);
}

// 1 + e^-x within 3e-7 of it, infinity from -88.4 on. NaN has any value: what is divided by this tells of it.
static inline float one_and_decay(float x) {
  x = at_least(at_most(x, 87.0f), -89.0f);
  const float shifted = fused(x, -1.44269504f, ROUNDER);
  const float whole = shifted - ROUNDER;
  const float r = fused(whole, -0.693147182f, -x);
  float p = 1.381461275741458e-3f;  // e^r, of least relative error for |r| <= ln 2 / 2
  p = fused(p, r, 8.368710055947304e-3f);
  p = fused(p, r, 4.166838899254799e-2f);
  p = fused(p, r, 1.666652113199234e-1f);
  p = fused(p, r, 4.999999403953552e-1f);
  p = fused(p, r, 1.0f);
  p = fused(p, r, 1.0f);
  return fused(p, of_bits((bits_of(shifted) << 23) + 0x3f800000), 1.0f);
}

// x / (1 + e^-x)
static inline float silu(float x) { return x / one_and_decay(x); }

// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, by (1 + tanh(u)) / 2 = 1 / (1 + e^-2u)
static inline float gelu_tanh(float x) {
  return x / one_and_decay(1.59576912f * fused(0.044715f * x, x * x, x));
}

// x (1 + erf(x / sqrt(2))) / 2 within 2e-7 max(1, |x|): the normal distribution less 1/2 is x times a polynomial in
// x^2, here of least error for |x| <= 5.3, in 2 x^2 / 5.3^2 - 1. Beyond, the distribution is 0 or 1.
#define GELU_BOUND 28.09f
#define GELU_SCALE 0.07119971513748169f
enum { GELU_COUNT = 15 };
static const float GELU_TERMS[GELU_COUNT] = {
    2.836296916939318e-4f, -7.645664620213211e-4f, 7.320803706534207e-4f, -1.0959467617794871e-3f,
    3.134928410872817e-3f, -5.849551409482956e-3f, 8.828170597553253e-3f, -1.3185473158955574e-2f,
    1.892583630979061e-2f, -2.529830113053322e-2f, 3.207952156662941e-2f, -3.958893194794655e-2f,
    4.926416277885437e-2f, -6.651850789785385e-2f, 1.333925575017929e-1f};

static inline float gelu(float x) {
  const float u = fused(at_most(x * x, GELU_BOUND), GELU_SCALE, -1.0f);
  float p = GELU_TERMS[0];
  for (int k = 1; k < GELU_COUNT; ++k) p = fused(p, u, GELU_TERMS[k]);
  const int32_t share = (int32_t)bits_of(fused(p, x, 0.5f));
  return x * at_most(of_bits((uint32_t)(share < 0 ? 0 : share)), 1.0f);
}

// -- quantization -------------------------------------------------------------------------------------------------

typedef struct {
  const float *maybe_factors;  // inverse scales, one or one for each column; where the scale is measured, smoothing
  int64_t factor_count;
  int8_t *q;
  float *maybe_scale;  // for each row, or each sample, where the scale is measured
} Quantization;

// y = factors * y for a row of y.
static inline void multiply_row(const Quantization *by, int64_t columns, float *restrict y) {
  const float *restrict factors = by->maybe_factors;
  if (!factors) return;
  if (by->factor_count == 1) {
    const float one = factors[0];
    for (int64_t c = 0; c < columns; ++c) y[c] *= one;
  } else {
    for (int64_t c = 0; c < columns; ++c) y[c] *= factors[c];
  }
}

// q = rint(y * inverse), of values whose largest gives 127: there is nothing to clamp.
static inline void round_measured(const float *restrict y, float inverse, int64_t columns, int8_t *restrict q) {
  for (int64_t c = 0; c < columns; ++c) q[c] = (int8_t)(uint8_t)bits_of(y[c] * inverse + ROUNDER);
}

static inline int8_t clamped(float y) {
  return (int8_t)(uint8_t)bits_of(at_least(at_most(y, 127.0f), -127.0f) + ROUNDER);
}

// The bits of an absolute value, whose order is that of the values, NaN above all.
static inline uint32_t magnitude(float value) { return bits_of(value) & 0x7fffffff; }

static inline uint32_t larger(uint32_t one, uint32_t other) { return one > other ? one : other; }

// q = clamp(rint(y * factors), -127, 127); whether there is NaN.
static inline int round_calibrated(const Quantization *by, const float *restrict y, int64_t columns,
                                   int8_t *restrict q) {
  const float *restrict factors = by->maybe_factors;
  uint32_t largest = 0;
  if (by->factor_count == 1) {
    const float one = factors[0];
    for (int64_t c = 0; c < columns; ++c) {
      largest = larger(largest, magnitude(y[c] * one));
      q[c] = clamped(y[c] * one);
    }
  } else {
    for (int64_t c = 0; c < columns; ++c) {
      largest = larger(largest, magnitude(y[c] * factors[c]));
      q[c] = clamped(y[c] * factors[c]);
    }
  }
  return largest > 0x7f800000;
}

static inline uint32_t largest_of_row(const float *restrict y, int64_t columns) {
  uint32_t largest = 0;
  for (int64_t c = 0; c < columns; ++c) largest = larger(largest, magnitude(y[c]));
  return largest;
}

static inline float scale_of(uint32_t largest) {
  const float value = of_bits(largest);
  return (value < 1e-12f ? 1e-12f : value) / 127.0f;
}

// Quantize a row of y, which is overwritten, by the calibrated scale or by its own; HAS_NAN where that is an error.
static inline int quantize_row(const Quantization *by, int64_t row, int64_t columns, float *restrict y) {
  int8_t *q = by->q + row * columns;
  if (!by->maybe_scale) return round_calibrated(by, y, columns, q) ? HAS_NAN : DONE;
  multiply_row(by, columns, y);
  const float scale = scale_of(largest_of_row(y, columns));
  by->maybe_scale[row] = scale;
  round_measured(y, 1.0f / scale, columns, q);
  return DONE;
}

// Threads tell of trouble in one place.
static inline void tell(int *status, int found) {
  if (found) __atomic_fetch_or(status, found, __ATOMIC_RELAXED);
}
