"""One rank of the learner: takes its share of every batch, differentiates, steps. Wrapped into a Ray actor by ``group``.

Every rank gets the whole batch and makes the same plan, so ranks agree on shares without talking; scores of all pairs are summed up
once a step, so that loss and metrics are those of the whole batch on every rank. It never drives, never knows a worker. Leaves out:
processes and deadlines (group), DeepSpeed (deepspeed_engine), transport (weight_sender).

Shapes: ``_P`` = pairs of the whole batch, ``_R`` = examples of the whole batch, ``_m`` = those of one micro-batch.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
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

from learner.batch import (
    MicroBatch,
    Row,
    collate,
    empty_row,
    example_row,
    pair_logps,
    pair_row,
    plan_micro_batches,
    probe_row,
    segment_sums,
)
from learner.deepspeed_engine import EngineSettings, TrainingEngine, join, leave
from learner.losses import LOSSES, nll, zero_of
from learner.model import DTYPES, CompletionScorer, adapters_off, load_model, load_reference
from learner.weight_sender import DeviceLink, WeightSender, WeightSource, build_sender, wire_dtype
from sgpo_dist.config import LearnerConfig, ModelConfig
from sgpo_dist.errors import CheckpointError, ConfigError, RunFailed
from sgpo_dist.records import PreferencePair, TokenExample
from sgpo_dist.roles import LearnerStage, LossPlan
from sgpo_dist.weights.version import ProbeRow, WeightBundle

TOKENIZER_FILES: Final = ("*token*", "vocab*", "merges.txt", "chat_template*", "generation_config.json", "*.py")
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


class LearnerRank:
    """``sgpo_dist.roles.Learner`` for one rank, in plain synchronous methods. All of them are collectives but the properties."""

    def __init__(self, spec: RankSpec, clock: Callable[[], float] = time.monotonic) -> None:
        if spec.learner.zero_stage == 3 and spec.engine_dtype != spec.model.dtype:
            raise ConfigError(f"learner.zero_stage 3 proves its weights in model.dtype: set rollout.dtype to {spec.model.dtype}, or zero_stage to 2")
        torch.set_num_threads(spec.threads)
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

    def stop(self) -> None:
        """Remove published files, leave the group."""
        self._drop_sender()
        self._end_stage()
        leave()

    # ---- training --------------------------------------------------------------------------------------------------------------

    def begin_stage(self, stage: LearnerStage) -> None:
        """Load the model fresh, build a new optimiser and, where adapters cannot be switched off for it, a frozen reference."""
        if stage.loss.loss_type not in LOSSES:
            raise ConfigError(f"preference.loss_type '{stage.loss.loss_type}' is none of {', '.join(LOSSES)}")
        self._end_stage()
        spec = self._spec
        torch.manual_seed(spec.seed)
        attention, checkpointing = spec.learner.attn_implementation, spec.learner.gradient_checkpointing
        scorer = load_model(stage.model_dir, spec.model, attention, checkpointing, self._device, spec.seed)
        reference = None
        if stage.reference_dir is not None and not self._adapters_are_reference(stage):
            reference = load_reference(stage.reference_dir, spec.model, attention, self._device)
        self._state = _StageState(stage, TrainingEngine(scorer, stage.optimiser, self._engine_settings()), reference)

    def nll_step(self, step: int, batch: Sequence[TokenExample]) -> dict[str, float]:
        """One optimiser step on mean weighted NLL over completion tokens. Raises RunFailed when the loss is not finite."""
        started = self._clock()
        rows = [example_row(example) for example in batch]
        counts_R = torch.tensor([float(len(example.completion_ids)) for example in batch], device=self._device)
        weights_R = torch.tensor([example.weight for example in batch], device=self._device)
        logps_R = torch.zeros(len(batch), device=self._device)
        total = float((counts_R * weights_R).sum())

        def share_of_loss(numbers: Sequence[int], logps_N: Tensor, micro: MicroBatch) -> Tensor:
            logps_m = segment_sums(logps_N, micro)[:, 0]
            logps_R[numbers] = logps_m.detach()
            loss, _ = nll(logps_m, counts_R[numbers], weights_R[numbers])
            return loss * (float((counts_R * weights_R)[numbers].sum()) / total)

        self._accumulate(rows, share_of_loss)
        loss, metrics = nll(self._summed(logps_R), counts_R, weights_R)
        return self._finish_step(step, float(loss), metrics, rows, started)

    def preference_step(self, step: int, batch: Sequence[PreferencePair]) -> dict[str, float]:
        """One optimiser step on the stage's preference loss (plus NLL of the chosen texts). Raises RunFailed when it is not finite."""
        started = self._clock()
        rows = [pair_row(pair) for pair in batch]
        plan = self._current.stage.loss
        ref_P2 = self._reference_logps(batch, rows)
        counts_P = torch.tensor([float(len(pair.chosen.token_ids)) for pair in batch], device=self._device)
        logps_P2 = torch.zeros(len(batch), 2, device=self._device)

        def share_of_loss(numbers: Sequence[int], logps_N: Tensor, micro: MicroBatch) -> Tensor:
            chosen_m, rejected_m = pair_logps(logps_N, micro)
            logps_P2[numbers] = torch.stack([chosen_m, rejected_m], dim=1).detach()
            share = (len(numbers) / len(batch), float(counts_P[numbers].sum() / counts_P.sum()))
            return _preference_loss(plan, chosen_m, rejected_m, ref_P2[numbers], counts_P[numbers], share)[0]

        self._accumulate(rows, share_of_loss)
        self._summed(logps_P2)
        loss, metrics = _preference_loss(plan, logps_P2[:, 0], logps_P2[:, 1], ref_P2, counts_P, (1.0, 1.0))
        metrics |= {
            "completions/chosen_length": float(counts_P.mean()),
            "completions/rejected_length": sum(len(pair.rejected.token_ids) for pair in batch) / len(batch),
        }
        metrics = self._finish_step(step, float(loss), metrics, rows, started)
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
        """Optimiser, weights, schedule and random state of every rank, and what they belong to."""
        target, rank = Path(directory), self._spec.rank
        target.mkdir(parents=True, exist_ok=True)
        self._current.engine.save(target)
        save_file(self._random_state(), target / f"random-{rank}.safetensors")
        if rank == 0:
            (target / "learner.json").write_text(json.dumps(self._identity(), indent=1), encoding="utf-8")

    def load(self, directory: str) -> None:
        """What ``save`` wrote, into a stage begun with the same settings. Raises CheckpointError when it cannot."""
        source = Path(directory)
        try:
            saved = json.loads((source / "learner.json").read_text(encoding="utf-8"))
            random_state = load_file(source / f"random-{self._spec.rank}.safetensors")
        except (OSError, ValueError, SafetensorError) as problem:
            raise CheckpointError(f"learner state in {source} cannot be read: {problem}; use another checkpoint") from problem
        for key, value in self._identity().items():
            if saved.get(key) != value:
                raise CheckpointError(f"learner state in {source} was saved with {key} {saved.get(key)!r}, this run has {value!r}; set it back")
        self._current.engine.load(source)
        torch.set_rng_state(random_state["cpu"])
        if "cuda" in random_state:
            torch.cuda.set_rng_state(random_state["cuda"], self._device)

    def export(self, directory: str) -> None:
        """A Hugging Face model directory: configuration, one safetensors file, the tokenizer of the stage's start."""
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

    def _end_stage(self) -> None:
        if self._state is not None:
            self._state.engine.close()
            self._state = None
            self._drop_device_sender()
            gc.collect()

    def _drop_sender(self) -> None:
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    def _drop_device_sender(self) -> None:
        """A device sender is bound to the engine of its stage; files in shared memory outlive it."""
        if self._spec.transport != "shm":
            self._drop_sender()

    def _micro_batches(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], MicroBatch]]:
        """This rank's micro-batches with their row numbers; an empty one is a stand-in that keeps the ranks in step."""
        plan = plan_micro_batches([row.length for row in rows], self._spec.world_size, self._spec.learner.max_tokens_per_micro_batch)
        for numbers in plan[self._spec.rank]:
            chosen = [rows[number] for number in numbers] or [empty_row(len(rows[0].branches))]
            yield numbers, collate(chosen).to(self._device)

    def _accumulate(self, rows: Sequence[Row], share_of_loss: Callable[[Sequence[int], Tensor, MicroBatch], Tensor]) -> None:
        """Forward and backward over this rank's share; the sum over all ranks is the gradient of the whole batch's loss."""
        engine = self._current.engine
        batches = list(self._micro_batches(rows))
        for place, (numbers, micro) in enumerate(batches, start=1):
            logps_N = engine.score(micro)
            loss = share_of_loss(numbers, logps_N, micro) if numbers else zero_of(logps_N)
            engine.backward(loss, last=place == len(batches))

    def _finish_step(self, step: int, loss: float, metrics: dict[str, float], rows: Sequence[Row], started: float) -> dict[str, float]:
        """Refuse a broken loss before it reaches the weights, then update them."""
        engine = self._current.engine
        if not math.isfinite(loss):
            raise RunFailed(f"the loss of step {step} is {loss}; lower the learning rate, or look at the pairs of this step")
        learning_rate = engine.learning_rate
        norm = engine.step()
        seconds = self._clock() - started
        tokens = sum(row.length for row in rows)
        return {
            "loss": loss,
            **metrics,
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "perf/tokens": float(tokens),
            "perf/tokens_per_s": tokens / seconds,
            "time/step": seconds,
        }

    def _reference_logps(self, batch: Sequence[PreferencePair], rows: Sequence[Row]) -> Tensor:
        """``[P, 2]`` log-probs under the frozen reference, computed once a pair; all ranks hold the same cache, so they agree what to do."""
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
        """What a saved state must match to be loadable."""
        return {
            "stage": self._current.stage.stage.value,
            "num_ranks": self._spec.world_size,
            "zero_stage": self._spec.learner.zero_stage,
            "optimizer": self._spec.learner.optimizer,
            "dtype": self._spec.model.dtype,
            "lora": self._spec.model.lora.enabled,
        }

    def _random_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._device)
        return state


def _preference_loss(
    plan: LossPlan, chosen_m: Tensor, rejected_m: Tensor, ref_m2: Tensor, counts_m: Tensor, share: tuple[float, float]
) -> tuple[Tensor, dict[str, float]]:
    """Preference loss plus ``nll_coef`` times NLL per chosen token; ``share`` = (of the pairs, of the chosen tokens) in the whole batch."""
    preference, metrics = LOSSES[plan.loss_type](chosen_m, rejected_m, ref_m2[:, 0], ref_m2[:, 1], plan.beta, plan.label_smoothing)
    likelihood, more = nll(chosen_m, counts_m, torch.ones_like(counts_m))
    loss = preference * share[0]
    if plan.nll_coef:
        loss = loss + plan.nll_coef * likelihood * share[1]
    return loss, metrics | more


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
