"""MGH and MGZ: the volumes of FreeSurfer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nibabel.freesurfer.mghformat import DATA_OFFSET, MGHError, MGHHeader
from nibabel.spatialimages import HeaderDataError

from comir_hpc.errors import VolumeError
from comir_hpc.volumes.readers.nifti import layout_of
from comir_hpc.volumes.readers.packed import gunzip_or_read, opened
from comir_hpc.volumes.readers.placement import placement_ras
from comir_hpc.volumes.readers.raw import shape_of
from comir_hpc.volumes.readers.source import Source, reading, storable

_PLACED = slice(28, 30)  # goodRASFlag


def mgh(path: Path) -> Source:
    """Open a .mgh or .mgz file; streamed unless it is compressed. Several frames become the channels.

    Its world is that of the scanner, as nibabel gives it; FreeSurfer's surfaces lie in another one.

    Raises
    ------
    VolumeError
        If its header is damaged or claims more voxels than the file holds.
    """
    kind = "MGH"
    with reading(path, kind, HeaderDataError, MGHError), np.errstate(all="ignore"):
        with opened(path) as file:
            block = file.read(DATA_OFFSET)
        # MGH is big-endian, always.
        if len(block) < DATA_OFFSET or int.from_bytes(block[:4], "big") != 1:
            raise MGHError(f"{len(block)} bytes beginning with {block[:4]!r}, expected a header of version 1")
        header: Any = MGHHeader(block)  # type: ignore[no-untyped-call]
        shape = tuple(int(n) for n in header.get_data_shape())
        layout = layout_of(path, path, shape, np.dtype(header.get_data_dtype()), DATA_OFFSET)
        dtype = storable(layout.dtype, path)
        affine = np.asarray(header.get_affine(), dtype=np.float64)
    czyx = shape_of(layout.shape, layout.axes)
    placed = int.from_bytes(block[_PLACED], "big") != 0
    place = placement_ras(affine, czyx[1:], path)
    read, load_bytes, _ = gunzip_or_read(path, layout)  # what follows the voxels is the scan's parameters
    if min(place.spacing_zyx) <= 0:
        raise VolumeError(f"{path}: voxels of {place.spacing_zyx} mm (z, y, x); export it again")
    notes = () if placed else (
        f"{path.name}: it does not say how its axes lie (goodRASFlag 0): coronal slices of 1 mm, x to the left, y to "
        "the feet, z to the front, with the origin in the middle, are taken, as FreeSurfer does",
    )  # fmt: skip
    return Source(
        path=path, kind=kind, shape=czyx, dtype=dtype, read_box=read, files=(path,), spacing_zyx=place.spacing_zyx,
        unit="millimeter", origin_xyz=place.origin_xyz, direction=place.direction, load_bytes=load_bytes,
        notes=(*notes, *place.notes),
    )  # fmt: skip
