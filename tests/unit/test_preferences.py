"""What is mixed into a preference step, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sgpo_dist.config import PreferenceConfig
from sgpo_dist.preferences import PairSupply
from sgpo_dist.records import TokenExample


def rows(name: str, count: int) -> tuple[TokenExample, ...]:
    return tuple(TokenExample(f"{name}{number}", (1,), (2,)) for number in range(count))


def replayed(step: int, kept: int = 10, **preference: Any) -> list[str]:
    run: Any = SimpleNamespace(config=SimpleNamespace(seed=3, preference=PreferenceConfig(**preference)))
    return [row.uid for row in PairSupply(run, (), rows("improve", 10), rows("kept", kept))._replay(step, 4)]


def test_each_kind_of_replay_comes_by_its_own_share() -> None:
    assert replayed(1) == []
    assert [uid.rstrip("0123456789") for uid in replayed(1, improver_replay=0.5, kept_replay=1.5, collect="first")] == ["improve"] * 2 + ["kept"] * 6
    assert replayed(1, improver_replay=0.5) == replayed(1, improver_replay=0.5, kept_replay=0.0)


def test_kept_answers_are_a_function_of_the_step() -> None:
    first, second = (replayed(step, kept_replay=1, collect="first") for step in (1, 2))
    assert first == replayed(1, kept_replay=1, collect="first")
    assert not set(first) & set(second)


def test_without_kept_answers_none_are_mixed_in() -> None:
    assert replayed(1, kept=0, kept_replay=2, collect="first") == []
