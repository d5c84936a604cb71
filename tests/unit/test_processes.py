"""Only what is provably the run's is ended or removed; the machine is a folder here."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sgpo_dist.processes import (
    RUN_MARK,
    end_earlier_attempts,
    is_of_earlier_attempt,
    mark_of,
    marked,
    note_segments,
    one_ends,
    remove_segments,
    telling_line,
)


class Machine:
    """/proc and /dev/shm as folders."""

    def __init__(self, root: Path) -> None:
        self.proc, self.shm, self.logs = root / "proc", root / "shm", root / "logs"
        for folder in (self.proc, self.shm, self.logs):
            folder.mkdir()

    def process(self, pid: int, *names: str) -> None:
        (self.proc / str(pid)).mkdir(exist_ok=True)
        lines = [f"7f0000000000-7f0001000000 rw-s 00000000 00:1a 99    {self.shm}/{name}" for name in names]
        (self.proc / str(pid) / "maps").write_text("\n".join([*lines, "7f0002000000-7f0003000000 r-xp 00000000 08:01 5    /usr/lib/libc.so"]) + "\n")

    def ended(self, pid: int) -> None:
        (self.proc / str(pid) / "maps").unlink()
        (self.proc / str(pid)).rmdir()

    def segment(self, *names: str) -> None:
        for name in names:
            (self.shm / name).write_bytes(b"x")

    def note(self, *pids: int) -> None:
        note_segments(self.logs, pids, self.proc, self.shm)

    def remove(self) -> list[str]:
        return remove_segments(self.logs, self.proc, self.shm)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_what_a_dead_engine_mapped_is_removed_and_nothing_else(machine: Machine) -> None:
    machine.segment("psm_ours", "sem.mp-ours", "psm_strange", "data_ours")
    machine.process(7, "psm_ours", "sem.mp-ours", "data_ours")
    machine.note(7)
    assert machine.remove() == []  # the engine lives
    machine.ended(7)
    os.utime(machine.shm / "psm_ours", (1, 1))  # the engine wrote to it since
    assert machine.remove() == ["psm_ours", "sem.mp-ours"]
    assert sorted(path.name for path in machine.shm.iterdir()) == ["data_ours", "psm_strange"]
    assert machine.remove() == []


def test_a_segment_that_anybody_still_maps_stays_until_the_next_time(machine: Machine) -> None:
    machine.segment("psm_ours")
    machine.process(7, "psm_ours")
    machine.note(7)
    machine.ended(7)
    machine.process(8, "psm_ours")
    assert machine.remove() == []
    machine.ended(8)
    assert machine.remove() == ["psm_ours"]


def test_a_later_segment_of_the_same_name_is_another_programs(machine: Machine) -> None:
    machine.segment("psm_ours")
    machine.process(7, "psm_ours")
    machine.note(7)
    machine.ended(7)
    (machine.shm / "other").write_bytes(b"y")
    (machine.shm / "other").replace(machine.shm / "psm_ours")
    assert machine.remove() == []
    assert (machine.shm / "psm_ours").exists()


def test_a_note_that_leads_out_of_shared_memory_or_is_torn_is_passed_over(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    facts = os.stat(tmp_path / "precious")
    row = f'"device": {facts.st_dev}, "inode": {facts.st_ino}, "owner": {facts.st_uid}, "size": {facts.st_size}'
    (machine.logs / "segments.jsonl").write_text(f'{{"name": "../precious", {row}}}\n{{"name": "psm_x"}}\n[]\n{{"na')
    assert machine.remove() == []
    assert (tmp_path / "precious").exists()


def test_only_an_earlier_attempt_of_the_same_run_is_meant() -> None:
    assert is_of_earlier_attempt("abc/2", "abc", 3)
    assert not is_of_earlier_attempt("abc/3", "abc", 3)
    assert not is_of_earlier_attempt("abd/2", "abc", 3)
    assert not is_of_earlier_attempt("", "abc", 3)
    assert not is_of_earlier_attempt("abc/", "abc", 3)


def test_a_mark_is_found_behind_what_a_title_blotted_out(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "environ").write_bytes(b"\0\0\0NOT_SGPO_RUN_MARK=x/9\0SGPO_RUN_MARK=abc/2\0HOME=/\0")
    assert mark_of(7, tmp_path) == "abc/2"
    (tmp_path / "7" / "environ").write_bytes(b"\0\0\0")
    assert mark_of(7, tmp_path) == ""


ORPHAN = """
import os, time
if os.fork():
    os._exit(0)
os.setsid()
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_an_orphan_of_an_earlier_attempt_is_ended_and_a_child_of_ours_is_not() -> None:
    run_id = f"test-{os.getpid()}"
    with marked(os.environ, run_id, 1):
        child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"])
        orphan = subprocess.Popen([sys.executable, "-I", "-S", "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    assert orphan.stdout is not None
    with orphan, child:
        number = int(orphan.stdout.readline())
        assert len(end_earlier_attempts(run_id, 2)) == 1
        assert orphan.stdout.read() == ""  # its end: the writer is gone
        assert child.poll() is None
        child.kill()
    assert number != child.pid
    assert RUN_MARK not in os.environ


def test_the_end_of_any_one_process_is_seen_at_once() -> None:
    def sleeper() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    async def story() -> None:
        watch = asyncio.ensure_future(one_ends([process.pid for process in both]))
        await asyncio.sleep(0.05)
        assert not watch.done()
        both[1].kill()
        await asyncio.wait_for(watch, 5)
        both[1].wait()
        await asyncio.wait_for(one_ends([both[0].pid, both[1].pid]), 5)  # one that was gone before
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(one_ends([]), 0.05)

    both = [sleeper(), sleeper()]
    try:
        asyncio.run(story())
    finally:
        both[0].kill()
        both[0].wait()


def test_the_telling_line_is_the_last_error_made_harmless() -> None:
    assert telling_line("\nERROR first\nRuntimeError: no \x1b[31mmemory\n  INFO bye\n\n") == "RuntimeError: no memory"
    assert telling_line("one\ntwo\n\n") == "two"
    assert telling_line("") == ""
    assert len(telling_line("error " * 500)) == 300
