"""PyTorch's vectorised functions give their full precision from the first call on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sgpo_dist import vector_math


def test_vectorised_functions_are_called_once_in_one_thread_before_many_do() -> None:
    """All that this PyTorch leaves to oneMKL, in both types: its header says which."""
    calls: list[tuple[str, torch.dtype, int]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            calls.append((func.overloadpacket.__name__, found.dtype, found.numel()))
            return found

    header = Path(torch.__file__).parent / "include" / "ATen" / "cpu" / "vml.h"
    functions = set(re.findall(r"^IMPLEMENT_VML_MKL\((\w+),", header.read_text(encoding="utf-8"), re.MULTILINE))
    assert len(functions) > 10
    with Recorder():
        vector_math.settle()
    made = {(name, dtype) for name, dtype, count in calls if count == 1}
    assert {(name, dtype) for name in functions for dtype in (torch.float32, torch.float64)} <= made
    assert all(count == 1 for _, _, count in calls)
