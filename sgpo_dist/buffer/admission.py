"""How many prompts may be in generation, and when a batch may be formed: the arithmetic behind the staleness bound.

Called by the ledger inside its transactions. Pure numbers in, a number or a verdict out: no database, no clock, no randomness.

Words and contract
------------------
B = ``batch_size`` pairs a step, K = ``weight_sync_interval`` steps a version, S = ``max_staleness``, v0 = ``base_version``, the
version in force at step 1. The driver publishes one version every K steps, so step t is trained at lockstep version
``L(t) = v0 + (t - 1) // K``. A pair of version v is fresh enough up to step ``D(v) = (v - v0 + S + 1) * K`` (``last_step``): that
is the last t with L(t) - v <= S. A pair is *started* once leased or stored, *unused* while leased or ready; after n formed batches
n * B pairs are used. A leased row counts with the version current at its grant, which is never newer than the pair it yields.

Why no pair becomes too stale
-----------------------------
Invariant, with n formed batches:  for every version v,  unused(versions <= v)  <=  B * (D(v) - n).        (*)
With v such that D(v) <= n it says that nothing unused is too old for step n + 1.

* A grant at version v happens only while started < B * D(v). Afterwards started = n * B + unused <= B * D(v), which is (*) for v and
  every newer version (D grows with v); older versions are untouched. Refusals, expiries and pairs newer than their lease only lower
  the left side. A late pair that is older than its row's present lease raises it, and is taken only if (*) still holds (``fits``).
* Forming batch t = n + 1 takes the B oldest ready pairs, so it takes min(B, ready(<= v)) of the versions <= v. Taking B of them keeps (*)
  for v. Taking all ready(<= v) < B of them leaves leased(<= v), which must be <= B * (D(v) - t): exactly what ``overtakes``
  tests, and the batch waits (IN_FLIGHT) until it holds. Waiting only for leases of version <= current - S, the obvious rule, is not
  enough: with S = 2, B = K = 1, let a, b, c start at version 0, train a, then d (version 1, overtaking b and c), then b: c is now
  three versions old.

So with a driver in lockstep no finished pair is ever thrown away. A driver that runs ahead of lockstep (a version bumped on resume)
can still make ready pairs too old; the ledger returns those prompts to waiting, counts them as ``stale`` and never trains on them.

Why it cannot deadlock
----------------------
Workers lease whenever there is room, and every lease settles: by an outcome, by give-back, or by its deadline. Look at a batch t that is
held for ever, so nothing changes any more; then leased = 0.

* IN_FLIGHT needs leased > 0. Contradiction.
* SETTLING (S = 0 only) needs leased > 0, or a waiting prompt and room for it, which a worker would lease. Contradiction.
* PAIRS with a waiting prompt and room: a worker would lease it. With no waiting prompt, or ``max_pairs`` stored: that is ``hopeless``,
  and the caller is told that the batch never comes. With no room under the staleness ceiling: started = B * D(current), so ready =
  B * (D(current) - (t - 1)), which is >= B unless D(current) < t.
* D(current) < t means that the driver has taken (S + 1) * K steps without a new version (VERSION): the only partner that can wake this
  wait is the driver's own ``advance``, and in lockstep L(t) <= current, hence D(current) >= t.

Each prompt is granted finitely often (a blamed one becomes a counted refusal), so the progress is not a cycle of expiries either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Hold(StrEnum):
    """Why a batch cannot be formed yet; the text goes into the message of a wait that ran out."""

    PAIRS = "too few finished pairs"
    IN_FLIGHT = "an older pair still in generation would become too stale"
    SETTLING = "synchronous: everything in generation must settle first"
    VERSION = "the next weight version is not published yet"


@dataclass(frozen=True, slots=True)
class Tally:
    """Rows of one stage by state; ``leased`` and ``ready`` are counted by version."""

    waiting: int
    leased: Mapping[int, int]
    ready: Mapping[int, int]
    assigned: int
    trained: int
    refused: int

    @property
    def num_leased(self) -> int:
        """Prompts in generation."""
        return sum(self.leased.values())

    @property
    def num_ready(self) -> int:
        """Pairs stored and not yet in a batch."""
        return sum(self.ready.values())

    @property
    def accepted(self) -> int:
        """Pairs ever stored (and not dropped as stale)."""
        return self.num_ready + self.assigned + self.trained

    @property
    def started(self) -> int:
        """Places taken under the ceiling; a refusal gives its place back."""
        return self.accepted + self.num_leased

    @property
    def unused(self) -> dict[int, int]:
        """Leased and ready rows by version."""
        versions = self.leased.keys() | self.ready.keys()
        return {version: self.leased.get(version, 0) + self.ready.get(version, 0) for version in versions}


@dataclass(frozen=True, slots=True)
class Admission:
    """The numbers of one stage. ``max_staleness`` None = no bound; ``max_pairs`` None = until the prompts run out."""

    batch_size: int
    weight_sync_interval: int
    max_staleness: int | None
    max_pairs: int | None
    base_version: int

    @property
    def capacity(self) -> int | None:
        """Unused pairs at most, right after a publication: (S + 1) * B * K. None = no bound."""
        if self.max_staleness is None:
            return None
        return (self.max_staleness + 1) * self.batch_size * self.weight_sync_interval

    def last_step(self, version: int) -> int | None:
        """D(version): the last step at which a pair of ``version`` is fresh enough. None = no bound."""
        if self.max_staleness is None:
            return None
        return (version - self.base_version + self.max_staleness + 1) * self.weight_sync_interval

    def train_version(self, step: int, current: int) -> int:
        """The version ``step`` is trained at: lockstep's, or the current one where the driver is ahead of it."""
        return max(current, self.base_version + (step - 1) // self.weight_sync_interval)

    def oldest_allowed(self, step: int, current: int) -> int | None:
        """The oldest pair version that ``step`` may train on. None = no bound."""
        if self.max_staleness is None:
            return None
        return self.train_version(step, current) - self.max_staleness

    def room(self, tally: Tally, current: int) -> int | None:
        """How many more prompts may be leased now, never negative. None = no bound."""
        last = self.last_step(current)
        ceilings = [] if last is None else [last * self.batch_size]
        if self.max_pairs is not None:
            ceilings.append(self.max_pairs)
        return max(0, min(ceilings) - tally.started) if ceilings else None

    def exhausted(self, tally: Tally) -> bool:
        """Whether no prompt will ever be granted again: all have outcomes, or ``max_pairs`` are stored."""
        if tally.num_leased:
            return False
        return tally.waiting == 0 or (self.max_pairs is not None and tally.accepted >= self.max_pairs)

    def hopeless(self, tally: Tally) -> bool:
        """Whether another whole batch can never be filled."""
        return tally.num_ready < self.batch_size and self.exhausted(tally)

    def hold(self, tally: Tally, step: int, current: int) -> Hold | None:
        """Why the batch of ``step`` must not be formed yet; None when it may. Asked only when it is not hopeless."""
        grantable = tally.waiting > 0 and self.room(tally, current) != 0
        if self.max_staleness == 0 and (tally.num_leased or grantable):
            return Hold.SETTLING
        if tally.num_ready < self.batch_size:
            return Hold.PAIRS if tally.num_leased or grantable else Hold.VERSION
        return Hold.IN_FLIGHT if self.overtakes(tally, step) else None

    def overtakes(self, tally: Tally, step: int) -> bool:
        """Whether forming ``step`` now would leave more older pairs in generation than the steps they have left can take."""
        ready = leased = 0
        for version in sorted(tally.leased.keys() | tally.ready.keys()):
            ready += tally.ready.get(version, 0)
            leased += tally.leased.get(version, 0)
            last = self.last_step(version)
            if last is None or ready >= self.batch_size:
                return False
            if leased > self.batch_size * (last - step):
                return True
        return False

    def fits(self, unused: Mapping[int, int], steps_formed: int) -> bool:
        """The invariant (*): whether the unused rows of every age can be trained before they are too old."""
        older = 0
        for version in sorted(unused):
            older += unused[version]
            last = self.last_step(version)
            if last is not None and older > self.batch_size * (last - steps_formed):
                return False
        return True
