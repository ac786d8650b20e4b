"""Load an encoder from the folder of a training run, and find the pyramid level that it can read."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
from torch import Tensor

from comir_hpc.config.words import Precision
from comir_hpc.config.words import Symmetry as Symmetry
from comir_hpc.errors import CheckpointError, ConfigError, VolumeError
from comir_hpc.host.launch import choose_device, choose_precision
from comir_hpc.host.memory import keep_freed_memory
from comir_hpc.networks import Network, build_network, fold_norms
from comir_hpc.representations.encoding.encoder import Encoder
from comir_hpc.runs.checkpoints import read_tensors
from comir_hpc.runs.model import MODEL_FILE, Model, read_model, weights_path
from comir_hpc.runs.record import brief
from comir_hpc.space.grid import Vector
from comir_hpc.space.groups import rotation_group
from comir_hpc.volumes.volume import Volume

# Levels are a factor of two apart, so with cubic voxels one of two neighbours is always within a factor of 1.42.
_LEVEL_TOLERANCE = 1.5


def nearest_level(volume: Volume, spacing_mm: Vector) -> int:
    """Find the pyramid level whose spacing is nearest to the one that a network was trained at.

    Parameters
    ----------
    volume : Volume
        Volume with its pyramid.
    spacing_mm : three float
        Voxel spacing (z, y, x) in mm that the network was trained at.

    Raises
    ------
    VolumeError
        If no level is within a factor of 1.5 along every axis: the network has never seen structures of that size. The
        thickness of a single slice does not count.
    """
    wanted, axes = np.asarray(spacing_mm), list(volume.grid.axes)
    ratios = [
        (np.asarray(volume.level_grid(level).spacing_mm) / wanted)[axes] for level in range(volume.num_levels)
    ]
    # Ratios are compared by their logarithm, for which twice as coarse and twice as fine are equally far.
    distances = [float(np.abs(np.log(ratio)).max()) for ratio in ratios]
    best = int(np.argmin(distances))
    if distances[best] > np.log(_LEVEL_TOLERANCE):
        offered = ", ".join(_in_mm(volume.level_grid(level).spacing_mm) for level in range(volume.num_levels))
        raise VolumeError(
            f"{volume.path} has voxels of {offered} mm (z, y, x, its pyramid), the model was trained at "
            f"{_in_mm(spacing_mm)} mm; expected a factor of at most {_LEVEL_TOLERANCE} between them: resample the "
            "volume, or train at its spacing"
        )
    return best


def _in_mm(spacing: Vector) -> str:
    return " x ".join(f"{s:.4g}" for s in spacing)


def load_encoder(
    run: Path,
    modality: str | None,
    *,
    device: str = "auto",
    precision: Precision = "auto",
    symmetrise: Symmetry = "none",
) -> Encoder:
    """Load one modality's encoder from the folder of a finished training run.

    Parameters
    ----------
    run : Path
        Folder of the run, which holds ``model.json`` and ``model/MODALITY.pt``.
    modality : str or None
        Name of the modality in the run. An encoder that is shared by all modalities serves any name, and None.
    device : {"auto", "cpu", "cuda"}
        Where the encoder will run.
    precision : {"auto", "fp32", "bf16", "fp16"}
        Type of its arithmetic; ``auto`` is bf16 where the device has fast instructions for it.
    symmetrise : str
        Name of the group to average over, or ``none``.

    Raises
    ------
    CheckpointError
        If the run is missing or unfinished, has no such modality, or its weights are damaged or of another
        architecture.
    ConfigError
        If the network cannot be turned by `symmetrise`.
    """
    model = read_model(run)
    name = _encoder_name(run, model, modality)
    chosen = choose_device(device)
    if chosen.type == "cpu":
        keep_freed_memory()
    path = weights_path(run, name)
    # Before the network is built: a damaged description must not cost more memory than the weights have.
    state = _read_weights(path)
    _require_as_many_weights(model, name, state, path)
    network = _build(run, model, name)
    _take_weights(network, state, path, model.network.name)
    # Before the network moves to its device: the folded filters are then computed in fp32 on the CPU, on every machine.
    fold_norms(network)
    group = None if symmetrise == "none" else rotation_group(symmetrise)
    if group is not None:
        network.require_group(group)
    return Encoder(
        network=network.eval().to(chosen),
        run=run,
        modality=name,
        step=model.step,
        spacing_mm=model.spacing_mm,
        group=model.group,
        # Of the file and not of the run: a run that is trained on writes other weights to the same place.
        digest=hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        device=chosen,
        precision=choose_precision(precision, chosen),
        symmetry=group,
        reference=model.reference.as_dict(),
    )


def _encoder_name(run: Path, model: Model, modality: str | None) -> str:
    """Return the name of the encoder that serves a modality."""
    name = model.encoder_name(modality)
    if name is None:
        raise CheckpointError(
            f"{run} has encoders of {', '.join(model.modalities)}; "
            + ("no modality is given" if modality is None else f"there is none of {modality!r}")
            + ": give one of them as the modality"
        )
    return name


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; run the same `comir-hpc train` again")
    try:
        state = read_tensors(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; run the same `comir-hpc train` again") from error
    if not (isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())):
        raise CheckpointError(
            f"{path} holds no table of weights; run the same `comir-hpc train` again to write it"
        )
    return state


def _require_as_many_weights(model: Model, modality: str, state: dict[str, Tensor], path: Path) -> None:
    """Refuse a description that needs far more memory than the weights that belong to it, before it is allocated.

    In every network of ours, a convolution between two levels has at least as many weights as the product of their
    channels. So the number computed here is a lower bound, and no description that fits is refused.
    """
    channels = [model.in_channels.get(modality, 1), *(model.options.widths or (1,))]
    given = model.options.convs_per_level
    convs = given if isinstance(given, tuple) else (given,)
    fewest = sum(one * two for one, two in pairwise(channels)) + channels[1] * model.latent_channels
    for level, width in enumerate(channels[1:]):
        # The last number counts for all coarser levels. The first convolution of a level is in the sum above.
        fewest += (convs[min(level, len(convs) - 1)] - 1) * width**2
    # The sizes of the storages count, which are in memory. A shape in a damaged file may claim any size.
    there = sum(value.untyped_storage().nbytes() // value.element_size() for value in state.values())
    if fewest > there:
        raise CheckpointError(
            f"{path} holds {there} weights, but the {model.network.name} that {MODEL_FILE} describes has at least "
            f"{brief(str(fewest), 24)} ({', '.join(f'{c}' for c in channels[:6])} channels); the two files belong to "
            "different runs"
        )


def _build(run: Path, model: Model, modality: str) -> Network:
    if modality not in model.in_channels:
        raise CheckpointError(
            f"{run / MODEL_FILE} names no in_channels of {modality!r}; run the same `comir-hpc train` again to write it"
        )
    try:
        return build_network(
            model.network.name,
            in_channels=model.in_channels[modality],
            latent_channels=model.latent_channels,
            **model.options.as_dict(),
        )
    except (ConfigError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{run / MODEL_FILE} describes a network that this version cannot build: {brief(error)}"
        ) from error


def _take_weights(network: Network, state: dict[str, Tensor], path: Path, name: str) -> None:
    expected = network.state_dict()
    missing, surplus = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if missing or surplus or shapes:
        found = [f"{len(missing)} weights are missing ({missing[0]})"] if missing else []
        found += [f"{len(surplus)} are unknown ({surplus[0]})"] if surplus else []
        found += [f"{len(shapes)} have another shape ({shapes[0]})"] if shapes else []
        raise CheckpointError(
            f"{path} is of another architecture than the {name} that model.json describes: {', '.join(found)}; the two "
            "files belong to different runs"
        )
    network.load_state_dict(state)
