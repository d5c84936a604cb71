"""The engine contract on vLLM: token ids in, token ids out, and a version taken in flight. The only file that imports vLLM to generate.

A rollout worker makes one ``VllmEngine`` and owns it. vLLM is imported only in ``start``, after ``engine_environment`` has been put into
the process's environment (the fleet does so when it creates the actor), because vLLM reads it on import and its child processes inherit
it. Knows nothing of prompts, pairs, roles or Ray.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.draft_pointer import Frame, speculation_arguments
from sgpo_dist.errors import EnvironmentProblem, WeightSyncError, WorkerFault
from sgpo_dist.records import Completion, FinishReason
from sgpo_dist.roles import GenerateRequest, Sampling
from sgpo_dist.turns import taken
from sgpo_dist.weights.checksum import checksum_tensors
from sgpo_dist.weights.version import ProbeRow, WeightBundle, WeightProof

ROLE = "engine"
OWNER_VARIABLE = "SGPO_ENGINE_OWNER_PID"
_DIGEST_TIMEOUT_S = 120.0
_TURN_POLL_S = 0.02
_LONGEST_TURN_S = 60.0  # then requests go on beside the learner: a step must not cost them their deadlines
_TOKENS_BETWEEN_SIGNS = 16  # a running request shows that it lives this often, and costs nothing in between
_HUGE_PAGES = "glibc.malloc.hugetlb"
_GIB = 1 << 30
STEP_TOKENS = {"cpu": 24.0, "cuda": 256.0}
"""A decode step's fixed time by the time of one more token in it: 58 to 64 ms by 1.9 to 2.7 ms in float32 on two cores (docs/log.md, 2026-11-30),
mostly weights on their way from memory; on a GPU an assumption."""
_SAFETENSORS_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Everything an engine needs to know, as plain values.

    ``transport`` is shm, nccl or ipc. ``cpu_cores`` are the cores of a CPU engine (None: all this process may use). ``kv_cache_gib`` bounds
    a CPU engine's KV cache, ``gpu_memory_utilization`` a GPU engine's memory. ``probes`` are scored after each received version.
    ``engine_kwargs`` go to vLLM unchanged and win over everything here. With requests in flight and no token for ``stuck_s`` the engine
    counts as hung. ``stop_token_ids`` end an answer beside the model's own end token (a chat template may close turns
    with another one). Within rewrites, whose drafts stand in ``draft_frame``, at most ``num_speculative_tokens`` are proposed at a time
    (actors/draft_pointer.py), as many as pay when ``speculation_busy`` requests run (0: for those that do). With ``turns``, a run's id, requests
    stand still while the learner of that run computes on this machine (sgpo_dist/turns.py). ``repack_tied_head`` is for one regression test only.
    """

    model_dir: str
    dtype: str = "float32"
    max_model_len: int = 1024
    tensor_parallel_size: int = 1
    kv_cache_gib: float = 1.0
    gpu_memory_utilization: float = 0.85
    transport: str = "shm"
    cpu_cores: tuple[int, ...] | None = None
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)
    probes: tuple[ProbeRow, ...] = ()
    device: str = "cpu"
    seed: int = 0
    log_level: str = "INFO"
    max_num_seqs: int = 128
    worker_id: str = "engine"
    stuck_s: float = 300.0
    stop_token_ids: tuple[int, ...] = ()
    num_speculative_tokens: int = 0
    draft_frame: Frame | None = None
    speculation_busy: int = 0
    turns: str = ""
    repack_tied_head: bool = True


def engine_environment(spec: EngineSpec) -> dict[str, str]:
    """Variables that must be in the process's environment before vLLM is imported in it; its child processes inherit them."""
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": spec.log_level,
        "VLLM_LOGGING_COLOR": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if os.path.isdir(spec.model_dir):
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if spec.device == "cpu":
        environment |= _cpu_environment(spec.cpu_cores)
    return environment


def _cpu_environment(cores: tuple[int, ...] | None) -> dict[str, str]:
    """Bind the engine to ``cores``. Without this vLLM keeps one core back for its scheduler, which is half of a two-core machine."""
    bound = cores if cores is not None else tuple(sorted(os.sched_getaffinity(0)))
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _HUGE_PAGES not in tunables:
        tunables = f"{tunables}:{_HUGE_PAGES}=1".lstrip(":")
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, bound)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "OMP_NUM_THREADS": str(len(bound)),
        # At each of a step's hundreds of barriers a thread that sleeps has to be woken. They spin for about 0.2 ms first, and no longer: others
        # share these cores.
        "GOMP_SPINCOUNT": "3000",
        # vLLM compiles a few helpers even when eager: seconds, a compiler and a shared cache, for nothing on a CPU.
        "TORCHDYNAMO_DISABLE": "1",
        # A decode step reads all weights: in small pages up to a third slower, by where they lie. Nothing happens where the kernel forbids it.
        "GLIBC_TUNABLES": tunables,
    }


class VllmEngine:
    """``sgpo_dist.roles.Engine`` on vLLM's AsyncLLM."""

    def __init__(self, spec: EngineSpec, clock: Callable[[], float] = time.monotonic) -> None:
        self._spec = spec
        self._clock = clock
        self._llm: Any = None
        self._version = -1
        self._receiving = asyncio.Lock()
        self._probe_count = 0
        self._running = 0
        self._last_token = clock()
        self._broken = ""
        self._digest = ""
        self._paused_at = 0.0
        self._stall_s = 0.0
        self._turns: asyncio.Task[None] | None = None
        self._gives_way = False

    @property
    def version(self) -> int:
        """The version that new tokens are sampled from; -1 before the first proved version."""
        return self._version

    async def start(self) -> None:
        """Load the model in child processes; 20-60 s on a CPU. Raises EnvironmentProblem with vLLM's reason when it cannot.

        The caller's deadline bounds it: the load itself runs in a thread, so that the actor answers meanwhile.
        """
        os.environ[OWNER_VARIABLE] = str(os.getpid())
        try:
            self._llm = await asyncio.to_thread(_load, self._spec)
        except (RuntimeError, ValueError, OSError) as problem:
            raise EnvironmentProblem(f"vLLM did not start on {self._spec.model_dir}: {_first_line(problem)}") from None
        if self._spec.transport == "shm":
            from actors.weight_receiver import shm_init_info

            await self.init_weight_transfer_engine(shm_init_info(self._spec.repack_tied_head))
        if self._spec.turns:
            self._turns = asyncio.create_task(self._take_turns())

    async def generate(self, request: GenerateRequest) -> Completion:
        """One completion; its version is the one that was current when it began, even if a newer one arrived before its end.

        The caller's deadline bounds it; cancelling aborts the request. Raises WorkerFault when the engine is dead.
        """
        from vllm import SamplingParams

        params = SamplingParams(**sampling_arguments(request.sampling, request.seed, self._spec.stop_token_ids))
        version = self._version
        output = await self._run(request.request_id, request.prompt_ids, params)
        answer = output.outputs[0]
        return Completion(text=answer.text, token_ids=tuple(answer.token_ids), finish_reason=finish_reason(answer.finish_reason), version=version)

    async def logps(self, rows: Sequence[ProbeRow]) -> tuple[tuple[float, ...], ...]:
        """Per-token log-probs (nats, temperature 1) of each row's completion under the live weights; the prefix cache is not read."""
        return tuple(await asyncio.gather(*(self._row_logps(row) for row in rows)))

    async def _row_logps(self, row: ProbeRow) -> tuple[float, ...]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False, skip_reading_prefix_cache=True)
        self._probe_count += 1
        output = await self._run(f"probe-{self._probe_count}", row.prompt_ids + row.completion_ids, params)
        scored = output.prompt_logprobs[len(row.prompt_ids) :]
        return tuple(position[token].logprob for position, token in zip(scored, row.completion_ids, strict=True))

    async def _run(self, request_id: str, prompt_ids: Sequence[int], params: Any) -> Any:
        """The final output of one request."""
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        self._refuse_if_broken()
        if not self._running:
            self._last_token = self._clock()
        self._running += 1
        output = None
        try:
            async for newest in self._llm.generate(tokens_input(list(prompt_ids)), params, request_id):
                output, self._last_token = newest, self._clock()
        except (EngineDeadError, EngineGenerateError) as problem:
            raise WorkerFault(ROLE, f"vLLM's engine process died: {_first_line(problem)}") from None
        finally:
            self._running -= 1
        if output is None:
            raise WorkerFault(ROLE, f"request {request_id} ended without an answer")
        return output

    # ---- weights ----------------------------------------------------------------------------------------------------------------

    async def receive(self, bundle: WeightBundle) -> WeightProof:
        """Take a version in flight and prove it. Requests that run keep running on the new weights, with their cache computed anew.

        A shared-memory version is read here; a device's was brought by the learner's sender through the four methods below before this is
        called. The version counts only after the probes were scored. Raises WeightSyncError for other bytes, WorkerFault for a dead
        engine; after either the engine refuses everything, because its weights may be half of each. The caller's deadline bounds it.
        """
        async with self._receiving:
            began = self._clock()
            if bundle.transport == "shm":
                await self._whole(self._read(bundle))
            if self._digest != bundle.checksum:
                self._broken = f"it holds other weights than were published as version {bundle.version}"
                raise WeightSyncError(f"{self._spec.worker_id} read other bytes for version {bundle.version} than were published")
            probe_logps = await self.logps(self._spec.probes)
            self._version = bundle.version
            total_s = self._clock() - began
            return WeightProof(self._spec.worker_id, bundle.version, self._digest, probe_logps, self._stall_s, total_s)

    async def _read(self, bundle: WeightBundle) -> None:
        """The learner's part of "shm" played here. The file is digested while tokens still flow; other bytes are never resumed on."""
        from actors.weight_receiver import shm_update_info

        await self._llm.collective_rpc("sgpo_start_digest", args=(bundle.uri,))
        await self.start_weight_update()
        await self.update_weights(shm_update_info(bundle.uri))
        self._digest = _agreed(await self._llm.collective_rpc("sgpo_digest", args=(_DIGEST_TIMEOUT_S,)))
        if self._digest == bundle.checksum:
            await self.finish_weight_update()

    async def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        """First of the four steps that vLLM's trainer engines drive: meet the sender."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(dict(init_info)))

    async def start_weight_update(self) -> None:
        """Second step: freeze requests where they are, forget the prefix cache, prepare the layers."""
        self._refuse_if_broken()
        self._paused_at = self._clock()
        self._digest = ""
        await self._whole(self._llm.pause_generation(mode="keep", clear_cache=True))
        await self._whole(self._llm.start_weight_update())

    async def update_weights(self, update_info: Mapping[str, Any]) -> None:
        """Third step, as often as there are chunks: take tensors. A device's are digested by name, type and shape only."""
        from actors.weight_receiver import plain_update_info

        await self._whole(self._llm.collective_rpc("sgpo_update", args=(plain_update_info(update_info),)))
        if "dtype_names" in update_info:
            self._digest = metadata_digest(update_info)

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Last step: finish the layers and let the frozen requests go on."""
        await self._whole(self._llm.finish_weight_update(weight_version))
        await self._whole(self._llm.resume_generation())
        self._stall_s = self._clock() - self._paused_at

    async def _whole(self, step: Awaitable[Any]) -> None:
        """One step of an update; if it fails, or is given up, the weights may be half of each and nothing is generated any more."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await step
        except EngineDeadError as problem:
            raise WorkerFault(ROLE, f"vLLM's engine process died: {_first_line(problem)}") from None
        except BaseException as problem:
            self._broken = f"a version was not taken whole: {_first_line(problem)}"
            raise

    # ---- turns --------------------------------------------------------------------------------------------------------------------

    async def _take_turns(self) -> None:
        """Requests stand still while the learner computes on the same cores. A version that arrives meanwhile is taken at once all the same."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            while True:
                await asyncio.sleep(_TURN_POLL_S)
                if self._running and taken(self._spec.turns):
                    await self._give_way()
        except EngineDeadError:
            return  # ``check`` says so
        except Exception as problem:  # noqa: BLE001 paused or not: nobody knows, so that the worker is rebuilt
            self._broken = f"taking turns with the learner failed: {_first_line(problem)}"

    async def _give_way(self) -> None:
        """One turn of the learner."""
        self._gives_way, began = True, self._clock()
        async with self._receiving:
            await self._llm.pause_generation(mode="keep", clear_cache=False)
        while taken(self._spec.turns) and self._clock() - began < _LONGEST_TURN_S:
            await asyncio.sleep(_TURN_POLL_S)
        async with self._receiving:
            if not self._broken:  # never go on with half a version
                await self._llm.resume_generation()
        self._gives_way, self._last_token = False, self._clock()
        while taken(self._spec.turns):
            await asyncio.sleep(_TURN_POLL_S)

    # ---- life ---------------------------------------------------------------------------------------------------------------------

    async def check(self) -> None:
        """Returns when the engine core answers. Raises WorkerFault when it is dead, broken, or silent for ``stuck_s`` with requests."""
        from vllm.v1.engine.exceptions import EngineDeadError

        self._refuse_if_broken()
        silent_s = self._clock() - self._last_token
        if self._running and silent_s > self._spec.stuck_s and not self._receiving.locked() and not self._gives_way:
            raise WorkerFault(ROLE, f"{self._running} requests in flight and no token for {silent_s:.0f} s")
        if self._llm.errored:
            raise WorkerFault(ROLE, "vLLM's engine process died")
        try:
            await self._llm.is_paused()
        except EngineDeadError as problem:
            raise WorkerFault(ROLE, f"vLLM's engine process died: {_first_line(problem)}") from None

    async def pids(self) -> list[int]:
        """Process ids of the engine's children, for supervision and tests."""
        return sorted({pid for row in await self._llm.collective_rpc("sgpo_pids") for pid in row} - {os.getpid()})

    async def stop(self) -> None:
        """End the engine and its child processes; safe to call twice. Waits at most 20 s for them."""
        llm, self._llm = self._llm, None
        self._broken = "stopped"
        if self._turns is not None:
            self._turns.cancel()
        if llm is None:
            return
        if llm.output_handler is not None:
            llm.output_handler.cancel()  # else it reports the end of the engine as a crash
        await asyncio.to_thread(llm.shutdown, 20.0)

    def _refuse_if_broken(self) -> None:
        if self._broken or self._llm is None:
            raise WorkerFault(ROLE, self._broken or "not started")


def sampling_arguments(sampling: Sampling, seed: int, stop_token_ids: Sequence[int] = ()) -> dict[str, Any]:
    """vLLM's names for how one request samples; the end token belongs to the ids, special tokens do not belong to the text."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_new_tokens,
        "seed": seed,
        "stop_token_ids": list(stop_token_ids),
        "skip_special_tokens": True,
    }


def finish_reason(name: str | None) -> FinishReason:
    """Ours for vLLM's; anything but a stop or the token limit counts as aborted."""
    return {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}.get(name or "", FinishReason.ABORT)


def engine_arguments(spec: EngineSpec) -> dict[str, Any]:
    """Arguments of vLLM's AsyncEngineArgs, the weight transfer configuration excepted."""
    arguments = {
        "model": spec.model_dir,
        "dtype": spec.dtype,
        "max_model_len": spec.max_model_len,
        "tensor_parallel_size": spec.tensor_parallel_size,
        "max_num_seqs": spec.max_num_seqs,
        "seed": spec.seed,
        "enable_prefix_caching": True,
        "stream_interval": _TOKENS_BETWEEN_SIGNS,
        "disable_log_stats": True,
        "enable_log_requests": False,
    }
    arguments |= _cpu_arguments(spec) if spec.device == "cpu" else {"gpu_memory_utilization": spec.gpu_memory_utilization}
    if spec.num_speculative_tokens and spec.draft_frame is not None:
        arguments |= speculation_arguments(spec.draft_frame, spec.num_speculative_tokens, STEP_TOKENS[spec.device], spec.speculation_busy)
    return arguments | dict(spec.engine_kwargs)


def _cpu_arguments(spec: EngineSpec) -> dict[str, Any]:
    """Eager, because compiling costs minutes at start. Blocks of 32 tokens, because only whole ones are found in the prefix cache again and vLLM's
    128 are longer than most prompts of a run on a laptop. Prefills whole: cut into chunks, a seeded request kills vLLM 0.32's CPU worker
    ("CPU Generator does not use offset"), and would draw other numbers in a crowd than alone."""
    from actors.norm_kernels import PRIORITY

    return {
        "enforce_eager": True,
        "block_size": 32,
        "kv_cache_memory_bytes": int(spec.kv_cache_gib * _GIB),
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(2048, spec.max_model_len),
        "ir_op_priority": dict(PRIORITY),
    }


def _load(spec: EngineSpec) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from actors.weight_receiver import EXTENSION, transfer_config

    arguments = {"worker_extension_cls": EXTENSION, "weight_transfer_config": transfer_config(spec.transport)} | engine_arguments(spec)
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


def metadata_digest(update_info: Mapping[str, Any]) -> str:
    """The digest of names, types and shapes, in name order: what can be said of tensors whose bytes never pass through the host."""
    rows = sorted(zip(update_info["names"], update_info["dtype_names"], update_info["shapes"], strict=True))
    return checksum_tensors((name, _SAFETENSORS_TYPES.get(dtype, dtype), tuple(shape), b"") for name, dtype, shape in rows)


def _agreed(digests: Sequence[str]) -> str:
    """The digest that all workers of the engine read, or a list of them when they differ."""
    return digests[0] if len(set(digests)) == 1 else ",".join(digests)


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]
