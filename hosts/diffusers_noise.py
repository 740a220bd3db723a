"""Affine arithmetic on tensors with coefficients from a noise schedule: the forward process and x_0."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..schedules import VP
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


class Forward:
    """The forward process of a scheduler's model: its tables and noisy samples."""

    _run: Any
    _source: Any
    index_for_timestep: Any

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """alpha^2 at the training indices, float32, shape (num_train_timesteps,); discrete models only."""
        return from_numpy(self._discrete("alphas_cumprod").alphas_cumprod.astype(np.float32))

    @property
    def betas(self) -> torch.Tensor:
        """beta at the training indices, float32, shape (num_train_timesteps,); discrete models only."""
        product = self._discrete("betas").alphas_cumprod
        return from_numpy((1.0 - product / np.concatenate([[1.0], product[:-1]])).astype(np.float32))

    @property
    def alphas(self) -> torch.Tensor:
        """1 - beta at the training indices."""
        return 1.0 - self.betas

    def _discrete(self, name: str) -> VP:
        noise = self._source().noise_schedule
        if not isinstance(noise, VP):
            raise AttributeError(f"{name!r} belongs to discrete models, this one is {type(noise).__name__}")
        return noise

    def previous_timestep(self, timestep: Any) -> torch.Tensor:
        """The timestep after the one given on the way to no noise, -1 after the last."""
        run = self._run
        following = run.timesteps[self.index_for_timestep(timestep) + 1 :]
        return following[0] if len(following) else torch.tensor(-1)

    def _get_variance(self, timestep: Any, prev_timestep: Any = None) -> torch.Tensor:
        """Variance of the reverse step of DDPM between two training indices, by default neighbours on the schedule."""
        before = self.previous_timestep(timestep) if prev_timestep is None else prev_timestep
        product = self.alphas_cumprod
        now, then = product[int(timestep)], product[int(before)] if int(before) >= 0 else torch.tensor(1.0)
        return (1 - then) / (1 - now) * (1 - now / then)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """``alpha x_0 + sigma eps``, dtype of ``original_samples``.

        The level is that of ``timesteps``, shape (1,) or (B,), on the schedule or not. If a begin index was set, it is
        that of the begin index before the first step and that of the next evaluation after it.
        """
        run = self._run
        source = self._source() if run.plan is None else run.plan.source
        if run.begin_index is None or run.plan is None:
            alpha, sigma = coefficients(source, timesteps, original_samples)
        else:
            _, alpha, sigma = run.plan.nodes[run.begin_index if run.step_index is None else run.step_index]
        sigma = sigma * source.noise_scale
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def scale_noise(
        self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """:meth:`add_noise` with the arguments in the order of flow models."""
        if noise is None:
            raise ValueError("scale_noise() needs noise")
        return self.add_noise(sample, noise, timestep)

    def get_velocity(
        self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """The target of a velocity prediction: ``alpha eps - sigma x_0``, for flow models ``eps - x_0``."""
        source = self._source()
        if source.noise_schedule.frame == "flow":
            return source.output_sign * (noise - sample)
        alpha, sigma = coefficients(source, timesteps, sample)
        return (alpha * noise - sigma * sample).to(sample.dtype)
