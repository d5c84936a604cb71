"""The line of ``plan`` that predicts pairs an hour: a configuration and a model turned into what ``cost_model`` asks for.

Rates come from the run's own metrics where it has trained already, else from the data sheet of the GPU and assumed efficiencies, which the
line names; a CPU that has measured nothing gets no line. Leaves out: the formulas (``cost_model``).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from sgpo_dist.cli.arithmetic import IMPROVER_OVERHEAD_TOKENS, is_online, pair_tokens
from sgpo_dist.cli.estimate import DTYPE_BYTES, kv_token_bytes, needs_reference
from sgpo_dist.cli.machine import Gpu
from sgpo_dist.cli.model_facts import ModelFacts
from sgpo_dist.config import Config
from sgpo_dist.cost_model import A100, H100, H200, HOUR_S, Bottleneck, Decoder, Device, RatesOf, Workload, predict
from sgpo_dist.placement import engine_dtype, on_gpu
from sgpo_dist.recorder import MetricRow, read_metrics
from sgpo_dist.records import Stage

MEASURED_STEPS = 3
"""Steps that a run must have behind it; the first, which waits for the first pairs, is not counted."""


def prediction_line(config: Config, gpus: Sequence[Gpu], model: ModelFacts | None) -> str | None:
    """Pairs an hour of the preference stage and who is waited for; None when no rate is known or the two do not overlap."""
    if "preference" not in config.stages or not is_online(config) or config.preference.pairs != "improver":
        return None
    rows = [row for row in read_metrics(config.run_dir / "metrics.jsonl") if row.stage == Stage.PREFERENCE]
    if len(rows) > MEASURED_STEPS:
        return measured_line(rows[1:], config.learner.train_batch_size)
    device = known_device(gpus[0]) if gpus and on_gpu(config) and config.learner.gpus_per_rank >= 1 else None
    return assumed_line(config, device, model) if device is not None and model is not None else None


def measured_line(rows: Sequence[MetricRow], batch: int) -> str:
    """From this run's own steps: median seconds from one's end to the next one's, and for whom the learner waited in them."""
    period = median(after.time - before.time for before, after in pairwise(rows))
    waited = median(row.metrics.get("time/wait_for_batch", 0.0) for row in rows)
    bottleneck = Bottleneck.ROLLOUT if waited > period / 10 else Bottleneck.LEARNER
    return f"predicted: {HOUR_S * batch / period:,.0f} pairs/hour, bottleneck {bottleneck} (measured on {len(rows)} steps of this run)"


def assumed_line(config: Config, device: Device, model: ModelFacts) -> str:
    """From a data sheet, at the longest texts allowed: real ones are shorter, so more pairs come."""
    load, rates_of = workload(config), rates(config, device, model)
    found = predict(load, rates_of(config.learner.num_ranks), config.rollout.num_rollout_workers)
    reach = rates_of.efficiency
    return (
        f"predicted: {found.pairs_per_hour:,.0f} pairs/hour at the longest texts, bottleneck {found.bottleneck}"
        f" (assumes {device.name}, MFU {reach.mfu:.0%}, decoding {reach.decode:.0%} of its memory roof, no refusals)"
    )


def workload(config: Config) -> Workload:
    """A pair of the longest texts allowed."""
    prompt, response, refinement = pair_tokens(config)
    return Workload(
        prompt,
        response,
        refinement,
        batch=config.made_pairs_per_step,
        sync_interval=config.weights.weight_sync_interval,
        max_staleness=config.preference.max_staleness,
        concurrency=config.rollout.concurrency,
        instruction=IMPROVER_OVERHEAD_TOKENS,
    )


def rates(config: Config, device: Device, model: ModelFacts) -> RatesOf:
    """6 FLOPs a parameter and token, 4 with adapters; 2 more for the reference and 2 for checkpointed activations."""
    lora = config.model.lora.enabled
    flops = (4 if lora else 6) + 2 * (needs_reference(config) or lora) + 2 * config.learner.gradient_checkpointing
    decoder = Decoder(model.parameters, kv_token_bytes(config, model), DTYPE_BYTES[engine_dtype(config)])
    return RatesOf(device, decoder, workload(config), flops_per_parameter=flops, engine_gpus=config.rollout.tensor_parallel_size)


def known_device(gpu: Gpu) -> Device | None:
    """By the name that the driver gives, or by the memory that ``--gpus`` names: 80 GiB is taken for an H100, 141 for an H200, 40 for an A100."""
    by_memory = {"80 GiB": H100, "141 GiB": H200, "40 GiB": A100}
    return by_memory.get(gpu.name) or next((device for device in (A100, H200, H100) if device.name in gpu.name), None)
