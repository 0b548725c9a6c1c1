"""A pure-PyTorch twin of every operator: the oracle in tests and the baseline in benchmarks.

The twins follow the definitions literally and share no code with the kernels.
"""

from fastif_ext.reference.hvp import lissa_update_

__all__ = ["lissa_update_"]
