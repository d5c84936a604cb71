"""SGPO as a distributed actor/learner system: one model writes, improves and learns from its own preference pairs.

``from sgpo_dist import Config, load_config, train`` is the same as the command line; importing this package loads neither torch nor Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sgpo_dist.config import Config, load_config

if TYPE_CHECKING:
    from sgpo_dist.launch import RunResult

__all__ = ["Config", "load_config", "train"]


def train(config: Config, resume: str = "auto") -> RunResult:
    """Train to the end and return where the model lies; calling it again resumes. Raises ``sgpo_dist.errors.SgpoError``."""
    from sgpo_dist.launch import run_training

    return run_training(config, resume)
