"""The arithmetic of a plan by hand, and each thing that makes a run impossible here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sgpo_dist.cli.estimate import GIB, disk_bytes, engine_bytes, gpus_needed, rank_bytes, shared_bytes, transport
from sgpo_dist.cli.machine import Gpu, Machine, parse_gpus
from sgpo_dist.cli.model_facts import EMBEDDED_FACTS, ModelFacts, directory_facts, model_facts
from sgpo_dist.cli.plan import DataFacts, Plan, make_plan, refuse_problems, versions_published
from sgpo_dist.config import Config, build_config
from sgpo_dist.errors import ConfigError, EnvironmentProblem

LAPTOP = Machine(cores=2, ram=24 * GIB, ram_available=20 * GIB, disk_free=100 * GIB, shm_free=12 * GIB)
ONE_GPU = replace(LAPTOP, gpus=(Gpu("H200", 141 * GIB, 140 * GIB),))
DATA = DataFacts(references=40, prompts=100, heldout=20)


def config(**tree: Any) -> Config:
    return build_config(tree)


def plan(settings: Config, machine: Machine = LAPTOP, model: ModelFacts | None = EMBEDDED_FACTS, data: DataFacts | None = DATA) -> Plan:
    return make_plan(settings, machine, model, data)


def value(made: Plan, name: str) -> str:
    return next(line.value for line in made.arithmetic if line.name == name)


def test_arithmetic_of_every_stage() -> None:
    made = plan(
        config(
            sft={"epochs": 3, "train_batch_size": 16},
            improver={"train_batch_size": 8, "max_rows": 30, "replay": "self"},
            preference={"total_steps": 12, "max_staleness": 1},
            learner={"train_batch_size": 4, "max_tokens_per_micro_batch": 1024},
            weights={"weight_sync_interval": 2},
            data={"max_prompt_tokens": 100},
            rollout={"policy": {"max_new_tokens": 60}, "improver": {"max_new_tokens": 40}},
        )
    )
    assert value(made, "sft: steps") == "9"  # 3 epochs of ceil(40 / 16) = 3
    assert value(made, "improver: steps") == "8"  # 30 revisions and 30 replays in batches of 8
    assert value(made, "preference: pairs") == "48"
    assert value(made, "preference: tokens a step") == "up to 800"  # 4 pairs of 100 + 60 + 40
    assert value(made, "preference: micro-batches") == "up to 1 a rank"
    assert value(made, "pairs ahead of training") == "at most 16"  # (1 + 1) * 4 * 2
    assert value(made, "versions published") == "9"  # the first, after sft, after improver, 12 / 2
    assert made.problems == ()


def test_versions_count_a_last_short_interval() -> None:
    assert versions_published(config(stages=["preference"], preference={"total_steps": 7}, weights={"weight_sync_interval": 3})) == 4
    assert versions_published(config(stages=["sft"])) == 2


TINY = ModelFacts("tiny", 1000, 2, 10, 50, 10, 512, True, ((10, 10), (20, 10)))


def test_rank_memory_by_hand() -> None:
    small = {"learner": {"max_tokens_per_micro_batch": 100, "zero_stage": 0}, "model": {"dtype": "bfloat16"}}
    base = 1.1 * GIB + 34 * 100 * 10 * 2 * 2 / 2 + 3 * 4 * 100 * 50  # process, activations, logits
    # weights 2, master and Adam 12, gradients 2 + fp32 4, reference 2: 22 bytes a parameter
    assert rank_bytes(config(**small), TINY) == pytest.approx(base + 22_000)
    split = config(**{**small, "learner": {"max_tokens_per_micro_batch": 100, "zero_stage": 3, "num_ranks": 2, "train_batch_size": 4}})
    assert rank_bytes(split, TINY) == pytest.approx(base + 11_000)
    second = config(**{**small, "learner": {"max_tokens_per_micro_batch": 100, "zero_stage": 2, "num_ranks": 2, "train_batch_size": 4}})
    assert rank_bytes(second, TINY) == pytest.approx(base + 2000 + 6000 + 3000 + 2000)


def test_float32_without_zero_has_no_master_copy() -> None:
    settings = config(model={"dtype": "float32"}, learner={"max_tokens_per_micro_batch": 100, "zero_stage": 0})
    base = 1.1 * GIB + 34 * 100 * 10 * 2 * 4 / 2 + 3 * 4 * 100 * 50
    assert rank_bytes(settings, TINY) == pytest.approx(base + 20_000)  # weights 4, Adam 8, gradients 4, reference 4


def test_lora_needs_no_second_model_and_small_states() -> None:
    settings = config(model={"lora": {"enabled": True, "r": 2}}, learner={"max_tokens_per_micro_batch": 100, "zero_stage": 0})
    trained = 2 * (10 + 10) + 2 * (20 + 10)
    base = 1.1 * GIB + 34 * 100 * 10 * 2 + 3 * 4 * 100 * 50
    assert rank_bytes(settings, TINY) == pytest.approx(base + 2000 + 18 * trained)


def test_engine_disk_and_shared_memory_by_hand() -> None:
    settings = config(rollout={"kv_cache_gib": 0.5}, checkpoint={"keep_last": 2})
    assert engine_bytes(settings, TINY) == pytest.approx(2 * 4000 + 0.5 * GIB + 2 * GIB)  # float32 on the CPU, twice while repacked
    assert disk_bytes(settings, TINY) == 3 * 14_000 + 4 * 2000
    assert shared_bytes(settings, TINY) == 4000


@pytest.mark.parametrize(
    ("tree", "needed", "way"),
    [
        ({}, 0, "shm"),
        ({"learner": {"gpus_per_rank": 1}}, 2, "nccl"),
        ({"learner": {"gpus_per_rank": 0.5}}, 1, "ipc"),
        ({"learner": {"gpus_per_rank": 1, "num_ranks": 2}, "rollout": {"num_rollout_workers": 3, "tensor_parallel_size": 2}}, 8, "nccl"),
    ],
)
def test_devices_and_transport(tree: dict[str, Any], needed: int, way: str) -> None:
    assert gpus_needed(config(**tree)) == needed
    assert transport(config(**tree)) == way


def only_problem(made: Plan) -> str:
    assert len(made.problems) == 1, made.problems
    return made.problems[0]


def test_more_gpus_than_there_are() -> None:
    assert "2 GPUs asked for, 0 here" in only_problem(plan(config(learner={"gpus_per_rank": 1})))
    assert "2 GPUs asked for, 1 here" in only_problem(plan(config(learner={"gpus_per_rank": 1}), ONE_GPU))
    assert plan(config(learner={"gpus_per_rank": 0.5}, rollout={"gpu_memory_utilization": 0.5}), ONE_GPU).problems == ()


def test_too_little_gpu_memory() -> None:
    big = replace(EMBEDDED_FACTS, parameters=8_000_000_000)
    machine = replace(LAPTOP, ram=512 * GIB, ram_available=500 * GIB, disk_free=2000 * GIB, gpus=ONE_GPU.gpus * 2)
    assert "a learner rank needs about" in only_problem(plan(config(learner={"gpus_per_rank": 1}), machine, big))
    tight = config(learner={"gpus_per_rank": 1}, rollout={"gpu_memory_utilization": 0.05}, model={"lora": {"enabled": True}})
    assert "an engine's weights take 14.9 GiB" in only_problem(plan(tight, machine, big))


def test_too_little_memory_and_disk() -> None:
    assert "the machine has 4.0 GiB" in only_problem(plan(config(), replace(LAPTOP, ram=4 * GIB)))
    assert "of disk needed under runs" in only_problem(plan(config(), replace(LAPTOP, disk_free=3 * GIB)))
    assert "available now" in plan(config(), replace(LAPTOP, ram_available=4 * GIB)).warnings[0]


def test_no_references_and_no_prompts() -> None:
    assert "stage sft needs rows with references" in plan(config(), data=DataFacts(0, 100, 0)).problems[0]
    assert "data gives 2 tries" in only_problem(plan(config(), data=DataFacts(40, 2, 0)))
    assert any("the stage ends early" in line for line in plan(config(preference={"total_steps": 100})).warnings)


def test_model_without_chat_template_or_with_a_short_context() -> None:
    assert "no chat template" in only_problem(plan(config(), model=replace(EMBEDDED_FACTS, has_chat_template=False)))
    assert "the context of 'SmolLM2-135M-Instruct' 8192" in only_problem(plan(config(rollout={"max_model_len": 16_384})))


def test_an_unknown_model_is_a_warning_and_not_estimated() -> None:
    made = plan(config(model={"model_name_or_path": "some/model"}), model=None)
    assert made.problems == ()
    assert made.memory == ()
    assert "not on this machine yet" in made.warnings[0]


def test_small_shared_memory_and_unused_gpus_are_said() -> None:
    warnings = plan(config(), replace(LAPTOP, shm_free=64 << 20, gpus=ONE_GPU.gpus)).warnings
    assert any("enlarge /dev/shm" in line for line in warnings)
    assert any("1 GPU here stay unused" in line for line in warnings)


def test_train_refuses_the_first_problem_and_counts_the_rest() -> None:
    refuse_problems(plan(config()))
    bad = plan(config(), replace(LAPTOP, ram=1 * GIB, disk_free=0))
    with pytest.raises(EnvironmentProblem, match=r"memory needed.*and 1 more: run `sgpo-dist plan`"):
        refuse_problems(bad)


def test_gpus_from_nvidia_smi() -> None:
    text = "NVIDIA H200, 143771, 143000\nno devices\nA, B, C\n"
    assert parse_gpus(text) == (Gpu("NVIDIA H200", 143771 << 20, 143000 << 20),)


# ---- model facts -------------------------------------------------------------------------------------------------------------------


def write_model(directory: Path, chat_template: bool = True) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "model.embed_tokens.weight": {"dtype": "F32", "shape": [50, 8], "data_offsets": [0, 1600]},
        "model.layers.0.self_attn.q_proj.weight": {"dtype": "F32", "shape": [8, 8], "data_offsets": [1600, 1856]},
        "model.norm.weight": {"dtype": "F32", "shape": [8], "data_offsets": [1856, 1888]},
    }
    raw = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 1888)
    shape = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 50}
    (directory / "config.json").write_text(json.dumps({**shape, "max_position_embeddings": 64}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"} if chat_template else {}))


def test_facts_are_read_from_headers_without_loading(tmp_path: Path) -> None:
    write_model(tmp_path)
    facts = model_facts(str(tmp_path))
    assert facts is not None
    assert (facts.parameters, facts.layers, facts.hidden, facts.vocabulary, facts.kv_width, facts.context) == (
        400 + 64 + 8,
        1,
        8,
        50,
        4,
        64,
    )
    assert facts.linear_shapes == ((8, 8),)
    assert facts.has_chat_template


def test_a_model_without_template_or_files(tmp_path: Path) -> None:
    write_model(tmp_path, chat_template=False)
    assert not directory_facts(tmp_path, "m").has_chat_template
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has no safetensors files"):
        model_facts(str(tmp_path))
    assert model_facts("nobody/has-this-model") is None


def test_embedded_facts_agree_with_the_published_shape() -> None:
    embedding, layer, norms = 49152 * 576, sum(rows * columns for rows, columns in EMBEDDED_FACTS.linear_shapes) // 30, 2 * 576
    assert EMBEDDED_FACTS.parameters == embedding + 30 * (layer + norms) + 576
