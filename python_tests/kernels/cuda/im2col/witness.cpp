// What CUTLASS's host code gives the driver for the activations of a convolution: a line of numbers for each line read.
// It is compiled against CUTLASS's own headers, and shares no code with csrc/. See generate.py.
#define CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL
#include <cuda.h>

#include <cstdio>

#include "cutlass/kernel_hardware_info.hpp"  // the collectives use it, and do not include it

#include "cute/tensor.hpp"
#include "cutlass/conv/collective/collective_builder.hpp"
#include "cutlass/conv/convnd_problem_shape.hpp"

extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                           const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                                           CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                           CUtensorMapFloatOOBfill) {
  return CUDA_SUCCESS;  // of the weight, which is a plain matrix
}

extern "C" CUresult cuTensorMapEncodeIm2col(CUtensorMap*, CUtensorMapDataType, cuuint32_t rank, void*,
                                            const cuuint64_t* size, const cuuint64_t* stride, const int* lower,
                                            const int* upper, cuuint32_t channels, cuuint32_t pixels,
                                            const cuuint32_t* step, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  std::printf("%u %u %u %d", rank, channels, pixels, static_cast<int>(swizzle));
  for (unsigned i = 0; i < rank; ++i) std::printf(" %llu", static_cast<unsigned long long>(size[i]));
  for (unsigned i = 0; i + 1 < rank; ++i) std::printf(" %llu", static_cast<unsigned long long>(stride[i]));
  for (unsigned i = 0; i + 2 < rank; ++i) std::printf(" %d %d", lower[i], upper[i]);
  for (unsigned i = 0; i < rank; ++i) std::printf(" %u", step[i]);
  std::printf("\n");
  return CUDA_SUCCESS;
}

template <int Pixels, int Channels>
void encode(int n, int c, int h, int w, int k, int r, int s, const int (&pad)[4], int stride_h, int stride_w,
            int dilation_h, int dilation_w) {
  using namespace cute;
  using Collective = typename cutlass::conv::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cutlass::conv::Operator::kFprop, int8_t,
      cutlass::layout::TensorNHWC, 16, int8_t, cutlass::layout::TensorNHWC, 16, int32_t,
      Shape<Int<Pixels>, _128, Shape<Int<Channels>>>, Shape<_1, _1, _1>, cutlass::conv::collective::StageCount<2>,
      cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;
  const cutlass::conv::ConvProblemShape<cutlass::conv::Operator::kFprop, 2> problem(
      cutlass::conv::Mode::kCrossCorrelation, {n, h, w, c}, {k, r, s, c}, {pad[0], pad[2]}, {pad[1], pad[3]},
      {stride_h, stride_w}, {dilation_h, dilation_w}, 1);
  alignas(128) static int8_t memory[128];
  Collective::to_underlying_arguments(problem, {memory, memory}, nullptr);
}

int main() {
  int pixels, channels, n, c, h, w, k, r, s, pad[4], stride_h, stride_w, dilation_h, dilation_w;
  while (std::scanf("%d %d %d %d %d %d %d %d %d %d %d %d %d %d %d %d %d", &pixels, &channels, &n, &c, &h, &w, &k, &r,
                    &s, &pad[0], &pad[1], &pad[2], &pad[3], &stride_h, &stride_w, &dilation_h, &dilation_w) == 17) {
    const auto call = channels == 128 ? (pixels == 128 ? encode<128, 128> : encode<256, 128>)
                                      : (pixels == 128 ? encode<128, 64> : encode<64, 64>);
    call(n, c, h, w, k, r, s, pad, stride_h, stride_w, dilation_h, dilation_w);
  }
}
