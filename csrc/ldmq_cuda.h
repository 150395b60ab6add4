// The kernels as plain C functions: no torch, no Python. Every function returns a CUDA error code,
// zero for success, launches on `stream` of `device`, and leaves the caller's current device as it was. Where
// `dependent` is not zero, a kernel may be launched while the one before it in the stream still runs, if its code was
// compiled for sm_90 or newer and so waits itself (ptx/griddepcontrol.cuh).
// Callers check their arguments first (binding.cpp does); sizes of zero launch nothing.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { LDMQ_FLOAT32 = 0, LDMQ_FLOAT16 = 1, LDMQ_BFLOAT16 = 2, LDMQ_INT8 = 3, LDMQ_FLOAT8 = 4 } ldmq_dtype;

enum { LDMQ_MAX_CHANNELS = 1 << 23, LDMQ_MAX_SPLIT_K = 64 };

// A tensor that is added; null where there is none.
typedef struct {
  const void* data;
  ldmq_dtype dtype;
} ldmq_added;

// A GEMM: accumulator (m, n) = x (m, k) * weight (n, k)^T, k = taps * channels, of int8 in int32 or of FP8 (e4m3) in
// float32, and
//   out = (accumulator * x_scale * weight_scale + bias) * vector[row] + residual   of a linear: gates
//   out = accumulator * x_scale * weight_scale + bias + vector[row] + residual     of a convolution: one a sample
// in float32, rounded once; an int8 out is out * out_inv_scale, rounded and clamped to [-127, 127]. Of GEGLU the
// weight, its scales and the bias have 2 n rows, values and then their gates, and
//   out = value * gelu(gate)   both as above, of m x n each; out may be int8 or FP8 with out_inv_scale
// A linear has one tap, and m tokens; a convolution is an implicit GEMM with m pixels of its output, and
// kernel_height * kernel_width taps on NHWC images.
typedef struct {
  const void* x;              // (m, channels), or (samples, height, width, channels), of the op's element
  const void* weight;         // (n, taps, channels) of the same; or (n, channels / 2), int4 in -7..7, even index low
  const uint8_t* multiplier;  // (n, ceil(channels / 64)) of an int4 weight: int4 * multiplier is the int8 weight
  const float* x_scale;       // one, or one for each `scale_rows` rows
  int64_t scale_rows;         // 0: one scale for all
  const float* weight_scale;  // (n)
  ldmq_added bias;            // (n), of any floating dtype
  const void* vector;         // (vectors, n) of out's dtype, or null
  int64_t vectors;            // divides m: each is for m / vectors rows
  const void* residual;       // (m, n) of out's dtype, or null
  const float* out_inv_scale; // (1) or (n) of an int8 out, else null
  int64_t out_inv_scale_count;
  void* out;                  // (m, n)
  ldmq_dtype out_dtype;
  int64_t m, n, channels;     // channels: input channels
  // of a convolution; a linear leaves them zero
  int64_t samples, height, width, out_height, out_width;
  int kernel_height, kernel_width, stride_height, stride_width, dilation_height, dilation_width;
  int pad_top, pad_left, upsample;
  int split_k;                // blocks that share the k of one tile of a convolution; 0 and 1: one
  void* partial;              // (split_k, m, n) of the accumulator, scratch; null without split-K
} ldmq_gemm;

// A compiled tile: `op` takes it by its place in ldmq_tiles().
typedef struct {
  const char* op;       // "linear_w8a8", "linear_w4a8", "conv2d_w8a8", "linear_fp8", "conv2d_fp8",
                        // "linear_geglu_w8a8" or "linear_geglu_fp8"
  int family;           // 80: mma.sync; 89: that of FP8, from 8.9 on; 90: wgmma and TMA, on capability 9.0 alone
  int m, n;             // of the product; with GEGLU the output has n / 2 columns
  int k;                // of a step: input channels of one tap
  int stages;           // of shared memory
  int cluster;          // blocks that share what they load
  int cooperative;      // on sm90: two warpgroups share a tile, else each has its own
} ldmq_tile;

// All compiled tiles, and how many.
const ldmq_tile* ldmq_tiles(int* count);

// Why the tile at this place of ldmq_tiles() cannot take a GEMM, or null where it can.
const char* ldmq_refusal(const ldmq_gemm* gemm, int tile);

// Runs a GEMM that its tile does not refuse: one launch, and with split-K a second one, which adds the partial sums,
// always in the same order.
int ldmq_run_gemm(const ldmq_gemm* gemm, int tile, int device, void* stream, int dependent);

// What is quantized to, q of q_dtype: int8, or FP8 (e4m3).
// x: (rows, channels), inv_scale: (1) or (channels) float32 -> q: (rows, channels).
int ldmq_quantize_static(const void* x, ldmq_dtype dtype, const float* inv_scale, int64_t inv_scale_count, void* q,
                         ldmq_dtype q_dtype, int64_t rows, int64_t channels, int device, void* stream, int dependent);

// x: (rows, channels), inv_smooth: (channels) float32 or null -> q: (rows, channels), scale: (rows) float32.
int ldmq_quantize_per_token(const void* x, ldmq_dtype dtype, const float* inv_smooth, void* q, ldmq_dtype q_dtype,
                            float* scale, int64_t rows, int64_t channels, int device, void* stream, int dependent);

// x: (samples, pixels, channels), inv_smooth: (channels) float32 or null
//   -> q: (samples, pixels, channels), scale: (samples) float32; absmax: (samples) of scratch.
int ldmq_quantize_per_sample(const void* x, ldmq_dtype dtype, const float* inv_smooth, void* q, ldmq_dtype q_dtype,
                             float* scale, uint32_t* absmax, int64_t samples, int64_t pixels, int64_t channels,
                             int device, void* stream, int dependent);

// What the result y of a producer becomes: y * inv_scale, of a calibrated scale; or y * inv_smooth, by a measured one.
typedef struct {
  const float* inv_scale;  // (1) or (channels); null where the scale is measured
  int64_t inv_scale_count;
  const float* inv_smooth;  // (channels) or null; for a measured scale
  void* q;
  ldmq_dtype q_dtype;  // int8 or FP8
  float* scale;        // what was measured; null with a inv_scale
} ldmq_quantization;

// y = group_norm(x), and silu of that; one scale for each sample, or for each pixel.
typedef struct {
  const void* x;  // (samples, pixels, channels)
  ldmq_dtype dtype;
  ldmq_added weight, bias;  // (channels) of any floating dtype
  int64_t samples, pixels, channels;  // at most LDMQ_MAX_PIXELS pixels
  int64_t groups;                     // divides channels
  float eps;
  int silu;
  int per_token;  // each pixel is measured, and has at most LDMQ_MAX_PIXEL_CHANNELS channels
  ldmq_quantization to;  // q: (samples, pixels, channels), scale: (samples) or (samples, pixels)
} ldmq_group_norm;

enum { LDMQ_MAX_PIXELS = 1 << 30, LDMQ_MAX_PIXEL_CHANNELS = 4096, LDMQ_MAX_GELU_CHANNELS = 8192 };

// The bytes of scratch that a group norm takes on this device, at a multiple of 8; what they hold does not matter.
int ldmq_group_norm_scratch(const ldmq_group_norm* norm, int device, int64_t* bytes);

// One launch, of which all blocks run at once.
int ldmq_group_norm_silu_quantize(const ldmq_group_norm* norm, void* scratch, int device, void* stream);

// x: (rows, channels); y = gelu(x), by tanh or exact -> q: (rows, channels), scale: (rows).
// A measured scale takes at most LDMQ_MAX_GELU_CHANNELS, here and below.
int ldmq_gelu_quantize(const void* x, ldmq_dtype dtype, int tanh, const ldmq_quantization* to, int64_t rows,
                       int64_t channels, int device, void* stream, int dependent);

// x: (rows, 2 channels), values and then gates; y = value * gelu(gate) -> q: (rows, channels), scale: (rows).
int ldmq_geglu_quantize(const void* x, ldmq_dtype dtype, const ldmq_quantization* to, int64_t rows, int64_t channels,
                        int device, void* stream, int dependent);

const char* ldmq_error_text(int error);

// The architectures that this build holds machine code for, such as "80;90".
const char* ldmq_architectures(void);

// The CUDA version that the driver serves, 0 without one, and that of this build, such as 13000. A driver runs builds
// of its own major version and of older ones.
int ldmq_versions(int* driver, int* build);

#ifdef __cplusplus
}
#endif
