"""The converted model in plain transformers: it answers, stops by itself, and cuts text as it was trained to."""

import pytest

from sgpo_dist.data.embedded_model import embedded_model_dir
from sgpo_dist.data.verified_directory import is_intact


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_embedded_model_answers_a_question() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = embedded_model_dir()
    assert is_intact(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert tokenizer.tokenize("Do:\n\n12 eggs") == ["Do", ":", "ĊĊ", "1", "2", "Ġeggs"]
