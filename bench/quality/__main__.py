"""``python -m bench.quality TASK [--arms a,b] [--seeds 1,2] [--split validation|test]``: run what is missing, one arm a core.

Arms that were run before (same recipe, same seed) are not run again, so the table grows over several calls. The runs lie under
``--root`` (default runs/quality).
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


def main() -> int:
    """Start one runner a core, or be one."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("task", choices=sorted(ARMS))
    parser.add_argument("--arms", help="comma list; default: all of the task")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--root", type=Path, default=Path("runs/quality"))
    parser.add_argument("--core", type=int, help="be one runner, on this core")
    options = parser.parse_args()
    names = options.arms.split(",") if options.arms else list(ARMS[options.task])
    if unknown := set(names) - set(ARMS[options.task]):
        parser.error(f"no arm '{sorted(unknown)[0]}'; there are {', '.join(ARMS[options.task])}")
    if options.core is None:
        return _share(sys.argv[1:])
    pin(options.core)
    place = Place(options.root.resolve(), options.task, options.split)
    asyncio.run(run_arms(place, names, [int(seed) for seed in options.seeds.split(",")], options.core))
    return 0


def _share(arguments: list[str]) -> int:
    runners = [subprocess.Popen([sys.executable, "-m", "bench.quality", *arguments, "--core", str(core)]) for core in sorted(os.sched_getaffinity(0))]
    return max(runner.wait() for runner in runners)


if __name__ == "__main__":
    sys.exit(main())
