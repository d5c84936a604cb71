"""The product in one process on one core: its story, buffer, rollout worker, vLLM engine and learner, without Ray around them.

An engine and a learner's process group are started once and serve run after run, so that an arm of the quality benchmark costs its work and
not a minute of starting. Called by ``runner`` and by the learning test. Everything that decides a figure is the product's own: what is
replaced is only how roles are reached. Leaves out: which runs there are.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from actors.fleet import RayFleet, gated_outcome
from actors.rollout import RolloutSettings, RolloutWorker
from actors.vllm_engine import VllmEngine, engine_environment
from sgpo_dist.buffer.service import PairBuffer
from sgpo_dist.checkpoint import CheckpointStore
from sgpo_dist.config import Config
from sgpo_dist.curriculum import sft_examples
from sgpo_dist.data.embedded_model import default_cache_root
from sgpo_dist.data.loading import Corpus
from sgpo_dist.errors import RunFailed
from sgpo_dist.launch import engine_spec, fleet_spec, model_directory, probe_rows, probe_tolerance
from sgpo_dist.placement import engine_dtype
from sgpo_dist.prompts import PromptBook, load_tokenizer
from sgpo_dist.recorder import Recorder
from sgpo_dist.records import Completion, PreferencePair, Prompt, Stage, TokenExample
from sgpo_dist.roles import Buffer, GenerateRequest, GenerationTask, LearnerStage, Metrics, OptimiserPlan, WorkerStats
from sgpo_dist.run import Progress, Run
from sgpo_dist.run_directory import RunDirectory
from sgpo_dist.story import train
from sgpo_dist.weights.version import WeightBundle, WeightProof, check_proof

T = TypeVar("T")
NODE = "here"


@dataclass(slots=True)
class LocalWorker:
    """``actors.fleet.Worker`` in this process, on an engine that is up already and outlives it."""

    worker_id: str
    worker: RolloutWorker
    node: str = ""

    async def start(self) -> None:
        """The engine is up."""

    async def begin(self, task: GenerationTask) -> None:
        """See RolloutWorker."""
        await self.worker.begin(task)

    async def end(self) -> None:
        """See RolloutWorker."""
        await self.worker.end()

    async def receive(self, bundle: WeightBundle) -> WeightProof:
        """See RolloutWorker."""
        return await self.worker.receive(bundle)

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """See RolloutWorker."""
        return await self.worker.generate(requests)

    async def heartbeat(self) -> WorkerStats:
        """See RolloutWorker."""
        return await self.worker.heartbeat()

    async def wait(self) -> None:
        """This process cannot outlive itself."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """Stop leasing; the engine stays for the next run."""
        await self.worker.end()

    def kill(self) -> None:
        """Nothing of its own to kill."""

    def last_words(self) -> str:
        """No log of its own."""
        return ""


class LocalLearner:
    """``roles.Learner`` over one rank in a thread of this process. ``swapped`` trains on every pair the wrong way round, for a test."""

    def __init__(self, rank: Any, thread: ThreadPoolExecutor, swapped: bool = False) -> None:
        self._rank = rank
        self._thread = thread
        self._swapped = swapped

    async def _call(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(work, *arguments))

    async def begin_stage(self, stage: LearnerStage) -> None:
        """See LearnerRank."""
        await self._call(self._rank.begin_stage, stage)

    async def nll_step(self, step: int, batch: Sequence[TokenExample]) -> Metrics:
        """See LearnerRank."""
        metrics: Metrics = await self._call(self._rank.nll_step, step, batch)
        return metrics

    async def preference_step(self, step: int, batch: Sequence[PreferencePair], replay: Sequence[TokenExample] = ()) -> Metrics:
        """See LearnerRank."""
        pairs = [replace(pair, response=pair.refinement, refinement=pair.response) for pair in batch] if self._swapped else batch
        metrics: Metrics = await self._call(self._rank.preference_step, step, pairs, replay)
        return metrics

    async def refresh_reference(self, directory: str) -> None:
        """See LearnerRank."""
        await self._call(self._rank.refresh_reference, directory)

    async def publish(self, version: int) -> WeightBundle:
        """See LearnerRank."""
        bundle: WeightBundle = await self._call(self._rank.publish, version)
        return bundle

    async def retire(self, version: int) -> None:
        """See LearnerRank."""
        await self._call(self._rank.retire, version)

    async def logps(self, rows: Sequence[TokenExample]) -> list[float]:
        """See LearnerRank."""
        values: list[float] = await self._call(self._rank.logps, rows)
        return values

    async def save(self, directory: str) -> None:
        """See LearnerRank."""
        await self._call(self._rank.save, directory)

    async def load(self, directory: str) -> None:
        """See LearnerRank."""
        await self._call(self._rank.load, directory)

    async def export(self, directory: str) -> None:
        """See LearnerRank."""
        await self._call(self._rank.export, directory)

    async def stop(self) -> None:
        """Let go of the stage; DeepSpeed's group stays for the next run, because a process can have only one in its life."""
        await self._call(self._rank.release)


class Workbench:
    """One engine for many runs on models of one architecture. Use from one event loop; ``close`` in the end."""

    def __init__(self, config: Config, corpus: Corpus, core: int, log: Path) -> None:
        """``config`` decides the engine (context, type, concurrency), ``corpus`` the probes; every run must agree on these."""
        self._core = core
        self._log = log
        self._model = model_directory(config)
        self._book = PromptBook(load_tokenizer(self._model), config.rollout.template)
        self._probes = probe_rows(corpus, self._book, config.weights.num_probes)
        spec = replace(engine_spec(config, self._probes, self._model), cpu_cores=(core,), worker_id="bench", stuck_s=600.0)
        spec = replace(spec, stop_token_ids=(self._book.eos_id,))
        os.environ.update(engine_environment(spec))
        self._engine = VllmEngine(spec)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="learner")
        self._joined = False

    async def start(self) -> None:
        """Start the engine: half a minute, once. Its lines go to the log."""
        with _output_to(self._log):
            await self._engine.start()

    async def close(self) -> None:
        """End the engine's processes."""
        await self._engine.stop()
        self._thread.shutdown()

    async def train(self, config: Config, corpus: Corpus, swapped: bool = False) -> Run:
        """One run to its end, by the product's story; its engine then holds the final weights. Raises what the story raises."""
        with RunDirectory.claim(config, "auto") as directory, Recorder.open(config, directory) as recorder:
            buffer = PairBuffer(directory.database)
            learner = LocalLearner(await self._thread_call(self._new_rank, config), self._thread, swapped)
            fleet = self._fleet(config, directory, buffer, recorder)
            try:
                await fleet.start(1)
                run = self._run(config, corpus, directory, recorder, buffer, fleet, learner, await buffer.begin_incarnation())
                await train(run)
                directory.mark_finished()
                return run
            finally:
                await fleet.stop()
                await learner.stop()
                await buffer.close()

    async def show(self, config: Config, model: Path) -> None:
        """Put the model of a directory on the engine as it is."""
        learner = LocalLearner(await self._thread_call(self._new_rank, config), self._thread)
        try:
            await learner.begin_stage(LearnerStage(Stage.SFT, str(model), OptimiserPlan(config.sft.learning_rate, 1)))
            bundle = await learner.publish(0)
            check_proof(bundle, await self._engine.receive(bundle), probe_tolerance(config))
        finally:
            await learner.stop()

    async def reference_logps(self, config: Config, model: Path, prompts: Sequence[Prompt]) -> list[float]:
        """Log-likelihood per token (nats) of each prompt's reference under the model in a directory; the end token counts. All need a reference."""
        rows = sft_examples(prompts, self._book)
        learner = LocalLearner(await self._thread_call(self._new_rank, config), self._thread)
        try:
            await learner.begin_stage(LearnerStage(Stage.SFT, str(model), OptimiserPlan(config.sft.learning_rate, 1)))
            sums = await learner.logps(rows)
        finally:
            await learner.stop()
        return [total / len(row.completion_ids) for total, row in zip(sums, rows, strict=True)]

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Completions of the weights that the engine holds, in the order of the requests."""
        return list(await asyncio.gather(*(self._engine.generate(request) for request in requests)))

    @property
    def book(self) -> PromptBook:
        """Both roles' prompts."""
        return self._book

    def _run(
        self,
        config: Config,
        corpus: Corpus,
        directory: RunDirectory,
        recorder: Recorder,
        buffer: Buffer,
        fleet: RayFleet,
        learner: LocalLearner,
        incarnation: int,
    ) -> Run:
        return Run(
            config=config,
            directory=directory.path,
            initial_model=model_directory(config),
            corpus=corpus,
            book=self._book,
            buffer=buffer,
            fleet=fleet,
            learner=learner,
            store=CheckpointStore(directory.checkpoints, run_id=directory.run_id, keep_last=config.checkpoint.keep_last),
            recorder=recorder,
            incarnation=incarnation,
            progress=Progress(config.stages[0]),
            tolerance=probe_tolerance(config),
        )

    def _fleet(self, config: Config, directory: RunDirectory, buffer: PairBuffer, recorder: Recorder) -> RayFleet:
        spec = fleet_spec(config, directory, self._probes, self._model)
        settings = RolloutSettings("bench", config.rollout.max_model_len, spec.tolerance, config.rollout.concurrency, config.rollout.lease_s)
        gate = partial(gated_outcome, config.preference.pair_gate)

        def launch(worker_id: str, index: int, count: int, avoid: tuple[str, ...]) -> LocalWorker:
            return LocalWorker(worker_id, RolloutWorker(replace(settings, worker_id=worker_id), self._engine, buffer, self._book, gate, _give_up))

        return RayFleet(spec, buffer, recorder.event, launch)

    async def _thread_call(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(work, *arguments))

    def _new_rank(self, config: Config) -> Any:
        from learner.deepspeed_engine import join
        from learner.learner import LearnerRank, RankSpec

        spec = RankSpec(
            rank=0,
            world_size=1,
            model=config.model,
            learner=config.learner,
            transport="shm",
            engine_dtype=engine_dtype(config),
            probes=self._probes,
            nonce=f"bench-{os.getpid()}",
            seed=config.seed,
            cache_dir=str(default_cache_root()),
            threads=1,
            node_id=NODE,
        )
        if not self._joined:
            join(0, 1, "127.0.0.1", 0, "gloo", config.learner.step_timeout_s)
            self._joined = True
        return LearnerRank(spec)


def pin(core: int) -> None:
    """This process and all it starts run on ``core`` with one thread each. Call before torch is imported."""
    os.sched_setaffinity(0, {core})
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}


def _give_up(reason: str) -> None:
    raise RunFailed(f"the engine is lost: {reason}")


class _output_to:  # noqa: N801 reads as a verb
    """Within: what this process and the children that it starts print goes to a file; the children keep it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path

    def __enter__(self) -> None:
        self._kept = (os.dup(1), os.dup(2))
        sink = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        os.close(sink)

    def __exit__(self, *_: object) -> None:
        for number, kept in enumerate(self._kept, start=1):
            os.dup2(kept, number)
            os.close(kept)


