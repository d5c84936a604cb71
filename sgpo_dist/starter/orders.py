"""The ``orders`` starter set: everyday order notes and the JSON that a clerk would extract from each, made from a seed.

Called by the data loader (rows), by the evaluation (``field_score``, ``exact``) and, as the example of a user's repair
hook, by the improver stage (``repair``). Every note states all seven fields, so its reference is right by construction.
Left out: tokenising, prompts of the roles, and any check of user data.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from itertools import islice
from types import MappingProxyType
from typing import Any

from sgpo_dist.errors import DataError

KEYS = ("name", "item", "quantity", "city", "date", "price", "urgent")
INSTRUCTION = f"Turn the order note into one line of JSON with the keys {', '.join(KEYS[:-1])} and {KEYS[-1]}. Write dates as YYYY-MM-DD."
MAX_REPAIRS = 3
MIN_RECOVERED = 4

SPLITS: Mapping[str, tuple[int, int]] = MappingProxyType({"train": (48, 101), "validation": (64, 202), "heldout": (128, 303)})
"""Rows and seed of each split that has references."""

_FIRST_NAMES = (
    "Adam", "Alice", "Anna", "Ben", "Carla", "Clara", "David", "Diana", "Emma", "Eric", "Frank", "Grace", "Hannah", "Henry",
    "Ivan", "Jack", "Jane", "Julia", "Karen", "Leo", "Linda", "Lucas", "Maria", "Martin", "Nina", "Oliver", "Paul", "Peter",
    "Rosa", "Ruth", "Sam", "Sarah", "Simon", "Sofia", "Thomas", "Victor",
)  # fmt: skip
_SURNAMES = (
    "Adams", "Baker", "Bell", "Brown", "Carter", "Cook", "Costa", "Cruz", "Evans", "Fischer", "Fox", "Garcia", "Green",
    "Hall", "Hill", "King", "Lee", "Lopez", "Martin", "Miller", "Moore", "Murray", "Novak", "Park", "Reed", "Rossi", "Silva",
    "Smith", "Stone", "Taylor", "Turner", "Walker", "Weber", "White", "Wood", "Young",
)  # fmt: skip
_ITEMS = (
    "desk lamps", "office chairs", "coffee mugs", "wool blankets", "garden gloves", "paper bags", "glass jars", "wall clocks",
    "flower pots", "notebooks", "picture frames", "bath towels", "candles", "umbrellas", "rain jackets", "lunch boxes",
    "water bottles", "bread knives", "soup bowls", "phone cases", "travel bags", "bicycle bells", "paint brushes", "door mats",
    "cushions", "teapots", "wooden spoons", "sun hats", "board games", "bird houses", "keyboards", "extension cords",
)  # fmt: skip
_CITIES = (
    "Amsterdam", "Athens", "Barcelona", "Berlin", "Boston", "Brussels", "Chicago", "Denver", "Dublin", "Geneva", "Hamburg",
    "Helsinki", "Lisbon", "London", "Lyon", "Madrid", "Manchester", "Milan", "Munich", "Naples", "Oslo", "Paris", "Porto",
    "Prague", "Rome", "Seattle", "Stockholm", "Toronto", "Vienna", "Warsaw", "York", "Zurich",
)  # fmt: skip
_NUMBER_WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip

# {extra} is empty or starts with a space: a sentence about another city, one about the hurry, or both.
_TEMPLATES = (
    "Voice mail: Hi, this is {name}. I need {quantity} {item} at {price} each, sent to {city} by {date}.{extra} Bye!",
    "Sticky note: {name}, {quantity} {item} for {city}, due {date}, {price} each.{extra}",
    "Dear team, please deliver {quantity} {item} to our {city} office on {date}. We agreed on {price} apiece.{extra} Regards, {name}",
    "{name} rang this morning and wants {quantity} {item} in {city}. Price {price} each, delivery {date}.{extra}",
    "Order form. Ship to: {city}. Day: {date}. Goods: {quantity} {item}. Unit price: {price}. Ordered by: {name}.{extra}",
    "hey it's {name}, can you get {quantity} {item} to {city} before {date}? we said {price} each.{extra}",
    "By {date} a parcel must reach {name} in {city}: {quantity} {item}, {price} per piece.{extra}",
    "Please pack {quantity} {item}, {price} each. They go to {city} on {date}. The customer is {name}.{extra}",
    "Met {name} at the fair. Sold {quantity} {item} for {price} a piece, to arrive in {city} on {date}.{extra}",
    "{city}, {date}: {name} is waiting for {quantity} {item}. They cost {price} each.{extra}",
)
_ASIDES = (
    "The bill goes to {other}.",
    "The goods are still in {other}.",
    "The call came from {other}.",
    "This time not to {other}.",
)
_HURRIES = ("It is urgent.", "Please rush this.", "This cannot wait.", "Urgent!")
_CALMS = ("No rush.", "There is no hurry.", "It is not urgent.", "")
_ASIDE_SHARE = 0.4
_URGENT_SHARE = 0.5
_FIRST_DAY, _LAST_DAY = date(2026, 1, 1).toordinal(), date(2028, 12, 31).toordinal()

FieldValue = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Order:
    """One note and the seven fields it states, keyed by ``KEYS``."""

    note: str
    fields: Mapping[str, FieldValue]


def generate_orders(count: int, seed: int) -> list[Order]:
    """The first ``count`` orders of the endless row that belongs to ``seed``: same seed, same orders."""
    return list(islice(_orders(seed), count))


def order_messages(order: Order) -> list[dict[str, str]]:
    """The one user message that asks for the JSON of ``order``: the instruction, then the note."""
    return [{"role": "user", "content": f"{INSTRUCTION}\n\n{order.note}"}]


def reference_text(order: Order) -> str:
    """The right answer: JSON on one line, keys in the order of ``KEYS``."""
    return _one_line(order.fields)


def rows(split: str) -> list[dict[str, Any]]:
    """Rows ``{"id", "messages", "reference", "source"}`` of "train" (48), "validation" (64) or "heldout" (128).

    Raises:
        DataError: there is no such split (prompts without references come from ``bare_prompts``).
    """
    if split not in SPLITS:
        raise DataError(f"starter set orders has no split {split!r}: write one of {', '.join(SPLITS)}, or use bare_prompts(count, seed)")
    count, seed = SPLITS[split]
    orders = generate_orders(count, seed)
    return [_row(f"orders-{split}-{i:03d}", order) | {"reference": reference_text(order)} for i, order in enumerate(orders, start=1)]


def bare_prompts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` rows ``{"id", "messages", "source"}`` without reference; ``seed`` >= 0 names the family.

    Disjoint from every split by construction: a note of a split is passed over.
    """
    if seed < 0:
        raise DataError(f"bare_prompts needs a seed of at least 0, not {seed}")
    taken = {order.note for split in SPLITS.values() for order in generate_orders(*split)}
    fresh = islice(unseen(_orders(seed), taken), count)
    return [_row(f"orders-bare-{seed}-{i:06d}", order) for i, order in enumerate(fresh, start=1)]


def unseen(orders: Iterable[Order], taken: Collection[str]) -> Iterator[Order]:
    """The orders whose note is not in ``taken``, lazily and in their order."""
    return (order for order in orders if order.note not in taken)


def field_score(text: str, reference: str) -> float:
    """Share in [0, 1] of the seven fields of ``text`` that equal the reference's, in value and JSON type (4 equals 4.0).

    0 unless the whole of ``text`` is one strict JSON object. Keys beyond the seven are not counted here; ``exact`` refuses them.
    """
    got = _parse(text)
    if got is None:
        return 0.0
    return (len(KEYS) - len(_wrong(got, _fields(reference)))) / len(KEYS)


def exact(text: str, reference: str) -> bool:
    """Whether ``text`` is one strict JSON object with all seven fields right and no other key."""
    got = _parse(text)
    return got is not None and got.keys() == set(KEYS) and not _wrong(got, _fields(reference))


def repair(draft: str, reference: str, prompt: str) -> str | None:
    """Graded repair, the example of a ``repair`` hook: ``draft`` with at most three wrong fields set right, or None if it is exact.

    A draft that is a JSON object keeps its other fields, right or wrong; the first wrong ones in key order are corrected, and
    keys beyond the seven are dropped. From any other draft the fields that can be read are kept and the unreadable ones come
    first in line for correction; with fewer than four readable fields the answer is the reference itself. ``prompt`` is part of
    the hook's signature and not needed here.
    """
    del prompt
    if exact(draft, reference):
        return None
    truth, kept = _fields(reference), _parse(draft)
    if kept is not None:
        return _mended(kept, _wrong(kept, truth), truth)
    kept = _recovered(draft)
    if len(kept) < MIN_RECOVERED:
        return _one_line(truth)
    return _mended(kept, sorted(_wrong(kept, truth), key=kept.__contains__), truth)


def _mended(kept: Mapping[str, Any], wrong: list[str], truth: Mapping[str, Any]) -> str:
    return _one_line({**kept, **{key: truth[key] for key in wrong[:MAX_REPAIRS]}})


def _orders(seed: int) -> Iterator[Order]:
    rng = random.Random(seed)
    while True:
        yield _order(rng)


def _order(rng: random.Random) -> Order:
    quantity, half_units = rng.randint(2, 12), _unit_price(rng)
    city, other = rng.sample(_CITIES, 2)
    day, urgent = date.fromordinal(rng.randint(_FIRST_DAY, _LAST_DAY)), rng.random() < _URGENT_SHARE
    name, item = f"{rng.choice(_FIRST_NAMES)} {rng.choice(_SURNAMES)}", rng.choice(_ITEMS)
    note = rng.choice(_TEMPLATES).format(
        name=name,
        item=item,
        city=city,
        quantity=rng.choice((str(quantity), _NUMBER_WORDS[quantity - 2])),
        price=_spelled_price(half_units, rng),
        date=_spelled_date(day, rng),
        extra=_extra(other, urgent, rng),
    )
    values = (name, item, quantity, city, day.isoformat(), _amount(half_units), urgent)
    return Order(note=note, fields=dict(zip(KEYS, values, strict=True)))


def _unit_price(rng: random.Random) -> int:
    """Price of one piece in halves of the currency: whole from 2 to 20 in three of four cases, else with .50 from 2.50 to 9.50."""
    return 2 * rng.randint(2, 20) if rng.random() < 0.75 else 2 * rng.randint(2, 9) + 1


def _amount(half_units: int) -> int | float:
    return half_units // 2 if half_units % 2 == 0 else half_units / 2


def _spelled_price(half_units: int, rng: random.Random) -> str:
    number = str(half_units // 2) if half_units % 2 == 0 else f"{half_units // 2}.50"
    return rng.choice((f"{number} euros", f"${number}", f"{number} dollars"))


def _spelled_date(day: date, rng: random.Random) -> str:
    month = _MONTHS[day.month - 1]
    return rng.choice(
        (
            day.isoformat(),
            f"{day.day} {month} {day.year}",
            f"{month} {day.day}, {day.year}",
            f"{day.day:02d}.{day.month:02d}.{day.year}",
            f"{day.day} {month[:3]} {day.year}",
        )
    )


def _extra(other_city: str, urgent: bool, rng: random.Random) -> str:
    aside = rng.choice(_ASIDES).format(other=other_city) if rng.random() < _ASIDE_SHARE else ""
    hurry = rng.choice(_HURRIES if urgent else _CALMS)
    return "".join(f" {sentence}" for sentence in (aside, hurry) if sentence)


def _row(row_id: str, order: Order) -> dict[str, Any]:
    return {"id": row_id, "messages": order_messages(order), "source": "orders"}


def _one_line(fields: Mapping[str, Any]) -> str:
    # ASCII escapes stay on: a draft may hold half of a surrogate pair, which no UTF-8 file could take.
    return json.dumps({key: fields[key] for key in KEYS if key in fields})


def _fields(reference: str) -> dict[str, Any]:
    fields = _parse(reference)
    if fields is None or fields.keys() != set(KEYS):
        raise DataError(f"an orders reference must be a JSON object with the keys {', '.join(KEYS)}, not {reference[:80]!r}")
    return fields


def _parse(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _finite(number: str) -> float:
    """The number; a ValueError for NaN, Infinity and 1e999, which Python's parser lets through and JSON has no word for."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is not JSON")
    return value


def _wrong(got: Mapping[str, Any], truth: Mapping[str, Any]) -> list[str]:
    return [key for key in KEYS if key not in got or not _same(got[key], truth[key])]


def _same(got: object, want: object) -> bool:
    """Equal in value and JSON type; Python alone would take ``1 == True``."""
    return isinstance(got, bool) == isinstance(want, bool) and got == want


def _recovered(draft: str) -> dict[str, FieldValue]:
    found = ((key, _readable_value(key, draft)) for key in KEYS)
    return {key: value for key, value in found if value is not None}


def _readable_value(key: str, draft: str) -> FieldValue | None:
    """The first value written after ``key`` and a colon or equals sign: a closed string, a number, true or false."""
    value = r'"(?P<double>[^"\\\n]*)"|\'(?P<single>[^\'\n]*)\'|(?P<bare>-?(?:0|[1-9]\d{0,11})(?:\.\d{1,6})?\b|true\b|false\b)'
    match = re.search(rf"\b{key}[\"']?\s*[:=]\s*(?:{value})", draft, re.IGNORECASE | re.ASCII)
    if match is None:
        return None
    if match["bare"] is not None:
        plain: FieldValue = json.loads(match["bare"].lower())
        return plain
    return match["double"] if match["double"] is not None else match["single"]
