// The int8 GEGLU on mma.sync: m, n, m and n of a warp, stages.
#include "sm80_gemm.cuh"

namespace ldmq {

TileList sm80_linear_geglu_w8a8() {
  using namespace sm80;
  return {
      compiled<Tile<Kind::kGeglu, Element::kInt8, 256, 128, 64, 64, 3>>("linear_geglu_w8a8"),
      compiled<Tile<Kind::kGeglu, Element::kInt8, 128, 128, 32, 64, 4>>("linear_geglu_w8a8"),
      compiled<Tile<Kind::kGeglu, Element::kInt8, 64, 128, 16, 64, 4>>("linear_geglu_w8a8"),
  };
}

}  // namespace ldmq
