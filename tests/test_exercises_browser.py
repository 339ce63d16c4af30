"""A newcomer's hour with sheet 03, in JupyterLab in a real browser: fail, ask, pass, see points."""

import json
import re
import shutil

import pytest
from chromium import launch, shot
from conftest import ROOT
from lab_server import serve_lab

from book.export import write_files
from book.learning import work
from book.manuscript import load_book
from book.sheets import sheet_files

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("jupyterlab", reason="jupyterlab is not installed")
expect = sync_api.expect

FIRST_TRY = """\
#| exercise id=03-rmsnorm points=2 minutes=10 level=1 answer=rms_norm
def rms_norm(x, eps=1e-6):
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)"""
SECOND_TRY = FIRST_TRY.replace("x = x.float()", "dtype, x = x.dtype, x.float()")
SECOND_TRY = SECOND_TRY.replace("return x * ", "return (x * ") + ").to(dtype)"


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A copy of the book whose work/ is a learner's, fresh from `python -m book work 03`."""
    root = tmp_path_factory.mktemp("course")
    for name in ("book", "nanochat", "exercises"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("*.ipynb"))
    shutil.copy(ROOT / "book.toml", root)
    book = load_book(root)
    write_files(book, sheet_files(book))
    work(book, ["03"])
    return root


class Notebook:
    """What a learner does with cells: find one by what it says, write into it, run it."""

    def __init__(self, page):
        self.page = page

    def cell(self, text):
        return self.page.locator(".jp-CodeCell").filter(has_text=text).first

    def write(self, text, source):
        self.cell(text).locator(".cm-content").click()
        self.page.keyboard.press("ControlOrMeta+a")
        self.page.keyboard.insert_text(source)

    def run(self, text):
        self.cell(text).locator(".cm-content").click()
        self.page.keyboard.press("Shift+Enter")
        return self.cell(text).locator(".jp-OutputArea-output")


def test_fail_read_a_hint_pass_and_see_the_points(course):
    with serve_lab(course / "work", course) as (url, token), sync_api.sync_playwright() as play:
        browser = launch(play)
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        page.set_default_timeout(60_000)
        page.goto(f"{url}/doc/tree/exercises/03_model.ipynb?token={token}")
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.evaluate(
            """async () => {
            const context = window.jupyterapp.shell.currentWidget.sessionContext;
            await context.ready;
            await context.session.kernel.info;
            }"""
        )
        sheet = Notebook(page)
        shot(page, "1-opened")
        sheet.run("#| given")
        sheet.run("from book.graded import")
        sheet.run("id=03-rmsnorm")
        told = sheet.run('check("03-rmsnorm"')
        expect(told).to_contain_text("03-rmsnorm: 0 of 2 points")
        expect(told).to_contain_text("not written yet")
        told.scroll_into_view_if_needed()
        shot(page, "2-not-written")

        sheet.write("id=03-rmsnorm", FIRST_TRY)
        sheet.run("id=03-rmsnorm")
        told = sheet.run('check("03-rmsnorm"')
        expect(told).to_contain_text(re.compile(r"03-rmsnorm: 1\.\d+ of 2 points"))
        expect(told.locator("tr").filter(has_text="keeps the dtype")).to_contain_text("\u2717")
        expect(told.locator("tr").filter(has_text="zeros")).to_contain_text("\u2713")
        told.scroll_into_view_if_needed()
        shot(page, "3-failed")

        sheet.write('check("03-rmsnorm"', 'hint("03-rmsnorm")')
        helped = sheet.run('hint("03-rmsnorm")')
        expect(helped).to_contain_text("hint 1 of 3")
        helped.scroll_into_view_if_needed()
        shot(page, "4-hint")

        sheet.write('hint("03-rmsnorm")', 'check("03-rmsnorm", rms_norm)')
        sheet.write("id=03-rmsnorm", SECOND_TRY)
        sheet.run("id=03-rmsnorm")
        told = sheet.run('check("03-rmsnorm"')
        expect(told).to_contain_text("03-rmsnorm: 2 of 2 points")
        assert told.locator("tr").filter(has_text="\u2717").count() == 0
        told.scroll_into_view_if_needed()
        shot(page, "5-passed")

        shown = sheet.run("progress()")
        expect(shown).to_contain_text("03 The model")
        row = shown.locator("tr").filter(has_text="03 The model")
        expect(row).to_contain_text("2 of ")
        assert 5 < row.locator("div div").bounding_box()["width"] < 100
        shown.last.scroll_into_view_if_needed()
        shot(page, "6-progress")
        browser.close()
    record = json.loads((course / "work" / "progress.json").read_text())
    assert record["03-rmsnorm"] == {"best": 2.0, "tries": 3, "hints": 1}
