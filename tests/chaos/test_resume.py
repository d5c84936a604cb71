"""The driver is killed by SIGKILL at five places drawn from a seed and resumed each time: nothing about the result may tell.

Synchronous in float32 the weights are those of a run that was never killed, to the byte; asynchronously the outcomes are the same ones, token for
token, and every pair is in one step. Places: inside collecting, inside a step, at a named point of a checkpoint, and any moment twice.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from tiny_run import Runs, all_gone, make_inputs

from sgpo_dist.checkpoint import CRASH_POINTS

STEPS, BATCH, SAVE_STEPS, CONCURRENCY = 80, 4, 5, 4
LAST_TARGET = STEPS // 2
SEED = 20261125
POINTS = [point for point in CRASH_POINTS if point != "ckpt.old_moved"]  # that one only when a step is committed again
WORDS = [
    f"preference.total_steps={STEPS}",
    f"learner.train_batch_size={BATCH}",
    f"rollout.concurrency={CONCURRENCY}",
    f"checkpoint.save_steps={SAVE_STEPS}",
]
pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*make_inputs(tmp_path_factory.mktemp("inputs"), rows=6 * STEPS * BATCH), *WORDS]


@dataclass(frozen=True)
class Kill:
    """Where: the first moment of its kind after step ``after``; ``delay_s`` and ``point`` for the kinds that need them."""

    kind: str
    after: int
    delay_s: float
    point: str


def drawn(seed: int) -> list[Kill]:
    draw = random.Random(seed)
    kinds = draw.sample(["collecting", "step", "checkpoint", "anywhere", "anywhere"], 5)
    targets = sorted(draw.sample(range(1, LAST_TARGET), 5))
    points = [f"{draw.choice(POINTS)}:{draw.choice((1, 2))}" for _ in kinds]
    return [Kill(kind, after, draw.uniform(0.0, 0.5), point) for kind, after, point in zip(kinds, targets, points, strict=True)]


def play(runs: Runs, kill: Kill) -> float:
    """Start, kill there, and see that no role of it stays; seconds from the start to the first version."""
    began = time.time()
    driver = runs.start(**({"SGPO_CRASH_AT": kill.point} if kill.kind == "checkpoint" else {}))
    if kill.kind == "checkpoint":
        family = family_until_its_end(driver)
    else:
        runs.until(driver, lambda: published(runs, began) and runs.steps() >= kill.after and is_there(runs, kill.kind))
        time.sleep(kill.delay_s if kill.kind == "anywhere" else 0.0)
        family = stopped_family(driver)
        driver.kill()
    assert driver.wait(timeout=120) == -signal.SIGKILL, runs.last_words()
    print(f"killed: {kill}, after step {runs.steps()}")
    assert all_gone(family) == []
    return published(runs, began) - began


def family_until_its_end(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """All that a driver, which is to kill itself, was last seen with."""
    family: list[psutil.Process] = []
    while driver.poll() is None:
        with suppress(psutil.Error):
            family = psutil.Process(driver.pid).children(recursive=True) or family
        time.sleep(0.1)
    return family


def stopped_family(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Its processes, with the driver stopped meanwhile so that it stays where it is."""
    driver.send_signal(signal.SIGSTOP)
    return psutil.Process(driver.pid).children(recursive=True)


def published(runs: Runs, since: float) -> float:
    times = [row["time"] for row in runs.lines("events.jsonl") if row["kind"] == "version_published" and row["time"] >= since]
    return min(times, default=0.0)


def is_there(runs: Runs, kind: str) -> bool:
    """Inside collecting: some pairs of the next batch are there and some are not. Inside a step: its batch is recorded, its row is not."""
    if kind == "collecting":
        return 0 < len(runs.ask("SELECT 1 FROM orders WHERE state = 'ready'")) < BATCH
    if kind == "step":
        recorded = runs.ask("SELECT MAX(step) FROM journal")
        return bool(recorded) and (recorded[0][0] or 0) > runs.steps()
    return True


@pytest.mark.fault(11, invariants="I1 I2 I3 I5 I6 I7 I8")
@pytest.mark.fault(7, invariants="I5")
def test_killed_five_times_a_synchronous_run_ends_in_the_same_weights(inputs, tmp_path: Path, record_property) -> None:
    words = [*inputs, "preference.max_staleness=0"]
    whole, killed = Runs(tmp_path / "whole", words), Runs(tmp_path / "killed", words)
    whole.finish()
    starts = [play(killed, kill) for kill in drawn(SEED)]
    killed.finish()
    assert killed.sha256() == whole.sha256()
    assert journal(killed) == journal(whole)
    killed.audit()
    record_property("recovery_s:11", max(starts[1:]))


@pytest.mark.fault(11, invariants="I1 I2 I3 I4 I5 I6 I7")
def test_killed_five_times_an_asynchronous_run_has_the_same_outcomes(tmp_path: Path) -> None:
    """Which version answers a prompt depends on timing. With steps too small to move a weight all versions answer alike, and are still published,
    proved, counted and bounded: what differs from the whole run was lost, doubled or drawn from the wrong seed.
    """
    prompts = STEPS * BATCH
    inputs = make_inputs(tmp_path, rows=2 * prompts)  # half of the rows keep their references, for the stages before
    words = [*inputs, *WORDS, "preference.max_staleness=2", "preference.learning_rate=1e-30"]
    words += [f"preference.total_steps={2 * STEPS}"]  # so that both runs end when the prompts are used up
    whole, killed = Runs(tmp_path / "whole", words), Runs(tmp_path / "killed", words)
    whole.finish()
    for kill in drawn(SEED + 1):
        play(killed, kill)
    killed.finish()
    assert sum(outcomes(whole).values()) == prompts
    assert outcomes(killed) == outcomes(whole)
    trained = [uid for _, uids in journal(killed) for uid in uids]
    assert len(trained) == len(set(trained))
    assert {uid for (uid,) in killed.ask("SELECT uid FROM pairs")} - set(trained) == set(left_over(killed))
    killed.audit()


def outcomes(runs: Runs) -> Counter[tuple[object, ...]]:
    """What became of each prompt: its pair or its refusal, to the token, whoever made it at whatever version."""
    pairs = runs.ask("SELECT o.prompt_id, 'pair', response_ids, refinement_ids FROM pairs JOIN orders o USING (uid)")
    refusals = runs.ask("SELECT o.prompt_id, reason, response_ids, refinement_ids FROM refusals JOIN orders o USING (uid)")
    return Counter([*pairs, *refusals])


def left_over(runs: Runs) -> list[str]:
    """Pairs that are one batch short of a step when the prompts are used up."""
    found = [str(uid) for (uid,) in runs.ask("SELECT uid FROM orders WHERE state = 'ready'")]
    assert len(found) < BATCH
    return found


def journal(runs: Runs) -> list[tuple[int, list[str]]]:
    """The uids of each step, in the order in which they were trained."""
    return [(step, uids.split()) for step, uids in runs.ask("SELECT step, uids FROM journal ORDER BY step")]
