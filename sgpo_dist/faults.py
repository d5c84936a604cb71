"""What faults cost a run: restarts by role and cause, how long each took, and the share of time that was useful (ETTR).

Called by the recorder (a gauge a step), the report, ``status`` and chaos, all with the same arithmetic: pure, one pass over the marks that a run
leaves in time order. What is counted, and what is not, is in docs/metrics.md. Leaves out: reading files (recorder), faults that leave no mark
of their own, such as a restarted buffer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Final

STEP: Final = "step"
WORKER, LEARNER, DRIVER = "worker", "learner", "driver"
GOOD_ENDS: Final = frozenset({"done", "StoppedOnRequest", "KeyboardInterrupt"})
"""Ends of an attempt that somebody wanted; the time until the next attempt is nobody's loss."""
KILLED: Final = "killed"
LOG_FOLLOWS: Final = "; its log: "
"""In a reason: what comes after it is the log's, and tells no kind of cause."""


@dataclass(frozen=True, slots=True)
class Mark:
    """An event of events.jsonl by its kind, or STEP: a row of metrics.jsonl. ``time`` is Unix time."""

    time: float
    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fault:
    """A part that was lost at ``began``, and mended at ``mended`` (Unix seconds); None while it is not, or when its attempt ended first."""

    role: str
    cause: str
    began: float
    mended: float | None = None

    @property
    def seconds(self) -> float | None:
        """Time to recover."""
        return None if self.mended is None else self.mended - self.began


@dataclass(frozen=True, slots=True)
class Summary:
    """The faults in the order of their beginning. ``wall_s``: all attempts; ``away_s`` and ``repeated_s`` of it were lost, no second twice."""

    faults: tuple[Fault, ...] = ()
    wall_s: float = 0.0
    away_s: float = 0.0
    repeated_s: float = 0.0
    repeated_steps: int = 0

    @property
    def ettr(self) -> float:
        """Share of the wall time that was useful, in [0, 1]; 1 for a run that has only begun."""
        return min(1.0, max(0.0, 1.0 - (self.away_s + self.repeated_s) / self.wall_s)) if self.wall_s > 0 else 1.0

    @property
    def by_role(self) -> dict[str, int]:
        """How many faults of each role."""
        return dict(Counter(fault.role for fault in self.faults))


class Tally:
    """Counts marks as they come, in time order; ``summary`` may be asked at any time."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._open: dict[str, list[int]] = {}  # what is lost -> its places in the list
        self._away: set[str] = set()  # roles without which nothing useful goes on
        self._away_since = self._away_s = self._repeated_s = self._idle_s = 0.0
        self._repeated_steps = 0
        self._began: float | None = None
        self._last = self._step_from = 0.0
        self._ended = ""
        self._live: dict[str, str] = {}  # place -> the worker there
        self._highest: dict[str, int] = {}

    def see(self, mark: Mark) -> None:
        """One more mark. What comes before the first attempt is not the run's."""
        if mark.kind == "attempt":
            self._attempt(mark)
        elif self._began is not None:
            self._happened(mark)
        self._last = max(self._last, mark.time)

    def _happened(self, mark: Mark) -> None:
        match mark.kind:
            case "step":
                self._step(mark)
            case "worker_lost":
                self._worker_lost(mark)
            case "worker_leaves":
                self._worker_gone(str(mark.fields.get("worker", "")), mark.time)
            case "worker_started":
                self._worker_started(mark)
            case "learner_lost":
                self._lose(LEARNER, LEARNER, cause_of(mark), mark.time)
                self._leave(LEARNER, mark.time)
            case "learner_rebuilt":
                self._mend(LEARNER, LEARNER, mark.time)
            case "version_published":
                self._mend(DRIVER, DRIVER, mark.time)
            case "attempt_ended":
                self._ended = str(mark.fields.get("reason", ""))

    def summary(self, now: float | None = None) -> Summary:
        """Up to ``now`` while a driver works; up to the last mark otherwise."""
        if self._began is None:
            return Summary()
        until = self._last if now is None else max(now, self._last)
        away_s = self._away_s + (until - self._away_since if self._away else 0.0)
        return Summary(tuple(self._faults), until - self._began - self._idle_s, away_s, self._repeated_s, self._repeated_steps)

    # ---- attempts -------------------------------------------------------------------------------------------------------------------

    def _attempt(self, mark: Mark) -> None:
        """A driver begins. The one before was killed, or ended by an error, or as somebody wanted."""
        if self._began is None:
            self._began = self._last = self._step_from = mark.time
        elif self._ended in GOOD_ENDS:
            self._come_back(self._last)
            self._idle_s += mark.time - self._last
        else:
            self._lose(DRIVER, DRIVER, self._ended or KILLED, self._last)
            self._leave(DRIVER, self._last)
            self._away = {DRIVER}  # whatever else was away, the new driver brings up
        self._open = {name: places for name, places in self._open.items() if name == DRIVER}
        self._live = {}
        self._ended = ""
        self._step_from = max(self._step_from, mark.time)

    def _come_back(self, time: float) -> None:
        if self._away:
            self._away_s += time - self._away_since
            self._away = set()

    # ---- parts ----------------------------------------------------------------------------------------------------------------------

    def _worker_lost(self, mark: Mark) -> None:
        name = str(mark.fields.get("worker", ""))
        if str(mark.fields.get("reason", "")).startswith("while stopping"):
            return
        self._lose(_place(name), WORKER, cause_of(mark), mark.time)
        self._worker_gone(name, mark.time)

    def _worker_gone(self, name: str, time: float) -> None:
        """Lost, or asked to leave its node: nothing is generated while none is left."""
        if self._live.get(_place(name)) == name:
            del self._live[_place(name)]
            if not self._live:
                self._leave(WORKER, time)

    def _worker_started(self, mark: Mark) -> None:
        name = str(mark.fields.get("worker", ""))
        self._live[_place(name)] = name
        self._mend(_place(name), WORKER, mark.time)

    def _lose(self, what: str, role: str, cause: str, time: float) -> None:
        self._open.setdefault(what, []).append(len(self._faults))
        self._faults.append(Fault(role, cause, time))

    def _mend(self, what: str, role: str, time: float) -> None:
        for place in self._open.pop(what, []):
            self._faults[place] = replace(self._faults[place], mended=time)
        if role in self._away:
            self._away.discard(role)
            if not self._away:
                self._away_s += time - self._away_since
                self._step_from = max(self._step_from, time)

    def _leave(self, role: str, time: float) -> None:
        if not self._away:
            self._away_since = time
        self._away.add(role)

    # ---- work that is done again ------------------------------------------------------------------------------------------------------

    def _step(self, mark: Mark) -> None:
        """A step that was done before is repeated since the step before it, or since the last part came back."""
        stage, step = str(mark.fields.get("stage", "")), int(mark.fields.get("step", 0))
        if step <= self._highest.get(stage, 0):
            self._repeated_steps += 1
            if not self._away:
                self._repeated_s += mark.time - self._step_from
        self._highest[stage] = max(step, self._highest.get(stage, 0))
        self._step_from = mark.time


def summarise(marks: Iterable[Mark], now: float | None = None) -> Summary:
    """The summary of a run's marks in time order; ``now`` (Unix seconds) while its driver works."""
    tally = Tally()
    for mark in marks:
        tally.see(mark)
    return tally.summary(now)


def cause_of(mark: Mark) -> str:
    """An event's reason, without what it quotes of a log."""
    return str(mark.fields.get("reason", "unknown")).split(LOG_FOLLOWS, 1)[0]


def _place(worker: str) -> str:
    """rollout-0.2.7 is the seventh worker of the second attempt at place rollout-0."""
    return worker.split(".", 1)[0]


def fault_lines(summary: Summary) -> list[list[str]]:
    """A header, and one line a role and cause: how often, median and worst seconds to recover."""
    groups: dict[tuple[str, str], list[Fault]] = {}
    for fault in summary.faults:
        groups.setdefault((fault.role, fault.cause), []).append(fault)
    lines = [["lost", "cause", "count", "recovered after", "worst"]]
    for (role, cause), faults in groups.items():
        times = [fault.seconds for fault in faults if fault.seconds is not None]
        lines.append([role, cause, str(len(faults)), *([f"{median(times):.1f} s", f"{max(times):.1f} s"] if times else ["-", "-"])])
    return lines


def summary_line(summary: Summary) -> str:
    """All of it in one line; empty without faults."""
    if not summary.faults:
        return ""
    counts = ", ".join(f"{role} {count}" for role, count in summary.by_role.items())
    again = f", {summary.repeated_steps} steps trained again" if summary.repeated_steps else ""
    return f"lost on the way: {counts}; useful time {summary.ettr:.1%} of {summary.wall_s:.0f} s{again}"
