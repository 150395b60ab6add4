// The FP8 linear on wgmma: rows of operand a, rows of operand b, k, stages, cooperative, cluster.
#include "sm90_gemm.cuh"

namespace ldmq {

TileList sm90_linear_fp8() {
  using namespace sm90;
  return {
      compiled<Tile<Kind::kLinear, Element::kE4m3, 256, 128, 128, 4, true, 2>>("linear_fp8"),
      compiled<Tile<Kind::kLinear, Element::kE4m3, 128, 160, 128, 6, true, 2>>("linear_fp8"),
      compiled<Tile<Kind::kLinear, Element::kE4m3, 128, 160, 64, 10, true, 2>>("linear_fp8"),
      compiled<Tile<Kind::kLinear, Element::kE4m3, 128, 128, 128, 7, true, 1>>("linear_fp8"),
      compiled<Tile<Kind::kLinear, Element::kE4m3, 128, 64, 128, 8, true, 1>>("linear_fp8"),
  };
}

}  // namespace ldmq
