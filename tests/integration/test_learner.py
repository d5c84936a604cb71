"""The learner on real DeepSpeed: one rank in this process, groups of ranks as real Ray actors, on a tiny random Llama."""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from learner import kernels
from learner.attention import NAME as PRODUCTS
from learner.batch import collate_packed, example_row
from learner.deepspeed_engine import join
from learner.group import PORT_TAKEN, GroupSpec, LearnerGroup
from learner.learner import LearnerRank, RankSpec
from learner.weight_sender import DeviceLink, SharedMemorySender, WeightSource, build_sender
from sgpo_dist.config import LearnerConfig, LoraConfig, ModelConfig
from sgpo_dist.errors import CheckpointError, ConfigError, DataError, EnvironmentProblem, RunFailed, WorkerFault
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Stage, TokenExample
from sgpo_dist.roles import LearnerStage, LossPlan, OptimiserPlan
from sgpo_dist.turns import taken
from sgpo_dist.weights.checksum import checksum_safetensors
from sgpo_dist.weights.version import ProbeRow

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

PROBES = (ProbeRow((1, 2, 3), (4, 5)), ProbeRow((9, 8), (7,)))
STEPS = 4


# ---- parts ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_rank(joined: None, tmp_path: Path) -> Iterator[Callable[..., LearnerRank]]:
    made: list[LearnerRank] = []

    def make(dtype: str = "float32", lora: bool = False, engine_dtype: str | None = None, **learner: Any) -> LearnerRank:
        model = ModelConfig(dtype=dtype, lora=LoraConfig(enabled=lora, r=4, alpha=8))
        settings = LearnerConfig(**{"zero_stage": 0, "max_tokens_per_micro_batch": 64, "threads_per_rank": 1} | learner)
        spec = RankSpec(0, 1, model, settings, "shm", engine_dtype or dtype, PROBES, f"test{os.getpid()}", 0, str(tmp_path / "cache"), 1)
        made.append(LearnerRank(spec))
        return made[-1]

    yield make
    for rank in made:
        rank._drop_sender()
        rank._end_stage()


def preference_stage(model_dir: str, learning_rate: float = 1e-3, **loss: Any) -> LearnerStage:
    plan = OptimiserPlan(learning_rate, STEPS, warmup_ratio=0.0, schedule="cosine")
    return LearnerStage(Stage.PREFERENCE, model_dir, plan, LossPlan(**loss), model_dir)


def nll_stage(model_dir: str, learning_rate: float = 1e-3, packing: bool = False) -> LearnerStage:
    return LearnerStage(Stage.SFT, model_dir, OptimiserPlan(learning_rate, STEPS, warmup_ratio=0.0), packing=packing)


def tokens(draw: random.Random, count: int) -> tuple[int, ...]:
    return tuple(draw.randrange(1, 256) for _ in range(count))


def make_pair(number: int) -> PreferencePair:
    """Unequal lengths, a common beginning of 0 to 3 tokens."""
    draw = random.Random(number)
    common = tokens(draw, number % 4)
    chosen = Completion("", common + tokens(draw, 4 + number % 5), FinishReason.STOP, 0)
    rejected = Completion("", common + tokens(draw, 8 - number % 5), FinishReason.STOP, 0)
    prompt = Prompt(f"p{number}", (Message("user", "x"),))
    return PreferencePair(f"u{number}", Stage.PREFERENCE, prompt, tokens(draw, 5 + number % 7), rejected, chosen, "v1")


def pairs(step: int, count: int = 6) -> list[PreferencePair]:
    return [make_pair(100 * step + n) for n in range(count)]


def examples(count: int = 5) -> list[TokenExample]:
    draw = random.Random(1)
    return [TokenExample(f"e{n}", tokens(draw, 3 + n), tokens(draw, 2 + n), weight=1.0) for n in range(count)]


def weighted_examples() -> list[TokenExample]:
    """Rows and tokens of unequal weights; the first row's tokens all weigh 1."""
    rows = [replace(row, weight=0.5 + n) for n, row in enumerate(examples())]
    return rows[:1] + [replace(row, token_weights=tuple(0.25 * (1 + place) for place in range(len(row.completion_ids)))) for row in rows[1:]]


def plain_logps(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    """Per-token log-probs by transformers' own forward pass over one sequence."""
    with torch.no_grad():
        return differentiable_logps(model, prompt, completion)


def differentiable_logps(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *completion]])
    scores = model(ids).logits[0, :-1].float().log_softmax(-1)
    return scores.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]


def plain_nll(model: Any, rows: Sequence[TokenExample]) -> torch.Tensor:
    """sum(w_row * w_token * -logp) / sum(w_row * w_token), one sequence at a time."""
    weights = [row.weight * torch.tensor(row.token_weights or [1.0] * len(row.completion_ids)) for row in rows]
    losses = [-(weight * differentiable_logps(model, row.prompt_ids, row.completion_ids)).sum() for weight, row in zip(weights, rows, strict=True)]
    return torch.stack(losses).sum() / torch.cat(weights).sum()


def gradient_norm(model: Any, loss: torch.Tensor) -> float:
    loss.backward()
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))


# ---- steps of one rank ------------------------------------------------------------------------------------------------------------


def test_nll_loss_equals_transformers_own(make_rank: Callable[..., LearnerRank], model_dir: str):
    rank, rows = make_rank(max_tokens_per_micro_batch=16), examples()
    rank.begin_stage(nll_stage(model_dir))
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    width = max(len(row.prompt_ids + row.completion_ids) for row in rows)
    ids = torch.tensor([[*row.prompt_ids, *row.completion_ids] + [0] * (width - len(row.prompt_ids + row.completion_ids)) for row in rows])
    labels = torch.full_like(ids, -100)
    for number, row in enumerate(rows):
        labels[number, len(row.prompt_ids) : len(row.prompt_ids + row.completion_ids)] = torch.tensor(row.completion_ids)
    expected = model(ids, labels=labels).loss.item()
    metrics = rank.nll_step(1, rows)
    assert metrics["loss"] == pytest.approx(expected, abs=1e-5)
    assert metrics["nll_loss"] == metrics["loss"]
    assert metrics["perf/tokens"] == sum(len(row.prompt_ids + row.completion_ids) for row in rows)


def test_first_preference_step_by_hand(make_rank: Callable[..., LearnerRank], model_dir: str):
    rank, batch = make_rank(), pairs(0)
    rank.begin_stage(preference_stage(model_dir, nll_coef=0.5))
    metrics = rank.preference_step(1, batch)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    chosen = [plain_logps(model, pair.prompt_ids, pair.chosen.token_ids) for pair in batch]
    per_token = -sum(float(row.sum()) for row in chosen) / sum(len(row) for row in chosen)
    assert metrics["loss"] == pytest.approx(math.log(2) + 0.5 * per_token, abs=1e-5)  # policy and reference are the same model yet
    assert metrics["nll_loss"] == pytest.approx(per_token, abs=1e-5)
    assert metrics["logps/chosen"] == pytest.approx(sum(float(row.sum()) for row in chosen) / len(batch), abs=1e-4)
    assert metrics["rewards/margins"] == 0.0
    assert metrics["learning_rate"] == pytest.approx(1e-3)
    assert metrics["completions/chosen_length"] == pytest.approx(41 / 6)
    assert rank.preference_step(2, pairs(1))["learning_rate"] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_the_update_does_not_depend_on_the_split(make_rank: Callable[..., LearnerRank], model_dir: str):
    weights = []
    for budget in (20, 100_000):
        rank = make_rank(max_tokens_per_micro_batch=budget)
        rank.begin_stage(preference_stage(model_dir, nll_coef=0.2))
        rank.preference_step(1, pairs(0))
        weights.append(torch.cat([p.detach().flatten() for p in rank._current.engine.scorer.parameters()]))
        rank._end_stage()
    assert float((weights[0] - weights[1]).abs().max()) < 2e-5  # Adam's first step divides by the gradient's size


def test_training_prefers_the_chosen(make_rank: Callable[..., LearnerRank], model_dir: str):
    rank = make_rank()
    rank.begin_stage(preference_stage(model_dir))
    losses = [rank.preference_step(step, pairs(0))["loss"] for step in range(1, STEPS + 1)]
    assert losses[-1] < losses[0] - 0.05


def test_reference_is_computed_once_per_pair(make_rank: Callable[..., LearnerRank], model_dir: str):
    rank, batch = make_rank(), pairs(0)
    rank.begin_stage(preference_stage(model_dir))
    rank.preference_step(1, batch)
    before = dict(rank._current.reference_logps)
    rank._current.reference = None  # asking it again would now raise
    rank.preference_step(2, batch)
    assert rank._current.reference_logps == before


def test_a_broken_loss_skips_the_step_and_leaves_the_weights(make_rank: Callable[..., LearnerRank], model_dir: str):
    rank = make_rank()
    rank.begin_stage(preference_stage(model_dir))
    parameters = list(rank._current.engine.scorer.parameters())
    with torch.no_grad():
        parameters[-1].fill_(float("nan"))
    before = [p.detach().clone() for p in parameters]
    assert rank.preference_step(3, pairs(0))["step/skipped"] == 1.0
    assert all(torch.equal(p.nan_to_num(), old.nan_to_num()) for p, old in zip(parameters, before, strict=True))


def test_sums_of_logps_in_row_order(make_rank: Callable[..., LearnerRank], model_dir: str):
    rank, rows = make_rank(max_tokens_per_micro_batch=16), examples()
    rank.begin_stage(nll_stage(model_dir))
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    expected = [float(plain_logps(model, row.prompt_ids, row.completion_ids).sum()) for row in rows]
    assert rank.logps(rows) == pytest.approx(expected, abs=1e-4)


def test_an_empty_completion_is_refused(make_rank: Callable[..., LearnerRank], model_dir: str):
    rank = make_rank()
    rank.begin_stage(nll_stage(model_dir))
    with pytest.raises(DataError, match="e9"):
        rank.nll_step(1, [TokenExample("e9", (1,), ())])


@pytest.mark.parametrize("budget", [16, 100_000])
def test_token_weights_are_exact_whatever_the_split(make_rank: Callable[..., LearnerRank], model_dir: str, budget: int):
    rank, rows = make_rank(max_tokens_per_micro_batch=budget), weighted_examples()
    rank.begin_stage(nll_stage(model_dir))
    metrics = rank.nll_step(1, rows)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    expected = plain_nll(model, rows)
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(gradient_norm(model, expected), rel=1e-4)
    assert abs(metrics["loss"] - plain_nll(model, examples()).item()) > 1e-3  # the weights did something


@pytest.mark.parametrize("budget", [20, 100_000])
def test_replay_adds_its_share_of_nll(make_rank: Callable[..., LearnerRank], model_dir: str, budget: int):
    """Four rows beside six pairs: preference loss + 4/6 of the rows' mean NLL, in the loss and in the gradient."""
    rank, rows = make_rank(max_tokens_per_micro_batch=budget), weighted_examples()[1:]
    rank.begin_stage(preference_stage(model_dir, beta=0.5))
    metrics = rank.preference_step(1, pairs(0), rows)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    margins = []
    for pair in pairs(0):
        chosen, rejected = (differentiable_logps(model, pair.prompt_ids, half.token_ids).sum() for half in (pair.chosen, pair.rejected))
        margins.append(0.5 * (chosen - chosen.detach() - rejected + rejected.detach()))
    replayed = plain_nll(model, rows)
    expected = -torch.nn.functional.logsigmoid(torch.stack(margins)).mean() + 4 / 6 * replayed
    assert metrics["replay/nll_loss"] == pytest.approx(replayed.item(), abs=1e-5)
    assert metrics["loss"] == pytest.approx(math.log(2) + 4 / 6 * replayed.item(), abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(gradient_norm(model, expected), rel=1e-4)
    pair_tokens = rank.preference_step(2, pairs(0))["perf/tokens"]
    assert metrics["perf/tokens"] == pair_tokens + sum(len(row.prompt_ids + row.completion_ids) for row in rows)


def test_simpo_needs_no_reference(make_rank: Callable[..., LearnerRank], model_dir: str):
    rank, batch = make_rank(), pairs(0)
    rank.begin_stage(replace(preference_stage(model_dir, loss_type="simpo", beta=2.0, simpo_gamma=0.25), reference_dir="/nowhere"))
    assert rank._current.reference is None
    metrics = rank.preference_step(1, batch)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    means = [[float(plain_logps(model, pair.prompt_ids, half.token_ids).mean()) for half in (pair.chosen, pair.rejected)] for pair in batch]
    losses = [math.log1p(math.exp(0.5 - 2 * (chosen - rejected))) for chosen, rejected in means]
    assert metrics["loss"] == pytest.approx(sum(losses) / len(batch), abs=1e-5)
    assert metrics["rewards/chosen"] == pytest.approx(sum(2 * chosen for chosen, _ in means) / len(batch), abs=1e-5)
    assert rank._current.reference_logps == {}


@pytest.mark.parametrize("loss_type", ["sigmoid_norm", "robust", "ipo", "hinge", "apo_zero", "dpop"])
def test_every_loss_trains_and_does_not_depend_on_the_split(make_rank: Callable[..., LearnerRank], model_dir: str, loss_type: str):
    """A second step, where the policy is no longer its reference. IPO and the normalised loss divide by tokens, which the split must not mix up."""
    found = []
    for budget in (40, 100_000):
        rank = make_rank(max_tokens_per_micro_batch=budget)
        rank.begin_stage(preference_stage(model_dir, loss_type=loss_type, beta=0.5, label_smoothing=0.1))
        found.append([rank.preference_step(step, pairs(0)) for step in (1, 2)])
        rank._end_stage()
    (first, second), (_, other) = found
    assert second["loss"] < first["loss"]
    for name in ("loss", "rewards/margins", "grad_norm"):
        assert second[name] == pytest.approx(other[name], rel=2e-4, abs=1e-5), name


def test_a_refreshed_reference_is_the_given_model(make_rank: Callable[..., LearnerRank], model_dir: str, tmp_path: Path):
    rank, batch = make_rank(), pairs(0)
    rank.begin_stage(preference_stage(model_dir))
    for step in (1, 2):
        rank.preference_step(step, batch)
    rank.export(str(tmp_path / "model"))
    rank.refresh_reference(str(tmp_path / "model"))
    assert rank._current.reference_logps == {}
    metrics = rank.preference_step(3, batch)  # pairs whose log-probs under the old reference were known
    assert metrics["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rank.preference_step(4, batch)["rewards/margins"] > 0.01


# ---- packing ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attention", "budget"), [("sdpa", 16), ("sdpa", 100_000), ("eager", 100_000)])
def test_packed_rows_score_and_train_as_padded_ones(make_rank: Callable[..., LearnerRank], model_dir: str, attention: str, budget: int):
    rows, found = [*weighted_examples(), *(replace(row, uid=f"{row.uid}+") for row in examples())], []
    for packing in (False, True):
        rank = make_rank(attn_implementation=attention, max_tokens_per_micro_batch=budget)
        rank.begin_stage(nll_stage(model_dir, packing=packing))
        batches = list(rank._micro_batches([example_row(row) for row in rows], packing))
        assert sum(len(numbers) for numbers, _ in batches) == len(rows)
        found.append((sum(micro.input_ids_B_L.shape[0] for _, micro in batches), rank.nll_step(1, rows)))
        rank._end_stage()
    (padded, plain), (packed, metrics) = found
    assert packed < padded  # rows did share sequences
    assert metrics["loss"] == pytest.approx(plain["loss"], abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


def test_a_packed_token_scores_as_if_its_row_were_alone(make_rank: Callable[..., LearnerRank], model_dir: str):
    rank, rows = make_rank(), examples()
    rank.begin_stage(nll_stage(model_dir))
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        logps = rank._current.engine.scorer(collate_packed([[example_row(row) for row in rows]]))
    expected = torch.cat([plain_logps(model, row.prompt_ids, row.completion_ids) for row in rows])
    assert logps.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


# ---- adapters ---------------------------------------------------------------------------------------------------------------------


def test_adapters_off_is_the_reference(make_rank: Callable[..., LearnerRank], model_dir: str):
    rank = make_rank(lora=True, zero_stage=2)
    rank.begin_stage(preference_stage(model_dir, learning_rate=1e-2))
    assert rank._current.reference is None  # no second model
    assert rank.preference_step(1, pairs(0))["rewards/margins"] == 0.0
    rank.preference_step(2, pairs(1))
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    for pair in pairs(1):
        expected = float(plain_logps(model, pair.prompt_ids, pair.chosen.token_ids).sum())
        assert rank._current.reference_logps[pair.uid][0] == pytest.approx(expected, abs=1e-4)


def test_adapters_have_no_reference_to_refresh(make_rank: Callable[..., LearnerRank], model_dir: str):
    rank = make_rank(lora=True)
    rank.begin_stage(preference_stage(model_dir))
    with pytest.raises(ConfigError, match=r"preference\.rounds to 1"):
        rank.refresh_reference(model_dir)


def test_published_adapters_are_merged_and_the_originals_untouched(make_rank: Callable[..., LearnerRank], model_dir: str, tmp_path: Path):
    rank = make_rank(lora=True)
    rank.begin_stage(preference_stage(model_dir, learning_rate=1e-2))
    rank.preference_step(1, pairs(0))
    base = rank._current.engine.scorer.causal_lm.model.layers[0].mlp.up_proj.base_layer.weight
    before = base.detach().clone()
    bundle = rank.publish(1)
    assert torch.equal(base, before)
    merged = AutoModelForCausalLM.from_pretrained(model_dir)
    missing = merged.load_state_dict(load_file(bundle.uri), strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["lm_head.weight"], [])
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, before)
    row = examples()[3]
    assert rank.logps([row])[0] == pytest.approx(float(plain_logps(merged, row.prompt_ids, row.completion_ids).sum()), abs=1e-4)


# ---- weights ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "engine_dtype", "zero_stage", "wire", "tolerance"),
    [
        ("float32", "float32", 0, torch.float32, 1e-5),
        ("bfloat16", "float32", 2, torch.bfloat16, 1e-5),  # widened on arrival: nothing is lost, so the proof stays sharp
        ("bfloat16", "bfloat16", 2, torch.bfloat16, 0.05),
        ("float32", "float32", 3, torch.float32, 1e-5),
    ],
)
def test_a_published_version_can_be_proved(
    make_rank: Callable[..., LearnerRank], model_dir: str, dtype: str, engine_dtype: str, zero_stage: int, wire: torch.dtype, tolerance: float
):
    rank = make_rank(dtype=dtype, engine_dtype=engine_dtype, zero_stage=zero_stage)
    rank.begin_stage(preference_stage(model_dir))
    rank.preference_step(1, pairs(0))
    bundle = rank.publish(7)
    assert checksum_safetensors(bundle.uri) == bundle.checksum
    weights = load_file(bundle.uri)
    assert tuple(weights) == bundle.names == tuple(sorted(bundle.names))
    assert "lm_head.weight" not in weights
    assert {tensor.dtype for tensor in weights.values()} == {wire}
    received = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, engine_dtype))
    received.load_state_dict(weights, strict=False)
    for probe, logps in zip(PROBES, bundle.probe_logps, strict=True):
        assert list(logps) == pytest.approx(plain_logps(received, probe.prompt_ids, probe.completion_ids).tolist(), abs=tolerance)
    rank.retire(7)
    assert not Path(bundle.uri).exists()


def test_an_exported_model_loads_in_transformers(make_rank: Callable[..., LearnerRank], model_dir: str, tmp_path: Path):
    rank, row = make_rank(), examples()[2]
    rank.begin_stage(nll_stage(model_dir))
    rank.nll_step(1, examples())
    rank.export(str(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert rank.logps([row])[0] == pytest.approx(float(plain_logps(model, row.prompt_ids, row.completion_ids).sum()), abs=1e-4)
    assert (tmp_path / "model" / "tokenizer.json").is_file()


def test_left_overs_of_dead_writers_go_and_those_of_live_ones_stay(make_rank: Callable[..., LearnerRank], model_dir: str, tmp_path: Path):
    rank = make_rank()
    rank.begin_stage(nll_stage(model_dir))
    source = WeightSource(rank._current.engine, None)
    living = SharedMemorySender("run1", is_writer=True, directory=tmp_path)
    kept = Path(living.send(1, source).uri)
    orphan = tmp_path / "sgpo-weights-run0-v3-1.safetensors"
    orphan.write_bytes(b"old")
    SharedMemorySender("run2", is_writer=True, directory=tmp_path)
    assert kept.exists()
    assert not orphan.exists()
    living.close()
    assert list(tmp_path.glob("sgpo-weights-*")) == []


class FakeClient:
    """vLLM's control plane: writes down what the trainer engine asks of the workers."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        self.asked.append("init")

    def start_weight_update(self) -> None:
        self.asked.append("start")

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        self.asked.append("update")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.asked.append("finish")


def test_vllms_nccl_trainer_engine_takes_our_source(make_rank: Callable[..., LearnerRank], model_dir: str):
    """On a machine without a GPU: the rank that is not the sender, which replays the iteration and asks nothing of the workers."""
    rank, client = make_rank(zero_stage=3), FakeClient()
    rank.begin_stage(nll_stage(model_dir))
    source = WeightSource(rank._current.engine, torch.bfloat16)
    follower = build_sender("nccl", 1, "n", source, DeviceLink(client, {"master_address": "127.0.0.1", "master_port": 1, "world_size": 2}))
    sent = follower.send(3, source)
    assert (sent.uri, sent.names) == ("", tuple(meta.name for meta in source.metadata()))
    assert sent.num_bytes == sum(meta.num_bytes for meta in source.metadata())
    assert client.asked == []


@pytest.mark.skipif(torch.accelerator.is_available(), reason="shows what a machine without a GPU is told")
def test_ipc_without_a_gpu_says_so(make_rank: Callable[..., LearnerRank], model_dir: str):
    rank = make_rank()
    rank.begin_stage(nll_stage(model_dir))
    with pytest.raises(EnvironmentProblem, match="'ipc' cannot be set up"):
        build_sender("ipc", 0, "n", WeightSource(rank._current.engine, None), DeviceLink(FakeClient(), {}))


def test_a_source_agrees_with_its_metadata_and_groups_by_layer(make_rank: Callable[..., LearnerRank], model_dir: str):
    rank = make_rank(zero_stage=3)
    rank.begin_stage(nll_stage(model_dir))
    source = WeightSource(rank._current.engine, torch.bfloat16)
    streamed = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source]
    assert streamed == [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
    groups = [names for names, _ in source.iter_groups()]
    assert [len(names) for names in groups] == [1, 9, 9, 1]  # embedding, two layers of nine, final norm
    whole = load_file(Path(model_dir) / "model.safetensors")
    assert all(
        torch.equal(tensor, whole[name].bfloat16()) for names, tensors in source.iter_groups() for name, tensor in zip(names, tensors, strict=True)
    )


def test_unlinked_and_unknown_transports_are_refused():
    with pytest.raises(ConfigError, match="not linked"):
        build_sender("nccl", 0, "n")
    with pytest.raises(ConfigError, match="shm, nccl, ipc"):
        build_sender("carrier-pigeon", 0, "n")


# ---- saving -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero_stage", "dtype", "lora"),
    [
        (0, "float32", False),
        (2, "float32", False),
        (3, "float32", False),
        (0, "bfloat16", False),
        (1, "bfloat16", False),
        (2, "bfloat16", False),
        (3, "bfloat16", False),
        (2, "bfloat16", True),
    ],
)
def test_going_on_after_a_load_is_bit_equal(
    make_rank: Callable[..., LearnerRank], model_dir: str, tmp_path: Path, zero_stage: int, dtype: str, lora: bool
):
    rank = make_rank(zero_stage=zero_stage, dtype=dtype, lora=lora)
    stage = preference_stage(model_dir)
    rank.begin_stage(stage)
    rank.preference_step(1, pairs(1))
    rank.save(str(tmp_path / "saved"))
    straight = [rank.preference_step(step, pairs(step))["loss"] for step in (2, 3)], rank.publish(1).checksum
    rank.begin_stage(stage)
    rank.load(str(tmp_path / "saved"))
    resumed = [rank.preference_step(step, pairs(step))["loss"] for step in (2, 3)], rank.publish(2).checksum
    assert resumed == straight
    assert not list(tmp_path.rglob("*.py"))  # DeepSpeed drops executables there


def test_a_load_that_cannot_work_raises(make_rank: Callable[..., LearnerRank], model_dir: str, tmp_path: Path):
    rank = make_rank()
    rank.begin_stage(nll_stage(model_dir))
    with pytest.raises(CheckpointError, match="cannot be read"):
        rank.load(str(tmp_path / "nowhere"))
    rank.save(str(tmp_path / "saved"))
    rank.begin_stage(preference_stage(model_dir))
    with pytest.raises(CheckpointError, match="stage 'sft'"):
        rank.load(str(tmp_path / "saved"))
    rank.begin_stage(nll_stage(model_dir))
    (tmp_path / "saved" / "state" / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError):
        rank.load(str(tmp_path / "saved"))


def test_a_taken_port_is_told_apart():
    """The group replaces its ranks on this error only."""
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(EnvironmentProblem, match=PORT_TAKEN):
        join(0, 2, "127.0.0.1", taken.getsockname()[1], "gloo", 5.0)


def test_steps_before_a_stage_and_unscorable_settings_are_refused(make_rank: Callable[..., LearnerRank], model_dir: str):
    with pytest.raises(RunFailed, match="begin one first"):
        make_rank().nll_step(1, examples())
    with pytest.raises(ConfigError, match="auto, sdpa or eager"):
        make_rank(attn_implementation="flash_attention_2").begin_stage(nll_stage(model_dir))
    with pytest.raises(ConfigError, match=r"rollout\.dtype"):
        make_rank(zero_stage=3, dtype="bfloat16", engine_dtype="float32")


def test_eager_attention_scores_the_same(make_rank: Callable[..., LearnerRank], model_dir: str):
    losses = []
    for attention in ("sdpa", "eager"):
        rank = make_rank(attn_implementation=attention)
        rank.begin_stage(preference_stage(model_dir, nll_coef=1.0))
        losses.append(rank.preference_step(1, pairs(0))["loss"])
        rank._end_stage()
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_bf16_on_a_cpu_trains_by_products_and_exports_no_trace_of_it(make_rank: Callable[..., LearnerRank], model_dir: str, tmp_path: Path):
    found = []
    for chosen, used in (("auto", PRODUCTS), ("sdpa", "sdpa")):
        rank = make_rank(attn_implementation=chosen, dtype="bfloat16", engine_dtype="bfloat16")
        rank.begin_stage(preference_stage(model_dir, nll_coef=1.0))
        assert rank._current.engine.scorer.causal_lm.config._attn_implementation == used
        found.append(rank.preference_step(1, pairs(0)))
        rank.export(str(tmp_path / chosen))
        rank._end_stage()
    auto, sdpa = found
    assert auto["loss"] == sdpa["loss"]
    assert auto["grad_norm"] == pytest.approx(sdpa["grad_norm"], rel=1e-2)
    assert (tmp_path / "auto" / "config.json").read_bytes() == (tmp_path / "sdpa" / "config.json").read_bytes()


@pytest.mark.parametrize(("zero_stage", "lora"), [(0, False), (3, False), (3, True)])
def test_gradient_checkpointing_changes_nothing(make_rank: Callable[..., LearnerRank], model_dir: str, zero_stage: int, lora: bool):
    norms = []
    for checkpointing in (False, True):
        rank = make_rank(gradient_checkpointing=checkpointing, zero_stage=zero_stage, lora=lora)
        rank.begin_stage(preference_stage(model_dir, nll_coef=1.0))
        norms.append(rank.preference_step(1, pairs(0))["grad_norm"])
        rank._end_stage()
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize(("zero_stage", "lora"), [(0, False), (2, False), (3, True)])
def test_kernels_change_nothing(make_rank: Callable[..., LearnerRank], model_dir: str, zero_stage: int, lora: bool):
    found = []
    for wanted in (True, False):
        rank = make_rank(cpu_kernels=wanted, zero_stage=zero_stage, lora=lora)
        rank.begin_stage(preference_stage(model_dir, nll_coef=1.0))
        assert bool(kernels._kernels) is wanted
        assert any("forward" in vars(module) for module in rank._current.engine.scorer.modules()) is wanted
        found.append([rank.preference_step(step, pairs(step)) for step in (1, 2, 3)])
        rank._end_stage()
    for ours, plain in zip(*found, strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)


def test_a_machine_without_a_compiler_trains_and_says_so(
    make_rank: Callable[..., LearnerRank], model_dir: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    kernels.unload()
    monkeypatch.setenv("PATH", "")
    rank = make_rank(cpu_kernels=True)
    rank.begin_stage(preference_stage(model_dir))
    assert math.isfinite(rank.preference_step(1, pairs(0))["loss"])
    assert "there is no g++" in caplog.text


# ---- groups of ranks as Ray actors ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()


def group_spec(tmp_path: Path, ranks: int, zero_stage: int) -> GroupSpec:
    settings = LearnerConfig(num_ranks=ranks, zero_stage=zero_stage, threads_per_rank=1, max_tokens_per_micro_batch=40, step_timeout_s=100.0)
    here = {"PYTHONPATH": str(Path(__file__).parents[2])}
    return GroupSpec(ModelConfig(dtype="float32"), settings, "shm", "float32", PROBES, 0, str(tmp_path / "cache"), 0.5, here)


async def train(group: LearnerGroup, stage: LearnerStage, steps: range, count: int, load: Path | None = None) -> list[Mapping[str, float]]:
    await group.begin_stage(stage)
    if load is not None:
        await group.load(str(load))
    return [await group.preference_step(step, pairs(step, count), examples(step)) for step in steps]  # one replay row at step 1: fewer than ranks


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.mark.timeout(400)
def test_two_ranks_make_the_update_of_one_and_a_resumed_group_that_of_an_uninterrupted_one(cluster: None, model_dir: str, tmp_path: Path):
    """fp32, plain SGD-like sizes would hide a wrong mean, so the gradient's norm and the loss are compared too. Five pairs do not split evenly."""
    stage = preference_stage(model_dir, nll_coef=0.3)

    async def story() -> None:
        one, two = LearnerGroup(group_spec(tmp_path, 1, 0)), LearnerGroup(group_spec(tmp_path, 2, 2))
        alone = await train(one, stage, range(1, 5), count=5)
        together = await train(two, stage, range(1, 3), count=5)
        for ours, theirs in zip(alone, together, strict=False):
            for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "nll_loss", "replay/nll_loss", "perf/tokens"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
        await two.export(str(tmp_path / "two-2"))
        await two.save(str(tmp_path / "saved"))
        await two.logps(examples())
        [await two.preference_step(step, pairs(step, 5), examples(step)) for step in (3, 4)]
        await asyncio.gather(two.export(str(tmp_path / "two-4")), one.export(str(tmp_path / "one-4")))
        await one.stop()
        await two.stop()

        again = LearnerGroup(group_spec(tmp_path, 2, 2))  # new processes
        await train(again, stage, range(3, 5), count=5, load=tmp_path / "saved")
        await again.export(str(tmp_path / "again-4"))
        await again.refresh_reference(str(tmp_path / "again-4"))
        assert (await again.preference_step(5, pairs(5)))["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
        bundle = await again.publish(1)
        assert Path(bundle.uri).exists()
        await again.stop()
        assert not Path(bundle.uri).exists()

    asyncio.run(story())
    one, two, again = (weights_of(tmp_path / name) for name in ("one-4", "two-4", "again-4"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    assert all(torch.equal(again[name], two[name]) for name in two)
    start = load_file(Path(model_dir) / "model.safetensors")
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 1e-3  # it did move


def test_a_rank_has_its_turn_while_it_computes(cluster: None, model_dir: str, tmp_path: Path):
    async def story() -> tuple[set[bool], bool]:
        group = LearnerGroup(replace(group_spec(tmp_path, 1, 0), turns=f"test-{os.getpid()}"))
        await group.begin_stage(nll_stage(model_dir))
        seen = set()
        steps = asyncio.gather(*(group.nll_step(step, examples()) for step in range(1, 6)))
        while not steps.done():
            seen.add(taken(f"test-{os.getpid()}"))
            await asyncio.sleep(0.001)
        await steps
        await group.stop()
        return seen, taken(f"test-{os.getpid()}")

    seen, afterwards = asyncio.run(story())
    assert True in seen
    assert not afterwards


@pytest.mark.timeout(200)
def test_faults_come_back_as_our_errors(cluster: None, model_dir: str, tmp_path: Path):
    async def story() -> None:
        group = LearnerGroup(group_spec(tmp_path, 1, 0))
        with pytest.raises(WorkerFault, match="start it first"):
            await group.publish(1)
        await group.begin_stage(nll_stage(model_dir))
        with pytest.raises(DataError, match="e9"):
            await group.nll_step(1, [TokenExample("e9", (1,), ())])
        with pytest.raises(ConfigError, match="loss_type"):
            await group.begin_stage(preference_stage(model_dir, loss_type="nonsense"))
        await group.begin_stage(nll_stage(model_dir))
        with pytest.raises(WorkerFault, match="learner: nll_step failed: IndexError"):
            await group.nll_step(1, [TokenExample("big", (1,), (100_000,))])
        os.kill(await group._ranks[0].call.remote("process_id"), signal.SIGKILL)
        with pytest.raises(WorkerFault, match="learner: retire failed"):
            await group.retire(1)
        await group.stop()

    asyncio.run(story())
