"""Guidance measured on the embedded class-conditional network, and extrapolation against fewer steps.

    python benchmarks/guidance.py [--part methods adaptive extrapolation] [--minutes 60] [--figure docs/guidance.png]

``methods``: Frechet distance, accuracy, precision, recall and diversity at several scales and budgets. ``adaptive``:
the threshold of adaptive guidance at ten steps. ``extrapolation``: the RMS distance to the converged solution of the
same noise, beside the same solver with no more evaluations. NFE is counted at the network.

Cells are written as they are done; those in the file are not repeated, and ``--minutes`` ends a session early. About 15
minutes on one core. The figure needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fewstep as fs
from fewstep.eval import manifold
from fewstep.eval.metrics import (
    Moments,
    frechet_interval,
    jackknife,
    mean_interval,
    rms_distance,
    share_interval,
    to_uint8,
    without_groups,
)
from fewstep.eval.targets import Target, load_target

SAMPLES, PAIRED = 400, 32
"""Samples of a cell measured in features, and of one measured by its distance to the converged solution."""
SCALES = (2, 4, 8)
STEPS = (4, 5, 6, 8, 10, 16)
THRESHOLDS = (0.9, 0.95, 0.98, 0.991, 0.998)
METHODS = {
    "CFG": ("dpmpp_2m", "cfg:{w}"),
    "APG": ("dpmpp_2m", "apg:{w}"),
    "CADS": ("dpmpp_2m", "cfg:{w}+cads:0.15,tau1=0.5"),
    "AG": ("dpmpp_2m", "cfg:{w}+adaptive:0.95,policy=per_sample"),
    "CFG, DDIM": ("ddim", "cfg:{w}"),
    "PCG, DDIM": ("ddim", "pcg:{w}"),
}
MODELS = {"digits-unet": None, "digits-unet@3": 3.0, "digits-exact": None, "gmm": None}
SOLVERS = ("ddim", "dpmpp_2m", "unipc")
LENGTHS = (10, 16, 24)
MODES = {
    "h2/s2": "extrapolate:h2/s2,variable=epsilon",
    "h2/s3": "extrapolate:h2/s3,variable=epsilon",
    "h3/s3": "extrapolate:h3/s3,variable=epsilon",
    "h4/s4": "extrapolate:h4/s4,variable=epsilon",
    "h2/s2 sigma-aware": "extrapolate:h2/s2,sigma_aware=true,variable=epsilon",
    "h2/s2 denoised": "extrapolate:h2/s2",
    "h2/s2 learning": "extrapolate:h2/s2,learning=true,variable=epsilon",
    "adaptive 0.1": "extrapolate:adaptive,variable=epsilon",
    "adaptive 0.02": "extrapolate:adaptive,tolerance=0.02,variable=epsilon",
}
Cell = dict[str, Any]


# what there is to do: (key, function that makes the cell) ---------------------------------------------------------


def methods() -> Iterator[tuple[list[Any], Callable[[], Cell]]]:
    for steps in STEPS:
        for w in SCALES:
            for name, (solver, text) in METHODS.items():
                guidance = text.format(w=w)
                count = (
                    next(n for n in range(steps, 0, -1) if 3 * n - 2 <= 2 * steps) if "PCG" in name else steps
                )
                yield [name, w, steps], lambda s=solver, g=guidance, n=count: in_features(s, g, n)
        yield ["conditional", 1, steps], lambda n=2 * steps: in_features("dpmpp_2m", None, n)


def adaptive() -> Iterator[tuple[list[Any], Callable[[], Cell]]]:
    for w in SCALES:
        for threshold in THRESHOLDS:
            text = f"cfg:{w}+adaptive:{threshold},policy=per_sample"
            yield [w, threshold], lambda g=text: in_features("dpmpp_2m", g, 10)


def extrapolation() -> Iterator[tuple[list[Any], Callable[[], Cell]]]:
    for model, w in MODELS.items():
        for solver in SOLVERS:
            for steps in LENGTHS:
                for mode, text in MODES.items():
                    for branch in ("all", *(["unconditional"] if w else [])):
                        guidance = f"{text},branch={branch}" + (f"+cfg:{w:g}" if w else "")
                        key = [model, solver, steps, mode, branch]
                        yield (
                            key,
                            lambda m=model, s=solver, n=steps, g=guidance: against_fewer_steps(m, s, n, g),
                        )


PARTS = {"methods": methods, "adaptive": adaptive, "extrapolation": extrapolation}


# cells ------------------------------------------------------------------------------------------------------------


@cache
def target(name: str) -> Target:
    return load_target(f"builtin:{name.partition('@')[0]}")


@cache
def images() -> tuple[np.ndarray, Moments, np.ndarray]:
    """Features of the reference images, their moments and labels."""
    network = target("digits-unet").features
    assert network is not None
    features = network(network.reference_images())[0]
    labels = target("digits-unet").labels(range(len(features)))
    assert labels is not None
    return features, Moments.of(features), labels


def run(model: str, solver: str, steps: int, guidance: Any, count: int) -> tuple[np.ndarray, float]:
    """Samples 0 .. count - 1 and the evaluations of one."""
    indices = list(range(count))
    denoiser = target(model).denoiser(indices)
    x = target(model).noise(indices, 0)
    x = x * float(denoiser.noise_schedule.alpha_sigma_at(denoiser.noise_schedule.level_max)[1])
    with torch.inference_mode():
        samples = fs.sample(denoiser, x, solver, steps, guidance=guidance, seed=indices)
    return samples.numpy(), denoiser.nfe / count


def in_features(solver: str, guidance: str | None, steps: int) -> Cell:
    """One row of the comparison in the classifier's features; ``parts`` are the jackknife's, for paired differences."""
    samples, nfe = run("digits-unet", solver, steps, guidance, SAMPLES)
    network = target("digits-unet").features
    assert network is not None
    features, predicted = network(to_uint8(samples))
    labels = target("digits-unet").labels(range(SAMPLES))
    reference, moments, classes = images()
    data = manifold.spread(reference, classes)
    distance = jackknife(features, moments)
    recall = without_groups(
        lambda rows: float(manifold.precision_recall(features[rows], reference)[1].mean()), SAMPLES, 10
    )
    diversity = without_groups(lambda rows: manifold.spread(features[rows], labels[rows]) / data, SAMPLES, 10)
    inside, _ = manifold.precision_recall(features, reference)
    return {
        "solver": solver,
        "guidance": guidance,
        "steps": steps,
        "nfe": nfe,
        "frechet": frechet_interval(distance).to_json(),
        "accuracy": share_interval(int((predicted == labels).sum()), SAMPLES).to_json(),
        "precision": share_interval(int(inside.sum()), SAMPLES).to_json(),
        "recall": frechet_interval(recall).to_json(),
        "diversity": frechet_interval(diversity).to_json(),
        "parts": {
            name: [short(v) for v in value.parts]
            for name, value in (("frechet", distance), ("recall", recall), ("diversity", diversity))
            if value.parts is not None
        },
    }


@cache
def distances(model: str, solver: str, steps: int, guidance: Any) -> tuple[np.ndarray, float]:
    """Distance of each sample to the converged solution, and the evaluations of one."""
    samples, nfe = run(model, solver, steps, guidance, PAIRED)
    return rms_distance(samples, converged(model)), nfe


@cache
def converged(model: str) -> np.ndarray:
    return run(model, "unipc:order=3,lower_order_final=false", 200, MODELS[model], PAIRED)[0]


def against_fewer_steps(model: str, solver: str, steps: int, guidance: str) -> Cell:
    """An extrapolated run and the same solver with as many steps as its evaluations pay for."""
    mine, nfe = distances(model, solver, steps, guidance)
    cost = 2 if MODELS[model] else 1
    theirs, plain = distances(model, solver, int(nfe / cost + 1e-9), MODELS[model])
    return {
        "nfe": nfe,
        "nfe_plain": plain,
        "rms": float(mine.mean()),
        "rms_plain": float(theirs.mean()),
        "ratio": float(mine.mean() / theirs.mean()),
        "difference": mean_interval(mine - theirs).to_json(),
    }


def short(value: float) -> float:
    return float(f"{value:.6g}")


# the file ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="stop after the cell at which they are over"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "guidance.json")
    parser.add_argument("--figure", type=Path, help="draw what the file holds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    held = json.loads(args.out.read_text()) if args.out.exists() else {}
    began = time.monotonic()
    for part in args.part:
        cells = held.setdefault(part, [])
        done = {json.dumps(c["key"]) for c in cells}
        for key, make in PARTS[part]():
            if json.dumps(key) in done or time.monotonic() - began > 60.0 * args.minutes:
                continue
            cell = {"key": key, **make()}
            cells.append(cell)
            write(args.out, held)
            print(part, *key, line(cell), flush=True)
    if args.figure:
        from guidance_figure import draw

        draw(held, args.figure)


def line(cell: Cell) -> str:
    if "ratio" in cell:
        return f"NFE {cell['nfe']:g}: {cell['rms']:.4f}, fewer steps {cell['rms_plain']:.4f}, ratio {cell['ratio']:.2f}"
    names = ("frechet", "accuracy", "precision", "recall", "diversity")
    return f"NFE {cell['nfe']:g}: " + ", ".join(f"{n} {cell[n]['value']:.3f}" for n in names)


def write(out: Path, held: dict[str, list[Cell]]) -> None:
    machine = f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}"
    head = {
        "machine": machine,
        "fewstep": fs.__version__,
        "torch": torch.__version__,
        "samples": SAMPLES,
        "paired": PAIRED,
    }
    rows = {part: ",\n  ".join(map(json.dumps, held[part])) for part in PARTS if part in held}
    body = ",\n".join(f' "{part}": [\n  {text}\n ]' for part, text in rows.items())
    out.write_text(f"{json.dumps(head)[:-1]},\n{body}\n}}\n")


if __name__ == "__main__":
    main()
