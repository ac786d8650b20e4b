"""Start a training from the weights of another run, or of the general model."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from comir_hpc.config.train import TrainSettings
from comir_hpc.errors import ConfigError
from comir_hpc.runs.checkpoints import read_tensors
from comir_hpc.runs.model import Model, general_model, read_model, weights_path

GENERAL = "general"
"""Word for the model that comes with the package, in `start_from`."""

# What two encoders must have in common for the weights of one to fit the other, beside the channels.
_SAME = ("name", "widths", "convs_per_level", "norm", "residual", "kernels", "padding", "latent_channels")


def open_start(settings: TrainSettings) -> tuple[Path, Model] | None:
    """Find the run whose weights a training starts from; None if it starts from random ones.

    Raises
    ------
    CheckpointError
        If that run has no model.
    ConfigError
        If its encoders are built differently, or none of them serves a modality. The message names the settings.
    """
    if settings.start_from is None:
        return None
    run = general_model() if settings.start_from == GENERAL else Path(settings.start_from)
    model = read_model(run)
    before = {**model.network.as_dict(), **model.options.as_dict(), "latent_channels": model.latent_channels}
    now = settings.network.model_dump(mode="json")
    changed = [
        f"network.{key}={_plain(before[key])} (now {_plain(now[key])})"
        for key in _SAME
        if key in before and _plain(before[key]) != _plain(now[key])
    ]
    if changed:
        raise ConfigError(
            f"the encoders of {run} are built differently, so this training cannot start from them; set "
            + ", ".join(changed)
        )
    for name in settings.encoder_names:
        if model.encoder_name(name) is None:
            raise ConfigError(
                f"{run} has encoders of {', '.join(model.modalities)}, and none of {name!r} to start from; give the "
                "modality the name that it has there"
            )
    return run, model


def take_weights(settings: TrainSettings, networks: nn.ModuleDict) -> dict[str, str]:
    """Load the weights that the settings start from into new networks.

    Returns
    -------
    dict
        Folder of the run under ``run`` and the step of its model under ``step``; empty for a start from random weights.

    Raises
    ------
    CheckpointError, ConfigError
        If they are missing, damaged or of other networks.
    """
    found = open_start(settings)
    if found is None:
        return {}
    run, model = found
    for name, network in networks.items():
        chosen = model.encoder_name(name)
        assert chosen is not None  # open_start has refused it
        path = weights_path(run, chosen)
        try:
            # A run with one encoder for all gives the same weights to each modality.
            network.load_state_dict(read_tensors(path))
        except RuntimeError as error:
            raise ConfigError(f"{path} does not fit the network of {name!r}: {error}") from error
    return {"run": str(run), "step": str(model.step)}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
