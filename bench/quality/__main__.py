"""``python -m bench.quality TASK [--arms a,b] [--seeds 1,2] [--split validation|test]``: run what is missing, one arm a core; print the table.

Arms that were run before (same recipe, same seed) are not run again, so the table grows over several calls. The runs lie under ``--root``
(default runs/quality), their figures also in bench/quality/results (of another root: in its results/). ``--table`` runs nothing.
``chat --data FILE`` takes the rows of a file of yours instead of the starter set's: JSON lines with ``prompt``, an answer (``--reference-key``) and
where there is one a weaker answer (``--rejected-key``).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
from pathlib import Path

from bench.quality.arms import ARMS, arms_of, closed
from bench.quality.chat import RowsFile
from bench.quality.one_process import pin
from bench.quality.runner import Place, run_arms
from bench.quality.table import KEPT, keep, kept, table
from bench.quality.tasks import Task, find_task
from learner.heap import ALLOCATOR
from sgpo_dist.errors import SgpoError

ROOT = Path("runs/quality")
METRIC = {"orders": "sampled", "chat": "greedy", "language": "sampled", "language-noisy": "sampled"}
"""What an arm is compared by. Where greedy answers saturate, the mass on right ones is what is learned: ``sampled`` at temperature 1."""
RIVALS = {"chat": ("base", "sft")}
"""Whom a win rate is reported against."""


def main() -> int:
    """Start one runner a core and print the table, or be one runner."""
    parser = _parser()
    options = parser.parse_args()
    task = _task(options, parser)
    names, seeds = _names(options.arms, task, parser), [int(seed) for seed in options.seeds.split(",")]
    place = Place(options.root.resolve(), task, options.split)
    if options.core is not None:
        pin(options.core)
        asyncio.run(run_arms(place, names, seeds, options.core))
        return 0
    code = 0 if options.table else _share(sys.argv[1:], options.cores)
    folder = KEPT if options.root == ROOT else place.root / "results"
    for name in names:
        for seed in seeds:
            if place.result(name, seed).is_file():
                keep(place.result(name, seed), folder)
    print(table(task, kept(task, options.split, folder), ("sft", "sft_more"), METRIC[task.family], RIVALS.get(task.family, ())))
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("task", choices=sorted(ARMS))
    parser.add_argument("--arms", help="comma list, run with what they start from; default: all of the task but the optional ones")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--data", type=Path, metavar="FILE", help="rows of your own for the task chat (JSON lines)")
    parser.add_argument("--reference-key", default="reference", metavar="COLUMN", help="the answer to learn from and to be compared with")
    parser.add_argument("--rejected-key", default="rejected", metavar="COLUMN", help="a weaker answer, for DPO on given pairs; rows may lack it")
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--cores", help="comma list of cores; default: all")
    parser.add_argument("--table", action="store_true", help="only print the table of what was run before")
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    return parser


def _task(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Task:
    if options.data is None:
        return find_task(options.task)
    if options.task != "chat":
        parser.error("--data is for the task chat")
    try:
        return find_task(options.task, RowsFile(options.data, options.reference_key, options.rejected_key))
    except SgpoError as problem:
        parser.error(str(problem))


def _names(wanted: str | None, task: Task, parser: argparse.ArgumentParser) -> list[str]:
    arms = arms_of(task)
    if wanted is None:
        return [name for name, arm in arms.items() if not arm.optional]
    if unknown := set(wanted.split(",")) - set(arms):
        parser.error(f"no arm '{sorted(unknown)[0]}'; there are {', '.join(arms)}")
    return closed(wanted.split(","), task)


def _share(arguments: list[str], cores: str | None) -> int:
    chosen = [int(core) for core in cores.split(",")] if cores else sorted(os.sched_getaffinity(0))
    variables = os.environ | ALLOCATOR  # a runner's process is its learner too
    runners = [subprocess.Popen([sys.executable, "-m", "bench.quality", *arguments, "--core", str(core)], env=variables) for core in chosen]
    return max(runner.wait() for runner in runners)


if __name__ == "__main__":
    sys.exit(main())
