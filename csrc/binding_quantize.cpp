// float to int8 or FP8 in Python.
#include "binding.h"

namespace ldmq::binding {

namespace {

void quantize_static(uintptr_t x, const std::string& dtype, uintptr_t inv_scale, int64_t inv_scale_count,
                     uintptr_t q, const std::string& q_dtype, int64_t rows, int64_t channels, int device,
                     uintptr_t stream, bool dependent) {
  const Call call("quantize_static", dtype, {{"rows", rows}, {"channels", channels}}, device, stream, dependent);
  call.check_factors("inv_scale", inv_scale_count);
  const void* input = call.input(x);
  const auto* factors = call.required<const float>("inv_scale", inv_scale);
  auto* output = call.required<uint8_t>("q", q);
  const ldmq_dtype quantized = call.quantized(q_dtype);
  call.run([&] {
    return ldmq_quantize_static(input, call.dtype(), factors, inv_scale_count, output, quantized, rows, channels,
                                call.device(), call.stream(), call.dependent());
  });
}

void quantize_per_token(uintptr_t x, const std::string& dtype, uintptr_t inv_smooth, uintptr_t q,
                        const std::string& q_dtype, uintptr_t scale, int64_t rows, int64_t channels, int device,
                        uintptr_t stream, bool dependent) {
  const Call call("quantize_per_token", dtype, {{"rows", rows}, {"channels", channels}}, device, stream, dependent);
  const void* input = call.input(x);
  const auto* factors = call.optional<const float>("inv_smooth", inv_smooth);
  auto* output = call.required<uint8_t>("q", q);
  const ldmq_dtype quantized = call.quantized(q_dtype);
  auto* scales = call.required<float>("scale", scale);
  call.run([&] {
    return ldmq_quantize_per_token(input, call.dtype(), factors, output, quantized, scales, rows, channels,
                                   call.device(), call.stream(), call.dependent());
  });
}

void quantize_per_sample(uintptr_t x, const std::string& dtype, uintptr_t inv_smooth, uintptr_t q,
                         const std::string& q_dtype, uintptr_t scale, uintptr_t absmax, int64_t samples,
                         int64_t pixels, int64_t channels, int device, uintptr_t stream, bool dependent) {
  const Call call("quantize_per_sample", dtype, {{"samples", samples}, {"pixels", pixels}, {"channels", channels}},
                  device, stream, dependent);
  const void* input = call.input(x);
  const auto* factors = call.optional<const float>("inv_smooth", inv_smooth);
  auto* output = call.required<uint8_t>("q", q);
  const ldmq_dtype quantized = call.quantized(q_dtype);
  auto* scales = call.required<float>("scale", scale);
  auto* scratch = call.required<uint32_t>("absmax", absmax);
  call.run([&] {
    return ldmq_quantize_per_sample(input, call.dtype(), factors, output, quantized, scales, scratch, samples, pixels,
                                    channels, call.device(), call.stream(), call.dependent());
  });
}

}  // namespace

void define_quantize(py::module_& module) {
  module.def("quantize_static", &quantize_static, "As ldmq_quantize_static.", py::arg("x"), py::arg("dtype"),
             py::arg("inv_scale"), py::arg("inv_scale_count"), py::arg("q"), py::arg("q_dtype"), py::arg("rows"),
             py::arg("channels"), py::arg("device"), py::arg("stream"), py::arg("dependent"));
  module.def("quantize_per_token", &quantize_per_token, "As ldmq_quantize_per_token.", py::arg("x"), py::arg("dtype"),
             py::arg("inv_smooth"), py::arg("q"), py::arg("q_dtype"), py::arg("scale"), py::arg("rows"),
             py::arg("channels"), py::arg("device"), py::arg("stream"), py::arg("dependent"));
  module.def("quantize_per_sample", &quantize_per_sample, "As ldmq_quantize_per_sample.", py::arg("x"),
             py::arg("dtype"), py::arg("inv_smooth"), py::arg("q"), py::arg("q_dtype"), py::arg("scale"),
             py::arg("absmax"), py::arg("samples"), py::arg("pixels"), py::arg("channels"), py::arg("device"),
             py::arg("stream"), py::arg("dependent"));
}

}  // namespace ldmq::binding
