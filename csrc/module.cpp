// The Python module fastif_ext._C. Importing it registers the operators (library.cpp) with torch's
// dispatcher; tensors cross there, so this file needs pybind11 only.
#include <pybind11/pybind11.h>

#include "common/clones.h"

namespace py = pybind11;

namespace {

const char* cpu_level() {
#ifdef FASTIF_X86_LEVELS
  switch (fastif::simd_level()) {
    case fastif::SimdLevel::kV4:
      return "x86-64-v4";
    case fastif::SimdLevel::kV3:
      return "x86-64-v3";
    default:
      return "x86-64";
  }
#elif defined(__aarch64__)
  return "aarch64";
#else
  return "generic";
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = FASTIF_VERSION;
  info["built_with_torch"] = FASTIF_BUILT_WITH_TORCH;
  info["stable_abi"] = "torch >= 2.11";
  info["compiler"] =
#if defined(__clang__)
      "clang " __clang_version__;
#else
      "gcc " __VERSION__;
#endif
  info["cpu"] = cpu_level();
#ifdef FASTIF_CUDA
  info["cuda"] = true;
  info["cuda_reason"] = py::none();
  info["cuda_architectures"] = py::str(FASTIF_ARCHITECTURES).attr("split")(";");
#else
  info["cuda"] = false;
  info["cuda_reason"] = FASTIF_NO_CUDA;
  info["cuda_architectures"] = py::list();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of fastif_ext: importing it registers torch.ops.fastif_ext.*";
  m.def("build_info", &build_info);
}
