"""The assembly: the only file that sees both sides. Builds the parts of a Run from a Config, runs the story, tidies up.

Called by the command line and by ``sgpo_dist.train``. Ray, the actors and the learner are imported here and nowhere else in this
package. Leaves out: what a run does (story) and how a role works (actors, learner, buffer).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
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
from sgpo_dist.checkpoint_copy import CheckpointCopier, CopyOutcome, Place, bring_checkpoint, bring_run, is_copy
from sgpo_dist.config import Config
from sgpo_dist.data.embedded_model import default_cache_root, embedded_model_dir
from sgpo_dist.data.loading import Corpus, check_lengths, load_corpus
from sgpo_dist.data.revisions import load_revisions
from sgpo_dist.errors import ConfigError, DataError, EnvironmentProblem, StoppedOnRequest
from sgpo_dist.placement import engine_dtype, gpus_needed, on_gpu, transport
from sgpo_dist.precision import settled
from sgpo_dist.prompts import PromptBook, load_tokenizer
from sgpo_dist.recorder import Recorder
from sgpo_dist.report.model_card import model_card
from sgpo_dist.run import FINISHED, Progress, Run, StopRequest, settled_by
from sgpo_dist.run_directory import RunDirectory
from sgpo_dist.story import train
from sgpo_dist.weights.version import ProbeRow

FRACTION_OF_A_CORE = 0.5  # what a CPU role asks Ray for: placement only, so that a laptop's two cores hold every role
LOOK_EVERY_S = 1.0
SAME_SIGNAL_S = 1.0
"""Programs such as ``timeout`` signal a process and then its group: what comes so soon is one request."""
HURRY_S = 5.0


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
    """Train to the end, or to a stop on request. Raises SgpoError, or KeyboardInterrupt when told twice; resuming is calling it again."""
    began = time.monotonic()
    if is_copy(resume):
        bring_run(resume, config.run_dir)
    config = settled(config)
    with RunDirectory.claim(config, resume) as directory:
        warnings: list[str] = []
        store = _store(config, directory, warnings.append)
        checkpoint = _checkpoint(resume, directory, store)
        progress = Progress.from_facts(checkpoint.facts) if checkpoint else Progress(config.stages[0])
        if progress.stage == FINISHED and directory.model.is_dir():
            return RunResult(directory.path, progress.global_step, progress.version, already_finished=True)
        with Recorder.open(config, directory) as recorder, _stoppable_at_once():
            for warning in warnings:
                recorder.message(warning)
            inputs = _read_inputs(config)
            recorder.event("data", **inputs.counts())
            with ray_session(config, directory):
                try:
                    return asyncio.run(_run(Attempt(config, directory, recorder, inputs, progress, checkpoint, began)))
                except asyncio.CancelledError:
                    raise KeyboardInterrupt from None


def _checkpoint(resume: str, directory: RunDirectory, store: CheckpointStore) -> Checkpoint | None:
    """Where to go on from; the ledger comes out of it where the run's own is lost."""
    if is_copy(resume):
        found: Checkpoint | None = bring_checkpoint(resume, directory.path, store)
    else:
        found = store.latest() if resume in ("auto", "never") else store.load(Path(resume))
    if found is not None and not directory.database.exists():
        _restore_ledger(found.path / directory.database.name, directory.database)
    return found


def _restore_ledger(source: Path, database: Path) -> None:
    """A copy beside, then one rename. What an earlier database left beside itself would be taken for a part of this one."""
    draft = database.with_name(f".{database.name}.tmp")
    shutil.copyfile(source, draft)
    for leftover in database.parent.glob(f"{database.name}-*"):
        leftover.unlink()
    os.replace(draft, database)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads before anything starts."""

    model: Path
    book: PromptBook
    corpus: Corpus

    def counts(self) -> dict[str, Any]:
        """The event that tells of them."""
        corpus = self.corpus
        return {
            "references": len(corpus.references),
            "prompts": len(corpus.prompts),
            "heldout": len(corpus.heldout),
            "dropped": corpus.dropped,
        }


def _read_inputs(config: Config) -> Inputs:
    """The initial model's place, the prompts and the data, refused when they do not fit the configuration. May take minutes to download."""
    model, settings = model_directory(config), config.model
    tokenizer = load_tokenizer(model, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    book = PromptBook(tokenizer, config.rollout.template)
    corpus = load_corpus(config.data, config.seed)
    require_rows(config, corpus)
    _require_revisions(config)
    check_lengths(corpus, book, config.data.max_prompt_tokens)
    return Inputs(model, book, corpus)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One driver's attempt at a run, and where it goes on. It ``began`` at that monotonic time (s)."""

    config: Config
    directory: RunDirectory
    recorder: Recorder
    inputs: Inputs
    progress: Progress
    checkpoint: Checkpoint | None
    began: float


async def _run(attempt: Attempt) -> RunResult:
    directory, parts, stop = attempt.directory, Parts(), StopRequest()
    watch = _hear_stops(attempt, stop, parts)
    try:
        assembling = asyncio.ensure_future(_assemble(attempt, stop, parts))
        if await stop.comes_before(assembling):
            raise StoppedOnRequest(f"stopped by {stop.reason} while it started; run the same command to go on")
        run = assembling.result()
        if attempt.checkpoint:
            step, version = attempt.progress.step, attempt.progress.version
            attempt.recorder.message(f"resuming from {attempt.checkpoint.path.name}: stage {attempt.progress.stage}, step {step}, version {version}")
        await train(run)
        _leave_model(run.last_model(), directory)
        directory.mark_finished()
        return RunResult(run.directory, run.progress.global_step, run.progress.version)
    finally:
        watch.cancel()
        await parts.end()


@dataclass(slots=True)
class Parts:
    """What was started, to be ended in reverse order even when starting failed half-way. In a hurry all have ``HURRY_S``, and Ray ends the rest."""

    ends: list[Callable[[], Awaitable[None]]] = field(default_factory=list)
    is_hurried: bool = False

    async def end(self) -> None:
        """End all, also those after one that fails."""
        try:
            while self.ends and not self.is_hurried:
                await self.ends[-1]()
                self.ends.pop()
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(HURRY_S):
                    await asyncio.gather(*(end() for end in self.ends), return_exceptions=True)


async def _assemble(attempt: Attempt, stop: StopRequest, parts: Parts) -> Run:
    """Everything a run needs; what was started is in ``parts``."""
    config, directory, recorder = attempt.config, attempt.directory, attempt.recorder
    inputs, progress, checkpoint = attempt.inputs, attempt.progress, attempt.checkpoint
    loop = asyncio.get_running_loop()

    def warn(text: str) -> None:  # the store works in threads, the recorder in this one
        loop.call_soon_threadsafe(recorder.message, text)

    copier = _start_copier(config, directory, recorder, parts)
    start_model = inputs.model if progress.stage == config.stages[0] else directory.stage_model(_stage_before(config, progress.stage))
    handle, incarnation = await _start_buffer(directory, parts)
    for stage, step in settled_by(checkpoint.facts) if checkpoint is not None else ():
        await RemoteBuffer(handle).restore(incarnation, stage, step)
    probes = probe_rows(inputs.corpus, inputs.book, config.weights.num_probes)
    fleet = RayFleet(fleet_spec(config, directory, probes, start_model), handle, recorder.event)
    parts.ends.append(fleet.stop)
    learner = LearnerGroup(group_spec(config, directory, probes), fleet.weight_client)
    parts.ends.append(learner.stop)
    recorder.status(doing="starting the engines and the learner")
    await asyncio.gather(fleet.start(config.rollout.num_rollout_workers), _start_learner(learner, recorder))
    return Run(
        config=config,
        directory=directory.path,
        initial_model=inputs.model,
        corpus=inputs.corpus,
        book=inputs.book,
        buffer=RemoteBuffer(handle),
        fleet=fleet,
        learner=learner,
        store=_store(config, directory, warn, copier),
        recorder=recorder,
        incarnation=incarnation,
        progress=progress,
        tolerance=probe_tolerance(config),
        restored_from=checkpoint.path if checkpoint else None,
        stop=stop,
    )


async def _start_learner(learner: LearnerGroup, recorder: Recorder) -> None:
    began = time.monotonic()
    await learner.start()
    recorder.event("learner_started", seconds=round(time.monotonic() - began, 1))


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
    return tuple(ProbeRow.cut(book.policy_ids(prompt), book.completion_ids(prompt.reference or prompt.text)) for prompt in prompts)


def _leave_model(source: Path, directory: RunDirectory) -> None:
    """The last stage's model becomes ``model/``, with its card: a copy beside, then one rename."""
    draft = directory.path / ".model.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(source, draft)
    (draft / "README.md").write_text(model_card(directory), encoding="utf-8")
    shutil.rmtree(directory.model, ignore_errors=True)
    os.replace(draft, directory.model)


# ---- stops ------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _stoppable_at_once() -> Iterator[None]:
    """While nothing runs that has to be ended: SIGTERM ends the attempt as Ctrl-C does. Ray, as it starts, makes it a SystemExit."""

    def hear(number: int, frame: object) -> None:
        raise SystemExit(number)

    is_main = threading.current_thread() is threading.main_thread()
    before = (signal.signal(signal.SIGTERM, hear) if is_main else None) or signal.SIG_DFL
    try:
        yield
    except SystemExit:
        raise StoppedOnRequest("stopped by SIGTERM before it started; run the same command to go on") from None
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _hear_stops(attempt: Attempt, stop: StopRequest, parts: Parts) -> asyncio.Task[None]:
    """From now on signals, the request file and the time limit reach ``stop``; the task that looks for the file, to be cancelled.

    Called after ray.init, which sets signal handlers of its own.
    """
    loop, driver = asyncio.get_running_loop(), asyncio.current_task()
    told_at: list[float] = []

    def ask(reason: str) -> None:
        if not stop.reason:
            attempt.recorder.message(f"{reason}: the step in progress ends, then a checkpoint and the end; a second signal ends the run at once")
        stop.ask(reason)

    def hear(name: str) -> None:
        told_at.append(loop.time())
        if told_at[-1] - told_at[0] >= SAME_SIGNAL_S and driver is not None and not parts.is_hurried:
            parts.is_hurried = True
            driver.cancel()
        ask(name)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, hear, signal.Signals(number).name)
    if attempt.config.time_limit_s is not None:
        loop.call_later(attempt.began + attempt.config.time_limit_s - time.monotonic(), ask, "time_limit_s")
    return asyncio.create_task(_look_for_requests(attempt.directory, ask))


async def _look_for_requests(directory: RunDirectory, ask: Callable[[str], None]) -> None:
    """Every second, for ever: a file can ask from any machine that sees the run's directory."""
    while True:
        if directory.take_stop_request():
            ask("sgpo-dist stop")
        await asyncio.sleep(LOOK_EVERY_S)


# ---- where things run -------------------------------------------------------------------------------------------------------------


def probe_tolerance(config: Config) -> float:
    """Mean |log-prob gap| allowed at the proof, in nats. The learner scores probes in the engine's own type, so only kernels differ."""
    if config.weights.probe_tolerance is not None:
        return config.weights.probe_tolerance
    return 2e-3 if engine_dtype(config) == "float32" else 6e-2


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
    needed = gpus_needed(config)
    there = ray.cluster_resources().get("GPU", 0.0) if needed else 0.0
    if there < needed:
        raise EnvironmentProblem(
            f"the run asks for {needed} GPUs and the cluster has {there:g}; lower learner.num_ranks or rollout.num_rollout_workers"
        )


async def _start_buffer(directory: RunDirectory, parts: Parts) -> tuple[Any, int]:
    """The buffer's actor on the driver's node, restarted by Ray on its file; and this driver's incarnation."""
    handle = (
        ray.remote(PairBuffer)
        .options(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=1000, scheduling_strategy=_this_node())
        .remote(str(directory.database))
    )

    async def end() -> None:
        ray.kill(handle)

    parts.ends.append(end)
    return handle, await RemoteBuffer(handle).begin_incarnation()


def _this_node() -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def group_spec(config: Config, directory: RunDirectory, probes: tuple[ProbeRow, ...]) -> GroupSpec:
    """What the learner's ranks need."""
    return GroupSpec(
        model=config.model,
        learner=config.learner,
        transport=transport(config),
        engine_dtype=engine_dtype(config),
        probes=probes,
        seed=config.seed,
        cache_dir=str(default_cache_root()),
        num_cpus=0.0 if config.learner.gpus_per_rank else FRACTION_OF_A_CORE,
        turns=turns(config, directory),
    )


def turns(config: Config, directory: RunDirectory) -> str:
    """The name under which engines and ranks take turns, "" where they do not: each has a device of its own, or it is not wanted."""
    return directory.run_id if config.learner.take_turns and not on_gpu(config) else ""


def engine_spec(config: Config, probes: tuple[ProbeRow, ...], model_dir: Path) -> EngineSpec:
    """What a rollout worker's engine needs."""
    rollout = config.rollout
    return EngineSpec(
        model_dir=str(model_dir),
        dtype=engine_dtype(config),
        max_model_len=rollout.max_model_len,
        tensor_parallel_size=rollout.tensor_parallel_size,
        kv_cache_gib=rollout.kv_cache_gib,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        transport=transport(config),
        engine_kwargs=rollout.engine_kwargs,
        probes=probes,
        device="cuda" if on_gpu(config) else "cpu",
        seed=config.seed,
        log_level=config.logging.level,
        max_num_seqs=rollout.concurrency,
        num_speculative_tokens=rollout.num_speculative_tokens,
        speculation_busy=rollout.concurrency if rollout.improver.temperature else 0,  # on GPUs proposals change draws: not by who else runs
    )


def fleet_spec(config: Config, directory: RunDirectory, probes: tuple[ProbeRow, ...], model_dir: Path) -> FleetSpec:
    """What the fleet makes its workers from."""
    rollout = config.rollout
    shared = config.learner.gpus_per_rank % 1  # a learner that takes part of a GPU leaves the rest to the engine beside it
    return FleetSpec(
        engine=replace(engine_spec(config, probes, model_dir), turns=turns(config, directory)),
        template=rollout.template,
        gate=config.preference.pair_gate,
        concurrency=rollout.concurrency,
        lease_s=rollout.lease_s,
        request_timeout_s=rollout.lease_s,
        start_timeout_s=rollout.start_timeout_s,
        heartbeat_timeout_s=rollout.heartbeat_timeout_s,
        receive_timeout_s=config.weights.timeout_s,
        max_restarts=rollout.max_restarts,
        tolerance=probe_tolerance(config),
        log_dir=str(directory.logs),
        attempt=directory.incarnation,
        num_cpus=FRACTION_OF_A_CORE,
        num_gpus=(1.0 - shared if shared else float(rollout.tensor_parallel_size)) if on_gpu(config) else 0.0,
    )


def _start_copier(config: Config, directory: RunDirectory, recorder: Recorder, parts: Parts) -> CheckpointCopier | None:
    """None where no copies are asked for. Among the parts it ends last, when nothing can be committed any more."""
    settings, loop = config.checkpoint, asyncio.get_running_loop()
    if settings.copy_to is None:
        return None
    place = Place(f"{settings.copy_to.rstrip('/')}/{config.run_name}")

    def done(outcome: CopyOutcome) -> None:  # in the copier's thread
        loop.call_soon_threadsafe(_note_copy, outcome, recorder)

    copier = CheckpointCopier(directory.path, place, keep_last=settings.keep_last, keep_every=settings.keep_every, done=done)

    async def end() -> None:
        if not await asyncio.to_thread(copier.finish, settings.copy_timeout_s):
            recorder.message(f"the last checkpoint was not copied to {settings.copy_to} within checkpoint.copy_timeout_s")

    parts.ends.append(end)
    return copier


def _note_copy(outcome: CopyOutcome, recorder: Recorder) -> None:
    recorder.event("checkpoint_copied", **asdict(outcome))
    if outcome.problem:
        recorder.message(f"the checkpoint of step {outcome.step} was not copied to checkpoint.copy_to: {outcome.problem}")


def _store(
    config: Config, directory: RunDirectory, warn: Callable[[str], None], copier: CheckpointCopier | None = None
) -> CheckpointStore:
    return CheckpointStore(
        directory.checkpoints,
        run_id=directory.run_id,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        min_free_bytes=int(config.cluster.min_free_disk_gib * 2**30),
        warn=warn,
        crash_point=crash_point(os.environ),
        copier=copier,
    )
