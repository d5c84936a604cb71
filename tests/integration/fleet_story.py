"""What stories about real fleets share. Each is told by a process of its own: Ray and vLLM leave threads and handlers behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from actors.fleet import FleetSpec
    from sgpo_dist.weights.version import ProbeRow

ROOT = Path(__file__).parents[2]
SEEN = "seen.json"


def told(script: str, folder: Path, seconds: float) -> dict[str, Any]:
    """What ``python script folder`` left in ``folder/seen.json``. One that takes longer ends with its cluster, which would disturb later tests."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, script, str(folder)]
    story = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        stdout, stderr = story.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        everyone = psutil.Process(story.pid).children(recursive=True)
        for process in (story, *everyone):
            process.kill()
        stdout, stderr = story.communicate()
        stderr += f"\nnot done after {seconds:.0f} s"
    assert story.returncode == 0, stdout[-2000:] + stderr[-4000:]
    seen: dict[str, Any] = json.loads((folder / SEEN).read_text())
    return seen


def fleet_spec(folder: Path, model: Path, probes: tuple[ProbeRow, ...], dtype: str, tolerance: float, max_restarts: int) -> FleetSpec:
    """Small engines with room for eight requests, on half a core each."""
    from actors.fleet import FleetSpec
    from actors.vllm_engine import EngineSpec
    from sgpo_dist.config import PairGateConfig

    return FleetSpec(
        engine=EngineSpec(str(model), dtype, max_model_len=384, kv_cache_gib=0.25, probes=probes, max_num_seqs=8, log_level="WARNING"),
        template="v1",
        gate=PairGateConfig(require_eos=False),
        concurrency=4,
        lease_s=60.0,
        request_timeout_s=120.0,
        start_timeout_s=200.0,
        heartbeat_timeout_s=30.0,
        receive_timeout_s=60.0,
        max_restarts=max_restarts,
        tolerance=tolerance,
        log_dir=str(folder / "logs"),
    )
