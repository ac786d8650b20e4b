"""Sizes that a file claims, held against what is stored in it, before anything is allocated or read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comir_hpc.errors import VolumeError
from comir_hpc.host.memory import available_bytes, in_words

BELIEVED_BYTES = 1 << 30
"""A volume up to this size is read whatever it stores: it takes seconds."""
CHUNKS_PER_STORED_ONE = 100_000
"""Chunks that may be left out for each one that is stored."""


def require_credible(
    path: Path,
    shape: Sequence[int],
    dtype: np.dtype[np.generic],
    chunk: Sequence[int],
    num_stored: Callable[[int], int],
) -> None:
    """Refuse an array whose size cannot be that of a real volume.

    The rule: chunks without a value need not be stored, so a real volume may store few of them. But an array above
    1 GiB must store at least one chunk in 100,000, and a chunk must fit into memory. A damaged or crafted header
    that claims 10^5 voxels a side or more fails this, and nothing is allocated to find out.

    Parameters
    ----------
    shape, chunk : sequence of int
        Shape of the array, and of what is stored in one piece, in the order of the file.
    num_stored : callable
        Function that counts the stored chunks. It gets a number, at which it may stop counting.

    Raises
    ------
    VolumeError
        If it claims too much; the message has what is claimed and what was found.
    """
    sides = " x ".join(map(str, shape))
    claimed = math.prod(shape) * dtype.itemsize
    chunk_bytes = math.prod(max(1, c) for c in chunk) * dtype.itemsize
    allowed = available_bytes()
    # A chunk is decoded as a whole, however small the box is that is read.
    if chunk_bytes > max(allowed, BELIEVED_BYTES):
        raise VolumeError(
            f"{path} says that it holds {sides} voxels in chunks of {_size(chunk_bytes)}, and {in_words(allowed)} "
            "of memory are free; check its header, or store it in smaller chunks"
        )
    if claimed <= BELIEVED_BYTES:
        return
    num_chunks = math.prod(-(-n // max(1, c)) for n, c in zip(shape, chunk, strict=True))
    needed = -(-num_chunks // CHUNKS_PER_STORED_ONE)
    found = num_stored(needed)
    if found < needed:
        raise VolumeError(
            f"{path} says that it holds {sides} voxels ({_size(claimed)}), and stores {found} of its "
            f"{num_chunks} chunks; expected at least {needed}: its header is damaged or nothing was written to it"
        )


def require_credible_dataset(path: Path, dataset: Any) -> None:
    """Refuse an HDF5 dataset that claims more than is stored, by the rule of `require_credible`.

    Parameters
    ----------
    dataset : h5py.Dataset
        One that is made of parts in other files stores nothing itself and is not judged.

    Raises
    ------
    VolumeError
        If it claims too much; the message has what is claimed and what was found.
    """
    if dataset.is_virtual:
        return
    stored = int(dataset.id.get_num_chunks()) if dataset.chunks else 0
    if dataset.chunks:
        require_credible(path, dataset.shape, dataset.dtype, dataset.chunks, lambda _: stored)
    elif not dataset.id.get_storage_size():  # one piece, there as a whole or not at all
        require_credible(path, dataset.shape, dataset.dtype, (1,) * dataset.ndim, lambda _: 0)


def require_credible_bytes(
    path: Path, shape: Sequence[int], dtype: np.dtype[np.generic], stored_bytes: int
) -> None:
    """Refuse an array above 1 GiB that claims more than 100,000 times the bytes that its files have.

    No image compresses that well: this is for formats that do not tell how many of their chunks are stored.

    Raises
    ------
    VolumeError
        If it claims too much; the message has both sizes.
    """
    claimed = math.prod(shape) * dtype.itemsize
    if claimed > BELIEVED_BYTES and claimed > CHUNKS_PER_STORED_ONE * stored_bytes:
        raise VolumeError(
            f"{path} says that it holds {' x '.join(map(str, shape))} voxels ({_size(claimed)}) and has "
            f"{in_words(stored_bytes)}; its header is damaged: copy or export it again"
        )


def _size(num_bytes: int) -> str:
    """Return a number of bytes in words, also for sizes that no machine has, as a power of ten."""
    return in_words(num_bytes) if num_bytes < 1 << 50 else f"{num_bytes:.0e} bytes"
