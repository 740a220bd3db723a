"""Every spacing and every search for levels, on the embedded models.

    python benchmarks/schedules.py [--models gmm digits-exact ...] [--nfe 4 5 ...] [--again ays ...] [--out FILE]
    python benchmarks/schedules.py --table                  # what docs/schedules.md shows, from the file

Two tables. ``cells``: RMS distance per element to the converged solution from the same noise, 64 samples that no search
has seen, with the default solver and DPM-Solver++(2M); searches see 32 other trajectories. ``stochastic``: what
Align Your Steps is derived for, the Frechet distance between the moments of the data and of 2,048 samples of a
stochastic solver; its early stop looks at 512 others. Cells are written as they are done; those that the file holds
are not repeated, but ``--again`` runs some searches once more in each. What needs another noise schedule (published
tables) is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fewstep as fs
from fewstep.eval.targets import Target, load_target
from fewstep.eval.tuning import source_of
from fewstep.samplers import NumericalError
from fewstep.schedules import TimeGrid, make_grid, schedules
from fewstep.tuning import SEARCHES, Source, Trajectories, from_spectrum, power_law, search, solve, table_of
from fewstep.tuning.klub import align_your_steps
from fewstep.tuning.table import run, unit
from fewstep.tuning.tune import seeds

MODELS = ["gmm", "gmm:noise=edm", "gmm:noise=flow", "digits-exact", "digits-unet"]
NFES = [4, 5, 6, 8, 10]
SOLVERS = ["unipc", "dpmpp_2m"]
STOCHASTIC = ["ddim:eta=1", "dpmpp_2m_sde"]
HAND_MADE = ["karras", "exponential", "linspace", "trailing", "kl_optimal", "arctan"]
SAMPLES, TRAJECTORIES, MANY, JUDGED = 64, 32, 2048, 512

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--nfe", nargs="+", type=int, default=NFES)
    parser.add_argument("--again", nargs="+", default=[], metavar="SEARCH", help="run these once more")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "schedules.json")
    parser.add_argument("--table", action="store_true", help="print the tables of the file and stop")
    args = parser.parse_args()
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    tables: dict[str, list[Row]] = {k: before.get(k, []) for k in ("cells", "stochastic")}
    if args.table:
        print(markdown(tables["cells"], tables["stochastic"]))
        return
    for name in args.models:
        target = load_target(f"builtin:{name}")
        for table, rows in (("cells", cells), ("stochastic", stochastic)):
            done = set() if args.again else {place(r)[:3] for r in tables[table]}
            for found in rows(target, name, args.nfe, done, args.again):
                new = {place(r) for r in found}
                tables[table] = [r for r in tables[table] if place(r) not in new] + found
                write(args.out, tables)
                first = found[0]
                best = sorted(found, key=lambda r: r["error"])[:4]
                print(
                    f"{name} NFE {first['nfe']} {first['solver']}: "
                    + ", ".join(f"{r['schedule']} {r['error']:.4f}" for r in best),
                    flush=True,
                )


def place(row: Row) -> tuple:
    """What a row is of: model, evaluations and solver (the cell), schedule."""
    return row["model"], row["nfe"], row["solver"], row.get("kind"), row["schedule"]


def cells(
    target: Target, name: str, nfes: list[int], done: set, only: Sequence[str] = ()
) -> Iterator[list[Row]]:
    """All schedules, or some searches, of one model, solver and number of evaluations at a time."""
    wanted = [(n, s) for n in nfes for s in SOLVERS if (name, n, s) not in done]
    if not wanted:
        return
    source = source_of(target)
    truth, fresh = solve(source, list(seeds(TRAJECTORIES, 0))), solve(source, range(SAMPLES), 240)
    for nfe, solver in wanted:
        rows = []
        for kind, schedule, grid, seconds in grids(target, source, truth, nfe, solver, only):
            error = distance(solver, grid, source, fresh)
            row: Row = {"model": name, "nfe": nfe, "solver": solver, "kind": kind, "schedule": schedule}
            levels = [round(float(k), 6) for k in grid.level]
            rows.append(row | {"error": error, "seconds": round(seconds, 1), "levels": levels})
        yield rows


def grids(
    target: Target, source: Source, truth: Trajectories, nfe: int, solver: str, only: Sequence[str]
) -> Iterator[tuple[str, str, TimeGrid, float]]:
    """(kind, name, grid, seconds that it took to find it) of everything that fits the model."""
    noise = source.noise_schedule
    for spacing in () if only else schedules():
        try:
            yield "spacing", spacing, make_grid(noise, nfe, spacing), 0.0
        except ValueError:
            continue
    found: dict[str, Callable[[], Any]] = {
        s: partial(search, s, source, truth, nfe, solver) for s in SEARCHES
    }
    shape = target.model.shape if target.model else ()
    if len(shape) == 3:
        found["power_law"] = lambda: from_spectrum(noise, nfe, power_law(shape), solver=solver)
    for name, levels in found.items():
        if only and name not in only:
            continue
        began = time.perf_counter()
        grid = TimeGrid.from_levels(noise, levels())
        yield "search", name, grid, time.perf_counter() - began


def distance(solver: str, grid: TimeGrid, source: Source, fresh: Trajectories) -> float:
    """From the schedule's own start: unit noise times sigma."""
    start = source.noise(fresh.indices).to(fresh.result.dtype) * (grid[0].sigma / unit(grid[0]))
    try:
        states, _ = run(
            table_of(solver, grid), grid, start, lambda z, node: source.predict(fresh.indices, z, node)
        )
    except NumericalError:
        return math.inf
    return float((states[-1] - fresh.result).double().square().mean().sqrt())


def stochastic(
    target: Target, name: str, nfes: list[int], done: set, only: Sequence[str] = ()
) -> Iterator[list[Row]]:
    """Frechet distance of stochastic solvers on the closed-form models, whose data can be drawn."""
    model = target.model
    wanted = [(n, s) for n in (10, 20) for s in STOCHASTIC if (name, n, s) not in done]
    if only and "ays" not in only:
        return
    if not wanted or model is None or not model.truth_is_exact or model.reference is None:
        return
    source, noise, indices = source_of(target), target.noise_schedule, list(range(MANY))
    others = list(range(2 * MANY, 2 * MANY + JUDGED))
    truth = solve(source, list(seeds(TRAJECTORIES, 0)))
    data = moments(model.reference(list(range(4 * MANY))))
    floor = frechet(moments(model.reference(list(range(4 * MANY, 5 * MANY)))), data)
    for nfe, solver in wanted:
        levels = {s: make_grid(noise, nfe, s).level for s in HAND_MADE}
        levels["ays, no early stop"] = np.array(align_your_steps(source, truth, nfe, early=False))

        def distance_of(sigmas: Any, chosen: list[int]) -> float:
            x = target.noise(chosen, 0) * float(noise.alpha_sigma_at(sigmas[0])[1])
            samples = fs.sample(target.denoiser(chosen), x, solver, sigmas=sigmas, seed=1)  # noqa: B023
            return frechet(moments(samples), data)

        levels["ays"] = np.array(align_your_steps(source, truth, nfe, judge=lambda k: distance_of(k, others)))
        rows = []
        for schedule, sigmas in levels.items():
            error = distance_of(sigmas, indices)
            row: Row = {"model": name, "nfe": nfe, "solver": solver, "schedule": schedule}
            rows.append(
                row | {"error": error, "floor": floor, "levels": [round(float(k), 6) for k in sigmas]}
            )
        yield rows


Moments = tuple[np.ndarray, np.ndarray]


def moments(x: torch.Tensor) -> Moments:
    flat = x.flatten(1).double().numpy()
    return flat.mean(0), np.cov(flat.T)


def frechet(a: Moments, b: Moments) -> float:
    """``|m - n|^2 + tr(A + B - 2 (A B)^(1/2))``, the square of the distance of two normal distributions."""
    eigenvalues = np.linalg.eigvals(a[1] @ b[1]).real.clip(min=0.0)
    return float(np.sum((a[0] - b[0]) ** 2) + np.trace(a[1] + b[1]) - 2.0 * np.sqrt(eigenvalues).sum())


def markdown(cells: list[Row], stochastic: list[Row]) -> str:
    """Geometric means over solvers and evaluations of the error over that of the default spacing in the same cell."""
    cell = ("model", "nfe", "solver")
    default = {tuple(r[k] for k in cell): r["error"] for r in cells if r["schedule"] == "arctan"}
    models = list(dict.fromkeys(r["model"] for r in cells))
    ratios: dict[tuple[str, str], list[float]] = {}
    for r in cells:
        name = f"*{r['schedule']}*" if r["kind"] == "search" else f"`{r['schedule']}`"
        ratios.setdefault((name, r["model"]), []).append(r["error"] / default[tuple(r[k] for k in cell)])
    lines = ["| | " + " | ".join(models) + " |", "|---" * (1 + len(models)) + "|"]

    def mean(name: str, model: str) -> float:
        return math.exp(float(np.mean(np.log(ratios.get((name, model), [math.nan])))))

    names = list(dict.fromkeys(name for name, _ in ratios))
    for name in sorted(names, key=lambda n: np.nanmean([math.log(mean(n, m)) for m in models])):
        row = ["" if math.isnan(mean(name, m)) else f"{mean(name, m):.2f}" for m in models]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    counts = [f"{m} {sum(k[0] == m for k in default)}" for m in models]
    lines += ["", "Cells (solvers times evaluations): " + ", ".join(counts) + "."]
    runs = list(dict.fromkeys((r["model"], r["solver"], r["nfe"]) for r in stochastic))
    if runs:
        names = list(dict.fromkeys(r["schedule"] for r in stochastic))
        lines += ["", "| | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for key in runs:
        errors = {r["schedule"]: r["error"] for r in stochastic if (r["model"], r["solver"], r["nfe"]) == key}
        row = " | ".join(f"{errors[n]:.3f}" if n in errors else "" for n in names)
        lines.append(f"| {key[0]}, `{key[1]}`, NFE {key[2]} | {row} |")
    return "\n".join(lines)


def write(out: Path, tables: dict[str, list[Row]]) -> None:
    machine = f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}"
    head = {"machine": machine, "fewstep": fs.__version__, "torch": torch.__version__, "samples": SAMPLES}
    text = json.dumps(head)[:-1]
    for name, rows in tables.items():
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        text += f',\n "{name}": [\n  {lines}\n ]'
    out.parent.mkdir(exist_ok=True)
    out.write_text(text + "}\n")


if __name__ == "__main__":
    main()
