"""Writes docs/bad_input.md from the cases that tests/unit/test_bad_input.py runs: `python tools/bad_input_table.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]

from bad_input_cases import CASES, HOSTILE  # noqa: E402 found by the line above

PAGE = ROOT / "docs" / "bad_input.md"
HEAD = """# Bad input and hostile text

This page is made from the tests: `python tools/bad_input_table.py`. `tests/unit/test_bad_input.py` runs every row and asserts the exit code
and the whole line, that it is the only line on stderr, and that no file was made, lost or changed. Every line begins with `sgpo-dist: error: `,
left out here. `DIR` is the user's directory, `N` what differs from machine to machine. Exit codes: 2 usage, configuration or data;
3 environment; 4 run failed. What no command reaches without an engine (a second driver, `--resume DIR`, functions, the tokenizer, the
revisions file) is called as `train` calls it, and its error goes through the command line's own door.

"""
HOSTILE_HEAD = """
## Hostile text

What a model, a user or a foreign server may write, here with Python's escapes, and what a person sees of it in `samples`, `status`, the
progress display, error lines and `report.html`. A terminal gets nothing but text and the program's own colours; the report escapes all HTML,
has no script, and its content security policy allows none. The files of a run (`buffer.db`, exported answers) keep texts exactly. Exports
are JSON; nothing writes a spreadsheet's format, so that a formula stays text. One-line places show a line break as a space.

"""


def page() -> str:
    """The whole page."""
    refused = _table(
        ("kind", "given", "exit code", "line"),
        ((case.kind, case.given, str(case.code), _code(case.line)) for case in CASES),
    )
    shown = _table(("kind", "text", "shown"), ((one.kind, _code(ascii(one.text)[1:-1]), _code(ascii(one.shown)[1:-1])) for one in HOSTILE))
    return HEAD + refused + HOSTILE_HEAD + shown


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
