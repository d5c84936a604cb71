"""What a configuration asks for, before anything starts: placement, batch arithmetic, memory, disk, and what is impossible here.

``make_plan`` is pure: configuration, machine, model and data facts in, a Plan out. ``sgpo-dist plan`` prints it; ``train`` refuses to start
on its problems. The formulas of memory and disk are in ``estimate``. Starts nothing, loads nothing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.table import Table

from sgpo_dist.cli.estimate import (
    GIB,
    Memory,
    checkpoints_kept,
    disk_bytes,
    engine_dtype,
    gib,
    gpus_needed,
    memory_parts,
    on_gpu,
    plural,
    shared_bytes,
    transport,
)
from sgpo_dist.cli.machine import Machine, observe_machine
from sgpo_dist.cli.model_facts import ModelFacts, model_facts
from sgpo_dist.cli.session import Session, add_config_arguments, read_config
from sgpo_dist.config import Config
from sgpo_dist.data.loading import Corpus, load_corpus
from sgpo_dist.errors import EnvironmentProblem
from sgpo_dist.run_directory import dump_redacted

IMPROVER_OVERHEAD_TOKENS: Final = 120
"""About what the improver's instruction adds to prompt and draft."""


@dataclass(frozen=True, slots=True)
class DataFacts:
    """How many rows there are for each role."""

    references: int
    prompts: int
    heldout: int


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of a plan: what, how much, and how it comes about."""

    name: str
    value: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything ``plan`` shows. ``problems`` make a run here impossible; ``warnings`` do not."""

    placement: tuple[Figure, ...]
    arithmetic: tuple[Figure, ...]
    memory: tuple[Memory, ...]
    disk: Figure
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def make_plan(config: Config, machine: Machine, model: ModelFacts | None, data: DataFacts | None = None) -> Plan:
    """The plan of ``config`` on ``machine``; ``model`` None = its files are not here, so memory is not estimated."""
    memory = tuple(memory_parts(config, model)) if model else ()
    disk = disk_bytes(config, model) if model else 0.0
    problems = [*_gpu_problems(config, machine, memory), *_memory_problems(machine, memory), *_data_problems(config, data)]
    problems += _model_problems(config, model) + _disk_problems(config, machine, disk)
    return Plan(
        placement=tuple(placement(config, machine)),
        arithmetic=tuple(arithmetic(config, data)),
        memory=memory,
        disk=Figure("disk", gib(disk), f"{checkpoints_kept(config) + 1} checkpoints and {len(config.stages) + 1} model directories"),
        problems=tuple(problems),
        warnings=tuple(_warnings(config, machine, model, memory, data)),
    )


def refuse_problems(plan: Plan) -> None:
    """Raises EnvironmentProblem with the first problem, and how many more there are."""
    if plan.problems:
        more = f" (and {len(plan.problems) - 1} more: run `sgpo-dist plan`)" if len(plan.problems) > 1 else ""
        raise EnvironmentProblem(plan.problems[0] + more)


# ---- placement -------------------------------------------------------------------------------------------------------------------


def placement(config: Config, machine: Machine) -> list[Figure]:
    """Who runs where."""
    learner, rollout, weights = config.learner, config.rollout, config.weights
    threads = learner.threads_per_rank or max(1, machine.cores // learner.num_ranks)
    rank = f"{learner.gpus_per_rank:g} GPU each" if on_gpu(config) else f"CPU, {plural(threads, 'thread')} each"
    engine = f"{rollout.tensor_parallel_size} GPU each" if on_gpu(config) else f"CPU, KV cache {rollout.kv_cache_gib:g} GiB each"
    engines = plural(rollout.num_rollout_workers, "vLLM engine")
    proofs = f"every {plural(weights.weight_sync_interval, 'step')}, proved on {plural(weights.num_probes, 'probe')}"
    return [
        Figure("learner", f"{plural(learner.num_ranks, 'rank')}, {rank}", f"{config.model.dtype}, ZeRO-{learner.zero_stage}"),
        Figure("rollout", f"{engines}, {engine}", f"{engine_dtype(config)}, context {rollout.max_model_len}"),
        Figure("weights", f"transport {transport(config)}", proofs),
        Figure("buffer, driver", "CPU", f"run directory {config.run_dir}"),
    ]


# ---- arithmetic ------------------------------------------------------------------------------------------------------------------


def arithmetic(config: Config, data: DataFacts | None) -> list[Figure]:
    """Steps, rows, pairs, tokens and versions of each stage."""
    lines: list[Figure] = []
    if "sft" in config.stages:
        lines.append(_rows_line("sft", config.sft.epochs, config.sft.train_batch_size, data.references if data else None, "references"))
    if "improver" in config.stages:
        rows = min(data.references, config.improver.max_rows or data.references) if data else None
        replayed = 2 if config.improver.replay != "none" else 1
        what = "revisions at most" + (f" and as many {config.improver.replay} replays" if replayed == 2 else "")
        lines.append(_rows_line("improver", config.improver.epochs, config.improver.train_batch_size, rows, what, replayed))
    if "preference" in config.stages:
        lines += _preference_lines(config, data)
    return lines


def _rows_line(stage: str, epochs: int, batch: int, rows: int | None, what: str, factor: int = 1) -> Figure:
    passes = f"{plural(epochs, 'epoch')}, batches of {batch}"
    if rows is None:
        return Figure(f"{stage}: rows", passes)
    return Figure(f"{stage}: steps", str(epochs * math.ceil(rows * factor / batch)), f"{rows} {what}, {passes}")


def pairs_needed(config: Config) -> int:
    """Pairs that the preference stage trains on."""
    return config.preference.total_steps * config.learner.train_batch_size


def versions_published(config: Config) -> int:
    """Versions a whole run publishes: the first, one a stage end, one every ``weight_sync_interval`` steps of preference."""
    interval, steps = config.weights.weight_sync_interval, config.preference.total_steps
    versions = 1 + sum(stage != "preference" for stage in config.stages)
    return versions + math.ceil(steps / interval) if "preference" in config.stages else versions


def pair_tokens(config: Config) -> tuple[int, int, int]:
    """Longest prompt, response and refinement in tokens."""
    return config.data.max_prompt_tokens, config.rollout.policy.max_new_tokens, config.rollout.improver.max_new_tokens


def _preference_lines(config: Config, data: DataFacts | None) -> list[Figure]:
    preference, batch, interval = config.preference, config.learner.train_batch_size, config.weights.weight_sync_interval
    prompt, response, refinement = pair_tokens(config)
    longest, per_rank = prompt + response + refinement, batch // config.learner.num_ranks
    micro = math.ceil(per_rank * longest / config.learner.max_tokens_per_micro_batch)
    tries = f"{data.prompts} prompts x {preference.samples_per_prompt} x {plural(preference.epochs, 'epoch')}" if data else ""
    bound = f"(max_staleness {preference.max_staleness} + 1) x {batch} pairs x {plural(interval, 'step')} a version"
    return [
        Figure("preference: steps", str(preference.total_steps), f"batches of {plural(batch, 'pair')}, {per_rank} a rank"),
        Figure("preference: pairs", str(pairs_needed(config)), f"{tries} = {_chances(config, data)} tries" if data else ""),
        Figure(
            "preference: tokens a step", f"up to {batch * longest:,}", f"prompt {prompt} + response {response} + refinement {refinement}"
        ),
        Figure("preference: micro-batches", f"up to {micro} a rank", f"budget {config.learner.max_tokens_per_micro_batch} tokens"),
        Figure("pairs ahead of training", f"at most {config.capacity}", bound),
        Figure("versions published", str(versions_published(config)), "the first, one a stage before, those of the preference stage"),
    ]


def _chances(config: Config, data: DataFacts) -> int:
    return data.prompts * config.preference.samples_per_prompt * config.preference.epochs


# ---- problems --------------------------------------------------------------------------------------------------------------------


def _gpu_problems(config: Config, machine: Machine, memory: Sequence[Memory]) -> list[str]:
    needed = gpus_needed(config)
    if needed > len(machine.gpus):
        return [
            f"{plural(needed, 'GPU')} asked for, {len(machine.gpus)} here: lower learner.num_ranks, learner.gpus_per_rank, "
            "rollout.num_rollout_workers or rollout.tensor_parallel_size, or set learner.gpus_per_rank=0 for the CPU"
        ]
    return _gpu_memory_problems(config, min(gpu.memory for gpu in machine.gpus), memory) if needed and memory else []


def _gpu_memory_problems(config: Config, device: int, memory: Sequence[Memory]) -> list[str]:
    """``device`` is the smallest device's memory in bytes."""
    rank, engine = memory[0].num_bytes / config.learner.num_ranks, memory[1].num_bytes / config.rollout.num_rollout_workers
    reserved = config.rollout.gpu_memory_utilization * device
    room = device - reserved if config.learner.gpus_per_rank < 1 else device
    found = []
    if rank > room:
        found.append(
            f"a learner rank needs about {gib(rank)} of GPU memory and {gib(room)} is free for it: "
            "raise learner.num_ranks or learner.zero_stage, enable model.lora, or lower rollout.gpu_memory_utilization"
        )
    if engine > reserved:
        found.append(
            f"an engine's weights take {gib(engine)} and rollout.gpu_memory_utilization leaves {gib(reserved)}: "
            "raise rollout.gpu_memory_utilization or rollout.tensor_parallel_size"
        )
    return found


def _memory_problems(machine: Machine, memory: Sequence[Memory]) -> list[str]:
    needed = sum(part.num_bytes for part in memory if not part.on_gpu)
    if needed <= machine.ram:
        return []
    return [
        f"about {gib(needed)} of memory needed, the machine has {gib(machine.ram)}: lower learner.max_tokens_per_micro_batch, "
        "learner.num_ranks, rollout.num_rollout_workers or rollout.kv_cache_gib, or enable model.lora"
    ]


def _disk_problems(config: Config, machine: Machine, disk: float) -> list[str]:
    kept_free = config.cluster.min_free_disk_gib
    if disk + kept_free * GIB <= machine.disk_free:
        return []
    return [
        f"about {gib(disk)} of disk needed under {config.output_dir} beside the {kept_free:g} GiB of cluster.min_free_disk_gib, "
        f"{gib(machine.disk_free)} is free: free space, set output_dir elsewhere, or lower checkpoint.keep_last"
    ]


def _data_problems(config: Config, data: DataFacts | None) -> list[str]:
    if data is None:
        return []
    found = [
        f"stage {stage} needs rows with references and data.path has none: add a reference column, or leave {stage} out of stages"
        for stage in ("sft", "improver")
        if stage in config.stages and not data.references
    ]
    if "preference" in config.stages and _chances(config, data) < config.learner.train_batch_size:
        found.append(
            f"data gives {_chances(config, data)} tries for pairs, one step needs {config.learner.train_batch_size}: "
            "give more prompts, or lower learner.train_batch_size"
        )
    return found


def _model_problems(config: Config, model: ModelFacts | None) -> list[str]:
    if model is None:
        return []
    found = []
    if not model.has_chat_template:
        found.append(f"model '{model.name}' has no chat template: take an instruction-tuned model, or add a chat_template.jinja")
    if model.context and config.rollout.max_model_len > model.context:
        found.append(f"rollout.max_model_len is {config.rollout.max_model_len}, the context of '{model.name}' {model.context}: lower it")
    return found


def _warnings(config: Config, machine: Machine, model: ModelFacts | None, memory: Sequence[Memory], data: DataFacts | None) -> list[str]:
    found = _machine_warnings(config, machine, memory)
    if model is None:
        found.append(f"model '{config.model.model_name_or_path}' is not on this machine yet: memory and disk are not estimated")
    elif shared_bytes(config, model) > machine.shm_free:
        needed = gib(shared_bytes(config, model))
        found.append(f"shared memory has {gib(machine.shm_free)} free, two weight versions take {needed}: enlarge /dev/shm")
    if data and "preference" in config.stages and _chances(config, data) < pairs_needed(config):
        found.append(
            f"{pairs_needed(config)} pairs asked for, data gives {_chances(config, data)} tries: the stage ends early; "
            "raise preference.epochs or preference.samples_per_prompt, or lower preference.total_steps"
        )
    rewrite = sum(pair_tokens(config)) + IMPROVER_OVERHEAD_TOKENS
    if rewrite > config.rollout.max_model_len:
        found.append(
            f"the longest rewrite takes about {rewrite} tokens, rollout.max_model_len is {config.rollout.max_model_len}: "
            "prompts that need more are refused as prompt_too_long"
        )
    return found


def _machine_warnings(config: Config, machine: Machine, memory: Sequence[Memory]) -> list[str]:
    found = []
    host = sum(part.num_bytes for part in memory if not part.on_gpu)
    if machine.ram_available < host <= machine.ram:
        found.append(f"about {gib(host)} of memory needed, {gib(machine.ram_available)} is available now: end other programs first")
    if gpus_needed(config) == 0 and machine.gpus:
        found.append(f"{plural(len(machine.gpus), 'GPU')} here stay unused: set learner.gpus_per_rank=1 to use them")
    return found


# ---- the command -----------------------------------------------------------------------------------------------------------------


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``plan`` on the command line."""
    parser = commands.add_parser(
        "plan",
        help="show what a configuration asks for; start nothing",
        description="Resolved configuration, placement, batch arithmetic in prompts, pairs and tokens, memory estimate.\n"
        "Exit code 0 when a run could start here, 3 when not.",
        epilog="example:\n  sgpo-dist plan --config examples/demo.yaml learner.train_batch_size=16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, session: Session) -> int:
    """Print the plan; 0 when it is possible here, else 3."""
    config = read_config(args, session)
    plan = plan_here(config)
    session.say("resolved configuration")
    session.text(dump_redacted(config))
    show(plan, session)
    return EnvironmentProblem.exit_code if plan.problems else 0


def plan_here(config: Config) -> Plan:
    """The plan on this machine with the real data. A resumed run's own files count as free disk. Raises SgpoError for bad data or model."""
    machine = observe_machine(Path(config.output_dir))
    corpus: Corpus = load_corpus(config.data, config.seed)
    facts = DataFacts(len(corpus.references), len(corpus.prompts), len(corpus.heldout))
    own = sum(path.stat().st_size for path in config.run_dir.rglob("*") if path.is_file()) if config.run_dir.is_dir() else 0
    machine = Machine(machine.cores, machine.ram, machine.ram_available, machine.disk_free + own, machine.shm_free, machine.gpus)
    return make_plan(config, machine, model_facts(config.model.model_name_or_path), facts)


def show(plan: Plan, session: Session) -> None:
    """All tables of a plan."""
    session.table("placement", _figures(plan.placement))
    session.table("arithmetic", _figures(plan.arithmetic))
    if plan.memory:
        memory = [Figure(part.part, ("GPU " if part.on_gpu else "RAM ") + gib(part.num_bytes), part.why) for part in plan.memory]
        total = sum(part.num_bytes for part in plan.memory if not part.on_gpu)
        session.table("memory and disk (estimated)", _figures([*memory, Figure("RAM in all", gib(total)), plan.disk]))
    for line in plan.warnings:
        session.say(f"warning: {line}", style="yellow")
    for line in plan.problems:
        session.say(f"problem: {line}", style="bold red")
    if not plan.problems:
        session.say("nothing stands in the way of this run", style="green")


def _figures(lines: Sequence[Figure]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    for line in lines:
        table.add_row(line.name, line.value, line.why, style=None)
    return table
