"""DeepSpeed behind one door: the only file that imports it. Called by the learner, one engine a rank and stage.

Joins the ranks, builds DeepSpeed's configuration, accumulates gradients over micro-batches so that their sum over micro-batches and
ranks is that of the whole batch, steps, saves, loads, and gives out full weights under any ZeRO stage. Leaves out: losses, batches,
where weights go.

Two traps are closed here. On CPU DeepSpeed compiles an all-reduce for inference at its start, guarded by a lock file that a killed
process leaves behind for ever: training never uses it, so it is marked as not wanted. What must be compiled (CPU Adam) is built in a
cache of its own per version, under a lock that the kernel releases when its holder dies. And a load that finds nothing only warns:
here it raises.
"""

from __future__ import annotations

import fcntl
import io
import logging
import math
import os
import shutil
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from learner.batch import MicroBatch
from learner.model import CompletionScorer, layer_groups, named_weights
from learner.schedule import learning_rate_factor
from sgpo_dist.errors import CheckpointError, ConfigError, EnvironmentProblem, RunFailed
from sgpo_dist.roles import OptimiserPlan

STATE_TAG: Final = "state"
UNWANTED_OP: Final = "deepspeed_shm_comm"
EXECUTABLES: Final = ("zero_to_fp32.py", "zero_to_torch.py")
BUCKET_ELEMENTS: Final = 2**25
"""Gradients that DeepSpeed gathers before it reduces them. Its default, half a billion, is a copy of all of them: larger buckets were no faster."""
BUILD_DEADLINE_S: Final = 600.0
TORCH_ARCHIVE: Final = "inline_container.cc"
"""Names the place in torch that every refused write of ``torch.save`` comes from."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What decides how DeepSpeed runs. ``bf16`` keeps bfloat16 weights with float32 master weights; ``overrides`` win over all we set."""

    bf16: bool
    zero_stage: int
    optimizer: str
    cache_dir: Path
    overrides: Mapping[str, Any]


def join(rank: int, world_size: int, host: str, port: int, backend: str, timeout_s: float) -> None:
    """Meet the other ranks at ``host:port`` (rank 0 listens). Every later collective fails after ``timeout_s`` instead of hanging.

    Raises EnvironmentProblem when the ranks do not meet in that time or the port is taken.
    """
    _be_quiet()
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed insists on it; every rank is an actor that sees only its own device
    deadline = timedelta(seconds=timeout_s)
    try:
        store = _meeting_place(rank, world_size, host, port, deadline)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=deadline)
    except (RuntimeError, ValueError) as problem:
        raise EnvironmentProblem(f"learner rank {rank} could not join its group at {host}:{port}: {str(problem).splitlines()[0]}") from problem
    # DeepSpeed keeps this table editable on purpose; without the entry it would compile the op and may wait for ever on a stale lock.
    deepspeed.ops.__compatible_ops__[UNWANTED_OP] = False
    deepspeed.comm.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=deadline)


def _meeting_place(rank: int, world_size: int, host: str, port: int, deadline: timedelta) -> torch.distributed.Store:
    """Where ranks find each other. A rank alone needs no open port; the others' listens on all interfaces, as torch will have it."""
    if world_size == 1:
        return torch.distributed.HashStore()
    return torch.distributed.TCPStore(host, port, world_size, is_master=rank == 0, timeout=deadline)


def leave() -> None:
    """Part from the group; harmless when not in one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class TrainingEngine:
    """One stage's model, optimiser and schedule on this rank. All methods are collectives unless they say otherwise."""

    def __init__(self, scorer: CompletionScorer, plan: OptimiserPlan, settings: EngineSettings) -> None:
        self._scorer = scorer
        self._settings = settings
        self._world_size = torch.distributed.get_world_size()
        optimizer = _build_optimizer(scorer, plan, settings)
        config = build_config(plan, settings, sum(p.numel() for p in scorer.parameters() if p.requires_grad))
        try:
            self._engine, *_ = deepspeed.initialize(
                model=scorer,
                optimizer=optimizer,
                lr_scheduler=LambdaLR(optimizer, lambda done: learning_rate_factor(done, plan)),
                config=config,
                dist_init_required=False,
            )
        except (ValueError, AssertionError, NotImplementedError) as problem:
            raise ConfigError(f"DeepSpeed refuses this learner configuration: {_first_line(problem)}") from problem

    @property
    def scorer(self) -> CompletionScorer:
        """The live module."""
        return self._scorer

    @property
    def shards_weights(self) -> bool:
        """Whether each rank holds only a share of every weight (ZeRO-3)."""
        return self._settings.zero_stage == 3

    @property
    def learning_rate(self) -> float:
        """What the next step will use. Not a collective."""
        return float(self._engine.get_lr()[0])

    def score(self, batch: MicroBatch) -> Tensor:
        """``[N]`` log-probs of the micro-batch's scored tokens (a collective under ZeRO-3)."""
        logps_N: Tensor = self._engine(batch)
        return logps_N

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient of this rank's share of the batch's loss; ``last`` marks the step's final micro-batch.

        DeepSpeed averages over ranks; the factor undoes that, so that shares add up to the batch whatever its split.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._world_size)

    def step(self) -> float:
        """Clip, update, move the schedule on; returns the gradient's norm before clipping.

        Where it is not finite nothing but the schedule moves: weights and optimiser stay as they are, on every rank. DeepSpeed 0.19 sees to
        that itself except in plain float32. Raises RunFailed when a setting of the user's has switched its check off.
        """
        norm = self._plain_gradient_norm()
        if norm is not None and not math.isfinite(norm):
            self._engine.zero_grad()
            self._move_schedule_on()
            return norm
        self._engine.step()
        if not self._engine.was_step_applied():
            self._move_schedule_on()
            return math.inf
        if norm is not None:
            return norm
        norm = float(self._engine.get_global_grad_norm())
        if not 0.0 <= norm < math.inf:
            raise RunFailed(f"a gradient of norm {norm} was applied; take bf16.check_grad_overflow out of learner.deepspeed_config, then resume")
        return norm

    def _move_schedule_on(self) -> None:
        """After a skipped step. torch warns that the optimiser has not stepped yet when it is the first one, which is the point of it."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self._engine.lr_scheduler.step()

    def save(self, directory: Path) -> None:
        """Weights (trained ones only), optimiser and schedule of all ranks under ``directory``."""
        self._engine.save_checkpoint(str(directory), tag=STATE_TAG, save_latest=False, exclude_frozen_parameters=True)
        if torch.distributed.get_rank() == 0:
            for name in EXECUTABLES:
                (directory / STATE_TAG / name).unlink(missing_ok=True)
                (directory / name).unlink(missing_ok=True)

    def load(self, directory: Path) -> None:
        """What ``save`` wrote, by as many ranks and in the same ZeRO stage. It unpickles: the caller has proved the files are its own.

        Raises CheckpointError.
        """
        try:
            path, _ = self._engine.load_checkpoint(str(directory), tag=STATE_TAG, load_module_strict=False)
        except (OSError, RuntimeError, ValueError, KeyError, AssertionError, EOFError) as problem:
            raise CheckpointError(f"learner state in {directory} cannot be read: {_first_line(problem)}") from problem
        if path is None:
            raise CheckpointError(f"{directory} holds no learner state of this configuration; use another checkpoint or start afresh")

    def load_resharded(self, directory: Path, scratch: Path) -> None:
        """What ``save`` wrote, by another number of ranks or in another ZeRO stage. Raises CheckpointError.

        Rank 0 writes it as a universal checkpoint of DeepSpeed's into ``scratch``, which every rank must see and which is gone after a success.
        The other ranks wait for it, at most as long as for any collective (``join``). ``directory`` is only read.
        """
        if self._settings.zero_stage == 0:  # every rank holds all of the optimiser, and the first one's is on disk
            return self.load(directory)
        self._on_first_rank(lambda: _convert(directory / STATE_TAG, scratch / STATE_TAG))
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self._engine.optimizer.param_groups]
        self._engine._config.load_universal_checkpoint = True  # read at a load only, and no load says which of the two it is
        try:
            self.load(scratch)
        finally:
            self._engine._config.load_universal_checkpoint = False
        self._mend_optimizer(groups)
        torch.distributed.barrier()  # all have read it
        self._on_first_rank(lambda: shutil.rmtree(scratch, ignore_errors=True))

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) in name order, gathered one layer at a time; a tensor is valid until the next is asked for."""
        for group in layer_groups(named_weights(self._scorer)):
            with self.gathered([part for weight in group for part in weight.parts]):
                for weight in group:
                    yield weight.name, weight.value()

    def gathered(self, tensors: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """Within: these are whole on every rank (matters under ZeRO-3 only)."""
        if not self.shards_weights:
            return nullcontext()
        context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([t for t in tensors if hasattr(t, "ds_id")])
        return context

    def close(self) -> None:
        """Let go of hooks and buffers, so that a next stage has the memory. Not a collective."""
        self._engine.destroy()

    def _mend_optimizer(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """ZeRO-3's universal load gives all groups the settings of the first one, and one step counter that each of them then moves on."""
        for group, settings in zip(self._engine.optimizer.param_groups, groups, strict=True):
            group.update({key: value for key, value in settings.items() if key != "lr"})
        for state in self._engine.basic_optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()

    def _on_first_rank(self, work: Callable[[], None]) -> None:
        """Rank 0 does it, all ranks learn how it went and none goes on before. Raises CheckpointError on all of them when it failed."""
        problem: list[str | None] = [None]
        if torch.distributed.get_rank() == 0:
            try:
                work()
            except (OSError, RuntimeError, ValueError, KeyError, AssertionError, EOFError) as failure:
                problem = [_first_line(failure)]
        torch.distributed.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise CheckpointError(f"learner state of other ranks cannot be converted: {problem[0]}; set learner.num_ranks as it was")

    def _plain_gradient_norm(self) -> float | None:
        """DeepSpeed does not report a norm for plain float32 training; elsewhere it does."""
        if self._settings.bf16 or self._settings.zero_stage:
            return None
        return float(torch.nn.utils.get_total_norm([p.grad for p in self._scorer.parameters() if p.grad is not None]))


def build_config(plan: OptimiserPlan, settings: EngineSettings, trained_elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Batch sizes are nominal: we mark the accumulation boundary and scale the loss ourselves."""
    bucket = min(BUCKET_ELEMENTS, trained_elements)
    zero: dict[str, Any] = {"stage": settings.zero_stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket, "overlap_comm": False}
    if settings.optimizer == "cpu_adam":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1 << 30,
        "gradient_clipping": plan.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": settings.bf16},
    }
    if settings.bf16 and settings.zero_stage in (1, 2):
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merged(config, settings.overrides)


def _build_optimizer(scorer: CompletionScorer, plan: OptimiserPlan, settings: EngineSettings) -> torch.optim.Optimizer:
    trained = [p for p in scorer.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trained, "weight_decay": plan.weight_decay}]
    if plan.weight_decay:  # norms and biases are not decayed
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": plan.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
    betas = (plan.beta1, plan.beta2)
    if settings.optimizer == "cpu_adam":
        with _build_lock(settings.cache_dir):
            optimizer: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, lr=plan.learning_rate, betas=betas)
            return optimizer
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=plan.learning_rate, betas=betas, fused=True)


def _convert(source: Path, target: Path) -> None:
    """The files of all ranks in ``source`` as a universal checkpoint in ``target``, one file a parameter and kind. Not a collective.

    In this process alone: its own workers would be forks of a process with threads.
    """
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        ds_to_universal.main(
            Namespace(
                input_folder=str(source),
                output_folder=str(target),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )


@contextmanager
def refusals_of_the_disk(directory: Path) -> Iterator[None]:
    """Within: what the disk refuses becomes an EnvironmentProblem.

    torch tells a full disk by a RuntimeError about positions in its archive, which reads like a fault of the learner and is none.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as problem:
        if isinstance(problem, RuntimeError) and TORCH_ARCHIVE not in str(problem):
            raise
        raise EnvironmentProblem(f"the learner's files cannot be written to {directory}: {_first_line(problem)}; check free disk space") from problem


@contextmanager
def _build_lock(cache_dir: Path) -> Iterator[None]:
    """Compile DeepSpeed's ops in our own cache, one process at a time. Waits at most ``BUILD_DEADLINE_S`` for another builder."""
    directory = cache_dir / "torch_extensions" / f"deepspeed-{deepspeed.__version__}-torch-{torch.__version__}"
    directory.mkdir(parents=True, exist_ok=True)
    if shutil.which("g++") is None or shutil.which("ninja") is None:
        raise EnvironmentProblem("learner.optimizer cpu_adam compiles DeepSpeed's CPU Adam: install g++ and ninja, or use adamw")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(directory)
    with (directory / "build.lock").open("w") as holder:
        deadline = time.monotonic() + BUILD_DEADLINE_S
        while not _take(holder.fileno()):
            if time.monotonic() > deadline:
                raise EnvironmentProblem(f"another process has been compiling in {directory} for {BUILD_DEADLINE_S:.0f} s; end it and try again")
            time.sleep(0.2)
        for stale in directory.glob("*/lock"):  # nobody else builds here, so its owner is dead and torch would wait on it for ever
            stale.unlink(missing_ok=True)
        yield


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` wins, section by section."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def _be_quiet() -> None:
    """DeepSpeed's progress goes to a logger of its own; only its warnings are worth a line."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]
