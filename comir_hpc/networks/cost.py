"""Predict the memory and the arithmetic of a training step, before it is run.

A step is traced with tensors that have a shape but no data, and every allocation and release is counted. Nothing is
computed, so one can ask about a patch that would not fit into memory.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from comir_hpc.networks.hourglass import Network
from comir_hpc.networks.planning import Triple

_TRACED = 32  # voxels along each side of the window that is encoded to see what a larger one takes


@dataclass(frozen=True)
class StepCost:
    """Hold the cost of the forward and backward pass of one network on one batch.

    Attributes
    ----------
    kept_bytes : int
        Bytes that are alive between the forward and the backward pass. Every further network adds as much to a step.
    peak_bytes : int
        Most bytes that are alive at once. Gradients of the weights and temporary tensors count; the weights, the
        optimiser's state and a library's workspace do not. On CPU the measured peak is within 4 % of it for a batch
        of two or more. torch's kernel for single samples in fp32 needs up to a quarter more.
    flops : int
        Floating-point operations of all convolutions; a multiplication and an addition are two. What checkpointing
        computes again is included.
    """

    kept_bytes: int
    peak_bytes: int
    flops: int


class _Held:
    """Counts the bytes of storages until each of them is freed."""

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self.known: set[int] = set()

    def count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, unless it is counted already."""
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


class _Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage that an operation makes, until it is freed, and the arithmetic.

    Not torch's FlopCounterMode: its module tracker keeps what checkpointing frees, and the memory would be wrong.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = _Held()
        self.flops = 0

    @property
    def live(self) -> int:
        """Bytes that are alive."""
        return self.held.live

    @property
    def peak(self) -> int:
        """Most bytes that were alive at once."""
        return self.held.peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        # Storages are counted and not tensors, since a view shares the memory of the tensor that it looks at.
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.held.count(leaf.untyped_storage())
        return result

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave out tensors that were there before the step."""
        self.held.known.update(tensor.untyped_storage()._cdata for tensor in tensors)


class _Step(nn.Module):
    """Forward and backward in one call, as checkpointing runs the network again in the latter."""

    def __init__(self, network: Network, tally: _Tally) -> None:
        super().__init__()
        self.network = network
        self.tally = tally
        self.kept_bytes = 0

    def forward(self, x_BCZYX: Tensor, dtype: torch.dtype) -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
            y_BLZYX = self.network(x_BCZYX)
        # What is alive between the two passes is what the backward pass needs.
        self.kept_bytes = self.tally.live
        y_BLZYX.sum().backward()


def predict_step(
    network: Network, patch_zyx: Triple, batch: int, dtype: torch.dtype = torch.float32
) -> StepCost:
    """Predict memory and arithmetic of a training step of one network.

    Parameters
    ----------
    network : Network
        The network as it will be trained, with its checkpointed levels. It is not changed.
    patch_zyx : three int
        Sides of a patch in voxels.
    batch : int
        Number of patches in the batch.
    dtype : torch.dtype
        Type of the arithmetic: float32, or the type of autocast (bfloat16, float16).

    Raises
    ------
    ConfigError
        If the patch does not fit the network.
    """
    tally = _Tally()
    step = _Step(network, tally)
    before = network.training
    with FakeTensorMode() as fake:
        # The weights are replaced by fake ones in this call only, so that the network stays as it is.
        state: dict[str, Tensor] = {
            name: fake.from_tensor(tensor)
            for name, tensor in (*step.named_parameters(), *step.named_buffers())
        }
        x_BCZYX = torch.empty(batch, network.in_channels, *patch_zyx)
        with tally:
            tally.ignore(state.values())
            try:
                torch.func.functional_call(step.train(), state, (x_BCZYX, dtype))
            finally:
                network.train(before)
    return StepCost(kept_bytes=step.kept_bytes, peak_bytes=tally.peak, flops=tally.flops)


def predict_encoding(network: Network, shape_zyx: Triple, dtype: torch.dtype = torch.float32) -> int:
    """Predict the bytes of the tensors between layers while a network encodes one window and learns nothing.

    A small window of noise is encoded, and the most that its layers hold at once is scaled. What a layer takes for a
    moment is not seen. To trace each operation, as `predict_step` does, would load 70 MiB of torch.

    Parameters
    ----------
    network : Network
        The network in evaluation mode.
    shape_zyx : three int
        Sides of the window in voxels.
    dtype : torch.dtype
        Type of the arithmetic: float32, or the type of autocast (bfloat16, float16).
    """
    strides = network.total_stride_zyx
    # A multiple of the stride: the network refuses any other side.
    small = [min(n, s * -(-_TRACED // s)) for n, s in zip(shape_zyx, strides, strict=True)]
    device = next(network.parameters()).device
    held = _Held()

    def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, Tensor):
                held.count(tensor.untyped_storage())

    leaves = [module for module in network.modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(look) for module in leaves]
    try:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            x_BCZYX = torch.randn(1, network.in_channels, *small, device=device)
            held.count(x_BCZYX.untyped_storage())
            network(x_BCZYX)
    finally:
        for hook in hooks:
            hook.remove()
    # All that layers hold grows with the voxels.
    return math.ceil(held.peak * math.prod(shape_zyx) / math.prod(small))


def estimate_activation_bytes(
    network: Network,
    patch_zyx: Triple,
    batch: int,
    dtype: torch.dtype = torch.float32,
    *,
    num_networks: int = 1,
) -> int:
    """Predict the peak memory of a training step in bytes, without weights and optimiser.

    All networks run forward before any runs backward. So the last one adds its peak, and each of the others only
    what it keeps for the backward pass.

    Parameters
    ----------
    network, patch_zyx, batch, dtype
        The same arguments that `predict_step` takes.
    num_networks : int
        How many networks like this one are in the step (one for each modality).
    """
    cost = predict_step(network, patch_zyx, batch, dtype)
    return cost.peak_bytes + (num_networks - 1) * cost.kept_bytes


def count_parameters(network: nn.Module) -> int:
    """Count the weights that are trained."""
    return sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
