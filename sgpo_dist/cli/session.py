"""What every command gets: two consoles and the environment; and the arguments several of them share.

All output of the command line goes through a Session, so that it is harmless, testable and never wrapped where a program may read it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.console import Console, RenderableType
from rich.text import Text

from sgpo_dist.config import Config, load_config
from sgpo_dist.run_directory import RunDirectory, find_run
from sgpo_dist.sanitize import terminal_text

UNLIMITED: Final = 240
"""Columns of output that no terminal limits."""


def open_console(*, stderr: bool = False) -> Console:
    """A console as wide as its terminal, or wide enough for every table when its output goes to a file or a program."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=UNLIMITED)


@dataclass(frozen=True, slots=True)
class Session:
    """Where a command writes, and the environment it reads."""

    out: Console
    err: Console
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether the output is read by a program or a file."""
        return not self.out.is_terminal

    def say(self, text: str, style: str = "") -> None:
        """One paragraph that is not wrapped; ``style`` colours it on a terminal."""
        self.out.print(Text(terminal_text(text), style=style), soft_wrap=True)

    def text(self, text: str) -> None:
        """Text as it is, made harmless."""
        self.out.print(terminal_text(text), markup=False, highlight=False, soft_wrap=True)

    def table(self, title: str, table: RenderableType) -> None:
        """A titled table."""
        self.out.print()
        self.say(title, style="bold")
        self.out.print(table)


def add_config_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--config FILE and section.key=value."""
    parser.add_argument("--config", metavar="FILE", type=Path, required=required, help="YAML file; docs/configuration.md lists every key")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="keys set here win over the file and the environment")


def read_config(args: argparse.Namespace, session: Session) -> Config:
    """The configuration that the arguments name. Raises ConfigError."""
    return load_config(args.config, args.overrides, session.environment)


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """RUN, and where runs lie."""
    parser.add_argument("name", metavar="RUN", help="a run's name, or the path of its directory")
    parser.add_argument("--runs", metavar="DIR", type=Path, default=Path("runs"), help="where runs lie (default: runs)")


def chosen_run(args: argparse.Namespace) -> RunDirectory:
    """The run that the arguments name. Raises ConfigError."""
    return find_run(args.name, args.runs)
