"""Stage 2: pairs are made, the learner trains on them, the weights go back.

Called by ``story``. ``PairSupply`` says where a step's pairs come from (the buffer, the data's own pairs, or both), ``Watch`` whether the
model is collapsing. Leaves out: how a pair is made (actors), what a loss is (learner), and the verbs that all stages share (``stage``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sgpo_dist.config import PreferenceConfig
from sgpo_dist.curriculum import edit_fences, given_pairs, improver_examples, kept_examples, offline_batch
from sgpo_dist.errors import DataError, StoppedOnRequest
from sgpo_dist.evaluate.heldout import improver_check
from sgpo_dist.health import Brakes, Idleness, pair_health, refusal_health
from sgpo_dist.quarantine import is_skipped, keep_count
from sgpo_dist.recorder import read_metrics
from sgpo_dist.records import PreferencePair, Stage, TokenExample
from sgpo_dist.roles import BufferCounts, StagePlan
from sgpo_dist.run import Progress, Run
from sgpo_dist.separate_improver import collect_apart
from sgpo_dist.stage import after_step, enter_stage, generation_task, publish_weights, record_step, save_checkpoint

HEALTH_PROMPTS = 24
"""Held-out prompts of a check in the middle of the stage."""


async def optimise_preferences(run: Run) -> None:
    """Workers make pairs with the newest model, the learner trains on them, the weights go back."""
    settings = run.config.preference
    await enter_stage(run, settings.total_steps)
    supply = await open_supply(run)
    watch = Watch(run)
    run.recorder.status(stage=run.stage.value, total=settings.total_steps, doing="training on own pairs")
    reference_round = 0
    while run.progress.step < settings.total_steps:
        step = run.progress.step + 1
        reference_round = await begin_round(run, step, reference_round)
        batch = await supply.batch(step)
        if batch is None:
            run.recorder.message(f"prompts are used up after {run.progress.step} of {settings.total_steps} steps: the stage ends here")
            async with run.stop.held:
                await look_once_more(run, watch)
            break
        async with run.stop.held:
            is_braked = await train_step(run, watch, step, batch)
        if is_braked:
            break
    await run.fleet.end()


async def train_step(run: Run, watch: Watch, step: int, batch: StepBatch) -> bool:
    """One optimiser step and all that follows from it; whether a brake ends the stage. Raises StoppedOnRequest when it pauses the run."""
    metrics = dict(await run.learner.preference_step(step, batch.pairs, batch.replay))
    run.stepped(step)
    metrics |= {"staleness": batch.staleness, "time/wait_for_batch": batch.waited_s}
    keep_count(run, metrics, batch.pairs + batch.replay)
    reason = await watch.observe(metrics, batch.pairs)
    if reason is not None and await brake(run, reason, watch.is_new, metrics):
        return True
    due = step % run.config.weights.weight_sync_interval == 0
    await after_step(run, metrics, publish=due and is_online(run.config.preference))
    return False


async def look_once_more(run: Run, watch: Watch) -> None:
    """Brake for what came after the last step: a policy that says nothing new any more uses its prompts up without another one."""
    reason = await watch.observe_refusals()
    if reason is not None:
        await brake(run, reason, watch.is_new)


def is_online(settings: PreferenceConfig) -> bool:
    """Whether the workers go on making pairs while the learner trains, and so need its weights."""
    return settings.pairs != "given" and settings.collect == "online"


# ---- where pairs come from -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one step trains on. ``staleness`` in versions, of the oldest pair; ``waited_s`` for the buffer."""

    pairs: tuple[PreferencePair, ...]
    replay: tuple[TokenExample, ...] = ()
    staleness: float = 0.0
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PairSupply:
    """Batches by step. The data's own pairs and the replay rows are a function of step and seed, made pairs come from the journal."""

    run: Run
    given: tuple[PreferencePair, ...]
    improver_rows: tuple[TokenExample, ...]
    kept_rows: tuple[TokenExample, ...] = ()

    async def batch(self, step: int) -> StepBatch | None:
        """None when the stage can never fill it."""
        config, settings = self.run.config, self.run.config.preference
        size = config.learner.train_batch_size
        if settings.pairs == "given":
            if step * size > len(self.given) * settings.epochs:
                return None
            pairs = offline_batch(self.given, step, size, config.seed)
            return StepBatch(pairs, self._replay(step, size))
        waited = time.monotonic()
        made = await self.run.buffer.assign(self.run.incarnation, Stage.PREFERENCE, step)  # recorded before it is trained on
        if made is None:
            return None
        waited = time.monotonic() - waited
        pairs = made.pairs + offline_batch(self.given, step, size - config.made_pairs_per_step, config.seed)
        staleness = made.version - min(pair.version for pair in made.pairs)
        return StepBatch(pairs, self._replay(step, size), float(staleness), waited)

    def _replay(self, step: int, size: int) -> tuple[TokenExample, ...]:
        settings, seed = self.run.config.preference, self.run.config.seed
        shares = ((self.improver_rows, settings.improver_replay), (self.kept_rows, settings.kept_replay))
        return tuple(row for rows, share in shares if share for row in offline_batch(rows, step, round(share * size), seed))


async def open_supply(run: Run) -> PairSupply:
    """Open the stage's buffer and let the workers begin; with ``collect: first`` return when all pairs are there."""
    settings = run.config.preference
    given = given_pairs(run.corpus.given, run.book, run.progress.version)
    if (settings.pairs == "given" or settings.offline_ratio) and not given:
        raise DataError("preference.pairs 'given' and preference.offline_ratio need rows with chosen and rejected in data.path; there are none")
    revisions = await run.buffer.pairs(Stage.IMPROVER) if settings.improver_replay or settings.fence is not None else []
    rows = improver_examples(revisions, run.book, run.config.improver.edit_weight) if settings.improver_replay else []
    supply = PairSupply(run, tuple(given), tuple(rows))
    if settings.pairs == "given":
        return supply
    await run.buffer.open_stage(run.incarnation, preference_plan(run), run.preference_prompts(), run.published)
    fences = edit_fences(revisions, settings.fence) if settings.fence is not None else None
    if settings.improver_model is not None:
        await collect_apart(run, settings.improver_model)
    else:
        await run.fleet.begin(generation_task(run, Stage.PREFERENCE, fences))
        if settings.collect == "first":
            run.recorder.status(stage=run.stage.value, total=settings.total_steps, doing="making all pairs first")
            await run.buffer.wait_exhausted(Stage.PREFERENCE)
            await run.fleet.end()
    if not settings.kept_replay:
        return supply
    prompts = {prompt.prompt_id: prompt for prompt in run.preference_prompts()}
    return replace(supply, kept_rows=tuple(kept_examples(await run.buffer.refusals(Stage.PREFERENCE), prompts, run.book)))


def preference_plan(run: Run) -> StagePlan:
    """What the stage asks of the buffer."""
    config, settings = run.config, run.config.preference
    return StagePlan(
        Stage.PREFERENCE,
        config.seed,
        batch_size=config.made_pairs_per_step,
        weight_sync_interval=config.weights.weight_sync_interval,
        max_staleness=settings.max_staleness if settings.collect == "online" else None,
        max_pairs=settings.total_steps * config.made_pairs_per_step,
        samples_per_prompt=settings.samples_per_prompt * settings.ladder,
        epochs=settings.epochs,
        lease_s=config.rollout.lease_s,
    )


# ---- rounds ------------------------------------------------------------------------------------------------------------------------


def round_of(step: int, settings: PreferenceConfig) -> int:
    """The round (from 0) that a step (from 1) belongs to: ``rounds`` parts of ``total_steps``, as equal as can be."""
    return (step - 1) * settings.rounds // settings.total_steps


async def begin_round(run: Run, step: int, reference_round: int) -> int:
    """Refresh the frozen reference when ``step`` belongs to another round than the reference does; returns the round."""
    now = round_of(step, run.config.preference)
    if now == reference_round:
        return now
    directory = str(run.round_dir(now))
    if round_of(max(step - 1, 1), run.config.preference) != now:  # resumed inside the round, it is there already
        await run.learner.export(directory)
    await run.learner.refresh_reference(directory)
    run.recorder.event("round_began", round=now, step=step)
    return now


# ---- collapse ----------------------------------------------------------------------------------------------------------------------


class Watch:
    """Adds each step's health to its metrics and asks the brakes. Remembers what they saw of this stage before a resume."""

    def __init__(self, run: Run) -> None:
        settings = run.config.preference
        self._run = run
        self._brakes = Brakes(settings.brakes, settings.beta, reference_free=settings.loss_type == "simpo")
        self._counts_before: BufferCounts | None = None  # of the step before the newest
        self._counts: BufferCounts | None = None
        self._idleness = Idleness()
        for row in read_metrics(run.directory / "metrics.jsonl"):
            if row.stage == Stage.PREFERENCE and row.step <= run.progress.step and not is_skipped(row.metrics):
                self._brakes.observe(row.metrics)

    async def observe(self, metrics: dict[str, float], pairs: Sequence[PreferencePair]) -> str | None:
        """Why the stage should not go on, or None."""
        settings = self._run.config.preference
        metrics |= await asyncio.to_thread(pair_health, pairs)
        if settings.pairs != "given":
            self._counts_before, self._counts = self._counts, await self._run.buffer.counts(Stage.PREFERENCE)
            metrics |= refusal_health(self._counts_before, self._counts)
            metrics |= self._idleness.observe(await self._run.fleet.stats(), time.monotonic())
        if settings.health_steps and self._run.progress.step % settings.health_steps == 0 and not self._run.stop.reason:
            metrics |= await self._check_improver()
        return None if is_skipped(metrics) else self._brakes.observe(metrics)

    async def observe_refusals(self) -> str | None:
        """The same when no other step follows, with what was refused after the last one counted as that one's."""
        if self._run.config.preference.pairs == "given":
            return None
        return self._brakes.amend(refusal_health(self._counts_before, await self._run.buffer.counts(Stage.PREFERENCE)))

    async def _check_improver(self) -> Mapping[str, float]:
        """On the workers' weights, which are made the newest where no step does that: online they are at most a sync interval old."""
        run = self._run
        if run.unpublished_steps and not is_online(run.config.preference):
            await publish_weights(run, run.progress.version + 1)
        found = await improver_check(run, HEALTH_PROMPTS)
        run.recorder.event("improver_check", step=run.progress.step, **{name.removeprefix("improver/"): value for name, value in found.items()})
        return found

    @property
    def is_new(self) -> bool:
        """Whether the newest step crossed a limit that the one before it did not."""
        return self._brakes.is_new


async def brake(run: Run, reason: str, is_new: bool, metrics: Mapping[str, float] | None = None) -> bool:
    """Do what ``preference.brakes.action`` says; whether the stage ends here, then with a new step's ``metrics`` recorded.

    Raises StoppedOnRequest for 'pause'.
    """
    action = run.config.preference.brakes.action
    if action == "off" or (action == "warn" and not is_new):
        return False
    run.recorder.event("brake", action=action, step=run.progress.step, reason=reason)
    line = f"collapse brake after step {run.progress.step}: {reason}"
    if action == "warn":
        run.recorder.message(f"{line} (preference.brakes.action=warn: going on)")
        return False
    if metrics is not None:
        record_step(run, metrics)
    if action == "pause":
        await save_checkpoint(run, run.stage, run.progress.step)
        raise StoppedOnRequest(f"paused by the {line}; run the same command with preference.brakes.action=warn to go on all the same")
    await roll_back(run, reason)
    return True


async def roll_back(run: Run, reason: str) -> None:
    """Put the learner back on this stage's last checkpoint before its newest step, or on its start; what was trained after it does not count."""
    checkpoint = await asyncio.to_thread(run.store.latest, run.progress.global_step)  # it hashes every file, and supervision goes on meanwhile
    saved = Progress.from_facts(checkpoint.facts) if checkpoint is not None else None
    step = saved.step if saved is not None and saved.stage == run.stage else 0
    before = run.progress
    await run.learner.begin_stage(run.learner_stage(run.stage, run.config.preference.total_steps))
    if checkpoint is not None and step:
        await run.learner.load(str(checkpoint.path / "learner"))
    await run.buffer.restore(run.incarnation, run.stage, step)  # a checkpoint of the newest step has made its rows count as trained
    run.moved(step=step, global_step=before.global_step - (before.step - step))
    run.unpublished_steps += 1  # the workers hold weights that no longer are
    run.unsaved_steps = 0
    run.recorder.event("rolled_back", stage=run.stage.value, from_step=before.step, to_step=step, reason=reason)
    run.recorder.message(f"rolled back from step {before.step} to step {step}, where the stage ends: {reason}")
