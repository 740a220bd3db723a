"""Published steps with a quirk that fewstep does not ship, as solvers that reproduce their golden files.

FSampler (https://github.com/obisin/ComfyUI-FSampler) guards divisions by adding 1e-8 to a noise level, ends Heun's
method with the prediction, calls Adams-Bashforth of second order "dpmpp_2m" and divides its older slope by the
level of the step before even where that step was skipped, and starts "res_2m" with h in the place of 1 - e^{-h}.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import fewstep as fs
from fewstep.samplers import Linear, Solver, Trace
from fewstep.samplers.registry import Declaration
from fewstep.schedules import TimeGrid

GUARD = 1e-8


def heun(trace: Trace, x: Linear, grid: TimeGrid) -> Linear:
    for s, t in grid.intervals():
        x, m = trace.evaluate(x, s)
        e = m.denoised - x
        if t.sigma == 0.0:
            return x + e
        skipped = _skipped(trace)
        slope = -e / (s.sigma + (0.0 if skipped else GUARD))
        u, m = trace.evaluate(x + (t.sigma - s.sigma) * slope, t)
        x = x + (t.sigma - s.sigma) / 2 * (slope - (m.denoised - u) / (t.sigma + GUARD))
    return x


def dpmpp_2m(trace: Trace, x: Linear, grid: TimeGrid) -> Linear:
    last, level = None, 0.0
    for s, t in grid.intervals():
        x, m = trace.evaluate(x, s)
        e = m.denoised - x
        slope = -e / s.sigma
        if last is not None:
            slope = 1.5 * slope + 0.5 * last / (level + GUARD)
        x = x + (t.sigma - s.sigma) * slope
        level = s.sigma
        if not _skipped(trace):
            last = e
    return x


def res_2m(trace: Trace, x: Linear, grid: TimeGrid) -> Linear:
    last, before = None, None
    for s, t in grid.intervals():
        x, m = trace.evaluate(x, s)
        if t.sigma == 0.0:
            return m.denoised
        h = math.log(s.sigma / t.sigma)
        if last is None or before is None:
            x = x + h * (m.denoised - x)
        else:
            phi_1 = -math.expm1(-h) / h
            b = (1.0 - phi_1) / h / (-math.log(before.sigma / s.sigma) / h)
            x = math.exp(-h) * x + h * ((phi_1 - b) * m.denoised + b * last)
        last, before = m.denoised, s
    return x


def _skipped(trace: Trace) -> bool:
    return getattr(trace, "continued", None) is not None


def fsampler(name: str, transform: str) -> Solver:
    """FSampler's own sampler of this name under a skip transform (``""`` for none)."""
    function: Callable[..., Any] = {"heun": heun, "dpmpp_2m": dpmpp_2m, "res_2m": res_2m}[name]
    cost = 2 if name == "heun" else 1
    one = lambda **_: 1  # noqa: E731
    declaration = Declaration(
        f"fsampler_{name}",
        function,
        "golden",
        one,
        one,
        lambda **_: cost,
        lambda **_: 0,
        lambda **_: False,
        {},
        "",
    )
    return Solver(declaration, {}, fs.solver(f"euler{transform}").transforms)
