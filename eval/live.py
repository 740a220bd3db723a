"""The table that fills while ``fewstep eval`` runs, with the time left; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from .processes import Done
from .store import Store
from .summary import Summary
from .sweep import Panel, Plan
from .table import metric_table, result_tables
from .words import half_width, number
from .work import Job, all_work, pending


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


def show(plan: Plan, store: Store, console: Console, source: Iterator[Done | None]) -> None:
    """Draw from ``source`` (which does the work) to its end, showing the table as it fills."""
    board = _Board(plan, store)
    for panel in board.finished():
        console.print(result_tables(panel, console.width))
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28, complete_style="cyan", finished_style="cyan"),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[left]}"),
        console=console,
    )
    total = sum(_weight(plan, p, j, len(c)) for p, j, c in all_work(plan))
    left = sum(_weight(plan, p, j, len(c)) for p, j, c in pending(plan, store))
    if not left:
        return
    task = progress.add_task("starting", total=total, completed=0, left="")
    progress.advance(task, total - left)
    began, done_before = time.monotonic(), total - left

    def view() -> RenderableType:
        if board.shown >= len(board.panels):
            return progress
        panel = board.panels[board.shown]
        noisy = all(row["stochastic"] for row in panel["rows"])
        return Group(metric_table(panel, "frechet" if noisy else "rms"), Text(), progress)

    live = (
        Live(view(), console=console, refresh_per_second=8, transient=True) if console.is_terminal else None
    )
    with live or nullcontext():
        for done in source:
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
                console.print(result_tables(finished, console.width))
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
