"""Files of weights in shared memory, each named after us and locked by the process that it belongs to.

Called by the learner's weight sender and by the carrier of workers on other nodes. The kernel drops a lock with its holder, so a file nobody
holds is a left-over, in whatever container its owner lived. Leaves out: what stands in the files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Final

from sgpo_dist.errors import EnvironmentProblem

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 the machine's shared memory is the place meant
PREFIX: Final = "sgpo-weights"
HEADROOM: Final = 1.05


def places() -> list[Path]:
    """Where weights may lie on this machine, the best place first."""
    return [place for place in (SHARED_MEMORY, Path(tempfile.gettempdir())) if place.is_dir()]


def room_for(size: int, among: Sequence[Path]) -> Path:
    """The first of the places with room for ``size`` bytes. Raises EnvironmentProblem when none has."""
    for place in among:
        if shutil.disk_usage(place).free > size * HEADROOM:
            return place
    raise EnvironmentProblem(f"no room for {size / 2**20:.0f} MiB of weights in {' or '.join(map(str, among))}; free some there")


def open_locked(path: Path) -> BinaryIO:
    """A new file that is ours: a cleaner that came between creation and lock has unlinked it, so it is made again."""
    while True:
        file = path.open("w+b")
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()


def remove_left_overs(directory: Path, prefix: str = PREFIX) -> bool:
    """Unlink our files whose owner is gone: the lock of a live one cannot be taken. Whether there is a live one."""
    has_owner = False
    for path in directory.glob(f"{prefix}-*"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                has_owner = True
            else:
                path.unlink(missing_ok=True)
    return has_owner
