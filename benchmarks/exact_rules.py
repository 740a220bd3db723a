"""Exact rules beside the published ones that they put right, at few evaluations.

    python benchmarks/exact_rules.py [--samples 64] [--models gmm ...] [--out benchmarks/results/exact_rules.json]

For every embedded model, schedule and number of evaluations, the RMS distance per element to the converged solution
from the same noise. Every rule of a group spends the same evaluations at the same times. Printed as the tables of
docs/exact-rules.md; every figure comes from this run.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
from quality import rms

import fewstep as fs
from fewstep.eval.models import load_model

MODELS = ["gmm", "digits-exact", "digits-unet"]
SCHEDULES = ["arctan", "karras"]
NFES = [5, 6, 8, 10, 15, 20, 40, 80]

GROUPS = {
    "DPM-Solver++(3M)": {
        "published": "dpmpp_3m",
        "exact weights": "exp_adams:start=euler",
        "exact weights and start": "exp_adams",
    },
    "DPM-Solver-3M (noise)": {
        "published": "dpmpp_3m:form=epsilon",
        "exact weights": "exp_adams:form=epsilon,start=euler",
        "exact weights and start": "exp_adams:form=epsilon",
    },
    "UniPC-2": {"published (bh2)": "unipc", "exact weights": "exp_abm"},
    "UniPC-2 (noise)": {
        "published (bh2)": "unipc:form=epsilon",
        "exact weights and start": "exp_abm:form=epsilon",
    },
    "UniPC-3": {"published (vary)": "unipc:order=3,variant=vary", "published (bh2)": "unipc:order=3"},
    "DEIS tAB2": {
        "published (Riemann sum)": "deis:riemann=10000",
        "exact integrals": "deis:euler_at_final=true",
        "exact integrals to sigma = 0": "deis",
    },
    "iPNDM": {
        "published (iPNDM_v)": "ipndm_v:weights=published,frame=edm",
        "exact weights": "ipndm_v:frame=edm",
        "weights of a uniform grid": "ipndm:frame=edm",
    },
}
"""What is compared with what; the ratios are to the first of a group."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--nfe", nargs="+", type=int, default=NFES)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "exact_rules.json")
    args = parser.parse_args()
    indices, cells = list(range(args.samples)), []
    for name in args.models:
        model = load_model(f"builtin:{name}")
        start = float(model.noise_schedule.alpha_sigma_at(model.noise_schedule.level_max)[1])
        x = model.noise(indices) * start

        def solve(solver: str, n: int, schedule: str = "arctan") -> torch.Tensor:
            return fs.sample(model.denoiser(indices), x, solver, steps=n, schedule=schedule)  # noqa: B023

        truth = solve("exp_adams:order=4", 299)  # 300 evaluations
        resolution = rms(truth, solve("unipc:order=3,lower_order_final=false", 300))
        for schedule in SCHEDULES:
            print(f"\n### {name}, {schedule} (converged to {resolution:.0e})\n")
            print("| method | rule | " + " | ".join(f"NFE {n}" for n in args.nfe) + " |")
            print("|---|---|" + "---|" * len(args.nfe), flush=True)
            for group, rules in GROUPS.items():
                for rule, solver in rules.items():
                    errors = {n: rms(solve(solver, n, schedule), truth) for n in args.nfe}
                    print(
                        f"| {group} | {rule} | " + " | ".join(f"{e:.4f}" for e in errors.values()) + " |",
                        flush=True,
                    )
                    cells += [
                        {
                            "model": name,
                            "schedule": schedule,
                            "method": group,
                            "rule": rule,
                            "solver": solver,
                            "nfe": n,
                            "error": error,
                            "resolution": resolution,
                        }
                        for n, error in errors.items()
                    ]
    summary = ratios(cells)
    print("\n### Geometric mean of the ratio to the first rule, over all models\n")
    print("| method | rule | schedule | " + " | ".join(f"NFE {n}" for n in args.nfe) + " |")
    print("|---|---|---|" + "---|" * len(args.nfe))
    for row in summary:
        figures = " | ".join(f"{ratio:.2f}" for ratio in row["ratios"].values())
        print(f"| {row['method']} | {row['rule']} | {row['schedule']} | {figures} |")
    versions = {"fewstep": fs.__version__, "torch": torch.__version__}
    machine = f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}"
    args.out.parent.mkdir(exist_ok=True)
    report = {"samples": args.samples, "machine": machine, **versions, "ratios": summary, "cells": cells}
    args.out.write_text(json.dumps(report, indent=1) + "\n")


def ratios(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means over the models of a rule's error over that of the first rule of its group."""
    error = {(c["model"], c["schedule"], c["solver"], c["nfe"]): c["error"] for c in cells}
    models, nfes = (list(dict.fromkeys(c[key] for c in cells)) for key in ("model", "nfe"))
    rows = []
    for group, rules in GROUPS.items():
        (_, first), *others = rules.items()
        for rule, solver in others:
            for schedule in SCHEDULES:
                means = {
                    n: math.exp(
                        sum(
                            math.log(error[m, schedule, solver, n] / error[m, schedule, first, n])
                            for m in models
                        )
                        / len(models)
                    )
                    for n in nfes
                }
                rows.append({"method": group, "rule": rule, "schedule": schedule, "ratios": means})
    return rows


if __name__ == "__main__":
    main()
