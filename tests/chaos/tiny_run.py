"""A run on the quality benchmark's model, hardly taught: a step takes a fraction of a second, most of the time goes to starting engines.

Used by the tests of this directory that start the training command, kill it and start it again. Leaves out: what they assert.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.quality import language
from bench.quality.tiny_model import TinyModel, make_model

ROOT = Path(__file__).parents[2]
START_S = 240.0
"""Seconds for a start on two busy cores."""
LEAVE_S = 60.0
ROLES = ("ray::RankHost", "ray::RolloutActor", "ray::PairBuffer", "VLLM")
SMALLEST = TinyModel(rows=64, batch_size=16, epochs=1, num_layers=1)
SETTINGS = [
    "model.dtype=float32",
    "data.max_prompt_tokens=32",
    "preference.learning_rate=1e-4",
    "preference.pair_gate.require_eos=false",
    "preference.brakes.action=off",
    "rollout.max_model_len=128",
    "rollout.kv_cache_gib=0.25",
    "rollout.policy.max_new_tokens=12",
    "rollout.improver.max_new_tokens=12",
    "cluster.min_free_disk_gib=0.5",
    "eval.enabled=false",
    "logging.progress=plain",
    "logging.report_to=[]",
]


def make_inputs(place: Path, rows: int) -> list[str]:
    """Words for the command line: a model, ``rows`` prompts, and the preference stage alone."""
    make_model(place / "model", shape=SMALLEST)
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in language.rows("train", rows)))
    (place / "run.yaml").write_text("stages: [preference]\n")
    files = [f"model.model_name_or_path={place / 'model'}", f"data.path={place / 'rows.jsonl'}"]
    return ["--config", str(place / "run.yaml"), *files, *SETTINGS]


@dataclass
class Runs:
    """Drivers of one run, one after the other."""

    directory: Path
    words: list[str]

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        place = [f"run_name={self.directory.name}", f"output_dir={self.directory.parent}"]
        with self.output.open("ab") as sink:
            return subprocess.Popen(
                [sys.executable, "-m", "sgpo_dist", "train", *self.words, *place],
                cwd=ROOT,
                env=os.environ | environment,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

    @property
    def output(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.out")

    def finish(self) -> None:
        """A driver that nobody disturbs, to the end."""
        driver = self.start()
        assert driver.wait(timeout=START_S) == 0, self.last_words()

    def last_words(self) -> str:
        return self.output.read_text(errors="replace")[-3000:]

    def until(self, driver: subprocess.Popen[bytes], ready: Callable[[], object]) -> None:
        deadline = time.monotonic() + START_S
        while not ready():
            assert driver.poll() is None, f"ended with {driver.returncode} before it was killed: {self.last_words()}"
            assert time.monotonic() < deadline, self.last_words()
            time.sleep(0.01)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Finished lines of a JSON-lines file; a kill may leave one cut."""
        path = self.directory / name
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.startswith("{") and line.endswith("}")]

    def steps(self) -> int:
        return max((row["step"] for row in self.lines("metrics.jsonl")), default=0)

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        """Rows of the buffer's database; none while there is none, or while it is busy."""
        path = self.directory / "buffer.db"
        try:
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
                return database.execute(query).fetchall()
        except sqlite3.OperationalError:
            return []

    def sha256(self) -> str:
        return hashlib.sha256((self.directory / "model" / "model.safetensors").read_bytes()).hexdigest()

    def audit(self) -> None:
        command = [sys.executable, "-m", "sgpo_dist", "audit", str(self.directory)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def all_gone(family: list[psutil.Process]) -> list[psutil.Process]:
    """What is left of a killed driver's roles after their time to end. Ray's own agents stay a minute; the next attempt ends them."""
    return psutil.wait_procs([process for process in family if is_role(process)], timeout=LEAVE_S)[1]


def is_role(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[0].startswith(ROLES)
    except (psutil.Error, IndexError):
        return False  # ended already, or about to
