"""Turns on a machine's cores, with real processes and real locks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sgpo_dist.turns import held, taken

HOLDER = """
import pathlib, sys, time
from sgpo_dist.turns import held

with held("run", pathlib.Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_a_turn_is_seen_while_it_lasts_by_its_own_run_and_leaves_nothing(tmp_path: Path) -> None:
    assert not taken("run", tmp_path)
    with held("run", tmp_path):
        assert taken("run", tmp_path)
        assert not taken("another", tmp_path)
        with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as second:
            assert second.stdout is not None
            second.stdout.readline()  # another rank's
            second.kill()
        assert taken("run", tmp_path)
    assert not list(tmp_path.iterdir())
    assert not taken("run", tmp_path)


def test_a_holder_that_is_killed_keeps_nobody_waiting(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "mine\n"
        assert taken("run", tmp_path)
        holder.kill()
        holder.wait()
    (left,) = tmp_path.iterdir()
    assert not taken("run", tmp_path)
    assert not left.exists()
    left.touch()  # as it lies there where nobody has asked since
    with held("another", tmp_path):
        assert not left.exists()


def test_without_a_place_for_its_file_steps_are_made_all_the_same_and_the_log_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = 0
    for _ in range(3):
        with held("run", tmp_path / "missing"):
            made += 1
    assert made == 3
    assert not taken("run", tmp_path / "missing")
    assert ["do not take turns" in record.getMessage() for record in caplog.records] == [True]


def test_a_turn_ends_with_an_error(tmp_path: Path) -> None:
    try:
        with held("run", tmp_path):
            raise KeyError("a step that failed")
    except KeyError:
        pass
    assert not taken("run", tmp_path)
