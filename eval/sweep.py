"""What ``fewstep eval`` will do, decided and checked before any work: solver x NFE x guidance as a list of cells.

A :class:`Plan` holds everything that the run needs and nothing of it is computed later: which program each cell
runs, how many evaluations it will spend, under which key its chunks lie. It is plain data and is written to
``run.json``, so processes that share the work, a resumed run and ``fewstep report`` read the same plan.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..samplers import Solver, compile, parse
from ..schedules import NoiseSchedule, TimeGrid, make_grid, schedule
from ..schedules.spacing import DEFAULT
from ..tuning import Recipe
from . import guiding, recipes, reference
from .guiding import Choice
from .metrics import rank_deficient
from .store import Chunk, chunks, digest
from .targets import Target, load_target

DEFAULT_MODELS = ("builtin:digits-exact", "builtin:digits-unet")
DEFAULT_SOLVERS = (
    "euler",
    "heun:frame=flow",
    "dpmpp_2m",
    "dpmpp_3m",
    "unipc:order=2",
    "unipc:order=3",
    "deis:order=2",
    "deis:order=3",
    "euler_ancestral",
)
DEFAULT_NFE = (4, 5, 6, 8, 10, 20)
AUTO_SCHEDULE = "auto"


@dataclass(frozen=True)
class Config:
    """The choices of one run, as given on the command line. None means the default of the model at hand."""

    models: tuple[str, ...] = DEFAULT_MODELS
    solvers: tuple[str, ...] = DEFAULT_SOLVERS
    nfe: tuple[int, ...] | None = None
    schedules: tuple[str, ...] = (AUTO_SCHEDULE,)
    recipes: tuple[str, ...] = ()
    guidance: tuple[float | str, ...] | None = None
    samples: int | None = None
    seed: int = 0
    chunk: int = 50
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Row:
    """One line of a table: a solver on a spacing, or the content of a recipe's file."""

    solver: str
    schedule: str
    label: str
    order: int
    stochastic: bool
    recipe: dict[str, Any] | None = None


@dataclass(frozen=True)
class Cell:
    """One solver at one budget. ``message`` says why the budget cannot be met; the cell is then not run.

    ``most`` is the NFE that it cannot exceed: what it spends, unless its guidance depends on the data.
    """

    row: int
    budget: int
    key: str = ""
    steps: int = 0
    most: int = 0
    message: str | None = None


@dataclass(frozen=True)
class Panel:
    """One table: one model under one guidance, one reference, all solvers and budgets.

    ``guidance`` is a scale or the text of methods. Under methods a budget is what a cell spends at most. ``cost`` is
    the number of networks that one evaluation of the predictor runs: 2 under guidance. ``identity`` is what must be
    equal for two runs to be comparable.
    """

    id: str
    model: str
    guidance: Choice
    cost: int
    samples: int
    budgets: tuple[int, ...]
    rows: tuple[Row, ...]
    cells: tuple[Cell, ...]
    reference: reference.Reference
    features: str | None
    conditional: bool
    identity: dict[str, Any]
    note: str = ""
    warnings: tuple[str, ...] = ()

    def chunks(self, size: int) -> list[Chunk]:
        return chunks(self.samples, size)


@dataclass(frozen=True)
class Plan:
    """All panels of a run."""

    config: Config
    panels: tuple[Panel, ...]
    milliseconds: dict[str, float] = field(default_factory=dict)
    """Model -> time of one evaluation of one sample, measured once: weighs the progress bar, nothing else."""

    def key(self) -> str:
        """Hash of everything that decides the numbers: names the default results folder."""
        return digest([self.config.chunk, [asdict(p) for p in self.panels]], 8)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        config: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data["config"].items()
        }
        panels = []
        for p in data["panels"]:
            panels.append(
                Panel(
                    **{
                        **p,
                        "budgets": tuple(p["budgets"]),
                        "rows": tuple(Row(**r) for r in p["rows"]),
                        "cells": tuple(Cell(**c) for c in p["cells"]),
                        "reference": reference.Reference(**p["reference"]),
                        "warnings": tuple(p["warnings"]),
                    }
                )
            )
        return cls(Config(**config), tuple(panels), dict(data["milliseconds"]))


# the command line's words ---------------------------------------------------------------------------------------


def split_specs(texts: Iterable[str]) -> tuple[str, ...]:
    """Solver specs from option values: ``"euler,unipc:order=3,variant=bh1 heun"`` are three.

    Spaces separate specs. A comma does too, unless what follows it is ``key=value``, an option of the spec before.
    """
    specs: list[str] = []
    for text in texts:
        for word in text.split():
            fresh = True  # a space ends the spec before, so its options cannot go on here
            for piece in filter(None, word.split(",")):
                if not fresh and re.match(r"[A-Za-z_]\w*=", piece) and specs:
                    specs[-1] += "," + piece
                else:
                    specs.append(piece)
                fresh = False
    return tuple(dict.fromkeys(specs))


def split_numbers(text: str, kind: Callable[[str], Any], what: str) -> tuple[Any, ...]:
    """Numbers separated by commas or spaces; ValueError naming the word that is none."""
    numbers = []
    for word in re.split(r"[,\s]+", text.strip()):
        try:
            numbers.append(kind(word))
        except ValueError:
            raise ValueError(
                f"{what}: {word!r} in {text!r} is not {'an integer' if kind is int else 'a number'}"
            ) from None
    return tuple(dict.fromkeys(numbers))


# expansion ------------------------------------------------------------------------------------------------------


def expand(config: Config, load: Callable[[str], Target] = load_target) -> Plan:
    """Check the whole configuration and lay out every cell.

    Raises:
        ValueError: the first thing that cannot be done, with what is allowed and the nearest valid name: unknown model,
            solver, option or spacing; a budget below 1; a solver that can meet none of the budgets; too few samples.
    """
    if not config.solvers:
        raise ValueError("no solvers given")
    for name, value in (("samples", config.samples), ("chunk", config.chunk), ("threads", config.threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for budget in config.nfe or ():
        if budget < 1:
            raise ValueError(f"an NFE budget must be at least 1, got {budget}")
    solvers = list({s.spec: s for s in map(parse, config.solvers)}.values())
    spacings = [resolve_schedule(s) for s in config.schedules]
    tuned = recipes.named(config.recipes)
    _check_device(config.device)
    panels: list[Panel] = []
    milliseconds: dict[str, float] = {}
    targets = [load(model) for model in config.models]
    wanted = [w for w in map(guiding.choice, config.guidance or ()) if guiding.cost(w) > 1]
    if wanted and not any(target.guidable for target in targets):
        names = ", ".join(target.name for target in targets)
        raise ValueError(f"guidance {wanted[0]} needs an unconditional network; {names} has none")
    recipes.check(tuned, targets)
    for target in targets:
        milliseconds[target.name] = target.to(config.device).probe(config.chunk)
        for guidance in _choices(config, target):
            panels.append(_panel(config, target, guidance, solvers, spacings, tuned))
    _refuse_impossible(panels)
    return Plan(config, tuple(panels), milliseconds)


def resolve_schedule(name: str) -> str:
    """The spacing that a name on the command line means; ``auto`` is the library's own default."""
    if name == AUTO_SCHEDULE:
        return DEFAULT
    schedule(name)
    return name


def _choices(config: Config, target: Target) -> Sequence[Choice]:
    """What a model is guided by: without an unconditional network by what does not need one, or it is run as it is."""
    wanted = dict.fromkeys(map(guiding.choice, config.guidance or target.guidance))
    if not target.guidable:
        wanted = dict.fromkeys(w if guiding.composite(w) else None for w in wanted if guiding.cost(w) == 1)
    return tuple(wanted) or (None,)


def _check_device(device: str) -> None:
    """ValueError for a device that torch does not know or this machine does not have."""
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None


def _panel(
    config: Config,
    target: Target,
    guidance: Choice,
    solvers: Sequence[Solver],
    spacings: Sequence[str],
    tuned: Mapping[str, Recipe],
) -> Panel:
    cost = guiding.cost(guidance)
    tuned = {name: recipe for name, recipe in tuned.items() if recipes.fits(recipe, target)}
    steps_wanted = {*DEFAULT_NFE, *(recipe.nfe for recipe in tuned.values())}
    budgets = tuple(sorted(config.nfe or (cost * n for n in steps_wanted)))
    samples = config.samples or target.samples
    base = {
        "model": target.fingerprint,
        "guidance": guidance,
        "seed": config.seed,
        "device": config.device.split(":")[0],
    }
    truth = reference.plan(target, base)
    if guiding.composite(guidance):
        base["chunk"] = config.chunk  # a method may decide for a whole batch
    rows: list[Row] = []
    cells: list[Cell] = []
    for spacing in spacings:
        for chosen in solvers:
            label = chosen.spec if len(spacings) == 1 else f"{chosen.spec} @ {spacing}"
            stochastic = chosen.stochastic or guiding.noisy(guidance)
            rows.append(Row(chosen.spec, spacing, label, chosen.order, stochastic))
            steps, most, why = _steps(target, guidance, chosen, spacing, budgets, cost)
            for budget in budgets:
                if budget not in steps:
                    cells.append(Cell(len(rows) - 1, budget, message=why))
                    continue
                program = compile(chosen, make_grid(target.noise_schedule, steps[budget], spacing))
                content = {**base, "program": fingerprint(program.to_json()), "reference": truth.key}
                cells.append(Cell(len(rows) - 1, budget, digest(content), steps[budget], most[budget]))
    for name, recipe in tuned.items():
        rows.append(Row(name, "its own", name, 0, guiding.noisy(guidance), recipe.to_dict()))
        program = compile(recipe.solver, recipe.grid(target.noise_schedule)).to_json()
        key = digest({**base, "program": fingerprint(program), "reference": truth.key})
        why = f"{name} spends {cost * recipe.nfe} evaluations"
        for budget in budgets:
            meets = budget == cost * recipe.nfe
            cells.append(
                Cell(len(rows) - 1, budget, key, recipe.nfe, budget)
                if meets
                else Cell(len(rows) - 1, budget, message=why)
            )
    warnings = [w for w in [target.features and rank_deficient(samples, target.features.dimension)] if w]
    warnings += [
        w for name, recipe in tuned.items() for w in recipes.warnings(name, recipe, target, guidance)
    ]
    name = target.name.removeprefix("builtin:")
    return Panel(
        id=_panel_id(name, guidance),
        model=target.name,
        guidance=guidance,
        cost=cost,
        samples=samples,
        budgets=budgets,
        rows=tuple(rows),
        cells=tuple(cells),
        reference=truth,
        features=target.features.fingerprint if target.features else None,
        conditional=target.conditional,
        identity={
            **base,
            "converged solution": f"{truth.solver}, {truth.steps} steps on {truth.schedule}, key {truth.key}",
        },
        note=target.note,
        warnings=tuple(warnings),
    )


def _panel_id(name: str, guidance: Choice) -> str:
    if guidance is None:
        return name
    return f"{name}-{guidance}" if isinstance(guidance, str) else f"{name}-w{guidance:g}"


def _steps(
    target: Target, guidance: Choice, chosen: Solver, spacing: str, budgets: Sequence[int], cost: int
) -> tuple[dict[int, int], dict[int, int], str]:
    """Budget -> steps and -> the most that they spend, and why the others cannot be met."""
    if guiding.composite(guidance):
        try:
            steps, most = guiding.at_most(guidance, target, chosen, spacing, budgets)
        except ValueError as error:
            return {}, {}, str(error)
        return steps, most, f"{chosen.spec} under {guidance} spends more than that in one step"
    reachable = _reachable(chosen, target.noise_schedule, spacing, max(budgets) // cost)
    steps = {b: reachable[b // cost] for b in budgets if b % cost == 0 and b // cost in reachable}
    return steps, {b: b for b in steps}, _explain_misses(chosen, reachable, budgets, cost)


def fingerprint(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _reachable(chosen: Solver, noise_schedule: NoiseSchedule, spacing: str, limit: int) -> dict[int, int]:
    """Evaluations -> steps, up to the first number beyond ``limit``."""
    found: dict[int, int] = {}
    failure: ValueError | None = None
    for steps in range(1, limit + 2):
        try:
            spent = compile(chosen, _grid(noise_schedule, steps, spacing)).nfe
        except ValueError as error:  # a spacing or a method may need more steps than this
            failure = error
            continue
        found.setdefault(spent, steps)
        if spent > limit:
            break
    if not found and failure:
        raise failure
    return found


def _grid(noise_schedule: NoiseSchedule, steps: int, spacing: str) -> TimeGrid:
    return make_grid(noise_schedule, steps, spacing)


def _explain_misses(chosen: Solver, steps: Mapping[int, int], budgets: Sequence[int], cost: int) -> str:
    """One sentence for all budgets that a solver cannot spend exactly, naming the nearest that it can."""
    missed = [b for b in budgets if b % cost or b // cost not in steps]
    near: set[int] = set()
    for budget in missed:
        below = [cost * n for n in steps if cost * n < budget]
        above = [cost * n for n in steps if cost * n > budget]
        near |= {*([max(below)] if below else []), *([min(above)] if above else [])}
    reason = "" if cost == 1 else " (a guided evaluation counts 2)"
    return (
        f"{chosen.spec} cannot spend exactly {_or(missed)} evaluations{reason}; "
        f"nearest budgets: {', '.join(map(str, sorted(near)))}"
    )


def _or(numbers: Sequence[int]) -> str:
    words = [str(n) for n in numbers]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1] if words else "-"


def _refuse_impossible(panels: Sequence[Panel]) -> None:
    for panel in panels:
        missed = []
        for index in range(len(panel.rows)):
            mine = [c for c in panel.cells if c.row == index]
            if all(c.message for c in mine):
                missed.append(mine[0].message)
        if missed and guiding.composite(
            panel.guidance
        ):  # one that works with some of the solvers is measured on them
            if len(missed) == len(panel.rows):
                raise ValueError(f"{panel.id}: {missed[0]}")
        elif missed:
            raise ValueError(f"{panel.id}: {missed[0]}; add one of them to --nfe or drop the solver")
