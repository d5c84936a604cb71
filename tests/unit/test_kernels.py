"""The learner's kernels beside PyTorch's own operations: values, gradients, models, and what happens where they cannot be compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Qwen3Config
from transformers.models.llama import modeling_llama

from learner import kernels

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(autouse=True)
def loaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(modeling_llama, kernels.ROTATE, modeling_llama.apply_rotary_pos_emb)  # put back after the test
    assert kernels.load(cache) == ""
    yield
    kernels.unload()


def gradients(work: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of ``work`` and its inputs' gradients, with the same gradients of the outputs each time."""
    leaves = [each.detach().clone().requires_grad_() if each.is_floating_point() else each for each in inputs]
    found = work(*leaves)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    draw = torch.Generator().manual_seed(3)
    torch.autograd.backward(outputs, [torch.randn(each.shape, generator=draw).to(each.dtype) for each in outputs])
    return [*(each.detach() for each in outputs), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_as_good(ours: Callable, theirs: Callable, inputs: Sequence[Tensor]) -> None:
    """In float32 the same to rounding; in bfloat16 as near to float32's results as PyTorch's own operations come."""
    exact = gradients(theirs, [each.float() if each.is_floating_point() else each for each in inputs])
    other, mine = gradients(theirs, inputs), gradients(ours, inputs)
    assert len(exact) == len(other) == len(mine)
    for number, (got, plain, right) in enumerate(zip(mine, other, exact, strict=True)):
        assert (got.shape, got.dtype) == (plain.shape, plain.dtype)
        gap, allowed = ((torch.linalg.vector_norm(each.float() - right) / torch.linalg.vector_norm(right)).item() for each in (got, plain))
        assert gap <= max(1.05 * allowed, 2e-6), f"value {number}: relative gap {gap:.1e}, PyTorch's {allowed:.1e}"


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 5, 576), (2, 7, 3, 19)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype):
    inputs = [drawn(*shape, dtype=dtype), drawn(shape[-1], dtype=dtype, seed=1)]
    assert_as_good(lambda x, weight: kernels._RmsNorm.apply(x, weight, 1e-5), plain_norm, inputs)
    turned = drawn(shape[-1], *shape[:-1], dtype=dtype).movedim(0, -1)  # not contiguous
    assert torch.equal(kernels._RmsNorm.apply(turned, inputs[1], 1e-5), kernels._RmsNorm.apply(turned.contiguous(), inputs[1], 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 5, 37), (2, 1536)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype):
    assert_as_good(kernels._SwiGlu.apply, lambda gate, up: silu(gate) * up, [4 * drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype, seed=1)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tables", [1, 3])
def test_rotation(tables: int, dtype: torch.dtype):
    plain = modeling_llama.apply_rotary_pos_emb
    cosines, sines = (drawn(tables, 5, 16, dtype=dtype, seed=seed) for seed in (1, 2))
    query, key = drawn(3, 5, 4, 16, dtype=dtype).transpose(1, 2), drawn(3, 2, 5, 16, dtype=dtype)

    def theirs(*both: Tensor) -> Sequence[Tensor]:
        return plain(*both, cosines.to(both[0].dtype), sines.to(both[0].dtype))

    assert_as_good(lambda *both: kernels._rotation(plain)(*both, cosines, sines), theirs, [query, key])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [3, 1000])
def test_target_logps(vocabulary: int, dtype: torch.dtype):
    logits, targets = 5 * drawn(9, vocabulary, dtype=dtype), torch.arange(9) % vocabulary

    def theirs(logits_N_V: Tensor) -> Tensor:
        return -cross_entropy(logits_N_V.float(), targets, reduction="none")

    assert_as_good(lambda logits_N_V: kernels.target_logps(logits_N_V, targets), theirs, [logits])
    assert kernels.target_logps(logits, targets).dtype is torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_shows(dtype: torch.dtype):
    """A step is skipped by what its gradients hold: a kernel must not lose a NaN."""
    bad = drawn(2, 40, dtype=dtype)
    bad[1, 7] = torch.nan
    ones, targets = torch.ones(40, dtype=dtype), torch.tensor([3, 3])
    for work, inputs in (
        (lambda x: kernels._RmsNorm.apply(x, ones, 1e-5), [bad]),
        (kernels._SwiGlu.apply, [bad, ones.repeat(2, 1)]),
        (lambda x: kernels.target_logps(x, targets), [bad]),
    ):
        out, grad, *_ = gradients(work, inputs)
        for made in (out, grad):
            assert torch.isfinite(made[0]).all()
            assert torch.isnan(made[1]).any()


def test_a_nan_with_every_bit_set_shows():
    """Rounding to bfloat16 adds to the bits below."""
    logits, targets = drawn(1, 40, dtype=torch.bfloat16).requires_grad_(), torch.tensor([3])
    kernels.target_logps(logits, targets).backward(torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32))
    assert torch.isnan(logits.grad).all()


def little(config: type, **others: object) -> nn.Module:
    torch.manual_seed(5)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    model = AutoModelForCausalLM.from_config(config(**sizes, **heads, **others))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5, 0.3)
    return model


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config])
def test_a_fused_model_gives_the_same_gradients(config: type):
    ids = torch.arange(14).view(2, 7)
    models = [little(config), little(config)]
    kernels.fuse(models[1])
    assert sum("forward" in vars(module) for module in models[1].modules()) >= 7  # norms and gated layers
    for model in models:
        model(input_ids=ids, labels=ids).loss.backward()
    for (name, plain), fused in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(fused.grad, plain.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_layers_that_compute_something_else_are_left():
    """Gemma adds one to its norms' weights, and gates by another function."""
    model = little(GemmaConfig, hidden_act="gelu_pytorch_tanh")
    kernels.fuse(model)
    assert not any("forward" in vars(module) for module in model.modules())
    other = little(LlamaConfig, hidden_act="relu")
    kernels.fuse(other)
    assert not any("forward" in vars(layer.mlp) for layer in other.model.layers)


def test_inputs_of_other_kinds_go_the_plain_way():
    model = little(LlamaConfig)
    kernels.fuse(model)
    ids, plain = torch.arange(7).view(1, 7), little(LlamaConfig).double()
    assert torch.equal(model.double()(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_rotation_of_a_part_goes_the_plain_way():
    calls = []
    wrapped = kernels._rotation(lambda query, key, cosines, sines: calls.append(1) or (query, key))
    query, table = drawn(1, 2, 5, 16, dtype=torch.float32), drawn(1, 5, 8, dtype=torch.float32)
    wrapped(query, query, table, table)
    assert calls == [1]


def test_without_a_compiler_pytorch_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kernels.unload()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no g++" in kernels.load(tmp_path)
    logits = drawn(2, 9, dtype=torch.float32)
    assert torch.isfinite(kernels.target_logps(logits, torch.tensor([1, 2]))).all()
    model = little(LlamaConfig)
    kernels.fuse(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_compiler_that_fails_is_told_by_its_first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kernels.unload()
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\necho half > "$last"\necho "no space left\n1 error" >&2\nexit 1\n', encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    problem = kernels.load(tmp_path)
    assert problem.endswith("slower: no space left")
    assert not list((tmp_path / "kernels").iterdir())


def test_it_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch):
    kernels.unload()
    monkeypatch.setenv("PATH", "")
    assert kernels.load(cache) == ""
    monkeypatch.setattr(kernels, "_processor", lambda: ["another one"])
    kernels.unload()
    assert "g++" in kernels.load(cache)


def test_a_damaged_library_is_told(tmp_path: Path):
    kernels.unload()
    path = kernels._compiled(tmp_path / "kernels")
    path.write_bytes(b"half of it")
    assert "not used" in kernels.load(tmp_path)
