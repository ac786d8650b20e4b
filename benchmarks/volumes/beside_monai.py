r"""`infer` beside MONAI's `sliding_window_inference`: the same network, precision, windows, overlap and blending.

    pip install --no-deps --target MONAI monai
    equal=(--work SMALL --runs "equal, MONAI" "equal, comir-hpc")
    default=(--work LARGE --widths 16 32 64 64 --runs "default, MONAI" "default, comir-hpc")
    to=(--monai MONAI --out benchmarks/volumes/beside_monai.csv)
    OMP_NUM_THREADS=1 python benchmarks/volumes/beside_monai.py compare "${equal[@]}" "${to[@]}"
    python benchmarks/volumes/beside_monai.py compare "${equal[@]}" "${to[@]}"
    python benchmarks/volumes/beside_monai.py compare "${default[@]}" "${to[@]}"

`equal`: windows of 64, half overlapping, Gaussian weights, bf16, every window evaluated, one block. MONAI has the
volume in memory and leaves its result there; `infer` reads it from zarr and writes the result, its pyramid and its
ledger. `default`: each tool's own defaults. MONAI: overlap 0.25, constant weights, fp32, batches of 4, and windows of
64, for which it has no default. Ours: the same windows and overlap, Gaussian, bf16 where the processor multiplies it,
windows without specimen left out, blocks of 256 x 256 x 128. In `compare` every measurement is a process of its own,
and they take turns. A small network (`--widths`) shows what is around it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rows import add_rows, measured_apart, verbs_of

WINDOW = 64
RUNS = ("equal, MONAI", "equal, comir-hpc", "default, MONAI", "default, comir-hpc")


def prepare(work: Path, side: int, widths: list[int]) -> None:
    """A volume of brains, and two training steps of a network."""
    from brains import brains
    from infer import make_run

    from comir_hpc.ingest import ingest_array
    from comir_hpc.space.grid import Grid

    if not (work / "run" / "model.json").exists():
        work.mkdir(parents=True, exist_ok=True)
        make_run(work, network={"widths": tuple(widths)})
    if not (work / f"{side}.zarr").exists():
        ingest_array(brains((side,) * 3), Grid((side,) * 3, (1.0, 1.0, 1.0)), work / f"{side}.zarr")


def _monai(work: Path, side: int, equal: bool) -> tuple[float, float, Path]:
    import torch
    from monai.inferers import sliding_window_inference

    from comir_hpc.representations.encoding import NormalisedReader, load_encoder
    from comir_hpc.volumes.volume import Volume

    network = load_encoder(work / "run", "one", device="cpu", precision="fp32").network
    values = torch.from_numpy(NormalisedReader(Volume.open(work / f"{side}.zarr"), 0)(_whole(side)))[None]
    options: dict[str, Any] = {"overlap": 0.5, "mode": "gaussian"} if equal else {}
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=equal):
        found = sliding_window_inference(values, (WINDOW,) * 3, 1 if equal else 4, network, **options)
    used = time.perf_counter() - wall, time.process_time() - cpu
    np.save(work / "monai.npy", found[0].float().numpy())
    return *used, work / "monai.npy"


def _whole(side: int) -> Any:
    from comir_hpc.space.grid import Box

    return Box((0, 0, 0), (side,) * 3)


def _comir(work: Path, side: int, equal: bool) -> tuple[float, float, Path]:
    from comir_hpc.config import InferSettings
    from comir_hpc.infer import infer

    out = work / "out.zarr"
    for old in (out, Path(f"{out}.ledger")):
        shutil.rmtree(old, ignore_errors=True)
    options: dict[str, Any] = (
        {
            "precision": "bf16",
            "window": WINDOW,
            "overlap": 0.5,
            "skip_background": False,
            "core": side,
            "shard": min(side, 128),
        }
        if equal
        else {}
    )
    settings = InferSettings(
        zarr=work / f"{side}.zarr", model=work / "run", modality="one", out=out, device="cpu", **options
    )
    wall, cpu = time.perf_counter(), time.process_time()
    result = infer(settings)
    used = time.perf_counter() - wall, time.process_time() - cpu
    print(result.summary)
    return *used, out


def measure(name: str, work: Path, side: int) -> dict[str, Any]:
    """Carry out one of them in this process."""
    from comir_hpc.host.memory import peak_bytes
    from comir_hpc.volumes.volume import Volume

    act = _monai if name.endswith("MONAI") else _comir
    wall, cpu, result = act(work, side, name.startswith("equal"))
    row = {"name": name, "seconds": wall, "cpu_seconds": cpu, "peak_mib": peak_bytes() / 2**20}
    reference = work / "monai.npy"
    if name == "equal, comir-hpc" and reference.exists():
        theirs = np.load(reference, mmap_mode="r")
        ours = Volume.open(result).read()
        row["correlation_with_monai"] = float(
            np.corrcoef(ours[:, ::4, ::4, ::4].ravel(), theirs[:, ::4, ::4, ::4].ravel())[0, 1]
        )
    return row


def alternate(given: argparse.Namespace) -> list[dict[str, Any]]:
    """All of it in one process, tool after tool, many short turns: for a machine whose speed changes by the minute."""
    prepare(given.work, given.side, given.widths)
    sys.path.insert(0, str(given.monai))
    rows = []
    for turn in range(given.repeats + 1):
        for name in given.runs:
            act = _monai if name.endswith("MONAI") else _comir
            wall, cpu, _ = act(given.work, given.side, name.startswith("equal"))
            if turn:  # the first turn prepares kernels
                rows.append(
                    {"repeat": turn, "name": name, "seconds": wall, "cpu_seconds": cpu, "peak_mib": 0.0}
                )
                print(rows[-1], flush=True)
    return rows


def compare(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Take turns, each a process of its own."""
    prepare(given.work, given.side, given.widths)
    rows = []
    environment = {**os.environ, "PYTHONPATH": str(given.monai)}
    for repeat in range(given.repeats):
        for name in given.runs:
            command = [sys.executable, __file__, "one", name, str(given.work), str(given.side)]
            rows.append({"repeat": repeat, **measured_apart(command, environment)})
    return rows


def medians(given: argparse.Namespace, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a run: medians of seconds, and ratios to MONAI in the same turn."""
    table = []
    for name in given.runs:
        own = [row for row in rows if row["name"] == name]
        peer = {row["repeat"]: row for row in rows if row["name"] == name.split(",")[0] + ", MONAI"}
        line: dict[str, Any] = {
            "name": name,
            "side": given.side,
            "widths": " ".join(map(str, given.widths)),
            "threads": os.environ.get("OMP_NUM_THREADS", "all"),
            "turns": f"{len(own)}, {'in one process' if given.verb == 'alternate' else 'a process each'}",
        }
        for key in ("seconds", "cpu_seconds"):
            line[key] = round(statistics.median(row[key] for row in own), 1)
            ratios = [peer[row["repeat"]][key] / row[key] for row in own if row["repeat"] in peer]
            line[f"{key.removesuffix('seconds')}speed_over_monai"] = round(statistics.median(ratios), 3)
        line["voxels_per_cpu_second"] = round(given.side**3 / line["cpu_seconds"])
        line["peak_mib"] = round(max(row["peak_mib"] for row in own)) or ""
        line["correlation_with_monai"] = own[0].get("correlation_with_monai", "")
        table.append(line)
    return table


def main() -> None:
    """Parse, measure, add to the table."""
    parser, verbs = verbs_of(__doc__)
    one = verbs.add_parser("one")
    one.add_argument("name", choices=RUNS)
    one.add_argument("work", type=Path)
    one.add_argument("side", type=int)
    many = verbs.add_parser("compare")
    short = verbs.add_parser("alternate")
    for verb in (many, short):
        verb.add_argument("--work", type=Path, required=True)
        verb.add_argument("--monai", type=Path, required=True, help="folder that monai was installed into")
        verb.add_argument("--side", type=int, default=512)
        verb.add_argument("--widths", type=int, nargs="+", default=[8, 16])
        verb.add_argument("--repeats", type=int, default=1)
        verb.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS)
        verb.add_argument("--out", type=Path, required=True, help="lines are added to it")
    given = parser.parse_args()
    if given.verb == "one":
        print(json.dumps(measure(given.name, given.work, given.side)))
        return
    table = medians(given, alternate(given) if given.verb == "alternate" else compare(given))
    add_rows(given.out, table, list(table[0]), digits=6)


if __name__ == "__main__":
    main()
