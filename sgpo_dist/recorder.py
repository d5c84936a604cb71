"""Keeps and shows what happens in a run: metrics, events, trackers, and the one display.

The story calls ``log`` once a step, ``event`` for what happens seldom, ``status`` for what changes between steps, ``message`` for a line
that a person should read. Everything goes to files in the run's directory first (metrics.jsonl, events.jsonl), then to the trackers that
``logging.report_to`` names, then to the display. What a metric means is in docs/metrics.md. Left out: log files of the roles.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol, TextIO

from rich.console import Console

from sgpo_dist.config import Config
from sgpo_dist.display import Display, Status, open_display
from sgpo_dist.errors import EnvironmentProblem
from sgpo_dist.faults import STEP, Mark, Tally, summary_line
from sgpo_dist.placement import on_gpu
from sgpo_dist.processes import end_earlier_attempts, marked
from sgpo_dist.run_directory import RunDirectory
from sgpo_dist.sanitize import one_line, redact, redact_text, secret_values

WANDB_ID_NAME: Final = "wandb_id.txt"
SHOWN_METRICS: Final = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "version": "version",
    "staleness": "staleness",
    "perf/pairs_per_s": "pairs_per_s",
    "perf/tokens_per_s": "tokens_per_s",
    "improver/win_rate": "win_rate",
    "improver/copy_rate": "copy_rate",
}
"""Metric name -> field of the display's Status."""

PAIRS_AWAITED, WEIGHTS_AWAITED, WORKER_IDLE = "time/wait_for_batch", "time/publish", "perf/worker_idle"
WAIT_METRICS: Final = {
    PAIRS_AWAITED: ("learner waits for pairs", "raise rollout.num_rollout_workers"),
    WEIGHTS_AWAITED: ("all wait for the weights", "raise weights.weight_sync_interval"),
    WORKER_IDLE: ("workers wait for the learner", "raise learner.num_ranks"),
}
"""Seconds of a step (of the workers: a share) spent waiting -> how to say it, and the one setting to change if it is the longest wait."""
LOOSER: Final = "raise preference.max_staleness"
"""What helps when learner and workers wait for each other: the workers may not run further ahead."""
IF_IDLE: Final = ", if cores are idle"
"""Said of more processes on CPUs: on cores that are all busy they only make each other slower."""

WORTH_SAYING: Final = 0.1
LAST_TIME: Final = 1e11
"""Unix time of the year 5138; a row later than that is damaged."""


class Tracker(Protocol):
    """A place that metrics also go to."""

    def log(self, stage: str, step: int, metrics: Mapping[str, float], wall: float) -> None:
        """One step's metrics; ``wall`` is Unix time."""

    def close(self) -> None:
        """Everything is written out when this returns."""


class Recorder:
    """Takes what happens in a run; one per driver. Not safe for several threads at once."""

    def __init__(
        self,
        metrics_file: Path,
        events_file: Path,
        display: Display,
        trackers: Sequence[Tracker] = (),
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        secrets: Sequence[str] = (),
        totals: Mapping[str, int] | None = None,
        on_cpu: bool = False,
    ) -> None:
        """``secrets`` are hidden in every text; ``totals`` are the steps of stages that are known beforehand; ``on_cpu`` changes advice."""
        self._tally = Tally()
        for mark in read_marks(events_file, metrics_file):
            self._tally.see(mark)
        self._metrics = _LineFile(metrics_file)
        self._events = _LineFile(events_file)
        self._display = display
        self._trackers = trackers
        self._wall = wall
        self._monotonic = monotonic
        self._secrets = secrets
        self._totals = dict(totals or {})
        self._on_cpu = on_cpu
        self._status = Status()
        self._last_step_at: float | None = None

    @classmethod
    @contextmanager
    def open(cls, config: Config, directory: RunDirectory, console: Console | None = None) -> Iterator[Recorder]:
        """The recorder that the configuration's ``logging`` asks for. Raises EnvironmentProblem when a tracker is not installed."""
        trackers = [open_tracker(name, config, directory) for name in config.logging.report_to]
        display = open_display(config.logging.progress, config.run_name, tuple(config.stages), console or Console(), time.monotonic)
        recorder = cls(
            directory.metrics_file,
            directory.events_file,
            display,
            trackers,
            secrets=secret_values(os.environ),
            totals={"preference": config.preference.total_steps},
            on_cpu=not on_gpu(config),
        )
        try:
            recorder.event("attempt", incarnation=directory.incarnation, run_id=directory.run_id, pid=os.getpid())
            if left := end_earlier_attempts(directory.run_id, directory.incarnation):
                recorder.event("leftovers_ended", processes=left)
            with marked(os.environ, directory.run_id, directory.incarnation):
                yield recorder
            recorder.say_faults()
        except BaseException as error:
            recorder.say_faults()
            recorder.event("attempt_ended", incarnation=directory.incarnation, reason=type(error).__name__, detail=one_line(str(error)))
            raise
        else:
            recorder.event("attempt_ended", incarnation=directory.incarnation, reason="done", detail="")
        finally:
            recorder.close()

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of one optimiser step (1-based in its stage); names as in docs/metrics.md."""
        wall = self._wall()
        self._tally.see(Mark(wall, STEP, {"stage": str(stage), "step": step}))
        values = {name: float(value) for name, value in metrics.items()} | self._fault_metrics()
        self._metrics.write({"time": wall, "stage": str(stage), "step": step, **values})
        for tracker in self._trackers:
            tracker.log(str(stage), step, values, wall)
        self._status = self._after_step(str(stage), step, values)
        self._display.step(self._status)

    def event(self, kind: str, **fields: Any) -> None:
        """Something that happens seldom (a published version, a lost worker, a checkpoint); ``fields`` are plain JSON values."""
        wall = self._wall()
        self._tally.see(Mark(wall, kind, fields))
        self._events.write({"time": wall, "kind": kind, **self._without_secrets(redact(fields))})

    def status(self, **fields: Any) -> None:
        """Fields of ``display.Status`` that changed between steps: doing, waits, gate, pairs, total and so on."""
        if "stage" in fields:
            fields.setdefault("total", self._totals.get(str(fields["stage"]), 0))
        if "total" in fields:
            self._totals[str(fields.get("stage", self._status.stage))] = fields["total"]
        self._status = replace(self._status, **fields)
        self._display.show(self._status)

    def message(self, text: str) -> None:
        """A line for people, also kept as an event."""
        self.event("message", text=text)
        self._display.message(redact_text(text, self._secrets))

    def say_faults(self) -> None:
        """One line about what was lost and what it cost, over all attempts; nothing where nothing was."""
        if line := summary_line(self._tally.summary()):
            self.message(line)

    def close(self) -> None:
        """Files and trackers are written out, the terminal is as it was."""
        for tracker in self._trackers:
            tracker.close()
        self._display.close()
        self._metrics.close()
        self._events.close()

    def _fault_metrics(self) -> dict[str, float]:
        """Gauges of the whole run so far; none outside an attempt."""
        summary = self._tally.summary()
        return {"faults/restarts": float(len(summary.faults)), "time/ettr": summary.ettr} if summary.wall_s > 0 else {}

    def _after_step(self, stage: str, step: int, values: Mapping[str, float]) -> Status:
        now = self._monotonic()
        elapsed = now - self._last_step_at if self._last_step_at is not None and stage == self._status.stage else None
        self._last_step_at = now
        base = self._status if stage == self._status.stage else Status(stage=stage)
        shown: dict[str, Any] = {field: values[name] for name, field in SHOWN_METRICS.items() if name in values}
        if "version" in shown:
            shown["version"] = int(shown["version"])
        total = self._totals.get(stage, base.total)
        left = elapsed * max(0, total - step) if elapsed is not None and total else None
        return replace(base, step=step, total=total, doing="", waits=waits_line(values, elapsed, self._on_cpu), eta_s=left, **shown)

    def _without_secrets(self, value: Any) -> Any:
        if isinstance(value, str):
            return redact_text(value, self._secrets)
        if isinstance(value, Mapping):
            return {key: self._without_secrets(item) for key, item in value.items()}
        return [self._without_secrets(item) for item in value] if isinstance(value, list | tuple) else value


def waits_line(values: Mapping[str, float], elapsed: float | None, on_cpu: bool = False) -> str:
    """Who waited for whom in a step of ``elapsed`` seconds, as shares, and what to change; empty when nobody waited for a tenth of it."""
    if not elapsed:
        return ""
    shares = {name: values.get(name, 0.0) / (1.0 if name == WORKER_IDLE else elapsed) for name in WAIT_METRICS}
    waiting = sorted((name for name in shares if shares[name] >= WORTH_SAYING), key=lambda name: -shares[name])
    if not waiting:
        return ""
    if waiting[0] == WEIGHTS_AWAITED:
        remedy = WAIT_METRICS[WEIGHTS_AWAITED][1]
    elif {PAIRS_AWAITED, WORKER_IDLE} <= set(waiting):
        remedy = LOOSER
    else:
        remedy = WAIT_METRICS[waiting[0]][1] + IF_IDLE * on_cpu
    return f"{', '.join(f'{WAIT_METRICS[name][0]} {min(shares[name], 1.0):.0%}' for name in waiting)}: {remedy}"


# ---- files -----------------------------------------------------------------------------------------------------------------------


class _LineFile:
    """A JSON-lines file that is appended to and handed to the system line by line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = _ends_inside_a_line(path)
        self._file: TextIO = path.open("a", encoding="utf-8", errors="backslashreplace")  # half a surrogate pair becomes its JSON escape
        if torn:
            self._file.write("\n")  # a crash cut the last line; the next one must not continue it

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, default=str) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _ends_inside_a_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they are kept as the texts 'nan', 'inf' and '-inf', which float() reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One step's metrics as metrics.jsonl keeps them; ``time`` is Unix time."""

    time: float
    stage: str
    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class EventRow:
    """One event as events.jsonl keeps it; ``time`` is Unix time."""

    time: float
    kind: str
    fields: Mapping[str, Any]


def read_metrics(path: Path) -> list[MetricRow]:
    """One row a (stage, step), last written last: a resumed run writes replayed steps again, and the later row stands."""
    rows: dict[tuple[str, int], MetricRow] = {}
    for tree in _read_lines(path):
        try:
            wall, stage, step = float(tree.pop("time")), str(tree.pop("stage")), int(tree.pop("step"))
            row = MetricRow(wall, stage, step, {name: float(value) for name, value in tree.items()})
        except (KeyError, TypeError, ValueError):
            continue
        rows.pop((stage, step), None)
        rows[stage, step] = row
    return list(rows.values())


def read_events(path: Path) -> list[EventRow]:
    """Every event in file order."""
    trees = [tree for tree in _read_lines(path) if "kind" in tree]
    return [EventRow(float(tree.pop("time")), str(tree.pop("kind")), tree) for tree in trees]


def read_marks(events_file: Path, metrics_file: Path) -> list[Mark]:
    """Everything that the two files tell, in time order, every row of a repeated step; metrics themselves are left out."""
    marks = [Mark(event.time, event.kind, event.fields) for event in read_events(events_file)]
    for tree in _read_lines(metrics_file):
        try:
            marks.append(Mark(float(tree["time"]), STEP, {"stage": str(tree["stage"]), "step": int(tree["step"])}))
        except (KeyError, TypeError, ValueError):
            continue
    return sorted(marks, key=lambda mark: mark.time)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The file's objects that have a time; a line that a crash cut is passed over, a missing file is empty."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        try:
            tree = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(tree, dict) and isinstance(tree.get("time"), int | float) and 0 <= tree["time"] < LAST_TIME:
            found.append(tree)
    return found


# ---- trackers --------------------------------------------------------------------------------------------------------------------


def open_tracker(name: str, config: Config, directory: RunDirectory, load: Callable[[str], Any] = importlib.import_module) -> Tracker:
    """The tracker that ``logging.report_to`` calls ``name``. Raises EnvironmentProblem when its package is not installed."""
    try:
        if name == "tensorboard":
            return TensorBoard(directory.tensorboard, load)
        return WeightsAndBiases(load("wandb"), config, directory)
    except ImportError as problem:
        extra = "sgpo_dist[wandb]" if name == "wandb" else "tensorboard"
        raise EnvironmentProblem(
            f"logging.report_to names {name}, which is not installed: pip install '{extra}', or take it off the list"
        ) from problem


class TensorBoard:
    """Scalars tagged STAGE/metric over the stage's steps. Uses TensorBoard's own writer: no torch, no TensorFlow."""

    def __init__(self, directory: Path, load: Callable[[str], Any] = importlib.import_module) -> None:
        """A new event file in ``directory``."""
        self._event = load("tensorboard.compat.proto.event_pb2").Event
        self._summary = load("tensorboard.compat.proto.summary_pb2").Summary
        self._writer = load("tensorboard.summary.writer.event_file_writer").EventFileWriter(str(directory))

    def log(self, stage: str, step: int, metrics: Mapping[str, float], wall: float) -> None:
        """One event with every metric."""
        values = [self._summary.Value(tag=f"{stage}/{name}", simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(self._event(wall_time=wall, step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        """Flush and end the writer's thread."""
        self._writer.close()


class WeightsAndBiases:
    """A W&B run that a resumed run continues: its id lies in the run's directory."""

    def __init__(self, wandb: Any, config: Config, directory: RunDirectory) -> None:
        """``wandb`` is the imported package."""
        self._run = wandb.init(
            project="sgpo_dist",
            name=config.run_name,
            id=_kept_id(directory.path / WANDB_ID_NAME),
            resume="allow",
            dir=str(directory.path),
            config=redact(config.model_dump(mode="json")),
        )
        self._known: set[str] = set()

    def log(self, stage: str, step: int, metrics: Mapping[str, float], wall: float) -> None:
        """Metrics under STAGE/ with the stage's own step axis, since W&B's must only grow over the whole run."""
        if stage not in self._known:
            self._known.add(stage)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in metrics.items()}})

    def close(self) -> None:
        """Mark the W&B run ended."""
        self._run.finish()


def _kept_id(path: Path) -> str:
    """The id in ``path``, made at the first call."""
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12], encoding="ascii")
    return path.read_text(encoding="ascii").strip()
