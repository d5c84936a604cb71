"""Every recipe loads and can be planned where neither its model nor its data are, the commands in the head comments are valid, and the
lines that examples/README.md gives for data make files that the loader takes."""

from __future__ import annotations

import io
import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import jinja2
import pytest
from rich.console import Console

from sgpo_dist.cli.arithmetic import DataFacts
from sgpo_dist.cli.estimate import GIB
from sgpo_dist.cli.machine import Gpu, Machine
from sgpo_dist.cli.main import guarded
from sgpo_dist.cli.model_facts import model_facts
from sgpo_dist.cli.plan import Plan, absent_data, data_facts, make_plan
from sgpo_dist.cli.session import Session
from sgpo_dist.config import Config, load_config
from sgpo_dist.data.loading import load_corpus
from sgpo_dist.errors import ConfigError
from sgpo_dist.placement import on_gpu
from sgpo_dist.precision import settled
from sgpo_dist.starter.orders import exact, field_score

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples").rglob("*.yaml"))
README = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
LAPTOP = Machine(cores=2, ram=24 * GIB, ram_available=20 * GIB, disk_free=100 * GIB, shm_free=12 * GIB)
SERVER = Machine(cores=64, ram=1000 * GIB, ram_available=900 * GIB, disk_free=2000 * GIB, shm_free=100 * GIB)


def recipe(name: str, *overrides: str) -> Config:
    return load_config(ROOT / "examples" / name, overrides, environment={})


def machine(count: int, memory_gib: int) -> Machine:
    gpus = (Gpu("some", memory_gib * GIB, memory_gib * GIB),) * count
    return Machine(SERVER.cores, SERVER.ram, SERVER.ram_available, SERVER.disk_free, SERVER.shm_free, gpus)


def plan_of(config: Config, where: Machine) -> Plan:
    facts = None if absent_data(config) else data_facts(config)
    return make_plan(settled(config), where, model_facts(config.model.model_name_or_path), facts)


def value(plan: Plan, name: str) -> str:
    return next(line.value for line in plan.arithmetic if line.name == name)


def commands(text: str) -> list[list[str]]:
    """The `sgpo-dist train --config ...` commands of a comment or page, their continued lines joined, as a shell would split them."""
    lines = re.sub(r"\\\n#?\s*", "", text).splitlines()
    found = [re.match(r"#?\s*(sgpo-dist train --config \S+.*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def test_every_recipe_loads_and_plans(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(path, environment={})
    where = machine(1 if config.learner.gpus_per_rank < 1 else 8, 80) if on_gpu(config) else LAPTOP
    plan = plan_of(config, where)
    assert plan.problems == ()
    assert [line for line in plan.warnings if "ends early" in line or "prompt_too_long" in line or "unused" in line] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def test_the_head_comment_has_valid_commands_of_this_file(path: Path) -> None:
    for command in commands(path.read_text(encoding="utf-8")):
        assert command[3] == str(path.relative_to(ROOT))
        load_config(path, command[4:], environment={})


def test_the_readme_has_valid_commands_and_every_recipe() -> None:
    made = commands(README)
    assert len(made) >= 4
    for command in made:
        load_config(ROOT / command[3], command[4:], environment={})
    assert [path.name for path in RECIPES if path.name not in README] == []


def test_an_unknown_key_is_refused_whatever_the_recipe() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'preference\.bet'; did you mean 'preference\.beta'"):
        recipe("qwen2.5-7b.yaml", "preference.bet=1")


def test_plan_of_another_machine_needs_neither_model_nor_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    session = Session(Console(file=out, width=240), Console(file=io.StringIO(), width=240), {})
    assert guarded(["plan", "--config", str(ROOT / "examples" / "llama3-8b.yaml"), "--gpus", "8x80"], session) == 0
    for part in ("published shape of Llama-3-8B", "note: data not here yet: data/dpo_mix.parquet", "a GPU, at least", "on such a machine"):
        assert part in out.getvalue(), part
    assert guarded(["plan", "--config", str(ROOT / "examples" / "llama3-8b.yaml"), "--gpus", "7x80"], session) == 3
    assert "8 GPUs asked for, 7 here" in out.getvalue()
    assert list(tmp_path.iterdir()) == []


def test_qwen_on_eight_gpus_by_hand() -> None:
    plan = make_plan(recipe("qwen2.5-7b.yaml"), machine(8, 80), model_facts("Qwen/Qwen2.5-7B"), DataFacts(6000, 58_000, 200))
    assert value(plan, "improver: steps") == "94"  # 6,000 revisions and 6,000 references in batches of 128
    assert value(plan, "preference: pairs") == "51200"  # 400 x 128
    assert value(plan, "preference: tokens a step") == "up to 492,544"  # 128 x (1800 + 1024 + 1024)
    assert value(plan, "preference: micro-batches") == "up to 16 a rank"  # 32 x 3,848 / 8,192 = 15.03
    assert value(plan, "generated for a pair") == "up to 2,048 tokens"
    assert value(plan, "pairs ahead of training") == "at most 1024"  # 2 x 128 x 4
    assert value(plan, "versions published") == "102"  # the first, after the improver stage, 400 / 4
    learner, rollout = plan.memory[0], plan.memory[1]
    assert rollout.num_bytes == 4 * 2 * 7_615_616_512
    # a rank: (2 + 12 + 2 + 4) x N / 4 + 2 N; (34 + 2 x 28) x 8,192 x 3,584 activations; 12 x 256 x 152,064 logits; 1.1 GiB of process
    by_hand = 7 * 7_615_616_512 + 90 * 8192 * 3584 + 3072 * 152_064 + 1.1 * GIB
    assert learner.num_bytes / 4 == pytest.approx(by_hand, abs=1)
    assert plan.device is not None
    assert plan.device.value == "53.6 GiB"  # 57.60e9 bytes


def test_a_full_recipe_does_not_fit_small_gpus_and_adapters_do() -> None:
    full = plan_of(recipe("llama3-8b.yaml"), machine(8, 48))
    assert [line for line in full.problems if "a learner rank needs about" in line]
    assert plan_of(recipe("llama3-8b-lora-1gpu.yaml"), machine(1, 48)).problems == ()
    small = plan_of(recipe("llama3-8b-lora-1gpu.yaml"), machine(1, 24))
    assert len(small.problems) == 2  # neither the rank nor the engine fits into half of it


def test_seven_and_eight_billion_recipes_differ_in_the_model_alone() -> None:
    for suffix in ("", "-lora-1gpu"):
        qwen, llama = recipe(f"qwen2.5-7b{suffix}.yaml").model_dump(), recipe(f"llama3-8b{suffix}.yaml").model_dump()
        assert [key for key in qwen if qwen[key] != llama[key]] == ["run_name", "model"]


@pytest.mark.parametrize("name", ["dpo", "spin", "synpo", "online-dpo"])
def test_baselines_train_on_as_many_pairs_as_the_demo(name: str) -> None:
    baseline, demo = recipe(f"baselines/{name}.yaml"), recipe("demo.yaml")
    for config in (baseline, demo):
        assert (config.preference.total_steps, config.learner.train_batch_size, config.seed) == (6, 8, 7)
    assert baseline.sft == demo.sft.model_copy(update={"max_rows": None})  # a baseline has no use for references left over
    assert baseline.rollout.policy == demo.rollout.policy


def test_given_pairs_are_right_and_two_fields_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given = load_corpus(recipe("baselines/dpo.yaml").data, 7).given
    assert len(given) == 48
    for prompt in given:
        assert prompt.reference is not None
        assert prompt.rejected is not None
        assert exact(prompt.reference, prompt.reference)
        assert field_score(prompt.rejected, prompt.reference) == pytest.approx(5 / 7)


# ---- what the readme says about models and data -----------------------------------------------------------------------------------


def render(turns: list[dict[str, str]], prompting: bool, bos: str | None) -> str:
    """As transformers renders a chat template."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # noqa: S701 text for a tokenizer
    template = environment.from_string((ROOT / "examples" / "plain_chat.jinja").read_text(encoding="utf-8"))
    return template.render(messages=turns, add_generation_prompt=prompting, bos_token=bos, eos_token="<end>")


def test_the_plain_chat_template() -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Hello."}]
    assert render(turns[:2], True, None) == "### system\nBe kind.\n### user\nHi\n### assistant\n"
    assert render(turns, False, "<begin>") == "<begin>### system\nBe kind.\n### user\nHi\n### assistant\nHello.<end>\n"


class WordTokenizer:
    """A token a word of the plain chat template's text."""

    def apply_chat_template(self, turns: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        return render(turns, add_generation_prompt, None)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[str]:
        return text.split()


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def answered(question: str, answer: str) -> list[dict[str, str]]:
    return [turn("user", question), turn("assistant", answer)]


def public_sets() -> dict[str, Any]:
    """Rows with the columns of the public sets: some good, some too long, without answer, or held out."""
    long = "word " * 2000
    mix = {"chosen": [answered("a b", "c"), answered("held  out", "x"), answered(long, "x")], "rejected": [answered("a b", "d")] * 3}
    chat = [[*answered("one", "two"), *answered("three", "four")], answered("five", "six"), answered("no answer", " "), answered("e", long)]
    return {
        "argilla/dpo-mix-7k": {"train": mix, "test": {"chosen": [answered("held out", "y")], "rejected": [answered("held out", "z")]}},
        "HuggingFaceH4/ultrachat_200k": {"train_sft": {"prompt": ["one", "five", "no answer", "e"], "messages": chat}},
        "allenai/ultrafeedback_binarized_cleaned": {"train_prefs": {"prompt": ["p q", " ", "a b", "held out"], "score": [1, 2, 3, 4]}},
    }


def test_the_lines_for_data_make_what_the_recipes_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    sets = {name: datasets.DatasetDict({s: datasets.Dataset.from_dict(rows) for s, rows in splits.items()}) for name, splits in public_sets().items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split=None: sets[name] if split is None else sets[name][split])
    tokenizers = types.SimpleNamespace(from_pretrained=lambda name: WordTokenizer())
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(AutoTokenizer=tokenizers))
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    exec(compile(block[1], "examples/README.md", "exec"), {})  # noqa: S102 our own lines

    corpus = load_corpus(recipe("qwen2.5-7b.yaml").data, 0)
    assert [(prompt.text, prompt.reference) for prompt in corpus.references] == [("a b", "c")]
    assert [(prompt.text, prompt.reference) for prompt in corpus.prompts] == [("p q", None)]  # "a b" is taught already
    assert [prompt.reference for prompt in corpus.heldout] == ["y"]
    (sft_run,) = [command[4:] for command in commands((ROOT / "examples" / "qwen2.5-7b.yaml").read_text(encoding="utf-8")) if len(command) > 4]
    taught = load_corpus(recipe("qwen2.5-7b.yaml", *sft_run).data, 0)
    assert sorted((len(prompt.messages), prompt.reference) for prompt in taught.references) == [(1, "six"), (3, "four")]  # all rows, not half
