"""Chaos as arithmetic: which fault comes next, what shows that the run is over it, and what it cost.

Called by ``saboteur``, which does to a live run what is drawn here, and by the command line, which shows the figures. Everything is pure: the
faults are a function of a seed, an outcome is a function of the marks a run leaves (events, steps, stored outcomes). Leaves out: processes,
signals and files (``saboteur``), and whether the ledger is sound (``buffer.audit``).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from types import MappingProxyType
from typing import Final

from sgpo_dist.faults import STEP, Mark

SHORTEST_PAUSE_S: Final = 2.0
LONGEST_HICCUP_S: Final = 8.0
LONGEST_HANG_S: Final = 120.0
REFUSED: Final = 2
"""Exit code of a second driver."""
STOPPED: Final = 5
"""Exit code after SIGTERM."""


class Part(StrEnum):
    """What a fault is done to."""

    WORKER = "worker"
    BUFFER = "buffer"
    LEARNER = "learner"
    DRIVER = "driver"
    RIVAL = "rival"


class Deed(StrEnum):
    """What is done. FLIP, CUT and DROP damage the newest checkpoint while the driver that made it is dead."""

    KILL = "kill"
    PAUSE = "pause"
    STOP = "stop"
    FLIP = "flip"
    CUT = "cut"
    DROP = "drop"
    START = "start"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault. ``title`` begins the title of the processes that it may hit."""

    deed: Deed
    part: Part
    title: str = ""


DAMAGE: Final = frozenset({Deed.FLIP, Deed.CUT, Deed.DROP})

KINDS: Final[Mapping[str, Kind]] = MappingProxyType(
    {
        "kill-worker": Kind(Deed.KILL, Part.WORKER, "ray::RolloutActor"),
        "kill-engine": Kind(Deed.KILL, Part.WORKER, "VLLM::EngineCore"),
        "kill-engine-process": Kind(Deed.KILL, Part.WORKER, "VLLM::Worker"),
        "pause-worker": Kind(Deed.PAUSE, Part.WORKER, "ray::RolloutActor"),
        "pause-engine": Kind(Deed.PAUSE, Part.WORKER, "VLLM::EngineCore"),
        "kill-buffer": Kind(Deed.KILL, Part.BUFFER, "ray::PairBuffer"),
        "pause-buffer": Kind(Deed.PAUSE, Part.BUFFER, "ray::PairBuffer"),
        "kill-learner": Kind(Deed.KILL, Part.LEARNER, "ray::RankHost"),
        "pause-learner": Kind(Deed.PAUSE, Part.LEARNER, "ray::RankHost"),
        "kill-driver": Kind(Deed.KILL, Part.DRIVER),
        "pause-driver": Kind(Deed.PAUSE, Part.DRIVER),
        "stop-driver": Kind(Deed.STOP, Part.DRIVER),
        "flip-checkpoint": Kind(Deed.FLIP, Part.DRIVER),
        "cut-checkpoint": Kind(Deed.CUT, Part.DRIVER),
        "drop-checkpoint": Kind(Deed.DROP, Part.DRIVER),
        "second-driver": Kind(Deed.START, Part.RIVAL),
    }
)


# ---- which fault comes next --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """``wait_s`` of undisturbed running, then a fault. ``victim`` and ``size`` in [0, 1) choose among what there is by then."""

    wait_s: float
    kind: str
    victim: float
    size: float


def draw_faults(seed: int, every_s: float, kinds: Sequence[str]) -> Iterator[Fault]:
    """Faults without end, one every ``every_s`` seconds of undisturbed running on average; each kind once before any comes again."""
    draw = random.Random(seed)
    while True:
        for kind in draw.sample(kinds, len(kinds)):
            yield Fault(draw.expovariate(1.0 / every_s), kind, draw.random(), draw.random())


def pause_seconds(size: float, deadline_s: float | None) -> float:
    """A hiccup of 2 to 8 s, but under half the deadline; for large ``size`` a hang past the deadline, where that is not too long to wait for.

    ``deadline_s`` is when the run gives such a process up; None = never.
    """
    if deadline_s is not None and size >= 0.5 and 1.5 * deadline_s <= LONGEST_HANG_S:
        return 1.5 * deadline_s
    hiccup = SHORTEST_PAUSE_S + (2.0 * size % 1.0) * (LONGEST_HICCUP_S - SHORTEST_PAUSE_S)
    return hiccup if deadline_s is None else min(hiccup, deadline_s / 2.0)


# ---- what a run leaves, and what it shows ------------------------------------------------------------------------------------------

STORED: Final = "stored"
"""A mark from outside: ``count`` outcomes were seen in the database."""


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that was done, at ``time`` and, a pause, until ``until``. ``stored`` outcomes were in the database then.

    ``detail`` names what a number cannot: the damaged file. ``code`` is the exit code of the driver that a fault ended or started.
    """

    number: int
    kind: str
    time: float
    until: float
    pid: int
    stored: int
    detail: str = ""
    code: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a fault. ``ok`` is False when the run went on, but not as it must."""

    what: str
    recovered_at: float
    ok: bool = True


@dataclass(frozen=True, slots=True)
class Record:
    """A fault and its outcome; None while there is none."""

    fault: Injected
    outcome: Outcome | None = None

    @property
    def recovery_s(self) -> float | None:
        """Seconds from the fault to the mark that shows the recovery."""
        return None if self.outcome is None else self.outcome.recovered_at - self.fault.time


def is_steady(marks: Sequence[Mark], workers: int) -> bool:
    """Whether the driver of the moment has published, all its workers live and its learner is not lost."""
    current = _this_attempt(marks)
    live: set[str] = set()
    learner_lost = published = False
    for mark in current:
        if mark.kind == "worker_started":
            live.add(mark.fields["worker"])
        elif mark.kind == "worker_lost":
            live.discard(mark.fields["worker"])
        elif mark.kind in ("learner_lost", "learner_rebuilt"):
            learner_lost = mark.kind == "learner_lost"
        published = published or mark.kind == "version_published"
    return published and not learner_lost and len(live) == workers


def _this_attempt(marks: Sequence[Mark]) -> Sequence[Mark]:
    starts = [place for place, mark in enumerate(marks) if mark.kind == "attempt"]
    return marks[starts[-1] :] if starts else ()


def outcome_of(fault: Injected, marks: Iterable[Mark]) -> Outcome | None:
    """What the run's marks, in time order, say about a fault; None while they do not show that it is over."""
    later = [mark for mark in marks if mark.time >= fault.time]
    return _SIGNS[KINDS[fault.kind].part](fault, later) or _done_first(later)


def _worker(fault: Injected, later: Sequence[Mark]) -> Outcome | None:
    return _replaced(later, "worker_lost", "worker_started", "worker replaced") or _went_on(fault, later, "worker_lost")


def _learner(fault: Injected, later: Sequence[Mark]) -> Outcome | None:
    return _replaced(later, "learner_lost", "learner_rebuilt", "learner rebuilt") or _went_on(fault, later, "learner_lost")


def _replaced(later: Sequence[Mark], loss: str, mending: str, what: str) -> Outcome | None:
    return _at(_first_after(later, loss, mending), what)


def _went_on(fault: Injected, later: Sequence[Mark], lost: str) -> Outcome | None:
    """A pause too short to be taken for a loss: the run moved after it."""
    if KINDS[fault.kind].deed is not Deed.PAUSE or _first(later, lost):
        return None
    return _at(_moved(fault, later), "went on")


def _buffer(fault: Injected, later: Sequence[Mark]) -> Outcome | None:
    what = "went on" if KINDS[fault.kind].deed is Deed.PAUSE else "buffer back on its file"
    return _at(_moved(fault, later), what)


def _moved(fault: Injected, later: Sequence[Mark]) -> Mark | None:
    """More outcomes in the database than when it happened, or the second step after it: the first one may have been over but for its row."""
    after = [mark for mark in later if mark.time >= fault.until]
    stored = next((mark for mark in after if mark.kind == STORED and mark.fields["count"] > fault.stored), None)
    second = [mark for mark in after if mark.kind == STEP][1:2]
    found = [mark for mark in (stored, *second) if mark is not None]
    return min(found, key=lambda mark: mark.time, default=None)


def _driver(fault: Injected, later: Sequence[Mark]) -> Outcome | None:
    if KINDS[fault.kind].deed is Deed.PAUSE:
        return _at(_moved(fault, later), "went on")
    published = _first_after(later, "attempt", "version_published")
    if published is None:
        return None
    if not fault.detail:
        return Outcome("driver resumed", published.time)
    name = fault.detail.split("/", 1)[0]
    warned = any(mark.kind == "message" and f"{name} is damaged" in str(mark.fields.get("text")) for mark in later)
    return Outcome("fell back, and said so" if warned else f"resumed without a word about {fault.detail}", published.time, ok=warned)


def _rival(fault: Injected, later: Sequence[Mark]) -> Outcome | None:
    """A second driver ends by itself; the doer notes when (``until``) and how (``code``)."""
    if fault.code == REFUSED and not _first(later, "attempt"):
        return Outcome("refused", fault.until)
    return Outcome("not refused" if fault.code is None else f"ended with exit code {fault.code}", fault.until, ok=False)


_SIGNS: Final = {Part.WORKER: _worker, Part.LEARNER: _learner, Part.BUFFER: _buffer, Part.DRIVER: _driver, Part.RIVAL: _rival}


def _done_first(later: Sequence[Mark]) -> Outcome | None:
    """The run reached its end before anything had to be mended."""
    end = next((mark for mark in later if mark.kind == "attempt_ended" and mark.fields.get("reason") == "done"), None)
    return _at(end, "the run was done first")


def _at(mark: Mark | None, what: str) -> Outcome | None:
    return None if mark is None else Outcome(what, mark.time)


def _first(marks: Iterable[Mark], kind: str) -> Mark | None:
    return next((mark for mark in marks if mark.kind == kind), None)


def _first_after(marks: Sequence[Mark], cause: str, kind: str) -> Mark | None:
    """The first mark of a kind after the first of another."""
    place = next((place for place, mark in enumerate(marks) if mark.kind == cause), len(marks))
    return _first(marks[place:], kind)


# ---- what it cost ------------------------------------------------------------------------------------------------------------------


MIB: Final = 2**20
FLAT: Final = 0.10
"""Memory that grew by less counts as flat."""
FEWEST_SAMPLES: Final = 9
"""Fewer say nothing about growth: three of them make a third."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the run holds at ``time``: resident bytes by role (pages that several share count in each), of named shared memory, and counts."""

    time: float
    resident: Mapping[str, int]
    shared: int
    files: int
    processes: int


def trend_lines(samples: Sequence[Sample]) -> list[list[str]]:
    """A header, and the medians of the first and of the last third of ``whole(samples)``: memory by role, all of it, what else may pile up."""
    seen = whole(samples)
    lines = [["held", "first third", "last third", "change"]]
    for role in sorted({role for sample in seen for role in sample.resident}):
        lines.append(_trend(f"memory: {role}", [sample.resident[role] for sample in seen], " MiB", MIB))
    lines.append(_trend("memory: all", [_all_of(sample) for sample in seen], " MiB", MIB))
    lines.append(_trend("shared memory", [sample.shared for sample in seen], " MiB", MIB))
    lines.append(_trend("open files", [sample.files for sample in seen]))
    lines.append(_trend("processes", [sample.processes for sample in seen]))
    return lines


def whole(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with every role that any of them has: while a part is missing or starts, what is held says nothing about growth."""
    roles = {role for sample in samples for role in sample.resident}
    return [sample for sample in samples if sample.resident.keys() == roles]


def memory_verdict(samples: Sequence[Sample]) -> str:
    """Whether the run's memory grew, in one line; see ``whole``."""
    seen = whole(samples)
    if len(seen) < FEWEST_SAMPLES:
        return f"memory: too short a run to tell ({len(seen)} samples)"
    change = _change(*thirds([_all_of(sample) for sample in seen]))
    return f"memory {'flat' if change < FLAT else 'grew'}: {change:+.1%}, by {len(seen)} samples of the whole run"


def thirds(values: Sequence[int]) -> tuple[float, float]:
    """Median of the first and of the last third; (0, 0) without values."""
    if not values:
        return 0.0, 0.0
    third = max(1, len(values) // 3)
    return float(median(values[:third])), float(median(values[-third:]))


def _all_of(sample: Sample) -> int:
    return sum(sample.resident.values())


def _trend(name: str, values: Sequence[int], unit: str = "", size: int = 1) -> list[str]:
    early, late = thirds(values)
    return [name, f"{early / size:,.0f}{unit}", f"{late / size:,.0f}{unit}", f"{_change(early, late):+.1%}"]


def _change(early: float, late: float) -> float:
    return late / early - 1.0 if early else 0.0


def table_lines(records: Sequence[Record]) -> list[list[str]]:
    """A header, and one line a kind in the order of KINDS: how often, what became of it, median and worst seconds to recover."""
    lines = [["fault", "what happened", "count", "recovered after", "worst"]]
    for kind in KINDS:
        mine = [record for record in records if record.fault.kind == kind]
        if mine:
            times = [record.recovery_s for record in mine if record.recovery_s is not None]
            seconds = [f"{value:.1f} s" for value in (median(times), max(times))] if times else ["-", "-"]
            lines.append([kind, _happened(mine), str(len(mine)), *seconds])
    return lines


def _happened(records: Sequence[Record]) -> str:
    counts = Counter(record.outcome.what if record.outcome else "not recovered" for record in records)
    return ", ".join(what if count == len(records) else f"{what} {count}" for what, count in counts.items())


def problems_of(records: Iterable[Record]) -> list[str]:
    """One line for each fault that the run did not get over as it must."""
    found = []
    for record in records:
        if record.outcome is None:
            found.append(f"fault {record.fault.number} ({record.fault.kind}): not recovered")
        elif not record.outcome.ok:
            found.append(f"fault {record.fault.number} ({record.fault.kind}): {record.outcome.what}")
    return found
