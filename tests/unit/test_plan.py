"""The arithmetic of a plan by hand, and each thing that makes a run impossible here."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sgpo_dist.cli.arithmetic import DataFacts, generated_tokens, versions_published
from sgpo_dist.cli.estimate import (
    GIB,
    RANK_BASE,
    disk_bytes,
    engine_bytes,
    kv_token_bytes,
    rank_bytes,
    shared_bytes,
    smallest_gpu,
)
from sgpo_dist.cli.machine import Gpu, Machine, parse_gpus
from sgpo_dist.cli.model_facts import EMBEDDED_FACTS, ModelFacts, directory_facts, model_facts, published_facts
from sgpo_dist.cli.plan import Plan, absent_data, make_plan, refuse_problems, some_gpus
from sgpo_dist.config import Config, build_config
from sgpo_dist.errors import ConfigError, EnvironmentProblem
from sgpo_dist.placement import gpus_needed, transport

LAPTOP = Machine(cores=2, ram=24 * GIB, ram_available=20 * GIB, disk_free=100 * GIB, shm_free=12 * GIB)
ONE_GPU = replace(LAPTOP, gpus=(Gpu("H200", 141 * GIB, 140 * GIB),))
DATA = DataFacts(references=40, prompts=100, heldout=20)


def config(**tree: Any) -> Config:
    return build_config({**tree, "model": {"dtype": "bfloat16", **tree.get("model", {})}})


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


@pytest.mark.parametrize(
    ("preference", "tokens", "tries"),
    [
        ({}, 100, 100),  # 60 + 40; 100 prompts
        ({"ladder": 2, "samples_per_prompt": 3}, 70, 600),  # a response for two pairs: 30 + 40; 100 x 3 x 2
        ({"agreement": {"draws": 3, "margin": 2}}, 400, 100),  # and three more draws of both roles
        ({"agreement": {"draws": 3, "vote": "likelihood"}}, 100, 100),  # scored, not drawn
        ({"pairs": "judge", "epochs": 2}, 120, 80),  # two responses; the judge compares with the 40 references
        ({"pairs": "judge", "judge": {"kind": "scorer", "scorer": "a:b"}}, 120, 100),
        ({"pairs": "reference"}, 60, 40),
        ({"pairs": "given", "epochs": 2}, 0, 50),  # 25 given pairs, twice
    ],
)
def test_tokens_and_tries_of_every_kind_of_pair(preference: dict[str, Any], tokens: int, tries: int) -> None:
    settings = config(preference=preference, rollout={"policy": {"max_new_tokens": 60}, "improver": {"max_new_tokens": 40}})
    assert generated_tokens(settings) == tokens
    pairs = next(line for line in plan(settings, data=replace(DATA, given=25)).arithmetic if line.name == "preference: pairs")
    assert f"= {tries}" in pairs.why


def test_a_mixed_batch_and_improver_rows() -> None:
    settings = config(
        data={"max_prompt_tokens": 100},
        preference={"total_steps": 10, "offline_ratio": 0.25, "improver_replay": 0.5},
        rollout={"policy": {"max_new_tokens": 60}, "improver": {"max_new_tokens": 40}},
    )
    made = plan(settings, data=replace(DATA, given=25))
    pairs = next(line for line in made.arithmetic if line.name == "preference: pairs")
    assert (pairs.value, pairs.why) == ("80", "100 prompts x 1 x 1 epoch = 100 tries, 20 of them the data's own")  # a quarter of 8 a step
    assert value(made, "preference: tokens a step") == "up to 2,880"  # 8 x (100 + 60 + 40) and 4 rows of 100 + 60 + 40 + 120
    assert value(made, "pairs ahead of training") == "at most 12"  # 2 x 6 made pairs


def test_kept_answers_cost_tokens() -> None:
    preference = {"total_steps": 10, "collect": "first", "kept_replay": 2}
    rollout = {"policy": {"max_new_tokens": 60}, "improver": {"max_new_tokens": 40}}
    made = plan(config(data={"max_prompt_tokens": 100}, preference=preference, rollout=rollout), data=DATA)
    assert value(made, "preference: tokens a step") == "up to 4,160"  # 8 x (100 + 60 + 40) and 16 x (100 + 60)


def test_pairs_made_first_are_all_there_and_cost_few_versions() -> None:
    made = plan(config(preference={"total_steps": 8, "collect": "first"}))
    assert value(made, "pairs ahead of training") == "all"
    assert value(made, "versions published") == "4"  # the first, after sft, after improver, the last
    assert value(plan(config(preference={"total_steps": 9, "rounds": 3})), "rounds") == "3"


TINY = ModelFacts("tiny", 1000, 2, 10, 50, 10, 512, True, ((10, 10), (20, 10)))


def test_rank_memory_by_hand() -> None:
    small = {"learner": {"max_tokens_per_micro_batch": 100, "zero_stage": 0}, "model": {"dtype": "bfloat16"}}
    base = RANK_BASE + 34 * 100 * 10 * 2 * 2 / 2 + 3 * 4 * 100 * 50  # process, activations, logits
    # weights 2, master and Adam 12, gradients 2 + fp32 4, reference 2: 22 bytes a parameter
    assert rank_bytes(config(**small), TINY) == pytest.approx(base + 22_000, abs=1)
    split = config(**{**small, "learner": {"max_tokens_per_micro_batch": 100, "zero_stage": 3, "num_ranks": 2, "train_batch_size": 4}})
    assert rank_bytes(split, TINY) == pytest.approx(base + 10_000 + 2000, abs=1)  # all but the reference are shared out
    second = config(**{**small, "learner": {"max_tokens_per_micro_batch": 100, "zero_stage": 2, "num_ranks": 2, "train_batch_size": 4}})
    assert rank_bytes(second, TINY) == pytest.approx(base + 2000 + 6000 + 3000 + 2000, abs=1)
    free = config(**small, preference={"loss_type": "simpo"})
    assert rank_bytes(free, TINY) == pytest.approx(base + 20_000, abs=1)  # no reference


def test_logits_are_held_a_chunk_at_a_time_and_checkpointing_keeps_one_layer() -> None:
    settings = config(learner={"max_tokens_per_micro_batch": 1000, "zero_stage": 0, "gradient_checkpointing": True}, stages=["sft"])
    activations = 34 * 1000 * 10 * 2 / 2 + 2 * 2 * 1000 * 10 * 2 / 2  # one layer whole, and the inputs of two
    assert rank_bytes(settings, TINY) == pytest.approx(RANK_BASE + 20_000 + activations + 3 * 4 * 256 * 50, abs=1)


def test_float32_without_zero_has_no_master_copy() -> None:
    settings = config(model={"dtype": "float32"}, learner={"max_tokens_per_micro_batch": 100, "zero_stage": 0})
    base = RANK_BASE + 34 * 100 * 10 * 2 * 4 / 2 + 3 * 4 * 100 * 50
    assert rank_bytes(settings, TINY) == pytest.approx(base + 20_000, abs=1)  # weights 4, Adam 8, gradients 4, reference 4


def test_lora_needs_no_second_model_and_small_states() -> None:
    settings = config(model={"lora": {"enabled": True, "r": 2}}, learner={"max_tokens_per_micro_batch": 100, "zero_stage": 0})
    trained = 2 * (10 + 10) + 2 * (20 + 10)
    base = RANK_BASE + 34 * 100 * 10 * 2 + 3 * 4 * 100 * 50
    assert rank_bytes(settings, TINY) == pytest.approx(base + 2000 + 18 * trained, abs=1)
    assert disk_bytes(settings, TINY) == 3 * 14 * trained + 4 * 2000  # a checkpoint holds the adapters alone


def test_the_smallest_gpu_by_hand() -> None:
    shared = config(learner={"gpus_per_rank": 0.5, "max_tokens_per_micro_batch": 100}, rollout={"gpu_memory_utilization": 0.75})
    assert smallest_gpu(shared, TINY) == pytest.approx(4 * rank_bytes(shared, TINY))  # the rank has a quarter
    rollout = {"gpu_memory_utilization": 0.5, "max_model_len": 400_000_000}
    apart = config(learner={"gpus_per_rank": 1, "max_tokens_per_micro_batch": 100}, rollout=rollout)
    assert kv_token_bytes(apart, TINY) == 2 * 2 * 10 * 2
    assert smallest_gpu(apart, TINY) == pytest.approx((2000 + 80 * 400_000_000) / 0.5)  # weights and one full prompt in half of it
    whole = config(learner={"gpus_per_rank": 0.5}, rollout={"gpu_memory_utilization": 1.0})
    assert smallest_gpu(whole, TINY) == float("inf")


def test_engine_disk_and_shared_memory_by_hand() -> None:
    settings = config(rollout={"kv_cache_gib": 0.5}, checkpoint={"keep_last": 2})
    assert engine_bytes(settings, TINY) == pytest.approx(2 * 4000 + 0.5 * GIB + 2 * GIB)  # float32 on the CPU, twice while repacked
    assert disk_bytes(settings, TINY) == 3 * 14_000 + 4 * 2000
    assert disk_bytes(config(preference={"rounds": 3}), TINY) == 3 * 14_000 + 6 * 2000  # two rounds leave their reference
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


def test_given_pairs_that_are_not_there() -> None:
    assert "need rows with chosen and rejected" in only_problem(plan(config(preference={"pairs": "given"})))
    assert "need rows with chosen and rejected" in only_problem(plan(config(preference={"offline_ratio": 0.5})))
    few = plan(config(stages=["preference"], preference={"pairs": "reference"}), data=DataFacts(7, 100, 0))
    assert "give more rows with references" in only_problem(few)


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


def test_a_model_known_by_its_name_is_estimated_and_said_so() -> None:
    made = plan(config(), replace(LAPTOP, ram=500 * GIB, disk_free=500 * GIB), published_facts("runs/qwen2.5-7b-sft/model"))
    assert made.problems == ()
    assert any("estimated with the published shape of Qwen2.5-7B" in line for line in made.warnings)


def test_gpus_of_another_machine() -> None:
    assert some_gpus("8x80") == (Gpu("80 GiB", 80 * GIB, 80 * GIB),) * 8
    for wrong in ("8", "0x80", "8x", "x80", "8x80x1", "99999x1"):
        with pytest.raises(argparse.ArgumentTypeError, match="COUNTxGIB"):
            some_gpus(wrong)


def test_absent_data_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "here.jsonl").touch()
    settings = config(data={"path": f"orders, {tmp_path}/here.jsonl, no/a.parquet", "prompts_path": ["no/b", "no/a.parquet"]})
    assert absent_data(settings) == ["no/a.parquet", "no/b"]


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


@pytest.mark.parametrize(
    ("name", "family", "parameters"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", "Qwen2.5-1.5B", 1_543_714_304),
        ("runs/qwen2.5-7b-sft/model", "Qwen2.5-7B", 7_615_616_512),
        ("meta-llama/Meta-Llama-3-8B", "Llama-3-8B", 8_030_261_248),
        ("models/llama3-8b", "Llama-3-8B", 8_030_261_248),
        ("meta-llama/Llama-3.1-8B-Instruct", "Llama-3.1-8B", 8_030_261_248),
    ],
)
def test_published_sizes_follow_from_the_shapes(name: str, family: str, parameters: int) -> None:
    facts = model_facts(name)
    assert facts is not None
    assert facts.assumed
    assert (facts.name, facts.parameters) == (family, parameters)


def test_other_names_are_no_family() -> None:
    assert published_facts("Qwen/Qwen2.5-72B") is None
    assert published_facts("runs/demo/model") is None


def test_embedded_facts_agree_with_the_published_shape() -> None:
    embedding, layer, norms = 49152 * 576, sum(rows * columns for rows, columns in EMBEDDED_FACTS.linear_shapes) // 30, 2 * 576
    assert EMBEDDED_FACTS.parameters == embedding + 30 * (layer + norms) + 576
