"""The local-repair language: a task whose quality is counted, not judged, and in which a small repair is the skill to learn.

A prompt is ``LENGTH`` class words out of twelve ("bam dok ..."). A right answer has, place by place, one of the three synonyms of the
class that stands there ("bamo doku ..."). Called by the quality benchmark and its tests, and through the product's hooks: ``score`` is a
grader, judge or scorer, ``repair`` an improver's repair. Every prompt belongs to exactly one split, whatever seed drew it.

The initial model's habits are known too (``habit``): how often it is right, which synonyms it favours, how it errs. References favour no
synonym, so learning from them by imitation changes style without need: ``drift`` measures that. Leaves out: models and tokens.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

LENGTH: Final = 8
"""Words of a prompt, and of a right answer."""
CLASSES: Final = ("bam", "dok", "fel", "gin", "hup", "jas", "kev", "lor", "mit", "nur", "pos", "ruk")
SYNONYMS: Final = {stem: (f"{stem}a", f"{stem}o", f"{stem}u") for stem in CLASSES}
WORDS: Final = tuple(word for stem in CLASSES for word in SYNONYMS[stem])
SPLITS: Final = ("pretraining", "train", "bare", "validation", "heldout")
SOURCE: Final = "language"
LEAST_RIGHT, MOST_RIGHT = 0.4, 0.7
"""Share of right words in the initial model's answers: for the class it knows worst, and best; the other classes lie evenly between."""
FAVOURS: Final = (0.6, 0.3, 0.1)
"""How the initial model spreads its right words over a class's synonyms; which one comes first differs from class to class."""
PET_ERROR: Final = 0.6
"""Share of the initial model's wrong words that are one and the same word of another class; the rest is spread evenly."""
REPAIRED: Final = 0.5
"""Share of the wrong words that one repair mends."""


def rows(split: str, count: int, seed: int = 0, noise: float = 0.0) -> list[dict[str, str]]:
    """``count`` rows {"id", "prompt", "reference", "source"}; each reference word is wrong with probability ``noise``."""
    return [
        {"id": f"{SOURCE}-{split}-{seed}-{number:05d}", "prompt": prompt, "reference": _reference(prompt, noise, seed), "source": SOURCE}
        for number, prompt in enumerate(prompts(split, count, seed), start=1)
    ]


def bare_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """``count`` rows of the split "bare" without reference: {"id", "prompt", "source"}."""
    return [{key: text for key, text in row.items() if key != "reference"} for row in rows("bare", count, seed)]


def pair_rows(split: str, count: int, seed: int = 0, noise: float = 0.0, wrong: float = 0.5) -> list[dict[str, str]]:
    """``rows`` that also bring a given weaker answer under "rejected": the reference with a share ``wrong`` of its words spoilt."""
    return [row | {"rejected": corrupt(row["reference"], row["prompt"], wrong, seed)} for row in rows(split, count, seed, noise)]


def prompts(split: str, count: int, seed: int = 0) -> list[str]:
    """``count`` different prompts of a split, the same for the same seed. Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"the language has no split '{split}'; write one of {', '.join(SPLITS)}")
    found: dict[str, None] = {}
    drawn = _drawn(f"{split}/{seed}")
    while len(found) < count:
        prompt = next(drawn)
        if split_of(prompt) == split:
            found.setdefault(prompt)
    return list(found)


def split_of(prompt: str) -> str:
    """The one split that the prompt belongs to: a function of its text alone, so that splits never meet."""
    return SPLITS[int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=4).digest(), "big") % len(SPLITS)]


# ---- quality ---------------------------------------------------------------------------------------------------------------------


def accuracy(text: str, prompt: str) -> float:
    """Share of places in [0, 1] with a synonym of the prompt's class; a missing or superfluous word is a wrong place."""
    said, asked = text.split(), prompt.split()
    right = sum(is_right(word, stem) for word, stem in zip(said, asked, strict=False))
    return right / max(len(said), len(asked), 1)


def score(text: str, reference: str | None, prompt: str) -> float:
    """``accuracy`` as the hook that grades, judges and evaluates; the reference may be noisy and has no say."""
    del reference
    return accuracy(text, prompt)


def is_right(word: str, stem: str) -> bool:
    """Whether the word is a synonym of the class."""
    return word in SYNONYMS.get(stem, ())


def drift(before: Sequence[tuple[str, str]], after: Sequence[tuple[str, str]], smoothing: float = 0.5) -> float:
    """Needless change of style between two sets of (prompt, answer), in nats; 0 = the same shares of synonyms.

    KL(before || after) of the shares of each class's synonyms among its right words, ``smoothing`` added to every count, averaged over
    the classes.
    """
    old, new = _right_words(before), _right_words(after)
    return sum(_divergence(_shares(old, stem, smoothing), _shares(new, stem, smoothing)) for stem in CLASSES) / len(CLASSES)


# ---- changed answers -------------------------------------------------------------------------------------------------------------


def repair(draft: str, reference: str | None, prompt: str) -> str | None:
    """Graded repair: half of the wrong words (at least one) give way to the reference's, all others stay; None if nothing can be mended.

    A word of the reference is taken only where it is right itself: with noisy references some places cannot be mended. Which places are
    mended is drawn from draft and prompt, so that no place is privileged. A draft of another length is brought to the prompt's with the
    reference's words.
    """
    if reference is None:
        return None
    asked, model = prompt.split(), reference.split()
    words = draft.split()[: len(asked)]
    words += model[len(words) : len(asked)]
    wrong = [place for place, (word, stem) in enumerate(zip(words, asked, strict=False)) if not is_right(word, stem)]
    mendable = [place for place in wrong if place < len(model) and is_right(model[place], asked[place])]
    budget = max(1, int(REPAIRED * len(wrong)))
    for place in random.Random(f"{prompt}/{draft}").sample(mendable, min(budget, len(mendable))):
        words[place] = model[place]
    mended = " ".join(words)
    return None if mended == " ".join(draft.split()) else mended


def spoil(draft: str, reference: str | None, prompt: str) -> str | None:
    """A broken reviser, for the gate: the draft with two of its words made wrong."""
    del reference
    return corrupt(draft, prompt, 2 / LENGTH) if draft.split() and len(draft.split()) == LENGTH else None


def corrupt(answer: str, prompt: str, share: float, seed: int = 0) -> str:
    """The answer with ``share`` of its words (at least one) made wrong: a given weaker answer."""
    rng = random.Random(f"corrupt/{seed}/{prompt}/{answer}")
    words, asked = answer.split(), prompt.split()
    for place in rng.sample(range(len(words)), max(1, round(share * len(words)))):
        words[place] = rng.choice(_wrong_words(asked[place]))
    return " ".join(words)


# ---- the initial model's habits --------------------------------------------------------------------------------------------------


def habit(stem: str) -> dict[str, float]:
    """Probability of each of ``WORDS`` where the initial model reads the class ``stem``."""
    number = CLASSES.index(stem)
    right = LEAST_RIGHT + (MOST_RIGHT - LEAST_RIGHT) * number / (len(CLASSES) - 1)
    wrong = _wrong_words(stem)
    shares = dict.fromkeys(wrong, (1.0 - right) * (1.0 - PET_ERROR) / len(wrong))
    shares[pet_error(stem)] += (1.0 - right) * PET_ERROR
    for rank, share in enumerate(FAVOURS):
        shares[SYNONYMS[stem][(number + rank) % len(FAVOURS)]] = right * share
    return {word: shares[word] for word in WORDS}


def pet_error(stem: str) -> str:
    """The wrong word that the initial model likes best for a class: a synonym of the next one."""
    following = CLASSES[(CLASSES.index(stem) + 1) % len(CLASSES)]
    return SYNONYMS[following][CLASSES.index(stem) % len(FAVOURS)]


def habitual_answer(prompt: str, rng: random.Random) -> str:
    """An answer drawn as the initial model would draw it."""
    return " ".join(rng.choices(WORDS, weights=list(habit(stem).values()))[0] for stem in prompt.split())


# ---- inside ----------------------------------------------------------------------------------------------------------------------


def _drawn(key: str) -> Iterator[str]:
    rng = random.Random(key)
    while True:
        yield " ".join(rng.choices(CLASSES, k=LENGTH))


def _reference(prompt: str, noise: float, seed: int) -> str:
    """Each word any of the three synonyms alike, or with probability ``noise`` any wrong word alike."""
    rng = random.Random(f"reference/{seed}/{prompt}")
    return " ".join(rng.choice(_wrong_words(stem) if rng.random() < noise else SYNONYMS[stem]) for stem in prompt.split())


def _wrong_words(stem: str) -> list[str]:
    return [word for word in WORDS if not is_right(word, stem)]


def _right_words(answers: Sequence[tuple[str, str]]) -> Counter[str]:
    places = [place for prompt, text in answers for place in zip(prompt.split(), text.split(), strict=False)]
    return Counter(word for stem, word in places if is_right(word, stem))


def _shares(found: Counter[str], stem: str, smoothing: float) -> list[float]:
    total = sum(found[word] + smoothing for word in SYNONYMS[stem])
    return [(found[word] + smoothing) / total for word in SYNONYMS[stem]]


def _divergence(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
