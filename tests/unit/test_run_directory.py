"""One driver a run, one configuration a run, and nothing of a stranger is touched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sgpo_dist.config import Config, build_config
from sgpo_dist.errors import ConfigError, RunFailed
from sgpo_dist.run_directory import RunDirectory, differing_keys, driver_of, find_run, open_run


def config(root: Path, **tree: object) -> Config:
    return build_config({"output_dir": str(root), "run_name": "r", **tree})


def visit(settings: Config, resume: str = "auto") -> RunDirectory:
    with RunDirectory.claim(settings, resume) as directory:
        return directory


def test_a_new_run_gets_its_layout_and_keeps_its_id(tmp_path: Path) -> None:
    first = visit(config(tmp_path))
    second = visit(config(tmp_path))
    assert (first.incarnation, second.incarnation) == (1, 2)
    assert first.run_id == second.run_id
    assert {"config.resolved.yaml", "run.json", "run.lock", "checkpoints", "logs", "tensorboard"} <= {
        item.name for item in first.path.iterdir()
    }
    assert second.log_file("learner", 1) == tmp_path / "r" / "logs" / "learner-1.2.log"


def test_two_runs_have_two_ids(tmp_path: Path) -> None:
    assert visit(config(tmp_path)).run_id != visit(config(tmp_path, run_name="other")).run_id


@pytest.mark.fault(26, invariants="I2 I9")
def test_a_second_driver_is_refused_and_named(tmp_path: Path) -> None:
    with RunDirectory.claim(config(tmp_path)) as directory:
        assert driver_of(directory) == os.getpid()
        script = (
            "from sgpo_dist.config import build_config; from sgpo_dist.run_directory import RunDirectory; import sys\n"
            "with RunDirectory.claim(build_config({'output_dir': sys.argv[1], 'run_name': 'r'})): pass"
        )
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", script, str(tmp_path)]
        second = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30, check=False)
        assert f"another driver (pid {os.getpid()}) works on this run" in second.stderr
    assert driver_of(directory) is None
    assert visit(config(tmp_path)).incarnation == 2


def test_another_configuration_is_refused_with_its_keys(tmp_path: Path) -> None:
    visit(config(tmp_path))
    changed = config(tmp_path, seed=1, preference={"beta": 0.2, "nll_coef": 0.1}, sft={"epochs": 2}, logging={"level": "DEBUG"})
    with pytest.raises(ConfigError, match=r"seed, sft\.epochs, preference\.beta and 1 more differ.*run_name="):
        visit(changed)


def test_what_does_not_change_the_training_may_differ(tmp_path: Path) -> None:
    visit(config(tmp_path))
    free = config(
        tmp_path, logging={"progress": "off"}, checkpoint={"keep_last": 5}, cluster={"num_cpus": 2}, rollout={"num_rollout_workers": 2},
        learner={"num_ranks": 2, "zero_stage": 3, "gpus_per_rank": 1},
    )
    assert visit(free).incarnation == 2


def test_total_steps_may_grow_but_not_shrink(tmp_path: Path) -> None:
    for steps in (10, 20):
        visit(config(tmp_path, preference={"total_steps": steps}))
    with pytest.raises(ConfigError, match=r"asked for 20 before.*preference\.total_steps=20"):
        visit(config(tmp_path, preference={"total_steps": 15}))


def test_the_resolved_configuration_is_written_once_with_secrets_hidden(tmp_path: Path) -> None:
    directory = visit(config(tmp_path, rollout={"engine_kwargs": {"hf_token": "s3cr3t"}}))
    text = directory.config_file.read_text()
    assert "s3cr3t" not in text
    assert yaml.safe_load(text)["rollout"]["engine_kwargs"] == {"hf_token": "[hidden]"}
    visit(config(tmp_path, rollout={"engine_kwargs": {"hf_token": "another"}}, logging={"level": "DEBUG"}))
    assert directory.config_file.read_text() == text


def test_resume_never_refuses_a_known_run_and_deletes_nothing(tmp_path: Path) -> None:
    visit(config(tmp_path), "never")
    with pytest.raises(ConfigError, match="already holds a run"):
        visit(config(tmp_path), "never")
    assert open_run(tmp_path / "r").incarnation == 1


def test_a_strangers_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not a run directory"):
        visit(config(tmp_path))
    assert [item.name for item in (tmp_path / "r").iterdir()] == ["thesis.txt"]


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    assert visit(config(tmp_path)).incarnation == 1


def test_finished_until_more_is_asked_for(tmp_path: Path) -> None:
    with RunDirectory.claim(config(tmp_path, preference={"total_steps": 10})) as directory:
        assert not directory.finished
        assert directory.mark_finished().finished
    assert open_run(tmp_path / "r").finished
    assert visit(config(tmp_path, preference={"total_steps": 10})).finished
    assert not visit(config(tmp_path, preference={"total_steps": 11})).finished


def test_find_run_by_name_and_path_and_says_what_is_there(tmp_path: Path) -> None:
    directory = visit(config(tmp_path))
    assert find_run("r", tmp_path).run_id == directory.run_id
    assert find_run(str(tmp_path / "r")).run_id == directory.run_id
    with pytest.raises(ConfigError, match="known runs: r"):
        find_run("q", tmp_path)
    with pytest.raises(ConfigError, match="no run"):
        find_run("../r", tmp_path)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    visit(config(tmp_path))
    (tmp_path / "r" / "run.json").write_text("{")
    with pytest.raises(RunFailed, match=r"run\.json is damaged"):
        visit(config(tmp_path))


def test_differing_keys_opens_sections() -> None:
    old = {"a": {"b": 1, "c": {"d": 2}}, "gone": 1, "same": [1]}
    new = {"a": {"b": 1, "c": {"d": 3}}, "same": [1], "fresh": None}
    assert differing_keys(old, new) == ["a.c.d", "fresh", "gone"]
