"""Every rotation and every shift at once, coarsely: masked correlation, or mutual information, by FFT.

For each rotation of a grid over SO(3) the coarse moving map is turned and compared with the fixed map at all
shifts by FFT. Both maps are sampled in the world frame at one isotropic spacing, so anisotropic, oblique and
flipped grids need no care. A score counts only the voxels that both masks hold at that shift, and only where
they hold enough of them: without that, a sliver of chance agreement at the border wins.

Masked correlation by FFT: Padfield (IEEE TIP 2012), here with weights between 0 and 1 and summed over channels.
Mutual information by FFT of class indicators: Oefverstedt, Lindblad and Sladoje (Pattern Recognition Letters
2022). Neither depends on the number of threads, and nothing is random.

Shapes: K rotations, C channels, P points of the ball, M maps, B classes; (a, a, a) fixed, (b, b, b) moving side.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy.fft
import scipy.ndimage
import torch
from numpy.typing import NDArray

from comir_hpc.errors import RegistrationError
from comir_hpc.geometry import FloatArray
from comir_hpc.register.features import Features
from comir_hpc.rotations import angle_deg
from comir_hpc.transforms import Transform
from comir_hpc.volume import downsample

Array32 = NDArray[np.float32]
Spectra = NDArray[np.complex64]

MIN_OVERLAP = 0.4
"""Share of the smaller mask that has to overlap: a third of a specimen may be missing and the answer is still
found; well below it, short overlaps of chance agreement begin to win."""

NEAR_VOXELS, FAR_VOXELS = 3.0, 10.0
"""Mean distance, in voxels of the search, from which two answers count as different starts, and as rivals. With
4000 rotations neighbours are 3 voxels apart; the optimiser comes back from 5 (measured on the 2 mm brain)."""

# The ball that the moving map is cut to holds this share of its mask: the corners of a full cube would make every
# FFT half as long again for 2 % of the evidence.
_BALL_SHARE = 0.98
_TASK = 16  # rotations that one thread takes at a time


@dataclass(frozen=True, eq=False)
class Coarse:
    """One volume on an isotropic grid.

    Attributes
    ----------
    values : (C, z, y, x) float32
        Low-pass filtered, zero mean and unit variance over the mask, all channels together.
    weights : (z, y, x) float32
        Share of each voxel that the mask holds, 0 to 1.
    frame : (3, 3)
        World steps (x, y, z) in mm of one voxel along z, y, x: the columns.
    origin_mm : (3,)
        World position of voxel (0, 0, 0).
    """

    values: Array32
    weights: Array32
    frame: FloatArray
    origin_mm: FloatArray

    @property
    def centroid_mm(self) -> FloatArray:
        """World position of the mask's centre of mass."""
        return self.origin_mm + self.frame @ np.asarray(scipy.ndimage.center_of_mass(self.weights))


@dataclass(frozen=True, eq=False)
class Search:
    """The landscape: every rotation at its best shift.

    Attributes
    ----------
    rotations_xyz : (K, 3, 3)
        World rotations, fixed to moving.
    pivots_mm : (K, 3)
        Fixed world point that falls on `moving_centre_mm`, for the best shift.
    scores, overlaps : (K,)
        Evidence there, which is the criterion times the root of the overlap (see `Agreement.evidence`), and the share
        of the smaller mask that overlaps; -inf and 0 where no shift overlaps enough.
    spacing_mm : float
        Voxel of the search.
    """

    rotations_xyz: FloatArray
    pivots_mm: FloatArray
    scores: FloatArray
    overlaps: FloatArray
    moving_centre_mm: FloatArray
    spacing_mm: float

    @property
    def angles_deg(self) -> FloatArray:
        """Angle of every rotation, (K,)."""
        return angle_deg(self.rotations_xyz)

    def transform(self, index: int) -> Transform:
        """Fixed to moving, for one rotation at its best shift."""
        pivot = self.pivots_mm[index]
        return Transform.rigid(self.rotations_xyz[index], self.moving_centre_mm - pivot, pivot)


@dataclass(frozen=True)
class Correlator:
    """FFT correlation of a fixed with a moving map, at a window of shifts.

    A shift d puts voxel 0 of the moving map on voxel d of the fixed map.

    Parameters
    ----------
    shape : three int
        FFT size.
    first, counts : three int
        The window's first shift, and how many there are along each axis.
    """

    shape: tuple[int, ...]
    first: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def plan(cls, weights: Array32, side: int, needed: float) -> Correlator:
        """Return the smallest one in which every shift with enough overlap is free of wrapped-around voxels.

        Parameters
        ----------
        weights : (z, y, x)
            Of the fixed map.
        side : int
            Voxels along each side of the moving map.
        needed : float
            Weight that has to overlap. A shift that leaves a slab of the fixed map with less is out of the window.
        """
        shape, first, counts = [], [], []
        for axis, length in enumerate(weights.shape):
            profile = weights.sum(axis=tuple({0, 1, 2} - {axis}), dtype=np.float64)
            enough_below = int(np.argmax(np.cumsum(profile) >= needed))
            enough_above = length - 1 - int(np.argmax(np.cumsum(profile[::-1]) >= needed))
            lowest, highest = enough_below - (side - 1), enough_above
            # Products exist at shifts -(side - 1) to length - 1; none may wrap onto the window.
            size = max(length - lowest, highest + side)
            shape.append(scipy.fft.next_fast_len(size, real=True))
            first.append(lowest)
            counts.append(highest - lowest + 1)
        return cls(tuple(shape), tuple(first), tuple(counts))

    def spectra(self, maps: Array32) -> Spectra:
        """Spectra (M, ...) of maps (M, z, y, x)."""
        found: Spectra = scipy.fft.rfftn(maps, s=self.shape, axes=(-3, -2, -1))
        return found

    def window(self, products: Spectra) -> Array32:
        """Correlations (M, *counts) of products (M, ...) of a fixed and a conjugate moving spectrum."""
        maps = scipy.fft.irfftn(products, s=self.shape, axes=(-3, -2, -1), overwrite_x=True)
        for axis, (first, count, size) in enumerate(zip(self.first, self.counts, self.shape, strict=True)):
            maps = np.take(maps, np.arange(first, first + count) % size, axis=axis - 3)
        return np.asarray(maps, dtype=np.float32)


class Criterion(Protocol):
    """How two weighted maps are compared at all shifts."""

    def moving_maps(self, values: Array32, weights: Array32) -> Array32:
        """Return maps (M, P) of the moving side from values (C, P) and weights (P,)."""

    def score(self, moving: Spectra, correlator: Correlator) -> tuple[Array32, Array32]:
        """Return score and overlapping weight at the window's shifts, for the spectra of those maps."""


class MaskedCorrelation:
    """Weighted correlation coefficient over the overlap, -1 to 1, the channels together.

    Each channel's mean is the mean over the overlap at that shift, so an offset between the volumes does not count.
    """

    def __init__(self, fixed: Coarse) -> None:
        self._fixed = fixed
        self._spectra: Spectra | None = None

    def moving_maps(self, values: Array32, weights: Array32) -> Array32:
        """Return weight, weighted values and weighted energy: (1 + C + 1, P)."""
        return _moments(values, weights)

    def score(self, moving: Spectra, correlator: Correlator) -> tuple[Array32, Array32]:
        """Return the coefficient, -inf where a variance vanishes, and the overlapping weight."""
        if self._spectra is None:
            self._spectra = correlator.spectra(_moments(self._fixed.values, self._fixed.weights))
        fixed, moving = self._spectra, moving.conj()
        channels = len(fixed) - 2
        products = np.concatenate(
            [
                fixed[:1] * moving[:1],
                (fixed[1:-1] * moving[1:-1]).sum(axis=0, keepdims=True),
                fixed[-1:] * moving[:1],
                fixed[:1] * moving[-1:],
                fixed[1:-1] * moving[:1],
                fixed[:1] * moving[1:-1],
            ]
        )
        overlap, cross, fixed_energy, moving_energy, *sums = correlator.window(products)
        count = np.maximum(overlap, 1e-3)
        fixed_sums, moving_sums = np.stack(sums[:channels]), np.stack(sums[channels:])
        covariance = cross - (fixed_sums * moving_sums).sum(axis=0) / count
        fixed_variance = fixed_energy - (fixed_sums**2).sum(axis=0) / count
        moving_variance = moving_energy - (moving_sums**2).sum(axis=0) / count
        # Rounding of single precision leaves about 1e-5 of the energy where the variance is zero.
        solid = (fixed_variance > 1e-4 * fixed_energy) & (moving_variance > 1e-4 * moving_energy)
        scale = np.sqrt(np.where(solid, fixed_variance * moving_variance, 1))
        return np.where(solid, covariance / scale, -np.inf).astype(np.float32), overlap


class MutualInformation:
    """Normalised mutual information over the overlap, (H(f) + H(m)) / H(f, m) - 1, from joint class counts.

    Values are sorted into classes of equal frequency. Normalised, because plain information grows as the overlap
    shrinks (Studholme et al. 1999).
    """

    def __init__(self, fixed: Coarse, moving: Coarse, classes: int = 5) -> None:
        self._edges = [_quantiles(side, classes) for side in (fixed, moving)]
        self._fixed_maps = _classes(fixed.values[0], fixed.weights, self._edges[0])
        self._spectra: Spectra | None = None

    def moving_maps(self, values: Array32, weights: Array32) -> Array32:
        """Return the weight of each class: (B, P)."""
        return _classes(values[0], weights, self._edges[1])

    def score(self, moving: Spectra, correlator: Correlator) -> tuple[Array32, Array32]:
        """Return the normalised information and the overlapping weight."""
        if self._spectra is None:
            self._spectra = correlator.spectra(self._fixed_maps)
        fixed, moving = self._spectra, moving.conj()
        joint = np.stack([correlator.window(one * moving) for one in fixed])
        joint = np.maximum(joint, 0)
        overlap = joint.sum(axis=(0, 1))
        count = np.maximum(overlap, 1e-3)

        def entropy(weights: Array32, axes: tuple[int, ...]) -> Array32:
            share = weights / count
            found: Array32 = -(share * np.log(np.maximum(share, 1e-12))).sum(axis=axes)
            return found

        both = entropy(joint, (0, 1))
        alone = entropy(joint.sum(axis=1), (0,)) + entropy(joint.sum(axis=0), (0,))
        solid = both > 1e-3
        return np.where(solid, alone / np.where(solid, both, 1) - 1, -np.inf).astype(np.float32), overlap


class Turner:
    """Samples the moving map at any rotation, on the voxels of a ball inside a cube.

    Parameters
    ----------
    moving : Coarse
        Sampled more finely than the search: every sample is a trilinear interpolation.
    fixed_frame : (3, 3)
        Steps of the search grid.
    """

    def __init__(self, moving: Coarse, fixed_frame: FloatArray) -> None:
        spacing = float(np.linalg.norm(fixed_frame[:, 0]))
        self.centre_mm = moving.centroid_mm
        radius = _ball_radius_mm(moving, self.centre_mm)
        self.side = 2 * int(np.ceil(radius / spacing)) + 1
        steps = np.arange(self.side) - (self.side - 1) / 2
        offsets = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
        self.ball = np.flatnonzero((offsets**2).sum(axis=1) * spacing**2 <= radius**2)
        self._offsets_mm = offsets[self.ball] @ fixed_frame.T
        maps = np.concatenate([moving.values * moving.weights, moving.weights[None]])
        self._maps = torch.from_numpy(maps)[None]
        self._to_index = np.linalg.inv(moving.frame)
        self._centre_zyx = self._to_index @ (self.centre_mm - moving.origin_mm)

    def sample(self, rotation_xyz: FloatArray) -> tuple[Array32, Array32]:
        """Values (C, P) and weights (P,) at the ball's voxels."""
        index = self._offsets_mm @ (self._to_index @ rotation_xyz).T + self._centre_zyx
        last = np.asarray(self._maps.shape[2:]) - 1
        # grid_sample counts x first, and from -1 to 1 between the centres of the outer voxels.
        place = torch.from_numpy((2 * index / np.maximum(last, 1) - 1)[:, ::-1].astype(np.float32))
        sampled = torch.nn.functional.grid_sample(
            self._maps, place[None, None, None], mode="bilinear", padding_mode="zeros", align_corners=True
        )[0, :, 0, 0].numpy()
        weights = sampled[-1]
        return sampled[:-1] / np.maximum(weights, 1e-6), weights

    def cube(self, maps: Array32) -> Array32:
        """Maps (M, P) of the ball put into zero cubes (M, b, b, b)."""
        cubes = np.zeros((len(maps), self.side**3), dtype=np.float32)
        cubes[:, self.ball] = maps
        return cubes.reshape(len(maps), self.side, self.side, self.side)


def coarsen(features: Features, spacing_mm: float, finer: int = 1) -> Coarse:
    """Low-pass features to `spacing_mm` and sample them at ``spacing_mm / finer`` around their mask.

    Outside the mask nothing is averaged in: values are a normalised convolution with the mask as weight.

    Raises
    ------
    RegistrationError
        If the mask is empty or the values do not vary inside it.
    """
    factors = [max(1, int(spacing_mm / (2 * s))) for s in features.grid.spacing_mm]
    step = (factors[0], factors[1], factors[2])
    mask = features.mask[None].astype(np.float32)
    stacked = downsample(np.concatenate([features.values * mask, mask]), step)
    grid = features.grid.downsampled(step)
    spacing = np.asarray(grid.spacing_mm)
    sigma = 0.5 * spacing_mm / spacing
    blurred = scipy.ndimage.gaussian_filter(stacked, (0, *sigma), mode="constant")
    inside = np.argwhere(stacked[-1] > 0)
    if not len(inside):
        raise RegistrationError("the mask of a volume is empty: there is no foreground to compare")
    every = spacing_mm / finer / spacing
    low, high = inside.min(axis=0), inside.max(axis=0)
    counts = np.ceil((high - low) / every).astype(int) + 1
    start = (low + high) / 2 - every * (counts - 1) / 2
    axes = [s + e * np.arange(n) for s, e, n in zip(start, every, counts, strict=True)]
    places = np.stack(np.meshgrid(*axes, indexing="ij"))
    sampled = np.stack([scipy.ndimage.map_coordinates(one, places, order=1) for one in blurred])
    weights = np.clip(sampled[-1], 0, 1)
    values = _standardised(sampled[:-1] / np.maximum(weights, 1e-6), weights)
    frame = np.asarray(grid.matrix_mm[:3, :3]) * every
    return Coarse(values, weights, frame, grid.world_mm(start))


def search(
    fixed: Features,
    moving: Features,
    rotations_xyz: FloatArray,
    *,
    voxels: int,
    criterion: str = "correlation",
    min_overlap: float = MIN_OVERLAP,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Search:
    """Compare two volumes at all given rotations and all shifts.

    Parameters
    ----------
    rotations_xyz : (K, 3, 3)
        World rotations, fixed to moving.
    voxels : int
        Along the longest side of the fixed volume; sets the spacing of the search.
    criterion : "correlation" or "information"

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
    spacing = max(fixed.grid.extent_mm) / voxels
    still, loose = coarsen(fixed, spacing), coarsen(moving, spacing, finer=2)
    turner = Turner(loose, still.frame)
    # What a mask overlaps with itself: its soft edge counts twice.
    full = min(float((still.weights**2).sum()), float((loose.weights**2).sum()) / 2**3)
    correlator = Correlator.plan(still.weights, turner.side, min_overlap * full)
    compare: Criterion = (
        MaskedCorrelation(still) if criterion == "correlation" else MutualInformation(still, loose)
    )

    def one(rotation: FloatArray) -> tuple[float, float, tuple[int, ...]]:
        cubes = turner.cube(compare.moving_maps(*turner.sample(rotation)))
        scores, overlap = compare.score(correlator.spectra(cubes), correlator)
        shares = overlap / np.float32(full)
        enough = (shares >= min_overlap) & np.isfinite(scores)
        evidence = np.full(scores.shape, -np.inf, dtype=np.float32)
        evidence[enough] = scores[enough] * np.sqrt(shares[enough])
        best = np.unravel_index(int(evidence.argmax()), evidence.shape)
        return float(evidence[best]), float(shares[best]), tuple(int(i) for i in best)

    found = _in_threads(one, rotations_xyz, threads, progress)
    shifts = np.asarray([place for _, _, place in found]) + np.asarray(correlator.first)
    middle = shifts + (turner.side - 1) / 2
    scores = np.asarray([score for score, _, _ in found])
    return Search(
        rotations_xyz=rotations_xyz,
        pivots_mm=still.origin_mm + middle @ still.frame.T,
        scores=scores,
        overlaps=np.where(np.isfinite(scores), [share for _, share, _ in found], 0.0),
        moving_centre_mm=turner.centre_mm,
        spacing_mm=spacing,
    )


def choose_starts(found: Search, points_mm: FloatArray, count: int) -> list[int]:
    """Indices of the rotations to refine: half of them the best, half the best that lie far from each other.

    The first half may all lie around one summit, which the grid of rotations can miss by half its spacing. The
    second half are its rivals: without one, nothing says how much better the winner is.
    """
    near = distinct(found, points_mm, (count + 1) // 2, NEAR_VOXELS * found.spacing_mm)
    chosen = list(near)
    for index in distinct(found, points_mm, count, FAR_VOXELS * found.spacing_mm):
        if len(chosen) < count and index not in chosen:
            chosen.append(index)
    return chosen


def distinct(found: Search, points_mm: FloatArray, count: int, separation_mm: float) -> list[int]:
    """Indices of the best answers, best first, that differ from each other (non-maximum suppression).

    Two answers differ when they send fixed points (N, 3) to places that are `separation_mm` apart on average: one
    measure for rotation and shift, in the unit in which errors are counted.
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
    one: Callable[[FloatArray], tuple[float, float, tuple[int, ...]]],
    rotations: FloatArray,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> list[tuple[float, float, tuple[int, ...]]]:
    results = [one(rotations[0])]  # the first fills the fixed side's spectra, before threads share them
    parts = [rotations[i : i + _TASK] for i in range(1, len(rotations), _TASK)]
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for part in pool.map(lambda some: [one(rotation) for rotation in some], parts):
            results += part
            if progress is not None:
                progress(len(results), len(rotations))
    return results


def _moments(values: Array32, weights: Array32) -> Array32:
    energy = weights * (values**2).sum(axis=0)
    return np.concatenate([weights[None], values * weights, energy[None]])


def _classes(values: Array32, weights: Array32, edges: FloatArray) -> Array32:
    classes = np.digitize(values, edges)
    return np.stack([np.where(classes == k, weights, np.float32(0)) for k in range(len(edges) + 1)])


def _quantiles(side: Coarse, classes: int) -> FloatArray:
    inside = side.values[0][side.weights > 0.5]
    return np.unique(np.quantile(inside, np.arange(1, classes) / classes))


def _standardised(values: Array32, weights: Array32) -> Array32:
    """Subtract each channel's mean and divide all by one deviation, over the weights."""
    total = weights.sum(dtype=np.float64)
    means = (values * weights).sum(axis=(1, 2, 3), dtype=np.float64) / total
    centred = values - means[:, None, None, None].astype(np.float32)
    variance = float((centred**2 * weights).sum(dtype=np.float64) / total)
    # Where the mask fades out, single precision leaves differences of about 3e-5 of a constant value.
    if not variance > 1e-8 * float((means**2).sum()):
        raise RegistrationError(
            "the values of a volume do not vary inside its foreground; nothing can be compared"
        )
    return np.asarray(centred / np.float32(np.sqrt(variance)), dtype=np.float32)


def _ball_radius_mm(moving: Coarse, centre_mm: FloatArray) -> float:
    index = np.argwhere(moving.weights > 0)
    weights = moving.weights[tuple(index.T)]
    distance = np.linalg.norm(index @ moving.frame.T + moving.origin_mm - centre_mm, axis=1)
    order = np.argsort(distance, kind="stable")
    held = np.cumsum(weights[order], dtype=np.float64)
    return float(distance[order][np.searchsorted(held, _BALL_SHARE * held[-1])])
