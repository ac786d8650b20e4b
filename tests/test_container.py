"""The image: what is locked fits what is asked for; it builds, its own test passes, and SLURM trains in it.

Building takes minutes. COMIR_TEST_IMAGE names an image that is there already, or that is still being built by a process
which holds a lock on the file of that name with `.lock` behind it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from phantoms import store_pair
from slurm_cluster import SlurmCluster

from comir_hpc import __version__
from comir_hpc.runs.tracking import read_metrics

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "containers" / "build.sh"
STEPS = 150  # so many that the job is still at work when a busy machine looks at it after the third


# ---------------------------------------------------------------------- without Apptainer


def locked() -> dict[str, str]:
    """Versions of the lock file by name."""
    text = (ROOT / "containers" / "requirements.lock").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9._-]+)==([^ \\]+)", text, flags=re.M))


def test_the_lock_file_holds_what_the_package_asks_for() -> None:
    versions = locked()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for wanted in map(Requirement, project["dependencies"]):
        found = versions.get(wanted.name.lower())
        assert found is not None, f"{wanted} is not locked; run `make lock`"
        assert wanted.specifier.contains(found), f"{wanted}, but {found} is locked; run `make lock`"
    assert any(name.startswith("nvidia-nccl") for name in versions), (
        "made on a machine whose torch has no CUDA"
    )


def test_every_locked_package_has_hashes() -> None:
    text = (ROOT / "containers" / "requirements.lock").read_text(encoding="utf-8")
    for entry in re.split(r"\n(?=\S)", text):
        assert entry.startswith("#") or "--hash=sha256:" in entry, entry


# ---------------------------------------------------------------------- with it


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image of this commit, torch without CUDA."""
    missing = [name for name in ("apptainer", "debootstrap") if shutil.which(name) is None]
    if missing and not os.environ.get("CI"):
        pytest.skip(f"no {' and no '.join(missing)} on this machine; `make test-container` installs them")
    given = os.environ.get("COMIR_TEST_IMAGE")
    if given:
        return _once_built(Path(given))
    folder = tmp_path_factory.mktemp("image")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = [
        "--notest",
        "--cpu",
        "--base",
        "debootstrap",
        "--wheels",
        str(folder / "wheels"),
        str(folder / "comir.sif"),
    ]
    done = subprocess.run(
        [BUILD, *words], env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, encoding="utf-8", errors="replace", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    shutil.rmtree(folder / "wheels")
    os.sync()  # else the first checkpoint that is flushed to disk waits for gigabytes that the build left behind
    return folder / "comir.sif"


def _once_built(path: Path) -> Path:
    lock = path.with_name(f"{path.name}.lock")
    if lock.exists():
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)
    assert path.is_file(), f"{path} is not there, and nobody builds it any more"
    os.sync()  # else the first checkpoint that is flushed to disk waits for gigabytes that the build left behind
    return path


def apptainer(*words: str | Path) -> str:
    # --userns: root of a container may not mount the usual way.
    done = subprocess.run(
        ["apptainer", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
        errors="replace", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.container
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_image_passes_its_own_test(image: Path) -> None:
    """`%test` is `comir-hpc doctor`."""
    text = apptainer("test", "--userns", image)
    assert f"comir-hpc {__version__}" in text
    assert "PASS" in text
    assert "FAIL" not in text


@pytest.mark.container
@pytest.mark.slow
def test_the_image_says_what_it_is(image: Path) -> None:
    labels = json.loads(apptainer("inspect", "--json", image))["data"]["attributes"]["labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert re.fullmatch(r"[0-9a-f]{12}", labels["org.opencontainers.image.revision"])
    assert apptainer("run", "--userns", image, "--version").strip().endswith(f"comir-hpc {__version__}")


@pytest.mark.container
@pytest.mark.slurm
@pytest.mark.slow
def test_training_in_the_image_on_two_nodes_stops_and_goes_on(
    slurm: SlurmCluster, image: Path, tmp_path: Path
) -> None:
    """Signals get in, exit code 85 gets out, and the requeue is made outside."""
    pair = store_pair(tmp_path, (40, 44, 48))
    settings = {
        "modalities": list(pair),
        "pairs": [{name: str(volume) for name, volume in pair.items()}],
        "network": {"widths": [4, 8], "convs_per_level": 1},
        "loss": {"subcrops": 1, "displacement_negatives": 0},
        "sampling": {"patch": [24, 24, 24], "pairs_per_step": 4},
        "optimiser": {"steps": STEPS},
        "engine": {"name": "deepspeed", "precision": "fp32", "device": "cpu"},
        "tracking": {"log_every": 1, "mlflow": None},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    run = tmp_path / "run"
    job = slurm.submit(
        "--nodes=2", "--mem=1G", "--cpus-per-task=1", str(ROOT / "slurm" / "train.sh"), "train.yaml", "run",
        cwd=tmp_path, COMIR_IMAGE=str(image), COMIR_GPU_FLAG="", COMIR_EXEC_FLAGS="--userns",
        COMIR_BINDS=str(tmp_path), PATH=os.environ["PATH"].replace(str(Path(sys.executable).parent), "/none"),
        # What a training in the process that submits leaves in its environment.
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="29500",
    )  # fmt: skip

    def last_step() -> int:
        rows = read_metrics(run) if (run / "metrics.jsonl").exists() else []
        return max((row["step"] for row in rows), default=0)

    slurm.wait(job, lambda _: last_step() >= 3, 300)
    with slurm.frozen(job):
        slurm.run("scancel", "--signal=USR2", job)
    slurm.wait(job, lambda found: found["Restarts"] == "1", 300)
    assert last_step() < STEPS, "the job was done before it could be stopped"
    slurm.wait(job, lambda found: found["JobState"] == "COMPLETED", 300)
    assert [row["step"] for row in read_metrics(run)] == list(range(1, STEPS + 1))
    log = (tmp_path / f"comir-train-{job}.log").read_text(encoding="utf-8")
    assert f"stopped on request; requeueing job {job}" in log, log
    assert json.loads((run / "model.json").read_text(encoding="utf-8"))["step"] == STEPS
