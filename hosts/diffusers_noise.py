"""Affine arithmetic on tensors with coefficients from a noise schedule: the forward process and x_0."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..schedules.diffusers_config import Source


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor on the CPU."""
    return torch.from_numpy(np.ascontiguousarray(array))


def values_of(timesteps: Any) -> np.ndarray:
    """Timesteps as float64 on the host, shape (n,); reads tensors from their device."""
    if isinstance(timesteps, torch.Tensor):
        return timesteps.detach().cpu().double().numpy().reshape(-1)
    return np.asarray(timesteps, dtype=np.float64).reshape(-1)


def numbers(values: Any) -> tuple[float, ...] | None:
    """A list, array or tensor of numbers as a tuple; None stays None."""
    return None if values is None else tuple(values_of(values).tolist())


def affine(c_x: float, x: torch.Tensor, c_m: float, m: torch.Tensor) -> torch.Tensor:
    """``c_x x + c_m m`` in fp32 or wider, rounded once."""
    if c_x == 0.0 and c_m == 1.0:
        return m
    dtype = torch.promote_types(x.dtype, m.dtype)
    work = torch.promote_types(dtype, torch.float32)
    return torch.mul(x.to(work), c_x).add_(m, alpha=c_m).to(dtype)


def coefficients(source: Source, timesteps: Any, like: torch.Tensor) -> tuple[Any, Any]:
    """``(alpha, sigma)`` at timesteps, on the schedule or not: numbers for one, tensors that broadcast for several.

    Integer timesteps on a device (training) are looked up there, without waiting for the device.
    """
    shape = (-1, *(1 for _ in like.shape[1:]))
    on_device = isinstance(timesteps, torch.Tensor) and timesteps.device.type != "cpu"
    if on_device and not timesteps.is_floating_point():
        table = source.noise_schedule.alpha_sigma_at(source.levels(np.arange(source.train_steps + 1)))
        tables = (from_numpy(c.astype(np.float32)).to(timesteps.device, non_blocking=True) for c in table)
        alpha, sigma = (c[timesteps.reshape(-1)].reshape(shape) for c in tables)
        return alpha, sigma
    times = values_of(timesteps)
    alpha, sigma = source.noise_schedule.alpha_sigma_at(source.levels(times))
    if len(times) == 1:
        return float(alpha[0]), float(sigma[0])
    work = torch.promote_types(like.dtype, torch.float32)
    a, s = (from_numpy(c).to(like.device, work).reshape(shape) for c in (alpha, sigma))
    return a, s
