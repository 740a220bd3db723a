"""Guidance compared: the panels of one model, which differ in their guidance only, as the rows of one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .words import guidance_text

METRICS = ("frechet", "agreement", "precision", "recall", "diversity", "nfe")
"""What can be compared: a distance to the converged solution cannot, each guidance has its own."""

NOTE = (
    "Every guidance at equal budgets: what a sample may spend at most. NFE is what it did spend, in the mean, where a "
    "method decides from the samples."
)


def overviews(panels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each model with more than one guidance: its panels joined to one, in their form.

    Rows are solver and guidance; ``nfe`` of a cell has the form of an estimate. Models with no more than a scale beside
    no guidance are left out.
    """
    found = []
    for model in dict.fromkeys(p["model"] for p in panels):
        mine = [p for p in panels if p["model"] == model and p["guidance"] is not None]
        if sum(p["guidance"] != 1.0 for p in mine) >= 2:
            found.append(_joined(model, mine))
    return found


def _joined(model: str, panels: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    cells: list[dict[str, Any]] = []
    for panel in panels:
        first = len(rows)
        for row in panel["rows"]:
            label = row["label"] if len(panel["rows"]) > 1 else ""
            rows.append({**row, "label": f"{label}  {guidance_text(panel['guidance'])}".strip()})
        for cell in panel["cells"]:
            spent = cell.get("nfe")
            estimate = None if spent is None else {"value": spent, "low": None, "high": None}
            cells.append({**cell, "row": first + cell["row"], "nfe": estimate})
    return {
        "id": f"{model}-guidance",
        "model": f"{model}: guidance compared",
        "guidance": None,
        "cost": 1,
        "note": NOTE,
        "budgets": sorted({b for p in panels for b in p["budgets"]}),
        "rows": rows,
        "cells": cells,
    }
