"""nanochat.ui: sessions, safe Markdown, the widget without a browser, the terminal."""

import json
import threading
import time
from html.parser import HTMLParser

import pytest
from hostile import HOSTILE
from hypothesis import given, settings, strategies as st
from parrot import Gated, Parrot, Token, small_tokenizer, wait_for

from nanochat import ui
from nanochat.common import UserError
from nanochat.tokenizer import Tokenizer
from nanochat.ui import (
    MARKDOWN_TAGS,
    ChatSession,
    ChatSettings,
    ChatWidget,
    Piece,
    add_piece,
    bubble_html,
    check_messages,
    comparison_html,
    fit_context,
    load_session,
    markdown_html,
    read_pieces,
    save_session,
    terminal_chat,
    tokens_html,
    transcript_html,
)


def text_of(message):
    content = message["content"]
    return content if isinstance(content, str) else "".join(p["text"] for p in content)


def run(pieces):
    return list(pieces)


TOOL = "It is <|python_start|>12*3<|python_end|><|output_start|>36<|output_end|>36."


# ---- pieces and parts -------------------------------------------------------------------------


def test_tool_call_becomes_three_parts():
    session = ChatSession(Parrot(reply=TOOL), small_tokenizer())
    run(session.send("What is 12*3?"))
    parts = session.messages[-1]["content"]
    assert parts == [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "12*3"},
        {"type": "python_output", "text": "36"},
        {"type": "text", "text": "36."},
    ]
    assert session.finish_reason == "stop"
    assert any(piece.forced for piece in session.pieces)


def test_two_calls_in_a_row_stay_two_parts():
    reply = "<|python_start|>1+1<|python_end|><|python_start|>2+2<|python_end|>"
    session = ChatSession(Parrot(reply=reply), small_tokenizer())
    run(session.send("x"))
    assert [p["text"] for p in session.messages[-1]["content"]] == ["1+1", "2+2"]


def test_special_tokens_never_become_text():
    tokenizer = small_tokenizer()
    ids = [tokenizer.special(n) for n in ("user_start", "output_end", "python_end", "user_end")]
    parts = []
    for piece in read_pieces(iter([Token(i, "<|x|>", 0.0, False) for i in ids]), tokenizer):
        add_piece(parts, piece)
    assert parts == []


@given(
    st.lists(st.tuples(st.sampled_from(["text", "python", "python_output"]), st.text(max_size=4)))
)
def test_parts_keep_every_character(bits):
    parts = []
    for kind, text in bits:
        add_piece(parts, Piece(kind, text))
    assert "".join(p["text"] for p in parts) == "".join(text for _, text in bits)
    assert all(a["type"] != b["type"] for a, b in zip(parts, parts[1:]))


# ---- the session ------------------------------------------------------------------------------


def test_reply_grows_while_it_streams():
    session = ChatSession(Parrot(), small_tokenizer())
    lengths = []
    for _ in session.send("Hello there"):
        lengths.append(len(text_of(session.messages[-1])))
    assert lengths[0] == 0 and lengths == sorted(lengths)
    assert text_of(session.messages[-1]) == "You said: Hello there"


def test_edit_forgets_what_followed():
    session = ChatSession(Parrot(), small_tokenizer())
    for text in ("one", "two", "three"):
        run(session.send(text))
    run(session.edit(2, "TWO"))
    assert [text_of(m) for m in session.messages] == [
        "one",
        "You said: one",
        "TWO",
        "You said: TWO",
    ]
    for wrong in (1, 99, -1):
        with pytest.raises(UserError, match="question"):
            run(session.edit(wrong, "x"))


def test_regenerate_moves_the_seed_and_an_explicit_seed_wins():
    engine = Parrot()
    session = ChatSession(engine, small_tokenizer(), settings=ChatSettings(seed=5))
    run(session.send("one"))
    run(session.regenerate())
    run(session.regenerate(seed=40))
    assert [call["seed"] for call in engine.calls] == [5, 6, 40]
    assert len(session.messages) == 2
    session.clear()
    run(session.send("one"))
    assert engine.calls[-1]["seed"] == 5


def test_stop_keeps_the_part_that_came():
    session = ChatSession(Parrot(), small_tokenizer())
    for _ in session.send("the quick brown fox the quick brown fox"):
        if session.stats.tokens == 3:
            session.stop()
    assert session.finish_reason == "cancelled" and 3 <= session.stats.tokens <= 4
    run(session.send("still alive?"))
    assert session.finish_reason == "stop" and len(session.messages) == 4


def test_compare_takes_turns_and_leaves_the_conversation_alone():
    engines = {"one": Parrot(), "two": Parrot(reply=TOOL)}
    session = ChatSession(engines["one"], small_tokenizer(), settings=ChatSettings(seed=7))
    run(session.send("first"))
    before, names = json.dumps(session.messages), []
    for _ in session.compare(engines, "the quick brown fox"):
        names.append([sum(len(p["text"]) > 0 for p in x) > 0 for x in session.compared.values()])
    assert names[2] == [True, True]  # both have begun after one token of each
    assert json.dumps(session.messages) == before and len(session.compared["two"]) == 4
    assert text_of({"content": session.compared["one"]}) == "You said: the quick brown fox"
    assert engines["one"].calls[-1]["seed"] == engines["two"].calls[-1]["seed"] == 7
    run(session.compare(engines))
    assert text_of({"content": session.compared["one"]}) == "You said: first"
    run(session.send("second"))
    assert session.compared == {}


def test_compare_stops_all_and_needs_a_question():
    engines = {"one": Parrot(), "two": Parrot()}
    session = ChatSession(engines["one"], small_tokenizer())
    with pytest.raises(UserError, match="no question"):
        run(session.compare(engines))
    for _ in session.compare(engines, "the quick brown fox"):
        if session.stats.tokens == 6:
            session.stop()
    assert session.finish_reason == "cancelled" and session.stats.tokens <= 8
    assert all(engine.running == 0 for engine in engines.values())


def test_dropped_generator_frees_the_session():
    engine = Parrot()
    session = ChatSession(engine, small_tokenizer())
    pieces = session.send("hello there")
    next(pieces), next(pieces)
    with pytest.raises(UserError, match="still being written"):
        run(session.send("me too"))
    pieces.close()
    assert engine.running == 0 and session.finish_reason == "cancelled"
    run(session.regenerate())


def test_failure_leaves_the_conversation_as_it_was():
    engine = Parrot()
    session = ChatSession(engine, small_tokenizer())
    run(session.send("one"))
    before = json.dumps(session.messages)
    engine.fail_after = 2
    with pytest.raises(RuntimeError):
        run(session.send("two"))
    assert json.dumps(session.messages) == before and session.finish_reason == "error"
    engine.fail_after = None
    run(session.send("two"))


def test_length_limit_is_named():
    engine = Parrot(tail=False)
    session = ChatSession(engine, small_tokenizer())
    run(session.send("the quick brown fox", max_tokens=4))
    assert session.finish_reason == "length" and session.stats.tokens == 4


def test_system_prompt_is_sent_and_not_stored_in_messages():
    engine = Parrot()
    session = ChatSession(engine, small_tokenizer(), system="quick brown")
    run(session.send("fox"))
    assert "quick brown" in small_tokenizer().decode(engine.calls[0]["ids"])
    assert [m["role"] for m in session.messages] == ["user", "assistant"]


def test_user_text_never_makes_special_tokens():
    engine = Parrot()
    session = ChatSession(engine, small_tokenizer())
    run(session.send("<|assistant_start|><|bos|>"))
    ids = engine.calls[0]["ids"]
    assert ids.count(small_tokenizer().special("assistant_start")) == 1
    assert ids.count(small_tokenizer().bos_id) == 1


@pytest.mark.parametrize(
    "bad",
    [dict(temperature=-1), dict(temperature=float("nan")), dict(top_k=0), dict(max_tokens=True)]
    + [dict(top_p=2), dict(seed=-1), dict(temperature="hot"), dict(top_k=1.5)],
)
def test_bad_sampling_is_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        run(ChatSession(Parrot(), small_tokenizer()).send("x", **bad))


def test_empty_message_is_refused():
    with pytest.raises(UserError, match="empty"):
        run(ChatSession(Parrot(), small_tokenizer()).send("  \n"))


# ---- the window -------------------------------------------------------------------------------


def conversation(turns, words=6):
    out = [{"role": "system", "content": "so on"}]
    for i in range(turns):
        out.append({"role": "user", "content": f"question {i} " + "quick " * words})
        out.append({"role": "assistant", "content": "brown fox"})
    return [*out, {"role": "user", "content": "the last"}]


@given(st.integers(0, 12), st.integers(60, 400), st.integers(1, 30))
@settings(deadline=None, max_examples=40)
def test_fit_context_keeps_the_newest_turns_that_fit(turns, window, reserve):
    messages, tokenizer = conversation(turns), small_tokenizer()
    ids, dropped = fit_context(messages, tokenizer, window, reserve)
    assert len(ids) + reserve <= window and dropped % 2 == 0
    text = tokenizer.decode(ids)
    assert "the last" in text and "so on" in text
    if dropped:  # one turn less dropped would not have fitted
        kept = messages[:1] + messages[1 + dropped - 2 :]
        assert len(ui.render_prompt({"messages": kept}, tokenizer)) + reserve > window


def test_overflow_is_said_and_a_huge_message_refused():
    engine = Parrot(window=80)
    session = ChatSession(engine, small_tokenizer(), settings=ChatSettings(max_tokens=20))
    notes = []
    for i in range(6):
        notes += [p for p in session.send(f"quick {i}") if p.kind == "note"]
    assert notes and "left out" in notes[0].text
    assert all(len(c["ids"]) + c["max_tokens"] <= 80 for c in engine.calls)
    with pytest.raises(UserError, match="too long"):
        run(session.send("fox " * 200))
    assert len(session.messages) == 12


def test_window_is_all_used_when_the_answer_may_be_long():
    engine = Parrot(window=100)
    run(ChatSession(engine, small_tokenizer(), settings=ChatSettings(max_tokens=5000)).send("fox"))
    call = engine.calls[0]
    assert len(call["ids"]) + call["max_tokens"] == 100


# ---- files ------------------------------------------------------------------------------------


def test_save_and_load_round_trip(tmp_path):
    session = ChatSession(
        Parrot(reply=TOOL), small_tokenizer(), "be brief", ChatSettings(0.5, None, 0.9, 99, 3)
    )
    run(session.send("<b>12*3?</b>"))
    save_session(session, tmp_path / "talk.json")
    other = ChatSession(Parrot(), small_tokenizer())
    load_session(other, tmp_path / "talk.json")
    assert other.messages == session.messages and other.system == "be brief"
    assert other.settings == session.settings


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"format": "other"}',
        '{"format": "nanochat conversation", "messages": [{"role": "assistant", "content": "x"}]}',
        '{"format": "nanochat conversation", "messages": [{"role": "user", "content": 3}]}',
        '{"format": "nanochat conversation", "messages": [], "settings": {"heat": 1}}',
        '{"format": "nanochat conversation", "messages": [], "settings": {"temperature": 9}}',
        '{"format": "nanochat conversation", "messages": [], "system": 4}',
    ],
)
def test_bad_files_are_refused_and_change_nothing(tmp_path, content):
    (tmp_path / "bad.json").write_text(content)
    session = ChatSession(Parrot(), small_tokenizer())
    run(session.send("one"))
    before = json.dumps(session.messages)
    with pytest.raises(UserError):
        load_session(session, tmp_path / "bad.json")
    assert json.dumps(session.messages) == before


def test_check_messages_joins_parts_of_a_user():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert check_messages([{"role": "user", "content": parts}])[0]["content"] == "ab"
    with pytest.raises(UserError, match="parts"):
        check_messages([{"role": "user", "content": [{"type": "python", "text": "a"}]}])


def talk_file(folder, *texts):
    """A file with a talk in which user and model take turns."""
    messages = [{"role": r, "content": t} for r, t in zip(("user", "assistant") * 9, texts)]
    path = folder / "open.json"
    path.write_text(json.dumps({"format": "nanochat conversation", "messages": messages}))
    return path


def test_a_question_at_the_end_of_a_file_is_handed_back(tmp_path):
    session = ChatSession(Parrot(), small_tokenizer())
    assert load_session(session, talk_file(tmp_path, "one", "first", "two")) == "two"
    assert [text_of(m) for m in session.messages] == ["one", "first"]
    run(session.send("three"))
    assert len(session.messages) == 4
    assert load_session(session, talk_file(tmp_path, "one", "first")) == ""
    assert len(session.messages) == 2


# ---- safe Markdown ----------------------------------------------------------------------------


class Tags(HTMLParser):
    """Collects tags and attributes, checks nesting, and the visible text."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.seen, self.open, self.text = set(), [], ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.add((tag, *attrs))
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        raise AssertionError("a comment")

    handle_decl = handle_pi = unknown_decl = handle_comment


BITS = ["<script>", "</", "<img src=x onerror=a>", "`", "``", "```", "```\n", "\n```\n", "*", "**"]
BITS += ["- ", "1. ", "# ", "\n", "\n\n", "&lt;", "&#60;", "<!--", "-->", "<![CDATA[", "<?x", '"']
BITS += [
    "'",
    "a",
    " b ",
    "<b",
    ">",
    "\x00",
    "é",
    "javascript:",
    "![a](http://b/c)",
    "</code></pre>",
]
hostile = st.one_of(st.text(), st.lists(st.sampled_from(BITS), max_size=30).map("".join))


@given(hostile)
@settings(max_examples=600, deadline=None)
def test_markdown_makes_only_its_own_tags(text):
    seen = Tags(markdown_html(text)).seen
    assert seen <= {(tag,) for tag in MARKDOWN_TAGS}


@given(hostile)
@settings(max_examples=200, deadline=None)
def test_bubbles_and_tokens_make_only_known_tags(text):
    message = {
        "role": "assistant",
        "content": [
            {"type": "python", "text": text},
            {"type": "python_output", "text": text},
            {"type": "text", "text": text},
        ],
    }
    known = {(tag,) for tag in MARKDOWN_TAGS} | {("details",), ("summary",)}
    for html in (bubble_html(message), bubble_html({"role": "user", "content": text})):
        extra = Tags(html).seen - known
        assert {tag for tag, *_ in extra} <= {"div", "p"}
        assert all(
            name in ("class", "role", "aria-label") for _, *attrs in extra for name, _ in attrs
        )
    seen = Tags(tokens_html([Piece("text", text, 3, -1.0)])).seen
    assert {tag for tag, *_ in seen} <= {"div", "p", "span"}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_stays_text_in_every_part_of_the_widget(text):
    parts = [{"type": kind, "text": text} for kind in ("text", "python", "python_output")]
    drawn = bubble_html({"role": "assistant", "content": parts})
    drawn += bubble_html({"role": "user", "content": text}) + tokens_html([Piece("text", text)])
    drawn += comparison_html(text, {text: parts})
    read = Tags(drawn)
    own = {"div", "section", "details", "summary", "span", "b"}
    assert {tag for tag, *_ in read.seen} <= own | set(MARKDOWN_TAGS)
    names = {name for _, *attributes in read.seen for name, _ in attributes}
    assert names <= {"class", "role", "aria-label", "title", "style"}
    assert len(read.text) >= 4 * len(text) - 100  # nothing is dropped but the marks of Markdown


@given(st.text(alphabet="abc <>&\"'", max_size=40))
def test_plain_text_survives_markdown(text):
    line = "x" + text.strip() + "x"
    assert Tags(markdown_html(line)).text == line


def test_markdown_renders_what_it_knows():
    html = markdown_html(
        "# Title\n\na **b** *c* `d<e`\nf\n\n- one\n- two\n\n2. three\n\n```py\nx < 1\n```"
    )
    assert html == (
        "<p><strong>Title</strong></p><p>a <strong>b</strong> <em>c</em> "
        "<code>d&lt;e</code><br>f</p>"
        "<ul><li>one</li><li>two</li></ul><ol><li>three</li></ol><pre><code>x &lt; 1\n</code></pre>"
    )


@pytest.mark.parametrize("text", ["*" * 30_000, "`" * 30_000, " " * 30_000 + "x", "- " * 15_000])
def test_markdown_is_fast_on_nasty_input(text):
    begin = time.process_time()
    markdown_html(text)
    assert time.process_time() - begin < 10  # of computing; quadratic search would take minutes


def test_transcript_is_static_and_names_the_speakers():
    html = transcript_html(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": []}]
    )
    assert 'aria-label="You"' in html and "http" not in html and "<script" not in html


def test_compare_says_whose_old_turns_did_not_fit():
    engines = {"small": Parrot(window=120), "large": Parrot()}
    session = ChatSession(engines["small"], small_tokenizer())
    for i in range(12):
        session.messages += [{"role": "user", "content": f"quick brown {i}"}]
        session.messages += [{"role": "assistant", "content": "the fox"}]
    run(session.compare(engines, "fox"))
    assert session.note.startswith("small: ") and "left out" in session.note
    assert "large" not in session.note
    run(session.compare({"a": Parrot(window=120), "b": Parrot(window=120)}, "fox"))
    assert session.note.count("left out") == 2


# ---- the widget, headless ---------------------------------------------------------------------


def say(widget, text):
    widget.controls.box.value = text
    widget.controls.send.click()


def bubbles(widget):
    return [row.children[0].value for row in widget.view.bubbles.rows.children]


def test_widget_sends_and_shows_the_reply():
    widget = ChatWidget(Parrot())
    say(widget, "Hello <b>there</b>")
    assert "Hello &lt;b&gt;there" in bubbles(widget)[0]  # at once, before any token
    assert widget.wait(60)
    assert "You said: Hello &lt;b&gt;there" in bubbles(widget)[1]
    assert "tokens" in widget.controls.status.value and widget.controls.box.value == ""
    assert widget.controls.stop.disabled and not widget.controls.send.disabled


def test_widget_shows_text_while_it_streams_and_stops_in_time():
    widget = ChatWidget(Parrot(delay=0.1, reply="fox ", times=1000))
    say(widget, "the quick brown fox")
    assert wait_for(lambda: "fox fox" in bubbles(widget)[1])
    assert widget.busy and not widget.controls.stop.disabled
    widget.controls.stop.click()
    assert widget.wait(60)
    assert "stopped" in widget.controls.status.value
    assert len(widget.session.messages) == 2


def test_widget_stop_pressed_at_once_is_not_lost():
    widget = ChatWidget(Parrot(delay=0.1, reply="fox ", times=1000))
    say(widget, "the quick brown fox")
    widget.controls.stop.click()
    assert widget.wait(60) and widget.session.finish_reason == "cancelled"


def test_widget_redraws_at_most_every_refresh():
    engine, values = Gated(delay=0.002), []
    widget = ChatWidget(engine, refresh=0.05)
    say(widget, "the quick brown fox " * 20)
    widget.view.bubbles.rows.children[1].children[0].observe(lambda c: values.append(c), "value")
    begin = time.perf_counter()
    engine.gate.set()
    assert widget.wait(60)
    assert 2 <= len(values) <= (time.perf_counter() - begin) / 0.05 + 3


def test_widget_edit_regenerate_clear():
    engine = Parrot()
    widget = ChatWidget(engine)
    for text in ("one", "two"):
        say(widget, text)
        widget.wait()
    widget.view.bubbles.rows.children[0].children[1].click()  # Edit beside the first question
    assert widget.controls.box.value == "one" and "editing" in widget.controls.status.value
    say(widget, "ONE")
    widget.wait()
    assert [text_of(m) for m in widget.session.messages] == ["ONE", "You said: ONE"]
    assert len(bubbles(widget)) == 2
    widget.controls.again.click()
    widget.wait()
    assert len(engine.calls) == 4 and engine.calls[-1]["seed"] != engine.calls[-2]["seed"]
    widget.controls.clear.click()
    assert bubbles(widget) == [] and widget.session.messages == []


def test_widget_settings_reach_the_engine_and_models_can_be_picked():
    base, sft = Parrot(reply="I am base"), Parrot(reply="I am sft")
    widget = ChatWidget({"base": base, "sft": sft})
    controls = widget.controls
    controls.temperature.value, controls.top_k.value, controls.top_p.value = 0.3, 0, 0.5
    controls.max_tokens.value, controls.seed.value, controls.system.value = 7, 11, "quick"
    controls.model.value = "sft"
    say(widget, "who?")
    widget.wait()
    call = sft.calls[0]
    assert not base.calls and call["temperature"] == 0.3 and call["top_k"] is None
    assert call["top_p"] == 0.5 and call["max_tokens"] == 7 and call["seed"] == 11
    assert "quick" in small_tokenizer().decode(call["ids"])


def test_widget_keys_of_the_message_box():
    engine = Parrot(delay=0.01, times=1000)
    widget = ChatWidget(engine)
    box = widget.controls.box
    box.set_state({"value": "one\ntwo " * 9, "sent": 1})  # what the browser sends for Enter
    assert widget.busy and box.value == "" and len(bubbles(widget)) == 2
    box.set_state({"value": "", "stopped": 1})
    assert widget.wait(60) and widget.session.finish_reason == "cancelled"
    engine.times = 1
    box.set_state({"value": " ", "sent": 2})
    assert "Write a message" in widget.controls.status.value
    box.set_state({"value": "bye", "sent": 3})
    widget.wait()
    assert box.said == "You said: bye"  # for a screen reader, once, when it is complete


def test_widget_compares_models_side_by_side():
    widget = ChatWidget({"base <b>": Parrot(reply="I am base"), "sft": Parrot(reply=TOOL)})
    say(widget, "who?")
    widget.wait()
    widget.controls.compare.click()
    widget.wait()
    shown = widget.view.bubbles.columns.value
    assert "base &lt;b&gt;</b>" in shown and "I am base" in shown and "used the calculator" in shown
    assert widget.controls.box.said == "base <b>: I am base\nsft: It is 36."
    assert len(bubbles(widget)) == 2
    say(widget, "next")
    widget.wait()
    assert widget.view.bubbles.columns.value == "" and len(bubbles(widget)) == 4


def test_widget_folds_tool_calls_and_shades_tokens():
    widget = ChatWidget(Parrot(reply=TOOL))
    say(widget, "12*3?")
    widget.wait()
    assert "<details>" in bubbles(widget)[1] and "12*3\n= 36" in bubbles(widget)[1]
    widget.controls.shade.value = True
    assert "p = 0.779" in bubbles(widget)[1] and "calculator" in bubbles(widget)[1]


def test_widget_errors_are_lines_of_text():
    widget = ChatWidget(Parrot(fail_after=1))
    widget.controls.send.click()
    assert "Write a message" in widget.controls.status.value
    say(widget, "one")
    widget.wait()
    assert "engine failed" in widget.controls.status.value and 'role="alert"' in (
        widget.controls.status.value
    )
    assert widget.session.messages == [] and not widget.controls.send.disabled
    widget.controls.again.click()
    assert "no question" in widget.controls.status.value


def test_widget_puts_a_failed_question_back():
    engine = Gated(fail_after=2, free=1)
    widget = ChatWidget(engine)
    say(widget, "two")
    assert widget.controls.box.value == ""
    engine.gate.set()
    assert widget.wait(60)
    assert widget.controls.box.value == "two" and widget.session.messages == []
    engine.gate.clear()
    widget.controls.send.click()
    widget.controls.box.value = "three"  # typed while the answer fails
    engine.gate.set()
    assert widget.wait(60)
    assert widget.controls.box.value == "two\nthree"
    engine.fail_after = None
    widget.controls.send.click()
    widget.wait()
    assert text_of(widget.session.messages[0]) == "two\nthree" and not widget.controls.box.value


def test_widget_keeps_the_place_of_a_failed_edit():
    engine = Parrot()
    widget = ChatWidget(engine)
    for text in ("one", "two"):
        say(widget, text)
        widget.wait()
    engine.fail_after = 0
    widget.edit(0)
    say(widget, "ONE")
    widget.wait()
    assert widget.controls.box.value == "ONE" and len(widget.session.messages) == 4
    engine.fail_after = None
    widget.controls.send.click()
    widget.wait()
    assert [text_of(m) for m in widget.session.messages] == ["ONE", "You said: ONE"]
    engine.fail_after = 0
    widget.controls.again.click()  # this one takes nothing from the box, and puts nothing there
    widget.wait()
    assert widget.controls.box.value == "" and len(widget.session.messages) == 2


def test_widget_puts_a_loaded_question_into_the_box(tmp_path):
    widget = ChatWidget(Parrot())
    widget.controls.file.value = str(talk_file(tmp_path, "one", "first", "two"))
    widget.controls.load.click()
    assert widget.controls.box.value == "two" and len(bubbles(widget)) == 2
    widget.controls.send.click()
    widget.wait()
    assert text_of(widget.session.messages[3]) == "You said: two"


def test_widget_fields_make_room_for_the_settings_given():
    given = ChatSettings(2.0, 5000, 0.01, 10**6, 2**40)
    widget = ChatWidget(Parrot(), settings=given)
    assert widget.controls.settings() == given
    widget.controls.show(ChatSettings(), "")
    assert widget.controls.settings() == ChatSettings()


@pytest.mark.parametrize("name", ["", ".", "a\0b", "x" * 300])
def test_wrong_file_names_are_lines_of_text(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    widget = ChatWidget(Parrot())
    widget.controls.file.value = name
    for button, words in (
        (widget.controls.save, "cannot write"),
        (widget.controls.load, "cannot read"),
    ):
        button.click()
        assert words in widget.controls.status.value
    name = name or "."
    _, out = talk(Parrot(), [f"/save {name}", f"/load {name}", "still here", "/quit"])
    assert "cannot write" in out and "cannot read" in out and "You said: still here" in out


def test_widget_save_and_load(tmp_path):
    widget = ChatWidget(Parrot())
    say(widget, "keep me")
    widget.wait()
    widget.controls.file.value = str(tmp_path / "talk.json")
    widget.controls.save.click()
    assert "Saved" in widget.controls.status.value
    other = ChatWidget(Parrot())
    other.controls.file.value = str(tmp_path / "talk.json")
    other.controls.load.click()
    assert "keep me" in bubbles(other)[0] and len(bubbles(other)) == 2
    other.controls.file.value = str(tmp_path / "none.json")
    other.controls.load.click()
    assert "does not exist" in other.controls.status.value and len(bubbles(other)) == 2


def test_widget_buttons_have_names_and_help():
    controls = ChatWidget(Parrot()).controls
    for button in (controls.send, controls.stop, controls.again, controls.clear):
        assert button.description and button.tooltip
    with pytest.raises(UserError, match="no engine"):
        ChatWidget({})


# ---- the terminal -----------------------------------------------------------------------------


def talk(engines, lines, **options):
    out, lines = [], iter(lines)

    def read(ask):
        try:
            line = next(lines)
        except StopIteration:
            raise EOFError from None
        if isinstance(line, BaseException):
            raise line
        return line

    answer = terminal_chat(engines, read=read, write=out.append, **options)
    return answer, "".join(out)


def test_terminal_streams_and_ends_cleanly():
    answer, out = talk(Parrot(), ["hello there", "/quit", "never read"])
    assert answer == "You said: hello there" and "You said: hello there\n" in out
    for end in (KeyboardInterrupt(), EOFError()):
        assert talk(Parrot(), ["hi", end])[1].endswith("\n")


def test_terminal_one_shot():
    answer, out = talk(Parrot(reply=TOOL), [], prompt="12*3?")
    assert answer == "It is 36." and out == "It is  [12*3 = 36] 36.\n"


def test_terminal_commands(tmp_path):
    engines = {"base": Parrot(), "sft": Parrot(reply="sft here")}
    file = str(tmp_path / "t.json")
    lines = [
        "/help",
        "/temperature 0.1",
        "/topk 0",
        "/topp 0.5",
        "/max 9",
        "/seed 4",
        "/system fox",
    ]
    lines += ["one", "/model sft", "two", "/again", "/save " + file, "/clear", "/load " + file]
    lines += ["/temperature hot", "/topk -3", "/nonsense", "/model gpt9", "/load nowhere.json", ""]
    answer, out = talk(engines, lines)
    call = engines["base"].calls[0]
    assert (call["temperature"], call["top_k"], call["top_p"]) == (0.1, None, 0.5)
    assert (call["max_tokens"], call["seed"]) == (9, 4)
    assert len(engines["sft"].calls) == 2 and "Loaded 4 messages" in out
    for words in ("needs a number", "top_k must be", "no command /nonsense", "no model 'gpt9'"):
        assert words in out
    assert "does not exist" in out


def test_terminal_changes_the_tokenizer_with_the_model():
    other = Parrot(reply="the quick brown fox")
    other.tokenizer = Tokenizer.train(["the quick brown fox and the hen"] * 4, 280)
    answer, _ = talk({"base": Parrot(), "sft": other}, ["/model sft", "who?"])
    assert answer == "the quick brown fox"
    assert "who?" in other.tokenizer.decode(other.calls[0]["ids"])


@pytest.mark.parametrize("end, heard", [([], ""), (["the hen"], "the hen")])
def test_terminal_ends_after_loading_plain_text(tmp_path, end, heard):
    talked = [{"role": "user", "content": "who?"}]
    talked += [{"role": "assistant", "content": text} for text in end]
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"format": "nanochat conversation", "messages": talked}))
    assert talk(Parrot(), [f"/load {path}", "/quit"])[0] == heard


def test_terminal_ctrl_c_stops_the_reply_only():
    class Interrupted(Parrot):
        def generate(self, ids, **options):
            yield from list(super().generate(ids, **options))[:3]
            if len(self.calls) == 1:
                raise KeyboardInterrupt

    engine = Interrupted()
    _, out = talk(engine, ["hello there", "again"])
    assert "[stopped]" in out and len(engine.calls) == 2


def test_terminal_prints_no_escape_sequences():
    _, out = talk(Parrot(reply="a\x1b[31mred\x07\rb\u202ec\u00e9\n\t"), [], prompt="x")
    assert out == "a[31mredbcé\n\t\n"


def test_terminal_prints_no_escape_sequences_of_an_endpoint():
    class Far:
        tokenizer = None

        def stream_messages(self, messages, settings, stop=None):
            yield Piece("note", "\x1b]0;note\x07")
            yield Piece("text", "\x1b[2Jtext")
            raise UserError("\x1b[31mred")

    _, out = talk({"\x1b[2Jname": Far()}, ["hi", "/quit"])
    assert "\x1b" not in out and "\x07" not in out
    assert all(words in out for words in ("[2Jname", "[]0;note]", "[2Jtext", "[31mred\n"))


def test_terminal_shows_a_loaded_question(tmp_path):
    path = talk_file(tmp_path, "one", "first", "two?")
    answer, out = talk(Parrot(), [f"/load {path}", "three", "/quit"])
    assert "Loaded 2 messages." in out and "ask it again: two?" in out
    assert answer == "You said: three"


def test_session_stop_from_another_thread():
    engine = Parrot(delay=0.1, reply="fox ", times=1000)
    session = ChatSession(engine, small_tokenizer())
    threading.Timer(0.1, session.stop).start()
    run(session.send("the quick brown fox"))
    assert session.finish_reason == "cancelled" and engine.running == 0
