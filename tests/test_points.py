"""Tables of points: every kind that programs write, with the right points in LPS and mm, or a refusal by name."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from comir_hpc.errors import VolumeError
from comir_hpc.volumes.points import read_point_table

FCSV = (
    "# Markups fiducial file version = {version}\n# CoordinateSystem = {system}\n"
    "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n"
    "1,1,2,3,0,0,0,1,1,1,0,F-1,,vtkMRMLScalarVolumeNode1{more}\n"
)


def read(folder: Path, content: str | bytes, name: str = "p.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_point_table(path)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ('name,x,y,z\n"AC\n(anterior)",1,2,3\nPC,4,5,6\n', ["AC\n(anterior)", "PC"]),
        ('name,x,y,z\r\n"AC\r\n(anterior)",1,2,3\r\nPC,4,5,6\r\n', ["AC\r\n(anterior)", "PC"]),
        ('name,x,y,z\n"a ""quoted"", b",1,2,3\n"#1\n2",4,5,6\n', ['a "quoted", b', "#1\n2"]),
        ("name,x,y,z\n#1,1,2,3\n#2,4,5,6\n", ["#1", "#2"]),
        ("# c\n\n#d\nname,x,y,z\n#1,1,2,3\n# a comment\n#2,4,5,6\n", ["#1", "#2"]),
        ("\ufeffname,x,y,z\nA,1,2,3\n\nB,4,5,6\n,,,\n", ["A", "B"]),
        ("name,x,y,z\rA,1,2,3\rB,4,5,6", ["A", "B"]),
        ("name;x;y;z\nA, left;1.0;2.0;3.0\nB;4;5;6\n", ["A, left", "B"]),
        ("sep=;\nname;x;y;z\nA;1;2;3\nB;4;5;6\n", ["A", "B"]),
        ("name\tX\t y\tz \nA\t1\t2\t3\nB\t4\t5\t6\n", ["A", "B"]),
        ('"name","x","y","z"\n"A","1","2","3"\n"B","4","5","6"\n', ["A", "B"]),
        ("z,y,x,name\n3,2,1,A\n6,5,4,B\n", ["A", "B"]),
        ("name\tx\ty\tz\r\nÄ\t1\t2\t3\r\nB\t4\t5\t6\r\n".encode("utf-16"), ["Ä", "B"]),
        (f"name,x,y,z\n{'A' * 200_000},1,2,3\nB,4,5,6\n", ["A" * 200_000, "B"]),
    ],
)
def test_every_kind_of_table_gives_its_points(tmp_path: Path, content: str | bytes, names: list[str]) -> None:
    before = csv.field_size_limit()
    table = read(tmp_path, content)
    assert table.points_mm.tolist() == [[1, 2, 3], [4, 5, 6]]
    place = table.columns.index("name")
    assert [row[place] for row in table.rows] == names
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("# CoordinateSystem = RAS\nx,y,z\n1,2,3\n", [-1, -2, 3]),
        ("# coordinate system: ras+\nx,y,z\n1,2,3\n", [-1, -2, 3]),
        ("# CoordinateSystem = LPS\nx,y,z\n1,2,3\n", [1, 2, 3]),
        ("# exported by a program, RAS, mm\nx,y,z\n1,2,3\n", [-1, -2, 3]),
        ("# space = RAS\nx,y,z\n1,2,3\n", [-1, -2, 3]),
        ("# CoordinateSystem,RAS,,\nx,y,z\n1,2,3\n", [-1, -2, 3]),
        ("# points in ras\nx,y,z\n1,2,3\n", [-1, -2, 3]),
        ("#coordinate_system: NIfTI\nx,y,z\n1,2,3\n", [-1, -2, 3]),
        ("# world: ITK\nx,y,z\n1,2,3\n", [1, 2, 3]),
        ("# CoordinateSystem = 0\nx,y,z\n1,2,3\n", [-1, -2, 3]),
        ("# CoordinateSystem = 1\nx,y,z\n1,2,3\n", [1, 2, 3]),
        ("# world LPS mm\nx,y,z\n1,2,3\n", [1, 2, 3]),
        ("label,r,a,s\nF,1,2,3\n", [-1, -2, 3]),
        ("label,l,p,s,defined\nF,1,2,3,1\n", [1, 2, 3]),
        ("# x,y,z\n1.0,2.0,3.0\n", [1, 2, 3]),
        ("# unit: um\nx,y,z\n1000,2000,3000\n", [1, 2, 3]),
        ("# CoordinateSystem = RAS; units = cm\nx,y,z\n.1,.2,.3\n", [-1, -2, 3]),
    ],
)
def test_what_a_header_says_of_its_coordinates_is_used(
    tmp_path: Path, content: str, expected: list[float]
) -> None:
    table = read(tmp_path, content)
    np.testing.assert_allclose(table.points_mm, [expected])
    assert any("RAS" in note for note in table.notes) == (expected[0] < 0)
    assert any("converted to mm" in note for note in table.notes) == ("unit" in content)


@pytest.mark.parametrize(
    ("version", "system", "more", "expected"),
    [
        ("4.2", "0", "", [-1, -2, 3]),
        ("4.11", "RAS", "", [-1, -2, 3]),
        ("4.11", "LPS", "", [1, 2, 3]),
        ("5.6", "LPS", ",2,0", [1, 2, 3]),
        ("4.10", "1", "", [1, 2, 3]),
    ],
)
def test_fiducials_of_slicer(
    tmp_path: Path, version: str, system: str, more: str, expected: list[float]
) -> None:
    table = read(tmp_path, FCSV.format(version=version, system=system, more=more), "F.fcsv")
    assert table.points_mm.tolist() == [expected]
    assert table.rows[0][table.columns.index("label")] == "F-1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("# CoordinateSystem = IJK\nx,y,z\n1,2,3\n", "says that its coordinates are IJK; expected LPS or RAS"),
        ("# CoordinateSystem = 2\nx,y,z\n1,2,3\n", "says that its coordinates are IJK"),
        ("# CoordinateSystem = LAS\nx,y,z\n1,2,3\n", "coordinates are LAS"),
        ("# RAI\nx,y,z\n1,2,3\n", "coordinates are RAI"),
        ("# CoordinateSystem = RAS\n# or LPS?\nx,y,z\n1,2,3\n", "coordinates are LPS and RAS"),
        ("# CoordinateSystem = LPS\nname,r,a,s\nA,1,2,3\n", "coordinates are LPS and RAS"),
        ("# space = MNI152\nx,y,z\n1,2,3\n", "coordinates are MNI152"),
        ("# unit = pixel\nx,y,z\n1,2,3\n", "says that its unit is pixel"),
        ("x,y,z,X\n1,2,3,4\n", "has the columns x twice; which of them are the points"),
        ("x,y,z,r,a,s\n1,2,3,4,5,6\n", "which of them are the points"),
        ("x y z\n1 2 3\n", "its columns are separated by blanks.*commas, semicolons or tabs"),
        ("x;y;z\n1,5;2,5;3,5\n", r"row 1 \(line 2\): x is '1,5'.*a decimal point: write 1.5, not 1,5"),
        ("x,y,z\n1,5,2,5,3,5\n", "has 6 values, the header 3 columns; are its decimals commas"),
        ('name,x,y,z\n"A,1,2,3\nB,4,5,6\n', "no well-formed table"),
        ('{"markups": []}', "is JSON, not a table"),
        (b"x,y,z\n1,2,\xff\n", "is not text"),
        (b"x,y,z\n1,2,3\x00\n", "is not text"),
        ("# c\nname,x,y,z\n\nA,1,2,3\n\"B\nb\",4,5,6\nC,7,8,nine\n", r"row 3 \(line 7\): z is 'nine'"),
        ("x,y,z\n1,2,1_000\n", "z is '1_000'"),
        (FCSV.format(version="5.6", system="LPS", more=",0,0"), "never placed in 3D Slicer"),
    ],
)  # fmt: skip
def test_what_is_not_clear_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(VolumeError, match=message):
        read(tmp_path, content)


def test_a_list_of_slicer_that_does_not_say_its_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        VolumeError, match="does not say whether its coordinates are RAS or LPS; add the line"
    ):
        read(tmp_path, "# columns = label,x,y,z,sel,vis\nF-1,1,2,3,1,1\n", "F.fcsv")


def test_a_million_columns_are_not_printed(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="999,992 more") as refused:
        read(tmp_path, ",".join(f"column{i}" for i in range(1_000_000)) + "\n")
    assert len(str(refused.value)) < 600
    with pytest.raises(VolumeError) as refused:
        read(tmp_path, "x,y,z\n1,2," + "9" * 100_000 + "x\n")
    assert len(str(refused.value)) < 400


def test_comments_among_the_rows_are_counted(tmp_path: Path) -> None:
    table = read(tmp_path, "x,y,z\n1,2,3\n#4,5,6\n# a, b\n7,8,9\n")
    assert table.points_mm.tolist() == [[1, 2, 3], [7, 8, 9]]
    assert table.notes == ("p.csv: 2 rows begin with # and are left out as comments",)
