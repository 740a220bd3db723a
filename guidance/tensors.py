"""Reductions over each sample: all dimensions but the first, in fp32 or wider."""

from __future__ import annotations

import torch


def wide(value: torch.Tensor) -> torch.Tensor:
    """The tensor in the precision that rules are computed in: fp32 for 16-bit ones, its own otherwise."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def like(numbers: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One number a sample, shaped to multiply ``value``."""
    return numbers.reshape(-1, *(1 for _ in value.shape[1:]))


def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The scalar product of each sample, shaped to multiply ``a``."""
    return like((a * b).reshape(a.shape[0], -1).sum(1), a)


def norm(value: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm of each sample, shaped to multiply it."""
    return like(torch.linalg.vector_norm(value.reshape(value.shape[0], -1), dim=1), value)


def deviation(value: torch.Tensor) -> torch.Tensor:
    """The standard deviation of each sample with n - 1, shaped to multiply it."""
    flat = value.reshape(value.shape[0], -1)
    centered = flat - flat.mean(dim=1, keepdim=True)
    return like(torch.linalg.vector_norm(centered, dim=1) / max(flat.shape[1] - 1, 1) ** 0.5, value)


def ratio(a: torch.Tensor, b: torch.Tensor, otherwise: float = 1.0) -> torch.Tensor:
    """``a / b``, and ``otherwise`` where b is 0."""
    zero = b == 0
    return torch.where(zero, otherwise, a / torch.where(zero, 1.0, b))


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The cosine between two samples, one number each, shape (B,)."""
    return ratio(inner(a, b), norm(a) * norm(b), 0.0).reshape(-1)
