"""Chaos on a real run: six kinds of fault, one of each, on real Ray, vLLM, DeepSpeed and SQLite; the audit is clean, nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KINDS = ["kill-worker", "kill-engine", "kill-buffer", "kill-learner", "kill-driver", "second-driver"]
SETTINGS = [
    "run_name=storm",
    "preference.total_steps=400",  # more than there is time for
    "preference.epochs=100",
    "data.max_prompts=24",
]
pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(900)]


def sgpo_dist(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sgpo_dist", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=880, check=False)


@pytest.mark.fault(1, 4, 6, 9, 11, 26, 30, invariants="I1 I2 I3 I4 I6 I7 I8")
def test_a_run_gets_over_one_fault_of_each_kind(tmp_path: Path) -> None:
    options = ["--seed", "11", "--minutes", "8", "--every", "2", "--count", "6", "--patience", "240", "--faults", ",".join(KINDS)]
    done = sgpo_dist("chaos", "--config", "examples/smoke.yaml", *options, *SETTINGS, f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:] + (tmp_path / "storm.chaos.log").read_text()[-3000:]
    assert f"--seed 11 --minutes 8 --every 2 --faults {','.join(KINDS)} --count 6" in done.stdout
    facts = json.loads((tmp_path / "storm" / "chaos.json").read_text())
    assert (facts["problems"], facts["leftovers"], facts["is_audited"]) == ([], [], True)
    became = {fault["kind"]: fault["what"] for fault in facts["faults"]}
    assert became == {
        "kill-worker": "worker replaced",
        "kill-engine": "worker replaced",
        "kill-buffer": "buffer back on its file",
        "kill-learner": "learner rebuilt",
        "kill-driver": "driver resumed",
        "second-driver": "refused",
    }
    assert facts["drivers"] == 2
    assert facts["pairs_trained"] > 0
    assert 0.0 < facts["ettr"] < 1.0
    assert sgpo_dist("audit", str(tmp_path / "storm")).returncode == 0
