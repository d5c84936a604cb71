"""What changed between two files of weights, losslessly: the two-byte words that differ, and how far apart they lie.

Called by the carrier for workers on other nodes. At the learning rates of preference training an optimiser step is smaller than half a bfloat16's
last place for nearly every weight, so that about one word in a hundred changes (arXiv:2602.03839). Words are compared whatever the tensors' type;
float32 weights change nearly everywhere, and then there is nothing to gain. Leaves out: moving the bytes, proving the result.

A patch is a header, then for each block of words: how many changed, one byte each for the unchanged words before them, and the new words.
A gap of more than 255 is bridged by words that are sent although they are the same.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

MAGIC: Final = b"sgpo-d1\n"
WORD: Final = np.dtype("<u2")
COUNT: Final = np.dtype("<u8")
BLOCK: Final = 1 << 20
"""Words of a block: bounds the memory that encoding takes beside the files."""
FURTHEST: Final = 255


def encode(old: Bytes, new: Bytes) -> Bytes:
    """The patch that makes ``new`` of ``old``. Raises ValueError for files of different or odd sizes."""
    if len(old) != len(new) or len(new) % WORD.itemsize:
        raise ValueError(f"files of {len(old)} and {len(new)} bytes have no difference in words")
    before, after = old.view(WORD), new.view(WORD)
    parts = [np.frombuffer(MAGIC, np.uint8), _number(len(after))]
    for start in range(0, len(after), BLOCK):
        block = after[start : start + BLOCK]
        places = _bridged(np.flatnonzero(before[start : start + BLOCK] != block))
        gaps = np.diff(places, prepend=-1) - 1
        parts += [_number(len(places)), gaps.astype(np.uint8), block[places].view(np.uint8)]
    return np.concatenate(parts)


def apply(target: Bytes, patch: Bytes) -> None:
    """Make the new file of the old one, in place. Raises ValueError, perhaps half way, for a patch that is not whole or not of this file."""
    reader = _Reader(patch)
    if reader.take(len(MAGIC)).tobytes() != MAGIC or WORD.itemsize * reader.count() != len(target):
        raise ValueError("it is for another file")
    words = target.view(WORD)
    for start in range(0, len(words), BLOCK):
        block = words[start : start + BLOCK]
        count = reader.count()
        places = np.cumsum(reader.take(count).astype(np.int64) + 1) - 1
        if count and places[-1] >= len(block):
            raise ValueError("it points past the end of the file")
        block[places] = np.frombuffer(reader.take(count * WORD.itemsize).tobytes(), WORD)
    if reader.left:
        raise ValueError("it is longer than it says")


def _number(value: int) -> Bytes:
    return np.array([value], COUNT).view(np.uint8)


def _bridged(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """The places and those between them that keep every gap at ``FURTHEST`` or below."""
    before = np.concatenate([[-1], places[:-1]]) if len(places) else places
    wanted = (places - before - 1) // (FURTHEST + 1)
    if not wanted.any():
        return places
    firsts = np.cumsum(wanted) - wanted
    number = np.arange(int(wanted.sum())) - np.repeat(firsts, wanted) + 1
    return np.sort(np.concatenate([places, np.repeat(before, wanted) + number * (FURTHEST + 1)]))


class _Reader:
    """Takes a patch from front to back; raises ValueError where it ends too early."""

    def __init__(self, patch: Bytes) -> None:
        self._patch = patch
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._patch) - self._at

    def take(self, size: int) -> Bytes:
        if size > self.left:
            raise ValueError("it ends too early")
        self._at += size
        return self._patch[self._at - size : self._at]

    def count(self) -> int:
        return int.from_bytes(self.take(COUNT.itemsize).tobytes(), "little")
