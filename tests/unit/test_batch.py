"""Rows, masks and micro-batch plans, worked out by hand; and that a shared row scores exactly as its plain sequences do."""

from __future__ import annotations

import pytest
import torch

from learner.batch import (
    Row,
    collate,
    collate_examples,
    collate_packed,
    collate_pairs,
    example_row,
    pack,
    pair_logps,
    pair_row,
    plan_micro_batches,
    segment_sums,
    weighted_sums,
)
from sgpo_dist.errors import DataError
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Stage, TokenExample


def pair(prompt: tuple[int, ...], chosen: tuple[int, ...], rejected: tuple[int, ...]) -> PreferencePair:
    def completion(ids: tuple[int, ...]) -> Completion:
        return Completion("", ids, FinishReason.STOP, 0)

    return PreferencePair("u", Stage.PREFERENCE, Prompt("p", (Message("user", "x"),)), prompt, completion(rejected), completion(chosen), "v1")


def test_common_leading_tokens_join_the_shared_part():
    row = pair_row(pair((1, 2), (7, 8, 9), (7, 8, 5, 6)))
    assert row == Row(2, (1, 2, 7, 8), ((9,), (5, 6)))
    assert row.length == 7


def test_a_completion_that_begins_the_other_leaves_an_empty_branch():
    assert pair_row(pair((1,), (7, 8), (7,))) == Row(1, (1, 7), ((8,), ()))


def test_layout_of_a_pair_by_hand():
    batch = collate_pairs([pair((1, 2), (7, 9), (7, 5, 6))])
    assert batch.input_ids_B_L.tolist() == [[1, 2, 7, 9, 5, 6]]
    assert batch.positions_B_L.tolist() == [[0, 1, 2, 3, 3, 4]]
    # 7 is predicted after 2; 9 and 5 both after 7; 6 after 5
    assert batch.index_N.tolist() == [1, 2, 2, 4]
    assert batch.target_N.tolist() == [7, 9, 5, 6]
    assert batch.segment_N.tolist() == [0, 1, 2, 2]
    assert batch.mask_B1LL[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 1, 0, 1, 1],
    ]
    assert (batch.num_rows, batch.num_segments, batch.num_tokens) == (1, 3, 6)


def test_padding_is_never_seen_and_never_blind():
    batch = collate_pairs([pair((1, 2, 3), (4,), (5,)), pair((1,), (4,), (5,))])
    visible = batch.mask_B1LL[1, 0]
    assert visible[:3, 3:].sum() == 0  # the three tokens see no padding
    assert visible.any(dim=1).all()  # every query sees something, so no softmax is over nothing


def test_examples_need_no_mask():
    batch = collate_examples([TokenExample("a", (1, 2), (3, 4)), TokenExample("b", (1,), (3,))])
    assert batch.mask_B1LL is None
    assert batch.input_ids_B_L.tolist() == [[1, 2, 3, 4], [1, 3, 0, 0]]
    assert batch.index_N.tolist() == [1, 2, 4]  # the second row starts at 4
    assert batch.segment_N.tolist() == [0, 0, 1]


def test_sums_add_the_common_part_to_both_halves():
    batch = collate_pairs([pair((1, 2), (7, 9), (7, 5, 6))])
    logps = torch.tensor([-1.0, -2.0, -4.0, -8.0])
    assert segment_sums(logps, batch).tolist() == [[-1.0, -2.0, -12.0]]
    chosen, rejected = pair_logps(logps, batch)
    assert (chosen.tolist(), rejected.tolist()) == ([-3.0], [-13.0])


def test_a_row_without_completion_is_refused_by_name():
    with pytest.raises(DataError, match="'a'"):
        example_row(TokenExample("a", (1,), ()))


def test_token_weights_scale_the_weighted_sums_only():
    batch = collate_examples([TokenExample("a", (1,), (3, 4), token_weights=(2.0, 0.5)), TokenExample("b", (1, 2), (5,))])
    logps = torch.tensor([-1.0, -4.0, -3.0])
    assert weighted_sums(logps, batch).tolist() == [[-4.0], [-3.0]]  # -1 * 2 - 4 * 0.5; tokens of a row without weights count 1
    assert segment_sums(logps, batch).tolist() == [[-5.0], [-3.0]]


def test_rows_without_token_weights_take_the_short_way():
    batch = collate_examples([TokenExample("a", (1,), (3, 4))])
    assert batch.weight_N is None
    assert weighted_sums(torch.tensor([-1.0, -2.0]), batch).tolist() == [[-3.0]]


def test_token_weights_of_another_length_are_refused_by_name():
    with pytest.raises(DataError, match="'a' has 1 token weights for 2 tokens"):
        example_row(TokenExample("a", (1,), (3, 4), token_weights=(1.0,)))


def test_packing_fills_sequences_up_to_the_longest_row():
    # longest first: 6 fills one; 4 opens a second with 2 left, which takes the last 2; 3 opens a third, which takes 3
    assert pack([3, 6, 2, 4, 3]) == [(1,), (3, 2), (0, 4)]


def test_layout_of_packed_rows_by_hand():
    rows = [example_row(TokenExample(name, prompt, completion)) for name, prompt, completion in (("a", (1,), (7, 8)), ("b", (2, 3), (9,)))]
    batch = collate_packed([rows, [example_row(TokenExample("c", (4,), (5,)))]])
    assert batch.input_ids_B_L.tolist() == [[1, 7, 8, 2, 3, 9], [4, 5, 0, 0, 0, 0]]
    assert batch.positions_B_L.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 0, 0, 0]]
    assert (batch.index_N.tolist(), batch.target_N.tolist(), batch.segment_N.tolist()) == ([0, 1, 4, 6], [7, 8, 9, 5], [0, 0, 1, 2])
    assert (batch.num_rows, batch.num_segments, batch.num_tokens) == (3, 1, 8)
    assert batch.mask_B1LL[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    assert batch.mask_B1LL[1, 0, :2, 2:].sum() == 0
    assert batch.mask_B1LL[1, 0].any(dim=1).all()


def test_packed_pairs_see_the_prompt_and_branch_of_their_own_only():
    first, second = pair_row(pair((1,), (7,), (8,))), pair_row(pair((2,), (5,), (6,)))
    batch = collate_packed([[first, second]])
    assert batch.segment_N.tolist() == [1, 2, 4, 5]
    assert batch.mask_B1LL[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 0, 1],
    ]


def test_plan_balances_ranks_and_keeps_the_budget():
    # longest first to the lighter rank: 5 -> 0, 4 -> 1, 3 -> 1 (4 < 5), 2 -> 0, 1 -> 0 (7 = 7, lower rank wins)
    plan = plan_micro_batches([1, 2, 3, 4, 5], num_ranks=2, max_tokens=8)
    assert plan == [[[4], [1, 0]], [[3, 2], []]]  # 2 rows of width 5 would be 10 > 8; rank 1 has an empty stand-in


def test_a_row_beyond_the_budget_goes_alone():
    assert plan_micro_batches([9, 2, 2], num_ranks=1, max_tokens=4) == [[[0], [1, 2]]]


def test_plan_covers_every_row_once():
    lengths = [(7 * n) % 13 + 1 for n in range(50)]
    plan = plan_micro_batches(lengths, num_ranks=3, max_tokens=20)
    assert sorted(n for rank in plan for micro in rank for n in micro) == list(range(50))
    assert len({len(rank) for rank in plan}) == 1
    assert all(max(lengths[n] for n in micro) * len(micro) <= 20 for rank in plan for micro in rank if micro)


def test_shared_rows_score_as_plain_sequences_do():
    """A causal toy model (a token's hidden state is the mean of what it may see): the mask must give the plain sequence's states."""
    torch.manual_seed(0)
    table, head = torch.randn(16, 8), torch.randn(8, 16)
    rows = [pair((1, 2, 3), (7, 9, 4), (7, 5)), pair((4, 4), (1,), (2, 3, 3, 3))]
    batch = collate_pairs(rows)
    weights = batch.mask_B1LL[:, 0].float()
    hidden = (weights / weights.sum(-1, keepdim=True)) @ table[batch.input_ids_B_L]
    logps = (hidden.flatten(0, 1)[batch.index_N] @ head).log_softmax(-1).gather(1, batch.target_N[:, None])[:, 0]
    chosen, rejected = pair_logps(logps, batch)

    def plain(prompt: tuple[int, ...], completion: tuple[int, ...]) -> float:
        ids = torch.tensor(prompt + completion)
        means = table[ids].cumsum(0) / torch.arange(1, len(ids) + 1)[:, None]
        scores = (means @ head).log_softmax(-1)
        return float(sum(scores[place - 1, ids[place]] for place in range(len(prompt), len(ids))))

    assert chosen.tolist() == pytest.approx([plain(p.prompt_ids, p.chosen.token_ids) for p in rows], abs=1e-5)
    assert rejected.tolist() == pytest.approx([plain(p.prompt_ids, p.rejected.token_ids) for p in rows], abs=1e-5)


def test_rows_collate_together_only_in_one_shape():
    batch = collate([Row(1, (3, 4), ((), ()))])
    assert segment_sums(torch.tensor([-2.0]), batch).tolist() == [[-2.0, 0.0, 0.0]]
