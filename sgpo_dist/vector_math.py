"""Makes PyTorch's vectorised functions exact from their first call on. Called where a process that computes begins: learner, engine, benchmark arms.

On x86 processors PyTorch leaves them to oneMKL, which looks for the right code at a function's first call and is not safe there: when two
threads make that call, one can compute its half of the tensor to 11 bits (https://github.com/pytorch/pytorch/issues/188792; oneMKL before 2025).
What it gives may live long: a table of rotary positions as long as an engine.
"""

from __future__ import annotations

from typing import Final

FUNCTIONS: Final = ("acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "log", "log10", "log2", "sin", "sqrt", "tan", "tanh", "trunc")
"""Those of ``ATen/cpu/vml.h`` that go to oneMKL."""


def settle() -> None:
    """Call each once, in each type, in one thread. Takes a millisecond; more than once is harmless, after other threads' calls too late."""
    import torch

    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype)  # so few that one thread does it
        for name in FUNCTIONS:
            getattr(torch, name)(one)
