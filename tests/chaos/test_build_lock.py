"""Locks that a dead process left in DeepSpeed's build caches: torch waits on such a file for ever, a learner rank must not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from learner_rank import make_model

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("learner_rank.py")
START_S, BUILD_S = 90.0, 400.0
"""Deadlines for a rank that compiles nothing, and for one that compiles CPU Adam, on two busy cores."""
pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(560)]


def rank(optimizer: str, model: str, cache: Path, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), optimizer, model, str(cache)]
    there = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(command, env=there, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def seconds_to_train(started: subprocess.Popen[str], within: float) -> float:
    began = time.monotonic()
    try:
        output = started.communicate(timeout=within)[0]
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 0, output[-3000:]
    assert "loss" in output
    return time.monotonic() - began


@pytest.mark.fault(29, invariants="I8")
def test_a_stale_lock_where_deepspeed_would_build_is_not_waited_for(tmp_path: Path, record_property) -> None:
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    started = rank("adamw", make_model(tmp_path / "model"), tmp_path / "cache", TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    record_property("recovery_s", seconds_to_train(started, START_S))
    assert lock.exists()  # somebody else's: neither waited for nor removed


@pytest.mark.fault(29, invariants="I7 I8")
def test_a_build_that_was_killed_half_way_is_built_by_the_next_one(tmp_path: Path, record_property) -> None:
    model, cache = make_model(tmp_path / "model"), tmp_path / "cache"
    killed = rank("cpu_adam", model, cache)
    deadline = time.monotonic() + START_S
    while not (locks := list(cache.glob("torch_extensions/*/cpu_adam/lock"))):
        assert killed.poll() is None, killed.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert locks[0].exists()
    record_property("recovery_s", seconds_to_train(rank("cpu_adam", model, cache), BUILD_S))
    assert not locks[0].exists()
