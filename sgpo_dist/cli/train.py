"""``sgpo-dist train``: check what is asked for, hand it to the assembly, and say what came of it."""

from __future__ import annotations

import argparse
from pathlib import Path

from sgpo_dist.cli.evaluation_table import show_evaluation
from sgpo_dist.cli.plan import plan_here, refuse_problems
from sgpo_dist.cli.session import Session, add_config_arguments, read_config
from sgpo_dist.config import Config
from sgpo_dist.errors import EnvironmentProblem
from sgpo_dist.report.report import write_report
from sgpo_dist.run_directory import open_run


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``train`` on the command line."""
    parser = commands.add_parser(
        "train",
        help="train a model; run the same command again to resume",
        description="Trains to the end of the configured stages. A stopped or killed run goes on from its newest checkpoint when the same\n"
        "command is run again; a finished run says so and does nothing. Stop with Ctrl-C, SIGTERM, `sgpo-dist stop` or\n"
        "time_limit_s: the step in progress ends, a checkpoint is made, the exit code is 5. A second Ctrl-C ends it at once.",
        epilog="examples:\n  sgpo-dist train --config examples/demo.yaml\n"
        "  sgpo-dist train --config run.yaml run_name=second preference.beta=0.05\n"
        "  ray job submit --working-dir . -- python -m sgpo_dist train --config run.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        metavar="auto|never|DIR",
        default="auto",
        help="auto: from the newest checkpoint; never: refuse a known run; DIR: from this one",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, session: Session) -> int:
    """Train; 0 when done."""
    config = read_config(args, session)
    check_machine(config, session)
    try:
        from sgpo_dist.launch import run_training
    except ModuleNotFoundError as problem:
        raise EnvironmentProblem(
            f"the package {problem.name} is not installed; run `make setup`, or pip install 'sgpo_dist[cpu]'"
        ) from problem
    result = run_training(config, args.resume)
    show_result(result.directory, result.already_finished, session)
    return 0


def check_machine(config: Config, session: Session) -> None:
    """Refuse what this machine cannot do. On a cluster other machines do the work, so there problems are only said."""
    plan = plan_here(config)
    if not runs_on_a_cluster(config, session):
        refuse_problems(plan)
    for line in (*plan.problems, *plan.warnings):
        session.say(f"warning: {line}", style="yellow")


def runs_on_a_cluster(config: Config, session: Session) -> bool:
    """Whether Ray is already up elsewhere: an address was given, or this is a Ray job."""
    return config.cluster.address not in (None, "local") or bool(
        session.environment.get("RAY_ADDRESS") or session.environment.get("RAY_JOB_ID")
    )


def show_result(directory: Path, already_finished: bool, session: Session) -> None:
    """The held-out figures, and where everything lies."""
    run_directory = open_run(directory)
    if already_finished:
        session.say(
            f"run '{directory.name}' is finished; nothing to do (set run_name= for another run)"
        )
    report = write_report(run_directory)
    show_evaluation(run_directory.evaluation_file, session)
    session.say(f"model:  {_near(run_directory.model)}")
    session.say(f"report: {_near(report)}")
    session.say(f"pairs:  sgpo-dist samples {_near(directory)}")


def _near(path: Path) -> str:
    """The path as a person at this prompt would write it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
