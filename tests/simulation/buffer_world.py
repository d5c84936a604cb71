"""A small world around the ledger: virtual time, and workers and a driver that fail in every way, all drawn from one seed.

Used by the schedules. It keeps its own record of what was acknowledged and trained on and compares; the ledger's own books are checked by
``audit_database``. Nothing sleeps and nothing runs in parallel: an event is one call at one virtual second.
"""

from __future__ import annotations

import heapq
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import count
from random import Random

from sgpo_dist.buffer.admission import Hold
from sgpo_dist.buffer.audit import audit_database
from sgpo_dist.buffer.ledger import Ledger
from sgpo_dist.errors import FencedError
from sgpo_dist.records import Completion, FinishReason, Message, Outcome, PreferencePair, Prompt, Refusal, RefusalReason, Stage
from sgpo_dist.roles import Batch, Lease, StagePlan

STAGE = Stage.PREFERENCE
LEASE_S = 10.0
MAX_VIRTUAL_S = 20_000.0
POLL_S = 6.0


@dataclass(frozen=True, slots=True)
class Settings:
    """One world. Rates are per finished generation; ``driver_crashes`` and ``buffer_restarts`` are how often it happens."""

    prompts: int
    samples: int
    epochs: int
    batch: int
    interval: int
    staleness: int | None
    max_pairs: int | None
    steps: int
    workers: int
    concurrency: int
    save_every: int = 2
    refusals: float = 0.0
    crashes: float = 0.0
    hangs: float = 0.0
    repeats: float = 0.0
    driver_crashes: int = 0
    buffer_restarts: int = 0
    fallbacks: float = 0.0
    bump: int = 0
    poison: frozenset[str] = frozenset()
    max_attempts: int = 5

    def faultless(self) -> Settings:
        """The same world where everything goes right, with one worker."""
        return replace(self, workers=1, crashes=0.0, hangs=0.0, repeats=0.0, driver_crashes=0, buffer_restarts=0, fallbacks=0.0, bump=0)


def draw_rough_settings(seed: int) -> Settings:
    """A world of many steps, wide bounds and frequent faults, to press on the staleness arithmetic."""
    rng = Random(seed)
    return replace(
        draw_settings(seed),
        prompts=40,
        steps=10,
        staleness=rng.choice([1, 2, 3]),
        interval=rng.choice([1, 1, 2]),
        batch=rng.choice([1, 2]),
        max_pairs=None,
        workers=3,
        crashes=0.15,
        hangs=0.2,
        bump=0,
        max_attempts=1000,
    )


def draw_settings(seed: int) -> Settings:
    """A world for ``seed``; every feature is off in some of them."""
    rng = Random(seed)
    batch, steps = rng.choice([1, 2, 2, 3]), rng.randint(2, 6)
    prompts = rng.randint(2, batch * steps + 4)
    return Settings(
        prompts=prompts,
        samples=rng.choice([1, 1, 2]),
        epochs=rng.choice([1, 1, 2]),
        batch=batch,
        interval=rng.choice([1, 1, 2, 3]),
        staleness=rng.choice([0, 0, 1, 1, 2, 3, None]),
        max_pairs=rng.choice([None, batch * steps, batch * steps - 1]),
        steps=steps,
        workers=rng.randint(1, 3),
        concurrency=rng.randint(1, 5),
        save_every=rng.randint(1, 3),
        refusals=rng.choice([0.0, 0.2, 0.5]),
        crashes=rng.choice([0.0, 0.0, 0.15]),
        hangs=rng.choice([0.0, 0.0, 0.15]),
        repeats=rng.choice([0.0, 0.3]),
        driver_crashes=rng.choice([0, 0, 1, 2]),
        buffer_restarts=rng.choice([0, 0, 1, 2]),
        fallbacks=rng.choice([0.0, 0.5]),
        bump=rng.choice([0, 0, 0, 0, 2]),
        poison=frozenset(f"p{n}" for n in range(prompts) if rng.random() < rng.choice([0.0, 0.0, 0.1])),
    )


@dataclass(slots=True, eq=False)
class Worker:
    """A rollout worker: its weights, what it holds, and until when it hears nothing."""

    name: str
    incarnation: int
    version: int
    alive: bool = True
    retired: bool = False
    silent_until: float = 0.0
    held: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint: enough to go on from."""

    step: int
    version: int


class World:
    """Run one world to its end; an AssertionError says what broke."""

    def __init__(self, settings: Settings, seed: int, content_seed: int | None = None) -> None:
        self.settings = settings
        self.rng = Random(seed)
        self.content_seed = seed if content_seed is None else content_seed
        self.now = 0.0
        self.offset = self.rng.uniform(0, 1e6)
        self.uri = f"file:world-{id(self)}-{seed}?mode=memory&cache=shared"
        self.anchor = sqlite3.connect(self.uri, uri=True, isolation_level=None)
        self.ledger = self._open_ledger()
        self.prompts = [Prompt(f"p{n}", (Message("user", f"question {n}"),)) for n in range(settings.prompts)]
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.ticket = count()
        self.names = count()
        self.workers: list[Worker] = []
        self.life = 0
        self.incarnation = 0
        self.step = 0
        self.version = 3
        self.saved = [Saved(0, 3)]
        self.trained: dict[int, tuple[str, ...]] = {}
        self.recorded: dict[int, tuple[str, ...]] = {}
        self.acknowledged: dict[str, Outcome] = {}
        self.accepted = 0
        self.granted: dict[str, int] = {}
        self.done = False
        self.exhausted = False
        self.last_hold: Hold | None = None

    # ---- the whole ---------------------------------------------------------------------------------------------------------------

    def run(self) -> World:
        """Play the events until the driver is done, then check everything."""
        try:
            self._start_driver(Saved(0, self.version), first=True)
            for _ in range(self.settings.driver_crashes):
                self._at(self.rng.uniform(1, 60), self._crash_driver)
            for _ in range(self.settings.buffer_restarts):
                self._at(self.rng.uniform(1, 60), self._restart_buffer)
            self._play()
            self._check_end()
        finally:
            self.ledger.close()
            self.anchor.close()
        return self

    def _play(self) -> None:
        while not self.done:
            self.now, _, event = heapq.heappop(self.queue)
            assert self.now < MAX_VIRTUAL_S, f"no progress: {self.last_hold}, step {self.step}, {self.ledger.counts(STAGE)}"
            event()

    def _at(self, delay: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (self.now + delay, next(self.ticket), event))

    def _open_ledger(self) -> Ledger:
        return Ledger(
            self.uri,
            clock=lambda: self.now + self.offset,
            wall=lambda: self.now,
            synchronous="OFF",
            max_attempts=self.settings.max_attempts,
        )

    def _restart_buffer(self) -> None:
        """The buffer's process dies and comes back on its file, perhaps after a reboot with another monotonic clock."""
        self.ledger.close()
        self.offset = self.rng.uniform(0, 1e6)
        self.ledger = self._open_ledger()
        self._check_audit()

    # ---- the driver --------------------------------------------------------------------------------------------------------------

    def plan(self) -> StagePlan:
        s = self.settings
        return StagePlan(STAGE, 7, s.batch, s.interval, s.staleness, s.max_pairs, s.samples, s.epochs, LEASE_S)

    def _start_driver(self, saved: Saved, first: bool) -> None:
        self.life += 1
        self.incarnation = self.ledger.begin_incarnation()
        self.step, self.version = saved.step, saved.version + (0 if first else self.settings.bump)
        if self.rng.random() < 0.5:
            self.ledger.advance(self.incarnation, STAGE, self.version)  # the story publishes before it opens the stage
        self.ledger.open_stage(self.incarnation, self.plan(), self.prompts, self.version)
        self.trained = {step: uids for step, uids in self.trained.items() if step <= self.step}
        for _ in range(self.settings.workers):
            self._start_worker()
        self._later(self.rng.uniform(0, 2), self._drive)

    def _later(self, delay: float, event: Callable[[], None]) -> None:
        """An event of this driver's life; a driver that died does nothing any more."""
        life = self.life
        self._at(delay, lambda: event() if life == self.life else None)

    def _crash_driver(self) -> None:
        """The driver dies; its workers die or live on as zombies; another driver resumes from a checkpoint that may not be the newest."""
        self.life += 1
        for worker in self.workers:
            worker.alive = worker.alive and self.rng.random() < 0.5
        zombies, self.workers = self.workers, []
        back = 2 if len(self.saved) > 1 and self.rng.random() < self.settings.fallbacks else 1
        del self.saved[len(self.saved) - back + 1 :]
        saved = self.saved[-1]
        self._at(self.rng.uniform(0, 5), lambda: self._start_driver(saved, first=False))
        for worker in zombies:
            self._at(self.rng.uniform(0, 9), lambda worker=worker: self._poll(worker))

    def _drive(self) -> None:
        answer = self.ledger.assign(self.incarnation, STAGE, self.step + 1)
        if isinstance(answer, Hold):
            self.last_hold = answer
            self._later(2.5, self._drive)
        elif answer is None:
            self.done = self.exhausted = True
        else:
            self._check_batch(answer)
            self._later(self.rng.uniform(0.1, 6), lambda: self._stepped(answer))

    def _stepped(self, batch: Batch) -> None:
        self.step = batch.step
        self.trained[batch.step] = tuple(pair.uid for pair in batch.pairs)
        if batch.step % self.settings.interval:
            self._save_if_due()
            return
        version, duration = self.version + 1, self.rng.uniform(0.1, 4)
        for worker in self.workers:
            self._later(self.rng.uniform(0, duration), lambda worker=worker: self._receive(worker, version))
        self._later(duration, lambda: self._published(version))

    def _receive(self, worker: Worker, version: int) -> None:
        if self.now >= worker.silent_until:
            worker.version = max(worker.version, version)

    def _published(self, version: int) -> None:
        """Whoever did not prove the version is retired: it may still put what it began, but leases no more."""
        self.version = version
        for worker in [worker for worker in self.workers if worker.version < version]:
            self._receive(worker, version)
            if worker.version < version:
                self._replace(worker)
        self.ledger.advance(self.incarnation, STAGE, version)
        self._save_if_due()

    def _save_if_due(self) -> None:
        if self.step % self.settings.save_every == 0:
            self.saved.append(Saved(self.step, self.version))
            step = self.step
            self._later(0.3, lambda: self._commit(step))
        else:
            self._next_step()

    def _commit(self, step: int) -> None:
        self.ledger.commit(self.incarnation, STAGE, step)
        self._next_step()

    def _next_step(self) -> None:
        if self.step >= self.settings.steps:
            self.done = True
        else:
            self._drive()

    # ---- the workers -------------------------------------------------------------------------------------------------------------

    def _start_worker(self) -> None:
        worker = Worker(f"w{next(self.names)}", self.incarnation, self.version)
        self.workers.append(worker)
        self._at(self.rng.uniform(0, 3), lambda: self._poll(worker))

    def _poll(self, worker: Worker) -> None:
        """Heartbeat, then lease what there is room for."""
        if not worker.alive or worker.retired:
            return
        if self.now < worker.silent_until:
            self._at(worker.silent_until - self.now, lambda: self._poll(worker))
            return
        try:
            self.ledger.renew(worker.incarnation, worker.name)
            free = self.settings.concurrency - len(worker.held)
            grant = self.ledger.lease(worker.incarnation, worker.name, STAGE, free) if free else None
        except FencedError:
            assert worker.incarnation < self.incarnation, "the newest incarnation was fenced off"
            worker.alive = False
            return
        for lease in grant.leases if grant else ():
            self._begin(worker, lease)
        self._at(self.rng.uniform(1.0, POLL_S), lambda: self._poll(worker))

    def _begin(self, worker: Worker, lease: Lease) -> None:
        assert worker.incarnation == self.incarnation, "an earlier incarnation was granted a lease"
        assert lease.uid not in self.acknowledged or self.settings.bump, f"{lease.uid} was granted again after its outcome"
        self.granted[lease.uid] = self.granted.get(lease.uid, 0) + 1
        worker.held.add(lease.uid)
        version = worker.version
        self._at(self.rng.choice([0.2, 1.0, 3.0, 9.0]) * self.rng.uniform(0.5, 1.5), lambda: self._finish(worker, lease, version))

    def _finish(self, worker: Worker, lease: Lease, version: int) -> None:
        if not worker.alive:
            return
        if self.now < worker.silent_until:
            self._at(worker.silent_until - self.now + self.rng.uniform(0, 1), lambda: self._finish(worker, lease, version))
            return
        if lease.prompt.prompt_id in self.settings.poison or self.rng.random() < self.settings.crashes:
            self._crash_worker(worker)
            return
        if not worker.retired and self.rng.random() < self.settings.hangs:
            self._hang(worker)
            self._at(0, lambda: self._finish(worker, lease, version))
            return
        worker.held.discard(lease.uid)
        self._put(worker, self._outcome(lease, version))

    def _crash_worker(self, worker: Worker) -> None:
        worker.alive = False
        if worker in self.workers:
            self._replace(worker)

    def _hang(self, worker: Worker) -> None:
        """It falls silent; the supervisor may notice before it comes back."""
        worker.silent_until = self.now + self.rng.uniform(3, 5 * LEASE_S)
        if worker.silent_until > self.now + LEASE_S and self.rng.random() < 0.5:
            self._at(LEASE_S, lambda: self._replace(worker) if worker in self.workers else None)

    def _replace(self, worker: Worker) -> None:
        """The supervisor: give back what the worker held (or leave it to expire), start another."""
        worker.retired = True
        self.workers.remove(worker)
        incarnation = self.incarnation
        if self.rng.random() < 0.7:
            self._later(self.rng.uniform(0, 3), lambda: self.ledger.give_back(incarnation, worker.name) and None)
        self._later(self.rng.uniform(0, 3), self._start_worker)

    def _put(self, worker: Worker, outcome: Outcome) -> None:
        try:
            receipt = self.ledger.put(worker.incarnation, worker.name, [outcome])
        except FencedError:
            assert worker.incarnation < self.incarnation, "the newest incarnation was fenced off"
            worker.alive = False
            return
        assert worker.incarnation == self.incarnation, "an earlier incarnation was let in"
        assert receipt.accepted + receipt.duplicates + receipt.late == 1
        if receipt.accepted:
            assert outcome.uid not in self.acknowledged or self.settings.bump, f"{outcome.uid} was accepted twice"
            self.accepted += 1
            self.acknowledged[outcome.uid] = outcome
        if self.rng.random() < self.settings.repeats:
            self._at(self.rng.uniform(0, 20), lambda: self._put(worker, outcome) if worker.alive else None)

    def _outcome(self, lease: Lease, version: int) -> Outcome:
        """What generation gives: a function of the uid and the weights, as with seeded sampling."""
        draw = int.from_bytes(blake2b(f"{self.content_seed}/{lease.uid}/{version}".encode(), digest_size=4).digest(), "big") / 2**32
        response = Completion(f"{lease.uid} {version}", (version, 2), FinishReason.STOP, version)
        if draw < self.settings.refusals:
            return Refusal(lease.uid, STAGE, lease.prompt.prompt_id, RefusalReason.IDENTICAL, "", response, None)
        refinement = replace(response, text=response.text + "!")
        return PreferencePair(lease.uid, STAGE, lease.prompt, (1,), response, refinement, "v1")

    # ---- checks ------------------------------------------------------------------------------------------------------------------

    def _check_batch(self, batch: Batch) -> None:
        uids = tuple(pair.uid for pair in batch.pairs)
        assert len(set(uids)) == self.settings.batch, f"step {batch.step} has pairs {uids}"
        known = self.recorded.setdefault(batch.step, uids)
        assert known == uids, f"step {batch.step} was {known} and is now {uids}"
        for pair in batch.pairs:
            assert self.acknowledged[pair.uid] == pair, f"{pair.uid} came back changed"
        if self.settings.staleness is not None and not batch.replayed:
            stalest = self.version - min(pair.version for pair in batch.pairs)
            assert stalest <= self.settings.staleness, f"step {batch.step} trains at staleness {stalest}"
            assert batch.version == self.version

    def _check_end(self) -> None:
        counts = self.ledger.counts(STAGE)
        assert list(self.trained) == list(range(1, self.step + 1))
        flat = [uid for uids in self.trained.values() for uid in uids]
        assert len(flat) == len(set(flat)), "a pair counts twice in the surviving weights"
        stored: dict[str, Outcome] = {pair.uid: pair for pair in self.ledger.pairs(STAGE)}
        stored |= {row.uid: row for row in self.ledger.refusals(STAGE) if row.reason is not RefusalReason.POISON}
        assert self.accepted == len(stored) + counts.stale, "an acknowledged outcome is gone"
        assert all(self.acknowledged[uid] == outcome for uid, outcome in stored.items())
        if not self.settings.bump:
            assert counts.stale == 0, "a driver in lockstep lost pairs to staleness"
        if not self.settings.crashes and not self.settings.hangs and not self.settings.driver_crashes:
            poisoned = {row.prompt_id for row in self.ledger.refusals(STAGE) if row.reason is RefusalReason.POISON}
            assert poisoned <= self.settings.poison, f"innocent prompts were called poison: {poisoned - self.settings.poison}"
        if self.exhausted:
            assert counts.ready < self.settings.batch
            all_have_outcomes = counts.waiting + counts.leased == 0
            enough = self.settings.max_pairs is not None and counts.ready + counts.assigned + counts.trained >= self.settings.max_pairs
            assert all_have_outcomes or enough, f"given up too early: {counts}"
        self._check_audit()

    def _check_audit(self) -> None:
        report = audit_database(self.anchor)
        assert report.ok, report.problems
