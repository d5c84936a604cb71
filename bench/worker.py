"""What the rollout worker costs beside the bare engine (goal C16), and what the prefix cache saves (C10): one engine, float32.

``worker``: the same prompts, answered and rewritten with the same seeds, once by two calls of the engine a prompt and nothing else, once by a real
RolloutWorker that leases them from a real PairBuffer (SQLite, synchronous=FULL) and puts the pairs back. Guard: the same number of tokens.
Before these, several samples a prompt, each rewritten; prompt tokens by prompt tokens that were not in the cache, as the engine counts them.
Guard: where nothing is found in the cache the texts are the same. ``binding`` (C17): the engine as vLLM binds it by itself and as we bind it, to
all cores, with nobody else at work. Guard: the same texts. Called by ``python -m bench``; also run as a child of itself.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from actors.rollout import RolloutSettings, RolloutWorker
from actors.vllm_engine import EngineSpec, VllmEngine, engine_environment, sampling_arguments
from bench.machine import Line, answer, environment, run_arm, seconds
from bench.scripted import SilentRecorder, gated
from sgpo_dist.buffer.service import PairBuffer
from sgpo_dist.data.embedded_model import embedded_model_dir
from sgpo_dist.prompts import PromptBook, load_tokenizer
from sgpo_dist.records import Message, Prompt, Role, Stage, outcome_uid, sampling_seed
from sgpo_dist.roles import GenerateRequest, GenerationTask, Sampling, StagePlan
from sgpo_dist.starter import chat

MODULE: Final = "bench.worker"
PROMPTS: Final = 48
AT_ONCE: Final = 32
SEED: Final = 7
SAMPLES: Final = 4
SAMPLED_PROMPTS: Final = 12
HOW: Final = Sampling(0.8, 1.0, 40, 40)
GREEDY: Final = Sampling(0.0, 1.0, 0, 24)
LEAST_SAVED: Final = 1.5
DEADLINE_S: Final = 200.0
OURS_TO_BIND: Final = ("VLLM_CPU_NUM_OF_RESERVED_CPU", "OMP_NUM_THREADS", "GOMP_SPINCOUNT")


def measure(repeats: int) -> list[Line | str]:
    """The worker's line and the prefix cache's remark."""
    found = run_arm(MODULE, "worker", {"repeats": repeats}, environment(allocator=False))
    bare, ours = found["bare_tokens"], found["worker_tokens"]
    guard = f"tokens made by each: {bare} and {ours}"
    notes = (f"{PROMPTS} prompts, {AT_ONCE} at once; {found['outcomes']} outcomes were put",)
    return [
        Line("rollout worker, bare engine", "bare engine", seconds([found], "bare_s"), seconds([found], "worker_s"), guard, bare == ours, notes),
        _prefix_remark(found["cached"], found["uncached"]),
    ]


def _prefix_remark(on: dict[str, Any], off: dict[str, Any]) -> str:
    saved = on["prompt_tokens"] / (on["prompt_tokens"] - on["cached_tokens"])
    same = on["texts"] == off["texts"]
    verdict = "ok" if same and not off["cached_tokens"] else "FAILED: the texts differ"
    return (
        f"prefix cache: {SAMPLED_PROMPTS} prompts, {SAMPLES} samples each, answered and rewritten: {on['prompt_tokens']} prompt tokens, "
        f"{on['cached_tokens']} from the cache: {saved:.2f} times fewer computed (goal {LEAST_SAVED}); same texts without it: {verdict}"
    )


def measure_binding(repeats: int) -> Line:
    """The binding's line."""
    variables = {name: value for name, value in environment(allocator=False).items() if not name.endswith("_NUM_THREADS")}
    auto, bound = (run_arm(MODULE, arm, {"repeats": repeats}, variables) for arm in ("auto", "bound"))
    same = auto["texts"] == bound["texts"]
    guard = f"{'the same' if same else 'NOT the same'} {len(bound['texts'])} greedy texts"
    notes = (f"{AT_ONCE} prompts at once, {bound['tokens']} tokens",)
    return Line("engine on all cores, vLLM's own binding", "auto", seconds([auto], "took_s"), seconds([bound], "took_s"), guard, same, notes)


def _prompts(count: int) -> list[Prompt]:
    return [Prompt(str(row["id"]), (Message("user", row["prompt"]),)) for row in chat.rows("train")[:count]]


async def _started(bound: bool = True) -> tuple[VllmEngine, PromptBook]:
    book = PromptBook(load_tokenizer(embedded_model_dir()))
    spec = EngineSpec(str(embedded_model_dir()), max_num_seqs=AT_ONCE, log_level="WARNING", stop_token_ids=(book.eos_id,))
    os.environ.update(engine_environment(spec))
    if not bound:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "auto"
        for name in OURS_TO_BIND:
            del os.environ[name]
    engine = VllmEngine(spec)
    await asyncio.wait_for(engine.start(), DEADLINE_S)
    engine._version = 0  # as if it had proved the weights that it was started with
    return engine, book


# ---- the worker -----------------------------------------------------------------------------------------------------------------------


async def run_worker(repeats: int) -> dict[str, Any]:
    """The prefix cache, while it holds nothing yet; then both ways in turns, after one of each to warm up."""
    engine, book = await _started()
    found: dict[str, Any] = {"bare_s": [], "worker_s": []}
    try:
        for name, salted in (("uncached", True), ("cached", False)):
            found[name] = await _all_samples(engine, book, salted)
        for turn in range(repeats + 1):
            began = time.perf_counter()
            found["bare_tokens"] = await _bare(engine, book)
            middle = time.perf_counter()
            found["worker_tokens"], found["outcomes"] = await _with_worker(engine, book)
            if turn:
                found["bare_s"].append(middle - began)
                found["worker_s"].append(time.perf_counter() - middle)
    finally:
        await engine.stop()
    return found


async def _bare(engine: VllmEngine, book: PromptBook) -> int:
    """Tokens of all answers and rewrites."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one(prompt: Prompt) -> int:
        uid = outcome_uid(SEED, Stage.PREFERENCE, prompt.prompt_id, 0, 0)
        async with room:
            response = await engine.generate(GenerateRequest(f"{uid}-a", book.policy_ids(prompt), HOW, sampling_seed(uid, Role.POLICY)))
            ids = book.improver_ids(prompt, response.text)
            rewrite = await engine.generate(GenerateRequest(f"{uid}-b", ids, HOW, sampling_seed(uid, Role.IMPROVER)))
        return len(response.token_ids) + len(rewrite.token_ids)

    return sum(await asyncio.wait_for(asyncio.gather(*(one(prompt) for prompt in _prompts(PROMPTS))), DEADLINE_S))


async def _with_worker(engine: VllmEngine, book: PromptBook) -> tuple[int, int]:
    """The same by the worker: tokens, outcomes."""
    with TemporaryDirectory() as place:
        buffer = PairBuffer(Path(place) / "buffer.db")
        incarnation = await buffer.begin_incarnation()
        await buffer.open_stage(incarnation, StagePlan(Stage.PREFERENCE, SEED, batch_size=8, max_staleness=None), tuple(_prompts(PROMPTS)), 0)
        settings = RolloutSettings("w0", 1024, 1e-3, AT_ONCE)
        worker = RolloutWorker(settings, engine, buffer, book, gated, SilentRecorder().message)
        await worker.begin(GenerationTask(Stage.PREFERENCE, incarnation, HOW, HOW, {"default": "improver"}))
        await asyncio.wait_for(buffer.wait_exhausted(Stage.PREFERENCE), DEADLINE_S)
        stats = await worker.heartbeat()
        await worker.end()
        await buffer.close()
        return stats.generated_tokens, stats.pairs + stats.refusals


# ---- the binding ----------------------------------------------------------------------------------------------------------------------


async def run_binding(repeats: int, bound: bool) -> dict[str, Any]:
    """Greedy answers to ``AT_ONCE`` prompts at once, after one turn to warm up."""
    engine, book = await _started(bound=bound)
    found: dict[str, Any] = {"took_s": []}
    try:
        for turn in range(repeats + 1):
            began = time.perf_counter()
            asked = [GenerateRequest(f"{turn}-{n}", book.policy_ids(prompt), GREEDY, 0) for n, prompt in enumerate(_prompts(AT_ONCE))]
            answers = await asyncio.wait_for(asyncio.gather(*map(engine.generate, asked)), DEADLINE_S)
            if turn:
                found["took_s"].append(time.perf_counter() - began)
    finally:
        await engine.stop()
    return {**found, "texts": [one.text for one in answers], "tokens": sum(len(one.token_ids) for one in answers)}


# ---- the prefix cache -----------------------------------------------------------------------------------------------------------------


async def _all_samples(engine: VllmEngine, book: PromptBook, salted: bool) -> dict[str, Any]:
    """Greedy, so that texts compare; samples of one prompt differ by a sentence that is put before their drafts. All prompts at once."""
    counts = {"prompt_tokens": 0, "cached_tokens": 0}

    async def samples(number: int, prompt: Prompt) -> list[str]:
        texts = []
        for sample in range(SAMPLES):
            name = f"{salted}-{number}-{sample}"
            draft = await _counted(engine, counts, f"{name}-a", book.policy_ids(prompt), salted)
            texts.append(await _counted(engine, counts, f"{name}-b", book.improver_ids(prompt, f"Sample {sample}. {draft}"), salted))
        return texts

    texts = await asyncio.wait_for(asyncio.gather(*(samples(number, prompt) for number, prompt in enumerate(_prompts(SAMPLED_PROMPTS)))), DEADLINE_S)
    return {**counts, "texts": texts}


async def _counted(engine: VllmEngine, counts: dict[str, int], name: str, ids: tuple[int, ...], salted: bool) -> str:
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input

    prompt = tokens_input(list(ids), cache_salt=name if salted else None)
    async for newest in engine._llm.generate(prompt, SamplingParams(**sampling_arguments(GREEDY, 0)), name):
        output = newest
    counts["prompt_tokens"] += len(ids)
    counts["cached_tokens"] += output.num_cached_tokens or 0
    return str(output.outputs[0].text)


def main() -> None:
    """One arm, as a child of ``measure`` and ``measure_binding``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=["worker", "auto", "bound"], required=True)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    work = run_worker(options.repeats) if options.arm == "worker" else run_binding(options.repeats, options.arm == "bound")
    answer(options.arm, **asyncio.run(work))


if __name__ == "__main__":
    main()
