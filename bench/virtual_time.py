"""An asyncio event loop whose clock jumps: a wait costs no real time, and everything that runs on it stays as it is.

Used by ``scale``. ``time()`` moves only when nothing is ready to run, and then to the next timer. Work for threads (the buffer's database) is
waited for at once and answered after the virtual seconds that ``service_s`` says, one piece after the other, as one thread would.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the head of the file. ``service_s`` gets the function that a thread is to run."""

    def __init__(self, service_s: Callable[[Callable[..., Any]], float]) -> None:
        self._now = 0.0
        self._service_s = service_s
        self._thread_free = 0.0
        super().__init__(_Jumping(self._jump))

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now

    def _jump(self, seconds: float) -> None:
        self._now += seconds

    def run_in_executor(self, executor: Executor | None, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """What ``func`` gives, after its virtual time. Without an executor (``asyncio.to_thread``) it takes none."""
        answer: asyncio.Future[Any] = self.create_future()
        try:
            result, problem = (func(*args) if executor is None else executor.submit(func, *args).result()), None
        except Exception as error:  # noqa: BLE001 it is the caller's, who gets it
            result, problem = None, error
        if executor is None:
            self._settle(answer, result, problem)
        else:
            self._thread_free = max(self._now, self._thread_free) + self._service_s(func)
            self.call_at(self._thread_free, self._settle, answer, result, problem)
        return answer

    @staticmethod
    def _settle(answer: asyncio.Future[Any], result: Any, problem: Exception | None) -> None:
        if answer.done():  # its caller went away
            return
        if problem is None:
            answer.set_result(result)
        else:
            answer.set_exception(problem)


class _Jumping(selectors.DefaultSelector):
    """A selector that never waits: what it should have waited is added to the clock."""

    def __init__(self, jump: Callable[[float], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[Any]:
        """No file is ever ready. Raises RuntimeError when everything waits and nothing is timed: a deadlock."""
        if timeout is None:
            raise RuntimeError("every task waits and no timer is set")
        self._jump(max(timeout, 0.0))
        return []


def run_virtually(story: Callable[[VirtualLoop], Awaitable[T]], service_s: Callable[[Callable[..., Any]], float]) -> T:
    """Run a story to its end on a loop of its own."""
    loop = VirtualLoop(service_s)
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(story(loop))
    finally:
        asyncio.set_event_loop(None)
        loop.close()
