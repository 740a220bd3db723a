"""The tables of docs/guidance-measured.md, from the cells of benchmarks/guidance.py.

A difference of two cells is paired: the same start noise, the jackknife of the difference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.eval.metrics import Estimate, Jackknife, frechet_interval

Cell = dict[str, Any]


def paired(a: Cell, b: Cell, metric: str) -> Estimate:
    """b - a with its 95 % interval."""
    first, second = (Jackknife(c[metric]["value"], np.array(c["parts"][metric])) for c in (a, b))
    return frechet_interval(second, first)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def interval(e: Estimate | dict[str, float], digits: int = 1) -> str:
    value, low, high = e.values() if isinstance(e, dict) else e
    return f"{value:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def difference(e: Estimate, digits: int = 1) -> str:
    mark = "" if e.low <= 0.0 <= e.high else "**"
    return f"{mark}{e.value:+.{digits}f} [{e.low:+.{digits}f}, {e.high:+.{digits}f}]{mark}"


def methods(cells: list[Cell], steps: int) -> str:
    rows = []
    for c in cells:
        name, scale, count = c["key"]
        if count == steps:
            numbers = [interval(c["frechet"]), f"{100 * c['accuracy']['value']:.1f} %"]
            numbers += [f"{c[m]['value']:.2f}" for m in ("precision", "recall", "diversity")]
            rows.append([name, "–" if name == "conditional" else f"{scale:g}", f"{c['nfe']:.1f}", *numbers])
    rows.sort(key=lambda r: (r[0] != "conditional", r[1]))
    return table(["", "scale", "NFE", "Fréchet", "accuracy", "precision", "recall", "diversity"], rows)


def against_cfg(cells: list[Cell], name: str, metric: str, digits: int) -> str:
    """A method minus plain guidance of the same scale and number of steps; bold where the interval excludes zero."""
    at = {tuple(c["key"]): c for c in cells}
    scales = sorted({k[1] for k in at if k[0] == name})
    rows = []
    for steps in sorted({k[2] for k in at}):
        row = [f"{steps}"]
        for w in scales:
            plain, other = at["CFG", w, steps], at[name, w, steps]
            saved = 100 * (1 - other["nfe"] / plain["nfe"])
            row.append(
                (f"−{saved:.0f} %: " if saved > 1 else "") + difference(paired(plain, other, metric), digits)
            )
        rows.append(row)
    return table(["steps", *(f"scale {w:g}" for w in scales)], rows)


def thresholds(held: dict[str, list[Cell]]) -> str:
    at = {tuple(c["key"]): c for c in held["methods"]}
    scales = sorted({c["key"][0] for c in held["adaptive"]})
    rows = []
    for threshold in sorted({c["key"][1] for c in held["adaptive"]}):
        row = [f"{threshold:g}"]
        for w in scales:
            (cell,) = (c for c in held["adaptive"] if c["key"] == [w, threshold])
            plain = at["CFG", w, 10]
            saved = 100 * (1 - cell["nfe"] / plain["nfe"])
            row.append(f"−{saved:.0f} %: {difference(paired(plain, cell, 'frechet'))}")
        rows.append(row)
    return table(["threshold", *(f"scale {w:g}" for w in scales)], rows)


def mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def extrapolation(cells: list[Cell]) -> str:
    """Geometric mean of the error over that of fewer steps; in how many cells the mode is surely better or worse."""
    solvers = list(dict.fromkeys(c["key"][1] for c in cells))
    rows = []
    for branch in ("all", "unconditional"):
        for mode in dict.fromkeys(c["key"][3] for c in cells):
            row = [mode, {"all": "whole call", "unconditional": "u only"}[branch]]
            for solver in solvers:
                mine = [c for c in cells if c["key"][1] == solver and c["key"][3:] == [mode, branch]]
                mine = [c for c in mine if c["nfe"] < most(c)]
                if not mine:
                    row.append("–")
                    continue
                better = sum(c["difference"]["high"] < 0 for c in mine)
                worse = sum(c["difference"]["low"] > 0 for c in mine)
                ratio = mean([c["ratio"] for c in mine])
                row.append(
                    f"{'**' if ratio < 1 else ''}{ratio:.2f}{'**' if ratio < 1 else ''} ({better}/{worse}/{len(mine)})"
                )
            rows.append(row)
    return table(["mode", "what is continued", *solvers], rows)


def most(cell: Cell) -> float:
    """Evaluations of the run without skipping: a mode that never skipped says nothing."""
    return cell["key"][2] * (2 if "@" in cell["key"][0] else 1)


def main() -> None:
    held = json.loads((Path(__file__).parent / "results" / "guidance.json").read_text())
    print(methods(held["methods"], 10))
    for name, metric, digits in (
        ("AG", "frechet", 1),
        ("APG", "recall", 2),
        ("CADS", "recall", 2),
        ("APG", "frechet", 1),
        ("CADS", "frechet", 1),
    ):
        print(f"{name}, {metric} minus that of CFG\n\n{against_cfg(held['methods'], name, metric, digits)}")
    print(f"threshold of adaptive guidance, ten steps, Fréchet minus that of CFG\n\n{thresholds(held)}")
    print(extrapolation(held["extrapolation"]))


if __name__ == "__main__":
    main()
