"""Two results folders side by side: paired differences on the same indices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .metrics import Estimate, Moments, frechet_interval, jackknife, mean_interval
from .store import Store
from .sweep import Cell, Panel, Plan


def compare(a: Path | str, b: Path | str) -> dict[str, Any]:
    """What B changed against A, cell by cell, for the solvers and budgets that both have.

    A difference is B - A per index (distance) or of the paired jackknife (Fréchet distance), with its 95 %
    interval; its verdict is ``better`` or ``worse`` where the interval excludes zero. Both must hold the same
    models, the same converged solution and the same indices: everything else is a comparison of different
    things.

    Raises:
        ValueError: not results folders, nothing in common, or naming what differs.
    """
    stores = Store(a), Store(b)
    plans = [Plan.from_json(s.load_json("run.json")["plan"]) for s in stores]
    theirs = {p.id: p for p in plans[1].panels}
    common = [p for p in plans[0].panels if p.id in theirs]
    if not common:
        names = [", ".join(p.id for p in plan.panels) for plan in plans]
        raise ValueError(f"nothing in common: {a} holds {names[0]}; {b} holds {names[1]}")
    panels = []
    for mine in common:
        _refuse(mine, theirs[mine.id], a, b)
        panels.append(_panel(plans[0], mine, stores[0], plans[1], theirs[mine.id], stores[1]))
    if not any(p["cells"] for p in panels):
        raise ValueError(f"{a} and {b} have no finished cell of the same solver and budget in common")
    return {"a": str(a), "b": str(b), "panels": panels}


def _refuse(mine: Panel, other: Panel, a: Path | str, b: Path | str) -> None:
    facts = {
        **{k: (v, other.identity.get(k)) for k, v in mine.identity.items()},
        "samples": (mine.samples, other.samples),
    }
    for name, (left, right) in facts.items():
        if left != right:
            what = {"samples": "the indices differ: 0 to samples - 1 of"}.get(name, f"the {name} differs:")
            raise ValueError(f"{mine.id}: cannot compare, {what} {left} in {a}, {right} in {b}")


def _panel(plan_a: Plan, a: Panel, store_a: Store, plan_b: Plan, b: Panel, store_b: Store) -> dict[str, Any]:
    ours, theirs = _cells(a), _cells(b)
    found = []
    for name, cell in ours.items():
        if name not in theirs:
            continue
        left = _load(plan_a, a, store_a, cell)
        right = _load(plan_b, b, store_b, theirs[name])
        if left is None or right is None:
            continue
        row_a, row_b = a.rows[cell.row], b.rows[theirs[name].row]
        metrics = {}
        if "distance" in left and "distance" in right:
            metrics["rms"] = _entry(
                float(left["distance"].mean()),
                float(right["distance"].mean()),
                mean_interval(right["distance"] - left["distance"]),
            )
        if "features" in left and "features" in right and a.features:
            arrays, info = store_a.load_arrays(f"reference-{a.features}.safetensors")
            moments = Moments(info["count"], arrays["mean"], arrays["covariance"])
            before, after = (jackknife(x["features"], moments) for x in (left, right))
            metrics["frechet"] = _entry(before.value, after.value, frechet_interval(after, before))
        label = row_a.solver
        if row_a.schedule != row_b.schedule:
            label += f" ({row_a.schedule} | {row_b.schedule})"
        found.append({"label": label, "budget": cell.budget, "metrics": metrics})
    return {"id": a.id, "samples": a.samples, "cells": found}


def _cells(panel: Panel) -> dict[tuple[str, str, int], Cell]:
    """Solver, spacing and budget -> cell; the spacing counts only where a folder has several."""
    several = len({row.schedule for row in panel.rows}) > 1
    rows = panel.rows
    return {
        (rows[c.row].solver, rows[c.row].schedule if several else "", c.budget): c
        for c in panel.cells
        if not c.message
    }


def _load(plan: Plan, panel: Panel, store: Store, cell: Cell) -> Mapping[str, np.ndarray] | None:
    parts = panel.chunks(plan.config.chunk)
    if store.failure(cell.key) is not None or not all(store.has(cell.key, part) for part in parts):
        return None
    return store.load_chunks(cell.key, parts)[0]


def _entry(a: float, b: float, difference: Estimate) -> dict[str, Any]:
    sure = math.isfinite(difference.low) and not difference.low <= 0.0 <= difference.high
    verdict = "not resolved" if not sure else "better" if difference.value < 0 else "worse"
    if difference.value == 0.0 and not difference.low < difference.high:
        verdict = "identical"
    return {"a": a, "b": b, "difference": difference.to_json(), "verdict": verdict}
