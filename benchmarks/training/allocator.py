"""What it brings on CPUs that the C library keeps freed memory (`memory.keep_freed_memory`).

    OMP_NUM_THREADS=1 python benchmarks/training/allocator.py --out benchmarks/training/allocator.csv

Training steps of one default encoder in bf16, with and without, in turns, each a process of its own.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPES = {"8 x 32^3": (8, 32), "4 x 64^3": (4, 64)}


def measure(patches: int, side: int, keep: bool) -> tuple[float, float]:
    """Processor seconds of a step, and the peak in MiB."""
    import torch

    from comir_hpc.config import NetworkSettings
    from comir_hpc.host.memory import keep_freed_memory, peak_bytes
    from comir_hpc.networks import build_network, network_options

    if keep:
        keep_freed_memory()
    options = network_options(NetworkSettings(), spacing_zyx=(1, 1, 1), group="O")
    network = build_network("unet", in_channels=1, latent_channels=1, **options)
    optimiser = torch.optim.AdamW(network.parameters())
    images = torch.randn(patches, 1, side, side, side)
    spent = []
    for _ in range(8):
        begun = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            maps = network(images)
        maps.float().square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        spent.append(time.process_time() - begun)
    return statistics.median(spent[2:]), peak_bytes() / 2**20


def main() -> None:
    """Take turns, write medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(*json.loads(given.one))))
        return
    rows = []
    for name, (patches, side) in SHAPES.items():
        found: dict[bool, list[list[float]]] = {False: [], True: []}
        for _ in range(given.rounds):
            for keep in found:
                command = [sys.executable, __file__, "--one", json.dumps([patches, side, keep])]
                found[keep].append(json.loads(subprocess.check_output(command)))
        for keep, values in found.items():
            seconds, peaks = zip(*values, strict=True)
            ratio = statistics.median(b[0] / a[0] for a, b in zip(found[False], values, strict=True))
            rows.append(
                [
                    name,
                    "kept" if keep else "handed back",
                    f"{statistics.median(seconds):.3f}",
                    f"{ratio:.3f}",
                    round(max(peaks)),
                    given.rounds,
                ]
            )
            print(rows[-1], flush=True)
    with given.out.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(
            ["patches", "freed_memory", "cpu_seconds_a_step", "against_plain", "peak_mib", "rounds"]
        )
        table.writerows(rows)


if __name__ == "__main__":
    main()
