"""The work on one block: read, check, count; and the counts of all blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.blocks.block import BlockResult
from comir_hpc.errors import VolumeError
from comir_hpc.host.files import written_whole
from comir_hpc.space.grid import Box
from comir_hpc.space.plan import Block, BlockPlan
from comir_hpc.volumes.histogram import Histogram
from comir_hpc.volumes.readers import Source, open_source
from comir_hpc.volumes.volume import Volume

_PROBE = 24  # voxels along each side of the boxes that a typical value is looked for in


@lru_cache(maxsize=1)
def _reopened(path: Path, dataset: str | None) -> Source:
    return open_source(path, dataset)


@dataclass(frozen=True)
class Work:
    """Reads, checks and counts one block; a worker process opens the source itself.

    Parameters
    ----------
    path, dataset
        Path of the source, and the array, series or image in it that is read.
    non_finite : float, optional
        Replaces NaN and infinite voxels, which are refused otherwise.
    source_fingerprint : str
        Fingerprint that the source must still have when it is read.
    centre : float
        Value around which the histograms have their finest bins, in the stored unit.
    histograms : Path
        Folder for the counts of the blocks, beside the ledger: a block that is skipped later keeps its count.
    counted : bool
        Whether values are counted at all (labels are not).
    every : int
        Rows along x are counted where z + y is a multiple of this; the range is that of all voxels.
    source : Source, optional
        The source if this process has opened it already; a worker opens its own.
    """

    path: Path
    dataset: str | None
    non_finite: float | None
    source_fingerprint: str
    centre: float
    histograms: Path
    counted: bool
    every: int
    source: Source | None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "source": None}

    def __call__(self, block: Block) -> BlockResult:
        """Read, check and count the voxels of one block."""
        source = self.source or _reopened(self.path, self.dataset)
        values = _finite(source.read(block.read), block.read, source.path, self.non_finite)
        if len(source.files) <= 2:  # for thousands of slices, once at the end must do
            require_unchanged(source, self.source_fingerprint)
        if self.counted:
            self._store(block.index, [self._count(channel, block.write) for channel in values])
        return BlockResult(values)

    def _count(self, values: NDArray[Any], box: Box) -> Histogram:
        histogram = Histogram(values.dtype, self.centre)
        histogram.add(values, self._rows(values, box))
        return histogram

    def _rows(self, values: NDArray[Any], box: Box) -> NDArray[Any]:
        if self.every == 1:
            return values
        z, y, _ = (np.arange(a, b) for a, b in zip(box.start, box.stop, strict=True))
        # By place in the volume and not in the block, so that the counts do not depend on how the work is cut.
        rows: NDArray[Any] = values[(z[:, None] + y) % self.every == 0]
        return rows

    def _file(self, index: int) -> Path:
        return self.histograms / f"{index}.npz"

    def _store(self, index: int, histograms: list[Histogram]) -> None:
        self.histograms.mkdir(parents=True, exist_ok=True)
        parts = {f"{name}{c}": a for c, h in enumerate(histograms) for name, a in h.record().items()}
        # Whole or not at all: a block with half a count would not be counted again.
        with written_whole(self._file(index)) as spare, spare.open("wb") as file:
            np.savez(file, allow_pickle=False, **parts)

    def total(self, volume: Volume, plan: BlockPlan) -> list[Histogram]:
        """Add up the histograms of the channels over all blocks; a block whose counts are lost is read again."""
        total = [Histogram(volume.dtype, self.centre) for _ in range(volume.num_channels)]
        for block in plan:
            stored = self._stored(block.index)
            values = None if stored else volume.read(block.write)
            for channel, histogram in enumerate(total):
                if stored:
                    histogram.merge({k: stored[f"{k}{channel}"] for k in ("keys", "counts", "range")})
                elif values is not None:
                    histogram.add(values[channel], self._rows(values[channel], block.write))
        return total

    def _stored(self, index: int) -> dict[str, NDArray[Any]] | None:
        file = self._file(index)
        if not file.is_file():
            return None
        with np.load(file, allow_pickle=False) as parts:
            return dict(parts)


def _finite(values: NDArray[Any], box: Box, path: Path, replacement: float | None) -> NDArray[Any]:
    if values.dtype.kind != "f":
        return values
    bad = ~np.isfinite(values)
    count = int(np.count_nonzero(bad))
    if not count:
        return values
    if replacement is None:
        # The first axis is the channel, which a box does not have.
        first = np.argwhere(bad)[0][1:] + box.start
        raise VolumeError(
            f"{path}: {count} voxels of box {box} are NaN or infinite, the first at z, y, x = "
            f"{', '.join(map(str, first))}; give a value for them with --non-finite VALUE, or repair the file"
        )
    return np.where(bad, values.dtype.type(replacement), values)


def require_unchanged(source: Source, before: str) -> None:
    """Refuse a source that is not what it was when the job began.

    Raises
    ------
    VolumeError
        If its fingerprint differs from `before`.
    """
    if source.fingerprint() != before:
        raise VolumeError(
            f"{source.path} changed while it was read (size or time); run the same command again when nothing writes "
            "to it any more"
        )


def typical_value(source: Source) -> float:
    """Return the median over nine small boxes; there the bins of wide types are finest."""
    if source.dtype.itemsize <= 2:
        return 0.0
    pieces = []
    for share in (0.25, 0.5, 0.75):
        for across in (0.25, 0.5, 0.75):
            middle = [int(n * s) for n, s in zip(source.shape_zyx, (share, across, 0.5), strict=True)]
            start = tuple(max(0, m - _PROBE // 2) for m in middle)
            stop = tuple(min(n, a + _PROBE) for n, a in zip(source.shape_zyx, start, strict=True))
            # NaN and infinity are refused or replaced later, with their number. Here they would only spoil the
            # median.
            values = source.read(Box(start, stop)).astype(np.float64)  # type: ignore[arg-type]
            pieces.append(values[np.isfinite(values)])
    found = np.concatenate(pieces)
    return float(np.float32(np.median(found))) if found.size else 0.0
