"""Windows: every voxel weighted to one, and the same bits however a volume is cut, on however many threads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phantoms import store, store_pair
from trained_run import write_run

from comir_hpc.errors import CheckpointError, ConfigError, VolumeError
from comir_hpc.representations.encoding import (
    Encoder,
    NormalisedReader,
    Sweep,
    load_encoder,
    nearest_level,
    plan_windows,
)
from comir_hpc.representations.encoding.evaluation import in_batches
from comir_hpc.space.grid import Box
from comir_hpc.space.groups import act, rotation_group
from comir_hpc.space.plan import plan_blocks
from comir_hpc.volumes.volume import Volume

SHAPE = (37, 26, 45)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def encoder(run: Path) -> Encoder:
    return load_encoder(run, "one", device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, *SHAPE)).astype(np.float32)


def _reader(image: np.ndarray):
    return lambda box: image[(slice(None), *box.slices)]


# ---------------------------------------------------------------------------------------------- the grid of windows


@given(
    shape=st.tuples(*[st.integers(1, 70)] * 3),
    window=st.sampled_from([16, 24, 32]),
    overlap=st.floats(0, 0.9),
    blend=st.sampled_from(["gaussian", "hann", "exact"]),
    stride=st.sampled_from([(1, 1, 1), (2, 2, 2), (1, 4, 4)]),
)
@settings(max_examples=40, deadline=None)
def test_weights_sum_to_one_and_windows_keep_the_networks_stride(
    shape, window, overlap, blend, stride
) -> None:
    grid = plan_windows(
        shape, window=window, overlap=overlap, blend=blend, total_stride_zyx=stride, halo_zyx=(1, 2, 2)
    )
    total = np.zeros(shape)
    whole = Box((0, 0, 0), shape)
    for window_ in grid.touching(whole):
        inside = window_.box.intersect(whole)
        z, y, x = (
            p[cut] for p, cut in zip(grid.weights(window_), inside.slices_in(window_.box), strict=True)
        )
        assert window_.box.intersect(whole).size
        total[inside.slices] += z[:, None, None].astype(float) * y[:, None] * x
        assert all(
            a % s == 0 and w % s == 0
            for a, w, s in zip(window_.box.start, window_.box.shape, stride, strict=True)
        )
        assert all(b - n < s or b <= n for b, n, s in zip(window_.box.stop, shape, stride, strict=True))
    np.testing.assert_allclose(total, 1, atol=1e-5)


def test_windows_of_a_known_volume() -> None:
    grid = plan_windows(
        (100, 64, 10),
        window=64,
        overlap=0.5,
        blend="gaussian",
        total_stride_zyx=(4, 4, 4),
        halo_zyx=(26, 26, 26),
    )
    assert grid.starts == ((0, 36), (0,), (0,))
    assert grid.window_zyx == (64, 64, 12)
    assert len(grid) == 2
    assert len(list(grid.touching(Box((0, 0, 0), (32, 64, 10))))) == 1
    middle = plan_windows(
        (512,) * 3,
        window=64,
        overlap=0.5,
        blend="gaussian",
        total_stride_zyx=(4, 4, 4),
        halo_zyx=(26, 26, 26),
    )
    assert middle.starts[0] == tuple(range(0, 449, 32))


def test_a_window_to_be_turned_is_equal_along_the_axes_it_is_turned_onto() -> None:
    for group, sides in (("O", (48, 48, 48)), ("D4", (12, 48, 48)), ("D2", (12, 48, 32))):
        grid = plan_windows(
            (10, 48, 30), window=64, overlap=0.5, blend="gaussian", total_stride_zyx=(4, 4, 4), halo_zyx=(1, 1, 1),
            tied_axes=rotation_group(group).tied_axes,
        )  # fmt: skip
        assert grid.window_zyx == sides


def test_a_window_that_cannot_work_is_refused_with_one_that_can() -> None:
    options = {"overlap": 0.5, "total_stride_zyx": (4, 4, 4), "halo_zyx": (26, 26, 26)}
    with pytest.raises(ConfigError, match=r"30 voxels is no multiple of the network's stride .*--window 32"):
        plan_windows((100,) * 3, window=30, blend="gaussian", **options)
    with pytest.raises(ConfigError, match=r"48 voxels along z.*halo 28.*--window 60 or more.*gaussian"):
        plan_windows((100,) * 3, window=48, blend="exact", **options)
    assert len(plan_windows((100,) * 3, window=64, blend="exact", **options)) == 6**3


# ------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("blend", ["gaussian", "hann", "exact"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_cut_of_the_volume_gives_the_same_bits(
    run: Path, image: np.ndarray, blend: str, precision: str
) -> None:
    encoder = load_encoder(run, "one", device="cpu", precision=precision)
    windows = encoder.windows(SHAPE, window=24, blend=blend)
    read = _reader(image)
    whole = encoder.encode(read, windows, Box((0, 0, 0), SHAPE))
    assert whole.shape == (1, *SHAPE)
    for core in ((16, 16, 16), (37, 13, 23)):
        plan = plan_blocks(SHAPE, core)
        sweep = Sweep(encoder, read, windows)
        for number, block in enumerate(plan):
            expected = whole[(slice(None), *block.write.slices)]
            np.testing.assert_array_equal(sweep.encode(block.write), expected)
            if number % 6 == 0:  # on its own, as after a resume
                np.testing.assert_array_equal(encoder.encode(read, windows, block.write), expected)
        assert sweep.evaluated >= len(windows)


def test_boxes_in_a_row_along_x_evaluate_every_window_once(encoder: Encoder, image: np.ndarray) -> None:
    windows = encoder.windows(SHAPE, window=16)
    sweep = Sweep(encoder, _reader(image), windows)
    for start in range(0, SHAPE[2], 5):
        sweep.encode(Box((0, 0, start), (*SHAPE[:2], min(start + 5, SHAPE[2]))))
    assert sweep.evaluated == len(windows)


@pytest.mark.parametrize("blend", ["gaussian", "exact"])
def test_rows_that_follow_each_other_along_y_evaluate_every_window_once(
    encoder: Encoder, image: np.ndarray, blend: str
) -> None:
    windows = encoder.windows(SHAPE, window=24, blend=blend)
    sweep = Sweep(encoder, _reader(image), windows)
    for block in plan_blocks(SHAPE, (SHAPE[0], 5, 11)):  # a window reaches over several rows
        sweep.encode(block.write)
    assert sweep.evaluated == len(windows)


@pytest.mark.parametrize("kept_bytes", [0, 20_000, 1 << 30])
def test_blocks_in_any_order_and_with_any_room_give_the_same_bits(
    encoder: Encoder, image: np.ndarray, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comir_hpc.representations.encoding.sweep._KEPT_BYTES", kept_bytes)
    windows = encoder.windows(SHAPE, window=16, overlap=0.5)
    whole = encoder.encode(_reader(image), windows, Box((0, 0, 0), SHAPE))
    plan = plan_blocks(SHAPE, (16, 13, 15))
    everything = list(range(len(plan)))
    random = np.random.default_rng(0)
    for order in (everything, everything[::-1], everything[::2], random.permutation(everything).tolist()):
        sweep = Sweep(encoder, _reader(image), windows)
        for index in order:
            box = plan[index].write
            np.testing.assert_array_equal(sweep.encode(box), whole[(slice(None), *box.slices)])
            assert sum(kept.values.nbytes for kept in sweep._kept.values()) <= kept_bytes
    sweep = Sweep(encoder, _reader(image), windows)
    for box in (Box((0, 0, 0), (16, 13, 45)), Box((0, 13, 0), (37, 26, 45))):  # the next row is taller
        np.testing.assert_array_equal(sweep.encode(box), whole[(slice(None), *box.slices)])


def test_threads_change_no_bit(encoder: Encoder, image: np.ndarray) -> None:
    windows = encoder.windows(SHAPE, window=24)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(encoder.encode(_reader(image), windows, Box((0, 0, 0), SHAPE)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


# ------------------------------------------------------------------------------------------------- known answers


def test_exact_blending_equals_the_whole_volume_at_once(encoder: Encoder, image: np.ndarray) -> None:
    padded = np.pad(
        image, [(0, 0), (0, 1), (0, 0), (0, 1)], mode="reflect"
    )  # to the stride, as the last window
    expected = encoder.evaluate(padded[None])[0][:, :37, :26, :45]
    windows = encoder.windows(SHAPE, window=24, blend="exact")
    assert len(windows) > 8
    found = encoder.encode(_reader(image), windows, Box((0, 0, 0), SHAPE))
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("blend", ["gaussian", "hann"])
def test_blended_windows_agree_with_the_whole_volume_in_their_middles(
    encoder: Encoder, image: np.ndarray, blend: str
) -> None:
    windows = encoder.windows(SHAPE, window=16, overlap=0.5, blend=blend)
    found = encoder.encode(_reader(image), windows, Box((0, 0, 0), SHAPE))
    expected = encoder.encode(_reader(image), encoder.windows(SHAPE, window=64), Box((0, 0, 0), SHAPE))
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99
    assert not np.array_equal(found, expected)


def test_a_volume_smaller_than_the_window_in_every_axis(encoder: Encoder) -> None:
    small = np.random.default_rng(1).standard_normal((1, 1, 5, 9)).astype(np.float32)
    windows = encoder.windows((1, 5, 9), window=32)
    assert (len(windows), windows.window_zyx) == (1, (2, 6, 10))
    found = encoder.encode(_reader(small), windows, Box((0, 0, 0), (1, 5, 9)))
    padded = np.pad(small, [(0, 0), (0, 1), (0, 1), (0, 1)], mode="reflect")
    np.testing.assert_array_equal(found, encoder.evaluate(padded[None])[0][:, :1, :5, :9])


def test_averaging_over_the_group_makes_any_network_equivariant(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", kernels="free")
    x = np.random.default_rng(2).standard_normal((1, 1, 8, 8, 8)).astype(np.float32)
    plain = load_encoder(run, "one", device="cpu", precision="fp32")
    averaged = load_encoder(run, "one", device="cpu", precision="fp32", symmetrise="O")
    for g in rotation_group("O").matrices[[3, 11, 20]]:
        turned = np.ascontiguousarray(act(x, g))
        for encoder, equal in ((averaged, True), (plain, False)):
            error = np.abs(encoder.evaluate(turned) - act(encoder.evaluate(x), g)).max()
            assert (error < 1e-5) == equal
    assert averaged.identity() != plain.identity()


def test_windows_without_specimen_are_left_out_and_specimen_does_not_notice(encoder: Encoder) -> None:
    image = np.zeros((1, 16, 16, 96), dtype=np.float32)
    image[..., 2:14] = np.random.default_rng(3).uniform(1, 2, (1, 16, 16, 12))
    windows = encoder.windows(image.shape[1:], window=16, overlap=0.5)
    whole = Box((0, 0, 0), image.shape[1:])
    every = encoder.encode(_reader(image), windows, whole)
    sweep = Sweep(encoder, _reader(image), windows, background=np.array([0.5], dtype=np.float32))
    found = np.concatenate(
        [sweep.encode(Box((0, 0, a), (16, 16, a + 24))) for a in range(0, 96, 24)], axis=-1
    )
    assert (sweep.evaluated, sweep.skipped) == (2, len(windows) - 2)
    np.testing.assert_array_equal(found[..., 2:14], every[..., 2:14])
    assert not found[..., 24:].any()
    assert every[..., 24:].any()


def test_batches_on_a_gpu_have_one_shape_and_halve_when_memory_runs_out() -> None:
    """The batching of the GPU path, with a device that takes two windows at most."""
    shapes = []

    def evaluate(batch: np.ndarray) -> np.ndarray:
        shapes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return batch * 2

    cuts = [(number, np.full((1, 2, 2, 2), number, dtype=np.float32)) for number in range(5)]
    found = list(in_batches(evaluate, cuts, 8))
    assert shapes == [8, 4, 2, 2, 2]
    assert [(number, float(one[0, 0, 0, 0])) for number, one in found] == [(n, 2.0 * n) for n in range(5)]

    def never(batch: np.ndarray) -> np.ndarray:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(VolumeError, match="smaller --window"):
        list(in_batches(never, cuts, 4))


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_cpu_and_with_itself(run: Path, image: np.ndarray) -> None:
    cpu = load_encoder(run, "one", device="cpu", precision="fp32")
    gpu = load_encoder(run, "one", device="cuda", precision="fp32")
    windows = cpu.windows(SHAPE, window=24)
    expected = cpu.encode(_reader(image), windows, Box((0, 0, 0), SHAPE))
    whole = gpu.encode(_reader(image), windows, Box((0, 0, 0), SHAPE), batch=4)
    np.testing.assert_allclose(whole, expected, atol=1e-2 * np.abs(expected).max())
    part = Box((8, 0, 16), (24, 26, 45))
    np.testing.assert_array_equal(
        gpu.encode(_reader(image), windows, part, batch=4), whole[(slice(None), *part.slices)]
    )


# ---------------------------------------------------------------------------------------------- volumes and runs


def test_a_volume_in_memory_equals_its_blocks(encoder: Encoder, tmp_path: Path) -> None:
    volume = Volume.open(store_pair(tmp_path)["one"])
    array, grid = encoder.encode_volume(volume, 0, window=16)
    assert grid.agrees_with(volume.grid)
    assert array.shape == (1, *volume.grid.shape_zyx)
    read = NormalisedReader(volume, 0)
    box = Box((8, 8, 8), (24, 30, 40))
    windows = encoder.windows(volume.grid.shape_zyx, window=16)
    np.testing.assert_array_equal(
        encoder.encode(read, windows, box, background=read.background), array[(slice(None), *box.slices)]
    )
    expected = volume.intensity(0).normalise(volume.read(box)[0])
    np.testing.assert_array_equal(read(box)[0], expected)


def test_the_level_nearest_to_the_training_is_chosen_or_none(tmp_path: Path) -> None:
    path = store(
        tmp_path / "v.zarr", np.ones((70, 70, 70), np.uint8) * np.arange(70, dtype=np.uint8), (1.0, 1.0, 1.0)
    )
    volume = Volume.open(path)
    assert [nearest_level(volume, (s, s, s)) for s in (0.8, 1.0, 1.3, 1.6, 2.0, 2.7)] == [0, 0, 0, 1, 1, 1]
    with pytest.raises(
        VolumeError, match=r"voxels of 1 x 1 x 1, 2 x 2 x 2.*mm.*trained at 0.5 x 0.5 x 0.5 mm"
    ):
        nearest_level(volume, (0.5, 0.5, 0.5))
    with pytest.raises(VolumeError, match="resample"):
        nearest_level(volume, (5.0, 1.0, 1.0))


def test_what_is_wrong_with_a_run_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere does not exist.*comir-hpc train"):
        load_encoder(tmp_path / "nowhere", "one")
    (tmp_path / "open" / "checkpoints" / "step-00000100").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"unfinished.*step-00000100.*train"):
        load_encoder(tmp_path / "open", "one")
    with pytest.raises(CheckpointError, match=r"encoders of one, two; there is none of 'three'"):
        load_encoder(run, "three")


def _damaged(run: Path, folder: Path, **changes: object) -> Path:
    shutil.copytree(run, folder)
    record = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    (folder / "model.json").write_text(json.dumps({**record, **changes}), encoding="utf-8")
    return folder


def test_weights_of_another_architecture_are_refused(run: Path, tmp_path: Path) -> None:
    wider = write_run(tmp_path / "wider", widths=(8, 8))
    mixed = _damaged(run, tmp_path / "mixed")
    shutil.copy(wider / "model" / "one.pt", mixed / "model" / "one.pt")
    with pytest.raises(
        CheckpointError, match=r"one\.pt is of another architecture.*another shape \(.*expected"
    ):
        load_encoder(mixed, "one")
    deeper = write_run(tmp_path / "deeper", widths=(4, 8, 8))
    shutil.copy(deeper / "model" / "one.pt", mixed / "model" / "one.pt")
    with pytest.raises(CheckpointError, match=r"are unknown"):
        load_encoder(mixed, "one")


def test_a_damaged_run_is_refused(run: Path, tmp_path: Path) -> None:
    torn = _damaged(run, tmp_path / "torn")
    weights = torn / "model" / "one.pt"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"one\.pt is damaged"):
        load_encoder(torn, "one")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"one\.pt is missing"):
        load_encoder(torn, "one")
    (torn / "model.json").write_text('{"modalities": ["one"', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"model\.json is damaged \(.*train"):
        load_encoder(torn, "one")
    unknown = _damaged(run, tmp_path / "unknown", network={"name": "transformer"})
    with pytest.raises(CheckpointError, match=r"cannot build: unknown network 'transformer'"):
        load_encoder(unknown, "one")


def test_a_volume_with_other_channels_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 200, (2, 8, 8, 8)).astype(np.uint8)
    volume = Volume.open(store(tmp_path / "v.zarr", values))
    with pytest.raises(VolumeError, match=r"has 2 channels, the encoder of modality one .* trained on 1"):
        encoder.encode_volume(volume, 0)
