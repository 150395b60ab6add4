// The tiles of all ops in one list, what each can take, and the call of one of them.
#include <algorithm>
#include <string>

#include "launch.h"
#include "tiles.h"

namespace {

using namespace ldmq;

constexpr int64_t kMaxM = (1ll << 31) - 1024;  // m and n are 32 bits, with room for the last tile
constexpr int64_t kMaxK = 1 << 23;  // of int8, 127 * 127 * k stays in an int32 up to 2^17 only, and wraps around
                                    // beyond, as in every backend

const TileList& tiles() {
  static const TileList all = [] {
    TileList list;
    const auto add = [&](const TileList& more) { list.insert(list.end(), more.begin(), more.end()); };
#if LDMQ_HAS_SM90
    add(sm90_linear_w8a8());
    add(sm90_conv2d_w8a8());
    add(sm90_linear_w4a8());
    add(sm90_linear_fp8());
    add(sm90_linear_geglu_w8a8());
    add(sm90_linear_geglu_fp8());
    add(sm90_conv2d_fp8());
#endif
#if LDMQ_HAS_SM89
    add(sm89_linear_fp8());
    add(sm89_linear_geglu_fp8());
    add(sm89_conv2d_fp8());
#endif
    add(sm80_linear_w8a8());
    add(sm80_linear_geglu_w8a8());
    add(sm80_conv2d_w8a8());
    add(sm80_linear_w4a8());
    return list;
  }();
  return all;
}

bool is_fp8(const std::string& op) { return op == "linear_fp8" || op == "conv2d_fp8"; }

bool is_multiple(int64_t value, int64_t of) { return value % of == 0; }

const char* refusal_of_operands(const ldmq_gemm& gemm, const std::string& op) {
  const bool int4 = op == "linear_w4a8";
  if (gemm.channels < 1 || !is_multiple(gemm.channels, int4 ? 32 : 16)) {
    return int4 ? "input channels must be a multiple of 32" : "input channels must be a multiple of 16";
  }
  if (!is_multiple(gemm.n, 8)) return "output channels must be a multiple of 8";
  if (gemm.m > kMaxM || gemm.n > kMaxM) return "there are too many rows or output channels";
  if (gemm.channels > kMaxK / std::max(1, gemm.kernel_height * gemm.kernel_width)) {
    return "there are too many input channels";
  }
  const void* inv_scales = gemm.out_inv_scale_count > 1 ? gemm.out_inv_scale : nullptr;
  const void* vectors[] = {gemm.x,        gemm.weight,        gemm.weight_scale, gemm.bias.data,
                           gemm.residual, gemm.vector, gemm.out,          inv_scales};
  for (const void* pointer : vectors) {
    if (!is_aligned(pointer, 16)) return "tensors must begin at a multiple of 16 bytes";
  }
  const bool geglu = op == "linear_geglu_w8a8" || op == "linear_geglu_fp8";
  if ((geglu || gemm.out_dtype == LDMQ_INT8) && (gemm.residual || gemm.vector)) {
    return "GEGLU and an int8 output take no residual, no sample vector and no gate";
  }
  if (gemm.out_dtype == LDMQ_INT8 && is_fp8(op)) return "an int8 output is for int8 operands";
  if (gemm.out_dtype == LDMQ_FLOAT8 && !geglu) return "an FP8 output is for GEGLU";
  return nullptr;
}

const char* refusal_of_split(const ldmq_gemm& gemm, const std::string& op) {
  if (gemm.split_k <= 1) return nullptr;
  if (op.rfind("conv2d", 0) != 0) return "split-K is for convolutions";
  return gemm.partial && is_aligned(gemm.partial, 16) ? nullptr : "split-K needs room for its partial sums";
}

const char* refusal_of_conv(const ldmq_gemm& gemm, int family) {
  if (gemm.upsample != 1 && gemm.upsample != 2) return "upsample must be 1 or 2";
  if (family < 90) return nullptr;
  if (gemm.upsample != 1) return "TMA does not enlarge its input";
  const int64_t far_x = (gemm.out_width - 1) * gemm.stride_width - gemm.pad_left - (gemm.width - 1);
  const int64_t far_y = (gemm.out_height - 1) * gemm.stride_height - gemm.pad_top - (gemm.height - 1);
  const auto is_corner = [](int64_t value) { return value >= -128 && value < 128; };
  if (!is_corner(-gemm.pad_left) || !is_corner(-gemm.pad_top) || !is_corner(far_x) || !is_corner(far_y)) {
    return "TMA takes a padding below 128";
  }
  if (gemm.stride_width > 8 || gemm.stride_height > 8) return "TMA takes a stride of at most 8";
  if ((gemm.kernel_width - 1) * gemm.dilation_width > 255 ||
      (gemm.kernel_height - 1) * gemm.dilation_height > 255) {
    return "TMA takes taps at most 255 pixels apart";
  }
  return nullptr;
}

}  // namespace

extern "C" const ldmq_tile* ldmq_tiles(int* count) {
  static const std::vector<ldmq_tile> plain = [] {
    std::vector<ldmq_tile> list;
    for (const CompiledTile& compiled : tiles()) list.push_back(compiled.tile);
    return list;
  }();
  *count = static_cast<int>(plain.size());
  return plain.data();
}

extern "C" const char* ldmq_refusal(const ldmq_gemm* gemm, int tile) {
  if (tile < 0 || tile >= static_cast<int>(tiles().size())) return "there is no such tile";
  const CompiledTile& compiled = tiles()[static_cast<size_t>(tile)];
  const std::string op = compiled.tile.op;
  const char* why = refusal_of_operands(*gemm, op);
  if (!why) why = refusal_of_split(*gemm, op);
  if (!why && op.rfind("conv2d", 0) == 0) why = refusal_of_conv(*gemm, compiled.tile.family);
  return why;
}

extern "C" int ldmq_run_gemm(const ldmq_gemm* gemm, int tile, int device, void* stream, int dependent) {
  if (ldmq_refusal(gemm, tile)) return cudaErrorInvalidValue;
  if (gemm->m == 0 || gemm->n == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  return tiles()[static_cast<size_t>(tile)].run(*gemm, {stream, dependent != 0});
}
