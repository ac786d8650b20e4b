"""Matrices in text: in RAS or LPS from fixed to moving points, or FSL's.

FSL's matrix maps *moving* to *fixed* coordinates. Its coordinates are voxels times their spacing, with the x axis
turned round where the image is not mirrored (its matrix to RAS has a positive determinant). So it means something only
with the grids of both volumes.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from comir_hpc.errors import RegistrationError
from comir_hpc.space.grid import FloatArray, Grid
from comir_hpc.transforms.affine import Affine
from comir_hpc.transforms.conventions.grids import (
    GridPair,
    from_ras,
    inverted,
    matrix_in_ras,
    ras_from_index,
)

_WORLD = re.compile(r"^# comir-hpc (matrix-ras|matrix-lps):", re.MULTILINE)
_HEAD = "# comir-hpc {form}: maps fixed points to moving points, {world} (x, y, z) in mm\n"


def matrix_text(transform: Affine, form: str) -> str:
    """Return a 4 x 4 matrix as text, with a comment that says its world and direction.

    Parameters
    ----------
    form : "matrix-ras" or "matrix-lps"
        World of the matrix.
    """
    matrix = matrix_in_ras(transform) if form == "matrix-ras" else transform.matrix_mm
    return _HEAD.format(form=form, world=form[-3:].upper()) + _rows(matrix)


def said_world(text: str) -> str | None:
    """Return the form that a text of ours names in its comment: ``matrix-ras``, ``matrix-lps`` or None."""
    found = _WORLD.search(text)
    return None if found is None else found[1]


def read_matrix(path: Path, form: str, grids: GridPair) -> Affine:
    """Read a matrix in text.

    Parameters
    ----------
    form : "matrix-ras", "matrix-lps" or "fsl"
        What the matrix means.
    grids : GridPair
        Grids of both volumes, which FSL's needs.

    Raises
    ------
    RegistrationError
        If the text holds no matrix, says that it is another one, a grid is missing, or the matrix is not invertible.
    """
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    said = said_world(text)
    if said is not None and said != form:
        raise RegistrationError(f"{path} says that it is {said}, and --from says {form}; leave --from out")
    matrix = _matrix(path, text)
    if form == "fsl":
        fixed, moving = grids.both(f"{path}: what a matrix of FSL means")
        to_fixed, to_moving = (fsl_from_ras(grid) for grid in (fixed, moving))
        return from_ras(inverted(to_moving) @ inverted(matrix) @ to_fixed)
    return from_ras(matrix) if form == "matrix-ras" else Affine(matrix)


def fsl_text(transform: Affine, grids: GridPair) -> str:
    """Return the matrix of FSL (flirt -omat) of a transform.

    Raises
    ------
    RegistrationError
        If a grid is missing.
    """
    fixed, moving = grids.both("a matrix of FSL")
    to_fixed, to_moving = (fsl_from_ras(grid) for grid in (fixed, moving))
    # No comment: not every reader of such files knows one.
    return _rows(to_fixed @ inverted(matrix_in_ras(transform)) @ inverted(to_moving))


def fsl_from_ras(grid: Grid) -> FloatArray:
    """Return the matrix (4, 4) from RAS points in mm to FSL's coordinates of an image on a grid."""
    ras = ras_from_index(grid)
    spacing = np.asarray(grid.spacing_mm[::-1])
    scaled = np.diag([*spacing, 1.0])
    # FSL counts as in an image with a negative determinant. In any other one it counts x from the far end.
    if np.linalg.det(ras) > 0:
        turned = np.diag([-1.0, 1.0, 1.0, 1.0])
        turned[0, 3] = (grid.shape_zyx[2] - 1) * spacing[0]
        scaled = turned @ scaled
    return np.asarray(scaled @ inverted(ras), dtype=np.float64)


def _rows(matrix: FloatArray) -> str:
    return "".join(" ".join(repr(float(value)) for value in row) + "\n" for row in matrix)


def _matrix(path: Path, text: str) -> FloatArray:
    rows = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith(("#", "%"))]
    words = [word for row in rows for word in re.split(r"[\s,;]+", row.strip(" \t,;[]")) if word]
    try:
        numbers = [float(word) for word in words]
    except ValueError as error:
        raise RegistrationError(
            f"{path} is no matrix in text ({str(error)[:80]}); expected 4 x 4 numbers"
        ) from error
    # Three rows are a whole affine map: the fourth is always the same.
    if len(numbers) == 12:
        numbers += [0.0, 0.0, 0.0, 1.0]
    if len(numbers) != 16:
        raise RegistrationError(
            f"{path} holds {len(numbers)} numbers; expected the 16 of a 4 x 4 matrix, or 12"
        )
    matrix = np.asarray(numbers).reshape(4, 4)
    if not np.isfinite(matrix).all():
        raise RegistrationError(f"{path} holds numbers that are not finite; write it again")
    return matrix
