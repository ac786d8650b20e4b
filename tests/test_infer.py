"""Infer: the same bytes for any number of parts, any block and after any kill; nothing half-written is trusted."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phantoms import store, store_pair
from trained_run import write_run

from comir_hpc.blocks.ledger import Ledger
from comir_hpc.config import InferSettings, validate
from comir_hpc.errors import CheckpointError, ConfigError, StopRequested, VolumeError
from comir_hpc.infer import infer, plan_infer
from comir_hpc.infer.inputs import core_of
from comir_hpc.representations.encoding import load_encoder, plan_windows
from comir_hpc.representations.seams import seam_figure
from comir_hpc.space.grid import Triple
from comir_hpc.volumes.volume import Volume, chunk_and_shard

Folder = Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("infer")
    write_run(folder / "run")
    store_pair(folder, (34, 30, 52))
    infer(settings(folder, "reference.zarr"))
    return folder


def settings(folder: Path, out: str | Path, **changes: Any) -> InferSettings:
    options = {"window": 16, "chunk": 8, "shard": 16, "device": "cpu", "precision": "fp32", **changes}
    return InferSettings(
        **{
            "zarr": folder / "one.zarr",
            "model": folder / "run",
            "modality": "one",
            "out": folder / out,
            **options,
        }
    )


def stored(path: Path) -> dict[str, bytes]:
    """Every file that holds voxels, by name."""
    return {
        str(p.relative_to(path)): p.read_bytes()
        for p in path.rglob("*")
        if p.is_file() and p.name != "zarr.json"
    }


def test_the_representation_is_the_encoders_and_says_where_it_comes_from(folder: Path) -> None:
    out = Volume.open(folder / "reference.zarr")
    source = Volume.open(folder / "one.zarr")
    encoder = load_encoder(folder / "run", "one", device="cpu", precision="fp32")
    expected, grid = encoder.encode_volume(source, 0, window=16)
    np.testing.assert_array_equal(out.read(), expected)
    assert np.abs(expected).max() > 0
    assert out.grid.agrees_with(grid)
    metadata = out.metadata
    assert metadata["kind"] == "representation"
    assert metadata["source"] == {
        "path": str((folder / "one.zarr").resolve()), "fingerprint": source.fingerprint(), "level": 0,
    }  # fmt: skip
    assert metadata["model"]["weights"] == encoder.digest
    assert (metadata["made_from"]["window"], metadata["made_from"]["blend"]) == (16, "gaussian")
    assert metadata["value_range"] == [[pytest.approx(expected.min()), pytest.approx(expected.max())]]
    assert metadata["measured"]["windows"] > 0
    assert out.num_levels == source.num_levels


@pytest.mark.parametrize(
    ("parts", "changes"),
    [(1, {"core": 16}), (1, {"core": 48}), (2, {}), (7, {"core": 16}), (1, {"workers": 2, "core": 16})],
    ids=["small blocks", "large blocks", "two parts", "seven parts", "two processes"],
)
def test_any_split_of_the_work_gives_the_same_bytes(
    folder: Path, tmp_path: Path, parts: int, changes: dict[str, int]
) -> None:
    results = [
        infer(settings(folder, tmp_path / "out.zarr", part=(number, parts), **changes))
        for number in range(1, parts + 1)
    ]
    assert [r.complete for r in results] == [False] * (parts - 1) + [True]
    assert sum(r.computed for r in results) == results[0].missing + results[0].blocks
    if parts > 1:
        assert "blocks of other parts are missing" in results[0].summary
    assert stored(tmp_path / "out.zarr") == stored(folder / "reference.zarr")


def test_kill_at_any_moment_then_the_same_command_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    code = f"""
        import sys, torch
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_infer import Path, infer, settings
        infer(settings(Path({str(folder)!r}), Path({str(out)!r}), core=16),
              progress=lambda what, done, total: print(done, flush=True))
    """
    for after in (1, 6):  # once in the midst of writing, once further on
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            stdout=subprocess.PIPE, text=True, encoding="utf-8", env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert process.stdout is not None
        while int(process.stdout.readline()) < after:
            pass
        time.sleep(0.02 * after)
        process.kill()
        process.wait()
        with pytest.raises(VolumeError, match="incomplete"):
            Volume.open(out)
    before = Ledger(out, Volume.open(out, writable=True).metadata["fingerprint"]).done()
    result = infer(settings(folder, out, core=16))
    assert result.computed == result.blocks - len(before) < result.blocks
    assert stored(out) == stored(folder / "reference.zarr")
    assert infer(settings(folder, out)).computed == 0, "finished: another core changes nothing"


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(folder: Path, tmp_path: Path) -> None:
    """The disk is filled by a limit on the size of files, which the system refuses in the same way."""
    out = tmp_path / "out.zarr"
    code = f"""
        import resource, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_infer import Path, VolumeError, infer, settings
        made = settings(Path({str(folder)!r}), Path({str(out)!r}), core=16)
        resource.setrlimit(resource.RLIMIT_FSIZE, (12000, resource.RLIM_INFINITY))
        try:
            infer(made)
        except VolumeError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    assert re.search(
        r"out\.zarr: block \d+, z\[.*cannot be written \(File too large\); make room", done.stdout
    )
    assert infer(settings(folder, out, core=16)).complete
    assert stored(out) == stored(folder / "reference.zarr")


def test_a_stop_signal_in_a_run_leaves_what_the_same_command_finishes(folder: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StopRequested, match="the same command goes on"):
        infer(settings(folder, tmp_path / "out.zarr", core=16), progress=stop)
    assert infer(settings(folder, tmp_path / "out.zarr", core=16)).complete
    assert stored(tmp_path / "out.zarr") == stored(folder / "reference.zarr")


def test_a_torn_shard_is_found_and_made_again(folder: Path, tmp_path: Path) -> None:
    made = settings(folder, tmp_path / "out.zarr", core=16)
    infer(made)
    shard = max((tmp_path / "out.zarr" / "0").rglob("c/*/*/*/*"), key=lambda p: p.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[10] ^= 0xFF
    shard.write_bytes(content)
    assert infer(made).computed == 0
    assert infer(made.model_copy(update={"verify": True})).computed == 1
    shard.unlink()
    assert infer(made).computed == 1
    assert stored(tmp_path / "out.zarr") == stored(folder / "reference.zarr")


def test_an_output_of_another_model_input_or_window_is_refused_unless_overwritten(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.zarr"
    infer(settings(folder, out))
    other = write_run(tmp_path / "other", seed=1)
    for changes, named in (
        ({"model": other}, "encoder"),
        ({"zarr": folder / "two.zarr"}, "source_fingerprint"),
        ({"window": 24}, "window: 16, now 24"),
    ):
        with pytest.raises(VolumeError, match=rf"made from something else \(.*{named}.*--overwrite"):
            infer(settings(folder, out, **changes))
    assert stored(out) == stored(folder / "reference.zarr")
    assert infer(settings(folder, out, model=other, overwrite=True)).computed > 0
    assert stored(out) != stored(folder / "reference.zarr")


def test_the_level_of_the_models_spacing_is_read(folder: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(1, 200, (40, 40, 40)).astype(np.uint8)
    fine = store(tmp_path / "fine.zarr", values, (1.0, 1.0, 1.0))
    result = infer(settings(folder, tmp_path / "out.zarr", zarr=fine))
    assert result.level == 1
    assert Volume.open(tmp_path / "out.zarr").grid.agrees_with(Volume.open(fine).level_grid(1))


def test_float16_halves_the_store_and_keeps_the_values(folder: Path, tmp_path: Path) -> None:
    infer(settings(folder, tmp_path / "half.zarr", dtype="float16"))
    half, full = Volume.open(tmp_path / "half.zarr").read(), Volume.open(folder / "reference.zarr").read()
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, full.astype(np.float16))


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_integers_are_read_back_as_multiples_of_their_scale(folder: Path, tmp_path: Path, dtype: str) -> None:
    for number in (2, 1):
        infer(settings(folder, tmp_path / "parts.zarr", dtype=dtype, part=(number, 2)))
    result = infer(settings(folder, tmp_path / "out.zarr", dtype=dtype))
    out, full = Volume.open(result.path), Volume.open(folder / "reference.zarr")
    (scale,) = out.metadata["quantised"]["scale"]
    assert (out.stored_dtype, out.dtype, out.read().dtype) == (np.dtype(dtype), np.float32, np.float32)
    assert out.metadata["measured"]["clipped_values"] == 0
    np.testing.assert_allclose(out.read(), full.read(), atol=0.5001 * scale)
    assert scale < 2 * np.abs(full.read()).max() / np.iinfo(dtype).max
    assert ((out.read_stored() == 0) >= (full.read() == 0)).all()
    assert stored(tmp_path / "parts.zarr") == stored(result.path)
    coarse = np.abs(out.read(level=1) - full.read(level=1)).max()
    assert coarse <= 1.001 * scale


def test_what_was_expected_stands_beside_what_was_needed(folder: Path, tmp_path: Path) -> None:
    result = infer(settings(folder, tmp_path / "out.zarr"))
    kept = Volume.open(result.path).metadata
    assert kept["predicted"]["blocks"] == kept["needed"]["blocks"] == result.blocks
    assert kept["needed"]["peak_bytes"] > 0
    assert kept["needed"]["num_bytes"] > 0
    assert kept["needed"]["files"] <= kept["predicted"]["files"]
    assert re.search(rf"\n{result.blocks} blocks \({result.blocks} expected\) in .* files", result.summary)
    assert "\n" not in infer(settings(folder, tmp_path / "out.zarr")).summary


def test_a_source_that_changes_meanwhile_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "one.zarr", tmp_path / "one.zarr")
    made = settings(folder, tmp_path / "out.zarr", zarr=tmp_path / "one.zarr")

    def disturb(what: str, done: int, total: int) -> None:
        if done == 1:
            os.utime(next(f for f in (tmp_path / "one.zarr" / "0" / "c").rglob("*") if f.is_file()), (1, 1))

    with pytest.raises(VolumeError, match=r"one\.zarr changed while it was read; .*--overwrite"):
        infer(made, progress=disturb)
    with pytest.raises(VolumeError, match="incomplete"):
        Volume.open(made.out)
    with pytest.raises(VolumeError, match="source_fingerprint"):
        infer(made)
    infer(made.model_copy(update={"overwrite": True}))
    np.testing.assert_array_equal(Volume.open(made.out).read(), Volume.open(folder / "reference.zarr").read())


def test_background_is_skipped_and_not_stored(folder: Path, tmp_path: Path) -> None:
    values = np.zeros((16, 16, 96), dtype=np.uint8)
    values[:, :, :12] = np.random.default_rng(0).integers(50, 200, (16, 16, 12))
    path = store(tmp_path / "sparse.zarr", values, above=20.0)
    infer(settings(folder, tmp_path / "skipped.zarr", zarr=path))
    infer(settings(folder, tmp_path / "all.zarr", zarr=path, skip_background=False))
    skipped, full = (Volume.open(tmp_path / f"{name}.zarr") for name in ("skipped", "all"))
    assert skipped.metadata["measured"]["empty_windows"] > 0 == full.metadata["measured"]["empty_windows"]
    np.testing.assert_array_equal(skipped.read()[..., :12], full.read()[..., :12])
    assert not skipped.read()[..., 32:].any()
    assert len(stored(tmp_path / "skipped.zarr")) < len(stored(tmp_path / "all.zarr"))


def test_the_plan_agrees_with_what_is_done(folder: Path, tmp_path: Path) -> None:
    made = settings(folder, tmp_path / "out.zarr", skip_background=False)
    plan = plan_infer(made)
    assert not made.out.exists()
    result = infer(made)
    measured = Volume.open(made.out).metadata["measured"]
    assert plan["blocks"] == result.blocks
    assert plan["evaluations_at_most"] == measured["windows"] >= plan["windows"]
    assert plan["files_at_most"] >= sum(1 for p in made.out.rglob("*") if p.is_file())
    assert plan["seconds_a_window"] > 0
    part = plan_infer(settings(folder, tmp_path / "out.zarr", part=(2, 3)))
    assert part["blocks_of_this_part"] < plan["blocks"]


@pytest.mark.parametrize(
    ("shape", "processes", "core"),
    [
        ((256, 256, 256), 1, (256, 256, 256)),
        ((512, 512, 512), 1, (256, 256, 256)),
        ((512, 512, 512), 64, (128, 128, 128)),  # a block for everyone
        ((256, 256, 256), 2, (256, 256, 128)),  # cut where nothing is evaluated twice
        ((100, 1000, 4000), 1, (128, 256, 256)),
        ((1, 3000, 3000), 2, (1, 256, 256)),
    ],
)
def test_blocks_are_laid_so_that_the_work_is_done_first(
    folder: Path, shape: Triple, processes: int, core: Triple
) -> None:
    windows = plan_windows(
        shape, window=64, overlap=0.25, blend="gaussian", total_stride_zyx=(8, 8, 8), halo_zyx=(56, 56, 56)
    )
    _, shard = chunk_and_shard(shape, 64, 128)
    assert core_of(settings(folder, "out.zarr", part=(1, processes)), windows, shard) == core


def test_a_read_only_target_is_one_sentence(folder: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(VolumeError, match=r"out\.zarr.* cannot be made \(Read-only file system\)"):
        infer(settings(folder, small_disk / "out.zarr"))


def test_the_seam_figure_sees_a_seam(folder: Path, tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32), (40, 40, 40)).copy()
    faces = {"blocks": ([], [], [20])}
    smooth = Volume.open(store(tmp_path / "smooth.zarr", ramp))
    assert seam_figure(smooth, faces) == {"blocks": pytest.approx(1.0)}
    ramp[..., 20:] += 4
    broken = Volume.open(store(tmp_path / "broken.zarr", ramp))
    assert seam_figure(broken, faces) == {"blocks": pytest.approx(5.0)}
    assert seam_figure(broken, {"windows": ([], [7], [])}) == {"windows": None}
    # A small specimen in much background: its few borders are among those looked at.
    line = np.zeros(1000, dtype=np.float32)
    line[480:530] = 100 + np.arange(50) + 4 * (np.arange(50) >= 20) + 4 * (np.arange(50) >= 30)
    sparse = Volume.open(store(tmp_path / "sparse.zarr", np.broadcast_to(line, (8, 8, 1000)).copy()))
    assert seam_figure(
        sparse, {"windows": ([], [], [*range(50, 500, 50), 500, 510, *range(550, 1000, 50)])}
    ) == {"windows": pytest.approx(5.0)}
    result = infer(settings(folder, "reference.zarr"))
    assert result.seam is not None
    assert 0.5 < result.seam["windows"] < 2
    assert "jump across window borders" in result.summary


def test_what_cannot_work_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    two_channels = store(
        tmp_path / "rgb.zarr", np.random.default_rng(0).integers(0, 99, (2, 8, 8, 8)).astype(np.uint8)
    )
    for error, match, changes in (
        (VolumeError, "does not exist", {"zarr": tmp_path / "none.zarr"}),
        (VolumeError, "2 channels", {"zarr": two_channels}),
        (CheckpointError, "none of 'ct'", {"modality": "ct"}),
        (CheckpointError, "does not exist", {"model": tmp_path / "none"}),
        (ConfigError, "window of 15", {"window": 15}),
        (
            ConfigError,
            "the output .* is the input .* itself",
            {"out": folder / "one.zarr", "overwrite": True},
        ),
        (ConfigError, r"part 3/2 does not exist; expected 1/2 to 2/2", {"part": (3, 2)}),
    ):
        with pytest.raises(error, match=match):
            infer(validate(InferSettings, {**settings(folder, out).model_dump(), **changes}))
        assert not list(tmp_path.glob("out*"))
    assert Volume.open(folder / "one.zarr").complete
