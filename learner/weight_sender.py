"""The learner's half of weight publication: makes a version ready to be received. Called by the learner's ranks.

On CPU the full weights go into one safetensors file in shared memory (written once, read by every worker of the node); between GPUs
vLLM's own trainer engines ("nccl", "ipc") take them from a ``WeightSource``. vLLM is imported for those two only, and only when one
is built. Leaves out: proving (the probe log-probs are the learner's), receiving.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

import torch
from torch import Tensor

from learner.deepspeed_engine import TrainingEngine
from learner.model import DTYPES, layer_groups, named_weights
from sgpo_dist.errors import ConfigError, EnvironmentProblem, RunFailed
from sgpo_dist.weights.checksum import WeightDigest
from sgpo_dist.weights.files import PREFIX, open_locked, places, remove_left_overs, room_for

TAGS: Final = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """Name, type on the wire and full shape of one tensor; the fields vLLM's trainer engines read."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size on the wire."""
        return prod(self.shape) * int(self.dtype.itemsize)


class WeightSource:
    """The live weights as a re-iterable stream of full tensors in name order; has the shape of vLLM's WeightSource.

    Iterating is a collective under ZeRO-3, so all ranks iterate or none; it yields copies there, because a gathered weight is let go
    of while a transport may still hold it. ``dtype`` None sends each tensor as it is.
    """

    def __init__(self, engine: TrainingEngine, dtype: torch.dtype | None) -> None:
        self._engine = engine
        self._dtype = dtype

    def metadata(self) -> list[TensorMeta]:
        """What iteration will yield, without gathering anything."""
        return [TensorMeta(w.name, self._dtype or w.tensor.dtype, w.shape) for w in named_weights(self._engine.scorer)]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._engine.full_weights():
            yield name, tensor.to(self._dtype or tensor.dtype, copy=self._engine.shards_weights)

    def held_names(self) -> Collection[str] | None:
        """None: every rank yields every name."""
        return None

    def groups(self) -> list[list[str]]:
        """Names by decoder layer, in iteration order."""
        return [[weight.name for weight in group] for group in layer_groups(named_weights(self._engine.scorer))]

    def iter_groups(self) -> Iterator[tuple[list[str], list[Tensor]]]:
        """One ``(names, tensors)`` a decoder layer."""
        stream = iter(self)
        for names in self.groups():
            yield names, [next(stream)[1] for _ in names]


@dataclass(frozen=True, slots=True)
class Sent:
    """A version that is ready: where it lies, and what proves it."""

    uri: str
    checksum: str
    num_bytes: int
    names: tuple[str, ...]


class WeightSender(Protocol):
    """One way to the workers. ``send`` is called on every rank, because iterating the source may be a collective."""

    def send(self, version: int, source: WeightSource) -> Sent:
        """Make ``version`` ready; only rank 0's answer counts."""

    def retire(self, version: int) -> None:
        """Free what a version holds; unknown versions are ignored."""

    def close(self) -> None:
        """Free everything."""


class SharedMemorySender:
    """One safetensors file a version, in shared memory or, where that lacks room, in the temporary directory.

    A file appears under its name only when it is whole. Its writer holds a lock on it, which the kernel drops when the writer dies:
    files nobody holds are left-overs and are removed at the next start.
    """

    def __init__(self, nonce: str, is_writer: bool, directory: Path | None = None) -> None:
        self._nonce = nonce
        self._is_writer = is_writer
        self._places = places() if directory is None else [directory]
        self._files: dict[int, tuple[Path, BinaryIO]] = {}
        if is_writer:
            for place in self._places:
                remove_left_overs(place)

    def send(self, version: int, source: WeightSource) -> Sent:
        """Write the file. Raises EnvironmentProblem when no place has room for it."""
        if not self._is_writer:
            for _ in source:
                pass
            return Sent("", "", 0, ())
        self.retire(version)
        tensors = source.metadata()
        header = _header(tensors)
        size = len(header) + sum(tensor.num_bytes for tensor in tensors)
        path = room_for(size, self._places) / f"{PREFIX}-{self._nonce}-v{version}-{os.getpid()}.safetensors"
        draft = path.with_suffix(".tmp")
        file = open_locked(draft)
        try:
            checksum = _fill(file, header, size, tensors, source)
        except OSError as problem:
            draft.unlink(missing_ok=True)
            file.close()
            raise EnvironmentProblem(f"version {version} does not fit into {path.parent}: {problem.strerror or problem}") from problem
        draft.rename(path)
        self._files[version] = (path, file)
        return Sent(str(path), checksum, size, tuple(tensor.name for tensor in tensors))

    def retire(self, version: int) -> None:
        """Remove the version's file; a worker that has it mapped keeps its bytes until it lets go."""
        path, file = self._files.pop(version, (None, None))
        if path is not None and file is not None:
            path.unlink(missing_ok=True)
            file.close()

    def close(self) -> None:
        """Remove all files."""
        for version in list(self._files):
            self.retire(version)


class DeviceSender:
    """vLLM's own trainer engine ("nccl" or "ipc"): it drives the workers through its client and moves tensors between devices.

    The checksum covers names, types and shapes only: the bytes never pass through the host. The probes prove the rest.
    """

    def __init__(self, trainer_engine: Any) -> None:
        self._trainer_engine = trainer_engine

    def send(self, version: int, source: WeightSource) -> Sent:
        """Send to all workers; returns when they have taken it."""
        self._trainer_engine.source = source
        self._trainer_engine.send_weights()
        tensors = source.metadata()
        digest = WeightDigest()
        for tensor in tensors:
            digest.update(tensor.name, TAGS[tensor.dtype], tensor.shape, b"")
        return Sent("", digest.hexdigest(), sum(tensor.num_bytes for tensor in tensors), tuple(tensor.name for tensor in tensors))

    def retire(self, version: int) -> None:
        """Nothing is kept between versions."""

    def close(self) -> None:
        """Part from the workers."""
        shutdown = getattr(self._trainer_engine, "shutdown", None)
        if callable(shutdown):
            shutdown()


@dataclass(frozen=True, slots=True)
class DeviceLink:
    """How a device transport meets the workers: vLLM's client (or any object with its methods) and the engine's own settings."""

    client: Any
    options: Mapping[str, Any]


def build_sender(transport: str, rank: int, nonce: str, source: WeightSource | None = None, link: DeviceLink | None = None) -> WeightSender:
    """The sender of a transport: shm needs nothing more, nccl and ipc a source and a link. Raises ConfigError for another."""
    if transport == "shm":
        return SharedMemorySender(nonce, is_writer=rank == 0)
    if transport not in ("nccl", "ipc"):
        raise ConfigError(f"weights.transport '{transport}' is none of shm, nccl, ipc")
    if source is None or link is None:
        raise ConfigError(f"weights.transport '{transport}' is not linked to the workers yet; use shm, or link before publishing")
    return DeviceSender(_trainer_engine(transport, rank, source, link))


def wire_dtype(model_dtype: str, engine_dtype: str) -> torch.dtype:
    """The type that weights have on the wire: the narrower of both sides' types, so that widening on arrival loses nothing.

    Raises ConfigError for a type that no engine of ours runs in.
    """
    if engine_dtype not in DTYPES:
        raise ConfigError(f"engine type '{engine_dtype}' is none of {', '.join(DTYPES)}")
    return min(DTYPES[model_dtype], DTYPES[engine_dtype], key=lambda dtype: dtype.itemsize)


def _trainer_engine(transport: str, rank: int, source: WeightSource, link: DeviceLink) -> Any:
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    if transport == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo as InitInfo
    else:
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo as InitInfo
    try:
        return WeightTransferTrainerFactory.trainer_init(InitInfo(rank=rank, **link.options), client=link.client, source=source)
    except (RuntimeError, TypeError, ValueError) as problem:
        raise EnvironmentProblem(f"weights.transport '{transport}' cannot be set up: {str(problem).splitlines()[0]} Use shm on CPU.") from problem


def _header(tensors: Sequence[TensorMeta]) -> bytes:
    """The safetensors header: its length in eight bytes, then JSON padded so that the data is aligned."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        entries[tensor.name] = {"dtype": TAGS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def _fill(file: BinaryIO, header: bytes, size: int, tensors: Sequence[TensorMeta], source: Iterable[tuple[str, Tensor]]) -> str:
    """Copy the stream into the file through a mapping, digesting as it goes; returns the checksum.

    The room is reserved first: writing to a mapping that shared memory cannot back would kill the process.
    """
    os.posix_fallocate(file.fileno(), 0, size)
    mapped = mmap.mmap(file.fileno(), size)
    mapped[: len(header)] = header
    digest = WeightDigest()
    offset = len(header)
    for meta, (name, tensor) in zip(tensors, source, strict=True):
        count = prod(meta.shape)
        if name != meta.name or tuple(tensor.shape) != meta.shape:
            raise RunFailed(f"weights changed while they were sent: {name} {tuple(tensor.shape)} in place of {meta.name} {meta.shape}")
        if count:
            torch.frombuffer(mapped, dtype=meta.dtype, count=count, offset=offset).copy_(tensor.reshape(-1))
        with memoryview(mapped) as whole, whole[offset : offset + meta.num_bytes] as data:
            digest.update(name, TAGS[meta.dtype], meta.shape, data)
        offset += meta.num_bytes
    return digest.hexdigest()
