"""Settings of `comir-hpc ingest`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator

from comir_hpc.config.base import Input, LengthZYX, OnCommandLine, Output
from comir_hpc.config.shared import Blocks, MemoryLimit, Stored
from comir_hpc.config.words import SourceKind


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


class IngestSettings(Blocks, MemoryLimit, Stored):
    """`comir-hpc ingest`: a file in, an OME-Zarr volume out."""

    source: Input[Path]
    """NIfTI, NRRD, MHA, TIFF, OME-TIFF, HDF5, npy or zarr file, a folder of DICOM slices, or a PNG of one slice."""
    out: Annotated[Output[Path], OnCommandLine(metavar="OUT.zarr")]
    """OME-Zarr store to write."""
    spacing: Input[LengthZYX | None] = None
    """Voxel spacing (z, y, x) in the unit of `unit`; needed where the file has none, otherwise it replaces the file's.
    Of a single slice z is the thickness."""
    unit: Input[str | None] = None
    """Unit of `spacing`: nm, um, mm, cm or m."""
    dataset: Input[str | None] = None
    """Which of several volumes: path of an array in HDF5 or zarr, number of a TIFF series, UID of a DICOM series."""
    kind: Annotated[Input[SourceKind], OnCommandLine(names=("--labels",), value="labels")] = "image"
    """The volume is a segmentation: it is made coarser by the most frequent value, and has no intensity statistics."""
    non_finite: Input[float | None] = None
    """Value that replaces NaN and infinite voxels; when not given, such voxels are refused."""
    foreground_above: Input[float | None] = None
    """Value above which a voxel belongs to the specimen; found from the histogram when not given."""
    padding: Annotated[Input[PaddingValue], OnCommandLine(metavar="VALUE")] = "auto"
    """Value of voxels that were never measured, such as the corners around a round field of view, in the unit of the
    stored values: auto recognises a constant that fills the border, none takes all values as measured."""
