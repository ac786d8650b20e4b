"""Say how well two maps agree in place, cell by cell, where no encoder was trained: evidence for an alignment."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

CELL = 10
"""Side of a cell in voxels: large enough to hold structure, small enough for about a hundred cells in a third of a
specimen of 96 voxels."""
_APART = 3  # voxels between the places that a cell is compared with; two neighbours would look alike
_SPECIMEN = 0.6  # share of a cell that has to be specimen


@dataclass(frozen=True)
class PlaceRetrieval:
    """How many cells of one map find their place in another one.

    Attributes
    ----------
    share : float
        Share of the cells that agree best with the partner at their own place, among 27 places; 1/27 is chance.
    correlation : float
        Mean correlation of the cells with their partners.
    cells : int
        Number of cells that were compared.
    """

    share: float
    correlation: float
    cells: int


def retrieve_places(fixed: Array, moving: Array, mask: NDArray[np.bool_]) -> PlaceRetrieval:
    """Compare every cell of one map with the other map at its own place and at the 26 places around it.

    Two maps that are aligned agree best where they are. Maps that were trained on a wrong alignment agree there only by
    what they have learned by heart, and that is of no use on voxels that the training has not seen.

    Parameters
    ----------
    fixed, moving : (c, z, y, x) float32
        Maps on one grid.
    mask : (z, y, x) bool
        Voxels that count: specimen that was held out.

    Returns
    -------
    PlaceRetrieval
        With a share and a correlation of 0 if no cell holds enough specimen.
    """
    shape = np.asarray(mask.shape)
    shifts = np.asarray(list(product((0, -_APART, _APART), repeat=3)))
    found = []
    for first in product(*(range(_APART, n - CELL - _APART + 1, CELL) for n in shape)):
        box = tuple(slice(f, f + CELL) for f in first)
        inside = mask[box]
        if inside.mean() < _SPECIMEN:
            continue
        cell = fixed[(slice(None), *box)][:, inside]
        others = []
        for shift in shifts:
            place = tuple(slice(f + s, f + s + CELL) for f, s in zip(first, shift, strict=True))
            others.append(_correlation(cell, moving[(slice(None), *place)][:, inside]))
        found.append(others)
    if not found:
        return PlaceRetrieval(0.0, 0.0, 0)
    table = np.asarray(found)
    share = float((table[:, 0] > table[:, 1:].max(axis=1)).mean())
    return PlaceRetrieval(share, float(table[:, 0].mean()), len(table))


def _correlation(one: Array, other: Array) -> float:
    """Correlate two sets of values (c, n), each channel about its own mean."""
    u, v = (a - a.mean(axis=1, keepdims=True) for a in (one, other))
    norm = float(np.sqrt((u * u).sum() * (v * v).sum()))
    return float((u * v).sum()) / norm if norm > 0 else 0.0
