"""The learning rate's course over a stage: a pure function of the step. Called by the DeepSpeed engine's scheduler."""

from __future__ import annotations

import math

from sgpo_dist.errors import ConfigError
from sgpo_dist.roles import OptimiserPlan


def learning_rate_factor(done: int, plan: OptimiserPlan) -> float:
    """Share of the peak learning rate for the step after ``done`` completed ones.

    Rises in equal parts over ``warmup_ratio`` of the steps, the first of them included (no step is wasted on a rate of zero), then
    falls to zero just after the last step (linear, cosine) or stays (constant). Raises ConfigError for an unknown schedule.
    """
    warmup = round(plan.warmup_ratio * plan.total_steps)
    if done < warmup:
        return (done + 1) / warmup
    progress = min(1.0, (done - warmup) / max(1, plan.total_steps - warmup))
    if plan.schedule == "constant":
        return 1.0
    if plan.schedule == "linear":
        return 1.0 - progress
    if plan.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ConfigError(f"schedule '{plan.schedule}' is not known; write linear, cosine or constant")
