"""Find the rigid or affine maps that many matches of keypoints agree on.

As in RANSAC (Fischler and Bolles, Communications of the ACM 1981), a map is made from a small sample, and the matches
that it explains are counted. Here one match is a sample: it says where a point goes and how its neighbourhood is
turned. So all samples are tried, and nothing is random. What a sample explains is then fitted by least squares, and
explained anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from comir_hpc.register.alignment import Kind
from comir_hpc.register.keypoints.matches import Matches
from comir_hpc.space.grid import FloatArray
from comir_hpc.space.rotations import angle_deg
from comir_hpc.transforms.affine import Affine as Transform

FEWEST = 4
"""Matches that have to agree."""

_NEAR_VOX = 3.0  # a match agrees with a map that sends its fixed point so near to its moving point
_SLACK = 0.3  # the same for a sample, for each voxel of distance from it: it is 15 degrees wrong
_TURNED_DEG = 45.0  # a match agrees with a map that turns like itself, within so many degrees
_FITS = 4  # least-squares fits of each sample, each to the matches that agree with the last one
_FEWEST_AFFINE = 24  # matches for an affine fit: with fewer, its 12 numbers follow the noise
_LEAST_STRETCH, _MOST_STRETCH = 0.5, 2.0  # an affine fit beyond that is no specimen's


@dataclass(frozen=True, eq=False)
class Agreed:
    """A map with the matches that agree with it.

    The weight decides between maps. A count alone would not tell matches that are met exactly from those at the edge.

    Attributes
    ----------
    transform : Transform
        From fixed to moving points.
    weight : float
        Sum over the matches that agree: 1 for one that is met exactly, 0 at the tolerance.
    count : int
        Number of matches that agree.
    """

    transform: Transform
    weight: float
    count: int


def agreed(matches: Matches, spacing_mm: float, *, axes: int = 3, kind: Kind = "rigid") -> list[Agreed]:
    """Find the maps that at least `FEWEST` matches agree on, the best first.

    Parameters
    ----------
    matches : Matches
        Matches of keypoints.
    spacing_mm : float
        Side of a voxel of the keypoints, in mm: tolerances are multiples of it.
    axes : int
        3 for volumes; 2 for slices that lie in the plane z = 0.
    kind : "rigid" or "affine"
        Kind of the last fit. Few matches, or a fit that stretches or squeezes by more than a half, leave it rigid.
    """
    found = []
    near_mm = _NEAR_VOX * spacing_mm
    for sample in range(len(matches)):
        rotation = matches.rotations_xyz[sample]
        shift = matches.moving_mm[sample] - matches.fixed_mm[sample]
        transform = Transform.rigid(rotation, shift, matches.fixed_mm[sample])
        distance = np.linalg.norm(matches.fixed_mm - matches.fixed_mm[sample], axis=1)
        one = _explained(matches, transform, near_mm + _SLACK * distance)
        if one.sum() >= FEWEST:
            found.append(_fitted(matches, one, near_mm, axes, kind))
    valid = [one for one in found if one is not None]
    return sorted(valid, key=lambda one: -one.weight)


def distinct(answers: Sequence[Agreed], points_mm: FloatArray, apart_mm: float, count: int) -> list[Agreed]:
    """Keep the best of those that lead to one place: at most `count`, at least `apart_mm` from each other."""
    chosen: list[Agreed] = []
    for one in answers:
        if len(chosen) == count:
            break
        if all(one.transform.distance_mm(c.transform, points_mm).mean() >= apart_mm for c in chosen):
            chosen.append(one)
    return chosen


def _explained(matches: Matches, transform: Transform, near_mm: FloatArray | float) -> NDArray[np.bool_]:
    left = np.linalg.norm(transform.apply(matches.fixed_mm) - matches.moving_mm, axis=1)
    between = matches.rotations_xyz @ transform.rotation_xyz.T
    return np.asarray((left < near_mm) & (angle_deg(between) < _TURNED_DEG), dtype=np.bool_)


def _fitted(
    matches: Matches, agree: NDArray[np.bool_], near_mm: float, axes: int, kind: Kind
) -> Agreed | None:
    """Fit a map to the matches that agree with a sample, and to those that agree with the fit, a few times."""
    best: Agreed | None = None
    for number in range(_FITS):
        if agree.sum() < FEWEST:
            break
        is_last = number == _FITS - 1
        transform = fit(matches.fixed_mm[agree], matches.moving_mm[agree], axes, kind if is_last else "rigid")
        agree = _explained(matches, transform, near_mm)
        left = np.linalg.norm(transform.apply(matches.fixed_mm[agree]) - matches.moving_mm[agree], axis=1)
        weight = float((1 - (left / near_mm) ** 2).sum())
        if agree.sum() >= FEWEST and (best is None or weight > best.weight):
            best = Agreed(transform, weight, int(agree.sum()))
    return best


def fit(fixed_mm: FloatArray, moving_mm: FloatArray, axes: int, kind: Kind) -> Transform:
    """Fit a map to points (N, 3) by least squares (Kabsch, Acta Crystallographica 1976, if rigid).

    In the plane (`axes` 2) only x and y count. An affine map is fitted to at least 24 points.
    """
    centre, there = fixed_mm.mean(axis=0), moving_mm.mean(axis=0)
    one, other = (fixed_mm - centre)[:, :axes], (moving_mm - there)[:, :axes]
    left, _, right = np.linalg.svd(other.T @ one)
    turn = np.ones(axes)
    turn[-1] = np.sign(np.linalg.det(left @ right)) or 1.0
    linear = np.eye(3)
    linear[:axes, :axes] = (left * turn) @ right
    if kind == "affine" and len(one) >= _FEWEST_AFFINE:
        stretched = np.linalg.lstsq(one, other, rcond=None)[0].T
        sizes = np.linalg.svd(stretched, compute_uv=False)
        if sizes.min() >= _LEAST_STRETCH and sizes.max() <= _MOST_STRETCH and np.linalg.det(stretched) > 0:
            linear[:axes, :axes] = stretched
    return Transform.rigid(linear, there - centre, centre)
