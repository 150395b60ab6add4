// The int8 linear with an int4 weight, operand a, on wgmma: rows of operand a, rows of operand b, k,
// stages, cooperative, cluster.
#include "sm90_gemm.cuh"

namespace ldmq {

TileList sm90_linear_w4a8() {
  using namespace sm90;
  return {
      compiled<Tile<Kind::kLinearInt4, Element::kInt8, 128, 160, 128, 7, true, 2>>("linear_w4a8"),
      compiled<Tile<Kind::kLinearInt4, Element::kInt8, 128, 256, 128, 5, true, 2>>("linear_w4a8"),
      compiled<Tile<Kind::kLinearInt4, Element::kInt8, 128, 256, 128, 5, true, 1>>("linear_w4a8"),
      compiled<Tile<Kind::kLinearInt4, Element::kInt8, 128, 128, 128, 8, true, 1>>("linear_w4a8"),
      compiled<Tile<Kind::kLinearInt4, Element::kInt8, 128, 64, 128, 8, true, 1>>("linear_w4a8"),
  };
}

}  // namespace ldmq
