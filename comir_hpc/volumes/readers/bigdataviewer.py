"""BigDataViewer files (.h5 beside .xml): one group a time point and view, a pyramid in each.

``tTTTTT/sSS/LEVEL/cells`` holds voxels (z, y, x), 16 bits without a sign that the file calls signed;
``sSS/resolutions`` the factors of the levels in (x, y, z). Voxel size and placement stand in the XML file of the same
name (https://imagej.net/plugins/bdv).
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import Box, Vector
from comir_hpc.volumes.readers.claims import require_credible_dataset
from comir_hpc.volumes.readers.lengths import grid_unit, in_one_unit, mm_of
from comir_hpc.volumes.readers.source import Source, storable

_VIEW = re.compile(r"(t\d{5,})/(s\d{2,})(?:/(\d+))?(?:/cells)?/?")


def is_bigdataviewer(file: Any) -> bool:
    """Return whether an HDF5 file has BigDataViewer's layout."""
    return "s00/resolutions" in file and any(re.fullmatch(r"t\d{5,}", name) for name in file)


def bigdataviewer(path: Path, file: Any, dataset: str | None = None) -> Source:
    """Open one level of one view of a BigDataViewer file, streamed.

    Parameters
    ----------
    file : h5py.File
        The HDF5 file, open for reading.
    dataset : str, optional
        ``tTTTTT/sSS`` or ``tTTTTT/sSS/LEVEL``; not needed where there is one time point and one view.

    Raises
    ------
    VolumeError
        If there are several views and none is named, or the view is registered by more than a scale and a shift.
    """
    views = [f"{t}/{s}" for t in sorted(file) if t.startswith("t") for s in sorted(file[t])]
    asked = _VIEW.fullmatch(dataset if dataset is not None else views[0])
    if asked is None or f"{asked[1]}/{asked[2]}" not in views or (dataset is None and len(views) > 1):
        more = f", and {len(views) - 12} more" if len(views) > 12 else ""
        raise VolumeError(
            f"{path} holds the views {', '.join(views[:12])}{more}; name one with --dataset tTTTTT/sSS"
        )
    setup, level = asked[2], int(asked[3] or 0)
    place = f"{asked[1]}/{setup}/{level}/cells"
    if place not in file:
        raise VolumeError(
            f"{path} has no {place}; name a level that exists with --dataset {asked[1]}/{setup}/LEVEL"
        )
    cells = file[place]
    require_credible_dataset(path, cells)
    signed = cells.dtype == np.int16
    factors = [float(f) for f in file[setup]["resolutions"][level][::-1]]
    spacing, unit, origin, says = _placement(path, int(asked[1][1:]), int(setup[1:]), factors)

    def read(box: Box) -> NDArray[Any]:
        with h5py.File(path, "r") as opened:
            values: NDArray[Any] = opened[place][box.slices][None]
            return values.view(np.uint16) if signed else values

    note = f"{path.name}: its 16 bits are read without a sign, as BigDataViewer does"
    xml = path.with_suffix(".xml")
    return Source(
        path=path, kind="BigDataViewer", shape=(1, *cells.shape),
        dtype=np.dtype(np.uint16) if signed else storable(cells.dtype, path), read_box=read,
        files=(path, xml) if xml.is_file() else (path,), spacing_zyx=spacing, unit=unit, origin_xyz=origin,
        atom_zyx=tuple(cells.chunks) if cells.chunks else (1, 1, 1), says=says, notes=(note,) if signed else (),
    )  # fmt: skip


def _placement(
    path: Path, time: int, setup: int, factors: list[float]
) -> tuple[Vector | None, str | None, Vector, str]:
    """Read spacing (z, y, x), unit and origin (x, y, z) of a level from the XML file, and what it says otherwise."""
    nowhere = (0.0, 0.0, 0.0)
    xml = path.with_suffix(".xml")
    if not xml.is_file():
        return None, None, nowhere, f"{xml.name}, which holds it, does not lie beside it"
    try:
        root = ET.parse(xml).getroot()
        size, name = _voxel_size(root, setup)
        matrix = _registration(root, time, setup)
    except (ET.ParseError, ValueError) as error:
        return None, None, nowhere, f"{xml.name} cannot be read ({error})"
    if size is None or mm_of(name) is None:
        return None, None, nowhere, f"{xml.name} has no voxel size, or in {name!r}"
    # What is left of rounding after transforms are multiplied is no rotation.
    scale = np.diag(matrix[:, :3])
    if np.abs(matrix[:, :3] - np.diag(scale)).max() > 1e-6 * np.abs(scale).max() or scale.min() <= 0:
        raise VolumeError(
            f"{path}: {xml.name} registers this view by more than a scale and a shift; fuse the views into one volume "
            "first"
        )
    # BigStitcher writes its shifts in units of the smallest voxel side: the ratio brings them back.
    shift = matrix[:, 3] / scale * size
    # A coarse voxel's centre lies half a coarse voxel less half a fine one further in.
    shift += [(f - 1) / 2 * s for f, s in zip(factors[::-1], size, strict=True)]
    unit = grid_unit(name)
    z, y, x = in_one_unit([s * f for s, f in zip(size[::-1], factors, strict=True)], [name] * 3, unit)
    ox, oy, oz = in_one_unit(shift.tolist(), [name] * 3, unit)
    return (z, y, x), unit, (ox, oy, oz), ""


def _voxel_size(root: ET.Element, setup: int) -> tuple[list[float] | None, str]:
    for view in root.iter("ViewSetup"):
        if view.findtext("id") == str(setup):
            size = [float(v) for v in (view.findtext("voxelSize/size") or "").split()]
            good = len(size) == 3 and min(size) > 0
            return size if good else None, (view.findtext("voxelSize/unit") or "").strip()
    return None, ""


def _registration(root: ET.Element, time: int, setup: int) -> NDArray[np.float64]:
    """Return the map (3, 4) from voxels (x, y, z) to the world; the last one of the file's transforms comes first."""
    matrix = np.eye(4)
    for view in root.iter("ViewRegistration"):
        if view.get("timepoint") == str(time) and view.get("setup") == str(setup):
            for step in view.iter("affine"):
                values = [float(v) for v in (step.text or "").split()]
                if len(values) != 12:
                    raise ValueError(f"an affine of {len(values)} numbers, expected 12")
                matrix = matrix @ np.vstack([np.reshape(values, (3, 4)), [0, 0, 0, 1]])
    return matrix[:3]
