"""``sample()``: fewstep owns the loop."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from numpy.typing import ArrayLike

from ..guidance import CFG, Denoiser, Predictor
from ..samplers import BrownianNoise, NoiseSource, Solver, Stepper, WhiteNoise, compile, parse
from ..schedules import TimeGrid, make_grid
from ..schedules.spacing import DEFAULT as DEFAULT_SCHEDULE
from ..schedules.spec import suggestion

NoiseKind = Literal["white", "brownian"]
_NOISE = {"white": WhiteNoise, "brownian": BrownianNoise}


def sample(
    denoiser: Denoiser,
    x: torch.Tensor,
    solver: str | Solver = "unipc",
    steps: int = 8,
    schedule: str = DEFAULT_SCHEDULE,
    *,
    sigmas: ArrayLike | torch.Tensor | None = None,
    guidance: CFG | float | None = None,
    seed: int | Sequence[int] = 0,
    noise: NoiseKind | NoiseSource = "white",
    progress: bool = False,
) -> torch.Tensor:
    """Sample from a denoiser.

    Args:
        denoiser: the network, see :class:`fewstep.Denoiser`.
        x: start state of shape (B, ...): unit noise times the sigma of the first node (1 or nearly so for VP and flow
           schedules, sigma_max for EDM), or a noisy state at ``sigmas[0]`` to start in the middle.
        solver: a spec such as ``"unipc:order=3"``, see :func:`fewstep.solvers`.
        steps: number of intervals. A multistep solver evaluates the network once in each.
        schedule: a spacing such as ``"karras:rho=7"``, see :func:`fewstep.schedules.schedules`; ends without noise.
        sigmas: explicit decreasing noise levels instead (sigma / alpha; sigma for flow models), ending where they end;
           ``steps`` and ``schedule`` are then not used.
        guidance: None, a scale w or :class:`fewstep.CFG`: ``u + w (c - u)``.
        seed: an integer (sample i uses seed + i) or one integer a sample; for stochastic solvers.
        noise: ``"white"``, ``"brownian"`` (the same path for any number of steps) or a noise source.
        progress: show a progress bar on stderr.

    Returns:
        The sample, shape of x, dtype the promotion of x's and the network's.

    Raises:
        ValueError, TypeError: before the first network call, for any argument that cannot be used.
        NumericalError: a prediction was not finite; names step, time and solver.
    """
    predictor, grid, chosen = prepare(denoiser, x, solver, steps, schedule, sigmas, guidance)
    program = compile(chosen, grid, prediction=predictor.prediction)
    stepper = Stepper(program, x, _noise_source(noise, seed, x.shape[0]) if program.stochastic else None)
    with _progress(program.nfe, chosen.spec, progress) as advance:
        while not stepper.done:
            stepper.step(predictor(stepper.x, stepper.node))
            advance()
    return stepper.x


def prepare(
    denoiser: Denoiser,
    x: torch.Tensor,
    solver: str | Solver,
    steps: int,
    schedule: str,
    sigmas: ArrayLike | torch.Tensor | None,
    guidance: CFG | float | None,
) -> tuple[Predictor, TimeGrid, Solver]:
    """Check the arguments of :func:`sample`; the predictor, the grid and the solver of the run."""
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"denoiser must be a fewstep.Denoiser, got {type(denoiser).__name__}")
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.ndim < 1:
        raise TypeError("x must be a floating-point tensor of shape (B, ...): the start state")
    if denoiser.shape is not None and tuple(x.shape[1:]) != denoiser.shape:
        raise ValueError(f"x has samples of shape {tuple(x.shape[1:])}, the denoiser takes {denoiser.shape}")
    chosen = parse(solver)
    if sigmas is None:
        grid = make_grid(denoiser.noise_schedule, steps, schedule)
    else:
        levels = sigmas.tolist() if isinstance(sigmas, torch.Tensor) else sigmas
        grid = TimeGrid.from_levels(denoiser.noise_schedule, levels)
    if guidance is None:
        return denoiser, grid, chosen
    return (guidance if isinstance(guidance, CFG) else CFG(guidance)).bind(denoiser), grid, chosen


def _noise_source(noise: NoiseKind | NoiseSource, seed: int | Sequence[int], batch: int) -> NoiseSource:
    if not isinstance(noise, str):
        return noise
    if noise not in _NOISE:
        raise ValueError(
            f"noise must be 'white', 'brownian' or a source, got {noise!r}{suggestion(noise, _NOISE)}"
        )
    seeds = [seed + i for i in range(batch)] if isinstance(seed, int) else list(seed)
    if len(seeds) != batch:
        raise ValueError(
            f"{len(seeds)} seeds for a batch of {batch} samples; give one integer or one a sample"
        )
    return _NOISE[noise](seeds)


@contextmanager
def _progress(total: int, label: str, show: bool) -> Iterator[Any]:
    """A one-line bar without dependencies; yields the function that advances it."""
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if show:
            bar = "#" * (24 * done // total)
            print(f"\r{label} [{bar:<24}] {done}/{total}", end="", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if show:
            print(file=sys.stderr)
