"""Runs the work of a plan, in this process or in several, and says what got done."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from .store import Chunk, Store
from .sweep import Panel, Plan
from .work import Job, pending, work

Done = tuple[Panel, Job, Chunk]
POLL = 0.1
"""Seconds between two looks at the folder."""


class WorkerFailed(RuntimeError):
    """A worker process ended with an error; the message is the end of its log."""


def default_processes(plan: Plan) -> int:
    """One process a GPU; on the CPU one a core up to 8, and never more than there are chunks.

    Small networks gain nothing from several threads in one process, and one thread each makes the numbers the same
    for any number of processes.
    """
    most = max(len(p.chunks(plan.config.chunk)) for p in plan.panels)
    if plan.config.device.startswith("cuda"):
        return max(1, min(torch.cuda.device_count() if plan.config.device == "cuda" else 1, most))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // plan.config.threads, most, 8))


def run(plan: Plan, store: Store, processes: int) -> Iterator[Done | None]:
    """Do everything that is pending; yields each finished chunk, and None now and then while waiting.

    Leaving the loop (an exception, Ctrl-C) ends the worker processes. What they have written stays.
    """
    todo = list(pending(plan, store))
    if not todo:
        return
    if processes <= 1:
        before = torch.get_num_threads()
        torch.set_num_threads(plan.config.threads)
        try:
            yield from work(plan, store)
        finally:
            torch.set_num_threads(before)
        return
    workers = [_start(plan, store, rank, processes) for rank in range(processes)]
    try:
        yield from _watch(todo, store, workers)
    finally:
        for worker, _ in workers:
            worker.terminate()
        for worker, log in workers:
            worker.wait()
            if log.exists() and log.stat().st_size == 0:
                log.unlink()


def _start(plan: Plan, store: Store, rank: int, world: int) -> tuple[subprocess.Popen[bytes], Path]:
    log = store.folder / f"worker-{rank}.log"
    threads = str(plan.config.threads)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONUNBUFFERED": "1",
    }
    # The child must find this very package, installed or not.
    package = __name__.rpartition(".eval.")[0]
    root = str(Path(sys.modules[package].__file__ or ".").parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    if plan.config.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = _visible_device(rank)
    command = [
        sys.executable,
        "-m",
        f"{package}.eval.work",
        str(store.folder),
        "--rank",
        str(rank),
        "--world",
        str(world),
    ]
    with open(log, "wb") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        ), log


def _visible_device(rank: int) -> str:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    return devices[rank % len(devices)]


def _watch(
    todo: list[Done], store: Store, workers: list[tuple[subprocess.Popen[bytes], Path]]
) -> Iterator[Done | None]:
    while todo:
        running = [w.poll() for w, _ in workers]
        left = []
        for item in todo:
            _, job, chunk = item
            if store.has(job.key, chunk) or store.failure(job.key) is not None:
                yield item
            else:
                left.append(item)
        todo = left
        for (_, log), code in zip(workers, running):
            if code not in (None, 0):
                raise WorkerFailed(_last_words(log, code))
        if todo and all(code == 0 for code in running):
            raise WorkerFailed(f"all workers ended but {len(todo)} chunks are missing")
        yield None
        if todo:
            time.sleep(POLL)


def _last_words(log: Path, code: int | None) -> str:
    lines = (
        [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if log.exists()
        else []
    )
    reason = lines[-1].strip() if lines else f"exit status {code}"
    return f"a worker process stopped: {reason} (all of it: {log})"
