"""Fixtures that every test may use. It stands here and not at the root, where it would become a module of the package."""

from __future__ import annotations

import importlib.util

import golden_files
import pytest


@pytest.fixture(scope="session")
def golden() -> golden_files.Golden:
    """The golden files (tests/golden, or the folder named by FEWSTEP_GOLDEN): iterate for the index, ``.case(name)`` for one run.

    For ``parametrize``, which needs the names before any fixture exists: ``import golden_files; golden_files.load().names("unipc")``.
    """
    return golden_files.load()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` on a machine without one. torch is not even imported for a run that has no such test."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked or (importlib.util.find_spec("torch") and _cuda()):
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
