"""FreeSurfer's LTA files: one matrix between two volumes whose geometry stands in the file.

The matrix maps points of the source (`src`, the moving volume) to points of the destination (`dst`, the fixed volume).
It acts on RAS points in mm (type 1) or on voxels (type 0).
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

_VOXELS, _RAS = 0, 1
_TYPES = {2: "LINEAR_PHYSVOX_TO_PHYSVOX", 14: "REGISTER_DAT", 21: "LINEAR_COR_TO_COR"}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def lta_text(transform: Affine, grids: GridPair) -> str:
    """Return the LTA file (type 1, RAS to RAS) of a transform.

    Raises
    ------
    RegistrationError
        If a grid is missing.
    """
    fixed, moving = grids.both("an LTA file")
    # Ours goes from fixed to moving, an LTA file from src (moving) to dst (fixed).
    matrix = inverted(matrix_in_ras(transform))
    rows = "\n".join(" ".join(f"{value:.17e}" for value in row) for row in matrix)
    return (
        "# transform file written by comir-hpc: src is the moving volume, dst the fixed one\n"
        f"type      = {_RAS}\nnxforms   = 1\nmean      = 0.0000 0.0000 0.0000\nsigma     = 1.0000\n1 4 4\n{rows}\n"
        f"src volume info\n{_geometry(moving, 'moving')}dst volume info\n{_geometry(fixed, 'fixed')}"
    )


def read_lta(path: Path) -> Affine:
    """Read an LTA file of one matrix.

    Raises
    ------
    RegistrationError
        If it is damaged, holds several matrices, is of a type that depends on more than the file says, or its matrix is
        not invertible.
    """
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    text = re.sub(r"#.*", "", text)
    kind, count = (_integer(path, text, name) for name in ("type", "nxforms"))
    if count != 1:
        raise RegistrationError(f"{path} is an LTA file of {count} matrices; expected one")
    if kind not in (_VOXELS, _RAS):
        raise RegistrationError(
            f"{path} is an LTA file of type {kind} ({_TYPES.get(kind, 'unknown')}); convert it: lta_convert --inlta "
            f"{path.name} --outlta ras.lta, which writes RAS to RAS"
        )
    found = re.search(rf"^\s*1 +4 +4\s*\n((?:(?:\s*{_NUMBER}){{4}}\s*\n){{4}})", text, re.MULTILINE)
    if found is None:
        raise RegistrationError(
            f"{path} is an LTA file without a matrix of 4 x 4 finite numbers; copy it again"
        )
    matrix = np.array([float(word) for word in found[1].split()]).reshape(4, 4)
    if kind == _VOXELS:
        source, target = (_ras_from_voxels(path, text, name) for name in ("src", "dst"))
        matrix = target @ matrix @ inverted(source)
    return from_ras(inverted(matrix))


def _integer(path: Path, text: str, name: str) -> int:
    found = re.search(rf"^\s*{name}\s*=\s*(\d+)", text, re.MULTILINE)
    if found is None:
        raise RegistrationError(f"{path} is an LTA file without a line `{name} = ...`; copy it again")
    return int(found[1])


def _geometry(grid: Grid, name: str) -> str:
    """Return the lines that say where the voxels of a volume lie, in RAS."""
    matrix = ras_from_index(grid)
    shape, spacing = np.asarray(grid.shape_zyx[::-1]), np.asarray(grid.spacing_mm[::-1])
    # FreeSurfer's centre has the index shape / 2. That is half a voxel beyond the middle of the voxel centres.
    centre = matrix[:3, :3] @ (shape / 2) + matrix[:3, 3]
    axes = (matrix[:3, :3] / spacing).T
    lines = [
        "valid = 1  # volume info valid",
        f"filename = {name}",
        f"volume = {' '.join(map(str, shape.tolist()))}",
    ]
    rows = {"voxelsize": spacing, "xras  ": axes[0], "yras  ": axes[1], "zras  ": axes[2], "cras  ": centre}
    lines += [f"{key} = {' '.join(f'{value:.17e}' for value in row)}" for key, row in rows.items()]
    return "\n".join(lines) + "\n"


def _ras_from_voxels(path: Path, text: str, name: str) -> FloatArray:
    """Read where the voxels of one of the two volumes lie: the matrix (4, 4) from voxel (x, y, z, 1) to RAS in mm."""
    section = text.partition(f"{name} volume info")[2].partition("volume info")[0]

    def numbers(key: str) -> FloatArray:
        found = re.search(rf"^\s*{key}\s*=\s*({_NUMBER})\s+({_NUMBER})\s+({_NUMBER})", section, re.MULTILINE)
        if found is None or re.search(r"^\s*valid\s*=\s*1", section, re.MULTILINE) is None:
            raise RegistrationError(
                f"{path} is an LTA file between voxels, and its {name} volume info is missing or not valid; convert it "
                f"where both volumes are: lta_convert --inlta {path.name} --outlta ras.lta"
            )
        return np.array([float(word) for word in found.groups()])

    matrix = np.eye(4)
    matrix[:3, :3] = np.stack([numbers(key) for key in ("xras", "yras", "zras")], axis=1) * numbers(
        "voxelsize"
    )
    matrix[:3, 3] = numbers("cras") - matrix[:3, :3] @ (numbers("volume") / 2)
    return matrix
