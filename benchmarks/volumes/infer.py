r"""What `infer` promises about volumes larger than memory, measured: resume after kills, and memory against size.

    export OMP_NUM_THREADS=1
    python benchmarks/volumes/infer.py resume --kills 20 --out benchmarks/volumes/infer_resume.csv
    python benchmarks/volumes/infer.py memory --sides 256 512 1024 --out benchmarks/volumes/infer_memory.csv \
        --figure benchmarks/volumes/infer_memory.png
    python benchmarks/volumes/infer.py parts --side 384 --out benchmarks/volumes/infer_parts.csv

`resume` kills the same command with SIGKILL at a random moment, again and again, until it has been killed as often as
asked and has then finished, and compares every file with those of an undisturbed run. `memory` encodes volumes whose
specimen has the same size in all of them, so that only the volume grows. `parts` runs the same work as one process and
as two, started together; where the cores are shared with others, processor seconds say what the wall clock cannot:
the longer part over the one process is the time that two free cores would take. The weights are those of two training
steps: what they are does not matter here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rows import verbs_of, write_rows


def make_run(folder: Path, **settings_changed: object) -> Path:
    """Train two steps of a network, the default one unless changed, on generated phantoms."""
    from comir_hpc.config import TrainSettings
    from comir_hpc.data.embedded import phantom_pair
    from comir_hpc.ingest import ingest_array
    from comir_hpc.space.grid import Grid
    from comir_hpc.train import train

    grid = Grid((48, 48, 48), (1.0, 1.0, 1.0))
    for name, values in zip(("one", "two"), phantom_pair(grid.shape_zyx), strict=True):
        ingest_array(values, grid, folder / f"{name}.zarr")
    settings = TrainSettings(
        modalities=("one", "two"),
        pairs=({"one": folder / "one.zarr", "two": folder / "two.zarr"},),
        optimiser={"steps": 2},
        sampling={"pairs_per_step": 2},
        tracking={"mlflow": None},
        **settings_changed,
    )
    train(settings, folder / "run")
    return folder / "run"


def ball(path: Path, side: int, radius: int = 96) -> Path:
    """Write a volume of side^3 with a ball of noise in its middle, block by block."""
    from comir_hpc.space.grid import Grid
    from comir_hpc.space.plan import plan_blocks
    from comir_hpc.volumes.volume import Volume

    volume = Volume.create(path, Grid((side,) * 3, (1.0, 1.0, 1.0)), np.uint16, chunk=64, shard=128)
    for block in plan_blocks((side,) * 3, volume.shard_zyx):
        z, y, x = (
            np.arange(a, b) - side / 2 for a, b in zip(block.write.start, block.write.stop, strict=True)
        )
        inside = z[:, None, None] ** 2 + y[:, None] ** 2 + x**2 < radius**2
        noise = np.random.default_rng(block.index).integers(500, 1500, inside.shape)
        volume.write(block.write, np.where(inside, noise, 0).astype(np.uint16)[None])
    statistics = {"low": 500.0, "high": 1500.0, "mean": 1000.0, "std": 290.0, "foreground_above": 100.0}
    volume.finish(intensity=[statistics], value_range=[[0, 1500]])
    return path


def encode(source: Path, run: Path, out: Path, **options: object) -> None:
    """Run `infer` in this process and print what it measured."""
    from comir_hpc.config import InferSettings
    from comir_hpc.host.memory import peak_bytes
    from comir_hpc.infer import infer

    settings = InferSettings(zarr=source, model=run, modality="one", out=out, device="cpu", **options)
    begun = time.process_time()
    result = infer(settings, progress=lambda what, done, total: print(f"{done}/{total}", flush=True))
    print(
        json.dumps(
            {
                "seconds": result.seconds,
                "cpu_seconds": time.process_time() - begun,
                "peak_mib": peak_bytes() / 2**20,
                "seam": result.seam,
            }
        )
    )


def start(source: Path, run: Path, out: Path, **options: object) -> subprocess.Popen[str]:
    """Run `encode` in a process of its own."""
    command = [sys.executable, __file__, "encode", str(source), str(run), str(out), json.dumps(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")


def stored(path: Path) -> dict[str, bytes]:
    """Every file that holds voxels, by name."""
    files = (p for p in path.rglob("*") if p.is_file() and p.name != "zarr.json")
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


def resume(folder: Path, kills: int) -> list[dict[str, object]]:
    """Kill, run again, compare."""
    run, rng = make_run(folder), np.random.default_rng(0)
    options = {"window": 16, "chunk": 8, "shard": 16, "core": 16, "precision": "fp32"}
    source = ball(folder / "ball.zarr", side=160, radius=110)
    reference, out = folder / "reference.zarr", folder / "out.zarr"
    start(source, run, reference, **options).communicate()
    rows: list[dict[str, object]] = []
    while len(rows) < kills:
        process = start(source, run, out, **options)
        assert process.stdout is not None
        before = process.stdout.readline().strip()  # blocks done when it began
        time.sleep(rng.uniform(0, 0.5))
        killed = process.poll() is None
        process.kill()
        process.wait()
        if not killed:
            break
        rows.append({"kill": len(rows) + 1, "blocks_done_before": before})
    start(source, run, out, **options).communicate()
    finished: Counter[int] = Counter()
    for journal in out.with_name(out.name + ".ledger").glob("*.jsonl"):
        for line in journal.read_text(errors="replace").splitlines():
            if line.endswith("}") and '"state":"done"' in line:
                finished[json.loads(line)["block"]] += 1
    same = stored(out) == stored(reference)
    twice = sum(count > 1 for count in finished.values())
    for row in rows:
        row.update(blocks=len(finished), byte_equal_at_the_end=same, finished_blocks_computed_twice=twice)
    return rows


def parts(folder: Path, side: int, widths: list[int]) -> list[dict[str, object]]:
    """One process, then two that do half of the blocks each."""
    from brains import brains

    from comir_hpc.ingest import ingest_array
    from comir_hpc.space.grid import Grid

    run = make_run(folder, network={"widths": tuple(widths)})
    source = folder / "brains.zarr"
    ingest_array(brains((side,) * 3), Grid((side,) * 3, (1.0, 1.0, 1.0)), source)
    rows: list[dict[str, object]] = []
    for count in (1, 2):
        begun, out = time.perf_counter(), folder / f"out{count}.zarr"
        options = {"skip_background": False, "shard": 64, "core": 64}
        running = [start(source, run, out, part=[n + 1, count], **options) for n in range(count)]
        measured = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
        rows.append(
            {
                "side": side,
                "widths": " ".join(map(str, widths)),
                "processes": count,
                "seconds": round(time.perf_counter() - begun, 1),
                "longest_part_cpu_seconds": round(max(m["cpu_seconds"] for m in measured), 1),
                "all_cpu_seconds": round(sum(m["cpu_seconds"] for m in measured), 1),
                "byte_equal": stored(out) == stored(folder / "out1.zarr"),
            }
        )
        print(rows[-1], flush=True)
    return rows


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Peak memory against the number of voxels."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    axes.plot([row["side"] for row in rows], [row["peak_mib"] for row in rows], "o-")
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["side"] for row in rows], [f"{row['side']}³" for row in rows])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("voxels")
    axes.set_ylabel("peak memory, MiB")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def memory(folder: Path, sides: list[int], radius: int) -> list[dict[str, object]]:
    """Encode balls in volumes of several sizes."""
    run, rows = make_run(folder), []
    for side in sides:
        source = ball(folder / f"ball{side}.zarr", side, radius)
        begun = time.perf_counter()
        process = start(source, run, folder / f"out{side}.zarr")
        output, _ = process.communicate()
        measured = json.loads(output.splitlines()[-1])
        made = json.loads((folder / f"out{side}.zarr" / "zarr.json").read_text())["attributes"]["comir"]
        rows.append(
            {
                "side": side,
                "voxels": side**3,
                "windows": made["measured"]["windows"],
                "empty_windows": made["measured"]["empty_windows"],
                "peak_mib": round(measured["peak_mib"]),
                "seconds": round(time.perf_counter() - begun, 1),
                "seam_blocks": measured["seam"]["blocks"] and round(measured["seam"]["blocks"], 4),
                "seam_windows": measured["seam"]["windows"] and round(measured["seam"]["windows"], 4),
                "threads": os.environ.get("OMP_NUM_THREADS", "all"),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Parse, measure, write the table."""
    parser, verbs = verbs_of(__doc__)
    one = verbs.add_parser("encode")
    for name in ("source", "model", "out"):
        one.add_argument(name, type=Path)
    one.add_argument("options", type=json.loads)
    two = verbs.add_parser("resume")
    two.add_argument("--kills", type=int, default=20)
    three = verbs.add_parser("memory")
    three.add_argument("--sides", type=int, nargs="+", default=[256, 512, 1024])
    three.add_argument("--radius", type=int, default=96, help="of the specimen, voxels")
    three.add_argument("--figure", type=Path)
    four = verbs.add_parser("parts")
    four.add_argument("--side", type=int, default=256)
    four.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 64])
    for verb in (two, three, four):
        verb.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.verb == "encode":
        return encode(given.source, given.model, given.out, **given.options)
    with tempfile.TemporaryDirectory() as folder:
        act = {
            "resume": lambda: resume(Path(folder), given.kills),
            "memory": lambda: memory(Path(folder), given.sides, given.radius),
            "parts": lambda: parts(Path(folder), given.side, given.widths),
        }
        rows = act[given.verb]()
    if given.verb == "memory" and given.figure:
        draw(rows, given.figure)
    write_rows(given.out, rows)
    return None


if __name__ == "__main__":
    main()
