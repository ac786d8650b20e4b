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
from comir_hpc.runs.refinement import REFINEMENT_FILE, SLICES_FILE, RefinementRecord
from comir_hpc.space.grid import Box, Grid, as_triple
from comir_hpc.volumes.volume import Volume

if TYPE_CHECKING:
    from comir_hpc.register.blockwise.opened import Opened

_PLACES = 20_000  # of the specimen, whose middle the slices go through
_AROUND = 2  # lattice points on each side of a slice that are read: determinants look at the next ones


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
    """Cut slices at the places and on the grid of the report's other pictures; a slab of the field is read for each."""
    known = opened.result.inputs["fixed"].compared or {}
    grid = Grid.from_dict(known["grid"]) if "grid" in known else opened.layout.grid
    centre = grid.index_zyx(opened.fixed.specimen_points_mm(_PLACES).mean(axis=0))
    volume = Volume.open(opened.settings.out / "displacements")
    states = read_evidence(opened.settings.out / "evidence").of("state")
    planes: dict[str, NDArray[np.float32]] = {}
    for plane, axis in PLANES.items():
        cut = int(np.clip(round(centre[axis]), 0, grid.shape_zyx[axis] - 1))
        start, stop = [0, 0, 0], list(grid.shape_zyx)
        start[axis], stop[axis] = cut, cut + 1
        place = grid.crop(Box(as_triple(start, int), as_triple(stop, int)))
        shown = np.squeeze(_shown(volume, place, axis, grid), axis=axis + 1)
        rows, columns = (a for a in range(3) if a != axis)
        for name, channel in (("rows", rows), ("columns", columns), ("magnitude", 3), ("determinant", 4)):
            planes[f"{plane}_{name}"] = shown[channel]
        planes[f"{plane}_state"] = np.squeeze(_state(states, opened, place), axis=axis)
    return planes


def _shown(volume: Volume, place: Grid, axis: int, grid: Grid) -> NDArray[np.float32]:
    """Displacement in voxels of the pictures' grid, its length in mm and the determinant, (5, z, y, x), on a slice."""
    lattice = volume.grid
    at = float(lattice.index_zyx(place.centre_mm)[axis])
    start, stop = [0, 0, 0], list(lattice.shape_zyx)
    start[axis] = int(np.clip(np.floor(at) - _AROUND, 0, lattice.shape_zyx[axis] - 1))
    stop[axis] = int(np.clip(np.floor(at) + _AROUND + 2, start[axis] + 1, lattice.shape_zyx[axis]))
    box = Box(as_triple(start, int), as_triple(stop, int))
    field = volume.read(box)
    slab = Lattice(lattice.crop(box), field, field)
    whole = np.concatenate(
        [
            field / spacings(grid),
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
