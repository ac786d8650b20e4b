"""Several volumes as one: tiles that lie beside each other, by their places or by the numbers in their names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import Box, FloatArray
from comir_hpc.volumes.readers.numbering import NumberedFiles, left_out_note, numbered_files
from comir_hpc.volumes.readers.source import Source

# Formats that always have an origin: all zeros are a place there, and say nothing elsewhere.
_WITH_PLACE = ("NIfTI", "Analyze", "MGH", "NRRD", "MetaImage", "DICOM")
# Voxels by which a tile may lie off the grid of the first: origins are written with a few decimals.
_AWRY = 0.05


def tiles(
    path: Path, files: Sequence[Path], opened: Callable[[Path], Source], strangers: Sequence[Path] = ()
) -> Source:
    """Join the volumes of one format in a folder to one volume.

    Where the files say where they lie, they are put there, and must not overlap; holes between them are stored as 0,
    with a note. Formats that have no place for it are put one behind the other along z, in the order of the numbers
    in their names.

    Parameters
    ----------
    files : sequence of Path
        The tiles' files, two or more.
    opened : callable
        Function that opens one of the files and returns its source.
    strangers : sequence of Path
        Files of the folder that are no tiles, for the notes.

    Raises
    ------
    VolumeError
        If they differ in channels, type, spacing, unit or direction, overlap, or leave
        more of the box around them empty than they fill.
    """
    ordered = sorted(files)
    sources = {file: opened(file) for file in ordered}
    beside = {f.resolve() for s in sources.values() for f in s.files}
    strangers = [f for f in strangers if f.resolve() not in beside]  # the voxels of a header are none
    origins = {s.origin_xyz for s in sources.values()}
    placeless = all(not s.kind.startswith(_WITH_PLACE) or s.spacing_zyx is None for s in sources.values())
    if placeless and origins == {(0.0, 0.0, 0.0)}:
        found = numbered_files(path, ordered, tiles=True)
        return _by_number(path, replace(found, left_out=(*found.left_out, *strangers)), sources)
    return _by_place(path, list(sources.values()), strangers)


def _by_number(path: Path, found: NumberedFiles, opened: dict[Path, Source]) -> Source:
    sources = [opened[file] for file in found.files]
    for source in sources[1:]:
        _require_alike(path, sources[0], source)
    starts = np.zeros((len(sources), 3), dtype=np.int64)
    starts[1:, 0] = np.cumsum([s.shape[1] for s in sources])[:-1]
    return _joined(path, sources, _boxes(sources, starts), found.notes("tiles"))


def _by_place(path: Path, sources: Sequence[Source], strangers: Sequence[Path]) -> Source:
    first = sources[0]
    for source in sources[1:]:
        _require_alike(path, first, source, placed=True)
    if first.spacing_zyx is None:
        raise VolumeError(
            f"{path}: {first.path.name} says where it lies and not its spacing, so tiles cannot be put together; "
            "write the spacing into the files"
        )
    starts = _starts(path, sources, np.asarray(first.spacing_zyx))
    # Sorted by place, so that names and notes do not depend on how the files are called.
    order = sorted(range(len(sources)), key=lambda i: tuple(starts[i]))
    sources = [sources[i] for i in order]
    boxes = _boxes(sources, starts[order])
    _require_apart(path, sources, boxes)
    names = f"from {sources[0].path.name} to {sources[-1].path.name}"
    axes = [axis for axis, at in zip("zyx", starts.T, strict=True) if np.ptp(at)]
    note = f"{len(sources)} tiles {names}, put along {' and '.join(axes)} where their origins say"
    notes = (note, *_hole_note(path, sources, boxes), *left_out_note(strangers))
    return _joined(path, sources, boxes, notes)


def _require_alike(path: Path, first: Source, other: Source, *, placed: bool = False) -> None:
    sizes = [
        ("channels", first.shape[:1], other.shape[:1])
        if placed
        else ("channels, y and x", (first.shape[0], *first.shape[2:]), (other.shape[0], *other.shape[2:])),
    ]
    for what, one, two in (
        *sizes,
        ("type", first.dtype, other.dtype),
        ("spacing (z, y, x)", first.spacing_zyx, other.spacing_zyx),
        ("unit", first.unit, other.unit),
        ("direction", first.direction, other.direction),
    ):
        if one != two and not (what.startswith(("spacing", "direction")) and _near(one, two)):
            raise VolumeError(
                f"{other.path}: its {what} is {two}, that of {first.path} is {one}; tiles of one volume in {path} must "
                "agree: move it away or export it again"
            )


def _near(one: Any, two: Any) -> bool:
    """Return whether spacings or directions are equal up to the rounding of a header."""
    try:
        return bool(np.allclose(np.asarray(one, float), np.asarray(two, float), rtol=1e-5, atol=1e-6))
    except (TypeError, ValueError):
        return False


def _starts(path: Path, sources: Sequence[Source], spacing_zyx: FloatArray) -> NDArray[np.int64]:
    """Return the first voxel (z, y, x) of each source on the grid of the first."""
    first = sources[0]
    away = np.asarray([s.origin_xyz for s in sources]) - np.asarray(first.origin_xyz)
    # The inverse of a direction is its transpose.
    places = (away @ np.asarray(first.direction))[:, ::-1] / spacing_zyx
    starts = np.rint(places)
    off = np.abs(places - starts).max(axis=1)
    worst = int(off.argmax())
    if off[worst] > _AWRY:
        at = ", ".join(f"{v:.4g}" for v in places[worst])
        raise VolumeError(
            f"{path}: {sources[worst].path.name} lies {at} voxels (z, y, x) from {first.path.name}, which is no whole "
            "number: they are not tiles of one grid; put each in a folder of its own"
        )
    whole: NDArray[np.int64] = starts.astype(np.int64)
    return whole


def _require_apart(path: Path, sources: Sequence[Source], boxes: Sequence[Box]) -> None:
    """Refuse tiles that hold the same place."""
    starts, stops = np.asarray([b.start for b in boxes]), np.asarray([b.stop for b in boxes])
    for i, source in enumerate(sources):
        # Against all later ones at once: thousands of tiles have millions of pairs.
        common = np.minimum(stops[i], stops[i + 1 :]) - np.maximum(starts[i], starts[i + 1 :])
        over = np.flatnonzero((common > 0).all(axis=1))
        if over.size:
            other, size = sources[i + 1 + over[0]], " x ".join(map(str, common[over[0]]))
            raise VolumeError(
                f"{path}: {source.path.name} and {other.path.name} both hold {size} voxels (z, y, x) of one place; "
                "tiles must not overlap, and two images of one place (modalities, channels) are two volumes: ingest "
                "each file"
            )


def _hole_note(path: Path, sources: Sequence[Source], boxes: Sequence[Box]) -> tuple[str, ...]:
    """Note voxels that no tile holds; refuse them where they are more than those of the tiles."""
    whole = math.prod(max(b.stop[axis] for b in boxes) for axis in range(3))
    filled = sum(b.size for b in boxes)
    if filled == whole:
        return ()
    gap = _widest_gap(sources, boxes)
    # Half is a coarse bound: a real mosaic misses corners, and two far parts of one are two volumes.
    if 2 * filled < whole:
        raise VolumeError(
            f"{path}: its {len(sources)} tiles hold {filled} of the {whole} voxels of the box around them{gap}; add "
            "the tiles that are missing, or put some in a folder of their own"
        )
    return (f"{whole - filled} of {whole} voxels are in no file and are stored as 0{gap}",)


def _widest_gap(sources: Sequence[Source], boxes: Sequence[Box]) -> str:
    """Say where the widest empty layer across the whole volume lies."""
    widest, words = 0, ""
    for axis, name in enumerate("zyx"):
        order = sorted(range(len(boxes)), key=lambda i: boxes[i].start[axis])
        last = order[0]
        for i in order[1:]:
            gap = boxes[i].start[axis] - boxes[last].stop[axis]
            if gap > widest:
                size = gap * (sources[0].spacing_zyx or (1, 1, 1))[axis]
                widest, words = gap, (
                    f" (between {sources[last].path.name} and {sources[i].path.name}, {gap} voxels, {size:.4g} "
                    f"{sources[0].unit}, along {name})"
                )  # fmt: skip
            last = max(last, i, key=lambda k: boxes[k].stop[axis])
    return words


def _joined(path: Path, sources: Sequence[Source], boxes: Sequence[Box], notes: Sequence[str]) -> Source:
    first = sources[0]
    # No tile needs to lie at the corner itself.
    back = np.asarray(boxes[0].start[::-1]) * (first.spacing_zyx or (1.0, 1.0, 1.0))[::-1]
    ox, oy, oz = (float(v) for v in np.asarray(first.origin_xyz) - np.asarray(first.direction) @ back)
    z, y, x = (max(box.stop[axis] for box in boxes) for axis in range(3))
    name = path.resolve().name
    return replace(
        first, path=path, kind=f"tiles of {first.kind}", shape=(first.shape[0], z, y, x),
        origin_xyz=(ox, oy, oz), read_box=_Tiles(tuple(sources), tuple(boxes)).read,
        files=tuple(f for s in sources for f in s.files),
        load_bytes=sum(s.load_bytes for s in sources),
        notes=tuple(dict.fromkeys([*first.notes, *(f"{name}: {note}" for note in notes)])),
    )  # fmt: skip


def _boxes(sources: Sequence[Source], starts: NDArray[np.int64]) -> list[Box]:
    """Return where each source lies in the whole, whose first voxel is 0."""
    starts = starts - starts.min(axis=0)
    return [
        Box((int(z), int(y), int(x)), (int(z) + s.shape[1], int(y) + s.shape[2], int(x) + s.shape[3]))
        for s, (z, y, x) in zip(sources, starts, strict=True)
    ]


@dataclass(frozen=True)
class _Tiles:
    sources: tuple[Source, ...]
    boxes: tuple[Box, ...]

    def read(self, box: Box) -> NDArray[Any]:
        """Read the voxels of `box` as (c, z, y, x)."""
        first = self.sources[0]
        # Places in no tile stay 0.
        out = np.zeros((first.num_channels, *box.shape), dtype=first.dtype)
        for source, place in zip(self.sources, self.boxes, strict=True):
            common = place.intersect(box)
            if common.size:
                inside = common.shifted([-a for a in box.start])
                out[(slice(None), *inside.slices)] = source.read(common.shifted([-a for a in place.start]))
        return out
