from pathlib import Path

import pytest
import yaml

from comir_hpc import config
from comir_hpc.config import EngineSettings, RegisterSettings, TrainSettings
from comir_hpc.errors import ConfigError

PAIR = {"modalities": ["a", "b"], "pairs": [{"a": "a.zarr", "b": "b.zarr"}]}


def write(folder: Path, record: object) -> Path:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(record), encoding="utf-8")
    return path


def test_resolved_settings_read_back_equal(tmp_path: Path) -> None:
    settings = config.load(
        TrainSettings, write(tmp_path, PAIR), ["optimiser.steps=7", "network.widths=[4, 8]"]
    )
    assert settings.optimiser.steps == 7
    assert settings.network.widths == (4, 8)
    again = tmp_path / "again.yaml"
    again.write_text(config.dump(settings), encoding="utf-8")
    assert config.load(TrainSettings, again) == settings


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    settings = config.load(TrainSettings, write(tmp_path, PAIR))
    assert settings.pairs[0]["a"] == tmp_path / "a.zarr"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"optimizer": {"steps": 3}}, ["unknown key optimizer", "did you mean optimiser?"]),
        ({"loss": {"temprature": 1}}, ["unknown key loss.temprature", "did you mean temperature?"]),
        ({"loss": {"critic": "cosin"}}, ["loss.critic is 'cosin'", "'cosine'"]),
        ({"sampling": {"patch": [32, 32, 16], "group": "O"}}, ["(32, 32, 16)", "group O"]),
        (
            {"sampling": {"pairs_per_step": 1}, "loss": {"subcrops": 1, "displacement_negatives": 0}},
            ["no negatives", "2 or more"],
        ),
        ({"modalities": ["a", "a"]}, ["at least two different"]),
        ({"pairs": [{"a": "a.zarr", "c": "c.zarr"}]}, ["pairs[0] names ['a', 'c']", "expected ['a', 'b']"]),
        ({"optimiser": {"steps": 0}}, ["optimiser.steps is 0", "greater than or equal to 1"]),
    ],
)
def test_what_cannot_work_is_named_with_the_remedy(tmp_path: Path, change: dict, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(TrainSettings, write(tmp_path, PAIR | change))
    for part in parts:
        assert part in str(caught.value)


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    record = PAIR | {"sede": 1, "loss": {"critic": "no", "bound": "no"}}
    with pytest.raises(ConfigError, match=r"(?s)sede.*|critic.*bound") as caught:
        config.load(TrainSettings, write(tmp_path, record))
    assert all(word in str(caught.value) for word in ("sede", "loss.critic", "loss.bound"))


def test_missing_file_and_broken_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist.*configs/"):
        config.load(TrainSettings, tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not YAML"):
        config.load(TrainSettings, broken)
    broken.write_text("just text", encoding="utf-8")
    with pytest.raises(ConfigError, match="expected a mapping"):
        config.load(TrainSettings, broken)


@pytest.mark.parametrize("override", ["nonsense", "seed.x=1"])
def test_overrides_that_make_no_sense(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        config.load(TrainSettings, write(tmp_path, PAIR | {"seed": 1}), [override])


def test_engine_combinations() -> None:
    with pytest.raises(ConfigError, match=r"engine\.name=deepspeed"):
        config.validate(EngineSettings, {"offload_optimiser": True})
    with pytest.raises(ConfigError, match="35 times slower"):
        config.validate(EngineSettings, {"precision": "fp16", "device": "cpu"})


def test_register_needs_a_model_for_learned_representations() -> None:
    record = {"fixed": "f", "moving": "m", "out": "o"}
    with pytest.raises(ConfigError, match="--model, --fixed-modality, --moving-modality"):
        config.validate(RegisterSettings, record)
    assert config.validate(RegisterSettings, record | {"representation": "intensity"}).initial == "global"


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        EngineSettings().name = "deepspeed"  # type: ignore[misc]


def test_every_field_says_what_it_is() -> None:
    kinds = [k for k in vars(config).values() if isinstance(k, type) and issubclass(k, config.Settings)]
    for kind in kinds:
        for name, field in kind.model_fields.items():
            is_group = isinstance(field.annotation, type) and issubclass(field.annotation, config.Settings)
            assert is_group or field.description, f"{kind.__name__}.{name} has no docstring"


def test_example_configs_are_valid() -> None:
    examples = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
    assert examples
    for example in examples:
        config.load(TrainSettings, example)
