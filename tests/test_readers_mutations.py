"""Headers that are nearly right are refused in one line, or read as the reference readers read them, or with a note."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import SimpleITK as sitk
from header_mutations import MAKERS, compare

from comir_hpc.errors import VolumeError
from comir_hpc.volumes.readers import open_source

MUTATIONS = 200


@pytest.fixture(autouse=True)
def quiet_itk() -> Iterator[None]:
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    yield
    sitk.ProcessObject.SetGlobalWarningDisplay(before)


@pytest.mark.parametrize("suffix", MAKERS)
def test_nearly_right_headers(tmp_path: Path, suffix: str) -> None:
    rng, path, verdicts = random.Random(20261129), tmp_path / f"m{suffix}", Counter()
    for _ in range(MUTATIONS):
        content, what = MAKERS[suffix](rng)
        path.write_bytes(content)
        verdict = compare(path)
        verdicts[verdict] += 1
        assert verdict != "different", f"{what}: read elsewhere than nibabel and SimpleITK, without a note"
    # A fuzz that refuses everything, or never meets a refusal, tests nothing.
    assert verdicts["same"] > MUTATIONS // 12
    assert verdicts["refused"] > MUTATIONS // 10


@pytest.mark.parametrize("suffix", MAKERS)
def test_refusals_are_one_short_line(tmp_path: Path, suffix: str) -> None:
    rng, path = random.Random(7), tmp_path / f"m{suffix}"
    for _ in range(MUTATIONS):
        content, what = MAKERS[suffix](rng)
        path.write_bytes(content)
        try:
            open_source(path).grid()
        except VolumeError as error:
            text = str(error).replace(str(tmp_path), "")
            assert "\n" not in text, what
            assert len(text) < 500, what
            assert path.name in text, what
