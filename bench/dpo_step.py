"""One DPO optimiser step: our learner against TRL's DPOTrainer on the same pairs, beta, learning rate and optimiser settings.

Arms: ``ours``, ``defaults`` (TRL as it comes: float32 weights under bf16 autocast, gradient checkpointing, the reference scored in
each step) and ``tuned`` (TRL with bf16 weights, without checkpointing, the reference scored beforehand), all in float32 where the
processor has no products of bf16. What is counted: forward, backward and update. ``ours`` is timed twice: with fresh pairs, whose
reference it has to score (against ``defaults``), and with known ones (against ``tuned``). Guard, ``exact`` and ``exact_trl``: in
float32, on few pairs, ten losses and the log-probs after them. ``shared`` and ``apart`` (goal C3): our step on pairs whose texts share
their first half, with and without computing it once. With a CUDA device: ``measure_gpu``. Called by ``python -m bench``; also run as a
child of itself.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from bench.machine import THREADS, Line, answer, environment, free_port, run_arm, seconds
from sgpo_dist import vector_math
from sgpo_dist.config import LearnerConfig, ModelConfig
from sgpo_dist.data.embedded_model import default_cache_root, embedded_model_dir
from sgpo_dist.precision import processor_dtype
from sgpo_dist.prompts import PromptBook, load_tokenizer
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Stage, TokenExample
from sgpo_dist.roles import LearnerStage, LossPlan, OptimiserPlan
from sgpo_dist.starter import orders

MODULE: Final = "bench.dpo_step"
PAIRS: Final = 8
WARM_UP: Final = 2 if processor_dtype() == "bfloat16" else 1
"""Steps that are not counted: in the first ones, memory is touched that nobody has touched before. In float32 the second is as fast as later ones."""
GUARD_PAIRS: Final = 2
GUARD_STEPS: Final = 10
GUARD_LEARNING_RATE: Final = 1e-6
"""At the step's own rate ten updates bring the loss to nothing, where all losses are equal."""
GPU_PAIRS: Final = 64
ORDERS_SEED: Final = 404
BETA: Final = 0.1
LEARNING_RATE: Final = 1e-5
LOSS_TOLERANCE: Final = 1e-3
BF16_TOLERANCE: Final = 6e-2
FP32_TOLERANCE: Final = 2e-3
SHARED: Final = 0.5
GRADIENT_TOLERANCE: Final = 1e-5
PEAK_BF16_TFLOPS: Final = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0}
"""Dense bf16 peaks by a part of the device's name, from the vendor's data sheets (H100 and H200: the SXM models)."""


# ---- the parent ---------------------------------------------------------------------------------------------------------------------


def measure(timed_steps: int, rounds: int, same_allocator: bool = False) -> list[Line]:
    """The ratios, each side in one process of as many threads. ``same_allocator`` gives TRL the allocator settings that our learner always has."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "defaults": [], "tuned": []}
    for _ in range(rounds):
        for arm, answers in found.items():
            variables = environment(allocator=arm == "ours" or same_allocator)
            answers.append(run_arm(MODULE, arm, {"pairs": PAIRS, "steps": timed_steps}, variables))
    guard, passed = _guard()
    lines = []
    for arm, key in (("defaults", "fresh_s"), ("tuned", "step_s")):
        theirs, ours, name = found[arm], found["ours"], f"TRL {arm}"
        notes = (_speed("ours", ours, key), _speed(name, theirs, "step_s"), *([_use(ours)] if key == "step_s" else []))
        lines.append(Line(f"DPO step, {name}", name, seconds(theirs, "step_s"), seconds(ours, key), guard, passed, notes))
    return lines


def _guard() -> tuple[str, bool]:
    """The same steps in float32: all losses, and what the weights after the last one make of every text."""
    options = {"pairs": GUARD_PAIRS, "steps": GUARD_STEPS - WARM_UP, "dtype": "float32"}
    ours, theirs = (run_arm(MODULE, arm, options, environment(allocator=True)) for arm in ("exact", "exact_trl"))
    loss, logp = (max(abs(a - b) for a, b in zip(ours[key], theirs[key], strict=True)) for key in ("losses", "logps"))
    moved = abs(ours["losses"][-1] - ours["losses"][0])
    text = f"fp32, {GUARD_STEPS} steps: losses within {loss:.1e}, each text's log-prob a token within {logp:.1e}, allowed {LOSS_TOLERANCE:.0e}"
    return f"{text} (the loss moved by {moved:.1e})", max(loss, logp) <= LOSS_TOLERANCE < moved


def _use(arms: Sequence[Mapping[str, Any]]) -> str:
    """Of the learner's step: 6 FLOPs a weight and token (of the head: a scored token) by the rate of plain products of the same shapes and type."""
    took, rate = statistics.median(seconds(arms, "step_s")), max(float(arm["gemm_gflops"]) for arm in arms)
    done = float(arms[0]["gflop"]) / took
    return f"ours: {done:.0f} GFLOP/s of its model's products, {done / rate:.0%} of the {rate:.0f} GFLOP/s that these reach alone"


def _speed(name: str, arms: Sequence[Mapping[str, Any]], key: str) -> str:
    took = statistics.median(seconds(arms, key))
    rss = max(int(arm["peak_rss_mib"]) for arm in arms)
    cpu = statistics.median(seconds(arms, key.replace("_s", "_cpu_s")))
    tokens = arms[0]["tokens"]
    return f"{name}: {took:.1f} s ({cpu:.1f} CPU-s) a step, {PAIRS / took:.2f} pairs/s, {tokens / took:.0f} tokens/s, peak {rss} MiB"


def measure_shared(timed_steps: int, rounds: int) -> Line:
    """What the common leading tokens of a pair's texts save when they are computed once. Guard: log-probs and gradients in float32."""
    variables = environment(allocator=True)
    found: dict[str, list[dict[str, Any]]] = {"apart": [], "shared": []}
    for _ in range(rounds):
        for arm, answers in found.items():
            answers.append(run_arm(MODULE, arm, {"pairs": PAIRS, "steps": timed_steps}, variables))
    gaps = run_arm(MODULE, "gradients", {"pairs": GUARD_PAIRS, "dtype": "float32"}, variables)
    guard = f"fp32: gradients {gaps['gradients']:.1e} apart, each text's log-prob {gaps['logps']:.1e}, allowed {GRADIENT_TOLERANCE:.0e} of their size"
    notes = (f"tokens a step: {found['apart'][0]['tokens']} apart, {found['shared'][0]['tokens']} shared; both texts share their first half",)
    times = seconds(found["apart"], "step_s"), seconds(found["shared"], "step_s")
    passed = max(gaps["gradients"], gaps["logps"]) <= GRADIENT_TOLERANCE
    return Line("DPO step, common leading tokens twice", "twice", *times, guard, passed, notes)


def measure_gpu(timed_steps: int) -> list[str]:
    """Speed of our bf16 step on the GPU and its log-probs against float32 on the CPU; one line when there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return ["gpu: skipped, there is no CUDA device here"]
    gpu, cpu = environment(allocator=False, gpu=True), environment(allocator=True)
    step = run_arm(MODULE, "ours", {"pairs": GPU_PAIRS, "steps": timed_steps + 2, "dtype": "bfloat16", "gpu": 1}, gpu)
    took = statistics.median(step["step_s"])
    lines = [f"gpu: {torch.cuda.get_device_name(0)}, bf16, {GPU_PAIRS} pairs: {took:.3f} s a step, {step['tokens'] / took:.0f} tokens/s"]
    lines.append(_mfu(torch.cuda.get_device_name(0), step["parameters"], step["tokens"], took))
    exact = run_arm(MODULE, "logps", {"pairs": GUARD_PAIRS, "dtype": "float32"}, cpu)
    for dtype, tolerance in (("bfloat16", BF16_TOLERANCE), ("float32", FP32_TOLERANCE)):
        got = run_arm(MODULE, "logps", {"pairs": GUARD_PAIRS, "dtype": dtype, "gpu": 1}, gpu)
        gap = statistics.mean(abs(a - b) / n for a, b, n in zip(got["logps"], exact["logps"], exact["counts"], strict=True))
        verdict = "ok" if gap <= tolerance else "FAILED"
        lines.append(f"gpu: log-probs in {dtype} against the CPU's float32: mean gap {gap:.2e} nats a token, allowed {tolerance:.0e}: {verdict}")
    return lines


def _mfu(device: str, parameters: int, tokens: int, took: float) -> str:
    """6 * parameters * tokens FLOPs a step (forward and backward, padding and attention not counted) by the device's dense peak."""
    teraflops = 6 * parameters * tokens / took / 1e12
    peak = next((value for name, value in PEAK_BF16_TFLOPS.items() if name in device), None)
    share = f" = MFU {teraflops / peak:.1%} of {peak:.0f}" if peak else ", peak of this device not known"
    return f"gpu: {teraflops:.1f} TFLOP/s by 6*N*tokens{share}"


# ---- the pairs ------------------------------------------------------------------------------------------------------------------------


def make_pairs(book: PromptBook, count: int) -> list[PreferencePair]:
    """Orders whose right answer is preferred over the same answer with two fields of the next order. Same count, same pairs."""
    draw = random.Random(ORDERS_SEED)
    made = orders.generate_orders(count + 1, ORDERS_SEED)
    return [_pair(book, number, made[number], made[number + 1], draw) for number in range(count)]


def _pair(book: PromptBook, number: int, order: orders.Order, other: orders.Order, draw: random.Random) -> PreferencePair:
    differing = [key for key in orders.KEYS if order.fields[key] != other.fields[key]]
    swapped = {key: other.fields[key] for key in draw.sample(differing, 2)}
    wrong = replace(order, fields={**order.fields, **swapped})
    prompt = Prompt(f"bench-{number}", tuple(Message(**message) for message in orders.order_messages(order)))
    chosen, rejected = (_completion(book, orders.reference_text(one)) for one in (order, wrong))
    return PreferencePair(f"bench-{number}", Stage.PREFERENCE, prompt, book.policy_ids(prompt), rejected, chosen, book.improver_template)


def share_first_half(pair: PreferencePair) -> PreferencePair:
    """The pair with a worse text that leaves the better one's path half way, at its own second half in reverse."""
    ids = pair.chosen.token_ids
    middle = int(len(ids) * SHARED)
    worse = replace(pair.rejected, token_ids=ids[:middle] + tuple(reversed(ids[middle:])))
    return replace(pair, response=worse)


def _completion(book: PromptBook, text: str) -> Completion:
    return Completion(text, book.completion_ids(text), FinishReason.STOP, 0)


# ---- our arm --------------------------------------------------------------------------------------------------------------------------


def run_ours(pairs: Sequence[PreferencePair], timed_steps: int, fresh_steps: int, dtype: str, gpu: bool) -> dict[str, Any]:
    """``WARM_UP`` steps, ``fresh_steps`` with pairs not seen before, and ``timed_steps`` with pairs whose reference log-probs are known."""
    rank = make_rank(dtype, gpu, total_steps=WARM_UP + fresh_steps + timed_steps)
    fresh: list[tuple[float, float]] = []
    known: list[tuple[float, float]] = []
    tokens = 0
    for number in range(WARM_UP + fresh_steps):
        renamed = [replace(pair, uid=f"{pair.uid}-{number}") for pair in pairs]
        metrics, took = _timed_step(rank, number + 1, renamed, gpu)
        tokens = int(metrics["perf/tokens"])
        fresh += [took] if number >= WARM_UP else []
    for number in range(timed_steps):
        _, took = _timed_step(rank, WARM_UP + fresh_steps + number + 1, renamed, gpu)
        known.append(took)
    work = _products(rank, pairs) if not gpu else {}
    parameters = sum(parameter.numel() for parameter in rank._current.engine.scorer.parameters())
    rank.stop()
    figures = {"tokens": tokens, "parameters": parameters}
    return figures | work | _columns("fresh", fresh) | _columns("step", known)


def _products(rank: Any, pairs: Sequence[PreferencePair]) -> dict[str, float]:
    """``gflop``: of one step's matrix products, forward and backward. ``gemm_gflops``: the rate of such products alone."""
    import torch

    from learner.batch import collate_pairs

    batch, scorer = collate_pairs(pairs), rank._current.engine.scorer
    head = scorer.head.weight
    layers = [weight for weight in scorer.parameters() if weight.ndim == 2 and weight is not head]
    shapes = [(weight, batch.num_tokens) for weight in layers] + [(head, len(batch.target_N))]
    took = 0.0
    with torch.no_grad():
        for weight, rows in shapes:
            left = torch.randn(rows, weight.shape[1], dtype=weight.dtype)
            torch.nn.functional.linear(left, weight)
            began = time.perf_counter()
            torch.nn.functional.linear(left, weight)
            took += time.perf_counter() - began
    gflop = sum(2e-9 * weight.numel() * rows for weight, rows in shapes)
    return {"gflop": 3 * gflop, "gemm_gflops": gflop / took}


def run_exact(pairs: Sequence[PreferencePair], steps: int) -> dict[str, Any]:
    """``WARM_UP`` + ``steps`` losses in float32, and the log-probs that the last weights give."""
    rank = make_rank("float32", False, total_steps=WARM_UP + steps, learning_rate=GUARD_LEARNING_RATE)
    losses = [rank.preference_step(number + 1, pairs)["loss"] for number in range(WARM_UP + steps)]
    logps = _logps_a_token(rank._current.engine.scorer, pairs)
    rank.stop()
    return {"losses": losses, "logps": logps}


def _logps_a_token(scorer: Any, pairs: Sequence[PreferencePair]) -> list[float]:
    """Of every chosen and every rejected text."""
    import torch

    from learner.batch import collate_pairs, pair_logps

    batch = collate_pairs(pairs)
    with torch.no_grad():
        chosen, rejected = pair_logps(scorer.eval()(batch), batch)
    texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return [total / len(text.token_ids) for total, text in zip(chosen.tolist() + rejected.tolist(), texts, strict=True)]


def _columns(name: str, took: Sequence[tuple[float, float]]) -> dict[str, list[float]]:
    return {f"{name}_s": [wall for wall, _ in took], f"{name}_cpu_s": [cpu for _, cpu in took]}


def _timed_step(rank: Any, step: int, pairs: Sequence[PreferencePair], gpu: bool) -> tuple[dict[str, float], tuple[float, float]]:
    import torch

    wall, cpu = time.perf_counter(), time.process_time()
    metrics: dict[str, float] = rank.preference_step(step, pairs)
    if gpu:
        torch.cuda.synchronize()
    return metrics, (time.perf_counter() - wall, time.process_time() - cpu)


def run_logps(pairs: Sequence[PreferencePair], dtype: str, gpu: bool) -> dict[str, Any]:
    """Summed log-probs of both texts of every pair under the untrained model."""
    rank = make_rank(dtype, gpu, total_steps=1)
    halves = [(pair, half) for pair in pairs for half in (pair.chosen, pair.rejected)]
    rows = [TokenExample(f"{pair.uid}-{number}", pair.prompt_ids, half.token_ids) for number, (pair, half) in enumerate(halves)]
    logps = rank.logps(rows)
    rank.stop()
    return {"logps": logps, "counts": [len(row.completion_ids) for row in rows]}


def run_gradients(pairs: Sequence[PreferencePair]) -> dict[str, float]:
    """How far a first step's gradients (norm of all differences) and log-probs are apart, common beginnings computed once and twice, by their size.

    At the same weights: after a few updates of Adam's, which divides by the gradient's size, the last digits of a sum have grown twentyfold.
    """
    import torch
    from torch.linalg import vector_norm

    from learner.batch import collate, pair_row
    from learner.objectives import preference_objective

    rank = make_rank("float32", False, total_steps=1)
    scorer = rank._current.engine.scorer
    found = []
    for rows in ([pair_row(pair) for pair in pairs], [_row_apart(pair) for pair in pairs]):
        objective, micro = preference_objective(pairs, rows, rank._reference_logps(pairs, rows), LossPlan(beta=BETA)), collate(rows)
        loss = objective.share(range(len(pairs)), scorer(micro), micro)
        gradients = torch.autograd.grad(loss, list(scorer.parameters()))
        found.append((torch.cat([gradient.flatten() for gradient in gradients]), objective.logps))
    rank.stop()
    (once, once_logps), (twice, twice_logps) = found
    apart = vector_norm(once - twice) / vector_norm(twice)
    return {"gradients": float(apart), "logps": float((once_logps / twice_logps - 1).abs().max())}


def _row_apart(pair: PreferencePair) -> Any:
    """The texts share the prompt only."""
    from learner.batch import Row

    return Row(len(pair.prompt_ids), pair.prompt_ids, (pair.chosen.token_ids, pair.rejected.token_ids))


def _compute_all_twice() -> None:
    """From here on, in our steps."""
    from learner import learner

    module: Any = learner
    module.pair_row = _row_apart


def make_rank(dtype: str, gpu: bool, total_steps: int, learning_rate: float = LEARNING_RATE, sent_in: str = "") -> Any:
    """A learner of one rank with the embedded model, at the start of a preference stage. ``sent_in``: the type it publishes, else ``dtype``."""
    from learner.learner import LearnerRank, RankSpec

    model = ModelConfig.model_validate({"dtype": dtype})
    budget = 16384 if gpu else 2048
    settings = LearnerConfig.model_validate({"gpus_per_rank": float(gpu), "beta2": 0.999, "max_tokens_per_micro_batch": budget})
    rank = LearnerRank(RankSpec(0, 1, model, settings, "shm", sent_in or dtype, (), "bench", 0, str(default_cache_root()), THREADS))
    rank.connect("127.0.0.1", free_port())
    plan = OptimiserPlan(learning_rate, total_steps, warmup_ratio=0.0, schedule="constant", beta2=0.999)
    model_dir = str(embedded_model_dir())
    rank.begin_stage(LearnerStage(Stage.PREFERENCE, model_dir, plan, LossPlan(beta=BETA), model_dir))
    return rank


# ---- TRL's arms -----------------------------------------------------------------------------------------------------------------------


def run_trl(pairs: Sequence[PreferencePair], timed_steps: int, dtype: str, tuned: bool, learning_rate: float = LEARNING_RATE) -> dict[str, Any]:
    """``WARM_UP`` and ``timed_steps`` steps of DPOTrainer, each on all the pairs. In float32 also the last weights' log-probs."""
    from learner.model import CompletionScorer

    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = build_trainer(
            str(embedded_model_dir()),
            text_rows(pairs),
            folder,
            len(pairs),
            WARM_UP + timed_steps,
            dtype=dtype,
            tuned=tuned,
            learning_rate=learning_rate,
        )
        require_same_ids(trainer, pairs)
        tokens = sum(2 * len(pair.prompt_ids) + len(pair.chosen.token_ids) + len(pair.rejected.token_ids) for pair in pairs)
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    logps = _logps_a_token(CompletionScorer(trainer.model), pairs) if dtype == "float32" else []
    return {"losses": losses, "tokens": tokens, "logps": logps} | _columns("step", clock.took[WARM_UP:])


def text_rows(pairs: Sequence[PreferencePair]) -> list[dict[str, str]]:
    """The pairs as text with its special tokens spelled out, which TRL turns into ids itself."""
    tokenizer: Any = load_tokenizer(embedded_model_dir())

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return [{"prompt": text(pair.prompt_ids), "chosen": text(pair.chosen.token_ids), "rejected": text(pair.rejected.token_ids)} for pair in pairs]


def build_trainer(
    model: Any,
    rows: Sequence[Mapping[str, str]],
    folder: str,
    batch: int,
    steps: int,
    *,
    dtype: str,
    tuned: bool,
    learning_rate: float = LEARNING_RATE,
) -> tuple[Any, Any]:
    """A DPOTrainer over ``rows`` and the callback that times its steps. ``model`` is a directory, or a model to be trained in place."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class StepClock(TrainerCallback):
        """Wall and CPU seconds from the begin of each optimiser step to its end."""

        def __init__(self) -> None:
            self.took: list[tuple[float, float]] = []
            self._began = (0.0, 0.0)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            """The batch is there, the forward pass is next."""
            self._began = (time.perf_counter(), time.process_time())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """The weights are updated."""
            self.took.append((time.perf_counter() - self._began[0], time.process_time() - self._began[1]))

    settings: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": True,
        "beta": BETA,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    if tuned:
        settings |= {"gradient_checkpointing": False, "precompute_ref_log_probs": True, "bf16": True, "optim": "adamw_torch_fused"}
    if dtype == "float32":
        settings |= {"bf16": False}
    if isinstance(model, str) and tuned:  # left alone, TRL loads float32 weights and computes in bf16 by autocast
        settings |= {"model_init_kwargs": {"dtype": dtype}}
    clock = StepClock()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    data = Dataset.from_list([dict(row) for row in rows])
    return DPOTrainer(model, args=DPOConfig(**settings), train_dataset=data, processing_class=tokenizer, callbacks=[clock]), clock


def require_same_ids(trainer: Any, pairs: Sequence[PreferencePair]) -> None:
    """Raises RuntimeError unless TRL trains on the very token ids that we do."""
    for row, pair in zip(trainer.train_dataset, pairs, strict=True):
        theirs = (tuple(row["prompt_ids"]), tuple(row["chosen_ids"]), tuple(row["rejected_ids"]))
        if theirs != (pair.prompt_ids, pair.chosen.token_ids, pair.rejected.token_ids):
            raise RuntimeError(f"TRL reads other token ids than we do for pair {pair.uid}: the step times would not compare")


def main() -> None:
    """One arm, as a child of ``measure``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=["ours", "shared", "apart", "defaults", "tuned", "exact", "exact_trl", "logps", "gradients"], required=True)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default=processor_dtype())
    parser.add_argument("--gpu", type=int, default=0)
    options = parser.parse_args()

    import torch

    torch.set_num_threads(THREADS)
    vector_math.settle()
    pairs = make_pairs(PromptBook(load_tokenizer(embedded_model_dir())), options.pairs)
    if options.arm in ("shared", "apart", "gradients"):
        pairs = [share_first_half(pair) for pair in pairs]
    if options.arm in ("ours", "shared", "apart"):
        if options.arm == "apart":
            _compute_all_twice()
        fresh_steps = options.steps if options.arm == "ours" else 0
        answer(options.arm, **run_ours(pairs, options.steps, fresh_steps, options.dtype, bool(options.gpu)))
    elif options.arm == "gradients":
        answer(options.arm, **run_gradients(pairs))
    elif options.arm == "exact":
        answer(options.arm, **run_exact(pairs, options.steps))
    elif options.arm == "exact_trl":
        answer(options.arm, **run_trl(pairs, options.steps, "float32", True, GUARD_LEARNING_RATE))
    elif options.arm == "logps":
        answer("logps", **run_logps(pairs, options.dtype, bool(options.gpu)))
    else:
        answer(options.arm, **run_trl(pairs, options.steps, options.dtype, options.arm == "tuned"))


if __name__ == "__main__":
    main()
