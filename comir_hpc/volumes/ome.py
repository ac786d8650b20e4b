"""The metadata of OME-Zarr, and zarr stores that others wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr

from comir_hpc.space.grid import Grid, Triple

Kind = Literal["image", "labels", "representation", "displacements"]


def ome_metadata(name: str, grid: Grid, factors: Sequence[Triple], kind: Kind) -> dict[str, Any]:
    """Make the multiscale metadata of OME-Zarr 0.5 (https://ngff.openmicroscopy.org/0.5).

    The standard's translation has the order and axes of the array: the origin seen along the array's own axes.
    """
    direction = np.asarray(grid.direction)
    datasets = []
    for level, factor in enumerate(factors):
        coarse = grid.downsampled(factor)
        along_axes = (direction.T @ np.asarray(coarse.origin_xyz))[::-1]
        datasets.append(
            {
                "path": str(level),
                "coordinateTransformations": [
                    {"type": "scale", "scale": [1.0, *coarse.spacing_zyx]},
                    {"type": "translation", "translation": [0.0, *along_axes.tolist()]},
                ],
            }
        )
    axes = [{"name": "c", "type": "channel"}]
    axes += [{"name": a, "type": "space", "unit": grid.unit} for a in "zyx"]
    method = "mode over 2x2x2" if kind == "labels" else "mean over 2x2x2"
    multiscale = {"name": name, "axes": axes, "datasets": datasets, "type": method}
    return {"version": "0.5", "multiscales": [multiscale]}


def foreign_node(path: Path) -> Any:
    """Open the root of a zarr store of any format and origin, for the readers: a group or an array."""
    return zarr.open(store=str(path), mode="r")


def foreign_arrays(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield every array in a zarr store with its path; a root that is an array has the path ``""``."""
    if isinstance(node, zarr.Array):
        yield "", node
        return
    for name, member in node.members(max_depth=None):
        if isinstance(member, zarr.Array):
            yield name, member
