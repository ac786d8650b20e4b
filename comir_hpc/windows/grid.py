"""Which windows slide over a volume, and with what weight each counts at each voxel. Pure integers and profiles.

The windows are decided by the volume's shape alone, never by how the work is split, and every weight is a product
of three profiles, one an axis, that sum to one over the windows at every voxel. So a block can be computed from the
windows that touch it, without knowing of any other block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from comir_hpc.config.words import Blend as Blend
from comir_hpc.errors import ConfigError
from comir_hpc.geometry import Box, Triple

Profile = NDArray[np.float32]

_SPARED = (
    0.25  # of a step that neighbours may be farther apart than asked for, where that saves a layer of windows
)
_SIGMA = 1 / 8  # of the window, as nnU-Net found it good: the outermost voxels count e^-8 of the middle


@dataclass(frozen=True)
class Window:
    """One position of the sliding window; it may reach over the volume's far border (padded by reflection)."""

    place_zyx: Triple
    box: Box


@dataclass(frozen=True)
class WindowGrid:
    """All windows of one volume.

    Parameters
    ----------
    shape_zyx : three int
        Of the volume.
    window_zyx : three int
        Of a window.
    starts : three tuples of int
        Where windows start along z, y, x, ascending; every combination is a window.
    margin_zyx : three int
        Voxels at a window's inner faces that count nothing (`exact`); zero otherwise.
    blend : str
        How overlapping windows are put together.
    """

    shape_zyx: Triple
    window_zyx: Triple
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    margin_zyx: Triple
    blend: Blend

    def __len__(self) -> int:
        return len(self.starts[0]) * len(self.starts[1]) * len(self.starts[2])

    def touching(self, box: Box, *, first_x: int | None = None) -> Iterator[Window]:
        """Windows that count somewhere in `box`, in the one order of the whole volume: by x, then z, then y.

        Parameters
        ----------
        first_x : int, optional
            Leave out windows that begin to count before this along x (a sweep has done them).
        """
        z, y, x = (
            [k for k, (lo, hi) in enumerate(spans) if lo < stop and hi > start]
            for spans, start, stop in zip(self._spans, box.start, box.stop, strict=True)
        )
        for kx in x:
            if first_x is None or self._spans[2][kx][0] >= first_x:
                for kz in z:
                    for ky in y:
                        yield self._window((kz, ky, kx))

    def positions(self, axis: int, core: int) -> int:
        """Window positions along an axis, those on a face between blocks of `core` voxels counted for both blocks."""
        starts = range(0, self.shape_zyx[axis], core)
        return sum(lo < start + core and hi > start for lo, hi in self._spans[axis] for start in starts)

    def weights(self, window: Window) -> tuple[Profile, Profile, Profile]:
        """Weight of a window along z, y, x; their product over all windows sums to one at every voxel."""
        z, y, x = (profiles[k] for profiles, k in zip(self._profiles, window.place_zyx, strict=True))
        return z, y, x

    def _window(self, place: Triple) -> Window:
        start = [starts[k] for starts, k in zip(self.starts, place, strict=True)]
        stop = [a + w for a, w in zip(start, self.window_zyx, strict=True)]
        return Window(place, Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))

    @cached_property
    def _spans(self) -> tuple[list[tuple[int, int]], ...]:
        """Along each axis, the voxels [lo, hi) where each window counts."""
        return tuple(
            _spans(starts, w, m, n)
            for starts, w, m, n in zip(
                self.starts, self.window_zyx, self.margin_zyx, self.shape_zyx, strict=True
            )
        )

    @cached_property
    def _profiles(self) -> tuple[list[Profile], ...]:
        return tuple(
            _normalised(_profile(w, self.blend), starts, spans, n)
            for w, starts, spans, n in zip(
                self.window_zyx, self.starts, self._spans, self.shape_zyx, strict=True
            )
        )


def plan_windows(
    shape_zyx: Sequence[int],
    *,
    window: int,
    overlap: float,
    blend: Blend,
    total_stride_zyx: Sequence[int],
    halo_zyx: Sequence[int],
    tied_axes: Sequence[Sequence[int]] = (),
) -> WindowGrid:
    """Lay the windows over a volume.

    Windows start at multiples of the network's stride, so that all of them pool the same voxels together; they are
    spread evenly, and the last one ends less than one stride behind the volume. Along an axis that is shorter than the
    window, the window is as short as the stride allows.

    Parameters
    ----------
    shape_zyx : three int
        Of the volume.
    window : int
        Voxels along each side.
    overlap : float
        Share of a side that neighbours share, in [0, 1), about: windows lie on the stride and are spread evenly. With
        ``exact`` it follows from the halo.
    blend : {"gaussian", "hann", "exact"}
        Overlapping windows are averaged with Gaussian or Hann weights; or each gives only the voxels whose whole
        receptive field it holds, which equals encoding the whole volume at once.
    total_stride_zyx, halo_zyx : three int
        Of the network (`Network.total_stride_zyx`, `receptive_halo_zyx`).
    tied_axes : sequences of axes
        Axes along which the window must be equal, because it will be turned (`Group.tied_axes`).

    Raises
    ------
    ConfigError
        If the window is no multiple of the stride, or too small for ``exact``.
    """
    shape, stride = _triple(shape_zyx), _triple(total_stride_zyx)
    if any(window % s for s in stride):
        step = int(np.lcm.reduce(stride))
        raise ConfigError(
            f"a window of {window} voxels is no multiple of the network's stride {stride}; "
            f"run `comir-hpc infer` with --window {max(1, round(window / step)) * step}"
        )
    sides = [min(window, _up(n, s)) for n, s in zip(shape, stride, strict=True)]
    for axes in tied_axes:
        longest = max(sides[axis] for axis in axes)
        for axis in axes:
            sides[axis] = longest
    margins = [_up(h, s) if blend == "exact" else 0 for h, s in zip(halo_zyx, stride, strict=True)]
    starts = []
    for name, n, w, s, m in zip("zyx", shape, sides, stride, margins, strict=True):
        step = w - 2 * m if blend == "exact" else max(s, round(w * (1 - overlap) / s) * s)
        if step < s and n > w:
            raise ConfigError(
                f"a window of {w} voxels along {name} has none whose receptive field (halo {m}) it holds; run "
                f"`comir-hpc infer` with --window {2 * m + s} or more for exact blending, or --blend gaussian"
            )
        last = max(0, _up(n - w, s))
        spare = 0.0 if blend == "exact" else _SPARED
        count = max(math.ceil(last / max(step, s) - spare), math.ceil(last / w))
        starts.append(tuple(last * k // max(count, 1) // s * s for k in range(count + 1)))
    return WindowGrid(shape, _triple(sides), (starts[0], starts[1], starts[2]), _triple(margins), blend)


def _triple(values: Sequence[int]) -> Triple:
    z, y, x = values
    return int(z), int(y), int(x)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def _spans(starts: Sequence[int], window: int, margin: int, size: int) -> list[tuple[int, int]]:
    if margin == 0:
        return [(start, min(start + window, size)) for start in starts]
    # Each window takes over where the one before it has to stop; at the volume's faces nothing is cut off.
    stops = [start + window - margin for start in starts[:-1]] + [size]
    return list(zip([0, *stops[:-1]], stops, strict=True))


def _profile(window: int, blend: Blend) -> NDArray[np.float64]:
    place = np.arange(window) + 0.5
    if blend == "gaussian":
        return np.asarray(np.exp(-0.5 * ((place / window - 0.5) / _SIGMA) ** 2))
    if blend == "hann":
        return np.asarray(np.sin(np.pi * place / window) ** 2)
    return np.ones(window)


def _normalised(
    profile: NDArray[np.float64], starts: Sequence[int], spans: Sequence[tuple[int, int]], size: int
) -> list[Profile]:
    window = len(profile)
    total = np.zeros(size)
    for start, (lo, hi) in zip(starts, spans, strict=True):
        total[lo:hi] += profile[lo - start : hi - start]
    profiles = []
    for start, (lo, hi) in zip(starts, spans, strict=True):
        one = np.zeros(window, dtype=np.float32)
        one[lo - start : hi - start] = profile[lo - start : hi - start] / total[lo:hi]
        profiles.append(one)
    return profiles
