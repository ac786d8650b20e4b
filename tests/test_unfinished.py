"""A registration that the scheduler stops keeps its search, and the same call goes on behind it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from test_register import error, only_volumes, pair, settings, turned

from comir_hpc.errors import StopRequested
from comir_hpc.register import register
from comir_hpc.register.unfinished import KEPT_FILE, kept


def test_a_stop_keeps_the_search_and_the_same_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = turned()
    chosen = settings(
        tmp_path, only_volumes(pair(tmp_path, truth)), representation="mind", checks="quick", rotations=150, threads=1
    )  # fmt: skip

    def stop_after_the_search(what: str, done: int, total: int) -> None:
        del done, total
        if what == "refine":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(
        StopRequested, match=r"its search is kept in .*unfinished\.npz, and the same command goes on"
    ):
        register(chosen, progress=stop_after_the_search)
    assert (chosen.out / KEPT_FILE).is_file()
    assert not (chosen.out / "result.json").exists()

    content = (chosen.out / KEPT_FILE).read_bytes()
    with np.load(chosen.out / KEPT_FILE) as held:
        fingerprint = str(held["fingerprint"])
    assert kept(chosen.out / KEPT_FILE, "another") is None
    (chosen.out / KEPT_FILE).write_bytes(content[:200])
    assert kept(chosen.out / KEPT_FILE, fingerprint) is None  # damaged: searched again
    (chosen.out / KEPT_FILE).write_bytes(content)
    found = kept(chosen.out / KEPT_FILE, fingerprint)
    assert found is not None
    assert len(found.starts) == chosen.candidates

    monkeypatch.setattr("comir_hpc.register.find_starts", lambda *_: pytest.fail("it was searched again"))
    result = register(chosen)
    assert error(result, truth) < 0.3
    assert result.verdict == "WARN"
    assert any("the checks were quick" in reason for reason in result.reasons)
    assert not (chosen.out / KEPT_FILE).exists()
    assert (chosen.out / "search.npz").is_file()
