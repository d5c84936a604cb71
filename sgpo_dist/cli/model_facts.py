"""What a model directory tells without loading the model: parameters, shapes, context, chat template.

Used by ``plan`` and ``doctor``. Reads config.json, the headers of safetensors files and the tokenizer's files; needs no torch and no
transformers, downloads and converts nothing. For a model whose files are not here yet, the published shape of a family that its name
spells is taken, marked as assumed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sgpo_dist.data.embedded_model import MODEL_NAME, default_cache_root
from sgpo_dist.errors import ConfigError

LARGEST_HEADER: Final = 100 << 20


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """``parameters`` counts a tied head once; ``linear_shapes`` are (rows, columns) of what LoRA's "all-linear" adapts.

    ``assumed`` marks a shape taken from the model's name, not from its files; its chat template is then unknown and counted as there.
    """

    name: str
    parameters: int
    layers: int
    hidden: int
    vocabulary: int
    kv_width: int
    context: int
    has_chat_template: bool
    linear_shapes: tuple[tuple[int, int], ...] = ()
    assumed: bool = False

    def lora_parameters(self, rank: int) -> int:
        """Trainable parameters of adapters of ``rank`` on every linear layer: r * (rows + columns) each."""
        return sum(rank * (rows + columns) for rows, columns in self.linear_shapes)


_EMBEDDED_LAYER: Final = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
EMBEDDED_FACTS: Final = ModelFacts(MODEL_NAME, 134_515_008, 30, 576, 49152, 192, 8192, True, _EMBEDDED_LAYER * 30)
"""The embedded model, which need not be converted yet when a plan is made."""

# Published shapes, from each family's config.json: layers, hidden, feed-forward width, key-value width, vocabulary, context, tied head, biases.
_PUBLISHED: Final = {
    "Qwen2.5-0.5B": (24, 896, 4864, 128, 151_936, 32_768, True, True),
    "Qwen2.5-1.5B": (28, 1536, 8960, 256, 151_936, 32_768, True, True),
    "Qwen2.5-7B": (28, 3584, 18_944, 512, 152_064, 32_768, False, True),
    "Llama-3-8B": (32, 4096, 14_336, 1024, 128_256, 8192, False, False),
    "Llama-3.1-8B": (32, 4096, 14_336, 1024, 128_256, 131_072, False, False),
}


def model_facts(name: str) -> ModelFacts | None:
    """Facts of the model a configuration names: from its files, else from a family's name in it, else None.

    Raises ConfigError for a broken directory.
    """
    if name == "embedded":
        return EMBEDDED_FACTS
    directory = Path(name) if Path(name).is_dir() else cached_snapshot(name)
    return published_facts(name) if directory is None else directory_facts(directory, name)


def published_facts(name: str) -> ModelFacts | None:
    """The published shape of the family that ``name`` (hub name or path) spells, whatever its case and hyphens; None for others."""
    spelled = _plain(name)
    family = next((family for family in _PUBLISHED if _plain(family) in spelled), None)
    return _decoder(family, *_PUBLISHED[family]) if family else None


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _decoder(name: str, layers: int, hidden: int, width: int, kv_width: int, vocabulary: int, context: int, tied: bool, biased: bool) -> ModelFacts:
    """A decoder of the Llama shape: query, key, value and output projections, a gated feed-forward, two norms a layer."""
    layer = ((hidden, hidden), (kv_width, hidden), (kv_width, hidden), (hidden, hidden), (width, hidden), (width, hidden), (hidden, width))
    biases = hidden + 2 * kv_width if biased else 0
    in_layers = layers * (sum(map(math.prod, layer)) + biases + 2 * hidden)
    parameters = in_layers + hidden + vocabulary * hidden * (1 if tied else 2)
    return ModelFacts(name, parameters, layers, hidden, vocabulary, kv_width, context, True, layer * layers, assumed=True)


def directory_facts(directory: Path, name: str) -> ModelFacts:
    """Facts of a Hugging Face model directory. Raises ConfigError when it is none."""
    config = _json(directory / "config.json")
    if not config:
        raise ConfigError(f"model.model_name_or_path '{name}' has no config.json; give a Hugging Face model directory")
    refuse_pickled(directory, f"model.model_name_or_path '{name}'")
    try:
        return _facts(directory, name, config)
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as problem:
        what = f"{type(problem).__name__}: {problem}"
        raise ConfigError(f"model.model_name_or_path '{name}' is damaged ({what}); get the model's files again") from None


def refuse_pickled(directory: Path, what: str) -> None:
    """Raises ConfigError for a model directory without safetensors files: pickled weights can run code when they are loaded."""
    if not any(directory.glob("*.safetensors")):
        raise ConfigError(f"{what} has no safetensors files; convert its weights to safetensors (pickled ones are never loaded)")


def _facts(directory: Path, name: str, config: Mapping[str, Any]) -> ModelFacts:
    """Raises whatever files of other shapes lead to."""
    shapes = dict(_tensor_shapes(directory))
    hidden, heads = int(config.get("hidden_size", 0)), int(config.get("num_attention_heads", 1))
    head_width = int(config.get("head_dim") or hidden // heads)
    return ModelFacts(
        name=name,
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        layers=int(config.get("num_hidden_layers", 0)),
        hidden=hidden,
        vocabulary=int(config.get("vocab_size", 0)),
        kv_width=head_width * int(config.get("num_key_value_heads") or heads),
        context=int(config.get("max_position_embeddings", 0)),
        has_chat_template=has_chat_template(directory),
        linear_shapes=tuple((shape[0], shape[1]) for key, shape in shapes.items() if len(shape) == 2 and _is_adapted(key)),
    )


def has_chat_template(directory: Path) -> bool:
    """Whether the tokenizer's files bring a chat template."""
    return (directory / "chat_template.jinja").is_file() or bool(_json(directory / "tokenizer_config.json").get("chat_template"))


def cached_snapshot(name: str) -> Path | None:
    """The newest snapshot of a hub model in the local hub cache."""
    home = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "hub")
    snapshots = [path for path in (home / f"models--{name.replace('/', '--')}" / "snapshots").glob("*") if (path / "config.json").is_file()]
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def embedded_directory() -> Path | None:
    """The converted embedded model in the cache, None when it was not converted yet."""
    manifests = (default_cache_root() / "models").glob(f"{MODEL_NAME}-*/MANIFEST.json")
    return max((path.parent for path in manifests), key=lambda path: path.stat().st_mtime, default=None)


def _is_adapted(key: str) -> bool:
    return not any(part in key for part in ("embed", "lm_head", "wte", "wpe"))


def _tensor_shapes(directory: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes from the headers: eight bytes of length, then JSON."""
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length < LARGEST_HEADER else {}
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, tuple(entry["shape"])


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ConfigError(f"{path} is not valid JSON; get the model's files again") from None
    return tree if isinstance(tree, dict) else {}
