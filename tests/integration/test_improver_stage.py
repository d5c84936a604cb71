"""Whole runs of the improver stage on the quality benchmark's small model: what must stop a run stops it, and what need not does not.

Lessons come from an endpoint that fails nearly every other time. The gate lets the improver pass that they made, and stops the same improver when it
reads another template: the question where the draft was, the draft where the question was. A learning rate that ruins the policy meets a brake.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench.quality import language
from bench.quality.tiny_model import make_model
from tests.fake_endpoint import DROPS, EMPTY, HANGS, JUNK, WRONG_JSON, FakeEndpoint, Fault, broken, overloaded

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
PACKAGES = ("sgpo_dist", "actors", "learner", "bench")
KEY = "sk-nobody-may-read-this-0123456789"
FAULTS = (overloaded("1"), JUNK, EMPTY, broken(503), DROPS, WRONG_JSON, HANGS)
QUESTION, DRAFT = "{{ turn.content }}", "{{ draft }}"


class Runs:
    """Runs from one source tree, on the same model, references and held-out prompts."""

    def __init__(self, place: Path) -> None:
        self.place = place
        make_model(place / "initial", seed=1)
        for name, rows in {"references": language.rows("train", 256, 1, noise=0.2), "heldout": language.rows("validation", 256)}.items():
            (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(self, name: str, *words: str, model: Path | None = None, source: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """The storm recipe's engine and deadlines, held-out answers at temperature 1, a gate that wants to be sure."""
        settings = (
            f"model.model_name_or_path={model or self.place / 'initial'}",
            f"data.path={self.place / 'references.jsonl'}",
            f"data.heldout_path={self.place / 'heldout.jsonl'}",
            "data.max_heldout=256",
            "rollout.policy.temperature=1",
            "rollout.policy.top_p=1",
            "improver.learning_rate=1e-3",
            "improver.epochs=3",
            "improver.drafts_per_row=2",
            "improver.filter.min_edit_ratio=0.005",
            "improver.filter.fence=null",
            "improver.gate=stop",
            "improver.gate_confidence=0.95",
            "eval.enabled=true",
            "eval.temperature=1",
            "eval.scorer=bench.quality.language:score",
        )
        place = [f"run_name={name}", f"output_dir={self.place}"]
        command = [sys.executable, "-m", "sgpo_dist", "train", "--config", str(ROOT / "examples/storm.yaml"), *settings, *words, *place]
        environment = {**os.environ, "PYTHONPATH": str(source), "OPENAI_API_KEY": KEY}
        return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=280, check=False)

    def gates(self, name: str) -> list[dict[str, Any]]:
        """What the gate wrote down."""
        return [event for event in map(json.loads, (self.place / name / "events.jsonl").read_text().splitlines()) if event["kind"] == "improver_gate"]

    def audit(self, name: str) -> str:
        """Its words, when it finds nothing wrong."""
        command = [sys.executable, "-m", "sgpo_dist", "audit", str(self.place / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def revise(body: dict[str, Any]) -> str:
    """What a good reviser answers: it reads question, draft and trusted answer out of the product's own prompt."""
    text = body["messages"][-1]["content"]
    question, draft, trusted = (text.partition(f"<{name}>")[2].partition(f"</{name}>")[0].strip() for name in ("conversation", "draft", "trusted"))
    revision = language.repair(draft, trusted, question) or draft
    return json.dumps({"reasoning": "Some words do not fit the question.", "revision": revision})


class Faults:
    """Four requests of ten meet a fault, any kind alike; the same numbers in every run."""

    def __init__(self) -> None:
        self.met: Counter[str] = Counter()

    def __call__(self, number: int) -> Fault | None:
        drawn = random.Random(number)
        if drawn.random() > 0.4:
            return None
        fault = drawn.choice(FAULTS)
        self.met[repr(fault)] += 1
        return fault


@pytest.fixture(scope="module")
def taught(runs: Runs) -> tuple[FakeEndpoint, Faults]:
    faults = Faults()
    with FakeEndpoint(revise, faults) as endpoint:
        settings = {"base_url": endpoint.url, "model": "good", "timeout_s": 2, "max_retries": 8, "max_concurrency": 16}
        where = [f"improver.endpoint.{key}={value}" for key, value in settings.items()]
        done = runs.train("taught", "stages=[improver]", "improver.reviser=openai", *where)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return endpoint, faults


def test_an_endpoint_that_fails_often_teaches_an_improver_that_passes_the_gate(runs: Runs, taught: tuple[FakeEndpoint, Faults]) -> None:
    endpoint, faults = taught
    assert len(faults.met) == len(FAULTS)
    assert faults.met.total() > 0.3 * len(endpoint.bodies)
    assert endpoint.most_at_once > 8
    row = next(line.split() for line in runs.audit("taught").splitlines() if line.startswith("improver "))
    drafts, revised, refused = map(int, row[1:4])
    assert drafts == revised + refused == 256
    assert revised > 200
    [gate] = runs.gates("taught")
    assert gate["passed"]
    assert gate["better"] > gate["worse"] + 0.05
    assert set(endpoint.keys) == {f"Bearer {KEY}"}
    assert [path for path in (runs.place / "taught").rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()] == []


def test_the_gate_stops_that_improver_when_question_and_draft_change_places(runs: Runs, taught: tuple[FakeEndpoint, Faults], tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    [template] = (tmp_path / "sgpo_dist" / "templates").glob("improver.*")
    text = template.read_text()
    assert text.count(QUESTION) == text.count(DRAFT) == 1
    template.write_text(text.replace(DRAFT, "{{ turns[0].content }}").replace(QUESTION, DRAFT))
    unchanged = ("stages=[improver]", "improver.reviser=repair", "improver.repair=bench.quality.language:repair", "improver.learning_rate=1e-9")
    done = runs.train("swapped", *unchanged, model=runs.place / "taught" / "model", source=tmp_path)
    assert done.returncode == 4, done.stdout[-2000:] + done.stderr[-3000:]
    assert "the improver's rewrite is better in" in done.stderr.splitlines()[-1]
    assert [gate["passed"] for gate in runs.gates("swapped")] == [False]
    runs.audit("swapped")


def test_a_brake_takes_a_ruined_policy_back_to_the_last_good_checkpoint(runs: Runs) -> None:
    ruin = ("preference.learning_rate=0.02", "preference.total_steps=20", "preference.epochs=16", "preference.brakes.action=rollback")
    done = runs.train("braked", "stages=[preference]", *ruin)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "discarded by rollback" in runs.audit("braked")
    rows = json.loads((runs.place / "braked" / "evaluation.json").read_text())["rows"]
    before, after = (next(row["figures"]["score"] for row in rows if row["model"] == model) for model in ("initial", "preference"))
    assert abs(after - before) < 0.05
