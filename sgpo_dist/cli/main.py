"""The command line's door: arguments in, one exit code out, and every error as one line on stderr.

``sgpo-dist`` and ``python -m sgpo_dist`` both come here. Each command is a file beside this one with ``add_parser`` and ``run``. Exit
codes: 0 done, 2 bad usage or configuration, 3 environment, 4 run failed, 5 stopped on request after a checkpoint.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

from sgpo_dist.cli import audit, chaos, config_reference, doctor, evaluate, export, plan, report, samples, status, stop, train
from sgpo_dist.cli.session import Session, open_console
from sgpo_dist.errors import ConfigError, RunFailed, SgpoError
from sgpo_dist.sanitize import one_line, redact_text, secret_values

PROGRAM: Final = "sgpo-dist"
COMMANDS: Final = (train, plan, doctor, status, stop, samples, audit, report, evaluate, export, chaos, config_reference)
INTERRUPTED: Final = 130
DESCRIPTION: Final = """SGPO as a distributed actor/learner system: one model answers, rewrites its answers a little better, and learns
from (rewrite > answer)."""
EPILOG: Final = """exit codes: 0 done, 2 bad usage or configuration, 3 environment, 4 run failed, 5 stopped on request after a checkpoint

examples:
  sgpo-dist plan --config examples/demo.yaml
  sgpo-dist train --config examples/demo.yaml
  sgpo-dist samples demo --limit 3
"""
_OVERRIDE: Final = re.compile(r"^-{0,2}[A-Za-z_][A-Za-z0-9_.]*=")


class Parser(argparse.ArgumentParser):
    """argparse's hook for errors: one line like every other error instead of a usage text."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{message} (see {self.prog} --help)")


def build_parser() -> Parser:
    """The parser of all commands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=PROGRAM, description=DESCRIPTION, epilog=EPILOG, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    shown = [module.__name__.rsplit(".", 1)[-1] for module in COMMANDS if module is not config_reference]
    names = ["eval" if name == "evaluate" else name for name in shown]
    commands = parser.add_subparsers(title="commands", metavar="{" + ",".join(names) + "}", dest="command", parser_class=Parser)
    for module in COMMANDS:
        module.add_parser(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments, with overrides allowed before, between and after options. Raises ConfigError."""
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    strange = [word for word in rest if not (hasattr(args, "overrides") and _OVERRIDE.match(word))]
    if strange:
        parser.error(f"'{strange[0]}' is not an argument of {args.command or PROGRAM}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    if args.command is None and not args.version:
        parser.error("no command given")
    return args


def run_command(arguments: Sequence[str], session: Session) -> int:
    """Parse and run; raises what goes wrong."""
    args = parse(arguments)
    if args.version:
        session.say(f"{PROGRAM} {doctor.installed('sgpo_dist') or 'not installed'}")
        return 0
    return int(args.run(args, session))


def guarded(arguments: Sequence[str], session: Session) -> int:
    """Run a command and turn whatever goes wrong into one line and an exit code; with --debug also into a traceback."""
    try:
        return run_command(arguments, session)
    except SystemExit as done:  # argparse's own --help
        return int(done.code or 0)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        _complain("interrupted", session)
        return INTERRUPTED
    except SgpoError as error:
        return _failed(str(error), error.exit_code, "--debug" in arguments, session)
    except Exception as error:  # noqa: BLE001 the last door: nothing but one line may reach the user
        line = f"unexpected {type(error).__name__}: {error}; run again with --debug and report the traceback"
        return _failed(line, RunFailed.exit_code, "--debug" in arguments, session)


def _failed(line: str, code: int, debug: bool, session: Session) -> int:
    if debug:
        session.err.print_exception(width=140)
    _complain(line, session)
    return code


def _complain(line: str, session: Session) -> None:
    text = redact_text(one_line(line, limit=1000), secret_values(session.environment))
    session.err.print(f"{PROGRAM}: error: {text}", markup=False, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> int:
    """The command line. Returns the exit code."""
    session = Session(open_console(), open_console(stderr=True), os.environ if environment is None else environment)
    return guarded(sys.argv[1:] if arguments is None else arguments, session)
