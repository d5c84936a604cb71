"""What changed from one text to another, in words, for people: used by ``samples`` and the report.

Left out: how it is shown, and making the text harmless (the one who shows it does both).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from enum import StrEnum
from typing import Final

_PIECE: Final = re.compile(r"\s+|\w+|[^\w\s]")


class Change(StrEnum):
    """What happened to a segment."""

    SAME = "same"
    REMOVED = "removed"
    ADDED = "added"


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of text with one fate."""

    change: Change
    text: str


def word_diff(old: str, new: str) -> list[Segment]:
    """Segments in reading order: those kept or removed spell ``old``, those kept or added spell ``new``."""
    before, after = _PIECE.findall(old), _PIECE.findall(new)
    segments: list[Segment] = []
    for tag, a, b, c, d in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if tag == "equal":
            segments.append(Segment(Change.SAME, "".join(before[a:b])))
            continue
        if a < b:
            segments.append(Segment(Change.REMOVED, "".join(before[a:b])))
        if c < d:
            segments.append(Segment(Change.ADDED, "".join(after[c:d])))
    return segments


def plain_diff(segments: list[Segment]) -> str:
    """As text: [-removed-] and {+added+}."""
    forms = {Change.SAME: "{}", Change.REMOVED: "[-{}-]", Change.ADDED: "{{+{}+}}"}
    return "".join(forms[segment.change].format(segment.text) for segment in segments)
