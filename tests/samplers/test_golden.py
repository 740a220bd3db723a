"""Parity: every golden file of a method that fewstep has is reproduced to the tolerance stated in it."""

from __future__ import annotations

import golden_files
import golden_runs
import numpy as np
import pytest

RUNS = [
    name
    for name in golden_files.load().names()
    if golden_runs.find(golden_files.load().case(name)) is not None
]


def test_there_are_golden_files_for_every_family(golden):
    solvers = {golden_runs.repeat(golden.case(name)).solver for name in RUNS}
    assert solvers >= {"euler", "ddim", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_3m", "unipc", "deis"}


@pytest.mark.parametrize("name", RUNS)
def test_reproduces_the_original(golden, name):
    case = golden.case(name)
    run = golden_runs.repeat(case)
    error = np.abs(golden_runs.execute(case, run) - case[run.expected]).max()
    assert error <= case.tol, f"{name}: {error:.3e} > {case.tol:g}"
