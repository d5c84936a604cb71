"""The worker's half of weight publication: runs inside vLLM's own worker process and takes a version into the live model.

vLLM imports this file there (``worker_extension_cls``), which registers our transport "shm" beside vLLM's own "nccl" and "ipc".
``vllm_engine`` drives it: read -> pause -> start, update, finish -> resume. Also holds the requests of all three transports, so that
learner and engine agree on them, ends the engine's processes when the process that owns them is gone, and on processors gives vLLM's sampler a filter
that need not sort (``nucleus``) and its layers faster kernels (``norm_kernels``), all before vLLM builds the model. Proving is not done here.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from vllm import ir
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform
from vllm.v1.sample.ops import topk_topp_sampler

from actors import norm_kernels
from actors.nucleus import without_sorting
from sgpo_dist import vector_math
from sgpo_dist.weights.checksum import checksum_safetensors

SHM = "shm"
EXTENSION = "actors.weight_receiver.ReceiverExtension"
OWNER_VARIABLE = "SGPO_ENGINE_OWNER_PID"
_OWNER_POLL_S = 5.0
_CLASS_NAMES: Mapping[type, str] = {torch.Tensor: "Tensor", torch.nn.Parameter: "Parameter", torch.UntypedStorage: "UntypedStorage"}


# ---- what is asked of each transport ---------------------------------------------------------------------------------------------


def transfer_config(transport: str) -> WeightTransferConfig:
    """vLLM's configuration for one of our transports: "shm" (ours), "nccl" or "ipc" (vLLM's own). Raises ValueError for another."""
    if transport not in (SHM, "nccl", "ipc"):
        raise ValueError(f"weights.transport '{transport}' is none of shm, nccl, ipc")
    return WeightTransferConfig(backend=transport)


def shm_init_info(repack_tied_head: bool = True) -> dict[str, Any]:
    """Hand-shake of "shm". ``repack_tied_head=False`` exists for the test that shows what goes wrong without it."""
    return {"repack_tied_head": repack_tied_head}


def shm_update_info(uri: str) -> dict[str, Any]:
    """One version of "shm": a safetensors file that both processes can open, Hugging Face names."""
    return {"uri": uri}


def nccl_init_info(master_address: str, master_port: int, rank_offset: int, world_size: int, packed: bool = True) -> dict[str, Any]:
    """Hand-shake of "nccl": the learner's sender is rank 0, this engine's workers start at ``rank_offset``, ``world_size`` counts all."""
    if not 1 <= rank_offset < world_size:
        raise ValueError(f"nccl rank_offset {rank_offset} must lie in 1..{world_size - 1}: rank 0 is the learner's sender")
    return {
        "master_address": master_address,
        "master_port": master_port,
        "rank_offset": rank_offset,
        "world_size": world_size,
        "packed": packed,
    }


def nccl_update_info(tensors: Sequence[tuple[str, str, Sequence[int]]]) -> dict[str, Any]:
    """One version of "nccl": (name, torch dtype name such as "bfloat16", full shape) in the order in which they will be broadcast."""
    return {
        "names": [name for name, _, _ in tensors],
        "dtype_names": [dtype for _, dtype, _ in tensors],
        "shapes": [list(shape) for _, _, shape in tensors],
    }


def ipc_init_info(packed: bool = False) -> dict[str, Any]:
    """Hand-shake of "ipc": nothing to meet over, only whether one packed buffer travels instead of one handle a tensor."""
    return {"packed": packed}


def plain_update_info(update_info: Mapping[str, Any]) -> dict[str, Any]:
    """A version's update info with CUDA handles as plain values, so that it reaches the worker without vLLM's insecure pickling.

    A handle is the arguments of torch's ``rebuild_cuda_tensor``: types and dtypes among numbers and bytes. They go by name.
    """
    plain = dict(update_info)
    if plain.get("ipc_handles") is not None:
        plain["ipc_handles"] = _each_handle(plain["ipc_handles"], _named)
    return plain


def revived_update_info(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``plain_update_info``, in the worker. Only names of dtypes and of the three classes that torch uses there are known."""
    info = dict(plain)
    if info.get("ipc_handles") is not None:
        info["ipc_handles"] = _each_handle(info["ipc_handles"], _unnamed)
    return info


def _each_handle(handles: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(handles, Mapping):
        return {uuid: tuple(change(value) for value in arguments) for uuid, arguments in handles.items()}
    return [_each_handle(handle, change) for handle in handles]


def _named(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    return {"class": _CLASS_NAMES[value]} if isinstance(value, type) else tuple(value) if isinstance(value, torch.Size) else value


def _unnamed(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if "class" in value:
        return {name: kind for kind, name in _CLASS_NAMES.items()}[value["class"]]
    dtype = getattr(torch, value["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no tensor type is called '{value['dtype']}'")
    return dtype


# ---- our transport ---------------------------------------------------------------------------------------------------------------


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """vLLM builds this from ``shm_init_info``."""

    repack_tied_head: bool = True


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """vLLM builds this from ``shm_update_info``."""

    uri: str


class ShmReceiver(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """Takes a version from a safetensors file in shared memory, layer by layer, whatever vLLM made of the old weights."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo
    supports_draft_weight_update = False
    repack_tied_head = True

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        """Nothing to meet over; remembers the switches."""
        self.repack_tied_head = init_info.repack_tied_head

    def start_weight_update(self) -> None:
        """Prepare every layer to take its weights anew."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        """Load the file. The tensors are views of a mapping that lives as long as they do: a layer may keep them until it is complete."""
        self.model.load_weights(named_tensors(update_info.uri))

    def finish_weight_update(self) -> None:
        """Finish every layer; then pack a tied head again, which got no weights of its own and would keep the old ones packed."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self.repack_tied_head:
            for head in packed_tied_heads(self.model):
                head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        """Holds nothing between versions."""


def named_tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a safetensors file in name order, which keeps the tensors of a layer together."""
    with safe_open(path, framework="pt", device="cpu") as file:
        for name in sorted(file.keys()):
            yield name, file.get_tensor(name)


def packed_tied_heads(model: torch.nn.Module) -> list[ParallelLMHead]:
    """Heads that share the embedding's tensor but compute with a copy packed for the CPU (performance notes A2b). None on a GPU."""
    heads = [module for module in model.modules() if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear")]
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return [head for head in heads if owners[id(head.weight)] > 1]


# ---- what the engine may ask of its worker by name -------------------------------------------------------------------------------


class ReceiverExtension:
    """Mixed into vLLM's worker class: each method can be called through ``collective_rpc`` by its name, with plain values only."""

    _sgpo_reading: Future[str]

    def sgpo_start_digest(self, uri: str) -> None:
        """Begin to read and digest the file in a thread of this worker, while the model still generates."""
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weight-digest")
        self._sgpo_reading = pool.submit(checksum_safetensors, uri)
        pool.shutdown(wait=False)

    def sgpo_digest(self, timeout_s: float) -> str:
        """The digest of what ``sgpo_start_digest`` read; waits at most ``timeout_s``."""
        return self._sgpo_reading.result(timeout_s)

    def sgpo_update(self, plain: dict[str, Any]) -> None:
        """vLLM's ``update_weights`` for an update info that travelled as plain values."""
        self.update_weights(revived_update_info(plain))  # type: ignore[attr-defined]

    def sgpo_pids(self) -> list[int]:
        """This worker's process and its parent (the engine core, where that is another process), for logs and tests."""
        return [os.getpid(), os.getppid()]


# ---- no orphans --------------------------------------------------------------------------------------------------------------------


def follow_owner(owner_pid: int) -> None:
    """Start a thread that kills this process, and the engine core that is its parent, once the process ``owner_pid`` is gone.

    vLLM's workers follow their engine core, but the core does not follow the process that started it: killed with SIGKILL, that
    would leave a core and its memory behind.
    """
    parent = os.getppid()
    victims = [os.getpid()] if parent in (owner_pid, 1) else [parent, os.getpid()]
    threading.Thread(target=_await_death, args=(owner_pid, victims), daemon=True, name="follow-owner").start()


def _await_death(owner_pid: int, victims: Sequence[int]) -> None:
    try:
        handle = os.pidfd_open(owner_pid)
    except ProcessLookupError:
        pass
    else:
        while not select.select([handle], [], [], _OWNER_POLL_S)[0]:
            continue
    for pid in victims:
        os.kill(pid, signal.SIGKILL)


def _enter_worker() -> None:
    """Done once, on import: vLLM resolves its extension class by import and offers no later moment in a worker's start."""
    if SHM not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(SHM, ShmReceiver)
        vector_math.settle()
        if current_platform.is_cpu():
            norm_kernels.register(ir.ops)
            topk_topp_sampler.apply_top_k_top_p_pytorch = without_sorting(topk_topp_sampler.apply_top_k_top_p_pytorch)
    owner = int(os.environ.get(OWNER_VARIABLE, "0"))
    if owner and owner != os.getpid():
        follow_owner(owner)


_enter_worker()
