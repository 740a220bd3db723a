"""The nodes a solver steps through: validated once, float64, both ends exact."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .noise import Array, NoiseSchedule


class Node(NamedTuple):
    """One time: what the network is given (t) and the state's coefficients ``x = alpha x_0 + sigma eps``."""

    t: float
    alpha: float
    sigma: float

    @property
    def lam(self) -> float:
        """lambda = log(alpha / sigma), half the log signal-to-noise ratio; -inf at alpha = 0, +inf at sigma = 0."""
        if self.sigma == 0.0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha > 0.0 else -math.inf

    @property
    def ratio(self) -> float:
        """sigma / alpha, the EDM noise level; inf at alpha = 0."""
        return self.sigma / self.alpha if self.alpha > 0.0 else math.inf


@dataclass(frozen=True, eq=False)
class TimeGrid:
    """Nodes of strictly decreasing noise, shape (steps + 1,), on one noise schedule.

    The network is evaluated at every node but the last, and between them by single-step solvers. Build one with
    :meth:`from_levels`, :meth:`from_times` or ``fewstep.schedules.make_grid``.
    """

    t: Array
    alpha: Array
    sigma: Array
    noise_schedule: NoiseSchedule
    whole: int = 0
    """Steps of the whole run that this grid is a part of, 0 for its own; for methods that count them (churn)."""

    def __post_init__(self) -> None:
        if self.t.ndim != 1 or len(self.t) < 2:
            raise ValueError(f"a grid needs at least two nodes (one step), got {self.t.size}")
        if not all(np.all(np.isfinite(a)) for a in (self.t, self.alpha, self.sigma)):
            raise ValueError(
                "a grid's nodes must be finite numbers; noise without signal is alpha = 0, not an infinite t"
            )
        for name in ("t", "alpha", "sigma"):  # our own copies, which nobody can change behind a cache
            array = np.array(getattr(self, name), dtype=np.float64)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        ratio = [n.ratio for n in self]
        for i, (a, b) in enumerate(zip(ratio, ratio[1:])):
            if not a > b:
                raise ValueError(
                    f"noise levels must be strictly decreasing: sigma/alpha goes from {a:.6g} to {b:.6g} at step {i}"
                )

    @classmethod
    def from_levels(cls, noise_schedule: NoiseSchedule, levels: ArrayLike) -> TimeGrid:
        """Nodes at decreasing noise levels (sigma / alpha; sigma for flow), the last may be 0."""
        k = np.asarray(levels, dtype=np.float64)
        if k.ndim != 1 or np.any(np.isnan(k)) or np.any(k < 0):
            raise ValueError(f"noise levels must be a list of numbers >= 0, got {levels!r}")
        if noise_schedule.frame == "flow" and np.any(k > 1):
            raise ValueError(f"a flow model's noise levels lie in [0, 1], got {float(k.max()):.6g}")
        return cls(noise_schedule.time(k), *noise_schedule.alpha_sigma_at(k), noise_schedule)

    @classmethod
    def from_times(
        cls, noise_schedule: NoiseSchedule, times: ArrayLike, *, final_zero: bool = False
    ) -> TimeGrid:
        """Nodes at decreasing times; with ``final_zero`` a node without noise is appended."""
        t = np.asarray(times, dtype=np.float64)
        levels = noise_schedule.level(t)
        if final_zero:
            t, levels = np.append(t, 0.0), np.append(levels, 0.0)
        return cls(t, *noise_schedule.alpha_sigma_at(levels), noise_schedule)

    @property
    def steps(self) -> int:
        """Number of intervals."""
        return len(self.t) - 1

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, i: int) -> Node:
        return Node(float(self.t[i]), float(self.alpha[i]), float(self.sigma[i]))

    def __iter__(self) -> Iterator[Node]:
        return (self[i] for i in range(len(self)))

    def intervals(self) -> Sequence[tuple[Node, Node]]:
        """The steps ``(s, t)``, from more to less noise."""
        nodes = list(self)
        return list(zip(nodes, nodes[1:]))

    def part(self, start: int, stop: int) -> TimeGrid:
        """The grid from node ``start`` to node ``stop``, both included."""
        where = slice(start, stop + 1)
        whole = self.whole or self.steps
        return TimeGrid(self.t[where], self.alpha[where], self.sigma[where], self.noise_schedule, whole)

    def tail(self, start: int) -> TimeGrid:
        """The grid from node ``start`` on."""
        return self.part(start, self.steps)

    @property
    def lam(self) -> Array:
        """lambda = log(alpha / sigma) of every node, +-inf at the ends."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)

    @property
    def level(self) -> Array:
        """Noise level of every node (sigma / alpha; sigma for flow)."""
        with np.errstate(divide="ignore"):
            return self.sigma if self.noise_schedule.frame == "flow" else self.sigma / self.alpha

    def at_ratio(self, ratio: float) -> Node:
        """A node of this noise schedule at ``sigma / alpha = ratio``, on the grid or not."""
        level = self.noise_schedule.level_at_ratio(ratio)
        alpha, sigma = self.noise_schedule.alpha_sigma_at(level)
        return Node(float(self.noise_schedule.time(level)), float(alpha), float(sigma))

    def at_time(self, t: float) -> Node:
        """A node of this noise schedule at time ``t``, on the grid or not."""
        alpha, sigma = self.noise_schedule.alpha_sigma(t)
        return Node(float(t), float(alpha), float(sigma))

    def between(self, s: Node, t: Node, r: float) -> Node:
        """The node at ``lambda_s + r (lambda_t - lambda_s)``; both ends need signal and noise."""
        return self.at_ratio(math.exp(-(s.lam + r * (t.lam - s.lam))))

    @cached_property
    def key(self) -> tuple:
        """Identity by value, for caches."""
        return (
            self.t.tobytes(),
            self.alpha.tobytes(),
            self.sigma.tobytes(),
            self.noise_schedule.key,
            self.whole,
        )
