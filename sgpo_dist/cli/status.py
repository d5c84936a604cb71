"""``sgpo-dist status``: how far a run is, from its files alone; works while it runs and after it ended."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping

from sgpo_dist.cli.evaluation_table import grid, show_evaluation
from sgpo_dist.cli.session import Session, add_run_argument, chosen_run
from sgpo_dist.display import duration
from sgpo_dist.faults import Summary, summarise
from sgpo_dist.recorder import EventRow, MetricRow, read_events, read_marks, read_metrics
from sgpo_dist.report.samples import refusal_counts, state_counts
from sgpo_dist.run_directory import RunDirectory, driver_of
from sgpo_dist.sanitize import one_line

SHOWN_EVENTS = 5


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``status`` on the command line."""
    parser = commands.add_parser(
        "status",
        help="how far a run is",
        description="Whether a driver works on the run, its last step, its pairs, its newest events and held-out figures; from its files.",
        epilog="example:\n  sgpo-dist status demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, session: Session) -> int:
    """Print the state."""
    directory = chosen_run(args)
    session.table(f"run {directory.path.name}", grid([["", ""], *facts(directory, time.time())]))
    if directory.database.is_file():
        session.table("pairs", grid([["stage", "prompts by state"], *_joined(state_counts(directory.database))]))
        refused = refusal_counts(directory.database)
        if refused:
            session.table("refused", grid([["stage", "prompts by reason"], *_joined(refused)]))
    show_evaluation(directory.evaluation_file, session)
    return 0


def facts(directory: RunDirectory, now: float) -> list[list[str]]:
    """Lines of two cells; ``now`` is Unix time."""
    driver = driver_of(directory)
    events, metrics = read_events(directory.events_file), read_metrics(directory.metrics_file)
    lines = [
        ["state", f"driver at work (pid {driver})" if driver else _ended(directory, events)],
        ["attempts", str(directory.incarnation)],
    ]
    if metrics:
        lines.append(["last step", _last_step(metrics[-1], now)])
    pointer = directory.checkpoints / "latest"
    if pointer.is_file():
        name = one_line(pointer.read_text(encoding="ascii", errors="replace"), 60)
        lines.append(["checkpoint", f"{name}, {_age(now - os.stat(pointer).st_mtime)}"])
    lines += _faults(summarise(read_marks(directory.events_file, directory.metrics_file), now if driver else None))
    recent = [event for event in events if event.kind not in ("attempt", "message")][-SHOWN_EVENTS:]
    lines += [["event", f"{_age(now - event.time)}: {event_line(event)}"] for event in recent]
    return lines


def _faults(summary: Summary) -> list[list[str]]:
    """What was lost, and what of the time was useful; nothing without faults."""
    if not summary.faults:
        return []
    open_ones = sum(fault.mended is None for fault in summary.faults)
    counts = ", ".join(f"{role} {count}" for role, count in summary.by_role.items())
    again = f"; {summary.repeated_steps} steps trained again" if summary.repeated_steps else ""
    return [
        ["lost", counts + (f"; {open_ones} not replaced" if open_ones else "")],
        ["useful time (ETTR)", f"{summary.ettr:.1%} of {duration(summary.wall_s)}{again}"],
    ]


def event_line(event: EventRow) -> str:
    """An event as one line."""
    fields = " ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in event.fields.items())
    return one_line(f"{event.kind} {fields}", 140)


def _ended(directory: RunDirectory, events: list[EventRow]) -> str:
    if directory.finished:
        return "finished"
    last = next((event for event in reversed(events) if event.kind in ("attempt", "attempt_ended")), None)
    if last is None or last.kind == "attempt":
        return "not running; the last driver was killed: run the same training command to go on"
    reason = last.fields.get("reason", "?")
    return "finished" if reason == "done" else f"not running; ended by {reason}: {last.fields.get('detail', '')}"


def _last_step(row: MetricRow, now: float) -> str:
    shown = ", ".join(
        f"{name} {row.metrics[name]:.4g}" for name in ("loss", "rewards/accuracies", "rewards/margins", "version") if name in row.metrics
    )
    return f"{row.stage} {row.step}, {_age(now - row.time)}: {shown}"


def _age(seconds: float) -> str:
    return f"{duration(max(0.0, seconds))} ago"


def _joined(counts: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
    return [[stage, ", ".join(f"{name} {count}" for name, count in row.items())] for stage, row in counts.items()]
