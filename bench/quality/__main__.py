"""``python -m bench.quality TASK [--arms a,b] [--seeds 1,2] [--split validation|test]``: run what is missing, one arm a core; print the table.

Arms that were run before (same recipe, same seed) are not run again, so the table grows over several calls. The runs lie under ``--root``
(default runs/quality), their figures also in bench/quality/results. ``--table`` runs nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
from pathlib import Path

from bench.quality.arms import ARMS
from bench.quality.one_process import pin
from bench.quality.runner import Place, run_arms
from bench.quality.table import keep, table

METRIC = {"orders": "greedy", "language": "sampled", "language-noisy": "sampled"}
"""What an arm is compared by: greedy answers saturate on the language, where the mass on right words is what is learned."""


def main() -> int:
    """Start one runner a core and print the table, or be one runner."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("task", choices=sorted(ARMS))
    parser.add_argument("--arms", help="comma list; default: all of the task")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--root", type=Path, default=Path("runs/quality"))
    parser.add_argument("--cores", help="comma list of cores; default: all")
    parser.add_argument("--table", action="store_true", help="only print the table of what was run before")
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.arms.split(",") if options.arms else list(ARMS[options.task])
    if unknown := set(names) - set(ARMS[options.task]):
        parser.error(f"no arm '{sorted(unknown)[0]}'; there are {', '.join(ARMS[options.task])}")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    place = Place(options.root.resolve(), options.task, options.split)
    if options.core is not None:
        pin(options.core)
        asyncio.run(run_arms(place, names, seeds, options.core))
        return 0
    code = 0 if options.table else _share(sys.argv[1:], options.cores)
    for name in names:
        for seed in seeds:
            if place.result(name, seed).is_file():
                keep(place.result(name, seed))
    print(table(options.task, options.split, ("sft", "sft_more"), METRIC[options.task]))
    return code


def _share(arguments: list[str], cores: str | None) -> int:
    chosen = [int(core) for core in cores.split(",")] if cores else sorted(os.sched_getaffinity(0))
    runners = [subprocess.Popen([sys.executable, "-m", "bench.quality", *arguments, "--core", str(core)]) for core in chosen]
    return max(runner.wait() for runner in runners)


if __name__ == "__main__":
    sys.exit(main())
