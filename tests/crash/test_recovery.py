"""Learners that are lost, and steps that are skipped, in whole runs with hand-written parts around the real story, buffer and checkpoints.

The learner's weights are a digest of all that it was trained on, in order; a pair's text holds the digest of the weights that made it. So
two runs end in the same digest only when the same pairs were made by the same weights and trained in the same steps.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from learner.group import ROLE
from sgpo_dist.buffer.audit import audit_run
from sgpo_dist.buffer.service import PairBuffer
from sgpo_dist.checkpoint import CheckpointStore
from sgpo_dist.config import build_config
from sgpo_dist.data.loading import Corpus
from sgpo_dist.errors import RunFailed, SgpoError, WorkerFault
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Refusal, Stage
from sgpo_dist.recovery import LEARNER, version_to_go_on_with
from sgpo_dist.roles import GenerationTask, LearnerStage, Lease, WorkerStats
from sgpo_dist.run import FINISHED, Progress, Run
from sgpo_dist.story import train
from sgpo_dist.weights.version import WeightBundle, WeightProof

SFT_STEPS, STEPS, BATCH, SAVE_STEPS = 3, 6, 2, 2
WORKER = "w1"


# ---- parts ------------------------------------------------------------------------------------------------------------------------


class Book:
    """One id a letter."""

    def policy_ids(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(map(ord, prompt.text))

    def completion_ids(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


@dataclass
class FakeLearner:
    """Dies at calls that ``faults`` names by method and how often it was called by then; ``bad`` are (stage, step) that it skips."""

    faults: set[tuple[str, int]] = field(default_factory=set)
    bad: dict[tuple[str, int], str] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    stage: LearnerStage | None = None
    weights: str = ""
    step: int = 0

    def _called(self, method: str) -> None:
        self.calls[method] += 1
        if (method, self.calls[method]) in self.faults:
            self.stage = None
            raise WorkerFault(LEARNER, f"{method} failed: its process died")
        assert self.stage is not None or method == "begin_stage", f"{method} was asked of a learner that is lost"

    async def begin_stage(self, stage: LearnerStage) -> None:
        self._called("begin_stage")
        model = Path(stage.model_dir) / "weights"
        self.stage, self.step = stage, 0
        self.weights = model.read_text() if model.exists() else "initial"

    def _trained(self, method: str, step: int, batch: Sequence[Any]) -> dict[str, float]:
        self._called(method)
        assert step == self.step + 1, f"step {step} was asked for after step {self.step}"
        self.step = step
        assert self.stage is not None
        bad = self.bad.get((self.stage.stage.value, step), "")
        if not bad:
            self.weights = hashlib.sha256((self.weights + repr(batch)).encode()).hexdigest()
        numbers = {"loss": math.nan if bad == "loss" else 0.5, "grad_norm": math.inf if bad else 1.0, "rewards/chosen": math.nan if bad else 0.0}
        return numbers | {"rewards/rejected": numbers["rewards/chosen"], "step/skipped": float(bool(bad))}

    async def nll_step(self, step: int, batch: Sequence[Any]) -> dict[str, float]:
        return self._trained("nll_step", step, batch)

    async def preference_step(self, step: int, batch: Sequence[PreferencePair], replay: Sequence[Any] = ()) -> dict[str, float]:
        return self._trained("preference_step", step, [(pair.uid, pair.chosen.text) for pair in batch])

    async def publish(self, version: int) -> WeightBundle:
        self._called("publish")
        return WeightBundle(version, "shm", "", "node", self.weights, 0, (), ((-1.0,),))

    async def retire(self, version: int) -> None:
        self._called("retire")

    async def save(self, directory: str) -> None:
        self._called("save")
        Path(directory).mkdir()
        (Path(directory) / "state").write_text(f"{self.step} {self.weights}")

    async def load(self, directory: str) -> None:
        self._called("load")
        step, self.weights = (Path(directory) / "state").read_text().split()
        self.step = int(step)

    async def export(self, directory: str) -> None:
        self._called("export")
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "weights").write_text(self.weights)


@dataclass
class FakeFleet:
    """One worker: leases, makes pairs that name its weights, and is told of versions that only go up."""

    buffer: PairBuffer
    versions: list[int] = field(default_factory=list)
    weights: str = ""
    task: GenerationTask | None = None
    begun: int = 0
    loop: asyncio.Task[None] | None = None

    async def publish(self, bundle: WeightBundle) -> list[WeightProof]:
        assert bundle.version > (self.versions or [-1])[-1], f"version {bundle.version} came after {self.versions}"
        self.versions.append(bundle.version)
        self.weights = bundle.checksum
        return [WeightProof(WORKER, bundle.version, bundle.checksum, ((-1.0,),), 0.0, 0.0)]

    async def stats(self) -> list[WorkerStats]:
        return []

    async def begin(self, task: GenerationTask) -> None:
        if task is self.task:
            return
        await self.end()
        self.task, self.begun = task, self.begun + 1
        self.loop = asyncio.create_task(self._generate(task))

    async def end(self) -> None:
        self.task = None
        loop, self.loop = self.loop, None
        if loop is not None:
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)

    async def supervise(self) -> None:
        while True:
            await asyncio.sleep(0.01)
            if self.loop is not None and self.loop.done():
                self.loop.result()

    async def _generate(self, task: GenerationTask) -> None:
        while True:
            for lease in (await self.buffer.lease(task.incarnation, WORKER, task.stage, 4)).leases:
                await self.buffer.put(task.incarnation, WORKER, [self._outcome(lease)])
            await asyncio.sleep(0.002)

    def _outcome(self, lease: Lease) -> PreferencePair | Refusal:
        response = Completion("a bad answer", (1, 2), FinishReason.STOP, self.versions[-1])
        refinement = replace(response, text=f"a good answer by {self.weights}")
        return PreferencePair(lease.uid, lease.stage, lease.prompt, (3,), response, refinement, "v1")


class FakeRecorder:
    """Keeps what it is told; events also as the auditor reads them."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "events.jsonl"
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.messages: list[str] = []
        self.rows: list[tuple[str, int, dict[str, float]]] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))
        with self._file.open("a") as lines:
            lines.write(json.dumps({"kind": kind, **fields}) + "\n")

    def message(self, text: str) -> None:
        self.messages.append(text)

    def status(self, **fields: Any) -> None:
        pass

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        self.rows.append((stage, step, dict(metrics)))

    def kinds(self, *wanted: str) -> list[str]:
        return [kind for kind, _ in self.events if kind in wanted]


@dataclass
class Played:
    """What is left of a run."""

    run: Run
    learner: FakeLearner
    fleet: FakeFleet
    recorder: FakeRecorder
    failure: SgpoError | None

    @property
    def final(self) -> str:
        return (self.run.last_model() / "weights").read_text()


def a_config(staleness: int, interval: int, **learner: Any) -> Any:
    tree = {
        "stages": ["sft", "preference"],
        "sft": {"train_batch_size": 2, "epochs": 1},
        "preference": {"total_steps": STEPS, "max_staleness": staleness},
        "learner": {"train_batch_size": BATCH, **learner},
        "weights": {"weight_sync_interval": interval},
        "checkpoint": {"save_steps": SAVE_STEPS},
        "eval": {"enabled": False},
    }
    return build_config(tree)


def play(directory: Path, learner: FakeLearner | None = None, staleness: int = 0, interval: int = 1, **settings: Any) -> Played:
    """A run from its beginning to its end, whatever that is."""
    return asyncio.run(_play(directory, learner or FakeLearner(), a_config(staleness, interval, **settings)))


async def _play(directory: Path, learner: FakeLearner, config: Any) -> Played:
    directory.mkdir()
    references = tuple(Prompt(f"r{n}", (Message("user", f"ask {n}"),), f"answer {n}") for n in range(2 * SFT_STEPS))
    prompts = tuple(Prompt(f"p{n}", (Message("user", f"question {n}"),)) for n in range(40))
    buffer = PairBuffer(directory / "buffer.db", synchronous="OFF", tick_s=0.02, group_wait_s=0.001)
    fleet, recorder = FakeFleet(buffer), FakeRecorder(directory)
    store = CheckpointStore(directory / "checkpoints", run_id="0" * 32)
    parts: dict[str, Any] = {"book": Book(), "buffer": buffer, "fleet": fleet, "learner": learner, "recorder": recorder, "store": store}
    run = Run(
        config=config,
        directory=directory,
        initial_model=directory / "none",
        corpus=Corpus(references, prompts, ()),
        incarnation=await buffer.begin_incarnation(),
        progress=Progress("sft"),
        tolerance=0.01,
        **parts,
    )
    failure = None
    try:
        await asyncio.wait_for(train(run), 30)
    except SgpoError as problem:
        failure = problem
    finally:
        await fleet.end()
        await buffer.close()
    return Played(run, learner, fleet, recorder, failure)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Played:
    played = play(tmp_path_factory.mktemp("runs") / "whole")
    assert played.failure is None
    assert played.fleet.versions == [0, 1, 2, 3, 4, 5, 6, 7]  # the initial model, sft's, one a step
    assert played.learner.calls["save"] == 4  # step 2 of sft, 2, 4 and 6 of preference
    return played


# ---- a learner that is lost --------------------------------------------------------------------------------------------------------

ONE_LOSS = [
    [("begin_stage", 1)],  # before there is anything
    [("publish", 1)],  # version 0
    [("nll_step", 2)],
    [("export", 1)],  # sft is done but for its model
    [("retire", 2)],  # sft's version is on the workers, but the driver hears of a loss
    [("begin_stage", 2)],  # between stages
    [("preference_step", 1)],
    [("preference_step", 4)],
    [("publish", 5)],  # the workers wait for the version of step 3
    [("retire", 5)],  # and this time they have it already, with no new batch recorded
    [("save", 3)],  # in the checkpoint of step 4
    [("preference_step", 6)],
    [("export", 2)],  # all steps are done and saved
]
TWO_LOSSES = [
    [("preference_step", 4), ("begin_stage", 3)],  # the new one dies at its start
    [("preference_step", 4), ("load", 1)],
    [("preference_step", 4), ("preference_step", 5)],  # again on the way back
    [("retire", 5), ("preference_step", 4)],
    [("preference_step", 2), ("preference_step", 6)],  # with a checkpoint in between
]


@pytest.mark.parametrize("faults", ONE_LOSS + TWO_LOSSES, ids=lambda faults: "-".join(f"{method}{count}" for method, count in faults))
@pytest.mark.fault(6, invariants="I2 I5")
def test_a_lost_learner_changes_nothing_in_the_end(undisturbed: Played, tmp_path: Path, faults: list[tuple[str, int]]) -> None:
    played = play(tmp_path / "run", FakeLearner(set(faults)))
    assert played.failure is None
    assert played.run.progress.stage == FINISHED
    assert played.final == undisturbed.final
    assert played.run.progress.global_step == SFT_STEPS + STEPS
    assert played.fleet.versions == undisturbed.fleet.versions  # none left out, none sent twice
    assert played.fleet.begun == 1 + (faults == [("export", 2)])  # the worker kept its task, if it still had one
    lost = played.recorder.kinds("learner_lost")
    assert (len(lost), played.recorder.events[-1][0]) == (len(faults), "checkpoint")
    assert played.recorder.kinds("learner_lost", "learner_rebuilt")[-1] == "learner_rebuilt"
    assert audit_run(played.run.directory).problems == ()


@pytest.mark.parametrize(("staleness", "interval"), [(0, 2), (1, 1), (2, 3)])
@pytest.mark.parametrize("faults", [("preference_step", 4), ("retire", 4), ("save", 3)], ids=str)
@pytest.mark.fault(6, invariants="I4 I6")
def test_staleness_bound_and_books_hold_when_the_learner_is_lost(tmp_path: Path, staleness: int, interval: int, faults: tuple[str, int]) -> None:
    """With an interval of 3 the checkpoints of steps 2 and 4 lie before and after a published version."""
    played = play(tmp_path / "run", FakeLearner({faults}), staleness, interval)
    assert played.failure is None
    assert played.learner.calls["begin_stage"] == 3 or faults[1] > played.learner.calls[faults[0]]
    report = audit_run(played.run.directory)
    assert report.problems == ()
    (row,) = report.stages
    assert (row.steps, row.trained, row.assigned) == (STEPS, STEPS * BATCH, 0)
    assert row.staleness_seen <= staleness


def test_more_losses_than_allowed_without_a_checkpoint_end_the_run(tmp_path: Path) -> None:
    faults = {("preference_step", 3), ("preference_step", 4), ("preference_step", 5)}
    played = play(tmp_path / "run", FakeLearner(faults), max_restarts=2)
    assert isinstance(played.failure, RunFailed)
    assert str(played.failure).startswith("the learner was lost 3 times without a checkpoint in between (learner.max_restarts 2); the last time: ")
    assert "run the same command to go on" in str(played.failure)


def test_a_checkpoint_in_between_pays_the_losses_back(tmp_path: Path) -> None:
    faults = {("preference_step", 1), ("preference_step", 4), ("preference_step", 7)}  # in steps 1, 3 and 5
    assert play(tmp_path / "run", FakeLearner(faults), max_restarts=1).failure is None


def test_other_roles_faults_end_the_run_as_they_are(tmp_path: Path) -> None:
    class FakeLearnerOfAnotherName(FakeLearner):
        async def nll_step(self, step: int, batch: Sequence[Any]) -> dict[str, float]:
            raise WorkerFault("pair buffer", "its process died")

    played = play(tmp_path / "run", FakeLearnerOfAnotherName())
    assert str(played.failure) == "pair buffer: its process died"
    assert played.recorder.kinds("learner_lost") == []


def test_a_damaged_checkpoint_is_passed_over_inside_the_stage_and_refused_before_it(undisturbed: Played, tmp_path: Path) -> None:
    class FakeLearnerWithDamage(FakeLearner):
        """Its death takes some checkpoints with it."""

        damage: Sequence[str] = ()

        def _called(self, method: str) -> None:
            if (method, self.calls[method] + 1) in self.faults:
                for name in self.damage:
                    (tmp_path / self.place / "checkpoints" / name / "buffer.db").write_text("torn")
            super()._called(method)

        place = ""

    def with_damage(place: str, faults: set[tuple[str, int]], *damage: str) -> Played:
        learner = FakeLearnerWithDamage(faults)
        learner.damage, learner.place = damage, place
        return play(tmp_path / place, learner)

    inside = with_damage("inside", {("preference_step", 5)}, "step-7")  # sft has 3 steps: steps 2 and 4 of preference are 5 and 7
    assert inside.failure is None
    assert inside.final == undisturbed.final
    assert inside.learner.calls["preference_step"] == 4 + 1 + 4  # back to step 2
    before = with_damage("before", {("preference_step", 1)}, "step-3")
    assert "newest intact checkpoint is of stage sft, not preference; run the same command" in str(before.failure)


@pytest.mark.parametrize(
    ("published", "published_step", "saved_version", "saved_step", "expected"),
    [
        (-1, -1, 0, 0, 0),  # nothing was ever sent: entering the stage will
        (5, 10, 5, 10, 5),  # the workers hold the checkpoint's weights
        (8, 13, 5, 10, 5),  # they hold a later step's: the learner walks there again
        (7, 10, 5, 10, 8),  # they hold what no later step makes: a separate improver's
    ],
)
def test_the_version_to_go_on_with(
    undisturbed: Played, published: int, published_step: int, saved_version: int, saved_step: int, expected: int
) -> None:
    run = replace(undisturbed.run, published=published, published_step=published_step)
    assert version_to_go_on_with(run, Progress("preference", 4, saved_step, saved_version)) == expected


def test_the_learner_and_the_recovery_call_the_role_the_same() -> None:
    assert ROLE == LEARNER


# ---- a step that is skipped --------------------------------------------------------------------------------------------------------


@pytest.mark.fault(23, invariants="I5 I9")
def test_a_skipped_step_is_written_down_and_the_run_goes_on(undisturbed: Played, tmp_path: Path) -> None:
    played = play(tmp_path / "run", FakeLearner(bad={("sft", 2): "grad_norm", ("preference", 3): "loss"}), max_bad_steps=1)
    assert played.failure is None
    assert played.final != undisturbed.final
    files = sorted((played.run.directory / "quarantine").iterdir())
    assert [file.name for file in files] == ["preference-step-3.json", "sft-step-2.json"]
    pairs, rows = (json.loads(file.read_text()) for file in files)
    assert (pairs["reason"], rows["reason"]) == ("loss was nan", "grad_norm was inf")
    assert (pairs["metrics"]["loss"], pairs["metrics"]["step/skipped"]) == ("nan", 1.0)
    assert [row["prompt_id"] for row in pairs["rows"]] == ["p4", "p5"]  # synchronous: steps take the prompts in order
    assert pairs["rows"][0]["rejected"] == "a bad answer"
    assert pairs["rows"][0]["rejected_ids"] == [1, 2]
    assert {row["completion"] for row in rows["rows"]} <= {f"answer {n}" for n in range(6)}
    assert played.recorder.kinds("bad_step", "brake") == ["bad_step", "bad_step"]  # the brakes do not look at a skipped step
    assert any("preference was skipped: loss was nan; its batch is in" in message for message in played.recorder.messages)
    assert [metrics["step/skipped"] for stage, _, metrics in played.recorder.rows if stage == "preference"] == [0, 0, 1, 0, 0, 0]
    (row,) = audit_run(played.run.directory).stages
    assert row.trained == STEPS * BATCH  # its pairs count as used


@pytest.mark.fault(23, invariants="I9")
def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    bad = {("preference", step): "loss" for step in (1, 3, 4, 5)}
    played = play(tmp_path / "run", FakeLearner(bad=bad), max_bad_steps=2)
    assert isinstance(played.failure, RunFailed)
    text = str(played.failure)
    assert text.startswith("3 steps in a row were skipped (learner.max_bad_steps 2), the last because loss was nan; look at ")
    assert "quarantine/preference-step-5.json, then start another run_name with a lower learning rate" in text
    assert (played.run.directory / "quarantine" / "preference-step-5.json").is_file()


def test_batches_after_a_loss_are_the_recorded_ones(tmp_path: Path) -> None:
    """Asynchronous: pairs made meanwhile must not take the places of those that a lost step had."""
    played = play(tmp_path / "run", FakeLearner({("preference_step", 4)}), staleness=2)
    rows = [(step, metrics["staleness"]) for stage, step, metrics in played.recorder.rows if stage == Stage.PREFERENCE]
    assert [step for step, _ in rows] == [1, 2, 3, 3, 4, 5, 6]
    assert rows[2] == rows[3]
