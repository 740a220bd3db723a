"""``sample()`` and ``sample_adaptive()``: fewstep owns the loop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from numpy.typing import ArrayLike

from ..guidance import Denoiser, Guidance, Method, Predictor, Run
from ..guidance import parse as parse_guidance
from ..samplers import (
    BrownianNoise,
    NoiseSource,
    PhiloxNoise,
    Program,
    Solver,
    Stepper,
    WhiteNoise,
    compile,
    parse,
)
from ..samplers.adaptive import AdaptiveResult, integrate, landmarks
from ..samplers.noise import standard_normal
from ..samplers.teleport import Gaussian
from ..schedules import TimeGrid, make_grid
from ..schedules.spacing import DEFAULT as DEFAULT_SCHEDULE
from ..schedules.spec import bind, options_of, suggestion
from . import cuda_graphs

if TYPE_CHECKING:
    from ..tuning import Recipe

NoiseKind = Literal["white", "brownian", "philox"]
_NOISE = {"white": WhiteNoise, "brownian": BrownianNoise, "philox": PhiloxNoise}


def sample(
    denoiser: Denoiser,
    x: torch.Tensor,
    solver: str | Solver = "unipc",
    steps: int = 8,
    schedule: str = DEFAULT_SCHEDULE,
    *,
    sigmas: ArrayLike | torch.Tensor | None = None,
    guidance: str | float | Method | Guidance | None = None,
    seed: int | Sequence[int] = 0,
    noise: NoiseKind | NoiseSource = "white",
    progress: bool = False,
    recipe: str | Path | Recipe | None = None,
    teleport: tuple[Gaussian, float] | None = None,
    cuda_graph: bool = False,
) -> torch.Tensor:
    """Sample from a denoiser.

    Args:
        denoiser: the network, see :class:`fewstep.Denoiser`.
        x: start state of shape (B, ...): unit noise times the sigma of the first node (1 or nearly so for VP and flow
           schedules, sigma_max for EDM), or a noisy state at ``sigmas[0]`` to start in the middle. For a recipe unit
           noise times its ``init_noise_sigma``: 1, for EDM its first level.
        solver: a spec such as ``"unipc:order=3"``, see :func:`fewstep.solvers`.
        steps: number of intervals. A multistep solver evaluates the network once in each.
        schedule: a spacing such as ``"karras:rho=7"``, see :func:`fewstep.schedules.schedules`; ends without noise.
        sigmas: explicit decreasing noise levels instead (sigma / alpha; sigma for flow models), ending where they end;
           ``steps`` and ``schedule`` are then not used.
        guidance: None, a scale w (``u + w (c - u)``), methods such as ``fs.APG(10.0) + fs.CADS()``, or their text,
           ``"apg:10+cads"``; see :func:`fewstep.guidance.methods`.
        seed: an integer (sample i uses seed + i) or one integer a sample; for stochastic solvers.
        noise: ``"white"``, ``"brownian"`` (the same path for any number of steps), ``"philox"`` (computed on the
           device, other numbers than ``"white"``) or a noise source.
        progress: show a progress bar on stderr.
        recipe: file written by ``fewstep tune`` instead of solver, steps and schedule.
        teleport: a :class:`fewstep.samplers.Gaussian` of the data and a noise level: x is moved there in closed form,
           in place of the steps above it.
        cuda_graph: capture the whole loop, networks included, in a CUDA graph at the first call and replay it at later
           ones with the same arguments and shape; for networks that can be captured. See docs/kernels.md.

    Returns:
        The sample, shape of x, dtype the promotion of x's and the network's.

    Raises:
        ValueError, TypeError: before the first network call, for any argument that cannot be used.
        NumericalError: a prediction was not finite; names step, time and solver.
    """
    if recipe is None:
        methods, grid, chosen = prepare(denoiser, x, solver, steps, schedule, sigmas, guidance)
        if teleport is not None:
            gaussian, level = teleport
            x, grid = gaussian.skip(x, grid, level)
    else:
        if (solver, steps, schedule, sigmas, teleport) != ("unipc", 8, DEFAULT_SCHEDULE, None, None):
            raise ValueError("a recipe has its own solver, steps and levels; leave those arguments out")
        methods, grid, chosen = _tuned(denoiser, x, recipe, guidance)
    program = compile(chosen, grid, prediction=denoiser.prediction)
    source = _noise_source(noise, seed, x.shape[0]) if program.stochastic else None
    run = _run(denoiser, program, chosen, grid, seed, x.shape[0])
    if methods is not None:
        methods.bind(denoiser, run)  # what cannot be is refused before the first network call

    def loop(x: torch.Tensor, advance: Callable[[], None]) -> tuple[torch.Tensor, Stepper]:
        guided = None if methods is None else methods.bind(denoiser, run)
        predictor = denoiser if guided is None else guided
        moves = guided is not None and guided.moves
        noise = source.again() if isinstance(source, PhiloxNoise) else source
        stepper = Stepper(program, x, noise)
        while not stepper.done:
            if guided is not None and moves:
                stepper.x = guided.move(stepper.x, stepper.node)
            stepper.step(predictor(stepper.x, stepper.node))
            advance()
        return guided.move(stepper.x, grid[-1]) if guided is not None and moves else stepper.x, stepper

    if cuda_graph:
        cuda_graphs.check(x, program, methods, source)
        return cuda_graphs.replay(denoiser, (program, methods, source), x, loop)
    with _progress(program.nfe, chosen.spec, progress) as advance:
        return loop(x, advance)[0]


def sample_adaptive(
    denoiser: Denoiser,
    x: torch.Tensor,
    *,
    order: Literal[2, 3] = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    start: float | None = None,
    end: float = 0.0,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
    guidance: str | float | Method | Guidance | None = None,
    seed: int | Sequence[int] = 0,
    noise: NoiseKind | NoiseSource = "white",
) -> AdaptiveResult:
    """Sample with steps that are as long as the tolerances allow: DPM-Solver-12 or -23 (dpm_adaptive of k-diffusion).

    All samples of ``x`` take the same steps, so a result depends on what it is computed together with.

    Args:
        denoiser: the network, see :class:`fewstep.Denoiser`.
        x: start state of shape (B, ...) at ``start``, as for :func:`sample`.
        order: 2 or 3, the evaluations of a step.
        rtol, atol: tolerated error of a step, relative and absolute in units of x / alpha.
        start: noise level of x (sigma / alpha; sigma for flow models); the noisiest trained one if None.
        end: noise level to end at. For 0 the last step is DDIM's, from the cleanest trained level.
        h_init: first step in lambda = log(alpha / sigma).
        pcoeff, icoeff, dcoeff: weights of the controller of the step length; only the second acts by default.
        accept_safety: a step is rejected if it asks for one shorter than this share of itself.
        eta: above 0 steps are ancestral, with noise scaled by ``s_noise``.
        s_noise: see ``eta``.
        guidance, seed, noise: as for :func:`sample`.

    Returns:
        ``x``, the sample; ``nfe``, evaluations of one sample, ``accepted`` and ``rejected`` steps and the ``levels``
        passed through.

    Raises:
        ValueError, TypeError: before the first network call, for any argument that cannot be used.
        NumericalError: a prediction was not finite, or no step meets the tolerances.
    """
    _check(denoiser, x)
    given = {
        "order": order,
        "rtol": rtol,
        "atol": atol,
        "h_init": h_init,
        "pcoeff": pcoeff,
        "icoeff": icoeff,
        "dcoeff": dcoeff,
        "accept_safety": accept_safety,
        "eta": eta,
        "s_noise": s_noise,
    }
    options = bind(options_of(integrate), given, "sample_adaptive")
    grid = landmarks(denoiser.noise_schedule, start, end)
    source = _noise_source(noise, seed, x.shape[0])
    return integrate(_guided(denoiser, guidance), x, grid, source, **options)


def prepare(
    denoiser: Denoiser,
    x: torch.Tensor,
    solver: str | Solver,
    steps: int,
    schedule: str,
    sigmas: ArrayLike | torch.Tensor | None,
    guidance: str | float | Method | Guidance | None,
) -> tuple[Guidance | None, TimeGrid, Solver]:
    """Check the arguments of :func:`sample`; the guidance, the grid and the solver of the run."""
    _check(denoiser, x)
    chosen = parse(solver)
    if sigmas is None:
        grid = make_grid(denoiser.noise_schedule, steps, schedule)
    else:
        levels = sigmas.tolist() if isinstance(sigmas, torch.Tensor) else sigmas
        grid = TimeGrid.from_levels(denoiser.noise_schedule, levels)
    return None if guidance is None else parse_guidance(guidance), grid, chosen


def _tuned(
    denoiser: Denoiser,
    x: torch.Tensor,
    recipe: str | Path | Recipe,
    guidance: str | float | Method | Guidance | None,
) -> tuple[Guidance | None, TimeGrid, Solver]:
    """As ``prepare``, for a recipe."""
    from ..tuning import load

    _check(denoiser, x)
    loaded = load(recipe)
    grid = loaded.grid(denoiser.noise_schedule)
    methods = None if guidance is None else parse_guidance(guidance)
    loaded.check(guidance="" if methods is None else methods.spec)
    return methods, grid, loaded.solver


def _check(denoiser: Denoiser, x: torch.Tensor) -> None:
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"denoiser must be a fewstep.Denoiser, got {type(denoiser).__name__}")
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.ndim < 1:
        raise TypeError("x must be a floating-point tensor of shape (B, ...): the start state")
    if denoiser.shape is not None and tuple(x.shape[1:]) != denoiser.shape:
        raise ValueError(f"x has samples of shape {tuple(x.shape[1:])}, the denoiser takes {denoiser.shape}")


def _guided(denoiser: Denoiser, guidance: str | float | Method | Guidance | None) -> Predictor:
    return denoiser if guidance is None else parse_guidance(guidance).bind(denoiser)


def _run(
    denoiser: Denoiser,
    program: Program,
    chosen: Solver,
    grid: TimeGrid,
    seed: int | Sequence[int],
    batch: int,
) -> Run:
    """What guidance is told of a run."""
    one = chosen.evaluations_per_step == 1 and not chosen.startup_evaluations
    first_order = one and chosen.order == 1 and not program.stochastic and not program.history
    return Run(
        denoiser.noise_schedule,
        denoiser.prediction,
        nodes=program.evaluations,
        end=grid[-1],
        stages=chosen.evaluations_per_step,
        startup=chosen.startup_evaluations,
        history=program.history,
        deterministic=not program.stochastic,
        first_order=first_order,
        condition=denoiser.condition is not None,
        noise=partial(standard_normal, _seeds(seed, batch)),
        solver=chosen.spec,
    )


def _noise_source(noise: NoiseKind | NoiseSource, seed: int | Sequence[int], batch: int) -> NoiseSource:
    if not isinstance(noise, str):
        return noise
    if noise not in _NOISE:
        raise ValueError(
            f"noise must be 'white', 'brownian', 'philox' or a source, got {noise!r}{suggestion(noise, _NOISE)}"
        )
    return _NOISE[noise](_seeds(seed, batch))


def _seeds(seed: int | Sequence[int], batch: int) -> list[int]:
    seeds = [seed + i for i in range(batch)] if isinstance(seed, int) else list(seed)
    if len(seeds) != batch:
        raise ValueError(
            f"{len(seeds)} seeds for a batch of {batch} samples; give one integer or one a sample"
        )
    return seeds


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
