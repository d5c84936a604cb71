"""Patches between files of weights, and the copy that a worker on another node keeps by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.carrier import LocalCopy, Payload, read_payload
from sgpo_dist.errors import WeightSyncError
from sgpo_dist.weights import delta
from sgpo_dist.weights.files import PREFIX
from sgpo_dist.weights.version import WeightBundle

BUNDLE = WeightBundle(0, "shm", "", "node", "sum", 0, (), ())


def words(values: list[int]) -> delta.Bytes:
    return np.array(values, delta.WORD).view(np.uint8)


@given(st.data(), st.integers(1, 3000), st.sampled_from([0.0, 0.002, 0.01, 0.3, 1.0]), st.sampled_from([7, 256, 1 << 24]))
def test_a_patch_makes_the_new_file_of_the_old_one(data: st.DataObject, length: int, share: float, block: int) -> None:
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    old = draw.integers(0, 1 << 16, length, np.uint16)
    new = np.where(draw.random(length) < share, draw.integers(0, 1 << 16, length, np.uint16), old)
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(delta, "BLOCK", block)
        patch = delta.encode(old.view(np.uint8), new.view(np.uint8))
        delta.apply(old.view(np.uint8), patch)
    assert old.tolist() == new.tolist()


@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 257, 511, 512, 513, 5000])
def test_gaps_of_any_length_are_bridged(gap: int) -> None:
    old, new = np.zeros(gap + 2, np.uint16), np.zeros(gap + 2, np.uint16)
    new[[0, -1]] = 7
    patch = delta.encode(old.view(np.uint8), new.view(np.uint8))
    assert len(patch) == len(delta.MAGIC) + 2 * delta.COUNT.itemsize + 3 * (2 + gap // 256)
    delta.apply(old.view(np.uint8), patch)
    assert old.tolist() == new.tolist()


def test_a_hundredth_of_the_words_costs_a_sixtieth_of_the_file() -> None:
    draw = np.random.default_rng(0)
    old = draw.integers(0, 1 << 16, 1 << 20, np.uint16)
    new = np.where(draw.random(len(old)) < 0.01, old ^ 1, old)
    assert len(delta.encode(old.view(np.uint8), new.view(np.uint8))) < len(old) * 2 * 0.017


def test_other_sizes_have_no_patch() -> None:
    with pytest.raises(ValueError, match="no difference"):
        delta.encode(words([1, 2]), words([1, 2, 3]))


def test_a_damaged_patch_is_refused() -> None:
    old, new = words(list(range(600))), words([number * (number % 50 == 0) for number in range(600)])
    patch = delta.encode(old, new)
    far = patch.copy()
    far[24:26] = 255
    for bad, why in ((patch[:-1], "too early"), (np.append(patch, np.uint8(0)), "longer"), (patch[1:], "another file"), (far, "past the end")):
        with pytest.raises(ValueError, match=why):
            delta.apply(old.copy(), bad)
    with pytest.raises(ValueError, match="another file"):
        delta.apply(words([1]), patch)


# ---- the copy on another node ----------------------------------------------------------------------------------------------------------


def version(folder: Path, number: int, values: list[int]) -> WeightBundle:
    path = folder / f"v{number}"
    path.write_bytes(words(values).tobytes())
    return replace(BUNDLE, version=number, uri=str(path))


def test_the_first_version_comes_whole_and_the_next_as_a_patch(tmp_path: Path) -> None:
    place = tmp_path / "there"
    place.mkdir()
    copy = LocalCopy("w", [place])
    values = list(range(2000))
    first = version(tmp_path, 0, values)
    payload = read_payload(first.uri, "")
    assert payload.base == ""
    held = copy.take(first, payload)
    assert Path(held.uri).parent == place
    assert Path(held.uri).read_bytes() == Path(first.uri).read_bytes()
    values[77] = 5
    second = version(tmp_path, 1, values)
    payload = read_payload(second.uri, first.uri)
    assert payload.base == first.uri
    assert len(payload.data) < 100
    held = copy.take(second, payload)
    assert Path(held.uri).read_bytes() == Path(second.uri).read_bytes()
    assert held.version == 1
    copy.close()
    assert list(place.iterdir()) == []


def test_the_whole_file_is_sent_when_the_older_one_is_gone_or_a_patch_would_be_large(tmp_path: Path) -> None:
    new = version(tmp_path, 1, list(range(2000)))
    other = version(tmp_path, 0, list(range(1, 2001)))
    short = version(tmp_path, 2, [1])
    for held in (str(tmp_path / "gone"), other.uri, short.uri, ""):
        payload = read_payload(new.uri, held)
        assert (payload.base, payload.data.tobytes()) == ("", Path(new.uri).read_bytes())


def test_a_patch_on_what_is_not_held_is_refused_and_so_is_a_damaged_one(tmp_path: Path) -> None:
    place = tmp_path / "there"
    place.mkdir()
    copy = LocalCopy("w", [place])
    first, second = version(tmp_path, 0, [1, 2, 3]), version(tmp_path, 1, [1, 2, 4])
    patch = Payload(delta.encode(words([1, 2, 3]), words([1, 2, 4])), first.uri)
    with pytest.raises(WeightSyncError, match="holds nothing"):
        copy.take(second, patch)
    copy.take(first, read_payload(first.uri, ""))
    with pytest.raises(WeightSyncError, match="cannot be applied: it ends too early"):
        copy.take(second, replace(patch, data=patch.data[:-1]))
    with pytest.raises(WeightSyncError, match="holds nothing"):  # what a broken patch left is no base for another
        copy.take(second, patch)
    copy.close()


def test_files_of_killed_workers_are_removed_and_those_of_live_ones_stay(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}-dead-1.safetensors").touch()
    live = LocalCopy("live", [tmp_path])
    path = Path(live.take(version(tmp_path, 0, [1]), Payload(words([1]))).uri)
    LocalCopy("next", [tmp_path])
    assert list(tmp_path.glob(f"{PREFIX}-*")) == [path]
    live.close()
