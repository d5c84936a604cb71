"""Hypothesis plays the ledger against a model in plain Python: any order of calls, from any number of workers and incarnations."""

from __future__ import annotations

import sqlite3
from itertools import count

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sgpo_dist.buffer.admission import Hold
from sgpo_dist.buffer.audit import audit_database
from sgpo_dist.buffer.ledger import Ledger
from sgpo_dist.errors import FencedError
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Refusal, RefusalReason, Stage
from sgpo_dist.roles import Lease, StagePlan

STAGE = Stage.PREFERENCE
PROMPTS = [Prompt(f"p{n}", (Message("user", f"question {n}"),)) for n in range(14)]
BATCH, STALENESS = 2, 1
PLAN = StagePlan(STAGE, 1, BATCH, weight_sync_interval=1, max_staleness=STALENESS, lease_s=10.0)
MACHINES = count()
WORKERS = st.sampled_from(["a", "b"])


def outcome(lease: Lease, version: int, refuse: bool) -> PreferencePair | Refusal:
    if refuse:
        return Refusal(lease.uid, STAGE, lease.prompt.prompt_id, RefusalReason.EMPTY)
    half = Completion(lease.uid, (1, 2), FinishReason.STOP, version)
    return PreferencePair(lease.uid, STAGE, lease.prompt, (3,), half, half, "v1")


class LedgerMachine(RuleBasedStateMachine):
    """The model: which leases were ever handed out, which outcomes were accepted, which batch each step had."""

    def __init__(self) -> None:
        super().__init__()
        self.uri = f"file:machine-{next(MACHINES)}?mode=memory&cache=shared"
        self.anchor = sqlite3.connect(self.uri, uri=True, isolation_level=None)
        self.now = 0.0
        self.ledger = self.open()
        self.incarnation = 0
        self.version = 0
        self.step = 0
        self.granted: list[tuple[int, str, Lease]] = []
        self.accepted: set[str] = set()
        self.batches: dict[int, list[str]] = {}
        self.resume(back=0)

    def open(self) -> Ledger:
        return Ledger(self.uri, clock=lambda: self.now, wall=lambda: self.now, synchronous="OFF", max_attempts=3)

    def teardown(self) -> None:
        self.ledger.close()
        self.anchor.close()

    @rule(back=st.integers(0, 2))
    def resume(self, back: int) -> None:
        """A new driver from a checkpoint ``back`` steps before; in lockstep its version is its step."""
        self.incarnation = self.ledger.begin_incarnation()
        self.step = self.version = max(0, self.step - back)
        self.ledger.open_stage(self.incarnation, PLAN, PROMPTS, self.version)

    @rule(back=st.integers(0, 2))
    def rebuild_learner(self, back: int) -> None:
        """A new learner under the same driver: it trains recorded steps again and publishes nothing until it is past the newest version."""
        self.step = max(0, self.step - back)

    @rule()
    def restart(self) -> None:
        self.ledger.close()
        self.ledger = self.open()

    @rule(worker=WORKERS, limit=st.integers(1, 4))
    def lease(self, worker: str, limit: int) -> None:
        grant = self.ledger.lease(self.incarnation, worker, STAGE, limit)
        assert len(grant.leases) <= limit
        for lease in grant.leases:
            assert lease.version == self.version
            assert lease.uid not in self.accepted
            self.granted.append((self.incarnation, worker, lease))

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), refuse=st.booleans(), newer=st.integers(0, 1))
    def put(self, data: st.DataObject, refuse: bool, newer: int) -> None:
        """Any lease ever granted: live, late, answered before, or of an earlier incarnation."""
        incarnation, worker, lease = data.draw(st.sampled_from(self.granted))
        row = outcome(lease, lease.version + newer, refuse)
        if incarnation != self.incarnation:
            with pytest.raises(FencedError):
                self.ledger.put(incarnation, worker, [row])
            return
        receipt = self.ledger.put(incarnation, worker, [row])
        assert not (receipt.accepted and lease.uid in self.accepted)
        if lease.uid in self.accepted:
            assert receipt.duplicates == 1
        if receipt.accepted:
            self.accepted.add(lease.uid)

    @rule(worker=WORKERS, crashed=st.booleans())
    def give_back(self, worker: str, crashed: bool) -> None:
        self.ledger.give_back(self.incarnation, worker, crashed=crashed)

    @rule(worker=WORKERS, seconds=st.floats(0, 12), named=st.booleans())
    def time_passes(self, worker: str, seconds: float, named: bool) -> None:
        """``named``: the worker heard of its newest grant only; the others' answers were lost."""
        mine = [lease.uid for incarnation, name, lease in self.granted if (incarnation, name) == (self.incarnation, worker)]
        held = self.ledger.renew(self.incarnation, worker, mine[-1:] if named else mine)
        assert held <= (1 if named else len(mine))
        self.now += seconds
        self.ledger.expire()

    @rule()
    def train(self) -> None:
        """One step and its publication, when there is a batch."""
        answer = self.ledger.assign(self.incarnation, STAGE, self.step + 1)
        if answer is None or isinstance(answer, Hold):
            return
        uids = [pair.uid for pair in answer.pairs]
        assert answer.replayed == (answer.step in self.batches)
        assert self.batches.setdefault(answer.step, uids) == uids
        if not answer.replayed:
            assert all(0 <= self.version - pair.version <= STALENESS for pair in answer.pairs if pair.version <= self.version)
        self.step, self.version = answer.step, max(self.version, answer.step)
        self.ledger.advance(self.incarnation, STAGE, self.version)

    @rule()
    def checkpoint(self) -> None:
        self.ledger.commit(self.incarnation, STAGE, self.step)

    @invariant()
    def every_prompt_is_accounted_for(self) -> None:
        report = audit_database(self.anchor)
        assert report.ok, report.problems
        if not report.stages:
            return
        row = report.stages[0]
        poison = row.refusals.get("poison", 0)
        assert row.pairs + row.refused == len(self.accepted) + poison
        assert row.leased + row.ready <= (STALENESS + 1) * BATCH
        assert self.ledger.counts(STAGE).stale == 0
        flat = [uid for uids in self.batches.values() for uid in uids]
        assert len(flat) == len(set(flat))


TestLedgerMachine = pytest.mark.simulation(LedgerMachine.TestCase)
TestLedgerMachine.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
)
