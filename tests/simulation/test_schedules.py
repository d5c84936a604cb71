"""Ten thousand seeded schedules of crashes, hangs, lost calls, restarts and resumes.

A failure prints the line that plays its schedule again. The schedules of a test run in parallel, one process a core.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import pytest
from buffer_world import Settings, World, draw_rough_settings, draw_settings

SCHEDULES = 9600
ROUGH_SCHEDULES = 400
SYNCHRONOUS_SCHEDULES = 100
CHUNK = 20

SHARES = {
    "request lost": 0.25,
    "answer lost": 0.25,
    "request doubled": 0.25,
    "late request refused": 0.03,
    "put repeated": 0.25,
    "worker killed": 0.1,
    "worker hung": 0.1,
    "late writer": 0.03,
    "old worker refused": 0.1,
    "lease expired": 0.2,
    "buffer restarted": 0.25,
    "driver restarted": 0.25,
    "old driver refused": 0.1,
    "checkpoint damaged": 0.02,
    "learner lost": 0.25,
    "batch replayed": 0.25,
    "refusal": 0.3,
    "poison prompt": 0.05,
    "clock set": 0.15,
    "pair dropped as stale": 0.01,
    "held: PAIRS": 0.4,
    "held: SETTLING": 0.1,
    "held: IN_FLIGHT": 0.005,
    "staleness 0": 0.15,
    "staleness 1": 0.15,
    "staleness 2": 0.05,
    "interval 1": 0.25,
    "interval 2": 0.1,
    "max_pairs": 0.3,
    "several samples": 0.25,
}
"""The least share of the mixed schedules in which each thing must have happened: a fault that stops happening tests nothing."""


def play(test: str, settings: Settings, seed: int, content_seed: int | None = None) -> World:
    """One world; a failure says how to play it again."""
    try:
        return World(settings, seed, content_seed).run()
    except Exception as problem:
        line = f"SGPO_SIM_SEED={seed} python -m pytest tests/simulation -k {test}"
        raise AssertionError(f"{line}  # {type(problem).__name__}: {problem}; {settings}") from problem


def play_mixed(seed: int) -> Counter[str]:
    settings = draw_settings(seed)
    return seen(play("test_invariants_hold", settings, seed))


def play_rough(seed: int) -> Counter[str]:
    return seen(play("test_the_staleness_bound", draw_rough_settings(seed), seed))


def play_twice(seed: int) -> bool:
    """Whether a synchronous run of steps has the same batches with faults and without."""
    settings = replace(draw_settings(seed), staleness=0, poison=frozenset(), bump=0, renumber=False, max_attempts=1000)
    faulty = replace(settings, crashes=0.1, hangs=0.1, losses=0.1, driver_crashes=1, learner_losses=1, fallbacks=0.5)
    again = partial(play, "test_synchronous", seed=seed, content_seed=seed)
    return again(settings.faultless()).recorded == again(faulty).recorded


def seen(world: World) -> Counter[str]:
    """What happened in a world, each thing counted once."""
    settings = world.settings
    happened = [name for name, times in world.faults.items() if times]
    features = {
        f"staleness {settings.staleness}": True,
        f"interval {settings.interval}": True,
        "max_pairs": settings.max_pairs is not None,
        "several samples": settings.samples > 1,
    }
    return Counter([*happened, *(name for name, there in features.items() if there)])


@pytest.fixture(scope="module")
def every() -> Iterator[Callable[[Callable[[int], object], int], list[object]]]:
    """``every(play, n)``: the answers for seeds 0 to n - 1, or for the one that SGPO_SIM_SEED names."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:

        def answers(play_one: Callable[[int], object], number: int) -> list[object]:
            wanted = os.environ.get("SGPO_SIM_SEED")
            if wanted is not None:
                return [play_one(int(wanted))]
            return list(pool.map(play_one, range(number), chunksize=CHUNK))

        yield answers
        pool.shutdown(cancel_futures=True)


@pytest.mark.simulation
@pytest.mark.timeout(600)
@pytest.mark.fault(1, 2, 3, 6, 9, 11, 17, 18, 24, 26, 27, 30, invariants="I1 I2 I3 I4 I6")
def test_invariants_hold_in_every_schedule(every, capsys):
    counters = every(play_mixed, SCHEDULES)
    shares = {name: times / len(counters) for name, times in sum(counters, Counter()).most_common()}
    with capsys.disabled():
        print(f"\n{len(counters)} schedules:", ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    if len(counters) == SCHEDULES:
        assert not {name: shares.get(name, 0.0) for name, least in SHARES.items() if shares.get(name, 0.0) < least}


@pytest.mark.simulation
@pytest.mark.timeout(600)
@pytest.mark.fault(3, 6, 18, invariants="I4")
def test_the_staleness_bound_holds_under_frequent_faults(every):
    counters = every(play_rough, ROUGH_SCHEDULES)
    total = sum(counters, Counter())
    if len(counters) == ROUGH_SCHEDULES:
        assert total["held: IN_FLIGHT"] > 0.2 * ROUGH_SCHEDULES
        assert total["put too late"] > 0.02 * ROUGH_SCHEDULES


@pytest.mark.simulation
@pytest.mark.timeout(600)
@pytest.mark.fault(1, 2, 6, 11, invariants="I5")
def test_synchronous_batches_do_not_depend_on_faults_or_workers(every):
    assert all(every(play_twice, SYNCHRONOUS_SCHEDULES)), "the batches differ"


@pytest.mark.simulation
@pytest.mark.fault(24, invariants="I6")
def test_a_poison_prompt_is_refused_and_its_neighbours_are_not():
    for seed in range(30):
        settings = Settings(
            prompts=12, samples=1, epochs=1, batch=2, interval=1, staleness=1, max_pairs=None, steps=6,
            workers=2, concurrency=4, poison=frozenset({"p1"}),
        )  # fmt: skip
        world = play("test_a_poison", settings, seed)
        assert world.exhausted  # 11 pairs fill five batches of two
        assert world.step == 5
        assert max(world.granted.values()) == 5
