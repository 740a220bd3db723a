"""The linear combination of tensors, the only arithmetic of a sampling run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch


def combine(terms: Sequence[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """``sum coef * tensor`` of tensors of one shape.

    The result has the promoted dtype of the tensors; 16-bit ones accumulate in fp32 and are rounded once. One pass a
    term and no read of a device value by the host.
    """
    dtypes = {tensor.dtype for tensor, _ in terms}
    dtype = dtypes.pop() if len(dtypes) == 1 else reduce(torch.promote_types, (t.dtype for t, _ in terms))
    work = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    (first, coef), *rest = terms
    if first.dtype != work:
        first = first.to(work)
    if coef == 1.0 and rest:  # saves a pass: x + c y is one operator
        (second, factor), *rest = rest
        total = torch.add(first, second, alpha=factor)
    else:
        total = torch.mul(first, coef)
    for tensor, factor in rest:
        total.add_(tensor, alpha=factor)
    return total if dtype == work else total.to(dtype)
