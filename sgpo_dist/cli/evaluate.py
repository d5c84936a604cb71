"""``sgpo-dist eval``: held-out figures of any model directory, its answers as files, and how often they beat another's.

The figures are ``sgpo_dist.evaluate``'s, the answers ``local_model``'s; comparing is ``comparison``'s. Left out: speed; a run evaluates its
own models on its engines.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sgpo_dist.cli.comparison import add_comparison_arguments, check_comparison, compare
from sgpo_dist.cli.evaluation_table import show_rows
from sgpo_dist.cli.local_model import both_roles, load_model, reference_logps
from sgpo_dist.cli.session import Session
from sgpo_dist.data.loading import BUILT_IN, Columns, load_rows
from sgpo_dist.errors import ConfigError, DataError
from sgpo_dist.evaluate.evaluation import EvalRow, evaluate, row_tree
from sgpo_dist.evaluate.exports import Answer, alpaca_rows, answer_rows, arena_rows, write_lines, write_list
from sgpo_dist.evaluate.scoring import Scorer, load_scorers
from sgpo_dist.prompts import parse_refinement
from sgpo_dist.records import Prompt

DEFAULT_NEW_TOKENS: Final = 96


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``eval`` on the command line."""
    parser = commands.add_parser(
        "eval",
        help="held-out figures of a model directory",
        description="Answers every prompt greedily, rewrites each answer as the improver, and prints the figures a run prints: score or\n"
        "likeness to the reference, share of answers that end by themselves, log-likelihood of the reference, improver\n"
        "gain. With --against also how often the answers beat another model's, as a judge sees it.",
        epilog="examples:\n  sgpo-dist eval --model runs/demo/model --data orders\n"
        "  sgpo-dist eval --model embedded --data my_heldout.jsonl --limit 50 --out figures.json\n"
        "  sgpo-dist eval --model runs/demo/model --data chat --against embedded\n"
        "  sgpo-dist eval --model runs/demo/model --data chat --against answers.jsonl --judge openai --judge-model NAME\n"
        "docs/evaluation.md explains every figure and format",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="DIR", required=True, help="a Hugging Face model directory, or 'embedded'")
    parser.add_argument(
        "--data", metavar="PATH", required=True, help=f"{', '.join(BUILT_IN)} (their held-out rows), a file, or a datasets directory"
    )
    parser.add_argument("--input-key", metavar="NAME", help="column of the prompt when it is neither 'prompt' nor 'messages'")
    parser.add_argument("--reference-key", metavar="NAME", help="column of the reference when it is neither 'reference' nor 'chosen'")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N rows (default: all)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=DEFAULT_NEW_TOKENS, metavar="N", help=f"cap of an answer (default {DEFAULT_NEW_TOKENS})"
    )
    parser.add_argument("--template", default="v1", help="version of the improver's prompt template")
    parser.add_argument("--name", help="what the model is called in tables and files (default: its directory's name)")
    parser.add_argument("--scorer", default="", metavar="MODULE:FUNCTION", help="scores answers: (text, reference, prompt) -> 0 to 1")
    parser.add_argument("--out", metavar="FILE", type=Path, help="also write the figures as JSON")
    parser.add_argument("--answers-out", metavar="FILE", type=Path, help="write the answers as JSON lines, for a later --against")
    parser.add_argument("--alpaca-out", metavar="FILE", type=Path, help="write the answers as AlpacaEval's model outputs (JSON)")
    parser.add_argument("--arena-out", metavar="FILE", type=Path, help="write the answers as Arena-Hard's model answers (JSON lines)")
    add_comparison_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, session: Session) -> int:
    """Print the figures, write the files, compare."""
    check_comparison(args)
    prompts, scorers = _prompts(args), load_scorers(args.scorer, "--scorer")
    name = args.name or Path(args.model).name
    rows, answers = evaluate_model(name, args, prompts, scorers)
    show_rows(rows, session)
    _export(args, name, answers)
    compared = compare(args, name, answers, session) if args.against else {}
    if args.out is not None:
        _write_json(args.out, {"rows": [row_tree(row) for row in rows], **compared})
    return 0


def evaluate_model(
    name: str, args: argparse.Namespace, prompts: Sequence[Prompt], scorers: Mapping[str, Scorer]
) -> tuple[list[EvalRow], list[Answer]]:
    """Load the model, let both roles answer, score references, make figures. The model is out of memory when this returns."""
    loaded = load_model(args.model, args.template, args.max_new_tokens)
    responses, refinements = both_roles(loaded, prompts)
    rows = evaluate(name, prompts, responses, refinements, reference_logps(loaded, prompts), scorers=scorers)
    pairs = zip(prompts, responses, refinements, strict=True)
    answers = [Answer(prompt, response, parse_refinement(refinement.text, response.text)) for prompt, response, refinement in pairs]
    return rows, answers


def _prompts(args: argparse.Namespace) -> tuple[Prompt, ...]:
    prompts = load_rows(args.data, "heldout", Columns(args.input_key, args.reference_key))
    prompts = prompts[: args.limit] if args.limit > 0 else prompts
    if not prompts:
        raise DataError(f"--data {args.data} holds no rows")
    return prompts


def _export(args: argparse.Namespace, name: str, answers: Sequence[Answer]) -> None:
    try:
        if args.answers_out is not None:
            write_lines(args.answers_out, answer_rows(name, answers))
        if args.alpaca_out is not None:
            write_list(args.alpaca_out, alpaca_rows(name, [(answer.prompt, answer.text) for answer in answers]))
        if args.arena_out is not None:
            write_lines(args.arena_out, arena_rows(name, answers, time.time()))
    except OSError as problem:
        raise ConfigError(f"{problem.filename} cannot be written: {problem.strerror}") from None


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    try:
        path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    except OSError as problem:
        raise ConfigError(f"{path} cannot be written: {problem.strerror}") from None
