"""One learner rank on a tiny random Llama, built in this process: for tests of what surrounds it, its disk and its build cache.

``python learner_rank.py OPTIMIZER MODEL CACHE`` begins a stage, trains a step and ends: for tests that kill it meanwhile.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from learner.deepspeed_engine import join
from learner.learner import LearnerRank, RankSpec
from sgpo_dist.config import LearnerConfig, ModelConfig
from sgpo_dist.records import Stage, TokenExample
from sgpo_dist.roles import LearnerStage, OptimiserPlan
from sgpo_dist.weights.version import ProbeRow

PROBES = (ProbeRow((1, 2, 3), (4, 5)),)


def make_model(directory: Path) -> str:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    return str(directory)


def make_rank(cache: Path, optimizer: str = "adamw") -> LearnerRank:
    """A group of one is joined first where there is none: DeepSpeed does that once a process."""
    if not torch.distributed.is_initialized():
        join(0, 1, "127.0.0.1", 0, "gloo", 60.0)  # a rank alone opens no port
    settings = LearnerConfig(zero_stage=2, max_tokens_per_micro_batch=40, threads_per_rank=1, optimizer=optimizer)
    return LearnerRank(RankSpec(0, 1, ModelConfig(dtype="float32"), settings, "shm", "float32", PROBES, f"r{os.getpid()}", 0, str(cache), 1))


def begin(rank: LearnerRank, model: str) -> None:
    rank.begin_stage(LearnerStage(Stage.SFT, model, OptimiserPlan(1e-3, 4, warmup_ratio=0.0, schedule="constant")))


def train(rank: LearnerRank, step: int) -> float:
    """The loss of a step on rows drawn from its number."""
    draw = random.Random(step)
    rows = [TokenExample(f"e{n}", *(tuple(draw.randrange(1, 128) for _ in range(4)) for _ in range(2))) for n in range(4)]
    return float(rank.nll_step(step, rows)["loss"])


if __name__ == "__main__":
    made = make_rank(Path(sys.argv[3]), sys.argv[1])
    begin(made, sys.argv[2])
    print("loss", train(made, 1), flush=True)
    made.release()
