"""Speculation for the improver's pass: a rewrite mostly repeats its draft, and the draft stands in its prompt.

vLLM's engine process makes one ``PointerProposer`` (``speculative_config`` method "custom_class") and asks it after every step what each request's
next tokens might be; the model checks them all in one step and keeps those that it would have sampled. The pointer follows the draft, finds its
place again after an edit, and proposes as many tokens as are likely to pay. Requests that are no rewrites get no proposals. Rejection sampling
keeps the model's distribution whatever is proposed. Greedy tokens are the same ones; a sampled rewrite follows other random numbers than without
proposals, so that where rewrites are sampled proposals must not depend on what else runs (``busy``). Leaves out: which templates there are
(``prompts``), when to speculate at all (the configuration).

Everything but ``PointerProposer`` is pure: a request's trail is a function of its tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

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


@dataclass(frozen=True, slots=True)
class Frame:
    """Token ids that stand right before and right after the draft in every prompt of a rewrite; the prompt ends with the latter."""

    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trail:
    """How far a rewrite has come: the next draft token, and the share of tokens that were foreseen of late."""

    draft: tuple[int, ...]
    place: int = 0
    rate: float = FIRST_RATE
    last: int | None = None

    def proposals(self, step_tokens: float, busy: int, most: int) -> tuple[int, ...]:
        """The next draft tokens, as many as pay.

        The i-th proposal is kept with probability rate^i and costs a token's time c; keeping it saves a share of a step, whose time is
        f + c * busy for ``busy`` requests: it pays while rate^i > ``MARGIN`` * c / (f / busy + c). ``step_tokens`` is f / c.
        """
        least = MARGIN * busy / (step_tokens + busy)
        count, chance = 0, self.rate
        while count < most and chance > least:
            count, chance = count + 1, chance * self.rate
        return self.draft[self.place : self.place + count]


def follow(trail: Trail, token: int) -> Trail:
    """The trail after one more token of the rewrite."""
    hit = trail.place < len(trail.draft) and trail.draft[trail.place] == token
    place = trail.place + 1 if hit else _place_again(trail, token)
    return replace(trail, place=place, rate=MEMORY * trail.rate + (1 - MEMORY) * hit, last=token)


def _place_again(trail: Trail, token: int) -> int:
    """After an edit: behind the nearest draft token that is this one, best where the token before it fits too; else the edit replaced one."""
    draft, here = trail.draft, trail.place
    near = [place for place in range(max(0, here - BEHIND), min(len(draft), here + AHEAD)) if draft[place] == token]
    fitting = [place for place in near if place > 0 and draft[place - 1] == trail.last]
    if found := fitting or near:
        return min(found, key=lambda place: abs(place - here)) + 1
    return min(here + 1, len(draft))


def begun(tokens: np.ndarray, frame: Frame, end: int) -> tuple[Trail, int] | None:
    """The draft in the prompt of a rewrite, and where the rewrite begins; None when ``tokens[:end]`` holds no such prompt.

    The token that follows the draft, the end of its turn, is the last one of the trail: a rewrite that is done ends so, too.
    """
    close = last_place(tokens[:end], frame.after)
    opened = -1 if close < 0 else last_place(tokens[:close], frame.before)
    if opened < 0:
        return None
    draft = tokens[opened + len(frame.before) : close + 1]
    return Trail(tuple(draft.tolist())), close + len(frame.after)


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
            for token in tokens[old:].tolist():
                trail = follow(trail, token)
        self._trails[_name(tokens)] = trail
        if len(self._trails) > MOST_TRAILS:
            self._trails.popitem(last=False)
        if trail is None:
            return []
        room = self._longest - len(tokens) - 1
        return list(trail.proposals(self._step_tokens, busy, min(self._most, room)))

    def _known(self, tokens: np.ndarray, old: int) -> Trail | None:
        """The trail of the first ``old`` tokens: kept since the last step, or made from them."""
        name = _name(tokens[:old])
        if name in self._trails:
            return self._trails.pop(name)
        found = begun(tokens, self._frame, old)
        if found is None:
            return None
        trail, start = found
        for token in tokens[start:old].tolist():
            trail = follow(trail, token)
        return trail


def _name(tokens: np.ndarray) -> int:
    return hash(tokens.tobytes())


def mend_sampling() -> None:
    """Mend what vLLM 0.32's rejection sampler does wrong on processors, in this process, and what it does for nothing.

    Its ``expand_batch_to_tokens`` writes only int64 tensors: temperature, top_k and top_p of proposed tokens are whatever was in memory, and what is
    sampled has nothing to do with the model's distribution (vllm-project/vllm, pull request 42638, closed without a merge). A step in which
    nothing was proposed to anybody goes to the plain sampler: vLLM's dies of the largest top_k among none. And random numbers for tokens that may
    be refused are drawn for the rows only that have some (of 64 rows without: a fifth of a step).
    """
    from vllm.v1.sample import rejection_sampler

    sampler = rejection_sampler.RejectionSampler
    checked = sampler.forward

    def forward(self: Any, metadata: Any, draft_probs: Tensor | None, logits: Tensor, sampling: Any) -> Any:
        return checked(self, metadata, draft_probs, logits, sampling) if len(metadata.draft_token_ids) else self.sampler(logits, sampling)

    sampler.forward = forward
    rejection_sampler.expand_batch_to_tokens = expanded
    rejection_sampler.sample_recovered_tokens = partial(recovered, rejection_sampler._sample_recovered_tokens)


def recovered(
    pick: Callable[..., None], most: int, counts: Sequence[int], ends_B: Tensor, drafts_N: Tensor, draft_probs: Tensor | None, probs_N_V: Tensor,
    sampling: Any, device: Any, double: bool = False,
) -> Tensor:  # fmt: skip
    """``[N]``: what takes the place of each proposed token, should it be refused; vLLM's function of this name, for rows with proposals only.

    ``counts`` and ``ends_B`` say which of the N proposals are whose. ``pick`` is vLLM's kernel: argmax of what is left of each distribution times
    1 / Exp(1) (the exponential race), one set of random numbers a row, from its own generator where it has one.
    """
    import torch

    rows = [row for row, count in enumerate(counts) if count]
    race_R_V = torch.empty((len(rows), probs_N_V.shape[-1]), dtype=torch.float64 if double else torch.float32, device=device)
    for race_V, row in zip(race_R_V, rows, strict=True):
        race_V.exponential_(generator=sampling.generators.get(row))
    recovered_N = torch.empty_like(drafts_N)
    pick(recovered_N, ends_B[rows], drafts_N, draft_probs, probs_N_V, race_R_V.reciprocal_(), max_spec_len=most)
    return recovered_N


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
