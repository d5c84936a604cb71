"""The processes that compute make the first calls of PyTorch's vectorised functions in one thread."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(150)]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("module", ["learner", "engine"])
def test_learner_and_engine_settle_them_first(module: str) -> None:
    """In a process of its own, where nothing was computed yet."""
    begin = {
        "learner": "LearnerRank(RankSpec(0, 1, ModelConfig(), LearnerConfig(gpus_per_rank=0), 'shm', 'float32', (), 'n', 0, '.', 2))",
        "engine": "import actors.weight_receiver",
    }[module]
    program = f"""
from torch.utils._python_dispatch import TorchDispatchMode
from sgpo_dist import vector_math
from sgpo_dist.config import LearnerConfig, ModelConfig
from learner.learner import LearnerRank, RankSpec

class Heard(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        called.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {{}}))

called = set()
vector_math.settle = lambda: print("settled after", sorted(called.intersection(vector_math.FUNCTIONS)))
with Heard():
    {begin}
"""
    environment = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment, cwd=ROOT, timeout=120)
    assert "settled after []" in done.stdout.splitlines()
