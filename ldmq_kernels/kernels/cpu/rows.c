// Elementwise work on rows, each in one pass over memory: what torch does in several.
//
// Compiled by `compiled.py` on the machine that runs it, without contraction and fast-math: every result has the bits
// of the torch code in `blocks.py`, `quantize_per_token.py` and `quantize_per_sample.py`. Rows are contiguous; floating
// values are float32, or bfloat16 where a flag says so. Pointers named "maybe" are null where there is no such operand.

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "epilogue.h"
#include "parts.h"

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// -- quantization -------------------------------------------------------------------------------------------------

typedef struct {
  const void *x;
  int64_t is_bfloat16;
  int64_t groups, rows, columns;  // groups of so many rows, a scale each
  const float *maybe_smooth;
  int8_t *q;
  float *scale;
  int32_t *largest;  // (groups, parts), the bits of absolute values, whose order is that of the values, NaN above all
} Measured;

// One of a row's values as float32, smoothed; for loops that the compiler makes a case of each.
#define EACH_VALUE(BODY)                                                                              \
  if (task->is_bfloat16) {                                                                            \
    const uint16_t *x = (const uint16_t *)task->x + at;                                               \
    if (smooth) for (int64_t c = 0; c < columns; ++c) { const float y = one_widened(x + c) * smooth[c]; BODY } \
    else for (int64_t c = 0; c < columns; ++c) { const float y = one_widened(x + c); BODY }                \
  } else {                                                                                            \
    const float *x = (const float *)task->x + at;                                                     \
    if (smooth) for (int64_t c = 0; c < columns; ++c) { const float y = x[c] * smooth[c]; BODY }      \
    else for (int64_t c = 0; c < columns; ++c) { const float y = x[c]; BODY }                         \
  }

static int32_t largest_of(const Measured *task, int64_t first, int64_t end) {
  const float *smooth = task->maybe_smooth;
  const int64_t columns = task->columns;
  int32_t largest = 0;
  for (int64_t row = first; row < end; ++row) {
    const int64_t at = row * columns;
    EACH_VALUE({
      const int32_t magnitude = (int32_t)(bits_of(y) & 0x7fffffff);
      largest = magnitude > largest ? magnitude : largest;
    })
  }
  return largest;
}

static float scale_of(int32_t largest) {
  float value;
  memcpy(&value, &largest, sizeof value);
  return (value < 1e-12f ? 1e-12f : value) / 127.0f;
}

static void quantize(const Measured *task, int64_t first, int64_t end, float scale) {
  const float *restrict smooth = task->maybe_smooth;
  const int64_t columns = task->columns;
  const float inverse = 1.0f / scale;
  for (int64_t row = first; row < end; ++row) {
    const int64_t at = row * columns;
    int8_t *restrict q = task->q + at;
    // no clamp: the largest value times the reciprocal of its own scale rounds to 127
    EACH_VALUE(q[c] = (int8_t)(int32_t)rintf(y * inverse);)
  }
}

static void whole_groups(const void *given, int64_t part, int64_t parts) {
  const Measured *task = given;
  for (int64_t group = task->groups * part / parts; group < task->groups * (part + 1) / parts; ++group) {
    const int64_t first = group * task->rows, end = first + task->rows;
    task->scale[group] = scale_of(largest_of(task, first, end));
    quantize(task, first, end, task->scale[group]);
  }
}

static void largest_of_part(const void *given, int64_t part, int64_t parts) {
  const Measured *task = given;
  for (int64_t group = 0; group < task->groups; ++group) {
    const int64_t first = group * task->rows + task->rows * part / parts;
    const int64_t end = group * task->rows + task->rows * (part + 1) / parts;
    task->largest[group * parts + part] = largest_of(task, first, end);
  }
}

static void quantize_part(const void *given, int64_t part, int64_t parts) {
  const Measured *task = given;
  for (int64_t group = 0; group < task->groups; ++group) {
    int32_t largest = 0;
    for (int64_t other = 0; other < parts; ++other) {
      const int32_t theirs = task->largest[group * parts + other];
      largest = theirs > largest ? theirs : largest;
    }
    const float scale = scale_of(largest);
    if (part == 0) task->scale[group] = scale;
    quantize(task, group * task->rows + task->rows * part / parts,
             group * task->rows + task->rows * (part + 1) / parts, scale);
  }
}

// scale = max(absmax(y), 1e-12) / 127 for each group of rows; q = rint(y * (1 / scale)). `largest` has groups x threads
// where there are fewer groups than threads.
int ldmq_quantize_measured(const Measured *task, int64_t threads) {
  if (threads == 1 || task->groups >= threads) {
    ldmq_in_parts(whole_groups, task, threads, threads);
  } else {
    ldmq_in_parts(largest_of_part, task, threads, threads);
    ldmq_in_parts(quantize_part, task, threads, threads);
  }
  return 0;
}

typedef struct {
  const void *x;
  int64_t is_bfloat16;
  int64_t rows, columns;
  const float *factors;
  int64_t factor_count;
  int8_t *q;
  int *has_nan;
} Calibrated;

static inline int8_t clamped(float y) {
  y = rintf(y);
  y = y < -127.0f ? -127.0f : y;
  return (int8_t)(int32_t)(y > 127.0f ? 127.0f : y);
}

static void calibrated_part(const void *given, int64_t part, int64_t parts) {
  const Calibrated *task = given;
  const int64_t columns = task->columns;
  int32_t nan = 0;
  for (int64_t row = task->rows * part / parts; row < task->rows * (part + 1) / parts; ++row) {
    const int64_t at = row * columns;
    int8_t *restrict q = task->q + at;
    const float *restrict smooth = task->factor_count == 1 ? 0 : task->factors;
    const float one = smooth ? 1.0f : task->factors[0];
    EACH_VALUE({
      const float scaled = smooth ? y : y * one;
      nan |= (bits_of(scaled) & 0x7fffffff) > 0x7f800000;
      q[c] = clamped(scaled);
    })
  }
  if (nan) __atomic_store_n(task->has_nan, 1, __ATOMIC_RELAXED);
}

// q = clamp(rint(x * factor), -127, 127), a factor for each column or one; whether there was NaN.
int ldmq_quantize_calibrated(const Calibrated *asked, int64_t threads) {
  TASK_OF(Calibrated, asked, has_nan);
  int has_nan = 0;
  task.has_nan = &has_nan;
  ldmq_in_parts(calibrated_part, &task, threads, threads);
  return has_nan;
}

// -- epilogue -----------------------------------------------------------------------------------------------------

typedef struct {
  const float *accumulator;
  int64_t rows, columns;
  Epilogue epilogue;
} Finished;

static void finished_part(const void *given, int64_t part, int64_t parts) {
  const Finished *t = given;
  for (int64_t row = t->rows * part / parts; row < t->rows * (part + 1) / parts; ++row) {
    const RowOperands own = operands_of_row(&t->epilogue, row, t->rows, t->columns);
    const float *sums = t->accumulator + row * t->columns;
    int64_t c = 0;
    for (; c + WIDTH <= t->columns; c += WIDTH) {
      finish_many(&t->epilogue, &own, c, row * t->columns + c, many_load(sums + c));
    }
    for (; c < t->columns; ++c) finish_one(&t->epilogue, &own, c, row * t->columns + c, sums[c]);
  }
}

// The epilogue of products that torch has computed.
int ldmq_finish(const Finished *task, int64_t threads) {
  ldmq_in_parts(finished_part, task, threads, threads);
  return 0;
}
