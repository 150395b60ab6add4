// The C library in Python.
#include "binding.h"

namespace {

pybind11::tuple versions() {
  int driver = 0, build = 0;
  if (const int error = ldmq_versions(&driver, &build)) throw std::runtime_error(ldmq_error_text(error));
  return pybind11::make_tuple(driver, build);
}

}  // namespace

PYBIND11_MODULE(_binding, module) {
  using namespace ldmq::binding;
  module.doc() = "CUDA kernels of ldmq_kernels: addresses are integers, 0 is null; dtypes go by torch's names.";
  module.def("architectures", &ldmq_architectures);
  module.def("versions", &versions, "CUDA of the driver, 0 without one, and of this build, such as 13000.");
  py::register_local_exception<Refusal>(module, "Refusal");  // another copy of this module has a class of its own
  define_quantize(module);
  define_gemm(module);
  define_producers(module);
}
