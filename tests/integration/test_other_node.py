"""A worker on another node than the learner's, under real Ray with a real engine: it gets the first version whole, the next as a patch.

Two raylets on this machine stand for the nodes. Both could open the same files, which therefore are away while the worker takes a version.
Bfloat16, where patches are small. Processors without products of bfloat16 round otherwise: gaps of 0.07 nats were seen there.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from pathlib import Path

import pytest
from fleet_story import SEEN, fleet_spec, told

from sgpo_dist.weights.files import PREFIX, SHARED_MEMORY

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(660)]

TOLERANCE = 0.1


def test_a_worker_on_another_node_takes_versions_whole_and_by_patches(tmp_path: Path) -> None:
    seen = told(__file__, tmp_path, 600)
    print(seen)
    assert seen["node"] != seen["here"]
    assert seen["bases"][0] == ""
    assert [Path(base).name for base in seen["bases"][1:]] == ["v0", "v1"]
    assert seen["sizes"][0] == seen["file"]
    assert max(seen["sizes"][1:]) < 0.05 * seen["file"]
    assert max(seen["gaps"]) < TOLERANCE < min(seen["moved"])  # no version could pass for another
    assert seen["refused"].startswith("got a patch on")
    assert list(SHARED_MEMORY.glob(f"{PREFIX}-rollout-0.1.1-*")) == []


async def story(folder: Path) -> dict[str, object]:
    import ray
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from actors.fleet import RayLauncher
    from sgpo_dist.buffer.service import PairBuffer
    from sgpo_dist.data.embedded_model import embedded_model_dir
    from sgpo_dist.errors import WeightSyncError
    from sgpo_dist.prompts import PromptBook, load_tokenizer
    from sgpo_dist.records import Message, Prompt
    from sgpo_dist.weights.checksum import checksum_safetensors
    from sgpo_dist.weights.version import ProbeRow, WeightBundle, check_proof

    directory = embedded_model_dir()
    book = PromptBook(load_tokenizer(directory))
    prompt = Prompt("q", (Message("user", "What is the capital of France?"),))
    probes = (ProbeRow(book.policy_ids(prompt), book.completion_ids("The capital of France is Paris, on the Seine.")),)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(0)

    def logps() -> tuple[float, ...]:
        [row] = probes
        with torch.no_grad():
            scored = torch.log_softmax(model(torch.tensor([row.prompt_ids + row.completion_ids])).logits[0].float(), dim=-1)
        first = len(row.prompt_ids) - 1
        return tuple(scored[first + place, token].item() for place, token in enumerate(row.completion_ids))

    def nudge() -> None:
        """As a step does: one weight in a hundred becomes another."""
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.2 * (torch.rand(parameter.shape, generator=generator) < 0.01).to(parameter.dtype))

    here = str(ray.get_runtime_context().get_node_id())

    def bundle(version: int) -> WeightBundle:
        path = folder / f"v{version}"
        save_file({name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}, path)
        return WeightBundle(version, "shm", str(path), here, checksum_safetensors(str(path)), path.stat().st_size, (), (logps(),))

    spec = fleet_spec(folder, directory, probes, "bfloat16", tolerance=TOLERANCE, max_restarts=0)
    buffer = ray.remote(PairBuffer).options(num_cpus=0, max_concurrency=1000).remote(str(folder / "buffer.db"))
    launcher = RayLauncher(spec, buffer)
    worker = launcher("rollout-0.1.1", 0, 1, ())
    seen: dict[str, list[object]] = {"bases": [], "sizes": [], "gaps": [], "moved": []}
    before = logps()
    try:
        await worker.start()
        for version in range(3):
            nudge()
            newest = bundle(version)
            payload = await launcher.carrier.payload(newest, worker.held)  # the worker's call shares it
            seen["bases"].append(payload.base)
            seen["sizes"].append(len(payload.data))
            away = Path(newest.uri).rename(folder / "away")  # so the worker has the payload and nothing else
            seen["gaps"].append(check_proof(newest, await worker.receive(newest), spec.tolerance))
            away.rename(newest.uri)
            seen["moved"].append(statistics.fmean(abs(a - b) for a, b in zip(before, newest.probe_logps[0], strict=True)))
            before = newest.probe_logps[0]
        refused = ""
        worker.held = str(folder / "v1")  # not what it holds
        nudge()
        newest = bundle(3)
        try:
            await worker.receive(newest)
        except WeightSyncError as problem:
            refused = str(problem)
        worker.held = ""
        seen["gaps"].append(check_proof(newest, await worker.receive(newest), spec.tolerance))
        await worker.stop()
    finally:
        worker.kill()
    return {**seen, "node": worker.node, "here": here, "file": (folder / "v0").stat().st_size, "refused": refused}


def main(folder: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    cluster.add_node(num_cpus=0, include_dashboard=False, object_store_memory=600 << 20)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    cluster.add_node(num_cpus=1, object_store_memory=600 << 20)
    try:
        seen = asyncio.run(story(folder))
    finally:
        ray.shutdown()
        cluster.shutdown()
    (folder / SEEN).write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
