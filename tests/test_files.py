from pathlib import Path

import pytest

from comir_hpc.host.files import write_bytes, write_json, write_text, written_whole


def test_a_file_appears_with_all_of_its_content(tmp_path: Path):
    write_text(tmp_path / "a.txt", "später\n", durable=True)
    write_bytes(tmp_path / "b.bin", b"\0\1")
    write_json(tmp_path / "c.json", {"a": [1, None]})
    assert (tmp_path / "a.txt").read_bytes() == "später\n".encode()
    assert (tmp_path / "b.bin").read_bytes() == b"\0\1"
    assert (tmp_path / "c.json").read_text() == '{\n  "a": [\n    1,\n    null\n  ]\n}\n'
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.bin", "c.json"]


def test_a_failure_while_writing_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fail_half_way():
        with written_whole(target) as spare:
            spare.write_text("new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_temporary_name_keeps_the_suffix(tmp_path: Path):
    with written_whole(tmp_path / "a.npz") as spare:
        assert spare.suffix == ".npz"
        assert spare.parent == tmp_path
        spare.write_bytes(b"")
