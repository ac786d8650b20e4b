"""What is known of the answer to a pair: a transform, landmarks, or labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.space.grid import FloatArray, Grid
from comir_hpc.transforms.affine import Affine as Transform
from comir_hpc.transforms.files import load_transform
from comir_hpc.transforms.itk import array_and_grid, silent_itk
from comir_hpc.volumes.points import read_point_table

_FEWEST = 4  # points that determine a transform in space, and tell when it is wrong


@dataclass(frozen=True, eq=False)
class Correspondence:
    """Points of the fixed volume, and where each of them is in the moving one.

    Attributes
    ----------
    kind : str
        Where they come from: transform, landmarks or labels.
    fixed_mm, moving_mm : (N, 3) array
        World points (x, y, z), LPS in mm.
    transform : Transform or None
        From fixed to moving points, where one is known.
    """

    kind: str
    fixed_mm: FloatArray
    moving_mm: FloatArray
    transform: Transform | None = None


def from_transform(path: Path, points_mm: FloatArray) -> Correspondence:
    """Carry points of the fixed specimen through a known transform, which maps fixed to moving points.

    Raises
    ------
    VolumeError, RegistrationError
        If the file is no linear transform.
    """
    transform = load_transform(path)
    return Correspondence("transform", points_mm, transform.apply(points_mm), transform)


def from_landmarks(fixed: Path, moving: Path) -> Correspondence:
    """Pair the points of two tables row by row; both have columns x, y, z.

    Raises
    ------
    ConfigError
        If the tables have different numbers of rows, too few, or different names in a column ``name`` or ``label``.
    VolumeError
        If a file is no table of points.
    """
    one, other = read_point_table(fixed), read_point_table(moving)
    if len(one.rows) != len(other.rows):
        raise ConfigError(
            f"{fixed} has {len(one.rows)} landmarks and {moving} has {len(other.rows)}; expected one row in each for "
            "every landmark, in the same order"
        )
    _require_enough(len(one.rows), f"{fixed} has {len(one.rows)} landmarks")
    # Rows in another order pair the wrong points, and no figure would show it. Names can.
    for name in ("name", "label", "id"):
        if name in one.columns and name in other.columns:
            pairs = zip(
                (row[one.columns.index(name)] for row in one.rows),
                (row[other.columns.index(name)] for row in other.rows),
                strict=True,
            )
            for number, (left, right) in enumerate(pairs, 1):
                if left != right:
                    raise ConfigError(
                        f"landmark {number} is {left!r} in {fixed} and {right!r} in {moving}; sort both the same way"
                    )
    return Correspondence("landmarks", one.points_mm, other.points_mm)


def from_labels(fixed: Path, moving: Path, images: tuple[Grid, Grid]) -> Correspondence:
    """Pair the centres of mass of the labels that two volumes of labels have; 0 is no label.

    Parameters
    ----------
    images : two Grid
        Grids of the fixed and the moving image, which the labels have to lie on.

    Raises
    ------
    ConfigError
        If a volume of labels does not lie on the grid of its image, or the two have not the same labels.
    VolumeError
        If a file cannot be read.
    """
    centres = [_centres(path, grid) for path, grid in zip((fixed, moving), images, strict=True)]
    missing = sorted(set(centres[0]) ^ set(centres[1]))
    if missing:
        raise ConfigError(
            f"label {missing[0]} is in {fixed if missing[0] in centres[0] else moving} only ({len(missing)} such "
            "labels); expected the same labels in both"
        )
    _require_enough(len(centres[0]), f"{fixed} has {len(centres[0])} labels")
    names = sorted(centres[0])
    found = [np.array([each[name] for name in names]) for each in centres]
    return Correspondence("labels", found[0], found[1])


def read_image(path: Path) -> tuple[NDArray[np.float32], Grid]:
    """Read a volume of one channel: voxels (z, y, x) and grid.

    Raises
    ------
    VolumeError
        If SimpleITK cannot read it, or it is no volume of one channel.
    """
    if not path.is_file():
        raise VolumeError(f"{path} does not exist or is a folder; expected a file (NIfTI, NRRD, MHA)")
    try:
        with silent_itk():
            image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise VolumeError(
            f"{path} cannot be read by SimpleITK, and a benchmark gives every method the same file; expected NIfTI, "
            "NRRD or MHA"
        ) from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1 or min(image.GetSize()) < 2:
        raise VolumeError(
            f"{path} has the size {image.GetSize()} and {image.GetNumberOfComponentsPerPixel()} channels; expected a "
            "volume of one channel"
        )
    values, grid = array_and_grid(image)
    return values.astype(np.float32), grid


def _centres(path: Path, image: Grid) -> dict[int, FloatArray]:
    # The centres count in the world of the image, so labels on a grid of their own are refused.
    values, grid = read_image(path)
    if not grid.agrees_with(image):
        raise ConfigError(f"{path} lies on {grid}, and its image on {image}; expected the same grid")
    if not np.array_equal(values, np.rint(values)):
        raise ConfigError(f"{path} has values that are no whole numbers; expected labels")
    index = np.argwhere(values != 0)
    # All centres in one pass. A mask for each label would read the volume once a label.
    names, where = np.unique(values[values != 0].astype(np.int64), return_inverse=True)
    counts = np.bincount(where)
    sums = np.stack([np.bincount(where, weights=index[:, axis]) for axis in range(3)], axis=1)
    centres = grid.world_mm(sums / counts[:, None])
    return {int(name): centre for name, centre in zip(names, centres, strict=True)}


def _require_enough(count: int, what: str) -> None:
    if count < _FEWEST:
        raise ConfigError(
            f"{what}; expected at least {_FEWEST}, since fewer do not tell a right answer from a wrong one"
        )
