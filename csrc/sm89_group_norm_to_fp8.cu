// GroupNorm, SiLU and quantization to FP8.
#include "group_norm_quantize.cuh"

namespace ldmq {

cudaError_t group_norm_to_fp8(const ldmq_group_norm& norm, const Task& task, Mode mode, int multiprocessors,
                              void* stream) {
  return launch_group_norm<Float8>(norm, task, mode, multiprocessors, stream);
}

}  // namespace ldmq
