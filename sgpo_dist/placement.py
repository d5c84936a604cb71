"""Which devices, engine type and weight transport a configuration means: what its 'auto' values come down to. Used by ``train`` and ``plan``."""

from __future__ import annotations

import math

from sgpo_dist.config import Config


def on_gpu(config: Config) -> bool:
    """Whether this is a GPU recipe: learner and engines then both take devices."""
    return config.learner.gpus_per_rank > 0


def gpus_needed(config: Config) -> int:
    """Devices the run asks for. Ranks with a fraction of a device share theirs with engines, which take the rest of it."""
    per_rank = config.learner.gpus_per_rank
    engines = config.rollout.num_rollout_workers * config.rollout.tensor_parallel_size
    if not per_rank:
        return 0
    learner = config.learner.num_ranks * per_rank
    return max(math.ceil(learner), engines) if per_rank < 1 else math.ceil(learner) + engines


def transport(config: Config) -> str:
    """The weight transport that ``weights.transport`` comes down to."""
    if config.weights.transport != "auto":
        return config.weights.transport
    if not on_gpu(config):
        return "shm"
    return "ipc" if config.learner.gpus_per_rank < 1 else "nccl"


def engine_dtype(config: Config) -> str:
    """The type of the engine's weights."""
    if config.rollout.dtype != "auto":
        return config.rollout.dtype
    return config.model.dtype if on_gpu(config) else "float32"
