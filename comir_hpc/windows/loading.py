"""An encoder from the folder of a training run, and the pyramid level that it can read."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comir_hpc.config import Precision
from comir_hpc.config.words import Symmetry as Symmetry
from comir_hpc.errors import CheckpointError, ConfigError, VolumeError
from comir_hpc.geometry import Vector
from comir_hpc.launch import choose_device, choose_precision
from comir_hpc.memory import keep_freed_memory
from comir_hpc.networks import Network, build_network, fold_norms
from comir_hpc.rotations import rotation_group
from comir_hpc.volume import Volume
from comir_hpc.windows.encoder import Encoder

_LEVEL_TOLERANCE = 1.5


def nearest_level(volume: Volume, spacing_mm: Vector) -> int:
    """Pyramid level whose spacing is nearest to the one that a network was trained at.

    Raises
    ------
    VolumeError
        If none is within a factor of 1.5 along every axis: the network has never seen structures of that size. The
        thickness of a single slice does not count.
    """
    wanted, axes = np.asarray(spacing_mm), list(volume.grid.axes)
    ratios = [
        (np.asarray(volume.level_grid(level).spacing_mm) / wanted)[axes] for level in range(volume.num_levels)
    ]
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
    modality: str,
    *,
    device: str = "auto",
    precision: Precision = "auto",
    symmetrise: Symmetry = "none",
) -> Encoder:
    """Load one modality's encoder from the folder of a finished training run.

    Parameters
    ----------
    run : Path
        Holds ``model.json`` and ``model/MODALITY.pt``.
    device : {"auto", "cpu", "cuda"}
        Where it will run.
    precision : {"auto", "fp32", "bf16", "fp16"}
        Of its arithmetic; auto is bf16 where the device multiplies it fast.
    symmetrise : str
        Group to average over; "none" does not.

    Raises
    ------
    CheckpointError
        If the run is missing or unfinished, has no such modality, or its weights are damaged or of another
        architecture.
    ConfigError
        If the network cannot be turned by `symmetrise`.
    """
    record = _read_model(run)
    if modality not in record["modalities"]:
        raise CheckpointError(
            f"{run} has encoders of {', '.join(record['modalities'])}; there is none of {modality!r}: give one of them "
            "as the modality"
        )
    chosen = choose_device(device)
    if chosen.type == "cpu":
        keep_freed_memory()
    network = _build(run, record, modality)
    path = run / "model" / f"{modality}.pt"
    _load_weights(network, path, record["network"]["name"])
    fold_norms(network)
    group = None if symmetrise == "none" else rotation_group(symmetrise)
    if group is not None:
        network.require_group(group)
    z, y, x = record["spacing_mm"]
    return Encoder(
        network=network.eval().to(chosen),
        run=run,
        modality=modality,
        step=int(record["step"]),
        spacing_mm=(float(z), float(y), float(x)),
        group=str(record["group"]),
        digest=hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        device=chosen,
        precision=choose_precision(precision, chosen),
        symmetry=group,
        reference=dict(record.get("reference") or {}),
    )


def _read_model(run: Path) -> dict[str, Any]:
    path = run / "model.json"
    if not path.is_file():
        saved = sorted((run / "checkpoints").glob("step-*"))
        found = (
            f"is unfinished (its newest checkpoint is {saved[-1].name}): run the same `comir-hpc train` again"
            if saved
            else "is no run folder: expected one that `comir-hpc train ... --run DIR` has finished"
        )
        raise CheckpointError(
            f"{run} has no model.json and {found}" if run.exists() else f"{run} does not exist; it {found}"
        )
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key in (
            "modalities",
            "network",
            "options",
            "in_channels",
            "latent_channels",
            "spacing_mm",
            "group",
            "step",
        ):
            record[key]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged or of another version ({error!r}); run `comir-hpc train` again to write it"
        ) from error
    return record


def _build(run: Path, record: dict[str, Any], modality: str) -> Network:
    try:
        return build_network(
            record["network"]["name"],
            in_channels=int(record["in_channels"][modality]),
            latent_channels=int(record["latent_channels"]),
            **record["options"],
        )
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{run / 'model.json'} describes a network that this version cannot build: {error}"
        ) from error


def _load_weights(network: Network, path: Path, name: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; run the same `comir-hpc train` again")
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); run the same `comir-hpc train` again") from error
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
