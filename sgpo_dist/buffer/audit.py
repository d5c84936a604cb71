"""An independent proof that a run's ledger is sound: nothing lost, nothing trained twice, nothing too stale, nothing tampered with.

Called by the command line (``audit``), by tests and by simulations. Deliberately uses none of the ledger's code: it reads the tables with
plain SQL, computes every uid and digest on its own, and compares with the events and checkpoints that the driver left. It changes nothing
and may run beside a live run. What it cannot see: whether the learner really trained what the journal says.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from sgpo_dist.errors import ConfigError

MAX_PROBLEMS_SHOWN: Final = 50

Value = str | bytes | int | None


@dataclass(frozen=True, slots=True)
class StageAudit:
    """One row of the table. ``prompts`` counts outcomes asked for (prompt, epoch, sample); ``unused`` had none when the audit looked.

    ``rolled_back_to`` is the step that a rollback ended the stage on; the pairs still assigned then are those of the steps it undid.
    """

    stage: str
    prompts: int
    pairs: int
    refusals: Mapping[str, int]
    waiting: int
    leased: int
    ready: int
    assigned: int
    trained: int
    steps: int
    version: int
    max_staleness: int | None
    staleness_seen: int
    rolled_back_to: int | None = None

    @property
    def refused(self) -> int:
        """Prompts refused, for all reasons."""
        return sum(self.refusals.values())

    @property
    def unused(self) -> int:
        """Prompts without an outcome: waiting or in generation."""
        return self.waiting + self.leased

    @property
    def discarded(self) -> int:
        """Pairs whose steps a rollback undid: assigned once, never trained."""
        return self.assigned if self.rolled_back_to is not None else 0


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What was found. No problems = proved."""

    stages: tuple[StageAudit, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def audit_run(run_dir: Path) -> AuditReport:
    """Audit ``run_dir``/buffer.db against itself, events.jsonl and checkpoints/. Raises ConfigError when there is no database."""
    path = run_dir / "buffer.db"
    if not path.is_file():
        raise ConfigError(f"{run_dir} has no buffer.db to audit: give the directory of a run that has begun")
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=30, isolation_level=None)) as db:
            report = _audited(db)
            endings = _endings(run_dir / "events.jsonl")
            others = [
                *_event_problems(db, run_dir / "events.jsonl"),
                *_ending_problems(db, endings),
                *_checkpoint_problems(db, run_dir / "checkpoints"),
            ]
    except sqlite3.DatabaseError as problem:
        return AuditReport((), (f"buffer.db cannot be read: {problem}",))
    undone = {stage: ending.step for stage, ending in endings.items() if ending.rolled_back}
    stages = tuple(replace(row, rolled_back_to=undone.get(row.stage)) for row in report.stages)
    return AuditReport(stages, _shortened([*report.problems, *others]))


def audit_database(db: sqlite3.Connection) -> AuditReport:
    """Audit an open database alone."""
    report = _audited(db)
    return AuditReport(report.stages, _shortened(report.problems))


def _audited(db: sqlite3.Connection) -> AuditReport:
    """Every problem in one consistent picture."""
    db.execute("BEGIN")
    try:
        names = [row[0] for row in db.execute("SELECT stage FROM stages ORDER BY rowid")]
        checks = [_StageCheck(db, name) for name in names]
        problems = [*_file_problems(db), *_version_problems(db)]
        rows = []
        for check in checks:
            rows.append(check.row())
            problems += check.problems
        return AuditReport(tuple(rows), tuple(problems))
    finally:
        db.execute("COMMIT")


# ---- one stage -------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Seen:
    """What one pass over a stage's rows gathered."""

    states: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    by_step: dict[int, set[str]] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    staleness: int = 0


class _StageCheck:
    """All checks of one stage; ``problems`` fills as they run."""

    def __init__(self, db: sqlite3.Connection, stage: str) -> None:
        self._db = db
        self._stage = stage
        self._plan: dict[str, Any] = _first_as_dict(db, "SELECT * FROM stages WHERE stage = ?", stage)
        self.problems: list[str] = []

    def row(self) -> StageAudit:
        """Run every check and sum the stage up."""
        seen = _Seen()
        self._check_prompts()
        self._check_orders(seen)
        self._check_pairs(seen)
        self._check_refusals(seen)
        steps = self._check_journal(seen)
        self._check_tally(seen)
        states = seen.states
        return StageAudit(
            stage=self._stage,
            prompts=states.total(),
            pairs=states["ready"] + states["assigned"] + states["trained"],
            refusals=dict(sorted(seen.reasons.items())),
            waiting=states["waiting"],
            leased=states["leased"],
            ready=states["ready"],
            assigned=states["assigned"],
            trained=states["trained"],
            steps=steps,
            version=int(self._plan["version"]),
            max_staleness=self._plan["max_staleness"],
            staleness_seen=seen.staleness,
        )

    def _wrong(self, text: str) -> None:
        self.problems.append(f"{self._stage}: {text}")

    def _rows(self, sql: str) -> Iterator[tuple[Any, ...]]:
        yield from self._db.execute(sql, (self._stage,))

    def _check_prompts(self) -> None:
        for prompt_id, messages, reference, source, digest in self._rows(
            "SELECT prompt_id, messages, reference, source, digest FROM prompts WHERE stage = ? ORDER BY rowid"
        ):
            if _digest(prompt_id, _text(messages), _text(reference), source) != digest:
                self._wrong(f"the text of prompt '{prompt_id}' was changed after it was registered")

    def _check_orders(self, seen: _Seen) -> None:
        """Every registered (prompt, epoch, sample) is there once, under its own uid, and its state fits its columns."""
        position = -1
        for position, (found, uid, prompt_id, epoch, sample, state, version, step, known) in enumerate(self._rows(_ORDERS)):
            if found != position:
                self._wrong(f"prompts at positions {position} to {found - 1} are gone from the ledger")
                break
            if uid != _uid(self._plan["run_seed"], self._stage, prompt_id, epoch, sample):
                self._wrong(f"position {position}: uid {uid} is not that of prompt '{prompt_id}', epoch {epoch}, sample {sample}")
            if not known:
                self._wrong(f"position {position}: prompt '{prompt_id}' is not registered")
            seen.states[state] += 1
            if not isinstance(version, int | None) or not isinstance(step, int | None):
                self._wrong(f"{uid} has version {version!r} and step {step!r}, which are no numbers")
                continue
            self._check_columns(uid, state, version, step)
            if version is not None and state in ("ready", "assigned", "trained"):
                seen.versions[uid] = version
            if step is not None:
                seen.by_step.setdefault(step, set()).add(uid)
        if position + 1 != self._plan["registered"]:
            self._wrong(f"{self._plan['registered']} prompts were registered but {position + 1} are in the ledger")

    def _check_columns(self, uid: str, state: str, version: int | None, step: int | None) -> None:
        if (step is not None) != (state in ("assigned", "trained")):
            self._wrong(f"{uid} is {state} with step {step}")
        if (version is None) != (state in ("waiting", "refused")):
            self._wrong(f"{uid} is {state} with version {version}")
        if state == "trained" and step is not None and step > self._plan["committed_step"]:
            self._wrong(f"{uid} counts as trained in step {step}, which no checkpoint covers")
        if state == "assigned" and step is not None and step <= self._plan["committed_step"]:
            self._wrong(f"{uid} of step {step} does not count as trained though a checkpoint covers it")

    def _check_pairs(self, seen: _Seen) -> None:
        """Each finished order has its pair, unchanged since it was stored, and nothing else has one."""
        missing = set(seen.versions)
        for uid, prompt_id, state, ids, *halves, template, worker, incarnation, digest in self._rows(_PAIRS):
            missing.discard(uid)
            if state not in ("ready", "assigned", "trained"):
                self._wrong(f"{uid} is {state} but has a pair")
                continue
            content = [_text(value) if place % 4 == 0 else value for place, value in enumerate(halves)]
            if _digest(uid, self._stage, prompt_id, ids, *content, template, worker, incarnation) != digest:
                self._wrong(f"pair {uid} (prompt '{prompt_id}') was changed after it was stored")
            elif min(halves[3], halves[7]) != seen.versions.get(uid):
                self._wrong(f"pair {uid} is of version {min(halves[3], halves[7])} but the ledger counts it as {seen.versions.get(uid)}")
        for uid in sorted(missing):
            self._wrong(f"pair {uid} is gone")

    def _check_refusals(self, seen: _Seen) -> None:
        total = 0
        for uid, prompt_id, state, reason, detail, *halves, worker, incarnation, digest in self._rows(_REFUSALS):
            total += 1
            seen.reasons[reason] += 1
            if state != "refused":
                self._wrong(f"{uid} is {state} but has a refusal")
            content = [_text(value) if place % 4 == 0 else value for place, value in enumerate(halves)]
            if _digest(uid, self._stage, prompt_id, reason, _text(detail), *content, worker, incarnation) != digest:
                self._wrong(f"refusal {uid} (prompt '{prompt_id}') was changed after it was stored")
        if total != seen.states["refused"]:
            self._wrong(f"{seen.states['refused']} prompts are refused but {total} refusals are stored")
        counted = dict(self._rows("SELECT substr(name, 9), n FROM counters WHERE stage = ? AND name LIKE 'refused\\_%' ESCAPE '\\'"))
        if counted != dict(seen.reasons):
            self._wrong(f"refusals by reason are {dict(seen.reasons)} but were counted as {counted}")

    def _check_journal(self, seen: _Seen) -> int:
        """Steps without gaps, whole batches, no pair in two, none too stale, and the same rows as the ledger has. Returns the steps."""
        used: dict[str, int] = {}
        expected = 0
        for expected, (step, version, incarnation, text, digest) in enumerate(self._rows(_JOURNAL), 1):
            uids = text.split()
            if step != expected:
                self._wrong(f"the journal has step {step} where step {expected} belongs")
                break
            if _digest(self._stage, step, version, incarnation, text) != digest:
                self._wrong(f"the journal of step {step} was changed after it was written")
            if isinstance(version, int):
                self._check_batch(seen, used, step, version, uids)
        if expected != self._plan["last_step"]:
            self._wrong(f"{self._plan['last_step']} steps were assigned but the journal has {expected}")
        for step in sorted(set(seen.by_step) - set(range(1, expected + 1))):
            self._wrong(f"{len(seen.by_step[step])} pairs claim step {step}, which is not in the journal")
        return expected

    def _check_batch(self, seen: _Seen, used: dict[str, int], step: int, version: int, uids: list[str]) -> None:
        """One step's batch; ``used`` maps the pairs of the steps before it."""
        if len(uids) != self._plan["batch_size"]:
            self._wrong(f"step {step} has {len(uids)} pairs instead of {self._plan['batch_size']}")
        for uid in uids:
            if uid in used:
                self._wrong(f"pair {uid} is in the batches of steps {used[uid]} and {step}")
            used[uid] = step
        if set(uids) != seen.by_step.get(step, set()):
            self._wrong(f"the journal of step {step} and the ledger's rows name different pairs")
        staleness = max((version - seen.versions.get(uid, version) for uid in uids), default=0)
        seen.staleness = max(seen.staleness, staleness)
        bound = self._plan["max_staleness"]
        if bound is not None and staleness > bound:
            self._wrong(f"step {step} trained at version {version} on a pair {staleness} versions old; max_staleness is {bound}")

    def _check_tally(self, seen: _Seen) -> None:
        tally = dict(self._rows("SELECT state, SUM(n) FROM tally WHERE stage = ? GROUP BY state HAVING SUM(n) > 0"))
        if tally != dict(seen.states):
            self._wrong(f"the ledger counts {tally} rows but holds {dict(seen.states)}")


_ORDERS: Final = (
    "SELECT position, uid, orders.prompt_id, epoch, sample, state, version, step, prompts.prompt_id IS NOT NULL"
    " FROM orders LEFT JOIN prompts ON prompts.stage = orders.stage AND prompts.prompt_id = orders.prompt_id"
    " WHERE orders.stage = ? ORDER BY position"
)
_PAIRS: Final = (
    "SELECT pairs.uid, prompt_id, state, prompt_ids, response_text, response_ids, response_finish, response_version,"
    " refinement_text, refinement_ids, refinement_finish, refinement_version, template, pairs.worker, incarnation, digest"
    " FROM pairs JOIN orders ON orders.uid = pairs.uid WHERE stage = ?"
)
_REFUSALS: Final = (
    "SELECT refusals.uid, prompt_id, state, reason, detail, response_text, response_ids, response_finish, response_version,"
    " refinement_text, refinement_ids, refinement_finish, refinement_version, refusals.worker, incarnation, digest"
    " FROM refusals JOIN orders ON orders.uid = refusals.uid WHERE stage = ?"
)
_JOURNAL: Final = "SELECT step, version, incarnation, uids, digest FROM journal WHERE stage = ? ORDER BY step"


# ---- the whole file --------------------------------------------------------------------------------------------------------------


def _file_problems(db: sqlite3.Connection) -> Iterator[str]:
    """Damage that SQLite itself can see, and rows that belong to nothing."""
    for (text,) in db.execute("PRAGMA quick_check"):
        if text != "ok":
            yield f"buffer.db is damaged: {text}"
    for table in ("pairs", "refusals"):
        orphans = db.execute(_ORPHANS[table]).fetchone()[0]
        if orphans:
            yield f"{orphans} rows of {table} belong to no prompt"
    both = db.execute("SELECT COUNT(*) FROM pairs JOIN refusals USING (uid)").fetchone()[0]
    if both:
        yield f"{both} prompts have a pair and a refusal"


_ORPHANS: Final = {
    "pairs": "SELECT COUNT(*) FROM pairs WHERE uid NOT IN (SELECT uid FROM orders)",
    "refusals": "SELECT COUNT(*) FROM refusals WHERE uid NOT IN (SELECT uid FROM orders)",
}


def _version_problems(db: sqlite3.Connection) -> Iterator[str]:
    """Versions only go up within an incarnation, and incarnations only go up."""
    last_incarnation, last_version = 0, None
    for incarnation, version in db.execute("SELECT incarnation, version FROM versions ORDER BY seq"):
        if incarnation < last_incarnation:
            yield f"incarnation {incarnation} wrote after incarnation {last_incarnation} had begun"
        if incarnation == last_incarnation and last_version is not None and version < last_version:
            yield f"version {version} follows version {last_version} in incarnation {incarnation}"
        last_incarnation, last_version = incarnation, version
    newest = db.execute("SELECT value FROM meta WHERE key = 'incarnation'").fetchone()[0]
    if last_incarnation > newest:
        yield f"incarnation {last_incarnation} wrote, but only {newest} were begun"


# ---- what lies beside the file ---------------------------------------------------------------------------------------------------


def _event_problems(db: sqlite3.Connection, path: Path) -> Iterator[str]:
    """Published versions in events.jsonl are monotone within an attempt and were journalled by the ledger."""
    journalled = {version for (version,) in db.execute("SELECT version FROM versions")}
    last = None
    for event in _events(path):
        if event.get("kind") == "attempt":
            last = None
        if event.get("kind") != "version_published" or not isinstance(event.get("version"), int):
            continue
        version = event["version"]
        if last is not None and version < last:
            yield f"events.jsonl: version {version} was published after version {last} in one attempt"
        if version not in journalled:
            yield f"events.jsonl: version {version} was published but never entered the ledger"
        last = version


@dataclass(frozen=True, slots=True)
class _Ending:
    """The step that a stage ended on, and whether a rollback had put it there."""

    step: int
    rolled_back: bool


def _endings(path: Path) -> dict[str, _Ending]:
    """Stages that are over for good by events.jsonl: finished, then a checkpoint (the ledger heard of it), and no version published since."""
    rollbacks: dict[str, Any] = {}
    finished: dict[str, _Ending] = {}
    over: dict[str, _Ending] = {}
    for event in _events(path):
        kind, stage = event.get("kind"), str(event.get("stage"))
        if kind == "rolled_back":
            rollbacks[stage] = event.get("to_step")
        elif kind == "stage_finished" and isinstance(event.get("steps"), int):
            finished[stage] = _Ending(event["steps"], rollbacks.get(stage) == event["steps"])
        elif kind == "checkpoint":
            over = dict(finished)
        elif kind == "version_published":
            finished, over = {}, {}
    return over


def _ending_problems(db: sqlite3.Connection, endings: Mapping[str, _Ending]) -> Iterator[str]:
    """A stage that is over has trained every step it was assigned, except those that a recorded rollback undid."""
    for stage, ending in endings.items():
        row = db.execute(_ENDED, (stage,)).fetchone()
        if row is None:
            continue
        trained, left = row
        if trained != ending.step:
            yield f"{stage}: rows up to step {trained} count as trained, but the stage ended on step {ending.step}"
        elif left and not ending.rolled_back:
            yield f"{stage} ended with {left} pairs assigned and not trained, but events.jsonl records no rollback to step {trained}"


_ENDED: Final = (
    "SELECT committed_step, (SELECT COUNT(*) FROM orders WHERE orders.stage = stages.stage AND state = 'assigned')"
    " FROM stages WHERE stage = ? AND last_step > 0"
)


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """The file's JSON objects; a line that a crash cut short is nobody's fault."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict):
                yield event


def _checkpoint_problems(db: sqlite3.Connection, root: Path) -> Iterator[str]:
    """Rows count as trained only up to the newest checkpoint of their stage."""
    pointer = root / "latest"
    if not pointer.is_file():
        return
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    facts = _facts(root, name)
    if facts is None:
        yield f"checkpoints/latest points to '{name}', which has no readable manifest"
        return
    stage, step = facts
    row = db.execute("SELECT committed_step FROM stages WHERE stage = ?", (stage,)).fetchone()
    if row is not None and step is not None and row[0] > step:
        yield f"{stage}: rows up to step {row[0]} count as trained, but checkpoints/latest holds step {step}"


def _facts(root: Path, name: str) -> tuple[str, int | None] | None:
    """Stage and stage step of a checkpoint; None when it cannot be read."""
    if not re.fullmatch(r"step-\d+", name):
        return None
    try:
        facts = json.loads((root / name / "MANIFEST.json").read_bytes())["facts"]
        step = facts.get("step")
        return str(facts.get("stage")), step if isinstance(step, int) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


# ---- small things, written a second time on purpose ------------------------------------------------------------------------------


def _uid(run_seed: int, stage: str, prompt_id: str, epoch: int, sample: int) -> str:
    key = "\x1f".join((str(run_seed), stage, prompt_id, str(epoch), str(sample)))
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def _digest(*values: Value) -> str:
    """Blake2b-128 over tag, length (8 bytes, little-endian) and bytes of each value; see ``codec`` for the definition."""
    whole = b""
    for value in values:
        if value is None:
            tag, raw = b"n", b""
        elif isinstance(value, bytes):
            tag, raw = b"b", value
        elif isinstance(value, str):
            tag, raw = b"s", value.encode("utf-8", "surrogatepass")
        else:
            tag, raw = b"i", str(value).encode()
        whole += tag + len(raw).to_bytes(8, "little") + raw
    return hashlib.blake2b(whole, digest_size=16).hexdigest()


def _text(stored: str | bytes | None) -> str | None:
    """A text column uncompressed; a blob that does not open gives a text that no digest fits."""
    if not isinstance(stored, bytes):
        return stored
    try:
        return zlib.decompress(stored).decode("utf-8", "surrogatepass")
    except (zlib.error, UnicodeDecodeError):
        return "\x00unreadable"


def _first_as_dict(db: sqlite3.Connection, sql: str, *values: str) -> dict[str, Any]:
    cursor = db.execute(sql, values)
    return dict(zip((column[0] for column in cursor.description), cursor.fetchone(), strict=True))


def _shortened(problems: Iterable[str]) -> tuple[str, ...]:
    """At most ``MAX_PROBLEMS_SHOWN`` and how many more; one damaged column can hit a million rows."""
    found = list(problems)
    more = len(found) - MAX_PROBLEMS_SHOWN
    return (*found[:MAX_PROBLEMS_SHOWN], f"and {more} more problems") if more > 0 else tuple(found)
