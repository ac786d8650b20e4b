"""Pairs with a known answer, and their displacements.

A pair is two files and what is known of the answer. A case is a pair whose moving volume was resampled onto the grid of
a second scanner, in which the specimen lies turned and shifted. There are four levels of displacement: rotations of up
to 10, 30, 90 and 180 degrees about a random axis (the last uniform on SO(3)), and shifts of up to 5, 10, 13 and 13 % of
the specimen's mean side. scipy interpolates, on purpose: the known answer must not share the errors of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from comir_hpc.config.words import DEGRADATIONS, FAMILIES, nearest
from comir_hpc.data.correspondence import (
    Correspondence,
    from_labels,
    from_landmarks,
    from_transform,
    read_image,
)
from comir_hpc.data.degradations import spoiled
from comir_hpc.data.embedded import embedded_volume, write_nifti
from comir_hpc.data.registry import data_set
from comir_hpc.errors import ConfigError
from comir_hpc.space.grid import FloatArray, Grid
from comir_hpc.transforms.affine import Affine as Transform

DISPLACEMENTS = {"small": (10.0, 0.05), "medium": (30.0, 0.10), "large": (90.0, 0.13), "any": (180.0, 0.13)}
"""Largest rotation in degrees and largest shift as a share of the specimen's mean side, by level."""
SUCCESS = 0.02
"""Largest mean error of a success, as a share of the specimen's mean side."""

_SOURCES = {
    "embedded_1mm": ("embedded_1mm", "T1w.nii.gz", "T2w.nii.gz"),
    "avg152_t2": ("avg152", "avg152T1.nii.gz", "avg152T2.nii.gz"),
    "avg152_pd": ("avg152", "avg152T1.nii.gz", "avg152PD.nii.gz"),
    "template_epi": ("templates", "T1.nii.gz", "EPI.nii.gz"),
    "template_pet": ("templates", "T1.nii.gz", "PET.nii.gz"),
    "t1_epi": ("t1_epi", "T1.nii.gz", "EPI.nii.gz"),
    "concrete": ("concrete", "concrete_x-ray-bin16.nii.gz", "concrete_neutron-bin16.nii.gz"),
}
"""Set of volumes, fixed and moving file of each family; the embedded pair is in the package."""
# From fixed to moving points, LPS in mm, of the families whose volumes do not share a world (`registry` says how it is
# known).
_SILVER = {
    "t1_epi": (
        (
            9.996942967392602464e-01,
            -1.722825910970641333e-02,
            1.773415222232403721e-02,
            7.943932140629580418e-01,
        ),
        (
            1.697311852729957438e-02,
            9.997516932032837200e-01,
            1.443832347004805373e-02,
            -3.314873111520416415e00,
        ),
        (
            -1.797849588964535797e-02,
            -1.413290575983051564e-02,
            9.997384831346307621e-01,
            -2.350317677377418590e01,
        ),
        (0.0, 0.0, 0.0, 1.0),
    ),
    "concrete": (
        (0.9381309038167487, 0.3344625298139654, 0.009835102531429385, 12.39835174702879),
        (-0.3344709295693846, 0.9381790883579164, -0.0008373937502277329, -19.901643442797457),
        (-0.009545174925202016, -0.0025139820492487974, 0.9959689128267488, -1.7155696032072996),
        (0.0, 0.0, 0.0, 1.0),
    ),
}
_ROOM = 1.15  # side of the second scanner's cube, in longest sides of the volume: a turned specimen fits
_MOST_POINTS = 4000


@dataclass(frozen=True, eq=False)
class Case:
    """One displaced pair.

    Errors are measured at points. So a case with a known transform, with landmarks and with labels is judged in one
    way.

    Attributes
    ----------
    fixed, moving : Path
        The two files.
    points_mm, targets_mm : (N, 3) array
        Points of the fixed volume at which errors are measured, and where they are in the moving one.
    mean_side_mm : float
        Mean side of the box around the fixed specimen, in mm.
    voxel_mm : float
        Finest spacing of the fixed volume, in mm.
    truth : Transform or None
        From fixed to moving points in mm, where it is known everywhere.
    """

    fixed: Path
    moving: Path
    points_mm: FloatArray
    targets_mm: FloatArray
    mean_side_mm: float
    voxel_mm: float
    truth: Transform | None

    def errors_mm(self, found: Transform) -> FloatArray:
        """Measure the target registration error at every point, in mm."""
        distance: FloatArray = np.linalg.norm(found.apply(self.points_mm) - self.targets_mm, axis=-1)
        return distance

    @property
    def displaced_mm(self) -> float:
        """Mean distance in mm between a fixed point and its place in the moving volume."""
        return float(self.errors_mm(Transform.identity()).mean())


@dataclass(frozen=True)
class Pair:
    """Two files, and what is known of the answer.

    Attributes
    ----------
    name : str
        Name in tables.
    files : two Path
        Fixed and moving file.
    known : callable
        Makes the known answer, when it is first asked for.
    """

    name: str
    files: tuple[Path, Path]
    known: Callable[[Pair], Correspondence]

    @cached_property
    def fixed(self) -> tuple[NDArray[np.float32], Grid]:
        """Fixed volume and its grid."""
        return read_image(self.files[0])

    @cached_property
    def moving(self) -> tuple[NDArray[np.float32], Grid]:
        """Moving volume and its grid."""
        return read_image(self.files[1])

    @cached_property
    def inside_mm(self) -> FloatArray:
        """Points of the fixed specimen, (N, 3)."""
        values, grid = self.fixed
        index = np.argwhere(specimen(values))
        return grid.world_mm(index[:: max(1, len(index) // _MOST_POINTS)])

    @cached_property
    def answer(self) -> Correspondence:
        """Points of the fixed volume, and where they are in the moving one as its file has it."""
        return self.known(self)

    def displaced(self, level: str, seed: int, folder: Path, degradation: str = "none") -> Case:
        """Write the moving volume as a second scanner sees it, displaced as the level and the seed say, and spoiled.

        At the level "none" it stays where it is; with nothing to change, its own file is taken.

        Raises
        ------
        ConfigError
            If the answer does not fit the pair.
        VolumeError
            If a file cannot be read.
        """
        path, motion = self.files[1], Transform.identity()
        if (level, degradation) != ("none", "none"):
            path = folder / "moving.nii.gz"
            values, grid, motion = self._seen(level, seed)
            if degradation != "none":
                # A stream for each degradation, so that one more at the end of the list changes none.
                rng = np.random.default_rng([seed, DEGRADATIONS.index(degradation), 7])
                values, grid = spoiled(degradation, values, grid, specimen(values), rng)
            write_nifti(path, values, grid)
        answer = self.answer
        return Case(
            fixed=self.files[0],
            moving=path,
            points_mm=answer.fixed_mm,
            targets_mm=motion.apply(answer.moving_mm),
            mean_side_mm=float(np.ptp(self.inside_mm, axis=0).mean()),
            voxel_mm=self.fixed[1].finest_mm,
            truth=None if answer.transform is None else motion.compose(answer.transform),
        )

    def _seen(self, level: str, seed: int) -> tuple[NDArray[np.float32], Grid, Transform]:
        """Resample the moving volume as a second scanner sees it; return how it was moved, too."""
        values, grid = self.moving
        if level == "none":
            return values, grid, Transform.identity()
        # Not of the pair: one seed is one motion, which all pairs share in proportion to their size.
        rng = np.random.default_rng([list(DISPLACEMENTS).index(level), seed])
        motion = drawn(rng, level, values, grid)
        longest = _ROOM * max(grid.extent_mm)
        z, y, x = (int(np.ceil(longest / s)) for s in grid.spacing_mm)
        middle = grid.world_mm(ndimage.center_of_mass(specimen(values)))
        corner = middle - grid.matrix_mm[:3, :3] @ ((np.asarray((z, y, x)) - 1) / 2)
        # Centred on the specimen before it is moved. So the headers alone do not give the shift away.
        scanner = Grid((z, y, x), grid.spacing_mm, tuple(corner.tolist()), grid.direction)
        back = np.linalg.inv(grid.matrix_mm) @ motion.inverse().matrix_mm @ scanner.matrix_mm
        moved = ndimage.affine_transform(values, back[:3, :3], back[:3, 3], output_shape=(z, y, x), order=1)
        return moved.astype(np.float32), scanner, motion


def family(name: str, data: Path | None) -> Pair:
    """Return a pair of the benchmark by its name; `data` is the folder that the sets were fetched into.

    Raises
    ------
    ConfigError
        If there is no such family, or its files are not there.
    """
    if name not in FAMILIES:
        raise ConfigError(
            f"no family {name!r}; did you mean {nearest(name, FAMILIES)}? There are {', '.join(FAMILIES)}"
        )
    if name == "embedded":
        return Pair(name, (embedded_volume("t1w"), embedded_volume("t2w")), _silver)
    source, fixed, moving = _SOURCES[name]
    folder = (data or Path("data")) / data_set(source).folder
    for file in (folder / fixed, folder / moving):
        if not file.is_file():
            raise ConfigError(
                f"{file} does not exist, which the family {name} needs; run `comir-hpc datasets fetch {source} "
                f"{data or 'data'}`, or name the folder it was fetched into as `data`"
            )
    return Pair(name, (folder / fixed, folder / moving), _silver)


def with_transform(name: str, fixed: Path, moving: Path, truth: Path) -> Pair:
    """Make a pair of two files and a known transform."""
    return Pair(name, (fixed, moving), lambda pair: from_transform(truth, pair.inside_mm))


def with_landmarks(name: str, fixed: Path, moving: Path, points: tuple[Path, Path]) -> Pair:
    """Make a pair of two files and two tables of landmarks."""
    return Pair(name, (fixed, moving), lambda pair: from_landmarks(*points))


def with_labels(name: str, fixed: Path, moving: Path, labels: tuple[Path, Path]) -> Pair:
    """Make a pair of two files and two volumes of labels, whose centres are compared."""
    return Pair(
        name, (fixed, moving), lambda pair: from_labels(*labels, images=(pair.fixed[1], pair.moving[1]))
    )


def _silver(pair: Pair) -> Correspondence:
    """Give the answer of a family: the templates share one world, the others have a silver truth."""
    transform = Transform(np.asarray(_SILVER.get(pair.name, np.eye(4))))
    return Correspondence("transform", pair.inside_mm, transform.apply(pair.inside_mm), transform)


def drawn(rng: np.random.Generator, level: str, values: NDArray[np.float32], grid: Grid) -> Transform:
    """Draw a motion of the specimen about its centre of mass."""
    largest, share = DISPLACEMENTS[level]
    axis = rng.standard_normal(3)
    axis /= np.linalg.norm(axis)
    rotation = (
        Rotation.random(rng=rng)
        if largest == 180
        else Rotation.from_rotvec(np.radians(rng.uniform(0, largest)) * axis)
    )
    heading = rng.standard_normal(3)
    inside = specimen(values)
    side = float(np.ptp(grid.world_mm(np.argwhere(inside)), axis=0).mean())
    shift = heading / np.linalg.norm(heading) * rng.uniform(0, share) * side
    return Transform.rigid(rotation.as_matrix(), shift, grid.world_mm(ndimage.center_of_mass(inside)))


def specimen(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Mark the largest bright part, by Otsu's threshold at half of it, with its holes filled."""
    threshold = sitk.OtsuThresholdImageFilter()
    threshold.Execute(sitk.GetImageFromArray(values))
    labels, _ = ndimage.label(ndimage.gaussian_filter(values, 1.0) > 0.5 * threshold.GetThreshold())
    largest = labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    return np.asarray(ndimage.binary_fill_holes(largest))
