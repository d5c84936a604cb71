"""``python -m bench [PART ..] [--quick]``: the ratios side by side on the screen and in bench/RESULTS.md. The parts are ``PARTS``.

Exits with 1 when a correctness guard fails or an arm does not end: a ratio without its guard is worth nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Final

from bench import buffer, dpo_step, loop, scale, speculation, weight_delta, weight_sync, worker
from bench.machine import Line, facts
from sgpo_dist.data.embedded_model import embedded_model_dir
from sgpo_dist.precision import processor_dtype

RESULTS: Final = Path(__file__).parent / "RESULTS.md"
HEADER: Final = "| what | baseline s | ours s | ratio (median) | ratio (worst) | guard |\n| --- | --- | --- | --- | --- | --- |"
PARTS: Final = ("dpo", "shared", "binding", "sync", "delta", "loop", "speculation", "worker", "gpu", "scale", "buffer")


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--rounds", type=int, default=1, help="how often the arms of dpo, loop and speculation take turns")
    parser.add_argument("--same-allocator", action="store_true", help="give TRL's step our allocator settings as well")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)[0]!r}; write some of {', '.join(PARTS)}")
    embedded_model_dir()  # converted before anything is timed
    described, began = facts(), time.monotonic()
    _warn_of_load()
    lines, remarks = _measure(options.parts or list(PARTS), options.quick, options.rounds, options.same_allocator)
    text = _table(lines, remarks)
    print(text)
    failed = any(not line.passed for line in lines) or any("FAILED" in remark for remark in remarks)
    if not options.parts:
        _write(text, described, options.quick, time.monotonic() - began)
    return int(failed)


def _measure(parts: list[str], quick: bool, rounds: int, same_allocator: bool) -> tuple[list[Line], list[str]]:
    steps = 1 if quick else 2
    costly = 1 if quick or processor_dtype() == "float32" else 2  # products are slow there
    works: dict[str, Callable[[], Sequence[Line | str]]] = {
        "dpo": lambda: dpo_step.measure(costly, rounds, same_allocator),
        "shared": lambda: [dpo_step.measure_shared(costly, rounds)],
        "binding": lambda: [worker.measure_binding(steps)],
        "sync": lambda: weight_sync.measure(repeats=1 if quick else 3, restarts=costly),
        "delta": weight_delta.measure,
        "loop": lambda: loop.measure(rounds),
        "speculation": lambda: speculation.measure(rounds),
        "worker": lambda: worker.measure(costly),
        "gpu": lambda: dpo_step.measure_gpu(steps),
        "scale": lambda: scale.measure(quick),
        "buffer": lambda: buffer.measure(quick),
    }
    found: list[Line | str] = []
    minutes: list[str] = []
    for part in parts:
        print(f"{part}:", file=sys.stderr, flush=True)
        began = time.monotonic()
        try:
            found += works[part]()
        except (RuntimeError, subprocess.TimeoutExpired) as problem:
            found.append(f"{part}: FAILED, no figure: {' '.join(str(problem).split())[-400:]}")
        minutes.append(f"{part} {(time.monotonic() - began) / 60:.1f}")
    found.append(f"minutes: {', '.join(minutes)}")
    return [one for one in found if isinstance(one, Line)], [one for one in found if isinstance(one, str)]


def _table(lines: list[Line], remarks: list[str]) -> str:
    rows = [
        f"| {line.name} | {median(line.baseline):.2f} | {median(line.ours):.2f} | {line.ratio:.2f} | {line.worst:.2f} "
        f"| {'ok' if line.passed else 'FAILED'}: {line.guard} |"
        for line in lines
    ]
    notes = [f"- {line.name}: {note}" for line in lines for note in line.notes]
    counts = [f"- {line.name}: {len(line.baseline)} repeats of the baseline, {len(line.ours)} of ours" for line in lines]
    short = [f"- {remark}" for remark in remarks if "\n" not in remark]
    tables = [f"\n{remark}" for remark in remarks if "\n" in remark]
    return "\n".join([*([HEADER] if rows else []), *rows, "", *notes, *counts, *short, *tables])


def _write(text: str, described: dict[str, str], quick: bool, took: float) -> None:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    mode = " with `--quick`" if quick else ""
    machine = "\n".join(f"- {name}: {value}" for name, value in described.items())
    page = f"""# Benchmark results

Written by `python -m bench`{mode} on {now}; it took {took / 60:.1f} minutes. A ratio above 1 means that ours is faster: baseline seconds by our
seconds, medians of the repeats; "worst" is the baseline's fastest repeat by our slowest. Of rewrites and answers: median and lowest ratio of
neighbours in time. What is counted: docs/bench.md.

{text}

## Machine

{machine}
"""
    RESULTS.write_text(page, encoding="utf-8")
    print(f"\nwritten to {RESULTS}")


def _warn_of_load() -> None:
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    if load > cores + 0.5:
        print(f"warning: load {load:.1f} on {cores} cores; the ratios of a busy machine are worth little", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
