"""Encode boxes of a volume with a sliding window.

Axes: c image channels, l latent channels, z y x space; b windows evaluated together.

The value of a voxel is the weighted sum, in fp32 and in one fixed order, over all windows that touch it. Neither the
windows nor the order depend on which box is asked for. So the result is the same, to the bit, for any boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comir_hpc.config import OVERLAP, WINDOW, Precision
from comir_hpc.errors import VolumeError
from comir_hpc.geometry import Box, Grid, Triple, Vector
from comir_hpc.groups import Group, act
from comir_hpc.launch import DTYPES
from comir_hpc.networks import Network
from comir_hpc.padding import Unpadded
from comir_hpc.volume import Intensity, Volume
from comir_hpc.windows.evaluation import Cut, in_batches, on_threads
from comir_hpc.windows.grid import Blend, Window, WindowGrid, plan_windows

_KEPT_BYTES = 40 << 20  # most memory for values of windows that the next row of blocks needs, too

Array = NDArray[np.float32]
Read = Callable[[Box], Array]


class NormalisedReader:
    """Read boxes of one pyramid level as network input, normalised by the volume's statistics; padding is background.

    Parameters
    ----------
    volume : Volume
        Volume to read from. It must have intensity statistics.
    level : int
        Pyramid level to read from.
    """

    def __init__(self, volume: Volume, level: int) -> None:
        self.volume, self.level = volume, level
        self._unpadded = Unpadded(volume)
        self._intensities = [volume.intensity(c) for c in range(volume.num_channels)]

    def __call__(self, box: Box) -> Array:
        """Read the normalised values (c, z, y, x) of a box inside the level."""
        values = self._unpadded.read(box, level=self.level)
        result = np.empty(values.shape, dtype=np.float32)
        for c, z in np.ndindex(
            *values.shape[:2]
        ):  # a slice at a time: nothing else of the size of the box is held
            result[c, z] = self._intensities[c].normalise(values[c, z])
        return result

    @property
    def background(self) -> Array:
        """Largest normalised value that is background, for each channel, (c,)."""
        return np.array([_largest_background(i) for i in self._intensities], dtype=np.float32)


def _largest_background(intensity: Intensity) -> float:
    # Values below `low` are clipped to it, so that background reaches up to `low` at least.
    return float(intensity.normalise(np.array([max(intensity.foreground_above, intensity.low)]))[0])


@dataclass(eq=False)
class Encoder:
    """One modality's trained network with all that is needed to slide it over a volume.

    Attributes
    ----------
    network : Network
        The network on `device`, in evaluation mode.
    run : Path
        Folder that it was loaded from.
    modality : str
        Name of its modality in that run.
    step : int
        Number of optimiser steps that it was trained for.
    spacing_mm : three float
        Voxel spacing (z, y, x) in mm that it was trained at.
    group : str
        Name of the group of rotations that were undone in its training.
    digest : str
        Checksum of the weights.
    device : torch.device
        Where the network computes.
    precision : str
        Type of the arithmetic: fp32, bf16 or fp16. Windows are added up in fp32.
    symmetry : Group or None
        Group of rotations over which the representation is averaged.
    reference : dict
        Numbers that were measured on the training pair (`model.json`).
    """

    network: Network
    run: Path
    modality: str
    step: int
    spacing_mm: Vector
    group: str
    digest: str
    device: torch.device
    precision: Precision
    symmetry: Group | None = None
    reference: dict[str, Any] = field(default_factory=dict)

    @property
    def in_channels(self) -> int:
        """Number of image channels that it expects."""
        return self.network.in_channels

    @property
    def latent_channels(self) -> int:
        """Number of channels of the representation."""
        return self.network.latent_channels

    def identity(self) -> dict[str, Any]:
        """Return what a representation made by this encoder depends on, ready for JSON."""
        return {
            "weights": self.digest,
            "modality": self.modality,
            "step": self.step,
            "precision": self.precision,
            "symmetrise": self.symmetry.name if self.symmetry else "none",
            "device": self.device.type,
        }

    def windows(
        self, shape_zyx: Triple, *, window: int = WINDOW, overlap: float = OVERLAP, blend: Blend = "gaussian"
    ) -> WindowGrid:
        """Plan the windows over a volume of this shape, as `plan_windows` does."""
        return plan_windows(
            shape_zyx,
            window=window,
            overlap=overlap,
            blend=blend,
            total_stride_zyx=self.network.total_stride_zyx,
            halo_zyx=self.network.receptive_halo_zyx,
            tied_axes=self.symmetry.tied_axes if self.symmetry else (),
        )

    def encode(
        self,
        read: Read,
        windows: WindowGrid,
        core: Box,
        *,
        background: Array | None = None,
        batch: int = 1,
    ) -> Array:
        """Encode one box of a volume.

        Parameters
        ----------
        read : callable
            Function that gives the normalised values (c, z, y, x) of a box inside the volume.
        windows : WindowGrid
            Windows that `windows` planned for the volume's shape.
        core : Box
            Voxels whose representation is wanted.
        background : (c,), optional
            Largest background value of each channel. A window with nothing above it is not evaluated and counts as
            zero. The representation fades to zero away from the specimen; inside the specimen nothing changes.
        batch : int
            Number of windows that a GPU evaluates together.

        Returns
        -------
        (l, *core.shape) float32
            Representation of the box.

        Raises
        ------
        VolumeError
            If a window does not fit into memory.
        """
        return Sweep(self, read, windows, background=background, batch=batch).encode(core)

    def encode_volume(
        self,
        volume: Volume,
        level: int,
        *,
        window: int = WINDOW,
        overlap: float = OVERLAP,
        blend: Blend = "gaussian",
        batch: int = 1,
        skip_background: bool = True,
    ) -> tuple[Array, Grid]:
        """Encode a whole pyramid level in memory.

        Parameters
        ----------
        volume : Volume
            Volume to encode.
        level : int
            Pyramid level to encode, which `nearest_level` finds.
        window, overlap, blend
            Size and overlap of the windows, and how they are blended, as `plan_windows` takes them.
        batch : int
            Number of windows that a GPU evaluates together.
        skip_background : bool
            Whether windows that hold only background are left out.

        Returns
        -------
        (l, z, y, x) float32, and the grid of the level.

        Raises
        ------
        VolumeError
            If the volume does not fit.
        """
        self.require_fitting(volume)
        grid = volume.level_grid(level)
        read = NormalisedReader(volume, level)
        windows = self.windows(grid.shape_zyx, window=window, overlap=overlap, blend=blend)
        background = read.background if skip_background else None
        return self.encode(read, windows, grid.box, background=background, batch=batch), grid

    def require_fitting(self, volume: Volume) -> None:
        """Refuse a volume with another number of channels, or a single slice where the network needs a volume.

        Raises
        ------
        VolumeError
            If the volume does not fit. The message says what the encoder was trained on.
        """
        if volume.num_channels != self.in_channels:
            raise VolumeError(
                f"{volume.path} has {volume.num_channels} channels, the encoder of modality {self.modality} in "
                f"{self.run} was trained on {self.in_channels}; give a volume of that modality"
            )
        if volume.grid.planar and self.network.receptive_halo_zyx[0]:
            raise VolumeError(
                f"{volume.path} is a single slice, the encoder of modality {self.modality} in {self.run} was trained "
                "on volumes and looks along z; train on slices, single ones or of volumes: sampling.patch [1, Y, X]"
            )

    def evaluate(self, batch_bczyx: Array) -> Array:
        """Encode windows (b, c, z, y, x) to (b, l, z, y, x) float32, averaged over the rotations if so set."""
        dtype = DTYPES[self.precision]
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32),
        ):
            x = torch.from_numpy(batch_bczyx).to(self.device)
            y = self.network(x).float() if self.symmetry is None else self._averaged(x, self.symmetry)
            result: Array = y.cpu().numpy()
        return result

    def _averaged(self, x: Tensor, group: Group) -> Tensor:
        total: Tensor | None = None
        for g in group.matrices:
            y = act(self.network(act(x, g).contiguous()).float(), g.T)
            total = y if total is None else total + y
        assert total is not None
        return total / len(group)


@dataclass(frozen=True)
class _Kept:
    """Values of a window that a later row of blocks needs.

    Attributes
    ----------
    row : three int
        The row of blocks that needs them: its start and stop along z, and its start along y.
    box : Box
        Part of the window that the values cover.
    values : (l, z, y, x)
        Representation in that box, without weights.
    """

    row: Triple
    box: Box
    values: Array


class Sweep:
    """Encode boxes one after another, and use again what a box shares with its neighbours along x or y.

    A window may reach beyond the box that is being encoded. Along x, its share of the sums there is kept for the next
    box. If that box follows directly along x, it begins with these sums; any other box begins with zeros. Along y, the
    window's values beyond the face are kept, while there is room, until the row of boxes behind that face needs them.
    In every case a voxel gets the same additions in the same order, so that its value is the same to the bit.

    Parameters
    ----------
    encoder : Encoder
        The encoder that evaluates the windows.
    read, windows, background, batch
        The same arguments that `Encoder.encode` takes.
    """

    def __init__(
        self,
        encoder: Encoder,
        read: Read,
        windows: WindowGrid,
        *,
        background: Array | None = None,
        batch: int = 1,
    ) -> None:
        self.encoder, self.read, self.windows = encoder, read, windows
        self.background, self.batch = background, batch
        self.evaluated = self.skipped = 0
        self._left: tuple[Box, Array] | None = None
        self._kept: dict[Triple, _Kept] = {}

    def encode(self, core: Box) -> Array:
        """Return the representation (l, *core.shape), float32, of the next box."""
        face = Box((*core.start[:2], core.stop[2]), (*core.stop[:2], self._reach(core.stop[2])))
        # Two arrays, so that neither is ever copied: one for the box, one for the sums behind its face along x.
        channels, width = self.encoder.latent_channels, core.shape[2]
        inside = np.zeros((channels, *core.shape), dtype=np.float32)
        behind = np.zeros((channels, *face.shape), dtype=np.float32)
        first_x = None
        if self._left is not None:
            (before, left), self._left = self._left, None
            if before.start == core.start and before.stop[:2] == core.stop[:2]:
                first_x = core.start[2]
                inside[..., : left.shape[-1]] = left[..., :width]
                behind[..., : max(0, left.shape[-1] - width)] = left[..., width:]
            del left
        # Only this box's row and the next one can still ask for kept values: drop all others.
        rows = [(core.start[0], core.stop[0], y) for y in (core.start[1], core.stop[1])]
        self._kept = {place: kept for place, kept in self._kept.items() if kept.row in rows}
        todo = list(self.windows.touching(core, first_x=first_x))
        for window, box, values in self._encoded(todo, core):
            self._add(window, box, values, ((core, inside), (face, behind)))
            self._keep(window, box, values, core)
        self._left = face, behind
        return inside

    def _reach(self, stop: int) -> int:
        """Return how far along x those windows reach that touch a box ending at `stop`."""
        return min(self.windows.shape_zyx[2], stop + self.windows.window_zyx[2])

    def _add(self, window: Window, box: Box, values: Array, totals: tuple[tuple[Box, Array], ...]) -> None:
        for place, total in totals:
            part = box.intersect(place)
            cuts = part.slices_in(window.box)
            z, y, x = (profile[cut] for profile, cut in zip(self.windows.weights(window), cuts, strict=True))
            weight = z[:, None, None] * y[:, None] * x
            total[(slice(None), *part.slices_in(place))] += (
                values[(slice(None), *part.slices_in(box))] * weight
            )

    def _keep(self, window: Window, box: Box, values: Array, core: Box) -> None:
        """Keep the values of a window that count behind the face of `core` along y."""
        start, stop = (core.start[0], core.stop[1], box.start[2]), (core.stop[0], *box.stop[1:])
        beyond = Box(start, stop).intersect(box)
        counts = self.windows.weights(window)[1][beyond.slices_in(window.box)[1]].any()
        part = values[(slice(None), *beyond.slices_in(box))]
        if counts and part.nbytes + sum(kept.values.nbytes for kept in self._kept.values()) <= _KEPT_BYTES:
            row = core.start[0], core.stop[0], core.stop[1]
            self._kept[window.place_zyx] = _Kept(row, beyond, part.copy())

    def _is_kept(self, window: Window, core: Box) -> bool:
        kept = self._kept.get(window.place_zyx)
        return kept is not None and kept.row == (core.start[0], core.stop[0], core.start[1])

    def _encoded(self, todo: list[Window], core: Box) -> Iterator[tuple[Window, Box, Array]]:
        """Give the windows that hold specimen, with their values (l, z, y, x) in a box of them, in the order given."""
        fresh = self._evaluated([window for window in todo if not self._is_kept(window, core)])
        ahead = next(fresh, None)
        for window in todo:
            if self._is_kept(window, core):
                kept = self._kept.pop(window.place_zyx)
                yield window, kept.box, kept.values
            elif ahead is not None and ahead[0] is window:
                yield window, window.box, ahead[1]
                ahead = next(fresh, None)

    def _evaluated(self, todo: list[Window]) -> Iterator[Cut]:
        if not todo:
            return
        cuts = self._occupied(todo)
        if self.encoder.device.type == "cpu":
            yield from on_threads(self.encoder.evaluate, cuts)
        else:
            yield from in_batches(self.encoder.evaluate, cuts, self.batch)

    def _occupied(self, todo: list[Window]) -> Iterator[Cut]:
        for window, region, values in self._read_along_x(todo):
            cut = self._cut(window, region, values)
            if self.background is None or (cut.max(axis=(1, 2, 3)) > self.background).any():
                self.evaluated += 1
                yield window, cut
            else:
                self.skipped += 1

    def _read_along_x(self, todo: list[Window]) -> Iterator[tuple[Window, Box, Array]]:
        """Give each window with the values in memory around it.

        These are a slab of one window's depth along x. While its windows are cut out, a thread reads the next slab.
        """
        steps = [list(group) for _, group in groupby(todo, key=lambda window: window.box.start[2])]
        z, y = ((min(w.box.start[a] for w in todo), max(w.box.stop[a] for w in todo)) for a in (0, 1))
        whole = Box((0, 0, 0), self.windows.shape_zyx)
        regions = [
            Box((z[0], y[0], w.box.start[2]), (z[1], y[1], w.box.stop[2])).intersect(whole) for w, *_ in steps
        ]
        stops = [regions[0].start[2], *(region.stop[2] for region in regions)]
        fresh = [
            Box((*r.start[:2], max(r.start[2], seen)), r.stop)
            for r, seen in zip(regions, stops, strict=False)
        ]
        # One buffer serves all steps. The part of the last slab that the next one needs moves to its front, in place.
        deepest = max(region.shape[2] for region in regions)
        buffer = np.empty((self.encoder.in_channels, *regions[0].shape[:2], deepest), dtype=np.float32)
        before = 0
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._read, fresh[0])
            for number, (step, region) in enumerate(zip(steps, regions, strict=True)):
                read = ahead.result()
                if number + 1 < len(steps):
                    ahead = reader.submit(self._read, fresh[number + 1])
                depth, kept = region.shape[2], region.shape[2] - read.shape[3]
                buffer[..., :kept] = buffer[..., before - kept : before]
                buffer[..., kept:depth] = read
                before, values = depth, buffer[..., :depth]
                del read
                for window in step:
                    yield window, region, values

    def _read(self, box: Box) -> Array:
        if box.size == 0:
            return np.zeros((self.encoder.in_channels, *box.shape), dtype=np.float32)
        return self.read(box)

    def _cut(self, window: Window, region: Box, values: Array) -> Array:
        inside = window.box.intersect(region)
        cut = values[(slice(None), *inside.slices_in(region))]
        over = [(0, w - n) for w, n in zip(self.windows.window_zyx, inside.shape, strict=True)]
        # A copy, because windows wait for their evaluation while the buffer is filled with the next slab.
        return np.pad(cut, [(0, 0), *over], mode="reflect") if any(o for _, o in over) else cut.copy()
