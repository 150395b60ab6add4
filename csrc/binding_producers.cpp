// Producers with the quantization of their result, in Python.
#include "binding.h"

namespace ldmq::binding {

namespace {

// Of one call; checks the factors, and that what a measured scale needs is there, or nothing of it.
ldmq_quantization quantization(const Call& call, uintptr_t inv_scale, int64_t inv_scale_count, uintptr_t inv_smooth,
                               uintptr_t q, const std::string& q_dtype, uintptr_t scale) {
  ldmq_quantization to = {};
  to.inv_scale = call.optional<const float>("inv_scale", inv_scale);
  if (to.inv_scale) {
    call.check_factors("inv_scale", inv_scale_count);
    to.inv_scale_count = inv_scale_count;
  } else {
    to.inv_smooth = call.optional<const float>("inv_smooth", inv_smooth);
    to.scale = call.required<float>("scale", scale);
  }
  to.q = call.required<uint8_t>("q", q);
  to.q_dtype = call.quantized(q_dtype);
  return to;
}

ldmq_added added(const Call& call, const char* name, uintptr_t address, const std::string& dtype) {
  const ldmq_dtype parsed = parse_dtype(std::string("ldmq cuda ") + name, dtype);
  return {call.optional<const uint8_t>(name, address, element_size(parsed)), parsed};
}

std::string of_sizes(const char* op, const Sizes& sizes) {
  std::string text = std::string("ldmq cuda ") + op + " of (";
  for (const auto& [name, size] : sizes) {
    text += (name == sizes.front().first ? "" : ", ") + std::string(name) + "=" + std::to_string(size);
  }
  return text + "): ";
}

// A group norm of these sizes, checked.
ldmq_group_norm group_norm(int64_t samples, int64_t pixels, int64_t channels, int64_t groups, bool per_token) {
  const std::string call = of_sizes("group_norm_silu_quantize", {{"samples", samples}, {"pixels", pixels},
                                                                 {"channels", channels}, {"groups", groups}});
  if (groups < 1 || channels % groups != 0) throw py::value_error(call + "groups must divide channels");
  if (samples > INT32_MAX || pixels > LDMQ_MAX_PIXELS) {
    throw Refusal(call + "pixels must be at most " + std::to_string(LDMQ_MAX_PIXELS));
  }
  if (per_token && channels > LDMQ_MAX_PIXEL_CHANNELS) {
    throw Refusal(call + "channels must be at most " + std::to_string(LDMQ_MAX_PIXEL_CHANNELS) +
                  " with a scale for each pixel");
  }
  ldmq_group_norm norm = {};
  norm.samples = samples;
  norm.pixels = pixels;
  norm.channels = channels;
  norm.groups = groups;
  norm.per_token = per_token;
  return norm;
}

int64_t group_norm_scratch(bool has_inv_scale, bool per_token, int64_t samples, int64_t pixels, int64_t channels,
                           int64_t groups, int device) {
  const Call call("group_norm_scratch", "float32", {{"samples", samples}, {"pixels", pixels}, {"channels", channels}},
                  device, 0);
  ldmq_group_norm norm = group_norm(samples, pixels, channels, groups, per_token && !has_inv_scale);
  const float some = 1.0f;
  norm.to.inv_scale = has_inv_scale ? &some : nullptr;
  int64_t bytes = 0;
  call.run([&] { return ldmq_group_norm_scratch(&norm, call.device(), &bytes); });
  return bytes;
}

void group_norm_silu_quantize(uintptr_t x, const std::string& dtype, uintptr_t weight, const std::string& weight_dtype,
                              uintptr_t bias, const std::string& bias_dtype, int64_t groups, double eps, bool silu,
                              uintptr_t inv_scale, int64_t inv_scale_count, uintptr_t inv_smooth, bool per_token,
                              uintptr_t q, const std::string& q_dtype, uintptr_t scale, uintptr_t scratch,
                              int64_t samples, int64_t pixels, int64_t channels, int device, uintptr_t stream) {
  const Call call("group_norm_silu_quantize", dtype,
                  {{"samples", samples}, {"pixels", pixels}, {"channels", channels}}, device, stream);
  ldmq_group_norm norm = group_norm(samples, pixels, channels, groups, per_token && inv_scale == 0);
  norm.x = call.input(x);
  norm.dtype = call.dtype();
  norm.weight = added(call, "weight", weight, weight_dtype);
  norm.bias = added(call, "bias", bias, bias_dtype);
  norm.eps = static_cast<float>(eps);
  norm.silu = silu;
  norm.to = quantization(call, inv_scale, inv_scale_count, inv_smooth, q, q_dtype, scale);
  void* memory = call.required<uint64_t>("scratch", scratch);
  call.run([&] { return ldmq_group_norm_silu_quantize(&norm, memory, call.device(), call.stream()); });
}

// Refuses a row that is too long for a scale of its own.
void check_measured(const char* op, const ldmq_quantization& to, int64_t rows, int64_t channels) {
  if (to.inv_scale || channels <= LDMQ_MAX_GELU_CHANNELS) return;
  throw Refusal(of_sizes(op, {{"rows", rows}, {"channels", channels}}) + "channels must be at most " +
                std::to_string(LDMQ_MAX_GELU_CHANNELS) + " with a scale for each row");
}

void gelu_quantize(uintptr_t x, const std::string& dtype, bool tanh, uintptr_t inv_scale, int64_t inv_scale_count,
                   uintptr_t inv_smooth, uintptr_t q, const std::string& q_dtype, uintptr_t scale, int64_t rows,
                   int64_t channels, int device, uintptr_t stream, bool dependent) {
  const Call call("gelu_quantize", dtype, {{"rows", rows}, {"channels", channels}}, device, stream, dependent);
  const void* input = call.input(x);
  const ldmq_quantization to = quantization(call, inv_scale, inv_scale_count, inv_smooth, q, q_dtype, scale);
  check_measured("gelu_quantize", to, rows, channels);
  call.run([&] {
    return ldmq_gelu_quantize(input, call.dtype(), tanh, &to, rows, channels, call.device(), call.stream(),
                              call.dependent());
  });
}

void geglu_quantize(uintptr_t x, const std::string& dtype, uintptr_t inv_scale, int64_t inv_scale_count,
                    uintptr_t inv_smooth, uintptr_t q, const std::string& q_dtype, uintptr_t scale, int64_t rows,
                    int64_t channels, int device, uintptr_t stream, bool dependent) {
  const Call call("geglu_quantize", dtype, {{"rows", rows}, {"channels", channels}}, device, stream, dependent);
  const void* input = call.input(x);
  const ldmq_quantization to = quantization(call, inv_scale, inv_scale_count, inv_smooth, q, q_dtype, scale);
  check_measured("geglu_quantize", to, rows, channels);
  call.run([&] {
    return ldmq_geglu_quantize(input, call.dtype(), &to, rows, channels, call.device(), call.stream(),
                               call.dependent());
  });
}

}  // namespace

void define_producers(py::module_& module) {
  module.def("group_norm_scratch", &group_norm_scratch, "The bytes of scratch that group_norm_silu_quantize takes.",
             py::arg("has_inv_scale"), py::arg("per_token"), py::arg("samples"), py::arg("pixels"),
             py::arg("channels"), py::arg("groups"), py::arg("device"));
  module.def("group_norm_silu_quantize", &group_norm_silu_quantize, "As ldmq_group_norm_silu_quantize.", py::arg("x"),
             py::arg("dtype"), py::arg("weight"), py::arg("weight_dtype"), py::arg("bias"), py::arg("bias_dtype"),
             py::arg("groups"), py::arg("eps"), py::arg("silu"), py::arg("inv_scale"), py::arg("inv_scale_count"),
             py::arg("inv_smooth"), py::arg("per_token"), py::arg("q"), py::arg("q_dtype"), py::arg("scale"),
             py::arg("scratch"), py::arg("samples"), py::arg("pixels"), py::arg("channels"), py::arg("device"),
             py::arg("stream"));
  module.def("gelu_quantize", &gelu_quantize, "As ldmq_gelu_quantize.", py::arg("x"), py::arg("dtype"), py::arg("tanh"),
             py::arg("inv_scale"), py::arg("inv_scale_count"), py::arg("inv_smooth"), py::arg("q"), py::arg("q_dtype"),
             py::arg("scale"), py::arg("rows"), py::arg("channels"), py::arg("device"), py::arg("stream"),
             py::arg("dependent"));
  module.def("geglu_quantize", &geglu_quantize, "As ldmq_geglu_quantize.", py::arg("x"), py::arg("dtype"),
             py::arg("inv_scale"), py::arg("inv_scale_count"), py::arg("inv_smooth"), py::arg("q"), py::arg("q_dtype"),
             py::arg("scale"), py::arg("rows"), py::arg("channels"), py::arg("device"), py::arg("stream"),
             py::arg("dependent"));
}

}  // namespace ldmq::binding
