"""Damaged files and a full disk: found out, said in one line, and never more lost than what is damaged."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
import small_run
from test_kill_points import check_resumed, children, fresh, stored

from sgpo_dist.buffer.audit import audit_database, audit_run
from sgpo_dist.checkpoint import MANIFEST_NAME
from sgpo_dist.errors import EnvironmentProblem, RunFailed
from tests.full_disk import files_no_larger_than

FILES = (MANIFEST_NAME, "buffer.db", "learner/weights.txt")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole run with the checkpoints of steps 2 and 4, and its weights."""
    directory = tmp_path_factory.mktemp("finished")
    return directory, small_run.go(directory)


def damaged_versions(content: bytes, every_byte: bool, rng: Random) -> list[bytes]:
    """One byte changed (each in turn, or some), and the end cut off (some lengths)."""
    places = range(len(content)) if every_byte else [0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(20))]
    flipped = [content[:at] + bytes([content[at] ^ rng.choice([0x01, 0x20, 0x80])]) + content[at + 1 :] for at in places]
    return flipped + [content[:length] for length in (0, 1, len(content) // 2, len(content) - 2)]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.fault(21, invariants="I5 I9")
def test_any_changed_byte_of_a_checkpoint_is_found_and_the_one_before_is_used(finished: tuple[Path, str], tmp_path: Path, name: str) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-4" / name
    content = newest.read_bytes()
    for number, version in enumerate(damaged_versions(content, name == MANIFEST_NAME, Random(name))):
        newest.write_bytes(version)
        heard: list[str] = []
        found = small_run.store_of(tmp_path / "run", warn=heard.append).latest()
        assert found is not None
        assert found.step == 2, f"damage {number} of {name} went unnoticed"
        assert len(heard) == 1
        assert heard[0].startswith("checkpoint step-4 is damaged (")
        assert "\n" not in heard[0]


def test_the_backup_in_a_checkpoint_is_a_sound_ledger_of_its_step(finished: tuple[Path, str]) -> None:
    for step in (2, 4):
        with closing(sqlite3.connect(finished[0] / "checkpoints" / f"step-{step}" / "buffer.db")) as db:
            report = audit_database(db)
        assert report.problems == ()
        assert report.stages[0].steps == step


# ---- the database and its write-ahead log -------------------------------------------------------------------------------------------


@pytest.fixture
def torn(tmp_path: Path) -> tuple[Path, set[str], set[str]]:
    """A run as a power cut leaves it after step 3: the file, its log, the rows stored by the checkpoint of step 2, and all rows."""
    directory = tmp_path / "live"
    directory.mkdir()
    store, ledger = small_run.store_of(directory), small_run.ledger_of(directory)
    incarnation = ledger.begin_incarnation()
    ledger.open_stage(incarnation, small_run.PLAN, small_run.PROMPTS, version=0)
    weights, kept = "", set[str]()
    for step in (1, 2, 3):
        weights = small_run.train(weights, small_run.next_batch(directory, ledger, incarnation, step))
        ledger.advance(incarnation, small_run.STAGE, step)
        if step == 2:
            small_run.save(directory, store, ledger, incarnation, step, weights)
            kept = stored(directory)
    shutil.copytree(directory, tmp_path / "torn")
    ledger.close()
    return tmp_path / "torn", kept, set(small_run.heard(directory, "stored"))


@pytest.mark.timeout(300)
@pytest.mark.fault(10, invariants="I1 I2 I5 I6")
def test_a_log_cut_or_changed_anywhere_loses_nothing_that_a_checkpoint_holds(
    torn: tuple[Path, set[str], set[str]], finished: tuple[Path, str], tmp_path: Path
) -> None:
    directory, kept, everything = torn
    log = (directory / "buffer.db-wal").read_bytes()
    rng, complete = Random(7), 0
    assert kept < everything
    for number in range(60):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(directory, copy)
        (copy / "buffer.db-shm").unlink()  # it is memory, not disk
        at = rng.randrange(len(log)) if number else len(log)
        changed = log[:at] + bytes([log[at] ^ 0x10]) + log[at + 1 :] if number % 2 else log[:at]
        (copy / "buffer.db-wal").write_bytes(changed)
        small_run.ledger_of(copy, synchronous="OFF").close()
        assert kept <= stored(copy), at
        assert audit_run(copy).problems == (), at
        complete += stored(copy) == everything
        if number % 20 == 0:
            check_resumed(copy, f"log cut at {at}", finished[1])
    assert 1 <= complete < 60


@pytest.mark.fault(10, invariants="I9")
def test_a_database_cut_short_is_refused_or_named_by_the_audit_and_the_remedy_works(
    finished: tuple[Path, str], torn: tuple[Path, set[str], set[str]], tmp_path: Path
) -> None:
    directory = torn[0]
    content = (directory / "buffer.db").read_bytes()
    refused, rng = 0, Random(8)
    for number in range(20):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(directory, copy)
        (copy / "buffer.db-shm").unlink()
        (copy / "buffer.db-wal").unlink()
        (copy / "buffer.db").write_bytes(content[: rng.randrange(1, len(content))])
        complaint = opening_complaint(copy)
        if complaint:
            refused += 1
            assert "put the buffer.db of the newest checkpoint in its place, delete buffer.db-wal and buffer.db-shm" in complaint
        else:
            assert audit_run(copy).problems, "a database that lost its end was called sound"
        if number % 5 == 0:
            for leftover in copy.glob("buffer.db*"):
                leftover.unlink()
            shutil.copy(copy / "checkpoints" / "step-2" / "buffer.db", copy / "buffer.db")
            check_resumed(copy, "after the remedy", finished[1])
    assert refused > 0


def opening_complaint(directory: Path) -> str:
    """What opening the ledger says; empty when it opens."""
    try:
        small_run.ledger_of(directory).close()
    except RunFailed as problem:
        return str(problem)
    return ""


# ---- a full disk --------------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
@pytest.mark.fault(20, invariants="I1 I5 I9")
def test_a_full_disk_is_one_clear_line_and_costs_nothing_that_was_acknowledged(finished: tuple[Path, str], tmp_path: Path) -> None:
    sizes = [1, 5_000, 20_000, 60_000, *range(100_000, 700_000, 40_000)]
    directories = fresh(tmp_path, [str(size) for size in sizes])
    codes = children("fill", dict(zip(directories, map(str, sizes), strict=True)))
    assert set(codes) == {0, 3}
    for directory, code in zip(directories, codes, strict=True):
        if code == 3:
            error = (directory / "error.txt").read_text()
            assert small_run.heard(directory, "failed") == ["EnvironmentProblem"], error
            assert "check free disk space" in error
            assert "\n" not in error
            if (directory / "buffer.db").stat().st_size:
                assert set(small_run.heard(directory, "stored")) <= stored(directory)
        check_resumed(directory, directory.name, finished[1])


@pytest.mark.fault(20, invariants="I5 I9")
def test_a_checkpoint_that_the_disk_refuses_leaves_the_one_before_and_the_next_one_works(finished: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    store, ledger = small_run.store_of(tmp_path / "run"), small_run.ledger_of(tmp_path / "run")
    draft = store.begin(5)
    with files_no_larger_than(50_000), pytest.raises(EnvironmentProblem, match="check free disk space"):
        ledger.backup(draft / "buffer.db")
    assert not (draft / "buffer.db").exists()
    (draft / "weights.txt").write_text("new")
    with files_no_larger_than(100), pytest.raises(EnvironmentProblem, match=r"cannot write the checkpoint of step 5 .*; free space on the disk"):
        store.commit(draft, 5, {"step": 5})
    found = store.latest()
    assert found is not None
    assert found.step == 4
    again = store.begin(5)
    ledger.backup(again / "buffer.db")
    store.commit(again, 5, {"step": 5})
    ledger.close()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step-2", "step-4", "step-5"]
