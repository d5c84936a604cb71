"""The story of a run.

    prompts --lease--> rollout workers --pairs--> buffer --batch--> learner --weights, proved--> rollout workers

Called by ``launch`` with a Run whose parts may be Ray actors or, in tests, hand-written ones. There is no path, device,
retry or formatting in it: those are the parts' business.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from sgpo_dist.curriculum import filter_revisions, improver_examples, nll_batches, replay_examples, sft_examples
from sgpo_dist.errors import RunFailed, StoppedOnRequest
from sgpo_dist.evaluate.heldout import evaluate_heldout, improver_verdict
from sgpo_dist.records import Stage, TokenExample
from sgpo_dist.roles import GenerationTask, StagePlan
from sgpo_dist.run import Run, sampling
from sgpo_dist.weights.version import check_proof


async def train(run: Run) -> None:
    """Every stage that is left, each leaving a model; start-up and resume are one path: weights first, then leases."""
    await _supervised(run, _walk_stages)


async def _walk_stages(run: Run) -> None:
    for stage in run.stages_left():
        await _STAGES[stage](run)
        await finish_stage(run)


async def fine_tune(run: Run) -> None:
    """Stage 0: NLL on the references."""
    settings = run.config.sft
    rows = sft_examples(run.corpus.references, run.book)
    await _nll_stage(run, nll_batches(rows, settings.train_batch_size, settings.epochs, run.config.seed))


async def teach_improver(run: Run) -> None:
    """Stage 1: the model's own drafts, revised a step toward the references; NLL on the revisions."""
    settings = run.config.improver
    if run.progress.step == 0:
        if run.published != run.progress.version:
            await enter_stage(run, total_steps=1)  # drafts are the current model's: it must be on the workers first
        await _collect_revisions(run)
    revisions = filter_revisions(await run.buffer.pairs(Stage.IMPROVER), settings.filter)
    run.recorder.event("revisions_filtered", kept=len(revisions.kept), dropped=dict(revisions.dropped))
    if not revisions.kept:
        raise RunFailed(f"no revision is left to teach the improver ({dict(revisions.dropped)}); change improver.reviser or improver.filter")
    rows = improver_examples(revisions.kept, run.book) + replay_examples(revisions.kept, settings.replay, run.book)
    await _nll_stage(run, nll_batches(rows, settings.train_batch_size, settings.epochs, run.config.seed))


async def optimise_preferences(run: Run) -> None:
    """Stage 2: workers make pairs with the newest model, the learner trains on them, the weights go back."""
    settings = run.config.preference
    await enter_stage(run, settings.total_steps)
    await run.buffer.open_stage(run.incarnation, _preference_plan(run), run.corpus.prompts, run.progress.version)
    await run.fleet.begin(_generation_task(run, Stage.PREFERENCE))
    run.recorder.status(stage=run.stage.value, total=settings.total_steps, doing="training on own pairs")
    while run.progress.step < settings.total_steps:
        waited = time.monotonic()
        batch = await run.buffer.assign(run.incarnation, Stage.PREFERENCE, run.progress.step + 1)  # recorded before it is trained on
        if batch is None:
            run.recorder.message(f"prompts are used up after {run.progress.step} of {settings.total_steps} steps: the stage ends here")
            break
        waited = time.monotonic() - waited
        metrics = dict(await run.learner.preference_step(batch.step, batch.pairs))
        run.moved(step=batch.step, global_step=run.progress.global_step + 1)
        metrics |= {"staleness": batch.version - min(pair.version for pair in batch.pairs), "time/wait_for_batch": waited}
        await _after_step(run, metrics, publish=batch.step % run.config.weights.weight_sync_interval == 0)
    await run.fleet.end()


async def enter_stage(run: Run, total_steps: int) -> None:
    """Learner on the stage's start (or on the checkpoint inside it), its weights proved on every worker."""
    await run.learner.begin_stage(run.learner_stage(run.stage, total_steps))
    if run.restored_from is not None and run.progress.step:
        await run.learner.load(str(run.restored_from / "learner"))
    if run.published != run.progress.version:
        await publish_weights(run, run.progress.version)
    if run.progress.global_step == 0:
        await evaluate_heldout(run, "initial")


async def publish_weights(run: Run, version: int) -> None:
    """Send, prove, and only then call it current. A worker that cannot prove it is rebuilt by the fleet."""
    started = time.monotonic()
    bundle = await run.learner.publish(version)
    proofs = await run.fleet.publish(bundle)
    gaps = [check_proof(bundle, proof, run.tolerance) for proof in proofs]
    if not gaps:
        raise RunFailed(f"no rollout worker proved version {version}; see the rollout logs")
    run.moved(version=version)
    run.published = version
    await run.buffer.advance(run.incarnation, run.stage, version)
    await run.learner.retire(version - 1)
    run.recorder.event(
        "version_published",
        version=version,
        workers=len(gaps),
        checksum=bundle.checksum,
        probe_gap=max(gaps),
        stall_s=max(proof.stall_s for proof in proofs),
        total_s=time.monotonic() - started,
    )


async def save_checkpoint(run: Run, settled: Stage, step: int) -> None:
    """Atomic; only then do the rows up to ``step`` of ``settled`` count as trained."""
    draft = run.store.begin(run.progress.global_step)
    if run.progress.step:  # at a stage's start the exported model of the stage before is all there is to keep
        await run.learner.save(str(draft / "learner"))
    await run.buffer.backup(str(draft / "buffer.db"))
    await asyncio.to_thread(run.store.commit, draft, run.progress.global_step, run.progress.facts())
    await run.buffer.commit(run.incarnation, settled, step)
    await asyncio.to_thread(run.store.prune)
    run.recorder.event("checkpoint", step=run.progress.global_step)


async def finish_stage(run: Run) -> None:
    """The stage's model on disk and on every worker, its held-out figures, and the gate after the improver stage."""
    stage, steps = run.stage, run.progress.step
    await run.learner.export(str(run.stage_dir(stage)))
    if stage is not Stage.PREFERENCE or steps % run.config.weights.weight_sync_interval:
        await publish_weights(run, run.progress.version + 1)
    figures = await evaluate_heldout(run, stage.value)
    if stage is Stage.IMPROVER:
        improver_verdict(figures, run.config.improver.gate, run.recorder)
    run.recorder.event("stage_finished", stage=stage.value, steps=steps, version=run.progress.version)
    run.moved(stage=run.stage_after(stage), step=0, stage_version=run.progress.version)
    await save_checkpoint(run, stage, steps)


async def _nll_stage(run: Run, batches: Sequence[tuple[TokenExample, ...]]) -> None:
    await enter_stage(run, len(batches))
    run.recorder.status(stage=run.stage.value, total=len(batches), doing="training")
    for step in range(run.progress.step + 1, len(batches) + 1):
        metrics = dict(await run.learner.nll_step(step, batches[step - 1]))
        run.moved(step=step, global_step=run.progress.global_step + 1)
        await _after_step(run, metrics, publish=False)


async def _collect_revisions(run: Run) -> None:
    settings = run.config.improver
    plan = StagePlan(Stage.IMPROVER, run.config.seed, batch_size=1, lease_s=run.config.rollout.lease_s)
    await run.buffer.open_stage(run.incarnation, plan, run.corpus.references[: settings.max_rows], run.progress.version)
    run.recorder.status(stage=run.stage.value, total=0, doing="drafting and revising")
    await run.fleet.begin(_generation_task(run, Stage.IMPROVER))
    await run.buffer.wait_exhausted(Stage.IMPROVER)
    await run.fleet.end()


async def _after_step(run: Run, metrics: dict[str, float], publish: bool) -> None:
    if publish:
        started = time.monotonic()
        await publish_weights(run, run.progress.version + 1)
        metrics["time/publish"] = time.monotonic() - started
    run.recorder.log(run.stage.value, run.progress.step, {**metrics, "version": run.progress.version})
    stopping = run.stop.reason
    if stopping or run.progress.step % run.config.checkpoint.save_steps == 0:
        await save_checkpoint(run, run.stage, run.progress.step)
    if stopping:
        where = f"step {run.progress.step} of stage {run.stage.value}"
        raise StoppedOnRequest(f"stopped by {stopping} after {where}; run the same command to go on")


async def _supervised(run: Run, story: Callable[[Run], Awaitable[None]]) -> None:
    """Run the story beside the fleet's supervision; the first failure that is not a lost worker ends both."""
    tasks = {asyncio.ensure_future(story(run)), asyncio.ensure_future(run.fleet.supervise())}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _preference_plan(run: Run) -> StagePlan:
    preference = run.config.preference
    return StagePlan(
        Stage.PREFERENCE,
        run.config.seed,
        batch_size=run.config.learner.train_batch_size,
        weight_sync_interval=run.config.weights.weight_sync_interval,
        max_staleness=preference.max_staleness,
        max_pairs=preference.total_steps * run.config.learner.train_batch_size,
        samples_per_prompt=preference.samples_per_prompt,
        epochs=preference.epochs,
        lease_s=run.config.rollout.lease_s,
    )


def _generation_task(run: Run, stage: Stage) -> GenerationTask:
    config = run.config
    reviser = config.improver.reviser
    revisers = dict(reviser) if isinstance(reviser, dict) else {"default": reviser}
    return GenerationTask(
        stage,
        run.incarnation,
        sampling(config.rollout.policy),
        sampling(config.rollout.improver),
        {"default": "improver"} if stage is Stage.PREFERENCE else revisers,
        config.improver.repair,
        {"blend_budget": config.improver.blend_budget, "seed": config.seed},
    )


_STAGES: dict[Stage, Callable[[Run], Awaitable[None]]] = {
    Stage.SFT: fine_tune,
    Stage.IMPROVER: teach_improver,
    Stage.PREFERENCE: optimise_preferences,
}
