"""The model as the learner sees it: a causal language model (with adapters or without) that scores completion tokens.

Called by the learner and its weight sender. The language-model head is computed on scored positions only and a chunk at a time, with
recomputation in the backward pass, so that the logits of a large vocabulary are never kept. Leaves out: optimisation, collectives.

Shapes: see ``batch``; ``_H`` = hidden size, ``_C`` = scored tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from learner import attention, kernels
from learner.batch import MicroBatch
from sgpo_dist.config import LoraConfig, ModelConfig
from sgpo_dist.errors import ConfigError, EnvironmentProblem

SCORED_CHUNK: Final = 256
ADAPTER: Final = "default"
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MASKABLE_ATTENTION: Final = ("auto", "sdpa", "eager")
ALTERED_LOGITS: Final = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Configuration keys of models that change the head's output; scoring would be silently wrong, so they are refused."""


class ScoringHead(nn.Module):
    """Log-probs of given tokens from hidden states, a chunk of positions at a time.

    Holds the language-model head's own parameters. Being a module of its own, it has them whole for its entire forward and backward
    pass under ZeRO-3; the head's own module would let go of them in the middle of a recomputation.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias

    def forward(self, hidden_N_H: Tensor, target_N: Tensor) -> Tensor:
        """``[N]`` float32."""
        chunks = zip(hidden_N_H.split(SCORED_CHUNK), target_N.split(SCORED_CHUNK), strict=True)
        return torch.cat([self._chunk(hidden_C_H, target_C) for hidden_C_H, target_C in chunks])

    def _chunk(self, hidden_C_H: Tensor, target_C: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self._logps(hidden_C_H, target_C)
        logps_C: Tensor = checkpoint(self._logps, hidden_C_H, target_C, use_reentrant=False, preserve_rng_state=False)
        return logps_C

    def _logps(self, hidden_C_H: Tensor, target_C: Tensor) -> Tensor:
        return kernels.target_logps(linear(hidden_C_H, self.weight, self.bias), target_C)


class CompletionScorer(nn.Module):
    """Wraps a causal language model; its forward pass turns a micro-batch into log-probs of the scored tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        head = self.causal_lm.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise ConfigError("the learner needs a plain linear head; leave lm_head out of model.lora.target_modules")
        self.head = ScoringHead(head)

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face model without its adapter wrapper (adapter layers are still inside)."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def forward(self, batch: MicroBatch) -> Tensor:
        """``[N]`` float32 log-probs (nats), in the batch's order of scored tokens."""
        mask = _fitting_mask(batch.mask_B1LL, self.causal_lm)
        hidden_B_L_H = self.causal_lm.get_decoder()(
            input_ids=batch.input_ids_B_L, attention_mask=mask, position_ids=batch.positions_B_L if mask is not None else None, use_cache=False
        ).last_hidden_state
        logps_N: Tensor = self.head(hidden_B_L_H.flatten(0, 1).index_select(0, batch.index_N), batch.target_N)
        return logps_N


def load_model(
    model_dir: str, settings: ModelConfig, attn_implementation: str, gradient_checkpointing: bool, device: torch.device, seed: int
) -> CompletionScorer:
    """The trainable model in training mode, adapters added when ``settings.lora`` is on (initialised from ``seed``).

    Raises ConfigError for a model or attention that cannot be scored exactly, EnvironmentProblem when the directory cannot be read.
    """
    model = _read_model(model_dir, settings, attn_implementation, device)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.lora.enabled:
        model = _with_adapters(model, settings.lora, seed)
    scorer: CompletionScorer = CompletionScorer(model).to(device).train()
    return scorer


def load_reference(model_dir: str, settings: ModelConfig, attn_implementation: str, device: torch.device) -> CompletionScorer:
    """A frozen model to score with; errors as ``load_model``."""
    model = _read_model(model_dir, settings, attn_implementation, device)
    scorer: CompletionScorer = CompletionScorer(model).to(device).eval().requires_grad_(False)
    return scorer


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


def _read_model(model_dir: str, settings: ModelConfig, attn_implementation: str, device: torch.device) -> Any:
    if attn_implementation not in MASKABLE_ATTENTION:
        raise ConfigError(f"learner.attn_implementation '{attn_implementation}' cannot mask shared-prefix rows; write auto, sdpa or eager")
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=DTYPES[settings.dtype],
            attn_implementation="sdpa" if attn_implementation == "auto" else attn_implementation,
            trust_remote_code=settings.trust_remote_code,
            revision=settings.revision,
        )
    except (OSError, ValueError) as problem:
        raise EnvironmentProblem(f"model '{model_dir}' cannot be loaded: {str(problem).splitlines()[0]}") from problem
    if attn_implementation == "auto" and device.type == "cpu" and settings.dtype == "bfloat16":
        model.set_attn_implementation(attention.NAME)
    kernels.fuse(model)
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
        return get_peft_model(model, plan, autocast_adapter_dtype=False)


def _fitting_mask(mask_B1LL: Tensor | None, model: Any) -> Tensor | None:
    """Eager attention adds its mask to the scores; only sdpa takes a boolean one."""
    if mask_B1LL is None or model.config._attn_implementation != "eager":
        return mask_B1LL
    dtype = model.get_input_embeddings().weight.dtype
    return torch.zeros(mask_B1LL.shape, dtype=dtype, device=mask_B1LL.device).masked_fill(~mask_B1LL, torch.finfo(dtype).min)


# ---- the weights by their Hugging Face names --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NamedWeight:
    """One tensor of the plain model: its Hugging Face name, what it is made of, and the adapter layer to merge into it (if any)."""

    name: str
    tensor: Tensor
    adapter: Any | None = None

    @property
    def parts(self) -> list[Tensor]:
        """Everything ``value`` reads; under ZeRO-3 all of it must be gathered."""
        return [self.tensor, *(self.adapter.parameters() if self.adapter is not None else ())]

    @property
    def shape(self) -> tuple[int, ...]:
        """The full shape, also while ZeRO-3 holds only a share."""
        return tuple(getattr(self.tensor, "ds_shape", self.tensor.shape))

    def value(self) -> Tensor:
        """The weight, or a merged copy; the original is never touched."""
        if self.adapter is None:
            return self.tensor.detach()
        with torch.no_grad():
            return (self.tensor.float() + self.adapter.get_delta_weight(ADAPTER).float()).to(self.tensor.dtype)


def named_weights(scorer: CompletionScorer) -> list[NamedWeight]:
    """What ``save_pretrained`` of the plain model would write, in name order: adapters merged, a tied head left out."""
    model = scorer.causal_lm
    state = model.state_dict(keep_vars=True)
    head = {f"{name}.weight" for name, module in model.named_modules() if module is model.get_output_embeddings()} if ties_head(model) else set()
    adapters = {name: module for name, module in model.named_modules() if ADAPTER in getattr(module, "lora_A", {})}
    weights = []
    for key, tensor in state.items():
        owner, _, leaf = key.rpartition(".")
        if key in head or any(part.startswith("lora_") for part in owner.split(".")):
            continue
        plain_owner = owner.removesuffix(".base_layer")
        adapter = adapters.get(plain_owner) if leaf == "weight" else None
        weights.append(NamedWeight(f"{plain_owner}.{leaf}" if plain_owner else leaf, tensor, adapter))
    return sorted(weights, key=lambda weight: weight.name)


def layer_groups(weights: Sequence[NamedWeight]) -> list[list[NamedWeight]]:
    """Weights in name order, cut into one group a decoder layer (or other numbered block): what is gathered at once."""
    return [list(group) for _, group in groupby(weights, key=lambda weight: _block(weight.name))]


def _block(name: str) -> str:
    """``model.layers.3.`` of ``model.layers.3.mlp.down_proj.weight``; empty outside of numbered blocks."""
    parts = name.split(".")
    numbered = next((place for place, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[: numbered + 1])
