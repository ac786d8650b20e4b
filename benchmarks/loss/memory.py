"""Memory and time of the contrastive loss, forward and backward, against the number of patches.

Each row is measured in a process of its own: the peak of the resident set above what the process held once the maps
were made. The naive twin makes the pairwise difference maps that the loss avoids. `cpu_seconds` is the figure to
compare, since other work shared the machine. The committed tables:

    export OMP_NUM_THREADS=1
    python benchmarks/loss/memory.py --side 32 --out benchmarks/loss/memory.csv
    python benchmarks/loss/memory.py --side 64 --patches 64 --pairwise-limit 0 --out benchmarks/loss/memory_64.csv
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rows import measured_apart, options_of, write_rows

FIELDS = (
    "variant",
    "patches",
    "side",
    "maps_mib",
    "peak_mib",
    "peak_over_maps",
    "seconds",
    "cpu_seconds",
    "threads",
    "torch",
)
MIB = 2**20


def pairwise(maps, settings):
    """InfoNCE with the mse critic from difference maps of all pairs, as the 2D code forms it."""
    import torch

    stacked = torch.cat(list(maps))
    value = -(stacked[:, None] - stacked[None]).square().mean(dim=(2, 3, 4, 5)) / settings.temperature
    count = len(maps[0])
    value = value.masked_fill(torch.eye(2 * count, dtype=torch.bool), -torch.inf)
    partner = torch.arange(2 * count).roll(count)
    return torch.nn.functional.cross_entropy(value, partner)


def measure(variant: str, patches: int, side: int) -> dict[str, object]:
    """Run one forward and backward pass here; the peak is only right in a fresh process."""
    import numpy as np
    import torch

    from comir_hpc.config import LossSettings
    from comir_hpc.learning.loss import contrastive_loss, draw_shifts

    critic = "mse" if variant in ("pairwise", "masked") else variant
    shifted = variant == "displaced"
    settings = LossSettings(
        critic="cosine" if shifted else critic,  # type: ignore[arg-type]
        decay_l2=0.0,
        displacement_negatives=4 if shifted else 0,
        displacement_voxels=(2, side // 4),
    )
    torch.manual_seed(0)
    # The first product of a process initialises the BLAS, whose buffers are none of the loss's.
    torch.ones(8, 8, requires_grad=True).mm(torch.ones(8, 8)).sum().backward()
    maps = [torch.randn(patches, 1, side, side, side, requires_grad=True) for _ in range(2)]
    masks = (
        [torch.rand(patches, 1, side, side, side) < 0.8 for _ in range(2)] if variant == "masked" else None
    )
    shifts = draw_shifts(np.random.default_rng(0), settings, (side,) * 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun, begun_cpu = time.perf_counter(), time.process_time()
    if variant == "pairwise":
        loss = pairwise(maps, settings)
    else:
        loss = contrastive_loss(maps, settings, masks=masks, shifts_zyx=shifts).loss
    loss.backward()
    seconds, cpu = time.perf_counter() - begun, time.process_time() - begun_cpu
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / MIB
    size = 2 * patches * side**3 * 4 / MIB
    values = (
        variant,
        patches,
        side,
        size,
        round(peak, 1),
        round(peak / size, 2),
        round(seconds, 3),
        round(cpu, 3),
    )
    return dict(zip(FIELDS, (*values, torch.get_num_threads(), torch.__version__), strict=True))


def main() -> None:
    """Measure every variant at every number of patches."""
    parser = options_of(__doc__)
    parser.add_argument("--side", type=int, default=32, help="voxels along each side of a patch")
    parser.add_argument("--patches", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--pairwise-limit", type=int, default=32, help="most patches for the naive twin")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "PATCHES"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], int(given.one[1]), given.side)))
        return
    rows = []
    for variant in ("mse", "cosine", "correlation", "tanimoto", "masked", "displaced", "pairwise"):
        for patches in given.patches:
            if variant == "pairwise" and patches > given.pairwise_limit:
                continue
            command = [sys.executable, __file__, "--side", str(given.side), "--out", str(given.out)]
            rows.append(measured_apart([*command, "--one", variant, str(patches)]))
    write_rows(given.out, rows)


if __name__ == "__main__":
    main()
