"""The staleness arithmetic, with numbers worked out by hand."""

from __future__ import annotations

import pytest

from sgpo_dist.buffer.admission import Admission, Hold, Tally


def admission(batch=2, interval=1, staleness=1, max_pairs=None, base=0):
    return Admission(batch, interval, staleness, max_pairs, base)


def tally(waiting=10, leased=None, ready=None, assigned=0, trained=0, refused=0):
    return Tally(waiting, leased or {}, ready or {}, assigned, trained, refused)


def test_capacity_is_derived():
    assert admission(batch=4, interval=3, staleness=1).capacity == 24
    assert admission(batch=4, interval=1, staleness=0).capacity == 4
    assert admission(staleness=None).capacity is None


def test_last_step_of_a_version():
    rules = admission(interval=2, staleness=1, base=5)
    # Version 5 is trained in steps 1-2, version 6 in steps 3-4: a pair of version 5 may wait until step 4, one of version 6 until step 6.
    assert rules.last_step(5) == 4
    assert rules.last_step(6) == 6
    assert [rules.train_version(step, 5) for step in (1, 2, 3, 4, 5)] == [5, 5, 6, 6, 7]
    assert rules.train_version(1, 9) == 9  # a driver ahead of lockstep
    assert rules.oldest_allowed(5, 5) == 6


def test_room_shrinks_with_what_was_started_and_grows_with_versions():
    rules = admission(batch=2, staleness=1)
    assert rules.room(tally(), current=0) == 4
    assert rules.room(tally(leased={0: 3}), current=0) == 1
    assert rules.room(tally(leased={0: 1}, ready={0: 1}, assigned=2), current=0) == 0
    assert rules.room(tally(leased={0: 1}, ready={0: 1}, trained=2), current=1) == 2
    assert rules.room(tally(refused=3), current=0) == 4  # a refusal gives its place back


def test_max_pairs_bounds_room_too():
    assert admission(staleness=None, max_pairs=5).room(tally(leased={0: 2}, trained=2), current=0) == 1
    assert admission(staleness=1, max_pairs=3).room(tally(), current=0) == 3
    assert admission(staleness=None).room(tally(leased={0: 1000}), current=0) is None


def test_room_is_never_negative_after_a_resume():
    assert admission(batch=2, staleness=0).room(tally(assigned=8), current=1) == 0


def test_exhausted_needs_everything_settled():
    assert admission().exhausted(tally(waiting=0))
    assert not admission().exhausted(tally(waiting=0, leased={0: 1}))
    assert not admission().exhausted(tally(waiting=1))
    assert admission(max_pairs=2).exhausted(tally(waiting=9, trained=2))


def test_no_short_batch():
    assert admission(batch=2).hopeless(tally(waiting=0, ready={0: 1}))
    assert not admission(batch=2).hopeless(tally(waiting=0, ready={0: 2}))


def test_hold_says_why():
    rules = admission(batch=2, staleness=1)
    assert rules.hold(tally(ready={0: 1}), 1, 0) is Hold.PAIRS
    assert rules.hold(tally(ready={0: 2}), 1, 0) is None
    # Four pairs started at version 0, all trained in steps 1 and 2, and version 1 never published: nothing can come.
    assert rules.hold(tally(assigned=4), 3, 0) is Hold.VERSION


def test_synchronous_waits_for_all_of_the_version():
    rules = admission(batch=2, interval=2, staleness=0)
    assert rules.hold(tally(leased={0: 1}, ready={0: 3}), 1, 0) is Hold.SETTLING
    assert rules.hold(tally(ready={0: 3}), 1, 0) is Hold.SETTLING  # one more place, and prompts wait for it
    assert rules.hold(tally(waiting=0, ready={0: 3}), 1, 0) is None
    assert rules.hold(tally(ready={0: 4}), 1, 0) is None


def test_an_overtaken_pair_would_be_trained_too_late():
    """The example of the docstring: S = 2, B = K = 1; a was trained at step 1, b and c are in generation since version 0, d is ready."""
    rules = admission(batch=1, staleness=2)
    in_flight = tally(leased={0: 2}, ready={1: 1}, assigned=1)
    # Step 2 with d leaves b and c, and version 0 is fresh enough in step 3 only: one of them would come too late.
    assert rules.hold(in_flight, 2, 1) is Hold.IN_FLIGHT
    assert rules.hold(tally(leased={0: 1}, ready={0: 1, 1: 1}, assigned=1), 2, 1) is None  # b can go first, c keeps step 3
    assert rules.hold(tally(leased={0: 1}, ready={1: 1}, assigned=1), 2, 1) is None


def test_no_bound_never_holds_for_age():
    assert admission(batch=1, staleness=None).hold(tally(leased={0: 99}, ready={7: 1}), 50, 9) is None


@pytest.mark.parametrize(("unused", "fits"), [({0: 2}, True), ({0: 3}, False), ({1: 4}, True), ({0: 2, 1: 3}, False), ({}, True)])
def test_fits_is_the_invariant(unused, fits):
    # B = 2, K = 1, S = 1, one step formed: version 0 has step 2 left (2 pairs), versions 0 and 1 have steps 2-3 (4 pairs).
    assert admission(batch=2, staleness=1).fits(unused, steps_formed=1) is fits
