// out = (sum * scale * column_scale + bias + sample_bias) * gate + residual, in this order in float32, rounded once.
//
// What has G rows has one for each of G equal runs of the output's. Pointers named "maybe" are null where there is no
// such operand; bias, residual and output are float32, or bfloat16 where a flag says so. Members take eight bytes each.
#pragma once

#include <stdint.h>
#include <string.h>

typedef struct {
  const float *scale;  // of each equal run of rows
  int64_t scale_count;
  const float *maybe_column_scale;
  const void *maybe_bias;
  int64_t bias_is_bfloat16;
  const float *maybe_sample_bias;
  int64_t sample_count;
  const float *maybe_gate;
  int64_t gate_count;
  const void *maybe_residual;
  int64_t residual_is_bfloat16;
  void *out;
  int64_t out_is_bfloat16;
} Epilogue;

// The operands of one row of the output.
typedef struct {
  float scale;
  const float *maybe_sample_bias, *maybe_gate;
} RowOperands;

static inline RowOperands operands_of_row(const Epilogue *e, int64_t row, int64_t rows, int64_t columns) {
  RowOperands found = {e->scale[e->scale_count == 1 ? 0 : row * e->scale_count / rows], 0, 0};
  if (e->maybe_sample_bias) found.maybe_sample_bias = e->maybe_sample_bias + row * e->sample_count / rows * columns;
  if (e->maybe_gate) found.maybe_gate = e->maybe_gate + row * e->gate_count / rows * columns;
  return found;
}

// One value, and as many as a vector has: the same functions of both.
#ifdef __AVX512F__
enum { WIDTH = 16 };
#else
enum { WIDTH = 8 };
#endif
typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

#define LOADS_AND_STORES(NAME, FLOATS, WORDS, HALVES)                                            \
  static inline __attribute__((always_inline)) FLOATS NAME##_load(const float *from) {           \
    FLOATS values;                                                                               \
    memcpy(&values, from, sizeof values);                                                        \
    return values;                                                                               \
  }                                                                                              \
  static inline __attribute__((always_inline)) FLOATS NAME##_widened(const uint16_t *from) {     \
    HALVES halves;                                                                               \
    FLOATS values;                                                                               \
    memcpy(&halves, from, sizeof halves);                                                        \
    const WORDS bits = CONVERTED(NAME, halves, WORDS) << 16;                                     \
    memcpy(&values, &bits, sizeof values);                                                       \
    return values;                                                                               \
  }                                                                                              \
  static inline __attribute__((always_inline)) FLOATS NAME##_of(const void *from, int64_t is_half, int64_t at) {    \
    return is_half ? NAME##_widened((const uint16_t *)from + at) : NAME##_load((const float *)from + at); \
  }                                                                                              \
  static inline __attribute__((always_inline)) void NAME##_store(FLOATS values, float *to) {     \
    memcpy(to, &values, sizeof values);                                                          \
  }                                                                                              \
  static inline __attribute__((always_inline)) void NAME##_narrow(FLOATS values, uint16_t *to) { \
    WORDS bits;                                                                                  \
    memcpy(&bits, &values, sizeof bits);                                                         \
    const WORDS rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;                            \
    const WORDS is_nan = ONES(NAME, (bits & 0x7fffffff) > 0x7f800000);                           \
    const HALVES halves = CONVERTED(NAME, (rounded & ~is_nan) | (0x7fc0 & is_nan), HALVES);      \
    memcpy(to, &halves, sizeof halves);                                                          \
  }
// A comparison of vectors is all ones where it holds, one of numbers is 1.
#define ONES(NAME, HOLDS) NAME##_ones(HOLDS)
#define one_ones(HOLDS) (0u - (uint32_t)(HOLDS))
#define many_ones(HOLDS) ((Words)(HOLDS))
#define CONVERTED(NAME, VALUES, TYPE) NAME##_converted(VALUES, TYPE)
#define one_converted(VALUES, TYPE) ((TYPE)(VALUES))
#define many_converted(VALUES, TYPE) __builtin_convertvector(VALUES, TYPE)
LOADS_AND_STORES(one, float, uint32_t, uint16_t)
LOADS_AND_STORES(many, Floats, Words, Halves)

// Finish sums of a row from a column on; `at` is the place of the first in the output.
#define FINISH(NAME, FLOATS)                                                                                     \
  static inline __attribute__((always_inline)) void finish_##NAME(const Epilogue *e, const RowOperands *own,      \
                                                                  int64_t column, int64_t at, FLOATS y) {         \
    y *= own->scale;                                                                                             \
    if (e->maybe_column_scale) y *= NAME##_load(e->maybe_column_scale + column);                                 \
    if (e->maybe_bias) y += NAME##_of(e->maybe_bias, e->bias_is_bfloat16, column);                               \
    if (own->maybe_sample_bias) y += NAME##_load(own->maybe_sample_bias + column);                               \
    if (own->maybe_gate) y *= NAME##_load(own->maybe_gate + column);                                             \
    if (e->maybe_residual) {                                                                                     \
      y += NAME##_of(e->maybe_residual, e->residual_is_bfloat16, at);                                            \
    }                                                                                                            \
    if (e->out_is_bfloat16) {                                                                                    \
      NAME##_narrow(y, (uint16_t *)e->out + at);                                                                 \
    } else {                                                                                                     \
      NAME##_store(y, (float *)e->out + at);                                                                     \
    }                                                                                                            \
  }
FINISH(one, float)
FINISH(many, Floats)
