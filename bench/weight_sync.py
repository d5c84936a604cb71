"""New weights into a running engine, against two ways through the disk: the same model, float32, on the same cores.

What is counted, in all arms: from the weights in memory to the first token that they sample. ``restart``: write a model directory, start
vLLM (its import included), one token. On one running engine, ``reload``: ``save_pretrained``, vLLM's own ``reload_weights`` of that directory,
one token; and ``sync``: write the file to shared memory and digest it, ``receive`` (which proves the version with the probes), one token. Guard:
the engine's log-probs of the probes are those that transformers computes with the same weights; a reload's are told and no guard, since it leaves
a tied head stale.
Called by ``python -m bench``; also run as a child of itself.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from actors.vllm_engine import EngineSpec, VllmEngine, engine_environment
from bench.machine import Line, answer, environment, run_arm, seconds
from sgpo_dist.data.embedded_model import embedded_model_dir
from sgpo_dist.prompts import PromptBook, load_tokenizer
from sgpo_dist.records import Message, Prompt
from sgpo_dist.roles import GenerateRequest, Sampling
from sgpo_dist.starter import chat
from sgpo_dist.weights.checksum import checksum_safetensors
from sgpo_dist.weights.version import ProbeRow, WeightBundle, check_proof, mean_abs_gap

MODULE: Final = "bench.weight_sync"
TOLERANCE: Final = 2e-3
PROBES: Final = 4
NOISE: Final = 0.05
SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 the machine's shared memory is the place meant
ONE_TOKEN: Final = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=1)
START_DEADLINE_S: Final = 240.0
DEADLINE_S: Final = 60.0

Logps = tuple[tuple[float, ...], ...]


def measure(repeats: int, restarts: int) -> list[Line]:
    """Both ratios. ``restarts`` engines are started; the first goes on to receive ``repeats`` versions and reload as many."""
    variables = environment(allocator=False)
    running = run_arm(MODULE, "running", {"repeats": repeats}, variables)
    others = [run_arm(MODULE, "restart", {}, variables) for _ in range(restarts - 1)]
    started, synced, reloaded = [arm["restart"] for arm in (running, *others)], [running["sync"]], [running["reload"]]
    gap = max(value for arm in (*started, *synced) for value in arm["gaps"])
    guard = f"mean gap of the probes' log-probs to transformers' {gap:.1e} nats, allowed {TOLERANCE:.0e}"
    share = sum(synced[0]["stall_s"]) / sum(synced[0]["took_s"])
    notes = (
        f"requests stand still for {share:.2f} of a sync (goal C6: at most 0.5)",
        f"of a sync: write and digest {max(synced[0]['write_s']):.2f} s, requests stalled {max(synced[0]['stall_s']):.2f} s (longest of each)",
        "counted: from the weights in memory to the first token that they sample",
    )
    left = f"after reload_weights the probes are {max(reloaded[0]['gaps']):.1e} nats off, and nothing says so; ours proves each version"
    ours, passed = seconds(synced, "took_s"), gap <= TOLERANCE
    return [
        Line("weight sync, engine restart", "save and restart", seconds(started, "took_s"), ours, guard, passed, notes),
        Line("weight sync, save and reload", "save and reload", seconds(reloaded, "took_s"), ours, guard, passed, (left,)),
    ]


# ---- the arms -------------------------------------------------------------------------------------------------------------------------


async def run_engine(
    model: Any, probes: tuple[ProbeRow, ...], prompt_ids: tuple[int, ...], folder: Path, memory: Path, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """A restart; on its engine ``repeats`` perturbed versions each way, after one each that warms up. Reloads come last, as they leave a tied
    head stale.
    """
    perturb(model, seed=1)
    expected = transformers_logps(model, probes)
    began = time.perf_counter()
    directory = folder / "model"
    shutil.copytree(embedded_model_dir(), directory, ignore=shutil.ignore_patterns("*.safetensors"))
    save_weights(model, directory / "model.safetensors")
    spec = engine_spec(directory, probes)
    os.environ.update(engine_environment(spec))
    engine = VllmEngine(spec)
    try:
        await asyncio.wait_for(engine.start(), START_DEADLINE_S)
        await first_token(engine, prompt_ids, "first")
        took = time.perf_counter() - began
        got = await asyncio.wait_for(engine.logps(probes), DEADLINE_S)
        found = {"restart": {"took_s": [took], "gaps": [mean_abs_gap(expected, got)]}}
        for name, once, place in (("sync", _sync_once, memory), ("reload", _reload_once, folder)) if repeats else ():
            rows = [await once(engine, model, version, probes, prompt_ids, place) for version in range(repeats + 1)]
            found[name] = {key: [row[key] for row in rows[1:]] for key in rows[0]}
    finally:
        await engine.stop()
    return found


async def _reload_once(
    engine: VllmEngine, model: Any, version: int, probes: tuple[ProbeRow, ...], prompt_ids: tuple[int, ...], folder: Path
) -> dict[str, float]:
    perturb(model, seed=version)
    expected = transformers_logps(model, probes)
    began = time.perf_counter()
    model.save_pretrained(folder)
    await engine._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
    await engine._llm.reset_prefix_cache()
    await first_token(engine, prompt_ids, f"first-reloaded-{version}")
    took = time.perf_counter() - began
    return {"took_s": took, "gaps": mean_abs_gap(expected, await asyncio.wait_for(engine.logps(probes), DEADLINE_S))}


async def _sync_once(
    engine: VllmEngine, model: Any, version: int, probes: tuple[ProbeRow, ...], prompt_ids: tuple[int, ...], folder: Path
) -> dict[str, float]:
    perturb(model, seed=version)
    expected = transformers_logps(model, probes)
    path = folder / f"v{version}.safetensors"
    began = time.perf_counter()
    names = save_weights(model, path)
    checksum = checksum_safetensors(str(path))
    written = time.perf_counter()
    bundle = WeightBundle(version, "shm", str(path), "here", checksum, path.stat().st_size, names, expected)
    proof = await asyncio.wait_for(engine.receive(bundle), DEADLINE_S)
    await first_token(engine, prompt_ids, f"first-{version}")
    ended = time.perf_counter()
    path.unlink()
    return {"took_s": ended - began, "write_s": written - began, "stall_s": proof.stall_s, "gaps": check_proof(bundle, proof, TOLERANCE)}


async def first_token(engine: VllmEngine, prompt_ids: tuple[int, ...], name: str) -> None:
    """Returns when the engine has sampled one token."""
    await asyncio.wait_for(engine.generate(GenerateRequest(name, prompt_ids, ONE_TOKEN, seed=0)), DEADLINE_S)


# ---- the model ------------------------------------------------------------------------------------------------------------------------


def perturb(model: Any, seed: int) -> None:
    """Noise of 5 % of its spread on every weight, so that a stale one would show."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * NOISE)


def save_weights(model: Any, path: Path) -> tuple[str, ...]:
    """One safetensors file, the tied head left out; returns the names."""
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, path, metadata={"format": "pt"})
    return tuple(sorted(tensors))


def transformers_logps(model: Any, probes: tuple[ProbeRow, ...]) -> Logps:
    """Per-token log-probs of the probes' completions by a plain forward pass."""
    import torch

    rows = []
    for probe in probes:
        with torch.no_grad():
            logps_L_V = torch.log_softmax(model(torch.tensor([probe.prompt_ids + probe.completion_ids])).logits[0], dim=-1)
        first = len(probe.prompt_ids) - 1
        rows.append(tuple(logps_L_V[first + place, token].item() for place, token in enumerate(probe.completion_ids)))
    return tuple(rows)


def engine_spec(directory: Path, probes: tuple[ProbeRow, ...]) -> EngineSpec:
    """A small float32 engine, as a run on a laptop has it."""
    return EngineSpec(str(directory), max_model_len=512, kv_cache_gib=0.5, probes=probes, max_num_seqs=32, log_level="WARNING")


def probe_rows(book: PromptBook) -> tuple[ProbeRow, ...]:
    """The first held-out chat rows with their references."""
    rows = chat.rows("heldout")[:PROBES]
    prompts = [Prompt(row["id"], (Message("user", row["prompt"]),)) for row in rows]
    return tuple(ProbeRow.cut(book.policy_ids(prompt), book.completion_ids(row["reference"])) for prompt, row in zip(prompts, rows, strict=True))


def main() -> None:
    """An engine's restart, and with ``running`` what follows on it, as a child of ``measure``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=["restart", "running"], required=True)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32).eval()
    probes = probe_rows(PromptBook(load_tokenizer(embedded_model_dir())))
    shared = SHARED_MEMORY if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2**30 else None
    with tempfile.TemporaryDirectory(prefix="sgpo-bench-") as folder, tempfile.TemporaryDirectory(prefix="sgpo-bench-", dir=shared) as memory:
        repeats = options.repeats if options.arm == "running" else 0
        found = asyncio.run(run_engine(model, probes, probes[0].prompt_ids, Path(folder), Path(memory), repeats))
    answer(options.arm, **found)


if __name__ == "__main__":
    main()
