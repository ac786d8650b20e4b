"""A registration refined block by block: layout, solutions, the field, its evidence, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from browser import page_source
from hypothesis import given, settings
from hypothesis import strategies as st
from registration_cases import OBLIQUE, store
from scipy import ndimage
from test_view import WEBGL, content_of, image_of, readout

from comir_hpc.config import ExportSettings, RefineSettings, WarpSettings
from comir_hpc.config.view import ViewSettings
from comir_hpc.errors import ComirError, RegistrationError, VolumeError
from comir_hpc.recipes.export import export
from comir_hpc.recipes.refine import refine as refine_and_report
from comir_hpc.recipes.view import view
from comir_hpc.register.blockwise import plan_refine, refine
from comir_hpc.register.blockwise.coarse import Coarse
from comir_hpc.register.blockwise.evidence import STATES, read_evidence
from comir_hpc.register.blockwise.layout import Layout
from comir_hpc.register.deform.lattice import Lattice
from comir_hpc.report import report
from comir_hpc.runs.record import make_record
from comir_hpc.runs.refinement import EVIDENCE, REFINEMENT_FILE, read_refinement
from comir_hpc.runs.result import Result, write_result
from comir_hpc.space.grid import Box, Grid
from comir_hpc.transforms import Affine, Composite, ItkTransform, read_transform, save_itk, save_transform
from comir_hpc.transforms.stored import StoredField
from comir_hpc.volumes.volume import Volume
from comir_hpc.warp import warp

SHAPE = (18, 20, 64)
GRID = Grid(SHAPE, (2.0, 2.0, 2.0), (5.0, -8.0, 20.0), OBLIQUE)
LENGTH_MM, BLOCK = 6.0, 24  # three blocks along x, of which the last holds no specimen
FILLED = 40


def specimen(seed: int = 0, sigma: float = 2.0) -> np.ndarray:
    """Texture that fills the volume but for its end along x."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(SHAPE), sigma)
    values = 4.0 + noise / noise.std()
    values[..., FILLED:] = 0
    return values.astype(np.float32)


def places() -> np.ndarray:
    """Some voxels (N, 3) of the specimen, away from its faces."""
    return np.argwhere(np.ones([n - 4 for n in (*SHAPE[:2], FILLED)]))[::17] + 2


def bend(largest: float = 2.0) -> np.ndarray:
    """A displacement (3, z, y, x) in voxels: smoothed noise, scaled."""
    rng = np.random.default_rng(5)
    field = np.stack(
        [ndimage.gaussian_filter(rng.standard_normal(SHAPE), 6.0, mode="wrap") for _ in range(3)]
    )
    return (field * largest / np.sqrt((field**2).sum(0)).max()).astype(np.float32)


def seen_through(values: np.ndarray, field: np.ndarray) -> np.ndarray:
    """A volume whose voxel p + field(p) shows what p shows in `values`."""
    voxels = np.indices(SHAPE).astype(float)
    back = -field.astype(float)
    for _ in range(20):
        back = -np.stack([ndimage.map_coordinates(f, voxels + back, order=1, mode="nearest") for f in field])
    return ndimage.map_coordinates(values, voxels + back, order=1, mode="nearest").astype(np.float32)


def registered(folder: Path, fixed: Volume, moving: Volume, verdict: str = "PASS", **entries: object) -> Path:
    """The folder of a registration with the identity as its answer."""
    save_transform(Affine.identity(), folder)
    inputs = {
        role: {"path": str(volume.path), "fingerprint": volume.fingerprint(), "grid": volume.grid.as_dict(),
               "compared": {"grid": volume.grid.as_dict()}}
        for role, volume in (("fixed", fixed), ("moving", moving))
    }  # fmt: skip
    record = {
        "verdict": verdict, "inputs": inputs, "settings": {"representation": "intensity"}, "fingerprint": "0" * 16,
        "matrix_lps_mm": np.eye(4).tolist(), "reasons": ["made for a test"],
    }  # fmt: skip
    write_result(folder, make_record(Result, record | entries))
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bent_pair(tmp_path_factory.mktemp("pair"))


def bent_pair(folder: Path) -> Path:
    """A folder with a specimen, the same bent, and the registration of the two."""
    values = specimen()
    fixed = store(folder / "fixed.zarr", values, GRID)
    moving = store(folder / "moving.zarr", seen_through(values, bend()), GRID)
    registered(folder / "result", fixed, moving)
    return folder


@pytest.fixture(scope="module")
def refined(pair: Path) -> Path:
    """The field of that pair, from one call."""
    done = refine(asked(pair, pair / "field.zarr"))
    assert done.complete
    return pair / "field.zarr"


def asked(folder: Path, out: Path, **given: object) -> RefineSettings:
    given = {"result": folder / "result", "smoothness_mm": LENGTH_MM, "block": BLOCK, **given}
    return RefineSettings(out=out, **given)


def points_and_truth() -> tuple[np.ndarray, np.ndarray]:
    index = places()
    return GRID.world_mm(index), GRID.world_mm(index + bend()[:, *index.T].T)


def content(field: Path) -> dict[str, bytes]:
    """The vectors and the evidence of a field, file by file."""
    return {
        str(path.relative_to(field)): path.read_bytes()
        for name in ("displacements", "evidence")
        for path in sorted((field / name / "0" / "c").rglob("*"))
        if path.is_file()
    }


@settings(max_examples=12, deadline=None)
@given(
    shape=st.tuples(*[st.integers(20, 60)] * 3),
    length=st.floats(3.0, 10.0),
    block=st.integers(10, 120),
)
def test_weights_sum_to_one_and_cores_tile_the_lattice(
    shape: tuple[int, int, int], length: float, block: int
) -> None:
    layout = Layout(Grid(shape, (1.0, 1.0, 1.0)), length, max(block, int(np.ceil(length))))
    lattice = layout.lattice
    total, owned = np.zeros(lattice.shape_zyx), np.zeros(lattice.shape_zyx, int)
    for index, block_of in enumerate(layout.plan):
        part = layout.tile(index).intersect(lattice.box)
        total[part.slices] += layout.weights(index, part)
        owned[block_of.write.slices] += 1
        seen = layout.seen(index)
        if layout.core(index).size:
            assert seen.contains(layout.core(index))
            assert all(s % (2 * layout.held_side) == 0 and s % layout.ratio == 0 for s in seen.start)
            assert all(n <= most for n, most in zip(seen.shape, layout.largest(), strict=True))
    np.testing.assert_allclose(total, 1, atol=1e-12)
    assert (owned == 1).all()
    middle = Box((0, 0, 0), (1, 1, 1)).shifted([n // 2 for n in lattice.shape_zyx])
    weights = {i: float(layout.weights(i, middle).sum()) for i in range(len(layout.plan))}
    assert {i for i, w in weights.items() if w} <= set(layout.touching(middle))


def test_blocks_find_a_known_bend_and_say_what_became_of_them(pair: Path, refined: Path) -> None:
    points, true = points_and_truth()
    found = read_transform(refined)
    before = np.linalg.norm(points - true, axis=1).mean() / 2.0
    after = np.linalg.norm(found.apply(points) - true, axis=1).mean() / 2.0
    assert before > 0.6
    assert after < 0.5 * before
    evidence = read_evidence(refined / "evidence")
    states = evidence.of("state")
    assert states.shape == Layout(GRID, LENGTH_MM, BLOCK).plan.counts_zyx
    kept = states == STATES.index("kept")
    assert [STATES[int(n)] for n in states.ravel()] == ["kept", "kept", "no content"]
    assert (evidence.of("after")[kept] > evidence.of("before")[kept]).all()
    assert (evidence.of("content")[kept] > 0).all()
    assert evidence.of("folds").sum() == 0
    assert evidence.of("inverse_residual_mm").max() < 0.1
    again = refine(asked(pair, refined))
    assert again.computed == 0
    assert again.states == {name: int((states == n).sum()) for n, name in enumerate(STATES)}
    assert f"{kept.sum()} of {states.size} blocks kept" in again.summary
    assert not refined.with_name("field.zarr.blocks").exists()


def test_one_block_and_many_lead_to_nearly_the_same_field(pair: Path, refined: Path) -> None:
    refine(asked(pair, pair / "whole.zarr", block=1000))
    points, _ = points_and_truth()
    fields = [read_transform(path).apply(points) for path in (refined, pair / "whole.zarr")]
    assert np.linalg.norm(fields[0] - fields[1], axis=1).mean() / 2.0 < 0.1


def test_parts_in_any_order_and_a_call_that_goes_on_leave_the_same_bytes(pair: Path, refined: Path) -> None:
    whole = content(refined)
    assert whole
    out = pair / "parts.zarr"
    for number in (3, 1):  # of three, and not the second
        done = refine(asked(pair, out, part=(number, 3)))
        assert not done.complete
        assert "other parts are missing" in done.summary
        with pytest.raises(RegistrationError, match="incomplete"):
            read_transform(out)
    done = refine(asked(pair, out))  # the rest, as one call without parts
    assert done.complete
    assert 0 < done.computed < done.blocks
    assert content(out) == whole


def test_the_store_is_a_scene_that_other_readers_find(refined: Path) -> None:
    scene = json.loads((refined / "zarr.json").read_text())["attributes"]["ome"]
    assert scene["version"] == "0.6"
    steps = scene["scene"]["coordinateTransformations"][0]["transformations"]
    assert [step["type"] for step in steps] == ["affine", "displacements", "affine", "affine"]
    field = json.loads((refined / steps[1]["path"] / "zarr.json").read_text())["attributes"]["ome"]
    axes = field["multiscales"][0]["coordinateSystems"][0]["axes"]
    assert [axis["type"] for axis in axes] == ["displacement", "space", "space", "space"]
    volume = Volume.open(refined / "displacements")
    assert volume.shape[0] == 3
    assert volume.grid.spacing_mm == (2.0, 2.0, 2.0)


def test_warp_reads_the_field_by_box_and_export_writes_the_same(
    pair: Path, refined: Path, tmp_path: Path
) -> None:
    points, _ = points_and_truth()
    found = read_transform(refined)
    assert any(isinstance(part, StoredField) for part in found.parts)
    export(ExportSettings(transform=refined, to="itk", out=tmp_path / "field.h5"))
    loaded = read_transform(tmp_path / "field.h5")
    np.testing.assert_allclose(found.apply(points), loaded.apply(points), atol=1e-3)
    far = points + 1e4
    np.testing.assert_allclose(found.apply(far), far)
    like = {"zarr": pair / "moving.zarr", "like": pair / "fixed.zarr"}
    warp(WarpSettings(transform=refined, out=tmp_path / "a.zarr", chunk=8, shard=16, **like))
    warp(WarpSettings(transform=tmp_path / "field.h5", out=tmp_path / "b.zarr", chunk=8, shard=16, **like))
    one, two = (Volume.open(tmp_path / name).read() for name in ("a.zarr", "b.zarr"))
    np.testing.assert_allclose(one, two, atol=5e-3)
    fixed, moving = (Volume.open(like[key]).read() for key in ("like", "zarr"))
    inner = (slice(None), slice(3, -3), slice(3, -3), slice(3, FILLED - 3))
    assert np.abs(one - fixed)[inner].mean() < 0.5 * np.abs(moving - fixed)[inner].mean()


def test_what_bends_already_is_gone_on_from(pair: Path, tmp_path: Path) -> None:
    # The coarse solution bends by half of the truth; the total is one field before the affine part.
    half = 0.5 * bend() * 2.0
    lattice = Lattice(GRID, half, -half)
    affine = Affine.identity()
    save_itk(
        Composite((ItkTransform(lattice.itk()), Affine.rigid(np.eye(3), (1e-9, 0, 0), (0, 0, 0)))),
        tmp_path / "t.h5",
    )
    transform = read_transform(tmp_path / "t.h5")
    coarse = Coarse(affine, Composite(tuple(transform.parts[:-1])), "made")
    inner = GRID.crop(Box((6, 6, 6), (12, 14, 50)))
    np.testing.assert_allclose(coarse.displacement_mm(inner), half[:, 6:12, 6:14, 6:50], atol=1e-4)
    own = np.full((3, *inner.shape_zyx), 2.0, np.float32)  # a voxel along each axis
    np.testing.assert_allclose(coarse.displacement_mm(inner, own), own + half[:, 7:13, 7:15, 7:51], atol=1e-4)
    folder = tmp_path / "bent"
    stores = [Volume.open(pair / name) for name in ("fixed.zarr", "moving.zarr")]
    deformation = {"kind": "field", "kept": True}
    registered(folder / "result", *stores, deformation=deformation)
    save_itk(transform, folder / "result" / "transform.h5")
    refine(asked(folder, tmp_path / "field.zarr", block=1000))
    points, true = points_and_truth()
    errors = [
        np.linalg.norm(one.apply(points) - true, axis=1).mean() / 2.0
        for one in (transform, read_transform(tmp_path / "field.zarr"))
    ]
    assert errors[1] < 0.8 * errors[0]


def test_blocks_that_do_not_improve_keep_the_coarse_solution_and_are_drawn(
    pair: Path, tmp_path: Path
) -> None:
    stores = [
        store(tmp_path / f"{n}.zarr", specimen(seed, 0.6), GRID) for n, seed in (("fixed", 3), ("moving", 4))
    ]
    registered(tmp_path / "result", *stores)
    done = refine_and_report(asked(tmp_path, tmp_path / "field.zarr", block=1000)).result
    assert done.states == {"no content": 0, "refused": 0, "fell back": 1, "kept": 0}
    assert "1 did not improve by more than chance and keep the coarse solution" in done.summary
    assert not Volume.open(tmp_path / "field.zarr" / "displacements").read().any()
    points = GRID.world_mm(places())
    np.testing.assert_allclose(read_transform(tmp_path / "field.zarr").apply(points), points, atol=1e-9)
    record = read_refinement(tmp_path / "result")
    assert record is not None
    assert record.states["fell back"] == 1
    drawn = np.load(tmp_path / "result" / "refinement.npz")
    assert drawn["axial_state"].shape == SHAPE[1:]
    assert (drawn["axial_state"] == STATES.index("fell back")).all()
    page = report(tmp_path / "result").read_text(encoding="utf-8")
    assert "Of 1 blocks 0 were kept. 1 did not improve by more than chance" in page


@pytest.mark.browser
def test_the_viewer_shows_the_blocks_and_what_they_gained(pair: Path, refined: Path, tmp_path: Path) -> None:
    shutil.copytree(pair / "result", tmp_path / "result")
    page = view(ViewSettings(shown=(tmp_path / "result",))).path
    shown = content_of(page)
    assert [one["name"] for one in shown["over"]] == [
        "moving before", "moving after", "moving refined", "blocks", "gain of the blocks",
    ]  # fmt: skip
    assert shown["first"] == 2
    images = {
        one["name"]: image_of(one, tmp_path / "image.nii").get_fdata().transpose(2, 1, 0)
        for one in (shown["fixed"], *shown["over"])
    }
    inner = (slice(8, -8),) * 3
    off = {
        n: float(np.abs(images[n] - images["fixed"])[inner].mean())
        for n in ("moving after", "moving refined")
    }
    assert off["moving refined"] < 0.5 * off["moving after"]
    evidence = read_evidence(refined / EVIDENCE)
    layout = Layout(GRID, LENGTH_MM, BLOCK)
    for index in range(len(layout.plan)):
        block = np.unravel_index(index, layout.plan.counts_zyx)
        for name, expected in (
            ("blocks", evidence.of("state")[block]),
            ("gain of the blocks", np.nan_to_num(evidence.of("after") - evidence.of("before"))[block]),
        ):
            assert np.allclose(images[name][layout.core(index).slices], expected, atol=1e-6), (name, index)
    kept = next(i for i, state in enumerate(evidence.of("state").ravel()) if state == STATES.index("kept"))
    voxel = [(a + b) // 2 for a, b in zip(layout.core(kept).start, layout.core(kept).stop, strict=True)]
    ras = ",".join(map(str, GRID.world_mm(voxel) * (-1, -1, 1)))
    source, console = page_source(f"{page.as_uri()}#over=3&mm={ras}", *WEBGL, budget_ms=20_000)
    assert 'data-ready="7"' in source, console
    assert not [line for line in console if "rror" in line or "efused" in line]
    assert readout(source)["blocks"] == "kept"


def test_a_field_that_was_moved_away_or_is_of_another_registration_is_not_shown(
    pair: Path, refined: Path, tmp_path: Path
) -> None:
    shutil.copytree(pair / "result", tmp_path / "result")
    path = tmp_path / "result" / REFINEMENT_FILE
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(record | {"field": str(tmp_path / "gone.zarr")}), encoding="utf-8")
    done = view(ViewSettings(shown=(tmp_path / "result",)))
    assert "no longer at" in " ".join(done.notes)
    assert len(content_of(done.path)["over"]) == 2
    path.write_text(json.dumps(record | {"registration": "f" * 16}), encoding="utf-8")
    done = view(ViewSettings(shown=(tmp_path / "result",)))
    assert not done.notes
    assert len(content_of(done.path)["over"]) == 2


def test_the_plan_names_blocks_memory_and_disk(pair: Path, tmp_path: Path) -> None:
    plan = plan_refine(asked(pair, tmp_path / "field.zarr", part=(2, 3)))
    assert plan["blocks"] == len(Layout(GRID, LENGTH_MM, BLOCK).plan)
    assert plan["blocks_of_this_part"] == plan["blocks"] // 3
    assert {"peak_memory", "disk_at_most", "disk_meanwhile"} <= plan.keys()
    assert not (tmp_path / "field.zarr").exists()


def test_what_cannot_be_refined_is_refused_by_name(pair: Path, tmp_path: Path) -> None:
    fixed, moving = (Volume.open(pair / name) for name in ("fixed.zarr", "moving.zarr"))

    def refused(
        match: str, kind: type[ComirError] = RegistrationError, folder: Path = pair, **given: object
    ) -> None:
        with pytest.raises(kind, match=match):
            refine(asked(folder, **{"out": tmp_path / "field.zarr", **given}))  # type: ignore[arg-type]

    registered(tmp_path / "failed" / "result", fixed, moving, verdict="FAIL")
    refused("failed .made for a test", folder=tmp_path / "failed")
    refused("--block 2 is 4 mm, shorter than the smoothness length", block=2)
    refused("--smoothness-mm 100 is not between", smoothness_mm=100.0)
    refused("--spacing 0.1 is more than four times finer", spacing=0.1)
    refused("is not the fixed volume of", fixed=pair / "moving.zarr")
    refused("compared mind, which blocks cannot", folder=_with_settings(tmp_path / "mind", fixed, moving))
    (tmp_path / "taken.zarr").mkdir()
    refused("is no field of ours", VolumeError, out=tmp_path / "taken.zarr")
    away = registered(tmp_path / "away" / "result", fixed, moving)
    save_transform(Affine.rigid(np.eye(3), (1e3, 0, 0), (0, 0, 0)), away)
    refused("no block has content", folder=tmp_path / "away")
    assert not (tmp_path / "field.zarr").exists()


def _with_settings(folder: Path, fixed: Volume, moving: Volume) -> Path:
    registered(folder / "result", fixed, moving, settings={"representation": "mind"})
    return folder


def test_a_field_of_something_else_is_refused_by_name(pair: Path, refined: Path, tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"made from something else .*smoothness_mm"):
        refine(asked(pair, refined, smoothness_mm=9.0))
    elsewhere = Grid(SHAPE, (2.0, 2.0, 2.0), (4000.0, 0.0, 0.0))
    store(tmp_path / "far.zarr", specimen(), elsewhere)
    with pytest.raises(RegistrationError, match="a field on another grid"):
        warp(
            WarpSettings(
                zarr=pair / "moving.zarr",
                like=tmp_path / "far.zarr",
                transform=refined,
                out=tmp_path / "w.zarr",
            )
        )
