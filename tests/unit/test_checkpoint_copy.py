"""Copies at a second place: whole or not counted, newest first, never in the run's way, and the way back to an empty machine."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from sgpo_dist.checkpoint import MANIFEST_NAME, CheckpointStore, FileEntry
from sgpo_dist.checkpoint_copy import STAGES_NAME, CheckpointCopier, CopyOutcome, Place, bring_checkpoint, bring_run, is_copy
from sgpo_dist.errors import CheckpointError, ConfigError
from sgpo_dist.run_directory import CONFIG_NAME, RUN_FILE_NAME, RunRecord, open_run

RUN_ID = "a" * 32
WAIT_S = 10.0


class Gate(Place):
    """A store that is slow, or that fails, when it is told to."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.opened.set()
        self.fails = False

    def send(self, source: Path, name: str, expected: FileEntry) -> None:
        self.entered.set()
        assert self.opened.wait(WAIT_S)
        if self.fails and name.endswith("shard.bin"):  # the second file of the two
            raise OSError("the store is full")
        super().send(source, name, expected)


class Setting:
    """A run's directory, its store, and the copier between them and ``place``."""

    def __init__(self, root: Path, place: Place, keep_last: int = 2, run_id: str = RUN_ID) -> None:
        self.run, self.outcomes = root / "run", list[CopyOutcome]()
        (self.run / "stages" / "sft").mkdir(parents=True)
        (self.run / "stages" / "sft" / "model.safetensors").write_bytes(b"the model of the stage before")
        (self.run / RUN_FILE_NAME).write_text(RunRecord(run_id=run_id, incarnation=1, total_steps=4).model_dump_json())
        (self.run / CONFIG_NAME).write_text("run_name: run\n")
        self.copier = CheckpointCopier(self.run, place, keep_last=keep_last, keep_every=0, done=self.outcomes.append)
        self.store = CheckpointStore(self.run / "checkpoints", run_id=run_id, keep_last=1, copier=self.copier)

    def save(self, step: int) -> Path:
        draft = self.store.begin(step)
        (draft / "learner").mkdir()
        (draft / "learner" / "shard.bin").write_bytes(b"weights %d" % step)
        (draft / "buffer.db").write_bytes(b"rows %d" % step)
        path = self.store.commit(draft, step, {"step": step})
        self.store.prune()
        return path

    def settle(self) -> None:
        assert self.copier.finish(WAIT_S)


def back(address: str, target: Path) -> tuple[int, bytes]:
    bring_run(address, target)
    found = bring_checkpoint(address, target, CheckpointStore(target / "checkpoints", run_id=open_run(target).run_id))
    return found.step, (found.path / "learner" / "shard.bin").read_bytes()


@pytest.mark.parametrize("kind", ["directory", "memory"])
def test_a_copy_brings_a_lost_run_back(tmp_path: Path, kind: str) -> None:
    root = str(tmp_path / "far" / "run") if kind == "directory" else f"memory://{tmp_path.name}/run"
    here = Setting(tmp_path, Place(root))
    here.save(3)
    here.settle()
    assert [(done.step, done.problem, done.num_bytes) for done in here.outcomes] == [(3, "", len("weights 3") + len("rows 3"))]
    new = tmp_path / "another machine"
    assert back(f"{root}/checkpoints/step-3", new) == (3, b"weights 3")
    assert (new / "stages" / "sft" / "model.safetensors").read_bytes() == b"the model of the stage before"
    assert (new / CONFIG_NAME).read_text() == "run_name: run\n"
    again = CheckpointStore(new / "checkpoints", run_id=RUN_ID).latest()
    assert again is not None
    assert sorted(path.name for path in again.path.iterdir()) == [MANIFEST_NAME, "buffer.db", "learner"]


def test_a_slow_store_blocks_nobody_and_the_newest_wins(tmp_path: Path) -> None:
    place = Gate(str(tmp_path / "far"))
    place.opened.clear()
    here = Setting(tmp_path, place)
    first = here.save(1)
    assert place.entered.wait(WAIT_S)
    for step in (2, 3, 4):
        here.save(step)
    assert not here.copier.finish(0.01)
    assert first.is_dir()  # it is being read: the store may not prune it yet
    place.opened.set()
    here.settle()
    assert [(done.step, done.skipped) for done in here.outcomes] == [(1, 0), (4, 2)]
    here.save(5)
    assert not first.exists()


def test_a_failure_is_told_and_leaves_nothing_that_counts(tmp_path: Path) -> None:
    place = Gate(str(tmp_path / "far"))
    here = Setting(tmp_path, place)
    here.save(1)
    here.settle()
    place.fails = True
    here.save(2)
    here.settle()
    assert [done.problem for done in here.outcomes] == ["", "the store is full"]
    with pytest.raises(CheckpointError, match="not a whole copy"):
        back(str(tmp_path / "far" / "checkpoints" / "step-2"), tmp_path / "new")
    assert back(str(tmp_path / "far" / "checkpoints" / "step-1"), tmp_path / "new") == (1, b"weights 1")
    place.fails = False
    here.save(3)
    here.settle()
    assert sorted(path.name for path in (tmp_path / "far" / "checkpoints").iterdir()) == ["step-1", "step-3"]  # the rest of 2 is gone


def test_old_copies_are_pruned(tmp_path: Path) -> None:
    here = Setting(tmp_path, Place(str(tmp_path / "far")), keep_last=2)
    for step in (1, 2, 3):
        here.save(step)
        here.settle()
    assert sorted(path.name for path in (tmp_path / "far" / "checkpoints").iterdir()) == ["step-2", "step-3"]


@pytest.mark.parametrize("name", ["checkpoints/step-1/learner/shard.bin", "stages/sft/model.safetensors"])
def test_a_changed_byte_is_refused_on_the_way_back(tmp_path: Path, name: str) -> None:
    here = Setting(tmp_path, Place(str(tmp_path / "far")))
    here.save(1)
    here.settle()
    data = bytearray((tmp_path / "far" / name).read_bytes())
    data[0] ^= 1
    (tmp_path / "far" / name).write_bytes(data)
    with pytest.raises(CheckpointError, match="not what its hash says"):
        back(str(tmp_path / "far" / "checkpoints" / "step-1"), tmp_path / "new")
    assert CheckpointStore(tmp_path / "new" / "checkpoints", run_id=RUN_ID).latest() is None


def test_another_run_of_the_name_keeps_its_copies(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "far"))
    first, second = Setting(tmp_path / "a", place), Setting(tmp_path / "b", place, run_id="b" * 32)
    for here in (first, second):
        here.save(1)
        here.settle()
    assert "another run of this name" in second.outcomes[0].problem
    assert back(str(tmp_path / "far" / "checkpoints" / "step-1"), tmp_path / "new") == (1, b"weights 1")
    assert open_run(tmp_path / "new").run_id == RUN_ID


def test_a_run_directory_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    here = Setting(tmp_path, Place(str(tmp_path / "far")))
    here.save(1)
    here.settle()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    bring_run(str(tmp_path / "far" / "checkpoints" / "step-1"), tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_what_is_a_copy(tmp_path: Path) -> None:
    here = Setting(tmp_path, Place(str(tmp_path / "far")))
    path = here.save(1)
    here.settle()
    assert is_copy("s3://bucket/copies/run/checkpoints/step-1")
    assert is_copy(str(tmp_path / "far" / "checkpoints" / "step-1"))
    assert [is_copy(name) for name in ("auto", "never", str(path))] == [False, False, False]
    with pytest.raises(CheckpointError, match="write COPY_TO"):
        bring_run("memory://copies/step-1", tmp_path / "new")


def test_an_address_that_nothing_reaches_is_named() -> None:
    with pytest.raises(ConfigError, match="nowhere://there"):
        Place("nowhere://there")


def test_a_copy_may_not_lead_out_of_the_run(tmp_path: Path) -> None:
    here = Setting(tmp_path, Place(str(tmp_path / "far")))
    here.save(1)
    here.settle()
    listing = tmp_path / "far" / "checkpoints" / "step-1" / STAGES_NAME
    listing.write_text(listing.read_text().replace("sft/model.safetensors", "../../outside"))
    (tmp_path / "far" / "outside").write_bytes(b"the model of the stage before")
    with pytest.raises(CheckpointError, match="outside of itself"):
        back(str(tmp_path / "far" / "checkpoints" / "step-1"), tmp_path / "new" / "run")
    assert not (tmp_path / "new" / "outside").exists()
