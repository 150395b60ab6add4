// The kernels as plain C functions: no torch, no Python. Every function returns a CUDA error code,
// zero for success, launches on `stream` of `device`, and leaves the caller's current device as it was.
// Callers check their arguments first (binding.cpp does); sizes of zero launch nothing.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { LDMQ_FLOAT32 = 0, LDMQ_FLOAT16 = 1, LDMQ_BFLOAT16 = 2 } ldmq_dtype;

enum { LDMQ_MAX_CHANNELS = 1 << 23 };

// x: (rows, channels), reciprocal: (1) or (channels) float32 -> q: (rows, channels) int8.
int ldmq_quantize_static(const void* x, ldmq_dtype dtype, const float* reciprocal, int64_t reciprocal_count,
                         int8_t* q, int64_t rows, int64_t channels, int device, void* stream);

// x: (rows, channels), smoothing: (channels) float32 or null -> q: (rows, channels) int8, scale: (rows) float32.
int ldmq_quantize_per_token(const void* x, ldmq_dtype dtype, const float* smoothing, int8_t* q, float* scale,
                            int64_t rows, int64_t channels, int device, void* stream);

// x: (samples, pixels, channels), smoothing: (channels) float32 or null
//   -> q: (samples, pixels, channels) int8, scale: (samples) float32; absmax: (samples) of scratch.
int ldmq_quantize_per_sample(const void* x, ldmq_dtype dtype, const float* smoothing, int8_t* q, float* scale,
                             uint32_t* absmax, int64_t samples, int64_t pixels, int64_t channels, int device,
                             void* stream);

const char* ldmq_error_text(int error);

// The architectures that this build holds machine code for, such as "80;90".
const char* ldmq_architectures(void);

#ifdef __cplusplus
}
#endif
