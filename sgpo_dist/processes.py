"""Processes of a run on this machine, and what they leave: ends one exactly, finds what a dead driver left, removes its shared memory.

Called by the fleet and the learner's group, who hold processes, and by the recorder when an attempt begins. Whatever is ended or removed here
is provably the run's: a process carries the run's mark in the environment that it was born with; a segment of shared memory was mapped by
a process of the run while that lived, is the same file still, and is mapped by nobody now. Leaves out: other machines.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import psutil

from sgpo_dist.sanitize import one_line

RUN_MARK: Final = "SGPO_RUN_MARK"
"""Variable that every process of an attempt inherits from its driver: RUN_ID/INCARNATION."""
SEGMENTS_NAME: Final = "segments.jsonl"
SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 no temporary file of ours: where Linux shows shared memory
PROCESSES: Final = Path("/proc")
_SEGMENT: Final = re.compile(r"/((?:psm_|sem\.mp-)[\w-]+)\s*$", re.MULTILINE)
_TELLING: Final = re.compile(r"error|exception|critical|fatal|killed|assert|segfault|signal", re.IGNORECASE)


def kill_exactly(pid: int, created: float) -> None:
    """SIGKILL a process unless its number belongs to another one by now; ``created`` is its creation time (Unix seconds)."""
    try:
        if abs(psutil.Process(pid).create_time() - created) < 1.0:
            os.kill(pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return


async def one_ends(pids: Iterable[int]) -> None:
    """Returns as soon as one of the processes has ended, whoever's children they are; never when there are none."""
    over, loop = asyncio.Event(), asyncio.get_running_loop()
    handles: list[int] = []
    try:
        for pid in pids:
            handles.append(os.pidfd_open(pid))
            loop.add_reader(handles[-1], over.set)
        await over.wait()
    except ProcessLookupError:
        return
    finally:
        for handle in handles:
            loop.remove_reader(handle)
            os.close(handle)


def telling_line(log: str) -> str:
    """Of the end of a log the last line that speaks of an error, else the last one; harmless and short, empty for an empty log."""
    lines = [line for line in log.splitlines() if line.strip()]
    return one_line(next((line for line in reversed(lines) if _TELLING.search(line)), lines[-1] if lines else ""))


# ---- what an earlier driver of the run left running --------------------------------------------------------------------------------


@contextmanager
def marked(environment: MutableMapping[str, str], run_id: str, incarnation: int) -> Iterator[None]:
    """Processes that are started in this context carry the attempt's mark."""
    before = environment.get(RUN_MARK)
    environment[RUN_MARK] = f"{run_id}/{incarnation}"
    try:
        yield
    finally:
        del environment[RUN_MARK]
        if before is not None:
            environment[RUN_MARK] = before


def end_earlier_attempts(run_id: str, incarnation: int) -> list[str]:
    """SIGKILL every process that an earlier attempt of the run left on this machine, and name it. Only for the run's driver: its lock is held.

    A local Ray's helpers outlive a killed driver by minutes, and engines by moments. Children of this very process live with its consent.
    """
    ended = []
    own = {process.pid for process in psutil.Process().children(recursive=True)} | {os.getpid()}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid not in own and is_of_earlier_attempt(mark_of(process.pid), run_id, incarnation):
                ended.append(one_line(process.name()))
                process.kill()
    return ended


def mark_of(pid: int, proc: Path = PROCESSES) -> str:
    """The mark that a process was born with, or nothing. A title that it set, as Ray's do, leaves zeros where the environment begins."""
    rows = (proc / str(pid) / "environ").read_bytes().split(b"\0")
    return next((row.partition(b"=")[2].decode(errors="replace") for row in rows if row.startswith(f"{RUN_MARK}=".encode())), "")


def is_of_earlier_attempt(mark: str, run_id: str, incarnation: int) -> bool:
    """Whether a process with this mark belongs to the run, and to an attempt before ``incarnation``."""
    whose, _, number = mark.partition("/")
    return whose == run_id and number.isdigit() and int(number) < incarnation


# ---- shared memory that outlives its processes -------------------------------------------------------------------------------------


def note_segments(folder: Path, pids: Iterable[int], proc: Path = PROCESSES, shm: Path = SHARED_MEMORY) -> None:
    """Write down in ``folder`` which named segments these processes map, so that whoever comes after them can remove them."""
    rows = [{"name": name, **_identity(shm / name)} for name in sorted(_mapped(proc, pids)) if (shm / name).exists()]
    if rows:
        with (folder / SEGMENTS_NAME).open("a", encoding="ascii") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


def remove_segments(folder: Path, proc: Path = PROCESSES, shm: Path = SHARED_MEMORY) -> list[str]:
    """Remove the noted segments that are still what they were and that no process maps; their names. Harmless to repeat."""
    noted = {row["name"]: row for row in _noted(folder / SEGMENTS_NAME)}
    ours = [name for name, row in noted.items() if _SEGMENT.search(f"/{name}") and _is_still(shm / name, row)]
    if not ours:
        return []
    everyone = (int(path.name) for path in proc.iterdir() if path.name.isdigit())
    idle = sorted(set(ours) - _mapped(proc, everyone))
    for name in idle:
        (shm / name).unlink(missing_ok=True)
    return idle


def _mapped(proc: Path, pids: Iterable[int]) -> set[str]:
    """Names of the segments that the processes map. One that may not be looked at is another user's, and those cannot open ours."""
    found: set[str] = set()
    for pid in pids:
        with suppress(OSError):
            found.update(_SEGMENT.findall((proc / str(pid) / "maps").read_text(encoding="utf-8", errors="replace")))
    return found


def _identity(path: Path) -> dict[str, int]:
    """What tells a file from a later one of the same name, and from one on another machine. Not its times: writing to the memory moves them."""
    facts = path.stat()
    return {"device": facts.st_dev, "inode": facts.st_ino, "owner": facts.st_uid, "size": facts.st_size}


def _is_still(path: Path, row: Mapping[str, object]) -> bool:
    with suppress(OSError):
        now = _identity(path)
        return now["owner"] == os.getuid() and all(row.get(name) == value for name, value in now.items())
    return False


def _noted(path: Path) -> Iterator[Mapping[str, str]]:
    if path.is_file():
        for line in path.read_text(encoding="ascii", errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                yield {**row, "name": str(row["name"])}
