"""A small finished run as files, made with the real ledger, recorder and checkpoint store: for tests of what reads a run."""

from __future__ import annotations

import json
from pathlib import Path

from sgpo_dist.buffer.ledger import Ledger
from sgpo_dist.checkpoint import CheckpointStore
from sgpo_dist.config import Config, build_config
from sgpo_dist.display import Status
from sgpo_dist.recorder import Recorder
from sgpo_dist.records import Completion, FinishReason, Message, Outcome, PreferencePair, Prompt, Refusal, RefusalReason, Stage
from sgpo_dist.roles import Lease, StagePlan
from sgpo_dist.run_directory import RunDirectory

RESPONSE = "The cat <b>sat</b> on teh mat."
REFINEMENT = "The cat <b>sat</b> on the \x1b[31mred\x1b[0m mat."
REFUSED = 3
"""This prompt's rewrite is a copy."""


class NoScreen:
    """A display that shows nothing."""

    def show(self, status: Status) -> None:
        pass

    def step(self, status: Status) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def run_config(root: Path, **tree: object) -> Config:
    return build_config({"output_dir": str(root), "run_name": "demo", "stages": ["preference"], "preference": {"total_steps": 2}, **tree})


def fabricate(root: Path) -> RunDirectory:
    """Six prompts, two steps of two pairs, one refusal, one pair left over."""
    with RunDirectory.claim(run_config(root)) as directory:
        recorder = Recorder(directory.metrics_file, directory.events_file, NoScreen(), wall=lambda: 1_700_000_000.0)
        recorder.event("attempt", incarnation=1, run_id=directory.run_id, pid=1)
        fill_ledger(directory)
        for step in (1, 2):
            recorder.log("preference", step, {"loss": 0.7 / step, "rewards/margins": 0.1 * step, "version": step, "staleness": 0.0})
            recorder.event("version_published", version=step, workers=1, checksum="c" * 32, probe_gap=0.0004, stall_s=0.2, total_s=0.5)
        recorder.event("worker_lost", worker="rollout-0", reason="<script>alert(1)</script>")
        recorder.event("attempt_ended", incarnation=1, reason="done", detail="")
        recorder.close()
        write_evaluation(directory)
        write_model(directory.model)
        store = CheckpointStore(directory.checkpoints, run_id=directory.run_id)
        store.commit(store.begin(2), 2, {"stage": "finished"})
        return directory.mark_finished()


def fill_ledger(directory: RunDirectory) -> None:
    ledger = Ledger(directory.database, clock=lambda: 0.0, wall=lambda: 0.0)
    incarnation = ledger.begin_incarnation()
    prompts = [Prompt(f"p{i}", (Message("user", f"Question {i} [bold]?"),), source="chat") for i in range(6)]
    ledger.open_stage(incarnation, StagePlan(Stage.PREFERENCE, 0, batch_size=2), prompts, 0)
    ledger.advance(incarnation, Stage.PREFERENCE, 1)
    ledger.advance(incarnation, Stage.PREFERENCE, 2)
    leases = ledger.lease(incarnation, "w", Stage.PREFERENCE, 6).leases
    ledger.put(incarnation, "w", [outcome(lease, number) for number, lease in enumerate(leases)])
    for step in (1, 2):
        ledger.assign(incarnation, Stage.PREFERENCE, step)
    ledger.commit(incarnation, Stage.PREFERENCE, 2)
    ledger.close()


def outcome(lease: Lease, number: int) -> Outcome:
    response = Completion(RESPONSE, (1, 2), FinishReason.STOP, 2)
    if number == REFUSED:
        return Refusal(lease.uid, lease.stage, lease.prompt.prompt_id, RefusalReason.IDENTICAL, "no change", response, response)
    refinement = Completion(REFINEMENT + " More." * number, (1, 2, 3), FinishReason.STOP, 2)
    return PreferencePair(lease.uid, lease.stage, lease.prompt, (9,), response, refinement, "improver.v1")


def write_evaluation(directory: RunDirectory) -> None:
    rows = [
        {
            "model": model,
            "source": "chat",
            "n": 2,
            "figures": {"similarity": value, "eos_share": 1.0},
            "per_prompt": {"similarity": [value, value]},
        }
        for model, value in (("initial", 0.5), ("preference", 0.75))
    ]
    directory.evaluation_file.write_text(json.dumps({"rows": rows}))


def write_model(directory: Path) -> None:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"weights")
