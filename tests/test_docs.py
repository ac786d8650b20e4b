"""The documents tell the truth: commands parse, links lead somewhere, settings in examples are valid."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import typer
import yaml

from comir_hpc import config
from comir_hpc.commands import app as cli
from comir_hpc.data.embedded import write_nifti
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Transform, array_and_grid, save_transform

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "containers" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
SCRIPTS = [*sorted((ROOT / "slurm").glob("*.sh")), *sorted((ROOT / "benchmarks").rglob("*.sh"))]


def commands_in(path: Path) -> list[list[str]]:
    """Every `comir-hpc ...` line of a document's bash blocks, or of a script, as words."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, flags=re.DOTALL))
    joined = text.replace("\\\n", " ")
    lines = [line.strip() for line in joined.splitlines()]
    prefixes = ("comir-hpc ", "comir ")
    words = [shlex.split(line.split(" || ")[0])[1:] for line in lines if line.startswith(prefixes)]
    return [each for each in words if not each[0].startswith("$")]


ALL = [(path, words) for path in [*DOCUMENTS, *SCRIPTS] for words in commands_in(path)]


def test_there_are_commands_to_check() -> None:
    assert len(ALL) > 10


@pytest.mark.parametrize(("path", "words"), ALL, ids=[f"{p.name}:{' '.join(w)[:40]}" for p, w in ALL])
def test_commands_name_verbs_and_options_that_exist(path: Path, words: list[str]) -> None:
    known: dict[str, Any] = dict(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    if words[0] == "--version":
        return
    assert words[0] in known, f"{path}: no verb {words[0]}"
    options = {option for parameter in known[words[0]].params for option in parameter.opts} | {"--help"}
    for word in words[1:]:
        if re.fullmatch(r"--[a-z-]+", word):
            assert word in options, f"{path}: {words[0]} has no {word}"
    required = [p for p in known[words[0]].params if p.required and p.param_type_name == "option"]
    if "$@" not in words and "--help" not in words:
        for parameter in required:
            assert set(parameter.opts) & set(words), f"{path}: {words[0]} needs {parameter.opts[0]}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(
        r"^make ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M
    ):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_settings_in_the_training_guide_are_valid() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        config.validate(config.TrainSettings, yaml.safe_load(block))


def test_settings_named_in_documents_exist() -> None:
    """`group.field` in backticks, for a group of the training settings."""
    groups = {
        name: field.annotation.model_fields
        for name, field in config.TrainSettings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, config.Settings)
    }
    for path in DOCUMENTS:
        for group, name in re.findall(
            r"[`\s]([a-z]+)\.([a-z_0-9]+)(?=[`=:])", path.read_text(encoding="utf-8")
        ):
            if group in groups and name != "py":
                assert name in groups[group], f"{path.name}: no setting {group}.{name}"


def test_no_machine_paths_or_hosts_are_committed() -> None:
    for path in [*DOCUMENTS, *SCRIPTS, ROOT / "Makefile", ROOT / "pyproject.toml"]:
        assert not re.search(r"(?<![\w.$}])/(work|opt/wheels|root)/", path.read_text(encoding="utf-8")), path


def test_snippets_of_the_conventions_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SimpleITK and numpy apply the files that we write, in the direction that the document states."""
    shift = (3.0, -2.0, 1.0)
    values = np.zeros((12, 14, 16), np.float32)
    values[5, 6, 7] = 100
    fixed = Grid((12, 14, 16), (1, 1, 1))
    moving = Grid((12, 14, 16), (1, 1, 1), shift)  # the same specimen, seen from a displaced frame
    write_nifti(tmp_path / "fixed.nii.gz", values, fixed)
    write_nifti(tmp_path / "moving.nii.gz", values, moving)
    save_transform(Transform.rigid(np.eye(3), shift, (0, 0, 0)), tmp_path, {})
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "conventions.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block, names)
    on_fixed, _ = array_and_grid(sitk.ReadImage("on_fixed.nii.gz"))
    np.testing.assert_allclose(on_fixed, values, atol=1e-4)
    np.testing.assert_allclose(names["with_numpy"], values, atol=1e-4)
    np.testing.assert_allclose(names["moving_points"], [[13.0, -22.0, 31.0]])
    np.testing.assert_allclose(names["back"], names["fixed_points"])
