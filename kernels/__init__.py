"""The arithmetic on tensors that solvers and guidance share: linear combinations, and rules with norms of each sample.

Every function is defined in plain torch (:mod:`.reference`) and may be computed by something faster (:mod:`.dispatch`).
docs/kernels.md says how, and how fast.
"""

from .combine import combine, table
from .dispatch import backend, fits, fused
from .guidance import Rule, available, guided, products

__all__ = ["Rule", "available", "backend", "combine", "fits", "fused", "guided", "products", "table"]
