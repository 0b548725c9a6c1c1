"""The package as installed: what was built, the public names, the one source list."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastif_ext as fi

ROOT = Path(__file__).parent.parent


def test_source_list_is_what_lies_in_csrc() -> None:
    listed = (ROOT / "csrc" / "sources.txt").read_text().split()
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".cpp", ".cu") and path.parent.name != "tests"
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == found


def test_kernels_include_no_torch_header() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        binding = ("torch_op.h", "run_on.h")  # what *_op.cpp files include
        if path.name.endswith(("_cpu.cpp", ".cu", ".h")) and path.name not in binding:
            assert "<torch/" not in path.read_text(), path


def test_build_info() -> None:
    info = fi.build_info()
    assert info["version"] == fi.__version__
    assert info["cpu"] in ("x86-64", "x86-64-v3", "x86-64-v4", "aarch64", "generic")
    assert info["cuda"] is (info["cuda_reason"] is None)
    assert info["cuda"] is bool(info["cuda_architectures"])
    assert info["built_with_torch"].split(".")[0] == "2"
    if torch.version.cuda is None:
        assert "is a build without CUDA" in info["cuda_reason"]


def test_every_operator_has_a_twin_and_a_fake_kernel() -> None:
    names = {
        name.removeprefix("fastif_ext::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fastif_ext::")
    }
    assert names
    for name in names:
        assert callable(getattr(fi.reference, name)), f"{name} has no pure-PyTorch twin"
        assert callable(getattr(fi.ops, name)), f"{name} has no public function"
        for key, there in (("CPU", True), ("CUDA", fi.build_info()["cuda"])):
            has = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastif_ext::{name}", key)
            assert has is there, f"{name} on {key}"
        fake = torch._library.simple_registry.singleton.find(f"fastif_ext::{name}").fake_impl
        assert fake.kernel is not None, f"{name} has no fake kernel"


def test_public_names_are_documented() -> None:
    for name in fi.__all__:
        thing = getattr(fi, name)
        assert inspect.getdoc(thing), f"fastif_ext.{name} has no docstring"
        if inspect.isfunction(thing):
            signature = inspect.signature(thing)
            assert signature.return_annotation is not inspect.Signature.empty, name
            assert all(
                p.annotation is not inspect.Parameter.empty for p in signature.parameters.values()
            ), name


MODULES = ["fastif_ext"] + [
    m.name
    for m in pkgutil.walk_packages(fi.__path__, "fastif_ext.")
    if not m.name.endswith(("._C", ".__main__"))
]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    torch.set_printoptions(profile="default")
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_public_functions_and_classes_have_an_example() -> None:
    for name in fi.__all__:
        thing = getattr(fi, name)
        is_operator = inspect.isfunction(thing) and not name.startswith("_")
        if is_operator:
            assert ">>>" in (inspect.getdoc(thing) or ""), f"fastif_ext.{name} has no example"


def test_build_without_torch_says_what_to_run(tmp_path: Path) -> None:
    """setup.py in an interpreter that cannot import torch."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No torch', name='torch')")
    done = subprocess.run(
        [sys.executable, str(ROOT / "setup.py"), "--version"],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "sees no torch" in done.stderr
    assert "pip install --no-build-isolation ." in done.stderr


@pytest.mark.parametrize(
    ("cuda_version", "message"),
    [("None", "is a build without CUDA"), ("'13.0'", "no CUDA toolkit was found")],
)
def test_cuda_build_that_cannot_be_says_why(
    tmp_path: Path, cuda_version: str, message: str
) -> None:
    """FASTIF_CUDA=1 with a torch without CUDA, and without a compiler for it."""
    (tmp_path / "torch.py").write_text(
        f"class version: cuda = {cuda_version}\n__version__ = '2.13.0'\n"
    )
    program = (
        "import pathlib, runpy, sys\n"
        "real = pathlib.Path.exists\n"
        "pathlib.Path.exists = lambda self: 'nvcc' not in self.name and real(self)\n"
        "sys.argv = ['setup.py', '--version']\n"
        f"runpy.run_path({str(ROOT / 'setup.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"FASTIF_CUDA": "1", "PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert "unset FASTIF_CUDA" in done.stderr


def test_cuda_tensor_without_cuda_build() -> None:
    if fi.build_info()["cuda"]:
        pytest.skip("this build has CUDA kernels")
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        p = torch.empty(2, 3, device="cuda")
        with pytest.raises(NotImplementedError, match="no CUDA kernels: torch .* reinstall"):
            fi.softmax_hvp(p, p)


def test_tensors_on_two_devices() -> None:
    with pytest.raises(ValueError, match="probs on cpu, z on meta"):
        fi.softmax_hvp(torch.empty(2, 3), torch.empty(2, 3, device="meta"))
