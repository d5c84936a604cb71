"""Chaos without a cluster: which faults a seed draws, what a run's marks say about them, and the saboteur on a hand-made run."""

from __future__ import annotations

import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import psutil
import pytest
from fabricated_run import fabricate, run_config

from sgpo_dist.chaos import (
    KINDS,
    STORED,
    Deed,
    Injected,
    Outcome,
    Record,
    Sample,
    draw_faults,
    is_steady,
    memory_verdict,
    outcome_of,
    pause_seconds,
    problems_of,
    table_lines,
    trend_lines,
)
from sgpo_dist.checkpoint import CheckpointStore
from sgpo_dist.cli.chaos import FILE_NAME
from sgpo_dist.errors import CheckpointError
from sgpo_dist.faults import Mark
from sgpo_dist.run_directory import RunDirectory
from sgpo_dist.saboteur import LiveRun, Orders, Saboteur, damage_file

# ---- the draw ----------------------------------------------------------------------------------------------------------------------


def test_a_seed_draws_the_same_faults_and_another_seed_others() -> None:
    first, again, other = (list(islice(draw_faults(seed, 30.0, list(KINDS)), 40)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_every_kind_comes_once_before_any_comes_again_and_as_often_as_asked() -> None:
    faults = list(islice(draw_faults(3, 20.0, list(KINDS)), 16 * 200))
    for first in range(0, len(faults), 16):
        assert Counter(fault.kind for fault in faults[first : first + 16]) == dict.fromkeys(KINDS, 1)
    assert sum(fault.wait_s for fault in faults) / len(faults) == pytest.approx(20.0, rel=0.1)
    assert all(0.0 <= share < 1.0 for fault in faults for share in (fault.victim, fault.size))


@pytest.mark.parametrize(
    ("size", "deadline", "seconds"),
    [
        (0.0, None, 2.0),
        (0.25, 60.0, 5.0),  # half-way between 2 and 8
        (0.75, 60.0, 90.0),  # past the deadline: it is replaced
        (0.75, 1800.0, 5.0),  # too long to wait for
        (0.25, 6.0, 3.0),  # never a loss by accident
    ],
)
def test_a_pause_is_clearly_shorter_or_clearly_longer_than_the_deadline(size: float, deadline: float | None, seconds: float) -> None:
    assert pause_seconds(size, deadline) == pytest.approx(seconds)


# ---- what marks say ----------------------------------------------------------------------------------------------------------------


def marks(*rows: tuple[float, str] | tuple[float, str, dict[str, object]]) -> list[Mark]:
    return [Mark(*row) for row in rows]


def fault(kind: str, **fields: object) -> Injected:
    """At second 100; a pause ends at 104; five outcomes were stored."""
    known = {"number": 1, "kind": kind, "time": 100.0, "until": 104.0 if kind.startswith("pause") else 100.0, "pid": 9, "stored": 5}
    return Injected(**{**known, **fields})  # type: ignore[arg-type]


BEFORE = marks((1.0, "attempt"), (90.0, "worker_lost"), (95.0, "worker_started"), (96.0, "learner_lost"), (97.0, "learner_rebuilt"))


@pytest.mark.parametrize(
    ("kind", "after", "what", "at"),
    [
        ("kill-worker", [(101.0, "worker_lost"), (130.0, "worker_started")], "worker replaced", 130.0),
        ("kill-engine", [(101.0, "worker_lost")], None, None),
        ("kill-engine", [(101.0, "worker_started"), (102.0, "step"), (103.0, "step")], None, None),  # nobody noticed the loss
        ("pause-worker", [(102.0, "worker_lost"), (105.0, "step"), (106.0, "step"), (130.0, "worker_started")], "worker replaced", 130.0),
        ("pause-worker", [(102.0, "worker_lost"), (105.0, "step"), (106.0, "step")], None, None),  # the learner moves, the worker is away
        ("pause-engine", [(102.0, "step"), (103.0, "step"), (105.0, STORED, {"count": 6})], "went on", 105.0),
        ("kill-learner", [(101.0, "learner_lost"), (120.0, "learner_rebuilt")], "learner rebuilt", 120.0),
        ("kill-learner", [(101.0, "step"), (102.0, "step")], None, None),
        ("pause-learner", [(105.0, "step"), (107.0, "step")], "went on", 107.0),
        ("kill-buffer", [(101.0, STORED, {"count": 5}), (103.0, STORED, {"count": 7})], "buffer back on its file", 103.0),
        ("kill-buffer", [(101.0, "step")], None, None),  # its batch may have been taken before
        ("kill-buffer", [(101.0, "step"), (102.0, "step")], "buffer back on its file", 102.0),
        ("pause-buffer", [(102.0, STORED, {"count": 6}), (103.0, "step"), (105.0, "step")], None, None),  # still stopped at 103
        ("kill-driver", [(110.0, "attempt"), (140.0, "version_published")], "driver resumed", 140.0),
        ("kill-driver", [(100.5, "version_published"), (110.0, "attempt")], None, None),
        ("pause-driver", [(105.0, STORED, {"count": 6})], "went on", 105.0),
        ("stop-driver", [(110.0, "attempt"), (140.0, "version_published")], "driver resumed", 140.0),
        ("kill-worker", [(109.0, "attempt_ended", {"reason": "done"})], "the run was done first", 109.0),
        ("kill-worker", [(109.0, "attempt_ended", {"reason": "RunFailed"})], None, None),
    ],
)
def test_what_shows_that_a_fault_is_over(kind: str, after: list[tuple[float, str]], what: str | None, at: float | None) -> None:
    found = outcome_of(fault(kind), BEFORE + marks(*after))
    assert (found and found.what, found and found.recovered_at) == (what, at)


RESUMED = [(110.0, "attempt"), (140.0, "version_published")]


def test_a_damaged_checkpoint_must_be_named() -> None:
    hit = fault("flip-checkpoint", detail="step-4/learner/rank0.pt")
    said = (111.0, "message", {"text": "checkpoint step-4 is damaged (rank0.pt has another hash); it is passed over"})
    other = (111.0, "message", {"text": "checkpoint step-40 is damaged (x); it is passed over"})
    good = outcome_of(hit, marks(RESUMED[0], said, RESUMED[1]))
    assert good == Outcome("fell back, and said so", 140.0)
    for silent in (marks(*RESUMED), marks(RESUMED[0], other, RESUMED[1])):
        bad = outcome_of(hit, silent)
        assert bad is not None
        assert not bad.ok
        assert "step-4/learner/rank0.pt" in bad.what


@pytest.mark.parametrize(("code", "after", "ok"), [(2, [], True), (2, [(101.0, "attempt")], False), (4, [], False), (None, [], False)])
def test_a_second_driver_must_be_refused_and_leave_no_mark(code: int | None, after: list[tuple[float, str]], ok: bool) -> None:
    found = outcome_of(fault("second-driver", code=code, until=112.0), marks(*after))
    assert found is not None
    assert (found.ok, found.recovered_at) == (ok, 112.0)


def test_a_run_is_steady_when_the_driver_of_the_moment_has_all_its_parts() -> None:
    rows = marks((1.0, "attempt"), (2.0, "worker_started", {"worker": "a"}), (3.0, "version_published"))
    assert is_steady(rows, workers=1)
    assert not is_steady(rows, workers=2)
    assert not is_steady(rows[:2], workers=1)
    assert not is_steady([*rows, *marks((4.0, "worker_lost", {"worker": "a"}))], workers=1)
    assert not is_steady([*rows, *marks((4.0, "learner_lost"))], workers=1)
    assert is_steady([*rows, *marks((4.0, "learner_lost"), (5.0, "learner_rebuilt"))], workers=1)
    assert is_steady([*rows, *marks((4.0, "worker_lost", {"worker": "b"}))], workers=1)  # one that never came up
    assert not is_steady([*rows, *marks((4.0, "attempt"), (5.0, "version_published"))], workers=1)


# ---- figures -----------------------------------------------------------------------------------------------------------------------


def record(kind: str, seconds: float | None, number: int = 1, ok: bool = True) -> Record:
    outcome = None if seconds is None else Outcome("worker replaced" if ok else "not refused", 100.0 + seconds, ok)
    return Record(fault(kind, number=number), outcome)


def test_the_table_has_a_line_a_kind_with_median_and_worst() -> None:
    records = [record("kill-driver", None), *(record("kill-worker", seconds) for seconds in (10.0, 40.0, 12.0))]
    assert table_lines(records)[1:] == [
        ["kill-worker", "worker replaced", "3", "12.0 s", "40.0 s"],
        ["kill-driver", "not recovered", "1", "-", "-"],
    ]
    mixed = [record("second-driver", 1.0), record("second-driver", 1.0, ok=False)]
    assert table_lines(mixed)[1][1] == "worker replaced 1, not refused 1"


def test_problems_are_named_by_fault() -> None:
    records = [record("kill-worker", 1.0), record("kill-buffer", None, 2), record("second-driver", 1.0, 3, ok=False)]
    assert problems_of(records) == ["fault 2 (kill-buffer): not recovered", "fault 3 (second-driver): not refused"]


def held(*workers: int, shared: int = 0) -> list[Sample]:
    return [Sample(30.0 * number, {"driver": 100 * 2**20, "worker": mib * 2**20}, shared, 50, 7) for number, mib in enumerate(workers)]


PART = Sample(0.0, {"driver": 10**12}, 10**12, 10**6, 10**6)
"""While only the driver is there, whatever it holds says nothing."""


def test_memory_is_compared_by_the_medians_of_the_thirds_of_the_whole_run() -> None:
    samples = held(900, 100, 300, 500, 500, 500, 400, 340, 10)  # medians 300 and 340, beside the driver's 100
    assert trend_lines([PART, *samples[:7], PART, PART, *samples[7:]])[1:] == [
        ["memory: driver", "100 MiB", "100 MiB", "+0.0%"],
        ["memory: worker", "300 MiB", "340 MiB", "+13.3%"],
        ["memory: all", "400 MiB", "440 MiB", "+10.0%"],
        ["shared memory", "0 MiB", "0 MiB", "+0.0%"],
        ["open files", "50", "50", "+0.0%"],
        ["processes", "7", "7", "+0.0%"],
    ]
    assert memory_verdict(held(*[300] * 6, *[310] * 3)) == "memory flat: +2.5%, by 9 samples of the whole run"
    assert memory_verdict(held(*[300] * 6, *[700] * 3)) == "memory grew: +100.0%, by 9 samples of the whole run"
    assert memory_verdict([*held(300), *[PART] * 9]) == "memory: too short a run to tell (1 samples)"
    assert trend_lines([])[1] == ["memory: all", "0 MiB", "0 MiB", "+0.0%"]


# ---- the saboteur on a hand-made run -------------------------------------------------------------------------------------------------


class FakeRun:
    """A run in virtual seconds: a part that is hit is back three seconds later. It notes what was done to it."""

    def __init__(self, ends_at: float = 1e9, deaf: bool = False, stop_code: int = 5, rival_code: int = 2, late_loss: bool = False) -> None:
        self.time = 0.0
        self.running: int | None = None
        self.deeds: list[tuple[int, int]] = []
        self.stopped: set[int] = set()
        self.starts = 0
        self._ends_at, self._deaf, self._stop_code, self._rival_code, self._late_loss = ends_at, deaf, stop_code, rival_code, late_loss
        self._code: int | None = None
        self._marks: list[Mark] = []
        self._due: list[tuple[float, Callable[[], None]]] = []
        self._count = 0

    def start(self) -> None:
        assert self._code is not None or self.starts == 0, "one driver at a time"
        self.starts += 1
        self._code = None
        self._say("attempt")
        self._in(3.0, lambda: (self._say("worker_started", worker=f"w{self.starts}"), self._say("version_published")))

    def code(self) -> int | None:
        self._happen()
        return self._code

    def last_words(self) -> str:
        return "sgpo-dist: error: the end"

    def look(self) -> Sequence[Mark]:
        self._happen()
        return self._marks

    def pids(self, title: str) -> list[int]:
        if self._code is not None:
            return []
        return [{"": 1, "ray::RolloutActor": 2, "VLLM::EngineCore": 3, "VLLM::Worker": 4, "ray::PairBuffer": 5, "ray::RankHost": 6}[title]]

    def send(self, pid: int, number: int) -> None:
        self.deeds.append((pid, number))
        if number in (signal.SIGSTOP, signal.SIGCONT):
            (self.stopped.add if number == signal.SIGSTOP else self.stopped.discard)(pid)
            if number == signal.SIGCONT and self._late_loss:
                self._in(1.0, lambda: self._lose(2))
        elif pid == 1:
            self._due.clear()
            self._code = self._stop_code if number == signal.SIGTERM else -9
        elif not self._deaf:
            self._lose(pid)

    def _lose(self, pid: int) -> None:
        if pid in (2, 3, 4):
            self._say("worker_lost", worker=f"w{self.starts}")
            self._in(3.0, lambda: self._say("worker_started", worker=f"w{self.starts}"))
        elif pid == 6:
            self._say("learner_lost")
            self._in(3.0, lambda: self._say("learner_rebuilt"))

    def stored(self) -> int:
        return self._count

    def checkpoints(self) -> int:
        return 2

    def damage(self, deed: Deed, file: float, place: float) -> str:
        assert self._code is not None, "the driver must be dead"
        self._in(1.0, lambda: self._say("message", text=f"checkpoint step-{self.starts} is damaged (x); it is passed over"))
        return f"step-{self.starts + 1}/{deed}"

    def rival(self, deadline_s: float) -> int | None:
        self.time += 1.0
        return self._rival_code

    def leftovers(self) -> list[str]:
        return []

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def _say(self, kind: str, **fields: object) -> None:
        self._marks.append(Mark(self.time, kind, fields))

    def _in(self, seconds: float, what: Callable[[], object]) -> None:
        self._due.append((self.time + seconds, lambda: (what(), None)[1]))

    def _happen(self) -> None:
        if self._code is None and self.time >= self._ends_at:
            self._say("attempt_ended", reason="done")
            self._code = 0
        for due in [item for item in self._due if item[0] <= self.time]:
            self._due.remove(due)
            due[1]()
        if self._code is None and not self.stopped:
            self._count += 1
            self._say(STORED, count=self._count)


def play(run: FakeRun, kinds: Sequence[str] = tuple(KINDS), count: int | None = None, seconds: float = 1000.0, patience: float = 60.0):
    heard: list[Record] = []
    orders = Orders(5, seconds, 4.0, tuple(kinds), workers=1, count=count, patience_s=patience, deadlines_s={"pause-worker": 10.0})
    found = Saboteur(run, orders, heard.append).play()
    assert heard == found.records
    return found


def test_all_kinds_are_done_and_recovered_from_one_at_a_time() -> None:
    run = FakeRun()
    found = play(run, count=32)
    assert found.problems == []
    assert Counter(done.fault.kind for done in found.records) == dict.fromkeys(KINDS, 2)
    ends = [done.outcome.recovered_at for done in found.records if done.outcome]
    assert all(later.fault.time >= end for end, later in zip(ends, found.records[1:], strict=False))
    assert run.starts == 1 + 2 * 5  # two each of kill, stop, flip, cut and drop ended the driver
    assert not run.stopped
    assert run.deeds[-1] == (1, signal.SIGTERM)
    assert sum(deed == (1, signal.SIGKILL) for deed in run.deeds) == 8
    by_kind = {done.fault.kind: done for done in found.records}
    assert by_kind["kill-learner"].recovery_s == pytest.approx(3.0, abs=0.6)
    assert by_kind["cut-checkpoint"].fault.detail.endswith("/cut")
    assert by_kind["second-driver"].fault.code == 2


def test_the_same_seed_does_the_same_deeds() -> None:
    runs = [FakeRun(), FakeRun()]
    for run in runs:
        play(run, count=20)
    assert runs[0].deeds == runs[1].deeds


def test_no_fault_is_begun_when_the_time_is_over_and_the_run_is_stopped() -> None:
    run = FakeRun()
    found = play(run, ["kill-worker"], seconds=50.0)
    assert 2 <= len(found.records) <= 20
    assert max(done.fault.time for done in found.records) <= found.began + 50.0
    assert run.deeds[-1] == (1, signal.SIGTERM)
    assert found.wall_s == pytest.approx(50.0, abs=8.0)


def test_no_fault_is_done_while_something_else_is_being_mended() -> None:
    """Every pause is followed by a loss that comes only after the run was seen to go on."""
    run = FakeRun(late_loss=True)
    found = play(run, ["pause-worker", "kill-buffer"], count=40)
    losses = [mark.time for mark in run.look() if mark.kind == "worker_lost"]
    assert len(losses) == 20
    assert not [done for done in found.records for loss in losses if loss < done.fault.time < loss + 3.0]


def test_a_run_that_never_comes_up_is_a_problem() -> None:
    found = play(FakeRun(ends_at=1.0), ["kill-worker"])
    assert (found.problems, found.records, found.wall_s) == ([], [], 0.0)
    run = FakeRun()
    run.start = lambda: None  # type: ignore[method-assign]
    assert play(run, ["kill-worker"]).problems == ["the run was not at work with all its parts within 60 s"]


def test_a_run_that_is_done_ends_the_chaos_well() -> None:
    found = play(FakeRun(ends_at=30.0), ["kill-buffer"])
    assert found.problems == []
    assert found.records


def test_a_fault_that_nobody_notices_is_a_problem_and_the_last_one() -> None:
    found = play(FakeRun(deaf=True), ["kill-learner"])
    assert len(found.records) == 1
    assert found.problems == ["the run was not over kill-learner within 60 s", "fault 1 (kill-learner): not recovered"]


@pytest.mark.parametrize("code", [4, -15])
def test_a_driver_that_does_not_stop_in_good_order_is_a_problem(code: int) -> None:
    for kind, what in (("stop-driver", None), ("kill-worker", "worker replaced")):  # as a fault, and at the end
        run = FakeRun(stop_code=code)
        found = play(run, [kind], count=1)
        assert run.starts == 1
        assert [done.outcome and done.outcome.what for done in found.records] == [what]
        assert f"the training command ended with exit code {code}: sgpo-dist: error: the end" in found.problems


def test_an_accepted_second_driver_is_a_problem() -> None:
    assert play(FakeRun(rival_code=0), ["second-driver"], count=1).problems == ["fault 1 (second-driver): ended with exit code 0"]


# ---- the hands ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> RunDirectory:
    return fabricate(tmp_path)


def live(command: list[str], run: Path, **options: object) -> LiveRun:
    return LiveRun(command, run, run.with_name("out.log"), clock=lambda: 1_700_000_000.0, **options)  # type: ignore[arg-type]


def test_marks_are_read_once_and_a_torn_line_is_passed_over(finished: RunDirectory) -> None:
    run = live([], finished.path)
    kinds = Counter(mark.kind for mark in run.look())
    assert (kinds["attempt"], kinds["step"], kinds["version_published"], kinds[STORED]) == (1, 2, 2, 1)
    assert run.stored() == 6  # five pairs, one refusal
    with finished.events_file.open("a") as file:
        file.write('{"time": 1700000001.0, "kind": "torn')
    assert Counter(mark.kind for mark in run.look()) == kinds
    with finished.events_file.open("a") as file:
        file.write('\n{"time": 1700000002.0, "kind": "checkpoint", "step": 2}\n{"time": 1.0, "kind": "old"}\n')
    assert Counter(mark.kind for mark in run.look()) - kinds == {"checkpoint": 1}
    for piece in ('{"time": 1700000003.0, "ki', 'nd": "late"}\n'):
        with finished.events_file.open("a") as file:
            file.write(piece)
        seen = run.look()
    assert seen[-1].kind == "late"


@pytest.mark.parametrize("deed", [Deed.FLIP, Deed.CUT, Deed.DROP])
def test_the_newest_checkpoint_is_damaged_only_when_another_is_left(finished: RunDirectory, deed: Deed) -> None:
    run, store = live([], finished.path), CheckpointStore(finished.checkpoints, run_id=finished.run_id)
    assert run.checkpoints() == 1
    assert run.damage(deed, 0.0, 0.5) == ""
    draft = store.begin(4)
    (draft / "weights").write_bytes(bytes(100))
    store.commit(draft, 4, {"stage": "preference"})
    assert run.checkpoints() == 2
    assert run.damage(deed, 0.99, 0.5) == "step-4/weights"
    with pytest.raises(CheckpointError):
        store.load(finished.checkpoints / "step-4")
    assert run.checkpoints() == 1
    assert run.damage(deed, 0.99, 0.5) == ""  # the last intact one is left alone
    store.commit(store.begin(4), 4, {"stage": "preference"})
    assert run.checkpoints() == 2


def test_a_byte_is_turned_or_the_rest_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\x00\x01\x02\x03")
    damage_file(path, Deed.FLIP, 0.5)
    assert path.read_bytes() == b"\x00\x01\xfd\x03"
    damage_file(path, Deed.CUT, 0.99)
    assert path.read_bytes() == b"\x00\x01\xfd"
    damage_file(path, Deed.DROP, 0.5)
    assert not path.exists()


ORPHANAGE = """
import ctypes, os, time
if os.fork():
    time.sleep(60)
os.setsid()
ctypes.CDLL(None).prctl(15, b"ray::PairBuffer")
print("ready", flush=True)
time.sleep(60)
"""


def test_processes_are_found_by_title_and_what_outlives_the_driver_is_named_and_ended(tmp_path: Path) -> None:
    run = live([sys.executable, "-I", "-S", "-c", ORPHANAGE], tmp_path / "run", grace_s=0.0)
    run.start()
    while run.last_words() != "ready":
        time.sleep(0.005)
    (child,), (driver,) = run.pids("ray::PairBuffer"), run.pids("")
    assert run.code() is None
    assert psutil.Process(child).ppid() == driver
    run.send(driver, signal.SIGKILL)
    while run.code() is None:
        time.sleep(0.005)
    assert run.code() == -9
    assert run.leftovers() == [f"{child} ray::PairBuffer"]
    while run.leftovers():
        time.sleep(0.005)
    run.send(child, signal.SIGCONT)  # of a process that is gone: nothing
    (sample,) = run.samples
    assert set(sample.resident) == {"driver", "buffer"}
    assert min(sample.resident.values()) > 2**20
    assert sample.processes == 2
    assert sample.files >= 6  # three standard streams each


FAMILY = """
import ctypes, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; spawn_main = time.sleep; print('ready', flush=True); spawn_main(60)"])
ctypes.CDLL(None).prctl(15, b"ray::RolloutActor")
child.wait()
"""


def test_an_engine_s_process_without_a_title_is_known_by_descent(tmp_path: Path) -> None:
    """setproctitle does nothing where the first variable of the environment was changed, and the order of Ray's is not ours to say."""
    command = [sys.executable, "-I", "-S", "-c"]
    run = live([*command, f"import subprocess; subprocess.run({[*command, FAMILY]!r})"], tmp_path / "run", grace_s=5.0)
    run.start()
    while run.last_words() != "ready":
        time.sleep(0.005)
    (actor,), (engine,) = run.pids("ray::RolloutActor"), run.pids("VLLM::EngineCore")
    assert psutil.Process(engine).ppid() == actor
    assert run.pids("VLLM::Worker") == []
    for pid in (engine, actor):
        run.send(pid, signal.SIGKILL)
    assert run.leftovers() == []


# ---- the command -------------------------------------------------------------------------------------------------------------------


def chaos(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    from test_cli import Screen

    config = tmp_path / "config.yaml"
    config.write_text(f"output_dir: {tmp_path}\nrun_name: demo\nstages: [preference]\npreference: {{total_steps: 2}}\n")
    screen = Screen(environment={"RAY_ADDRESS": "there"} if "--elsewhere" in arguments else {})
    code = screen.run("chaos", "--config", str(config), *(word for word in arguments if word != "--elsewhere"))
    return code, screen.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--faults", "kill-worker,flood"), "flood"),
        (("--faults", ","), "--faults"),
        (("--minutes", "0"), "--minutes"),
        (("--every", "-1"), "--every"),
        (("--elsewhere",), "RAY_ADDRESS"),
        (("cluster.address=ray://head:10001",), "cluster.address"),
    ],
)
def test_what_means_nothing_is_refused(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    code, line = chaos(tmp_path, *arguments)
    assert code == 2
    assert says in line


def test_a_finished_run_is_left_alone(tmp_path: Path, finished: RunDirectory) -> None:
    assert run_config(tmp_path).run_dir == finished.path
    code, line = chaos(tmp_path)
    assert code == 2
    assert "finished" in line
    assert not (finished.path / FILE_NAME).exists()
