"""Sets of volumes: what is said of them, that one file and no other is taken, and what is taken out of it."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from comir_hpc.commands.app import app
from comir_hpc.config.words import DATA_SETS, FAMILIES
from comir_hpc.data import fetching, registry
from comir_hpc.data.fetching import fetch, plan_fetch
from comir_hpc.data.registry import SETS, data_set, listing
from comir_hpc.errors import ConfigError, VolumeError


def tar_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


MINC = {
    "order": ["xspace", "zspace", "yspace"],
    "xspace": {"start": 10.0, "space_length": 3, "step": -1.0, "direction_cosines": [0.8, 0.6, 0.0]},
    "yspace": {"start": 20.0, "space_length": 5, "step": -2.0, "direction_cosines": [-0.6, 0.8, 0.0]},
    "zspace": {"start": -5.0, "space_length": 4, "step": 3.0, "direction_cosines": [0.0, 0.0, 1.0]},
}
SERIES = {**MINC, "order": ["time", "zspace", "yspace", "xspace"], "time": {"start": 0, "space_length": 2}}
VOXELS = np.arange(60, dtype=np.uint8)


def brainbrowser() -> bytes:
    start = "package/examples/models/"
    return tar_of(
        {
            f"{start}structural1.mnc.header.gz": gzip.compress(json.dumps(MINC).encode()),
            f"{start}structural1.mnc.raw.gz": gzip.compress(VOXELS.tobytes()),
            f"{start}functional.mnc.header.gz": gzip.compress(json.dumps(SERIES).encode()),
            f"{start}functional.mnc.raw.gz": gzip.compress(VOXELS.tobytes() + bytes(60)),
            "package/../../evil": b"never unpacked",
        }
    )


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a small package stand for that of a set; give its file."""

    def stand_in(name: str, content: bytes) -> Path:
        package = SETS[name].package
        assert package is not None
        path = tmp_path / package.file
        path.write_bytes(content)
        small = replace(package, sha256=hashlib.sha256(content).hexdigest(), size=len(content))
        monkeypatch.setitem(registry.SETS, name, replace(SETS[name], package=small))
        return path

    return stand_in


def test_every_set_says_what_a_user_asks() -> None:
    assert tuple(SETS) == DATA_SETS
    text = listing()
    for one in SETS.values():
        assert all((one.modalities, one.spacing, one.licence, one.size, one.source, one.truth))
        assert f"\n{one.name}\n" in f"\n{text}"
        if one.package is not None:
            assert len(bytes.fromhex(one.package.sha256)) == 32
            assert str(one.package) in text
    assert "face" in data_set("t1_epi").warning


def test_the_volumes_of_minc_lie_where_their_header_says(tmp_path: Path, archive: Any) -> None:
    done = fetch("t1_epi", tmp_path / "data", archive=archive("t1_epi", brainbrowser()))
    t1, epi = (nibabel.load(file) for file in done.files)
    assert [file.name for file in done.files] == ["T1.nii.gz", "EPI.nii.gz"]
    assert t1.shape == epi.shape == (3, 5, 4)
    stored = VOXELS.reshape(3, 4, 5)  # x, z, y
    np.testing.assert_array_equal(np.asarray(t1.dataobj), stored.transpose(0, 2, 1))
    np.testing.assert_array_equal(np.asarray(epi.dataobj), VOXELS.reshape(4, 5, 3).transpose(2, 1, 0))
    # Voxel (2, 1, 3): 10 - 2, 20 - 2 and -5 + 9 mm along the three cosines.
    wanted = 8 * np.array([0.8, 0.6, 0]) + 18 * np.array([-0.6, 0.8, 0]) + 4 * np.array([0, 0, 1.0])
    np.testing.assert_allclose(nibabel.affines.apply_affine(t1.affine, (2, 1, 3)), wanted, atol=1e-5)
    assert not list(tmp_path.rglob("evil"))
    # The same bytes come out again, and nothing is fetched twice.
    before = [file.read_bytes() for file in done.files]
    again = fetch("t1_epi", tmp_path / "data")
    assert again.already
    assert plan_fetch("t1_epi", tmp_path / "data")["there_already"] == "yes"
    done.files[0].write_bytes(b"torn")
    fetch("t1_epi", tmp_path / "data", archive=tmp_path / "brainbrowser-2.3.0.tgz")
    assert [file.read_bytes() for file in done.files] == before


def test_templates_come_out_of_the_archive_in_the_wheel(tmp_path: Path, archive: Any) -> None:
    folder = "fsroot/_spm/cleaned/spm/canonical"
    inner = zip_of({f"{folder}/{name}.nii": name.encode() for name in ("avg152T1", "avg152T2", "avg152PD")})
    path = archive("avg152", zip_of({"spm_runtime/_spm/_spm.ctf": inner}))
    done = fetch("avg152", tmp_path, archive=path)
    assert [gzip.decompress(file.read_bytes()) for file in done.files] == [
        b"avg152T1",
        b"avg152T2",
        b"avg152PD",
    ]


def test_tomographies_are_written_as_the_tiff_has_them(tmp_path: Path, archive: Any) -> None:
    values = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    picture = io.BytesIO()
    tifffile.imwrite(picture, values)
    names = ("concrete_x-ray-bin16", "concrete_neutron-bin16")
    path = archive("concrete", zip_of({f"spam/data/concrete/{n}.tif": picture.getvalue() for n in names}))
    done = fetch("concrete", tmp_path, archive=path)
    for file in done.files:
        image = nibabel.load(file)
        np.testing.assert_array_equal(np.asarray(image.dataobj), values.transpose(2, 1, 0))
        np.testing.assert_array_equal(image.affine, np.eye(4))
        assert image.get_data_dtype() == np.uint16


def test_another_checksum_is_refused_and_nothing_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "brainbrowser-2.3.0.tgz"
    path.write_bytes(brainbrowser())
    found, wanted = hashlib.sha256(path.read_bytes()).hexdigest(), SETS["t1_epi"].package.sha256  # type: ignore[union-attr]
    with pytest.raises(VolumeError, match=f"has the SHA-256 {found}, expected {wanted}.*nothing of it"):
        fetch("t1_epi", tmp_path / "data", archive=path)
    assert [p for p in (tmp_path / "data").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize(("name", "program"), [("t1_epi", "npm"), ("concrete", "pip")])
def test_the_client_of_the_registry_fetches_one_pinned_package(
    name: str, program: str, tmp_path: Path, archive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    content = brainbrowser() if name == "t1_epi" else b"other"
    path = archive(name, content)

    def client(command: list[str], cwd: Path, **_: Any) -> Any:
        asked.append(command)
        (cwd / path.name).write_bytes(b"x" if name == "concrete" else content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetching.shutil, "which", lambda word: f"/usr/bin/{word}")
    monkeypatch.setattr(fetching.subprocess, "run", client)
    if name == "concrete":
        with pytest.raises(VolumeError, match="it is another file"):
            fetch(name, tmp_path / "data")
    else:
        fetch(name, tmp_path / "data")
    (command,) = asked
    assert program in " ".join(command)
    assert command[-1] == {"npm": "brainbrowser@2.3.0", "pip": "spam==0.9.1"}[program]
    left = [p.name for p in (tmp_path / "data").rglob("*") if p.is_file()]
    assert all(not p.startswith(".fetch") and not p.endswith((".tgz", ".whl")) for p in left)


def test_what_keeps_it_from_being_fetched_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching.shutil, "which", lambda word: None)
    with pytest.raises(ConfigError, match=r"npm is not on PATH.*apt-get install npm.*--archive"):
        fetch("t1_epi", tmp_path)
    failed = subprocess.CompletedProcess(
        [], 1, "", "WARNING: x\nERROR: No matching distribution found\nnotice"
    )
    monkeypatch.setattr(fetching.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        VolumeError, match=r"could not be fetched: ERROR: No matching distribution found; check"
    ):
        fetch("concrete", tmp_path)
    with pytest.raises(VolumeError, match=r"missing.whl does not exist; expected the file spam-0.9.1"):
        fetch("concrete", tmp_path, archive=tmp_path / "missing.whl")


def test_the_command_lists_fetches_and_names_the_nearest(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["datasets"])
    assert shown.exit_code == 0
    assert all(name in shown.output for name in DATA_SETS)
    nothing = CliRunner().invoke(app, ["datasets", "fetch", "embedded", str(tmp_path)])
    assert "nothing to fetch" in nothing.output
    planned = CliRunner().invoke(app, ["datasets", "fetch", "t1_epi", str(tmp_path), "--dry-run"])
    assert "brainbrowser@2.3.0" in planned.output
    assert "43 MB" in planned.output
    assert list(tmp_path.iterdir()) == []
    for words, said in (
        (["fetch", "t1eip", str(tmp_path)], "did you mean t1_epi"),
        (["fetch"], "fetch needs a name"),
        (["list", "t1_epi"], "list takes nothing else"),
    ):
        refused = CliRunner().invoke(app, ["datasets", *words])
        assert isinstance(refused.exception, ConfigError)
        assert said in str(refused.exception)


def test_every_family_is_made_of_a_set() -> None:
    from comir_hpc.data.families import _SOURCES

    assert set(_SOURCES) | {"embedded"} == set(FAMILIES)
    for source, *files in _SOURCES.values():
        assert set(files) <= set(data_set(source).files)
