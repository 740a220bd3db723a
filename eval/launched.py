"""Under ``accelerate launch`` or ``torchrun``: every rank does its own chunks, rank 0 shows and writes the results.

There is one barrier, when the plan is on disk, and no communication inside the work: rank 0 sees in the shared folder
when the others are done.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from .processes import Done
from .store import Store
from .sweep import Plan
from .work import pending, work


@dataclass(frozen=True)
class Group:
    """The processes of a launcher; a single one without."""

    rank: int = 0
    world: int = 1
    state: Any = field(default=None, repr=False)

    def wait(self) -> None:
        """Until every rank is here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def device(self, asked: str) -> str:
        """``cuda`` means the launcher's device of this rank."""
        return str(self.state.device) if self.state is not None and asked == "cuda" else asked

    def work(self, plan: Plan, store: Store) -> None:
        """Do the share of this rank."""
        for _ in work(plan, store, self.rank, self.world, self.device(plan.config.device)):
            pass

    def run(self, plan: Plan, store: Store) -> Iterator[Done | None]:
        """Rank 0's share, then whatever the others finish; yields as :func:`fewstep.eval.processes.run` does."""
        todo = list(pending(plan, store))
        own = work(plan, store, self.rank, self.world, self.device(plan.config.device))
        while todo:
            if next(own, None) is None:
                time.sleep(1.0)
            left: list[Done] = []
            for item in todo:
                _, job, chunk = item
                if store.has(job.key, chunk) or store.failure(job.key) is not None:
                    yield item
                else:
                    left.append(item)
            todo = left
            yield None


def group() -> Group:
    """The group that the environment names (``RANK``, ``WORLD_SIZE``)."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Group()
    import torch
    from accelerate import PartialState

    accelerator = getattr(torch, "accelerator", torch.cuda)  # torch.accelerator is of 2.6
    # Without an accelerator every rank would take itself for the only process, unless told to be on the CPU.
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not accelerator.is_available()
    # Ranks meet only at the start, but one may load its model for long.
    state = PartialState(cpu=cpu, timeout=timedelta(hours=2))
    return Group(state.process_index, state.num_processes, state)
