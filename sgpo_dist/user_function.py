"""Finds a function that the user names as 'module:function'.

Called wherever a setting names one: the reviser ``repair``, the filter's grader, scorers. Leaves out: calling it, and what a failure of
the user's code means there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from sgpo_dist.errors import ConfigError


def load_function(name: str, key: str) -> Callable[..., Any]:
    """The function of 'module:function'. Raises ConfigError, one line naming the setting ``key``, when it cannot be had."""
    module_name, separator, function_name = name.partition(":")
    if not separator or not module_name or not function_name:
        raise ConfigError(f"{key} must be 'module:function', not '{name}'")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as problem:  # importing runs the user's code, which may even end the program
        line = " ".join(f"{type(problem).__name__}: {problem}".split())
        raise ConfigError(f"{key}: module '{module_name}' cannot be imported: {line}") from problem
    function: Any = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"{key}: module '{module_name}' has no function '{function_name}'")
    found: Callable[..., Any] = function
    return found
