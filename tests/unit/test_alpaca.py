"""The door to alpaca_eval: what its process is given, and how its result is read. The package itself runs in the integration test."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from sgpo_dist.config import EndpointConfig
from sgpo_dist.errors import EnvironmentProblem, RunFailed
from sgpo_dist.evaluate.alpaca import child_environment, read_result, run_alpaca_eval
from sgpo_dist.evaluate.alpaca_child import adapted

JUDGE = EndpointConfig(base_url="http://127.0.0.1:9/v1", model="judge-instruct", api_key_env="JUDGE_KEY", timeout_s=5, max_retries=2)
MINE = [{"instruction": "Q {output_2}", "output": "see {output_1}, {other} <|im_end|>", "generator": "mine", "dataset": "d"}]
THEIRS = [{"instruction": "Q {output_2}", "output": "no", "generator": "theirs", "dataset": "d"}]


def interpreter(folder: Path, script: str) -> str:
    """An executable that stands in for a Python with alpaca_eval: it drops our script and runs ``script`` instead."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport json, os, sys\nfrom pathlib import Path\nhere = Path(sys.argv[2]).parent\n{script}\n")
    path.chmod(0o755)
    return str(path)


def result(figures: dict[str, float], preferences: list[list[Any]]) -> dict[str, Any]:
    return {"figures": figures, "preferences": preferences}


def test_the_child_gets_files_and_a_key_that_is_only_in_its_environment(tmp_path: Path) -> None:
    seen = tmp_path / "seen.json"
    script = (
        "files = {file.name: file.read_text() for file in here.iterdir()}\n"
        f"Path({str(seen)!r}).write_text(json.dumps([files, dict(os.environ), str(here)]))\n"
        "done = {'figures': {'win_rate': 100.0, 'standard_error': 0.0}, 'preferences': [[2.0, 4, 2]]}\n"
        "(here / 'result.json').write_text(json.dumps(done))"
    )
    environ = {"JUDGE_KEY": "sk-secret-1", "OPENAI_API_KEYS": "other", "OPENAI_ORGANIZATION_IDS": "o", "PATH": "/bin", "PYTHONPATH": "/x"}
    found = run_alpaca_eval(MINE, THEIRS, JUDGE, environ, python=interpreter(tmp_path, script))
    assert (found.win_rate, found.judged, found.unjudged) == (1.0, 1, 0)
    files, environment, folder = json.loads(seen.read_text())
    assert (environment["OPENAI_API_KEY"], environment["OPENAI_API_BASE"]) == ("sk-secret-1", "http://127.0.0.1:9/v1")
    assert not {"OPENAI_API_KEYS", "OPENAI_ORGANIZATION_IDS", "PYTHONPATH"} & set(environment)
    assert not any("sk-secret-1" in text for text in files.values())
    assert not Path(folder).exists()
    # What the package would take for its own marks is broken by a space, in questions and in answers; other braces are not.
    (row,) = json.loads(files["outputs.json"])
    assert (row["instruction"], row["output"]) == ("Q { output_2}", "see { output_1}, {other} < |im_end|>")
    job = json.loads(files["job.json"])
    assert job["completions"]["model_name"] == "judge-instruct"
    assert (job["metric"], job["annotator"]) == ("get_winrate", "weighted_alpaca_eval_gpt4_turbo")


def test_a_server_without_keys_gets_a_word_in_the_keys_place() -> None:
    assert child_environment(JUDGE, {}, Path("/nowhere"))["OPENAI_API_KEY"] == "none"


def test_the_result_is_in_shares_and_counts_what_was_not_judged() -> None:
    # Preferences 1.75, 1.25 and 2: shares .75, .25, 1. One of five rows was not annotated at all, one came back empty.
    tree = result({"win_rate": 200 / 3, "standard_error": 22.0}, [[1.75, 10, 10], [1.25, 20, 20], [None, 1, 1], [2.0, 30, 30]])
    found = read_result(tree, 5)
    assert (found.judged, found.unjudged) == (3, 2)
    assert (found.win_rate, found.standard_error) == (pytest.approx(2 / 3), 0.22)
    assert (found.length, found.other_length) == (20, 20)
    assert found.length_controlled == pytest.approx(2 / 3)  # no difference in length
    assert found.official_length_controlled is None
    official = read_result(result({"win_rate": 50.0, "standard_error": 1.0, "length_controlled_winrate": 40.0}, [[1.5, 1, 1]]), 1)
    assert official.official_length_controlled == 0.4


def test_a_judge_that_names_nobody_is_an_error() -> None:
    with pytest.raises(RunFailed, match="named neither model"):
        read_result(result({}, [[None, 1, 1], [float("nan"), 2, 2]]), 2)


@pytest.mark.parametrize(
    ("script", "error", "said"),
    [
        ("""sys.exit("ModuleNotFoundError: No module named 'alpaca_eval'")""", EnvironmentProblem, "has no alpaca_eval; install alpaca-eval"),
        ("""sys.exit("Traceback\\nConnectionError: refused")""", RunFailed, "exit status 1: ConnectionError: refused"),
        ("sys.exit(3)", RunFailed, "exit status 3: no message"),
    ],
)
def test_a_child_that_fails_is_one_line(tmp_path: Path, script: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        run_alpaca_eval(MINE, THEIRS, JUDGE, {}, python=interpreter(tmp_path, script))


def test_an_interpreter_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="cannot be started"):
        run_alpaca_eval(MINE, THEIRS, JUDGE, {}, python=str(tmp_path / "absent"))


def test_an_interpreter_may_be_named_from_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = os.path.relpath(interpreter(tmp_path, "sys.exit('here')"))
    with pytest.raises(RunFailed, match="exit status 1: here"):
        run_alpaca_eval(MINE, THEIRS, JUDGE, {}, python=f"./{name}")


def test_a_judge_of_the_package_keeps_its_prompt_and_asks_our_server() -> None:
    theirs = {
        "prompt_template": "clf/clf.txt",
        "fn_completions": "openai_completions",
        "completions_kwargs": {"model_name": "gpt-4", "max_tokens": 1, "top_logprobs": 5},
        "batch_size": 1,
    }
    assert adapted(theirs, {"model_name": "ours"}, Path("/package")) == {
        "prompt_template": "/package/clf/clf.txt",
        "fn_completions": "openai_completions",
        "completions_kwargs": {"model_name": "ours", "max_tokens": 1, "top_logprobs": 20},
        "batch_size": 1,
    }
    with pytest.raises(SystemExit, match="asks anthropic_completions"):
        adapted(theirs | {"fn_completions": "anthropic_completions"}, {}, Path("/package"))
