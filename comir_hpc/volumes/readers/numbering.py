"""Find the series of slices or tiles among the files of a folder, by the numbers in their names.

A name says the place of a slice by one number that varies: the others are constant, or rise together with it.
Everything else is no series that could be read without a guess, and is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError

# A minus belongs to a number at the start of a name or behind another separator: z_-5, but img-005.
_NUMBER = re.compile(r"((?:(?<=[_ =])-|^-)?\d+)")
# What stands before a number that counts something other than places along z.
_NO_PLACE = {
    "c": "channels", "ch": "channels", "chan": "channels", "channel": "channels", "wavelength": "channels",
    "t": "time points", "tp": "time points", "time": "time points", "timepoint": "time points", "echo": "echoes",
    "sub": "subjects", "subject": "subjects", "ses": "sessions", "session": "sessions", "run": "runs",
}  # fmt: skip
_OWN_FOLDER = "in a folder of their own (links will do)"


@dataclass(frozen=True)
class NumberedFiles:
    """Files whose names differ in a number.

    What was left out is kept, so that the user is told of a stray file or a forgotten slice.

    Attributes
    ----------
    files : tuple of Path
        Files of the series, ordered by that number.
    step : int
        Amount by which the number grows from one file to the next.
    left_out : tuple of Path
        Files of the folder that do not belong to the series.
    """

    files: tuple[Path, ...]
    step: int
    left_out: tuple[Path, ...]

    def notes(self, what: str) -> tuple[str, ...]:
        """Tell the user what was read (`what` names the files, e.g. ``slices``), and what was left out."""
        first, last = self.files[0].name, self.files[-1].name
        read = f"{len(self.files)} {what} from {first} to {last}, in this order along z"
        if len(self.files) == 1:
            read = f"{first} is read, the only one of its kind"
        if self.step != 1:
            read += f"; their numbers grow by {self.step}, which is taken as one step"
        return (read, *left_out_note(self.left_out))


def left_out_note(files: Sequence[Path]) -> tuple[str, ...]:
    """Note files of a folder that were not read; return nothing where there are none."""
    return (f"left out: {listed(files)}",) if files else ()


def listed(files: Sequence[Path]) -> str:
    """List the names of the first files, and how many more there are."""
    names = sorted(f.name for f in files)
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more


def numbered_files(path: Path, files: Sequence[Path], *, tiles: bool = False) -> NumberedFiles:
    """Find the one series of numbered files.

    Parameters
    ----------
    path : Path
        Path of the folder, for errors.
    files : sequence of Path
        One or more files of one kind.
    tiles : bool
        Whether each file is a volume of its own, and not a slice.

    Raises
    ------
    VolumeError
        If there are several series or none, several numbers vary, one is missing or double, or what varies is the
        number of a channel or of a time point.
    """
    groups = _groups(files)
    several = [g for g in groups.values() if len(g) > 1]
    if len(files) == 1:
        return NumberedFiles(tuple(files), 1, ())
    if len(several) != 1 or 2 * len(several[0]) < len(files):
        _refuse_series(path, files, several)
    (series,) = several
    texts = next(t for t, g in groups.items() if g is series)
    ordered, step = _ordered(path, series, texts, tiles=tiles)
    return NumberedFiles(tuple(ordered), step, tuple(f for f in files if f not in set(series)))


def series_among(files: Sequence[Path]) -> bool:
    """Say whether two or more of the files have names that differ in numbers alone."""
    return any(texts[1:] and len(group) > 1 for texts, group in _groups(files).items())


def _groups(files: Sequence[Path]) -> dict[tuple[str, ...], list[Path]]:
    """Group files by what their names are around the numbers."""
    groups: dict[tuple[str, ...], list[Path]] = {}
    for file in sorted(files):
        groups.setdefault(tuple(_NUMBER.split(file.stem.casefold())[::2]), []).append(file)
    return groups


def _refuse_series(path: Path, files: Sequence[Path], several: Sequence[Sequence[Path]]) -> None:
    if len(several) > 1:
        named = [f"{g[0].name} to {g[-1].name} ({len(g)} files)" for g in several]
        more = "; ..." if len(named) > 5 else ""
        raise VolumeError(
            f"{path} holds {len(several)} series: {'; '.join(named[:5])}{more}; a volume is one of them (they may be "
            f"channels): put the files of one {_OWN_FOLDER}"
        )
    raise VolumeError(
        f"{path}: nothing in the names of {listed(files)} says their order; expected one series whose names differ in "
        f"a number, such as slice_001 and slice_002: rename them, or put what belongs together {_OWN_FOLDER}"
    )


def _ordered(
    path: Path, files: Sequence[Path], texts: Sequence[str], *, tiles: bool
) -> tuple[list[Path], int]:
    """Order files by the number that varies; return them and its step."""
    # Python's integers: a date with its time has more digits than an int64 takes.
    numbers = np.asarray([[int(n) for n in _NUMBER.split(f.stem)[1::2]] for f in files], dtype=object)
    order = sorted(range(len(files)), key=lambda i: tuple(numbers[i]))
    ordered, numbers = [files[i] for i in order], numbers[order]
    varying = [k for k in range(numbers.shape[1]) if len(set(numbers[:, k])) > 1]
    rising = [k for k in varying if all(b > a for a, b in pairwise(numbers[:, k]))]
    if len(varying) > max(1, len(rising)):
        _refuse_two(path, ordered, numbers, texts, varying)
    if not rising:
        one, two = next(
            pair for pair in pairwise(range(len(files))) if (numbers[pair[0]] == numbers[pair[1]]).all()
        )
        raise VolumeError(
            f"{path}: {ordered[one].name} and {ordered[two].name} have one number; remove one of them"
        )
    # Where numbers rise together, the one with the fewest gaps counts the slices.
    column = min(rising, key=lambda k: _gaps(numbers[:, k].tolist())[1])
    _require_place(path, ordered, _word(texts[column], lone=tiles or column > 0))
    lost, count, step = _gaps(numbers[:, column].tolist())
    if count:
        names = ", ".join(_renamed(ordered[0], column, n) for n in lost)
        more = f" and {count - len(lost)} more" if count > len(lost) else ""
        raise VolumeError(
            f"{path}: {names}{more} missing between {ordered[0].name} and {ordered[-1].name}; a gap would shift "
            "everything behind it: copy or export the series again"
        )
    return ordered, step


def _require_place(path: Path, files: Sequence[Path], word: str) -> None:
    """Refuse numbers that stand behind a word for something else than a place."""
    if word in _NO_PLACE:
        raise VolumeError(
            f"{path}: {files[0].name} to {files[-1].name} are numbered as {_NO_PLACE[word]} ({word!r} before the "
            f"number), not as places along z; put those of one {_OWN_FOLDER}, or rename them if they are places"
        )


def _refuse_two(
    path: Path,
    files: Sequence[Path],
    numbers: NDArray[np.object_],
    texts: Sequence[str],
    varying: Sequence[int],
) -> None:
    counted = []
    for k in varying[:3]:
        values, word = set(numbers[:, k]), _word(texts[k], lone=True)
        counted.append(f"{word} {min(values)} to {max(values)} ({len(values)})".strip())
    raise VolumeError(
        f"{path}: {len(varying)} numbers vary in the names from {files[0].name} to {files[-1].name}: "
        f"{', '.join(counted)}; these are several channels or time points: put the slices of one {_OWN_FOLDER}"
    )


def _gaps(numbers: Sequence[int]) -> tuple[list[int], int, int]:
    """Return the first numbers that lack in a rising sequence, how many numbers lack, and its step."""
    step = math.gcd(*(b - a for a, b in pairwise(numbers)))
    lost = chain.from_iterable(range(a + step, b, step) for a, b in pairwise(numbers))
    count = sum((b - a) // step - 1 for a, b in pairwise(numbers))
    return list(islice(lost, 5)), count, step


def _word(text: str, *, lone: bool) -> str:
    """Return the word right before a number.

    A name may begin with any one letter (t001.tif), which is no word unless `lone` ones count.
    """
    found = re.search(r"(?:^|[^a-z])([a-z]+)[ _=-]*$", text)
    return found.group(1) if found and (lone or len(text) > 1) else ""


def _renamed(file: Path, column: int, number: int) -> str:
    parts = _NUMBER.split(file.stem)
    parts[2 * column + 1] = str(number).zfill(len(parts[2 * column + 1]))
    return "".join(parts) + file.suffix
