"""Train with plain torch: the engine that every other one is measured against."""

from __future__ import annotations

import contextlib
import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from comir_hpc.config.train import EngineSettings, OptimiserSettings
from comir_hpc.host.launch import Launch
from comir_hpc.learning.engine.surface import Engine


class TorchEngine(Engine):
    """Plain torch: AdamW, and DistributedDataParallel when there are several processes."""

    def __init__(
        self, settings: EngineSettings, networks: nn.ModuleDict, optimiser: OptimiserSettings, launch: Launch
    ) -> None:
        super().__init__(settings, networks, optimiser, launch)
        self._wrapped: nn.Module = self._encoders
        if self.world_size > 1:
            # DistributedDataParallel lays its buffers out by the weights' strides, and warns of gradients with others.
            for weight in self.networks.parameters():
                weight.register_hook(partial(_with_strides, weight.stride()))  # type: ignore[no-untyped-call]
            # Synchronised norms keep the buffers equal on all ranks, so there is nothing to broadcast. The option has
            # another name since torch 2.13.
            accepted = inspect.signature(DistributedDataParallel).parameters
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers"
            ids = [self.device.index] if self.device.type == "cuda" else None
            options: dict[str, Any] = {"device_ids": ids, buffers: False}
            self._wrapped = DistributedDataParallel(self._encoders, **options)
        self.optimiser = adamw(self.networks, optimiser)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    @property
    def _model(self) -> nn.Module:
        return self._wrapped

    def _exchange(self, last: bool) -> contextlib.AbstractContextManager[None]:
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._wrapped.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss (collective); `Engine.backward` says what is averaged and summed."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def update(self) -> Tensor:
        """Clip the gradient and take one optimiser step (collective); return the norm before clipping, a scalar."""
        set_rate(self.optimiser, self.learning_rate)
        # Unscaled first: the limit of the norm is meant for true gradients, not for those scaled up for fp16.
        self._scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.networks.parameters(), self.schedule.clip_norm)
        self._scaler.step(self.optimiser)
        self._scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        self.steps_done += 1
        return norm

    def _optimiser_state(self) -> dict[str, dict[str, Tensor]]:
        return moments(self.networks, self.optimiser)

    def _load_optimiser_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        load_moments(self.networks, self.optimiser, state)


def _with_strides(strides: tuple[int, ...], gradient: Tensor) -> Tensor:
    """Give a gradient the strides of its weight, also along axes of length 1."""
    if gradient.stride() == strides:
        return gradient
    laid_out = torch.empty_strided(gradient.shape, strides, dtype=gradient.dtype, device=gradient.device)
    return laid_out.copy_(gradient)


def adamw(networks: nn.ModuleDict, settings: OptimiserSettings) -> torch.optim.AdamW:
    """Make the optimiser, with one group for the weights of all networks."""
    return torch.optim.AdamW(
        networks.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )


def set_rate(optimiser: Any, rate: float) -> None:
    """Set the learning rate of every group of weights."""
    for group in optimiser.param_groups:
        group["lr"] = rate


def moments(networks: nn.ModuleDict, optimiser: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return moments and step of every weight by name, on the CPU; empty before the first step."""
    return {
        name: {key: value.detach().cpu().clone() for key, value in optimiser.state[weight].items()}
        for name, weight in networks.named_parameters()
        if weight in optimiser.state
    }


def load_moments(
    networks: nn.ModuleDict, optimiser: torch.optim.Optimizer, state: dict[str, dict[str, Tensor]]
) -> None:
    """Take over what `moments` returned."""
    for name, weight in networks.named_parameters():
        if name in state:
            # torch keeps the count of steps on the CPU, also when the weights are on a GPU.
            optimiser.state[weight] = {
                key: value.clone() if key == "step" else value.to(weight.device, copy=True)
                for key, value in state[name].items()
            }
