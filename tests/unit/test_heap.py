"""When the learner's freed pages go back, by a script of resident sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from learner.heap import ALLOCATOR, HeapBound

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("sizes", "returned_after"),
    [
        ([100, 110, 120, 125, 125], []),  # within the bound
        ([100, 126, 100, 125, 126, 100], [2, 5]),  # over it: the step after each return says again what a fresh heap needs
        ([100, 130, 130, 160, 162], [2]),  # steps have grown for good: what a fresh heap needs grows with them
        ([160, 100, 190, 200], []),  # the first step needed most
    ],
)
def test_freed_pages_go_back_once_they_outgrow_what_a_step_on_a_fresh_heap_needs(sizes: list[int], returned_after: list[int]) -> None:
    assert steps_that_return(sizes, short=()) == returned_after


def test_freed_pages_go_back_after_every_step_while_the_machine_is_short_of_memory() -> None:
    assert steps_that_return([100] * 6, short=(3, 4)) == [3, 4]


def steps_that_return(sizes: list[int], short: tuple[int, ...]) -> list[int]:
    """After which steps (from 1) of these resident sizes freed pages went back, memory being short after those of ``short``."""
    steps, returned = iter(sizes), list[int]()
    bound = HeapBound(lambda: next(steps), lambda: returned.append(number), lambda: number in short)
    for number in range(1, len(sizes) + 1):  # noqa: B007 the closures above read it
        bound.after_step()
    return returned


def test_the_settings_keep_freed_pages_and_return_freed_gives_them_back() -> None:
    """In a process of its own, because the C library reads its settings at the start."""
    work = """
from learner.heap import resident, return_freed
before = resident()
blocks = [bytearray(2**20) for _ in range(200)]
pin = bytearray(2**16)
del blocks
kept = resident() - before
return_freed()
print(kept, resident() - before)
"""
    found = subprocess.run([sys.executable, "-c", work], env=os.environ | ALLOCATOR, cwd=ROOT, capture_output=True, text=True, check=True)
    kept, left = map(int, found.stdout.split())
    assert kept > 150 * 2**20 > 50 * 2**20 > left
