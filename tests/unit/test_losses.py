"""The losses against numbers worked out by hand. In the comments r_w and r_l are the log-ratios of chosen and rejected."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor, tensor

from learner.losses import LOSSES, REFERENCE_FREE, PairScores, nll, preference_loss, zero_of
from sgpo_dist.config import LossName
from sgpo_dist.roles import LossPlan

LN3 = math.log(3)  # sigmoid(ln 3) = 3/4


def scores(ratios: list[tuple[float, float]], tokens: list[tuple[int, int]] | None = None) -> PairScores:
    """Pairs with the given log-ratios, over a reference that is not zero."""
    chosen, rejected = (tensor([row[half] for row in ratios]) for half in (0, 1))
    counts = tensor(tokens or [(1, 1)] * len(ratios), dtype=torch.float32)
    return PairScores(chosen - 6, rejected - 5, torch.full_like(chosen, -6), torch.full_like(rejected, -5), counts[:, 0], counts[:, 1])


def value(plan: LossPlan, given: PairScores) -> float:
    return float(LOSSES[plan.loss_type](given, plan)[0])


def gradients(plan: LossPlan, given: PairScores) -> tuple[list[float], list[float]]:
    """d loss / d log pi of the chosen and rejected texts."""
    chosen, rejected = (part.detach().requires_grad_() for part in (given.chosen_P, given.rejected_P))
    loss, _ = preference_loss(
        PairScores(chosen, rejected, given.ref_chosen_P, given.ref_rejected_P, given.chosen_tokens_P, given.rejected_tokens_P), plan
    )
    loss.backward()
    return chosen.grad.tolist(), rejected.grad.tolist()


# ---- sigmoid ----------------------------------------------------------------------------------------------------------------------


def test_sigmoid_loss_and_metrics_of_one_pair_by_hand():
    # rewards 0.5 * 2 = 1 and 0, margin 1, loss = ln(1 + 1/e)
    loss, metrics = LOSSES["sigmoid"](scores([(2.0, 0.0)]), LossPlan(beta=0.5))
    assert loss.item() == pytest.approx(0.3132617, abs=1e-6)
    assert metrics == pytest.approx(
        {
            "rewards/chosen": 1.0,
            "rewards/rejected": 0.0,
            "rewards/accuracies": 1.0,
            "rewards/margins": 1.0,
            "logps/chosen": -4.0,
            "logps/rejected": -5.0,
        }
    )


def test_label_smoothing_mixes_both_orders_by_hand():
    # margin ln 3: -0.9 ln 0.75 - 0.1 ln 0.25 = 0.2589139 + 0.1386294
    assert value(LossPlan(beta=1.0, label_smoothing=0.1), scores([(LN3, 0.0)])) == pytest.approx(0.3975433, abs=1e-6)


def test_sigmoid_loss_is_the_mean_over_pairs_and_a_tie_is_not_accurate():
    # margins 0 and -1: losses ln 2 and ln(1 + e); accuracy counts neither
    loss, metrics = LOSSES["sigmoid"](scores([(0.0, 0.0), (-1.0, 0.0)]), LossPlan(beta=1.0))
    assert loss.item() == pytest.approx((0.6931472 + 1.3132617) / 2, abs=1e-6)
    assert metrics["rewards/accuracies"] == 0.0
    assert metrics["rewards/margins"] == pytest.approx(-0.5)


def test_sigmoid_gradient_by_hand():
    # -beta * sigmoid(-margin) = -0.1 / 2 at margin 0, and the opposite for rejected
    assert gradients(LossPlan(beta=0.1), scores([(0.0, 0.0)])) == (pytest.approx([-0.05]), pytest.approx([0.05]))


# ---- the others -------------------------------------------------------------------------------------------------------------------


def test_sigmoid_norm_divides_each_ratio_by_its_tokens():
    # 3 / 6 - (-1 / 2) = 1, times beta 2: ln(1 + e^-2)
    plan, given = LossPlan("sigmoid_norm", beta=2.0), scores([(3.0, -1.0)], [(6, 2)])
    assert value(plan, given) == pytest.approx(0.1269280, abs=1e-6)
    assert LOSSES["sigmoid_norm"](given, plan)[1]["rewards/chosen"] == pytest.approx(6.0)  # rewards stay those of whole completions
    # beta * sigmoid(-2) = 2 * 0.1192029, by 6 and by 2 tokens
    assert gradients(plan, given) == (pytest.approx([-0.0397343], abs=1e-6), pytest.approx([0.1192029], abs=1e-6))


def test_robust_by_hand_and_unbiased():
    plan = LossPlan("robust", beta=1.0, label_smoothing=0.1)
    right, flipped = value(plan, scores([(LN3, 0.0)])), value(plan, scores([(0.0, LN3)]))
    assert right == pytest.approx((0.2589139 - 0.1386294) / 0.8, abs=1e-6)  # (-0.9 ln 0.75 + 0.1 ln 0.25) / 0.8
    assert 0.9 * right + 0.1 * flipped == pytest.approx(-math.log(0.75), abs=1e-6)  # a tenth flipped: on average the clean loss


def test_ipo_by_hand():
    # target 1 / (2 * 0.25) = 2; 6 / 4 - 1 / 2 = 1; (1 - 2)^2 = 1, slopes 2 * (1 - 2) / 4 and -2 * (1 - 2) / 2
    plan, given = LossPlan("ipo", beta=0.25), scores([(6.0, 1.0)], [(4, 2)])
    assert value(plan, given) == pytest.approx(1.0)
    assert gradients(plan, given) == (pytest.approx([-0.5]), pytest.approx([1.0]))
    assert gradients(plan, scores([(14.0, 1.0)], [(4, 2)])) == (pytest.approx([0.5]), pytest.approx([-1.0]))  # beyond the target it pulls back


def test_hinge_by_hand():
    # margins 0.5 and 2: max(0, 0.5) and max(0, -1); a pair beyond the margin has no slope
    plan, given = LossPlan("hinge", beta=0.5), scores([(1.0, 0.0), (4.0, 0.0)])
    assert value(plan, given) == pytest.approx(0.25)
    assert gradients(plan, given) == (pytest.approx([-0.25, 0.0]), pytest.approx([0.25, 0.0]))


def test_simpo_by_hand_without_a_reference():
    # 2 * (-4 / 4) - 2 * (-6 / 3) - 0.25 * 2 = 1.5: ln(1 + e^-1.5)
    nothing = tensor([math.nan])
    given = PairScores(tensor([-4.0]), tensor([-6.0]), nothing, nothing, tensor([4.0]), tensor([3.0]))
    loss, metrics = LOSSES["simpo"](given, LossPlan("simpo", beta=2.0, simpo_gamma=0.25))
    assert loss.item() == pytest.approx(0.2014133, abs=1e-6)
    assert (metrics["rewards/chosen"], metrics["rewards/rejected"], metrics["rewards/margins"]) == (-2.0, -4.0, 2.0)
    assert {"simpo"} == REFERENCE_FREE


def test_apo_zero_by_hand():
    # (1 - 3/4) + 1/4, slopes -3/4 * 1/4 and +3/4 * 1/4
    plan, given = LossPlan("apo_zero", beta=1.0), scores([(LN3, -LN3)])
    assert value(plan, given) == pytest.approx(0.5)
    assert gradients(plan, given) == (pytest.approx([-0.1875]), pytest.approx([0.1875]))


def test_dpop_penalises_a_chosen_text_below_its_reference():
    plan = LossPlan("dpop", beta=0.5, dpop_lambda=2.0)
    above, below = scores([(1.0, -1.0)]), scores([(-1.0, -3.0)])
    assert value(plan, above) == pytest.approx(0.3132617, abs=1e-6)  # no penalty: the sigmoid loss of margin 1
    assert value(plan, below) == pytest.approx(math.log(2), abs=1e-6)  # the same margin less 2 * 0.5 * 1
    # -beta * (1 + lambda) / 2: the pull on the chosen text is three times that on the rejected
    assert gradients(plan, below) == (pytest.approx([-0.75]), pytest.approx([0.25]))


@pytest.mark.parametrize("name", get_args(LossName))
def test_every_loss_raises_the_chosen_and_lowers_the_rejected(name: str):
    (up,), (down,) = gradients(LossPlan(name, beta=0.2, label_smoothing=0.1), scores([(0.3, -0.2)], [(3, 5)]))
    assert up < 0 < down


def test_every_loss_is_registered_under_its_configured_name():
    assert set(LOSSES) == set(get_args(LossName))


# ---- NLL and parts ----------------------------------------------------------------------------------------------------------------


def test_nll_weights_rows_by_hand():
    # rows: -6 over 3 tokens at weight 1, -8 over 2 tokens at weight 0.5: (6 + 4) / (3 + 1) = 2.5
    loss, metrics = nll(tensor([-6.0, -8.0]), tensor([3.0, 2.0]), tensor([1.0, 0.5]))
    assert loss.item() == pytest.approx(2.5)
    assert metrics == {"nll_loss": pytest.approx(2.5)}


def test_nll_of_a_part_is_divided_by_the_whole():
    assert nll(tensor([-6.0]), tensor([3.0]), tensor([1.0]), whole=4.0)[0].item() == pytest.approx(1.5)
    assert nll(tensor([-6.0]), tensor([3.0]), tensor([0.0]), whole=4.0)[0].item() == 0.0  # a part without weight adds nothing


def part(given: PairScores, where: slice) -> PairScores:
    fields = (given.chosen_P, given.rejected_P, given.ref_chosen_P, given.ref_rejected_P, given.chosen_tokens_P, given.rejected_tokens_P)
    return PairScores(*(values[where] for values in fields))


@pytest.mark.parametrize("name", get_args(LossName))
def test_parts_add_up_to_the_batch(name: str):
    plan = LossPlan(name, beta=0.4, label_smoothing=0.1, nll_coef=0.5)
    given = scores([(1.0, -2.0), (-1.5, 0.5), (3.0, 1.0)], [(3, 5), (4, 2), (6, 6)])
    parts = [preference_loss(part(given, where), plan, share, whole=13.0)[0] for where, share in ((slice(0, 1), 1 / 3), (slice(1, 3), 2 / 3))]
    whole, metrics = preference_loss(given, plan)
    assert float(sum(parts)) == pytest.approx(float(whole), abs=1e-6)
    assert metrics["nll_loss"] == pytest.approx((5.0 + 7.5 + 3.0) / 13)  # log-probs -5, -7.5 and -3 over 13 tokens
    assert float(whole) - value(plan, given) == pytest.approx(0.5 * 15.5 / 13, abs=1e-6)


def test_a_zero_loss_has_a_zero_gradient_not_none():
    logps: Tensor = tensor([-1.0, -2.0], requires_grad=True)
    zero_of(logps).backward()
    assert logps.grad.tolist() == [0.0, 0.0]
