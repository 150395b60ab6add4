// The FP8 GEGLU on wgmma: rows of operand a, rows of operand b, k, stages, cooperative, cluster.
#include "sm90_gemm.cuh"

namespace ldmq {

TileList sm90_linear_geglu_fp8() {
  using namespace sm90;
  return {
      compiled<Tile<Kind::kGeglu, Element::kE4m3, 256, 128, 128, 4, true, 2>>("linear_geglu_fp8"),
      compiled<Tile<Kind::kGeglu, Element::kE4m3, 128, 128, 128, 7, true, 1>>("linear_geglu_fp8"),
      compiled<Tile<Kind::kGeglu, Element::kE4m3, 128, 64, 128, 8, true, 1>>("linear_geglu_fp8"),
  };
}

}  // namespace ldmq
