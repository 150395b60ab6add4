// The FP8 GEGLU on mma.sync: m, n, m and n of a warp, stages.
#include "sm80_gemm.cuh"

namespace ldmq {

TileList sm89_linear_geglu_fp8() {
  using namespace sm80;
  return {
      compiled<Tile<Kind::kGeglu, Element::kE4m3, 128, 128, 32, 64, 4>>("linear_geglu_fp8"),
      compiled<Tile<Kind::kGeglu, Element::kE4m3, 64, 128, 16, 64, 4>>("linear_geglu_fp8"),
  };
}

}  // namespace ldmq
