"""Settings of `comir-hpc evaluate`: one class for results, one for the encoders of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from comir_hpc.config.base import Input, OnCommandLine, Output, Positive
from comir_hpc.config.shared import Encoding, InForm
from comir_hpc.config.words import Precision


def _named_paths(volumes: Any) -> Any:
    """Take a list of texts MODALITY=PATH, too, as the command line has it."""
    if not isinstance(volumes, list | tuple):
        return volumes
    found = {}
    for text in volumes:
        name, separator, path = str(text).partition("=")
        if not (name and separator and path):
            raise ValueError(f"--volume {text}: expected MODALITY=PATH, e.g. --volume t1w=a.zarr")
        if name in found:
            raise ValueError(f"--volume names a modality twice: {name}")
        found[name] = Path(path)
    return found


class CompareSettings(InForm):
    """`comir-hpc evaluate --result`: registrations held against what is known, side by side."""

    volume_fields: ClassVar[tuple[str, ...]] = ("fixed_labels", "moving_labels")

    result: Annotated[Input[tuple[Path, ...]], Field(min_length=1), OnCommandLine(metavar="DIR")]
    """Folder that register wrote; repeat the option to compare methods."""
    truth: Input[Path | None] = None
    """True transform, from fixed to moving points: of register, or of another tool (docs/transforms.md)."""
    points: Input[Path | None] = None
    """CSV file of fixed points where the error is measured; points of the specimen when not given."""
    moving_points: Input[Path | None] = None
    """CSV file of the moving points that `points` correspond to, row by row, where no true transform is known."""
    fixed_labels: Input[Path | None] = None
    """Labels of the fixed volume, for the overlap with `moving_labels`: a store, or any file that ingest reads."""
    moving_labels: Input[Path | None] = None
    """Labels of the moving volume."""
    back: Input[Path | None] = None
    """Folder of a registration of the same pair in the opposite direction, for the inverse consistency."""
    out: Output[Path | None] = None
    """With --result: CSV file that gets the table; it is only printed when not given."""

    @property
    def labels(self) -> tuple[Path, Path] | None:
        """Labels of the fixed and the moving volume; None where none are given."""
        return (
            None
            if not (self.fixed_labels and self.moving_labels)
            else (self.fixed_labels, self.moving_labels)
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.fixed_labels is None) != (self.moving_labels is None):
            role = "moving" if self.moving_labels is None else "fixed"
            raise ValueError(f"labels are compared with labels: give --{role}-labels, too")
        if self.moving_points is not None and (self.points is None or self.truth is not None):
            raise ValueError(
                "--moving-points are where --points belong: give --points with them, and leave --truth out"
            )
        if not (self.truth or self.moving_points or self.fixed_labels or self.back):
            raise ValueError(
                "there is nothing to compare the result with: give --truth, or --points with --moving-points, or "
                "--fixed-labels with --moving-labels, or --back"
            )
        return self


class EvaluateSettings(Encoding):
    """`comir-hpc evaluate --model`: what the encoders of a run can do, in figures."""

    volume_fields: ClassVar[tuple[str, ...]] = ("volumes",)

    model: Input[Path]
    """Run folder that train wrote: its encoders are measured."""
    checkpoint: Input[Positive | None] = None
    """Step of the checkpoint that is measured; the finished model when not given."""
    volumes: Annotated[
        Input[dict[str, Path]],
        BeforeValidator(_named_paths),
        OnCommandLine(names=("--volume",), metavar="MODALITY=PATH"),
    ] = {}  # noqa: RUF012  (pydantic copies it)
    """Aligned volume to measure on, once for each modality; the first pair of the training when not given."""
    out: Output[Path | None] = None
    """With --model: folder for the figures; diagnostics/step-N of the run when not given."""
    cubes: Positive = 2
    """Number of cubes of specimen on which equivariance is measured."""
    side: Annotated[int, Field(ge=8)] = 64
    """Voxels along each side of a cube; a quarter is cut off each face, where padding shows."""
    angle_step: Annotated[float, Field(gt=0, le=180)] = 15.0
    """Degrees between the rotations of the curve over all angles."""
    axes: Positive = 3
    """Number of directions that each of these rotations is turned about."""
    precision: Annotated[Precision, OnCommandLine(panel="Resources")] = "fp32"
    """Arithmetic of the encoders; fp32 leaves the rounding of faster types out of the figures."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.volumes and self.out is None:
            raise ValueError(
                "volumes other than the run's own need a folder for their figures: give --out DIR with --volume"
            )
        return self
