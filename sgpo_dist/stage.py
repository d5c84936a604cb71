"""What every stage does: enter, publish weights, step, save, stop. The story's verbs, one each.

Called by ``story`` and ``preferences``. Start-up, resume and a learner's recovery are one path through ``enter_stage``: weights first, then
leases.
Leaves out: what a stage trains on, and in which order the stages come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

from sgpo_dist.config import AgreementConfig
from sgpo_dist.endpoint import shared_among
from sgpo_dist.errors import RunFailed, StoppedOnRequest
from sgpo_dist.evaluate.heldout import evaluate_heldout
from sgpo_dist.quarantine import keep_count
from sgpo_dist.records import Stage, TokenExample
from sgpo_dist.roles import GenerationTask
from sgpo_dist.run import Run, sampling
from sgpo_dist.weights.version import check_proof


async def enter_stage(run: Run, total_steps: int) -> None:
    """Learner on the stage's start (or on the checkpoint inside it), its weights proved on every worker."""
    began = time.monotonic()
    await run.learner.begin_stage(run.learner_stage(run.stage, total_steps))
    if run.restored_from is not None and run.progress.step:
        await run.learner.load(str(run.restored_from / "learner"))
    run.recorder.event("learner_ready", stage=run.stage.value, step=run.progress.step, seconds=round(time.monotonic() - began, 1))
    if run.published < run.progress.version:
        await publish_weights(run, run.progress.version)
    note_rebuilt(run)
    if run.progress.global_step == 0:
        await evaluate_heldout(run, "initial")


async def publish_weights(run: Run, version: int) -> None:
    """Send, prove, and only then call it current. A worker that cannot prove it is rebuilt by the fleet.

    A version that the workers hold already is not sent again: a rebuilt learner is on its way back to the step that it was made after.
    """
    if version <= run.published:
        run.moved(version=version)
        run.unpublished_steps = 0
        return
    started = time.monotonic()
    bundle = await run.learner.publish(version)
    proofs = await run.fleet.publish(bundle)
    gaps = [check_proof(bundle, proof, run.tolerance) for proof in proofs]
    if not gaps:
        raise RunFailed(f"no rollout worker proved version {version}; see the rollout logs")
    run.moved(version=version)
    run.published, run.published_step = version, run.progress.global_step
    run.unpublished_steps = 0
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
    await asyncio.to_thread(run.store.commit, draft, run.progress.global_step, run.progress.facts() | {"settled": [settled.value, step]})
    await run.buffer.commit(run.incarnation, settled, step)
    run.faults.losses = run.unsaved_steps = 0
    await asyncio.to_thread(run.store.prune)
    run.recorder.event("checkpoint", step=run.progress.global_step)


async def stop_here(run: Run) -> NoReturn:
    """A checkpoint of the steps that none holds yet, then StoppedOnRequest. At a stage's start everything there is lies on disk already."""
    step, stage = run.progress.step, run.stage
    if run.unsaved_steps:
        await save_checkpoint(run, stage, step)
    where = f"after step {step} of stage {stage.value}" if step else f"in stage {stage.value}, before its first step"
    raise StoppedOnRequest(f"stopped by {run.stop.reason} {where}; run the same command to go on")


async def after_step(run: Run, metrics: dict[str, float], publish: bool) -> None:
    """Publish if it is due, record, save if it is due."""
    if publish:
        started = time.monotonic()
        await publish_weights(run, run.progress.version + 1)
        metrics["time/publish"] = time.monotonic() - started
    record_step(run, metrics)
    if run.progress.step % run.config.checkpoint.save_steps == 0:
        await save_checkpoint(run, run.stage, run.progress.step)


def record_step(run: Run, metrics: Mapping[str, float]) -> None:
    """The newest step's line of metrics."""
    run.recorder.log(run.stage.value, run.progress.step, {**metrics, "version": run.progress.version})


async def nll_stage(run: Run, batches: Sequence[tuple[TokenExample, ...]]) -> None:
    """A stage that only trains, on batches known beforehand."""
    await enter_stage(run, len(batches))
    run.recorder.status(stage=run.stage.value, total=len(batches), doing="training")
    for step in range(run.progress.step + 1, len(batches) + 1):
        async with run.stop.held:
            metrics = dict(await run.learner.nll_step(step, batches[step - 1]))
            run.stepped(step)
            keep_count(run, metrics, batches[step - 1])
            await after_step(run, metrics, publish=False)


def note_rebuilt(run: Run) -> None:
    """Say how long the learner was away, if it was lost."""
    if run.faults.lost_at is None:
        return
    seconds = round(time.monotonic() - run.faults.lost_at, 1)
    run.faults.lost_at = None
    run.recorder.event("learner_rebuilt", seconds=seconds, stage=run.stage.value, step=run.progress.step)
    run.recorder.message(f"the learner is back on step {run.progress.step} of stage {run.stage.value} after {seconds:g} s")


def generation_task(run: Run, stage: Stage, edit_ratios: tuple[float, float] | None = None) -> GenerationTask:
    """What the workers do with the stage's prompts. ``edit_ratios`` are the fences of preference pairs.

    The same object as the last one when nothing differs: workers that are on it go on undisturbed when a stage is entered again.
    """
    config, improver, preference = run.config, run.config.improver, run.config.preference
    revisers = dict(improver.reviser) if isinstance(improver.reviser, dict) else {"default": improver.reviser}
    made, workers = stage is Stage.PREFERENCE, config.rollout.num_rollout_workers
    task = GenerationTask(
        stage,
        run.incarnation,
        sampling(config.rollout.policy),
        sampling(config.rollout.improver),
        {"default": "improver"} if made else revisers,
        improver.repair,
        {"blend_budget": improver.blend_budget, "seed": config.seed, "revisions_path": improver.revisions_path},
        pairs=preference.pairs if made else "improver",
        rungs=preference.ladder if made else 1,
        agreement=preference.agreement if made else AgreementConfig(),
        judge=preference.judge.model_copy(update={"endpoint": shared_among(preference.judge.endpoint, workers)}),
        endpoint=shared_among(improver.endpoint, workers),
        edit_ratios=edit_ratios,
    )
    run.task = run.task if run.task == task else task
    return run.task
