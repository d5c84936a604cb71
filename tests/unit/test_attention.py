"""The CPU's attention: PyTorch's own forward pass, and gradients as near to float32's as PyTorch's own are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from learner.attention import LONGEST, attend
from learner.batch import Row, collate

HEADS, KEYS, WIDTH = 6, 2, 16
ROWS = [
    Row(5, tuple(range(9)), (tuple(range(6)), tuple(range(4)))),
    Row(2, tuple(range(3)), (tuple(range(12)), tuple(range(7)))),
]


def mask_of_pairs(boolean: bool) -> Tensor:
    """The mask of two branched rows of unlike length, as it is or as what is added to the scores."""
    mask_B1LL = collate(ROWS).mask_B1LL
    assert mask_B1LL is not None
    return mask_B1LL if boolean else torch.zeros(mask_B1LL.shape).masked_fill_(~mask_B1LL, torch.finfo(torch.bfloat16).min)


def inputs(rows: int, length: int) -> tuple[list[Tensor], Tensor]:
    draw = torch.Generator().manual_seed(7)
    made = [torch.randn(rows, length, heads, WIDTH, generator=draw).transpose(1, 2) for heads in (HEADS, KEYS, KEYS)]
    return made, torch.randn(rows, length, HEADS, WIDTH, generator=draw)


def gradients(attention, mask: Tensor | None, dtype: torch.dtype, rows: int, length: int, scaling: float) -> tuple[Tensor, list[Tensor]]:
    """What comes out, and its gradients by query, key and value."""
    made, grad = inputs(rows, length)
    leaves = [each.bfloat16().to(dtype).requires_grad_() for each in made]
    module = SimpleNamespace(num_key_value_groups=HEADS // KEYS, is_causal=True)
    out, _ = attention(module, *leaves, mask.to(dtype) if mask is not None and mask.is_floating_point() else mask, dropout=0.0, scaling=scaling)
    out.backward(grad.bfloat16().to(dtype))
    return out.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("scaling", [WIDTH**-0.5, 0.1])
@pytest.mark.parametrize("masked", ["boolean", "added", "causal"])
def test_gradients_are_as_good_as_pytorchs(masked: str, scaling: float):
    mask = None if masked == "causal" else mask_of_pairs(masked == "boolean")
    rows, length = (mask.shape[0], mask.shape[2]) if mask is not None else (3, 33)
    _, exact = gradients(sdpa_attention_forward, mask, torch.float32, rows, length, scaling)
    theirs_out, theirs = gradients(sdpa_attention_forward, mask, torch.bfloat16, rows, length, scaling)
    out, ours = gradients(attend, mask, torch.bfloat16, rows, length, scaling)
    assert torch.equal(out, theirs_out)
    for name, mine, other, right in zip(("query", "key", "value"), ours, theirs, exact, strict=True):
        error, allowed = (torch.linalg.vector_norm(each.float() - right) / torch.linalg.vector_norm(right) for each in (mine, other))
        assert error < max(2 * float(allowed), 5e-3), f"{name}: relative error {error:.1e}, PyTorch's {allowed:.1e}"


@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 20), (torch.bfloat16, LONGEST + 1)])
def test_other_types_and_long_rows_stay_with_pytorch(dtype: torch.dtype, length: int):
    _, theirs = gradients(sdpa_attention_forward, None, dtype, 1, length, 0.25)
    _, ours = gradients(attend, None, dtype, 1, length, 0.25)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
