"""The native module (csrc/module.cpp)."""

from typing import Any

def build_info() -> dict[str, Any]: ...
