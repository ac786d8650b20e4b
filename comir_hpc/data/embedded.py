"""Give the embedded example pair, and make phantoms with a known answer."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from comir_hpc.errors import ConfigError
from comir_hpc.space.grid import MM_PER_UNIT, Grid, Triple
from comir_hpc.space.rotations import random_rotation, rotation_by
from comir_hpc.transforms.affine import Affine as Transform

EMBEDDED = ("t1w", "t2w")


def embedded_volume(modality: str) -> Path:
    """Return the path of the embedded brain template of one modality.

    It is a NIfTI file of uint8 with 96 x 114 x 96 voxels of 2 mm. The two modalities, ``t1w`` and ``t2w``, lie on one
    grid (MNI152NLin2009cAsym; LICENSE-ICBM.txt is beside them).

    Raises
    ------
    ConfigError
        If there is no such modality.
    """
    if modality not in EMBEDDED:
        raise ConfigError(f"no embedded volume {modality!r}; there are {', '.join(EMBEDDED)}")
    return Path(str(files("comir_hpc") / "data" / f"{modality}.nii.gz"))


def embedded_landmarks() -> dict[str, NDArray[np.float64]]:
    """Return the 32 anatomical fiducials of the embedded pair, by name: world LPS (x, y, z) in mm."""
    text = (files("comir_hpc") / "data" / "landmarks.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return {row["name"]: np.array([float(row[a]) for a in "xyz"]) for row in rows}


def phantom_pair(
    shape_zyx: Triple, *, seed: int = 0, num_structures: int = 24
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Make two aligned modalities of one specimen: smooth random blobs in an ellipsoid, without symmetry.

    The intensity of a structure in one modality says nothing about its intensity in the other. So only structure
    connects the two.

    Returns
    -------
    two arrays (z, y, x), float32, background 0, specimen between 40 and 255
    """
    rng = np.random.default_rng(seed)
    shape = np.asarray(shape_zyx)
    coordinates = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")).astype(np.float32)
    centred = (coordinates - ((shape - 1) / 2)[:, None, None, None]) / (shape / 2)[:, None, None, None]
    inside = (centred**2).sum(axis=0) < 0.85**2
    labels = np.zeros(shape_zyx, dtype=np.int64)
    for structure in range(1, num_structures + 1):
        centre, radius = rng.uniform(-0.6, 0.6, size=3), rng.uniform(0.1, 0.35, size=3)
        distance = (((centred - centre[:, None, None, None]) / radius[:, None, None, None]) ** 2).sum(axis=0)
        labels[inside & (distance < 1)] = structure
    volumes: list[NDArray[Any]] = []
    for _ in range(2):
        # Drawn anew for each modality: this is what makes the two differ.
        intensity = rng.uniform(40, 255, size=num_structures + 1)
        volumes.append(
            ndimage.gaussian_filter(np.where(inside, intensity[labels], 0).astype(np.float32), 0.7)
        )
    return volumes[0], volumes[1]


@dataclass(frozen=True)
class Displacement:
    """How a specimen lies in a second scanner: a rotation about its centre, and a shift.

    Parameters
    ----------
    rotation_zyx : (3, 3)
        Rotation that acts on voxel vectors (z, y, x).
    shift_vox : (3,)
        Shift in voxels (z, y, x).
    """

    rotation_zyx: NDArray[np.float64]
    shift_vox: NDArray[np.float64]

    @classmethod
    def draw(
        cls, rng: np.random.Generator, shape_zyx: Triple, *, largest_shift: float = 0.13
    ) -> Displacement:
        """Draw any rotation of SO(3), and a shift in any direction of at most `largest_shift` times the mean side."""
        rotation = random_rotation(rng)
        heading = rng.standard_normal(3)
        length = rng.uniform(0, largest_shift * float(np.mean(shape_zyx)))
        return cls(rotation, heading / np.linalg.norm(heading) * length)

    @classmethod
    def in_plane(
        cls, rng: np.random.Generator, shape_zyx: Triple, *, largest_deg: float, largest_shift: float
    ) -> Displacement:
        """Draw a turn about z by at most `largest_deg`, and a shift in the plane, at most a share of the mean side."""
        rotation = rotation_by("z", rng.uniform(-largest_deg, largest_deg))
        heading = rng.uniform(0, 2 * np.pi)
        length = rng.uniform(0, largest_shift * float(np.mean(shape_zyx[1:])))
        return cls(rotation, length * np.array([0.0, np.sin(heading), np.cos(heading)]))

    @classmethod
    def none(cls) -> Displacement:
        """Leave the specimen as it lies."""
        return cls(np.eye(3), np.zeros(3))


def displace(
    values: NDArray[Any], grid: Grid, displacement: Displacement, side: int
) -> tuple[NDArray[np.float32], Grid, Transform]:
    """Resample a volume as a second scanner would see it: on a cube of `side` voxels, with the specimen displaced.

    A single slice is displaced in its plane, and put on a square. The specimen's centre comes to lie at the centre of
    the cube, plus the shift. scipy interpolates linearly. On purpose this is not the resampling that the pipeline uses,
    because the known answer must not share its errors.

    Returns
    -------
    values : (side, side, side) float32, or (1, side, side)
        Displaced volume, 0 outside the source.
    grid : Grid
        Grid of the second scanner, with the spacing, the direction and the centre of the source's grid.
    truth : Transform
        True transform, from world points of the source (fixed) to those of the displaced volume (moving).
    """
    middle = (np.asarray(grid.shape_zyx) - 1) / 2
    shape = (1, side, side) if grid.planar else (side, side, side)
    centre = (np.asarray(shape) - 1) / 2
    # A source index p moves to q = R (p - middle) + centre + shift. Resampling asks for p at each q, so it needs the
    # inverse.
    back = displacement.rotation_zyx.T
    offset = middle - back @ (centre + displacement.shift_vox)
    moved = ndimage.affine_transform(
        values.astype(np.float32), back, offset, output_shape=shape, order=1, mode="constant", cval=0.0
    )
    origin = grid.world_mm(middle - centre) / MM_PER_UNIT[grid.unit]
    cube = Grid(shape, grid.spacing_zyx, tuple(origin.tolist()), grid.direction, grid.unit)
    index = np.eye(4)
    index[:3, :3] = displacement.rotation_zyx
    index[:3, 3] = centre + displacement.shift_vox - displacement.rotation_zyx @ middle
    # World of the source -> its index -> index in the cube -> world of the cube.
    matrix = cube.matrix_mm @ index @ np.linalg.inv(grid.matrix_mm)
    return moved, cube, Transform(matrix).about(grid.centre_mm)


def degrade(
    values: NDArray[np.float32], rng: np.random.Generator, *, bias: float = 0.3, noise: float = 0.02
) -> NDArray[np.float32]:
    """Multiply by a smooth bias field within exp(+-bias), and add Gaussian noise.

    `noise` is its standard deviation as a share of the brightest values. Negative values are clipped to 0, since the
    magnitudes that a scanner measures are not negative.
    """
    # Four nodes along each axis: the brightness changes over a good part of the head, as with a coil.
    field = ndimage.zoom(rng.standard_normal((4, 4, 4)), np.asarray(values.shape) / 4, order=3)
    # Scaled to the bound, so that every case is spoiled by the same amount.
    field *= bias / np.abs(field).max()
    noisy = values * np.exp(field) + rng.standard_normal(values.shape) * noise * np.percentile(values, 99.9)
    return np.clip(noisy, 0, None).astype(np.float32)


def write_nifti(path: Path, values: NDArray[Any], grid: Grid) -> None:
    """Write (z, y, x) values as NIfTI, whose world is RAS: x and y change sign."""
    matrix = np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.matrix_mm
    affine = np.column_stack([matrix[:, 2], matrix[:, 1], matrix[:, 0], matrix[:, 3]])
    image = nibabel.Nifti1Image(np.ascontiguousarray(values.transpose(2, 1, 0)), affine)  # type: ignore[no-untyped-call]
    nibabel.save(image, path)
