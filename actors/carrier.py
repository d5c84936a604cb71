"""Weight versions for workers on other nodes than the learner's: the whole file once, from then on what changed.

The fleet asks the ``Carrier`` for a version's payload, which a small task makes beside the file and Ray moves straight to the worker's node; the
worker's process keeps a ``LocalCopy``, brings it up to date and lets its engine read that. The version's checksum and probes prove the result as they
do anywhere. Nodes need no common memory or disk for this. Leaves out: device transports, which reach other nodes themselves.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sgpo_dist.errors import WeightSyncError
from sgpo_dist.weights import delta
from sgpo_dist.weights.files import PREFIX, open_locked, places, remove_left_overs, room_for
from sgpo_dist.weights.version import WeightBundle

WORTH_IT: Final = 0.5
"""A patch of more than this share of the file is not sent: the file is."""


@dataclass(frozen=True, slots=True)
class Payload:
    """``data`` (uint8) is a whole file, or a patch on the file that ``base`` named."""

    data: delta.Bytes
    base: str = ""


class Carrier:
    """Makes payloads. Workers that ask for the same one share it, so that Ray moves it once to each node."""

    def __init__(self) -> None:
        self._newest: tuple[tuple[str, str], Any] | None = None

    def payload(self, bundle: WeightBundle, held: str) -> Any:
        """A Ray reference to what makes ``bundle`` of the version that a worker took from ``held`` ("" for none)."""
        wanted = (bundle.uri, held)
        if self._newest is None or self._newest[0] != wanted:
            beside = NodeAffinitySchedulingStrategy(bundle.node_id, soft=False)
            self._newest = (wanted, _READ.options(scheduling_strategy=beside).remote(*wanted))
        return self._newest[1]

    def forget(self) -> None:
        """Make the payload anew for whoever asks next: it may be what failed."""
        self._newest = None


def read_payload(uri: str, held: str) -> Payload:
    """The patch from the older file, where that is still there and the patch is worth it; else the whole file. Runs on the files' node."""
    new = np.memmap(uri, np.uint8, "r")
    with suppress(OSError, ValueError):  # the older one is gone, or is another model's
        patch = delta.encode(np.memmap(held, np.uint8, "r"), new)
        if len(patch) < WORTH_IT * len(new):
            return Payload(patch, held)
    return Payload(np.asarray(new))


_READ: Final = ray.remote(num_cpus=0)(read_payload)


class LocalCopy:
    """The version that this worker holds, as a file of its own."""

    def __init__(self, worker_id: str, among: list[Path] | None = None) -> None:
        """Removes what killed workers of this node left behind."""
        self._name = f"{PREFIX}-{worker_id}-{os.getpid()}.safetensors"
        self._among = among or places()
        self._path: Path | None = None
        self._file: BinaryIO | None = None
        self._source = ""
        for place in self._among:
            remove_left_overs(place)

    def take(self, bundle: WeightBundle, payload: Payload) -> WeightBundle:
        """The bundle as this node has it. Raises WeightSyncError for a patch that does not fit, EnvironmentProblem without room."""
        path = self._patched(payload) if payload.base else self._written(payload)
        self._source = bundle.uri
        return replace(bundle, uri=str(path))

    def _patched(self, payload: Payload) -> Path:
        """In place: what the engine made of the older bytes is its own."""
        source, self._source = self._source, ""
        if self._path is None or source != payload.base:
            raise WeightSyncError(f"got a patch on {payload.base}, but holds {source or 'nothing'}")
        try:
            delta.apply(np.memmap(self._path, np.uint8, "r+"), payload.data)
        except ValueError as problem:
            raise WeightSyncError(f"the patch on {payload.base} cannot be applied: {problem}") from None
        return self._path

    def _written(self, payload: Payload) -> Path:
        self.close()
        path = room_for(len(payload.data), self._among) / self._name
        self._file = open_locked(path)
        self._path = path
        self._file.write(payload.data.data)
        self._file.flush()
        return path

    def close(self) -> None:
        """Remove the file."""
        if self._path is not None and self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()
        self._path, self._file, self._source = None, None, ""
