"""Tuned recipes against every diffusers scheduler with its best spacing in each cell, on noise that no fit has seen.

    python benchmarks/tuning.py [--samples N] [--models gmm digits-exact ...] [--nfe 4 5 ...] [--figure FILE.png]
    python benchmarks/tuning.py --table                     # what docs/tuning.md shows, from the file

For every embedded model and number of evaluations ``fewstep tune`` runs with its defaults (32 trajectories); the figure
is the RMS distance per element to the converged solution from the same noise: of 512 samples where the model is a
formula (few end elsewhere and are most of the error), 64 of a network. ``NAME@W`` is guidance of scale W. Where the
model has a feature network, the Frechet distances of recipe and best peer are measured on ``--frechet`` samples, to the
real images and to those of the converged solution from other noise, with the intervals of the paired differences.
Cells are written as they are done; those that the file holds already are not repeated, and with ``--again`` only the
search for their best peer is not.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from quality import best_peer, rms, run_peer, samples_of, spacings

import fewstep as fs
from fewstep.eval.eval_model import EvalModel
from fewstep.eval.metrics import Moments, frechet_interval, jackknife, to_uint8
from fewstep.eval.targets import Target, load_target
from fewstep.eval.tuning import TEACHER_STEPS, fit
from fewstep.tuning import Recipe

MODELS = ["gmm", "gmm:noise=edm", "gmm:noise=flow", "digits-exact", "digits-unet", "digits-unet@3"]
NFES = [4, 5, 6, 8, 10]
BATCH = 100
CONVERGED = "unipc:order=3,lower_order_final=false"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, help="of a cell; 512 of formulas, 64 of networks")
    parser.add_argument("--frechet", type=int, default=500)
    parser.add_argument("--trajectories", type=int, default=32)
    parser.add_argument("--teacher-steps", type=int, default=TEACHER_STEPS)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--nfe", nargs="+", type=int, default=NFES)
    parser.add_argument("--again", action="store_true", help="Fit cells again that are in the file.")
    parser.add_argument("--minutes", type=float, default=math.inf, help="Begin no cell after this time.")
    parser.add_argument(
        "--figure", type=Path, help="Draw the cells that are in the file, and do nothing else."
    )
    parser.add_argument("--table", action="store_true", help="print the tables of the file and stop")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tuning.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    diffusers.logging.set_verbosity_error()
    cells = json.loads(args.out.read_text())["cells"] if args.out.exists() else []
    if args.figure:
        return draw(cells, args.figure)
    if args.table:
        return print(markdown(cells))
    began = time.monotonic()
    for name in args.models:
        spec, _, scale = name.partition("@")
        w, target = (float(scale) if scale else None), load_target(f"builtin:{spec}")
        samples, truth = samples_of(target.model, args.samples), None
        for nfe in args.nfe:
            before = next((c for c in cells if (c["model"], c["nfe"]) == (name, nfe)), None)
            known = before if before and before["samples"] == samples else None
            if (known and not args.again) or time.monotonic() - began > 60 * args.minutes:
                continue
            if truth is None:
                truth = sampled(target.model, list(range(samples)), w, solver=CONVERGED, steps=300)
            fitted = functools.partial(
                fit, target, nfe, trajectories=args.trajectories, teacher_steps=args.teacher_steps
            )
            cell = measured(target, name, nfe, w, truth, args.frechet, known, fitted)
            cells = [c for c in cells if c is not before] + [cell]
            cells.sort(key=lambda c: (MODELS.index(c["model"]) if c["model"] in MODELS else 99, c["nfe"]))
            write(args.out, cells)
    print(f"geometric mean of {len(cells)} cells: {mean(cells):.3f}")


def sampled(
    model: EvalModel, indices: list[int], w: float | None, recipe: Recipe | None = None, **how: Any
) -> torch.Tensor:
    """Samples from the noise of their indices: of a recipe, or of what ``fs.sample`` is told."""
    schedule = model.noise_schedule
    top = float(schedule.alpha_sigma_at(schedule.level_max)[1])
    start = top if recipe is None else recipe.init_noise_sigma(schedule)
    return fs.sample(
        model.denoiser(indices),
        start * model.noise(indices),
        guidance=w,
        **(how if recipe is None else {"recipe": recipe}),
    )


def measured(
    target: Target,
    name: str,
    nfe: int,
    w: float | None,
    truth: torch.Tensor,
    frechet: int,
    known: dict | None,
    fit: Callable[..., Recipe | None],
) -> dict[str, Any]:
    """One cell."""
    model, indices = target.model, list(range(len(truth)))
    if known:
        peer, distance, count = known["peer"], known["best_peer"], known["peers"]
    else:
        peer, peers = best_peer(model, indices, w, nfe, truth)
        distance, count = peers[peer], len(peers)
    began, cpu = time.perf_counter(), time.process_time()
    recipe = fit(guidance=w)
    assert recipe is not None
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    apart = (sampled(model, indices, w, recipe) - truth).flatten(1).square().mean(1).sqrt()
    error = float(apart.square().mean().sqrt())
    cell = {
        "model": name,
        "nfe": nfe,
        "samples": len(truth),
        "recipe": error,
        "median": float(apart.median()),
        "method": recipe.method,
        "errors": dict(recipe.errors),
        "default": rms(sampled(model, indices, w, steps=nfe), truth),
        "best_peer": distance,
        "peer": peer,
        "peers": count,
        "ratio": error / distance,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
    }
    if target.features is not None and frechet:
        cell["frechet"] = distances(target, recipe, peer, nfe, w, frechet)
    print(
        f"{name} NFE {nfe}: {error:.4f} (median {cell['median']:.4f}; {recipe.method}, {seconds:.0f} s, {cpu:.0f} s of "
        f"processor), best of {count} peers {distance:.4f} ({peer}), ratio {error / distance:.2f} "
        f"{cell.get('frechet', '')}",
        flush=True,
    )
    return cell


def distances(
    target: Target, recipe: Recipe, peer: str, nfe: int, w: float | None, count: int
) -> dict[str, Any]:
    """Frechet distances of recipe and peer, and of their paired differences the intervals."""
    assert target.features is not None
    model = target.model
    named = {
        f"{cls.replace('Scheduler', '')} {label}": (cls, config)
        for cls, label, config in spacings(model.noise_schedule.frame)
    }
    parts: dict[str, list[torch.Tensor]] = {"recipe": [], "peer": []}
    for first in range(0, count, BATCH):
        indices = list(range(first, min(first + BATCH, count)))
        parts["recipe"].append(sampled(model, indices, w, recipe))
        parts["peer"].append(run_peer(*named[peer], model, indices, w, nfe))
    features = {who: target.features(to_uint8(torch.cat(some).numpy()))[0] for who, some in parts.items()}
    cell: dict[str, Any] = {"samples": count}
    for reference, moments in references(target, w).items():
        found = {who: jackknife(values, moments) for who, values in features.items()}
        difference = frechet_interval(found["recipe"], found["peer"])
        cell[reference] = {
            **{who: round(value.value, 3) for who, value in found.items()},
            "difference": [round(float(v), 3) for v in (difference.value, difference.low, difference.high)],
        }
    return cell


@functools.cache
def references(target: Target, w: float | None) -> dict[str, Moments]:
    """Real images, and a thousand of the converged solution from noise that nothing else here starts from."""
    assert target.features is not None
    images = [
        sampled(target.model, list(range(i, i + BATCH)), w, solver=CONVERGED, steps=40)
        for i in range(100_000, 101_000, BATCH)
    ]
    converged = to_uint8(torch.cat(images).numpy())
    return {
        "real": Moments.of(target.features(target.features.reference_images())[0]),
        "converged": Moments.of(target.features(converged)[0]),
    }


def mean(cells: list[dict]) -> float:
    return math.exp(sum(math.log(c["ratio"]) for c in cells) / len(cells))


def write(out: Path, cells: list[dict]) -> None:
    machine = f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}"
    versions = {"fewstep": fs.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    rows = ",\n  ".join(json.dumps(c) for c in cells)
    head = json.dumps({"geometric_mean": mean(cells), "machine": machine, **versions})[:-1]
    out.write_text(f'{head},\n "cells": [\n  {rows}\n ]}}\n')


def markdown(cells: list[dict]) -> str:
    """The ratios, a model a row, and the Frechet distances."""
    lines = [
        "| | " + " | ".join(f"NFE {n}" if n == NFES[0] else str(n) for n in NFES) + " |",
        "|---" * 6 + "|",
    ]
    for model in dict.fromkeys(c["model"] for c in cells):
        ratios = {c["nfe"]: f"{c['ratio']:.2f}" for c in cells if c["model"] == model}
        lines.append(f"| {model} | " + " | ".join(ratios.get(n, "") for n in NFES) + " |")
    worst = max(cells, key=lambda c: c["ratio"])
    seconds = [c["cpu_seconds"] for c in cells]
    lines += [
        "",
        f"Geometric mean {mean(cells):.3f}; worst {worst['ratio']:.2f} ({worst['model']}, NFE {worst['nfe']}); "
        f"{min(seconds):.0f} to {max(seconds):.0f} s of processor.",
        "",
        "| | recipe | best peer | difference | to the converged: recipe | best peer | difference |",
        "|---" * 7 + "|",
    ]
    for c in cells:
        if "frechet" in c:
            row = []
            for reference in ("real", "converged"):
                found = c["frechet"][reference]
                value, low, high = found["difference"]
                row += [f"{found['recipe']:.2f}", f"{found['peer']:.2f}"]
                row.append(f"{value:+.2f} ({low:+.2f} to {high:+.2f})")
            lines.append(f"| {c['model']}, NFE {c['nfe']} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def draw(cells: list[dict], file: Path) -> None:
    """Error over evaluations, a panel a model: best peer, the library's default, the recipe."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    names = [m for m in MODELS if any(c["model"] == m for c in cells)]
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.6), sharex=True, layout="constrained")
    lines = {
        "best_peer": ("best diffusers scheduler of the cell", "#888888", "o"),
        "default": ("fewstep without tuning", "#4477aa", "s"),
        "recipe": ("recipe", "#cc3311", "D"),
    }
    for axis, name in zip(axes.flat, names):
        mine = [c for c in cells if c["model"] == name]
        for key, (label, colour, marker) in lines.items():
            axis.plot(
                [c["nfe"] for c in mine],
                [c[key] for c in mine],
                color=colour,
                marker=marker,
                ms=4,
                label=label,
            )
        axis.set_yscale("log")
        axis.set_title(name.replace("@", ", guidance "), fontsize=10)
        axis.set_xticks(NFES)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("network evaluations")
    for axis in axes[:, 0]:
        axis.set_ylabel("distance to converged")
    figure.legend(
        *axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
