"""What a scheduler costs besides the network: ``step`` and ``set_timesteps`` against the diffusers class of the method.

    python benchmarks/scheduler_overhead.py [--device cpu] [--repeats 60] [--dtypes float32] [--shapes 1x4x64x64]

Both sides run in this process, one thread on the CPU, alternately; the smallest of many loops of 20 steps is taken, on
the CPU in time of the processor, so that other processes do not count. The model output is a constant tensor. Of a
steady step the dispatcher counts the operators, the values of tensors that the host reads (the first step is looked at
as well) and the most latents of temporary memory alive at once; history is the number of latents that a scheduler
holds from one step to the next, the returned state not among them.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
import weakref
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
STEPS, STEADY = 20, 10
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "linalg_solve_ex", "_linalg_solve_ex")
# What a latent-sized tensor is held in besides a scheduler's own attributes.
_HOLDERS = (list, tuple, dict)


class Observer(TorchDispatchMode):
    """Counts operators, host reads and latent-sized temporaries; promote_types is arithmetic on dtypes, no operator."""

    def __init__(self, latent: torch.Tensor) -> None:
        super().__init__()
        self.size, self.bytes = latent.numel(), latent.numel() * latent.element_size()
        self.operators = self.reads = 0
        self.peak = 0.0
        self._made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operators += name != "promote_types"
        self.reads += name in READS
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.size:
                self._made.append(weakref.ref(tensor))
        alive = [t for r in self._made if (t := r()) is not None]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
        self.peak = max(self.peak, sum(storages.values()) / self.bytes)
        return result


def held(owner: Any, returned: torch.Tensor) -> int:
    """The number of latent-sized tensors that a scheduler refers to, views of the returned state not counted."""
    found: set[int] = set()
    seen: set[int] = set()
    todo = [owner, getattr(owner, "_run", None)]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            if item.numel() == returned.numel():
                found.add(item.untyped_storage().data_ptr())
        elif isinstance(item, _HOLDERS):
            todo.extend(item.values() if isinstance(item, dict) else item)
        elif hasattr(item, "__dict__") and not isinstance(item, type):
            todo.extend(vars(item).values())
    return len(found - {returned.untyped_storage().data_ptr()})


def loop(scheduler: Any, x: torch.Tensor, out: torch.Tensor) -> float:
    """Seconds a step."""
    scheduler.set_timesteps(STEPS, device=x.device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    times = list(scheduler.timesteps)
    _wait(x.device)
    start = _clock(x.device)
    for t in times:
        x = scheduler.step(out, t, x, return_dict=False)[0]
    _wait(x.device)
    return (_clock(x.device) - start) / len(times)


def observe(scheduler: Any, x: torch.Tensor, out: torch.Tensor) -> dict[str, float]:
    """Counts of the first step, without a begin index, and of a steady one."""
    scheduler.set_timesteps(STEPS, device=x.device)
    counts: dict[str, float] = {}
    for i, t in enumerate(scheduler.timesteps):
        with Observer(x) as seen:
            x = scheduler.step(out, t, x, return_dict=False)[0]
        if i == 0:
            counts["first_step_host_reads"] = seen.reads
        if i == STEADY:
            counts |= {
                "operators": seen.operators,
                "host_reads": seen.reads,
                "temporaries": round(seen.peak, 1),
                "history": held(scheduler, x),
            }
    return counts


def set_up(scheduler: Any, device: torch.device) -> float:
    """Seconds of ``set_timesteps``, seen before."""
    start = _clock(device)
    scheduler.set_timesteps(STEPS, device=device)
    return _clock(device) - start


def _clock(device: torch.device) -> float:
    return time.perf_counter() if device.type == "cuda" else time.thread_time()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare(label: str, cls: str, config: dict[str, Any], spec: str, x: torch.Tensor, repeats: int) -> dict:
    out = torch.randn_like(x)
    theirs = getattr(diffusers, cls)(**config)
    sides = {
        "diffusers": theirs,
        "fewstep": fs.FewStepScheduler.from_config(theirs.config, solver=spec),
    }
    step: dict[str, list[float]] = {name: [] for name in sides}
    setting: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, scheduler in sides.items():
            step[name].append(loop(scheduler, x, out))
            setting[name].append(set_up(scheduler, x.device))
    us = {name: round(1e6 * min(values), 1) for name, values in step.items()}
    return {
        "method": label,
        "shape": list(x.shape),
        "dtype": str(x.dtype).removeprefix("torch."),
        "step_us": us,
        "ratio": round(us["fewstep"] / us["diffusers"], 3),
        "set_timesteps_us": {name: round(1e6 * min(values), 1) for name, values in setting.items()},
        **{name: observe(scheduler, x, out) for name, scheduler in sides.items()},
    }


def _processor() -> str:
    """The name of the processor, where the system tells it."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["1x4x64x64", "1x16x128x128"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "scheduler_overhead.json"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    device = torch.device(args.device)
    rows = []
    print("each pair: diffusers / fewstep")
    print(f"{'':36s}{'step, us':>14s}{'ratio':>7s}{'set_timesteps':>15s}", end="")
    print(f"{'operators':>11s}{'reads':>8s}{'first':>8s}{'temporaries':>13s}{'history':>9s}")
    for shape in args.shapes:
        for dtype in args.dtypes:
            x = torch.randn([int(n) for n in shape.split("x")], device=device).to(getattr(torch, dtype))
            for pair in PAIRS:
                row = compare(*pair, x, args.repeats)
                rows.append(row)
                a, b = row["diffusers"], row["fewstep"]
                us, sets = row["step_us"], row["set_timesteps_us"]
                print(
                    f"{row['method']:15s}{shape:12s} {dtype:8s}"
                    f"{us['diffusers']:7.0f} /{us['fewstep']:5.0f}{row['ratio']:7.2f}"
                    f"{sets['diffusers']:8.0f} /{sets['fewstep']:5.0f}"
                    f"{a['operators']:6d} /{b['operators']:3d}{a['host_reads']:4d} /{b['host_reads']:2d}"
                    f"{a['first_step_host_reads']:4d} /{b['first_step_host_reads']:2d}"
                    f"{a['temporaries']:7.1f} /{b['temporaries']:4.1f}{a['history']:5d} /{b['history']:2d}",
                    flush=True,
                )
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{_processor()}, 1 thread"
    about = {"device": args.device, "machine": machine}
    versions = {"fewstep": fs.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    versions["python"] = platform.python_version()
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps({**about, **versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
