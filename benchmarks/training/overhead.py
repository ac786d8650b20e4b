"""What an engine adds to the plainest torch loop, step by step in turns, in one process.

    OMP_NUM_THREADS=1 python benchmarks/training/overhead.py --out benchmarks/training/overhead.csv

Two encoders of the default network on the demo's batch, the default loss, AdamW and clipping. Each round takes one step
of each: plain torch, TorchEngine, DeepSpeedEngine (ZeRO 1); then bf16 against fp32 of the plain loop. Medians over
rounds, in processor seconds, which other jobs on the machine disturb less than the clock; on a GPU in seconds.
"""

import argparse
import csv
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from comir_hpc.config import EngineSettings, LossSettings, NetworkSettings, OptimiserSettings
from comir_hpc.learning.engine import make_engine
from comir_hpc.learning.loss import contrastive_loss, draw_shifts
from comir_hpc.networks import build_network, network_options

LOSS, OPTIMISER = LossSettings(), OptimiserSettings()


def encoders() -> nn.ModuleDict:
    """Two of the default network."""
    torch.manual_seed(0)
    options = network_options(NetworkSettings(), spacing_zyx=(1, 1, 1), group="O")
    make = lambda: build_network("unet", in_channels=1, latent_channels=1, **options)  # noqa: E731
    return nn.ModuleDict({"a": make(), "b": make()})


def contrast(maps: list[Tensor], number: int) -> Tensor:
    """The loss as `train` computes it."""
    side = maps[0].shape[-1]
    shifts = draw_shifts(np.random.default_rng(number), LOSS, (side, side, side))
    return contrastive_loss(maps, LOSS, shifts_zyx=shifts).loss


def plain_loop(device: str, dtype: torch.dtype) -> Callable[[list[Tensor], int], None]:
    """A step with nothing around it."""
    networks = encoders().to(device)
    optimiser = torch.optim.AdamW(networks.parameters(), lr=OPTIMISER.learning_rate)

    def step(images: list[Tensor], number: int) -> None:
        with torch.autocast(device, dtype=dtype, enabled=dtype is not torch.float32):
            maps = [network(image) for network, image in zip(networks.values(), images, strict=True)]
        contrast([one.float() for one in maps], number).backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), OPTIMISER.clip_norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def with_engine(name: str, device: str) -> Callable[[list[Tensor], int], None]:
    """A step of one of our engines."""
    settings = EngineSettings(name=name, device=device, precision="bf16")
    engine = make_engine(settings, encoders(), OPTIMISER)
    return lambda images, number: engine.step(contrast(engine.encode(images), number)) and None


def main() -> None:
    """Take turns, and write the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--side", type=int, default=32)
    given = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", given.device)
    variants = {
        "plain torch, bf16": plain_loop(given.device, torch.bfloat16),
        "TorchEngine, bf16": with_engine("torch", given.device),
        "DeepSpeedEngine ZeRO 1, bf16": with_engine("deepspeed", given.device),
        "plain torch, fp32": plain_loop(given.device, torch.float32),
    }
    shape = (given.pairs, 1, given.side, given.side, given.side)
    images = [torch.randn(shape, device=given.device) for _ in range(2)]
    spent: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(given.rounds + 1):
        for name, step in variants.items():
            begun = _now(given.device)
            step(images, number)
            spent[name].append(_now(given.device) - begun)
    reference = statistics.median(spent["plain torch, bf16"][1:])
    with given.out.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(
            [
                "variant",
                "pairs",
                "side",
                "seconds_a_step",
                "against_plain_bf16",
                "rounds",
                "device",
                "threads",
            ]
        )
        for name, times in spent.items():
            median = statistics.median(times[1:])
            row = [name, given.pairs, given.side, f"{median:.4f}", f"{median / reference:.3f}", given.rounds]
            table.writerow([*row, _device_name(given.device), torch.get_num_threads()])
            print(row, flush=True)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


if __name__ == "__main__":
    main()
