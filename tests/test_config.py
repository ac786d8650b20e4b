import itertools
import json
from pathlib import Path

import pytest
import yaml
from registration_cases import CAME_LATER

from comir_hpc import config
from comir_hpc.config import EngineSettings, IngestSettings, RegisterSettings, TrainSettings
from comir_hpc.errors import ConfigError
from comir_hpc.train.checks import claim_run

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


def test_register_needs_no_model() -> None:
    record = {"fixed": "f", "moving": "m", "out": "o"}
    assert config.validate(RegisterSettings, record).model is None  # the general one is used
    assert config.validate(RegisterSettings, record | {"representation": "intensity"}).initial == "global"


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        EngineSettings().name = "deepspeed"  # type: ignore[misc]


def test_every_field_says_what_it_is_as_a_phrase() -> None:
    named = [getattr(config, name) for name in config.__all__]
    kinds = [k for k in named if isinstance(k, type) and issubclass(k, config.Settings)]
    for kind in kinds:
        for name, field in kind.model_fields.items():
            is_group = isinstance(field.annotation, type) and issubclass(field.annotation, config.Settings)
            assert is_group or field.description, f"{kind.__name__}.{name} has no docstring"
            assert is_group or not str(field.description).startswith(("Of ", "See "))


def test_example_configs_are_valid() -> None:
    examples = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
    assert examples
    for example in examples:
        kind = config.BenchmarkSettings if example.name.startswith("benchmark") else TrainSettings
        config.load(kind, example)


# ---------------------------------------------------------------------- what was written before

RESOLVED = """\
modalities:
- t1w
- t2w
pairs:
- t1w: configs/a/t1w.zarr
  t2w: configs/b/t2w.zarr
seed: 3
network:
  name: unet
  widths:
  - 8
  - 16
  latent_channels: 1
  norm: batch
  residual: false
  convs_per_level: 2
  kernels: symmetric
  padding: replicate
  configuration: three-level
  antialiased: true
  checkpoint_levels: auto
loss:
  critic: correlation
  bound: infonce
  temperature: 0.1
  subcrops: 2
  displacement_negatives: 8
  displacement_voxels:
  - 1
  - 4
  decay_l1: 0.0
  decay_l2: 0.001
  min_overlap: 0.05
sampling:
  patch:
  - 1
  - 64
  - 64
  pairs_per_step: 8
  group: D4
  foreground: 0.5
  ignore_radius: 0.5
  rotate: 0.75
  scale: 0.15
  intensity: 0.2
  mirror: false
  level: 0
  cache_mib: 4096
  workers: 2
optimiser:
  steps: 400
  learning_rate: 0.0001
  warmup: 0.15
  weight_decay: 0.0001
  clip_norm: 1.0
  average: 0.98
engine:
  name: torch
  precision: auto
  zero_stage: 1
  accumulation: 1
  offload_optimiser: false
  device: auto
  timeout_s: 600
tracking:
  mlflow: null
  experiment: comir-hpc
  log_every: 10
  picture_every: 100
  system_every: 10.0
  checkpoint_mib: 256
checkpoint:
  every_steps: 100
  every_minutes: 10.0
  keep: 2
"""
"""config.yaml of a run, as version 0.1.0 wrote it before settings became a package."""


# Settings that runs of before do not have, each with the value that means what was done then.
SINCE = {
    "  name: unet\n": "  shared: false\n",
    "antialiased: true\n  checkpoint_levels: auto\n": "start_from: null\nsynthetic: null\n",
    "  level: 0\n": "  within: null\n",
}


def resolved_now() -> str:
    text = RESOLVED
    for place, added in SINCE.items():
        text = text.replace(place, place + added, 1)
    return text


def test_the_resolved_text_of_a_run_is_what_it_was_and_what_is_new(tmp_path: Path) -> None:
    record = {
        "modalities": ["t1w", "t2w"],
        "pairs": [{"t1w": "a/t1w.zarr", "t2w": "b/t2w.zarr"}],
        "seed": 3,
        "sampling": {"patch": [1, 64, 64], "group": "D4"},
        "network": {"widths": [8, 16], "convs_per_level": 2, "checkpoint_levels": "auto"},
        "optimiser": {"learning_rate": 1e-4},
        "tracking": {"mlflow": None},
    }
    assert config.dump(config.validate(TrainSettings, record, folder=Path("configs"))) == resolved_now()


def test_run_folders_of_before_load(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(RESOLVED.replace("configs/", "/data/"), encoding="utf-8")
    assert config.dump(config.load(TrainSettings, path)) == resolved_now().replace("configs/", "/data/")


def test_run_folders_of_before_go_on(tmp_path: Path) -> None:
    """A setting that the folder does not know yet was at its default then."""
    (tmp_path / "config.yaml").write_text(RESOLVED.replace("configs/", "/data/"), encoding="utf-8")
    settings = config.load(TrainSettings, tmp_path / "config.yaml")
    claim_run(settings, tmp_path, 10)
    shared = settings.model_copy(update={"network": settings.network.model_copy(update={"shared": True})})
    with pytest.raises(ConfigError, match=r"network\.shared False -> True"):
        claim_run(shared, tmp_path, 10)


def test_what_results_are_recognised_by_is_what_it_was() -> None:
    """A registration's fingerprint holds its settings by name: other names would disown every result."""
    record = {"fixed": "f", "moving": "m", "out": "o", "representation": "intensity"}
    settings = config.validate(RegisterSettings, record).model_dump(
        mode="json", exclude={"fixed", "moving", "out", *CAME_LATER}
    )
    assert json.dumps(settings, sort_keys=True) == (
        '{"candidates": 8, "device": "auto", "fixed_modality": null, "fixed_representation": null, "initial": '
        '"global", "max_memory_gib": 4.0, "model": null, '
        '"moving_modality": null, "moving_representation": null, '
        '"overwrite": false, "precision": "auto", "representation": "intensity", "rotations": 4000, '
        '"search_voxels": 32, "seed": 0, "symmetrise": "none", "threads": 0, "transform": "rigid"}'
    )


def test_the_earlier_name_of_a_setting_is_taken() -> None:
    record = {"source": "a.nii", "out": "a.zarr"}
    settings = config.validate(IngestSettings, record | {"max_memory": 2.5})
    assert settings == IngestSettings(source=Path("a.nii"), out=Path("a.zarr"), max_memory_gib=2.5)
    with pytest.raises(ConfigError, match="another name"):
        config.validate(IngestSettings, record | {"max_memory": 2.5, "max_memory_gib": 2.5})


# ---------------------------------------------------------------------- text that is no YAML, or more than that


@pytest.mark.parametrize(
    "text",
    ["sampling.patch=[1,64", "seed=2026-13-45", "seed=!!bool x", "seed=!!timestamp x", "seed=!!int x",
     "seed=" + "9" * 5000, "seed=" + "[" * 20000, "seed={[1]: 2}", "seed=\x00"],
)  # fmt: skip
def test_overrides_that_are_no_yaml_are_refused_with_the_way_to_write_them(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)^--set .*the value is not YAML.*\[32, 32, 32\]"):
        config.load(TrainSettings, write(tmp_path, PAIR), [text])


def test_a_group_without_settings_takes_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, PAIR | {"sampling": None})
    assert config.load(TrainSettings, path, ["sampling.patch=[8, 8, 8]"]).sampling.patch == (8, 8, 8)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        config.load(TrainSettings, path)


def test_lists_that_grow_without_end_are_refused_in_few_words(tmp_path: Path) -> None:
    rows = [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise("abcdefghij")]
    path = tmp_path / "c.yaml"
    path.write_text("\n".join(["a: &a [1, 1]", *rows, "seed: *j", "loss: *j"]), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        config.load(TrainSettings, path)
    assert len(str(caught.value)) < 5000
    with pytest.raises(ConfigError, match="and 99980 more"):
        config.validate(TrainSettings, PAIR | {"network": {"widths": [0] * 100_000}})


def test_keys_that_are_no_text_are_unknown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 1"):
        config.load(TrainSettings, write(tmp_path, PAIR | {1: 2}))


def test_a_default_that_is_changed_keeps_its_docstring() -> None:
    shard = config.InferSettings.model_fields["shard"]
    assert shard.default == 128
    assert "unit of writing" in str(shard.description)


def test_every_name_of_the_package_is_found_where_it_is_said_to_be() -> None:
    said = [name for names in config._PLACES.values() for name in names]
    assert sorted(said) == sorted(config.__all__)
    assert set(config.__all__) <= set(dir(config))
    for name in said:
        assert getattr(config, name) is not None
    with pytest.raises(AttributeError, match="NoSettings"):
        _ = config.NoSettings
