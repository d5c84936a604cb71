"""Filtering without sorting keeps what the definition of top-k and top-p keeps. Against vLLM's own filter: tests/integration/test_engine.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from actors.nucleus import WIDTH, without_sorting

VOCABULARY = 4 * WIDTH
ROWS = 6
NEAR = 1e-4  # probability at the edge of a nucleus that rounding may put on either side


def by_definition(logits_B_V: Tensor, k_B: Tensor | None, p_B: Tensor | None, _: bool = False) -> Tensor:
    """The definition, row by row in float64."""
    out_B_V = torch.full_like(logits_B_V, -torch.inf)
    for row, logits_V in enumerate(logits_B_V.double()):
        values_V, places_V = logits_V.sort(descending=True)
        k = VOCABULARY if k_B is None else int(k_B[row])
        probabilities_k = values_V[:k].softmax(-1)
        above_k = probabilities_k.cumsum(-1) - probabilities_k
        kept = places_V[:k][above_k < (1.0 if p_B is None else float(p_B[row]))]
        out_B_V[row, kept] = logits_B_V[row, kept]
    return out_B_V


def refuse(*_: object) -> Tensor:
    raise AssertionError("sorted")


def differing(ours_B_V: Tensor, theirs_B_V: Tensor, logits_B_V: Tensor) -> float:
    """Probability of the tokens that one keeps and the other does not, in the worst row; what both keep is unchanged."""
    both = ours_B_V.isfinite() & theirs_B_V.isfinite()
    assert torch.equal(ours_B_V[both], logits_B_V[both])
    assert both.any(dim=-1).all()
    odd = ours_B_V.isfinite() ^ theirs_B_V.isfinite()
    return float((logits_B_V.softmax(-1) * odd).sum(-1).max())


def drawn(spread: float, seed: int = 0) -> Tensor:
    return torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize("p", [0.1, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("k", [None, 1, 40, WIDTH, WIDTH + 7, VOCABULARY])
@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])
def test_the_same_tokens_stay(p: float, k: int | None, spread: float) -> None:
    logits_B_V = drawn(spread)
    k_B = None if k is None else torch.full((ROWS,), k)
    ours = without_sorting(by_definition)(logits_B_V.clone(), k_B, torch.full((ROWS,), p), True)
    assert differing(ours, by_definition(logits_B_V, k_B, torch.full((ROWS,), p)), logits_B_V) < NEAR


def test_rows_differ_in_what_they_ask_for() -> None:
    logits_B_V = drawn(4.0)
    k_B, p_B = torch.tensor([1, 5, VOCABULARY, VOCABULARY, WIDTH + 1, 300]), torch.tensor([0.9, 1.0, 1.0, 0.5, 0.99, 0.3])
    ours = without_sorting(by_definition)(logits_B_V.clone(), k_B, p_B)
    assert differing(ours, by_definition(logits_B_V, k_B, p_B), logits_B_V) < NEAR
    assert ours[:3].isfinite().sum(-1).tolist() == [1, 5, VOCABULARY]


def test_a_narrow_nucleus_and_rows_that_ask_for_nothing_are_not_sorted() -> None:
    without_sorting(refuse)(drawn(8.0), None, torch.tensor([0.95] * (ROWS - 1) + [1.0]))
    without_sorting(refuse)(drawn(0.5), torch.full((ROWS,), 40), torch.full((ROWS,), 0.95))
    with pytest.raises(AssertionError, match="sorted"):
        without_sorting(refuse)(drawn(0.5), None, torch.full((ROWS,), 0.95))


def test_equal_logits_at_the_k_th_place_are_left_to_sorting() -> None:
    with pytest.raises(AssertionError, match="sorted"):
        without_sorting(refuse)(torch.zeros(1, VOCABULARY), torch.tensor([40]), torch.tensor([0.95]))


@pytest.mark.parametrize("arguments", [(torch.full((ROWS,), 40), None), (None, None)])
def test_without_a_nucleus_it_is_the_other_filters_business(arguments: tuple[Tensor | None, Tensor | None]) -> None:
    calls: list[Tensor] = []

    def other(logits_B_V: Tensor, *_: object) -> Tensor:
        calls.append(logits_B_V)
        return logits_B_V

    without_sorting(other)(drawn(1.0), *arguments)
    assert len(calls) == 1
