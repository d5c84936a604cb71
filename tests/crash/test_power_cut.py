"""A power cut at every named point of a commit: only what was flushed is there afterwards, and that must be a whole checkpoint.

A killed process cannot show a missing fsync, because the kernel keeps what it was given. So ``Disk`` notes what each fsync made durable
and builds from it the two worst disks that a cut may leave.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
import small_run

from sgpo_dist.checkpoint import CRASH_POINTS, CheckpointStore


class Disk:
    """What is durable, by inode: the bytes of a file, the names in a directory."""

    def __init__(self) -> None:
        self.files: dict[int, bytes] = {}
        self.directories: dict[int, dict[str, int]] = {}

    def fsync(self, handle: int) -> None:
        """Instead of ``os.fsync``."""
        found = os.fstat(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if stat.S_ISDIR(found.st_mode):
            self.directories[found.st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self.files[found.st_ino] = path.read_bytes()

    def names_first(self, source: Path, target: Path) -> None:
        """The cut came after all names were written and before any byte that nobody had flushed: such files are empty."""
        shutil.copytree(source, target)
        for path in source.rglob("*"):
            if path.is_file():
                (target / path.relative_to(source)).write_bytes(self.files.get(path.stat().st_ino, b""))

    def names_last(self, inode: int, target: Path) -> None:
        """Nothing is there but what was flushed, names too."""
        target.mkdir()
        for name, child in self.directories.get(inode, {}).items():
            if child in self.directories:
                self.names_last(child, target / name)
            elif child in self.files:
                (target / name).write_bytes(self.files[child])


def save(store: CheckpointStore, step: int) -> None:
    draft = store.begin(step)
    (draft / "learner").mkdir()
    (draft / "learner" / "weights.bin").write_bytes(bytes([step]) * 1000)
    store.commit(draft, step, {"step": step})


def step_on(root: Path) -> int:
    """The step a driver would resume from; damage would be told."""
    found = CheckpointStore(root, run_id=small_run.RUN_ID, warn=pytest.fail).latest()
    return 0 if found is None else found.step


@pytest.mark.fault(7, invariants="I5")
def test_after_a_power_cut_there_is_the_old_checkpoint_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, seen = Disk(), list[str]()
    monkeypatch.setattr(os, "fsync", disk.fsync)  # no seam for this: the program should not be able to skip a flush
    root = tmp_path / "store"
    save(CheckpointStore(root, run_id=small_run.RUN_ID), 1)

    def cut(point: str) -> None:
        seen.append(point)
        disk.names_first(root, tmp_path / f"first {point}")
        disk.names_last(root.stat().st_ino, tmp_path / f"last {point}")

    save(CheckpointStore(root, run_id=small_run.RUN_ID, crash_point=cut), 2)
    cut("returned")
    monkeypatch.undo()
    assert seen == [point for point in CRASH_POINTS if point not in ("ckpt.old_moved", "ckpt.pruned")] + ["returned"]
    named, durable = seen.index("ckpt.renamed"), seen.index("ckpt.parent_synced")
    for place, point in enumerate(seen):
        assert step_on(tmp_path / f"first {point}") == (2 if place >= named else 1), point
        assert step_on(tmp_path / f"last {point}") == (2 if place >= durable else 1), point
    assert (tmp_path / "last returned" / "latest").read_text() == "step-2\n"
