"""What a run was expected to need, beside what it needed."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from comir_hpc.blocks.ledger import Ledger
from comir_hpc.host.memory import expected_peak, in_words

_STARTER_BYTES = (
    16 << 20
)  # measured: the small process that multiprocessing keeps beside workers takes 10 to 13 MiB
_PACKED = (
    1.3  # bytes of a block while it is packed: they hardly grow, and level 1 of the pyramid is an eighth
)
_FLUSHES = 16  # tried when the disk's speed is asked for
_BLOCK_SECONDS = 0.008  # measured: what recording a block and its level 1 takes besides flushes
_STORE_SECONDS = 0.4  # measured: what making and closing a store takes besides, and loading what that needs


@dataclass(frozen=True)
class Figures:
    """Predicted or measured needs of one call.

    Prediction and measurement have the same fields, so that they can be put side by side.

    Parameters
    ----------
    blocks : int
        Number of blocks that the call computes.
    seconds : float or None
        Wall clock; None where a calibration would take longer than the work.
    peak_bytes : int
        Most memory that the largest process holds, in bytes.
    num_bytes, files : int or None
        Bytes and files of the whole store, at most; None while other parts are missing.
    """

    blocks: int
    seconds: float | None
    peak_bytes: int
    num_bytes: int | None
    files: int | None

    def record(self) -> dict[str, Any]:
        """Return the figures as a JSON-ready mapping."""
        return {k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(self).items()}


def writing_bytes(block_bytes: int, blocks: int) -> int:
    """Return the bytes for the voxels of blocks on their way to the disk.

    One block is packed and written while the next one is made. Of a single block only the packed form comes on top.
    """
    return int((1 + _PACKED + (blocks > 1)) * block_bytes)


def together(process_bytes: int, workers: int, more: int) -> int:
    """Return the bytes of all processes of a call.

    With one worker this is the only process. Otherwise it is the workers, this process and the one that starts them.

    Parameters
    ----------
    process_bytes : int
        Memory of a process that does blocks, in bytes.
    more : int
        Bytes that this process takes besides what it holds now.
    """
    if workers == 1:
        return process_bytes
    return workers * process_bytes + expected_peak(more) + _STARTER_BYTES


def about_seconds(seconds: float) -> str:
    """Write seconds that were predicted from a short trial: other work on the machine makes more of them."""
    return f"about {seconds:.1f} s"


def recording_seconds(out: Path, blocks: int, files: float) -> float:
    """Return the seconds that a job spends on its store and on recording its blocks; no bound, unlike memory.

    Every shard is flushed to the disk, then its folder, and two lines of the ledger for each block. How long that takes
    differs a hundredfold between file systems, so a few flushes are tried where the output will be.

    Parameters
    ----------
    out : Path
        Path of the output, which need not exist yet.
    blocks : int
        Number of blocks that are computed.
    files : float
        Number of files that they are stored in, the pyramid's among them.
    """
    return _STORE_SECONDS + blocks * _BLOCK_SECONDS + 2 * (blocks + files) * _flush_seconds(out)


def _flush_seconds(out: Path) -> float:
    """Measure the mean seconds of a flush on the file system of an output; 0 where nothing may be written."""
    folder = next((parent for parent in out.absolute().parents if parent.is_dir()), Path())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            for _ in range(_FLUSHES):
                # A page, flushed like a line of the ledger: what counts is the flush, not the bytes.
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
            return (time.perf_counter() - start) / _FLUSHES
    except OSError:
        return 0.0


def measured(store: Path, ledger: Ledger, *, blocks: int, seconds: float, complete: bool) -> Figures:
    """Collect what one call needed: memory from the blocks' notes, size from the store."""
    found = (note.get("peak_mib") for _, note in ledger.notes())
    peak = max((mib << 20 for mib in found if type(mib) is int and mib >= 0), default=0)
    sizes = [f.stat().st_size for f in store.rglob("*") if f.is_file()] if complete else None
    num_bytes, files = (None, None) if sizes is None else (sum(sizes), len(sizes))
    return Figures(blocks, seconds, peak, num_bytes, files)


def side_by_side(predicted: Figures, actual: Figures) -> str:
    """Return one line for the end of a run, with what was predicted beside what was measured."""
    expected = "" if predicted.seconds is None else f" ({about_seconds(predicted.seconds)} expected)"
    text = f"{actual.blocks} blocks ({predicted.blocks} expected) in {actual.seconds:.1f} s{expected}"
    if actual.peak_bytes:
        text += (
            f", peak memory {in_words(actual.peak_bytes)} (at most {in_words(predicted.peak_bytes)} expected)"
        )
    if actual.num_bytes is not None and predicted.num_bytes is not None:
        text += (
            f", {in_words(actual.num_bytes)} in {actual.files} files (at most {in_words(predicted.num_bytes)} in "
            f"{predicted.files} expected)"
        )
    return text
