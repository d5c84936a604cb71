"""SIGKILL at every named point of the ledger and of the checkpoint store, then a resume: the same weights as a run that nothing happened to."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import small_run

from sgpo_dist.buffer import ledger
from sgpo_dist.buffer.audit import audit_run
from sgpo_dist.checkpoint import CRASH_POINTS

RESUME_ONLY = "ckpt.old_moved"
POINTS = [point for point in (*ledger.CRASH_POINTS, *CRASH_POINTS) if point != RESUME_ONLY]
ONCE = ("ledger.begin.", "ledger.open_stage.")


def children(what: str, tasks: dict[Path, str]) -> list[int]:
    """The exit codes of small runs, each in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(Path(small_run.__file__)), what, *(f"{directory}={value}" for directory, value in tasks.items())]
    return [int(line) for line in subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.split()]


def fresh(root: Path, names: list[str]) -> list[Path]:
    for name in names:
        (root / name).mkdir()
    return [root / name for name in names]


def stored(directory: Path) -> set[str]:
    with closing(sqlite3.connect(f"file:{directory}/buffer.db?mode=ro", uri=True)) as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'pairs'").fetchone():
            return set()
        return {uid for (uid,) in db.execute("SELECT uid FROM pairs UNION SELECT uid FROM refusals")}


def check_survivors(directory: Path, name: str) -> None:
    """What was acknowledged is there, the checkpoint is the last one that was reported saved or the one in the making, the books balance."""
    assert set(small_run.heard(directory, "stored")) <= stored(directory), name
    found = small_run.store_of(directory, warn=lambda line: pytest.fail(f"{name}: {line}")).latest()
    allowed = {0, *map(int, small_run.heard(directory, "saving"))}
    assert (found.step if found else 0) in allowed, name
    assert (found.step if found else 0) >= max(map(int, ["0", *small_run.heard(directory, "saved")])), name
    assert audit_run(directory).problems == (), name


def check_resumed(directory: Path, name: str, weights: str) -> None:
    """The run ends on the same weights, each step's pairs count once, and nothing half-made lies about."""
    assert small_run.go(directory) == weights, name
    report = audit_run(directory)
    assert report.problems == (), name
    assert (report.stages[0].steps, report.stages[0].trained) == (small_run.STEPS, 8), name
    draft = small_run.store_of(directory).begin(99)
    assert [*directory.glob("checkpoints/tmp-*"), *directory.glob("checkpoints/old-*"), *directory.rglob("*.partial")] == [draft], name
    draft.rmdir()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the run that nothing happens to."""
    return small_run.go(tmp_path_factory.mktemp("calm"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("time", [1, 2])
@pytest.mark.fault(2, 7, 9, 11, invariants="I1 I2 I5 I6")
def test_killed_at_any_point_the_run_ends_on_the_same_weights(tmp_path: Path, weights: str, time: int) -> None:
    points = [point for point in POINTS if time == 1 or not point.startswith(ONCE)]
    directories = fresh(tmp_path, points)
    codes = children("kill", dict(zip(directories, (f"{point}:{time}" for point in points), strict=True)))
    assert dict(zip(points, codes, strict=True)) == dict.fromkeys(points, -signal.SIGKILL)
    for directory, point in zip(directories, points, strict=True):
        check_survivors(directory, point)
        check_resumed(directory, point, weights)


@pytest.mark.timeout(300)
@pytest.mark.fault(7, 21, invariants="I5")
def test_killed_at_any_point_of_a_resume_past_a_damaged_checkpoint(tmp_path: Path, weights: str) -> None:
    """The newest checkpoint is damaged: its step is trained and committed again, and the process is killed while that happens."""
    points = [RESUME_ONLY, *(point for point in POINTS if not point.startswith(("ledger.lease.", "ledger.put.")))]  # nothing is left to generate
    directories = fresh(tmp_path, points)
    for directory in directories:
        small_run.go(directory)
        (directory / "checkpoints" / "step-4" / "learner" / "weights.txt").write_text("damaged")
        (directory / "heard.txt").unlink()
    codes = children("kill", dict(zip(directories, (f"{point}:1" for point in points), strict=True)))
    assert dict(zip(points, codes, strict=True)) == dict.fromkeys(points, -signal.SIGKILL)
    for directory, point in zip(directories, points, strict=True):
        small_run.store_of(directory).latest()  # puts back what was moved aside, as every resume does first
        assert audit_run(directory).problems == (), point
        check_resumed(directory, point, weights)


@pytest.mark.timeout(120)
@pytest.mark.fault(7, 11, invariants="I1 I2 I5 I6")
def test_killed_again_and_again_it_arrives(tmp_path: Path, weights: str) -> None:
    """Each attempt gets a little further; every one of them leaves sound books."""
    (directory,) = fresh(tmp_path, ["run"])
    for point in ("ledger.put.committed:3", "ledger.assign.committed:2", "ckpt.renamed", "ledger.commit.written", "ledger.advance.committed:2"):
        assert children("kill", {directory: point}) == [-signal.SIGKILL], point
        check_survivors(directory, point)
    check_resumed(directory, "all", weights)
