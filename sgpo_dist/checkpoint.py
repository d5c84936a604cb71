"""The checkpoint store: a checkpoint is complete and proved by hash, or it does not exist.

The driver writes: ``begin`` gives an empty temporary directory, the learner and the buffer fill it, ``commit`` seals it with a manifest,
flushes it and renames it to ``step-N``. ``latest`` reads: newest intact one, falling back loudly past damaged ones. What is inside is the
business of those who fill it; a checkpoint of DeepSpeed is unpickled by its loader, so one that is not of this run is refused, never read.
One driver at a time works on a store (``run_directory`` sees to that).

    root/  latest (pointer for people)   step-10/ MANIFEST.json ...   step-20/ ...   tmp-30-1f2e3d4c/ (in the making, or left by a crash)
           old-20-9a8b7c6d/ (step-20 while it is committed again; put back when a crash left it alone)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sgpo_dist.errors import CheckpointError, EnvironmentProblem, SgpoError

FORMAT: Final = "sgpo_dist-checkpoint"
FORMAT_VERSION: Final = 1
MANIFEST_NAME: Final = "MANIFEST.json"
POINTER_NAME: Final = "latest"
CRASH_VARIABLE: Final = "SGPO_CRASH_AT"
CRASH_POINTS: Final = (
    "ckpt.begun",
    "ckpt.filled",
    "ckpt.files_synced",
    "ckpt.manifest_written",
    "ckpt.manifest_synced",
    "ckpt.old_moved",
    "ckpt.renamed",
    "ckpt.parent_synced",
    "ckpt.pointer_written",
    "ckpt.pointed",
    "ckpt.pruned",
)
"""Every place of the protocol where a test can kill the process, in their order (``old_moved`` only when a step is committed again)."""

Where = TypeVar("Where")
STEP_NAME: Final = re.compile(r"^step-(0|[1-9][0-9]*)$")
_OLD_NAME: Final = re.compile(r"^old-(0|[1-9][0-9]*)-[0-9a-f]+$")


class FileEntry(BaseModel):
    """What one file of a checkpoint must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=0, description="Bytes.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Hex digest of the whole file.")


class Manifest(BaseModel):
    """The last file written into a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = Field(description="Always sgpo_dist-checkpoint.")
    format_version: int = Field(ge=1, description="Raised when a release cannot read what an earlier one wrote.")
    run_id: str = Field(description="The run it belongs to.")
    step: int = Field(ge=0, description="The run's step it was made after.")
    sequence: int = Field(ge=1, description="Grows by one a commit; the newest is the one to resume from, whatever its step.")
    facts: dict[str, Any] = Field(description="What the driver needs to go on: stage, version and the like.")
    files: dict[str, FileEntry] = Field(description="Every other file by its path inside, forward slashes.")
    seal: str = Field(default="", description="SHA-256 of all the rest as canonical JSON; empty in those written before there was one.")

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(entry.size for entry in self.files.values())


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An intact checkpoint: every file was there with its hash when this was made."""

    path: Path
    step: int
    facts: Mapping[str, Any]
    run_id: str
    sequence: int
    num_bytes: int


class Copier(Protocol):
    """Who copies checkpoints to a second place."""

    def submit(self, checkpoint: Path) -> None:
        """There is a new one. Must return at once."""

    def in_use(self, checkpoint: Path) -> bool:
        """Whether it is still being read, so that it may not be pruned yet."""


def ignore(_: str) -> None:
    """Does nothing with a text: the default listener and crash point."""


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that ``path`` lies on."""
    return shutil.disk_usage(path).free


def crash_point(environment: Mapping[str, str]) -> Callable[[str], None]:
    """What kills this process by SIGKILL at the point that SGPO_CRASH_AT names; 'ckpt.renamed:3' = the third time it is passed."""
    name, _, count = environment.get(CRASH_VARIABLE, "").partition(":")
    left = int(count or 1)

    def passed(point: str) -> None:
        nonlocal left
        left -= point == name
        if point == name and left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return passed if name else ignore


def surplus(listed: Sequence[tuple[Where, Manifest]], keep_last: int, keep_every: int) -> list[Where]:
    """Of checkpoints those that need not be kept, oldest commit first. ``keep_every`` 0 keeps none but the last ones."""
    ordered = sorted(listed, key=lambda item: item[1].sequence)
    return [where for where, manifest in ordered[:-keep_last] if not (keep_every and manifest.step % keep_every == 0)]


class CheckpointStore:
    """The checkpoints of one run under one root. Blocking: call from a thread when a loop must go on (hashing is about 1 s a GB)."""

    def __init__(
        self,
        root: Path,
        *,
        run_id: str,
        keep_last: int = 2,
        keep_every: int = 0,
        min_free_bytes: int = 0,
        warn: Callable[[str], None] = ignore,
        copier: Copier | None = None,
        crash_point: Callable[[str], None] = ignore,
        free_bytes: Callable[[Path], int] = free_bytes,
        nonce: Callable[[], str] = lambda: secrets.token_hex(4),
    ) -> None:
        """``keep_every`` 0 keeps none but the last ones; ``warn`` hears of damaged checkpoints that were passed over.

        ``copier`` hears of every commit when it is durable.
        """
        self._root = root
        self._run_id = run_id
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._min_free_bytes = min_free_bytes
        self._warn = warn
        self._copier = copier
        self._crash_point = crash_point
        self._free_bytes = free_bytes
        self._nonce = nonce

    def begin(self, step: int) -> Path:
        """An empty directory to fill for ``step``. Raises EnvironmentProblem when there is too little free disk; old ones stay."""
        self._root.mkdir(parents=True, exist_ok=True)
        self._put_back()
        self._remove_leftovers()
        needed = self._min_free_bytes + max((manifest.num_bytes for _, manifest in self._listed()), default=0)
        free = self._free_bytes(self._root)
        if free < needed:
            raise EnvironmentProblem(
                f"no checkpoint of step {step}: {free / 2**30:.2f} GiB free on the disk of {self._root}, {needed / 2**30:.2f} GiB needed; "
                "free space there, or lower checkpoint.keep_last or cluster.min_free_disk_gib"
            )
        directory = self._root / f"tmp-{step}-{self._nonce()}"
        directory.mkdir()
        self._crash_point("ckpt.begun")
        return directory

    def commit(self, tmp: Path, step: int, facts: Mapping[str, Any]) -> Path:
        """Make what lies in ``tmp`` the checkpoint of ``step``; returns its directory once it is durable.

        ``facts`` must be plain JSON values. A step committed before is replaced; a crash meanwhile leaves the old one or the new one.
        Raises EnvironmentProblem when the disk refuses.
        """
        self._crash_point("ckpt.filled")
        try:
            self._seal(tmp, step, facts)
            target = self._move_into_place(tmp, step)
            self._point_to(target.name)
        except OSError as problem:
            raise EnvironmentProblem(
                f"cannot write the checkpoint of step {step} ({problem}); free space on the disk of {self._root}"
            ) from problem
        self._crash_point("ckpt.pointed")
        if self._copier is not None:
            self._copier.submit(target)
        return target

    def adopt(self, draft: Path) -> Checkpoint:
        """Make a checkpoint that was made elsewhere, and now lies in a draft of ``begin``, one of this store's.

        Raises CheckpointError when it is damaged or foreign, EnvironmentProblem when the disk refuses.
        """
        found = self.load(draft)
        try:
            for path in [path for path in draft.rglob("*") if path.is_file()]:
                _sync(path)
            target = self._move_into_place(draft, found.step)
            self._point_to(target.name)
        except OSError as problem:
            raise EnvironmentProblem(f"cannot write {draft} ({problem}); free space on the disk of {self._root}") from problem
        return replace(found, path=target)

    def latest(self, before: int | None = None) -> Checkpoint | None:
        """The newest intact checkpoint, of a step smaller than ``before`` if that is given; None when there was never one.

        Damaged ones are passed over and told to ``warn``. Raises CheckpointError when one is foreign, or, without ``before``, when none of
        several is intact.
        """
        self._put_back()
        directories = self._directories()
        for place, (path, manifest) in enumerate(sorted(self._listed(self._passed_over), key=lambda item: -item[1].sequence)):
            if before is not None and manifest.step >= before:
                continue
            try:
                found = self._verified(path)
            except _DamagedError as damage:
                self._passed_over(path, damage)
                continue
            if place == 0:
                self._finish_pointing(path.name)
            return found
        if directories and before is None:
            raise CheckpointError(
                f"none of the {len(directories)} checkpoints in {self._root} is intact; restore one, or set run_name= to start afresh"
            )
        return None

    def load(self, path: Path) -> Checkpoint:
        """The checkpoint at ``path``, verified. Raises CheckpointError when it is damaged, foreign or not there."""
        try:
            return self._verified(path)
        except _DamagedError as damage:
            raise CheckpointError(f"checkpoint {path} is damaged ({damage}); use another one") from None

    def prune(self) -> list[Path]:
        """Delete what neither ``keep_last`` nor ``keep_every`` keeps; returns what went. Unreadable directories are left to people."""
        extra = surplus(self._listed(), self._keep_last, self._keep_every)
        if self._copier is not None:
            extra = [path for path in extra if not self._copier.in_use(path)]
        for path in extra:
            _remove(path)
        self._crash_point("ckpt.pruned")
        return extra

    def _seal(self, tmp: Path, step: int, facts: Mapping[str, Any]) -> None:
        paths = sorted(path for path in tmp.rglob("*") if path.is_file() and path != tmp / MANIFEST_NAME)
        for path in paths:
            _sync(path)
        self._crash_point("ckpt.files_synced")
        unsealed = Manifest(
            format=FORMAT,
            format_version=FORMAT_VERSION,
            run_id=self._run_id,
            step=step,
            sequence=1 + max((known.sequence for _, known in self._listed()), default=0),
            facts=dict(facts),
            files={path.relative_to(tmp).as_posix(): FileEntry(size=path.stat().st_size, sha256=file_sha256(path)) for path in paths},
        )
        manifest = unsealed.model_copy(update={"seal": _seal_of(unsealed.model_dump(mode="json"))})
        (tmp / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        self._crash_point("ckpt.manifest_written")
        for path in (tmp / MANIFEST_NAME, *(item for item in tmp.rglob("*") if item.is_dir()), tmp):
            _sync(path)
        self._crash_point("ckpt.manifest_synced")

    def _move_into_place(self, tmp: Path, step: int) -> Path:
        """Rename to step-N; one that is there steps aside first, because a full directory cannot be replaced in one move."""
        target = self._root / f"step-{step}"
        if target.exists():
            target.rename(self._root / f"old-{step}-{self._nonce()}")
            self._crash_point("ckpt.old_moved")
        tmp.rename(target)
        self._crash_point("ckpt.renamed")
        _sync(self._root)
        self._crash_point("ckpt.parent_synced")
        self._remove_leftovers()
        return target

    def _point_to(self, name: str) -> None:
        pointer = self._root / f"tmp-{POINTER_NAME}"
        pointer.write_text(name + "\n", encoding="ascii")
        _sync(pointer)
        self._crash_point("ckpt.pointer_written")
        pointer.replace(self._root / POINTER_NAME)
        _sync(self._root)

    def _finish_pointing(self, name: str) -> None:
        """What a crash between the rename and the pointer left undone; people and the audit read the pointer."""
        pointer = self._root / POINTER_NAME
        if not pointer.is_file() or pointer.read_bytes() != f"{name}\n".encode():
            self._point_to(name)

    def _put_back(self) -> None:
        """Undo a replacement that a crash cut between its two renames."""
        for path in self._root.glob("old-*"):
            step = _OLD_NAME.match(path.name)
            if step and not (self._root / f"step-{step[1]}").exists():
                path.rename(self._root / f"step-{step[1]}")

    def _remove_leftovers(self) -> None:
        """What a crash left, and the replaced checkpoint; never an ``old-*`` whose step is missing."""
        for path in [*self._root.glob("tmp-*"), *(path for path in self._root.glob("old-*") if _OLD_NAME.match(path.name))]:
            _remove(path)

    def _directories(self) -> list[Path]:
        """Everything that bears the name of a checkpoint. A symbolic link does not count: it may lead out of the run."""
        if not self._root.is_dir():
            return []
        return [path for path in self._root.iterdir() if STEP_NAME.match(path.name) and path.is_dir() and not path.is_symlink()]

    def _listed(self, unreadable: Callable[[Path, _DamagedError], None] = lambda path, damage: None) -> list[tuple[Path, Manifest]]:
        """Checkpoints with a readable manifest, files unchecked."""
        found = []
        for path in self._directories():
            try:
                found.append((path, self._manifest(path)))
            except _DamagedError as damage:
                unreadable(path, damage)
        return found

    def _passed_over(self, path: Path, damage: _DamagedError) -> None:
        self._warn(f"checkpoint {path.name} is damaged ({damage}); it is passed over")

    def _manifest(self, path: Path) -> Manifest:
        """Raises _DamagedError when it cannot be read, CheckpointError when it is of another program, release or run."""
        try:
            tree = json.loads((path / MANIFEST_NAME).read_bytes())
        except FileNotFoundError:
            raise _DamagedError(f"it has no {MANIFEST_NAME}") from None
        except (OSError, ValueError, RecursionError):
            raise _DamagedError(f"{MANIFEST_NAME} cannot be read") from None
        if isinstance(tree, dict) and tree.get("seal", "") not in ("", _seal_of(tree)):  # before it is called a stranger's: damage looks so too
            raise _DamagedError(f"{MANIFEST_NAME} does not fit its seal")
        self._refuse_foreign(path, tree)
        try:
            return Manifest.model_validate(tree)
        except ValidationError:
            raise _DamagedError(f"{MANIFEST_NAME} lacks what it must hold") from None

    def _refuse_foreign(self, path: Path, tree: Any) -> None:
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise CheckpointError(f"{path} was not written by sgpo_dist; move it out of the run's directory")
        if tree.get("format_version") != FORMAT_VERSION:
            found = tree.get("format_version")
            raise CheckpointError(f"{path} has checkpoint format {found}, not {FORMAT_VERSION}; use the release that wrote it")
        if tree.get("run_id") != self._run_id:
            raise CheckpointError(f"{path} belongs to another run ({str(tree.get('run_id'))[:8]}…); move it out of this run's directory")

    def _verified(self, path: Path) -> Checkpoint:
        manifest = self._manifest(path)
        for name, entry in manifest.files.items():
            _check_file(path, name, entry)
        return Checkpoint(path, manifest.step, manifest.facts, manifest.run_id, manifest.sequence, manifest.num_bytes)


class _DamagedError(SgpoError):
    """A checkpoint that cannot be restored from; never leaves this file."""


def _check_file(directory: Path, name: str, entry: FileEntry) -> None:
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise _DamagedError(f"{name} leads out of the directory")
    if not path.is_file():
        raise _DamagedError(f"{name} is missing")
    if path.stat().st_size != entry.size:
        raise _DamagedError(f"{name} has {path.stat().st_size} bytes instead of {entry.size}")
    if file_sha256(path) != entry.sha256:
        raise _DamagedError(f"{name} has another SHA-256")


def _seal_of(tree: Mapping[str, Any]) -> str:
    """What the seal of a manifest must be, whatever it is."""
    rest = {name: value for name, value in tree.items() if name != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Delete a file or a whole directory; symbolic links are removed, never followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
