"""One rank of the learner: takes its share of every batch, differentiates, steps. Wrapped into a Ray actor by ``group``.

Every rank gets the whole batch and makes the same plan, so ranks agree on shares without talking; scores of all rows are summed up
once a step, so that loss and metrics are those of the whole batch on every rank. It never drives, never knows a worker. Leaves out:
processes and deadlines (group), what is minimised (objectives), DeepSpeed (deepspeed_engine), transport (weight_sender).

Shapes: ``_P`` = pairs of the whole batch, ``_R`` = rows of the whole batch.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from transformers import AutoTokenizer

from learner import kernels
from learner.batch import (
    MicroBatch,
    Row,
    collate,
    collate_packed,
    empty_row,
    example_row,
    pack,
    pair_logps,
    pair_row,
    plan_micro_batches,
    probe_row,
    segment_sums,
)
from learner.deepspeed_engine import EngineSettings, TrainingEngine, join, leave, refusals_of_the_disk
from learner.heap import HeapBound, return_freed
from learner.losses import LOSSES, REFERENCE_FREE, zero_of
from learner.model import DTYPES, CompletionScorer, adapters_off, load_model, load_reference
from learner.objectives import Objective, nll_objective, preference_objective
from learner.weight_sender import DeviceLink, WeightSender, WeightSource, build_sender, wire_dtype
from sgpo_dist import vector_math
from sgpo_dist.config import LearnerConfig, ModelConfig
from sgpo_dist.errors import CheckpointError, ConfigError, RunFailed
from sgpo_dist.records import PreferencePair, TokenExample
from sgpo_dist.roles import LearnerStage
from sgpo_dist.weights.version import ProbeRow, WeightBundle

TOKENIZER_FILES: Final = ("*token*", "vocab*", "merges.txt", "chat_template*", "generation_config.json", "*.py")
MAY_DIFFER: Final = ("num_ranks", "zero_stage")
FLOATING_TYPES: Final = tuple(DTYPES.values())


@dataclass(frozen=True, slots=True)
class RankSpec:
    """What one rank needs. ``engine_dtype`` is what the rollout engines compute in; ``nonce`` names this incarnation's files."""

    rank: int
    world_size: int
    model: ModelConfig
    learner: LearnerConfig
    transport: str
    engine_dtype: str
    probes: tuple[ProbeRow, ...]
    nonce: str
    seed: int
    cache_dir: str
    threads: int
    node_id: str = ""


@dataclass(slots=True)
class _StageState:
    """What lives as long as a stage. ``reference_logps`` caches (chosen, rejected) by uid."""

    stage: LearnerStage
    engine: TrainingEngine
    reference: CompletionScorer | None
    reference_logps: dict[str, tuple[float, float]] = field(default_factory=dict)
    heap: HeapBound = field(default_factory=HeapBound)


class LearnerRank:
    """``sgpo_dist.roles.Learner`` for one rank, in plain synchronous methods. All of them are collectives but the properties."""

    def __init__(self, spec: RankSpec, clock: Callable[[], float] = time.monotonic) -> None:
        if spec.learner.zero_stage == 3 and spec.engine_dtype != spec.model.dtype:
            raise ConfigError(f"learner.zero_stage 3 proves its weights in model.dtype: set rollout.dtype to {spec.model.dtype}, or zero_stage to 2")
        torch.set_num_threads(spec.threads)
        vector_math.settle()
        self._spec = spec
        self._clock = clock
        self._device = torch.device("cuda", 0) if spec.learner.gpus_per_rank else torch.device("cpu")
        self._state: _StageState | None = None
        self._sender: WeightSender | None = None
        self._link: DeviceLink | None = None

    # ---- life ------------------------------------------------------------------------------------------------------------------

    def connect(self, host: str, port: int) -> None:
        """Meet the other ranks; see ``deepspeed_engine.join``."""
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        join(self._spec.rank, self._spec.world_size, host, port, backend, self._spec.learner.step_timeout_s)

    def link(self, link: DeviceLink) -> None:
        """How a device transport reaches the workers; set before the first publication over nccl or ipc."""
        self._link = link
        self._drop_sender()

    def process_id(self) -> int:
        """Of the process this rank lives in. Not a collective."""
        return os.getpid()

    def release(self) -> None:
        """Let go of the stage and of published files; the group stays."""
        self._drop_sender()
        self._end_stage()

    def stop(self) -> None:
        """Remove published files, leave the group."""
        self.release()
        leave()

    # ---- training --------------------------------------------------------------------------------------------------------------

    def begin_stage(self, stage: LearnerStage) -> None:
        """Load the model fresh, build a new optimiser and, where adapters cannot be switched off for it, a frozen reference."""
        if stage.loss.loss_type not in LOSSES:
            raise ConfigError(f"preference.loss_type '{stage.loss.loss_type}' is none of {', '.join(LOSSES)}")
        self._end_stage()
        spec = self._spec
        self._choose_kernels()
        torch.manual_seed(spec.seed)
        attention, checkpointing = spec.learner.attn_implementation, spec.learner.gradient_checkpointing
        scorer = load_model(stage.model_dir, spec.model, attention, checkpointing, self._device, spec.seed)
        reference = self._load_reference(stage, stage.reference_dir)
        self._state = _StageState(stage, TrainingEngine(scorer, stage.optimiser, self._engine_settings()), reference)

    def refresh_reference(self, directory: str) -> None:
        """From now on the frozen reference is the model in ``directory``. Raises ConfigError with adapters, whose reference is the bare model."""
        if self._spec.model.lora.enabled:
            raise ConfigError("with adapters the reference is the model without them; set preference.rounds to 1, or model.lora.enabled to false")
        state = self._current
        state.reference_logps.clear()
        state.reference = None  # let go first: two references need not fit
        state.reference = self._load_reference(state.stage, directory)

    def nll_step(self, step: int, batch: Sequence[TokenExample]) -> dict[str, float]:
        """One optimiser step on mean weighted NLL over completion tokens; see ``_optimise`` for one that is skipped."""
        started = self._clock()
        return self._optimise([nll_objective(batch, self._device, packed=self._current.stage.packing)], started)

    def preference_step(self, step: int, batch: Sequence[PreferencePair], replay: Sequence[TokenExample] = ()) -> dict[str, float]:
        """One optimiser step on the stage's preference loss, plus NLL of the chosen texts, plus the replay rows' NLL by their share.

        See ``_optimise`` for one that is skipped.
        """
        started = self._clock()
        rows = [pair_row(pair) for pair in batch]
        objectives: list[Objective] = [preference_objective(batch, rows, self._reference_logps(batch, rows), self._current.stage.loss)]
        if replay:
            objectives.append(nll_objective(replay, self._device, coefficient=len(replay) / len(batch), name="replay/nll_loss"))
        metrics = self._optimise(objectives, started)
        return metrics | {"perf/pairs_per_s": len(batch) / metrics["time/step"]}

    def logps(self, rows: Sequence[TokenExample]) -> list[float]:
        """Sum of completion log-probs (nats) a row under the current weights, dropout off."""
        logps_R = torch.zeros(len(rows), device=self._device)
        with torch.no_grad(), _evaluating(self._current.engine.scorer):
            for numbers, micro in self._micro_batches([example_row(row) for row in rows]):
                logps_N = self._current.engine.score(micro)
                if numbers:
                    logps_R[numbers] = segment_sums(logps_N, micro)[:, 0]
        return [float(value) for value in self._summed(logps_R)]

    # ---- weights ---------------------------------------------------------------------------------------------------------------

    def publish(self, version: int) -> WeightBundle:
        """The current weights ready to be received, with what this learner's live module makes of the probes."""
        source = WeightSource(self._current.engine, wire_dtype(self._spec.model.dtype, self._spec.engine_dtype))
        if self._sender is None:
            self._sender = build_sender(self._spec.transport, self._spec.rank, self._spec.nonce, source, self._link)
        probe_logps = self._probe_logps()
        sent = self._sender.send(version, source)
        return WeightBundle(
            version=version,
            transport=self._spec.transport,
            uri=sent.uri,
            node_id=self._spec.node_id,
            checksum=sent.checksum,
            num_bytes=sent.num_bytes,
            names=sent.names,
            probe_logps=probe_logps,
        )

    def retire(self, version: int) -> None:
        """Free the bytes of a version."""
        if self._sender is not None:
            self._sender.retire(version)

    def save(self, directory: str) -> None:
        """Optimiser, weights, schedule and random state of every rank, and what they belong to. Raises EnvironmentProblem when the disk refuses."""
        target, rank = Path(directory), self._spec.rank
        with refusals_of_the_disk(target):
            target.mkdir(parents=True, exist_ok=True)
            self._current.engine.save(target)
            save_file(self._random_state(), target / f"random-{rank}.safetensors")
            if rank == 0:
                (target / "learner.json").write_text(json.dumps(self._identity(), indent=1), encoding="utf-8")

    def load(self, directory: str) -> None:
        """What ``save`` wrote, into a stage begun with the same settings; the number of ranks and the ZeRO stage may be others.

        Then rank 0 converts it beside its checkpoint, under a name that the checkpoint store clears away should this be cut short.
        Raises CheckpointError when it cannot be loaded.
        """
        source = Path(directory)
        try:
            saved = json.loads((source / "learner.json").read_text(encoding="utf-8"))
            random_state = load_file(source / f"random-{self._spec.rank % saved['num_ranks']}.safetensors")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
            raise CheckpointError(f"learner state in {source} cannot be read: {problem}; use another checkpoint") from problem
        differing = self._differing(source, saved)
        if differing:
            self._current.engine.load_resharded(source, source.parent.parent / f"tmp-resharded-{self._spec.nonce}")
        else:
            self._current.engine.load(source)
        torch.set_rng_state(random_state["cpu"])
        if "cuda" in random_state:
            torch.cuda.set_rng_state(random_state["cuda"], self._device)

    def export(self, directory: str) -> None:
        """A Hugging Face model directory: configuration, one safetensors file, the tokenizer of the stage's start.

        Raises EnvironmentProblem when the disk refuses.
        """
        engine, model_dir = self._current.engine, self._current.stage.model_dir
        model: Any = engine.scorer.causal_lm
        is_writer = self._spec.rank == 0
        weights: dict[str, Tensor] = {}
        for name, tensor in engine.full_weights():
            if is_writer:
                weights[name] = tensor.to("cpu", copy=True).contiguous()
        if not is_writer:
            return
        target = Path(directory)
        with refusals_of_the_disk(target):
            target.mkdir(parents=True, exist_ok=True)
            model.config.save_pretrained(target)
            _copy_tokenizer(model_dir, target, self._spec.model)
            save_file(weights, target / "model.safetensors", metadata={"format": "pt"})

    # ---- inside ----------------------------------------------------------------------------------------------------------------

    @property
    def _current(self) -> _StageState:
        if self._state is None:
            raise RunFailed("the learner has no stage yet; begin one first")
        return self._state

    def _adapters_are_reference(self, stage: LearnerStage) -> bool:
        return self._spec.model.lora.enabled and stage.reference_dir == stage.model_dir

    def _engine_settings(self) -> EngineSettings:
        settings = self._spec.learner
        bf16 = self._spec.model.dtype == "bfloat16"
        return EngineSettings(bf16, settings.zero_stage, settings.optimizer, Path(self._spec.cache_dir), settings.deepspeed_config)

    def _choose_kernels(self) -> None:
        if self._device.type != "cpu" or not self._spec.learner.cpu_kernels:
            kernels.unload()
        elif problem := kernels.load(Path(self._spec.cache_dir)):
            logging.getLogger(__name__).warning(problem)

    def _end_stage(self) -> None:
        if self._state is not None:
            self._state.engine.close()
            self._state = None
            self._drop_device_sender()
            gc.collect()
            return_freed()

    def _drop_sender(self) -> None:
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    def _drop_device_sender(self) -> None:
        """A device sender is bound to the engine of its stage; files in shared memory outlive it."""
        if self._spec.transport != "shm":
            self._drop_sender()

    def _load_reference(self, stage: LearnerStage, directory: str | None) -> CompletionScorer | None:
        """None where no second model is needed: the loss is NLL or reference-free, or adapters are switched off for it."""
        if directory is None or stage.loss.loss_type in REFERENCE_FREE or self._adapters_are_reference(stage):
            return None
        return load_reference(directory, self._spec.model, self._spec.learner.attn_implementation, self._device)

    def _micro_batches(self, rows: Sequence[Row], packed: bool = False) -> Iterator[tuple[list[int], MicroBatch]]:
        """This rank's micro-batches with their row numbers; an empty one is a stand-in that keeps the ranks in step."""
        sequences = pack([row.length for row in rows]) if packed else [(number,) for number in range(len(rows))]
        lengths = [sum(rows[number].length for number in sequence) for sequence in sequences]
        plan = plan_micro_batches(lengths, self._spec.world_size, self._spec.learner.max_tokens_per_micro_batch)
        for places in plan[self._spec.rank]:
            numbers = [number for place in places for number in sequences[place]]
            chosen = [[rows[number] for number in sequences[place]] for place in places] or [[empty_row(len(rows[0].branches))]]
            yield numbers, collate_packed(chosen).to(self._device)

    def _optimise(self, objectives: Sequence[Objective], started: float) -> dict[str, float]:
        """Forward and backward over this rank's share of each objective, one after the other on all ranks; then one update by their sum.

        Where the loss or the gradient is not finite the update is skipped on all ranks ("step/skipped" is 1) and only the schedule moves on.
        """
        engine = self._current.engine
        batches = [(objective, *batch) for objective in objectives for batch in self._micro_batches(objective.rows, objective.packed)]
        metrics: dict[str, float] = {}
        for place, (objective, numbers, micro) in enumerate(batches, start=1):
            logps_N = engine.score(micro)
            loss = objective.share(numbers, logps_N, micro) if numbers else zero_of(logps_N)
            is_last = place == len(batches)
            if is_last:  # every row is scored: the whole loss is known before its gradient is
                metrics = self._totals(objectives)
            if is_last and not math.isfinite(metrics["loss"]):
                loss = loss * math.nan  # then the gradient is not finite either, which is what the engine skips by
            engine.backward(loss, last=is_last)
        return self._finish_step(metrics, [row for objective in objectives for row in objective.rows], started)

    def _totals(self, objectives: Sequence[Objective]) -> dict[str, float]:
        """Loss and metrics of the whole batch, the same on every rank."""
        found = {"loss": 0.0}
        for objective in objectives:
            self._summed(objective.logps)
            part, measured = objective.total()
            found["loss"] += float(part)
            found |= measured
        return found

    def _finish_step(self, metrics: dict[str, float], rows: Sequence[Row], started: float) -> dict[str, float]:
        """Update the weights, and say how it went."""
        engine = self._current.engine
        learning_rate = engine.learning_rate
        norm = engine.step()
        self._current.heap.after_step()
        seconds = self._clock() - started
        tokens = sum(row.length for row in rows)
        return {
            **metrics,
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "step/skipped": float(not math.isfinite(norm)),
            "perf/tokens": float(tokens),
            "perf/tokens_per_s": tokens / seconds,
            "time/step": seconds,
        }

    def _reference_logps(self, batch: Sequence[PreferencePair], rows: Sequence[Row]) -> Tensor:
        """``[P, 2]`` log-probs under the frozen reference, computed once a pair; all ranks hold the same cache, so they agree what to do.

        Zeros for a loss that does not read them.
        """
        if self._current.stage.loss.loss_type in REFERENCE_FREE:
            return torch.zeros(len(batch), 2, device=self._device)
        known = self._current.reference_logps
        if any(pair.uid not in known for pair in batch):
            logps_P2 = torch.zeros(len(batch), 2, device=self._device)
            with torch.no_grad(), self._reference() as score:
                for numbers, micro in self._micro_batches(rows):
                    logps_N = score(micro)
                    if numbers:
                        logps_P2[numbers] = torch.stack(pair_logps(logps_N, micro), dim=1)
            for pair, values in zip(batch, self._summed(logps_P2).tolist(), strict=True):
                known.setdefault(pair.uid, (values[0], values[1]))
        return torch.tensor([known[pair.uid] for pair in batch], device=self._device)

    @contextmanager
    def _reference(self) -> Iterator[Callable[[MicroBatch], Tensor]]:
        state = self._current
        if state.reference is not None:
            yield state.reference
        elif self._adapters_are_reference(state.stage):
            with adapters_off(state.engine.scorer):
                yield state.engine.score
        else:
            raise RunFailed("this stage has no reference model; give LearnerStage.reference_dir for preference steps")

    def _summed(self, values: Tensor) -> Tensor:
        """In place: every rank filled in its own rows and left zeros elsewhere, so the sum is the whole batch. Free for one rank."""
        if self._spec.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def _probe_logps(self) -> tuple[tuple[float, ...], ...]:
        """Per-token log-probs of the probes under the live weights, computed in the engines' type so that only real gaps show."""
        if not self._spec.probes:
            return ()
        batch = collate([probe_row(probe) for probe in self._spec.probes]).to(self._device)
        with torch.no_grad(), _evaluating(self._current.engine.scorer), self._scoring_as_engines_do() as score:
            values = iter(score(batch).tolist())
        return tuple(tuple(next(values) for _ in probe.completion_ids) for probe in self._spec.probes)

    @contextmanager
    def _scoring_as_engines_do(self) -> Iterator[Callable[[MicroBatch], Tensor]]:
        engine, dtype = self._current.engine, DTYPES[self._spec.engine_dtype]
        if dtype is DTYPES[self._spec.model.dtype]:
            yield engine.score
            return
        state = dict(engine.scorer.named_parameters()) | dict(engine.scorer.named_buffers())
        cast = {name: tensor.detach().to(dtype) for name, tensor in state.items() if tensor.dtype in FLOATING_TYPES}
        yield lambda batch: functional_call(engine.scorer, cast, (batch,))

    def _identity(self) -> dict[str, Any]:
        """What a saved state must match to be loadable as it is."""
        return {
            "stage": self._current.stage.stage.value,
            "num_ranks": self._spec.world_size,
            "zero_stage": self._spec.learner.zero_stage,
            "optimizer": self._spec.learner.optimizer,
            "dtype": self._spec.model.dtype,
            "lora": self._spec.model.lora.enabled,
        }

    def _differing(self, source: Path, saved: Mapping[str, Any]) -> list[str]:
        """What a state was saved with and this run has otherwise, of what may differ. Raises CheckpointError when it may not.

        Plain ZeRO-0 keeps the optimiser in another form than the stages above, which DeepSpeed's conversion does not know.
        """
        differing = [key for key, value in self._identity().items() if saved.get(key) != value]
        for key in differing:
            stages = {saved.get("zero_stage"), self._spec.learner.zero_stage}
            if key not in MAY_DIFFER or (key == "zero_stage" and 0 in stages):
                was, now = saved.get(key), self._identity()[key]
                raise CheckpointError(f"learner state in {source} was saved with {key} {was!r}, this run has {now!r}; set it back")
        return differing

    def _random_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._device)
        return state


@contextmanager
def _evaluating(scorer: CompletionScorer) -> Iterator[None]:
    """Dropout off within."""
    was_training = scorer.training
    scorer.eval()
    try:
        yield
    finally:
        scorer.train(was_training)


def _copy_tokenizer(model_dir: str, target: Path, settings: ModelConfig) -> None:
    """Files as they are from a directory; through transformers from a hub name."""
    source = Path(model_dir)
    if not source.is_dir():
        AutoTokenizer.from_pretrained(model_dir, revision=settings.revision, trust_remote_code=settings.trust_remote_code).save_pretrained(target)
        return
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)
