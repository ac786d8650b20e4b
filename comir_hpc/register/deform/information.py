"""Find a smooth velocity by the mutual information of the intensities, voxel by voxel.

The joint histogram of both volumes says how much more often a moving value meets a fixed one than by chance. Its
logarithm, looked up at every voxel, is what a voxel adds to the mutual information. The histogram is made anew now and
then, and stays as it is between. So a voxel costs one look-up in the volume and one in the table.

The velocity has a prior: it is drawn from a Matern field (nu 5/2), whose power falls with frequency as a power, and not
as a Gaussian does. That matters. The velocity of a strong bend is rougher than its displacement, and a Gaussian field
all but forbids it: from the known answer of a T2w bent by up to 8 voxels, compared with the same T2w, it led 0.56
voxels away, and this one 0.19. The velocity is white noise, filtered to that power. L-BFGS moves the noise, in which
every scale is as easily reached as any other.

A margin around the specimen is compared, too: there the moving volume has to show air. Where a voxel leaves what was
measured of the moving volume, it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional

from comir_hpc.register.deform.lattice import Lattice
from comir_hpc.register.deform.velocity import Maps, Velocity, spacings
from comir_hpc.register.deform.warping import Array, indices, sample
from comir_hpc.representations.features import Features
from comir_hpc.space.grid import Grid

_RANGE, _AMPLITUDE = (
    2.0,
    0.4,
)  # of the Matern field: range and deviation of a component, in smoothness lengths
_SPACING, _MARGIN = 0.55, 2.0  # of the lattice, in smoothness lengths; the motion ends in the margin
_AROUND = 0.5  # margin around the specimen that is compared, in smoothness lengths
# Observations that a cube of one smoothness length counts for, from level to level. A weak start keeps to what moves
# much as one, and the misplaced is drawn in before the small is fitted.
_FIRST, _LATER, _LAST = (0.25, 1.0), 2.0, (4.0, 8.0)
_ROUNDS, _ITERATIONS = (2, 3), 10  # histograms of a first and of a later stage, and steps with each
_BINS, _BLUR = 32, 1.0  # of the histogram, along each axis; deviation of its smoothing, in bins
_FLOWS = 6  # doublings of the flow
_CLOSE = 2.0  # observations of a cube, where a start is put into the form of the prior (per mm^2)


@dataclass(frozen=True, eq=False)
class _Prior:
    """White noise on a lattice, and the velocity that it stands for."""

    grid: Grid
    filter: torch.Tensor
    ramp: torch.Tensor
    place: torch.Tensor

    @classmethod
    def over(cls, finest: Grid, length_mm: float) -> _Prior:
        ratio = max(1, int(_SPACING * length_mm / finest.finest_mm))
        inner = finest.downsampled((ratio,) * 3)
        margin = math.ceil(_MARGIN * length_mm / inner.finest_mm)
        grid = inner.crop(inner.box.grown((margin,) * 3))
        waves = np.meshgrid(
            *[2 * np.pi * np.fft.fftfreq(n, s) for n, s in zip(grid.shape_zyx, grid.spacing_mm, strict=True)],
            indexing="ij",
        )
        power = (5 / (_RANGE * length_mm) ** 2 + sum(w**2 for w in waves)) ** -2.0
        power *= _AMPLITUDE * length_mm / np.sqrt((power**2).mean())
        ramp = np.ones(grid.shape_zyx, dtype=np.float32)
        for axis, n in enumerate(grid.shape_zyx):
            away = np.minimum(np.arange(n), np.arange(n)[::-1]) / margin
            ramp *= np.minimum(1, away).reshape([-1 if k == axis else 1 for k in range(3)]).astype(np.float32)
        half = power[..., : grid.shape_zyx[2] // 2 + 1]
        return cls(
            grid,
            torch.from_numpy(half.astype(np.float32)),
            torch.from_numpy(ramp),
            torch.from_numpy(indices(grid.shape_zyx)),
        )

    def velocity_mm(self, noise: torch.Tensor) -> torch.Tensor:
        """Velocity (3, z, y, x) along the axes of the lattice; nothing moves at its faces."""
        seen = torch.fft.rfftn(noise, dim=(1, 2, 3)) * self.filter
        velocity: torch.Tensor = torch.fft.irfftn(seen, s=self.grid.shape_zyx, dim=(1, 2, 3)) * self.ramp
        return velocity

    def displacement(self, noise: torch.Tensor) -> torch.Tensor:
        """Displacement (3, z, y, x) in voxels of the lattice."""
        spacing = torch.tensor(self.grid.spacing_mm, dtype=torch.float32).view(3, 1, 1, 1)
        moved: torch.Tensor = self.velocity_mm(noise) / spacing / float(2**_FLOWS)
        for _ in range(_FLOWS):
            moved = moved + _sampled(moved, self.place + moved)
        return moved


class _Level:
    """Both volumes at one level, as look-ups of the voxels that are compared."""

    def __init__(self, maps: Maps, lattice: Grid) -> None:
        there = maps.weights > 0
        index = np.argwhere(there).T.astype(np.float32)
        seen, weights = maps.seen()
        ranges = [
            np.percentile(v[0][w > 0.5], (0.5, 99.5))
            for v, w in ((maps.fixed, maps.weights), (seen, weights))
        ]
        self._moving = torch.from_numpy(_in_bins(maps.moving[:1], ranges[1]))
        self._fixed = torch.from_numpy(_in_bins(maps.fixed[0][there], ranges[0]))
        self._known = None if maps.known is None else torch.from_numpy(maps.known[None])
        linear = (np.linalg.inv(lattice.matrix_mm) @ maps.grid.matrix_mm).astype(np.float32)
        self._in_lattice = torch.from_numpy(linear[:3, :3] @ index + linear[:3, 3:])
        self._place = torch.from_numpy(maps.matrix @ index + maps.offset[:, None])
        # From voxels of the lattice to those of the moving volume: both lattice and level have the same axes.
        scale = np.asarray(lattice.spacing_mm) / np.asarray(maps.grid.spacing_mm)
        self._turn = torch.from_numpy((maps.matrix * scale).astype(np.float32))
        self._last = torch.tensor(maps.moving.shape[1:], dtype=torch.float32).view(3, 1) - 1
        self._table = torch.zeros(0)

    def cost(self, moved: torch.Tensor, *, afresh: bool) -> torch.Tensor:
        """Mean of what the voxels add to the mutual information, with its sign turned; `afresh`: by a new histogram."""
        place = self._place + self._turn @ _sampled(moved, self._in_lattice)
        with torch.no_grad():
            inside = ((place >= -0.5) & (place <= self._last + 0.5)).all(dim=0).float()
            if self._known is not None:
                inside = inside * _sampled(self._known, place)[0]
        values = _sampled(self._moving, place)[0]
        if afresh:
            self._table = _table(self._fixed, values.detach(), inside)
        at = torch.stack([values, self._fixed], dim=-1)[None, None] * (2 / (_BINS - 1)) - 1
        found = functional.grid_sample(
            self._table[None, None], at, align_corners=True, padding_mode="border"
        )[0, 0, 0]
        return -(found * inside).sum() / inside.sum().clamp_min(1)


class _Start:
    """A displacement that is to be put into the form of the prior."""

    def __init__(self, start: Lattice, maps: Maps, lattice: Grid) -> None:
        linear = (np.linalg.inv(lattice.matrix_mm) @ maps.grid.matrix_mm).astype(np.float32)
        there = np.argwhere(maps.weights > 0).T.astype(np.float32)
        self._in_lattice = torch.from_numpy(linear[:3, :3] @ there + linear[:3, 3:])
        own = (np.linalg.inv(start.grid.matrix_mm) @ maps.grid.matrix_mm).astype(np.float32)
        self._moved_mm = torch.from_numpy(sample(start.displacement_mm, own[:3, :3] @ there + own[:3, 3:]))
        self._spacing = torch.from_numpy(spacings(lattice)[..., 0, 0])

    def cost(self, moved: torch.Tensor, *, afresh: bool) -> torch.Tensor:
        """Mean squared distance in mm^2."""
        del afresh
        off = _sampled(moved, self._in_lattice) * self._spacing - self._moved_mm
        return (off**2).sum(dim=0).mean()


def with_air(maps: Maps, known: NDArray[np.bool_] | None, length_mm: float) -> Maps:
    """Let the margin around the specimen be compared, too, where the fixed volume was measured.

    It grows from face to face of the voxels. As a cube (`features.surrounded`) of the same width it left 0.92 voxels of
    the embedded bend instead of 0.90.
    """
    steps = max(1, round(_AROUND * length_mm / maps.grid.finest_mm))
    near = ndimage.binary_dilation(maps.weights > 0, iterations=steps)
    if known is not None:
        near &= known
    return replace(maps, weights=near.astype(np.float32))


def find_by_information(
    levels: Sequence[Maps],
    mask: Features,
    length_mm: float,
    start: Lattice | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Velocity:
    """Find the velocity under which the intensities have most information of each other, coarse to fine.

    Parameters
    ----------
    levels : sequence of Maps
        Intensities, one channel, the coarsest level first; their grids have the same axes.
    mask : Features
        Fixed volume on the finest grid, whose mask says how large the specimen is.
    length_mm : float
        Smoothness length in mm.
    start : Lattice, optional
        Displacement to begin at. The coarsest level is left out then.
    progress : callable, optional
        Function that is called as ``progress(done, total)``.
    """
    prior = _Prior.over(levels[-1].grid, length_mm)
    cubes = float(mask.mask.sum()) * math.prod(mask.grid.spacing_mm) / length_mm**3
    noise = torch.zeros((3, *prior.grid.shape_zyx), requires_grad=True)
    plan = _stages(levels, prior.grid, begun=start is not None)
    if start is not None:
        first: tuple[_Level | _Start, float, int] = (
            _Start(start, levels[min(1, len(levels) - 1)], prior.grid),
            _CLOSE,
            4,
        )
        plan = [first, *plan]
    for number, (level, weight, rounds) in enumerate(plan):
        _moved(noise, prior, level, weight * cubes, rounds)
        if progress is not None:
            progress(number + 1, len(plan))
    with torch.no_grad():
        return Velocity(prior.velocity_mm(noise).numpy().astype(np.float32), prior.grid)


def _stages(
    levels: Sequence[Maps], lattice: Grid, *, begun: bool
) -> list[tuple[_Level | _Start, float, int]]:
    """List level, observations of a cube and histograms of every stage."""
    seen = [_Level(maps, lattice) for maps in levels]
    few, many = _ROUNDS
    found: list[tuple[_Level | _Start, float, int]] = []
    if not begun:
        found += [(seen[0], weight, few) for weight in _FIRST]
    found += [(level, _LATER, many) for level in seen[1:-2]]
    last = seen[-2:] if len(seen) > 1 else seen * 2
    return [*found, *((level, weight, many) for level, weight in zip(last, _LAST, strict=True))]


def _moved(noise: torch.Tensor, prior: _Prior, level: _Level | _Start, weight: float, rounds: int) -> None:
    """Move the noise downhill, in place: what is observed against what is expected."""
    for _ in range(rounds):
        fresh = [True]
        steps = torch.optim.LBFGS(
            [noise], max_iter=_ITERATIONS, history_size=8, line_search_fn="strong_wolfe",
            max_eval=_ITERATIONS * 3 // 2,
        )  # fmt: skip

        def cost(steps: torch.optim.LBFGS = steps, fresh: list[bool] = fresh) -> torch.Tensor:
            steps.zero_grad()
            total = weight * level.cost(prior.displacement(noise), afresh=fresh[0]) + noise.square().sum() / 2
            fresh[0] = False
            total.backward()  # type: ignore[no-untyped-call]
            return total

        steps.step(cost)  # type: ignore[no-untyped-call]


def _sampled(values: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Look values (c, z, y, x) up at indices (3, ...), with derivatives; beyond the border its value counts.

    The slices lie below each other in one picture, as in `lookup.Lookup`, which says why. That one works in
    place, and so has no derivatives.
    """
    count, slices, lines, columns = values.shape
    z, y, x = place.reshape(3, -1)
    z = z.clamp(0, slices - 1)
    below = z.detach().floor()
    # The last slice is there twice, so that there is always a next one.
    picture = torch.cat([values, values[:, -1:]], dim=1).reshape(1, count, -1, columns)
    step = 2 / (picture.shape[2] - 1)
    line = (y.clamp(0, lines - 1) + below * lines) * step - 1
    column = x * (2 / max(columns - 1, 1)) - 1
    at = torch.stack([column, line, column, line + lines * step], dim=-1).view(1, -1, 2, 2)
    found = functional.grid_sample(picture, at, padding_mode="border", align_corners=True)[0]
    here, there = found.unbind(dim=-1)
    between: torch.Tensor = here + (z - below) * (there - here)
    return between.reshape(count, *place.shape[1:])


def _in_bins(values: Array, bounds: NDArray[np.float64]) -> Array:
    """Scale values to bins; the outermost ones are left to what is beyond the bounds."""
    low, high = bounds
    scaled = (values - low) / max(high - low, 1e-9) * (_BINS - 3) + 1
    return np.ascontiguousarray(scaled.clip(0, _BINS - 1), dtype=np.float32)


def _table(fixed: torch.Tensor, moving: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Logarithm of how much more often two values meet than by chance, (fixed, moving)."""
    edges = ((-0.5, _BINS - 0.5),) * 2
    joint = np.histogram2d(fixed.numpy(), moving.numpy(), _BINS, edges, weights=weights.numpy())[0]
    joint = ndimage.gaussian_filter(joint, _BLUR) + 1e-3 * max(joint.sum(), 1) / _BINS**2
    joint /= joint.sum()
    ratio = joint / joint.sum(axis=1, keepdims=True) / joint.sum(axis=0, keepdims=True)
    return torch.from_numpy(np.log(ratio).astype(np.float32))
