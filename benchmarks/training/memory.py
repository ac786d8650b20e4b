"""Memory and time of a training step against the patch, with and without recomputing activations.

    OMP_NUM_THREADS=1 python benchmarks/training/memory.py --out benchmarks/training/memory.csv
    python benchmarks/training/memory.py --device cuda --out benchmarks/training/memory_gpu.csv

Two encoders of the default network, bf16, two patches or more each (as many as fill two of 64^3). On a GPU the
largest cubic patch is looked for too. Every row is a process of its own: on a CPU the growth of its peak resident
memory over a step, on a GPU what the allocator had at most; beside it what `train --dry-run` predicts.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from comir_hpc.config import NetworkSettings
from comir_hpc.networks import build_network, network_options, predict_step

COLUMNS = (
    "side", "patches", "levels_recomputed", "predicted_mib", "measured_mib", "measured_over_predicted", "seconds",
    "patches_per_s", "tflops", "device",
)  # fmt: skip


# Every freed tensor goes back to the system at once, which malloc otherwise puts off.
ENVIRONMENT = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}


def measure(side: int, levels: int, device: str, repeats: int) -> dict:
    """One row, in this process."""
    torch.manual_seed(0)
    settings = NetworkSettings(checkpoint_levels=levels)
    options = network_options(settings, spacing_zyx=(1, 1, 1), group="O")
    make = partial(build_network, "unet", in_channels=1, latent_channels=1, **options)
    networks = nn.ModuleList([make(), make()])
    patches = max(2, round(2 * (64 / side) ** 3))
    cost = predict_step(networks[0], (side, side, side), patches, torch.bfloat16)
    predicted = cost.kept_bytes + cost.peak_bytes  # both run forward before one runs backward
    networks.to(device)

    def step(size: int) -> float:
        images = torch.randn(patches, 1, size, size, size, device=device)
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter() if device == "cuda" else time.process_time()
        with torch.autocast(device, dtype=torch.bfloat16):
            maps = [network(images) for network in networks]
        torch.stack([one.float().sum() for one in maps]).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() if device == "cuda" else time.process_time()) - begun

    step(side)  # libraries load, and keep workspaces
    networks.zero_grad(set_to_none=True)
    before = _in_use(device)
    first = step(side)
    measured = _peak(device) - before
    seconds = statistics.median([step(side) for _ in range(repeats)]) if repeats else first
    return {
        "side": side,
        "patches": patches,
        "levels_recomputed": levels,
        "predicted_mib": round(predicted / 2**20),
        "measured_mib": round(measured / 2**20),
        "measured_over_predicted": round(measured / predicted, 3),
        "seconds": round(seconds, 3),
        "patches_per_s": round(2 * patches / seconds, 3),
        "tflops": round(2 * cost.flops / seconds / 1e12, 3),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu, processor seconds",
    }


def _in_use(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts again from here
    return _status("VmRSS")


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(key))


def in_a_process(side: int, levels: int, device: str, repeats: int) -> dict | None:
    """One row, or None if it does not fit into memory."""
    command = [
        sys.executable,
        __file__,
        "--one",
        str(side),
        str(levels),
        "--device",
        device,
        "--repeats",
        str(repeats),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", check=False, env=ENVIRONMENT
    )
    if "OutOfMemoryError" in done.stderr:
        return None
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def largest(levels: int, device: str) -> dict | None:
    """The row of the largest cubic patch, in steps of 16 voxels."""
    best, side = None, 128
    while row := in_a_process(side, levels, device, 0):
        best, side = row, side + 32
    return in_a_process(side - 16, levels, device, 0) or best


def main() -> None:
    """Measure all sides; on a GPU also look for the largest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 48, 64, 96, 128])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(*given.one, given.device, given.repeats)))
        return
    every = len(NetworkSettings().widths)
    with given.out.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for side in given.sides:
            for levels in (0, 1, every):
                row = in_a_process(side, levels, given.device, given.repeats)
                if row:
                    table.writerow(row)
                    file.flush()
                    print(row, flush=True)
        if given.device == "cuda":
            for levels in (0, every):
                row = largest(levels, given.device)
                if row:
                    table.writerow(row)
                    print("largest", row, flush=True)


if __name__ == "__main__":
    main()
