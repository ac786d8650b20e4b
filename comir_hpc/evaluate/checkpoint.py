"""Open what is measured: the encoders of a run at one checkpoint, and one specimen that all modalities saw."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from comir_hpc import __version__
from comir_hpc.config.evaluate import EvaluateSettings
from comir_hpc.config.files import load
from comir_hpc.config.train import TrainSettings
from comir_hpc.errors import CheckpointError, ConfigError, VolumeError
from comir_hpc.representations.encoding.encoder import Encoder
from comir_hpc.representations.encoding.loading import load_encoder, nearest_level
from comir_hpc.runs.checkpoints import (
    checkpoint_path,
    list_checkpoints,
    read_checkpoint,
    unwritable,
    write_file,
)
from comir_hpc.runs.model import MODEL_FILE, Model, read_model, weights_path, write_model
from comir_hpc.runs.record import make_record
from comir_hpc.space.groups import Group, group_for_spacing, rotation_group
from comir_hpc.volumes.volume import Volume


@dataclass(frozen=True, eq=False)
class Subject:
    """Encoders and volumes, opened and checked; nothing is encoded yet.

    Attributes
    ----------
    run : Path
        The training run.
    model : Path
        Folder that `load_encoder` and `register` take: the run itself, or the folder of a checkpoint.
    out : Path
        Folder to which the results go.
    settings : TrainSettings
        Settings of the training run.
    step : int
        Number of optimiser steps that the encoders were trained for.
    encoders : dict
        Encoders by modality, in the run's order.
    volumes : dict
        Aligned volumes by modality, on one grid.
    level : int
        Level of the volumes' pyramids that is encoded.
    group : Group
        Rotations that are measured: all that the grid and the networks allow.
    trained_group : Group
        Rotations that were undone in training.
    own : bool
        Whether the volumes are those that the run was trained on.
    """

    run: Path
    model: Path
    out: Path
    settings: TrainSettings
    step: int
    encoders: dict[str, Encoder]
    volumes: dict[str, Volume]
    level: int
    group: Group
    trained_group: Group
    own: bool


def open_subject(settings: EvaluateSettings, *, folder: Path | None = None) -> Subject:
    """Open a run at a checkpoint, with the aligned volumes that it is measured on.

    A checkpoint that is not the finished model gets a folder of its own in the run. It holds model.json and weights, so
    that it can be used like a run.

    Parameters
    ----------
    settings : EvaluateSettings
        The run, the checkpoint, and the volumes if they are not the run's own.
    folder : Path, optional
        Place of the checkpoint's folder, if it shall not be in the run.

    Raises
    ------
    CheckpointError
        If the run or the checkpoint is missing or damaged.
    ConfigError
        If there is not exactly one volume for each modality.
    VolumeError
        If a volume cannot be read, or they do not lie on one grid.
    """
    run = settings.model.absolute()
    train = _train_settings(run)
    place = run / "diagnostics" if folder is None else folder
    model, step = _model_folder(run, settings.checkpoint, place)
    encoders = {
        name: load_encoder(model, name, device=settings.device, precision=settings.precision)
        for name in train.modalities
    }
    volumes = _open_volumes(run, settings, train)
    first = next(iter(encoders.values()))
    for name, encoder in encoders.items():
        encoder.require_fitting(volumes[name])
    trained = rotation_group(first.group)
    return Subject(
        run=run,
        model=model,
        out=settings.out or run / "diagnostics" / f"step-{step:08d}",
        settings=train,
        step=step,
        encoders=encoders,
        volumes=volumes,
        level=nearest_level(next(iter(volumes.values())), first.spacing_mm),
        group=_widest(first, trained, planar=train.sampling.patch[0] == 1),
        trained_group=trained,
        own=not settings.volumes,
    )


def _train_settings(run: Path) -> TrainSettings:
    path = run / "config.yaml"
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist; expected the folder of a run, which `comir-hpc train` wrote"
        )
    return load(TrainSettings, path)


def _model_folder(run: Path, step: int | None, place: Path) -> tuple[Path, int]:
    """Find the folder to load encoders from, and the step that they were trained for."""
    finished = _finished_step(run)
    if step is None and finished is None:
        # The newest comes first. Its name is step-00000300: the number begins at the sixth letter.
        newest = next(iter(list_checkpoints(run / "checkpoints")), None)
        remedy = f"give --checkpoint {int(newest.name[5:])}" if newest else "it has no checkpoint either"
        raise CheckpointError(f"{run} has no model.json: the training has not ended; {remedy}")
    # The finished model is in the run itself, so that no copy of it has to be written.
    if finished is not None and step in (None, finished):
        return run, finished
    assert step is not None
    return _write_model(run, step, place), step


def _finished_step(run: Path) -> int | None:
    return read_model(run).step if (run / MODEL_FILE).is_file() else None


def _write_model(run: Path, step: int, place: Path) -> Path:
    """Write the averaged weights of a checkpoint as a folder like a finished run's."""
    path = checkpoint_path(run / "checkpoints", step)
    if not path.is_dir():
        kept = [str(int(p.name[5:])) for p in reversed(list_checkpoints(run / "checkpoints"))]
        offered = f"steps {', '.join(kept)}" if kept else "none"
        raise CheckpointError(
            f"{path} does not exist; kept are {offered} (checkpoint.keep says how many stay), and without "
            "--checkpoint the finished model is measured"
        )
    loop: dict[str, Any] = read_checkpoint(path)["loop"]
    # The averaged weights are written, because they are what the training hands on at its end.
    folder = place / path.name
    for name in loop["model"]["modalities"]:
        # One dictionary holds the averages of all encoders, each name with its modality in front.
        prefix = f"{name}."
        weights = {k.removeprefix(prefix): v for k, v in loop["average"].items() if k.startswith(prefix)}
        write_file(weights_path(folder, name), _as_file(weights))
    # After the weights: a folder that has a model.json is a whole model.
    content = {"version": __version__, **loop["model"], "step": step, "loss": loop["loss"], "run": str(run)}
    try:
        write_model(folder, make_record(Model, content))
    except OSError as error:
        raise unwritable(folder / MODEL_FILE, error) from error
    return folder


def _as_file(weights: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


def _open_volumes(run: Path, settings: EvaluateSettings, train: TrainSettings) -> dict[str, Volume]:
    named = settings.volumes or train.pairs[0]
    if set(named) != set(train.modalities):
        raise ConfigError(
            f"volumes of {sorted(named)} are named, {run} was trained on {sorted(train.modalities)}; give each once "
            "as --volume MODALITY=PATH"
        )
    volumes = {name: Volume.open(named[name]) for name in train.modalities}
    first = next(iter(volumes.values()))
    for volume in volumes.values():
        if not volume.grid.agrees_with(first.grid):
            raise VolumeError(
                f"{volume.path} ({volume.grid}) and {first.path} ({first.grid}) lie on different grids; the model is "
                "measured on aligned volumes: warp one onto the other first"
            )
    return volumes


def _widest(encoder: Encoder, trained: Group, *, planar: bool) -> Group:
    """Choose the largest group that the grid and the network allow, or the training's if that is larger."""
    group = group_for_spacing(encoder.spacing_mm, planar=planar)
    try:
        encoder.network.require_group(group)
    except ConfigError:
        # A network that pools axes differently cannot follow a group that exchanges them: its error would say nothing.
        return trained
    return group if len(group) >= len(trained) else trained
