"""The report: one self-contained HTML page made from ``metrics.json`` and the sample images of a results folder.

The page carries its script (plotly.js) and its pictures, and a content security policy in it forbids every network
access: it reads the same from a mail attachment, a cluster's file share or an archive. Tables and pictures are plain
HTML and are there without the script as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from . import report_images
from .metrics import METRICS
from .overview import METRICS as COMPARED
from .overview import overviews
from .ranking import cheaper_than, middle_budget, ranking
from .report_images import Images, Strips
from .report_tables import all_numbers, metric_table, ranking_table, style
from .words import LABEL, SHARES, UNIT, guidance_text, half_width, listed, number, panel_title, value_of

ASSETS = Path(__file__).resolve().parent / "data" / "report"
CHART_METRICS = (
    "rms", "rms_median", "frechet", "frechet_excess", "agreement", "precision", "recall", "diversity", "ms_per_sample",
)  # fmt: skip
LINEAR = ("agreement", "frechet_excess", "precision", "recall", "diversity")
"""Metrics on a linear axis; the others have a logarithmic one."""
RANKED = ("rms", "rms_median", "frechet")


def build(result: Mapping[str, Any], images: Images) -> str:
    """The page as text.

    Args:
        result: contents of ``metrics.json``.
        images: first sample images of each cell and reference by key; a missing key leaves a gap in the grid.
    """
    from plotly.offline import get_plotlyjs

    panels = result["panels"]
    names = list(dict.fromkeys(p["model"].removeprefix("builtin:") for p in panels))
    title = f"Few-step samplers on {listed(names)}"
    version = escape(str(result["run"]["versions"]["fewstep"]))
    strips = [report_images.strips(panel, images) for panel in panels]
    data = {"panels": [_chart_data(panel, strip) for panel, strip in zip(panels, strips)]}
    body = [
        _bar(panels),
        "<main>",
        _header(result, title),
        *(_section(panel, strip, images) for panel, strip in zip(panels, strips)),
        *map(_guidance_section, overviews(panels)),
        _notes(result),
        _reproduce(result["run"]),
        f"<footer>Made by fewstep {version}. One file, no network access.</footer>",
        "</main>",
    ]
    return Template(_asset("page.html")).substitute(
        title=escape(title),
        version=version,
        css=_asset("report.css"),
        js=_asset("report.js"),
        plotly=get_plotlyjs(),
        data=json.dumps(data).replace("<", "\\u003c"),  # "</script>" inside a name must not end the element
        body="\n".join(body),
    )


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _id(panel: Mapping[str, Any]) -> str:
    return "panel-" + "".join(c if c.isalnum() else "-" for c in panel["id"])


def _metrics_of(panel: Mapping[str, Any]) -> list[str]:
    return [m for m in CHART_METRICS if any(cell.get(m) for cell in panel["cells"])]


# top --------------------------------------------------------------------------------------------------------------


def _bar(panels: Sequence[Mapping[str, Any]]) -> str:
    links = [(_id(p), panel_title(p)) for p in [*panels, *overviews(panels)]]
    links += [("notes", "Notes"), ("reproduce", "Reproduce")]
    anchors = "".join(f'<a href="#{target}">{escape(text)}</a>' for target, text in links)
    return f'<nav class="bar"><div><b>fewstep</b>{anchors}</div></nav>'


DISTANCE = """The distance is that to where the noise leads when the differential equation is solved to convergence: it
measures the solver and nothing else. Lower is better."""
FRECHET = """The Fréchet distance compares the samples with reference images in the features of a small classifier; read
it against its floor, the value of the converged samples."""


def _header(result: Mapping[str, Any], title: str) -> str:
    panels = result["panels"]
    budgets = sorted({b for p in panels for b in p["budgets"]})
    solvers = max(len(p["rows"]) for p in panels)
    day = str(result["run"]["finished"] or result["run"]["started"])[:10]
    partial = ""
    if not result.get("complete", True):
        partial = '<p class="muted"><b>This run is not finished.</b> Cells that are still to come are shown as “…”.</p>'
    given = f"{budgets[0]} to {budgets[-1]}" if len(budgets) > 1 else str(budgets[0])
    guide = f"{DISTANCE} {FRECHET}" if any(p["features"] for p in panels) else DISTANCE
    return f"""<header>
<p class="kicker">fewstep evaluation · {escape(day)}</p>
<h1>{escape(title)}</h1>
<p class="lead">{solvers} solver{"s" * (solvers > 1)}, given {given} network evaluations per sample (NFE), all from the
same start noise. {guide}</p>
{partial}
</header>
<div class="findings">{"".join(_finding(p) for p in panels)}</div>"""


def _finding(panel: Mapping[str, Any]) -> str:
    """A few sentences about one panel: who is first, and what that is worth in evaluations."""
    metric = "rms" if any(cell.get("rms") for cell in panel["cells"]) else "frechet"
    order = ranking(panel, metric)
    title = f"<h4>{escape(panel_title(panel))}</h4>"
    if not order:
        return f'<div>{title}<p class="muted">No finished cells yet.</p></div>'
    rows = panel["rows"]
    best = next(r for r in order if r["budgets"] == max(o["budgets"] for o in order))
    text = "First overall by " + ("distance to the converged solution" if metric == "rms" else LABEL[metric])
    first_everywhere = all(rank == 1 for rank in best["ranks"].values())
    if first_everywhere:
        text += ", and at every budget."
    else:
        text += f": on average {best['ratio'] or 1.0:.2f} times the best value of a budget."
    baseline = next((i for i, row in enumerate(rows) if row["solver"] == "euler"), None)
    if baseline is not None and baseline != best["row"]:
        budget = middle_budget(panel["budgets"])
        at = {c["row"]: value_of(c, metric) for c in panel["cells"] if c["budget"] == budget}
        mine, theirs = at.get(best["row"]), at.get(baseline)
        if mine is not None and theirs is not None:
            text += (
                f" With {budget} evaluations it stands at {number(mine)}, Euler (DDIM) at {number(theirs)}."
            )
        saved = cheaper_than(panel, metric, best["row"], baseline)
        if saved:
            text += f" It is as close with {saved[1]} evaluations as Euler with {saved[0]}."
    return f'<div>{title}<p class="big">{escape(rows[best["row"]]["label"])}</p><p>{escape(text)}</p></div>'


# panels -----------------------------------------------------------------------------------------------------------


def _section(panel: Mapping[str, Any], strips: Strips, images: Images) -> str:
    metrics = _metrics_of(panel)
    start = f"""<section id="{_id(panel)}">
<h2>{escape(panel_title(panel))}</h2>
<p class="muted">{escape(panel.get("note", ""))}</p>
{_facts(panel)}"""
    if not metrics:
        return f'{start}<p class="muted">No cell of this panel is finished yet.</p></section>'
    buttons = "".join(
        f'<button type="button" value="{m}" aria-pressed="{"true" if m == metrics[0] else "false"}">{LABEL[m]}</button>'
        for m in metrics
    )
    tables = "\n".join(
        f'<div data-metric="{m}"{"" if m == metrics[0] else " hidden"}>'
        f"{metric_table(panel, m)}{ranking_table(panel, m) if m in RANKED else ''}</div>"
        for m in metrics
    )
    chart = "Quality against network evaluations; the table below holds the same numbers"
    return f"""{start}
<div class="row"><h3>Quality against evaluations</h3>
<div class="switch metric" role="group" aria-label="Metric">{buttons}</div></div>
<div class="chart" role="img" aria-label="{chart}"></div>
<p class="caption">Bars are 95 % intervals; hover over a point for solver, steps and interval. Click a solver in the
legend to hide it, double-click to see it alone. Points far above the others are off the scale; the table has them.</p>
{tables}
{report_images.grid(panel, strips, images)}
{all_numbers(panel, metrics)}
</section>"""


def _guidance_section(overview: Mapping[str, Any]) -> str:
    """Every guidance of a model side by side, at equal budgets."""
    tables = "\n".join(
        metric_table(overview, m) for m in COMPARED if any(c.get(m) for c in overview["cells"])
    )
    return f"""<section id="{_id(overview)}">
<h2>{escape(panel_title(overview))}</h2>
<p class="muted">{escape(overview["note"])}</p>
{tables}
</section>"""


def _facts(panel: Mapping[str, Any]) -> str:
    reference = panel["reference"]
    facts = [
        ("Samples per cell", f"{panel['samples']:,}"),
        ("Spacing", listed(list(dict.fromkeys(row["schedule"] for row in panel["rows"])))),
        ("Converged by", f"{reference['solver']}, {reference['steps']} steps{_instead(panel)}"),
    ]
    if reference.get("resolution"):
        facts.append(("Resolution (its own error)", number(reference["resolution"]["value"], 2)))
    if panel.get("floor"):
        facts.append(("Fréchet floor", f"{number(panel['floor']['value'])} {half_width(panel['floor'])}"))
    if panel.get("features"):
        facts.append(("Reference images", f"{panel['features']['reference_count']:,}"))
    if panel.get("agreement"):
        facts.append(("Label agreement", f"{100 * panel['agreement']['value']:.1f} %"))
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    return f'<dl class="facts">{items}</dl>'


def _instead(panel: Mapping[str, Any]) -> str:
    """The guidance of the converged solution where it is not the panel's own."""
    guidance = panel["reference"].get("guidance", panel["guidance"])
    return "" if guidance == panel["guidance"] else f", guidance {guidance_text(guidance)}"


def _chart_data(panel: Mapping[str, Any], strips: Strips) -> dict[str, Any]:
    """What the script of the page draws."""
    resolution = panel["reference"].get("resolution")
    lines = {
        "rms": (resolution["value"] if resolution else None, "resolution"),
        "frechet": (panel["floor"]["value"] if panel.get("floor") else None, "floor"),
        "frechet_excess": (0.0, "floor"),
        "agreement": (panel["agreement"]["value"] if panel.get("agreement") else None, "converged"),
    }
    metrics = {}
    for m in _metrics_of(panel):
        line, line_label = lines.get(m, (None, ""))
        metrics[m] = {
            "label": LABEL[m] + (f", {UNIT[m]}" if m == "ms_per_sample" else ""),
            "log": m not in LINEAR,
            "format": ".0%" if m in SHARES else "~g",
            "line": line,
            "line_label": line_label,
        }
    keep = ("row", "steps", "nfe", *metrics)
    rows = [
        {"label": r["label"], "stochastic": r["stochastic"], **style(i)} for i, r in enumerate(panel["rows"])
    ]
    return {
        "id": _id(panel),
        "rows": rows,
        "cells": [{k: c.get(k) for k in keep} for c in panel["cells"] if c["status"] == "ok"],
        "metrics": metrics,
        "ticks": panel["budgets"],
        "x_title": "network evaluations per sample (NFE)",
        "strips": strips,
    }


# foot -------------------------------------------------------------------------------------------------------------

NOTES = (
    "<b>Converged solution</b>: a high-order solver with many steps down to the cleanest level the model was "
    "trained at, then one step to no noise.",
    "<b>Resolution</b>: the converged solution has an error of its own. Shown is its distance to a run with half as "
    "many steps, which is more than that error; distances near it are not resolved.",
    "<b>Guidance by methods</b>: a budget is what a sample may spend at most; charts stand at what it did spend. "
    "Methods that leave evaluations out (adaptive guidance, extrapolation) are measured against the converged solution "
    "that leaves nothing out, and methods that draw noise have none: their floor is that of plain guidance at the same "
    "scale.",
    "<b>Floor</b>: the Fréchet distance of finitely many converged samples to the reference images. It is not zero, "
    "because means and covariances are estimated; no solver can be expected to get far below it.",
    "<b>–</b> marks a number that does not exist: a budget that the solver cannot spend exactly, or a distance to the "
    "solution of the differential equation for a solver that adds noise.",
    "<b>Equal noise</b>: index i has its own seed, so all solvers start from the same noise, and neither batch size "
    "nor the number of processes changes a sample.",
)


def _notes(result: Mapping[str, Any]) -> str:
    used = {m for p in result["panels"] for m in _metrics_of(p)} | {"nfe"}
    items = [
        f"<b>{escape(m.label)}</b> ({escape(m.unit)}). {escape(' '.join(m.meaning.split()))}"
        for m in METRICS
        if m.name in used
    ]
    items += NOTES
    for panel in result["panels"]:
        items += [
            f"<b>{escape(panel_title(panel))}</b>: {escape(text)}" for text in panel.get("warnings", [])
        ]
    listing = "\n".join(f"<li>{item}</li>" for item in items)
    return f'<section id="notes"><h2>Notes</h2><ul class="notes">{listing}</ul></section>'


def _reproduce(run: Mapping[str, Any]) -> str:
    facts = {
        **{k: v for k, v in run["versions"].items() if v},
        "processor": run["host"]["cpu"],
        "cores": run["host"]["cores"],
        "processes x threads": f"{run['processes']} x {run['config']['threads']}",
        "device": run["config"]["device"],
        "seed": run["config"]["seed"],
        "git": run.get("git") or "–",
        "started": run["started"],
        "time": f"{run['seconds']:.0f} s" if run.get("seconds") is not None else "–",
    }
    rows = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items())
    return f"""<section id="reproduce"><h2>Reproduce</h2>
<p class="muted">The same command continues or repeats this run; cells that are on disk are not computed again.</p>
<div class="command"><pre id="command">{escape(run["command"])}</pre>
<button type="button" class="copy" data-copy="command">copy</button></div>
<dl class="kv">{rows}</dl></section>"""
