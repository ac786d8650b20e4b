"""Settings of `comir-hpc refine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from comir_hpc.config.base import Input, Length, OnCommandLine, Output, Positive, Seed
from comir_hpc.config.shared import Blocks, Symmetrised

FIELD_ARRAY = "displacements"
"""Name, in the store of a field, of the store that holds its vectors."""


def _whole(path: Path) -> Path:
    """Take the store of the vectors for the field that it is a part of: messages about the one name the other."""
    return path.parent if path.name == FIELD_ARRAY and path.parent.suffix == ".zarr" else path


class RefineSettings(Blocks, Symmetrised):
    """`comir-hpc refine`: what a registration leaves over, found block by block, for volumes of any size."""

    result: Annotated[Input[Path], OnCommandLine(metavar="RESULT")]
    """Folder that register wrote: the coarse solution."""
    out: Output[Annotated[Path, AfterValidator(_whole)]] = Field(
        default_factory=lambda given: (
            given["result"] / "field.zarr" if "result" in given else Path("field.zarr")
        )
    )
    """Store to write; RESULT/field.zarr when not given."""
    fixed: Input[Path | None] = None
    """Store of the fixed volume, where it is no more where it was registered."""
    moving: Input[Path | None] = None
    """Store of the moving volume, where it is no more where it was registered."""
    representation: Literal["comir", "intensity"] | None = None
    """What is compared: learned representations (comir) or intensities; what the registration compared when not
    given."""
    model: Input[Path | None] = None
    """Run folder that train wrote; that of the registration when not given, or the general model (comir)."""
    fixed_modality: Input[str | None] = None
    """Modality of the fixed volume, as in register; that of the registration when not given."""
    moving_modality: Input[str | None] = None
    """Modality of the moving volume, as in register; that of the registration when not given."""
    spacing: Length | None = None
    """Voxel size in mm of the grid on which the volumes are compared; that of the coarser volume when not given, or the
    model's own."""
    smoothness_mm: Length | None = None
    """Smoothness length in mm: the deviation of the window that moves as one; 12 voxels of the grid when not given."""
    block: Positive = 96
    """Voxels along each side of a block, on the grid on which the volumes are compared. Three smoothness lengths more
    are looked at on each side."""
    seed: Seed = 0
    """Seed of the place of the cubes that are held out."""
