"""The losses: pure functions from tensors to ``(loss, metrics)``, the equation beside the line. Called by the learner.

Each returns the mean over what it is given and metrics that are means too, under TRL's names; weighting micro-batches and ranks into
the mean of a whole batch is the learner's work. Everything is float32.

Shapes: ``_P`` = pairs, ``_R`` = rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LossAndMetrics = tuple[Tensor, dict[str, float]]
PreferenceLoss = Callable[[Tensor, Tensor, Tensor, Tensor, float, float], LossAndMetrics]


def sigmoid_dpo(
    policy_chosen_P: Tensor,
    policy_rejected_P: Tensor,
    ref_chosen_P: Tensor,
    ref_rejected_P: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> LossAndMetrics:
    """Direct preference optimisation on summed log-probs (nats) of whole completions.

    Rafailov et al. 2023, arXiv 2305.18290, eq. 7; with ``label_smoothing`` e (the assumed share of wrongly ordered pairs) the
    conservative form -(1 - e) log s(x) - e log s(-x). A reward is beta * log(policy / reference), eq. 5 without its constant.
    """
    rewards_chosen_P = beta * (policy_chosen_P - ref_chosen_P)
    rewards_rejected_P = beta * (policy_rejected_P - ref_rejected_P)
    margins_P = rewards_chosen_P - rewards_rejected_P
    # L = -(1 - e) * log sigmoid(beta * (log pi_w/ref_w - log pi_l/ref_l)) - e * log sigmoid(-the same)
    losses_P = -(1 - label_smoothing) * logsigmoid(margins_P) - label_smoothing * logsigmoid(-margins_P)
    loss = losses_P.mean()
    measured = {
        "rewards/chosen": rewards_chosen_P,
        "rewards/rejected": rewards_rejected_P,
        "rewards/accuracies": (margins_P > 0).float(),
        "rewards/margins": margins_P,
        "logps/chosen": policy_chosen_P,
        "logps/rejected": policy_rejected_P,
    }
    return loss, {name: float(values_P.detach().mean()) for name, values_P in measured.items()}


def nll(logps_sum_R: Tensor, token_counts_R: Tensor, weights_R: Tensor) -> LossAndMetrics:
    """Mean weighted negative log-likelihood per completion token (nats), as a cross-entropy over the unmasked tokens.

    ``logps_sum_R`` sums a row's log-probs, ``token_counts_R`` counts its completion tokens, ``weights_R`` scales its share.
    """
    # L = -sum_r w_r * sum_t log pi(t | before) / sum_r w_r * T_r
    loss = -(weights_R * logps_sum_R).sum() / (weights_R * token_counts_R).sum()
    return loss, {"nll_loss": float(loss.detach())}


LOSSES: Final[Mapping[str, PreferenceLoss]] = {"sigmoid": sigmoid_dpo}
"""Preference losses by ``loss_type``."""


def zero_of(logps_N: Tensor) -> Tensor:
    """A zero loss that still reaches every parameter: what a rank without rows contributes to the collectives."""
    return torch.zeros((), dtype=logps_N.dtype, device=logps_N.device) * logps_N.sum()
