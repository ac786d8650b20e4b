"""Let ranks work together: meet, gather rows with gradient, and normalise over all their batches.

Each of K ranks gives its rows to `gather_rows`. When the losses of all ranks are averaged, the gradient is that of one
process with all the rows (docs/theory.md, section on negatives).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from comir_hpc.errors import ConfigError
from comir_hpc.host.launch import Launch
from comir_hpc.learning.engine.lockstep import of_all_ranks


def gather_rows(rows: Tensor) -> Tensor:
    """Gather all ranks' rows (n, ...), one after the other, as (K n, ...) with gradient."""
    gathered: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    """Concatenate all ranks' rows; in the backward pass each rank gets the sum of all ranks' gradients of its rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Piece r of every rank's gradient belongs to the rows of rank r: exchange the pieces, then add them up.
        own = torch.empty_like(grad, memory_format=torch.contiguous_format)
        dist.all_to_all_single(own, grad.contiguous())
        return torch.stack(own.tensor_split(dist.get_world_size())).sum(dim=0)


class _Normalise(torch.autograd.Function):
    """Compute (x - mean) / sqrt(variance + eps) * weight + bias for each channel, with statistics over all ranks.

    It is made of the kernels of torch's own BatchNorm: a map is read as often as there, and in its own precision.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BCZYX: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The kernel needs buffers in which it tracks statistics. Their type also decides in which precision it sums.
        buffers = torch.zeros_like(weight), torch.ones_like(weight)
        own = torch.stack(torch.ops.aten.batch_norm_update_stats(x_BCZYX, *buffers, 0.0))
        # Every rank holds equally many voxels, so means may be averaged.
        means, variances = of_all_ranks(own).unbind(dim=1)
        mean = means.mean(dim=0)
        variance = (variances + (means - mean).square()).mean(dim=0)
        ctx.save_for_backward(x_BCZYX, weight, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x_BCZYX, mean, variance, weight, bias, eps=eps), mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, variance = ctx.saved_tensors
        scale = torch.rsqrt(variance + ctx.eps)
        # First as if the statistics were constants. What they contribute is a linear function of x, since mean and
        # variance of a batch depend on x through sums of x and x^2: it is added below as one more normalisation.
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grads[0], x, weight, mean, variance, mean, scale, False, ctx.eps, [True, True, True]
        )
        sums = of_all_ranks(torch.stack([grad_weight, grad_bias])).sum(dim=0)
        num_voxels = x.numel() // x.shape[1] * dist.get_world_size()
        slope, offset = -weight * scale * sums / num_voxels
        grad_x.add_(F.batch_norm(x, mean, variance, slope, offset, eps=ctx.eps))
        return grad_x, grad_weight, grad_bias, None


class SynchronisedBatchNorm(nn.BatchNorm3d):
    """BatchNorm over the batches of all ranks together, for CPUs: torch's own works on GPUs only."""

    def forward(self, x_BCZYX: Tensor) -> Tensor:
        """Normalise (B, C, Z, Y, X); in evaluation mode with the running statistics."""
        if not self.training:
            return super().forward(x_BCZYX)
        normalised, mean, variance = _Normalise.apply(x_BCZYX, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        num_voxels = x_BCZYX.numel() // x_BCZYX.shape[1] * dist.get_world_size()
        # torch's BatchNorm tracks the unbiased variance (n / (n - 1)), but normalises with the biased one.
        self._track(mean, variance * (num_voxels / max(1, num_voxels - 1)))
        result: Tensor = normalised
        return result

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


def synchronise_norms(networks: nn.ModuleDict, device: torch.device) -> nn.ModuleDict:
    """Replace every BatchNorm3d, in place, by one that counts the batches of all ranks, with the same weights."""
    if device.type == "cuda":
        converted: nn.ModuleDict = nn.SyncBatchNorm.convert_sync_batchnorm(networks)  # type: ignore[no-untyped-call]
        return converted
    for module in list(networks.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm3d:
                together = SynchronisedBatchNorm(child.num_features, child.eps, child.momentum)
                together.load_state_dict(child.state_dict())
                setattr(module, name, together.train(child.training))
    return networks


def join_group(launch: Launch, device: torch.device, timeout_s: int) -> bool:
    """Join the group of processes; return whether it was made here, so that we must also end it.

    Raises
    ------
    ConfigError
        If this process belongs to a group of another size.
    """
    if dist.is_initialized():
        if dist.get_world_size() != launch.world_size:
            raise ConfigError(
                f"this process belongs to a group of {dist.get_world_size()}, but was launched as one of "
                f"{launch.world_size}; check RANK and WORLD_SIZE"
            )
        return False
    # Both backends: small flags travel between CPUs (gloo), so that no GPU has to be waited for.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s)}
    if launch.world_size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, **options)
        return True
    method = f"tcp://{launch.address}:{launch.port}"
    dist.init_process_group(
        backend, init_method=method, rank=launch.rank, world_size=launch.world_size, **options
    )
    return True
