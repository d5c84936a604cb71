"""A run's directory: its layout, its one owner, its identity and whether it is finished.

The driver claims it for an attempt (``RunDirectory.claim``) and holds its lock until that ends; the command line only reads
(``open_run``, ``find_run``). It keeps which configuration the run belongs to and refuses another one. Checkpoints, records and the
database inside it have owners of their own. Nothing here ever deletes anything.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sgpo_dist.config import RUN_NAME, Config
from sgpo_dist.errors import ConfigError, EnvironmentProblem, RunFailed
from sgpo_dist.sanitize import redact

CONFIG_NAME: Final = "config.resolved.yaml"
LOCK_NAME: Final = "run.lock"
STOP_NAME: Final = "stop"
RUN_FILE_NAME: Final = "run.json"
SHOWN_DIFFERENCES: Final = 3
EVALUATE_AGAIN: Final = "delete it and run the same training command again"
LOCK_TRIES: Final = 3
LOCK_PAUSE_S: Final = 0.02

FREE_TO_CHANGE: Final = (
    "output_dir",
    "time_limit_s",
    "logging",
    "checkpoint",
    "cluster",
    "rollout.num_rollout_workers",
    "rollout.tensor_parallel_size",
    "rollout.concurrency",
    "rollout.gpu_memory_utilization",
    "rollout.kv_cache_gib",
    "rollout.lease_s",
    "rollout.start_timeout_s",
    "rollout.heartbeat_timeout_s",
    "rollout.max_restarts",
    "learner.num_ranks",
    "learner.gpus_per_rank",
    "learner.threads_per_rank",
    "learner.zero_stage",
    "learner.gradient_checkpointing",
    "learner.max_tokens_per_micro_batch",
    "learner.step_timeout_s",
    "learner.max_restarts",
    "learner.max_bad_steps",
    "improver.gate",
    "preference.brakes",
    "preference.health_steps",
    "weights.transport",
    "weights.timeout_s",
)
"""Keys that a resumed run may set otherwise: they change how and where it runs, not what it trains. total_steps may also grow."""


class RunRecord(BaseModel):
    """What run.json holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str = Field(pattern="^[0-9a-f]{32}$", description="Name of the run for ever; checkpoints carry it.")
    incarnation: int = Field(ge=0, description="How many drivers have claimed the run; the newest one's number fences off earlier ones.")
    total_steps: int = Field(gt=0, description="Largest preference.total_steps this run was ever asked for.")
    finished_steps: int | None = Field(default=None, description="preference.total_steps it was finished for; null while unfinished.")


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The paths of one run, and its record as it was when this was made."""

    path: Path
    record: RunRecord

    @classmethod
    @contextmanager
    def claim(cls, config: Config, resume: str = "auto", new_id: Callable[[], str] = lambda: uuid.uuid4().hex) -> Iterator[RunDirectory]:
        """The run's directory, this process its only driver until the context ends (the kernel frees the lock of a dead one).

        Made if new, checked if known, its incarnation counted up. Raises ConfigError when another driver holds it, when it belongs to
        another configuration, when it is no run directory, or when ``resume`` is "never" and it already holds a run; EnvironmentProblem
        when it cannot be written.
        """
        path = config.run_dir.resolve()
        _refuse_strangers(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path / LOCK_NAME)
        except OSError as problem:
            raise _unwritable(path, problem) from problem
        try:
            directory = cls(path, _enter(path, config, resume, new_id))
            directory.take_stop_request()  # one that came too late for the driver before
            yield directory
        finally:
            os.close(lock)

    def mark_finished(self) -> RunDirectory:
        """Record durably that everything asked for is done; only its driver may call this."""
        record = self.record.model_copy(update={"finished_steps": self.record.total_steps})
        _write_durably(self.path / RUN_FILE_NAME, record.model_dump_json(indent=2) + "\n")
        return RunDirectory(self.path, record)

    def request_stop(self) -> None:
        """Ask the run's driver, on whatever machine, to stop after a checkpoint; it looks every second."""
        (self.path / STOP_NAME).touch()

    def take_stop_request(self) -> bool:
        """Whether somebody asked; the request is gone then. Only the driver may call this."""
        try:
            (self.path / STOP_NAME).unlink()
        except OSError:  # it is not there, or its disk is away for a moment
            return False
        return True

    @property
    def run_id(self) -> str:
        """32 hex digits that name the run for ever."""
        return self.record.run_id

    @property
    def incarnation(self) -> int:
        """Number of this attempt, counted from 1."""
        return self.record.incarnation

    @property
    def finished(self) -> bool:
        """Whether everything that was asked for is done."""
        return self.record.finished_steps is not None and self.record.finished_steps >= self.record.total_steps

    @property
    def config_file(self) -> Path:
        """The resolved configuration, secrets hidden."""
        return self.path / CONFIG_NAME

    @property
    def database(self) -> Path:
        """The buffer's database."""
        return self.path / "buffer.db"

    @property
    def metrics_file(self) -> Path:
        """One JSON line a step."""
        return self.path / "metrics.jsonl"

    @property
    def events_file(self) -> Path:
        """One JSON line an event."""
        return self.path / "events.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Root of the checkpoint store."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The final Hugging Face model."""
        return self.path / "model"

    @property
    def stages(self) -> Path:
        """Parent of the model each stage leaves: stages/NAME."""
        return self.path / "stages"

    @property
    def pairs(self) -> Path:
        """Archive of trained pairs."""
        return self.path / "pairs"

    @property
    def logs(self) -> Path:
        """Log files of every role and attempt."""
        return self.path / "logs"

    @property
    def evaluation_file(self) -> Path:
        """Held-out figures of the models, written by the driver."""
        return self.path / "evaluation.json"

    @property
    def report_file(self) -> Path:
        """The self-contained report."""
        return self.path / "report.html"

    def stage_model(self, stage: str) -> Path:
        """The Hugging Face model directory that ``stage`` leaves."""
        return self.stages / stage

    def log_file(self, role: str, rank: int = 0) -> Path:
        """logs/ROLE-RANK.ATTEMPT.log of this attempt."""
        return self.logs / f"{role}-{rank}.{self.incarnation}.log"


def open_run(path: Path) -> RunDirectory:
    """A run for reading, whether or not a driver works on it. Raises ConfigError when ``path`` holds none."""
    try:
        record = RunRecord.model_validate_json((path / RUN_FILE_NAME).read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path} is not a run directory (it has no {RUN_FILE_NAME})") from None
    except (OSError, ValidationError) as problem:
        raise RunFailed(f"{path / RUN_FILE_NAME} is damaged ({type(problem).__name__}); restore it from a backup") from None
    return RunDirectory(path, record)


def find_run(name: str, runs: Path = Path("runs")) -> RunDirectory:
    """The run that a person means by ``name``: a path to its directory, or its name under ``runs``. Raises ConfigError."""
    as_path = Path(name)
    if (as_path / RUN_FILE_NAME).is_file():
        return open_run(as_path)
    if RUN_NAME.match(name) and (runs / name / RUN_FILE_NAME).is_file():
        return open_run(runs / name)
    known = sorted(item.parent.name for item in runs.glob(f"*/{RUN_FILE_NAME}"))
    raise ConfigError(
        f"no run '{name}' here or under {runs}/; " + (f"known runs: {', '.join(known[:8])}" if known else "no run was made here yet")
    )


@contextmanager
def read_whole(path: Path, advice: str = "restore it from a backup") -> Iterator[None]:
    """The door for those who read a run's files: whatever a damaged one leads to becomes one RunFailed that names it."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        raise RunFailed(f"{path} is damaged; {advice}") from None


def driver_of(run: RunDirectory) -> int | None:
    """The process id of the driver that works on the run now, or None."""
    try:
        descriptor = os.open(run.path / LOCK_NAME, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = (os.read(descriptor, 32).split() or [b"0"])[0]
        return int(holder) if holder.isdigit() else 0
    finally:
        os.close(descriptor)
    return None


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two plain trees, sections opened, in the order of ``new`` then ``old``."""
    found: list[str] = []
    for key in [*new, *(key for key in old if key not in new)]:
        ours, theirs = old.get(key), new.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            found += differing_keys(ours, theirs, f"{prefix}{key}.")
        elif ours != theirs or (key in old) != (key in new):
            found.append(prefix + key)
    return found


def _refuse_strangers(path: Path) -> None:
    """A directory with things in it that no run of ours made is left alone."""
    if not path.exists():
        return
    names = {item.name for item in path.iterdir()} if path.is_dir() else {""}
    if names and not names & {LOCK_NAME, RUN_FILE_NAME, CONFIG_NAME}:
        raise ConfigError(f"{path} exists and is not a run directory; set run_name= or output_dir= to another place")


def _lock(path: Path) -> int:
    """Descriptor holding the exclusive lock; not inherited by programs we start. Raises ConfigError when another process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    if not any(_try_lock(descriptor) for _ in range(LOCK_TRIES)):
        holder = (os.read(descriptor, 32).split() or [b"?"])[0].decode("ascii", "replace")
        os.close(descriptor)
        raise ConfigError(f"another driver (pid {holder}) works on this run; wait for it, stop it, or set run_name= to another name")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _try_lock(descriptor: int) -> bool:
    """One try; on failure a short sleep, since a reader that asks ``driver_of`` holds the lock for an instant."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(LOCK_PAUSE_S)
        return False
    return True


def _enter(path: Path, config: Config, resume: str, new_id: Callable[[], str]) -> RunRecord:
    known = (path / RUN_FILE_NAME).exists()
    if known and resume == "never":
        raise ConfigError(f"{path} already holds a run and --resume never was asked; set run_name= to another name, or leave --resume out")
    if (path / CONFIG_NAME).exists():
        _refuse_other_config(path, config)
    record = open_run(path).record if known else RunRecord(run_id=new_id(), incarnation=0, total_steps=config.preference.total_steps)
    record = _next_incarnation(record, config.preference.total_steps)
    try:
        for name in ("checkpoints", "logs", "tensorboard"):
            (path / name).mkdir(exist_ok=True)
        if not (path / CONFIG_NAME).exists():
            _write_durably(path / CONFIG_NAME, dump_redacted(config))
        _write_durably(path / RUN_FILE_NAME, record.model_dump_json(indent=2) + "\n")
    except OSError as problem:
        raise _unwritable(path, problem) from problem
    return record


def _unwritable(path: Path, problem: OSError) -> EnvironmentProblem:
    return EnvironmentProblem(f"cannot write {path} ({problem}); free space there or set output_dir to a writable directory")


def _next_incarnation(record: RunRecord, total_steps: int) -> RunRecord:
    if total_steps < record.total_steps:
        raise ConfigError(
            f"preference.total_steps is {total_steps} but this run was asked for {record.total_steps} before; "
            f"it may only grow: set preference.total_steps={record.total_steps} or another run_name="
        )
    return record.model_copy(update={"incarnation": record.incarnation + 1, "total_steps": total_steps})


def dump_redacted(config: Config) -> str:
    """The resolved configuration as YAML with secrets hidden."""
    return yaml.safe_dump(redact(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True, width=120)


def _refuse_other_config(path: Path, config: Config) -> None:
    try:
        old = yaml.safe_load((path / CONFIG_NAME).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError):
        old = None
    if not isinstance(old, dict):
        raise RunFailed(f"{path / CONFIG_NAME} is damaged; restore it, or set run_name= to another name")
    differing = [key for key in differing_keys(old, redact(config.model_dump(mode="json"))) if not _may_differ(key)]
    if differing:
        more = f" and {len(differing) - SHOWN_DIFFERENCES} more" if len(differing) > SHOWN_DIFFERENCES else ""
        raise ConfigError(
            f"{path} belongs to a run of another configuration: {', '.join(differing[:SHOWN_DIFFERENCES])}{more} "
            "differ; set them as before to resume it, or set run_name= to start another run"
        )


def _may_differ(key: str) -> bool:
    return key == "preference.total_steps" or any(key == free or key.startswith(free + ".") for free in FREE_TO_CHANGE)


def _write_durably(path: Path, text: str) -> None:
    """Replace a file by a complete new one: after a crash there is the old or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    parent = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
