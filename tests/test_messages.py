"""Every option that a text of the package names exists, and where it matters, in the verb that says it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from comir_hpc.commands.app import app

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "comir_hpc"
# Options of other programs: sbatch, srun, Apptainer, FreeSurfer, pip, npm.
FOREIGN = {
    "--mem",
    "--gres",
    "--nv",
    "--test-only",
    "--version",
    "--help",
    "--inlta",
    "--outlta",
    "--outitk",
    "--inm3z",
    "--raw",
    "--target",
    "--quiet",
    "--no-deps",
    "--ignore-requires-python",
    "--only-binary",
    "--dest",
    "--silent",
}


def options() -> dict[str, set[str]]:
    """Options of every verb, those that the help does not show too."""
    group = typer.main.get_command(app)
    return {
        name: {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }


VERBS = options()
ALL = set().union(*VERBS.values()) | {"--version", "--install-completion"}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string of a module; of an f-string what stands between the braces is a blank."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            said = [v.value if isinstance(v, ast.Constant) else " " for v in node.values]
            yield node.lineno, "".join(map(str, said))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, node.value


def named(text: str) -> list[str]:
    return re.findall(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*(?![\w-])", text)


MODULES = sorted(PACKAGE.rglob("*.py"))
PAGES = sorted(p for p in PACKAGE.rglob("*") if p.suffix in (".html", ".j2"))
# Who speaks with the words of a room: its verb (a report names commands of all verbs), or the verbs that use it.
SPEAKERS: dict[str, tuple[str, ...]] = {verb: (verb,) for verb in set(VERBS) - {"report"}} | {
    "blocks": ("ingest", "infer", "warp"),
    "register/blockwise": ("refine",),
    "representations": ("register",),
    "representations/encoding": ("infer", "register", "evaluate"),
    "learning": ("train",),
}
SPOKEN = [p for p in MODULES if p.relative_to(PACKAGE).parts[0] in SPEAKERS]


def speakers(path: Path) -> tuple[str, ...]:
    """Verbs in whose messages a module's texts appear."""
    room, *rest = path.relative_to(PACKAGE).parts
    return SPEAKERS.get(f"{room}/{rest[0]}" if rest else room, SPEAKERS[room])


def test_there_are_texts_to_read() -> None:
    found = [option for path in MODULES for _, text in texts(path) for option in named(text)]
    assert len(found) > 60
    assert "--max-memory-gib" in found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_options_in_texts_exist(path: Path) -> None:
    for line, text in texts(path):
        for option in named(text):
            assert option in ALL | FOREIGN, f"{path.name}:{line} names {option}, which no verb has"


@pytest.mark.parametrize("path", SPOKEN, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_options_are_those_of_the_verb_that_names_them(path: Path) -> None:
    """In a message of `register`, an option is one of `register`, or the verb that has it stands in the text."""
    for line, text in texts(path):
        named_verbs = {verb for verb in VERBS if re.search(rf"\b{verb}\b", text)}
        for speaker in speakers(path):
            known = FOREIGN.union(*(VERBS[verb] for verb in {speaker, *named_verbs}))
            for option in named(text):
                assert option in known, f"{path.name}:{line}: {speaker} has no {option}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_options_in_pages_exist(path: Path) -> None:
    text = re.sub(r"--[\w-]+:|var\(--[\w-]+", "", path.read_text(encoding="utf-8"))  # properties of CSS
    for option in named(text):
        assert option in ALL, option


def test_documents_name_options_that_exist() -> None:
    """In documents, an option in backticks that follows a verb of ours, or stands alone, exists."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for code in re.findall(r"`([^`\n]+)`", path.read_text(encoding="utf-8")):
            words = code.split()
            verb = next((word for word in words if word in VERBS), None)
            for option in named(code) if verb else ():
                assert option in VERBS[str(verb)], f"{path.name}: `{code}`"
