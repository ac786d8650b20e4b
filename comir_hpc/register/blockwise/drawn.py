"""Slices of the field and of the map of states, for the report of the registration that was refined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.host.files import written_whole
from comir_hpc.register.blockwise.evidence import read_evidence
from comir_hpc.register.deform.lattice import Lattice
from comir_hpc.register.deform.velocity import spacings
from comir_hpc.register.deform.warping import carried
from comir_hpc.register.pictures import PLANES
from comir_hpc.runs.record import make_record, write_record
from comir_hpc.runs.refinement import EVIDENCE, REFINEMENT_FILE, SLICES_FILE, RefinementRecord
from comir_hpc.space.grid import Box, Grid, as_triple
from comir_hpc.volumes.volume import Volume

if TYPE_CHECKING:
    from comir_hpc.register.blockwise.opened import Opened

_PLACES = 20_000  # of the specimen, whose middle the slices go through
_AROUND = 2  # lattice points around a place that are read with it: determinants look at the next ones
_ROWS = 16  # of the lattice that are read at once, so that memory grows with a side of the volume and not with a slice
_LARGEST = 512  # pixels of a picture along a side, where nothing else says on which grid to draw: a page shows no more


def keep_drawn(opened: Opened, figures: dict[str, Any], *, redrawn: bool) -> tuple[str, ...]:
    """Write slices and figures into the folder of the registration, where its report finds them.

    Parameters
    ----------
    opened : Opened
        What was refined.
    figures : dict
        Figures over all blocks.
    redrawn : bool
        Whether they are written although they are there.

    Returns
    -------
    Notes for the user: a folder that cannot be written to.
    """
    folder = opened.settings.result
    if not redrawn and (folder / REFINEMENT_FILE).is_file():
        return ()
    record = make_record(
        RefinementRecord,
        {
            "registration": opened.result.fingerprint,
            "field": str(opened.settings.out.absolute()),
            "compared": opened.compared,
            "smoothness_mm": opened.layout.smoothness_mm,
            "spacing_mm": opened.layout.grid.finest_mm,
            "core_voxels": [c * opened.layout.ratio for c in opened.layout.plan.core_zyx],
            **figures,
        },
    )
    try:
        (folder / REFINEMENT_FILE).unlink(missing_ok=True)
        with written_whole(folder / SLICES_FILE) as spare, spare.open("wb") as file:
            np.savez_compressed(file, **_slices(opened))  # type: ignore[arg-type]
        write_record(folder / REFINEMENT_FILE, record)
    except OSError as error:
        return (
            f"{folder} cannot be written to ({error.strerror or error}): its report does not show the field",
        )
    return ()


def _slices(opened: Opened) -> dict[str, NDArray[np.float32]]:
    """Cut slices at the places and on the grid of the report's other pictures."""
    known = opened.result.inputs["fixed"].compared or {}
    grid = Grid.from_dict(known["grid"]) if "grid" in known else _small(opened.layout.grid)
    centre = grid.index_zyx(opened.fixed.specimen_points_mm(_PLACES).mean(axis=0))
    volume = Volume.open(opened.settings.out / "displacements")
    states = read_evidence(opened.settings.out / EVIDENCE).of("state")
    planes: dict[str, NDArray[np.float32]] = {}
    for plane, axis in PLANES.items():
        cut = int(np.clip(round(centre[axis]), 0, grid.shape_zyx[axis] - 1))
        start, stop = [0, 0, 0], list(grid.shape_zyx)
        start[axis], stop[axis] = cut, cut + 1
        place = grid.crop(Box(as_triple(start, int), as_triple(stop, int)))
        rows, columns = (a for a in range(3) if a != axis)
        shown = np.squeeze(_in_strips(volume, place, rows), axis=axis + 1)
        for name, channel in (("rows", rows), ("columns", columns), ("magnitude", 3), ("determinant", 4)):
            planes[f"{plane}_{name}"] = shown[channel]
        planes[f"{plane}_state"] = np.squeeze(_state(states, opened, place), axis=axis)
    return planes


def _small(grid: Grid) -> Grid:
    """Return a grid that is coarse enough for pictures."""
    factor = -(-max(grid.shape_zyx) // _LARGEST)
    return grid.downsampled((factor,) * 3)


def _in_strips(volume: Volume, place: Grid, rows: int) -> NDArray[np.float32]:
    """Return what `_shown` does, made of some rows after the other; `rows` is the axis that they lie along."""
    parts = []
    # A pixel of a large volume's picture is several rows of the lattice.
    count = max(1, int(_ROWS * volume.grid.spacing_mm[rows] / place.spacing_mm[rows]))
    for first in range(0, place.shape_zyx[rows], count):
        start, stop = [0, 0, 0], list(place.shape_zyx)
        start[rows], stop[rows] = first, min(first + count, place.shape_zyx[rows])
        parts.append(_shown(volume, place.crop(Box(as_triple(start, int), as_triple(stop, int)))))
    return np.concatenate(parts, axis=rows + 1)


def _shown(volume: Volume, place: Grid) -> NDArray[np.float32]:
    """Displacement in voxels of a grid, its length in mm and the determinant, (5, z, y, x), at the grid's voxels.

    The grid has the axes of the field's lattice, of which only the points around it are read.
    """
    lattice = volume.grid
    ends = lattice.index_zyx(
        place.world_mm(np.asarray([(0, 0, 0), place.shape_zyx]) - np.asarray([[0], [1]]))
    )
    last = np.asarray(lattice.shape_zyx)
    start = np.clip(np.floor(ends.min(axis=0)) - _AROUND, 0, last - 2).astype(int)
    stop = np.clip(np.floor(ends.max(axis=0)) + _AROUND + 2, start + 2, last).astype(int)
    box = Box(as_triple(start.tolist(), int), as_triple(stop.tolist(), int))
    field = volume.read(box)
    slab = Lattice(lattice.crop(box), field, field)
    whole = np.concatenate(
        [
            field / spacings(place),
            np.linalg.norm(field, axis=0)[None].astype(np.float32),
            slab.determinant[None].astype(np.float32),
        ]
    )
    return carried(whole, slab.grid, place)


def _state(states: NDArray[np.float32], opened: Opened, place: Grid) -> NDArray[np.float32]:
    """State of the block that owns each voxel of a slice, (z, y, x)."""
    layout = opened.layout
    voxels = np.moveaxis(np.indices(place.shape_zyx), 0, -1)
    points = np.round(layout.lattice.index_zyx(place.world_mm(voxels))).astype(int)
    blocks = points // np.asarray(layout.plan.core_zyx)
    blocks = np.clip(blocks, 0, np.asarray(layout.plan.counts_zyx) - 1)
    return np.asarray(states[tuple(np.moveaxis(blocks, -1, 0))], dtype=np.float32)
