"""The report: one self-contained HTML page made from ``metrics.json`` and the sample images of a results folder.

The page carries its script (plotly.js) and its pictures; a content security policy in it forbids every
network access, so it reads the same from a mail attachment, a cluster's file share or an archive. Tables and pictures are
plain HTML and are there without the script as well.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .metrics import METRICS
from .ranking import cheaper_than, middle_budget, ranking

Images = Mapping[str, NDArray[np.uint8]]
"""Key of a cell (or of a reference) -> its first images, uint8 of shape (n, height, width) or (n, channels, h, w)."""

PALETTE = (
    "#0b6e69",
    "#c2571a",
    "#3b5ba9",
    "#a8326e",
    "#6a8f1f",
    "#7b52ab",
    "#b08900",
    "#2f8fbf",
    "#8a4b32",
    "#4d5761",
)
DASHES = ("solid", "dash", "dot")
SYMBOLS = (
    "circle",
    "square",
    "diamond",
    "triangle-up",
    "cross",
    "x",
    "pentagon",
    "star",
    "hexagon",
    "triangle-down",
)
CHART_METRICS = ("rms", "rms_median", "frechet", "frechet_excess", "agreement", "ms_per_sample")
LINEAR = ("agreement", "frechet_excess")
PLAIN = ("agreement", "ms_per_sample")
"""Metrics shown without an interval."""
RANKED = ("rms", "rms_median", "frechet")
STRIP = 20
"""Images in one row of the sample grid."""

_LABEL = {m.name: m.label for m in METRICS}


def build(result: Mapping[str, Any], images: Images) -> str:
    """The page as text.

    Args:
        result: contents of ``metrics.json``.
        images: first sample images of each cell and reference by key; a missing key leaves a gap in the grid.
    """
    from plotly.offline import get_plotlyjs

    panels = result["panels"]
    names = list(dict.fromkeys(p["model"].removeprefix("builtin:") for p in panels))
    title = f"Few-step samplers on {_and(names)}"
    strips = [_strips(panel, images) for panel in panels]
    data = {"panels": [_chart_data(panel, strip) for panel, strip in zip(panels, strips)]}
    body = "\n".join(
        [
            _bar(panels),
            "<main>",
            _header(result, title),
            *(_section(panel, strip, images) for panel, strip in zip(panels, strips)),
            _notes(result),
            _reproduce(result["run"]),
            f"<footer>Made by fewstep {escape(str(result['run']['versions']['fewstep']))}. One file, no network access.</footer>",
            "</main>",
        ]
    )
    return Template(_asset("page.html")).substitute(
        title=escape(title),
        version=escape(str(result["run"]["versions"]["fewstep"])),
        css=_asset("report.css"),
        js=_asset("report.js"),
        plotly=get_plotlyjs(),
        data=json.dumps(data).replace("<", "\\u003c"),  # "</script>" inside a name must not end the element
        body=body,
    )


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("data", "report", name).read_text(encoding="utf-8")


# words ----------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits without exponents: 0.0983, 12.3, 104."""
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
    name = panel["model"].removeprefix("builtin:")
    return name if panel["guidance"] is None else f"{name}, guidance {panel['guidance']:g}"


def _and(words: Sequence[str]) -> str:
    return " and ".join(words) if len(words) < 3 else ", ".join(words[:-1]) + " and " + words[-1]


def _metrics_of(panel: Mapping[str, Any]) -> list[str]:
    return [m for m in CHART_METRICS if any(cell.get(m) for cell in panel["cells"])]


def _style(index: int) -> dict[str, str]:
    n = len(PALETTE)
    return {"color": PALETTE[index % n], "dash": DASHES[(index // n) % 3], "symbol": SYMBOLS[index % n]}


# page -----------------------------------------------------------------------------------------------------------


def _bar(panels: Sequence[Mapping[str, Any]]) -> str:
    links = "".join(f'<a href="#{_id(p)}">{escape(panel_title(p))}</a>' for p in panels)
    return f'<nav class="bar"><div><b>fewstep</b>{links}<a href="#notes">Notes</a><a href="#reproduce">Reproduce</a></div></nav>'


def _id(panel: Mapping[str, Any]) -> str:
    return "panel-" + "".join(c if c.isalnum() else "-" for c in panel["id"])


def _header(result: Mapping[str, Any], title: str) -> str:
    panels = result["panels"]
    budgets = sorted({b for p in panels for b in p["budgets"]})
    solvers = max(len(p["rows"]) for p in panels)
    partial = ""
    if not result.get("complete", True):
        partial = '<p class="muted"><b>This run is not finished.</b> Cells that are still to come are shown as “…”.</p>'
    findings = "".join(_finding(p) for p in panels)
    return f"""<header>
<p class="kicker">fewstep evaluation · {escape(str(result["run"]["finished"] or result["run"]["started"])[:10])}</p>
<h1>{escape(title)}</h1>
<p class="lead">{solvers} solvers, each given between {budgets[0]} and {budgets[-1]} network evaluations per sample (NFE), all from the
same start noise. The first number is the distance to where the noise leads when the differential equation is solved to
convergence: it measures the solver and nothing else. The second compares the samples with real images
in the features of a small classifier; read it against its floor, the value of the converged samples. Lower is better in both.</p>
{partial}
</header>
<div class="findings">{findings}</div>"""


def _finding(panel: Mapping[str, Any]) -> str:
    """Two sentences about one panel: who is first, and what that is worth in evaluations."""
    order = ranking(panel, "rms")
    if not order:
        return f"<div><h4>{escape(panel_title(panel))}</h4><p class='muted'>No finished cells yet.</p></div>"
    rows = panel["rows"]
    complete = [r for r in order if r["budgets"] == max(o["budgets"] for o in order)]
    best = complete[0]
    name = rows[best["row"]]["label"]
    text = f"First overall by distance to the converged solution ({best['ratio']:.2f}× the best value of each budget on average)."
    baseline = next((i for i, row in enumerate(rows) if row["solver"] == "euler"), None)
    if baseline is not None and baseline != best["row"]:
        budget = middle_budget(panel["budgets"])
        pair = {c["row"]: c["rms"]["value"] for c in panel["cells"] if c["budget"] == budget and c.get("rms")}
        if best["row"] in pair and baseline in pair:
            text += f" With {budget} evaluations it stands at {number(pair[best['row']])}, Euler (DDIM) at {number(pair[baseline])}."
        saved = cheaper_than(panel, "rms", best["row"], baseline)
        if saved:
            text += f" It is as close with {saved[1]} evaluations as Euler with {saved[0]}."
    return f'<div><h4>{escape(panel_title(panel))}</h4><p class="big">{escape(name)}</p><p>{escape(text)}</p></div>'


def _section(panel: Mapping[str, Any], strips: Mapping[str, Any], images: Images) -> str:
    metrics = _metrics_of(panel)
    start = f"""<section id="{_id(panel)}">
<h2>{escape(panel_title(panel))}</h2>
<p class="muted">{escape(panel.get("note", ""))}</p>
{_facts(panel)}"""
    if not metrics:
        return f'{start}<p class="muted">No cell of this panel is finished yet.</p></section>'
    buttons = "".join(
        f'<button type="button" value="{m}" aria-pressed="{_flag(m == metrics[0])}">{escape(_LABEL[m])}</button>'
        for m in metrics
    )
    tables = "".join(
        f'<div data-metric="{m}"{"" if m == metrics[0] else " hidden"}>'
        f"{_table(panel, m)}{_ranking(panel, m) if m in RANKED else ''}</div>"
        for m in metrics
    )
    return f"""{start}
<div class="row"><h3 style="margin:0">Quality against evaluations</h3>
<div class="switch metric" role="group" aria-label="Metric">{buttons}</div></div>
<div class="chart" role="img" aria-label="Quality against network evaluations; the table below holds the same numbers"></div>
<p class="caption">Bars are 95 % intervals; hover over a point for solver, steps and interval. Click a solver in the legend to hide it,
double-click to see it alone. Points far above the others are off the scale; the table has them.</p>
{tables}
{_grid(panel, strips, images)}
{_all_numbers(panel, metrics)}
</section>"""


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _all_numbers(panel: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """Every finished cell with every number, folded away."""
    head = "".join(
        f"<th>{escape(h)}</th>"
        for h in ("solver", "spacing", "NFE", "calls", "steps", *(_LABEL[m] for m in metrics))
    )
    body = []
    for cell in panel["cells"]:
        if cell["status"] == "ok":
            values = "".join(
                f"<td>{number(cell[m]['value'], 4) if cell.get(m) else '–'}</td>" for m in metrics
            )
            body.append(
                f"<tr><td>{escape(cell['solver'])}</td><td>{escape(cell['schedule'])}</td><td>{cell['nfe']}</td><td>{cell['calls']}</td>"
                f"<td>{cell['steps']}</td>{values}</tr>"
            )
    return f"""<details><summary>All numbers of this panel</summary><div class="scroll"><table><thead><tr>{head}</tr></thead>
<tbody>{"".join(body)}</tbody></table></div></details>"""


def _facts(panel: Mapping[str, Any]) -> str:
    reference = panel["reference"]
    facts = [("Samples per cell", f"{panel['samples']:,}")]
    facts.append(("Converged by", f"{reference['solver']}, {reference['steps']} steps"))
    if reference.get("resolution"):
        facts.append(("Resolution (its own error)", number(reference["resolution"]["value"], 2)))
    if panel.get("floor"):
        facts.append(("Fréchet floor", f"{number(panel['floor']['value'])} {half_width(panel['floor'])}"))
    if panel.get("features"):
        facts.append(("Reference images", f"{panel['features']['reference_count']:,}"))
    if panel.get("agreement"):
        facts.append(("Label agreement, converged", f"{100 * panel['agreement']['value']:.1f} %"))
    return (
        '<dl class="facts">'
        + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
        + "</dl>"
    )


def _table(panel: Mapping[str, Any], metric: str) -> str:
    cells = {(c["row"], c["budget"]): c for c in panel["cells"]}
    best: dict[int, float] = {}
    sign = -1.0 if metric == "agreement" else 1.0
    for (_, budget), cell in cells.items():
        if cell.get(metric) and cell[metric]["value"] is not None:
            value = sign * cell[metric]["value"]
            best[budget] = min(best.get(budget, math.inf), value)
    notes: list[str] = []
    wide = (
        ' class="v"' if metric not in PLAIN else ""
    )  # the heading stands above the value, not above its interval
    head = "".join(f"<th{wide}>{b}{_calls(panel, b)}</th>" for b in panel["budgets"])
    body = []
    for index, row in enumerate(panel["rows"]):
        tds = "".join(_td(cells.get((index, b)), metric, sign, best.get(b), notes) for b in panel["budgets"])
        body.append(
            f'<tr><td><span class="dot" style="background:{_style(index)["color"]}"></span>{escape(row["label"])}</td>{tds}</tr>'
        )
    foot = "".join(f"<div><sup>{i + 1}</sup> {escape(text)}</div>" for i, text in enumerate(notes))
    unit = next(m.unit for m in METRICS if m.name == metric)
    return f"""<h3>{escape(_LABEL[metric])} <small>{escape(unit)}; columns: network evaluations per sample (NFE)</small></h3>
<div class="scroll"><table><thead><tr><th>solver</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>
<div class="foot">{foot}</div>"""


def _calls(panel: Mapping[str, Any], budget: int) -> str:
    """Under guidance a budget is twice the number of calls: say how many."""
    return "" if panel["cost"] == 1 else f"<small>{budget // panel['cost']} calls</small>"


def _td(
    cell: Mapping[str, Any] | None, metric: str, sign: float, best: float | None, notes: list[str]
) -> str:
    if cell is None or cell["status"] == "pending":
        return '<td class="none">…</td>'
    if cell["status"] != "ok" or not cell.get(metric):
        reason = cell.get("message") or _why_absent(metric)
        if reason not in notes:
            notes.append(reason)
        mark = "failed" if cell["status"] == "failed" else "–"
        return f'<td class="{"fail" if mark == "failed" else "none"}">{mark}<sup>{notes.index(reason) + 1}</sup></td>'
    estimate = cell[metric]
    value = sign * estimate["value"]
    # Shade by the ratio to the best of the column: full at the best, none at one and a half times its value.
    tint, first = 0.0, False
    if best is not None and metric != "ms_per_sample":
        ratio = value / best if sign > 0 and best > 0 else 1.0 + 4.0 * (value - best)
        if metric == "frechet_excess":
            ratio = 1.0 + max(0.0, value) / 10.0
        tint, first = max(0.0, 1.0 - 2.0 * (ratio - 1.0)), value == best
    shown = f"{100 * estimate['value']:.1f} %" if metric == "agreement" else number(estimate["value"])
    spread = "" if metric in PLAIN else f"<i>{half_width(estimate)}</i>"
    return f'<td class="v{" best" if first else ""}" style="--t:{tint:.2f}">{shown}{spread}</td>'


def _why_absent(metric: str) -> str:
    if metric in ("rms", "rms_median"):
        return "stochastic solver: it does not follow the differential equation, so a distance to its solution says nothing"
    return "not measured"


def _ranking(panel: Mapping[str, Any], metric: str) -> str:
    order = ranking(panel, metric)
    if not order:
        return ""
    total = max(r["budgets"] for r in order)
    head = "".join(f"<th>{b}</th>" for b in panel["budgets"])
    body = []
    partial = False
    for r in order:
        label = escape(panel["rows"][r["row"]]["label"])
        missing = r["budgets"] < total
        partial |= missing
        ranks = "".join(_rank_td(r["ranks"].get(b)) for b in panel["budgets"])
        ratio = "–" if r["ratio"] is None else f"{r['ratio']:.2f}×"
        width = 0 if not r["ratio"] else 100 / r["ratio"]
        body.append(
            f'<tr><td><span class="dot" style="background:{_style(r["row"])["color"]}"></span>{label}'
            f"{'<sup>*</sup>' if missing else ''}</td>{ranks}<td>{r['mean_rank']:.1f}</td>"
            f'<td><span class="meter"><span style="width:{width:.0f}%"></span></span>{ratio}</td></tr>'
        )
    star = (
        "<div><sup>*</sup> over the budgets it can meet only: its place overall is not comparable.</div>"
        if partial
        else ""
    )
    return f"""<h3>Ranking <small>place at each NFE, ties share it; overall by the geometric mean of (value / best value at that NFE)</small></h3>
<div class="scroll"><table><thead><tr><th>solver</th>{head}<th>mean rank</th><th>ratio to the best</th></tr></thead>
<tbody>{"".join(body)}</tbody></table></div><div class="foot">{star}</div>"""


def _rank_td(rank: float | None) -> str:
    if rank is None:
        return '<td class="rank none">–</td>'
    return f'<td class="rank{" first" if rank < 2 else ""}">{rank:g}</td>'


# pictures -------------------------------------------------------------------------------------------------------


def strip_png(images: NDArray[np.uint8], count: int = STRIP, gap: int = 1) -> bytes:
    """PNG of the first ``count`` images side by side, ``gap`` white pixels apart, at their own resolution.

    Args:
        images: uint8, (n, h, w), (n, 1, h, w) or (n, 3, h, w).
    """
    from PIL import Image

    pictures = np.asarray(images[:count])
    if pictures.ndim == 4 and pictures.shape[1] == 1:
        pictures = pictures[:, 0]
    if pictures.ndim == 4:
        pictures = pictures.transpose(0, 2, 3, 1)
    n, height, width = pictures.shape[:3]
    canvas = np.full((height, count * (width + gap) - gap, *pictures.shape[3:]), 255, np.uint8)
    for i in range(n):
        canvas[:, i * (width + gap) : i * (width + gap) + width] = pictures[i]
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _strips(panel: Mapping[str, Any], images: Images) -> dict[str, dict[str, dict[str, str]]]:
    """Row -> budget -> picture and its caption."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for cell in panel["cells"]:
        if cell["status"] == "ok" and cell["key"] in images:
            main = cell.get("rms") or cell.get("frechet")
            note = "" if not main else f"{number(main['value'])}{'' if cell.get('rms') else ' (Fréchet)'}"
            entry = {"src": _data_url(strip_png(images[cell["key"]])), "note": note}
            found.setdefault(str(cell["row"]), {})[str(cell["budget"])] = entry
    return found


def _grid(panel: Mapping[str, Any], strips: Mapping[str, Any], images: Images) -> str:
    if not strips:
        return ""
    shown = str(sorted(panel["budgets"])[min(1, len(panel["budgets"]) - 1)])
    buttons = "".join(
        f'<button type="button" value="{b}" aria-pressed="{_flag(str(b) == shown)}">{b}</button>'
        for b in panel["budgets"]
    )
    rows = []
    key = panel["reference"]["key"]
    if key in images:
        rows.append(
            f'<div class="name truth"><b>converged</b></div><div class="pic truth"><img alt="converged samples" '
            f'src="{_data_url(strip_png(images[key]))}"></div><div class="num truth">{panel["reference"]["steps"]} steps</div>'
        )
    for index, row in enumerate(panel["rows"]):
        strip = strips.get(str(index), {}).get(shown)
        src, note = (strip["src"], strip["note"]) if strip else ("data:,", "")
        rows.append(
            f'<div class="name"><span class="dot" style="background:{_style(index)["color"]}"></span>{escape(row["label"])}</div>'
            f'<div class="pic" data-strip="{index}"><img alt="samples of {escape(row["label"])}" src="{src}"{"" if strip else " hidden"}>'
            f'<div class="empty"{" hidden" if strip else ""}>no run with {shown} evaluations</div></div><div class="num">{note}</div>'
        )
    return f"""<div class="row" style="margin-top:44px"><h3 style="margin:0">Samples <small>one column is one start noise; at the right the RMS distance</small></h3>
<div class="row" style="gap:10px"><span class="small muted">NFE</span><div class="switch budget" role="group" aria-label="Evaluations">{buttons}</div></div></div>
<div class="strips">{"".join(rows)}</div>"""


# foot -----------------------------------------------------------------------------------------------------------


def _notes(result: Mapping[str, Any]) -> str:
    used = {m for p in result["panels"] for m in _metrics_of(p)}
    items = [
        f"<b>{escape(m.label)}</b> ({escape(m.unit)}): {escape(m.meaning)}"
        for m in METRICS
        if m.name in used | {"nfe"}
    ]
    items += [
        "<b>Resolution</b>: the converged solution has an error of its own, estimated from half as many steps. Distances near it "
        "are not resolved.",
        "<b>Floor</b>: the Fréchet distance of finitely many converged samples to the reference images. It is not zero, because "
        "means and covariances are estimated; a solver cannot be expected to get far below it.",
        "<b>–</b> marks a number that does not exist: a budget the solver cannot spend exactly, or a distance to the solution of the "
        "differential equation for a solver that adds noise.",
        "<b>Equal noise</b>: index i has its own seed, so all solvers start from the same noise, and neither batch size nor the "
        "number of processes changes a sample.",
    ]
    items += [
        f"<b>{escape(panel_title(p))}</b>: {escape(text)}"
        for p in result["panels"]
        for text in p.get("warnings", [])
    ]
    return f'<section id="notes"><h2>Notes</h2><ul class="notes">{"".join(f"<li>{i}</li>" for i in items)}</ul></section>'


def _reproduce(run: Mapping[str, Any]) -> str:
    host = run["host"]
    facts = {
        **{k: v for k, v in run["versions"].items() if v},
        "processor": host["cpu"],
        "cores": host["cores"],
        "processes x threads": f"{run['processes']} x {run['config']['threads']}",
        "device": run["config"]["device"],
        "seed": run["config"]["seed"],
        "git": run.get("git") or "–",
        "started": run["started"],
        "time": f"{run['seconds']:.0f} s" if run.get("seconds") is not None else "–",
    }
    rows = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items())
    return f"""<section id="reproduce"><h2>Reproduce</h2>
<p class="muted">The same command on the same folder continues or repeats this run; cells that are on disk are not computed again.</p>
<div class="row"><span></span><span class="switch"><button type="button" data-copy="command">copy</button></span></div>
<pre id="command">{escape(run["command"])}</pre>
<dl class="kv">{rows}</dl></section>"""


def _chart_data(panel: Mapping[str, Any], strips: Mapping[str, Any]) -> dict[str, Any]:
    floor = panel["floor"]["value"] if panel.get("floor") else None
    resolution = panel["reference"].get("resolution")
    lines = {
        "rms": (resolution["value"] if resolution else None, "resolution"),
        "frechet": (floor, "floor"),
        "frechet_excess": (0.0, "floor"),
        "agreement": (panel["agreement"]["value"] if panel.get("agreement") else None, "converged"),
    }
    units = {m.name: m.unit for m in METRICS}
    metrics = {
        m: {
            "label": _LABEL[m] + (f", {units[m]}" if m == "ms_per_sample" else ""),
            "log": m not in LINEAR,
            "format": ".0%" if m == "agreement" else "~g",
            "line": lines.get(m, (None, ""))[0],
            "line_label": lines.get(m, (None, ""))[1],
        }
        for m in _metrics_of(panel)
    }
    keep = ("row", "steps", "nfe", *metrics)
    return {
        "id": _id(panel),
        "rows": [
            {"label": r["label"], "stochastic": r["stochastic"], **_style(i)}
            for i, r in enumerate(panel["rows"])
        ],
        "cells": [{k: c.get(k) for k in keep} for c in panel["cells"] if c["status"] == "ok"],
        "metrics": metrics,
        "ticks": panel["budgets"],
        "x_title": "network evaluations per sample (NFE)",
        "strips": strips,
    }
