"""Learned representations: the encoders of a training run, evaluated here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from comir_hpc.config.register import RegisterSettings
from comir_hpc.host.launch import DTYPES
from comir_hpc.networks import predict_encoding
from comir_hpc.representations.encoding.encoder import Encoder
from comir_hpc.representations.encoding.loading import load_encoder, nearest_level
from comir_hpc.representations.protocol import Array, Representation, Role
from comir_hpc.representations.stored import Stored
from comir_hpc.representations.trained import Trained
from comir_hpc.runs.model import general_model, read_model
from comir_hpc.volumes.volume import Volume

_LIBRARY_BYTES = 24 << 20  # measured: loaded for the first window that is encoded
_WINDOW = 3.4  # measured: memory of a window that is encoded, over that of its tensors between layers


@dataclass(frozen=True, eq=False)
class Learned(Trained):
    """A representation that is computed in memory, at the level nearest to the spacing of the training.

    Attributes
    ----------
    encoder : Encoder
        Encoder of the volume's modality.
    """

    encoder: Encoder

    origin: ClassVar[str] = "encoded here"
    memory_remedy: ClassVar[str] = (
        ", or run `comir-hpc infer` first and give --fixed-representation and --moving-representation: "
        "their coarser levels can be compared"
    )

    @classmethod
    def from_settings(cls, volume: Volume, settings: RegisterSettings, role: Role) -> Representation:
        """Load the encoder of the volume's modality, or open the stored representation if one is given.

        Raises
        ------
        VolumeError, CheckpointError
            If the encoder cannot be loaded, or does not fit the volume.
        RegistrationError
            If the stored representation does not belong to the volume.
        """
        if settings.representation_of(role) is not None:
            return Stored.from_settings(volume, settings, role)
        run, modality = settings.model or general_model(), settings.modality_of(role)
        encoder = load_encoder(
            run,
            modality,
            device=settings.device,
            precision=settings.precision,
            symmetrise=settings.symmetrise,
        )
        encoder.require_fitting(volume)
        return cls(volume, run, read_model(run), encoder)

    @property
    def num_channels(self) -> int:
        """Number of channels of the encoder."""
        return self.encoder.latent_channels

    @property
    def levels(self) -> range:
        """The only level that the encoder can read.

        Raises
        ------
        VolumeError
            If no level has about the spacing of the training.
        """
        level = nearest_level(self.volume, self.encoder.spacing_mm)
        return range(level, level + 1)

    def working_bytes(self, level: int) -> float:
        """Predict the memory, in bytes, of the windows that are encoded at once."""
        encoder = self.encoder
        if encoder.device.type != "cpu":
            return _LIBRARY_BYTES
        window = encoder.windows(self.grid(level).shape_zyx).window_zyx
        tensors = predict_encoding(encoder.network, window, DTYPES[encoder.precision])
        return _LIBRARY_BYTES + math.ceil(_WINDOW * torch.get_num_threads() * tensors)

    def values(self, level: int, image: Array) -> Array:
        """Encode a level of the volume."""
        del image
        return self.encoder.encode_volume(self.volume, level)[0]

    def identity(self) -> dict[str, Any]:
        """Name the encoder by its weights and the way it is run."""
        return super().identity() | {"encoder": self.encoder.identity()}
