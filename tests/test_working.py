"""Working grids: the spacing that a model sees both volumes of a pair at, whatever their own is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from registration_cases import OBLIQUE, store
from trained_run import write_run

from comir_hpc.config import InferSettings, RegisterSettings
from comir_hpc.errors import VolumeError
from comir_hpc.infer import infer, plan_infer
from comir_hpc.register.inputs import open_inputs
from comir_hpc.register.similarity import Similarity
from comir_hpc.representations.encoding import NormalisedReader, load_encoder
from comir_hpc.representations.features import specimen_mask
from comir_hpc.representations.working import WorkingGrids, specimen_size_mm, working_grid
from comir_hpc.runs.model import Model, read_model
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Transform
from comir_hpc.volumes.volume import Volume


def model_of(
    folder: Path,
    spacing: tuple[float, float, float] = (2.0, 2.0, 2.0),
    *,
    scale_free: bool = False,
    group: str = "O",
) -> Model:
    run = write_run(folder / f"run{spacing[0]:g}{scale_free}", spacing=spacing, group=group)
    record = json.loads((run / "model.json").read_text(encoding="utf-8"))
    (run / "model.json").write_text(json.dumps(record | {"scale_free": scale_free}), encoding="utf-8")
    return read_model(run)


def ball(
    path: Path, grid: Grid, radius_mm: float, centre_mm: tuple[float, float, float] | None = None
) -> Volume:
    """A ball of smooth structure in the world, seen on a grid; air is 0."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape_zyx], indexing="ij"), axis=-1)
    world = grid.world_mm(index)
    x, y, z = np.moveaxis(world, -1, 0) / radius_mm * 20
    inside = np.linalg.norm(world - (grid.centre_mm if centre_mm is None else centre_mm), axis=-1) < radius_mm
    values = 100 + 30 * np.sin(x / 2) * np.cos(y / 2.5) + 20 * np.sin(z / 2.2 + 1) * np.cos(x / 3)
    return store(path, np.where(inside, values, 0).astype(np.float32), grid, foreground_above=40.0)


def cube(size: int, spacing: float, **more) -> Grid:
    return Grid((size,) * 3, (spacing,) * 3, **more)


def test_a_specialist_sees_its_own_spacing_and_coarser_ones(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    fine, coarse = ball(tmp_path / "a", cube(80, 1.0), 30), ball(tmp_path / "b", cube(28, 3.1), 30)
    grids = WorkingGrids.for_model(model, (fine, coarse))
    assert grids == WorkingGrids.for_model(model, (coarse, fine))
    assert grids.spacings_zyx == ((2.0,) * 3, (4.0,) * 3)  # 80 mm are ten voxels of 8 mm
    assert grids.grid(fine, 0) == fine.level_grid(1)
    assert grids.grid(coarse, 0).shape_zyx == (44,) * 3
    assert grids.notes_on(fine, 0) == []
    (note,) = grids.notes_on(coarse, 0)
    assert "voxels of 3.1 mm are seen on a grid of 2 mm" in note
    assert "seen on a grid of 2 mm" in note
    assert grids.notes_on(coarse, 1) == []


def test_a_level_of_nearly_the_spacing_is_read_as_it_is(tmp_path: Path) -> None:
    volume = ball(tmp_path / "a", cube(40, 2.09), 30)
    assert working_grid(volume, (2.0,) * 3) == volume.grid
    assert working_grid(volume, (1.98,) * 3).shape_zyx == (43,) * 3
    thick = ball(tmp_path / "b", Grid((20, 40, 40), (4.0, 2.0, 2.0)), 30)
    assert working_grid(thick, (4.0, 2.0, 2.0)) == thick.grid
    assert working_grid(thick, (2.0,) * 3).shape_zyx == (40, 40, 40)
    assert working_grid(thick, (4.0,) * 3) == thick.level_grid(1)


def test_a_training_of_thick_slices_keeps_its_proportions(tmp_path: Path) -> None:
    model = model_of(tmp_path, (4.0, 2.0, 2.0), group="D4")
    volume = ball(tmp_path / "a", cube(80, 1.0), 30)
    grids = WorkingGrids.for_model(model, (volume,))
    assert grids.spacings_zyx == ((4.0, 2.0, 2.0), (8.0, 4.0, 4.0))


def test_the_scale_of_a_model_without_one_follows_from_the_specimens(tmp_path: Path) -> None:
    model = model_of(tmp_path, scale_free=True)
    small, large = ball(tmp_path / "a", cube(64, 0.5), 12), ball(tmp_path / "b", cube(64, 1.0), 27)
    sizes = specimen_size_mm(small), specimen_size_mm(large)
    assert sizes == (pytest.approx(24, rel=0.12), pytest.approx(54, rel=0.12))
    side = math.sqrt(sizes[0] * sizes[1])
    grids = WorkingGrids.for_model(model, (small, large))
    assert grids == WorkingGrids.for_model(model, (large, small))
    # 96 voxels a side would be 0.35 mm, where the coarser volume has voxels of 1 mm.
    assert [s[0] for s in grids.spacings_zyx] == pytest.approx([side / n for n in (64, 48, 32)], rel=1e-12)
    (note,) = grids.notes
    assert f"working grids of {side / 96:.4g} mm are left out: the coarser volume has voxels of 1 mm" in note
    sharp = ball(tmp_path / "c", cube(100, 0.3), 12)
    assert len(WorkingGrids.for_model(model, (sharp, sharp)).spacings_zyx) == 4
    tiny = ball(tmp_path / "d", cube(14, 4.0), 24)
    only = WorkingGrids.for_model(model, (tiny, tiny))
    assert only.spacings_zyx == ((2.0,) * 3,)


def test_specks_beside_a_specimen_do_not_make_it_larger(tmp_path: Path) -> None:
    grid = cube(64, 1.0)
    volume = ball(tmp_path / "a", grid, 15)
    values = volume.read()[0]
    values[2:6, 2:6, 2:6] = 200
    assert specimen_size_mm(store(tmp_path / "b", values, grid, foreground_above=40.0)) == pytest.approx(
        specimen_size_mm(volume), abs=1
    )
    assert specimen_size_mm(store(tmp_path / "c", 0 * values, grid, foreground_above=40.0)) is None


def test_too_small_specimens_are_refused_and_absurd_spacings_are_noted(tmp_path: Path) -> None:
    volume = ball(tmp_path / "a.zarr", cube(40, 1.0), 15)
    with pytest.raises(
        VolumeError, match=r"a\.zarr is \d+ mm in size: [34]\.\d voxels of the working grid of 8 mm"
    ):
        WorkingGrids.for_model(model_of(tmp_path, (8.0,) * 3), (volume,))
    with pytest.raises(VolumeError, match="more than 16 times finer than the voxels of"):
        WorkingGrids.for_model(model_of(tmp_path), (volume,), 0.05)
    with pytest.raises(VolumeError, match="0 voxels of the working grid of inf mm"):
        WorkingGrids.for_model(model_of(tmp_path), (volume,), math.inf)
    absurd = WorkingGrids.for_model(model_of(tmp_path, (0.002,) * 3), (volume, volume))
    assert absurd.spacings_zyx == ((1.0,) * 3,)
    assert "trained at 0.002 mm" in absurd.notes[0]
    assert "check the units" in absurd.notes[0]
    finer = WorkingGrids.for_model(model_of(tmp_path, (0.15,) * 3), (volume, volume))
    assert [s[0] for s in finer.spacings_zyx] == [0.3, 0.6]
    assert "both volumes are encoded at 0.3 mm" in finer.notes[0]


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, object]:
    """One ball on two grids that have nothing in common, and a run that was trained at 2 mm."""
    centre = (3.0, -5.0, 8.0)
    grid = Grid((26, 50, 52), (3.4, 1.7, 1.7), direction=OBLIQUE)
    origin = np.array(centre) - grid.centre_mm + 2.5
    turned = Grid(grid.shape_zyx, grid.spacing_mm, tuple(origin), OBLIQUE)
    ball(tmp_path / "fixed.zarr", Grid((44, 44, 44), (2.0,) * 3, (-40.0, -48.0, -35.0)), 30, centre)
    ball(tmp_path / "moving.zarr", turned, 30, centre)
    run = write_run(tmp_path / "run", kernels="symmetric")
    record = json.loads((run / "model.json").read_text(encoding="utf-8"))
    (run / "model" / "two.pt").write_bytes((run / "model" / "one.pt").read_bytes())
    (run / "model.json").write_text(json.dumps(record), encoding="utf-8")
    return {
        "fixed": tmp_path / "fixed.zarr", "moving": tmp_path / "moving.zarr", "out": tmp_path / "out", "model": run,
        "fixed_modality": "one", "moving_modality": "two",
    }  # fmt: skip


def test_representations_agree_though_the_volumes_have_other_axes_and_voxels(pair: dict[str, object]) -> None:
    inputs = open_inputs(RegisterSettings(**pair))
    fixed, moving = inputs.fixed.representation, inputs.moving.representation
    assert list(fixed.levels) == list(moving.levels) == [0, 1]
    assert fixed.spacings_mm == moving.spacings_mm == (2.0, 4.0)
    # What does not fit into memory is encoded on a coarser grid, and never at two scales.
    needs = [side.predicted_bytes(0) for side in (inputs.fixed, inputs.moving)]
    little = RegisterSettings(**pair, max_memory_gib=(sum(needs) - 0.3 * min(needs)) / 2**30)
    assert [side.level for side in (open_inputs(little).fixed, open_inputs(little).moving)] == [1, 1]
    # The fixed volume has the spacing of the training: what it gives are the bits of a level read as it is.
    seen, _ = fixed.features(0)
    encoder = load_encoder(pair["model"], "one")
    np.testing.assert_array_equal(seen.values, encoder.encode_volume(fixed.volume, 0)[0])
    np.testing.assert_array_equal(seen.mask, specimen_mask(fixed.volume, 0))
    assert "working_grid" not in fixed.identity()
    other, image = moving.features(0)
    assert other.grid == moving.grid(0)
    assert other.grid.spacing_mm == (2.0,) * 3
    assert image.shape == other.mask.shape == other.grid.shape_zyx == other.values.shape[1:]
    assert moving.identity()["working_grid"] == other.grid.as_dict()
    assert Similarity(seen, other).at(Transform.identity()).correlation > 0.9
    assert any("3.4 mm along z are seen on a grid of 2 mm" in note for note in inputs.moving.notes)


def test_infer_writes_on_the_working_grid_in_any_cut_and_it_is_compared_as_computed_here(
    pair: dict[str, object], tmp_path: Path
) -> None:
    given = {
        "zarr": pair["moving"],
        "model": pair["model"],
        "modality": "two",
        "device": "cpu",
        "precision": "fp32",
    }
    blocks = {"window": 16, "chunk": 8, "shard": 16}
    whole = infer(InferSettings(**given, **blocks, out=tmp_path / "whole.zarr", core=64))
    for number in (2, 1):
        infer(InferSettings(**given, **blocks, out=tmp_path / "parts.zarr", core=16, part=(number, 2)))
    made = Volume.open(tmp_path / "whole.zarr")
    assert made.read().tobytes() == Volume.open(tmp_path / "parts.zarr").read().tobytes()
    source = Volume.open(pair["moving"])
    assert made.grid == working_grid(source, (2.0,) * 3)
    assert made.metadata["source"]["working_grid"] == made.grid.as_dict()
    assert any("3.4 mm along z" in note for note in whole.notes)
    encoder = load_encoder(pair["model"], "two", device="cpu", precision="fp32")
    read = NormalisedReader(source, made.grid)
    expected = encoder.encode(
        read, encoder.windows(made.grid.shape_zyx, window=16), made.grid.box, background=read.background
    )
    np.testing.assert_array_equal(made.read(), expected)
    inputs = open_inputs(RegisterSettings(**pair, moving_representation=tmp_path / "whole.zarr"))
    features, image = inputs.moving.features()
    np.testing.assert_array_equal(features.values, expected)
    np.testing.assert_array_equal(features.mask, specimen_mask(source, made.grid))
    assert image.shape == made.grid.shape_zyx


def test_infer_takes_the_spacing_that_is_asked_for(pair: dict[str, object], tmp_path: Path) -> None:
    given = {
        "zarr": pair["moving"],
        "model": pair["model"],
        "modality": "two",
        "device": "cpu",
        "spacing": 3.0,
    }
    plan = plan_infer(InferSettings(**given, out=tmp_path / "a.zarr"))
    assert "of 3 x 3 x 3 millimeter" in plan["grid"]
    made = infer(InferSettings(**given, out=tmp_path / "a.zarr"))
    assert made.grid.spacing_mm == (3.0,) * 3
    stores = {"fixed_representation": tmp_path / "b.zarr", "moving_representation": tmp_path / "a.zarr"}
    infer(
        InferSettings(
            **{**given, "zarr": pair["fixed"], "modality": "one", "spacing": 2.0}, out=tmp_path / "b.zarr"
        )
    )
    notes = open_inputs(RegisterSettings(**pair, **stores)).fixed.notes
    assert any("made on grids of 2 and 3 mm" in note and "--spacing 3" in note for note in notes)
