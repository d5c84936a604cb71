"""The asynchronous face of the ledger: group commit, waits that are woken, waits that give up."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from sgpo_dist.buffer.service import PairBuffer
from sgpo_dist.errors import FencedError, RunFailed
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Stage
from sgpo_dist.roles import StagePlan

STAGE = Stage.PREFERENCE
PROMPTS = [Prompt(f"p{n}", (Message("user", f"question {n}"),)) for n in range(40)]


@asynccontextmanager
async def open_buffer(path, plan=None, **options):
    buffer = PairBuffer(path, **{"synchronous": "OFF", "tick_s": 0.02, "group_wait_s": 0.002, **options})
    try:
        incarnation = await buffer.begin_incarnation()
        await buffer.open_stage(incarnation, plan or StagePlan(STAGE, 7, batch_size=2, lease_s=30.0), PROMPTS, 0)
        yield buffer, incarnation
    finally:
        await buffer.close()


def pair(lease):
    half = Completion("text", (1, 2), FinishReason.STOP, lease.version)
    return PreferencePair(lease.uid, STAGE, lease.prompt, (3,), half, half, "v1")


async def put_together(buffer, inc, count):
    """Seconds that ``count`` concurrent puts of one pair each take."""
    leases = (await buffer.lease(inc, "w", STAGE, count)).leases
    started = time.monotonic()
    receipts = await asyncio.wait_for(asyncio.gather(*(buffer.put(inc, "w", [pair(lease)]) for lease in leases)), 20)
    assert sum(receipt.accepted for receipt in receipts) == count
    return time.monotonic() - started


def test_concurrent_puts_share_a_commit(tmp_path):
    async def play():
        async with open_buffer(tmp_path / "buffer.db", group_wait_s=0.2) as (buffer, inc):
            assert 0.04 <= await put_together(buffer, inc, 32) < 2.0  # one moment (a fifth of the wait) without another put, not 32

    asyncio.run(play())


def test_a_full_group_does_not_wait(tmp_path):
    async def play():
        async with open_buffer(tmp_path / "buffer.db", group_size=16, group_wait_s=15.0) as (buffer, inc):
            assert await put_together(buffer, inc, 16) < 5.0

    asyncio.run(play())


def test_a_lonely_put_waits_only_a_moment(tmp_path):
    async def play():
        async with open_buffer(tmp_path / "buffer.db") as (buffer, inc):
            lease = (await buffer.lease(inc, "w", STAGE, 1)).leases[0]
            receipt = await asyncio.wait_for(buffer.put(inc, "w", [pair(lease)]), 2)
            assert receipt.accepted == 1

    asyncio.run(play())


def test_each_caller_of_a_group_gets_its_own_answer(tmp_path):
    async def play():
        async with open_buffer(tmp_path / "buffer.db") as (buffer, inc):
            one, two = (await buffer.lease(inc, "w", STAGE, 2)).leases
            answers = await asyncio.gather(buffer.put(inc - 1, "w", [pair(one)]), buffer.put(inc, "w", [pair(two)]), return_exceptions=True)
            assert isinstance(answers[0], FencedError)
            assert answers[1].accepted == 1

    asyncio.run(play())


def test_a_failed_commit_reaches_every_caller(tmp_path):
    async def play():
        async with open_buffer(tmp_path / "buffer.db") as (buffer, inc):
            leases = (await buffer.lease(inc, "w", STAGE, 3)).leases
            rows = [pair(lease) for lease in leases]
            rows[1] = replace(rows[1], template=None)  # what no column takes
            puts = [buffer.put(inc, "w", [row]) for row in rows]
            answers = await asyncio.wait_for(asyncio.gather(*puts, return_exceptions=True), 5)
            assert all(isinstance(answer, Exception) for answer in answers)
            assert (await buffer.counts(STAGE)).leased == 3
            assert (await buffer.put(inc, "w", [rows[0], rows[2]])).accepted == 2

    asyncio.run(play())


def test_assign_is_woken_by_a_put(tmp_path):
    async def play():
        async with open_buffer(tmp_path / "buffer.db", tick_s=60.0) as (buffer, inc):
            batch = asyncio.create_task(buffer.assign(inc, STAGE, 1))
            for lease in (await buffer.lease(inc, "w", STAGE, 2)).leases:
                await asyncio.sleep(0.02)
                assert not batch.done()
                await buffer.put(inc, "w", [pair(lease)])
            assert len((await asyncio.wait_for(batch, 2)).pairs) == 2

    asyncio.run(play())


def test_assign_is_woken_by_a_new_version(tmp_path):
    async def play():
        plan = StagePlan(STAGE, 7, batch_size=1, max_staleness=0)
        async with open_buffer(tmp_path / "buffer.db", plan, tick_s=60.0) as (buffer, inc):
            await buffer.put(inc, "w", [pair((await buffer.lease(inc, "w", STAGE, 1)).leases[0])])
            assert (await buffer.assign(inc, STAGE, 1)).step == 1
            batch = asyncio.create_task(buffer.assign(inc, STAGE, 2))
            await asyncio.sleep(0.02)
            await buffer.advance(inc, STAGE, 1)
            await buffer.put(inc, "w", [pair((await buffer.lease(inc, "w", STAGE, 1)).leases[0])])
            assert (await asyncio.wait_for(batch, 2)).version == 1

    asyncio.run(play())


def test_assign_is_woken_when_a_crash_leaves_nothing_to_wait_for(tmp_path):
    async def play():
        plan = StagePlan(STAGE, 7, batch_size=41)
        async with open_buffer(tmp_path / "buffer.db", plan, tick_s=60.0, max_attempts=1) as (buffer, inc):
            await buffer.lease(inc, "w", STAGE, 40)
            batch = asyncio.create_task(buffer.assign(inc, STAGE, 1))
            await asyncio.sleep(0.02)
            await buffer.give_back(inc, "w")
            assert await asyncio.wait_for(batch, 2) is None

    asyncio.run(play())


def test_assign_ends_when_the_last_hung_worker_has_used_up_its_prompt(tmp_path):
    async def play():
        plan = StagePlan(STAGE, 7, batch_size=41, lease_s=0.01)
        async with open_buffer(tmp_path / "buffer.db", plan, max_attempts=1) as (buffer, inc):
            await buffer.lease(inc, "w", STAGE, 40)  # and never a word again
            assert await asyncio.wait_for(buffer.assign(inc, STAGE, 1), 5) is None
            await asyncio.wait_for(buffer.wait_exhausted(STAGE), 5)
            assert (await buffer.counts(STAGE)).refused == {"poison": 40}

    asyncio.run(play())


def test_a_wait_in_silence_gives_up_and_says_what_it_saw(tmp_path):
    async def play():
        async with open_buffer(tmp_path / "buffer.db") as (buffer, inc):
            await buffer.lease(inc, "w", STAGE, 3)
            said = (
                r"stage preference: no batch for step 1 \(too few finished pairs\) and no new outcome for 0.1 s;"
                " waiting 37, in generation 3, ready 0, refused 0, version 0"
            )
            with pytest.raises(RunFailed, match=said):
                await buffer.assign(inc, STAGE, 1, timeout_s=0.1)
            with pytest.raises(RunFailed, match="not settled"):
                await buffer.wait_exhausted(STAGE, timeout_s=0.1)

    asyncio.run(play())


def test_progress_renews_the_deadline(tmp_path):
    async def play():
        plan = StagePlan(STAGE, 7, batch_size=1, max_pairs=5)
        async with open_buffer(tmp_path / "buffer.db", plan) as (buffer, inc):
            settled = asyncio.create_task(buffer.wait_exhausted(STAGE, timeout_s=0.2))
            for lease in (await buffer.lease(inc, "w", STAGE, 5)).leases:
                await asyncio.sleep(0.08)
                await buffer.put(inc, "w", [pair(lease)])
            await asyncio.wait_for(settled, 2)

    asyncio.run(play())


def test_built_again_on_its_file_it_goes_on(tmp_path):
    async def play():
        async with open_buffer(tmp_path / "buffer.db") as (buffer, inc):
            leases = (await buffer.lease(inc, "w", STAGE, 3)).leases
            await buffer.put(inc, "w", [pair(leases[0])])
        again = PairBuffer(tmp_path / "buffer.db")
        assert (await again.put(inc, "w", [pair(lease) for lease in leases])).accepted == 2
        assert (await again.assign(inc, STAGE, 1)).step == 1
        await again.backup(str(tmp_path / "copy.db"))
        await again.close()

    asyncio.run(play())
    assert (tmp_path / "copy.db").is_file()


def test_scarce_prompts_are_shared_out_among_the_workers(tmp_path):
    """A version opens room for 2 x 3 pairs: the second worker to ask finds that the first took no more than its share."""

    async def story():
        plan = StagePlan(STAGE, 7, batch_size=3, weight_sync_interval=2, max_staleness=0, lease_s=30.0)
        async with open_buffer(tmp_path / "buffer.db", plan) as (buffer, inc):
            first = [len((await buffer.lease(inc, "a", STAGE, 1)).leases), len((await buffer.lease(inc, "b", STAGE, 1)).leases)]
            more = [len((await buffer.lease(inc, worker, STAGE, 40)).leases) for worker in ("a", "b")]
            await buffer.give_back(inc, "b", crashed=False)
            alone = len((await buffer.lease(inc, "a", STAGE, 40)).leases)
            return first, more, alone

    assert asyncio.run(story()) == ([1, 1], [3, 1], 2)  # half of 6 at most; 4 were left; b gave 2 back, and a is alone
