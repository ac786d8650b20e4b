"""Find out which process this is among all that train together, and on which device it computes.

Launchers tell a process its rank by environment variables. torchrun and DeepSpeed's launcher set RANK and others like
it; srun sets SLURM's own. Because they are read here, no MPI and no scheduler tool is needed inside a container.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from comir_hpc.config.words import Precision
from comir_hpc.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Flags in /proc/cpuinfo of CPUs with instructions that multiply bf16 (x86 and ARM).
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True)
class Launch:
    """One process of a job.

    Attributes
    ----------
    rank, world_size : int
        Number of this process among all, from 0, and how many there are.
    local_rank : int
        Number of this process among those of its node, from 0.
    address : str
        Name of the host on which the process of rank 0 runs.
    port : int
        Port on that host at which the processes meet.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = "localhost"
    port: int = 29500

    def environment(self) -> dict[str, str]:
        """Return the variables that torch and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Find out who this process is.

    The shell of a batch script has SLURM variables, too, but it is no task of a step. Only SLURM_STEP_NUM_TASKS, which
    srun sets, says that the process is one of several.

    Parameters
    ----------
    environment : mapping
        Environment variables: `os.environ`, or a part of it in a test.

    Raises
    ------
    ConfigError
        If the variables contradict each other or are incomplete.
    """
    # torchrun under srun has both: the launcher that started this very process counts.
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        _require_all_tasks(environment)
        default_port, default_address = "29500", ""
    elif "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        # Two jobs on one node must not meet at one port, so the job's number decides it.
        default_port = str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 40000)
        default_address = first_host(
            environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
        )
    else:
        return Launch()
    rank, world_size, local_rank = (int(environment.get(name, "0")) for name in names)
    address = environment.get("MASTER_ADDR", default_address)
    port = int(environment.get("MASTER_PORT", default_port))
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"{names[0]} is {rank}, but {names[1]} is {world_size}; check how the job was launched"
        )
    if world_size > 1 and not address:
        raise ConfigError(
            f"{world_size} processes, but MASTER_ADDR is not set: they cannot find each other; "
            "start them with torchrun or srun, or export MASTER_ADDR and MASTER_PORT"
        )
    return Launch(rank, world_size, local_rank, address or "localhost", port)


def _require_all_tasks(environment: Mapping[str, str]) -> None:
    """Refuse variables that an earlier launcher left behind: every task would take itself for the only process."""
    tasks, size = (int(environment.get(name, "1")) for name in ("SLURM_STEP_NUM_TASKS", "WORLD_SIZE"))
    if size < tasks:
        raise ConfigError(
            f"WORLD_SIZE is {size}, but srun started {tasks} tasks: the variable is left over from another launcher or "
            "training; run `unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT` before sbatch or srun"
        )


def first_host(nodelist: str) -> str:
    """Return the first name of a SLURM node list. It needs no scontrol, which containers do not have.

    Examples
    --------
    >>> first_host("gpu[007-009,012],login1")
    'gpu007'
    """
    match = re.match(r"([^\[,]*)(?:\[([^\],\-]+)[^\]]*\])?([^\[,]*)", nodelist)
    return "".join(part or "" for part in match.groups()) if match else ""


def choose_device(name: str, launch: Launch | None = None) -> torch.device:
    """Choose the device to compute on; "auto" is a GPU when there is one.

    Raises
    ------
    ConfigError
        If a GPU is asked for and there is none, or a node has more processes than GPUs.
    """
    local_rank = launch.local_rank if launch else 0
    # `auto` takes what there is. `cuda` where there is no GPU is refused below.
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device is {name}, but torch {torch.__version__} sees no GPU; use device auto or cpu, "
            "or check the driver with `comir-hpc doctor`"
        )
    count = torch.cuda.device_count()
    # Schedulers often show each task its own GPU only, as number 0.
    number = 0 if count == 1 else local_rank
    if number >= count:
        raise ConfigError(
            f"process {local_rank} of this node has no GPU: the node has {count}; start one process a GPU"
        )
    return torch.device("cuda", number)


def choose_precision(name: Precision, device: torch.device) -> Precision:
    """Choose fp32, bf16 or fp16; "auto" is bf16 where the device has instructions for it, otherwise fp32.

    Raises
    ------
    ConfigError
        If fp16 is asked for on a CPU.
    """
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("fp16 on a CPU is 35 times slower than fp32; use precision auto, bf16 or fp32")
    if name != "auto":
        return name
    fast = (
        torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bf16()
    )
    return "bf16" if fast else "fp32"


@cache
def _cpu_has_bf16() -> bool:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return False
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    # "flags" is the line's name on x86, "Features" on ARM.
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return bool(_BF16_FLAGS & set(flags.split()))
