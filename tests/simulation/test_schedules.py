"""Thousands of seeded schedules of crashes, hangs, late puts, restarts and resumes. ``SGPO_SIM_SEED=n`` replays one of them."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from buffer_world import Settings, World, draw_rough_settings, draw_settings

CHUNKS = 10
SEEDS_PER_CHUNK = 180


def play(seed: int, settings: Settings | None = None, content_seed: int | None = None) -> World:
    """One world; a failure names its seed."""
    settings = settings or draw_settings(seed)
    try:
        return World(settings, seed, content_seed).run()
    except Exception as problem:
        raise AssertionError(f"SGPO_SIM_SEED={seed} replays this failure in {settings}: {type(problem).__name__}: {problem}") from problem


def seeds(chunk: int, per_chunk: int) -> range | list[int]:
    wanted = os.environ.get("SGPO_SIM_SEED")
    if wanted is not None:
        return [int(wanted)] if chunk == 0 else []
    return range(chunk * per_chunk, (chunk + 1) * per_chunk)


@pytest.mark.simulation
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_invariants_hold_in_every_schedule(chunk):
    for seed in seeds(chunk, SEEDS_PER_CHUNK):
        play(seed)


@pytest.mark.simulation
@pytest.mark.parametrize("chunk", range(2))
def test_the_staleness_bound_holds_under_frequent_faults(chunk):
    for seed in seeds(chunk, 25):
        play(seed, draw_rough_settings(seed))


@pytest.mark.simulation
@pytest.mark.parametrize("chunk", range(2))
def test_synchronous_batches_do_not_depend_on_faults_or_workers(chunk):
    for seed in seeds(chunk, 40):
        settings = replace(draw_settings(seed), staleness=0, poison=frozenset(), bump=0, max_attempts=1000)
        faulty = replace(settings, crashes=0.1, hangs=0.1, driver_crashes=1, fallbacks=0.5)
        calm = play(seed, settings.faultless(), content_seed=seed)
        rough = play(seed, faulty, content_seed=seed)
        assert calm.recorded == rough.recorded, f"SGPO_SIM_SEED={seed}"


@pytest.mark.simulation
def test_a_poison_prompt_is_refused_and_its_neighbours_are_not():
    for seed in range(30):
        settings = Settings(
            prompts=12, samples=1, epochs=1, batch=2, interval=1, staleness=1, max_pairs=None, steps=6,
            workers=2, concurrency=4, poison=frozenset({"p1"}),
        )  # fmt: skip
        world = play(seed, settings)
        assert world.exhausted  # 11 pairs fill five batches of two
        assert world.step == 5
        assert max(world.granted.values()) == 5
