"""Put DICOM frames in order along z: by their positions, or by their numbers where they have none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import IDENTITY, FloatArray, Matrix, Vector
from comir_hpc.volumes.readers.dicom.header import FACETS, Frame
from comir_hpc.volumes.readers.source import NO_THICKNESS, THICKNESS

_UNEVEN = 0.02  # share of a slice distance: positions are written with a few decimals
_SHEARED = 1e-3  # change of a unit vector: its numbers are written with a few decimals
# Facets that no two slices of one volume differ in; the others are times, which every slice may have of its own.
_TELLING = [
    k for k, words in FACETS.items() if words not in ("heart phases", "acquisitions") and "Time" not in k
]
_TELLING += ["EchoTime", "EffectiveEchoTime", "InversionTime"]


@dataclass(frozen=True)
class Stack:
    """Frames in the order of z, and where they lie (LPS, mm).

    Attributes
    ----------
    spacing_zyx : optional
        Voxel spacing along z, y, x in mm. None where the files do not say it: `says` is what they say.
    """

    frames: tuple[Frame, ...]
    spacing_zyx: Vector | None
    origin_xyz: Vector
    direction: Matrix
    says: str
    notes: tuple[str, ...]


def stacked(path: Path, frames: Sequence[Frame]) -> Stack:
    """Order the frames of one series.

    Parameters
    ----------
    path : Path
        Path that the user named, for errors.
    frames : sequence of Frame
        One frame or more, in any order.

    Raises
    ------
    VolumeError
        If they are no single even stack: several time points, a missing or double slice, slices of different
        size or orientation, a gantry tilt, or nothing that says their order.
    """
    _require_alike(path, frames)
    placed = [f for f in frames if f.position is not None]
    if placed and len(placed) < len(frames):
        lost = next(f for f in frames if f.position is None)
        raise VolumeError(
            f"{path}: {lost.name} has no ImagePositionPatient, {placed[0].name} has; export it again"
        )
    row, column, notes = _plane(path, frames[0])
    normal: FloatArray = np.cross(row, column)
    ordered, distance, order_notes = (
        _by_position(path, frames, normal) if placed else _by_number(path, frames)
    )
    first = ordered[0]
    says = first.says
    if len(ordered) == 1:
        # A single slice has no neighbour to measure to. Its thickness is what a slice is.
        distance = first.thickness or first.between
        if distance is None:
            distance, order_notes = THICKNESS, (*order_notes, NO_THICKNESS)
    elif distance is None:
        known = f"PixelSpacing is {first.spacing[0]:g} x {first.spacing[1]:g} mm" if first.spacing else says
        says = f"its slices have no ImagePositionPatient, so nothing says how far apart they are ({known})"
    elif says and placed:
        says = f"{says} (its slices are {distance:.4g} mm apart)"
    spacing = (distance, *first.spacing) if distance is not None and first.spacing else None
    origin = tuple(float(v) + 0.0 for v in (first.position or (0.0, 0.0, 0.0)))
    x, y, z = (tuple(float(v) + 0.0 for v in line) for line in np.column_stack([row, column, normal]))
    return Stack(
        tuple(ordered), spacing, origin, (x, y, z), says, (*notes, *order_notes)  # type: ignore[arg-type]
    )  # fmt: skip


# ---------------------------------------------------------------------- what must agree


def _require_alike(path: Path, frames: Sequence[Frame]) -> None:
    first = frames[0]
    facts: dict[str, list[object]] = {
        "size (rows, columns, samples)": [f.pixels.shape for f in frames],
        "kind of pixels": [f.pixels.photometric + " floats" * (f.pixels.kind == "f") for f in frames],
    }
    for what, found in facts.items():
        # The majority is right, so that the error names the stranger and not all the others.
        usual = Counter(found).most_common(1)[0][0]
        odd = next((k for k, fact in enumerate(found) if fact != usual), None)
        if odd is not None:
            raise VolumeError(
                f"{path}: the {what} of {frames[odd].name} is {found[odd]}, that of {frames[found.index(usual)].name} "
                f"{usual}; slices of one volume must agree: put the others in a folder of their own"
            )
    for frame in frames:
        # Headers are written with a few decimals, so equal slices may differ in the last one.
        if not _close(frame.spacing, first.spacing, rtol=1e-3, atol=0.0):
            raise VolumeError(
                f"{path}: PixelSpacing of {frame.name} is {frame.spacing} mm, that of {first.name} {first.spacing} mm; "
                "slices of one volume must agree: put the others in a folder of their own"
            )
        if not _close(frame.orientation, first.orientation, rtol=0.0, atol=1e-3):
            raise VolumeError(
                f"{path}: {frame.name} is oriented otherwise than {first.name}; put the slices of one orientation in a "
                "folder of their own"
            )


def _close(one: Sequence[float] | None, two: Sequence[float] | None, *, rtol: float, atol: float) -> bool:
    if one is None or two is None:
        return one is two
    return bool(np.allclose(one, two, rtol=rtol, atol=atol))


def _plane(path: Path, frame: Frame) -> tuple[FloatArray, FloatArray, tuple[str, ...]]:
    """Return the unit vectors along a row and along a column, made perpendicular."""
    if frame.orientation is None:
        matrix = np.asarray(IDENTITY)
        note = "the header has no ImageOrientationPatient: the slices are taken as axial, as ITK does"
        return matrix[:, 0], matrix[:, 1], (note,)
    said = np.asarray(frame.orientation).reshape(2, 3).T
    # The nearest pair of perpendicular unit vectors: headers have a few decimals, and rounding must not end as a
    # shear.
    left, _, right = np.linalg.svd(said, full_matrices=False)
    exact = left @ right
    if not np.allclose(exact, said, atol=_SHEARED):
        raise VolumeError(
            f"{path}: ImageOrientationPatient of {frame.name} is {frame.orientation}, which are no two perpendicular "
            "directions; export it again"
        )
    return exact[:, 0], exact[:, 1], ()


# ---------------------------------------------------------------------- by position


def _by_position(
    path: Path, frames: Sequence[Frame], normal: FloatArray
) -> tuple[list[Frame], float | None, tuple[str, ...]]:
    """Order frames from the lowest to the highest along the normal; return them with their distance in mm."""
    positions = np.asarray([f.position for f in frames], dtype=np.float64)
    # By height, not by instance number: numbers follow the scan, which may run from head to feet.
    order = np.argsort(positions @ normal, kind="stable")
    ordered, positions = [frames[i] for i in order], positions[order]
    if len(ordered) == 1:
        return ordered, None, ()
    height = positions @ normal
    steps = np.diff(height)
    # Several slices at one height make the mean smaller, by their number.
    same = steps <= 0.01 * steps.mean()
    if steps.mean() <= 0 or same.any():
        _refuse_double(path, ordered, positions, same)
    step = float(np.median(steps))
    worst = int(np.abs(steps - step).argmax())
    if abs(steps[worst] - step) > _UNEVEN * step:
        raise VolumeError(
            f"{path}: {ordered[worst].name} and {ordered[worst + 1].name} are {steps[worst]:.4g} mm apart, "
            f"the other slices {step:.4g} mm: a slice is missing or double; export the series again"
        )
    shifts = np.diff(positions, axis=0)
    sideways = float(np.linalg.norm(shifts - steps[:, None] * normal, axis=1).max())
    if sideways > _UNEVEN * step:
        raise VolumeError(
            f"{path}: each slice is shifted sideways by {sideways:.4g} mm against the next (gantry tilt); "
            "resample it on perpendicular axes first"
        )
    return ordered, float(height[-1] - height[0]) / (len(ordered) - 1), ()


def _refuse_double(path: Path, ordered: Sequence[Frame], positions: FloatArray, same: FloatArray) -> None:
    """Say what slices at one height are: time points, echoes, copies."""
    ends = [k + 1 for k, joined in enumerate([*same, False]) if not joined]
    groups = [ordered[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    several = max(groups, key=len)
    at = ordered.index(several[0])
    beside = np.linalg.norm(positions[at + 1] - positions[at]) > 1e-3
    words = f"{several[0].name} and {several[1].name}"
    if beside:
        raise VolumeError(
            f"{path}: {words} lie beside each other in one plane; expected one slice at each height"
        )
    found = _difference(several)
    if len({len(g) for g in groups}) > 1:
        said = f" ({found})" if found else ""
        raise VolumeError(
            f"{path}: {words} lie at one place{said}, other slices alone: a slice is double; export the series again"
        )
    named = found or f"{len(several)} slices"
    raise VolumeError(
        f"{path}: it holds {named} at each place (such as {words}), and a volume has one; put the slices of one of "
        "them in a folder of their own, or export one"
    )


def _difference(frames: Sequence[Frame], keywords: Sequence[str] = tuple(FACETS)) -> str:
    """Say what frames differ in, e.g. ``2 time points (TemporalPositionIdentifier 1, 2)``.

    The text is empty where nothing is known.
    """
    for keyword in keywords:
        values = list(dict.fromkeys(f.facets[keyword] for f in frames if keyword in f.facets))
        if len(values) > 1:
            shown = ", ".join(values[:4]) + (", ..." if len(values) > 4 else "")
            return f"{len(values)} {FACETS[keyword]} ({keyword} {shown[:100]})"
    return ""


# ---------------------------------------------------------------------- by number


def _by_number(path: Path, frames: Sequence[Frame]) -> tuple[list[Frame], float | None, tuple[str, ...]]:
    """Order frames without a position: as in the file, or by InstanceNumber."""
    lost = "no ImagePositionPatient: the first voxel is taken to lie at 0"
    if len(frames) == 1:
        return list(frames), None, (lost,)
    in_time = next((f.in_time for f in frames if f.in_time), "")
    if in_time:
        raise VolumeError(
            f"{path}: its {len(frames)} frames follow each other in time ({in_time}); export one time point as a volume"
        )
    if found := _difference(frames, _TELLING):
        raise VolumeError(f"{path}: it holds {found}, and a volume has one; export one of them")
    files = {f.pixels.file for f in frames}
    if len(files) == 1:
        ordered, words = list(frames), "the file"
    else:
        ordered, words = _numbered(path, frames), "InstanceNumber"
    _require_even_locations(path, ordered)
    between = {f.between for f in frames}
    distance = between.pop() if len(between) == 1 else None
    return (
        ordered,
        distance,
        (f"{lost}, and the slices in the order of {words} along z",),
    )


def _numbered(path: Path, frames: Sequence[Frame]) -> list[Frame]:
    lost = next((f for f in frames if f.instance is None or f.pixels.frames > 1), None)
    if lost is not None:
        raise VolumeError(
            f"{path}: {lost.name} has neither ImagePositionPatient nor an InstanceNumber of one slice: nothing says "
            "the order of the slices; export it again"
        )
    ordered = sorted(frames, key=lambda f: f.instance or 0)
    steps = [(two.instance or 0) - (one.instance or 0) for one, two in pairwise(ordered)]
    for (one, two), step in zip(pairwise(ordered), steps, strict=True):
        if step == 0:
            raise VolumeError(
                f"{path}: {one.name} and {two.name} have one InstanceNumber, {one.instance}; export it again"
            )
        if step > min(filter(None, steps)):
            raise VolumeError(
                f"{path}: a slice is missing between {one.name} (InstanceNumber {one.instance}) and {two.name} "
                f"({two.instance}); export the series again"
            )
    return ordered


def _require_even_locations(path: Path, ordered: Sequence[Frame]) -> None:
    """Refuse an order that SliceLocation contradicts."""
    known = [f.location for f in ordered if f.location is not None]
    if len(known) < len(ordered) or len(set(known)) == 1 < len({f.pixels.file for f in ordered}) == 1:
        return
    steps = np.diff(known)
    step = float(np.median(steps))
    worst = int(np.abs(steps - step).argmax())
    if abs(steps[worst] - step) > _UNEVEN * abs(step) or step == 0:
        raise VolumeError(
            f"{path}: in the order of InstanceNumber, SliceLocation goes from {known[worst]:g} ({ordered[worst].name}) "
            f"to {known[worst + 1]:g} ({ordered[worst + 1].name}), elsewhere by {step:g} mm: the slices are out of "
            "order, missing or double; export the series with ImagePositionPatient"
        )
