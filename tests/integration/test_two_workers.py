"""Two rollout workers on this machine, under real Ray, with real engines and the real buffer: one supervised fleet.

They share the prompts without making any twice, take versions while they generate, and when one is killed its prompts come back and a
successor with the right weights takes its place.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from fleet_story import SEEN, fleet_spec, told

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1000)]

PROMPTS = 16


@pytest.mark.fault(1, invariants="I1 I3 I6")
def test_two_workers_share_prompts_take_versions_and_survive_a_kill(tmp_path: Path) -> None:
    seen = told(__file__, tmp_path, 900)
    assert len(seen["uids"]) == len(set(seen["uids"])) == PROMPTS  # each prompt has exactly one outcome
    assert len(seen["workers"]) == 3  # two, and the successor of the killed one
    assert seen["versions"] == [[0, 0], [1, 1]]
    assert max(seen["gaps"]) < 2e-3
    assert [event for event, _ in seen["events"]].count("worker_lost") == 1
    assert seen["successor_version"] == 1
    assert seen["alone"] == seen["again"]  # the same request answered by another worker, with the same weights
    assert seen["pairs"] > 0
    assert min(seen["pair_versions"]) >= 0
    assert seen["left_alive"] == []
    logs = sorted(path.name for path in (tmp_path / "logs").glob("*.log"))
    assert len(logs) == 3
    assert all((tmp_path / "logs" / name).stat().st_size > 0 for name in logs)


async def story(folder: Path) -> dict[str, object]:
    import ray

    from actors.fleet import RayFleet
    from actors.handles import RemoteBuffer
    from sgpo_dist.buffer.service import PairBuffer
    from sgpo_dist.data.embedded_model import embedded_model_dir
    from sgpo_dist.prompts import PromptBook, load_tokenizer
    from sgpo_dist.records import Message, Prompt, Stage
    from sgpo_dist.roles import GenerateRequest, GenerationTask, Sampling, StagePlan
    from sgpo_dist.weights.checksum import checksum_safetensors
    from sgpo_dist.weights.version import ProbeRow, WeightBundle, check_proof

    model = embedded_model_dir()
    book = PromptBook(load_tokenizer(model))
    prompts = tuple(Prompt(f"q{i}", (Message("user", f"Say something kind about the number {i}."),)) for i in range(PROMPTS))
    probes = (ProbeRow(book.policy_ids(prompts[0]), book.completion_ids("Zero is where all counting begins.")),)
    spec = fleet_spec(folder, model, probes, "float32", tolerance=2e-3, max_restarts=3)
    events: list[tuple[str, dict[str, object]]] = []
    handle = ray.remote(PairBuffer).options(num_cpus=0, max_restarts=-1, max_concurrency=1000).remote(str(folder / "buffer.db"))
    buffer = RemoteBuffer(handle)
    incarnation = await buffer.begin_incarnation()
    fleet = RayFleet(spec, handle, lambda kind, **fields: events.append((kind, fields)))
    try:
        await fleet.start(2)
        expected = transformers_logps(model, probes[0])
        file = model / "model.safetensors"
        checksum = checksum_safetensors(str(file))
        here = ray.get_runtime_context().get_node_id()
        bundles = [WeightBundle(version, "shm", str(file), here, checksum, 0, (), (expected,)) for version in range(2)]
        proofs = [await fleet.publish(bundles[0])]
        how = Sampling(0.9, 1.0, 0, 16)
        task = GenerationTask(Stage.PREFERENCE, incarnation, how, how, {"default": "improver"})
        plan = StagePlan(Stage.PREFERENCE, run_seed=1, batch_size=4, max_staleness=None, lease_s=60.0)
        await buffer.open_stage(incarnation, plan, prompts, 0)
        watching = asyncio.ensure_future(fleet.supervise())
        request = GenerateRequest("same", book.policy_ids(prompts[3]), Sampling(0.8, 1.0, 0, 12), 77)
        [alone] = await fleet.generate([request])
        await fleet.begin(task)
        while (await buffer.counts(Stage.PREFERENCE)).leased < 8:
            await asyncio.sleep(0.05)
        proofs.append(await fleet.publish(bundles[1]))
        await buffer.advance(incarnation, Stage.PREFERENCE, 1)
        victim = fleet.processes()[0]
        os.kill(victim[0], signal.SIGKILL)
        await asyncio.wait_for(buffer.wait_exhausted(Stage.PREFERENCE), 150)
        while len([1 for kind, _ in events if kind == "worker_started"]) < 3:
            await asyncio.sleep(0.2)
        await asyncio.sleep(3 * spec.heartbeat_every_s)
        stats = {row.worker_id: row for row in await fleet.stats()}
        successor = [str(fields["worker"]) for kind, fields in events if kind == "worker_started"][2]
        answers = await fleet.generate([request, GenerateRequest("other", request.prompt_ids, request.sampling, 77)])
        await fleet.end()
        pairs, refusals = await buffer.pairs(Stage.PREFERENCE), await buffer.refusals(Stage.PREFERENCE)
        watching.cancel()
        everyone = [*victim, *(pid for worker in fleet.processes() for pid in worker)]
        return {
            "uids": [pair.uid for pair in pairs] + [refusal.uid for refusal in refusals],
            "pairs": len(pairs),
            "pair_versions": [pair.version for pair in pairs] or [0],
            "workers": sorted({str(fields["worker"]) for kind, fields in events if kind == "worker_started"}),
            "versions": [sorted(proof.version for proof in some) for some in proofs],
            "gaps": [check_proof(bundle, proof, 2e-3) for bundle, some in zip(bundles, proofs, strict=True) for proof in some],
            "events": events,
            "successor_version": stats[successor].version,
            "alone": alone.token_ids,
            "again": answers[1].token_ids,
            "stall_s": [proof.stall_s for some in proofs for proof in some],
            "total_s": [proof.total_s for some in proofs for proof in some],
            "everyone": everyone,
        }
    finally:
        await fleet.stop()
        await asyncio.sleep(3)  # engines follow their actors within moments


def transformers_logps(model: Path, row: object) -> tuple[float, ...]:
    import torch
    from transformers import AutoModelForCausalLM

    prompt, completion = row.prompt_ids, row.completion_ids  # type: ignore[attr-defined]
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logps = torch.log_softmax(network(torch.tensor([prompt + completion])).logits[0], dim=-1)
    return tuple(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion))


def main(folder: Path) -> None:
    import psutil
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=200 * 2**20)
    try:
        seen = asyncio.run(story(folder))
    finally:
        ray.shutdown()
    alive = [pid for pid in seen["everyone"] if psutil.pid_exists(pid)]  # type: ignore[attr-defined]
    (folder / SEEN).write_text(json.dumps({**seen, "left_alive": alive}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
