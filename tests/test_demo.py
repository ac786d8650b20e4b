"""The whole pipeline on the embedded pair, as `comir-hpc demo` runs it, with a briefly trained model.

The pair is that of the demo at 4 mm instead of 2: every step is the same, with an eighth of the voxels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import page_source
from coarse_heads import VOXEL_MM, write_heads

from comir_hpc.config import DemoSettings, IngestSettings, RegisterSettings
from comir_hpc.errors import RegistrationError
from comir_hpc.ingest import ingest
from comir_hpc.recipes import demo as recipe
from comir_hpc.recipes.demo import DemoResult, demo, training_settings
from comir_hpc.train import train
from comir_hpc.volumes.volume import Volume

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The demo's pair at 4 mm, in the demo's own place; its searches try fewer rotations.

    That of mutual information tries hardly any: its error is a figure to compare with, and may be large.
    """

    def settings(representation: str = "comir", **given: Any) -> RegisterSettings:
        rotations = 50 if representation == "intensity" else 600
        return RegisterSettings(representation=representation, rotations=rotations, candidates=4, **given)

    found = write_heads(tmp_path_factory.mktemp("heads"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "embedded_volume", found.__getitem__)
        patch.setattr(recipe, "SCANNER_SIDE", 56)
        patch.setattr(recipe, "RegisterSettings", settings)
        yield found


@pytest.fixture(scope="module")
def brief_model(heads: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Far fewer steps than the demo takes: enough to find the place, not to be exact."""
    folder = tmp_path_factory.mktemp("brief")
    for name, source in heads.items():
        ingest(IngestSettings(source=source, out=folder / f"{name}.zarr"))
    settings = training_settings(folder / "t1w.zarr", folder / "t2w.zarr", seed=0)
    quick = {
        "optimiser": settings.optimiser.model_copy(update={"steps": 30, "average": 0.9}),
        "network": settings.network.model_copy(update={"widths": (8, 16, 32)}),
        "sampling": settings.sampling.model_copy(update={"pairs_per_step": 4, "workers": 0}),
        "loss": settings.loss.model_copy(update={"displacement_negatives": 2}),
    }
    train(settings.model_copy(update=quick), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def done(brief_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoResult]:
    out = tmp_path_factory.mktemp("demo") / "out"

    def tell(text: str) -> None:
        (out / "told").write_text(text, encoding="utf-8")

    return out, demo(DemoSettings(out=out, seed=3, model=brief_model), tell=tell)


def test_it_finds_the_way_back(done: tuple[Path, DemoResult]) -> None:
    _, result = done
    assert result.tre_voxels < 2
    assert result.verdict in ("PASS", "WARN")


def test_result_has_the_keys_that_scripts_rely_on(done: tuple[Path, DemoResult]) -> None:
    out, result = done
    record = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert {"verdict", "tre_voxels", "tre_mm", "mi_tre_voxels", "seconds"} <= set(record)
    assert record["tre_mm"] == pytest.approx(VOXEL_MM * record["tre_voxels"])
    assert record["verdict"] == result.verdict
    assert "no benchmark" in record["note"]


def test_both_methods_are_in_the_result_with_the_same_errors(done: tuple[Path, DemoResult]) -> None:
    out, result = done
    record = json.loads((out / "registration" / "result.json").read_text(encoding="utf-8"))
    assert record["baseline"].keys() - {"name"} == record["truth"].keys() - {"matrix_lps_mm"}
    assert record["baseline"]["tre_voxels"] == result.mi_tre_voxels
    assert record["truth"]["tre_voxels"] == result.tre_voxels


def test_the_general_model_comes_first_and_finds_the_way_without_training(
    done: tuple[Path, DemoResult],
) -> None:
    out, result = done
    assert result.general_verdict in ("PASS", "WARN")
    assert result.general_tre_voxels < 1
    summary = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert summary["general_tre_voxels"] == result.general_tre_voxels
    alone = json.loads((out / "general" / "result.json").read_text(encoding="utf-8"))
    assert alone["truth"]["tre_voxels"] == result.general_tre_voxels
    assert alone["model"]["modalities"] == ["any"]
    beside = json.loads((out / "registration" / "result.json").read_text(encoding="utf-8"))["others"]
    assert [other["tre_voxels"] for other in beside] == [result.general_tre_voxels]
    assert "the general model, without training" in (out / "registration" / "report.html").read_text("utf-8")
    order = [(out / name / "panels.npz").stat().st_mtime_ns for name in ("general", "registration")]
    assert order == sorted(order)
    assert "without training: " in (out / "told").read_text("utf-8")


def test_every_product_is_there(done: tuple[Path, DemoResult]) -> None:
    out, _ = done
    for name in ("transform.tfm", "transform.json", "result.json", "report.html", "panels.npz", "search.npz"):
        assert (out / "registration" / name).is_file(), name
    warped = Volume.open(out / "moving_on_fixed.zarr")
    assert warped.grid.agrees_with(Volume.open(out / "fixed_t1w.zarr").grid)
    assert Volume.open(out / "fixed_representation.zarr").metadata["kind"] == "representation"


@pytest.mark.browser
def test_the_report_opens_and_shows_the_verdict(done: tuple[Path, DemoResult]) -> None:
    out, result = done
    source, console = page_source((out / "registration" / "report.html").as_uri())
    assert not console
    assert result.verdict in source
    assert "utual information" in source
    assert source.count("data:image/png;base64") > 5


def test_a_second_run_does_nothing_again(done: tuple[Path, DemoResult], brief_model: Path) -> None:
    out, first = done
    before = (out / "registration" / "transform.tfm").stat().st_mtime_ns
    again = demo(DemoSettings(out=out, seed=3, model=brief_model))
    assert (out / "registration" / "transform.tfm").stat().st_mtime_ns == before
    assert again.tre_voxels == first.tre_voxels


def test_another_seed_in_the_same_folder_is_refused(done: tuple[Path, DemoResult], brief_model: Path) -> None:
    out, _ = done
    with pytest.raises(RegistrationError, match="seed 3 -> 4"):
        demo(DemoSettings(out=out, seed=4, model=brief_model))
