// The FP8 convolution on mma.sync: m, n, m and n of a warp, stages.
#include "sm80_gemm.cuh"

namespace ldmq {

TileList sm89_conv2d_fp8() {
  using namespace sm80;
  return {
      compiled<Tile<Kind::kConv2d, Element::kE4m3, 128, 128, 64, 32, 4>>("conv2d_fp8"),
      compiled<Tile<Kind::kConv2d, Element::kE4m3, 64, 64, 32, 32, 6>>("conv2d_fp8"),
  };
}

}  // namespace ldmq
