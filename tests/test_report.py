"""nanochat.report: everything comes from the log, text is shown as text, the page stands alone."""

import base64
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings, strategies as st
from tiny_run import copy_of, finished_run, one_thread, tiny_recipe  # noqa: F401

from nanochat.common import format_seconds, read_metrics
from nanochat.recipe import MODELS, STAGES, Run, exchange
from nanochat.report import (
    METRICS,
    by_step,
    cost_table,
    exchange_rows,
    html_table,
    markdown_table,
    stage_table,
    write_report,
)

VOID = {"meta", "img", "br", "hr"}


class Page(HTMLParser):
    """A page read strictly: its tables as rows of text, its pictures, its headings."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.images, self.tags = [], [], [], set()
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = copy_of(finished_run(), tmp_path_factory.mktemp("report") / "tiny", *STAGES)
    exchange(run, "rl")
    return run


@pytest.fixture(scope="module")
def page(run):
    return Page(write_report(run)[1].read_text(encoding="utf-8"))


def test_the_page_stands_alone(run, page):
    assert len(page.images) == 1 + len(MODELS)
    for image in page.images:
        head, data = image["src"].split(",")
        assert head == "data:image/png;base64" and image["alt"]
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
    text = (run.directory / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|<link", text)
    assert str(run.directory) not in text


def test_the_table_of_stages_has_four_columns_and_one_of_chance(run, page):
    rows = stage_table(run)
    assert rows[0] == ["metric", "chance", *MODELS] and page.tables[0] == rows
    assert {row[0] for row in rows[1:]} <= set(METRICS.values()) and len(rows) > 8
    judged = {e["stage"]: e for e in read_metrics(run.log.path, "judged")}
    for row in rows[1:]:
        (key,) = [key for key, label in METRICS.items() if label == row[0]]
        assert row[2:] == [f"{judged[stage][key]:.3f}" for stage in MODELS]
    assert dict(zip(*list(zip(*rows))[:2]))["... multiple choice"] == "0.250"


def test_the_costs_are_those_of_the_log(run):
    rows = cost_table(run)
    assert [row[0] for row in rows] == ["stage", *STAGES, "all"]
    events = read_metrics(run.log.path, "stage")
    seconds = sum(e["seconds"] + e.get("judge_seconds", 0) for e in events)
    assert rows[-1][1] == format_seconds(seconds)
    assert rows[3][3] == "12" and rows[3][6].endswith(" GiB")


def test_everything_comes_from_the_log_and_the_recipe(run, tmp_path):
    first = [path.read_text(encoding="utf-8") for path in write_report(run)]
    bare = Run.open(run.recipe, tmp_path / "bare")
    (bare.directory / "metrics.jsonl").write_bytes(run.log.path.read_bytes())
    assert [path.read_text(encoding="utf-8") for path in write_report(bare)] == first


def test_a_gpu_in_the_log_has_a_rent(run, tmp_path):
    copy = copy_of(run, tmp_path / "gpu", *STAGES)
    (last,) = read_metrics(copy.log.path, "stage", stage="rl")
    last.update(processes=8, seconds=3600.0, machine={"GPUs": "NVIDIA H100 80GB HBM3"})
    copy.log.write(**last)
    name, dollars = cost_table(copy)[-1][:2]
    assert name == "rent" and 24.0 <= float(dollars[1:]) < 25.0


def test_a_report_of_a_run_that_has_not_begun(tmp_path):
    run = Run.open(tiny_recipe(), tmp_path / "new")
    page = Page(write_report(run)[1].read_text(encoding="utf-8"))
    assert page.tables[0] == [["metric", "chance"]] and page.images == []


def test_a_step_done_twice_counts_once(tmp_path):
    run = Run.open(tiny_recipe(), tmp_path / "broken")
    log = run.log.bind(stage="base")
    for step, loss in [(0, 5.0), (1, 4.0), (2, 3.5), (1, 4.1), (2, 3.1), (3, 3.0)]:
        log.write("step", step=step, loss=loss)
    events = by_step(run, "step", "base")
    assert [(e["step"], e["loss"]) for e in events] == [(0, 5.0), (1, 4.1), (2, 3.1), (3, 3.0)]


NASTY = '<script>alert("1")</script> | *not* `bold` [a](b) $x$\n\n# head & \\| <|bos|>'


def test_what_a_model_says_is_shown_as_text(run, tmp_path):
    copy = copy_of(run, tmp_path / "nasty", *STAGES)
    copy.log.write("exchange", stage="rl", question="Q?", reply=NASTY, calculator=[], right=False)
    markdown, html = (path.read_text(encoding="utf-8") for path in write_report(copy))
    page = Page(html)
    assert "script" not in page.tags
    (row,) = [row for row in page.tables[1] if row[0] == "Q?"]
    assert row[1] == exchange_rows(copy)[-1][1] == NASTY.replace("\n", " ")
    assert "<script" not in markdown and "\\*not\\*" in markdown and "\\`bold" in markdown
    (line,) = [line for line in markdown.splitlines() if line.startswith("| Q? ")]
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 5


cells = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)


@given(st.lists(st.lists(cells, min_size=2, max_size=2), min_size=1, max_size=4))
@settings(deadline=None)
def test_tables_keep_their_shape_whatever_the_text(rows):
    (table,) = Page(html_table(rows)).tables
    assert table == rows
    lines = markdown_table(rows).split("\n")
    assert len(lines) == len(rows) + 1 and lines[1] == "| --- | --- |"
    for line in lines:
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3 and "<" not in line
