"""What a configuration comes down to in steps, rows, pairs, tokens and versions: sums on the configuration and the rows there are.

Called by ``plan``. Everything here is a bound or a count that follows from the settings; how long texts turn out and which pairs are refused
is known only afterwards. Leaves out: memory and disk (``estimate``), and whether any of it is possible (``plan``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from sgpo_dist.cli.estimate import plural
from sgpo_dist.config import Config

IMPROVER_OVERHEAD_TOKENS: Final = 120
"""About what the improver's instruction adds to prompt and draft."""
_OTHER_HALF: Final = {"improver": "refinement", "judge": "second response", "reference": "reference, say", "given": "second answer, say"}


@dataclass(frozen=True, slots=True)
class DataFacts:
    """How many rows there are for each role; ``given`` of the references bring a rejected answer too."""

    references: int
    prompts: int
    heldout: int
    given: int = 0


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of a plan: what, how much, and how it comes about."""

    name: str
    value: str
    why: str = ""


def arithmetic(config: Config, data: DataFacts | None) -> list[Figure]:
    """Steps, rows, pairs, tokens and versions of each stage."""
    lines: list[Figure] = []
    if "sft" in config.stages:
        lines.append(_rows_line("sft", config.sft.epochs, config.sft.train_batch_size, _taught(config, data) if data else None, "references"))
    if "improver" in config.stages:
        rows = _revisions(config, data) if data else None
        replayed = 2 if config.improver.replay != "none" else 1
        what = "revisions at most" + (f" and as many {config.improver.replay} replays" if replayed == 2 else "")
        what += f", {config.improver.keep_ratio:g} kept drafts each at most" if config.improver.keep_ratio else ""
        lines.append(_rows_line("improver", config.improver.epochs, config.improver.train_batch_size, rows, what, replayed))
    if "preference" in config.stages:
        lines += _preference_lines(config, data)
    return lines


def _taught(config: Config, data: DataFacts) -> int:
    """References of the sft stage."""
    return min(data.references, config.sft.max_rows or data.references)


def _revisions(config: Config, data: DataFacts) -> int:
    left = data.references - (_taught(config, data) if config.sft.max_rows and "sft" in config.stages else 0)
    return min(left, config.improver.max_rows or left) * config.improver.drafts_per_row


def _rows_line(stage: str, epochs: int, batch: int, rows: int | None, what: str, factor: int = 1) -> Figure:
    passes = f"{plural(epochs, 'epoch')}, batches of {batch}"
    if rows is None:
        return Figure(f"{stage}: rows", passes)
    return Figure(f"{stage}: steps", str(epochs * math.ceil(rows * factor / batch)), f"{rows} {what}, {passes}")


def pairs_needed(config: Config) -> int:
    """Pairs that the preference stage trains on."""
    return config.preference.total_steps * config.learner.train_batch_size


def pairs_made(config: Config) -> int:
    """Those of them that the model makes itself."""
    return 0 if config.preference.pairs == "given" else config.preference.total_steps * config.made_pairs_per_step


def is_online(config: Config) -> bool:
    """Whether workers make pairs while the learner trains."""
    return config.preference.pairs != "given" and config.preference.collect == "online"


def versions_published(config: Config) -> int:
    """Versions a whole run publishes: the first, one a stage end, and online one every ``weight_sync_interval`` steps of preference."""
    interval, steps = config.weights.weight_sync_interval, config.preference.total_steps
    versions = 1 + sum(stage != "preference" for stage in config.stages)
    return versions + (math.ceil(steps / interval) if is_online(config) else 1) if "preference" in config.stages else versions


def pair_tokens(config: Config) -> tuple[int, int, int]:
    """Longest prompt, response and other half of a pair in tokens; an answer of the data's counts as long as a response may be."""
    response = config.rollout.policy.max_new_tokens
    other = config.rollout.improver.max_new_tokens if config.preference.pairs == "improver" else response
    return config.data.max_prompt_tokens, response, other


def _preference_lines(config: Config, data: DataFacts | None) -> list[Figure]:
    preference, batch = config.preference, config.learner.train_batch_size
    longest, per_rank = sum(pair_tokens(config)), batch // config.learner.num_ranks
    micro = math.ceil(per_rank * longest / config.learner.max_tokens_per_micro_batch)
    lines = [
        Figure("preference: steps", str(preference.total_steps), f"batches of {plural(batch, 'pair')}, {per_rank} a rank"),
        Figure("preference: pairs", str(pairs_needed(config)), _supply_words(config, data)),
        _step_tokens(config, longest),
        Figure("preference: micro-batches", f"up to {micro} a rank", f"budget {config.learner.max_tokens_per_micro_batch} tokens"),
    ]
    if pairs_made(config):
        lines.append(Figure("generated for a pair", f"up to {generated_tokens(config):,} tokens", _generation_words(config)))
    if preference.rounds > 1:
        lines.append(Figure("rounds", str(preference.rounds), "each after the first begins with a new reference model"))
    return [*lines, _ahead_line(config), _versions_line(config)]


def _step_tokens(config: Config, longest: int) -> Figure:
    prompt, response, other = pair_tokens(config)
    preference, batch = config.preference, config.learner.train_batch_size
    improver_row = prompt + response + config.rollout.improver.max_new_tokens + IMPROVER_OVERHEAD_TOKENS
    rows = [
        (round(preference.improver_replay * batch), "improver rows", improver_row),
        (round(preference.kept_replay * batch), "kept answers", prompt + response),
    ]
    tokens = batch * longest + sum(count * size for count, _, size in rows)
    mixed = "".join(f"; {count} {name} of {size}" for count, name, size in rows if count)
    words = f"prompt {prompt} + response {response} + {_OTHER_HALF[preference.pairs]} {other}"
    return Figure("preference: tokens a step", f"up to {tokens:,}", words + mixed)


def _supply_words(config: Config, data: DataFacts | None) -> str:
    given = pairs_needed(config) - pairs_made(config)
    own = f", {given} of them the data's own" if given and pairs_made(config) else ""
    return f"{_tries_words(config, data)}{own}" if data else own.removeprefix(", ")


def _tries_words(config: Config, data: DataFacts) -> str:
    preference = config.preference
    epochs = plural(preference.epochs, "epoch")
    if preference.pairs == "given":
        return f"{data.given} given pairs x {epochs} = {tries(config, data)}"
    ladder = f" x {preference.ladder} rungs" if preference.ladder > 1 else ""
    return f"{_asked(config, data)} prompts x {preference.samples_per_prompt}{ladder} x {epochs} = {tries(config, data)} tries"


def generated_tokens(config: Config) -> int:
    """Most tokens sampled for one pair: its halves that are sampled, a chain's response shared by its rungs, and the draws that vote."""
    preference, response, refinement = config.preference, config.rollout.policy.max_new_tokens, config.rollout.improver.max_new_tokens
    own = {
        "improver": math.ceil(response / preference.ladder) + refinement,
        "judge": 2 * response,
        "reference": response,
        "given": 0,
    }[preference.pairs]
    return own + _voting_draws(config) * (response + refinement)


def _voting_draws(config: Config) -> int:
    return 0 if config.preference.agreement.vote == "likelihood" else config.preference.agreement.draws


def _generation_words(config: Config) -> str:
    words = {"improver": "response + refinement", "judge": "two responses", "reference": "response", "given": ""}[config.preference.pairs]
    shared = f", one response for {config.preference.ladder} rungs" if config.preference.ladder > 1 else ""
    draws = _voting_draws(config)
    return words + shared + (f" + {plural(draws, 'voting draw')} of both roles" if draws else "")


def _ahead_line(config: Config) -> Figure:
    preference = config.preference
    if not is_online(config):
        words = "given" if preference.pairs == "given" else "made before the first step, by the stage's starting model"
        return Figure("pairs ahead of training", "all", words)
    interval = plural(config.weights.weight_sync_interval, "step")
    bound = f"(max_staleness {preference.max_staleness} + 1) x {config.made_pairs_per_step} pairs x {interval} a version"
    return Figure("pairs ahead of training", f"at most {config.capacity}", bound)


def _versions_line(config: Config) -> Figure:
    apart = config.preference.improver_model is not None
    more = "; and two each time the separate improver takes its turn" if apart else ""
    return Figure("versions published", str(versions_published(config)), "the first, one a stage before, those of the preference stage" + more)


def reads_references(config: Config) -> bool:
    """Whether a preference prompt needs its reference: as the chosen text, or because the judge compares with it."""
    preference = config.preference
    return preference.pairs == "reference" or (preference.pairs == "judge" and preference.judge.kind == "embedding")


def _asked(config: Config, data: DataFacts) -> int:
    return data.references if reads_references(config) else data.prompts


def tries(config: Config, data: DataFacts) -> int:
    """How many pairs the data can give at most, before any is refused."""
    preference = config.preference
    if preference.pairs == "given":
        return data.given * preference.epochs
    return _asked(config, data) * preference.samples_per_prompt * preference.ladder * preference.epochs
