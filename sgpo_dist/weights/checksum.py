"""The name of a version's bytes: one BLAKE3 digest of 128 bits over all tensors in name order.

The learner's sender digests what it writes, a worker's receiver what it reads; equal digests mean equal names, types, shapes and
bytes. Takes buffers, not tensors, so that neither side needs the other's framework here. Says nothing about what a live engine
computes with the bytes: that is what probe log-probs are for.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable

from blake3 import blake3

Buffer = memoryview | bytes | bytearray


class WeightDigest:
    """A digest fed tensor by tensor, strictly in name order.

    ``dtype`` is the safetensors name of the type ("F32", "BF16", ...), ``data`` the row-major little-endian bytes of the tensor.
    """

    def __init__(self) -> None:
        self._hash = blake3()
        self._last: str | None = None

    def update(self, name: str, dtype: str, shape: tuple[int, ...], data: Buffer) -> None:
        """Add one tensor. Raises ValueError when ``name`` does not follow the previous one: the order is part of the contract."""
        if self._last is not None and name <= self._last:
            raise ValueError(f"tensor '{name}' came after '{self._last}': a weight digest needs names in ascending order")
        self._last = name
        self._hash.update(name.encode())
        self._hash.update(dtype.encode())
        self._hash.update(repr(tuple(int(size) for size in shape)).encode())
        self._hash.update(data)

    def hexdigest(self) -> str:
        """32 hex digits of everything so far."""
        return self._hash.hexdigest(length=16)


def checksum_tensors(tensors: Iterable[tuple[str, str, tuple[int, ...], Buffer]]) -> str:
    """Digest of ``(name, dtype, shape, bytes)`` rows in ascending name order."""
    digest = WeightDigest()
    for name, dtype, shape, data in tensors:
        digest.update(name, dtype, shape, data)
    return digest.hexdigest()


def checksum_safetensors(path: str) -> str:
    """Digest of a safetensors file, read through a memory map. Raises OSError or ValueError when it is not one."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
        size = int.from_bytes(view[:8], "little")
        header = json.loads(bytes(view[8 : 8 + size]))
        header.pop("__metadata__", None)
        digest = WeightDigest()
        for name in sorted(header):
            entry = header[name]
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            with view[begin:end] as data:
                digest.update(name, entry["dtype"], tuple(entry["shape"]), data)
        return digest.hexdigest()
