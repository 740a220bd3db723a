"""``combine`` on the CPU in C++: combine.cpp, compiled when it is first asked for (``FEWSTEP_KERNELS=native``).

The compiler is ``$CXX`` or ``c++``. The library is kept in ``$FEWSTEP_CACHE`` (``~/.cache/fewstep``), under a name that
tells source, compiler and processor, as it is built for the processor at hand.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .layout import as_line

SOURCE = Path(__file__).with_name("combine.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
MOST = 8
_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def fits(inputs: Sequence[torch.Tensor], coefs: Sequence[Sequence[float]] | torch.Tensor) -> bool:
    """Whether this implementation has the case: one dtype, one dense layout, numbers for the whole batch."""
    if isinstance(coefs, torch.Tensor) and coefs.ndim != 2:
        return False
    dtype = inputs[0].dtype
    if dtype not in _TYPES or len(inputs) > MOST or len(coefs) > MOST:
        return False
    return all(x.dtype is dtype and x.device.type == "cpu" for x in inputs) and as_line(inputs)


def combine(
    inputs: Sequence[torch.Tensor], coefs: Sequence[Sequence[float]] | torch.Tensor
) -> list[torch.Tensor]:
    """See :func:`fewstep.kernels.combine`."""
    rows = coefs.tolist() if isinstance(coefs, torch.Tensor) else coefs
    first = inputs[0]
    outputs = [torch.empty_like(first) for _ in rows]
    n, m = len(inputs), len(outputs)
    sources, results, numbers = _arrays(n, m)
    library().fewstep_combine(
        _TYPES[first.dtype],
        first.numel(),
        n,
        sources(*[x.data_ptr() for x in inputs]),
        m,
        results(*[x.data_ptr() for x in outputs]),
        numbers(*[c for row in rows for c in row]),
        torch.get_num_threads(),
    )
    return outputs


@cache
def _arrays(n: int, m: int) -> tuple[Any, Any, Any]:
    """The types of the arguments; making one takes longer than the call."""
    return ctypes.c_void_p * n, ctypes.c_void_p * m, ctypes.c_double * (n * m)


@cache
def library() -> Any:
    """The compiled library; RuntimeError, with the compiler's words, if it cannot be built."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise RuntimeError(
            "FEWSTEP_KERNELS=native needs a C++ compiler (c++, or the one that CXX names); use 'auto' without one"
        )
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    name = hashlib.sha256(
        "\0".join([SOURCE.read_text(encoding="utf-8"), *FLAGS, version, _processor()]).encode()
    )
    folder = Path(os.environ.get("FEWSTEP_CACHE", "~/.cache/fewstep")).expanduser()
    target = folder / f"combine-{name.hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / target.name
            done = subprocess.run(
                [compiler, *FLAGS, str(SOURCE), "-o", str(built)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"{compiler} could not compile {SOURCE}:\n{done.stderr}")
            built.replace(target)  # in one step: another process may be doing the same
    loaded = ctypes.CDLL(str(target))
    loaded.fewstep_combine.restype = None
    loaded.fewstep_combine.argtypes = [
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int,
    ]
    return loaded


def _processor() -> str:
    """What decides the code that ``-march=native`` gives."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
