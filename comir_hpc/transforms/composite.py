"""Several transforms, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from numpy.typing import ArrayLike

from comir_hpc.errors import RegistrationError
from comir_hpc.space.grid import FloatArray, Grid
from comir_hpc.transforms.affine import Affine
from comir_hpc.transforms.protocol import PointMap


@dataclass(frozen=True, eq=False)
class Composite(PointMap):
    """Transforms that are applied one after the other.

    Parameters
    ----------
    steps : sequence of PointMap
        Maps to join, at least one. The first is applied first, to fixed points; the last gives moving points.

    Raises
    ------
    RegistrationError
        If no step is given.
    """

    steps: tuple[PointMap, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        if not self.steps:
            raise RegistrationError("a composite transform without a part; expected at least one")

    def apply(self, points_mm: ArrayLike) -> FloatArray:
        """Return the moving-space points (..., 3) of fixed-space points (..., 3), LPS (x, y, z) in mm."""
        first, *others = self.steps
        return reduce(lambda points, step: step.apply(points), others, first.apply(points_mm))

    def apply_to_grid(self, grid: Grid) -> FloatArray:
        """Return the moving-space points (z, y, x, 3) of all voxel centres of a fixed grid."""
        first, *others = self.steps
        return reduce(lambda points, step: step.apply(points), others, first.apply_to_grid(grid))

    def inverse(self) -> Composite:
        """Return the inverses of the steps in the opposite order.

        Raises
        ------
        RegistrationError
            If a step has no inverse in closed form.
        """
        return Composite(tuple(step.inverse() for step in reversed(self.steps)))

    @property
    def parts(self) -> tuple[PointMap, ...]:
        """Parts of all steps, in the order in which they are applied."""
        return tuple(part for step in self.steps for part in step.parts)

    @property
    def notes(self) -> tuple[str, ...]:
        """Assumptions that were made when the steps were read, for the user to see."""
        return tuple(note for step in self.steps for note in step.notes)


def as_affine(transform: PointMap) -> Affine | None:
    """Return the one matrix that does the same as a transform, or None where a part of it bends space."""
    parts = transform.parts
    linear = [part for part in parts if isinstance(part, Affine)]
    if len(linear) < len(parts):
        return None
    return reduce(lambda done, step: step.compose(done), linear)


def notes_on(transform: PointMap, name: str) -> tuple[str, ...]:
    """Return what the user should know of a transform that was read from a file of this name."""
    linear = [part for part in transform.parts if isinstance(part, Affine)]
    # Two reflections, one after the other, are a rotation.
    if sum(part.determinant < 0 for part in linear) % 2 == 0:
        return transform.notes
    return (
        *transform.notes,
        f"{name}: a reflection (its determinant is negative), which turns left into right",
    )
