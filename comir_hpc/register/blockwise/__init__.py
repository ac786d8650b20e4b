"""`comir-hpc refine`: what a registration leaves over, found block by block, for volumes that do not fit into memory.

A registration gives the coarse solution. Its fixed volume is cut into blocks that overlap. Each block looks at its box
of both volumes, finds what is left over there, and keeps it only if voxels that took no part agree better with it. The
solutions are blended into one displacement field, in a store that `warp` reads box by box.

===========  ==================================================================================
`layout`     lattice, blocks, what each looks at, and the weights of their solutions
`sides`      any box of a volume as it is compared
`relation`   what moving intensities stand for, where intensities are compared
`coarse`     the registration that blocks start from
`solve`      one block
`blend`      the field, from the solutions of neighbours
`evidence`   what is known of every block: arrays, counts, words
`jobs`       both passes as jobs of the block engine
`drawn`      slices for the report
`opened`     what the settings name, checked
===========  ==================================================================================
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comir_hpc.blocks.cost import Figures, side_by_side, together
from comir_hpc.blocks.job import Filled, carry_out
from comir_hpc.blocks.output import metadata_at
from comir_hpc.config.refine import RefineSettings
from comir_hpc.errors import HeldError
from comir_hpc.host.memory import available_bytes, in_words
from comir_hpc.host.progress import Progress
from comir_hpc.register.blockwise import evidence
from comir_hpc.register.blockwise.drawn import keep_drawn
from comir_hpc.register.blockwise.jobs import BlendJob, SolveJob, remove_scratch
from comir_hpc.register.blockwise.opened import Opened
from comir_hpc.register.blockwise.solve import num_levels
from comir_hpc.space.grid import Grid

__all__ = ["RefineResult", "plan_refine", "refine"]

_LIBRARY_BYTES = 24 << 20  # of the process that only hands out blocks


@dataclass(frozen=True)
class RefineResult:
    """What `refine` did.

    Attributes
    ----------
    path : Path
        Store of the field.
    grid : Grid
        Lattice of the field.
    blocks, computed, missing : int
        Blocks of this part; those that it solved; those of all parts that are still to be done.
    seconds : float
        Wall-clock seconds of this call.
    states : dict of str to int
        Number of blocks by what became of them; empty while blocks are missing.
    figures : dict
        Counts, agreement of the cubes that were held out, folds, displacement and residual of the inverse over all
        blocks; empty while blocks are missing.
    predicted, measured : Figures or None
        Memory and size that this call was expected to need, and those that it needed.
    notes : tuple of str
        Sentences for the user.
    """

    path: Path
    grid: Grid
    blocks: int
    computed: int
    missing: int
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)
    predicted: Figures | None = None
    measured: Figures | None = None
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the field is there."""
        return self.missing == 0

    @property
    def states(self) -> dict[str, int]:
        """Number of blocks by what became of them; empty while blocks are missing."""
        return dict(self.figures.get("states", {}))

    @property
    def summary(self) -> str:
        """Lines for the user: where the field is, what became of the blocks, and what it needed."""
        line = (
            f"{self.path}: {self.grid}; {self.computed} blocks solved ({self.blocks - self.computed} were done) in "
            f"{self.seconds:.1f} s"
        )
        if not self.complete:
            return f"{line}; {self.missing} blocks of other parts are missing, whichever part is last completes it"
        line += f"\n{evidence.in_words(self.figures)}"
        if self.computed and self.predicted and self.measured:
            line += f"\n{side_by_side(self.predicted, self.measured)}"
        return line


def refine(settings: RefineSettings, *, progress: Progress | None = None) -> RefineResult:
    """Refine a registration block by block.

    Running it again goes on where it was stopped; with ``settings.part`` it solves one part of the blocks, and
    whichever part is the last makes the field.

    Parameters
    ----------
    settings : RefineSettings
        The registration, how blocks are cut and compared, and where the field is written.
    progress : callable, optional
        Function that is called as ``progress(what, done, total)``.

    Raises
    ------
    RegistrationError
        If the registration has failed, the stores are not those that it registered, a length does not fit, or no block
        has content.
    VolumeError, CheckpointError, ConfigError
        If a volume or model cannot be used, something else is at the place of the output, or blocks fail.
    StopRequested
        After SIGTERM or SIGUSR2. The same call, made again, continues the work.
    """
    begun = time.perf_counter()
    opened = Opened.from_settings(settings)
    solve, blend = SolveJob(opened), BlendJob(opened)
    solved: Filled | None = None
    if not blend.finished:
        opened.require_content()
        blend.require_place()
        solved = carry_out(solve, begun=begun, progress=progress)
        if solved.missing or not _blended(blend, begun, progress):
            return _result(opened, begun, solved, solved.missing or len(opened.layout.plan))
    remove_scratch(solve)
    figures = (metadata_at(blend.out) or {}).get("blocks", {})
    notes = keep_drawn(opened, figures, redrawn=solved is not None)
    return _result(opened, begun, solved, 0, figures, notes)


def _blended(blend: BlendJob, begun: float, progress: Progress | None) -> bool:
    """Make the field; False where another part is at it."""
    try:
        return not carry_out(blend, begun=begun, progress=progress).missing
    except HeldError:
        if blend.settings.part[1] == 1:
            raise
        return False


def _result(
    opened: Opened,
    begun: float,
    solved: Filled | None,
    missing: int,
    figures: dict[str, Any] | None = None,
    notes: tuple[str, ...] = (),
) -> RefineResult:
    layout, settings = opened.layout, opened.settings
    return RefineResult(
        settings.out,
        layout.lattice,
        len(layout.plan.part(*settings.part)) if solved is None else solved.blocks,
        0 if solved is None else solved.computed,
        missing,
        time.perf_counter() - begun,
        figures or {},
        None if solved is None else solved.predicted,
        None if solved is None else solved.measured,
        notes,
    )


def plan_refine(settings: RefineSettings) -> dict[str, Any]:
    """Say what `refine` would do and need.

    Raises
    ------
    ComirError
        If `refine` would raise it before it reads voxels.
    """
    opened = Opened.from_settings(settings)
    layout, solve, blend = opened.layout, SolveJob(opened), BlendJob(opened)
    part = layout.plan.part(*settings.part)
    needed, field_needs = solve.needs(layout.plan, len(part)), blend.needs(layout.plan, len(layout.plan))
    peak = max(needed.peak_bytes, field_needs.peak_bytes)
    return {
        "fixed": f"{opened.fixed.volume.path}, seen on {layout.grid}",
        "moving": f"{opened.moving.volume.path}, seen on {opened.moving.grid(0)}",
        "compared": f"{opened.compared}, on {num_levels(layout, len(opened.fixed.readers))} grids",
        "smoothness": f"{layout.smoothness_mm:.4g} mm",
        "field": f"{settings.out}: {layout.lattice}",
        "blocks": len(layout.plan),
        "block": " x ".join(str(c * layout.ratio) for c in layout.plan.core_zyx) + " voxels",
        "seen_by_a_block": " x ".join(map(str, layout.largest())) + " voxels",
        "blocks_of_this_part": len(part),
        "workers": settings.workers,
        "peak_memory": in_words(together(peak, settings.workers, _LIBRARY_BYTES)),
        "available_memory": in_words(available_bytes()),
        "disk_at_most": in_words(field_needs.num_bytes or 0),
        "disk_meanwhile": in_words(needed.num_bytes or 0),
        "files_at_most": (field_needs.files or 0) + (needed.files or 0),
    }
