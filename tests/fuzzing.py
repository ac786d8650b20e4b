"""One try of the fuzz: make a file that is nearly right, read it, and say how that went."""

from __future__ import annotations

import logging
import random
import re
import shutil
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import SimpleITK as sitk
from file_mutations import MAKERS
from references import agrees, answers, points, same_values

from comir_hpc.errors import ComirError
from comir_hpc.space.grid import Box
from comir_hpc.volumes.points import read_point_table
from comir_hpc.volumes.readers import open_source

Verdict = Literal["refused", "alike", "noted", "failed"]
LONGEST_MESSAGE = 600
LONGEST_SECONDS = 5.0
MOST_MEMORY_KIB = 1 << 20
_UNSAFE = re.compile(
    r"weights_only|allow_pickle|trust|disable|ignore_|unsafe|--force|skip.{0,10}check", re.IGNORECASE
)
_READ_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Try:
    """What was done to a file, and how it was read; `why` of a failure."""

    kind: str
    what: str
    verdict: Verdict
    why: str
    seconds: float


def try_one(kind: str, seed: int, folder: Path) -> Try:
    """Make the file of a format and a seed in an empty folder of that name, and read it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with quiet():
        path, what = MAKERS[kind](folder, random.Random(f"{kind} {seed}"))
        meter = _Meter()
        verdict, why = _read(kind, path, meter)
    return Try(kind, f"seed {seed}: {what}", verdict, why, meter.seconds)


class _Meter:
    """Seconds of computing and memory of our own reading, without those of the reference readers.

    Other work on the machine makes no file slow: a read that waits for ever is what the limit of a test is for.
    """

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        self._before, self._start, self.seconds = _peak_kib(), time.process_time(), 0.0

    def wrong(self) -> str:
        """Say what was too much, time or memory; nothing where neither was."""
        self.seconds, kib = time.process_time() - self._start, _peak_kib() - self._before
        too_much = self.seconds > LONGEST_SECONDS or kib > MOST_MEMORY_KIB
        return f"{self.seconds:.1f} s, {kib >> 10} MiB" if too_much else ""

    def stop(self) -> None:
        """Raise if time or memory was too much."""
        if wrong := self.wrong():
            raise TimeoutError(wrong)


def _peak_kib() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1])  # type: ignore[index]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the reference readers' own words off the terminal."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def _read(kind: str, path: Path, meter: _Meter) -> tuple[Verdict, str]:
    try:
        return _points(path, meter) if kind == "points" else _volume(kind, path, meter)
    except ComirError as error:
        wrong = _bad_message(str(error), path) or meter.wrong()
        return ("failed", wrong) if wrong else ("refused", str(error))
    except BaseException:  # noqa: BLE001 - any other exception is what the fuzz looks for
        return "failed", traceback.format_exc(limit=-4)


def _bad_message(text: str, path: Path) -> str:
    text = text.replace(str(path.parent), "")
    if len(text) > LONGEST_MESSAGE:
        return f"a message of {len(text)} characters: {text}"
    if "\n" in text or not text.isprintable():
        return f"a message of several lines: {text!r}"
    if _UNSAFE.search(text):
        return f"advice to lower safety: {text}"
    return "" if path.name in text else f"a message that names no file: {text}"


def _volume(kind: str, path: Path, meter: _Meter) -> tuple[Verdict, str]:
    source = open_source(path)
    placed = source.spacing_zyx is not None and source.unit is not None
    # What the file does not say, the user gives: everything else still has to be right.
    grid = source.grid() if placed else source.grid((1.0, 1.0, 1.0), "mm")
    whole = Box((0, 0, 0), source.shape_zyx)
    if np.prod(source.shape) > _READ_AT_ONCE:
        source.read(Box((0, 0, 0), (1, *map(min, source.shape_zyx[1:], (64, 64)))))  # type: ignore[arg-type]
        return ("noted", "") if source.notes else ("failed", f"{source.shape} voxels are believed")
    ours = source.read(whole)
    meter.stop()
    if any(agrees(grid, ours, answer) for answer in answers(kind, path)):
        return "alike", ""
    if not placed and any(same_values(ours, source.spacing_zyx, answer) for answer in answers(kind, path)):
        return "alike", ""
    said = f"{source.kind} {source.shape} {source.dtype} {grid}"
    return (
        ("noted", "; ".join(source.notes)) if source.notes else ("failed", f"read otherwise, no note: {said}")
    )


def _points(path: Path, meter: _Meter) -> tuple[Verdict, str]:
    table = read_point_table(path)
    meter.stop()
    said = points(path)
    if said is not None and said.shape == table.points_mm.shape and np.allclose(said, table.points_mm):
        return "alike", ""
    return (
        ("noted", "; ".join(table.notes))
        if table.notes
        else ("failed", f"{table.points_mm.tolist()}, not {said}")
    )
