"""What layers do element by element, on processors: RMS normalisation, SwiGLU, rotary positions, log-probs from logits.

In PyTorch's operations each takes three to ten passes over memory; ``kernels.cpp`` takes one forward and one back, keeps less for the way back, and
rounds where PyTorch does. g++ compiles it for the processor at hand in about two seconds when a learner with ``cpu_kernels`` first starts; later
ones find the library in the cache. Where that fails everything stays PyTorch's, slower and otherwise the same. Called by the learner (``load``) and
its model (``fuse``, ``target_logps``). Leaves out: products, attention, GPUs.

Shapes: ``_N`` = tokens, ``_V`` = vocabulary, ``_B`` = rows, ``_H`` = heads, ``_L`` = positions, ``_D`` = width of a head.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

SOURCE: Final = Path(__file__).with_suffix(".cpp")
FLAGS: Final = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
COMPILE_DEADLINE_S: Final = 120.0
TYPES: Final = {torch.float32: "float", torch.bfloat16: "bfloat16"}
ROTATE: Final = "apply_rotary_pos_emb"
"""What transformers calls this function in each model's own module."""
ALIKE: Final = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative and absolute gap that a layer's sample may have."""

_POINTER, _COUNT, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
SIGNATURES: Final = {
    "rms_norm": (*[_POINTER] * 4, _FLOAT, _COUNT, _COUNT),
    "rms_norm_backward": (*[_POINTER] * 6, _COUNT, _COUNT),
    "swiglu": (*[_POINTER] * 3, _COUNT),
    "swiglu_backward": (*[_POINTER] * 5, _COUNT),
    "rotate": (*[_POINTER] * 4, *[_COUNT] * 4, _POINTER, _POINTER, _COUNT, _INT),
    "target_logps": (*[_POINTER] * 4, _COUNT, _COUNT),
    "target_logps_backward": (*[_POINTER] * 5, _COUNT, _COUNT),
}
"""Arguments of kernels.cpp's functions without the last one, the number of threads."""

_kernels: dict[tuple[str, torch.dtype], Callable[..., None]] = {}


# ---- the library ----------------------------------------------------------------------------------------------------------------------


def load(cache_dir: Path) -> str:
    """Compile the kernels if ``cache_dir`` does not have them, and use them from now on. Returns "", or in a line why they are not used."""
    if _kernels:
        return ""
    try:
        library = ctypes.CDLL(str(_compiled(cache_dir / "kernels")))
        for name, arguments in SIGNATURES.items():
            for dtype, suffix in TYPES.items():
                address = ctypes.c_void_p.in_dll(library, f"{name}_{suffix}").value or 0
                _kernels[name, dtype] = ctypes.CFUNCTYPE(None, *arguments, _INT)(address)
    except (OSError, ValueError, subprocess.SubprocessError) as problem:
        unload()
        said = getattr(problem, "stderr", None) or str(problem)
        return f"the learner's kernels are not used, its steps are slower: {said.strip().splitlines()[0]}"
    return ""


def unload() -> None:
    """PyTorch's operations from now on, except in models that were fused before."""
    _kernels.clear()


def _compiled(folder: Path) -> Path:
    """The library for this processor and source."""
    named = hashlib.blake2b(SOURCE.read_bytes() + repr((FLAGS, _processor())).encode(), digest_size=12).hexdigest()
    path = folder / f"{named}.so"
    if path.is_file():
        return path
    compiler = shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("there is no g++ to compile them; install it")
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{named}.{os.getpid()}.draft"
    try:
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(draft)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_DEADLINE_S)  # noqa: S603 all words are ours
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def _processor() -> list[str]:
    """What tells apart the processors that ``-march=native`` does: machines of a cluster may share the cache."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [os.uname().machine, *sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})]


def _run(name: str, dtype: torch.dtype, *arguments: Tensor | float | Any) -> None:
    pointed = (each.data_ptr() if isinstance(each, Tensor) else each for each in arguments)
    _kernels[name, dtype](*pointed, torch.get_num_threads())


def _takes(*tensors: Tensor) -> bool:
    """Whether the kernels are there and take these."""
    dtype = tensors[0].dtype
    return bool(_kernels) and dtype in TYPES and all(each.dtype is dtype and each.device.type == "cpu" for each in tensors)


# ---- the functions --------------------------------------------------------------------------------------------------------------------


class _RmsNorm(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + epsilon) over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        out, scale_N = torch.empty_like(x), torch.empty(rows)
        _run("rms_norm", x.dtype, x, weight, out, scale_N, epsilon, rows, width)
        ctx.save_for_backward(x, weight, scale_N)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale_N = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        sums = torch.zeros(torch.get_num_threads(), x.shape[-1])
        _run("rms_norm_backward", x.dtype, grad.contiguous(), x, weight, scale_N, grad_x, sums, len(scale_N), x.shape[-1])
        return grad_x, sums.sum(0).to(weight.dtype), None


class _SwiGlu(torch.autograd.Function):
    """y = gate sigmoid(gate) up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _run("swiglu", gate.dtype, gate, up, out, gate.numel())
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        _run("swiglu_backward", gate.dtype, grad.contiguous(), gate, up, grad_gate, grad_up, gate.numel())
        return grad_gate, grad_up


class _Rotate(torch.autograd.Function):
    """y = x cos + turned(x) sin, with turned(x) = (-second half, first half) of the last dimension."""

    @staticmethod
    def forward(ctx: Any, x_B_H_L_D: Tensor, cos_B_L_D: Tensor, sin_B_L_D: Tensor) -> Tensor:
        ctx.save_for_backward(cos_B_L_D, sin_B_L_D)
        return _rotated(x_B_H_L_D, cos_B_L_D, sin_B_L_D, backward=False)

    @staticmethod
    def backward(ctx: Any, grad_B_H_L_D: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(grad_B_H_L_D, *ctx.saved_tensors, backward=True), None, None


def _rotated(x_B_H_L_D: Tensor, cos_B_L_D: Tensor, sin_B_L_D: Tensor, *, backward: bool) -> Tensor:
    batch, heads, length, width = x_B_H_L_D.shape
    x_B_H_L_D = x_B_H_L_D if x_B_H_L_D.stride(3) == 1 else x_B_H_L_D.contiguous()
    out_B_H_L_D = torch.empty(batch, length, heads, width, dtype=x_B_H_L_D.dtype).transpose(1, 2)
    strides = ((_COUNT * 3)(*each.stride()[:3]) for each in (x_B_H_L_D, out_B_H_L_D))
    table = cos_B_L_D.stride(0) if len(cos_B_L_D) > 1 else 0
    _run("rotate", x_B_H_L_D.dtype, x_B_H_L_D, cos_B_L_D, sin_B_L_D, out_B_H_L_D, batch, heads, length, width, *strides, table, backward)
    return out_B_H_L_D


class _TargetLogps(torch.autograd.Function):
    """log softmax(logits)[target], in float32."""

    @staticmethod
    def forward(ctx: Any, logits_N_V: Tensor, target_N: Tensor) -> Tensor:
        logps_N, total_N = torch.empty(2, len(target_N))
        _run("target_logps", logits_N_V.dtype, logits_N_V, target_N, logps_N, total_N, *logits_N_V.shape)
        ctx.save_for_backward(logits_N_V, target_N, total_N)
        return logps_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        logits_N_V, target_N, total_N = ctx.saved_tensors
        grad_N_V = torch.empty_like(logits_N_V)
        _run("target_logps_backward", logits_N_V.dtype, grad_N.contiguous(), logits_N_V, target_N, total_N, grad_N_V, *logits_N_V.shape)
        return grad_N_V, None


def target_logps(logits_N_V: Tensor, target_N: Tensor) -> Tensor:
    """``[N]`` log-probs (nats) of the targets, float32 whatever the logits are: logit(target) - logsumexp(logits)."""
    if _takes(logits_N_V) and logits_N_V.is_contiguous() and target_N.is_contiguous():
        logps_N: Tensor = _TargetLogps.apply(logits_N_V, target_N)
        return logps_N
    return -cross_entropy(logits_N_V.float(), target_N, reduction="none")


# ---- layers ---------------------------------------------------------------------------------------------------------------------------

Forward = Callable[..., Any]


def fuse(model: nn.Module) -> None:
    """Let the layers of ``model`` that are such functions compute by the kernels: those that give the same on a sample."""
    if not _kernels:
        return
    kinds: dict[type[nn.Module], list[nn.Module]] = {}
    for module in model.modules():
        kinds.setdefault(type(module), []).append(module)
    for kind, modules in kinds.items():
        if (fused := _fused(modules[0])) is not None:
            for module in modules:
                module.forward = MethodType(fused, module)
        _fuse_rotation(sys.modules.get(kind.__module__))


def _fused(module: nn.Module) -> Forward | None:
    """A forward pass by the kernels for modules of this one's type, if they are known."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 1 and isinstance(getattr(module, "variance_epsilon", None), float):
        fused, width = _norm_forward(type(module).forward), len(weight)
    elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")) and isinstance(module.gate_proj, nn.Linear):
        fused, width, weight = _gated_forward(type(module).forward), module.gate_proj.in_features, module.gate_proj.weight
    else:
        return None
    if weight.dtype not in TYPES:
        return None
    with torch.no_grad():
        sample = _sample(3, width, dtype=weight.dtype)
        return fused if _alike(module(sample), fused(module, sample)) else None


def _norm_forward(plain: Forward) -> Forward:
    def forward(self: Any, hidden_states: Tensor) -> Any:
        if not _takes(hidden_states, self.weight):
            return plain(self, hidden_states)
        return _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)

    return forward


def _gated_forward(plain: Forward) -> Forward:
    def forward(self: Any, x: Tensor) -> Any:
        if not _takes(x):
            return plain(self, x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(_SwiGlu.apply(gate, up) if _takes(gate, up) else self.act_fn(gate) * up)

    return forward


def _fuse_rotation(place: ModuleType | None) -> None:
    """In the module of a model's own code, where its attention looks the function up."""
    plain = getattr(place, ROTATE, None)
    if plain is None or plain.__module__ == __name__:
        return
    fused = _rotation(plain)
    query, key, cosines, sines = _sample(1, 2, 3, 8), _sample(1, 1, 3, 8), _sample(1, 3, 8), _sample(1, 3, 8)
    try:
        same = all(map(_alike, plain(query, key, cosines, sines), fused(query, key, cosines, sines)))
    except (TypeError, ValueError, RuntimeError):  # another function of that name
        return
    if same:
        setattr(place, ROTATE, fused)


def _rotation(plain: Forward) -> Forward:
    def apply(query: Tensor, key: Tensor, cosines: Tensor, sines: Tensor, *others: Any, **options: Any) -> Any:
        whole = query.ndim == 4 and cosines.shape in ((len(query), *key.shape[2:]), (1, *key.shape[2:])) and query.shape[2:] == key.shape[2:]
        if others or options or not whole or not _takes(query, key, cosines, sines):
            return plain(query, key, cosines, sines, *others, **options)
        tables = cosines.contiguous(), sines.contiguous()
        return _Rotate.apply(query, *tables), _Rotate.apply(key, *tables)

    return apply


def _sample(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _alike(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=ALIKE[one.dtype], atol=ALIKE[one.dtype])
