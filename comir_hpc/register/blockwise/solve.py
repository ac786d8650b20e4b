"""One block: find what the coarse solution leaves over in it, and keep that if voxels that took no part agree better.

A block looks at nothing but its box of both volumes. So its solution depends on the volumes, the coarse solution and
the layout alone, and not on who computes it, or in which order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from comir_hpc.register.blockwise.coarse import Coarse
from comir_hpc.register.blockwise.evidence import STATES, State
from comir_hpc.register.blockwise.layout import Layout
from comir_hpc.register.blockwise.sides import Side
from comir_hpc.register.deform.held_out import Gain, HeldOut
from comir_hpc.register.deform.lattice import Lattice, from_velocity
from comir_hpc.register.deform.velocity import Maps, find_velocity
from comir_hpc.register.deform.warping import Array, carried, sample
from comir_hpc.representations.features import Features
from comir_hpc.space.grid import Box, Grid, as_triple
from comir_hpc.transforms.affine import Affine
from comir_hpc.transforms.jacobian import folded

if TYPE_CHECKING:
    from comir_hpc.register.blockwise.relation import Relation

FEWEST_VOXELS = 28
"""Voxels along the shortest side of the box that a block looks at, on its coarse levels."""
MOST_LEVELS = 3
"""Working grids that a block looks at, at most."""
_REACH = 2.0  # smoothness lengths around the image of a block that are read of the moving volume
_FEWEST_MOVING = 4  # voxels along each side of what is read of the moving volume
_CORNERS = 5  # points along each side of a box whose images are looked at


@dataclass(frozen=True, eq=False)
class Solution:
    """The solution of one block.

    Attributes
    ----------
    displacement_mm : (3, z, y, x) float32
        Displacement along the axes of the lattice, before the affine part, on the tile of the block.
    note : dict
        State and figures, JSON-ready; None for what could not be measured.
    """

    displacement_mm: Array
    note: dict[str, Any]


class Solver:
    """Finds the solutions of blocks.

    Parameters
    ----------
    fixed, moving : Side
        Both volumes.
    coarse : Coarse
        The coarse solution.
    layout : Layout
        Blocks of the fixed volume.
    seed : int
        Seed of the place of the pattern of cubes that are held out.
    """

    def __init__(self, fixed: Side, moving: Side, coarse: Coarse, layout: Layout, *, seed: int) -> None:
        self.fixed, self.moving, self.coarse, self.layout = fixed, moving, coarse, layout
        self.seed = seed

    @cached_property
    def relation(self) -> Relation | None:
        """What moving intensities stand for; None where equal values mean the same in both volumes."""
        # Here, so that the chain of imports stays short.
        from comir_hpc.register.blockwise.relation import Relation

        whole = self.fixed.encoder is None
        return Relation.found(self.fixed, self.moving.volume, self.coarse) if whole else None

    def __call__(self, index: int) -> Solution:
        """Find the solution of a block; where there is none, it is the coarse one."""
        tile = self.layout.lattice.crop(self.layout.tile(index))
        core = self.layout.core(index)
        content = float(self.fixed.mask(self.layout.grid.crop(core)).mean()) if core.size else 0.0
        if not content:
            return self._coarse(tile, "no content", content)
        levels = self._levels(self.layout.seen(index))
        if levels is None:
            return self._coarse(tile, "refused", content)
        held = self._held(levels[-1], index)
        compared = [_compared(held[0], maps, levels[-1].grid) for maps in levels]
        found = from_velocity(find_velocity(compared, self.layout.smoothness_mm))
        if folded(found.determinant) or not np.isfinite(found.displacement_mm).all():
            return self._coarse(tile, "refused", content, found)
        after = carried(found.displacement_mm, found.grid, levels[-1].grid)
        gain = held[1].gain(levels[-1].fixed, levels[-1].seen(), levels[-1].seen(after), True)
        if gain.refusal is not None:
            return self._coarse(tile, "fell back", content, found, gain)
        own = carried(found.displacement_mm, found.grid, tile, outside="zeros")
        note = _note("kept", content, found, gain)
        return Solution(self.coarse.displacement_mm(tile, own), note)

    def _coarse(
        self, tile: Grid, state: State, content: float, found: Lattice | None = None, gain: Gain | None = None
    ) -> Solution:
        return Solution(self.coarse.displacement_mm(tile), _note(state, content, found, gain))

    def _held(self, finest: Maps, index: int) -> tuple[HeldOut, HeldOut]:
        """Cubes of the whole box, which take no part, and those of them that the block is judged by."""
        inside = finest.weights > 0.5
        seen, near = self.layout.seen(index), self.layout.near(index)
        own = np.zeros_like(inside)
        own[near.intersect(seen).slices_in(seen)] = True
        return tuple(HeldOut(mask, self.layout.held_side, self.seed) for mask in (inside, inside & own))  # type: ignore[return-value]

    def _levels(self, box: Box) -> list[Maps] | None:
        """Maps of a box at each level, the coarsest first; None where the finest one shows nothing to compare."""
        found: list[Maps] = []
        for level in range(num_levels(self.layout, len(self.fixed.readers))):
            maps = self._maps(level, _box_at(self.fixed.grid(level), self.layout.grid.crop(box)))
            if maps is None:
                break
            found.append(maps)
        return found[::-1] or None

    def _maps(self, level: int, box: Box) -> Maps | None:
        # Here, so that the chain of imports stays short.
        from comir_hpc.register.deform import make_maps

        grid = self.fixed.grid(level).crop(box)
        there = self.moving_box(level, grid)
        if min(there.shape) < _FEWEST_MOVING:
            return None
        fixed, moving = self.fixed.features(level, box), self.moving.features(level, there, everywhere=True)
        if self.relation is not None:
            moving = replace(moving, values=self.relation(moving.values))
        if not fixed.mask.any() or not _varies(fixed.values[:, fixed.mask]) or not _varies(moving.values):
            return None
        if self.coarse.bend is None:
            return make_maps(fixed, moving, self.coarse.affine, alike=True)
        # The moving maps are laid onto the fixed grid by the coarse solution; what is found is what is left.
        return make_maps(fixed, self._laid(moving, grid), Affine.identity(), alike=True)

    def moving_box(self, level: int, grid: Grid) -> Box:
        """Voxels of the moving working grid that a grid in the fixed world may show, with room for what is found."""
        axes = [np.linspace(-0.5, n - 0.5, _CORNERS) for n in grid.shape_zyx]
        points = grid.world_mm(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)).reshape(-1, 3)
        target = self.moving.grid(level)
        index = target.index_zyx(self.coarse.moved_mm(points))
        room = math.ceil(_REACH * self.layout.smoothness_mm / target.finest_mm)
        low, high = np.floor(index.min(axis=0)) - room, np.ceil(index.max(axis=0)) + 1 + room
        return Box(as_triple(low.tolist(), int), as_triple(high.tolist(), int)).intersect(target.box)

    def _laid(self, moving: Features, grid: Grid) -> Features:
        place = np.moveaxis(moving.grid.index_zyx(self.coarse.moving_mm(grid)), -1, 0).astype(np.float32)
        last = np.asarray(moving.grid.shape_zyx, dtype=np.float32)[:, None, None, None]
        known = np.asarray(((place >= -0.5) & (place <= last - 0.5)).all(axis=0), dtype=np.bool_)
        if moving.known is not None:
            known &= sample(moving.known[None].astype(np.float32), place, outside="zeros")[0] > 0.5
        return Features(sample(moving.values, place), known, grid, known)


def num_levels(layout: Layout, offered: int) -> int:
    """Count the working grids that a block looks at: the same number for every block."""
    side = min(layout.largest())
    found = 1
    while found < offered and side >= FEWEST_VOXELS * 2**found:
        found += 1
    return found


def _compared(held: HeldOut, maps: Maps, grid: Grid) -> Maps:
    """Take the cubes that are held out from what is compared; `grid` is that of the cubes."""
    there = carried(held.mask[None].astype(np.float32), grid, maps.grid)[0]
    return replace(maps, weights=(maps.weights * (1 - there)).astype(np.float32))


def _box_at(grid: Grid, seen: Grid) -> Box:
    """Voxels of a grid that cover another one with the same axes."""
    ends = grid.index_zyx(seen.world_mm([[-0.5] * 3, [n - 0.5 for n in seen.shape_zyx]]))
    # A face that lies on a face between two voxels belongs to one of them only, whatever the last bits say.
    start, stop = np.floor(ends[0] + 0.5 + 1e-6), np.ceil(ends[1] + 0.5 - 1e-6)
    return Box(as_triple(start.tolist(), int), as_triple(stop.tolist(), int)).intersect(grid.box)


def _varies(values: Array) -> bool:
    return bool(values.size) and bool(np.isfinite(values).all()) and float(np.ptp(values, axis=-1).max()) > 0


def _note(state: State, content: float, found: Lattice | None, gain: Gain | None) -> dict[str, Any]:
    """Gather what is known of a block, JSON-ready."""
    error = None if gain is None or not math.isfinite(gain.error) else gain.error
    return {
        "state": STATES.index(state),
        "content": content,
        "before": None if gain is None else gain.before,
        "after": None if gain is None else gain.after,
        "standard_error": error,
        "cubes": 0 if gain is None else gain.cubes,
        "own_folds": 0 if found is None else folded(found.determinant),
        "smoothings": 0 if found is None else found.smoothings,
    }
