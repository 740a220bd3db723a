"""How tensors lie in memory: what a kernel can treat as a line of elements, and what it must index."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def as_line(tensors: Sequence[torch.Tensor], rows: bool = False) -> bool:
    """Whether all are dense with the same strides, so that their n-th elements in memory belong together.

    ``rows``: the samples (first dimension) must be the outermost in memory too, for a number a sample.
    """
    first = tensors[0]
    strides = first.stride()
    if any(t.stride() != strides for t in tensors[1:]) or not dense(first):
        return False
    return not rows or first.shape[0] == 1 or strides[0] == max(strides)


def dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or overlaps, in any order of the dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def collapsed(tensors: Sequence[torch.Tensor]) -> tuple[list[int], list[list[int]]]:
    """``(sizes, strides of each tensor)`` with neighbouring dimensions merged where every tensor allows it.

    The first dimension stays by itself: it tells the samples apart.
    """
    shape = list(tensors[0].shape)
    strides = [list(t.stride()) for t in tensors]
    kept = [0] if shape else []
    for d in range(1, len(shape)):
        if shape[d] != 1:
            kept.append(d)
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in tensors]
    for d in kept:
        if len(sizes) > 1 and all(s[-1] == st[d] * shape[d] for s, st in zip(steps, strides)):
            sizes[-1] *= shape[d]
            for s, st in zip(steps, strides):
                s[-1] = st[d]
        else:
            sizes.append(shape[d])
            for s, st in zip(steps, strides):
                s.append(st[d])
    return sizes or [1], [s or [0] for s in steps]


def as_lines(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether each sample is a line as in :func:`as_line`; how far apart samples are is each tensor's own."""
    return tensors[0].ndim > 1 and tensors[0].shape[0] > 0 and as_line([t[0] for t in tensors])
