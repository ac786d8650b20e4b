"""Voxels through TensorStore: readable by zarr-python, errors of the system kept, nothing left half done."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr

from comir_hpc.blocks.ledger import Ledger
from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import Box, Grid
from comir_hpc.volumes.shards import Shards, num_threads, remove_unfinished
from comir_hpc.volumes.volume import Volume

SHAPE = (16, 16, 16)
BOX = Box((0, 0, 0), SHAPE)


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume.create(tmp_path / "v.zarr", Grid(SHAPE, (1.0, 1.0, 1.0)), "uint16", chunk=4, shard=8)


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 60000, (1, *SHAPE)).astype(np.uint16)


def files(path: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in path.rglob("*") if f.is_file() and f.name != "zarr.json"}


def test_zarr_python_reads_what_is_written_and_the_other_way_round(volume: Volume) -> None:
    volume.write(BOX, noise())
    array = zarr.open_array(str(volume.path / "0"), mode="r+")
    np.testing.assert_array_equal(array[:], noise())
    array[:] = noise(1)
    np.testing.assert_array_equal(volume.read(), noise(1))


def test_the_same_bytes_however_the_values_lie_in_memory(volume: Volume, tmp_path: Path) -> None:
    volume.write(BOX, noise())
    before = files(volume.path)
    volume.write(BOX, np.asfortranarray(noise()))
    assert files(volume.path) == before


def test_a_path_may_go_up_and_through_a_link(
    volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "link.zarr").symlink_to(volume.path)
    monkeypatch.chdir(tmp_path / "below")
    Volume.open(Path("../v.zarr"), writable=True).write(BOX, noise())
    np.testing.assert_array_equal(Volume.open(Path("link.zarr"), allow_incomplete=True).read(), noise())


def test_an_all_zero_shard_has_no_file(volume: Volume) -> None:
    volume.write(BOX, noise())
    volume.write(BOX, np.zeros((1, *SHAPE), np.uint16))
    assert not files(volume.path)
    assert not volume.read().any()


def test_it_is_opened_anew_after_a_pickle(volume: Volume) -> None:
    volume.write(BOX, noise())
    again = pickle.loads(pickle.dumps(volume._shards[0]))
    np.testing.assert_array_equal(again.read((slice(0, 1), *BOX.slices)), noise())


@pytest.fixture
def files_of_half_a_page(volume: Volume) -> Iterator[Volume]:
    """A volume whose files may not grow beyond 512 bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
    yield volume
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_refusal_of_the_file_system_keeps_its_number(files_of_half_a_page: Volume) -> None:
    with pytest.raises(OSError, match="File too large") as caught:
        files_of_half_a_page.write(BOX, noise())
    assert caught.value.errno == errno.EFBIG
    # TensorStore unlinks its temporary file on another thread, which may come after the error.
    deadline = time.monotonic() + 30
    while files(files_of_half_a_page.path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not files(files_of_half_a_page.path)


def test_what_a_killed_writer_left_is_removed_with_the_block(volume: Volume) -> None:
    shard = next(iter(volume.shard_files(BOX)))
    shard.parent.mkdir(parents=True)
    left = shard.with_name(shard.name + "_0123456789abcdef.__lock")
    other = shard.with_name("10_0123456789abcdef.__lock")
    for file in (left, other):
        file.write_bytes(b"half")
    with Ledger(volume.path, "f").writing(0, [shard]):
        assert not left.exists()
        assert other.exists()
    remove_unfinished(other.with_name("10"))
    assert not other.exists()


def test_with_checksums_whichever_bit_flips_is_an_error_that_names_the_shard(tmp_path: Path) -> None:
    grid = Grid(SHAPE, (1.0, 1.0, 1.0))
    volume = Volume.create(tmp_path / "c.zarr", grid, "uint16", chunk=4, shard=8, checksums=True)
    volume.write(BOX, noise())
    array = zarr.open_array(str(volume.path / "0"), mode="r")
    assert "crc32c" in json.dumps(array.metadata.to_dict(), default=str).lower()
    np.testing.assert_array_equal(array[:], noise())
    shard = volume.path / "0" / "c" / "0" / "1" / "0" / "1"
    content = shard.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(content), 60):
        spoiled = bytearray(content)
        spoiled[position] ^= 1 << (position % 8)
        shard.write_bytes(spoiled)
        with pytest.raises(
            VolumeError, match=r"0/c/0/1/0/1 is damaged, box z\[8:16\] y\[0:8\] x\[8:16\] \(.*write it again"
        ):
            volume.read()
        volume.read(Box((0, 0, 0), (8, 16, 16)))
    shard.write_bytes(content)
    np.testing.assert_array_equal(volume.read(), noise())


KILLED = """
import os, sys, threading, time
import numpy as np
from comir_hpc.space.grid import Box
from comir_hpc.volumes.volume import Volume
volume = Volume.open(sys.argv[1], writable=True)
values = np.random.default_rng(0).integers(1, 60000, (1, 16, 16, 16)).astype(np.uint16)
print("ready", flush=True)
while True:
    volume.write(Box((0, 0, 0), (16, 16, 16)), values)
"""


def test_a_shard_is_there_whole_or_not_at_all(volume: Volume) -> None:
    rng = np.random.default_rng(0)
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", KILLED, volume.path], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        signal.sigtimedwait([], float(rng.uniform(0, 0.05)))
        process.kill()
        process.wait()
        found = volume.read()
        for z, y, x in np.ndindex(2, 2, 2):
            place = (0, *(slice(8 * k, 8 * k + 8) for k in (z, y, x)))
            assert np.array_equal(found[place], noise()[place]) or not found[place].any()


def test_threads_follow_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert num_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert num_threads() == len(os.sched_getaffinity(0))


def test_a_missing_array_is_an_error(tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError)):
        Shards(tmp_path / "nothing").read((slice(0, 1),))
