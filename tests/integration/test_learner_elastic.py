"""A learner's state goes on with another number of ranks, or in another ZeRO stage, as if nothing had changed. Real DeepSpeed ranks as Ray actors."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file

from learner.group import GroupSpec, LearnerGroup
from sgpo_dist.config import LearnerConfig, LoraConfig, ModelConfig
from sgpo_dist.errors import CheckpointError
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Stage
from sgpo_dist.roles import LearnerStage, LossPlan, OptimiserPlan

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()


def group(root: Path, ranks: int, zero_stage: int, lora: bool = False) -> LearnerGroup:
    settings = LearnerConfig(
        num_ranks=ranks, zero_stage=zero_stage, threads_per_rank=1, max_tokens_per_micro_batch=64, train_batch_size=6, weight_decay=0.1
    )
    model = ModelConfig(dtype="float32", lora=LoraConfig(enabled=lora, r=4, alpha=8))
    return LearnerGroup(GroupSpec(model, settings, "shm", "float32", (), 0, str(root / "cache"), 0.5, {"PYTHONPATH": str(ROOT)}))


def stage(model_dir: str) -> LearnerStage:
    """Large steps, and weight decay on matrices only: what is not restored shows at once."""
    plan = OptimiserPlan(1e-2, 4, warmup_ratio=0.0, schedule="cosine", weight_decay=0.1)
    return LearnerStage(Stage.PREFERENCE, model_dir, plan, LossPlan(), model_dir)


def pairs(step: int) -> list[PreferencePair]:
    """Five, of unequal lengths: two ranks never have the same share."""
    draw = random.Random(step)

    def some(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1, 256) for _ in range(count))

    def half(count: int) -> Completion:
        return Completion("", some(count), FinishReason.STOP, 0)

    prompt = Prompt("p", (Message("user", "x"),))
    return [PreferencePair(f"u{step}-{n}", Stage.PREFERENCE, prompt, some(3 + n), half(9 - n), half(4 + n), "v1") for n in range(5)]


async def steps(learner: LearnerGroup, first: int, last: int) -> list[float]:
    return [(await learner.preference_step(step, pairs(step)))["loss"] for step in range(first, last + 1)]


async def resumed(learner: LearnerGroup, model_dir: str, source: Path, target: Path) -> list[float]:
    """Steps 3 and 4 from what was saved after step 2."""
    await learner.begin_stage(stage(model_dir))
    await learner.load(str(source))
    losses = await steps(learner, 3, 4)
    await learner.export(str(target))
    return losses


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=TOLERANCE, rtol=0.0, msg=name)


def digests(directory: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("zero_stage", "lora"), [(0, False), (1, False), (2, False), (3, False), (2, True)])
def test_another_number_of_ranks_goes_on_alike(cluster: None, model_dir: str, tmp_path: Path, zero_stage: int, lora: bool) -> None:
    saved = {ranks: tmp_path / "checkpoints" / f"step-{ranks}" / "learner" for ranks in (1, 2)}

    async def story() -> list[list[float]]:
        two, one = group(tmp_path, 2, zero_stage, lora), group(tmp_path, 1, zero_stage, lora)
        straight = []
        for ranks, learner in ((2, two), (1, one)):
            await learner.begin_stage(stage(model_dir))
            await steps(learner, 1, 2)
            await learner.save(str(saved[ranks]))
            straight.append(await steps(learner, 3, 4))
            await learner.export(str(tmp_path / f"straight-{ranks}"))
        before = digests(tmp_path / "checkpoints")
        found = [await resumed(one, model_dir, saved[2], tmp_path / "2to1"), await resumed(two, model_dir, saved[1], tmp_path / "1to2")]
        assert digests(tmp_path / "checkpoints") == before  # read only, and nothing is left beside it
        await asyncio.gather(one.stop(), two.stop())
        return [*straight, *found]

    by_two, by_one, two_to_one, one_to_two = asyncio.run(story())
    assert two_to_one == pytest.approx(by_two, abs=TOLERANCE)
    assert one_to_two == pytest.approx(by_one, abs=TOLERANCE)
    assert_same_weights(tmp_path / "2to1", tmp_path / "straight-2")
    assert_same_weights(tmp_path / "1to2", tmp_path / "straight-1")


def test_another_zero_stage_goes_on_alike_or_is_refused(cluster: None, model_dir: str, tmp_path: Path) -> None:
    saved = tmp_path / "checkpoints" / "step-2" / "learner"

    async def story() -> list[list[float]]:
        before = group(tmp_path, 1, 1)
        await before.begin_stage(stage(model_dir))
        await steps(before, 1, 2)
        await before.save(str(saved))
        found = [await steps(before, 3, 4)]
        await before.stop()
        after = group(tmp_path, 2, 2)
        found.append(await resumed(after, model_dir, saved, tmp_path / "after"))
        await after.stop()
        other = group(tmp_path, 1, 0)
        with pytest.raises(CheckpointError, match="zero_stage 1, this run has 0; set it back"):
            await resumed(other, model_dir, saved, tmp_path / "other")
        await other.stop()
        return found

    straight, changed = asyncio.run(story())
    assert changed == pytest.approx(straight, abs=TOLERANCE)
