"""Metrics and events reach the files whole, the trackers under their names, and the screen as one line."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sgpo_dist.config import Config, build_config
from sgpo_dist.display import PlainDisplay, RichDisplay, SilentDisplay, Status, duration, open_display, panel, step_line
from sgpo_dist.errors import EnvironmentProblem
from sgpo_dist.evaluate.evaluation import DISPLAY_ORDER
from sgpo_dist.recorder import SHOWN_METRICS, WAIT_METRICS, Recorder, open_tracker, read_events, read_marks, read_metrics, waits_line
from sgpo_dist.records import RefusalReason
from sgpo_dist.report.report import CURVES, HEALTH_CURVES, VERDICTS
from sgpo_dist.run_directory import RunDirectory


class Screen:
    """A display that remembers."""

    def __init__(self) -> None:
        self.shown: list[Status] = []
        self.steps: list[Status] = []
        self.messages: list[str] = []
        self.closed = False

    def show(self, status: Status) -> None:
        self.shown.append(status)

    def step(self, status: Status) -> None:
        self.steps.append(status)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def close(self) -> None:
        self.closed = True


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def recorder(root: Path, screen: Screen, clock: Clock | None = None, **settings: Any) -> Recorder:
    return Recorder(root / "metrics.jsonl", root / "events.jsonl", screen, wall=lambda: 5.0, monotonic=clock or Clock(), **settings)


def test_a_step_is_one_line_of_the_metrics_file(tmp_path: Path) -> None:
    made = recorder(tmp_path, Screen())
    made.log("sft", 1, {"loss": 2.5, "rewards/margins": 1})
    made.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "time": 5.0,
        "stage": "sft",
        "step": 1,
        "loss": 2.5,
        "rewards/margins": 1.0,
    }


def test_nan_and_infinity_survive_as_valid_json(tmp_path: Path) -> None:
    made = recorder(tmp_path, Screen())
    made.log("sft", 1, {"loss": math.nan, "grad_norm": math.inf})
    made.close()
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert math.isnan(row.metrics["loss"])
    assert row.metrics["grad_norm"] == math.inf
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_line_cut_by_a_crash_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"time": 1, "stage": "sft", "step": 1, "loss": 3}\n{"time": 2, "sta')
    made = recorder(tmp_path, Screen())
    made.log("sft", 2, {"loss": 2.0})
    made.close()
    assert [(row.step, row.metrics["loss"]) for row in read_metrics(path)] == [(1, 3.0), (2, 2.0)]


def test_a_replayed_step_counts_once_with_its_later_values(tmp_path: Path) -> None:
    made = recorder(tmp_path, Screen())
    for step, loss in ((1, 3.0), (2, 2.0), (1, 2.9)):
        made.log("sft", step, {"loss": loss})
    made.close()
    assert [(row.step, row.metrics["loss"]) for row in read_metrics(tmp_path / "metrics.jsonl")] == [(2, 2.0), (1, 2.9)]


def test_events_hide_secrets_and_keep_their_fields(tmp_path: Path) -> None:
    made = recorder(tmp_path, Screen(), secrets=("hunter22",))
    made.event("worker_lost", detail="login hunter22 failed", api_key="anything", count=2, names=["hunter22"])
    made.close()
    (row,) = read_events(tmp_path / "events.jsonl")
    assert (row.time, row.kind) == (5.0, "worker_lost")
    assert row.fields == {"detail": "login [hidden] failed", "api_key": "[hidden]", "count": 2, "names": ["[hidden]"]}


def test_messages_go_to_the_screen_and_the_events(tmp_path: Path) -> None:
    screen = Screen()
    made = recorder(tmp_path, screen)
    made.message("prompts are used up")
    made.close()
    assert screen.messages == ["prompts are used up"]
    assert [(row.kind, row.fields["text"]) for row in read_events(tmp_path / "events.jsonl")] == [("message", "prompts are used up")]
    assert screen.closed


def test_the_picture_follows_steps_and_status(tmp_path: Path) -> None:
    screen, clock = Screen(), Clock()
    made = recorder(tmp_path, screen, clock, totals={"preference": 10})
    made.status(stage="preference", gate={"identical": 2})
    made.log("preference", 1, {"loss": 0.69, "rewards/accuracies": 0.5, "version": 3.0})
    clock.now += 4.0
    made.log("preference", 2, {"loss": 0.5, "time/wait_for_batch": 3.0})
    made.close()
    last = screen.steps[-1]
    assert (last.stage, last.step, last.total, last.loss, last.accuracy, last.version) == ("preference", 2, 10, 0.5, 0.5, 3)
    assert last.gate == {"identical": 2}
    assert last.waits == "learner waits for pairs 75%: raise rollout.num_rollout_workers"
    assert last.eta_s == 32.0  # 8 steps of 4 s


def test_a_new_stage_starts_from_an_empty_picture(tmp_path: Path) -> None:
    screen = Screen()
    made = recorder(tmp_path, screen)
    made.log("sft", 1, {"loss": 3.0, "rewards/margins": 0.1})
    made.log("improver", 1, {"loss": 2.0})
    made.close()
    assert (screen.steps[-1].stage, screen.steps[-1].margin) == ("improver", None)


def test_an_unknown_status_field_is_an_error(tmp_path: Path) -> None:
    made = recorder(tmp_path, Screen())
    with pytest.raises(TypeError, match="los"):
        made.status(los=1.0)
    made.close()


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"time/wait_for_batch": 3.0}, "learner waits for pairs 30%: raise rollout.num_rollout_workers"),
        (
            {"time/wait_for_batch": 1.0, "time/publish": 6.0},
            "all wait for the weights 60%, learner waits for pairs 10%: raise weights.weight_sync_interval",
        ),
        ({"perf/worker_idle": 0.4}, "workers wait for the learner 40%: raise learner.num_ranks"),
        (
            {"time/wait_for_batch": 3.0, "perf/worker_idle": 0.5},
            "workers wait for the learner 50%, learner waits for pairs 30%: raise preference.max_staleness",
        ),
        ({"time/wait_for_batch": 0.5, "perf/worker_idle": 0.05}, ""),
        ({}, ""),
    ],
)
def test_waits_line_names_the_longest_wait_first_and_the_setting_that_helps(values: dict[str, float], line: str) -> None:
    assert waits_line(values, 10.0) == line
    assert waits_line(values, None) == ""


def test_more_processes_on_cpus_are_advised_only_for_idle_cores() -> None:
    assert waits_line({"time/wait_for_batch": 3.0}, 10.0, on_cpu=True).endswith("raise rollout.num_rollout_workers, if cores are idle")
    assert waits_line({"time/publish": 6.0}, 10.0, on_cpu=True).endswith("raise weights.weight_sync_interval")


def console() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=60), out


def test_plain_lines_hold_what_is_known_and_nothing_dangerous() -> None:
    status = Status(stage="preference", step=3, total=12, loss=0.6512, accuracy=0.75, margin=0.0312, version=7, tokens_per_s=1234.4)
    assert step_line(status) == "preference 3/12  loss 0.6512  accuracy 0.75  margin +0.031  version 7  tokens/s 1,234"
    screen, out = console()
    PlainDisplay(screen, Clock()).message("[red]x\x1b[31m " + "y" * 80)
    assert out.getvalue() == "[red]x " + "y" * 80 + "\n"


def test_plain_status_lines_are_not_too_frequent() -> None:
    screen, out = console()
    clock = Clock()
    display = PlainDisplay(screen, clock)
    for pause, doing in ((0.0, "drafting 1 of 9"), (1.0, "drafting 2 of 9"), (11.0, "drafting 8 of 9"), (0.0, "checking the gate")):
        clock.now += pause
        display.show(Status(stage="improver", doing=doing))
    assert out.getvalue().splitlines() == ["improver: drafting 1 of 9", "improver: drafting 8 of 9", "improver: checking the gate"]


def test_the_panel_shows_the_whole_picture() -> None:
    out = io.StringIO()
    status = Status(
        stage="improver",
        step=3,
        total=12,
        loss=0.5,
        pairs=1200,
        workers=2,
        gate={"identical": 3, "empty": 0},
        waits="learner waits",
        eta_s=600.0,
    )
    Console(file=out, width=100).print(panel(status, "demo", ("sft", "improver", "preference")))
    text = out.getvalue()
    for part in (
        "sgpo-dist · demo",
        "✓ sft",
        "▶ improver",
        "· preference",
        "step 3/12",
        "about 10 min left",
        "1,200",
        "refused: identical 3",
        "learner waits",
    ):
        assert part in text, part
    assert "empty" not in text


def test_the_improvers_health_has_its_own_words() -> None:
    status = Status(stage="preference", step=3, win_rate=0.625, copy_rate=0.04, waits="learner waits")
    assert step_line(status) == "preference 3  improver: win rate 62%, copies 4%  learner waits"
    assert step_line(Status(stage="sft", step=3, copy_rate=0.5)) == "sft 3  improver: copies 50%"
    for width, shown in ((100, "improver: win rate 62%, copies 4%"), (24, "improver: win rate")):
        out = io.StringIO()
        Console(file=out, width=width).print(panel(status, "demo", ("preference",)))
        assert shown in out.getvalue()


def test_the_win_rate_stays_on_the_screen_until_the_next_check(tmp_path: Path) -> None:
    screen = Screen()
    made = recorder(tmp_path, screen)
    made.log("preference", 1, {"improver/win_rate": 0.7, "improver/copy_rate": 0.2})
    made.log("preference", 2, {"improver/copy_rate": 0.1})
    made.close()
    assert (screen.steps[-1].win_rate, screen.steps[-1].copy_rate) == (0.7, 0.1)


def test_rich_display_draws_and_ends() -> None:
    out = io.StringIO()
    display = RichDisplay(Console(file=out, width=100, force_terminal=True), "demo", ("sft",))
    display.step(Status(stage="sft", step=1, total=2, loss=1.25))
    display.message("a line")
    display.close()
    assert "1.2500" in out.getvalue()
    assert "a line" in out.getvalue()


def test_auto_takes_plain_lines_without_a_terminal() -> None:
    screen, _ = console()
    assert isinstance(open_display("auto", "t", (), screen, Clock()), PlainDisplay)
    assert isinstance(open_display("off", "t", (), screen, Clock()), SilentDisplay)


def test_durations() -> None:
    assert [duration(seconds) for seconds in (40, 720, 12600)] == ["40 s", "12 min", "3.5 h"]


# ---- trackers ----------------------------------------------------------------------------------------------------------------------


def settings(root: Path, *trackers: str) -> Config:
    return build_config({"output_dir": str(root), "run_name": "r", "logging": {"report_to": list(trackers), "progress": "off"}})


def test_open_wires_the_run_and_notes_the_attempt(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with RunDirectory.claim(config) as directory, Recorder.open(config, directory) as made:
        made.log("sft", 1, {"loss": 1.0})
    assert [row.kind for row in read_events(directory.events_file)] == ["attempt", "attempt_ended"]
    assert read_events(directory.events_file)[0].fields["incarnation"] == 1
    with pytest.raises(RuntimeError), RunDirectory.claim(config) as directory, Recorder.open(config, directory):
        raise RuntimeError("it broke")
    assert read_events(directory.events_file)[-1].fields == {"incarnation": 2, "reason": "RuntimeError", "detail": "it broke"}


def test_tensorboard_files_hold_the_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    config = settings(tmp_path, "tensorboard")
    with RunDirectory.claim(config) as directory:
        tracker = open_tracker("tensorboard", config, directory)
        tracker.log("preference", 4, {"rewards/margins": 0.25}, wall=9.0)
        tracker.close()
    (path,) = directory.tensorboard.iterdir()
    found = [(event.step, value.tag, value.tensor.float_val[0]) for event in EventFileLoader(str(path)).Load() for value in event.summary.value]
    assert found == [(4, "preference/rewards/margins", 0.25)]


def test_a_tracker_that_is_not_installed_is_one_clear_line(tmp_path: Path) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    config = settings(tmp_path, "wandb")
    with RunDirectory.claim(config) as directory, pytest.raises(EnvironmentProblem, match=r"pip install 'sgpo_dist\[wandb\]'"):
        open_tracker("wandb", config, directory, absent)


class Wandb:
    """What of the wandb package is used."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.logged: list[dict[str, Any]] = []
        self.axes: list[tuple[str, str]] = []

    def init(self, **asked: Any) -> Wandb:
        self.asked = asked
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        self.logged.append(row)

    def finish(self) -> None:
        self.logged.append({"finished": True})


def test_wandb_continues_its_run_after_a_resume(tmp_path: Path) -> None:
    config = settings(tmp_path, "wandb")
    first, second = Wandb(), Wandb()
    for package in (first, second):
        with RunDirectory.claim(config) as directory:
            tracker = open_tracker("wandb", config, directory, lambda _, package=package: package)  # type: ignore[misc]
            tracker.log("sft", 2, {"loss": 1.5}, wall=0.0)
            tracker.close()
    assert first.asked["id"] == second.asked["id"]
    assert first.asked["resume"] == "allow"
    assert first.axes == [("sft/*", "sft/step")]
    assert first.logged == [{"sft/step": 2, "sft/loss": 1.5}, {"finished": True}]


def test_the_metrics_page_explains_what_is_shown_and_drawn() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    drawn = {metric for _, _, metrics in CURVES + HEALTH_CURVES for metric in metrics}
    named = {*SHOWN_METRICS, *WAIT_METRICS, "faults/restarts", "time/ettr", *drawn, *VERDICTS, *DISPLAY_ORDER, *RefusalReason}
    assert sorted(name for name in named if f"`{name}`" not in page) == []


# ---- what faults cost ------------------------------------------------------------------------------------------------------------------


def test_every_step_says_how_much_of_the_time_was_useful_over_all_attempts(tmp_path: Path) -> None:
    screen, wall = Screen(), Clock()

    def attempt() -> Recorder:
        return Recorder(tmp_path / "m.jsonl", tmp_path / "e.jsonl", screen, wall=wall, monotonic=Clock())

    first = attempt()
    first.event("attempt")
    wall.now = 110.0
    first.event("version_published")
    first.log("sft", 1, {})
    first.close()  # as a kill leaves it
    wall.now = 120.0
    second = attempt()
    second.event("attempt")
    wall.now = 130.0
    second.event("version_published")
    wall.now = 140.0
    second.log("sft", 2, {})
    second.say_faults()
    second.close()
    rows = read_metrics(tmp_path / "m.jsonl")
    assert [(row.metrics["faults/restarts"], row.metrics["time/ettr"]) for row in rows] == [(0.0, 1.0), (1.0, 0.5)]  # 20 of 40 s lost
    assert screen.messages == ["lost on the way: driver 1; useful time 50.0% of 40 s"]


def test_the_files_give_every_row_of_a_repeated_step_in_time_order(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text('{"time": 2, "kind": "learner_lost", "reason": "x"}\n{"time": 5, "kind": "checkpoint", "step": 1}\n')
    (tmp_path / "m.jsonl").write_text('{"time": 1, "stage": "sft", "step": 1}\n{"time": 4, "stage": "sft", "step": 1, "loss": 2}\n{"time": 6}\n')
    found = read_marks(tmp_path / "e.jsonl", tmp_path / "m.jsonl")
    assert [(mark.time, mark.kind, mark.fields.get("step")) for mark in found] == [
        (1.0, "step", 1),
        (2.0, "learner_lost", None),
        (4.0, "step", 1),
        (5.0, "checkpoint", 1),
    ]
