"""The judge of the fuzz: it knows a right volume, and no wrong one passes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from references import Answer, Piece, agrees, same_values
from registration_cases import OBLIQUE

from comir_hpc.space.grid import Grid

GRID = Grid((5, 6, 7), (2.0, 0.5, 0.25), (10.0, -20.0, 30.0), OBLIQUE)
VALUES = np.random.default_rng(0).normal(size=(2, 5, 6, 7))


def answer(grid: Grid = GRID, values: np.ndarray = VALUES) -> Answer:
    return [Piece(np.moveaxis(values, 0, -1), grid.matrix_mm[:3])]


def slices(grid: Grid = GRID) -> Answer:
    """A piece for each slice, in any order."""
    pieces = []
    for z in (3, 0, 4, 1, 2):
        affine = grid.matrix_mm[:3].copy()
        affine[:, 3] += z * affine[:, 0]
        pieces.append(Piece(np.moveaxis(VALUES[:, z : z + 1], 0, -1), affine))
    return pieces


def test_the_same_volume_agrees_however_it_is_told() -> None:
    assert agrees(GRID, VALUES, answer())
    assert agrees(GRID, VALUES, slices())
    # Another order of the axes, with an affine that says so.
    turned = [Piece(VALUES.transpose(3, 1, 2, 0), GRID.matrix_mm[:3][:, [2, 0, 1, 3]])]
    assert agrees(GRID, VALUES, turned)
    # Stored backwards, with an affine that begins at the other end.
    affine = GRID.matrix_mm[:3].copy()
    affine[:, 3] += 6 * affine[:, 2]
    affine[:, 2] *= -1
    assert agrees(GRID, VALUES, [Piece(np.moveaxis(VALUES[..., ::-1], 0, -1), affine)])
    assert agrees(GRID, VALUES.astype(np.float32), answer())


def one_voxel() -> np.ndarray:
    values = VALUES.copy()
    values[1, 4, 5, 6] += 0.01
    return values


WRONG = {
    "a voxel": (GRID, one_voxel()),
    "backwards": (GRID, VALUES[:, ::-1]),
    "channels exchanged": (GRID, VALUES[::-1]),
    "one slice further": (replace(GRID, origin_xyz=tuple(GRID.world_mm((1, 0, 0)).tolist())), VALUES),
    "a hundredth of a voxel away": (
        replace(GRID, origin_xyz=tuple(GRID.world_mm((0, 0.01, 0)).tolist())),
        VALUES,
    ),
    "other proportions": (replace(GRID, spacing_zyx=(2.0, 0.25, 0.5)), VALUES),
    "another unit": (replace(GRID, unit="micrometer"), VALUES),
    "not turned": (replace(GRID, direction=((1, 0, 0), (0, 1, 0), (0, 0, 1))), VALUES),
    "a mirror": (replace(GRID, direction=tuple(map(tuple, np.diag([-1, 1, 1]) @ np.array(OBLIQUE)))), VALUES),
    "a slice less": (replace(GRID, shape_zyx=(4, 6, 7)), VALUES[:, :4]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_volume_does_not_agree(name: str) -> None:
    grid, values = WRONG[name]
    assert not agrees(grid, values, answer())
    assert not agrees(grid, values, slices())


def test_pieces_at_one_place_leave_none_unseen() -> None:
    twice = [*slices()[:4], slices()[0]]
    assert not agrees(GRID, VALUES, twice)


def test_without_a_unit_the_values_their_order_and_the_proportions_count() -> None:
    assert same_values(VALUES, None, answer())
    assert same_values(VALUES, (8.0, 2.0, 1.0), answer())
    assert same_values(VALUES, (8.0, 2.0, 1.0), [replace(answer()[0], affine=None)])
    assert not same_values(VALUES, (8.0, 1.0, 2.0), answer())
    for values in (one_voxel(), VALUES[:, ::-1], VALUES[::-1], VALUES[:, :4], VALUES.swapaxes(2, 3)):
        assert not same_values(values, None, answer())
