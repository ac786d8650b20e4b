"""Predict what a run will take, from shapes: for `--dry-run`, for choosing what to recompute, and for the log."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from comir_hpc.config.train import TrainSettings
from comir_hpc.errors import ConfigError
from comir_hpc.host.launch import DTYPES, choose_device, choose_precision, read_launch
from comir_hpc.host.memory import available_bytes, in_words, peak_bytes
from comir_hpc.learning.engine import make_engine
from comir_hpc.learning.views import View
from comir_hpc.networks import Network, StepCost, count_parameters, predict_encoding, predict_step
from comir_hpc.representations.reference import NUM_PATCHES
from comir_hpc.train.checks import Inputs, build_networks, check_settings, inspect_inputs, world_notes
from comir_hpc.train.start import open_start

# Share of free memory that a step may take: the rest is for workspaces of libraries and gaps between allocations.
_USABLE = 0.8

_LIBRARY_BYTES = (
    235 << 20
)  # measured: 220 MiB for MLflow, matplotlib and what they need, loaded after the plan is made
_ENCODED = (
    3.2  # memory of a batch that is encoded, over that of its tensors between layers; measured 2.4 to 2.75
)

# Dense bf16 peak of a GPU, TFLOP/s, by a part of its name (NVIDIA data sheets).
_PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "GH200": 989.0}


@dataclass(frozen=True)
class Prediction:
    """What one optimiser step of one process will take.

    Attributes
    ----------
    activation_bytes : int
        Peak memory of a micro-batch in bytes: what it keeps for the backward pass, and temporary tensors.
    state_bytes : int
        Bytes of the weights, their average, the gradients and AdamW's two moments, all in fp32.
    flops : float
        Floating-point operations of all convolutions.
    """

    activation_bytes: int
    state_bytes: int
    flops: float

    @property
    def total_bytes(self) -> int:
        """Bytes that the step needs on the device."""
        return self.activation_bytes + self.state_bytes


def predict(settings: TrainSettings, networks: nn.ModuleDict, precision: str, world_size: int) -> Prediction:
    """Predict memory and arithmetic of a step from shapes alone; nothing is computed."""
    parts = settings.engine.accumulation
    local = settings.sampling.pairs_per_step // (world_size * parts)
    known: dict[int, StepCost] = {}  # encoders differ in the channels of their images only
    costs = []
    # One encoder for all modalities encodes the patches of all of them at once.
    local *= len(settings.modalities) // len(networks)
    for network in networks.values():
        assert isinstance(network, Network)
        if network.in_channels not in known:
            cost = predict_step(network, settings.sampling.patch, local, DTYPES[precision])
            known[network.in_channels] = cost
        costs.append(known[network.in_channels])
    # All networks run forward before any runs backward. So one of them adds its peak, the others only what they keep.
    kept = sum(cost.kept_bytes for cost in costs)
    peak = max(kept - cost.kept_bytes + cost.peak_bytes for cost in costs)
    # With several micro-batches, each is encoded once more without gradient, so that the loss sees all negatives. A
    # forward pass is a third of a step.
    flops = sum(cost.flops for cost in costs) * parts * (4 / 3 if parts > 1 else 1)
    weights = sum(count_parameters(network) for network in networks.values())
    # Four bytes each for weight, average, gradient and two moments.
    return Prediction(peak, 4 * weights * 5, flops)


def choose_recomputed_levels(settings: TrainSettings, inputs: Inputs) -> TrainSettings:
    """Replace `checkpoint_levels: auto` by the smallest number of levels with which a step fits into free memory.

    Raises
    ------
    ConfigError
        If it does not fit, even with all levels recomputed.
    """
    if settings.network.checkpoint_levels != "auto":
        return settings
    launch = read_launch(os.environ)
    device = choose_device(settings.engine.device, launch)
    precision = choose_precision(settings.engine.precision, device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    needed = []
    # Fewest first: what is recomputed costs another forward pass.
    for levels in range(len(settings.network.widths) + 1):
        network = settings.network.model_copy(update={"checkpoint_levels": levels})
        chosen = settings.model_copy(update={"network": network})
        cost = predict(chosen, build_networks(chosen, inputs), precision, launch.world_size)
        if cost.total_bytes <= _USABLE * free:
            return chosen
        needed.append(in_words(cost.total_bytes))
    raise ConfigError(
        f"a step with patches of {settings.sampling.patch} voxels needs {needed[0]}, {needed[-1]} with all levels "
        f"recomputed, and {in_words(free)} are free on {device}; raise engine.accumulation (now "
        f"{settings.engine.accumulation}), or use a smaller sampling.patch or fewer network.widths"
    )


def peak_tflops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of a GPU that we know, in TFLOP/s, otherwise None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_TFLOPS.items() if part in name), None)


def plan_training(settings: TrainSettings) -> dict[str, Any]:
    """Predict samples, memory and time of a training. No voxel is read, and nothing is written.

    The time is measured: the second of two steps on noise, with the networks as they will be trained. The time for
    reading is not in it.

    Raises
    ------
    ConfigError, VolumeError
        If settings and volumes cannot work together, as in `train`.
    """
    check_settings(settings)
    open_start(settings)
    inputs = inspect_inputs(settings)
    settings = choose_recomputed_levels(settings, inputs)
    networks = build_networks(settings, inputs)
    launch = read_launch(os.environ)
    device = choose_device(settings.engine.device, launch)
    precision = choose_precision(settings.engine.precision, device)
    sampling, steps = settings.sampling, settings.optimiser.steps
    cost = predict(settings, networks, precision, launch.world_size)
    local = sampling.pairs_per_step // (launch.world_size * settings.engine.accumulation)
    seconds = _time_step(settings, networks, inputs.in_channels, local) * settings.engine.accumulation
    weights = sum(count_parameters(network) for network in networks.values())
    volumes = _volume_bytes(inputs, sampling.level)
    cached = volumes <= sampling.cache_mib * 2**20
    process = cost.total_bytes
    if device.type == "cpu":
        encoding = _reference_bytes(settings, networks, precision)
        process = process_bytes(cost, volumes if cached else 0, encoding)
    notes = list(world_notes(inputs.volumes))
    return {
        **({"notes": notes} if notes else {}),
        "pairs": f"{len(settings.pairs)} of {' and '.join(settings.modalities)}, {inputs.grid}",
        "samples": f"{steps} steps of {sampling.pairs_per_step} pairs of {sampling.patch} voxels (z, y, x)",
        "group": f"{inputs.group.name} ({len(inputs.group)} rotations)",
        "processes": f"{launch.world_size} on {device.type}, {precision}, engine {settings.engine.name}",
        "parameters": f"{weights:,} in {len(networks)} networks",
        "memory": f"{in_words(process)} a process on {device.type}: activations "
        f"{in_words(cost.activation_bytes)} ({settings.network.checkpoint_levels} levels recomputed), "
        f"weights and optimiser {in_words(cost.state_bytes)}",
        "volumes": f"{in_words(volumes)}, {'held in memory' if cached else 'read box by box'}",
        "disk": f"{in_words((settings.checkpoint.keep + 1) * 4 * weights * 4)} of checkpoints",
        "time": f"{seconds:.2f} s a step, {seconds * steps / 60:.1f} min in all (two steps timed here)",
        "arithmetic": f"{cost.flops / 1e9:.0f} GFLOP a step and process, {cost.flops / seconds / 1e12:.2f} TFLOP/s",
    }


def process_bytes(cost: Prediction, volumes: int, encoding: int) -> int:
    """Memory of a training process on CPUs, two steps having been tried in this one.

    Parameters
    ----------
    cost : Prediction
        Memory and arithmetic of one optimiser step.
    volumes : int
        Bytes of the volumes that are held.
    encoding : int
        Bytes that are taken for the figures at the end.
    """
    # What steps held is kept by the C library (memory.keep_freed_memory), and the pieces are too small for the figures.
    return peak_bytes() + _LIBRARY_BYTES + volumes + cost.state_bytes + encoding


def _reference_bytes(settings: TrainSettings, networks: nn.ModuleDict, precision: str) -> int:
    """Memory for the patches of the figures at the end, which are encoded in one batch."""
    tensors = 0
    for network in networks.values():
        assert isinstance(network, Network)
        network.eval()
        tensors = max(tensors, predict_encoding(network, settings.sampling.patch, DTYPES[precision]))
    return math.ceil(_ENCODED * NUM_PATCHES * tensors)


def _volume_bytes(inputs: Inputs, level: int) -> int:
    views = [View.of(volume, pair[0], level) for pair in inputs.volumes for volume in pair]
    return sum(view.num_bytes for view in views)


def _time_step(
    settings: TrainSettings, networks: nn.ModuleDict, in_channels: Mapping[str, int], local: int
) -> float:
    """Measure the seconds of a step of one micro-batch on this process; the first of two steps does not count."""
    engine = make_engine(settings.engine.model_copy(update={"name": "torch"}), networks, settings.optimiser)
    shape = settings.sampling.patch
    images = [torch.randn(local, count, *shape, device=engine.device) for count in in_channels.values()]
    start = 0.0
    for _ in range(2):
        start = time.perf_counter()
        engine.step(torch.stack([m.square().mean() for m in engine.encode(images)]).sum())
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    engine.close()
    return seconds
