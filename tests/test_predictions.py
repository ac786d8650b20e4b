"""What verbs predict: the arithmetic, and that the memory of a real process stays below it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from comir_hpc.blocks import cost as prediction
from comir_hpc.blocks.cost import recording_seconds, together, writing_bytes
from comir_hpc.config import IngestSettings
from comir_hpc.data.embedded import phantom_pair
from comir_hpc.host import memory
from comir_hpc.ingest import ingest_array
from comir_hpc.ingest.job import Job
from comir_hpc.networks import build_network, predict_encoding
from comir_hpc.space.grid import Box, Grid
from comir_hpc.train.plan import Prediction, process_bytes
from comir_hpc.transforms import Transform, save_transform
from comir_hpc.volumes import padding
from comir_hpc.volumes.histogram import counting_bytes
from comir_hpc.volumes.readers import open_source
from comir_hpc.volumes.volume import Volume
from comir_hpc.warp.resampling import Resampler

SHAPE = (32, 32, 32)
# Plans, then does, as a notebook would; prints what was predicted and the most memory that the kernel saw in use.
# Not in a fork: the kernel counts no mapped file in a child, and the plan would miss the libraries.
SCRIPT = """
import importlib, json, re, sys
from pathlib import Path
from comir_hpc import config
verb, given = json.loads(sys.argv[1])
module = importlib.import_module(f"comir_hpc.{verb}")
settings = getattr(config, f"{verb.capitalize()}Settings")(**given["settings"])
found = getattr(module, "plan_training" if verb == "train" else f"plan_{verb}")(settings)
print(found.get("peak_memory") or found["memory"])
module.train(settings, Path(given["run"])) if verb == "train" else getattr(module, verb)(settings)
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def test_a_process_is_what_it_holds_and_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"VmHWM": 500, "VmRSS": 300, "RssFile": 120}
    monkeypatch.setattr(memory, "_status_bytes", sizes.get)
    monkeypatch.setattr(memory, "_ELSEWHERE", 0.1)
    assert memory.expected_peak(150) == 500  # the peak of before is higher
    assert memory.expected_peak(250.5) == 563  # 300 are held, and 12 of mapped files may come
    assert memory.expected_in_worker(30, heap=50) == 120 + 12 + 50 + 30
    monkeypatch.setattr(prediction, "expected_peak", lambda more: 300 + more)
    assert together(200, 1, 10) == 200
    assert together(200, 3, 10) == 600 + 310 + prediction._STARTER_BYTES


def test_blocks_on_their_way_to_the_disk() -> None:
    assert writing_bytes(1000, 1) == 2300
    assert writing_bytes(1000, 8) == 3300
    assert counting_bytes(np.dtype(np.uint8), 1000) == 24 * 1000 + 24 * 256
    assert counting_bytes(np.dtype(np.float32), 1 << 30) == (24 << 20) + (24 << 20)


def test_every_shard_and_every_line_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "_flush_seconds", lambda out: 0.01)
    expected = prediction._STORE_SECONDS + 512 * prediction._BLOCK_SECONDS + 2 * (512 + 600) * 0.01
    assert recording_seconds(tmp_path / "out.zarr", 512, 600) == pytest.approx(expected)
    assert prediction.about_seconds(expected) == "about 26.7 s"
    monkeypatch.undo()
    assert recording_seconds(tmp_path / "not" / "yet" / "out.zarr", 1, 1) > 0
    assert not list(tmp_path.iterdir())


def test_a_chunk_that_is_decoded_whole_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import h5py

    values = np.random.default_rng(0).integers(0, 999, (40, 40, 40), dtype=np.uint16)
    needs = {}
    for name, chunks in {"small": (8, 8, 8), "one": values.shape}.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            data = file.create_dataset("v", data=values, chunks=chunks, compression="gzip")
            data.attrs["element_size_um"] = (1.0, 1.0, 1.0)
        monkeypatch.setattr("comir_hpc.ingest.memory.expected_peak", int)
        source = open_source(tmp_path / f"{name}.h5", None)
        # Labels are not counted, which for such a small block takes more than all else.
        settings = IngestSettings(
            source=tmp_path / f"{name}.h5", out=tmp_path / "o.zarr", chunk=8, shard=64, kind="labels"
        )
        needs[name] = Job.from_source(source, settings).memory.process_bytes()
    # The single block is 128,000 bytes: with its packed form 2.3 of it, with the whole chunk decoded from one 3.
    assert needs["one"] - needs["small"] == 3 * values.nbytes - int(2.3 * values.nbytes)


def test_a_piece_that_is_resampled_counts_its_region_and_what_is_rounded(pair: dict[str, str]) -> None:
    moving = Volume.open(Path(pair["one"]))
    box = Box((0, 0, 0), SHAPE)
    voxels = 32**3
    size = moving.dtype.itemsize
    needed = {
        method: Resampler(moving, Transform.identity(), moving.grid, method, [0.0]).needed_bytes([box])  # type: ignore[arg-type]
        for method in ("nearest", "linear", "cubic")
    }
    read = 2 * size * voxels
    assert needed["nearest"] == read + 2 * size * voxels
    assert needed["linear"] == read + (8 if moving.dtype.kind == "f" else 12) * voxels
    assert needed["cubic"] == read + 12 * voxels


def test_filters_are_counted_until_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    padding.filters()
    assert padding.filter_bytes() == 0
    monkeypatch.delitem(sys.modules, "scipy.ndimage")
    assert padding.filter_bytes() == 20 << 20


def test_an_encoding_is_scaled_to_its_window() -> None:
    network = build_network("unet", in_channels=1, latent_channels=1, widths=(4, 8)).eval()
    small = predict_encoding(network, (32, 32, 32))
    assert predict_encoding(network, (64, 64, 32)) == 4 * small
    assert small >= 4 * 32**3 * 4  # the first level's four channels in float32
    assert predict_encoding(network, (32, 32, 32), torch.bfloat16) < small


def test_a_training_is_predicted_as_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comir_hpc.train.plan.peak_bytes", lambda: 1000)
    monkeypatch.setattr("comir_hpc.train.plan._LIBRARY_BYTES", 100)
    assert process_bytes(Prediction(7, 20, 0.0), volumes=30, encoding=40) == 1190


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    found = {}
    for name, values in zip(("one", "two"), phantom_pair(SHAPE, seed=0), strict=True):
        ingest_array(values, Grid(SHAPE, (1.0, 1.0, 1.0)), folder / f"{name}.zarr")
        np.save(folder / f"{name}.npy", values)
        found |= {name: str(folder / f"{name}.zarr"), f"{name}.npy": str(folder / f"{name}.npy")}
    save_transform(Transform.rigid(np.eye(3), (1.0, 0.0, 0.0), (16.0,) * 3), folder)
    return found | {"transform": str(folder / "transform.tfm")}


@pytest.fixture(scope="module")
def train_settings(pair: dict[str, str]) -> dict[str, Any]:
    return {
        "modalities": ["one", "two"],
        "pairs": [{name: pair[name] for name in ("one", "two")}],
        "network": {"widths": [4, 8], "convs_per_level": 1},
        "sampling": {"patch": [16, 16, 16], "pairs_per_step": 2, "workers": 0},
        "optimiser": {"steps": 1},
        "engine": {"device": "cpu"},
        "tracking": {"mlflow": None},
    }


@pytest.fixture(scope="module")
def trained(
    train_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, float, float]:
    """A run with what was predicted and needed for it, MiB."""
    run = tmp_path_factory.mktemp("trained") / "run"
    given = {"settings": train_settings, "run": str(run)}
    return run, *_predicted_and_needed("train", given)


def _predicted_and_needed(verb: str, given: dict[str, Any]) -> tuple[float, float]:
    """MiB that a verb says it needs, and those that it needs, in a process of its own."""
    words = [sys.executable, "-c", SCRIPT, json.dumps([verb, given])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert not done.returncode, done.stderr[-2000:]
    lines = done.stdout.strip().splitlines()
    found = re.match(r"([\d.]+) (MiB|GiB)", lines[0])
    assert found is not None, lines
    return float(found[1]) * (1024 if found[2] == "GiB" else 1), int(lines[-1]) / 1024


def _holds(verb: str, **settings: Any) -> None:
    given = {"settings": settings}
    predicted, needed = _predicted_and_needed(verb, given)
    # Another machine needed 3 % more than this one: what is only just enough here does not hold there.
    assert 1.04 * needed <= predicted <= 1.3 * needed


def test_an_ingest_stays_below(pair: dict[str, str], tmp_path: Path) -> None:
    _holds("ingest", source=pair["one.npy"], out=str(tmp_path / "o.zarr"), spacing=[1, 1, 1], unit="mm")


@pytest.mark.parametrize("name", ["o.zarr", "o.nii.gz"])
def test_a_warp_stays_below(pair: dict[str, str], tmp_path: Path, name: str) -> None:
    _holds("warp", zarr=pair["two"], like=pair["one"], transform=pair["transform"], out=str(tmp_path / name))


def test_a_registration_stays_below(pair: dict[str, str], tmp_path: Path) -> None:
    _holds(
        "register", fixed=pair["one"], moving=pair["two"], out=str(tmp_path / "r"), representation="intensity",
        rotations=24, candidates=1,
    )  # fmt: skip


def test_a_registration_by_the_general_model_stays_below(pair: dict[str, str], tmp_path: Path) -> None:
    _holds(
        "register", fixed=pair["one"], moving=pair["two"], out=str(tmp_path / "r"), rotations=24,
        candidates=1, threads=1, fallback="none",
    )  # fmt: skip


def test_a_training_stays_below(trained: tuple[Path, float, float]) -> None:
    _, predicted, needed = trained
    # Without MLflow a part of the libraries stays out.
    assert 1.04 * needed <= predicted <= 1.5 * needed


def test_an_inference_stays_below(
    trained: tuple[Path, float, float], pair: dict[str, str], tmp_path: Path
) -> None:
    _holds(
        "infer",
        zarr=pair["one"],
        model=str(trained[0]),
        modality="one",
        out=str(tmp_path / "o.zarr"),
        device="cpu",
    )
