"""The table of the quality benchmark: what each arm scores, and how sure the difference to the arms it has to beat is.

Called by ``__main__``. Results are kept as JSON in ``bench/quality/results`` (without answers), so that the table grows over sessions and
machines. Differences are paired: the same prompts, the same seed. Intervals are percentile bootstraps over seeds and, within them, prompts.

For chat the win rate by the embedding judge stands beside it: the answer nearer to the reference wins, which the kept similarities decide without
the texts (the rule of ``sgpo_dist.evaluate.judge.EmbeddingJudge``, but that scores equal to four digits are a tie); ties count half.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.quality.arms import ARMS, arm_key
from bench.quality.tasks import Task
from sgpo_dist.evaluate.text_metrics import mean

KEPT: Final = Path(__file__).parent / "results"
DRAWS: Final = 2000
COLUMNS: Final = ("greedy", "sampled", "exact", "eos", "tokens", "improved_sampled")
CHAT_COLUMNS: Final = ("greedy", "sampled", "improved_sampled", "rouge_l", "reference_logp", "eos", "tokens", "characters")
"""Here the score is the similarity to the reference."""
PLACES: Final = 4
"""Digits that are kept of a score: two answers whose scores then agree are a tie."""
Result = Mapping[str, Any]


def keep(result_file: Path, folder: Path = KEPT) -> Path:
    """Copy a result into ``folder``, without its answers."""
    tree = json.loads(result_file.read_text(encoding="utf-8"))
    tree.pop("answers", None)
    tree["per_prompt"] = {name: [round(value, PLACES) for value in values] for name, values in tree["per_prompt"].items()}
    folder.mkdir(exist_ok=True)
    target = folder / f"{tree['task']}-{tree['split']}-{tree['arm']}-{tree['seed']}.json"
    target.write_text(json.dumps(tree) + "\n", encoding="utf-8")
    return target


def kept(task: Task, split: str, folder: Path = KEPT) -> dict[str, dict[int, Result]]:
    """Results by arm and seed, those of today's recipes only."""
    arms, found = ARMS[task.family], dict[str, dict[int, Result]]()
    for path in sorted(folder.glob(f"{task.name}-{split}-*.json")):
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["task"] == task.name and tree["arm"] in arms and tree["key"] == arm_key(task, tree["arm"], tree["seed"]):
            found.setdefault(tree["arm"], {})[tree["seed"]] = tree
    return {name: found[name] for name in arms if name in found}


def table(task: Task, results: Mapping[str, Mapping[int, Result]], against: Sequence[str], metric: str, rivals: Sequence[str] = ()) -> str:
    """Markdown: one row an arm; differences of ``metric`` to the arms in ``against`` and win rates over ``rivals`` with 95 % intervals."""
    columns = CHAT_COLUMNS if task.family == "chat" else COLUMNS
    gaps = [f"{metric} minus {name} [95 %]" for name in against]
    wins = [f"wins over {name} [95 %]" for name in rivals]
    header = ["arm", "seeds", *columns, *gaps, *wins, "pairs: n, better, worse"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for name, by_seed in results.items():
        if not ARMS[task.family][name].shown:
            continue
        cells = [_cell(by_seed, column) for column in columns]
        cells += [_difference(by_seed, results.get(other, {}), metric) if other != name else "" for other in against]
        cells += [_wins(by_seed, results.get(other, {})) if other != name else "" for other in rivals]
        lines.append("| " + " | ".join([name, ", ".join(map(str, sorted(by_seed))), *cells, _pairs(by_seed)]) + " |")
    return "\n".join(lines)


def verdicts(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """1 where our score is higher, 0 where theirs is, a half where they agree; scores as they are kept."""
    return [(1 + (a > b) - (a < b)) / 2 for a, b in zip(ours, theirs, strict=True)]


def interval(differences: Sequence[Sequence[float]], draws: int = DRAWS, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): 95 % of means over resampled seeds and, within each, resampled prompts. ``differences`` by [seed][prompt]."""
    rng = random.Random(seed)
    means = []
    for _ in range(draws):
        picked = rng.choices(differences, k=len(differences))
        means.append(mean([mean(rng.choices(row, k=len(row))) for row in picked]))
    means.sort()
    return mean([mean(row) for row in differences]), means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def _cell(by_seed: Mapping[int, Result], column: str) -> str:
    values = [result["figures"][column] for result in by_seed.values() if column in result["figures"]]
    return f"{mean(values):.1f}" if column in ("tokens", "characters") and values else f"{mean(values):.3f}" if values else ""


def _difference(ours: Mapping[int, Result], theirs: Mapping[int, Result], metric: str) -> str:
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return ""
    rows = [[a - b for a, b in zip(ours[seed]["per_prompt"][metric], theirs[seed]["per_prompt"][metric], strict=True)] for seed in seeds]
    middle, low, high = interval(rows)
    return f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"


def _wins(ours: Mapping[int, Result], theirs: Mapping[int, Result]) -> str:
    """Win rate of greedy answers."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return ""
    rate, low, high = interval([verdicts(ours[seed]["per_prompt"]["greedy"], theirs[seed]["per_prompt"]["greedy"]) for seed in seeds])
    return f"{rate:.2f} [{low:.2f}, {high:.2f}]"


def _pairs(by_seed: Mapping[int, Result]) -> str:
    found = [result["pairs"] for result in by_seed.values() if "pairs" in result]
    if not found:
        return ""
    return f"{mean([one['n'] for one in found]):.0f}, {mean([one['better'] for one in found]):.2f}, {mean([one['worse'] for one in found]):.2f}"
