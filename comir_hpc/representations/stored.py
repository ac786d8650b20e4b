"""Representations that `comir-hpc infer` wrote, whose coarser levels can be compared, too."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from comir_hpc.config.register import RegisterSettings
from comir_hpc.errors import RegistrationError, VolumeError
from comir_hpc.representations.protocol import Array, Role
from comir_hpc.representations.trained import Trained
from comir_hpc.runs.model import read_model, weights_path
from comir_hpc.space.grid import Grid
from comir_hpc.volumes.volume import Volume

_ONE_SCALE = 1.25  # times that the spacings of two representations may differ without a note


@dataclass(frozen=True, eq=False)
class Stored(Trained):
    """A representation in a store of its own.

    Attributes
    ----------
    store : Volume
        The representation, with its pyramid.
    others_mm : float or None
        Finest spacing of the other volume's representation in mm; None if it is not given but computed.
    """

    store: Volume
    others_mm: float | None = None

    origin: ClassVar[str] = "given representation"

    @classmethod
    def from_settings(cls, volume: Volume, settings: RegisterSettings, role: Role, partner: Volume) -> Stored:
        """Open the store that the settings name.

        Raises
        ------
        VolumeError
            If it is not a representation.
        RegistrationError
            If it was made from another volume, or by another encoder than the named one.
        CheckpointError
            If the named run has no model.
        """
        del partner
        path, modality = settings.representation_of(role), settings.modality_of(role)
        assert path is not None
        store = _open_store(path, volume, role)
        run = settings.model
        if run is not None and modality is not None:
            _require_made_by(store, run, modality)
        other = settings.representation_of("moving" if role == "fixed" else "fixed")
        others_mm = None if other is None else Volume.open(other).grid.finest_mm
        return cls(volume, run, None if run is None else read_model(run), store, others_mm)

    @property
    def compared(self) -> Volume:
        """The representation's own store."""
        return self.store

    @property
    def num_channels(self) -> int:
        """Number of channels in the store."""
        return self.store.num_channels

    def values(self, level: int, image: Array) -> Array:
        """Read a level of the store."""
        del image
        return self.store.read(level=level).astype(np.float32, copy=False)

    def place(self, level: int) -> Grid:
        """See the original volume on the grid of a level of the store."""
        return self.store.level_grid(level)

    def notes(self, level: int) -> list[str]:
        """Say what is assumed about the volume, and that the two representations were made at different scales."""
        notes, own = super().notes(level), self.store.grid.finest_mm
        if self.others_mm is None or max(own, self.others_mm) <= _ONE_SCALE * min(own, self.others_mm):
            return notes
        finer, coarser = sorted((own, self.others_mm))
        return [
            *notes,
            f"the representations were made on grids of {finer:.4g} and {coarser:.4g} mm: structures had different "
            f"sizes for the model; run `comir-hpc infer` on both volumes with --spacing {coarser:.4g}",
        ]

    def identity(self) -> dict[str, Any]:
        """Name the store by its fingerprint."""
        return super().identity() | {"compared": self.store.fingerprint()}


def _open_store(path: Path, volume: Volume, role: Role) -> Volume:
    store = Volume.open(path)
    kind = store.metadata.get("kind")
    if kind != "representation":
        raise VolumeError(
            f"{path} is of kind {kind}, expected a representation that `comir-hpc infer` wrote; "
            f"leave --{role}-representation out to have it computed"
        )
    # A volume that was ingested again may have other voxels under the same name.
    made_from = (store.metadata.get("source") or {}).get("fingerprint")
    if made_from != volume.fingerprint():
        raise RegistrationError(
            f"{path} was made from another volume, or from an earlier state of {volume.path} (fingerprint "
            f"{made_from}, expected {volume.fingerprint()}); run `comir-hpc infer` on it again"
        )
    return store


def _require_made_by(store: Volume, run: Path, modality: str) -> None:
    """Refuse a representation of another encoder, because the verdict compares it with this encoder's reference."""
    made_by = store.metadata.get("model") or {}
    weights = weights_path(run, modality)
    if not weights.is_file():
        raise RegistrationError(
            f"{weights} does not exist; expected the weights of {modality!r} in a trained run"
        )
    expected = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    if made_by.get("weights") != expected:
        raise RegistrationError(
            f"{store.path} was made by {made_by.get('run')} ({made_by.get('modality')}, step {made_by.get('step')}), "
            f"not by the present weights of {run} ({modality}); run `comir-hpc infer` again"
        )
