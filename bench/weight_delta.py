"""What one optimiser step changes in the weights as they travel, and what it costs to send only that (goal C15).

A real learner takes one DPO step at a learning rate of 1e-6, computing in the type that suits the processor, and publishes bfloat16 before and
after it; the patch between the two files is made and applied as for a worker on another node (``sgpo_dist/weights/delta.py``). Beside it: copying
the whole file in memory. Guard: the patched file's digest is the published one. Called by ``python -m bench``; also run as a child of itself.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from bench.dpo_step import PAIRS, make_pairs, make_rank
from bench.machine import answer, environment, run_arm
from sgpo_dist.data.embedded_model import embedded_model_dir
from sgpo_dist.precision import processor_dtype
from sgpo_dist.prompts import PromptBook, load_tokenizer
from sgpo_dist.weights import delta
from sgpo_dist.weights.checksum import checksum_safetensors

MODULE: Final = "bench.weight_delta"
LEARNING_RATE: Final = 1e-6
REPEATS: Final = 5


def measure() -> list[str]:
    """The remark."""
    found = run_arm(MODULE, "delta", {}, environment(allocator=True))
    share = found["patch_bytes"] / found["file_bytes"]
    making, applying, copying = (median(found[name]) for name in ("encode_s", "apply_s", "copy_s"))
    verdict = "ok" if found["same"] else "FAILED: other bytes"
    return [
        f"delta: one step at {LEARNING_RATE:g} makes a patch of {share:.4f} of the file (goal C15: 0.05); made in {making:.2f} s and applied in "
        f"{applying:.2f} s, {(making + applying) / copying:.1f} times as long as copying the file in memory ({copying:.2f} s); digest: {verdict}"
    ]


def run_delta() -> dict[str, Any]:
    """Publish, step, publish; then the patch."""
    pairs = make_pairs(PromptBook(load_tokenizer(embedded_model_dir())), PAIRS)
    rank = make_rank(processor_dtype(), gpu=False, total_steps=1, learning_rate=LEARNING_RATE, sent_in="bfloat16")
    old = np.fromfile(rank.publish(0).uri, np.uint8)
    rank.preference_step(1, pairs)
    bundle = rank.publish(1)
    new = np.fromfile(bundle.uri, np.uint8)
    patch = delta.encode(old, new)
    made, copied, applied = (_timed(work) for work in (lambda: delta.encode(old, new), old.copy, lambda: delta.apply(old, patch)))
    path = Path(bundle.uri)
    path.write_bytes(old.tobytes())
    same = checksum_safetensors(str(path)) == bundle.checksum
    rank.stop()
    return {"file_bytes": len(new), "patch_bytes": len(patch), "same": same, "encode_s": made, "copy_s": copied, "apply_s": applied}


def _timed(work: Callable[[], Any]) -> list[float]:
    """Seconds of each of the repeats. What they make is let go of: memory that nobody has touched yet costs seconds on a virtual machine."""
    took = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return took


def main() -> None:
    """The arm, as a child of ``measure``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=["delta"], required=True)
    answer(parser.parse_args().arm, **run_delta())


if __name__ == "__main__":
    main()
