"""Voxels of one array on disk, in and out through TensorStore.

zarr-python makes the arrays and keeps their metadata; the voxels pass through TensorStore, which compresses in C++
on several threads and decodes into place. What was measured is in docs/architecture.md, "Libraries".

A shard file appears under its name by a rename, so nobody meets half of one. It is not flushed to the disk here: who
needs that (the ledger) does it, and knows when.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from numpy.typing import NDArray

_OS_ERROR = re.compile(r"os_error_code='(\d+)'")
# What an interrupted writer leaves behind beside a file: NAME_<random>.__lock
_UNFINISHED = "_*.__lock"


class Shards:
    """Reads and writes boxes of one zarr v3 array.

    Cheap to make and to pickle: the array is opened when it is first used, in each process anew. May be used by
    several threads.

    Parameters
    ----------
    path : Path
        Folder of the array, which exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()  # TensorStore refuses ".." within a path
        self._store: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_store": None}

    def read(self, place: tuple[slice, ...]) -> NDArray[Any]:
        """Read the values inside half-open slices, one for each axis.

        Raises
        ------
        OSError
            If the file system refuses.
        ValueError
            If a shard is damaged.
        """
        try:
            return np.asarray(self._opened()[place].read().result())
        except ValueError as error:
            raise _translated(error, self.path) from error

    def write(self, place: tuple[slice, ...], values: NDArray[Any]) -> None:
        """Write values of the array's dtype into slices that hold whole shards.

        Raises
        ------
        OSError
            If the disk is full or the file system refuses.
        """
        try:
            # We wait for the end: no copy of the values is needed meanwhile.
            self._opened()[place].write(values, can_reference_source_data_indefinitely=True).result()
        except ValueError as error:
            raise _translated(error, self.path) from error

    def _opened(self) -> Any:
        if self._store is None:
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{self.path}/"}}
            self._store = tensorstore.open(spec, open=True, context=_context(num_threads())).result()
        return self._store


def remove_unfinished(path: Path) -> None:
    """Unlink what a killed writer left of a shard file under a temporary name."""
    for spare in path.parent.glob(path.name + _UNFINISHED):
        spare.unlink(missing_ok=True)


def num_threads() -> int:
    """Return the number of threads for compression.

    This is OMP_NUM_THREADS where it is set, as batch jobs do, or the cores that this process may use.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(maxsize=1)
def _context(threads: int) -> Any:
    return tensorstore.Context(
        {
            "data_copy_concurrency": {"limit": threads},
            # No cache: every block is read once, and its memory would not be in any prediction.
            "cache_pool": {"total_bytes_limit": 0},
            "file_io_sync": False,
            # A shard has one writer at any time (the ledger), and not every cluster's file system has locks.
            "file_io_locking": {"mode": "none"},
        }
    )


def _translated(error: ValueError, path: Path) -> Exception:
    """Turn TensorStore's status into the error that Python raises for the same cause."""
    found = _OS_ERROR.search(str(error))
    if found is None:
        return error
    number = int(found[1])
    return OSError(number, os.strerror(number), str(path))


def cause_of(error: Exception) -> str:
    """Say what TensorStore complains of, without the path and without the places in its own source."""
    text = " ".join(str(error).split(" [source", 1)[0].split())
    return text.rsplit('": ', 1)[-1][:120].strip() or type(error).__name__
