from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from comir_hpc.commands.doctor import Check, Checks, compute, doctor, node, safely
from comir_hpc.volumes.volume import Volume


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checks, Path]:
    folder = tmp_path_factory.mktemp("node")
    return doctor(folder), folder


def test_a_node_that_runs_these_tests_is_well(examined):
    checks, folder = examined
    assert not checks.failed, checks.text()
    names = [row.name for row in checks.rows]
    for name in (
        "versions",
        "processor",
        "memory",
        "conv3d fp32",
        "conv3d bf16",
        "conv3d speed",
        "all-reduce",
    ):
        assert name in names
    for name in ("disk space", "disk speed", "zarr", "SLURM", "Apptainer"):
        assert name in names
    assert not list(folder.iterdir())


def test_the_json_says_the_same_as_the_table(examined):
    checks, _ = examined
    rows = json.loads(checks.json())
    assert [row["name"] for row in rows] == [row.name for row in checks.rows]
    assert {"name", "status", "detail", "remedy"} == set(rows[0])
    for row in rows:
        assert f"{row['status']}  {row['name']}" in checks.text()


def test_a_table_names_the_remedy_and_counts_the_lines():
    checks = Checks((Check("one", "PASS", "good"), Check("three", "FAIL", "bad", "mend it")))
    assert checks.failed
    assert checks.text().splitlines() == [
        "PASS  one    good",
        "FAIL  three  bad",
        "             -> mend it",
        "1 PASS, 1 FAIL",
    ]
    assert not Checks(checks.rows[:1]).failed


def test_what_a_check_raises_is_a_fail_with_what_it_said():
    def broken() -> list[Check]:
        raise RuntimeError("NCCL error: unhandled\nmore")

    (row,) = safely("all-reduce", broken)
    assert (row.status, row.detail) == ("FAIL", "RuntimeError: NCCL error: unhandled")


def test_a_wrong_convolution_is_found(monkeypatch):
    import torch

    right = torch.nn.functional.conv3d

    def wrong(x, *args, **kwargs):
        y = right(x, *args, **kwargs)
        return (
            y * torch.where(torch.arange(y.shape[-1]) % 8 == 7, 0.5, 1.0) if y.dtype == torch.bfloat16 else y
        )

    monkeypatch.setattr(torch.nn.functional, "conv3d", wrong)
    rows = {row.name: row for row in compute.conv3d()}
    assert rows["conv3d fp32"].status == "PASS"
    assert rows["conv3d bf16"].status == "FAIL"
    assert "engine.precision=fp32" in rows["conv3d bf16"].remedy


def test_lost_voxels_are_found(tmp_path, monkeypatch):
    read = Volume.read

    def lossy(self, *args, **kwargs):
        values = np.array(read(self, *args, **kwargs))
        values[..., -1] = 0
        return values

    monkeypatch.setattr(Volume, "read", lossy)
    (row,) = node.sharded_volume(tmp_path)
    assert row.status == "FAIL"


def test_a_folder_that_cannot_be_written_is_a_fail(tmp_path):
    rows = safely("disk speed", lambda: node.disk_speed(tmp_path / "missing"))
    assert rows[0].status == "FAIL"
    assert "missing" in rows[0].detail


@pytest.mark.parametrize(("free_gib", "status"), [(1, "FAIL"), (3, "WARN"), (16, "PASS")])
def test_memory_is_judged_by_what_is_left(monkeypatch, free_gib, status):
    monkeypatch.setattr(node, "available_bytes", lambda: free_gib * 1024**3)
    monkeypatch.setattr(node.shutil, "disk_usage", lambda path: type("U", (), {"free": 2**33})())
    (row,) = node.memory()
    assert row.status == status
    assert f"{free_gib}.0 GiB available" in row.detail


def test_a_driver_without_a_cuda_build_is_a_fail(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(node.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    (row,) = node.gpu()
    assert row.status == "FAIL"
    assert "CUDA build" in row.remedy


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(node, "PACKAGES", ("numpy", "deepspeed-of-nowhere"))
    (row,) = node.versions()
    assert (row.status, row.remedy) == ("FAIL", "pip install deepspeed-of-nowhere")


def test_slurm_without_a_cluster_is_a_warning(monkeypatch, tmp_path):
    program = tmp_path / "sbatch"
    program.write_text("#!/bin/sh\necho no configuration >&2\nexit 1\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (row,) = node.slurm()
    assert (row.status, "no configuration" in row.detail) == ("WARN", True)
    assert "SLURM_CONF" in row.remedy


def test_a_job_knows_its_number(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert "this is job 4711" in node.slurm()[0].detail
    monkeypatch.setenv("APPTAINER_CONTAINER", "/images/comir.sif")
    assert node.apptainer()[0].detail == "inside /images/comir.sif"


def dies(*given: object) -> None:
    """What a process of the group test does where the machine kills it."""
    os._exit(1)


def test_a_group_whose_processes_all_die_has_no_answer(monkeypatch):
    monkeypatch.setattr(compute, "_join", dies)
    (row,) = compute.all_reduce()
    assert row.status == "FAIL"
    assert "no answer" in row.detail
