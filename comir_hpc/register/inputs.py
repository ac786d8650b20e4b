"""What a registration is given: two volumes, encoders or ready representations, and the level they are compared at."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from comir_hpc import __version__
from comir_hpc.config import RegisterSettings
from comir_hpc.errors import RegistrationError, VolumeError
from comir_hpc.geometry import Grid
from comir_hpc.memory import available_bytes, expected_peak, in_words, resident_bytes
from comir_hpc.padding import Unpadded, padding_notes
from comir_hpc.register.cost import LIBRARY_BYTES, encoding_bytes, search_bytes
from comir_hpc.register.features import Features, checked, specimen_mask
from comir_hpc.register.isotropic import cut_grid, on_cubic_voxels, pieces
from comir_hpc.runs.model import Model, read_model, weights_path
from comir_hpc.volume import Volume
from comir_hpc.windows import Encoder, load_encoder, nearest_level

Role = Literal["fixed", "moving"]

BYTES_PER_VOXEL = 40
"""Peak memory of a registration for each voxel of a volume with one channel, beside what the process holds before.
Measured for both volumes together, intensity: 35 bytes at 144^3, 34 at 336^3; a representation adds up to 5."""
_BYTES_PER_CHANNEL = 8


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two volumes, and where what is compared comes from.

    Attributes
    ----------
    volume : Volume
        The original: masks and pictures come from it.
    compared : Volume
        Store whose levels are compared: a representation that `infer` wrote, or the volume itself.
    encoder : Encoder or None
        Makes the representation here.
    level : int
        Of `compared`.
    """

    role: Role
    volume: Volume
    compared: Volume
    encoder: Encoder | None
    level: int = 0

    @property
    def ready(self) -> bool:
        """Whether a representation was given."""
        return self.compared is not self.volume

    @property
    def learned(self) -> bool:
        """Whether a representation is compared, and not the intensity."""
        return self.ready or self.encoder is not None

    @property
    def num_channels(self) -> int:
        """Channels that are compared."""
        if self.encoder is not None:
            return self.encoder.latent_channels
        return self.compared.num_channels if self.ready else 1

    def predicted_bytes(self, level: int) -> float:
        """Memory that a registration needs for this side at a level."""
        grid = self.compared.level_grid(level)
        if _at_level(self, level).interpolated:
            grid = cut_grid(grid)
        voxels = math.prod(grid.shape_zyx)
        return float(voxels) * (
            BYTES_PER_VOXEL + _BYTES_PER_CHANNEL * (self.num_channels - (not self.learned))
        )

    def original_level(self) -> int:
        """Level of the original volume on the compared grid.

        Raises
        ------
        VolumeError
            If there is none.
        """
        grid = self.compared.level_grid(self.level)
        for level in range(self.volume.num_levels):
            if self.volume.level_grid(level).agrees_with(grid):
                return level
        raise VolumeError(
            f"{self.compared.path} (level {self.level}: {grid}) lies on no level of {self.volume.path}; "
            "run `comir-hpc infer` on that volume again"
        )

    def features(self) -> tuple[Features, NDArray[np.float32]]:
        """What is compared, and the intensity (z, y, x) on the same grid, for pictures."""
        original = self.original_level()
        grid = self.volume.level_grid(original)
        unpadded = Unpadded(self.volume)
        intensity = self.volume.intensity().normalise(unpadded.read(level=original)[0])
        if self.encoder is not None:
            values, _ = self.encoder.encode_volume(self.volume, original)
        elif self.ready:
            values = self.compared.read(level=self.level).astype(np.float32, copy=False)
        else:
            values = intensity[None]
        known = unpadded.known(level=original) if unpadded.padded else None
        mask = specimen_mask(self.volume, original)
        features = checked(Features(values, mask, grid, known), self.compared.path)
        if not self.interpolated:
            return features, intensity
        features = on_cubic_voxels(features)
        return features, features.values[0]

    @property
    def interpolated(self) -> bool:
        """Whether intensities are compared that lie on thick slices."""
        thick = pieces(self.compared.level_grid(self.level)) != (1, 1, 1)
        return thick and self.encoder is None and not self.ready

    @property
    def notes(self) -> list[str]:
        """What is assumed about the volume, in sentences."""
        notes = padding_notes(self.volume)
        if self.interpolated:
            grid = self.compared.level_grid(self.level)
            notes.append(
                f"{self.volume.path}: voxels of {_in_mm(grid)} mm are compared on {_in_mm(cut_grid(grid))} mm, by "
                "splines along the thick axes; what is thinner than a slice is not in the data"
            )
        return notes


@dataclass(frozen=True, eq=False)
class Inputs:
    """Both sides with their levels chosen, everything checked that can be without reading voxels.

    Attributes
    ----------
    predicted_bytes : float
        Memory of the whole process.
    fingerprint : str
        Of everything that the result depends on.
    reference : float or None
        Agreement of the model on its aligned training pair.
    """

    fixed: Side
    moving: Side
    predicted_bytes: float
    fingerprint: str
    reference: float | None
    model: Model | None


def open_inputs(settings: RegisterSettings) -> Inputs:
    """Open and check what the settings name, and choose the levels.

    Raises
    ------
    VolumeError, CheckpointError
        If a volume or the model cannot be used.
    RegistrationError
        If one is a single slice and the other a volume, a representation was made from another volume, or the
        memory does not suffice.
    """
    sides = [_open_side(settings, "fixed"), _open_side(settings, "moving")]
    _require_one_kind(*sides)
    if sides[0].num_channels != sides[1].num_channels:
        raise RegistrationError(
            f"the representations have {sides[0].num_channels} (fixed) and {sides[1].num_channels} (moving) channels; "
            "they come from different models"
        )
    levels = _choose_levels(sides, settings.max_memory_gib * 2**30)
    chosen = [_at_level(side, level) for side, level in zip(sides, levels, strict=True)]
    voxels = sum(side.predicted_bytes(side.level) for side in chosen)
    encoding = max(encoding_bytes(s.encoder, s.compared.level_grid(s.level).shape_zyx) for s in chosen)
    needed = expected_peak(LIBRARY_BYTES + voxels + encoding + search_bytes(settings))
    if needed - resident_bytes() > available_bytes():
        raise RegistrationError(
            f"this needs {in_words(needed - resident_bytes())} of memory, {in_words(available_bytes())} are free; "
            "choose a coarser level with a smaller --max-memory-gib"
        )
    model = _model_record(settings)
    return Inputs(
        fixed=chosen[0],
        moving=chosen[1],
        predicted_bytes=needed,
        fingerprint=_fingerprint(settings, chosen),
        reference=None if model is None else model.reference.expected_agreement,
        model=model,
    )


def _require_one_kind(fixed: Side, moving: Side) -> None:
    """Refuse a slice with a volume: where in the volume the slice lies is another search than ours."""
    if fixed.volume.grid.planar == moving.volume.grid.planar:
        return
    one, whole = (fixed, moving) if fixed.volume.grid.planar else (moving, fixed)
    raise RegistrationError(
        f"{one.volume.path} ({one.role}) is a single slice, {whole.volume.path} ({whole.role}) a volume of "
        f"{whole.volume.grid}; a slice is registered with a slice, a volume with a volume: take the slice of the "
        "volume that shows the same, e.g. by `comir-hpc warp --like` a slice, and give that"
    )


def _open_side(settings: RegisterSettings, role: Role) -> Side:
    volume = Volume.open(settings.fixed if role == "fixed" else settings.moving)
    volume.intensity()  # refuses a volume without statistics before anything is done
    if settings.representation == "intensity":
        return Side(role, volume, volume, None)
    path = settings.fixed_representation if role == "fixed" else settings.moving_representation
    modality = settings.fixed_modality if role == "fixed" else settings.moving_modality
    if path is not None:
        store = _open_representation(path, volume, role)
        if settings.model is not None and modality is not None:
            _require_made_by(store, settings.model, modality)
        return Side(role, volume, store, None)
    assert settings.model is not None  # RegisterSettings holds both
    assert modality is not None
    encoder = load_encoder(
        settings.model,
        modality,
        device=settings.device,
        precision=settings.precision,
        symmetrise=settings.symmetrise,
    )
    encoder.require_fitting(volume)
    return Side(role, volume, volume, encoder)


def _open_representation(path: Path, volume: Volume, role: Role) -> Volume:
    store = Volume.open(path)
    kind = store.metadata.get("kind")
    if kind != "representation":
        raise VolumeError(
            f"{path} is of kind {kind}, expected a representation that `comir-hpc infer` wrote; "
            f"leave --{role}-representation out to have it computed"
        )
    made_from = (store.metadata.get("source") or {}).get("fingerprint")
    if made_from != volume.fingerprint():
        raise RegistrationError(
            f"{path} was made from another volume, or from an earlier state of {volume.path} (fingerprint "
            f"{made_from}, expected {volume.fingerprint()}); run `comir-hpc infer` on it again"
        )
    return store


def _require_made_by(store: Volume, run: Path, modality: str) -> None:
    """Refuse a representation of another encoder: the verdict holds it against this one's reference."""
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


def _choose_levels(sides: list[Side], limit_bytes: float) -> list[int]:
    """Finest levels that fit together; the larger side is coarsened first, so that the spacings come together."""
    levels = [
        0 if side.encoder is None else nearest_level(side.volume, side.encoder.spacing_mm) for side in sides
    ]
    while True:
        needs = [side.predicted_bytes(level) for side, level in zip(sides, levels, strict=True)]
        if sum(needs) <= limit_bytes:
            return levels
        movable = [
            i
            for i, side in enumerate(sides)
            if side.encoder is None and levels[i] + 1 < side.compared.num_levels
        ]
        if not movable:
            raise RegistrationError(_too_large(sides, levels, sum(needs), limit_bytes))
        levels[max(movable, key=lambda i: needs[i])] += 1


def _too_large(sides: list[Side], levels: list[int], needed: float, limit: float) -> str:
    grids = "; ".join(
        f"{side.role} {side.compared.level_grid(level)}" for side, level in zip(sides, levels, strict=True)
    )
    remedy = "allow more with --max-memory-gib"
    if any(side.encoder is not None for side in sides):
        remedy += (
            ", or run `comir-hpc infer` first and give --fixed-representation and --moving-representation: "
            "their coarser levels can be compared"
        )
    return f"comparing {grids} needs {in_words(needed)}, {in_words(limit)} are allowed; {remedy}"


def _in_mm(grid: Grid) -> str:
    return " x ".join(f"{s:.4g}" for s in grid.spacing_mm)


def _at_level(side: Side, level: int) -> Side:
    return Side(side.role, side.volume, side.compared, side.encoder, level)


def _model_record(settings: RegisterSettings) -> Model | None:
    if settings.representation == "intensity" or settings.model is None:
        return None
    return read_model(settings.model)


def _fingerprint(settings: RegisterSettings, sides: list[Side]) -> str:
    """Digest of the inputs' content, the encoders and the settings that matter; not of places or threads."""
    places = {"fixed", "moving", "out", "model", "fixed_representation", "moving_representation"}
    record = {
        "version": __version__,
        "settings": settings.model_dump(mode="json", exclude=places | {"threads", "overwrite"}),
        "sides": [
            {
                "volume": side.volume.fingerprint(),
                "compared": side.compared.fingerprint() if side.ready else None,
                "encoder": side.encoder.identity() if side.encoder is not None else None,
            }
            for side in sides
        ],
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
