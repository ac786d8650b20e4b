"""The cases of a benchmark: which there are, and one of them from its files to its rows."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comir_hpc.config.benchmark import BenchmarkSettings, OwnPair
from comir_hpc.data.families import SUCCESS, Case, Pair, family, with_labels, with_landmarks, with_transform
from comir_hpc.errors import RegistrationError
from comir_hpc.recipes.benchmark.methods import Task, given, method
from comir_hpc.recipes.benchmark.process import run_apart
from comir_hpc.recipes.benchmark.table import FAILED, SKIPPED
from comir_hpc.transforms.affine import Affine as Transform


@dataclass(frozen=True)
class Place:
    """Which case it is.

    The four together are the key by which the table knows what is done, and the name of the folder in which the case
    is made.

    Attributes
    ----------
    pair : str
        Name of the pair.
    level : str
        How far the moving volume is displaced.
    seed : int
        Seed of the displacement.
    degradation : str
        What is done to the moving volume.
    """

    pair: str
    level: str
    seed: int
    degradation: str

    @property
    def key(self) -> tuple[str, str, int, str]:
        """The case as the table's columns have it, without the method."""
        return self.pair, self.level, self.seed, self.degradation

    @property
    def folder(self) -> str:
        """Name of a folder for it."""
        return "-".join(map(str, self.key))


def places(settings: BenchmarkSettings) -> list[Place]:
    """List all cases: one seed of everything first, so that a stopped benchmark still shows all pairs.

    A level without displacement has nothing to draw, so its only seed is the first, unless noise is drawn.
    """
    return [
        Place(name, level, seed, degradation)
        for seed in range(settings.first_seed, settings.first_seed + settings.seeds)
        for name in map(_name, settings.pairs)
        for level in settings.levels
        for degradation in settings.degradations
        if seed == settings.first_seed or level != "none" or degradation not in ("none", "thick", "padded")
    ]


def open_pairs(settings: BenchmarkSettings) -> dict[str, Pair]:
    """Open every pair, and read what is known of the user's own: a mistake there is found before hours of work.

    Raises
    ------
    ConfigError
        If the files of a family are not there, or an answer does not fit its pair.
    VolumeError, RegistrationError
        If a file of an own pair cannot be read.
    """
    found = {}
    for one in settings.pairs:
        pair = family(one, settings.data) if isinstance(one, str) else _own(one)
        if not isinstance(one, str):
            # Each of these is read when it is first asked for.
            _ = pair.fixed, pair.moving, pair.answer
        found[pair.name] = pair
    return found


def _name(pair: str | OwnPair) -> str:
    return pair if isinstance(pair, str) else pair.name


def _own(pair: OwnPair) -> Pair:
    files = pair.name, pair.fixed, pair.moving
    if pair.truth is not None:
        return with_transform(*files, pair.truth)
    if pair.fixed_points is not None and pair.moving_points is not None:
        return with_landmarks(*files, (pair.fixed_points, pair.moving_points))
    assert pair.fixed_labels is not None  # the settings have refused anything else
    assert pair.moving_labels is not None
    return with_labels(*files, (pair.fixed_labels, pair.moving_labels))


def rows_of(
    place: Place,
    pair: Pair,
    methods: Sequence[str],
    settings: BenchmarkSettings,
    work: Path,
    stop: threading.Event | None = None,
) -> Iterator[dict[str, Any]]:
    """Make a case, and give the row of each method as it ends; the folder is removed at the end.

    Raises
    ------
    ComirError
        If the pair cannot be used.
    StopRequested
        If the flag was set.
    """
    folder = work / place.folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        case = pair.displaced(place.level, place.seed, folder, place.degradation)
        for name in methods:
            own = folder / name
            own.mkdir(exist_ok=True)
            model, modalities = settings.model_of(name)
            task = Task(
                case.fixed.absolute(),
                case.moving.absolute(),
                own.absolute(),
                settings.threads,
                place.seed,
                None if model is None else model.absolute(),
                modalities,
            )
            answer = run_apart(name, task, limit_s=settings.time_limit_s, peers=settings.peers, stop=stop)
            # Before the next method begins: the disk has to hold the stores of one.
            shutil.rmtree(own)
            yield _row(place, case, pair, name, answer, settings)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _row(
    place: Place, case: Case, pair: Pair, name: str, answer: dict[str, Any], settings: BenchmarkSettings
) -> dict[str, Any]:
    """Hold one answer against what is known."""
    matrix = answer.pop("matrix_lps_mm")
    row = {
        **dict(zip(("family", "level", "seed", "degradation"), place.key, strict=True)),
        "method": name,
        "displaced_mm": case.displaced_mm,
        "rotation_deg": None if case.truth is None else case.truth.rotation_deg,
        "threads": settings.threads,
        "truth": pair.answer.kind,
        "given": given(method(name), settings.threads, settings.model_of(name)[0]),
        "success": None if answer["status"] == SKIPPED else False,
        **answer,
    }
    if matrix is None:
        return row
    try:
        found = Transform(np.asarray(matrix))
    except RegistrationError as error:  # a peer may return nonsense, which is no transform
        return {**row, "status": FAILED, "error": str(error)}
    return row | _scores(case, found)


def _scores(case: Case, found: Transform) -> dict[str, Any]:
    errors = case.errors_mm(found)
    mean = float(errors.mean())
    return {
        "success": mean <= SUCCESS * case.mean_side_mm,
        "tre_mm": mean,
        "tre_median_mm": float(np.median(errors)),
        "tre_p95_mm": float(np.percentile(errors, 95)),
        "tre_voxels": mean / case.voxel_mm,
        "tre_share": mean / case.mean_side_mm,
    }


Tell = Callable[[dict[str, Any]], None]
"""Called with every row as it is added."""
