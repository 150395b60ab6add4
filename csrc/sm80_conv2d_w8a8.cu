// The int8 convolution on mma.sync: m, n, m and n of a warp, stages.
#include "sm80_gemm.cuh"

namespace ldmq {

TileList sm80_conv2d_w8a8() {
  using namespace sm80;
  return {
      compiled<Tile<Kind::kConv2d, Element::kInt8, 128, 160, 64, 32, 4>>("conv2d_w8a8"),
      compiled<Tile<Kind::kConv2d, Element::kInt8, 128, 128, 64, 32, 4>>("conv2d_w8a8"),
      compiled<Tile<Kind::kConv2d, Element::kInt8, 64, 128, 32, 64, 4>>("conv2d_w8a8"),
      compiled<Tile<Kind::kConv2d, Element::kInt8, 64, 64, 32, 32, 6>>("conv2d_w8a8"),
  };
}

}  // namespace ldmq
