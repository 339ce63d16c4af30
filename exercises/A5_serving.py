# %% [markdown]
r"""
# Exercises for appendix A5: serving it

Between a model and its readers stand a wire and a door. Here you write the parts that decide
whether they hold: how an answer travels in pieces, where it is cut, who may ask how often, and who
may come in. No server runs in this sheet. `check` says which properties your answer has, `hint`
helps three times, `progress()` shows your points.
"""

# %%
#| given
import json
import re

# %%
from book.graded import check, hint, progress

# %% [markdown]
r"""
## 1. Write an event

An answer that streams is a row of server-sent events: a line `data: ` with JSON behind it, and an
empty line. A token may hold a newline. Left as it is, it would end the event in the middle of the
text; written as JSON it is the two characters `\n`, and the event stays one line. Letters of other
alphabets are written as they are, not as `\u` escapes. The last event of a stream is no JSON but
the bare word `[DONE]`, so text is passed through as it is. This is the book's `event`.
"""


# %%
#| exercise id=A5-event points=1 minutes=6 level=1 answer=event replaces=serve.event
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
check("A5-event", event)

# %%
#| checks A5-event
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
#| hints A5-event
hints = [
    "Which of the two kinds of data is already a text?",
    "json.dumps has an option that keeps letters outside ASCII as they are.",
    'text, or `json.dumps(data, ensure_ascii=False)`; then `f"data: {text}\\n\\n"`.',
]


# %%
#| wrong A5-event: what it carries is JSON
def event(data):
    return f"data: {data}\n\n"


# %%
#| wrong A5-event: text is sent as it is
def event(data):
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


# %%
#| wrong A5-event: other alphabets stay readable
def event(data):
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n"


# %%
#| wrong A5-event: one line and an empty line
def event(data) -> str:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n"


# %%
#| right A5-event
def event(data):
    if not isinstance(data, str):
        data = json.dumps(data, ensure_ascii=False, sort_keys=False)
    return "data: " + data + 2 * "\n"


# %% [markdown]
r"""
## 2. Read a stream

Now the other end. The network hands over text in chunks and keeps no promise about where it cuts:
in the middle of an event, of a word, of `[DONE]`. A program that parses chunk by chunk works on the
author's machine, where chunk and event happen to be the same, and loses tokens everywhere else.

Return the JSON values of all events up to `[DONE]`. Lines end with `\n` or `\r\n`. The blank after
`data:` may be missing. Lines that do not begin with `data:` (comments such as `: keep-alive`,
fields such as `event: x`) are skipped. If the connection breaks, the last line may be half a line
without an end: drop it.
"""


# %%
#| exercise id=A5-stream points=3 minutes=20 level=2 answer=read_stream
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
check("A5-stream", read_stream)

# %%
#| checks A5-stream
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


@says("the blank after data: may be missing", "Compare with data: alone, then strip what follows.")
def _(read_stream):
    stream = [event.replace("data: {", "data:{") for event in written(VALUES)]
    assert read_stream([*stream, "data: [DONE]\n\n"]) == VALUES


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
#| hints A5-stream
hints = [
    "What you cannot parse yet, you must keep. Which part of a chunk is that?",
    r'`*lines, rest = (rest + chunk).split("\n")`: whole lines, and what may go on in the next.',
    "For each whole line: skip it unless it begins with data:, strip, stop at [DONE], json.loads.",
]


# %%
#| wrong A5-stream: an event may be cut anywhere
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
#| wrong A5-stream: nothing counts after [DONE]
def read_stream(chunks):
    lines = "".join(chunks).split("\n")[:-1]
    data = [line[5:].strip() for line in lines if line.startswith("data:")]
    return [json.loads(one) for one in data if one != "[DONE]"]


# %%
#| wrong A5-stream: the blank after data: may be missing
def read_stream(chunks):
    found = []
    for line in "".join(chunks).split("\n")[:-1]:
        if line.strip() == "data: [DONE]":
            return found
        if line.startswith("data: "):
            found.append(json.loads(line[6:]))
    return found


# %%
#| wrong A5-stream: only a newline ends a line
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
#| wrong A5-stream: half a line at the end is dropped
def read_stream(chunks):
    found = []
    for line in "".join(chunks).split("\n"):
        if line.strip() == "data: [DONE]":
            break
        if line.startswith("data:"):
            found.append(json.loads(line[5:]))
    return found


# %%
#| wrong A5-stream: other lines are skipped
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
#| wrong A5-stream: lines may end with \r\n
def read_stream(chunks: list) -> list:
    found, rest = [], ""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            data = line.removeprefix("data:").removeprefix(" ")
            if line.startswith("data:") and data == "[DONE]":
                return found
            if line.startswith("data:"):
                found.append(json.loads(data))
    return found


# %%
#| right A5-stream
def read_stream(chunks):
    text, found = "".join(chunks), []
    for data in re.findall(r"(?m)^data:[ ]?([^\n]*?)\r?\n", text):
        if data == "[DONE]":
            break
        found.append(json.loads(data))
    return found


# %% [markdown]
r"""
## 3. Stop strings that come in halves

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
#| exercise id=A5-stop points=3 minutes=30 level=3 answer=shown
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
check("A5-stop", shown)


# %%
#| checks A5-stop
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
#| hints A5-stop
hints = [
    "Work on `text = held + piece`. There are two cases: a stop string is in it, or it is not.",
    "If not: what is the longest end of text with which some stop string begins? Hold that.",
    "Try all sizes: `any(stop.startswith(text[-size:]) for stop in stops)`; the largest counts.",
]


# %%
#| wrong A5-stop: a stop string may be cut into pieces
def shown(pieces, stops):
    out, stopped = [], False
    for piece in pieces:
        places = [piece.find(stop) for stop in stops if stop in piece]
        out.append("" if stopped else piece[: min(places, default=len(piece))])
        stopped = stopped or bool(places)
    return [*out, ""]


# %%
#| wrong A5-stop: only what may become a stop string waits
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
#| wrong A5-stop: the first place counts, not the first string
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
#| wrong A5-stop: nothing is lost when no stop string comes
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
#| right A5-stop
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
## 4. A bucket of tokens

One client with a loop can keep the model busy for everybody. The common remedy is a **token
bucket** for each client (these tokens have nothing to do with text). A bucket holds at most
`burst` tokens and is full when the client is first seen. It gains `rate` tokens a second, also
parts of one. A request takes one token and passes; with less than one token it is refused and takes
nothing. So a person may click five times in a row, and a script still gets `rate` a second.

Requests come in the order of time, as pairs (client, seconds). Say of each whether it passes.
"""


# %%
#| exercise id=A5-bucket points=2 minutes=20 level=2 answer=admit
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
check("A5-bucket", admit)


# %%
#| checks A5-bucket
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
#| hints A5-bucket
hints = [
    "Nothing has to run between two requests: how full is a bucket, given when it was last seen?",
    "Keep (level, time) for each client; level grows by (now - time) * rate, up to burst.",
    "Refill, compare with 1, take one only if it passed, and store the level and `now` either way.",
]


# %%
#| wrong A5-bucket: a bucket never holds more than burst
def admit(requests, rate, burst):
    buckets, passed = {}, []
    for client, now in requests:
        level, seen = buckets.get(client, (burst, now))
        level += (now - seen) * rate
        passed.append(level >= 1)
        buckets[client] = (level - passed[-1], now)
    return passed


# %%
#| wrong A5-bucket: clients do not share a bucket
def admit(requests, rate, burst):
    level, seen, passed = burst, 0.0, []
    for _, now in requests:
        level, seen = min(burst, level + (now - seen) * rate), now
        passed.append(level >= 1)
        level -= passed[-1]
    return passed


# %%
#| wrong A5-bucket: a refused request costs nothing
def admit(requests, rate, burst):
    buckets, passed = {}, []
    for client, now in requests:
        level, seen = buckets.get(client, (burst, now))
        level = min(burst, level + (now - seen) * rate)
        passed.append(level >= 1)
        buckets[client] = (level - 1, now)
    return passed


# %%
#| right A5-bucket
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
## 5. An error that clients understand

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
#| exercise id=A5-error points=1 minutes=8 level=1 answer=error_body
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
check("A5-error", error_body)


# %%
#| checks A5-error
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
#| hints A5-error
hints = [
    "Two statuses have a type of their own. The rest are told apart by one comparison.",
    "A small dict for 401 and 429, with `.get(status, the other two)`.",
    "Replace message when status >= 500, then build the dict with code None.",
]


# %%
#| wrong A5-error: a fault of the server tells nothing
def error_body(status, message, param=None):
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


# %%
#| wrong A5-error: the type follows from the status
def error_body(status, message, param=None):
    kind = "server_error" if status >= 500 else "invalid_request_error"
    if status >= 500:
        message = "Something went wrong inside the server."
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


# %%
#| wrong A5-error: the body has the four fields
def error_body(status: int, message: str, param: str | None = None) -> dict:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    if status >= 500:
        message = "Something went wrong inside the server."
    return {"error": {"message": message, "type": kind, "param": param}}


# %%
#| wrong A5-error: message and param are passed on
def error_body(status: int, message: str, param: str | None = None) -> dict:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    if status >= 500:
        message = "Something went wrong inside the server."
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


# %%
#| right A5-error
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
## 6. Read the guard at the door

From the appendix's guard, with the token that was set when the server started:

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
#| exercise id=A5-door points=1 minutes=8 level=2 answer=door
# A dict: {"compare": letter, "hash": letter, "host": letter}
# BEGIN SOLUTION
door = {"compare": "b", "hash": "a", "host": "c"}
# END SOLUTION

# %%
check("A5-door", door)


# %%
#| checks A5-door
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
#| hints A5-door
hints = [
    "For each answer ask: is what it says true at all? Several of them are not.",
    "Think of a thousand guesses with a stopwatch; of the log of a proxy; of a page you visit.",
    "The third is called DNS rebinding: the name is the stranger's, the address is yours.",
]

# %%
#| wrong A5-door: why compare_digest
door = {"compare": "c", "hash": "a", "host": "c"}

# %%
#| wrong A5-door: why behind #
door = {"compare": "b", "hash": "b", "host": "c"}

# %%
#| wrong A5-door: why the Host is checked
door = {"compare": "b", "hash": "a", "host": "a"}

# %%
#| right A5-door
door = dict(host="c", hash="a", compare="b")

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
