"""Pairs whose refinement comes from another model's weights: responses first, then the improver's weights, then refinements.

Called by ``preferences`` for ``preference.improver_model`` (the SynPO baseline, and the ablation of the unified model). Both models use the
same workers, one after the other, so no second engine is needed; prompts are leased and outcomes put as by any worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from sgpo_dist.pair_gate import make_outcome
from sgpo_dist.records import Completion, Outcome, Refusal, RefusalReason, Role, Stage, sampling_seed
from sgpo_dist.roles import GenerateRequest, Lease
from sgpo_dist.run import Run, sampling
from sgpo_dist.stage import publish_weights

DRIVER = "driver"
CHUNK = 4096
"""Prompts leased at once; the weights change twice a chunk."""


async def collect_apart(run: Run, improver_dir: str) -> None:
    """Make all pairs of the stage; returns when every prompt has its outcome, with the policy's weights on the workers again."""
    stage = run.learner_stage(run.stage, run.config.preference.total_steps)
    held: list[Lease] = []
    keeper = asyncio.create_task(_keep(run, held))
    try:
        while leases := (await run.buffer.lease(run.incarnation, DRIVER, Stage.PREFERENCE, CHUNK)).leases:
            held[:] = leases
            responses = await _ask(run, Role.POLICY, leases, [run.book.policy_ids(lease.prompt) for lease in leases])
            await run.learner.begin_stage(replace(stage, model_dir=improver_dir, reference_dir=None))
            await publish_weights(run, run.progress.version + 1)
            drafts = [run.book.improver_ids(lease.prompt, response.text) for lease, response in zip(leases, responses, strict=True)]
            refinements = await _ask(run, Role.IMPROVER, leases, drafts)
            made = [_outcome(run, *parts) for parts in zip(leases, responses, refinements, strict=True)]
            await run.buffer.put(run.incarnation, DRIVER, made)
            await run.learner.begin_stage(stage)
            await publish_weights(run, run.progress.version + 1)
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)


async def _ask(run: Run, role: Role, leases: Sequence[Lease], prompts: Sequence[tuple[int, ...]]) -> list[Completion]:
    """One completion a lease; a prompt that leaves no room for one is answered with an empty text."""
    rollout = run.config.rollout
    how = sampling(rollout.policy if role is Role.POLICY else rollout.improver)
    requests = {
        number: GenerateRequest(
            f"{lease.uid}-{role}-apart", ids, replace(how, max_new_tokens=min(how.max_new_tokens, rollout.max_model_len - len(ids))),
            sampling_seed(lease.uid, role),
        )
        for number, (lease, ids) in enumerate(zip(leases, prompts, strict=True))
        if len(ids) < rollout.max_model_len
    }  # fmt: skip
    answers = dict(zip(requests, await run.fleet.generate(list(requests.values())), strict=True))
    return [answers[number] if number in answers else run.book.written("", run.progress.version) for number in range(len(leases))]


def _outcome(run: Run, lease: Lease, response: Completion, refinement: Completion) -> Outcome:
    if not response.text.strip():
        return Refusal(lease.uid, lease.stage, lease.prompt.prompt_id, RefusalReason.EMPTY, "the response is empty", response)
    unwrapped = run.book.unwrapped(refinement, response.text)
    prompt_ids = run.book.policy_ids(lease.prompt)
    return make_outcome(lease, prompt_ids, response, unwrapped, run.book.improver_template, run.config.preference.pair_gate)


async def _keep(run: Run, held: Sequence[Lease]) -> None:
    """Until cancelled: renew what the driver holds, thrice in the time it lasts."""
    while True:
        await asyncio.sleep(run.config.rollout.lease_s / 3)
        await run.buffer.renew(run.incarnation, DRIVER, [lease.uid for lease in held])
