"""Every loss against TRL's trainers on the same batch, in float32: loss, log-probs of every pair, all gradients, metrics."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from bench.parity import CASES, TOLERANCE, Case, compare, make_models, make_pairs, table
from learner.batch import collate_pairs, pair_logps
from learner.model import CompletionScorer
from sgpo_dist.config import LossName

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_loss_logps_and_gradients_equal_trl(case: Case):
    gaps = compare(case)
    assert gaps.ours == pytest.approx(gaps.theirs, abs=TOLERANCE)
    assert gaps.logps < TOLERANCE  # nats a token, the worst of all completions
    assert (gaps.gradients if case.plan.loss_type == "sigmoid" else gaps.relative_gradients) < TOLERANCE
    assert gaps.largest_gradient > 0.1  # or the line above would prove nothing
    for name, (ours, theirs) in gaps.metrics.items():  # a reward is beta times a difference of sums near -80, which float32 rounds to 8e-6
        nats = max(1.0, case.plan.beta) if name.startswith("rewards/") else 1.0
        assert ours == pytest.approx(theirs, abs=TOLERANCE * nats, rel=1e-6), name


def test_every_loss_is_compared_and_shown():
    assert {case.plan.loss_type for case in CASES} == set(get_args(LossName))
    case = CASES[0]
    assert 'DPO "sigmoid" |' in table([(case, compare(case))])


def test_the_pairs_reach_both_sides_of_every_kink():
    """A hinge that is met by all pairs, or a penalty that none pays, would hide a wrong slope."""
    policy, reference = make_models()
    batch = collate_pairs(make_pairs())
    assert batch.num_tokens < sum(2 * len(p.prompt_ids) + len(p.chosen.token_ids) + len(p.rejected.token_ids) for p in make_pairs())
    with torch.no_grad():
        (chosen, rejected), (ref_chosen, ref_rejected) = (pair_logps(CompletionScorer(model)(batch), batch) for model in (policy, reference))
    ratios = chosen - ref_chosen
    margins = 0.3 * (ratios - (rejected - ref_rejected))
    assert (ratios > 0).any() and (ratios < 0).any()  # noqa: PT018 one fact
    assert (margins > 1).any() and (margins < 1).any()  # noqa: PT018 one fact


def test_per_token_logps_equal_plain_transformers():
    """Token by token, not as sums, on prompts that the shared row computes once."""
    policy, _ = make_models()
    pairs = make_pairs()
    batch = collate_pairs(pairs)
    with torch.no_grad():
        logps_N = CompletionScorer(policy)(batch)
        for number, pair in enumerate(pairs):
            for part, half in ((1, pair.chosen), (2, pair.rejected)):
                own = (batch.segment_N == 3 * number) | (batch.segment_N == 3 * number + part)  # the common beginning and one branch
                ids = torch.tensor([pair.prompt_ids + half.token_ids])
                scores = policy(ids).logits[0, :-1].log_softmax(-1)
                expected = scores.gather(1, ids[0, 1:, None])[len(pair.prompt_ids) - 1 :, 0]
                assert logps_N[own].tolist() == pytest.approx(expected.tolist(), abs=TOLERANCE)
