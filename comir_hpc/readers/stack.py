"""Several files as one volume: tiles that follow each other along z."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.geometry import Box
from comir_hpc.readers.source import Source


def by_number(files: Sequence[Path]) -> list[Path]:
    """Files in the order of the numbers in their names: 2 before 10."""
    return sorted(files, key=lambda f: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", f.name)])


def tiles_along_z(path: Path, files: Sequence[Path], opened: Callable[[Path], Source]) -> Source:
    """Volumes in a folder, one behind the other along z in the order of the numbers in their names.

    Where the files say where they lie, the first one's word counts for all.

    Raises
    ------
    VolumeError
        If they differ in size along y or x, channels, type, spacing, unit or direction.
    """
    ordered = by_number(files)
    sources = [opened(file) for file in ordered]
    for source in sources[1:]:
        _require_alike(path, sources[0], source)
    tiles = _Tiles(tuple(sources))
    first, depth = sources[0], sum(s.shape[1] for s in sources)
    return replace(
        first, path=path, kind=f"tiles of {first.kind}", shape=(first.shape[0], depth, *first.shape[2:]),
        read_box=tiles.read, files=tuple(f for s in sources for f in s.files),
        load_bytes=sum(s.load_bytes for s in sources),
        notes=(*first.notes, f"{path.name}: {len(ordered)} tiles from {ordered[0].name} to {ordered[-1].name}, "
               "in this order along z"),
    )  # fmt: skip


def _require_alike(path: Path, first: Source, other: Source) -> None:
    for what, one, two in (
        ("channels, y and x", (first.shape[0], *first.shape[2:]), (other.shape[0], *other.shape[2:])),
        ("type", first.dtype, other.dtype),
        ("spacing (z, y, x)", first.spacing_zyx, other.spacing_zyx),
        ("unit", first.unit, other.unit),
        ("direction", first.direction, other.direction),
    ):
        if one != two:
            raise VolumeError(
                f"{other.path}: its {what} is {two}, that of {first.path} is {one}; tiles of one volume in {path} must "
                "agree: move it away or export it again"
            )


@dataclass(frozen=True)
class _Tiles:
    sources: tuple[Source, ...]

    def read(self, box: Box) -> NDArray[Any]:
        """Voxels of `box` as (c, z, y, x)."""
        pieces, top = [], 0
        for source in self.sources:
            shift = (-top, 0, 0)
            part = box.shifted(shift).intersect(Box((0, 0, 0), source.shape_zyx))
            if part.size:
                pieces.append(source.read(part))
            top += source.shape[1]
        return np.concatenate(pieces, axis=1) if len(pieces) > 1 else pieces[0]
