"""The audit proves a sound run and names each kind of tampering. It is fed by the real ledger and a hand on the database."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest

from sgpo_dist.buffer.audit import audit_run
from sgpo_dist.buffer.ledger import Ledger
from sgpo_dist.cli.audit import notes
from sgpo_dist.errors import ConfigError
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Refusal, RefusalReason, Stage
from sgpo_dist.roles import StagePlan

STAGE = Stage.PREFERENCE


@pytest.fixture
def run_dir(tmp_path):
    """Ten prompts; steps 1-3 of two pairs trained (1 and 2 committed), one refusal, one pair ready, two prompts unused."""
    ledger = Ledger(tmp_path / "buffer.db", clock=lambda: 0.0, wall=lambda: 0.0, synchronous="OFF")
    inc = ledger.begin_incarnation()
    prompts = [Prompt(f"p{n}", (Message("user", f"question {n}"),), reference=f"answer {n}") for n in range(10)]
    ledger.open_stage(inc, StagePlan(STAGE, 7, batch_size=2, max_staleness=1), prompts, 0)
    for step in (1, 2, 3):
        for lease in ledger.lease(inc, "w", STAGE, 9).leases:
            ledger.put(inc, "w", [outcome(lease)])
        ledger.assign(inc, STAGE, step)
        ledger.advance(inc, STAGE, step)
    ledger.commit(inc, STAGE, 2)
    ledger.close()
    return tmp_path


def outcome(lease):
    if lease.prompt.prompt_id == "p1":
        return Refusal(lease.uid, STAGE, "p1", RefusalReason.EMPTY, "nothing", Completion("", (2,), FinishReason.STOP, lease.version))
    response = Completion("word " * 2000, (5, 6, 2), FinishReason.STOP, lease.version)
    return PreferencePair(lease.uid, STAGE, lease.prompt, (1, 2), response, Completion("better", (7, 2), FinishReason.STOP, lease.version), "v1")


def tamper(run_dir, *statements):
    with closing(sqlite3.connect(run_dir / "buffer.db", isolation_level=None)) as db:
        db.execute("PRAGMA foreign_keys = OFF")
        for statement in statements:
            assert db.execute(statement).rowcount != 0, statement


def uid_of(run_dir, prompt_id):
    with closing(sqlite3.connect(run_dir / "buffer.db")) as db:
        return db.execute("SELECT uid FROM orders WHERE prompt_id = ?", (prompt_id,)).fetchone()[0]


def test_a_sound_run_is_proved_and_summed_up(run_dir):
    report = audit_run(run_dir)
    assert report.problems == ()
    assert report.ok
    row = report.stages[0]
    assert (row.stage, row.prompts, row.pairs, row.refused, row.unused) == ("preference", 10, 8, 1, 1)
    assert (row.ready, row.assigned, row.trained, row.steps) == (2, 2, 4, 3)
    assert row.refusals == {"empty": 1}
    assert (row.version, row.max_staleness, row.staleness_seen) == (3, 1, 1)


TAMPERINGS = {
    "text": ("UPDATE pairs SET refinement_text = 'worse' WHERE uid = '{p2}'", "pair {p2} .* was changed after it was stored"),
    "long text": ("UPDATE pairs SET response_text = x'00ff' WHERE uid = '{p2}'", "pair {p2} .* was changed"),
    "token ids": ("UPDATE pairs SET refinement_ids = x'07000000' WHERE uid = '{p2}'", "pair {p2} .* was changed"),
    "version of a half": ("UPDATE pairs SET response_version = 1 WHERE uid = '{p2}'", "pair {p2} .* was changed"),
    "version of the row": ("UPDATE orders SET version = 1 WHERE uid = '{p2}'", "pair {p2} is of version 0 but the ledger counts it as 1"),
    "moved pair": ("UPDATE orders SET uid = 'f' || substr(uid, 2) WHERE uid = '{p2}'", "uid f.* is not that of prompt 'p2'"),
    "prompt": ("UPDATE prompts SET reference = 'another' WHERE prompt_id = 'p9'", "text of prompt 'p9' was changed"),
    "other prompt": ("UPDATE orders SET prompt_id = 'p9' WHERE uid = '{p2}'", "uid {p2} is not that of prompt 'p9'"),
    "deleted pair": ("DELETE FROM pairs WHERE uid = '{p2}'", "pair {p2} is gone"),
    "deleted order": ("DELETE FROM orders WHERE uid = '{p4}'", "prompts at positions 4 to 4 are gone"),
    "deleted last order": ("DELETE FROM orders WHERE uid = '{p9}'", "10 prompts were registered but 9 are in the ledger"),
    "deleted prompt": ("DELETE FROM prompts WHERE prompt_id = 'p9'", "prompt 'p9' is not registered"),
    "deleted refusal": ("DELETE FROM refusals", "1 prompts are refused but 0 refusals are stored"),
    "refusal's reason": ("UPDATE refusals SET reason = 'no_eos'", "refusal {p1} .* was changed"),
    "uncounted refusal": ("DELETE FROM counters", "refusals by reason are .* but were counted as {{}}"),
    "doubled in a batch": (
        "UPDATE journal SET uids = (SELECT uids FROM journal WHERE step = 1) WHERE step = 2",
        "pair {p0} is in the batches of steps 1 and 2",
    ),
    "order of a batch": ("UPDATE journal SET uids = substr(uids, 34) || ' ' || substr(uids, 1, 32) WHERE step = 2", "journal of step 2 was changed"),
    "short batch": ("UPDATE journal SET uids = substr(uids, 1, 32) WHERE step = 3", "step 3 has 1 pairs instead of 2"),
    "train version": ("UPDATE journal SET version = 5 WHERE step = 3", "step 3 trained at version 5 on a pair 4 versions old; max_staleness is 1"),
    "lost last step": ("DELETE FROM journal WHERE step = 3", "3 steps were assigned but the journal has 2"),
    "lost step": ("DELETE FROM journal WHERE step = 2", "the journal has step 3 where step 2 belongs"),
    "step of a row": ("UPDATE orders SET step = 2 WHERE uid = '{p0}'", "journal of step 1 and the ledger's rows name different pairs"),
    "state": ("UPDATE orders SET state = 'ready', step = NULL WHERE uid = '{p0}'", "journal of step 1 and the ledger's rows name different"),
    "trained without checkpoint": ("UPDATE stages SET committed_step = 1", "counts as trained in step 2, which no checkpoint covers"),
    "tally": ("UPDATE tally SET n = n + 1 WHERE state = 'waiting'", "the ledger counts .* rows but holds"),
    "no number": ("UPDATE orders SET version = 'x' WHERE uid = '{p0}'", "{p0} has version 'x'"),
    "version journal": ("UPDATE versions SET version = 0 WHERE version = 2", "version 0 follows version 1 in incarnation 1"),
    "incarnation": ("UPDATE versions SET incarnation = 4 WHERE version = 2", "incarnation 1 wrote after incarnation 4 had begun"),
    "orphan": ("UPDATE pairs SET uid = 'nobody' WHERE uid = '{p2}'", "1 rows of pairs belong to no prompt"),
}


@pytest.mark.parametrize("kind", TAMPERINGS)
def test_tampering_is_named(run_dir, kind):
    statement, expected = TAMPERINGS[kind]
    names = {f"p{n}": uid_of(run_dir, f"p{n}") for n in range(10)}
    tamper(run_dir, statement.format(**names))
    report = audit_run(run_dir)
    assert not report.ok
    with pytest.raises(AssertionError, match=expected.format(**names)):
        raise AssertionError("\n".join(report.problems))


def test_a_damaged_file_is_a_problem_and_a_missing_one_a_usage_error(run_dir):
    whole = (run_dir / "buffer.db").read_bytes()
    (run_dir / "buffer.db").write_bytes(whole[:5000] + b"\xff" * 8000 + whole[13000:])
    assert not audit_run(run_dir).ok
    (run_dir / "buffer.db").unlink()
    with pytest.raises(ConfigError, match=r"has no buffer\.db to audit"):
        audit_run(run_dir)


def events(run_dir, *rows):
    (run_dir / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "version_publ')


def test_events_must_agree_with_the_ledger(run_dir):
    published = [{"time": 1.0, "kind": "version_published", "version": version} for version in (1, 2, 3)]
    events(run_dir, {"kind": "attempt"}, *published, {"kind": "attempt"}, published[1])
    assert audit_run(run_dir).ok
    events(run_dir, {"kind": "attempt"}, published[1], published[0])
    assert audit_run(run_dir).problems == ("events.jsonl: version 1 was published after version 2 in one attempt",)
    events(run_dir, {"time": 1.0, "kind": "version_published", "version": 9})
    assert audit_run(run_dir).problems == ("events.jsonl: version 9 was published but never entered the ledger",)


# ---- rollback ------------------------------------------------------------------------------------------------------------------------

FINISHED = {"time": 3.0, "kind": "stage_finished", "stage": "preference", "steps": 2, "version": 3}
ROLLED_BACK = {"time": 2.0, "kind": "rolled_back", "stage": "preference", "from_step": 3, "to_step": 2, "reason": "too long"}
PUBLISHED = {"time": 2.5, "kind": "version_published", "version": 3}
CHECKPOINT = {"time": 4.0, "kind": "checkpoint", "step": 2}
LEFT = "preference ended with 2 pairs assigned and not trained, but events.jsonl records no rollback to step 2"


def test_pairs_that_a_recorded_rollback_discarded_are_sound_and_counted(run_dir):
    events(run_dir, ROLLED_BACK, PUBLISHED, FINISHED, CHECKPOINT)
    report = audit_run(run_dir)
    assert report.ok
    row = report.stages[0]
    assert (row.trained, row.assigned, row.discarded, row.rolled_back_to) == (4, 2, 2, 2)
    assert notes(report.stages)[1] == "preference discarded by rollback: 2 assigned pairs, of the steps after 2"


@pytest.mark.parametrize(
    "recorded",
    [
        (),
        (ROLLED_BACK | {"stage": "improver"},),
        (ROLLED_BACK | {"to_step": 1},),
        (ROLLED_BACK, ROLLED_BACK | {"to_step": 1}),
    ],
    ids=["none", "another stage", "another step", "a later one"],
)
def test_a_finished_stage_leaves_no_assigned_pairs_without_a_recorded_rollback(run_dir, recorded):
    events(run_dir, *recorded, PUBLISHED, FINISHED, CHECKPOINT)
    report = audit_run(run_dir)
    assert report.problems == (LEFT,)
    assert report.stages[0].discarded == 0


def test_a_stage_is_not_judged_before_it_is_over(run_dir):
    for rows in ((ROLLED_BACK,), (PUBLISHED, CHECKPOINT), (PUBLISHED, FINISHED), (PUBLISHED, FINISHED, CHECKPOINT, PUBLISHED)):
        events(run_dir, *rows)
        report = audit_run(run_dir)
        assert report.ok, rows
        assert report.stages[0].discarded == 0
        assert notes(report.stages) == ["preference refused: empty 1"]


def test_a_rollback_behind_trained_rows_is_named(run_dir):
    events(run_dir, ROLLED_BACK | {"to_step": 1}, PUBLISHED, FINISHED | {"steps": 1}, CHECKPOINT)
    assert audit_run(run_dir).problems == ("preference: rows up to step 2 count as trained, but the stage ended on step 1",)


def test_a_stage_that_only_collects_has_no_steps_to_end_on(tmp_path):
    with closing(Ledger(tmp_path / "buffer.db", clock=lambda: 0.0, wall=lambda: 0.0, synchronous="OFF")) as ledger:
        ledger.open_stage(ledger.begin_incarnation(), StagePlan(STAGE, 7, batch_size=2), [Prompt("p0", (Message("user", "question"),))], 0)
        ledger.advance(1, STAGE, 3)
    events(tmp_path, PUBLISHED, FINISHED | {"steps": 9}, CHECKPOINT)
    assert audit_run(tmp_path).ok


# ---- checkpoints ---------------------------------------------------------------------------------------------------------------------


def checkpoint(run_dir, **facts):
    directory = run_dir / "checkpoints" / "step-8"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "MANIFEST.json").write_text(json.dumps({"facts": facts}))
    (run_dir / "checkpoints" / "latest").write_text("step-8\n")


def test_rows_count_as_trained_only_up_to_the_newest_checkpoint(run_dir):
    checkpoint(run_dir, stage="preference", step=2)
    assert audit_run(run_dir).ok
    checkpoint(run_dir, stage="finished", step=0)
    assert audit_run(run_dir).ok
    checkpoint(run_dir, stage="preference", step=1)
    assert audit_run(run_dir).problems == ("preference: rows up to step 2 count as trained, but checkpoints/latest holds step 1",)
    (run_dir / "checkpoints" / "latest").write_text("../../elsewhere\n")
    assert audit_run(run_dir).problems == ("checkpoints/latest points to '../../elsewhere', which has no readable manifest",)


def test_many_problems_are_cut_short(tmp_path):
    with closing(Ledger(tmp_path / "buffer.db", clock=lambda: 0.0, wall=lambda: 0.0, synchronous="OFF")) as ledger:
        prompts = [Prompt(f"p{n}", (Message("user", "question"),)) for n in range(70)]
        ledger.open_stage(ledger.begin_incarnation(), StagePlan(STAGE, 7, batch_size=2), prompts, 0)
    tamper(tmp_path, "UPDATE prompts SET source = 'elsewhere'")
    problems = audit_run(tmp_path).problems
    assert len(problems) == 51
    assert problems[-1] == "and 20 more problems"
