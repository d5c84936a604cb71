"""The run's directory is lost with its machine: the run goes on from a copy of a checkpoint and ends in the weights of the one that was not lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_run import START_S, Runs, make_inputs

STEPS, BATCH = 4, 4
pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_lost_run_goes_on_from_a_copy(tmp_path: Path) -> None:
    """Synchronous and float32. Copies of steps 2 and 4 and of the end are kept; the first is gone back to."""
    words = [
        *make_inputs(tmp_path, rows=3 * STEPS * BATCH),
        f"preference.total_steps={STEPS}",
        "preference.max_staleness=0",
        f"learner.train_batch_size={BATCH}",
        "rollout.concurrency=4",
        "checkpoint.save_steps=2",
        "checkpoint.keep_last=9",
        f"checkpoint.copy_to={tmp_path / 'far'}",
    ]
    runs = Runs(tmp_path / "runs" / "lost", words)
    runs.finish()
    copies = [event for event in runs.lines("events.jsonl") if event["kind"] == "checkpoint_copied"]
    assert [copy["problem"] for copy in copies] == [""] * len(copies)
    assert copies[0]["step"] == 2
    whole, run_id = runs.sha256(), json.loads((runs.directory / "run.json").read_text())["run_id"]
    shutil.rmtree(runs.directory)
    runs.words += ["--resume", str(tmp_path / "far" / "lost" / "checkpoints" / "step-2")]
    driver = runs.start()
    assert driver.wait(timeout=START_S) == 0, runs.last_words()
    assert runs.sha256() == whole
    assert json.loads((runs.directory / "run.json").read_text())["run_id"] == run_id
    assert [row["step"] for row in runs.lines("metrics.jsonl")] == [3, 4]
    runs.audit()
