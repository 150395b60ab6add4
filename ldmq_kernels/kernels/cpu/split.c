// float32 as bfloat16 values that add up to it: of each row the rounded ones, the rest, and the rounded ones again, so
// that with a weight's (rounded, rounded, rest) one product has all terms but the rest of a rest.
#include "parts.h"
#include "producers.h"

typedef struct {
  const float *x;
  int64_t rows, channels;
  uint16_t *out;  // (rows, 3, channels)
  int64_t is_weight;
} Split;

static inline uint16_t rounded(float value) {
  const uint32_t bits = bits_of(value), is_nan = (bits & 0x7fffffff) > 0x7f800000;
  return is_nan ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void split_part(const void *given, int64_t part, int64_t parts) {
  const Split *task = given;
  const int64_t channels = task->channels, repeated = task->is_weight ? 1 : 2, rest = task->is_weight ? 2 : 1;
  for (int64_t row = task->rows * part / parts; row < task->rows * (part + 1) / parts; ++row) {
    const float *restrict x = task->x + row * channels;
    uint16_t *restrict first = task->out + 3 * row * channels;
    uint16_t *restrict again = first + repeated * channels, *restrict last = first + rest * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const uint16_t high = rounded(x[c]);
      first[c] = again[c] = high;
      last[c] = rounded(x[c] - widened(high));
    }
  }
}

int ldmq_split(const Split *task, int64_t threads) {
  ldmq_in_parts(split_part, task, threads, threads);
  return DONE;
}
