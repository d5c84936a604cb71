"""``sgpo-dist chaos``: a training run whose parts are killed, stopped and damaged as it goes, the audit afterwards, and one verdict.

The faults are drawn in ``sgpo_dist.chaos`` and done by ``sgpo_dist.saboteur``; here are the arguments, the table and RUN/chaos.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from sgpo_dist.buffer.audit import AuditReport, StageAudit, audit_run
from sgpo_dist.chaos import KINDS, STORED, Record, Sample, memory_verdict, table_lines, trend_lines
from sgpo_dist.cli.audit import stage_lines
from sgpo_dist.cli.evaluation_table import grid
from sgpo_dist.cli.session import Session, add_config_arguments, read_config
from sgpo_dist.config import Config
from sgpo_dist.errors import ConfigError, RunFailed, SgpoError
from sgpo_dist.faults import Mark, summarise
from sgpo_dist.run_directory import RUN_FILE_NAME, open_run
from sgpo_dist.saboteur import Findings, LiveRun, Orders, Saboteur

FILE_NAME: Final = "chaos.json"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``chaos`` on the command line."""
    parser = commands.add_parser(
        "chaos",
        help="train while parts of the run are killed, stopped and damaged; then audit it",
        description="Runs the training command of the configuration as another process and does one fault after the other to it, drawn from a\n"
        "seed: workers, engines, buffer, learner and driver are killed or stopped, checkpoints damaged. Each fault waits until the\n"
        "run is over the last. Exit code 0 when every fault was recovered from, the audit is clean and no process is left; else 4.\n\n"
        "kinds of faults: " + ", ".join(KINDS),
        epilog="examples:\n  sgpo-dist chaos --config examples/demo.yaml run_name=storm --seed 7 --minutes 30\n"
        "  sgpo-dist chaos --config run.yaml run_name=storm --seed 7 --minutes 10 --every 5 --faults kill-worker,kill-driver",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="everything that is drawn follows from it (default 0)")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="how long, from the first published version on (default 10)")
    parser.add_argument("--faults", default=",".join(KINDS), metavar="KIND,KIND", help="these kinds only (default: all)")
    parser.add_argument("--every", type=float, default=30.0, metavar="SECONDS", help="of undisturbed running between faults, on average (default 30)")
    parser.add_argument("--count", type=int, metavar="N", help="stop after N faults")
    parser.add_argument("--patience", type=float, default=600.0, metavar="SECONDS", help="for each start, recovery and stop (default 600)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, session: Session) -> int:
    """Play, show, judge; 0, or RunFailed with the first reason."""
    config = read_config(args, session)
    orders = orders_of(args, config)
    refuse(config, session)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that whatever ends us, the run is ended and nothing stays stopped
    directory = config.run_dir.resolve()
    replay = replay_line(args, orders)
    session.say(f"seed {orders.seed}; to play the same faults again: {replay}")
    live = LiveRun(training_command(args), directory, directory.with_name(f"{directory.name}.chaos.log"))
    records: list[Record] = []

    def note(record: Record) -> None:
        records.append(record)
        session.say(record_line(record))
        write(directory, {"replay": replay, "faults": [fault_row(one) for one in records]})

    found = Saboteur(live, orders, note).play()
    verdict = judge(directory, found, live.look(), live.samples)
    faults, samples = [fault_row(one) for one in found.records], [asdict(sample) for sample in live.samples]
    write(directory, {"replay": replay, **verdict_row(verdict), "faults": faults, "samples": samples})
    show(verdict, found.records, live.samples, session)
    if verdict.problems:
        more = f" (and {len(verdict.problems) - 1} more)" if len(verdict.problems) > 1 else ""
        raise RunFailed(f"{verdict.problems[0]}{more}; see {live.output} and {directory / FILE_NAME}")
    session.say("every fault was recovered from, the audit is clean, nothing is left over", style="green")
    return 0


# ---- what is asked for -------------------------------------------------------------------------------------------------------------


def orders_of(args: argparse.Namespace, config: Config) -> Orders:
    """Raises ConfigError for kinds and numbers that mean nothing."""
    kinds = tuple(dict.fromkeys(name.strip() for name in args.faults.split(",") if name.strip()))
    unknown = [name for name in kinds if name not in KINDS]
    if unknown or not kinds:
        raise ConfigError(f"--faults does not know '{', '.join(unknown)}'; choose among {', '.join(KINDS)}")
    if min(args.minutes, args.every, args.patience, args.count or 1) <= 0:
        raise ConfigError("--minutes, --every, --patience and --count must be above 0")
    deadlines = {
        "pause-worker": config.rollout.heartbeat_timeout_s,
        "pause-engine": config.rollout.lease_s,
        "pause-learner": config.learner.step_timeout_s,
    }
    workers = config.rollout.num_rollout_workers
    return Orders(args.seed, 60.0 * args.minutes, args.every, kinds, workers, args.count, args.patience, deadlines)


def refuse(config: Config, session: Session) -> None:
    """Raises ConfigError when the processes would be elsewhere, or when there is nothing left to disturb."""
    if config.cluster.address not in (None, "local") or session.environment.get("RAY_ADDRESS"):
        raise ConfigError("chaos reaches the processes of this machine only; leave cluster.address and RAY_ADDRESS out")
    if (config.run_dir / RUN_FILE_NAME).is_file() and open_run(config.run_dir).finished:
        raise ConfigError(f"run '{config.run_name}' is finished; set run_name= to another name")


def training_command(args: argparse.Namespace) -> list[str]:
    """The command that is run, and run again."""
    return [sys.executable, "-m", "sgpo_dist", "train", "--config", str(args.config), *args.overrides]


def replay_line(args: argparse.Namespace, orders: Orders) -> str:
    """The options that draw the same faults; overrides are left to the one who knows them, since they may hold secrets."""
    count = ["--count", str(orders.count)] if orders.count else []
    options = ["--seed", str(orders.seed), "--minutes", f"{args.minutes:g}", "--every", f"{args.every:g}", "--faults", ",".join(orders.kinds)]
    return shlex.join(["sgpo-dist", "chaos", "--config", str(args.config), *options, *count])


# ---- what came of it ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """The figures of a run under chaos, ``ettr`` over all its attempts; ``ledger`` is the audit's table; no ``problems`` = passed."""

    pairs_trained: int
    steps_repeated: int
    drivers: int
    ettr: float
    wall_s: float
    memory: str
    is_audited: bool
    leftovers: tuple[str, ...]
    problems: tuple[str, ...]
    ledger: tuple[StageAudit, ...] = ()


def judge(directory: Path, found: Findings, marks: Sequence[Mark], samples: Sequence[Sample]) -> Verdict:
    """The figures, the audit, and everything that is wrong, what the audit says first."""
    audit, cost = audited(directory), summarise(mark for mark in marks if mark.kind != STORED)
    problems = [f"audit: {line}" for line in audit.problems] + found.problems + [f"left over: {line}" for line in found.leftovers]
    if not found.records and not problems:
        problems = ["the run was done before the first fault; give it more steps, or lower --every"]
    return Verdict(
        pairs_trained=sum(stage.trained for stage in audit.stages),
        steps_repeated=cost.repeated_steps,
        drivers=sum(mark.kind == "attempt" for mark in marks),
        ettr=cost.ettr,
        wall_s=cost.wall_s,
        memory=memory_verdict(samples),
        is_audited=audit.ok,
        leftovers=tuple(found.leftovers),
        problems=tuple(problems),
        ledger=audit.stages,
    )


def audited(directory: Path) -> AuditReport:
    """The audit; a run that has nothing to audit did not pass it."""
    try:
        return audit_run(directory)
    except SgpoError as problem:
        return AuditReport((), (str(problem),))


def show(verdict: Verdict, records: Sequence[Record], samples: Sequence[Sample], session: Session) -> None:
    """The tables, and what is wrong."""
    session.table("faults", grid(table_lines(records)))
    session.table("ledger", grid(stage_lines(verdict.ledger)))
    session.table("what the run held", grid(trend_lines(samples)))
    session.table("run", grid([["", ""], *figure_lines(verdict)]))
    session.say(verdict.memory)
    for problem in verdict.problems:
        session.say(f"wrong: {problem}", style="bold red")


def figure_lines(verdict: Verdict) -> list[list[str]]:
    """Lines of two cells."""
    return [
        ["pairs trained", str(verdict.pairs_trained)],
        ["steps trained again", str(verdict.steps_repeated)],
        ["drivers started", str(verdict.drivers)],
        ["useful time (ETTR)", f"{verdict.ettr:.1%} of {verdict.wall_s:.0f} s"],
        ["processes left over", str(len(verdict.leftovers))],
        ["audit", "clean" if verdict.is_audited else "not clean"],
    ]


def record_line(record: Record) -> str:
    """A fault as one line, said when its outcome is known."""
    fault, outcome = record.fault, record.outcome
    after = "" if record.recovery_s is None else f" after {record.recovery_s:.1f} s"
    where = f" {fault.detail}" if fault.detail else ""
    return f"fault {fault.number}: {fault.kind} (pid {fault.pid}){where}: {outcome.what if outcome else 'not recovered'}{after}"


def fault_row(record: Record) -> dict[str, Any]:
    """A fault as chaos.json keeps it."""
    outcome = asdict(record.outcome) if record.outcome else {"what": "not recovered", "recovered_at": None, "ok": False}
    return {**asdict(record.fault), **outcome, "recovery_s": record.recovery_s}


def verdict_row(verdict: Verdict) -> dict[str, Any]:
    """The figures as chaos.json keeps them."""
    row = asdict(verdict)
    del row["ledger"]
    return row


def write(directory: Path, facts: Mapping[str, Any]) -> None:
    """RUN/chaos.json, whole or as before; nothing where the run never made its directory."""
    if directory.is_dir():
        draft = directory / f".{FILE_NAME}.tmp"
        draft.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        draft.replace(directory / FILE_NAME)
