"""Does the cost model hold? The real driver loop, workers and buffer in virtual time, with scripted engines and learner, beside ``cost_model``.

``python -m bench scale``. Real: ``preferences.optimise_preferences`` with the stage's verbs, ``RolloutWorker`` and ``Walker``, ``PairBuffer`` on an
SQLite file, admission, proofs. Scripted: engines and learner take the time that given rates say (``scripted``); a call of the buffer takes
the seconds of ``LEDGER``. Three tables: overlap with one worker group (goal C7), 1 to 1,024 workers (C14), and a prediction for 8 to 256 GPUs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, Final

from bench.machine import THREADS
from bench.scripted import Lengths, ScriptedBook, ScriptedFleet, ScriptedLearner, SilentRecorder, scripted_worker
from bench.virtual_time import VirtualLoop, run_virtually
from sgpo_dist.buffer.service import PairBuffer
from sgpo_dist.config import Config, build_config
from sgpo_dist.cost_model import H100, Bottleneck, Decoder, EngineRates, Prediction, Rates, RatesOf, Split, Workload, best_split, predict
from sgpo_dist.data.loading import Corpus
from sgpo_dist.preferences import optimise_preferences
from sgpo_dist.records import Message, Prompt
from sgpo_dist.run import Progress, Run

WARM_UP: Final = 3
"""Versions that are not counted: the pipeline fills."""
COOL_DOWN: Final = 2
"""As many at the end: no prompts follow the last ones, so that whoever is done early has nothing to do."""
LEAST_EFFICIENCY: Final = 0.97
LEAST_SCALING: Final = 0.95
MODEL_ERROR: Final = 0.10
SPREAD: Final = 0.5
SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
GPUS: Final = (8, 16, 32, 64, 256)
SIMULATED: Final = 64
"""GPUs of the prediction's largest simulated row: a hundred starved workers poll, and every poll costs real time."""


@dataclass(frozen=True, slots=True)
class LedgerCost:
    """Seconds that the buffer's thread is busy with one call, and with each outcome or lease in it: about what they take on one core, in-process."""

    call_s: float
    outcome_s: float
    lease_s: float

    def seconds(self, call: Callable[..., Any]) -> float:
        """Of one call as ``PairBuffer`` hands it to its thread."""
        name = getattr(call, "func", call).__name__
        if name == "put_group":
            requests = call.args[0]  # type: ignore[attr-defined]
            return self.call_s + self.outcome_s * sum(len(request.outcomes) for request in requests)
        return self.call_s + (self.lease_s * call.args[3] if name == "lease" else 0.0)  # type: ignore[attr-defined]


LEDGER: Final = LedgerCost(call_s=0.15e-3, outcome_s=0.12e-3, lease_s=0.02e-3)

QWEN_7B: Final = Decoder(parameters=7.6e9, kv_token_bytes=57_344)  # 28 layers, 4 key-value heads of 128, bf16
QWEN_LOAD: Final = Workload(
    prompt=256, response=384, refinement=384, batch=128, sync_interval=4, max_staleness=1, concurrency=128, instruction=120
)
QWEN_RATES: Final = RatesOf(H100, QWEN_7B, QWEN_LOAD, flops_per_parameter=10.0)
LEAST_RANKS: Final = 4
"""As examples/qwen2.5-7b.yaml has it: fewer ranks of 80 GiB do not hold weights, optimiser and reference."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """What came out after the warm-up. ``period_s`` of a version; ``ideal_s`` = max(learner's, engines' own time) of one."""

    pairs_per_hour: float
    period_s: float
    learner_s: float
    staleness: float


def simulate(load: Workload, rates: Rates, workers: int, versions: int, spread: float = SPREAD, seed: int = 0) -> Simulated:
    """``versions`` weight versions of the real preference stage, and those of warm-up and cool-down. Nothing real is waited for."""
    with TemporaryDirectory() as place:
        story = partial(_story, load, rates, workers, versions, Lengths(spread), seed, Path(place))
        return run_virtually(story, LEDGER.seconds)


async def _story(
    load: Workload, rates: Rates, workers: int, versions: int, lengths: Lengths, seed: int, place: Path, loop: VirtualLoop
) -> Simulated:
    steps = (WARM_UP + versions + COOL_DOWN) * load.sync_interval
    buffer = PairBuffer(place / "buffer.db", synchronous="OFF", clock=loop.time, wall=loop.time)
    learner, recorder = ScriptedLearner(load, rates), SilentRecorder()
    fleet = ScriptedFleet([scripted_worker(f"w{n}", load, rates, lengths, buffer, loop.time) for n in range(workers)])
    run: Any = Run(
        config=_config(load, steps, seed),
        directory=place,
        initial_model=place,
        corpus=Corpus((), _prompts(steps * load.batch + 2 * workers * load.concurrency), ()),
        book=ScriptedBook(load),  # type: ignore[arg-type]
        buffer=buffer,
        fleet=fleet,  # type: ignore[arg-type]
        learner=learner,  # type: ignore[arg-type]
        store=None,  # type: ignore[arg-type]  # nothing is saved
        recorder=recorder,  # type: ignore[arg-type]
        incarnation=await buffer.begin_incarnation(),
        progress=Progress("preference", global_step=1),
        tolerance=1e-3,
    )
    await optimise_preferences(run)
    await buffer.close()
    return _measured(load, learner, recorder, steps)


def _measured(load: Workload, learner: ScriptedLearner, recorder: SilentRecorder, steps: int) -> Simulated:
    """From the end of the last warm-up version's steps to the beginning of the cool-down."""
    if len(learner.ends) != steps:
        raise RuntimeError(f"the simulated stage ended after {len(learner.ends)} of {steps} steps")
    first = WARM_UP * load.sync_interval - 1
    last = steps - 1 - COOL_DOWN * load.sync_interval
    counted = last - first
    took = learner.ends[last] - learner.ends[first]
    period = took * load.sync_interval / counted
    learning = fmean(learner.steps_s[first + 1 : last + 1]) * load.sync_interval
    return Simulated(3600 * counted * load.batch / took, period, learning, max(recorder.staleness))


def _config(load: Workload, steps: int, seed: int) -> Config:
    return build_config(
        {
            "stages": ["preference"],
            "seed": seed,
            "learner": {"train_batch_size": load.batch, "max_tokens_per_micro_batch": 2**20},
            "preference": {"total_steps": steps, "max_staleness": load.max_staleness, "health_steps": 0, "brakes": {"action": "off"}},
            "weights": {"weight_sync_interval": load.sync_interval},
            "checkpoint": {"save_steps": steps + 1},
            "data": {"max_prompt_tokens": round(load.prompt)},
            "rollout": {
                "max_model_len": 2**17,
                "lease_s": 86_400,
                "policy": {"max_new_tokens": round(load.response)},
                "improver": {"max_new_tokens": round(load.refinement)},
            },
        }
    )


def _prompts(number: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(f"p{n}", (Message("user", f"question {n}"),)) for n in range(number))


# ---- the tables --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One simulated point beside its prediction."""

    name: str
    load: Workload
    workers: int
    predicted: Prediction
    simulated: Simulated

    @property
    def error(self) -> float:
        """The simulation's share above the model."""
        return self.simulated.pairs_per_hour / self.predicted.pairs_per_hour - 1

    @property
    def passed(self) -> bool:
        """No pair staler than the bound, and within ten percent; where the bound is what limits, the model is only rough (docs/bench.md)."""
        bound = self.load.max_staleness
        fresh = bound is None or self.simulated.staleness <= bound
        return fresh and (abs(self.error) <= MODEL_ERROR or self.predicted.bottleneck is Bottleneck.STALENESS)


def measure(quick: bool) -> list[str]:
    """All tables as remarks in Markdown; a table that fails its guard says FAILED."""
    began = time.monotonic()
    with ProcessPoolExecutor(THREADS, get_context("spawn")) as pool:  # the clock is virtual: neighbours change no figure
        scaling = scaling_rows(SIZES[:7] if quick else SIZES, pool)
        overlap, prediction = pool.submit(overlap_table, 50 if quick else 200), pool.submit(prediction_table, quick)
        remarks = [overlap.result(), scaling_table(scaling), prediction.result()]
    return [*remarks, f"scale took {time.monotonic() - began:.0f} s of real time"]


def overlap_table(versions: int) -> str:
    """C7: max(g, l) / measured step, for g = l, 2l, l/2; all texts as long as one another, so that the ideal is exact."""
    load = Workload(prompt=100, response=100, refinement=100, batch=16, max_staleness=1, concurrency=2)
    engine = EngineRates(0.01, 0.0, 1e9)  # 2 in flight: 200 tokens * 10 ms / 2 = 1 s a pair, 16 s a batch for one worker
    workers, making = 4, 4.0
    lines = []
    for name, share in (("g = l", 1.0), ("g = 2 l", 0.5), ("2 g = l", 2.0)):
        rates = Rates(engine, learner_tokens_per_s=load.batch * load.trained_tokens / (making * share))
        found = simulate(load, rates, workers, versions, spread=0.0)
        efficiency = max(making, found.learner_s) / found.period_s
        lines.append(f"{name} {efficiency:.3f}{'' if efficiency >= LEAST_EFFICIENCY else ' FAILED'}, staleness {found.staleness:.0f}")
    return f"overlap efficiency, max(g, l) / step, {versions} steps, target {LEAST_EFFICIENCY}: {'; '.join(lines)}"


def scaling_rows(sizes: Sequence[int], pool: Executor) -> list[Future[Row]]:
    """C14, begun with the largest: workers that make a pair a second each, a learner and batches that grow with them."""
    rows = []
    for workers in reversed(sizes):
        load = Workload(prompt=100, response=100, refinement=100, batch=6 * workers, max_staleness=1, concurrency=2)
        rates = Rates(EngineRates(0.01, 0.0, 1e9), learner_tokens_per_s=2.5 * workers * load.trained_tokens, sync_s=0.1, stall_s=0.1)
        rows.append(pool.submit(_row, str(workers), load, rates, workers, versions=3 if workers > 128 else 5))
    return rows[::-1]


def scaling_table(rows: Sequence[Future[Row]]) -> str:
    """The rows beside linear from the first one."""
    lines, least = [], rows[0].result()
    for row in (future.result() for future in rows):
        linear = row.simulated.pairs_per_hour / (least.simulated.pairs_per_hour * row.workers / least.workers)
        failed = "" if row.passed and (linear >= LEAST_SCALING or row.workers > 64) else " FAILED"
        lines.append(f"| {row.name} | {_figures(row)} | {linear:.3f}{failed} |")
    return _markdown("workers of 1 pair/s", "of linear", lines)


def prediction_table(quick: bool) -> str:
    """Qwen2.5-7B on H100s by assumed rates, at the model's best split; simulated up to ``SIMULATED`` GPUs."""
    rows = []
    for gpus in GPUS:
        load = replace(QWEN_LOAD, tail=Lengths(SPREAD).tail(QWEN_LOAD.pairs_a_version))
        split = best_split(load, gpus, QWEN_RATES, LEAST_RANKS)
        name = f"{gpus} = {split.workers} + {split.ranks}"
        if gpus > (8 if quick else SIMULATED):
            rows.append(f"| {name} | {split.prediction.pairs_per_hour:,.0f} | not simulated | | {_busy(split)} |")
            continue
        row = _row(name, load, QWEN_RATES(split.ranks), split.workers, versions=6)
        rows.append(f"| {row.name} | {_figures(row)} | {_busy(split)}{'' if row.passed else ' FAILED'} |")
    return f"PREDICTION, measured on no GPU. {_assumptions()}\n\n{_markdown('H100s = workers + ranks', 'rollout / learner busy, bottleneck', rows)}"


def _row(name: str, load: Workload, rates: Rates, workers: int, versions: int) -> Row:
    began = time.monotonic()
    load = replace(load, tail=Lengths(SPREAD).tail(load.pairs_a_version))
    row = Row(name, load, workers, predict(load, rates, workers), simulate(load, rates, workers, versions))
    print(f"  scale {name}: {row.error:+.1%} in {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    return row


def _figures(row: Row) -> str:
    return f"{row.predicted.pairs_per_hour:,.0f} | {row.simulated.pairs_per_hour:,.0f} | {row.error:+.1%}"


def _busy(split: Split) -> str:
    found = split.prediction
    return f"{found.rollout_busy:.0%} / {found.learner_busy:.0%}, {found.bottleneck}"


def _assumptions() -> str:
    reach, load, device = QWEN_RATES.efficiency, QWEN_LOAD, QWEN_RATES.device
    return (
        f"Assumed: 7.6B parameters, {device.name}, MFU {reach.mfu:.0%}, decoding {reach.decode:.0%} of the memory roof, prefill"
        f" {reach.prefill:.0%} of the FLOPs, weights over {device.link_bandwidth / 1e9:.0f} GB/s at {reach.link:.0%}; prompts of {load.prompt:.0f},"
        f" answers of {load.response:.0f} tokens, {SPREAD:.0%} shorter to longer, batches of {load.batch}, a sync every {load.sync_interval} steps,"
        f" max_staleness {load.max_staleness}, concurrency {load.concurrency}."
    )


def _markdown(first: str, last: str, rows: Sequence[str]) -> str:
    head = f"| {first} | model, pairs/h | simulated | error | {last} |\n| --- | --- | --- | --- | --- |"
    return "\n".join([head, *rows])


if __name__ == "__main__":
    print("\n\n".join(measure("--quick" in sys.argv)))
