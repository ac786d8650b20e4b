"""Settings of `comir-hpc export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from comir_hpc.config.base import Input, OnCommandLine, Output
from comir_hpc.config.shared import InForm, Replacing
from comir_hpc.config.words import TransformForm


class ExportSettings(InForm, Replacing):
    """`comir-hpc export`: a transform in the form of another tool, or an encoder as TorchScript."""

    transform: Annotated[Input[Path], OnCommandLine(metavar="TRANSFORM")]
    """Transform from fixed to moving points: a folder that register wrote, a file of it, or a file of another tool. For
    torchscript the folder of a training run."""
    to: Literal[TransformForm, "torchscript"]
    """Form to write. docs/transforms.md says what each one holds."""
    fixed: Input[Path | None] = None
    """Fixed volume, any file that ingest reads, for its grid; that of the registration when not given."""
    moving: Input[Path | None] = None
    """Moving volume, any file that ingest reads, for its grid; that of the registration when not given."""
    inverse: bool = False
    """Write the inverse, from moving to fixed points. Of a transform that bends space it is a field, on the moving
    grid, with a residual that is said."""
    modality: Input[str | None] = None
    """Modality whose encoder is written (torchscript)."""
    out: Output[Path | None] = None
    """File to write; a name beside the transform when not given."""
