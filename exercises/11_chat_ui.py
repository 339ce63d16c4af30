# %% [markdown]
r"""
# Exercises for chapter 11: talk to it

Between a model and a reader stand a page, a wire and a door. Here you write the parts that decide
whether they are safe: what becomes markup, how an answer travels in pieces, where it is cut, and
who may come in. No server runs in this sheet. `check` says which properties your answer has, `hint`
helps three times, `progress()` shows your points.
"""

# %%
#| given
import html
import json
import re

# %%
from book.graded import check, hint, progress

# %% [markdown]
r"""
## 1. Links, and nothing but links

The chat window of the chapter shows no links. Suppose readers want them. Text comes from a model,
and a model writes what it has read: `<script>`, links that run code (`javascript:...`), images that
tell another machine that you are reading.

Write `link_html`. `[label](address)` becomes

```html
<a href="ADDRESS" rel="noreferrer">LABEL</a>
```

but only if the address begins with `http://` or `https://` and holds no space and no parenthesis.
Everything else stays text and is escaped, above all images, `![label](address)`: a picture from
another host is fetched just by being shown. As in the chapter: split the raw text, escape every
leaf, put tags of our own around.
"""


# %%
#| exercise id=11-links points=3 minutes=25 level=3 answer=link_html
def link_html(text: str) -> str:
    """Turn Markdown links to the web into anchors, and all other text into escaped text."""
    # BEGIN SOLUTION
    link = r"(?<!!)\[([^\[\]\n]+)\]\((https?://[^\s()]+)\)"
    out, at = [], 0
    for match in re.finditer(link, text):
        out.append(html.escape(text[at : match.start()]))
        label, address = html.escape(match[1]), html.escape(match[2])
        out.append(f'<a href="{address}" rel="noreferrer">{label}</a>')
        at = match.end()
    return "".join(out) + html.escape(text[at:])
    # END SOLUTION


# %%
check("11-links", link_html)

# %%
#| checks 11-links
from html.parser import HTMLParser


def as_a_browser_sees(page):
    """(opening tags with their attributes, the text)"""
    tags, texts = [], []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    reader.handle_data = texts.append
    reader.feed(page)
    reader.close()
    return tags, "".join(texts)


@says(
    "text without links is only escaped",
    "Also what stands before, between and after links must pass html.escape, once.",
)
def _(link_html):
    for text in ('<img src=x onerror="alert(1)">', "1 < 2 & 2 > 1", "a [list] (of) things", "&lt;"):
        assert as_a_browser_sees(link_html(text)) == ([], text)


@says(
    "a web link becomes an anchor",
    "The tag is a, with href and rel; the label is its text, and the text around it stays.",
)
def _(link_html):
    tags, text = as_a_browser_sees(link_html("See [the book](https://a.example/x?b=1&c=2) now."))
    assert tags == [("a", {"href": "https://a.example/x?b=1&c=2", "rel": "noreferrer"})]
    assert text == "See the book now."


@says("a label is text", "What stands in the brackets came from the model, too: escape it.")
def _(link_html):
    tags, text = as_a_browser_sees(link_html("[<b>x</b>](https://a.example)"))
    assert [tag for tag, _ in tags] == ["a"] and text == "<b>x</b>"


@says(
    "an address cannot leave its attribute",
    "A quote in the address ends href and begins an attribute of the model's own: escape it.",
)
def _(link_html):
    tags, _ = as_a_browser_sees(link_html('[x](https://a.example/"onmouseover="steal)'))
    assert all(set(attributes) <= {"href", "rel"} for _, attributes in tags), tags


@says(
    "only http and https are links",
    "List what is allowed. A list of what is forbidden forgets data:, or JavaScript: in capitals.",
)
def _(link_html):
    for address in ("javascript:steal", "JavaScript:steal", "data:text/html,x", "//b.example", "x"):
        text = f"[x]({address})"
        assert as_a_browser_sees(link_html(text)) == ([], text), text


@says(
    "an image stays text",
    "With ! before it the bracket is an image: neither show it nor make a link of it.",
)
def _(link_html):
    text = "![a dot](https://b.example/seen.png)"
    assert as_a_browser_sees(link_html(text)) == ([], text)


# %%
#| hints 11-links
hints = [
    "Find the links with one regular expression; what lies between two matches is a leaf.",
    "`(?<!!)` before the bracket says: no exclamation mark here. `https?://` says which addresses.",
    "Loop over `re.finditer`; append html.escape(text[at:start]), then an anchor of escaped parts.",
]


# %%
#| wrong 11-links: text without links is only escaped
def link_html(text):
    def anchor(match):
        label, address = html.escape(match[1]), html.escape(match[2])
        return f'<a href="{address}" rel="noreferrer">{label}</a>'

    return re.sub(r"(?<!!)\[([^\[\]\n]+)\]\((https?://[^\s()]+)\)", anchor, text)


# %%
#| wrong 11-links: an address cannot leave its attribute
def link_html(text):
    out, at = [], 0
    for match in re.finditer(r"(?<!!)\[([^\[\]\n]+)\]\((https?://[^\s()]+)\)", text):
        out.append(html.escape(text[at : match.start()]))
        out.append(f'<a href="{match[2]}" rel="noreferrer">{html.escape(match[1])}</a>')
        at = match.end()
    return "".join(out) + html.escape(text[at:])


# %%
#| wrong 11-links: only http and https are links
def link_html(text):
    out, at = [], 0
    for match in re.finditer(r"(?<!!)\[([^\[\]\n]+)\]\(((?!javascript:)[^\s()]+)\)", text):
        out.append(html.escape(text[at : match.start()]))
        label, address = html.escape(match[1]), html.escape(match[2])
        out.append(f'<a href="{address}" rel="noreferrer">{label}</a>')
        at = match.end()
    return "".join(out) + html.escape(text[at:])


# %%
#| wrong 11-links: an image stays text
def link_html(text):
    out, at = [], 0
    for match in re.finditer(r"\[([^\[\]\n]+)\]\((https?://[^\s()]+)\)", text):
        out.append(html.escape(text[at : match.start()]))
        label, address = html.escape(match[1]), html.escape(match[2])
        out.append(f'<a href="{address}" rel="noreferrer">{label}</a>')
        at = match.end()
    return "".join(out) + html.escape(text[at:])


# %%
#| wrong 11-links: a web link becomes an anchor
def link_html(text: str) -> str:
    link = r"(?<!!)\[([^\[\]\n]+)\]\((https?://[^\s()]+)\)"
    out, at = [], 0
    for match in re.finditer(link, text):
        out.append(html.escape(text[at : match.start()]))
        label, address = html.escape(match[1]), html.escape(match[2])
        out.append(f'<a href="{address}">{label}</a>')
        at = match.end()
    return "".join(out) + html.escape(text[at:])


# %%
#| wrong 11-links: a label is text
def link_html(text: str) -> str:
    link = r"(?<!!)\[([^\[\]\n]+)\]\((https?://[^\s()]+)\)"
    out, at = [], 0
    for match in re.finditer(link, text):
        out.append(html.escape(text[at : match.start()]))
        label, address = match[1], html.escape(match[2])
        out.append(f'<a href="{address}" rel="noreferrer">{label}</a>')
        at = match.end()
    return "".join(out) + html.escape(text[at:])


# %%
#| right 11-links
def link_html(text):
    safe = html.escape(text)
    link = r"(!?)\[([^\[\]\n]+)\]\((https?://[^\s()]+)\)"
    anchor = r'<a href="\3" rel="noreferrer">\2</a>'
    return re.sub(link, lambda m: m[0] if m[1] else m.expand(anchor), safe)


# %% [markdown]
r"""
## 2. Write an event

An answer that streams is a row of server-sent events: a line `data: ` with JSON behind it, and an
empty line. A token may hold a newline. Left as it is, it would end the event in the middle of the
text; written as JSON it is the two characters `\n`, and the event stays one line. The last event of
a stream is no JSON but the bare word `[DONE]`, so text is passed through as it is. This is the
book's `event`.
"""


# %%
#| exercise id=11-event points=1 minutes=6 level=1 answer=event replaces=serve.event
def event(data) -> str:
    """Write one server-sent event.

    Args:
        data: a dict or list that is written as JSON, or a text that is written as it is.
    """
    # BEGIN SOLUTION
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n"
    # END SOLUTION


# %%
check("11-event", event)

# %%
#| checks 11-event
TOKEN = {"token": 'two\nlines and a "quote"', "id": 7}


@says("one line and an empty line", "`data: `, the JSON, and two newlines; none in between.")
def _(event):
    found = event(TOKEN)
    assert found.startswith("data: ") and found.endswith("\n\n") and found.count("\n") == 2


@says("what it carries is JSON", "`str` of a dict is Python's spelling, with single quotes.")
def _(event):
    assert list(json.loads(event(TOKEN).strip()[5:]).items()) == list(TOKEN.items())


@says("text is sent as it is", "[DONE] has no quotes around it: clients compare it as a word.")
def _(event):
    assert event("[DONE]").strip() == "data: [DONE]"


@says(
    "other alphabets stay readable",
    r"By default json.dumps writes \u escapes, six bytes for one letter; the wire is UTF-8.",
)
def _(event):
    assert "größer 大" in event({"token": "größer 大"})


# %%
#| hints 11-event
hints = [
    "Which of the two kinds of data is already a text?",
    "json.dumps has an option that keeps letters outside ASCII as they are.",
    'text, or `json.dumps(data, ensure_ascii=False)`; then `f"data: {text}\\n\\n"`.',
]


# %%
#| wrong 11-event: what it carries is JSON
def event(data):
    return f"data: {data}\n\n"


# %%
#| wrong 11-event: text is sent as it is
def event(data):
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


# %%
#| wrong 11-event: other alphabets stay readable
def event(data):
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n"


# %%
#| wrong 11-event: one line and an empty line
def event(data) -> str:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n"


# %%
#| right 11-event
def event(data):
    if not isinstance(data, str):
        data = json.dumps(data, ensure_ascii=False, sort_keys=False)
    return "data: " + data + 2 * "\n"


# %% [markdown]
r"""
## 3. Read a stream

Now the other end. The network hands over text in chunks and keeps no promise about where it cuts:
in the middle of an event, of a word, of `[DONE]`. A program that parses chunk by chunk works on the
author's machine, where chunk and event happen to be the same, and loses tokens everywhere else.

Return the JSON values of all events up to `[DONE]`. Lines end with `\n` or `\r\n`. Lines that do
not begin with `data:` (comments such as `: keep-alive`, fields such as `event: x`) are skipped. If
the connection breaks, the last line may be half a line without an end: drop it.
"""


# %%
#| exercise id=11-stream points=3 minutes=20 level=2 answer=read_stream
def read_stream(chunks: list) -> list:
    """Return the JSON of every event in a stream that arrives as a list of texts."""
    # BEGIN SOLUTION
    found, rest = [], ""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            data = line.removeprefix("data:").strip()
            if line.startswith("data:") and data == "[DONE]":
                return found
            if line.startswith("data:"):
                found.append(json.loads(data))
    return found
    # END SOLUTION


# %%
check("11-stream", read_stream)

# %%
#| checks 11-stream
VALUES = [{"token": "Hel"}, {"token": "lo\n"}, {"token": "data: [DONE]"}]


def written(values, end="\n"):
    return [f"data: {json.dumps(v, ensure_ascii=False)}{end}{end}" for v in values]


@says(
    "an event may be cut anywhere",
    "Keep what follows the last line end, and put the next chunk behind it.",
)
def _(read_stream):
    stream = "".join(written(VALUES)) + "data: [DONE]\n\n"
    assert read_stream(list(stream)) == VALUES
    for size in (7, 50, 1000):
        assert read_stream([stream[i : i + size] for i in range(0, len(stream), size)]) == VALUES


@says("nothing counts after [DONE]", "[DONE] ends the stream; the rest is not an answer.")
def _(read_stream):
    assert read_stream([*written(VALUES[:2]), "data: [DONE]\n\n", *written(VALUES)]) == VALUES[:2]


@says("other lines are skipped", "Comments and fields such as event: and id: carry no data.")
def _(read_stream):
    first, second = written(VALUES[:2])
    assert read_stream([": keep-alive\n\n", "event: x\n" + first, "id: 3\n" + second]) == VALUES[:2]


@says(r"lines may end with \r\n", r"A \r is left at the end of the data: [DONE]\r is not [DONE].")
def _(read_stream):
    assert read_stream([*written(VALUES, "\r\n"), "data: [DONE]\r\n\r\n"]) == VALUES


@says(
    "half a line at the end is dropped",
    "A broken connection leaves a line without an end. It is no event; it must not be an error.",
)
def _(read_stream):
    assert read_stream([*written(VALUES[:1]), 'data: {"tok']) == VALUES[:1]


@says(
    "only a newline ends a line",
    "str.splitlines also splits at U+2028 and others, which JSON may hold as they are.",
)
def _(read_stream):
    values = [{"token": "a\u2028b\x85c"}]
    assert read_stream(written(values)) == values


# %%
#| hints 11-stream
hints = [
    "What you cannot parse yet, you must keep. Which part of a chunk is that?",
    r'`*lines, rest = (rest + chunk).split("\n")`: whole lines, and what may go on in the next.',
    "For each whole line: skip it unless it begins with data:, strip, stop at [DONE], json.loads.",
]


# %%
#| wrong 11-stream: an event may be cut anywhere
def read_stream(chunks):
    found = []
    for chunk in chunks:
        for line in chunk.split("\n"):
            if line.startswith("data:"):
                if line[5:].strip() == "[DONE]":
                    return found
                try:
                    found.append(json.loads(line[5:]))
                except ValueError:
                    continue
    return found


# %%
#| wrong 11-stream: nothing counts after [DONE]
def read_stream(chunks):
    lines = "".join(chunks).split("\n")[:-1]
    data = [line[5:].strip() for line in lines if line.startswith("data:")]
    return [json.loads(one) for one in data if one != "[DONE]"]


# %%
#| wrong 11-stream: only a newline ends a line
def read_stream(chunks):
    text, found = "".join(chunks), []
    for line in text[: text.rfind("\n") + 1].splitlines():
        if line == "data: [DONE]":
            break
        if line.startswith("data:"):
            try:
                found.append(json.loads(line[5:]))
            except ValueError:
                continue
    return found


# %%
#| wrong 11-stream: half a line at the end is dropped
def read_stream(chunks):
    found = []
    for line in "".join(chunks).split("\n"):
        if line.strip() == "data: [DONE]":
            break
        if line.startswith("data:"):
            found.append(json.loads(line[5:]))
    return found


# %%
#| wrong 11-stream: other lines are skipped
def read_stream(chunks: list) -> list:
    found, rest = [], ""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            data = line.removeprefix("data:").strip()
            if line.startswith("data:") and data == "[DONE]":
                return found
            if data and not line.startswith(":"):
                found.append(json.loads(data))
    return found


# %%
#| wrong 11-stream: lines may end with \r\n
def read_stream(chunks: list) -> list:
    found, rest = [], ""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            data = line.removeprefix("data: ")
            if line.startswith("data:") and data == "[DONE]":
                return found
            if line.startswith("data:"):
                found.append(json.loads(data))
    return found


# %%
#| right 11-stream
def read_stream(chunks):
    text, found = "".join(chunks), []
    for data in re.findall(r"(?m)^data:[ ]?([^\n]*?)\r?\n", text):
        if data == "[DONE]":
            break
        found.append(json.loads(data))
    return found


# %% [markdown]
r"""
## 4. Stop strings that come in halves

A client may ask the answer to end before the string `"\nUser:"`. Tokens do not respect strings:
the model may write `"\nUs"` and then `"er:"`. What is on the screen cannot be taken back, so an end
that may be the **beginning** of a stop string is held back until we know. Holding back more than
that makes the stream stutter.

Return what is shown after each piece, and at last what is let go when the stream ends: a list of
`len(pieces) + 1` texts. As soon as a stop string is complete, the text before it is shown and all
later texts are empty. For the pieces `["Hi", "\nUs", "er: no"]` and the stop string `"\nUser:"`
that is `["Hi", "", "", ""]`; for `["Hi", "\nUs", "ed"]` it is `["Hi", "", "\nUsed", ""]`.
"""


# %%
#| exercise id=11-stop points=3 minutes=30 level=3 answer=shown
def shown(pieces: list, stops: list) -> list:
    """Return the text to show after each piece, then the text to show when the stream ends.

    Args:
        pieces: texts, as they come from the model.
        stops: up to four texts at which the answer ends; they are not shown themselves.
    """
    # BEGIN SOLUTION
    out, held, stopped = [], "", False
    for piece in pieces:
        text = held + ("" if stopped else piece)
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            stopped, text = True, text[: min(places)]
        keep = 0
        for size in range(1, len(text) + 1):
            if not stopped and any(stop.startswith(text[-size:]) for stop in stops):
                keep = size
        held = text[len(text) - keep :]
        out.append(text[: len(text) - keep])
    return [*out, held]
    # END SOLUTION


# %%
check("11-stop", shown)


# %%
#| checks 11-stop
def cut(text, stops):
    """The whole answer, as it should be."""
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]


@says(
    "nothing is lost when no stop string comes",
    "What was held back is shown when it turns out to be harmless, at the latest at the end.",
)
def _(shown):
    for stops in ([], ["STOP"], ["zebra", "ok!"]):
        found = shown(["S", "T", "O", " is ok", ""], stops)
        assert "".join(found) == "STO is ok" and len(found) == 6
    assert "".join(shown(["a", "ok"], ["ok!"])) == "aok"


@says("the answer ends before the stop string", "Neither the stop string nor what follows shows.")
def _(shown):
    assert "".join(shown(["one two", " STOP three", " four"], ["STOP"])) == "one two "
    assert shown(["a SSTOP", "b"], ["STOP"]) == ["a S", "", ""]


@says(
    "a stop string may be cut into pieces",
    "Search in what was held back and the new piece together; a single piece may hold one letter.",
)
def _(shown):
    for text, stops in (("Hi\nUser: no", ["\nUser:"]), ("aabaabaac", ["aabaac"])):
        for size in (1, 2, 3, 5):
            pieces = [text[i : i + size] for i in range(0, len(text), size)]
            assert "".join(shown(pieces, stops)) == cut(text, stops), pieces


@says(
    "the first place counts, not the first string",
    "With several stop strings the answer ends at the leftmost of all their places.",
)
def _(shown):
    assert "".join(shown(["x one y two"], ["two", "one"])) == "x "


@says(
    "only what may become a stop string waits",
    "Hold back only an end of the text that begins a stop string, not a fixed number of letters.",
)
def _(shown):
    pieces = ["Hello", " SO STRANGE", " a world"]
    assert shown(pieces, ["STOP"]) == [*pieces, ""]


# %%
#| hints 11-stop
hints = [
    "Work on `text = held + piece`. There are two cases: a stop string is in it, or it is not.",
    "If not: what is the longest end of text with which some stop string begins? Hold that.",
    "Try all sizes: `any(stop.startswith(text[-size:]) for stop in stops)`; the largest counts.",
]


# %%
#| wrong 11-stop: a stop string may be cut into pieces
def shown(pieces, stops):
    out, stopped = [], False
    for piece in pieces:
        places = [piece.find(stop) for stop in stops if stop in piece]
        out.append("" if stopped else piece[: min(places, default=len(piece))])
        stopped = stopped or bool(places)
    return [*out, ""]


# %%
#| wrong 11-stop: only what may become a stop string waits
def shown(pieces, stops):
    out, text, done = [], "", 0
    wait = max((len(stop) for stop in stops), default=1) - 1
    for piece in pieces:
        text += piece
        places = [text.find(stop) for stop in stops if stop in text]
        end = min(places) if places else max(done, len(text) - wait)
        out.append(text[done:end])
        done = max(done, end)
        if places:
            return out + [""] * (len(pieces) + 1 - len(out))
    return [*out, text[done:]]


# %%
#| wrong 11-stop: the first place counts, not the first string
def shown(pieces, stops):
    out, held = [], ""
    for piece in pieces:
        text = held + piece
        for stop in stops:
            if stop in text:
                out.append(text[: text.find(stop)])
                return out + [""] * (len(pieces) + 1 - len(out))
        ends = range(len(text) + 1)
        keep = max(n for n in ends if not n or any(s.startswith(text[-n:]) for s in stops))
        held = text[len(text) - keep :]
        out.append(text[: len(text) - keep])
    return [*out, held]


# %%
#| wrong 11-stop: nothing is lost when no stop string comes
def shown(pieces, stops):
    out, held = [], ""
    for piece in pieces:
        text = held + piece
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            out.append(text[: min(places)])
            return out + [""] * (len(pieces) + 1 - len(out))
        ends = range(len(text) + 1)
        keep = max(n for n in ends if not n or any(s.startswith(text[-n:]) for s in stops))
        held = text[len(text) - keep :]
        out.append(text[: len(text) - keep])
    return [*out, ""]


# %%
#| right 11-stop
def shown(pieces, stops):
    out, text, done = [], "", 0
    for piece in pieces:
        text += piece
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            out.append(text[done : min(places)])
            return out + [""] * (len(pieces) + 1 - len(out))
        starts = {stop[:n] for stop in stops for n in range(1, len(stop))}
        end = min((i for i in range(done, len(text)) if text[i:] in starts), default=len(text))
        out.append(text[done:end])
        done = end
    return [*out, text[done:]]


# %% [markdown]
r"""
## 5. A bucket of tokens

One client with a loop can keep the model busy for everybody. The common remedy is a **token
bucket** for each client (these tokens have nothing to do with text). A bucket holds at most
`burst` tokens and is full when the client is first seen. It gains `rate` tokens a second, also
parts of one. A request takes one token and passes; with less than one token it is refused and takes
nothing. So a person may click five times in a row, and a script still gets `rate` a second.

Requests come in the order of time, as pairs (client, seconds). Say of each whether it passes.
"""


# %%
#| exercise id=11-bucket points=2 minutes=20 level=2 answer=admit
def admit(requests: list, rate: float, burst: int) -> list:
    """Return for each request whether it passes.

    Args:
        requests: (client, time) pairs; client is a text, time in seconds, never falling.
        rate: tokens that a bucket gains in a second.
        burst: tokens that a bucket holds at most, and at first.
    Returns:
        a list of bool.
    """
    # BEGIN SOLUTION
    buckets, passed = {}, []
    for client, now in requests:
        level, seen = buckets.get(client, (burst, now))
        level = min(burst, level + (now - seen) * rate)
        passed.append(level >= 1)
        buckets[client] = (level - passed[-1], now)
    return passed
    # END SOLUTION


# %%
check("11-bucket", admit)


# %%
#| checks 11-bucket
def one_client(*times):
    return [("a", float(t)) for t in times]


@says("a burst passes up to its size", "A new bucket is full: `burst` requests pass at once.")
def _(admit):
    assert admit(one_client(0, 0, 0, 0, 0), 0.5, 3) == [True, True, True, False, False]


@says("tokens come back with time", "After 2 seconds at half a token a second there is one more.")
def _(admit):
    assert admit(one_client(0, 0, 2, 2), 0.5, 2) == [True, True, True, False]


@says("a bucket never holds more than burst", "An hour of silence does not save up a thousand.")
def _(admit):
    found = admit(one_client(0, 3600, 3600, 3600), 0.5, 2)
    assert found == [True, True, True, False]


@says("clients do not share a bucket", "Keep level and time of each client by its name.")
def _(admit):
    assert admit([("a", 0.0), ("b", 0.0), ("a", 0.0)], 0.5, 1) == [True, True, False]


@says(
    "a refused request costs nothing",
    "Whoever asks too early still passes when the token is there: keep the parts that have come.",
)
def _(admit):
    found = admit(one_client(0, 1, 2, 3, 4), 0.5, 1)
    assert found == [True, False, True, False, True]


# %%
#| hints 11-bucket
hints = [
    "Nothing has to run between two requests: how full is a bucket, given when it was last seen?",
    "Keep (level, time) for each client; level grows by (now - time) * rate, up to burst.",
    "Refill, compare with 1, take one only if it passed, and store the level and `now` either way.",
]


# %%
#| wrong 11-bucket: a bucket never holds more than burst
def admit(requests, rate, burst):
    buckets, passed = {}, []
    for client, now in requests:
        level, seen = buckets.get(client, (burst, now))
        level += (now - seen) * rate
        passed.append(level >= 1)
        buckets[client] = (level - passed[-1], now)
    return passed


# %%
#| wrong 11-bucket: clients do not share a bucket
def admit(requests, rate, burst):
    level, seen, passed = burst, 0.0, []
    for _, now in requests:
        level, seen = min(burst, level + (now - seen) * rate), now
        passed.append(level >= 1)
        level -= passed[-1]
    return passed


# %%
#| wrong 11-bucket: a refused request costs nothing
def admit(requests, rate, burst):
    buckets, passed = {}, []
    for client, now in requests:
        level, seen = buckets.get(client, (burst, now))
        level = min(burst, level + (now - seen) * rate)
        passed.append(level >= 1)
        buckets[client] = (level - 1, now)
    return passed


# %%
#| right 11-bucket
def admit(requests, rate, burst):
    full_at, passed = {}, []  # when each client's bucket will be full again
    for client, now in requests:
        start = max(now, full_at.get(client, now))
        fine = (start - now) * rate <= burst - 1
        if fine:
            full_at[client] = start + 1 / rate
        passed.append(fine)
    return passed


# %% [markdown]
r"""
## 6. An error that clients understand

A program that speaks OpenAI's dialect looks at two things when it is refused: the HTTP status and
the `type` in the body. On `rate_limit_error` it waits and tries again, on `invalid_request_error`
it does not. The first version of a server's error answer:

```python
def error_body(status, message, param=None):
    return {"error": message}
```

Clients crash on it, and on a day when something broke inside, `message` held the traceback, with
the paths and settings of the machine. Mend it. The body is

```text
{"error": {"message": ..., "type": ..., "param": ..., "code": None}}
```

The type is `authentication_error` for 401, `rate_limit_error` for 429, `server_error` from 500 up,
`invalid_request_error` otherwise. From 500 up the message is always
`"Something went wrong inside the server."`, whatever was passed: the truth goes into the log.
"""


# %%
#| exercise id=11-error points=1 minutes=8 level=1 answer=error_body
def error_body(status: int, message: str, param: str | None = None) -> dict:
    """Return the JSON body of an answer that is an error.

    Args:
        status: HTTP status, 400 to 599.
        message: a sentence for the person at the other end.
        param: the field of the request that is wrong, if it is one.
    """
    # BEGIN SOLUTION
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    if status >= 500:
        message = "Something went wrong inside the server."
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
    # END SOLUTION


# %%
check("11-error", error_body)


# %%
#| checks 11-error
@says("the body has the four fields", "One field error; in it message, type, param and code.")
def _(error_body):
    body = error_body(400, "x")
    assert set(body) == {"error"} and body["error"]["code"] is None
    assert set(body["error"]) == {"message", "type", "param", "code"}


@says("message and param are passed on", "The sentence says what is wrong, param says where.")
def _(error_body):
    error = error_body(400, "n must be 1.", "n")["error"]
    assert (error["message"], error["param"]) == ("n must be 1.", "n")


@says("the type follows from the status", "401 and 429 have types of their own; 5xx is the server.")
def _(error_body):
    kinds = {400: "invalid_request_error", 404: "invalid_request_error"}
    kinds.update({401: "authentication_error", 429: "rate_limit_error"})
    kinds.update({500: "server_error", 503: "server_error"})
    assert {status: error_body(status, "x")["error"]["type"] for status in kinds} == kinds


@says(
    "a fault of the server tells nothing",
    "From 500 up the message of the exception stays in the log: it may hold paths and secrets.",
)
def _(error_body):
    for status in (500, 503):
        error = error_body(status, "KeyError: '/home/ann/.token'")["error"]
        assert error["message"] == "Something went wrong inside the server."


# %%
#| hints 11-error
hints = [
    "Two statuses have a type of their own. The rest are told apart by one comparison.",
    "A small dict for 401 and 429, with `.get(status, the other two)`.",
    "Replace message when status >= 500, then build the dict with code None.",
]


# %%
#| wrong 11-error: a fault of the server tells nothing
def error_body(status, message, param=None):
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


# %%
#| wrong 11-error: the type follows from the status
def error_body(status, message, param=None):
    kind = "server_error" if status >= 500 else "invalid_request_error"
    if status >= 500:
        message = "Something went wrong inside the server."
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


# %%
#| wrong 11-error: the body has the four fields
def error_body(status: int, message: str, param: str | None = None) -> dict:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    if status >= 500:
        message = "Something went wrong inside the server."
    return {"error": {"message": message, "type": kind, "param": param}}


# %%
#| wrong 11-error: message and param are passed on
def error_body(status: int, message: str, param: str | None = None) -> dict:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    if status >= 500:
        message = "Something went wrong inside the server."
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


# %%
#| right 11-error
def error_body(status, message, param=None):
    error = dict(message=message, type="invalid_request_error", param=param, code=None)
    if status == 401:
        error["type"] = "authentication_error"
    elif status == 429:
        error["type"] = "rate_limit_error"
    elif status // 100 == 5:
        error.update(type="server_error", message="Something went wrong inside the server.")
    return {"error": error}


# %% [markdown]
r"""
## 7. Read the guard at the door

From the chapter's guard, with the token that was set when the server started:

```python
given = headers.get(b"authorization", b"")
if not hmac.compare_digest(given, b"Bearer " + self.token.encode()):
    return ApiError(401, "A valid access token is required (Authorization: Bearer).")
```

and from `run_server`, the address that is printed:

```text
http://192.0.2.7:8000/#token=...
```

**compare.** Why `compare_digest` and not `==`?

- (a) `==` on bytes may say equal for different tokens.
- (b) `==` ends at the first difference, so its time tells how much of a guess is right.
- (c) `compare_digest` hashes the token, so the server need not keep it.

**hash.** Why does the token stand behind `#`?

- (a) The browser keeps that part to itself: it is in no request, and so in no log on the way.
- (b) The browser encrypts that part.
- (c) A token behind `?` could not be read by the page's script.

**host.** Without a token the guard answers only if the header `Host` is localhost, although the
server listens on 127.0.0.1 alone. Against what?

- (a) Against other machines of the network, which could connect otherwise.
- (b) Against another program of the same machine.
- (c) Against a page of a foreign name that is made to point to 127.0.0.1 and then asks your server.
"""

# %%
#| exercise id=11-door points=1 minutes=8 level=2 answer=door
# A dict: {"compare": letter, "hash": letter, "host": letter}
# BEGIN SOLUTION
door = {"compare": "b", "hash": "a", "host": "c"}
# END SOLUTION

# %%
check("11-door", door)


# %%
#| checks 11-door
@says(
    "why compare_digest",
    "Both give the same result and neither hashes. What can a stranger measure from outside?",
)
def _(door):
    assert door["compare"].strip().lower() == "b"


@says(
    "why behind #",
    "Nothing in an address is encrypted by itself. Which part does a browser not send at all?",
)
def _(door):
    assert door["hash"].strip().lower() == "a"


@says(
    "why the Host is checked",
    "Nobody outside can connect to 127.0.0.1. Who sits inside and runs what strangers wrote?",
)
def _(door):
    assert door["host"].strip().lower() == "c"


# %%
#| hints 11-door
hints = [
    "For each answer ask: is what it says true at all? Several of them are not.",
    "Think of a thousand guesses with a stopwatch; of the log of a proxy; of a page you visit.",
    "The third is called DNS rebinding: the name is the stranger's, the address is yours.",
]

# %%
#| wrong 11-door: why compare_digest
door = {"compare": "c", "hash": "a", "host": "c"}

# %%
#| wrong 11-door: why behind #
door = {"compare": "b", "hash": "b", "host": "c"}

# %%
#| wrong 11-door: why the Host is checked
door = {"compare": "b", "hash": "a", "host": "a"}

# %%
#| right 11-door
door = dict(host="c", hash="a", compare="b")

# %% [markdown]
r"""
## 8. The oldest turn goes

A model with a window of 2,048 tokens cannot read a talk of 3,000. Cutting in the middle of a
message leaves half a sentence in front of the model; a talk that begins with an answer is a form
that it has never seen. So whole turns go, the oldest first and as few as possible, what is left
begins with a question, and the system message stays always: it says how to behave. And the answer
needs room, too: `reserve` tokens stay free.

`messages` are pairs (role, tokens), in order: perhaps one `"system"`, then `"user"` and
`"assistant"` in turn, the last one `"user"`. Return the positions of the messages that are kept, or
None if not even the last question fits. An error that says so is better than a silent cut.
"""


# %%
#| exercise id=11-window points=2 minutes=15 level=2 answer=kept
def kept(messages: list, window: int, reserve: int) -> list | None:
    """Return the positions of the messages that go into the prompt, rising.

    Args:
        messages: (role, number of tokens) pairs.
        window: tokens that prompt and answer may have together.
        reserve: tokens kept free for the answer.
    """
    # BEGIN SOLUTION
    system = [i for i, (role, _) in enumerate(messages) if role == "system"]
    for start, (role, _) in enumerate(messages):
        chosen = system + [*range(start, len(messages))]
        if role == "user" and sum(messages[i][1] for i in chosen) + reserve <= window:
            return chosen
    return None
    # END SOLUTION


# %%
check("11-window", kept)


# %%
#| checks 11-window
def talk(*sizes, system=None):
    roles = ["user", "assistant"] * len(sizes)
    first = [("system", system)] if system else []
    return [*first, *zip(roles, sizes)]


@says("a talk that fits stays whole", "Up to and including the last token of the window.")
def _(kept):
    assert list(kept(talk(10, 10, 10), 30, 0)) == [0, 1, 2]
    assert list(kept(talk(10, 10, 10, system=5), 35, 0)) == [0, 1, 2, 3]


@says("as few old turns go as possible", "Drop from the front, and stop as soon as the rest fits.")
def _(kept):
    assert list(kept(talk(10, 10, 10, 10, 10), 30, 0)) == [2, 3, 4]
    assert list(kept(talk(50, 10, 10, 10, 10), 35, 0)) == [2, 3, 4]


@says("what is left begins with a question", "A question goes together with its answer.")
def _(kept):
    assert list(kept(talk(10, 10, 10), 25, 0)) == [2]
    assert list(kept(talk(30, 5, 5, 5, 5), 24, 0)) == [2, 3, 4]


@says("the system message stays", "It is always kept, and its tokens count.")
def _(kept):
    assert list(kept(talk(10, 10, 10, 10, 10, system=10), 40, 0)) == [0, 3, 4, 5]


@says("the answer has its room", "Prompt and reserve together must fit into the window.")
def _(kept):
    assert list(kept(talk(10, 10, 10, 10, 10), 50, 20)) == [2, 3, 4]


@says("a question that cannot fit is None", "Say so with None; do not send an empty prompt.")
def _(kept):
    assert kept(talk(10, 10, 40), 30, 0) is None and kept(talk(10, system=25), 30, 0) is None


# %%
#| hints 11-window
hints = [
    "Where may the kept part begin? List the places, oldest first, and take the first that fits.",
    "The places are the positions of user messages; the system message is added to each.",
    "For each start with role user: system + range(start, n); sum of tokens + reserve <= window.",
]


# %%
#| wrong 11-window: what is left begins with a question
def kept(messages, window, reserve):
    system = [i for i, (role, _) in enumerate(messages) if role == "system"]
    for start in range(len(system), len(messages)):
        chosen = system + [*range(start, len(messages))]
        if sum(messages[i][1] for i in chosen) + reserve <= window:
            return chosen
    return None


# %%
#| wrong 11-window: the answer has its room
def kept(messages, window, reserve):
    system = [i for i, (role, _) in enumerate(messages) if role == "system"]
    for start, (role, _) in enumerate(messages):
        chosen = system + [*range(start, len(messages))]
        if role == "user" and sum(messages[i][1] for i in chosen) <= window:
            return chosen
    return None


# %%
#| wrong 11-window: a question that cannot fit is None
def kept(messages, window, reserve):
    system = [i for i, (role, _) in enumerate(messages) if role == "system"]
    for start, (role, _) in enumerate(messages):
        chosen = system + [*range(start, len(messages))]
        if role == "user" and sum(messages[i][1] for i in chosen) + reserve <= window:
            return chosen
    return system


# %%
#| right 11-window
def kept(messages, window, reserve):
    room, best, system = window - reserve, None, []
    if messages[0][0] == "system":
        room, system = room - messages[0][1], [0]
    for start in range(len(messages) - 1, len(system) - 1, -1):
        room -= messages[start][1]
        if room < 0:
            break
        if messages[start][0] == "user":
            best = system + list(range(start, len(messages)))
    return best


# %% [markdown]
r"""
## Open question

Two of your friends use your server at once, and their tokens are computed together. Would you
rather answer one friend after the other, as a queue? Which of the two is better for the time to
first token, for the time to the last, and for a friend with a long prompt? How would your answer
change without batching (chapter 8), if each step served one friend only? (No marks.)
"""

# %%
progress()
