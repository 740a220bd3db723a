"""Numbers and names as they are shown, the same in the terminal and in the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .metrics import METRICS

LABEL = {m.name: m.label for m in METRICS}
SHARES = {m.name for m in METRICS if m.unit.startswith("share of")}
UNIT = {m.name: m.unit for m in METRICS}
HIGHER_IS_BETTER = {m.name for m in METRICS if m.better == "higher"}


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits without exponents: 0.0983, 12.3, 104."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 8)}f}"


def half_width(estimate: Mapping[str, float | None]) -> str:
    """± half the interval, to two digits; empty where there is none."""
    low, high = estimate.get("low"), estimate.get("high")
    return "" if low is None or high is None else f"±{number((high - low) / 2, 2)}"


def panel_title(panel: Mapping[str, Any]) -> str:
    """The model, with its guidance where it has one."""
    name = panel["model"].removeprefix("builtin:")
    return name if panel["guidance"] is None else f"{name}, guidance {guidance_text(panel['guidance'])}"


def guidance_text(guidance: float | str | None) -> str:
    """A scale as a number, methods as their text."""
    return "none" if guidance is None else guidance if isinstance(guidance, str) else f"{guidance:g}"


def listed(words: Sequence[str], last: str = "and") -> str:
    """``a, b and c``."""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def value_of(cell: Mapping[str, Any], metric: str) -> float | None:
    """The value of a metric in a cell, None where it has none."""
    estimate = cell.get(metric)
    return None if estimate is None else estimate["value"]


def best_values(panel: Mapping[str, Any], metric: str) -> dict[int, float]:
    """Budget -> best value of a metric."""
    better = max if metric in HIGHER_IS_BETTER else min
    best: dict[int, float] = {}
    for cell in panel["cells"]:
        value = value_of(cell, metric)
        if value is not None:
            best[cell["budget"]] = better(best.get(cell["budget"], value), value)
    return best
