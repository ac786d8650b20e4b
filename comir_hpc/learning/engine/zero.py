"""Train with DeepSpeed: optimiser state and gradients are divided among the ranks (ZeRO), or kept on the host."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from comir_hpc.config.train import EngineSettings, OptimiserSettings
from comir_hpc.errors import ConfigError
from comir_hpc.host.launch import Launch
from comir_hpc.learning.engine.collectives import join_group
from comir_hpc.learning.engine.plain import adamw, load_moments, moments, set_rate
from comir_hpc.learning.engine.surface import Engine

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine(Engine):
    """DeepSpeed, which divides the optimiser's state, and on request the gradients, among the ranks (ZeRO 1 and 2)."""

    def __init__(
        self, settings: EngineSettings, networks: nn.ModuleDict, optimiser: OptimiserSettings, launch: Launch
    ) -> None:
        super().__init__(settings, networks, optimiser, launch)
        if self.world_size == 1:
            join_group(launch, self.device, settings.timeout_s)  # stays: DeepSpeed cannot leave a group
        for weight in self.networks.parameters():
            # DeepSpeed sends weights as plain bytes, which is not possible for weights in channels_last.
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)
        config = deepspeed_config(settings, optimiser, precision=self.precision, world_size=self.world_size)
        with _variables(launch.environment()):
            self._library = _import_deepspeed(self.device)
            self._deepspeed, *_ = self._library.initialize(
                model=self._encoders,
                optimizer=adamw(self.networks, optimiser),
                config=config,
                dist_init_required=False,
            )

    @property
    def _model(self) -> nn.Module:
        model: nn.Module = self._deepspeed
        return model

    @contextlib.contextmanager
    def _exchange(self, last: bool) -> Iterator[None]:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss (collective); `Engine.backward` says what is averaged and summed."""
        # Not divided by the number of micro-batches: each carries its part of one gradient, and the parts add up.
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def update(self) -> Tensor:
        """Clip the gradient and take one optimiser step (collective); return the norm before clipping, a scalar."""
        set_rate(self._deepspeed.optimizer, self.learning_rate)
        # Without ZeRO, DeepSpeed clips the gradient but does not keep the norm, so it is measured before.
        norm = None if self._zero else _gradient_norm(self.networks)
        self._deepspeed.step()
        self.steps_done += 1
        found = self._deepspeed.get_global_grad_norm() if norm is None else norm
        return torch.as_tensor(found, dtype=torch.float32, device=self.device)

    @property
    def _zero(self) -> bool:
        return bool(self._deepspeed.zero_optimization())

    def state(self) -> dict[str, Any]:
        """Return weights, optimiser and step as `Engine.state` does (collective)."""
        state = super().state()
        # With ZeRO the full fp32 weights are divided among the ranks: they are put together from all of them.
        if self._zero:
            for name, weight in self.networks.named_parameters():
                state["networks"][name] = (
                    self._library.utils.safe_get_full_fp32_param(weight).detach().cpu().clone()
                )
        return state

    def _optimiser_state(self) -> dict[str, dict[str, Tensor]]:
        if not self._zero:
            return moments(self.networks, self._deepspeed.optimizer)
        if not self.steps_done:
            return {}
        step, full = torch.tensor(float(self.steps_done)), self._library.utils.safe_get_full_optimizer_state
        return {
            name: {
                "step": step.clone(),
                **{k: full(weight, k).detach().cpu().clone() for k in _MOMENTS},
            }
            for name, weight in self.networks.named_parameters()
        }

    def _load_optimiser_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        if not self._zero:
            load_moments(self.networks, self._deepspeed.optimizer, state)
            return
        zero = self._deepspeed.optimizer
        zero.refresh_fp32_params()
        if not state:
            return
        # DeepSpeed makes the moments in its first step, but a resumed run needs them before that step. They are made
        # here, empty, and filled below.
        for flat in zero.single_partition_of_fp32_groups:
            empty = {key: torch.zeros_like(flat) for key in _MOMENTS}
            zero.optimizer.state[flat] = {"step": torch.tensor(float(self.steps_done)), **empty}
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
        for name, weight in self.networks.named_parameters():
            for key in _MOMENTS:
                self._library.utils.safe_set_full_optimizer_state(
                    weight, state[name][key].to(self.device), key
                )


def deepspeed_config(
    settings: EngineSettings, optimiser: OptimiserSettings, *, precision: str, world_size: int
) -> dict[str, Any]:
    """Translate our settings into DeepSpeed's configuration; nothing else configures it.

    The batch sizes in it have no effect, because the loop feeds the engine itself. `torch_autocast` is used rather than
    `bf16`: it keeps weights in fp32 and chooses the type operation by operation, as plain torch does.
    """
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.offload_optimiser:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    autocast: dict[str, Any] = {"enabled": precision != "fp32"}
    if precision != "fp32":
        autocast["dtype"] = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": settings.accumulation,
        "train_batch_size": settings.accumulation * world_size,
        "gradient_clipping": optimiser.clip_norm,
        "torch_autocast": autocast,
        "zero_optimization": zero,
        # torch's own AdamW is used, also for an offloaded optimiser: DeepSpeed's would be compiled at the first run.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


@contextlib.contextmanager
def _variables(wanted: dict[str, str]) -> Iterator[None]:
    """Set the variables that DeepSpeed reads at its start, and take back what was not there before.

    Left behind, they would tell a program that this process starts, or submits to SLURM, that it is a rank of this
    training.
    """
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed in such a way that it neither looks for MPI nor compiles anything."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        deepspeed: Any = importlib.import_module("deepspeed")
        ops: Any = importlib.import_module("deepspeed.ops")
    except ImportError as error:
        raise ConfigError(
            f"engine.name is deepspeed, but it cannot be imported ({error}); `pip install deepspeed`, "
            "or use engine.name torch"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls a function by the name that it had before torch 2.13. No user can do anything about the warning.
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor`", FutureWarning)
    if device.type == "cpu":
        # DeepSpeed would compile a collective over shared memory at its start. That takes a minute, and hangs if an
        # old lock file is there. gloo does the same work.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
    return deepspeed


def _gradient_norm(networks: nn.ModuleDict) -> Tensor:
    norms = [p.grad.norm() for p in networks.parameters() if p.grad is not None]
    total: Tensor = torch.stack(norms).norm()
    return total
