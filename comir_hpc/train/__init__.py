"""`comir-hpc train`: train one encoder for each modality on aligned pairs.

The story is in `train` below and in `loop.Loop.train`. `checks` refuses what cannot work before a voxel is read,
`plan` predicts time and memory, and `figures` draws pictures of patches and their representations.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from comir_hpc import __version__
from comir_hpc.config.files import dump
from comir_hpc.config.train import TrainSettings
from comir_hpc.errors import CheckpointError
from comir_hpc.host.launch import choose_device, read_launch
from comir_hpc.host.locks import writer
from comir_hpc.host.memory import keep_freed_memory
from comir_hpc.host.progress import Progress
from comir_hpc.learning.engine import Engine, make_engine
from comir_hpc.learning.mixed import MixedSampler
from comir_hpc.learning.patches import PatchSampler
from comir_hpc.learning.sampler import Sampler
from comir_hpc.learning.specimens import prepare_specimens
from comir_hpc.learning.synthetic.sampler import MadeSampler
from comir_hpc.representations.reference import reference_metrics
from comir_hpc.runs.checkpoints import checkpoint_path, read_newest, read_tensors, unwritable, write_file
from comir_hpc.runs.html import table
from comir_hpc.runs.model import MODEL_FILE, WEIGHTS_FOLDER, Model, read_model, weights_path, write_model
from comir_hpc.runs.record import is_newer, make_record
from comir_hpc.runs.tracking import NullTracker, Tracker, open_tracker
from comir_hpc.train.checks import (
    Inputs,
    build_networks,
    check_settings,
    claim_run,
    encoder_options,
    inspect_inputs,
    require_same_model,
    world_notes,
)
from comir_hpc.train.loop import Loop
from comir_hpc.train.plan import choose_recomputed_levels, plan_training, predict
from comir_hpc.train.start import GENERAL, open_start, take_weights

__all__ = ["TrainResult", "plan_training", "train"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a training run left in its folder.

    `reference` says what the encoders can do on clean patches of the training. A run that was finished before is not
    trained again, and gives the same.

    Attributes
    ----------
    run : Path
        Folder of the run.
    steps : int
        Number of optimiser steps that are done.
    loss : float
        Loss of the last step that was logged.
    reference : dict
        Numbers that were measured on the training volumes (`reference.reference_metrics`).
    seconds : float
        Time that this call took, in seconds.
    notes : tuple of str
        What the user should know, e.g. that a damaged checkpoint was passed over.
    """

    run: Path
    steps: int
    loss: float
    reference: dict[str, Any]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line for the user: steps, loss, agreement and time."""
        agreement = self.reference.get("agreement")
        done = f"{self.run}: {self.steps} steps, loss {self.loss:.4f}"
        done += "" if agreement is None else f", agreement {agreement:.3f}"
        return "; ".join([f"{done}, {self.seconds:.0f} s", *self.notes])

    def _repr_html_(self) -> str:
        """Show steps, loss and figures in a notebook."""
        figures = {name: f"{value:.3g}" for name, value in self.reference.items() if isinstance(value, float)}
        rows = {"steps": self.steps, "loss": f"{self.loss:.4f}", **figures, "seconds": f"{self.seconds:.1f}"}
        return table("Training", {**rows, "notes": "; ".join(self.notes), "run": self.run})


def train(settings: TrainSettings, run: Path, *, progress: Progress | None = None) -> TrainResult:
    """Train the encoders, or continue where the run in `run` was stopped (collective: every rank calls it).

    Parameters
    ----------
    settings : TrainSettings
        Everything that defines the training.
    run : Path
        Folder of the run: config.yaml, metrics.jsonl, checkpoints/, pictures/, and at the end model/ and model.json.
    progress : callable, optional
        Function that is called as ``progress(what, done, total)`` while the work goes on.

    Raises
    ------
    ConfigError, VolumeError
        If settings and volumes cannot work together. Nothing is written before.
    CheckpointError
        If no checkpoint can be read, or one cannot be written.
    HeldError
        If another training is at work in that folder.
    StopRequested
        After a checkpoint is saved, if SIGTERM or SIGUSR2 came. The same call continues the run.
    """
    start = time.perf_counter()
    settings = _with_absolute_paths(settings)
    check_settings(settings)
    launch = read_launch(os.environ)
    if choose_device(settings.engine.device, launch).type == "cpu":
        keep_freed_memory()  # before anything starts a thread, which would get a heap of its own
    if not run.exists():
        _require_trainable(settings)  # the lock makes the folder
    # All ranks of a job are one writer, and the first of them holds the lock. If it is refused, that rank ends with an
    # error, and the launcher then ends the others. A finished run needs no lock, since nothing is written.
    needed = launch.rank == 0 and not _is_finished(settings, run)
    with writer(run, run, "comir-hpc train") if needed else nullcontext():
        return _train(settings, run, progress, start)


def _require_trainable(settings: TrainSettings) -> None:
    inputs = inspect_inputs(settings)
    build_networks(choose_recomputed_levels(settings, inputs), inputs)
    open_start(settings)


def _is_finished(settings: TrainSettings, run: Path) -> bool:
    try:
        model = _read_model(settings, run, False, [])
    except CheckpointError:
        return False  # damaged: it may have to be written again
    return model is not None and model.step == settings.optimiser.steps


def _train(settings: TrainSettings, run: Path, progress: Progress | None, start: float) -> TrainResult:
    """Train while nobody else writes into the folder of the run."""
    found = read_newest(run / "checkpoints")
    state, path, notes = found or (None, None, [])
    model = _read_model(settings, run, state is not None, notes)
    done = max((state["loop"]["step"] if state else 0, model.step if model else 0))
    claim_run(settings, run, done)
    if model and model.step == settings.optimiser.steps:
        return _result(run, model, start, notes)
    inputs = inspect_inputs(settings)
    notes.extend(world_notes(inputs.volumes))
    for note in notes:
        _log.warning("%s", note)
    chosen = choose_recomputed_levels(settings, inputs)
    description = _describe(chosen, inputs)
    if state and path:
        require_same_model(state["loop"]["model"], description, path)
    networks = build_networks(chosen, inputs)
    started = take_weights(settings, networks)
    sampler = make_sampler(settings, inputs)
    engine = make_engine(settings.engine, networks, settings.optimiser)
    try:
        tracker = _open_tracker(settings, run, engine, state["loop"]["step"] if state else 0)
        cost = predict(chosen, networks, engine.precision, engine.world_size)
        loop = Loop(chosen, run, engine, sampler, tracker, {"model": description}, cost, progress)
        if state:
            engine.load_state(state["engine"])
            loop.restore(state["loop"])
        try:
            loop.train()
        # Whatever ends the loop, MLflow has to hear of it, or its page shows a run that never ends.
        except BaseException as error:
            tracker.finish(
                "stopped" if isinstance(error, (InterruptedError, KeyboardInterrupt)) else "failed"
            )
            raise
        model = _hand_over(settings, run, loop, description | {"started_from": started}, inputs)
        tracker.artifact(run / MODEL_FILE)
        tracker.artifact(run / WEIGHTS_FOLDER)
        tracker.checkpoint(checkpoint_path(run / "checkpoints", settings.optimiser.steps))
        tracker.finish()
    finally:
        engine.close()
    return _result(run, model, start, notes)


def make_sampler(settings: TrainSettings, inputs: Inputs) -> Sampler:
    """Make what gives the patches: real ones, made-up ones, or both.

    Raises
    ------
    ConfigError, VolumeError
        If a volume holds no specimen, or no patch of it holds enough.
    """
    made = real = None
    if settings.synthetic is not None:
        views = len(settings.modalities)
        made = MadeSampler(settings.synthetic, settings.sampling, inputs.group, views, settings.seed)
    if inputs.volumes:
        specimens = prepare_specimens(inputs.volumes, settings.sampling)
        real = PatchSampler(specimens, settings.sampling, inputs.group, settings.seed)
    if real is not None and made is not None:
        assert settings.synthetic is not None
        return MixedSampler(real, made, settings.synthetic.share)
    sampler = real or made
    assert sampler is not None  # TrainSettings asks for one of them
    return sampler


def _with_absolute_paths(settings: TrainSettings) -> TrainSettings:
    """Return settings whose config.yaml means the same from any folder."""
    pairs = tuple({name: path.absolute() for name, path in pair.items()} for pair in settings.pairs)
    start = settings.start_from
    if start not in (None, GENERAL):
        start = str(Path(start).absolute())
    return settings.model_copy(update={"pairs": pairs, "start_from": start})


def _describe(settings: TrainSettings, inputs: Inputs) -> dict[str, Any]:
    """Collect everything that is needed to make the encoders from their weights, ready for JSON."""
    return {
        "modalities": list(inputs.in_channels),
        "shared": settings.network.shared,
        # Made-up pairs alone show voxels of many sizes; with a real pair, its spacing is what the encoder is for.
        "scale_free": not settings.pairs,
        "network": settings.network.model_dump(mode="json"),
        "options": encoder_options(settings, inputs),
        "in_channels": inputs.in_channels,
        "latent_channels": settings.network.latent_channels,
        "spacing_mm": list(inputs.grid.spacing_mm),
        "group": inputs.group.name,
        "patch": list(settings.sampling.patch),
    }


def _open_tracker(settings: TrainSettings, run: Path, engine: Engine, step: int) -> Tracker | NullTracker:
    """Write the settings, and open the record of the run, on the first rank."""
    if engine.rank:
        return NullTracker()
    write_file(run / "config.yaml", dump(settings).encode())
    params = settings.model_dump(mode="json")
    tracker = open_tracker(settings.tracking, run, params, resume_step=step)
    tracker.artifact(run / "config.yaml")
    return tracker


def _hand_over(
    settings: TrainSettings,
    run: Path,
    loop: Loop,
    description: dict[str, Any],
    inputs: Inputs,
) -> Model:
    """Measure the model and write it; model.json comes last, because it stands for all of it."""
    engine = loop.engine
    model: Model | None = None
    if engine.rank == 0:
        metrics = reference_metrics(loop.encode, loop.sampler.clean(), settings.modalities, engine.device)
        weights = {name: _weights(network) for name, network in loop.average.items()}
        for name, content in weights.items():
            write_file(weights_path(run, name), content)
        model = make_record(
            Model,
            {
                "version": __version__,
                **description,
                "precision": engine.precision,
                "step": engine.steps_done,
                "loss": loop.last_loss,
                "seed": settings.seed,
                "inputs": {str(v.path): v.fingerprint() for pair in inputs.volumes for v in pair},
                "weights": {name: hashlib.sha256(content).hexdigest() for name, content in weights.items()},
                "reference": metrics,
            },
        )
        try:
            write_model(run, model)
        except OSError as error:
            raise unwritable(run / MODEL_FILE, error) from error
    engine.any(False)  # the others wait here
    return model or read_model(run)


def _weights(network: nn.Module) -> bytes:
    """Make the file with a network's weights for torch.load: fp32, on the CPU, in plain layout."""
    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _read_model(settings: TrainSettings, run: Path, resumable: bool, notes: list[str]) -> Model | None:
    """Return the model of a run that was finished, with that many steps or fewer.

    Parameters
    ----------
    resumable : bool
        Whether there is a checkpoint from which a damaged model can be made again.
    notes : list of str
        Gets a line if it will be.

    Raises
    ------
    CheckpointError
        If it is of a newer format, or damaged where nothing else is left of the training.
    """
    if not (run / MODEL_FILE).is_file():
        return None
    try:
        model = read_model(run)
        if not all(weights_path(run, name).is_file() for name in model.modalities):
            return None
        # Read as a whole: a file that was cut short has the right name, too.
        for name in model.modalities:
            read_tensors(weights_path(run, name))
    except CheckpointError as error:
        if not resumable or is_newer(run / MODEL_FILE):
            raise
        notes.append(f"{error}; it is made again from the last checkpoint")
        return None
    return model


def _result(run: Path, model: Model, start: float, notes: list[str]) -> TrainResult:
    seconds = time.perf_counter() - start
    loss = float("nan") if model.loss is None else model.loss
    return TrainResult(run, model.step, loss, model.reference.as_dict(), seconds, tuple(notes))
