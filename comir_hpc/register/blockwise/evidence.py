"""What is known of every block: gathered from the ledgers, kept as arrays of one voxel a block, and counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from comir_hpc.blocks.ledger import Ledger
from comir_hpc.register.blockwise.layout import Layout
from comir_hpc.volumes.volume import Volume

State = Literal["no content", "refused", "fell back", "kept"]
"""What became of a block; its place in this list is its number in the map of states."""
STATES: tuple[State, ...] = get_args(State)
CHANNELS = (
    "state", "content", "before", "after", "standard_error", "cubes", "own_folds", "folds", "least_determinant",
    "displacement_mm", "largest_mm", "inverse_residual_mm",
)  # fmt: skip
"""Channels of the map of evidence; ``state`` counts in `STATES`."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """Figures of all blocks.

    Attributes
    ----------
    values : (c, z, y, x) float32
        One voxel a block, in the order of `CHANNELS`; NaN for what was not measured.
    """

    values: NDArray[np.float32]

    @classmethod
    def gathered(cls, layout: Layout, passes: Iterable[Ledger]) -> Evidence:
        """Put together what the ledgers of the passes noted with each block."""
        values = np.full((len(CHANNELS), len(layout.plan)), np.nan, dtype=np.float32)
        for ledger in passes:
            for index, note in ledger.notes():
                for channel, name in enumerate(CHANNELS):
                    if note.get(name) is not None:
                        values[channel, index] = note[name]
        return cls(values.reshape(len(CHANNELS), *layout.plan.counts_zyx))

    def of(self, name: str) -> NDArray[np.float32]:
        """One channel (z, y, x)."""
        channel: NDArray[np.float32] = self.values[CHANNELS.index(name)]
        return channel

    def summary(self) -> dict[str, Any]:
        """Count the blocks by state, and sum up the figures of those with content, JSON-ready."""
        state = self.of("state")
        counts = {name: int((state == number).sum()) for number, name in enumerate(STATES)}
        kept, judged = state == STATES.index("kept"), np.isfinite(self.of("before"))
        content = state != STATES.index("no content")

        def mean(name: str, where: NDArray[np.bool_]) -> float | None:
            return float(self.of(name)[where].mean(dtype=np.float64)) if where.any() else None

        return {
            "states": counts,
            "before": mean("before", judged & kept),
            "after": mean("after", judged & kept),
            "folded_points": int(np.nansum(self.of("folds"))),
            "least_determinant": float(np.nanmin(self.of("least_determinant"))),
            "displacement_mm": mean("displacement_mm", content),
            "largest_mm": float(np.nanmax(self.of("largest_mm"))),
            "inverse_residual_mm": mean("inverse_residual_mm", content),
        }


def write_evidence(path: Path, layout: Layout, evidence: Evidence) -> None:
    """Write the figures as an image of one voxel a block, whose grid lies where the blocks do."""
    grid = layout.lattice.downsampled(layout.plan.core_zyx)
    volume = Volume.create(path, grid, np.float32, channels=len(CHANNELS), overwrite=True)
    volume.write(grid.box, evidence.values)
    volume.finish(channels=list(CHANNELS), states=list(STATES))


def read_evidence(path: Path) -> Evidence:
    """Read what `write_evidence` wrote.

    Raises
    ------
    VolumeError
        If it is missing, incomplete or damaged.
    """
    return Evidence(Volume.open(path).read())


def in_words(summary: Mapping[str, Any]) -> str:
    """Say what became of the blocks, in one line; no state is left out."""
    counts = summary["states"]
    total = sum(counts.values())
    parts = [
        f"{counts['kept']} of {total} blocks kept",
        f"{counts['fell back']} did not improve by more than chance and keep the coarse solution",
        f"{counts['refused']} were refused and keep it, too",
        f"{counts['no content']} hold no specimen",
    ]
    folds = f"{summary['folded_points']} folded points"
    if summary["folded_points"]:
        folds = f"WARN: {folds}, where points are not carried one to one"
    return f"{'; '.join(parts)}; {folds}"
