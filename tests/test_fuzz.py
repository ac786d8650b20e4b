"""Files that are nearly right, of every format, seeded: no traceback, no other volume in silence, no long message."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from file_mutations import MAKERS
from fuzzing import try_one

TRIES = 55
"""Of each format; ten formats, about 30 seconds on one core."""


@pytest.mark.parametrize("kind", MAKERS)
def test_files_that_are_nearly_right(tmp_path: Path, kind: str) -> None:
    tries = [try_one(kind, seed, tmp_path / "file") for seed in range(TRIES)]
    failures = [f"{one.what}: {one.why}" for one in tries if one.verdict == "failed"]
    assert not failures, f"{len(failures)} of {TRIES}: " + "\n".join(failures[:5])
    # A fuzz that refuses everything, or never meets a refusal, tests nothing.
    verdicts = Counter(one.verdict for one in tries)
    assert verdicts["alike"] + verdicts["noted"] > TRIES // 10
    assert verdicts["refused"] > TRIES // 10
