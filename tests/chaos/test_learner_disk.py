"""The learner's own files on a full disk: one line that says what to do, the checkpoint before as it was, and training goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from learner_rank import begin, make_model, make_rank, train

from sgpo_dist.errors import EnvironmentProblem
from tests.full_disk import files_no_larger_than

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.timeout(120)]


@pytest.mark.fault(20, invariants="I5 I9")
def test_a_full_disk_is_one_line_and_the_learner_goes_on_from_the_state_before(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    rank = make_rank(tmp_path / "cache")
    begin(rank, model)
    train(rank, 1)
    rank.save(str(tmp_path / "step-1"))
    kept = {path: path.read_bytes() for path in (tmp_path / "step-1").rglob("*") if path.is_file()}
    second = train(rank, 2)
    for size in (0, 5_000, 90_000, 200_000):  # in the first file's head, in its middle, at its end, in the second one
        with files_no_larger_than(size), pytest.raises(EnvironmentProblem, match="check free disk space") as refused:
            rank.save(str(tmp_path / f"draft-{size}"))
        assert "\n" not in str(refused.value)
    with files_no_larger_than(90_000), pytest.raises(EnvironmentProblem, match="check free disk space"):
        rank.export(str(tmp_path / "model-in-part"))
    assert {path: path.read_bytes() for path in (tmp_path / "step-1").rglob("*") if path.is_file()} == kept
    third = train(rank, 3)
    rank.save(str(tmp_path / "step-3"))  # there is room again
    rank.load(str(tmp_path / "step-1"))
    assert (train(rank, 2), train(rank, 3)) == (second, third)
    rank.release()
