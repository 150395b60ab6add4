// GELU, or GEGLU, and quantization in one launch that reads memory once: q = quantize(gelu(x)), or
// q = quantize(value * gelu(gate)), in float32 up to the last rounding.
//
// With a calibrated scale a thread keeps a run of V channels, and their factors, and walks down the rows. A row with a
// scale of its own stays in the registers of its warps between the maximum and the rounding.
#include <algorithm>

#include <griddepcontrol.cuh>

#include "producers.cuh"

namespace {

using namespace ldmq;

constexpr int kThreads = 256;
constexpr int kRowValues = 16;  // of a row with a scale of its own, in the registers of a thread
constexpr int kMostRowThreads = LDMQ_MAX_GELU_CHANNELS / kRowValues;
constexpr int64_t kMostColumns = 64;  // of the runs of V channels in a block: it then has four rows or more
constexpr int64_t kMostBlocks = 1 << 20;
constexpr int kRowsAhead = 2;  // whose loads are under way together

// GELU by the error function, or x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
__device__ __forceinline__ float gelu(float x, bool tanh) {
  if (tanh) return x / (1.0f + __expf(-1.595769122f * (x + 0.044715f * x * x * x)));
  return ldmq::gelu(x);
}

// V neighbours of one row: of x, or of the values and their gates.
template <typename T, int V, bool GATED>
struct Inputs {
  static constexpr int kCount = GATED ? 2 : 1;  // the gates come last
  Pack<T, V> of[kCount];

  __device__ __forceinline__ void load(const T* row, int64_t channel, int64_t channels) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) of[i] = *reinterpret_cast<const Pack<T, V>*>(row + channel + i * channels);
  }
  __device__ __forceinline__ void activate(float (&y)[V], bool tanh) const {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      y[i] = gelu(to_float(of[kCount - 1].value[i]), !GATED && tanh);
      if constexpr (GATED) y[i] = to_float(of[0].value[i]) * y[i];
    }
  }
};

template <typename T, typename Q, int V, bool GATED>
__global__ void __launch_bounds__(kThreads)
    static_kernel(const T* x, bool tanh, Factors factors, Q* q, int64_t rows, int64_t channels, int columns_per_block) {
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int rows_per_block = kThreads / columns_per_block;
  const int row_in_block = static_cast<int>(threadIdx.x) / columns_per_block;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * columns_per_block + threadIdx.x % columns_per_block;
  const int64_t channel = column * V, row_step = static_cast<int64_t>(gridDim.x) * rows_per_block;
  if (row_in_block >= rows_per_block || channel >= channels) return;
  float factor[V];
  factors.load(factor, channel);
  int64_t row = static_cast<int64_t>(blockIdx.x) * rows_per_block + row_in_block;
  for (; row < rows; row += kRowsAhead * row_step) {
    Inputs<T, V, GATED> inputs[kRowsAhead];
#pragma unroll
    for (int i = 0; i < kRowsAhead; ++i) {
      if (row + i * row_step >= rows) break;
      inputs[i].load(x + (row + i * row_step) * Inputs<T, V, GATED>::kCount * channels, channel, channels);
    }
#pragma unroll
    for (int i = 0; i < kRowsAhead; ++i) {
      if (row + i * row_step >= rows) break;
      float y[V];
      inputs[i].activate(y, tanh);
      multiply(y, factor);
      store_run(y, q + (row + i * row_step) * channels + channel);
    }
  }
}

template <typename T, typename Q, int V, bool GATED>
__global__ void __launch_bounds__(kMostRowThreads, 1)
    token_kernel(const T* x, bool tanh, Factors factors, Q* q, float* scale, int64_t rows, int64_t channels,
                 int warps_per_row) {
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  constexpr int kRuns = kRowValues / V;
  __shared__ uint32_t largest_of_warp[kMostRowThreads / kLanes];
  const int row_threads = warps_per_row * kLanes;
  const int rows_per_block = static_cast<int>(blockDim.x) / row_threads;
  const int lane = static_cast<int>(threadIdx.x) % row_threads;
  const int64_t row_step = static_cast<int64_t>(gridDim.x) * rows_per_block;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * rows_per_block; first < rows; first += row_step) {
    const int64_t row = first + threadIdx.x / row_threads;
    const int64_t end = row < rows ? channels : 0;
    const T* from = x + row * Inputs<T, V, GATED>::kCount * channels;
    Inputs<T, V, GATED> inputs[kRuns];
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int64_t channel = static_cast<int64_t>(run * row_threads + lane) * V;
      if (channel >= end) break;
      inputs[run].load(from, channel, channels);
    }
    float y[kRuns][V];
    uint32_t largest = 0;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int64_t channel = static_cast<int64_t>(run * row_threads + lane) * V;
      if (channel >= end) break;
      inputs[run].activate(y[run], tanh);
      float factor[V];
      factors.load(factor, channel);
      multiply(y[run], factor);
#pragma unroll
      for (int i = 0; i < V; ++i) largest = max(largest, magnitude(y[run][i]));
    }
    const float row_scale = measured_scale<Q>(row_maximum(largest, warps_per_row, largest_of_warp));
    const float inverse = __fdiv_rn(1.0f, row_scale);
    if (lane == 0 && end > 0) scale[row] = row_scale;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int64_t channel = static_cast<int64_t>(run * row_threads + lane) * V;
      if (channel >= end) break;
      store_quantized(y[run], inverse, q + row * channels + channel);
    }
  }
}

template <typename T, typename Q, int V, bool GATED>
cudaError_t launch_static(const T* x, bool tanh, const ldmq_quantization& to, int64_t rows, int64_t channels,
                          const Stream& stream) {
  const int64_t columns = channels / V, column_blocks = ceil_div(columns, kMostColumns);
  const int per_block = static_cast<int>(ceil_div(columns, column_blocks));
  const int64_t row_blocks = ceil_div(rows, static_cast<int64_t>(kThreads / per_block) * kRowsAhead);
  const dim3 grid(static_cast<unsigned>(std::min(row_blocks, kMostBlocks)), static_cast<unsigned>(column_blocks));
  return launch(static_kernel<T, Q, V, GATED>, Shape{grid, kThreads}, stream, x, tanh, Factors(to),
                static_cast<Q*>(to.q), rows, channels, per_block);
}

template <typename T, typename Q, int V, bool GATED>
cudaError_t launch_tokens(const T* x, bool tanh, const ldmq_quantization& to, int64_t rows, int64_t channels,
                          const Stream& stream) {
  const int warps_per_row = static_cast<int>(ceil_div(channels, kLanes * kRowValues));
  const int rows_per_block = std::max(1, kThreads / kLanes / warps_per_row);
  const int64_t blocks = std::min(ceil_div(rows, rows_per_block), kMostBlocks);
  const int threads = rows_per_block * warps_per_row * kLanes;
  const Shape shape{dim3(static_cast<unsigned>(blocks)), static_cast<unsigned>(threads)};
  return launch(token_kernel<T, Q, V, GATED>, shape, stream, x, tanh, Factors(to), static_cast<Q*>(to.q), to.scale,
                rows, channels, warps_per_row);
}

template <bool GATED>
int quantize(const void* x, ldmq_dtype dtype, bool tanh, const ldmq_quantization& to, int64_t rows, int64_t channels,
             int device, const Stream& stream) {
  if (rows == 0 || channels == 0) return cudaSuccess;
  if (!to.inv_scale && channels > LDMQ_MAX_GELU_CHANNELS) return cudaErrorInvalidValue;
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  return with_type(x, dtype, to, channels, [&](auto* typed, auto width) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    constexpr int V = decltype(width)::value;
    return with_quantized(to.q_dtype, [&](auto of_type) {
      using Q = decltype(of_type);
      if (to.inv_scale) return launch_static<T, Q, V, GATED>(typed, tanh, to, rows, channels, stream);
      return launch_tokens<T, Q, V, GATED>(typed, tanh, to, rows, channels, stream);
    });
  });
}

}  // namespace

extern "C" int ldmq_gelu_quantize(const void* x, ldmq_dtype dtype, int tanh, const ldmq_quantization* to, int64_t rows,
                                  int64_t channels, int device, void* stream, int dependent) {
  return quantize<false>(x, dtype, tanh != 0, *to, rows, channels, device, {stream, dependent != 0});
}

extern "C" int ldmq_geglu_quantize(const void* x, ldmq_dtype dtype, const ldmq_quantization* to, int64_t rows,
                                   int64_t channels, int device, void* stream, int dependent) {
  return quantize<true>(x, dtype, false, *to, rows, channels, device, {stream, dependent != 0});
}
