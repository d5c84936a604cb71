"""A small world around the ledger: virtual time, and workers, a learner and a driver that fail in every way, all drawn from one seed.

Used by the schedules. Every call crosses a ``_line`` that may lose the request, lose the answer, or deliver the request twice. The world
keeps its own record of what was stored and trained on and compares; the ledger's own books are checked by ``audit_database``. Nothing
sleeps and nothing runs in parallel: an event is one call at one virtual second. ``World.faults`` counts what happened.
"""

from __future__ import annotations

import heapq
import sqlite3
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from hashlib import blake2b
from itertools import count
from random import Random
from typing import Any

from sgpo_dist.buffer.admission import Hold
from sgpo_dist.buffer.audit import audit_database
from sgpo_dist.buffer.ledger import Ledger
from sgpo_dist.buffer.schema import open_database
from sgpo_dist.errors import FencedError, SgpoError
from sgpo_dist.records import Completion, FinishReason, Message, Outcome, PreferencePair, Prompt, Refusal, RefusalReason, Stage
from sgpo_dist.roles import Batch, BufferCounts, Lease, LeaseGrant, PutReceipt, StagePlan

STAGE = Stage.PREFERENCE
LEASE_S = 10.0
MAX_VIRTUAL_S = 20_000.0
BUSY_POLL_S = (1.5, 8.0)
IDLE_POLL_S = (3.0, 9.0)
DRIVER_POLL_S = 4.0
RETRY_S = 2.0
FIRST_VERSION = 3


class LostError(Exception):
    """A call without an answer: it may or may not have been executed."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One world. Rates are per finished generation, ``losses`` per call; the other faults are how often they happen.

    ``renumber``: a learner rebuilt within its driver's life publishes what it trains again under new numbers; else it publishes nothing
    until it is past the newest version.
    """

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
    losses: float = 0.0
    driver_crashes: int = 0
    buffer_restarts: int = 0
    learner_losses: int = 0
    clock_jumps: int = 0
    fallbacks: float = 0.0
    bump: int = 0
    renumber: bool = False
    poison: frozenset[str] = frozenset()
    max_attempts: int = 5

    def faultless(self) -> Settings:
        """The same world where everything goes right, with one worker."""
        return replace(
            self, workers=1, crashes=0.0, hangs=0.0, repeats=0.0, losses=0.0, driver_crashes=0, buffer_restarts=0, learner_losses=0,
            clock_jumps=0, fallbacks=0.0, bump=0,
        )  # fmt: skip

    @property
    def in_lockstep(self) -> bool:
        """Whether the version is a function of the step alone, so that no pair may be dropped as stale."""
        return not self.bump and not (self.renumber and self.learner_losses)

    @property
    def blames_nobody(self) -> bool:
        """Whether only a poison prompt can cost a lease."""
        return not (self.crashes or self.hangs or self.losses or self.driver_crashes or self.buffer_restarts)


def draw_settings(seed: int) -> Settings:
    """A world for ``seed``; every feature is off in some of them."""
    rng = Random(seed)
    batch, steps = rng.choice([1, 2, 2, 3]), rng.randint(2, 4)
    samples, epochs = rng.choice([1, 1, 2, 4]), rng.choice([1, 1, 2])
    prompts = max(2, rng.randint(2, batch * steps + 4) // (1 if samples * epochs < 4 else 2))
    return Settings(
        prompts=prompts,
        samples=samples,
        epochs=epochs,
        batch=batch,
        interval=rng.choice([1, 1, 2, 3]),
        staleness=rng.choice([0, 0, 1, 1, 2, 3, None]),
        max_pairs=rng.choice([None, batch * steps, batch * steps - 1]),
        steps=steps,
        workers=rng.randint(1, 3),
        concurrency=rng.randint(1, 5),
        save_every=rng.randint(1, 4),
        refusals=rng.choice([0.0, 0.2, 0.5]),
        crashes=rng.choice([0.0, 0.0, 0.15]),
        hangs=rng.choice([0.0, 0.0, 0.15]),
        repeats=rng.choice([0.0, 0.3]),
        losses=rng.choice([0.0, 0.0, 0.1, 0.2]),
        driver_crashes=rng.choice([0, 0, 1, 2]),
        buffer_restarts=rng.choice([0, 0, 1, 2]),
        learner_losses=rng.choice([0, 0, 1, 2]),
        clock_jumps=rng.choice([0, 0, 3]),
        fallbacks=rng.choice([0.0, 0.7]),
        bump=rng.choice([0, 0, 0, 0, 2]),
        renumber=rng.random() < 0.3,
        poison=frozenset(f"p{n}" for n in range(prompts) if rng.random() < rng.choice([0.0, 0.0, 0.1])),
    )


def draw_rough_settings(seed: int) -> Settings:
    """A world of many steps, wide bounds and frequent faults, to press on the staleness arithmetic."""
    rng = Random(seed)
    return replace(
        draw_settings(seed),
        prompts=30,
        steps=8,
        staleness=rng.choice([1, 2, 3]),
        interval=rng.choice([1, 1, 2]),
        batch=rng.choice([1, 2]),
        max_pairs=None,
        workers=3,
        crashes=0.15,
        hangs=0.2,
        bump=0,
        renumber=False,
        max_attempts=1000,
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


@cache
def _empty_database() -> sqlite3.Connection:
    """A database with its tables made, to copy: making them takes longer than many a schedule."""
    return open_database(":memory:", "OFF")


class World:
    """Run one world to its end; an AssertionError says what broke."""

    def __init__(self, settings: Settings, seed: int, content_seed: int | None = None) -> None:
        self.settings = settings
        self.rng = Random(seed)
        self.content_seed = seed if content_seed is None else content_seed
        self.faults: Counter[str] = Counter()
        self.now = 0.0
        self.offset = self.rng.uniform(0, 1e6)
        self.wall_offset = 0.0
        self.uri = f"file:world-{id(self)}-{seed}?mode=memory&cache=shared"
        self.anchor = sqlite3.connect(self.uri, uri=True, isolation_level=None)
        _empty_database().backup(self.anchor)
        self.ledger = self._open_ledger()
        self.prompts = [Prompt(f"p{n}", (Message("user", f"question {n}"),)) for n in range(settings.prompts)]
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.ticket = count()
        self.names = count()
        self.workers: list[Worker] = []
        self.life = 0
        self.learner = 0
        self.driving = False
        self.incarnation = 0
        self.step = 0
        self.version = self.on_workers = FIRST_VERSION
        self.first_version = FIRST_VERSION
        self.saved = [Saved(0, FIRST_VERSION)]
        self.trained: dict[int, tuple[str, ...]] = {}
        self.recorded: dict[int, tuple[str, ...]] = {}
        self.stored: dict[str, Outcome] = {}
        self.accepted = 0
        self.granted: dict[str, int] = {}
        self.done = False
        self.exhausted = False
        self.last_hold: Hold | None = None

    # ---- the whole ---------------------------------------------------------------------------------------------------------------

    def run(self) -> World:
        """Play the events until the driver is done, then check everything."""
        try:
            self._start_driver(self.saved[0])
            self._plan_faults()
            self._play()
            self._check_end()
        finally:
            self.ledger.close()
            self.anchor.close()
        return self

    def _plan_faults(self) -> None:
        horizon = 8.0 * self.settings.steps
        for times, fault in (
            (self.settings.driver_crashes, self._crash_driver),
            (self.settings.buffer_restarts, self._restart_buffer),
            (self.settings.learner_losses, self._lose_learner),
            (self.settings.clock_jumps, self._jump_clock),
        ):
            for _ in range(times):
                self._at(self.rng.uniform(1, horizon), fault)

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
            wall=lambda: self.now + self.wall_offset,
            synchronous="OFF",
            max_attempts=self.settings.max_attempts,
        )

    def _restart_buffer(self) -> None:
        """The buffer's process dies and comes back on its file, perhaps after a reboot with another monotonic clock."""
        self.faults["buffer restarted"] += 1
        self.ledger.close()
        self.offset = self.rng.uniform(0, 1e6)
        self.ledger = self._open_ledger()

    def _jump_clock(self) -> None:
        """Somebody sets the machine's clock, by seconds or by years. Only the monotonic one may matter."""
        self.faults["clock set"] += 1
        self.wall_offset += self.rng.choice([-1, 1]) * 10 ** self.rng.uniform(0, 8)

    # ---- the line ----------------------------------------------------------------------------------------------------------------

    def _line(self, method: str, *arguments: Any) -> Any:
        """One call of the ledger over a line that loses and doubles. Raises LostError where the caller hears nothing."""
        rate = self.settings.losses
        if rate and self.rng.random() < rate:
            return self._bad_line(method, arguments)
        return self._execute(method, arguments)

    def _bad_line(self, method: str, arguments: tuple[Any, ...]) -> Any:
        kind = self.rng.choice(["request lost", "answer lost", "request doubled"])
        self.faults[kind] += 1
        if kind == "request lost":
            raise LostError
        answer = self._execute(method, arguments)
        if kind == "answer lost":
            raise LostError
        if method != "begin_incarnation":  # a driver fenced off by its own echo starts again: that is "driver restarted"
            self._at(self.rng.uniform(0, 15), lambda: self._echo(method, arguments))
        return answer

    def _echo(self, method: str, arguments: tuple[Any, ...]) -> None:
        """A request arrives again, late; nobody hears the answer."""
        try:
            self._execute(method, arguments)
        except SgpoError:
            self.faults["late request refused"] += 1

    def _execute(self, method: str, arguments: tuple[Any, ...]) -> Any:
        answer = getattr(self.ledger, method)(*arguments)
        if method == "put":
            self._witness(arguments[0], arguments[2][0], answer)
        return answer

    def _witness(self, incarnation: int, outcome: Outcome, receipt: PutReceipt) -> None:
        """What the ledger says it did with an outcome, whether or not the worker hears it."""
        assert incarnation == self.incarnation, "an earlier incarnation was let in"
        assert receipt.accepted + receipt.duplicates + receipt.late == 1
        self.faults["put repeated"] += receipt.duplicates
        self.faults["put too late"] += receipt.late
        if receipt.accepted:
            assert outcome.uid not in self.stored or not self.settings.in_lockstep, f"{outcome.uid} was accepted twice"
            self.accepted += 1
            self.stored[outcome.uid] = outcome
        elif receipt.duplicates:
            known = outcome.uid in self.stored or any(row.uid == outcome.uid for row in self.ledger.refusals(STAGE))
            assert known, f"{outcome.uid} is called a duplicate of nothing"

    # ---- the driver --------------------------------------------------------------------------------------------------------------

    def plan(self) -> StagePlan:
        s = self.settings
        return StagePlan(STAGE, 7, s.batch, s.interval, s.staleness, s.max_pairs, s.samples, s.epochs, LEASE_S)

    def _later(self, delay: float, event: Callable[[], None]) -> None:
        """An event of this driver's story; it is forgotten when the driver or its learner dies."""
        now = (self.life, self.learner)
        self._at(delay, lambda: event() if now == (self.life, self.learner) else None)

    def _for_fleet(self, delay: float, event: Callable[[], None]) -> None:
        """An event of this driver's fleet; it outlives the learner."""
        life = self.life
        self._at(delay, lambda: event() if life == self.life else None)

    def _ask(self, then: Callable[[Any], None], method: str, *arguments: Any) -> None:
        """The driver's call: repeated until it is answered."""
        try:
            answer = self._line(method, *arguments)
        except LostError:
            self._later(self.rng.uniform(0.1, RETRY_S), lambda: self._ask(then, method, *arguments))
            return
        then(answer)

    def _start_driver(self, saved: Saved) -> None:
        """A driver's first call; without its answer everybody else may be fenced off all the same."""
        try:
            self._line("begin_incarnation")
        except LostError:
            self._for_fleet(self.rng.uniform(0.1, RETRY_S), lambda: self._start_driver(saved))
            return
        finally:
            self.incarnation = int(self.anchor.execute("SELECT value FROM meta WHERE key = 'incarnation'").fetchone()[0])
        self.step, self.version = saved.step, saved.version + (self.settings.bump if self.life else 0)
        self._forget_after(saved.step)
        if self.rng.random() < 0.5:  # the story publishes before it opens the stage
            self._ask(lambda _: self._open_stage(), "advance", self.incarnation, STAGE, self.version)
        else:
            self._open_stage()

    def _open_stage(self) -> None:
        self._ask(lambda _: self._begin_work(), "open_stage", self.incarnation, self.plan(), self.prompts, self.version)

    def _begin_work(self) -> None:
        assert self.ledger.counts(STAGE).leased == 0, "leases outlived the driver that granted them"
        self.driving, self.on_workers = True, self.version
        for _ in range(self.settings.workers):
            self._start_worker()
        self._later(self.rng.uniform(0, 2), self._drive)

    def _forget_after(self, step: int) -> None:
        """The weights are those of ``step`` again: what was trained after it does not count, and versions follow the steps from here."""
        self.first_version = self.version - step // self.settings.interval
        self.trained = {known: uids for known, uids in self.trained.items() if known <= step}

    def _last_saved(self) -> Saved:
        """The newest checkpoint, or the one before it when that one is damaged."""
        if len(self.saved) > 1 and self.rng.random() < self.settings.fallbacks:
            self.faults["checkpoint damaged"] += 1
            del self.saved[-1]
        return self.saved[-1]

    def _crash_driver(self) -> None:
        """The driver dies or lives on as a zombie, and so do its workers; another driver resumes from a checkpoint."""
        self.faults["driver restarted"] += 1
        self.life += 1
        self.driving = False
        for worker in self.workers:
            worker.alive = worker.alive and self.rng.random() < 0.5
        zombies, self.workers = self.workers, []
        saved, incarnation = self._last_saved(), self.incarnation
        delay = self.rng.uniform(0, 5)
        self._for_fleet(delay, lambda: self._start_driver(saved))
        if self.rng.random() < 0.5:
            self._at(delay + self.rng.uniform(0, 9), lambda: self._zombie_driver(incarnation))
        for worker in zombies:
            self._at(self.rng.uniform(0, 9), lambda worker=worker: self._poll(worker))

    def _zombie_driver(self, incarnation: int) -> None:
        """A driver that should be dead tries everything that a driver may."""
        if incarnation == self.incarnation:
            return
        self.faults["old driver refused"] += 1
        for call in (
            partial(self.ledger.assign, incarnation, STAGE, self.step + 1),
            partial(self.ledger.advance, incarnation, STAGE, self.version + 1),
            partial(self.ledger.commit, incarnation, STAGE, self.step),
            partial(self.ledger.open_stage, incarnation, self.plan(), self.prompts, self.version),
        ):
            try:
                call()
            except FencedError:
                continue
            raise AssertionError(f"a driver of incarnation {incarnation} was let in by incarnation {self.incarnation}")

    def _lose_learner(self) -> None:
        """The learner dies; the same driver gives a new one the newest checkpoint and asks for the steps after it again."""
        if not self.driving:
            return
        self.faults["learner lost"] += 1
        self.learner += 1
        saved = self._last_saved()
        self.step = saved.step
        known = self.first_version
        self._forget_after(saved.step)
        if not self.settings.renumber:
            self.first_version = known
        self._later(self.rng.uniform(0, 8), self._drive)

    def _drive(self) -> None:
        self._ask(self._assigned, "assign", self.incarnation, STAGE, self.step + 1)

    def _assigned(self, answer: Batch | Hold | None) -> None:
        if isinstance(answer, Hold):
            self.last_hold = answer
            self.faults[f"held: {answer.name}"] += 1
            self._later(DRIVER_POLL_S, self._drive)
        elif answer is None:
            self.done = self.exhausted = True
        else:
            self.faults["batch replayed"] += answer.replayed
            self._check_batch(answer)
            self._later(self.rng.uniform(0.1, 6), lambda: self._stepped(answer))

    def _stepped(self, batch: Batch) -> None:
        self.step = batch.step
        self.trained[batch.step] = tuple(pair.uid for pair in batch.pairs)
        if self._version_of(batch.step) <= self.version:
            self._save_if_due()
            return
        version, duration = self.version + 1, self.rng.uniform(0.1, 4)
        for worker in self.workers:
            self._later(self.rng.uniform(0, duration), lambda worker=worker: self._receive(worker, version))
        self._later(duration, lambda: self._published(version))

    def _version_of(self, step: int) -> int:
        """The version of the weights after ``step``; while a new learner catches up, older than what the workers have."""
        return self.first_version + step // self.settings.interval

    def _receive(self, worker: Worker, version: int) -> None:
        if self.now >= worker.silent_until:
            worker.version = max(worker.version, version)

    def _published(self, version: int) -> None:
        """Whoever did not prove the version is retired: it may still put what it began, but leases no more."""
        self.on_workers = version
        for worker in [worker for worker in self.workers if worker.version < version]:
            self._receive(worker, version)
            if worker.version < version:
                self._replace(worker)
        self._ask(lambda _: self._advanced(version), "advance", self.incarnation, STAGE, version)

    def _advanced(self, version: int) -> None:
        self.version = version
        self._save_if_due()

    def _save_if_due(self) -> None:
        if self.step % self.settings.save_every == 0:
            self.saved.append(Saved(self.step, self._version_of(self.step)))
            step = self.step
            self._later(0.3, lambda: self._ask(lambda _: self._next_step(), "commit", self.incarnation, STAGE, step))
        else:
            self._next_step()

    def _next_step(self) -> None:
        if self.step >= self.settings.steps:
            self.done = True
        else:
            self._drive()

    # ---- the workers -------------------------------------------------------------------------------------------------------------

    def _start_worker(self) -> None:
        worker = Worker(f"w{next(self.names)}", self.incarnation, self.on_workers)
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
            for lease in self._grants(worker):
                self._begin(worker, lease)
            pause = self.rng.uniform(*(BUSY_POLL_S if worker.held else IDLE_POLL_S))
        except FencedError:
            self._fenced(worker)
            return
        except LostError:
            pause = self.rng.uniform(0.1, RETRY_S)
        self._at(pause, lambda: self._poll(worker))

    def _grants(self, worker: Worker) -> tuple[Lease, ...]:
        self._line("renew", worker.incarnation, worker.name, sorted(worker.held))
        free = self.settings.concurrency - len(worker.held)
        if not free:
            return ()
        grant: LeaseGrant = self._line("lease", worker.incarnation, worker.name, STAGE, free)
        return grant.leases

    def _fenced(self, worker: Worker) -> None:
        assert worker.incarnation < self.incarnation, "the newest incarnation was fenced off"
        self.faults["old worker refused"] += 1
        worker.alive = False

    def _begin(self, worker: Worker, lease: Lease) -> None:
        assert worker.incarnation == self.incarnation, "an earlier incarnation was granted a lease"
        assert lease.uid not in self.stored or not self.settings.in_lockstep, f"{lease.uid} was granted again after its outcome"
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
        if lease.prompt.prompt_id in self.settings.poison:
            self._crash_worker(worker, "poison prompt")
        elif self.rng.random() < self.settings.crashes:
            self._crash_worker(worker, "worker killed")
        elif not worker.retired and self.rng.random() < self.settings.hangs:
            self._hang(worker)
            self._at(0, lambda: self._finish(worker, lease, version))
        else:
            self._put(worker, self._outcome(lease, version))

    def _crash_worker(self, worker: Worker, why: str) -> None:
        self.faults[why] += 1
        worker.alive = False
        if worker in self.workers:
            self._replace(worker)

    def _hang(self, worker: Worker) -> None:
        """It falls silent; the supervisor may notice before it comes back."""
        self.faults["worker hung"] += 1
        worker.silent_until = self.now + self.rng.uniform(3, 4 * LEASE_S)
        if worker.silent_until > self.now + LEASE_S and self.rng.random() < 0.5:
            self._at(LEASE_S, lambda: self._replace(worker) if worker in self.workers else None)

    def _replace(self, worker: Worker) -> None:
        """The supervisor: give back what the worker held (or leave it to expire), start another."""
        worker.retired = True
        self.workers.remove(worker)
        if self.rng.random() < 0.7:
            self._for_fleet(self.rng.uniform(0, 3), lambda: self._give_back(worker))
        self._for_fleet(self.rng.uniform(0, 3), self._start_worker)

    def _give_back(self, worker: Worker) -> None:
        try:
            self._line("give_back", self.incarnation, worker.name)
        except LostError:
            self._for_fleet(self.rng.uniform(0.1, RETRY_S), lambda: self._give_back(worker))

    def _put(self, worker: Worker, outcome: Outcome) -> None:
        """Repeated until it is answered, and sometimes after."""
        if not worker.alive:
            return
        try:
            self._line("put", worker.incarnation, worker.name, [outcome])
        except FencedError:
            self._fenced(worker)
            return
        except LostError:
            self._at(self.rng.uniform(0.1, RETRY_S), lambda: self._put(worker, outcome))
            return
        worker.held.discard(outcome.uid)
        if worker.retired:
            self.faults["late writer"] += 1
        if self.rng.random() < self.settings.repeats:
            self._at(self.rng.uniform(0, 20), lambda: self._put(worker, outcome))

    def _outcome(self, lease: Lease, version: int) -> Outcome:
        """What generation gives: a function of the uid and the weights, as with seeded sampling."""
        draw = int.from_bytes(blake2b(f"{self.content_seed}/{lease.uid}/{version}".encode(), digest_size=4).digest(), "big") / 2**32
        response = Completion(f"{lease.uid} {version}", (version, 2), FinishReason.STOP, version)
        if draw < self.settings.refusals:
            self.faults["refusal"] += 1
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
            assert self.stored[pair.uid] == pair, f"{pair.uid} came back changed"
        if self.settings.staleness is not None and not batch.replayed:
            stalest = self.version - min(pair.version for pair in batch.pairs)
            assert stalest <= self.settings.staleness, f"step {batch.step} trains at staleness {stalest}"
            assert batch.version == self.version, f"step {batch.step} is journalled at version {batch.version}, it is {self.version}"

    def _check_end(self) -> None:
        counts = self.ledger.counts(STAGE)
        self.faults["lease expired"] += counts.expired_leases
        self.faults["pair dropped as stale"] += counts.stale
        assert counts.version == self.version
        self._check_trained()
        poisoned = self._check_outcomes(counts)
        calm = self.settings.blames_nobody
        if calm:
            assert poisoned <= self.settings.poison, f"innocent prompts were called poison: {poisoned - self.settings.poison}"
        if calm and not self.settings.poison:
            assert counts.expired_leases == 0, "a lease of a live worker ran out"
        if self.settings.in_lockstep:
            assert counts.stale == 0, "a driver in lockstep lost pairs to staleness"
        if self.exhausted:
            self._check_exhausted(counts)
        self._check_audit()

    def _check_trained(self) -> None:
        """Each pair at most once in the surviving weights, steps without gaps."""
        assert list(self.trained) == list(range(1, self.step + 1))
        flat = [uid for uids in self.trained.values() for uid in uids]
        assert len(flat) == len(set(flat)), "a pair counts twice in the surviving weights"

    def _check_outcomes(self, counts: BufferCounts) -> set[str]:
        """Nothing stored is gone or changed, and every prompt has one place. Returns the prompts called poison."""
        pairs, refusals = self.ledger.pairs(STAGE), self.ledger.refusals(STAGE)
        kept: dict[str, Outcome] = {row.uid: row for row in (*pairs, *refusals) if not _is_poison(row)}
        assert self.accepted == len(kept) + counts.stale, "a stored outcome is gone"
        assert all(self.stored[uid] == outcome for uid, outcome in kept.items()), "an outcome came back changed"
        s, places = self.settings, len(pairs) + len(refusals) + counts.waiting + counts.leased
        assert places == s.prompts * s.samples * s.epochs, f"{places} places for {s.prompts} prompts"
        return {row.prompt_id for row in refusals if _is_poison(row)}

    def _check_exhausted(self, counts: BufferCounts) -> None:
        assert counts.ready < self.settings.batch
        all_have_outcomes = counts.waiting + counts.leased == 0
        enough = self.settings.max_pairs is not None and counts.ready + counts.assigned + counts.trained >= self.settings.max_pairs
        assert all_have_outcomes or enough, f"given up too early: {counts}"

    def _check_audit(self) -> None:
        report = audit_database(self.anchor)
        assert report.ok, report.problems


def _is_poison(row: Outcome) -> bool:
    return isinstance(row, Refusal) and row.reason is RefusalReason.POISON
