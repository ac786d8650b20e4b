"""Level 1 of the pyramid, made block by block while the voxels are in memory anyway.

Made afterwards, it has to read and decompress all of level 0 again. A block's coarse voxels wait, as they are, in the
folder of the ledger. They are an eighth of the volume, and stay until it is complete. What is missing there is made
from level 0.
"""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.blocks.ledger import Ledger
from comir_hpc.host.files import written_whole
from comir_hpc.space.grid import Box, Triple
from comir_hpc.space.plan import Block, BlockPlan
from comir_hpc.volumes.volume import Volume, downsample, planned_levels


def build_pyramid(volume: Volume, plan: BlockPlan, ledger: Ledger, *, verify: bool = False) -> None:
    """Write the levels above 0 that are not there whole, level 1 from the coarse blocks that were kept.

    A level is recorded in the ledger like a block. Of a level that was finished, only the shards that are damaged are
    made again; one in which a run was killed is made anew.

    Parameters
    ----------
    volume, plan, ledger
        The output with its plan and its ledger; all of its blocks are done.
    verify : bool
        Compare the content of the levels that are there with what was written, not only the size of their files.
    """
    kept = CoarseBlocks(volume, plan, ledger)
    whole = ledger.levels()  # the ledger also learns here how often each level was tried
    volume.unname_levels()
    for level in range(1, len(planned_levels(volume.grid))):
        files = ledger.level_files(level)
        there = volume.add_level(level, keep=bool(files))
        damaged = {volume.path / f.name for f in files if f.damage(volume.path, content=verify)}
        if there and not damaged and level in whole:
            continue
        shards = {box: set(volume.shard_files(box, level=level)) for box in volume.level_shards(level)}
        # An array that was made anew has lost all its files, whatever the ledger says of them.
        todo = [box for box, paths in shards.items() if not there or paths & damaged]
        every = set().union(*shards.values())
        with ledger.writing(-level, sorted(every), keep=every.difference(*map(shards.__getitem__, todo))):
            for box in todo:
                volume.fill_shard(level, box, known=kept.read if level == 1 else None)
    volume.name_levels()
    kept.forget()


class CoarseBlocks:
    """Level 1 of the blocks of one output.

    Parameters
    ----------
    volume, plan, ledger
        The output with its plan and its ledger.
    """

    def __init__(self, volume: Volume, plan: BlockPlan, ledger: Ledger) -> None:
        self.plan, self.labels = plan, volume.metadata["kind"] == "labels"
        self.folder = ledger.folder / f"level-1-{ledger.fingerprint}"
        levels = planned_levels(volume.grid)
        self.step: Triple | None = levels[1] if len(levels) > 1 and self._aligned(levels[1]) else None

    def _aligned(self, step: Triple) -> bool:
        """Return whether no coarse voxel lies in two blocks."""
        sizes = zip(self.plan.core_zyx, step, self.plan.shape_zyx, strict=True)
        return all(core % s == 0 or core >= n for core, s, n in sizes)

    def keep(self, block: Block, values: NDArray[Any]) -> None:
        """Keep level 1 of a block's voxels (c, z, y, x)."""
        if self.step is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # A run that is killed here must not leave half a file, which `read` would take for a block.
        with written_whole(self.folder / f"{block.index}.npy") as spare, spare.open("wb") as file:
            np.save(file, downsample(values, self.step, labels=self.labels), allow_pickle=False)

    def read(self, box: Box) -> NDArray[Any] | None:
        """Read a box of level 1 as (c, z, y, x); None where a block of it was not kept."""
        if self.step is None:
            return None
        core = [-(-c // s) for c, s in zip(self.plan.core_zyx, self.step, strict=True)]
        ranges = [range(a // c, -(-b // c)) for a, b, c in zip(box.start, box.stop, core, strict=True)]
        pieces = []
        for place in np.ndindex(*map(len, ranges)):
            where = [r[p] for r, p in zip(ranges, place, strict=True)]
            file = self.folder / f"{int(np.ravel_multi_index(where, self.plan.counts_zyx))}.npy"
            if not file.is_file():
                return None
            # Mapped: a box may need a corner of a block only.
            coarse = np.load(file, mmap_mode="r", allow_pickle=False)
            start = [w * c for w, c in zip(where, core, strict=True)]
            stop = [a + n for a, n in zip(start, coarse.shape[1:], strict=True)]
            pieces.append((Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])), coarse))
        out = np.empty((len(pieces[0][1]), *box.shape), dtype=pieces[0][1].dtype)
        for here, coarse in pieces:
            part = here.intersect(box)
            out[(slice(None), *part.slices_in(box))] = coarse[(slice(None), *part.slices_in(here))]
        return out

    def forget(self) -> None:
        """Remove what was kept."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
