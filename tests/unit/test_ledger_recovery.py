"""What the ledger does for callers that lost an answer and for a learner that was built anew, step by step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sgpo_dist.buffer.ledger import Ledger
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Stage
from sgpo_dist.roles import Batch, Lease, StagePlan

STAGE = Stage.PREFERENCE
PROMPTS = [Prompt(f"p{n}", (Message("user", f"question {n}"),)) for n in range(12)]


class Desk:
    """A synchronous stage with two pairs a step and one step a version; the clock stands until told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ledger = Ledger(":memory:", clock=lambda: self.now, wall=lambda: 0.0, synchronous="OFF")
        self.inc = self.ledger.begin_incarnation()
        self.ledger.open_stage(self.inc, StagePlan(STAGE, 7, batch_size=2, max_staleness=0, lease_s=10.0), PROMPTS, 0)

    def fill(self, version: int) -> None:
        """Workers lease all there is room for and put its pairs."""
        for lease in self.ledger.lease(self.inc, "w", STAGE, 9).leases:
            self.ledger.put(self.inc, "w", [pair(lease, version)])

    def train(self, step: int) -> Batch:
        self.fill(step - 1)
        batch = self.ledger.assign(self.inc, STAGE, step)
        assert isinstance(batch, Batch)
        return batch


def pair(lease: Lease, version: int) -> PreferencePair:
    half = Completion("text", (1, 2), FinishReason.STOP, version)
    return PreferencePair(lease.uid, STAGE, lease.prompt, (3,), half, half, "v1")


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    made.ledger.close()


@pytest.mark.fault(17, invariants="I6")
def test_a_grant_whose_answer_was_lost_expires_although_its_worker_lives(desk: Desk) -> None:
    (lost,) = desk.ledger.lease(desk.inc, "w", STAGE, 1).leases
    (known,) = desk.ledger.lease(desk.inc, "w", STAGE, 1).leases
    for desk.now in (6.0, 12.0):
        assert desk.ledger.renew(desk.inc, "w", [known.uid]) == 1
        desk.ledger.expire()
    assert desk.ledger.counts(STAGE).expired_leases == 1
    assert [lease.uid for lease in desk.ledger.lease(desk.inc, "v", STAGE, 9).leases] == [lost.uid]


@pytest.mark.fault(6, invariants="I2")
def test_a_learner_built_anew_catches_up_without_publishing_and_the_run_goes_on(desk: Desk) -> None:
    batches = []
    for step in (1, 2, 3):
        batches.append(desk.train(step))
        desk.ledger.advance(desk.inc, STAGE, step)
    again = desk.ledger.assign(desk.inc, STAGE, 2)  # the checkpoint was step 1; the workers keep version 3
    desk.fill(3)  # and go on meanwhile
    assert desk.ledger.counts(STAGE).ready == 2
    assert isinstance(again, Batch)
    assert (again.pairs, desk.train(3).pairs) == (batches[1].pairs, batches[2].pairs)
    fresh = desk.train(4)
    assert (fresh.version, fresh.replayed, [row.version for row in fresh.pairs]) == (3, False, [3, 3])


def test_a_learner_built_anew_may_number_what_it_trains_again(desk: Desk) -> None:
    for step in (1, 2, 3):
        desk.train(step)
        desk.ledger.advance(desk.inc, STAGE, step)
    for step, version in ((2, 4), (3, 5)):
        assert isinstance(desk.ledger.assign(desk.inc, STAGE, step), Batch)
        desk.ledger.advance(desk.inc, STAGE, version)
    desk.fill(5)
    fresh = desk.ledger.assign(desk.inc, STAGE, 4)
    assert isinstance(fresh, Batch)
    assert (fresh.version, [row.version for row in fresh.pairs]) == (5, [5, 5])
    desk.ledger.advance(desk.inc, STAGE, 6)
    desk.ledger.assign(desk.inc, STAGE, 5)
    assert desk.ledger.counts(STAGE).stale == 4  # made before the ledger knew that version 5 belongs to step 4 now
    assert len(desk.ledger.lease(desk.inc, "w", STAGE, 9).leases) == 2


def test_a_run_that_goes_on_from_an_older_checkpoint_replays_what_a_newer_one_had_settled(desk: Desk) -> None:
    for step in (1, 2, 3):
        desk.train(step)
        desk.ledger.advance(desk.inc, STAGE, step)
    desk.ledger.commit(desk.inc, STAGE, 3)
    before = desk.ledger.counts(STAGE)
    moved = desk.ledger.restore(desk.inc, STAGE, 1)
    after = desk.ledger.counts(STAGE)
    assert moved == before.trained - after.trained == after.assigned - before.assigned > 0
    assert desk.ledger.assign(desk.inc, STAGE, 2).replayed
    assert desk.ledger.restore(desk.inc, STAGE, 3) == moved  # and forward again: a kill fell between a checkpoint and its commit
    assert desk.ledger.counts(STAGE) == before
