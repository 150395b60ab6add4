// softmax(query key^T * scale + mask) value of bfloat16 by AMX tiles, without the scores in memory.
//
// Groups of 32 queries of one head meet the keys 128 at a time: tiles multiply them into float32 scores, vectors make
// weights of the scores, and tiles add the weighted values to sums in float32. Weights are 2^(score - shift), where the
// shift of a query is a score of its own: the largest for the first keys, and a new one only where a later score is
// greater by more than `GROWTH`; up to that bfloat16 and the sums hold the weights as exactly. Each weight is rounded
// to bfloat16 once, and the sum of weights is a product, too: by a column of ones beside the values, so that it is the
// sum of what was multiplied. Nothing depends on the batch, on other heads or on the threads.

#include "attention.h"

#ifdef LDMQ_HAS_ATTENTION
#include <math.h>
#include <string.h>

#include "amx.h"
#include "parts.h"

enum {
  QUERIES = 2 * SIDE,             // of a group, which tiles multiply together
  GROUPS = 4,                     // of a block, which meet the same keys one after the other
  KEYS = 128,                     // that a group meets at a time
  LARGEST_HEAD = 256,             // channels of a head
  COLUMNS = LARGEST_HEAD + SIDE,  // of the sums: one is that of the weights
  SCORE_STRIDE = KEYS + SIDE,     // a power of two would put a tile's rows into the same lines of the first cache
  WEIGHT_STRIDE = KEYS + PAIRED
};
static const float HALF_STEP = 0.00390625f;  // of bfloat16 between 1 and 2
static const float GROWTH = 8.0f;            // of a score over the shift, as a power of two
static const float NO_SHIFT = -1e38f;        // the shift where no score was above -inf
static const float LOWEST_MASK = -1e30f;     // what is lower, and no -inf, becomes this: scores stay above NO_SHIFT
static const float LARGE = 1e4f;             // of a shift
static const float LOG2_E = 1.44269504f;

typedef struct {
  uint16_t queries[QUERIES * LARGEST_HEAD];
  float sums[QUERIES * COLUMNS];  // of weighted values, and in column `channels` of the weights
  float shift[QUERIES];
} Group;

// What tiles and vectors hand to each other.
typedef struct {
  Group groups[GROUPS];
  float scores[2][QUERIES * SCORE_STRIDE];       // of this turn and the next
  uint16_t weights[2][QUERIES * WEIGHT_STRIDE];  // of this turn and the one before
  float ratios[2][QUERIES];                      // of weights by the shifts before a turn to weights by those since
  int has_ratios[2];
} __attribute__((aligned(64))) Block;

// -- weights ------------------------------------------------------------------------------------------------------

// 2^x and half a step of bfloat16 more: cut off after bfloat16's bits, it is 2^x rounded. The polynomial is 2^f for f
// in [0, 1) to 7.5e-5 of it, a fiftieth of that step.
static inline __m512 power_to_cut(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 power = _mm512_fmadd_ps(f, _mm512_set1_ps(0.0780245302f), _mm512_set1_ps(0.226067146f));
  power = _mm512_fmadd_ps(f, power, _mm512_set1_ps(0.695833543f));
  power = _mm512_fmadd_ps(f, power, _mm512_set1_ps(0.999925219f + HALF_STEP));
  return _mm512_scalef_ps(power, x);
}

// Weights of a query for so many keys, a multiple of 32; the greatest exponents. (score - shift) * factor in one step
// is off by the rounding of shift * factor, the same for all keys, which matters where that is large.
static inline __m512 weigh_by(const float *scores, int64_t keys, float factor, float shift, int is_large,
                              uint16_t *weights) {
  const __m512 by = _mm512_set1_ps(factor), minus = _mm512_set1_ps(shift), plus = _mm512_set1_ps(-shift * factor);
  __m512 largest = _mm512_set1_ps(-INFINITY), other = largest;
  for (int64_t k = 0; k < keys; k += PAIRED) {
    __m512 low = _mm512_loadu_ps(scores + k), high = _mm512_loadu_ps(scores + k + SIDE);
    low = is_large ? _mm512_mul_ps(_mm512_sub_ps(low, minus), by) : _mm512_fmadd_ps(low, by, plus);
    high = is_large ? _mm512_mul_ps(_mm512_sub_ps(high, minus), by) : _mm512_fmadd_ps(high, by, plus);
    largest = _mm512_max_ps(largest, low);
    other = _mm512_max_ps(other, high);
    const __m512i below = _mm512_srli_epi32(_mm512_castps_si512(power_to_cut(low)), 16);
    const __m512i above = _mm512_castps_si512(power_to_cut(high));
    _mm512_storeu_si512(weights + k, _mm512_mask_mov_epi16(below, 0xaaaaaaaa, above));
  }
  return _mm512_max_ps(largest, other);
}

static inline __m512 weigh(const float *scores, int64_t keys, float factor, float shift, uint16_t *weights) {
  if (fabsf(shift) < LARGE) return weigh_by(scores, keys, factor, shift, 0, weights);
  return weigh_by(scores, keys, factor, shift, 1, weights);
}

// Take the largest of these scores as the shift; the ratio of weights by the one before to weights by the new one.
static float move_shift(const float *scores, int64_t keys, float factor, float *shift) {
  __m512 largest = _mm512_set1_ps(-INFINITY);
  for (int64_t k = 0; k < keys; k += SIDE) largest = _mm512_max_ps(largest, _mm512_loadu_ps(scores + k));
  const float top = _mm512_reduce_max_ps(largest), before = *shift;
  *shift = top == -INFINITY ? NO_SHIFT : top;
  return exp2f((before - *shift) * factor);
}

// scores = scores * scale + mask of one query
static void add_mask(float *scores, int64_t keys, float scale, const float *mask) {
  const __m512 by = _mm512_set1_ps(scale), lowest = _mm512_set1_ps(LOWEST_MASK), none = _mm512_set1_ps(-INFINITY);
  for (int64_t k = 0; k < keys; k += SIDE) {
    const __mmask16 there = (__mmask16)first_of(keys - k);
    const __m512 given = _mm512_maskz_loadu_ps(there, mask + k);
    const __mmask16 is_finite = _mm512_cmp_ps_mask(given, none, _CMP_NEQ_UQ);
    const __m512 added = _mm512_mask_max_ps(given, is_finite, lowest, given);
    _mm512_storeu_ps(scores + k, _mm512_fmadd_ps(_mm512_loadu_ps(scores + k), by, added));
  }
}

// -- turns --------------------------------------------------------------------------------------------------------

// In a turn, vectors make the weights of one group for some keys. Beside that, tiles multiply the queries of the next
// turn by their keys and add the values of the turn before: after each step of theirs some rows are weighed.
typedef struct {
  const Attention *a;
  Block *block;
  int64_t turn, head, first_query;  // of this group
  int64_t first_key, keys;
  float factor;  // of a score to the power of two
  float *shift;  // of each query
  int64_t row, rows, step, steps;
} Turn;

static void weigh_row(const Turn *t, int64_t row) {
  const Attention *a = t->a;
  Block *block = t->block;
  float *scores = block->scores[t->turn % 2] + row * SCORE_STRIDE;
  uint16_t *weights = block->weights[t->turn % 2] + row * WEIGHT_STRIDE;
  float *shift = t->shift + row;
  const int64_t whole = steps_of(t->keys, PAIRED) * PAIRED;
  if (a->maybe_mask) {
    const int64_t query = smaller(t->first_query + row, a->queries - 1);
    const float *mask = a->maybe_mask + t->head / a->heads * a->mask_batch + t->head % a->heads * a->mask_head;
    add_mask(scores, t->keys, a->scale, mask + query * a->mask_query + t->first_key);
  }
  for (int64_t k = t->keys; k < whole; ++k) scores[k] = -INFINITY;
  if (t->first_key == 0) move_shift(scores, whole, t->factor, shift);
  block->ratios[t->turn % 2][row] = 1.0f;
  const __m512 largest = weigh(scores, whole, t->factor, *shift, weights);
  if (_mm512_cmp_ps_mask(largest, _mm512_set1_ps(GROWTH), _CMP_GT_OQ)) {
    block->ratios[t->turn % 2][row] = move_shift(scores, whole, t->factor, shift);
    block->has_ratios[t->turn % 2] = 1;
    weigh(scores, whole, t->factor, *shift, weights);
  }
}

static inline void weigh_some(Turn *t) {
  ++t->step;
  for (const int64_t end = t->rows * t->step / t->steps; t->row < end; ++t->row) weigh_row(t, t->row);
}

static inline void store_tiles(float *to, int64_t stride, int has_two) {
  _tile_stored(0, to, stride * 4);
  _tile_stored(2, to + SIDE * stride, stride * 4);
  if (has_two) {
    _tile_stored(1, to + SIDE, stride * 4);
    _tile_stored(3, to + SIDE * stride + SIDE, stride * 4);
  }
  MEMORY_IS_WRITTEN();
}

// Scores of a group for 32 keys.
static void multiply_keys(Turn *t, const uint16_t *queries, int64_t tiles, const uint16_t *keys, float *scores) {
  const int64_t width = tiles * PAIRED * 2;
  MEMORY_IS_WRITTEN();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    _tile_loadd(4, queries + tile * PAIRED, width);
    _tile_loadd(6, keys + tile * TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, queries + tile * PAIRED + SIDE * tiles * PAIRED, width);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, keys + (tiles + tile) * TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
    weigh_some(t);
  }
  store_tiles(scores, SCORE_STRIDE, 1);
}

// Add the weighted values of `steps` times 32 keys to 16 or 32 columns of the sums.
static void add_values(Turn *t, const uint16_t *weights, int64_t steps, const uint16_t *values, int64_t columns,
                       int64_t column, float *sums) {
  const int has_two = column + 1 < columns;
  float *upper = sums + column * SIDE, *lower = upper + SIDE * COLUMNS;
  MEMORY_IS_WRITTEN();
  _tile_loadd(0, upper, COLUMNS * 4);
  _tile_loadd(2, lower, COLUMNS * 4);
  if (has_two) {
    _tile_loadd(1, upper + SIDE, COLUMNS * 4);
    _tile_loadd(3, lower + SIDE, COLUMNS * 4);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const uint16_t *from = values + (step * columns + column) * TILE;
    _tile_loadd(4, weights + step * PAIRED, WEIGHT_STRIDE * 2);
    _tile_loadd(6, from, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, weights + SIDE * WEIGHT_STRIDE + step * PAIRED, WEIGHT_STRIDE * 2);
    _tile_dpbf16ps(2, 5, 6);
    if (has_two) {
      _tile_loadd(7, from + TILE, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    weigh_some(t);
  }
  store_tiles(upper, COLUMNS, has_two);
}

static void rescale(Block *block, int64_t turn, float *sums, int64_t columns) {
  for (int64_t row = 0; row < QUERIES; ++row) {
    const __m512 ratio = _mm512_set1_ps(block->ratios[turn % 2][row]);
    for (float *at = sums + row * COLUMNS; at < sums + row * COLUMNS + columns * SIDE; at += SIDE) {
      _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), ratio));
    }
  }
  block->has_ratios[turn % 2] = 0;
}

// The sums over the sum of their weights; zeros where no key has a weight, as torch has it.
static void write_out(const Attention *a, const float *all_sums, int64_t head, int64_t first) {
  for (int64_t row = 0; row < smaller(QUERIES, a->queries - first); ++row) {
    const float *sums = all_sums + row * COLUMNS, weight = sums[a->channels];
    const __m512 inverse = _mm512_set1_ps(weight == 0.0f ? 0.0f : 1.0f / weight);
    const int64_t token = head / a->heads * a->queries + first + row;
    uint16_t *out = a->out + (token * a->heads + head % a->heads) * a->channels;
    for (int64_t c = 0; c < a->channels; c += SIDE) {
      const __m256i values = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(sums + c), inverse));
      _mm256_mask_storeu_epi16(out + c, (__mmask16)first_of(a->channels - c), values);
    }
  }
}

static void pack_queries(const Attention *a, const uint16_t *queries, int64_t first, uint16_t *to) {
  const int64_t width = channel_tiles(a) * PAIRED;
  for (int64_t row = 0; row < QUERIES; ++row) {
    const uint16_t *from = queries + (first + row) * a->query.token;
    const int64_t there = first + row < a->queries ? a->channels : 0;
    for (int64_t c = 0; c < width; c += PAIRED) {
      _mm512_storeu_si512(to + row * width + c, _mm512_maskz_loadu_epi16(first_of(there - c), from + c));
    }
  }
}

static void attend_block(const Attention *a, Block *block, int64_t head, int64_t first_query) {
  const int64_t groups = smaller(GROUPS, steps_of(a->queries - first_query, QUERIES));
  const int64_t tiles = channel_tiles(a), columns = column_tiles(a), panels = steps_of(columns, 2);
  const int64_t all_steps = key_steps(a), turns = steps_of(a->keys, KEYS) * groups;
  const uint16_t *keys = a->packed + head * packed_head(a), *values = keys + packed_keys(a);
  for (int64_t g = 0; g < groups; ++g) {
    Group *group = block->groups + g;
    pack_queries(a, of_head(a, &a->query, head), first_query + g * QUERIES, group->queries);
    for (int64_t row = 0; row < QUERIES; ++row) {
      memset(group->sums + row * COLUMNS, 0, (size_t)(columns * SIDE) * sizeof *group->sums);
      group->shift[row] = NO_SHIFT;
    }
  }
  block->has_ratios[0] = block->has_ratios[1] = 0;
  for (int64_t turn = -1; turn <= turns; ++turn) {
    const int64_t next = turn + 1, last = turn - 1;
    const int64_t next_step = next / groups * (KEYS / PAIRED), last_step = last / groups * (KEYS / PAIRED);
    const int64_t next_steps = next < turns ? smaller(KEYS / PAIRED, all_steps - next_step) : 0;
    const int64_t last_steps = last >= 0 ? smaller(KEYS / PAIRED, all_steps - last_step) : 0;
    Turn own = {.a = a, .block = block, .turn = turn, .head = head, .steps = next_steps * tiles + last_steps * panels};
    if (turn >= 0 && turn < turns) {
      own.first_query = first_query + turn % groups * QUERIES;
      own.first_key = turn / groups * KEYS;
      own.keys = smaller(KEYS, a->keys - own.first_key);
      own.factor = a->maybe_mask ? LOG2_E : LOG2_E * a->scale;
      own.shift = block->groups[turn % groups].shift;
      own.rows = QUERIES;
    }
    for (int64_t s = 0; s < next_steps; ++s) {
      const uint16_t *from = keys + 2 * (next_step + s) * tiles * TILE;
      multiply_keys(&own, block->groups[next % groups].queries, tiles, from, block->scores[next % 2] + s * PAIRED);
    }
    if (last >= 0) {
      float *sums = block->groups[last % groups].sums;
      if (block->has_ratios[last % 2]) rescale(block, last, sums, columns);
      for (int64_t c = 0; c < columns; c += 2) {
        add_values(&own, block->weights[last % 2], last_steps, values + last_step * columns * TILE, columns, c, sums);
      }
    }
    for (; own.row < own.rows; ++own.row) weigh_row(&own, own.row);  // where there was no step
  }
  for (int64_t g = 0; g < groups; ++g) write_out(a, block->groups[g].sums, head, first_query + g * QUERIES);
}

// -- tiles --------------------------------------------------------------------------------------------------------

static void attend_part(const void *given, int64_t part, int64_t parts) {
  const Attention *a = given;
  (void)parts;
  const int64_t blocks = steps_of(a->queries, GROUPS * QUERIES);
  const TileSizes before = take_tiles();
  Block block;
  attend_block(a, &block, part / blocks, part % blocks * GROUPS * QUERIES);
  give_tiles_back(&before);
}

// How many bfloat16 values `packed` must have room for.
int64_t ldmq_attention_room(int64_t batch, int64_t heads, int64_t keys, int64_t channels) {
  const Attention sizes = {.keys = keys, .channels = channels};
  return batch * heads * packed_head(&sizes);
}

// Channels are even and 256 at most; steps are in values.
void ldmq_attention(const uint16_t *query, int64_t query_batch, int64_t query_token, int64_t query_head,
                    const uint16_t *key, int64_t key_batch, int64_t key_token, int64_t key_head,
                    const uint16_t *value, int64_t value_batch, int64_t value_token, int64_t value_head,
                    int64_t batch, int64_t heads, int64_t queries, int64_t keys, int64_t channels,
                    const float *maybe_mask, int64_t mask_batch, int64_t mask_head, int64_t mask_query, double scale,
                    uint16_t *packed, uint16_t *out, int64_t threads) {
  const Attention task = {{query, query_batch, query_token, query_head},
                          {key, key_batch, key_token, key_head},
                          {value, value_batch, value_token, value_head},
                          batch, heads, queries, keys, channels,
                          maybe_mask, mask_batch, mask_head, mask_query, (float)scale, packed, out};
  ldmq_in_parts(ldmq_pack_part, &task, threads, threads);
  ldmq_in_parts(attend_part, &task, batch * heads * steps_of(queries, GROUPS * QUERIES), threads);
}
#endif
