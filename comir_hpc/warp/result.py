"""What a warp did, for the user and for a program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from comir_hpc.blocks.cost import Figures, side_by_side
from comir_hpc.space.grid import Grid


@dataclass(frozen=True)
class WarpResult:
    """What `warp` did.

    What means nothing for the result keeps its default: a table of points has no grid and no blocks.

    Attributes
    ----------
    path : Path
        Path of the volume, the file or the CSV that was written.
    points : int
        Number of points that were carried; zero for a volume.
    notes : tuple of str
        Sentences on what was assumed of the inputs, and on what the output's format cannot keep, for the user.
    grid : Grid or None
        Grid of the volume that was written; None for points.
    blocks, computed, missing : int
        Blocks of this part; those it computed; those of all parts that are still to be done.
    inside : float
        Share of the fixed grid that lies inside the moving volume.
    seconds : float
        Wall-clock seconds of this call.
    predicted, measured : Figures or None
        Time, memory and size that this call was expected to need for a volume, and those that it needed.
    """

    path: Path
    points: int = 0
    notes: tuple[str, ...] = ()
    grid: Grid | None = None
    blocks: int = 0
    computed: int = 0
    missing: int = 0
    inside: float = 0.0
    seconds: float = 0.0
    predicted: Figures | None = None
    measured: Figures | None = None

    @property
    def complete(self) -> bool:
        """Whether every part of the volume is done."""
        return self.missing == 0

    @property
    def summary(self) -> str:
        """Summary for the user: one line, and for a volume one that puts the expected beside the needed."""
        if self.grid is None:
            return f"{self.path}: {self.points} points"
        line = (
            f"{self.path}: {self.grid}, {self.inside:.0%} of it inside the moving volume; {self.computed} blocks "
            f"({self.blocks - self.computed} were done) in {self.seconds:.1f} s"
        )
        if not self.complete:
            line += f"; {self.missing} blocks of other parts are missing, whichever part is last completes it"
        if self.computed and self.predicted and self.measured:
            line += f"\n{side_by_side(self.predicted, self.measured)}"
        return line

    def _repr_html_(self) -> str:
        """Show what was carried, notes and middle slices in a notebook."""
        from comir_hpc.runs.volume_html import volume_html

        rows: dict[str, object] = {"grid": self.grid, "inside the moving volume": f"{self.inside:.0%}"}
        rows = {"points": self.points} if self.grid is None else rows
        return volume_html("Warped", {**rows, "notes": "; ".join(self.notes)}, self.path)
