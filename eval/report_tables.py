"""The tables of the report, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .ranking import ranking
from .words import HIGHER_IS_BETTER, LABEL, SHARES, UNIT, best_values, half_width, number, value_of

PALETTE = (
    "#0b6e69", "#c2571a", "#3b5ba9", "#a8326e", "#6a8f1f", "#7b52ab", "#b08900", "#2f8fbf", "#8a4b32", "#4d5761",
)  # fmt: skip
DASHES = ("solid", "dash", "dot")
SYMBOLS = (
    "circle", "square", "diamond", "triangle-up", "cross", "x", "pentagon", "star", "hexagon", "triangle-down",
)  # fmt: skip
PLAIN = ("agreement", "precision", "recall", "nfe", "ms_per_sample")
"""Metrics shown without an interval."""
UNRANKED = ("ms_per_sample", "nfe", "diversity")
"""Metrics whose best value is no merit of itself."""


def style(row: int) -> dict[str, str]:
    """Colour, dash and marker of a solver: the same in chart, tables and pictures."""
    n = len(PALETTE)
    return {"color": PALETTE[row % n], "dash": DASHES[(row // n) % 3], "symbol": SYMBOLS[row % n]}


def name(panel: Mapping[str, Any], row: int) -> str:
    """A solver's label behind its coloured dot."""
    return f'<span class="dot" style="background:{style(row)["color"]}"></span>{escape(panel["rows"][row]["label"])}'


def _table(head: Sequence[str], body: Sequence[str]) -> str:
    rows = "\n".join(body)
    top = f"<thead><tr>{''.join(head)}</tr></thead>"
    return f'<div class="scroll"><table>{top}\n<tbody>\n{rows}\n</tbody></table></div>'


# values -----------------------------------------------------------------------------------------------------------


def metric_table(panel: Mapping[str, Any], metric: str) -> str:
    """One metric: solvers down, budgets across, shaded by closeness to the best of the column."""
    cells = {(c["row"], c["budget"]): c for c in panel["cells"]}
    best = best_values(panel, metric)
    notes: list[str] = []
    wide = (
        "" if metric in PLAIN else ' class="v"'
    )  # the heading stands above the value, not above its interval
    head = ["<th>solver</th>", *(f"<th{wide}>{b}{_calls(panel, b)}</th>" for b in panel["budgets"])]
    body = []
    for row in range(len(panel["rows"])):
        tds = "".join(_value(cells.get((row, b)), metric, best.get(b), notes) for b in panel["budgets"])
        body.append(f"<tr><td>{name(panel, row)}</td>{tds}</tr>")
    foot = "".join(f"<div><sup>{i + 1}</sup> {escape(text)}</div>" for i, text in enumerate(notes))
    heading = f"<small>{escape(UNIT[metric])}; columns: network evaluations per sample (NFE)</small>"
    return f'<h3>{escape(LABEL[metric])} {heading}</h3>\n{_table(head, body)}\n<div class="foot">{foot}</div>'


def _calls(panel: Mapping[str, Any], budget: int) -> str:
    """Under guidance a budget is twice the number of calls: say how many."""
    return "" if panel["cost"] == 1 else f"<small>{budget // panel['cost']} calls</small>"


def _value(cell: Mapping[str, Any] | None, metric: str, best: float | None, notes: list[str]) -> str:
    if cell is None or cell["status"] == "pending":
        return '<td class="none">…</td>'
    value = value_of(cell, metric)
    if cell["status"] != "ok" or value is None or best is None:
        reason = cell.get("message") or _why_absent(metric)
        if reason not in notes:
            notes.append(reason)
        failed = cell["status"] == "failed"
        mark = f"{'failed' if failed else '–'}<sup>{notes.index(reason) + 1}</sup>"
        return f'<td class="{"fail" if failed else "none"}">{mark}</td>'
    shown = f"{100 * value:.1f} %" if metric in SHARES else number(value)
    spread = "" if metric in PLAIN else f"<i>{half_width(cell[metric])}</i>"
    first = " best" if value == best and metric not in UNRANKED else ""
    return f'<td class="v{first}" style="--t:{_tint(metric, value, best):.2f}">{shown}{spread}</td>'


def _tint(metric: str, value: float, best: float) -> float:
    """1 at the best value of a column, falling to 0 at one and a half times it."""
    if metric in UNRANKED:
        return 0.0
    if metric in HIGHER_IS_BETTER:
        return max(0.0, 1.0 - 8.0 * (best - value))
    if metric == "frechet_excess":  # may be zero or below, so there is no ratio
        return max(0.0, 1.0 - 0.2 * max(0.0, value))
    return max(0.0, 1.0 - 2.0 * (value / best - 1.0)) if best > 0 else float(value == best)


def _why_absent(metric: str) -> str:
    if metric in ("rms", "rms_median"):
        return "stochastic: it does not follow the differential equation, so a distance to its solution says nothing"
    return "not measured"


# ranks ------------------------------------------------------------------------------------------------------------


def ranking_table(panel: Mapping[str, Any], metric: str) -> str:
    """Places per budget and overall, best first."""
    order = ranking(panel, metric)
    if not order:
        return ""
    total = max(r["budgets"] for r in order)
    head = ["<th>solver</th>", *(f"<th>{b}</th>" for b in panel["budgets"]), "<th>mean rank</th>"]
    body = []
    for r in order:
        star = "<sup>*</sup>" if r["budgets"] < total else ""
        ranks = "".join(_rank(r["ranks"].get(b)) for b in panel["budgets"])
        ratio = "–" if r["ratio"] is None else f"{r['ratio']:.2f}×"
        width = 100 / r["ratio"] if r["ratio"] else 0
        meter = f'<span class="meter"><span style="width:{width:.0f}%"></span></span>{ratio}'
        body.append(
            f"<tr><td>{name(panel, r['row'])}{star}</td>{ranks}<td>{r['mean_rank']:.1f}</td><td>{meter}</td></tr>"
        )
    partial = any(r["budgets"] < total for r in order)
    star = "<div><sup>*</sup> over the budgets it can meet only: its place overall is not comparable.</div>"
    rule = (
        "place at each NFE, ties share it; overall by the geometric mean of (value / best value at that NFE)"
    )
    return (
        f"<h3>Ranking <small>{rule}</small></h3>\n{_table([*head, '<th>ratio to the best</th>'], body)}\n"
        f'<div class="foot">{star if partial else ""}</div>'
    )


def _rank(rank: float | None) -> str:
    if rank is None:
        return '<td class="rank none">–</td>'
    return f'<td class="rank{" first" if rank < 2 else ""}">{rank:g}</td>'


# everything -------------------------------------------------------------------------------------------------------


def all_numbers(panel: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """Every finished cell with every number, folded away."""
    columns = ("solver", "spacing", "NFE", "calls", "steps", *(LABEL[m] for m in metrics))
    body = []
    for cell in panel["cells"]:
        if cell["status"] == "ok":
            facts = (cell["solver"], cell["schedule"], cell["nfe"], cell["calls"], cell["steps"])
            values = (number(value_of(cell, m), 4) for m in metrics)
            body.append("<tr>" + "".join(f"<td>{escape(str(v))}</td>" for v in (*facts, *values)) + "</tr>")
    table = _table([f"<th>{escape(c)}</th>" for c in columns], body)
    return f"<details><summary>All numbers of this panel</summary>{table}</details>"
