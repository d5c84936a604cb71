"""The configuration: one frozen pydantic tree, and how it is read.

Called by the command line and by ``sgpo_dist.train``. Order of precedence: defaults < YAML file < ``SGPO__section__key`` environment
variables < dotted overrides. An unknown key is refused with the nearest valid name; nothing is ever repaired silently.
What can be derived is a property here, not a key.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from sgpo_dist.errors import ConfigError
from sgpo_dist.sanitize import redact, terminal_text

ENVIRONMENT_PREFIX = "SGPO__"
RUN_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
COMMIT = re.compile(r"[0-9a-f]{40}")
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
MAX_FILE_BYTES = 1_000_000
LARGEST = 2**53
"""No size, count or seed lies beyond it; the database and the trackers could not hold one."""

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
StageName = Literal["sft", "improver", "preference"]
ReviserName = Literal["self", "openai", "file", "reference", "blend", "tidy", "repair"]
LossName = Literal["sigmoid", "sigmoid_norm", "robust", "ipo", "hinge", "simpo", "apo_zero", "dpop"]


def _off(value: Any) -> Any:
    """YAML 1.1 reads the bare word off as False; where 'off' is a choice it means the word."""
    return "off" if value is False else value


def _takes_only_numbers(annotation: Any) -> bool:
    """Whether a field is int or float, perhaps with bounds, perhaps or null."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    bare = {get_args(part)[0] if get_origin(part) is Annotated else part for part in parts}
    return bool(bare & {int, float}) and bare <= {int, float, type(None)}


class Section(BaseModel):
    """Base of every section: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's yes, on and true are flags; as a number they would silently count as 1."""
        if isinstance(value, bool) and _takes_only_numbers(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError(f"must be a number, not {str(value).lower()}")
        return value


class LoraConfig(Section):
    """Low-rank adapters (peft). With adapters the frozen reference is the model with adapters off."""

    enabled: bool = Field(False, description="Train adapters instead of all weights.")
    r: Positive = Field(16, description="Rank of the adapters.")
    alpha: Positive = Field(32, description="Scaling numerator; the adapter's output is multiplied by alpha / r.")
    dropout: Share = Field(0.0, description="Dropout on the adapter's input.")
    target_modules: str | list[str] = Field("all-linear", description="Module names to adapt, as peft names them.")


class ModelConfig(Section):
    """The one model that plays both roles."""

    model_name_or_path: str = Field("embedded", description="A directory or hub name; 'embedded' is SmolLM2-135M-Instruct from a package.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Type the learner computes in; bfloat16 keeps fp32 master weights. auto: bfloat16 on GPUs and on processors that multiply it, "
        "else float32.",
    )
    trust_remote_code: bool = Field(False, description="Run code shipped with the model; needs a pinned revision.")
    revision: str | None = Field(None, description="Commit hash of the hub model.")
    lora: LoraConfig = Field(default_factory=LoraConfig, description="Low-rank adapters.")

    @model_validator(mode="after")
    def _pin_remote_code(self) -> ModelConfig:
        if self.trust_remote_code and not COMMIT.fullmatch(self.revision or ""):
            raise ValueError("model.trust_remote_code needs model.revision set to a commit hash (40 hex digits)")
        return self


class DataConfig(Section):
    """Where prompts and references come from: built-in names (orders, chat), JSONL or Parquet files, or datasets directories."""

    path: str | list[str] = Field("orders", description="Prompts; rows with a reference feed the sft and improver stages. Comma list allowed.")
    heldout_path: str | list[str] | None = Field(None, description="Held-out rows with references; built-in sets bring their own.")
    prompts_path: str | list[str] | None = Field(None, description="Prompts of the preference stage; default: rows of path earlier stages leave.")
    input_key: str | None = Field(None, description="Column of the prompt when it is neither 'prompt' nor 'messages'.")
    reference_key: str | None = Field(None, description="Column of the reference when it is neither 'reference' nor 'chosen'.")
    max_prompt_tokens: Positive = Field(512, description="Longer prompts are refused at start, naming file and line.")
    max_prompts: Positive | None = Field(None, description="Use at most this many preference prompts.")
    max_references: Positive | None = Field(None, description="Use at most this many rows with references of each source.")
    max_heldout: Positive | None = Field(None, description="Use at most this many held-out rows of each source.")


class SftConfig(Section):
    """Stage 0: plain NLL on the references."""

    epochs: Positive = Field(1, description="Passes over the rows with references.")
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate.")
    train_batch_size: Positive = Field(8, description="Rows per optimiser step.")
    max_rows: Positive | None = Field(
        None, description="Train on so many rows only; the improver stage then drafts on the others, where drafts still have faults."
    )
    packing: bool = Field(False, description="Pack short rows into shared sequences (exact; for GPUs, padding is faster on a CPU).")
    schedule: Literal["linear", "cosine", "constant"] = Field("cosine", description="After the warm-up.")
    warmup_ratio: Share = Field(0.1, description="Share of the steps that warm up.")


class EndpointConfig(Section):
    """An OpenAI-compatible chat endpoint: a reviser or a judge that is not ours. The key is read from the environment and never written."""

    base_url: str = Field("http://127.0.0.1:8000/v1", description="Up to and with /v1.")
    model: str = Field("", description="The name that the endpoint serves.")
    api_key_env: str = Field("OPENAI_API_KEY", description="Environment variable that holds the key; an endpoint without keys needs none.")
    temperature: float = Field(0.7, ge=0, description="Sampling temperature.")
    max_tokens: Positive = Field(1024, description="Cap of one answer.")
    max_concurrency: Positive = Field(8, description="Requests under way at once.")
    max_retries: int = Field(6, ge=0, description="Further attempts after a 429, a server error or a timeout, with growing, jittered pauses.")
    timeout_s: float = Field(60.0, gt=0, description="A request without an answer by then is tried again.")
    token_budget: Positive | None = Field(None, description="Stop asking after this many tokens (sent and received); null = no limit.")


class JudgeEndpointConfig(EndpointConfig):
    """The endpoint of a judge: it answers with one word, always the same."""

    temperature: float = Field(0.0, ge=0, description="Sampling temperature.")
    max_tokens: Positive = Field(16, description="Cap of one answer.")


class JudgeConfig(Section):
    """Who says which of two answers is better."""

    kind: Literal["embedding", "openai", "scorer"] = Field(
        "embedding", description="Nearer to the reference in embedding space, an LLM behind an endpoint, or a function of yours."
    )
    scorer: str = Field("", description="'module:function' of (text, reference, prompt) -> float, for kind 'scorer'; higher is better.")
    endpoint: JudgeEndpointConfig = Field(default_factory=JudgeEndpointConfig, description="For kind 'openai'.")


class FilterConfig(Section):
    """Which revisions may teach the improver. Each drop is counted."""

    min_edit_ratio: Share = Field(0.02, description="Floor: a revision that changes less is a no-op.")
    max_length_ratio: float = Field(2.5, gt=1, description="Longest revision allowed, as a multiple of the draft's tokens.")
    fence: float | None = Field(1.5, gt=0, description="Tukey fences Q1 - k*IQR .. Q3 + k*IQR over the statistic; null = off.")
    fence_statistic: Literal["edit_ratio", "length_ratio", "logp_gap", "grader_gain"] = Field(
        "edit_ratio", description="What the fences act on; logp_gap: log-likelihood per token of revision minus draft under the drafting model."
    )
    grader: str = Field("", description="'module:function' of (text, reference, prompt) -> float; revisions must score above their drafts.")
    min_gain: float = Field(0.0, ge=0, description="A revision's score must exceed its draft's by more than this, when there is a grader.")


class ImproverConfig(Section):
    """Stage 1: build revisions, filter them, teach the improver role."""

    reviser: ReviserName | dict[str, ReviserName] = Field("tidy", description="Who revises drafts; or a name per data source, with 'default'.")
    repair: str = Field("", description="'module:function' of (draft, reference, prompt) -> revised text or None, for reviser 'repair'.")
    endpoint: EndpointConfig = Field(default_factory=EndpointConfig, description="For reviser 'openai'.")
    revisions_path: str = Field("", description="For reviser 'file': JSONL or Parquet rows with prompt (or id) and revision.")
    max_rows: Positive | None = Field(None, description="Draft at most this many prompts.")
    drafts_per_row: Positive = Field(1, description="Drafts sampled, and revised, per prompt with a reference.")
    epochs: Positive = Field(1, description="Passes over the revisions.")
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate.")
    train_batch_size: Positive = Field(8, description="Rows per optimiser step.")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="After the warm-up.")
    warmup_ratio: Share = Field(0.1, description="Share of the steps that warm up.")
    replay: Literal["self", "reference", "none"] = Field("reference", description="Policy rows mixed 1:1: its own drafts, the references, or none.")
    keep_ratio: float = Field(0.0, ge=0, description="Rows that teach to leave a good draft alone, per revision; from drafts without a fault.")
    edit_weight: float = Field(1.0, gt=0, description="Weight of a revision's tokens that differ from the draft, in the improver's loss; 1 = none.")
    blend_budget: Share = Field(0.5, description="Reviser 'blend': share of the draft's sentences that may be replaced.")
    filter: FilterConfig = Field(default_factory=FilterConfig, description="Sanity filters of the revisions.")
    gate: Annotated[Literal["stop", "warn", "off"], BeforeValidator(_off)] = Field(
        "warn", description="What to do when rewrites do not beat drafts on held-out prompts."
    )
    gate_confidence: float = Field(
        0.5, ge=0.5, lt=1, description="How sure the gate must be (one-sided sign test over the prompts without a tie); 0.5: more better than worse."
    )


class PairGateConfig(Section):
    """Which (response, refinement) pairs may train. Each refusal is counted by reason."""

    near_copy_ratio: Share = Field(0.0, description="Refuse when 1 - similarity is at or below this (0 = only identical texts).")
    max_length_ratio: float = Field(2.5, gt=1, description="Refuse a refinement longer than this multiple of the response.")
    require_eos: bool = Field(True, description="The chosen text must end by itself.")
    allow_truncated_rejected: bool = Field(True, description="A response cut at the token limit may be the rejected half.")
    max_reference_overlap: Share = Field(0.9, description="Refuse a refinement that is the reference to this share of its words.")


class AgreementConfig(Section):
    """Keep a pair only when fresh draws of both roles side with the refinement. Needs no outside signal."""

    draws: int = Field(0, ge=0, description="Fresh draws of each role that vote on a pair; 0 = no vote (vote likelihood needs 1, and draws none).")
    margin: Positive = Field(2, description="Votes for the refinement minus votes for the response, at least.")
    vote: Literal["equal", "similarity", "likelihood"] = Field(
        "equal", description="A draw votes for the text it equals, for the one more like it, or (likelihood) the model's own log-probs decide."
    )
    temperature: float = Field(0.7, gt=0, description="Of the draws that vote.")


class BrakesConfig(Section):
    """When the preference stage is collapsing, and what to do then. Limits are means over the last ``window`` steps."""

    action: Annotated[Literal["off", "warn", "pause", "rollback"], BeforeValidator(_off)] = Field(
        "warn", description="pause: checkpoint and stop (exit 5); rollback: end the stage on the last good checkpoint."
    )
    window: Positive = Field(2, description="Steps that are averaged.")
    max_chosen_drop: float = Field(3.0, gt=0, description="Nats a chosen text may lose against the reference model.")
    max_rejected_drop: float = Field(15.0, gt=0, description="Nats a rejected text may lose against the reference model.")
    min_length_ratio: float = Field(0.6, gt=0, description="Mean response length as a multiple of the stage's first steps' mean.")
    max_length_ratio: float = Field(1.7, gt=1, description="The same, upper limit.")
    max_repetition: Share = Field(0.4, description="Share of repeated word triples in responses.")
    max_refused_rate: Share = Field(0.98, description="Share of pairs and refusals, if there are 200 or more, that were refused; 1 = not looked at.")
    min_improver_win_rate: Share = Field(0.0, description="Of the held-out check (preference.health_steps); 0 = not looked at.")


class PreferenceConfig(Section):
    """Stage 2: online DPO on self-made pairs."""

    loss_type: LossName = Field("sigmoid", description="Preference loss; docs/losses.md has the equations.")
    beta: float = Field(0.1, gt=0, description="Strength of the pull to the reference model.")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Assumed share of wrongly ordered pairs: conservative (sigmoid) or robust DPO.")
    simpo_gamma: float = Field(0.5, ge=0, description="SimPO's target margin, as a multiple of beta.")
    dpop_lambda: float = Field(5.0, ge=0, description="DPOP's penalty on a chosen text that becomes less likely than under the reference.")
    nll_coef: float = Field(0.0, ge=0, description="Weight of the chosen text's NLL per token beside the preference loss.")
    learning_rate: float = Field(5e-7, gt=0, description="Peak learning rate; small models and close pairs want 1e-5 to 5e-5.")
    schedule: Literal["linear", "cosine", "constant"] = Field("constant", description="After the warm-up.")
    warmup_ratio: Share = Field(0.1, description="Share of the steps that warm up.")
    total_steps: Positive = Field(100, description="Optimiser steps.")
    max_staleness: int = Field(1, ge=0, description="Weight versions a pair may be behind when trained on; 0 = synchronous.")
    samples_per_prompt: Positive = Field(1, description="Pairs tried per prompt.")
    epochs: Positive = Field(1, description="Passes over the prompts, with fresh draws.")
    pairs: Literal["improver", "reference", "judge", "given"] = Field(
        "improver", description="improver: SGPO; reference: SPIN; judge: the better of two samples (online DPO); given: the data's own pairs (DPO)."
    )
    collect: Literal["online", "first"] = Field("online", description="first: all pairs from the stage's starting model, then train (one pass).")
    improver_model: str | None = Field(None, description="A separate improver's directory; needs collect: first. null = the one model plays both.")
    judge: JudgeConfig = Field(default_factory=JudgeConfig, description="For pairs: judge.")
    offline_ratio: float = Field(0.0, ge=0, lt=1, description="Share of every batch taken from the data's own chosen and rejected answers.")
    rounds: Positive = Field(1, description="Equal parts of the steps; each begins with the reference model refreshed, on prompts not used before.")
    ladder: Positive = Field(1, description="Refine so often; each rung is a pair with the one below it.")
    improver_replay: Share = Field(0.0, description="Improver rows mixed into each step, per pair, so that the improver role is not forgotten.")
    kept_replay: float = Field(
        0.0, ge=0, le=16, description="Own answers that the improver left as they were, mixed into each step, per pair; needs collect: first."
    )
    agreement: AgreementConfig = Field(default_factory=AgreementConfig, description="Vote of fresh draws on each pair.")
    fence: float | None = Field(None, gt=0, description="Refuse pairs outside Tukey fences (k * IQR) of the improver stage's edit ratios.")
    health_steps: int = Field(0, ge=0, description="Steps between held-out checks of the improver; 0 = only at the stage's ends.")
    pair_gate: PairGateConfig = Field(default_factory=PairGateConfig, description="Which pairs may train.")
    brakes: BrakesConfig = Field(default_factory=BrakesConfig, description="Collapse: warn, pause or roll back.")


class SamplingConfig(Section):
    """How one role samples."""

    temperature: float = Field(0.8, ge=0, description="0 is greedy.")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus.")
    top_k: int = Field(0, ge=0, description="0 = off.")
    max_new_tokens: Positive = Field(256, description="Cap, end token included.")


class ImproverSamplingConfig(SamplingConfig):
    """How the improver samples."""

    temperature: float = Field(0.7, ge=0, description="0 is greedy.")


class RolloutConfig(Section):
    """The rollout workers: vLLM engines that answer and refine."""

    num_rollout_workers: Positive = Field(1, description="How many engines.")
    tensor_parallel_size: Positive = Field(1, description="GPUs of one engine.")
    concurrency: Positive = Field(64, description="Prompts in flight on one worker.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="Engine's type; auto: float32 on CPU, model.dtype on GPU.")
    max_model_len: Positive = Field(1024, description="Context of the engine in tokens.")
    gpu_memory_utilization: Share = Field(0.85, description="vLLM's share of a GPU's memory.")
    kv_cache_gib: float = Field(1.0, gt=0, description="CPU engines: memory for the KV cache.")
    policy: SamplingConfig = Field(default_factory=SamplingConfig, description="Sampling of responses.")
    improver: ImproverSamplingConfig = Field(default_factory=ImproverSamplingConfig, description="Sampling of refinements.")
    template: str = Field("v1", description="Version of the improver's prompt template.")
    num_speculative_tokens: int = Field(
        0, ge=0, description="Rewrites: at most so many tokens, mostly the draft's, are proposed at a time to be checked in one step; 0 = none."
    )
    engine_kwargs: dict[str, Any] = Field(default_factory=dict, description="Passed to vLLM unchanged.")
    lease_s: float = Field(300.0, gt=0, description="A prompt not answered in this time goes to another worker.")
    start_timeout_s: float = Field(600.0, gt=0, description="An engine that is not up by then is replaced.")
    heartbeat_timeout_s: float = Field(60.0, gt=0, description="A worker silent for this long is replaced.")
    max_restarts: int = Field(10, ge=0, description="Crashes of workers without a pair between them before the run ends.")


class LearnerConfig(Section):
    """The DeepSpeed learner."""

    train_batch_size: Positive = Field(8, description="Pairs per optimiser step of the preference stage.")
    max_tokens_per_micro_batch: Positive = Field(2048, description="Token budget of one forward and backward pass on a rank.")
    num_ranks: Positive = Field(1, description="Data-parallel ranks, one process each.")
    gpus_per_rank: float = Field(0.0, ge=0, description="GPUs of one rank; 0 = CPU.")
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed ZeRO stage.")
    optimizer: Literal["adamw", "cpu_adam"] = Field("adamw", description="Fused torch AdamW, or DeepSpeed's CPU Adam for offload.")
    gradient_checkpointing: bool = Field(False, description="Trade compute for memory.")
    attn_implementation: str = Field("auto", description="sdpa, eager, or auto: sdpa, with a faster backward pass for bf16 on CPUs.")
    cpu_kernels: bool = Field(True, description="On CPUs: element-wise work of layers by kernels that g++ compiles once; false: PyTorch's own.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clipping.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    beta1: Share = Field(0.9, description="AdamW's first beta.")
    beta2: Share = Field(0.99, description="AdamW's second beta.")
    threads_per_rank: int = Field(0, ge=0, description="CPU threads of one rank; 0 = cores divided by ranks.")
    take_turns: bool = Field(True, description="On CPUs: engines on the same machine stand still while a rank computes a step; false: both at once.")
    deepspeed_config: dict[str, Any] = Field(default_factory=dict, description="Merged over the DeepSpeed configuration we build.")
    step_timeout_s: float = Field(1800.0, gt=0, description="A step that takes longer counts as a hang.")
    max_restarts: int = Field(3, ge=0, description="Times the learner is rebuilt from the last checkpoint without a new checkpoint between them.")
    max_bad_steps: int = Field(3, ge=0, description="Steps in a row with a loss or gradient that is not finite: skipped and written down; then stop.")


class WeightsConfig(Section):
    """How versions travel to the workers and are proved."""

    transport: Literal["auto", "shm", "nccl", "ipc"] = Field("auto", description="auto: shm on CPU, ipc on a shared GPU, else nccl.")
    weight_sync_interval: Positive = Field(1, description="Optimiser steps between published versions.")
    num_probes: Positive = Field(4, description="Fixed probe prompts whose log-probs must agree.")
    probe_tolerance: float | None = Field(None, gt=0, description="Mean |log-prob gap| allowed in nats; default 2e-3 for float32, 6e-2 for bfloat16.")
    timeout_s: float = Field(300.0, gt=0, description="A worker that has not proved a version by then is rebuilt.")


class CheckpointConfig(Section):
    """When checkpoints are made and how many are kept."""

    save_steps: Positive = Field(25, description="Optimiser steps between checkpoints (stage ends always save).")
    keep_last: Positive = Field(2, description="Newest checkpoints kept.")
    keep_every: int = Field(0, ge=0, description="Also keep every checkpoint whose step is a multiple; 0 = none.")
    copy_to: str | None = Field(None, min_length=1, description="Also copy each checkpoint to here/RUN_NAME, in the background: any fsspec address.")
    copy_timeout_s: float = Field(600.0, gt=0, description="Longest wait for the last copy when the run ends.")


class LoggingConfig(Section):
    """What is recorded and shown."""

    report_to: list[Literal["tensorboard", "wandb"]] = Field(["tensorboard"], description="Trackers beside metrics.jsonl.")
    progress: Annotated[Literal["auto", "rich", "plain", "off"], BeforeValidator(_off)] = Field(
        "auto", description="Live display; auto: rich on a terminal, plain lines otherwise."
    )
    level: Literal["DEBUG", "INFO", "WARNING"] = Field("INFO", description="Level of the log files.")


class EvalConfig(Section):
    """Held-out figures of every stage's model, side by side."""

    enabled: bool = Field(True, description="Evaluate the initial model and each stage's result.")
    max_new_tokens: Positive = Field(96, description="Cap of held-out answers.")
    temperature: float = Field(0.0, ge=0, description="Of held-out answers in both roles, by which the improver's gate judges too; 0 is greedy.")
    scorer: str | dict[str, str] = Field(
        "", description="'module:function' of (text, reference, prompt) -> float in [0, 1] that scores held-out answers; or one a data source."
    )


class ClusterConfig(Section):
    """Where Ray runs."""

    address: str | None = Field(None, description="Ray address; default: the job's cluster, else a local one.")
    num_cpus: Positive | None = Field(None, description="Cores of a local Ray; default: all.")
    object_store_gib: float = Field(1.0, gt=0, description="Object store of a local Ray.")
    min_free_disk_gib: float = Field(3.0, gt=0, description="Refuse to start or save with less.")


class Config(Section):
    """A whole run."""

    run_name: str = Field("run", description="Name of the run; its directory is output_dir/run_name.")
    output_dir: str = Field("runs", description="Parent of run directories.")
    stages: list[StageName] = Field(["sft", "improver", "preference"], description="Stages in order; each can run alone.")
    seed: int = Field(0, ge=0, description="One seed for everything that draws.")
    time_limit_s: float | None = Field(
        None, gt=0, description="Seconds this attempt may take; then a checkpoint is made and the run ends with exit code 5, as for SIGTERM."
    )
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    sft: SftConfig = Field(default_factory=SftConfig)
    improver: ImproverConfig = Field(default_factory=ImproverConfig)
    preference: PreferenceConfig = Field(default_factory=PreferenceConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    weights: WeightsConfig = Field(default_factory=WeightsConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)

    @field_validator("run_name")
    @classmethod
    def _safe_name(cls, value: str) -> str:
        if not RUN_NAME.match(value):
            raise ValueError("run_name must be 1-64 of letters, digits, '.', '_', '-' and start with a letter or digit")
        return value

    @field_validator("stages")
    @classmethod
    def _ordered_stages(cls, value: list[StageName]) -> list[StageName]:
        order: list[StageName] = ["sft", "improver", "preference"]
        if not value or value != [name for name in order if name in value]:
            raise ValueError("stages must be a non-empty part of [sft, improver, preference], in that order and without repeats")
        return value

    @model_validator(mode="after")
    def _possible(self) -> Config:
        for problem in _impossibilities(self):
            raise ValueError(problem)
        return self

    @property
    def run_dir(self) -> Path:
        """Where everything of this run lies."""
        return Path(self.output_dir) / self.run_name

    @property
    def pairs_need_references(self) -> bool:
        """Whether preference pairs are made on rows with references: as the chosen half, or for a judge to look at."""
        preference = self.preference
        return preference.pairs == "reference" or (preference.pairs == "judge" and preference.judge.kind == "embedding")

    @property
    def made_pairs_per_step(self) -> int:
        """Pairs of a step that the model makes itself; the rest of the batch is the data's own."""
        return self.learner.train_batch_size - round(self.preference.offline_ratio * self.learner.train_batch_size)

    @property
    def capacity(self) -> int:
        """Pairs in generation or waiting, at most: (max_staleness + 1) * made_pairs_per_step * weight_sync_interval."""
        return (self.preference.max_staleness + 1) * self.made_pairs_per_step * self.weights.weight_sync_interval


def _impossibilities(config: Config) -> list[str]:
    """Settings that contradict each other, each as one line that says what to change."""
    found = []
    if config.learner.train_batch_size % config.learner.num_ranks:
        found.append(
            f"learner.train_batch_size ({config.learner.train_batch_size}) must be a multiple of learner.num_ranks ({config.learner.num_ranks})"
        )
    longest = config.data.max_prompt_tokens + config.rollout.policy.max_new_tokens
    if longest > config.rollout.max_model_len:
        found.append(
            f"data.max_prompt_tokens + rollout.policy.max_new_tokens ({longest}) exceed rollout.max_model_len ({config.rollout.max_model_len})"
        )
    revisers = config.improver.reviser.values() if isinstance(config.improver.reviser, dict) else [config.improver.reviser]
    if "repair" in revisers and ":" not in config.improver.repair:
        found.append("improver.reviser 'repair' needs improver.repair set to 'module:function'")
    found += _impossible_preferences(config)
    found += _impossible_endpoints(config)
    if config.rollout.engine_kwargs.get("trust_remote_code") and not config.model.trust_remote_code:
        found.append("rollout.engine_kwargs trust_remote_code needs model.trust_remote_code set to true, with a pinned model.revision")
    if config.weights.transport == "ipc" and config.learner.gpus_per_rank == 0:
        found.append("weights.transport 'ipc' needs learner.gpus_per_rank above 0")
    return found


def _impossible_endpoints(config: Config) -> list[str]:
    """Addresses and key names that cannot be one. Neither is repeated: it may hold a secret."""
    endpoints = {"improver.endpoint": config.improver.endpoint, "preference.judge.endpoint": config.preference.judge.endpoint}
    found = [f"{path}.{ADDRESS_RULE}" for path, endpoint in endpoints.items() if not is_address(endpoint.base_url)]
    return found + [
        f"{path}.api_key_env must be the name of an environment variable, such as OPENAI_API_KEY, not a key"
        for path, endpoint in endpoints.items()
        if not VARIABLE.fullmatch(endpoint.api_key_env)
    ]


ADDRESS_RULE = "base_url must be http(s)://host[:port]/path, without user, password or query"


def is_address(base_url: str) -> bool:
    """Whether it can be an endpoint's address. Only what is harmless in logs is let through: no user or password in it, no query."""
    try:
        parts = urlsplit(base_url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port or an IPv6 address that cannot be one
        return False
    return usable and not any(mark in base_url for mark in "@?#")


def _impossible_preferences(config: Config) -> list[str]:
    """The same for the improver and preference stages: (whether it cannot be, what to change)."""
    preference, improver, judge = config.preference, config.improver, config.preference.judge
    revisers = improver.reviser.values() if isinstance(improver.reviser, dict) else [improver.reviser]
    batch, agreement = config.learner.train_batch_size, preference.agreement
    apart, judged, votes = preference.improver_model is not None, preference.pairs == "judge", 2 * agreement.draws
    kept_answers = preference.collect == "first" and preference.pairs != "given"
    needs_revisions = bool(preference.improver_replay) or preference.fence is not None
    rules = (
        ("openai" in revisers and not improver.endpoint.model, "improver.reviser 'openai' needs improver.endpoint.model, a name that it serves"),
        ("file" in revisers and not improver.revisions_path, "improver.reviser 'file' needs improver.revisions_path"),
        (improver.filter.fence_statistic == "grader_gain" and not improver.filter.grader, "improver.filter 'grader_gain' needs a grader"),
        (apart and preference.collect != "first", "preference.improver_model needs preference.collect set to 'first'"),
        (apart and preference.pairs != "improver", "preference.improver_model needs preference.pairs set to 'improver'"),
        (apart and preference.ladder > 1, "preference.improver_model needs preference.ladder set to 1"),
        (preference.collect == "first" and preference.rounds > 1, "preference.rounds above 1 needs preference.collect set to 'online'"),
        (preference.ladder > 1 and preference.pairs != "improver", "preference.ladder above 1 needs preference.pairs set to 'improver'"),
        (judged and judge.kind == "openai" and not judge.endpoint.model, "preference.judge 'openai' needs preference.judge.endpoint.model"),
        (judged and judge.kind == "scorer" and ":" not in judge.scorer, "preference.judge 'scorer' needs preference.judge.scorer: module:function"),
        (0 < votes < agreement.margin and agreement.vote != "likelihood", f"preference.agreement.margin exceeds the {votes} votes there are"),
        (preference.rounds > preference.total_steps, f"preference.rounds ({preference.rounds}) exceed preference.total_steps"),
        (config.model.lora.enabled and preference.rounds > 1, "preference.rounds above 1 needs model.lora.enabled set to false"),
        (preference.kept_replay and not kept_answers, "preference.kept_replay needs preference.collect set to 'first' and pairs that are made"),
        (needs_revisions and "improver" not in config.stages, "preference.improver_replay and preference.fence need 'improver' in stages"),
        (config.made_pairs_per_step < 1, f"preference.offline_ratio {preference.offline_ratio} leaves no own pair in a batch of {batch}; lower it"),
    )
    return [message for broken, message in rules if broken]


def load_config(path: Path | None, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Config:
    """Read a YAML file, the environment and ``a.b=value`` overrides into one Config. Raises ConfigError, one line."""
    tree = _read_yaml(path) if path is not None else {}
    environ = os.environ if environment is None else environment
    for key in sorted(environ):
        if key.startswith(ENVIRONMENT_PREFIX):
            _set(tree, key[len(ENVIRONMENT_PREFIX) :].lower().replace("__", "."), environ[key])
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override '{override}' is not of the form section.key=value")
        _set(tree, key.lstrip("-"), value)
    return build_config(tree)


def build_config(tree: Mapping[str, Any]) -> Config:
    """A Config from plain values. Raises ConfigError with the first problem in one line."""
    _refuse_strange(tree, "")
    try:
        return Config.model_validate(tree)
    except ValidationError as problem:
        raise ConfigError(_explain(problem)) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise ConfigError(f"config file {path} is longer than {MAX_FILE_BYTES} bytes; give --config a YAML file of settings")
        tree = _load_yaml(raw.decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except OSError as problem:
        raise ConfigError(f"config file {path} cannot be read: {problem.strerror}") from None
    except UnicodeDecodeError as problem:
        raise ConfigError(f"config file {path} is not UTF-8 text (byte {problem.start}); save it as UTF-8") from None
    except yaml.YAMLError as problem:
        where = getattr(problem, "problem_mark", None)
        line = f" line {where.line + 1}" if where is not None else ""
        what = getattr(problem, "problem", None) or getattr(problem, "reason", "")
        raise ConfigError(f"config file {path}{line} is not valid YAML ({what})") from None
    except (ValueError, RecursionError) as problem:
        what = "nested too deep" if isinstance(problem, RecursionError) else str(problem)
        raise ConfigError(f"config file {path} is not valid YAML ({what})") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} must hold a mapping of sections")
    return tree


class _Loader(yaml.SafeLoader):
    """Plain values only: no alias (nine lines of them outgrow any memory), and no key twice (the first would be lost)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not read: write the value out", problem_mark=self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in names:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' stands twice: keep one", problem_mark=key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)


def _load_yaml(text: str) -> Any:
    """The values of a text. Raises YAMLError; ValueError for a date or number that cannot be one, RecursionError for nesting without end."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _refuse_strange(value: Any, path: str) -> None:
    """Raises ConfigError for what no setting can mean: text that hides or moves something when shown, and numbers beyond any size."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            _refuse_strange(name, path or "a key")
            _refuse_strange(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_strange(item, path)
    elif isinstance(value, str) and "".join(terminal_text(value).split("\n")) != value:
        raise ConfigError(f"{path} holds a line break, a control character or an invisible mark; write it without (got {value[:80]!a})")
    elif isinstance(value, int | float) and LARGEST < abs(value) < math.inf:
        raise ConfigError(f"{path}: {value:.3g} is larger than any setting can be; write a number up to {LARGEST}")


def _set(tree: dict[str, Any], dotted: str, text: str) -> None:
    """Set one dotted key from text; the text is read as YAML, so that 1e-5, true and [a, b] have their types."""
    *parents, leaf = dotted.split(".")
    node = tree
    for name in parents:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"'{dotted}' reaches into '{name}', which is a value, not a section")
        node = child
    try:
        node[leaf] = _scalar(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"value of '{dotted}' is not valid YAML; correct it, or put it in quotes (got {_shown(text, leaf)})") from None


def _scalar(text: str) -> Any:
    """YAML's reading of ``text``, and floats such as 1e-5 that YAML 1.1 takes for strings."""
    value = _load_yaml(text)
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def _explain(problem: ValidationError) -> str:
    first = problem.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key '{path}'{_nearest(path)}"
    if first["type"] == "model_type":
        return f"{path} is a section, not a value: write its keys below it (got {_shown(first['input'], path)})"
    message = str(first["msg"]).removeprefix("Value error, ")
    if message.startswith(path):
        return message
    return f"{path}: {message}" + (f" (got {_shown(first['input'], path)})" if path and first["type"] != "value_error" else "") if path else message


def _shown(value: Any, path: str) -> str:
    """A refused value for a message, short, and hidden where it may be a secret."""
    text = repr(redact(value, path.rsplit(".", 1)[-1]))
    return text if len(text) <= 80 else text[:79] + "…"


def _nearest(path: str) -> str:
    known = list(leaf_names(Config))
    match = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    if not match:
        leaf = path.rsplit(".", 1)[-1]
        match = [name for name in known if name.rsplit(".", 1)[-1] == leaf][:1]
    return f"; did you mean '{match[0]}'?" if match else "; see docs/configuration.md for the valid ones"


def leaf_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of the tree, sections included."""
    names = []
    for name, info in model.model_fields.items():
        names.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            names += leaf_names(info.annotation, f"{prefix}{name}.")
    return names
