"""Turns on a machine's cores: engines stand still while a rank of the learner computes a step on the same processor.

Two sets of threads on the same cores wait for each other at every barrier, and both take far longer than one after the other (docs/bench.md).
A turn is a locked file in shared memory: the kernel drops the lock with its holder, so that a rank that was killed never keeps an engine
waiting, and ranks on other machines are not seen. Called by the learner's ranks (``held``) and by the engine (``taken``). Leaves out: who
gives way, and how.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sgpo_dist.weights.files import open_locked, places

PREFIX: Final = "sgpo-turn"


@contextlib.contextmanager
def held(run_id: str, directory: Path | None = None) -> Iterator[None]:
    """This process has a turn of the run until the block ends."""
    path = _directory(directory) / f"{PREFIX}-{run_id}-{os.getpid()}"
    with open_locked(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def taken(run_id: str, directory: Path | None = None) -> bool:
    """Whether anybody on this machine has a turn of the run. A file whose holder is gone is removed."""
    for path in _directory(directory).glob(f"{PREFIX}-{run_id}-*"):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            path.unlink(missing_ok=True)
    return False


def _directory(given: Path | None) -> Path:
    return given or places()[0]
