"""The assembly: the only file that sees both sides. Builds the parts of a Run from a Config, runs the story, tidies up.

Called by the command line and by ``sgpo_dist.train``. Ray, the actors and the learner are imported here and nowhere else in this
package. Leaves out: what a run does (story) and how a role works (actors, learner, buffer).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.fleet import FleetSpec, RayFleet
from actors.handles import RemoteBuffer
from actors.vllm_engine import EngineSpec
from learner.group import GroupSpec, LearnerGroup
from sgpo_dist.buffer.service import PairBuffer
from sgpo_dist.checkpoint import Checkpoint, CheckpointStore, crash_point
from sgpo_dist.config import Config
from sgpo_dist.data.embedded_model import default_cache_root, embedded_model_dir
from sgpo_dist.data.loading import Corpus, check_lengths, load_corpus
from sgpo_dist.data.revisions import load_revisions
from sgpo_dist.errors import ConfigError, DataError, EnvironmentProblem
from sgpo_dist.prompts import PromptBook, load_tokenizer
from sgpo_dist.recorder import Recorder
from sgpo_dist.report.model_card import model_card
from sgpo_dist.run import FINISHED, Progress, Run, settled_by
from sgpo_dist.run_directory import RunDirectory
from sgpo_dist.story import train
from sgpo_dist.weights.version import ProbeRow

FRACTION_OF_A_CORE = 0.5  # what a CPU role asks Ray for: placement only, so that a laptop's two cores hold every role


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended: its directory, and whether it had been finished before (then nothing was done)."""

    directory: Path
    steps: int
    version: int
    already_finished: bool = False

    @property
    def model_dir(self) -> Path:
        """The final Hugging Face model."""
        return self.directory / "model"


def run_training(config: Config, resume: str = "auto") -> RunResult:
    """Train to the end, or to a stop on request. Raises SgpoError; resuming is calling it again."""
    with RunDirectory.claim(config, resume) as directory:
        warnings: list[str] = []
        store = _store(config, directory, warnings.append)
        checkpoint = store.latest() if resume in ("auto", "never") else store.load(Path(resume))
        progress = Progress.from_facts(checkpoint.facts) if checkpoint else Progress(config.stages[0])
        if progress.stage == FINISHED and directory.model.is_dir():
            return RunResult(directory.path, progress.global_step, progress.version, already_finished=True)
        with Recorder.open(config, directory) as recorder, ray_session(config, directory):
            for warning in warnings:
                recorder.message(warning)
            return asyncio.run(_run(config, directory, progress, checkpoint, recorder))


async def _run(config: Config, directory: RunDirectory, progress: Progress, checkpoint: Checkpoint | None, recorder: Recorder) -> RunResult:
    parts: list[Callable[[], Awaitable[None]]] = []
    loop = asyncio.get_running_loop()

    def warn(text: str) -> None:  # the store works in threads, the recorder in this one
        loop.call_soon_threadsafe(recorder.message, text)

    try:
        store = _store(config, directory, warn)
        run = await _assemble(config, directory, recorder, store, progress, checkpoint, parts)
        if checkpoint:
            recorder.message(f"resuming from {checkpoint.path.name}: stage {progress.stage}, step {progress.step}, version {progress.version}")
        _stop_on_signals(run)
        await train(run)
        _leave_model(run.last_model(), directory)
        directory.mark_finished()
        return RunResult(run.directory, run.progress.global_step, run.progress.version)
    finally:
        for stop in reversed(parts):
            await stop()


async def _assemble(
    config: Config,
    directory: RunDirectory,
    recorder: Recorder,
    store: CheckpointStore,
    progress: Progress,
    checkpoint: Checkpoint | None,
    parts: list[Callable[[], Awaitable[None]]],
) -> Run:
    """Everything a run needs; what was started is in ``parts``, to be stopped in reverse order even when this fails half-way."""
    initial_model = model_directory(config)
    book = PromptBook(
        load_tokenizer(initial_model, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code), config.rollout.template
    )
    corpus = load_corpus(config.data, config.seed)
    require_rows(config, corpus)
    _require_revisions(config)
    check_lengths(corpus, book, config.data.max_prompt_tokens)
    recorder.event("data", references=len(corpus.references), prompts=len(corpus.prompts), heldout=len(corpus.heldout), dropped=corpus.dropped)
    start_model = initial_model if progress.stage == config.stages[0] else directory.stage_model(_stage_before(config, progress.stage))
    placement = place(config)
    handle, incarnation = await _start_buffer(directory, parts)
    for stage, step in settled_by(checkpoint.facts) if checkpoint is not None else ():
        await RemoteBuffer(handle).restore(incarnation, stage, step)
    probes = probe_rows(corpus, book, config.weights.num_probes)
    fleet = RayFleet(fleet_spec(config, directory, placement, probes, start_model), handle, recorder.event)
    parts.append(fleet.stop)
    learner = LearnerGroup(group_spec(config, directory, placement, probes), fleet.weight_client)
    parts.append(learner.stop)
    recorder.status(doing="starting the engines and the learner")
    await asyncio.gather(fleet.start(config.rollout.num_rollout_workers), learner.start())
    return Run(
        config=config,
        directory=directory.path,
        initial_model=initial_model,
        corpus=corpus,
        book=book,
        buffer=RemoteBuffer(handle),
        fleet=fleet,
        learner=learner,
        store=store,
        recorder=recorder,
        incarnation=incarnation,
        progress=progress,
        tolerance=probe_tolerance(config, placement),
        restored_from=checkpoint.path if checkpoint else None,
    )


def _stage_before(config: Config, stage: str) -> str:
    names: list[str] = list(config.stages)
    return names[max(0, names.index(stage) - 1)]


def model_directory(config: Config) -> Path:
    """The initial model on disk: the embedded default, a directory, or the hub's snapshot. Raises ConfigError when there is none."""
    name = config.model.model_name_or_path
    if name == "embedded":
        return embedded_model_dir()
    if Path(name).is_dir():
        return Path(name).resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(name, revision=config.model.revision, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as problem:
        line = str(problem).splitlines()[0]
        raise ConfigError(f"model.model_name_or_path '{name}' is neither a directory nor a model that the hub gives: {line}") from None


def require_rows(config: Config, corpus: Corpus) -> None:
    """Raises DataError when a configured stage has nothing to work on, or too few prompts to fill one batch."""
    needs_references = [stage for stage in config.stages if stage != "preference"]
    if needs_references and not corpus.references:
        raise DataError(
            f"stage '{needs_references[0]}' needs rows with a reference and data.path has none; add a 'reference' column or leave the stage out"
        )
    if {"sft", "improver"} <= set(config.stages) and config.sft.max_rows is not None and config.sft.max_rows >= len(corpus.references):
        raise DataError(
            f"sft.max_rows {config.sft.max_rows} leaves none of the {len(corpus.references)} references to the improver stage; lower it"
        )
    preference = config.preference
    prompts = corpus.references if config.pairs_need_references else corpus.prompts
    tries = len(prompts) * preference.samples_per_prompt * preference.ladder * preference.epochs
    makes_pairs = "preference" in config.stages and preference.pairs != "given"
    if makes_pairs and tries < config.made_pairs_per_step:
        raise DataError(
            f"stage 'preference' has {len(prompts)} prompts, fewer than one batch of {config.made_pairs_per_step} pairs; "
            "give more prompts (data.prompts_path) or lower learner.train_batch_size"
        )


def _require_revisions(config: Config) -> None:
    """A wrong row of ready-made revisions stops the run here, before any engine starts."""
    if config.improver.revisions_path and "improver" in config.stages:
        load_revisions(config.improver.revisions_path)


def probe_rows(corpus: Corpus, book: PromptBook, count: int) -> tuple[ProbeRow, ...]:
    """Fixed texts that both sides score after each sync: prompts with their references, or with themselves where there is none."""
    prompts = (*corpus.references, *corpus.heldout, *corpus.prompts)[:count]
    return tuple(ProbeRow(book.policy_ids(prompt), book.completion_ids(prompt.reference or prompt.text)[:48]) for prompt in prompts)


def _leave_model(source: Path, directory: RunDirectory) -> None:
    """The last stage's model becomes ``model/``, with its card: a copy beside, then one rename."""
    draft = directory.path / ".model.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(source, draft)
    (draft / "README.md").write_text(model_card(directory), encoding="utf-8")
    shutil.rmtree(directory.model, ignore_errors=True)
    os.replace(draft, directory.model)


def _stop_on_signals(run: Run) -> None:
    """SIGTERM and Ctrl-C ask for a stop after the step in progress. Set after ray.init, which sets handlers of its own."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, run.stop.ask, signal.Signals(number).name)


# ---- where things run -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Placement:
    """Which devices, types and transport a configuration means."""

    rollout_device: str
    engine_dtype: str
    transport: str


def place(config: Config) -> Placement:
    """Resolve the configuration's 'auto' values. GPUs are used when the learner asks for them."""
    on_gpu = config.learner.gpus_per_rank > 0
    dtype = config.rollout.dtype
    if dtype == "auto":
        dtype = config.model.dtype if on_gpu else "float32"
    transport = config.weights.transport
    if transport == "auto":
        transport = ("ipc" if config.learner.gpus_per_rank < 1 else "nccl") if on_gpu else "shm"
    return Placement("cuda" if on_gpu else "cpu", dtype, transport)


def probe_tolerance(config: Config, placement: Placement) -> float:
    """Mean |log-prob gap| allowed at the proof, in nats. The learner scores probes in the engine's own type, so only kernels differ."""
    if config.weights.probe_tolerance is not None:
        return config.weights.probe_tolerance
    return 2e-3 if placement.engine_dtype == "float32" else 6e-2


@contextmanager
def ray_session(config: Config, directory: RunDirectory) -> Iterator[None]:
    """Join the cluster of this job, or the one that is configured, or start a local one; leave it in the end.

    Raises EnvironmentProblem when the cluster has fewer GPUs than the run needs: a placement that can never happen must not be waited for.
    """
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if address in (None, "local"):
        cores = config.cluster.num_cpus or len(os.sched_getaffinity(0))
        settings |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": int(config.cluster.object_store_gib * 2**30)}
        address = "local"
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default makes training yield to everything else on the machine
    try:
        ray.init(address=address, namespace=f"sgpo-{directory.run_id}", **settings)
    except Exception as problem:
        raise EnvironmentProblem(f"Ray at '{address}' cannot be reached: {str(problem).splitlines()[0]}; see `sgpo-dist doctor`") from problem
    try:
        _protect_token()
        _require_gpus(config)
        yield
    finally:
        ray.shutdown()


def _protect_token() -> None:
    """Whoever has Ray's token may run code on the cluster, and Ray 2.60 writes it readable by all."""
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file() and token.stat().st_mode & 0o077:
        token.chmod(0o600)


def _require_gpus(config: Config) -> None:
    if not config.learner.gpus_per_rank:
        return
    learner = config.learner.gpus_per_rank * config.learner.num_ranks
    engines = config.rollout.num_rollout_workers * config.rollout.tensor_parallel_size
    needed = max(learner, engines) if config.learner.gpus_per_rank < 1 else learner + engines
    there = ray.cluster_resources().get("GPU", 0.0)
    if there < needed:
        raise EnvironmentProblem(
            f"the run asks for {needed:g} GPUs and the cluster has {there:g}; lower learner.num_ranks or rollout.num_rollout_workers"
        )


async def _start_buffer(directory: RunDirectory, parts: list[Callable[[], Awaitable[None]]]) -> tuple[Any, int]:
    """The buffer's actor on the driver's node, restarted by Ray on its file; and this driver's incarnation."""
    handle = (
        ray.remote(PairBuffer)
        .options(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=1000, scheduling_strategy=_this_node())
        .remote(str(directory.database))
    )

    async def end() -> None:
        ray.kill(handle)

    parts.append(end)
    return handle, await RemoteBuffer(handle).begin_incarnation()


def _this_node() -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def group_spec(config: Config, directory: RunDirectory, placement: Placement, probes: tuple[ProbeRow, ...]) -> GroupSpec:
    """What the learner's ranks need."""
    return GroupSpec(
        model=config.model,
        learner=config.learner,
        transport=placement.transport,
        engine_dtype=placement.engine_dtype,
        probes=probes,
        seed=config.seed,
        cache_dir=str(default_cache_root()),
        num_cpus=0.0 if config.learner.gpus_per_rank else FRACTION_OF_A_CORE,
    )


def engine_spec(config: Config, placement: Placement, probes: tuple[ProbeRow, ...], model_dir: Path) -> EngineSpec:
    """What a rollout worker's engine needs."""
    rollout = config.rollout
    return EngineSpec(
        model_dir=str(model_dir),
        dtype=placement.engine_dtype,
        max_model_len=rollout.max_model_len,
        tensor_parallel_size=rollout.tensor_parallel_size,
        kv_cache_gib=rollout.kv_cache_gib,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        transport=placement.transport,
        engine_kwargs=rollout.engine_kwargs,
        probes=probes,
        device=placement.rollout_device,
        seed=config.seed,
        log_level=config.logging.level,
        max_num_seqs=rollout.concurrency,
    )


def fleet_spec(config: Config, directory: RunDirectory, placement: Placement, probes: tuple[ProbeRow, ...], model_dir: Path) -> FleetSpec:
    """What the fleet makes its workers from."""
    rollout = config.rollout
    on_gpu = placement.rollout_device == "cuda"
    shared = config.learner.gpus_per_rank % 1  # a learner that takes part of a GPU leaves the rest to the engine beside it
    return FleetSpec(
        engine=engine_spec(config, placement, probes, model_dir),
        template=rollout.template,
        gate=config.preference.pair_gate,
        concurrency=rollout.concurrency,
        lease_s=rollout.lease_s,
        request_timeout_s=rollout.lease_s,
        start_timeout_s=rollout.start_timeout_s,
        heartbeat_timeout_s=rollout.heartbeat_timeout_s,
        receive_timeout_s=config.weights.timeout_s,
        max_restarts=rollout.max_restarts,
        tolerance=probe_tolerance(config, placement),
        log_dir=str(directory.logs),
        attempt=directory.incarnation,
        num_cpus=FRACTION_OF_A_CORE,
        num_gpus=(1.0 - shared if shared else float(rollout.tensor_parallel_size)) if on_gpu else 0.0,
    )


def _store(config: Config, directory: RunDirectory, warn: Callable[[str], None]) -> CheckpointStore:
    return CheckpointStore(
        directory.checkpoints,
        run_id=directory.run_id,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        min_free_bytes=int(config.cluster.min_free_disk_gib * 2**30),
        warn=warn,
        crash_point=crash_point(os.environ),
    )
