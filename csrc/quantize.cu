// float -> int8 or FP8, bit for bit as the reference backend.
//
//   static:  q = clamp(rint(fp32(x) * r[c]), -127, 127)
//   dynamic: y = fp32(x) * m[c];  scale = max(absmax(y), floor) / 127;  q = clamp(rint(y * (1 / scale)), -127, 127)
//
// In FP8 448 takes the place of 127, and e4m3's values that of the integers.
//
// x and q are rows of channels, contiguous: tokens, or the pixels of NHWC images. A thread keeps a
// fixed run of V channels and walks down the rows, so the per-channel factors stay in registers.
#include <algorithm>

#include <griddepcontrol.cuh>

#include "launch.h"
#include "ldmq_cuda.h"
#include "numbers.cuh"

namespace {

using namespace ldmq;

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kMaxRowBlocks = 1024;  // blocks of one sample: enough to fill a GPU, few atomics
constexpr int64_t kMaxSampleBlocks = 32768;
constexpr int64_t kMaxTokenBlocks = 1 << 20;

template <int V>
__device__ __forceinline__ void load_factors(float (&factor)[V], const float* source, int64_t column, int64_t step) {
#pragma unroll
  for (int i = 0; i < V; ++i) factor[i] = source ? source[(column + i) * step] : 1.0f;
}

template <typename T, int V>
__device__ __forceinline__ uint32_t pack_magnitude(const T* x, const float (&factor)[V]) {
  const auto in = *reinterpret_cast<const Pack<T, V>*>(x);
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) largest = max(largest, magnitude(__fmul_rn(to_float(in.value[i]), factor[i])));
  return largest;
}

// Two products, not one by factor * inverse: the definition rounds in between.
template <typename T, typename Q, int V>
__device__ __forceinline__ void quantize_pack(const T* x, Q* q, const float (&factor)[V], float inverse) {
  const auto in = *reinterpret_cast<const Pack<T, V>*>(x);
  float y[V];
#pragma unroll
  for (int i = 0; i < V; ++i) y[i] = __fmul_rn(__fmul_rn(to_float(in.value[i]), factor[i]), inverse);
  store_run(y, q);
}

// Where a thread stands: its first channel, its first row, and how far it steps.
template <int V>
struct Walk {
  int64_t column, row, row_step;
  bool active;

  __device__ __forceinline__ Walk(int columns_per_block, int64_t channels) {
    const int rows_per_block = kThreads / columns_per_block;
    const int in_block = static_cast<int>(threadIdx.x) / columns_per_block;
    column = (static_cast<int64_t>(blockIdx.y) * columns_per_block + threadIdx.x % columns_per_block) * V;
    row = static_cast<int64_t>(blockIdx.x) * rows_per_block + in_block;
    row_step = static_cast<int64_t>(gridDim.x) * rows_per_block;
    active = in_block < rows_per_block && column < channels;
  }
};

template <typename T, typename Q, int V>
__global__ void __launch_bounds__(kThreads)
    static_kernel(const T* x, const float* inv_scale, int64_t inv_scale_step, Q* q, int64_t rows,
                  int64_t channels, int columns_per_block) {
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const Walk<V> walk(columns_per_block, channels);
  if (!walk.active) return;
  float factor[V];
  load_factors(factor, inv_scale, walk.column, inv_scale_step);
  for (int64_t row = walk.row; row < rows; row += walk.row_step) {
    const int64_t at = row * channels + walk.column;
    quantize_pack(x + at, q + at, factor, 1.0f);
  }
}

template <typename T, typename Q, int V>
__global__ void __launch_bounds__(kThreads)
    per_token_kernel(const T* x, const float* inv_smooth, Q* q, float* scale, int64_t rows, int64_t channels,
                     int threads_per_row) {
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  __shared__ uint32_t warp_largest[kThreads / kWarp];
  const int rows_per_block = kThreads / threads_per_row;
  const int lane = static_cast<int>(threadIdx.x) % threads_per_row;
  const int warps_per_row = threads_per_row / kWarp;
  const int first_warp = static_cast<int>(threadIdx.x) / threads_per_row * warps_per_row;
  float factor[V];
  for (int64_t block_row = static_cast<int64_t>(blockIdx.x) * rows_per_block; block_row < rows;
       block_row += static_cast<int64_t>(gridDim.x) * rows_per_block) {
    const int64_t row = block_row + threadIdx.x / threads_per_row;
    const int64_t end = row < rows ? channels : 0;
    uint32_t largest = 0;
    for (int64_t column = static_cast<int64_t>(lane) * V; column < end; column += threads_per_row * V) {
      load_factors(factor, inv_smooth, column, 1);
      largest = max(largest, pack_magnitude<T, V>(x + row * channels + column, factor));
    }
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (warps_per_row > 1) {
      if (threadIdx.x % kWarp == 0) warp_largest[threadIdx.x / kWarp] = largest;
      __syncthreads();
      for (int warp = 0; warp < warps_per_row; ++warp) largest = max(largest, warp_largest[first_warp + warp]);
      __syncthreads();
    }
    const float row_scale = measured_scale<Q>(largest);
    const float inverse = __fdiv_rn(1.0f, row_scale);
    if (lane == 0 && row < rows) scale[row] = row_scale;
    for (int64_t column = static_cast<int64_t>(lane) * V; column < end; column += threads_per_row * V) {
      load_factors(factor, inv_smooth, column, 1);
      const int64_t at = row * channels + column;
      quantize_pack(x + at, q + at, factor, inverse);
    }
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    sample_absmax_kernel(const T* x, const float* inv_smooth, uint32_t* absmax, int64_t samples, int64_t pixels,
                         int64_t channels, int columns_per_block) {
  griddepcontrol_launch_dependents();
  __shared__ uint32_t warp_largest[kThreads / kWarp];
  const Walk<V> walk(columns_per_block, channels);
  float factor[V];
  if (walk.active) load_factors(factor, inv_smooth, walk.column, 1);
  for (int64_t sample = blockIdx.z; sample < samples; sample += gridDim.z) {
    const T* image = x + sample * pixels * channels + walk.column;
    uint32_t largest = 0;
    for (int64_t row = walk.active ? walk.row : pixels; row < pixels; row += walk.row_step) {
      largest = max(largest, pack_magnitude<T, V>(image + row * channels, factor));
    }
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (threadIdx.x % kWarp == 0) warp_largest[threadIdx.x / kWarp] = largest;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int warp = 1; warp < kThreads / kWarp; ++warp) largest = max(largest, warp_largest[warp]);
      atomicMax(absmax + sample, largest);
    }
    __syncthreads();
  }
}

template <typename T, typename Q, int V>
__global__ void __launch_bounds__(kThreads)
    per_sample_kernel(const T* x, const float* inv_smooth, const uint32_t* absmax, Q* q, float* scale,
                      int64_t samples, int64_t pixels, int64_t channels, int columns_per_block) {
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const Walk<V> walk(columns_per_block, channels);
  if (!walk.active) return;
  float factor[V];
  load_factors(factor, inv_smooth, walk.column, 1);
  for (int64_t sample = blockIdx.z; sample < samples; sample += gridDim.z) {
    const float sample_scale = measured_scale<Q>(absmax[sample]);
    const float inverse = __fdiv_rn(1.0f, sample_scale);
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) scale[sample] = sample_scale;
    for (int64_t row = walk.row; row < pixels; row += walk.row_step) {
      const int64_t at = (sample * pixels + row) * channels + walk.column;
      quantize_pack(x + at, q + at, factor, inverse);
    }
  }
}

// Calls `body` with pointers of the types of x and q, and the widest vector that channels and addresses allow.
template <typename T, typename Body>
cudaError_t with_width(const void* x, void* q, ldmq_dtype q_dtype, int64_t channels, Body body) {
  constexpr int kWide = 16 / sizeof(T);
  const auto* typed = static_cast<const T*>(x);
  const bool is_wide = channels % kWide == 0 && is_aligned(x, 16) && is_aligned(q, kWide);
  return with_quantized(q_dtype, [&](auto of_type) {
    auto* out = static_cast<decltype(of_type)*>(q);
    if (is_wide) return body(typed, out, std::integral_constant<int, kWide>());
    return body(typed, out, std::integral_constant<int, 1>());
  });
}

template <typename Body>
int dispatch(const void* x, ldmq_dtype dtype, void* q, ldmq_dtype q_dtype, int64_t channels, int device, Body body) {
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  switch (dtype) {
    case LDMQ_FLOAT32:
      return with_width<float>(x, q, q_dtype, channels, body);
    case LDMQ_FLOAT16:
      return with_width<__half>(x, q, q_dtype, channels, body);
    case LDMQ_BFLOAT16:
      return with_width<__nv_bfloat16>(x, q, q_dtype, channels, body);
    default:
      return cudaErrorInvalidValue;
  }
}

// Blocks over rows (x), runs of channels (y) and samples (z), for kernels that use Walk.
dim3 walk_grid(int64_t rows, int64_t columns, int columns_per_block, int64_t samples) {
  const int64_t row_blocks = std::min(ceil_div(rows, kThreads / columns_per_block), kMaxRowBlocks);
  return dim3(static_cast<unsigned>(row_blocks), static_cast<unsigned>(ceil_div(columns, columns_per_block)),
              static_cast<unsigned>(std::min(samples, kMaxSampleBlocks)));
}

int row_threads(int64_t columns) { return columns <= 64 ? 32 : columns <= 128 ? 64 : columns <= 512 ? 128 : 256; }

}  // namespace

extern "C" int ldmq_quantize_static(const void* x, ldmq_dtype dtype, const float* inv_scale,
                                    int64_t inv_scale_count, void* q, ldmq_dtype q_dtype, int64_t rows,
                                    int64_t channels, int device, void* stream, int dependent) {
  if (rows == 0 || channels == 0) return cudaSuccess;
  return dispatch(x, dtype, q, q_dtype, channels, device, [&](auto* typed, auto* out, auto width) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    using Q = std::remove_pointer_t<decltype(out)>;
    constexpr int V = decltype(width)::value;
    const int64_t columns = channels / V;
    const int per_block = static_cast<int>(std::min<int64_t>(columns, kThreads));
    const Shape shape{walk_grid(rows, columns, per_block, 1), kThreads};
    return launch(static_kernel<T, Q, V>, shape, Stream{stream, dependent != 0}, typed, inv_scale,
                  inv_scale_count == 1 ? 0 : 1, out, rows, channels, per_block);
  });
}

extern "C" int ldmq_quantize_per_token(const void* x, ldmq_dtype dtype, const float* inv_smooth, void* q,
                                       ldmq_dtype q_dtype, float* scale, int64_t rows, int64_t channels, int device,
                                       void* stream, int dependent) {
  if (rows == 0 || channels == 0) return cudaSuccess;
  return dispatch(x, dtype, q, q_dtype, channels, device, [&](auto* typed, auto* out, auto width) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    using Q = std::remove_pointer_t<decltype(out)>;
    constexpr int V = decltype(width)::value;
    const int threads_per_row = row_threads(channels / V);
    const int64_t blocks = std::min(ceil_div(rows, kThreads / threads_per_row), kMaxTokenBlocks);
    const Shape shape{dim3(static_cast<unsigned>(blocks)), kThreads};
    return launch(per_token_kernel<T, Q, V>, shape, Stream{stream, dependent != 0}, typed, inv_smooth, out, scale,
                  rows, channels, threads_per_row);
  });
}

extern "C" int ldmq_quantize_per_sample(const void* x, ldmq_dtype dtype, const float* inv_smooth, void* q,
                                        ldmq_dtype q_dtype, float* scale, uint32_t* absmax, int64_t samples,
                                        int64_t pixels, int64_t channels, int device, void* stream,
                                        int dependent) {
  if (samples == 0 || pixels == 0 || channels == 0) return cudaSuccess;
  return dispatch(x, dtype, q, q_dtype, channels, device, [&](auto* typed, auto* out, auto width) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    using Q = std::remove_pointer_t<decltype(out)>;
    constexpr int V = decltype(width)::value;
    const int64_t columns = channels / V;
    const int per_block = static_cast<int>(std::min<int64_t>(columns, kThreads));
    const Shape shape{walk_grid(pixels, columns, per_block, samples), kThreads};
    cudaError_t error = cudaMemsetAsync(absmax, 0, samples * sizeof(uint32_t), static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return error;
    // never early: what comes before it is no kernel
    error = launch(sample_absmax_kernel<T, V>, shape, Stream{stream, false}, typed, inv_smooth, absmax, samples, pixels,
                   channels, per_block);
    if (error != cudaSuccess) return error;
    return launch(per_sample_kernel<T, Q, V>, shape, Stream{stream, dependent != 0}, typed, inv_smooth, absmax, out,
                  scale, samples, pixels, channels, per_block);
  });
}

extern "C" const char* ldmq_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

extern "C" const char* ldmq_architectures() { return LDMQ_ARCHITECTURES; }

extern "C" int ldmq_versions(int* driver, int* build) {
  *build = CUDART_VERSION;
  return cudaDriverGetVersion(driver);
}
