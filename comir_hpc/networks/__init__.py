"""Build the encoders, which are interchangeable and chosen by name.

To add another one, write a file with a function that returns a `Network`, and add one line to `NETWORKS`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from comir_hpc.config.train import NetworkSettings
from comir_hpc.errors import ConfigError
from comir_hpc.networks.cost import (
    StepCost,
    count_parameters,
    estimate_activation_bytes,
    predict_encoding,
    predict_step,
)
from comir_hpc.networks.denseunet import denseunet
from comir_hpc.networks.folding import fold_norms
from comir_hpc.networks.gunet import gunet
from comir_hpc.networks.hourglass import Network
from comir_hpc.networks.planning import plan_pooling
from comir_hpc.networks.unet import unet

__all__ = [
    "NETWORKS",
    "Network",
    "StepCost",
    "build_network",
    "count_parameters",
    "estimate_activation_bytes",
    "fold_norms",
    "network_options",
    "plan_pooling",
    "predict_encoding",
    "predict_step",
]

NETWORKS: dict[str, Callable[..., Network]] = {"unet": unet, "denseunet": denseunet, "gunet": gunet}


def build_network(name: str, *, in_channels: int, latent_channels: int, **options: Any) -> Network:
    """Build the encoder of one modality.

    Call it once for each modality: the encoders share no weights.

    Parameters
    ----------
    name : str
        A key of `NETWORKS`.
    in_channels, latent_channels : int
        Channels of the image and of the representation.
    **options
        Arguments of the function that `name` stands for. `network_options` derives them from the settings.

    Raises
    ------
    ConfigError
        If the name is unknown, the network has no such option, or the values contradict each other.
    """
    if name not in NETWORKS:
        raise ConfigError(f"unknown network {name!r}; {_nearest(name, NETWORKS)}")
    known = [option for option in inspect.signature(NETWORKS[name]).parameters if option not in _SIZES]
    for option in options:
        if option not in known:
            raise ConfigError(f"network {name} has no option {option!r}; {_nearest(option, known)}")
    for size, value in zip(_SIZES, (in_channels, latent_channels), strict=True):
        if value < 1:
            raise ConfigError(f"{size} is {value}; expected 1 or more")
    return NETWORKS[name](in_channels=in_channels, latent_channels=latent_channels, **options)


_SIZES = ("in_channels", "latent_channels")


def _nearest(word: str, known: Sequence[str] | dict[str, Any]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"{f'did you mean {near[0]}? ' if near else ''}known: {', '.join(known)}"


def network_options(
    settings: NetworkSettings, *, spacing_zyx: Sequence[float], group: str, planar: bool = False
) -> dict[str, Any]:
    """Work out everything `build_network` needs, as plain values that survive JSON and rebuild the same network.

    Parameters
    ----------
    settings : NetworkSettings
        The network settings that the user chose.
    spacing_zyx : three float
        Voxel spacing of the training volumes, in any one unit.
    group : str
        Name of the group of rotations that the representation should follow, never ``auto``. It becomes an option
        of the networks that take a group; the others are checked by `Network.require_group`.
    planar : bool
        Whether the network works on single slices (patches of one voxel along z).

    Raises
    ------
    ConfigError
        If a setting was changed that has no effect on this network.
    """
    # The functions' own parameters say what a network heeds, so that nothing is listed twice.
    known = inspect.signature(NETWORKS[settings.name]).parameters
    options = settings.model_dump(mode="json", exclude={"name", "latent_channels", "shared"})
    # A setting at its default may be one that this network does not know: it is dropped. A changed one would be
    # ignored without a word, so it is refused.
    for key in [key for key in options if key not in known]:
        if getattr(settings, key) != type(settings).model_fields[key].default:
            heeding = [name for name, make in NETWORKS.items() if key in inspect.signature(make).parameters]
            raise ConfigError(
                f"network.{key} is {options[key]}, which has no effect on {settings.name}; leave it out, or use "
                f"network.name={' or '.join(heeding)}"
            )
        del options[key]
    derived = {"spacing_zyx": [float(step) for step in spacing_zyx], "planar": planar, "group": group}
    return options | {key: value for key, value in derived.items() if key in known}
