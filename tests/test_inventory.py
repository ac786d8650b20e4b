"""What a finished store has on disk: every file that goes missing or changes its size is named, in every level."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from phantoms import store

from comir_hpc.errors import VolumeError
from comir_hpc.volumes import inventory
from comir_hpc.volumes.inventory import Inventory, _packed, _unpacked
from comir_hpc.volumes.volume import Volume

VALUES = np.random.default_rng(0).integers(1, 200, (40, 44, 48)).astype(np.uint16)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return store(tmp_path / "v.zarr", VALUES, chunk=8, shard=16)


def shard(path: Path, level: int) -> Path:
    return path / str(level) / "c" / "0" / "1" / "0" / "1"


@given(st.lists(st.integers(0, 2**40), min_size=24, max_size=24))
@settings(max_examples=30, deadline=None)
def test_sizes_come_back(sizes: list[int]) -> None:
    array = np.array(sizes, dtype=np.int64).reshape(2, 3, 2, 2)
    np.testing.assert_array_equal(_unpacked(_packed(array), array.shape), array)


def test_the_record_is_small() -> None:
    sizes = np.random.default_rng(0).normal(2e7, 3e6, (1, 50, 50, 40)).astype(np.int64)
    assert len(json.dumps(Inventory(Path("v"), [sizes]).record())) < 450_000


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.unlink(), r"c/0/1/0/1 is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), r"c/0/1/0/1 has \d+ bytes, \d+ were written"),
        (
            lambda file: file.write_bytes(file.read_bytes() + b"x"),
            r"c/0/1/0/1 has \d+ bytes, \d+ were written",
        ),
        (lambda file: file.write_bytes(b""), r"c/0/1/0/1 is missing"),
        (lambda file: [f.unlink() for f in file.parent.iterdir()], r"c/0/1/0/1 is missing"),
    ],
    ids=["deleted", "cut", "grown", "empty", "folder"],
)
def test_a_store_that_lost_a_file_is_refused_when_it_is_opened(
    path: Path, level: int, damage, words: str
) -> None:
    assert Volume.open(path).complete
    damage(shard(path, level))
    with pytest.raises(
        VolumeError, match=rf"v\.zarr: \d+ of \d+ shard files are not as they were written .*{level}/{words}"
    ):
        Volume.open(path)
    assert Volume.open(path, allow_incomplete=True).damage()


def test_a_file_where_nothing_was_stored_is_named(tmp_path: Path) -> None:
    values = VALUES.copy()
    values[16:32, :16, 16:32] = 0
    path = store(tmp_path / "v.zarr", values, chunk=8, shard=16)
    assert not shard(path, 0).exists()
    assert Volume.open(path).read()[0].tolist() == values.tolist()
    shard(path, 0).write_bytes(b"stale")
    with pytest.raises(VolumeError, match="0/c/0/1/0/1 holds 5 bytes where nothing was stored"):
        Volume.open(path)


@pytest.mark.parametrize("level", [0, 1])
def test_of_a_large_store_a_file_is_looked_at_when_it_is_first_read_from(
    path: Path, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comir_hpc.volumes.store.LOOKED_AT_ONCE", 10)
    looked: list[str] = []
    size = inventory._size
    monkeypatch.setattr(inventory, "_size", lambda file: (looked.append(file.as_posix()), size(file))[1])
    shard(path, level).unlink()
    volume = Volume.open(path)
    assert not looked
    whole = volume.level_grid(level).box
    part = type(whole)((0, 0, 0), (5, 5, 5))
    volume.read(part, level=level)
    volume.read(part, level=level)
    assert len(looked) == 1
    with pytest.raises(VolumeError, match=rf"{level}/c/0/1/0/1 is missing"):
        volume.read(level=level)
    volume.read(level=1 - level)


def test_writing_takes_the_word_back_and_a_new_list_is_made(path: Path) -> None:
    volume = Volume.open(path, writable=True)
    box = next(iter(volume.level_shards(0)))
    volume.write(box, np.zeros((1, *box.shape), np.uint16))
    with pytest.raises(VolumeError, match="incomplete"):
        Volume.open(path)
    volume.build_pyramid()
    volume.finish()
    assert not Volume.open(path).read(box).any()


def test_a_store_of_an_older_version_opens_without_a_list(path: Path) -> None:
    group = zarr.open_group(str(path), mode="r+")
    attributes = {k: v for k, v in group.attrs.asdict().items() if k != "comir_files"}
    group.attrs.put(attributes)
    volume = Volume.open(path)
    assert not volume.recorded
    np.testing.assert_array_equal(volume.read()[0], VALUES)


@pytest.mark.parametrize("spoil", [[], {"a": 1}, None, 7, [{"shards": [1, 1, 1, 1], "sizes": "AA=="}]])
def test_a_damaged_list_is_named(path: Path, spoil: object) -> None:
    record = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
    record["attributes"]["comir_files"] = spoil
    (path / "zarr.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(VolumeError, match=r"v\.zarr: its list of files is damaged"):
        Volume.open(path)


def test_the_list_is_no_part_of_the_fingerprint(path: Path) -> None:
    before = Volume.open(path).fingerprint()
    Volume.open(path, writable=True).finish()
    assert Volume.open(path).fingerprint() == before


def test_every_verb_that_reads_a_store_refuses_one_that_lost_a_file(path: Path, tmp_path: Path) -> None:
    """Before it writes anything; the error names the file."""
    from trained_run import write_run

    from comir_hpc.config import InferSettings, RegisterSettings, TrainSettings, WarpSettings
    from comir_hpc.infer import infer
    from comir_hpc.register import register
    from comir_hpc.train import train
    from comir_hpc.transforms import Transform, save_transform
    from comir_hpc.warp import warp

    other = store(tmp_path / "other.zarr", VALUES)
    shard(path, 1).unlink()
    save_transform(Transform.identity(), tmp_path)
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    transform = tmp_path / "transform.tfm"
    pairs = [{"one": other, "two": path}]
    acts = [
        lambda: infer(InferSettings(zarr=path, model=run, modality="one", out=out.with_suffix(".zarr"))),
        lambda: warp(WarpSettings(zarr=path, like=other, transform=transform, out=out.with_suffix(".zarr"))),
        lambda: warp(WarpSettings(zarr=other, like=path, transform=transform, out=out.with_suffix(".zarr"))),
        lambda: register(RegisterSettings(fixed=other, moving=path, out=out, representation="intensity")),
        lambda: train(TrainSettings(modalities=("one", "two"), pairs=pairs), out),
    ]
    for act in acts:
        with pytest.raises(VolumeError, match=r"v\.zarr: 1 of \d+ shard files .*1/c/0/1/0/1 is missing"):
            act()
        assert not out.with_suffix(".zarr").exists()
        assert not (out / "result.json").exists()
        assert not (out / "checkpoints").exists()
