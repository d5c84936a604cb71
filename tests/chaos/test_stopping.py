"""Stops of every kind on real runs: each ends with exit code 5 in time, leaves a whole checkpoint and no process, and is resumed.

The model is the quality benchmark's, hardly taught, so that a step takes a fraction of a second and most of the time goes to starting.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from bench.machine import free_port
from bench.quality import language
from bench.quality.tiny_model import TinyModel, make_model
from sgpo_dist.checkpoint import Checkpoint, CheckpointStore
from sgpo_dist.run_directory import open_run

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_S, STOP_S, AT_ONCE_S = 200.0, 60.0, 15.0
"""Seconds for a start; from a request to the exit; from a second signal to the exit. Two busy cores."""
SMALLEST = TinyModel(rows=64, batch_size=16, epochs=1, num_layers=1)
DRAFTS, SFT_ROWS, SFT_STEPS, STEPS = 400, 64, 32, 24
SETTINGS = [
    "run_name=r",
    "model.dtype=float32",
    "data.max_prompt_tokens=96",
    "sft.train_batch_size=2",
    f"sft.max_rows={SFT_ROWS}",
    "improver.reviser=repair",
    "improver.repair=bench.quality.language:repair",
    "improver.train_batch_size=64",
    "improver.gate=off",
    "improver.filter.fence=null",
    f"preference.total_steps={STEPS}",
    "preference.max_staleness=0",
    "preference.pair_gate.require_eos=false",
    "preference.brakes.action=off",
    "rollout.max_model_len=128",
    "rollout.concurrency=1",
    "rollout.kv_cache_gib=0.25",
    "rollout.policy.max_new_tokens=12",
    "rollout.improver.max_new_tokens=12",
    "learner.train_batch_size=2",
    "checkpoint.save_steps=1000",  # so that every checkpoint inside a stage is a stop's
    "cluster.min_free_disk_gib=0.5",
    "eval.enabled=false",
    "logging.progress=plain",
    "logging.report_to=[]",
]
pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("inputs")
    make_model(place / "model", shape=SMALLEST)
    write_rows(place / "rows.jsonl", language.rows("train", SFT_ROWS + DRAFTS))
    write_rows(place / "prompts.jsonl", language.bare_rows(8 * STEPS))
    (place / "run.yaml").write_text("stages: [sft, improver, preference]\n")
    model = f"model.model_name_or_path={place / 'model'}"
    data = [f"data.path={place / 'rows.jsonl'}", f"data.prompts_path={place / 'prompts.jsonl'}"]
    return ["--config", str(place / "run.yaml"), model, *data, *SETTINGS]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"PATH": f"{BIN}:{os.environ['PATH']}"} | extra


# ---- a run from outside ---------------------------------------------------------------------------------------------------------------


@dataclass
class Attempts:
    """Drivers of one run, one after the other, each in a process group of its own."""

    run: Path
    words: list[str]

    def start(self, *overrides: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "sgpo_dist", "train", *self.words, f"output_dir={self.run.parent}", *overrides]
        with self.output.open("ab") as sink:
            return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=sink, stderr=sink, start_new_session=True)

    @property
    def output(self) -> Path:
        return self.run.parent / "output.txt"

    def steps(self, stage: str) -> int:
        path = self.run / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return max((row["step"] for row in rows if row["stage"] == stage), default=0)

    def events(self, kind: str) -> list[dict[str, object]]:
        path = self.run / "events.jsonl"
        return [event for event in map(json.loads, path.read_text().splitlines()) if event["kind"] == kind] if path.exists() else []

    def pairs(self, stage: str) -> dict[str, tuple[str, str]]:
        """Response and refinement by uid."""
        if not (self.run / "buffer.db").exists():
            return {}
        with sqlite3.connect(f"file:{self.run / 'buffer.db'}?mode=ro", uri=True) as database:
            rows = database.execute(
                "SELECT uid, response_text, refinement_text FROM pairs JOIN orders USING (uid) WHERE stage = ?", (stage,)
            ).fetchall()
        return {uid: (response, refinement) for uid, response, refinement in rows}

    def until(self, driver: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not ready():
            assert driver.poll() is None, self.output.read_text()[-3000:]
            assert time.monotonic() < deadline, self.output.read_text()[-3000:]
            time.sleep(0.1)

    def stop(self, driver: subprocess.Popen[bytes], ask: Callable[[], object], what: str, within: float = STOP_S, code: int = 5) -> None:
        """Ask, then the driver ends in time, with its exit code, and nothing of it is left."""
        family = psutil.Process(driver.pid).children(recursive=True)
        began = time.monotonic()
        ask()
        assert driver.wait(timeout=within) == code, self.output.read_text()[-3000:]
        print(f"{what}: {time.monotonic() - began:.1f} s from the request to the exit")
        _, left = psutil.wait_procs(family, timeout=20)
        assert left == []

    def checkpoint(self) -> Checkpoint | None:
        return CheckpointStore(self.run / "checkpoints", run_id=open_run(self.run).run_id).latest()

    def detail(self) -> object:
        return self.events("attempt_ended")[-1]["detail"]


def sgpo_dist(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sgpo_dist", *words]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False)


def at(checkpoint: Checkpoint | None) -> tuple[object, object]:
    assert checkpoint is not None
    return checkpoint.facts["stage"], checkpoint.facts["step"]


# ---- the tests ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.fault(11, invariants="I1 I2 I6 I7 I9")
def test_one_run_is_stopped_in_every_way_and_resumed_each_time(inputs: list[str], tmp_path: Path) -> None:
    runs = Attempts(tmp_path / "r", inputs)

    driver = runs.start("time_limit_s=6")  # in the middle of the engines' start
    runs.until(driver, lambda: bool(runs.events("data")))
    runs.stop(driver, lambda: None, "time_limit_s of 6 s, while it starts")
    assert runs.checkpoint() is None
    assert runs.detail() == "stopped by time_limit_s while it started; run the same command to go on"

    driver = runs.start()
    runs.until(driver, lambda: runs.steps("sft") >= 2)
    runs.stop(driver, lambda: os.killpg(driver.pid, signal.SIGINT), "Ctrl-C in sft")
    stage, step = at(runs.checkpoint())
    assert (stage, step) == ("sft", runs.steps("sft"))
    assert 2 <= runs.steps("sft") < SFT_STEPS

    driver = runs.start()
    runs.until(driver, lambda: len(runs.pairs("improver")) >= 5)
    runs.stop(driver, driver.terminate, "SIGTERM while drafting")
    assert at(runs.checkpoint()) == ("improver", 0)
    drafted = runs.pairs("improver")
    assert 5 <= len(drafted) < DRAFTS // 2

    driver = runs.start()
    runs.until(driver, lambda: runs.steps("preference") >= 2)
    assert drafted.items() <= runs.pairs("improver").items()  # not one was made again
    said: list[str] = []
    runs.stop(driver, lambda: said.append(sgpo_dist("stop", str(runs.run)).stdout), "sgpo-dist stop in preference")
    step = runs.steps("preference")
    assert at(runs.checkpoint()) == ("preference", step)
    lines = said[0].splitlines()
    assert lines[0] == f"asked the driver (pid {driver.pid}) of run 'r' to stop"
    assert lines[1].startswith(f"stopped by sgpo-dist stop after step {step} of stage preference; run the same command to go on; checkpoint: step-")
    assert (lambda again: (again.returncode, "no driver works on run 'r'" in again.stderr))(sgpo_dist("stop", str(runs.run))) == (2, True)

    driver = runs.start()
    runs.until(driver, lambda: runs.steps("preference") >= step + 2)
    saved = at(runs.checkpoint())
    driver.terminate()
    time.sleep(1.2)  # sooner, it would count as the same one
    runs.stop(driver, driver.terminate, "a second SIGTERM", AT_ONCE_S, code=130 if driver.poll() is None else 5)
    assert at(runs.checkpoint())[0] == saved[0]

    driver = runs.start()
    assert driver.wait(timeout=START_S) == 0, runs.output.read_text()[-3000:]
    assert runs.steps("preference") == STEPS
    assert (runs.run / "model" / "model.safetensors").is_file()
    audited = sgpo_dist("audit", str(runs.run))
    assert audited.returncode == 0, audited.stdout + audited.stderr


# ---- ray job stop ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Cluster:
    """A local ``ray start --head`` with a directory and ports of its own."""

    head: int
    env: dict[str, str]

    def job(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(BIN / "ray"), "job", *words], cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=300, check=False)

    def parts(self) -> list[str]:
        """Titles of all processes of a run on this cluster."""
        found = []
        for process in psutil.Process(self.head).children(recursive=True):
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if any(word in title for word in ("RolloutActor", "RankHost", "PairBuffer", "VLLM::", "sgpo_dist train")):
                found.append(title)
        return found


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    place = Path("/tmp") / f"sgpo-{secrets.token_hex(3)}"  # short: Ray's socket paths have a limit
    dashboard = free_port()
    env = environment(RAY_API_SERVER_ADDRESS=f"http://127.0.0.1:{dashboard}", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    start = [str(BIN / "ray"), "start", "--head", "--block", f"--port={free_port()}", f"--dashboard-port={dashboard}", f"--temp-dir={place}"]
    start += ["--num-cpus=2", f"--object-store-memory={512 * 2**20}", "--disable-usage-stats", f"--dashboard-agent-listen-port={free_port()}"]
    with (tmp_path / "ray.log").open("w") as out:
        head = subprocess.Popen(start, env=env, stdout=out, stderr=out)
        found = Cluster(head.pid, env)
        try:
            while found.job("list").returncode != 0:
                assert head.poll() is None, (tmp_path / "ray.log").read_text()[-2000:]
            yield found
        finally:
            head.terminate()
            head.wait(timeout=60)


def submitted(cluster: Cluster, job: str, words: list[str], run: Path, wait_s: int) -> None:
    grace = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(wait_s)}})
    train = ["python", "-m", "sgpo_dist", "train", *words, f"output_dir={run.parent}"]
    done = cluster.job("submit", "--no-wait", "--submission-id", job, "--runtime-env-json", grace, "--working-dir", ".", "--", *train)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.fault(12, invariants="I7")
def test_ray_job_stop_leaves_a_checkpoint_and_nothing_else(cluster: Cluster, inputs: list[str], tmp_path: Path) -> None:
    runs = Attempts(tmp_path / "r", [*inputs, "stages=[preference]"])
    submitted(cluster, "first", runs.words, runs.run, wait_s=60)
    wait(lambda: runs.steps("preference") >= 2, START_S)
    assert len(cluster.parts()) >= 4  # driver, buffer, learner, worker
    began = time.monotonic()
    stopped = cluster.job("stop", "first")
    assert "was stopped" in stopped.stdout, stopped.stdout + stopped.stderr
    print(f"ray job stop: {time.monotonic() - began:.1f} s from the command to its return")
    step = runs.steps("preference")
    assert at(runs.checkpoint()) == ("preference", step)
    assert runs.detail() == f"stopped by SIGTERM after step {step} of stage preference; run the same command to go on"
    wait(lambda: not cluster.parts(), 20)

    submitted(cluster, "second", runs.words, runs.run, wait_s=60)
    wait(lambda: "Job 'second' succeeded" in cluster.job("status", "second").stdout, START_S)
    assert runs.steps("preference") == STEPS
    assert len(runs.events("attempt")) == 2
    wait(lambda: not cluster.parts(), 20)


def wait(ready: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.2)
