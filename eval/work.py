"""The work itself: one process computes the chunks that are its own.

``python -m fewstep.eval.work FOLDER --rank R --world P`` does chunks R, R + P, ... of every panel in the folder's
plan. A process needs nothing from the others: the converged solution of a chunk is made by the process that needs
it. So any launcher will do, and the folder is the same for any P. Chunks on disk are not computed again.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..hosts.library import sample
from ..samplers import NumericalError, Solver, compile
from ..schedules import TimeGrid, make_grid
from ..tuning import Recipe
from .guiding import Choice, composite, cost, data_dependent
from .metrics import rms_distance, to_uint8
from .store import Chunk, Store
from .sweep import Panel, Plan
from .targets import Target, load_target

KEPT_IMAGES = 64
"""Sample images with an index below this are kept for the report; of the others only the hash."""


class Mismatch(RuntimeError):
    """The evaluations counted at the network are not those of the program: a defect of the library."""


@dataclass(frozen=True)
class Job:
    """One run of one solver over all chunks of a panel."""

    kind: str  # "reference", "check" or "cell"
    key: str
    solver: str
    schedule: str
    steps: int
    guidance: Choice
    most: int = 0
    stochastic: bool = False
    recipe: dict[str, Any] | None = None


def jobs(panel: Panel) -> list[Job]:
    """The jobs of a panel in order: the converged solution first, then cells from few evaluations to many."""
    r = panel.reference
    result = [
        Job("reference", r.key, r.solver, r.schedule, r.steps, r.guidance),
        Job("check", r.check_key, r.solver, r.schedule, r.check_steps, r.guidance),
    ]
    seen = set()
    for cell in sorted(panel.cells, key=lambda c: (c.budget, c.row)):
        if cell.message is None and cell.key not in seen:  # two spacings may name one grid
            seen.add(cell.key)
            row = panel.rows[cell.row]
            how = (
                row.solver,
                row.schedule,
                cell.steps,
                panel.guidance,
                cell.most,
                row.stochastic,
                row.recipe,
            )
            result.append(Job("cell", cell.key, *how))
    return result


def chunks_of(panel: Panel, job: Job, size: int) -> list[Chunk]:
    """The chunks of a job; the second resolution needs only the first samples."""
    from .reference import CHECKED

    parts = panel.chunks(size)
    return [c for c in parts if c.start < CHECKED] if job.kind == "check" else parts


def pending(plan: Plan, store: Store) -> Iterator[tuple[Panel, Job, Chunk]]:
    """What is not on disk yet, in the order of work. A cell that failed is over."""
    for panel, job, chunk in all_work(plan):
        if store.failure(job.key) is None and not store.has(job.key, chunk):
            yield panel, job, chunk


def all_work(plan: Plan) -> Iterator[tuple[Panel, Job, Chunk]]:
    """Every chunk of a plan once: panels whose guidance differs in what it saves only share a converged solution."""
    seen = set()
    for panel in plan.panels:
        for job in jobs(panel):
            if job.key not in seen:
                seen.add(job.key)
                yield from ((panel, job, chunk) for chunk in chunks_of(panel, job, plan.config.chunk))


def work(
    plan: Plan, store: Store, rank: int = 0, world: int = 1, device: str | None = None
) -> Iterator[tuple[Panel, Job, Chunk]]:
    """Do this process's chunks, yielding each when it is on disk. ``device`` overrides the plan's."""
    targets: dict[str, Target] = {}
    for panel, job, chunk in pending(plan, store):
        if chunk.id % world != rank or store.failure(job.key) is not None:
            continue
        if panel.model not in targets:
            targets = {panel.model: _prepared(panel.model, device or plan.config.device)}
        try:
            do_chunk(plan, panel, job, chunk, store, targets[panel.model])
        except NumericalError as error:
            store.save_failure(job.key, str(error))
        yield panel, job, chunk


def _prepared(model: str, device: str) -> Target:
    target = load_target(model).to(device)
    target.probe(2)  # warm-up: the first call allocates and chooses kernels, and is not to be timed
    return target


def do_chunk(plan: Plan, panel: Panel, job: Job, chunk: Chunk, store: Store, target: Target) -> None:
    """Sample one chunk and write what the numbers need of it.

    Written: for the converged solution the samples themselves; for a cell the distance of each sample to it;
    for both the features, the classifier's label, the hash (of the uint8 image; of the numbers where a sample
    is no picture) and the first images.
    """
    indices = list(range(chunk.start, chunk.stop))
    seed = plan.config.seed
    chosen, grid, scale = _solver_and_start(job, target)
    start = scale * target.noise(indices, seed)
    denoiser = target.denoiser(indices)
    began, cpu = time.perf_counter(), time.process_time()
    samples = sample(
        denoiser,
        start,
        chosen,
        sigmas=grid.level,
        guidance=job.guidance,
        seed=[seed + i for i in indices],
    )
    if samples.device.type == "cuda":
        torch.cuda.synchronize(samples.device)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    x = samples.cpu().numpy()
    if not np.isfinite(x).all():
        raise NumericalError(f"{job.solver}: the result is not finite", job.steps, 0.0, job.solver)
    evaluations = compile(chosen, grid).nfe
    expected = job.most or cost(job.guidance) * evaluations
    nfe = denoiser.nfe / len(indices)
    known = not composite(job.guidance) or (job.most and not data_dependent(job.guidance))
    if known and nfe != expected:
        raise Mismatch(f"{job.solver}: {nfe:g} evaluations counted, the program has {expected}")
    arrays: dict[str, np.ndarray] = {}
    if job.kind != "cell":
        arrays["samples"] = x
    elif not job.stochastic and store.failure(panel.reference.key) is None:
        truth, _ = store.load_chunk(panel.reference.key, chunk)
        arrays["distance"] = rms_distance(x, truth["samples"])
    if job.kind != "check":
        images = to_uint8(x) if target.shows_images else x
        arrays["sha256"] = _hash_bytes(images)
        if target.shows_images:
            arrays["images"] = images[: max(0, KEPT_IMAGES - chunk.start)]
        if target.features is not None:
            arrays["features"], arrays["predicted"] = target.features(images)
        if (labels := target.labels(indices)) is not None:
            arrays["label"] = np.asarray(labels, np.int64)
    info = {
        "nfe": int(nfe) if nfe.is_integer() else nfe,
        "calls": evaluations,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "count": len(indices),
    }
    store.save_chunk(job.key, chunk, arrays, info)


def _solver_and_start(job: Job, target: Target) -> tuple[str | Solver, TimeGrid, float]:
    """What steps, where, and what unit noise is multiplied with."""
    schedule = target.noise_schedule
    if job.recipe is None:
        grid = make_grid(schedule, job.steps, job.schedule)
        return job.solver, grid, grid[0].sigma
    recipe = Recipe.from_dict(job.recipe)
    return recipe.solver, recipe.grid(schedule), recipe.init_noise_sigma(schedule)


def _hash_bytes(images: np.ndarray) -> np.ndarray:
    """SHA-256 of each image as 32 bytes, shape (n, 32)."""
    import hashlib

    rows = [
        np.frombuffer(hashlib.sha256(np.ascontiguousarray(i).tobytes()).digest(), np.uint8) for i in images
    ]
    return np.stack(rows)


def main(arguments: list[str] | None = None) -> int:
    """A worker process. It ends when its chunks are done, when it is told to, or when its parent is gone."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.eval.work", description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world", type=int, default=1)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    parent = os.getppid()
    store = Store(options.folder)
    plan = Plan.from_json(store.load_json("run.json")["plan"])
    torch.set_num_threads(plan.config.threads)
    for _, job, chunk in work(plan, store, options.rank, options.world):
        if os.getppid() != parent:
            return 1
        print(say(job, chunk), flush=True)
    return 0


def say(job: Job, chunk: Chunk) -> str:
    """What a worker prints when a chunk is done."""
    return f"{job.key} {chunk.start}"


if __name__ == "__main__":
    sys.exit(main())
