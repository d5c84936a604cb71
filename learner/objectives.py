"""What one optimiser step minimises, in parts: preference pairs, NLL rows, or both. Made by the learner, one object a part and step.

An objective knows its rows, turns the log-probs of some of them into their share of the whole batch's loss, and keeps each row's sums, so
that once the ranks have added theirs up, loss and metrics are those of the whole batch on every rank. Leaves out: forward and backward
passes, collectives, and what the losses are.

Shapes: ``_P`` = pairs of the whole batch, ``_R`` = NLL rows of the whole batch, ``_m`` = those of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from learner.batch import MicroBatch, Row, example_row, pair_logps, weighted_sums
from learner.losses import LossAndMetrics, PairScores, nll, preference_loss
from sgpo_dist.records import PreferencePair, TokenExample
from sgpo_dist.roles import LossPlan


class Objective(Protocol):
    """A part of a step's loss. ``logps`` holds zeros for rows that other ranks score; summed over ranks, it is the whole batch."""

    @property
    def rows(self) -> Sequence[Row]:
        """All rows of the batch, whoever scores them."""

    @property
    def packed(self) -> bool:
        """Whether rows may share a sequence."""

    @property
    def logps(self) -> Tensor:
        """Sums of log-probs (nats), one line a row; ``share`` fills them in."""

    def share(self, numbers: Sequence[int], logps_N: Tensor, micro: MicroBatch) -> Tensor:
        """What rows ``numbers`` add to the loss of the whole batch, given the log-probs of their scored tokens."""

    def total(self) -> LossAndMetrics:
        """The loss of the whole batch, from ``logps``."""


@dataclass(frozen=True, slots=True)
class NllObjective:
    """``coefficient`` times the mean weighted NLL per completion token; the mean itself is the metric ``name``."""

    rows: list[Row]
    packed: bool
    logps: Tensor
    tokens_R: Tensor
    weights_R: Tensor
    coefficient: float
    name: str

    def share(self, numbers: Sequence[int], logps_N: Tensor, micro: MicroBatch) -> Tensor:
        """See Objective."""
        logps_m = weighted_sums(logps_N, micro)[:, 0]
        self.logps[numbers] = logps_m.detach()
        loss, _ = nll(logps_m, self.tokens_R[numbers], self.weights_R[numbers], whole=float((self.weights_R * self.tokens_R).sum()))
        return self.coefficient * loss

    def total(self) -> LossAndMetrics:
        """See Objective."""
        loss, metrics = nll(self.logps, self.tokens_R, self.weights_R)
        return self.coefficient * loss, {self.name: metrics["nll_loss"]}


@dataclass(frozen=True, slots=True)
class PreferenceObjective:
    """The plan's preference loss (and NLL of the chosen texts). ``logps`` and ``ref_P2`` are (chosen, rejected)."""

    rows: list[Row]
    packed: bool
    logps: Tensor
    ref_P2: Tensor
    tokens_P2: Tensor
    plan: LossPlan

    def share(self, numbers: Sequence[int], logps_N: Tensor, micro: MicroBatch) -> Tensor:
        """See Objective."""
        chosen_m, rejected_m = pair_logps(logps_N, micro)
        self.logps[numbers] = torch.stack([chosen_m, rejected_m], dim=1).detach()
        scores = PairScores(chosen_m, rejected_m, *self.ref_P2[numbers].unbind(1), *self.tokens_P2[numbers].unbind(1))
        return preference_loss(scores, self.plan, len(numbers) / len(self.rows), whole=float(self.tokens_P2[:, 0].sum()))[0]

    def total(self) -> LossAndMetrics:
        """See Objective."""
        loss, metrics = preference_loss(PairScores(*self.logps.unbind(1), *self.ref_P2.unbind(1), *self.tokens_P2.unbind(1)), self.plan)
        chosen, rejected = self.tokens_P2.mean(0).tolist()
        return loss, metrics | {"completions/chosen_length": chosen, "completions/rejected_length": rejected}


def nll_objective(
    batch: Sequence[TokenExample], device: torch.device, *, packed: bool = False, coefficient: float = 1.0, name: str = "nll_loss"
) -> NllObjective:
    """Raises DataError for a row that cannot be trained on."""
    return NllObjective(
        rows=[example_row(example) for example in batch],
        packed=packed,
        logps=torch.zeros(len(batch), device=device),
        tokens_R=torch.tensor([float(sum(row.token_weights) if row.token_weights else len(row.completion_ids)) for row in batch], device=device),
        weights_R=torch.tensor([example.weight for example in batch], device=device),
        coefficient=coefficient,
        name=name,
    )


def preference_objective(batch: Sequence[PreferencePair], rows: list[Row], ref_P2: Tensor, plan: LossPlan) -> PreferenceObjective:
    """``rows`` are those of the batch, ``ref_P2`` their log-probs under the reference."""
    counts = [(float(len(pair.chosen.token_ids)), float(len(pair.rejected.token_ids))) for pair in batch]
    return PreferenceObjective(rows, False, torch.zeros_like(ref_P2), ref_P2, torch.tensor(counts, device=ref_P2.device), plan)
