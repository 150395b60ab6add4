// A call of attention.c, and what it multiplies: keys and values in the order in which tiles take their right operand.
//
// They are copied so once, with zeros where there are fewer: keys as [16 keys][32 channels] -> [pairs][16][2]; values
// as [32 keys][16 columns] -> [16][16][2], in the order in which one instruction packs two vectors of weights: four of
// the first 16 keys, four of the next 16, and so on. Beside the channels of the values is a column of ones.
#pragma once

#include <stdint.h>

#include "parts.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define LDMQ_HAS_ATTENTION
#include <immintrin.h>

enum {
  SIDE = 16,            // rows of a tile, and its columns in float32
  PAIRED = 2 * SIDE,    // bfloat16 values of a tile's row
  TILE = SIDE * PAIRED  // bfloat16 values of a tile
};

typedef struct {
  const uint16_t *values;  // (batch, tokens, heads, channels), the channels of a head side by side
  int64_t batch, token, head;  // steps between them, in values
} Operand;

typedef struct {
  Operand query, key, value;
  int64_t batch, heads, queries, keys, channels;
  const float *maybe_mask;  // (batch, heads, queries, keys), the keys side by side
  int64_t mask_batch, mask_head, mask_query;
  float scale;
  uint16_t *packed;  // of each head, its keys and then its values
  uint16_t *out;     // (batch, queries, heads, channels)
} Attention;

static inline int64_t steps_of(int64_t count, int64_t step) { return (count + step - 1) / step; }
static inline int64_t column_tiles(const Attention *a) { return a->channels / SIDE + 1; }
static inline int64_t channel_tiles(const Attention *a) { return steps_of(a->channels, PAIRED); }
static inline int64_t key_steps(const Attention *a) { return steps_of(a->keys, PAIRED); }
static inline __mmask32 first_of(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1; }

static inline int64_t packed_keys(const Attention *a) { return 2 * key_steps(a) * channel_tiles(a) * TILE; }
static inline int64_t packed_head(const Attention *a) { return packed_keys(a) + key_steps(a) * column_tiles(a) * TILE; }

static inline const uint16_t *of_head(const Attention *a, const Operand *operand, int64_t head) {
  return operand->values + head / a->heads * operand->batch + head % a->heads * operand->head;
}

// Copies the keys and values of all heads; for ldmq_in_parts.
void ldmq_pack_part(const void *attention, int64_t part, int64_t parts);
#endif
