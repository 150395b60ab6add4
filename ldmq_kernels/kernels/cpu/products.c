// int8 products on a processor with AVX2 and without VNNI, exact: as 16-bit integers, whose products VPMADDWD adds in
// 32 bits.
//
// A convolution is a product whose left operand is gathered from the input block by block, as 16-bit rows that stay in
// the second cache; there is no im2col in memory. Weights are held as 16-bit pairs of input channels, for 16 output
// channels at a time: [panels][taps][pairs][16][2], zeros where there are fewer channels.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "epilogue.h"
#include "parts.h"

#ifdef __AVX2__
#include <immintrin.h>

enum {
  PANEL = 16,    // output channels
  ROWS = 6,      // outputs of a panel whose sums stay in registers: 12 of 16
  DEPTH = 1024,  // integers of a row that are multiplied before the sums go to memory
  STRIDE = DEPTH + 32,  // of gathered rows: a power of two would put them into the same lines of the first cache
  BLOCK = 96            // rows that are gathered together: 198 KiB
};

typedef struct {
  const int8_t *x;  // (samples, height, width, channels)
  int64_t samples, height, width, channels, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x;
  int64_t taps_y, taps_x, out_height, out_width;
  const int16_t *weight;
  int64_t outputs;
  int32_t *maybe_sums;  // (samples, out_height, out_width, outputs), where a row has more integers than DEPTH
  Epilogue epilogue;
  int64_t block, column_parts;  // rows of a part, and parts of a block of rows
  int *failed;                  // set where there is no memory for a part
} Product;

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The integers from `first` to `end` of one row of the left operand, in 16 bits.
static void gather(const Product *p, int64_t row, int64_t first, int64_t end, int16_t *restrict to) {
  const int64_t ox = row % p->out_width, oy = row / p->out_width % p->out_height;
  const int64_t sample = row / p->out_width / p->out_height;
  for (int64_t k = first; k < end;) {
    const int64_t tap = k / p->channels, channel = k - tap * p->channels;
    const int64_t count = smaller(p->channels - channel, end - k);
    const int64_t y = oy * p->stride_y - p->pad_y + tap / p->taps_x * p->dilation_y;
    const int64_t x = ox * p->stride_x - p->pad_x + tap % p->taps_x * p->dilation_x;
    if (y < 0 || y >= p->height || x < 0 || x >= p->width) {
      memset(to, 0, (size_t)count * sizeof *to);
    } else {
      const int8_t *from = p->x + ((sample * p->height + y) * p->width + x) * p->channels + channel;
      for (int64_t c = 0; c < count; ++c) to[c] = from[c];
    }
    to += count;
    k += count;
  }
}

// Six rows by a panel: the sums of `pairs` pairs. A function of its own, so that its sums have all registers.
static __attribute__((noinline)) void multiply_tile(const int16_t *restrict rows, int64_t stride,
                                                    const int16_t *restrict panel, int64_t pairs,
                                                    int32_t tile[ROWS][PANEL]) {
  __m256i sums[ROWS][2];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
  const int16_t *lower = rows, *upper = rows + 3 * stride;
  for (int64_t p = 0; p < pairs; ++p) {
    const __m256i left = _mm256_loadu_si256((const __m256i *)(panel + 2 * PANEL * p));
    const __m256i right = _mm256_loadu_si256((const __m256i *)(panel + 2 * PANEL * p + PANEL));
#define MULTIPLY(r, row)                                                                 \
  {                                                                                      \
    int32_t pair;                                                                        \
    memcpy(&pair, (row) + 2 * p, sizeof pair);                                           \
    const __m256i both = _mm256_set1_epi32(pair);                                        \
    sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(both, left));            \
    sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(both, right));           \
  }
    MULTIPLY(0, lower)
    MULTIPLY(1, lower + stride)
    MULTIPLY(2, lower + 2 * stride)
    MULTIPLY(3, upper)
    MULTIPLY(4, upper + stride)
    MULTIPLY(5, upper + 2 * stride)
#undef MULTIPLY
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    _mm256_storeu_si256((__m256i *)tile[r], sums[r][0]);
    _mm256_storeu_si256((__m256i *)(tile[r] + PANEL / 2), sums[r][1]);
  }
}

// Add a row of a tile to the sums before it, and finish it if it was the last, or else keep the sums.
static void take_row(const Product *p, const RowOperands *own, int64_t row, int64_t column, int adds, int is_last,
                     int32_t *restrict tile) {
  const int64_t count = smaller(PANEL, p->outputs - column), at = row * p->outputs + column;
  if (adds) {
    for (int64_t c = 0; c < count; ++c) tile[c] += p->maybe_sums[at + c];
  }
  if (!is_last) {
    memcpy(p->maybe_sums + at, tile, (size_t)count * sizeof *tile);
    return;
  }
  if (count == PANEL) {
    const __m256i *halves = (const __m256i *)tile;
    for (int64_t half = 0; half < 2; ++half) {
      const __m256 sums = _mm256_cvtepi32_ps(_mm256_loadu_si256(halves + half));
      finish_many(&p->epilogue, own, column + half * WIDTH, at + half * WIDTH, (Floats)sums);
    }
    return;
  }
  for (int64_t c = 0; c < count; ++c) finish_one(&p->epilogue, own, column + c, at + c, (float)tile[c]);
}

static void multiply_part(const void *given, int64_t part, int64_t parts) {
  const Product *p = given;
  (void)parts;
  const int64_t all_rows = p->samples * p->out_height * p->out_width, depth = p->taps_y * p->taps_x * p->channels;
  const int64_t panels = (p->outputs + PANEL - 1) / PANEL, block = part / p->column_parts;
  const int64_t columns = part % p->column_parts, first_row = block * p->block;
  const int64_t rows = smaller(p->block, all_rows - first_row);
  const int64_t first_panel = panels * columns / p->column_parts, end_panel = panels * (columns + 1) / p->column_parts;
  int16_t *gathered = malloc((size_t)((rows + ROWS - 1) / ROWS * ROWS * STRIDE) * sizeof *gathered);
  if (!gathered) {
    *p->failed = 1;
    return;
  }
  RowOperands own[BLOCK];
  for (int64_t r = 0; r < rows; ++r) own[r] = operands_of_row(&p->epilogue, first_row + r, all_rows, p->outputs);
  for (int64_t k = 0; k < depth; k += DEPTH) {
    const int64_t count = smaller(DEPTH, depth - k);
    for (int64_t r = 0; r < rows; ++r) gather(p, first_row + r, k, k + count, gathered + r * STRIDE);
    for (int64_t panel = first_panel; panel < end_panel; ++panel) {
      const int16_t *weight = p->weight + (panel * depth + k) * PANEL;
      for (int64_t r = 0; r < rows; r += ROWS) {
        int32_t tile[ROWS][PANEL];
        multiply_tile(gathered + r * STRIDE, STRIDE, weight, count / 2, tile);
        for (int64_t i = 0; i < smaller(ROWS, rows - r); ++i) {
          take_row(p, &own[r + i], first_row + r + i, panel * PANEL, k > 0, k + count == depth, tile[i]);
        }
      }
    }
  }
  free(gathered);
}

// Exact sums of x * weight, and their epilogue; channels are even. Not 0 where there was no memory for it.
int ldmq_multiply(const int8_t *x, int64_t samples, int64_t height, int64_t width, int64_t channels, int64_t taps_y,
                  int64_t taps_x, int64_t stride_y, int64_t stride_x, int64_t pad_y, int64_t pad_x,
                  int64_t dilation_y, int64_t dilation_x, int64_t out_height, int64_t out_width,
                  const int16_t *weight, int64_t outputs, int32_t *maybe_sums, const float *scale,
                  int64_t scale_count, const float *maybe_column_scale, const float *maybe_bias,
                  const float *maybe_sample_bias, int64_t sample_count, const float *maybe_gate, int64_t gate_count,
                  const void *maybe_residual, int residual_is_bfloat16, void *out, int out_is_bfloat16,
                  int64_t threads) {
  int failed = 0;
  const int64_t rows = samples * out_height * out_width, panels = (outputs + PANEL - 1) / PANEL;
  const int64_t block = smaller(BLOCK, ((rows + threads - 1) / threads + ROWS - 1) / ROWS * ROWS);
  const int64_t row_blocks = (rows + block - 1) / block;
  const int64_t column_parts = smaller(panels, (threads + row_blocks - 1) / row_blocks);
  const Product task = {x, samples, height, width, channels, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x,
                        taps_y, taps_x, out_height, out_width, weight, outputs, maybe_sums,
                        {scale, scale_count, maybe_column_scale, maybe_bias, maybe_sample_bias, sample_count,
                         maybe_gate, gate_count, maybe_residual, residual_is_bfloat16, out, out_is_bfloat16},
                        block, column_parts, &failed};
  ldmq_in_parts(multiply_part, &task, row_blocks * column_parts, threads);
  return failed;
}
#endif
