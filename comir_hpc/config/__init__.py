"""Settings: one frozen class a verb, read from YAML or made from options, refused when they cannot work.

A setting is defined once: its name, its type, its default, and a docstring with its unit. The command line makes its
options from these (`comir_hpc.commands.options`). `base` holds what all settings share, `files` reads and writes YAML,
`words` lists the allowed words, `shared` the settings that several verbs have; the rest is one file a verb.
"""

from comir_hpc.config.base import OnCommandLine, Settings, validate
from comir_hpc.config.demo import DemoSettings
from comir_hpc.config.evaluate import CompareSettings, EvaluateSettings
from comir_hpc.config.files import dump, load
from comir_hpc.config.infer import OVERLAP, WINDOW, InferSettings
from comir_hpc.config.ingest import IngestSettings
from comir_hpc.config.pages import DoctorSettings, ReportSettings, SyncSettings
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
from comir_hpc.config.warp import WarpSettings
from comir_hpc.config.words import GroupName, Precision

__all__ = [
    "OVERLAP",
    "WINDOW",
    "CheckpointSettings",
    "CompareSettings",
    "DemoSettings",
    "DoctorSettings",
    "EngineSettings",
    "EvaluateSettings",
    "GroupName",
    "InferSettings",
    "IngestSettings",
    "LossSettings",
    "NetworkSettings",
    "OnCommandLine",
    "OptimiserSettings",
    "Precision",
    "RegisterPairSettings",
    "RegisterSettings",
    "ReportSettings",
    "RunSettings",
    "SamplingSettings",
    "Settings",
    "SyncSettings",
    "TrackingSettings",
    "TrainSettings",
    "WarpSettings",
    "dump",
    "load",
    "validate",
]
