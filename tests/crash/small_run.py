"""A whole run in miniature: the real ledger and the real checkpoint store on real files; only the model is a hash.

Used by the crash tests, in their own process and, with ``python small_run.py``, in children that are killed. What it acknowledged and
saved it writes to ``heard.txt`` beside the run, so that a test can hold the run to it.
"""

from __future__ import annotations

import hashlib
import os
import resource
import sys
import time
from pathlib import Path

from sgpo_dist.buffer.admission import Hold
from sgpo_dist.buffer.ledger import Ledger
from sgpo_dist.checkpoint import CRASH_VARIABLE, CheckpointStore, crash_point
from sgpo_dist.errors import SgpoError
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Refusal, RefusalReason, Stage
from sgpo_dist.roles import Batch, Lease, StagePlan

STAGE = Stage.PREFERENCE
RUN_ID = "0" * 32
STEPS, SAVE_EVERY = 4, 2
PLAN = StagePlan(STAGE, 7, batch_size=2, max_staleness=0, lease_s=600.0)
PROMPTS = [Prompt(f"p{n}", (Message("user", f"question {n} " + "and why " * 20),)) for n in range(12)]


def store_of(directory: Path, **settings: object) -> CheckpointStore:
    return CheckpointStore(directory / "checkpoints", run_id=RUN_ID, **settings)  # type: ignore[arg-type]


def ledger_of(directory: Path, **settings: object) -> Ledger:
    return Ledger(directory / "buffer.db", clock=time.monotonic, wall=time.time, **settings)  # type: ignore[arg-type]


def go(directory: Path, crash_at: str = "") -> str:
    """Start or resume the run and walk it to its end; returns the final weights (hex)."""
    killer = crash_point({CRASH_VARIABLE: crash_at})
    store, ledger = store_of(directory, crash_point=killer), ledger_of(directory, crash_point=killer)
    try:
        found = store.latest()
        step = 0 if found is None else found.step
        weights = "" if found is None else (found.path / "learner" / "weights.txt").read_text()
        incarnation = ledger.begin_incarnation()
        ledger.open_stage(incarnation, PLAN, PROMPTS, version=step)
        ledger.commit(incarnation, STAGE, step)  # the process may have died between the checkpoint and this
        while step < STEPS:
            weights = train(weights, next_batch(directory, ledger, incarnation, step + 1))
            step += 1
            ledger.advance(incarnation, STAGE, step)
            if step % SAVE_EVERY == 0:
                save(directory, store, ledger, incarnation, step, weights)
        return weights
    finally:
        ledger.close()


def next_batch(directory: Path, ledger: Ledger, incarnation: int, step: int) -> Batch:
    while True:
        answer = ledger.assign(incarnation, STAGE, step)
        if isinstance(answer, Batch):
            return answer
        assert isinstance(answer, Hold)
        for lease in ledger.lease(incarnation, "w", STAGE, 8).leases:
            ledger.put(incarnation, "w", [outcome(lease)])
            hear(directory, f"stored {lease.uid}")


def outcome(lease: Lease) -> PreferencePair | Refusal:
    """A function of the uid and the version; every fourth prompt is refused."""
    if lease.prompt.prompt_id in ("p1", "p5"):
        return Refusal(lease.uid, STAGE, lease.prompt.prompt_id, RefusalReason.IDENTICAL)
    response = Completion(f"answer {lease.uid} {lease.version} " * 40, tuple(range(300)), FinishReason.STOP, lease.version)
    refinement = Completion(response.text + "better", tuple(range(320)), FinishReason.STOP, lease.version)
    return PreferencePair(lease.uid, STAGE, lease.prompt, tuple(range(40)), response, refinement, "v1")


def train(weights: str, batch: Batch) -> str:
    """Weights depend on every pair trained on, and on their order."""
    content = "".join(pair.uid + pair.chosen.text for pair in batch.pairs)
    return hashlib.sha256((weights + content).encode()).hexdigest()


def save(directory: Path, store: CheckpointStore, ledger: Ledger, incarnation: int, step: int, weights: str) -> None:
    hear(directory, f"saving {step}")
    draft = store.begin(step)
    (draft / "learner").mkdir()
    (draft / "learner" / "weights.txt").write_text(weights)
    ledger.backup(draft / "buffer.db")
    store.commit(draft, step, {"stage": STAGE.value, "step": step})
    hear(directory, f"saved {step}")
    ledger.commit(incarnation, STAGE, step)
    store.prune()


def hear(directory: Path, line: str) -> None:
    """One write of the kernel: a process killed after it cannot take it back."""
    handle = os.open(directory / "heard.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, f"{line}\n".encode())
    os.close(handle)


def heard(directory: Path, word: str) -> list[str]:
    path = directory / "heard.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split()[1] for line in lines if line.startswith(word + " ")]


def main() -> None:
    """``kill DIRECTORY=POINT:COUNT ...`` or ``fill DIRECTORY=BYTES ...``: one forked child each, which starts far faster than Python."""
    what, *tasks = sys.argv[1:]
    for task in tasks:
        directory, _, value = task.rpartition("=")
        child = os.fork()
        if child == 0:
            os._exit(_child(what, Path(directory), value))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _child(what: str, directory: Path, value: str) -> int:
    if what == "fill":  # no file may grow beyond so many bytes: the nearest thing to a full disk that needs no disk of its own
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(value), resource.RLIM_INFINITY))
    try:
        go(directory, value if what == "kill" else "")
    except SgpoError as problem:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        hear(directory, f"failed {type(problem).__name__}")
        (directory / "error.txt").write_text(str(problem))
        return 3
    return 0


if __name__ == "__main__":
    main()
