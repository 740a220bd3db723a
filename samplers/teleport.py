"""Analytical teleportation: far from the data a model's score is that of a Gaussian, whose ODE has a closed form.

Wang, Vastola, "The Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion Models and its
Applications", https://arxiv.org/abs/2412.09726.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..schedules import Node, TimeGrid


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Data as a normal distribution: what sampling them needs no network for.

    ``mean`` has the shape of a sample of n numbers, ``basis`` (r, n) the directions in which data vary, orthonormal
    rows, ``eigenvalues`` (r,) their variances; in other directions there is none. Float64 tensors on the CPU;
    ``Gaussian(**gaussian.tensors())`` is a copy, and what ``tensors`` gives can be saved as a state dict.

    In the directions l of the basis the exact solution of the probability flow ODE from s to t is
    ``x_t = alpha_t mean + sqrt((alpha_t^2 l + sigma_t^2) / (alpha_s^2 l + sigma_s^2)) (x_s - alpha_s mean)``.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    eigenvalues: torch.Tensor

    def __post_init__(self) -> None:
        for name in ("mean", "basis", "eigenvalues"):
            object.__setattr__(self, name, getattr(self, name).detach().to("cpu", torch.float64))
        r, n = len(self.eigenvalues), self.mean.numel()
        if self.eigenvalues.ndim != 1 or tuple(self.basis.shape) != (r, n):
            raise ValueError(
                f"a Gaussian of samples of {n} numbers with {r} eigenvalues needs a basis of shape ({r}, {n}), "
                f"got {tuple(self.basis.shape)}"
            )
        if bool((self.eigenvalues < 0).any()):
            raise ValueError(f"eigenvalues must not be negative, got {float(self.eigenvalues.min()):g}")

    @classmethod
    def from_covariance(cls, mean: torch.Tensor, covariance: torch.Tensor) -> Gaussian:
        """From a covariance of shape (n, n) for samples of n numbers, symmetric and positive semidefinite."""
        n = mean.numel()
        if tuple(covariance.shape) != (n, n):
            raise ValueError(
                f"samples of {n} numbers have a covariance of shape ({n}, {n}), got {tuple(covariance.shape)}"
            )
        values, vectors = torch.linalg.eigh(covariance.double())
        return cls(mean, vectors.T, values.clamp(min=0.0))

    @classmethod
    def fit(cls, samples: torch.Tensor, rank: int | None = None) -> Gaussian:
        """Mean and covariance of samples of shape (N, ...), with the ``rank`` largest eigenvalues or all of them."""
        if len(samples) < 2:
            raise ValueError(f"a covariance needs at least two samples, got {len(samples)}")
        flat = samples.detach().double().flatten(1)
        mean = flat.mean(0)
        most = min(len(flat) - 1, flat.shape[1])
        kept = most if rank is None else rank
        if not 1 <= kept <= most:
            raise ValueError(f"rank must be 1 to {most} for samples of this number and size, got {rank}")
        centred = (flat - mean) / (len(flat) - 1) ** 0.5
        if len(flat) > flat.shape[1]:
            values, vectors = torch.linalg.eigh(centred.T @ centred)
            values, rows = values.flip(0).clamp(min=0.0), vectors.T.flip(0)
        else:
            _, singular, rows = torch.linalg.svd(centred, full_matrices=False)
            values = singular**2
        return cls(mean.view(samples.shape[1:]), rows[:kept], values[:kept])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The three tensors by name."""
        return {"mean": self.mean, "basis": self.basis, "eigenvalues": self.eigenvalues}

    def move(self, x: torch.Tensor, s: Node, t: Node) -> torch.Tensor:
        """The state at t on the trajectory through ``x``, shape (B, ...), at s, which must have noise; either may be
        the noisier one. ValueError for another shape.
        """
        if s.sigma == 0.0:
            raise ValueError(f"there is no trajectory through a state without noise, at t = {s.t:g}")
        values = self.eigenvalues.numpy()
        factor = np.sqrt((t.alpha**2 * values + t.sigma**2) / (s.alpha**2 * values + s.sigma**2))
        return self._apply(x, s, t.alpha, t.sigma / s.sigma, factor)

    def denoised(self, x: torch.Tensor, node: Node) -> torch.Tensor:
        """The exact denoised prediction, ``mean + alpha l / (alpha^2 l + sigma^2) (x - alpha mean)``."""
        values = self.eigenvalues.numpy()
        variance = node.alpha**2 * values + node.sigma**2
        factor = np.divide(node.alpha * values, variance, out=np.zeros_like(values), where=variance > 0.0)
        return self._apply(x, node, 1.0, 0.0, factor)

    def epsilon(self, x: torch.Tensor, node: Node) -> torch.Tensor:
        """The exact noise prediction, ``sigma / (alpha^2 l + sigma^2) (x - alpha mean)``, at a node with noise."""
        if node.sigma == 0.0:
            raise ValueError(f"there is no noise to predict at t = {node.t:g}, where sigma = 0")
        factor = node.sigma / (node.alpha**2 * self.eigenvalues.numpy() + node.sigma**2)
        return self._apply(x, node, 0.0, 1.0 / node.sigma, factor)

    def skip(self, x: torch.Tensor, grid: TimeGrid, level: float) -> tuple[torch.Tensor, TimeGrid]:
        """``x`` at the first node of a grid moved to a noise ``level``, and the grid from there: the level, then the
        nodes below it. ValueError if it is not between the grid's ends.
        """
        levels = grid.level
        if not levels[-1] < level <= levels[0]:
            raise ValueError(
                f"teleport needs a level above {levels[-1]:g}, where the grid ends, and at most {levels[0]:g}, where "
                f"it starts, got {level:g}"
            )
        first = TimeGrid.from_levels(grid.noise_schedule, [level, levels[-1]])[0]
        nodes = [first, *(n for n, below in zip(grid, levels < level) if below)]
        t, alpha, sigma = np.array(nodes).T
        rest = TimeGrid(t, alpha, sigma, grid.noise_schedule)
        return self.move(x, grid[0], rest[0]), rest

    def _apply(
        self, x: torch.Tensor, s: Node, shift: float, outside: float, inside: np.ndarray
    ) -> torch.Tensor:
        """``shift mean + M (x - alpha_s mean)`` with M = ``inside`` on the basis and ``outside`` off it."""
        if x.shape[1:] != self.mean.shape:
            raise ValueError(
                f"x has samples of shape {tuple(x.shape[1:])}, the Gaussian is of shape {tuple(self.mean.shape)}"
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean, basis = (v.to(x.device, dtype) for v in (self.mean.flatten(), self.basis))
        weights = torch.from_numpy(inside - outside).to(x.device, dtype)
        y = x.to(dtype).flatten(1) - s.alpha * mean
        result = shift * mean + outside * y + (y @ basis.T * weights) @ basis
        return result.view(x.shape).to(x.dtype)
