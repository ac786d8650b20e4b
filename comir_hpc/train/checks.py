"""Refuse what must fail before a voxel is read, and collect what a run needs to know of its volumes."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from comir_hpc.config.base import Settings
from comir_hpc.config.files import dump
from comir_hpc.config.train import TrainSettings
from comir_hpc.errors import CheckpointError, ConfigError, VolumeError
from comir_hpc.host.launch import read_launch
from comir_hpc.learning import loss
from comir_hpc.learning.engine import check_engine
from comir_hpc.networks import Network, build_network, network_options
from comir_hpc.runs.tracking import flatten
from comir_hpc.space.grid import Grid
from comir_hpc.space.groups import Group, group_for_spacing, rotation_group
from comir_hpc.volumes.volume import Volume

# Structures of specimens whose spacing differs by more have different sizes for one network.
_SPACING_TOLERANCE = 0.05
# What may change between the runs of one folder, because the trained weights do not depend on it.
_FREE = re.compile(
    r"tracking\..*|checkpoint\..*|engine\.(name|zero_stage|offload_optimiser|device|timeout_s)"
    r"|sampling\.(cache_mib|workers)|network\.checkpoint_levels"
)


@dataclass(frozen=True)
class Inputs:
    """What the volumes of a run have in common.

    Attributes
    ----------
    volumes : tuple of tuples of Volume
        Volumes of each pair, one for each modality, in the order of the settings.
    grid : Grid
        Grid of the first pair, at the level that patches come from.
    group : Group
        Rotations that the representation follows.
    in_channels : dict
        Number of image channels by modality.
    """

    volumes: tuple[tuple[Volume, ...], ...]
    grid: Grid
    group: Group
    in_channels: dict[str, int]


def check_settings(settings: TrainSettings) -> None:
    """Refuse settings that cannot work on this machine; nothing is read.

    Raises
    ------
    ConfigError
        If settings contradict each other, or do not fit the machine.
    """
    for name in settings.modalities:
        # The name becomes a file of weights, and an attribute of torch's dictionary of modules, whose methods it must
        # not hide.
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or hasattr(nn.ModuleDict(), name):
            raise ConfigError(
                f"modality {name!r} cannot be a file name and a module's name; use letters, digits, - and _"
            )
    loss.check(settings.loss, settings.sampling.pairs_per_step, settings.sampling.patch)
    check_engine(settings.engine, recomputing=settings.network.checkpoint_levels != 0)
    parts = read_launch(os.environ).world_size * settings.engine.accumulation
    pairs = settings.sampling.pairs_per_step
    # Every micro-batch has to be of one size: the mean of the parts is otherwise not the mean of all.
    if pairs % parts:
        near = sorted({max(1, pairs // parts) * parts, (pairs // parts + 1) * parts})
        raise ConfigError(
            f"sampling.pairs_per_step is {pairs}, which cannot be divided evenly among {parts} micro-batches "
            f"(processes times engine.accumulation); use {' or '.join(map(str, near))}"
        )


def inspect_inputs(settings: TrainSettings) -> Inputs:
    """Open the volumes of all pairs and check that they fit together; no voxel is read.

    Raises
    ------
    VolumeError
        If a volume is missing, or the volumes of a pair do not lie in one place.
    ConfigError
        If patch, level or group do not fit the volumes.
    """
    if not settings.pairs:
        grid = Grid(settings.sampling.patch, (1.0, 1.0, 1.0))
        return Inputs((), grid, _choose_group(settings, grid), dict.fromkeys(settings.encoder_names, 1))
    volumes = tuple(tuple(Volume.open(pair[m]) for m in settings.modalities) for pair in settings.pairs)
    for pair in volumes:
        _require_one_world(pair)
        _require_room(pair[0], settings)
    grids = [pair[0].level_grid(settings.sampling.level) for pair in volumes]
    for grid, pair in zip(grids, volumes, strict=True):
        # The spacing along z does not count for single slices, nor for planar patches, which never look along z.
        axes = (1, 2) if settings.sampling.patch[0] == 1 else grid.axes
        ratios = [grid.spacing_mm[axis] / grids[0].spacing_mm[axis] for axis in axes]
        if max(*ratios, *(1 / r for r in ratios)) > 1 + _SPACING_TOLERANCE:
            raise VolumeError(
                f"{pair[0].path} has voxels of {_triple(grid.spacing_mm)} mm, {volumes[0][0].path} of "
                f"{_triple(grids[0].spacing_mm)} mm (z, y, x); one network needs one spacing: resample with "
                "`comir-hpc warp`, or train separately"
            )
    in_channels = {}
    for number, name in enumerate(settings.modalities):
        found = {pair[number].num_channels: pair[number].path for pair in volumes}
        if len(found) > 1:
            listed = ", ".join(f"{path} has {count}" for count, path in found.items())
            raise VolumeError(f"volumes of modality {name} differ in channels: {listed}; use the same ones")
        in_channels[name] = volumes[0][number].num_channels
        for pair in volumes:
            pair[number].intensity()  # refuses a volume without statistics before the work begins
    return Inputs(volumes, grids[0], _choose_group(settings, grids[0]), _by_encoder(settings, in_channels))


def _by_encoder(settings: TrainSettings, in_channels: dict[str, int]) -> dict[str, int]:
    """Give the channels of every encoder; one encoder for all modalities, or made-up pairs, ask for equal ones."""
    one_count = settings.network.shared or settings.synthetic is not None
    listed = ", ".join(f"{name} has {count}" for name, count in in_channels.items())
    if settings.network.shared and len(set(in_channels.values())) > 1:
        raise VolumeError(
            f"modalities differ in channels ({listed}), and network.shared is one encoder for all; set it to false"
        )
    if one_count and settings.synthetic is not None and set(in_channels.values()) != {1}:
        raise VolumeError(f"made-up pairs have one channel, but {listed}; leave `synthetic` out")
    return {
        name: in_channels[name if name in in_channels else settings.modalities[0]]
        for name in settings.encoder_names
    }


def build_networks(settings: TrainSettings, inputs: Inputs) -> nn.ModuleDict:
    """Make one encoder for each modality, with weights that depend on the seed only.

    Raises
    ------
    ConfigError
        If the patch is not a multiple of the network's stride, or the network cannot follow the group.
    """
    options = encoder_options(settings, inputs)
    # The seed acts inside only. So every rank gets the same weights, and random numbers outside are not disturbed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        networks = {
            name: build_network(
                settings.network.name,
                in_channels=inputs.in_channels[name],
                latent_channels=settings.network.latent_channels,
                **options,
            )
            for name in settings.encoder_names
        }
    one: Network = next(iter(networks.values()))
    stride, patch = one.total_stride_zyx, settings.sampling.patch
    if any(side % step for side, step in zip(patch, stride, strict=True)):
        near = tuple(max(step, round(side / step) * step) for side, step in zip(patch, stride, strict=True))
        raise ConfigError(
            f"sampling.patch is {patch} voxels (z, y, x), but network {settings.network.name} with "
            f"{len(settings.network.widths)} levels halves its axes down to 1/{stride}: sides must be multiples of "
            f"that; use {near}, or fewer network.widths"
        )
    one.require_group(inputs.group)
    return nn.ModuleDict(networks)


def encoder_options(settings: TrainSettings, inputs: Inputs) -> dict[str, Any]:
    """Work out the options of `build_network` beside the channels, ready for JSON."""
    return network_options(
        settings.network,
        spacing_zyx=inputs.grid.spacing_mm,
        group=inputs.group.name,
        planar=settings.sampling.patch[0] == 1,
    )


def claim_run(settings: TrainSettings, run: Path, steps_done: int) -> None:
    """Refuse a folder that holds a run with other settings; otherwise it may be written to.

    Parameters
    ----------
    settings : TrainSettings
        Settings of the run that is to start or to continue.
    run : Path
        Folder of the run.
    steps_done : int
        Number of steps that the folder holds. Without any, all settings may change.

    Raises
    ------
    ConfigError
        If a setting has changed that may not; the message names it. Settings that do not touch the weights may change,
        and the number of steps may grow.
    """
    path = run / "config.yaml"
    if not steps_done or not path.is_file():
        return
    record = yaml.safe_load(path.read_text(encoding="utf-8"))
    known, now = flatten(record), flatten(yaml.safe_load(dump(settings)))
    before = {
        # A group of settings that is left out by default has a default as a whole. It does not count where the run
        # has parts.
        k: v
        for k, v in _defaults().items()
        if not any(one.startswith(f"{k}.") for one in known)
    } | known
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _FREE.fullmatch(key)
    ]
    # Fewer steps than are done would call a run finished that was trained for longer.
    if settings.optimiser.steps >= steps_done:
        changed = [key for key in changed if key != "optimiser.steps"]
    if changed:
        listed = ", ".join(f"{key} {before.get(key, 'unset')} -> {now.get(key, 'unset')}" for key in changed)
        raise ConfigError(
            f"{run} holds a run of {steps_done} steps with other settings ({listed}); use another --run, or the "
            "settings in its config.yaml (optimiser.steps may grow)"
        )


def _defaults() -> dict[str, Any]:
    """Give every setting of a training that has a default: a run of an older version does not name the newer ones."""
    fields = TrainSettings.model_fields.items()
    record = {
        name: field.get_default(call_default_factory=True)
        for name, field in fields
        if not field.is_required()
    }
    as_text = {k: v.model_dump(mode="json") if isinstance(v, Settings) else v for k, v in record.items()}
    return flatten({k: v for k, v in as_text.items() if v != ()})


def require_same_model(saved: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint whose encoders are not the ones that the settings describe.

    Raises
    ------
    CheckpointError
        If they differ; the message says in what.
    """
    before, now = flatten(saved), flatten(expected)
    changed = [
        f"{key} {before.get(key, 'unset')} -> {now.get(key, 'unset')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.endswith("checkpoint_levels")
    ]
    if changed:
        raise CheckpointError(
            f"{path} was made by another architecture ({', '.join(changed)}); restore those settings, "
            "or use another --run"
        )


def _require_one_world(pair: Sequence[Volume]) -> None:
    """Refuse volumes of which nothing lies in one place of the world, or of which one is a slice."""
    first = pair[0]
    for other in pair[1:]:
        if other.grid.planar != first.grid.planar:
            raise VolumeError(
                f"of a pair, {first.path} is {first.grid} and {other.path} is {other.grid}; expected two volumes, or "
                "two single slices"
            )
        if not first.grid.overlap_fraction(other.grid) and not other.grid.overlap_fraction(first.grid):
            raise VolumeError(
                f"{first.path} ({first.grid}) and {other.path} ({other.grid}) do not overlap in the world; training "
                "needs pairs that are aligned there: `comir-hpc register` and `comir-hpc warp` put one on the other"
            )


def world_notes(pairs: Sequence[Sequence[Volume]]) -> tuple[str, ...]:
    """Say of which volumes the files alone say that they are aligned, and on whose voxels patches are drawn."""
    return tuple(
        f"{other.path} ({other.grid}) has another grid than {pair[0].path} ({pair[0].grid}): they are taken as aligned "
        f"where their files put them, {pair[0].grid.overlap_fraction(other.grid):.0%} of the first in the second; "
        "patches have the voxels of the first"
        for pair in pairs
        for other in pair[1:]
        if not other.grid.agrees_with(pair[0].grid)
    )


def _require_room(volume: Volume, settings: TrainSettings) -> None:
    level, patch = settings.sampling.level, settings.sampling.patch
    if level >= volume.num_levels:
        raise ConfigError(
            f"sampling.level is {level}, but {volume.path} has levels 0 to {volume.num_levels - 1}; use one of them"
        )
    grid = volume.level_grid(level)
    shape = grid.shape_zyx
    if grid.planar and patch[0] > 1:
        raise ConfigError(
            f"{volume.path} is a single slice, sampling.patch is {patch} voxels (z, y, x); use [1, {patch[1]}, "
            f"{patch[2]}] (configs/planar.yaml trains on slices)"
        )
    if any(side > size for side, size in zip(patch, shape, strict=True)):
        raise ConfigError(
            f"sampling.patch is {patch}, larger than {volume.path} with {_triple(shape)} voxels (z, y, x) at level "
            f"{level}; use a smaller patch" + (", or a finer sampling.level" if level else "")
        )


def _choose_group(settings: TrainSettings, grid: Grid) -> Group:
    patch = settings.sampling.patch
    largest = group_for_spacing(grid.spacing_mm, planar=patch[0] == 1)
    if settings.sampling.group == "auto":
        largest.require_invariant(patch, "sampling.patch")
        return largest
    group = rotation_group(settings.sampling.group)
    allowed = {matrix.tobytes() for matrix in largest.matrices}
    if any(matrix.tobytes() not in allowed for matrix in group.matrices):
        raise ConfigError(
            f"sampling.group is {group.name}, which carries axes of different spacing onto each other: voxels are "
            f"{_triple(grid.spacing_mm)} mm (z, y, x); use {largest.name} or auto, or resample to cubic voxels"
        )
    return group


def _triple(values: Sequence[float]) -> str:
    return " x ".join(f"{v:g}" for v in values)
