"""What the one model reads in each of its roles, as token ids, and how a rewrite is read back.

Used by the rollout workers, the learner's example builders and the loader's length check. The wording of the roles lies in versioned
files (``templates/improver.v1.jinja``); they are the text of the user turn, inside the model's own chat template. The reference answer
reaches only ``revise_ids``, which belongs to the improver stage: ``improver_ids`` has no way to see it.
Leaves out: sampling, and whether a pair may train (``pair_gate``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final, Protocol, cast

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sgpo_dist.errors import ConfigError, DataError
from sgpo_dist.records import Completion, FinishReason, Message, Prompt
from sgpo_dist.textual import common_start

IMPROVER: Final = "improver"
REVISER: Final = "reviser"
_PROBE: Final = "qzxjv"
"""A word that no chat template contains: marks where the assistant's text would stand."""
_UNLIKE: Final = ("Alike", "7 of them")
"""Texts that share no token, neither at their beginnings nor at their ends."""
_SAMPLE: Final = " It's 3.14 \u00e9\n\n\tdef f(x):  # \u4f60\u597d \U0001f600 "
_FENCED: Final = re.compile(r"```[\w+-]*[ \t]*\n(?P<inner>.*?)\n?```", re.DOTALL)
_QUOTES: Final = (('"', '"'), ("“", "”"), ("«", "»"))


class AddedToken(Protocol):
    """A token outside the ordinary vocabulary."""

    content: str
    special: bool


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    chat_template: Any
    eos_token_id: int | None

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]:
        """Added tokens by id."""

    def apply_chat_template(self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> Any:
        """The conversation as text when ``tokenize`` is False."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids; special tokens spelled in the text become their ids."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> Any:
        """Text of the ids."""


class PromptBook:
    """Token ids of both roles for one tokenizer and one version of the templates.

    Raises ConfigError when there is no such version, or when the tokenizer names no end-of-turn token.
    """

    def __init__(self, tokenizer: Tokenizer, version: str = "v1") -> None:
        self._tokenizer = tokenizer
        self._encoded = _encoder(tokenizer)
        added = tokenizer.added_tokens_decoder.values()
        self._special = tuple(token.content for token in added if token.special and len(token.content) > 1)
        self._improver = _template(f"{IMPROVER}.{version}")
        self._reviser = _template(f"{REVISER}.{version}")
        self.version = version
        self.eos_id = _end_of_turn(tokenizer)

    @property
    def improver_template(self) -> str:
        """Name of the improver's template, as pairs record it."""
        return f"{IMPROVER}.{self.version}"

    @property
    def reviser_template(self) -> str:
        """Name of the template of the reviser ``self``."""
        return f"{REVISER}.{self.version}"

    def policy_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """What the policy reads: the conversation and the opening of the assistant's turn."""
        return self._chat(prompt.messages, prompt.prompt_id)

    def improver_ids(self, prompt: Prompt, draft_text: str) -> tuple[int, ...]:
        """What the improver reads: instruction, conversation, draft. Never the reference."""
        return self._role_ids(self._improver, prompt, {"draft": draft_text.strip()})

    def improver_frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The token ids right before and right after the draft in every prompt of the improver (for ``actors.draft_pointer``)."""
        starts, ends = [], []
        for question in _UNLIKE:
            one, other = (self.improver_ids(Prompt("frame", (Message("user", question),)), draft) for draft in _UNLIKE)
            starts.append(_common_start(one, other)[::-1])
            ends.append(_common_start(one[::-1], other[::-1])[::-1])
        return _common_start(*starts)[::-1], ends[0]

    def revise_ids(self, prompt: Prompt, draft_text: str, reference: str) -> tuple[int, ...]:
        """What the reviser ``self`` reads while improver data is built: the reference is in it."""
        return self._role_ids(self._reviser, prompt, {"draft": draft_text.strip(), "reference": reference.strip()})

    def completion_ids(self, text: str) -> tuple[int, ...]:
        """A written answer as the model would have sampled it: its text, then the end-of-turn token."""
        return (*self._encoded(self._defused(text)), self.eos_id)

    def written(self, text: str, version: int) -> Completion:
        """A written text as a completion that ended by itself."""
        return Completion(text, self.completion_ids(text), FinishReason.STOP, version)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of sampled ids, without special tokens."""
        return cast("str", self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def unwrapped(self, refinement: Completion, draft_text: str) -> Completion:
        """The refinement without quotes or fences around it. Sampled ids stay as they are unless the text inside differs from them."""
        text = parse_refinement(refinement.text, draft_text)
        if text == refinement.text.strip():
            return refinement
        ids = self.completion_ids(text)
        return replace(refinement, text=text, token_ids=ids if refinement.finish_reason is FinishReason.STOP else ids[:-1])

    def _role_ids(self, template: jinja2.Template, prompt: Prompt, texts: Mapping[str, str]) -> tuple[int, ...]:
        turns = [message for message in prompt.messages if message.role != "system"]
        system = [message for message in prompt.messages if message.role == "system"]
        return self._chat([*system, Message("user", template.render(turns=turns, **texts))], prompt.prompt_id)

    def _chat(self, messages: Iterable[Message], prompt_id: str) -> tuple[int, ...]:
        conversation = [{"role": message.role, "content": self._defused(message.content)} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as problem:
            raise DataError(f"the model's chat template refuses prompt '{prompt_id}': {problem}") from None
        return tuple(self._encoded(text))

    def _defused(self, text: str) -> str:
        """Special tokens spelled out in foreign text are broken by a space: data must not open or close turns."""
        for token in self._special:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


def load_tokenizer(
    model_dir: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, loader: Callable[..., Any] | None = None
) -> Tokenizer:
    """The tokenizer of a model directory, read by ``loader`` (default: transformers' AutoTokenizer).

    Raises ConfigError when there is none or it has no chat template.
    """
    try:
        tokenizer = (loader or _auto_tokenizer())(str(model_dir), revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as problem:
        line = next(iter(str(problem).splitlines()), type(problem).__name__)
        raise ConfigError(f"model.model_name_or_path '{model_dir}' has no readable tokenizer: {line}") from None
    if not tokenizer.chat_template:
        raise ConfigError(
            f"model '{model_dir}' has no chat template; use an instruction-tuned model, or put a chat_template.jinja into its directory"
        )
    return cast("Tokenizer", tokenizer)


def _encoder(tokenizer: Tokenizer) -> Callable[[str], Sequence[int]]:
    """``tokenizer.encode`` without special tokens of its own: by its Rust part alone, without offsets and masks, where that gives the same ids."""

    def plain(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "encode_batch_fast"):
        return plain

    def fast(text: str) -> list[int]:
        return cast("list[int]", backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    sample = " ".join([_SAMPLE, *(token.content for token in tokenizer.added_tokens_decoder.values()), _SAMPLE])
    ids = plain(sample)  # which leaves the Rust part neither truncating nor padding
    return fast if fast(sample) == ids and fast(_SAMPLE) == plain(_SAMPLE) else plain


def _auto_tokenizer() -> Callable[..., Any]:
    from transformers import AutoTokenizer  # takes seconds

    return AutoTokenizer.from_pretrained


def parse_refinement(text: str, draft: str = "") -> str:
    """The rewrite itself: white space off, and one layer of fence or quotes that wraps the whole text, unless the draft has it too."""
    text, draft = text.strip(), draft.strip()
    fenced = _FENCED.fullmatch(text)
    if fenced and "```" not in fenced["inner"] and "```" not in draft:
        return fenced["inner"].strip()
    for opening, closing in _QUOTES:
        inner = text[1:-1]
        wrapped = len(text) > 2 and text.startswith(opening) and text.endswith(closing)
        if wrapped and opening not in inner and closing not in inner and not draft.startswith(opening):
            return inner.strip()
    return text


@cache
def instruction(template: str) -> str:
    """The fixed instruction of a template such as 'improver.v1': its first paragraph; empty for a name without a file."""
    path = _folder() / f"{template}.jinja"
    return path.read_text(encoding="utf-8").partition("\n\n")[0] if path.is_file() else ""


def _folder() -> Path:
    return Path(str(resources.files("sgpo_dist") / "templates"))


def _template(name: str) -> jinja2.Template:
    path = _folder() / f"{name}.jinja"
    if not re.fullmatch(r"[\w.-]+", name) or not path.is_file():
        known = ", ".join(sorted(found.name.split(".")[1] for found in _folder().glob(f"{IMPROVER}.*.jinja")))
        raise ConfigError(f"rollout.template: there is no template '{name}'; known versions: {known}")
    environment = ImmutableSandboxedEnvironment(  # plain text for a tokenizer: escaping would change what the model reads
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.from_string(path.read_text(encoding="utf-8"))


def _common_start(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    return tuple(one[: common_start(one, other)])


def _end_of_turn(tokenizer: Tokenizer) -> int:
    """The special token that the chat template puts after an assistant's text; else the tokenizer's own end token."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
    except jinja2.TemplateError as problem:
        raise ConfigError(f"the model's chat template fails on a plain question and answer: {problem}") from None
    ids = tokenizer.encode(text.rpartition(_PROBE)[2].lstrip(), add_special_tokens=False)
    token = tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
    if token is not None and token.special:
        return ids[0]
    if tokenizer.eos_token_id is None:
        raise ConfigError("the model's tokenizer has no end-of-turn token; set eos_token in its tokenizer_config.json")
    return tokenizer.eos_token_id
