"""``sgpo-dist stop``: ask a run's driver, wherever it is, to stop after a checkpoint, and say what it left.

The request is a file in the run's directory, so it reaches a driver on another machine and never a stranger that has its process id by now.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from sgpo_dist.cli.session import Session, add_run_argument, chosen_run
from sgpo_dist.errors import ConfigError, RunFailed
from sgpo_dist.recorder import read_events
from sgpo_dist.run_directory import RunDirectory, driver_of, open_run

POLL_S = 0.2


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``stop`` on the command line."""
    parser = commands.add_parser(
        "stop",
        help="ask a run to stop after a checkpoint",
        description="The run's driver, on this machine or another one, ends the step in progress, makes a checkpoint and exits with 5, as for\n"
        "SIGTERM. Waits until it has, and says what it left. The same training command goes on from there.",
        epilog="examples:\n  sgpo-dist stop demo\n  sgpo-dist stop demo --wait 0",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_argument(parser)
    parser.add_argument("--wait", type=float, metavar="SECONDS", help="for the end, at most; 0 only asks (default: as long as it takes)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, session: Session) -> int:
    """Ask, wait, tell; 0 when it has ended or nobody waits. Raises ConfigError when no driver works on the run."""
    directory = chosen_run(args)
    driver = driver_of(directory)
    if driver is None:
        raise ConfigError(f"no driver works on run '{directory.path.name}': there is nothing to stop (sgpo-dist status says how it ended)")
    directory.request_stop()
    session.say(f"asked the driver (pid {driver}) of run '{directory.path.name}' to stop")
    if args.wait == 0:
        return 0
    if not has_ended(directory, args.wait):
        raise RunFailed(f"the driver still works after {args.wait:g} s; it stops when the step in progress is over (sgpo-dist status)")
    session.say(what_is_left(open_run(directory.path)))
    return 0


def has_ended(
    directory: RunDirectory, limit_s: float | None, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> bool:
    """Whether the driver let go of the run within ``limit_s`` (None: however long it takes)."""
    began = clock()
    while driver_of(directory) is not None:
        if limit_s is not None and clock() - began >= limit_s:
            return False
        sleep(POLL_S)
    return True


def what_is_left(directory: RunDirectory) -> str:
    """How the newest attempt ended, and the checkpoint that the next one goes on from, as a line."""
    ended = next((event for event in reversed(read_events(directory.events_file)) if event.kind == "attempt_ended"), None)
    if directory.finished:
        return "it was done first: the run is finished"
    pointer = directory.checkpoints / "latest"
    checkpoint = pointer.read_text(encoding="ascii").strip() if pointer.is_file() else "none yet, but every finished pair"
    reason = ended.fields.get("detail", "") if ended is not None else "it was killed"
    return f"{reason}; checkpoint: {checkpoint}"
