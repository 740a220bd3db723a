"""The rules of guidance.py in Triton: a reduction of each sample in parts; a kernel that adds them up and applies.

Each sample is cut into at most PARTS parts, one for each program instance; a part writes its sums to its own place, so
there are no atomics and the result is the same in every run. The second kernel reads all parts of its sample, a few KiB
that stay in the second-level cache, before its own block. The inputs are read twice from memory, the output is written
once. Standard deviations are of numbers shifted by the first element of the sample: a sum of squares less the square of
the sum would cancel where the mean is large.
"""

# Triton's language is not Python to a type checker, and Triton may be absent.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportMissingImports=false

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from .guidance import Rule, Weights

BLOCK = 1024  # see triton_combine.py
PARTS = 256  # at least as many instances as an accelerator has cores, for one sample
_SUMS = 5
_RULES = {"projected": 0, "rescaled": 1, "scaled": 2}


@triton.jit
def forms(inputs, strides, p, q, row, index, mask):
    """p and q at some elements of a sample."""
    a = tl.zeros(index.shape, tl.float32)
    b = tl.zeros(index.shape, tl.float32)
    for j in tl.static_range(len(inputs)):
        x = tl.load(inputs[j] + row * strides[j] + index, mask=mask, other=0.0).to(tl.float32)
        a += p[j] * x
        b += q[j] * x
    return a, b


@triton.jit
def first_element(inputs, strides, p, q, row):
    """p and q at the first element of a sample."""
    a = 0.0
    b = 0.0
    for j in tl.static_range(len(inputs)):
        x = tl.load(inputs[j] + row * strides[j]).to(tl.float32)
        a += p[j] * x
        b += q[j] * x
    return a, b


@triton.jit
def reduce_kernel(
    inputs,  # tuple of pointers
    strides,  # tuple: from sample to sample
    p,  # tuple of numbers
    q,
    sums,  # (B, 5, parts): of p, q, pp, pq, qq
    kept,  # where p is written to, or None
    kept_stride,
    per_row,
    parts,
    blocks,  # of a part
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over one part of one sample."""
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    shift_p = 0.0
    shift_q = 0.0
    if SHIFT:
        shift_p, shift_q = first_element(inputs, strides, p, q, row)
    s_p = tl.zeros([BLOCK], tl.float32)
    s_q = tl.zeros([BLOCK], tl.float32)
    s_pp = tl.zeros([BLOCK], tl.float32)
    s_pq = tl.zeros([BLOCK], tl.float32)
    s_qq = tl.zeros([BLOCK], tl.float32)
    for block in range(blocks):
        index = (part.to(tl.int64) * blocks + block) * BLOCK + tl.arange(0, BLOCK)
        mask = index < per_row
        a, b = forms(inputs, strides, p, q, row, index, mask)
        if kept is not None:
            tl.store(kept + row * kept_stride + index, a.to(kept.dtype.element_ty), mask=mask)
        if SHIFT:
            a = tl.where(mask, a - shift_p, 0.0)
            b = tl.where(mask, b - shift_q, 0.0)
        s_p += a
        s_q += b
        s_pp += a * a
        s_pq += a * b
        s_qq += b * b
    place = sums + row * 5 * parts + part
    tl.store(place, tl.sum(s_p))
    tl.store(place + parts, tl.sum(s_q))
    tl.store(place + 2 * parts, tl.sum(s_pp))
    tl.store(place + 3 * parts, tl.sum(s_pq))
    tl.store(place + 4 * parts, tl.sum(s_qq))


@triton.jit
def total(sums, row, which, parts, PARTS: tl.constexpr):
    """One of the five sums over a whole sample."""
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(sums + (row * 5 + which) * parts + part, mask=part < parts, other=0.0))


@triton.jit
def apply_kernel(
    inputs,
    strides,
    p,
    q,
    base,  # tuple of numbers
    sums,
    output,
    output_stride,
    per_row,
    parts,
    gain,
    eta,
    cap,
    phi,
    RULE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``sum base x + a p + b q`` for one block of one sample."""
    row = tl.program_id(1).to(tl.int64)
    if RULE == 0:
        length = tl.sqrt(total(sums, row, 2, parts, PARTS))
        k = tl.where((cap > 0.0) & (length > cap), cap / tl.where(length == 0.0, 1.0, length), 1.0)
        square = total(sums, row, 4, parts, PARTS)
        share = total(sums, row, 3, parts, PARTS) / tl.where(square == 0.0, 1.0, square)
        a = gain * k
        b = -gain * (1.0 - eta) * k * tl.where(square == 0.0, 0.0, share)
    elif RULE == 1:
        s_p = total(sums, row, 0, parts, PARTS)
        s_q = total(sums, row, 1, parts, PARTS)
        v_p = tl.maximum(total(sums, row, 2, parts, PARTS) - s_p * s_p / per_row, 0.0)
        v_q = tl.maximum(total(sums, row, 4, parts, PARTS) - s_q * s_q / per_row, 0.0)
        ratio = tl.where(v_p == 0.0, 1.0, tl.sqrt(v_q / tl.where(v_p == 0.0, 1.0, v_p)))
        a = gain * (phi * ratio + 1.0 - phi)
        b = 0.0
    else:
        a = gain
        b = (1.0 - gain) * total(sums, row, 3, parts, PARTS) / (total(sums, row, 4, parts, PARTS) + 1e-8)

    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < per_row
    result = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(len(inputs)):
        x = tl.load(inputs[j] + row * strides[j] + index, mask=mask, other=0.0).to(tl.float32)
        result += (base[j] + a * p[j] + b * q[j]) * x
    tl.store(output + row * output_stride + index, result.to(output.dtype.element_ty), mask=mask)


def guided(
    inputs: Sequence[torch.Tensor],
    p: Weights,
    q: Weights,
    base: Weights,
    rule: Rule,
    keep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See :func:`fewstep.kernels.guidance.guided`."""
    output = torch.empty_like(inputs[0])
    kept = torch.empty_like(inputs[0], dtype=torch.float32) if keep else None
    tensors = tuple(inputs)
    with _device(tensors[0]):
        sums = _reduce(tensors, p, q, kept, rule.name == "rescaled")
        rows, per_row = tensors[0].shape[0], tensors[0][0].numel()
        apply_kernel[(triton.cdiv(per_row, BLOCK), rows)](
            tensors,
            tuple(x.stride(0) for x in tensors),
            _floats(p),
            _floats(q),
            _floats(base),
            sums,
            output,
            output.stride(0),
            per_row,
            sums.shape[2],
            float(rule.gain),
            float(rule.eta),
            float(rule.cap),
            float(rule.phi),
            RULE=_RULES[rule.name],
            PARTS=PARTS,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return output, kept


def products(inputs: Sequence[torch.Tensor], p: Weights, q: Weights) -> torch.Tensor:
    """See :func:`fewstep.kernels.guidance.products`."""
    with _device(inputs[0]):
        return _reduce(tuple(inputs), p, q, None, False)[:, 2:].sum(2).T


def _reduce(
    inputs: tuple[torch.Tensor, ...], p: Weights, q: Weights, kept: torch.Tensor | None, shift: bool
) -> torch.Tensor:
    rows, per_row = inputs[0].shape[0], inputs[0][0].numel()
    blocks = triton.cdiv(triton.cdiv(per_row, BLOCK), PARTS)
    parts = triton.cdiv(per_row, BLOCK * blocks)
    sums = torch.empty((rows, _SUMS, parts), dtype=torch.float32, device=inputs[0].device)
    reduce_kernel[(parts, rows)](
        inputs,
        tuple(x.stride(0) for x in inputs),
        _floats(p),
        _floats(q),
        sums,
        kept,
        0 if kept is None else kept.stride(0),
        per_row,
        parts,
        blocks,
        SHIFT=shift,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return sums


def _floats(weights: Weights) -> tuple[float, ...]:
    return tuple(float(w) for w in weights)


def _device(like: torch.Tensor) -> Any:
    """The device of the tensors, which need not be the current one."""
    return torch.cuda.device(like.device) if like.is_cuda else nullcontext()
