"""The story of a run.

    prompts --lease--> rollout workers --pairs--> buffer --batch--> learner --weights, proved--> rollout workers

Called by ``launch`` with a Run whose parts may be Ray actors or, in tests, hand-written ones. There is no path, device,
retry or formatting in it: those are the parts' business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from sgpo_dist.curriculum import filter_revisions, improver_examples, keep_examples, nll_batches, replay_examples, sft_examples
from sgpo_dist.errors import RunFailed, WorkerFault
from sgpo_dist.evaluate.heldout import evaluate_heldout, improver_verdict
from sgpo_dist.preferences import optimise_preferences
from sgpo_dist.records import Completion, PreferencePair, Stage, TokenExample
from sgpo_dist.recovery import go_back
from sgpo_dist.roles import StagePlan
from sgpo_dist.run import Run
from sgpo_dist.stage import enter_stage, generation_task, nll_stage, publish_weights, save_checkpoint, stop_here


async def train(run: Run) -> None:
    """Every stage that is left, each leaving a model; start-up, resume and recovery are one path: weights first, then leases.

    Raises StoppedOnRequest, after a checkpoint, when a stop is asked for.
    """
    if await run.stop.comes_before(asyncio.ensure_future(_supervised(run, _walk_stages))):
        await stop_here(run)


async def _walk_stages(run: Run) -> None:
    """A stage whose learner was lost is entered again, from its newest checkpoint; the workers go on generating meanwhile."""
    while run.stages_left():
        try:
            await _STAGES[run.stage](run)
            await finish_stage(run)
        except WorkerFault as fault:
            run.unsaved_steps = 0  # what a lost learner did since the newest checkpoint is lost
            await go_back(run, fault)


async def fine_tune(run: Run) -> None:
    """Stage 0: NLL on the references."""
    settings = run.config.sft
    rows = sft_examples(run.sft_rows(), run.book)
    await nll_stage(run, nll_batches(rows, settings.train_batch_size, settings.epochs, run.config.seed))


async def teach_improver(run: Run) -> None:
    """Stage 1: the model's own drafts, revised a step toward the references; NLL on the revisions."""
    settings = run.config.improver
    if run.progress.step == 0:
        if run.published < run.progress.version:
            await enter_stage(run, total_steps=1)  # drafts are the current model's: it must be on the workers first
        await _collect_revisions(run)
    pairs = await run.buffer.pairs(Stage.IMPROVER)
    revisions = filter_revisions(pairs, settings.filter, await _logps(run, pairs))
    run.recorder.event("revisions_filtered", kept=len(revisions.kept), dropped=dict(revisions.dropped))
    if not revisions.kept:
        raise RunFailed(f"no revision is left to teach the improver ({dict(revisions.dropped)}); change improver.reviser or improver.filter")
    rows = improver_examples(revisions.kept, run.book, settings.edit_weight) + replay_examples(revisions.kept, settings.replay, run.book)
    rows += await _keep_rows(run, len(revisions.kept))
    await nll_stage(run, nll_batches(rows, settings.train_batch_size, settings.epochs, run.config.seed))


async def finish_stage(run: Run) -> None:
    """The stage's model on disk and on every worker, its held-out figures, and the gate after the improver stage."""
    stage, steps = run.stage, run.progress.step
    await run.learner.export(str(run.stage_dir(stage)))
    if run.unpublished_steps:
        await publish_weights(run, run.progress.version + 1)
    figures = await evaluate_heldout(run, stage.value)
    if stage is Stage.IMPROVER:
        improver_verdict(figures, run.config.improver, run.recorder)
    async with run.stop.held:
        run.recorder.event("stage_finished", stage=stage.value, steps=steps, version=run.progress.version)
        run.moved(stage=run.stage_after(stage), step=0, stage_version=run.progress.version)
        await save_checkpoint(run, stage, steps)


async def _collect_revisions(run: Run) -> None:
    settings = run.config.improver
    plan = StagePlan(
        Stage.IMPROVER, run.config.seed, batch_size=1, samples_per_prompt=settings.drafts_per_row, lease_s=run.config.rollout.lease_s
    )
    await run.buffer.open_stage(run.incarnation, plan, run.improver_rows(), run.published)
    run.recorder.status(stage=run.stage.value, total=0, doing="drafting and revising")
    await run.fleet.begin(generation_task(run, Stage.IMPROVER))
    await run.buffer.wait_exhausted(Stage.IMPROVER)
    await run.fleet.end()


async def _keep_rows(run: Run, revisions: int) -> list[TokenExample]:
    """Rows that teach when nothing is to be changed."""
    count = round(run.config.improver.keep_ratio * revisions)
    refusals = await run.buffer.refusals(Stage.IMPROVER) if count else []
    return keep_examples(refusals, {prompt.prompt_id: prompt for prompt in run.improver_rows()}, run.book, count, run.config.seed)


async def _logps(run: Run, pairs: Sequence[PreferencePair]) -> Mapping[str, tuple[float, float]] | None:
    """Log-likelihood per token (nats) of each revision and its draft under the drafting model, where the filter asks for it."""
    if run.config.improver.filter.fence_statistic != "logp_gap":
        return None
    await run.learner.begin_stage(run.learner_stage(run.stage, 1))
    halves = [half for pair in pairs for half in ((pair, pair.chosen), (pair, pair.rejected))]
    sums = await run.learner.logps([_plain_row(pair, completion) for pair, completion in halves])
    means = [total / len(completion.token_ids) for total, (_, completion) in zip(sums, halves, strict=True)]
    return {pair.uid: (means[2 * place], means[2 * place + 1]) for place, pair in enumerate(pairs)}


def _plain_row(pair: PreferencePair, completion: Completion) -> TokenExample:
    return TokenExample(pair.uid, pair.prompt_ids, completion.token_ids)


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


_STAGES: dict[Stage, Callable[[Run], Awaitable[None]]] = {
    Stage.SFT: fine_tune,
    Stage.IMPROVER: teach_improver,
    Stage.PREFERENCE: optimise_preferences,
}
