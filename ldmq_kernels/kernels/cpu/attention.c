// softmax(query key^T * scale + mask) value of bfloat16 by AMX tiles, without the scores in memory.
//
// Groups of 32 queries of one head meet the keys in turns of 64: tiles multiply them into float32 scores, vectors make
// weights of the scores, and tiles add the weighted values to sums in float32, one after the other: while tiles
// multiply, vectors have half of their ports. Weights are 2^(score - shift), where the shift of a query is a score of
// its own: the largest for the first keys, and a new one only where a later score is greater by more than `GROWTH`; up
// to that bfloat16 and the sums hold the weights as exactly. Each weight is rounded to bfloat16 once, but for those of
// the same turn before a new shift, which are so small then that another rounding does not matter. The sum of weights
// is a product, too: by a column of ones beside the values, so that it is the sum of what was multiplied. Nothing
// depends on the batch, other heads or the threads.

#include "attention.h"

#ifdef LDMQ_HAS_ATTENTION
#include <math.h>
#include <string.h>

#include "amx.h"
#include "parts.h"

enum {
  QUERIES = 2 * SIDE,    // of a group, which tiles multiply together
  GROUPS = 4,            // that meet the same keys one after the other where a head's are more than a cache holds
  CACHE = 3 << 18,       // values
  STEPS = 2,             // of a turn, of 32 keys each
  LARGEST_HEAD = 256,    // channels of a head
  SQUARE = SIDE * SIDE,  // float32 values of a tile
  QUERY_TILES = 2 * LARGEST_HEAD / PAIRED,
  COLUMNS = LARGEST_HEAD / SIDE + 1  // of the sums: one has the sum of the weights
};
static const float HALF_STEP = 0.00390625f;  // of bfloat16 between 1 and 2
static const float GROWTH = 8.0f;            // of a score over the shift, as a power of two
static const float NO_SHIFT = -1e38f;        // the shift where no score was above -inf
static const float LOWEST_MASK = -1e30f;     // what is lower, and no -inf, becomes this: scores stay above NO_SHIFT
static const float LARGE = 1e6f;             // of a shift
static const float ABSENT = -1e7f;           // a score that gives no weight: every shift is above -LARGE
static const float LOG2_E = 1.44269504f;
static const int8_t FRACTIONS[128] = {  // round(128 * (2^(i / 128) - 1))
    0, 1, 1, 2, 3, 4, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12, 12, 13, 14, 15, 15, 16, 17, 18, 19, 19, 20, 21, 22, 23, 23,
    24, 25, 26, 27, 28, 28, 29, 30, 31, 32, 33, 34, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 43, 44, 45, 46, 47, 48,
    49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70, 72, 73, 74, 75, 76, 77,
    78, 79, 80, 82, 83, 84, 85, 86, 87, 88, 90, 91, 92, 93, 94, 96, 97, 98, 99, 100, 102, 103, 104, 105, 107, 108,
    109, 111, 112, 113, 115, 116, 117, 118, 120, 121, 123, 124, 125, 127};

// What tiles and vectors hand to each other, tile by tile: of the upper 16 queries, and then of the lower.
typedef struct {
  uint16_t queries[GROUPS][QUERY_TILES][TILE];
  float sums[GROUPS][COLUMNS][2][SQUARE];  // of weighted values, and in column `channels` of the weights
  float scores[STEPS][2][2 * SQUARE];      // of 16 keys, and of the next 16
  uint16_t weights[STEPS][2 * TILE];
  float shift[GROUPS][QUERIES];            // of each query
  float plus[GROUPS][QUERIES];             // what it adds to the bits of a weight
  float ratios[QUERIES];                   // of weights by the shifts before a turn to weights by those since
  int has_ratios;
  int is_exact;                            // whether powers are float32's: see weigh_exactly
  int is_off;                              // whether they should be
} __attribute__((aligned(64))) Block;

// -- weights ------------------------------------------------------------------------------------------------------

// Some of a head's keys, and the group that meets them; weights are made of one step's scores after the other's.
typedef struct {
  const Attention *a;
  Block *block;
  const uint16_t *keys_of_head, *values_of_head;
  int64_t head, group, first_query;
  int64_t first_step, steps;
  int64_t step;   // of the turn
  float factor;   // of a score to the power of two
  int has_grown;  // whether some weight of the step is over 2^GROWTH
} Turn;

static inline float *scores_of(const Turn *t, int64_t row, int64_t half) {
  return t->block->scores[t->step][half] + row * SIDE;
}

static inline uint16_t *weights_of(const Turn *t, int64_t step, int64_t row) {
  return t->block->weights[step] + row * PAIRED;
}

// A weight as bfloat16 without a power: (exponent + 127) * 128 is its bits, but for the 7 of the fraction f, which are
// looked up, 128 * (2^f - 1). The exponent is rounded to 1 / 128, as much as a weight is rounded by. What is below
// 2^-127 becomes 0. A score that is NaN or leaves 32 bits so is 0, too, and the processor's flag of invalid operations
// tells.
static void weigh_by_table(Turn *t) {
  const __m512 by = _mm512_set1_ps(t->factor * 128);
  const __m512i low_fractions = _mm512_loadu_si512(FRACTIONS), high_fractions = _mm512_loadu_si512(FRACTIONS + 64);
  const __m512i fraction = _mm512_set1_epi16(127);
  const float *plus = t->block->plus[t->group], *low_scores = scores_of(t, 0, 0), *high_scores = scores_of(t, 0, 1);
  uint16_t *weights = weights_of(t, t->step, 0);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t row = 0; row < QUERIES; ++row) {
    const __m512 of_row = _mm512_set1_ps(plus[row]);
    const __m512 low_power = _mm512_fmadd_ps(_mm512_loadu_ps(low_scores + row * SIDE), by, of_row);
    const __m512 high_power = _mm512_fmadd_ps(_mm512_loadu_ps(high_scores + row * SIDE), by, of_row);
    const __m512i low = _mm512_cvtps_epi32(low_power), high = _mm512_cvtps_epi32(high_power);
    const __m512i bits = _mm512_packus_epi32(low, high);
    const __m512i found = _mm512_permutex2var_epi8(low_fractions, bits, high_fractions);
    largest = _mm512_max_epu16(largest, bits);
    _mm512_storeu_si512(weights + row * PAIRED, _mm512_ternarylogic_epi32(bits, found, fraction, 0xd8));
  }
  t->has_grown = _mm512_cmpgt_epu16_mask(largest, _mm512_set1_epi16((127 + GROWTH) * 128)) != 0;
}

// 2^x and half a step of bfloat16 more: cut off after bfloat16's bits, it is 2^x rounded. The polynomial is 2^f for f
// in [0, 1) to 7.5e-5 of it, a fiftieth of that step.
static inline __m512 power_to_cut(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 power = _mm512_fmadd_ps(f, _mm512_set1_ps(0.0780245302f), _mm512_set1_ps(0.226067146f));
  power = _mm512_fmadd_ps(f, power, _mm512_set1_ps(0.695833543f));
  power = _mm512_fmadd_ps(f, power, _mm512_set1_ps(0.999925219f + HALF_STEP));
  return _mm512_scalef_ps(power, x);
}

// The same by powers of float32, of scores of any size.
static void weigh_exactly(Turn *t) {
  const __m512 by = _mm512_set1_ps(t->factor);
  __m512 largest = _mm512_set1_ps(-INFINITY);
  for (int64_t row = 0; row < QUERIES; ++row) {
    const __m512 shift = _mm512_set1_ps(t->block->shift[t->group][row]);
    const __m512 low = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores_of(t, row, 0)), shift), by);
    const __m512 high = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores_of(t, row, 1)), shift), by);
    largest = _mm512_max_ps(largest, _mm512_max_ps(low, high));
    const __m512i below = _mm512_srli_epi32(_mm512_castps_si512(power_to_cut(low)), 16);
    const __m512i above = _mm512_srli_epi32(_mm512_castps_si512(power_to_cut(high)), 16);
    _mm512_storeu_si512(weights_of(t, t->step, row), _mm512_packus_epi32(below, above));
  }
  t->has_grown = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(GROWTH), _CMP_GT_OQ) != 0;
}

static void weigh(Turn *t) {
  t->block->is_exact ? weigh_exactly(t) : weigh_by_table(t);
}

static float largest_score(const Turn *t, int64_t row) {
  const __m512 low = _mm512_loadu_ps(scores_of(t, row, 0)), high = _mm512_loadu_ps(scores_of(t, row, 1));
  return _mm512_reduce_max_ps(_mm512_max_ps(low, high));
}

// Take this score as the shift of a row.
static void set_shift(const Turn *t, int64_t row, float score) {
  const float shift = score == -INFINITY ? NO_SHIFT : score;
  t->block->shift[t->group][row] = shift;
  t->block->plus[t->group][row] = 127 * 128 - shift * (t->factor * 128);
  t->block->is_off |= fabsf(shift) >= LARGE;
}

static void scale_weights(uint16_t *weights, float ratio) {
  for (int64_t k = 0; k < PAIRED; k += SIDE) {
    const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((__m256i *)(weights + k))), 16);
    const __m512 scaled = _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(ratio));
    _mm256_storeu_si256((__m256i *)(weights + k), (__m256i)_mm512_cvtneps_pbh(scaled));
  }
}

// Weigh a step's keys once more, by new shifts where a score is greater by too much.
static void raise_shifts(Turn *t) {
  Block *block = t->block;
  for (int64_t row = 0; row < QUERIES; ++row) {
    const float score = largest_score(t, row), growth = (score - block->shift[t->group][row]) * t->factor;
    if (!(growth > GROWTH)) continue;
    const float ratio = exp2f(-growth);
    set_shift(t, row, score);
    for (int64_t step = 0; step < t->step; ++step) scale_weights(weights_of(t, step, row), ratio);
    if (!block->has_ratios) {
      for (int64_t other = 0; other < QUERIES; ++other) block->ratios[other] = 1.0f;
      block->has_ratios = 1;
    }
    block->ratios[row] *= ratio;
  }
  weigh(t);
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

// What is done to the scores of a step before they are weighed: the mask, and no weight where there is no key.
static void prepare(Turn *t) {
  const Attention *a = t->a;
  const int64_t first_key = (t->first_step + t->step) * PAIRED, all = smaller(PAIRED, a->keys - first_key);
  const __m512 absent = _mm512_set1_ps(t->block->is_exact ? -INFINITY : ABSENT);
  for (int64_t row = 0; row < QUERIES && (a->maybe_mask || all < PAIRED); ++row) {
    for (int64_t half = 0; half < 2; ++half) {
      float *scores = scores_of(t, row, half);
      const int64_t keys = all - half * SIDE, first = first_key + half * SIDE;
      if (a->maybe_mask && keys > 0) {
        const int64_t query = smaller(t->first_query + row, a->queries - 1);
        const float *mask = a->maybe_mask + t->head / a->heads * a->mask_batch + t->head % a->heads * a->mask_head;
        add_mask(scores, smaller(keys, SIDE), a->scale, mask + query * a->mask_query + first);
      }
      _mm512_mask_storeu_ps(scores, (__mmask16)~first_of(keys), absent);
    }
  }
  if (first_key == 0) {
    for (int64_t row = 0; row < QUERIES; ++row) set_shift(t, row, largest_score(t, row));
  }
}

// -- tiles --------------------------------------------------------------------------------------------------------

// Scores of the group for the 32 keys of a step.
static void multiply_keys(const Turn *t, int64_t step) {
  const int64_t tiles = channel_tiles(t->a);
  const uint16_t *queries = t->block->queries[t->group][0];
  const uint16_t *keys = t->keys_of_head + 2 * (t->first_step + step) * tiles * TILE;
  float *scores = t->block->scores[step][0];
  MEMORY_IS_WRITTEN();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < tiles; ++k) {
    _tile_loadd(4, queries + 2 * k * TILE, 64);
    _tile_stream_loadd(6, keys + k * TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, queries + (2 * k + 1) * TILE, 64);
    _tile_dpbf16ps(1, 5, 6);
    _tile_stream_loadd(7, keys + (tiles + k) * TILE, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, scores, 64);
  _tile_stored(1, scores + SQUARE, 64);
  _tile_stored(2, scores + 2 * SQUARE, 64);
  _tile_stored(3, scores + 3 * SQUARE, 64);
  MEMORY_IS_WRITTEN();
}

// Add the weighted values of a turn to 16 or 32 columns of the sums.
static void add_values(const Turn *t, int64_t column) {
  const int64_t columns = column_tiles(t->a), has_two = column + 1 < columns;
  const uint16_t *values = t->values_of_head + (t->first_step * columns + column) * TILE;
  const uint16_t *weights = t->block->weights[0];
  float *sums = t->block->sums[t->group][column][0];
  MEMORY_IS_WRITTEN();
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + SQUARE, 64);
  if (has_two) {
    _tile_loadd(2, sums + 2 * SQUARE, 64);
    _tile_loadd(3, sums + 3 * SQUARE, 64);
  }
  for (int64_t step = 0; step < t->steps; ++step) {
    const uint16_t *from = values + step * columns * TILE;
    _tile_loadd(4, weights + 2 * step * TILE, 64);
    _tile_stream_loadd(6, from, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, weights + (2 * step + 1) * TILE, 64);
    _tile_dpbf16ps(1, 5, 6);
    if (has_two) {
      _tile_stream_loadd(7, from + TILE, 64);
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

static void rescale(Block *block, int64_t group, int64_t columns) {
  for (int64_t row = 0; row < QUERIES; ++row) {
    const __m512 ratio = _mm512_set1_ps(block->ratios[row]);
    for (int64_t column = 0; column < columns; ++column) {
      float *at = block->sums[group][column][0] + row * SIDE;
      _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), ratio));
    }
  }
  block->has_ratios = 0;
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

static void take_turn(Turn *t) {
  const int64_t columns = column_tiles(t->a);
  for (int64_t step = 0; step < t->steps; ++step) multiply_keys(t, step);
  for (t->step = 0; t->step < t->steps; ++t->step) {
    prepare(t);
    weigh(t);
    if (t->has_grown) raise_shifts(t);
  }
  if (t->block->has_ratios) rescale(t->block, t->group, columns);
  for (int64_t column = 0; column < columns; column += 2) add_values(t, column);
}

// The groups from a query on. Whether they can be used: else they are to be exact. The way by the table ends at the
// first shift that is large.
static __attribute__((noinline)) int attend_groups(const Attention *a, Block *block, int64_t head, int64_t first_query,
                                                   int64_t groups, int is_exact) {
  const uint16_t *packed = a->packed + head * packed_head(a);
  Turn t = {.a = a, .block = block, .head = head, .keys_of_head = packed, .values_of_head = packed + packed_keys(a)};
  t.factor = a->maybe_mask ? LOG2_E : LOG2_E * a->scale;
  block->has_ratios = block->is_off = 0;
  block->is_exact = is_exact;
  for (int64_t g = 0; g < groups; ++g) begin_group(a, block, head, g, first_query + g * QUERIES);
  for (; t.first_step < key_steps(a); t.first_step += STEPS) {
    t.steps = smaller(STEPS, key_steps(a) - t.first_step);
    for (t.group = 0; t.group < groups; ++t.group) {
      t.first_query = first_query + t.group * QUERIES;
      take_turn(&t);
      if (block->is_off && !is_exact) return 0;
    }
  }
  for (int64_t g = 0; g < groups; ++g) write_out(a, block, head, g, first_query + g * QUERIES);
  return 1;
}

// Masks may be of any size; other scores seldom are NaN, infinite or large.
static void attend(const Attention *a, Block *block, int64_t head, int64_t first_query, int64_t groups) {
  const unsigned state = _mm_getcsr();
  _mm_setcsr(state & ~_MM_EXCEPT_INVALID);
  const int is_done = !a->maybe_mask && attend_groups(a, block, head, first_query, groups, 0);
  const int is_right = is_done && !(_mm_getcsr() & _MM_EXCEPT_INVALID);
  _mm_setcsr(state);
  if (!is_right) attend_groups(a, block, head, first_query, groups, 1);
}

// -- parts --------------------------------------------------------------------------------------------------------

static void attend_part(const void *given, int64_t part, int64_t parts) {
  const Attention *a = given;
  (void)parts;
  const int64_t blocks = steps_of(a->queries, GROUPS * QUERIES), each = packed_head(a) > CACHE ? GROUPS : 1;
  const int64_t end = smaller(a->queries, (part % blocks + 1) * GROUPS * QUERIES);
  const TileSizes before = take_tiles();
  Block block;
  for (int64_t first = part % blocks * GROUPS * QUERIES; first < end; first += each * QUERIES) {
    attend(a, &block, part / blocks, first, smaller(each, steps_of(end - first, QUERIES)));
  }
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
