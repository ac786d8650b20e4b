"""Put the solutions of blocks together into one field, and measure what came of it at every block.

The displacement at a point of the lattice is the weighted mean of the solutions of the blocks around it. The weights
sum to one, change smoothly, and follow from the layout alone (`layout`). So every part of the field is a function of
the blocks beside it, in whatever order they were solved.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from comir_hpc.register.blockwise.layout import Layout
from comir_hpc.register.deform.lattice import Lattice, inverted
from comir_hpc.register.deform.velocity import spacings
from comir_hpc.register.deform.warping import Array, indices, sample
from comir_hpc.space.grid import Box, as_triple
from comir_hpc.transforms.jacobian import folded
from comir_hpc.volumes.volume import Volume

_LONGEST_POINTS = 16  # lattice points around a block, at most, in which its inverse is looked for


class Blend:
    """The field that belongs to the solutions of all blocks.

    Parameters
    ----------
    layout : Layout
        Blocks of the fixed volume.
    solutions : Volume
        Their solutions, tile beside tile, as `solution_box` places them.
    """

    def __init__(self, layout: Layout, solutions: Volume) -> None:
        self.layout, self.solutions = layout, solutions

    def displacement_mm(self, box: Box) -> Array:
        """Return the displacement (3, z, y, x) at the lattice points of a box, in mm along the axes of the lattice."""
        total = np.zeros((3, *box.shape))
        for index in self.layout.touching(box):
            tile = self.layout.tile(index)
            part = tile.intersect(box)
            if not part.size:
                continue
            weights = self.layout.weights(index, part)
            if not weights.any():
                continue
            stored = solution_box(self.layout, index)
            # Of a solution that is zero nothing is stored: that of most blocks of a large volume.
            if not any(path.exists() for path in self.solutions.shard_files(stored)):
                continue
            shift = [a - b for a, b in zip(stored.start, tile.start, strict=True)]
            total[(slice(None), *part.slices_in(box))] += weights * self.solutions.read(part.shifted(shift))
        return total.astype(np.float32)

    def measured(self, index: int) -> tuple[Array, dict[str, Any]]:
        """Return the displacement in the core of a block, and figures about it, JSON-ready.

        Folds are counted at the points of the core, with the cells that reach out of it. The inverse is found by
        iteration, in as much of the surroundings as the displacement reaches over.
        """
        whole, core = self.layout.lattice, self.layout.plan[index].write
        box = core.grown((1, 1, 1)).intersect(whole.box)
        field = self.displacement_mm(box)
        found = Lattice(whole.crop(box), field, field)
        inner = core.slices_in(box)
        inside = np.zeros(box.shape, dtype=np.bool_)
        inside[inner] = True
        own = np.ascontiguousarray(field[(slice(None), *inner)])
        folds = folded(found.determinant, inside) if min(box.shape) > 1 else 0
        length = np.linalg.norm(own.astype(np.float64), axis=0)
        note = {
            "folds": folds,
            "least_determinant": float(found.determinant[inner].min()) if min(box.shape) > 1 else 1.0,
            "displacement_mm": float(length.mean()),
            "largest_mm": float(length.max()),
            "inverse_residual_mm": self._residual_mm(core, field),
        }
        return own, note

    def _residual_mm(self, core: Box, field: Array) -> float:
        """Mean distance between a point of a core and where it is after it was carried there and back, in mm."""
        whole = self.layout.lattice
        reach = float(np.abs(field / spacings(whole)).max())
        if not reach:
            return 0.0
        room = min(_LONGEST_POINTS, 2 * math.ceil(reach) + 1)
        box = core.grown((room,) * 3).intersect(whole.box)
        grid, around = whole.crop(box), self.displacement_mm(box)
        back = inverted(around, grid)
        inner = (slice(None), *core.slices_in(box))
        moved = indices(box.shape)[inner] + around[inner] / spacings(grid)
        left = around[inner] + sample(back, moved)
        return float(np.sqrt((left.astype(np.float64) ** 2).sum(axis=0)).mean())


def solution_box(layout: Layout, index: int) -> Box:
    """Place of the tile of a block among the tiles of all blocks, which lie beside each other and do not overlap."""
    place, tile = np.unravel_index(index, layout.plan.counts_zyx), layout.tile_zyx
    start = [int(p) * n for p, n in zip(place, tile, strict=True)]
    return Box(as_triple(start, int), as_triple([a + n for a, n in zip(start, tile, strict=True)], int))
