// q = quantize(activation(x)) for rows of x, each in one pass over memory. See producers.h.

#include "parts.h"
#include "producers.h"

enum { SILU = 0, GELU = 1, GELU_TANH = 2, GEGLU = 3 };  // as `compiled_producers.py` has them

typedef struct {
  const void *x;
  int64_t is_bfloat16;
  int64_t rows, columns;  // of the result: rows of GEGLU's input have the values, then as many gates
  int64_t activation;
  Quantization by;
  int *status;
} Activated;

static void activate_row(const Activated *task, int64_t row, float *restrict y, float *restrict gates) {
  const int64_t columns = task->columns;
  if (task->activation == GEGLU) {
    widen(task->x, task->is_bfloat16, 2 * row * columns, columns, y);
    widen(task->x, task->is_bfloat16, (2 * row + 1) * columns, columns, gates);
    for (int64_t c = 0; c < columns; ++c) y[c] *= gelu(gates[c]);
    return;
  }
  widen(task->x, task->is_bfloat16, row * columns, columns, y);
  if (task->activation == SILU) {
    for (int64_t c = 0; c < columns; ++c) y[c] = silu(y[c]);
  } else if (task->activation == GELU) {
    for (int64_t c = 0; c < columns; ++c) y[c] = gelu(y[c]);
  } else {
    for (int64_t c = 0; c < columns; ++c) y[c] = gelu_tanh(y[c]);
  }
}

static void activated_part(const void *given, int64_t part, int64_t parts) {
  const Activated *task = given;
  float *y = malloc((size_t)task->columns * 2 * sizeof(float));
  if (!y) {
    tell(task->status, NO_MEMORY);
    return;
  }
  int found = DONE;
  for (int64_t row = task->rows * part / parts; row < task->rows * (part + 1) / parts; ++row) {
    activate_row(task, row, y, y + task->columns);
    found |= quantize_row(&task->by, row, task->columns, y);
  }
  tell(task->status, found);
  free(y);
}

// Quantize activation(x) by a calibrated scale, or where there is `maybe_scale` by that of each row, which is written.
int ldmq_activate_quantize(const Activated *asked, int64_t threads) {
  TASK_OF(Activated, asked, status);
  int status = DONE;
  task.status = &status;
  ldmq_in_parts(activated_part, &task, threads, threads);
  return status;
}
