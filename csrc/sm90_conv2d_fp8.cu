// The FP8 convolution on wgmma, an implicit GEMM: rows of operand a, rows of operand b, k, stages,
// cooperative, cluster.
#include "sm90_gemm.cuh"

namespace ldmq {

TileList sm90_conv2d_fp8() {
  using namespace sm90;
  return {
      compiled<Tile<Kind::kConv2d, Element::kE4m3, 256, 128, 128, 4, true, 2>>("conv2d_fp8"),
      compiled<Tile<Kind::kConv2d, Element::kE4m3, 128, 160, 128, 6, true, 2>>("conv2d_fp8"),
      compiled<Tile<Kind::kConv2d, Element::kE4m3, 128, 160, 64, 10, true, 2>>("conv2d_fp8"),
      compiled<Tile<Kind::kConv2d, Element::kE4m3, 128, 64, 128, 8, true, 1>>("conv2d_fp8"),
  };
}

}  // namespace ldmq
