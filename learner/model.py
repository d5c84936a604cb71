"""The model as the learner sees it: a causal language model (with adapters or without) that scores completion tokens.

Called by the learner and its weight sender. The language-model head is computed on scored positions only and a chunk at a time, with
recomputation in the backward pass, so that the logits of a large vocabulary are never kept. Leaves out: optimisation, collectives.

Shapes: see ``batch``; ``_H`` = hidden size, ``_C`` = scored tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from learner.batch import MicroBatch
from sgpo_dist.config import LoraConfig, ModelConfig
from sgpo_dist.errors import ConfigError, EnvironmentProblem

SCORED_CHUNK: Final = 256
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MASKABLE_ATTENTION: Final = ("sdpa", "eager")
ALTERED_LOGITS: Final = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Configuration keys of models that change the head's output; scoring would be silently wrong, so they are refused."""


class CompletionScorer(nn.Module):
    """Wraps a causal language model; its forward pass turns a micro-batch into log-probs of the scored tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def causal_lm(self) -> nn.Module:
        """The Hugging Face model without its adapter wrapper (adapter layers are still inside)."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def forward(self, batch: MicroBatch) -> Tensor:
        """``[N]`` float32 log-probs (nats), in the batch's order of scored tokens."""
        model: Any = self.causal_lm
        mask = _fitting_mask(batch.mask_B1LL, model)
        hidden_B_L_H = model.get_decoder()(
            input_ids=batch.input_ids_B_L, attention_mask=mask, position_ids=batch.positions_B_L if mask is not None else None, use_cache=False
        ).last_hidden_state
        hidden_N_H = hidden_B_L_H.flatten(0, 1).index_select(0, batch.index_N)
        head = model.get_output_embeddings()
        pieces = zip(hidden_N_H.split(SCORED_CHUNK), batch.target_N.split(SCORED_CHUNK), strict=True)
        return torch.cat([_chunk_logps(head, hidden_C_H, target_C) for hidden_C_H, target_C in pieces])


def load_model(
    model_dir: str, settings: ModelConfig, attn_implementation: str, gradient_checkpointing: bool, device: torch.device, seed: int
) -> CompletionScorer:
    """The trainable model in training mode, adapters added when ``settings.lora`` is on (initialised from ``seed``).

    Raises ConfigError for a model or attention that cannot be scored exactly, EnvironmentProblem when the directory cannot be read.
    """
    model = _read_model(model_dir, settings, attn_implementation)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if settings.lora.enabled:
        model = _with_adapters(model, settings.lora, seed)
    return CompletionScorer(model).to(device).train()


def load_reference(model_dir: str, settings: ModelConfig, attn_implementation: str, device: torch.device) -> CompletionScorer:
    """A frozen model to score with; errors as ``load_model``."""
    model = _read_model(model_dir, settings, attn_implementation)
    return CompletionScorer(model).to(device).eval().requires_grad_(False)


@contextmanager
def adapters_off(scorer: CompletionScorer) -> Iterator[None]:
    """Within: the base model alone, which is the frozen reference of adapter training, in evaluation mode."""
    if not isinstance(scorer.model, PeftModel):
        raise ConfigError("this model has no adapters to switch off; give the stage a reference directory")
    was_training = scorer.training
    scorer.eval()
    try:
        with scorer.model.disable_adapter():
            yield
    finally:
        scorer.train(was_training)


def ties_head(model: Any) -> bool:
    """Whether the head shares its weight with the input embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def _read_model(model_dir: str, settings: ModelConfig, attn_implementation: str) -> Any:
    if attn_implementation not in MASKABLE_ATTENTION:
        raise ConfigError(f"learner.attn_implementation '{attn_implementation}' cannot mask shared-prefix rows; write sdpa or eager")
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=DTYPES[settings.dtype],
            attn_implementation=attn_implementation,
            trust_remote_code=settings.trust_remote_code,
            revision=settings.revision,
        )
    except (OSError, ValueError) as problem:
        raise EnvironmentProblem(f"model '{model_dir}' cannot be loaded: {str(problem).splitlines()[0]}") from problem
    altered = [key for key in ALTERED_LOGITS if getattr(model.config, key, None) not in (None, 1.0)]
    if altered:
        raise ConfigError(f"model '{model_dir}' sets {altered[0]}, which the learner's head does not apply; use another model")
    return model


def _with_adapters(model: Any, lora: LoraConfig, seed: int) -> PeftModel:
    """Adapters of the model's own type; every rank draws the same initial values without disturbing the caller's random state."""
    plan = PeftLoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules, task_type="CAUSAL_LM", bias="none"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, plan, autocast_adapter_dtype=False)  # type: ignore[return-value]


def _fitting_mask(mask_B1LL: Tensor | None, model: Any) -> Tensor | None:
    """Eager attention adds its mask to the scores; only sdpa takes a boolean one."""
    if mask_B1LL is None or model.config._attn_implementation != "eager":
        return mask_B1LL
    dtype = model.get_input_embeddings().weight.dtype
    return torch.zeros(mask_B1LL.shape, dtype=dtype, device=mask_B1LL.device).masked_fill(~mask_B1LL, torch.finfo(dtype).min)


def _chunk_logps(head: nn.Module, hidden_C_H: Tensor, target_C: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _head_logps(head, hidden_C_H, target_C)
    logps_C: Tensor = checkpoint(_head_logps, head, hidden_C_H, target_C, use_reentrant=False, preserve_rng_state=False)
    return logps_C


def _head_logps(head: nn.Module, hidden_C_H: Tensor, target_C: Tensor) -> Tensor:
    # log pi(target) = logit(target) - logsumexp(logits), in float32 whatever the model computes in
    return -cross_entropy(head(hidden_C_H).float(), target_C, reduction="none")
