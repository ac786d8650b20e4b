"""Voxel size in a TIFF file: OME-XML, ImageJ's metadata, those of some microscopes, and the resolution tags."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import tifffile

from comir_hpc.space.grid import Vector
from comir_hpc.volumes.readers.lengths import grid_unit, in_one_unit, mm_of
from comir_hpc.volumes.readers.source import NO_THICKNESS, THICKNESS


@dataclass(frozen=True)
class Calibration:
    """Spacing (z, y, x) and unit where the file knows all three, and in words what it says otherwise."""

    spacing: Vector | None = None
    unit: str | None = None
    says: str = ""


def calibration(
    file: tifffile.TiffFile, number: int, page: Any, planar: bool, damage: str = ""
) -> Calibration:
    """Find the voxel size of one series.

    Parameters
    ----------
    number : int
        Number of the series in the file, from 0.
    page : tifffile.TiffPage
        First page of the series.
    planar : bool
        Whether it is a single slice, which has a spacing without a thickness, too.
    damage : str
        Words for what is wrong with the file's OME metadata, if they cannot be used.
    """
    if damage:
        return Calibration(says=damage)
    if file.is_ome and file.ome_metadata:
        return _ome(file, number, planar)
    resolution = _resolution(page)
    if file.is_imagej and file.imagej_metadata:
        return _imagej(file.imagej_metadata, resolution, planar)
    if file.is_lsm and file.lsm_metadata:
        sizes = [file.lsm_metadata.get(f"VoxelSize{axis}") for axis in "ZYX"]
        return _named(sizes, ["m"] * 3, "um", planar, "LSM metadata")
    if file.is_svs:
        return _slide(page, planar)
    if resolution is not None and page.tags.valueof(296, 1) in (2, 3):
        mm = 25.4 if page.tags.valueof(296) == 2 else 10.0
        y, x = resolution[0] * mm, resolution[1] * mm
        return Calibration(says=f"its resolution tags say y {y:.4g} mm, x {x:.4g} mm and nothing about z")
    return Calibration()


def declared_planes(text: str) -> dict[str, int]:
    """Find the sizes along Z, C and T that stand in the text of OME-XML, for its first image.

    The XML need not be well-formed.
    """
    found = {}
    for axis in "ZCT":
        size = re.search(rf'Size{axis}\s*=\s*["\'](\d+)["\']', text)
        if size:
            found[axis] = int(size[1])
    return found


def _named(sizes: Sequence[Any], units: Sequence[str], unit: str, planar: bool, where: str) -> Calibration:
    """Make a spacing from three numbers (z, y, x) with units, in the unit `unit`; a slice needs no z."""
    values = [_positive(size) for size in sizes]
    says = ""
    if values[0] is None and planar:
        values[0], says = THICKNESS, NO_THICKNESS
        units = (unit, *units[1:])
    if None in values:
        text = ", ".join(f"{axis} {size}" for axis, size in zip("zyx", sizes, strict=True))
        return Calibration(says=f"its {where} say {text}")
    known = grid_unit(unit)
    z, y, x = in_one_unit(values, units, known)  # type: ignore[arg-type]
    return Calibration((z, y, x), known, says)


def _positive(value: Any) -> float | None:
    """Read a number above zero, or None of anything else (a text with a decimal comma)."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 < number < float("inf") else None


def _resolution(page: Any) -> tuple[float, float] | None:
    """Read the units per pixel along y and x from the resolution tags."""
    tags = [page.tags.valueof(code) for code in (283, 282)]
    if any(t is None or not t[0] or not t[1] for t in tags):
        return None
    (yn, yd), (xn, xd) = tags
    return yd / yn, xd / xn


# ---------------------------------------------------------------------- ImageJ, Aperio


def _imagej(metadata: dict[str, Any], resolution: tuple[float, float] | None, planar: bool) -> Calibration:
    """Read ImageJ's calibration: `unit` is that of x, and of y and z where they have none of their own."""
    name = str(metadata.get("unit", "")).strip()
    names = [str(metadata.get(key, name)).strip() or name for key in ("zunit", "yunit")] + [name]
    for unit in names[::-1]:
        if mm_of(unit) is None:
            return Calibration(says=f"ImageJ's unit is {unit!r}, which is no length" if unit else "")
    depth = metadata.get("spacing")
    if resolution is None or (depth is None and not planar):
        return Calibration(
            says=f"ImageJ's metadata has {'no slice spacing' if resolution else 'no resolution'}"
        )
    if not isinstance(depth, int | float) or depth >= 0:
        return _named((depth, *resolution), names, name, planar, "ImageJ metadata")
    # Some programs write the direction in which the stage moved.
    found = _named((-depth, *resolution), names, name, planar, "ImageJ metadata")
    return replace(found, says=f"ImageJ's slice spacing is {depth}: its sign is left out, as ImageJ does")


def _slide(page: Any, planar: bool) -> Calibration:
    """Read Aperio's pixel size, in micrometres."""
    size = re.search(r"MPP\s*=\s*([\d.]+)", page.description or "")
    if size is None:
        return Calibration(says="its description has no MPP")
    return _named((None, size[1], size[1]), ["um"] * 3, "um", planar, "pixel sizes (MPP)")


# ---------------------------------------------------------------------- OME


def _ome(file: tifffile.TiffFile, number: int, planar: bool) -> Calibration:
    images = [e for e in ET.fromstring(file.ome_metadata or "").iter() if e.tag.rsplit("}")[-1] == "Image"]
    pixels = [next((p.attrib for p in e.iter() if p.tag.rsplit("}")[-1] == "Pixels"), {}) for e in images]
    if len(images) == 1 or len(images) == len(file.series):
        return _ome_pixels(pixels[number if len(images) > 1 else 0], planar)
    # Which of them is the series is not known: they must agree.
    found = {_ome_pixels(attributes, planar) for attributes in pixels}
    if len(found) == 1:
        return found.pop()
    return Calibration(says=f"its OME metadata name {len(images)} images with several voxel sizes")


def _ome_pixels(pixels: dict[str, str], planar: bool) -> Calibration:
    """Read the voxel size from the attributes of one Pixels element.

    A missing unit is the micrometre, the schema's default.
    """
    sizes = [pixels.get(f"PhysicalSize{axis}") for axis in "ZYX"]
    units = [pixels.get(f"PhysicalSize{axis}Unit", "µm") for axis in "ZYX"]
    wrong = []
    for axis, size, unit in zip("ZYX", sizes, units, strict=True):
        if size is None and not (planar and axis == "Z"):
            wrong.append(f"lacks PhysicalSize{axis}")
        elif size is not None and _positive(size) is None:
            wrong.append(f"has PhysicalSize{axis} {size!r}, which is no positive number")
        elif size is not None and mm_of(unit) is None:
            wrong.append(f"has PhysicalSize{axis}Unit {unit!r}, which is no length")
    if wrong:
        return Calibration(says=f"its OME metadata {', '.join(wrong)}")
    return _named(sizes, units, units[2], planar, "OME metadata")
