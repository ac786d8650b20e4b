"""Other registration programs as they ship: each finds a small displacement, in the direction that we mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from comir_hpc.config.words import PEERS
from comir_hpc.data.families import Case, family
from comir_hpc.recipes.benchmark import peers
from comir_hpc.recipes.benchmark.methods import Task
from comir_hpc.recipes.benchmark.one import run, write_job
from comir_hpc.recipes.benchmark.peers import _euler
from comir_hpc.transforms import Transform


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return family("embedded", None).displaced("small", 3, tmp_path_factory.mktemp("case"))


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_finds_a_small_displacement_of_the_embedded_pair(
    name: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_ANTS_SEARCH_DEG", 90)  # instead of 20: a ninetieth of the starts
    answer = run(write_job(tmp_path, name, Task(case.fixed, case.moving, tmp_path)))
    if answer["status"] == "skipped":
        pytest.skip(answer["error"])
    assert answer["status"] == "done", answer["error"]
    found = case.errors_mm(Transform(np.asarray(answer["matrix_lps_mm"]))).mean()
    assert found < 0.5 * case.displaced_mm


def test_elastixs_angles_are_itks_euler_transform_about_the_centre() -> None:
    """A quarter turn about z and a shift, written as elastix writes them."""
    matrix = _euler(
        {
            "Transform": ("EulerTransform",),
            "TransformParameters": ("0", "0", str(np.pi / 2), "1", "2", "3"),
            "CenterOfRotationPoint": ("10", "0", "0"),
            "ComputeZYX": ("false",),
        }
    )
    moved = Transform(matrix).apply([[10.0, 0, 0], [11.0, 0, 0], [10.0, 0, 5.0]])
    np.testing.assert_allclose(moved, [[11, 2, 3], [11, 3, 3], [11, 2, 8]], atol=1e-9)
