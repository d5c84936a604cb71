"""A real learner under faults: steps it has to skip, ranks that die or hang, and a whole run whose learner is killed half-way.

Ranks are real DeepSpeed on a tiny random Llama, in this process or as Ray actors; the whole run is the command line on the embedded model.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file

from learner.group import GroupSpec, LearnerGroup
from learner.learner import LearnerRank, RankSpec
from sgpo_dist.config import LearnerConfig, ModelConfig
from sgpo_dist.errors import WorkerFault
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Stage, TokenExample
from sgpo_dist.roles import LearnerStage, LossPlan, OptimiserPlan
from sgpo_dist.weights.version import ProbeRow

pytestmark = [pytest.mark.integration, pytest.mark.timeout(560)]

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples" / "smoke.yaml"
PROBES = (ProbeRow((1, 2, 3), (4, 5)),)


# ---- parts ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_rank(joined: None, tmp_path: Path) -> Iterator[Callable[..., LearnerRank]]:
    made: list[LearnerRank] = []

    def make(dtype: str, zero_stage: int) -> LearnerRank:
        settings = LearnerConfig(zero_stage=zero_stage, max_tokens_per_micro_batch=40, threads_per_rank=1)
        spec = RankSpec(0, 1, ModelConfig(dtype=dtype), settings, "shm", dtype, PROBES, f"fault{os.getpid()}", 0, str(tmp_path / "cache"), 1)
        made.append(LearnerRank(spec))
        return made[-1]

    yield make
    for rank in made:
        rank.release()


def nll_stage(model_dir: str, schedule: str = "constant") -> LearnerStage:
    return LearnerStage(Stage.SFT, model_dir, OptimiserPlan(1e-3, 4, warmup_ratio=0.0, schedule=schedule))


def preference_stage(model_dir: str, beta: float = 0.1) -> LearnerStage:
    plan = OptimiserPlan(1e-3, 4, warmup_ratio=0.0, schedule="constant")
    return LearnerStage(Stage.PREFERENCE, model_dir, plan, LossPlan(beta=beta), model_dir)


def tokens(draw: random.Random, count: int) -> tuple[int, ...]:
    return tuple(draw.randrange(1, 128) for _ in range(count))


def rows(step: int) -> list[TokenExample]:
    """Six rows: more than one micro-batch, and work for two ranks."""
    draw = random.Random(step)
    return [TokenExample(f"e{step}-{n}", tokens(draw, 3 + n), tokens(draw, 4 + n)) for n in range(6)]


def poisoned(batch: Sequence[TokenExample], weight: float) -> list[TokenExample]:
    """One row, and so one rank's share, makes the whole loss something that is not finite."""
    return [replace(row, weight=weight) if place == 1 else row for place, row in enumerate(batch)]


def pairs(step: int) -> list[PreferencePair]:
    draw = random.Random(step)
    prompt = Prompt("p", (Message("user", "x"),))
    halves = [Completion("", tokens(draw, 5), FinishReason.STOP, 0) for _ in range(8)]
    return [PreferencePair(f"u{step}-{n}", Stage.PREFERENCE, prompt, (7, 8), *halves[2 * n : 2 * n + 2], "v1") for n in range(4)]


KINDS = [("float32", 0), ("float32", 2), ("float32", 3), ("bfloat16", 0), ("bfloat16", 1), ("bfloat16", 2), ("bfloat16", 3)]


# ---- steps that are skipped --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "zero_stage", "weight"), [(*kind, math.nan) for kind in KINDS] + [("float32", 0, math.inf), ("bfloat16", 2, math.inf)]
)
@pytest.mark.fault(23, invariants="I5")
def test_a_loss_that_is_not_finite_leaves_weights_and_optimiser_as_they_are(
    make_rank: Callable[..., LearnerRank], model_dir: str, dtype: str, zero_stage: int, weight: float
) -> None:
    """Good, broken, good is good, good: to the bit."""
    sums = []
    for middle in ([poisoned(rows(2), weight)], []):
        rank = make_rank(dtype, zero_stage)
        rank.begin_stage(nll_stage(model_dir))
        batches = [rows(1), *middle, rows(3)]
        skipped = [rank.nll_step(step, batch)["step/skipped"] for step, batch in enumerate(batches, start=1)]
        assert skipped == [0.0, *[1.0] * len(middle), 0.0]
        sums.append(rank.publish(len(middle)).checksum)
        rank.release()
    assert sums[0] == sums[1]


@pytest.mark.parametrize(("dtype", "zero_stage"), [kind for kind in KINDS if kind[1] < 3])
@pytest.mark.fault(23, invariants="I5")
def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is(
    make_rank: Callable[..., LearnerRank], model_dir: str, dtype: str, zero_stage: int
) -> None:
    """Policy and reference are equal at the first step, so the loss is log 2 for any beta, and its gradient is proportional to beta.

    ZeRO-3 adds squares up without overflow: the same gradient has a finite norm there, and is clipped like any other.
    """
    rank = make_rank(dtype, zero_stage)
    rank.begin_stage(preference_stage(model_dir, beta=1e30))
    before = rank.publish(0).checksum
    metrics = rank.preference_step(1, pairs(1))
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert not math.isfinite(metrics["grad_norm"])
    assert metrics["step/skipped"] == 1.0
    assert rank.publish(1).checksum == before


@pytest.mark.parametrize(("dtype", "zero_stage"), [("float32", 0), ("float32", 2), ("bfloat16", 2)])
def test_a_skipped_step_moves_the_schedule_on(make_rank: Callable[..., LearnerRank], model_dir: str, dtype: str, zero_stage: int) -> None:
    rank = make_rank(dtype, zero_stage)
    rank.begin_stage(nll_stage(model_dir, "linear"))
    rates = [rank.nll_step(step, batch)["learning_rate"] for step, batch in enumerate([poisoned(rows(1), math.nan), rows(2), rows(3)], start=1)]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3])  # linear from 1e-3 to 0 in four steps


# ---- ranks that are lost -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()


def group_spec(tmp_path: Path, zero_stage: int, step_timeout_s: float = 100.0) -> GroupSpec:
    settings = LearnerConfig(
        num_ranks=2, zero_stage=zero_stage, threads_per_rank=1, max_tokens_per_micro_batch=40, step_timeout_s=step_timeout_s, train_batch_size=2
    )
    here = {"PYTHONPATH": str(ROOT)}
    return GroupSpec(ModelConfig(dtype="float32"), settings, "shm", "float32", PROBES, 0, str(tmp_path / "cache"), 0.5, here)


async def pids(group: LearnerGroup) -> list[int]:
    return [await rank.call.remote("process_id") for rank in group._ranks]


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("zero_stage", [0, pytest.param(2, marks=pytest.mark.chaos)])
@pytest.mark.fault(23, invariants="I5")
def test_two_ranks_skip_alike(cluster: None, model_dir: str, tmp_path: Path, zero_stage: int) -> None:
    async def story(name: str, batches: Sequence[list[TokenExample]]) -> list[float]:
        group = LearnerGroup(group_spec(tmp_path, zero_stage))
        await group.begin_stage(nll_stage(model_dir))
        found = [(await group.nll_step(step, batch))["step/skipped"] for step, batch in enumerate(batches, start=1)]
        await group.export(str(tmp_path / name))
        await group.stop()
        return found

    assert asyncio.run(story("with", [rows(1), poisoned(rows(2), math.nan), rows(3)])) == [0.0, 1.0, 0.0]
    assert asyncio.run(story("without", [rows(1), rows(3)])) == [0.0, 0.0]
    one, other = weights_of(tmp_path / "with"), weights_of(tmp_path / "without")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.chaos
@pytest.mark.fault(8, invariants="I5 I7")
def test_killed_and_hung_ranks_are_ended_and_replaced_by_the_next_stage(cluster: None, model_dir: str, tmp_path: Path) -> None:
    """SIGKILL is seen at once, SIGSTOP at the step's deadline. What the lost group published can still be read."""

    async def story() -> None:
        group = LearnerGroup(group_spec(tmp_path, 2, step_timeout_s=30.0))
        await group.begin_stage(preference_stage(model_dir))
        await group.preference_step(1, pairs(1))
        await group.save(str(tmp_path / "saved"))
        bundle = await group.publish(1)
        await group.preference_step(2, pairs(2))
        await group.export(str(tmp_path / "straight"))
        for number, name in ((signal.SIGKILL, "killed"), (signal.SIGSTOP, "hung")):
            before = await pids(group)
            os.kill(before[1], number)
            with pytest.raises(WorkerFault, match="learner: preference_step"):
                await group.preference_step(3, pairs(3))
            await group.begin_stage(preference_stage(model_dir))
            assert not set(before) & set(await pids(group))
            assert Path(bundle.uri).exists()
            await group.load(str(tmp_path / "saved"))
            await group.preference_step(2, pairs(2))
            await group.export(str(tmp_path / name))
            gone, _ = await asyncio.to_thread(psutil.wait_procs, [psutil.Process(pid) for pid in before if psutil.pid_exists(pid)], 20)
            assert not [pid for pid in before if psutil.pid_exists(pid)], gone
        os.kill((await pids(group))[0], signal.SIGKILL)
        with pytest.raises(WorkerFault):
            await group.retire(0)
        await group.stop()
        assert not Path(bundle.uri).exists()

    asyncio.run(story())
    straight = weights_of(tmp_path / "straight")
    for name in ("killed", "hung"):
        again = weights_of(tmp_path / name)
        assert all(torch.equal(again[key], straight[key]) for key in straight), name


# ---- a whole run -------------------------------------------------------------------------------------------------------------------


def command(name: str, output: Path) -> list[str]:
    return [sys.executable, "-m", "sgpo_dist", "train", "--config", str(CONFIG), f"run_name={name}", f"output_dir={output}"]


def weights_sha256(run: Path) -> str:
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def learner_of(driver: int) -> psutil.Process:
    """The rank's process, among those that the driver's own cluster started."""
    return next(child for child in psutil.Process(driver).children(recursive=True) if child.name().startswith("ray::RankHost"))


@pytest.mark.chaos
@pytest.mark.fault(6, invariants="I2 I3 I5")
def test_a_run_whose_learner_is_killed_ends_in_the_same_weights(tmp_path: Path) -> None:
    """Synchronous and float32. The learner dies after step 3, the last checkpoint is of step 2; nobody starts the command again."""
    whole = subprocess.run(command("whole", tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert whole.returncode == 0, whole.stdout[-3000:] + whole.stderr[-3000:]
    run = tmp_path / "killed"
    with (tmp_path / "killed.out").open("w") as out:
        driver = subprocess.Popen(command("killed", tmp_path), cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
        deadline = time.monotonic() + 250
        while len(lines(run / "metrics.jsonl")) < 3 and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        victim = learner_of(driver.pid)
        victim.send_signal(signal.SIGKILL)
        assert driver.wait(timeout=250) == 0, (tmp_path / "killed.out").read_text()[-3000:]
    assert weights_sha256(run) == weights_sha256(tmp_path / "whole")
    events = lines(run / "events.jsonl")
    kinds = [event["kind"] for event in events]
    assert (kinds.count("attempt"), kinds.count("learner_lost"), kinds.count("learner_rebuilt")) == (1, 1, 1)
    assert (kinds.count("worker_started"), kinds.count("worker_lost")) == (1, 0)
    assert [event["version"] for event in events if event["kind"] == "version_published"] == [0, 1, 2, 3, 4]  # version 3 was not sent again
    assert [event["step"] for event in events if event["kind"] == "learner_rebuilt"] == [2]
    assert [row["step"] for row in lines(run / "metrics.jsonl")] == [1, 2, 3, 3, 4]
    audit = subprocess.run([sys.executable, "-m", "sgpo_dist", "audit", str(run)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert audit.returncode == 0, audit.stdout + audit.stderr
