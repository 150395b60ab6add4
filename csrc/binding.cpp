// The C library in Python: addresses come as integers, each argument is checked before anything is launched.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ldmq_cuda.h"

namespace py = pybind11;

namespace {

using Sizes = std::vector<std::pair<const char*, int64_t>>;

ldmq_dtype parse_dtype(const std::string& op, const std::string& dtype) {
  if (dtype == "float32") return LDMQ_FLOAT32;
  if (dtype == "float16") return LDMQ_FLOAT16;
  if (dtype == "bfloat16") return LDMQ_BFLOAT16;
  throw py::value_error(op + ": dtype is " + dtype + ", must be float32, float16 or bfloat16");
}

int64_t element_size(ldmq_dtype dtype) { return dtype == LDMQ_FLOAT32 ? 4 : 2; }

// One call: what it is named in errors, where it runs, and the checks that every op shares.
class Call {
 public:
  Call(const char* op, std::string dtype, Sizes sizes, int device, uintptr_t stream)
      : op_(std::string("ldmq cuda ") + op), dtype_name_(std::move(dtype)), sizes_(std::move(sizes)),
        device_(device), stream_(reinterpret_cast<void*>(stream)), dtype_(parse_dtype(op_, dtype_name_)) {
    if (device < 0) throw py::value_error(op_ + ": device is " + std::to_string(device) + ", must be 0 or more");
    for (const auto& [name, size] : sizes_) {
      if (size < 0) throw py::value_error(op_ + ": " + name + " is " + std::to_string(size) + ", must be 0 or more");
      if (__builtin_mul_overflow(elements_, size, &elements_) || elements_ > INT64_MAX / 4) {
        throw py::value_error(op_ + ": the sizes " + shape() + " overflow a 64-bit address");
      }
    }
    const auto& [name, channels] = sizes_.back();
    if (channels > LDMQ_MAX_CHANNELS) {
      throw py::value_error(op_ + ": " + name + " is " + std::to_string(channels) + ", must be at most " +
                            std::to_string(LDMQ_MAX_CHANNELS));
    }
  }

  ldmq_dtype dtype() const { return dtype_; }
  int device() const { return device_; }
  void* stream() const { return stream_; }

  template <typename T>
  T* required(const char* name, uintptr_t address, int64_t alignment = sizeof(T)) const {
    if (address == 0 && elements_ > 0) throw py::value_error(op_ + ": " + name + " is null, for sizes " + shape());
    return optional<T>(name, address, alignment);
  }

  template <typename T>
  T* optional(const char* name, uintptr_t address, int64_t alignment = sizeof(T)) const {
    if (address % alignment != 0) {
      throw py::value_error(op_ + ": " + name + " is not aligned to " + std::to_string(alignment) + " bytes");
    }
    return reinterpret_cast<T*>(address);
  }

  const void* input(uintptr_t address) const { return required<const uint8_t>("x", address, element_size(dtype_)); }

  void check_factors(const char* name, int64_t count) const {
    const int64_t channels = sizes_.back().second;
    if (count == 1 || count == channels) return;
    throw py::value_error(op_ + ": " + name + " has " + std::to_string(count) + " elements, must have 1 or " +
                          std::to_string(channels));
  }

  template <typename Function>
  void run(Function function) const {
    int error = 0;
    {
      py::gil_scoped_release release;
      error = function();
    }
    if (error != 0) {
      throw std::runtime_error(op_ + " of " + dtype_name_ + " " + shape() + " on cuda:" + std::to_string(device_) +
                               " failed: " + ldmq_error_text(error) + " (built for " + ldmq_architectures() + ")");
    }
  }

 private:
  std::string shape() const {
    std::string text = "(";
    for (const auto& [name, size] : sizes_) {
      text += (text.size() > 1 ? ", " : "") + std::string(name) + "=" + std::to_string(size);
    }
    return text + ")";
  }

  std::string op_, dtype_name_;
  Sizes sizes_;
  int device_;
  void* stream_;
  ldmq_dtype dtype_;
  int64_t elements_ = 1;
};

void quantize_static(uintptr_t x, const std::string& dtype, uintptr_t reciprocal, int64_t reciprocal_count,
                     uintptr_t q, int64_t rows, int64_t channels, int device, uintptr_t stream) {
  const Call call("quantize_static", dtype, {{"rows", rows}, {"channels", channels}}, device, stream);
  call.check_factors("reciprocal", reciprocal_count);
  const void* input = call.input(x);
  const auto* factors = call.required<const float>("reciprocal", reciprocal);
  auto* output = call.required<int8_t>("q", q);
  call.run([&] {
    return ldmq_quantize_static(input, call.dtype(), factors, reciprocal_count, output, rows, channels,
                                call.device(), call.stream());
  });
}

void quantize_per_token(uintptr_t x, const std::string& dtype, uintptr_t smoothing, uintptr_t q, uintptr_t scale,
                        int64_t rows, int64_t channels, int device, uintptr_t stream) {
  const Call call("quantize_per_token", dtype, {{"rows", rows}, {"channels", channels}}, device, stream);
  const void* input = call.input(x);
  const auto* factors = call.optional<const float>("smoothing", smoothing);
  auto* output = call.required<int8_t>("q", q);
  auto* scales = call.required<float>("scale", scale);
  call.run([&] {
    return ldmq_quantize_per_token(input, call.dtype(), factors, output, scales, rows, channels, call.device(),
                                   call.stream());
  });
}

void quantize_per_sample(uintptr_t x, const std::string& dtype, uintptr_t smoothing, uintptr_t q, uintptr_t scale,
                         uintptr_t absmax, int64_t samples, int64_t pixels, int64_t channels, int device,
                         uintptr_t stream) {
  const Call call("quantize_per_sample", dtype, {{"samples", samples}, {"pixels", pixels}, {"channels", channels}},
                  device, stream);
  const void* input = call.input(x);
  const auto* factors = call.optional<const float>("smoothing", smoothing);
  auto* output = call.required<int8_t>("q", q);
  auto* scales = call.required<float>("scale", scale);
  auto* scratch = call.required<uint32_t>("absmax", absmax);
  call.run([&] {
    return ldmq_quantize_per_sample(input, call.dtype(), factors, output, scales, scratch, samples, pixels, channels,
                                    call.device(), call.stream());
  });
}

}  // namespace

PYBIND11_MODULE(_binding, module) {
  module.doc() = "CUDA kernels of ldmq_kernels: addresses are integers, 0 is null; dtypes go by torch's names.";
  module.def("architectures", &ldmq_architectures);
  module.def("quantize_static", &quantize_static, py::kw_only(), py::arg("x"), py::arg("dtype"), py::arg("reciprocal"),
             py::arg("reciprocal_count"), py::arg("q"), py::arg("rows"), py::arg("channels"), py::arg("device"),
             py::arg("stream"));
  module.def("quantize_per_token", &quantize_per_token, py::kw_only(), py::arg("x"), py::arg("dtype"),
             py::arg("smoothing"), py::arg("q"), py::arg("scale"), py::arg("rows"), py::arg("channels"),
             py::arg("device"), py::arg("stream"));
  module.def("quantize_per_sample", &quantize_per_sample, py::kw_only(), py::arg("x"), py::arg("dtype"),
             py::arg("smoothing"), py::arg("q"), py::arg("scale"), py::arg("absmax"), py::arg("samples"),
             py::arg("pixels"), py::arg("channels"), py::arg("device"), py::arg("stream"));
}
