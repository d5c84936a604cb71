"""The fault matrix: thirty faults, the tests that prove what becomes of them, and the table of docs/reliability.md that is made from both.

``tests/conftest.py`` merges the outcomes of tests that carry the marker ``fault`` into docs/fault_matrix.json; run as a program this writes
the table between the two marks of the page. Leaves out: running tests (``make fault-matrix`` does), and what the invariants mean (the page).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = ROOT / "docs" / "fault_matrix.json"
PAGE: Final = ROOT / "docs" / "reliability.md"
BEGIN: Final = "<!-- fault matrix: written by `python tools/fault_matrix.py` from docs/fault_matrix.json -->"
END: Final = "<!-- end of the fault matrix -->"
INVARIANTS: Final = frozenset(f"I{number}" for number in range(1, 10))
PASSED: Final = "passed"


@dataclass(frozen=True, slots=True)
class Fault:
    """A row: what is done, what becomes of it, and, where there is nothing to measure, how long that takes."""

    what: str
    outcome: str
    time: str = "-"


FAULTS: Final[Mapping[int, Fault]] = {
    1: Fault(
        "rollout worker killed while it generates",
        "its prompts go back and are leased again; a successor proves the newest version before it generates",
    ),
    2: Fault("worker killed, or the line cut, between `put` and its answer", "the outcome is stored once, whoever puts it again", "at once"),
    3: Fault(
        "worker hangs, comes back after it was replaced",
        "its lease expires or is given back; the late pair is taken once, or turned away and counted",
        "a lease's length",
    ),
    4: Fault("the engine's process dies under its worker", "the worker ends itself and is replaced; no process of the engine stays"),
    5: Fault("all workers dead", "the learner waits; a crash loop ends the run with the log's last lines"),
    6: Fault("learner killed in a step", "rebuilt from the newest checkpoint, recorded batches trained again, workers go on"),
    7: Fault("killed in each phase of a checkpoint", "old or new checkpoint, never a mix; what a crash left is put back or removed", "at once"),
    8: Fault("one rank of the learner killed or hung", "the whole group is ended and rebuilt"),
    9: Fault("buffer killed", "comes back on its file with everything acknowledged; leases get fresh deadlines"),
    10: Fault(
        "power cut under the buffer",
        "opens at the last whole transaction and never before the last checkpoint; a damaged file is refused with the remedy, or named by the audit",
        "at once",
    ),
    11: Fault(
        "driver killed, SIGTERM, Ctrl-C",
        "the same command resumes, to the same weights where the run is synchronous; SIGTERM, Ctrl-C, `sgpo-dist stop` and `time_limit_s` leave a "
        "checkpoint and exit code 5, at any moment",
    ),
    12: Fault("`ray job stop`", "as SIGTERM, if the checkpoint fits into Ray's grace time (docs/cluster.md); no actor stays"),
    13: Fault("a worker's node lost", "as 1, but it costs no restart; the node is avoided, the successor waits for room"),
    14: Fault(
        "a node drained before preemption",
        "its worker gives back what it holds and leaves before the deadline, its successor starts elsewhere; no crash",
    ),
    15: Fault("head node lost", "one line and exit code 3 within 50 s; the same command on a new cluster resumes from disk"),
    16: Fault("workers added and removed while it runs", "throughput follows; nothing is restarted"),
    17: Fault(
        "calls lost or delivered twice",
        "every call may be repeated; a grant whose answer was lost expires although its worker lives, because workers renew leases by name",
        "a lease's length",
    ),
    18: Fault("slow network", "the staleness bound holds; what is too old is dropped and counted"),
    19: Fault("weights cut off on their way", "nothing is put without a proof; the worker is rebuilt"),
    20: Fault("disk full", "one line that says what to free; the old checkpoint stays; goes on, or is resumed, when there is room", "at once"),
    21: Fault("checkpoint changed or cut on disk", "found by hash, the one before is used, one warning", "at once"),
    22: Fault("worker ended for lack of memory", "as 1, with a growing pause from the second time on; `worker_lost` names the settings to lower"),
    23: Fault("loss or gradient that is not finite", "the step is skipped and counted; too many in a row end the run", "one step"),
    24: Fault(
        "prompt that kills each worker",
        "from the second failure it is generated alone; after five it is a refusal with that reason; its neighbours are not",
        "five workers",
    ),
    25: Fault(
        "endpoint hangs, refuses, answers junk", "tried again with growing jittered pauses within a budget, then a counted refusal", "the pauses"
    ),
    26: Fault("two drivers on one run", "the second is refused and told the first one's pid; a stale one is fenced off", "at once"),
    27: Fault("the clock is set", "nothing: deadlines use the monotonic clock", "none"),
    28: Fault("files of another release", "refused, with the release to use", "at once"),
    29: Fault(
        "DeepSpeed's build lock left by a dead process",
        "not waited for: what is not needed is not built, and locks in our own cache are removed",
        "at once",
    ),
    30: Fault("random mix on real processes", "a table of recoveries, the share of useful time, the audit"),
}


@dataclass(frozen=True, slots=True)
class Result:
    """A test's last outcome. ``faults`` names the invariants that it checks by row, ``recovery_s`` the seconds that it measured."""

    outcome: str
    faults: Mapping[int, Sequence[str]]
    date: str
    commit: str
    machine: str
    recovery_s: Mapping[int, float] = field(default_factory=dict)


def read_results(path: Path) -> dict[str, Result]:
    """Results by test; none when there is no file yet."""
    if not path.is_file():
        return {}
    return {test: _result(tree) for test, tree in json.loads(path.read_text(encoding="utf-8")).items()}


def _result(tree: Mapping[str, object]) -> Result:
    keyed = {name: {int(row): value for row, value in tree[name].items()} for name in ("faults", "recovery_s")}  # type: ignore[attr-defined]
    return Result(**{**tree, **keyed})  # type: ignore[arg-type]


def write_results(path: Path, results: Mapping[str, Result]) -> None:
    """In the order of the tests' names, so that a change is a small difference."""
    trees = {test: asdict(results[test]) for test in sorted(results)}
    path.write_text(json.dumps(trees, indent=1) + "\n", encoding="utf-8")


def merged(old: Mapping[str, Result], new: Mapping[str, Result], seen: Iterable[str]) -> dict[str, Result]:
    """``new`` wins, except that a skipped test keeps what it had. Tests that ran unmarked, or exist no more, are left out."""
    fresh = {test: old[test] if result.outcome == "skipped" and test in old else result for test, result in new.items()}
    kept = {test: result for test, result in old.items() if test not in set(seen) and is_test(test)}
    return {**kept, **fresh}


def is_test(test: str, root: Path = ROOT) -> bool:
    """Whether FILE::NAME is still there."""
    path, _, name = test.partition("::")
    return (root / path).is_file() and f"def {name.rsplit('::', 1)[-1]}(" in (root / path).read_text(encoding="utf-8")


def table(results: Mapping[str, Result]) -> str:
    """The table in Markdown."""
    lines = ["| # | fault | what happens | tests | checked | time to recover | last run |", "|---|---|---|---|---|---|---|"]
    for number, fault in FAULTS.items():
        mine = {test: result for test, result in sorted(results.items()) if number in result.faults}
        passed = [result for result in mine.values() if result.outcome == PASSED]
        checked = " ".join(sorted({name for result in passed for name in result.faults[number]}))
        dates = max((result.date for result in passed), default="-")
        cells = [str(number), fault.what, fault.outcome, _tests(mine), checked or "-", _time(number, fault, passed), dates]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _tests(mine: Mapping[str, Result]) -> str:
    by_outcome: defaultdict[str, list[str]] = defaultdict(list)
    for test, result in mine.items():
        by_outcome[result.outcome].append(f"`{test.removeprefix('tests/')}`")
    passed = by_outcome.pop(PASSED, [])
    others = [f"**{outcome}**: {', '.join(tests)}" for outcome, tests in sorted(by_outcome.items())]
    return "; ".join([", ".join(passed) if passed else "**no passing test**", *others])


def _time(number: int, fault: Fault, passed: Iterable[Result]) -> str:
    times = sorted(result.recovery_s[number] for result in passed if number in result.recovery_s)
    if not times:
        return fault.time
    first, last = _seconds(times[0]), _seconds(times[-1])
    return f"{last} s" if first == last else f"{first} to {last} s"


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def with_table(page: str, results: Mapping[str, Result]) -> str:
    """The page with a fresh table between its two marks. Raises ValueError when it lacks one."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks the line {BEGIN if not begin else END}")
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def main() -> int:
    """Write the page; say which rows no passing test proves."""
    parser = argparse.ArgumentParser(description="write the fault matrix into docs/reliability.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    results = read_results(options.results)
    options.page.write_text(with_table(options.page.read_text(encoding="utf-8"), results), encoding="utf-8")
    proven = {number for result in results.values() if result.outcome == PASSED for number in result.faults}
    missing = sorted(set(FAULTS) - proven)
    print(f"{len(FAULTS) - len(missing)} of {len(FAULTS)} faults have a passing test" + (f"; none: {missing}" if missing else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
