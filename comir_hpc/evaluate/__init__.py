"""`comir-hpc evaluate`: measure a registration against the truth, or what a trained model can do.

`registration` compares results of `register` with a known transform. `model` measures the encoders of a run at any
checkpoint: `checkpoint` opens them, `cubes` places and reads what they are measured on, `measures` holds the single
measurements, and `plots` draws.
"""

from __future__ import annotations

from comir_hpc.config.evaluate import CompareSettings
from comir_hpc.evaluate.checkpoint import Subject, open_subject
from comir_hpc.evaluate.model import Diagnosis, diagnose, plan_diagnosis, registration_bias
from comir_hpc.evaluate.registration import (
    Evaluation,
    Table,
    evaluate,
    specimen_points,
    target_registration_error,
)

__all__ = [
    "Diagnosis",
    "Evaluation",
    "Subject",
    "Table",
    "compare",
    "diagnose",
    "evaluate",
    "open_subject",
    "plan_diagnosis",
    "registration_bias",
    "specimen_points",
    "target_registration_error",
]


def compare(settings: CompareSettings) -> Table:
    """Carry out `comir-hpc evaluate --result`; it raises what `evaluate` raises."""
    return evaluate(
        settings.result,
        settings.truth,
        points=settings.points,
        moving_points=settings.moving_points,
        labels=settings.labels,
        back=settings.back,
        out=settings.out,
        form=settings.form,
    )
