"""DC-Solver's compensation against UniPC under guidance, in the cells of its searches and in cells that none has seen.

    python benchmarks/compensation.py [--models digits-unet digits-exact:conditional=true] [--out FILE]

Every number is the mean squared distance per element to the converged solution, on 64 samples of fresh noise. Ratios
are searched on ten converged trajectories by the published procedure (40 iterations); for the last rows they come from
the polynomial of the cells at ``--scales``, and neither their scale nor their number of evaluations was searched.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

import fewstep as fs
from fewstep.eval.targets import load_target
from fewstep.eval.tuning import source_of
from fewstep.samplers.compensation import cascade_ratios
from fewstep.schedules import make_grid
from fewstep.tuning import Source, Trajectories, error, fit_cascade, search_ratios, solve, table_of
from fewstep.tuning.dc import SOLVER, spec_of

MODELS = ["digits-unet", "digits-exact:conditional=true"]
NFES, UNSEEN = [5, 6, 8, 10], [(7, 2.5), (9, 2.5), (7, 3.5), (9, 3.5)]
SEARCHED, SAMPLES = range(1000, 1010), range(64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--scales", nargs="+", type=float, default=[2.0, 3.0, 4.0])
    parser.add_argument("--schedule", default="trailing")
    parser.add_argument("--teacher-steps", type=int, default=80)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compensation.json")
    args = parser.parse_args()
    cells: list[dict[str, Any]] = json.loads(args.out.read_text())["cells"] if args.out.exists() else []
    cells = [c for c in cells if (c["model"], c["schedule"]) not in {(m, args.schedule) for m in args.models}]
    for model in args.models:
        cells += measured(model, args.scales, args.schedule, args.teacher_steps)
        machine = f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}"
        head = {"machine": machine, "fewstep": fs.__version__, "torch": torch.__version__}
        rows = ",\n  ".join(map(json.dumps, cells))
        args.out.write_text(f'{json.dumps(head)[:-1]},\n "cells": [\n  {rows}\n ]}}\n')


def measured(model: str, scales: list[float], schedule: str, teacher_steps: int) -> list[dict[str, Any]]:
    """The cells of a model: searched ones, then those that the polynomial of these predicts."""
    target, found, cells = load_target(f"builtin:{model}"), {}, []
    for scale in scales:
        source = source_of(target, scale)
        truth, fresh = (solve(source, some, teacher_steps) for some in (SEARCHED, SAMPLES))
        for nfe in NFES:
            grid = make_grid(source.noise_schedule, nfe, schedule)
            found[nfe, scale] = search_ratios(source, truth, grid)
            cells.append(cell(model, schedule, nfe, scale, "search", found[nfe, scale], source, fresh))
    if len(scales) < 3:  # a quadratic in the scale needs three
        return cells
    coefficients = fit_cascade(found)
    for nfe, scale in UNSEEN:
        source = source_of(target, scale)
        ratios = cascade_ratios(coefficients, scale, nfe)
        fresh = solve(source, SAMPLES, teacher_steps)
        cells.append(cell(model, schedule, nfe, scale, "polynomial", ratios, source, fresh))
    return cells


def cell(
    model: str,
    schedule: str,
    nfe: int,
    scale: float,
    origin: str,
    ratios: tuple[float, ...],
    source: Source,
    fresh: Trajectories,
) -> dict[str, Any]:
    """Mean squared distances with and without ratios."""
    grid = make_grid(source.noise_schedule, nfe, schedule)
    with_ratios, without = (error(table_of(s, grid), source, fresh) ** 2 for s in (spec_of(ratios), SOLVER))
    print(
        f"{model} w = {scale:g} NFE {nfe} ({origin}): UniPC {without:.3g}, with ratios {with_ratios:.3g}, "
        f"{with_ratios / without:.2f}",
        flush=True,
    )
    return {
        "model": model,
        "schedule": schedule,
        "nfe": nfe,
        "guidance": scale,
        "ratios_from": origin,
        "ratios": [round(float(r), 6) for r in ratios],
        "unipc": without,
        "compensated": with_ratios,
    }


if __name__ == "__main__":
    main()
