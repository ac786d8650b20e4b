"""Measure how easily one finds one's way in the package: sizes, and the longest chain of imports.

    python benchmarks/house/measure.py --package comir_hpc

An import counts if it runs when the module is loaded; imports inside functions and under TYPE_CHECKING do not. The
chain counts modules, a package's own module among them if it is imported.
"""

from __future__ import annotations

import argparse
import ast
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class House:
    """What was counted.

    Attributes
    ----------
    rooms : tuple of str
        Modules and folders at the package's top level.
    lines : mapping
        Lines of each file.
    functions : mapping
        Lines of each function, by file and name.
    chain : tuple of str
        The longest chain of imports, from the top down.
    circles : tuple of tuples of str
        Modules that import each other in a circle.
    """

    rooms: tuple[str, ...]
    lines: Mapping[Path, int]
    functions: Mapping[str, int]
    chain: tuple[str, ...]
    circles: tuple[tuple[str, ...], ...]


def measured(package: Path) -> House:
    """Count files, functions and imports of a package."""
    files = {_dotted(package, file): file for file in sorted(package.rglob("*.py"))}
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in files.items()}
    imports = {name: set(_imported(tree, files)) - {name, package.name} for name, tree in trees.items()}
    circles: list[tuple[str, ...]] = []

    @cache
    def below(name: str) -> tuple[str, ...]:
        chains = [below(other) for other in sorted(imports[name]) if not _leads_back(other, name)]
        return (name, *max(chains, key=len, default=()))

    def _leads_back(start: str, goal: str) -> bool:
        seen, todo = set[str](), [start]
        while todo:
            one = todo.pop()
            if one == goal:
                circles.append((goal, start))
                return True
            if one not in seen:
                seen.add(one)
                todo.extend(imports[one])
        return False

    chain = max((below(name) for name in files), key=len)
    entries = [
        entry for entry in package.iterdir() if entry.name not in ("__init__.py", "py.typed", "__pycache__")
    ]
    return House(
        rooms=tuple(sorted(entry.stem for entry in entries)),
        lines={file: len(file.read_text(encoding="utf-8").splitlines()) for file in files.values()},
        functions={
            f"{name}.{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
            for name, tree in trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        },
        chain=chain,
        circles=tuple(circles),
    )


def _dotted(package: Path, file: Path) -> str:
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def _imported(tree: ast.Module, files: Mapping[str, Path]) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in files or node.module in files:
                    yield whole if whole in files else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--package", type=Path, default=Path("comir_hpc"), help="folder of the package")
    house = measured(parser.parse_args().package.resolve())
    functions = sorted(house.functions.values())
    print(f"at the top level          {len(house.rooms)}")
    print(f"files                     {len(house.lines)}, {sum(house.lines.values())} lines")
    print(
        f"longest file              {max(house.lines.values())}; over 350: {sum(n > 350 for n in house.lines.values())}"
    )
    print(f"functions                 {len(functions)}, median {statistics.median(functions):g} lines")
    print(f"longest function          {functions[-1]}")
    print(f"longest chain of imports  {len(house.chain)}: {' > '.join(house.chain)}")
    print(f"circles                   {len(house.circles)}")


if __name__ == "__main__":
    main()
