// The statistics of a group normalization of NHWC images, for a grid whose blocks all run at once.
//
// The work is cut into units: a part of the pixels, of a chunk of the channels, of a sample. A block finds mean and M2
// (the sum of squared distances from the mean) of every group in its units, value by value as by Welford, merged as by
// Chan, Golub and LeVeque (1983): never as a difference of two large sums. Parts are merged in one order, with no
// atomics: all runs are equal.
#pragma once

#include "producers.cuh"

namespace ldmq {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kRowsAhead = 4;  // of a thread: loads that are under way together

struct Moments {
  float mean, rest, m2;  // rest: what float32 cuts off from a mean
};
struct alignas(8) Extremes {
  float least, largest;
};

// How the work is cut, and where what blocks tell each other lies in the scratch memory.
struct Plan {
  int samples, pixels, channels, groups, group;  // group: its channels
  int chunk_groups, chunks, parts, part_pixels;
  int64_t units;
  Moments* moments;    // (samples, groups, parts)
  Extremes* extremes;  // (samples, channels, parts)
  uint32_t* bounds;    // (samples, channels): bits of a magnitude

  __host__ __device__ __forceinline__ int pixels_of(int part) const {
    return min(part_pixels, pixels - part * part_pixels);
  }
};

struct Task {
  Plan plan;
  ldmq_added weight, bias;
  Factors factors;
  float eps;
  bool silu;
  void* q;
  float* scale;
};

struct Unit {
  int sample, part, first_group, groups;

  __device__ __forceinline__ Unit(const Plan& plan, int64_t index) {
    part = static_cast<int>(index % plan.parts);
    const int64_t chunk = index / plan.parts;
    first_group = static_cast<int>(chunk % plan.chunks) * plan.chunk_groups;
    groups = min(plan.chunk_groups, plan.groups - first_group);
    sample = static_cast<int>(chunk / plan.chunks);
  }
};

// Threads over some of a unit's channels, in runs of V, and over its rows: the pixels.
template <int V>
struct Lanes {
  int first, width;  // channels
  int rows, row, channel, count;

  __device__ __forceinline__ Lanes(int first, int end, int pixels) : first(first) {
    width = min(kThreads * V, end - first);
    const int columns = width / V;
    rows = kThreads / columns;
    row = static_cast<int>(threadIdx.x) / columns;
    channel = first + static_cast<int>(threadIdx.x) % columns * V;
    count = row < rows ? rows_of(row, pixels) : 0;
  }
  // Pixels of the thread that stands in this row.
  __device__ __forceinline__ int rows_of(int row, int pixels) const { return (pixels - row + rows - 1) / rows; }
};

__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x) % kLanes; }
__device__ __forceinline__ int warp_of_block() { return static_cast<int>(threadIdx.x) / kLanes; }

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
  return value;
}

// `count` packs, `step` elements apart, each handed to `body` with its place.
template <typename T, int V, typename Body>
__device__ __forceinline__ void for_rows(const T* __restrict__ x, int64_t at, int64_t step, int count, Body body) {
  using In = Pack<T, V>;
  for (; count >= kRowsAhead; count -= kRowsAhead) {
    In in[kRowsAhead];
#pragma unroll
    for (int i = 0; i < kRowsAhead; ++i) in[i] = *reinterpret_cast<const In*>(x + at + i * step);
#pragma unroll
    for (int i = 0; i < kRowsAhead; ++i) body(in[i], at + i * step);
    at += kRowsAhead * step;
  }
#pragma unroll 1
  for (; count > 0; --count, at += step) {
    const In in = *reinterpret_cast<const In*>(x + at);
    body(in, at);
  }
}

// Of `count` values and of those before them in the same group.
__device__ __forceinline__ Moments merged(const Moments& before, float before_count, const Moments& more, float count) {
  const float distance = more.mean - before.mean + (more.rest - before.rest);
  const float share = __fdiv_rn(count, before_count + count);
  return {before.mean, fmaf(distance, share, before.rest),
          before.m2 + fmaf(distance * distance, before_count * share, more.m2)};
}

// Step 1 of a unit. `shared` takes two or four floats for each channel of each row of threads.
template <typename T, int V, bool kExtremes>
__device__ __forceinline__ void take_statistics(const T* __restrict__ x, const Plan& plan, const Unit& unit,
                                                float* shared) {
  constexpr int kPlane = kThreads * V;
  const int pixels = plan.pixels_of(unit.part);
  const int end = (unit.first_group + unit.groups) * plan.group;
  const int64_t first_pixel = static_cast<int64_t>(unit.sample) * plan.pixels + unit.part * plan.part_pixels;
  for (int first = unit.first_group * plan.group; first < end; first += kPlane) {
    const Lanes<V> lanes(first, end, pixels);
    float mean[V], m2[V], least[V], largest[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      mean[i] = m2[i] = 0.0f;
      least[i] = __uint_as_float(0x7f800000u);
      largest[i] = -least[i];
    }
    float taken = 0.0f;
    const int64_t at = (first_pixel + lanes.row) * plan.channels + lanes.channel;
    for_rows<T, V>(x, at, static_cast<int64_t>(lanes.rows) * plan.channels, lanes.count,
                   [&](const Pack<T, V>& in, int64_t) {
                     taken += 1.0f;
                     const float share = __fdividef(1.0f, taken);
#pragma unroll
                     for (int i = 0; i < V; ++i) {
                       const float value = to_float(in.value[i]), distance = value - mean[i];
                       mean[i] = fmaf(distance, share, mean[i]);
                       m2[i] = fmaf(distance, value - mean[i], m2[i]);
                       if constexpr (kExtremes) {
                         least[i] = fminf(least[i], value);
                         largest[i] = fmaxf(largest[i], value);
                       }
                     }
                   });
    if (lanes.row < lanes.rows) {
      float* to = shared + lanes.row * lanes.width + lanes.channel - first;
      store_run(mean, to);
      store_run(m2, to + kPlane);
      if constexpr (kExtremes) {
        store_run(least, to + 2 * kPlane);
        store_run(largest, to + 3 * kPlane);
      }
    }
    __syncthreads();
    for (int i = warp_of_block(); i < unit.groups; i += kWarps) {
      const int group = unit.first_group + i, group_first = group * plan.group;
      const int begin = max(first, group_first), span = min(first + lanes.width, group_first + plan.group) - begin;
      if (span <= 0) continue;
      float sum = 0.0f;
      for (int j = lane_of_warp(); j < lanes.rows * span; j += kLanes) {
        const float count = __int2float_rn(lanes.rows_of(j / span, pixels));
        sum = fmaf(count, shared[j / span * lanes.width + begin - first + j % span], sum);
      }
      const float count = __int2float_rn(pixels) * __int2float_rn(span);
      Moments moments = {__fdiv_rn(sum_of_warp(sum), count), 0.0f, 0.0f};
      for (int j = lane_of_warp(); j < lanes.rows * span; j += kLanes) {
        const float* from = shared + j / span * lanes.width + begin - first + j % span;
        const float weighted = __int2float_rn(lanes.rows_of(j / span, pixels)) * (from[0] - moments.mean);
        moments.rest += weighted;
        moments.m2 += fmaf(weighted, from[0] - moments.mean, from[kPlane]);
      }
      moments.rest = __fdiv_rn(sum_of_warp(moments.rest), count);
      moments.m2 = fmaf(-count * moments.rest, moments.rest, sum_of_warp(moments.m2));
      if (lane_of_warp() == 0) {
        Moments& to = plan.moments[(static_cast<int64_t>(unit.sample) * plan.groups + group) * plan.parts + unit.part];
        const float before = __int2float_rn(pixels) * __int2float_rn(begin - group_first);
        to = begin > group_first ? merged(to, before, moments, count) : moments;
      }
    }
    if constexpr (kExtremes) {
      for (int i = static_cast<int>(threadIdx.x); i < lanes.width; i += kThreads) {
        Extremes found = {shared[2 * kPlane + i], shared[3 * kPlane + i]};
        for (int row = 1; row < lanes.rows; ++row) {
          found.least = fminf(found.least, shared[2 * kPlane + row * lanes.width + i]);
          found.largest = fmaxf(found.largest, shared[3 * kPlane + row * lanes.width + i]);
        }
        plan.extremes[(static_cast<int64_t>(unit.sample) * plan.channels + first + i) * plan.parts + unit.part] = found;
      }
    }
    __syncthreads();
  }
}

// Of a group of a sample; inverse: 1 / sqrt(variance + eps).
struct Statistics {
  float mean, rest, inverse;
};

// The parts of a group merged, by a warp.
__device__ __forceinline__ Statistics merge_parts(const Task& task, int sample, int group) {
  const Plan& plan = task.plan;
  const Moments* parts = plan.moments + (static_cast<int64_t>(sample) * plan.groups + group) * plan.parts;
  const float pixels = __int2float_rn(plan.pixels), channels = __int2float_rn(plan.group);
  float sum = 0.0f;
  for (int i = lane_of_warp(); i < plan.parts; i += kLanes) {
    sum = fmaf(__int2float_rn(plan.pixels_of(i)), parts[i].mean, sum);
  }
  const float mean = __fdiv_rn(sum_of_warp(sum), pixels);
  float rest = 0.0f, m2 = 0.0f;
  for (int i = lane_of_warp(); i < plan.parts; i += kLanes) {
    const float count = __int2float_rn(plan.pixels_of(i)), distance = parts[i].mean - mean + parts[i].rest;
    rest = fmaf(count, distance, rest);
    m2 += fmaf(count * channels * distance, distance, parts[i].m2);
  }
  rest = __fdiv_rn(sum_of_warp(rest), pixels);
  const float variance = fmaf(-rest, rest, __fdiv_rn(sum_of_warp(m2), pixels * channels));
  return {mean, rest, __fdiv_rn(1.0f, __fsqrt_rn(fmaxf(variance, 0.0f) + task.eps))};
}

__device__ __forceinline__ float load_floating(const ldmq_added& vector, int channel, float otherwise) {
  if (!vector.data) return otherwise;
  if (vector.dtype == LDMQ_FLOAT32) return static_cast<const float*>(vector.data)[channel];
  if (vector.dtype == LDMQ_FLOAT16) return to_float(static_cast<const __half*>(vector.data)[channel]);
  return to_float(static_cast<const __nv_bfloat16*>(vector.data)[channel]);
}

// How a channel is normalized: fma(x - mean, multiplier, shift).
struct Normal {
  float mean, multiplier, shift;

  __device__ __forceinline__ Normal(const Task& task, const Statistics& statistics, int channel)
      : mean(statistics.mean),
        multiplier(statistics.inverse * load_floating(task.weight, channel, 1.0f)),
        shift(fmaf(-statistics.rest, multiplier, load_floating(task.bias, channel, 0.0f))) {}
};

}  // namespace ldmq
