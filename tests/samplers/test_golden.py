"""Parity: every golden file of a method that fewstep has is reproduced to the tolerance stated in it."""

from __future__ import annotations

import os

import golden_files
import golden_runs
import numpy as np
import parity_table
import pytest

RUNS = [
    name
    for name in golden_files.load().names()
    if golden_runs.find(golden_files.load().case(name)) is not None
]


def test_there_are_golden_files_for_every_family(golden):
    solvers = {str(golden_runs.repeat(golden.case(name)).solver) for name in RUNS}
    assert solvers >= {"euler", "ddim", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_3m", "unipc", "deis"}


@pytest.mark.parametrize("name", RUNS)
def test_reproduces_the_original(golden, name):
    case = golden.case(name)
    first = golden_runs.repeat(case)
    for run in (first, *first.also):
        error = np.abs(golden_runs.execute(case, run) - case[run.expected]).max()
        assert error <= case.tol, f"{name} by {run.solver} {run.options}: {error:.3e} > {case.tol:g}"


own = pytest.mark.skipif("FEWSTEP_GOLDEN" in os.environ, reason="of the files of the repository")


@own
def test_nothing_is_left_out_without_a_reason():
    assert sum(map(len, golden_runs.not_repeated().values())) + len(RUNS) == len(golden_files.load())


@own
def test_the_page_of_results_is_current():
    """docs/parity.md names every file with its tolerance; errors are rounding and differ between machines."""
    without_error = [
        line.rsplit("|", 2)[0] for line in parity_table.PAGE.read_text(encoding="utf-8").splitlines()
    ]
    assert without_error == [line.rsplit("|", 2)[0] for line in parity_table.page().splitlines()]
