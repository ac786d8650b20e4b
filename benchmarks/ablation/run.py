"""One factor at a time around the defaults, at an equal short budget.

    python benchmarks/ablation/run.py --work WORKDIR --out benchmarks/ablation/ablation.csv

For each row and training seed: `comir-hpc train` on the embedded pair, `evaluate --model` (equivariance, agreement,
rank, the aligned pair from the identity), and `register` of two displaced T2w volumes, anywhere in SO(3), held against
their known transforms. Every row that is done stays done (WORKDIR/ROW-seedS/row.json): a stopped run continues, and
the CSV is written anew after each row. Where the network is another one, the steps are scaled so that the row costs
the processor time of the default's. All is measured on the specimen that was trained on: it compares settings, and
says nothing of other specimens.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import yaml

from comir_hpc.config import IngestSettings
from comir_hpc.data.embedded import Displacement, degrade, displace, embedded_volume, write_nifti
from comir_hpc.ingest import ingest
from comir_hpc.transforms import save_transform
from comir_hpc.volumes.volume import Volume

SIDE = 112
CASES = (100, 101)  # seeds of the displacements; the demo's are 0 to 19
ROWS: dict[str, dict] = {
    "default": {},
    "kernels free": {"network": {"kernels": "free"}},
    "kernels free, group none": {"network": {"kernels": "free"}, "sampling": {"group": "trivial"}},
    "kernels free, group D4": {"network": {"kernels": "free"}, "sampling": {"group": "D4"}},
    "group D4": {"sampling": {"group": "D4"}},
    "padding zeros": {"network": {"padding": "zeros"}},
    "critic mse": {"loss": {"critic": "mse"}},
    "critic cosine": {"loss": {"critic": "cosine"}},
    "critic tanimoto": {"loss": {"critic": "tanimoto"}},
    "no displacement negatives": {"loss": {"displacement_negatives": 0}},
    "gunet": {"network": {"name": "gunet"}},
    "denseunet": {"network": {"name": "denseunet"}},
    "temperature 0.05": {"loss": {"temperature": 0.05}},
    "temperature 0.2": {"loss": {"temperature": 0.2}},
    "bound jsd": {"loss": {"bound": "jsd"}},
    "bound nwj": {"loss": {"bound": "nwj"}},
    "latent 2": {"network": {"latent_channels": 2}},
    "latent 4": {"network": {"latent_channels": 4}},
    "kernels free, averaged over O": {"of": "kernels free", "symmetrise": "O"},
}
COLUMNS = (
    "row", "train_seed", "steps", "train_cpu_s", "parameters", "e_t1w", "e_t2w", "so3_t1w", "so3_t2w", "agreement",
    "retrieval", "rank_t1w", "rank_t2w", "bias_voxels", "bias_deg", "tre_voxels_1", "tre_voxels_2", "verdict_1",
    "verdict_2",
)  # fmt: skip


def comir(*words: object, allowed: tuple[int, ...] = (0,)) -> float:
    """Run one verb; its processor seconds."""
    command = [sys.executable, "-m", "comir_hpc", *map(str, words)]
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert child.stderr is not None
    error = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if os.waitstatus_to_exitcode(status) not in allowed:
        raise SystemExit(f"{' '.join(command)} failed:\n{error[-3000:]}")
    return usage.ru_utime + usage.ru_stime


def prepare(work: Path) -> None:
    """The aligned pair, and the displaced volumes with their truths."""
    for name in ("t1w", "t2w"):
        ingest(IngestSettings(source=embedded_volume(name), out=work / f"{name}.zarr"))
    aligned = Volume.open(work / "t2w.zarr")
    for seed in CASES:
        truth = work / f"truth{seed}"
        if not (truth / "transform.tfm").is_file():
            rng = np.random.default_rng(seed)
            drawn = Displacement.draw(rng, aligned.grid.shape_zyx)
            values, grid, transform = displace(aligned.read()[0], aligned.grid, drawn, SIDE)
            write_nifti(work / f"moving{seed}.nii.gz", degrade(values, rng), grid)
            save_transform(transform, truth, {"made_by": "benchmarks/ablation", "seed": seed})
        ingest(IngestSettings(source=work / f"moving{seed}.nii.gz", out=work / f"moving{seed}.zarr"))


def settings(work: Path, change: dict, seed: int, steps: int) -> dict:
    """Content of the YAML for `train`."""
    pair = {name: str(work / f"{name}.zarr") for name in ("t1w", "t2w")}
    base = {
        "modalities": ["t1w", "t2w"],
        "pairs": [pair],
        "seed": seed,
        "optimiser": {"steps": steps},
        "tracking": {"mlflow": None, "picture_every": steps},
        "checkpoint": {"every_steps": steps},
    }
    return base | {part: base.get(part, {}) | values for part, values in change.items()}


def train(folder: Path, record: dict) -> float:
    """Train with these settings, unless done; processor seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.yaml").write_text(yaml.safe_dump(record), encoding="utf-8")
    return comir("train", folder / "train.yaml", "--run", folder / "run")


def step_seconds(work: Path, name: str, change: dict) -> float:
    """Processor seconds of a training step, kept in a file: the difference of two short runs."""
    path = work / f"step-{name}.json"
    if not path.is_file():
        spent = [
            train(work / f"step-{name}-{steps}", settings(work, change, 0, steps)) / 8 for steps in (2, 10)
        ]
        path.write_text(json.dumps(spent[1] - spent[0]), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def row(work: Path, name: str, seed: int, steps: int) -> None:
    """Fill WORKDIR/ROW-seedS/row.json."""
    change = dict(ROWS[name])
    averaged = change.pop("symmetrise", "none")
    folder = work / f"{name.replace(' ', '_').replace(',', '')}-seed{seed}"
    if (folder / "row.json").is_file():
        return
    start = time.perf_counter()
    trained = work / f"{change.pop('of', name).replace(' ', '_').replace(',', '')}-seed{seed}"
    if "name" in change.get("network", {}):
        steps = round(steps * step_seconds(work, "default", {}) / step_seconds(work, name, change))
    spent = 0.0
    if not (trained / "run" / "model.json").is_file():
        spent = train(trained, settings(work, change, seed, steps))
    run = trained / "run"
    model = json.loads((run / "model.json").read_text(encoding="utf-8"))
    found: dict = {"row": name, "train_seed": seed, "steps": model["step"]}
    found["train_cpu_s"] = round(spent, 1) or None
    found["parameters"] = parameters(run / "model" / "t1w.pt")
    if averaged == "none":
        comir("evaluate", "--model", run, "--angle-step", 45, "--cubes", 1)
        found |= figures(run)
    for number, case in enumerate(CASES, 1):
        found |= displaced(work, run, folder, number, case, averaged)
    (folder / "row.json").write_text(json.dumps(found), encoding="utf-8")
    print(f"{name}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)


def parameters(path: Path) -> int:
    """Trainable numbers in a file of weights."""
    import torch

    state = torch.load(path, weights_only=True)
    return sum(v.numel() for k, v in state.items() if "running" not in k and "num_batches" not in k)


def figures(run: Path) -> dict:
    """What `evaluate --model` wrote."""
    record = json.loads(
        next((run / "diagnostics").glob("step-*/diagnostics.json")).read_text(encoding="utf-8")
    )
    found = {"agreement": record["agreement"], "retrieval": record["patches"]["retrieval"]}
    for name, one in record["modalities"].items():
        found |= {
            f"e_{name}": one["equivariance"]["worst"],
            f"so3_{name}": one["so3"]["mean"],
            f"rank_{name}": one["effective_rank"],
        }
    bias = record["bias"] or {}
    return found | {"bias_voxels": bias.get("voxels"), "bias_deg": bias.get("degrees")}


def displaced(work: Path, run: Path, folder: Path, number: int, case: int, averaged: str) -> dict:
    """Register one displaced volume, from representations averaged over a group on request."""
    out = folder / f"case{case}"
    extra: list[object] = []
    if averaged != "none":
        for role, store, modality in (("fixed", "t1w", "t1w"), ("moving", f"moving{case}", "t2w")):
            representation = folder / f"{store}.zarr"
            comir("infer", "--zarr", work / f"{store}.zarr", "--model", run, "--modality", modality,
                  "--out", representation, "--symmetrise", averaged)  # fmt: skip
            extra += [f"--{role}-representation", representation]
    comir("register", "--fixed", work / "t1w.zarr", "--moving", work / f"moving{case}.zarr", "--model", run,
          "--fixed-modality", "t1w", "--moving-modality", "t2w", "--out", out, *extra, allowed=(0, 1))  # fmt: skip
    comir("evaluate", "--result", out, "--truth", work / f"truth{case}" / "transform.tfm")
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return {
        f"tre_voxels_{number}": result["truth"]["tre_voxels"],
        f"verdict_{number}": result["verdict"],
    }


def write_table(work: Path, out: Path) -> None:
    """All rows that are done, in the order of ROWS."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in work.glob("*-seed*/row.json")]
    rows.sort(key=lambda one: (list(ROWS).index(one["row"]), one["train_seed"]))
    with out.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for one in rows:
            table.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in one.items()})


def main() -> None:
    """Fill what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--steps", type=int, default=200, help="of the default; about 2 minutes on 2 quiet cores"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time; set OMP_NUM_THREADS accordingly")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    prepare(options.work)

    def one(name: str, seed: int) -> None:
        row(options.work, name, seed, options.steps)
        write_table(options.work, options.out)

    with ThreadPoolExecutor(options.jobs) as pool:
        for future in [pool.submit(one, name, seed) for seed in options.seeds for name in options.rows]:
            future.result()


if __name__ == "__main__":
    main()
