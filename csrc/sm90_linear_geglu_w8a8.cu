// The int8 GEGLU on wgmma: rows of operand a, rows of operand b, k, stages, cooperative, cluster.
#include "sm90_gemm.cuh"

namespace ldmq {

TileList sm90_linear_geglu_w8a8() {
  using namespace sm90;
  return {
      compiled<Tile<Kind::kGeglu, Element::kInt8, 128, 256, 128, 4, true, 2>>("linear_geglu_w8a8"),
      compiled<Tile<Kind::kGeglu, Element::kInt8, 128, 128, 128, 7, false, 2>>("linear_geglu_w8a8"),
      compiled<Tile<Kind::kGeglu, Element::kInt8, 128, 128, 128, 7, false, 1>>("linear_geglu_w8a8"),
      compiled<Tile<Kind::kGeglu, Element::kInt8, 128, 64, 128, 8, true, 1>>("linear_geglu_w8a8"),
  };
}

}  // namespace ldmq
