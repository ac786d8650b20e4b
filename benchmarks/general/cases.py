"""The families of pairs with a known answer, and their displacements.

A family is two files and the transform between them. A case is a family with its moving volume resampled onto the grid
of a second scanner, in which the specimen lies turned and shifted. Four levels of displacement: rotations of up to 10,
30, 90 and 180 degrees about a random axis (the last uniform on SO(3)), and shifts of up to 5, 10, 13 and 13 % of the
specimen's mean side. scipy interpolates, on purpose: the known answer must not share the errors of the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from comir_hpc.data.embedded import embedded_volume, write_nifti
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Transform
from comir_hpc.transforms.itk import array_and_grid

LEVELS = {"small": (10.0, 0.05), "medium": (30.0, 0.10), "large": (90.0, 0.13), "any": (180.0, 0.13)}
"""Largest rotation in degrees and largest shift as a share of the specimen's mean side, by level."""

FILES = {
    "embedded": ("", ""),
    "embedded_1mm": ("mni152_2009c/T1w.nii.gz", "mni152_2009c/T2w.nii.gz"),
    "avg152_t2": ("spm_templates/avg152T1.nii.gz", "spm_templates/avg152T2.nii.gz"),
    "avg152_pd": ("spm_templates/avg152T1.nii.gz", "spm_templates/avg152PD.nii.gz"),
    "template_epi": ("spm_templates/T1.nii.gz", "spm_templates/EPI.nii.gz"),
    "template_pet": ("spm_templates/T1.nii.gz", "spm_templates/PET.nii.gz"),
    "t1_epi": ("t1_epi/T1.nii.gz", "t1_epi/EPI.nii.gz"),
    "concrete": ("concrete/concrete_x-ray-bin16.nii.gz", "concrete/concrete_neutron-bin16.nii.gz"),
}
"""Fixed and moving file of each family, below the folder of the data; the embedded pair is in the package."""

SUCCESS = 0.02
"""Largest mean error of a success, as a share of the specimen's mean side."""

_ROOM = 1.15  # side of the second scanner's cube, in longest sides of the volume: a turned specimen fits
_MOST_POINTS = 4000


@dataclass(frozen=True)
class Case:
    """One displaced pair.

    Attributes
    ----------
    fixed, moving : Path
        The two files.
    truth : Transform
        From fixed to moving points, in mm.
    points_mm : (N, 3) array
        Points of the fixed specimen, at which errors are measured.
    """

    fixed: Path
    moving: Path
    truth: Transform
    points_mm: NDArray[np.float64]

    @property
    def mean_side_mm(self) -> float:
        """Mean side of the box around the fixed specimen."""
        return float(np.ptp(self.points_mm, axis=0).mean())

    def errors_mm(self, found: Transform) -> NDArray[np.float64]:
        """Measure the target registration error at every point."""
        return np.asarray(found.distance_mm(self.truth, self.points_mm))


@dataclass(frozen=True)
class Family:
    """Two files and the transform between them."""

    name: str
    data: Path

    @property
    def files(self) -> tuple[Path, Path]:
        """Fixed and moving file."""
        if self.name == "embedded":
            return Path(embedded_volume("t1w")), Path(embedded_volume("t2w"))
        fixed, moving = FILES[self.name]
        return self.data / fixed, self.data / moving

    @cached_property
    def truth(self) -> Transform:
        """Transform from fixed to moving points: the templates share one world, the others have a silver truth."""
        matrix = np.eye(4)
        if self.name == "t1_epi":
            matrix = np.loadtxt(self.data / "t1_epi" / "silver_T1_to_EPI_lps_mm.txt")
        if self.name == "concrete":
            silver = sitk.ReadTransform(str(self.data / "concrete" / "silver_xray_to_neutron_similarity.tfm"))
            ends = [
                np.asarray(silver.TransformPoint(p)) for p in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
            ]
            matrix[:3, :3] = np.stack([end - ends[0] for end in ends[1:]], axis=1)
            matrix[:3, 3] = ends[0]
        return Transform(matrix)

    @cached_property
    def fixed(self) -> tuple[NDArray[np.float32], Grid]:
        """Fixed volume and its grid."""
        return _read(self.files[0])

    @cached_property
    def moving(self) -> tuple[NDArray[np.float32], Grid]:
        """Moving volume and its grid."""
        return _read(self.files[1])

    @cached_property
    def points_mm(self) -> NDArray[np.float64]:
        """Points of the fixed specimen."""
        values, grid = self.fixed
        index = np.argwhere(specimen(values))
        return grid.world_mm(index[:: max(1, len(index) // _MOST_POINTS)])

    def displaced(self, level: str, seed: int, folder: Path) -> Case:
        """Write the moving volume as a second scanner sees it, displaced as the level and the seed say."""
        values, grid = self.moving
        rng = np.random.default_rng([list(LEVELS).index(level), seed])
        motion = drawn(rng, level, values, grid)
        longest = _ROOM * max(grid.extent_mm)
        shape = tuple(int(np.ceil(longest / s)) for s in grid.spacing_mm)
        middle = grid.world_mm(ndimage.center_of_mass(specimen(values)))
        corner = middle - grid.matrix_mm[:3, :3] @ ((np.asarray(shape) - 1) / 2)
        scanner = Grid(shape, grid.spacing_mm, tuple(corner.tolist()), grid.direction)
        back = np.linalg.inv(grid.matrix_mm) @ motion.inverse().matrix_mm @ scanner.matrix_mm
        moved = ndimage.affine_transform(values, back[:3, :3], back[:3, 3], output_shape=shape, order=1)
        path = folder / "moving.nii.gz"
        write_nifti(path, moved.astype(np.float32), scanner)
        return Case(self.files[0], path, motion.compose(self.truth), self.points_mm)


def drawn(rng: np.random.Generator, level: str, values: NDArray[np.float32], grid: Grid) -> Transform:
    """Draw a motion of the specimen about its centre of mass."""
    largest, share = LEVELS[level]
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


def _read(path: Path) -> tuple[NDArray[np.float32], Grid]:
    values, grid = array_and_grid(sitk.ReadImage(str(path)))
    return values.astype(np.float32), grid
