"""DC-Solver's ratios for several numbers of evaluations and guidance scales: ``fewstep tune --method dc``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..schedules.spacing import DEFAULT
from ..tuning import error, fit_cascade, search_ratios, table_of
from ..tuning.dc import SOLVER, spec_of
from ..tuning.grids import starting_grids
from ..tuning.strategies import DC_TRAJECTORIES, split
from ..tuning.tune import Say, seeds
from .launched import Group
from .targets import Target
from .tuning import TEACHER_STEPS, check, solve_together, source_of, trajectories_key


def cascade(
    target: Target,
    nfes: Sequence[int],
    scales: Sequence[float | str | None],
    *,
    trajectories: int = 32,
    teacher_steps: int = TEACHER_STEPS,
    schedule: str = DEFAULT,
    seed: int = 0,
    batch: int = 64,
    cache: Path | None = None,
    group: Group = Group(),  # noqa: B008
    solved: Callable[[int], None] = lambda n: None,
    say: Say = lambda what, error: None,
) -> dict[str, Any] | None:
    """DC-Solver's ratios in every cell, and the polynomial that predicts them at other evaluations and scales.

    All cells have one spacing, ``schedule``, as ratios of different ones have nothing in common. The other arguments
    are those of :func:`fit`. The result is what ``dc:cascade=FILE.json`` reads, with the cells and their errors on
    trajectories that the search has not seen: ``held_out`` with the ratios and ``fixed`` without; None on the ranks
    above 0 of a launcher.

    Raises ValueError for what :func:`fit` refuses, and for guidance that is not a number.
    """
    for nfe in nfes:
        check(nfe, trajectories, teacher_steps, "dc", (schedule,))
    if named := [w for w in scales if isinstance(w, str)]:
        raise ValueError(f"a polynomial in the guidance scale needs numbers, got --guidance {named[0]!r}")
    cells = []
    for w in scales:
        source = source_of(target, w, batch)
        chosen, key = list(seeds(trajectories, seed)), trajectories_key(target, w)
        truth = solve_together(source, chosen, teacher_steps, cache, key, group, solved)
        if truth is None:
            continue
        some, rest = split(truth, DC_TRAJECTORIES)
        for nfe in nfes:
            (grid,) = starting_grids(source, truth, nfe, (schedule,)).values()
            told = partial(_told, say, f"NFE {nfe}, guidance {w}")
            ratios = search_ratios(source, some, grid, say=told)
            with_ratios, without = (table_of(spec, grid) for spec in (spec_of(ratios), SOLVER))
            errors = {"held_out": error(with_ratios, source, rest), "fixed": error(without, source, rest)}
            cells.append({"nfe": nfe, "guidance": w, "ratios": list(ratios), "errors": errors})
    if group.rank > 0:
        return None
    return {
        "cascade": list(fit_cascade({(c["nfe"], c["guidance"] or 1.0): c["ratios"] for c in cells})),
        "model": target.name,
        "fingerprint": target.fingerprint,
        "schedule": schedule,
        "cells": cells,
    }


def _told(say: Say, cell: str, step: int, error: float) -> None:
    say(f"{cell}, ratio of step {step + 1}", error)
