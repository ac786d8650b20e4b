"""The loss's share of a training step, and what displacement negatives add to it, in processor seconds.

The networks run forward and backward on two patches a modality under bf16 autocast, and the figure is scaled to the
batch, which would not fit into memory at 64 patches of 64^3; their time is linear in patches. The loss is timed on the
whole batch. Each is the median of its repetitions, after one that is not counted. The committed table:

    OMP_NUM_THREADS=1 python benchmarks/loss/share.py --out benchmarks/loss/share.csv
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from comir_hpc.config import LossSettings, NetworkSettings
from comir_hpc.loss import contrastive_loss, draw_shifts
from comir_hpc.memory import keep_freed_memory
from comir_hpc.networks import build_network, network_options

CASES = ((12, 32), (64, 64))  # the demo's step, and the one that the bar of 5 % names
FIELDS = (
    *("patches", "side", "displacements", "networks_s", "loss_s"),
    *("loss_share_percent", "added_percent", "threads", "torch"),
)


def processor_seconds(work: Callable[[], None], repeats: int) -> float:
    """Return the median over the repetitions, the first not counted."""
    spent = []
    for _ in range(repeats + 1):
        begun = time.process_time()
        work()
        spent.append(time.process_time() - begun)
    return statistics.median(spent[1:])


def time_networks(patches: int, side: int, repeats: int) -> float:
    """Forward and backward passes of two default networks over `patches` patches each."""
    options = network_options(NetworkSettings(), spacing_zyx=(1, 1, 1), group="O")
    network = build_network("unet", in_channels=1, latent_channels=1, **options)
    images = torch.randn(2, 1, side, side, side)

    def work() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            maps = network(images)
        maps.float().square().mean().backward()

    return processor_seconds(work, repeats) / len(images) * 2 * patches


def time_loss(patches: int, side: int, displacements: int, repeats: int) -> float:
    """Forward and backward passes of the loss with its default settings."""
    settings = LossSettings(displacement_negatives=displacements)
    shifts = draw_shifts(np.random.default_rng(0), settings, (side,) * 3)
    maps = [torch.randn(patches, 1, side, side, side, requires_grad=True) for _ in range(2)]

    def work() -> None:
        torch.autograd.grad(contrastive_loss(maps, settings, shifts_zyx=shifts).loss, maps)

    return processor_seconds(work, repeats)


def main() -> None:
    """Measure both cases, without and with displacements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.manual_seed(0)
    keep_freed_memory()  # as a training does
    rows = []
    for patches, side in CASES:
        networks = time_networks(patches, side, given.repeats)
        plain = time_loss(patches, side, 0, given.repeats)
        for displacements in (0, LossSettings().displacement_negatives):
            loss = time_loss(patches, side, displacements, given.repeats) if displacements else plain
            share, added = 100 * loss / (networks + loss), 100 * (loss - plain) / (networks + plain)
            figures = (round(networks, 3), round(loss, 4), round(share, 2), round(added, 2))
            values = (patches, side, displacements, *figures, torch.get_num_threads(), torch.__version__)
            rows.append(dict(zip(FIELDS, values, strict=True)))
            print(rows[-1], flush=True)
    with given.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
