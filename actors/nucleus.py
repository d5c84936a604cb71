"""Top-k and top-p filtering of logits without sorting the vocabulary, for engines on processors.

vLLM's sampler sorts all V logits of each of the B rows for it, which on a processor takes longer than the rest of a decode step of a small
model. A nucleus is seldom wider than ``WIDTH`` tokens, and then its ``topk`` is enough. Put into vLLM's worker by ``weight_receiver``. Knows
nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

WIDTH: Final = 1024
Filter = Callable[[Tensor, Tensor | None, Tensor | None, bool], Tensor]


def without_sorting(by_sorting: Filter) -> Filter:
    """``by_sorting(logits_B_V, k_B, p_B, allow_cpu_sync)`` with what it does, sooner: rows that are wider than ``WIDTH`` still go to it.

    A row keeps its k largest logits (k = V: all), and of these the smallest set of largest ones with a probability of at least p together
    (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751); the others become -inf. Which of two equal logits goes is left open, and so is
    a token whose edge of the set lies within rounding of p.
    """

    def apply(logits_B_V: Tensor, k_B: Tensor | None, p_B: Tensor | None, allow_cpu_sync: bool = False) -> Tensor:
        vocabulary = logits_B_V.shape[-1]
        if p_B is None or vocabulary <= WIDTH:
            return by_sorting(logits_B_V, k_B, p_B, allow_cpu_sync)
        values_B_W, places_B_W = logits_B_V.topk(WIDTH, dim=-1)
        total_B_1 = logits_B_V.logsumexp(dim=-1, keepdim=True)
        within_B_W = torch.ones_like(values_B_W, dtype=torch.bool)
        is_wide_B = torch.zeros_like(p_B, dtype=torch.bool)
        limited_B = torch.zeros_like(is_wide_B)
        if k_B is not None:
            limited_B = k_B < vocabulary
            least_B_1 = values_B_W.gather(1, (k_B.long().clamp(max=WIDTH) - 1).unsqueeze(1))
            within_B_W = ~limited_B.unsqueeze(1) | (values_B_W >= least_B_1)
            kept_B_1 = values_B_W.masked_fill(~within_B_W, -torch.inf).logsumexp(dim=-1, keepdim=True)
            total_B_1 = torch.where(limited_B.unsqueeze(1), kept_B_1, total_B_1)
            is_wide_B = limited_B & within_B_W[:, -1]  # k, or logits that equal the k-th, may go on beyond WIDTH
        probabilities_B_W = (values_B_W - total_B_1).exp()
        above_B_W = probabilities_B_W.cumsum(dim=-1) - probabilities_B_W
        keep_B_W = within_B_W & (above_B_W < p_B.unsqueeze(1))
        is_wide_B = is_wide_B | keep_B_W[:, -1]
        filtered_B_V = torch.full_like(logits_B_V, -torch.inf).scatter_(1, places_B_W, values_B_W.masked_fill(~keep_B_W, -torch.inf))
        if is_wide_B.any():
            whole_B = is_wide_B & ~limited_B & (p_B >= 1)
            filtered_B_V[whole_B] = logits_B_V[whole_B]
            rest_B = is_wide_B & ~whole_B
            if rest_B.any():
                filtered_B_V[rest_B] = by_sorting(logits_B_V[rest_B], None if k_B is None else k_B[rest_B], p_B[rest_B], allow_cpu_sync)
        return filtered_B_V

    return apply
