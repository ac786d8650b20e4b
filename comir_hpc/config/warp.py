"""Settings of `comir-hpc warp`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from comir_hpc.config.base import Input, Output
from comir_hpc.config.shared import Blocks, InForm, Stored
from comir_hpc.config.words import Direction, Interpolation


class WarpSettings(InForm, Blocks, Stored):
    """`comir-hpc warp`: a volume onto another grid, or points through a transform."""

    volume_fields: ClassVar[tuple[str, ...]] = ("zarr", "like")

    transform: Input[Path]
    """Transform of register, or of another tool (docs/transforms.md): it maps fixed points to moving points."""
    zarr: Input[Path | None] = None
    """Moving volume: a store, or any file that ingest reads."""
    like: Input[Path | None] = None
    """Volume whose grid the result gets: a store, or any file that ingest reads."""
    points: Input[Path | None] = None
    """CSV file of points with columns x, y, z (world coordinates in mm, LPS), or a .fcsv file of 3D Slicer."""
    direction: Direction = "fixed-to-moving"
    """Which way `points` are carried."""
    interpolation: Literal["auto", Interpolation] = "auto"
    """How values between voxels are found; auto is linear for images and nearest for labels."""
    out: Output[Path]
    """What to write: an OME-Zarr store (any size), .nii, .nii.gz, .nrrd, .mha, .tif or
    .ome.tif; a CSV file for `points`."""
