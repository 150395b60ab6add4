// int8 products, exact: of a linear or a convolution, and their epilogue.
#include "parts.h"
#include "product.h"

typedef struct {
  int64_t rows, side;  // most rows that a part gathers, and those that are multiplied together
  PartOfProduct *part;
} Multiplier;

#if defined(__AMX_INT8__)
static const Multiplier multiplier = {TILED_ROWS, 32, ldmq_multiply_tiles};
#elif defined(__AVX2__) && !defined(__AVX512F__)
static const Multiplier multiplier = {PAIRED_ROWS, 6, ldmq_multiply_pairs};
#else
static const Multiplier multiplier = {0, 0, 0};
#endif

// How many input channels of an output lie side by side in a weight: 4 in tiles, 2 in pairs; 0 where none is multiplied.
int ldmq_group_of_weights(void) { return multiplier.part == 0 ? 0 : multiplier.side == 32 ? 4 : 2; }

// Exact sums of x * weight, and their epilogue; channels are a multiple of the group. Only tiles are gated: values and
// gates in whole panels, and of the epilogue nothing but scales and bias. Returns a status of producers.h.
int ldmq_multiply(const Product *asked, int64_t threads) {
  TASK_OF(Product, asked, block);
  int status = DONE;
  task.status = &status;
  const int64_t rows = task.samples * task.out_height * task.out_width;
  const int64_t each = (rows + threads - 1) / threads;
  // weights that are larger than the input are shared between threads, else the input is
  const int64_t wanted = task.outputs > rows ? rows : each;
  task.block = smaller(multiplier.rows, (wanted + multiplier.side - 1) / multiplier.side * multiplier.side);
  const int64_t row_blocks = (rows + task.block - 1) / task.block;
  task.column_parts = smaller((panels_of(&task) + 1) / 2, (threads + row_blocks - 1) / row_blocks);
  ldmq_in_parts(multiplier.part, &task, row_blocks * task.column_parts, threads);
  return status;
}
