"""The command line's contract: names, exit codes, one line an error, nothing hostile or secret on the screen."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from fabricated_run import fabricate, run_config
from rich.console import Console

from sgpo_dist.cli import doctor, train
from sgpo_dist.cli.doctor import State, ray_checks, stale_locks
from sgpo_dist.cli.main import build_parser, guarded, parse
from sgpo_dist.cli.session import Session
from sgpo_dist.errors import ConfigError, DataError, EnvironmentProblem, RunFailed, SgpoError, StoppedOnRequest, WorkerFault
from sgpo_dist.run_directory import RunDirectory

FROM_HERE = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
COMMANDS = ("train", "plan", "doctor", "status", "stop", "samples", "audit", "report", "eval", "export", "chaos")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    fabricate(root)
    return root


class Screen:
    """A session whose output is kept."""

    def __init__(self, terminal: bool = False, environment: dict[str, str] | None = None) -> None:
        self._out, self._err = io.StringIO(), io.StringIO()
        made = Console(file=self._out, width=200, force_terminal=terminal)
        self.session = Session(made, Console(file=self._err, width=200), environment or {})

    def run(self, *arguments: str) -> int:
        return guarded(arguments, self.session)

    @property
    def out(self) -> str:
        return self._out.getvalue()

    @property
    def err(self) -> str:
        return self._err.getvalue()


# ---- arguments and errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert Screen().run(command, "--help") == 0
    text = capsys.readouterr().out
    assert "example" in text
    assert f"sgpo-dist {command}" in text


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nope",),
        ("train",),
        ("plan", "--config", "absent.yaml"),
        ("samples",),
        ("samples", "absent-run"),
        ("audit", "x", "--strange"),
        ("doctor", "-x=1"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    screen = Screen()
    assert screen.run(*arguments) == 2
    assert screen.err.startswith("sgpo-dist: error: ")
    assert screen.err.count("\n") == 1
    assert screen.out == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("c"), 2),
        (DataError("d"), 2),
        (EnvironmentProblem("e"), 3),
        (RunFailed("f"), 4),
        (WorkerFault("rollout-0", "hung"), 4),
        (StoppedOnRequest("s"), 5),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("z"), 4),
    ],
)
def test_exit_codes(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    screen = Screen()
    assert screen.run("doctor") == code
    assert screen.err.count("\n") == 1
    if isinstance(error, SgpoError):
        assert screen.err == f"sgpo-dist: error: {error}\n"


def test_debug_shows_the_traceback_before_the_line(tmp_path: Path) -> None:
    screen = Screen()
    assert screen.run("plan", "--config", str(tmp_path / "absent.yaml"), "--debug") == 2
    assert "Traceback" in screen.err
    assert screen.err.splitlines()[-1].startswith("sgpo-dist: error: config file")


def test_an_error_is_harmless_and_keeps_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise RunFailed("login \x1b[31m[bold]with hunter2hunter2\nfailed")

    monkeypatch.setattr(doctor, "run", fail)
    screen = Screen(environment={"HF_TOKEN": "hunter2hunter2"})
    screen.run("doctor")
    assert screen.err == "sgpo-dist: error: login [bold]with [hidden] failed\n"


def test_overrides_may_stand_anywhere_in_any_form() -> None:
    args = parse(["train", "a.b=1", "--config", "x.yaml", "c=2", "--resume", "never", "--d.e=f=g"])
    assert args.overrides == ["a.b=1", "c=2", "--d.e=f=g"]
    assert (args.config, args.resume) == (Path("x.yaml"), "never")
    with pytest.raises(ConfigError, match=r"'stray' is not of the form|'--stray'"):
        parse(["train", "--config", "x.yaml", "--stray"])


def test_the_commands_are_those_of_the_contract() -> None:
    choices = next(action.choices for action in build_parser()._actions if action.dest == "command")
    assert choices is not None
    assert set(COMMANDS) <= set(choices)
    assert "config-reference" not in build_parser().format_help()


def test_python_dash_m_is_the_same_program_and_light(tmp_path: Path) -> None:
    script = (
        "import sys; from sgpo_dist.cli.main import main; code = main(['samples', 'absent']);"
        "heavy = [name for name in ('torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'datasets') if name in sys.modules];"
        "print(heavy, code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=FROM_HERE, timeout=50, check=True
    )
    assert done.stdout == "[] 2\n"
    assert done.stderr == "sgpo-dist: error: no run 'absent' here or under runs/; no run was made here yet\n"


# ---- commands on a run ---------------------------------------------------------------------------------------------------------------


def test_samples_in_plain_text(runs: Path) -> None:
    screen = Screen()
    assert screen.run("samples", "demo", "--runs", str(runs), "--limit", "1") == 0
    assert "prompt: Question 0 [bold]?" in screen.out
    assert "The cat <b>sat</b> on [-teh-]{+the red+} mat." in screen.out
    assert "\x1b" not in screen.out
    assert screen.out.endswith("1 of 5 pairs\n")


def test_samples_on_a_terminal_are_coloured(runs: Path) -> None:
    screen = Screen(terminal=True)
    assert screen.run("samples", "demo", "--runs", str(runs), "--filter", "most-changed", "--limit", "1") == 0
    assert "\x1b[9;31mteh\x1b[0m" in screen.out
    assert "\x1b[32mthe red\x1b[0m" in screen.out
    assert "Question 5 [bold]?" in screen.out


def test_refused_samples_by_reason(runs: Path) -> None:
    screen = Screen()
    assert screen.run("samples", str(runs / "demo"), "--reason", "identical") == 0
    assert "refused: identical" in screen.out
    assert screen.out.endswith("1 of 1 refusals\n")
    assert Screen().run("samples", str(runs / "demo"), "--reason", "nonsense") == 2


def test_audit_proves_and_catches(runs: Path, tmp_path: Path) -> None:
    screen = Screen()
    assert screen.run("audit", "demo", "--runs", str(runs)) == 0
    assert "every prompt is accounted for" in screen.out
    directory = fabricate(tmp_path)
    with sqlite3.connect(directory.database) as db:
        db.execute("UPDATE pairs SET refinement_text = 'better' WHERE rowid = 1")
    db.close()
    screen = Screen()
    assert screen.run("audit", "demo", "--runs", str(tmp_path)) == 4
    assert "wrong: " in screen.out
    assert "accounted for" not in screen.out


def test_status_of_a_finished_and_of_a_running_run(runs: Path, tmp_path: Path) -> None:
    screen = Screen()
    assert screen.run("status", "demo", "--runs", str(runs)) == 0
    for part in ("finished", "preference 2", "step-2", "worker_lost", "trained 4", "identical 1", "0.750"):
        assert part in screen.out, part
    with RunDirectory.claim(run_config(tmp_path)):
        screen = Screen()
        assert screen.run("status", "demo", "--runs", str(tmp_path)) == 0
    assert "driver at work (pid" in screen.out


def test_report_says_where_it_wrote(runs: Path, tmp_path: Path) -> None:
    screen = Screen()
    assert screen.run("report", "demo", "--runs", str(runs), "--to", str(tmp_path / "page.html")) == 0
    assert screen.out.strip() == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_export_copies_with_a_card_and_never_overwrites(runs: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "model"
    assert Screen().run("export", "demo", "--runs", str(runs), "--to", str(target)) == 0
    assert {path.name for path in target.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    screen = Screen()
    assert screen.run("export", "demo", "--runs", str(runs), "--to", str(target)) == 2
    assert "exists already" in screen.err
    assert Screen().run("export", "demo", "--runs", str(runs), "--to", str(tmp_path / "x"), "--stage", "sft") == 2
    assert not (tmp_path / "x").exists()


# ---- plan, train, doctor -------------------------------------------------------------------------------------------------------------


def config_file(path: Path, text: str = "") -> str:
    (path / "c.yaml").write_text(f"output_dir: {path}\nrun_name: r\ndata: {{path: orders}}\n{text}", encoding="utf-8")
    return str(path / "c.yaml")


def test_plan_prints_everything_and_starts_nothing(tmp_path: Path) -> None:
    screen = Screen()
    code = screen.run("plan", "--config", config_file(tmp_path), "preference.beta=0.25", "cluster.min_free_disk_gib=0.001")
    assert code in (0, 3)
    for part in ("beta: 0.25", "placement", "arithmetic", "memory and disk", "pairs ahead of training", "versions published"):
        assert part in screen.out, part
    assert not (tmp_path / "r").exists()


def test_plan_of_the_impossible_is_exit_code_3(tmp_path: Path) -> None:
    screen = Screen()
    assert screen.run("plan", "--config", config_file(tmp_path), "learner.gpus_per_rank=64") == 3
    assert "problem: 65 GPUs asked for" in screen.out


def fake_launch(monkeypatch: pytest.MonkeyPatch, result: Any) -> list[Any]:
    """Stands in for the assembly, which imports Ray and vLLM; keeps what it was called with."""
    called: list[Any] = []

    def run_training(config: Any, resume: str) -> Any:
        called.append((config, resume))
        return result(config) if callable(result) else result

    module = types.ModuleType("sgpo_dist.launch")
    module.run_training = run_training  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sgpo_dist.launch", module)
    return called


def test_train_hands_over_and_shows_what_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = fabricate(tmp_path)
    called = fake_launch(monkeypatch, types.SimpleNamespace(directory=directory.path, already_finished=True))
    monkeypatch.setattr(train, "check_machine", lambda *_: None)
    screen = Screen()
    assert screen.run("train", "--config", config_file(tmp_path), "seed=7", "--resume", "never") == 0
    assert (called[0][0].seed, called[0][1]) == (7, "never")
    assert "run 'demo' is finished; nothing to do" in screen.out
    assert "0.750 (+0.250 ± 0.000)" in screen.out
    assert directory.report_file.is_file()


def test_train_refuses_what_this_machine_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = fake_launch(monkeypatch, None)
    screen = Screen()
    assert screen.run("train", "--config", config_file(tmp_path), "learner.gpus_per_rank=64") == 3
    assert "65 GPUs asked for" in screen.err
    assert called == []
    assert not (tmp_path / "r").exists()


def test_on_a_cluster_this_machines_problems_are_only_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = fabricate(tmp_path)
    called = fake_launch(monkeypatch, types.SimpleNamespace(directory=directory.path, already_finished=False))
    screen = Screen(environment={"RAY_ADDRESS": "10.0.0.1:6379"})
    assert screen.run("train", "--config", config_file(tmp_path), "learner.gpus_per_rank=64") == 0
    assert len(called) == 1
    assert "warning: 65 GPUs asked for" in screen.out


def test_bad_data_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = fake_launch(monkeypatch, None)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "reference": "b"}) + "\n{broken\n")
    screen = Screen()
    assert screen.run("train", "--config", config_file(tmp_path), f"data.path={tmp_path}/rows.jsonl") == 2
    assert "rows.jsonl" in screen.err
    assert "2" in screen.err
    assert called == []


def test_doctor_lists_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    assert screen.run("doctor") in (0, 3)
    for part in ("python", "torch", "engine", "g++", "ray token", "cores", "memory", "disk", "gpu", "embedded model"):
        assert part in screen.out, part


def test_doctor_explains_rays_token(tmp_path: Path) -> None:
    def state(environment: dict[str, str]) -> tuple[State, str]:
        check = next(ray_checks(environment, tmp_path))
        return check.state, check.remedy

    assert state({})[0] is State.OK
    assert state({"RAY_AUTH_MODE": "token"}) == (State.WARN, "run `ray get-auth-token --generate` once, and copy it to every node")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t" * 64)
    (tmp_path / ".ray" / "auth_token").chmod(0o644)
    assert state({})[0] is State.WARN
    assert "export RAY_AUTH_MODE=token" in state({})[1]
    checks = list(ray_checks({"RAY_AUTH_MODE": "token"}, tmp_path))
    assert [check.state for check in checks] == [State.OK, State.WARN]
    assert checks[1].remedy.startswith("chmod 600")


def test_doctor_finds_old_compile_locks(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    born = lock.stat().st_mtime
    assert list(stale_locks({"TORCH_EXTENSIONS_DIR": str(tmp_path)}, born + 60)) == []
    (check,) = stale_locks({"TORCH_EXTENSIONS_DIR": str(tmp_path)}, born + 3600)
    assert f"rm {lock}" in check.remedy


def test_the_page_of_the_command_line_names_every_command_and_exit_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    assert [command for command in COMMANDS if f"| `{command}" not in page] == []
    assert [code for code in (0, 2, 3, 4, 5) if f"\n| {code} |" not in page] == []
