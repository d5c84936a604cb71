"""The report shows what there is, escapes what is hostile, and fetches nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fabricated_run import NoScreen, fabricate, run_config

from sgpo_dist.recorder import Recorder
from sgpo_dist.report.chart import Series, chart, ticks
from sgpo_dist.report.model_card import model_card
from sgpo_dist.report.report import read_page, write_report
from sgpo_dist.report.samples import ordered, read_samples, refusal_counts, state_counts
from sgpo_dist.report.word_diff import Change, plain_diff, word_diff
from sgpo_dist.run_directory import RunDirectory

VOID = {"meta", "line", "polyline", "circle", "br"}


class Balance(HTMLParser):
    """Fails when tags do not match, and keeps what a browser would act on."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.risky: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.risky += [
            f"{tag} {name}" for name, value in attrs if name in ("src", "style") or name.startswith("on") or "http:" in (value or "")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


def parsed(page: str) -> Balance:
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    return balance


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    directory = fabricate(tmp_path_factory.mktemp("runs"))
    recorder = Recorder(directory.metrics_file, directory.events_file, NoScreen(), wall=lambda: 1_700_000_001.0)
    for step in (1, 2):
        known = {"loss": 0.5, "version": step, "logps/chosen": -30.0 - step / 2, "logps/rejected": -40.0 - 2 * step}
        health = {"improver/edit_ratio": 0.2, "improver/copy_rate": 0.1, "improver/meta_talk_rate": 0.0, "improver/length_ratio": 1.1}
        recorder.log("preference", step, known | health | ({"improver/win_rate": 0.6} if step == 2 else {}))
    recorder.event("improver_gate", source="chat", better=0.6, worse=0.2, passed=True)
    recorder.event("brake", action="rollback", step=2, reason="chosen texts lost 3.1 nats <b>")
    recorder.event("rolled_back", stage="preference", from_step=2, to_step=1, reason="too long")
    recorder.close()
    return directory


@pytest.fixture(scope="module")
def page(run_directory: RunDirectory) -> str:
    return write_report(run_directory).read_text(encoding="utf-8")


def test_every_section_is_there(page: str) -> None:
    for name in ("run", "evaluation", "curves", "health", "gate", "examples", "versions", "faults", "config"):
        assert f'<h2 id="{name}">' in page
        assert name == "run" or f'href="#{name}"' in page
    assert "0.750 (+0.250 ± 0.000)" in page
    assert "cccccccccccc" in page
    assert "identical" in page


def test_health_shows_the_improvers_curves_and_every_verdict(page: str) -> None:
    health = page.partition('<h2 id="health">')[2].partition("<h2 ")[0]
    for title in ("Win rate", "Change", "Copies and talk", "Length of rewrites", "Log-probabilities"):
        assert f"<b>{title}</b>" in health, title
    assert health.count("<figure>") == 5  # nothing was measured for the sixth
    assert "logps/chosen: -31" in health
    assert "logps/rejected: -44" in health  # a line of its own in the same chart
    assert "improver/win_rate: 0.6" in health
    assert "action rollback, step 2, reason chosen texts lost 3.1 nats &lt;b&gt;" in health
    assert "stage preference, from_step 2, to_step 1, reason too long" in health
    assert "source chat, better 0.6, worse 0.2, passed True" in health
    assert "worker_lost" not in health
    assert "Log-probabilities" not in page.partition('<h2 id="curves">')[2].partition("<h2 ")[0]


def test_a_stage_without_any_such_metric_has_no_health(tmp_path: Path) -> None:
    with RunDirectory.claim(run_config(tmp_path)) as directory:
        directory.metrics_file.write_text('{"time": 1, "stage": "sft", "step": 1, "loss": 3}\n')
        page = read_page(directory)
    assert list(page.charts) == ["sft"]
    assert (page.health, page.verdicts) == ({}, None)


def test_the_page_is_well_formed_without_scripts_or_anything_fetched(page: str) -> None:
    balance = parsed(page)
    assert balance.risky == []
    assert not {"script", "img", "iframe", "link", "object", "form"} & set(balance.tags)


def test_the_policy_allows_only_the_pages_own_style(page: str) -> None:
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert f"default-src 'none'; style-src 'sha256-{digest}'" in policy[1].replace("&#39;", "'").replace("&#43;", "+").replace(
        "&#x2B;", "+"
    )


def test_hostile_text_is_escaped_and_harmless(page: str) -> None:
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;sat&lt;/b&gt;" in page
    assert "\x1b" not in page


def test_the_diff_is_marked(page: str) -> None:
    assert "<del>teh</del><ins>the red</ins>" in page


def test_a_run_that_has_only_begun_still_has_a_page(tmp_path: Path) -> None:
    with RunDirectory.claim(run_config(tmp_path)) as directory:
        page = write_report(directory).read_text(encoding="utf-8")
    parsed(page)
    assert "none yet" in page
    assert 'id="examples"' not in page


def test_many_rows_are_shortened_in_the_middle(run_directory: RunDirectory) -> None:
    from sgpo_dist.report.report import _shortened

    table = _shortened(("n",), [(str(number),) for number in range(100)])
    assert table is not None
    assert len(table.rows) == 61
    assert table.rows[30] == ("… 40 more …",)
    assert read_page(run_directory).name == "demo"


def test_losses_and_the_faults_that_chaos_did_are_in_the_faults_section(tmp_path: Path) -> None:
    directory = fabricate(tmp_path)
    wall = iter((1_700_000_010.0, 1_700_000_030.0, 1_700_000_040.0))
    recorder = Recorder(directory.metrics_file, directory.events_file, NoScreen(), wall=lambda: next(wall))
    recorder.event("learner_lost", reason="hung <b>; its log: RuntimeError: 7", stage="preference", step=2)
    recorder.event("learner_rebuilt", seconds=20.0, stage="preference", step=1)
    recorder.log("preference", 2, {"loss": 0.5})
    recorder.close()
    faults = [
        {"number": number, "kind": "flip-checkpoint", "detail": f"step-{number}/<x>", "what": "fell back, and said so", "recovery_s": 41.25}
        for number in range(80)
    ]
    (directory.path / "chaos.json").write_text(json.dumps({"faults": faults}))
    page = write_report(directory).read_text(encoding="utf-8")
    parsed(page)
    section = page.partition('<h2 id="faults">')[2].partition("<h2 ")[0]
    assert "Useful time (ETTR): 25.0% of 40 s. Lost: 20 s" in section  # 10 to 30 away, 30 to 40 again; what was before took no time
    assert "10 s for work that was done again (1 steps)" in section
    assert "<td>learner</td><td>hung &lt;b&gt;</td><td>1</td><td>20.0 s</td><td>20.0 s</td>" in section
    assert section.count("<td>flip-checkpoint</td>") == 80  # every one
    assert "<td>step-79/&lt;x&gt;</td>" in section
    assert "Faults done by chaos" not in write_report(fabricate(tmp_path / "calm")).read_text(encoding="utf-8")


# ---- charts --------------------------------------------------------------------------------------------------------------------------


def test_ticks_are_round_and_enclose() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0.0, 0.5, 1.0])
    assert ticks(0.12, 0.69) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    assert ticks(3.0, 3.0)[0] < 3.0 < ticks(3.0, 3.0)[-1]
    assert ticks(0.0, 0.0) == pytest.approx([-1.0, -0.5, 0.0, 0.5, 1.0])


def test_points_land_where_they_should() -> None:
    made = chart("t", "", [Series("s", ((1.0, 0.0), (3.0, 1.0)))])
    assert made is not None
    assert made.lines[0].polylines == ("52.0,176.0 452.0,10.0",)  # left bottom to right top of the frame
    assert made.lines[0].last == "1"
    assert [tick.label for tick in made.x_ticks] == ["1", "2", "3"]


def test_a_nan_is_a_gap_and_a_lone_point_a_dot() -> None:
    made = chart("t", "", [Series("s", ((1.0, 0.0), (2.0, 1.0), (3.0, math.nan), (4.0, 0.5)))])
    assert made is not None
    assert len(made.lines[0].polylines) == 1
    assert len(made.lines[0].dots) == 1
    assert chart("t", "", [Series("s", ((1.0, math.nan),))]) is None


# ---- samples and diffs ---------------------------------------------------------------------------------------------------------------


def test_word_diff_spells_both_texts() -> None:
    old, new = "The cat sat on teh mat.", "The black cat sat on the mat!"
    segments = word_diff(old, new)
    assert "".join(one.text for one in segments if one.change is not Change.ADDED) == old
    assert "".join(one.text for one in segments if one.change is not Change.REMOVED) == new
    assert plain_diff(word_diff("a b c", "a x c")) == "a [-b-]{+x+} c"
    assert plain_diff(word_diff("", "new")) == "{+new+}"
    assert word_diff("", "") == []


def test_samples_come_from_the_ledger(run_directory: RunDirectory) -> None:
    pairs = read_samples(run_directory.database)
    assert [sample.prompt for sample in pairs] == [f"Question {i} [bold]?" for i in (0, 1, 2, 4, 5)]
    assert [sample.state for sample in pairs] == ["trained"] * 4 + ["ready"]
    assert [sample.step for sample in pairs] == [1, 1, 2, 2, None]
    assert read_samples(run_directory.database, "improver") == []
    (refusal,) = read_samples(run_directory.database, "preference", refused=True)
    assert (refusal.reason, refusal.detail, refusal.changed) == ("identical", "no change", 0.0)
    assert refusal_counts(run_directory.database) == {"preference": {"identical": 1}}
    assert state_counts(run_directory.database) == {"preference": {"trained": 4, "refused": 1, "ready": 1}}


def test_orders_of_samples(run_directory: RunDirectory) -> None:
    pairs = read_samples(run_directory.database)
    assert ordered(pairs, "longest-growth")[0].prompt == "Question 5 [bold]?"
    assert ordered(pairs, "least-changed")[0].prompt == "Question 0 [bold]?"
    assert ordered(pairs, "newest")[0].prompt == "Question 5 [bold]?"
    assert ordered(pairs, "prompt-order") == pairs


def test_the_model_card_tells_base_data_and_figures(run_directory: RunDirectory) -> None:
    card = model_card(run_directory)
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card
    assert "| chat | similarity | 0.500 | 0.750 (+0.250 ± 0.000) |" in card
    assert run_directory.run_id in card
