"""Slices of a deformation for the report: where a grid goes, how far, and by how much space is stretched."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from comir_hpc.register.deform.lattice import Lattice
from comir_hpc.register.deform.velocity import spacings
from comir_hpc.register.deform.warping import carried
from comir_hpc.register.pictures import PLANES
from comir_hpc.representations.features import Features
from comir_hpc.space.grid import Box, as_triple


def deformation_planes(lattice: Lattice, fixed: Features) -> dict[str, NDArray[np.float32]]:
    """Cut three slices out of a deformation, at the places and on the grid of the report's other pictures.

    Returns
    -------
    ``{plane}_rows`` and ``{plane}_columns`` (rows, columns): displacement within the plane in voxels of the grid of
    the comparison; ``{plane}_magnitude``: length of the whole displacement in mm; ``{plane}_determinant``.
    """
    grid = fixed.grid
    centre = grid.index_zyx(fixed.centroid_mm)
    shown = np.concatenate(
        [
            lattice.displacement_mm / spacings(grid),
            np.linalg.norm(lattice.vectors_mm, axis=-1).astype(np.float32)[None],
            lattice.determinant.astype(np.float32)[None],
        ]
    )
    planes: dict[str, NDArray[np.float32]] = {}
    for plane, axis in PLANES.items():
        cut = int(np.clip(round(centre[axis]), 0, grid.shape_zyx[axis] - 1))
        start, stop = [0, 0, 0], list(grid.shape_zyx)
        start[axis], stop[axis] = cut, cut + 1
        found = carried(shown, lattice.grid, grid.crop(Box(as_triple(start, int), as_triple(stop, int))))
        found = np.squeeze(found, axis=axis + 1)
        rows, columns = (a for a in range(3) if a != axis)
        for name, channel in (("rows", rows), ("columns", columns), ("magnitude", 3), ("determinant", 4)):
            planes[f"{plane}_{name}"] = found[channel]
    return planes
