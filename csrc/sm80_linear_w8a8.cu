// The int8 linear on mma.sync: m, n, m and n of a warp, stages.
#include "sm80_gemm.cuh"

namespace ldmq {

TileList sm80_linear_w8a8() {
  using namespace sm80;
  return {
      compiled<Tile<Kind::kLinear, Element::kInt8, 128, 160, 64, 32, 4>>("linear_w8a8"),
      compiled<Tile<Kind::kLinear, Element::kInt8, 128, 128, 64, 32, 4>>("linear_w8a8"),
      compiled<Tile<Kind::kLinear, Element::kInt8, 256, 128, 64, 64, 3>>("linear_w8a8"),
      compiled<Tile<Kind::kLinear, Element::kInt8, 64, 128, 32, 64, 4>>("linear_w8a8"),
      compiled<Tile<Kind::kLinear, Element::kInt8, 64, 64, 32, 32, 6>>("linear_w8a8"),
  };
}

}  // namespace ldmq
