"""The model.json of a training run: everything that makes the encoders from their weights, and what they can do."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from comir_hpc import __version__
from comir_hpc.config.words import SHARED
from comir_hpc.errors import CheckpointError
from comir_hpc.host.files import write_text
from comir_hpc.runs.record import Record, as_json, read_record

MODEL_FILE = "model.json"
WEIGHTS_FOLDER = "model"
"""Folder of the run with one file of weights a modality."""

_REMEDY = "run the same `comir-hpc train` again: it writes it from the last checkpoint"
# A U-shaped network halves its axes at every level: with 32 levels the smallest patch has 2^31 voxels a side.
Count = Annotated[int, Field(ge=1)]
Widths = Annotated[tuple[Count, ...], Field(min_length=1, max_length=32)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Figure = float | None


class Spread(Record):
    """Mean and largest value of a figure over a group of rotations; None where it is not finite."""

    mean: Figure = None
    max: Figure = None


class Reference(Record):
    """Figures that `train` measured on clean training patches when it was done (`reference.reference_metrics`)."""

    patches: int | None = None
    agreement: Figure = None
    agreement_p5: Figure = None
    agreement_pooled: Figure = None
    mismatched: Figure = None
    mismatched_p95: Figure = None
    retrieval: Figure = None
    shifted: dict[str, Figure] = Field(default_factory=dict)
    equivariance: dict[str, Spread] = Field(default_factory=dict)
    effective_rank: dict[str, Figure] = Field(default_factory=dict)
    deviation: dict[str, Figure] = Field(default_factory=dict)

    @property
    def expected_agreement(self) -> float | None:
        """Agreement that a right registration should come near: over all voxels where it is known, else of patches."""
        return self.agreement if self.agreement_pooled is None else self.agreement_pooled


class Options(Record):
    """Options of `networks.build_network`; those that only some networks have are kept as they are."""

    widths: Widths | None = None
    convs_per_level: Annotated[int, Field(ge=1, le=64)] | tuple[Annotated[int, Field(ge=1, le=64)], ...] = 1
    spacing_zyx: tuple[Positive, Positive, Positive] | None = None
    group: str | None = None


class NetworkName(Record):
    """Settings of the network as they were given; the name decides what is built."""

    name: str


class Model(Record):
    """Content of model.json.

    Attributes
    ----------
    format : int
        Version of the file's format; 0 for files from before there was one.
    version : str
        Version of comir-hpc that wrote the file.
    modalities : tuple of str
        Names of the modalities, one encoder each.
    network, options : NetworkName, Options
        Name and options of the network, as `build_network` takes them.
    in_channels : dict
        Number of image channels, by modality.
    latent_channels : int
        Number of channels of the representation.
    spacing_mm : three float
        Voxel spacing of the training along z, y, x, in mm.
    group : str
        Group of rotations that the training undid.
    shared : bool
        Whether one encoder serves all modalities; `modalities` then holds only `SHARED`.
    scale_free : bool
        Whether the encoder has seen voxels of a wide range of sizes, so that `spacing_mm` says nothing.
    weights : dict
        SHA-256 of each file of weights, by modality; empty for models from before it was written.
    started_from : dict
        Run whose weights the training started from, and the step of its model; empty after a start from random weights.
    step : int
        Number of optimiser steps that were done.
    loss : float or None
        Value of the loss at the last step; None where it is not recorded.
    inputs : dict
        Fingerprints of the training volumes by path.
    reference : Reference
        Abilities of the encoders, as the training measured them.
    run : str or None
        Training run that this model is a checkpoint of; None for the run's own model.
    """

    format: int = 0
    version: str = ""
    modalities: Annotated[tuple[str, ...], Field(min_length=1)]
    network: NetworkName
    options: Options
    in_channels: dict[str, Count]
    latent_channels: Count
    spacing_mm: tuple[Positive, Positive, Positive]
    group: str
    patch: tuple[Count, ...] | None = None
    precision: str | None = None
    shared: bool = False
    scale_free: bool = False
    weights: dict[str, str] = Field(default_factory=dict)
    started_from: dict[str, str] = Field(default_factory=dict)
    step: Annotated[int, Field(ge=0)]
    loss: Figure = None
    seed: int | None = None
    inputs: dict[str, str] = Field(default_factory=dict)
    reference: Reference = Reference()
    run: str | None = None

    def encoder_name(self, modality: str | None) -> str | None:
        """Find which encoder serves a modality; a shared one serves any, None included. None if there is none."""
        if self.shared:
            return SHARED
        return modality if modality in self.modalities else None

    def provenance(self, run: Path) -> dict[str, Any]:
        """Say which model it was, for the result of a registration; JSON-ready."""
        # Enough to tell two models apart. The rest is in the run folder, which the result names.
        kept = ("step", "modalities", "spacing_mm", "group", "latent_channels", "reference")
        record = self.as_dict()
        return {"run": str(run), **{key: record[key] for key in kept if key in record}}


def read_model(run: Path) -> Model:
    """Read the model.json of a run folder.

    Raises
    ------
    CheckpointError
        If it is damaged, of a newer format, or a key is missing or of another type. Also if there is none: the message
        says whether the run is unfinished or no run at all.
    """
    path = run / MODEL_FILE
    if not path.is_file():
        raise CheckpointError(_absent(run))
    return read_record(path, Model, CheckpointError, _REMEDY)


def general_model() -> Path:
    """Give the folder of the general model: one encoder for any modality, at any scale, that needs no training.

    Raises
    ------
    CheckpointError
        If a file of it is missing or damaged.
    """
    run = Path(str(files("comir_hpc") / "data" / "general"))
    model = read_model(run)
    for name, expected in model.weights.items():
        path = weights_path(run, name)
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise CheckpointError(
                f"{path} is missing or damaged: it is not the file that came with comir-hpc {__version__}; install the "
                "package again, or give --model"
            )
    return run


def write_model(run: Path, model: Model) -> None:
    """Write the model.json of a run folder whole or not at all, and wait until it is on the disk.

    Raises
    ------
    OSError
        If the file system refuses, e.g. because the disk is full.
    """
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / MODEL_FILE, as_json(model), durable=True)


def weights_path(run: Path, modality: str) -> Path:
    """Give the place of the weights of one modality's encoder in a run folder."""
    return run / WEIGHTS_FOLDER / f"{modality}.pt"


def _absent(run: Path) -> str:
    saved = sorted((run / "checkpoints").glob("step-*"))
    found = (
        f"is unfinished (its newest checkpoint is {saved[-1].name}): run the same `comir-hpc train` again"
        if saved
        else "is no run folder: expected one that `comir-hpc train ... --run DIR` has finished"
    )
    return f"{run} has no {MODEL_FILE} and {found}" if run.exists() else f"{run} does not exist; it {found}"
