"""What tests of the learner share: a tiny random Llama on disk, and DeepSpeed's group of one."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(shape).save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    return str(directory)


@pytest.fixture(scope="module")
def joined() -> None:
    """DeepSpeed's group of one, once a process: it cannot be joined twice."""
    import torch

    from learner.deepspeed_engine import join

    if not torch.distributed.is_initialized():
        join(0, 1, "127.0.0.1", 0, "gloo", 60.0)  # a rank alone opens no port
