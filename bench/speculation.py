"""The improver's pass with proposals from the draft, against engines without: the same requests, float32, on the same cores.

A plain engine and one with proposals live in one process and take turns, as a machine's hours differ by more than what is looked for. Two engines
that are alike differ as well (the one that started first is mostly the slower one), so there are two such processes, and where the arms are
close and rewrites sampled, as in rollouts, a third arm: the engine with proposals, told to make none.

Rewrites: orders whose drafts hold two wrong fields, as many at once as named, greedy and sampled as rollouts do. Up to 16 at once the next one
begins when one ends, as in a rollout worker: a wave that begins at once takes as long as its longest rewrite, and says nothing of the tokens that
the others were spared. 64 are such a wave, the least that proposals can win. Answers: the policy's pass on the same engines, which gets no proposals
and must not pay for them. Guard: all arms make the same token ids, but for sampled rewrites with proposals, of which as many repeat their drafts
within four standard errors. Called by ``python -m bench``; also run as a child of itself.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from actors import draft_pointer
from actors.draft_pointer import Frame, PointerProposer
from actors.vllm_engine import EngineSpec, VllmEngine, engine_environment
from bench.dpo_step import make_pairs
from bench.machine import Line, answer, environment, run_arm, seconds
from sgpo_dist.data.embedded_model import embedded_model_dir
from sgpo_dist.prompts import PromptBook, load_tokenizer
from sgpo_dist.records import Completion
from sgpo_dist.roles import GenerateRequest, Sampling

MODULE: Final = "bench.speculation"
PROPOSALS: Final = {"plain": 0, "ours": 6}
"""By engine."""
SWITCH: Final = "SGPO_BENCH_SWITCH"
"""The environment variable with the path of a file. It holds the requests for which proposals are weighed (0: those that run), or ``SILENT``."""
SILENT: Final = -1
REWRITES: Final = "rewrites"
ANSWERS: Final = "answers"
FAR: Final = ("plain", "ours")
CLOSE: Final = ("plain", "mute", "ours")
REQUESTS: Final = {1: 4, 4: 8, 16: 32, 64: 64}
"""Rewrites of a timing, by the number of them at once."""
MOST_AT_ONCE: Final = max(REQUESTS)
TEMPERATURES: Final = (0.0, 0.7)
REWRITE_TOKENS: Final = 80
WARM_UP_TOKENS: Final = 24
ANSWER_TOKENS: Final = 32
DEADLINE_S: Final = 240.0


@dataclass(frozen=True, slots=True)
class Work:
    """Prompts' token ids, ``at_once`` of them in flight; ``arms`` take turns."""

    task: str
    rows: Sequence[tuple[int, ...]]
    at_once: int
    how: Sampling

    @property
    def name(self) -> str:
        """As the table names it."""
        return f"{self.task}, {self.at_once} at once at {self.how.temperature:g}"

    @property
    def draws_differ(self) -> bool:
        """Proposals are for rewrites, and where these are sampled they change what is drawn."""
        return self.task == REWRITES and self.how.temperature > 0

    @property
    def weighed_for(self) -> int:
        """As ``launch`` has it: what is sampled must not depend on how many requests happen to run."""
        return self.at_once if self.how.temperature > 0 else 0

    @property
    def arms(self) -> tuple[str, ...]:
        """In the order in which a plain engine that started first takes its turn."""
        return CLOSE if self.at_once == MOST_AT_ONCE and self.draws_differ else FAR


def measure(turns: int, model: str = "") -> list[Line]:
    """A line for each temperature, number of requests at once and baseline; ``turns`` of all arms in each of two processes, one for either order in
    which the engines start. ``model`` is a directory; empty = the embedded one.
    """
    found = [run_arm(MODULE, first, {"turns": turns, "model": model}, environment(allocator=False)) for first in PROPOSALS]
    lines = []
    for name, work in found[0]["works"].items():
        both = {arm: [child["works"][name]["arms"][arm] for child in found] for arm in work["arms"]}
        lines += [_line(name, arm, both, work["draws_differ"]) for arm in work["arms"] if arm != "ours"]
    return lines


def _line(name: str, baseline: str, arms: dict[str, list[dict[str, Any]]], draws_differ: bool) -> Line:
    theirs, ours = (seconds(arms[arm], "took_s") for arm in (baseline, "ours"))
    if baseline == "mute":
        return Line(f"{name}, against itself told to propose nothing", baseline, theirs, ours, *_same(arms["plain"], arms["mute"]), by_turns=True)
    guard, passed = (_as_many if draws_differ else _same)(arms["plain"], arms["ours"])
    copies, requests = (sum(child[key] for child in arms["ours"]) for key in ("copies", "requests"))
    best = max(child["tokens"] / min(child["took_s"]) for child in arms["ours"])
    notes = (f"{best:.0f} tokens/s at best with proposals; {copies} of {requests} texts repeat their drafts",)
    return Line(name, baseline, theirs, ours, guard, passed, notes, by_turns=True)


def _same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> tuple[str, bool]:
    pairs = [pair for left, right in zip(one, other, strict=True) for pair in zip(left["digests"], right["digests"], strict=True)]
    same = sum(left == right for left, right in pairs)
    return f"{same} of {len(pairs)} have the same token ids", same == len(pairs)


def _as_many(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> tuple[str, bool]:
    requests = sum(child["requests"] for child in one)
    shares = [sum(child["copies"] for child in arm) / requests for arm in (one, other)]
    mean = sum(shares) / 2
    error = max((2 * mean * (1 - mean) / requests) ** 0.5, 1 / requests)
    return f"{shares[0]:.0%} and {shares[1]:.0%} repeat their drafts, allowed 4 * {error:.0%} apart", abs(shares[0] - shares[1]) <= 4 * error


class SwitchedProposer(PointerProposer):
    """One that does what the file at ``SWITCH`` says. Made by vLLM in its engine's process."""

    def propose(
        self, sampled_token_ids: Sequence[Sequence[int]], num_tokens_no_spec: np.ndarray, token_ids_cpu: np.ndarray, slot_mappings: Any = None
    ) -> list[list[int]]:
        """As the pointer does, or nothing for any row."""
        self._busy = int(Path(os.environ[SWITCH]).read_text(encoding="ascii"))
        if self._busy == SILENT:
            return [[] for _ in sampled_token_ids]
        return super().propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu, slot_mappings)


async def run_engines(first: str, turns: int, model: Path, switch: Path) -> dict[str, Any]:
    """By work and arm: timings, and what was made. The ``first`` engine starts first; the file at ``switch`` is made."""
    book = PromptBook(load_tokenizer(model))
    pairs = make_pairs(book, MOST_AT_ONCE)
    drafts = [pair.rejected.text for pair in pairs]
    rewrites = [book.improver_ids(pair.prompt, draft) for pair, draft in zip(pairs, drafts, strict=True)]
    answers = [pair.prompt_ids for pair in pairs]
    draft_pointer.PROPOSER, os.environ[SWITCH] = f"{MODULE}.{SwitchedProposer.__name__}", str(switch)  # type: ignore[misc]
    switch.write_text("0", encoding="ascii")
    engines: dict[str, VllmEngine] = {}
    found: dict[str, Any] = {}
    try:
        for arm in sorted(PROPOSALS, key=lambda arm: arm != first):
            spec = engine_spec(model, book, PROPOSALS[arm])
            os.environ.update(engine_environment(spec))
            engines[arm] = VllmEngine(spec)
            await asyncio.wait_for(engines[arm].start(), DEADLINE_S)
            await together(engines[arm], rewrites, MOST_AT_ONCE, Sampling(0.0, 1.0, 0, WARM_UP_TOKENS))  # memory never touched costs seconds
        for heat in TEMPERATURES:
            how, short = (Sampling(heat, 1.0, 0, most) for most in (REWRITE_TOKENS, ANSWER_TOKENS))
            works = [Work(REWRITES, rewrites[:number], count, how) for count, number in REQUESTS.items()]
            if heat:
                works.append(Work(ANSWERS, answers, MOST_AT_ONCE, short))
            for work in works:
                found[work.name] = {"draws_differ": work.draws_differ, "arms": await _by_turns(engines, work, turns, drafts, switch)}
    finally:
        for engine in engines.values():
            await engine.stop()
    return found


async def _by_turns(engines: dict[str, VllmEngine], work: Work, turns: int, drafts: Sequence[str], switch: Path) -> dict[str, Any]:
    found: dict[str, Any] = {arm: {"took_s": []} for arm in work.arms}
    order = work.arms if next(iter(engines)) == "plain" else work.arms[::-1]
    for _ in range(turns):
        for arm in order:
            switch.write_text(str(SILENT if arm == "mute" else work.weighed_for), encoding="ascii")
            began = time.perf_counter()
            made = await together(engines["plain" if arm == "plain" else "ours"], work.rows, work.at_once, work.how)
            found[arm]["took_s"].append(time.perf_counter() - began)
            found[arm] |= _made(made, drafts)
        order = order[::-1]
    return found


def engine_spec(model: Path, book: PromptBook, proposals: int) -> EngineSpec:
    """A float32 engine on all cores, as the rollout worker makes it."""
    frame = Frame(*book.improver_frame())
    return EngineSpec(
        str(model), max_model_len=768, max_num_seqs=MOST_AT_ONCE, log_level="WARNING", stop_token_ids=(book.eos_id,),
        num_speculative_tokens=proposals, draft_frame=frame,
    )  # fmt: skip


async def together(engine: VllmEngine, rows: Sequence[tuple[int, ...]], at_once: int, how: Sampling) -> list[Completion]:
    """All of them, ``at_once`` in flight; seeded by their place."""
    room = asyncio.Semaphore(at_once)

    async def one(number: int, ids: tuple[int, ...]) -> Completion:
        async with room:
            return await engine.generate(GenerateRequest(f"{time.perf_counter_ns()}-{number}", ids, how, number))

    return list(await asyncio.wait_for(asyncio.gather(*(one(number, ids) for number, ids in enumerate(rows))), DEADLINE_S))


def _made(completions: Sequence[Completion], drafts: Sequence[str]) -> dict[str, Any]:
    return {
        "tokens": sum(len(made.token_ids) for made in completions),
        "requests": len(completions),
        "copies": sum(made.text.strip() == draft.strip() for made, draft in zip(completions, drafts, strict=False)),
        "digests": [hashlib.blake2b(repr(made.token_ids).encode(), digest_size=8).hexdigest() for made in completions],
    }


def main() -> None:
    """All arms in one process, as a child of ``measure``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=list(PROPOSALS), required=True, help="whose engine starts first")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--model", default="")
    options = parser.parse_args()
    model = Path(options.model) if options.model else embedded_model_dir()
    with tempfile.TemporaryDirectory() as place:
        answer(options.arm, works=asyncio.run(run_engines(options.arm, options.turns, model, Path(place, "switch"))))


if __name__ == "__main__":
    main()
