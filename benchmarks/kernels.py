"""A sampling step and its guidance against one pass over memory and against diffusers, in one run.

    python benchmarks/kernels.py [--device cpu] [--repeats 40] [--shapes 1x16x128x128] [--dtypes float32 bfloat16]

``pass`` is the time that it takes to read and write as many bytes as a steady step has inputs and outputs, to new
memory: ``clone()`` of one tensor with half of them, the last results kept. ``torch`` and ``native`` are the settings of
FEWSTEP_KERNELS on the CPU, on CUDA it is ``triton``. A step is ``Stepper.step`` without the check for NaN, as the
diffusers scheduler has it. Peers are diffusers' DPMSolverMultistepScheduler (order 2), UniPCMultistepScheduler (order
3) and AdaptiveProjectedGuidance. All sides take turns, the smallest time of many is taken; one thread on the CPU.
Memory is what a step allocates at its peak, in latents, outputs among them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.guiders import AdaptiveProjectedGuidance
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep as fs
from fewstep.guidance import Run
from fewstep.kernels import dispatch
from fewstep.samplers import Stepper
from fewstep.schedules import VP, make_grid

CPU_SHAPES = ["1x4x64x64", "1x4x128x128", "1x16x128x128", "4x16x128x128"]
CUDA_SHAPES = ["1x4x64x64", "1x4x128x128", "1x16x128x128", "8x16x256x256", "1x16x21x90x160"]
STEPS, STEADY = 20, 10
PEERS = {
    "dpmpp_2m": partial(diffusers.DPMSolverMultistepScheduler, beta_schedule="scaled_linear"),
    "unipc:order=3": partial(
        diffusers.UniPCMultistepScheduler, beta_schedule="scaled_linear", solver_order=3
    ),
}
NOT_MEASURED = "not measured"


class Watch(TorchDispatchMode):
    """Counts operators and the memory that is alive at most, in units of one latent."""

    def __init__(self, latent: torch.Tensor) -> None:
        super().__init__()
        self.bytes, self.operators, self.peak = latent.numel() * latent.element_size(), 0, 0.0
        self._made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self._made.append(weakref.ref(result))
        alive = [t for r in self._made if (t := r()) is not None]
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
        self.peak = max(self.peak, sum(sizes.values()) / self.bytes)
        return result


def best(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Microseconds of each side, which returns seconds itself; in turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            times[name].append(side())
    return {name: round(1e6 * min(values), 1) for name, values in times.items()}


def timed(function: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Seconds of a call: of the quickest on the CPU, of the mean on a device, which works while the host goes on."""
    if device.type == "cpu":
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times)
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _wait(device)
    return (time.perf_counter() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def with_kernels(mode: str, function: Callable[[], Any]) -> Any:
    """The function under a setting of FEWSTEP_KERNELS."""
    os.environ["FEWSTEP_KERNELS"] = mode
    dispatch.mode.cache_clear()
    return function()


def steady(program: fs.Program, x: torch.Tensor, out: torch.Tensor) -> Stepper:
    """A run that has its history."""
    stepper = Stepper(program, x, check=False)
    for _ in range(STEADY):
        stepper.step(out)
    return stepper


def one_step(program: fs.Program, x: torch.Tensor, out: torch.Tensor) -> float:
    """Seconds of a steady step, by a loop over all that have the same history."""
    stepper, count = steady(program, x, out), STEPS - STEADY - 4
    return timed(lambda: stepper.step(out), x.device, count)


def their_step(make: Callable[[], Any], x: torch.Tensor, out: torch.Tensor) -> float:
    scheduler = make()
    scheduler.set_timesteps(STEPS, device=x.device)
    scheduler.set_begin_index(0)
    times = iter(scheduler.timesteps)
    for _ in range(STEADY):
        scheduler.step(out, next(times), x, return_dict=False)
    return timed(lambda: scheduler.step(out, next(times), x, return_dict=False), x.device, STEPS - STEADY - 4)


def measure_step(spec: str, x: torch.Tensor, modes: list[str], repeats: int) -> dict[str, Any]:
    program = fs.compile(spec, make_grid(VP.scaled_linear(), STEPS, "karras"), prediction="epsilon")
    out = torch.randn_like(x)
    item = program.passes[STEADY + 1]
    source = torch.randn(x.numel() * (len(item.inputs) + len(item.outputs)) // 2, device=x.device).to(x.dtype)
    written: deque[torch.Tensor] = deque(maxlen=2)  # a step's outputs live on too
    sides: dict[str, Callable[[], float]] = {
        m: partial(with_kernels, m, partial(one_step, program, x, out)) for m in modes
    }
    sides["pass"] = lambda: timed(lambda: written.append(source.clone()), x.device, 6)
    sides["diffusers"] = lambda: their_step(PEERS[spec], x, out)
    us = best(sides, repeats)
    row: dict[str, Any] = {"what": spec, "inputs": len(item.inputs), "outputs": len(item.outputs), "us": us}
    for mode in modes:
        stepper = with_kernels(mode, partial(steady, program, x, out))
        with Watch(x) as seen:
            stepper.step(out)
        row[mode] = {
            "of_pass": round(us[mode] / us["pass"], 2),
            "of_diffusers": round(us[mode] / us["diffusers"], 3),
            "operators": seen.operators,
            "peak_latents": round(seen.peak, 1),
        }
    return row


def measure_apg(x: torch.Tensor, modes: list[str], repeats: int) -> dict[str, Any]:
    """One guided prediction, momentum, cap and projection; c and u are the halves of one batch."""
    u, c = torch.randn(2 * x.shape[0], *x.shape[1:], device=x.device).to(x.dtype).chunk(2)
    grid = make_grid(VP.scaled_linear(), STEPS, "karras")
    run = Run(
        VP.scaled_linear(),
        "epsilon",
        tuple(grid)[:STEPS],
        branches=frozenset({"conditional", "unconditional"}),
    )
    node = grid[STEADY]

    def ours() -> float:
        session = fs.APG(7.5, norm=15.0, momentum=-0.5, space="network").session(run)

        def call() -> torch.Tensor:
            return session.finish(session.begin(x, node), {"conditional": c, "unconditional": u})

        call()
        return timed(call, x.device, 4)

    def theirs() -> float:
        guider = AdaptiveProjectedGuidance(7.5, -0.5, 15.0, eta=0.0, use_original_formulation=True)
        guider._step, guider._num_inference_steps = STEADY, STEPS
        guider.momentum_buffer = MomentumBuffer(-0.5)
        guider.forward(c, u)
        return timed(lambda: guider.forward(c, u), x.device, 4)

    sides: dict[str, Callable[[], float]] = {
        m: partial(with_kernels, m, ours) for m in modes if m != "native"
    }
    us = best(sides | {"diffusers": theirs}, repeats)
    ratios = {m: {"of_diffusers": round(us[m] / us["diffusers"], 3)} for m in sides}
    return {"what": "apg", "us": us, **ratios}


def measure_loop(x: torch.Tensor) -> dict[str, Any]:
    """What a captured loop of 20 steps takes besides a network that does nothing but one kernel."""
    network = fs.Denoiser(lambda x, t: x.clone(), VP.scaled_linear(), "epsilon")

    def sample() -> torch.Tensor:
        return fs.sample(network, x, "dpmpp_2m", STEPS, cuda_graph=True)

    sample()
    return {
        "what": "captured loop",
        "milliseconds": round(1e3 * min(timed(sample, x.device) for _ in range(50)), 3),
        "of that, clones": round(1e3 * min(timed(x.clone, x.device, STEPS) * STEPS for _ in range(50)), 3),
    }


def cuda_figures() -> dict[str, str]:
    """What only a GPU can show; measured by a run on one."""
    return dict.fromkeys(
        (
            "step, share of copy bandwidth from 64 MiB",
            "step of diffusers' at 4x128x128 and 16x21x90x160",
            "APG of diffusers'",
            "captured loop of 20 steps, ms beyond the network",
        ),
        NOT_MEASURED,
    )


def table_of(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    lines = [
        f"# Kernels on {report['device']}",
        "",
        f"{report['machine']}; fewstep {report['fewstep']}, torch {report['torch']}, diffusers {report['diffusers']}. "
        f"Written by `python benchmarks/kernels.py --device {report['device']}`, which says what the columns are.",
        "",
        "| what | shape | dtype | kernels | us | of one pass | of diffusers | operators | peak latents |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        for mode in row["us"]:
            if mode in ("pass", "diffusers") or "us" not in row:
                continue
            r = row[mode]
            cells = [row["what"], row["shape"], row["dtype"], mode, row["us"][mode]]
            cells += [r.get(k, "") for k in ("of_pass", "of_diffusers", "operators", "peak_latents")]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    if report["device"] != "cuda":
        lines += ["", "On a GPU:", ""]
        lines += [f"- {name}: {value}" for name, value in report["cuda"].items()]
    elif report.get("loop"):
        lines += ["", f"Captured loop of {STEPS} steps: {report['loop']}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    if cuda and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: nothing is measured")
    modes = ["torch", "triton"] if cuda else ["torch", "native"]
    rows = []
    for shape in args.shapes or (CUDA_SHAPES if cuda else CPU_SHAPES):
        for dtype in args.dtypes:
            x = torch.randn([int(n) for n in shape.split("x")], device=device).to(getattr(torch, dtype))
            for row in (
                *(measure_step(spec, x, modes, args.repeats) for spec in PEERS),
                measure_apg(x, modes, args.repeats),
            ):
                rows.append({"shape": shape, "dtype": dtype, **row})
                print(rows[-1], flush=True)
    report: dict[str, Any] = {
        "device": device.type,
        "machine": torch.cuda.get_device_name() if cuda else f"{_processor()}, one thread",
        "fewstep": fs.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "rows": rows,
    }
    if cuda:
        report["loop"] = measure_loop(torch.randn(1, 4, 128, 128, device=device))
    else:
        report["cuda"] = cuda_figures()
    args.out.mkdir(exist_ok=True)
    target = args.out / f"kernels-{device.type}"
    target.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(table_of(report), encoding="utf-8")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


if __name__ == "__main__":
    main()
