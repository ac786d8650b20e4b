"""Padding: constants that fill the border of a volume and were never measured, and volumes read without them.

A scanner that sees a circle, or a program that turned a volume, has to write something into the corners: -3024, 4095,
0. Such a value is no air and no specimen. It spoils the statistics of a volume, and a bright one looks like the
specimen itself. `ingest` recognises it (`ingest.padding`) and keeps it in the metadata. Everything that compares,
learns or encodes reads through `Unpadded`, which gives background in its place. `Volume.read` still gives what is
stored.
"""

from __future__ import annotations

import base64
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.space.grid import Box, Triple

if TYPE_CHECKING:
    from comir_hpc.volumes.volume import Volume

Mask = NDArray[np.bool_]

_REACH = 1  # voxels beside the padding that averaging and interpolation have mixed with it
_FILTER_BYTES = 20 << 20  # measured: 18 MiB are loaded with SciPy's filters


@dataclass(frozen=True, eq=False)
class Padding:
    """The padding of one channel.

    Attributes
    ----------
    values : tuple of float
        The constants, in the unit of the stored values.
    fill : float
        A value of the background, which is read in their place.
    share : float
        Share of the channel's voxels that is padding, 0 to 1.
    where : (z, y, x) bool
        Coarse map of the places in which these values are padding. Elsewhere they are measured: a saturated voxel
        inside the specimen may have the same value.
    step_zyx : three int
        Voxels of level 0 in one voxel of the map.
    """

    values: tuple[float, ...]
    fill: float
    share: float
    where: Mask
    step_zyx: Triple

    def mask(self, voxels: NDArray[Any], box: Box, factors_zyx: Triple) -> Mask:
        """Find the padding in voxels (z, y, x) of a box of the level with these factors, same shape."""
        equal: Mask = np.isin(voxels, np.asarray(self.values).astype(voxels.dtype))
        if equal.any():
            axes = zip(box.start, box.stop, factors_zyx, self.step_zyx, self.where.shape, strict=True)
            places = [_places(*axis) for axis in axes]
            equal &= self.where[np.ix_(*places)]
        return equal

    def as_record(self) -> dict[str, Any]:
        """Return the JSON-ready form, which is an entry of the metadata key ``padding``."""
        # One bit a place, packed: the metadata are read whenever the store is opened.
        packed = zlib.compress(np.packbits(self.where).tobytes(), 9)
        return {
            "values": list(self.values),
            "fill": self.fill,
            "share": self.share,
            "step": list(self.step_zyx),
            "shape": list(self.where.shape),
            "where": base64.b64encode(packed).decode("ascii"),
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Padding:
        """Undo `as_record`."""
        z, y, x = record["shape"]
        bits = np.frombuffer(zlib.decompress(base64.b64decode(record["where"])), dtype=np.uint8)
        where = np.unpackbits(bits, count=z * y * x).astype(np.bool_).reshape(z, y, x)
        step = record["step"]
        return cls(
            tuple(float(v) for v in record["values"]),
            float(record["fill"]),
            float(record["share"]),
            where,
            (int(step[0]), int(step[1]), int(step[2])),
        )

    def __str__(self) -> str:
        values = " and ".join(f"{value:g}" for value in self.values)
        return f"{self.share:.1%} of the voxels are padding with the value {values}"


def filters() -> Any:
    """Load SciPy's filters of images. They take a fifth of a second, and most volumes have no padding."""
    from scipy import ndimage

    return ndimage


def filter_bytes() -> int:
    """Return the bytes of memory that SciPy's filters still take once they are loaded."""
    return 0 if "scipy.ndimage" in sys.modules else _FILTER_BYTES


def paddings_of(volume: Volume) -> tuple[Padding | None, ...]:
    """Return the padding of each channel as `ingest` recorded it; None where it found none, or the store is older."""
    records: Sequence[dict[str, Any] | None] | None = volume.metadata.get("padding")
    if not records:
        return (None,) * volume.num_channels
    return tuple(None if record is None else Padding.from_record(record) for record in records)


def padding_notes(volume: Volume) -> list[str]:
    """Say which values of a volume are taken as padding, for the user to see."""
    several = volume.num_channels > 1
    return [
        f"{volume.path}{f', channel {channel}' if several else ''}: {padding}; they are left out of statistics and "
        "comparisons (`comir-hpc ingest --padding none` takes them as measured)"
        for channel, padding in enumerate(paddings_of(volume))
        if padding is not None
    ]


class Unpadded:
    """A volume whose padding reads as background.

    What touches the padding is replaced too: a voxel of a coarser level, or of a volume that was resampled once, may
    be a mixture of padding and specimen. (A strip of padding that is thinner than a voxel of a coarse level is not seen
    on that level.) Where no padding was recorded, the values are those of `Volume.read`.

    Parameters
    ----------
    volume : Volume
        An open volume, with or without padding.
    """

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.paddings = paddings_of(volume)

    @property
    def padded(self) -> bool:
        """Whether any channel has padding."""
        return any(padding is not None for padding in self.paddings)

    def read(self, box: Box | None = None, *, level: int = 0) -> NDArray[Any]:
        """Read a box (the whole level when none is given) as (c, z, y, x), of the volume's dtype.

        Raises
        ------
        VolumeError
            For the same reasons as `Volume.read`.
        """
        values, masks = self.read_masked(box, level=level)
        for channel, mask, padding in zip(values, masks, self.paddings, strict=False):
            if padding is not None:
                channel[mask] = padding.fill
        return values

    def read_masked(self, box: Box | None = None, *, level: int = 0) -> tuple[NDArray[Any], tuple[Mask, ...]]:
        """Read a box as (c, z, y, x) as it is stored, and where each channel is padding, (z, y, x); none without any.

        Raises
        ------
        VolumeError
            For the same reasons as `Volume.read`.
        """
        if not self.padded:
            return self.volume.read(box, level=level), ()
        values, masks, inner = self._read(box, level)
        return values[(slice(None), *inner)], tuple(mask[inner] for mask in masks)

    def known(self, box: Box | None = None, *, level: int = 0) -> Mask:
        """Return the mask (z, y, x) of where something was measured: not padding in every channel."""
        # A channel without padding measured everything.
        if None in self.paddings:
            whole = self.volume.level_grid(level).box
            return np.ones((whole if box is None else box).shape, dtype=np.bool_)
        _, masks, inner = self._read(box, level)
        known: Mask = ~np.all(masks, axis=0)[inner]
        return known

    def _read(self, box: Box | None, level: int) -> tuple[NDArray[Any], list[Mask], tuple[slice, ...]]:
        """Read a box with a margin: its values, its masks of padding, and the slices of the box in it.

        With the margin a voxel's neighbours are the same however a volume is cut into boxes.
        """
        whole = self.volume.level_grid(level).box
        box = whole if box is None else box
        grown = box.grown([_REACH if n > 1 else 0 for n in whole.shape]).intersect(whole)
        values = self.volume.read(grown, level=level)
        factors = self.volume.level_factors(level)
        masks = [
            np.zeros(grown.shape, dtype=np.bool_)
            if padding is None
            else _grown(padding, channel, grown, factors)
            for channel, padding in zip(values, self.paddings, strict=True)
        ]
        return values, masks, box.slices_in(grown)


def _grown(padding: Padding, voxels: NDArray[Any], box: Box, factors_zyx: Triple) -> Mask:
    """Return the mask of the padding, grown by `_REACH` voxels."""
    mask = padding.mask(voxels, box, factors_zyx)
    # Growing would change nothing, and a box without padding need not load SciPy.
    if not mask.any() or mask.all():
        return mask
    grown: Mask = filters().binary_dilation(mask, np.ones((3, 3, 3), dtype=np.bool_), iterations=_REACH)
    return grown


def _places(start: int, stop: int, factor: int, step: int, size: int) -> NDArray[np.int64]:
    """Return the places in a map of `size` voxels, along one axis, of a level's voxels `start` to `stop`."""
    # A coarse voxel is looked up at its middle: its corner may lie in the place before.
    middles = (np.arange(start, stop) + 0.5) * factor
    return np.minimum((middles / step).astype(np.int64), size - 1)
