"""What a configuration asks for, before anything starts: placement, batch arithmetic, memory, disk, and what is impossible here.

``make_plan`` is pure: configuration, machine, model and data facts in, a Plan out. ``sgpo-dist plan`` prints it, for this machine or for one
with other GPUs, whether model and data are here yet or not; ``train`` refuses to start on its problems. The sums are in ``arithmetic``,
the formulas of memory and disk in ``estimate``. Starts nothing, loads nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from rich.table import Table

from sgpo_dist.cli.arithmetic import (
    IMPROVER_OVERHEAD_TOKENS,
    DataFacts,
    Figure,
    arithmetic,
    pair_tokens,
    pairs_made,
    pairs_needed,
    reads_references,
    tries,
)
from sgpo_dist.cli.estimate import (
    GIB,
    Memory,
    checkpoints_kept,
    disk_bytes,
    gib,
    memory_parts,
    models_kept,
    plural,
    shared_bytes,
    smallest_gpu,
)
from sgpo_dist.cli.machine import Gpu, Machine, observe_machine
from sgpo_dist.cli.model_facts import ModelFacts, model_facts
from sgpo_dist.cli.prediction import prediction_line
from sgpo_dist.cli.session import Session, add_config_arguments, read_config
from sgpo_dist.config import Config
from sgpo_dist.data.loading import BUILT_IN, Corpus, load_corpus
from sgpo_dist.errors import EnvironmentProblem
from sgpo_dist.placement import engine_dtype, gpus_needed, on_gpu, transport
from sgpo_dist.precision import settled
from sgpo_dist.run_directory import dump_redacted
from sgpo_dist.sanitize import markup_text

GPUS: Final = re.compile(r"([1-9]\d{0,3})x([1-9]\d{0,3})")


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything ``plan`` shows. ``problems`` make a run here impossible; ``warnings`` do not.

    ``device`` is the memory that a GPU of this run must have, None on a CPU or when the model is unknown.
    """

    placement: tuple[Figure, ...]
    arithmetic: tuple[Figure, ...]
    memory: tuple[Memory, ...]
    device: Figure | None
    disk: Figure
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def make_plan(config: Config, machine: Machine, model: ModelFacts | None, data: DataFacts | None = None) -> Plan:
    """The plan of a settled ``config`` on ``machine``; ``model`` None = its files are not here, so memory is not estimated."""
    memory = tuple(memory_parts(config, model)) if model else ()
    disk = disk_bytes(config, model) if model else 0.0
    problems = [*_gpu_problems(config, machine, memory), *_memory_problems(machine, memory), *_data_problems(config, data)]
    problems += _model_problems(config, model) + _disk_problems(config, machine, disk)
    return Plan(
        placement=tuple(placement(config, machine)),
        arithmetic=tuple(arithmetic(config, data)),
        memory=memory,
        device=Figure("a GPU, at least", gib(smallest_gpu(config, model)), _device_words(config)) if model and on_gpu(config) else None,
        disk=Figure("disk", gib(disk), f"{checkpoints_kept(config) + 1} checkpoints and {models_kept(config)} model directories"),
        problems=tuple(problems),
        warnings=tuple(_warnings(config, machine, model, memory, data)),
    )


def refuse_problems(plan: Plan) -> None:
    """Raises EnvironmentProblem with the first problem, and how many more there are."""
    if plan.problems:
        more = f" (and {len(plan.problems) - 1} more: run `sgpo-dist plan`)" if len(plan.problems) > 1 else ""
        raise EnvironmentProblem(plan.problems[0] + more)


def _device_words(config: Config) -> str:
    where = "a rank beside an engine" if config.learner.gpus_per_rank < 1 else "a rank, or an engine"
    return f"{where} that keeps to rollout.gpu_memory_utilization {config.rollout.gpu_memory_utilization:g}"


# ---- placement -------------------------------------------------------------------------------------------------------------------


def placement(config: Config, machine: Machine) -> list[Figure]:
    """Who runs where."""
    learner, rollout, weights = config.learner, config.rollout, config.weights
    threads = learner.threads_per_rank or max(1, machine.cores // learner.num_ranks)
    rank = f"{learner.gpus_per_rank:g} GPU each" if on_gpu(config) else f"CPU, {plural(threads, 'thread')} each"
    engine = _engine_place(config) if on_gpu(config) else f"CPU, KV cache {rollout.kv_cache_gib:g} GiB each"
    engines = plural(rollout.num_rollout_workers, "vLLM engine")
    proofs = f"every {plural(weights.weight_sync_interval, 'step')}, proved on {plural(weights.num_probes, 'probe')}"
    return [
        Figure("learner", f"{plural(learner.num_ranks, 'rank')}, {rank}", f"{config.model.dtype}, ZeRO-{learner.zero_stage}"),
        Figure("rollout", f"{engines}, {engine}", f"{engine_dtype(config)}, context {rollout.max_model_len}"),
        Figure("weights", f"transport {transport(config)}", proofs),
        Figure("buffer, driver", "CPU", f"run directory {config.run_dir}"),
    ]


def _engine_place(config: Config) -> str:
    share = config.rollout.gpu_memory_utilization
    if config.learner.gpus_per_rank < 1:
        return f"on the learner's GPU, {share:.0%} of its memory"
    return f"{config.rollout.tensor_parallel_size} GPU each, {share:.0%} of its memory"


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
    rank = memory[0].num_bytes / config.learner.num_ranks
    engine = memory[1].num_bytes / (config.rollout.num_rollout_workers * config.rollout.tensor_parallel_size)
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
    return found + _pair_problems(config, data) if "preference" in config.stages else found


def _pair_problems(config: Config, data: DataFacts) -> list[str]:
    preference, chances = config.preference, tries(config, data)
    if (preference.pairs == "given" or preference.offline_ratio) and not data.given:
        return ["preference.pairs 'given' and preference.offline_ratio need rows with chosen and rejected answers and data.path has none: add them"]
    needed = config.learner.train_batch_size if preference.pairs == "given" else config.made_pairs_per_step
    if chances >= needed:
        return []
    kind = "rows with references" if reads_references(config) else "given pairs" if preference.pairs == "given" else "prompts"
    return [f"data gives {chances} tries for pairs, one step needs {needed}: give more {kind}, or lower learner.train_batch_size"]


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
    elif model.assumed:
        found.append(
            f"model '{config.model.model_name_or_path}' is not on this machine yet: estimated with the published shape of {model.name}, "
            "its chat template not looked at"
        )
    if model is not None and shared_bytes(config, model) > machine.shm_free:
        needed = gib(shared_bytes(config, model))
        found.append(f"shared memory has {gib(machine.shm_free)} free, two weight versions take {needed}: enlarge /dev/shm")
    asked = pairs_made(config) or pairs_needed(config)
    if data and "preference" in config.stages and tries(config, data) < asked:
        found.append(
            f"{asked} pairs asked for, data gives {tries(config, data)} tries: the stage ends early; "
            "raise preference.epochs or preference.samples_per_prompt, or lower preference.total_steps"
        )
    rewrite = sum(pair_tokens(config)) + IMPROVER_OVERHEAD_TOKENS
    rewrites = "improver" in config.stages or ("preference" in config.stages and config.preference.pairs == "improver")
    if rewrites and rewrite > config.rollout.max_model_len:
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
        "Model and data need not be here. Exit code 0 when a run could start here (or with --gpus there), 3 when not.",
        epilog="examples:\n  sgpo-dist plan --config examples/demo.yaml learner.train_batch_size=16\n"
        "  sgpo-dist plan --config examples/qwen2.5-7b.yaml --gpus 8x80",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument("--gpus", metavar="COUNTxGIB", type=some_gpus, help="plan for another machine, with these GPUs and enough of all else")
    parser.set_defaults(run=run)


def some_gpus(text: str) -> tuple[Gpu, ...]:
    """Devices from "8x80": eight of 80 GiB. Raises ArgumentTypeError."""
    match = GPUS.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form COUNTxGIB, such as 8x80")
    memory = int(match[2]) * GIB
    return (Gpu(f"{match[2]} GiB", memory, memory),) * int(match[1])


def run(args: argparse.Namespace, session: Session) -> int:
    """Print the plan; 0 when it is possible, else 3."""
    config = settled(read_config(args, session))
    absent = absent_data(config)
    machine, model = _surroundings(config, args.gpus)
    plan = make_plan(config, machine, model, None if absent else data_facts(config))
    session.say("resolved configuration")
    session.text(dump_redacted(config))
    show(plan, session)
    if predicted := prediction_line(config, machine.gpus, model):
        session.say(predicted)
    if absent:
        session.say(f"note: data not here yet: {', '.join(absent)}. Rows are not counted; `train` needs them (examples/README.md)")
    if not plan.problems:
        session.say("nothing stands in the way of this run" + (" on such a machine" if args.gpus else ""), style="green")
    return EnvironmentProblem.exit_code if plan.problems else 0


def plan_here(config: Config) -> Plan:
    """The plan on this machine with the real data. Raises SgpoError for bad or missing data, or a broken model."""
    config = settled(config)
    return make_plan(config, *_surroundings(config), data_facts(config))


def _surroundings(config: Config, gpus: tuple[Gpu, ...] | None = None) -> tuple[Machine, ModelFacts | None]:
    """This machine, or another with ``gpus``, of which nothing else is known; and the model. A resumed run's own files count as free disk."""
    machine = observe_machine(Path(config.output_dir))
    own = sum(path.stat().st_size for path in config.run_dir.rglob("*") if path.is_file()) if config.run_dir.is_dir() else 0
    machine = replace(machine, disk_free=machine.disk_free + own)
    if gpus:
        machine = Machine(machine.cores, sys.maxsize, sys.maxsize, sys.maxsize, sys.maxsize, gpus)
    return machine, model_facts(config.model.model_name_or_path)


def data_facts(config: Config) -> DataFacts:
    """Rows by role, read. Raises DataError."""
    corpus: Corpus = load_corpus(config.data, config.seed)
    return DataFacts(len(corpus.references), len(corpus.prompts), len(corpus.heldout), len(corpus.given))


def absent_data(config: Config) -> list[str]:
    """Configured data files and directories that do not exist (yet)."""
    paths = (config.data.path, config.data.prompts_path, config.data.heldout_path)
    names = [part.strip() for path in paths if path for part in (path.split(",") if isinstance(path, str) else path)]
    return [name for name in dict.fromkeys(names) if name and name not in BUILT_IN and not Path(name).expanduser().exists()]


def show(plan: Plan, session: Session) -> None:
    """All tables of a plan."""
    session.table("placement", _figures(plan.placement))
    session.table("arithmetic", _figures(plan.arithmetic))
    if plan.memory:
        memory = [Figure(part.part, ("GPU " if part.on_gpu else "RAM ") + gib(part.num_bytes), part.why) for part in plan.memory]
        total = sum(part.num_bytes for part in plan.memory if not part.on_gpu)
        device = [plan.device] if plan.device else []
        session.table("memory and disk (estimated)", _figures([*memory, *device, Figure("RAM in all", gib(total)), plan.disk]))
    for line in plan.warnings:
        session.say(f"warning: {line}", style="yellow")
    for line in plan.problems:
        session.say(f"problem: {line}", style="bold red")


def _figures(lines: Sequence[Figure]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    for line in lines:
        table.add_row(*(markup_text(cell) for cell in (line.name, line.value, line.why)))
    return table
