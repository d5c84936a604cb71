"""The buffer as a real Ray actor: killed by SIGKILL under load, it comes back on its file with everything it acknowledged."""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest
import ray
from ray.exceptions import ActorUnavailableError

from sgpo_dist.buffer.audit import audit_run
from sgpo_dist.buffer.service import PairBuffer
from sgpo_dist.errors import FencedError
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Stage
from sgpo_dist.roles import StagePlan

STAGE = Stage.PREFERENCE
TEXT = "a sentence of an answer; " * 100
PROMPTS = [Prompt(f"p{n}", (Message("user", f"question {n}"),)) for n in range(3000)]
CALL_S = 30


@pytest.fixture(scope="module")
def cluster():
    """A small Ray of our own, one at a time on this machine."""
    with (Path(tempfile.gettempdir()) / "sgpo-test-ray.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
        yield
        ray.shutdown()


def pair(lease):
    response = Completion(TEXT, tuple(range(300)), FinishReason.STOP, lease.version)
    refinement = Completion(TEXT + "better", tuple(range(320)), FinishReason.STOP, lease.version)
    return PreferencePair(lease.uid, STAGE, lease.prompt, tuple(range(40)), response, refinement, "v1")


def ask(method, *args):
    """One call that outlives a restart of the actor: every call of the buffer may be repeated."""
    give_up = time.monotonic() + CALL_S
    while True:
        try:
            return ray.get(method.remote(*args), timeout=CALL_S)
        except ActorUnavailableError:  # coming back; the call may or may not have been executed
            assert time.monotonic() < give_up, "the buffer did not come back"
            time.sleep(0.1)


class Putter(threading.Thread):
    """A worker that leases and puts until told to stop; remembers what was acknowledged."""

    def __init__(self, actor, incarnation, name, stop):
        super().__init__(name=name)
        self.actor, self.incarnation, self.stop = actor, incarnation, stop
        self.acknowledged = []

    def run(self):
        while not self.stop.is_set():
            for lease in ask(self.actor.lease, self.incarnation, self.name, STAGE, 8).leases:
                ask(self.actor.put, self.incarnation, self.name, [pair(lease)])
                self.acknowledged.append(lease.uid)


@pytest.mark.integration
@pytest.mark.timeout(180)
@pytest.mark.fault(9, invariants="I1")
def test_what_was_acknowledged_survives_sigkill(cluster, tmp_path):
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=64)(PairBuffer).remote(str(tmp_path / "buffer.db"))
    incarnation = ask(actor.begin_incarnation)
    ask(actor.open_stage, incarnation, StagePlan(STAGE, 7, batch_size=4, lease_s=600.0), PROMPTS, 0)
    stop = threading.Event()
    putters = [Putter(actor, incarnation, f"w{n}", stop) for n in range(4)]
    for putter in putters:
        putter.start()
    pids = []
    for _ in range(2):
        time.sleep(1.5)
        pids.append(ask(actor.__ray_call__, lambda buffer: os.getpid()))
        before = sum(len(putter.acknowledged) for putter in putters)
        assert before
        os.kill(pids[-1], signal.SIGKILL)
    time.sleep(3)
    stop.set()
    for putter in putters:
        putter.join(60)
    assert len({*pids, ask(actor.__ray_call__, lambda buffer: os.getpid())}) == 3, "the actor did not run in three processes"
    acknowledged = {uid for putter in putters for uid in putter.acknowledged}
    assert len(acknowledged) > before, "nothing was put after the second kill"
    stored = {row.uid for row in ask(actor.pairs, STAGE)}
    assert acknowledged <= stored
    batch = ask(actor.assign, incarnation, STAGE, 1)
    assert len(batch.pairs) == 4
    assert ask(actor.assign, incarnation, STAGE, 1).replayed
    newer = ask(actor.begin_incarnation)
    assert newer == incarnation + 1
    with pytest.raises(FencedError):
        ray.get(actor.put.remote(incarnation, "w0", [batch.pairs[0]]), timeout=CALL_S)
    ray.kill(actor)
    report = audit_run(tmp_path)
    assert report.problems == ()
    assert report.stages[0].pairs == len(stored)
