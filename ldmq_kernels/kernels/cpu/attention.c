// softmax(query key^T * scale + mask) value of bfloat16 by AMX tiles, without the scores in memory.
//
// Groups of 32 queries of one head meet the keys in turns of 128: tiles multiply 32 of them into float32 scores,
// vectors make weights of the scores, and tiles add the weighted values of a turn to sums in float32. Weights are
// 2^(score - shift), where the shift of a query is a score of its own: the largest for the first keys, and a new one
// only where a later score is greater by more than `GROWTH`; up to that bfloat16 and the sums hold the weights as
// exactly. Each weight is rounded to bfloat16 once, but for those of the same turn before a new shift, which are so
// small then that another rounding does not matter. The sum of weights is a product, too: by a column of ones beside
// the values, so that it is the sum of what was multiplied. Nothing depends on the batch, other heads or the threads.

#include "attention.h"

#ifdef LDMQ_HAS_ATTENTION
#include <math.h>
#include <string.h>

#include "amx.h"
#include "parts.h"

enum {
  QUERIES = 2 * SIDE,    // of a group, which tiles multiply together
  GROUPS = 4,            // of a block, which meet the same keys one after the other
  STEPS = 4,             // of a turn, of 32 keys each
  LARGEST_HEAD = 256,    // channels of a head
  SQUARE = SIDE * SIDE,  // float32 values of a tile
  QUERY_TILES = 2 * LARGEST_HEAD / PAIRED,
  COLUMNS = LARGEST_HEAD / SIDE + 1  // of the sums: one has the sum of the weights
};
static const float HALF_STEP = 0.00390625f;  // of bfloat16 between 1 and 2
static const float GROWTH = 8.0f;            // of a score over the shift, as a power of two
static const float NO_SHIFT = -1e38f;        // the shift where no score was above -inf
static const float LOWEST_MASK = -1e30f;     // what is lower, and no -inf, becomes this: scores stay above NO_SHIFT
static const float LARGE = 1e4f;             // of a shift
static const float LOG2_E = 1.44269504f;

// What tiles and vectors hand to each other, tile by tile: of the upper 16 queries, and then of the lower.
typedef struct {
  uint16_t queries[GROUPS][QUERY_TILES][TILE];
  float sums[GROUPS][COLUMNS][2][SQUARE];   // of weighted values, and in column `channels` of the weights
  float scores[2][2][2 * SQUARE];           // of this step and the next: of 16 keys, and of the next 16
  uint16_t weights[2][STEPS][2 * TILE];     // of this turn and the one before
  float shift[GROUPS][QUERIES];             // of each query
  float minus[GROUPS][QUERIES];             // what it adds to the power of two
  int is_large[GROUPS];                     // whether that is off by too much, where some shift is large
  float ratios[2][QUERIES];                 // of weights by the shifts before a turn to weights by those since
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

// In a step, tiles multiply the queries of the next step by its 32 keys and add weighted values of the turn before;
// then vectors make the weights of this step. A few rows after each product would take longer: while tiles multiply,
// vectors have half of their ports.
typedef struct {
  const Attention *a;
  Block *block;
  const uint16_t *keys_of_head, *values_of_head;
  int64_t head, group, first_query;
  int64_t turn, step;  // of the turn
  int64_t slot;        // of the scores
  int64_t first_key, keys;
  float factor;        // of a score to the power of two
  __m512 largest;      // exponents
} Step;

static inline float *scores_of(const Step *t, int64_t row, int64_t half) {
  return t->block->scores[t->slot][half] + row * SIDE;
}

static inline uint16_t *weights_of(const Step *t, int64_t step, int64_t row) {
  return t->block->weights[t->turn % 2][step] + row * PAIRED;
}

// Weights of a step, and the greatest exponents. (score - shift) * factor in one step is off by the rounding of
// shift * factor, the same for all keys, which matters where that is large.
static inline __attribute__((always_inline)) void weigh_rows(Step *t, int is_large) {
  const __m512 by = _mm512_set1_ps(t->factor);
  const float *shift = t->block->shift[t->group], *minus = t->block->minus[t->group];
  __m512 largest = t->largest;
  for (int64_t row = 0; row < QUERIES; ++row) {
    __m512 low = _mm512_loadu_ps(scores_of(t, row, 0)), high = _mm512_loadu_ps(scores_of(t, row, 1));
    if (is_large) {
      low = _mm512_mul_ps(_mm512_sub_ps(low, _mm512_set1_ps(shift[row])), by);
      high = _mm512_mul_ps(_mm512_sub_ps(high, _mm512_set1_ps(shift[row])), by);
    } else {
      low = _mm512_fmadd_ps(low, by, _mm512_set1_ps(minus[row]));
      high = _mm512_fmadd_ps(high, by, _mm512_set1_ps(minus[row]));
    }
    largest = _mm512_max_ps(largest, _mm512_max_ps(low, high));
    const __m512i below = _mm512_srli_epi32(_mm512_castps_si512(power_to_cut(low)), 16);
    const __m512i above = _mm512_castps_si512(power_to_cut(high));
    _mm512_storeu_si512(weights_of(t, t->step, row), _mm512_mask_mov_epi16(below, 0xaaaaaaaa, above));
  }
  t->largest = largest;
}

static void weigh_all(Step *t) {
  if (t->block->is_large[t->group]) {
    weigh_rows(t, 1);
  } else {
    weigh_rows(t, 0);
  }
}

static float largest_score(const Step *t, int64_t row) {
  const __m512 low = _mm512_loadu_ps(scores_of(t, row, 0)), high = _mm512_loadu_ps(scores_of(t, row, 1));
  return _mm512_reduce_max_ps(_mm512_max_ps(low, high));
}

// Take this score as the shift of a row; the ratio of weights by the one before to weights by the new one.
static float move_shift(const Step *t, int64_t row, float score) {
  float *shift = t->block->shift[t->group] + row;
  const float before = *shift;
  *shift = score == -INFINITY ? NO_SHIFT : score;
  t->block->minus[t->group][row] = -*shift * t->factor;
  t->block->is_large[t->group] |= fabsf(*shift) >= LARGE;
  return exp2f((before - *shift) * t->factor);
}

static void scale_weights(uint16_t *weights, float ratio) {
  for (int64_t k = 0; k < PAIRED; k += SIDE) {
    const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((__m256i *)(weights + k))), 16);
    const __m512 scaled = _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(ratio));
    _mm256_storeu_si256((__m256i *)(weights + k), (__m256i)_mm512_cvtneps_pbh(scaled));
  }
}

// Weigh a step's keys once more, by new shifts where a score is greater by too much.
static void raise_shifts(Step *t) {
  Block *block = t->block;
  const int64_t parity = t->turn % 2;
  for (int64_t row = 0; row < QUERIES; ++row) {
    const float score = largest_score(t, row);
    if (!((score - block->shift[t->group][row]) * t->factor > GROWTH)) continue;
    const float ratio = move_shift(t, row, score);
    for (int64_t step = 0; step < t->step; ++step) scale_weights(weights_of(t, step, row), ratio);
    if (!block->has_ratios[parity]) {
      for (int64_t other = 0; other < QUERIES; ++other) block->ratios[parity][other] = 1.0f;
      block->has_ratios[parity] = 1;
    }
    block->ratios[parity][row] *= ratio;
  }
  weigh_all(t);
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

// What is done to the scores of a step before they are weighed: the mask, and -inf where there is no key.
static void prepare(Step *t) {
  const Attention *a = t->a;
  for (int64_t row = 0; row < QUERIES && (a->maybe_mask || t->keys < PAIRED); ++row) {
    for (int64_t half = 0; half < 2; ++half) {
      float *scores = scores_of(t, row, half);
      const int64_t keys = t->keys - half * SIDE, first = t->first_key + half * SIDE;
      if (a->maybe_mask && keys > 0) {
        const int64_t query = smaller(t->first_query + row, a->queries - 1);
        const float *mask = a->maybe_mask + t->head / a->heads * a->mask_batch + t->head % a->heads * a->mask_head;
        add_mask(scores, smaller(keys, SIDE), a->scale, mask + query * a->mask_query + first);
      }
      for (int64_t k = keys < 0 ? 0 : keys; k < SIDE; ++k) scores[k] = -INFINITY;
    }
  }
  if (t->first_key == 0) {
    for (int64_t row = 0; row < QUERIES; ++row) move_shift(t, row, largest_score(t, row));
  }
}

// -- tiles --------------------------------------------------------------------------------------------------------

// Scores of a group for the 32 keys of a step.
static void multiply_keys(Step *t, int64_t group, int64_t step) {
  const int64_t tiles = channel_tiles(t->a);
  const uint16_t *queries = t->block->queries[group][0], *keys = t->keys_of_head + 2 * step * tiles * TILE;
  float *scores = t->block->scores[1 - t->slot][0];
  MEMORY_IS_WRITTEN();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < tiles; ++k) {
    _tile_loadd(4, queries + 2 * k * TILE, 64);
    _tile_loadd(6, keys + k * TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, queries + (2 * k + 1) * TILE, 64);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(7, keys + (tiles + k) * TILE, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, scores, 64);
  _tile_stored(1, scores + SQUARE, 64);
  _tile_stored(2, scores + 2 * SQUARE, 64);
  _tile_stored(3, scores + 3 * SQUARE, 64);
  MEMORY_IS_WRITTEN();
}

// Add the weighted values of `steps` times 32 keys from step `first` on to 16 or 32 columns of the sums.
static void add_values(Step *t, int64_t group, int64_t parity, int64_t first, int64_t steps, int64_t column) {
  const int64_t columns = column_tiles(t->a), has_two = column + 1 < columns;
  const uint16_t *values = t->values_of_head + (first * columns + column) * TILE;
  const uint16_t *weights = t->block->weights[parity][0];
  float *sums = t->block->sums[group][column][0];
  MEMORY_IS_WRITTEN();
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + SQUARE, 64);
  if (has_two) {
    _tile_loadd(2, sums + 2 * SQUARE, 64);
    _tile_loadd(3, sums + 3 * SQUARE, 64);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const uint16_t *from = values + step * columns * TILE;
    _tile_loadd(4, weights + 2 * step * TILE, 64);
    _tile_loadd(6, from, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, weights + (2 * step + 1) * TILE, 64);
    _tile_dpbf16ps(1, 5, 6);
    if (has_two) {
      _tile_loadd(7, from + TILE, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + SQUARE, 64);
  if (has_two) {
    _tile_stored(2, sums + 2 * SQUARE, 64);
    _tile_stored(3, sums + 3 * SQUARE, 64);
  }
  MEMORY_IS_WRITTEN();
}

static void rescale(Block *block, int64_t group, int64_t parity, int64_t columns) {
  for (int64_t row = 0; row < QUERIES; ++row) {
    const __m512 ratio = _mm512_set1_ps(block->ratios[parity][row]);
    for (int64_t column = 0; column < columns; ++column) {
      float *at = block->sums[group][column][0] + row * SIDE;
      _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), ratio));
    }
  }
  block->has_ratios[parity] = 0;
}

// -- blocks -------------------------------------------------------------------------------------------------------

static void begin_group(const Attention *a, Block *block, int64_t head, int64_t group, int64_t first) {
  const uint16_t *queries = of_head(a, &a->query, head);
  for (int64_t row = 0; row < QUERIES; ++row) {
    const uint16_t *from = queries + (first + row) * a->query.token;
    const int64_t there = first + row < a->queries ? a->channels : 0;
    for (int64_t k = 0; k < channel_tiles(a); ++k) {
      uint16_t *to = block->queries[group][2 * k] + row * PAIRED;
      _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(first_of(there - k * PAIRED), from + k * PAIRED));
    }
    for (int64_t column = 0; column < column_tiles(a); ++column) {
      _mm512_storeu_ps(block->sums[group][column][0] + row * SIDE, _mm512_setzero_ps());
    }
    block->shift[group][row] = NO_SHIFT;
  }
  block->is_large[group] = 0;
}

// The sums over the sum of their weights; zeros where no key has a weight, as torch has it.
static void write_out(const Attention *a, const Block *block, int64_t head, int64_t group, int64_t first) {
  for (int64_t row = 0; row < smaller(QUERIES, a->queries - first); ++row) {
    const float weight = block->sums[group][a->channels / SIDE][0][row * SIDE + a->channels % SIDE];
    const __m512 inverse = _mm512_set1_ps(weight == 0.0f ? 0.0f : 1.0f / weight);
    const int64_t token = head / a->heads * a->queries + first + row;
    uint16_t *out = a->out + (token * a->heads + head % a->heads) * a->channels;
    for (int64_t c = 0; c < a->channels; c += SIDE) {
      const __m512 sums = _mm512_loadu_ps(block->sums[group][c / SIDE][0] + row * SIDE);
      const __m256i values = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sums, inverse));
      _mm256_mask_storeu_epi16(out + c, (__mmask16)first_of(a->channels - c), values);
    }
  }
}

// One step: see Step.
static void take_step(Step *t, int64_t groups, int64_t turns, int64_t steps) {
  const Attention *a = t->a;
  Block *block = t->block;
  const int64_t columns = column_tiles(a), all = key_steps(a);
  const int64_t next_turn = t->step + 1 < steps ? t->turn : t->turn + 1, last = t->turn - 1;
  const int64_t next_step = next_turn / groups * STEPS + (next_turn == t->turn ? t->step + 1 : 0);
  const int64_t last_first = last / groups * STEPS, last_steps = last < 0 ? 0 : smaller(STEPS, all - last_first);
  const int64_t panels = (columns + 1) / 2, first_panel = panels * t->step / steps;
  const int64_t end_panel = last < 0 ? 0 : panels * (t->step + 1) / steps;
  const int64_t has_next = next_turn < turns;
  const int64_t has_own = t->turn >= 0 && t->turn < turns;
  if (has_own) prepare(t);
  t->largest = _mm512_set1_ps(-INFINITY);
  if (has_next) multiply_keys(t, next_turn % groups, next_step);
  if (last >= 0 && t->step == 0 && block->has_ratios[last % 2]) {
    rescale(block, last % groups, last % 2, columns);
  }
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    add_values(t, last % groups, last % 2, last_first, last_steps, 2 * panel);
  }
  if (!has_own) return;
  weigh_all(t);
  if (_mm512_cmp_ps_mask(t->largest, _mm512_set1_ps(GROWTH), _CMP_GT_OQ)) raise_shifts(t);
}

static void attend_block(const Attention *a, Block *block, int64_t head, int64_t first_query) {
  const int64_t groups = smaller(GROUPS, steps_of(a->queries - first_query, QUERIES));
  const int64_t all = key_steps(a), turns = steps_of(all, STEPS) * groups;
  for (int64_t g = 0; g < groups; ++g) begin_group(a, block, head, g, first_query + g * QUERIES);
  block->has_ratios[0] = block->has_ratios[1] = 0;
  const uint16_t *packed = a->packed + head * packed_head(a);
  Step t = {.a = a, .block = block, .head = head, .turn = -1, .keys_of_head = packed,
            .values_of_head = packed + packed_keys(a)};
  t.factor = a->maybe_mask ? LOG2_E : LOG2_E * a->scale;
  // the scores that are first: nothing is beside them
  take_step(&t, groups, turns, 1);
  for (int64_t turn = 0; turn <= turns; ++turn) {
    const int64_t first = turn / groups * STEPS, steps = turn < turns ? smaller(STEPS, all - first) : 1;
    for (int64_t step = 0; step < steps; ++step) {
      t.slot = 1 - t.slot;
      t.turn = turn;
      t.step = step;
      t.group = turn % groups;
      t.first_query = first_query + t.group * QUERIES;
      t.first_key = (first + step) * PAIRED;
      t.keys = smaller(PAIRED, a->keys - t.first_key);
      take_step(&t, groups, turns, steps);
    }
  }
  for (int64_t g = 0; g < groups; ++g) write_out(a, block, head, g, first_query + g * QUERIES);
}

// -- parts --------------------------------------------------------------------------------------------------------

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
