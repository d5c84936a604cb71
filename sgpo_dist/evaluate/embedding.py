"""How alike two texts are in meaning: cosine of their MiniLM sentence embeddings, on the CPU.

Called by ``evaluation`` and by the judge where no exact score exists. The model comes with the installation. torch and transformers are
imported only when a text is embedded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from sgpo_dist.data.embedded_model import embedding_model_dir

if TYPE_CHECKING:
    import torch

BATCH: Final = 32
MAX_TOKENS: Final = 256
"""What the model was trained on; later tokens of a text are not read."""


class Embedder:
    """The embedding model, loaded with the first text and kept. Threads take turns."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._loaded: tuple[Any, Any] | None = None

    def similarities(self, texts_a: Sequence[str], texts_b: Sequence[str]) -> list[float]:
        """Cosine in [-1, 1] of each pair of texts, in order. Raises EnvironmentProblem when the embedding model is not installed."""
        if not texts_a:
            return []
        distinct = list(dict.fromkeys([*texts_a, *texts_b]))
        with self._turn:
            self._loaded = self._loaded or _load()
            rows = dict(zip(distinct, _embeddings(distinct, *self._loaded), strict=True))
        return [float(rows[a] @ rows[b]) for a, b in zip(texts_a, texts_b, strict=True)]


def similarities(texts_a: Sequence[str], texts_b: Sequence[str]) -> list[float]:
    """``Embedder.similarities`` with a model that is loaded for this call."""
    return Embedder().similarities(texts_a, texts_b)


def _load() -> tuple[Any, Any]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = str(embedding_model_dir())
    with _without_progress_bars():
        return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def _embeddings(texts: Sequence[str], tokenizer: Any, model: Any) -> Iterator[torch.Tensor]:
    """One vector of length 1 a text (384 numbers): the mean over its token states."""
    import torch

    for start in range(0, len(texts), BATCH):
        inputs = tokenizer(list(texts[start : start + BATCH]), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.inference_mode():
            states_B_T_H = model(**inputs).last_hidden_state
        mask_B_T_1 = inputs["attention_mask"].unsqueeze(-1).to(states_B_T_H.dtype)
        means_B_H = (states_B_T_H * mask_B_T_1).sum(1) / mask_B_T_1.sum(1).clamp(min=1)
        yield from torch.nn.functional.normalize(means_B_H, dim=-1)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """The bar of transformers would write over the run's own display; it is as before afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
