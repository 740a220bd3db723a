"""PFGM++: diffusion with other noise, a multivariate Student t of D degrees of freedom in place of a normal.

Xu et al., "PFGM++: Unlocking the Potential of Physics-Inspired Generative Models", https://arxiv.org/abs/2302.04265.

Data of N numbers are seen in N + D dimensions; r is the distance in the D others and sigma = r / sqrt(D). In sigma the
ODE is ``dx / d sigma = (x - x_0) / sigma``, that of EDM, so schedules, solvers and programs stay as they are::

    x = pfgm_prior((4, 3, 32, 32), 128, sigma_max=80.0, seeds=range(4))
    denoiser = fewstep.Denoiser(network, EDM(sigma_max=80.0), "denoised")
    images = fewstep.sample(denoiser, x, "heun+restart", 18, "karras", noise=PoissonNoise(range(4), 128))

``D = inf`` is diffusion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ..schedules import Node
from .noise import _bits, standard_normal


def pfgm_prior(
    shape: Sequence[int],
    D: float,
    sigma_max: float,
    seeds: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Start states of shape (B, ...): a uniform direction and a length of ``sigma_max sqrt(D) sqrt(b / (1 - b))``,
    b ~ Beta(N / 2, D / 2), each a function of the sample's seed. As b / (1 - b) is a quotient of chi squares, this is
    ``sigma_max z sqrt(D / chi^2_D)``, z a standard normal.
    """
    _check(D)
    z = standard_normal(seeds, torch.empty(tuple(shape), dtype=dtype, device=device))
    if math.isinf(D):
        return sigma_max * z
    factors = [sigma_max * math.sqrt(D / (2.0 * g.standard_gamma(D / 2.0))) for g in _generators(seeds)]
    return _scaled(z, factors)


class PoissonNoise:
    """The noise with which Restart goes up in PFGM++: along a straight line in N + D dimensions.

    From the state at r_s, with a uniform direction in the D dimensions, a line of uniform direction in all N + D is
    followed to where it meets r_t: ``x_t = x_s + m u``, ``|z_s + m w| = r_t``, u and w the line's two parts, |w| = 1.
    The line meets r_t on both sides; they have the same distribution, so that the released code, which always takes
    one, is right in that. The source gives ``m u / sqrt(sigma_t^2 - sigma_s^2)``, what ``restart`` multiplies.

    The move is the published one and not exact: its mean square is (1 + 2 sigma_s^2 / (D sigma_t^2)) times what the
    process has at r_t. PFGM++ has no reverse SDE here: ValueError for an interval towards less noise.
    """

    def __init__(self, seeds: Sequence[int], D: float) -> None:
        _check(D)
        self.seeds, self.D = tuple(seeds), D
        self._visits: dict[tuple[Node, Node], int] = {}

    def __call__(self, like: torch.Tensor, start: Node, stop: Node) -> torch.Tensor:
        if stop.ratio <= start.ratio:
            raise ValueError(
                "PFGM++ has noise for moves to a higher level only (restart, churn); use a deterministic solver"
            )
        visit = self._visits[start, stop] = self._visits.get((start, stop), -1) + 1
        key = visit, *_bits(start.ratio, stop.ratio)
        z = standard_normal(self.seeds, like, *key)
        if math.isinf(self.D):
            return z
        share = start.ratio**2 / (stop.ratio**2 - start.ratio**2)
        factors = []
        for g in _generators(self.seeds, *key):
            # w before it is normalised: its part along z_s, and the square of its length
            along = g.standard_normal()
            square = along**2 + 2.0 * g.standard_gamma((self.D - 1.0) / 2.0)
            dot = math.sqrt(share / square) * along
            factors.append(math.sqrt(self.D / square) * (math.sqrt(1.0 + dot**2) - dot))
        return _scaled(z, factors)


def _check(D: float) -> None:
    if not D >= 1.0:
        raise ValueError(f"D must be at least 1, got {D:g}")


def _generators(seeds: Sequence[int], *key: int) -> list[np.random.Generator]:
    return [np.random.default_rng([seed & (2**64 - 1), *key, 1]) for seed in seeds]


def _scaled(z: torch.Tensor, factors: Sequence[float]) -> torch.Tensor:
    return z * torch.tensor(factors, dtype=torch.float64).to(z).view(-1, *[1] * (z.ndim - 1))
