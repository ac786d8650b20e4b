"""What is kept in the folder of a registration of the field that refines it: refinement.json, and slices beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from comir_hpc.errors import RegistrationError
from comir_hpc.runs.record import Record, read_record

REFINEMENT_FILE, SLICES_FILE = "refinement.json", "refinement.npz"
EVIDENCE = "evidence"
"""Store within the field's: an image of one voxel a block, with what became of it."""
_REMEDY = "run `comir-hpc refine` again"
Finite = Annotated[float, Field(allow_inf_nan=False)]


class RefinementRecord(Record):
    """Content of refinement.json.

    Attributes
    ----------
    format : int
        Version of the file's format.
    registration : str or None
        Fingerprint of the registration that was refined.
    field : str
        Absolute path of the store that holds the field.
    compared : str
        What was compared, in words.
    smoothness_mm, spacing_mm : float
        Smoothness length, and voxel size of the grid of the comparison.
    core_voxels : three int
        Voxels (z, y, x) of a block without what it shares with others.
    states : dict of str to int
        Number of blocks by what became of them.
    before, after : float or None
        Mean agreement of the cubes that were held out in blocks that were kept, under the coarse solution and under
        their own.
    folded_points : int
        Points of the field's lattice whose determinant is zero or less.
    least_determinant, largest_mm : float
        Least determinant, and length of the largest displacement in mm.
    displacement_mm, inverse_residual_mm : float or None
        Means over the blocks with content.
    """

    format: int = 0
    registration: str | None = None
    field: str
    compared: str = ""
    smoothness_mm: Finite | None = None
    spacing_mm: Finite | None = None
    core_voxels: tuple[int, ...] = ()
    states: dict[str, int] = Field(default_factory=dict)
    before: Finite | None = None
    after: Finite | None = None
    folded_points: int = 0
    least_determinant: Finite | None = None
    displacement_mm: Finite | None = None
    largest_mm: Finite | None = None
    inverse_residual_mm: Finite | None = None


def read_refinement(folder: Path) -> RefinementRecord | None:
    """Read the refinement.json of a registration's folder; None where there is none.

    Raises
    ------
    RegistrationError
        If it is damaged, or of a newer format.
    """
    path = folder / REFINEMENT_FILE
    return read_record(path, RefinementRecord, RegistrationError, _REMEDY) if path.is_file() else None
