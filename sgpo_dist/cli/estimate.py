"""How much memory and disk a configuration takes: formulas on a configuration and a model's facts.

Called by ``plan``. Estimates, good to about a quarter: weights, fp32 master, Adam's two moments, gradients, activations, KV cache, and
what the processes take before any of it. Left out: whether the machine has that much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from sgpo_dist.cli.model_facts import ModelFacts
from sgpo_dist.config import Config
from sgpo_dist.placement import engine_dtype, on_gpu, transport

GIB: Final = 2**30
RANK_BASE: Final = 1.1 * GIB
"""Python, torch, DeepSpeed and Ray in one rank's process."""
ENGINE_BASE: Final = 2.0 * GIB
"""The engine's actor and its child process before any weights."""
DRIVER_BASE: Final = 1.2 * GIB
"""Driver, buffer actor and Ray's own processes."""
DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2}
SCORED_CHUNK: Final = 256
"""Tokens whose logits the learner holds at once."""


@dataclass(frozen=True, slots=True)
class Memory:
    """A part's estimated bytes, and on which kind of memory it lies."""

    part: str
    num_bytes: float
    on_gpu: bool
    why: str


# ---- memory and disk -----------------------------------------------------------------------------------------------------------


def trainable_parameters(config: Config, model: ModelFacts) -> int:
    """All of them, or those of the adapters."""
    return model.lora_parameters(config.model.lora.r) if config.model.lora.enabled else model.parameters


def needs_reference(config: Config) -> bool:
    """Whether a rank holds a second, frozen model: not for a loss without reference, nor with adapters, which are switched off instead."""
    return "preference" in config.stages and config.preference.loss_type != "simpo" and not config.model.lora.enabled


def rank_bytes(config: Config, model: ModelFacts) -> float:
    """Bytes of one learner rank.

    Weights b*N (ZeRO-3: / ranks); fp32 master 4*T and Adam 8*T (ZeRO >= 1: / ranks), gradients b*T (ZeRO >= 2: / ranks) and their fp32
    share 4*T / ranks; frozen reference b*N, whole on every rank; activations (see ``activation_bytes``) and three fp32 copies of the logits
    of one chunk.
    """
    learner, width, ranks = config.learner, DTYPE_BYTES[config.model.dtype], config.learner.num_ranks
    trained = trainable_parameters(config, model)
    split = {stage: ranks if learner.zero_stage >= stage else 1 for stage in (1, 2, 3)}
    weights = width * model.parameters / split[3]
    states = (12 if width == 2 or learner.zero_stage else 8) * trained / split[1]
    gradients = width * trained / split[2] + (4 * trained / split[2] if width == 2 else 0)
    reference = width * model.parameters if needs_reference(config) else 0
    logits = 3 * 4 * min(learner.max_tokens_per_micro_batch, SCORED_CHUNK) * model.vocabulary
    return weights + states + gradients + reference + activation_bytes(config, model) + logits + RANK_BASE


def activation_bytes(config: Config, model: ModelFacts) -> float:
    """34 * tokens * hidden * b / 2 a layer (Korthikanti et al. 2022, arXiv 2205.05198, without attention matrices).

    With checkpointing: that of one layer, and the input of each, 2 * tokens * hidden * b / 2.
    """
    learner = config.learner
    per_layer = learner.max_tokens_per_micro_batch * model.hidden * DTYPE_BYTES[config.model.dtype] / 2
    return (34 + 2 * model.layers if learner.gradient_checkpointing else 34 * model.layers) * per_layer


def engine_bytes(config: Config, model: ModelFacts) -> float:
    """Bytes of one engine: its weights; on a CPU also their copy while they are repacked, and the KV cache."""
    weights = DTYPE_BYTES[engine_dtype(config)] * model.parameters
    return weights if on_gpu(config) else 2 * weights + config.rollout.kv_cache_gib * GIB + ENGINE_BASE


def kv_token_bytes(config: Config, model: ModelFacts) -> int:
    """Bytes of the KV cache a token: a key and a value a layer."""
    return 2 * model.layers * model.kv_width * DTYPE_BYTES[engine_dtype(config)]


def smallest_gpu(config: Config, model: ModelFacts) -> float:
    """Bytes a device must have: for a rank, and for an engine's weights and one prompt of full length within its share.

    A rank beside an engine has what ``rollout.gpu_memory_utilization`` leaves; infinite when that is nothing.
    """
    share, parallel = config.rollout.gpu_memory_utilization, config.rollout.tensor_parallel_size
    engine = (engine_bytes(config, model) + kv_token_bytes(config, model) * config.rollout.max_model_len) / parallel
    left = 1 - share if config.learner.gpus_per_rank < 1 else 1.0
    return max(rank_bytes(config, model) / left if left else math.inf, engine / share if share else math.inf)


def memory_parts(config: Config, model: ModelFacts) -> list[Memory]:
    """The estimated parts of a run's memory."""
    gpu, ranks, workers = on_gpu(config), config.learner.num_ranks, config.rollout.num_rollout_workers
    rank, engine, store = rank_bytes(config, model), engine_bytes(config, model), config.cluster.object_store_gib * GIB
    reference = ", reference" if needs_reference(config) else ""
    cache = f"weights; the rest of its share is KV cache, {kv_token_bytes(config, model) / 1024:.0f} KiB a token" if gpu else "weights, KV cache"
    parts = [
        Memory(f"learner, {plural(ranks, 'rank')}", rank * ranks, gpu, f"{gib(rank)} each: weights, optimiser, gradients{reference}, activations"),
        Memory(f"rollout, {plural(workers, 'engine')}", engine * workers, gpu, f"{gib(engine)} each: {cache}"),
        Memory("driver, buffer, Ray", DRIVER_BASE + store, False, f"object store {config.cluster.object_store_gib:g} GiB"),
    ]
    if gpu:
        parts.append(Memory("host side of GPU processes", RANK_BASE * ranks + ENGINE_BASE * workers, False, "Python, torch, CUDA"))
    else:
        parts.append(Memory("weights on their way", shared_bytes(config, model), False, "two versions in shared memory"))
    return parts


def shared_bytes(config: Config, model: ModelFacts) -> float:
    """Shared memory that the transport uses: the version being published and the one before."""
    return 2.0 * DTYPE_BYTES[config.model.dtype] * model.parameters if transport(config) == "shm" else 0.0


def disk_bytes(config: Config, model: ModelFacts) -> float:
    """Checkpoints (what is trained, its fp32 master and Adam; one more while it is written) and whole models (see ``models_kept``)."""
    width, trained = DTYPE_BYTES[config.model.dtype], trainable_parameters(config, model)
    return (checkpoints_kept(config) + 1) * (width + 12) * trained + models_kept(config) * width * model.parameters


def models_kept(config: Config) -> int:
    """Model directories of a run: one a stage, the final one, and the reference that each round after the first begins with."""
    rounds = config.preference.rounds if "preference" in config.stages else 1
    return len(config.stages) + 1 + rounds - 1


def checkpoints_kept(config: Config) -> int:
    """How many checkpoints lie on the disk at the end."""
    kept = config.checkpoint.keep_last
    return kept + (config.preference.total_steps // config.checkpoint.keep_every if config.checkpoint.keep_every else 0)


def gib(num_bytes: float) -> str:
    """Bytes as people read them."""
    return f"{num_bytes / GIB:.1f} GiB"


def plural(count: int, noun: str) -> str:
    """1 rank, 2 ranks."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
