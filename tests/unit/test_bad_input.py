"""Bad input and hostile text: one clear line, the right exit code, nothing lost or changed, nothing secret or harmful on the screen."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bad_input_cases import CASES, HOSTILE, Case
from fabricated_run import NoScreen, fabricate, run_config
from rich.console import Console

from sgpo_dist.buffer.codec import pack_text
from sgpo_dist.cli import main
from sgpo_dist.cli.main import guarded
from sgpo_dist.cli.session import Session
from sgpo_dist.display import PlainDisplay, Status, panel
from sgpo_dist.evaluate.exports import Answer, alpaca_rows, answer_rows, write_lines, write_list
from sgpo_dist.recorder import Recorder
from sgpo_dist.records import Completion, FinishReason, Message, Prompt
from sgpo_dist.report.report import write_report
from sgpo_dist.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]


def outcome(case: Case, root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    """(exit code, standard error, standard output) of a case; a function's error goes through the command line's own door."""
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(root)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    made = case.make(root)
    before = contents(root)
    out, err = io.StringIO(), io.StringIO()
    session = Session(Console(file=out, width=200), Console(file=err, width=200), {})
    code = guarded(made, session) if isinstance(made, tuple) else through_the_door(made, session, monkeypatch)
    assert contents(root) == before
    return code, unplaced(err.getvalue(), root), out.getvalue()


def unplaced(text: str, root: Path) -> str:
    """Without what differs from machine to machine."""
    text = text.replace(str(root), "DIR").replace(f"(pid {os.getpid()})", "(pid N)")
    return re.sub(r"[\d.]+(?= GiB is free:)|(?<=the machine has )[\d.]+|\d+(?= here:)", "N", text)


def through_the_door(call: Callable[[], object], session: Session, monkeypatch: pytest.MonkeyPatch) -> int:
    """The call stands where a command's work would."""
    monkeypatch.setattr(main, "run_command", lambda *_: call() or 0)
    return guarded((), session)


def contents(root: Path) -> dict[str, bytes | str]:
    """Every file's bytes and every link's aim; left out are locks (they name the process that holds them) and SQLite's index beside a database."""
    return {
        str(path.relative_to(root)): str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        for path in root.rglob("*")
        if path.name != "run.lock" and not path.name.endswith(("-shm", "-wal"))
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}: {case.given[:40]}")
def test_bad_input_is_refused_in_one_line_and_changes_nothing(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, line, _ = outcome(case, tmp_path, monkeypatch)
    assert line == f"sgpo-dist: error: {case.line}\n"
    assert code == case.code


def test_there_is_no_line_that_hides_what_went_wrong() -> None:
    assert len({(case.kind, case.given) for case in CASES}) == len(CASES) >= 24
    assert [case.line for case in CASES if "unexpected" in case.line or "Traceback" in case.line or len(case.line) < 15] == []


def test_the_page_is_current() -> None:
    specification = importlib.util.spec_from_file_location("bad_input_table", ROOT / "tools" / "bad_input_table.py")
    assert specification is not None
    assert specification.loader is not None
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(), "run: python tools/bad_input_table.py"


FILES = (
    "run.json",
    "run.lock",
    "config.resolved.yaml",
    "metrics.jsonl",
    "events.jsonl",
    "evaluation.json",
    "chaos.json",
    "buffer.db",
    "checkpoints/latest",
)
DEEP = 1_200
"""Levels that Python's JSON does not go down to. YAML's reader gives up after half of it, and takes four times as long for all of it."""
RUBBISH = (b"\xff\xfe\x00", b"[" * DEEP, b'{"rows": {"time": 1}, "time": NaN, "kind": 1}', b"model: 1\ndata: 2\nstages: 3\nseed: 4\n")


@pytest.mark.parametrize("name", FILES)
def test_rubbish_in_a_file_of_a_run_is_named_or_passed_over(name: str, finished: Path, tmp_path: Path) -> None:
    """Whatever reads it: a result, or one line that names the file, and never a surprise."""
    run = tmp_path / "demo"
    shutil.copytree(finished, run)
    for number, rubbish in enumerate(RUBBISH):
        (run / name).write_bytes(rubbish[: DEEP // 2] if name.endswith(".yaml") else rubbish)
        for command in (
            ("status",),
            ("samples",),
            ("audit",),
            ("report", "--to", str(tmp_path / "r")),
            ("export", "--to", str(tmp_path / f"m{number}")),
        ):
            err = io.StringIO()
            code = guarded((command[0], str(run), *command[1:]), Session(Console(file=io.StringIO()), Console(file=err, width=400), {}))
            assert "unexpected" not in err.getvalue()
            assert err.getvalue() == "" or (err.getvalue().count("\n") == 1 and Path(name).name in err.getvalue() and code > 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fabricate(tmp_path_factory.mktemp("finished")).path


# ---- hostile text --------------------------------------------------------------------------------------------------------------------

ALL = "\n".join(one.text for one in HOSTILE)
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
"""The program's own colours, the only escapes that a terminal may get."""
HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]")
TOKEN = "hf_abcdefghijklmnopqrstuvwx"


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run whose prompts, texts, sources, refusals, events and metrics are all hostile."""
    directory = fabricate(tmp_path_factory.mktemp("runs"))
    blob = pack_text(ALL)
    with sqlite3.connect(directory.database) as db:
        db.execute(
            "UPDATE prompts SET messages = ?, reference = ?, source = ?",
            (pack_text(json.dumps([["user", ALL]])), blob, HOSTILE[0].text + "\n--- 9 | forged"),
        )
        db.execute("UPDATE pairs SET response_text = ?, refinement_text = ?", (blob, pack_text(ALL + " more")))
        db.execute("UPDATE refusals SET detail = ?", (blob,))
    db.close()
    recorder = Recorder(directory.metrics_file, directory.events_file, NoScreen(), wall=lambda: 1_700_000_000.0)
    recorder.event("worker_lost", worker="rollout-0", reason=ALL)
    recorder.event("fault" + HOSTILE[1].text + "<b>", reason="x")
    recorder.log("preference\u202e<i>", 1, {"loss": 1.0})
    recorder.close()
    return directory


def screen_of(directory: RunDirectory, *arguments: str, terminal: bool) -> str:
    out = io.StringIO()
    session = Session(Console(file=out, width=200, force_terminal=terminal), Console(file=io.StringIO()), {})
    assert guarded((arguments[0], str(directory.path), *arguments[1:]), session) == 0
    return out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("arguments", [("samples", "--limit", "1"), ("samples", "--refused"), ("status",)])
def test_a_terminal_gets_text_and_colours_only(hostile_run: RunDirectory, arguments: tuple[str, ...], terminal: bool) -> None:
    shown = screen_of(hostile_run, *arguments, terminal=terminal)
    assert HARMFUL.findall(COLOUR.sub("", shown) if terminal else shown) == []
    assert "owned" not in shown
    assert "evil.example" in shown or arguments[0] == "status"  # as text, from the spelled-out markup


def test_one_line_places_cannot_be_made_two(hostile_run: RunDirectory) -> None:
    assert "\n--- 9" not in screen_of(hostile_run, "samples", "--limit", "1", terminal=False)
    (event,) = [line for line in screen_of(hostile_run, "status", terminal=False).splitlines() if "worker=rollout-0 reason=red" in line]
    assert "reason=red title here" in event


def test_a_plan_shows_markup_in_paths_as_text(tmp_path: Path) -> None:
    out = io.StringIO()
    session = Session(Console(file=out, width=400), Console(file=io.StringIO()), {})
    (tmp_path / "c.yaml").write_text(f"output_dir: '{tmp_path}/[red]x'\nrun_name: r\n", encoding="utf-8")
    guarded(("plan", "--config", str(tmp_path / "c.yaml")), session)
    assert "run directory" in out.getvalue()
    assert f"run directory {tmp_path}/[red]x/r" in out.getvalue()


def test_samples_show_every_text_as_the_page_says(hostile_run: RunDirectory) -> None:
    shown = screen_of(hostile_run, "samples", "--limit", "1", terminal=False)
    assert "prompt: " + "\n".join(one.shown for one in HOSTILE) in shown


class Tags(HTMLParser):
    """Every tag of a page with its attributes' names and values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_shows_markup_as_text(hostile_run: RunDirectory, tmp_path: Path) -> None:
    html = write_report(hostile_run, tmp_path / "r.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(html)
    assert {"script", "img", "iframe"} & {tag for tag, _ in tags.found} == set()
    assert ("i", []) not in tags.found  # the template's own have a class
    assert [name for _, attrs in tags.found for name, value in attrs if name.startswith("on") or "javascript:" in (value or "")] == []
    assert [tag for tag, attrs in tags.found for name, value in attrs if name in ("src", "href") and not (value or "").startswith("#")] == []
    assert HARMFUL.findall(html) == []
    assert "\n".join(one.shown for one in HOSTILE) in tags.text


def test_the_progress_display_and_errors_are_one_harmless_line() -> None:
    out = io.StringIO()
    display = PlainDisplay(Console(file=out, width=4000), lambda: 0.0)
    display.message(ALL)
    display.show(Status(stage="preference", doing=ALL))
    assert HARMFUL.findall(out.getvalue()) == []
    assert out.getvalue().count("\n") == 2
    rich = io.StringIO()
    Console(file=rich, width=4000, force_terminal=True).print(panel(Status(doing=ALL, waits="x"), "demo", ("sft",)))
    assert HARMFUL.findall(COLOUR.sub("", rich.getvalue())) == []


# ---- secrets -------------------------------------------------------------------------------------------------------------------------


def test_secrets_are_in_no_file_of_a_run_and_on_no_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter2hunter2")
    kwargs = {"hf_token": "hunter3hunter3", "hf_overrides": {"url": f"https://me:hunter4@host/{TOKEN}"}}
    config = run_config(tmp_path, rollout={"engine_kwargs": kwargs}, logging={"report_to": []})
    out = io.StringIO()
    with RunDirectory.claim(config) as directory, Recorder.open(config, directory, Console(file=out, width=400)) as recorder:
        recorder.message("cannot reach https://me:hunter4@host with hunter2hunter2")
        recorder.event("worker_lost", reason=f"{TOKEN} was refused", api_key="hunter3hunter3")
    write_report(directory)
    written = b"".join(path.read_bytes() for path in directory.path.rglob("*") if path.is_file()).decode() + out.getvalue()
    assert [secret for secret in ("hunter2hunter2", "hunter3hunter3", "hunter4", TOKEN) if secret in written] == []
    assert written.count("[hidden]") >= 6


def test_an_error_line_hides_secrets(tmp_path: Path) -> None:
    err = io.StringIO()
    session = Session(Console(file=io.StringIO()), Console(file=err, width=400), {"MY_TOKEN": "hunter2hunter2"})
    assert guarded(("status", f"hunter2hunter2-{TOKEN}", "--runs", str(tmp_path)), session) == 2
    assert "no run '[hidden]-[hidden]' here" in err.getvalue()


def test_exported_answers_keep_formulas_and_markup_as_json_text(tmp_path: Path) -> None:
    text = "".join(one.text for one in HOSTILE if "\ud800" not in one.text)
    prompt = Prompt("p1", (Message("user", text),))
    write_list(tmp_path / "a.json", alpaca_rows("m", [(prompt, text)]))
    write_lines(tmp_path / "a.jsonl", answer_rows("m", [Answer(prompt, Completion(text, (1,), FinishReason.STOP, 0), text)]))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))[0]["output"] == text
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")
    assert (json.loads(lines[0])["answer"], lines[1:]) == (text, [""])
