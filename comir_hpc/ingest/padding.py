"""Which values of a volume are padding: found on a level of the pyramid that is small enough to look at whole.

A value is padding if it is constant over solid parts of the border and says something else than the background beside
it. Constant air (a phantom, a brain whose surroundings were set to zero) is background, and statistics need it. Such a
value is left alone. So is padding that the foreground threshold leaves out together with the air. For these nothing
changes to the last bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.config.ingest import IngestSettings
from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.space.grid import Triple
from comir_hpc.volumes.histogram import Histogram, as_record, foreground_threshold, intensity_of
from comir_hpc.volumes.padding import Mask, Padding, filters
from comir_hpc.volumes.volume import Intensity, Volume

_LOOKED_AT = 1 << 21  # voxels of the level that is looked at: a second of work
_KEPT = 1 << 18  # voxels of the map that is kept: a few KiB of metadata
_LEAST_SHARE, _LEAST_FACES = 0.01, 0.05  # least share of all voxels, and of those on the outer faces
_MOST_VALUES = 4  # values that are tried as padding, the most frequent first
_SHELL = 3  # voxels beside the padding in which its surroundings are judged
# What lies beside padding is air if a part of it is dark, and the dark part is narrow against the step up to the
# specimen (percentiles 10 to 90, smoothed). Around heads as MR and as CT show them, with noise and with a circle that
# cuts into them, the dark share was 0.43 to 1 and the width 0.02 to 0.45. Where the surroundings were set to one value,
# it was 0.33 to 0.45 and 0.60 to 0.63 for brains, 0.07 to 0.10 and 0.35 to 0.46 for concrete.
_DARK_SHARE, _NARROW = 0.25, 0.5
_NEAR = 0.2  # share of that step: padding this near to the air is as good as air


@dataclass(frozen=True, eq=False)
class _Look:
    """One channel, seen whole on one level.

    Attributes
    ----------
    voxels : (z, y, x)
        Values of one pyramid level, in the stored unit.
    histogram : Histogram
        Counts of the values of level 0.
    above : float or None
        Foreground threshold that the user gave, in the stored unit; None where there is none.
    fine : bool
        Whether the level is level 0. On coarser ones a voxel has the padding's value only if all of its fine ones do.
    """

    voxels: NDArray[Any]
    histogram: Histogram
    above: float | None
    fine: bool

    @cached_property
    def _faces(self) -> Mask:
        faces = np.zeros(self.voxels.shape, dtype=np.bool_)
        for axis in range(3):
            ends = np.moveaxis(faces, axis, 0)
            if len(ends) > 1:
                ends[0] = ends[-1] = True
        return faces

    @cached_property
    def _cube(self) -> Mask:
        return np.ones([3 if size > 1 else 1 for size in self.voxels.shape], dtype=np.bool_)

    def candidates(self) -> Iterator[tuple[float, Mask]]:
        """Yield the values that are frequent on the outer faces, and where each fills solid parts of the border."""
        values, counts = np.unique(self.voxels[self._faces], return_counts=True)
        for index in np.argsort(-counts, kind="stable")[:_MOST_VALUES]:
            frequent = counts[index] >= _LEAST_FACES * counts.sum()
            if frequent and self._solid_on_faces(values[index]) >= _LEAST_SHARE * counts.sum():
                region = self.border(float(values[index]), solid=self.fine)
                if (
                    region.mean() >= _LEAST_SHARE
                    and (region & self._faces).sum() >= _LEAST_FACES * counts.sum()
                ):
                    yield float(values[index]), region

    def has_constant_corners(self) -> bool:
        """Return whether two corners of the volume hold one value, solidly: else there is no padding to look for."""
        width = 2 if self.fine else 1
        held: list[Any] = []
        for corner in itertools.product((slice(0, width), slice(-width, None)), repeat=3):
            block = self.voxels[corner]
            if (block == block.flat[0]).all():
                held.append(block.flat[0])
        ends = 2 if self.voxels.shape[0] == 1 else 1  # every corner of a single slice is counted twice
        return any(held.count(value) >= 2 * ends for value in set(held))

    def _solid_on_faces(self, value: Any) -> int:
        """Count the voxels of the outer faces inside solid patches of a value, which noise does not make."""
        number = 0
        for axis in [a for a in range(3) if self.voxels.shape[a] > 1]:
            square: Mask = np.take(self._cube, 0, axis=axis)
            for end in (0, -1):
                face: Mask = np.take(self.voxels, end, axis=axis) == value
                number += int(filters().binary_erosion(face, square, border_value=1).sum())
        return number

    def border(self, value: float, *, solid: bool) -> Mask:
        """Return where a value is connected to the outer faces; if `solid` in parts three voxels thick, noise apart."""
        equal: Mask = self.voxels == self.voxels.dtype.type(value)
        inner = equal
        if solid:
            eroded = filters().binary_erosion(equal, self._cube, border_value=1)
            inner = filters().binary_dilation(eroded, self._cube) & equal
        parts, number = filters().label(inner, np.ones((3, 3, 3)))
        touching = np.zeros(number + 1, dtype=np.bool_)
        touching[np.unique(parts[self._faces])] = True
        touching[0] = False
        found: Mask = touching[parts]
        return found

    def beside(self, regions: dict[float, Mask]) -> NDArray[np.float64]:
        """Return smoothed values in a shell around padding, without those that touch it and may be mixed with it."""
        region = _union(regions)
        # Thin parts of the padding's value are not solid padding, and they are not its surroundings either.
        thin = np.isin(self.voxels, np.asarray(list(regions)).astype(self.voxels.dtype))
        thin &= filters().binary_dilation(region, self._cube, iterations=_SHELL + 1)
        near = filters().binary_dilation(region | thin, self._cube)
        shell = filters().binary_dilation(near, self._cube, iterations=_SHELL - 1) & ~near
        known = (~near).astype(np.float64)
        sums, shares = (
            filters().uniform_filter(one, size=self._cube.shape, mode="nearest")
            for one in (np.where(near, 0, self.voxels.astype(np.float64)), known)
        )
        smooth: NDArray[np.float64] = sums[shell] / shares[shell]
        return smooth

    def fills_corners(self, region: Mask) -> bool:
        """Return whether a region holds two corners of the volume, as padding does and specimens rarely do."""
        ends = [(0, -1) if size > 1 else (0,) for size in region.shape]
        return int(region[np.ix_(*ends)].sum()) >= 2


@dataclass(frozen=True)
class _Surroundings:
    """What lies beside padding.

    Attributes
    ----------
    air : bool
        Whether the shell around the padding holds background.
    middle, high : float
        Percentiles 50 and 75 of its dark part, in the stored unit.
    step : float
        Distance from `middle` up to the specimen's mean, in the stored unit.
    """

    air: bool
    middle: float
    high: float
    step: float

    @classmethod
    def of(cls, beside: NDArray[np.float64], rest: Histogram) -> _Surroundings:
        if rest.constant or not beside.size:  # nothing was seen beside it: only the histogram can tell
            return cls(not rest.constant, rest.minimum, rest.minimum, 0.0)
        values, counts = rest.values()
        threshold = foreground_threshold(values, counts)
        bright = values > threshold
        dark = beside[beside <= threshold]
        if not dark.size or not bright.any():
            return cls(False, rest.minimum, rest.minimum, 0.0)
        low, middle, high, highest = np.percentile(dark, (10, 50, 75, 90)).tolist()
        step = float(np.average(values[bright], weights=counts[bright])) - middle
        air = dark.size >= _DARK_SHARE * beside.size and highest - low <= _NARROW * step
        return cls(bool(air), middle, high, step)


def recognise(
    volume: Volume, histograms: list[Histogram], wanted: float | str, above: float | None = None
) -> list[tuple[Padding, Intensity] | None]:
    """Find each channel's padding in a volume with its pyramid, and the statistics without it.

    Parameters
    ----------
    histograms : list of Histogram
        Counts of the values, one histogram a channel.
    wanted : "auto", "none" or float
        Choice of the padding: what is recognised, nothing, or this value where it is connected to the border.
    above : float, optional
        Foreground threshold that the user gave, in the stored unit.

    Returns
    -------
    list
        Padding and intensity of each channel; None for a channel whose statistics stay as they are.

    Raises
    ------
    VolumeError
        If no voxel has the value that was given.
    ConfigError
        If the volume's type cannot hold it.
    """
    if wanted == "none":
        return [None] * len(histograms)
    given = None if isinstance(wanted, str) else _stored(wanted, volume)
    if given is not None and not any(h.holds(given) for h in histograms):
        spans = ", ".join(f"{h.minimum:g} to {h.maximum:g}" for h in histograms)
        raise VolumeError(
            f"--padding {given:g}: no voxel has this value, they are {spans}; give the value that fills the border, or "
            "leave --padding out"
        )
    level = next(
        (k for k in range(volume.num_levels) if math.prod(volume.level_grid(k).shape_zyx) <= _LOOKED_AT),
        volume.num_levels - 1,
    )
    step = volume.level_factors(level)
    found: list[tuple[Padding, Intensity] | None] = []
    for voxels, histogram in zip(volume.read(level=level), histograms, strict=True):
        look = _Look(voxels, histogram, above, level == 0)
        regions = _excluded(look) if given is None else _named(look, given)
        found.append(_result(look, regions, step) if regions else None)
    return found


def _stored(value: float, volume: Volume) -> float:
    kind = volume.dtype
    if kind.kind in "iu":
        limits = np.iinfo(kind)
        fits = value == round(value) and limits.min <= value <= limits.max
    else:
        fits = math.isfinite(value) and abs(value) <= float(np.finfo(kind).max)
    if not fits:
        raise ConfigError(
            f"--padding {value:g} is no value of {kind}, of which the voxels are; give one that is"
        )
    return float(kind.type(value))


def _named(look: _Look, value: float) -> dict[float, Mask]:
    """Return where a value that the user named is padding: at the border, or everywhere if too thin there."""
    if look.histogram.constant or not look.histogram.holds(value):
        return {}
    region = look.border(value, solid=False)
    return {value: region if region.any() else np.ones(region.shape, dtype=np.bool_)}


def _excluded(look: _Look) -> dict[float, Mask]:
    """Find the values that are padding and must be left out. Whether one must depends on those that are out already."""
    if look.histogram.constant or not look.has_constant_corners():
        return {}
    pending = dict(look.candidates())
    excluded: dict[float, Mask] = {}
    while True:
        found = [value for value, region in pending.items() if _must_go(look, value, region, excluded)]
        if not found:
            return excluded
        excluded[found[0]] = pending.pop(found[0])


def _must_go(look: _Look, value: float, region: Mask, excluded: dict[float, Mask]) -> bool:
    gone = {value: region, **excluded}
    rest = look.histogram.without(list(gone))
    if rest.constant or not look.fills_corners(_union(gone)):
        return False
    threshold = look.above
    if threshold is None:
        threshold = foreground_threshold(*look.histogram.without(list(excluded)).values())
    if value > threshold:  # it would pass for the specimen
        return True
    around = _Surroundings.of(look.beside(gone), rest)
    left_out = around.high <= threshold and abs(value - around.middle) <= _NEAR * around.step
    return around.air and not left_out


def _result(look: _Look, regions: dict[float, Mask], step: Triple) -> tuple[Padding, Intensity]:
    region = _union(regions)
    rest = look.histogram.without(list(regions))
    around = _Surroundings.of(look.beside(regions), rest)
    # Without air of its own all that is left is specimen; nothing is as dark as its darkest voxel.
    above = look.above
    if above is None and not around.air:
        above = rest.minimum
    intensity = intensity_of(rest, None if above is None else max(above, rest.minimum))
    fill = around.middle if around.air and around.middle <= intensity.foreground_above else rest.minimum
    if rest.dtype.kind in "iu":
        fill = float(np.floor(fill))
    share = 1 - rest.count / look.histogram.count
    # Thin parts as well; and what a coarse voxel does not show because it is mixed there.
    for value in regions:
        region |= look.border(value, solid=False)
    where, every = _pooled(filters().binary_dilation(region, look._cube, iterations=1 if look.fine else 2))
    size = (step[0] * every[0], step[1] * every[1], step[2] * every[2])
    return Padding(tuple(regions), fill, share, where, size), intensity


def _union(regions: dict[float, Mask]) -> Mask:
    together: Mask = np.logical_or.reduce(list(regions.values()))
    return together


def _pooled(mask: Mask) -> tuple[Mask, Triple]:
    """Pool a map to few voxels, true where any voxel of a block is; also return a block's voxels along z, y, x."""
    every = [1, 1, 1]
    while mask.size > _KEPT:
        halve = [2 if size > 1 else 1 for size in mask.shape]
        padded = np.pad(mask, [(0, -size % h) for size, h in zip(mask.shape, halve, strict=True)])
        z, y, x = (size // h for size, h in zip(padded.shape, halve, strict=True))
        mask = np.logical_or.reduce(padded.reshape(z, halve[0], y, halve[1], x, halve[2]), axis=(1, 3, 5))
        every = [e * h for e, h in zip(every, halve, strict=True)]
    return mask, (every[0], every[1], every[2])


def without_padding(
    volume: Volume, histograms: list[Histogram], settings: IngestSettings, intensity: list[Any]
) -> dict[str, Any]:
    """Make the metadata entries ``padding`` and ``intensity`` of a volume with padding; none of any other.

    Parameters
    ----------
    volume : Volume
        The volume, whose pyramid is written already.
    histograms : list of Histogram
        Counts of the values of level 0, one histogram a channel.
    settings : IngestSettings
        Settings of the ingest, of which `padding` and `foreground_above` are used.
    intensity : list
        Entry ``intensity`` with the padding counted, one a channel.

    Raises
    ------
    VolumeError
        If nothing is left without the padding.
    """
    try:
        found = recognise(volume, histograms, settings.padding, settings.foreground_above)
    except VolumeError as error:
        raise VolumeError(f"{settings.source}: {error}") from error
    if not any(found):
        return {}
    return {
        "padding": [one and one[0].as_record() for one in found],
        "intensity": [as_record(one[1]) if one else old for one, old in zip(found, intensity, strict=True)],
    }
