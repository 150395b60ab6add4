// GEMMs and convolutions of int8 and FP8 in Python.
#include "binding.h"

namespace ldmq::binding {

namespace {

using Tile = std::tuple<const char*, int, int, int, int, int, int, bool>;

std::vector<Tile> tiles() {
  int count = 0;
  const ldmq_tile* all = ldmq_tiles(&count);
  std::vector<Tile> list;
  for (int i = 0; i < count; ++i) {
    const ldmq_tile& tile = all[i];
    list.emplace_back(tile.op, tile.family, tile.m, tile.n, tile.k, tile.stages, tile.cluster, tile.cooperative != 0);
  }
  return list;
}

// Checks one call against what its op needs, and says of everything that is wrong which op and shape it was.
class GemmCall {
 public:
  GemmCall(const ldmq_gemm& gemm, int tile) : gemm_(gemm) {
    int count = 0;
    const ldmq_tile* all = ldmq_tiles(&count);
    if (tile < 0 || tile >= count) {
      throw py::value_error("ldmq cuda: tile is " + std::to_string(tile) + ", must be below " + std::to_string(count));
    }
    op_ = all[tile].op;
  }

  void check(int tile, int64_t scale_count) const {
    require(gemm_.m >= 0 && gemm_.n >= 0 && gemm_.channels >= 0, "sizes must be 0 or more");
    if (op_.rfind("conv2d", 0) == 0) {
      check_conv();
    } else {
      require(gemm_.kernel_height == 0, "conv is for convolutions");
    }
    const bool launches = gemm_.m > 0 && gemm_.n > 0;
    const std::pair<const char*, const void*> needed[] = {{"x", gemm_.x},
                                                          {"weight", gemm_.weight},
                                                          {"x_scale", gemm_.x_scale},
                                                          {"weight_scale", gemm_.weight_scale},
                                                          {"out", gemm_.out}};
    for (const auto& [name, pointer] : needed) require(!launches || pointer, std::string(name) + " is null");
    require(gemm_.split_k >= 0 && gemm_.split_k <= LDMQ_MAX_SPLIT_K,
            "split_k is " + std::to_string(gemm_.split_k) + ", must be 0 to " + std::to_string(LDMQ_MAX_SPLIT_K));
    require(!gemm_.vector || (gemm_.vectors > 0 && gemm_.m % gemm_.vectors == 0),
            "there are " + std::to_string(gemm_.vectors) + " vectors, which must divide m");
    require(op_ != "linear_w4a8" || !launches || gemm_.multiplier, "multiplier is null");
    const int64_t step = gemm_.scale_rows, scales = step > 0 ? (gemm_.m + step - 1) / step : 1;
    require(gemm_.scale_rows >= 0 && (scale_count == scales || gemm_.m == 0),
            "x_scale has " + std::to_string(scale_count) + " elements, must have " + std::to_string(scales));
    if (gemm_.out_dtype == LDMQ_INT8 || gemm_.out_dtype == LDMQ_FLOAT8) {
      require(gemm_.out_inv_scale, "an 8-bit output needs out_inv_scale");
      require(gemm_.out_inv_scale_count == 1 || gemm_.out_inv_scale_count == gemm_.n,
              "out_inv_scale must have 1 element or one for each output channel");
    } else {
      require(!gemm_.out_inv_scale, "out_inv_scale is for an 8-bit output");
    }
    if (const char* why = ldmq_refusal(&gemm_, tile)) throw Refusal(text(why));
  }

  void run(int tile, int device, uintptr_t stream, bool dependent) const {
    require(device >= 0, "device is " + std::to_string(device) + ", must be 0 or more");
    int error = 0;
    {
      py::gil_scoped_release release;
      error = ldmq_run_gemm(&gemm_, tile, device, reinterpret_cast<void*>(stream), dependent);
    }
    if (error == 0) return;
    throw std::runtime_error(text("failed on cuda:" + std::to_string(device) + ": " + ldmq_error_text(error) +
                                  " (built for " + ldmq_architectures() + ")"));
  }

 private:
  void check_conv() const {
    const ldmq_gemm& p = gemm_;
    require(p.samples >= 0 && p.height >= 1 && p.width >= 1 && p.out_height >= 1 && p.out_width >= 1,
            "images must have a height and a width");
    require(p.kernel_height >= 1 && p.kernel_width >= 1 && p.stride_height >= 1 && p.stride_width >= 1 &&
                p.dilation_height >= 1 && p.dilation_width >= 1,
            "kernel size, stride and dilation must be 1 or more");
    require(p.pad_top >= 0 && p.pad_left >= 0, "padding must be 0 or more");
    require(p.samples <= INT32_MAX && p.out_height <= INT32_MAX && p.out_width <= INT32_MAX, "sizes are too large");
    require(p.m == p.samples * p.out_height * p.out_width, "m must be samples * out_height * out_width");
    int64_t pixels = p.samples;
    const bool overflows = __builtin_mul_overflow(pixels, p.height, &pixels) ||
                           __builtin_mul_overflow(pixels, p.width, &pixels) || pixels > INT32_MAX;
    require(!overflows, "there are too many pixels");
  }

  void require(bool holds, const std::string& why) const {
    if (!holds) throw py::value_error(text(why));
  }

  std::string text(const std::string& what) const {
    return "ldmq cuda " + op_ + " of (m=" + std::to_string(gemm_.m) + ", n=" +
           std::to_string(gemm_.n) + ", channels=" + std::to_string(gemm_.channels) + "): " + what;
  }

  const ldmq_gemm& gemm_;
  std::string op_;
};

const void* address(uintptr_t value) { return reinterpret_cast<const void*>(value); }

void run_gemm(int tile, uintptr_t x, uintptr_t weight, uintptr_t multiplier, uintptr_t x_scale, int64_t scale_count,
              int64_t scale_rows, uintptr_t weight_scale, uintptr_t bias, const std::string& bias_dtype,
              uintptr_t vector, int64_t vectors, uintptr_t residual, uintptr_t out,
              const std::string& out_dtype, uintptr_t out_inv_scale, int64_t out_inv_scale_count, int64_t m, int64_t n,
              int64_t channels, const std::vector<int64_t>& conv, int64_t split_k, uintptr_t partial, int device,
              uintptr_t stream, bool dependent) {
  ldmq_gemm gemm = {};
  const GemmCall call(gemm, tile);
  gemm.x = address(x);
  gemm.weight = address(weight);
  gemm.multiplier = static_cast<const uint8_t*>(address(multiplier));
  gemm.x_scale = static_cast<const float*>(address(x_scale));
  gemm.scale_rows = scale_rows;
  gemm.weight_scale = static_cast<const float*>(address(weight_scale));
  gemm.bias = {address(bias), parse_dtype("ldmq cuda bias", bias_dtype)};
  gemm.vector = address(vector);
  gemm.vectors = vectors;
  gemm.residual = address(residual);
  gemm.out_inv_scale = static_cast<const float*>(address(out_inv_scale));
  gemm.out_inv_scale_count = out_inv_scale_count;
  gemm.out = reinterpret_cast<void*>(out);
  const bool quantized = out_dtype == "int8" || out_dtype == "float8_e4m3fn";
  gemm.out_dtype = quantized ? parse_quantized("ldmq cuda out", out_dtype) : parse_dtype("ldmq cuda out", out_dtype);
  gemm.m = m;
  gemm.n = n;
  gemm.channels = channels;
  if (!conv.empty()) {
    if (conv.size() != 14) {
      throw py::value_error("ldmq cuda: conv has " + std::to_string(conv.size()) + " numbers, must have 14");
    }
    int64_t* const sizes[] = {&gemm.samples, &gemm.height, &gemm.width, &gemm.out_height, &gemm.out_width};
    int* const steps[] = {&gemm.kernel_height, &gemm.kernel_width, &gemm.stride_height,
                          &gemm.stride_width, &gemm.dilation_height, &gemm.dilation_width,
                          &gemm.pad_top, &gemm.pad_left, &gemm.upsample};
    for (size_t i = 0; i < 5; ++i) *sizes[i] = conv[i];
    for (size_t i = 0; i < 9; ++i) *steps[i] = static_cast<int>(conv[i + 5]);
  }
  gemm.split_k = static_cast<int>(split_k);
  gemm.partial = reinterpret_cast<void*>(partial);
  call.check(tile, scale_count);
  call.run(tile, device, stream, dependent);
}

}  // namespace

void define_gemm(py::module_& module) {
  module.def("tiles", &tiles, "(op, family, m, n, k, stages, cluster, cooperative) of every tile.");
  module.def("run_gemm", &run_gemm, "As ldmq_run_gemm.", py::arg("tile"), py::arg("x"), py::arg("weight"),
             py::arg("multiplier"), py::arg("x_scale"), py::arg("scale_count"), py::arg("scale_rows"),
             py::arg("weight_scale"), py::arg("bias"), py::arg("bias_dtype"), py::arg("vector"),
             py::arg("vectors"), py::arg("residual"), py::arg("out"), py::arg("out_dtype"),
             py::arg("out_inv_scale"), py::arg("out_inv_scale_count"), py::arg("m"), py::arg("n"),
             py::arg("channels"), py::arg("conv"), py::arg("split_k"), py::arg("partial"), py::arg("device"),
             py::arg("stream"), py::arg("dependent"));
}

}  // namespace ldmq::binding
