// The Python module fastif_ext._C. Importing it registers the operators (library.cpp) with torch's
// dispatcher; tensors cross there, so this file needs pybind11 only.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

const char* simd_level() {
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512cd")) {
    return "x86-64-v4";
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "x86-64-v3";
  return "x86-64";
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
  info["cpu"] = simd_level();
  info["cuda"] = false;
  info["cuda_reason"] = "this version of fastif_ext has CPU kernels only";
  info["cuda_architectures"] = py::list();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of fastif_ext: importing it registers torch.ops.fastif_ext.*";
  m.def("build_info", &build_info);
}
