"""`export` on the command line: grids from the result folder, every form, the inverse, encoders as TorchScript."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_view import FIXED, MOVING, TRUTH, result

from comir_hpc.config.base import validate
from comir_hpc.config.export import ExportSettings
from comir_hpc.errors import CheckpointError, ComirError, ConfigError, RegistrationError, VolumeError
from comir_hpc.recipes.export import export
from comir_hpc.representations.encoding import load_encoder
from comir_hpc.runs.model import general_model
from comir_hpc.runs.result import read_result, write_result
from comir_hpc.transforms import GridPair, read_transform


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = result(tmp_path_factory.mktemp("export") / "r", TRUTH)
    record = read_result(place)
    inputs = {
        name: {"path": str(place / f"{name}.zarr"), "grid": grid.as_dict()}
        for name, grid in (("fixed", FIXED), ("moving", MOVING))
    }
    write_result(place, record.with_entries(inputs=inputs))
    return place


def asked(**given: Any) -> ExportSettings:
    return validate(ExportSettings, given)


@pytest.mark.parametrize("form", ["itk", "ants", "elastix", "fsl", "lta", "matrix-ras", "matrix-lps", "ngff"])
@pytest.mark.parametrize("inverse", [False, True])
def test_a_result_in_every_form_beside_itself(folder: Path, form: str, inverse: bool) -> None:
    done = export(asked(transform=folder, to=form, inverse=inverse, overwrite=True))
    assert done.path.parent == folder
    assert done.path.name.startswith(f"transform{'_inverse' * inverse}_{form}.")
    grids = GridPair(MOVING, FIXED) if inverse else GridPair(FIXED, MOVING)
    found = read_transform(done.path, form, grids)
    expected = TRUTH.inverse() if inverse else TRUTH
    np.testing.assert_allclose(found.apply(FIXED.centre_mm), expected.apply(FIXED.centre_mm), atol=1e-9)


def test_grids_come_from_files_where_there_is_no_result(folder: Path, tmp_path: Path) -> None:
    flirt = export(asked(transform=folder, to="fsl", out=tmp_path / "flirt.mat")).path
    with pytest.raises(RegistrationError, match="--fixed FIXED and --moving MOVING"):
        export(asked(transform=flirt, form="fsl", to="itk", out=tmp_path / "t.tfm"))
    volumes = {"fixed": folder / "fixed.zarr", "moving": folder / "moving.zarr"}
    done = export(asked(transform=flirt, form="fsl", to="itk", out=tmp_path / "t.tfm", **volumes))
    np.testing.assert_allclose(read_transform(done.path).apply((1, 2, 3)), TRUTH.apply((1, 2, 3)), atol=1e-9)


def test_what_cannot_be_exported_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"exists; choose another --out, or pass --overwrite"):
        export(asked(transform=folder, to="itk", out=folder / "transform.tfm"))
    with pytest.raises(VolumeError, match="is a volume"):
        export(asked(transform=folder, to="ngff", out=folder / "fixed.zarr", overwrite=True))
    assert (folder / "fixed.zarr" / "zarr.json").is_file()
    with pytest.raises(ConfigError, match="--modality means nothing with --to itk"):
        export(asked(transform=folder, to="itk", modality="t1w"))
    with pytest.raises(ConfigError, match="--inverse mean nothing with --to torchscript"):
        export(asked(transform=folder, to="torchscript", inverse=True))
    with pytest.raises(CheckpointError, match="no run folder"):
        export(asked(transform=folder, to="torchscript", out=tmp_path / "e.pt"))
    with pytest.raises(ComirError, match="does not exist"):
        export(asked(transform=tmp_path / "none.tfm", to="itk", out=tmp_path / "a.tfm"))
    failed = result(tmp_path / "failed", None, verdict="FAIL")
    with pytest.raises(RegistrationError, match="the registration found none"):
        export(asked(transform=failed, to="itk"))
    assert not (tmp_path / "e.pt").exists()


def test_an_encoder_as_torchscript_gives_what_the_encoder_gives(tmp_path: Path) -> None:
    """Loaded as other programs do it: no class of ours is needed."""
    out = export(asked(transform=general_model(), to="torchscript", out=tmp_path / "e.pt")).path
    script = torch.jit.load(str(out))
    network = load_encoder(general_model(), None, device="cpu", precision="fp32").network
    x = torch.randn(1, 1, 24, 40, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network(x)
        (found,) = script(x, torch.tensor(1), torch.zeros(0), torch.zeros(0))
        numbers = torch.tensor([0.0, 9.0, 5.0, 2.0])
        (scaled,) = script(2 * x + 5, torch.tensor(1), numbers, torch.zeros(0))
    assert found.shape == expected.shape
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) < 1e-4 * scale
    assert float((scaled - expected).abs().max()) < 1e-3 * scale
