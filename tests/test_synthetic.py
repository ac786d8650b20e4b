"""Made-up pairs: their geometry is one, their contrasts are two, and nothing but the seed decides."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from comir_hpc.config.files import load
from comir_hpc.config.train import SamplingSettings, SyntheticSettings, TrainSettings
from comir_hpc.config.words import SHARED
from comir_hpc.errors import CheckpointError, ConfigError
from comir_hpc.learning.synthetic.anatomies import KINDS, draw_anatomy
from comir_hpc.learning.synthetic.contrasts import brightness, curved, spoiled
from comir_hpc.learning.synthetic.fields import nearest, patch_points, smooth_noise, turned
from comir_hpc.learning.synthetic.sampler import MadeSampler
from comir_hpc.representations.encoding.loading import load_encoder
from comir_hpc.runs.model import general_model, read_model
from comir_hpc.space.groups import rotation_group
from comir_hpc.train import plan_training, train

PATCH = (16, 16, 16)
CPU = torch.device("cpu")


def _sampler(seed: int = 0, **synthetic: float) -> MadeSampler:
    sampling = SamplingSettings(patch=PATCH)
    return MadeSampler(SyntheticSettings(**synthetic), sampling, rotation_group("O"), 2, seed)  # type: ignore[arg-type]


def test_a_turn_keeps_distances() -> None:
    points = patch_points(PATCH)
    moved = turned(np.random.default_rng(0), points, 2.0, bend=0.0)
    before = np.linalg.norm(points[0, 0, 0] - points[5, 9, 3])
    after = np.linalg.norm(moved[0, 0, 0] - moved[5, 9, 3])
    assert after == pytest.approx(2 * before, rel=1e-5)


def test_noise_has_unit_variance_and_its_scale() -> None:
    rng = np.random.default_rng(1)
    points = patch_points((48, 48, 48))
    coarse, fine = (smooth_noise(rng, points, 8, cell=cell) for cell in (12.0, 3.0))
    assert 0.7 < coarse.std() < 1.3
    assert 0.7 < fine.std() < 1.3
    # A field of four times the cell changes a quarter as fast.
    steepness = [np.abs(np.diff(one, axis=1)).mean() for one in (coarse, fine)]
    assert 3.0 < steepness[1] / steepness[0] < 5.0


def test_nearest_agrees_with_all_distances() -> None:
    rng = np.random.default_rng(2)
    points = patch_points((5, 6, 7))
    seeds, weights = rng.normal(0, 3, (9, 3)).astype(np.float32), rng.uniform(0, 4, 9).astype(np.float32)
    power = np.square(points[..., None, :] - seeds).sum(axis=-1) - weights
    number, value = nearest(points, seeds, weights)
    assert (number == power.argmin(axis=-1)).all()
    np.testing.assert_allclose(value, power.min(axis=-1), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_several_materials(kind: str) -> None:
    rng = np.random.default_rng(3)
    points = turned(rng, patch_points((24, 24, 24)), 1.0, bend=1.0)
    labels, count = KINDS[kind][1](rng, points)
    assert labels.shape == (24, 24, 24)
    assert labels.min() >= 0
    assert labels.max() < count
    assert len(np.unique(labels)) >= 2


def test_shares_of_the_kinds_add_up() -> None:
    assert sum(share for share, _ in KINDS.values()) == pytest.approx(1.0)
    drawn = {draw_anatomy(np.random.default_rng(n), (8, 8, 8), 1.0).kind for n in range(60)}
    assert drawn == set(KINDS)


def test_one_material_has_one_brightness_before_it_is_spoiled() -> None:
    flat = next(
        a for n in range(40) if not (a := draw_anatomy(np.random.default_rng(n), PATCH, 1.0)).air.any()
    )
    points = patch_points(PATCH)
    views = [brightness(np.random.default_rng(n), flat, points) for n in range(30)]
    plain = [
        view for view in views if all(np.ptp(view[flat.labels == i]) == 0 for i in np.unique(flat.labels))
    ]
    assert 5 < len(plain) < 25  # half of the views have texture
    assert not np.allclose(plain[0], plain[1])


def test_a_curve_is_a_function_of_the_value() -> None:
    values = np.linspace(0, 1, 101, dtype=np.float32)
    shuffled = np.random.default_rng(0).permutation(values)
    order = np.argsort(shuffled)
    assert (
        curved(np.random.default_rng(5), shuffled)[order] == curved(np.random.default_rng(5), values)
    ).all()
    falls = [np.diff(curved(np.random.default_rng(n), values)).min() < 0 for n in range(20)]
    assert any(falls)


def test_spoiling_keeps_size_and_is_finite() -> None:
    points = patch_points(PATCH)
    image = np.random.default_rng(0).random(PATCH, dtype=np.float32)
    for seed in range(30):
        view = spoiled(np.random.default_rng(seed), image, points)
        assert view.shape == PATCH
        assert view.dtype == np.float32
        assert np.isfinite(view).all()


@pytest.mark.parametrize("real", [0.0, 1.0])
def test_the_seed_alone_decides(real: float) -> None:
    one, again, other = _sampler(real=real), _sampler(real=real), _sampler(seed=1, real=real)
    first = one.read(one.draw(3, 2))
    assert all((a == b).all() for a, b in zip(first, again.read(again.draw(3, 2)), strict=True))
    assert not torch.equal(first[0], one.read(one.draw(3, 1))[0])
    assert not torch.equal(first[0], other.read(other.draw(3, 2))[0])


def test_both_views_show_one_geometry() -> None:
    """Where the first view has a border, so has the second one: gradients agree in place, not in sign or size."""

    def edges(view: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        slopes = np.gradient(view[0].double().numpy())
        return np.asarray(np.sqrt(sum(s**2 for s in slopes)).ravel())

    sampler = _sampler(real=0.3)
    views = [sampler.read(sampler.draw(0, n)) for n in range(48)]
    same = [np.corrcoef(edges(v[0]), edges(v[1]))[0, 1] for v in views]
    wrong = [np.corrcoef(edges(v[0]), edges(w[1]))[0, 1] for v, w in itertools.pairwise(views)]
    assert np.mean(same) > 0.15 + np.mean(wrong)


def test_a_moved_draw_moves_the_second_view_only() -> None:
    sampler = _sampler()
    draw = sampler.draw(0, 0)
    plain, moved = sampler.read(draw), sampler.read(sampler.moved(draw, 1, 3))
    assert torch.equal(plain[0], moved[0])
    assert torch.equal(plain[1].roll(3, dims=2), moved[1])


def test_a_batch_has_one_element_a_view() -> None:
    sampler = _sampler()
    batch = sampler.batch(0, range(6), CPU)
    assert [image.shape for image in batch.images] == [(6, 1, *PATCH)] * 2
    assert batch.valid.all()
    assert batch.elements.shape == (2, 6)
    assert len(np.unique(batch.elements)) > 3
    assert not sampler.clean().draw(0, 1).elements.any()


def _settings(**changes: object) -> TrainSettings:
    given: dict[str, object] = {
        "modalities": ["first", "second"],
        "network": {"widths": [4, 8], "convs_per_level": 1, "shared": True},
        "synthetic": {},
        "sampling": {"patch": PATCH, "pairs_per_step": 4, "workers": 0},
        "optimiser": {"steps": 4},
        "engine": {"device": "cpu"},
        "tracking": {"mlflow": None},
        "checkpoint": {"every_steps": 2},
    }
    return TrainSettings.model_validate(given | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    train(_settings(), folder)
    return folder


def test_one_encoder_serves_every_name(run: Path) -> None:
    model = read_model(run)
    assert (model.modalities, model.shared, model.scale_free) == ((SHARED,), True, True)
    assert [path.name for path in (run / "model").iterdir()] == ["any.pt"]
    digests = {load_encoder(run, name).digest for name in ("first", "anything", None)}
    assert len(digests) == 1
    assert model.reference.agreement is not None


def test_a_stopped_training_goes_on_to_the_same_weights(run: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    # The rate falls to zero at the last step, so the first half has to know of the second one: a copy is cut back.
    shutil.copytree(run, half)
    shutil.rmtree(max((half / "checkpoints").glob("step-*")))
    for name in ("model.json", "model"):
        path = half / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(_settings(), half)
    assert (half / "model" / "any.pt").read_bytes() == (run / "model" / "any.pt").read_bytes()


def test_readers_in_other_processes_make_the_same_pairs(run: Path, tmp_path: Path) -> None:
    sampling = {"patch": PATCH, "pairs_per_step": 4, "workers": 1}
    train(_settings(sampling=sampling), tmp_path / "run")
    assert (tmp_path / "run" / "model" / "any.pt").read_bytes() == (run / "model" / "any.pt").read_bytes()


def test_no_pairs_and_nothing_made_up_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set synthetic\.share=1"):
        _settings(synthetic=None)
    with pytest.raises(ValueError, match=r"set synthetic\.share=1"):
        _settings(synthetic={"share": 0.5})


def test_the_general_configuration_is_valid() -> None:
    settings = load(TrainSettings, Path("configs/general.yaml"))
    assert settings.network.shared
    assert settings.synthetic is not None
    assert not settings.pairs


def test_a_damaged_asset_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run, tmp_path / "data" / "general")
    monkeypatch.setattr("comir_hpc.runs.model.files", lambda _: tmp_path)
    assert general_model() == tmp_path / "data" / "general"
    path = tmp_path / "data" / "general" / "model" / "any.pt"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        general_model()


def test_a_training_starts_from_the_weights_of_another(run: Path, tmp_path: Path) -> None:
    # With a rate of next to nothing the weights stay what they were at the start.
    still = {"steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0}
    train(_settings(start_from=str(run), optimiser=still), tmp_path / "next")
    before, after = (torch.load(one / "model" / "any.pt") for one in (run, tmp_path / "next"))
    weights = [name for name in before if "running" not in name and "batches" not in name]
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in weights)
    assert read_model(tmp_path / "next").started_from == {"run": str(run), "step": "4"}


def test_a_start_from_another_network_names_the_settings(run: Path, tmp_path: Path) -> None:
    network = {"widths": [4, 16], "convs_per_level": 1, "shared": True}
    with pytest.raises(ConfigError, match=r"set network\.widths=\[4, 8\] \(now \[4, 16\]\)"):
        train(_settings(start_from=str(run), network=network), tmp_path / "next")
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        plan_training(
            _settings(start_from=str(tmp_path / "nowhere"))
        )  # a dry run refuses what the training would
    assert not (tmp_path / "next").exists()
