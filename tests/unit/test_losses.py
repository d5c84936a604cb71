"""The losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from learner.losses import LOSSES, nll, sigmoid_dpo, zero_of


def test_sigmoid_loss_of_one_pair_by_hand():
    # rewards: 0.5 * (-4 + 6) = 1 and 0.5 * (-5 + 5) = 0, margin 1, loss = log(1 + e^-1) = 0.3132617
    loss, metrics = sigmoid_dpo(tensor([-4.0]), tensor([-5.0]), tensor([-6.0]), tensor([-5.0]), 0.5, 0.0)
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
    # margin ln 3: sigmoid = 3/4, so loss = -0.9 ln 0.75 - 0.1 ln 0.25 = 0.2589139 + 0.1386294
    loss, _ = sigmoid_dpo(tensor([math.log(3)]), tensor([0.0]), tensor([0.0]), tensor([0.0]), 1.0, 0.1)
    assert loss.item() == pytest.approx(0.3975433, abs=1e-6)


def test_sigmoid_loss_is_the_mean_over_pairs_and_a_tie_is_not_accurate():
    # margins 0 and -1: losses ln 2 and ln(1 + e); accuracy counts neither
    loss, metrics = sigmoid_dpo(tensor([0.0, -1.0]), tensor([0.0, 0.0]), torch.zeros(2), torch.zeros(2), 1.0)
    assert loss.item() == pytest.approx((0.6931472 + 1.3132617) / 2, abs=1e-6)
    assert metrics["rewards/accuracies"] == 0.0
    assert metrics["rewards/margins"] == pytest.approx(-0.5)


def test_sigmoid_gradient_by_hand():
    # d loss / d policy_chosen = -beta * sigmoid(-margin); at margin 0 that is -beta / 2, and the opposite for rejected
    chosen, rejected = tensor([-3.0], requires_grad=True), tensor([-7.0], requires_grad=True)
    loss, _ = sigmoid_dpo(chosen, rejected, tensor([-3.0]), tensor([-7.0]), 0.1)
    loss.backward()
    assert float(chosen.grad) == pytest.approx(-0.05)
    assert float(rejected.grad) == pytest.approx(0.05)


def test_nll_weights_tokens_by_hand():
    # rows: -6 over 3 tokens at weight 1, -8 over 2 tokens at weight 0.5: (6 + 4) / (3 + 1) = 2.5
    loss, metrics = nll(tensor([-6.0, -8.0]), tensor([3.0, 2.0]), tensor([1.0, 0.5]))
    assert loss.item() == pytest.approx(2.5)
    assert metrics == {"nll_loss": pytest.approx(2.5)}


def test_a_zero_loss_has_a_zero_gradient_not_none():
    logps = tensor([-1.0, -2.0], requires_grad=True)
    zero_of(logps).backward()
    assert logps.grad.tolist() == [0.0, 0.0]


def test_every_loss_is_registered_under_its_configured_name():
    assert {"sigmoid": sigmoid_dpo} == LOSSES
