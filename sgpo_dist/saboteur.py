"""Does to a live run what ``chaos`` draws: starts the training command, kills, stops and damages from outside, starts it again, and looks on.

Called by the command line. The run is another process that knows nothing of this one: processes are found by their titles, everything else is
read from the run's files. One fault at a time: the next one waits until the run is over the last, so that each recovery is one fault's.
``Saboteur`` only decides, over the ``Victims`` protocol; ``LiveRun`` has the hands. Leaves out: what shows a recovery (``chaos``), the
audit, and what is printed (the command line).
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import psutil

from sgpo_dist.chaos import (
    DAMAGE,
    KINDS,
    STOPPED,
    STORED,
    Deed,
    Fault,
    Injected,
    Outcome,
    Part,
    Record,
    Sample,
    draw_faults,
    is_steady,
    outcome_of,
    pause_seconds,
    problems_of,
)
from sgpo_dist.checkpoint import CheckpointStore
from sgpo_dist.errors import CheckpointError
from sgpo_dist.faults import STEP, Mark
from sgpo_dist.processes import SHARED_MEMORY, remove_segments
from sgpo_dist.run_directory import open_run

POLL_S: Final = 0.5
SAMPLE_EVERY_S: Final = 10.0
GRACE_S: Final = 60.0
"""How long processes may take to end after their driver."""

SHORT: Final = 15
"""Letters that the kernel keeps of a process's name."""
_SPAWNED: Final = {"ray::RolloutActor": "VLLM::EngineCore", "VLLM::EngineCore": "VLLM::Worker"}
ROLES: Final = {"ray::RolloutActor": "worker", "VLLM::": "engine", "ray::PairBuffer": "buffer", "ray::RankHost": "learner"}
"""How a process' title begins -> whose memory it is; whatever else there is belongs to Ray."""

T = TypeVar("T")


class Victims(Protocol):
    """The run under test, from outside. Processes that are gone already are nobody's fault: signals to them do nothing."""

    def start(self) -> None:
        """Start the training command; the one before has ended."""

    def code(self) -> int | None:
        """How the command ended, negative for a signal; None while it runs."""

    def last_words(self) -> str:
        """The last line that the command wrote."""

    def look(self) -> Sequence[Mark]:
        """Every mark so far, in time order; also remembers which processes there are."""

    def pids(self, title: str) -> list[int]:
        """Living processes of the run whose title begins so; the driver for the empty one."""

    def send(self, pid: int, number: int) -> None:
        """A signal."""

    def stored(self) -> int:
        """Outcomes in the database."""

    def checkpoints(self) -> int:
        """How many checkpoints there are that were not damaged from here."""

    def damage(self, deed: Deed, file: float, place: float) -> str:
        """Damage a file of the newest checkpoint; NAME/FILE, or empty when no other intact one is left to fall back on."""

    def rival(self, deadline_s: float) -> int | None:
        """The exit code of the same command while the first one runs; None when it had to be ended."""

    def leftovers(self) -> list[str]:
        """Processes that outlived the driver although they had time to end, and shared memory without them, as words; all is removed."""

    def now(self) -> float:
        """Unix time."""

    def sleep(self, seconds: float) -> None:
        """Let time pass."""


@dataclass(frozen=True, slots=True)
class Orders:
    """What to do. ``count`` faults at most within ``seconds``; ``deadlines_s`` says by kind when the run gives a silent process up.

    ``patience_s`` bounds every wait for the run: to start, to recover, to stop.
    """

    seed: int
    seconds: float
    every_s: float
    kinds: tuple[str, ...]
    workers: int
    count: int | None = None
    patience_s: float = 600.0
    deadlines_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Findings:
    """What happened. Times in Unix seconds; ``began`` is the first published version, ``ended`` when the command was asked to stop or was done."""

    records: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0

    @property
    def wall_s(self) -> float:
        """Seconds under chaos; 0 when it never came to that."""
        return self.ended - self.began if self.began else 0.0


class _RunEndedError(Exception):
    """The command ended though nobody ended it, or otherwise than it should."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _StuckError(Exception):
    """Something did not happen within the patience."""


class Saboteur:
    """Plays the faults of one seed on one run. ``note`` hears of every fault when its outcome is known."""

    def __init__(self, run: Victims, orders: Orders, note: Callable[[Record], None]) -> None:
        self._run = run
        self._orders = orders
        self._note = note
        self._found = Findings()

    def play(self) -> Findings:
        """Start the command, do faults until the time is over or the run is done, stop it, and look for what is left of it."""
        try:
            self._run.start()
            self._steady()
            self._found.began = self._run.now()
            self._faults()
            self._stop()
        except _RunEndedError as end:
            self._note_end(end.code)
        except _StuckError as problem:
            self._found.problems.append(str(problem))
        finally:
            self._found.ended = self._found.ended or self._run.now()
            self._found.leftovers = self._run.leftovers()
        self._found.problems += problems_of(self._found.records)
        return self._found

    def _faults(self) -> None:
        orders, end = self._orders, self._run.now() + self._orders.seconds
        for number, fault in enumerate(draw_faults(orders.seed, orders.every_s, orders.kinds), start=1):
            left = end - self._run.now()
            if orders.count is not None and number > orders.count:
                return
            self._idle(min(fault.wait_s, left))
            if fault.wait_s >= left:
                return
            self._steady()
            self._play_fault(number, fault)

    def _play_fault(self, number: int, fault: Fault) -> None:
        """Do it, and wait until the run is over it."""
        pid, now = self._victim(fault), self._run.now()
        record = Record(Injected(number, fault.kind, now, now, pid, self._run.stored()))
        try:
            record = Record(self._do(record.fault, fault))
            record = replace(record, outcome=self._wait(lambda: outcome_of(record.fault, self._run.look())))
        except _RunEndedError as end:
            record = replace(record, outcome=Outcome("the run was done first", self._run.now()) if end.code == 0 else None)
            raise
        finally:
            self._found.records.append(record)
            self._note(record)
        if record.outcome is None:
            raise _StuckError(f"the run was not over {fault.kind} within {self._orders.patience_s:g} s")

    def _victim(self, fault: Fault) -> int:
        """One of the processes that this kind may hit, once there is one (and what is to be damaged is there)."""
        kind = KINDS[fault.kind]
        if kind.deed in DAMAGE:
            self._must(lambda: self._run.checkpoints() >= 2, f"{fault.kind}: no second checkpoint (checkpoint.keep_last, checkpoint.save_steps)")
        found = self._must(lambda: self._run.pids(kind.title), f"{fault.kind}: no process {kind.title}")
        return found[int(fault.victim * len(found))]

    def _do(self, done: Injected, fault: Fault) -> Injected:
        """The deed. What is stored is counted when the victim can no longer store."""
        kind = KINDS[fault.kind]
        if kind.deed is Deed.START:
            code = self._run.rival(self._orders.patience_s)
            return replace(done, code=code, until=self._run.now())
        if kind.deed is Deed.PAUSE:
            return self._pause(done, pause_seconds(fault.size, self._orders.deadlines_s.get(fault.kind)))
        self._run.send(done.pid, signal.SIGTERM if kind.deed is Deed.STOP else signal.SIGKILL)
        if kind.part is Part.DRIVER:
            return self._start_again(done, fault)
        return replace(done, stored=self._run.stored())

    def _pause(self, done: Injected, seconds: float) -> Injected:
        self._run.send(done.pid, signal.SIGSTOP)
        stored = self._run.stored()
        try:
            self._idle(seconds)
        finally:
            self._run.send(done.pid, signal.SIGCONT)
        return replace(done, until=self._run.now(), stored=stored)

    def _start_again(self, done: Injected, fault: Fault) -> Injected:
        """Wait for the driver's end, damage what is to be damaged, run the same command."""
        deed = KINDS[fault.kind].deed
        code = self._ended(fault.kind)
        if deed is Deed.STOP and code != STOPPED:
            raise _RunEndedError(code)  # 0: it was done first
        detail = self._run.damage(deed, fault.victim, fault.size) if deed in DAMAGE else ""
        self._run.start()
        return replace(done, detail=detail, code=code)

    def _stop(self) -> None:
        """SIGTERM to a run that is whole; 5 and 0 are good ends."""
        self._steady()
        self._found.ended = self._run.now()
        for pid in self._run.pids(""):
            self._run.send(pid, signal.SIGTERM)
        code = self._ended("SIGTERM")
        if code != STOPPED:
            raise _RunEndedError(code)

    def _note_end(self, code: int) -> None:
        self._run.look()
        if code != 0:
            self._found.problems.append(f"the training command ended with exit code {code}: {self._run.last_words()}")

    # ---- waiting --------------------------------------------------------------------------------------------------------------------

    def _steady(self) -> None:
        self._must(lambda: is_steady(self._run.look(), self._orders.workers), "the run was not at work with all its parts")

    def _ended(self, cause: str) -> int:
        """The driver's exit code, once it has ended for ``cause``."""
        deadline = self._run.now() + self._orders.patience_s
        while (code := self._run.code()) is None:
            if self._run.now() > deadline:
                raise _StuckError(f"the driver did not end within {self._orders.patience_s:g} s of {cause}")
            self._run.look()
            self._run.sleep(POLL_S)
        return code

    def _must(self, ready: Callable[[], T], otherwise: str) -> T:
        found = self._wait(ready)
        if not found:
            raise _StuckError(f"{otherwise} within {self._orders.patience_s:g} s")
        return found

    def _wait(self, ready: Callable[[], T]) -> T | None:
        """The first true value of ``ready``; None when patience runs out. Raises _RunEndedError when the command ends before that."""
        deadline = self._run.now() + self._orders.patience_s
        while True:
            code = self._run.code()  # before the look: what the run left before it ended is still looked at
            if found := ready():
                return found
            if code is not None:
                raise _RunEndedError(code)
            if self._run.now() >= deadline:
                return None
            self._run.sleep(POLL_S)

    def _idle(self, seconds: float) -> None:
        """Let time pass beside a command that should go on running."""
        end = self._run.now() + seconds
        while (left := end - self._run.now()) > 0:
            code = self._run.code()
            self._run.look()
            if code is not None:
                raise _RunEndedError(code)
            self._run.sleep(min(POLL_S, left))


# ---- the hands -------------------------------------------------------------------------------------------------------------------------


class LiveRun:
    """``Victims`` over a real training command on this machine; what it prints goes to ``output``."""

    def __init__(
        self, command: Sequence[str], directory: Path, output: Path, clock: Callable[[], float] = time.time, grace_s: float = GRACE_S
    ) -> None:
        self._command = list(command)
        self._directory = directory
        self.output = output
        self._clock = clock
        self._grace_s = grace_s
        self._began = clock()
        self._driver: subprocess.Popen[bytes] | None = None
        self._seen: set[psutil.Process] = set()
        self._marks: list[Mark] = []
        self._events, self._metrics = _Tail(directory / "events.jsonl"), _Tail(directory / "metrics.jsonl")
        self._damaged: set[tuple[str, int]] = set()
        self._stored = 0
        self._sampled_at = 0.0
        self.samples: list[Sample] = []
        """One every ``SAMPLE_EVERY_S`` seconds while a driver lives."""

    def start(self) -> None:
        """See Victims."""
        self._driver = self._launched()

    def _launched(self) -> subprocess.Popen[bytes]:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with self.output.open("ab") as sink:
            return subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True)  # noqa: S603 our own

    def code(self) -> int | None:
        """See Victims."""
        return None if self._driver is None else self._driver.poll()

    def last_words(self) -> str:
        """See Victims."""
        lines = self.output.read_text(encoding="utf-8", errors="replace").splitlines() if self.output.is_file() else []
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")

    def look(self) -> Sequence[Mark]:
        """See Victims."""
        self._remember()
        found = [Mark(float(row.pop("time")), str(row.pop("kind", "")), row) for row in self._events.rows()]
        found += [Mark(float(row.pop("time")), STEP, row) for row in self._metrics.rows()]
        count = self.stored()
        if count > self._stored:
            self._stored = count
            found.append(Mark(self._clock(), STORED, {"count": count}))
        self._marks += [mark for mark in found if mark.time >= self._began]
        self._marks.sort(key=lambda mark: mark.time)
        return self._marks

    def stored(self) -> int:
        """See Victims. As many as before while the database cannot be read."""
        path = self._directory / "buffer.db"
        try:
            with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=1.0)) as database:
                return int(database.execute("SELECT (SELECT COUNT(*) FROM pairs) + (SELECT COUNT(*) FROM refusals)").fetchone()[0])
        except sqlite3.Error:
            return self._stored

    def rival(self, deadline_s: float) -> int | None:
        """See Victims."""
        process = self._launched()
        try:
            return process.wait(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None

    def now(self) -> float:
        """See Victims."""
        return self._clock()

    def sleep(self, seconds: float) -> None:
        """See Victims."""
        time.sleep(seconds)

    # ---- processes -------------------------------------------------------------------------------------------------------------------

    def pids(self, title: str) -> list[int]:
        """See Victims."""
        if not title:
            return [self._driver.pid] if self._driver is not None and self._driver.poll() is None else []
        self._remember()
        return sorted(process.pid for process in self._seen if _title(process).startswith(title[:SHORT]))

    def send(self, pid: int, number: int) -> None:
        """See Victims."""
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def leftovers(self) -> list[str]:
        """See Victims. A driver that still runs is ended first."""
        self._remember()
        if self._driver is not None and self._driver.poll() is None:
            self._driver.kill()
            self._driver.wait()
        deadline = time.monotonic() + self._grace_s
        while self._seen and time.monotonic() < deadline:
            time.sleep(POLL_S)
            self._remember()
        words = [f"{process.pid} {_title(process)}" for process in self._seen]
        for process in self._seen:
            with suppress(psutil.Error):
                process.kill()
        return words + [f"shared memory {name}" for name in remove_segments(self._directory / "logs")]

    def _remember(self) -> None:
        """All descendants of the driver and of what it or an earlier one left: after a kill they are nobody's children."""
        driver = self.pids("")
        self._seen = {process for process in self._seen if _is_alive(process)}
        family = _family({*driver, *(process.pid for process in self._seen)})
        self._seen |= {process for process in family if process.pid not in driver and _is_alive(process)}
        if driver and self._clock() - self._sampled_at >= SAMPLE_EVERY_S:
            self._sampled_at = self._clock()
            self.samples.append(take_sample(family, driver[0], self._sampled_at))

    # ---- checkpoints -----------------------------------------------------------------------------------------------------------------

    def checkpoints(self) -> int:
        """See Victims. A step that was committed again since is another directory."""
        return sum(_made(path) not in self._damaged for path in self._checkpoint_dirs())

    def _checkpoint_dirs(self) -> list[Path]:
        return sorted((self._directory / "checkpoints").glob("step-*"))

    def damage(self, deed: Deed, file: float, place: float) -> str:
        """See Victims. FLIP turns all bits of the byte at ``place``, CUT ends the file there, DROP removes it."""
        newest = self._newest_of_several()
        if newest is None:
            return ""
        files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
        victim = files[int(file * len(files))]
        damage_file(victim, deed, place)
        self._damaged.add(_made(newest))
        return f"{newest.name}/{victim.relative_to(newest)}"

    def _newest_of_several(self) -> Path | None:
        run = open_run(self._directory)
        store = CheckpointStore(run.checkpoints, run_id=run.run_id)
        intact = []
        for path in self._checkpoint_dirs():
            with suppress(CheckpointError):
                intact.append(store.load(path))
        intact.sort(key=lambda checkpoint: checkpoint.sequence)
        return intact[-1].path if len(intact) > 1 else None


def _made(checkpoint: Path) -> tuple[str, int]:
    """Tells a checkpoint from a later one of the same step; damage to a file of it changes neither part."""
    return checkpoint.name, checkpoint.stat().st_mtime_ns if checkpoint.is_dir() else 0


def damage_file(path: Path, deed: Deed, place: float) -> None:
    """FLIP: the byte at share ``place`` of the file becomes another; CUT: what begins there is gone; DROP: all of it is."""
    if deed is Deed.DROP:
        path.unlink()
        return
    offset = int(place * path.stat().st_size)
    with path.open("r+b") as file:
        if deed is Deed.CUT:
            file.truncate(offset)
            return
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0xFF]))


class _Tail:
    """The objects of a JSON-lines file, each once, as the lines are finished; a line that a crash cut is passed over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def rows(self) -> list[dict[str, Any]]:
        """What is new."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [row for line in whole.splitlines() if (row := _object(line)) is not None]


def _object(line: bytes) -> dict[str, Any] | None:
    with suppress(ValueError):
        tree = json.loads(line)
        if isinstance(tree, dict) and "time" in tree:
            return tree
    return None


def _family(roots: set[int]) -> list[psutil.Process]:
    """The processes of these numbers and all their descendants, from one look at the machine."""
    processes: dict[int, psutil.Process] = {}
    children: defaultdict[int, list[int]] = defaultdict(list)
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            children[process.ppid()].append(process.pid)
            processes[process.pid] = process
    family, todo = set(roots), list(roots)
    while todo:
        born = children[todo.pop()]
        todo += [pid for pid in born if pid not in family]
        family.update(born)
    return [processes[pid] for pid in sorted(family) if pid in processes]


def _is_alive(process: psutil.Process) -> bool:
    """Whether it is still the same process, and not only its exit code."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _title(process: psutil.Process) -> str:
    """Its name. An engine's process cannot always set one (a changed first variable of its environment hides the room for it): then by descent."""
    try:
        name, parent = process.name(), process.parent()
        if not name.startswith("python") or parent is None or "spawn_main" not in " ".join(process.cmdline()):
            return name
        of_parent = _title(parent)
        return next((child for title, child in _SPAWNED.items() if of_parent.startswith(title[:SHORT])), name)
    except psutil.Error:
        return ""


def take_sample(family: Sequence[psutil.Process], driver: int, now: float, shared: Path = SHARED_MEMORY) -> Sample:
    """What the processes hold; one that ends meanwhile holds nothing."""
    resident: dict[str, int] = defaultdict(int)
    files = 0
    for process in family:
        with suppress(psutil.Error):
            role = "driver" if process.pid == driver else _role(process)
            resident[role] += int(process.memory_info().rss)
            files += process.num_fds()
    return Sample(now, dict(resident), sum(_size(path) for path in shared.glob("*")), files, len(family))


def _role(process: psutil.Process) -> str:
    title = _title(process)
    return next((role for start, role in ROLES.items() if title.startswith(start)), "ray")


def _size(path: Path) -> int:
    """Bytes that a file really takes."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0
