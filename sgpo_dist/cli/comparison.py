"""``sgpo-dist eval --against``: one model's answers beside another's, by a judge of ours and by AlpacaEval.

Called by ``evaluate``. What judges is ``sgpo_dist.evaluate``'s; here are the arguments and the tables.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgpo_dist.cli.evaluation_table import grid
from sgpo_dist.cli.local_model import answer, load_model
from sgpo_dist.cli.session import Session
from sgpo_dist.config import EndpointConfig, JudgeConfig
from sgpo_dist.errors import ConfigError
from sgpo_dist.evaluate.exports import Answer, alpaca_rows, read_answers
from sgpo_dist.records import Prompt

if TYPE_CHECKING:
    from sgpo_dist.evaluate.alpaca import AlpacaResult
    from sgpo_dist.evaluate.win_rate import WinRate


def add_comparison_arguments(parser: argparse.ArgumentParser) -> None:
    """--against and who judges."""
    defaults = EndpointConfig()
    group = parser.add_argument_group("comparing")
    group.add_argument("--against", metavar="MODEL|FILE", help="a model directory, 'embedded', or a file of answers (ours or AlpacaEval's)")
    group.add_argument(
        "--judge", choices=("embedding", "openai", "scorer"), help="nearer to the reference (default), an LLM, or --scorer: who says which is better"
    )
    group.add_argument("--judge-model", default="", metavar="NAME", help="the LLM's name at its server")
    group.add_argument("--judge-url", default=defaults.base_url, metavar="URL", help=f"an OpenAI-compatible server (default {defaults.base_url})")
    group.add_argument(
        "--judge-key-env", default=defaults.api_key_env, metavar="VARIABLE", help=f"variable that holds its key (default {defaults.api_key_env})"
    )
    group.add_argument("--seed", type=int, default=0, help="of the bootstrap and of the judge's marks")
    group.add_argument("--alpaca-eval", action="store_true", help="also the win rate of the package alpaca_eval, judged by --judge-model")
    group.add_argument("--alpaca-judge", default="", metavar="NAME", help="which of its judges' prompts (default: that of AlpacaEval 2)")
    group.add_argument("--alpaca-metric", choices=("win_rate", "length_controlled"), default="win_rate", help="length_controlled needs its hub data")
    group.add_argument("--alpaca-python", default=sys.executable, metavar="PATH", help="the interpreter that has alpaca_eval (default: this one)")


def check_comparison(args: argparse.Namespace) -> None:
    """Raises ConfigError for arguments that cannot go together, before a model is loaded."""
    if not args.against:
        if args.judge or args.alpaca_eval:
            raise ConfigError("--judge and --alpaca-eval need --against: a model directory or a file of answers")
        return
    if (args.judge == "openai" or args.alpaca_eval) and not args.judge_model:
        raise ConfigError("--judge openai and --alpaca-eval need --judge-model, the name that --judge-url serves")
    if args.judge == "scorer" and not args.scorer:
        raise ConfigError("--judge scorer needs --scorer module:function")
    if not _is_file(args.against) and args.against != "embedded" and not (Path(args.against) / "config.json").is_file():
        raise ConfigError(f"--against {args.against} is neither a file nor a Hugging Face model directory")


def compare(args: argparse.Namespace, name: str, answers: Sequence[Answer], session: Session) -> dict[str, Any]:
    """Judge, print, and give the figures as JSON holds them."""
    prompts, texts = [answer.prompt for answer in answers], [answer.text for answer in answers]
    others = _others(args, prompts)
    found = asyncio.run(_win_rate(args, prompts, texts, others, session))
    _show(f"{name} against {Path(args.against).name}, judged by {args.judge or 'embedding'}", _win_rate_lines(found), session)
    tree: dict[str, Any] = {"against": {"model": args.against, "judge": args.judge or "embedding", **asdict(found)}}
    if args.alpaca_eval:
        result = _alpaca(args, name, list(zip(prompts, texts, others, strict=True)), session)
        _show(f"AlpacaEval, judged by {args.judge_model}", _alpaca_lines(result), session)
        tree["alpaca_eval"] = {"judge_model": args.judge_model, **asdict(result)}
    return tree


async def _win_rate(args: argparse.Namespace, prompts: Sequence[Prompt], texts: Sequence[str], others: Sequence[str], session: Session) -> WinRate:
    from sgpo_dist.evaluate.judge import open_judge  # brings an HTTP client
    from sgpo_dist.evaluate.win_rate import win_rate

    async with open_judge(_judge(args), session.environment, args.seed) as judge:
        return await win_rate(prompts, texts, others, judge, args.seed)


def _alpaca(args: argparse.Namespace, name: str, rows: Sequence[tuple[Prompt, str, str]], session: Session) -> AlpacaResult:
    from sgpo_dist.evaluate.alpaca import DEFAULT_ANNOTATOR, run_alpaca_eval

    return run_alpaca_eval(
        alpaca_rows(name, [(prompt, text) for prompt, text, _ in rows]),
        alpaca_rows(f"against {Path(args.against).name}", [(prompt, other) for prompt, _, other in rows]),
        _judge(args).endpoint,
        session.environment,
        python=args.alpaca_python,
        annotator=args.alpaca_judge or DEFAULT_ANNOTATOR,
        metric=args.alpaca_metric,
    )


def _judge(args: argparse.Namespace) -> JudgeConfig:
    endpoint = {"base_url": args.judge_url, "model": args.judge_model, "api_key_env": args.judge_key_env}
    return JudgeConfig.model_validate({"kind": args.judge or "embedding", "scorer": args.scorer, "endpoint": endpoint})


def _others(args: argparse.Namespace, prompts: Sequence[Prompt]) -> list[str]:
    """The other side's answers: read, or generated as the model's own were."""
    if _is_file(args.against):
        return read_answers(Path(args.against), prompts)
    loaded = load_model(args.against, args.template, args.max_new_tokens)
    return [found.text.strip() for found in answer(loaded, [loaded.book.policy_ids(prompt) for prompt in prompts])]


def _is_file(name: str) -> bool:
    return Path(name).is_file()


def _win_rate_lines(found: WinRate) -> list[list[str]]:
    judged = found.wins + found.ties + found.losses
    return [
        ["win rate, ties half", f"{found.rate:.1%} ({found.low:.1%} to {found.high:.1%})"],
        ["at equal length", f"{found.length_controlled:.1%}"],
        ["wins, ties, losses", f"{found.wins}, {found.ties}, {found.losses}"],
        ["not judged", f"{found.unjudged} of {judged + found.unjudged}"],
        ["mean characters", f"{found.length:.0f} against {found.other_length:.0f}"],
    ]


def _alpaca_lines(found: AlpacaResult) -> list[list[str]]:
    official = found.official_length_controlled
    lines = [
        ["win rate", f"{found.win_rate:.1%} ± {found.standard_error:.1%}"],
        ["at equal length (our estimate)", f"{found.length_controlled:.1%}"],
        ["not judged", f"{found.unjudged} of {found.judged + found.unjudged}"],
        ["mean characters", f"{found.length:.0f} against {found.other_length:.0f}"],
    ]
    return lines if official is None else [*lines, ["length-controlled win rate", f"{official:.1%}"]]


def _show(title: str, lines: Sequence[Sequence[str]], session: Session) -> None:
    session.table(title, grid([["", ""], *lines]))
