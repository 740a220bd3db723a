"""What a result has to carry to be comparable: configuration, exact command, versions, machine."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .store import FORMAT, Store
from .sweep import Plan


def record(plan: Plan, store: Store, processes: int, command: Sequence[str]) -> dict[str, Any]:
    """The contents of ``run.json`` at the start of a run; where the folder holds the same plan, its time goes on."""
    before: Mapping[str, Any] = {}
    if (store.folder / "run.json").exists():
        before = store.load_json("run.json")
    same = before.get("plan", {}).get("panels") == _plain(plan)["panels"]
    return {
        "format": FORMAT,
        "command": shlex.join(command),
        "started": before.get("started") if same else now(),
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

    return json.loads(json.dumps(plan.to_json()))


def now() -> str:
    """Time in UTC, to the second."""
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


def exact_command(arguments: Sequence[str] | None = None) -> list[str]:
    """The command line as typed, without the folder of the program."""
    return ["fewstep", *(sys.argv[1:] if arguments is None else arguments)]
