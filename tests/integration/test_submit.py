"""``ray job submit`` as a user types it, against a local ``ray start --head`` with token authentication on.

Everything of the cluster lies in a directory of its own with ports of its own, so that other Ray clusters of this machine are left alone.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.integration, pytest.mark.timeout(560)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token"} | extra


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    token = secrets.token_hex(32)
    place = Path("/tmp") / f"sgpo-{secrets.token_hex(3)}"  # short: Ray's socket paths have a limit
    gcs, dashboard = free_port(), free_port()
    env = environment(RAY_AUTH_TOKEN=token)
    start = [str(BIN / "ray"), "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={place}"]
    start += ["--num-cpus=2", f"--object-store-memory={512 * 2**20}", "--disable-usage-stats", f"--dashboard-agent-listen-port={free_port()}"]
    out = (tmp_path_factory.mktemp("cluster") / "ray.log").open("w")
    head = subprocess.Popen(start, env=env, stdout=out, stderr=out)
    try:
        yield env | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        head.terminate()
        head.wait(timeout=60)
        out.close()


def wait_for(env: dict[str, str]) -> None:
    """The job server answers a client that has the token."""
    for _ in range(60):
        listed = subprocess.run([str(BIN / "ray"), "job", "list"], env=env, capture_output=True, timeout=60, check=False)
        if listed.returncode == 0:
            return
    raise AssertionError(listed.stderr.decode()[-2000:])


def test_a_submitted_job_trains_to_the_end_and_a_stranger_is_refused(cluster: dict[str, str], tmp_path: Path) -> None:
    wait_for(cluster)
    stranger = {**cluster, "RAY_AUTH_TOKEN": "0" * 64}
    refused = subprocess.run([str(BIN / "ray"), "job", "list"], env=stranger, capture_output=True, timeout=60, check=False)
    assert refused.returncode != 0

    train = ["python", "-m", "sgpo_dist", "train", "--config", "examples/smoke.yaml", "preference.total_steps=1", f"output_dir={tmp_path}"]
    submit = [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", *train]
    done = subprocess.run(submit, cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["version"] for event in events if event["kind"] == "version_published"] == [0, 1]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
