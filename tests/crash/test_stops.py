"""Stops at any moment of whole runs, with the hand-written parts of ``test_recovery`` around the real story, buffer and checkpoints.

A run that was stopped and resumed must end in the digest of one that was not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from test_recovery import BATCH, SFT_STEPS, STEPS, Book, FakeFleet, FakeLearner, FakeRecorder, Played, a_config, play

from sgpo_dist.buffer.audit import audit_run
from sgpo_dist.buffer.service import PairBuffer
from sgpo_dist.checkpoint import CheckpointStore
from sgpo_dist.config import build_config
from sgpo_dist.data.loading import Corpus
from sgpo_dist.errors import StoppedOnRequest
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Refusal, RefusalReason, Stage
from sgpo_dist.roles import GenerateRequest, GenerationTask, LearnerStage, Lease
from sgpo_dist.run import FINISHED, Progress, Run, StopRequest
from sgpo_dist.story import train

LIMIT_S = 5.0
"""From a stop to the end of a run whose every wait would last for ever."""


# ---- parts ------------------------------------------------------------------------------------------------------------------------


@dataclass
class AskingLearner(FakeLearner):
    """Somebody asks for a stop while it is in the call that ``ask_at`` names by method and how often it was called by then."""

    ask_at: tuple[str, int] = ("", 0)
    stop: StopRequest = field(default_factory=StopRequest)

    def _called(self, method: str) -> None:
        super()._called(method)
        if (method, self.calls[method]) == self.ask_at:
            self.stop.ask("a test")

    async def nll_step(self, step: int, batch: Sequence[Any]) -> dict[str, float]:
        metrics = await super().nll_step(step, batch)
        await asyncio.sleep(0)  # a learner elsewhere always takes a while
        return metrics

    async def export(self, directory: str) -> None:
        await super().export(directory)
        await asyncio.sleep(0)


@dataclass
class HungLearner(AskingLearner):
    """Its second start never ends, and somebody asks for a stop meanwhile."""

    async def begin_stage(self, stage: LearnerStage) -> None:
        if self.calls["begin_stage"] == 2 and self.calls["load"] == 0:
            self.stop.ask("a test")
            await asyncio.Event().wait()
        await super().begin_stage(stage)


@dataclass
class SilentFleet(FakeFleet):
    """Makes ``limit`` pairs and no more; what is asked of it directly is never answered. Both are counted."""

    limit: int = 0
    made: int = 0
    asked: int = 0

    async def _generate(self, task: GenerationTask) -> None:
        for lease in (await self.buffer.lease(task.incarnation, "w1", task.stage, self.limit)).leases:
            answer = Completion("bad", (1, 2), FinishReason.STOP, self.versions[-1])
            better = Completion("good", (1, 2), FinishReason.STOP, self.versions[-1])
            await self.buffer.put(task.incarnation, "w1", [PreferencePair(lease.uid, lease.stage, lease.prompt, (3,), answer, better, "v1")])
            self.made += 1
        await asyncio.Event().wait()

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self.asked += 1
        await asyncio.Event().wait()
        return []


@dataclass
class CheckedFleet(FakeFleet):
    """Answers held-out requests, and remembers the weights that it did it with."""

    checked: list[str] = field(default_factory=list)

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self.checked.append(self.weights)
        return [Completion("x", (1,), FinishReason.STOP, self.versions[-1]) for _ in requests]


class BothRolesBook(Book):
    """One id a letter, in both roles."""

    def improver_ids(self, prompt: Prompt, draft: str) -> tuple[int, ...]:
        return tuple(map(ord, prompt.text + draft))


def attempt(
    directory: Path,
    learner: AskingLearner,
    config: Any,
    fleet_type: Callable[[PairBuffer], Any] = FakeFleet,
    ask_when: Callable[[Run], bool] = lambda _: False,
) -> Played:
    """One driver's attempt at the run in ``directory``, from its newest checkpoint."""
    return asyncio.run(_attempt(directory, learner, config, fleet_type, ask_when))


async def _attempt(
    directory: Path, learner: AskingLearner, config: Any, fleet_type: Callable[[PairBuffer], Any], ask_when: Callable[[Run], bool]
) -> Played:
    directory.mkdir(exist_ok=True)
    references = tuple(Prompt(f"r{n}", (Message("user", f"ask {n}"),), f"answer {n}") for n in range(2 * SFT_STEPS))
    prompts = tuple(Prompt(f"p{n}", (Message("user", f"question {n}"),)) for n in range(40))
    buffer = PairBuffer(directory / "buffer.db", synchronous="OFF", tick_s=0.02, group_wait_s=0.001)
    store = CheckpointStore(directory / "checkpoints", run_id="0" * 32)
    found, fleet, recorder = store.latest(), fleet_type(buffer), FakeRecorder(directory)
    parts: dict[str, Any] = {"book": BothRolesBook(), "buffer": buffer, "fleet": fleet, "learner": learner, "recorder": recorder, "store": store}
    run = Run(
        config=config,
        directory=directory,
        initial_model=directory / "none",
        corpus=Corpus(references, prompts, prompts[-2:]),
        incarnation=await buffer.begin_incarnation(),
        progress=Progress.from_facts(found.facts) if found else Progress(config.stages[0]),
        tolerance=0.01,
        restored_from=found.path if found else None,
        stop=learner.stop,
        **parts,
    )
    failure = None
    asking = asyncio.create_task(_ask(run, ask_when))
    try:
        async with asyncio.timeout(LIMIT_S):
            await train(run)
    except StoppedOnRequest as problem:
        failure = problem
    finally:
        asking.cancel()
        await fleet.end()
        await buffer.close()
    return Played(run, learner, fleet, recorder, failure)


async def _ask(run: Run, when: Callable[[Run], bool]) -> None:
    while not when(run):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)  # by now it waits
    run.stop.ask("a test")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Played:
    return play(tmp_path_factory.mktemp("runs") / "whole")


# ---- a stop at any call of the learner ---------------------------------------------------------------------------------------------

ANY_MOMENT = [
    (("begin_stage", 1), Progress("sft", 0)),  # there is nothing to keep yet
    (("publish", 1), Progress("sft", 0)),
    (("nll_step", 1), Progress("sft", 1)),  # the step in progress ends, and is kept
    (("nll_step", 2), Progress("sft", 2)),
    (("export", 1), Progress("sft", 3)),  # no checkpoint was due after sft's third step
    (("begin_stage", 2), Progress("preference", 0)),
    (("preference_step", 1), Progress("preference", 1)),
    (("publish", 4), Progress("preference", 2)),  # a publication in progress ends
    (("save", 3), Progress("preference", 4)),
    (("export", 2), Progress("preference", 6)),
]


@pytest.mark.parametrize(("moment", "kept"), ANY_MOMENT, ids=lambda value: f"{value[0]}{value[1]}" if isinstance(value, tuple) else "")
@pytest.mark.fault(11, invariants="I2 I5 I6")
def test_a_stop_keeps_every_step_and_the_resumed_run_ends_the_same(
    undisturbed: Played, tmp_path: Path, moment: tuple[str, int], kept: Progress
) -> None:
    config = a_config(0, 1)
    stopped = attempt(tmp_path / "run", AskingLearner(ask_at=moment), config)
    assert isinstance(stopped.failure, StoppedOnRequest)
    step, stage = kept.step, kept.stage
    where = f"after step {step} of stage {stage}" if step else f"in stage {stage}, before its first step"
    assert str(stopped.failure) == f"stopped by a test {where}; run the same command to go on"
    found = stopped.run.store.latest()
    assert (found and (found.facts["stage"], found.facts["step"])) == ((stage, step) if (stage, step) != ("sft", 0) else None)
    steps = len(stopped.recorder.rows)
    resumed = attempt(tmp_path / "run", AskingLearner(), config)
    assert (resumed.failure, resumed.run.progress.stage) == (None, FINISHED)
    assert steps + len(resumed.recorder.rows) == SFT_STEPS + STEPS  # no step was done twice
    assert resumed.final == undisturbed.final
    assert audit_run(resumed.run.directory).problems == ()


def test_a_step_is_not_saved_twice(tmp_path: Path) -> None:
    """Step 2 of sft is due for a checkpoint by itself."""
    assert attempt(tmp_path / "run", AskingLearner(ask_at=("nll_step", 2)), a_config(0, 1)).learner.calls["save"] == 1


def test_a_stop_while_a_lost_learner_is_rebuilt_saves_nothing_of_it(undisturbed: Played, tmp_path: Path) -> None:
    """Lost in step 4, after a checkpoint of step 2 and a third step; the stop comes while the new one starts."""
    config = a_config(0, 1)
    stopped = attempt(tmp_path / "run", HungLearner({("preference_step", 4)}), config)
    assert isinstance(stopped.failure, StoppedOnRequest)
    found = stopped.run.store.latest()
    assert found is not None
    assert (found.facts["stage"], found.facts["step"]) == ("preference", 2)
    assert attempt(tmp_path / "run", AskingLearner(), config).final == undisturbed.final


# ---- a stop in waits that would last for ever --------------------------------------------------------------------------------------


def test_a_stop_while_the_learner_waits_for_pairs(tmp_path: Path) -> None:
    stopped = attempt(
        tmp_path / "run",
        AskingLearner(),
        a_config(2, 1),
        lambda buffer: SilentFleet(buffer, limit=BATCH),
        lambda run: (run.progress.stage, run.progress.step) == ("preference", 1),
    )
    assert str(stopped.failure) == "stopped by a test after step 1 of stage preference; run the same command to go on"
    found = stopped.run.store.latest()
    assert found is not None
    assert (found.facts["stage"], found.facts["step"]) == ("preference", 1)


def test_a_stop_while_all_pairs_are_made_first_keeps_those_that_are_there(tmp_path: Path) -> None:
    config = build_config(a_config(0, 1).model_dump() | {"preference": {"total_steps": STEPS, "collect": "first"}})
    stopped = attempt(
        tmp_path / "run", AskingLearner(), config, lambda buffer: SilentFleet(buffer, limit=3), lambda run: cast("Any", run.fleet).made == 3
    )
    assert str(stopped.failure) == "stopped by a test in stage preference, before its first step; run the same command to go on"
    resumed = attempt(tmp_path / "run", AskingLearner(), config)
    assert resumed.failure is None

    async def texts() -> list[str]:
        buffer = PairBuffer(tmp_path / "run" / "buffer.db")
        pairs = await buffer.pairs(Stage.PREFERENCE)
        await buffer.close()
        return [pair.chosen.text for pair in pairs]

    made = asyncio.run(texts())
    assert made[:3] == ["good"] * 3  # by the silent fleet
    assert len(made) == STEPS * BATCH


@pytest.mark.parametrize("stage", ["initial", "sft"])
def test_a_stop_cuts_a_held_out_evaluation_short(tmp_path: Path, stage: str) -> None:
    config = build_config(a_config(0, 1).model_dump() | {"eval": {"enabled": True}})
    if stage == "sft":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "evaluation.json").write_text(
            '{"rows": [{"model": "initial", "source": "", "n": 0, "figures": {}, "per_prompt": {}, "samples": []}]}'
        )
    stopped = attempt(tmp_path / "run", AskingLearner(), config, SilentFleet, lambda run: bool(cast("Any", run.fleet).asked))
    assert isinstance(stopped.failure, StoppedOnRequest)
    assert (stopped.run.progress.step, stopped.run.unsaved_steps) == ((0, 0) if stage == "initial" else (SFT_STEPS, 0))


# ---- the request itself ------------------------------------------------------------------------------------------------------------


def test_work_that_ends_first_is_no_stop() -> None:
    async def body() -> None:
        stop = StopRequest()
        work = asyncio.ensure_future(asyncio.sleep(0, "done"))
        stop.ask("too late")
        assert await stop.comes_before(work) in (True, False)  # both are ready; whichever, ``held`` is free for what follows
        assert not stop.held.locked()

    asyncio.run(body())


def test_what_is_held_is_not_cut_and_nothing_that_is_held_begins_after_it() -> None:
    async def body() -> list[str]:
        stop, done = StopRequest(), []

        async def work() -> None:
            for name in ("first", "second"):
                async with stop.held:
                    stop.ask("a test")
                    await asyncio.sleep(0.02)
                    done.append(name)

        assert await stop.comes_before(asyncio.ensure_future(work()))
        return done

    assert asyncio.run(body()) == ["first"]


def test_work_that_swallows_a_cancellation_is_cut_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgpo_dist.run.CANCEL_AGAIN_S", 0.02)

    async def body() -> bool:
        stop = StopRequest()

        async def deaf() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await asyncio.Event().wait()

        asyncio.get_running_loop().call_later(0.02, stop.ask, "a test")
        async with asyncio.timeout(2):
            return await stop.comes_before(asyncio.ensure_future(deaf()))

    assert asyncio.run(body())


# ---- the step that a brake ends on, and whose weights are looked at ---------------------------------------------------------------


@dataclass
class CollapsingLearner(AskingLearner):
    """From step 3 of preference on chosen texts lose ten nats: rewards of -1 at beta 0.1."""

    async def preference_step(self, step: int, batch: Sequence[PreferencePair], replay: Sequence[Any] = ()) -> dict[str, float]:
        return await super().preference_step(step, batch, replay) | ({"rewards/chosen": -1.0} if step >= 3 else {})


@pytest.mark.parametrize("action", ["pause", "rollback"])
def test_the_step_that_a_brake_ends_on_is_recorded(tmp_path: Path, action: str) -> None:
    preference = {"total_steps": STEPS, "max_staleness": 0, "brakes": {"action": action, "window": 1}}
    config = build_config(a_config(0, 1).model_dump() | {"preference": preference})
    played = attempt(tmp_path / "run", CollapsingLearner(), config)
    rows = [(step, metrics["rewards/chosen"]) for stage, step, metrics in played.recorder.rows if stage == "preference"]
    assert rows == [(1, 0.0), (2, 0.0), (3, -1.0)]
    assert isinstance(played.failure, StoppedOnRequest) == (action == "pause")


@dataclass
class CopyingFleet(FakeFleet):
    """The weights of version 5, of step 4 of preference, make nothing but copies."""

    def _outcome(self, lease: Lease) -> PreferencePair | Refusal:
        pair = super()._outcome(lease)
        return pair if self.versions[-1] < 5 else Refusal(lease.uid, lease.stage, lease.prompt.prompt_id, RefusalReason.IDENTICAL)


@pytest.mark.parametrize("action", ["warn", "pause", "rollback"])
def test_a_policy_that_gives_no_further_pair_meets_a_brake_when_the_prompts_are_used_up(tmp_path: Path, action: str) -> None:
    preference = {"total_steps": STEPS, "epochs": 10, "max_staleness": 0, "brakes": {"action": action, "window": 1}}
    config = build_config(a_config(0, 1).model_dump() | {"preference": preference})
    played = attempt(tmp_path / "run", AskingLearner(), config, CopyingFleet)
    reason = "the share of prompts that gave no pair is 0.995 (preference.brakes.max_refused_rate 0.98)"
    assert [fields for kind, fields in played.recorder.events if kind == "brake"] == [{"action": action, "step": 4, "reason": reason}]
    assert [step for stage, step, _ in played.recorder.rows if stage == "preference"] == [1, 2, 3, 4]
    assert isinstance(played.failure, StoppedOnRequest) == (action == "pause")
    rolled_back = [(fields["from_step"], fields["to_step"]) for kind, fields in played.recorder.events if kind == "rolled_back"]
    assert rolled_back == ([(4, 2)] if action == "rollback" else [])  # the newest checkpoint is of step 4 itself
    assert audit_run(played.run.directory).problems == ()


def test_without_publications_between_steps_the_check_looks_at_the_weights_in_training(tmp_path: Path) -> None:
    preference = {"total_steps": STEPS, "collect": "first", "health_steps": 2}
    config = build_config(a_config(0, 1).model_dump() | {"preference": preference})
    played = attempt(tmp_path / "run", AskingLearner(), config, CheckedFleet)
    assert played.failure is None
    assert played.fleet.versions == [0, 1, 2, 3, 4]  # initial, sft's, and steps 2, 4, 6; the last one's is the stage's own
    checked = played.fleet.checked[::2]  # both roles each time
    assert len(set(checked)) == 3
    assert checked[-1] == played.final
    assert audit_run(played.run.directory).problems == ()
