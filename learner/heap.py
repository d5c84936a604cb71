"""What the C library (glibc) does with freed tensors of a learner on CPU: keep their pages, but not without end.

``ALLOCATOR`` is the environment that a rank starts with. Leaves out: what is allocated.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Final

import psutil

ALLOCATOR: Final[Mapping[str, str]] = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
"""glibc keeps freed tensors instead of giving their pages back and faulting them in again at the next micro-batch."""
GROWTH: Final = 1.25
SHORT: Final = 0.1


def return_freed() -> None:
    """Give the free pages of the heap back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(psutil.Process().memory_info().rss)


def memory_is_short() -> bool:
    """Whether less than ``SHORT`` of the machine's memory is left to others."""
    memory = psutil.virtual_memory()
    return bool(memory.available < SHORT * memory.total)


class HeapBound:
    """Returns freed pages when steps of changing shapes have left ``GROWTH`` times as many as one step on a fresh heap needs, or others need them."""

    def __init__(
        self, measure: Callable[[], int] = resident, give_back: Callable[[], None] = return_freed, is_short: Callable[[], bool] = memory_is_short
    ) -> None:
        self._measure, self._give_back, self._is_short = measure, give_back, is_short
        self._need = 0
        self._is_fresh = True

    def after_step(self) -> None:
        """Call after every optimiser step."""
        held = self._measure()
        if self._is_fresh:
            self._need = max(self._need, held)
        self._is_fresh = held > GROWTH * self._need or self._is_short()
        if self._is_fresh:
            self._give_back()
