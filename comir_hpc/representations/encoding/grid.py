"""Plan which windows slide over a volume, and with what weight each counts at each voxel. Integers and profiles only.

The volume's shape alone decides on the windows, never how the work is split. A weight is a product of three profiles,
one for each axis. At every voxel the weights of all windows sum to one. So a block can be computed from the windows
that touch it, without knowing of any other block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from comir_hpc.config.words import Blend as Blend
from comir_hpc.errors import ConfigError
from comir_hpc.space.grid import Box, Triple

Array = NDArray[np.float32]
Read = Callable[[Box], Array]
"""Gives the network input (c, z, y, x) of a box."""

Profile = NDArray[np.float32]

# Windows are spread evenly, so that asking for an overlap gives a number of windows that is not whole. It is rounded
# down, to save a whole layer of windows, if at most this part of a step is missing. Otherwise it is rounded up.
_SPARED = 0.25
# Width of the Gaussian weight, as a share of the window's side. It is the value that nnU-Net found good: the outermost
# voxels count e^-8 as much as the middle.
_SIGMA = 1 / 8


@dataclass(frozen=True)
class Window:
    """One position of the sliding window, by number and by voxels.

    It may reach over the volume's far border, where the image is continued by reflection.
    """

    place_zyx: Triple
    box: Box


@dataclass(frozen=True)
class WindowGrid:
    """All windows of one volume.

    Parameters
    ----------
    shape_zyx : three int
        Voxels of the volume.
    window_zyx : three int
        Voxels of a window.
    starts : three tuples of int
        First voxels of the windows along z, y, x, ascending. Every combination is a window.
    margin_zyx : three int
        Number of voxels at a window's inner faces that do not count. It is zero unless `blend` is ``exact``.
    blend : str
        How overlapping windows are put together: ``gaussian``, ``hann`` or ``exact``.
    """

    shape_zyx: Triple
    window_zyx: Triple
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    margin_zyx: Triple
    blend: Blend

    def __len__(self) -> int:
        return len(self.starts[0]) * len(self.starts[1]) * len(self.starts[2])

    def touching(self, box: Box, *, first_x: int | None = None) -> Iterator[Window]:
        """Give the windows that count somewhere in `box`, in the one order of the whole volume: by x, then z, then y.

        Parameters
        ----------
        box : Box
            Voxels of interest.
        first_x : int, optional
            Voxel along x. Windows that begin to count before it are left out, because a sweep has done them.
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
        """Count window positions along an axis; one on the face between two blocks of `core` voxels counts twice."""
        starts = range(0, self.shape_zyx[axis], core)
        return sum(lo < start + core and hi > start for lo, hi in self._spans[axis] for start in starts)

    def weights(self, window: Window) -> tuple[Profile, Profile, Profile]:
        """Return the weights of a window along z, y, x; over all windows their products sum to one at every voxel."""
        z, y, x = (profiles[k] for profiles, k in zip(self._profiles, window.place_zyx, strict=True))
        return z, y, x

    def _window(self, place: Triple) -> Window:
        start = [starts[k] for starts, k in zip(self.starts, place, strict=True)]
        stop = [a + w for a, w in zip(start, self.window_zyx, strict=True)]
        return Window(place, Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))

    @cached_property
    def _spans(self) -> tuple[list[tuple[int, int]], ...]:
        """Voxels [lo, hi) where each window counts, along each axis."""
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
    """Plan the windows over a volume.

    Windows start at multiples of the network's stride, so that all of them pool the same voxels together. They are
    spread evenly, and the last one ends less than one stride behind the volume. Along an axis that is shorter than the
    window, the window is as short as the stride allows.

    Parameters
    ----------
    shape_zyx : three int
        Voxels of the volume.
    window : int
        Voxels along each side of a window.
    overlap : float
        Share of a side that neighbours have in common, in [0, 1). It is met approximately, since windows lie on the
        stride and are spread evenly. With ``exact`` it follows from the halo.
    blend : {"gaussian", "hann", "exact"}
        How windows are put together. With Gaussian or Hann weights, overlapping windows are averaged. With ``exact``
        each gives only the voxels whose whole receptive field it holds, which equals encoding the whole volume at once.
    total_stride_zyx, halo_zyx : three int
        Stride and halo of the network in voxels (`Network.total_stride_zyx`, `receptive_halo_zyx`).
    tied_axes : sequences of axes
        Axes along which the window must have equal sides, because it will be turned (`Group.tied_axes`).

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
    sides = _window_sides(shape, window, stride, tied_axes)
    margins = [_up(h, s) if blend == "exact" else 0 for h, s in zip(halo_zyx, stride, strict=True)]
    starts = []
    for name, n, w, s, m in zip("zyx", shape, sides, stride, margins, strict=True):
        step = w - 2 * m if blend == "exact" else max(s, round(w * (1 - overlap) / s) * s)
        if step < s and n > w:
            raise ConfigError(
                f"a window of {w} voxels along {name} has none whose receptive field (halo {m}) it holds; run "
                f"`comir-hpc infer` with --window {2 * m + s} or more for exact blending, or --blend gaussian"
            )
        spare = 0.0 if blend == "exact" else _SPARED
        starts.append(_starts(n, w, s, max(step, s), spare))
    return WindowGrid(shape, _triple(sides), (starts[0], starts[1], starts[2]), _triple(margins), blend)


def _window_sides(
    shape: Triple, window: int, stride: Triple, tied_axes: Sequence[Sequence[int]]
) -> list[int]:
    """Choose the sides of the windows: no longer than the volume, and equal along axes that are exchanged."""
    sides = [min(window, _up(n, s)) for n, s in zip(shape, stride, strict=True)]
    for axes in tied_axes:
        longest = max(sides[axis] for axis in axes)
        for axis in axes:
            sides[axis] = longest
    return sides


def _starts(length: int, window: int, stride: int, step: int, spare: float) -> tuple[int, ...]:
    """Spread windows evenly along one axis, each on the stride, about `step` voxels from one to the next."""
    last = max(0, _up(length - window, stride))
    # At least as many as cover the volume, whatever was spared.
    count = max(math.ceil(last / step - spare), math.ceil(last / window))
    return tuple(last * k // max(count, 1) // stride * stride for k in range(count + 1))


def _triple(values: Sequence[int]) -> Triple:
    z, y, x = values
    return int(z), int(y), int(x)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def _spans(starts: Sequence[int], window: int, margin: int, size: int) -> list[tuple[int, int]]:
    if margin == 0:
        return [(start, min(start + window, size)) for start in starts]
    # Each window begins to count where the one before it has to stop. At the volume's faces nothing is cut off.
    stops = [start + window - margin for start in starts[:-1]] + [size]
    return list(zip([0, *stops[:-1]], stops, strict=True))


def _profile(window: int, blend: Blend) -> NDArray[np.float64]:
    # Middles of voxels, so that the outermost ones weigh more than nothing: the sum of all weights is divided by.
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
