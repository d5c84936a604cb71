"""The ``chat`` starter set: everyday prompts, each with a short reference answer, packaged beside this file as JSONL.

Called by the data loader and by the evaluation; docs/data.md has the row schema. Turning rows into ``Prompt`` values and
checking user files is the loader's work, not done here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from types import MappingProxyType
from typing import Any

from sgpo_dist.errors import DataError

FILES: Mapping[str, str] = MappingProxyType({"train": "chat.jsonl", "heldout": "chat_heldout.jsonl"})


def rows(split: str) -> list[dict[str, Any]]:
    """Rows ``{"id", "prompt", "reference", "source"}`` of ``split`` ("train" or "heldout"), in the order of the file.

    Raises:
        DataError: there is no such split.
    """
    if split not in FILES:
        raise DataError(f"starter set chat has no split {split!r}: write one of {', '.join(FILES)}")
    text = (resources.files("sgpo_dist.starter") / FILES[split]).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
