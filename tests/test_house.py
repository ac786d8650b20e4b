"""The package keeps the measures of docs/architecture.md, "How large things are"."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "house"))
from measure import House, measured  # noqa: E402


@pytest.fixture(scope="module")
def house() -> House:
    return measured(ROOT / "comir_hpc")


def test_a_newcomer_finds_the_room_from_the_listing(house: House) -> None:
    assert len(house.rooms) <= 23, house.rooms


def test_files_and_functions_stay_short(house: House) -> None:
    assert {str(f): n for f, n in house.lines.items() if n > 350} == {}
    assert {name: n for name, n in house.functions.items() if n > 85} == {}


def test_chains_of_imports_stay_short_and_have_no_circle(house: House) -> None:
    assert len(house.chain) <= 11, " > ".join(house.chain)
    assert house.circles == ()


def test_a_circle_and_a_long_chain_are_seen(tmp_path: Path) -> None:
    package = tmp_path / "p"
    package.mkdir()
    for name, text in {
        "__init__": "", "a": "from p.b import x\n", "b": "from p import c\n", "c": "x = 1\n",
        "d": "from p.e import y\n", "e": "import p.d\ny = 1\n",
        "late": "def f():\n    from p.a import x\n",
    }.items():  # fmt: skip
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    found = measured(package)
    assert found.chain[-3:] == ("p.a", "p.b", "p.c")
    assert set(found.circles) >= {("p.d", "p.e")} or set(found.circles) >= {("p.e", "p.d")}
