"""A learner that was lost: where the run goes back to, and when no more.

Called by ``story`` with the fault that ended a stage. It moves the run's progress back to the newest checkpoint; entering the stage again
brings up the new ranks and loads it, by the same path as a start or a resume. Workers are left alone: they keep their task and the version
they hold. Why versions stay monotone is in docs/adr/0005-learner-recovery.md. Leaves out: ending and starting ranks (learner.group), rollout
workers that are lost (actors.fleet), a driver that is lost (resume).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Final

from sgpo_dist.checkpoint import Checkpoint
from sgpo_dist.errors import RunFailed, WorkerFault
from sgpo_dist.run import Progress, Run, settled_by
from sgpo_dist.separate_improver import DRIVER

LEARNER: Final = "learner"
"""The role of a WorkerFault that a learner raises."""


async def go_back(run: Run, fault: WorkerFault) -> None:
    """Put the run on its newest intact checkpoint, so that the stage in progress can be entered again with a new learner.

    Raises the fault itself when it is not the learner's, RunFailed when learner.max_restarts is used up or no checkpoint of the stage is left.
    """
    if fault.role != LEARNER:
        raise fault
    run.faults.losses += 1
    run.faults.bad_steps = 0
    run.faults.lost_at = time.monotonic() if run.faults.lost_at is None else run.faults.lost_at
    run.recorder.event("learner_lost", reason=fault.reason, stage=run.stage.value, step=run.progress.step)
    _refuse_a_loop(run, fault)
    checkpoint = await asyncio.to_thread(run.store.latest)
    saved = _saved_progress(run, fault, checkpoint)
    for stage, step in settled_by(checkpoint.facts) if checkpoint is not None else [(run.stage, 0)]:
        await run.buffer.restore(run.incarnation, stage, step)
    run.recorder.message(f"the learner was lost ({fault.reason}); it is rebuilt on step {saved.step} of stage {saved.stage}")
    run.restored_from = checkpoint.path if checkpoint is not None else None
    run.progress = replace(saved, version=version_to_go_on_with(run, saved))
    await run.buffer.give_back(run.incarnation, DRIVER, crashed=False)  # what the driver itself held leases for is begun anew


def version_to_go_on_with(run: Run, saved: Progress) -> int:
    """The version that the rebuilt learner's weights count as.

    That of the checkpoint where the workers hold the same version, or one of a later step: walking there again sends nothing. A new one where
    the workers hold newer weights that no later step makes (the improver's of ``separate_improver``), so that entering the stage sends it.
    """
    workers_are_ahead = run.published_step > saved.global_step
    return run.published + 1 if run.published > saved.version and not workers_are_ahead else saved.version


def _refuse_a_loop(run: Run, fault: WorkerFault) -> None:
    losses, limit = run.faults.losses, run.config.learner.max_restarts
    if losses > limit:
        times = f"the learner was lost {losses} times without a checkpoint in between (learner.max_restarts {limit})"
        raise RunFailed(f"{times}; the last time: {fault.reason}; remove the cause, then run the same command to go on") from fault


def _saved_progress(run: Run, fault: WorkerFault, checkpoint: Checkpoint | None) -> Progress:
    """Where the checkpoint stands, or the run's first step when there never was one."""
    saved = Progress.from_facts(checkpoint.facts) if checkpoint is not None else Progress(run.config.stages[0])
    if saved.stage != run.progress.stage:  # the newest ones are damaged; a new incarnation may number versions afresh, this one may not
        raise RunFailed(
            f"the learner was lost ({fault.reason}) and the newest intact checkpoint is of stage {saved.stage}, not {run.progress.stage}; "
            "run the same command to resume from it"
        ) from fault
    return saved
