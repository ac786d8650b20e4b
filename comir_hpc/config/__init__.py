"""Settings: one frozen class a verb, read from YAML or made from options, refused when they cannot work.

A setting is defined once: its name, its type, its default, and a docstring with its unit. The command line makes its
options from these (`comir_hpc.commands.options`). `base` holds what all settings share, `files` reads and writes YAML,
`words` lists the allowed words, `shared` the settings that several verbs have; the rest is one file a verb.

The names below are imported when they are asked for: the help of one verb need not read the settings of all others.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comir_hpc.config.adapt import AdaptSettings
    from comir_hpc.config.base import OnCommandLine, Settings, validate
    from comir_hpc.config.benchmark import BenchmarkRunSettings, BenchmarkSettings
    from comir_hpc.config.datasets import DatasetsSettings
    from comir_hpc.config.demo import DemoSettings
    from comir_hpc.config.evaluate import CompareSettings, EvaluateSettings
    from comir_hpc.config.export import ExportSettings
    from comir_hpc.config.files import dump, load
    from comir_hpc.config.infer import OVERLAP, WINDOW, InferSettings
    from comir_hpc.config.ingest import IngestSettings
    from comir_hpc.config.pages import DoctorSettings, ReportSettings, SyncSettings
    from comir_hpc.config.refine import RefineSettings
    from comir_hpc.config.register import RegisterPairSettings, RegisterSettings
    from comir_hpc.config.train import (
        CheckpointSettings,
        EngineSettings,
        LossSettings,
        NetworkSettings,
        OptimiserSettings,
        RunSettings,
        SamplingSettings,
        TrackingSettings,
        TrainSettings,
    )
    from comir_hpc.config.view import ViewSettings
    from comir_hpc.config.warp import WarpSettings
    from comir_hpc.config.words import GroupName, Precision

__all__ = [
    "OVERLAP",
    "WINDOW",
    "AdaptSettings",
    "BenchmarkRunSettings",
    "BenchmarkSettings",
    "CheckpointSettings",
    "CompareSettings",
    "DatasetsSettings",
    "DemoSettings",
    "DoctorSettings",
    "EngineSettings",
    "EvaluateSettings",
    "ExportSettings",
    "GroupName",
    "InferSettings",
    "IngestSettings",
    "LossSettings",
    "NetworkSettings",
    "OnCommandLine",
    "OptimiserSettings",
    "Precision",
    "RefineSettings",
    "RegisterPairSettings",
    "RegisterSettings",
    "ReportSettings",
    "RunSettings",
    "SamplingSettings",
    "Settings",
    "SyncSettings",
    "TrackingSettings",
    "TrainSettings",
    "ViewSettings",
    "WarpSettings",
    "dump",
    "load",
    "validate",
]

_PLACES = {
    "adapt": ("AdaptSettings",),
    "base": ("OnCommandLine", "Settings", "validate"),
    "benchmark": ("BenchmarkRunSettings", "BenchmarkSettings"),
    "datasets": ("DatasetsSettings",),
    "demo": ("DemoSettings",),
    "evaluate": ("CompareSettings", "EvaluateSettings"),
    "export": ("ExportSettings",),
    "files": ("dump", "load"),
    "infer": ("OVERLAP", "WINDOW", "InferSettings"),
    "ingest": ("IngestSettings",),
    "pages": ("DoctorSettings", "ReportSettings", "SyncSettings"),
    "refine": ("RefineSettings",),
    "register": ("RegisterPairSettings", "RegisterSettings"),
    "train": (
        "CheckpointSettings",
        "EngineSettings",
        "LossSettings",
        "NetworkSettings",
        "OptimiserSettings",
        "RunSettings",
        "SamplingSettings",
        "TrackingSettings",
        "TrainSettings",
    ),
    "view": ("ViewSettings",),
    "warp": ("WarpSettings",),
    "words": ("GroupName", "Precision"),
}


def __getattr__(name: str) -> Any:
    """Import a name from the module that has it."""
    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    # The class of error that `hasattr`, and Python's own import, expect here.
    raise AttributeError(f"module {__name__} has no attribute {name}")


def __dir__() -> list[str]:
    """List the names, imported or not."""
    return sorted({*globals(), *__all__})
