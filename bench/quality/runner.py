"""Runs arms, one after the other on one core, and keeps their figures: ``python -m bench.quality`` starts one of these a core.

An arm is done when its ``result.json`` is there; two runners share the work by a lock a arm. Models of arms that nothing builds on are
deleted after scoring. Called by ``__main__``. Leaves out: tables.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bench.quality.arms import ARMS, Arm, arm_key
from bench.quality.one_process import Workbench
from bench.quality.tasks import Score, Task
from sgpo_dist.config import Config, load_config
from sgpo_dist.evaluate.text_metrics import mean
from sgpo_dist.launch import model_directory
from sgpo_dist.prompts import parse_refinement
from sgpo_dist.records import Completion, FinishReason, Prompt, Role, Stage, sampling_seed
from sgpo_dist.roles import GenerateRequest, Sampling
from sgpo_dist.run import Run

COMMON: Mapping[str, Any] = {
    "eval.enabled": False,
    "logging.progress": "off",
    "logging.report_to": [],
    "checkpoint.save_steps": 1_000_000,
    "checkpoint.keep_last": 1,
    "cluster.min_free_disk_gib": 0.5,
    "weights.num_probes": 2,
    "weights.probe_tolerance": 0.1,
    "rollout.lease_s": 3600,
    "preference.brakes.action": "off",
    "improver.gate": "off",
}
BUSY_PAUSE_S = 5.0
LAST_STEP = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a task's runs lie, and which held-out split they are scored on."""

    root: Path
    task: Task
    split: str

    @property
    def folder(self) -> Path:
        """Of the task."""
        return self.root / self.task.name

    @property
    def arms(self) -> Mapping[str, Arm]:
        """All arms of the task's family."""
        return ARMS[self.task.family]

    def arm(self, name: str, seed: int) -> Path:
        """Of one arm."""
        return self.folder / f"{name}-{seed}-{arm_key(self.task, name, seed)}"

    def result(self, name: str, seed: int) -> Path:
        """The figures of one arm on the split."""
        return self.arm(name, seed) / f"result-{self.split}.json"

    def model(self, name: str, seed: int) -> Path:
        """The model that an arm leaves."""
        return self.arm(name, seed) / "run" / "stages" / self.arms[name].stage


async def run_arms(place: Place, names: Sequence[str], seeds: Sequence[int], core: int) -> None:
    """All arms of all seeds that nobody has done or is doing; returns when none is left to do."""
    bench: Workbench | None = None
    try:
        while left := [(seed, name) for seed in seeds for name in names if not place.result(name, seed).is_file()]:
            did = False
            for seed, name in left:
                ready = all(place.result(need, seed).is_file() for need in place.arms[name].needs)
                with _claimed(place.folder / f"{name}-{seed}.lock") as mine:
                    if not mine or not ready or place.result(name, seed).is_file():
                        continue
                    did = True
                    if _untrained_elsewhere(place, place.arms[name], seed):
                        continue
                    bench = bench or await _open(place, core)
                    await _run_arm(bench, place, place.arms[name], seed)
            if not did:
                await asyncio.sleep(BUSY_PAUSE_S)
    finally:
        if bench is not None:
            await bench.close()


def arm_config(place: Place, arm: Arm, seed: int) -> Config:
    """The configuration of one arm."""
    task = place.task
    stages = [] if arm.stage == "none" else [arm.stage]
    start = str(place.model(arm.parent, seed)) if arm.parent and place.arms[arm.parent].stage != "none" else task.initial_model(place.folder)
    values = {
        **COMMON,
        **task.settings,
        **arm.overrides,
        "run_name": "run",
        "output_dir": str(place.arm(arm.name, seed)),
        "seed": seed,
        "stages": stages or ["sft"],
        "model.model_name_or_path": start,
    }
    if arm.improver_from is not None:
        values["preference.improver_model"] = str(place.model(arm.improver_from, seed))
    return load_config(None, [f"{key}={json.dumps(value)}" for key, value in values.items()], environment={})


async def _open(place: Place, core: int) -> Workbench:
    task = place.task
    base = Arm("base", "none")
    bench = Workbench(
        arm_config(place, base, 0), task.corpus(place.folder / "data", 0, place.split), core, place.folder / f"engine-{core}.log"
    )
    await bench.start()
    return bench


async def _run_arm(bench: Workbench, place: Place, arm: Arm, seed: int) -> None:
    task, began = place.task, time.monotonic()
    config = arm_config(place, arm, seed)
    corpus = task.corpus(place.folder / "data", seed, place.split)
    corpus = replace(corpus, references=corpus.references[slice(*arm.rows)])
    facts = _known(place, arm, seed)
    if facts:
        await bench.show(config, place.model(arm.name, seed))
    elif arm.stage == "none":
        await bench.show(config, model_directory(config))
    else:
        shutil.rmtree(config.run_dir, ignore_errors=True)  # what an arm left that was cut short
        run = await bench.train(config, corpus, arm.swapped)
        facts = await asyncio.to_thread(_facts, run, task, seed)
    trained_s = time.monotonic() - began
    figures = await _figures(bench, place, arm, config, corpus.heldout)
    result = {
        "task": task.name,
        "split": place.split,
        "arm": arm.name,
        "seed": seed,
        "key": arm_key(task, arm.name, seed),
        "n": len(corpus.heldout),
        "seconds": {"run": round(trained_s, 1), "all": round(time.monotonic() - began, 1)},
        **facts,
        **figures,
    }
    _tidy(place, arm, seed)
    _write(place.result(arm.name, seed), result)
    short = {name: round(value, 4) for name, value in result["figures"].items()}
    print(f"{task.name} {arm.name} seed {seed} [{result['seconds']['all']:.0f} s] {short} {facts}", flush=True)


async def _figures(bench: Workbench, place: Place, arm: Arm, config: Config, heldout: Sequence[Prompt]) -> dict[str, Any]:
    """Nothing for an arm that only helps another; else the scores of its answers and, where the task asks, how likely it finds the references."""
    if not arm.shown:
        return {"figures": {}, "per_prompt": {}, "answers": {}}
    found = await _score(bench, place.task, heldout, arm.improver_role)
    if place.task.likelihood:
        model = model_directory(config) if arm.stage == "none" else place.model(arm.name, config.seed)
        found["per_prompt"]["reference_logp"] = logps = await bench.reference_logps(config, model, heldout)
        found["figures"]["reference_logp"] = mean(logps)
    return found


def _untrained_elsewhere(place: Place, arm: Arm, seed: int) -> bool:
    """Take the figures of the initial model from another seed, where there are some: no seed enters them. Whether it did."""
    if arm.stage != "none":
        return False
    for path in sorted(place.folder.glob(f"{arm.name}-*-*/result-{place.split}.json")):
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["key"] == arm_key(place.task, arm.name, tree["seed"]):
            _write(place.result(arm.name, seed), tree | {"seed": seed, "key": arm_key(place.task, arm.name, seed)})
            return True
    return False


def _known(place: Place, arm: Arm, seed: int) -> dict[str, Any]:
    """What training the arm told, from its result on another split, if the model is still there: no held-out split enters it. Empty else."""
    if not (place.model(arm.name, seed) / "model.safetensors").is_file():
        return {}
    for path in place.arm(arm.name, seed).glob("result-*.json"):
        tree = json.loads(path.read_text(encoding="utf-8"))
        return {name: tree[name] for name in ("steps", "learner_tokens", *LAST_STEP, "pairs") if name in tree}
    return {}


def _write(target: Path, result: Mapping[str, Any]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_suffix(".tmp")
    draft.write_text(json.dumps(result, indent=1), encoding="utf-8")
    draft.replace(target)


def _tidy(place: Place, arm: Arm, seed: int) -> None:
    """Only a model that another arm starts from is worth its disk."""
    run = place.arm(arm.name, seed) / "run"
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    if not any(arm.name in other.needs for other in place.arms.values()):
        shutil.rmtree(run / "stages", ignore_errors=True)


def _facts(run: Run, task: Task, seed: int) -> dict[str, Any]:
    """Steps, and what the self-made pairs were worth by the task's own score."""
    import sqlite3

    metrics = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    facts: dict[str, Any] = {"steps": len(metrics), "learner_tokens": round(sum(row["perf/tokens"] for row in metrics))}
    last = metrics[-1] if metrics else {}
    facts |= {name: round(last[name], 4) for name in LAST_STEP if name in last}
    from sgpo_dist.buffer.ledger import Ledger

    ledger = Ledger(run.directory / "buffer.db", clock=time.monotonic, wall=time.time)
    try:
        stage = Stage(run.config.stages[-1])
        pairs = ledger.pairs(stage)
        refused: dict[str, int] = {}
        for refusal in ledger.refusals(stage):
            refused[str(refusal.reason)] = refused.get(str(refusal.reason), 0) + 1
    except (sqlite3.Error, KeyError):
        return facts
    finally:
        ledger.close()
    if pairs:
        truths = task.truths(seed)
        gains = [
            task.score(pair.chosen.text, truth, pair.prompt.text) - task.score(pair.rejected.text, truth, pair.prompt.text)
            for pair in pairs
            if (truth := truths.get(pair.prompt.prompt_id, pair.prompt.reference)) is not None
        ]
        facts["pairs"] = {
            "n": len(pairs),
            "better": round(mean([float(gain > 1e-9) for gain in gains]), 4),
            "worse": round(mean([float(gain < -1e-9) for gain in gains]), 4),
            "refused": refused,
        }
    return facts


async def _score(bench: Workbench, task: Task, prompts: Sequence[Prompt], improver_role: bool) -> dict[str, Any]:
    """Greedy and sampled answers of the weights on the engine, and the improver's rewrites of the sampled ones where it has that role."""
    length = int(task.settings["rollout.policy.max_new_tokens"])
    greedy, sampled = Sampling(0.0, 1.0, 0, length), Sampling(1.0, 1.0, 0, length)
    answers = {"greedy": await _ask(bench, prompts, None, greedy), "sampled": await _ask(bench, prompts, None, sampled)}
    per_prompt = {name: _scores(task.score, prompts, [one.text for one in found]) for name, found in answers.items()}
    if improver_role:
        found = answers["sampled"]
        rewrites = await _ask(bench, prompts, [one.text for one in found], greedy)
        texts = [parse_refinement(new.text, old.text) for new, old in zip(rewrites, found, strict=True)]
        per_prompt["improved_sampled"] = _scores(task.score, prompts, texts)
    for name, measure in task.measures.items():
        per_prompt[name] = _scores(measure, prompts, [one.text for one in answers["greedy"]])
    figures = {name: mean(values) for name, values in per_prompt.items()}
    figures["exact"] = mean([float(value > 1 - 1e-9) for value in per_prompt["greedy"]])
    figures["eos"] = mean([float(one.finish_reason is FinishReason.STOP) for one in answers["greedy"]])
    figures["tokens"] = mean([float(len(one.token_ids)) for one in answers["greedy"]])
    figures["characters"] = mean([float(len(one.text.strip())) for one in answers["greedy"]])
    said = {name: [one.text for one in found] for name, found in answers.items()}
    return {"figures": figures, "per_prompt": per_prompt, "answers": said}


async def _ask(bench: Workbench, prompts: Sequence[Prompt], drafts: Sequence[str] | None, how: Sampling) -> list[Completion]:
    role = Role.POLICY if drafts is None else Role.IMPROVER
    ids = [
        bench.book.policy_ids(prompt) if drafts is None else bench.book.improver_ids(prompt, drafts[place]) for place, prompt in enumerate(prompts)
    ]
    return await bench.generate(
        [GenerateRequest(f"score-{role}-{place}", row, how, sampling_seed(prompts[place].prompt_id, role)) for place, row in enumerate(ids)]
    )


def _scores(score: Score, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    return [score(text.strip(), prompt.reference, prompt.text) for prompt, text in zip(prompts, texts, strict=True)]


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether this process holds the lock within."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()

