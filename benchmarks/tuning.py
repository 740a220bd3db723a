"""Tuned recipes against every diffusers scheduler with its best spacing in each cell, on noise that no fit has seen.

    python benchmarks/tuning.py [--samples 64] [--models gmm digits-exact ...] [--nfe 4 5 ...] [--out FILE]

For every embedded model and number of evaluations ``fewstep tune`` runs with its defaults (32 trajectories); the figure
is the RMS distance per element to the converged solution from the same noise. ``NAME@W`` is guidance of scale W. Cells
are written as they are done; those that the file holds already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
import warnings
from pathlib import Path

import diffusers
import torch
from quality import best_peer, rms

import fewstep as fs
from fewstep.eval.targets import load_target
from fewstep.eval.tuning import fit

MODELS = ["gmm", "gmm:noise=edm", "gmm:noise=flow", "digits-exact", "digits-unet", "digits-unet@3"]
NFES = [4, 5, 6, 8, 10]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--nfe", nargs="+", type=int, default=NFES)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tuning.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    diffusers.logging.set_verbosity_error()
    cells = json.loads(args.out.read_text())["cells"] if args.out.exists() else []
    done = {(c["model"], c["nfe"], c["samples"]) for c in cells}
    indices = list(range(args.samples))
    for name in args.models:
        spec, _, scale = name.partition("@")
        w, target = (float(scale) if scale else None), load_target(f"builtin:{spec}")
        model = target.model
        x = model.noise(indices) * float(
            model.noise_schedule.alpha_sigma_at(model.noise_schedule.level_max)[1]
        )

        def sample(**how) -> torch.Tensor:
            return fs.sample(model.denoiser(indices), x, guidance=w, **how)  # noqa: B023

        truth = sample(solver="unipc:order=3,lower_order_final=false", steps=300)
        for nfe in args.nfe:
            if (name, nfe, args.samples) in done:
                continue
            best, peers = best_peer(model, indices, w, nfe, truth)
            began = time.perf_counter()
            recipe = fit(target, nfe, guidance=w)
            seconds = time.perf_counter() - began
            error = rms(sample(recipe=recipe), truth)
            cells.append(
                {
                    "model": name,
                    "nfe": nfe,
                    "samples": args.samples,
                    "recipe": error,
                    "method": recipe.method,
                    "errors": dict(recipe.errors),
                    "default": rms(sample(steps=nfe), truth),
                    "best_peer": peers[best],
                    "peer": best,
                    "peers": len(peers),
                    "ratio": error / peers[best],
                    "seconds": round(seconds, 1),
                }
            )
            print(
                f"{name} NFE {nfe}: {error:.4f} ({recipe.method}, {seconds:.0f} s), best of {len(peers)} peers "
                f"{peers[best]:.4f} ({best}), ratio {error / peers[best]:.2f}",
                flush=True,
            )
            write(args.out, cells)
    print(f"geometric mean of {len(cells)} cells: {mean(cells):.3f}")


def mean(cells: list[dict]) -> float:
    return math.exp(sum(math.log(c["ratio"]) for c in cells) / len(cells))


def write(out: Path, cells: list[dict]) -> None:
    machine = f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}"
    versions = {"fewstep": fs.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    rows = ",\n  ".join(json.dumps(c) for c in cells)
    head = json.dumps({"geometric_mean": mean(cells), "machine": machine, **versions})[:-1]
    out.write_text(f'{head},\n "cells": [\n  {rows}\n ]}}\n')


if __name__ == "__main__":
    main()
