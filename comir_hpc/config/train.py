"""Settings of `comir-hpc train`: groups for network, loss, sampling, optimiser, engine, tracking and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from comir_hpc.config.base import (
    Input,
    Length,
    OnCommandLine,
    Output,
    PlaceZYX,
    Positive,
    Settings,
    Share,
    SizeZYX,
)
from comir_hpc.config.words import (
    SHARED,
    Bound,
    Configuration,
    Critic,
    Device,
    EngineName,
    GroupName,
    Kernels,
    NetworkName,
    Norm,
    Padding,
    Precision,
)


class RunSettings(Settings):
    """Where a training is described, and where it goes."""

    config: Annotated[Input[Path], OnCommandLine(metavar="CONFIG.yaml")]
    """YAML file with the settings of the training; examples are in configs/."""
    run: Output[Path]
    """Folder of the run; the training goes on if it holds a checkpoint."""
    overrides: Annotated[tuple[str, ...], OnCommandLine(names=("--set",), metavar="a.b=c")] = ()
    """Change one setting of the file, e.g. optimiser.steps=500; repeat the option for more. docs/training.md and
    config.yaml of a run name all settings."""


class NetworkSettings(Settings):
    """The encoder of one modality; every modality has its own weights."""

    name: NetworkName = "unet"
    """Architecture of the encoders."""
    shared: bool = False
    """Use one encoder for all modalities, which then serves modalities that it has not seen."""
    widths: tuple[Positive, ...] = (16, 32, 64, 64)
    """Number of channels of each resolution level, finest first."""
    latent_channels: Positive = 1
    """Number of channels of the representation."""
    norm: Norm = "batch"
    """Batch statistics (running means at inference), or a norm over channels at each voxel."""
    residual: bool = False
    """Add each block's input to its output."""
    convs_per_level: Positive | tuple[Positive, ...] = (1, 2)
    """Number of convolutions in each block, finest first; the last number counts for all coarser levels."""
    kernels: Kernels = "symmetric"
    """Whether taps of `unet` that the group exchanges share a weight (exact equivariance), or all are free."""
    padding: Padding = "replicate"
    """What convolutions see beyond the border of a patch or window."""
    configuration: Configuration = "three-level"
    """Which of the networks published with CoMIR `denseunet` is."""
    antialiased: bool = True
    """Mean pooling and linear upsampling in `denseunet`; false is the published max pooling and nearest upsampling."""
    checkpoint_levels: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    """Number of finest levels whose activations are recomputed in the backward pass, not kept; auto: as few as fit."""


class LossSettings(Settings):
    """The contrastive loss (docs/theory.md)."""

    critic: Critic = "correlation"
    """Similarity of two representations."""
    bound: Bound = "infonce"
    """Lower bound of the mutual information that is maximised."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Number that divides every similarity."""
    subcrops: Positive = 2
    """Each representation is cut into subcrops^3 samples: more negatives from the same patches."""
    displacement_negatives: Annotated[int, Field(ge=0)] = 8
    """Number of shifted crops of the partner that serve as negatives, for each patch."""
    displacement_voxels: tuple[Positive, Positive] = (1, 4)
    """Smallest and largest shift of a displacement negative, in voxels."""
    decay_l1: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the mean absolute activation."""
    decay_l2: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of the mean squared activation."""
    min_overlap: Share = 0.05
    """Samples whose common valid voxels are a smaller share of a sample are not compared."""


class SamplingSettings(Settings):
    """Aligned patches and their augmentation."""

    patch: SizeZYX = (32, 32, 32)
    """Voxels along each side (z, y, x) of a patch."""
    pairs_per_step: Positive = 8
    """Number of aligned patch pairs in one step, over all ranks."""
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
    within: Annotated[tuple[PlaceZYX, SizeZYX] | None, OnCommandLine(metavar="START STOP")] = None
    """First voxel (z, y, x) and the one after the last, on the chosen level, of the box that patches come from; null
    takes all. The rest of the volume can then be used to test."""
    cache_mib: Annotated[int, Field(ge=0)] = 4096
    """Volumes are held in memory when all fit into this many MiB; otherwise the boxes under the patches are read."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Number of processes that read boxes ahead when the volumes are not held in memory."""


class SyntheticSettings(Settings):
    """Made-up pairs: one random geometry in two random contrasts (docs/general.md)."""

    share: Share = 1.0
    """Share of a step's pairs that are made up; 1 needs no `pairs`."""
    real: Share = 0.4
    """Share of the made-up pairs that show a real volume through random contrasts; the others are made of shapes."""
    volumes: tuple[Path, ...] = ()
    """Volumes that lend their anatomy, each on its own; without any, the embedded brain does."""
    scale: tuple[Length, Length] = (0.5, 3.0)
    """Smallest and largest size of a patch's voxel, in voxels of these volumes."""


class OptimiserSettings(Settings):
    """AdamW, linear warm-up and cosine decay."""

    steps: Positive = 400
    """Number of optimiser steps."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    """Peak learning rate."""
    warmup: Share = 0.15
    """Share of the steps over which the rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Weight decay, decoupled from the gradient (AdamW)."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient of all networks together."""
    average: Annotated[float, Field(ge=0, lt=1)] = 0.98
    """Decay for each step of the running average of the weights (the trained model); 0 keeps the last weights."""


class EngineSettings(Settings):
    """How steps are carried out."""

    name: EngineName = "torch"
    """Plain torch (DDP over several ranks) or DeepSpeed."""
    precision: Precision = "auto"
    """Autocast of the networks; auto is bf16 where the device multiplies it fast, fp32 otherwise. The loss is fp32."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """Stage of DeepSpeed's ZeRO: what the ranks share out among them."""
    accumulation: Positive = 1
    """Number of micro-batches in a step."""
    offload_optimiser: bool = False
    """Keep the optimiser's state in host memory (DeepSpeed)."""
    device: Device = "auto"
    """Where the networks run; auto is a GPU when there is one."""
    timeout_s: Positive = 600
    """Seconds that a rank waits for the others before the job fails."""

    @model_validator(mode="after")
    def _check(self) -> Self:
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
    """Name of the MLflow experiment."""
    log_every: Positive = 10
    """Number of steps between two lines of metrics."""
    picture_every: Positive = 100
    """Number of steps between two pictures of patches and representations."""
    system_every: Length | None = 10.0
    """Seconds between two looks at processor, memory, disk, network and GPUs (system.jsonl); null does not look."""
    checkpoint_mib: Annotated[int, Field(ge=0)] = 256
    """The last checkpoint goes to MLflow if it has at most this many MiB; the model always does."""


class CheckpointSettings(Settings):
    """When the loop's whole state is saved."""

    every_steps: Positive = 100
    """Number of steps between two checkpoints."""
    every_minutes: Annotated[float, Field(gt=0)] = 10.0
    """Minutes after which one is saved in any case."""
    keep: Positive = 2
    """Number of newest checkpoints that stay."""


class TrainSettings(Settings):
    """`comir-hpc train`: aligned pairs in, one encoder a modality out."""

    volume_fields: ClassVar[tuple[str, ...]] = ("pairs",)

    modalities: Annotated[Input[tuple[str, ...]], OnCommandLine(metavar="NAME")]
    """Names of the modalities, two or more; their order is the order of the encoders."""
    pairs: tuple[dict[str, Path], ...] = ()
    """Aligned specimens: for each, one volume a modality (a store, or any file that ingest reads), aligned in the
    world; patches have the voxels of the first modality."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] = 0
    """Seed of the weights, the patches and their augmentation."""
    network: NetworkSettings = Field(default_factory=NetworkSettings)
    start_from: Annotated[str | None, OnCommandLine(names=("--from",), metavar="RUN|general")] = None
    """Start from the weights of another run, or of the general model (general), instead of random ones."""
    synthetic: SyntheticSettings | None = None
    """Pairs that are made up, alone or beside the aligned ones; null makes none."""
    loss: LossSettings = Field(default_factory=LossSettings)
    sampling: SamplingSettings = Field(default_factory=SamplingSettings)
    optimiser: OptimiserSettings = Field(default_factory=OptimiserSettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    tracking: TrackingSettings = Field(default_factory=TrackingSettings)
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.modalities)) < 2:
            raise ValueError(f"modalities {list(self.modalities)}: at least two different names are needed")
        if not self.pairs and (self.synthetic is None or self.synthetic.share < 1):
            raise ValueError("there are no pairs to learn from: name some, or set synthetic.share=1")
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
            from comir_hpc.space.groups import rotation_group  # it loads numpy, which the help does not need

            rotation_group(self.sampling.group).require_invariant(self.sampling.patch, "sampling.patch")
        return self

    @property
    def encoder_names(self) -> tuple[str, ...]:
        """Names of the encoders: one a modality, or one for all."""
        return (SHARED,) if self.network.shared else self.modalities

    def placed_in(self, folder: Path) -> Self:
        """Return settings whose volumes are relative to `folder`."""
        return self.with_volumes(lambda path: folder / path)
