// A product on a processor with AVX2 and without VNNI: as 16-bit integers, whose products VPMADDWD adds in 32 bits.
//
// Rows are gathered as 16-bit integers that stay in the second cache. Weights are 16-bit pairs of input channels.
#include <stdlib.h>
#include <string.h>

#include "product.h"

#if defined(__AVX2__) && !defined(__AVX512F__)
#include <immintrin.h>

enum {
  ROWS = 6,      // outputs of a panel whose sums stay in registers: 12 of 16
  DEPTH = 1024,  // integers of a row that are multiplied before the sums go to memory
  STRIDE = DEPTH + 32   // of gathered rows: a power of two would put them into the same lines of the first cache
};

GATHER(int16_t)

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

// Finish a row of a tile, whose last column is not always the output's.
static void finish_row(const Product *p, const RowOperands *own, int64_t row, int64_t column, const int32_t *tile) {
  const int64_t count = smaller(PANEL, p->outputs - column), at = row * p->outputs + column;
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

static void multiply_share(const Product *p, const Share *own, int16_t *gathered, int32_t (*sums)[PANEL]) {
  RowOperands operands[PAIRED_ROWS];
  for (int64_t r = 0; r < own->rows; ++r) {
    operands[r] = operands_of_row(&p->epilogue, own->first_row + r, own->all_rows, p->outputs);
  }
  for (int64_t k = 0; k < own->depth; k += DEPTH) {
    const int64_t count = smaller(DEPTH, own->depth - k);
    for (int64_t r = 0; r < own->rows; ++r) gather(p, own->first_row + r, k, k + count, gathered + r * STRIDE);
    for (int64_t panel = own->first_panel; panel < own->end_panel; ++panel) {
      const int16_t *weight = (const int16_t *)p->weight + (panel * own->depth + k) * PANEL;
      int32_t(*kept)[PANEL] = sums + (panel - own->first_panel) * own->rows;
      for (int64_t r = 0; r < own->rows; r += ROWS) {
        int32_t tile[ROWS][PANEL];
        multiply_tile(gathered + r * STRIDE, STRIDE, weight, count / 2, tile);
        for (int64_t i = 0; i < smaller(ROWS, own->rows - r); ++i) {
          if (k > 0) {
            for (int64_t c = 0; c < PANEL; ++c) tile[i][c] += kept[r + i][c];
          }
          if (k + count == own->depth) {
            finish_row(p, &operands[r + i], own->first_row + r + i, panel * PANEL, tile[i]);
          } else {
            memcpy(kept[r + i], tile[i], sizeof tile[i]);
          }
        }
      }
    }
  }
}

void ldmq_multiply_pairs(const void *given, int64_t part, int64_t parts) {
  const Product *p = given;
  (void)parts;
  const Share own = share_of(p, part);
  const size_t rows = (size_t)((own.rows + ROWS - 1) / ROWS * ROWS);
  const size_t kept = own.depth > DEPTH ? (size_t)((own.end_panel - own.first_panel) * own.rows) : 1;
  int16_t *gathered = malloc(rows * STRIDE * sizeof *gathered);
  int32_t(*sums)[PANEL] = malloc(kept * sizeof *sums);
  if (gathered && sums) {
    multiply_share(p, &own, gathered, sums);
  } else {
    tell(p->status, NO_MEMORY);
  }
  free(sums);
  free(gathered);
}
#endif
