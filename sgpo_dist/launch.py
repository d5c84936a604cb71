"""The assembly: the only file that sees both sides. Builds the parts of a Run from a Config, runs the story, tidies up.

Called by the command line and by ``sgpo_dist.train``. Ray, the actors and the learner are imported here and nowhere else in this
package. Leaves out: what a run does (train) and how a role works (actors, learner, buffer).
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

from actors.fleet import FleetSpec, RayFleet
from actors.handles import RemoteBuffer
from actors.vllm_engine import EngineSpec
from learner.group import GroupSpec, LearnerGroup
from sgpo_dist.buffer.service import PairBuffer
from sgpo_dist.checkpoint import Checkpoint, CheckpointStore
from sgpo_dist.config import Config
from sgpo_dist.data.embedded_model import embedded_model_dir
from sgpo_dist.data.loading import Corpus, check_lengths, load_corpus
from sgpo_dist.errors import ConfigError, EnvironmentProblem
from sgpo_dist.evaluate.heldout import read_rows
from sgpo_dist.prompts import PromptBook, load_tokenizer
from sgpo_dist.recorder import Recorder
from sgpo_dist.run import FINISHED, Progress, Run
from sgpo_dist.run_directory import RunDirectory
from sgpo_dist.train import train
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
        store = _store(config, directory)
        checkpoint = store.latest()
        if checkpoint is not None and Progress.from_facts(checkpoint.facts).stage == FINISHED and (directory.path / "model").is_dir():
            progress = Progress.from_facts(checkpoint.facts)
            return RunResult(directory.path, progress.global_step, progress.version, already_finished=True)
        with Recorder.open(config, directory) as recorder, ray_session(config, directory):
            return asyncio.run(_run(config, directory, store, checkpoint, recorder))


async def _run(config: Config, directory: RunDirectory, store: CheckpointStore, checkpoint: Checkpoint | None, recorder: Recorder) -> RunResult:
    parts: list[Callable[[], Awaitable[None]]] = []
    try:
        run = await _assemble(config, directory, store, checkpoint, recorder, parts)
        _stop_on_signals(run)
        await train(run)
        _leave_model(run)
        return RunResult(run.directory, run.progress.global_step, run.progress.version)
    finally:
        for stop in reversed(parts):
            await stop()


async def _assemble(
    config: Config,
    directory: RunDirectory,
    store: CheckpointStore,
    checkpoint: Checkpoint | None,
    recorder: Recorder,
    parts: list[Callable[[], Awaitable[None]]],
) -> Run:
    """Everything a run needs; what was started is in ``parts``, to be stopped in reverse order even when this fails half-way."""
    initial_model = model_directory(config)
    book = PromptBook(load_tokenizer(initial_model, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code), config.rollout.template)
    corpus = load_corpus(config.data, config.seed)
    check_lengths(corpus, book, config.data.max_prompt_tokens)
    progress = Progress.from_facts(checkpoint.facts) if checkpoint else Progress(config.stages[0])
    start_model = initial_model if progress.stage == config.stages[0] else directory.stage_model(_stage_before(config, progress.stage))
    placement = place(config)
    buffer, incarnation = await _start_buffer(directory, parts)
    probes = probe_rows(corpus, book, config.weights.num_probes)
    learner = LearnerGroup(group_spec(config, directory, placement, probes))
    parts.append(learner.stop)
    fleet = RayFleet(fleet_spec(config, directory, placement, probes, start_model), buffer=buffer, on_event=recorder.event)
    parts.append(fleet.stop)
    recorder.status(doing="starting the engines and the learner")
    await asyncio.gather(fleet.start(config.rollout.num_rollout_workers), learner.start())
    return Run(
        config=config,
        directory=directory.path,
        initial_model=initial_model,
        corpus=corpus,
        book=book,
        buffer=buffer,
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
    names = list(config.stages)
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
        return Path(snapshot_download(name, revision=config.model.revision, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as problem:
        line = str(problem).splitlines()[0]
        raise ConfigError(f"model.model_name_or_path '{name}' is neither a directory nor a model that the hub gives: {line}") from None


def probe_rows(corpus: Corpus, book: PromptBook, count: int) -> tuple[ProbeRow, ...]:
    """Fixed texts that both sides score after each sync: prompts with their references, or with themselves where there is none."""
    prompts = (*corpus.references, *corpus.heldout, *corpus.prompts)[:count]
    return tuple(ProbeRow(book.policy_ids(prompt), book.completion_ids(prompt.reference or prompt.text)[:48]) for prompt in prompts)


def _leave_model(run: Run) -> None:
    """The last stage's model becomes ``model/``: a copy beside, then one rename."""
    source = run.stage_dir_of_last()
    draft = run.directory / ".model.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(source, draft)
    target = run.directory / "model"
    shutil.rmtree(target, ignore_errors=True)
    os.replace(draft, target)


def _stop_on_signals(run: Run) -> None:
    """SIGTERM and Ctrl-C ask for a stop after the step in progress. Set after ray.init, which sets handlers of its own."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, run.stop.ask, signal.Signals(number).name)
