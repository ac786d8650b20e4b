"""The command line as its user meets it: help, options made from settings, usage errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from comir_hpc import config
from comir_hpc.commands.app import app
from comir_hpc.commands.failure import carry_out
from comir_hpc.commands.interrupt import Interrupt
from comir_hpc.commands.options import PANELS, choices, option_name
from comir_hpc.commands.terminal import Terminal
from comir_hpc.config import OnCommandLine, Settings

VERBS = (
    "demo",
    "ingest",
    "train",
    "infer",
    "adapt",
    "register",
    "warp",
    "refine",
    "evaluate",
    "report",
    "sync",
    "doctor",
    "benchmark",
    "datasets",
    "export",
    "view",
)
NAMED = [getattr(config, name) for name in config.__all__]
KINDS = [k for k in NAMED if isinstance(k, type) and issubclass(k, Settings) and k is not Settings]
# Groups of train's settings, and its pairs: --set reaches them.
GROUPS = {
    "network",
    "loss",
    "sampling",
    "synthetic",
    "optimiser",
    "engine",
    "tracking",
    "checkpoint",
    "pairs",
}


def run(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "comir_hpc", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=cwd,
        check=False,
        env=os.environ | environment,
    )


def commands() -> dict[str, Any]:
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def options(verb: str) -> set[str]:
    return {option for parameter in commands()[verb].params for option in parameter.opts}


def invoke(*arguments: object) -> Any:
    """Run a command here; what it raises is in the answer."""
    return CliRunner().invoke(app, list(map(str, arguments)))


# ---------------------------------------------------------------------- help


def test_every_verb_is_there_with_an_example() -> None:
    assert set(commands()) == set(VERBS)
    for name, command in commands().items():
        assert f"comir-hpc {name}" in command.epilog, name
        assert command.help, name


@pytest.mark.parametrize("verb", VERBS)
def test_help_and_example_agree(verb: str) -> None:
    for option in re.findall(r"(?<=\s)--[a-z-]+", commands()[verb].epilog or ""):
        assert option in options(verb), option
    shown = invoke(verb, "--help")
    assert shown.exit_code == 0
    for option in ("--quiet", "--log", "--help"):
        assert option in shown.output
    if verb not in ("report", "sync", "doctor"):
        assert "--dry-run" in shown.output


@pytest.mark.parametrize("verb", VERBS)
def test_options_stand_in_panels_with_full_phrases(verb: str) -> None:
    for parameter in commands()[verb].params:
        if getattr(parameter, "hidden", False):
            continue
        assert parameter.help, parameter.name
        assert re.match(r"[A-Z]|dask", parameter.help), f"{verb}: {parameter.help}"
        assert not re.match(r"Of |See ", parameter.help), f"{verb} --{parameter.name}: {parameter.help}"
        assert parameter.help.rstrip().endswith((".", ")", "]")), (
            f"{verb} --{parameter.name}: {parameter.help}"
        )
        panel = parameter.rich_help_panel
        own = parameter.name in ("dry_run", "quiet", "log")
        assert panel is None if own or parameter.param_type_name == "argument" else panel in PANELS


def test_help_loads_nothing_heavy_and_no_other_verbs_settings() -> None:
    code = (
        "import sys; from comir_hpc.commands.app import app; from typer.testing import CliRunner\n"
        "never = {'torch', 'zarr', 'SimpleITK', 'dask', 'mlflow', 'deepspeed', 'numpy', 'matplotlib', 'yaml'}\n"
        "settings = 'comir_hpc.config.{}'.format\n"
        "for verb, more in (('', 'base'), ('register', 'train'), ('train', 'evaluate')):\n"
        "    assert CliRunner().invoke(app, f'{verb} --help'.split()).exit_code == 0\n"
        "    found = (never | {settings(more)}) & set(sys.modules)\n"
        "    assert not found, (verb, found)\n"
        "    assert not verb or settings(verb) in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_a_verb_the_help_is_shown_as_a_usage_error() -> None:
    done = run()
    assert done.returncode == 2
    assert "register" in done.stdout


def test_the_program_that_is_installed_is_this_one() -> None:
    from comir_hpc import commands

    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert tomllib.loads(text)["project"]["scripts"] == {
        "comir-hpc": f"{commands.__name__}:{commands.main.__name__}"
    }


def test_version() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert re.fullmatch(r"comir-hpc \d+\.\d+\.\d+", done.stdout.strip())


def test_the_shell_completes_verbs_options_and_words() -> None:
    # The name of the program decides the variable's name.
    script = "import sys; sys.argv[0] = 'comir-hpc'; from comir_hpc.commands import main; main()"

    def completed(*words: str) -> list[str]:
        environment = os.environ | {
            "_COMIR_HPC_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(("comir-hpc", *words)),
            "COMP_CWORD": str(len(words)),
        }
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment
        )
        return done.stdout.split()

    assert completed("reg") == ["register"]
    assert completed("infer", "--symm") == ["--symmetrise"]
    assert completed("infer", "--blend", "ga") == ["gaussian"]
    assert {"--install-completion", "--show-completion"} <= {
        option for parameter in typer.main.get_command(app).params for option in parameter.opts
    }


# ---------------------------------------------------------------------- options and settings


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_setting_has_an_option_or_is_reached_by_set(kind: type[Settings]) -> None:
    found = {choice.name for choice in choices(kind)}
    if kind.__name__ in ("NetworkSettings", "LossSettings", "SamplingSettings", "OptimiserSettings",
                         "EngineSettings", "TrackingSettings", "CheckpointSettings"):  # fmt: skip
        return
    in_the_file = {config.TrainSettings: GROUPS, config.BenchmarkSettings: {"pairs", "models"}}
    assert set(kind.model_fields) - found == in_the_file.get(kind, set())


def test_every_setting_of_a_verb_is_among_its_options() -> None:
    kinds = {
        "evaluate": (config.EvaluateSettings, config.CompareSettings),
        "train": (config.RunSettings, config.TrainSettings),
        "register": (config.RegisterPairSettings,),
        "benchmark": (config.BenchmarkRunSettings, config.BenchmarkSettings),
    }
    for verb in VERBS:
        for kind in kinds.get(verb, (getattr(config, f"{verb.capitalize()}Settings"),)):
            for choice in choices(kind):
                names = {p.name: p for p in commands()[verb].params}
                assert choice.name in names
                if names[choice.name].param_type_name == "option":
                    assert set(choice.names) <= options(verb)


def test_names_that_scripts_rely_on_stay() -> None:
    """The contract: what the documents, the cluster's scripts and earlier releases call options."""
    before = {
        "demo": "out seed train-seed model displacement dry-run",
        "ingest": "spacing unit dataset labels chunk shard non-finite foreground-above max-memory part verify "
        "workers overwrite dry-run",
        "train": "run set dry-run",
        "infer": "zarr model modality out window overlap blend batch precision device symmetrise dtype core part "
        "workers cluster verify overwrite dry-run",
        "register": "fixed moving out model fixed-modality moving-modality fixed-representation "
        "moving-representation representation initial transform rotations candidates seed overwrite dry-run",
        "warp": "transform out zarr like points direction interpolation part workers cluster verify overwrite dry-run",
        "evaluate": "result truth points model checkpoint volume cubes side angle-step device precision out dry-run",
        "sync": "mlflow",
        "doctor": "folder json",
    }
    for verb, names in before.items():
        assert {f"--{name}" for name in names.split()} <= options(verb), verb


def test_help_texts_come_from_the_docstrings_with_names_of_options() -> None:
    found = {choice.name: choice for choice in choices(config.IngestSettings)}
    assert found["unit"].text == "Unit of --spacing: nm, um, mm, cm or m."
    assert found["chunk"].text.endswith("the unit of reading. (default: 64)")
    assert found["spacing"].spelling.metavar == "Z Y X"
    assert found["kind"].type is bool
    assert {choice.name: choice for choice in choices(config.InferSettings)}["blend"].words == (
        "gaussian", "hann", "exact"
    )  # fmt: skip


def test_defaults_in_the_help_are_those_of_the_settings() -> None:
    for kind in KINDS:
        for choice in choices(kind):
            stated = re.search(r"\(default: (.+)\)$", choice.text)
            default = kind.model_fields[choice.name].default
            if stated and not isinstance(default, bool):
                assert str(default) == stated.group(1), f"{kind.__name__}.{choice.name}"


def test_a_new_setting_is_one_field() -> None:
    class Sample(Settings):
        """Settings of a test."""

        strength: float = 0.5
        """Strength of the effect, in mm; see `kind`."""
        kind: config.GroupName = "O"
        """Group of rotations."""
        sure: bool = True
        """Ask for nothing."""
        names: tuple[str, ...] = ()
        """Names of things."""

    found = {choice.name: choice for choice in choices(Sample)}
    assert found["strength"].text == "Strength of the effect, in mm; see --kind. (default: 0.5)"
    assert (found["strength"].type, found["strength"].panel) == (float, "Method")
    assert "D4" in found["kind"].words
    assert found["names"].type == list[str]
    assert option_name("fixed_modality") == "--fixed-modality"
    assert found["sure"].text == "Ask for nothing. (default: on)"


def test_what_is_given_reaches_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import comir_hpc.ingest

    seen: list[Any] = []
    monkeypatch.setattr(comir_hpc.ingest, "plan_ingest", lambda settings: seen.append(settings) or {"a_b": 1})
    words = "--spacing 2 1 0.5 --unit um --labels --part 3/16 --max-memory 2.5 --workers 4 --cluster slurm --verify"
    done = invoke("ingest", "a.nii", "b.zarr", *words.split(), "--dry-run")
    assert done.exit_code == 0, done.output
    assert done.output == "a b  1\n"
    assert seen[0] == config.IngestSettings(
        source="a.nii", out="b.zarr", spacing=(2, 1, 0.5), unit="um", kind="labels", part=(3, 16), max_memory_gib=2.5,
        workers=4, cluster="slurm", verify=True,
    )  # fmt: skip
    assert seen[0].model_fields_set == {
        "source", "out", "spacing", "unit", "kind", "part", "max_memory_gib", "workers", "cluster", "verify",
    }  # fmt: skip


def test_train_takes_flat_settings_and_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import comir_hpc.train

    path = tmp_path / "c.yaml"
    path.write_text("modalities: [a, b]\npairs: [{a: a.zarr, b: b.zarr}]\nseed: 1\n", encoding="utf-8")
    seen: list[Any] = []
    monkeypatch.setattr(comir_hpc.train, "plan_training", lambda settings: seen.append(settings) or {})
    command = ["train", path, "--run", tmp_path / "run", "--dry-run", "--set", "optimiser.steps=7"]
    for more in ([], ["--seed", 5], ["--seed", 5, "--modalities", "b", "--modalities", "a"]):
        done = invoke(*command, *more)
        assert done.exit_code == 0, done.output
    assert [(s.seed, s.modalities, s.optimiser.steps) for s in seen] == [
        (1, ("a", "b"), 7), (5, ("a", "b"), 7), (5, ("b", "a"), 7)
    ]  # fmt: skip
    assert seen[0].pairs[0]["a"] == tmp_path / "a.zarr"
    assert not (tmp_path / "run").exists()


def test_register_takes_its_volumes_by_place_or_as_options(monkeypatch: pytest.MonkeyPatch) -> None:
    import comir_hpc.register

    seen: list[Any] = []
    monkeypatch.setattr(comir_hpc.register, "plan_register", lambda settings: seen.append(settings) or {})
    rest = ["--representation", "intensity", "--out", "o", "--dry-run"]
    both = ["f.zarr", "m.zarr", "--fixed", "f.zarr"]  # the same said twice
    for volumes in (["f.zarr", "m.zarr"], ["--fixed", "f.zarr", "--moving", "m.zarr"], both):
        done = invoke("register", *volumes, *rest)
        assert done.exit_code == 0, done.output
    assert seen[0] == seen[1] == seen[2]
    assert (str(seen[0].fixed), str(seen[0].moving)) == ("f.zarr", "m.zarr")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("ingest", "Missing argument"),
        ("warp --nonsense", "No such option"),
        ("nonsense", "No such command"),
        ("ingst a b", "Did you mean 'ingest'"),
        ("register a.zarr --out o", "expected FIXED MOVING, or --fixed FIXED --moving MOVING"),
        (
            "register a b --fixed c --out o",
            "FIXED is a by its place, and --fixed says c; give one of the two",
        ),
        ("register a b c", "unexpected extra argument"),
        ("register --fixed a --out o", "expected FIXED MOVING"),
        ("ingest a b --max-memory 1 --max-memory-gib 2", "names of one option"),
        ("ingest a b --workers many", "--workers"),
    ],
)
def test_usage_errors_are_one_line_and_exit_with_2(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert carry_out(lambda: app(words.split(), standalone_mode=False), Terminal(), Interrupt()) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    assert said in line
    assert "--help" in line


@pytest.mark.parametrize("text", ["3", "a/b", "1/", "²/3", "4/3", "0/2"])
def test_part_must_be_a_fraction(text: str) -> None:
    done = invoke("ingest", "a.nii", "b.zarr", "--part", text)
    assert isinstance(done.exception, config.base.ConfigError)
    assert "part" in str(done.exception)


def test_markers_say_what_names_and_types_do_not() -> None:
    assert OnCommandLine().panel == ""
    assert {choice.panel for kind in KINDS for choice in choices(kind)} == set(PANELS)
