"""Settings: one frozen class a stage, read from YAML, changed by `--set a.b=c`, refused when they cannot work.

A field's docstring says what it is and in which unit; a combination is checked in one place; what can be
derived is not a field.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from comir_hpc.errors import ConfigError
from comir_hpc.rotations import rotation_group

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Length = Annotated[float, Field(gt=0)]
SizeZYX = tuple[Positive, Positive, Positive]
LengthZYX = tuple[Length, Length, Length]


def _existing_part(part: tuple[int, int]) -> tuple[int, int]:
    if part[0] > part[1]:
        raise ValueError(
            f"part {part[0]}/{part[1]} does not exist; expected 1/{part[1]} to {part[1]}/{part[1]}"
        )
    return part


def _number_or_word(value: object) -> object:
    if value in ("auto", "none"):
        return value
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is no padding; expected a number, auto or none")
    return number


PaddingValue = Annotated[float | Literal["auto", "none"], BeforeValidator(_number_or_word)]
Part = Annotated[tuple[Positive, Positive], AfterValidator(_existing_part)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
# Sliding windows, where nobody says otherwise: voxels a side, and the share that neighbours have in common.
WINDOW = 64
OVERLAP = 0.25
GroupName = Literal["auto", "trivial", "D2", "D4", "O", "C2", "C4"]


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )


class IngestSettings(Settings):
    """`comir-hpc ingest`: a file in, an OME-Zarr volume out."""

    source: Path
    """NIfTI, NRRD, MHA, TIFF, OME-TIFF, HDF5, npy or zarr file, a folder of DICOM slices, or a PNG of one slice."""
    out: Path
    """OME-Zarr store to write."""
    spacing: LengthZYX | None = None
    """Voxel spacing (z, y, x) in `unit`; needed where the file has none, otherwise it replaces the file's. Of a single
    slice z is the thickness."""
    unit: str | None = None
    """Unit of `spacing`: nm, um, mm, cm or m."""
    dataset: str | None = None
    """Which of several: path of an array in HDF5 or zarr, number of a TIFF series, UID of a DICOM series."""
    kind: Literal["image", "labels"] = "image"
    """Labels are down-sampled by the most frequent value and carry no intensity statistics."""
    chunk: Positive = 64
    """Voxels along each side of the unit of reading."""
    shard: Positive = 256
    """Voxels along each side of the unit of writing (one file)."""
    non_finite: float | None = None
    """Value that replaces NaN and infinite voxels; when not given, they are refused."""
    foreground_above: float | None = None
    """Value above which a voxel belongs to the specimen; found from the histogram when not given."""
    padding: PaddingValue = "auto"
    """Value of voxels that were never measured (the corners around a round field of view), in the unit of the stored
    values: auto recognises a constant that fills the border, none takes all values as measured."""
    max_memory: Annotated[float, Field(gt=0)] | None = None
    """Memory that may be used, GiB; what is free when not given."""
    part: Part = (1, 1)
    """(I, N): do part I of N (array jobs)."""
    verify: bool = False
    """Check the content of blocks that are done already, and do damaged ones again."""
    workers: Positive = 1
    """Processes."""
    cluster: str | None = None
    """dask://HOST:PORT, or slurm: where `workers` run; this machine when not given."""
    overwrite: bool = False
    """Replace a store made from another source or with other settings."""


class NetworkSettings(Settings):
    """The encoder of one modality; every modality has its own weights."""

    name: Literal["unet", "denseunet", "gunet"] = "unet"
    """Architecture."""
    widths: tuple[Positive, ...] = (16, 32, 64, 64)
    """Channels of each resolution level, finest first."""
    latent_channels: Positive = 1
    """Channels of the representation."""
    norm: Literal["batch", "channel"] = "batch"
    """Batch statistics (running means at inference), or a norm over channels at each voxel."""
    residual: bool = False
    """Add each block's input to its output."""
    convs_per_level: Positive | tuple[Positive, ...] = (1, 2)
    """Convolutions in each block, finest first; the last number counts for all coarser levels."""
    kernels: Literal["symmetric", "free"] = "symmetric"
    """Whether taps of `unet` that the group exchanges share a weight (exact equivariance), or all are free."""
    padding: Literal["zeros", "replicate", "reflect"] = "replicate"
    """What convolutions see beyond the border of a patch or window."""
    configuration: Literal["three-level", "six-level"] = "three-level"
    """Which of the networks published with CoMIR `denseunet` is."""
    antialiased: bool = True
    """Mean pooling and linear upsampling in `denseunet`; false is the published max pooling and nearest upsampling."""
    checkpoint_levels: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    """Finest levels whose activations are recomputed in the backward pass instead of kept; auto: as few as fit."""


class LossSettings(Settings):
    """The contrastive loss (docs/theory.md)."""

    critic: Literal["mse", "cosine", "correlation", "tanimoto"] = "correlation"
    """Similarity of two representations."""
    bound: Literal["infonce", "jsd", "nwj"] = "infonce"
    """Lower bound of the mutual information that is maximised."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Divides every similarity."""
    subcrops: Positive = 2
    """Each representation is cut into subcrops^3 samples: more negatives from the same patches."""
    displacement_negatives: Annotated[int, Field(ge=0)] = 8
    """Shifted crops of the partner that serve as negatives, for each patch."""
    displacement_voxels: tuple[Positive, Positive] = (1, 4)
    """Smallest and largest shift of a displacement negative, voxels."""
    decay_l1: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the mean absolute activation."""
    decay_l2: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of the mean squared activation."""
    min_overlap: Share = 0.05
    """Samples whose common valid voxels are a smaller share of a sample are not compared."""


class SamplingSettings(Settings):
    """Aligned patches and their augmentation."""

    patch: SizeZYX = (32, 32, 32)
    """Voxels (z, y, x) of a patch."""
    pairs_per_step: Positive = 8
    """Aligned patch pairs in one step, over all ranks."""
    group: GroupName = "auto"
    """Exact rotations undone on the output; auto picks from the spacing (docs/theory.md)."""
    foreground: Share = 0.5
    """Smallest share of specimen voxels in a patch."""
    ignore_radius: Annotated[float, Field(ge=0)] = 0.5
    """Patches of one volume whose centres are closer than this many patch sides are no negatives of each other."""
    rotate: Share = 0.75
    """Share of the pairs whose patches are turned by one random rotation of SO(3) and scaled; the others stay as
    sharp as the volumes are."""
    scale: Annotated[float, Field(ge=0, lt=0.5)] = 0.15
    """Largest relative change of size, the same for both patches."""
    intensity: Annotated[float, Field(ge=0)] = 0.2
    """Strength of the random contrast, brightness, gamma, bias field and noise of each patch."""
    mirror: bool = False
    """Mirror half of the pairs: for specimens whose handedness says nothing."""
    level: Annotated[int, Field(ge=0)] = 0
    """Pyramid level that the patches come from; 0 is the finest."""
    cache_mib: Annotated[int, Field(ge=0)] = 4096
    """Volumes are held in memory when all fit into this many MiB; otherwise the boxes under the patches are read."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that read boxes ahead when the volumes are not held in memory."""


class OptimiserSettings(Settings):
    """AdamW, linear warm-up and cosine decay."""

    steps: Positive = 400
    """Optimiser steps."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    """Peak learning rate."""
    warmup: Share = 0.15
    """Share of the steps over which the rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Decoupled weight decay."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient of all networks together."""
    average: Annotated[float, Field(ge=0, lt=1)] = 0.98
    """Decay a step of the running average of the weights, which is the trained model; 0 keeps the last weights."""


class EngineSettings(Settings):
    """How steps are carried out."""

    name: Literal["torch", "deepspeed"] = "torch"
    """Plain torch (DDP over several ranks) or DeepSpeed."""
    precision: Precision = "auto"
    """Autocast of the networks; auto is bf16 where the device multiplies it fast, fp32 otherwise. The loss is fp32."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed ZeRO stage."""
    accumulation: Positive = 1
    """Micro-batches a step."""
    offload_optimiser: bool = False
    """Keep the optimiser's state in host memory (DeepSpeed)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks run; auto is a GPU when there is one."""
    timeout_s: Positive = 600
    """Seconds that a rank waits for the others before the job fails."""

    @model_validator(mode="after")
    def _check(self) -> EngineSettings:
        if self.name == "torch" and self.offload_optimiser:
            raise ValueError(
                "offload_optimiser works with engine.name=deepspeed only; set that or leave it out"
            )
        if self.precision == "fp16" and self.device == "cpu":
            raise ValueError("fp16 on a CPU is 35 times slower than fp32; use precision bf16 or fp32")
        return self


class TrackingSettings(Settings):
    """Where the numbers and pictures of a run go, besides metrics.jsonl."""

    mlflow: str | None = "auto"
    """Tracking URI; auto is sqlite beside the run folders; null writes metrics.jsonl only."""
    experiment: str = "comir-hpc"
    """MLflow experiment."""
    log_every: Positive = 10
    """Steps between two lines of metrics."""
    picture_every: Positive = 100
    """Steps between two pictures of patches and representations."""
    system_every: Length | None = 10.0
    """Seconds between two looks at processor, memory, disk, network and GPUs (system.jsonl); null does not look."""
    checkpoint_mib: Annotated[int, Field(ge=0)] = 256
    """The last checkpoint goes to MLflow if it has at most this many MiB; the model always does."""


class CheckpointSettings(Settings):
    """When the loop's whole state is saved."""

    every_steps: Positive = 100
    """Steps between two checkpoints."""
    every_minutes: Annotated[float, Field(gt=0)] = 10.0
    """Minutes after which one is saved in any case."""
    keep: Positive = 2
    """Newest checkpoints that stay."""


class TrainSettings(Settings):
    """`comir-hpc train`: aligned pairs in, one encoder a modality out."""

    modalities: tuple[str, ...]
    """Names, two or more; their order is the order of the encoders."""
    pairs: Annotated[tuple[dict[str, Path], ...], Field(min_length=1)]
    """Aligned specimens: for each, one OME-Zarr volume a modality, all on one grid."""
    seed: int = 0
    """Decides the weights, the patches and their augmentation."""
    network: NetworkSettings = NetworkSettings()
    loss: LossSettings = LossSettings()
    sampling: SamplingSettings = SamplingSettings()
    optimiser: OptimiserSettings = OptimiserSettings()
    engine: EngineSettings = EngineSettings()
    tracking: TrackingSettings = TrackingSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        if len(set(self.modalities)) < 2:
            raise ValueError(f"modalities {list(self.modalities)}: at least two different names are needed")
        for number, pair in enumerate(self.pairs):
            if set(pair) != set(self.modalities):
                raise ValueError(f"pairs[{number}] names {sorted(pair)}, expected {sorted(self.modalities)}")
        if (
            self.sampling.pairs_per_step == 1
            and self.loss.subcrops == 1
            and not self.loss.displacement_negatives
        ):
            raise ValueError(
                "sampling.pairs_per_step is 1: there are no negatives to contrast with; use 2 or more, "
                "or set loss.displacement_negatives or loss.subcrops"
            )
        if self.sampling.group != "auto":
            rotation_group(self.sampling.group).require_invariant(self.sampling.patch, "sampling.patch")
        return self


class InferSettings(Settings):
    """`comir-hpc infer`: a volume in, its representation out."""

    zarr: Path
    """Volume of one modality."""
    model: Path
    """Run folder that `train` wrote."""
    modality: str
    """Which encoder of the run."""
    out: Path
    """OME-Zarr store to write."""
    window: Positive = WINDOW
    """Voxels along each side of the sliding window."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = OVERLAP
    """Share of the window that neighbours share."""
    blend: Literal["gaussian", "hann", "exact"] = "gaussian"
    """How overlapping windows are put together; exact uses only voxels whose whole receptive field is in the window."""
    batch: Positive = 1
    """Windows evaluated together on a GPU (a CPU evaluates one a thread)."""
    precision: Precision = "auto"
    """See EngineSettings."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the encoder runs."""
    dtype: Literal["float16", "float32", "int8", "int16"] = "float32"
    """Stored type of the representation; integers are multiples of a scale that the volume keeps and reading undoes."""
    skip_background: bool = True
    """Leave out windows without specimen; the representation is zero there."""
    chunk: Positive = 64
    """Voxels along each side of a stored chunk."""
    shard: Positive = 128
    """Voxels along each side of a stored shard."""
    core: Positive | None = None
    """Voxels along each side of a block of work, a multiple of the shard; up to 2 x 2 x 2 shards when not given."""
    symmetrise: Literal["none", "D2", "D4", "O", "C2", "C4"] = "none"
    """Average over the rotations of this group: exact equivariance for as many passes as it has elements."""
    verify: bool = False
    """Check the content of blocks that are done already, and do damaged ones again."""
    part: Part = (1, 1)
    """(I, N): do part I of N (array jobs)."""
    workers: Positive = 1
    """Processes."""
    cluster: str | None = None
    """dask://HOST:PORT, or slurm: where `workers` run; this machine when not given."""
    overwrite: bool = False
    """Replace a store made from another input or model."""


class RegisterSettings(Settings):
    """`comir-hpc register`: two volumes in, a transform and a verdict out."""

    fixed: Path
    """Volume whose space the result lives in."""
    moving: Path
    """Volume to be aligned with it."""
    out: Path
    """Folder for transform, result and report."""
    representation: Literal["comir", "intensity"] = "comir"
    """What is compared: learned representations, or the intensities themselves by mutual information."""
    model: Path | None = None
    """Run folder (comir)."""
    fixed_modality: str | None = None
    """Encoder of the fixed volume (comir)."""
    moving_modality: str | None = None
    """Encoder of the moving volume (comir)."""
    fixed_representation: Path | None = None
    """Representation of the fixed volume that `infer` wrote; computed in memory when not given (comir)."""
    moving_representation: Path | None = None
    """Representation of the moving volume that `infer` wrote; computed in memory when not given (comir)."""
    symmetrise: Literal["none", "D2", "D4", "O", "C2", "C4"] = "none"
    """Average a representation that is computed here over the rotations of this group (comir)."""
    precision: Precision = "auto"
    """Of a representation that is computed here; see EngineSettings (comir)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where a representation is computed (comir)."""
    initial: Literal["identity", "moments", "global"] = "global"
    """Where the refinement starts."""
    transform: Literal["rigid", "affine"] = "rigid"
    """Kind of the result."""
    rotations: Positive = 4000
    """Rotations of the global search, spread evenly over SO(3); of single slices up to 360 turns in their plane."""
    candidates: Positive = 8
    """Distinct answers of the global search that are refined."""
    search_voxels: Positive = 32
    """Voxels along the longest side of the fixed volume in the global search; twice as many for single slices."""
    seed: int = 0
    """Of the metric's sampling."""
    max_memory_gib: Length = 4.0
    """Volumes are compared at the finest level of their pyramids whose voxels fit into this."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Threads; 0 takes what the machine gives."""
    overwrite: bool = False
    """Replace a result made from other inputs."""

    @model_validator(mode="after")
    def _check(self) -> RegisterSettings:
        given = self.fixed_representation is not None, self.moving_representation is not None
        if self.representation == "comir" and not all(given):
            missing = [n for n in ("model", "fixed_modality", "moving_modality") if getattr(self, n) is None]
            if missing:
                flags = ", ".join("--" + n.replace("_", "-") for n in missing)
                raise ValueError(f"representation comir needs {flags}; or use --representation intensity")
        if self.representation == "intensity" and any(given):
            raise ValueError(
                "fixed_representation and moving_representation mean nothing with --representation intensity"
            )
        return self


class WarpSettings(Settings):
    """`comir-hpc warp`: a volume onto another grid, or points through a transform."""

    transform: Path
    """transform.tfm or transform.h5 of `register`: fixed points to moving points."""
    zarr: Path | None = None
    """Moving volume."""
    like: Path | None = None
    """Volume whose grid the result gets."""
    points: Path | None = None
    """CSV with columns x, y, z: world points in mm (LPS)."""
    direction: Literal["fixed-to-moving", "moving-to-fixed"] = "fixed-to-moving"
    """Which way points are carried."""
    out: Path
    """OME-Zarr store, or CSV for points."""
    interpolation: Literal["auto", "linear", "nearest", "cubic"] = "auto"
    """auto is linear for images and nearest for labels."""
    chunk: Positive = 64
    """Voxels along each side of a stored chunk."""
    shard: Positive = 256
    """Voxels along each side of a stored shard."""
    part: Part = (1, 1)
    """(I, N): do part I of N (array jobs)."""
    verify: bool = False
    """Check the content of blocks that are done already, and do damaged ones again."""
    workers: Positive = 1
    """Processes."""
    cluster: str | None = None
    """dask://HOST:PORT, or slurm: where `workers` run; this machine when not given."""
    overwrite: bool = False
    """Replace a store made from other inputs."""


class EvaluateSettings(Settings):
    """`comir-hpc evaluate --model`: what the encoders of a run can do, in figures."""

    model: Path
    """Run folder that `train` wrote."""
    checkpoint: Annotated[int, Field(ge=1)] | None = None
    """Step of the checkpoint that is measured; the finished model when not given."""
    volumes: dict[str, Path] = {}
    """Aligned volumes by modality; the first pair of the training when not given."""
    out: Path | None = None
    """Folder for the figures; diagnostics/step-N of the run when not given."""
    cubes: Positive = 2
    """Cubes of specimen on which equivariance is measured."""
    side: Annotated[int, Field(ge=8)] = 64
    """Voxels along each side of a cube; a quarter is cut off each face, where padding shows."""
    angle_step: Annotated[float, Field(gt=0, le=180)] = 15.0
    """Degrees between the rotations of the curve over all angles."""
    axes: Positive = 3
    """Directions that each of them is turned about."""
    precision: Precision = "fp32"
    """Of the arithmetic; fp32 leaves the rounding of faster types out of the figures."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the encoders run."""

    @model_validator(mode="after")
    def _check(self) -> EvaluateSettings:
        if self.volumes and self.out is None:
            raise ValueError(
                "volumes other than the run's own need a folder for their figures: give --out DIR with --volume"
            )
        return self


class DemoSettings(Settings):
    """`comir-hpc demo`: the main job on the embedded pair."""

    out: Path = Path("demo")
    """Folder for everything the demo writes."""
    seed: int = 0
    """Of the displacement, bias field and noise."""
    train_seed: int = 0
    """Of the training."""
    model: Path | None = None
    """A trained run to use instead of training."""
    displacement: Literal["so3", "none"] = "so3"
    """Anywhere in SO(3) and a shift, or none (the aligned pair)."""


AnySettings = TypeVar("AnySettings", bound=Settings)


def load(kind: type[AnySettings], path: Path, overrides: Sequence[str] = ()) -> AnySettings:
    """Read settings from a YAML file; relative paths in it are relative to the file.

    Parameters
    ----------
    overrides : sequence of "a.b=value"
        Applied after the file; values are YAML.

    Raises
    ------
    ConfigError
        If the file is missing or not YAML, a key is unknown, or a value or combination cannot work.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; expected a YAML file (examples are in configs/)")
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{path} holds {type(record).__name__}, expected a mapping of settings")
    for override in overrides:
        _apply(record, override)
    return validate(kind, record, source=str(path), folder=path.parent)


def validate(
    kind: type[AnySettings], record: dict[str, Any], *, source: str = "settings", folder: Path | None = None
) -> AnySettings:
    """Settings of one class from plain data.

    Raises
    ------
    ConfigError
        With every problem on its own line: the key, what it is, what was expected.
    """
    try:
        settings = kind.model_validate(record)
    except ValidationError as error:
        raise ConfigError(
            f"{source}: " + "; ".join(_explain(kind, dict(e)) for e in error.errors())
        ) from error
    if folder is not None and isinstance(settings, TrainSettings):
        pairs = tuple({name: folder / path for name, path in pair.items()} for pair in settings.pairs)
        settings = settings.model_copy(update={"pairs": pairs})
    return settings


def dump(settings: Settings) -> str:
    """YAML of the resolved settings; `load` reads it back."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def _apply(record: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"--set {override}: expected KEY=VALUE, e.g. --set optimiser.steps=500")
    *parents, last = key.strip().split(".")
    for parent in parents:
        record = record.setdefault(parent, {})
        if not isinstance(record, dict):
            raise ConfigError(f"--set {override}: {parent} is a value, not a group of settings")
    record[last] = yaml.safe_load(value)


def _explain(kind: type[Settings], error: dict[str, Any]) -> str:
    place = [str(p) for p in error["loc"]]
    if error["type"] == "extra_forbidden":
        fields = _fields_at(kind, place[:-1])
        near = difflib.get_close_matches(place[-1], fields, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(fields)}"
        return f"unknown key {'.'.join(place)}; {remedy}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{'.'.join(place)} is missing"
    if error["type"] == "value_error":
        return f"{'.'.join(place)}: {message}" if place else message
    return f"{'.'.join(place)} is {error['input']!r}: {message}"


def _fields_at(kind: type[Settings], place: Sequence[str]) -> list[str]:
    for name in place:
        annotation = kind.model_fields[name].annotation if name in kind.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, Settings):
            kind = annotation
    return list(kind.model_fields)
