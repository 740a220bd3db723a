"""Tensors in many layouts, and how exact a combination of them is."""

from __future__ import annotations

import torch

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COEFS = [[1.3, -0.7, 0.4, 0.0], [0.9, 0.01, -2.0, 1e-3], [1.0, 0.0, 0.0, 0.0]]


def layouts(dtype: torch.dtype, count: int = 4) -> dict[str, list[torch.Tensor]]:
    """Tensors of one shape in the layouts that pipelines have."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]

    x, y, *rest = make(2, 3, 9, 7)
    return {
        "contiguous": [x, y, *rest],
        "channels last": [t.to(memory_format=torch.channels_last) for t in (x, y, *rest)],
        "mixed": [x, y.to(memory_format=torch.channels_last), x[:1].expand(2, 3, 9, 7), *rest[1:]],
        "a slice of frames": [t[:, :, 1:] for t in make(2, 4, 5, 3, 3)],
        "every other": [t[::2, :, :, ::2] for t in make(4, 3, 9, 14)],
        "packed tokens": [t.transpose(1, 2) for t in make(2, 16, 33)],
        "halves of a batch": [*make(4, 5)[0].chunk(2), *make(4, 5)[0].chunk(2)][:count],
        "the same tensor": [x] * count,
        "a line": make(1100),
        "numbers": make(),
        "empty": make(0, 3),
    }


def in_ulps(outputs: list[torch.Tensor], inputs: list[torch.Tensor], coefs: torch.Tensor) -> torch.Tensor:
    """Errors in units in the last place of the result's dtype.

    The place is that of the result in 16 bits. In fp32 and float64, which are the precision of the sums themselves, it
    is eps times the sum of the terms' sizes: what terms leave that cancel.
    """
    errors = []
    for row, output in zip(coefs.double(), outputs, strict=True):
        shape = (-1, *(1 for _ in inputs[0].shape[1:]))
        terms = [(c.reshape(shape) if c.ndim else c) * x.double() for c, x in zip(row, inputs)]
        exact = sum(terms, torch.zeros_like(terms[0]))
        info = torch.finfo(output.dtype)
        if output.dtype in (torch.float32, torch.float64):
            ulp = info.eps * sum((t.abs() for t in terms), torch.zeros_like(exact)).clamp_min(info.tiny)
        else:
            ulp = info.eps * torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(info.tiny))))
        errors.append(((output.double() - exact).abs() / ulp).flatten())
    return torch.cat(errors)


def check(
    outputs: list[torch.Tensor], inputs: list[torch.Tensor], coefs: torch.Tensor, most: float = 1.0
) -> None:
    """At most 2 units anywhere, at most one (``most``) nearly everywhere; in fp32 less often without fused products."""
    errors = in_ulps(outputs, inputs, coefs)
    if errors.numel():
        assert errors.max() <= 2.0
        share = 0.999 if outputs[0].dtype in (torch.float16, torch.bfloat16) else 0.99
        assert (errors <= most).double().mean() >= share
