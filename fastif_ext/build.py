"""Facts about the native build."""

from __future__ import annotations

from typing import Any

import torch  # noqa: F401  loads libtorch, which the native module needs

try:
    import fastif_ext._C as _C
except ImportError as error:
    raise ImportError(
        "fastif_ext's native module could not be loaded. Build it in this environment with "
        "`pip install --no-build-isolation .` (needs torch >= 2.11); inside the source tree "
        "Python may be importing the unbuilt sources."
    ) from error


def build_info() -> dict[str, Any]:
    """What was built, and what it runs on.

    Returns:
        A dict: ``version``, ``built_with_torch``, ``stable_abi`` (the torch versions that can load
        this binary), ``compiler``, ``cpu`` (the SIMD level in use here), ``cuda`` (whether CUDA
        kernels were built), ``cuda_reason`` (why not, and what to do) and ``cuda_architectures``.

    Example:
        >>> import fastif_ext as fi
        >>> info = fi.build_info()
        >>> info["cuda"] == (info["cuda_reason"] is None) == bool(info["cuda_architectures"])
        True
    """
    return dict(_C.build_info())
