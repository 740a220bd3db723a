"""Adaptive step size: DPM-Solver-12 and -23 under a PID controller, after dpm_adaptive of k-diffusion.

A step of ``dpm_2s`` or ``dpm_3s`` is compared with the one of lower order that its evaluations give as well, that of
``ddim`` or ``dpm_2s``; their distance decides whether it stands and how long the next one is. That depends on data, so
a run is no program: it is as many one-step programs of these solvers as it turns out to need.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import numpy as np
import torch

from ..schedules import Node, NoiseSchedule, TimeGrid
from ..schedules.parametrization import Prediction
from ..schedules.spec import NonNegative, Range, Share
from .executor import NumericalError, Stepper
from .noise import NoiseSource
from .registry import parse
from .steps import ancestral_low, renoise, step_length
from .trace import Trace

Positive = Annotated[float, Range(0.0, above=True)]
PAIRS = {
    2: (("ddim", ()), ("dpmpp_2s:form=epsilon", (1 / 2,))),
    3: (("dpmpp_2s:form=epsilon", (1 / 3,)), ("dpmpp_3s:form=epsilon", (1 / 3, 2 / 3))),
}
"""The step of lower and the one of higher order, each with its stages as fractions of the step in lambda."""
FIRST_RATIO = 1000.0
"""sigma / alpha to which one DDIM step leads from a start without signal."""
CLOSE = 1e-5
"""A step that would end this near to the last level, in lambda, ends there."""
SMALLEST = 1e-8
"""The shortest step in lambda that is tried."""


class Predictor(Protocol):
    """``predictor(x, node)`` in the space that ``prediction`` names."""

    @property
    def prediction(self) -> Prediction:
        """What it returns."""
        ...

    def __call__(self, x: torch.Tensor, node: Node) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class AdaptiveResult:
    """The sample ``x`` and what it took.

    ``nfe`` counts evaluations of one sample, ``accepted`` and ``rejected`` steps; ``levels`` are the noise levels
    passed through (sigma / alpha; sigma for flow), both ends included.
    """

    x: torch.Tensor
    nfe: int
    accepted: int
    rejected: int
    levels: tuple[float, ...]


class StepSize:
    """A PID controller of the step length h.

    With e the inverse errors, newest first, and p the order, ``h *= limit(e_0^((P+I+D)/p) e_1^(-(P+2D)/p) e_2^(D/p))``,
    ``limit(f) = 1 + atan(f - 1)``. A step stands if this factor is at least ``accept_safety``, and only then its error
    is remembered.
    """

    def __init__(
        self, h: float, order: float, pcoeff: float, icoeff: float, dcoeff: float, accept_safety: float
    ) -> None:
        self.h, self.accept_safety = h, accept_safety
        self.powers = (
            (pcoeff + icoeff + dcoeff) / order,
            -(pcoeff + 2 * dcoeff) / order,
            dcoeff / order,
        )
        self.past: tuple[float, float] | None = None

    def accept(self, error: float) -> bool:
        """Whether a step with this error, 1 being what is tolerated, stands; sets the length of the next."""
        inverse = 1.0 / (error + 1e-8)
        past = self.past or (inverse, inverse)
        factor = math.prod(e**power for e, power in zip((inverse, *past), self.powers))
        factor = 1.0 + math.atan(factor - 1.0)
        accepted = factor >= self.accept_safety
        self.h *= factor
        self.past = (inverse, past[0]) if accepted else past
        return accepted


def landmarks(noise_schedule: NoiseSchedule, start: float | None = None, end: float = 0.0) -> TimeGrid:
    """The levels that a run has to meet: ``start`` (the noisiest if None), ``end``, and where lambda begins and ends.

    After a start without signal that is sigma / alpha = FIRST_RATIO, before an end without noise the cleanest trained
    level. Raises ValueError for levels that do not decrease.
    """
    levels = [noise_schedule.level_max if start is None else start]
    if noise_schedule.alpha_sigma_at(levels[0])[0] == 0.0:
        levels.append(float(noise_schedule.level_at_ratio(FIRST_RATIO)))
    if end == 0.0 and noise_schedule.level_min < levels[-1]:
        levels.append(noise_schedule.level_min)
    return TimeGrid.from_levels(noise_schedule, [*levels, end])


def integrate(
    predictor: Predictor,
    x: torch.Tensor,
    grid: TimeGrid,
    noise: NoiseSource | None = None,
    *,
    order: Literal[2, 3] = 3,
    rtol: NonNegative = 0.05,
    atol: Positive = 0.0078,
    h_init: Positive = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: Share = 0.81,
    eta: NonNegative = 0.0,
    s_noise: NonNegative = 1.0,
) -> AdaptiveResult:
    """From the first node of ``grid`` through all others, in steps of the controller's choice in between.

    The error of a step is ``rms((low - high) / max(atol, rtol max(|low|, |low of the step before|)))`` over the whole
    batch, in units of x / alpha: one step length for all samples, and the same one under every schedule. A rejected
    step leaves its first evaluation to the next attempt. To sigma = 0 and from alpha = 0 DDIM leads in one step.
    With ``eta`` > 0 steps are ancestral: on to less noise as in ``euler_ancestral``, and back with ``s_noise`` times
    what ``noise`` gives.

    Raises NumericalError for predictions that are not finite and for tolerances that no step meets.
    """
    run = _Run(predictor, grid)
    control = StepSize(h_init, 1.5 if eta > 0.0 else order, pcoeff, icoeff, dcoeff, accept_safety)
    passed, rejected, before, alpha = [grid[0]], 0, x, grid[0].alpha
    for s, end in grid.intervals():
        if not math.isfinite(step_length(s, end)):
            x = before = run.step("ddim", [s, end], x)
            if not torch.isfinite(x).all():
                raise run.failure(s, x)
            s, alpha = end, end.alpha
            passed.append(s)
        while s != end:
            if control.h < SMALLEST:
                raise run.failure(s, x, f"no step meets rtol = {rtol:g} and atol = {atol:g}")
            near = step_length(s, end) - control.h < CLOSE
            t = end if near else grid.at_ratio(math.exp(-s.lam - control.h))
            to = _ancestral(s, t, end, grid, eta)
            low, high = run.pair(s, to, x, order)
            error = distance(low / to.alpha, high / to.alpha, before / alpha, rtol, atol)
            if not math.isfinite(error):
                raise run.failure(s, x)
            if control.accept(error):
                x = high if to == t else run.renoise(high, to, t, s, s_noise, noise)
                s, before, alpha, run.known = t, low, to.alpha, {}
                passed.append(s)
            else:
                run.known = {s: run.known[s]}
                rejected += 1
    flow = grid.noise_schedule.frame == "flow"
    levels = tuple(node.sigma if flow else node.ratio for node in passed)
    return AdaptiveResult(x, run.nfe, len(passed) - 1, rejected, levels)


def distance(low: torch.Tensor, high: torch.Tensor, before: torch.Tensor, rtol: float, atol: float) -> float:
    """``rms((low - high) / max(atol, rtol max(|low|, |before|)))``, in fp32 at least."""
    wide = torch.float64 if low.dtype == torch.float64 else torch.float32
    tolerated = (rtol * torch.maximum(low.abs(), before.abs()).to(wide)).clamp(min=atol)
    return float(((low.to(wide) - high.to(wide)) / tolerated).square().mean().sqrt())


def _ancestral(s: Node, t: Node, end: Node, grid: TimeGrid, eta: float) -> Node:
    """Where a step goes before noise takes it back to ``t``; not below ``end``."""
    if eta == 0.0:
        return t
    ratio = ancestral_low(s, t, eta).ratio
    return grid.at_ratio(ratio) if ratio > end.ratio else end


class _Run:
    """The evaluations of a run: how many, and those made at the present state, which further attempts use again."""

    def __init__(self, predictor: Predictor, grid: TimeGrid) -> None:
        self.predictor, self.grid, self.nfe = predictor, grid, 0
        self.known: dict[Node, torch.Tensor] = {}

    def pair(self, s: Node, t: Node, x: torch.Tensor, order: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The steps of lower and higher order, in ``order`` evaluations together."""
        (low, few), (high, all_stages) = PAIRS[order]
        middle = {c: self.grid.between(s, t, c) for c in all_stages}
        lower = self.step(low, [s, *(middle[c] for c in few), t], x)
        return lower, self.step(high, [s, *middle.values(), t], x)

    def step(self, spec: str, nodes: list[Node], x: torch.Tensor) -> torch.Tensor:
        """A solver's result over the given nodes."""
        t, alpha, sigma = np.array(nodes).T
        grid = TimeGrid(t, alpha, sigma, self.grid.noise_schedule)
        trace = Trace(grid, self.predictor.prediction)
        stepper = Stepper(trace.finish(parse(spec).solve(trace, trace.start, grid), spec), x, check=False)
        while not stepper.done:
            node = stepper.node
            if node not in self.known:
                self.known[node] = self.predictor(stepper.x, node)
                self.nfe += 1
            stepper.step(self.known[node])
        return stepper.x

    def renoise(
        self, x: torch.Tensor, low: Node, t: Node, s: Node, s_noise: float, noise: NoiseSource | None
    ) -> torch.Tensor:
        """``x`` at ``low`` with noise added up to ``t``."""
        trace = Trace(self.grid, self.predictor.prediction)
        return Stepper(trace.finish(renoise(trace, trace.start, low, t, (s, t), s_noise)), x, noise).x

    def failure(self, s: Node, x: torch.Tensor, why: str = "") -> NumericalError:
        """The error to raise in a step from ``s``."""
        why = why or "the network's prediction is not finite (NaN or infinity)"
        where = (
            f"before evaluation {self.nfe + 1}, t = {s.t:g} (sigma = {s.sigma:.4g}, alpha = {s.alpha:.4g})"
        )
        return NumericalError(f"sample_adaptive: {why} {where}", self.nfe, s.t, "sample_adaptive", x)
