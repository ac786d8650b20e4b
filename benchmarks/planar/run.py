"""Single slices: train on some axial slices of the embedded pair, register others, displaced in their plane.

    python benchmarks/planar/run.py --work WORKDIR --out benchmarks/planar/results.csv
    python benchmarks/planar/run.py --work WORKDIR --out benchmarks/planar/results.csv --largest-deg 180 --seeds 5

One specimen. Test slices are z = 24, 36, 48, 60, 72 (voxels of 2 mm); training slices are those between 20 and 76 that
are at least four slices (8 mm) from every test slice. T1w is fixed; T2w is turned by up to 30 degrees either way (or
up to --largest-deg), shifted by up to 10 % of the side, resampled, given a bias field and noise, and only then encoded.
Beside the representations: mutual information with the same global search. Row by row, so that a stopped run continues.

`--methods comir_sift mutual_information_sift` start from SIFT keypoints, on the representations as in the CoMIR paper,
and on the gradients of the intensities; the refinement is the same as after the search. A registration without an
answer is a row without an error.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rows import add_rows, done_in, options_of, read_rows

from comir_hpc.config import IngestSettings, RegisterSettings, TrainSettings, load
from comir_hpc.data.embedded import Displacement, degrade, displace, embedded_volume, write_nifti
from comir_hpc.ingest import ingest, ingest_array
from comir_hpc.register import register
from comir_hpc.representations.features import specimen_mask
from comir_hpc.space.grid import Box, Grid
from comir_hpc.train import train
from comir_hpc.transforms import Transform
from comir_hpc.volumes.volume import Volume

TEST = (24, 36, 48, 60, 72)
TRAIN = tuple(z for z in range(20, 77) if min(abs(z - t) for t in TEST) >= 4)
LARGEST_SHIFT = 0.10  # of the mean side
SIDE = 144  # pixels of the second scanner: a turned and shifted head is not cut off
SUCCESS = 0.02  # of the mean side
METHODS = {
    "comir": ("comir", "global"),
    "mutual_information": ("intensity", "global"),
    "comir_sift": ("comir", "features"),
    "mutual_information_sift": ("intensity", "features"),
}
"""What is compared, and where the refinement starts."""
COLUMNS = (
    "method", "largest_deg", "z", "seed", "rotation_deg", "shift_vox", "verdict", "tre_mm", "tre_share", "corner_share",
    "success", "agreement", "margin", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A displaced slice with the answer."""

    moving: Path
    truth: Transform
    rotation_deg: float
    shift_vox: float


def slice_of(volume: Volume, z: int) -> tuple[np.ndarray, Grid]:
    """One axial slice (1, y, x) with its grid."""
    _, y, x = volume.grid.shape_zyx
    box = Box((z, 0, 0), (z + 1, y, x))
    return volume.read(box)[0], volume.grid.crop(box)


def prepare(work: Path) -> dict[str, Volume]:
    """The embedded pair, and every slice that is needed as a volume of its own."""
    pair = {}
    for name in ("t1w", "t2w"):
        ingest(IngestSettings(source=embedded_volume(name), out=work / f"{name}.zarr"))
        pair[name] = Volume.open(work / f"{name}.zarr")
        for z in (*TRAIN, *TEST):
            values, grid = slice_of(pair[name], z)
            ingest_array(values, grid, work / "slices" / f"{name}_{z}.zarr", name=f"{name}_{z}")
    return pair


def train_on_slices(work: Path, config: Path, overrides: list[str]) -> Path:
    """The run of encoders that were trained on the training slices, each a pair of its own."""
    if (work / "run" / "model.json").is_file():
        return work / "run"
    settings = load(TrainSettings, config, overrides)
    slices = work / "slices"
    pairs = tuple({name: slices / f"{name}_{z}.zarr" for name in settings.modalities} for z in TRAIN)
    start = time.perf_counter()
    result = train(settings.model_copy(update={"pairs": pairs}), work / "run")
    print(f"{result.summary} ({time.perf_counter() - start:.0f} s)", flush=True)
    return work / "run"


def displaced(work: Path, t2w: Volume, largest_deg: int, z: int, seed: int) -> Case:
    """The T2w slice as a second scanner sees it, through a NIfTI file as a user's would come."""
    rng = np.random.default_rng([seed, z, largest_deg])
    values, grid = slice_of(t2w, z)
    drawn = Displacement.in_plane(rng, grid.shape_zyx, largest_deg=largest_deg, largest_shift=LARGEST_SHIFT)
    moved, scanner, truth = displace(values, grid, drawn, SIDE)
    path = work / "moving" / f"turn{largest_deg}_z{z}_seed{seed}"
    path.parent.mkdir(exist_ok=True)
    if not path.with_suffix(".nii").exists():  # the store is made from this very file
        write_nifti(path.with_suffix(".part.nii"), degrade(moved, rng), scanner)
        path.with_suffix(".part.nii").replace(path.with_suffix(".nii"))
    ingest(IngestSettings(source=path.with_suffix(".nii"), out=path.with_suffix(".zarr")))
    return Case(path.with_suffix(".zarr"), truth, truth.rotation_deg, float(np.linalg.norm(drawn.shift_vox)))


def row_of(work: Path, run: Path, method: str, z: int, case: Case) -> dict:
    """Register one case, and measure it."""
    fixed = work / "slices" / f"t1w_{z}.zarr"
    common = {
        "fixed": fixed,
        "moving": case.moving,
        "out": work / "results" / f"{method}_{case.moving.stem}",
        "threads": 1,
    }
    representation, initial = METHODS[method]
    chosen = {"representation": representation, "initial": initial}
    if representation == "comir":
        chosen |= {"model": run, "fixed_modality": "t1w", "moving_modality": "t2w"}
    start = time.perf_counter()
    found = register(RegisterSettings(**common, **chosen, overwrite=True))
    seconds = time.perf_counter() - start
    row = {
        "method": method, "z": z, "rotation_deg": case.rotation_deg, "shift_vox": case.shift_vox,
        "verdict": found.verdict, "success": False, "seconds": seconds,
    }  # fmt: skip
    if found.transform is None:
        return row
    volume = Volume.open(fixed)
    side = volume.grid.mean_side_mm
    points = volume.grid.world_mm(np.argwhere(specimen_mask(volume, 0)))
    tre = float(found.transform.distance_mm(case.truth, points).mean())
    corner = float(found.transform.distance_mm(case.truth, volume.grid.corners_mm()).mean())
    return row | {
        "tre_mm": tre, "tre_share": tre / side, "corner_share": corner / side,
        "success": tre <= SUCCESS * side and corner <= SUCCESS * side,
        "agreement": found.agreement, "margin": found.margin,
    }  # fmt: skip


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a rate."""
    z, rate = 1.96, hits / count
    middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return float(middle - half), float(middle + half)


def summarise(out: Path) -> None:
    """Print rates and errors of each method."""
    rows = read_rows(out)
    for method, largest in dict.fromkeys((row["method"], row["largest_deg"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["largest_deg"]) == (method, largest)]
        hits = [row for row in mine if row["success"] == "True"]
        low, high = wilson(len(hits), len(mine))
        corners = sum(float(row["corner_share"] or "inf") <= SUCCESS for row in mine)
        tre = np.array([float(row["tre_mm"]) for row in mine if row["tre_mm"]] or [np.nan])
        verdicts = {v: sum(row["verdict"] == v for row in mine) for v in ("PASS", "WARN", "FAIL")}
        wrong = sum(row["verdict"] == "PASS" and row["success"] != "True" for row in mine)
        print(
            f"{method}, up to {largest} degrees: {len(hits)} of {len(mine)} within {SUCCESS:.0%} of the side "
            f"({low:.1%} to {high:.1%}), {corners} by the corners alone; TRE mm "
            f"median {np.median(tre):.3f}, 95th percentile {np.percentile(tre, 95):.3f}; {verdicts}, {wrong} wrong PASS"
        )


def main() -> None:
    """Fill the missing rows of the CSV."""
    parser = options_of(__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=10, help="displacements of each test slice")
    parser.add_argument("--first-seed", type=int, default=0, help="tuning used 100 and more")
    parser.add_argument(
        "--methods", nargs="+", choices=tuple(METHODS), default=["comir", "mutual_information"]
    )
    parser.add_argument("--largest-deg", type=int, default=30, help="turns, either way")
    parser.add_argument("--config", type=Path, default=Path(__file__).parents[2] / "configs" / "planar.yaml")
    parser.add_argument("--set", action="append", default=[], help="setting of the training, KEY=VALUE")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    pair = prepare(options.work)
    run = train_on_slices(options.work, options.config, options.set)
    done = done_in(options.out, ("method", "largest_deg", "z", "seed"))
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for z in TEST:
            for method in options.methods:
                key = {"method": method, "largest_deg": options.largest_deg, "z": z, "seed": seed}
                if tuple(map(str, key.values())) in done:
                    continue
                case = displaced(options.work, pair["t2w"], options.largest_deg, z, seed)
                row = {**row_of(options.work, run, method, z, case), **key}
                add_rows(options.out, [row], COLUMNS)
                shown = ("method", "z", "seed", "verdict", "tre_mm", "success")
                print({name: row.get(name) for name in shown}, flush=True)
    summarise(options.out)


if __name__ == "__main__":
    main()
