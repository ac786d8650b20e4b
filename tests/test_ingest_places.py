"""An output is never its own input: refused before anything is touched, whatever the paths look like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile

from comir_hpc.config import InferSettings, IngestSettings, WarpSettings
from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.host.places import require_apart
from comir_hpc.infer import infer
from comir_hpc.ingest import ingest, plan_ingest
from comir_hpc.space.grid import Grid
from comir_hpc.volumes.readers import open_source
from comir_hpc.volumes.volume import Volume
from comir_hpc.warp import warp

GRID = Grid((8, 8, 8), (1.0, 1.0, 1.0))
VALUES = np.arange(512, dtype=np.uint16).reshape(1, 8, 8, 8)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    volume = Volume.create(tmp_path / "o.zarr", GRID, "uint16", chunk=8, shard=8)
    volume.write(GRID.box, VALUES)
    volume.finish(intensity=[{"low": 0, "high": 511, "mean": 256, "std": 150, "foreground_above": 100}])
    return tmp_path / "o.zarr"


def stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    return {f: (f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.rglob("*"))}


def linked(store: Path) -> Path:
    (store.parent / "link.zarr").symlink_to(store)
    return store.parent / "link.zarr"


PAIRS: dict[str, Callable[[Path], tuple[Path, Path]]] = {
    "itself": lambda store: (store, store),
    "with dots": lambda store: (store / ".." / "o.zarr", store),
    "source through a link": lambda store: (linked(store), store),
    "target through a link": lambda store: (store, linked(store)),
    "target in the source": lambda store: (store, store / "new.zarr"),
    "target deep in the source": lambda store: (store, store / "a" / "b" / "new.zarr"),
    "target in a level of the source": lambda store: (store, store / "0" / "new.zarr"),
    "target in a link to the source": lambda store: (store, linked(store) / "new.zarr"),
    "source is a level of the target": lambda store: (store / "0", store),
    "source in the target through a link": lambda store: (linked(store) / "0", store),
    "target is the parent": lambda store: (store, store.parent),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_source_and_target_that_are_not_apart(store: Path, pair: str) -> None:
    source, target = PAIRS[pair](store)
    before = stamps(store.parent)
    settings = IngestSettings(source=source, out=target, overwrite=True)
    for call in (ingest, plan_ingest):
        with pytest.raises(ConfigError, match=r"is the input|lies inside the (input|output)"):
            call(settings)
    assert stamps(store.parent) == before
    np.testing.assert_array_equal(Volume.open(store).read(), VALUES)


def test_relative_paths(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store)
    for source, target in ((".", "."), (".", "../o.zarr"), ("../o.zarr", "."), ("0", "."), (".", "new.zarr")):
        with pytest.raises(ConfigError, match=r"is the input|lies inside the (input|output)"):
            ingest(IngestSettings(source=Path(source), out=Path(target), overwrite=True))
    np.testing.assert_array_equal(Volume.open(store).read(), VALUES)


def test_a_folder_of_slices_never_holds_its_own_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for z in range(4):
        tifffile.imwrite(here / f"s{z}.tif", VALUES[0, z])
    monkeypatch.chdir(here)
    given = {"source": Path(), "spacing": (1.0, 1.0, 1.0), "unit": "um"}
    with pytest.raises(ConfigError, match=r"the output stack\.zarr lies inside the input \."):
        ingest(IngestSettings(out=Path("stack.zarr"), **given))
    assert sorted(f.name for f in here.iterdir()) == ["s0.tif", "s1.tif", "s2.tif", "s3.tif"]
    result = ingest(IngestSettings(out=Path("../stack.zarr"), **given))  # beside it is a good place
    np.testing.assert_array_equal(Volume.open(result.path).read(), VALUES[:, :4])


def test_a_source_made_of_links_into_the_target(store: Path, tmp_path: Path) -> None:
    """A store whose level is a link to that of another one must not replace the other."""
    (tmp_path / "view.zarr").mkdir()
    for entry in store.iterdir():
        (tmp_path / "view.zarr" / entry.name).symlink_to(entry)
    with pytest.raises(ConfigError, match=r"view\.zarr \(through the link .*\) lies inside the output"):
        ingest(IngestSettings(source=tmp_path / "view.zarr", out=store, overwrite=True))
    np.testing.assert_array_equal(Volume.open(store).read(), VALUES)


def test_voxels_beside_a_header_count_as_the_source(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(VALUES[0])
    sitk.WriteImage(image, str(tmp_path / "a.mhd"))
    with pytest.raises(ConfigError, match=r"a\.raw itself"):
        ingest(IngestSettings(source=tmp_path / "a.mhd", out=tmp_path / "a.raw", overwrite=True))


def test_neighbours_are_apart(store: Path, tmp_path: Path) -> None:
    for name in ("o.zarr.zarr", "oo.zarr", "new/o.zarr", "o.zar"):
        require_apart(tmp_path / name, store)


@pytest.mark.parametrize("target", ["o.zarr", "link.zarr", "o.zarr/new.zarr"])
def test_infer_and_warp_follow_the_same_rule(store: Path, tmp_path: Path, target: str) -> None:
    linked(store)
    other = Volume.create(tmp_path / "other.zarr", GRID, "uint16", chunk=8, shard=8)
    other.write(GRID.box, VALUES)
    other.finish()
    transform = tmp_path / "t.tfm"
    sitk.WriteTransform(sitk.AffineTransform(3), str(transform))
    before = stamps(store)
    common = {"out": tmp_path / target, "overwrite": True}
    with pytest.raises(ConfigError, match=r"is the input|inside the input"):
        infer(InferSettings(zarr=store, model=tmp_path / "none", modality="a", **common))
    for moving, like in ((store, other.path), (other.path, store)):
        with pytest.raises(ConfigError, match=r"is the input|inside the input"):
            warp(WarpSettings(zarr=moving, like=like, transform=transform, **common))
    assert stamps(store) == before


# ---------------------------------------------------------------------- paths that lead nowhere


def test_links_that_lead_back_to_themselves(store: Path, tmp_path: Path) -> None:
    (tmp_path / "a.nii").symlink_to(tmp_path / "b.nii")
    (tmp_path / "b.nii").symlink_to(tmp_path / "a.nii")
    loop = tmp_path / "a.nii"
    for source, out in ((loop, tmp_path / "x.zarr"), (store, loop), (store, loop / "x.zarr")):
        with pytest.raises(
            ConfigError, match=r"a\.nii.* cannot be reached \(Too many levels of symbolic links\)"
        ):
            ingest(IngestSettings(source=source, out=out))
    with pytest.raises(VolumeError, match=r"a\.nii is a symbolic link that leads back to itself"):
        open_source(loop)
    (tmp_path / "c.nii").symlink_to(tmp_path / "gone.nii")
    with pytest.raises(VolumeError, match=r"c\.nii is a symbolic link to .*gone\.nii, which does not exist"):
        open_source(tmp_path / "c.nii")
