"""Measure the memory of `refine` at several sizes of the volume, with blocks of one size.

    export OMP_NUM_THREADS=1
    python benchmarks/deform/blockwise_memory.py --sizes 128 256 --work WORK --out OUT

The volumes are cubes with a ball of texture in the middle, of the same size in all of them, and the same shifted by a
voxel along each axis. So the number of blocks rises with the volume, and the work hardly does: blocks outside of the
ball hold no specimen. The volumes are written shard by shard, so that 512 and 1024 fit on any machine with the disk
for them. The coarse solution is the identity. Each run is a process of its own; its peak is what the kernel tells.

Columns: ``predicted_mib`` is what ``--dry-run`` says, ``peak_mib`` what was needed, ``volume_mib`` one volume as
float32 in memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rows import add_rows, done_in, options_of
from scipy import ndimage

from comir_hpc.config import RefineSettings
from comir_hpc.host.memory import peak_bytes
from comir_hpc.register.blockwise import refine
from comir_hpc.runs.record import make_record
from comir_hpc.runs.result import Result, write_result
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Affine, save_transform
from comir_hpc.volumes.volume import Intensity, Volume

COLUMNS = (
    "size", "block", "smoothness_vox", "blocks", "kept", "fell_back", "refused", "no_content", "predicted_mib",
    "peak_mib", "volume_mib", "field_mib", "seconds",
)  # fmt: skip
TILE, SHARD = 64, 64


def made(path: Path, size: int, radius: int, shift: int) -> Volume:
    """Write a cube with a ball of texture in its middle, shard by shard; `shift` voxels along each axis."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((TILE,) * 3), 2.0, mode="wrap")
    tile = (1000 + 150 * noise / noise.std()).clip(1).astype(np.uint16)
    volume = Volume.create(path, Grid((size,) * 3, (1.0, 1.0, 1.0)), np.uint16, chunk=32, shard=SHARD)
    axis = np.arange(size) - shift
    for box in volume.level_shards(0):
        z, y, x = (axis[s] for s in box.slices)
        away = sum(
            (c.reshape([-1 if n == k else 1 for n in range(3)]) - size / 2) ** 2
            for k, c in enumerate((z, y, x))
        )
        values = tile[np.ix_(z % TILE, y % TILE, x % TILE)] * (away < radius**2)
        volume.write(box, values[None].astype(np.uint16))
    volume.build_pyramid()
    volume.finish(intensity=[asdict(Intensity(100.0, 1600.0, 1000.0, 150.0, 100.0))])
    return Volume.open(path)


def registered(folder: Path, fixed: Volume, moving: Volume) -> None:
    """Write a registration whose answer is the identity."""
    save_transform(Affine.identity(), folder)
    inputs = {
        role: {"path": str(v.path), "fingerprint": v.fingerprint(), "grid": v.grid.as_dict()}
        for role, v in (("fixed", fixed), ("moving", moving))
    }
    record = {
        "verdict": "PASS", "inputs": inputs, "matrix_lps_mm": np.eye(4).tolist(),
        "settings": {"representation": "intensity"},
    }  # fmt: skip
    write_result(folder, make_record(Result, record))


def alone(settings: dict) -> None:
    """Refine in this process, and print what it needed."""
    start = time.perf_counter()
    done = refine(RefineSettings(**settings))
    assert done.predicted is not None
    field = sum(f.stat().st_size for f in done.path.rglob("*") if f.is_file())
    said = {
        "states": done.states, "predicted": done.predicted.peak_bytes, "peak": peak_bytes(), "field": field,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip
    print(json.dumps(said))


def main() -> None:
    """Run what is not in the table yet."""
    if sys.argv[1:2] == ["run"]:
        return alone(json.loads(sys.argv[2]))
    parser = options_of(__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 256, 512, 1024])
    parser.add_argument("--radius", type=int, default=24, help="of the ball, in voxels")
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--smoothness", type=float, default=3.0, help="voxels")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    done = done_in(asked.out, COLUMNS[:3])
    for size in asked.sizes:
        key = (str(size), str(asked.block), str(asked.smoothness))
        if key in done:
            continue
        folder = asked.work / f"{size}-{asked.block}"
        if not (folder / "result.json").exists():
            sides = [
                made(folder / f"{name}.zarr", size, asked.radius, shift)
                for name, shift in (("fixed", 0), ("moving", 1))
            ]
            registered(folder, *sides)
        given = {
            "result": str(folder), "out": str(folder / "field.zarr"), "smoothness_mm": asked.smoothness,
            "block": asked.block, "overwrite": True,
        }  # fmt: skip
        words = [sys.executable, __file__, "run", json.dumps(given)]
        ended = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", check=False)
        if ended.returncode:
            raise SystemExit(ended.stderr[-2000:])
        said = json.loads(ended.stdout.splitlines()[-1])
        states = {name.replace(" ", "_"): count for name, count in said["states"].items()}
        row = dict(zip(COLUMNS[:3], key, strict=True)) | states | {
            "blocks": sum(states.values()), "predicted_mib": said["predicted"] >> 20, "peak_mib": said["peak"] >> 20,
            "volume_mib": 4 * size**3 >> 20, "field_mib": said["field"] / 2**20, "seconds": said["seconds"],
        }  # fmt: skip
        add_rows(asked.out, [row], COLUMNS)
        print(row, flush=True)


if __name__ == "__main__":
    main()
