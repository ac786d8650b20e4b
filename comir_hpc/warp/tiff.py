"""A volume as TIFF: a hyperstack of ImageJ, or OME-TIFF. Neither keeps where it lies in the world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from comir_hpc.space.grid import Grid

IMAGEJ_TYPES = ("uint8", "uint16", "float32")
OME_TYPES = ("int8", "int16", "int32", "uint8", "uint16", "uint32", "float32", "float64")
_IMAGEJ_UNITS = {
    "nanometer": "nm", "micrometer": "um", "millimeter": "mm", "centimeter": "cm", "meter": "m",
}  # fmt: skip
_OME_UNITS = {**_IMAGEJ_UNITS, "micrometer": "µm"}
_LARGEST_CLASSIC = (1 << 32) - (1 << 25)  # bytes: offsets of 32 bits, with room for the description


def write_imagej(path: Path, values: NDArray[Any], grid: Grid) -> tuple[str, ...]:
    """Write a hyperstack of ImageJ (z, c, y, x) with spacing and unit; return what is lost."""
    z, y, x = grid.spacing_zyx
    tifffile.imwrite(
        path,
        np.moveaxis(values, 0, 1),
        imagej=True,
        resolution=(1 / x, 1 / y),
        metadata={"axes": "ZCYX", "spacing": z, "unit": _IMAGEJ_UNITS[grid.unit]},
    )
    return _lost(path)


def write_ome(path: Path, values: NDArray[Any], grid: Grid) -> tuple[str, ...]:
    """Write OME-TIFF (c, z, y, x) with spacing and unit, as BigTIFF where it is large; return what is lost."""
    sizes: dict[str, Any] = {"axes": "CZYX"}
    for axis, spacing in zip("ZYX", grid.spacing_zyx, strict=True):
        sizes |= {f"PhysicalSize{axis}": spacing, f"PhysicalSize{axis}Unit": _OME_UNITS[grid.unit]}
    tifffile.imwrite(
        path,
        values,
        ome=True,
        bigtiff=values.nbytes > _LARGEST_CLASSIC,
        photometric="minisblack",
        metadata=sizes,
    )
    return _lost(path)


def _lost(path: Path) -> tuple[str, ...]:
    return (
        f"{path.name}: TIFF keeps voxel size and unit, but neither origin nor direction: where it lies is lost",
    )
