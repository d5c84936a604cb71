"""The losses: pure functions from tensors to ``(loss, metrics)``, the equation beside the line. Called by the learner's objectives.

Each returns the mean over what it is given and metrics that are means too, under TRL's names; weighting micro-batches and ranks into
the mean of a whole batch is the caller's work. Everything is float32. docs/losses.md says the same in prose, with the gaps to TRL.

In the equations: s = sigmoid, w = chosen, l = rejected, r = log(pi / ref) of a whole completion (nats), T = its tokens.
Shapes: ``_P`` = pairs, ``_R`` = rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sgpo_dist.roles import LossPlan

LossAndMetrics = tuple[Tensor, dict[str, float]]


@dataclass(frozen=True, slots=True)
class PairScores:
    """Summed log-probs (nats) of whole completions under model and reference, and their token counts, one a pair.

    The reference's are not read by losses of ``REFERENCE_FREE``.
    """

    chosen_P: Tensor
    rejected_P: Tensor
    ref_chosen_P: Tensor
    ref_rejected_P: Tensor
    chosen_tokens_P: Tensor
    rejected_tokens_P: Tensor

    @property
    def chosen_ratios_P(self) -> Tensor:
        """r_w = log(pi / ref) of the chosen completion."""
        return self.chosen_P - self.ref_chosen_P

    @property
    def rejected_ratios_P(self) -> Tensor:
        """r_l = log(pi / ref) of the rejected completion."""
        return self.rejected_P - self.ref_rejected_P


PreferenceLoss = Callable[[PairScores, LossPlan], LossAndMetrics]


def sigmoid_dpo(scores: PairScores, plan: LossPlan) -> LossAndMetrics:
    """Direct preference optimisation: Rafailov et al. 2023, arXiv 2305.18290, eq. 7.

    With ``label_smoothing`` e (the assumed share of wrongly ordered pairs) it is conservative DPO, as arXiv 2403.00409 (section 3.1)
    writes it: the cross-entropy against 1 - e.
    """
    # L = -(1 - e) log s(beta (r_w - r_l)) - e log s(-beta (r_w - r_l))
    margins_P = plan.beta * (scores.chosen_ratios_P - scores.rejected_ratios_P)
    smoothing = plan.label_smoothing
    losses_P = -(1 - smoothing) * logsigmoid(margins_P) - smoothing * logsigmoid(-margins_P)
    return losses_P.mean(), _reference_metrics(scores, plan)


def sigmoid_norm(scores: PairScores, plan: LossPlan) -> LossAndMetrics:
    """Length-normalised DPO: Lambert et al. 2024 (Tulu 3), arXiv 2411.15124, section 5.1; log-ratios per completion token."""
    # L = -log s(beta (r_w / T_w - r_l / T_l))
    chosen_P, rejected_P = scores.chosen_ratios_P / scores.chosen_tokens_P, scores.rejected_ratios_P / scores.rejected_tokens_P
    return -logsigmoid(plan.beta * (chosen_P - rejected_P)).mean(), _reference_metrics(scores, plan)


def robust(scores: PairScores, plan: LossPlan) -> LossAndMetrics:
    """Robust DPO: Chowdhury et al. 2024, arXiv 2403.00409, section 3.1; unbiased when a share ``label_smoothing`` e of pairs is flipped."""
    # L = (-(1 - e) log s(beta (r_w - r_l)) + e log s(-beta (r_w - r_l))) / (1 - 2 e)
    margins_P = plan.beta * (scores.chosen_ratios_P - scores.rejected_ratios_P)
    flipped = plan.label_smoothing
    losses_P = (-(1 - flipped) * logsigmoid(margins_P) + flipped * logsigmoid(-margins_P)) / (1 - 2 * flipped)
    return losses_P.mean(), _reference_metrics(scores, plan)


def ipo(scores: PairScores, plan: LossPlan) -> LossAndMetrics:
    """Identity preference optimisation: Azar et al. 2023, arXiv 2310.12036, eq. 17, with beta for its tau.

    Log-ratios are per completion token, as in TRL: over sums the target 1 / (2 beta) would mean something else for every length.
    """
    # L = (r_w / T_w - r_l / T_l - 1 / (2 beta))^2
    chosen_P, rejected_P = scores.chosen_ratios_P / scores.chosen_tokens_P, scores.rejected_ratios_P / scores.rejected_tokens_P
    return (chosen_P - rejected_P - 1 / (2 * plan.beta)).square().mean(), _reference_metrics(scores, plan)


def hinge(scores: PairScores, plan: LossPlan) -> LossAndMetrics:
    """Hinge on the log-ratios: SLiC-HF's calibration loss, Zhao et al. 2023, arXiv 2305.10425, section 2, over arXiv 2309.06657's ratios."""
    # L = max(0, 1 - beta (r_w - r_l))
    margins_P = plan.beta * (scores.chosen_ratios_P - scores.rejected_ratios_P)
    return torch.relu(1 - margins_P).mean(), _reference_metrics(scores, plan)


def simpo(scores: PairScores, plan: LossPlan) -> LossAndMetrics:
    """Simple preference optimisation, without a reference: Meng et al. 2024, arXiv 2405.14734, eq. 6.

    Its target margin gamma is ``simpo_gamma * beta``. A reward in the metrics is beta * log pi per token.
    """
    # L = -log s(beta log pi_w / T_w - beta log pi_l / T_l - gamma)
    chosen_P, rejected_P = plan.beta * scores.chosen_P / scores.chosen_tokens_P, plan.beta * scores.rejected_P / scores.rejected_tokens_P
    losses_P = -logsigmoid(chosen_P - rejected_P - plan.simpo_gamma * plan.beta)
    return losses_P.mean(), _metrics(scores, chosen_P, rejected_P)


def apo_zero(scores: PairScores, plan: LossPlan) -> LossAndMetrics:
    """Anchored preference optimisation, zero variant: D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7; both halves pulled on their own."""
    # L = (1 - s(beta r_w)) + s(beta r_l)
    losses_P = 1 - torch.sigmoid(plan.beta * scores.chosen_ratios_P) + torch.sigmoid(plan.beta * scores.rejected_ratios_P)
    return losses_P.mean(), _reference_metrics(scores, plan)


def dpop(scores: PairScores, plan: LossPlan) -> LossAndMetrics:
    """DPO-Positive: Pal et al. 2024, arXiv 2402.13228, eq. 3; penalises a chosen text that is less likely than under the reference."""
    # L = -log s(beta (r_w - r_l - lambda max(0, -r_w)))
    penalties_P = plan.dpop_lambda * torch.relu(-scores.chosen_ratios_P)
    losses_P = -logsigmoid(plan.beta * (scores.chosen_ratios_P - scores.rejected_ratios_P - penalties_P))
    return losses_P.mean(), _reference_metrics(scores, plan)


def nll(logps_sum_R: Tensor, tokens_R: Tensor, weights_R: Tensor, whole: float | None = None) -> LossAndMetrics:
    """Mean weighted negative log-likelihood per completion token (nats), as a cross-entropy over the unmasked tokens.

    ``logps_sum_R`` sums a row's log-probs, ``tokens_R`` counts its completion tokens (both with the tokens' weights, where they have
    some), ``weights_R`` scales its share. ``whole``: weighted tokens of the batch that these rows are a part of; None = they are all of it.
    """
    # L = -sum_r w_r * sum_t w_t log pi(t | before) / sum_r w_r * sum_t w_t
    loss = -(weights_R * logps_sum_R).sum() / ((weights_R * tokens_R).sum() if whole is None else whole)
    return loss, {"nll_loss": float(loss.detach())}


LOSSES: Final[Mapping[str, PreferenceLoss]] = {
    "sigmoid": sigmoid_dpo,
    "sigmoid_norm": sigmoid_norm,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
    "simpo": simpo,
    "apo_zero": apo_zero,
    "dpop": dpop,
}
"""Preference losses by ``config.LossName``."""

REFERENCE_FREE: Final = frozenset({"simpo"})
"""Losses that never look at the reference model."""


def preference_loss(scores: PairScores, plan: LossPlan, share: float = 1.0, whole: float | None = None) -> LossAndMetrics:
    """The plan's loss plus ``nll_coef`` times the NLL per chosen token.

    For pairs that are a part of a batch: ``share`` is how large a part, ``whole`` the chosen tokens of all of it; the parts' losses then
    add up to the batch's.
    """
    preference, metrics = LOSSES[plan.loss_type](scores, plan)
    likelihood, more = nll(scores.chosen_P, scores.chosen_tokens_P, torch.ones_like(scores.chosen_tokens_P), whole)
    loss = preference * share
    if plan.nll_coef:
        loss = loss + plan.nll_coef * likelihood
    return loss, metrics | more


def zero_of(logps_N: Tensor) -> Tensor:
    """A zero loss that still reaches every parameter: what a rank without rows contributes to the collectives."""
    return torch.zeros((), dtype=logps_N.dtype, device=logps_N.device) * logps_N.sum()


def _reference_metrics(scores: PairScores, plan: LossPlan) -> dict[str, float]:
    """A reward is beta * log(pi / ref), arXiv 2305.18290 eq. 5 without its constant, whatever the loss makes of it."""
    return _metrics(scores, plan.beta * scores.chosen_ratios_P, plan.beta * scores.rejected_ratios_P)


def _metrics(scores: PairScores, rewards_chosen_P: Tensor, rewards_rejected_P: Tensor) -> dict[str, float]:
    measured = {
        "rewards/chosen": rewards_chosen_P,
        "rewards/rejected": rewards_rejected_P,
        "rewards/accuracies": (rewards_chosen_P > rewards_rejected_P).float(),
        "rewards/margins": rewards_chosen_P - rewards_rejected_P,
        "logps/chosen": scores.chosen_P,
        "logps/rejected": scores.rejected_P,
    }
    return {name: float(values_P.detach().mean()) for name, values_P in measured.items()}
