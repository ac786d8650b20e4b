"""Memory and time of a training step against the patch, with and without recomputing activations.

    OMP_NUM_THREADS=1 python benchmarks/training/memory.py --out benchmarks/training/memory.csv
    python benchmarks/training/memory.py --device cuda --out benchmarks/training/memory_gpu.csv

Two encoders of the default network, bf16, two patches or more each (as many as fill two of 64^3). On a GPU the
largest cubic patch is looked for too. The memory of every row is that of a process of its own: on a CPU the growth of
its peak resident memory over a step, on a GPU what the allocator had at most; beside it what `train --dry-run`
predicts. The time is taken in another process, in which the rows of one side take turns, with memory managed as in a
training.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from comir_hpc.config import NetworkSettings
from comir_hpc.host.memory import keep_freed_memory
from comir_hpc.networks import build_network, network_options, predict_step

COLUMNS = (
    "side", "patches", "levels_recomputed", "predicted_mib", "measured_mib", "measured_over_predicted", "of_no_levels",
    "seconds", "seconds_of_no_levels", "patches_per_s", "tflops", "device",
)  # fmt: skip


# Every freed tensor goes back to the system at once, which malloc otherwise puts off.
ENVIRONMENT = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}


class Training:
    """Two encoders, and a step of them."""

    def __init__(self, side: int, levels: int, device: str) -> None:
        torch.manual_seed(0)
        settings = NetworkSettings(checkpoint_levels=levels)
        options = network_options(settings, spacing_zyx=(1, 1, 1), group="O")
        make = partial(build_network, "unet", in_channels=1, latent_channels=1, **options)
        self.networks = nn.ModuleList([make(), make()])
        self.side, self.device = side, device
        self.patches = max(2, round(2 * (64 / side) ** 3))
        self.cost = predict_step(self.networks[0], (side, side, side), self.patches, torch.bfloat16)
        self.networks.to(device)

    def step(self) -> float:
        """Its seconds, of the processor where the device is one."""
        images = torch.randn(self.patches, 1, self.side, self.side, self.side, device=self.device)
        begun = _now(self.device)
        with torch.autocast(self.device, dtype=torch.bfloat16):
            maps = [network(images) for network in self.networks]
        torch.stack([one.float().sum() for one in maps]).sum().backward()
        spent = _now(self.device) - begun
        self.networks.zero_grad(set_to_none=True)
        return spent


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(side: int, levels: int, device: str) -> dict:
    """Memory of one row, in this process."""
    training = Training(side, levels, device)
    # Both run forward before one runs backward.
    predicted = training.cost.kept_bytes + training.cost.peak_bytes
    training.step()  # libraries load, and keep workspaces
    before = _in_use(device)
    training.step()
    measured = _peak(device) - before
    return {
        "side": side,
        "patches": training.patches,
        "levels_recomputed": levels,
        "predicted_mib": round(predicted / 2**20),
        "measured_mib": round(measured / 2**20),
        "measured_over_predicted": round(measured / predicted, 3),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu, processor seconds",
    }


def measure_time(side: int, levels: list[int], device: str, repeats: int) -> list[dict]:
    """Seconds of a step for several numbers of levels, which take turns."""
    if device == "cpu":
        keep_freed_memory()
    trainings = [Training(side, number, device) for number in levels]
    spent = [[training.step() for training in trainings] for _ in range(repeats + 1)][1:]
    rows = []
    for training, seconds in zip(trainings, zip(*spent, strict=True), strict=True):
        ratios = [own / first[0] for own, first in zip(seconds, spent, strict=True)]
        middle = statistics.median(seconds)
        rows.append(
            {
                "seconds": round(middle, 3),
                "seconds_of_no_levels": round(statistics.median(ratios), 3),
                "patches_per_s": round(2 * training.patches / middle, 3),
                "tflops": round(2 * training.cost.flops / middle / 1e12, 3),
            }
        )
    return rows


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


def in_a_process(words: list[object], device: str, environment: Mapping[str, str] = os.environ) -> Any:
    """What a child prints, or None if it does not fit into memory."""
    command = [sys.executable, __file__, *map(str, words), "--device", device]
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", check=False, env=environment
    )
    if "OutOfMemoryError" in done.stderr:
        return None
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def rows_of(side: int, levels: list[int], device: str, repeats: int) -> Iterator[dict]:
    """Memory and time of one patch side."""
    found = {n: in_a_process(["--one", side, n], device, ENVIRONMENT) for n in levels}
    fitting = [n for n in levels if found[n]]
    words = ["--time", side, *fitting, "--repeats", repeats]
    times = in_a_process(words, device) if repeats and fitting else None
    for number, n in enumerate(fitting):
        row = found[n] | (times[number] if times else {})
        if found[0]:
            row["of_no_levels"] = round(row["measured_mib"] / found[0]["measured_mib"], 3)
        else:
            row.pop("seconds_of_no_levels", None)
        yield row


def largest(levels: int, device: str) -> dict | None:
    """The row of the largest cubic patch, in steps of 16 voxels."""
    best, side = None, 128
    while row := in_a_process(["--one", side, levels], device, ENVIRONMENT):
        best, side = row, side + 32
    return in_a_process(["--one", side - 16, levels], device, ENVIRONMENT) or best


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
    parser.add_argument("--time", type=int, nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(*given.one, given.device)))
        return
    if given.time:
        print(json.dumps(measure_time(given.time[0], given.time[1:], given.device, given.repeats)))
        return
    every = len(NetworkSettings().widths)
    with given.out.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for side in given.sides:
            for row in rows_of(side, [0, 1, 2, every], given.device, given.repeats):
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
