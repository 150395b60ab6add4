// GroupNorm, SiLU and quantization to int8.
#include "group_norm_quantize.cuh"

namespace ldmq {

cudaError_t group_norm_to_int8(const ldmq_group_norm& norm, const Task& task, Mode mode, int multiprocessors,
                               void* stream) {
  return launch_group_norm<int8_t>(norm, task, mode, multiprocessors, stream);
}

}  // namespace ldmq
