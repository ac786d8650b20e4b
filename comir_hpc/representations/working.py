"""Choose the grids that encoders see volumes on: working grids, of one spacing for both volumes of a pair.

A network knows structures of a certain size in voxels. So what it is given has the spacing of its training, whatever
the volume has, and coarser grids of the same kind for a search. A model that was trained over a wide range of scales
has no spacing of its own: its grids follow from the size of the specimens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from comir_hpc.errors import RegistrationError, VolumeError
from comir_hpc.representations.features import specimen_mask
from comir_hpc.runs.model import Model
from comir_hpc.space.grid import Grid, Vector
from comir_hpc.volumes.resampled import covering
from comir_hpc.volumes.volume import Volume

SAME_SPACING = 0.05
"""A level whose spacing differs by no more, along every axis, is read as it is; training allows as much."""

_FACTORS = (1.0, 2.0, 4.0)  # working grids of a model that was trained at one spacing
_SIDES = (
    96,
    64,
    48,
    32,
)  # voxels of a mean side of the specimen, of a model that was trained over many scales
_FEWEST_ON_COARSE = 16  # voxels along the longest side of a volume, on all grids but the finest
_FEWEST_IN_SPECIMEN = 8
_ENOUGH = (
    0.5  # spacing of a grid over that of the data: a finer grid holds no more, and costs eight times as much
)
_ABSURD = 0.25  # the same, for a model that has to see its own spacing
_FINEST = 16  # times that a grid which somebody asks for may be finer than the data
_COARSE = 1.5  # axes whose voxels are so many times coarser than the grid are named in a note
_MEASURED = 1 << 18  # voxels of the level at which a specimen's size is measured
_TAIL = 0.005  # share of the specimen at each end of an axis that its size leaves out: specks


@dataclass(frozen=True)
class WorkingGrids:
    """The grids that one encoder sees the volumes of a pair on.

    Attributes
    ----------
    spacings_zyx : tuple of three float
        Spacing along z, y, x in mm, the finest grid first. It is isotropic, unless the training was not.
    notes : tuple of str
        What the user should know of the choice.
    """

    spacings_zyx: tuple[Vector, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def for_model(
        cls, model: Model, volumes: Sequence[Volume], spacing_mm: float | None = None
    ) -> WorkingGrids:
        """Choose the grids for volumes that are to be compared; their order makes no difference.

        With `spacing_mm` there is one grid, of that spacing.

        Raises
        ------
        VolumeError
            If a specimen fills too few voxels to be recognised.
        """
        sizes = [specimen_size_mm(volume) for volume in volumes]
        if spacing_mm is not None:
            _require_sane(spacing_mm, volumes)
            chosen = cls((_cubic(spacing_mm),))
        else:
            chosen = (
                _scale_free(volumes, sizes) if model.scale_free else _as_trained(model.spacing_mm, volumes)
            )
        for volume, size in zip(volumes, sizes, strict=True):
            _require_filled(volume, size, chosen.spacings_zyx[0])
        return chosen

    def grid(self, volume: Volume, level: int) -> Grid:
        """Give the grid of one volume at a level."""
        return working_grid(volume, self.spacings_zyx[level])

    def notes_on(self, volume: Volume, level: int) -> list[str]:
        """Say what was chosen, and along which axes a volume is too coarse to carry the finest structure."""
        spacing = self.spacings_zyx[level]
        coarse = {
            name: own
            for axis, (name, own, wanted) in enumerate(
                zip("zyx", volume.grid.spacing_mm, spacing, strict=True)
            )
            if axis in volume.grid.axes and own > _COARSE * wanted
        }
        if not coarse:
            return list(self.notes)
        listed = " and ".join(f"{own:.4g} mm along {name}" for name, own in coarse.items())
        sides = {f"{own:.4g} mm" for own in coarse.values()}
        if len(coarse) == len(volume.grid.axes) and len(sides) == 1:
            listed = sides.pop()
        return [
            *self.notes,
            f"{volume.path}: voxels of {listed} are seen on a grid of {in_mm(spacing)} mm; structure finer than the "
            "voxels is not in the data",
        ]


def working_grid(volume: Volume, spacing_mm: Vector) -> Grid:
    """Give the grid of a spacing (z, y, x) in mm along a volume's axes.

    It is that of a level of the volume if one has that spacing, to a twentieth. Otherwise it is centred on the volume
    and just covers it.
    """
    for level in range(volume.num_levels):
        grid = volume.level_grid(level)
        ratio = np.asarray(grid.spacing_mm) / spacing_mm
        if all(1 / (1 + SAME_SPACING) <= ratio[axis] <= 1 + SAME_SPACING for axis in grid.axes):
            return grid
    return covering(volume.grid, spacing_mm)


def specimen_size_mm(volume: Volume) -> float | None:
    """Measure the mean side of the box around a specimen in mm, on a coarse level; None if there is none.

    The box holds all but half a per cent of the specimen at each end of each axis. So specks beside it do not count.
    """
    level = next(
        (k for k in range(volume.num_levels) if math.prod(volume.level_grid(k).shape_zyx) <= _MEASURED),
        volume.num_levels - 1,
    )
    try:
        mask = specimen_mask(volume, level)
    except RegistrationError:
        return None
    grid, sides = volume.level_grid(level), []
    for axis in grid.axes:
        share = mask.sum(axis=tuple(a for a in range(3) if a != axis)).cumsum() / mask.sum()
        first, last = np.searchsorted(share, (_TAIL, 1 - _TAIL))
        sides.append((last - first + 1) * grid.spacing_mm[axis])
    return float(np.mean(sides))


def in_mm(spacing: Vector) -> str:
    """Write a spacing in words; an isotropic one as one number."""
    texts = [f"{s:.4g}" for s in spacing]
    return texts[0] if len(set(texts)) == 1 else " x ".join(texts)


def _as_trained(trained: Vector, volumes: Sequence[Volume]) -> WorkingGrids:
    """Take the spacing of the training, twice and four times as much, in the training's own proportions."""
    data = max(volume.grid.finest_mm for volume in volumes)
    axes = volumes[0].grid.axes
    finest = min(trained[axis] for axis in axes)
    longest = min(max(volume.grid.extent_mm[axis] for axis in axes) for volume in volumes)
    absurd = [factor for factor in _FACTORS if factor * finest < _ABSURD * data]
    if len(absurd) == len(_FACTORS):
        spacing = _times(trained, data / finest)
        return WorkingGrids((spacing,), (_stranger(trained, spacing, volumes),))
    factors = [
        factor
        for factor in _FACTORS[len(absurd) :]
        if factor == _FACTORS[len(absurd)] or longest / (factor * finest) >= _FEWEST_ON_COARSE
    ]
    spacings = tuple(_times(trained, factor) for factor in factors)
    notes = (_stranger(trained, spacings[0], volumes),) if absurd else ()
    return WorkingGrids(spacings, notes)


def _stranger(trained: Vector, spacing: Vector, volumes: Sequence[Volume]) -> str:
    coarsest = max(volumes, key=lambda volume: volume.grid.finest_mm)
    return (
        f"the model was trained at {in_mm(trained)} mm, {coarsest.path} has voxels of "
        f"{in_mm(coarsest.grid.spacing_mm)} mm: both volumes are encoded at {in_mm(spacing)} mm, where structures have "
        "another size for the model; check the units"
    )


def _scale_free(volumes: Sequence[Volume], sizes: Sequence[float | None]) -> WorkingGrids:
    """Take grids on which the specimens have certain sizes; of two, it is the geometric mean of their sizes."""
    data = max(volume.grid.finest_mm for volume in volumes)
    known = sorted(
        volume.grid.mean_side_mm if size is None else size
        for volume, size in zip(volumes, sizes, strict=True)
    )
    side = math.exp(math.fsum(map(math.log, known)) / len(known))
    useful = [side / n for n in _SIDES if side / n >= _ENOUGH * data * (1 - SAME_SPACING)]
    if len(useful) == len(_SIDES):
        return WorkingGrids(tuple(_cubic(s) for s in useful), _alone(volumes, useful[0]))
    left_out = ", ".join(f"{side / n:.4g}" for n in _SIDES[: len(_SIDES) - len(useful)])
    spacings = useful or [_ENOUGH * data]
    note = (
        f"working grids of {left_out} mm are left out: the coarser volume has voxels of {data:.4g} mm and carries no "
        f"structure as fine; {spacings[0]:.4g} mm is the finest"
    )
    return WorkingGrids(tuple(_cubic(s) for s in spacings), (note, *_alone(volumes, spacings[0])))


def _alone(volumes: Sequence[Volume], spacing: float) -> tuple[str, ...]:
    """Say of a volume that is encoded by itself that the spacing follows from its own size."""
    if len(volumes) > 1:
        return ()
    return (
        f"{volumes[0].path} is encoded on {spacing:.4g} mm, which suits the size of this specimen; what it is compared "
        "with needs the same grid: give `comir-hpc infer` the same --spacing for both",
    )


def _require_sane(spacing: float, volumes: Sequence[Volume]) -> None:
    for volume in volumes:
        if spacing * _FINEST < volume.grid.finest_mm:
            raise VolumeError(
                f"a grid of {spacing:g} mm is more than {_FINEST} times finer than the voxels of {volume.path}, "
                f"{in_mm(volume.grid.spacing_mm)} mm; expected a spacing near the one that the model was trained at"
            )


def _require_filled(volume: Volume, size: float | None, spacing: Vector) -> None:
    if size is None:
        return
    voxels = size / float(np.mean([spacing[axis] for axis in volume.grid.axes]))
    if voxels < _FEWEST_IN_SPECIMEN:
        raise VolumeError(
            f"the specimen in {volume.path} is {size:.3g} mm in size: {voxels:.2g} voxels of the working grid of "
            f"{in_mm(spacing)} mm; expected at least {_FEWEST_IN_SPECIMEN}: the grid is too coarse for it, or "
            "the unit of the volume is wrong"
        )


def _times(spacing: Vector, factor: float) -> Vector:
    z, y, x = (s * factor for s in spacing)
    return z, y, x


def _cubic(spacing: float) -> Vector:
    return spacing, spacing, spacing
