"""Copies of a run's checkpoints at a second place that outlives its machine: a directory, or any store that fsspec reaches (s3://, gs://, ...).

The driver makes a ``CheckpointCopier``: the checkpoint store tells it of every commit, its thread copies, and the driver waits for the last copy
in the end. Nothing it does can stop a run. ``bring_run`` and ``bring_checkpoint`` are the way back. A copy is proved as a checkpoint is: every
byte is compared with its hash on the way out and on the way in, and a copy whose manifest is missing does not count. Leaves out: what a
checkpoint is (checkpoint), credentials (those that the store's own client finds).

    COPY_TO/RUN_NAME/  run.json  config.resolved.yaml  stages/NAME/...  checkpoints/step-N/ (... STAGES.json; MANIFEST.json, written last)
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import fsspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sgpo_dist.checkpoint import MANIFEST_NAME, STEP_NAME, Checkpoint, CheckpointStore, FileEntry, Manifest, file_sha256, surplus
from sgpo_dist.errors import CheckpointError, ConfigError, SgpoError
from sgpo_dist.run_directory import CONFIG_NAME, RUN_FILE_NAME, RunRecord

STAGES_NAME: Final = "STAGES.json"
CHECKPOINTS: Final = "checkpoints"
STAGES: Final = "stages"
BLOCK_BYTES: Final = 8 * 2**20


class StageFiles(BaseModel):
    """The models of the stages before, without which a checkpoint is of no use."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: dict[str, FileEntry] = Field(description="Every file under the run's stages/ by its path in there, forward slashes.")


@dataclass(frozen=True, slots=True)
class CopyOutcome:
    """How one copy went: ``problem`` is empty when it is whole. ``skipped`` older ones were never begun since the copy before."""

    step: int
    num_bytes: int
    seconds: float
    skipped: int = 0
    problem: str = ""


class Place:
    """A directory in a store, by its address. Raises ConfigError when nothing on this machine can reach such an address."""

    def __init__(self, address: str) -> None:
        try:
            self._files, self._root = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as problem:
            raise ConfigError(f"'{address}' cannot be reached: {str(problem).splitlines()[0]}") from None

    def read(self, name: str) -> bytes:
        """A small file. Raises FileNotFoundError, or whatever the store raises."""
        return bytes(self._files.cat_file(self._path(name)))

    def write(self, name: str, data: bytes) -> None:
        """A small file, replaced."""
        self._make_parent(name)
        self._files.pipe_file(self._path(name), data)

    def send(self, source: Path, name: str, expected: FileEntry) -> None:
        """A file of any size. Raises OSError when its bytes are not the expected ones."""
        self._make_parent(name)
        with source.open("rb") as file, self._files.open(self._path(name), "wb") as target:
            _pour(file, target, name, expected)

    def fetch(self, name: str, target: Path, expected: FileEntry) -> None:
        """The way back; errors as ``send``."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._files.open(self._path(name), "rb") as file, target.open("wb") as copy:
            _pour(file, copy, name, expected)

    def names(self, name: str) -> list[str]:
        """What lies directly in a directory; nothing when there is none."""
        try:
            self._files.invalidate_cache()
            return [str(path).rstrip("/").rsplit("/", 1)[-1] for path in self._files.ls(self._path(name), detail=False)]
        except FileNotFoundError:
            return []

    def remove(self, name: str) -> None:
        """A file or a whole directory; harmless when there is none."""
        if self._files.exists(self._path(name)):
            self._files.rm(self._path(name), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _make_parent(self, name: str) -> None:
        self._files.makedirs(self._path(name).rsplit("/", 1)[0], exist_ok=True)


@dataclass(frozen=True, slots=True)
class _Job:
    """A checkpoint and the stage models that were there when it was committed."""

    checkpoint: Path
    stage_files: tuple[Path, ...]


class CheckpointCopier:
    """Copies what it is told of, one at a time and the newest first, in a thread of its own; older ones that still wait are skipped."""

    def __init__(
        self, run_directory: Path, place: Place, *, keep_last: int, keep_every: int, done: Callable[[CopyOutcome], None]
    ) -> None:
        """``done`` hears of every copy, in the thread."""
        self._run = run_directory
        self._place = place
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._done = done
        self._changed = threading.Condition()
        self._waiting: _Job | None = None
        self._working: _Job | None = None
        self._skipped = 0
        self._hashes: dict[tuple[Path, int, int], str] = {}
        self._sent: dict[str, FileEntry] = {}
        threading.Thread(target=self._work, name="checkpoint-copy", daemon=True).start()

    def submit(self, checkpoint: Path) -> None:
        """Copy this checkpoint when the one in progress is done. Returns at once.

        What is in stages/ now goes with it; called after a commit, when no stage's model is being written.
        """
        stages = tuple(sorted(path for path in (self._run / STAGES).rglob("*") if path.is_file()))
        with self._changed:
            self._skipped += self._waiting is not None
            self._waiting = _Job(checkpoint, stages)
            self._changed.notify_all()

    def in_use(self, checkpoint: Path) -> bool:
        """Whether it is being copied or waits for it: it must not be deleted yet."""
        with self._changed:
            return checkpoint in [job.checkpoint for job in (self._working, self._waiting) if job is not None]

    def finish(self, timeout_s: float) -> bool:
        """Wait until nothing is left to copy, at most so long; whether that came true. The thread notifies after each copy."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting is None and self._working is None, timeout_s)

    def _work(self) -> None:
        """Waits without a deadline for ``submit``: a daemon, it ends with the driver."""
        while True:
            job, skipped = self._next_job()
            self._done(self._copied(job, skipped))
            with self._changed:
                self._working = None
                self._changed.notify_all()

    def _next_job(self) -> tuple[_Job, int]:
        with self._changed:
            while self._waiting is None:
                self._changed.wait()
            job = self._working = self._waiting
            skipped, self._skipped, self._waiting = self._skipped, 0, None
            return job, skipped

    def _copied(self, job: _Job, skipped: int) -> CopyOutcome:
        step, started = int(job.checkpoint.name.removeprefix("step-")), time.monotonic()
        try:
            num_bytes = self._copy(job)
        except Exception as problem:  # noqa: BLE001 - each store has errors of its own, and none of them may reach the run
            return CopyOutcome(step, 0, time.monotonic() - started, skipped, _first_line(problem))
        return CopyOutcome(step, num_bytes, time.monotonic() - started, skipped)

    def _copy(self, job: _Job) -> int:
        """The manifest last; what was there of the same step is removed first."""
        checkpoint = job.checkpoint
        manifest_bytes = (checkpoint / MANIFEST_NAME).read_bytes()
        manifest = Manifest.model_validate_json(manifest_bytes)
        self._refuse_other_run(manifest.run_id)
        target = f"{CHECKPOINTS}/{checkpoint.name}"
        self._place.remove(target)
        stages = self._send_stages(job.stage_files)
        for name in (RUN_FILE_NAME, CONFIG_NAME):
            self._place.write(name, (self._run / name).read_bytes())
        for name, entry in manifest.files.items():
            self._place.send(checkpoint / name, f"{target}/{name}", entry)
        self._place.write(f"{target}/{STAGES_NAME}", StageFiles(files=stages).model_dump_json(indent=1).encode())
        self._place.write(f"{target}/{MANIFEST_NAME}", manifest_bytes)
        self._prune(checkpoint.name)
        return manifest.num_bytes

    def _refuse_other_run(self, run_id: str) -> None:
        try:
            other = RunRecord.model_validate_json(self._place.read(RUN_FILE_NAME)).run_id
        except FileNotFoundError:
            return
        if other != run_id:
            raise OSError("another run of this name is kept there; set checkpoint.copy_to to another place, or move that one away")

    def _send_stages(self, paths: Sequence[Path]) -> dict[str, FileEntry]:
        """Models of finished stages, each file once a driver."""
        found = {}
        for path in paths:
            name, entry = path.relative_to(self._run / STAGES).as_posix(), self._entry(path)
            if self._sent.get(name) != entry:
                self._place.send(path, f"{STAGES}/{name}", entry)
                self._sent[name] = entry
            found[name] = entry
        return found

    def _entry(self, path: Path) -> FileEntry:
        """Size and hash, read once for as long as the file is not touched."""
        stat = path.stat()
        key = (path, stat.st_size, stat.st_mtime_ns)
        if key not in self._hashes:
            self._hashes[key] = file_sha256(path)
        return FileEntry(size=stat.st_size, sha256=self._hashes[key])

    def _prune(self, newest: str) -> None:
        """As the checkpoint store does; what has no manifest is the rest of a copy that failed."""
        listed = []
        for name in self._place.names(CHECKPOINTS):
            if STEP_NAME.match(name) is None:
                continue
            try:
                listed.append((name, Manifest.model_validate_json(self._place.read(f"{CHECKPOINTS}/{name}/{MANIFEST_NAME}"))))
            except (FileNotFoundError, ValidationError):
                self._place.remove(f"{CHECKPOINTS}/{name}")
        for name in surplus(listed, self._keep_last, self._keep_every):
            if name != newest:
                self._place.remove(f"{CHECKPOINTS}/{name}")


def is_copy(address: str) -> bool:
    """Whether ``--resume`` names a copy, not a checkpoint in a run's own directory."""
    return "://" in address or (Path(address) / STAGES_NAME).is_file()


def bring_run(address: str, run_directory: Path) -> None:
    """Give a run directory that is lost its identity back, from the copy of one of its checkpoints; one with anything in it is left alone.

    Raises CheckpointError when ``address`` is no copy.
    """
    if run_directory.is_dir() and any(run_directory.iterdir()):
        return
    place, _ = _split(address)
    with _as_ours(address):
        found = {name: place.read(name) for name in (CONFIG_NAME, RUN_FILE_NAME)}
        RunRecord.model_validate_json(found[RUN_FILE_NAME])
    run_directory.mkdir(parents=True, exist_ok=True)
    for name, data in found.items():
        (run_directory / name).write_bytes(data)


def bring_checkpoint(address: str, run_directory: Path, store: CheckpointStore) -> Checkpoint:
    """The copied checkpoint in the run's own store again, with the models of the stages before it. Raises CheckpointError, EnvironmentProblem."""
    place, name = _split(address)
    with _as_ours(address):
        source = f"{CHECKPOINTS}/{name}"
        manifest_text = place.read(f"{source}/{MANIFEST_NAME}")
        manifest = Manifest.model_validate_json(manifest_text)
        stages = StageFiles.model_validate_json(place.read(f"{source}/{STAGES_NAME}"))
        draft = store.begin(manifest.step)
        for file, entry in manifest.files.items():
            place.fetch(f"{source}/{file}", _inside(draft, file), entry)
        (draft / MANIFEST_NAME).write_bytes(manifest_text)
        for file, entry in stages.files.items():
            _bring_stage_file(place, file, _inside(run_directory / STAGES, file), entry)
        return store.adopt(draft)


def _bring_stage_file(place: Place, name: str, target: Path, entry: FileEntry) -> None:
    if target.is_file() and target.stat().st_size == entry.size and file_sha256(target) == entry.sha256:
        return
    draft = target.with_name(f".{target.name}.tmp")
    place.fetch(f"{STAGES}/{name}", draft, entry)
    draft.replace(target)


def _split(address: str) -> tuple[Place, str]:
    """.../RUN_NAME/checkpoints/step-N as the run's place and the step's name."""
    root, _, name = address.rstrip("/").rpartition(f"/{CHECKPOINTS}/")
    if not root or STEP_NAME.match(name) is None:
        raise CheckpointError(f"'{address}' is no copy of a checkpoint; write COPY_TO/RUN_NAME/{CHECKPOINTS}/step-N")
    return Place(root), name


def _inside(root: Path, name: str) -> Path:
    """``name`` under ``root``; a manifest from elsewhere may not lead out of it."""
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise CheckpointError(f"the copy names a file outside of itself ({name}); use another one")
    return path


@contextmanager
def _as_ours(address: str) -> Iterator[None]:
    """Whatever a store raises, and whatever damage looks like, as one of our errors."""
    try:
        yield
    except SgpoError:
        raise
    except FileNotFoundError as problem:
        raise CheckpointError(f"'{address}' is not a whole copy ({_first_line(problem)} is missing); use another one") from problem
    except ValidationError as problem:
        raise CheckpointError(f"'{address}' is damaged (its {problem.title} cannot be read); use another one") from problem
    except Exception as problem:
        raise CheckpointError(f"'{address}' cannot be brought back: {_first_line(problem)}") from problem


def _pour(source: IO[bytes], target: IO[bytes], name: str, expected: FileEntry) -> None:
    digest, size = hashlib.sha256(), 0
    while block := source.read(BLOCK_BYTES):
        digest.update(block)
        size += len(block)
        target.write(block)
    if (size, digest.hexdigest()) != (expected.size, expected.sha256):
        raise OSError(f"{name} is not what its hash says: it is damaged, or was changed while it was copied")


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]
