"""The cost model by hand: the roofline, who waits for whom, and the split of GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sgpo_dist.cli.machine import Gpu
from sgpo_dist.cli.model_facts import EMBEDDED_FACTS
from sgpo_dist.cli.prediction import measured_line, prediction_line
from sgpo_dist.config import build_config
from sgpo_dist.cost_model import (
    H100,
    Bottleneck,
    Decoder,
    Device,
    Efficiency,
    EngineRates,
    Rates,
    RatesOf,
    Workload,
    best_split,
    making_s,
    predict,
    prompts_in_flight,
    slowed,
)
from sgpo_dist.recorder import MetricRow

# 200 generated tokens, 300 trained; a step of 40 ms for 4 in flight is 200 * 0.04 / 4 = 2 s a pair, 8 s from lease to pair
LOAD = Workload(prompt=100, response=100, refinement=100, batch=32, max_staleness=1, concurrency=4)
ENGINE = EngineRates(fixed_s=0.04, per_sequence_s=0.0, prefill_tokens_per_s=1e12)
RATES = Rates(ENGINE, learner_tokens_per_s=600.0)  # 2 pairs/s: 16 s a step


def test_a_step_is_bound_by_memory_or_by_arithmetic() -> None:
    engine = EngineRates(fixed_s=0.010, per_sequence_s=0.001, prefill_tokens_per_s=500.0, compute_s=0.002)
    assert engine.step_s(4) == pytest.approx(0.014)
    assert engine.step_s(20) == pytest.approx(0.040)
    load = replace(LOAD, instruction=50)
    assert load.prefilled_tokens == 350  # 100, then 100 + 100 + 50
    assert engine.prompt_s(load, 4) == pytest.approx(200 * 0.014 / 4 + 0.7)


def test_the_published_roof_of_an_8b_model_on_h100() -> None:
    """16 GB of weights and 256 caches of 700 tokens at 128 KiB, by 3.35 TB/s: 11.8 ms."""
    whole = Efficiency(mfu=1, prefill=1, decode=1, link=1, parallel=1)
    load = replace(LOAD, prompt=500, response=100, refinement=200)  # context 500 + 100 + 200 / 2
    rates = RatesOf(H100, Decoder(8e9, 131_072), load, whole, flops_per_parameter=6)(1)
    assert rates.engine.step_s(256) == pytest.approx((16e9 + 256 * 700 * 131_072) / 3.35e12)
    assert rates.learner_tokens_per_s == pytest.approx(989e12 / 48e9)
    assert rates.sync_s == pytest.approx(16e9 / 50e9)


def test_the_learner_waits_for_one_worker() -> None:
    found = predict(LOAD, RATES, workers=1)
    assert found.bottleneck is Bottleneck.ROLLOUT
    assert found.pairs_per_hour == pytest.approx(1800)  # 32 pairs in 64 s
    assert found.learner_busy == pytest.approx(0.25)


def test_eight_workers_wait_for_the_learner() -> None:
    found = predict(replace(LOAD, batch=320), RATES, workers=8)
    assert found.bottleneck is Bottleneck.LEARNER
    assert found.pairs_per_hour == pytest.approx(7200)
    assert found.rollout_busy == pytest.approx(0.5)  # 80 of 160 s


def test_without_staleness_the_two_take_turns() -> None:
    found = predict(replace(LOAD, max_staleness=0), replace(RATES, sync_s=2.0, stall_s=1.0), workers=4)
    assert found.bottleneck is Bottleneck.STALENESS
    assert found.pairs_per_hour == pytest.approx(3600 * 32 / (16 + 1 + 16 + 2))


def test_the_slowest_text_counts_where_steps_must_wait_for_it() -> None:
    """32 workers with one prompt each: 8 s at any occupancy, twice that for the slowest; then 16 s of training."""
    load = replace(LOAD, max_staleness=0, tail=2.0)
    assert prompts_in_flight(load, RATES, 32) == 1.0
    assert predict(load, RATES, workers=32).pairs_per_hour == pytest.approx(3600 * 32 / (16 + 16))


def test_many_workers_are_starved_by_the_bound() -> None:
    """Learning takes no time: 64 prompts in flight on 64 workers, which could hold 256."""
    rates = replace(RATES, learner_tokens_per_s=1e12)
    assert prompts_in_flight(LOAD, rates, 64) == pytest.approx(1.0, abs=1e-6)
    found = predict(LOAD, rates, 64)
    assert found.bottleneck is Bottleneck.STALENESS
    assert found.pairs_per_hour == pytest.approx(3600 * 32 / 4, rel=1e-6)  # 64 prompts by 8 s


def test_refused_prompts_and_the_buffer_cost_time() -> None:
    assert making_s(replace(LOAD, kept=0.5), RATES, 1, 4.0) == pytest.approx(128)
    found = predict(replace(LOAD, batch=320), replace(RATES, buffer_pairs_per_s=0.5), 8)
    assert (found.bottleneck, found.pairs_per_hour) == (Bottleneck.BUFFER, pytest.approx(1800))


def test_versions_of_more_steps_share_the_sync() -> None:
    rates = replace(RATES, sync_s=8.0)
    assert predict(replace(LOAD, batch=320), rates, 16).pairs_per_hour == pytest.approx(3600 * 320 / 168)
    assert predict(replace(LOAD, batch=320, sync_interval=4), rates, 16).pairs_per_hour == pytest.approx(3600 * 1280 / 648)


def test_the_best_split_balances_the_two() -> None:
    """A worker makes a pair in 2 s, a rank learns one in 1 s: of 9 devices 6 and 3."""
    device = Device("toy", flops=300.0, memory_bandwidth=50.0, link_bandwidth=1e12)
    ideal = Efficiency(mfu=1, prefill=1e12, decode=1, link=1, parallel=1)
    load = replace(LOAD, batch=600)
    split = best_split(load, 9, RatesOf(device, Decoder(1.0, 0.0), load, ideal, flops_per_parameter=1.0))
    assert (split.workers, split.ranks) == (6, 3)
    assert split.prediction.pairs_per_hour == pytest.approx(3 * 3600, rel=1e-6)
    with pytest.raises(ValueError, match="leave none"):
        best_split(load, 4, RatesOf(device, Decoder(1.0, 0.0), load), least_ranks=4)


def test_slower_engines_make_fewer_pairs() -> None:
    assert predict(LOAD, slowed(RATES, 2.0), 1).pairs_per_hour == pytest.approx(900)


# ---- the line of `plan` ------------------------------------------------------------------------------------------------------------


def test_a_run_that_trained_predicts_from_its_own_steps() -> None:
    rows = [MetricRow(100.0 + 20 * step, "preference", step, {"time/wait_for_batch": 3.0}) for step in range(1, 5)]
    assert measured_line(rows, 8) == "predicted: 1,440 pairs/hour, bottleneck rollout (measured on 4 steps of this run)"  # 8 in 20 s
    assert "bottleneck learner" in measured_line([replace(row, metrics={}) for row in rows], 8)


def test_a_gpu_is_assumed_by_name_and_a_cpu_is_not(tmp_path: Path) -> None:
    settings = build_config({"output_dir": str(tmp_path), "model": {"dtype": "bfloat16"}, "learner": {"gpus_per_rank": 1}})
    line = prediction_line(settings, (Gpu("80 GiB", 1, 1),), EMBEDDED_FACTS) or ""
    assert line.startswith("predicted: ")
    assert "assumes H100, MFU 45%" in line
    assert prediction_line(settings, (Gpu("NVIDIA T4", 1, 1),), EMBEDDED_FACTS) is None
    assert prediction_line(build_config({"output_dir": str(tmp_path)}), (), EMBEDDED_FACTS) is None
