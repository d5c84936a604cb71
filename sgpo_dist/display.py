"""What a person sees while a run goes: one live panel on a terminal, or one plain line a step elsewhere.

The recorder owns one display and feeds it ``Status`` values; nothing else writes to the screen. Left out: what is kept in files (recorder).
All text is made harmless here, since refusal details and file names come from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sgpo_dist.sanitize import one_line, terminal_text

REFRESHES_A_SECOND: Final = 4
PLAIN_PAUSE_S: Final = 10.0
"""Plain lines between steps are no more frequent than this."""


@dataclass(frozen=True, slots=True)
class Status:
    """One picture of the run; None = not known (yet) in this stage. ``waits`` says who waits for whom, ``doing`` what goes on now."""

    stage: str = ""
    step: int = 0
    total: int = 0
    doing: str = ""
    loss: float | None = None
    accuracy: float | None = None
    margin: float | None = None
    version: int | None = None
    staleness: float | None = None
    pairs: int | None = None
    pairs_per_s: float | None = None
    tokens_per_s: float | None = None
    workers: int | None = None
    win_rate: float | None = None
    copy_rate: float | None = None
    waits: str = ""
    gate: Mapping[str, int] = field(default_factory=dict)
    eta_s: float | None = None


class Display(Protocol):
    """Where the recorder shows things. No call blocks on the terminal's user."""

    def show(self, status: Status) -> None:
        """The picture changed."""

    def step(self, status: Status) -> None:
        """A step ended with this picture."""

    def message(self, text: str) -> None:
        """One line that stays."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def open_display(
    kind: Literal["auto", "rich", "plain", "off"], title: str, stages: tuple[str, ...], console: Console, clock: Callable[[], float]
) -> Display:
    """The display of ``kind``; auto is the panel on a terminal and plain lines otherwise. ``clock`` gives monotonic seconds."""
    if kind == "rich" or (kind == "auto" and console.is_terminal and not console.is_dumb_terminal):
        return RichDisplay(console, title, stages)
    return SilentDisplay(console) if kind == "off" else PlainDisplay(console, clock)


class SilentDisplay:
    """Messages only."""

    def __init__(self, console: Console) -> None:
        """Messages go to ``console``."""
        self._console = console

    def show(self, status: Status) -> None:
        """Nothing."""

    def step(self, status: Status) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """One line."""
        _say(self._console, text)

    def close(self) -> None:
        """Nothing to tidy."""


class PlainDisplay:
    """One line a step, and a line when what goes on changes; for files, pipes and job logs."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        """``clock`` gives monotonic seconds."""
        self._console = console
        self._clock = clock
        self._said = ""
        self._said_at = float("-inf")

    def show(self, status: Status) -> None:
        """A line when ``doing`` changed: at once for another task (its first word), else after a pause."""
        line = f"{status.stage or 'run'}: {status.doing}"
        new_task = line.split(" ")[:2] != self._said.split(" ")[:2]
        if status.doing and line != self._said and (new_task or self._clock() - self._said_at >= PLAIN_PAUSE_S):
            self._said, self._said_at = line, self._clock()
            _say(self._console, line)

    def step(self, status: Status) -> None:
        """The step's line."""
        _say(self._console, step_line(status))

    def message(self, text: str) -> None:
        """One line."""
        _say(self._console, text)

    def close(self) -> None:
        """Nothing to tidy."""


class RichDisplay:
    """One panel that is redrawn in place; messages scroll above it."""

    def __init__(self, console: Console, title: str, stages: tuple[str, ...]) -> None:
        """Starts drawing at once."""
        self._console = console
        self._title = title
        self._stages = stages
        self._status = Status(doing="starting")
        self._live = Live(get_renderable=self._panel, console=console, refresh_per_second=REFRESHES_A_SECOND)
        self._live.start()

    def show(self, status: Status) -> None:
        """Drawn at the next refresh."""
        self._status = status

    def step(self, status: Status) -> None:
        """Drawn at the next refresh."""
        self._status = status

    def message(self, text: str) -> None:
        """One line above the panel."""
        _say(self._console, text)

    def close(self) -> None:
        """The last picture stays, drawing ends."""
        self._live.stop()

    def _panel(self) -> RenderableType:
        return panel(self._status, self._title, self._stages)


def step_line(status: Status) -> str:
    """A step as one plain line: only what is known."""
    parts = [f"{status.stage} {status.step}/{status.total}" if status.total else f"{status.stage} {status.step}"]
    parts += [f"{name} {value}" for name, value in figures(status)]
    return "  ".join([*parts, *(text for text in (_health_line(status), status.waits) if text)])


def figures(status: Status) -> list[tuple[str, str]]:
    """The known figures with their names, in reading order."""
    known: list[tuple[str, float | None, str]] = [
        ("loss", status.loss, ".4f"),
        ("accuracy", status.accuracy, ".2f"),
        ("margin", status.margin, "+.3f"),
        ("version", status.version, "d"),
        ("staleness", status.staleness, ".1f"),
        ("pairs/s", status.pairs_per_s, ".2f"),
        ("tokens/s", status.tokens_per_s, ",.0f"),
    ]
    return [(name, format(value, form)) for name, value, form in known if value is not None]


def panel(status: Status, title: str, stages: tuple[str, ...]) -> Panel:
    """The live picture."""
    rows: list[RenderableType] = [_stage_line(status.stage, stages), _progress(status), _figure_table(status)]
    rows += [
        Text(text, style="dim", overflow="ellipsis", no_wrap=True)
        for text in (_health_line(status), _gate_line(status), status.waits, one_line(status.doing))
        if text
    ]
    return Panel(Group(*rows), title=f"sgpo-dist · {title}", title_align="left", border_style="cyan", padding=(0, 1))


def _stage_line(current: str, stages: tuple[str, ...]) -> Text:
    line = Text()
    passed = current in stages
    for name in stages:
        passed = passed and name != current
        mark, style = ("✓", "green") if passed else ("▶", "bold cyan") if name == current else ("·", "dim")
        line.append(f"{mark} {name}   ", style=style)
    return line


def _progress(status: Status) -> Table:
    row = Table.grid(expand=True, padding=(0, 1))
    row.add_column(ratio=1)
    row.add_column(justify="right", no_wrap=True)
    label = f"step {status.step}/{status.total}" if status.total else f"step {status.step}"
    if status.eta_s is not None:
        label += f"  about {duration(status.eta_s)} left"
    row.add_row(ProgressBar(total=max(1, status.total), completed=status.step), label)
    return row


def _figure_table(status: Status) -> Table:
    shown = figures(status)
    if status.pairs is not None:
        shown.append(("pairs", f"{status.pairs:,}"))
    if status.workers is not None:
        shown.append(("workers", str(status.workers)))
    table = Table.grid(padding=(0, 3))
    names, values = Text.styled, Text
    for _ in shown:
        table.add_column(justify="right")
    table.add_row(*(names(name, "dim") for name, _ in shown))
    table.add_row(*(values(value, style="bold") for _, value in shown))
    return table


def _health_line(status: Status) -> str:
    """The improver in few words; a narrow terminal cuts it, since it stands on a line of its own."""
    known = (("win rate", status.win_rate), ("copies", status.copy_rate))
    said = ", ".join(f"{name} {value:.0%}" for name, value in known if value is not None)
    return f"improver: {said}" if said else ""


def _gate_line(status: Status) -> str:
    tally = ", ".join(f"{reason} {count}" for reason, count in sorted(status.gate.items(), key=lambda item: -item[1]) if count)
    return f"refused: {tally}" if tally else ""


def duration(seconds: float) -> str:
    """Seconds as people say them: 40 s, 12 min, 3.5 h, 4 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"


def _say(console: Console, text: str) -> None:
    console.print(" ".join(terminal_text(text).splitlines()), markup=False, highlight=False, soft_wrap=True)
