// The int8 linear on wgmma: rows of operand a, rows of operand b, k, stages, cooperative, cluster.
#include "sm90_gemm.cuh"

namespace ldmq {

TileList sm90_linear_w8a8() {
  using namespace sm90;
  return {
      compiled<Tile<Kind::kLinear, Element::kInt8, 256, 160, 128, 4, true, 2>>("linear_w8a8"),
      compiled<Tile<Kind::kLinear, Element::kInt8, 256, 128, 128, 4, true, 2>>("linear_w8a8"),
      compiled<Tile<Kind::kLinear, Element::kInt8, 128, 256, 128, 4, true, 2>>("linear_w8a8"),
      compiled<Tile<Kind::kLinear, Element::kInt8, 128, 160, 128, 6, true, 2>>("linear_w8a8"),
      compiled<Tile<Kind::kLinear, Element::kInt8, 128, 160, 128, 6, false, 2>>("linear_w8a8"),
      compiled<Tile<Kind::kLinear, Element::kInt8, 128, 160, 128, 6, false, 1>>("linear_w8a8"),
      compiled<Tile<Kind::kLinear, Element::kInt8, 128, 160, 64, 10, false, 2>>("linear_w8a8"),
      compiled<Tile<Kind::kLinear, Element::kInt8, 128, 128, 128, 7, false, 1>>("linear_w8a8"),
      compiled<Tile<Kind::kLinear, Element::kInt8, 64, 160, 128, 7, false, 1>>("linear_w8a8"),
      compiled<Tile<Kind::kLinear, Element::kInt8, 128, 64, 128, 8, true, 1>>("linear_w8a8"),
  };
}

}  // namespace ldmq
