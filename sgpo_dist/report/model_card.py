"""The README.md that goes with an exported model: what it is, how it was made, what was measured. Written from a run's files alone."""

from __future__ import annotations

import json
from typing import Any, Final

import yaml

from sgpo_dist.evaluate.evaluation import row_from, table
from sgpo_dist.run_directory import EVALUATE_AGAIN, RunDirectory, read_whole
from sgpo_dist.sanitize import one_line

CARD_NAME: Final = "README.md"
EMBEDDED_HUB_NAME: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_LICENSE: Final = "apache-2.0"


def model_card(directory: RunDirectory, stage: str | None = None) -> str:
    """The card of the final model, or of the one ``stage`` left."""
    name = f"{directory.path.name}" + (f" after {stage}" if stage else "")
    with read_whole(directory.config_file):
        config = yaml.safe_load(directory.config_file.read_text(encoding="utf-8"))
        parts = [_front_matter(config), f"# {one_line(name)}\n", _made(config, directory)]
    with read_whole(directory.evaluation_file, EVALUATE_AGAIN):
        parts += [_figures(directory), _use()]
    return "\n".join(part for part in parts if part)


def _front_matter(config: dict[str, Any]) -> str:
    base = config["model"]["model_name_or_path"]
    facts: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["sgpo", "preference-optimization"]}
    facts["base_model"] = EMBEDDED_HUB_NAME if base == "embedded" else base
    if base == "embedded":
        facts["license"] = EMBEDDED_LICENSE
    return "---\n" + yaml.safe_dump(facts, sort_keys=False) + "---\n"


def _made(config: dict[str, Any], directory: RunDirectory) -> str:
    preference = config["preference"]
    lines = [
        "Trained with sgpo_dist by self-generated preference optimisation (SGPO, arXiv 2507.20181): the model answers, rewrites its",
        "answer a little better, and learns from preferring the rewrite.",
        "",
        f"- stages: {', '.join(config['stages'])}",
        f"- data: {one_line(str(config['data']['path']))}",
        f"- preference: {preference['loss_type']} loss, beta {preference['beta']}, learning rate {preference['learning_rate']}",
        f"- seed: {config['seed']}",
        f"- run: {directory.run_id}, attempts {directory.incarnation}",
        "",
        "The licences of the base model and of the data apply. The whole configuration is in config.resolved.yaml of the run.",
    ]
    return "\n".join(lines) + "\n"


def _figures(directory: RunDirectory) -> str:
    if not directory.evaluation_file.is_file():
        return ""
    rows = [row_from(tree) for tree in json.loads(directory.evaluation_file.read_text(encoding="utf-8"))["rows"]]
    header, *lines = table(rows)
    cells = [header, ["---"] * len(header), *lines]
    body = "\n".join("| " + " | ".join(one_line(cell).replace("|", "\\|") for cell in line) + " |" for line in cells)
    return f"## Held-out figures\n\n{body}\n" if lines else ""


def _use() -> str:
    return (
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("DIR")\nmodel = AutoModelForCausalLM.from_pretrained("DIR")\n'
        'messages = [{"role": "user", "content": "..."}]\n'
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=128)[0]))\n```\n"
    )
