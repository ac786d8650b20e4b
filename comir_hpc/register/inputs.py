"""Open the two volumes that a registration is given as the representation asks, and choose the levels to compare."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc import __version__
from comir_hpc.config.register import RegisterSettings
from comir_hpc.config.words import BENDING
from comir_hpc.errors import RegistrationError
from comir_hpc.host.memory import available_bytes, expected_peak, in_words, resident_bytes, share_one_heap
from comir_hpc.representations import Features, Measure, Representation, Role, open_representation
from comir_hpc.representations.intensity import Intensity
from comir_hpc.volumes.region import Region
from comir_hpc.volumes.volume import Volume

if TYPE_CHECKING:
    from comir_hpc.register.given_start import GivenStart

_LIBRARY_BYTES = 32 << 20  # measured: up to 27 MiB are loaded on the way
KEYPOINT_BYTES = 160 << 20  # of the keypoints of both volumes and their matches, or of a slice's scale space
_SEARCH_BYTES = 160  # of each thread, for each voxel of a spectrum of the global search

# Gauss-Newton steps on two heads: bytes of each thread for each fixed voxel, and of the moving maps on twice as fine a
# grid. Measured beside the rest: 200 MiB with one thread, 330 with two, for 1.8 and 1.3 million voxels.
_STEP_BYTES, _FINER_BYTES = 110, 96
# Full checks hold the mirrored moving map and two more grids beside these. Before this was counted, a registration by
# the general model took 710 MiB where 707 were predicted.
_MIRROR_BYTES = 32
# Self-similarities of both volumes on the sharp grid of the mirror's check, with their slopes. Measured with 144 voxels
# a side: 800 bytes for each of 80^3 voxels; with the embedded pair of 2 mm up to 1180. What is held of the volumes then
# is less than their registration took.
_DESCRIBED_BYTES, _DESCRIBED_VOXELS, _STILL_HELD = 1300, 80**3, 0.7
_MOST_INTENSITIES = (
    1 << 23
)  # voxels of a volume whose intensities the last step reads; a finer level is too slow
_BEND_BYTES = (
    240  # of each voxel in a step of a deformation: places, slopes, pull, stiffness; counted, not measured
)


@dataclass(frozen=True, eq=False)
class Input:
    """One of the two volumes, seen as it is compared.

    Attributes
    ----------
    role : str
        Which of the two it is: ``fixed`` or ``moving``.
    representation : Representation
        What is compared.
    level : int
        Level of the representation that is used.
    """

    role: Role
    representation: Representation
    level: int = 0

    @property
    def volume(self) -> Volume:
        """The original volume."""
        return self.representation.volume

    @property
    def compared(self) -> Volume:
        """Store that `level` counts in."""
        return self.representation.compared

    @property
    def num_channels(self) -> int:
        """Number of channels that are compared."""
        return self.representation.num_channels

    @property
    def notes(self) -> list[str]:
        """What is assumed about the volume, in sentences."""
        return self.representation.notes(self.level)

    def predicted_bytes(self, level: int) -> float:
        """Predict the bytes that a registration needs for this volume at a level."""
        return self.representation.predicted_bytes(level)

    def features(self) -> tuple[Features, NDArray[np.float32]]:
        """Make the features to compare, and the intensity (z, y, x) on the same grid, for pictures."""
        return self.representation.features(self.level)

    def intensities(self, limit_bytes: float) -> tuple[Intensity, int]:
        """Give the intensities of the volume, and the finest level that the last step can read.

        A level has not too many voxels, and a registration of it needs at most `limit_bytes`.
        """
        seen = Intensity(self.volume)
        fits = (
            level
            for level in seen.levels
            if math.prod(seen.grid(level).shape_zyx) <= _MOST_INTENSITIES
            and seen.predicted_bytes(level) <= limit_bytes
        )
        return seen, next(fits, seen.levels[-1])


@dataclass(frozen=True, eq=False)
class Inputs:
    """Both volumes with their levels chosen. All is checked that can be checked without reading voxels.

    Attributes
    ----------
    fixed, moving : Input
        The two volumes.
    predicted_bytes : float
        Memory that the whole process will need, in bytes.
    fingerprint : str
        Digest of everything that the result depends on.
    start : GivenStart or None
        Start that the user gives; None where one is to be found.
    """

    fixed: Input
    moving: Input
    predicted_bytes: float
    fingerprint: str
    start: GivenStart | None = None

    @property
    def measure(self) -> Measure:
        """How the two are compared. One method makes both representations, so they agree on it."""
        return self.fixed.representation.measure

    def at(self, level: int) -> Inputs:
        """Give the same inputs compared at a coarser level, because finer ones show too little of both."""
        return replace(self, fixed=replace(self.fixed, level=level), moving=replace(self.moving, level=level))

    @property
    def searched_levels(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Levels that the search looks at, the coarsest first, and the levels between them and the compared one.

        Both are empty where the search looks at the compared features.
        """
        sides = (self.fixed, self.moving)
        finest = max(side.level for side in sides)
        searched = tuple(n for n in self.fixed.representation.searched_levels if n > finest)
        if (
            searched != tuple(n for n in self.moving.representation.searched_levels if n > finest)
            or not searched
        ):
            return (), ()
        return searched, tuple(range(min(searched) - 1, finest, -1))

    @property
    def scales_of_checks(self) -> tuple[int, int] | None:
        """Levels on which an answer is checked, the coarser and the finer one; None for the compared level alone."""
        finest = max(self.fixed.level, self.moving.level)
        levels = [
            [max(n, finest) for n in side.representation.searched_levels]
            for side in (self.fixed, self.moving)
        ]
        return (levels[0][0], levels[0][-1]) if levels[0] and levels[0] == levels[1] else None


def open_inputs(settings: RegisterSettings) -> Inputs:
    """Open and check what the settings name, and choose the levels.

    Raises
    ------
    VolumeError, CheckpointError
        If a volume or the model cannot be used.
    RegistrationError
        If one is a single slice and the other a volume, a representation was made from another volume, or the
        memory does not suffice.
    """
    share_one_heap()  # before volumes are read, which starts threads
    fixed = _open_volume(settings.fixed, settings.fixed_mask)
    moving = _open_volume(settings.moving, settings.moving_mask)
    # Here, since most registrations find their start themselves, and name no file of another tool.
    from comir_hpc.register.given_start import given_start

    start = given_start(settings, fixed.grid, moving.grid)
    sides = [
        Input("fixed", open_representation(fixed, settings, "fixed", moving)),
        Input("moving", open_representation(moving, settings, "moving", fixed)),
    ]
    _require_one_kind(*sides)
    if sides[0].num_channels != sides[1].num_channels:
        raise RegistrationError(
            f"the representations have {sides[0].num_channels} (fixed) and {sides[1].num_channels} (moving) channels; "
            "they come from different models"
        )
    levels = _choose_levels(sides, settings.max_memory_gib * 2**30)
    chosen = [replace(side, level=level) for side, level in zip(sides, levels, strict=True)]
    held = sum(side.predicted_bytes(side.level) for side in chosen)
    encoding = max(side.representation.working_bytes(side.level) for side in chosen)
    # What encoding took is kept by the C library for what comes after it, on one heap: they need the larger of both.
    needed = expected_peak(
        _LIBRARY_BYTES
        + max(held + encoding, _parts_bytes(chosen, settings) + _steps_bytes(chosen[0], chosen[1], settings))
        + _bend_bytes(chosen[0], settings)
    )
    # What the process holds already is a part of the prediction, and no longer free.
    if needed - resident_bytes() > available_bytes():
        raise RegistrationError(
            f"this needs {in_words(needed - resident_bytes())} of memory, {in_words(available_bytes())} are free; "
            "choose a coarser level with a smaller --max-memory-gib"
        )
    return Inputs(
        fixed=chosen[0],
        moving=chosen[1],
        predicted_bytes=needed,
        fingerprint=_fingerprint(settings, chosen, start),
        start=start,
    )


def _search_bytes(settings: RegisterSettings) -> int:
    """Predict the bytes of the global search's spectra, whose maps are padded to twice their sides, or of keypoints."""
    if settings.initial == "features":
        return KEYPOINT_BYTES
    if settings.initial != "global" and settings.checks == "quick":
        return 0
    threads = settings.threads or len(os.sched_getaffinity(0))
    return threads * _SEARCH_BYTES * (2 * settings.search_voxels) ** 3


def _parts_bytes(sides: list[Input], settings: RegisterSettings) -> float:
    """Predict the bytes of both volumes and of the part that takes most beside them: each gives back what it took."""
    volumes = sum(side.predicted_bytes(side.level) for side in sides)
    needed = volumes + max(_search_bytes(settings), _last_step_bytes(sides, settings))
    seen = sides[0].representation
    # Quick checks look at no mirrored volume.
    if settings.checks == "quick" or not seen.checked_described:
        return needed
    voxels = min(_DESCRIBED_VOXELS, math.prod(seen.grid(sides[0].level).shape_zyx))
    return max(needed, _STILL_HELD * volumes + _DESCRIBED_BYTES * voxels)


def _last_step_bytes(sides: list[Input], settings: RegisterSettings) -> float:
    """Predict the bytes of the last refinement: it registers intensities beside what is held of the representations."""
    if not settings.refines_on_intensities:
        return 0.0
    read = [side.intensities(share_bytes(settings)) for side in sides]
    return sum(intensity.predicted_bytes(level) for intensity, level in read)


def share_bytes(settings: RegisterSettings) -> float:
    """Give each volume's half of the memory that the settings allow, in bytes."""
    return settings.max_memory_gib * 2**30 / 2


def _bend_bytes(fixed: Input, settings: RegisterSettings) -> int:
    """Predict the bytes of a deformation: what is held of every fixed voxel in one step."""
    if settings.transform not in BENDING:
        return 0
    channels = fixed.num_channels
    return (_BEND_BYTES + 8 * channels) * math.prod(fixed.representation.grid(fixed.level).shape_zyx)


def _steps_bytes(fixed: Input, moving: Input, settings: RegisterSettings) -> int:
    """Predict the bytes of the Gauss-Newton steps through the scales: on the finest one each thread has a grid."""
    if not fixed.representation.searched_levels:
        return 0
    threads = settings.threads or len(os.sched_getaffinity(0))
    fixed_voxels, moving_voxels = (
        math.prod(side.representation.grid(side.level).shape_zyx) for side in (fixed, moving)
    )
    # Quick checks look at no mirrored volume.
    mirrored = _MIRROR_BYTES * (fixed_voxels + moving_voxels) if settings.checks == "full" else 0
    return threads * _STEP_BYTES * fixed_voxels + _FINER_BYTES * moving_voxels + mirrored


def _require_one_kind(fixed: Input, moving: Input) -> None:
    """Refuse a slice with a volume: to find where in the volume the slice lies would be another search."""
    if fixed.volume.grid.planar == moving.volume.grid.planar:
        return
    one, whole = (fixed, moving) if fixed.volume.grid.planar else (moving, fixed)
    raise RegistrationError(
        f"{one.volume.path} ({one.role}) is a single slice, {whole.volume.path} ({whole.role}) a volume of "
        f"{whole.volume.grid}; a slice is registered with a slice, a volume with a volume: take the slice of the "
        "volume that shows the same, e.g. by `comir-hpc warp --like` a slice, and give that"
    )


def _open_volume(path: Path, mask: Path | None) -> Volume:
    volume = Volume.open(path)
    volume.intensity()  # refuses a volume without statistics before anything is done
    if mask is not None:
        volume.region = Region.open(mask)
    return volume


def _choose_levels(sides: list[Input], limit_bytes: float) -> list[int]:
    """Choose the finest levels that fit into memory together.

    The larger volume is made coarser first, so that the two spacings come near to each other. Where a level has one
    spacing for both, they keep to one level.
    """
    offered = [side.representation.levels for side in sides]
    levels = [some[0] for some in offered]
    while True:
        needs = [side.predicted_bytes(level) for side, level in zip(sides, levels, strict=True)]
        if sum(needs) <= limit_bytes:
            return levels
        movable = [i for i, some in enumerate(offered) if levels[i] + 1 in some]
        if not movable:
            raise RegistrationError(_too_large(sides, levels, sum(needs), limit_bytes))
        if all(side.representation.one_scale for side in sides):
            levels = [level + 1 for level in levels]
        else:
            levels[max(movable, key=lambda i: needs[i])] += 1


def _too_large(sides: list[Input], levels: list[int], needed: float, limit: float) -> str:
    grids = "; ".join(
        f"{side.role} {side.representation.grid(level)}" for side, level in zip(sides, levels, strict=True)
    )
    remedies = [side.representation.memory_remedy for side in sides]
    remedy = "allow more with --max-memory-gib" + next(filter(None, remedies), "")
    return f"comparing {grids} needs {in_words(needed)}, {in_words(limit)} are allowed; {remedy}"


def _fingerprint(settings: RegisterSettings, sides: list[Input], start: GivenStart | None) -> str:
    """Make a digest of the inputs' content, the encoders and the settings that matter, but not of paths or threads."""
    places = {"fixed", "moving", "out", "model", "fixed_representation", "moving_representation"}
    places |= {"fixed_mask", "moving_mask", "form"} | ({"initial"} if start is not None else set())
    # Results keep the fingerprint that they had before there were these settings.
    unused = set() if settings.initial == "features" else {"keypoints", "match_ratio"}
    unused |= {"checks"} if settings.checks == "full" else set()
    unused |= {"fallback"} if settings.fallback == "auto" else set()
    unused |= {"last_step"} if settings.last_step == "auto" else set()
    unused |= {"smoothness_mm"} if settings.smoothness_mm is None else set()
    record: dict[str, Any] = {
        "version": __version__,
        "settings": settings.model_dump(mode="json", exclude=places | {"threads", "overwrite"} | unused),
        "sides": [{"volume": side.volume.fingerprint(), **side.representation.identity()} for side in sides],
    }
    if any(side.volume.region for side in sides):
        regions = [side.volume.region for side in sides]
        record["masks"] = [None if one is None else one.fingerprint for one in regions]
    if start is not None:
        record["start"] = start.transform.matrix_mm.tolist()
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
