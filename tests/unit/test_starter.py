"""The starter data: generator, scores and repair hook of ``orders``, content rules of ``chat``."""

from __future__ import annotations

import json
import re
from itertools import combinations

import pytest

from sgpo_dist.errors import DataError
from sgpo_dist.starter import chat, orders

REFERENCE = '{"name": "Ann Lee", "item": "mugs", "quantity": 4, "city": "Oslo", "date": "2027-03-05", "price": 18, "urgent": true}'
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
WORDS = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12,
}  # fmt: skip


def reference_with(**changes: object) -> str:
    return json.dumps(json.loads(REFERENCE) | changes)


# orders: the generator


def test_the_same_seed_gives_the_same_orders_and_a_longer_call_only_adds() -> None:
    assert orders.generate_orders(20, 7)[:8] == orders.generate_orders(8, 7)
    assert not {o.note for o in orders.generate_orders(200, 7)} & {o.note for o in orders.generate_orders(200, 8)}


def test_first_train_row_is_this_text_on_every_machine() -> None:
    row = orders.rows("train")[0]
    assert row["id"] == "orders-train-001"
    assert row["messages"][0]["content"].endswith(
        "\n\nIvan Martin rang this morning and wants eleven extension cords in Warsaw. Price $7.50 each, delivery 2028-10-28. "
        "The goods are still in Berlin. It is urgent."
    )
    assert row["reference"] == (
        '{"name": "Ivan Martin", "item": "extension cords", "quantity": 11, "city": "Warsaw", '
        '"date": "2028-10-28", "price": 7.5, "urgent": true}'
    )


def read_date(note: str) -> str:
    """ISO date of a note, read by rules written apart from the generator's."""
    if iso := re.search(r"\d{4}-\d\d-\d\d", note):
        return iso[0]
    if dotted := re.search(r"(\d\d)\.(\d\d)\.(\d{4})", note):
        return f"{dotted[3]}-{dotted[2]}-{dotted[1]}"
    month = "(" + "|".join(MONTHS) + ")"
    if day_first := re.search(rf"(\d+) {month}[a-z]* (\d{{4}})", note):
        return f"{day_first[3]}-{MONTHS.index(day_first[2]) + 1:02d}-{int(day_first[1]):02d}"
    month_first = re.search(rf"{month}[a-z]* (\d+), (\d{{4}})", note)
    assert month_first is not None, note
    return f"{month_first[3]}-{MONTHS.index(month_first[1]) + 1:02d}-{int(month_first[2]):02d}"


def test_every_field_can_be_read_back_from_the_note() -> None:
    for order in orders.generate_orders(600, 3):
        note, fields = order.note, order.fields
        count = re.search(rf"(\w+) {fields['item']}", note)
        price = re.search(r"\$(\d+(?:\.50)?)|(\d+(?:\.50)?) (?:euros|dollars)", note)
        assert count is not None
        assert price is not None
        quantity = WORDS.get(count[1]) or int(count[1])
        assert fields["quantity"] == quantity
        assert fields["price"] == float(price[1] or price[2])
        assert fields["date"] == read_date(note)
        assert str(fields["name"]) in note
        assert re.search(rf"(to|to our|in|for|Ship to:|^) ?{fields['city']}\b", note), note
        urgent = "not urgent" not in note and re.search(r"urgent|rush this|cannot wait", note, re.IGNORECASE) is not None
        assert fields["urgent"] is urgent


def test_generator_uses_its_whole_range() -> None:
    batch = orders.generate_orders(600, 3)
    notes = [order.note for order in batch]
    openings = ("Voice mail", "Sticky note", "Dear team", "Order form", "hey it's", "By ", "Please pack", "Met ")
    assert all(any(note.startswith(opening) for note in notes) for opening in openings)
    assert any("rang this morning" in note for note in notes)
    assert any("is waiting for" in note for note in notes)
    assert {order.fields["quantity"] for order in batch} == set(range(2, 13))
    distractors = sum(any(aside in note for aside in ("bill goes", "still in", "call came", "time not to")) for note in notes)
    assert 180 < distractors < 300  # 0.4 of 600 is 240, five standard errors are 60
    assert 240 < sum(order.fields["urgent"] is True for order in batch) < 360
    assert any(isinstance(order.fields["price"], float) for order in batch)


def test_splits_have_their_sizes_and_share_no_note() -> None:
    splits = {split: orders.rows(split) for split in ("train", "validation", "heldout")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 48, "validation": 64, "heldout": 128}
    everything = [*splits["train"], *splits["validation"], *splits["heldout"], *orders.bare_prompts(300, 0), *orders.bare_prompts(300, 101)]
    assert len({row["messages"][0]["content"] for row in everything}) == 48 + 64 + 128 + 600
    assert len({row["id"] for row in everything}) == len(everything)


def test_bare_prompts_have_no_reference() -> None:
    assert all(row.keys() == {"id", "messages", "source"} for row in orders.bare_prompts(3))


def test_unseen_passes_over_taken_notes() -> None:
    first, second, third = orders.generate_orders(3, 1)
    assert list(orders.unseen([first, second, third, second], {second.note})) == [first, third]


def test_unknown_split_and_negative_seed_are_refused() -> None:
    with pytest.raises(DataError, match="bare_prompts"):
        orders.rows("prompts")
    with pytest.raises(DataError, match="-1"):
        orders.bare_prompts(1, seed=-1)
    with pytest.raises(DataError, match="train, heldout"):
        chat.rows("test")


def test_order_texts_stay_short() -> None:
    batch = orders.generate_orders(600, 4)
    assert max(len(orders.order_messages(order)[0]["content"].split()) for order in batch) <= 60
    assert max(len(orders.reference_text(order)) for order in batch) <= 150
    assert all("\n" not in orders.reference_text(order) for order in batch)


# orders: the scores


def test_field_score_on_hand_made_answers() -> None:
    assert orders.field_score(f"  {REFERENCE}\n", REFERENCE) == 1.0
    assert orders.field_score(reference_with(price=18.0, quantity="4"), REFERENCE) == pytest.approx(6 / 7)  # only the quoted 4 is wrong
    # 1 is not true, and the date is missing
    two_wrong = '{"urgent": 1, "name": "Ann Lee", "item": "mugs", "quantity": 4, "city": "Oslo", "price": 18}'
    assert orders.field_score(two_wrong, REFERENCE) == pytest.approx(5 / 7)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "4",
        f"Here it is: {REFERENCE}",
        REFERENCE[:-1],
        REFERENCE.replace("18", "NaN"),
        REFERENCE.replace("18", "1e999"),
        "[" * 100_000,
    ],
    ids=["empty", "list", "number", "talk", "cut", "nan", "infinite", "deep"],
)
def test_what_is_not_one_json_object_scores_nothing(text: str) -> None:
    assert orders.field_score(text, REFERENCE) == 0.0
    assert not orders.exact(text, REFERENCE)


def test_exact_wants_all_seven_and_no_other_key() -> None:
    assert orders.exact(REFERENCE, REFERENCE)
    assert not orders.exact(reference_with(city="Rome"), REFERENCE)
    assert orders.field_score(reference_with(note="hi"), REFERENCE) == 1.0
    assert not orders.exact(reference_with(note="hi"), REFERENCE)


def test_a_reference_that_is_no_order_is_refused() -> None:
    with pytest.raises(DataError, match="keys name, item"):
        orders.field_score(REFERENCE, '{"name": "Ann Lee"}')


# orders: the repair hook


def test_repair_leaves_an_exact_draft_alone() -> None:
    assert orders.repair(REFERENCE, REFERENCE, "") is None
    assert orders.repair(REFERENCE.replace(", ", ",\n "), REFERENCE, "") is None


def test_repair_corrects_the_first_three_wrong_fields_and_keeps_the_others() -> None:
    draft = reference_with(item="cups", quantity=5, city="Rome", price=20, urgent=False)  # five wrong
    fixed = '{"name": "Ann Lee", "item": "mugs", "quantity": 4, "city": "Oslo", "date": "2027-03-05", "price": 20, "urgent": false}'
    assert orders.repair(draft, REFERENCE, "") == fixed
    assert orders.repair(fixed, REFERENCE, "") == REFERENCE  # two were left


def test_repair_counts_a_missing_key_as_wrong_and_drops_foreign_ones() -> None:
    assert orders.repair('{"note": 1}', REFERENCE, "") == '{"name": "Ann Lee", "item": "mugs", "quantity": 4}'
    assert orders.repair(reference_with(note="hi"), REFERENCE, "") == REFERENCE


def test_repair_of_a_cut_draft_fills_the_unreadable_fields_first() -> None:
    draft = '{"name": "Bo Lee", "item": "mugs", "quantity": 5, "city": "Oslo", "date": "2027-0'  # three unreadable, two wrong
    fixed = '{"name": "Bo Lee", "item": "mugs", "quantity": 5, "city": "Oslo", "date": "2027-03-05", "price": 18, "urgent": true}'
    assert orders.repair(draft, REFERENCE, "") == fixed


def test_repair_reads_loose_spellings() -> None:
    draft = "Name: 'Ann Lee', item = \"mugs\", quantity: 04, city: \"Oslo\", date: '2027-03-05', price: 18, urgent: True"  # 04 is no number
    assert orders.repair(draft, REFERENCE, "") == REFERENCE
    assert orders.repair(f"Here it is: {REFERENCE}", REFERENCE, "") == REFERENCE


def test_repair_of_a_hopeless_draft_is_the_reference() -> None:
    assert orders.repair("I am sorry, I cannot do that.", REFERENCE, "") == REFERENCE
    three_readable = '{"name": "Bo Lee", "item": "cups", "quantity": 5, "city'
    assert orders.repair(three_readable, REFERENCE, "") == REFERENCE


def test_repair_never_lets_an_unwritable_text_through() -> None:
    draft = reference_with(name="\ud800", item="cups", quantity=1, city="\ud800", price=1, urgent="\ud800")
    assert orders.repair(draft, REFERENCE, "").encode("utf-8")  # type: ignore[union-attr]


@pytest.mark.parametrize("wrong", range(1, 8))
def test_repair_gains_at_most_three_fields(wrong: int) -> None:
    draft = reference_with(**dict.fromkeys(orders.KEYS[7 - wrong :], "?"))
    repaired = orders.repair(draft, REFERENCE, "")
    assert repaired is not None
    assert orders.field_score(draft, REFERENCE) == pytest.approx((7 - wrong) / 7)
    assert orders.field_score(repaired, REFERENCE) == pytest.approx((7 - wrong + min(3, wrong)) / 7)


# chat


def chat_rows() -> list[dict[str, str]]:
    return [*chat.rows("train"), *chat.rows("heldout")]


def test_chat_files_have_enough_rows_of_the_schema() -> None:
    assert len(chat.rows("train")) == 190
    assert len(chat.rows("heldout")) == 81
    assert all(list(row) == ["id", "prompt", "reference", "source"] and row["source"] == "chat" for row in chat_rows())
    assert len({row["id"] for row in chat_rows()}) == 271


def test_chat_texts_are_short_complete_and_plain() -> None:
    for row in chat_rows():
        assert len(row["prompt"].split()) <= 40, row["id"]
        assert 3 <= len(row["reference"].split()) <= 60, row["id"]
        assert re.search(r'[.!?]"?$', row["reference"]), row["id"]
        assert re.search(r'[.!?]"?$', row["prompt"]), row["id"]
        assert row["prompt"] == row["prompt"].strip()
        assert row["reference"] == row["reference"].strip()
        assert not re.search(r"[#*`<>]", row["prompt"] + row["reference"]), row["id"]


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9']+", text.lower()))


@pytest.mark.parametrize(("column", "limit"), [("prompt", 0.55), ("reference", 0.35)])
def test_no_chat_row_is_nearly_another(column: str, limit: float) -> None:
    bags = [(row["id"], words(row[column])) for row in chat_rows()]
    near = [(a, b) for (a, x), (b, y) in combinations(bags, 2) if len(x & y) > limit * len(x | y)]
    assert near == []
