"""A new representation is one class and one line: gradient magnitude, compared by correlation."""

import hashlib
import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from registration_cases import CAME_LATER, errors_vox, seen, specimen, store, turn
from scipy.ndimage import gaussian_gradient_magnitude

import comir_hpc
from comir_hpc.config import RegisterSettings, validate
from comir_hpc.config.words import REPRESENTATIONS, Offered
from comir_hpc.errors import ConfigError
from comir_hpc.register import plan_register, register
from comir_hpc.representations import CORRELATION, INFORMATION, Features, Measure, Representation
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Transform
from comir_hpc.volumes.volume import Volume

GRID = Grid((40, 44, 36), (1.0, 1.0, 1.0), (5.0, -8.0, 20.0))
TRUTH = Transform.rigid(turn(100), (2.0, -1.5, 1.0), GRID.centre_mm)


@dataclass(frozen=True, eq=False)
class Edges(Representation):
    """Edges: they are where they are, whichever side is the brighter one."""

    measure: ClassVar[Measure] = CORRELATION

    def values(self, level, image):
        return gaussian_gradient_magnitude(image, 1.0)[None]


@dataclass(frozen=True, eq=False)
class Twice(Edges):
    """Edges at two scales; only the first level of the pyramid, an algorithm with a version, and notes."""

    noun: ClassVar[str] = "edges"
    origin: ClassVar[str] = "edges, made here"
    measure: ClassVar[Measure] = INFORMATION

    @property
    def num_channels(self):
        return 2

    @property
    def levels(self):
        return range(1)

    def values(self, level, image):
        return np.stack([gaussian_gradient_magnitude(image, sigma) for sigma in (1.0, 2.0)])

    def identity(self):
        return super().identity() | {"edges": 1}


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Settings for a specimen and the same displaced and inverted: what was bright is dark."""
    monkeypatch.setitem(REPRESENTATIONS, "edges", Offered(f"{__name__}:Edges"))
    monkeypatch.setitem(REPRESENTATIONS, "twice", Offered(f"{__name__}:Twice"))
    values, _ = specimen(brightness=4.0)
    moved = seen(values, GRID, GRID, TRUTH)
    store(tmp_path / "fixed.zarr", values, GRID)
    store(tmp_path / "moving.zarr", np.where(moved > 0.5, 9 - moved, 0).astype(np.float32), GRID)
    return {
        **{name: tmp_path / f"{name}.zarr" for name in ("fixed", "moving")},
        **{"out": tmp_path / "out", "rotations": 500, "search_voxels": 24, "candidates": 4, "threads": 1},
    }


def error(result):
    values, mask = specimen(brightness=4.0)
    return errors_vox(result.transform, TRUTH, Features(values[None], mask, GRID))


def test_a_new_representation_registers_a_known_displacement(pair):
    result = register(RegisterSettings(**pair, representation="edges"))
    assert error(result) < 0.5
    assert result.agreement > 0.6
    assert (
        result.record["metric"]["name"] == "correlation of the representations, times the root of the overlap"
    )
    # The calibration has no rows of edges.
    assert result.verdict == "WARN"
    assert any("not been calibrated for --representation edges" in reason for reason in result.reasons)
    assert (result.record["model"], result.record["run"]) == (None, None)
    with np.load(pair["out"] / "panels.npz") as panels:
        assert "axial_after_representation" in panels
    assert register(RegisterSettings(**pair, representation="edges")).skipped


def test_what_a_representation_says_reaches_the_search_the_verdict_and_the_fingerprint(pair):
    settings = RegisterSettings(**pair | {"rotations": 60}, representation="twice")
    plan = plan_register(settings)
    assert plan["fixed"].endswith("edges, made here")
    assert "18 voxels a side" in plan["search"]  # mutual information searches on three quarters of the voxels
    plain = plan_register(RegisterSettings(**pair, representation="edges"))
    assert "24 voxels a side" in plain["search"]
    result = register(settings)
    assert result.record["metric"]["name"] == "normalised mutual information, times the root of the overlap"
    assert any("--representation twice" in reason for reason in result.reasons)
    assert any("self-similarities of the edges" in piece.sentence for piece in result.result.evidence)
    assert result.record["fingerprint"] == plan["fingerprint"] == expected(settings, {"edges": 1})


def test_a_representation_that_is_not_offered_is_refused_with_the_words(tmp_path):
    record = {"fixed": "a", "moving": "b", "out": str(tmp_path), "representation": "gradients"}
    with pytest.raises(
        ConfigError,
        match="representation is 'gradients': Input should be 'comir', 'gradient', 'intensity' or 'mind'",
    ):
        validate(RegisterSettings, record)


@pytest.mark.parametrize("word", REPRESENTATIONS)
def test_every_offered_representation_has_a_class_that_names_its_measure(word):
    module, name = REPRESENTATIONS[word].place.split(":")
    kind = getattr(__import__(module, fromlist=[name]), name)
    assert issubclass(kind, Representation)
    assert isinstance(kind.measure, Measure)
    assert kind.learned == REPRESENTATIONS[word].trained


# ------------------------------------------------------------------------------------------- finished results


def expected(settings, extra=None, compared=(None, None)):
    """Fingerprint of a registration without an encoder, as results since 0.1 have it."""
    places = ("fixed", "moving", "out", "model", "fixed_representation", "moving_representation")
    kept = {k: v for k, v in settings.model_dump(mode="json").items() if k not in places}
    # Threads and overwriting change no result; the others came later, and count only where they are not defaults.
    for name in ("threads", "overwrite", *CAME_LATER):
        del kept[name]
    sides = [
        {"volume": Volume.open(path).fingerprint(), "compared": of, "encoder": None, **(extra or {})}
        for path, of in zip((settings.fixed, settings.moving), compared, strict=True)
    ]
    record = {"version": comir_hpc.__version__, "settings": kept, "sides": sides}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def test_the_fingerprint_of_intensities_stays_what_it_was(pair):
    settings = RegisterSettings(**pair, representation="intensity")
    assert plan_register(settings)["fingerprint"] == expected(settings)


def test_the_fingerprint_of_stored_representations_stays_what_it_was(pair, tmp_path):
    stores = []
    for name in ("fixed", "moving"):
        volume = Volume.open(pair[name])
        source = {"fingerprint": volume.fingerprint(), "level": 0}
        path = tmp_path / f"{name}_rep.zarr"
        stores.append(store(path, volume.read()[0], GRID, kind="representation", source=source))
        pair[f"{name}_representation"] = path
    settings = RegisterSettings(**pair)
    compared = [one.fingerprint() for one in stores]
    assert plan_register(settings)["fingerprint"] == expected(settings, compared=compared)
