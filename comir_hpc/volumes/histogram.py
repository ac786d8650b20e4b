"""Count the values of a volume block by block: exactly for 8 and 16 bits, in fine bins for wider types.

Counts are integers. So blocks may come in any order and from any process, also after a stop: the sum is the same to
the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.volumes.volume import Intensity

_PIECE = 1 << 20  # values counted at once, so that numpy's intermediate arrays stay in the processor's cache
_KEPT_BITS = 20  # sign, 8 bits of exponent, 11 of mantissa: a bin is 1/2048 of the distance from the centre
_LOW, _HIGH = 0.001, 0.999  # percentiles 0.1 and 99.9


def counting_bytes(dtype: np.dtype[Any], values: int) -> int:
    """Return the bytes that counting so many values takes: keys of a piece of them, and bins three times."""
    bins = 1 << (8 * dtype.itemsize if dtype.itemsize <= 2 else _KEPT_BITS)
    return 24 * min(values, _PIECE) + 3 * 8 * bins


class Histogram:
    """Counts of one channel's values.

    Values of 8 and 16 bits (also float16) have a bin each. Wider ones are binned by the leading bits of their distance
    from `centre`. So bins are fine where most values are, wherever that is, and no range has to be known before.

    Parameters
    ----------
    dtype : dtype
        Type of the values that will be added.
    centre : float
        A typical value, e.g. a median of samples. Histograms that are merged must have the same one.
    """

    def __init__(self, dtype: DTypeLike, centre: float = 0.0) -> None:
        self.dtype = np.dtype(dtype)
        # The distance between two integers is an integer, so small distances stay exact. For floats the centre is
        # rounded to float32, in which the distances are computed.
        self.centre = float(np.rint(centre)) if self.dtype.kind in "iu" else float(np.float32(centre))
        self.minimum, self.maximum = np.inf, -np.inf
        self.exact = self.dtype.itemsize <= 2
        self._counts = np.zeros(1 << (8 * self.dtype.itemsize if self.exact else _KEPT_BITS), dtype=np.int64)

    def add(self, values: NDArray[Any], counted: NDArray[Any] | None = None) -> None:
        """Count finite values of any shape: all `values`, or only `counted`, which are some of them.

        Smallest and largest value are always those of `values`.
        """
        if not values.size:
            return
        self.minimum = min(self.minimum, float(values.min()))
        self.maximum = max(self.maximum, float(values.max()))
        flat = (values if counted is None else counted).reshape(-1)
        for start in range(0, flat.size, _PIECE):
            keys = self._keys(flat[start : start + _PIECE])
            self._counts += np.bincount(keys, minlength=len(self._counts))

    def merge(self, record: dict[str, NDArray[Any]]) -> None:
        """Add what another histogram of this dtype and centre recorded."""
        np.add.at(self._counts, record["keys"], record["counts"])
        self.minimum = min(self.minimum, float(record["range"][0]))
        self.maximum = max(self.maximum, float(record["range"][1]))

    def record(self) -> dict[str, NDArray[Any]]:
        """Return the counts in a form that can be stored, without the empty bins."""
        keys = np.flatnonzero(self._counts)
        span = np.array([self.minimum, self.maximum], dtype=np.float64)
        return {"keys": keys.astype(np.uint32), "counts": self._counts[keys], "range": span}

    def values(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the values that occur, ascending, and how often; for wide types the value is the middle of its bin."""
        keys = np.flatnonzero(self._counts)
        return np.clip(self._values(keys), self.minimum, self.maximum), self._counts[keys]

    @property
    def count(self) -> int:
        """Number of values that were counted."""
        return int(self._counts.sum())

    def holds(self, value: float) -> bool:
        """Say whether a value occurs; for wide types, whether any value of its bin does."""
        return bool(self._counts[self._keys(np.array([value], self.dtype))[0]])

    def without(self, values: Sequence[float]) -> Histogram:
        """Return a histogram of the other values; for wide types whole bins are left out."""
        rest = Histogram(self.dtype, self.centre)
        rest._counts = self._counts.copy()
        rest._counts[self._keys(np.array(values, self.dtype))] = 0
        kept = np.flatnonzero(rest._counts)
        if kept.size:
            ends = self._values(kept[[0, -1]]).clip(self.minimum, self.maximum)
            rest.minimum, rest.maximum = (float(end) for end in ends)
        return rest

    @property
    def constant(self) -> bool:
        """Whether all values are equal, or no value was counted."""
        return self.minimum >= self.maximum

    def _keys(self, values: NDArray[Any]) -> NDArray[np.intp]:
        if self.exact and self.dtype.kind in "iu":
            return values.astype(np.intp) - int(np.iinfo(self.dtype).min)
        if self.exact:
            return _sortable(values.astype(np.float16).view(np.uint16), 16).astype(np.intp)
        keys = _sortable(self._distance(values).view(np.uint32), 32)
        keys >>= np.uint32(32 - _KEPT_BITS)
        return keys.astype(np.intp)

    def _distance(self, values: NDArray[Any]) -> NDArray[np.float32]:
        if values.dtype == np.float32:
            return values - np.float32(self.centre)
        largest = np.finfo(np.float32).max
        return np.clip(values.astype(np.float64) - self.centre, -largest, largest).astype(np.float32)

    def _values(self, keys: NDArray[np.intp]) -> NDArray[np.float64]:
        if self.exact and self.dtype.kind in "iu":
            return keys.astype(np.float64) + float(np.iinfo(self.dtype).min)
        if self.exact:
            return _unsortable(keys.astype(np.uint16), 16).view(np.float16).astype(np.float64)
        dropped = 32 - _KEPT_BITS
        middle = (keys.astype(np.uint32) << np.uint32(dropped)) | np.uint32(1 << (dropped - 1))
        distance = _unsortable(middle, 32).view(np.float32).astype(np.float64)
        if self.dtype.kind in "iu":  # a bin of width 1 or less holds one integer, the end that is nearer to 0
            distance = np.trunc(distance)
        return distance + self.centre


def _sortable(bits: NDArray[Any], width: int) -> NDArray[Any]:
    """Turn the bits of floats into unsigned integers that have the order of the floats."""
    # Positive floats are ordered like their bits, negative ones in reverse: their bits are inverted, and the sign bit
    # of the positive ones is set.
    unsigned, signed = bits.dtype, np.dtype(f"i{width // 8}")
    mask = (bits.view(signed) >> signed.type(width - 1)).view(unsigned) | unsigned.type(1 << (width - 1))
    keys: NDArray[Any] = mask ^ bits
    return keys


def _unsortable(keys: NDArray[Any], width: int) -> NDArray[Any]:
    """Undo `_sortable`."""
    top = keys.dtype.type(1 << (width - 1))
    return np.where((keys & top) != 0, keys ^ top, ~keys)


def intensity_of(histogram: Histogram, foreground_above: float | None = None) -> Intensity:
    """Derive from a channel's histogram how its values become network input.

    `low` is the percentile 0.1 of the whole volume, so that dark structure inside the specimen (pores, fluid) is kept.
    `high` is the percentile 99.9 of the foreground. Mean and standard deviation are those of the foreground, clipped to
    these two. Where the foreground holds a single value (a binary image), all of them are the whole volume's.

    Parameters
    ----------
    histogram : Histogram
        Counts of the channel's values.
    foreground_above : float, optional
        Value above which a voxel is specimen; `foreground_threshold` finds it when it is not given.

    Raises
    ------
    VolumeError
        If all values are equal, or none lies above `foreground_above`.
    """
    values, counts = histogram.values()
    if histogram.constant:
        raise VolumeError(f"all voxels have the value {histogram.minimum:g}: there is nothing to register")
    above = foreground_threshold(values, counts) if foreground_above is None else foreground_above
    inside = values > above
    if not inside.any():
        raise VolumeError(
            f"no voxel is above {above:g}, the largest is {histogram.maximum:g}; give a lower --foreground-above"
        )
    low = _percentile(values, counts, _LOW)
    high = _percentile(values[inside], counts[inside], _HIGH)
    mean, std = _moments(np.clip(values[inside], low, high), counts[inside])
    if std == 0:
        low, high, mean, std = _clipped_moments(values, counts)
    if std == 0:  # only a few voxels differ, beyond the percentiles: nothing but the full range shows them
        low, high = histogram.minimum, histogram.maximum
        mean, std = _moments(values, counts)
    return Intensity(low=low, high=high, mean=mean, std=std, foreground_above=float(above))


def constant_intensity(histogram: Histogram) -> Intensity:
    """Make the normalisation that turns a channel of one value into zeros."""
    value = histogram.minimum
    return Intensity(low=value, high=value, mean=value, std=1.0, foreground_above=value)


def as_record(intensity: Intensity) -> dict[str, float]:
    """Return an intensity ready for JSON: one entry of the metadata key ``intensity``."""
    return asdict(intensity)


def foreground_threshold(values: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
    """Find the value that separates specimen from background: Li's minimum cross entropy over all thresholds.

    It was chosen by looking at masks of a brain (T1w, T2w, at 1 and 2 mm; turned, with empty corners, bias field and
    noise) and of concrete (X-ray, neutrons). Li keeps dark tissue and leaves out the air on all of them. Otsu loses
    dark tissue (ventricles in T1w, scalp in T2w, dark structures of phantoms). The triangle method takes in the air as
    soon as a part of it is exactly zero, and cuts into bright specimens that fill the field (X-ray). Structure inside
    the specimen that is as dark as air, such as the skull, is background for any threshold. None of the three works
    with a background of two levels (a scanner's padding below its air): there the user gives the threshold.

    Parameters
    ----------
    values : (n,) float64
        Values that occur, ascending, in the stored unit.
    counts : (n,) int64
        Number of voxels with each value.

    References
    ----------
    C. H. Li, C. K. Lee: Minimum cross entropy thresholding, Pattern Recognition 26 (1993) 617-625; searched over all
    thresholds, not iterated, so that no start decides.
    """
    low, high = (_percentile(values, counts, q) for q in (_LOW, _HIGH))
    if high <= low:
        return float((values[0] + values[1]) / 2) if high == values[0] else float(np.nextafter(low, -np.inf))
    # Cross entropy needs positive values. The darkest become 1/512 of the range, which does not matter to the others.
    positive = np.clip(values, low, high) - low + (high - low) / 512
    number, total = np.cumsum(counts), np.cumsum(counts * positive)
    below, above = total[:-1], total[-1] - total[:-1]
    entropy = -below * np.log(below / number[:-1]) - above * np.log(above / (number[-1] - number[:-1]))
    best = int(np.argmin(entropy))
    return float((values[best] + values[best + 1]) / 2)


def _percentile(values: NDArray[np.float64], counts: NDArray[np.int64], share: float) -> float:
    """Find the smallest value with at least `share` of the counts at or below it."""
    number = np.cumsum(counts)
    return float(values[min(int(np.searchsorted(number, share * number[-1])), len(values) - 1)])


def _clipped_moments(
    values: NDArray[np.float64], counts: NDArray[np.int64]
) -> tuple[float, float, float, float]:
    low, high = (_percentile(values, counts, q) for q in (_LOW, _HIGH))
    return low, high, *_moments(np.clip(values, low, high), counts)


def _moments(values: NDArray[np.float64], counts: NDArray[np.int64]) -> tuple[float, float]:
    mean = float(np.average(values, weights=counts))
    return mean, float(np.sqrt(np.average((values - mean) ** 2, weights=counts)))
