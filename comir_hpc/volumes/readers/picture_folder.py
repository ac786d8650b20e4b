"""A folder of PNG or JPEG slices as a volume, decoded slice by slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import Box
from comir_hpc.volumes.readers.numbering import NumberedFiles
from comir_hpc.volumes.readers.pictures import picture
from comir_hpc.volumes.readers.source import Source


def picture_folder(path: Path, found: NumberedFiles) -> Source:
    """Open a folder of PNG or JPEG slices of one size as a volume.

    Parameters
    ----------
    found : NumberedFiles
        What `numbered_files` made of the folder.

    Raises
    ------
    VolumeError
        If slices differ in size, channels or type.
    """
    first = picture(found.files[0])
    for file in found.files[1:]:
        other = picture(file)
        if (other.shape, other.dtype) != (first.shape, first.dtype):
            raise VolumeError(
                f"{file} is {other.shape} {other.dtype} (c, z, y, x), the other slices in {path} are {first.shape} "
                f"{first.dtype}; remove it or export the stack again"
            )

    def read(box: Box) -> NDArray[Any]:
        flat = Box((0, *box.start[1:]), (1, *box.stop[1:]))
        return np.concatenate(
            [picture(f).read(flat) for f in found.files[box.start[0] : box.stop[0]]], axis=1
        )

    channels, _, height, width = first.shape
    name = path.resolve().name
    return Source(
        path=path, kind=f"{first.kind} slices", shape=(channels, len(found.files), height, width), dtype=first.dtype,
        read_box=read, files=found.files, atom_zyx=(1, height, width),
        notes=(*(f"{name}: {note}" for note in found.notes("slices")), *first.notes),
    )  # fmt: skip
