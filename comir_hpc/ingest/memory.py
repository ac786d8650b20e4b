"""What an ingest takes of memory: an upper bound, from sizes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from comir_hpc.blocks.cost import together, writing_bytes
from comir_hpc.config.ingest import IngestSettings
from comir_hpc.host.memory import expected_in_worker, expected_peak
from comir_hpc.space.plan import BlockPlan
from comir_hpc.volumes.histogram import counting_bytes
from comir_hpc.volumes.padding import filter_bytes
from comir_hpc.volumes.readers import Source

# Measured: 10 to 20 MiB are loaded once an ingest begins, buffers of compression among them.
_LIBRARY_BYTES = 24 << 20
# What glibc keeps of the bytes that were freed: its largest threshold for trimming the heap.
_KEPT_FREED = 64 << 20


@dataclass(frozen=True)
class Memory:
    """The memory for a source that is written in these blocks by so many processes."""

    source: Source
    blocks: BlockPlan
    settings: IngestSettings
    workers: int

    def peak_bytes(self) -> int:
        """Predict the memory of all processes, in bytes."""
        largest, second = self._largest_two()
        more = _LIBRARY_BYTES + self._filter_bytes() + largest
        # One process has the largest block, and none of the others a larger one than the second.
        smaller = (self.workers - 1) * (self._alone_bytes(largest) - self._alone_bytes(second))
        return together(self.process_bytes(), self.workers, more) - smaller

    def process_bytes(self) -> int:
        """Predict the bytes of a process that does blocks, with what it holds already."""
        held, working = self.source.load_bytes, self._working_bytes()
        if self.workers > 1:  # what they load is in the heap that such a process was measured to have
            return expected_in_worker(held + working)
        # Padding is looked for when the last block is written. Of what blocks took, little is kept by then.
        at_end = min(working, _KEPT_FREED) + self._filter_bytes()
        return expected_peak(_LIBRARY_BYTES + held + max(working, at_end))

    def _largest_two(self) -> tuple[int, int]:
        """Return the bytes of the two largest blocks' voxels; 0 for a second one that is not there."""
        voxel = self.source.num_channels * self.source.dtype.itemsize
        largest, second = self.blocks.largest_two
        return largest * voxel, second * voxel

    def _filter_bytes(self) -> int:
        """Return the bytes that are loaded at the end, where padding is looked for."""
        return filter_bytes() * (self.settings.kind == "image")

    def _working_bytes(self) -> int:
        """Return the bytes for blocks on their way: read, checked, counted, packed."""
        largest, second = self._largest_two()
        alone = self._alone_bytes(largest)
        if self.workers > 1 or not second:
            return alone
        # A process alone writes a block while it reads the next one: the two largest may be those.
        return max(
            alone,
            writing_bytes(largest, 1) + self._reading_bytes(second),
            writing_bytes(second, 1) + self._reading_bytes(largest),
        )

    def _alone_bytes(self, block: int) -> int:
        """Return the bytes for a block of so many bytes that is read and then written, with no other beside it."""
        return max(self._reading_bytes(block), writing_bytes(block, 1))

    def _reading_bytes(self, block: int) -> int:
        """Return the bytes for a block of so many bytes until its voxels are checked and counted."""
        dtype = self.source.dtype
        checked = counted = 0
        if dtype.kind == "f":  # where they are finite, and where not; a copy where they are replaced
            checked = 2 * block // dtype.itemsize + (self.settings.non_finite is not None) * block
        if self.settings.kind == "image":
            counted = counting_bytes(dtype, block // dtype.itemsize)
        return block + max(self._decoded_bytes(), checked, counted)

    def _decoded_bytes(self) -> int:
        """Return the bytes for the smallest piece that is decoded at once, packed and unpacked."""
        if not self.source.streamed or self.source.atom_zyx == (1, 1, 1):
            return 0
        sides = [min(a, n) for a, n in zip(self.source.atom_zyx, self.blocks.shape_zyx, strict=True)]
        return 2 * math.prod(sides) * self.source.num_channels * self.source.dtype.itemsize
