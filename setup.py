"""Builds fastif_ext._C: csrc/ behind libtorch's stable ABI, in a pybind11 module."""

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = "0.1.0"
OLDEST_TORCH = (2, 11)
INSTALL = "pip install --no-build-isolation ."

try:
    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError as missing:
    sys.exit(
        f"fastif_ext is built against the torch it will run in, but this build sees no "
        f"{missing.name}.\nInstall torch >= 2.11, pybind11, ninja and setuptools first, then run:\n"
        f"    {INSTALL}\n"
        f"(A plain `pip install .` builds in an isolated environment, which has no torch.)"
    )

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
    sys.exit(f"fastif_ext needs torch >= 2.11, found {torch.__version__}: upgrade torch first.")

if os.environ.get("FASTIF_CUDA") == "1":
    sys.exit(
        "FASTIF_CUDA=1: this version of fastif_ext has CPU kernels only. "
        "Unset FASTIF_CUDA to build it for the CPU."
    )

# Target ABI: torch 2.11. One binary loads in every later torch.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fopenmp-simd",  # reductions in `#pragma omp simd`; no OpenMP runtime is linked
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",  # 64-byte vectors are only passed to inlined functions
]


def sources() -> list[str]:
    """The one list that CMakeLists.txt reads too; native tests are listed there, not here."""
    return (ROOT / "csrc" / "sources.txt").read_text().split()


extension = CppExtension(
    "fastif_ext._C",
    sources(),
    include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
    extra_compile_args={
        "cxx": [
            *CXX_FLAGS,
            STABLE_ABI,
            f'-DFASTIF_VERSION="{VERSION}"',
            f'-DFASTIF_BUILT_WITH_TORCH="{torch.__version__}"',
        ]
    },
)

setup(
    version=VERSION,
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
    # A fixed folder lets ninja find its objects again: a repeated install recompiles nothing.
    options={"build_ext": {"build_temp": "build/objects"}},
)
