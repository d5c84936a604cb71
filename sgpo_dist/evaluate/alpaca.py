"""AlpacaEval's win rate of one list of answers over another: the package alpaca_eval, with any OpenAI-compatible server as its judge.

Called by ``eval --alpaca-eval``. The package sets up logging and reads the environment when it is imported, so it runs in a process of its
own, with the interpreter that has it. The server's key travels in that process's environment only. Leaves out: generating the answers.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from sgpo_dist.config import EndpointConfig
from sgpo_dist.errors import EnvironmentProblem, RunFailed
from sgpo_dist.evaluate.judge import defused
from sgpo_dist.evaluate.text_metrics import mean
from sgpo_dist.evaluate.win_rate import length_controlled_rate
from sgpo_dist.sanitize import one_line

Metric = Literal["win_rate", "length_controlled"]
Rows = Sequence[Mapping[str, str]]

DEFAULT_ANNOTATOR: Final = "weighted_alpaca_eval_gpt4_turbo"
"""AlpacaEval 2's judge: the share of probability on each model's letter, in one token."""
START_DEADLINE_S: Final = 600.0
_PLACEHOLDER: Final = re.compile(r"\{(?=instruction\}|output_[12]\})")
_CHILD: Final = Path(__file__).with_name("alpaca_child.py")
_FUNCTIONS: Final = {"win_rate": "get_winrate", "length_controlled": "get_length_controlled_winrate"}


@dataclass(frozen=True, slots=True)
class AlpacaResult:
    """Rates in [0, 1] over ``judged`` instructions; lengths are mean characters.

    ``official_length_controlled`` is the package's figure, for its own 805 instructions only; ``length_controlled`` is our estimate from the
    same preferences.
    """

    judged: int
    unjudged: int
    win_rate: float
    standard_error: float
    length: float
    other_length: float
    length_controlled: float
    official_length_controlled: float | None = None


def run_alpaca_eval(
    outputs: Rows,
    reference: Rows,
    endpoint: EndpointConfig,
    environ: Mapping[str, str],
    *,
    python: str,
    annotator: str = DEFAULT_ANNOTATOR,
    metric: Metric = "win_rate",
) -> AlpacaResult:
    """``outputs`` against ``reference`` (rows of ``exports.alpaca_rows``), judged by ``endpoint`` with the package's judge ``annotator``.

    Waits for the child, at most ``START_DEADLINE_S`` and ``timeout_s`` an instruction. Metric 'length_controlled' makes the package fetch its
    data from a hub. Raises EnvironmentProblem when ``python`` has no alpaca_eval, RunFailed with the child's last line when it fails.
    """
    with tempfile.TemporaryDirectory(prefix="alpaca-") as name:
        folder = Path(name)
        job = _job(folder, outputs, reference, endpoint, annotator, metric)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        _run_child(folder, python, child_environment(endpoint, environ, folder), START_DEADLINE_S + len(outputs) * endpoint.timeout_s)
        return read_result(json.loads((folder / "result.json").read_text(encoding="utf-8")), len(outputs))


def child_environment(endpoint: EndpointConfig, environ: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The environment with the package's own names for server and key, and nothing else that would lead it elsewhere."""
    kept = {name: value for name, value in environ.items() if not name.startswith("OPENAI_") and name != "PYTHONPATH"}
    return kept | {
        "OPENAI_API_BASE": endpoint.base_url,
        "OPENAI_API_KEY": environ.get(endpoint.api_key_env) or "none",  # the client refuses to start without one
        "OPENAI_CLIENT_CONFIG_PATH": str(folder / "none.yaml"),
        "OPENAI_MAX_CONCURRENCY": str(endpoint.max_concurrency),
        "IS_ALPACA_EVAL_2": "True",
    }


def read_result(tree: Mapping[str, Any], asked: int) -> AlpacaResult:
    """The child's file as figures. A preference is 1 where the reference won, 2 where the model did, anything between when unsure.

    Raises RunFailed when the judge named a winner nowhere.
    """
    judged = [row for row in tree["preferences"] if row[0] is not None and not math.isnan(row[0])]
    if not judged:
        raise RunFailed("alpaca_eval's judge named neither model in any answer; use a larger judge, or another --alpaca-judge")
    scores, lengths, others = [row[0] - 1 for row in judged], [row[1] for row in judged], [row[2] for row in judged]
    figures = tree["figures"]
    official = figures.get("length_controlled_winrate")
    return AlpacaResult(
        len(judged),
        asked - len(judged),
        figures["win_rate"] / 100,
        figures["standard_error"] / 100,
        mean(lengths),
        mean(others),
        length_controlled_rate(scores, [a - b for a, b in zip(lengths, others, strict=True)]),
        None if official is None else official / 100,
    )


def _job(folder: Path, outputs: Rows, reference: Rows, endpoint: EndpointConfig, annotator: str, metric: Metric) -> dict[str, Any]:
    for name, rows in (("outputs", outputs), ("reference", reference)):
        (folder / f"{name}.json").write_text(json.dumps([_harmless(row) for row in rows]), encoding="utf-8")
    completions = {
        "model_name": endpoint.model,
        "requires_chatml": True,  # the package takes a name with 'instruct' in it for an old completion model
        "price_per_token": 0,
        "client_kwargs": {"timeout": endpoint.timeout_s, "max_retries": endpoint.max_retries},
    }
    return {
        "outputs": str(folder / "outputs.json"),
        "reference": str(folder / "reference.json"),
        "annotator": annotator,
        "completions": completions,
        "metric": _FUNCTIONS[metric],
        "metric_kwargs": {"save_weights_dir": None} if metric == "length_controlled" else {},
    }


def _harmless(row: Mapping[str, str]) -> dict[str, str]:
    """The package splits its prompt at chat tokens and fills it by replacing names in braces, in whatever an answer says as well."""
    return {**row, **{name: _PLACEHOLDER.sub("{ ", defused(row[name])) for name in ("instruction", "output")}}


def _run_child(folder: Path, python: str, environment: Mapping[str, str], deadline_s: float) -> None:
    interpreter = os.path.abspath(python) if os.sep in python else python  # the child starts elsewhere; a link in a venv must stay one
    command = [interpreter, "-", str(folder / "job.json")]
    try:
        with _CHILD.open(encoding="utf-8") as script:
            done = subprocess.run(  # noqa: S603 the user's own interpreter, our own script
                command, stdin=script, cwd=folder, env=dict(environment), capture_output=True, text=True, timeout=deadline_s, check=False
            )
    except OSError as problem:
        raise EnvironmentProblem(f"--alpaca-python {python} cannot be started: {problem.strerror}") from None
    except subprocess.TimeoutExpired:
        raise RunFailed(f"alpaca_eval was not done after {deadline_s:.0f} s; is the judge's server answering?") from None
    if "No module named 'alpaca_eval'" in done.stderr:
        remedy = "install alpaca-eval==0.6.6 into an environment of its own and name its interpreter: --alpaca-python (docs/evaluation.md)"
        raise EnvironmentProblem(f"{python} has no alpaca_eval; {remedy}")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunFailed(f"alpaca_eval failed with exit status {done.returncode}: {one_line(last)}")
