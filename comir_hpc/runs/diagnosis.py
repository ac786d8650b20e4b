"""The diagnostics.json that `evaluate` writes for a checkpoint: what its encoders can do, on cubes of a specimen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError

from comir_hpc.runs.record import Record

Figure = float | None
Numbers = tuple[Figure, ...]


class Element(Record):
    """One rotation of the group: its angle, and whether the training undid it."""

    angle_deg: float
    trained: bool


class GroupErrors(Record):
    """Equivariance error of every rotation of the group, its mean and the worst of them."""

    errors: Numbers = ()
    mean: Figure = None
    worst: Figure = None


class Curve(Record):
    """Equivariance error at any angle, (A, K) for K axes, and what resampling alone can add, (A,)."""

    angles_deg: tuple[float, ...] = ()
    errors: tuple[Numbers, ...] = ()
    floor: Numbers = ()


class ModalityFigures(Record):
    """Figures of one encoder."""

    equivariance: GroupErrors = GroupErrors()
    so3: Curve = Curve()
    effective_rank: Figure = None
    border: Figure = None


class Cubes(Record):
    """Where it was measured: first voxels, sides and margins (z, y, x) in voxels."""

    starts: tuple[tuple[int, ...], ...] = ()
    side_zyx: tuple[int, ...] = ()
    trim_zyx: tuple[int, ...] = ()


class PatchFigures(Record):
    """What `train` measures on patches when it is done; see `model.Reference`."""

    retrieval: Figure = None


class BiasFigures(Record):
    """Where the registration of the aligned pair ends, started at the identity."""

    voxels: Figure = None
    degrees: Figure = None


class Diagnosis(Record):
    """Content of diagnostics.json, as far as it is shown."""

    step: int
    group: str = ""
    elements: tuple[Element, ...] = ()
    cubes: Cubes = Cubes()
    modalities: Annotated[dict[str, ModalityFigures], Field(min_length=1)]
    agreement: Figure = None
    patches: PatchFigures = PatchFigures()
    bias: BiasFigures | None = None


def as_diagnosis(content: Mapping[str, Any]) -> Diagnosis | None:
    """Check the content of a diagnostics.json; None where it is damaged, so that the rest can be shown."""
    try:
        return Diagnosis.model_validate_json(json.dumps(dict(content)))
    except ValidationError:
        return None
