// A product on a processor with AMX: 16 rows by 16 outputs of 64 integers for each instruction, exact in 32 bits; or of
// 32 values in bfloat16, whose sums are float32.
//
// Weights are groups of four input channels of 16 outputs, so that 16 groups are a tile as they lie. Rows of a linear
// are tiles as they lie, too, and so are those of a convolution whose outputs lie 16 side by side, for each tap, in a
// padded copy of what a part sees of the input; others are gathered.
#include <stdlib.h>
#include <string.h>

#include "amx.h"
#include "product.h"

#ifdef __AMX_INT8__

enum {
  SIDE = 16,              // rows and columns of a tile
  PAIR = 2 * SIDE,        // rows and columns that are multiplied together: 4 of 8 tiles are their sums
  STEP = 64,              // integers of a row in a tile
  LINE = 64,              // bytes that a cache holds together
  TILE = SIDE * STEP,     // bytes
  DEPTH = 48 * STEP,      // integers of a row that are multiplied before the sums go to memory
  GATED = 4,              // rows that are gated together
  WEIGHTS = 128 * 1024    // bytes that all rows of a part meet before the next: they stay in the second cache
};

typedef int32_t Sums[PAIR][PAIR];

GATHER(int8_t)

// The part of the input that a part's rows see, with its padding: a tile is 16 pixels beside one another, for each tap.
typedef struct {
  int8_t *pixels;  // null where rows are gathered or lie as they are
  int64_t first_y, width, pixel;  // the input's y of its first line, pixels of a line, bytes of a pixel
} Window;

// Where 16 rows and the next 16 lie, from one of their integers on.
typedef struct {
  const int8_t *upper, *lower;
  int64_t stride, are_bfloat16;
} Rows;

static void begin_sums(int adds, Sums sums) {
  MEMORY_IS_WRITTEN();
  if (adds) {
    _tile_loadd(0, sums[0], sizeof sums[0]);
    _tile_loadd(1, sums[0] + SIDE, sizeof sums[0]);
    _tile_loadd(2, sums[SIDE], sizeof sums[0]);
    _tile_loadd(3, sums[SIDE] + SIDE, sizeof sums[0]);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
}

static void keep_sums(Sums sums) {
  _tile_stored(0, sums[0], sizeof sums[0]);
  _tile_stored(1, sums[0] + SIDE, sizeof sums[0]);
  _tile_stored(2, sums[SIDE], sizeof sums[0]);
  _tile_stored(3, sums[SIDE] + SIDE, sizeof sums[0]);
  MEMORY_IS_WRITTEN();
}

// Two tiles of rows by two of weights over so many steps, added to the sums, which stay in tiles 0 to 3. Weights that
// are `ahead` bytes further are fetched into the second cache meanwhile, so many lines a step.
#define MULTIPLY_STEPS(NAME, DOT)                                                                                   \
  static void NAME(const Rows *rows, int64_t at, const int8_t *left, const int8_t *right, int64_t steps,             \
                   int64_t ahead, int64_t lines) {                                                                   \
    const int8_t *upper = rows->upper + at, *lower = rows->lower + at;                                               \
    for (int64_t s = 0; s < steps; ++s) {                                                                            \
      _tile_stream_loadd(6, left + s * TILE, STEP);                                                                  \
      _tile_loadd(4, upper + s * STEP, rows->stride);                                                                \
      DOT(0, 4, 6);                                                                                                  \
      _tile_stream_loadd(7, right + s * TILE, STEP);                                                                 \
      DOT(1, 4, 7);                                                                                                  \
      _tile_loadd(5, lower + s * STEP, rows->stride);                                                                \
      DOT(2, 5, 6);                                                                                                  \
      DOT(3, 5, 7);                                                                                                  \
      for (int64_t line = s * lines; line < (s + 1) * lines; ++line) {                                               \
        _mm_prefetch(left + ahead + line * LINE, _MM_HINT_T1);                                                       \
        _mm_prefetch(right + ahead + line * LINE, _MM_HINT_T1);                                                      \
      }                                                                                                              \
    }                                                                                                                \
  }

MULTIPLY_STEPS(multiply_integers, _tile_dpbssd)
MULTIPLY_STEPS(multiply_bfloat16, _tile_dpbf16ps)

static void multiply_steps(const Rows *rows, int64_t at, const int8_t *left, const int8_t *right, int64_t steps,
                           int64_t ahead, int64_t lines) {
  (rows->are_bfloat16 ? multiply_bfloat16 : multiply_integers)(rows, at, left, right, steps, ahead, lines);
}

// The same over integers k to k + count of the rows, tap by tap in a window. A last step that is not full has zeros in
// the place of the next panel's weights.
static void multiply_pair(const Product *p, const Window *window, const Rows *rows, int64_t k, int64_t count,
                          const int8_t *left, const int8_t *right, int64_t ahead, int64_t lines, Sums sums) {
  const int64_t whole = count / STEP * STEP, rest = count % STEP;
  begin_sums(k > 0, sums);
  for (int64_t done = 0; done < whole;) {
    int64_t run = whole, at = done;
    if (window->pixels) {
      const int64_t tap = (k + done) / p->channels, channel = (k + done) % p->channels;
      const int64_t down = tap / p->taps_x * p->dilation_y, along = tap % p->taps_x * p->dilation_x;
      run = smaller(p->channels - channel, whole - done);
      at = (down * window->width + along) * window->pixel + channel;
    }
    const int64_t fetched = done / STEP * lines * LINE - done * PANEL;
    multiply_steps(rows, at, left + done * PANEL, right + done * PANEL, run / STEP, ahead + fetched, lines);
    done += run;
  }
  if (rest) {
    int8_t last[2][TILE] = {{0}};
    memcpy(last[0], left + whole * PANEL, (size_t)(rest * PANEL));
    memcpy(last[1], right + whole * PANEL, (size_t)(rest * PANEL));
    MEMORY_IS_WRITTEN();
    multiply_steps(rows, whole, last[0], last[1], 1, 0, 0);
  }
  keep_sums(sums);
}

// Up to 16 numbers, those of `own`, from the one at `at` on.
static inline __m512 floats_of(const void *values, int64_t are_bfloat16, int64_t at, __mmask16 own) {
  if (!are_bfloat16) return _mm512_maskz_loadu_ps(own, (const float *)values + at);
  const __m256i halves = _mm256_maskz_loadu_epi16(own, (const uint16_t *)values + at);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Finish up to 16 columns of a pair of tiles, those of `own`, from `column` on; the first is at `at` in the output.
static void finish_columns(const Product *p, const RowOperands *operands, int64_t rows, int64_t column, __mmask16 own,
                           int64_t at, const int32_t (*sums)[PAIR]) {
  const Epilogue e = p->epilogue;
  const __m512 one = _mm512_set1_ps(1.0f), none = _mm512_setzero_ps();
  const __m512 scale = e.maybe_column_scale ? _mm512_maskz_loadu_ps(own, e.maybe_column_scale + column) : one;
  const __m512 bias = e.maybe_bias ? floats_of(e.maybe_bias, e.bias_is_bfloat16, column, own) : none;
  for (int64_t r = 0; r < rows; ++r, at += p->outputs) {
    const RowOperands of_row = operands[r];
    const __m512i found = _mm512_loadu_si512(sums[r]);
    __m512 y = p->is_bfloat16 ? _mm512_castsi512_ps(found) : _mm512_cvtepi32_ps(found);
    y = _mm512_mul_ps(y, _mm512_set1_ps(of_row.scale));
    y = _mm512_add_ps(_mm512_mul_ps(y, scale), bias);
    if (of_row.maybe_sample_bias) {
      y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(own, of_row.maybe_sample_bias + column));
    }
    if (of_row.maybe_gate) y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(own, of_row.maybe_gate + column));
    if (e.maybe_residual) y = _mm512_add_ps(y, floats_of(e.maybe_residual, e.residual_is_bfloat16, at, own));
    if (e.out_is_bfloat16) {
      _mm256_mask_storeu_epi16((uint16_t *)e.out + at, own, (__m256i)_mm512_cvtneps_pbh(y));
    } else {
      _mm512_mask_storeu_ps((float *)e.out + at, own, y);
    }
  }
}

static void finish_pair(const Product *p, const RowOperands *operands, int64_t row, int64_t rows, int64_t column,
                        int64_t columns, const int32_t (*sums)[PAIR]) {
  for (int64_t c = 0; c < columns; c += SIDE) {
    const __mmask16 own = (__mmask16)((1u << smaller(SIDE, columns - c)) - 1);
    finish_columns(p, operands, rows, column + c, own, row * p->outputs + column + c,
                   (const int32_t(*)[PAIR])(*sums + c));
  }
}

static inline __m512i bits_of_vector(__m512 values) { return _mm512_castps_si512(values); }

// gelu of `producers.h` to the same bits, of one vector for each of some rows: one row's steps wait for one another.
static inline void gelu_of_rows(const __m512 x[GATED], __m512 result[GATED]) {
  const __m512i most = bits_of_vector(_mm512_set1_ps(GELU_BOUND)), one = bits_of_vector(_mm512_set1_ps(1.0f));
  __m512 u[GATED], p[GATED];
  for (int r = 0; r < GATED; ++r) {
    const __m512i square = _mm512_min_epi32(bits_of_vector(_mm512_mul_ps(x[r], x[r])), most);
    u[r] = _mm512_fmadd_ps(_mm512_castsi512_ps(square), _mm512_set1_ps(GELU_SCALE), _mm512_set1_ps(-1.0f));
    p[r] = _mm512_set1_ps(GELU_TERMS[0]);
  }
  for (int k = 1; k < GELU_COUNT; ++k) {
    for (int r = 0; r < GATED; ++r) p[r] = _mm512_fmadd_ps(p[r], u[r], _mm512_set1_ps(GELU_TERMS[k]));
  }
  for (int r = 0; r < GATED; ++r) {
    const __m512i share = bits_of_vector(_mm512_fmadd_ps(p[r], x[r], _mm512_set1_ps(0.5f)));
    const __m512i bounded = _mm512_min_epi32(_mm512_max_epi32(share, _mm512_setzero_si512()), one);
    result[r] = _mm512_mul_ps(x[r], _mm512_castsi512_ps(bounded));
  }
}

// q = clamp(rint(y * inverse), -127, 127) of `producers.h`; whether there is NaN
static inline int round_vector(__m512 y, __m512 inverse, int8_t *q) {
  const __m512i lowest = bits_of_vector(_mm512_set1_ps(-127.0f)), most = bits_of_vector(_mm512_set1_ps(127.0f));
  const __m512 scaled = _mm512_mul_ps(y, inverse);
  const __m512i bounded = _mm512_min_epu32(_mm512_min_epi32(bits_of_vector(scaled), most), lowest);
  const __m512 rounded = _mm512_add_ps(_mm512_castsi512_ps(bounded), _mm512_set1_ps(ROUNDER));
  _mm_storeu_si128((__m128i *)q, _mm512_cvtepi32_epi8(bits_of_vector(rounded)));
  return _mm512_cmp_ps_mask(scaled, scaled, _CMP_UNORD_Q) != 0;
}

// Finish a pair of tiles whose left half are values and whose right half are their gates.
static void finish_gated(const Product *p, const RowOperands *operands, int64_t row, int64_t rows, int64_t column,
                         const int32_t (*sums)[PAIR]) {
  const Epilogue e = p->epilogue;
  const int64_t width = p->outputs / 2;
  const float *inverse = p->maybe_inverse;
  __m512 scales[2], shifts[2], inverses = _mm512_setzero_ps();
  for (int h = 0; h < 2; ++h) {
    const int64_t of = column + h * width;
    scales[h] = e.maybe_column_scale ? _mm512_loadu_ps(e.maybe_column_scale + of) : _mm512_set1_ps(1.0f);
    shifts[h] = e.maybe_bias ? floats_of(e.maybe_bias, e.bias_is_bfloat16, of, 0xffff) : _mm512_setzero_ps();
  }
  if (inverse) inverses = p->inverse_count == 1 ? _mm512_set1_ps(inverse[0]) : _mm512_loadu_ps(inverse + column);
  int has_nan = 0;
  for (int64_t first = 0; first < rows; first += GATED) {
    __m512 y[2][GATED], gate[GATED];
    for (int r = 0; r < GATED; ++r) {
      const __m512 scale = _mm512_set1_ps(operands[smaller(first + r, rows - 1)].scale);
      for (int h = 0; h < 2; ++h) {
        y[h][r] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums[first + r] + h * SIDE)), scale);
        y[h][r] = _mm512_add_ps(_mm512_mul_ps(y[h][r], scales[h]), shifts[h]);
      }
    }
    gelu_of_rows(y[1], gate);
    for (int r = 0; r < GATED; ++r) {
      if (first + r >= rows) break;
      const int64_t at = (row + first + r) * width + column;
      const __m512 result = _mm512_mul_ps(y[0][r], gate[r]);
      if (inverse) {
        has_nan |= round_vector(result, inverses, (int8_t *)e.out + at);
      } else if (e.out_is_bfloat16) {
        _mm256_storeu_si256((__m256i *)((uint16_t *)e.out + at), (__m256i)_mm512_cvtneps_pbh(result));
      } else {
        _mm512_storeu_ps((float *)e.out + at, result);
      }
    }
  }
  if (has_nan) tell(p->status, HAS_NAN);
}

// Whether rows of the left operand are rows of the input in whole steps, not all in the same lines of the first cache.
static int lies_in_rows(const Product *p) {
  return p->taps_y * p->taps_x == 1 && p->stride_y * p->stride_x == 1 && p->out_height == p->height &&
         p->out_width == p->width && p->channels % STEP == 0 && p->channels % 2048;
}

// Bytes between gathered rows: an odd number of lines, so that rows are not in the same lines of the first cache.
static int64_t stride_of(int64_t depth) {
  return ((smaller(depth, DEPTH) + STEP - 1) / STEP | 1) * STEP;
}

// Whether the rows of a part are 16 pixels side by side, whatever the tap, in whole steps of one sample.
static int sees_a_window(const Product *p, const Share *own) {
  const int64_t pixels = p->out_height * p->out_width;
  return p->taps_y * p->taps_x > 1 && p->stride_y * p->stride_x == 1 && p->out_width % SIDE == 0 &&
         p->channels % STEP == 0 && own->first_row / pixels == (own->first_row + own->rows - 1) / pixels;
}

static Window window_of(const Product *p, const Share *own) {
  const Window made = {0, own->first_row % (p->out_height * p->out_width) / p->out_width - p->pad_y,
                       p->out_width + (p->taps_x - 1) * p->dilation_x, (p->channels / STEP | 1) * STEP};
  return made;
}

static int64_t lines_of(const Product *p, const Share *own) {
  const int64_t first = own->first_row / p->out_width, last = (own->first_row + own->rows - 1) / p->out_width;
  return last - first + 1 + (p->taps_y - 1) * p->dilation_y;
}

static void copy_window(const Product *p, const Share *own, const Window *window) {
  const int8_t *sample = p->x + own->first_row / (p->out_height * p->out_width) * p->height * p->width * p->channels;
  for (int64_t line = 0; line < lines_of(p, own); ++line) {
    const int64_t y = window->first_y + line;
    for (int64_t column = 0; column < window->width; ++column) {
      const int64_t x = column - p->pad_x;
      int8_t *to = window->pixels + (line * window->width + column) * window->pixel;
      if (y < 0 || y >= p->height || x < 0 || x >= p->width) {
        memset(to, 0, (size_t)p->channels);
      } else {
        memcpy(to, sample + (y * p->width + x) * p->channels, (size_t)p->channels);
      }
    }
  }
}

// A part at work: where the rows of its left operand are, and the sums so far.
typedef struct {
  const Product *product;
  Share own;
  Window window;
  int64_t as_they_lie;  // pairs of tiles whose rows are the input's
  int8_t *gathered;
  int64_t stride;  // of what is gathered
  Sums *sums;
} Part;

// The rows of a pair of tiles from integer k on; in a window from the first on.
static Rows rows_of(const Part *part, int64_t pair, int64_t k) {
  const Product *p = part->product;
  const int64_t first = pair * PAIR, row = part->own.first_row + first;
  // a second tile without rows is the first again, and not finished
  const int64_t apart = first + SIDE < part->own.rows ? SIDE : 0;
  if (part->window.pixels) {
    const Window *window = &part->window;
    const int64_t pixels = p->out_height * p->out_width, line = part->own.first_row % pixels / p->out_width;
    const int8_t *found[2];
    for (int64_t tile = 0; tile < 2; ++tile) {
      const int64_t at = (row + tile * apart) % pixels;
      found[tile] = window->pixels + ((at / p->out_width - line) * window->width + at % p->out_width) * window->pixel;
    }
    return (Rows){found[0], found[1], window->pixel, p->is_bfloat16};
  }
  const int64_t stride = pair < part->as_they_lie ? p->channels : part->stride;
  const int8_t *upper = pair < part->as_they_lie ? p->x + row * stride + k : part->gathered + first * stride;
  return (Rows){upper, upper + apart * stride, stride, p->is_bfloat16};
}

static void gather_rows(const Part *part, int64_t k, int64_t count) {
  if (part->window.pixels) return;
  const int64_t whole = (count + STEP - 1) / STEP * STEP;
  for (int64_t r = part->as_they_lie * PAIR; r < part->own.rows; ++r) {
    gather(part->product, part->own.first_row + r, k, k + count, part->gathered + r * part->stride);
    memset(part->gathered + r * part->stride + count, 0, (size_t)(whole - count));
  }
}

// Integers k to k + count of a pair of tiles' rows by the weights of some panels, whose outputs are side by side; each
// pair fetches its share of the weights that are `next` bytes further.
static void multiply_rows(const Part *part, const RowOperands *operands, int64_t k, int64_t count, int64_t pair,
                          int64_t begin, int64_t end, int64_t next) {
  const Product *p = part->product;
  const Share *own = &part->own;
  const int64_t each = p->is_gated ? 1 : 2, pairs = (own->rows + PAIR - 1) / PAIR;
  const int64_t first = pair * PAIR, row = own->first_row + first, count_of_rows = smaller(PAIR, own->rows - first);
  const Rows rows = rows_of(part, pair, k);
  const int64_t lines = (SIDE + pairs - 1) / pairs, ahead = next + pair * (count / STEP * lines * LINE);
  for (int64_t panel = begin; panel < end; panel += each) {
    const int8_t *left = (const int8_t *)p->weight + (panel * own->depth + k) * PANEL;
    const int64_t to_right = p->is_gated ? panels_of(p) : panel + 1 < own->end_panel;
    Sums *kept = part->sums + (own->depth > DEPTH ? (panel - own->first_panel) / each * pairs + pair : 0);
    multiply_pair(p, &part->window, &rows, k, count, left, left + to_right * own->depth * PANEL, ahead, lines, *kept);
    if (k + count < own->depth) continue;
    const int32_t(*done)[PAIR] = (const int32_t(*)[PAIR]) * kept;
    if (p->is_gated) {
      finish_gated(p, operands + first, row, count_of_rows, panel * PANEL, done);
    } else {
      const int64_t columns = smaller(p->outputs, own->end_panel * PANEL) - panel * PANEL;
      finish_pair(p, operands + first, row, count_of_rows, panel * PANEL, smaller(PAIR, columns), done);
    }
  }
}

static void multiply_share(const Part *part) {
  const Product *p = part->product;
  const Share *own = &part->own;
  const int64_t each = p->is_gated ? 1 : 2, pairs = (own->rows + PAIR - 1) / PAIR;
  RowOperands operands[TILED_ROWS];
  for (int64_t r = 0; r < own->rows; ++r) {
    operands[r] = operands_of_row(&p->epilogue, own->first_row + r, own->all_rows, p->outputs);
  }
  for (int64_t k = 0; k < own->depth; k += DEPTH) {
    const int64_t count = smaller(DEPTH, own->depth - k);
    gather_rows(part, k, count);
    const int64_t some = each * (PAIR * count < WEIGHTS ? WEIGHTS / (PAIR * count) : 1);
    for (int64_t begin = own->first_panel; begin < own->end_panel; begin += some) {
      const int is_last = begin + some >= own->end_panel;
      const int64_t next = is_last ? (own->first_panel - begin) * own->depth + count : some * own->depth;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        multiply_rows(part, operands, k, count, pair, begin, smaller(begin + some, own->end_panel), next * PANEL);
      }
    }
  }
}

void ldmq_multiply_tiles(const void *given, int64_t number, int64_t parts) {
  const Product *p = given;
  (void)parts;
  Part part = {p, share_of(p, number), {0}, 0, 0, 0, 0};
  const Share *own = &part.own;
  const int64_t pairs = (own->rows + PAIR - 1) / PAIR, panels = own->end_panel - own->first_panel;
  const int64_t kept = own->depth > DEPTH ? pairs * (p->is_gated ? panels : (panels + 1) / 2) : 1;
  const int has_window = sees_a_window(p, own);
  part.window = window_of(p, own);
  part.as_they_lie = lies_in_rows(p) ? own->rows / PAIR : 0;
  part.stride = stride_of(own->depth);
  const int64_t bytes = has_window ? lines_of(p, own) * part.window.width * part.window.pixel
                                   : pairs * PAIR * part.stride;
  part.gathered = aligned_alloc(STEP, (size_t)bytes);
  part.sums = aligned_alloc(STEP, (size_t)kept * sizeof *part.sums);
  if (part.gathered && part.sums) {
    if (has_window) {
      part.window.pixels = part.gathered;
      copy_window(p, own, &part.window);
    }
    const TileSizes before = take_tiles();
    multiply_share(&part);
    give_tiles_back(&before);
  } else {
    tell(p->status, NO_MEMORY);
  }
  free(part.sums);
  free(part.gathered);
}
#endif
