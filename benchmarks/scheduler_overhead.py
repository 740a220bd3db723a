"""What a scheduler costs besides the network: ``step`` and ``set_timesteps`` against the diffusers class of the method.

    python benchmarks/scheduler_overhead.py [--shape 1 4 64 64] [--dtype float32] [--device cpu]

Both sides run in this process, one thread on the CPU, alternately; the smallest of many loops of 20 steps is taken. The
model output is a constant tensor. Operators are counted by the dispatcher in a steady step.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep as fs

SD = {"beta_start": 8.5e-4, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"shift": 3.0}
PAIRS: list[tuple[str, str, dict[str, Any], str]] = [
    ("DPM-Solver++2M", "DPMSolverMultistepScheduler", SD, "dpmpp_2m"),
    ("UniPC-2", "UniPCMultistepScheduler", SD, "unipc"),
    ("UniPC-3", "UniPCMultistepScheduler", {**SD, "solver_order": 3}, "unipc:order=3"),
    ("DEIS-3", "DEISMultistepScheduler", {**SD, "solver_order": 3}, "deis:order=3,variable=log_rho"),
    ("DDIM", "DDIMScheduler", {**SD, "clip_sample": False}, "ddim"),
    ("Heun", "HeunDiscreteScheduler", SD, "heun"),
    ("Euler, flow", "FlowMatchEulerDiscreteScheduler", FLOW, "euler"),
]


class Count(TorchDispatchMode):
    """Counts operators; promote_types is arithmetic on two dtypes, not on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += "promote_types" not in str(func)
        return func(*args, **(kwargs or {}))


def loop(
    scheduler: Any, x: torch.Tensor, out: torch.Tensor, device: torch.device, count: bool = False
) -> float:
    """Seconds a step, or operators in the tenth step."""
    scheduler.set_timesteps(20, device=device)
    scheduler.set_begin_index(0) if hasattr(scheduler, "set_begin_index") else None
    times = list(scheduler.timesteps)
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for i, t in enumerate(times):
        if count and i == 10:
            with Count() as counted:
                scheduler.step(out, t, x, return_dict=False)
            return counted.operators
        x = scheduler.step(out, t, x, return_dict=False)[0]
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(times)


def set_up(scheduler: Any, device: torch.device) -> float:
    """Seconds of ``set_timesteps(20)``, seen before."""
    start = time.perf_counter()
    scheduler.set_timesteps(20, device=device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", type=int, default=[1, 4, 64, 64])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "scheduler_overhead.json"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    x, out = (torch.randn(args.shape, device=device, dtype=dtype) for _ in range(2))
    rows = []
    print(f"{'':16s}{'diffusers':>12s}{'fewstep':>12s}{'ratio':>8s}{'operators':>14s}{'set_timesteps':>22s}")
    for label, cls, config, spec in PAIRS:
        theirs = getattr(diffusers, cls)(**config)
        ours = fs.FewStepScheduler.from_config(theirs.config, solver=spec)
        sides = {"diffusers": theirs, "fewstep": ours}
        step: dict[str, list[float]] = {name: [] for name in sides}
        setting: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.repeats):
            for name, scheduler in sides.items():
                step[name].append(loop(scheduler, x, out, device))
                setting[name].append(set_up(scheduler, device))
        us = {name: 1e6 * min(values) for name, values in step.items()}
        sets = {name: 1e6 * min(values) for name, values in setting.items()}
        operators = {name: int(loop(s, x, out, device, count=True)) for name, s in sides.items()}
        rows.append({"method": label, "step_us": us, "set_timesteps_us": sets, "operators": operators})
        print(
            f"{label:16s}{us['diffusers']:9.0f} us{us['fewstep']:9.0f} us{us['fewstep'] / us['diffusers']:8.2f}"
            f"{operators['diffusers']:8d} / {operators['fewstep']:3d}"
            f"{sets['diffusers']:13.0f} / {sets['fewstep']:3.0f} us",
            flush=True,
        )
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, 1 thread"
    about = {"shape": args.shape, "dtype": args.dtype, "device": args.device, "machine": machine}
    versions = {"fewstep": fs.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps({**about, **versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
