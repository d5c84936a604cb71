"""The improver's pass with proposals from the draft, against an engine without: the same requests, float32, on the same cores.

A plain engine and one with proposals live in one process and take turns, as a machine's hours differ by more than what is looked for. Two engines
that are alike differ as well (the one that started first is mostly the slower one), so there are two such processes.

Rewrites: orders whose drafts hold two wrong fields, as many at once as named, greedy and sampled as rollouts do. Up to 16 at once the next one
begins when one ends, as in a rollout worker: a wave that begins at once takes as long as its longest rewrite, and says nothing of the tokens that
the others were spared. 64 are such a wave, the least that proposals can win. Answers: the policy's pass on the same engines, which gets no proposals
and must not pay for them. Guard: both make the same token ids. Called by ``python -m bench``; also run as a child of itself.
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
PROPOSALS: Final = {"plain": 0, "ours": 8}
"""By engine."""
WEIGHED_FOR: Final = "SGPO_BENCH_WEIGHED_FOR"
"""The environment variable with the path of a file that holds the requests for which proposals are weighed (0: those that run)."""
SAME: Final = 0.95
"""The least share of requests with the same token ids: a draw may hang on the last digit of a sum, which other tokens beside it change."""
REQUESTS: Final = {1: 4, 4: 24, 16: 48, 64: 64}
"""Rewrites of a timing, by the number of them at once."""
MOST_AT_ONCE: Final = max(REQUESTS)
TEMPERATURES: Final = (0.0, 0.7)
REWRITE_TOKENS: Final = 80
WARM_UP_TOKENS: Final = 24
ANSWER_TOKENS: Final = 32
DEADLINE_S: Final = 240.0


@dataclass(frozen=True, slots=True)
class Work:
    """Prompts' token ids, ``at_once`` of them in flight."""

    task: str
    rows: Sequence[tuple[int, ...]]
    at_once: int
    how: Sampling

    @property
    def name(self) -> str:
        """As the table names it."""
        return f"{self.task}, {self.at_once} at once at {self.how.temperature:g}"

    @property
    def weighed_for(self) -> int:
        """As ``launch`` has it, with as many in flight as here."""
        return self.at_once if self.how.temperature else 0


def measure(turns: int, model: str = "") -> list[Line]:
    """A line for each temperature and number of requests at once; ``turns`` of both arms in each of two processes, one for either order in which the
    engines start. ``model`` is a directory; empty = the embedded one.
    """
    found = [run_arm(MODULE, first, {"turns": turns, "model": model}, environment(allocator=False))["works"] for first in PROPOSALS]
    return [_line(name, *([child[name][arm] for child in found] for arm in PROPOSALS)) for name in found[0]]


def _line(name: str, plain: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> Line:
    pairs = [pair for one, other in zip(plain, ours, strict=True) for pair in zip(one["digests"], other["digests"], strict=True)]
    same = sum(one == other for one, other in pairs)
    guard = f"{same} of {len(pairs)} have the same token ids"
    best = max(child["tokens"] / min(child["took_s"]) for child in ours)
    notes = (f"{best:.0f} tokens/s at best with proposals; {ours[0]['copies']} of {len(ours[0]['digests'])} texts repeat their drafts",)
    return Line(name, "plain", seconds(plain, "took_s"), seconds(ours, "took_s"), guard, same >= SAME * len(pairs), notes, by_turns=True)


class WeighingProposer(PointerProposer):
    """One that weighs as the file at ``WEIGHED_FOR`` says. Made by vLLM in its engine's process."""

    def propose(
        self, sampled_token_ids: Sequence[Sequence[int]], num_tokens_no_spec: np.ndarray, token_ids_cpu: np.ndarray, slot_mappings: Any = None
    ) -> list[list[int]]:
        """As the pointer does."""
        self._busy = int(Path(os.environ[WEIGHED_FOR]).read_text(encoding="ascii"))
        return super().propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu, slot_mappings)


async def run_engines(first: str, turns: int, model: Path, weighed_for: Path) -> dict[str, Any]:
    """By work and arm: timings, and what was made. The ``first`` engine starts first; the file ``weighed_for`` is made."""
    book = PromptBook(load_tokenizer(model))
    pairs = make_pairs(book, MOST_AT_ONCE)
    drafts = [pair.rejected.text for pair in pairs]
    rewrites = [book.improver_ids(pair.prompt, draft) for pair, draft in zip(pairs, drafts, strict=True)]
    answers = [pair.prompt_ids for pair in pairs]
    draft_pointer.PROPOSER, os.environ[WEIGHED_FOR] = f"{MODULE}.{WeighingProposer.__name__}", str(weighed_for)  # type: ignore[misc]
    weighed_for.write_text("0", encoding="ascii")
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
            works = [Work("rewrites", rewrites[:number], count, how) for count, number in REQUESTS.items()]
            if heat:
                works.append(Work("answers", answers, MOST_AT_ONCE, short))
            for work in works:
                weighed_for.write_text(str(work.weighed_for), encoding="ascii")
                found[work.name] = await _by_turns(engines, work, turns, drafts)
    finally:
        for engine in engines.values():
            await engine.stop()
    return found


async def _by_turns(engines: dict[str, VllmEngine], work: Work, turns: int, drafts: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {arm: {"took_s": []} for arm in engines}
    order = list(engines)
    for _ in range(turns):
        for arm in order:
            began = time.perf_counter()
            made = await together(engines[arm], work.rows, work.at_once, work.how)
            found[arm]["took_s"].append(time.perf_counter() - began)
            found[arm] |= _made(made, drafts)
        order.reverse()
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
        "copies": sum(made.text.strip() == draft.strip() for made, draft in zip(completions, drafts, strict=False)),
        "digests": [hashlib.blake2b(repr(made.token_ids).encode(), digest_size=8).hexdigest() for made in completions],
    }


def main() -> None:
    """Both arms in one process, as a child of ``measure``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=list(PROPOSALS), required=True, help="whose engine starts first")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--model", default="")
    options = parser.parse_args()
    model = Path(options.model) if options.model else embedded_model_dir()
    with tempfile.TemporaryDirectory() as place:
        answer(options.arm, works=asyncio.run(run_engines(options.arm, options.turns, model, Path(place, "weighed_for"))))


if __name__ == "__main__":
    main()
