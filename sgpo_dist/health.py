"""How healthy the improver and the policy are in the preference stage, and the brakes that see a collapse coming.

Called by the story once a step: ``pair_health`` of the step's pairs, ``refusal_health`` of what the buffer counted since the last step,
``Idleness`` of the workers, and ``Brakes.observe`` of all the step's metrics; when the prompts are used up ``refusal_health`` once more, for
``Brakes.amend``. Needs no reference answer, no model and no judge. Left out: the held-out win rate (evaluate), what a brake does then (story),
how people see it (report).
"""

from __future__ import annotations

import unicodedata
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Final

from sgpo_dist.config import BrakesConfig
from sgpo_dist.recorder import WORKER_IDLE
from sgpo_dist.records import FinishReason, PreferencePair, RefusalReason
from sgpo_dist.roles import BufferCounts, WorkerStats
from sgpo_dist.textual import edit_ratio, length_ratio, plain_words, repetition

RESPONSE_LENGTH: Final = "completions/response_length"
REPETITION: Final = "completions/repetition"
WIN_RATE: Final = "improver/win_rate"
REFUSED_RATE: Final = "improver/refused_rate"
OUTCOMES: Final = "improver/outcomes"
IDLE_WINDOW_S: Final = 10.0

COPIES: Final = (RefusalReason.IDENTICAL, RefusalReason.NEAR_COPY)

STOP_WORDS: Final[Mapping[str, frozenset[str]]] = {
    language: frozenset(stop_words.split())
    for language, stop_words in {
        "en": "the and of that with for are this was you it from",
        "de": "der und ist nicht das mit für auf sich auch eine dem",
        "fr": "les des est dans pour une qui sur pas avec vous cette",
        "es": "el los las una por del como más pero está esta muy",
        "it": "il che gli della per sono più questo anche con nel alla",
        "pt": "não uma os são com para mais pelo também dos isso você",
        "nl": "het een van niet voor zijn ook wordt maar deze bij naar",
        "pl": "nie się jest że dla jak tego ale oraz który przez czy",
    }.items()
}
"""Frequent words that few other languages share. A language without a list has no vote, so it can't look like a switch."""

ENOUGH_VOTES: Final = 3
CLEAR_LEAD: Final = 2
KANA_SHARE: Final = 0.1
"""Japanese mixes kana and Chinese characters; from this share of kana on it is Japanese."""


def pair_health(pairs: Sequence[PreferencePair]) -> dict[str, float]:
    """What a step's pairs say (docs/metrics.md has the meanings); empty without pairs. Milliseconds a pair of long texts."""
    if not pairs:
        return {}
    responses = [pair.response for pair in pairs]
    lengths = [len(response.token_ids) for response in responses]
    return {
        "improver/edit_ratio": fmean(edit_ratio(pair.response.text, pair.refinement.text) for pair in pairs),
        "improver/length_ratio": length_ratio(sum(len(pair.refinement.token_ids) for pair in pairs), sum(lengths)),
        "improver/language_switch": fmean(switches_language(pair.response.text, pair.refinement.text) for pair in pairs),
        RESPONSE_LENGTH: fmean(lengths),
        REPETITION: fmean(repetition(response.text) for response in responses),
        "completions/eos_share": fmean(response.finish_reason is FinishReason.STOP for response in responses),
    }


def refusal_health(before: BufferCounts | None, after: BufferCounts) -> dict[str, float]:
    """How many outcomes there were since ``before`` (None = since the stage began), and shares of them refused; empty when there were none."""
    refused = Counter(after.refused)
    refused.subtract(before.refused if before else {})
    pairs = _pairs_made(after) - (_pairs_made(before) if before else 0)
    outcomes = refused.total() + pairs
    if outcomes <= 0:
        return {}
    return {
        "improver/copy_rate": sum(refused[reason] for reason in COPIES) / outcomes,
        "improver/meta_talk_rate": refused[RefusalReason.META_TALK] / outcomes,
        REFUSED_RATE: refused.total() / outcomes,
        OUTCOMES: outcomes,
    }


def _pairs_made(counts: BufferCounts) -> int:
    """Pairs ever stored, those that became stale too."""
    return counts.ready + counts.assigned + counts.trained + counts.stale


# ---- the language of a text ----------------------------------------------------------------------------------------------------------


def switches_language(response: str, refinement: str) -> bool:
    """Whether the script of most words differs, or two clearly recognised Latin-script languages; what can't be told is no switch."""
    scripts, languages = zip(language_of(response), language_of(refinement), strict=True)
    return any(a != b and bool(a) and bool(b) for a, b in (scripts, languages))


def language_of(text: str) -> tuple[str, str]:
    """(script of most words, language by its stop words); either is "" when it can't be told.

    Scripts are named as Unicode names its letters: LATIN, CYRILLIC, CJK, ...; Japanese is KANA.
    """
    found = [word for word in plain_words(text) if word[0].isalpha()]
    scripts = Counter(_script(word[0]) for word in found)
    if scripts["KANA"] and scripts["KANA"] >= KANA_SHARE * (scripts["KANA"] + scripts["CJK"]):
        scripts["KANA"] += scripts.pop("CJK", 0)
    script = scripts.most_common(1)[0][0] if found else ""
    return script, _voted(found) if script == "LATIN" else ""


def _script(letter: str) -> str:
    name = unicodedata.name(letter, "").partition(" ")[0]
    return "KANA" if name.startswith(("HIRAGANA", "KATAKANA")) else name


def _voted(found: Sequence[str]) -> str:
    """The language whose stop words lead clearly."""
    counts = Counter(found)
    votes = sorted(((sum(counts[word] for word in stop_words), name) for name, stop_words in STOP_WORDS.items()), reverse=True)
    (most, winner), (second, _), *_ = votes
    return winner if most >= ENOUGH_VOTES and most >= CLEAR_LEAD * second else ""


# ---- brakes --------------------------------------------------------------------------------------------------------------------------

SAYINGS: Final[Mapping[str, str]] = {
    "max_chosen_drop": "chosen texts lost {:.3g} nats against the reference model",
    "max_rejected_drop": "rejected texts lost {:.3g} nats against the reference model",
    "min_length_ratio": "responses are {:.3g} times as long as in the stage's first steps",
    "max_length_ratio": "responses are {:.3g} times as long as in the stage's first steps",
    "max_repetition": "the share of repeated word triples in responses is {:.3g}",
    "max_refused_rate": "the share of prompts that gave no pair is {:.3g}",
    "min_improver_win_rate": "the share of held-out drafts that the improver betters is {:.3g}",
}
"""Limit in preference.brakes -> how to say what was measured. The value of a limit is still allowed."""


ENOUGH_OUTCOMES: Final = 200
"""Fewer say nothing about ``max_refused_rate``: between two steps there may be three, all refused."""


class Idleness:
    """Share of their time in which the workers had no prompt, over the last ``IDLE_WINDOW_S`` or longer: heartbeats bring it."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._idle: Mapping[str, float] = {}
        self._share: dict[str, float] = {}

    def observe(self, stats: Sequence[WorkerStats], now: float) -> dict[str, float]:
        """``now`` in monotonic seconds. Empty until the first window is over; a worker counts that was there at both its ends."""
        if self._began is not None and now - self._began < IDLE_WINDOW_S:
            return self._share
        idle = {row.worker_id: row.idle_s for row in stats}
        grown = [idle[worker] - self._idle[worker] for worker in idle.keys() & self._idle.keys()]
        if self._began is not None and grown:
            self._share = {WORKER_IDLE: min(1.0, fmean(grown) / (now - self._began))}
        self._began, self._idle = now, idle
        return self._share


class Brakes:
    """Watches the metrics of one preference stage for a collapse. State comes from the metrics alone: feed a resumed stage its earlier rows.

    A mean that is not a number crosses its limit. Drift is read from the rewards: reward / beta is the mean of log p(text) under the model
    minus the same under the frozen reference, in nats.
    """

    def __init__(self, settings: BrakesConfig, beta: float, *, reference_free: bool = False) -> None:
        """``reference_free``: the loss's rewards are no ratios to a reference (simpo), so the drift limits do not apply."""
        self._settings = settings
        self._beta = beta
        self._reference_free = reference_free
        self._recent: deque[Mapping[str, float]] = deque(maxlen=settings.window)
        self._first_lengths: list[float] = []
        self._crossed: frozenset[str] = frozenset()
        self._is_new = False

    @property
    def is_new(self) -> bool:
        """Whether the last step crossed a limit that the step before it kept: what is worth a line to people who let the run go on."""
        return self._is_new

    def observe(self, metrics: Mapping[str, float]) -> str | None:
        """Take one step's metrics. The reason in one line as long as the last ``window`` steps' means cross a limit, else None."""
        self._recent.append(metrics)
        if RESPONSE_LENGTH in metrics and len(self._first_lengths) < self._settings.window:
            self._first_lengths.append(metrics[RESPONSE_LENGTH])
        return self._judged()

    def amend(self, metrics: Mapping[str, float]) -> str | None:
        """The same with ``metrics`` in place of those that the newest step had."""
        if not self._recent:
            return None
        self._recent[-1] = {**self._recent[-1], **metrics}
        return self._judged()

    def _judged(self) -> str | None:
        reasons = self._reasons() if len(self._recent) == self._settings.window else {}
        self._is_new = not reasons.keys() <= self._crossed
        self._crossed = frozenset(reasons)
        return "; ".join(reasons.values()) or None

    def _reasons(self) -> dict[str, str]:
        """Limits that the window's means cross, and the reason of each."""
        found = {}
        for limit, value in self._measured().items():
            bound = getattr(self._settings, limit)
            kept = value >= bound if limit.startswith("min_") else value <= bound
            if not kept:  # so written, a NaN is not kept
                found[limit] = f"{SAYINGS[limit].format(value)} (preference.brakes.{limit} {bound:g})"
        return found

    def _measured(self) -> dict[str, float]:
        """What each limit is held against; absent where there is nothing to measure."""
        length = self._mean(RESPONSE_LENGTH)
        ratio = length / max(fmean(self._first_lengths), 1.0) if length is not None else None
        measured = {
            "max_chosen_drop": self._drop("rewards/chosen"),
            "max_rejected_drop": self._drop("rewards/rejected"),
            "min_length_ratio": ratio,
            "max_length_ratio": ratio,
            "max_repetition": self._mean(REPETITION),
            "max_refused_rate": self._refused(),
            "min_improver_win_rate": self._mean(WIN_RATE),  # a limit of 0 is always kept
        }
        return {limit: value for limit, value in measured.items() if value is not None}

    def _drop(self, reward: str) -> float | None:
        """Nats lost against the reference model."""
        mean = None if self._reference_free else self._mean(reward)
        return None if mean is None else -mean / self._beta

    def _refused(self) -> float | None:
        """Share of all outcomes of the window: one step may have eight and the next one thousands. None while they are too few."""
        outcomes = sum(metrics.get(OUTCOMES, 0.0) for metrics in self._recent)
        refused = sum(metrics.get(REFUSED_RATE, 0.0) * metrics.get(OUTCOMES, 0.0) for metrics in self._recent)
        return refused / outcomes if outcomes >= ENOUGH_OUTCOMES else None

    def _mean(self, name: str) -> float | None:
        """Mean over the window's steps that have the metric; None when none has."""
        values = [metrics[name] for metrics in self._recent if name in metrics]
        return fmean(values) if values else None
