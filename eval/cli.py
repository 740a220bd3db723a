"""The command line ``fewstep``: arguments in, one function of the package, tables or JSON out.

Exit status: 0 done, 1 nothing could be measured or a worker failed, 2 a mistake on the command line, 130 interrupted.
With ``FEWSTEP_TRACEBACK=1`` in the environment a mistake shows its traceback.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..schedules.spacing import DEFAULT
from .tune_command import tune

app = typer.Typer(
    name="fewstep",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Few-step sampling of diffusion and flow models: compare solvers, look into them, list what there is.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of tables.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status. A user's mistake is one line on standard error, no traceback."""
    from .processes import WorkerFailed
    from .session import Interrupted

    try:
        status = app(
            args=None if arguments is None else list(arguments), standalone_mode=False, prog_name="fewstep"
        )
        return int(status or 0)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.status
    except (ValueError, TypeError) as error:
        if os.environ.get("FEWSTEP_TRACEBACK"):
            raise
        return _fail(str(error), 2)
    except WorkerFailed as error:
        return _fail(str(error), 1)
    except OSError as error:
        return _fail(f"{error.filename or 'file'}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        return 130
    except Exception as error:
        if hasattr(error, "format_message"):  # click: unknown option, missing argument
            context = getattr(error, "ctx", None)
            hint = f"; see {context.command_path} --help" if context else ""
            return _fail(f"{error.format_message().rstrip('.')}{hint}", 2)  # type: ignore[attr-defined]
        raise


def _fail(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))


@app.command("eval")
def evaluate(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="builtin:NAME, module:callable returning a fewstep.Denoiser (or EvalModel), or a diffusers folder or "
            "Hub id. Repeatable. Default: builtin:digits-exact and builtin:digits-unet.",
        ),
    ] = None,
    solvers: Annotated[
        list[str] | None,
        typer.Option(
            "--solvers",
            "-s",
            help="Solver specs, separated by spaces or commas; a comma before key=value belongs to the spec: "
            "'euler, unipc:order=3,variant=bh1'. Repeatable. See: fewstep list solvers.",
        ),
    ] = None,
    nfe: Annotated[
        str | None,
        typer.Option(
            help="Budgets: network evaluations per sample. Under guidance an evaluation counts 2. "
            "Default: 4,5,6,8,10,20, twice that under guidance (the same number of steps)."
        ),
    ] = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            help="Named spacing such as karras:rho=7, or auto: the library's default. Repeatable: every solver "
            "on each. See: fewstep list schedules."
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            help="File of fewstep tune: one more row, at its number of evaluations. Repeatable.",
        ),
    ] = None,
    guidance: Annotated[
        list[str] | None,
        typer.Option(
            help="Scales (1: none) and methods, such as '1,3,apg:3+cads,cfg:3+adaptive:0.99'. Repeatable. See: fewstep "
            "list guidance. Default: the model's own (1 and 2 for digits-unet)."
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", "-n", help="Samples a cell. Default: 1000 for digits-exact, 200 for digits-unet."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Sample i starts from the noise of seed + i.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Results folder. Default: fewstep-results/<models>-<hash of the choices>."
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes",
            "-p",
            help="Processes that share the work. Default: one a core (or a GPU), at most 8.",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of each process.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    chunk: Annotated[int, typer.Option(help="Consecutive samples computed and saved together.")] = 50,
    as_json: Json = False,
) -> None:
    """Compare solvers at equal numbers of network evaluations: [bold]the main job[/bold].

    Without arguments: nine solvers at 4 to 20 evaluations on the two embedded models, in below two minutes on
    two cores.

    For every cell of solver x NFE it samples from the same start noise, counts the evaluations at the network,
    and measures the distance to the converged solution and, where there is a feature network, the Fréchet
    distance to real images. The table fills as it goes; the results folder holds an interactive report.

    Interrupt it when you like (Ctrl-C): [bold]the same command goes on where it stopped[/bold] and gives the
    same numbers.

    Examples:
      fewstep eval
      fewstep eval -m builtin:digits-unet -s dpmpp_2m --guidance "3, apg:3+cads, cfg:3+adaptive:0.99"
      fewstep eval -m builtin:digits-exact -s "dpmpp_2m unipc:order=3,variant=bh1" --nfe 5,6,8
      fewstep eval -m mymodel:make_denoiser --schedule karras --schedule log_snr -n 100 -o results/mine
    """
    from .overview import overviews
    from .record import exact_command
    from .session import evaluate as run
    from .sweep import DEFAULT_MODELS, DEFAULT_SOLVERS, Config, split_numbers, split_specs
    from .table import guidance_tables

    if processes is not None and processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    config = Config(
        models=tuple(dict.fromkeys(model or DEFAULT_MODELS)),
        solvers=split_specs(solvers) if solvers else DEFAULT_SOLVERS,
        nfe=None if nfe is None else split_numbers(nfe, int, "--nfe"),
        schedules=tuple(dict.fromkeys(schedule or ["auto"])),
        recipes=tuple(dict.fromkeys(recipe or ())),
        guidance=split_specs(guidance) if guidance else None,
        samples=samples,
        seed=seed,
        chunk=chunk,
        threads=threads,
        device=device,
    )
    console = Console(stderr=as_json, highlight=False)
    result, store = run(config, out, processes, console, exact_command())
    if result is None:  # a rank above 0 of a launcher
        return
    if as_json:
        _print_json(result)
    else:
        for overview in overviews(result["panels"]):
            console.print(guidance_tables(overview))
        console.print(
            f"[bold]report[/bold]  {store.report.resolve().as_uri()}  ({result['run']['seconds']:.0f} s)",
            soft_wrap=True,
        )
    _exit_if_nothing(result)


def _exit_if_nothing(result: dict[str, Any]) -> None:
    cells = [c for p in result["panels"] for c in p["cells"] if c["status"] != "unreachable"]
    if cells and all(c["status"] == "failed" for c in cells):
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Results folder of fewstep eval.")], as_json: Json = False
) -> None:
    """Rebuild the numbers and the HTML report of a results folder, finished or not."""
    from .overview import overviews
    from .session import rebuild
    from .table import guidance_tables, result_tables

    result, store = rebuild(folder)
    if as_json:
        _print_json(result)
        return
    console = Console(highlight=False)
    for panel in result["panels"]:
        console.print(result_tables(panel, console.width))
    for overview in overviews(result["panels"]):
        console.print(guidance_tables(overview))
    console.print(f"[bold]report[/bold]  {store.report.resolve().as_uri()}", soft_wrap=True)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Results folder A.")],
    b: Annotated[Path, typer.Argument(help="Results folder B.")],
    as_json: Json = False,
) -> None:
    """What B changed against A: paired differences on the same indices, with 95 % intervals.

    Refuses, naming what differs, where model, converged solution or indices are not the same. Negative differences
    are improvements.
    """
    from .compare import compare as run
    from .table import comparison_tables

    result = run(a, b)
    if as_json:
        _print_json(result)
        return
    console = Console(highlight=False)
    console.print(f"A  {a}\nB  {b}\n", soft_wrap=True)
    for panel in result["panels"]:
        console.print(comparison_tables(panel))


app.command("tune")(tune)


@app.command("list")
def list_(
    what: Annotated[
        str | None,
        typer.Argument(help="solvers, schedules, models, metrics, recipes or guidance; all of them without."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List solvers, schedules, models, metrics, guidance methods, and the recipes in this folder."""
    from ..schedules.spec import suggestion
    from .listing import LISTS
    from .table import listing

    if what is not None and what not in LISTS:
        raise ValueError(
            f"nothing is listed under {what!r}; allowed: {', '.join(LISTS)}{suggestion(what, LISTS)}"
        )
    names = [what] if what else list(LISTS)
    rows = {name: LISTS[name][0]() for name in names}
    if as_json:
        _print_json(rows[what] if what else rows)
        return
    console = Console(highlight=False)
    for name in names:
        if len(names) > 1:
            console.print(f"[bold]{name}[/bold]")
        console.print(listing(rows[name], LISTS[name][1]))
        if len(names) > 1:
            console.print()


@app.command()
def explain(
    solver: Annotated[str, typer.Argument(help="A solver spec such as unipc:order=3.")],
    steps: Annotated[int, typer.Option(help="Steps of the grid whose coefficients are shown.")] = 8,
    schedule: Annotated[str, typer.Option(metavar="NAME", help="Named spacing of that grid.")] = DEFAULT,
    noise: Annotated[str, typer.Option(help="Its noise schedule: vp, edm or flow.")] = "vp",
    step_length: Annotated[
        float, typer.Option(help="Step h of the stability region, in log-SNR (lambda).")
    ] = 1.0,
    full: Annotated[
        bool, typer.Option("--full", help="With the solver's formula and the whole program.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the stability region to a .svg, .png or .html file."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look into a solver: order declared and measured, cost, memory, coefficients, exactness, stability region.

    The order is measured on a two-mode mixture with an exact solution, on three noise schedules. The stability
    region is that of the compiled program on y' = (z/h) y; dots are where it does not grow.
    """
    from .explain import explain as run
    from .explain import picture, render
    from .store import write_atomically

    facts = run(solver, steps, schedule, noise, step_length)
    if out is not None:
        write_atomically(out, picture(facts, out.suffix))
    if as_json:
        _print_json(facts)
        return
    console = Console(highlight=False)
    for part in render(facts, console.width, full):
        console.print(part)
    if out is not None:
        console.print(f"\n[bold]picture[/bold]  {out}", soft_wrap=True)


def _version(wanted: bool) -> None:
    if wanted:
        from .record import versions

        print(" ".join(f"{k} {v}" for k, v in versions().items()))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
