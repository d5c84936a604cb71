"""The cluster's nodes as the fleet sees them: who is about to go, who is better avoided, and whether the cluster's head still answers.

The fleet asks ``RayNodes`` for a ``NodeView`` at the pace of its heartbeats and before it places a worker, and keeps a ``NodeRecord`` of
what went wrong where. Decisions are pure, with time passed in. Leaves out: what is done to workers (``fleet``).
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import exceptions

from sgpo_dist.errors import EnvironmentProblem

HEAD_LOST_S = 25.0
"""Ray ends a process that has not reached the head for 60 s, with its own words: the run says it before, with time left to tidy up."""
TIDY_S = 25.0
"""So long tidying up may take then. Much of Ray blocks while there is no head."""
NODE_ID_LABEL = "ray.io/node-id"


class HeadLost(EnvironmentProblem):
    """The cluster's head does not answer: start the cluster again, then run the same command."""


@dataclass(frozen=True, slots=True)
class NodeView:
    """One look at the cluster, by node id. ``able`` are the living nodes that are large enough for a worker, when nothing else runs there.

    ``draining`` are the nodes about to be taken away, with the seconds left (infinite where no deadline was told).
    """

    alive: frozenset[str]
    able: frozenset[str]
    draining: Mapping[str, float] = field(default_factory=dict)


async def one_machine() -> NodeView:
    """What a fleet sees whose workers live on no cluster."""
    return NodeView(frozenset({""}), frozenset({""}))


@dataclass(slots=True)
class NodeRecord:
    """Which nodes to keep away from: after ``limit`` crashes or failed starts there without a pair, or when the node was lost.

    A node is avoided for ``quarantine_s``; then it gets one more chance. Nothing is avoided when no other node could hold a worker.
    """

    limit: int = 3
    quarantine_s: float = 600.0
    failures: dict[str, int] = field(default_factory=dict)
    until: dict[str, float] = field(default_factory=dict)

    def failed(self, node: str, now: float) -> bool:
        """A worker crashed there, or did not start; whether the node is avoided from now on."""
        self.failures[node] = self.failures.get(node, 0) + 1
        if self.failures[node] < self.limit:
            return False
        self.until[node] = now + self.quarantine_s
        return True

    def lost(self, node: str, now: float) -> None:
        """The node went away. Ray may need a quarter of a minute to see it, and would place workers there until then."""
        self.until[node] = now + self.quarantine_s

    def progressed(self, node: str) -> None:
        """A worker made a pair there: the node is good."""
        self.failures.pop(node, None)
        self.until.pop(node, None)

    def avoided(self, able: frozenset[str], now: float) -> tuple[str, ...]:
        """The nodes to avoid now, if any other is ``able``."""
        bad = {node for node, end in self.until.items() if end > now}
        return tuple(sorted(bad)) if able - bad else ()


def away_from(nodes: tuple[str, ...]) -> dict[str, str]:
    """Ray's label selector for "none of these nodes"; empty for none."""
    if not nodes:
        return {}
    return {NODE_ID_LABEL: f"!{nodes[0]}" if len(nodes) == 1 else f"!in({', '.join(nodes)})"}


def leave_ray(line: str) -> None:
    """End this process with ``line``, unless it has parted with Ray by now."""
    if ray.is_initialized():
        os.write(2, f"sgpo-dist: error: {line}\n".encode())
        os._exit(EnvironmentProblem.exit_code)


@dataclass(frozen=True, slots=True)
class RayNodes:
    """Looks at the cluster with ``look``, which may block for ever.

    Raises HeadLost when the head does not answer for ``patience_s``. Ray's own call would wait, and end the process after 60 s. When the
    process still is in Ray's hands ``tidy_s`` later, whatever holds it, ``last_resort`` ends it with the same line.
    """

    look: Callable[[], NodeView]
    patience_s: float = HEAD_LOST_S
    tidy_s: float = TIDY_S
    last_resort: Callable[[str], None] = field(default_factory=lambda: leave_ray)

    async def __call__(self) -> NodeView:
        """Bounded by ``patience_s``. Looks in a thread of its own, which may hang and must then keep nobody from leaving."""
        loop = asyncio.get_running_loop()
        view: asyncio.Future[NodeView] = loop.create_future()
        line = (
            f"the Ray cluster's head (GCS) has not answered for {self.patience_s:g} s; "
            "start the cluster again, then run the same command: it resumes from the newest checkpoint"
        )
        guard = threading.Timer(self.patience_s + self.tidy_s, self.last_resort, (line,))
        guard.daemon = True
        guard.start()
        threading.Thread(target=self._look, args=(loop, view, guard), daemon=True, name="look-at-nodes").start()
        try:
            async with asyncio.timeout(self.patience_s):
                return await view
        except (TimeoutError, exceptions.RayError):
            raise HeadLost(line) from None

    def _look(self, loop: asyncio.AbstractEventLoop, view: asyncio.Future[NodeView], guard: threading.Timer) -> None:
        def answer(found: NodeView | exceptions.RayError) -> None:
            if view.done():
                return
            if isinstance(found, NodeView):
                view.set_result(found)
            else:
                view.set_exception(found)

        found: NodeView | exceptions.RayError
        try:
            found = self.look()
            guard.cancel()
        except exceptions.RayError as problem:
            found = problem
        with suppress(RuntimeError):  # the loop may be gone by now
            loop.call_soon_threadsafe(answer, found)


def look_at_ray(num_cpus: float, num_gpus: float) -> NodeView:
    """The cluster now; a worker needs so many CPUs and GPUs. Ray Train and Ray Data watch drains in this way; no public call tells of them."""
    return view_of(ray.nodes(), ray._private.state.state.get_draining_nodes(), time.time(), num_cpus, num_gpus)


def view_of(nodes: Sequence[Mapping[str, Any]], drains: Mapping[str, int], now: float, num_cpus: float, num_gpus: float) -> NodeView:
    """Ray's rows as a view. ``drains`` has deadlines in Unix milliseconds, 0 for none; ``now`` is in Unix seconds."""
    alive = [node for node in nodes if node["Alive"]]
    able = (node for node in alive if node["Resources"].get("CPU", 0.0) >= num_cpus and node["Resources"].get("GPU", 0.0) >= num_gpus)
    left = {node: deadline / 1000 - now if deadline else float("inf") for node, deadline in drains.items()}
    return NodeView(frozenset(node["NodeID"] for node in alive), frozenset(node["NodeID"] for node in able), left)
