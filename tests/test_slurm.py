"""The scripts of slurm/ on a real SLURM of two nodes: they run through, survive a cluster, and refuse clearly.

Training is two processes on two nodes, on CPUs (gloo). What is checked of a stopped job is what matters to its owner:
it ends with the loss of a job that was left alone.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from coarse_heads import write_heads
from phantoms import store_pair
from slurm_cluster import SlurmCluster
from test_blockwise import BLOCK, LENGTH_MM, asked, bent_pair, content
from trained_run import write_run

from comir_hpc.register.blockwise import refine
from comir_hpc.runs.tracking import read_metrics
from comir_hpc.transforms import load_transform
from comir_hpc.volumes.volume import Volume

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1200)]

SCRIPTS = Path(__file__).parent.parent / "slurm"
STEPS = 20
TWO = ("--nodes=2", "--mem=1G", "--cpus-per-task=1")  # two nodes, one task each


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom pair and settings to train on it, for seconds."""
    folder = tmp_path_factory.mktemp("cluster")
    pair = store_pair(folder, (40, 44, 48))
    write_settings(folder / "train.yaml", pair, STEPS)
    return folder


def write_settings(path: Path, pair: dict[str, Path], steps: int, **changes: dict[str, Any]) -> Path:
    settings: dict[str, Any] = {
        "modalities": list(pair),
        "pairs": [{name: str(volume) for name, volume in pair.items()}],
        "network": {"widths": [4, 8], "convs_per_level": 1},
        "loss": {"subcrops": 1, "displacement_negatives": 0},
        "sampling": {"patch": [24, 24, 24], "pairs_per_step": 4},
        "optimiser": {"steps": steps},
        "engine": {"precision": "fp32", "device": "cpu"},
        "tracking": {"mlflow": None, "log_every": 1, "picture_every": 1000},
        # So far apart that a resume stands on what was saved because of a signal.
        "checkpoint": {"every_steps": 1000},
    }
    path.write_text(yaml.safe_dump(settings | changes), encoding="utf-8")
    return path


def log_of(folder: Path, job: str, name: str = "comir-train") -> str:
    path = folder / f"{name}-{job}.log"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def losses(run: Path) -> dict[int, float]:
    path = run / "metrics.jsonl"
    return {row["step"]: row["loss"] for row in read_metrics(run)} if path.exists() else {}


def completed(job: dict[str, str]) -> bool:
    return job["JobState"] == "COMPLETED"


def seconds_run(job: dict[str, str]) -> int:
    hours, minutes, seconds = map(int, job["RunTime"].split(":"))
    return 3600 * hours + 60 * minutes + seconds


def steps_done(run: Path, steps: int) -> Callable[[dict[str, str]], bool]:
    return lambda _: max(losses(run), default=0) >= steps


@pytest.fixture(scope="module")
def left_alone(slurm: SlurmCluster, folder: Path) -> Path:
    """A run that nothing happened to."""
    run = folder / "left_alone"
    job = slurm.submit(*TWO, str(SCRIPTS / "train.sh"), "train.yaml", str(run), cwd=folder)
    slurm.wait(job, completed, 300)
    log = log_of(folder, job)
    assert f"{run}: {STEPS} steps" in log, log
    assert "Warning" not in log, log
    return run


def test_training_runs_on_two_nodes(left_alone: Path) -> None:
    assert list(losses(left_alone)) == list(range(1, STEPS + 1))
    assert json.loads((left_alone / "model.json").read_text(encoding="utf-8"))["step"] == STEPS


def test_stopped_twice_it_ends_as_if_left_alone(slurm: SlurmCluster, folder: Path, left_alone: Path) -> None:
    """Preempted first; then the time limit comes near and the scheduler sends the signal that train.sh asked for."""
    run = folder / "stopped"
    words = ("train.yaml", str(run), "--set", "tracking.mlflow=auto")
    job = slurm.submit(*TWO, str(SCRIPTS / "train.sh"), *words, cwd=folder)
    slurm.wait(job, steps_done(run, 3), 300)
    with slurm.frozen(job):
        slurm.run("scontrol", "requeue", job)
    slurm.wait(job, lambda found: found["Restarts"] == "1", 60)
    slurm.wait(job, lambda found: found["JobState"] == "RUNNING", 60)
    first = max(losses(run))
    assert 3 <= first < STEPS, "the job was done before it could be stopped"

    slurm.wait(job, steps_done(run, first + 3), 300)
    with slurm.frozen(job):
        # Between 90 and 150 s are left: less than the two minutes' notice and the half that SLURM adds.
        minutes = (seconds_run(slurm.job(job)) + 30) // 60 + 2
        slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
        slurm.wait(job, lambda found: found["JobState"] != "RUNNING", 120)
        slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")  # before it starts again
    slurm.wait(job, lambda found: found["Restarts"] == "2", 120)
    second = max(losses(run))
    assert first + 3 <= second < STEPS, "the job was done before it could be stopped"

    slurm.wait(job, completed, 300)
    log = log_of(folder, job)
    assert f"stopped on request; requeueing job {job}" in log, log
    assert log.count(f"stopped on request at step {second} of {STEPS}") >= 1, log
    assert losses(run) == losses(left_alone)
    mlflow_run = (run / "mlflow_run_id").read_text(encoding="utf-8").strip()
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        points = "select run_uuid, count(*) from metrics where key = 'loss' group by run_uuid"
        assert database.execute(points).fetchall() == [(mlflow_run, STEPS)]
        assert database.execute("select run_uuid from runs").fetchall() == [(mlflow_run,)]


def test_a_killed_process_fails_the_job(slurm: SlurmCluster, folder: Path) -> None:
    run = folder / "killed"
    job = slurm.submit(*TWO, str(SCRIPTS / "train.sh"), "train.yaml", str(run), cwd=folder)
    slurm.wait(job, steps_done(run, 2), 300)
    with slurm.frozen(job):
        (victim,) = slurm.processes(job, rank=1)
        os.kill(victim, signal.SIGKILL)
    found = slurm.wait(job, lambda found: found["JobState"] == "FAILED", 100)
    assert found["Restarts"] == "0"
    assert slurm.processes(job) == []


# ---------------------------------------------------------------------- what is refused before a job waits


def on_login_node(
    slurm: SlurmCluster, *words: str, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=cwd, env={**slurm.environment, **environment}, capture_output=True, text=True,
        encoding="utf-8", timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "words", "message"),
    [
        ({}, ("train.yaml",), "usage: "),
        ({}, ("absent.yaml", "run"), "config absent.yaml is not readable"),
        ({"COMIR_IMAGE": "absent.sif"}, ("train.yaml", "run"), "image absent.sif is not readable; build it"),
        ({"COMIR_MODULES": "absent"}, ("train.yaml", "run"), "module absent does not load"),
        ({"COMIR_PARTITION": "members"}, ("train.yaml", "run"), "they are COMIR_ACCOUNT, COMIR_PARTITION"),
        ({}, ("--nodes=20", "train.yaml", "run"), "sbatch refused the job"),
    ],
)
def test_what_is_missing_is_said_on_the_login_node(
    slurm: SlurmCluster, folder: Path, environment: dict[str, str], words: tuple[str, ...], message: str
) -> None:
    before = slurm.run("squeue", "-h", "-t", "all", "-o", "%A")
    done = on_login_node(slurm, str(SCRIPTS / "train.sh"), *words, cwd=folder, **environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert slurm.run("squeue", "-h", "-t", "all", "-o", "%A") == before


def test_account_and_partition_of_the_site_are_used(slurm: SlurmCluster, folder: Path) -> None:
    site = {"COMIR_ACCOUNT": "lab", "COMIR_PARTITION": "other"}
    words = (str(SCRIPTS / "train.sh"), "--hold", "train.yaml", "held")
    done = on_login_node(slurm, *words, cwd=folder, **site)
    assert done.returncode == 0, done.stderr
    job = done.stdout.removeprefix("job ").strip()
    found = slurm.job(job)
    assert (found["Account"], found["Partition"]) == ("lab", "other")
    slurm.run("scancel", job)


# ---------------------------------------------------------------------- the chain


SMALL = "--mem=1G --cpus-per-task=1"
CHAIN = ("ingest-fixed", "ingest-moving", "train", "infer-fixed", "infer-moving", "register")


def submit_chain(slurm: SlurmCluster, *words: str, cwd: Path, **environment: str) -> dict[str, str]:
    """Job numbers by name."""
    small = {f"SBATCH_{kind}": SMALL for kind in ("INGEST", "TRAIN", "INFER", "REGISTER")}
    done = on_login_node(slurm, str(SCRIPTS / "pipeline.sh"), *words, cwd=cwd, **small, **environment)
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


def test_pipeline_from_files_to_the_warped_volume(slurm: SlurmCluster, tmp_path: Path) -> None:
    """The embedded pair at 3 mm, aligned: started at the identity, the answer stays near it after few steps."""
    pair = {name: tmp_path / "out" / f"{name}.zarr" for name in ("t1w", "t2w")}
    write_settings(
        tmp_path / "brain.yaml", pair, 40,
        network={"widths": [8, 16], "convs_per_level": 1},
        loss={"subcrops": 2, "displacement_negatives": 4},
        sampling={"patch": [32, 32, 32], "pairs_per_step": 4},
        optimiser={"steps": 40, "average": 0.9},
        tracking={"mlflow": None},
    )  # fmt: skip
    files = list(map(str, write_heads(tmp_path).values()))
    jobs = submit_chain(
        slurm, "brain.yaml", "run", files[0], "t1w", files[1], "t2w", "out",
        cwd=tmp_path, PARTS="2", REGISTER_OPTIONS="--initial identity --checks quick", COMIR_REQUIRE="warn",
    )  # fmt: skip
    assert tuple(jobs) == CHAIN
    found = {name: slurm.wait(jobs[name], completed, 400) for name in CHAIN}
    for before, after in [(0, 2), (1, 2), (2, 3), (2, 4), (3, 5), (4, 5)]:
        assert found[CHAIN[before]]["EndTime"] <= found[CHAIN[after]]["StartTime"]

    out = tmp_path / "out"
    fixed = Volume.open(pair["t1w"]).grid
    for name in ("fixed_representation", "moving_representation", "registration/moving_on_fixed"):
        assert Volume.open(out / f"{name}.zarr").grid.shape_zyx == fixed.shape_zyx
    tasks = sorted(tmp_path.glob(f"comir-infer-{jobs['infer-fixed']}_*.log"))
    assert [path.stem.rpartition("_")[2] for path in tasks] == ["1", "2"]
    transform = load_transform(out / "registration" / "transform.tfm")
    assert transform.rotation_deg < 2
    np.testing.assert_allclose(transform.apply(fixed.centre_mm), fixed.centre_mm, atol=2)


def test_a_failed_link_cancels_the_rest_of_the_chain(slurm: SlurmCluster, folder: Path) -> None:
    pair = {name: folder / f"{name}.zarr" for name in ("one", "two")}
    write_settings(folder / "wrong.yaml", pair, STEPS, network={"width": 3})
    volumes = str(pair["one"]), "one", str(pair["two"]), "two"
    jobs = submit_chain(slurm, "wrong.yaml", "wrong", *volumes, "wrong_out", cwd=folder)
    assert tuple(jobs) == CHAIN[2:]
    slurm.wait(jobs["train"], lambda found: found["JobState"] == "FAILED", 120)
    assert "unknown key network.width; did you mean widths?" in log_of(folder, jobs["train"])
    for name in CHAIN[3:]:
        slurm.wait(jobs[name], lambda found: found["JobState"] == "CANCELLED", 30)


# ---------------------------------------------------------------------- Dask's workers as jobs


def test_blocks_on_workers_that_are_jobs(slurm: SlurmCluster, folder: Path) -> None:
    """`--cluster slurm` writes what this process alone writes."""
    run = write_run(folder / "model")
    site = {
        "cores": 1,
        "memory": "1GiB",
        "death-timeout": 120,
        "local-directory": str(folder),
        "log-directory": str(folder / "dask"),
        "scheduler-options": {"host": slurm.address, "dashboard": False},
    }
    configuration = folder / "jobqueue.yaml"
    configuration.write_text(yaml.safe_dump({"jobqueue": {"slurm": site}}), encoding="utf-8")
    common = ("infer", "--zarr", "one.zarr", "--model", str(run), "--modality", "one", "--window", "32")
    layout = ("--core", "128")
    for name, where in [("here.zarr", ()), ("jobs.zarr", ("--cluster", "slurm", "--workers", "2"))]:
        words = ("comir-hpc", *common, *layout, *where, "--out", name)
        done = on_login_node(slurm, *words, cwd=folder, DASK_CONFIG=str(configuration))
        assert done.returncode == 0, done.stderr
    states = slurm.run("squeue", "-h", "-t", "all", "-n", "dask-worker", "-o", "%u %T")
    assert len(states.splitlines()) == 2
    values = [Volume.open(folder / name).read() for name in ("here.zarr", "jobs.zarr")]
    np.testing.assert_array_equal(values[0], values[1])

    refused = {"jobqueue": {"slurm": {**site, "queue": "members"}}}
    configuration.write_text(yaml.safe_dump(refused), encoding="utf-8")
    words = ("comir-hpc", *common, *layout, "--cluster", "slurm", "--out", "refused.zarr")
    done = on_login_node(slurm, *words, cwd=folder, DASK_CONFIG=str(configuration))
    assert done.returncode == 1
    assert "a worker's job is refused: " in done.stderr
    assert "Invalid account" in done.stderr


# ---------------------------------------------------------------------- blocks of a refinement as tasks


def test_tasks_of_an_array_refine_as_one_call_does(slurm: SlurmCluster, tmp_path: Path) -> None:
    bent_pair(tmp_path)
    options = ("--smoothness-mm", f"{LENGTH_MM:g}", "--block", str(BLOCK))
    words = (str(SCRIPTS / "refine.sh"), "--array=1-2", *SMALL.split(), "result", "field.zarr", *options)
    done = on_login_node(slurm, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    slurm.wait(done.stdout.removeprefix("job ").strip(), completed, 200)
    alone = refine(asked(tmp_path, tmp_path / "alone.zarr"))
    assert alone.complete
    assert content(tmp_path / "field.zarr") == content(tmp_path / "alone.zarr")
    logs = "".join(path.read_text(encoding="utf-8") for path in tmp_path.glob("comir-refine-*.log"))
    assert "of other parts are missing, whichever part is last completes it" in logs
    assert "report: " in logs


# ---------------------------------------------------------------------- the guide


def test_commands_of_the_guide_are_accepted(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Every `slurm/...` line of docs/hpc.md finds its input and gets a job's number; nothing is run."""
    for name in ("slurm", "configs"):
        (tmp_path / name).symlink_to(SCRIPTS.parent / name)
    for name in ("t1w", "t2w"):
        (tmp_path / f"{name}.nii.gz").touch()
        (tmp_path / f"{name}.zarr").mkdir()
    (tmp_path / "runs" / "brain").mkdir(parents=True)
    (tmp_path / "runs" / "brain" / "model.json").touch()
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "result.json").touch()
    text = (SCRIPTS.parent / "docs" / "hpc.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL))
    commands = re.findall(r"^(?:\w+=.*)?slurm/\w+\.sh .*$", blocks, flags=re.M)
    assert len(commands) >= 9
    slurm.run("scontrol", "update", "PartitionName=all", "State=DOWN")
    try:
        for command in commands:
            done = on_login_node(slurm, "bash", "-c", command, cwd=tmp_path)
            assert done.returncode == 0, f"{command}: {done.stderr}"
            jobs = [line.split()[-1] for line in done.stdout.splitlines()]
            assert jobs, command
            slurm.run("scancel", *jobs)
    finally:
        slurm.run("scontrol", "update", "PartitionName=all", "State=UP")
