"""Speculation for the improver's pass: a rewrite mostly repeats its draft, and the draft stands in its prompt.

vLLM's engine process makes one ``PointerProposer`` (``speculative_config`` method "custom_class") and asks it after every step what each request's
next tokens might be; the model checks them all in one step and keeps those that it would have sampled. The pointer follows the draft, finds its
place again after an edit (there, or where prompt and rewrite last had the same tokens), and proposes as many tokens as are likely to pay. Requests
that are no rewrites get no proposals. Whatever is proposed, greedy rewrites are the same, and on processors sampled ones as well
(``mend_sampling``), but for those that hang on a sum's last digit, which other tokens in a step may turn. Elsewhere rejection sampling keeps the
model's distribution but follows other random numbers, so that where rewrites are sampled proposals must not depend on what else runs (``busy``).
Leaves out: which templates there are (``prompts``), when to speculate at all (the configuration).

Everything but ``PointerProposer`` is pure: a request's trail is a function of its tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sgpo_dist.textual import common_start

if TYPE_CHECKING:
    from torch import Generator, Tensor

CONFIG_KEY: Final = "sgpo_draft_pointer"
PROPOSER: Final = f"{__name__}.PointerProposer"
BEHIND: Final = 16
AHEAD: Final = 24
"""Draft tokens around the pointer among which a rewrite's place is looked for after an edit."""
MEMORY: Final = 0.8
FIRST_RATE: Final = 0.7
"""The rate of hits is a moving average over about five tokens; a rewrite is trusted that much before its first token."""
MARGIN: Final = 1.2
"""A proposal has to pay by so much more than its token's time: a machine that computes slowly at the hour has a fixed time of fewer tokens."""
MOST_TRAILS: Final = 4096
REFUSED: Final = -1
"""vLLM's mark behind a row's last token."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Token ids that stand right before and right after the draft in every prompt of a rewrite; the prompt ends with the latter."""

    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trail:
    """How far a rewrite has come: where in the row the draft begins and ends, whose token is foreseen next, and the share foreseen of late."""

    begin: int
    end: int
    place: int
    rate: float = FIRST_RATE

    def proposals(self, tokens: np.ndarray, step_tokens: float, busy: int, most: int) -> list[int]:
        """The row's tokens from the place on, as many as pay; nothing follows the draft's last one.

        The i-th proposal is kept with probability rate^i and costs a token's time c; keeping it saves a share of a step, whose time is
        f + c * busy for ``busy`` requests: it pays while rate^i > ``MARGIN`` * c / (f / busy + c). ``step_tokens`` is f / c.
        """
        least = MARGIN * busy / (step_tokens + busy)
        count, chance = 0, self.rate
        while count < most and chance > least:
            count, chance = count + 1, chance * self.rate
        stop = self.end if self.place < self.end else len(tokens)
        found: list[int] = tokens[self.place : min(self.place + count, stop)].tolist()
        return found


def follow(trail: Trail, tokens: np.ndarray) -> Trail:
    """The trail after one more token of the rewrite, the last one of the row's ``tokens``."""
    hit = trail.place < len(tokens) - 1 and bool(tokens[trail.place] == tokens[-1])
    place = trail.place + 1 if hit else _place_again(trail, tokens)
    return replace(trail, place=place, rate=MEMORY * trail.rate + (1 - MEMORY) * hit)


def _followed(trail: Trail, tokens: np.ndarray, known: int) -> Trail:
    """The trail after all of ``tokens``, of which it has followed ``known``."""
    for end in range(known, len(tokens)):
        trail = follow(trail, tokens[: end + 1])
    return trail


def _place_again(trail: Trail, tokens: np.ndarray) -> int:
    """After an edit: behind a token that is this one. First where the token before it fits as well, around the pointer in the draft and else last in
    the row (a rewrite repeats its prompt and itself, too), then without; where there is none, the edit replaced one token.
    """
    here = trail.place
    same = np.flatnonzero(tokens[1:-1] == tokens[-1]) + 1
    near = (same >= max(trail.begin, here - BEHIND)) & (same < min(trail.end, here + AHEAD))
    fitting = tokens[same - 1] == tokens[-2]
    for places in (same[fitting & near], same[fitting][-1:], same[near], same[-1:]):
        if len(places):
            return int(places[np.abs(places - here).argmin()]) + 1
    return here + 1


def begun(tokens: np.ndarray, frame: Frame, end: int) -> tuple[Trail, int] | None:
    """The trail at the draft's begin in the prompt of a rewrite, and where the rewrite begins; None when ``tokens[:end]`` holds no such prompt.

    The token that follows the draft, the end of its turn, is the draft's last one: a rewrite that is done ends so, too.
    """
    close = last_place(tokens[:end], frame.after)
    opened = -1 if close < 0 else last_place(tokens[:close], frame.before)
    if opened < 0:
        return None
    begin = opened + len(frame.before)
    return Trail(begin, close + 1, begin), close + len(frame.after)


def last_place(tokens: np.ndarray, part: Sequence[int]) -> int:
    """Where ``part`` last begins in ``tokens``; -1 when it does not."""
    if len(part) > len(tokens):
        return -1
    found = np.flatnonzero((np.lib.stride_tricks.sliding_window_view(tokens, len(part)) == np.asarray(part)).all(axis=1))
    return int(found[-1]) if len(found) else -1


class PointerProposer:
    """What vLLM calls; made in its engine process from ``additional_config[CONFIG_KEY]`` (see ``speculation_arguments``)."""

    def __init__(self, vllm_config: Any) -> None:
        mine: Mapping[str, Any] = vllm_config.additional_config[CONFIG_KEY]
        self._frame = Frame(tuple(mine["before"]), tuple(mine["after"]))
        self._step_tokens = float(mine["step_tokens"])
        self._busy = int(mine["busy"])
        self._most = int(vllm_config.speculative_config.num_speculative_tokens)
        self._longest = int(vllm_config.model_config.max_model_len)
        self._trails: OrderedDict[int, Trail | None] = OrderedDict()
        if vllm_config.device_config.device_type == "cpu":
            mend_sampling()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """There is no draft model."""

    def propose(
        self, sampled_token_ids: Sequence[Sequence[int]], num_tokens_no_spec: np.ndarray, token_ids_cpu: np.ndarray, slot_mappings: Any = None
    ) -> list[list[int]]:
        """Proposals by row. ``sampled_token_ids`` are the step's new tokens (none for a row that is not sampled yet), which
        ``token_ids_cpu[row, : num_tokens_no_spec[row]]`` ends with.
        """
        busy = self._busy or sum(1 for fresh in sampled_token_ids if fresh)
        rows = zip(sampled_token_ids, num_tokens_no_spec, token_ids_cpu, strict=False)
        return [self._row(tokens[: int(count)], len(fresh), busy) if fresh else [] for fresh, count, tokens in rows]

    def _row(self, tokens: np.ndarray, fresh: int, busy: int) -> list[int]:
        old = len(tokens) - fresh
        trail = self._known(tokens, old)
        if trail is not None:
            trail = _followed(trail, tokens, old)
        self._trails[_name(tokens)] = trail
        if len(self._trails) > MOST_TRAILS:
            self._trails.popitem(last=False)
        if trail is None:
            return []
        room = self._longest - len(tokens) - 1
        return trail.proposals(tokens, self._step_tokens, busy, min(self._most, room))

    def _known(self, tokens: np.ndarray, old: int) -> Trail | None:
        """The trail of the first ``old`` tokens: kept since the last step, or made from them."""
        name = _name(tokens[:old])
        if name in self._trails:
            return self._trails.pop(name)
        found = begun(tokens, self._frame, old)
        if found is None:
            return None
        trail, start = found
        return _followed(trail, tokens[:old], start)


def _name(tokens: np.ndarray) -> int:
    return hash(tokens.tobytes())


def mend_sampling() -> None:
    """Have vLLM 0.32's rejection sampler draw what its plain sampler would, in this process; for processors.

    There the plain sampler draws one seed a token from the request's generator. So can the check: each place's token is drawn by the seed that its
    turn would have, proposals are kept while they are that token, and the generator goes on behind the last token kept (``as_drawn``). Proposals
    then change no token, and nothing is drawn for places that may be refused (vLLM: 49,152 random numbers a row).

    Its ``expand_batch_to_tokens`` writes only int64 tensors: temperature, top_k and top_p of proposed tokens are whatever was in memory, and what is
    sampled has nothing to do with the model's distribution (vllm-project/vllm, pull request 42638, closed without a merge). And a step in which
    nothing was proposed to anybody goes to the plain sampler: vLLM's check dies of the largest top_k among none.
    """
    import torch
    from vllm.v1.sample import rejection_sampler

    checked = rejection_sampler.RejectionSampler.forward

    def forward(self: Any, metadata: Any, draft_probs: Tensor | None, logits: Tensor, sampling: Any) -> Any:
        counts, generators = metadata.num_draft_tokens, sampling.generators
        if not any(counts):
            return self.sampler(logits, sampling)
        before = {row: generators[row].get_state() for row, count in enumerate(counts) if count and row in generators}
        seeds_N = torch.cat([seeds(count, generators.get(row)) for row, count in enumerate(counts)])
        rejection_sampler.rejection_sample = partial(as_drawn, seeds_N)
        found = checked(self, metadata, draft_probs, logits, sampling)
        for row, state in before.items():
            generators[row].set_state(state)
            seeds(int((found.sampled_token_ids[row] != REFUSED).sum()), generators[row])
        return found

    rejection_sampler.RejectionSampler.forward = forward
    rejection_sampler.expand_batch_to_tokens = expanded


def seeds(count: int, generator: Generator | None) -> Tensor:
    """``[count]``: what vLLM's plain sampler on processors draws for so many tokens of a request, one after the other."""
    import torch

    return torch.randint(0, 2**31, (count,), generator=generator)


def as_drawn(
    seeds_N: Tensor, drafts_N: Tensor, counts: Sequence[int], most: int, ends_B: Tensor, draft_probs: None, logits_N_V: Tensor, bonus_B_1: Tensor,
    sampling: Any, **unused: Any,
) -> Tensor:  # fmt: skip
    """``[B, most + 1]``: each row's tokens of this step, then ``REFUSED``; takes the place of vLLM's ``rejection_sample``.

    ``counts`` and ``ends_B`` say which of the N proposals are whose. Tokens are the ones that the plain sampler draws by ``seeds_N`` (or the most
    likely one, where a row is greedy), up to the first that was not foreseen; ``bonus_B_1`` follows where all were.
    """
    import torch

    if sampling.all_greedy:
        drawn_N = logits_N_V.argmax(-1)
    else:
        drawn_N = torch.ops._C.fused_gumbel_argmax(logits_N_V, seeds_N)
        greedy_N = expanded(sampling.temperature, ends_B, len(seeds_N)) == 0
        drawn_N[greedy_N] = logits_N_V[greedy_N].argmax(-1)
    kept_B_K = torch.full((len(counts), most + 1), REFUSED, dtype=torch.int32)
    rows = zip(drawn_N.split(list(counts)), drafts_N.split(list(counts)), bonus_B_1, kept_B_K, strict=True)
    for drawn, drafts, bonus, kept in rows:
        tokens = torch.cat([drawn, bonus])
        count = common_start(tokens.tolist(), drafts.tolist()) + 1
        kept[:count] = tokens[:count]
    return kept_B_K


def expanded(x_B: Tensor, ends_B: Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0) -> Tensor:
    """``[num_tokens]``: the value of each row as often as the row has tokens, which end at ``ends_B``; one value may be replaced by another."""
    import torch

    counts_B = torch.diff(ends_B, prepend=ends_B.new_zeros(1))
    return x_B.masked_fill(x_B == replace_from, replace_to).repeat_interleave(counts_B, output_size=num_tokens)


def speculation_arguments(frame: Frame, num_tokens: int, step_tokens: float, busy: int = 0) -> dict[str, Any]:
    """Arguments for vLLM's AsyncEngineArgs: at most ``num_tokens`` proposals a step and request; a step costs as much as ``step_tokens`` tokens.

    Proposals are weighed for ``busy`` requests at once; 0 = for as many as there are.
    """
    mine = {"before": list(frame.before), "after": list(frame.after), "step_tokens": step_tokens, "busy": busy}
    return {
        "speculative_config": {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": num_tokens},
        "additional_config": {CONFIG_KEY: mine},
    }
