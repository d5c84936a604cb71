"""The task ``orders`` for the quality benchmark: few references, many bare prompts, a weaker given answer, and a checker without truth.

Called by ``tasks`` and, through the product's hooks, by the arms. Notes and their scoring are the starter set's own; seeds here are apart
from the starter set's, and a note that an earlier split holds is passed over.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from datetime import date
from functools import cache
from itertools import islice
from typing import Any, Final

from sgpo_dist.starter import orders

NUM_REFERENCES: Final = 32
NUM_PROMPTS: Final = 320
NUM_HELD_OUT: Final = {"validation": 60, "test": 100}
_SEEDS: Final = {"validation": 9_001, "test": 9_002}


def references(seed: int) -> list[dict[str, Any]]:
    """``NUM_REFERENCES`` rows with reference and a weaker answer under "rejected"."""
    return [
        row | {"rejected": spoilt(row["reference"], random.Random(f"{seed}/{row['id']}"))} for row in _rows("train", 10_000 + seed, NUM_REFERENCES)
    ]


def prompts(seed: int) -> list[dict[str, Any]]:
    """``NUM_PROMPTS`` rows that a run sees without their reference."""
    return _rows("bare", 20_000 + seed, NUM_PROMPTS)


def heldout(split: str) -> list[dict[str, Any]]:
    """Rows of "validation" or "test", the same for every seed."""
    return _rows(split, _SEEDS[split], NUM_HELD_OUT[split])


def score(text: str, reference: str | None, prompt: str) -> float:
    """Share of the seven fields that are right."""
    del prompt
    return orders.field_score(text, reference or "")


def plausibility(text: str, reference: str | None, prompt: str) -> float:
    """What a clerk could check without the truth, in [0, 1]: keys and types, an ISO date, and words that do stand in the note."""
    del reference
    try:
        fields = json.loads(text)
    except ValueError:
        return 0.0
    if not isinstance(fields, dict):
        return 0.0
    note = prompt.rpartition("\n\n")[2]
    checks = (
        list(fields) == list(orders.KEYS),
        *(isinstance(fields.get(key), str) and fields[key] in note for key in ("name", "item", "city")),
        isinstance(fields.get("quantity"), int) and 2 <= fields["quantity"] <= 12,
        _is_date(fields.get("date")),
        isinstance(fields.get("price"), int | float) and not isinstance(fields.get("price"), bool) and _spelled(fields["price"]) in note,
        isinstance(fields.get("urgent"), bool),
    )
    return sum(checks) / len(checks)


def spoilt(reference: str, rng: random.Random) -> str:
    """The reference with one to three fields taken from another order: a given weaker answer."""
    fields = json.loads(reference)
    other = orders.generate_orders(1, rng.randrange(1 << 30))[0].fields
    for key in rng.sample([key for key in orders.KEYS if other[key] != fields[key]], rng.randint(1, 3)):
        fields[key] = other[key]
    return json.dumps(fields)


def _spelled(price: float) -> str:
    return f"{price:.2f}" if price % 1 else f"{price:.0f}"


def _is_date(value: object) -> bool:
    try:
        return isinstance(value, str) and date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False


def _rows(split: str, seed: int, count: int) -> list[dict[str, Any]]:
    taken = _held_out_notes() if split not in _SEEDS else frozenset()
    found: Sequence[orders.Order] = list(islice(orders.unseen(orders.generate_orders(2 * count + 16, seed), taken), count))
    return [
        {
            "id": f"{split}-{seed}-{number:04d}",
            "messages": orders.order_messages(order),
            "reference": orders.reference_text(order),
            "source": "orders",
        }
        for number, order in enumerate(found, start=1)
    ]


@cache
def _held_out_notes() -> frozenset[str]:
    return frozenset(order.note for split, seed in _SEEDS.items() for order in orders.generate_orders(2 * NUM_HELD_OUT[split] + 16, seed))
