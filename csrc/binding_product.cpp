// int8 products in Python.
#include "binding.h"

namespace ldmq::binding {

namespace {

py::list tiles() {
  int count = 0;
  const ldmq_tile* all = ldmq_tiles(&count);
  py::list list;
  for (int i = 0; i < count; ++i) {
    const ldmq_tile& tile = all[i];
    list.append(py::make_tuple(tile.op, tile.family, tile.rows, tile.columns, tile.depth, tile.stages, tile.cluster,
                               static_cast<bool>(tile.cooperative)));
  }
  return list;
}

// Checks one call against what its op needs, and says of everything that is wrong which op and shape it was.
class ProductCall {
 public:
  ProductCall(const ldmq_product& product, int tile) : product_(product) {
    int count = 0;
    const ldmq_tile* all = ldmq_tiles(&count);
    if (tile < 0 || tile >= count) {
      throw py::value_error("ldmq cuda: tile is " + std::to_string(tile) + ", must be below " + std::to_string(count));
    }
    op_ = all[tile].op;
  }

  void check(int tile, int64_t scale_count) const {
    require(product_.rows >= 0 && product_.columns >= 0 && product_.depth >= 0, "sizes must be 0 or more");
    if (op_ == "conv2d_w8a8") {
      check_pictures();
    } else {
      require(product_.kernel_height == 0, "pictures are for convolutions");
    }
    const bool launches = product_.rows > 0 && product_.columns > 0;
    const std::pair<const char*, const void*> needed[] = {{"x", product_.x},
                                                          {"weight", product_.weight},
                                                          {"x_scale", product_.x_scale},
                                                          {"weight_scale", product_.weight_scale},
                                                          {"out", product_.out}};
    for (const auto& [name, pointer] : needed) require(!launches || pointer, std::string(name) + " is null");
    require(op_ != "linear_w4a8" || !launches || product_.multiplier, "multiplier is null");
    const int64_t step = product_.scale_rows, scales = step > 0 ? (product_.rows + step - 1) / step : 1;
    require(product_.scale_rows >= 0 && (scale_count == scales || product_.rows == 0),
            "x_scale has " + std::to_string(scale_count) + " elements, must have " + std::to_string(scales));
    if (product_.out_dtype == LDMQ_INT8) {
      require(product_.out_inv_scale, "an int8 output needs out_inv_scale");
      require(product_.out_inv_scale_count == 1 || product_.out_inv_scale_count == product_.columns,
              "out_inv_scale must have 1 element or one for each output channel");
    } else {
      require(!product_.out_inv_scale, "out_inv_scale is for an int8 output");
    }
    if (const char* why = ldmq_refusal(&product_, tile)) throw Refusal(text(why));
  }

  void run(int tile, int device, uintptr_t stream) const {
    require(device >= 0, "device is " + std::to_string(device) + ", must be 0 or more");
    int error = 0;
    {
      py::gil_scoped_release release;
      error = ldmq_run_product(&product_, tile, device, reinterpret_cast<void*>(stream));
    }
    if (error == 0) return;
    throw std::runtime_error(text("failed on cuda:" + std::to_string(device) + ": " + ldmq_error_text(error) +
                                  " (built for " + ldmq_architectures() + ")"));
  }

 private:
  void check_pictures() const {
    const ldmq_product& p = product_;
    require(p.samples >= 0 && p.height >= 1 && p.width >= 1 && p.out_height >= 1 && p.out_width >= 1,
            "pictures must have a height and a width");
    require(p.kernel_height >= 1 && p.kernel_width >= 1 && p.stride_height >= 1 && p.stride_width >= 1 &&
                p.dilation_height >= 1 && p.dilation_width >= 1,
            "kernel size, stride and dilation must be 1 or more");
    require(p.pad_top >= 0 && p.pad_left >= 0, "padding must be 0 or more");
    require(p.samples <= INT32_MAX && p.out_height <= INT32_MAX && p.out_width <= INT32_MAX, "sizes are too large");
    require(p.rows == p.samples * p.out_height * p.out_width, "rows must be samples * out_height * out_width");
    int64_t pixels = p.samples;
    const bool overflows = __builtin_mul_overflow(pixels, p.height, &pixels) ||
                           __builtin_mul_overflow(pixels, p.width, &pixels) || pixels > INT32_MAX;
    require(!overflows, "there are too many pixels");
  }

  void require(bool holds, const std::string& why) const {
    if (!holds) throw py::value_error(text(why));
  }

  std::string text(const std::string& what) const {
    return "ldmq cuda " + op_ + " of (rows=" + std::to_string(product_.rows) + ", columns=" +
           std::to_string(product_.columns) + ", depth=" + std::to_string(product_.depth) + "): " + what;
  }

  const ldmq_product& product_;
  std::string op_;
};

const void* address(uintptr_t value) { return reinterpret_cast<const void*>(value); }

void run_product(int tile, uintptr_t x, uintptr_t weight, uintptr_t multiplier, uintptr_t x_scale, int64_t scale_count,
                 int64_t scale_rows, uintptr_t weight_scale, uintptr_t bias, const std::string& bias_dtype,
                 uintptr_t sample_bias, uintptr_t residual, uintptr_t out, const std::string& out_dtype,
                 uintptr_t out_inv_scale, int64_t out_inv_scale_count, int64_t rows, int64_t columns, int64_t depth,
                 const py::tuple& pictures, int device, uintptr_t stream) {
  ldmq_product product = {};
  const ProductCall call(product, tile);
  product.x = static_cast<const int8_t*>(address(x));
  product.weight = address(weight);
  product.multiplier = static_cast<const uint8_t*>(address(multiplier));
  product.x_scale = static_cast<const float*>(address(x_scale));
  product.scale_rows = scale_rows;
  product.weight_scale = static_cast<const float*>(address(weight_scale));
  product.bias = {address(bias), parse_dtype("ldmq cuda bias", bias_dtype)};
  product.sample_bias = address(sample_bias);
  product.residual = address(residual);
  product.out_inv_scale = static_cast<const float*>(address(out_inv_scale));
  product.out_inv_scale_count = out_inv_scale_count;
  product.out = reinterpret_cast<void*>(out);
  product.out_dtype = out_dtype == "int8" ? LDMQ_INT8 : parse_dtype("ldmq cuda out", out_dtype);
  product.rows = rows;
  product.columns = columns;
  product.depth = depth;
  if (!pictures.empty()) {
    if (pictures.size() != 14) throw py::value_error("ldmq cuda: pictures are 14 numbers");
    int64_t* const sizes[] = {&product.samples, &product.height, &product.width, &product.out_height,
                              &product.out_width};
    int* const steps[] = {&product.kernel_height, &product.kernel_width, &product.stride_height,
                          &product.stride_width, &product.dilation_height, &product.dilation_width,
                          &product.pad_top, &product.pad_left, &product.upsample};
    for (size_t i = 0; i < 5; ++i) *sizes[i] = pictures[i].cast<int64_t>();
    for (size_t i = 0; i < 9; ++i) *steps[i] = pictures[i + 5].cast<int>();
  }
  call.check(tile, scale_count);
  call.run(tile, device, stream);
}

}  // namespace

void define_products(py::module_& module) {
  module.def("tiles", &tiles, "(op, family, rows, columns, depth, stages, cluster, cooperative) of every tile.");
  module.def("run_product", &run_product, py::kw_only(), py::arg("tile"), py::arg("x"), py::arg("weight"),
             py::arg("multiplier"), py::arg("x_scale"), py::arg("scale_count"), py::arg("scale_rows"),
             py::arg("weight_scale"), py::arg("bias"), py::arg("bias_dtype"), py::arg("sample_bias"),
             py::arg("residual"), py::arg("out"), py::arg("out_dtype"), py::arg("out_inv_scale"),
             py::arg("out_inv_scale_count"), py::arg("rows"), py::arg("columns"), py::arg("depth"),
             py::arg("pictures"), py::arg("device"), py::arg("stream"));
}

}  // namespace ldmq::binding
