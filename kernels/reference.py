"""What the kernels compute, in plain torch: the definition, and what runs where there is no kernel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of a dtype are accumulated in: fp32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def promoted(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype of a sum of tensors."""
    return reduce(torch.promote_types, (t.dtype for t in tensors))


def combine(inputs: Sequence[torch.Tensor], coefs: torch.Tensor) -> list[torch.Tensor]:
    """``outputs[i] = sum_j coefs[i, j] inputs[j]``, accumulated in fp32 (float64) and rounded once.

    ``coefs`` of shape (outputs, inputs), or (outputs, inputs, B) with a number for each sample (first dimension).
    Differentiable in the inputs and the coefficients.
    """
    dtype = promoted(inputs)
    work = work_dtype(dtype)
    wide = [x.to(work) for x in inputs]
    factors = coefs.to(device=inputs[0].device, dtype=work)
    if coefs.ndim == 3:
        factors = factors.reshape(*coefs.shape, *(1 for _ in inputs[0].shape[1:]))
    outputs = []
    for row in factors:
        total = row[0] * wide[0]
        for factor, x in zip(row[1:], wide[1:], strict=True):
            total = total + factor * x
        outputs.append(total.to(dtype))
    return outputs


def combine_numbers(inputs: Sequence[torch.Tensor], rows: Sequence[Sequence[float]]) -> list[torch.Tensor]:
    """:func:`combine` with numbers: a term with a coefficient of 0 is left out, and only outputs are allocated."""
    dtype = promoted(inputs)
    work = work_dtype(dtype)
    outputs = []
    for row in rows:
        (first, factor), *terms = [(x, c) for x, c in zip(inputs, row, strict=True) if c] or [
            (inputs[0], 0.0)
        ]
        total = torch.mul(first, factor) if first.dtype is work else first.to(work).mul_(factor)
        for x, c in terms:
            total.add_(x, alpha=c)
        outputs.append(total.to(dtype))
    return outputs


def philox_normal(seeds: torch.Tensor, key: int, like: torch.Tensor) -> torch.Tensor:
    """A standard normal in fp32, shape of ``like``: element e of sample i is a function of ``seeds[i]``, key and e.

    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3") with the key ``seeds[i]`` and the
    counter (e, key), both 64 bits; the first two words give one normal by Box and Muller's formula. ``seeds`` is an
    int64 tensor of shape (B,) on the device of ``like``. Elements are counted in the order of the indices, so the
    layout in memory does not matter.
    """
    per = like[0].numel() if like.shape[0] else 0
    word = 0xFFFFFFFF
    e = torch.arange(per, device=like.device, dtype=torch.int64).expand(like.shape[0], per)
    c = [e & word, e >> 32, torch.full_like(e, key & word), torch.full_like(e, key >> 32 & word)]
    k = [(seeds & word)[:, None], (seeds >> 32 & word)[:, None]]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]  # 64 bits, of which int64 keeps the pattern
        c = [(b >> 32 & word) ^ c[1] ^ k[0], b & word, (a >> 32 & word) ^ c[3] ^ k[1], a & word]
        k = [k[0] + 0x9E3779B9 & word, k[1] + 0xBB67AE85 & word]
    # 24 bits make a number that fp32 holds, in the middle of its interval: never 0 or 1.
    u, v = ((x >> 8).float() * 2.0**-24 + 2.0**-25 for x in c[:2])
    normal = torch.sqrt(-2.0 * torch.log(u)) * torch.cos((2.0 * torch.pi) * v)
    return normal.reshape(like.shape)
