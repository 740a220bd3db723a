"""``combine`` in Triton: every input is read once and every output written once, in one launch.

The kernel is bound by memory, so all that matters is wide, coalesced access. A program instance takes BLOCK = 1024
elements with 4 warps, 8 elements a thread: one 16-byte access a tensor in 16 bits, two in fp32, four in float64. With
two or three tensors in flight that saturates the memory system, while a latent of 4x128x128 still makes 64 instances.
Nothing is tuned at run time: an autotuner would run the kernel several times, which a captured loop cannot have.

Coefficients are plain kernel arguments (a float argument is not specialised: no compilation for a new value), or are
read from a table in device memory at a position that a counter in device memory gives, so that a captured graph moves
on by itself. float64 always uses a table, since float arguments are fp32.
"""

# Triton's language is not Python to a type checker, and Triton may be absent.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportMissingImports=false

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from .layout import as_line, collapsed
from .reference import promoted, work_dtype

BLOCK = 1024
_INT32 = 2**31 - BLOCK
_TL = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def normal(seed, key, element):
    """One standard normal for each element: Philox4x32-10 and Box-Muller, as reference.philox_normal."""
    element = element.to(tl.int64)
    key = tl.cast(key, tl.int64)
    low = (element & 0xFFFFFFFF).to(tl.uint32)
    high = (element >> 32).to(tl.uint32)
    zero = low * 0
    a, b, _, _ = tl.philox(
        seed,
        low,
        high,
        zero + (key & 0xFFFFFFFF).to(tl.uint32),
        zero + ((key >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )
    u = (a >> 8).to(tl.float32) * 5.9604644775390625e-08 + 2.98023223876953125e-08
    v = (b >> 8).to(tl.float32) * 5.9604644775390625e-08 + 2.98023223876953125e-08
    return tl.sqrt(-2.0 * tl.log(u)) * tl.cos(6.283185307179586 * v)


# numel is specialised: that it is a multiple of 16 is what lets a masked access be 16 bytes wide.
@triton.jit(do_not_specialize=["per_row", "key"])
def combine_kernel(
    inputs,  # tuple of pointers
    outputs,  # tuple of pointers
    coefs,  # tuple of numbers, outputs x inputs; empty if there is a table
    table,  # (steps, outputs, inputs[, rows]) or None
    counter,  # pointer to the step, or None for the first
    sizes,  # tuple of sizes of the collapsed dimensions; empty on a line
    strides,  # for each tensor, inputs first, its strides
    seeds,  # a seed for each row, or None without noise
    weights,  # tuple of numbers: what each output gets of the noise
    key,  # of the noise
    numel,
    per_row,  # elements of a sample
    ROWS: tl.constexpr,  # how many numbers a coefficient of the table has: 1, or one a sample
    WIDE: tl.constexpr,  # offsets need 64 bits
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``outputs[i] = sum_j coefs[i, j] inputs[j] + weights[i] noise``."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    index = pid * BLOCK + tl.arange(0, BLOCK)
    mask = index < numel
    N: tl.constexpr = len(inputs)
    D: tl.constexpr = len(sizes)
    if table is not None:
        if counter is not None:
            table += tl.load(counter) * (len(outputs) * N * ROWS)
        row = index // per_row if ROWS > 1 else 0

    # Addresses from the innermost dimension outwards; on a line all tensors share the index.
    values = ()
    for j in tl.static_range(N):
        offset = index
        if D > 0:
            rest = index
            offset = index * 0
            for d in tl.static_range(D - 1, -1, -1):
                offset += (rest % sizes[d]) * strides[j][d]
                rest = rest // sizes[d]
        values = values + (tl.load(inputs[j] + offset, mask=mask, other=0.0).to(ACC),)

    if seeds is not None:
        noise = normal(tl.load(seeds + index // per_row, mask=mask, other=0), key, index % per_row).to(ACC)

    for i in tl.static_range(len(outputs)):
        total = tl.zeros([BLOCK], ACC)
        for j in tl.static_range(N):
            if table is not None:
                factor = tl.load(table + (i * N + j) * ROWS + row).to(ACC)
            else:
                factor = coefs[i * N + j]
            total += factor * values[j]
        if seeds is not None:
            total += weights[i] * noise
        offset = index
        if D > 0:
            rest = index
            offset = index * 0
            for d in tl.static_range(D - 1, -1, -1):
                offset += (rest % sizes[d]) * strides[N + i][d]
                rest = rest // sizes[d]
        tl.store(outputs[i] + offset, total.to(outputs[i].dtype.element_ty), mask=mask)


def combine(
    inputs: Sequence[torch.Tensor],
    coefs: Sequence[Sequence[float]] | torch.Tensor,
    counter: torch.Tensor | int | None = None,
    noise: tuple[torch.Tensor, int, Sequence[float]] | None = None,
) -> list[torch.Tensor]:
    """See :func:`fewstep.kernels.combine`; ``noise`` is (seeds, key, what each output gets of the noise)."""
    first = inputs[0]
    dtype = promoted(inputs)
    work = work_dtype(dtype)
    if isinstance(counter, int):
        assert isinstance(coefs, torch.Tensor)
        coefs, counter = coefs[counter], None
    numbers: tuple[float, ...] = ()
    table, rows = None, 1
    if isinstance(coefs, torch.Tensor):
        plain = coefs if counter is None else coefs[0]
        outs = plain.shape[0]
        rows = plain.shape[2] if plain.ndim == 3 else 1
        if counter is None and rows == 1 and work == torch.float32 and coefs.device.type == "cpu":
            numbers = tuple(coefs.flatten().tolist())
        else:
            table = coefs.to(first.device).contiguous()  # the kernel converts what it reads
    else:
        outs = len(coefs)
        if work == torch.float32:
            numbers = tuple(float(c) for row in coefs for c in row)
        else:
            table = torch.tensor(coefs, dtype=work, device=first.device)
    outputs = [torch.empty_like(first, dtype=dtype) for _ in range(outs)]
    numel = first.numel()
    if not numel:
        return outputs
    tensors = [*inputs, *outputs]
    seeds, key, weights = noise or (None, 0, ())
    # Per-sample numbers and noise count elements in the order of the indices: there a line must be contiguous.
    line = as_line(tensors, rows > 1) and (seeds is None or first.is_contiguous())
    sizes: list[int] = []
    strides: list[list[int]] = []
    if not line:
        sizes, strides = collapsed(tensors)
    reach = max((sum((n - 1) * abs(s) for n, s in zip(sizes, st)) for st in strides), default=0)
    grid = (triton.cdiv(numel, BLOCK),)
    # On the device of the tensors, which need not be the current one.
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        combine_kernel[grid](
            tuple(inputs),
            tuple(outputs),
            numbers,
            table,
            counter,
            tuple(sizes),
            tuple(tuple(s) for s in strides),
            seeds,
            tuple(float(w) for w in weights),
            key,
            numel,
            numel // first.shape[0] if first.ndim else 1,
            ROWS=rows,
            WIDE=max(numel, reach) > _INT32,
            ACC=_TL[work],
            BLOCK=BLOCK,
            num_warps=4,
        )
    return outputs
