// H (x * factors) over the channels of each row, in one pass over memory; the bits of `numerics/hadamard.py`, which adds
// in the same order.
#include "epilogue.h"
#include "parts.h"

enum { LARGEST_BLOCK = 32 };

typedef struct {
  const void *x;  // float32, or bfloat16 where the flag says so
  int64_t is_bfloat16;
  int64_t rows, channels, block;  // channels that are rotated together, a power of two
  const float *factors;           // one for each channel, the signs among them
  float *out;
} Rotated;

typedef float Half __attribute__((vector_size(64)));  // of a block of 32
typedef int32_t Places __attribute__((vector_size(64)));

#ifdef __clang__
#define SHUFFLED(VALUES, ...) __builtin_shufflevector(VALUES, VALUES, __VA_ARGS__)
#else
#define SHUFFLED(VALUES, ...) __builtin_shuffle(VALUES, (Places){__VA_ARGS__})
#endif

static const Places PLACE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Sums of values whose places differ by `distance`, and their differences in the places that have it.
static inline Half with_others(Half values, Half others, int32_t distance) {
  const Places signs = ((PLACE & distance) != 0) & INT32_MIN;
  return others + (Half)((Places)values ^ signs);
}

static inline Half within_half(Half v) {
  v = with_others(v, SHUFFLED(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14), 1);
  v = with_others(v, SHUFFLED(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13), 2);
  v = with_others(v, SHUFFLED(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11), 4);
  return with_others(v, SHUFFLED(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7), 8);
}

// The values of a block times their factors.
static inline void load_block(const Rotated *task, int64_t at, int64_t channel, int64_t size, float *restrict values) {
  const float *factors = task->factors + channel;
  if (task->is_bfloat16) {
    const uint16_t *x = (const uint16_t *)task->x + at;
    for (int64_t i = 0; i < size; ++i) values[i] = one_widened(x + i) * factors[i];
  } else {
    const float *x = (const float *)task->x + at;
    for (int64_t i = 0; i < size; ++i) values[i] = x[i] * factors[i];
  }
}

static inline void rotate_largest(float *values) {
  Half halves[2];
  memcpy(halves, values, sizeof halves);
  const Half first = within_half(halves[0]), second = within_half(halves[1]);
  const Half rotated[2] = {first + second, first - second};
  memcpy(values, rotated, sizeof rotated);
}

static inline void rotate_smaller(float *values, int64_t size) {
  for (int64_t distance = 1; distance < size; distance *= 2) {
    for (int64_t i = 0; i < size; ++i) {
      if (i & distance) continue;
      const float one = values[i], other = values[i + distance];
      values[i] = one + other;
      values[i + distance] = one - other;
    }
  }
}

static void rotate_part(const void *given, int64_t part, int64_t parts) {
  const Rotated *task = given;
  for (int64_t row = task->rows * part / parts; row < task->rows * (part + 1) / parts; ++row) {
    for (int64_t c = 0; c < task->channels; c += task->block) {
      const int64_t at = row * task->channels + c;
      float values[LARGEST_BLOCK];
      if (task->block == LARGEST_BLOCK) {
        load_block(task, at, c, LARGEST_BLOCK, values);
        rotate_largest(values);
      } else {
        load_block(task, at, c, task->block, values);
        rotate_smaller(values, task->block);
      }
      memcpy(task->out + at, values, (size_t)task->block * sizeof *values);
    }
  }
}

int ldmq_rotate(const Rotated *task, int64_t threads) {
  ldmq_in_parts(rotate_part, task, threads, threads);
  return 0;
}
