"""docs/benchmarks.md is what its command makes of the committed tables."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "field"))
import page  # noqa: E402


def test_the_page_is_made_from_the_tables() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run `make bench-page`"


def test_no_place_is_left_open_and_every_table_is_accounted_for() -> None:
    text = page.page()
    assert not re.search(r"\{[a-z]+\}", text)
    for path, title in page.TABLES.items():
        assert f"* {title}: " in text
        assert (f"### {title}" in text) == path.is_file()
