"""Nodes that die, drain, come and go, run out of memory, and a head that is lost: several raylets on this machine, scripted engines.

What the fleet does is told in ``node_stories``; here is what must have come of it. Times are from the fault, in seconds.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_run import Runs, all_gone, make_inputs

from bench.machine import free_port
from sgpo_dist.buffer.audit import audit_run

ROOT = Path(__file__).parents[2]
Story = Callable[[str], dict[str, Any]]
Record = Callable[[str, float], None]
STORIES = Path(__file__).with_name("node_stories.py")
pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(150)]


@pytest.fixture
def tell(tmp_path: Path) -> Story:
    """A story by its name: what was seen."""

    def told(name: str) -> dict[str, Any]:
        environment = {**without_ray(), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(STORIES), name, str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=140, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert audit_run(tmp_path).problems == ()
        return dict(json.loads((tmp_path / "seen.json").read_text()))

    return told


def of_kind(seen: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [event for event in seen["events"] if event["kind"] == kind]


def after(seen: dict[str, Any], kind: str, number: int = 0, mark: str = "fault") -> float:
    return float(of_kind(seen, kind)[number]["at"] - seen["marks"][mark])


@pytest.mark.fault(13, invariants="I1 I6 I8 I9")
def test_a_lost_node_is_no_crash_the_others_go_on_and_a_new_node_takes_the_worker(tell: Story, record_property: Record) -> None:
    seen = tell("a_node_is_lost")
    [lost] = of_kind(seen, "worker_lost")
    assert lost["node"] == seen["lost"]
    assert lost["reason"] in ("its node cannot be reached", "its node died")
    assert seen["crashes"] == 0  # with a budget of none
    nodes = [event["node"] for event in of_kind(seen, "worker_started")]
    assert len(set(nodes)) == 3
    record_property("recovery_s", after(seen, "worker_lost"))
    assert after(seen, "worker_lost") < 10.0
    assert after(seen, "worker_started", 2, "room") < 10.0
    assert seen["leased"] == 0


@pytest.mark.fault(14, invariants="I1 I6 I8")
def test_a_worker_leaves_a_draining_node_before_its_deadline_and_spends_nothing(tell: Story, record_property: Record) -> None:
    seen = tell("a_node_is_drained")
    [leaves] = of_kind(seen, "worker_leaves")
    assert leaves["node"] == seen["going"]
    assert 8.0 < leaves["seconds_left"] <= 12.0
    assert [event["node"] for event in of_kind(seen, "worker_started")] == [seen["going"], seen["other"]]
    assert of_kind(seen, "worker_lost") == []
    assert seen["crashes"] == 0
    record_property("recovery_s", after(seen, "worker_started", 1))
    assert after(seen, "worker_leaves") < 2.0
    assert seen["early"] > 2.0
    assert seen["leased"] == 0


@pytest.mark.fault(16, invariants="I1 I3 I8")
def test_throughput_follows_nodes_that_come_and_go(tell: Story, record_property: Record) -> None:
    seen = tell("nodes_come_and_go")
    record_property("recovery_s", after(seen, "worker_started", 1))
    assert seen["waiting"] == 1  # the second one had no place yet
    assert 1.6 < seen["two"] / seen["one"] < 2.4
    assert 0.7 < seen["again"] / seen["one"] < 1.4
    assert [event["node"] for event in of_kind(seen, "worker_lost")] == [seen["second"]]  # nobody else was restarted
    assert seen["crashes"] == 0


@pytest.mark.fault(22, invariants="I1 I8 I9")
def test_a_worker_that_is_killed_for_memory_is_a_crash_whose_event_names_the_settings(tell: Story, record_property: Record) -> None:
    seen = tell("memory_runs_out")
    [lost] = of_kind(seen, "worker_lost")
    assert lost["reason"].startswith("killed because its node ran out of memory; lower rollout.kv_cache_gib")
    record_property("recovery_s", of_kind(seen, "worker_started")[1]["at"] - lost["at"])
    assert seen["crashes"] == 1


@pytest.mark.fault(15, invariants="I9")
def test_a_lost_head_is_said_in_one_line_before_ray_ends_the_process(tell: Story) -> None:
    seen = tell("the_head_is_lost")
    assert seen["said"].startswith("the Ray cluster's head (GCS) has not answered for 25 s; start the cluster again")
    assert "\n" not in seen["said"]
    print(seen["marks"], seen["blocked"])
    assert 25.0 <= seen["marks"]["said"] - seen["marks"]["fault"] < 35.0
    assert seen["marks"]["fleet stopped"] - seen["marks"]["said"] < 5.0


# ---- a whole run whose cluster goes away -----------------------------------------------------------------------------------------------


@dataclass
class Head:
    """A Ray head of our own: its own port, its own directory, no dashboard."""

    log: Path
    port: int = 0

    def __enter__(self) -> Head:
        self.port = free_port()
        self.place = Path("/tmp") / f"sgpo-{secrets.token_hex(3)}"  # short: Ray's socket paths have a limit
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={self.port}", f"--temp-dir={self.place}"]
        command += ["--num-cpus=2", f"--object-store-memory={256 << 20}", "--include-dashboard=false", "--disable-usage-stats"]
        with self.log.open("w") as sink:
            self.process = subprocess.Popen(command, env=without_ray(), stdout=sink, stderr=sink)
        deadline = time.monotonic() + 60
        while "runtime started" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)
        return self

    def family(self) -> list[psutil.Process]:
        return [self.process_info(), *self.process_info().children(recursive=True)]

    def process_info(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    def kill(self) -> list[psutil.Process]:
        """What a power cut leaves of the head's services; its other processes are returned."""
        family = self.family()
        for process in [one for one in family if one.pid == self.process.pid or one.name() in ("gcs_server", "raylet")]:
            process.kill()
        self.process.wait(timeout=30)
        return family

    def __exit__(self, *problem: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=60)
        shutil.rmtree(self.place, ignore_errors=True)


def without_ray() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"RAY_AUTH_MODE": "disabled"}


@pytest.mark.fault(15, invariants="I1 I2 I4 I6 I7 I8 I9")
@pytest.mark.timeout(400)
def test_a_run_whose_head_is_lost_ends_with_a_line_and_resumes_on_a_new_cluster(tmp_path: Path) -> None:
    words = ["preference.total_steps=60", "preference.epochs=50", "learner.train_batch_size=4", "rollout.concurrency=8", "checkpoint.save_steps=5"]
    runs = Runs(tmp_path / "head", [*make_inputs(tmp_path, rows=40), *words])
    with Head(tmp_path / "ray.log") as head:
        driver = runs.start(RAY_ADDRESS=f"127.0.0.1:{head.port}", RAY_AUTH_MODE="disabled")
        runs.until(driver, lambda: runs.steps() >= 7)
        family = head.kill()
        killed = time.monotonic()
        code = driver.wait(timeout=90)
        print(f"ended with {code} after {time.monotonic() - killed:.1f} s")
        assert code == 3, runs.last_words()
        assert time.monotonic() - killed < 60
        assert runs.output.read_text().count("the Ray cluster's head (GCS) has not answered for 25 s") == 1
        assert "Traceback" not in runs.output.read_text()
        assert all_gone(family) == []
    with Head(tmp_path / "ray2.log") as head:
        driver = runs.start(RAY_ADDRESS=f"127.0.0.1:{head.port}", RAY_AUTH_MODE="disabled")
        assert driver.wait(timeout=240) == 0, runs.last_words()
    assert runs.steps() == 60
    assert "resuming from" in runs.output.read_text()
    runs.audit()
