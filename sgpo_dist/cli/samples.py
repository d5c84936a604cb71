"""``sgpo-dist samples``: a run's pairs as text, with what the improver changed; or what was refused, and why."""

from __future__ import annotations

import argparse
from typing import Final

from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from sgpo_dist.cli.session import Session, add_run_argument, chosen_run
from sgpo_dist.records import RefusalReason, Stage
from sgpo_dist.report.samples import ORDERS, Sample, ordered, read_samples
from sgpo_dist.report.word_diff import Change, Segment, plain_diff, word_diff
from sgpo_dist.sanitize import one_line, terminal_text

STYLES: Final = {Change.SAME: "", Change.REMOVED: "red strike", Change.ADDED: "green"}
DEFAULT_LIMIT: Final = 10


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``samples`` on the command line."""
    parser = commands.add_parser(
        "samples",
        help="read a run's pairs, response against refinement",
        description="Every pair as text: the prompt, and the response with what the refinement removed and added.\n"
        "On a terminal in colours, elsewhere as [-removed-] and {+added+}. A running run can be read too.",
        epilog="examples:\n  sgpo-dist samples demo --limit 3\n  sgpo-dist samples demo --filter most-changed\n"
        "  sgpo-dist samples demo --refused --reason near_copy",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_argument(parser)
    parser.add_argument("--stage", choices=[stage.value for stage in Stage if stage is not Stage.SFT], help="only this stage's")
    parser.add_argument("--limit", type=_count, default=DEFAULT_LIMIT, metavar="N", help=f"at most N (default {DEFAULT_LIMIT}; 0 = all)")
    parser.add_argument("--filter", dest="order", choices=ORDERS, default="prompt-order", help="which come first")
    parser.add_argument("--refused", action="store_true", help="what was refused instead of what was kept")
    parser.add_argument("--reason", choices=[reason.value for reason in RefusalReason], help="with --refused: only this reason")
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    """0 or more. Raises ArgumentTypeError."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0")
    return int(text)


def run(args: argparse.Namespace, session: Session) -> int:
    """Print the samples."""
    found = read_samples(chosen_run(args).database, args.stage, refused=args.refused or args.reason is not None)
    chosen = [sample for sample in ordered(found, args.order) if args.reason in (None, sample.reason)]
    shown = chosen[: args.limit] if args.limit > 0 else chosen
    for number, sample in enumerate(shown, 1):
        show(sample, number, session)
    kind = "refusals" if args.refused or args.reason else "pairs"
    session.say(f"{len(shown)} of {len(chosen)} {kind}", style="dim")
    return 0


def show(sample: Sample, number: int, session: Session) -> None:
    """One sample: coloured in a frame on a terminal, plain text elsewhere."""
    if session.plain:
        session.text(plain(sample, number))
        return
    parts = [
        Text("prompt", style="dim"),
        Text(terminal_text(sample.prompt)),
        Text("\n" + diff_label(sample), style="dim"),
        _diff_text(sample),
    ]
    session.out.print(Panel(Group(*parts), title=Text(headline(sample, number)), title_align="left", border_style="cyan"))


def plain(sample: Sample, number: int) -> str:
    """A sample as plain text."""
    return f"--- {headline(sample, number)}\nprompt: {sample.prompt}\n{diff_label(sample)}: {plain_diff(segments(sample))}\n"


def headline(sample: Sample, number: int) -> str:
    """Number, stage, fate and the figures that people sort by."""
    fate = f"refused: {sample.reason}" if sample.reason else sample.state + (f" in step {sample.step}" if sample.step else "")
    parts = [f"{number}", sample.stage, fate, f"source {one_line(sample.source, 60)}"]
    if sample.version is not None:
        parts.append(f"version {sample.version}")
    if sample.response is not None and sample.refinement is not None:
        parts.append(f"changed {sample.changed:.0%}, length x{sample.growth:.2f}")
    parts += [one_line(sample.detail, 120)] if sample.detail else []
    return " | ".join(parts)


def diff_label(sample: Sample) -> str:
    """What the text below is."""
    if sample.response is None:
        return "no text was made"
    return "response" if sample.refinement is None else "response, refined"


def segments(sample: Sample) -> list[Segment]:
    """The texts of a sample as a diff; unchanged text where there is only one."""
    if sample.refinement is None:
        return [Segment(Change.SAME, sample.response or "")]
    return word_diff(sample.response or "", sample.refinement)


def _diff_text(sample: Sample) -> Text:
    text = Text()
    for segment in segments(sample):
        text.append(terminal_text(segment.text), style=STYLES[segment.change])
    return text
