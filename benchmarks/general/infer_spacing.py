r"""What it costs `infer` that a volume has another spacing than the model: time for a voxel, and memory against size.

    export OMP_NUM_THREADS=1
    python benchmarks/general/infer_spacing.py speed --side 160 --turns 2 --out benchmarks/general/infer_spacing.csv
    python benchmarks/general/infer_spacing.py memory --sides 128 256 384 \
        --out benchmarks/general/infer_spacing_memory.csv

`speed` encodes noise that fills the volume, so that every window counts, with the general model on one working grid of
`side` voxels. The volume has the grid's spacing (read as it is), or voxels that are finer or coarser by a factor, and
thick slices. A turn is a process each, in turn; compared are the seconds of the processor, of all threads together.
`memory` encodes a ball of fixed size in growing volumes whose voxels are 1.5 times finer than the grid.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rows import measured_apart, verbs_of, write_rows

KINDS = {
    "the grid's": (1.0, 1.0, 1.0), "finer, 1.25": (0.8, 0.8, 0.8), "finer, 1.9": (1 / 1.9,) * 3,
    "finer, 3": (1 / 3,) * 3, "coarser, 1.6": (1.6, 1.6, 1.6), "thick slices": (4.0, 0.9, 0.9),
}  # fmt: skip


def write(
    path: Path, shape: tuple[int, int, int], spacing: tuple[float, float, float], radius_mm: float
) -> Path:
    """Write noise in a ball, block by block; what lies outside the radius is 0."""
    from comir_hpc.space.grid import Grid
    from comir_hpc.space.plan import plan_blocks
    from comir_hpc.volumes.volume import Volume

    volume = Volume.create(path, Grid(shape, spacing), np.uint16, chunk=64, shard=128)
    for block in plan_blocks(shape, volume.shard_zyx):
        box = block.write
        z, y, x = (
            (np.arange(a, b) - (n - 1) / 2) * s
            for a, b, n, s in zip(box.start, box.stop, shape, spacing, strict=True)
        )
        inside = z[:, None, None] ** 2 + y[:, None] ** 2 + x**2 < radius_mm**2
        noise = np.random.default_rng(block.index).integers(500, 1500, inside.shape)
        volume.write(box, np.where(inside, noise, 0).astype(np.uint16)[None])
    volume.build_pyramid()
    statistics = {"low": 500.0, "high": 1500.0, "mean": 1000.0, "std": 290.0, "foreground_above": 100.0}
    volume.finish(intensity=[statistics], value_range=[[0, 1500]])
    return path


def encode(source: Path, out: Path, options: dict[str, object]) -> None:
    """Run `infer` in this process and print what it took, without what it takes to start."""
    from comir_hpc.config import InferSettings
    from comir_hpc.host.memory import peak_bytes
    from comir_hpc.infer import infer
    from comir_hpc.runs.model import general_model

    settings = InferSettings(
        zarr=source, model=general_model(), modality="any", out=out, device="cpu", spacing=1.0, overwrite=True,
        **options,
    )  # fmt: skip
    begun = time.process_time()
    result = infer(settings)
    row = {
        "grid": " x ".join(map(str, result.grid.shape_zyx)),
        "seconds": round(result.seconds, 2),
        "cpu_seconds": round(time.process_time() - begun, 2),
        "peak_mib": round(peak_bytes() / 2**20),
    }
    print(json.dumps(row))


def run(source: Path, out: Path, **options: object) -> dict[str, object]:
    """Encode in a process of its own."""
    command = [sys.executable, __file__, "encode", str(source), str(out), json.dumps(options)]
    return measured_apart(command)


def speed(folder: Path, side: int, turns: int) -> list[dict[str, object]]:
    """Encode the same extent with voxels of several sizes, several times in turn."""
    sources = {
        name: write(
            folder / f"{number}.zarr",
            tuple(max(1, round(side / s)) for s in spacing),  # type: ignore[arg-type]
            spacing,
            10 * side,
        )
        for number, (name, spacing) in enumerate(KINDS.items())
    }
    rows: list[dict[str, object]] = []
    for turn in range(turns):
        for name, source in sources.items():
            spacing = " x ".join(f"{s:.3g}" for s in KINDS[name])
            found = run(source, folder / "out.zarr", skip_background=False, precision="bf16")
            rows.append({"turn": turn + 1, "voxels": name, "spacing": spacing, **found})
            print(rows[-1], flush=True)
    best = {name: min(float(str(r["cpu_seconds"])) for r in rows if r["voxels"] == name) for name in KINDS}
    return [
        {
            **row,
            "voxels_per_second_over_the_grids_own": round(best["the grid's"] / best[str(row["voxels"])], 3),
        }
        for row in rows
    ]


def memory(folder: Path, sides: list[int]) -> list[dict[str, object]]:
    """Encode a ball of 40 mm in volumes of several sizes."""

    def of(side: int) -> dict[str, object]:
        source = write(folder / f"{side}.zarr", (side,) * 3, (1 / 1.5,) * 3, 40)
        row = {"side": side, "voxels": side**3, **run(source, folder / "out.zarr")}
        print(row, flush=True)
        return row

    return [of(side) for side in sides]


def main() -> None:
    """Parse, measure, write the table."""
    parser, verbs = verbs_of(__doc__)
    one = verbs.add_parser("encode")
    one.add_argument("source", type=Path)
    one.add_argument("target", type=Path)
    one.add_argument("options", type=json.loads)
    two = verbs.add_parser("speed")
    two.add_argument("--side", type=int, default=160)
    two.add_argument("--turns", type=int, default=2)
    three = verbs.add_parser("memory")
    three.add_argument("--sides", type=int, nargs="+", default=[128, 256, 384])
    for verb in (two, three):
        verb.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.verb == "encode":
        return encode(given.source, given.target, given.options)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        rows = speed(place, given.side, given.turns) if given.verb == "speed" else memory(place, given.sides)
    write_rows(given.out, rows)
    return None


if __name__ == "__main__":
    main()
