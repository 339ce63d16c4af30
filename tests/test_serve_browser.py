"""The served page in a real browser: Chromium, driven by Playwright."""

import json
import threading
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from chromium import launch, shot
from hostile import HOSTILE
from parrot import Gated, Parrot

pytest.importorskip("fastapi", reason="the extra `serve` (fastapi, uvicorn) is not installed")
pytest.importorskip("uvicorn", reason="the extra `serve` (fastapi, uvicorn) is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from nanochat.serve import background_server, create_app  # noqa: E402

EVIL = (
    "<script>window.hit = 1</script><img src='http://example.com/a.png' onerror='window.hit = 2'> "
    "![x](http://example.com/b.png) [y](javascript:window.hit=3) **bold** `x < 1`\n\n- one\n- two\n"
)


class Moody(Parrot):
    """Answers while it is `fine`, else waits for `gate` and fails, after `says` tokens."""

    def __init__(self):
        super().__init__()
        self.fine, self.says, self.gate = True, 0, threading.Event()

    def generate(self, ids, **options):
        answer = super().generate(ids, **options)
        if self.fine:
            yield from answer
            return
        yield from list(answer)[: self.says]
        assert self.gate.wait(60)
        raise RuntimeError("no mood")


TOOL = "It is <|python_start|>12*3<|python_end|><|output_start|>36<|output_end|>36."


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = launch(playwright)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """visit(engines, ...) serves them and opens the page; ends by checking what must never be."""
    opened = []

    def open_page(engines, scheme="light", token=None):
        server = background_server(create_app(engines, token=token))
        url = server.__enter__()
        page = browser.new_page(color_scheme=scheme, viewport={"width": 900, "height": 720})
        problems, requests = [], []
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url + (f"/#token={quote(token, safe='')}" if token else "/"))
        opened.append((server, url, page, problems, requests))
        return page

    yield open_page
    for server, url, page, problems, requests in opened:
        page.close()
        server.__exit__(None, None, None)
        assert problems == [], "console errors"
        assert all(r.startswith((url, "data:", "blob:")) for r in requests), requests


def say(page, text):
    page.fill("#box", text)
    page.press("#box", "Enter")


def until(page, condition, seconds=60):
    """Wait for a condition in JavaScript (the page's own policy forbids the driver's `eval`)."""
    end = time.perf_counter() + seconds
    while not page.evaluate(condition):
        assert time.perf_counter() < end, condition
        page.wait_for_timeout(10)


def done(page):
    until(page, "document.querySelector('#stop').disabled && !state.running")


def quiet(page, *engines, seconds=60):
    """Wait until no engine computes."""
    end = time.perf_counter() + seconds
    while any(engine.running for engine in engines):
        assert time.perf_counter() < end, "an engine goes on"
        page.wait_for_timeout(5)


def texts(page):
    return page.locator("article .bubble").all_inner_texts()


def test_send_stream_edit_regenerate_new(visit):
    engine = Gated(free=4)
    page = visit(engine)
    page.fill("#box", "one")
    page.press("#box", "Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#box") == "one\ntwo"
    page.press("#box", "Enter")
    until(page, "document.querySelectorAll('article').length === 2")
    until(page, "document.querySelectorAll('.bubble')[1].innerText.length > 3")
    assert not page.is_disabled("#stop")
    engine.gate.set()
    done(page)
    assert texts(page)[0] == "one\ntwo" and "You said: one" in texts(page)[1]
    say(page, "three")
    done(page)
    page.click("article.user >> nth=0 >> text=Edit")
    assert page.input_value("#box") == "one\ntwo"
    say(page, "ONE")
    done(page)
    assert texts(page) == ["ONE", "You said: ONE"]
    page.click("text=Regenerate")
    done(page)
    assert len(engine.calls) == 4 and texts(page) == ["ONE", "You said: ONE"]
    page.click("#new")
    assert texts(page) == []


def test_stop(visit):
    engine = Parrot(delay=0.02, times=1000)
    page = visit(engine)
    say(page, "the quick brown fox")
    until(page, "document.querySelectorAll('.bubble')[1].innerText.length > 20")
    page.click("#stop")
    done(page)
    quiet(page, engine)
    assert "stopped" in page.inner_text("article >> nth=1") and "You" in texts(page)[1]
    say(page, "again")
    page.keyboard.press("Escape")
    done(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_hostile_text_is_only_text(visit, scheme):
    page = visit({"nano": Parrot(reply=EVIL), "calc": Parrot(reply=TOOL)}, scheme)
    say(page, EVIL)
    done(page)
    answer = texts(page)[1]
    assert "<script>" in answer and "![x](http://example.com/b.png)" in answer
    assert page.evaluate("window.hit") is None
    assert page.locator("#talk img, #talk script, #talk a, #talk iframe").count() == 0
    assert page.locator("#talk strong").inner_text() == "bold"
    assert page.locator("#talk li").count() == 2
    page.select_option("#model", "calc")
    say(page, "What is 12*3?")
    done(page)
    assert page.locator("details").count() == 1 and not page.is_visible("details pre")
    page.click("summary")
    assert page.inner_text("details pre") == "12*3\n= 36"
    page.click("#more")
    shot(page, f"page_{scheme}")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


def test_every_hostile_text_in_every_place_is_only_text(visit, tmp_path):
    page = visit(Parrot())
    messages = []
    for text in HOSTILE.values():
        parts = [{"type": kind, "text": text} for kind in ("python", "python_output", "text")]
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": parts}]
    talk = {"format": "nanochat conversation", "system": EVIL, "messages": messages}
    (tmp_path / "talk.json").write_text(json.dumps(talk), encoding="utf-8")
    page.set_input_files("#file", tmp_path / "talk.json")
    until(page, f"document.querySelectorAll('article').length === {len(messages)}")
    page.wait_for_timeout(200)
    assert page.evaluate("window.hit") is None
    made = "[...new Set([...document.querySelectorAll('#talk *')].map(n => n.localName))].sort()"
    allowed = "article br button code details div em li ol p pre strong summary ul"
    assert set(page.evaluate(made)) <= set(allowed.split())
    seen = page.evaluate("[...document.querySelectorAll('.user .bubble')].map(n => n.textContent)")
    assert seen == list(HOSTILE.values())


def test_settings_reach_the_engine_and_survive_a_reload(visit):
    one, two = Parrot(), Parrot(reply="two")
    page = visit({"one": one, "two": two})
    page.click("#more")
    for name, value in dict(temperature="0.3", top_k="0", max_tokens="7", seed="11").items():
        page.fill("#" + name, value)
    page.fill("#system", "quick fox")
    page.select_option("#model", "two")
    say(page, "hello")
    done(page)
    call = two.calls[0]
    assert (call["temperature"], call["max_tokens"], call["seed"]) == (0.3, 7, 11)
    assert call["top_k"] is None
    assert "quick fox" in two.tokenizer.decode(call["ids"]) and not one.calls
    page.reload()
    until(page, "document.querySelectorAll('#model option').length === 2")
    assert texts(page) == ["hello", "two"] and page.input_value("#temperature") == "0.3"
    assert page.input_value("#model") == "two"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_compare_two_models_on_one_prompt(visit, scheme):
    page = visit({"slow": Parrot(delay=0.01), "calc": Parrot(reply=TOOL)}, scheme)
    until(page, "!document.querySelector('#compare').hidden")
    say(page, "12*3?")
    done(page)
    page.click("#compare")  # an empty box: the last question again
    done(page)
    assert page.locator(".column h2").all_inner_texts() == ["slow", "calc"]
    answers = page.locator(".column .bubble").all_inner_texts()
    assert answers[0] == "You said: 12*3?" and "used the calculator" in answers[1]
    assert texts(page)[:3] == ["12*3?", "You said: 12*3?", "12*3?"]
    page.click("#more")
    page.check("#shade")
    assert page.locator(".column .token").first.get_attribute("title") == "p = 0.779"
    assert page.locator(".token[title='written by the calculator']").count() == 2
    shot(page, f"page_compare_{scheme}")
    say(page, "next")
    done(page)
    assert page.locator(".column").count() == 0 and page.locator("article").count() == 4


def test_stop_ends_every_column(visit):
    engines = {name: Parrot(delay=0.01, times=1000) for name in ("one", "two", "three")}
    page = visit(engines)
    until(page, "!document.querySelector('#compare').hidden")
    page.fill("#box", "the quick brown fox")
    page.click("#compare")
    until(page, "[...document.querySelectorAll('.column .bubble')].every(b => b.innerText != '…')")
    page.keyboard.press("Escape")
    done(page)
    until(page, "document.querySelectorAll('.column').length === 3")
    quiet(page, *engines.values())
    assert page.get_by_text("stopped").count() == 3 and page.input_value("#box")


def test_save_and_load(visit, tmp_path):
    page = visit(Parrot(reply=TOOL))
    say(page, "12*3?")
    done(page)
    page.click("#more")
    with page.expect_download() as download:
        page.click("#save")
    saved = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert [p["type"] for p in saved["messages"][1]["content"]][1] == "python"
    page.click("#new")
    (tmp_path / "talk.json").write_text(json.dumps(saved), encoding="utf-8")
    page.set_input_files("#file", tmp_path / "talk.json")
    until(page, "document.querySelectorAll('article').length === 2")
    (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
    page.set_input_files("#file", tmp_path / "bad.json")
    until(page, "document.querySelector('#alert').innerText.includes('not a saved')")
    assert page.locator("article").count() == 2


def failed(page):
    done(page)
    until(page, "document.querySelector('#alert').innerText.includes('went wrong')")


def test_a_failed_question_goes_back_into_the_box(visit):
    engine = Moody()
    page = visit(engine)
    say(page, "one")
    done(page)
    engine.fine = False
    say(page, "two")
    until(page, "document.querySelectorAll('article').length === 4")
    page.fill("#box", "three")  # typed while the answer fails
    engine.gate.set()
    failed(page)
    assert page.input_value("#box") == "two\nthree" and texts(page) == ["one", "You said: one"]
    engine.fine = True
    page.press("#box", "Enter")
    done(page)
    assert texts(page)[2:] == ["two\nthree", "You said: two\nthree"]
    assert page.input_value("#box") == "" and page.inner_text("#alert") == ""


def test_what_has_come_of_a_new_answer_stays_when_it_fails(visit):
    engine = Moody()
    page = visit(engine)
    engine.fine, engine.says = False, 4
    engine.gate.set()
    say(page, "one")
    failed(page)
    assert len(texts(page)) == 2 and texts(page)[1].startswith("You")
    assert page.input_value("#box") == ""


@pytest.mark.parametrize("says", [0, 4])
def test_a_failed_regenerate_or_edit_costs_nothing(visit, says):
    engine = Moody()
    page = visit(engine)
    for text in ("one", "two"):
        say(page, text)
        done(page)
    before = texts(page)
    engine.fine, engine.says = False, says
    engine.gate.set()
    page.click("text=Regenerate")
    failed(page)
    assert texts(page) == before and page.input_value("#box") == ""
    page.click("article.user >> nth=0 >> text=Edit")
    say(page, "ONE")
    failed(page)
    assert texts(page) == before and page.input_value("#box") == "ONE"
    engine.fine = True
    page.press("#box", "Enter")  # it still replaces the first question
    done(page)
    assert texts(page) == ["ONE", "You said: ONE"]


def load(page, folder, *texts):
    """Load a file with a talk in which user and model take turns."""
    messages = [{"role": r, "content": t} for r, t in zip(("user", "assistant") * 9, texts)]
    talk = {"format": "nanochat conversation", "messages": messages}
    (folder / "talk.json").write_text(json.dumps(talk), encoding="utf-8")
    page.set_input_files("#file", folder / "talk.json")
    until(page, "document.querySelector('#file').value === ''")


def test_a_loaded_question_without_an_answer_goes_into_the_box(visit, tmp_path):
    page = visit(Parrot())
    load(page, tmp_path, "one", "first", "two")
    assert page.input_value("#box") == "two" and texts(page) == ["one", "first"]
    page.press("#box", "Enter")
    done(page)
    assert texts(page) == ["one", "first", "two", "You said: two"]


def test_loading_ends_an_edit(visit, tmp_path):
    page = visit(Parrot())
    say(page, "old")
    done(page)
    page.click("article.user >> text=Edit")
    load(page, tmp_path, "one", "first", "two", "second")
    assert texts(page) == ["one", "first", "two", "second"]
    assert "Editing" not in page.inner_text("#status")
    say(page, "three")
    done(page)
    assert texts(page) == ["one", "first", "two", "second", "three", "You said: three"]


@pytest.mark.parametrize("token", ["s3cret", "s3+c/r%41&e="])
def test_token_in_the_address_is_used_and_hidden(visit, token):
    page = visit(Parrot(), token=token)
    until(page, "document.querySelectorAll('#model option').length === 1")
    assert "s3" not in page.url
    say(page, "hello")
    done(page)
    assert texts(page) == ["hello", "You said: hello"]


def test_keyboard_alone_and_names_for_screen_readers(visit):
    page = visit(Parrot())
    assert page.evaluate("document.activeElement.id") == "box"
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    done(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "send"
    unnamed = page.evaluate(
        """[...document.querySelectorAll('button, input:not([hidden]), select, textarea')].filter(
        (n) => !(n.innerText || n.ariaLabel || (n.labels && n.labels.length))).length"""
    )
    assert unnamed == 0
    assert page.inner_text("#said[role=log]") == "You said: hello"  # once, when it is complete
    assert page.get_attribute("article >> nth=1", "aria-label") == "Model"
