"""The command ``fewstep tune``: arguments in, a recipe out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console


def tune(
    nfe: Annotated[
        str, typer.Option(help="Network evaluations of a sample. Several (5,6,8) with --method dc.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The recipe file to write.")],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="builtin:NAME, module:callable returning a Denoiser, or a diffusers pipeline.",
        ),
    ] = "builtin:digits-unet",
    method: Annotated[
        str,
        typer.Option(
            help="fit: levels and weights; closed-form: weights only, quick; dc: compensation ratios; search: order, "
            "prediction, corrector of every step."
        ),
    ] = "fit",
    guidance: Annotated[
        str | None,
        typer.Option(
            help="Guidance scale or methods; none without. Several scales (2,4,7.5) with --method dc."
        ),
    ] = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            help="Spacing, or search:NAME (spectrum, gits, ays, optimal_steps, grid_search), to start from. "
            "Repeatable. Default: many spacings and the cheap searches."
        ),
    ] = None,
    spectrum: Annotated[
        Path | None,
        typer.Option(
            help="Eigenvalues of the data's covariance (.npy or JSON): one more grid, without the network."
        ),
    ] = None,
    trajectories: Annotated[int, typer.Option(help="Converged trajectories the fit sees.")] = 32,
    teacher_steps: Annotated[int, typer.Option(help="Evaluations of each of them.")] = 160,
    seed: Annotated[int, typer.Option(help="Another seed takes other noise.")] = 0,
    memory: Annotated[int, typer.Option(help="Predictions that a step combines.")] = 4,
    budget: Annotated[
        float, typer.Option(help="Evaluations of single samples that --method search may spend.")
    ] = 100_000.0,
    seconds: Annotated[float, typer.Option(help="Time that --method search may spend.")] = math.inf,
    test: Annotated[int, typer.Option(help="Fresh samples the recipe is measured on; 0 for none.")] = 64,
    batch: Annotated[int, typer.Option(help="Most samples in a network call.")] = 64,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder for solved trajectories; next to the recipe if not given."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the file's content instead of a summary.")
    ] = False,
) -> None:
    """Fit a few-step sampler to a model: levels and coefficients from converged trajectories, without training.

    What is fitted is judged on held-out trajectories against every method without tuning; if none is better, the recipe
    is the best of these and says so. Interrupted, it goes on from the trajectories that are solved. Under accelerate
    launch the processes share them.

    With --method dc, several --nfe or several --guidance scales give DC-Solver's polynomial that predicts the ratios of
    other numbers of evaluations and scales: run it with unipc:order=3+dc:cascade=FILE.json,guidance=W.

    Examples:
      fewstep tune --nfe 6 -o recipe.json
      fewstep tune -m my_package:my_denoiser --nfe 8 --guidance 5 -o recipe.json
      fewstep tune --nfe 6 --method dc --guidance 3 -o dc.json
      fewstep tune --nfe 5,6,8,10 --method dc --guidance 2,4,7.5 -o cascade.json
    """
    from . import launched
    from .cascade import cascade
    from .store import write_atomically
    from .sweep import split_numbers
    from .targets import load_target
    from .tuning import check, fit, read_eigenvalues

    budgets = list(split_numbers(nfe, int, "--nfe"))
    scales = _scales(guidance)
    several = len(budgets) > 1 or len(scales) > 1
    if several and method != "dc":
        raise ValueError(f"several --nfe or --guidance go with --method dc only, got --method {method}")
    if several and (spectrum or len(schedule or ()) > 1):
        raise ValueError("several --nfe or --guidance go with one --schedule, and no --spectrum")
    for one in budgets:
        check(one, trajectories, teacher_steps, method, schedule or (), budget)
    eigenvalues = None if spectrum is None else read_eigenvalues(spectrum)
    _writable(out)
    group = launched.group()
    options: dict[str, Any] = {
        "trajectories": trajectories,
        "teacher_steps": teacher_steps,
        "seed": seed,
        "batch": batch,
        "cache": cache or out.parent / ".fewstep-trajectories",
        "group": group,
    }
    target = load_target(model).to(group.device(device))
    console = Console(stderr=True, highlight=False, quiet=group.rank > 0)
    with _progress(console, trajectories * len(scales)) as told:
        if several:
            spacing = {"schedule": schedule[0]} if schedule else {}
            found = cascade(target, budgets, scales, **spacing, **options, **told)
            if found is None:  # a rank above 0 of a launcher
                return
            write_atomically(out, json.dumps(found, indent=1) + "\n")
        else:
            more: dict[str, Any] = {"memory": memory, "budget": budget, "seconds": seconds, "test": test}
            more |= {"schedules": schedule or (), "eigenvalues": eigenvalues}
            recipe = fit(target, budgets[0], method=method, guidance=scales[0], **more, **options, **told)
            if recipe is None:
                return
            recipe.save(out)
            found = recipe.to_dict()
    if as_json:
        print(json.dumps(found, indent=1, allow_nan=False))
    elif several:
        _show_cascade(found, out)
    else:
        _show(found, out)


def _scales(guidance: str | None) -> list[Any]:
    """One guidance as it stands, several scales as numbers."""
    if guidance is None:
        return [None]
    from .sweep import split_numbers

    if "," in guidance and ":" not in guidance:
        return list(split_numbers(guidance, float, "--guidance"))
    try:
        return [float(guidance)]
    except ValueError:
        return [guidance]


def _writable(out: Path) -> None:
    """OSError before the work if the file could not be written after it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir():
        raise ValueError(f"{str(out)!r} is a folder; --out names the file to write")
    probe = out.with_name(f".{out.name}.probe")
    probe.touch()
    probe.unlink()


@contextmanager
def _progress(console: Console, trajectories: int) -> Iterator[dict[str, Any]]:
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        solving = progress.add_task("converged trajectories", total=trajectories)
        trying = progress.add_task("fitting", total=None)

        def say(what: str, error: float) -> None:
            progress.update(trying, description=f"{what}: {error:.4g}")

        yield {"solved": lambda n: progress.advance(solving, n), "say": say}


def _show(recipe: dict[str, Any], out: Path) -> None:
    console, errors = Console(highlight=False), recipe["errors"]
    console.print(f"[bold]{recipe['method']}[/bold], {recipe['nfe']} evaluations of {recipe['model']}")
    words = {
        "fixed": "best without tuning",
        "held_out": "this recipe, on trajectories that a fit has not seen",
        "train": "this recipe, on those it was fitted to",
        "test": f"this recipe, {errors.get('test_samples', 0):g} fresh samples",
    }
    for name, label in words.items():
        if name in errors:
            console.print(f"  {errors[name]:.5f}  {label}")
    if recipe["kind"] == "fixed":
        console.print("  no fit was better than the best method without tuning: the recipe is that method")
    console.print(f"[bold]recipe[/bold]  {out}", soft_wrap=True)


def _show_cascade(found: dict[str, Any], out: Path) -> None:
    console = Console(highlight=False)
    for cell in found["cells"]:
        ratios, errors = " ".join(f"{r:.3f}" for r in cell["ratios"]), cell["errors"]
        change = f"{errors['fixed']:.5f} -> {errors['held_out']:.5f}"
        console.print(f"NFE {cell['nfe']}, guidance {cell['guidance']}: {change}  {ratios}")
    console.print(f"[bold]polynomial[/bold]  {out}", soft_wrap=True)
