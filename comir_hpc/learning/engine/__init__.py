"""Carry out training steps on one process or many: plain torch, or DeepSpeed, behind one surface.

Everything collective happens here. A method that is marked as collective must be called by every rank. The loop knows
neither ranks nor wrappers: it encodes, gathers, and hands back a loss. A checkpoint is the same plain record for every
engine, ZeRO stage and number of ranks, so that a run may continue with other ones.
"""

from __future__ import annotations

import os

from torch import nn

from comir_hpc.config.train import EngineSettings, OptimiserSettings
from comir_hpc.errors import ConfigError
from comir_hpc.host.launch import choose_device, choose_precision, read_launch
from comir_hpc.learning.engine.plain import TorchEngine
from comir_hpc.learning.engine.surface import Engine, learning_rate

__all__ = [
    "Engine",
    "TorchEngine",
    "check_engine",
    "learning_rate",
    "make_engine",
]


def make_engine(settings: EngineSettings, networks: nn.ModuleDict, optimiser: OptimiserSettings) -> Engine:
    """Put networks on this process's device, behind the engine that the settings name (collective).

    Parameters
    ----------
    settings : EngineSettings
        The engine to use, its device and its precision.
    networks : ModuleDict
        The encoders by modality, with the same weights on every rank. They are moved to the device. With several
        ranks, their batch norms are synchronised.
    optimiser : OptimiserSettings
        Learning rate and its schedule, weight decay, and the clipping of the gradient.

    Raises
    ------
    ConfigError
        If the settings do not fit the machine or each other.
    """
    launch = read_launch(os.environ)
    if settings.name == "torch":
        return TorchEngine(settings, networks, optimiser, launch)
    # Only here: importing DeepSpeed takes seconds.
    from comir_hpc.learning.engine.zero import DeepSpeedEngine

    return DeepSpeedEngine(settings, networks, optimiser, launch)


def check_engine(settings: EngineSettings, *, recomputing: bool) -> None:
    """Refuse settings that cannot work, before any data is read.

    Parameters
    ----------
    settings : EngineSettings
        The settings to check.
    recomputing : bool
        Whether the networks compute activations again in the backward pass.

    Raises
    ------
    ConfigError
        If the settings do not fit the machine or each other.
    """
    if settings.name == "deepspeed" and settings.zero_stage == 3:
        conflict = (
            "recomputing activations (network.checkpoint_levels) then needs weights that are gone (DeepSpeed issue "
            "4332), and "
            if recomputing
            else ""
        )
        raise ConfigError(
            f"engine.zero_stage is 3: {conflict}dividing the weights of a convolutional network saves nothing, as "
            "activations fill the memory (87 M weights on two ranks: 2219 MiB with stage 3, 1770 with stage 2); "
            "use 2, 1 or 0"
        )
    launch = read_launch(os.environ)
    choose_precision(settings.precision, choose_device(settings.device, launch))
