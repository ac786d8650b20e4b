"""Settings of `comir-hpc infer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from comir_hpc.config.base import Input, Length, Output, Positive, Resource
from comir_hpc.config.shared import Blocks, Stored, Symmetrised
from comir_hpc.config.words import Blend, StoredType

# Sliding windows, where nobody says otherwise: voxels a side, and the share that neighbours have in common.
WINDOW = 64
OVERLAP = 0.25


class InferSettings(Blocks, Stored, Symmetrised):
    """`comir-hpc infer`: a volume in, its representation out."""

    volume_fields: ClassVar[tuple[str, ...]] = ("zarr",)

    zarr: Input[Path]
    """Volume of one modality: a store, or any file that ingest reads."""
    model: Input[Path]
    """Run folder that train wrote."""
    modality: Input[str]
    """Modality of the volume: which encoder of the run is used."""
    out: Output[Path]
    """OME-Zarr store to write."""
    spacing: Length | None = None
    """Voxel size in mm of the grid that the volume is encoded on; that of the training when not given, or one that
    suits the size of the specimen for a model that knows all scales."""
    window: Positive = WINDOW
    """Voxels along each side of the sliding window."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = OVERLAP
    """Share of a window's side that neighbouring windows have in common, from 0 to 1."""
    blend: Blend = "gaussian"
    """How overlapping windows are put together; exact uses only voxels whose whole receptive field is in the window."""
    skip_background: bool = True
    """Leave out windows without specimen; the representation is zero there."""
    batch: Resource[Positive] = 1
    """Number of windows evaluated together on a GPU (a CPU evaluates one a thread)."""
    core: Resource[Positive | None] = None
    """Voxels along each side of a block of work, a multiple of the shard; up to 2 x 2 x 2 shards when not given."""
    dtype: Output[StoredType] = "float32"
    """Stored type of the representation; integers are multiples of a scale that the volume keeps and reading undoes."""
    shard: Output[Positive] = 128
