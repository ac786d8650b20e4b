"""What result.json says of a deformation."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from comir_hpc.runs.record import Record

Figure = float | None
Finite = Annotated[float, Field(allow_inf_nan=False)]


class HeldOutRecord(Record):
    """How a deformation changed the agreement of the part of the specimen that took no part in finding it.

    Attributes
    ----------
    before, after : float
        Mean agreement of the cubes that were held out, under the affine answer and under the deformation.
    gain, standard_error : float or None
        Mean of the differences and its standard error; None where there are too few cubes.
    cubes : int
        Number of cubes.
    """

    before: Figure = None
    after: Figure = None
    gain: Figure = None
    standard_error: Figure = None
    cubes: int = 0


class TwoWaysRecord(Record):
    """How far maps and intensities, each by itself, agree on a bend.

    Attributes
    ----------
    maps_mm, intensities_mm, apart_mm : float
        Mean length of the displacement found on the maps, of that found on the intensities, and their mean distance.
    """

    maps_mm: Finite
    intensities_mm: Finite
    apart_mm: Finite


class DeformationRecord(Record):
    """What bent space after the affine answer, or why nothing does.

    Attributes
    ----------
    kind : str
        ``bspline`` or ``field``.
    smoothness_mm : float
        Smoothness length in mm.
    kept : bool
        Whether the transform bends; otherwise the affine answer is the result.
    reason : str
        Why it was kept or not, as a sentence.
    held_out : HeldOutRecord or None
        What it was judged by; None where nothing was bent.
    two_ways : TwoWaysRecord or None
        What it was judged by beside that; None where only maps or only intensities were compared.
    displacement_mm, inverse_residual_mm : dict of str to float
        Mean, 95th percentile (``p95``) and ``largest`` length over the specimen: of the displacement, and of what is
        left after a point is carried there and back.
    determinant : dict of str to float
        Determinant of the Jacobian over the specimen: ``least``, ``p01``, ``p99``, ``largest``.
    folded_points, folded_share : int, float
        Points of the lattice in the specimen whose determinant is zero or less, and their share.
    lattice : dict or None
        Grid of the displacement.
    smoothings : int
        How often the velocity was smoothed until nothing folded.
    """

    kind: str
    smoothness_mm: Figure = None
    kept: bool
    reason: str = ""
    held_out: HeldOutRecord | None = None
    two_ways: TwoWaysRecord | None = None
    displacement_mm: dict[str, Finite] = Field(default_factory=dict)
    inverse_residual_mm: dict[str, Finite] = Field(default_factory=dict)
    determinant: dict[str, Finite] = Field(default_factory=dict)
    folded_points: int = 0
    folded_share: Finite = 0.0
    lattice: dict[str, Any] | None = None
    smoothings: int = 0
