"""The learning rate's course, by hand."""

from __future__ import annotations

import pytest

from learner.schedule import learning_rate_factor
from sgpo_dist.errors import ConfigError
from sgpo_dist.roles import OptimiserPlan


def course(schedule: str, total: int, warmup: float) -> list[float]:
    plan = OptimiserPlan(1.0, total, warmup_ratio=warmup, schedule=schedule)
    return [round(learning_rate_factor(done, plan), 4) for done in range(total)]


def test_linear_with_warm_up():
    assert course("linear", 6, 0.34) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine_without_warm_up():
    assert course("cosine", 4, 0.0) == [1.0, 0.8536, 0.5, 0.1464]


def test_constant_stays():
    assert course("constant", 4, 0.5) == [0.5, 1.0, 1.0, 1.0]


def test_no_step_is_wasted_on_zero_and_none_beyond_the_end_is_negative():
    plan = OptimiserPlan(1.0, 3, warmup_ratio=0.0, schedule="linear")
    assert learning_rate_factor(0, plan) == 1.0
    assert learning_rate_factor(9, plan) == 0.0


def test_unknown_schedule_is_refused():
    with pytest.raises(ConfigError, match="linear, cosine or constant"):
        learning_rate_factor(5, OptimiserPlan(1.0, 4, schedule="polynomial"))
