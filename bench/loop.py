"""The whole loop: seconds to make and train on pairs in four steps, ours against two loops that others would write.

A step has 16 pairs, 8 where the processor has no products of bfloat16.

``naive``: transformers answers as many chat prompts and rewrites the answers, batch by batch, TRL's tuned DPOTrainer takes four steps,
the model is saved and loaded again. Counted from the first generation to the reloaded model; loading at the start is not.
``sgpo``: a run of the preference stage alone, four steps, one publication after them. ``online``: TRL's OnlineDPOTrainer, which
answers every prompt twice with the newest model and lets a stub (the longer answer) choose; ``judged``: our run with two answers a prompt, the
same stub, and a version after each step. Our runs are counted from version 0 on all workers, which is when the first prompt is leased, to the
last version on all workers; starting Ray, engine and learner is not, and neither is the export at the end. All train and generate in the type
that suits the processor (sgpo_dist/precision.py). Guard: finite losses and the same number of pairs trained. Called by ``python -m bench``;
also run as a child of itself.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench.dpo_step import BETA, LEARNING_RATE, build_trainer
from bench.machine import THREADS, Line, answer, environment, run_arm, seconds
from sgpo_dist.data.embedded_model import embedded_model_dir
from sgpo_dist.precision import processor_dtype
from sgpo_dist.prompts import PromptBook, load_tokenizer
from sgpo_dist.records import Message, Prompt
from sgpo_dist.starter import chat

MODULE: Final = "bench.loop"
STEPS: Final = 4
BATCH: Final = 16 if processor_dtype() == "bfloat16" else 8
"""Fewer where products are slow, so that the whole benchmark takes less than 40 minutes there too."""
PAIRS: Final = STEPS * BATCH
SPARE_PROMPTS: Final = 160
"""Prompts of our run: its gate refuses some pairs, and every refusal's time counts against us."""
NEW_TOKENS: Final = 32
TOP_P: Final = 0.95
TEMPERATURES: Final = {"policy": 0.8, "improver": 0.7}


def measure(rounds: int) -> list[Line]:
    """Both ratios of seconds for the same number of pairs, which are the ratios of pairs an hour."""
    found: dict[str, list[dict[str, Any]]] = {"naive": [], "sgpo": [], "online": [], "judged": []}
    for _ in range(rounds):
        for arm, answers in found.items():
            answers.append(run_arm(MODULE, arm, {}, environment(allocator=False)))
    return [_line("naive loop", found["naive"], found["sgpo"]), _line("TRL's OnlineDPO", found["online"], found["judged"])]


def _line(name: str, theirs: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> Line:
    runs = [*theirs, *ours]
    finite = all(math.isfinite(loss) for run in runs for loss in run["losses"])
    pairs = sorted({run["pairs"] for run in runs})
    guard = f"losses {'finite' if finite else 'NOT finite'}; pairs trained an arm: {', '.join(map(str, pairs))}"
    parts = [f"{whose}: {_parts(run['parts'])}" for whose, run in (("theirs", theirs[0]), ("ours", ours[0])) if run["parts"]]
    notes = (f"pairs an hour: theirs {_hourly(theirs):.0f}, ours {_hourly(ours):.0f}", *parts)
    passed = finite and pairs == [PAIRS]
    return Line(f"pairs an hour, {name}", name, seconds(theirs, "took_s"), seconds(ours, "took_s"), guard, passed, notes)


def _hourly(runs: Sequence[dict[str, Any]]) -> float:
    return 3600 * sum(run["pairs"] for run in runs) / sum(seconds(runs, "took_s"))


def _parts(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {took:.1f} s" for name, took in parts.items())


# ---- the others' arms ------------------------------------------------------------------------------------------------------------------


def run_naive() -> dict[str, Any]:
    """Generate, rewrite, train, save, reload; each part timed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    dtype = processor_dtype()
    book = PromptBook(load_tokenizer(embedded_model_dir()))
    tokenizer: Any = AutoTokenizer.from_pretrained(embedded_model_dir(), padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=getattr(torch, dtype))
    import trl  # noqa: F401 seconds of import belong to the start, which is not counted

    prompts = [Prompt(row["id"], (Message("user", row["prompt"]),)) for row in chat.rows("train")[:PAIRS]]
    with tempfile.TemporaryDirectory(prefix="sgpo-bench-") as folder:
        marks = [time.perf_counter()]
        responses = _generate(model, tokenizer, [book.policy_ids(prompt) for prompt in prompts], TEMPERATURES["policy"])
        marks.append(time.perf_counter())
        drafts = [book.improver_ids(prompt, text) for prompt, text in zip(prompts, responses, strict=True)]
        refinements = _generate(model, tokenizer, drafts, TEMPERATURES["improver"])
        marks.append(time.perf_counter())
        rows = [
            {"prompt": tokenizer.decode(list(book.policy_ids(prompt))), "chosen": chosen, "rejected": rejected}
            for prompt, chosen, rejected in zip(prompts, refinements, responses, strict=True)
        ]
        trainer, _ = build_trainer(model, rows, folder, BATCH, STEPS, dtype=dtype, tuned=True)
        trainer.train()
        marks.append(time.perf_counter())
        trainer.model.save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        marks.append(time.perf_counter())
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    names = ("answer", "rewrite", "train", "save and reload")
    parts = {name: after - before for name, before, after in zip(names, marks, marks[1:], strict=False)}
    return {"took_s": [marks[-1] - marks[0]], "pairs": BATCH * len(losses), "losses": losses, "parts": parts}


def _generate(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], temperature: float) -> list[str]:
    """Texts in prompt order, in padded batches."""
    import torch

    texts: list[str] = []
    model.eval()
    for start in range(0, len(prompts), BATCH):
        batch = tokenizer.pad({"input_ids": [list(ids) for ids in prompts[start : start + BATCH]]}, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(
                **batch, do_sample=True, temperature=temperature, top_p=TOP_P, top_k=0, max_new_tokens=NEW_TOKENS, pad_token_id=tokenizer.pad_token_id
            )
        texts += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def run_online() -> dict[str, Any]:
    """TRL's OnlineDPOTrainer, tuned as its offline fellow, with transformers' generation: its vLLM mode needs CUDA."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    def longer(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
        return [length(completion[0]["content"]) for completion in completions]

    dtype = processor_dtype()
    model: Any = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=getattr(torch, dtype))
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in chat.rows("train")[:PAIRS]])
    with tempfile.TemporaryDirectory(prefix="sgpo-bench-") as folder:
        settings = OnlineDPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=dtype == "bfloat16",
            beta=[BETA],
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            gradient_checkpointing=False,
            per_device_train_batch_size=BATCH,
            max_steps=STEPS,
            max_new_tokens=NEW_TOKENS,
            temperature=TEMPERATURES["policy"],
            top_p=TOP_P,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
        trainer = OnlineDPOTrainer(model, reward_funcs=longer, args=settings, train_dataset=data, processing_class=tokenizer)
        began = time.perf_counter()
        trainer.train()
        took = time.perf_counter() - began
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"took_s": [took], "pairs": BATCH * len(losses), "losses": losses, "parts": {}}


def length(text: str, *_: object) -> float:
    """The stub that judges in both arms of the second line: characters."""
    return float(len(text))


# ---- our arms -------------------------------------------------------------------------------------------------------------------------


def overrides(output_dir: str, judged: bool) -> list[str]:
    """The run as dotted overrides: same prompts' set, sampling, beta, rate and batch as the others' loops."""
    values: dict[str, object] = {
        "run_name": "bench",
        "output_dir": output_dir,
        "stages": "[preference]",
        "data.path": "chat",
        "data.max_prompts": SPARE_PROMPTS,
        "preference.total_steps": STEPS,
        "weights.weight_sync_interval": 1 if judged else STEPS,
        "preference.beta": BETA,
        "preference.learning_rate": LEARNING_RATE,
        "preference.warmup_ratio": 0.0,
        "preference.pair_gate.require_eos": "false",
        "rollout.dtype": processor_dtype(),
        "rollout.max_model_len": 768,
        "rollout.concurrency": 32,
        "rollout.num_speculative_tokens": 8,
        "learner.train_batch_size": BATCH,
        "cluster.min_free_disk_gib": 1,
        "eval.enabled": "false",
        "logging.progress": "off",
        "logging.report_to": "[]",
        "logging.level": "WARNING",
    }
    if judged:
        values |= {"preference.pairs": "judge", "preference.judge.kind": "scorer", "preference.judge.scorer": "bench.loop:length"}
    for role, temperature in TEMPERATURES.items():
        values |= {
            f"rollout.{role}.temperature": temperature,
            f"rollout.{role}.top_p": TOP_P,
            f"rollout.{role}.max_new_tokens": NEW_TOKENS,
        }
    return [f"{key}={value}" for key, value in values.items()]


def run_ours(judged: bool) -> dict[str, Any]:
    """A real run through the same door as a user's; its times are read from what it recorded."""
    from sgpo_dist import load_config, train

    with tempfile.TemporaryDirectory(prefix="sgpo-bench-") as folder:
        config = load_config(None, overrides(folder, judged), environment={})
        train(config)
        published = [event for event in _lines(config.run_dir / "events.jsonl") if event["kind"] == "version_published"]
        steps = [row for row in _lines(config.run_dir / "metrics.jsonl") if row["stage"] == "preference"]
    last = STEPS // config.weights.weight_sync_interval
    if not published or (published[0]["version"], published[-1]["version"]) != (0, last):
        raise RuntimeError(f"the run published versions {[event['version'] for event in published]}, not 0 to {last}")
    took = published[-1]["time"] - published[0]["time"]
    parts = {"steps": sum(row["time/step"] for row in steps), "publications": sum(event["total_s"] for event in published[1:])}
    return {"took_s": [took], "pairs": BATCH * len(steps), "losses": [float(row["loss"]) for row in steps], "parts": parts}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def main() -> None:
    """One arm, as a child of ``measure``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=["naive", "online", "sgpo", "judged"], required=True)
    arm = parser.parse_args().arm
    if arm in ("naive", "online"):
        import torch

        torch.set_num_threads(THREADS)
        answer(arm, **(run_naive() if arm == "naive" else run_online()))
    else:
        embedded_model_dir()
        answer(arm, **run_ours(arm == "judged"))


if __name__ == "__main__":
    main()
