"""``fewstep explain``: a solver in facts, read off its compiled program: order, cost, exactness, stability."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..samplers import Combine, Program, Solver, compile, parse
from ..schedules import TimeGrid, make_grid, schedule
from ..schedules.spacing import DEFAULT
from . import mixture, stability

if TYPE_CHECKING:
    from rich.console import RenderableType

ORDER_STEPS = (24, 48, 96, 192)


def explain(
    solver: str, steps: int = 8, spacing: str = DEFAULT, noise: str = "vp", step_length: float = 1.0
) -> dict[str, Any]:
    """Everything ``fewstep explain`` shows, as plain data.

    Args:
        solver: a spec such as ``"unipc:order=3"``.
        steps: intervals of the grid whose program is shown.
        spacing: named spacing of that grid.
        noise: ``"vp"`` (linear betas), ``"edm"`` or ``"flow"``: noise schedule of that grid.
        step_length: h of the stability region, in lambda.

    Raises:
        ValueError: unknown solver, option, spacing or noise schedule, with the nearest name.
    """
    chosen = parse(solver)
    if noise not in mixture.NOISE_SCHEDULES:
        raise ValueError(f"no noise schedule {noise!r}; allowed: {', '.join(mixture.NOISE_SCHEDULES)}")
    if not (math.isfinite(step_length) and step_length > 0):
        raise ValueError(f"the step length of the stability region must be positive, got {step_length!r}")
    schedule(spacing)
    grid = make_grid(mixture.NOISE_SCHEDULES[noise](), steps, spacing)
    program = compile(chosen, grid, prediction="denoised")
    return {
        **_declaration(chosen),
        "measured_order": _orders(chosen) if not chosen.stochastic else None,
        "grid": {"noise": noise, "schedule": spacing, "steps": steps},
        "nfe": program.nfe,
        "registers": program.memory,
        "history": program.history,
        "operations": len(program.ops),
        "combinations": sum(isinstance(op, Combine) for op in program.ops),
        "coefficients": _coefficients(program),
        "exactness": _exactness(program, grid),
        "stability": _stability(chosen, step_length),
        "program": program.describe(),
    }


def _declaration(chosen: Solver) -> dict[str, Any]:
    d = chosen.declaration
    return {
        "solver": chosen.spec,
        "name": d.name,
        "family": d.family,
        "summary": d.summary,
        "documentation": "\n\n".join(
            [d.documentation, *(t.declaration.documentation for t in chosen.transforms)]
        ),
        "reference": d.reference,
        "aliases": dict(d.aliases),
        "options": [
            {
                "name": name,
                "type": option.description,
                "default": _plain(option.default),
                "value": _plain(chosen.all_options[name]),
            }
            for name, option in d.options.items()
        ],
        "order": chosen.order,
        "stochastic": chosen.stochastic,
        "evaluations_per_step": chosen.evaluations_per_step,
    }


def _plain(value: Any) -> Any:
    """JSON has no infinity: write the word the spec grammar reads."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _orders(chosen: Solver) -> dict[str, dict[str, Any]]:
    found = {}
    for name, make in mixture.NOISE_SCHEDULES.items():
        slope, errors = mixture.measured_order(chosen.spec, make(), ORDER_STEPS)
        found[name] = {"slope": slope, "steps": list(ORDER_STEPS), "errors": errors}
    return found


def _coefficients(program: Program) -> list[dict[str, Any]]:
    """Every state that the network is given, and the result, as weights on the start state, predictions and noises."""
    names = {0: "x"}
    evaluations = 0
    for op in program.ops:
        if not isinstance(op, Combine):
            names[op.dst] = f"n{op.dst}" if hasattr(op, "stop") else f"d{evaluations}"
            evaluations += not hasattr(op, "stop")
    states, result = program.unroll()
    rows = []
    for i, (form, node) in enumerate(zip([*states, result], [*program.evaluations, None])):
        row: dict[str, Any] = {"state": f"state {i}" if node else "result"}
        if node:
            row |= {"t": node.t, "alpha": node.alpha, "sigma": node.sigma}
        rows.append(
            row | {"weights": {names[source]: weight for source, weight in form.items() if weight != 0.0}}
        )
    return rows


def _exactness(program: Program, grid: TimeGrid) -> list[dict[str, Any]]:
    """Predictions on which every consistent solver is exact whatever the grid: errors are rounding, or a defect."""
    first, end = grid[0], grid[-1]
    noise = np.array([-1.3, 0.4, 2.1])
    data = np.array([0.7, -0.2, 0.5])
    start = first.alpha * data + first.sigma * noise
    exact = end.alpha * data + end.sigma * noise
    checks = []
    result = mixture.run(program, start, lambda x, node: data)
    # Noises are drawn as zero here, so a solver that replaces noise ends elsewhere where noise is left at the end.
    expected = exact if not program.stochastic or end.sigma == 0.0 else None
    if expected is not None:
        checks.append(_check("constant denoised prediction", result, expected))
    if all(node.alpha > 0 for node in program.evaluations) and not program.stochastic:
        result = mixture.run(program, start, lambda x, node: (x - node.sigma * noise) / node.alpha)
        checks.append(_check("constant noise prediction", result, exact))
    return checks


def _check(name: str, result: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    error = float(np.max(np.abs(result - exact)))
    return {"prediction": name, "error": error, "exact": error < 1e-9}


def _without_momentum(chosen: Solver) -> Solver | None:
    """What to compare a method with momentum or other transforms with: itself without."""
    if chosen.transforms:
        return replace(chosen, transforms=())
    if chosen.name == "ghvb" and chosen.all_options["order"] % 1:
        return chosen.with_options(order=math.ceil(chosen.all_options["order"]))
    return None


def _stability(chosen: Solver, step_length: float) -> dict[str, Any]:
    area = stability.region(chosen.spec, step_length, size=(213, 200))
    low, high = area.real_interval
    plain = _without_momentum(chosen)
    beside = stability.region(plain.spec, step_length, size=(213, 200)) if plain else None
    return {
        "test": "dy/dlambda = (z/h) y with denoised = (1 + z/h) y, grid uniform in lambda with step h",
        "step": step_length,
        "real_from": None if math.isnan(low) else low,
        "real_to": None if math.isnan(high) else high,
        "words": area.words,
        "area": area.area,
        "plain": {"solver": beside.solver, "words": beside.words, "area": beside.area} if beside else None,
        "picture": stability.braille(area, 56),
    }


# terminal ---------------------------------------------------------------------------------------------------------


def render(facts: Mapping[str, Any], width: int = 100, full: bool = False) -> list[RenderableType]:
    """The facts as rich renderables, top to bottom, for a terminal of ``width`` columns.

    ``full`` adds the docstring and the program.
    """
    from rich.padding import Padding
    from rich.text import Text

    def heading(words: str) -> Text:
        return Text(f"\n{words}", style="bold")

    parts: list[RenderableType] = [
        Text.assemble((facts["solver"], "bold cyan"), f"  {facts['summary']}"),
        Padding(Text(facts["reference"], style="dim"), (0, 0, 0, 2)),
    ]
    if full:
        parts += [Padding(Text(facts["documentation"].partition("\n")[2].strip()), (1, 0, 0, 2))]
    parts += [heading("Cost and order"), Padding(_facts_table(facts), (0, 0, 0, 2))]
    if facts["options"]:
        parts += [heading("Options"), Padding(_options_table(facts), (0, 0, 0, 2))]
    if facts["aliases"]:
        parts += [heading("Other names"), Padding(_names_table(facts), (0, 0, 0, 2))]
    grid = facts["grid"]
    title = f"Coefficients  {grid['steps']} steps, {grid['schedule']} spacing, {grid['noise']} noise schedule"
    parts += [heading(title), Padding(_coefficient_table(facts, width), (0, 0, 0, 2))]
    parts += [
        Padding(
            Text(
                "level: sigma / alpha; x: start state; d0, d1, ...: denoised predictions in order; n...: noises",
                style="dim",
            ),
            (0, 2),
        )
    ]
    area = facts["stability"]
    parts += [
        heading(
            f"Stability region  step h = {area['step']:g} in lambda; {area['words']}, area {area['area']:.2f}"
        ),
        Text(area["picture"]),
    ]
    if plain := area["plain"]:
        wider = area["area"] / plain["area"] if plain["area"] else math.inf
        words = f"{plain['solver']} alone: {plain['words']}, area {plain['area']:.2f}; here {wider:.2f} times that"
        parts += [Padding(Text(words), (0, 2))]
    note = (
        "dots: |growth per step| <= 1 on y' = (z/h) y, the network answering denoised = (1 + z/h) x/alpha; "
        "data live on [-h, 0], guidance reaches beyond it"
    )
    parts += [Padding(Text(note, style="dim"), (0, 2))]
    if full:
        parts += [heading("Program"), Text(facts["program"])]
    return parts


def _facts_table(facts: Mapping[str, Any]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    measured = facts["measured_order"]
    order = (
        "not measured: a stochastic solver has no error against one solution"
        if measured is None
        else ", ".join(f"{m['slope']:.2f} on {name}" for name, m in measured.items())
    )
    rows = [
        ("order declared", str(facts["order"])),
        ("order measured", order),
        ("stochastic", "yes" if facts["stochastic"] else "no"),
        ("network evaluations", f"{facts['nfe']} for {facts['grid']['steps']} steps"),
        ("memory", f"{facts['registers']} tensors at most, {facts['history']} kept across an evaluation"),
        ("operations", f"{facts['combinations']} linear combinations"),
        *(("exact on a " + c["prediction"], f"error {c['error']:.1e}") for c in facts["exactness"]),
    ]
    for name, value in rows:
        table.add_row(f"[dim]{name}[/dim]", value)
    return table


def _names_table(facts: Mapping[str, Any]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for alias, spec in facts["aliases"].items():
        table.add_row(alias, f"[dim]{spec}[/dim]")
    return table


def _options_table(facts: Mapping[str, Any]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("option", "value", "default", "allowed"):
        table.add_column(column)
    for option in facts["options"]:
        changed = option["value"] != option["default"]
        value = _word(option["value"])
        table.add_row(
            option["name"],
            f"[bold]{value}[/bold]" if changed else value,
            _word(option["default"]),
            option["type"],
        )
    return table


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(map(str, value)) or "(none)"
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _coefficient_table(facts: Mapping[str, Any], width: int) -> RenderableType:
    """Weights, one state a line; of a long run only as many of the newest predictions as fit."""
    from rich.table import Table

    rows = facts["coefficients"]
    room = max(1, (width - 42) // 11)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("state", no_wrap=True)
    for column in ("t", "level", "x"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("predictions, newest first", no_wrap=True)
    for row in rows:
        level = row["sigma"] / row["alpha"] if row.get("alpha") else math.inf
        at = [f"{row['t']:.4g}", f"{level:.4g}"] if "t" in row else ["", ""]
        weights = dict(row["weights"])
        start = weights.pop("x", None)
        newest = list(weights.items())[::-1]
        more = "  ..." if len(newest) > room else ""
        table.add_row(
            row["state"],
            *at,
            "" if start is None else f"{start:+.4f}",
            "  ".join(f"{weight:+.3f} [dim]{name}[/dim]" for name, weight in newest[:room]) + more,
        )
    return table


def picture(facts: Mapping[str, Any], suffix: str) -> bytes:
    """The stability region as a file: ``.svg`` and ``.html`` with axes, ``.png`` drawn from the same numbers.

    Raises ValueError for another suffix.
    """
    makers = {".svg": _svg, ".html": _html, ".png": stability.png}
    if suffix not in makers:
        raise ValueError(
            f"a picture is written as {', '.join(makers)}, not {suffix or 'a name without ending'!r}"
        )
    return makers[suffix](stability.region(facts["solver"], facts["stability"]["step"]))


def _svg(area: stability.Region) -> bytes:
    return stability.svg(area).encode()


def _html(area: stability.Region) -> bytes:
    head = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{area.solver}</title>'
    return f"{head}<body>{stability.svg(area)}</body></html>\n".encode()
