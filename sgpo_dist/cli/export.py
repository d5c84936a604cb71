"""``sgpo-dist export``: a run's model as a directory of its own, with a model card, ready to be loaded or shared."""

from __future__ import annotations

import argparse
import secrets
import shutil
from pathlib import Path

from sgpo_dist.cli.session import Session, add_run_argument, chosen_run
from sgpo_dist.errors import ConfigError, EnvironmentProblem
from sgpo_dist.records import Stage
from sgpo_dist.report.model_card import CARD_NAME, model_card
from sgpo_dist.run_directory import RunDirectory


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``export`` on the command line."""
    parser = commands.add_parser(
        "export",
        help="copy a run's model, with a model card, to a directory",
        description="The final model, or the one a stage left, as a Hugging Face directory: safetensors, tokenizer, model card.",
        epilog="examples:\n  sgpo-dist export demo --to my-model\n  sgpo-dist export demo --stage sft --to sft-model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_argument(parser)
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="made by the command; must not exist yet")
    parser.add_argument("--stage", choices=[stage.value for stage in Stage], help="the model this stage left instead of the final one")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, session: Session) -> int:
    """Copy the model."""
    export_model(chosen_run(args), args.stage, args.to)
    session.say(f"wrote {args.to}")
    return 0


def export_model(directory: RunDirectory, stage: str | None, target: Path) -> None:
    """Copy the model to ``target``, whole or not at all. Raises ConfigError when it is not there yet or ``target`` exists."""
    source = directory.stage_model(stage) if stage else directory.model
    if not (source / "config.json").is_file():
        what = f"stage {stage} has left no model" if stage else "the run has no final model"
        raise ConfigError(f"{what} in {directory.path} yet; " + _models_there(directory))
    if target.exists():
        raise ConfigError(f"{target} exists already; give --to a directory that does not")
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, draft)
        (draft / CARD_NAME).write_text(model_card(directory, stage), encoding="utf-8")
        draft.rename(target)
    except OSError as problem:
        shutil.rmtree(draft, ignore_errors=True)
        raise EnvironmentProblem(f"cannot write {target} ({problem}); free space there or give another --to") from problem


def _models_there(directory: RunDirectory) -> str:
    there = [stage.value for stage in Stage if (directory.stage_model(stage.value) / "config.json").is_file()]
    return f"there is --stage {', '.join(there)}" if there else "let a stage finish first"
