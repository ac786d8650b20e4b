"""Learned representations: the encoders of a training run, evaluated here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from comir_hpc.config.register import RegisterSettings
from comir_hpc.host.launch import DTYPES
from comir_hpc.networks import predict_encoding
from comir_hpc.representations.encoding.encoder import Encoder
from comir_hpc.representations.encoding.loading import load_encoder
from comir_hpc.representations.features import Features, interior
from comir_hpc.representations.protocol import Array, Representation, Role
from comir_hpc.representations.stored import Stored
from comir_hpc.representations.trained import Trained
from comir_hpc.representations.working import WorkingGrids
from comir_hpc.runs.model import general_model, read_model
from comir_hpc.space.grid import Box, Grid
from comir_hpc.volumes.resampled import Resampled
from comir_hpc.volumes.volume import Volume

_LIBRARY_BYTES = 24 << 20  # measured: loaded for the first window that is encoded
_WINDOW = 3.4  # measured: memory of a window that is encoded, over that of its tensors between layers


@dataclass(frozen=True, eq=False)
class Learned(Trained):
    """A representation that is computed in memory, on working grids that both volumes of a pair have in common.

    Attributes
    ----------
    encoder : Encoder
        Encoder of the volume's modality.
    working : WorkingGrids
        The grids that it sees the volume on.
    """

    encoder: Encoder
    working: WorkingGrids

    origin: ClassVar[str] = "encoded here"
    one_scale: ClassVar[bool] = True
    memory_remedy: ClassVar[str] = (
        ", or run `comir-hpc infer` first and give --fixed-representation and --moving-representation: "
        "their coarser levels can be compared"
    )

    @classmethod
    def from_settings(
        cls, volume: Volume, settings: RegisterSettings, role: Role, partner: Volume
    ) -> Representation:
        """Load the encoder of the volume's modality, or open the stored representation if one is given.

        Raises
        ------
        VolumeError, CheckpointError
            If the encoder cannot be loaded or does not fit the volume, or a specimen is too small for its grid.
        RegistrationError
            If the stored representation does not belong to the volume.
        """
        if settings.representation_of(role) is not None:
            return Stored.from_settings(volume, settings, role, partner)
        run = settings.model or general_model()
        # The encoders that `adapt` makes may be called as the volumes are: fixed and moving.
        modality = settings.modality_of(role) or (role if role in read_model(run).modalities else None)
        encoder = load_encoder(
            run,
            modality,
            device=settings.device,
            precision=settings.precision,
            symmetrise=settings.symmetrise,
        )
        encoder.require_fitting(volume)
        model = read_model(run)
        other = settings.representation_of("moving" if role == "fixed" else "fixed")
        # A model without a spacing of its own follows the representation that is there already.
        given = None if other is None or not model.scale_free else Volume.open(other).grid.finest_mm
        return cls(volume, run, model, encoder, WorkingGrids.for_model(model, (volume, partner), given))

    @property
    def num_channels(self) -> int:
        """Number of channels of the encoder."""
        return self.encoder.latent_channels

    @property
    def levels(self) -> range:
        """Numbers of the working grids, the finest first."""
        return range(len(self.working.spacings_zyx))

    def features(self, level: int) -> tuple[Features, Array]:
        """Encode the volume on a working grid; a model for all modalities is refined in the specimen's interior.

        At the surface one modality often shows a layer that the other one does not: a scalp, a coating. A specialist
        has learned that, the general model cannot know it. Measured on T1w to EPI: two voxels less at the border raise
        the correlation of the aligned maps from 0.42 to 0.51, and take 0.2 mm off the error. The search sees all of it:
        on its coarse grids two voxels are much, and the surface tells a smooth specimen's rotation.
        """
        features, image = super().features(level)
        if self.model is None or not self.model.scale_free or level in self.searched_levels:
            return features, image
        return replace(features, mask=interior(features.mask)), image

    def place(self, level: int) -> Grid:
        """Give the working grid at a level."""
        return self.working.grid(self.volume, level)

    @property
    def spacings_mm(self) -> tuple[float, ...]:
        """Finest spacing of the working grids in mm, at each of `levels`; it is equal for both volumes of a pair."""
        return tuple(min(s[axis] for axis in self.volume.grid.axes) for s in self.working.spacings_zyx)

    @property
    def searched_levels(self) -> tuple[int, ...]:
        """The two coarsest working grids, of a model that was trained over a wide range of scales."""
        assert self.model is not None
        return tuple(self.levels)[-2:][::-1] if self.model.scale_free else ()

    def working_bytes(self, level: int) -> float:
        """Predict the memory, in bytes, of what is read to be resampled, or of the windows that are encoded at once."""
        encoder = self.encoder
        seen = Resampled(self.volume, self.place(level))
        reading = _LIBRARY_BYTES + seen.working_bytes(seen.grid.box)
        if encoder.device.type != "cpu":
            return reading
        window = encoder.windows(self.grid(level).shape_zyx).window_zyx
        tensors = predict_encoding(encoder.network, window, DTYPES[encoder.precision])
        return max(reading, _LIBRARY_BYTES + math.ceil(_WINDOW * torch.get_num_threads() * tensors))

    def represented(self, image: Array, mask: NDArray[np.bool_], grid: Grid) -> Features | None:
        """Encode another image; a model of several image channels would need all of them."""
        if self.encoder.in_channels != 1:
            return None

        def read(box: Box) -> Array:
            return image[None][(slice(None), *box.slices)]

        windows = self.encoder.windows(grid.shape_zyx)
        return Features(self.encoder.encode(read, windows, grid.box), mask, grid)

    def values(self, level: int, image: Array) -> Array:
        """Encode the volume as it is seen on a working grid."""
        del image
        return self.encoder.encode_volume(self.volume, self.place(level))[0]

    def identity(self) -> dict[str, Any]:
        """Name the encoder, the way it is run, and the finest working grid if it is no level of the volume."""
        known = super().identity() | {"encoder": self.encoder.identity()}
        finest = self.place(0)
        if finest in [self.volume.level_grid(level) for level in range(self.volume.num_levels)]:
            return known
        return known | {"working_grid": finest.as_dict()}

    def notes(self, level: int) -> list[str]:
        """Say what is assumed about the volume, and what it is too coarse for."""
        return super().notes(level) + self.working.notes_on(self.volume, level)
