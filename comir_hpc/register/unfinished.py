"""Keep what a registration has found when the scheduler stops it: its search, which is most of its time.

The search's answers are written when it is done, into the folder of the result, and removed when the result is there.
The same command then goes on behind the search. A request to stop is looked for whenever progress is said, which is
many times a second, so that the process ends within the grace that schedulers give.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from comir_hpc.config.words import FALLBACKS
from comir_hpc.errors import StopRequested
from comir_hpc.host.files import written_whole
from comir_hpc.host.progress import Progress
from comir_hpc.host.signals import stop_signals
from comir_hpc.register.global_search import Search
from comir_hpc.register.starts import Initial, Start
from comir_hpc.transforms.affine import Affine as Transform

KEPT_FILE = "unfinished.npz"
_ARRAYS = ("rotations_xyz", "pivots_mm", "scores", "overlaps", "moving_centre_mm")


@contextmanager
def stoppable(folder: Path, progress: Progress | None) -> Iterator[Progress]:
    """Give a `progress` that ends the work when the scheduler asks for it.

    Raises
    ------
    StopRequested
        From inside `progress`, after SIGTERM or SIGUSR2.
    """
    with stop_signals() as stop:

        def told(what: str, done: int, total: int) -> None:
            if stop.is_set():
                kept = f"its search is kept in {folder / KEPT_FILE}" if (folder / KEPT_FILE).is_file() else ""
                raise StopRequested(
                    f"stopped on request during {what}; {kept or 'the search was not done'}, and the same command "
                    "goes on"
                )
            if progress is not None:
                progress(what, done, total)

        yield told


def keep(file: Path, fingerprint: str, found: Initial) -> None:
    """Write what a search has found to a file. Without a search there is nothing to keep.

    Raises
    ------
    OSError
        If the file system refuses, e.g. because the disk is full.
    """
    search = found.search
    if search is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: getattr(search, name) for name in _ARRAYS}
    with written_whole(file) as spare, spare.open("wb") as opened:
        np.savez(
            opened,
            fingerprint=fingerprint,
            start_matrices=np.stack([start.matrix_mm for start, _ in found.starts]),
            start_centres=np.stack([start.centre_mm for start, _ in found.starts]),
            # The file holds plain arrays only, since pickled objects would run code when it is read: NaN stands for
            # no score.
            start_scores=np.asarray([np.nan if score is None else score for _, score in found.starts]),
            left=-1 if found.left is None else found.left,
            notes=np.asarray(found.notes, dtype=np.str_),
            spacing_mm=search.spacing_mm,
            **arrays,
        )


def kept(file: Path, fingerprint: str) -> Initial | None:
    """Read what an earlier call has found; None if there is nothing of these inputs and settings.

    A damaged file counts as none: the search is done again.
    """
    try:
        with np.load(file, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
        # The folder may hold the search of other inputs or settings, which was stopped before.
        if str(arrays["fingerprint"]) != fingerprint:
            return None
        starts: list[Start] = [
            (Transform(matrix, centre), None if np.isnan(score) else float(score))
            for matrix, centre, score in zip(
                arrays["start_matrices"], arrays["start_centres"], arrays["start_scores"], strict=True
            )
        ]
        search = Search(**{n: arrays[n] for n in _ARRAYS}, spacing_mm=float(arrays["spacing_mm"]))
        left, notes = int(arrays["left"]), tuple(str(note) for note in arrays["notes"])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return Initial(starts, search, None if left < 0 else left, notes)


def kept_file(folder: Path, fallback: str | None = None) -> Path:
    """Name the file of a search in the folder of the result; each fallback has one of its own."""
    name = Path(KEPT_FILE)
    return folder / (name if fallback is None else f"{name.stem}-{fallback}{name.suffix}")


def forget(folder: Path) -> None:
    """Remove what was kept."""
    for fallback in (None, *FALLBACKS):
        kept_file(folder, fallback).unlink(missing_ok=True)
