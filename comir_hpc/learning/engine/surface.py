"""Define what the training loop needs of an engine, and what all engines have in common."""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from comir_hpc.config.train import EngineSettings, OptimiserSettings
from comir_hpc.errors import CheckpointError
from comir_hpc.host.launch import DTYPES, Launch, choose_device, choose_precision
from comir_hpc.host.memory import keep_freed_memory
from comir_hpc.learning.engine.collectives import (
    SynchronisedBatchNorm,
    gather_rows,
    join_group,
    synchronise_norms,
)
from comir_hpc.learning.engine.lockstep import Lockstep, encode_in_lockstep
from comir_hpc.runs.checkpoints import read_checkpoint, write_checkpoint

_SETTLING_S = 0.3  # how long to wait after the group of processes has ended; see `Engine.close`


def learning_rate(settings: OptimiserSettings, step: int) -> float:
    """Return the rate of optimiser step `step` (from 0): a linear rise over the warm-up, then half a cosine to zero."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Engine(ABC):
    """Machinery that encodes, takes optimiser steps, and keeps its own state.

    Attributes
    ----------
    networks : ModuleDict
        The encoders by modality, on the device, without any wrapper.
    rank, world_size : int
        Number of this process, and how many processes there are.
    device : torch.device
        Where the networks are and compute.
    precision : str
        Type of the encoders' arithmetic: fp32, bf16 or fp16. Weights, loss and optimiser are fp32.
    steps_done : int
        Number of optimiser steps so far. It decides the learning rate.
    """

    def __init__(
        self, settings: EngineSettings, networks: nn.ModuleDict, optimiser: OptimiserSettings, launch: Launch
    ) -> None:
        self.settings = settings
        self.schedule = optimiser
        self.rank, self.world_size = launch.rank, launch.world_size
        self.device = choose_device(settings.device, launch)
        self.precision = choose_precision(settings.precision, self.device)
        self.steps_done = 0
        self._owns_group = False
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            keep_freed_memory()
        # The group has to exist before the norms are synchronised, and the norms before a wrapper sees the networks.
        if self.world_size > 1:
            self._owns_group = join_group(launch, self.device, settings.timeout_s)
            networks = synchronise_norms(networks, self.device)
        self.networks = networks.to(self.device)
        lockstep = Lockstep(len(networks)) if self._run_in_lockstep() else None
        self._encoders = _Encoders(self.networks, self.device.type, DTYPES[self.precision], lockstep)

    def _run_in_lockstep(self) -> bool:
        """Say whether networks run in step.

        With recomputation they do not: levels of two networks at once would take the memory that it saves.
        """
        layers = list(self.networks.modules())
        return any(isinstance(one, SynchronisedBatchNorm) for one in layers) and not any(
            getattr(one, "recompute", False) for one in layers
        )

    # ------------------------------------------------------------------ a step

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return learning_rate(self.schedule, self.steps_done)

    def encode(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Run every modality's batch through its encoder, under autocast (collective).

        Parameters
        ----------
        images : sequence of M float32 tensors (n, c, z, y, x)
            One batch of images for each modality, in the order of `networks`. One network encodes all of them together.

        Returns
        -------
        M float32 tensors (n, l, z, y, x)
            Representations of the images.
        """
        return list(self._model(*images))

    def step(self, loss: Tensor) -> Tensor:
        """Go backward and update in one; return the norm of the gradient before clipping, a scalar (collective)."""
        with self.micro_batch(last=True):
            self.backward(loss)
        return self.update()

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Enclose one micro-batch: encode and go backward inside it.

        Gradients of all micro-batches add up. Ranks exchange them in the last one only.
        """
        with self._exchange(last):
            yield

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss: the mean over ranks, and the sum over micro-batches (collective)."""

    @abstractmethod
    def update(self) -> Tensor:
        """Clip the gradient of all networks together and take one optimiser step (collective).

        Returns
        -------
        scalar tensor
            Euclidean norm of the gradient before clipping.
        """

    @property
    @abstractmethod
    def _model(self) -> nn.Module:
        """The encoders in the engine's wrapper."""

    @abstractmethod
    def _exchange(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Make a context in which ranks exchange gradients if `last` is set, and otherwise do not."""

    # ------------------------------------------------------------------ between ranks

    def gather(self, rows: Tensor) -> Tensor:
        """Gather all ranks' rows (n, ...), one after the other, as (K n, ...) with gradient (collective)."""
        if self.world_size == 1:
            return rows
        return gather_rows(rows)

    def mean(self, value: Tensor) -> Tensor:
        """Average a tensor over ranks, without gradient (collective)."""
        total = value.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total / self.world_size

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Find for each flag whether any rank has set it, so that all ranks decide alike (collective)."""
        if self.world_size == 1:
            return flags
        highest = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return tuple(bool(flag) for flag in highest.tolist())

    # ------------------------------------------------------------------ state

    def state(self) -> dict[str, Any]:
        """Return weights, optimiser and step as plain fp32 tensors on the CPU, by parameter name (collective)."""
        return {
            "networks": {k: v.detach().cpu().clone() for k, v in self.networks.state_dict().items()},
            "optimiser": self._optimiser_state(),
            "steps_done": self.steps_done,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned, on any number of ranks and any engine (collective).

        Raises
        ------
        CheckpointError
            If the weights belong to another architecture.
        """
        _require_same_architecture(state["networks"], self.networks.state_dict())
        self.networks.load_state_dict(state["networks"])
        self.steps_done = int(state["steps_done"])
        self._load_optimiser_state(state["optimiser"])

    def save(self, folder: Path, loop: dict[str, Any]) -> None:
        """Write a checkpoint of everything, atomically, from the first rank (collective).

        Raises
        ------
        CheckpointError
            If it cannot be written. Every rank raises it, so that none waits for the others.
        """
        record = {"engine": self.state(), "loop": loop}
        problem: CheckpointError | None = None
        if self.rank == 0:
            try:
                write_checkpoint(folder, record)
            except CheckpointError as error:
                problem = error
        # All ranks have to learn of the problem. If only the first one ended, the others would wait for it in vain.
        if any(self.any(problem is not None)):
            raise problem or CheckpointError(
                f"{folder} could not be written by the first rank; see its message"
            )

    def load(self, folder: Path) -> dict[str, Any]:
        """Read a checkpoint back, and return the loop's part of it (collective)."""
        record = read_checkpoint(folder)
        self.load_state(record["engine"])
        loop: dict[str, Any] = record["loop"]
        return loop

    @abstractmethod
    def _optimiser_state(self) -> dict[str, dict[str, Tensor]]:
        """Return moments and step of every parameter by name; empty before the first step."""

    @abstractmethod
    def _load_optimiser_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take over what `_optimiser_state` returned."""

    def close(self) -> None:
        """Leave the group of processes (collective)."""
        if self._owns_group:
            dist.destroy_process_group()
            if self.world_size > 1:
                # gloo's threads let go of the last exchange a moment later. If Python ends in that moment, they abort
                # the process (pytorch 179291; a third of all exits that follow at once on busy cores).
                time.sleep(_SETTLING_S)


class _Encoders(nn.Module):
    """All encoders as one module, so that a wrapper sees one forward pass in a step."""

    def __init__(
        self, networks: nn.ModuleDict, device_type: str, dtype: torch.dtype, lockstep: Lockstep | None
    ) -> None:
        super().__init__()
        self.networks = networks
        self.device_type = device_type
        self.dtype = dtype
        self.lockstep = lockstep

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        networks = list(self.networks.values())
        if len(networks) < len(images):
            # One encoder for all modalities: batch statistics are those of all, as the running ones will be.
            return torch.split(self._encode(networks[0], torch.cat(images)), [len(one) for one in images])
        jobs = [partial(self._encode, one, image) for one, image in zip(networks, images, strict=True)]
        if self.lockstep is not None and self.training:
            return encode_in_lockstep(self.lockstep, networks, jobs)
        return tuple(job() for job in jobs)

    def _encode(self, network: nn.Module, image: Tensor) -> Tensor:
        with torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not torch.float32):
            encoded: Tensor = network(image)
        return encoded.float()


def _require_same_architecture(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Refuse weights whose names or shapes are not those of the networks."""
    differing = [
        f"{name} is {shapes[0]}, expected {shapes[1]}"
        for name in sorted(found.keys() | expected.keys())
        if len(set(shapes := [tuple(s[name].shape) if name in s else "absent" for s in (found, expected)]))
        > 1
    ]
    if differing:
        raise CheckpointError(
            f"the checkpoint was made by another architecture: {len(differing)} weights differ, first "
            f"{differing[0]} (saved, expected); restore the network settings it was trained with, or use another --run"
        )
