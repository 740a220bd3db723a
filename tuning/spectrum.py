r"""Levels from the data's covariance spectrum, without a network.

For data N(0, C) the denoised prediction along an eigenvector of C with eigenvalue l is the number

``alpha l / (alpha^2 l + sigma^2)`` times the state,

so a whole program is one factor an eigenvalue, known from the program alone. Real data is not Gaussian; its spectrum
still says at which noise levels its details are decided. Where a spectrum comes from: :mod:`fewstep.tuning.spectra`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from ..samplers import Combine, Evaluate, Noise, Program, Solver, compile, parse
from ..schedules import NoiseSchedule, TimeGrid, conversion, make_grid
from .spectra import spectrum_of
from .table import angle, levels_at
from .teacher import Source, Trajectories

GROUPS = 128
"""Eigenvalues that a search looks at: of a longer spectrum the means of as many groups of equal size."""
SCALES = (0.5, 1.0, 2.0)
"""Where searches begin: ``arctan`` grids whose scale is the data's standard deviation times these."""


def gains(program: Program, eigenvalues: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """What a run makes of its start state and of its noises along every eigenvector.

    Returns the factor of the start state (n,) and the variance (n,) that the drawn noises, which are independent, add.
    """
    variance = _checked(eigenvalues)
    draws = {op.dst: i for i, op in enumerate((o for o in program.ops if isinstance(o, Noise)), 1)}
    sources = np.eye(1 + len(draws))[:, :, None] * np.ones_like(variance)
    form = {0: sources[0]}
    for op, dead in zip(program.ops, program.releases):
        if isinstance(op, Combine):
            form[op.dst] = np.sum([coef * form[src] for src, coef in op.terms], axis=0)
        elif isinstance(op, Evaluate):
            node = program.nodes[op.node]
            c_x, c_m = conversion("denoised", program.prediction, node)
            denoised = node.alpha * variance / (node.alpha**2 * variance + node.sigma**2)
            form[op.dst] = (c_x + c_m * denoised) * form[op.src]
        else:
            form[op.dst] = sources[draws[op.dst]]
        for register in dead:
            del form[register]
    start, *noises = form[program.output]
    return start, np.sum(np.square(noises), axis=0) + np.zeros_like(variance)


def spectrum_error(program: Program, grid: TimeGrid, eigenvalues: ArrayLike) -> float:
    """RMS error per element of a program's results on Gaussian data, started from noise of size sigma.

    The probability flow takes a start state to ``sqrt((alpha_t^2 l + sigma_t^2) / (alpha_T^2 l + sigma_T^2))`` times
    itself. A deterministic program is compared with that state by state; a stochastic one by the standard deviation of
    its results, which is the Frechet distance per element.
    """
    return float(np.sqrt(np.mean(np.square(_residual(program, grid, _checked(eigenvalues))))))


def _residual(program: Program, grid: TimeGrid, variance: np.ndarray) -> np.ndarray:
    top, end = grid[0], grid[-1]
    exact = np.sqrt((end.alpha**2 * variance + end.sigma**2) / (top.alpha**2 * variance + top.sigma**2))
    start, noise = gains(program, variance)
    if not program.stochastic:
        return top.sigma * (start - exact)
    return np.sqrt((top.sigma * start) ** 2 + noise) - top.sigma * exact


def from_spectrum(
    noise_schedule: NoiseSchedule,
    steps: int,
    eigenvalues: ArrayLike,
    *,
    solver: str | Solver = "dpmpp_2m",
) -> np.ndarray:
    """Levels (steps + 1, the last 0) of least :func:`spectrum_error`, for any solver and transform of the registry.

    The logarithms of the gaps between the levels' angles ``atan(sigma / alpha)`` are fitted by Levenberg-Marquardt,
    from several ``arctan`` grids. The network is not called; ten steps take about a second.

    Args:
        noise_schedule: of the model; the run begins at its noisiest level.
        steps: intervals.
        eigenvalues: of the covariance of the data that the network sees, any number and order; from
            :func:`fewstep.tuning.spectra.spectrum_of` or :func:`fewstep.tuning.spectra.power_law`.
        solver: what will run on the levels.

    Raises ValueError for fewer than one step, a spectrum without a positive number, and an unknown solver.
    """
    solver, variance = parse(solver), _grouped(_checked(eigenvalues))
    scale = math.sqrt(float(variance.mean()))
    found: list[tuple[float, np.ndarray]] = []
    for factor in SCALES:
        start = make_grid(noise_schedule, steps, f"arctan:scale={factor * scale!r}")
        gaps = -np.diff([angle(node) for node in start])

        def grid(change: np.ndarray, start: TimeGrid = start, gaps: np.ndarray = gaps) -> TimeGrid:
            moved = gaps * np.exp(np.append(change, 0.0))
            angles = angle(start[0]) - np.cumsum(moved * gaps.sum() / moved.sum())
            inner = levels_at(noise_schedule, list(angles[:-1]))
            return TimeGrid.from_levels(noise_schedule, [start.level[0], *inner, start.level[-1]])

        def residual(change: np.ndarray, grid: Callable[[np.ndarray], TimeGrid] = grid) -> np.ndarray:
            nodes = grid(change)
            return _residual(compile(solver, nodes), nodes, variance)

        best = least_squares(residual, np.zeros(steps - 1))
        found.append((float(np.linalg.norm(residual(best))), grid(best).level))
    return min(found, key=lambda pair: pair[0])[1]


def search(
    source: Source, truth: Trajectories, nfe: int, *, solver: str | Solver = "dpmpp_2m"
) -> tuple[float, ...]:
    """:func:`from_spectrum` with the spectrum of the converged samples; one of the searches."""
    spectrum = spectrum_of(truth.result)
    return tuple(from_spectrum(source.noise_schedule, nfe, spectrum, solver=solver).tolist())


def least_squares(
    residual: Callable[[np.ndarray], np.ndarray], start: np.ndarray, iterations: int = 40
) -> np.ndarray:
    """Parameters near ``start`` of least squared residual, by Levenberg-Marquardt with differences for derivatives.

    A trial that raises ValueError is only rejected. Never worse than ``start``.
    """
    x, r, damping, width = start, residual(start), 1e-3, 1e-5
    for _ in range(iterations if len(start) else 0):
        try:
            columns = [(residual(x + width * e) - r) / width for e in np.eye(len(x))]
        except ValueError:
            break
        jacobian, before = np.stack(columns, 1), float(r @ r)
        curvature, slope = jacobian.T @ jacobian, jacobian.T @ r
        for _ in range(8):
            step = -np.linalg.solve(curvature + damping * np.diag(np.diag(curvature) + 1e-12), slope)
            try:
                trial = residual(x + np.clip(step, -1.0, 1.0))
            except ValueError:
                trial = np.full_like(r, math.inf)
            if trial @ trial < before:
                x, r, damping = x + np.clip(step, -1.0, 1.0), trial, max(damping / 5.0, 1e-9)
                break
            damping *= 5.0
        if not float(r @ r) < before * (1.0 - 1e-4):
            break
    return x


def _checked(eigenvalues: ArrayLike) -> np.ndarray:
    variance = np.asarray(eigenvalues, dtype=np.float64).ravel()
    if not np.all(np.isfinite(variance)) or np.any(variance < 0) or not np.any(variance > 0):
        raise ValueError(
            "a spectrum is a list of eigenvalues of a covariance: finite, none negative, at least one positive"
        )
    return variance


def _grouped(variance: np.ndarray) -> np.ndarray:
    ascending = np.sort(variance)
    if len(ascending) <= GROUPS:
        return ascending
    return np.array([part.mean() for part in np.array_split(ascending, GROUPS)])
