"""Padding is recognised, left out of everything, and what is no padding stays as it is to the last bit."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial.transform import Rotation

from comir_hpc.config import IngestSettings, RegisterSettings
from comir_hpc.data.embedded import Displacement, degrade, displace, embedded_volume, phantom_pair
from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.ingest import ingest, ingest_array
from comir_hpc.ingest import padding as recognition
from comir_hpc.learning.specimens import Specimen, specimen_share
from comir_hpc.register import register
from comir_hpc.representations.encoding import NormalisedReader
from comir_hpc.representations.features import specimen_mask
from comir_hpc.space.grid import Box, Grid
from comir_hpc.transforms import load_transform
from comir_hpc.volumes.histogram import Histogram, intensity_of
from comir_hpc.volumes.padding import Padding, Unpadded, padding_notes, paddings_of
from comir_hpc.volumes.pyramid import downsample
from comir_hpc.volumes.resampled import covering
from comir_hpc.volumes.volume import Volume

SHAPE = (48, 57, 48)


def head(modality: str = "t1w") -> np.ndarray:
    """The embedded brain at 4 mm, 0 to 255, air of about 10."""
    values = sitk.GetArrayFromImage(sitk.ReadImage(str(embedded_volume(modality))))
    return downsample(values.astype(np.float32)[None], (2, 2, 2))[0]


def outside_circle(shape: tuple[int, ...] = SHAPE, radius: float = 0.98) -> np.ndarray:
    """Corners (z, y, x) outside a round field of view."""
    _, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    return y**2 + x**2 > radius**2


OUT = outside_circle()


def stored(folder: Path, values: np.ndarray, **settings: Any) -> Volume:
    path = folder / "volume.zarr"
    values = values if values.ndim == 4 else values[None]
    ingest_array(values, Grid(values.shape[1:], (4.0, 4.0, 4.0)), path, overwrite=True, **settings)
    return Volume.open(path)


def noise(sigma: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, sigma, SHAPE)


def ct(sigma: float = 0.0) -> np.ndarray:
    """The head as if air were -1000."""
    return head() * 4 - 1024 + noise(sigma)


def inner_circle(values: np.ndarray, inner: float, outer: float) -> np.ndarray:
    return np.where(outside_circle(radius=1.2), outer, np.where(OUT, inner, values))


def rician(scale: float, sigma: float) -> np.ndarray:
    return np.hypot(np.where(head() > 40, head() * scale, 0) + noise(sigma), noise(sigma)[::-1])


PADDED = {
    "below a CT's air": (lambda: np.where(OUT, -3024, ct()), "int16", (-3024,)),
    "below noisy air": (lambda: np.where(OUT, -3024, ct(80)), "int32", (-3024,)),
    "float": (lambda: np.where(OUT, -2000, ct(40)), "float32", (-2000,)),
    "zero in a CT": (lambda: np.where(OUT, 0, ct()), "int16", (0,)),
    "zero in a noisy CT": (lambda: np.where(OUT, 0, ct(40)), "float64", (0,)),
    "above everything": (lambda: np.where(OUT, 4095, head()), "int16", (4095,)),
    "255 of 8 bits": (lambda: np.where(OUT, 255, np.minimum(head(), 255)), "uint8", (255,)),
    "zero below bright air": (lambda: np.where(OUT, 0, 100 + head() + noise(5)), "uint16", (0,)),
    "two values": (lambda: inner_circle(ct(), -2048, -3024), "int16", (-3024, -2048)),
    "above constant air": (lambda: np.where(OUT, 4095, np.where(head() > 64, head(), 0)), "int16", (4095,)),
    "below constant air": (
        lambda: np.where(OUT, -3024, np.where(head() > 64, ct(), -1000)),
        "int16",
        (-3024,),
    ),
}


@pytest.mark.parametrize("name", PADDED)
def test_padding_is_recognised_and_left_out(name: str, tmp_path: Path) -> None:
    values, dtype, expected = PADDED[name]
    volume = stored(tmp_path, values().astype(dtype))
    (padding,) = paddings_of(volume)
    assert padding is not None
    assert set(padding.values) == set(expected)
    assert padding.share == pytest.approx(OUT.mean(), abs=0.01)
    assert any(f"{expected[0]}" in note and f"{padding.share:.1%}" in note for note in padding_notes(volume))
    whole = ndimage.binary_fill_holes(ndimage.uniform_filter((head() > 64.5).astype(float), 5) > 0.5)
    mask, right = specimen_mask(volume, 0), whole & ~OUT
    assert 2 * (mask & right).sum() / (mask.sum() + right.sum()) > 0.92
    assert not (mask & OUT).any()
    # On another grid, the mask is the same, and nothing of the padding is mixed into it.
    grid = covering(volume.grid, (6.0, 5.0, 5.0))
    other = specimen_mask(volume, grid)
    place = np.rint(volume.grid.index_zyx(grid.world_mm(np.argwhere(other)))).astype(int)
    z, y, x = np.clip(place, 0, np.asarray(SHAPE) - 1).T
    assert mask[z, y, x].mean() > 0.93
    assert not OUT[z, y, x].mean() > 0.02
    assert other.sum() * 6 * 25 == pytest.approx(mask.sum() * 64, rel=0.12)
    intensity = volume.intensity()
    inside = values().astype(dtype)[~OUT].astype(float)
    assert intensity.low == pytest.approx(np.quantile(inside, 0.001), abs=0.05 * np.ptp(inside))
    assert intensity.high == pytest.approx(np.quantile(inside, 0.999), abs=0.05 * np.ptp(inside))
    assert padding.fill <= intensity.foreground_above


@cache
def unpadded() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    t2w = head("t2w")
    moved, _, _ = displace(t2w, Grid(SHAPE, (4.0, 4.0, 4.0)), Displacement.draw(rng, SHAPE), 56)
    brain = ndimage.binary_erosion(ndimage.binary_fill_holes(head() > 64), iterations=3)
    one, other = phantom_pair((40, 40, 40))
    return {
        "T1w": head().astype(np.uint8),
        "T2w": t2w,
        "turned, noise cut off at 0": degrade(moved, rng),
        "turned, plain": moved,
        "brain in nothing": np.where(brain, head(), 0).astype(np.int16),
        "brain in nothing, T2w": np.where(brain, t2w, -1000).astype(np.float32),
        "phantom": one,
        "other phantom": other,
        "air just above its padding": np.where(OUT, 0, head()).astype(np.int16),
        "padding in the noise": np.where(OUT, 0, np.where(head() > 64, head(), 0) + noise(3)).astype(
            np.float32
        ),
        "two values": (head() > 64).astype(np.uint8),
        "specimen at the border": np.where(head()[:24] > 64, 200, head()[:24]).astype(np.uint8),
        "constant specimen at the border": np.pad(np.full((20, 30, 30), 9.0), ((0, 10), (5, 5), (5, 5)))
        + 0.1,
        "noise": np.random.default_rng(0).integers(0, 200, (32, 32, 32)).astype(np.uint16),
    }


@pytest.mark.parametrize("name", unpadded())
def test_what_is_no_padding_stays_as_it_is_to_the_bit(name: str, tmp_path: Path) -> None:
    values = unpadded()[name]
    volume = stored(tmp_path, values)
    assert "padding" not in volume.metadata
    assert padding_notes(volume) == []
    histogram = Histogram(values.dtype, float(volume.metadata["centre"]))
    histogram.add(values)
    assert volume.intensity() == intensity_of(histogram)
    np.testing.assert_array_equal(Unpadded(volume).read()[0], values)
    assert Unpadded(volume).known().all()


def test_a_large_volume_is_judged_on_a_coarser_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.where(OUT, 4095, head()).astype(np.int16)
    fine = stored(tmp_path, values)
    monkeypatch.setattr(recognition, "_LOOKED_AT", values.size // 4)
    monkeypatch.setattr(recognition, "_KEPT", 1000)
    coarse = stored(tmp_path, values, chunk=8, shard=16)
    (padding,) = paddings_of(coarse)
    assert padding is not None
    assert padding.values == (4095,)
    assert padding.where.size <= 1000
    assert not (Unpadded(coarse).read() == 4095).any()
    assert coarse.intensity() == fine.intensity()


def test_a_volume_read_without_padding_is_the_same_however_it_is_cut(tmp_path: Path) -> None:
    values = np.where(OUT, 255, np.minimum(head(), 250)).astype(np.uint8)
    values[20:26, 25:31, 20:26] = 255  # saturated, but far from the border: measured
    volume = stored(tmp_path, values, chunk=8, shard=16)
    reader = Unpadded(volume)
    whole = reader.read()[0]
    assert (whole[20:26, 25:31, 20:26] == 255).all()
    near = ndimage.binary_dilation(OUT, np.ones((3, 3, 3)))
    assert (whole[near] == whole[OUT][0]).all()
    np.testing.assert_array_equal(whole[~near], values[~near])
    np.testing.assert_array_equal(reader.known(), ~near)
    np.testing.assert_array_equal(volume.read()[0], values)  # what is stored is not touched
    for level in range(volume.num_levels):
        whole, known = reader.read(level=level), reader.known(level=level)
        box = Box((3, 0, 7), (11, 9, 20))
        np.testing.assert_array_equal(reader.read(box, level=level), whole[(slice(None), *box.slices)])
        np.testing.assert_array_equal(reader.known(box, level=level), known[box.slices])
    # Mixtures of padding and air would be the brightest voxels of a coarse level, at its border.
    share = downsample(OUT.astype(np.float32)[None], (2, 2, 2))[0]
    edge = ndimage.binary_dilation(share == 1, np.ones((3, 3, 3))) & (share > 0)
    assert volume.read(level=1)[0][edge].min() > 64
    assert reader.read(level=1)[0][edge].max() < 64


def test_every_reader_of_a_volume_leaves_padding_out(tmp_path: Path) -> None:
    volume = stored(tmp_path, np.where(OUT, 4095, head()).astype(np.int16))
    plain = tmp_path / "plain.zarr"
    ingest_array(head().astype(np.int16), Grid(SHAPE, (4.0, 4.0, 4.0)), plain)
    reader = NormalisedReader(volume, 0)
    assert reader(Box((0, 0, 0), SHAPE))[0][OUT].max() <= reader.background[0]
    specimen = Specimen((volume, volume), 0, (16, 16, 16))
    assert specimen.read([Box((0, 0, 0), SHAPE)] * 2)[0].max() < 4095
    share = specimen_share([volume], 0, (16, 16, 16)).values
    assert share.mean() == pytest.approx(
        specimen_share([Volume.open(plain)], 0, (16, 16, 16)).values.mean(), abs=0.06
    )


def test_each_channel_has_its_own_padding(tmp_path: Path) -> None:
    channels = np.stack([np.where(OUT, 4095, head()), head(), np.where(OUT, 2000, head())]).astype(np.int16)
    volume = stored(tmp_path, channels)
    values = [None if p is None else p.values for p in paddings_of(volume)]
    assert values == [(4095,), None, (2000,)]
    assert "channel 2" in padding_notes(volume)[1]
    assert Unpadded(volume).known().all()  # the second channel was measured everywhere


def test_a_slice_has_padding_too(tmp_path: Path) -> None:
    plane = np.where(OUT, 255, np.minimum(head(), 250)).astype(np.uint8)[20:21]
    volume = stored(tmp_path, plane)
    (padding,) = paddings_of(volume)
    assert padding is not None
    assert padding.values == (255,)
    assert not (specimen_mask(volume, 0) & OUT[20:21]).any()


def test_nan_that_became_a_value_is_padding(tmp_path: Path) -> None:
    volume = stored(tmp_path, np.where(OUT, np.nan, ct(20)).astype(np.float32), non_finite=0.0)
    (padding,) = paddings_of(volume)
    assert padding is not None
    assert padding.values == (0,)
    assert not (specimen_mask(volume, 0) & OUT).any()


def test_padding_can_be_named_and_denied(tmp_path: Path) -> None:
    values = np.where(OUT, 4095, head()).astype(np.int16)
    denied = stored(tmp_path, values, padding="none")
    assert "padding" not in denied.metadata
    assert denied.intensity().high == 4095
    # Too thin to be recognised: one voxel along one face.
    values = head().astype(np.int16)
    values[0] = 3000
    assert paddings_of(stored(tmp_path, values)) == (None,)
    (named,) = paddings_of(stored(tmp_path, values, padding=3000))
    assert named is not None
    assert named.share == pytest.approx(1 / 48, abs=1e-3)
    assert Unpadded(Volume.open(tmp_path / "volume.zarr")).read().max() < 300


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        (-3024, VolumeError, "no voxel has this value, they are 0 to 25"),
        (0.5, ConfigError, "no value of int16"),
    ],
)
def test_a_padding_that_is_not_there_is_refused(
    value: float, error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        stored(tmp_path, head().astype(np.int16), padding=value)


@pytest.mark.parametrize("value", ["nothing", float("nan"), float("inf")])
def test_a_padding_that_is_no_value_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="padding"):
        IngestSettings(source=Path("a"), out=Path("b"), padding=value)  # type: ignore[arg-type]


def test_the_option_does_not_undo_what_was_ingested_before(tmp_path: Path) -> None:
    """The record of a store that was made without the option is the same as before there was one."""
    image = sitk.GetImageFromArray(head())
    sitk.WriteImage(image, str(tmp_path / "a.nii"))
    settings = IngestSettings(source=tmp_path / "a.nii", out=tmp_path / "a.zarr")
    ingest(settings)
    assert "padding" not in Volume.open(tmp_path / "a.zarr").metadata["made_from"]
    assert ingest(settings).computed == 0
    with pytest.raises(VolumeError, match="padding: None, now none"):
        ingest(settings.model_copy(update={"padding": "none"}))


def test_the_map_survives_the_metadata() -> None:
    where = np.random.default_rng(0).random((5, 7, 3)) > 0.5
    padding = Padding((-3024.0, 0.5), -1000.0, 0.25, where, (2, 2, 4))
    again = Padding.from_record(json.loads(json.dumps(padding.as_record())))
    np.testing.assert_array_equal(again.where, where)
    assert (again.values, again.fill, again.share, again.step_zyx) == (
        (-3024.0, 0.5),
        -1000.0,
        0.25,
        (2, 2, 4),
    )


REGISTERED = {
    "below": lambda v, out: np.where(out, -3024, v * 4 - 1024),
    "above": lambda v, out: np.where(out, 4095, v),
    "zero in a CT": lambda v, out: np.where(out, 0, v * 4 - 1024),
}


@pytest.mark.parametrize(
    ("name", "side"), [("below", "moving"), ("above", "fixed"), ("zero in a CT", "moving")]
)
def test_padded_volumes_are_registered(name: str, side: str, tmp_path: Path) -> None:
    """T1w and T2w at 4 mm, mutual information: within a millimetre of the truth, whichever side is padded."""
    fixed, moving = head("t1w"), head("t2w")
    grid = Grid(SHAPE, (4.0, 4.0, 4.0))
    rotation = Rotation.from_euler("zyx", (20, -15, 30), degrees=True).as_matrix()
    moved, cube, truth = displace(moving, grid, Displacement(rotation, np.array([2.0, -1.0, 1.5])), 52)
    moved = np.where(moved > 0, moved, 10)
    pad = REGISTERED[name]
    fixed = (pad(fixed, OUT) if side == "fixed" else fixed).astype(np.int16)
    moved = (pad(moved, outside_circle(moved.shape)) if side == "moving" else moved).astype(np.int16)
    ingest_array(fixed, grid, tmp_path / "fixed.zarr")
    ingest_array(moved, cube, tmp_path / "moving.zarr")
    result = register(
        RegisterSettings(
            fixed=tmp_path / "fixed.zarr",
            moving=tmp_path / "moving.zarr",
            out=tmp_path / "out",
            representation="intensity",
            rotations=300,
            search_voxels=24,
            candidates=3,
            checks="full" if name == "below" else "quick",  # which are never more than WARN
            threads=1,
        )
    )
    points = grid.world_mm(np.argwhere(head("t1w") > 64)[::50])
    found = load_transform(tmp_path / "out" / "transform.tfm")
    assert found.distance_mm(truth, points).mean() < 1
    assert result.verdict == ("PASS" if name == "below" else "WARN")
    (note,) = json.loads((tmp_path / "out" / "result.json").read_text())["notes"]
    assert f"{side}.zarr" in note
