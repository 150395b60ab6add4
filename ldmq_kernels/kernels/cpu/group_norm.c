// q = quantize(silu(group_norm(x))) for pictures with their channels last, in two passes over memory: sums, results.
//
// Sums are in an order that the shape alone gives, so that a picture has the same bits in any batch, by any number of
// threads. See producers.h.

#include <math.h>

#include "parts.h"
#include "producers.h"

// One of several small operands, float32, or bfloat16 where a flag says so.
static inline float element_of(const void *values, int is_bfloat16, int64_t at) {
  return is_bfloat16 ? widened(((const uint16_t *)values)[at]) : ((const float *)values)[at];
}

typedef struct {
  const void *x;  // (samples, pixels, channels)
  int64_t is_bfloat16;
  int64_t samples, pixels, channels, groups;
  const void *maybe_weight, *maybe_bias;
  int64_t are_bfloat16;  // both of them
  double eps;
  int64_t with_silu, per_token;
  Quantization by;
  int64_t chunk, chunks;  // pixels of a chunk of a sample, whose sums are its own, and how many there are in a sample
  double *sums;           // (samples, chunks, 2, groups): of the values, of their squares
  float *extremes;        // (samples, chunks, 2, channels): the least and the largest, for a sample's own scale
  int *status;
} GroupNorm;

enum { CHUNK_ELEMENTS = 32768, CHUNK_PIXELS = 32, TOGETHER = 4 };

static int is_measured_by_sample(const GroupNorm *task) { return task->by.maybe_scale && !task->per_token; }

static inline void sum_pixels(const float *restrict pixels, int64_t count, int64_t channels, double *restrict sum,
                              double *restrict squares) {
  if (count == TOGETHER) {
    const float *restrict second = pixels + channels, *restrict third = second + channels;
    const float *restrict fourth = third + channels;
    for (int64_t c = 0; c < channels; ++c) {
      const double a = pixels[c], b = second[c], d = third[c], e = fourth[c];
      sum[c] += (a + b) + (d + e);
      squares[c] += (a * a + b * b) + (d * d + e * e);
    }
    return;
  }
  for (int64_t pixel = 0; pixel < count; ++pixel) {
    for (int64_t c = 0; c < channels; ++c) {
      const double value = pixels[pixel * channels + c];
      sum[c] += value;
      squares[c] += value * value;
    }
  }
}

static inline void find_extremes(const float *restrict pixels, int64_t count, int64_t channels, int is_first,
                                 float *restrict low, float *restrict high) {
  if (is_first) {
    memcpy(low, pixels, (size_t)channels * sizeof(float));
    memcpy(high, pixels, (size_t)channels * sizeof(float));
  }
  for (int64_t pixel = is_first; pixel < count; ++pixel) {
    for (int64_t c = 0; c < channels; ++c) {
      const float value = pixels[pixel * channels + c];
      low[c] = value < low[c] ? value : low[c];
      high[c] = value > high[c] ? value : high[c];
    }
  }
}

// Sums of a chunk. Double precision holds squares of float32 exactly: their sum less the square of the mean keeps the
// digits of a small variance about a large mean.
static void sum_chunk(const GroupNorm *task, int64_t sample, int64_t chunk, float *restrict pixels,
                      double *restrict sum, double *restrict squares) {
  const int64_t channels = task->channels, first = chunk * task->chunk;
  const int64_t end = first + task->chunk < task->pixels ? first + task->chunk : task->pixels;
  const int64_t at = sample * task->chunks + chunk;
  float *restrict low = task->extremes + at * 2 * channels, *restrict high = low + channels;
  for (int64_t c = 0; c < channels; ++c) sum[c] = squares[c] = 0;
  for (int64_t p = first; p < end; p += TOGETHER) {
    const int64_t count = end - p < TOGETHER ? end - p : TOGETHER;
    widen(task->x, task->is_bfloat16, (sample * task->pixels + p) * channels, count * channels, pixels);
    sum_pixels(pixels, count, channels, sum, squares);
    if (is_measured_by_sample(task)) find_extremes(pixels, count, channels, p == first, low, high);
  }
  double *of_groups = task->sums + at * 2 * task->groups;
  const int64_t width = channels / task->groups;
  for (int64_t g = 0; g < task->groups; ++g) {
    double total = 0, total_squares = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      total += sum[c];
      total_squares += squares[c];
    }
    of_groups[g] = total;
    of_groups[task->groups + g] = total_squares;
  }
}

typedef struct {
  float *pixels;                              // TOGETHER of them
  float *mean, *factor, *shift, *low, *high;  // (channels,) each
  double *sum, *squares;
} Scratch;

// What is taken from a sample's values in each channel, what the rest is multiplied with, and what is added.
static void affine_of_sample(const GroupNorm *task, int64_t sample, const Scratch *own) {
  const int64_t width = task->channels / task->groups;
  const double count = (double)(task->pixels * width);
  for (int64_t g = 0; g < task->groups; ++g) {
    double sum = 0, squares = 0;
    for (int64_t chunk = 0; chunk < task->chunks; ++chunk) {
      const double *of_groups = task->sums + (sample * task->chunks + chunk) * 2 * task->groups;
      sum += of_groups[g];
      squares += of_groups[task->groups + g];
    }
    const double mean = sum / count, variance = squares / count - mean * mean;
    const double inverse = 1.0 / sqrt((variance < 0 ? 0 : variance) + task->eps);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      const double weight = task->maybe_weight ? element_of(task->maybe_weight, task->are_bfloat16, c) : 1;
      own->mean[c] = (float)mean;
      own->factor[c] = (float)(inverse * weight);
      own->shift[c] = task->maybe_bias ? element_of(task->maybe_bias, task->are_bfloat16, c) : 0;
    }
  }
}

// The scale of a sample from what its channels' extremes allow, as the op's definition has it.
static float scale_of_sample(const GroupNorm *task, int64_t sample, const Scratch *own) {
  const float dip_at = -1.2784645f, dip = 0.27846456f;  // where SiLU is least, and how far below zero
  const int64_t channels = task->channels;
  const float *restrict mean = own->mean, *restrict factor = own->factor, *restrict shift = own->shift;
  float *restrict low = own->low, *restrict high = own->high;
  for (int64_t chunk = 0; chunk < task->chunks; ++chunk) {
    const float *restrict lowest = task->extremes + (sample * task->chunks + chunk) * 2 * channels;
    const float *restrict highest = lowest + channels;
    if (chunk == 0) memcpy(low, lowest, (size_t)channels * sizeof(float));
    if (chunk == 0) memcpy(high, highest, (size_t)channels * sizeof(float));
    for (int64_t c = 0; c < channels; ++c) {
      low[c] = lowest[c] < low[c] ? lowest[c] : low[c];
      high[c] = highest[c] > high[c] ? highest[c] : high[c];
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    const float one = fused(low[c] - mean[c], factor[c], shift[c]);
    const float other = fused(high[c] - mean[c], factor[c], shift[c]);
    const int has_dip = task->with_silu && ((one < dip_at) != (other < dip_at));
    const float bounds[2] = {task->with_silu ? silu(one) : one, task->with_silu ? silu(other) : other};
    const float bound = of_bits(largest_of_row(bounds, 2));
    low[c] = has_dip && bound < dip ? dip : bound;
  }
  multiply_row(&task->by, channels, low);
  return scale_of(largest_of_row(low, channels));
}

static int has_scratch(const GroupNorm *task, Scratch *own) {
  const size_t channels = (size_t)task->channels;
  own->sum = malloc(channels * (2 * sizeof(double) + (5 + TOGETHER) * sizeof(float)));
  if (!own->sum) {
    tell(task->status, NO_MEMORY);
    return 0;
  }
  own->squares = own->sum + channels;
  own->pixels = (float *)(own->squares + channels);
  own->mean = own->pixels + TOGETHER * channels;
  own->factor = own->mean + channels;
  own->shift = own->factor + channels;
  own->low = own->shift + channels;
  own->high = own->low + channels;
  return 1;
}

// What the chunks of a sample share, once all of them are summed; the sample's own scale, if it has one.
static float prepare_sample(const GroupNorm *task, int64_t sample, Scratch *own) {
  affine_of_sample(task, sample, own);
  return is_measured_by_sample(task) ? scale_of_sample(task, sample, own) : 1.0f;
}

static int finish_chunk(const GroupNorm *task, int64_t sample, int64_t chunk, float scale, const Scratch *own) {
  const int64_t channels = task->channels, first = chunk * task->chunk;
  const int64_t end = first + task->chunk < task->pixels ? first + task->chunk : task->pixels;
  float *restrict y = own->pixels;
  const float *restrict mean = own->mean, *restrict factor = own->factor, *restrict shift = own->shift;
  int found = DONE;
  for (int64_t p = first; p < end; ++p) {
    const int64_t row = sample * task->pixels + p;
    widen(task->x, task->is_bfloat16, row * channels, channels, y);
    if (task->with_silu) {
      for (int64_t c = 0; c < channels; ++c) y[c] = silu(fused(y[c] - mean[c], factor[c], shift[c]));
    } else {
      for (int64_t c = 0; c < channels; ++c) y[c] = fused(y[c] - mean[c], factor[c], shift[c]);
    }
    if (is_measured_by_sample(task)) {
      multiply_row(&task->by, channels, y);
      round_measured(y, 1.0f / scale, channels, task->by.q + row * channels);
    } else {
      found |= quantize_row(&task->by, row, channels, y);
    }
  }
  if (is_measured_by_sample(task) && chunk == 0) task->by.maybe_scale[sample] = scale;
  return found;
}

static void sum_part(const void *given, int64_t part, int64_t parts) {
  const GroupNorm *task = given;
  const int64_t units = task->samples * task->chunks;
  Scratch own;
  if (!has_scratch(task, &own)) return;
  for (int64_t unit = units * part / parts; unit < units * (part + 1) / parts; ++unit) {
    sum_chunk(task, unit / task->chunks, unit % task->chunks, own.pixels, own.sum, own.squares);
  }
  free(own.sum);
}

static void finish_part(const void *given, int64_t part, int64_t parts) {
  const GroupNorm *task = given;
  const int64_t units = task->samples * task->chunks;
  Scratch own;
  if (*task->status & NO_MEMORY || !has_scratch(task, &own)) return;
  float scale = 1.0f;
  int found = DONE;
  for (int64_t unit = units * part / parts, before = -1; unit < units * (part + 1) / parts; ++unit) {
    const int64_t sample = unit / task->chunks;
    if (sample != before) scale = prepare_sample(task, sample, &own);
    found |= finish_chunk(task, sample, unit % task->chunks, scale, &own);
    before = sample;
  }
  tell(task->status, found);
  free(own.sum);
}

static void whole_samples(const void *given, int64_t part, int64_t parts) {
  const GroupNorm *task = given;
  Scratch own;
  if (!has_scratch(task, &own)) return;
  int found = DONE;
  for (int64_t sample = task->samples * part / parts; sample < task->samples * (part + 1) / parts; ++sample) {
    for (int64_t chunk = 0; chunk < task->chunks; ++chunk) {
      sum_chunk(task, sample, chunk, own.pixels, own.sum, own.squares);
    }
    const float scale = prepare_sample(task, sample, &own);
    for (int64_t chunk = task->chunks; chunk--;) found |= finish_chunk(task, sample, chunk, scale, &own);  // cached last
  }
  tell(task->status, found);
  free(own.sum);
}

// Quantize group_norm(x), or its SiLU, by a calibrated scale; or where there is `maybe_scale` by that of each pixel, or
// of each sample, which is written.
int ldmq_group_norm_quantize(const GroupNorm *asked, int64_t threads) {
  TASK_OF(GroupNorm, asked, chunk);
  int status = DONE;
  task.status = &status;
  const int64_t samples = task.samples, channels = task.channels, groups = task.groups;
  const int64_t wanted = CHUNK_ELEMENTS / channels;
  task.chunk = wanted < CHUNK_PIXELS ? CHUNK_PIXELS : wanted;
  task.chunks = (task.pixels + task.chunk - 1) / task.chunk;
  const int64_t extremes = is_measured_by_sample(&task) ? 2 * channels : 0;
  const size_t each = 2 * (size_t)groups * sizeof(double) + (size_t)extremes * sizeof(float);
  task.sums = malloc((size_t)(samples * task.chunks) * each);
  if (!task.sums) return NO_MEMORY;
  task.extremes = (float *)(task.sums + samples * task.chunks * 2 * groups);
  if (samples % threads == 0) {
    ldmq_in_parts(whole_samples, &task, threads, threads);
  } else {
    ldmq_in_parts(sum_part, &task, threads, threads);
    ldmq_in_parts(finish_part, &task, threads, threads);
  }
  free(task.sums);
  return status;
}
