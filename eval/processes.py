"""Runs the work of a plan, in this process or in several, and says what got done."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from .store import Chunk, Store
from .sweep import Panel, Plan
from .work import Job, pending, say, work

Done = tuple[Panel, Job, Chunk]
POLL = 0.2
"""Seconds to wait for the next chunk before the clock is updated."""


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
    said: queue.Queue[str | None] = queue.Queue()
    workers = [Worker(plan, store, rank, processes, said) for rank in range(processes)]
    try:
        yield from _listen(
            {say(job, chunk): (panel, job, chunk) for panel, job, chunk in todo}, said, workers
        )
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.end()


class Worker:
    """A worker process: says on its standard output which chunk is done, and writes its errors to a log."""

    def __init__(
        self, plan: Plan, store: Store, rank: int, world: int, said: queue.Queue[str | None]
    ) -> None:
        self.log = store.folder / f"worker-{rank}.log"
        package = __name__.rpartition(".eval.")[0]
        command = [sys.executable, "-m", f"{package}.eval.work", str(store.folder)]
        command += ["--rank", str(rank), "--world", str(world)]
        with open(self.log, "wb") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(plan, package, rank),
                text=True,
            )
        threading.Thread(target=self._read, args=(said,), daemon=True).start()

    def _read(self, said: queue.Queue[str | None]) -> None:
        for line in self.process.stdout or ():
            said.put(line.strip())
        self.process.wait()
        said.put(None)

    def check(self) -> None:
        """WorkerFailed if the process ended with an error; the message is the last line of its log."""
        if self.process.poll() in (None, 0):
            return
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit status {self.process.returncode}"
        raise WorkerFailed(f"a worker process stopped: {reason} (all of it: {self.log})")

    def end(self) -> None:
        """Wait for the end of the process; an empty log is not kept."""
        self.process.wait()
        if self.log.exists() and self.log.stat().st_size == 0:
            self.log.unlink()


def _listen(
    todo: dict[str, Done], said: queue.Queue[str | None], workers: list[Worker]
) -> Iterator[Done | None]:
    running = len(workers)
    while running:
        try:
            line = said.get(timeout=POLL)
        except queue.Empty:
            yield None
            continue
        if line is None:
            running -= 1
            for worker in workers:
                worker.check()
        elif line in todo:
            yield todo.pop(line)


def _environment(plan: Plan, package: str, rank: int) -> dict[str, str]:
    threads = str(plan.config.threads)
    # The child must find this very package, installed or not.
    root = str(Path(sys.modules[package].__file__ or ".").parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONPATH": path}
    # glibc gives every large block back to the system and takes it anew: a sixth of the time of a small network.
    environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 28))
    environment.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 25))
    if plan.config.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = _visible_device(rank)
    return environment


def _visible_device(rank: int) -> str:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    return devices[rank % len(devices)]
