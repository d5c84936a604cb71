"""Held-out figures of the model that is on the workers now, in both roles, kept side by side in evaluation.json.

Called by the story at each stage's end, and between steps for the improver's check. Workers generate (greedy, or at ``eval.temperature``),
the learner scores references; the figures themselves are ``evaluation``'s business. A model already in the file is not evaluated again, so a
resumed run does not repeat it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any

from sgpo_dist.config import ImproverConfig
from sgpo_dist.errors import RunFailed
from sgpo_dist.evaluate.evaluation import EvalRow, evaluate, row_from, row_tree
from sgpo_dist.evaluate.scoring import load_scorers
from sgpo_dist.evaluate.text_metrics import mean
from sgpo_dist.recorder import Recorder
from sgpo_dist.records import Completion, Prompt, Role, TokenExample, sampling_seed
from sgpo_dist.roles import GenerateRequest, Sampling
from sgpo_dist.run import Run

FILE = "evaluation.json"


async def evaluate_heldout(run: Run, model: str) -> list[EvalRow]:
    """One row a source for ``model``, from the file if it is there. Empty when evaluation is off or nothing is held out.

    Raises ConfigError when a function of ``eval.scorer`` cannot be had, DataError when it fails.
    """
    path = run.directory / FILE
    known = [row for row in read_rows(path) if row.model == model]
    if known or not run.config.eval.enabled or not run.corpus.heldout:
        return known
    prompts, scorers = run.corpus.heldout, load_scorers(run.config.eval.scorer)
    responses, refinements = await _both_roles(run, model, prompts)
    logps = await _reference_logps(run, prompts)
    rows = await asyncio.to_thread(evaluate, model, prompts, responses, refinements, logps, scorers=scorers)  # embeds on the CPU for seconds
    write_rows(path, [*read_rows(path), *rows])
    for row in rows:
        run.recorder.event("evaluated", model=model, source=row.source, **row.figures)
    return rows


async def improver_check(run: Run, limit: int) -> Mapping[str, float]:
    """How the improver does now, on at most ``limit`` held-out prompts, in both roles: shares of rewrites that win and lose against the response
    they rewrite (the rest ties), the mean gain in score, and the share of plain copies. Empty when no held-out prompt can be scored.
    """
    prompts, scorers = _spread(run.corpus.heldout, limit), load_scorers(run.config.eval.scorer)
    if not prompts:
        return {}
    responses, refinements = await _both_roles(run, f"check-{run.progress.global_step}", prompts)
    rows = await asyncio.to_thread(evaluate, "check", prompts, responses, refinements, scorers=scorers)
    columns = {
        "improver/win_rate": _joined(rows, "improver_better"),
        "improver/loss_rate": _joined(rows, "improver_worse"),
        "improver/gain": _joined(rows, "improver_gain"),
        "improver/heldout_copy_rate": _joined(rows, "improver_identical"),
    }
    return {name: mean(column) for name, column in columns.items()} if columns["improver/win_rate"] else {}


def improver_verdict(rows: Sequence[EvalRow], rules: ImproverConfig, recorder: Recorder) -> None:
    """Does the improver's rewrite beat its draft on held-out prompts of every source? Records it.

    It passes when the ``sign_confidence`` that rewrites are rather better than worse reaches ``rules.gate_confidence``. Raises RunFailed when
    ``rules.gate`` is 'stop' and it does not.
    """
    judged_rows = [row for row in rows if "improver_better" in row.figures]  # held-out rows without references cannot be judged
    if not judged_rows and rules.gate != "off":
        recorder.message("improver gate: no held-out prompt has a reference to judge by (data.heldout_path, eval.enabled): going on unjudged")
    for row in judged_rows:
        better, worse = row.figures["improver_better"], row.figures["improver_worse"]
        ties = max(0.0, 1.0 - better - worse)
        judged = len(row.per_prompt.get("improver_better", ())) or row.n
        sure = sign_confidence(round(better * judged), round(worse * judged))
        passed = sure >= rules.gate_confidence
        recorder.event("improver_gate", source=row.source, better=better, worse=worse, ties=ties, confidence=sure, passed=passed)
        if passed or rules.gate == "off":
            continue
        counts = f"better in {better:.0%}, worse in {worse:.0%} and as good in {ties:.0%} of {judged}"
        asked = f", {sure:.0%} sure where {rules.gate_confidence:.0%} is asked" if better > worse else ""
        line = f"on held-out '{row.source}' the improver's rewrite is {counts}{asked}"
        if rules.gate == "stop":
            raise RunFailed(f"{line}; teach it longer or with another reviser, or set improver.gate=warn to go on")
        recorder.message(f"improver gate: {line} (improver.gate=warn: going on)")


def sign_confidence(wins: int, losses: int) -> float:
    """One minus the one-sided p-value of the exact sign test: the chance that a fair coin shows fewer heads than ``wins``.

    0.5 or more exactly when there are more wins than losses; 0 without any.
    """
    trials = wins + losses
    return 1.0 - sum(comb(trials, heads) for heads in range(wins, trials + 1)) / 2**trials


def read_rows(path: Path) -> list[EvalRow]:
    """The rows of an evaluation file; none when there is no file."""
    if not path.is_file():
        return []
    tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return [row_from(row) for row in tree["rows"]]


def write_rows(path: Path, rows: Sequence[EvalRow]) -> None:
    """Write all rows at once, replacing the file."""
    tree = {"rows": [row_tree(row) for row in rows]}
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(tree, indent=1), encoding="utf-8")
    os.replace(draft, path)


async def _both_roles(run: Run, model: str, prompts: Sequence[Prompt]) -> tuple[list[Completion], list[Completion]]:
    """Responses, and refinements of them."""
    responses = await _answer(run, model, Role.POLICY, [run.book.policy_ids(prompt) for prompt in prompts])
    drafts = [run.book.improver_ids(prompt, response.text) for prompt, response in zip(prompts, responses, strict=True)]
    return responses, await _answer(run, model, Role.IMPROVER, drafts)


def _spread(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """At most ``limit`` of them at even distances, so that every source has its share."""
    count = min(limit, len(prompts))
    return [prompts[place * len(prompts) // count] for place in range(count)]


def _joined(rows: Sequence[EvalRow], name: str) -> list[float]:
    return [value for row in rows for value in row.per_prompt.get(name, ())]


async def _answer(run: Run, model: str, role: Role, prompts: Sequence[tuple[int, ...]]) -> list[Completion]:
    how = Sampling(run.config.eval.temperature, 1.0, 0, run.config.eval.max_new_tokens)
    name = f"eval-{model}-{role}-{run.incarnation}"
    requests = [GenerateRequest(f"{name}-{i}", ids, how, sampling_seed(f"{model}/{i}", role)) for i, ids in enumerate(prompts)]
    return await run.fleet.generate(requests)


async def _reference_logps(run: Run, prompts: Sequence[Prompt]) -> list[float | None]:
    """Log-likelihood per token (nats) of each reference given its prompt, None where there is none."""
    rows = [
        TokenExample(f"heldout/{prompt.prompt_id}", run.book.policy_ids(prompt), run.book.completion_ids(prompt.reference))
        for prompt in prompts
        if prompt.reference is not None
    ]
    sums = iter(zip(rows, await run.learner.logps(rows), strict=True))
    values: list[float | None] = []
    for prompt in prompts:
        if prompt.reference is None:
            values.append(None)
        else:
            row, total = next(sums)
            values.append(total / len(row.completion_ids))
    return values
