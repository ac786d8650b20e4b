"""Search all rotations and all shifts coarsely: masked correlation, or mutual information, by FFT.

For each rotation of a grid over SO(3) the coarse moving map is turned, and compared with the fixed map at all shifts by
FFT. For a single slice these are the turns in its plane. Both maps are sampled in the world frame at one isotropic
spacing, so that anisotropic, oblique and flipped grids need no special care. A score counts only the voxels that both
masks hold at that shift. A shift with too few of them is left out, since otherwise a thin overlap at the border that
agrees by chance would win.

`coarse` makes and turns the maps, `criteria` compares them. The result does not depend on the number of threads, and
nothing is random.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from comir_hpc.errors import RegistrationError
from comir_hpc.register.coarse import Turner, coarsen
from comir_hpc.register.long_specimens import is_long
from comir_hpc.representations.criteria import Correlator, Criterion
from comir_hpc.representations.features import Features
from comir_hpc.representations.measures import CORRELATION, Measure
from comir_hpc.space.grid import FloatArray
from comir_hpc.space.rotations import reverse_axes, so2_grid, so3_grid
from comir_hpc.transforms.affine import Affine as Transform

MIN_OVERLAP = 0.4
"""Share of the smaller mask that has to overlap. With less, small overlaps that agree by chance begin to win. With
more, a specimen would not be found if a part of it is missing in the other volume."""

NEAR_VOXELS, FAR_VOXELS = 3.0, 10.0
"""Mean distance, in voxels of the search, from which two answers count as different starts, and as rivals. On the 2 mm
brain the best of 1000 rotations was 1.4 to 2.4 of these voxels from the truth, and the optimiser came back from 4."""

CLOSER = 64
"""Rotations that are scored exactly, where the measure has a faster way to look at the others."""

_FEWEST_ACROSS = 4  # voxels of the search along the shortest side of the specimen
_MOST_TURNS = 360
_TASK = 16  # rotations that one thread takes at a time


@dataclass(frozen=True, eq=False)
class Search:
    """Result of the search: every rotation at its best shift.

    Attributes
    ----------
    rotations_xyz : (K, 3, 3)
        World rotations, from fixed to moving.
    pivots_mm : (K, 3)
        World point of the fixed volume that falls on `moving_centre_mm` at the best shift.
    scores : (K,)
        Criterion times the root of the overlap at the best shift (`Agreement.evidence`); -inf where no shift overlaps
        enough.
    overlaps : (K,)
        Share of the smaller mask that overlaps there, 0 where no shift overlaps enough.
    moving_centre_mm : (3,)
        World point about which the moving volume was turned.
    spacing_mm : float
        Side of a voxel of the search, in mm.
    """

    rotations_xyz: FloatArray
    pivots_mm: FloatArray
    scores: FloatArray
    overlaps: FloatArray
    moving_centre_mm: FloatArray
    spacing_mm: float

    def transform(self, index: int) -> Transform:
        """Make the transform, fixed to moving, of one rotation at its best shift."""
        pivot = self.pivots_mm[index]
        return Transform.rigid(self.rotations_xyz[index], self.moving_centre_mm - pivot, pivot)


def search(
    fixed: Features,
    moving: Features,
    rotations_xyz: FloatArray,
    *,
    voxels: int,
    measure: Measure = CORRELATION,
    min_overlap: float = MIN_OVERLAP,
    spacing_mm: float | None = None,
    closer: int = CLOSER,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Search:
    """Compare two volumes at all given rotations and all shifts.

    Parameters
    ----------
    fixed, moving : Features
        Features of the two volumes, with the same number of channels.
    rotations_xyz : (K, 3, 3)
        World rotations to try, from fixed to moving.
    voxels : int
        Number of voxels along the longest side of the fixed specimen. It sets the spacing of the search.
    measure : Measure
        Gives the criterion by which the two volumes are compared.
    min_overlap : float
        Share of the smaller mask that has to overlap.
    spacing_mm : float, optional
        Spacing of the search, instead of the one that `voxels` says.
    closer : int
        Number of the best rotations that are scored exactly, where the measure has a faster way to look at the others.
    threads : int
        Number of threads that work at the same time.
    progress : callable, optional
        Function that is called as ``progress(done, total)``.

    Raises
    ------
    RegistrationError
        If a volume has no foreground or does not vary inside it, or channels differ in number.
    """
    if len(fixed.values) != len(moving.values):
        raise RegistrationError(
            f"{len(fixed.values)} channels in the fixed volume and {len(moving.values)} in the moving one; "
            "only equally many can be compared"
        )
    spacing = spacing_mm or search_spacing_mm(fixed, voxels)
    coarse_fixed = coarsen(fixed, spacing).described
    # Twice as fine, because this map is interpolated once more for every rotation.
    coarse_moving = coarsen(moving, spacing, finer=2)
    turner = Turner(coarse_moving, coarse_fixed.frame, rotations_xyz)
    # The largest possible overlap is that of a mask with itself. Weights of both are multiplied, hence squared.
    finer = 2 ** len(fixed.grid.axes)
    full = min(float((coarse_fixed.weights**2).sum()), float((coarse_moving.weights**2).sum()) / finer)
    correlator = Correlator.plan(coarse_fixed.weights, turner.shape, min_overlap * full)
    exact = measure.criterion(coarse_fixed, coarse_moving)
    look, rough = _Look(turner, correlator, full), exact.rough

    found = _in_threads(look.through(rough), rotations_xyz, threads, progress)
    if closer and rough is not exact:
        _look_closely(found, look.through(exact), rotations_xyz, closer)
    shifts = np.asarray([one.place for one in found]) + np.asarray(correlator.first)
    middle = shifts + (np.asarray(turner.shape) - 1) / 2
    scores = np.asarray([one.score for one in found])
    return Search(
        rotations_xyz=rotations_xyz,
        pivots_mm=coarse_fixed.origin_mm + middle @ coarse_fixed.frame.T,
        scores=scores,
        overlaps=np.where(np.isfinite(scores), [one.share for one in found], 0.0),
        moving_centre_mm=turner.centre_mm,
        spacing_mm=spacing,
    )


def search_spacing_mm(fixed: Features, voxels: int) -> float:
    """Choose the side of a voxel so that the longest side of the fixed specimen has so many of them.

    A long specimen (`long_specimens`), whose turns fit into a thin box, gets at least a few voxels across.
    """
    index = np.argwhere(fixed.mask)
    if not len(index):
        raise RegistrationError("the mask of a volume is empty: there is no foreground to compare")
    sides = (np.ptp(index, axis=0) + 1) * fixed.grid.spacing_mm
    sides = np.sort(np.where(np.isin(range(3), fixed.grid.axes), sides, 0.0))
    if not is_long(fixed):
        return float(sides[2]) / voxels
    return float(min(sides[2] / voxels, max(sides[0] / _FEWEST_ACROSS, sides[2] / (8 * voxels))))


@dataclass(frozen=True)
class _Best:
    """Best shift of one rotation: its evidence, the share that overlaps, and its place in the window of shifts."""

    score: float
    share: float
    place: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Look:
    """Find the best shift of a rotation, by any criterion."""

    turner: Turner
    correlator: Correlator
    full: float

    def through(self, criterion: Criterion) -> Callable[[FloatArray], _Best]:
        """Make the function that looks at one rotation (3, 3)."""

        def one(rotation: FloatArray) -> _Best:
            cubes = self.turner.cube(criterion.moving_maps(*self.turner.sample(rotation)))
            scores, overlap = criterion.score(self.correlator.spectra(cubes), self.correlator)
            share = overlap / np.float32(self.full)
            # By chance, a correlation of n voxels deviates by about 1 / sqrt(n). So a small overlap has to correlate
            # more. Where it is too small the score is -inf, and rounding may have left the share below zero.
            evidence = scores * np.sqrt(np.maximum(share, np.float32(1e-6)))
            best = np.unravel_index(int(evidence.argmax()), evidence.shape)
            return _Best(float(evidence[best]), float(share[best]), tuple(int(i) for i in best))

        return one


def _look_closely(
    found: list[_Best], one: Callable[[FloatArray], _Best], rotations: FloatArray, count: int
) -> None:
    """Score the best rotations exactly. No other one then comes before them."""
    order = np.argsort([-best.score for best in found], kind="stable").tolist()
    near, far = order[:count], order[count:]
    for index in near:
        found[index] = one(rotations[index])
    least = min((found[i].score for i in near if np.isfinite(found[i].score)), default=-np.inf)
    for index in far:
        found[index] = replace(found[index], score=min(found[index].score, least))


def rotations_to_try(count: int, planar: bool) -> FloatArray:
    """Make the world rotations (K, 3, 3) of a search; the first of them turns nothing.

    Of single slices they are turns in the plane. One degree moves the rim of their grid by half a voxel, so that more
    of them would find nothing new.
    """
    if planar:
        return reverse_axes(so2_grid(min(count, _MOST_TURNS)))
    return np.concatenate([np.eye(3)[None], reverse_axes(so3_grid(count))])


def choose_starts(found: Search, points_mm: FloatArray, count: int) -> list[int]:
    """Choose the rotations to refine, by number: half of them the best, half the best that are far from each other.

    The first half may all lie around one maximum, which the grid of rotations can miss by half its spacing. The second
    half are its rivals. Without a rival, nothing says how much better the winner is.
    """
    near = distinct(found, points_mm, (count + 1) // 2, NEAR_VOXELS * found.spacing_mm)
    chosen = list(near)
    for index in distinct(found, points_mm, count, FAR_VOXELS * found.spacing_mm):
        if len(chosen) < count and index not in chosen:
            chosen.append(index)
    return chosen


def distinct(found: Search, points_mm: FloatArray, count: int, separation_mm: float) -> list[int]:
    """Choose the best answers that differ from each other, by number, best first (non-maximum suppression).

    Two answers differ if they send fixed points (N, 3) to places that are at least `separation_mm` apart on average.
    This is one measure for rotation and shift, in the unit in which errors are counted.
    """
    order = [int(i) for i in np.argsort(-found.scores, kind="stable") if np.isfinite(found.scores[i])]
    turned = found.rotations_xyz @ points_mm.T
    pivot = np.einsum("kij,kj->ki", found.rotations_xyz, found.pivots_mm)
    images = turned.transpose(0, 2, 1) + (found.moving_centre_mm - pivot)[:, None]
    chosen: list[int] = []
    for index in order:
        if len(chosen) == count:
            break
        apart = [float(np.linalg.norm(images[index] - images[c], axis=1).mean()) for c in chosen]
        if all(distance >= separation_mm for distance in apart):
            chosen.append(index)
    return chosen


def _in_threads(
    one: Callable[[FloatArray], _Best],
    rotations: FloatArray,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> list[_Best]:
    results = [one(rotations[0])]  # the first fills the fixed side's spectra, before threads share them
    parts = [rotations[i : i + _TASK] for i in range(1, len(rotations), _TASK)]
    with ThreadPoolExecutor(max(1, threads)) as pool:
        # `map` keeps the order, so that the number of threads changes no result.
        for part in pool.map(lambda some: [one(rotation) for rotation in some], parts):
            results += part
            if progress is not None:
                progress(len(results), len(rotations))
    return results
