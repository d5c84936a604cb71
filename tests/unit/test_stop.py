"""Who may ask a run to stop, how the driver hears it, and what ``sgpo-dist stop`` says. What a stop does to a run: tests/crash/test_stops.py."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fabricated_run import fabricate, run_config
from rich.console import Console

from sgpo_dist import launch
from sgpo_dist.cli.main import guarded
from sgpo_dist.cli.session import Session
from sgpo_dist.cli.stop import has_ended, what_is_left
from sgpo_dist.config import build_config
from sgpo_dist.errors import ConfigError, StoppedOnRequest
from sgpo_dist.launch import Attempt, Inputs, Parts
from sgpo_dist.run import Progress, StopRequest
from sgpo_dist.run_directory import RunDirectory


class Recorder:
    """Keeps what a person would read."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@contextmanager
def claimed(root: Path, **tree: object) -> Iterator[RunDirectory]:
    with RunDirectory.claim(run_config(root, **tree)) as directory:
        yield directory


def attempt_at(directory: RunDirectory, began: float | None = None, **tree: object) -> Attempt:
    parts: dict[str, Any] = {"recorder": Recorder(), "inputs": Inputs(Path("none"), None, None)}  # type: ignore[arg-type]
    config = run_config(directory.path.parent, **tree)
    return Attempt(config, directory, progress=Progress("preference"), checkpoint=None, began=time.monotonic() if began is None else began, **parts)


# ---- the driver hears it --------------------------------------------------------------------------------------------------------------


def heard(attempt: Attempt, *signals: int, pause_s: float = 0.0, wait_s: float = 0.1) -> tuple[str, bool]:
    """The reason to stop after signals to this process; and whether the driver was cancelled for a second one."""

    async def body() -> tuple[str, bool]:
        stop, parts = StopRequest(), Parts()
        looker = launch._hear_stops(attempt, stop, parts)
        try:
            for number in signals:
                os.kill(os.getpid(), number)
                await asyncio.sleep(pause_s)
            await asyncio.sleep(wait_s)
        except asyncio.CancelledError:
            assert parts.is_hurried
            return stop.reason, True
        finally:
            looker.cancel()
        return stop.reason, False

    return asyncio.run(body())


def test_a_signal_asks_and_says_what_happens_now(tmp_path: Path) -> None:
    with claimed(tmp_path) as directory:
        attempt = attempt_at(directory)
        assert heard(attempt, signal.SIGTERM, wait_s=0.02) == ("SIGTERM", False)
        assert attempt.recorder.messages == [  # type: ignore[attr-defined]
            "SIGTERM: the step in progress ends, then a checkpoint and the end; a second signal ends the run at once"
        ]
        assert heard(attempt, signal.SIGINT, wait_s=0.02) == ("SIGINT", False)
        assert heard(attempt, wait_s=0.0) == ("", False)


def test_a_second_signal_ends_the_attempt_at_once_but_an_echo_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with claimed(tmp_path) as directory:
        assert heard(attempt_at(directory), signal.SIGTERM, signal.SIGTERM, pause_s=0.01) == ("SIGTERM", False)
        monkeypatch.setattr(launch, "SAME_SIGNAL_S", 0.02)
        assert heard(attempt_at(directory), signal.SIGINT, signal.SIGTERM, pause_s=0.05) == ("SIGINT", True)


def test_the_request_file_and_the_time_limit_ask_and_one_signal_after_them_is_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with claimed(tmp_path) as directory:
        directory.request_stop()
        assert heard(attempt_at(directory), wait_s=0.02) == ("sgpo-dist stop", False)
        assert not (directory.path / "stop").exists()
        assert heard(attempt_at(directory, time_limit_s=0.03), wait_s=0.0) == ("", False)
        assert heard(attempt_at(directory, time_limit_s=0.03)) == ("time_limit_s", False)
        late = attempt_at(directory, began=time.monotonic() - 60.0, time_limit_s=50.0)  # what it did before counts
        assert heard(late, wait_s=0.02) == ("time_limit_s", False)
        monkeypatch.setattr(launch, "SAME_SIGNAL_S", 0.02)
        assert heard(late, signal.SIGTERM, wait_s=0.05)[1] is False


def test_sigterm_before_anything_runs_is_a_stop_too(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedOnRequest, match="before it started"), launch._stoppable_at_once():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_time_limit_is_positive_and_may_differ_on_a_resume(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="time_limit_s"):
        build_config({"time_limit_s": 0})
    with claimed(tmp_path, time_limit_s=5.0):
        pass
    with claimed(tmp_path):
        pass


# ---- what was started is ended --------------------------------------------------------------------------------------------------------


def test_parts_end_in_reverse_order_also_after_one_that_fails() -> None:
    ended: list[str] = []

    async def end(name: str, fails: bool = False) -> None:
        ended.append(name)
        if fails:
            raise ValueError(name)

    parts = Parts([lambda: end("buffer"), lambda: end("fleet", fails=len(ended) == 1), lambda: end("learner")])
    with pytest.raises(ValueError, match="fleet"):
        asyncio.run(parts.end())
    assert ended == ["learner", "fleet", "buffer", "fleet"]


def test_in_a_hurry_nobody_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "HURRY_S", 0.02)
    ended: list[str] = []

    async def slow() -> None:
        await asyncio.Event().wait()

    async def quick() -> None:
        ended.append("quick")

    asyncio.run(Parts([quick, slow], is_hurried=True).end())
    assert ended == ["quick"]


# ---- the command ----------------------------------------------------------------------------------------------------------------------


def said(*arguments: str) -> tuple[int, str]:
    out = io.StringIO()
    console = Console(file=out, width=200)
    return guarded(arguments, Session(console, console)), out.getvalue()


def test_without_a_driver_there_is_nothing_to_stop(tmp_path: Path) -> None:
    directory = fabricate(tmp_path)
    line = "sgpo-dist: error: no driver works on run 'demo': there is nothing to stop (sgpo-dist status says how it ended)\n"
    assert said("stop", "demo", "--runs", str(tmp_path)) == (2, line)
    assert not (directory.path / "stop").exists()


def test_stop_leaves_a_request_and_says_whom_it_asked(tmp_path: Path) -> None:
    with claimed(tmp_path) as directory:
        line = f"asked the driver (pid {os.getpid()}) of run 'demo' to stop\n"
        assert said("stop", str(directory.path), "--wait", "0") == (0, line)
        assert directory.take_stop_request()
        assert not directory.take_stop_request()
        code, text = said("stop", str(directory.path), "--wait", "0.01")
        assert code == 4
        assert "the driver still works after 0.01 s" in text
    with claimed(tmp_path) as directory:  # the driver ended before it saw that: the next one is not stopped for it
        assert not directory.take_stop_request()


def test_waiting_ends_with_the_driver(tmp_path: Path) -> None:
    with RunDirectory.claim(run_config(tmp_path)) as directory:
        now = iter(range(100))
        assert not has_ended(directory, 3.0, clock=lambda: float(next(now)), sleep=lambda _: None)
    assert has_ended(directory, None)


def test_what_a_stopped_run_leaves_is_named(tmp_path: Path) -> None:
    assert what_is_left(fabricate(tmp_path)) == "it was done first: the run is finished"
    with claimed(tmp_path / "other") as directory:
        assert what_is_left(directory) == "it was killed; checkpoint: none yet, but every finished pair"
        (directory.path / "events.jsonl").write_text('{"time": 1, "kind": "attempt_ended", "detail": "stopped by SIGTERM after step 3"}\n')
        (directory.checkpoints / "latest").write_text("step-3\n")
        assert what_is_left(directory) == "stopped by SIGTERM after step 3; checkpoint: step-3"
