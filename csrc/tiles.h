// The compiled tiles of each op and family, one list a source file.
#pragma once

#include <vector>

#include "launch.h"
#include "ldmq_cuda.h"

namespace ldmq {

struct CompiledTile {
  ldmq_tile tile;
  int (*run)(const ldmq_gemm& gemm, const Stream& stream);
};
using TileList = std::vector<CompiledTile>;

TileList sm80_linear_w8a8();
TileList sm80_linear_geglu_w8a8();
TileList sm80_linear_w4a8();
TileList sm80_conv2d_w8a8();
TileList sm89_linear_fp8();
TileList sm89_linear_geglu_fp8();
TileList sm89_conv2d_fp8();
TileList sm90_linear_w8a8();
TileList sm90_linear_w4a8();
TileList sm90_conv2d_w8a8();
TileList sm90_linear_fp8();
TileList sm90_linear_geglu_w8a8();
TileList sm90_linear_geglu_fp8();
TileList sm90_conv2d_fp8();

}  // namespace ldmq
