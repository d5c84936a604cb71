"""The sigmoid DPO loss, per-pair log-probs and gradients against TRL's DPOTrainer on the same batch, in float32."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from learner.batch import collate_pairs, pair_logps
from learner.losses import sigmoid_dpo
from learner.model import CompletionScorer
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Stage

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

BETA = 0.3
TOLERANCE = 1e-5


def tiny_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(shape)


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {"</s>": 0, "<unk>": 1} | {f"w{n}": n for n in range(2, 256)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="<unk>")


def text_rows(count: int) -> list[dict[str, str]]:
    """Pairs of unequal lengths whose completions begin alike, as self-improvement pairs do."""
    draw = random.Random(7)

    def words(n: int) -> str:
        return " ".join(f"w{draw.randrange(2, 256)}" for _ in range(n))

    rows = []
    for n in range(count):
        common = words(n) + " " if n else ""
        rows.append({"prompt": words(5 + 3 * n), "chosen": f" {common}{words(4 + n)} </s>", "rejected": f" {common}{words(9 - n)} </s>"})
    return rows


def as_pair(row: dict[str, list[int]], number: int) -> PreferencePair:
    def completion(ids: list[int]) -> Completion:
        return Completion("", tuple(ids), FinishReason.STOP, 0)

    prompt = Prompt(str(number), (Message("user", "x"),))
    return PreferencePair(
        str(number), Stage.PREFERENCE, prompt, tuple(row["prompt_ids"]), completion(row["rejected_ids"]), completion(row["chosen_ids"]), "v1"
    )


def trl_trainer(model: LlamaForCausalLM, reference: LlamaForCausalLM, directory: Path) -> DPOTrainer:
    settings = DPOConfig(
        output_dir=str(directory), beta=BETA, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], max_length=None, disable_tqdm=True
    )
    return DPOTrainer(model, reference, settings, train_dataset=Dataset.from_list(text_rows(5)), processing_class=word_tokenizer())


def test_loss_logps_and_gradients_equal_trl(tmp_path: Path):
    policy, reference = tiny_model(1), tiny_model(2)
    trainer = trl_trainer(copy.deepcopy(policy), copy.deepcopy(reference), tmp_path)
    rows = list(trainer.train_dataset)
    theirs = trainer._compute_loss(trainer.model, trainer.data_collator(rows), return_outputs=False)
    theirs.backward()
    their_ref = trainer.compute_ref_log_probs(trainer.ref_model, trainer.data_collator(rows))

    batch = collate_pairs([as_pair(row, number) for number, row in enumerate(rows)])
    scorer, frozen = CompletionScorer(policy), CompletionScorer(reference)
    chosen, rejected = pair_logps(scorer(batch), batch)
    with torch.no_grad():
        ref_chosen, ref_rejected = pair_logps(frozen(batch), batch)
    ours, metrics = sigmoid_dpo(chosen, rejected, ref_chosen, ref_rejected, BETA)
    ours.backward()

    assert batch.num_tokens < trainer.data_collator(rows)["attention_mask"].sum()  # the prefix is shared, or this proves little
    assert ours.item() == pytest.approx(theirs.item(), abs=TOLERANCE)
    assert ref_chosen.tolist() == pytest.approx(their_ref[0].tolist(), abs=1e-4)  # sums of ten and more log-probs near -6
    assert ref_rejected.tolist() == pytest.approx(their_ref[1].tolist(), abs=1e-4)
    for name, value in metrics.items():
        assert value == pytest.approx(trainer._metrics["train"][name][0], abs=1e-4), name
    their_gradients = dict(trainer.model.named_parameters())
    for name, parameter in policy.named_parameters():
        gap = (parameter.grad - their_gradients[name].grad).abs().max()
        assert float(gap) < TOLERANCE, f"{name}: {float(gap):.2g}"


def test_per_token_logps_equal_plain_transformers():
    model = tiny_model(3)
    scorer = CompletionScorer(model)
    rows = [{"prompt_ids": [5, 6, 7], "chosen_ids": [9, 10, 11, 0], "rejected_ids": [9, 12, 0]}]
    batch = collate_pairs([as_pair(rows[0], 0)])
    with torch.no_grad():
        chosen, rejected = pair_logps(scorer(batch), batch)
        for half, value in (("chosen_ids", chosen), ("rejected_ids", rejected)):
            ids = torch.tensor([rows[0]["prompt_ids"] + rows[0][half]])
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[2:, 0]
            assert float(value[0]) == pytest.approx(float(logps.sum()), abs=1e-5)
