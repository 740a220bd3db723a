"""Who is better: ranks per budget, mean ranks and geometric-mean ratios, from the cells of one panel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def values(panel: Mapping[str, Any], metric: str) -> dict[tuple[int, int], float]:
    """(row, budget) -> value of a metric; cells that failed, were not reachable or have no such number are left out."""
    found = {}
    for cell in panel["cells"]:
        estimate = cell.get(metric)
        if estimate is not None and estimate["value"] is not None:
            found[cell["row"], cell["budget"]] = float(estimate["value"])
    return found


def ranking(panel: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
    """Rows of the panel, best first.

    Per budget the rank among the solvers that met it (1 is best, ties share their mean rank). Over the budgets the mean
    rank, and the geometric mean of value / best value of that budget, which decides the order: a rank does not
    tell a photo finish from a defeat. Budgets a solver cannot meet do not enter; ``budgets`` counts those that did.

    Returns a list of ``{row, ranks: {budget: rank}, mean_rank, ratio, budgets}``. Rows without a value are left out.
    """
    found = values(panel, metric)
    rows = sorted({row for row, _ in found})
    ranks: dict[int, dict[int, float]] = {row: {} for row in rows}
    logs: dict[int, list[float]] = {row: [] for row in rows}
    for budget in panel["budgets"]:
        column = {row: found[row, budget] for row in rows if (row, budget) in found}
        if not column:
            continue
        best = min(column.values())
        for row, value in column.items():
            below = sum(other < value for other in column.values())
            equal = sum(other == value for other in column.values())
            ranks[row][budget] = below + (equal + 1) / 2
            if best > 0:
                logs[row].append(math.log(value / best))
    result = [
        {
            "row": row,
            "ranks": ranks[row],
            "mean_rank": sum(ranks[row].values()) / len(ranks[row]),
            "ratio": math.exp(sum(logs[row]) / len(logs[row])) if logs[row] else None,
            "budgets": len(ranks[row]),
        }
        for row in rows
    ]
    return sorted(result, key=lambda r: (r["ratio"] is None, r["ratio"] or 0.0, r["mean_rank"], r["row"]))


def middle_budget(budgets: Sequence[int]) -> int:
    """The budget that stands for the panel in one sentence: 10 (20 for a guided one) or the nearest there is."""
    middle = sorted(budgets)[len(budgets) // 2]
    preferred = [b for b in (10, 20) if b in budgets]
    return preferred[0] if preferred else middle


def cheaper_than(panel: Mapping[str, Any], metric: str, row: int, baseline: int) -> tuple[int, int] | None:
    """(budget of the baseline, smallest budget with which ``row`` is at least as good), for the baseline's
    largest budget; None where that says nothing (the row is the baseline, or needs as many evaluations).
    """
    found = values(panel, metric)
    theirs = [b for b in panel["budgets"] if (baseline, b) in found]
    if not theirs or row == baseline:
        return None
    target = max(theirs)
    enough = [
        b for b in sorted(panel["budgets"]) if (row, b) in found and found[row, b] <= found[baseline, target]
    ]
    return (target, enough[0]) if enough and enough[0] < target else None
