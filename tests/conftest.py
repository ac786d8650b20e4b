"""What the whole suite shares: one thread a process, no GPU tests without a GPU, no browser tests without one."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch, numpy or SimpleITK are imported: one thread a process, because `make test` runs one process a core.
for variable in ("OMP_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import pytest  # noqa: E402
from slurm_cluster import SlurmCluster, missing_programs  # noqa: E402


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


MEASURED = Path(__file__).parent.parent / "benchmarks" / "house" / "suite.csv"


def _seconds() -> dict[str, float]:
    """What the tests of each file took when this was last measured."""
    lines = MEASURED.read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {row["part"]: float(row["after"]) for row in rows}


def _turn(item: pytest.Item, seconds: dict[str, float]) -> tuple[bool, float]:
    """When it is a test's turn: what waits for SLURM first, then the longest files; slow ones are taken for 10 s."""
    marks = set() if item.parent is None else {mark.name for mark in item.parent.own_markers}
    return "slurm" not in marks, -seconds.get(item.path.name, 10.0 if "slow" in marks else 0.0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process more than cores, since tests wait for SLURM, for locks and for programs that they start."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason; in CI a missing browser is a failure, not a skip.

    Long files come first, so that no process is left with one of them at the end while the others have nothing to do.
    """
    seconds = _seconds()
    items.sort(key=lambda item: _turn(item, seconds))
    no_gpu = not _has_gpu() if any("gpu" in item.keywords for item in items) else False
    no_browser = shutil.which("chromium") is None and not os.environ.get("CI")
    for item in items:
        if no_gpu and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
        if no_browser and "browser" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no chromium on this machine"))


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    """A SLURM cluster of two nodes on this machine; in CI a missing package is a failure, not a skip."""
    missing = missing_programs()
    if missing and not os.environ.get("CI"):
        pytest.skip(
            f"no SLURM on this machine (missing: {', '.join(missing)}); `make test-slurm` installs it"
        )
    # Not pytest's folder: the path of a socket has 108 characters at most.
    cluster = SlurmCluster(Path(tempfile.mkdtemp(prefix="slurm-")))
    cluster.start()
    yield cluster
    cluster.stop()
    shutil.rmtree(cluster.folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(place)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small file system here")
    yield place
    subprocess.run(["umount", str(place)], check=True)
