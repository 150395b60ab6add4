// GroupNorm, SiLU and quantization of NHWC images, in one launch of which all blocks run at once.
//
//   1. Statistics of groups, in units of parts of the pixels.
//   2. For a measured scale of a sample: a bound of every channel from its least and largest value.
//   3. Everything is read again, mostly from the second-level cache, normalized and quantized. Blocks walk
//      backwards, since what they read last is the likeliest to be there.
//
// The whole grid waits between these steps. What is quantized to int8 and to FP8 are files of their own, since their
// kernels are many.
#pragma once

#include <algorithm>

#include <ptx_sm80.cuh>

#include "group_norm.cuh"

namespace ldmq {

constexpr int kPixelValues = LDMQ_MAX_PIXEL_CHANNELS / kThreads;  // in the registers of a thread
constexpr int kBlocks = 2;             // of a multiprocessor, at least: their loads keep memory busy
constexpr float kDipAt = -1.2784645f;  // where SiLU is least
constexpr float kDip = 0.27846456f;    // and how far below zero

enum class Mode { kStatic, kPerSample, kPerToken };

__device__ __forceinline__ float silu(float y) { return __fdividef(y, 1.0f + __expf(-y)); }

template <typename T, int V>
__device__ __forceinline__ void normalize(float (&y)[V], const Pack<T, V>& in, const float (&mean)[V],
                                          const float (&multiplier)[V], const float (&shift)[V], bool with_silu) {
#pragma unroll
  for (int i = 0; i < V; ++i) y[i] = fmaf(to_float(in.value[i]) - mean[i], multiplier[i], shift[i]);
  if (!with_silu) return;
#pragma unroll
  for (int i = 0; i < V; ++i) y[i] = silu(y[i]);
}

// Step 2: a warp takes a channel of a sample. SiLU is largest at an end of a channel's range, or in its dip.
__device__ __forceinline__ void bound_channels(const Task& task) {
  const Plan& plan = task.plan;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  const int64_t all = static_cast<int64_t>(plan.samples) * plan.channels;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + warp_of_block(); i < all; i += warps) {
    const int channel = static_cast<int>(i % plan.channels);
    const Extremes* parts = plan.extremes + i * plan.parts;
    Extremes x = parts[min(lane_of_warp(), plan.parts - 1)];
    for (int part = lane_of_warp() + kLanes; part < plan.parts; part += kLanes) {
      x = {fminf(x.least, parts[part].least), fmaxf(x.largest, parts[part].largest)};
    }
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
      x.least = fminf(x.least, __shfl_xor_sync(kAllLanes, x.least, mask));
      x.largest = fmaxf(x.largest, __shfl_xor_sync(kAllLanes, x.largest, mask));
    }
    const Normal normal(task, merge_parts(task, static_cast<int>(i / plan.channels), channel / plan.group), channel);
    const float one = fmaf(x.least - normal.mean, normal.multiplier, normal.shift);
    const float other = fmaf(x.largest - normal.mean, normal.multiplier, normal.shift);
    uint32_t bound = max(magnitude(task.silu ? silu(one) : one), magnitude(task.silu ? silu(other) : other));
    if (task.silu && fminf(one, other) < kDipAt && fmaxf(one, other) > kDipAt) {
      bound = max(bound, __float_as_uint(kDip));
    }
    float factor[1];
    task.factors.load(factor, channel);
    if (lane_of_warp() == 0) plan.bounds[i] = magnitude(__fmul_rn(__uint_as_float(bound), factor[0]));
  }
}

// Step 3 with one scale for all, or one for each sample.
template <typename T, typename Q, int V, Mode kMode>
__device__ __forceinline__ void quantize_unit(const T* __restrict__ x, const Task& task, const Unit& unit,
                                              char* shared) {
  const Plan& plan = task.plan;
  auto* largest_of_warp = reinterpret_cast<uint32_t*>(shared);
  auto* statistics = reinterpret_cast<Statistics*>(largest_of_warp + kWarps);
  for (int i = warp_of_block(); i < unit.groups; i += kWarps) {
    const Statistics merged = merge_parts(task, unit.sample, unit.first_group + i);
    if (lane_of_warp() == 0) statistics[i] = merged;
  }
  float inverse = 1.0f;
  if constexpr (kMode == Mode::kPerSample) {
    const uint32_t* bounds = plan.bounds + static_cast<int64_t>(unit.sample) * plan.channels;
    uint32_t largest = 0;
    for (int i = static_cast<int>(threadIdx.x); i < plan.channels; i += kThreads) largest = max(largest, bounds[i]);
    const float scale = measured_scale<Q>(row_maximum(largest, kWarps, largest_of_warp));
    inverse = __fdiv_rn(1.0f, scale);
    if (unit.part == 0 && unit.first_group == 0 && threadIdx.x == 0) task.scale[unit.sample] = scale;
  }
  __syncthreads();
  const int pixels = plan.pixels_of(unit.part);
  const int end = (unit.first_group + unit.groups) * plan.group;
  const int64_t first_pixel = static_cast<int64_t>(unit.sample) * plan.pixels + unit.part * plan.part_pixels;
  for (int first = unit.first_group * plan.group; first < end; first += kThreads * V) {
    const Lanes<V> lanes(first, end, pixels);
    if (lanes.count == 0) continue;
    float mean[V], multiplier[V], shift[V], factor[V];
    task.factors.load(factor, lanes.channel);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int channel = lanes.channel + i;
      const Normal normal(task, statistics[channel / plan.group - unit.first_group], channel);
      mean[i] = normal.mean, multiplier[i] = normal.multiplier, shift[i] = normal.shift;
    }
    const int64_t last_pixel = first_pixel + lanes.row + static_cast<int64_t>(lanes.count - 1) * lanes.rows;
    for_rows<T, V>(x, last_pixel * plan.channels + lanes.channel, -static_cast<int64_t>(lanes.rows) * plan.channels,
                   lanes.count, [&](const Pack<T, V>& in, int64_t at) {
                     float y[V];
                     normalize(y, in, mean, multiplier, shift, task.silu);
                     multiply(y, factor);
                     store_quantized(y, inverse, static_cast<Q*>(task.q) + at);
                   });
  }
  __syncthreads();
}

// Warps that hold a pixel.
__host__ __device__ __forceinline__ int pixel_warps(int channels) {
  return (channels + kLanes * kPixelValues - 1) / (kLanes * kPixelValues);
}

// Step 3 with a scale for each pixel: warps hold a whole one in their registers.
template <typename T, typename Q, int V>
__device__ __forceinline__ void quantize_pixels(const T* __restrict__ x, const Task& task, char* shared) {
  constexpr int kRuns = kPixelValues / V;
  const Plan& plan = task.plan;
  const int channels = plan.channels;
  auto* largest_of_warp = reinterpret_cast<uint32_t*>(shared);
  float* means = reinterpret_cast<float*>(largest_of_warp + kWarps);
  float* multipliers = means + channels;
  float* shifts = multipliers + channels;
  float* factors = shifts + channels;
  const int warps_per_row = pixel_warps(channels), row_threads = warps_per_row * kLanes;
  const int rows = kWarps / warps_per_row, row = warp_of_block() / warps_per_row;
  int lane = static_cast<int>(threadIdx.x) % row_threads;
  const int64_t sample_tiles = (plan.pixels + rows - 1) / rows, tiles = plan.samples * sample_tiles;
  int current = -1;
  for (int64_t tile = tiles * blockIdx.x / gridDim.x; tile < tiles * (blockIdx.x + 1) / gridDim.x; ++tile) {
    const int sample = static_cast<int>(tile / sample_tiles);
    if (sample != current) {
      __syncthreads();
      for (int group = warp_of_block(); group < plan.groups; group += kWarps) {
        const Statistics statistics = merge_parts(task, sample, group);
        for (int channel = group * plan.group + lane_of_warp(); channel < (group + 1) * plan.group; channel += kLanes) {
          const Normal normal(task, statistics, channel);
          float factor[1];
          task.factors.load(factor, channel);
          means[channel] = normal.mean, multipliers[channel] = normal.multiplier;
          shifts[channel] = normal.shift, factors[channel] = factor[0];
        }
      }
      __syncthreads();
      current = sample;
    }
    const int64_t in_sample = tile % sample_tiles * rows + row;
    const int64_t pixel = static_cast<int64_t>(sample) * plan.pixels + in_sample;
    const int end = row < rows && in_sample < plan.pixels ? channels : 0;
    asm volatile("" : "+r"(lane));  // else the addresses of all runs stay in registers, which are too few
    Pack<T, V> in[kRuns];
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int channel = (run * row_threads + lane) * V;
      if (channel < end) in[run] = *reinterpret_cast<const Pack<T, V>*>(x + pixel * channels + channel);
    }
    float y[kRuns][V];
    uint32_t largest = 0;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int channel = (run * row_threads + lane) * V;
      if (channel >= end) break;
      float mean[V], multiplier[V], shift[V], factor[V];
      load_run(mean, means + channel);
      load_run(multiplier, multipliers + channel);
      load_run(shift, shifts + channel);
      load_run(factor, factors + channel);
      normalize(y[run], in[run], mean, multiplier, shift, task.silu);
      multiply(y[run], factor);
#pragma unroll
      for (int i = 0; i < V; ++i) largest = max(largest, magnitude(y[run][i]));
    }
    const float scale = measured_scale<Q>(row_maximum(largest, warps_per_row, largest_of_warp));
    const float inverse = __fdiv_rn(1.0f, scale);
    if (lane == 0 && end > 0) task.scale[pixel] = scale;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int channel = (run * row_threads + lane) * V;
      if (channel >= end) break;
      store_quantized(y[run], inverse, static_cast<Q*>(task.q) + pixel * channels + channel);
    }
  }
}

template <typename T, typename Q, int V, Mode kMode>
__global__ void __launch_bounds__(kThreads, kBlocks) group_norm_kernel(const T* __restrict__ x, const Task task) {
  char* shared = shared_memory();
  for (int64_t index = blockIdx.x; index < task.plan.units; index += gridDim.x) {
    take_statistics<T, V, kMode == Mode::kPerSample>(x, task.plan, Unit(task.plan, index),
                                                     reinterpret_cast<float*>(shared));
  }
  grid_sync();
  if constexpr (kMode == Mode::kPerSample) {
    bound_channels(task);
    grid_sync();
  }
  if constexpr (kMode == Mode::kPerToken) {
    quantize_pixels<T, Q, V>(x, task, shared);
  } else {
    for (int64_t index = blockIdx.x; index < task.plan.units; index += gridDim.x) {
      quantize_unit<T, Q, V, kMode>(x, task, Unit(task.plan, index), shared);
    }
  }
}

inline size_t shared_bytes(const Plan& plan, Mode mode, int width) {
  const size_t largest_of_warp = kWarps * sizeof(uint32_t);
  const size_t first = (mode == Mode::kPerSample ? 4 : 2) * sizeof(float) * kThreads * width;
  const size_t last =
      mode == Mode::kPerToken ? 4 * sizeof(float) * plan.channels : sizeof(Statistics) * plan.chunk_groups;
  return std::max(first, largest_of_warp + last);
}

template <typename T, typename Q, int V, Mode kMode>
cudaError_t launch_all(const T* x, const Task& task, int multiprocessors, void* stream) {
  const Plan& plan = task.plan;
  const auto kernel = group_norm_kernel<T, Q, V, kMode>;
  Shape shape{dim3(), kThreads, shared_bytes(plan, kMode, V)};
  shape.cooperative = true;
  cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(kernel), shape.shared_bytes);
  if (error != cudaSuccess) return error;  // what fits depends on it
  int fit = 0;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, kThreads, shape.shared_bytes);
  if (error != cudaSuccess) return error;
  int64_t wanted = plan.units;
  if (kMode == Mode::kPerToken) {
    const int rows = kWarps / pixel_warps(plan.channels);
    wanted = std::max(wanted, ceil_div(static_cast<int64_t>(plan.samples) * plan.pixels, rows));
  }
  shape.grid = dim3(static_cast<unsigned>(std::min<int64_t>(wanted, fit * multiprocessors)));
  return launch(kernel, shape, Stream{stream, false}, x, task);
}

// The launch for a task that is quantized to Q.
template <typename Q>
cudaError_t launch_group_norm(const ldmq_group_norm& norm, const Task& task, Mode mode, int multiprocessors,
                              void* stream) {
  return with_type(norm.x, norm.dtype, norm.to, norm.channels, [&](auto* x, auto width) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
    constexpr int V = decltype(width)::value;
    if (mode == Mode::kStatic) return launch_all<T, Q, V, Mode::kStatic>(x, task, multiprocessors, stream);
    if (mode == Mode::kPerToken) return launch_all<T, Q, V, Mode::kPerToken>(x, task, multiprocessors, stream);
    return launch_all<T, Q, V, Mode::kPerSample>(x, task, multiprocessors, stream);
  });
}

cudaError_t group_norm_to_int8(const ldmq_group_norm& norm, const Task& task, Mode mode, int multiprocessors,
                               void* stream);
cudaError_t group_norm_to_fp8(const ldmq_group_norm& norm, const Task& task, Mode mode, int multiprocessors,
                              void* stream);

}  // namespace ldmq
