"""docs/configuration.md, made from the configuration tree itself; a test fails when the file is not what this makes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sgpo_dist.cli.session import Session
from sgpo_dist.config import Config

HEAD: Final = """# Configuration

This page is made from the code: `python -m sgpo_dist config-reference --write docs/configuration.md`.

A run is one YAML file. Every key below may stand in it under its section, and may be set elsewhere too. What comes later wins:

1. the default in this table,
2. the YAML file given by `--config`,
3. an environment variable: `SGPO__PREFERENCE__BETA=0.05` sets `preference.beta`,
4. an argument of the command: `preference.beta=0.05`.

Values are read as YAML, so `1e-5`, `true`, `null` and `[a, b]` have their types. An unknown key is an error that names the nearest valid
one. Nothing is repaired silently: settings that contradict each other are refused with what to change. `sgpo-dist plan --config FILE`
shows the resolved configuration and what it comes down to in steps, pairs, tokens and memory.

A resumed run must keep its configuration. Free to change are `logging`, `checkpoint`, `cluster`, `output_dir`, the number of rollout
workers, their concurrency and memory shares, and all deadlines; `preference.total_steps` may grow. Anything else needs another `run_name`.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``config-reference`` on the command line; for those who work on this project, so it is not in the list of commands."""
    parser = commands.add_parser("config-reference", description="Print docs/configuration.md as the configuration tree makes it.")
    parser.add_argument("--write", metavar="FILE", type=Path, help="write it there instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, session: Session) -> int:
    """Print or write the page."""
    page = configuration_page()
    if args.write is None:
        session.text(page)
    else:
        args.write.write_text(page, encoding="utf-8")
    return 0


def configuration_page() -> str:
    """The whole page: one table a section, in the tree's order."""
    return HEAD + "".join(_section(name, section) for name, section in _sections(Config(), ""))


def _sections(section: BaseModel, path: str) -> Iterator[tuple[str, BaseModel]]:
    """Every section as an untouched configuration has it: the same model may stand in two places with other defaults."""
    yield path, section
    for name in type(section).model_fields:
        inner = getattr(section, name)
        if isinstance(inner, BaseModel):
            yield from _sections(inner, f"{path}.{name}" if path else name)


def _section(path: str, section: BaseModel) -> str:
    values = {name: getattr(section, name) for name in type(section).model_fields}
    rows = [_row(path, name, type(section).model_fields[name], value) for name, value in values.items() if not isinstance(value, BaseModel)]
    about = " ".join((type(section).__doc__ or "").split())
    title = f"`{path}`" if path else "The run"
    return f"\n## {title}\n\n{about}\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |\n" + "\n".join(rows) + "\n"


def _row(path: str, name: str, info: FieldInfo, default: Any) -> str:
    cells = [f"`{path}.{name}`" if path else f"`{name}`", type_words(info), f"`{json.dumps(default)}`", info.description or ""]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def type_words(info: FieldInfo) -> str:
    """The type as people write it, with its bounds: `int > 0`, `auto or float32`, `text or null`."""
    words = words_of(info.annotation)
    return words.removesuffix(" or null") + _bounds(info.metadata) + " or null" * words.endswith(" or null")


def words_of(annotation: Any) -> str:
    """A type annotation in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return words_of(parts[0]) + _bounds([item for part in parts[1:] for item in getattr(part, "metadata", [part])])
    if origin is Literal:
        return " or ".join(str(part) for part in parts)
    if origin in (Union, UnionType):
        return " or ".join(words_of(part) for part in parts)
    if origin is list:
        return f"list of {_grouped(parts[0])}"
    if origin is dict:
        return f"map of {words_of(parts[0])} to {_grouped(parts[1])}"
    return {"str": "text", "NoneType": "null", "float": "number", "Any": "anything"}.get(annotation.__name__, annotation.__name__)


def _grouped(annotation: Any) -> str:
    words = words_of(annotation)
    return f"({words})" if " or " in words else words


def _bounds(metadata: Sequence[Any]) -> str:
    signs = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
    found = [f"{sign} {getattr(item, name):g}" for item in metadata for name, sign in signs if getattr(item, name, None) is not None]
    return f" {', '.join(found)}" if found else ""
