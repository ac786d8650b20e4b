"""A training on a disk that fills up: one line of what happened, one of what became of its record, no traceback."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from phantoms import store_pair
from small_disk import small_disk

from comir_hpc.errors import CheckpointError
from comir_hpc.runs.checkpoints import list_checkpoints, read_checkpoint, write_checkpoint

pytestmark = pytest.mark.slow


def settings(folder: Path, **tracking: object) -> Path:
    pair = store_pair(folder / "pair")
    record = {
        "modalities": list(pair),
        "pairs": [{name: str(path) for name, path in pair.items()}],
        "network": {"widths": [8, 16], "convs_per_level": 1},
        "loss": {"subcrops": 1, "displacement_negatives": 0},
        "sampling": {"patch": [16, 16, 16], "pairs_per_step": 2},
        "optimiser": {"steps": 200},
        "engine": {"precision": "fp32", "device": "cpu"},
        "tracking": {"log_every": 1, "picture_every": 100, **tracking},
        "checkpoint": {"every_steps": 1, "keep": 1000},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(record), encoding="utf-8")
    return path


def train(config: Path, run: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "comir_hpc", "train", str(config), "--run", str(run)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(65536)):
            pass


def lines_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the command said, without its progress."""
    return [line for line in done.stderr.splitlines() if not line.startswith("train: ")]


@pytest.mark.parametrize("mib", [1, 2])  # without room for the tracker's database, and with it
def test_a_full_disk_is_one_line_and_one_of_the_tracker(tmp_path: Path, mib: int) -> None:
    config = settings(tmp_path, system_every=0.2)
    with small_disk(tmp_path / "disk", mib) as disk:
        done = train(config, disk / "run")
        kept = list_checkpoints(disk / "run" / "checkpoints")
        step = read_checkpoint(kept[0])["loop"]["step"]
        assert kept[0].name == f"step-{step:08d}"  # whole
    assert done.returncode == 1
    said = lines_of(done)
    assert len(said) <= 2, done.stderr
    assert "cannot be written (" in said[-1]
    assert "no space left on the disk" in said[-1] or "No space left on device" in said[-1]
    assert "0 MiB free there" in said[-1]
    assert len(said[-1]) < 500
    assert done.stdout == ""


def test_a_checkpoint_that_cannot_be_written_says_why_and_what_is_left(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        folder = disk / "checkpoints"
        for step in (1, 2):
            write_checkpoint(folder / f"step-{step:08d}", {"loop": {"step": step}})
        _fill(disk / "filler")
        with pytest.raises(CheckpointError) as refused:
            write_checkpoint(folder / "step-00000003", {"loop": {"step": 3, "more": bytes(10**6)}})
        line = str(refused.value)
        assert "Intact: step-00000002 and 1 before it; make room" in line
        assert "\n" not in line
        assert "enforce fail" not in line
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]
