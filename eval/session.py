"""One call of ``fewstep eval``: plan, folder, work with a live table, results."""

from __future__ import annotations

import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from .processes import Done, default_processes, run
from .report import half_width, number
from .store import FORMAT, Store
from .summary import Summary, write
from .sweep import Config, Panel, Plan, expand
from .table import metric_table, result_tables
from .targets import load_target
from .work import Job, chunks_of, jobs, pending

RESULTS = Path("fewstep-results")


class Interrupted(Exception):
    """The run was told to stop (Ctrl-C, SIGTERM); everything finished is on disk. ``status`` is the exit status."""

    def __init__(self, status: int) -> None:
        super().__init__("interrupted; run the same command to go on")
        self.status = status


def default_folder(plan: Plan) -> Path:
    """``fewstep-results/<models>-<hash>``: the same choices give the same folder, so the same command continues."""
    names = list(dict.fromkeys(p.model.removeprefix("builtin:") for p in plan.panels))
    safe = "+".join("".join(c if c.isalnum() or c in "._-" else "-" for c in name) for name in names)
    return RESULTS / f"{safe[:60]}-{plan.key()}"


def evaluate(
    config: Config, out: Path | None, processes: int | None, console: Console, command: Sequence[str]
) -> tuple[dict[str, Any], Store]:
    """Do the whole run and return the contents of ``metrics.json`` with the folder.

    Raises:
        ValueError: a mistake in the configuration or a folder that cannot be written, before any work.
        Interrupted: after Ctrl-C or SIGTERM.
    """
    with _quiet_threads(config.threads), _status(console, "loading models"):
        plan = expand(config)
    store = Store(out or default_folder(plan))
    store.prepare()
    store.tidy()
    count = default_processes(plan) if processes is None else processes
    record = _record(plan, store, count, command)
    _announce(plan, store, console, count)
    _write_reference_features(plan, store)
    for warning in dict.fromkeys(w for p in plan.panels for w in p.warnings):
        console.print(f"[yellow]warning:[/yellow] {warning}")
    began = time.perf_counter()

    def finish(done: bool) -> dict[str, Any]:
        record["seconds"] = (record["seconds"] or 0.0) + time.perf_counter() - began
        record["finished"] = _now() if done else None
        store.save_json("run.json", record)
        return write(store, record)

    store.save_json("run.json", record)
    with _stoppable():
        try:
            _display(plan, store, console, count)
            with _status(console, "writing the report"):
                return finish(True), store
        except KeyboardInterrupt as stop:
            status = stop.args[0] if stop.args else 130
            console.print("[dim]stopping; writing the report of what there is[/dim]")
            try:
                finish(False)
            except (KeyboardInterrupt, ValueError, OSError):
                pass  # told twice, or the folder is gone: the chunks are what counts
            raise Interrupted(status) from None


def _status(console: Console, words: str) -> AbstractContextManager[Any]:
    return console.status(words) if console.is_terminal else nullcontext()


@contextmanager
def _quiet_threads(threads: int) -> Iterator[None]:
    """Torch with few threads for a while: on a loaded machine a small network is slower with many."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rebuild(folder: Path) -> tuple[dict[str, Any], Store]:
    """Compute the numbers of a results folder again and write its files."""
    store = Store(folder)
    record = store.load_json("run.json")
    store.prepare()
    return write(store, record), store


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM (a job scheduler's way to say stop) does what Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: the caller's business
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_reference_features(plan: Plan, store: Store) -> None:
    """Mean and covariance of the reference images' features, once a folder."""
    from .metrics import Moments

    for panel in plan.panels:
        name = f"reference-{panel.features}.safetensors"
        if panel.features is None or (store.folder / name).exists():
            continue
        features = load_target(panel.model).features
        assert features is not None
        moments = Moments.of(features(features.reference_images())[0])
        store.save_arrays(
            name, {"mean": moments.mean, "covariance": moments.covariance}, {"count": moments.count}
        )


def _announce(plan: Plan, store: Store, console: Console, processes: int) -> None:
    cells = [c for p in plan.panels for c in p.cells if c.message is None]
    ready = sum(
        all(store.has(c.key, k) for k in p.chunks(plan.config.chunk))
        for p in plan.panels
        for c in p.cells
        if not c.message
    )
    names = ", ".join(p.id for p in plan.panels)
    console.print(
        f"[bold]fewstep eval[/bold]  {names}: {len(cells)} cells, {processes} process{'es' * (processes > 1)}"
    )
    if ready:
        console.print(f"continuing: {ready} of {len(cells)} cells are in {store.folder}")
    else:
        console.print(f"results in {store.folder}")
    console.print()


def _record(plan: Plan, store: Store, processes: int, command: Sequence[str]) -> dict[str, Any]:
    from dataclasses import asdict

    before: Mapping[str, Any] = {}
    if (store.folder / "run.json").exists():
        before = store.load_json("run.json")
    same = before.get("plan", {}).get("panels") == _plain(plan)["panels"]
    return {
        "format": FORMAT,
        "command": shlex.join(command),
        "started": before.get("started") if same else _now(),
        "finished": None,
        "seconds": before.get("seconds") if same else None,
        "sessions": 1 + (before.get("sessions", 0) if same else 0),
        "processes": processes,
        "versions": versions(),
        "git": _git(),
        "host": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "machine": platform.machine(),
        },
        "config": asdict(plan.config),
        "plan": plan.to_json(),
    }


def _plain(plan: Plan) -> dict[str, Any]:
    import json

    return json.loads(json.dumps(plan.to_json()))


def _now() -> str:
    return datetime.now(timezone.utc).replace(microsecond=0).isoformat()


def versions() -> dict[str, str]:
    """Versions that decide the numbers."""
    import numpy
    import torch

    from .. import __version__

    return {
        "fewstep": __version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def _git() -> str | None:
    """The commit of the package when it is run from its repository (not of a repository it is installed in)."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "-uno"],
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (
        head.stdout.strip() + ("+changes" if changed.stdout.strip() else "") if head.returncode == 0 else None
    )


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# display ----------------------------------------------------------------------------------------------------------


class _Board:
    """Numbers of the panels as they come in, and how to show them."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self.plan = plan
        self.summaries = [Summary(plan, panel, store) for panel in plan.panels]
        self.panels = [{**s.head(), "cells": [s.cell(c) for c in s.panel.cells]} for s in self.summaries]
        self.shown = 0
        """Panels that stand finished above the live part."""

    def update(self, done: Done) -> dict[str, Any] | None:
        """Take note of a chunk; the cell it finished, if it did."""
        panel, job, _ = done
        at = next(i for i, p in enumerate(self.plan.panels) if p.id == panel.id)
        if job.kind != "cell":
            return None
        places = [i for i, c in enumerate(panel.cells) if c.key == job.key]  # two names may mean one program
        if self.panels[at]["cells"][places[0]]["status"] != "pending":
            return None
        cell = self.summaries[at].cell(panel.cells[places[0]])
        if cell["status"] == "pending":
            return None
        for index in places:
            self.panels[at]["cells"][index] = {**cell, "row": panel.cells[index].row}
        if all(c["status"] != "pending" for c in self.panels[at]["cells"]):
            self.panels[at] |= self.summaries[at].head()
        return cell

    def finished(self) -> Iterator[dict[str, Any]]:
        """Panels that became complete, in order."""
        while self.shown < len(self.panels) and all(
            c["status"] != "pending" for c in self.panels[self.shown]["cells"]
        ):
            yield self.panels[self.shown]
            self.shown += 1


def _display(plan: Plan, store: Store, console: Console, processes: int) -> None:
    """Run everything, showing the table as it fills."""
    board = _Board(plan, store)
    for panel in board.finished():
        console.print(result_tables(panel))
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28, complete_style="cyan", finished_style="cyan"),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[left]}"),
        console=console,
    )
    total = sum(
        _weight(plan, p, j, len(c))
        for p in plan.panels
        for j in jobs(p)
        for c in chunks_of(p, j, plan.config.chunk)
    )
    left = sum(_weight(plan, p, j, len(c)) for p, j, c in pending(plan, store))
    if not left:
        return
    task = progress.add_task("starting", total=total, completed=total - left, left="")
    began, done_before = time.monotonic(), total - left

    def view() -> RenderableType:
        if board.shown >= len(board.panels):
            return progress
        return Group(metric_table(board.panels[board.shown], "rms"), Text(), progress)

    live = (
        Live(view(), console=console, refresh_per_second=8, transient=True) if console.is_terminal else None
    )
    with live or nullcontext():
        for done in run(plan, store, processes):
            completed = progress.tasks[0].completed
            progress.update(
                task, left=_left(time.monotonic() - began, completed - done_before, total - completed)
            )
            if done is None:
                continue
            panel, job, chunk = done
            progress.update(
                task,
                advance=_weight(plan, panel, job, len(chunk)),
                description=_doing(panel, job.kind, job.solver),
            )
            cell = board.update(done)
            if cell is not None and live is None:
                console.print(_line(panel, cell), soft_wrap=True)
            for finished in board.finished():
                console.print(result_tables(finished))
            if live:
                live.update(view())


CHUNK_OVERHEAD = 12.0
"""Milliseconds a chunk costs besides the network: solver, features, writing."""


def _weight(plan: Plan, panel: Panel, job: Job, samples: int) -> float:
    """Expected milliseconds of a job on some samples."""
    return samples * job.steps * panel.cost * plan.milliseconds[panel.model] + CHUNK_OVERHEAD


def _left(seconds: float, done: float, todo: float) -> str:
    """Time left at the pace so far; nothing while the pace is not known."""
    if seconds < 3.0 or done < 0.02 * todo:
        return ""
    minutes, rest = divmod(round(seconds * todo / done), 60)
    return f"{minutes}:{rest:02d} left"


def _doing(panel: Panel, kind: str, solver: str) -> str:
    what = {"reference": "converged solution", "check": "its resolution"}.get(kind, solver)
    return f"{panel.id}  {what}"


def _line(panel: Panel, cell: Mapping[str, Any]) -> str:
    """A finished cell as one line, for logs."""
    start = f"{panel.id}  {panel.rows[cell['row']].label}  NFE {cell['budget']}"
    if cell["status"] != "ok":
        return f"{start}  {cell['status']}: {cell['message']}"
    parts = [f"{name} {number(cell[key]['value'])} {half_width(cell[key])}" for key, name in
             (("rms", "RMS"), ("frechet", "Fréchet")) if cell.get(key)]  # fmt: skip
    return f"{start}  {'  '.join(parts)}"


def main_process() -> tuple[int, int]:
    """(rank, world) under ``accelerate launch`` or ``torchrun``; (0, 1) alone."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def exact_command(arguments: Sequence[str] | None = None) -> list[str]:
    """The command line as typed, without the folder of the program."""
    return ["fewstep", *(sys.argv[1:] if arguments is None else arguments)]
