"""``sgpo-dist report``: write a run's report.html again, from its files."""

from __future__ import annotations

import argparse
from pathlib import Path

from sgpo_dist.cli.session import Session, add_run_argument, chosen_run
from sgpo_dist.report.report import write_report


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``report`` on the command line."""
    parser = commands.add_parser(
        "report",
        help="write a run's report.html",
        description="One self-contained page: held-out figures, curves, refusals, example pairs, versions, faults. No scripts.",
        epilog="example:\n  sgpo-dist report demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_argument(parser)
    parser.add_argument("--to", metavar="FILE", type=Path, help="default: report.html in the run's directory")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, session: Session) -> int:
    """Write the report and say where."""
    session.say(str(write_report(chosen_run(args), args.to)))
    return 0
