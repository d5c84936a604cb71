"""Ends a process of this machine by its number, and only that one. Called by the fleet and by the learner's group, who hold processes."""

from __future__ import annotations

import os
import signal

import psutil


def kill_exactly(pid: int, created: float) -> None:
    """SIGKILL a process unless its number belongs to another one by now; ``created`` is its creation time (Unix seconds)."""
    try:
        if abs(psutil.Process(pid).create_time() - created) < 1.0:
            os.kill(pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return
