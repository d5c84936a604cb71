"""The improver's pass with proposals from the draft, against the same engine without: the same requests, float32, on the same cores.

Rewrites: orders whose drafts hold two wrong fields, as many at once as named. Greedy, and sampled at a temperature as rollouts do. Answers:
the policy's pass on the same engine, which gets no proposals and must not pay for them. Guard: token ids of answers and of greedy rewrites are
the same in both arms; of sampled rewrites as many repeat their drafts, within four standard errors. Called by ``python -m bench``; also run as a
child of itself.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from actors.draft_pointer import Frame
from actors.vllm_engine import EngineSpec, VllmEngine, engine_environment
from bench.dpo_step import make_pairs
from bench.machine import Line, answer, environment, run_arm, seconds
from sgpo_dist.data.embedded_model import embedded_model_dir
from sgpo_dist.prompts import PromptBook, load_tokenizer
from sgpo_dist.records import Completion
from sgpo_dist.roles import GenerateRequest, Sampling

MODULE: Final = "bench.speculation"
AT_ONCE: Final = (1, 4, 16, 64)
FEWEST: Final = 8
"""Requests of a timing; with more at once, as many as are at once."""
ANSWERS_AT_ONCE: Final = 64
PROPOSALS: Final = 6
WARM: Final = 0.7
MOST_TOKENS: Final = 80
DEADLINE_S: Final = 240.0


def measure(temperature: float, repeats: int, model: str = "") -> list[Line]:
    """A line for each number of requests at once, and one for the policy's answers. ``model`` is a directory; empty = the embedded one."""
    options = {"temperature": temperature, "repeats": repeats, "model": model}
    plain, ours = (run_arm(MODULE, arm, options, environment(allocator=False)) for arm in ("plain", "pointer"))
    lines = []
    for name in plain["took_s"]:
        guard, passed = _guard(plain[name], ours[name], 0.0 if name.startswith("answers") else temperature)
        tokens = ours[name]["tokens"] / min(seconds([ours["took_s"]], name))
        notes = (f"{tokens:.0f} tokens/s at best with proposals; {ours[name]['copies']} of {ours[name]['requests']} rewrites repeat their drafts",)
        title = f"{name} at {temperature:g}"
        lines.append(Line(title, "no proposals", seconds([plain["took_s"]], name), seconds([ours["took_s"]], name), guard, passed, notes))
    return lines


def _guard(plain: dict[str, Any], ours: dict[str, Any], temperature: float) -> tuple[str, bool]:
    if temperature == 0.0:
        same = sum(one == other for one, other in zip(plain["digests"], ours["digests"], strict=True))
        return f"{same} of {len(plain['digests'])} have the same token ids", same == len(plain["digests"])
    shares = [arm["copies"] / arm["requests"] for arm in (plain, ours)]
    mean = sum(shares) / 2
    error = max((2 * mean * (1 - mean) / plain["requests"]) ** 0.5, 1 / plain["requests"])
    return f"{shares[0]:.0%} and {shares[1]:.0%} repeat their drafts, allowed 4 * {error:.0%} apart", abs(shares[0] - shares[1]) <= 4 * error


async def run_engine(proposes: bool, temperature: float, repeats: int, model: Path) -> dict[str, Any]:
    """Timings by name, and what was made."""
    book = PromptBook(load_tokenizer(model))
    pairs = make_pairs(book, max(AT_ONCE))
    drafts = [pair.rejected.text for pair in pairs]
    rewrites = [book.improver_ids(pair.prompt, draft) for pair, draft in zip(pairs, drafts, strict=True)]
    answers = [pair.prompt_ids for pair in pairs]
    spec = engine_spec(model, book, PROPOSALS if proposes else 0)
    os.environ.update(engine_environment(spec))
    engine = VllmEngine(spec)
    found: dict[str, Any] = {"took_s": {}}
    try:
        await asyncio.wait_for(engine.start(), DEADLINE_S)
        for rows in (rewrites, answers):  # memory that was never touched costs seconds
            await together(engine, rows, max(AT_ONCE), temperature)
        works = [(f"rewrites, {count} at once", rewrites, count) for count in AT_ONCE]
        works.append((f"answers, {ANSWERS_AT_ONCE} at once", answers, ANSWERS_AT_ONCE))
        for name, rows, count in works:
            took = []
            for _ in range(repeats):
                began = time.perf_counter()
                made = await together(engine, rows[: max(FEWEST, count)], count, temperature)
                took.append(time.perf_counter() - began)
            found["took_s"][name] = took
            found[name] = _made(made, drafts)
    finally:
        await engine.stop()
    return found


def engine_spec(model: Path, book: PromptBook, proposals: int) -> EngineSpec:
    """A float32 engine on all cores, as the rollout worker makes it."""
    frame = Frame(*book.improver_frame())
    return EngineSpec(
        str(model), max_model_len=768, max_num_seqs=max(AT_ONCE), log_level="WARNING", stop_token_ids=(book.eos_id,),
        num_speculative_tokens=proposals, draft_frame=frame,
    )  # fmt: skip


async def together(engine: VllmEngine, rows: Sequence[tuple[int, ...]], at_once: int, temperature: float) -> list[Completion]:
    """All of them, ``at_once`` in flight; seeded by their place."""
    room, how = asyncio.Semaphore(at_once), Sampling(temperature, 1.0, 0, MOST_TOKENS)

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
    """One arm, as a child of ``measure``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=["plain", "pointer"], required=True)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--model", default="")
    options = parser.parse_args()
    model = Path(options.model) if options.model else embedded_model_dir()
    answer(options.arm, **asyncio.run(run_engine(options.arm == "pointer", options.temperature, options.repeats, model)))


if __name__ == "__main__":
    main()
