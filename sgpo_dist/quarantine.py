"""Steps that the learner skipped because their loss or gradient was not finite: counted, and their batches written down.

Called after each step by ``stage`` and ``preferences``. The learner itself decides to skip, on all ranks alike, and leaves weights and
optimiser as they were; the step counts, and so do its pairs. Leaves out: why a number was not finite, which the file is there to find out.

    runs/NAME/quarantine/STAGE-step-N.json
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from sgpo_dist.errors import RunFailed
from sgpo_dist.records import PreferencePair, TokenExample
from sgpo_dist.run import Run

SKIPPED: Final = "step/skipped"
"""The learner's metric: 1 for a step that changed nothing, else 0."""


def is_skipped(metrics: Mapping[str, float]) -> bool:
    """Whether the learner skipped the step. A learner that says nothing about it skips nothing."""
    return metrics.get(SKIPPED, 0.0) > 0.0


def keep_count(run: Run, metrics: Mapping[str, float], batch: Sequence[PreferencePair | TokenExample]) -> None:
    """Write the batch of a skipped step down and count it. Raises RunFailed after more than learner.max_bad_steps of them in a row."""
    if not is_skipped(metrics):
        run.faults.bad_steps = 0
        return
    run.faults.bad_steps += 1
    stage, step = run.stage.value, run.progress.step
    path = run.directory / "quarantine" / f"{stage}-step-{step}.json"
    reason = reason_of(metrics)
    write_batch(path, {"stage": stage, "step": step, "reason": reason, "metrics": _plain(metrics), "rows": [row_tree(run, row) for row in batch]})
    run.recorder.event("bad_step", stage=stage, step=step, reason=reason, file=str(path.relative_to(run.directory)))
    run.recorder.message(f"step {step} of stage {stage} was skipped: {reason}; its batch is in {path}")
    limit = run.config.learner.max_bad_steps
    if run.faults.bad_steps > limit:
        raise RunFailed(
            f"{run.faults.bad_steps} steps in a row were skipped (learner.max_bad_steps {limit}), the last because {reason}; look at {path}, "
            "then start another run_name with a lower learning rate or without those rows"
        )


def reason_of(metrics: Mapping[str, float]) -> str:
    """Which number was not finite."""
    name = "loss" if not math.isfinite(metrics["loss"]) else "grad_norm"
    return f"{name} was {metrics[name]}"


def row_tree(run: Run, row: PreferencePair | TokenExample) -> dict[str, Any]:
    """A row of a batch as the file holds it: who it is, what it says, and the very tokens that were trained on."""
    if isinstance(row, PreferencePair):
        texts = {"chosen": row.chosen.text, "rejected": row.rejected.text, "messages": [asdict(message) for message in row.prompt.messages]}
        ids = {"prompt_ids": row.prompt_ids, "chosen_ids": row.chosen.token_ids, "rejected_ids": row.rejected.token_ids}
        return {"uid": row.uid, "prompt_id": row.prompt.prompt_id, "version": row.version, **texts, **ids}
    texts = {"prompt": run.book.decode(row.prompt_ids), "completion": run.book.decode(row.completion_ids)}
    ids = {"prompt_ids": row.prompt_ids, "completion_ids": row.completion_ids}
    return {"uid": row.uid, "weight": _plain(row.weight), **texts, **ids}


def write_batch(path: Path, tree: Mapping[str, Any]) -> None:
    """The whole file or none; a replayed step writes it again."""
    path.parent.mkdir(exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(tree, ensure_ascii=False, allow_nan=False, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they are written as the texts that float() reads."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
