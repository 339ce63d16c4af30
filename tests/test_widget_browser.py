"""The widget in JupyterLab, in a real browser: what a reader does with it, and nothing else."""

import json
from pathlib import Path

import pytest
from chromium import launch, shot
from hostile import HOSTILE
from lab_server import serve_lab

from nanochat.ui import MARKDOWN_TAGS

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("jupyterlab", reason="jupyterlab is not installed")

expect = sync_api.expect
ROOT = Path(__file__).resolve().parent.parent
BOX, TURN = ".nc-composer textarea", ".jp-OutputArea .nc-turn"
CELL = """\
from hostile import HOSTILE
from parrot import Gated, Parrot
from nanochat.ui import ChatWidget
TOOL = "It is <|python_start|>12*3<|python_end|><|output_start|>36<|output_end|>36."
EVIL = "<script>window.hit = 1</script><img src=http://example.com/a.png onerror='window.hit = 2'>"
hostile_talk = []
for text in HOSTILE.values():
    parts = [{"type": kind, "text": text} for kind in ("python", "python_output", "text")]
    hostile_talk += [{"role": "user", "content": text}, {"role": "assistant", "content": parts}]
engines = {"base": Parrot(delay=0.02), "calc": Parrot(reply=TOOL), "evil": Parrot(reply=EVIL)}
failing = Gated(free=1, fail_after=2)
widget = ChatWidget(engines)
widget"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab server on a notebook with one cell; yields its address."""
    folder = tmp_path_factory.mktemp("lab") / "notebooks"
    folder.mkdir()
    cell = {"cell_type": "code", "id": "chat", "source": CELL, "metadata": {}, "outputs": []}
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {"cells": [{**cell, "execution_count": None}], "nbformat": 4, "nbformat_minor": 5}
    (folder / "chat.ipynb").write_text(json.dumps({**notebook, "metadata": {"kernelspec": spec}}))
    with serve_lab(folder, ROOT, ROOT / "tests") as (url, token):
        yield f"{url}/doc/tree/chat.ipynb?token={token}"


@pytest.fixture(scope="module")
def page(lab):
    """The notebook with its cell run; ends by checking what must never be."""
    with sync_api.sync_playwright() as playwright:
        browser = launch(playwright)
        page = browser.new_page(viewport={"width": 1000, "height": 1000})
        page.set_default_timeout(60_000)
        problems, requests = [], []
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(lab)
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.evaluate(
            """async () => {
            const context = window.jupyterapp.shell.currentWidget.sessionContext;
            await context.ready;
            await context.session.kernel.info;
            await window.jupyterapp.commands.execute("notebook:run-all-cells");
            }"""
        )
        page.wait_for_selector(BOX)
        yield page
        browser.close()
    own = lab.split("/doc")[0]
    schemes = (own, own.replace("http", "ws"), "data:", "blob:")
    assert [r for r in requests if not r.startswith(schemes)] == []
    assert problems == []


@pytest.fixture(autouse=True)
def fresh(page):
    button(page, "Clear").click()
    expect(page.locator(TURN)).to_have_count(0)


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def say(page, text):
    page.fill(BOX, text)
    page.press(BOX, "Enter")


def done(page, *texts):
    """Wait until these are the bubbles and nothing more is written."""
    expect(page.locator(TURN)).to_have_text(list(texts), use_inner_text=True)
    expect(button(page, "Stop")).to_be_disabled()


def kernel(page, expression):
    """What a Python expression is in the notebook's kernel, as text."""
    return page.evaluate(
        """async (code) => {
        const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
        const asked = kernel.requestExecute({ code: "", user_expressions: { it: code } });
        return (await asked.done).content.user_expressions.it.data["text/plain"];
        }""",
        expression,
    )


def choose(page, model):
    page.locator(".jp-OutputArea select").select_option(model)


def dark(page, theme):
    page.evaluate(
        f"window.jupyterapp.commands.execute('apputils:change-theme', {{theme: {theme!r}}})"
    )
    page.wait_for_timeout(300)


def test_type_stream_edit_regenerate(page):
    page.fill(BOX, "one")
    page.press(BOX, "Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value(BOX) == "one\ntwo"
    page.press(BOX, "Enter")
    done(page, "one\ntwo", "You said: one\ntwo")
    expect(page.locator(BOX)).to_have_value("")
    expect(page.locator(".nc-composer [role=log]")).to_have_text("You said: one two")
    say(page, "three")
    done(page, "one\ntwo", "You said: one\ntwo", "three", "You said: three")
    button(page, "Edit").first.click()
    expect(page.locator(BOX)).to_have_value("one\ntwo")
    say(page, "ONE")
    done(page, "ONE", "You said: ONE")
    button(page, "Regenerate").click()
    done(page, "ONE", "You said: ONE")
    assert kernel(page, "len(engines['base'].calls)") == "4"


def test_a_failed_question_goes_back_above_what_is_being_typed(page):
    kernel(page, "widget.engines.update(base=failing)")
    say(page, "one")
    expect(page.locator(BOX)).to_have_value("")
    page.keyboard.type("two")  # the kernel does not know of it yet
    kernel(page, "failing.gate.set()")
    expect(page.get_by_role("alert")).to_contain_text("engine failed")
    expect(page.locator(BOX)).to_have_value("one\ntwo")
    done(page)
    kernel(page, "widget.engines.update(base=engines['base'])")
    page.press(BOX, "Enter")
    done(page, "one\ntwo", "You said: one\ntwo")
    expect(page.locator(BOX)).to_have_value("")


@pytest.mark.parametrize("how", ["click", "Escape"])
def test_stop(page, how):
    kernel(page, "setattr(engines['base'], 'delay', 0.2)")  # by itself it would take a minute
    say(page, "the quick brown fox " * 20)
    expect(page.locator(TURN).nth(1)).to_contain_text("You said")  # while it is being written
    button(page, "Stop").click() if how == "click" else page.press(BOX, "Escape")
    expect(button(page, "Stop")).to_be_disabled()
    expect(page.get_by_text("stopped")).to_be_visible()
    kernel(page, "setattr(engines['base'], 'delay', 0.02)")


def test_settings_and_models_reach_the_engine(page):
    button(page, "Settings").click()
    page.get_by_label("Temperature", exact=True).fill("0.3")
    page.get_by_label("Temperature", exact=True).press("Tab")
    page.get_by_label("System", exact=True).fill("quick")
    page.get_by_label("System", exact=True).press("Tab")
    say(page, "hello")
    done(page, "hello", "You said: quick hello")  # the parrot repeats the system prompt too
    assert kernel(page, "engines['base'].calls[-1]['temperature']") == "0.3"
    button(page, "Clear").click()
    page.get_by_label("System", exact=True).fill("")
    choose(page, "calc")
    say(page, "12*3?")
    done(page, "12*3?", "It is\nused the calculator\n36.")
    page.locator("summary").click()
    expect(page.locator("details pre")).to_have_text("12*3\n= 36")
    page.get_by_label("Show token probabilities").check()
    expect(page.locator(".nc-token").first).to_be_visible()
    assert page.locator(".nc-token").first.get_attribute("title") == "p = 0.779"
    shot(page, "widget_settings")
    page.get_by_label("Show token probabilities").uncheck()
    button(page, "Settings").click()
    choose(page, "base")


def test_hostile_text_in_every_place_is_only_text(page):
    kernel(page, "widget.session.messages.extend(hostile_talk)")
    kernel(page, "widget.draw()")
    expect(page.locator(TURN)).to_have_count(2 * len(HOSTILE))
    page.wait_for_timeout(200)
    assert page.evaluate("window.hit === undefined")
    tags = set(page.locator(TURN + " *").evaluate_all("nodes => nodes.map(n => n.localName)"))
    assert tags <= {*MARKDOWN_TAGS, "details", "summary"}


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_compare_hostile_and_calm_models_in_both_themes(page, theme):
    dark(page, theme)
    say(page, "hello")
    done(page, "hello", "You said: hello")
    button(page, "Compare").click()
    expect(page.locator(".nc-column > b")).to_have_text(["base", "calc", "evil"])
    expect(page.locator(".nc-column .nc-turn").nth(2)).to_contain_text("<script>window.hit")
    expect(page.locator(".nc-column .nc-turn").nth(0)).to_have_text("You said: hello")
    expect(button(page, "Stop")).to_be_disabled()
    assert page.evaluate("window.hit === undefined")
    assert page.locator(f"{TURN} img, {TURN} script").count() == 0
    shot(page, "widget_" + theme.split()[-1].lower())


def test_keyboard_alone_and_names_for_screen_readers(page):
    page.focus(BOX)
    page.keyboard.type("hello")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")  # Send is the next stop of the Tab key
    done(page, "hello", "You said: hello")
    nameless = page.evaluate(
        """[...document.querySelectorAll(".jp-OutputArea :is(button, input, select, textarea," +
        "[tabindex='0'])")].filter((n) => n.offsetParent && !(n.innerText.trim() || n.ariaLabel ||
        n.title || (n.labels && n.labels.length))).map((n) => n.outerHTML)"""
    )
    assert nameless == []


def test_reload_keeps_the_talk(page):
    say(page, "hello")
    done(page, "hello", "You said: hello")
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_timeout(300)
    page.reload()
    page.wait_for_selector(BOX)
    done(page, "hello", "You said: hello")
    say(page, "still there?")
    done(page, "hello", "You said: hello", "still there?", "You said: still there?")
