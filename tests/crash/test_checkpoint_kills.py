"""SIGKILL at every named point of a checkpoint's commit: the old one or the new one is there, and the store works on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sgpo_dist.checkpoint import CRASH_POINTS, CheckpointStore

KILLER = """
import os, sys
from pathlib import Path
from sgpo_dist.checkpoint import CheckpointStore, crash_point

def write(root, point, items):
    store = CheckpointStore(root, run_id="0" * 32, keep_last=1, crash_point=crash_point({"SGPO_CRASH_AT": point}))
    for item in items:
        step, text = item.split("=")
        draft = store.begin(int(step))
        (draft / "learner").mkdir()
        (draft / "learner" / "shard-0.bin").write_text(text)
        (draft / "buffer.db").write_bytes(b"rows")
        store.commit(draft, int(step), {})
        store.prune()

for point in sys.argv[4:]:
    child = os.fork()
    if child == 0:
        write(Path(sys.argv[1]) / point.split(":")[0], point, sys.argv[2:4])
        os._exit(0)
    print(point.split(":")[0], os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
"""A process of its own that is killed at each point: forked from one start of Python, because starting one a point takes seconds."""


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step again"])
@pytest.mark.fault(7, invariants="I5")
def test_killed_at_any_point_leaves_the_old_or_the_new_one(tmp_path: Path, again: bool) -> None:
    second = 1 if again else 2
    points = [point for point in CRASH_POINTS if again or point != "ckpt.old_moved"]
    counted = [f"{point}:1" if point == "ckpt.old_moved" else f"{point}:2" for point in points]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", KILLER, str(tmp_path), "1=first", f"{second}=second", *counted]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=50, check=True).stdout.split()
    assert ended == [word for point in points for word in (point, str(-signal.SIGKILL))]
    for number, point in enumerate(points):
        expected = (second, "second") if number >= points.index("ckpt.renamed") else (1, "first")
        assert content(tmp_path / point) == expected, point
        save(store(tmp_path / point), 3, "third")  # and the store works on
        assert content(tmp_path / point) == (3, "third")
        assert not [*(tmp_path / point).glob("tmp-*"), *(tmp_path / point).glob("old-*")]


def store(root: Path) -> CheckpointStore:
    return CheckpointStore(root, run_id="0" * 32, keep_last=1)


def save(at: CheckpointStore, step: int, text: str) -> None:
    draft = at.begin(step)
    (draft / "learner").mkdir()
    (draft / "learner" / "shard-0.bin").write_text(text)
    at.commit(draft, step, {})


def content(root: Path) -> tuple[int, str] | None:
    """Step and text of the newest intact checkpoint."""
    found = store(root).latest()
    return None if found is None else (found.step, (found.path / "learner" / "shard-0.bin").read_text())
