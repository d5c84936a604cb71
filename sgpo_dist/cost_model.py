"""Pairs per hour from measured or assumed rates: who waits for whom, and how to split GPUs. Pure arithmetic.

Called by ``plan`` and by the benchmark ``scale``, which checks it against a simulation of the real worker, buffer and driver. It knows
nothing of configurations, devices or files. What it leaves out: start-up, stages before the preference stage, lost workers, evaluation,
and how lengths spread about their means.

One version's life takes tau seconds and K * B pairs (K steps of B pairs, ``sync_interval`` and ``batch``). With G workers, b prompts in flight on
each and staleness bound S:

    step(b) = max(fixed + per_sequence * b, compute * b)        seconds of a decode step; the roofline of a memory-bound decoder
    t_roll  = ((C + R) * step(b) / b + prefilled / v_prefill) / kept                         engine seconds a pair
    g       = K * B * t_roll / G,      latency = b * t_roll * kept      by Little's law: b prompts in flight, one ends every t_roll * kept
    l       = K * B * (P + C + R) / v_learn + sync                      the driver publishes between two steps
    tau     = max(g + stall, l, K * B / v_buffer, (max(g, tail * latency) + stall + l) / (S + 1))

The last term is the staleness bound's: prompts granted when version v becomes current are trained by version v + S + 1, and in between lie
their generation and one round of training. S = 0 makes it the synchronous loop. In flight are at most b = K * B / G a worker where
S = 0; else Little's law gives the largest b with  G * b + (l / g) * K * B <= (S + 1) * K * B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

BISECTIONS: Final = 60
HOUR_S: Final = 3600.0


class Bottleneck(StrEnum):
    """Whom everybody else waits for."""

    ROLLOUT = "rollout"
    LEARNER = "learner"
    BUFFER = "buffer"
    STALENESS = "staleness bound"


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU: FLOP/s (bf16, dense), bytes/s of its memory, bytes/s to its neighbours."""

    name: str
    flops: float
    memory_bandwidth: float
    link_bandwidth: float


A100 = Device("A100", 312e12, 2.04e12, 25e9)
H100 = Device("H100", 989e12, 3.35e12, 50e9)
H200 = Device("H200", 989e12, 4.8e12, 50e9)
"""Makers' data sheets (SXM). The link is that between machines: 200 and 400 Gbit/s a GPU."""


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of a device's roofs that are reached: ``mfu`` in training, ``prefill`` of FLOP/s, ``decode`` of the memory roof, ``link`` of its wire.

    ``parallel`` is what a learner of many ranks keeps of their sum. The defaults are what published runs reach; they are assumptions.
    """

    mfu: float = 0.45
    prefill: float = 0.55
    decode: float = 0.57
    link: float = 0.5
    parallel: float = 0.95


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model as the formulas need it. ``kv_token_bytes`` of the cache a token; ``weight_bytes`` a parameter."""

    parameters: float
    kv_token_bytes: float
    weight_bytes: float = 2.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Mean tokens of a pair, and how the stage is run.

    ``instruction`` is what the improver's prompt adds to prompt and draft; ``kept`` the share of prompts that give a pair; ``tail`` the tokens of
    the slowest pair of a version by the mean pair's; ``concurrency`` the prompts in flight on a worker at most; ``max_staleness`` None = no bound.
    """

    prompt: float
    response: float
    refinement: float
    batch: int
    sync_interval: int = 1
    max_staleness: int | None = 1
    concurrency: int = 64
    instruction: float = 0.0
    kept: float = 1.0
    tail: float = 1.0

    @property
    def pairs_a_version(self) -> int:
        """K * B."""
        return self.batch * self.sync_interval

    @property
    def trained_tokens(self) -> float:
        """P + C + R: the learner computes the prompt once for both halves."""
        return self.prompt + self.response + self.refinement

    @property
    def generated_tokens(self) -> float:
        """C + R."""
        return self.response + self.refinement

    @property
    def prefilled_tokens(self) -> float:
        """P for the policy; P + C + I for the improver, counted without hits in the prefix cache."""
        return 2 * self.prompt + self.response + self.instruction


@dataclass(frozen=True, slots=True)
class EngineRates:
    """One engine. Seconds of a decode step: ``fixed_s`` + ``per_sequence_s`` each, at least ``compute_s`` each; prefill in tokens/s."""

    fixed_s: float
    per_sequence_s: float
    prefill_tokens_per_s: float
    compute_s: float = 0.0

    def step_s(self, in_flight: float) -> float:
        """Seconds of a decode step of ``in_flight`` sequences."""
        return max(self.fixed_s + self.per_sequence_s * in_flight, self.compute_s * in_flight)

    def prompt_s(self, load: Workload, in_flight: float) -> float:
        """Engine seconds of one prompt's two passes; fewer than one in flight on average leaves an engine empty, no faster."""
        together = max(in_flight, 1.0)
        return load.generated_tokens * self.step_s(together) / together + load.prefilled_tokens / self.prefill_tokens_per_s


@dataclass(frozen=True, slots=True)
class Rates:
    """What the parts of a run do. ``learner_tokens_per_s`` is of all ranks; a sync keeps the learner for ``sync_s``, the engines for ``stall_s``."""

    engine: EngineRates
    learner_tokens_per_s: float
    sync_s: float = 0.0
    stall_s: float = 0.0
    buffer_pairs_per_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Prediction:
    """``rollout_busy`` is the share of what the engines could make with all prompts that they may hold; ``in_flight`` prompts a worker."""

    pairs_per_hour: float
    bottleneck: Bottleneck
    rollout_busy: float
    learner_busy: float
    in_flight: float


@dataclass(frozen=True, slots=True)
class Split:
    """Of the GPUs at hand, how many roll out and how many learn, and what that gives."""

    workers: int
    ranks: int
    prediction: Prediction


# ---- the prediction ----------------------------------------------------------------------------------------------------------------


def predict(load: Workload, rates: Rates, workers: int) -> Prediction:
    """Steady state of ``workers`` engines beside a learner; the formulas are at the head of the file."""
    pairs, learning = load.pairs_a_version, learning_s(load, rates)
    in_flight = prompts_in_flight(load, rates, workers)
    making, latency = making_s(load, rates, workers, in_flight), in_flight * rates.engine.prompt_s(load, in_flight)
    terms = {
        Bottleneck.LEARNER: learning,
        Bottleneck.ROLLOUT: making + rates.stall_s,
        Bottleneck.BUFFER: pairs / rates.buffer_pairs_per_s,
    }
    if load.max_staleness is not None:
        terms[Bottleneck.STALENESS] = (max(making, load.tail * latency) + rates.stall_s + learning) / (load.max_staleness + 1)
    bottleneck = max(terms, key=lambda name: terms[name])
    period = terms[bottleneck]
    if bottleneck is Bottleneck.ROLLOUT and in_flight < load.concurrency:
        bottleneck = Bottleneck.STALENESS  # the engines could hold more, the bound grants no more
    return Prediction(
        pairs_per_hour=HOUR_S * pairs / period,
        bottleneck=bottleneck,
        rollout_busy=making_s(load, rates, workers, load.concurrency) / period,
        learner_busy=(learning - rates.sync_s) / period,
        in_flight=in_flight,
    )


def learning_s(load: Workload, rates: Rates) -> float:
    """l: a version's steps and its publication."""
    return load.pairs_a_version * load.trained_tokens / rates.learner_tokens_per_s + rates.sync_s


def making_s(load: Workload, rates: Rates, workers: int, in_flight: float) -> float:
    """g: seconds in which the workers make a version's pairs."""
    busy = workers * min(in_flight, 1.0)  # below one prompt in flight a worker, so many of them have one
    return load.pairs_a_version * rates.engine.prompt_s(load, in_flight) / (busy * load.kept)


def prompts_in_flight(load: Workload, rates: Rates, workers: int) -> float:
    """b: what a worker may hold at most, or what the staleness bound leaves to it."""
    if load.max_staleness is None:
        return float(load.concurrency)
    if load.max_staleness == 0:
        return min(float(load.concurrency), load.pairs_a_version / workers)
    room, learning = (load.max_staleness + 1) * load.pairs_a_version, learning_s(load, rates)

    def fits(in_flight: float) -> bool:
        return load.tail * workers * in_flight + load.pairs_a_version * learning / making_s(load, rates, workers, in_flight) <= room

    low, high = 0.0, float(load.concurrency)
    if fits(high):
        return high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return high


def best_split(load: Workload, gpus: int, rates_of: RatesOf, least_ranks: int = 1) -> Split:
    """The split of ``gpus`` with the most pairs an hour; of equals the one with more ranks, which need less memory each.

    Raises ValueError when there is no GPU left for a worker.
    """
    if gpus <= least_ranks:
        raise ValueError(f"{gpus} GPUs leave none to a worker beside {least_ranks} learner ranks")
    splits = [Split(gpus - ranks, ranks, predict(load, rates_of(ranks), gpus - ranks)) for ranks in range(least_ranks, gpus)]
    return max(splits, key=lambda split: (split.prediction.pairs_per_hour, split.ranks))


# ---- rates of a device -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RatesOf:
    """Rates by the number of learner ranks, from a device's data sheet, a model and the shares reached.

    ``flops_per_parameter`` of a trained token: 6 (forward 2, backward 4), + 2 for a reference's forward, + 2 with gradient checkpointing; adapters
    alone need no weight gradients, 4 for 6.
    """

    device: Device
    model: Decoder
    load: Workload
    efficiency: Efficiency = Efficiency()
    flops_per_parameter: float = 8.0
    engine_gpus: int = 1
    buffer_pairs_per_s: float = math.inf

    def __call__(self, ranks: int) -> Rates:
        """Rates with a learner of ``ranks`` devices. A sync is one pass of the weights over the link, and the engines stand still meanwhile."""
        sync = self.model.parameters * self.model.weight_bytes / (self.device.link_bandwidth * self.efficiency.link)
        return Rates(self._engine(), self._learner(ranks), sync, sync, self.buffer_pairs_per_s)

    def _learner(self, ranks: int) -> float:
        """Tokens/s: MFU * FLOP/s / (FLOPs of a token), a rank; many ranks lose a little to one another."""
        one = self.efficiency.mfu * self.device.flops / (self.flops_per_parameter * self.model.parameters)
        return one if ranks == 1 else one * ranks * self.efficiency.parallel

    def _engine(self) -> EngineRates:
        """A step reads the weights once and each sequence's cache; it computes 2 FLOPs a parameter and sequence."""
        context = self.load.prompt + self.load.response + (self.load.instruction + self.load.refinement) / 2
        reading = self.device.memory_bandwidth * self.efficiency.decode * self.engine_gpus
        computing = self.device.flops * self.efficiency.prefill * self.engine_gpus / (2 * self.model.parameters)
        weights = self.model.parameters * self.model.weight_bytes
        return EngineRates(weights / reading, context * self.model.kv_token_bytes / reading, computing, 1 / computing)


def slowed(rates: Rates, factor: float) -> Rates:
    """The same engines, each ``factor`` times slower: to see how a prediction hangs on a rate that was assumed."""
    engine = rates.engine
    times = {"fixed_s": engine.fixed_s * factor, "per_sequence_s": engine.per_sequence_s * factor, "compute_s": engine.compute_s * factor}
    return replace(rates, engine=replace(engine, **times, prefill_tokens_per_s=engine.prefill_tokens_per_s / factor))
