"""The loss's share of a training step, and what displacement negatives add to it, in processor seconds.

The networks run forward and backward on two patches a modality under bf16 autocast, and the figure is scaled to the
batch, which would not fit into memory at 64 patches of 64^3; their time is linear in patches. The loss is timed on the
whole batch. Where a share of the patches is partial, a quarter of each lies beyond the volume, as of about half of the
patches of the demo. Each is the median of its repetitions, after one that is not counted. The committed table:

    OMP_NUM_THREADS=1 python benchmarks/loss/share.py --out benchmarks/loss/share.csv
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from rows import options_of, write_rows

from comir_hpc.config import LossSettings, NetworkSettings
from comir_hpc.host.memory import keep_freed_memory
from comir_hpc.learning.loss import contrastive_loss, draw_shifts
from comir_hpc.networks import build_network, network_options

CASES = ((12, 32), (64, 64))  # the demo's step, and the one that the bar of 5 % names
FIELDS = (
    *("patches", "side", "displacements", "partial", "networks_s", "loss_s"),
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


def time_loss(patches: int, side: int, displacements: int, repeats: int, partial: float = 0.0) -> float:
    """Forward and backward passes of the loss with its default settings; `partial` is a share of the patches."""
    settings = LossSettings(displacement_negatives=displacements)
    shifts = draw_shifts(np.random.default_rng(0), settings, (side,) * 3)
    maps = [torch.randn(patches, 1, side, side, side, requires_grad=True) for _ in range(2)]

    masks = None
    if partial:
        valid = torch.ones(patches, 1, side, side, side, dtype=torch.bool)
        valid[: round(partial * patches), :, : side // 4] = False
        masks = [valid] * 2

    def work() -> None:
        torch.autograd.grad(contrastive_loss(maps, settings, masks=masks, shifts_zyx=shifts).loss, maps)

    return processor_seconds(work, repeats)


def main() -> None:
    """Measure both cases, without and with displacements."""
    parser = options_of(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.manual_seed(0)
    keep_freed_memory()  # as a training does
    rows = []
    for patches, side in CASES:
        networks = time_networks(patches, side, given.repeats)
        plain = time_loss(patches, side, 0, given.repeats)
        default = LossSettings().displacement_negatives
        for displacements, partial in ((0, 0.0), (default, 0.0), (default, 0.5)):
            loss = time_loss(patches, side, displacements, given.repeats, partial) if displacements else plain
            share, added = 100 * loss / (networks + loss), 100 * (loss - plain) / (networks + plain)
            figures = (round(networks, 3), round(loss, 4), round(share, 2), round(added, 2))
            values = (
                patches,
                side,
                displacements,
                partial,
                *figures,
                torch.get_num_threads(),
                torch.__version__,
            )
            rows.append(dict(zip(FIELDS, values, strict=True)))
            print(rows[-1], flush=True)
    write_rows(given.out, rows)


if __name__ == "__main__":
    main()
