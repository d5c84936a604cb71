"""cluster.yaml is what Ray's cluster launcher takes, in the form it has and in the cloud form of its comments."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
CLUSTER_YAML = ROOT / "cluster.yaml"


def launcher_config() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER_YAML.read_text())


def cloud_config() -> dict[str, Any]:
    """The file with what its last comment says to replace."""
    _, _, comment = CLUSTER_YAML.read_text().partition("# In a cloud,")
    block = comment[comment.index("# provider:") :]
    return launcher_config() | yaml.safe_load("\n".join(line.removeprefix("# ") for line in block.splitlines()))


@pytest.mark.parametrize("config", [launcher_config(), cloud_config()], ids=["own machines", "cloud"])
def test_ray_takes_the_config(config: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert prepared["setup_commands"] == ["cd ~/sgpo_dist && make setup"]


def test_ray_refuses_an_unknown_key() -> None:
    with pytest.raises(ValidationError):
        validate_config(prepare_config(launcher_config() | {"rollout_workers": 4}))


def test_cloud_form_keeps_the_learner_off_spot_machines() -> None:
    types = cloud_config()["available_node_types"]
    assert types["head"]["resources"]["GPU"] == 0
    assert "InstanceMarketOptions" not in types["learner"]["node_config"]
    assert types["rollout"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_every_node_starts_ray_with_the_token() -> None:
    config = launcher_config()
    starts = [line for key in ("head_start_ray_commands", "worker_start_ray_commands") for line in config[key] if "ray start" in line]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in line for line in starts)


def test_uploads_leave_the_environment_and_the_runs_out() -> None:
    ignored = (ROOT / ".rayignore").read_text().split()
    assert {"/.venv/", "/.git/", "/runs/"} <= set(ignored)
    assert not any(part in line for line in ignored for part in ("sgpo_dist", "actors", "learner", "examples", "pyproject"))
