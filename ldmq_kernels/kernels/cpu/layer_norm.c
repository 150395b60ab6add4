// q = quantize(layer_norm(x) * (1 + multiplier) + shift) for rows of x, each in one pass over memory. See producers.h.

#include <math.h>

#include "parts.h"
#include "producers.h"

typedef struct {
  const void *x;
  int64_t is_bfloat16;
  int64_t rows, columns;
  const void *maybe_weight, *maybe_bias;
  int64_t are_bfloat16;  // both of them
  double eps;
  const float *maybe_multiplier;  // a modulation: rows for equal runs of x's
  int64_t multiplier_count;
  const float *maybe_shift;
  int64_t shift_count;
  Quantization by;
  int *status;
} LayerNorm;

enum { LANES = 16 };
typedef float Lanes __attribute__((vector_size(4 * LANES)));

static inline float sum_of_lanes(Lanes values) {
  float sums[LANES];
  memcpy(sums, &values, sizeof sums);
  for (int half = LANES / 2; half; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

// The sum of (y - about) over a row, or of its square: of many partial sums.
static inline float sum_of_row(const float *y, int64_t columns, float about, int squared) {
  Lanes sums[2] = {{0}, {0}}, values;
  int64_t c = 0;
  for (; c + 2 * LANES <= columns; c += 2 * LANES) {
    for (int other = 0; other < 2; ++other) {
      memcpy(&values, y + c + other * LANES, sizeof values);
      values -= about;
      sums[other] += squared ? values * values : values;
    }
  }
  float rest[LANES] = {0};
  for (; c < columns; ++c) {
    const float value = y[c] - about;
    rest[c % LANES] += squared ? value * value : value;
  }
  memcpy(&values, rest, sizeof values);
  return sum_of_lanes(sums[0] + sums[1] + values);
}

static void layer_norm_row(const LayerNorm *task, int64_t row, const float *restrict weight,
                           const float *restrict bias, float *restrict y) {
  const int64_t columns = task->columns;
  widen(task->x, task->is_bfloat16, row * columns, columns, y);
  const float mean = sum_of_row(y, columns, 0.0f, 0) / (float)columns;
  const float variance = sum_of_row(y, columns, mean, 1) / (float)columns;
  const float inverse = 1.0f / sqrtf(variance + (float)task->eps);
  if (task->maybe_weight && task->maybe_bias) {
    for (int64_t c = 0; c < columns; ++c) y[c] = fused((y[c] - mean) * inverse, weight[c], bias[c]);
  } else {
    for (int64_t c = 0; c < columns; ++c) y[c] = (y[c] - mean) * inverse;
    if (task->maybe_weight) for (int64_t c = 0; c < columns; ++c) y[c] *= weight[c];
    if (task->maybe_bias) for (int64_t c = 0; c < columns; ++c) y[c] += bias[c];
  }
  if (task->maybe_multiplier) {
    const float *restrict own = task->maybe_multiplier + row * task->multiplier_count / task->rows * columns;
    for (int64_t c = 0; c < columns; ++c) y[c] *= 1.0f + own[c];
  }
  if (task->maybe_shift) {
    const float *restrict own = task->maybe_shift + row * task->shift_count / task->rows * columns;
    for (int64_t c = 0; c < columns; ++c) y[c] += own[c];
  }
}

static void layer_norm_part(const void *given, int64_t part, int64_t parts) {
  const LayerNorm *task = given;
  const int64_t columns = task->columns;
  float *y = malloc((size_t)columns * 3 * sizeof(float));
  if (!y) {
    tell(task->status, NO_MEMORY);
    return;
  }
  float *weight = y + columns, *bias = weight + columns;
  if (task->maybe_weight) widen(task->maybe_weight, task->are_bfloat16, 0, columns, weight);
  if (task->maybe_bias) widen(task->maybe_bias, task->are_bfloat16, 0, columns, bias);
  int found = DONE;
  for (int64_t row = task->rows * part / parts; row < task->rows * (part + 1) / parts; ++row) {
    layer_norm_row(task, row, weight, bias, y);
    found |= quantize_row(&task->by, row, columns, y);
  }
  tell(task->status, found);
  free(y);
}

// Quantize layer_norm(x) * (1 + multiplier) + shift by a calibrated scale, or where there is `maybe_scale` by that of
// each row, which is written.
int ldmq_layer_norm_quantize(const LayerNorm *asked, int64_t threads) {
  TASK_OF(LayerNorm, asked, status);
  int status = DONE;
  task.status = &status;
  ldmq_in_parts(layer_norm_part, &task, threads, threads);
  return status;
}
