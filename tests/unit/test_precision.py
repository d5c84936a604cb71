"""The learner's type by processor, and by what the run began with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sgpo_dist.config import Config, build_config
from sgpo_dist.precision import settled
from sgpo_dist.run_directory import CONFIG_NAME, RunDirectory


def config(folder: Path, **sections: object) -> Config:
    return build_config({"output_dir": str(folder), "run_name": "r", **sections})


def processor_with(monkeypatch: pytest.MonkeyPatch, **features: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "some", **features})


@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        ({"avx2": True, "avx512_bf16": False}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"bf16": True}, "bfloat16"),
    ],
)
def test_auto_follows_the_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, features: dict[str, bool], dtype: str) -> None:
    processor_with(monkeypatch, **features)
    assert settled(config(tmp_path)).model.dtype == dtype


def test_gpus_and_explicit_types_do_not_ask_the_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    processor_with(monkeypatch)
    assert settled(config(tmp_path, learner={"gpus_per_rank": 1})).model.dtype == "bfloat16"
    assert settled(config(tmp_path, model={"dtype": "bfloat16"})).model.dtype == "bfloat16"
    processor_with(monkeypatch, amx_bf16=True)
    assert settled(config(tmp_path, model={"dtype": "float32"})).model.dtype == "float32"


def test_a_run_keeps_the_type_it_began_with_on_another_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    processor_with(monkeypatch, amx_bf16=True)
    with RunDirectory.claim(settled(config(tmp_path))):
        pass
    processor_with(monkeypatch)
    again = settled(config(tmp_path))
    assert again.model.dtype == "bfloat16"
    with RunDirectory.claim(again) as directory:  # no other configuration
        assert directory.incarnation == 2


@pytest.mark.parametrize("text", ["", "model: {}\n", "model: {dtype: auto}\n", "- 1\n", "a: [\n", "model: {dtype: [1]}\n"])
def test_a_record_that_cannot_be_read_decides_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    processor_with(monkeypatch)
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / CONFIG_NAME).write_text(text)
    assert settled(config(tmp_path)).model.dtype == "float32"
