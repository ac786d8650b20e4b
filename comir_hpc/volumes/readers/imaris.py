"""Imaris files (.ims): HDF5 with a pyramid of levels, one group a channel.

Layout after https://imaris.oxinst.com/support/imaris-file-format: ``ResolutionLevel R/TimePoint T/Channel C/Data``
below ``DataSet`` in (z, y, x), padded to whole chunks; the true size stands beside each. ``ExtMin`` and ``ExtMax``
(0 is x) are the outer edges of the volume.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import Box, Matrix, Triple, Vector
from comir_hpc.volumes.readers.claims import require_credible_dataset
from comir_hpc.volumes.readers.lengths import grid_unit, in_one_unit, mm_of
from comir_hpc.volumes.readers.source import Source, storable

_IMAGE = "DataSetInfo/Image"


def is_imaris(file: Any) -> bool:
    """Return whether an HDF5 file has Imaris's layout."""
    return _IMAGE in file and "DataSet/ResolutionLevel 0" in file


def imaris(path: Path, file: Any, dataset: str | None = None) -> Source:
    """Open one level of an Imaris file, streamed.

    Parameters
    ----------
    file : h5py.File
        The HDF5 file, open for reading.
    dataset : str, optional
        Number of the resolution level, 0 (the finest) when not given.

    Raises
    ------
    VolumeError
        If the level does not exist, there are several time points, the channels differ, or sizes contradict each other.
    """
    level = file["DataSet"].get(f"ResolutionLevel {dataset or 0}")
    if level is None:
        raise VolumeError(
            f"{path} has no resolution level {dataset}; it holds 0 to {len(file['DataSet']) - 1}: --dataset NUMBER"
        )
    if len(level) != 1:
        raise VolumeError(
            f"{path} holds {len(level)} time points; extract one of them as a volume of its own"
        )
    (time,) = level.values()
    # By number: as words, "Channel 10" comes before "Channel 2".
    names = sorted(time, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
    channels = [time[name] for name in names]
    shape = _shape(path, channels[0])
    for channel in channels:
        _require_alike(path, shape, channels[0], channel)
    data = channels[0]["Data"]
    places = [channel["Data"].name for channel in channels]

    def read(box: Box) -> NDArray[Any]:
        with h5py.File(path, "r") as opened:
            return np.stack([opened[place][box.slices] for place in places])

    spacing, unit, origin, direction, says = _placement(file[_IMAGE].attrs, shape)
    return Source(
        path=path, kind="Imaris", shape=(len(places), *shape), dtype=storable(data.dtype, path), read_box=read,
        files=(path,), spacing_zyx=spacing, unit=unit, origin_xyz=origin, direction=direction,
        atom_zyx=tuple(data.chunks) if data.chunks else (1, 1, 1), says=says,
    )  # fmt: skip


def _shape(path: Path, channel: Any) -> Triple:
    """Return the true size (z, y, x) of a channel."""
    z, y, x = (_number(channel.attrs, f"ImageSize{axis}") for axis in "ZYX")
    stored = channel["Data"].shape
    if None in (z, y, x) or any(n < 1 or n > s for n, s in zip((z, y, x), stored, strict=True)):  # type: ignore[operator]
        raise VolumeError(
            f"{path}: {channel.name} says that its size is {(z, y, x)} (z, y, x), and stores {stored} voxels; copy or "
            "export it again"
        )
    return int(z), int(y), int(x)  # type: ignore[arg-type]


def _require_alike(path: Path, shape: Triple, first: Any, channel: Any) -> None:
    data = channel["Data"]
    if _shape(path, channel) != shape or data.dtype != first["Data"].dtype:
        raise VolumeError(
            f"{path}: {channel.name} is {_shape(path, channel)} {data.dtype}, {first.name} is {shape} "
            f"{first['Data'].dtype}; export channels of one size and type"
        )
    require_credible_dataset(path, data)


def _placement(attributes: Any, shape: Triple) -> tuple[Vector | None, str | None, Vector, Matrix, str]:
    """Read spacing (z, y, x), unit, origin (x, y, z) and direction.

    The last item says what the extents are where they are no placement.
    """
    low, high = ([_number(attributes, f"{end}{axis}") for axis in range(3)] for end in ("ExtMin", "ExtMax"))
    name = _text(attributes, "Unit")
    unit = None if mm_of(name) is None else grid_unit(name)
    diagonal, spacing, origin = [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    says = "" if unit else f"its unit is {name!r}"
    for axis, (start, stop, count) in enumerate(zip(low, high, shape[::-1], strict=True)):
        if start is None or stop is None or start == stop:
            says = f"its extent along {'xyz'[axis]} is {start} to {stop}"
            continue
        step = (stop - start) / count
        # Extents are edges: the centre of the first voxel lies half a voxel further in.
        diagonal[axis], spacing[axis], origin[axis] = float(np.sign(step)), abs(step), start + step / 2
    if unit:
        spacing, origin = (list(in_one_unit(v, [name] * 3, unit)) for v in (spacing, origin))
    known = (spacing[2], spacing[1], spacing[0]) if min(spacing) > 0 else None
    direction: Any = tuple(map(tuple, np.diag(diagonal).tolist()))
    return known, unit, (origin[0], origin[1], origin[2]), direction, says


def _text(attributes: Any, name: str) -> str:
    """Read an attribute as text; Imaris writes it as an array of single characters."""
    parts = np.ravel(attributes.get(name, ""))
    whole = b"".join(p if isinstance(p, bytes) else str(p).encode() for p in parts).strip(b"\0 ")
    try:
        return whole.decode()
    except UnicodeDecodeError:  # the micro sign of Windows
        return whole.decode("latin-1")


def _number(attributes: Any, name: str) -> float | None:
    try:
        value = float(_text(attributes, name))
    except ValueError:
        return None
    return value if np.isfinite(value) else None
