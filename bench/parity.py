"""Every loss of ours against TRL's trainers, on the same pairs and weights in float32: the loss, the log-probs of every pair, all gradients.

``python -m bench.parity`` prints a Markdown table and exits with 1 when a gap is above ``TOLERANCE``; the integration tests hold the same
cases to it one by one. A small random Llama takes the place of a real model: arithmetic is compared here, not quality. Ours goes its own
way to the log-probs (one row a pair, common beginnings computed once), TRL its own (two padded sequences a pair).

Two losses have no namesake in TRL 1.16. Conservative DPO is TRL's "aot" given one pair at a time, where its sorting over the batch does
nothing. DPOP's formula is written out below, over the log-probs of TRL's own forward pass.
"""

from __future__ import annotations

import copy
import os
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from learner.batch import collate_pairs, pair_logps
from learner.losses import LossAndMetrics, PairScores, nll, preference_loss
from learner.model import CompletionScorer
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Stage
from sgpo_dist.roles import LossPlan

TOLERANCE: Final = 1e-5
PAIRS: Final = 5
VOCABULARY: Final = 256
END: Final = 0
DRIFT: Final = 0.03
"""Standard deviation of what is added to the reference's weights to make the policy: log-ratios of a few nats, of both signs."""


@dataclass(frozen=True, slots=True)
class Case:
    """One loss: our plan, TRL's trainer ("dpo" or "cpo") and settings, and what TRL calls it. ``at_once``: pairs TRL sees together."""

    name: str
    plan: LossPlan
    theirs: str
    settings: Mapping[str, Any]
    trainer: str = "dpo"
    at_once: int = PAIRS
    ours: Callable[[PairScores, LossPlan], LossAndMetrics] = preference_loss
    formula: Callable[[Any, Any, LossPlan], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Gaps:
    """How far apart both are. Log-prob gaps are means per token (nats), of the worst completion; gradients' is that of the worst weight."""

    ours: float
    theirs: float
    logps: float
    gradients: float
    largest_gradient: float
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Of the two losses."""
        return abs(self.ours - self.theirs)

    @property
    def worst(self) -> float:
        """The largest of the three."""
        return max(self.loss, self.logps, self.relative_gradients)

    @property
    def relative_gradients(self) -> float:
        """The gradients' gap, as a share of the largest one where that is above 1: sums in another order differ by so many of float32's digits."""
        return self.gradients / max(1.0, self.largest_gradient)


@dataclass(frozen=True, slots=True)
class Sums:
    """Summed log-probs of every pair (chosen, rejected), ``[P, 2]``."""

    policy_P2: Tensor
    reference_P2: Tensor | None


def compare(case: Case) -> Gaps:
    """Run both sides of a case on the same pairs. Raises RuntimeError when TRL reads other token ids than we do."""
    policy, reference = make_models()
    pairs = make_pairs()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(case, copy.deepcopy(policy), copy.deepcopy(reference), pairs, folder)
        theirs, their_sums = _their_side(case, trainer, pairs)
    ours, metrics, our_sums = _our_side(case, policy, reference, pairs)
    tokens_P2 = torch.tensor([(len(pair.chosen.token_ids), len(pair.rejected.token_ids)) for pair in pairs])
    gaps_P2 = [(our_sums.policy_P2 - their_sums.policy_P2).abs() / tokens_P2]
    if their_sums.reference_P2 is not None and our_sums.reference_P2 is not None:
        gaps_P2.append((our_sums.reference_P2 - their_sums.reference_P2).abs() / tokens_P2)
    theirs_by_name = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    gradients = [(parameter.grad, theirs_by_name[name]) for name, parameter in policy.named_parameters()]
    return Gaps(
        ours=ours,
        theirs=theirs,
        logps=float(torch.stack(gaps_P2).max()),
        gradients=max(float((mine - other).abs().max()) for mine, other in gradients),
        largest_gradient=max(float(mine.abs().max()) for mine, _ in gradients),
        metrics=_shared_metrics(case, metrics, trainer),
    )


# ---- our side ---------------------------------------------------------------------------------------------------------------------------


def _our_side(case: Case, policy: Any, reference: Any, pairs: Sequence[PreferencePair]) -> tuple[float, dict[str, float], Sums]:
    batch = collate_pairs(pairs)
    policy_P2 = torch.stack(pair_logps(CompletionScorer(policy)(batch), batch), dim=1)
    with torch.no_grad():
        reference_P2 = torch.stack(pair_logps(CompletionScorer(reference)(batch), batch), dim=1)
    tokens_P2 = torch.tensor([(float(len(pair.chosen.token_ids)), float(len(pair.rejected.token_ids))) for pair in pairs])
    loss, metrics = case.ours(PairScores(*policy_P2.unbind(1), *reference_P2.unbind(1), *tokens_P2.unbind(1)), case.plan)
    loss.backward()
    return float(loss.detach()), metrics, Sums(policy_P2.detach(), reference_P2)


def _chosen_nll(scores: PairScores, _: LossPlan) -> LossAndMetrics:
    return nll(scores.chosen_P, scores.chosen_tokens_P, torch.ones_like(scores.chosen_tokens_P))


# ---- TRL's side -------------------------------------------------------------------------------------------------------------------------


def _their_side(case: Case, trainer: Any, pairs: Sequence[PreferencePair]) -> tuple[float, Sums]:
    """Loss and sums, with the gradients left in the trainer's model."""
    rows = list(trainer.train_dataset)
    _require_same_ids(rows, pairs)
    parts = [trainer.data_collator(rows[start : start + case.at_once]) for start in range(0, len(rows), case.at_once)]
    loss = 0.0
    for part in parts:
        share = _their_loss(case, trainer, part) / len(parts)
        share.backward()
        loss += float(share.detach())
    return loss, _their_sums(case, trainer, trainer.data_collator(rows), pairs)


def _their_loss(case: Case, trainer: Any, inputs: Any) -> Tensor:
    if case.formula is not None:
        return case.formula(trainer, inputs, case.plan)
    loss: Tensor
    if case.trainer == "cpo":
        loss, _ = trainer.get_batch_loss_metrics(trainer.model, inputs)
        return loss
    loss = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    return loss


def _their_sums(case: Case, trainer: Any, inputs: Any, pairs: Sequence[PreferencePair]) -> Sums:
    if case.trainer == "dpo":
        models = (trainer.model, trainer.ref_model)
        policy_P2, reference_P2 = (torch.stack(trainer.compute_ref_log_probs(model, inputs), dim=1) for model in models)
        return Sums(policy_P2, reference_P2)
    with torch.no_grad():
        means_P2 = torch.stack(trainer.concatenated_forward(trainer.model, inputs)[:2], dim=1)
    return Sums(means_P2 * torch.tensor([(len(pair.chosen.token_ids), len(pair.rejected.token_ids)) for pair in pairs]), None)


def _dpop(trainer: Any, inputs: Any, plan: LossPlan) -> Tensor:
    """The paper's equation 3 over TRL's forward pass; log(ref / pi) is clamped at zero."""
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    keys = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}
    chosen, rejected = trainer.model(**keys, use_cache=False, fused_lm_head=True).log_probs.sum(1).chunk(2)
    ref_chosen, ref_rejected = trainer.compute_ref_log_probs(trainer.ref_model, inputs)
    margins = (chosen - ref_chosen) - (rejected - ref_rejected) - plan.dpop_lambda * (ref_chosen - chosen).clamp(min=0)
    return torch.log1p(torch.exp(-plan.beta * margins)).mean()


def _trainer(case: Case, policy: Any, reference: Any, pairs: Sequence[PreferencePair], folder: str) -> Any:
    """A DPOTrainer or CPOTrainer over the pairs' text. Its defaults, except that it is told to be exact and quiet."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # CPOTrainer lives among TRL's experiments
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    settings = {"output_dir": folder, "beta": case.plan.beta, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": []}
    settings |= {"disable_tqdm": True, **case.settings}
    data = Dataset.from_list([_text_row(pair) for pair in pairs])
    if case.trainer == "cpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        arguments = CPOConfig(**settings, max_length=512, remove_unused_columns=False)
        return CPOTrainer(policy, arguments, train_dataset=data, processing_class=_tokenizer())
    return DPOTrainer(policy, reference, DPOConfig(**settings, max_length=None), train_dataset=data, processing_class=_tokenizer())


def _require_same_ids(rows: Sequence[Mapping[str, Any]], pairs: Sequence[PreferencePair]) -> None:
    for row, pair in zip(rows, pairs, strict=True):
        prompt = row["prompt_ids"] if "prompt_ids" in row else row["prompt_input_ids"]
        halves = [row[f"{half}_ids"] if f"{half}_ids" in row else row[f"{half}_input_ids"][len(prompt) :] for half in ("chosen", "rejected")]
        if [tuple(ids) for ids in (prompt, *halves)] != [pair.prompt_ids, pair.chosen.token_ids, pair.rejected.token_ids]:
            raise RuntimeError(f"TRL reads other token ids than we do for pair {pair.uid}: nothing can be compared")


def _shared_metrics(case: Case, metrics: Mapping[str, float], trainer: Any) -> dict[str, tuple[float, float]]:
    """(ours, TRL's) of the metrics that both have, where TRL saw the whole batch at once."""
    if case.trainer != "dpo" or case.at_once != PAIRS:
        return {}
    theirs = trainer._metrics["train"]
    return {name: (value, theirs[name][0]) for name, value in metrics.items() if name in theirs}


# ---- what both are given ----------------------------------------------------------------------------------------------------------------


def make_models() -> tuple[Any, Any]:
    """Policy and reference: small Llamas in float32 that differ by a little noise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    reference = LlamaForCausalLM(shape)
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += DRIFT * torch.randn_like(parameter)
    return policy, reference


def make_pairs() -> list[PreferencePair]:
    """Pairs of unequal lengths whose completions begin alike, as self-improvement pairs do; all but the first."""
    draw = random.Random(7)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, VOCABULARY) for _ in range(count))

    pairs = []
    for n in range(PAIRS):
        common = ids(n)
        chosen, rejected = (Completion("", (*common, *ids(count), END), FinishReason.STOP, 0) for count in (4 + n, 9 - n))
        prompt = Prompt(str(n), (Message("user", "x"),))
        pairs.append(PreferencePair(str(n), Stage.PREFERENCE, prompt, ids(5 + 3 * n), rejected, chosen, "v1"))
    return pairs


def _text_row(pair: PreferencePair) -> dict[str, str]:
    def text(ids: Sequence[int]) -> str:
        return " ".join("</s>" if token == END else f"w{token}" for token in ids)

    return {"prompt": text(pair.prompt_ids), "chosen": f" {text(pair.chosen.token_ids)}", "rejected": f" {text(pair.rejected.token_ids)}"}


def _tokenizer() -> Any:
    """One word, one id: text is only what TRL insists on."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    end, unknown = "</s>", "<unk>"
    tokenizer = Tokenizer(WordLevel({end: END, unknown: 1} | {f"w{n}": n for n in range(2, VOCABULARY)}, unk_token=unknown))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end, unk_token=unknown)


# ---- the table --------------------------------------------------------------------------------------------------------------------------


def _dpo(name: str, loss_type: str, theirs: str = "", settings: Mapping[str, Any] | None = None, **plan: float) -> Case:
    """A case that TRL's DPOTrainer has under ``loss_type``."""
    numbers = LossPlan(loss_type, **{"beta": 0.3} | plan)
    return Case(f"{name}, beta {numbers.beta:g}", numbers, theirs or f'DPO "{loss_type}"', {"loss_type": loss_type} | dict(settings or {}))


CASES: Final = (
    _dpo("sigmoid", "sigmoid"),
    Case(
        "sigmoid, beta 0.3, label_smoothing 0.1",
        LossPlan("sigmoid", 0.3, label_smoothing=0.1),
        'DPO "aot", one pair at a time, label_smoothing 0.1',
        {"loss_type": "aot", "label_smoothing": 0.1},
        at_once=1,
    ),
    _dpo(
        "sigmoid, nll_coef 0.5",
        "sigmoid",
        'DPO ["sigmoid", "sft"], loss_weights [1, 0.5]',
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        nll_coef=0.5,
    ),
    Case("NLL of the chosen", LossPlan(), 'DPO "sft"', {"loss_type": "sft"}, ours=_chosen_nll),
    _dpo("sigmoid_norm", "sigmoid_norm", beta=5.0),
    _dpo("robust, label_smoothing 0.1", "robust", 'DPO "robust", label_smoothing 0.1', {"label_smoothing": 0.1}, label_smoothing=0.1),
    _dpo("ipo", "ipo"),
    _dpo("hinge", "hinge"),
    Case(
        "simpo, beta 2, simpo_gamma 0.5",
        LossPlan("simpo", 2.0, simpo_gamma=0.5),
        'CPO "simpo", cpo_alpha 0, simpo_gamma 1.0 (ours times beta)',
        {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0},
        trainer="cpo",
    ),
    _dpo("apo_zero", "apo_zero"),
    Case("dpop, beta 0.3, dpop_lambda 5", LossPlan("dpop", 0.3, dpop_lambda=5.0), "none: its equation over TRL's log-probs", {}, formula=_dpop),
)
"""Every loss in ``config.LossName``, and the two mixtures with NLL."""


def table(found: Sequence[tuple[Case, Gaps]]) -> str:
    """The comparison as Markdown."""
    lines = ["| loss | ours | TRL | gap | log-prob gap per token | gradient gap (largest gradient) | TRL's name |", "|" + " --- |" * 7]
    for case, gaps in found:
        numbers = f"{gaps.ours:.6f} | {gaps.theirs:.6f} | {gaps.loss:.1e} | {gaps.logps:.1e} | {gaps.gradients:.1e} ({gaps.largest_gradient:.1e})"
        lines.append(f"| {case.name} | {numbers} | {case.theirs} |")
    return "\n".join(lines)


def main() -> int:
    """Compare all, print the table."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which TRL's trainer loads, would say on stdout that it found no other
    found = [(case, compare(case)) for case in CASES]
    print(table(found))
    return int(any(gaps.worst > TOLERANCE for _, gaps in found))


if __name__ == "__main__":
    sys.exit(main())
