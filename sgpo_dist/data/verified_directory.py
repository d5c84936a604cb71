"""A directory that is built once, whole or not at all, and checked by hash on every use.

``embedded_model`` keeps the converted model in one. Several processes may ask at once: one builds, the others wait for it.
What is built, and whether it is any good, is the caller's; this file only makes it durable and tells damage from health.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sgpo_dist.errors import EnvironmentProblem

MANIFEST_NAME: Final = "MANIFEST.json"


class FileEntry(BaseModel):
    """What one file of the directory must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=0, description="Bytes.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Lower-case hex digest of the whole file.")


class DirectoryManifest(BaseModel):
    """The last file written into the directory: every other file by its path inside."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    origin: str = Field(description="What the directory was built from, in words.")
    files: dict[str, FileEntry] = Field(min_length=1, description="Path inside the directory, with forward slashes, to size and digest.")


def ensure_directory(target: Path, build: Callable[[Path], None], *, origin: str, wait_s: float = 600.0) -> Path:
    """``target``, intact: as it lies there, or freshly made by ``build(empty_directory)``.

    A damaged or half-written ``target`` is replaced. The wait for another process's build ends when that process releases its lock
    (the kernel does so when it dies) or after ``wait_s`` seconds with EnvironmentProblem, as does a disk that cannot be written.
    """
    if is_intact(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock", timeout=wait_s):
            if not is_intact(target):
                _remove_leftovers(target)
                _build_beside(target, build, origin)
    except Timeout as error:
        raise EnvironmentProblem(f"another process has been building {target} for over {wait_s:.0f} s; end it and try again") from error
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {target} ({error}); free space there or set SGPO_CACHE to a writable directory") from error
    return target


def is_intact(directory: Path) -> bool:
    """Whether every file that the manifest names is there with its size and SHA-256 (about 1 s a GB)."""
    try:
        manifest = DirectoryManifest.model_validate_json((directory / MANIFEST_NAME).read_bytes())
        sizes_fit = all((directory / name).stat().st_size == entry.size for name, entry in manifest.files.items())
        return sizes_fit and all(file_sha256(directory / name) == entry.sha256 for name, entry in manifest.files.items())
    except (OSError, ValidationError):
        return False


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build_beside(target: Path, build: Callable[[Path], None], origin: str) -> None:
    partial = Path(tempfile.mkdtemp(prefix=_partial_prefix(target), dir=target.parent))
    try:
        build(partial)
        _seal(partial, origin)
        _move_into_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _seal(directory: Path, origin: str) -> None:
    """Make every file readable to all who share the cache, declare them in the manifest, and flush the lot to disk."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in paths:
        path.chmod(0o644)
    entries = {p.relative_to(directory).as_posix(): FileEntry(size=p.stat().st_size, sha256=file_sha256(p)) for p in paths}
    manifest = directory / MANIFEST_NAME
    manifest.write_text(DirectoryManifest(origin=origin, files=entries).model_dump_json(indent=2) + "\n", encoding="utf-8")
    for path in (*paths, manifest, *(p for p in directory.rglob("*") if p.is_dir()), directory):
        _flush(path)


def _move_into_place(partial: Path, target: Path) -> None:
    """Rename the finished directory to its name; a damaged one there steps aside first, since a full directory cannot be replaced."""
    partial.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
    if target.exists():
        target.replace(target.parent / f"{_partial_prefix(target)}damaged")
    partial.replace(target)
    _flush(target.parent)
    _remove_leftovers(target)


def _remove_leftovers(target: Path) -> None:
    """Delete what a killed builder left. Only called under the lock, so nobody is building there."""
    for leftover in target.parent.glob(f"{_partial_prefix(target)}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _partial_prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
