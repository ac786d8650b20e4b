r"""Kill the real commands with SIGKILL at random moments, run them again, and compare every byte with undisturbed runs.

    export OMP_NUM_THREADS=1
    python benchmarks/reliability/kill.py --kills 50 --work WORK --out benchmarks/reliability/kill.csv

For each of ingest, infer, warp, refine and train, an undisturbed run comes first. Then the same command is started into
a new place and killed at a random moment between shortly before its first sign of work and its end; started again, and
killed again; until it ends by itself, which begins a new place. A row is one kill. It says what the kill left (`left`:
nothing, a store that says that it is incomplete, or one that says that it is complete), and after the run that ended:

* `lost`: finished blocks that were computed again, or steps of training before the newest checkpoint that were.
* `differ`: files that differ from those of the undisturbed run, are missing or are too many. Entries of the metadata
  about the run (seconds, memory) are left out, and lines of metrics without their timings are compared. A store that
  says right after a kill that it is complete is compared at once, and counts as well.

Seeded, and it goes on where it was stopped: rows wait in WORK/rows.jsonl. The table begins with its command.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rows import Kept, write_rows

VERBS = ("ingest", "infer", "warp", "refine", "train")
SHAPE = (40, 48, 64)
TIMINGS = {
    "loss",
    "step",
    "gradient_norm",
    "learning_rate",
    "agreement",
}  # what is compared of a line of metrics


@dataclass(frozen=True)
class Case:
    """One verb: its command into a folder, what it leaves there, and how much of it was done twice."""

    command: Callable[[Path], list[str]]
    content: Callable[[Path], dict[str, Any]]
    progress: Callable[[Path], Any]
    lost: Callable[[Path, list[Any]], int]


@dataclass(frozen=True)
class Reference:
    """An undisturbed run: what it left, when it began to work and when it ended, seconds after its start."""

    content: dict[str, Any]
    first: float
    end: float


def prepare(work: Path) -> None:
    """Make what all verbs read: a pair of volumes, a model with weights from a seed, a transform, settings."""
    if (work / "ready").exists():
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    import SimpleITK as sitk

    from comir_hpc.config import IngestSettings
    from comir_hpc.data.embedded import phantom_pair
    from comir_hpc.ingest import ingest
    from comir_hpc.space.rotations import rotation_by
    from comir_hpc.transforms import Transform, save_transform

    for name, values in zip(("one", "two"), phantom_pair(SHAPE, seed=0), strict=True):
        image = sitk.GetImageFromArray(values)
        image.SetSpacing((2.0, 2.0, 2.0))
        sitk.WriteImage(image, str(work / f"{name}.mha"))
        ingest(IngestSettings(source=work / f"{name}.mha", out=work / f"{name}.zarr", chunk=8, shard=16))
    turn = rotation_by((0.2, 1.0, 0.4), 20.0)[::-1, ::-1]
    save_transform(Transform.rigid(turn, (3.0, -2.0, 4.0), (70.0, 60.0, 70.0)), work)
    registered(work)
    settings = {
        "modalities": ["one", "two"],
        "pairs": [{name: str(work / f"{name}.zarr") for name in ("one", "two")}],
        "network": {"widths": [4, 8], "convs_per_level": 1},
        "sampling": {"patch": [16, 16, 16], "pairs_per_step": 4, "workers": 0},
        "optimiser": {"steps": 60},
        "tracking": {"mlflow": None, "system_every": None, "log_every": 5, "picture_every": 1000},
        "checkpoint": {"every_steps": 5},
    }
    (work / "train.yaml").write_text(json.dumps(settings), encoding="utf-8")
    call(["train", str(work / "train.yaml"), "--run", str(work / "model")])
    (work / "ready").touch()


def registered(work: Path) -> None:
    """Write a registration of the first volume with itself, whose answer is a little wrong."""
    import numpy as np

    from comir_hpc.runs.record import make_record
    from comir_hpc.runs.result import Result, write_result
    from comir_hpc.transforms import Transform, save_transform
    from comir_hpc.volumes.volume import Volume

    volume = Volume.open(work / "one.zarr")
    answer = Transform.rigid(np.eye(3), (2.0, -1.0, 1.0), (0.0, 0.0, 0.0))
    save_transform(answer, work / "result")
    side = {"path": str(volume.path), "fingerprint": volume.fingerprint(), "grid": volume.grid.as_dict()}
    record = {
        "verdict": "PASS", "inputs": {"fixed": side, "moving": side}, "matrix_lps_mm": answer.matrix_mm.tolist(),
        "settings": {"representation": "intensity"},
    }  # fmt: skip
    write_result(work / "result", make_record(Result, record))


def words(arguments: list[str]) -> list[str]:
    """Return the command line of a verb, or of this file where a verb has no option for small shards."""
    if arguments[0] == "run":
        return [sys.executable, __file__, *arguments]
    return [sys.executable, "-m", "comir_hpc", *arguments]


def run(verb: str, settings: dict[str, Any]) -> None:
    """Do what the command line does, with any setting."""
    from comir_hpc.config import InferSettings, RefineSettings, WarpSettings
    from comir_hpc.infer import infer
    from comir_hpc.register.blockwise import refine
    from comir_hpc.warp import warp

    def progress(what: str, done: int, total: int) -> None:
        print(what, done, total, file=sys.stderr, flush=True)

    if verb == "infer":
        infer(InferSettings(**settings), progress=progress)
    elif verb == "refine":
        refine(RefineSettings(**settings), progress=progress)
    else:
        warp(WarpSettings(**settings), progress=progress)


def call(arguments: list[str]) -> None:
    """Run a verb to its end."""
    done = subprocess.run(words(arguments), capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(arguments)}: {done.returncode}: {done.stderr[-2000:]}")


# ---------------------------------------------------------------------- what the verbs leave


def store_content(folder: Path) -> dict[str, Any]:
    """Every file of the store, its metadata without what they say about the run."""
    found: dict[str, Any] = {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in (folder / "out.zarr").rglob("*")
        if p.is_file() and p.name != "zarr.json"
    }
    for path in (folder / "out.zarr").rglob("zarr.json"):
        record = json.loads(path.read_bytes())
        for key in ("predicted", "needed", "measured"):
            record["attributes"].get("comir", {}).pop(key, None)
        found[path.relative_to(folder).as_posix()] = record
    return found


def blocks_done(folder: Path) -> list[int]:
    """Blocks that the ledger says are done, one number for every time."""
    done = []
    for journal in (folder / "out.zarr.ledger").glob("*.jsonl"):
        lines = journal.read_text(encoding="utf-8", errors="replace").splitlines()
        whole = (line for line in lines if line.endswith("}") and '"state":"done"' in line)
        done.extend(json.loads(line)["block"] for line in whole)
    return done


def blocks_lost(folder: Path, before: list[Any]) -> int:
    """Blocks that were finished more than once."""
    del before
    return sum(count > 1 for count in Counter(blocks_done(folder)).values())


def run_content(folder: Path) -> dict[str, Any]:
    """Weights of the model, tensor by tensor, and the lines of metrics without timings."""
    import torch

    found: dict[str, Any] = {}
    for path in sorted((folder / "run" / "model").glob("*.pt")):
        state = torch.load(path, weights_only=True)
        found |= {f"{path.name}:{name}": value.numpy().tobytes() for name, value in state.items()}
    for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        key = f"metrics:{record.get('step')}"
        found[key] = (*found.get(key, ()), json.dumps({k: v for k, v in record.items() if k in TIMINGS}))
    return found


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint that is whole."""
    steps = [int(p.name[5:]) for p in (folder / "run" / "checkpoints").glob("step-*")]
    return max(steps, default=0)


def steps_lost(folder: Path, before: list[Any]) -> int:
    """Checkpoints that were there before a kill and older ones after it."""
    del folder
    return sum(max(0, a - b) for a, b in pairwise(before))


def cases(work: Path) -> dict[str, Case]:
    """Return the verbs."""

    def block(verb: str, **settings: Any) -> Case:
        def command(folder: Path) -> list[str]:
            if verb == "ingest":
                source = str(work / "one.mha")
                return ["ingest", "--chunk", "8", "--shard", "16", source, str(folder / "out.zarr")]
            stored = {} if verb == "refine" else {"chunk": 8, "shard": 16}
            return ["run", verb, json.dumps({**settings, **stored, "out": str(folder / "out.zarr")})]

        return Case(command, store_content, blocks_done, blocks_lost)

    one, two, transform = (str(work / name) for name in ("one.zarr", "two.zarr", "transform.tfm"))
    model = {"model": str(work / "model"), "modality": "one", "window": 16, "precision": "fp32", "core": 16}
    return {
        "ingest": block("ingest"),
        "infer": block("infer", zarr=one, device="cpu", **model),
        "refine": block("refine", result=str(work / "result"), smoothness_mm=5.0, block=32),
        "warp": block("warp", zarr=two, like=one, transform=transform),
        "train": Case(
            lambda folder: ["train", str(work / "train.yaml"), "--run", str(folder / "run")],
            run_content, newest_step, steps_lost,
        ),
    }  # fmt: skip


# ---------------------------------------------------------------------- killing


def undisturbed(case: Case, folder: Path) -> Reference:
    """Run once to the end; the first line of progress is the first sign of work."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begun = time.monotonic()
    process = subprocess.Popen(words(case.command(folder)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stderr is not None
    process.stderr.readline()
    first = time.monotonic() - begun
    process.stderr.read()
    if process.wait():
        raise SystemExit(f"{shlex.join(case.command(folder))} failed")
    return Reference(case.content(folder), first, time.monotonic() - begun)


def differences(reference: Reference, found: dict[str, Any]) -> int:
    """Files that differ, are missing or are too many."""
    return sum(reference.content.get(k) != found.get(k) for k in reference.content.keys() | found.keys())


def left(folder: Path) -> str:
    """What a kill left, as another reader sees it."""
    if (folder / "run").exists():
        return "complete" if (folder / "run" / "model.json").exists() else "incomplete"
    try:
        said = json.loads((folder / "out.zarr" / "zarr.json").read_bytes())["attributes"]
        if "comir_field" in said:  # the scene is there before the last word, which the vectors have
            said = json.loads((folder / "out.zarr" / "displacements" / "zarr.json").read_bytes())[
                "attributes"
            ]
    except FileNotFoundError:
        return "nothing"
    return "complete" if said["comir"]["complete"] else "incomplete"


def series(
    case: Case, reference: Reference, folder: Path, rng: random.Random, most: int
) -> list[dict[str, Any]]:
    """Kill until a run ends by itself, or `most` times and then let it end; the rows of these kills."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    seen, too_early = [], 0
    while True:
        moment = rng.uniform(0.8 * reference.first, 1.1 * reference.end)
        process = subprocess.Popen(
            words(case.command(folder)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        try:
            if len(rows) < most:
                process.wait(moment)
            else:
                process.wait()
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            state = left(folder)
            if state == "complete":
                too_early += differences(reference, case.content(folder))
            seen.append(case.progress(folder))
            rows.append({"moment_s": round(moment, 3), "left": state})
            most = most if state != "complete" else 0  # nothing is left to disturb
            continue
        assert process.stderr is not None
        if process.returncode:
            raise SystemExit(f"{shlex.join(case.command(folder))}: {process.stderr.read()[-2000:]}")
        break
    differ = too_early + differences(reference, case.content(folder))
    lost = case.lost(folder, [*seen, case.progress(folder)])
    return [{**row, "lost": lost, "differ": differ} for row in rows]


def main() -> None:
    """Parse, kill, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of each verb")
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=VERBS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=5, help="kills in a row before a run may end")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    if sys.argv[1:2] == ["run"]:
        return run(sys.argv[2], json.loads(sys.argv[3]))
    given = parser.parse_args()
    work = given.work.resolve()
    prepare(work)
    kept = Kept(work / "rows.jsonl")
    rows = kept.rows
    for verb in given.verbs:
        case, done = cases(work)[verb], sum(row["verb"] == verb for row in rows)
        reference = undisturbed(case, work / "reference" / verb) if done < given.kills else None
        while reference and done < given.kills:
            rng = random.Random(f"{given.seed} {verb} {done}")
            most = min(given.most, given.kills - done)
            for row in series(case, reference, work / "killed" / verb, rng, most):
                done += 1
                kept.add({"verb": verb, "kill": done, **row})
                print(rows[-1], flush=True)
    command = f"python benchmarks/reliability/kill.py --kills {given.kills} --seed {given.seed} --work WORK --out OUT"
    write_rows(given.out, [row for row in rows if row["verb"] in given.verbs], f"OMP_NUM_THREADS=1 {command}")
    return print(
        f"{len(rows)} kills, lost {sum(r['lost'] for r in rows)}, differ {sum(r['differ'] for r in rows)}"
    )


if __name__ == "__main__":
    main()
