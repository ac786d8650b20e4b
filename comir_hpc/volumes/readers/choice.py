"""Which array of a file is meant, where the user named none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from comir_hpc.errors import VolumeError

_LISTED = 8  # arrays that an error names: it stays one line
Arrays = Mapping[str, tuple[tuple[int, ...], str]]


def only(path: Path, found: Arrays) -> str:
    """Return the name of the one array of three axes or more or, where there is none, the one of two.

    Parameters
    ----------
    found : mapping
        Shape and type of every array, by the array's name.

    Raises
    ------
    VolumeError
        If there are several such arrays or none; the message lists the names.
    """
    volumes = [name for name, (shape, _) in found.items() if len(shape) >= 3]
    slices = [name for name, (shape, _) in found.items() if len(shape) == 2]
    if len(volumes or slices) == 1:
        return (volumes or slices)[0]
    raise VolumeError(
        f"{path} holds {len(volumes)} arrays of three axes or more; name one with --dataset NAME. "
        f"It holds {listed(found)}"
    )


def listed(found: Arrays) -> str:
    """Say names, shapes and types of the first arrays in words."""
    lines = [f"{name} {'x'.join(map(str, shape))} {dtype}" for name, (shape, dtype) in found.items()]
    more = f", and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
    return ", ".join(lines[:_LISTED]) + more if lines else "no arrays"
