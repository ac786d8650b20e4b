"""Show that a change of the code's structure changes no result: digests of what the verbs compute, by the command line.

It ingests the embedded pair, trains ten steps, encodes, registers (learned, and mutual information) and warps, and
writes one row a result. Seeds are fixed. Everything runs on one core: with several threads, mutual information is
summed in the order of the threads, and its last digits differ from run to run. Run it before and after, and compare:

    python benchmarks/house/bits.py benchmarks/house/after.csv

Another checkout is measured with ``--package FOLDER``, the folder that holds ``comir_hpc``. Only the command line and
files of open formats are used, so the same script reads every version. Voxels are compared, not the bytes of the store:
a checksum or another codec may change these.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import zarr

HERE = Path(__file__).resolve().parents[2]
NOT_COMPARED = {
    "peak_memory_mib",
    "timings_s",
    "versions",
    "inputs",
    "settings",
    "model",
    "run",
    "fingerprint",
    "format",
    "notes",
}


def main() -> None:
    """Run every verb in an empty folder and write the digests."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="CSV to write")
    parser.add_argument("--package", type=Path, default=HERE, help="folder that holds comir_hpc")
    parser.add_argument("--core", type=int, default=0, help="processor core that everything runs on")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {arguments.core})
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(arguments.package.resolve(), Path(folder))
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        file.write(
            f"# python benchmarks/house/bits.py {arguments.out.name}, of {version(arguments.package)}\n"
        )
        csv.writer(file).writerows([("result", "value"), *rows])


def measured(package: Path, folder: Path) -> list[tuple[str, str]]:
    """Names of results and their digests or values."""
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}

    def run(*words: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "comir_hpc", *words], cwd=folder, env=environment, capture_output=True,
            text=True, encoding="utf-8", check=False,
        )  # fmt: skip
        # A registration with encoders of ten steps may FAIL (exit code 1): its numbers count all the same.
        if done.returncode and words[0] != "register":
            raise SystemExit(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")

    data = package / "comir_hpc" / "data"
    embedded = data if (data / "t1w.nii.gz").is_file() else data / "embedded"
    for name in ("t1w", "t2w"):
        run("ingest", str(embedded / f"{name}.nii.gz"), f"{name}.zarr")
    (folder / "pair.yaml").write_text(
        "modalities: [t1w, t2w]\npairs:\n  - {t1w: t1w.zarr, t2w: t2w.zarr}\ntracking: {mlflow: null}\n"
    )
    run("train", "pair.yaml", "--run", "run", "--set", "optimiser.steps=10", "--set", "engine.precision=fp32",
        "--set", "tracking.log_every=1")  # fmt: skip
    rows = [(f"loss of step {step}", repr(loss)) for step, loss in losses(folder / "run" / "metrics.jsonl")]
    for name in ("t1w", "t2w"):
        run(
            "infer",
            "--zarr",
            f"{name}.zarr",
            "--model",
            "run",
            "--modality",
            name,
            "--out",
            f"{name}_map.zarr",
        )
        rows += [(f"ingest {name} level {k}", v) for k, v in voxels(folder / f"{name}.zarr")]
        rows += [(f"infer {name} level {k}", v) for k, v in voxels(folder / f"{name}_map.zarr")]
    pair = ("register", "--fixed", "t1w.zarr", "--moving", "t2w.zarr", "--rotations", "300")
    model = ("--model", "run", "--fixed-modality", "t1w", "--moving-modality", "t2w")
    run(*pair, *model, "--out", "learned")
    run(*pair, "--representation", "intensity", "--out", "intensity")
    for name in ("learned", "intensity"):
        record = json.loads((folder / name / "result.json").read_text(encoding="utf-8"))
        # Four decimals before 9690f47, five digits since: compared by what both have.
        record["reference_agreement"] = record["reference_agreement"] and round(
            record["reference_agreement"], 3
        )
        rows += [(f"register {name}: {key}", text(record[key])) for key in sorted(set(record) - NOT_COMPARED)]
    for interpolation in ("linear", "cubic"):
        out = f"warped_{interpolation}.zarr"
        run("warp", "--zarr", "t2w.zarr", "--transform", "intensity/transform.tfm", "--like", "t1w.zarr",
            "--interpolation", interpolation, "--out", out)  # fmt: skip
        rows += [(f"warp {interpolation} level {k}", v) for k, v in voxels(folder / out)]
    return rows


def version(package: Path) -> str:
    """Name the commit of a checkout."""
    said = subprocess.run(
        ["git", "-C", str(package), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, encoding="utf-8",
        check=False,
    )  # fmt: skip
    return said.stdout.strip() or "no commit"


def losses(metrics: Path) -> list[tuple[int, float]]:
    """Step and loss of each line that has both."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line and "step" in line]


def voxels(store: Path) -> list[tuple[str, str]]:
    """Level and digest of its voxels, as zarr-python reads them."""
    group = zarr.open_group(str(store), mode="r")
    return [
        (name, hashlib.sha256(np.ascontiguousarray(np.asarray(group[name])).tobytes()).hexdigest()[:16])
        for name in sorted(group.array_keys())
    ]


def text(value: Any) -> str:
    """A short text, or the digest of a long one."""
    written = json.dumps(value, sort_keys=True)
    return written if len(written) < 80 else hashlib.sha256(written.encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
