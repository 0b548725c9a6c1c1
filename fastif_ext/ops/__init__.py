"""The operators as documented Python functions: the only place that calls torch.ops.fastif_ext.

One file per family, each function with its meta ("fake") kernel beside it. Importing this package
loads the native module, which registers the operators.
"""

import fastif_ext._C  # noqa: F401  registers torch.ops.fastif_ext
from fastif_ext.ops.hvp import LissaStep, lissa_update_

__all__ = ["LissaStep", "lissa_update_"]
