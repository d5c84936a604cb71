"""Precedence, clear refusals with the nearest name, and every impossibility."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sgpo_dist.cli.config_reference import configuration_page
from sgpo_dist.config import Config, build_config, dump_config, leaf_names, load_config
from sgpo_dist.errors import ConfigError

ROOT = Path(__file__).parents[2]


def yaml_file(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refused(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        build_config(tree)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_later_sources_win(tmp_path: Path) -> None:
    path = yaml_file(tmp_path / "c.yaml", "seed: 1\npreference:\n  beta: 0.2\n  total_steps: 5\n")
    environment = {"SGPO__PREFERENCE__BETA": "0.3", "SGPO__SEED": "2", "HOME": "/"}
    assert load_config(path, environment={}).preference.beta == 0.2
    assert load_config(path, environment=environment).preference.beta == 0.3
    config = load_config(path, ["preference.beta=0.4"], environment)
    assert (config.preference.beta, config.seed, config.preference.total_steps, config.preference.max_staleness) == (0.4, 2, 5, 1)


def test_no_file_gives_the_defaults() -> None:
    assert load_config(None, environment={}) == Config()


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("learner.train_batch_size=4", lambda config: config.learner.train_batch_size == 4),
        ("--preference.learning_rate=1e-5", lambda config: config.preference.learning_rate == 1e-5),
        ("stages=[sft, preference]", lambda config: config.stages == ["sft", "preference"]),
        ("model.lora.enabled=true", lambda config: config.model.lora.enabled is True),
        ("improver.filter.fence=null", lambda config: config.improver.filter.fence is None),
        ("rollout.engine_kwargs.max_num_seqs=8", lambda config: config.rollout.engine_kwargs == {"max_num_seqs": 8}),
        ("improver.reviser={orders: repair, default: tidy}", None),
        ("run_name=a=b", None),
    ],
)
def test_dotted_overrides_have_yaml_types(text: str, read: Any) -> None:
    if read is None:
        with pytest.raises(ConfigError):
            load_config(None, [text], {})
    else:
        assert read(load_config(None, [text], {}))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "is not of the form"),
        ("=3", "is not of the form"),
        ("seed.deep=3", "reaches into 'seed'"),
        ("stages=[", "not valid YAML"),
    ],
)
def test_bad_overrides_are_named(override: str, words: str, tmp_path: Path) -> None:
    path = yaml_file(tmp_path / "c.yaml", "seed: 1\n")
    with pytest.raises(ConfigError, match=words):
        load_config(path, [override], {})


@pytest.mark.parametrize(
    ("tree", "nearest"),
    [
        ({"preference": {"betta": 1}}, "preference.beta"),
        ({"preferences": {"beta": 1}}, "preference"),
        ({"learner": {"lerning_rate": 1}}, "learning_rate"),
        ({"rollout": {"policy": {"temperatur": 1}}}, "rollout.policy.temperature"),
        ({"learning_rate": 1}, "learning_rate"),
    ],
)
def test_an_unknown_key_names_the_nearest(tree: dict[str, Any], nearest: str) -> None:
    line = refused(tree)
    assert "unknown key" in line
    assert "did you mean" in line
    assert nearest in line


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"learner": {"train_batch_size": "many"}}, "learner.train_batch_size: Input should be a valid integer"),
        ({"learner": {"train_batch_size": 0}}, "learner.train_batch_size: Input should be greater than 0 (got 0)"),
        ({"preference": {"beta": -1}}, "preference.beta"),
        ({"preference": {"beta": float("nan")}}, "preference.beta"),
        ({"preference": {"loss_type": "kto"}}, "preference.loss_type"),
        ({"learner": {"train_batch_size": 3, "num_ranks": 2}}, "learner.train_batch_size (3) must be a multiple of learner.num_ranks (2)"),
        (
            {"data": {"max_prompt_tokens": 800}, "rollout": {"max_model_len": 1000, "policy": {"max_new_tokens": 300}}},
            "data.max_prompt_tokens + rollout.policy.max_new_tokens (1100) exceed rollout.max_model_len (1000)",
        ),
        ({"improver": {"reviser": "repair"}}, "needs improver.repair set to 'module:function'"),
        ({"preference": {"kept_replay": 1}}, "preference.kept_replay needs preference.collect set to 'first'"),
        ({"preference": {"kept_replay": 1, "collect": "first", "pairs": "given"}}, "and pairs that are made"),
        ({"weights": {"transport": "ipc"}}, "needs learner.gpus_per_rank above 0"),
        ({"model": {"trust_remote_code": True}}, "needs model.revision"),
        ({"stages": ["preference", "sft"]}, "in that order"),
        ({"stages": []}, "non-empty"),
        ({"stages": ["sft", "sft"]}, "without repeats"),
        ({"run_name": "../up"}, "run_name must be"),
        ({"run_name": "x" * 65}, "run_name must be"),
    ],
)
def test_the_impossible_is_refused_in_one_line(tree: dict[str, Any], words: str) -> None:
    assert words in refused(tree)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="line 2 is not valid YAML"):
        load_config(yaml_file(tmp_path / "bad.yaml", "seed: 1\n  x: [\n"))
    with pytest.raises(ConfigError, match="mapping of sections"):
        load_config(yaml_file(tmp_path / "list.yaml", "- 1\n"))
    assert load_config(yaml_file(tmp_path / "empty.yaml", ""), environment={}) == Config()


def test_a_config_is_frozen_and_dumps_to_itself(tmp_path: Path) -> None:
    config = build_config({"preference": {"beta": 0.05}, "rollout": {"engine_kwargs": {"a": [1, 2]}}})
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    assert load_config(yaml_file(tmp_path / "dump.yaml", dump_config(config)), environment={}) == config


def test_capacity_is_derived() -> None:
    config = build_config({"preference": {"max_staleness": 2}, "learner": {"train_batch_size": 4}, "weights": {"weight_sync_interval": 5}})
    assert config.capacity == 60  # (2 + 1) * 4 * 5


def test_every_key_says_what_it_is() -> None:
    undescribed = [line for line in configuration_page().splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert undescribed == []


def test_the_configuration_page_is_current() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == configuration_page(), "run: python -m sgpo_dist config-reference --write docs/configuration.md"
    missing = [name for name in leaf_names(Config) if f"`{name}`" not in page]
    assert missing == []


def test_the_bare_word_off_means_off_and_not_false() -> None:
    config = load_config(None, ["logging.progress=off", "improver.gate=off"], environment={})
    assert (config.logging.progress, config.improver.gate) == ("off", "off")
    with pytest.raises(ConfigError, match=r"improver\.gate"):
        load_config(None, ["improver.gate=on"], environment={})
