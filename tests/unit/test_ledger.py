"""The ledger's rules one by one, on a database in memory and a clock that the test moves."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest

from sgpo_dist.buffer import codec
from sgpo_dist.buffer.admission import Hold
from sgpo_dist.buffer.audit import audit_database
from sgpo_dist.buffer.ledger import Ledger, PutRequest
from sgpo_dist.errors import DataError, EnvironmentProblem, FencedError, RunFailed
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Refusal, RefusalReason, Stage, outcome_uid
from sgpo_dist.roles import StagePlan

STAGE = Stage.PREFERENCE


class Clock:
    """Seconds that stand still until told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Desk:
    """A ledger with an open stage, and short names for what workers do."""

    def __init__(self, prompts=12, version=0, path=":memory:", max_attempts=5, **plan):
        self.clock = Clock()
        self.ledger = Ledger(path, clock=self.clock, wall=lambda: 5.0, synchronous="OFF", max_attempts=max_attempts)
        self.prompts = [prompt(n) for n in range(prompts)]
        self.plan = StagePlan(STAGE, 7, **{"batch_size": 2, "max_staleness": 1, "lease_s": 10.0, **plan})
        self.inc = self.ledger.begin_incarnation()
        self.ledger.open_stage(self.inc, self.plan, self.prompts, version)

    def lease(self, limit=99, worker="w"):
        return self.ledger.lease(self.inc, worker, STAGE, limit).leases

    def put(self, *outcomes, worker="w"):
        return self.ledger.put(self.inc, worker, outcomes)

    def fill(self, count, worker="w"):
        """Lease ``count`` prompts and put their pairs."""
        leases = self.lease(count, worker)
        assert len(leases) == count
        self.put(*(pair(lease) for lease in leases), worker=worker)
        return leases

    def assign(self, step):
        return self.ledger.assign(self.inc, STAGE, step)

    def train(self, step):
        """One step in lockstep with interval 1."""
        batch = self.assign(step)
        self.ledger.advance(self.inc, STAGE, self.ledger.counts(STAGE).version + 1)
        return batch

    def resume(self, version, **changes):
        self.inc = self.ledger.begin_incarnation()
        self.ledger.open_stage(self.inc, replace(self.plan, **changes), self.prompts, version)

    def counts(self):
        return self.ledger.counts(STAGE)


def prompt(n, text="question"):
    return Prompt(f"p{n}", (Message("system", "be kind"), Message("user", f"{text} {n}")), reference=f"answer {n}" if n % 2 else None)


def pair(lease, version=None, text="response"):
    version = lease.version if version is None else version
    response = Completion(text, (5, 6, 2), FinishReason.STOP, version)
    refinement = Completion(text + " better", (5, 7, 8, 2), FinishReason.LENGTH, version + 1)
    return PreferencePair(lease.uid, lease.stage, lease.prompt, (1, 2, 3), response, refinement, "v1")


def refusal(lease, reason=RefusalReason.IDENTICAL):
    return Refusal(lease.uid, lease.stage, lease.prompt.prompt_id, reason, "same text", Completion("x", (1,), FinishReason.STOP, 0))


def ids(leases):
    return [lease.prompt.prompt_id for lease in leases]


def batch_ids(batch):
    return [pair.prompt.prompt_id for pair in batch.pairs]


@pytest.fixture
def open_desk():
    """Makes desks and closes them after the test."""
    desks = []

    def make(*args, **changes):
        desks.append(Desk(*args, **changes))
        return desks[-1]

    yield make
    for desk in desks:
        desk.ledger.close()


# ---- opening a stage ---------------------------------------------------------------------------------------------------------------


def test_prompts_come_epoch_by_epoch_in_the_order_given(open_desk):
    desk = open_desk(prompts=2, epochs=2, samples_per_prompt=2, max_staleness=None)
    leases = desk.lease()
    assert [(lease.prompt.prompt_id, lease.epoch, lease.sample) for lease in leases] == [
        ("p0", 0, 0), ("p0", 0, 1), ("p1", 0, 0), ("p1", 0, 1), ("p0", 1, 0), ("p0", 1, 1), ("p1", 1, 0), ("p1", 1, 1),
    ]  # fmt: skip
    assert leases[5].uid == outcome_uid(7, STAGE, "p0", 1, 1)
    assert leases[0].prompt == desk.prompts[0]
    assert leases[2].prompt == desk.prompts[1]


def test_opening_again_changes_nothing(open_desk):
    desk = open_desk(prompts=4)
    desk.fill(2)
    desk.ledger.open_stage(desk.inc, desk.plan, desk.prompts, 0)
    assert (desk.counts().waiting, desk.counts().ready) == (2, 2)


def test_new_prompts_go_to_the_end(open_desk):
    desk = open_desk(prompts=2, max_staleness=None)
    desk.ledger.open_stage(desk.inc, desk.plan, [prompt(9), *desk.prompts], 0)
    assert ids(desk.lease()) == ["p0", "p1", "p9"]


def test_a_changed_prompt_is_refused(open_desk):
    desk = open_desk(prompts=2)
    with pytest.raises(DataError, match="prompt 'p1' changed since the run began"):
        desk.ledger.open_stage(desk.inc, desk.plan, [prompt(0), prompt(1, "another question")], 0)


def test_a_doubled_id_is_refused_and_nothing_is_kept():
    ledger = Ledger(":memory:", clock=Clock(), wall=Clock())
    with pytest.raises(DataError, match="prompt id 'p3' occurs twice"):
        ledger.open_stage(ledger.begin_incarnation(), StagePlan(STAGE, 7, 2), [prompt(3), prompt(3)], 0)
    with pytest.raises(RunFailed, match="not open"):
        ledger.counts(STAGE)
    ledger.close()


def test_another_plan_is_refused_but_max_pairs_may_grow(open_desk):
    desk = open_desk(max_pairs=2)
    with pytest.raises(RunFailed, match="began with batch size 2, not 3"):
        desk.resume(0, batch_size=3)
    with pytest.raises(RunFailed, match="began with max_staleness 1, not None"):
        desk.resume(0, max_staleness=None)
    desk.resume(0, max_pairs=3)
    assert len(desk.lease()) == 3


# ---- incarnations ------------------------------------------------------------------------------------------------------------------


@pytest.mark.fault(26, invariants="I2")
def test_every_write_of_an_earlier_incarnation_is_refused(open_desk):
    desk = open_desk()
    lease = desk.lease(1)[0]
    old = desk.inc
    desk.resume(0)
    ledger = desk.ledger
    for write in (
        lambda: ledger.open_stage(old, desk.plan, desk.prompts, 0),
        lambda: ledger.lease(old, "w", STAGE, 1),
        lambda: ledger.renew(old, "w", [lease.uid]),
        lambda: ledger.put(old, "w", [pair(lease)]),
        lambda: ledger.give_back(old, "w"),
        lambda: ledger.assign(old, STAGE, 1),
        lambda: ledger.advance(old, STAGE, 1),
        lambda: ledger.commit(old, STAGE, 1),
    ):
        with pytest.raises(FencedError, match="incarnation 1 is fenced off: incarnation 2 owns"):
            write()
    assert desk.counts().waiting == 12  # the lease came back, without blame
    assert desk.lease(1)[0].uid == lease.uid


def test_a_resumed_driver_must_open_its_stage(open_desk):
    desk = open_desk()
    inc = desk.ledger.begin_incarnation()
    with pytest.raises(RunFailed, match="call open_stage after a resume"):
        desk.ledger.lease(inc, "w", STAGE, 1)


# ---- leases ------------------------------------------------------------------------------------------------------------------------


def test_only_as_many_leases_as_the_bound_has_room_for(open_desk):
    desk = open_desk()  # capacity (1 + 1) * 2 * 1 = 4
    assert ids(desk.lease(3)) == ["p0", "p1", "p2"]
    assert ids(desk.lease(3, "v")) == ["p3"]
    assert desk.ledger.lease(desk.inc, "w", STAGE, 3).exhausted is False
    assert desk.counts().capacity == 4
    desk.ledger.advance(desk.inc, STAGE, 1)
    assert ids(desk.lease(9)) == ["p4", "p5"]


def test_a_refusal_frees_its_place(open_desk):
    desk = open_desk()
    leases = desk.lease()
    desk.put(refusal(leases[1]))
    assert ids(desk.lease()) == ["p4"]
    assert desk.counts().refused == {"identical": 1}


def test_max_pairs_ends_generation(open_desk):
    desk = open_desk(max_staleness=None, max_pairs=3)
    leases = desk.lease()
    assert len(leases) == 3
    desk.put(*(pair(lease) for lease in leases[:2]))
    grant = desk.ledger.lease(desk.inc, "w", STAGE, 5)
    assert grant.leases == ()
    assert not grant.exhausted  # the third may still be refused
    assert not desk.ledger.settled(STAGE)
    desk.put(pair(leases[2]))
    assert desk.ledger.lease(desk.inc, "w", STAGE, 5).exhausted
    assert desk.ledger.settled(STAGE)


def test_an_expired_lease_goes_to_the_next_worker(open_desk):
    desk = open_desk()
    first = desk.lease(2)
    desk.clock.now += 9.9
    assert desk.ledger.renew(desk.inc, "w", [lease.uid for lease in first]) == 2
    desk.clock.now += 9.9
    assert desk.ledger.expire() == 0
    desk.clock.now += 0.1
    again = desk.lease(2, "v")
    assert [lease.uid for lease in again] == [lease.uid for lease in first]
    assert [lease.attempt for lease in again] == [2, 2]
    assert desk.counts().expired_leases == 2
    assert desk.ledger.renew(desk.inc, "w", [lease.uid for lease in first]) == 0


def test_given_back_leases_come_again_in_prompt_order(open_desk):
    desk = open_desk()
    desk.lease(2, "v")
    desk.lease(2, "w")
    assert desk.ledger.give_back(desk.inc, "w") == 2
    assert desk.ledger.give_back(desk.inc, "v") == 2
    assert ids(desk.lease(3)) == ["p0", "p1", "p2"]
    assert desk.counts().returned_leases == 4


@pytest.mark.fault(24, invariants="I6 I9")
def test_a_poison_prompt_is_refused_after_five_failures_and_nobody_else(open_desk):
    desk = open_desk(prompts=6)
    held_with = []
    for _ in range(9):
        held = ids(desk.lease(4))
        held_with.append(held)
        if "p0" not in held:
            break
        desk.ledger.give_back(desk.inc, "w")
    # Twice in company, then alone until the fifth failure; then its neighbours, suspects as well, are tried alone.
    assert held_with[:6] == [["p0", "p1", "p2", "p3"]] * 2 + [["p0"]] * 3 + [["p1"]]
    assert desk.counts().refused == {"poison": 1}
    row = desk.ledger.refusals(STAGE)[0]
    assert (row.prompt_id, row.reason) == ("p0", RefusalReason.POISON)
    assert row.detail == "5 workers ended or fell silent while they held this prompt"


def test_a_suspect_is_generated_alone_on_its_worker(open_desk):
    desk = open_desk(prompts=6)
    for _ in range(2):
        desk.lease(1)
        desk.ledger.give_back(desk.inc, "w")
    assert ids(desk.lease(4, "w")) == ["p0"]
    assert desk.lease(4, "w") == ()
    assert ids(desk.lease(2, "v")) == ["p1", "p2"]
    desk.ledger.give_back(desk.inc, "w", crashed=False)
    assert desk.lease(4, "v") == ()  # not beside what it holds


def test_an_orderly_end_is_nobodys_fault(open_desk):
    desk = open_desk(max_attempts=2)
    for _ in range(5):
        desk.lease(1)
        desk.ledger.give_back(desk.inc, "w", crashed=False)
    assert desk.counts().refused == {}


@pytest.mark.fault(9, 27, invariants="I6")
def test_leases_survive_a_restart_of_the_buffer_with_fresh_deadlines(tmp_path, open_desk):
    desk = open_desk(path=tmp_path / "buffer.db")
    lease = desk.lease(2)[0]
    desk.ledger.close()
    clock = Clock()
    clock.now = 3.0  # another boot: the old deadline of 1010 would never come
    reopened = Ledger(tmp_path / "buffer.db", clock=clock, wall=clock)
    clock.now = 12.9
    assert reopened.expire() == 0
    assert reopened.put(desk.inc, "w", [pair(lease)]).accepted == 1
    clock.now = 13.0
    assert reopened.expire() == 1
    reopened.close()


# ---- outcomes ----------------------------------------------------------------------------------------------------------------------


def test_pairs_and_refusals_come_back_as_they_were_put(open_desk):
    desk = open_desk(prompts=4)
    leases = desk.lease()
    long = pair(leases[2], text="wörd \x00 \ud800 " + "long text " * 1000)
    bare = Refusal(leases[1].uid, STAGE, "p1", RefusalReason.PROMPT_TOO_LONG)
    rows = [long, pair(leases[0]), refusal(leases[3]), bare]
    assert desk.put(*rows).accepted == 4
    assert desk.ledger.pairs(STAGE) == [pair(leases[0]), long]
    assert desk.ledger.refusals(STAGE) == [bare, refusal(leases[3])]


@pytest.mark.fault(2, 17, invariants="I2")
def test_put_is_idempotent(open_desk):
    desk = open_desk()
    lease = desk.lease(1)[0]
    assert desk.put(pair(lease), pair(lease)) == type(desk.put())(accepted=1, duplicates=1, late=0)
    assert desk.put(refusal(lease)).duplicates == 1
    assert desk.counts().duplicates == 2
    assert desk.ledger.pairs(STAGE) == [pair(lease)]
    other = desk.lease(1)[0]
    desk.put(refusal(other))
    assert desk.put(pair(other), refusal(other)).duplicates == 2


@pytest.mark.fault(3, invariants="I2 I6")
def test_a_late_pair_is_taken_when_nobody_else_delivered(open_desk):
    desk = open_desk()
    lease = desk.lease(1)[0]
    desk.clock.now += 11
    desk.ledger.expire()
    assert desk.put(pair(lease)).accepted == 1
    assert desk.lease(1)[0].prompt.prompt_id == "p1"


def test_a_late_pair_settles_the_lease_of_the_worker_that_took_over(open_desk):
    desk = open_desk()
    lease = desk.lease(1, "slow")[0]
    desk.clock.now += 11
    again = desk.lease(1, "quick")[0]
    assert desk.put(pair(lease, text="first"), worker="slow").accepted == 1
    assert desk.put(pair(again, text="second"), worker="quick").duplicates == 1
    assert desk.ledger.pairs(STAGE)[0].response.text == "first"


def test_a_late_pair_that_would_become_too_stale_is_turned_away_and_counted(open_desk):
    desk = open_desk()  # B = 2, S = 1: a pair of version 0 is good for steps 1 and 2
    slow = desk.lease(1, "slow")[0]
    desk.fill(2)
    desk.clock.now += 11
    desk.train(1)  # p0 has expired; version 1 now
    desk.lease(1, "quick")  # p0 again, at version 1
    desk.fill(3)  # p3, p4, p5 at version 1: unused are these and p0, and only step 2 is left for version 0
    assert desk.put(pair(slow), worker="slow").accepted == 1  # one of the two places of step 2
    desk = open_desk()
    slow = desk.lease(1, "slow")[0]
    desk.fill(2)
    desk.clock.now += 11
    desk.train(1)
    desk.lease(1, "quick")
    desk.fill(3)
    desk.train(2)  # version 2: the pair of version 0 comes too late
    assert desk.put(pair(slow), worker="slow").late == 1
    assert desk.counts().late == 1
    assert desk.counts().leased == 1


def test_a_late_pair_must_leave_room_for_the_older_ones(open_desk):
    desk = open_desk(batch_size=1, max_staleness=2)  # version 0 is good for steps 1 to 3
    slow = desk.lease(1, "slow")[0]  # p0
    desk.clock.now += 5
    desk.lease(1, "steady")  # p1 stays in generation since version 0
    desk.fill(1)  # p2
    desk.train(1)
    desk.clock.now += 6
    assert ids(desk.lease(1, "quick")) == ["p0"]
    desk.fill(1)  # p3 at version 1
    assert batch_ids(desk.train(2)) == ["p3"]
    assert desk.put(pair(slow), worker="slow").late == 1  # fresh enough for step 3, but that place is p1's


def test_a_late_pair_may_not_exceed_a_lowered_max_pairs(open_desk):
    desk = open_desk(max_staleness=None, max_pairs=2)
    lease = desk.lease(2)[1]
    desk.clock.now += 11
    desk.ledger.expire()
    desk.fill(1)
    desk.ledger.open_stage(desk.inc, replace(desk.plan, max_pairs=1), desk.prompts, 0)
    assert desk.put(pair(lease)).late == 1


def test_a_pair_older_than_any_lease_of_its_prompt_stops_the_run(open_desk):
    desk = open_desk(version=4)
    lease = desk.lease(1)[0]
    with pytest.raises(RunFailed, match="sampled at version 3, before any lease of its prompt"):
        desk.put(pair(lease, version=3))
    assert desk.counts().leased == 1


def test_outcomes_that_belong_to_no_lease_are_refused(open_desk):
    desk = open_desk()
    lease = desk.lease(1)[0]
    with pytest.raises(RunFailed, match="belongs to no registered prompt"):
        desk.put(replace(pair(lease), uid="0" * 32))
    with pytest.raises(RunFailed, match="names preference prompt 'p7', its lease was preference prompt 'p0'"):
        desk.put(replace(pair(lease), prompt=prompt(7)))
    with pytest.raises(RunFailed, match="carries another text"):
        desk.put(replace(pair(lease), prompt=replace(lease.prompt, reference="leak")))
    with pytest.raises(RunFailed, match="token ids must be integers"):
        desk.put(replace(pair(lease), prompt_ids=(-1,)))


def test_one_bad_caller_does_not_spoil_the_group(open_desk):
    desk = open_desk()
    one, two = desk.lease(2)
    bad = replace(pair(one), uid="0" * 32)
    answers = desk.ledger.put_group([PutRequest(desk.inc, "w", (pair(one), bad)), PutRequest(desk.inc, "w", (pair(two),))])
    assert isinstance(answers[0], RunFailed)
    assert answers[1].accepted == 1
    assert desk.ledger.pairs(STAGE) == [pair(two)]  # all of the first caller's outcomes, or none


def test_a_stage_that_only_collects_takes_any_version(open_desk):
    desk = open_desk(version=4, max_staleness=None)
    lease = desk.lease(1)[0]
    assert desk.put(pair(lease, version=0)).accepted == 1


# ---- batches -----------------------------------------------------------------------------------------------------------------------


def test_a_batch_takes_the_oldest_versions_first_then_the_lowest_positions(open_desk):
    desk = open_desk()
    desk.lease(1, "slow")  # p0
    desk.fill(3)  # p1, p2, p3 at version 0
    assert batch_ids(desk.train(1)) == ["p1", "p2"]
    desk.clock.now += 11
    desk.fill(3)  # p0 again, p4, p5 at version 1
    assert batch_ids(desk.train(2)) == ["p3", "p0"]
    assert batch_ids(desk.train(3)) == ["p4", "p5"]


def test_a_recorded_step_is_replayed_in_its_order_whatever_came_since(open_desk):
    desk = open_desk()
    leases = desk.lease()
    desk.put(pair(leases[3]))
    desk.put(pair(leases[2]))
    first = desk.assign(1)
    assert (batch_ids(first), first.version, first.replayed) == (["p2", "p3"], 0, False)
    desk.put(pair(leases[0]), pair(leases[1]))
    desk.ledger.commit(desk.inc, STAGE, 1)
    desk.resume(0)
    again = desk.assign(1)
    assert again == replace(first, replayed=True)
    assert batch_ids(desk.train(2)) == ["p0", "p1"]


def test_steps_have_no_gaps(open_desk):
    desk = open_desk()
    desk.fill(2)
    for step in (0, 2):
        with pytest.raises(RunFailed, match=f"step {step} asked for, but the next one is 1"):
            desk.assign(step)


def test_assign_says_what_it_waits_for(open_desk):
    desk = open_desk()
    assert desk.assign(1) is Hold.PAIRS
    desk.fill(4)
    assert not isinstance(desk.assign(1), Hold)
    assert not isinstance(desk.assign(2), Hold)
    assert desk.assign(3) is Hold.VERSION  # two steps were taken without a new version
    desk.ledger.advance(desk.inc, STAGE, 1)
    assert desk.assign(3) is Hold.PAIRS


def test_assign_waits_for_a_pair_that_would_be_overtaken(open_desk):
    desk = open_desk(batch_size=1, max_staleness=2)
    a, b, c = desk.lease(3)
    desk.put(pair(a))
    desk.train(1)
    desk.fill(1, "v")
    assert desk.assign(2) is Hold.IN_FLIGHT
    desk.put(pair(c))
    assert batch_ids(desk.train(2)) == ["p2"]
    desk.put(pair(b))
    assert batch_ids(desk.train(3)) == ["p1"]
    assert desk.counts().stale == 0


def test_never_is_said_once_everything_is_settled(open_desk):
    desk = open_desk(prompts=3)
    one, two, three = desk.lease()
    desk.put(pair(one), refusal(two))
    assert desk.assign(1) is Hold.PAIRS
    desk.put(refusal(three))
    assert desk.assign(1) is None


def test_synchronous_batches_are_the_lowest_positions_whatever_the_order_of_arrival(open_desk):
    desk = open_desk(max_staleness=0, weight_sync_interval=2)  # four pairs a version
    leases = desk.lease()
    assert len(leases) == 4
    desk.put(pair(leases[3]), pair(leases[2]), refusal(leases[0]))
    assert desk.assign(1) is Hold.SETTLING
    desk.put(pair(leases[1]))
    assert desk.assign(1) is Hold.SETTLING  # the refusal left a place for p4
    desk.fill(1)
    assert batch_ids(desk.assign(1)) == ["p1", "p2"]
    assert batch_ids(desk.assign(2)) == ["p3", "p4"]
    assert desk.assign(3) is Hold.VERSION


def test_batches_report_lockstep_version_and_a_resume_with_bumped_versions_realigns(open_desk):
    desk = open_desk(prompts=30, weight_sync_interval=2, version=3)
    desk.fill(8)
    assert [desk.assign(step).version for step in (1, 2)] == [3, 3]
    assert desk.assign(3).version == 4  # trained at version 4 although its publication is still under way
    desk.resume(9)  # the checkpoint was step 2; the driver numbers its weights 9
    assert desk.assign(3).replayed
    assert desk.assign(4) is Hold.PAIRS  # the two ready pairs of version 3 are six versions old now
    assert desk.counts().stale == 2
    assert desk.counts().waiting == 24
    desk.fill(2)
    assert batch_ids(desk.assign(4)) == ["p6", "p7"]
    assert len(desk.lease()) == 4  # version 9 belongs to steps 3-4 now: good up to step 6, which is 12 pairs, 8 of them used


def test_commit_marks_rows_up_to_the_step(open_desk):
    desk = open_desk()
    desk.fill(4)
    desk.assign(1)
    desk.assign(2)
    assert desk.ledger.commit(desk.inc, STAGE, 1) == 2
    assert desk.ledger.commit(desk.inc, STAGE, 1) == 0
    assert (desk.counts().assigned, desk.counts().trained) == (2, 2)
    with pytest.raises(RunFailed, match="commit of step 3, but the last assigned step is 2"):
        desk.ledger.commit(desk.inc, STAGE, 3)


def test_commit_and_advance_of_a_stage_without_batches_are_harmless(open_desk):
    desk = open_desk(version=2)
    assert desk.ledger.commit(desk.inc, Stage.SFT, 30) == 0
    desk.ledger.advance(desk.inc, Stage.SFT, 3)
    assert desk.ledger.commit(desk.inc, STAGE, 30) == 0
    assert desk.counts().version == 2


def test_versions_only_go_up_in_an_incarnation_and_start_anywhere_in_the_next(open_desk):
    desk = open_desk(version=2)
    desk.ledger.advance(desk.inc, STAGE, 3)
    desk.ledger.advance(desk.inc, STAGE, 3)
    with pytest.raises(RunFailed, match="version 2 is older than 3"):
        desk.ledger.advance(desk.inc, STAGE, 2)
    with pytest.raises(RunFailed, match="use advance, not open_stage"):
        desk.ledger.open_stage(desk.inc, desk.plan, desk.prompts, 4)
    desk.resume(1)
    assert desk.counts().version == 1


# ---- the file ----------------------------------------------------------------------------------------------------------------------


def test_a_backup_is_one_whole_file(tmp_path, open_desk):
    desk = open_desk(path=tmp_path / "buffer.db")
    desk.fill(2)
    (tmp_path / "copy").mkdir()
    desk.ledger.backup(tmp_path / "copy" / "buffer.db")
    desk.fill(2)
    assert [item.name for item in (tmp_path / "copy").iterdir()] == ["buffer.db"]
    copy = Ledger(tmp_path / "copy" / "buffer.db", clock=Clock(), wall=Clock())
    assert copy.counts(STAGE).ready == 2
    copy.close()


@pytest.mark.fault(28, invariants="I9")
def test_a_file_of_another_release_and_a_file_that_is_no_database_are_refused(tmp_path):
    with closing(sqlite3.connect(tmp_path / "new.db")) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(RunFailed, match="has schema 99, this release reads 1"):
        Ledger(tmp_path / "new.db", clock=Clock(), wall=Clock())
    (tmp_path / "junk.db").write_bytes(b"junk" * 1000)
    with pytest.raises(RunFailed, match=r"put the buffer\.db of the newest checkpoint in its place"):
        Ledger(tmp_path / "junk.db", clock=Clock(), wall=Clock())
    with pytest.raises(EnvironmentProblem, match="unable to open"):
        Ledger(tmp_path / "nowhere" / "buffer.db", clock=Clock(), wall=Clock())


def test_acknowledged_means_synchronous_full(tmp_path):
    ledger = Ledger(tmp_path / "buffer.db", clock=Clock(), wall=Clock())
    pragma = {name: ledger._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous", "foreign_keys")}
    assert pragma == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    ledger.close()


def test_long_text_is_compressed_and_short_text_stays_readable():
    assert codec.pack_text("short") == "short"
    assert len(codec.pack_text("a" * 5000)) < 100
    assert codec.unpack_text(codec.pack_text("ü" * 5000)) == "ü" * 5000
    assert codec.pack_ids((1, 70000)) == b"\x01\x00\x00\x00\x70\x11\x01\x00"


def test_two_field_lists_never_share_a_digest():
    assert codec.digest("ab", "c") != codec.digest("a", "bc")
    assert codec.digest("1") != codec.digest(1)
    assert codec.digest(None) != codec.digest("")


def test_the_audit_finds_nothing_in_a_life_of_all_these_things(tmp_path, open_desk):
    desk = open_desk(path=tmp_path / "buffer.db", prompts=8)
    leases = desk.lease()
    desk.put(pair(leases[0]), refusal(leases[1]), pair(leases[2]))
    desk.train(1)
    desk.ledger.commit(desk.inc, STAGE, 1)
    desk.resume(1)
    desk.fill(2)
    desk.train(2)
    with closing(sqlite3.connect(tmp_path / "buffer.db")) as db:
        report = audit_database(db)
    assert report.problems == ()
    row = report.stages[0]
    assert (row.prompts, row.pairs, row.refused, row.trained, row.assigned, row.unused, row.steps) == (8, 4, 1, 2, 2, 3, 2)
