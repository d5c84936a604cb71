"""The fault matrix: the page is what its results say, every fault has a test, and results merge as they should."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.fault_matrix import BEGIN, END, FAULTS, PAGE, RESULTS, ROOT, Result, is_test, merged, read_results, table, with_table, write_results

MARKER = re.compile(r"mark\.fault\(([\d, ]+), invariants=")


def result(outcome: str = "passed", row: int = 4, date: str = "2026-11-25", **times: float) -> Result:
    seconds = {int(name.removeprefix("row")): value for name, value in times.items()}
    return Result(outcome, {row: ["I7", "I8"]}, date, "abc", "2 cores", seconds)


def cells(results: dict[str, Result], row: int) -> list[str]:
    line = next(line for line in table(results).splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_is_what_the_results_say() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page, read_results(RESULTS)), "python tools/fault_matrix.py writes it again"


def test_every_fault_has_a_test_and_every_result_is_of_one() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    marked = {int(row) for source in sources for rows in MARKER.findall(source) for row in rows.split(",")}
    assert marked == set(FAULTS) == set(range(1, 31))
    assert [test for test in read_results(RESULTS) if not is_test(test)] == []


def test_a_row_names_its_tests_what_they_check_the_span_of_their_times_and_the_last_date() -> None:
    one, other = "tests/unit/test_a.py::test_one", "tests/chaos/test_b.py::test_two"
    found = cells({one: result(row4=3.24), other: result(row4=41.7, date="2026-11-26")}, 4)
    assert found[3:] == ["`chaos/test_b.py::test_two`, `unit/test_a.py::test_one`", "I7 I8", "3.2 to 42 s", "2026-11-26"]


def test_a_row_without_a_passing_test_says_so() -> None:
    assert cells({}, 4)[3:] == ["**no passing test**", "-", "-", "-"]
    found = cells({"tests/unit/test_a.py::test_one": result("failed", row4=3.0)}, 4)
    assert found[3:] == ["**no passing test**; **failed**: `unit/test_a.py::test_one`", "-", "-", "-"]


def test_new_results_win_and_what_was_skipped_or_did_not_run_keeps_what_it_had() -> None:
    here = "tests/unit/test_fault_matrix.py::"
    page, row, gone, unmarked = (f"{here}{name}" for name in ("test_the_page_is_what_the_results_say", "result", "test_gone", "cells"))
    old = {page: result(), row: result(), gone: result(), unmarked: result()}
    assert merged(old, {}, []) == {page: result(), row: result(), unmarked: result()}
    assert merged(old, {page: result("failed"), row: result("skipped")}, [page, row, unmarked]) == {page: result("failed"), row: result()}
    assert merged({}, {row: result("skipped")}, [row]) == {row: result("skipped")}


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    results = {"b": result(row4=1.5), "a": result("failed", row=30)}
    write_results(tmp_path / "results.json", results)
    assert read_results(tmp_path / "results.json") == results
    assert read_results(tmp_path / "none.json") == {}


def test_only_what_stands_between_the_marks_is_written() -> None:
    page = with_table(f"before\n{BEGIN}\nold\n{END}\nafter\n", {})
    assert (page.startswith(f"before\n{BEGIN}\n| # |"), page.endswith(f"|\n{END}\nafter\n"), "old\n" in page) == (True, True, False)
    with pytest.raises(ValueError, match="end of the fault matrix"):
        with_table(BEGIN, {})
