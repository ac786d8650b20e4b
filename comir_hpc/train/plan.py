"""`comir-hpc train --dry-run`: what a run will take, predicted from shapes and two timed steps."""

from __future__ import annotations

import math
import os
import time
from typing import Any

import torch

from comir_hpc.config import TrainSettings
from comir_hpc.engine import make_engine
from comir_hpc.launch import DTYPES, choose_device, choose_precision, read_launch
from comir_hpc.memory import in_words
from comir_hpc.networks import Network, count_parameters, estimate_activation_bytes
from comir_hpc.train.checks import build_networks, check_settings, inspect_inputs


def plan_training(settings: TrainSettings) -> dict[str, Any]:
    """Predict samples, memory and time; reads no voxel and writes nothing.

    Time is that of two steps on noise with the networks as they will be trained, so it leaves out reading.

    Raises
    ------
    ConfigError, VolumeError
        As `train` would.
    """
    check_settings(settings)
    inputs = inspect_inputs(settings)
    networks = build_networks(settings, inputs)
    launch = read_launch(os.environ)
    device = choose_device(settings.engine.device, launch)
    precision = choose_precision(settings.engine.precision, device)
    sampling, steps = settings.sampling, settings.optimiser.steps
    local = sampling.pairs_per_step // (launch.world_size * settings.engine.accumulation)
    weights = sum(count_parameters(network) for network in networks.values())
    first = next(iter(networks.values()))
    assert isinstance(first, Network)
    activations = estimate_activation_bytes(
        first, sampling.patch, local, DTYPES[precision], num_networks=len(networks)
    )
    # Weights, their average, gradients and AdamW's two moments, fp32.
    state = 4 * weights * 5
    voxels = math.prod(inputs.grid.shape_zyx)
    volumes = sum(v.num_channels * v.dtype.itemsize * voxels for pair in inputs.volumes for v in pair)
    cached = volumes <= sampling.cache_mib * 2**20
    seconds = _time_step(settings, networks, inputs.in_channels, local) * settings.engine.accumulation
    return {
        "pairs": f"{len(settings.pairs)} of {' and '.join(settings.modalities)}, {inputs.grid}",
        "samples": f"{steps} steps of {sampling.pairs_per_step} pairs of {sampling.patch} voxels (z, y, x)",
        "group": f"{inputs.group.name} ({len(inputs.group)} rotations)",
        "processes": f"{launch.world_size} on {device.type}, {precision}, {settings.engine.name}",
        "parameters": f"{weights:,} in {len(networks)} networks",
        "memory": f"{in_words(activations + state)} a process on {device.type}: activations {in_words(activations)}, "
        f"weights and optimiser {in_words(state)}",
        "volumes": f"{in_words(volumes)}, {'held in memory' if cached else 'read box by box'}",
        "disk": f"{in_words((settings.checkpoint.keep + 1) * 4 * weights * 4)} of checkpoints",
        "time": f"{seconds:.2f} s a step, {seconds * steps / 60:.1f} min in all (two steps timed here)",
    }


def _time_step(
    settings: TrainSettings, networks: torch.nn.ModuleDict, in_channels: dict[str, int], local: int
) -> float:
    """Seconds of a step of one micro-batch on this process, the first of two left out."""
    engine = make_engine(settings.engine.model_copy(update={"name": "torch"}), networks, settings.optimiser)
    shape = settings.sampling.patch
    images = [torch.randn(local, count, *shape, device=engine.device) for count in in_channels.values()]
    start = 0.0
    for _ in range(2):
        start = time.perf_counter()
        engine.step(
            sum((m.square().mean() for m in engine.encode(images)), torch.zeros((), device=engine.device))
        )
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    engine.close()
    return seconds
