"""The marker ``fault``: which rows of the fault matrix a test proves, and which invariants it checks for them.

With ``--fault-results FILE`` outcomes and measured recovery times (``record_property("recovery_s", 3.2)`` for every row of the test,
``"recovery_s:4"`` for one) are merged into the file, from which ``tools/fault_matrix.py`` writes the table. Without it nothing is written.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tools.fault_matrix import FAULTS, INVARIANTS, PASSED, ROOT, Result, merged, read_results, write_results

RECOVERY = "recovery_s"
FAULTS_OF_TEST = "faults"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-results", type=Path, metavar="FILE", help="merge the outcomes of tests marked `fault` into this file")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--fault-results")
    if path and not hasattr(config, "workerinput"):  # of processes side by side only the one that hears of every outcome writes
        config.pluginmanager.register(_Recorder(Path(path)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.user_properties.append((FAULTS_OF_TEST, {row: sorted(names) for row, names in sorted(faults_of(item).items())}))


def faults_of(item: pytest.Item) -> dict[int, set[str]]:
    """Invariants by row. Raises UsageError for rows and invariants that do not exist."""
    found: defaultdict[int, set[str]] = defaultdict(set)
    for mark in item.iter_markers("fault"):
        invariants = set(str(mark.kwargs.get("invariants", "")).split())
        if not mark.args or set(mark.args) - set(FAULTS) or not invariants or invariants - INVARIANTS:
            raise pytest.UsageError(f"{item.nodeid}: a fault marker is fault(1, .. 30, invariants='I1 .. I9'), not {mark.args} {mark.kwargs}")
        for row in mark.args:
            found[row] |= invariants
    return dict(found)


class _Recorder:
    """Collects what marked tests came to; all cases of a parametrized test are one test, failed when one of them failed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._faults: defaultdict[str, dict[int, list[str]]] = defaultdict(dict)
        self._outcomes: defaultdict[str, set[str]] = defaultdict(set)
        self._times: defaultdict[str, dict[int, float]] = defaultdict(dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._faults[_test(report.nodeid)].update(dict(report.user_properties).get(FAULTS_OF_TEST, {}))
        if report.when == "call" or report.outcome != PASSED:
            self._outcomes[_test(report.nodeid)].add(report.outcome)
        if report.when == "call":
            self._note_times(_test(report.nodeid), report.user_properties)

    def _note_times(self, test: str, properties: Iterable[tuple[str, object]]) -> None:
        for name, value in properties:
            kind, _, row = name.partition(":")
            if kind == RECOVERY:
                for number in [int(row)] if row else self._faults[test]:
                    self._times[test][number] = max(round(float(str(value)), 2), self._times[test].get(number, 0.0))

    def pytest_sessionfinish(self) -> None:
        date, commit, machine = datetime.now(UTC).date().isoformat(), _commit(), _machine()
        new = {
            test: Result(
                outcome=next(word for word in ("failed", PASSED, "skipped") if word in outcomes),
                faults=self._faults[test],
                recovery_s=dict(sorted(self._times[test].items())),
                date=date,
                commit=commit,
                machine=machine,
            )
            for test, outcomes in self._outcomes.items()
            if self._faults[test]
        }
        write_results(self._path, merged(read_results(self._path), new, self._outcomes))


def _test(nodeid: str) -> str:
    return nodeid.split("[", 1)[0]


def _commit() -> str:
    """The commit, with a plus where files differ from it; empty outside a checkout."""
    done = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = "GPU" if shutil.which("nvidia-smi") else "no GPU"
    python = ".".join(map(str, sys.version_info[:2]))
    return f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, {gpu}, Python {python}"
