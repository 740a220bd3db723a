"""One call of ``fewstep eval``: plan, folder, work with a live table, results."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from . import launched
from .live import show
from .processes import default_processes, run
from .record import now, record
from .store import Store
from .summary import write
from .sweep import Config, Plan, expand
from .targets import load_target

RESULTS = Path("fewstep-results")
NEAREST_OF = 1500
"""Reference images whose features are kept, for precision and recall."""


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
) -> tuple[dict[str, Any] | None, Store]:
    """Do the whole run and return the contents of ``metrics.json`` with the folder (None on the ranks above 0 of a
    launcher such as ``accelerate launch``, which only do their share).

    Raises:
        ValueError: a mistake in the configuration or a folder that cannot be written, before any work.
        Interrupted: after Ctrl-C or SIGTERM.
    """
    group = launched.group()
    if group.rank > 0:
        console = Console(quiet=True)
    with _quiet_threads(config.threads), _status(console, "loading models"):
        plan = expand(config)
    store = Store(out or default_folder(plan))
    count = group.world if group.world > 1 else processes or default_processes(plan)
    if group.rank > 0:
        group.wait()
        group.work(plan, store)
        return None, store
    store.prepare()
    store.tidy()
    facts = record(plan, store, count, command)
    store.save_json("run.json", facts)
    _announce(plan, store, console, count)
    _write_reference_features(plan, store)
    group.wait()
    began = time.perf_counter()

    def finish(done: bool) -> dict[str, Any]:
        facts["seconds"] = (facts["seconds"] or 0.0) + time.perf_counter() - began
        facts["finished"] = now() if done else None
        store.save_json("run.json", facts)
        return write(store, facts)

    with _stoppable():
        try:
            show(
                plan, store, console, run(plan, store, count) if group.world == 1 else group.run(plan, store)
            )
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
    """The reference images' features, their mean and covariance, once a folder."""
    from .metrics import Moments

    for panel in plan.panels:
        name = f"reference-{panel.features}.safetensors"
        if panel.features is None or (store.folder / name).exists():
            continue
        features = load_target(panel.model).features
        assert features is not None
        values = features(features.reference_images())[0]
        moments = Moments.of(values)
        labels = load_target(panel.model).labels(range(len(values)))
        kept = values[:NEAREST_OF]
        arrays = {"mean": moments.mean, "covariance": moments.covariance, "features": kept}
        if labels is not None:
            arrays["label"] = labels[:NEAREST_OF].astype(np.int64)
        store.save_arrays(name, arrays, {"count": moments.count})


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
    for warning in dict.fromkeys(w for p in plan.panels for w in p.warnings):
        console.print(f"[yellow]warning:[/yellow] {warning}")
