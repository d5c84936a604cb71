"""The arms of the quality benchmark: recipes of the product's own parts, as single-stage runs that build on one another.

Called by ``runner``. An arm is a parent (the arm whose model it starts from) and dotted overrides; its key names it by content, parents
included, so that a changed recipe is another arm and an unchanged one is never run twice. Leaves out: running them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from bench.quality.tasks import Task

RECIPE_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Arm:
    """``parent`` None starts from the initial model. ``improver_from`` names the arm whose model is a separate improver. ``swapped`` trains on its
    pairs the wrong way round. ``rows`` cuts the references that it sees. ``shown`` = in the table (and scored). ``optional`` = run only when named.
    """

    name: str
    stage: str
    parent: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    improver_from: str | None = None
    improver_role: bool = False
    swapped: bool = False
    rows: tuple[int, int | None] = (0, None)
    shown: bool = True
    optional: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        """Arms whose models must be there."""
        return tuple(name for name in (self.parent, self.improver_from) if name is not None)


def arms_of(task: Task) -> dict[str, Arm]:
    """The arms that fit a task by name, each after those that it needs; without those on given pairs where the task has none."""
    arms = ARMS[task.family]
    return {name: arm for name, arm in arms.items() if task.has_given_pairs or arm.overrides.get("preference.pairs") != "given"}


def closed(names: Iterable[str], task: Task) -> list[str]:
    """The arms and all that they start from, in the order in which they can run."""
    arms, wanted = arms_of(task), set(names)
    for name in reversed(list(arms)):  # every arm stands after what it needs
        if name in wanted:
            wanted |= set(arms[name].needs)
    return [name for name in arms if name in wanted]


def arm_key(task: Task, name: str, seed: int) -> str:
    """12 hex digits: a function of everything that decides the arm's figures but the code."""
    arm = ARMS[task.family][name]
    tree = {
        "version": RECIPE_VERSION,
        "task": task.name,
        "settings": dict(task.settings),
        "seed": seed,
        "stage": arm.stage,
        "overrides": dict(arm.overrides),
        "swapped": arm.swapped,
        "rows": list(arm.rows),
        "needs": [arm_key(task, need, seed) for need in arm.needs],
        **task.facts,
    }
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=6).hexdigest()


# ---- orders ------------------------------------------------------------------------------------------------------------------------

# Few references and many bare prompts. SFT sees the first 16 and knows them by heart. The improver repairs drafts of all 32, made so hot that half of
# them have a fault, and is also taught to leave good drafts alone. A pair has to be what fresh draws of both roles side with. Pairs differ in a field
# or two of 58 tokens, and mostly in the same direction: the preference loss alone pushes one token ("false") down everywhere. So it weighs little
# beside the likelihood of chosen texts and of answers that the improver left alone. More SFT sees all 32 as well.

_SFT = {"sft.learning_rate": 1e-4, "sft.train_batch_size": 8}
_SAMPLING = {
    "rollout.policy.temperature": 1.0,
    "rollout.policy.top_p": 1.0,
    "rollout.improver.temperature": 0.3,
    "rollout.improver.top_k": 40,
}
_IMPROVER = {
    **_SAMPLING,
    "improver.train_batch_size": 8,
    "improver.learning_rate": 1e-4,
    "improver.epochs": 2,
    "improver.drafts_per_row": 3,
    "improver.filter.min_edit_ratio": 0.005,
    "improver.filter.fence": None,
}
_DPO = {
    **_SAMPLING,
    "preference.beta": 0.1,
    "preference.learning_rate": 5e-5,
    "preference.nll_coef": 0.2,
    "preference.schedule": "linear",
    "preference.collect": "first",
    "learner.train_batch_size": 4,
    "preference.pair_gate.max_reference_overlap": 1.0,
    "preference.total_steps": 40,
}
_WIDE = {"preference.learning_rate": 2e-5}
"""For pairs of a reference or given answer against another: they lie further apart."""
_ORDERS_REPAIR = {
    "improver.reviser": "repair",
    "improver.repair": "sgpo_dist.starter.orders:repair",
    "improver.keep_ratio": 0.5,
    "improver.edit_weight": 2.0,
}
_ORDERS_IMPROVER = _IMPROVER | {"improver.drafts_per_row": 6, "rollout.policy.temperature": 1.3}
_DIRECT = {"improver.reviser": "reference", "improver.replay": "none"}
_CLOSE = {"preference.beta": 0.02, "preference.nll_coef": 4.0}
_KEPT = {"preference.kept_replay": 4.0}
_AGREEMENT = {"preference.agreement.draws": 2, "preference.agreement.margin": 2, "preference.agreement.vote": "equal"}
_SCORER = "bench.quality.extraction:plausibility"
_PLAUSIBLE = {"preference.pairs": "judge", "preference.judge.kind": "scorer", "preference.judge.scorer": _SCORER}

_TAUGHT = (0, 16)
"""References of the first SFT."""

_ORDERS = (
    Arm("base", "none"),
    Arm("sft", "sft", None, _SFT | {"sft.epochs": 8}, rows=_TAUGHT),
    Arm("improver", "improver", "sft", _ORDERS_IMPROVER | _ORDERS_REPAIR, improver_role=True),
    Arm("sgpo", "preference", "improver", _DPO | _CLOSE | _KEPT | _AGREEMENT, improver_role=True),
    Arm("sft_more", "sft", "sft", _SFT | {"sft.epochs": 4}),
    Arm("sft_most", "sft", "sft", _SFT | {"sft.epochs": 24}),  # as many tokens trained on as in improver and sgpo together
    Arm("synpo_improver", "improver", "sft", _ORDERS_IMPROVER | _DIRECT, shown=False),
    Arm("synpo", "preference", "sft", _DPO | _CLOSE | _KEPT, improver_from="synpo_improver"),
    Arm("spin", "preference", "sft", _DPO | _WIDE | {"preference.pairs": "reference", "preference.epochs": 3}),
    Arm("dpo", "preference", "sft", _DPO | _WIDE | {"preference.pairs": "given", "preference.epochs": 2, "preference.collect": "online"}),
    Arm("sgpo_plain", "preference", "improver", _DPO | _AGREEMENT, improver_role=True, optional=True),
    Arm("sgpo_ungated", "preference", "improver", _DPO | _CLOSE | _KEPT, improver_role=True, optional=True),
    Arm("online_dpo", "preference", "sft", _DPO | _PLAUSIBLE, optional=True),
)

# ---- open-ended chat ---------------------------------------------------------------------------------------------------------------

# The same starting point and sizes for all arms. SFT sees the first 40 references; the improver revises drafts of the rest by swapping in
# sentences of the reference, revisions that come no nearer to it left out. ``direct`` and ``synpo`` take the reference itself as the target.

_CHAT_TAUGHT, _CHAT_DRAFTED = (0, 40), (40, None)
_CHAT_SAMPLING = {
    "rollout.policy.temperature": 0.8,
    "rollout.policy.top_p": 0.95,
    "rollout.improver.temperature": 0.7,
    "rollout.improver.top_k": 40,
}
_CHAT_IMPROVER = {
    **_IMPROVER,
    **_CHAT_SAMPLING,
    "improver.epochs": 1,
    "improver.filter.min_edit_ratio": 0.02,
    "improver.filter.fence": 1.5,
    "improver.filter.fence_statistic": "length_ratio",
    "improver.filter.grader": "bench.quality.chat:similarity",
    "improver.filter.min_gain": 0.02,
}
_BLEND = {"improver.reviser": "blend", "improver.blend_budget": 0.5, "improver.edit_weight": 2.0}
_CHAT_DIRECT = {"improver.reviser": "reference"}
_CHAT_DPO = {
    **_DPO,
    **_CHAT_SAMPLING,
    "learner.train_batch_size": 8,
    "preference.samples_per_prompt": 2,
    "preference.total_steps": 20,
    "preference.pair_gate.max_length_ratio": 1.5,
}
_CHAT_WIDE = {"preference.learning_rate": 1e-5, "preference.epochs": 2, "preference.samples_per_prompt": 1}
_CHAT_AGREEMENT = {"preference.agreement.draws": 2, "preference.agreement.margin": 2, "preference.agreement.vote": "similarity"}

_CHAT = (
    Arm("base", "none"),
    Arm("sft", "sft", None, _SFT | {"sft.epochs": 3}, rows=_CHAT_TAUGHT),
    Arm("improver", "improver", "sft", _CHAT_IMPROVER | _BLEND, rows=_CHAT_DRAFTED, improver_role=True),
    Arm("sgpo", "preference", "improver", _CHAT_DPO, improver_role=True),
    Arm("sgpo_gated", "preference", "improver", _CHAT_DPO | _CHAT_AGREEMENT, improver_role=True),
    Arm("direct", "improver", "sft", _CHAT_IMPROVER | _CHAT_DIRECT, rows=_CHAT_DRAFTED, improver_role=True),
    Arm("synpo", "preference", "sft", _CHAT_DPO, improver_from="direct"),
    Arm("sft_more", "sft", "sft", _SFT | {"sft.epochs": 2}),
    Arm("spin", "preference", "sft", _CHAT_DPO | _CHAT_WIDE | {"preference.pairs": "reference"}),
    Arm("dpo", "preference", "sft", _CHAT_DPO | _CHAT_WIDE | {"preference.pairs": "given", "preference.collect": "online"}),
    Arm("sgpo_direct", "preference", "direct", _CHAT_DPO, improver_role=True, optional=True),
    Arm("sgpo_close", "preference", "improver", _CHAT_DPO | _CLOSE | _KEPT, improver_role=True, optional=True),
)

# ---- the synthetic language --------------------------------------------------------------------------------------------------------

_TINY_SFT = {"sft.learning_rate": 1e-3, "sft.train_batch_size": 8, "sft.epochs": 8}
_TINY_SAMPLING = {
    "rollout.policy.temperature": 1.0,
    "rollout.policy.top_p": 1.0,
    "rollout.improver.temperature": 0.7,
    "rollout.improver.top_p": 1.0,
}
_TINY_IMPROVER = {
    **_TINY_SAMPLING,
    "improver.reviser": "repair",
    "improver.repair": "bench.quality.language:repair",
    "improver.train_batch_size": 8,
    "improver.learning_rate": 1e-3,
    "improver.epochs": 3,
    "improver.drafts_per_row": 4,
    "improver.replay": "reference",
    "improver.filter.min_edit_ratio": 0.005,
    "improver.filter.fence": None,
}
_TINY_DPO = {
    **_TINY_SAMPLING,
    "preference.beta": 0.1,
    "preference.learning_rate": 1e-4,
    "preference.total_steps": 40,
    "preference.max_staleness": 1,
    "preference.pair_gate.max_reference_overlap": 1.0,
    "learner.train_batch_size": 8,
    "weights.weight_sync_interval": 2,
}
_FIRST = {"preference.collect": "first"}
_ORACLE = {"preference.pairs": "judge", "preference.judge.kind": "scorer", "preference.judge.scorer": "bench.quality.language:score"}


_TINY_SGPO = _TINY_DPO | {"preference.agreement.draws": 4, "preference.agreement.margin": 2, "preference.agreement.vote": "similarity"}


def _staleness(bound: int) -> dict[str, Any]:
    return _TINY_SGPO | {"weights.weight_sync_interval": 1, "preference.max_staleness": bound}


_LANGUAGE = (
    Arm("base", "none"),
    Arm("sft", "sft", None, _TINY_SFT),
    Arm("sft_more", "sft", "sft", _TINY_SFT),
    Arm("dpo", "preference", "sft", _TINY_DPO | {"preference.pairs": "given", "preference.epochs": 5}),
    Arm("spin_base", "preference", None, _TINY_DPO | {"preference.pairs": "reference", "preference.epochs": 6}),
    Arm("spin", "preference", "sft", _TINY_DPO | {"preference.pairs": "reference", "preference.epochs": 6}),
    Arm("direct", "improver", None, _TINY_IMPROVER | _DIRECT, improver_role=True),
    Arm("synpo", "preference", "sft", _TINY_DPO | _FIRST, improver_from="direct"),
    Arm("online_dpo_oracle", "preference", "sft", _TINY_DPO | _ORACLE),
    Arm("improver", "improver", None, _TINY_IMPROVER, improver_role=True),
    Arm("sgpo", "preference", "improver", _TINY_SGPO, improver_role=True),
    Arm("sgpo_swapped", "preference", "improver", _TINY_SGPO, swapped=True),
    # ablations
    Arm("sgpo_ungated", "preference", "improver", _TINY_DPO, improver_role=True),
    Arm("sgpo_direct", "preference", "direct", _TINY_SGPO, improver_role=True),
    Arm("sgpo_separate", "preference", "sft", _TINY_DPO | _FIRST, improver_from="improver"),
    Arm("sgpo_first", "preference", "improver", _TINY_SGPO | _FIRST, improver_role=True),
    Arm("sgpo_first_ungated", "preference", "improver", _TINY_DPO | _FIRST, improver_role=True),
    Arm("improver_fenced", "improver", None, _TINY_IMPROVER | {"improver.filter.fence": 1.5}, improver_role=True),
    Arm("sgpo_fenced", "preference", "improver_fenced", _TINY_SGPO, improver_role=True),
    Arm("sgpo_stale0", "preference", "improver", _staleness(0), improver_role=True),
    Arm("sgpo_stale2", "preference", "improver", _staleness(2), improver_role=True),
    Arm("sgpo_stale8", "preference", "improver", _staleness(8), improver_role=True),
)

ARMS: Final[Mapping[str, Mapping[str, Arm]]] = {
    "orders": {arm.name: arm for arm in _ORDERS},
    "chat": {arm.name: arm for arm in _CHAT},
    "language": {arm.name: arm for arm in _LANGUAGE},
    "language-noisy": {arm.name: arm for arm in _LANGUAGE},
}
