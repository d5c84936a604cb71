"""``sgpo-dist audit``: the ledger's proof on the screen: every prompt accounted for, no pair twice; or what is wrong, by name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sgpo_dist.buffer.audit import AuditReport, StageAudit, audit_run
from sgpo_dist.cli.evaluation_table import grid
from sgpo_dist.cli.session import Session, add_run_argument, chosen_run
from sgpo_dist.errors import RunFailed


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``audit`` on the command line."""
    parser = commands.add_parser(
        "audit",
        help="prove a run's ledger: no prompt lost, no pair trained twice",
        description="Reads the run's database on its own, computes every name and digest again, and compares with events and checkpoints.\n"
        "Exit code 0 when all is well, 4 when something is wrong (it is named). Changes nothing; a running run can be audited.",
        epilog="example:\n  sgpo-dist audit demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, session: Session) -> int:
    """Print the table and the verdict; 0, or 4 when something is wrong."""
    report = audit_run(chosen_run(args).path)
    session.table("ledger", grid(stage_lines(report.stages)))
    for line in notes(report.stages):
        session.say(line)
    return verdict(report, session)


def notes(stages: Sequence[StageAudit]) -> list[str]:
    """What the table has no room for: refusals by reason, and pairs that a rollback discarded."""
    lines = []
    for stage in stages:
        if stage.refusals:
            lines.append(f"{stage.stage} refused: " + ", ".join(f"{reason} {count}" for reason, count in stage.refusals.items()))
        if stage.discarded:
            lines.append(f"{stage.stage} discarded by rollback: {stage.discarded} assigned pairs, of the steps after {stage.rolled_back_to}")
    return lines


def verdict(report: AuditReport, session: Session) -> int:
    """The last lines, and the exit code."""
    for problem in report.problems:
        session.say(f"wrong: {problem}", style="bold red")
    if report.ok:
        session.say("every prompt is accounted for, no pair counts twice, no row was changed", style="green")
    return 0 if report.ok else RunFailed.exit_code


def stage_lines(stages: Sequence[StageAudit]) -> list[list[str]]:
    """A header and one line a stage. prompts = pairs + refused + unused; pairs = ready + assigned + trained."""
    header = [
        "stage",
        "prompts",
        "pairs",
        "refused",
        "unused",
        "ready",
        "assigned",
        "trained",
        "steps",
        "version",
        "staleness seen / allowed",
    ]
    lines = [header]
    for stage in stages:
        counts = [
            stage.prompts,
            stage.pairs,
            stage.refused,
            stage.unused,
            stage.ready,
            stage.assigned,
            stage.trained,
            stage.steps,
            stage.version,
        ]
        allowed = "no bound" if stage.max_staleness is None else str(stage.max_staleness)
        lines.append([stage.stage, *map(str, counts), f"{stage.staleness_seen} / {allowed}"])
    return lines
