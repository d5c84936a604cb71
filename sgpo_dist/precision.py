"""Which type ``model.dtype: auto`` comes down to. A run that exists keeps the type it began with, on whatever machine it is resumed."""

from __future__ import annotations

from typing import Literal, TypeAlias

import yaml

from sgpo_dist.config import Config
from sgpo_dist.placement import on_gpu
from sgpo_dist.run_directory import CONFIG_NAME

Dtype: TypeAlias = Literal["float32", "bfloat16"]
BFLOAT16_FEATURES = ("amx_bf16", "avx512_bf16", "bf16")
"""As PyTorch names the instructions for products of bfloat16, on x86 and on ARM."""


def settled(config: Config) -> Config:
    """The configuration with ``model.dtype`` decided (docs/adr/0010-precision-by-processor.md)."""
    if config.model.dtype != "auto":
        return config
    dtype = _recorded(config) or ("bfloat16" if on_gpu(config) else processor_dtype())
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def processor_dtype() -> Dtype:
    """The faster type of this machine's processor: without instructions for products of bfloat16 those are several times slower than float32's."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return "bfloat16" if any(capabilities.get(name) for name in BFLOAT16_FEATURES) else "float32"


def _recorded(config: Config) -> Dtype | None:
    """What the run that lies there computes in; None when there is none, or none that can be read (which the claim of it says)."""
    try:
        recorded = yaml.safe_load((config.run_dir / CONFIG_NAME).read_text(encoding="utf-8"))["model"]["dtype"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return None
    return recorded if recorded in ("float32", "bfloat16") else None
