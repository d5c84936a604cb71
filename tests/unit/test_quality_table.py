"""The quality benchmark's bookkeeping: which arms run, what names an arm, and what the table says about two of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from bench.quality import table
from bench.quality.arms import ARMS, arm_key, arms_of, closed
from bench.quality.tasks import TASKS, find_task

CHAT = TASKS["chat"]


def test_every_arm_comes_after_what_it_starts_from() -> None:
    for arms in ARMS.values():
        names = list(arms)
        assert all(names.index(need) < names.index(name) for name, arm in arms.items() for need in arm.needs)


def test_an_arm_runs_with_all_that_it_starts_from() -> None:
    assert closed(["synpo"], TASKS["orders"]) == ["sft", "synpo_improver", "synpo"]
    assert closed(["sgpo", "base"], TASKS["orders"]) == ["base", "sft", "improver", "sgpo"]


def test_dpo_on_given_pairs_needs_rows_that_bring_them() -> None:
    assert "dpo" in arms_of(TASKS["orders"])
    assert "dpo" not in arms_of(CHAT)


def test_a_key_changes_with_the_seed_the_rows_and_the_settings() -> None:
    others = [replace(CHAT, facts={"file": "another"}), replace(CHAT, settings={**CHAT.settings, "rollout.kv_cache_gib": 1.0})]
    keys = [arm_key(CHAT, "sgpo", 1), arm_key(CHAT, "sgpo", 2), *(arm_key(task, "sgpo", 1) for task in others)]
    assert len(set(keys)) == 4
    assert arm_key(CHAT, "sgpo", 1) == keys[0]


def test_arms_that_were_run_for_the_language_are_known_by_the_same_keys() -> None:
    found = table.kept(find_task("language-noisy"), "test")
    assert {"base", "sft", "sft_more", "spin", "synpo", "sgpo", "improver"} <= {name for name, seeds in found.items() if {1, 2, 3} <= seeds.keys()}


def test_a_verdict_is_the_nearer_answer_and_ties_count_half() -> None:
    assert table.verdicts([0.5, 0.2, 0.4], [0.4, 0.3, 0.4]) == [1.0, 0.0, 0.5]


def test_the_interval_of_equal_differences_is_a_point_and_covers_seeds() -> None:
    assert table.interval([[0.25, 0.25], [0.25, 0.25]]) == (0.25, 0.25, 0.25)
    middle, low, high = table.interval([[0.0] * 50, [1.0] * 50])
    assert (middle, low, high) == (0.5, 0.0, 1.0)  # two seeds that disagree: the interval holds both


def test_the_table_shows_differences_and_win_rates_of_results_that_were_kept(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    for name, scores in {"base": [0.1, 0.2, 0.3, 0.4], "sft": [0.3, 0.4, 0.2, 0.4]}.items():
        result = {
            "task": "chat", "split": "test", "arm": name, "seed": 1, "key": arm_key(CHAT, name, 1),
            "figures": {"greedy": sum(scores) / 4, "characters": 120.0}, "per_prompt": {"greedy": scores}, "answers": {"greedy": ["secret"] * 4},
        }  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
        assert "secret" not in table.keep(tmp_path / f"{name}.json", folder).read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in table.table(CHAT, table.kept(CHAT, "test", folder), ["base"], "greedy", ["base"]).splitlines()]
    named = {row[0].strip("| "): dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    assert named["sft"]["characters"] == "120.0"
    assert named["sft"]["greedy minus base [95 %]"].startswith("+0.075")  # (0.2 + 0.2 - 0.1 + 0) / 4
    assert named["sft"]["wins over base [95 %]"].startswith("0.62 ")  # (2 wins + half a tie) / 4 = 0.625, to even
    assert named["base"]["wins over base [95 %]"] == ""
