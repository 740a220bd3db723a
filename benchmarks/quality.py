"""Few evaluations without tuning: fewstep's default against every diffusers scheduler with its best spacing.

    python benchmarks/quality.py [--samples N] [--models gmm digits-exact ...] [--out benchmarks/results/quality.json]

For every embedded model and number of evaluations, the RMS distance per element to the converged solution from the
same noise, of 512 samples where the model is a formula and of 64 of a network; "best peer" is the smallest over all
classes and spacings *in that cell*, a choice that no user could make in advance. The ratio fewstep / best peer and its
geometric mean are printed. Peers are the installed diffusers' own classes, driven as a pipeline drives them. Every
figure comes from this run.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch

import fewstep as fs
from fewstep.eval.eval_model import EvalModel
from fewstep.eval.models import load_model
from fewstep.schedules import Node, conversion

MODELS = ["gmm", "gmm:noise=edm", "gmm:noise=flow", "digits-exact", "digits-unet", "digits-unet@2"]
NFES = [4, 5, 6, 8, 10]


def spacings(frame: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(class, name, config) of every peer."""
    if frame == "flow":
        for shift in (1.0, 2.0, 3.0):
            yield "FlowMatchEulerDiscreteScheduler", f"shift {shift:g}", {"shift": shift}
            yield "FlowMatchHeunDiscreteScheduler", f"shift {shift:g}", {"shift": shift}
            flow = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
            for order in (2, 3):
                yield (
                    "DPMSolverMultistepScheduler",
                    f"order {order} shift {shift:g}",
                    {**flow, "solver_order": order},
                )
                yield (
                    "UniPCMultistepScheduler",
                    f"order {order} shift {shift:g}",
                    {**flow, "solver_order": order},
                )
                yield (
                    "DEISMultistepScheduler",
                    f"order {order} shift {shift:g}",
                    {**flow, "solver_order": order},
                )
        return
    if frame == "edm":
        for name in ("karras", "exponential"):
            config = {"sigma_schedule": name, "sigma_min": 0.002, "sigma_max": 80.0}
            yield "EDMEulerScheduler", name, config
            for order in (2, 3):
                yield (
                    "EDMDPMSolverMultistepScheduler",
                    f"order {order} {name}",
                    {**config, "solver_order": order},
                )
        return
    placements = {s: {"timestep_spacing": s} for s in ("linspace", "trailing", "leading")}
    flags = {
        "karras": "use_karras_sigmas",
        "exponential": "use_exponential_sigmas",
        "beta": "use_beta_sigmas",
    }
    for place, base in placements.items():
        base = {**base, **({"steps_offset": 1} if place == "leading" else {})}
        yield "DDIMScheduler", place, {**base, "clip_sample": False}
        for name, flag in {"plain": None, **flags, "lu": "use_lu_lambdas"}.items():
            config = {**base, **({flag: True} if flag else {})}
            for cls in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"):
                if name != "lu":
                    yield cls, f"{place} {name}", config
            for order in (2, 3):
                solvers = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler")
                others = ("UniPCMultistepScheduler", "DEISMultistepScheduler")
                for cls in (*solvers, *others) if name != "lu" else solvers[:1]:
                    yield cls, f"order {order} {place} {name}", {**config, "solver_order": order}


def run_peer(
    cls: str, config: dict[str, Any], model: EvalModel, indices: list[int], w: float | None, nfe: int
) -> Any:
    """A diffusers scheduler at exactly ``nfe`` evaluations, or None if it cannot spend that many."""
    denoiser = model.denoiser(indices)
    kind = {"epsilon": "epsilon", "denoised": "sample", "v": "v_prediction", "flow": "flow_prediction"}
    config = {"prediction_type": kind[denoiser.prediction]} | config
    if cls.startswith("FlowMatch"):
        config.pop("prediction_type")
    if not cls.startswith(("EDM", "FlowMatch")):
        config |= {
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "num_train_timesteps": 1000,
        }
    scheduler = getattr(diffusers, cls)(**config)
    for steps in (nfe, (nfe + 1) // 2):
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) == nfe:
            break
    else:
        return None
    x = model.noise(indices) * (1.0 if cls.startswith("FlowMatch") else float(scheduler.init_noise_sigma))
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        if cls.startswith("EDM"):
            time, state = scheduler.sigmas[i].to(x.dtype), x
        else:
            time, state = t.to(x.dtype) / (1000 if model.noise_schedule.frame == "flow" else 1), scaled
        times = time.float().expand(len(x))
        out = denoiser.fn(state, times)
        if w is not None:
            assert denoiser.unconditional is not None
            out = torch.lerp(denoiser.unconditional(state, times), out, w)
        if model.noise_schedule.frame == "flow" and denoiser.prediction != "flow":
            sigma = float(scheduler.sigmas[i])
            c_x, c_m = conversion(denoiser.prediction, "flow", Node(sigma, 1 - sigma, sigma))
            out = c_x * x + c_m * out
        if cls.startswith("EDM"):
            # These classes undo an EDM preconditioning: hand them the network output that it would have had.
            sigma = scheduler.sigmas[i].to(x.dtype)
            d = out if denoiser.prediction == "denoised" else x - sigma * out
            sd = scheduler.config.sigma_data
            out = (d - sd**2 / (sigma**2 + sd**2) * x) / (sigma * sd / (sigma**2 + sd**2) ** 0.5)
            if denoiser.prediction == "denoised":
                scheduler.register_to_config(prediction_type="epsilon")
        x = scheduler.step(out, t, x).prev_sample
    return x


def best_peer(
    model: EvalModel, indices: list[int], w: float | None, nfe: int, truth: torch.Tensor
) -> tuple[str, dict[str, float]]:
    """The name of the peer nearest to the converged solution, and every peer's RMS distance."""
    peers = {}
    for cls, label, config in spacings(model.noise_schedule.frame):
        try:
            result = run_peer(cls, config, model, indices, w, nfe)
        except (ValueError, IndexError, NotImplementedError, RuntimeError, TypeError, AssertionError):
            continue  # a combination that the class refuses or crashes on
        if result is not None and torch.isfinite(result).all():
            peers[f"{cls.replace('Scheduler', '')} {label}"] = rms(result, truth)
    return min(peers, key=peers.__getitem__), peers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, help="of a cell; 512 of formulas, 64 of networks")
    parser.add_argument(
        "--models", nargs="+", default=MODELS, help="builtin names, NAME@W for guidance scale W"
    )
    parser.add_argument("--nfe", nargs="+", type=int, default=NFES)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quality.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    diffusers.logging.set_verbosity_error()
    rows = []
    for name in args.models:
        spec, _, scale = name.partition("@")
        w, model = (float(scale) if scale else None), load_model(f"builtin:{spec}")
        samples = samples_of(model, args.samples)
        indices = list(range(samples))
        start = float(model.noise_schedule.alpha_sigma_at(model.noise_schedule.level_max)[1])
        x = model.noise(indices) * start

        def ours(solver: str, n: int, **kw: Any) -> torch.Tensor:
            return fs.sample(model.denoiser(indices), x, solver, steps=n, guidance=w, **kw)  # noqa: B023

        truth = ours("unipc:order=3,lower_order_final=false", 300)
        check = ours("dpmpp_2m:solver_type=heun", 300)
        resolution = rms(truth, check)
        print(f"\n{name}: {samples} samples, converged to {resolution:.1e}", flush=True)
        for nfe in args.nfe:
            best, peers = best_peer(model, indices, w, nfe, truth)
            error = rms(ours("unipc", nfe), truth)
            rows.append(
                {
                    "model": name,
                    "nfe": nfe,
                    "samples": samples,
                    "fewstep": error,
                    "best_peer": peers[best],
                    "peer": best,
                    "peers": len(peers),
                    "ratio": error / peers[best],
                    "resolution": resolution,
                }
            )
            print(
                f"  NFE {nfe:2d}: {error:.4f}  best of {len(peers)} peers {peers[best]:.4f} ({best})  "
                f"ratio {error / peers[best]:.2f}",
                flush=True,
            )
    mean = math.exp(sum(math.log(r["ratio"]) for r in rows) / len(rows))
    print(f"\ngeometric mean of the ratios over {len(rows)} cells: {mean:.3f}")
    versions = {"fewstep": fs.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    machine = f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}"
    args.out.parent.mkdir(exist_ok=True)
    report = {"geometric_mean": mean, "machine": machine, **versions, "cells": rows}
    args.out.write_text(json.dumps(report, indent=1) + "\n")


def samples_of(model: EvalModel, asked: int | None) -> int:
    """Samples of a cell. Of a formula more are cheap, and few that end in another mode are most of an error."""
    return asked or (512 if model.truth_is_exact else 64)


def rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).pow(2).mean().sqrt())


if __name__ == "__main__":
    main()
