"""The ledger: which prompt is where, which pairs exist, and which pairs each step trained on. One SQLite file is the truth.

Called by ``service.PairBuffer`` inside its one thread, and by tests and simulations directly. Synchronous: a method is one transaction
and never waits for anybody; ``assign`` answers with the reason (``Hold``) when a batch cannot be formed yet. Clocks are passed in. What
bounds generation is in ``admission``, what a column holds in ``codec`` and ``schema``.

Decisions worth knowing:

* Every write carries the incarnation of its driver and is refused (FencedError) when it is not the newest. Starting an incarnation returns
  all leases, because their holders can no longer put.
* Leases survive a restart of the buffer itself: their deadlines start afresh when the file is opened.
* A lease that expires, or is given back by a crash, is held against its prompt; after ``max_attempts`` such failures the prompt becomes
  a POISON refusal. A crash takes all prompts of a worker with it, so from ``SUSPECT_AFTER`` failures on a prompt is generated alone on its
  worker: it then answers only for itself, and innocent neighbours of a poison prompt do not become refusals.
* A pair older than every lease its prompt ever had in this incarnation came from a worker with unproved weights: RunFailed. A pair whose
  lease was lost is late: it is taken when nobody else delivered and the staleness invariant still holds with it, else turned away and
  counted.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from functools import cache
from pathlib import Path
from typing import Any, Final

from sgpo_dist.buffer import codec
from sgpo_dist.buffer.admission import Admission, Hold, Tally
from sgpo_dist.buffer.schema import mapped_errors, open_database
from sgpo_dist.errors import DataError, FencedError, RunFailed, SgpoError
from sgpo_dist.records import Outcome, PreferencePair, Prompt, Refusal, RefusalReason, Stage, outcome_uid
from sgpo_dist.roles import Batch, BufferCounts, Lease, LeaseGrant, PutReceipt, StagePlan

Row = tuple[Any, ...]

MAX_ATTEMPTS: Final = 5
SUSPECT_AFTER: Final = 2
WRITES: Final = ("begin", "open_stage", "advance", "lease", "put", "assign", "commit")
CRASH_POINTS: Final = (
    *(f"ledger.{write}.{moment}" for write in WRITES for moment in ("written", "committed")),
    "ledger.backup.copied",
    "ledger.backup.synced",
    "ledger.backup.renamed",
)
"""Every place where a test can kill the process: before and after the COMMIT of each write, and inside a backup."""


@dataclass(frozen=True, slots=True)
class PutRequest:
    """One caller's outcomes, as they wait for the group commit."""

    incarnation: int
    worker_id: str
    outcomes: tuple[Outcome, ...]


class _Verdict(Enum):
    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    LATE = "late"


class _Alignment(IntEnum):
    """Whether ``base_version`` was tied to this incarnation's versions: not yet, for good, or to be looked at again at the next new step."""

    NONE = 0
    DONE = 1
    REPLAYING = 2


@dataclass(frozen=True, slots=True)
class _OpenStage:
    """A row of ``stages``, as far as the rules need it."""

    stage: Stage
    lease_s: float
    incarnation: int
    version: int
    alignment: _Alignment
    last_step: int
    admission: Admission


_StageOf = Callable[[Stage, int], _OpenStage]


@dataclass(frozen=True, slots=True)
class _Order:
    """A row of ``orders`` that may move."""

    uid: str
    stage: Stage
    prompt_id: str
    state: str
    worker: str | None
    version: int | None
    oldest_grant: int | None
    failures: int


class Ledger:
    """See the head of the file. ``clock`` gives monotonic seconds (deadlines), ``wall`` gives Unix seconds (the journal of versions)."""

    def __init__(
        self,
        path: str | Path,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
        synchronous: str = "FULL",
        max_attempts: int = MAX_ATTEMPTS,
        crash_point: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._path = str(path)
        self._crash_point = crash_point
        self._clock = clock
        self._wall = wall
        self._max_attempts = max_attempts
        self._db = open_database(self._path, synchronous)
        self._restart_leases()

    def close(self) -> None:
        """Close the file; nothing is lost without it."""
        self._db.close()

    # ---- incarnations and stages ------------------------------------------------------------------------------------------------

    def begin_incarnation(self) -> int:
        """A new driver owns the run: fences off all earlier ones and returns their leases. Returns its number, from 1."""
        with self._transaction(name="begin"):
            self._db.execute("UPDATE meta SET value = value + 1 WHERE key = 'incarnation'")
            held = self._orders("WHERE state = 'leased' ORDER BY stage, position")
            self._release(held, blame=False)
            self._db.execute("UPDATE orders SET oldest_grant = NULL WHERE oldest_grant IS NOT NULL AND state = 'waiting'")
            return self._incarnation()

    def open_stage(self, incarnation: int, plan: StagePlan, prompts: Sequence[Prompt], version: int) -> None:
        """Register a stage's prompts, epoch by epoch in the order given, and set the current version.

        Again with the same plan it changes nothing but the version, ``lease_s`` and ``max_pairs``; prompts not seen before go to the end.
        Raises DataError for a prompt whose content changed or an id used twice, RunFailed for another plan.
        """
        with self._transaction(incarnation, "open_stage"):
            self._open_plan(incarnation, plan, version)
            fresh = self._unknown(plan.stage, prompts)
            self._db.executemany("INSERT INTO prompts VALUES (?, ?, ?, ?, ?, ?)", (codec.pack_prompt(plan.stage, p) for p in fresh))
            self._register(plan, fresh)
            self._db.execute("UPDATE stages SET lease_s = ?, max_pairs = ? WHERE stage = ?", (plan.lease_s, plan.max_pairs, plan.stage))

    def advance(self, incarnation: int, stage: Stage, version: int) -> None:
        """``version`` is now current. Repeating the current one is harmless; a lower one than this incarnation reached is RunFailed.

        A stage that is not open (yet) has nobody to grant room to: the version is journalled, and ``open_stage`` will set it.
        """
        with self._transaction(incarnation, "advance"):
            self._set_version(stage, incarnation, version, "advance")

    # ---- leases -----------------------------------------------------------------------------------------------------------------

    def lease(self, incarnation: int, worker_id: str, stage: Stage, limit: int) -> LeaseGrant:
        """Grant at most ``limit`` prompts, lowest positions first, and only as many as there is room for."""
        with self._transaction(incarnation, "lease"):
            self._expire()
            known = self._stage(stage, incarnation)
            tally = self._tally(stage)
            room = known.admission.room(tally, known.version)
            granted = self._grantable(stage, worker_id, limit if room is None else min(limit, room))
            leases = tuple(self._grant(known, worker_id, columns) for columns in granted)
            return LeaseGrant(leases, exhausted=not leases and known.admission.exhausted(tally))

    def renew(self, incarnation: int, worker_id: str, uids: Sequence[str]) -> int:
        """Extend the deadlines of those leases of a worker that it names; returns how many of them it holds.

        It has to name them: a grant whose answer was lost belongs to nobody, and must not live as long as its worker does.
        """
        with self._transaction(incarnation):
            return self._db.execute(
                "UPDATE orders SET deadline = ? + (SELECT lease_s FROM stages WHERE stages.stage = orders.stage)"
                " WHERE state = 'leased' AND worker = ? AND uid IN (SELECT value FROM json_each(?))",
                (self._clock(), worker_id, json.dumps(list(uids))),
            ).rowcount

    def give_back(self, incarnation: int, worker_id: str, *, crashed: bool = True) -> int:
        """Return all leases of a worker that ended. ``crashed`` False holds nothing against the prompts (an orderly end)."""
        with self._transaction(incarnation):
            held = self._orders("WHERE state = 'leased' AND worker = ? ORDER BY position", worker_id)
            self._release(held, blame=crashed)
            for order in held:
                self._count(order.stage, "returned_leases", 1)
            return len(held)

    def expire(self) -> int:
        """Return every lease past its deadline; returns how many there were."""
        with self._transaction():
            return self._expire()

    # ---- outcomes ---------------------------------------------------------------------------------------------------------------

    def put(self, incarnation: int, worker_id: str, outcomes: Sequence[Outcome]) -> PutReceipt:
        """Store outcomes in one transaction. Idempotent by uid. See the head of the file for late ones."""
        answer = self.put_group([PutRequest(incarnation, worker_id, tuple(outcomes))])[0]
        if isinstance(answer, SgpoError):
            raise answer
        return answer

    def put_group(self, requests: Sequence[PutRequest]) -> list[PutReceipt | SgpoError]:
        """Many callers' outcomes in one transaction; a caller whose outcomes are refused gets its error, the others their receipts."""
        with self._transaction(name="put"):
            stage = cache(self._stage)  # no put changes it
            return [self._put_one(request, stage) for request in requests]

    # ---- batches ----------------------------------------------------------------------------------------------------------------

    def assign(self, incarnation: int, stage: Stage, step: int) -> Batch | Hold | None:
        """The batch of ``step``, journalled; why it must wait; or None when it can never be filled (no short batch is formed).

        A step in the journal gives the recorded pairs in the recorded order. Otherwise the oldest ready pairs, by version then position.
        A driver that went back to recorded steps may number the weights on its way as it likes, if they only go up; at the first new step
        the version that the step trains must be current.
        """
        with self._transaction(incarnation, "assign"):
            self._expire()
            known = self._align(self._stage(stage, incarnation), step)
            if step <= known.last_step:
                return self._replay(stage, step)
            return self._form(known, incarnation, step)

    def commit(self, incarnation: int, stage: Stage, step: int) -> int:
        """A checkpoint holds everything up to ``step``: those rows become trained. Returns how many changed (0 if no batch was formed)."""
        with self._transaction(incarnation, "commit"):
            row = self._db.execute("SELECT last_step FROM stages WHERE stage = ?", (stage,)).fetchone()
            last_step = int(row[0]) if row else 0
            if last_step and step > last_step:
                raise RunFailed(f"stage {stage}: commit of step {step}, but the last assigned step is {last_step}")
            covered = min(step, last_step)
            self._db.execute("UPDATE stages SET committed_step = MAX(committed_step, ?) WHERE stage = ?", (covered, stage))
            return self._db.execute(
                "UPDATE orders SET state = 'trained' WHERE state = 'assigned' AND stage = ? AND step <= ?", (stage, covered)
            ).rowcount

    def restore(self, incarnation: int, stage: Stage, step: int) -> int:
        """The run goes on from a checkpoint that holds everything up to ``step``: rows of later steps are assigned again, to be replayed.

        Returns how many rows changed. A checkpoint that came after this one was damaged, or a kill fell between a checkpoint and its commit.
        """
        with self._transaction(incarnation, "commit"):
            self._db.execute("UPDATE stages SET committed_step = MIN(?, last_step) WHERE stage = ?", (step, stage))
            return self._db.execute(
                "UPDATE orders SET state = CASE WHEN step > ? THEN 'assigned' ELSE 'trained' END"
                " WHERE stage = ? AND (state = 'trained' AND step > ? OR state = 'assigned' AND step <= ?)",
                (step, stage, step, step),
            ).rowcount

    # ---- reading ----------------------------------------------------------------------------------------------------------------

    def settled(self, stage: Stage) -> bool:
        """Whether no prompt of the stage will be granted again: each has its outcome, or ``max_pairs`` are stored."""
        with self._transaction():
            self._expire()
            return self._stage(stage).admission.exhausted(self._tally(stage))

    def pairs(self, stage: Stage) -> list[PreferencePair]:
        """All pairs of a stage in prompt order."""
        with self._transaction():
            rows = self._db.execute(_SELECT_PAIR + "WHERE orders.stage = ? ORDER BY orders.position", (stage,))
            return [_pair(row) for row in rows]

    def refusals(self, stage: Stage) -> list[Refusal]:
        """All refusals of a stage in prompt order."""
        with self._transaction():
            rows = self._db.execute(_SELECT_REFUSAL, (stage,))
            return [codec.unpack_refusal(uid, stage_name, prompt_id, tuple(rest)) for uid, stage_name, prompt_id, *rest in rows]

    def counts(self, stage: Stage) -> BufferCounts:
        """A consistent picture of a stage."""
        with self._transaction():
            known, tally, counted = self._stage(stage), self._tally(stage), self._counters(stage)
        return BufferCounts(
            waiting=tally.waiting,
            leased=tally.num_leased,
            ready=tally.num_ready,
            assigned=tally.assigned,
            trained=tally.trained,
            refused={name.removeprefix("refused_"): n for name, n in counted.items() if name.startswith("refused_")},
            capacity=known.admission.capacity,
            version=known.version,
            duplicates=counted.get("duplicates", 0),
            late=counted.get("late", 0),
            expired_leases=counted.get("expired_leases", 0),
            returned_leases=counted.get("returned_leases", 0),
            stale=counted.get("stale", 0),
        )

    def backup(self, path: str | Path) -> None:
        """A consistent copy as one file without a write-ahead log, complete on disk or absent.

        The log is folded into the file itself too: whatever becomes of the log later, the file holds what the copy holds.
        """
        final = Path(path)
        partial = final.with_name(final.name + ".partial")
        partial.unlink(missing_ok=True)
        with mapped_errors(str(final)):
            copy = sqlite3.connect(partial)
            try:
                self._db.backup(copy)
                copy.execute("PRAGMA journal_mode = DELETE")
            finally:
                copy.close()
            self._crash_point("ledger.backup.copied")
            _sync(partial)
            self._crash_point("ledger.backup.synced")
            partial.replace(final)
            self._crash_point("ledger.backup.renamed")
            _sync(final.parent)
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)")

    # ---- transactions and rows --------------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self, incarnation: int | None = None, name: str = "other") -> Iterator[None]:
        """All or nothing, one writer at a time; ``incarnation`` (of a writer) must be the newest. ``name`` names its crash points."""
        with mapped_errors(self._path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                if incarnation is not None:
                    self._fence(incarnation)
                yield
                self._crash_point(f"ledger.{name}.written")
                self._db.execute("COMMIT")
                self._crash_point(f"ledger.{name}.committed")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _incarnation(self) -> int:
        return int(self._db.execute("SELECT value FROM meta WHERE key = 'incarnation'").fetchone()[0])

    def _fence(self, incarnation: int) -> None:
        newest = self._incarnation()
        if incarnation != newest:
            raise FencedError(f"incarnation {incarnation} is fenced off: incarnation {newest} owns this run; end this process")

    def _restart_leases(self) -> None:
        """Deadlines of another process (or boot) mean nothing to this clock: all start afresh."""
        with self._transaction():
            self._db.execute(
                "UPDATE orders SET deadline = ? + (SELECT lease_s FROM stages WHERE stages.stage = orders.stage) WHERE state = 'leased'",
                (self._clock(),),
            )

    def _stage(self, stage: Stage, incarnation: int | None = None) -> _OpenStage:
        row = self._db.execute(_SELECT_STAGE, (stage,)).fetchone()
        if row is None:
            raise RunFailed(f"stage {stage} is not open in the buffer: call open_stage first")
        lease_s, opened_by, version, aligned, last_step, *numbers = row
        if incarnation is not None and opened_by != incarnation:
            raise RunFailed(f"stage {stage} was opened by incarnation {opened_by}, not {incarnation}: call open_stage after a resume")
        return _OpenStage(Stage(stage), lease_s, opened_by, version, _Alignment(aligned), last_step, Admission(*numbers))

    def _tally(self, stage: Stage) -> Tally:
        whole = {"waiting": 0, "assigned": 0, "trained": 0, "refused": 0}
        by_version: dict[str, dict[int, int]] = {"leased": {}, "ready": {}}
        for state, version, n in self._db.execute("SELECT state, version, n FROM tally WHERE stage = ? AND n > 0", (stage,)):
            if state in by_version:
                by_version[state][version] = n
            else:
                whole[state] = n
        return Tally(leased=by_version["leased"], ready=by_version["ready"], **whole)

    def _orders(self, where: str, *values: str | float) -> list[_Order]:
        rows = self._db.execute(_SELECT_ORDER + where, values)
        return [_Order(uid, Stage(stage), *rest) for uid, stage, *rest in rows]

    def _count(self, stage: Stage, name: str, n: int) -> None:
        self._db.execute("INSERT INTO counters VALUES (?, ?, ?) ON CONFLICT (stage, name) DO UPDATE SET n = n + excluded.n", (stage, name, n))

    def _counters(self, stage: Stage) -> dict[str, int]:
        return dict(self._db.execute("SELECT name, n FROM counters WHERE stage = ? ORDER BY name", (stage,)).fetchall())

    # ---- opening a stage --------------------------------------------------------------------------------------------------------

    def _open_plan(self, incarnation: int, plan: StagePlan, version: int) -> None:
        """Insert the stage, or check that it is the same one and take the version over."""
        identity = (plan.run_seed, plan.batch_size, plan.weight_sync_interval, plan.max_staleness, plan.samples_per_prompt, plan.epochs)
        row = self._db.execute(_SELECT_IDENTITY, (plan.stage,)).fetchone()
        if row is None:
            values = (plan.stage, *identity, plan.max_pairs, plan.lease_s, incarnation, version, version)
            self._db.execute(_INSERT_STAGE, values)
            self._set_version(plan.stage, incarnation, version, "open")
            return
        *known, opened_by, current = row
        _same_identity(plan.stage, dict(zip(_IDENTITY, known, strict=True)), dict(zip(_IDENTITY, identity, strict=True)))
        if opened_by != incarnation:
            self._db.execute("UPDATE stages SET incarnation = ?, aligned = 0 WHERE stage = ?", (incarnation, plan.stage))
            self._set_version(plan.stage, incarnation, version, "open")
        elif version != current:
            raise RunFailed(f"stage {plan.stage} is open at version {current}: use advance, not open_stage, to reach version {version}")

    def _set_version(self, stage: Stage, incarnation: int, version: int, event: str) -> None:
        """Journal a version, which only goes up within an incarnation, and make it current where the stage is open."""
        newest = self._db.execute("SELECT MAX(version) FROM versions WHERE incarnation = ?", (incarnation,)).fetchone()[0]
        if newest is not None and version < newest:
            raise RunFailed(f"stage {stage}: version {version} is older than {newest}, which this incarnation reached; versions only go up")
        if event == "open" or version != newest:
            self._db.execute(
                "INSERT INTO versions (stage, incarnation, version, event, wall_time) VALUES (?, ?, ?, ?, ?)",
                (stage, incarnation, version, event, self._wall()),
            )
        self._db.execute("UPDATE stages SET version = ? WHERE stage = ? AND incarnation = ?", (version, stage, incarnation))

    def _unknown(self, stage: Stage, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts not registered yet. Raises DataError for a changed or doubled one."""
        known = dict(self._db.execute("SELECT prompt_id, digest FROM prompts WHERE stage = ?", (stage,)).fetchall())
        seen: set[str] = set()
        fresh = []
        for prompt in prompts:
            if prompt.prompt_id in seen:
                raise DataError(f"stage {stage}: prompt id '{prompt.prompt_id}' occurs twice; give every prompt its own id")
            seen.add(prompt.prompt_id)
            if prompt.prompt_id not in known:
                fresh.append(prompt)
            elif known[prompt.prompt_id] != codec.prompt_digest(prompt):
                raise DataError(f"stage {stage}: prompt '{prompt.prompt_id}' changed since the run began; changed data needs another run_name")
        return fresh

    def _register(self, plan: StagePlan, prompts: Sequence[Prompt]) -> None:
        """One order per (epoch, prompt, sample) in that nesting, after those already there."""
        start = int(self._db.execute("SELECT registered FROM stages WHERE stage = ?", (plan.stage,)).fetchone()[0])
        names = ((prompt.prompt_id, epoch, sample) for epoch in range(plan.epochs) for prompt in prompts for sample in range(plan.samples_per_prompt))
        self._db.executemany(
            "INSERT INTO orders (uid, stage, position, prompt_id, epoch, sample) VALUES (?, ?, ?, ?, ?, ?)",
            ((outcome_uid(plan.run_seed, plan.stage, *name), plan.stage, position, *name) for position, name in enumerate(names, start)),
        )
        total = start + len(prompts) * plan.epochs * plan.samples_per_prompt
        self._db.execute("UPDATE stages SET registered = ? WHERE stage = ?", (total, plan.stage))

    # ---- granting and releasing -------------------------------------------------------------------------------------------------

    def _grantable(self, stage: Stage, worker_id: str, limit: int) -> list[Row]:
        """The lowest waiting positions; a suspect only alone, so that a crash tells which prompt it was."""
        if limit <= 0:
            return []
        held, worst = self._db.execute("SELECT COUNT(*), MAX(failures) FROM orders WHERE state = 'leased' AND worker = ?", (worker_id,)).fetchone()
        if held and worst >= SUSPECT_AFTER:
            return []
        granted: list[Row] = []
        for *columns, failures in self._db.execute(_SELECT_WAITING, (stage, limit)).fetchall():
            if failures >= SUSPECT_AFTER:
                return granted if held or granted else [tuple(columns)]
            granted.append(tuple(columns))
        return granted

    def _grant(self, known: _OpenStage, worker_id: str, columns: Row) -> Lease:
        uid, epoch, sample, attempts, prompt_id, messages, reference, source = columns
        self._db.execute(
            "UPDATE orders SET state = 'leased', worker = ?, deadline = ?, version = ?, attempts = attempts + 1,"
            " oldest_grant = MIN(COALESCE(oldest_grant, ?), ?) WHERE uid = ?",
            (worker_id, self._clock() + known.lease_s, known.version, known.version, known.version, uid),
        )
        prompt = codec.unpack_prompt(prompt_id, messages, reference, source)
        return Lease(uid, known.stage, prompt, epoch, sample, known.version, attempts + 1)

    def _expire(self) -> int:
        # The plus signs keep SQLite from walking all orders in that order: the index on deadlines finds the few that count, sorted after.
        held = self._orders("WHERE state = 'leased' AND deadline <= ? ORDER BY +stage, +position", self._clock())
        self._release(held, blame=True)
        for order in held:
            self._count(order.stage, "expired_leases", 1)
        return len(held)

    def _release(self, held: Sequence[_Order], *, blame: bool) -> None:
        """Prompts go back to waiting; with blame they count a failure, and those with too many become POISON refusals."""
        for order in held:
            failures = order.failures + blame
            if failures >= self._max_attempts:
                self._poison(order, failures)
            else:
                self._to_waiting(order.uid, failures)

    def _to_waiting(self, uid: str, failures: int) -> None:
        self._db.execute(
            "UPDATE orders SET state = 'waiting', worker = NULL, deadline = NULL, version = NULL, failures = ? WHERE uid = ?",
            (failures, uid),
        )

    def _poison(self, order: _Order, failures: int) -> None:
        detail = f"{failures} workers ended or fell silent while they held this prompt"
        refusal = Refusal(order.uid, order.stage, order.prompt_id, RefusalReason.POISON, detail)
        self._db.execute("UPDATE orders SET failures = ? WHERE uid = ?", (failures, order.uid))
        self._store_refusal(refusal, order.worker or "", self._incarnation())

    # ---- storing outcomes -------------------------------------------------------------------------------------------------------

    def _put_one(self, request: PutRequest, stage: _StageOf) -> PutReceipt | SgpoError:
        self._db.execute("SAVEPOINT put")
        try:
            self._fence(request.incarnation)
            verdicts = [self._store(request, outcome, stage) for outcome in request.outcomes]
        except SgpoError as problem:
            self._db.execute("ROLLBACK TO put")
            return problem
        finally:
            self._db.execute("RELEASE put")
        return PutReceipt(verdicts.count(_Verdict.ACCEPTED), verdicts.count(_Verdict.DUPLICATE), verdicts.count(_Verdict.LATE))

    def _store(self, request: PutRequest, outcome: Outcome, stage: _StageOf) -> _Verdict:
        order = self._named_order(outcome)
        if order.state not in ("waiting", "leased"):
            self._count(order.stage, "duplicates", 1)
            return _Verdict.DUPLICATE
        known = stage(order.stage, request.incarnation)
        if not self._acceptable(known, order, request.worker_id, outcome):
            self._count(order.stage, "late", 1)
            return _Verdict.LATE
        if isinstance(outcome, Refusal):
            self._store_refusal(outcome, request.worker_id, request.incarnation)
        else:
            self._store_pair(outcome, request.worker_id, request.incarnation)
        return _Verdict.ACCEPTED

    def _named_order(self, outcome: Outcome) -> _Order:
        """The order an outcome is for. Raises RunFailed when it is for none, or carries another prompt than was leased."""
        found = self._orders("WHERE uid = ?", outcome.uid)
        if not found:
            raise RunFailed(f"outcome {outcome.uid} belongs to no registered prompt; workers must put the uid of their lease")
        order = found[0]
        prompt_id = outcome.prompt_id if isinstance(outcome, Refusal) else outcome.prompt.prompt_id
        if (outcome.stage, prompt_id) != (order.stage, order.prompt_id):
            raise RunFailed(
                f"outcome {outcome.uid} names {outcome.stage} prompt '{prompt_id}', its lease was {order.stage} prompt '{order.prompt_id}'"
            )
        return order

    def _acceptable(self, known: _OpenStage, order: _Order, worker_id: str, outcome: Outcome) -> bool:
        """Whether an outcome of an unresolved order may be stored: from its lease, or late and harmless."""
        if isinstance(outcome, Refusal):
            return True
        self._check_pair(known, order, outcome)
        unbound = known.admission.max_staleness is None
        if order.state == "leased" and (unbound or (order.worker == worker_id and outcome.version >= (order.version or 0))):
            return True
        return self._fits_late(known, order, outcome)

    def _check_pair(self, known: _OpenStage, order: _Order, pair: PreferencePair) -> None:
        bound = known.admission.max_staleness is not None
        if bound and (order.oldest_grant is None or pair.version < order.oldest_grant):
            raise RunFailed(
                f"pair {pair.uid} was sampled at version {pair.version}, before any lease of its prompt ({order.oldest_grant}):"
                " a worker generated with weights it had not proved"
            )
        row = self._db.execute("SELECT digest FROM prompts WHERE stage = ? AND prompt_id = ?", (order.stage, order.prompt_id)).fetchone()
        if row[0] != codec.prompt_digest(pair.prompt):
            raise RunFailed(f"pair {pair.uid} carries another text of prompt '{order.prompt_id}' than was leased; put the prompt unchanged")

    def _fits_late(self, known: _OpenStage, order: _Order, pair: PreferencePair) -> bool:
        """Whether a pair whose lease was lost can still be trained in time: room, freshness, and the invariant of ``admission``."""
        tally = self._tally(order.stage)
        if order.state == "waiting" and known.admission.room(tally, known.version) == 0:
            return False
        oldest = known.admission.oldest_allowed(known.last_step + 1, known.version)
        if oldest is not None and pair.version < oldest:
            return False
        unused = tally.unused
        if order.version is not None:
            unused[order.version] -= 1
        unused[pair.version] = unused.get(pair.version, 0) + 1
        return known.admission.fits(unused, known.last_step)

    def _store_pair(self, pair: PreferencePair, worker_id: str, incarnation: int) -> None:
        self._db.execute("INSERT INTO pairs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", codec.pack_pair(pair, worker_id, incarnation))
        self._db.execute("UPDATE orders SET state = 'ready', version = ?, worker = NULL, deadline = NULL WHERE uid = ?", (pair.version, pair.uid))

    def _store_refusal(self, refusal: Refusal, worker_id: str, incarnation: int) -> None:
        self._db.execute(
            "INSERT INTO refusals VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", codec.pack_refusal(refusal, worker_id, incarnation)
        )
        self._db.execute("UPDATE orders SET state = 'refused', version = NULL, worker = NULL, deadline = NULL WHERE uid = ?", (refusal.uid,))
        self._count(refusal.stage, f"refused_{refusal.reason}", 1)

    # ---- forming batches --------------------------------------------------------------------------------------------------------

    def _align(self, known: _OpenStage, step: int) -> _OpenStage:
        """Tie versions to steps at the first step of an incarnation, and again at the first new step after recorded ones.

        In between a rebuilt learner walks the recorded steps: the bound stays where it was, whatever versions it publishes on its way.
        """
        if not 1 <= step <= known.last_step + 1:
            raise RunFailed(f"stage {known.stage}: step {step} asked for, but the next one is {known.last_step + 1}; steps have no gaps")
        is_new = step > known.last_step
        if known.alignment is _Alignment.DONE and is_new:
            return known
        base = known.admission.base_version
        if is_new or known.alignment is _Alignment.NONE:
            base = known.version - (step - 1) // known.admission.weight_sync_interval
        alignment = _Alignment.DONE if is_new else _Alignment.REPLAYING
        self._db.execute("UPDATE stages SET base_version = ?, aligned = ? WHERE stage = ?", (base, alignment, known.stage))
        return replace(known, alignment=alignment, admission=replace(known.admission, base_version=base))

    def _replay(self, stage: Stage, step: int) -> Batch:
        version, uids = self._db.execute("SELECT version, uids FROM journal WHERE stage = ? AND step = ?", (stage, step)).fetchone()
        pairs = tuple(self._pair(uid) for uid in uids.split())
        return Batch(stage, step, pairs, version, replayed=True)

    def _form(self, known: _OpenStage, incarnation: int, step: int) -> Batch | Hold | None:
        self._drop_stale(known, step)
        tally = self._tally(known.stage)
        if known.admission.hopeless(tally):
            return None
        hold = known.admission.hold(tally, step, known.version)
        if hold is not None:
            return hold
        rows = self._db.execute(_SELECT_PAIR + _OLDEST_READY, (known.stage, known.admission.batch_size))
        pairs = tuple(_pair(row) for row in rows)
        version = known.admission.train_version(step, known.version)
        return self._record(known, incarnation, Batch(known.stage, step, pairs, version, replayed=False))

    def _record(self, known: _OpenStage, incarnation: int, batch: Batch) -> Batch:
        """Journal a batch and move its rows, in the caller's transaction. The last look at the staleness bound."""
        bound = known.admission.max_staleness
        oldest = min(pair.version for pair in batch.pairs)
        if bound is not None and batch.version - oldest > bound:
            raise RunFailed(f"step {batch.step}: a pair of version {oldest} at version {batch.version} breaks max_staleness {bound}; report it")
        uids = " ".join(pair.uid for pair in batch.pairs)
        mark = codec.journal_digest(batch.stage, batch.step, batch.version, incarnation, uids)
        self._db.execute("INSERT INTO journal VALUES (?, ?, ?, ?, ?, ?)", (batch.stage, batch.step, batch.version, incarnation, uids, mark))
        self._db.executemany("UPDATE orders SET state = 'assigned', step = ? WHERE uid = ?", [(batch.step, pair.uid) for pair in batch.pairs])
        self._db.execute("UPDATE stages SET last_step = ? WHERE stage = ?", (batch.step, batch.stage))
        return batch

    def _drop_stale(self, known: _OpenStage, step: int) -> None:
        """Prompts of ready pairs that are too old for this and every later step wait again; counted. Empty in lockstep."""
        oldest = known.admission.oldest_allowed(step, known.version)
        if oldest is None:
            return
        stale = self._orders("WHERE state = 'ready' AND stage = ? AND version < ?", known.stage, oldest)
        for order in stale:
            self._db.execute("DELETE FROM pairs WHERE uid = ?", (order.uid,))
            self._to_waiting(order.uid, order.failures)
        if stale:
            self._count(known.stage, "stale", len(stale))

    def _pair(self, uid: str) -> PreferencePair:
        row = self._db.execute(_SELECT_PAIR + "WHERE orders.uid = ?", (uid,)).fetchone()
        if row is None:
            raise RunFailed(f"pair {uid} is in the journal but not in buffer.db: run the audit command on this run")
        return _pair(row)


# ---- rows ------------------------------------------------------------------------------------------------------------------------

_IDENTITY: Final = ("seed", "batch size", "weight_sync_interval", "max_staleness", "samples_per_prompt", "epochs")

_SELECT_IDENTITY: Final = (
    "SELECT run_seed, batch_size, weight_sync_interval, max_staleness, samples_per_prompt, epochs, incarnation, version FROM stages WHERE stage = ?"
)
_INSERT_STAGE: Final = (
    "INSERT INTO stages (stage, run_seed, batch_size, weight_sync_interval, max_staleness, samples_per_prompt, epochs, max_pairs,"
    " lease_s, incarnation, version, base_version) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_SELECT_STAGE: Final = (
    "SELECT lease_s, incarnation, version, aligned, last_step, batch_size, weight_sync_interval, max_staleness, max_pairs, base_version"
    " FROM stages WHERE stage = ?"
)
_SELECT_ORDER: Final = "SELECT uid, stage, prompt_id, state, worker, version, oldest_grant, failures FROM orders "
_SELECT_WAITING: Final = (
    "SELECT uid, epoch, sample, attempts, prompt_id, messages, reference, source, failures"
    " FROM orders JOIN prompts USING (stage, prompt_id)"
    " WHERE state = 'waiting' AND orders.stage = ? ORDER BY position LIMIT ?"
)
_SELECT_PAIR: Final = (
    "SELECT orders.uid, orders.stage, prompt_id, messages, reference, source, prompt_ids,"
    " response_text, response_ids, response_finish, response_version,"
    " refinement_text, refinement_ids, refinement_finish, refinement_version, template"
    " FROM orders JOIN pairs ON pairs.uid = orders.uid JOIN prompts USING (stage, prompt_id) "
)
_OLDEST_READY: Final = "WHERE orders.state = 'ready' AND orders.stage = ? ORDER BY orders.version, orders.position LIMIT ?"
_SELECT_REFUSAL: Final = (
    "SELECT orders.uid, stage, prompt_id, reason, detail,"
    " response_text, response_ids, response_finish, response_version,"
    " refinement_text, refinement_ids, refinement_finish, refinement_version"
    " FROM orders JOIN refusals ON refusals.uid = orders.uid WHERE stage = ? ORDER BY position"
)


def _pair(row: Row) -> PreferencePair:
    uid, stage, prompt_id, messages, reference, source, *columns = row
    return codec.unpack_pair(uid, stage, codec.unpack_prompt(prompt_id, messages, reference, source), tuple(columns))


def _same_identity(stage: Stage, known: dict[str, int | None], asked: dict[str, int | None]) -> None:
    for name, value in known.items():
        if asked[name] != value:
            raise RunFailed(f"stage {stage} began with {name} {value}, not {asked[name]}; use that value or another run_name")


def _sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
