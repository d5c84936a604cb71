"""Turns on a machine's cores: engines stand still while a rank of the learner computes a step on the same processor.

Two sets of threads on the same cores wait for each other at every barrier, and both take far longer than one after the other (docs/bench.md).
A turn is a locked file in shared memory: the kernel drops the lock with its holder, so that a rank that was killed never keeps an engine
waiting, and ranks on other machines are not seen. Called by the learner's ranks (``held``) and by the engine (``taken``). Leaves out: who
gives way, and how.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sgpo_dist.weights.files import open_locked, places, remove_left_overs

logger = logging.getLogger(__name__)

PREFIX: Final = "sgpo-turn"


@contextlib.contextmanager
def held(run_id: str, directory: Path | None = None) -> Iterator[None]:
    """This process has a turn of the run until the block ends. Where no file can be made nobody waits; the log says so, and the block is run."""
    place = directory or places()[0]
    path = place / f"{PREFIX}-{run_id}-{os.getpid()}"
    with contextlib.ExitStack() as turn:
        try:
            remove_left_overs(place, PREFIX)  # of runs that nobody resumed
            turn.enter_context(open_locked(path))
            turn.callback(path.unlink, missing_ok=True)
        except OSError as problem:
            _say_once(f"engines and learner do not take turns, which is slower: {problem}")
        yield


@functools.cache
def _say_once(line: str) -> None:
    logger.warning(line)


def taken(run_id: str, directory: Path | None = None) -> bool:
    """Whether anybody on this machine has a turn of the run."""
    return remove_left_overs(directory or places()[0], f"{PREFIX}-{run_id}")
