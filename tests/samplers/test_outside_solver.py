"""A solver from another package: one function and an entry point, and everything knows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """An installed package whose entry point names the example of docs/adding-a-solver.md."""
    site = tmp_path_factory.mktemp("site")
    text = (ROOT / "docs" / "adding-a-solver.md").read_text(encoding="utf-8")
    (site / "outside_solvers.py").write_text(text.split("```python\n")[1].split("```")[0], encoding="utf-8")
    info = site / "outside_solvers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: outside-solvers\nVersion: 1.0\n", encoding="utf-8"
    )
    (info / "entry_points.txt").write_text("[fewstep.solvers]\nmine = outside_solvers\n", encoding="utf-8")
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    return {**os.environ, "PYTHONPATH": path}


def run(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_command_line_lists_and_explains_it(environment):
    listed = json.loads(run(environment, "-m", "fewstep.eval", "list", "solvers", "--json"))
    assert "two_stage" in [row["name"] for row in (listed["solvers"] if isinstance(listed, dict) else listed)]
    facts = json.loads(run(environment, "-m", "fewstep.eval", "explain", "two_stage:r=0.6", "--json"))
    assert facts["order"] == 2 and facts["evaluations_per_step"] == 2


def test_the_scheduler_runs_it(environment):
    pytest.importorskip("diffusers")
    code = (
        "from diffusers import EulerDiscreteScheduler; from fewstep import FewStepScheduler\n"
        "s = FewStepScheduler.from_config(EulerDiscreteScheduler().config, solver='two_stage:r=0.6')\n"
        "s.set_timesteps(4); print(len(s.timesteps))"
    )
    assert run(environment, "-c", code).split()[-1] == "7"


def test_the_generated_suite_covers_it(environment):
    suite = (
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "samplers/test_every_solver.py",
        "-k",
        "two_stage",
    )
    output = run(environment, *suite)
    passed = int(output.split(" passed")[0].split()[-1])
    assert passed > 20
