"""Attention on processors: PyTorch's forward pass with a backward pass of bf16 matrix products.

PyTorch's backward pass for CPUs (flash attention) was a third of a DPO step: 33 ms a layer for 7 rows of 290 tokens, of which these products
take 17 ms where the processor multiplies bf16. The forward pass, and with it every log-prob, stays PyTorch's own. Called by transformers'
models under the name ``NAME``. Leaves out: rows too long for it, other types and dropout, which stay with ``sdpa`` both ways.

Shapes: ``_B`` = rows, ``_H`` = heads of the query, ``_K`` = heads of keys and values (``_H`` / ``_K`` queries share one), ``_L`` = positions,
``_D`` = width of a head, ``_Q`` = ``_H`` / ``_K`` * ``_L``.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME: Final = "products"
LONGEST: Final = 1024
"""At 1,200 positions the scores of a row no longer fit the caches, and the products take as long as PyTorch's own."""

ALTERING: Final = ("position_bias", "cache", "is_causal")
"""Options that change what is attended to; PyTorch's own backward pass knows them."""


def attend(
    module: Any, query_B_H_L_D: Tensor, key_B_K_L_D: Tensor, value_B_K_L_D: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """``[B, L, H, D]``. ``attention_mask`` as ``sdpa`` takes it: ``[B, 1, L, L]``, boolean or added to the scores; None for causal attention."""
    fits = query_B_H_L_D.dtype is torch.bfloat16 and key_B_K_L_D.shape[2] == query_B_H_L_D.shape[2] <= LONGEST
    altered = options.get("dropout") or any(options.get(name) is not None for name in ALTERING)
    if not fits or altered or not torch.is_grad_enabled():
        attended: tuple[Tensor, None] = sdpa_attention_forward(module, query_B_H_L_D, key_B_K_L_D, value_B_K_L_D, attention_mask, **options)
        return attended
    out: Tensor = _Attention.apply(query_B_H_L_D, key_B_K_L_D, value_B_K_L_D, attention_mask, module, options)
    return out, None


class _Attention(torch.autograd.Function):
    """Gradients as in any text book: P = softmax(s Q K' + M), O = P V; dV = P' dO, dS = P * (dP - rowsum(dP * P)) with dP = dO V'."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, module: Any, options: dict[str, Any]) -> Tensor:
        """PyTorch's. The scores are not kept, the backward pass computes them again."""
        out: Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = options.get("scaling") or query.shape[-1] ** -0.5
        return out

    @staticmethod
    def backward(ctx: Any, grad_B_L_H_D: Tensor) -> tuple[Tensor | None, ...]:
        """A row at a time, whose scores then stay in the caches."""
        query_B_H_L_D, key_B_K_L_D, value_B_K_L_D, mask = ctx.saved_tensors
        groups, length, width = key_B_K_L_D.shape[1:]
        if mask is None:
            mask = torch.full((1, 1, length, length), -torch.inf, dtype=query_B_H_L_D.dtype).triu_(1)
        elif mask.dtype is torch.bool:
            mask = torch.zeros(mask.shape, dtype=query_B_H_L_D.dtype).masked_fill_(~mask, -torch.inf)
        masks_B1LL = mask.expand(len(query_B_H_L_D), 1, length, length)
        grads = tuple(torch.empty(each.shape, dtype=each.dtype) for each in (query_B_H_L_D, key_B_K_L_D, value_B_K_L_D))
        rows = zip(query_B_H_L_D, key_B_K_L_D, value_B_K_L_D, masks_B1LL, grad_B_L_H_D.transpose(1, 2), *grads, strict=True)
        for query, key_K_L_D, value_K_L_D, mask_1LL, grad, grad_query, grad_key, grad_value in rows:
            query_K_Q_D, grad_K_Q_D = query.reshape(groups, -1, width), grad.reshape(groups, -1, width)
            scores_H_L_L = torch.bmm(query_K_Q_D, key_K_L_D.transpose(1, 2)).view(-1, length, length)
            p_H_L_L = torch.softmax(torch.add(mask_1LL, scores_H_L_L, alpha=ctx.scale, out=scores_H_L_L), dim=-1)
            grad_p_H_L_L = torch.bmm(grad_K_Q_D, value_K_L_D.transpose(1, 2)).view(-1, length, length)
            grad_s_H_L_L = torch._softmax_backward_data(grad_p_H_L_L, p_H_L_L, -1, p_H_L_L.dtype).mul_(ctx.scale)
            torch.bmm(p_H_L_L.view(groups, -1, length).transpose(1, 2), grad_K_Q_D, out=grad_value)
            torch.bmm(grad_s_H_L_L.view(groups, -1, length), key_K_L_D, out=grad_query.view(groups, -1, width))
            torch.bmm(grad_s_H_L_L.view(groups, -1, length).transpose(1, 2), query_K_Q_D, out=grad_key)
        return *grads, None, None, None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
