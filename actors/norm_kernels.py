"""Layer normalisation of engines on processors by the compiled kernels that vLLM uses on GPUs only.

In PyTorch's operations it takes six passes, each with a barrier of its threads, which is a tenth of a decode step of a small model; the kernel
takes one, with its sums in float32 as well. Where a processor lacks AVX512-BF16's instructions, vLLM's kernels cut bfloat16 off instead of rounding
it, an error that adds up over the layers: a type that they do not round is not taken, which the log says once norms come in it.

Registered in vLLM's worker by ``weight_receiver`` as one more provider of vLLM's operations, chosen by ``PRIORITY`` (vLLM's ``ir_op_priority``).
What a kernel cannot take goes to vLLM's own way as before.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

PROVIDER: Final = "sgpo_processor"
PRIORITY: Final[Mapping[str, list[str]]] = {"rms_norm": [PROVIDER], "fused_add_rms_norm": [PROVIDER]}
VECTOR: Final = 32
"""Rows must consist of whole vectors of the kernels, which hold 8 to 32 numbers."""


def register(ops: Any) -> None:
    """Add the kernels to ``ops``, which is ``vllm.ir.ops``."""
    dtypes = frozenset(dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if rounds(dtype))

    @ops.rms_norm.register_impl(PROVIDER, supports_args=lambda x, weight, epsilon, variance_size=None: takes(dtypes, weight, variance_size, x))
    def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, weight, epsilon)
        return out

    @ops.fused_add_rms_norm.register_impl(
        PROVIDER,
        supports_args=lambda x, x_residual, weight, epsilon, variance_size=None: takes(dtypes, weight, variance_size, x, x_residual),
        inplace=True,
    )
    def fused_add_rms_norm(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual


def rounds(dtype: torch.dtype) -> bool:
    """Whether the kernels round to the nearest number of this type: their sum of x and residual is then PyTorch's, to the last bit."""
    x, residual = (torch.linspace(first, last, 64 * VECTOR).to(dtype).view(64, VECTOR) for first, last in ((-3.0, 3.0), (1.0, 2.0)))
    expected = x + residual
    torch.ops._C.fused_add_rms_norm(x, residual, torch.ones(VECTOR, dtype=dtype), 1e-5)
    return torch.equal(residual, expected)


def takes(dtypes: Collection[torch.dtype], weight: Tensor | None, variance_size: int | None, *inputs: Tensor) -> bool:
    """Whether the kernels take these arguments, and ``dtypes`` their type."""
    if weight is None:
        return False
    if weight.dtype not in dtypes:
        tell_left_out(weight.dtype)
        return False
    return (
        variance_size is None
        and weight.numel() % VECTOR == 0
        and all(tensor.is_contiguous() and tensor.dtype == weight.dtype for tensor in inputs)
    )


@cache
def tell_left_out(dtype: torch.dtype) -> None:
    """Once a process."""
    logger.warning("norms in %s take PyTorch's slower way: on this processor vLLM's kernels do not round it", str(dtype).removeprefix("torch."))
