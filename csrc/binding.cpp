// The C library in Python.
#include "binding.h"

PYBIND11_MODULE(_binding, module) {
  using namespace ldmq::binding;
  module.doc() = "CUDA kernels of ldmq_kernels: addresses are integers, 0 is null; dtypes go by torch's names.";
  module.def("architectures", &ldmq_architectures);
  py::register_local_exception<Refusal>(module, "Refusal");  // another copy of this module has a class of its own
  define_quantize(module);
  define_products(module);
  define_producers(module);
}
