"""The one tree of errors, named for what the operator has to do about them.

Every part raises these; foreign errors are turned into one of them once, at the door they enter by. Each carries one
line that says what to change. All are picklable with their attributes, because they cross Ray's process borders.
"""

from __future__ import annotations


class SgpoError(Exception):
    """Base of every error of this project; ``exit_code`` is what the command line ends with."""

    exit_code: int = 4


class ConfigError(SgpoError):
    """The configuration or command line asks for something impossible: change the named key."""

    exit_code = 2


class DataError(SgpoError):
    """A row of user data is missing or malformed: mend the named file and line."""

    exit_code = 2


class EnvironmentProblem(SgpoError):
    """The machine lacks what the run needs (GPU, memory, disk, compiler, package): provide it or ask for less."""

    exit_code = 3


class RunFailed(SgpoError):
    """The run stopped for a reason of its own (gate, brake, learner fault): read the reason, then resume."""

    exit_code = 4


class CheckpointError(RunFailed):
    """A checkpoint is damaged, foreign or of another run: use another one or start afresh."""


class WeightSyncError(RunFailed):
    """A weight version could not be proved on a worker: the worker is rebuilt; if it recurs, report the proof."""


class FencedError(RunFailed):
    """A writer of an earlier incarnation tried to write: it must end itself, a newer one owns the run."""


class WorkerFault(SgpoError):
    """A remote role died, hung or answered out of time: the supervisor replaces it."""

    def __init__(self, role: str, reason: str) -> None:
        super().__init__(role, reason)
        self.role = role
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.role}: {self.reason}"


class StoppedOnRequest(SgpoError):
    """The run was asked to stop and did so after a checkpoint: run the same command again to go on."""

    exit_code = 5
