r"""Hold what each verb predicts against what it needed: memory of its processes, and seconds.

    export OMP_NUM_THREADS=1
    python benchmarks/reliability/predictions.py --work WORK --out benchmarks/reliability/predictions.csv

A row is one command, in a process of its own, on made volumes: small (48 voxels a side), middle (144), large (336),
and long (32 x 48 x 2048). `predicted_mib` is what `--dry-run` of the same command says before; where a verb has several
processes, it stands for all of them. `needed_mib` is the largest VmHWM (the most memory that the kernel saw in use) of
the process, or the sum of those of the process and its workers. `called` says who called: the command line, or Python
with other things in memory, which count on both sides. A bound holds if `ratio` (predicted / needed) is from 1 to 1.3.

Seconds are an estimate: `predicted_s` says "about", `needed_s` is what the call took without the start of Python. They
mean something on a quiet machine only; memory does not depend on it. The table goes on where it was stopped: rows wait
in WORK/rows.jsonl.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rows import Kept, write_rows

SHAPES = {"small": (48, 48, 48), "middle": (144, 144, 144), "large": (336, 336, 336), "long": (32, 48, 2048)}
UNITS = {"bytes": 2**-20, "KiB": 2**-10, "MiB": 1.0, "GiB": 1024.0}
BALLAST = 300 << 20  # bytes that a Python caller holds besides
RESULTS = ("predicted_mib", "needed_mib", "ratio", "predicted_s", "needed_s")


@dataclass(frozen=True)
class Case:
    """One row.

    Parameters
    ----------
    settings : dict
        Of the verb, JSON-ready.
    called : str
        ``command`` or ``python``.
    processes : int
        How many share the work.
    """

    verb: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    called: str = "command"
    processes: int = 1


# ---------------------------------------------------------------------- one verb, in a process of its own


def settings_of(verb: str, given: dict[str, Any]) -> Any:
    """Return the settings of a verb."""
    from comir_hpc import config

    kinds = {
        "ingest": config.IngestSettings, "infer": config.InferSettings, "warp": config.WarpSettings,
        "register": config.RegisterSettings, "train": config.TrainSettings,
    }  # fmt: skip
    return kinds[verb](**{k: v for k, v in given.items() if k != "run"})


def call(verb: str, given: dict[str, Any], *, plan: bool) -> dict[str, Any]:
    """Do what the command line does with these settings, or plan it."""
    module = importlib.import_module(f"comir_hpc.{verb}")
    settings = settings_of(verb, given)
    name = {"train": "plan_training"}.get(verb, f"plan_{verb}")
    if plan:
        found: dict[str, Any] = getattr(module, name)(settings)
        return found
    if verb == "train":
        module.train(settings, Path(given["run"]))
    else:
        getattr(module, verb)(settings)
    return {}


def serve(words: list[str]) -> None:
    """Run as the process that is measured: plan or do, then say the most memory that was in use."""
    case = json.loads(words[0])
    ballast = bytearray(os.urandom(1 << 20)) * (BALLAST >> 20) if case["called"] == "python" else b""
    importlib.import_module(f"comir_hpc.{case['verb']}")
    start = time.perf_counter()
    plan = call(case["verb"], case["settings"], plan=case["plan"])
    seconds = time.perf_counter() - start
    said = {"plan": plan, "peak": high_water(os.getpid()), "seconds": seconds, "ballast": len(ballast)}
    print(json.dumps(said))


def high_water(pid: int) -> int:
    """Most bytes that a process had in memory; 0 of one that is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+)", text)
    return int(found[1]) * 1024 if found else 0


def below(pid: int) -> Iterator[int]:
    """Return the numbers of a process's children, and theirs."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(n) for task in tasks for n in (task / "children").read_text().split()]
    except OSError:
        return
    for child in children:
        yield child
        yield from below(child)


def measured(case: Case, *, plan: bool) -> tuple[dict[str, Any], dict[int, int], float]:
    """Run a case; return what it printed, the most memory of each of its processes, and the seconds of the call."""
    record = {"verb": case.verb, "settings": case.settings, "called": case.called, "plan": plan}
    words = [sys.executable, __file__, "serve", json.dumps(record)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        peaks: dict[int, int] = {}
        while process.poll() is None:
            for pid in (process.pid, *below(process.pid)):
                peaks[pid] = max(peaks.get(pid, 0), high_water(pid))
            time.sleep(0.02)
        assert process.stdout is not None
        said = process.stdout.read().strip().splitlines()
    if process.returncode:
        raise SystemExit(f"{case.verb} {case.name} ended with {process.returncode}")
    result = json.loads(said[-1])
    peaks[process.pid] = result["peak"]
    return result["plan"], peaks, result["seconds"]


# ---------------------------------------------------------------------- the rows


def in_mib(text: str) -> float:
    """Read the first size in a text such as ``389.2 MiB of ...``."""
    found = re.search(r"([\d.]+) (bytes|KiB|MiB|GiB)", text)
    assert found is not None
    return float(found[1]) * UNITS[found[2]]


def predicted_seconds(plan: dict[str, Any]) -> float | None:
    """Return the seconds in a plan, whatever its key."""
    if "time_expected" in plan:
        return float(plan["time_expected"].split()[1])
    if "time" in plan:
        return 60 * float(plan["time"].split(",")[1].split()[0])
    return None


def row(case: Case) -> dict[str, Any]:
    """Plan a case, do it, and compare."""
    plan, _, _ = measured(case, plan=True)
    _, peaks, seconds = measured(case, plan=False)
    together = case.processes > 1
    needed = (sum(peaks.values()) if together else max(peaks.values())) / 2**20
    predicted = in_mib(plan.get("peak_memory") or plan["memory"])
    expected = predicted_seconds(plan)
    return {
        "verb": case.verb, "case": case.name, "called": case.called, "processes": case.processes,
        "predicted_mib": round(predicted, 1), "needed_mib": round(needed, 1), "ratio": round(predicted / needed, 3),
        "predicted_s": "" if expected is None else round(expected, 1), "needed_s": round(seconds, 1),
    }  # fmt: skip


# ---------------------------------------------------------------------- what the verbs read


def once(path: Path, make: Callable[[], object]) -> Path:
    """Make a file or folder unless it is there."""
    if not path.exists():
        make()
    return path


def voxels(shape: tuple[int, int, int], seed: int) -> Any:
    """Return an ellipsoid with texture and noise in dark air, uint16."""
    import numpy as np

    rng = np.random.default_rng(seed)
    axes = np.ogrid[tuple(slice(-1, 1, complex(0, n)) for n in shape)]
    inside = sum(a**2 for a in axes).astype(np.float32) < 0.8
    texture = sum(np.sin(4 * (k + 1) * a) for k, a in enumerate(axes)).astype(np.float32)
    noise = rng.integers(0, 40, shape, dtype=np.uint16)
    return noise + (inside * (1000 + 200 * texture)).astype(np.uint16)


def write_source(path: Path, size: str, seed: int = 0) -> None:
    """Write a volume in the format that the name says."""
    import numpy as np

    values = voxels(SHAPES[size], seed)
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".h5":
        import h5py

        with h5py.File(path, "w") as file:  # one chunk: all of it is decoded for any voxel
            data = file.create_dataset(
                "v", data=values, chunks=values.shape, compression="gzip", compression_opts=1
            )
            data.attrs["element_size_um"] = (1.0, 1.0, 1.0)
    elif path.suffix == ".tif":
        import tifffile

        tifffile.imwrite(path, values, compression="zlib", rowsperstrip=values.shape[1])
    else:
        import SimpleITK as sitk

        image = sitk.GetImageFromArray(values)
        if path.suffix != ".dcm":
            return sitk.WriteImage(image, str(path))
        path.mkdir()
        for z in range(image.GetDepth()):
            piece = image[:, :, z]
            for key, value in dicom_header(z).items():
                piece.SetMetaData(key, value)
            writer = sitk.ImageFileWriter()
            writer.KeepOriginalImageUIDOn()
            writer.SetFileName(str(path / f"{z:04}.dcm"))
            writer.Execute(piece)
    return None


def dicom_header(z: int) -> dict[str, str]:
    """Return what puts a slice into its series."""
    return {
        "0008|0060": "CT", "0020|000d": "1.2.3", "0020|000e": "1.2.3.4", "0008|0018": f"1.2.3.4.{z + 1}",
        "0020|0032": f"0\\0\\{z}", "0020|0037": "1\\0\\0\\0\\1\\0", "0020|0013": str(z + 1),
    }  # fmt: skip


def store(work: Path, size: str, seed: int = 0) -> str:
    """Return a volume as the verbs read it."""
    path = work / f"{size}-{seed}.zarr"

    def make() -> None:
        from comir_hpc.config import IngestSettings
        from comir_hpc.ingest import ingest

        source = once(
            work / f"{size}-{seed}.npy", lambda: write_source(work / f"{size}-{seed}.npy", size, seed)
        )
        ingest(IngestSettings(source=source, out=path, spacing=(1, 1, 1), unit="mm"))

    return str(once(path, make))


def training(work: Path, size: str, **changes: Any) -> dict[str, Any]:
    """Return settings of two steps of training, the default network unless said otherwise."""
    settings: dict[str, Any] = {
        "modalities": ["one", "two"],
        "pairs": [{"one": store(work, size, 0), "two": store(work, size, 1)}],
        "sampling": {"patch": [32, 32, 32], "pairs_per_step": 4, "workers": 0},
        "optimiser": {"steps": 2},
        "engine": {"device": "cpu"},
        "tracking": {"mlflow": "auto", "log_every": 1, "picture_every": 2},
    }
    for part, values in changes.items():
        settings[part] = {**settings.get(part, {}), **values}
    return settings


def model(work: Path) -> str:
    """Return a run with the default network, trained for three steps."""
    path = work / "model"

    def make() -> None:
        call("train", {**training(work, "small"), "run": str(path)}, plan=False)

    return str(once(path, make))


def transform(work: Path) -> str:
    """Return a turn about the world's axes, as `register` would write it."""
    from comir_hpc.space.rotations import rotation_by
    from comir_hpc.transforms import Transform, save_transform

    turn = rotation_by((0.2, 1.0, 0.4), 8.0)[::-1, ::-1]
    folder = work / "transform"
    folder.mkdir(exist_ok=True)
    once(
        folder / "transform.tfm",
        lambda: save_transform(Transform.rigid(turn, (1.0, -1.0, 2.0), (20.0,) * 3), folder),
    )
    return str(folder / "transform.tfm")


def ingests(work: Path) -> Iterator[Case]:
    """Return every way of reading: streamed, held in memory, decoded in large pieces, in processes, in small shards."""

    def case(name: str, suffix: str, size: str, **settings: Any) -> Case:
        source = once(work / f"{size}{suffix}", lambda: write_source(work / f"{size}{suffix}", size))
        spacing = {"spacing": [1, 1, 1], "unit": "mm"} if suffix in (".npy", ".tif") else {}
        given = {"source": str(source), **spacing, **settings}
        return Case("ingest", f"{name}, {size}", given, processes=settings.get("workers", 1))

    for size in SHAPES:
        yield case("npy", ".npy", size)
        yield case("nii.gz", ".nii.gz", size)
    for size in ("small", "middle", "large"):
        yield case("hdf5 of one chunk", ".h5", size)
        yield case("DICOM", ".dcm", size)
        yield case("packed TIFF", ".tif", size)
    yield case("npy, 2 processes", ".npy", "middle", workers=2, shard=64)
    yield case("npy, 2 processes", ".npy", "large", workers=2)
    yield case("npy in 512 shards and more", ".npy", "middle", chunk=8, shard=16)
    yield case("npy, shards of 128", ".npy", "large", shard=128)


def infers(work: Path) -> Iterator[Case]:
    """Return precision, processes, integers and callers."""
    base = {"model": model(work), "modality": "one", "device": "cpu"}

    def case(name: str, size: str, called: str = "command", **settings: Any) -> Case:
        given = {**base, "zarr": store(work, size), **settings}
        return Case("infer", f"{name}, {size}", given, called, settings.get("workers", 1))

    for size in SHAPES:
        yield case("bf16", size, precision="bf16")
    for size in ("small", "middle"):
        yield case("fp32", size, precision="fp32")
        yield case("bf16", size, "python", precision="bf16")
    yield case("bf16, 2 processes", "middle", precision="bf16", workers=2, shard=64)
    yield case("bf16, 2 processes", "large", precision="bf16", workers=2)
    yield case("bf16, window 96", "middle", precision="bf16", window=96)
    yield case("bf16, int8", "middle", precision="bf16", dtype="int8")


def warps(work: Path) -> Iterator[Case]:
    """Return stores and single files, interpolations, processes and callers."""

    def case(name: str, size: str, called: str = "command", **settings: Any) -> Case:
        given = {
            "zarr": store(work, size, 1),
            "like": store(work, size, 0),
            "transform": transform(work),
            **settings,
        }
        return Case("warp", f"{name}, {size}", given, called, settings.get("workers", 1))

    for size in SHAPES:
        yield case("zarr", size)
        yield case("nii", size)
    for size in ("small", "middle", "large"):
        for suffix in ("nii.gz", "nrrd", "tif"):
            yield case(suffix, size)
    for size in ("middle", "large"):
        yield case("zarr, cubic", size, interpolation="cubic")
        yield case("zarr, 2 processes", size, workers=2, shard=64 if size == "middle" else 256)
    yield case("zarr", "middle", "python")
    yield case("nii", "middle", "python")


def registers(work: Path) -> Iterator[Case]:
    """Return both kinds of representation, with the global search and without it."""
    learned = {"model": model(work), "fixed_modality": "one", "moving_modality": "two", "device": "cpu"}

    def case(name: str, size: str, called: str = "command", **settings: Any) -> Case:
        pair = {"fixed": store(work, size, 0), "moving": store(work, size, 1)}
        few = {"rotations": 24, "candidates": 1, "max_memory_gib": 16}
        return Case("register", f"{name}, {size}", {**pair, **few, **settings}, called)

    for size in ("small", "middle", "large"):
        yield case("intensity", size, representation="intensity")
    yield case("intensity, identity", "small", representation="intensity", initial="identity")
    yield case("intensity, identity", "middle", representation="intensity", initial="identity")
    yield case("intensity", "small", "python", representation="intensity")
    for size in ("small", "middle"):
        yield case("comir", size, representation="comir", **learned)


def trains(work: Path) -> Iterator[Case]:
    """Return volumes held and read box by box, patches, precisions, readers."""

    def case(name: str, size: str, called: str = "command", **changes: Any) -> Case:
        return Case("train", f"{name}, {size}", training(work, size, **changes), called)

    yield case("patch 16, narrow", "small", sampling={"patch": [16] * 3}, network={"widths": [4, 8]})
    yield from (case("patch 32", size) for size in SHAPES)
    yield case("patch 48", "middle", sampling={"patch": [48] * 3})
    yield case("patch 32", "small", "python")
    yield case("patch 32, fp32", "small", engine={"device": "cpu", "precision": "fp32"})
    yield case("patch 32, batch 16", "middle", sampling={"pairs_per_step": 16})
    yield case("read box by box", "middle", sampling={"cache_mib": 0})


VERBS = {"ingest": ingests, "infer": infers, "warp": warps, "register": registers, "train": trains}


def with_output(case: Case, folder: Path) -> Case:
    """Name the place that a case writes to."""
    name = case.name.split(",", maxsplit=1)[0]
    out = f"out.{name}" if case.verb == "warp" else "out.zarr"
    given = {"run": str(folder / "run")} if case.verb == "train" else {"out": str(folder / out)}
    if case.verb == "register":
        given = {"out": str(folder / "result")}
    return Case(case.verb, case.name, {**case.settings, **given}, case.called, case.processes)


def main() -> None:
    """Parse, run what is not in WORK/rows.jsonl, write the table."""
    if sys.argv[1:2] == ["serve"]:
        return serve(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=list(VERBS))
    parser.add_argument("--only", default="", help="regular expression for names of cases")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    work = given.work.resolve()
    (work / "out").mkdir(parents=True, exist_ok=True)
    kept = Kept(work / "rows.jsonl")
    done = {tuple(r[k] for k in ("verb", "case", "called")) for r in kept.rows}
    for case in (case for verb in given.verbs for case in VERBS[verb](work)):
        key = case.verb, case.name, case.called
        if key in done or not re.search(given.only, case.name):
            continue
        folder = work / "out" / re.sub(r"\W+", "-", " ".join(key))
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        folder.mkdir()
        kept.add(row(with_output(case, folder)))
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        print(*kept.rows[-1].values(), sep=",", flush=True)
    write_rows(
        given.out,
        kept.rows,
        "OMP_NUM_THREADS=1 python benchmarks/reliability/predictions.py --work WORK --out OUT",
        f"{os.cpu_count()} cores, a load of about {os.getloadavg()[2]:.0f} at the end. It changes only the seconds.",
    )
    return None


if __name__ == "__main__":
    main()
