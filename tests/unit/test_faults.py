"""What faults cost, worked out by hand."""

from __future__ import annotations

import pytest

from sgpo_dist.faults import STEP, Fault, Mark, Summary, Tally, fault_lines, summarise, summary_line


def marks(*rows: tuple[object, ...]) -> list[Mark]:
    """(time, kind) or (time, kind, fields); (time, step number) is a step of the preference stage."""
    found = []
    for row in rows:
        time, what, fields = row[0], row[1], row[2] if len(row) > 2 else {}
        if isinstance(what, int):
            what, fields = STEP, {"stage": "preference", "step": what}
        found.append(Mark(float(time), str(what), fields))  # type: ignore[arg-type]
    return found


def up(time: float, worker: str) -> tuple[object, ...]:
    return time, "worker_started", {"worker": worker}


def lost(time: float, worker: str, reason: str = "its process died") -> tuple[object, ...]:
    return time, "worker_lost", {"worker": worker, "reason": reason}


BEGUN = ((0, "attempt"), up(10, "rollout-0.1.1"), (12, "version_published"))


def test_a_run_without_faults_is_useful_from_the_first_second() -> None:
    summary = summarise(marks(*BEGUN, (20, 1), (30, 2), (40, "attempt_ended", {"reason": "done"})))
    assert summary == Summary(wall_s=40.0)
    assert (summary.ettr, summary_line(summary)) == (1.0, "")
    assert summarise([]).ettr == 1.0


def test_a_rebuilt_learner_costs_its_absence_and_what_is_trained_again() -> None:
    rows = marks(*BEGUN, (20, 1), (30, 2), (35, "learner_lost", {"reason": "hung"}), (50, "learner_rebuilt"), (60, 2), (70, 3), (100, 4))
    summary = summarise(rows)
    assert summary.faults == (Fault("learner", "hung", 35.0, 50.0),)
    assert (summary.away_s, summary.repeated_s, summary.repeated_steps) == (15.0, 10.0, 1)  # 35 to 50, 50 to 60
    assert summary.ettr == pytest.approx(0.75)


def test_a_killed_driver_is_away_from_its_last_sign_of_life_to_the_next_version() -> None:
    rows = marks(*BEGUN, (20, 1), (30, 2), (60, "attempt"), up(70, "rollout-0.2.1"), (75, "version_published"), (80, 1), (85, 2), (100, 3))
    summary = summarise(rows)
    assert summary.faults == (Fault("driver", "killed", 30.0, 75.0),)
    assert (summary.wall_s, summary.away_s, summary.repeated_s, summary.repeated_steps) == (100.0, 45.0, 10.0, 2)


def test_a_wanted_stop_is_no_fault_and_the_pause_after_it_is_no_time_of_the_run() -> None:
    rows = marks(*BEGUN, (20, 1), (30, "attempt_ended", {"reason": "StoppedOnRequest"}), (1030, "attempt"), (1040, "version_published"), (1050, 2))
    summary = summarise(rows)
    assert (summary.faults, summary.wall_s, summary.ettr) == ((), 50.0, 1.0)
    failed = summarise([Mark(mark.time, mark.kind, {"reason": "RunFailed"}) if mark.kind == "attempt_ended" else mark for mark in rows])
    assert failed.faults == (Fault("driver", "RunFailed", 30.0, 1040.0),)
    assert (failed.wall_s, failed.away_s) == (1050.0, 1010.0)


def test_a_driver_that_is_killed_before_it_is_up_prolongs_the_absence_once() -> None:
    summary = summarise(marks(*BEGUN, (30, 1), (50, "attempt"), (60, "attempt"), (70, "version_published"), (80, 2)))
    assert [fault.seconds for fault in summary.faults] == [40.0, 20.0]  # from 30 and from 50
    assert summary.away_s == 40.0


def test_a_lost_worker_costs_time_only_when_none_is_left() -> None:
    two = (*BEGUN, up(12, "rollout-1.1.2"))
    one_left = summarise(marks(*two, lost(20, "rollout-1.1.2"), up(50, "rollout-1.1.3"), (60, 1)))
    assert (one_left.away_s, [fault.seconds for fault in one_left.faults]) == (0.0, [30.0])
    none_left = summarise(marks(*two, lost(20, "rollout-1.1.2"), lost(30, "rollout-0.1.1"), up(45, "rollout-1.1.3"), up(70, "rollout-0.1.4")))
    assert none_left.away_s == 15.0
    assert [fault.seconds for fault in none_left.faults] == [25.0, 40.0]
    failed_start = summarise(marks(*BEGUN, lost(20, "rollout-0.1.1"), lost(40, "rollout-0.1.2", "no start"), up(60, "rollout-0.1.3")))
    assert [(fault.cause, fault.seconds) for fault in failed_start.faults] == [("its process died", 40.0), ("no start", 20.0)]
    assert failed_start.away_s == 40.0


def test_a_worker_that_leaves_its_node_in_good_order_is_no_fault_but_may_be_the_last() -> None:
    summary = summarise(marks(*BEGUN, (20, "worker_leaves", {"worker": "rollout-0.1.1"}), up(50, "rollout-0.1.2"), (60, 1)))
    assert (summary.faults, summary.away_s) == ((), 30.0)


def test_seconds_are_lost_once_whatever_is_away() -> None:
    rows = (*BEGUN, lost(20, "rollout-0.1.1"), (25, "learner_lost", {"reason": "x"}), up(40, "rollout-0.1.2"), (50, "learner_rebuilt"), (60, 1))
    assert summarise(marks(*rows)).away_s == 30.0
    assert summarise(marks(*rows[:5]), now=45.0).away_s == 25.0  # still away: up to now
    again = summarise(marks(*BEGUN, (15, 1), lost(20, "rollout-0.1.1"), (30, 1), up(40, "rollout-0.1.2"), (50, 2)))
    assert (again.away_s, again.repeated_s, again.repeated_steps) == (20.0, 0.0, 1)  # trained again while no worker was there
    killed = (*rows[:5], (70, "attempt"), (80, "version_published"), (100, 1))
    assert summarise(marks(*killed)).away_s == 60.0  # 20 to 80
    assert summarise(marks(*killed)).faults[1].mended is None  # the learner of the dead attempt never came back


def test_a_worker_lost_while_it_is_stopped_and_marks_before_any_attempt_are_nothing() -> None:
    assert summarise(marks((0, "version_published"), *BEGUN, lost(20, "rollout-0.1.1", "while stopping: late"))).faults == ()


def test_lines_group_by_role_and_cause_without_what_a_log_said() -> None:
    faults = [Fault("worker", "its process died", 0.0, seconds) for seconds in (10.0, 30.0, 11.0)] + [Fault("learner", "hung", 5.0)]
    summary = Summary(tuple(faults), 200.0, 50.0, 10.0, 3)
    assert fault_lines(summary)[1:] == [["worker", "its process died", "3", "11.0 s", "30.0 s"], ["learner", "hung", "1", "-", "-"]]
    assert summary_line(summary) == "lost on the way: worker 3, learner 1; useful time 70.0% of 200 s, 3 steps trained again"
    tally = Tally()
    for mark in marks(*BEGUN, (20, "learner_lost", {"reason": "step failed; its log: RuntimeError: 7"})):
        tally.see(mark)
    assert tally.summary().faults[0].cause == "step failed"
