"""A checkpoint is complete or ignored: the commit protocol under kills, damage, strangers and a full disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sgpo_dist.checkpoint import CRASH_POINTS, MANIFEST_NAME, CheckpointStore, crash_point
from sgpo_dist.errors import CheckpointError, EnvironmentProblem

RUN_ID = "0" * 32


def store(root: Path, **settings: object) -> CheckpointStore:
    return CheckpointStore(root, run_id=RUN_ID, **settings)  # type: ignore[arg-type]


def save(at: CheckpointStore, step: int, text: str = "weights") -> Path:
    draft = at.begin(step)
    (draft / "learner").mkdir()
    (draft / "learner" / "shard-0.bin").write_text(text)
    (draft / "buffer.db").write_bytes(b"rows")
    return at.commit(draft, step, {"stage": "preference", "step": step})


def content(root: Path) -> tuple[int, str] | None:
    found = store(root).latest()
    return None if found is None else (found.step, (found.path / "learner" / "shard-0.bin").read_text())


def test_what_is_committed_is_read_back(tmp_path: Path) -> None:
    path = save(store(tmp_path), 7)
    found = store(tmp_path).latest()
    assert found is not None
    assert (found.path, found.step, found.run_id, found.num_bytes) == (path, 7, RUN_ID, len("weights") + len("rows"))
    assert found.facts == {"stage": "preference", "step": 7}
    assert (tmp_path / "latest").read_text() == "step-7\n"
    assert path.name == "step-7"


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert store(tmp_path / "absent").latest() is None


def test_a_draft_is_not_a_checkpoint(tmp_path: Path) -> None:
    (store(tmp_path).begin(3) / "file").write_text("half")
    assert store(tmp_path).latest() is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "no manifest"])
@pytest.mark.fault(21, invariants="I5 I9")
def test_damage_falls_back_to_the_one_before_and_says_so(tmp_path: Path, damage: str) -> None:
    save(store(tmp_path), 1, "first")
    newest = save(store(tmp_path), 2, "second")
    shard = newest / "learner" / "shard-0.bin"
    if damage == "flip":
        shard.write_text("sfcond")
    elif damage == "truncate":
        shard.write_text("secon")
    elif damage == "remove":
        shard.unlink()
    elif damage == "manifest":
        (newest / MANIFEST_NAME).write_text((newest / MANIFEST_NAME).read_text()[:40])
    else:
        (newest / MANIFEST_NAME).unlink()
    heard: list[str] = []
    found = store(tmp_path, warn=heard.append).latest()
    assert found is not None
    assert found.step == 1
    assert len(heard) == 1
    assert "step-2 is damaged" in heard[0]
    with pytest.raises(CheckpointError, match="damaged"):
        store(tmp_path).load(newest)


def test_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    (save(store(tmp_path), 1) / "buffer.db").unlink()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        store(tmp_path).latest()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("run_id", "1" * 32, "another run"), ("format", "other", "not written by"), ("format_version", 2, "format 2")],
)
@pytest.mark.fault(28, invariants="I9")
def test_a_strangers_checkpoint_is_refused(tmp_path: Path, field: str, value: object, words: str) -> None:
    manifest = save(store(tmp_path), 4) / MANIFEST_NAME
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), field: value, "seal": ""}))
    with pytest.raises(CheckpointError, match=words):
        store(tmp_path).latest()


def test_a_manifest_may_not_lead_out_of_its_directory(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("weights")
    shard = save(store(tmp_path / "root"), 1) / "learner" / "shard-0.bin"
    shard.unlink()
    shard.symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="leads out"):
        store(tmp_path / "root").load(tmp_path / "root" / "step-1")


def test_committing_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(store(tmp_path), 5, "old")
    save(store(tmp_path), 5, "new")
    assert content(tmp_path) == (5, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-5"]


def test_the_newest_commit_counts_even_if_its_step_is_smaller(tmp_path: Path) -> None:
    for step in (10, 20):
        save(store(tmp_path), step)
    save(store(tmp_path), 15, "after going back to 10")
    assert content(tmp_path) == (15, "after going back to 10")


@pytest.mark.fault(20, invariants="I5 I9")
def test_too_little_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    save(store(tmp_path), 1)
    full = store(tmp_path, min_free_bytes=100, free_bytes=lambda _: 100 + len("weights") + len("rows") - 1)
    with pytest.raises(EnvironmentProblem, match="free space"):
        full.begin(2)
    assert content(tmp_path) == (1, "weights")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-1"]
    store(tmp_path, min_free_bytes=100, free_bytes=lambda _: 100 + len("weights") + len("rows")).begin(2)


def test_prune_keeps_the_last_and_every_kth(tmp_path: Path) -> None:
    keeper = store(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 8):
        save(keeper, step)
    assert sorted(path.name for path in keeper.prune()) == ["step-1", "step-2", "step-3", "step-5"]
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-4", "step-6", "step-7"]


def test_a_link_in_the_store_is_neither_read_nor_followed(tmp_path: Path) -> None:
    elsewhere = save(store(tmp_path / "elsewhere"), 9)
    root = tmp_path / "root"
    save(store(root), 1)
    (root / "step-9").symlink_to(elsewhere)
    (root / "tmp-9-abcd").symlink_to(elsewhere)
    assert content(root) == (1, "weights")
    store(root).begin(2)
    assert (elsewhere / "buffer.db").exists()


def test_crash_point_counts_and_without_a_name_does_nothing() -> None:
    passed = crash_point({})
    for point in CRASH_POINTS:
        passed(point)
    other = crash_point({"SGPO_CRASH_AT": "ckpt.renamed:3"})
    other("ckpt.renamed")
    other("ckpt.begun")
    other("ckpt.renamed")


# ---- a checkpoint that comes from elsewhere ----------------------------------------------------------------------------------------


def brought(at: CheckpointStore, source: Path, step: int) -> Path:
    return shutil.copytree(source, at.begin(step), dirs_exist_ok=True)


def test_what_is_adopted_is_the_stores_own(tmp_path: Path) -> None:
    source = save(store(tmp_path / "elsewhere"), 4, "from elsewhere")
    here = store(tmp_path / "here")
    found = here.adopt(brought(here, source, 4))
    assert (found.path, found.step, found.facts["step"]) == (tmp_path / "here" / "step-4", 4, 4)
    assert content(tmp_path / "here") == (4, "from elsewhere")
    save(here, 5, "and on")
    assert content(tmp_path / "here") == (5, "and on")


def test_a_damaged_or_foreign_one_is_not_adopted(tmp_path: Path) -> None:
    source = save(store(tmp_path / "elsewhere"), 4)
    here = store(tmp_path / "here")
    draft = brought(here, source, 4)
    (draft / "buffer.db").write_bytes(b"ROWS")
    with pytest.raises(CheckpointError, match="damaged"):
        here.adopt(draft)
    other = CheckpointStore(tmp_path / "here", run_id="1" * 32)
    foreign = brought(other, source, 4)
    with pytest.raises(CheckpointError, match="another run"):
        other.adopt(foreign)
    assert not (tmp_path / "here" / "step-4").exists()
