"""Encode a large volume block by block, window by window: every window is evaluated once where that is possible.

Axes: c image channels, l latent channels, z y x space.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
import torch

from comir_hpc.representations.encoding.evaluation import Cut, in_batches, on_threads
from comir_hpc.representations.encoding.grid import Array, Read, Window, WindowGrid
from comir_hpc.space.grid import Box, Triple

_KEPT_BYTES = 40 << 20  # most memory for values of windows that the next row of blocks needs, too


class Evaluates(Protocol):
    """What a sweep needs of an encoder.

    Attributes
    ----------
    device : torch device
        Where the network is: on a CPU, windows run on threads; elsewhere in batches.
    """

    device: torch.device

    @property
    def in_channels(self) -> int:
        """Channels c of a window."""

    @property
    def latent_channels(self) -> int:
        """Channels l of its representation."""

    def evaluate(self, batch_bczyx: Array) -> Array:
        """Encode windows (b, c, z, y, x) to (b, l, z, y, x) float32."""


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
    encoder : Evaluates
        The encoder that evaluates the windows.
    read, windows, background, batch
        The same arguments that `Encoder.encode` takes.
    """

    def __init__(
        self,
        encoder: Evaluates,
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
            # Taken off `self`, so that `del` below frees the memory before windows are evaluated.
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
            # The part is copied below: a view of it would keep the whole window in memory.
            row = core.start[0], core.stop[0], core.stop[1]
            self._kept[window.place_zyx] = _Kept(row, beyond, part.copy())

    def _is_kept(self, window: Window, core: Box) -> bool:
        kept = self._kept.get(window.place_zyx)
        return kept is not None and kept.row == (core.start[0], core.stop[0], core.start[1])

    def _encoded(self, todo: list[Window], core: Box) -> Iterator[tuple[Window, Box, Array]]:
        """Give the windows that hold specimen, with their values (l, z, y, x) in a box of them, in the order given."""
        # These come in the order of `todo`, but windows without specimen are missing among them.
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
        # Windows overlap, and so do the slabs of neighbouring steps: each voxel is read once.
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
