"""The main job as a user runs it: the command line, real Ray, vLLM, DeepSpeed and SQLite, a real model.

One uninterrupted synchronous fp32 run is the yardstick. It goes through ``ray job submit`` as a user types it, to a local
``ray start --head`` with token authentication on; its pairs are walked, its ledger audited, its model loaded. A second run, on a Ray of its own,
is killed between two steps, resumed by the same command, and has to end in the very same weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.machine import free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]


def options(name: str, output: Path) -> list[str]:
    return ["--config", "examples/smoke.yaml", "preference.total_steps=3", f"run_name={name}", f"output_dir={output}"]


def command(name: str, output: Path) -> list[str]:
    return [sys.executable, "-m", "sgpo_dist", "train", *options(name, output)]


def weights_sha256(run: Path) -> str:
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


def steps_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def events(run: Path, kind: str) -> list[dict[str, object]]:
    return [event for event in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if event["kind"] == kind]


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A head with token authentication; gives the environment of its clients. Directory and ports are its own: other clusters are left alone."""
    place = Path("/tmp") / f"sgpo-{secrets.token_hex(3)}"  # short: Ray's socket paths have a limit
    dashboard = free_port()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env = kept | {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    start = [str(BIN / "ray"), "start", "--head", "--block", f"--port={free_port()}", f"--dashboard-port={dashboard}", f"--temp-dir={place}"]
    start += ["--num-cpus=2", f"--object-store-memory={512 * 2**20}", "--disable-usage-stats", f"--dashboard-agent-listen-port={free_port()}"]
    with (folder / "ray.log").open("w") as out:
        head = subprocess.Popen(start, env=env, stdout=out, stderr=out)
        try:
            client = env | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
            wait_for_jobs(client)
            yield client
        finally:
            head.terminate()
            head.wait(timeout=60)


def jobs(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(BIN / "ray"), "job", "list"], env=env, capture_output=True, text=True, timeout=60, check=False)


def wait_for_jobs(env: dict[str, str]) -> None:
    """Until the job server answers a client that has the token."""
    for _ in range(60):
        listed = jobs(env)
        if listed.returncode == 0:
            return
    raise AssertionError(listed.stderr[-2000:])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    submit = [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", "python", "-m", "sgpo_dist", "train", *options("whole", output)]
    with cluster(output) as client:
        assert jobs(client | {"RAY_AUTH_TOKEN": "0" * 64}).returncode != 0  # a stranger is refused
        done = subprocess.run(submit, cwd=ROOT, env=client, capture_output=True, text=True, timeout=1000, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return output / "whole"


def test_one_pairs_walk(uninterrupted: Path) -> None:
    """From lease to trained: its prompt, both halves with their ids and version, the batch it was recorded in, the version that batch made."""
    database = sqlite3.connect(f"file:{uninterrupted / 'buffer.db'}?mode=ro", uri=True)
    states = dict(database.execute("SELECT state, COUNT(*) FROM orders GROUP BY state").fetchall())
    assert states["trained"] == 6  # 3 steps of 2 pairs
    trained = database.execute("SELECT step, uid FROM orders WHERE state = 'trained' ORDER BY step, position").fetchall()
    assert [step for step, _ in trained] == [1, 1, 2, 2, 3, 3]
    published = events(uninterrupted, "version_published")
    assert [event["version"] for event in published] == [0, 1, 2, 3]
    assert all(event["probe_gap"] < 2e-3 for event in published), published
    assert len({event["checksum"] for event in published}) == 4  # every step moved the weights
    metrics = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert [row["staleness"] for row in metrics] == [0, 0, 0]
    assert metrics[0]["loss"] == pytest.approx(0.693147, abs=1e-5)  # policy == reference at step 1: -log sigmoid(0)


def audit(run: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "sgpo_dist", "audit", str(run)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_audit_accepts_the_run_and_catches_a_changed_row(uninterrupted: Path, tmp_path: Path) -> None:
    done = audit(uninterrupted)
    assert done.returncode == 0, done.stdout + done.stderr
    copy = shutil.copytree(uninterrupted, tmp_path / "copy")
    with sqlite3.connect(copy / "buffer.db") as database:
        database.execute("UPDATE orders SET step = 1 WHERE state = 'trained' AND step = 2")
    assert audit(copy).returncode == 4


def test_a_finished_run_says_so_and_does_nothing(uninterrupted: Path) -> None:
    before = (uninterrupted / "events.jsonl").read_bytes()
    done = subprocess.run(command("whole", uninterrupted.parent), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "finished" in done.stdout
    assert (uninterrupted / "events.jsonl").read_bytes() == before


def test_the_model_answers_in_plain_transformers(uninterrupted: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(uninterrupted / "model")
    model = AutoModelForCausalLM.from_pretrained(uninterrupted / "model")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


@pytest.mark.fault(11, invariants="I1 I2 I5 I6")
def test_killed_between_two_steps_and_resumed_ends_in_the_same_weights(uninterrupted: Path) -> None:
    run = uninterrupted.parent / "killed"
    with (uninterrupted.parent / "killed.out").open("w") as out:
        driver = subprocess.Popen(command("killed", run.parent), cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
        deadline = time.monotonic() + 300
        while steps_logged(run) < 2 and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait(timeout=30)
    assert steps_logged(run) == 2
    again = subprocess.run(command("killed", run.parent), cwd=ROOT, capture_output=True, text=True, timeout=1000, check=False)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert weights_sha256(run) == weights_sha256(uninterrupted)
