// See attention.h.
#include "attention.h"

#ifdef LDMQ_HAS_ATTENTION

// Rows become columns.
static inline void transpose(__m512i rows[SIDE]) {
  __m512i pairs[SIDE], quads[SIDE];
  for (int i = 0; i < SIDE; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < SIDE; i += 4) {
    quads[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    quads[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    quads[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    quads[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // columns i, i + 4, i + 8 and i + 12 are in the four lanes
    const __m512i low = _mm512_shuffle_i32x4(quads[i], quads[i + 4], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(quads[i], quads[i + 4], 0xdd);
    const __m512i later_low = _mm512_shuffle_i32x4(quads[i + 8], quads[i + 12], 0x88);
    const __m512i later_high = _mm512_shuffle_i32x4(quads[i + 8], quads[i + 12], 0xdd);
    rows[i] = _mm512_shuffle_i32x4(low, later_low, 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(low, later_low, 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(high, later_high, 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(high, later_high, 0xdd);
  }
}

// 16 keys from `first` on; channels are even, so that a pair is whole.
static void pack_keys(const Attention *a, const uint16_t *keys, int64_t first, uint16_t *tiles) {
  for (int64_t tile = 0; tile < channel_tiles(a); ++tile) {
    const __mmask32 there = first_of(a->channels - tile * PAIRED);
    __m512i rows[SIDE];
    for (int64_t row = 0; row < SIDE; ++row) {
      const uint16_t *from = keys + (first + row) * a->key.token + tile * PAIRED;
      rows[row] = _mm512_maskz_loadu_epi16(first + row < a->keys ? there : 0, from);
    }
    transpose(rows);
    for (int64_t row = 0; row < SIDE; ++row) _mm512_storeu_si512(tiles + tile * TILE + row * PAIRED, rows[row]);
  }
}

// 16 columns of a key's values, widened; the one after the last channel is 1.
static __m512i columns_of(const Attention *a, const uint16_t *values, int64_t key, int64_t column) {
  if (key >= a->keys) return _mm512_setzero_si512();
  const __mmask16 there = (__mmask16)first_of(a->channels - column);
  const __mmask16 one = (__mmask16)(first_of(a->channels + 1 - column) & ~there);
  const __m256i found = _mm256_maskz_loadu_epi16(there, values + key * a->value.token + column);
  return _mm512_cvtepu16_epi32(_mm256_mask_mov_epi16(found, one, _mm256_set1_epi16(0x3f80)));
}

// 32 keys' values from `first` on.
static void pack_values(const Attention *a, const uint16_t *values, int64_t first, uint16_t *tiles) {
  for (int64_t tile = 0; tile < column_tiles(a); ++tile) {
    for (int64_t row = 0; row < SIDE; ++row) {
      const int64_t key = first + row / 4 * 4 + row % 2 * 2 + row / 2 % 2 * SIDE;
      const __m512i low = columns_of(a, values, key, tile * SIDE);
      const __m512i high = columns_of(a, values, key + 1, tile * SIDE);
      const __m512i pairs = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
      _mm512_storeu_si512(tiles + tile * TILE + row * PAIRED, pairs);
    }
  }
}

void ldmq_pack_part(const void *given, int64_t part, int64_t parts) {
  const Attention *a = given;
  const int64_t steps = key_steps(a), tiles = channel_tiles(a);
  for (int64_t item = part; item < a->batch * a->heads * steps; item += parts) {
    const int64_t head = item / steps, step = item % steps;
    uint16_t *to = a->packed + head * packed_head(a);
    const uint16_t *keys = of_head(a, &a->key, head);
    pack_keys(a, keys, step * PAIRED, to + 2 * step * tiles * TILE);
    pack_keys(a, keys, step * PAIRED + SIDE, to + (2 * step + 1) * tiles * TILE);
    pack_values(a, of_head(a, &a->value, head), step * PAIRED, to + packed_keys(a) + step * column_tiles(a) * TILE);
  }
}
#endif
