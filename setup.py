"""Builds fastif_ext._C: csrc/ behind libtorch's stable ABI, in a pybind11 module."""

import os
import re
import shutil
import subprocess
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
except ModuleNotFoundError as missing:
    sys.exit(
        f"fastif_ext is built against the torch it will run in, but this build sees no "
        f"{missing.name}.\nInstall torch >= 2.11, pybind11, ninja and setuptools first, then run:\n"
        f"    {INSTALL}\n"
        f"(A plain `pip install .` builds in an isolated environment, which has no torch.)"
    )

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
    sys.exit(f"fastif_ext needs torch >= 2.11, found {torch.__version__}: upgrade torch first.")

# The GPUs a CUDA build is for, unless TORCH_CUDA_ARCH_LIST says otherwise: A100, RTX 30 and 40,
# H100/H200, B200, RTX 50 and, through PTX, what comes after.
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

# Target ABI: torch 2.11. One binary loads in every later torch.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CXX_FLAGS = [
    "-O3",
    f"-ffile-prefix-map={Path(__file__).resolve().parent}=.",  # no path of this machine in messages
    "-std=c++20",
    "-fopenmp-simd",  # reductions in `#pragma omp simd`; no OpenMP runtime is linked
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",  # 64-byte vectors are only passed to inlined functions
]
# No fast-math: the kernels' contracts state their rounding.
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden"]


def sources(*, cuda: bool) -> list[str]:
    """The one list that CMakeLists.txt reads too; native tests are listed there, not here."""
    listed = (ROOT / "csrc" / "sources.txt").read_text().split()
    return [path for path in listed if cuda or not path.endswith(".cu")]


def cuda_home() -> Path | None:
    """The CUDA toolkit: a folder with the compiler and its headers.

    An nvcc on PATH may be a script or a link elsewhere, so folders are tried, not derived.
    """
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc is not None:
        places += [Path(nvcc).parents[1], Path(nvcc).resolve().parents[1]]
    places += ["/usr/local/cuda", *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    for place in places:
        if place and all(
            (Path(place) / f).exists() for f in ("bin/nvcc", "include/cuda_runtime.h")
        ):
            return Path(place)
    return None


def why_no_cuda() -> str | None:
    """None where CUDA kernels are to be built; else the reason, which build_info() repeats."""
    wish = os.environ.get("FASTIF_CUDA")
    if wish == "0":
        return "built with FASTIF_CUDA=0"
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a build without CUDA"
        remedy = "install a CUDA build of torch first"
    elif cuda_home() is None:
        reason = "no CUDA toolkit was found (nvcc and its headers)"
        remedy = f"install CUDA {torch.version.cuda} and set CUDA_HOME to it"
    else:
        return None
    if wish == "1":
        sys.exit(f"FASTIF_CUDA=1, but {reason}: {remedy}, or unset FASTIF_CUDA for a CPU build.")
    return f"{reason}; {remedy} and reinstall fastif_ext"


def architectures(home: Path) -> str:
    """TORCH_CUDA_ARCH_LIST, by default all of ARCHITECTURES that the compiler knows."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if given:
        return ";".join(re.split(r"[;\s]+", given.strip()))
    listing = [home / "bin" / "nvcc", "--list-gpu-arch"]
    known = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split()
    chosen = [a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}" in known]
    return ";".join(chosen) + "+PTX"


def extension(reason: str | None):
    """The extension module, with CUDA kernels where there is no reason against them."""
    flags = [
        *CXX_FLAGS,
        STABLE_ABI,
        f'-DFASTIF_VERSION="{VERSION}"',
        f'-DFASTIF_BUILT_WITH_TORCH="{torch.__version__}"',
    ]
    include = [str(ROOT / "csrc"), pybind11.get_include()]
    if reason is not None:
        from torch.utils.cpp_extension import CppExtension

        flags.append(f'-DFASTIF_NO_CUDA="{reason}"')
        return CppExtension(
            "fastif_ext._C",
            sources(cuda=False),
            include_dirs=include,
            extra_compile_args={"cxx": flags},
        )
    home = cuda_home()
    assert home is not None
    # torch reads both when its module is imported, or when the extension is made.
    os.environ["CUDA_HOME"] = str(home)
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(home)
    from torch.utils.cpp_extension import CUDAExtension

    flags += ["-DFASTIF_CUDA", f'-DFASTIF_ARCHITECTURES="{os.environ["TORCH_CUDA_ARCH_LIST"]}"']
    return CUDAExtension(
        "fastif_ext._C",
        sources(cuda=True),
        include_dirs=include,
        extra_compile_args={"cxx": flags, "nvcc": NVCC_FLAGS},
    )


no_cuda = why_no_cuda()
module = extension(no_cuda)

from torch.utils.cpp_extension import BuildExtension  # noqa: E402  after CUDA_HOME is settled

setup(
    version=VERSION,
    ext_modules=[module],
    cmdclass={"build_ext": BuildExtension},
    # A fixed folder lets ninja find its objects again: a repeated install recompiles nothing. Flags
    # of CPU and CUDA builds differ, so each has its own.
    options={"build_ext": {"build_temp": "build/objects" + ("" if no_cuda else "-cuda")}},
)
