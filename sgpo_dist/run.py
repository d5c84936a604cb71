"""A run in flight: its parts, and how far it has come. Built by ``launch``, walked by ``story``.

``Progress`` is what a checkpoint remembers; everything else is rebuilt from the configuration and the run directory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sgpo_dist.checkpoint import CheckpointStore
from sgpo_dist.config import Config, ImproverConfig, PreferenceConfig, SamplingConfig, SftConfig
from sgpo_dist.data.loading import Corpus
from sgpo_dist.errors import CheckpointError
from sgpo_dist.prompts import PromptBook
from sgpo_dist.recorder import Recorder
from sgpo_dist.records import Prompt, Stage
from sgpo_dist.roles import Buffer, Fleet, GenerationTask, Learner, LearnerStage, LossPlan, OptimiserPlan, Sampling

FINISHED = "finished"
CANCEL_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: ``step`` of ``stage`` is done, ``global_step`` counts over stages, ``version`` is published.

    ``stage_version`` is the version that was current when the stage began.
    """

    stage: str
    step: int = 0
    global_step: int = 0
    version: int = 0
    stage_version: int = 0

    def facts(self) -> dict[str, Any]:
        """As a checkpoint's manifest stores it."""
        return asdict(self)

    @staticmethod
    def from_facts(facts: Mapping[str, Any]) -> Progress:
        """Read back; raises CheckpointError when a field is missing."""
        try:
            return Progress(str(facts["stage"]), *(int(facts[name]) for name in ("step", "global_step", "version", "stage_version")))
        except (KeyError, TypeError, ValueError) as problem:
            raise CheckpointError(f"the checkpoint's manifest lacks the run's progress ({problem}); start a new run_name") from None


def settled_by(facts: Mapping[str, Any]) -> list[tuple[Stage, int]]:
    """(stage, step) up to which rows count as trained on a checkpoint with these facts: of the stage that it ended, and of the one in progress."""
    places = [facts["settled"]] if "settled" in facts else []
    places += [(facts["stage"], facts["step"])] if facts["stage"] != FINISHED else []
    return [(Stage(stage), int(step)) for stage, step in places]


@dataclass(slots=True)
class StopRequest:
    """Somebody wants the run to stop: a signal, ``sgpo-dist stop``, ``time_limit_s``. ``reason`` is empty while nobody does.

    Whatever is awaited is cut short for it, save what is done with ``held``: an optimiser step with all that follows from it, a checkpoint.
    """

    reason: str = ""
    held: asyncio.Lock = field(default_factory=asyncio.Lock)
    _asked: asyncio.Event = field(default_factory=asyncio.Event)

    def ask(self, reason: str) -> None:
        """The first reason stands."""
        self.reason = self.reason or reason
        self._asked.set()

    async def comes_before(self, work: asyncio.Future[Any]) -> bool:
        """Wait for ``work``, or cut it short when a stop is asked for and ``held`` is free; tells whether it was cut. Raises what ended it."""
        due = asyncio.ensure_future(self._due())
        try:
            await asyncio.wait({work, due}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            due.cancel()
            await _end(work)
            if due.done() and not due.cancelled():
                self.held.release()
        if work.cancelled():
            return True
        work.result()
        return False

    async def _due(self) -> None:
        """Returns with ``held`` taken, so that nothing that must not be cut short begins any more."""
        await self._asked.wait()
        await self.held.acquire()


async def _end(work: asyncio.Future[Any]) -> None:
    """Cancel it until it ends: before Python 3.12 ``wait_for`` swallows a cancellation that meets its answer."""
    while not work.done():
        work.cancel()
        await asyncio.wait({work}, timeout=CANCEL_AGAIN_S)


@dataclass(slots=True)
class Faults:
    """What went wrong since something last went right.

    ``losses`` of the learner since the last checkpoint, ``bad_steps`` in a row; ``lost_at`` (monotonic seconds) while a learner is rebuilt.
    """

    losses: int = 0
    bad_steps: int = 0
    lost_at: float | None = None


@dataclass(slots=True)
class Run:
    """All parts of one run. The workers hold version ``published``, the weights after step ``published_step`` of the run; ``task`` is their last.

    ``unsaved_steps`` are the learner's since the newest checkpoint.
    """

    config: Config
    directory: Path
    initial_model: Path
    corpus: Corpus
    book: PromptBook
    buffer: Buffer
    fleet: Fleet
    learner: Learner
    store: CheckpointStore
    recorder: Recorder
    incarnation: int
    progress: Progress
    tolerance: float
    restored_from: Path | None = None
    published: int = -1
    published_step: int = -1
    unpublished_steps: int = 0
    unsaved_steps: int = 0
    task: GenerationTask | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    faults: Faults = field(default_factory=Faults)

    @property
    def stage(self) -> Stage:
        """The stage in progress."""
        return Stage(self.progress.stage)

    def sft_rows(self) -> tuple[Prompt, ...]:
        """References of the sft stage."""
        return self.corpus.references[: self.config.sft.max_rows]

    def improver_rows(self) -> tuple[Prompt, ...]:
        """References whose drafts are revised: those that the sft stage of this run leaves, where it does not take all."""
        leaves = self.config.sft.max_rows is not None and "sft" in self.config.stages
        rows = self.corpus.references[self.config.sft.max_rows :] if leaves else self.corpus.references
        return rows[: self.config.improver.max_rows]

    def preference_prompts(self) -> tuple[Prompt, ...]:
        """What the preference stage asks: bare prompts, unless its pairs need references."""
        return self.corpus.references if self.config.pairs_need_references else self.corpus.prompts

    def stages_left(self) -> list[Stage]:
        """The stage in progress and those after it; none when the run is finished."""
        names = list(self.config.stages)
        if self.progress.stage == FINISHED:
            return []
        return [Stage(name) for name in names[names.index(self.stage.value) :]]

    def stage_after(self, stage: Stage) -> str:
        """The next stage's name, or FINISHED."""
        names = list(self.config.stages)
        place = names.index(stage.value) + 1
        return names[place] if place < len(names) else FINISHED

    def moved(self, **changes: Any) -> None:
        """Replace fields of the progress."""
        self.progress = replace(self.progress, **changes)

    def stepped(self, step: int) -> None:
        """One more optimiser step is done, of which the workers and the checkpoints know nothing yet."""
        self.moved(step=step, global_step=self.progress.global_step + 1)
        self.unpublished_steps += 1
        self.unsaved_steps += 1

    def round_dir(self, number: int) -> Path:
        """The model that round ``number`` (from 1) of the preference stage begins with: its frozen reference."""
        return self.directory / "stages" / f"preference-round-{number}"

    def stage_dir(self, stage: Stage) -> Path:
        """Where a stage leaves its model."""
        return self.directory / "stages" / stage.value

    def last_model(self) -> Path:
        """The model of the last configured stage."""
        return self.stage_dir(Stage(self.config.stages[-1]))

    def start_model(self, stage: Stage) -> Path:
        """The model a stage starts from: that of the stage before it in this run, or the initial one."""
        names = list(self.config.stages)
        place = names.index(stage.value)
        return self.stage_dir(Stage(names[place - 1])) if place else self.initial_model

    def learner_stage(self, stage: Stage, total_steps: int) -> LearnerStage:
        """What the learner needs for a stage."""
        config = self.config
        sections: dict[Stage, SftConfig | ImproverConfig | PreferenceConfig] = {
            Stage.SFT: config.sft,
            Stage.IMPROVER: config.improver,
            Stage.PREFERENCE: config.preference,
        }
        section = sections[stage]
        optimiser = OptimiserPlan(
            learning_rate=section.learning_rate,
            total_steps=total_steps,
            warmup_ratio=section.warmup_ratio,
            schedule=section.schedule,
            max_grad_norm=config.learner.max_grad_norm,
            weight_decay=config.learner.weight_decay,
            beta1=config.learner.beta1,
            beta2=config.learner.beta2,
        )
        preference = config.preference
        loss = LossPlan(
            preference.loss_type,
            preference.beta,
            preference.label_smoothing,
            preference.nll_coef,
            preference.simpo_gamma,
            preference.dpop_lambda,
        )
        start = str(self.start_model(stage))
        needs_reference = stage is Stage.PREFERENCE and preference.loss_type != "simpo"
        return LearnerStage(stage, start, optimiser, loss, start if needs_reference else None, stage is Stage.SFT and config.sft.packing)


def sampling(settings: SamplingConfig) -> Sampling:
    """A configured sampling as the engines take it."""
    return Sampling(settings.temperature, settings.top_p, settings.top_k, settings.max_new_tokens)

