// The second launch of split-K: partial sums to the output.
#include <griddepcontrol.cuh>

#include "gemm.cuh"

namespace ldmq {

namespace {

constexpr int kThreads = 128, kRuns = 32, kRows = kThreads / kRuns;  // of a block

// A thread adds the sums of eight columns of one row, from the first part of k to the last, and finishes them.
template <typename Sum, typename Out>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const __grid_constant__ Epilogue epilogue, const Sum* partial, int splits) {
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int thread = static_cast<int>(threadIdx.x), row = static_cast<int>(blockIdx.x) * kRows + thread / kRuns;
  const int first = (static_cast<int>(blockIdx.y) * kRuns + thread % kRuns) * kRun;
  if (row >= epilogue.m || first >= epilogue.n) return;
  const RowTerms terms(epilogue, row);
  Residual<Out> residual(epilogue, terms, first);
  const ColumnTerms<Out> column(epilogue, first);
  const int64_t all = static_cast<int64_t>(epilogue.m) * epilogue.n;
  Sum total[kRun] = {};
  for (int split = 0; split < splits; ++split) {
    Run<kRun, Sum> sums;
    sums.load(partial + split * all + terms.at + first);
#pragma unroll
    for (int i = 0; i < kRun; ++i) total[i] += sums.parts[i / 4].value[i % 4];
  }
  finish_run<Out, false>(epilogue, column, terms, first, residual, total);
}

}  // namespace

template <typename Sum>
int reduce_partial_sums(const ldmq_gemm& gemm, int splits, const Stream& stream) {
  constexpr Element kElement = std::is_same_v<Sum, int> ? Element::kInt8 : Element::kE4m3;
  Epilogue epilogue = epilogue_of(gemm);
  epilogue.out = gemm.out;
  const Shape shape = {dim3(static_cast<unsigned>(ceil_div(gemm.m, kRows)),
                            static_cast<unsigned>(ceil_div(gemm.n, kRun * kRuns))),
                       kThreads};
  return with_out_type<Kind::kConv2d, kElement>(gemm.out_dtype, [&](auto out) {
    return launch(reduce_kernel<Sum, decltype(out)>, shape, stream, epilogue, static_cast<const Sum*>(gemm.partial),
                  splits);
  });
}

template int reduce_partial_sums<int>(const ldmq_gemm&, int, const Stream&);
template int reduce_partial_sums<float>(const ldmq_gemm&, int, const Stream&);

}  // namespace ldmq
