"""Rewrites with proposals from their drafts, on a real engine: greedy ones are the model's own, sampled ones have the model's distribution."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest
import torch

from actors.draft_pointer import Frame, mend_sampling, seeds
from actors.vllm_engine import EngineSpec, VllmEngine, engine_environment
from sgpo_dist.data.embedded_model import embedded_model_dir
from sgpo_dist.prompts import PromptBook, load_tokenizer
from sgpo_dist.records import Completion, Message, Prompt
from sgpo_dist.roles import GenerateRequest, Sampling

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(240)]

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]
DRAFTS = {
    "What is the capital of France?": "The capital of France is Paris, which lies on the river Seine, and the capitol of Italy is Rome.",
    "Name three fruits.": "Three fruits are the apple, the pear and the plum; all of them grow on trees in many gardens.",
}
GREEDY = Sampling(0.0, 1.0, 0, 32)
SAMPLED = Sampling(0.7, 1.0, 20, 4)
DRAWS = 400


@pytest.fixture(scope="module")
def run() -> Iterator[Run[Any]]:
    loop = asyncio.new_event_loop()
    yield loop.run_until_complete
    loop.close()


@pytest.fixture(scope="module")
def book() -> PromptBook:
    return PromptBook(load_tokenizer(embedded_model_dir()))


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine(run: Run[Any], book: PromptBook) -> Iterator[VllmEngine]:
    spec = EngineSpec(
        str(embedded_model_dir()),
        max_model_len=512,
        kv_cache_gib=0.5,
        max_num_seqs=32,
        log_level="WARNING",
        num_speculative_tokens=6,
        draft_frame=Frame(*book.improver_frame()),
    )
    before = dict(os.environ)
    os.environ.update(engine_environment(spec))
    started = VllmEngine(spec)
    run(started.start())
    yield started
    run(started.stop())
    os.environ.clear()
    os.environ.update(before)


def rewrites(book: PromptBook) -> list[tuple[int, ...]]:
    return [book.improver_ids(Prompt("p", (Message("user", question),)), draft) for question, draft in DRAFTS.items()]


@pytest.mark.parametrize("kind", ["rewrites", "answers", "both"])
def test_greedy_tokens_are_the_model_s_own(run: Run[Any], engine: VllmEngine, book: PromptBook, model: Any, kind: str) -> None:
    """Answers alone take the plain sampler, where nothing was proposed; beside rewrites they are rows of the same check."""
    answers = [book.policy_ids(Prompt("p", (Message("user", question),))) for question in DRAFTS]
    asked = {"rewrites": rewrites(book), "answers": answers, "both": rewrites(book) + answers}[kind]

    async def ask() -> list[Completion]:
        return list(await asyncio.gather(*(engine.generate(GenerateRequest(f"{kind}{n}", ids, GREEDY, 0)) for n, ids in enumerate(asked))))

    for ids, answer in zip(asked, run(ask()), strict=True):
        own = model.generate(torch.tensor([ids]), max_new_tokens=GREEDY.max_new_tokens, do_sample=False)[0, len(ids) :].tolist()
        assert list(answer.token_ids) == own


def test_sampled_rewrites_have_the_model_s_distribution(run: Run[Any], engine: VllmEngine, book: PromptBook, model: Any) -> None:
    """Of each token but the first, which is nobody's proposal: its log-prob less the mean log-prob of a token drawn there is 0 on average."""
    ids = rewrites(book)[0]

    async def ask() -> list[Completion]:
        return list(await asyncio.gather(*(engine.generate(GenerateRequest(f"s{seed}", ids, SAMPLED, seed)) for seed in range(DRAWS))))

    drawn = [answer.token_ids for answer in run(ask()) if len(answer.token_ids) == SAMPLED.max_new_tokens]
    assert len(drawn) > DRAWS / 2
    distinct = sorted(set(drawn))
    with torch.no_grad():
        cache = model(torch.tensor([ids[:-1]]), use_cache=True).past_key_values  # the prompt is computed once
        cache.batch_repeat_interleave(len(distinct))
        logits = model(torch.tensor([[ids[-1], *row] for row in distinct]), past_key_values=cache).logits[:, 1:-1]
    logps = processed(logits).log_softmax(-1)
    targets = torch.tensor(distinct)[:, 1:, None]
    own = logps.gather(-1, targets)[..., 0]
    assert own.isfinite().all()  # nothing beyond top_k
    surprise = own - torch.where(logps.isfinite(), logps.exp() * logps, 0.0).sum(-1)
    weights = torch.tensor([float(drawn.count(row)) for row in distinct])[:, None]
    mean = float((weights * surprise).sum() / weights.sum() / surprise.shape[1])
    error = float(((weights * (surprise - mean) ** 2).sum() / weights.sum() / surprise.shape[1] / (len(drawn) * surprise.shape[1])) ** 0.5)
    print(f"mean {mean:+.4f}, standard error {error:.4f}, {len(distinct)} distinct of {len(drawn)}")
    assert abs(mean) < 4 * error


def test_checked_proposals_are_the_tokens_that_the_plain_sampler_draws() -> None:
    """vLLM's two samplers on made-up logits: whatever is proposed, rows get the same tokens and their generators end in the same state."""
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler

    mend_sampling()
    temperature, top_k = torch.tensor([0.7, 0.0, 1.3, 0.7]), torch.tensor([400, 400, 20, 5])
    rows, words, steps, most = len(temperature), 400, 30, 6
    table = torch.randn(rows, steps * (most + 1), words, generator=torch.Generator().manual_seed(0)) * 2
    plain, checking = Sampler(), RejectionSampler(Sampler())

    generators = generators_of(rows)
    drawn = [plain(table[:, place].clone(), metadata(temperature, top_k, generators)).sampled_token_ids[:, 0] for place in range(table.shape[1])]
    wanted = torch.stack(drawn, dim=1).tolist()

    generators, picks = generators_of(rows), random.Random(0)
    got: list[list[int]] = [[] for _ in range(rows)]
    for _ in range(steps):
        ahead = [wanted[row][len(got[row]) :][: picks.randrange(most + 1)] for row in range(rows)]
        drafts = [[token if picks.random() < 0.8 else 7 for token in tokens] for tokens in ahead]
        logits = torch.cat([table[row, len(got[row]) :][: len(drafts[row]) + 1] for row in range(rows)])
        made = checking(checks(drafts), None, logits, metadata(temperature, top_k, generators)).sampled_token_ids
        for row, tokens in enumerate(made.tolist()):
            got[row] += [token for token in tokens if token >= 0]
    assert [tokens == wanted[row][: len(tokens)] for row, tokens in enumerate(got)] == [True] * rows
    assert min(map(len, got)) > 2 * steps

    behind = generators_of(rows)
    for row in (0, 2, 3):
        seeds(len(got[row]), behind[row])
        assert torch.equal(generators[row].get_state(), behind[row].get_state())


def generators_of(rows: int) -> dict[int, torch.Generator]:
    return {row: torch.Generator().manual_seed(row) for row in range(rows)}


def metadata(temperature: torch.Tensor, top_k: torch.Tensor, generators: dict[int, torch.Generator]) -> Any:
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    none = torch.empty(0)
    return SamplingMetadata(
        temperature, False, False, None, top_k, generators, None, True, None, none, none, none, [[] for _ in temperature], None, {},
        LogitsProcessors(),
    )  # fmt: skip


def checks(drafts: list[list[int]]) -> Any:
    """What vLLM says of a step's proposals: each row's logits stand in a piece, the last one for the token behind its proposals."""
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    found = SpecDecodeMetadata.make_dummy(drafts, torch.device("cpu"))
    ends = found.cu_num_sampled_tokens.long()
    found.bonus_logits_indices = ends - 1
    found.target_logits_indices = torch.tensor([place for place in range(int(ends[-1])) if place + 1 not in ends.tolist()], dtype=torch.long)
    return found


def processed(logits: torch.Tensor) -> torch.Tensor:
    scaled = logits / SAMPLED.temperature
    least = scaled.topk(SAMPLED.top_k).values[..., -1:]
    return scaled.masked_fill(scaled < least, float("-inf"))
