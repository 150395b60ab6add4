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
int ldmq_multiply(const int8_t *x, int64_t samples, int64_t height, int64_t width, int64_t channels, int64_t taps_y,
                  int64_t taps_x, int64_t stride_y, int64_t stride_x, int64_t pad_y, int64_t pad_x,
                  int64_t dilation_y, int64_t dilation_x, int64_t out_height, int64_t out_width, const void *weight,
                  int64_t outputs, const float *scale, int64_t scale_count, const float *maybe_column_scale,
                  const float *maybe_bias, const float *maybe_sample_bias, int64_t sample_count,
                  const float *maybe_gate, int64_t gate_count, const void *maybe_residual, int residual_is_bfloat16,
                  void *out, int out_is_bfloat16, int is_gated, const float *maybe_inverse, int64_t inverse_count,
                  int64_t threads) {
  int status = DONE;
  const int64_t rows = samples * out_height * out_width;
  const int64_t each = (rows + threads - 1) / threads;
  // weights that are larger than the input are shared between threads, else the input is
  const int64_t wanted = outputs > rows ? rows : each;
  const int64_t block = smaller(multiplier.rows, (wanted + multiplier.side - 1) / multiplier.side * multiplier.side);
  const int64_t row_blocks = (rows + block - 1) / block;
  Product task = {x, samples, height, width, channels, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, taps_y,
                  taps_x, out_height, out_width, weight, outputs,
                  {scale, scale_count, maybe_column_scale, maybe_bias, maybe_sample_bias, sample_count, maybe_gate,
                   gate_count, maybe_residual, residual_is_bfloat16, out, out_is_bfloat16},
                  is_gated, maybe_inverse, inverse_count, block, 1, &status};
  task.column_parts = smaller((panels_of(&task) + 1) / 2, (threads + row_blocks - 1) / row_blocks);
  ldmq_in_parts(multiplier.part, &task, row_blocks * task.column_parts, threads);
  return status;
}
