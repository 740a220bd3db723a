"""The figures of docs/guidance-measured.md, from the cells of benchmarks/guidance.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from guidance_tables import most

Cells = list[dict[str, Any]]
STYLE = {
    "CFG": ("#4d5761", "o", "-"),
    "APG": ("#c2571a", "s", "-"),
    "CADS": ("#3b5ba9", "^", "-"),
    "AG": ("#0b6e69", "D", "-"),
    "CFG, DDIM": ("#8b94a0", "o", ":"),
    "PCG, DDIM": ("#a8326e", "v", ":"),
    "conditional": ("#b08900", "", "--"),
}
ROWS = {
    "frechet": "Fréchet distance (lower is better)",
    "recall": "recall",
    "diversity": "spread within a class, data = 1",
}


def draw(held: dict[str, Cells], out: Path) -> None:
    """Write ``out``, and beside it ``...-extrapolation`` where there are cells of it."""
    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    )
    plt.rcParams.update({"grid.color": "#eceff2", "axes.edgecolor": "#bfc6ce", "axes.axisbelow": True})
    if held.get("methods"):
        methods(held["methods"], out)
    if held.get("extrapolation"):
        extrapolation(held["extrapolation"], out.with_stem(out.stem + "-extrapolation"))


def methods(cells: Cells, out: Path) -> None:
    scales = sorted({c["key"][1] for c in cells if c["key"][0] != "conditional"})
    figure, axes = plt.subplots(
        len(ROWS), len(scales), figsize=(10.5, 8.4), sharex=True, sharey="row", layout="constrained"
    )
    for column, scale in enumerate(scales):
        for row, (metric, label) in enumerate(ROWS.items()):
            ax = axes[row][column]
            for name, (color, marker, dash) in STYLE.items():
                mine = [c for c in cells if c["key"][0] == name and c["key"][1] in (scale, 1)]
                mine = sorted({c["nfe"]: c for c in mine}.values(), key=lambda c: c["nfe"])
                x, y = [c["nfe"] for c in mine], [c[metric]["value"] for c in mine]
                spread = [[c[metric]["value"] - c[metric]["low"] for c in mine]]
                spread.append([c[metric]["high"] - c[metric]["value"] for c in mine])
                ax.errorbar(
                    x,
                    y,
                    spread,
                    label=name,
                    color=color,
                    marker=marker,
                    ls=dash,
                    ms=4,
                    lw=1.4,
                    elinewidth=0.7,
                )
            if metric == "frechet":
                ax.set_yscale("log")
                ax.set_yticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
                ax.set_title(f"scale {scale}")
            if metric == "diversity":
                ax.axhline(1.0, color="#bfc6ce", lw=0.8)
                ax.set_xlabel("network evaluations per sample (NFE)")
            if column == 0:
                ax.set_ylabel(label)
            ax.set_xscale("log", base=2)
            ax.set_xticks([6, 8, 12, 16, 24, 32], ["6", "8", "12", "16", "24", "32"])
            ax.minorticks_off()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(STYLE), frameon=False)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def extrapolation(cells: Cells, out: Path) -> None:
    """Error of each mode over that of the same solver with no more evaluations; beyond 1 fewer steps are better."""
    cells = [c for c in cells if c["nfe"] < most(c)]
    solvers = list(dict.fromkeys(c["key"][1] for c in cells))
    names = list(dict.fromkeys(mode(c) for c in cells))
    models = list(dict.fromkeys(c["key"][0] for c in cells))
    figure, axes = plt.subplots(1, len(solvers), figsize=(10.5, 5.2), sharey=True, layout="constrained")
    colors = dict(zip(models, ("#0b6e69", "#c2571a", "#3b5ba9", "#a8326e")))
    for ax, solver in zip(axes, solvers):
        for model in models:
            mine = [c for c in cells if c["key"][:2] == [model, solver]]
            y = [names.index(mode(c)) for c in mine]
            ax.plot([c["ratio"] for c in mine], y, ".", color=colors[model], label=model, alpha=0.7, ms=7)
        for i, name in enumerate(names):
            ratios = [c["ratio"] for c in cells if c["key"][1] == solver and mode(c) == name]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            ax.plot(
                [mean], [i], "|", color="#16191d", ms=13, mew=2, label="geometric mean" if i == 0 else None
            )
        ax.axvline(1.0, color="#16191d", lw=0.9)
        ax.set_xscale("log")
        ax.set_xticks([0.2, 0.5, 1, 2, 5, 10, 20], ["0.2", "0.5", "1", "2", "5", "10", "20"])
        ax.minorticks_off()
        ax.set_title(solver)
        ax.set_xlabel("error / error of fewer steps")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def mode(cell: dict[str, Any]) -> str:
    name, branch = cell["key"][3:]
    return name if branch == "all" else f"{name}, u only"
