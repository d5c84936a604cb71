"""Does it learn? The whole method on a language whose quality is counted, with a small model trained from nothing.

The arms are the quality benchmark's own (``bench.quality``): the product's story, buffer, gate, vLLM engine, weight broadcast and DeepSpeed
learner, in one process and on one core each. References are wrong in a fifth of their words, so imitation must stay behind what repair can reach.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
ARMS = ("base", "sft", "spin", "improver", "sgpo", "sgpo_swapped")
SEED = 1


@pytest.fixture(scope="module")
def quality(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Share of right words in sampled answers to held-out prompts, by arm."""
    root = tmp_path_factory.mktemp("quality")
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:2])
    command = [sys.executable, "-m", "bench.quality", "language-noisy", "--arms", ",".join(ARMS), "--seeds", str(SEED), "--root", str(root)]
    done = subprocess.run([*command, "--cores", cores], cwd=ROOT, capture_output=True, text=True, timeout=840, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in (root / "language-noisy").glob("*/result-validation.json")]
    return {result["arm"]: result["figures"]["sampled"] for result in results}


def test_sgpo_is_better_than_what_it_starts_from_and_than_imitation(quality: dict[str, float]) -> None:
    assert quality["base"] < 0.6  # the model is no more than it was made to be
    assert quality["improver"] > quality["base"] + 0.15
    assert quality["sgpo"] > quality["improver"] + 0.06
    assert quality["sgpo"] > quality["sft"] + 0.08
    assert quality["sgpo"] > quality["spin"] + 0.08


def test_swapped_pairs_teach_the_opposite(quality: dict[str, float]) -> None:
    assert quality["sgpo_swapped"] < quality["improver"] - 0.2
