"""Tables in the terminal: the one that fills while ``fewstep eval`` runs, and those of the other commands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .overview import METRICS
from .words import LABEL, best_values, half_width, number, panel_title, value_of


def metric_table(panel: Mapping[str, Any], metric: str, spread: bool = False) -> RenderableType:
    """One metric of one panel, solvers down and budgets across; the best of a column is bold."""
    measured = "NFE spent, at budgets of" if metric == "nfe" else f"{LABEL[metric]} at NFE"
    title = Text.assemble((panel_title(panel), "bold"), f"  {measured}")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    for budget in panel["budgets"]:
        table.add_column(str(budget), justify="right", no_wrap=True)
    cells = {(c["row"], c["budget"]): c for c in panel["cells"]}
    best = best_values(panel, metric)
    for index, row in enumerate(panel["rows"]):
        texts = [_cell(cells.get((index, b)), metric, best.get(b), spread) for b in panel["budgets"]]
        table.add_row(Text(row["label"]), *texts)
    return Group(title, table)


def _cell(cell: Mapping[str, Any] | None, metric: str, best: float | None, spread: bool) -> Text:
    if cell is None or cell["status"] == "pending":
        return Text("·", style="dim")
    if cell["status"] == "failed":
        return Text("failed", style="red")
    value = value_of(cell, metric)
    if value is None:
        return Text("-", style="dim")
    text = Text(number(value), style="bold green" if value == best else "")
    if spread and half_width(cell[metric]):
        text.append(" " + half_width(cell[metric]), style="dim")
    return text


def notes(panel: Mapping[str, Any]) -> list[str]:
    """What the marks of a panel mean, one line each."""
    lines = []
    for cell in panel["cells"]:
        if cell.get("message") and cell["message"] not in lines:
            lines.append(cell["message"])
    if any(row["stochastic"] for row in panel["rows"]):
        names = ", ".join(row["label"] for row in panel["rows"] if row["stochastic"])
        lines.append(
            f"{names}: stochastic, so there is no distance to the solution of the differential equation"
        )
    return ["- : " + lines[0], *("    " + line for line in lines[1:])] if lines else []


def result_tables(panel: Mapping[str, Any], width: int = 120) -> RenderableType:
    """What stays on the screen when a panel is done: both distances and what they are to be read against.

    Intervals are shown where ``width`` columns hold them.
    """
    spread = width >= 20 + 15 * len(panel["budgets"])
    shown = [m for m in ("rms", "frechet") if any(c.get(m) for c in panel["cells"])] or ["rms"]
    parts: list[RenderableType] = []
    for metric in shown:
        parts += [*([Text()] if parts else []), metric_table(panel, metric, spread)]
    facts = []
    if panel["reference"].get("resolution"):
        facts.append(
            f"resolution {number(panel['reference']['resolution']['value'], 2)} (RMS error of the converged solution)"
        )
    if panel.get("floor"):
        facts.append(
            f"Fréchet floor {number(panel['floor']['value'])} {half_width(panel['floor'])} (converged samples)"
        )
    facts.append(f"{panel['samples']:,} samples a cell, intervals at 95 %")
    for line in ["; ".join(facts), *notes(panel), *panel.get("warnings", []), panel.get("note", "")]:
        if line:
            parts.append(Text(line, style="dim"))
    return Group(*parts, Text())


def guidance_tables(overview: Mapping[str, Any]) -> RenderableType:
    """Every guidance of a model side by side."""
    parts: list[RenderableType] = []
    for metric in METRICS:
        if any(c.get(metric) for c in overview["cells"]):
            parts += [metric_table(overview, metric), Text()]
    return Group(*parts, Text(overview["note"], style="dim"), Text())


def listing(rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str]]) -> Table:
    """A plain table: ``columns`` are (key, heading) pairs; the first column is the name."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for i, (_, heading) in enumerate(columns):
        table.add_column(heading, style="cyan" if i == 0 else "", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(Text(_word(row[key])) for key, _ in columns))
    return table


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return str(value).replace("``", "")  # the code marks of docstrings


def comparison_tables(panel: Mapping[str, Any]) -> RenderableType:
    """Paired differences of one panel, a table a metric: what B changed against A."""
    parts: list[RenderableType] = []
    styles = {"better": "green", "worse": "red"}
    for metric in dict.fromkeys(m for row in panel["cells"] for m in row["metrics"]):
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for heading in ("", "NFE", "A", "B", "B - A"):
            table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
        table.add_column("")
        for row in panel["cells"]:
            if metric in row["metrics"]:
                d = row["metrics"][metric]
                difference = f"{d['difference']['value']:+.3g} {half_width(d['difference'])}"
                verdict = Text(d["verdict"], style=styles.get(d["verdict"], "dim"))
                values = (str(row["budget"]), number(d["a"]), number(d["b"]), difference)
                table.add_row(Text(row["label"]), *values, verdict)
        parts += [Text.assemble((panel["id"], "bold"), f"  {LABEL[metric]}"), table, Text()]
    return Group(*parts)
