"""Fixtures for every test. This file is not at the root, where it would become a module of the package."""

from __future__ import annotations

import sys

import golden_files
import pytest


@pytest.fixture(scope="session")
def golden() -> golden_files.Golden:
    """The golden files of tests/golden, or of the folder that FEWSTEP_GOLDEN names.

    Iterate for the index; ``golden.case(name)`` is one run. ``parametrize`` needs the names before any fixture
    exists: ``golden_files.load().names("unipc")`` after ``import golden_files``.
    """
    return golden_files.load()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run, in whatever order the tests come."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` on a machine without one."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # only for a run that has such tests

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests measured with ``record_property``; a plain print would be lost in a worker process."""
    reports = terminalreporter.getreports("passed")
    measured = [(r.nodeid, *pair) for r in reports for pair in r.user_properties]
    if measured:
        terminalreporter.section("measured")
        for test, name, value in measured:
            terminalreporter.line(f"{name}: {value}  ({test})")
