"""How long a run is without each of its parts: one of each is killed by SIGKILL, and the time to recover is held against a target."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import ROOT, Runs, make_inputs

KINDS = ["kill-worker", "kill-engine", "kill-buffer", "kill-learner", "kill-driver"]
WORKER_SHARE, LEARNER_SHARE, BUFFER_S = 1.3, 2.0, 3.0
"""Targets: of the first engine's start; of the learner's cold start; from the kill to the next outcome."""
WORDS = [
    "preference.total_steps=10000",  # more than there is time for
    "preference.epochs=400",
    "preference.max_staleness=2",
    "learner.train_batch_size=4",
    "rollout.concurrency=8",
    "checkpoint.save_steps=50",
]
pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.fault(1, 4, 6, 9, 11, invariants="I1 I2 I3 I4 I6 I7 I8")
def test_each_part_is_back_in_time(tmp_path: Path, record_property) -> None:
    inputs = make_inputs(tmp_path, rows=200)
    options = ["--seed", "5", "--minutes", "8", "--every", "3", "--count", "5", "--patience", "240", "--faults", ",".join(KINDS)]
    command = [sys.executable, "-m", "sgpo_dist", "chaos", *inputs, *WORDS, "run_name=kills", f"output_dir={tmp_path}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:] + (tmp_path / "kills.chaos.log").read_text()[-3000:]
    facts = json.loads((tmp_path / "kills" / "chaos.json").read_text())
    took = {fault["kind"]: fault["recovery_s"] for fault in facts["faults"]}
    print(took)
    for row, kind in ((1, "kill-worker"), (4, "kill-engine"), (6, "kill-learner"), (9, "kill-buffer"), (11, "kill-driver")):
        record_property(f"recovery_s:{row}", took[kind])
    events = Runs(tmp_path / "kills", []).lines("events.jsonl")
    first_engine_s = next(event["seconds"] for event in events if event["kind"] == "worker_started")
    cold_s = sum(next(float(str(event["seconds"])) for event in events if event["kind"] == kind) for kind in ("learner_started", "learner_ready"))
    print(f"first engine {first_engine_s} s, learner's cold start {cold_s:.1f} s")
    assert max(took["kill-worker"], took["kill-engine"]) <= WORKER_SHARE * first_engine_s
    assert took["kill-buffer"] < BUFFER_S
    assert took["kill-learner"] < LEARNER_SHARE * cold_s
