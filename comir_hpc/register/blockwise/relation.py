"""How intensities of the moving volume stand for those of the fixed one, over the whole specimen.

Two modalities need not run the same way. In memory, `register --transform field` gives each moving value the mean fixed
value of the places that show it, in every step anew. Block by block, every block would have a relation of its own, so
that neighbours would compare different things. So it is found once, under the coarse solution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from comir_hpc.register.blockwise.coarse import Coarse
from comir_hpc.register.blockwise.sides import Side, small_level
from comir_hpc.register.deform.forces import as_fixed
from comir_hpc.register.deform.warping import Array, sample
from comir_hpc.space.grid import FloatArray
from comir_hpc.volumes.resampled import Resampled
from comir_hpc.volumes.volume import Volume

_PLACES = 200_000  # places that are looked up, at most
_STEPS = 256  # values at which the relation is known


@dataclass(frozen=True, eq=False)
class Relation:
    """A table from moving to fixed intensities, both normalised.

    Attributes
    ----------
    moving, fixed : (n,) float32
        Values of both volumes that belong together, the moving ones ascending.
    """

    moving: Array
    fixed: Array

    @classmethod
    def found(cls, fixed: Side, moving: Volume, coarse: Coarse) -> Relation:
        """Look both volumes up at places spread over the fixed specimen, on levels that are in memory as a whole."""
        points = fixed.specimen_points_mm(_PLACES)
        one = _looked_up(fixed.volume, points)[0]
        other, inside = _looked_up(moving, coarse.moved_mm(points))
        # A ramp without weight is carried along: what becomes of it is the table.
        ramp = np.linspace(other.min(), other.max(), _STEPS, dtype=np.float32)
        of_fixed, of_moving, weights = (
            np.concatenate([values, extra]).astype(np.float32)[None, None]
            for values, extra in ((one, 0 * ramp), (other, ramp), (inside, 0 * ramp))
        )
        found = as_fixed(of_fixed[None], of_moving[None], weights)[0, 0, 0, -_STEPS:]
        return cls(ramp, found.astype(np.float32))

    def __call__(self, values: Array) -> Array:
        """Give moving values (c, z, y, x) the fixed volume's."""
        return np.interp(values, self.moving, self.fixed).astype(np.float32)


def _looked_up(volume: Volume, points_mm: FloatArray) -> tuple[Array, NDArray[np.bool_]]:
    """Normalised intensities (n,) at points (n, 3), and which of them lie inside the volume."""
    level = small_level(volume)
    image = volume.intensity().normalise(Resampled(volume, level).read()[0])
    place = volume.level_grid(level).index_zyx(points_mm)
    inside = ((place >= 0) & (place <= np.asarray(image.shape) - 1)).all(axis=1)
    return sample(image[None], place.T.astype(np.float32))[0], np.asarray(inside, dtype=np.bool_)
