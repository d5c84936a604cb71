"""Held-out figures of the models of a run, side by side on the screen: used by ``train``, ``eval`` and ``status``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from sgpo_dist.cli.session import Session
from sgpo_dist.evaluate.evaluation import EvalRow, row_from, table
from sgpo_dist.run_directory import EVALUATE_AGAIN, read_whole
from sgpo_dist.sanitize import markup_text


def read_evaluation(path: Path) -> list[EvalRow]:
    """The rows of an evaluation.json; none when it is not there yet. Raises RunFailed when it is damaged."""
    if not path.is_file():
        return []
    with read_whole(path, EVALUATE_AGAIN):
        return [row_from(tree) for tree in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def show_evaluation(path: Path, session: Session) -> None:
    """The table of an evaluation file; nothing when there is none."""
    show_rows(read_evaluation(path), session)


def show_rows(rows: Sequence[EvalRow], session: Session) -> None:
    """One column a model, one line a source and figure; the change from the model before and its standard error in brackets."""
    if rows:
        session.table("held-out figures", grid(table(rows)))


def grid(lines: Sequence[Sequence[str]]) -> Table:
    """A table from a header and its lines."""
    made = Table(box=None, pad_edge=False, padding=(0, 2), header_style="bold", show_header=any(lines[0]))
    for number, name in enumerate(lines[0]):
        made.add_column(markup_text(name), justify="left" if number < 2 else "right", no_wrap=True)
    for line in lines[1:]:
        made.add_row(*(markup_text(cell) for cell in line))
    return made
