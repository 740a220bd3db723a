"""The results folder of ``fewstep eval``: what is on disk, written so that a kill at any moment loses nothing.

::

    run.json                    resolved configuration, exact command, versions, host
    chunks/<key>/<a>-<b>.safetensors   one chunk: the samples with indices a <= i < b of one cell or reference
    chunks/<key>/failed.json    the cell stopped with a numerical error: message
    cells.jsonl                 one line a cell: numbers with intervals
    samples.jsonl               one line a sample: cell, index, seed, label, SHA-256 of its uint8 image
    metrics.json                the whole result: run, panels, cells, footnotes
    report.html                 the report

A chunk is the unit of resuming and of sharing work: it depends on its indices and on the configuration hashed
into ``key``, on nothing else, so processes that each write their own chunks give the same folder as one process
that writes all. Every file appears by rename of a finished temporary file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
"""Version of the folder's layout, in run.json and in every key: a change makes old chunks unknown, not wrong."""


def canonical(value: Any) -> str:
    """JSON text with sorted keys and no spaces: equal values give equal text, the base of every hash."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: Any, length: int = 12) -> str:
    """First ``length`` hexadecimal digits of the SHA-256 of :func:`canonical` (value)."""
    return hashlib.sha256(canonical({"format": FORMAT, "value": value}).encode()).hexdigest()[:length]


def image_hashes(images: NDArray[np.uint8]) -> list[str]:
    """SHA-256 of each image's bytes; ``images`` has shape (n, ...)."""
    return [hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest() for image in images]


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part: temporary file, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class Chunk:
    """Consecutive indices start <= i < stop; ``id`` decides which process works on it."""

    id: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def name(self) -> str:
        return f"{self.start:06d}-{self.stop:06d}.safetensors"


def chunks(samples: int, size: int) -> list[Chunk]:
    """Cut 0..samples into chunks of ``size``; the last may be shorter."""
    return [Chunk(i, a, min(a + size, samples)) for i, a in enumerate(range(0, samples, size))]


class Store:
    """One results folder."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def prepare(self) -> None:
        """Create the folder and prove it writable; raise ValueError with the reason otherwise."""
        try:
            (self.folder / "chunks").mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".write-test-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            reason = error.strerror or str(error)
            raise ValueError(f"cannot write to the results folder {self.folder}: {reason}") from None

    def tidy(self) -> None:
        """Remove temporary files and logs that a killed run left behind."""
        for stray in [
            *self.folder.glob(".*.tmp"),
            *self.folder.glob("chunks/*/.*.tmp"),
            *self.folder.glob("worker-*.log"),
        ]:
            stray.unlink(missing_ok=True)

    # chunks -----------------------------------------------------------------------------------------------------

    def chunk_path(self, key: str, chunk: Chunk) -> Path:
        return self.folder / "chunks" / key / chunk.name

    def has(self, key: str, chunk: Chunk) -> bool:
        return self.chunk_path(key, chunk).exists()

    def save_chunk(
        self, key: str, chunk: Chunk, arrays: Mapping[str, np.ndarray], info: Mapping[str, Any]
    ) -> None:
        """Write arrays (first axis: the samples) and a small dictionary of facts (counts, seconds)."""
        self.save_arrays(f"chunks/{key}/{chunk.name}", arrays, info)

    def load_chunk(self, key: str, chunk: Chunk) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays and facts of one chunk."""
        return self.load_arrays(f"chunks/{key}/{chunk.name}")

    def save_arrays(self, name: str, arrays: Mapping[str, np.ndarray], info: Mapping[str, Any]) -> None:
        """Write arrays and facts to a file of the folder."""
        from safetensors.numpy import save

        # One metadata entry only: the order of several is not kept by the format, and equal chunks should be
        # equal bytes.
        data = save(
            {k: np.ascontiguousarray(v) for k, v in arrays.items()}, metadata={"info": canonical(dict(info))}
        )
        write_atomically(self.folder / name, data)

    def load_arrays(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays and facts of a file. A damaged one is removed and reported, so that the next run makes it again."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / name
        try:
            with safe_open(path, framework="numpy") as file:
                info = json.loads((file.metadata() or {})["info"])
                return {key: file.get_tensor(key) for key in file.keys()}, info
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            path.unlink(missing_ok=True)
            raise ValueError(
                f"{path} was damaged ({error}); it is removed, run the same command again"
            ) from None

    def load_chunks(
        self, key: str, parts: Iterable[Chunk]
    ) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
        """Several chunks joined in the order given: the same result whoever wrote them."""
        loaded = [self.load_chunk(key, part) for part in parts]
        names = [n for n in loaded[0][0] if all(n in arrays for arrays, _ in loaded)]
        return {n: np.concatenate([arrays[n] for arrays, _ in loaded]) for n in names}, [
            info for _, info in loaded
        ]

    # failures ---------------------------------------------------------------------------------------------------

    def save_failure(self, key: str, message: str) -> None:
        write_atomically(self.folder / "chunks" / key / "failed.json", canonical({"message": message}))

    def failure(self, key: str) -> str | None:
        path = self.folder / "chunks" / key / "failed.json"
        return json.loads(path.read_text())["message"] if path.exists() else None

    # records ----------------------------------------------------------------------------------------------------

    def save_json(self, name: str, value: Any) -> None:
        write_atomically(self.folder / name, json.dumps(value, indent=1, allow_nan=False) + "\n")

    def load_json(self, name: str) -> Any:
        """A record by its file name; ValueError where the folder is not a results folder."""
        path = self.folder / name
        if not path.exists():
            raise ValueError(f"{self.folder} is not a results folder of `fewstep eval`: {name} is missing")
        return json.loads(path.read_text())

    def save_text(self, name: str, text: str) -> None:
        write_atomically(self.folder / name, text)

    def save_lines(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        write_atomically(self.folder / name, "".join(canonical(dict(row)) + "\n" for row in rows))

    def append_line(self, name: str, row: Mapping[str, Any]) -> None:
        """One more line; a line is short enough that the system writes it whole."""
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(canonical(dict(row)) + "\n")

    def load_lines(self, name: str) -> Iterator[dict[str, Any]]:
        """Lines of a record file; a last line cut by a kill is left out."""
        path = self.folder / name
        if not path.exists():
            return
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return
