"""The engine on real vLLM with the embedded model: new weights taken in flight compute what transformers computes with them.

One engine serves all tests of the file (its start takes most of the time), one more lives in a process of its own that is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from actors.vllm_engine import EngineSpec, VllmEngine, engine_arguments, engine_environment
from sgpo_dist.data.embedded_model import embedded_model_dir
from sgpo_dist.errors import WeightSyncError
from sgpo_dist.prompts import PromptBook, load_tokenizer
from sgpo_dist.records import Completion, FinishReason, Message, Prompt
from sgpo_dist.roles import GenerateRequest, Sampling
from sgpo_dist.turns import held
from sgpo_dist.weights.checksum import checksum_safetensors
from sgpo_dist.weights.version import ProbeRow, WeightBundle, WeightProof, check_proof, mean_abs_gap

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # vLLM leaves a pipe of its children to the collector
]

ROOT = Path(__file__).parents[2]
GREEDY = Sampling(0.0, 1.0, 0, 24)
WARM = Sampling(0.9, 0.95, 0, 32)
TOLERANCE = 2e-3
TURNS = f"test-{os.getpid()}"
T = TypeVar("T")
Run = Callable[[Awaitable[T]], T]


def huge_pages_to_be_had() -> bool:
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    name, version = platform.libc_ver()
    return switch.exists() and "[never]" not in switch.read_text() and name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)


def questions(count: int) -> list[Prompt]:
    return [
        Prompt(f"q{i}", (Message("user", f"Tell me in a few sentences what the number {i} is used for in daily life, please."),))
        for i in range(count)
    ]


def probes_of(book: PromptBook) -> tuple[ProbeRow, ...]:
    texts = ("The capital of France is Paris.", "Seven is a lucky number in many countries, and a week has seven days.")
    return tuple(ProbeRow(book.policy_ids(prompt), book.completion_ids(text)) for prompt, text in zip(questions(2), texts, strict=True))


@dataclass
class Reference:
    """The same model in transformers, and files of its weights as the learner's sender would write them."""

    model: Any
    probes: tuple[ProbeRow, ...]
    folder: Path

    def perturbed(self, seed: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * 0.05)

    def logps(self) -> tuple[tuple[float, ...], ...]:
        import torch

        rows = []
        for row in self.probes:
            with torch.no_grad():
                logps = torch.log_softmax(self.model(torch.tensor([row.prompt_ids + row.completion_ids])).logits[0], dim=-1)
            first = len(row.prompt_ids) - 1
            rows.append(tuple(logps[first + i, token].item() for i, token in enumerate(row.completion_ids)))
        return tuple(rows)

    def bundle(self, version: int) -> WeightBundle:
        from safetensors.torch import save_file

        tensors = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items() if name != "lm_head.weight"}
        path = self.folder / f"v{version}.safetensors"
        save_file(tensors, path)
        size = path.stat().st_size
        return WeightBundle(version, "shm", str(path), "node", checksum_safetensors(str(path)), size, tuple(sorted(tensors)), self.logps())


@pytest.fixture(scope="module")
def run() -> Iterator[Run[Any]]:
    """One event loop for the file: an engine lives in the loop it was started in."""
    loop = asyncio.new_event_loop()
    yield lambda work: loop.run_until_complete(asyncio.wait_for(work, 200))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


@pytest.fixture(scope="module")
def book() -> PromptBook:
    return PromptBook(load_tokenizer(embedded_model_dir()))


@pytest.fixture(scope="module")
def reference(book: PromptBook, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    return Reference(model.eval(), probes_of(book), tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def engine(run: Run[Any], reference: Reference) -> Iterator[VllmEngine]:
    spec = EngineSpec(
        str(embedded_model_dir()), max_model_len=512, kv_cache_gib=0.5, probes=reference.probes, max_num_seqs=64, log_level="WARNING", turns=TURNS
    )
    before = dict(os.environ)
    os.environ.update(engine_environment(spec))
    started = VllmEngine(spec)
    run(started.start())
    run(started.receive(reference.bundle(0)))
    yield started
    run(started.stop())
    os.environ.clear()
    os.environ.update(before)


def request(book: PromptBook, prompt: Prompt, seed: int, how: Sampling, name: str) -> GenerateRequest:
    return GenerateRequest(name, book.policy_ids(prompt), how, seed)


async def together(engine: VllmEngine, requests: list[GenerateRequest]) -> list[Completion]:
    return list(await asyncio.gather(*(engine.generate(one) for one in requests)))


def test_answers_end_with_the_end_token_in_the_ids_and_without_it_in_the_text(run: Run[Any], engine: VllmEngine, book: PromptBook) -> None:
    prompt = Prompt("france", (Message("user", "What is the capital of France?"),))
    answer = run(engine.generate(request(book, prompt, 0, GREEDY, "france")))
    assert answer.text == "The capital of France is Paris."
    assert answer.finish_reason is FinishReason.STOP
    assert answer.token_ids[-1] == book.eos_id
    assert answer.token_ids == book.completion_ids(answer.text)
    cut = run(engine.generate(request(book, prompt, 0, Sampling(0.0, 1.0, 0, 3), "france-cut")))
    assert (cut.finish_reason, cut.token_ids) == (FinishReason.LENGTH, answer.token_ids[:3])


def test_log_probs_after_a_sync_are_transformers_own(run: Run[Any], engine: VllmEngine, reference: Reference) -> None:
    before = run(engine.logps(reference.probes))
    assert mean_abs_gap(before, reference.logps()) < TOLERANCE
    for version in (1, 2):  # twice: the second finds what the first left behind
        reference.perturbed(version)
        bundle = reference.bundle(version)
        assert mean_abs_gap(before, bundle.probe_logps) > 0.05  # the new weights are far enough away for the test to mean something
        proof = run(engine.receive(bundle))
        assert check_proof(bundle, proof, TOLERANCE) < 1e-4
        assert 0.0 < proof.stall_s < proof.total_s
        assert engine.version == version


@pytest.mark.skipif(not huge_pages_to_be_had(), reason="no huge pages on request: the kernel forbids them, or glibc is older than 2.35")
def test_the_weights_lie_in_huge_pages(run: Run[Any], engine: VllmEngine) -> None:
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in run(engine.pids())]
    huge_kib = [int(re.findall(r"AnonHugePages: +(\d+)", rollup)[0]) for rollup in rollups]
    assert max(huge_kib) > embedded_model_dir().joinpath("model.safetensors").stat().st_size / 1024


def test_without_packing_the_tied_head_again_the_proof_fails(run: Run[Any], engine: VllmEngine, reference: Reference) -> None:
    from actors.weight_receiver import shm_init_info

    reference.perturbed(3)
    bundle = reference.bundle(3)
    run(engine.init_weight_transfer_engine(shm_init_info(repack_tied_head=False)))
    stale = run(engine.receive(bundle))
    assert stale.checksum == bundle.checksum  # the bytes are right; only the log-probs tell
    with pytest.raises(WeightSyncError, match="computes other log-probs"):
        check_proof(bundle, stale, TOLERANCE)
    run(engine.init_weight_transfer_engine(shm_init_info()))
    assert check_proof(bundle, run(engine.receive(bundle)), TOLERANCE) < 1e-4


def test_the_prefix_cache_does_not_touch_log_probs(run: Run[Any], engine: VllmEngine, book: PromptBook, reference: Reference) -> None:
    fresh = run(engine.logps(reference.probes))
    run(together(engine, [GenerateRequest(f"warm-{i}", row.prompt_ids, WARM, i) for i, row in enumerate(reference.probes)]))
    again = run(engine.logps(reference.probes))
    assert [len(row) for row in again] == [len(row.completion_ids) for row in reference.probes]
    assert mean_abs_gap(fresh, again) < 1e-5


def test_a_prompt_shorter_than_vllms_own_block_is_found_in_the_prefix_cache_again(run: Run[Any], engine: VllmEngine, book: PromptBook) -> None:
    from vllm import SamplingParams

    ids = book.policy_ids(questions(1)[0])
    assert 32 < len(ids) < 128
    outputs = [run(engine._run(f"again-{i}", ids, SamplingParams(temperature=0.0, max_tokens=8))) for i in range(2)]
    assert outputs[1].num_cached_tokens >= 32
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids


def test_same_seed_and_version_give_the_same_answer_alone_and_in_a_crowd(run: Run[Any], engine: VllmEngine, book: PromptBook) -> None:
    """The crowd's prompts together exceed one prefill budget: cut into chunks, seeded requests kill vLLM's CPU worker."""
    prompts = questions(64)
    assert sum(len(book.policy_ids(prompt)) for prompt in prompts) > 2048
    alone = [run(engine.generate(request(book, prompts[i], 100 + i, WARM, f"alone-{i}"))) for i in (0, 5)]
    crowd = run(together(engine, [request(book, prompt, 100 + i, WARM, f"crowd-{i}") for i, prompt in enumerate(prompts)]))
    assert [crowd[i].token_ids for i in (0, 5)] == [answer.token_ids for answer in alone]
    assert len({answer.token_ids for answer in crowd}) > 60  # seeds and prompts do differ


def test_requests_in_flight_survive_an_update_and_keep_their_older_stamp(
    run: Run[Any], engine: VllmEngine, book: PromptBook, reference: Reference
) -> None:
    version = engine.version
    long = Sampling(1.2, 1.0, 0, 64)
    bundle = reference.bundle(version + 1)

    async def update_in_flight() -> tuple[list[Completion], Completion, bool]:
        flying = asyncio.ensure_future(together(engine, [request(book, prompt, i, long, f"fly-{i}") for i, prompt in enumerate(questions(12))]))
        await asyncio.sleep(0.7)
        await engine.receive(bundle)
        still_flying = not flying.done()
        later = await engine.generate(request(book, questions(1)[0], 1, GREEDY, "later"))
        return await flying, later, still_flying

    answers, later, still_flying = run(update_in_flight())
    assert still_flying  # else nothing was in flight and the test says nothing
    assert all(answer.version == version and answer.token_ids and answer.finish_reason is not FinishReason.ABORT for answer in answers)
    assert later.version == version + 1 == engine.version


def test_what_begins_after_an_update_reads_no_older_prefix(run: Run[Any], engine: VllmEngine, book: PromptBook, reference: Reference) -> None:
    import torch

    prompt = Prompt("long", (Message("user", "Write about the sea. " * 60),))  # longer than a block of the cache, which alone is shared
    ids = book.policy_ids(prompt)
    before = run(engine.generate(request(book, prompt, 0, GREEDY, "before")))
    reference.perturbed(4)
    run(engine.receive(reference.bundle(engine.version + 1)))
    after = run(engine.generate(request(book, prompt, 0, GREEDY, "after")))
    with torch.no_grad():
        whole = reference.model.generate(torch.tensor([ids]), max_new_tokens=GREEDY.max_new_tokens, do_sample=False)
    assert after.token_ids == tuple(whole[0, len(ids) :].tolist())
    assert after.token_ids != before.token_ids


def test_requests_stand_still_in_the_learners_turn_and_go_on_as_if_nothing_had_been(run: Run[Any], engine: VllmEngine, book: PromptBook) -> None:
    requests = [request(book, prompt, seed, WARM, f"turn-{seed}") for seed, prompt in enumerate(questions(4))]
    expected = run(together(engine, requests))

    async def disturbed() -> list[Completion]:
        answers = asyncio.gather(*(engine.generate(replace(one, request_id=f"{one.request_id}-again")) for one in requests))
        await asyncio.sleep(0.3)  # amid their tokens
        with held(TURNS):
            await asyncio.sleep(0.5)
            seen = engine._last_token
            await asyncio.sleep(3.0)
            assert not answers.done()
            assert engine._last_token == seen
            await engine.check()  # alive, though silent
        return list(await answers)

    began = time.monotonic()
    assert [answer.token_ids for answer in run(disturbed())] == [answer.token_ids for answer in expected]
    assert time.monotonic() - began > 3.5


def test_a_turn_that_is_too_long_is_cut(run: Run[Any], engine: VllmEngine, book: PromptBook, monkeypatch: pytest.MonkeyPatch) -> None:
    async def disturbed() -> float:
        answer = asyncio.ensure_future(engine.generate(request(book, questions(1)[0], 0, WARM, "long-turn")))
        await asyncio.sleep(0.2)
        with held(TURNS):
            began = time.monotonic()
            await asyncio.wait_for(answer, 60)
            return time.monotonic() - began

    monkeypatch.setattr("actors.vllm_engine._LONGEST_TURN_S", 2.0)
    assert run(disturbed()) > 2.0


def test_an_engine_with_half_a_version_does_not_go_on_after_a_turn(run: Run[Any], engine: VllmEngine, book: PromptBook) -> None:
    async def disturbed() -> bool:
        answer = asyncio.ensure_future(engine.generate(request(book, questions(1)[0], 0, WARM, "half")))
        await asyncio.sleep(0.2)
        with held(TURNS):
            await asyncio.sleep(0.5)
            engine._broken = "a version was not taken whole"
        try:
            await asyncio.sleep(1.0)
            assert not answer.done()
            return await engine._llm.is_paused()
        finally:  # other tests use this engine
            engine._broken = ""
            await engine._llm.resume_generation()
            await answer

    assert run(disturbed())


def test_a_version_is_taken_in_the_learners_turn(run: Run[Any], engine: VllmEngine, book: PromptBook, reference: Reference) -> None:
    async def disturbed() -> WeightProof:
        answer = asyncio.ensure_future(engine.generate(request(book, questions(1)[0], 0, Sampling(0.9, 1.0, 0, 200), "amid")))
        await asyncio.sleep(0.3)
        with held(TURNS):
            await asyncio.sleep(0.5)
            proof = await asyncio.wait_for(engine.receive(bundle), 60)
        await answer
        return proof

    reference.perturbed(5)
    bundle = reference.bundle(engine.version + 1)
    assert check_proof(bundle, run(disturbed()), TOLERANCE) < 1e-4


def test_the_kernels_for_norms_are_chosen_and_compute_what_vllms_own_way_does(caplog: pytest.LogCaptureFixture) -> None:
    """Of bfloat16 where the processor has instructions that round to it; elsewhere the kernels cut it off."""
    import torch
    from vllm import ir

    import actors.weight_receiver  # noqa: F401 what every worker of an engine imports
    from actors.norm_kernels import PRIORITY, PROVIDER, tell_left_out

    assert engine_arguments(EngineSpec("x"))["ir_op_priority"] == PRIORITY
    taken = {torch.float32: True, torch.bfloat16: torch.cpu.get_capabilities()["avx512_bf16"]}
    tell_left_out.cache_clear()
    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x, residual, weight = (torch.randn(rows, 576, generator=generator).to(dtype) for rows in (7, 7, 1))
        for name, inputs in (("rms_norm", (x,)), ("fused_add_rms_norm", (x, residual))):
            op = getattr(ir.ops, name)
            with op.set_priority([PROVIDER, "native"]):
                chosen = op.dispatch(*inputs, weight[0], 1e-5)
                odd = [tensor.t().contiguous().t() for tensor in inputs]  # what the kernels cannot take
                assert [op.dispatch(*odd, weight[0], 1e-5).provider, op.dispatch(*inputs, None, 1e-5).provider] == ["native"] * 2
            assert chosen.provider == (PROVIDER if taken[dtype] else "native")
            expected = op.impls["native"].impl_fn(*inputs, weight[0], 1e-5)
            found = chosen.impl_fn(*(tensor.clone() for tensor in inputs), weight[0], 1e-5)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
            if name == "fused_add_rms_norm":
                assert torch.equal(found[1], x + residual)  # rounded, not cut off
    assert [record.args for record in caplog.records] == ([] if all(taken.values()) else [("bfloat16",)])


def test_a_nucleus_holds_all_that_is_sampled_and_needs_no_sorting(run: Run[Any], engine: VllmEngine, book: PromptBook, reference: Reference) -> None:
    """Mixed with requests that ask for something else; the first token, by transformers' own probabilities."""
    import torch
    from vllm.v1.sample.ops import topk_topp_sampler

    import actors.weight_receiver  # noqa: F401 what every worker of an engine imports

    assert topk_topp_sampler.apply_top_k_top_p_pytorch.__module__ == "actors.nucleus"
    prompt, p = questions(1)[0], 0.8
    narrow, wide = (Sampling(temperature=1.5, top_p=share, top_k=0, max_new_tokens=1) for share in (p, 1.0))
    requests = [request(book, prompt, seed, how, f"n{seed}-{how.top_p}") for seed in range(24) for how in (narrow, wide)]
    answers = run(together(engine, requests))
    with torch.no_grad():
        logits_V = reference.model(torch.tensor([book.policy_ids(prompt)])).logits[0, -1]
    values_V, places_V = (logits_V / 1.5).softmax(-1).sort(descending=True)
    nucleus = set(places_V[values_V.cumsum(-1) - values_V < p].tolist())
    inside, outside = ([answer.token_ids[0] in nucleus for answer in answers[start::2]] for start in (0, 1))
    assert 1 < len(nucleus) < logits_V.numel()
    assert all(inside)
    assert not all(outside)


def test_vllms_own_filter_keeps_what_ours_keeps() -> None:
    import torch
    from vllm.v1.sample.ops import topk_topp_sampler

    import actors.weight_receiver  # noqa: F401 puts ours in its place
    from actors.nucleus import WIDTH

    ours = topk_topp_sampler.apply_top_k_top_p_pytorch
    theirs = inspect.getclosurevars(ours).nonlocals["by_sorting"]
    logits_B_V = 4 * torch.randn(6, 4 * WIDTH, generator=torch.Generator().manual_seed(0))
    k_B, p_B = torch.tensor([1, 5, 4 * WIDTH, 40, 900, 300]), torch.tensor([0.9, 0.8, 0.95, 0.5, 0.99, 0.3])
    kept, expected = (torch.isfinite(apply(logits_B_V.clone(), k_B, p_B, True)) for apply in (ours, theirs))
    assert kept.sum() > 100
    assert float((logits_B_V.softmax(-1) * (kept ^ expected)).sum()) < 1e-4  # a token at the edge may fall on either side


OWNER = """
import asyncio, os, sys
from dataclasses import replace
from actors.vllm_engine import EngineSpec, VllmEngine, engine_environment
from sgpo_dist.data.embedded_model import embedded_model_dir
from sgpo_dist.errors import SgpoError
from sgpo_dist.roles import GenerateRequest, Sampling
from sgpo_dist.weights.version import WeightBundle

async def live():
    model = embedded_model_dir()
    spec = EngineSpec(str(model), max_model_len=256, kv_cache_gib=0.25, log_level="ERROR")
    os.environ.update(engine_environment(spec))
    engine = VllmEngine(spec)
    await engine.start()
    print("PIDS", *(await engine.pids()), flush=True)
    bundle = WeightBundle(1, "shm", str(model / "model.safetensors"), "node", "0" * 32, 0, (), ())
    for work in (engine.receive(bundle), engine.generate(GenerateRequest("a", (1, 2, 3), Sampling(0.0, 1.0, 0, 4), 0)), engine.check()):
        try:
            await work
        except SgpoError as problem:
            print("REFUSED", type(problem).__name__, problem, flush=True)
    print("VERSION", engine.version, flush=True)
    await asyncio.sleep(300)

if __name__ == "__main__":
    asyncio.run(live())
"""


@pytest.mark.fault(4, invariants="I7")
@pytest.mark.fault(19, invariants="I3")
def test_foreign_bytes_are_refused_and_the_engine_dies_with_its_owner(tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    owner = subprocess.Popen([sys.executable, str(script)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    try:
        said = {}
        refused = []
        for line in owner.stdout:
            word, _, rest = line.strip().partition(" ")
            refused += [rest] if word == "REFUSED" else []
            said[word] = rest
            if word == "VERSION":
                break
        assert said["VERSION"] == "-1"
        assert [line.split()[0] for line in refused] == ["WeightSyncError", "WorkerFault", "WorkerFault"]
        assert "read other bytes for version 1" in refused[0]
        children = [psutil.Process(int(pid)) for pid in said["PIDS"].split()]
        assert len(children) == 2  # the engine core and its worker
    finally:
        owner.kill()
        owner.wait(timeout=10)
        owner.stdout.close()  # or its warning falls on whatever test runs when it is collected
    _, alive = psutil.wait_procs(children, timeout=10)
    for orphan in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            orphan.kill()
    assert not alive, "the engine outlived the process that owns it"


# ---- the transports of GPUs, at their seams -----------------------------------------------------------------------------------------


def test_vllm_takes_our_requests_for_its_own_transports() -> None:
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferInitInfo, IPCWeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo, NCCLWeightTransferUpdateInfo

    from actors import weight_receiver as receiver

    tensors = [("a", "float32", (2, 3)), ("b", "bfloat16", (4,))]
    init = NCCLWeightTransferInitInfo(**receiver.nccl_init_info("10.0.0.1", 4242, rank_offset=1, world_size=5))
    assert (init.master_address, init.rank_offset, init.world_size, init.packed) == ("10.0.0.1", 1, 5, True)
    assert NCCLWeightTransferUpdateInfo(**receiver.nccl_update_info(tensors)).shapes == [[2, 3], [4]]
    assert IPCWeightTransferInitInfo(**receiver.ipc_init_info(packed=True)).packed
    handles = [{"GPU-1": (1, 2)}, {"GPU-1": (3, 4)}]
    info = IPCWeightTransferUpdateInfo(**receiver.nccl_update_info(tensors), ipc_handles=handles)
    assert info.names == ["a", "b"]
    assert [receiver.transfer_config(name).backend for name in ("shm", "nccl", "ipc")] == ["shm", "nccl", "ipc"]
    with pytest.raises(ValueError, match="none of shm, nccl, ipc"):
        receiver.transfer_config("carrier-pigeon")
    with pytest.raises(ValueError, match="rank 0 is the learner's sender"):
        receiver.nccl_init_info("10.0.0.1", 4242, rank_offset=0, world_size=2)


def test_cuda_handles_travel_as_plain_values_and_come_back_whole() -> None:
    import torch
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    from actors.weight_receiver import plain_update_info, revived_update_info

    arguments = (
        torch.Tensor,
        torch.Size([2, 3]),
        (3, 1),
        0,
        torch.UntypedStorage,
        torch.bfloat16,
        0,
        b"handle",
        64,
        0,
        False,
        b"ref",
        8,
        b"event",
        True,
    )
    info = {"names": ["a"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]], "ipc_handles": [{"GPU-1": arguments}]}
    wire = MsgpackDecoder().decode(MsgpackEncoder().encode(plain_update_info(info)))
    back = revived_update_info(wire)["ipc_handles"][0]["GPU-1"]
    assert [tuple(value) if isinstance(value, list) else value for value in back] == [tuple(v) if isinstance(v, torch.Size) else v for v in arguments]
    with pytest.raises(ValueError, match="no tensor type"):
        revived_update_info({"ipc_handles": [{"GPU-1": ({"dtype": "system"},)}]})


def test_a_file_s_digest_is_that_of_its_tensors_in_name_order(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from sgpo_dist.weights.checksum import checksum_tensors

    tensors = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([[3.0]], dtype=torch.bfloat16)}
    path = tmp_path / "w.safetensors"
    save_file(tensors, path)
    rows = [("a", "BF16", (1, 1), bytes.fromhex("4040")), ("b", "F32", (2,), bytes.fromhex("0000803f00000040"))]
    assert checksum_safetensors(str(path)) == checksum_tensors(rows)
    with pytest.raises(ValueError, match="ascending"):
        checksum_tensors(reversed(rows))
