// What the functions of the module share: how arguments are checked, and how CUDA's errors become exceptions.
// Addresses come as integers, 0 is null; dtypes go by torch's names. Everything is checked before a launch.
#pragma once

#include "stable_abi.h"

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ldmq_cuda.h"

namespace ldmq::binding {

namespace py = python;

using python::Refusal;

using Sizes = std::vector<std::pair<const char*, int64_t>>;

inline ldmq_dtype parse_dtype(const std::string& op, const std::string& dtype) {
  if (dtype == "float32") return LDMQ_FLOAT32;
  if (dtype == "float16") return LDMQ_FLOAT16;
  if (dtype == "bfloat16") return LDMQ_BFLOAT16;
  throw py::value_error(op + ": dtype is " + dtype + ", must be float32, float16 or bfloat16");
}

inline ldmq_dtype parse_quantized(const std::string& op, const std::string& dtype) {
  if (dtype == "int8") return LDMQ_INT8;
  if (dtype == "float8_e4m3fn") return LDMQ_FLOAT8;
  throw py::value_error(op + ": q_dtype is " + dtype + ", must be int8 or float8_e4m3fn");
}

inline int64_t element_size(ldmq_dtype dtype) { return dtype == LDMQ_FLOAT32 ? 4 : 2; }

// One call: what it is named in errors, where it runs, and the checks that every op shares.
class Call {
 public:
  Call(const char* op, std::string dtype, Sizes sizes, int device, uintptr_t stream, bool dependent = false)
      : op_(std::string("ldmq cuda ") + op), dtype_name_(std::move(dtype)), sizes_(std::move(sizes)),
        device_(device), stream_(reinterpret_cast<void*>(stream)), dependent_(dependent),
        dtype_(parse_dtype(op_, dtype_name_)) {
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
  int dependent() const { return dependent_; }

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

  ldmq_dtype quantized(const std::string& dtype) const { return parse_quantized(op_, dtype); }

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
  bool dependent_;
  ldmq_dtype dtype_;
  int64_t elements_ = 1;
};

void define_quantize(py::module_& module);
void define_gemm(py::module_& module);
void define_producers(py::module_& module);

}  // namespace ldmq::binding
