"""Layer normalisation of engines on processors by the compiled kernels that vLLM uses on GPUs only.

In PyTorch's operations it takes six passes, each with a barrier of its threads, which is a tenth of a decode step of a small model; the kernel
takes one, with its sums in float32 as well. Registered in vLLM's worker by ``weight_receiver`` as one more provider of vLLM's operations,
chosen by ``PRIORITY`` (vLLM's ``ir_op_priority``). What a kernel cannot take goes to vLLM's own way as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

PROVIDER: Final = "sgpo_processor"
PRIORITY: Final[Mapping[str, list[str]]] = {"rms_norm": [PROVIDER], "fused_add_rms_norm": [PROVIDER]}
VECTOR: Final = 32
"""Rows must consist of whole vectors of the kernels, which hold 8 to 32 numbers."""


def register(ops: Any) -> None:
    """Add the kernels to ``ops``, which is ``vllm.ir.ops``."""

    @ops.rms_norm.register_impl(PROVIDER, supports_args=lambda x, weight, epsilon, variance_size=None: takes(weight, variance_size, x))
    def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, weight, epsilon)
        return out

    @ops.fused_add_rms_norm.register_impl(
        PROVIDER, supports_args=lambda x, x_residual, weight, epsilon, variance_size=None: takes(weight, variance_size, x, x_residual), inplace=True
    )
    def fused_add_rms_norm(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual


def takes(weight: Tensor | None, variance_size: int | None, *inputs: Tensor) -> bool:
    """Whether the kernels take these arguments."""
    return (
        weight is not None
        and variance_size is None
        and weight.numel() % VECTOR == 0
        and all(tensor.is_contiguous() and tensor.dtype == weight.dtype for tensor in inputs)
    )
