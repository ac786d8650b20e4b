"""Order of an array's axes where the file names them.

The order is never guessed against the file's word: names that are not understood refuse the file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from comir_hpc.errors import VolumeError
from comir_hpc.volumes.readers.source import axes_of

_LETTERS = {
    "z": "z", "depth": "z", "slice": "z", "plane": "z",
    "y": "y", "row": "y", "height": "y",
    "x": "x", "col": "x", "column": "x", "width": "x",
    "c": "c", "channel": "c", "channels": "c", "band": "c",
    "t": "t", "time": "t", "frame": "t",
}  # fmt: skip
# What xarray and others write when nobody named an axis.
_NO_NAME = re.compile(r"|dim_?\d+|phony_dim_\d+|none")


def axis_letter(name: object) -> str | None:
    """Return the letter of ``tczyx`` that a name means, ``""`` for no name, or None for one that is not understood."""
    text = "" if name is None else str(name).strip().lower()
    return "" if _NO_NAME.fullmatch(text) else _LETTERS.get(text)


def named_axes(
    names: Sequence[object], shape: Sequence[int], path: Path, where: str
) -> tuple[str, tuple[str, ...]]:
    """Read the axes of an array from the names in its file: letters for `cut`, and notes on what was assumed.

    Without any name the array is taken as `axes_of` says.

    Parameters
    ----------
    names : sequence
        Names of the axes, in the order of the array's axes.
    where : str
        Name of what holds the names, for the error, e.g. ``axistags``.

    Raises
    ------
    VolumeError
        If the names do not say which axes are y and x, stand twice, or name several time points.
    """
    letters = [axis_letter(name) for name in names]
    if not any(letter != "" for letter in letters):
        return axes_of(shape, path)
    told = f"{path}: its {where} name the axes ({', '.join(map(str, names))}) of {tuple(shape)}"
    if len(letters) != len(shape):
        raise VolumeError(f"{told}; expected one name for each axis: correct the names in the file")
    return letters_for_cut([letter or "?" for letter in letters], shape, told), ()


def letters_for_cut(letters: Sequence[str], shape: Sequence[int], told: str) -> str:
    """Turn one of ``tczyx?`` an axis into the letters of `cut`; an axis of length 1 that is not space counts as none.

    Parameters
    ----------
    told : str
        Axes as the file names them, in words, for the error.

    Raises
    ------
    VolumeError
        If what is left is no single volume with at most one axis of channels.
    """
    used = "".join(
        letter if letter in "zyx" or (letter == "c" and n > 1) else "1" if n == 1 else letter
        for letter, n in zip(letters, shape, strict=True)
    )
    if "t" in used:
        count = shape[used.index("t")]
        raise VolumeError(f"{told}: {count} time points; extract one of them as a volume of its own")
    left = used.replace("1", "")
    if not set("yx") <= set(left) <= set("czyx") or len(set(left)) < len(left):
        raise VolumeError(
            f"{told}; expected z, y, x (or y, x), at most one axis of channels, and one time point: "
            "correct the names in the file, or export it again"
        )
    return used
