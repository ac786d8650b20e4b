"""Encode boxes of a volume with a sliding window.

Axes: c image channels, l latent channels, z y x space; b windows evaluated together.

The value of a voxel is the weighted sum, in fp32 and in one fixed order, over all windows that touch it. Neither the
windows nor the order depend on which box is asked for. So the result is the same, to the bit, for any boxes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from comir_hpc.config.infer import OVERLAP, WINDOW
from comir_hpc.config.words import Precision
from comir_hpc.errors import VolumeError
from comir_hpc.host.launch import DTYPES
from comir_hpc.representations.encoding.grid import Array, Blend, Read, WindowGrid, plan_windows
from comir_hpc.representations.encoding.reader import NormalisedReader
from comir_hpc.representations.encoding.sweep import Sweep
from comir_hpc.space.grid import Box, Grid, Triple, Vector
from comir_hpc.space.groups import Group, act
from comir_hpc.volumes.volume import Volume

if TYPE_CHECKING:
    from comir_hpc.networks import Network


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
            # CPU and GPU round differently: blocks of both must not end in one output.
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
        place: int | Grid,
        *,
        window: int = WINDOW,
        overlap: float = OVERLAP,
        blend: Blend = "gaussian",
        batch: int = 1,
        skip_background: bool = True,
    ) -> tuple[Array, Grid]:
        """Encode a whole pyramid level, or the volume as it is seen on another grid, in memory.

        Parameters
        ----------
        volume : Volume
            Volume to encode.
        place : int or Grid
            Pyramid level to encode, or the grid to see the volume on.
        window, overlap, blend
            Size and overlap of the windows, and how they are blended, as `plan_windows` takes them.
        batch : int
            Number of windows that a GPU evaluates together.
        skip_background : bool
            Whether windows that hold only background are left out.

        Returns
        -------
        (l, z, y, x) float32, and its grid.

        Raises
        ------
        VolumeError
            If the volume does not fit.
        """
        self.require_fitting(volume)
        read = NormalisedReader(volume, place)
        grid = read.seen.grid
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
        # Autocast leaves normalisation and sums in single precision, as the training did.
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32),
        ):
            x = torch.from_numpy(batch_bczyx).to(self.device)
            y = self.network(x).float() if self.symmetry is None else self._averaged(x, self.symmetry)
            result: Array = y.cpu().numpy()
        return result

    def _averaged(self, x: Tensor, group: Group) -> Tensor:
        # The order is the group's, always: sums of floats depend on it, and blocks of one volume must agree to the
        # bit.
        total: Tensor | None = None
        for g in group.matrices:
            # The input is turned by g, and the output turned back, so that all outputs lie in the input's frame.
            y = act(self.network(act(x, g).contiguous()).float(), g.T)
            total = y if total is None else total + y
        assert total is not None
        return total / len(group)
