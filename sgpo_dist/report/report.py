"""report.html: one self-contained page about a run, written from its files.

Called at the end of ``train`` and by ``report``. Every part of the run may be missing: its section is then left out. Texts of models and
users are escaped by Jinja (autoescape) and made harmless before; the page has no script, loads nothing, and says so in its content
security policy. Left out: looks (report.html.jinja) and the geometry of the curves (``chart``).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final

import jinja2
import yaml
from markupsafe import Markup

from sgpo_dist.errors import EnvironmentProblem
from sgpo_dist.evaluate.evaluation import row_from, table
from sgpo_dist.faults import Summary, fault_lines, summarise
from sgpo_dist.recorder import EventRow, MetricRow, read_events, read_marks, read_metrics
from sgpo_dist.report.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Series, chart
from sgpo_dist.report.samples import Sample, read_samples, refusal_counts, state_counts
from sgpo_dist.report.word_diff import Segment, word_diff
from sgpo_dist.run_directory import EVALUATE_AGAIN, RunDirectory, read_whole
from sgpo_dist.sanitize import one_line, terminal_text

EXAMPLES: Final = 6
LONGEST_TEXT: Final = 4000
LONGEST_TABLE: Final = 60
CHAOS_NAME: Final = "chaos.json"
CHAOS_COLUMNS: Final = ("number", "kind", "detail", "what", "recovery_s")

Curve = tuple[str, str, tuple[str, ...]]

CURVES: Final = (
    ("Loss", "lower is better; the preference loss starts at 0.693", ("loss",)),
    ("Reward margin", "beta times how much more the model prefers the rewrite than its reference does", ("rewards/margins",)),
    ("Reward accuracy", "share of pairs whose rewrite got the higher reward", ("rewards/accuracies",)),
    ("Rewards", "of rewrites and responses; both falling is a warning", ("rewards/chosen", "rewards/rejected")),
    ("Lengths", "tokens of rewrites and responses", ("completions/chosen_length", "completions/rejected_length")),
    ("Staleness", "weight versions between a pair's oldest token and its step", ("staleness",)),
    ("Gradient norm", "before clipping", ("grad_norm",)),
    ("Learning rate", "", ("learning_rate",)),
    ("Waiting", "seconds a step, of the learner for pairs and of all for the weights", ("time/wait_for_batch", "time/publish")),
    ("Learner speed", "tokens a second while a step is computed", ("perf/tokens_per_s",)),
)
"""Title, what to read from it, metric names: one chart a stage that has any of them."""

HEALTH_CURVES: Final = (
    ("Win rate", "share of held-out answers that the improver makes better, and worse", ("improver/win_rate", "improver/loss_rate")),
    ("Change", "share of the words that a rewrite changes; falling to 0 means copies", ("improver/edit_ratio",)),
    ("Copies and talk", "share of outcomes refused as copies, and for talk about rewriting", ("improver/copy_rate", "improver/meta_talk_rate")),
    ("Length of rewrites", "tokens of rewrites as a multiple of the responses'; the model may learn length", ("improver/length_ratio",)),
    ("Log-probabilities", "nats a text; rewrites and responses falling together come before a collapse", ("logps/chosen", "logps/rejected")),
    ("Responses", "share of repeated word triples, and of answers that end by themselves", ("completions/repetition", "completions/eos_share")),
)
"""The same for the section about the improver's health."""

VERDICTS: Final = ("brake", "rolled_back", "improver_gate", "improver_check")
"""Events that judge the improver or the stage."""

FAULTS: Final = re.compile(
    r"attempt|lost|fault|restart|replaced|dead|hung|crash|quarantin|damaged|rebuilt|resum|bad_step|stop|fail|poison", re.IGNORECASE
)
"""Kinds of events that begin or end an attempt, or tell what went wrong in between."""


@dataclass(frozen=True, slots=True)
class Example:
    """A pair as the page shows it; texts are harmless and cut."""

    title: str
    facts: str
    prompt: str
    reference: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class ReportTable:
    """A table of texts."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Page:
    """Everything the template shows."""

    name: str
    facts: ReportTable
    evaluation: ReportTable | None = None
    charts: Mapping[str, tuple[Chart, ...]] = field(default_factory=dict)
    health: Mapping[str, tuple[Chart, ...]] = field(default_factory=dict)
    verdicts: ReportTable | None = None
    states: ReportTable | None = None
    refusals: ReportTable | None = None
    examples: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)
    versions: ReportTable | None = None
    faults: ReportTable | None = None
    losses: ReportTable | None = None
    useful: str = ""
    chaos: ReportTable | None = None
    config: str = ""


def write_report(directory: RunDirectory, target: Path | None = None) -> Path:
    """Write the page, whole or not at all, and return where it lies. Raises EnvironmentProblem when it cannot be written."""
    target = target or directory.report_file
    page = render(read_page(directory))
    draft = target.with_name(f".{target.name}.tmp")
    try:
        draft.write_text(page, encoding="utf-8", errors="replace")
        os.replace(draft, target)
    except OSError as problem:
        raise EnvironmentProblem(f"cannot write {target} ({problem.strerror}); free space there or give another --to") from problem
    return target


def render(page: Page) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(autoescape=True, finalize=_harmless, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("sgpo_dist.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", source, re.DOTALL)
    digest = hashlib.sha256((style[1] if style else "").encode()).digest()
    frame = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM}
    return environment.from_string(source).render(page=page, frame=frame, style_hash=f"sha256-{base64.b64encode(digest).decode()}")


def _harmless(value: Any) -> Any:
    """Every text that the template shows, names of columns and events too; what macros made is through here already."""
    return terminal_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def read_page(directory: RunDirectory) -> Page:
    """Gather what there is."""
    metrics, events = read_metrics(directory.metrics_file), read_events(directory.events_file)
    config = directory.config_file.read_text(encoding="utf-8", errors="replace") if directory.config_file.is_file() else ""
    has_pairs = directory.database.is_file()
    pairs = read_samples(directory.database) if has_pairs else []
    losses = summarise(read_marks(directory.events_file, directory.metrics_file))
    return Page(
        name=directory.path.name,
        facts=_facts(directory, config, metrics, events),
        evaluation=_evaluation(directory.evaluation_file),
        charts=_charts(metrics, CURVES),
        health=_charts(metrics, HEALTH_CURVES),
        verdicts=_listed([event for event in events if event.kind in VERDICTS]),
        states=_counts(state_counts(directory.database), "prompts") if has_pairs else None,
        refusals=_counts(refusal_counts(directory.database), "prompts") if has_pairs else None,
        examples=_examples(pairs),
        versions=_versions(events),
        faults=_listed([event for event in events if FAULTS.search(event.kind)]),
        losses=_losses(losses),
        useful=_useful(losses),
        chaos=_chaos(directory.path / CHAOS_NAME),
        config=config,
    )


def _facts(directory: RunDirectory, config: str, metrics: Sequence[MetricRow], events: Sequence[EventRow]) -> ReportTable:
    times = [row.time for row in metrics] + [event.time for event in events]
    rows = [("run", directory.run_id), ("attempts", str(directory.incarnation))]
    rows += _config_facts(directory.config_file, config)
    if times:
        rows += [("begun", _clock(min(times))), ("last sign of life", _clock(max(times))), ("at work", _worked(events))]
    rows.append(("steps", ", ".join(f"{stage} {count}" for stage, count in _steps(metrics).items()) or "none yet"))
    return ReportTable(("", ""), tuple((name, one_line(value)) for name, value in rows if value))


def _config_facts(path: Path, config: str) -> list[tuple[str, str]]:
    """What was asked for; nothing when there is no configuration. Raises RunFailed for one that ``train`` did not write."""
    with read_whole(path):
        tree = yaml.safe_load(config) if config else None
        if not tree:
            return []
        model, data = str(tree["model"]["model_name_or_path"]), str(tree["data"]["path"])
        return [("model", model), ("stages", ", ".join(tree["stages"])), ("seed", str(tree["seed"])), ("data", data)]


def _steps(metrics: Sequence[MetricRow]) -> dict[str, int]:
    steps: dict[str, int] = {}
    for row in metrics:
        steps[row.stage] = max(row.step, steps.get(row.stage, 0))
    return steps


def _worked(events: Sequence[EventRow]) -> str:
    """Time between each attempt's beginning and its last event, summed."""
    total, begun, last = 0.0, None, 0.0
    for event in events:
        if event.kind == "attempt":
            total += last - begun if begun is not None else 0.0
            begun = event.time
        last = event.time
    return f"{(total + (last - begun if begun is not None else 0.0)) / 60:.1f} min" if begun is not None else ""


def _evaluation(path: Path) -> ReportTable | None:
    if not path.is_file():
        return None
    with read_whole(path, EVALUATE_AGAIN):
        header, *rows = table([row_from(tree) for tree in json.loads(path.read_text(encoding="utf-8"))["rows"]])
    return ReportTable(tuple(header), tuple(tuple(one_line(cell) for cell in row) for row in rows)) if rows else None


def _charts(metrics: Sequence[MetricRow], curves: Sequence[Curve]) -> dict[str, tuple[Chart, ...]]:
    """The charts of each stage that has any."""
    found = {}
    for stage in dict.fromkeys(row.stage for row in metrics):
        rows = sorted((row for row in metrics if row.stage == stage), key=lambda row: row.step)
        drawn = (chart(title, about, [_series(name, rows) for name in names]) for title, about, names in curves)
        found[stage] = tuple(one for one in drawn if one is not None)
    return {stage: charts for stage, charts in found.items() if charts}


def _series(name: str, rows: Sequence[MetricRow]) -> Series:
    return Series(name, tuple((float(row.step), row.metrics[name]) for row in rows if name in row.metrics))


def _counts(counts: Mapping[str, Mapping[str, int]], what: str) -> ReportTable | None:
    rows = [
        (stage, name, str(count), f"{count / max(1, sum(row.values())):.0%}")
        for stage, row in counts.items()
        for name, count in sorted(row.items(), key=lambda item: -item[1])
    ]
    return ReportTable(("stage", "", what, "share"), tuple(rows)) if rows else None


def _examples(pairs: Sequence[Sample]) -> dict[str, tuple[Example, ...]]:
    """Of each stage the pairs that changed most and those that changed least (but did)."""
    found = {}
    for stage in dict.fromkeys(sample.stage for sample in pairs):
        ranked = sorted((sample for sample in pairs if sample.stage == stage), key=lambda sample: sample.changed)
        least = ranked[: EXAMPLES // 2]
        most = [sample for sample in reversed(ranked[-EXAMPLES // 2 :]) if sample not in least]
        found[stage] = tuple(
            [_example(sample, "changed most") for sample in most] + [_example(sample, "changed least") for sample in least]
        )
    return found


def _example(sample: Sample, title: str) -> Example:
    step = f", step {sample.step}" if sample.step else ""
    measures = f"{sample.changed:.0%} of the words changed, length x{sample.growth:.2f}"
    facts = f"{measures}, version {sample.version}, {sample.state}{step}, {sample.source}"
    segments = word_diff(_cut(sample.response), _cut(sample.refinement))
    return Example(title, facts, _cut(sample.prompt), _cut(sample.reference), tuple(segments))


def _cut(text: str | None) -> str:
    clean = terminal_text(text or "")
    return clean if len(clean) <= LONGEST_TEXT else clean[:LONGEST_TEXT] + " […]"


def _versions(events: Sequence[EventRow]) -> ReportTable | None:
    rows = [event for event in events if event.kind == "version_published"]
    header = ("version", "when", "workers", "probe gap (nats)", "engines paused (s)", "in all (s)", "checksum")
    return _shortened(header, [_version_row(event) for event in rows])


def _version_row(event: EventRow) -> tuple[str, ...]:
    numbers = (_value(event.fields.get(name)) for name in ("probe_gap", "stall_s", "total_s"))
    return (
        _value(event.fields.get("version")),
        _clock(event.time),
        _value(event.fields.get("workers")),
        *numbers,
        str(event.fields.get("checksum", ""))[:12],
    )


def _listed(events: Sequence[EventRow]) -> ReportTable | None:
    return _shortened(("when", "what", "details"), [(_clock(event.time), event.kind, _fields(event)) for event in events])


def _losses(summary: Summary) -> ReportTable | None:
    header, *rows = [tuple(one_line(cell) for cell in line) for line in fault_lines(summary)]
    return _shortened(header, rows)


def _useful(summary: Summary) -> str:
    """The useful time in a sentence; empty for a run that lost nothing."""
    if not summary.faults:
        return ""
    parts = f"{summary.away_s:.0f} s while a part without which nothing goes on was away, {summary.repeated_s:.0f} s for work that was done again"
    return f"Useful time (ETTR): {summary.ettr:.1%} of {summary.wall_s:.0f} s. Lost: {parts} ({summary.repeated_steps} steps)."


def _chaos(path: Path) -> ReportTable | None:
    """Every fault that ``sgpo-dist chaos`` did, as its file tells."""
    with read_whole(path):
        faults = json.loads(path.read_text(encoding="utf-8")).get("faults", []) if path.is_file() else []
        rows = [tuple(one_line(_value(fault.get(name))) for name in CHAOS_COLUMNS) for fault in faults]
    return ReportTable(("", "fault", "hit", "what happened", "recovered after (s)"), tuple(rows)) if rows else None


def _fields(event: EventRow) -> str:
    return one_line(
        ", ".join(f"{name} {_value(value)}" for name, value in event.fields.items() if name != "run_id" and value not in ("", None))
    )


def _shortened(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> ReportTable | None:
    """At most LONGEST_TABLE rows: the first and last halves, and a row that tells how many are left out."""
    if not rows:
        return None
    if len(rows) > LONGEST_TABLE:
        half = LONGEST_TABLE // 2
        gap = (f"… {len(rows) - 2 * half} more …", *("" for _ in header[1:]))
        rows = [*rows[:half], gap, *rows[-half:]]
    return ReportTable(header, tuple(rows))


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)) + " UTC"
