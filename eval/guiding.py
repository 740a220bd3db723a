"""Guidance as an axis of ``fewstep eval``: its text, what a run under it may spend, what it is measured against."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..guidance import CFG, Denoiser, Guidance, methods, options_of, parse
from ..guidance.method import Method
from ..hosts.library import sample
from ..samplers import Solver
from ..schedules.spec import render
from .targets import Target

Choice = float | str | None
"""Guidance of a panel: none, a scale of plain classifier-free guidance, or the canonical text of any other."""

SAVING = ("adaptive", "linear_ag", "extrapolate")
"""Methods that leave evaluations out. How many may depend on the data, and what they leave out is their error: they are
measured against the converged solution of the run that leaves nothing out."""


def choice(given: float | str) -> Choice:
    """What a word of ``--guidance`` means; ValueError naming what is allowed and the nearest name."""
    try:
        given = float(given)
    except ValueError:
        pass
    guidance = parse(given)
    (first, *others) = guidance.methods
    if not others and isinstance(first, CFG) and first.constant and first.scale is not None:
        return first.scale
    return text(guidance)


def text(guidance: Guidance) -> str:
    """The shortest text that means the same, with the scale always in it: ``apg:10+cads``, ``cfg:3+adaptive:0.99``."""
    return "+".join(_method_text(m) for m in guidance.methods)


def _method_text(m: Method) -> str:
    options = options_of(type(m))
    first = next(iter(options), "")
    values = {k: getattr(m, k) for k, o in options.items() if getattr(m, k) != o.default}
    if m.weight is not None:
        values = {first: m.weight, **values}
    words = render("", {k: f"{v:g}" if isinstance(v, float) else v for k, v in values.items()})
    return m.name + words.replace(f":{first}=", ":", 1)


def composite(guidance: Choice) -> bool:
    """Whether it is more than one constant scale."""
    return isinstance(guidance, str)


def cost(guidance: Choice) -> int:
    """Networks that an evaluation of a guided step runs, for the default budgets and the progress bar."""
    if guidance is None:
        return 1
    return 2 if guidance != 0.0 and parse(guidance).guides else 1


def noisy(guidance: Choice) -> bool:
    """Whether it draws noise, so that samples do not follow a differential equation."""
    return guidance is not None and any(m.needs_noise for m in parse(guidance).methods)


def data_dependent(guidance: Choice) -> bool:
    """Whether the samples decide what is spent."""
    return guidance is not None and parse(guidance).has(*SAVING)


def converged(guidance: Choice) -> Choice:
    """The guidance of the converged solution: without methods that save evaluations and those that draw noise.

    PCG, whose steps are guided by its corrector alone, leaves plain classifier-free guidance at its gamma.
    """
    if guidance is None or not composite(guidance):
        return guidance
    parsed = parse(guidance)
    kept = tuple(m for m in parsed.methods if m.name not in SAVING and not m.needs_noise)
    if parsed.weight != 1.0 and all(m.weight is None for m in kept):
        kept = (*kept, methods()["cfg"](parsed.weight))  # type: ignore[call-arg]
    return choice(text(Guidance(kept))) if kept else None


def at_most(
    guidance: Choice, target: Target, chosen: Solver, spacing: str, budgets: Sequence[int]
) -> tuple[dict[int, int], dict[int, int]]:
    """Budget -> the most steps that spend no more than it, and what these spend at most.

    Counted on two networks that answer with noise: predictions that agree in nothing, so that no method finds a
    reason to leave an evaluation out. ValueError where the solver or the model cannot have this guidance.
    """
    steps: dict[int, int] = {}
    spent: dict[int, int] = {}
    failure: ValueError | None = None
    for count in range(1, 2 * max(budgets) + 1):  # a method may leave out up to half of the evaluations
        try:
            used = _count(guidance, target, chosen, spacing, count)
        except ValueError as error:
            if steps:  # one step is possible, more are not: the solver does not suit it
                raise
            failure = error  # a spacing or a method may need more steps than this
            continue
        fitting = [b for b in budgets if used <= b]
        if not fitting:
            break
        for budget in fitting:
            steps[budget], spent[budget] = count, used
    if failure and not steps:
        raise failure
    return steps, spent


def _count(guidance: Choice, target: Target, chosen: Solver, spacing: str, steps: int) -> int:
    model = target.denoiser([0])
    generator = torch.Generator().manual_seed(0)

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        answer = torch.randn(x.shape, generator=generator).to(x)
        return 0.0 * x + 1e3 * answer  # so large that no form of the prediction is dominated by x

    double = Denoiser(
        network,
        model.noise_schedule,
        "denoised",
        model.shape,
        None if model.unconditional is None else network,
        condition=model.condition,
        branches=dict.fromkeys(model.branches, network),
    )
    sample(double, target.noise([0], 0).cpu(), chosen, steps, spacing, guidance=guidance)
    return double.nfe
