"""``FewStepScheduler`` for diffusers pipelines, loaded with diffusers itself when it is first asked for.

A saved pipeline names the module of its scheduler's class, and diffusers resolves that name among the modules that
are already imported. So this module is imported with the package, and is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .lazy import loaded

if TYPE_CHECKING:
    from .diffusers_scheduler import FewStepScheduler, FewStepSchedulerOutput

__all__ = ["FewStepScheduler", "FewStepSchedulerOutput"]

# diffusers finds the loading method of a class by the base classes that its module shows.
_SHOWN = {*__all__, "SchedulerMixin"}


def __getattr__(name: str) -> Any:
    return loaded(f"{__package__}.diffusers_scheduler", __name__, _SHOWN, name)
