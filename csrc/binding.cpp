// The C library in Python.
#include "binding.h"

namespace {

std::tuple<int, int> versions() {
  int driver = 0, build = 0;
  if (const int error = ldmq_versions(&driver, &build)) throw std::runtime_error(ldmq_error_text(error));
  return {driver, build};
}

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_binding",
                          "CUDA kernels of ldmq_kernels: addresses are integers, 0 is null; "
                          "dtypes go by torch's names.",
                          -1};

}  // namespace

PyMODINIT_FUNC PyInit__binding() {
  using namespace ldmq::binding;
  try {
    py::Reference made(PyModule_Create(&definition));
    py::module_ module(made.get());
    module.def("architectures", &ldmq_architectures, "What this build holds machine code for, such as 80;90a.");
    module.def("versions", &versions, "CUDA of the driver, 0 without one, and of this build, such as 13000.");
    define_quantize(module);
    define_gemm(module);
    define_producers(module);
    return made.release();
  } catch (const py::Error&) {
    return nullptr;
  }
}
