# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# A5. Serving it

By the end of this appendix you have shown that one engine can answer many readers over the
network: the first words of an answer come at once, however long it gets; requests take turns token
by token; and whatever a stranger sends is met by a limit and one clear sentence.

Chapter 11 put a window around the engine, inside one notebook. Everybody else speaks HTTP. As in
chapter 11 we begin without a model. The engine below is a **parrot**: it has the one method that a
server asks of an engine, `generate`, and yields the `Token` objects of chapter 8, ten milliseconds
apart.
"""

# %%
import time
from types import SimpleNamespace

from nanochat.engine import Token


class Parrot:
    """An engine that repeats the last question."""

    def __init__(self, tokenizer, delay=0.01):
        self.tokenizer, self.delay = tokenizer, delay
        self.model = SimpleNamespace(config=SimpleNamespace(seq_len=512))

    def generate(self, ids, max_tokens=256, stop=None, **ignored):
        start = len(ids) - ids[::-1].index(self.tokenizer.special("user_start"))
        end = len(ids) - 1 - ids[::-1].index(self.tokenizer.special("user_end"))
        answer = self.tokenizer.encode("You said: " + self.tokenizer.decode(ids[start:end]))
        for token in answer[:max_tokens]:
            time.sleep(self.delay)
            if stop is not None and stop.is_set():
                return
            yield Token(token, self.tokenizer.decode([token]), -0.1, False)


# %% [markdown]
r"""
The cold open: the finished server around the parrot, and a client that knows nothing about either,
Python's own `urllib`. We print the beginning and the end of each raw line that comes over the wire.
"""

# %%
import json
import urllib.error
import urllib.request

from nanochat.serve import background_server, create_app
from nanochat.tinyworld import World, document
from nanochat.tokenizer import Tokenizer


def post(url, body, headers=None):
    """POST JSON; returns the open response, which can be read line by line."""
    data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(url, data, {**kind, **(headers or {})}))


world = World(seed=0)
parrot = Parrot(Tokenizer.train([document(world, i) for i in range(300)], 512))
hello = [{"role": "user", "content": "Hello, wire"}]
with background_server(create_app(parrot)) as address:
    with post(address + "/v1/chat/completions", {"messages": hello, "stream": True}) as response:
        lines = [line.decode().strip() for line in response]
events = [line for line in lines if line]
for line in events[1:5] + events[-2:]:
    print(line if len(line) < 60 else f"{line[:14]} ... {line[-80:]}")

# %% [markdown]
r"""
**You will be able to**

1. write and read server-sent events, and say what "time to first token" measures over a network;
2. call our server from any client that speaks OpenAI's API, and name what travels beside it;
3. let many requests share one engine, in turns, and give back what a request holds however it ends;
4. name the limits that a server needs before it may listen to anybody but you;
5. say what stands between a page you visit and your model.

**Before this**: chapters 8 (the engine) and 11 (`ChatSession`, `Piece`). **To read**: 30 minutes.
**To run**: about 15 seconds on two CPU cores, offline. It needs the extra
`pip install "nanochat[serve]"`.
"""

# %% tags=["parameters"]
profile = "quick"
depth, width, seq_len = 4, 256, 256  # of the model whose answers are timed
seed = 0

# %%
#| default_exp serve

# %%
#| export
import asyncio
import hmac
import http.client
import json
import logging
import queue
import secrets
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from nanochat.common import UserError
from nanochat.engine import KVCache
from nanochat.model import GPT
from nanochat.tokenizer import Tokenizer
from nanochat.ui import (
    ChatSettings,
    Piece,
    add_piece,
    check_messages,
    fit_context,
    generate_pieces,
    name_engines,
)

# %% [markdown]
r"""
## An answer that comes in pieces

Most programs that talk to a language model speak one dialect of HTTP, OpenAI's:
`POST /v1/chat/completions` with a JSON list of messages. If our server speaks it, those programs
work with our model unchanged.

How can an HTTP answer arrive in pieces? The server does not say how long the answer will be, and
keeps the connection open. The common shape is **server-sent events**: a line that begins with
`data: `, and an empty line after each event. The dialect ends the stream with the event `[DONE]`.
"""


# %%
#| export
def event(data: Any) -> str:
    """One server-sent event that carries JSON (or the word [DONE])."""
    text = data if isinstance(data, str) else json.dumps(data)
    return f"data: {text}\n\n"


def read_events(lines: Iterator[str]) -> Iterator[Any]:
    """The JSON of each server-sent event in a stream of lines, up to [DONE].

    Raises UserError when an event is no JSON.
    """
    for line in lines:
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data == "[DONE]":
            return
        if line.startswith("data:"):
            try:
                yield json.loads(data)
            except (ValueError, RecursionError):
                raise UserError(f"An event is not valid JSON; found {data!r:.40}.") from None


# %%
stream = event({"token": "Hel"}) + event({"token": "lo\n"}) + event("[DONE]")
print(stream)
print(list(read_events(iter(stream.splitlines()))))

# %% [markdown]
r"""
A newline inside the text is no trouble: JSON writes it as `\n`, so an event stays one line. We let
JSON escape everything that is not ASCII too. Unicode knows other line ends (U+2028, for one), and
some clients cut there, in the middle of an event.

> **Exercise A5.1.** The network cuts a stream where it likes, also inside a word of an event. What
> does `read_events` do with half a line, and who must put the halves together? (In the sheet:
> `A5-stream`.)

## Limits before features

A server that listens meets requests that nobody would type: a body of a gigabyte, a temperature of
`NaN`, a thousand connections that never read. Every resource gets a number, and passing it is a
clear answer with a status from 400 to 499 (the client is wrong) or 503 (come back later). The
defaults fit a laptop.
"""


# %%
#| export
@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may use."""

    body_bytes: int = 262_144
    messages: int = 500
    message_characters: int = 8_000
    characters: int = 32_000  # of all messages together
    max_tokens: int = 4_096  # of one answer
    concurrent: int = 16  # answers being written at the same time
    waiting: int = 64  # requests that may wait for their turn
    per_client: int = 8  # of those two together, from one address (a proxy is one address)
    seconds: float = 120.0  # of one request, waiting included


# %% [markdown]
r"""
An error is an answer, too. Clients look at two things: the HTTP status, and the `type` in the body
that tells them whether trying again makes sense.
"""


# %%
#| export
class ApiError(Exception):
    """An answer that is an error: HTTP status and a sentence for the person at the other end."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param

    def body(self) -> dict[str, Any]:
        """The error in the shape that OpenAI's clients expect."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        server = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = kinds.get(self.status, server)
        error = {"message": self.message, "type": kind, "param": self.param, "code": None}
        return {"error": error}


# %% [markdown]
r"""
The fields of a request stand in one table: name, type, lowest and highest value. `check_fields`
checks a request by it. A field that is `null` counts as left out, as many clients send it so; a
field that is not in the table is passed over, because clients know many that we do not.
"""


# %%
#| export
FIELDS = {
    "model": ("string", None, None),
    "temperature": ("number", 0, 2),
    "top_p": ("number", 0, 1),
    "top_k": ("integer", 0, 100_000),  # 0 keeps all tokens
    "max_tokens": ("integer", 1, None),
    "max_completion_tokens": ("integer", 1, None),
    "seed": ("integer", -(2**63), 2**63 - 1),
    "top_logprobs": ("integer", 0, 20),
    "n": ("integer", 1, 1),
    "stream": ("boolean", None, None),
    "stream_options": ("object", None, None),
}
_TYPES = {"string": str, "integer": int, "boolean": bool, "object": dict, "array": list}


def check_fields(body: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """The known fields of a request that are not null, checked against FIELDS."""
    values = {}
    for name, (kind, low, high) in FIELDS.items():
        value = body.get(name)
        if value is None:
            continue
        high = limits.max_tokens if name.endswith("_tokens") else high
        fine = isinstance(value, _TYPES.get(kind, (int, float)))
        fine = fine and isinstance(value, bool) == (kind == "boolean")
        if not fine:
            raise ApiError(400, f"{name} must be of type {kind}.", name)
        if low is not None and not low <= value <= high:
            raise ApiError(400, f"{name} must be from {low} to {high}.", name)
        values[name] = value
    return values


# %%
for body in ({"temperature": 0.5, "seed": None, "user": "me"}, {"temperature": 99}, {"n": "one"}):
    try:
        print(body, "->", check_fields(body, Limits()))
    except ApiError as error:
        print(body, "->", error.status, error.message)

# %% [markdown]
r"""
The same table becomes the schema that the server publishes at `/openapi.json`. So what is checked
and what is documented cannot drift apart, and a program can read the schema and try thousands of
requests that it allows: the tests do, and no such request may end in a status of 500.
"""


# %%
#| export
def message_schema() -> dict[str, Any]:
    """One message of a request: text, or a list of parts."""
    kinds = {"enum": ["text", "python", "python_output"]}
    part = {"type": "object", "required": ["type", "text"]}
    part["properties"] = {"type": kinds, "text": {"type": "string"}}
    content = {"anyOf": [{"type": "string"}, {"type": "array", "items": part}]}
    role = {"enum": ["system", "user", "assistant"]}
    properties = {"role": role, "content": content}
    return {"type": "object", "required": ["role", "content"], "properties": properties}


def request_schema(chat: bool, limits: Limits) -> dict[str, Any]:
    """The same table as an OpenAPI request body."""
    properties: dict[str, Any] = {}
    for name, (kind, low, high) in FIELDS.items():
        high = limits.max_tokens if name.endswith("_tokens") else high
        bounds = {} if low is None else {"minimum": low, "maximum": high}
        properties[name] = {"type": [kind, "null"], **bounds}
    stop = {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 4}
    properties["stop"] = {"anyOf": [{"type": "string", "minLength": 1}, stop, {"type": "null"}]}
    main = "messages" if chat else "prompt"
    talk = {"type": "array", "items": message_schema(), "minItems": 1, "maxItems": limits.messages}
    properties[main] = talk if chat else {"type": "string"}
    schema = {"type": "object", "required": [main], "properties": properties}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


# %% [markdown]
r"""
Before fields can be checked there must be a JSON object. Python's reader is generous: it takes
`NaN`, and half of a surrogate pair, which is no text and would break whoever prints it later. It
also recurses into `[[[[...`. All three become one 400.
"""


# %%
#| export
def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object from a request's body; NaN, other types and broken bytes are refused."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    try:
        body = json.loads(data.decode("utf-8"), parse_constant=refuse)
        json.dumps(body, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
    except (ValueError, RecursionError):
        raise ApiError(400, "The body is not valid JSON in UTF-8.") from None
    if not isinstance(body, dict):
        raise ApiError(400, "The body must be a JSON object.")
    return body


# %% [markdown]
r"""
Now the parts with a meaning: the conversation (checked by the same `check_messages` as a saved
file), the settings, whether log-probabilities are wanted, and the strings at which the client wants
the answer to end.
"""


# %%
#| export
def read_messages(body: dict[str, Any], limits: Limits) -> list[dict[str, Any]]:
    """The checked conversation of a chat request; it must end with a question."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list with at least one message.", "messages")
    if len(messages) > limits.messages:
        raise ApiError(400, f"At most {limits.messages} messages are allowed.", "messages")
    messages = check_messages(messages)
    if messages[-1]["role"] != "user":
        raise ApiError(400, "The last message must have the role user.", "messages")
    sizes = [len(json.dumps(message["content"], ensure_ascii=False)) for message in messages]
    if max(sizes) > limits.message_characters + 2 or sum(sizes) > limits.characters:
        raise ApiError(
            400,
            f"A message may have {limits.message_characters} characters and a conversation "
            f"{limits.characters}.",
            "messages",
        )
    return messages


# %%
#| export
def read_settings(values: dict[str, Any], limits: Limits) -> ChatSettings:
    """Settings of a request; without a seed, a random one."""
    length = values.get("max_completion_tokens", values.get("max_tokens", limits.max_tokens))
    seed = values.get("seed", secrets.randbelow(2**31))
    return ChatSettings(
        temperature=values.get("temperature", 0.8),
        top_k=values.get("top_k", 50) or None,
        top_p=max(values["top_p"], 1e-6) if "top_p" in values else None,
        max_tokens=length,
        seed=seed % 2**31,
    ).check()


def read_logprobs(body: dict[str, Any], values: dict[str, Any], chat: bool) -> tuple[bool, int]:
    """Whether log-probabilities are asked for, and how many of the likeliest at each place."""
    asked, top = body.get("logprobs"), values.get("top_logprobs", 0)
    if not chat:  # there `logprobs` is a number, and 0 asks for those of the tokens themselves
        return isinstance(asked, int) and asked is not False, 0
    if top and not asked:
        raise ApiError(400, "top_logprobs needs logprobs: true.", "top_logprobs")
    return bool(asked), top


# %%
#| export
def read_prompt(body: dict[str, Any], limits: Limits) -> str:
    """The prompt of a plain completion: one text, or a list with one text."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise ApiError(400, "prompt must be one text.", "prompt")
    if len(prompt) > limits.characters:
        raise ApiError(400, f"prompt may have {limits.characters} characters.", "prompt")
    return prompt


def read_stops(body: dict[str, Any]) -> list[str]:
    """The stop strings of a request: none, one, or up to four."""
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    fine = isinstance(stops, list) and len(stops) <= 4
    if not fine or not all(isinstance(s, str) and 0 < len(s) <= 100 for s in stops):
        raise ApiError(400, "stop must be up to four texts of 1 to 100 characters.", "stop")
    return stops


# %% [markdown]
r"""
A stop string may arrive in two tokens: `"\nUs"` and then `"er:"`. What was sent cannot be taken
back, so text that *could* be the beginning of a stop string waits until we know. `StopStrings`
holds back as little as possible: the longest end of the text with which a stop string begins.
"""


# %%
#| export
class StopStrings:
    """Cut a stream of text at the first stop string; `push` returns (text to show, found)."""

    def __init__(self, stops: list[str]) -> None:
        self.stops, self.held = stops, ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take more text; hold back an end that may be the beginning of a stop string."""
        text = self.held + text
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.held = ""
            return text[: min(found)], True
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        keep = 0
        for size in range(1, min(longest, len(text)) + 1):
            if any(stop.startswith(text[-size:]) for stop in self.stops):
                keep = size
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, when the stream ends without a stop string."""
        text, self.held = self.held, ""
        return text


# %%
#| test
_stops = StopStrings(["END", "\n\n"])
assert [_stops.push(t) for t in ("a E", "N", "x EN", "D b")] == [
    ("a ", False),
    ("", False),
    ("ENx ", False),
    ("", True),
]

# %% [markdown]
r"""
> **Exercise A5.2.** Write `StopStrings` yourself, and count how often it makes the stream stutter.
> (In the sheet: `A5-stop`.)

## One thread owns the model

Sixteen people ask at once. Sixteen threads that all compute would fight for two cores, and nobody
could say who gets the next turn. We keep **one** engine thread and a queue of steps. A step is one
token of one reply. Each request puts its next step at the end of the queue when the one before is
done, so requests take turns, token by token, and nobody waits for somebody else's whole reply.

Taking turns need not mean working for one at a time. The streams of one engine share its loop
(chapter 8): whoever asks first has a token computed for all of them together, and the others find
theirs ready when their turn comes. The server knows nothing of it; it asks for the next piece.

Two more things fall out of the queue. The engine is never used by two threads. And a client that
disconnects puts no further step into it.
"""


# %%
#| export
class EngineThread:
    """The one thread that computes. `steps` pulls an iterator there, one item at a time."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="engine")

    async def call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the engine thread and wait for it without blocking the server."""

        def step() -> Any:
            with torch.inference_mode():
                return function()

        return await asyncio.get_running_loop().run_in_executor(self.pool, step)

    async def steps(self, iterator: Iterator[Any]) -> AsyncIterator[Any]:
        """The items of an iterator; each is a new entry at the end of the queue."""
        while (item := await self.call(lambda: next(iterator, None))) is not None:
            yield item

    def close(self, iterator: Iterator[Any]) -> None:
        """Close an iterator after the step that may be running now."""
        self.pool.submit(iterator.close)


# %% [markdown]
r"""
How is the server doing? Counters answer that, in the text format that Prometheus collects. The
event loop runs in one thread and only it touches them, so they need no lock.
"""


# %%
#| export
class Metrics:
    """Counters for /metrics, in Prometheus' text format. Used from the event loop only."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, int], int] = {}
        self.prompt_tokens = self.generated_tokens = self.replies = 0
        self.active = self.waiting = self.disconnects = 0
        self.first_token_seconds = 0.0

    def text(self) -> str:
        """All counters as Prometheus reads them."""
        lines = ["# TYPE nanochat_requests_total counter"]
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'nanochat_requests_total{{path="{path}",status="{status}"}} {count}')
        kinds = {"prompt_tokens": "counter", "generated_tokens": "counter", "replies": "counter"}
        kinds.update(disconnects="counter", active="gauge", waiting="gauge")
        for name, kind in kinds.items():
            full = f"nanochat_{name}" + ("_total" if kind == "counter" else "")
            lines += [f"# TYPE {full} {kind}", f"{full} {getattr(self, name)}"]
        lines += ["# TYPE nanochat_first_token_seconds summary"]
        lines += [f"nanochat_first_token_seconds_sum {self.first_token_seconds:.6f}"]
        lines += [f"nanochat_first_token_seconds_count {self.replies}"]
        return "\n".join(lines) + "\n"


# %% [markdown]
r"""
Who may come in? `Slots` lets a fixed number of requests run and a fixed number wait; the rest hear
429, "try again later", at once. One address may not take all places. Whatever is taken must come
back exactly once, so `take` returns a function that does it, and a second call does nothing: then
the end of a reply and the end of a connection can both call it without asking who was first.

Who waits may also leave. Now and then we ask whether the client is still there, and once more when
its turn has come: whoever has left gives up the place, and costs the engine nothing.
"""


# %%
#| export
LOOK = 0.25  # seconds between two looks for a waiting client that has left


class Slots:
    """Admit `concurrent` jobs, `per_client` from one address; let `waiting` more queue.

    The rest is turned away with 429.
    """

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self.limits, self.metrics = limits, metrics
        self.free = asyncio.Semaphore(limits.concurrent)
        self.clients: Counter[str] = Counter()  # requests by address, waiting or running

    async def take(self, client: str, gone: Callable[[], Any]) -> Callable[[], None]:
        """Wait for a slot; returns the function that gives it back (calling twice is harmless).

        Raises ApiError when there is no place or no time left, or when `gone()` says that the
        client has left.
        """
        metrics, most = self.metrics, self.limits.per_client
        if self.clients[client] >= most:
            raise ApiError(429, f"At most {most} requests at a time from one client: wait for one.")
        if self.free.locked() and metrics.waiting >= self.limits.waiting:
            raise ApiError(429, "The server is busy: too many requests wait. Try again later.")
        metrics.waiting += 1
        self.clients[client] += 1
        try:
            await self._wait(gone)
        except BaseException:
            self._forget(client)
            raise
        finally:
            metrics.waiting -= 1
        metrics.active += 1
        held = [True]

        def give_back() -> None:
            if held:
                held.clear()
                metrics.active -= 1
                self._forget(client)
                self.free.release()

        return give_back

    async def _wait(self, gone: Callable[[], Any]) -> None:
        slot = asyncio.ensure_future(self.free.acquire())
        end = time.perf_counter() + self.limits.seconds
        try:
            while not slot.done():
                left = max(0.0, end - time.perf_counter())
                await asyncio.wait({slot}, timeout=min(LOOK, left))
                if await gone():
                    self.metrics.disconnects += 1
                    raise ApiError(499, "The client has left.")
                if not slot.done() and not left:
                    raise ApiError(503, "The server is busy: no free slot in time. Try again.")
        except BaseException:
            if not slot.cancel():  # it came in this very moment: on to the next
                self.free.release()
            raise

    def _forget(self, client: str) -> None:
        self.clients[client] -= 1
        if not self.clients[client]:
            del self.clients[client]


# %% [markdown]
r"""
A `Job` is one admitted request: what to pull from, where to cut, and what to give back. Its `run`
is the one loop that every answer goes through, streamed or not. It counts tokens, cuts at stop
strings and at the deadline; a call of the calculator lets go of what was held back before it. Each
piece comes with the text to show now, which a stop string may have held back or cut: a token keeps
its own text, for the log-probabilities belong to that.
"""


# %%
#| export
@dataclass
class Job:
    """One admitted request: where its pieces come from, and what to give back at the end."""

    id: str
    model: str
    kind: str  # "chat.completion" or "text_completion"
    ids: list[int]  # of the prompt
    pieces: Iterator[Piece]
    stop: threading.Event
    stops: StopStrings
    release: Callable[[], None]
    engine: EngineThread
    metrics: Metrics
    deadline: float  # on the clock of time.perf_counter
    note: str = ""
    logprobs: bool = False
    usage: bool = False  # whether a stream ends with the number of tokens
    tokens: int = 0
    finished: bool = False

    def close(self) -> None:
        """Stop computing and free the slot; harmless when called again."""
        self.stop.set()
        self.engine.close(self.pieces)
        self.release()

    async def run(self) -> AsyncIterator[tuple[Piece, str]]:
        """Each piece and its text to show, which ends at a stop string or at the deadline.

        The last piece is "end".
        """
        started, end = time.perf_counter(), Piece("end", "stop")
        async for piece in self.engine.steps(self.pieces):
            if piece.kind == "end":
                end = piece
                break
            self.tokens += 1
            self.metrics.generated_tokens += 1
            if self.tokens == 1:
                self.metrics.replies += 1
                self.metrics.first_token_seconds += time.perf_counter() - started
            if piece.kind == "text":
                shown, found = self.stops.push(piece.text)
                yield piece, shown
                if found:
                    break
            else:
                if held := self.stops.flush():
                    yield Piece("text"), held
                yield piece, piece.text
            if time.perf_counter() > self.deadline:
                end = Piece("end", "length")
                break
        if held := self.stops.flush():
            yield Piece("text"), held
        yield end, ""


# %% [markdown]
r"""
## What the model would have said instead

A client may ask for `logprobs`: the log-probability of each token. The engine reports it with
every token. A client may also ask for `top_logprobs: 5`, the five likeliest tokens at each place;
debuggers and classifiers live on that. The engine does not report them, for it would have to search
the vocabulary at every step, for everybody.

`ReadAlong` finds them for those who ask: it reads the prompt and then each token of the answer once
more, with a cache of its own (chapter 8), and looks at the logits before each. So such a request
reads everything twice; the others wait for these steps as for those of any reader. It works for
streamed answers, because it never needs a token that has not come yet.
"""


# %%
#| export
class ReadAlong:
    """Reads an answer after the engine, one token at a time, and tells what was likely there."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, ids: Sequence[int], room: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        size = len(ids) + room
        self.cache = KVCache(model.config, 1, size, model.device, model.compute_dtype)
        self._read(ids)

    def _read(self, ids: Sequence[int]) -> None:
        idx = torch.tensor([list(ids)], device=self.model.device)  # (1, T)
        self.cache.prepare(len(ids))
        self.logits = self.model(idx, kv_cache=self.cache, last_only=True)[0, -1].float()  # (V,)

    def take(self, id: int, top: int) -> tuple[tuple[str, float], ...]:
        """The `top` likeliest (text, logprob) at the place that the token `id` takes."""
        logprobs = self.logits.log_softmax(dim=-1)[: self.tokenizer.vocab_size]
        values, found = (x.tolist() for x in logprobs.topk(min(top, len(logprobs))))
        if self.cache.length < self.cache.max_len:
            self._read([id])
        return tuple((self.tokenizer.decode([i]), value) for i, value in zip(found, values))


def read_along(
    pieces: Iterator[Piece], model: Any, tokenizer: Tokenizer, ids: list[int], room: int, top: int
) -> Iterator[Piece]:
    """The same pieces with `top` filled, at most `room`; as they are if `model` is no GPT."""
    if not isinstance(model, GPT):
        yield from pieces
        return
    reader = ReadAlong(model, tokenizer, ids, min(room, model.config.seq_len - len(ids)))
    for piece in pieces:
        yield replace(piece, top=reader.take(piece.id, top)) if piece.id >= 0 else piece


# %% [markdown]
r"""
We try it on a model with random weights, which is also the one that we time at the end: it has
opinions, but no reasons. At temperature 0 the engine takes the likeliest token. So the first of the
three must be that token, with the logprob that the engine reported.
"""

# %%
from nanochat.chat import render_prompt
from nanochat.engine import Engine
from nanochat.model import GPTConfig

torch.manual_seed(seed)
net = GPT(GPTConfig(512, seq_len, depth, n_head=2, n_kv_head=2, n_embd=width)).eval()
for weight in net.parameters():
    torch.nn.init.normal_(weight, std=0.05)
engine = Engine(net, parrot.tokenizer)
ids = render_prompt({"messages": hello}, parrot.tokenizer)
greedy = ChatSettings(temperature=0.0, max_tokens=4)
with torch.inference_mode():
    pieces = generate_pieces(engine, parrot.tokenizer, ids, greedy, tools=False)
    seen = [p for p in read_along(pieces, net, parrot.tokenizer, ids, 4, top=3) if p.top]
for piece in seen:
    liked = ", ".join(f"{text!r} {logprob:.3f}" for text, logprob in piece.top)
    print(f"logprob {piece.logprob:.3f}   of the likeliest: {liked}")

# %%
assert all(abs(piece.logprob - piece.top[0][1]) < 1e-3 for piece in seen) and len(seen) == 4

# %% [markdown]
r"""
## The two shapes of an answer

A chat answer and a plain completion (`/v1/completions`, a text that goes on) differ in names only,
and each comes streamed or whole. Text goes into `content`. What the calculator wrote has no place
in the dialect, so it travels beside it, as `part` (streamed) or `parts` (whole); other clients
ignore what they do not know. First what all four share.
"""


# %%
#| export
def _logprob_row(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _logprobs(job: Job, pieces: list[Piece]) -> dict[str, Any] | None:
    """Log probabilities in the shape of the endpoint, or None when nobody asked."""
    if not job.logprobs:
        return None
    real = [piece for piece in pieces if piece.id >= 0]
    if job.kind == "text_completion":
        texts, values = [piece.text for piece in real], [piece.logprob for piece in real]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": None}
    rows = []
    for piece in real:
        top = [_logprob_row(*pair) for pair in piece.top]
        rows.append({**_logprob_row(piece.text, piece.logprob), "top_logprobs": top})
    return {"content": rows, "refusal": None}


# %%
#| export
def _frame(job: Job, chunk: bool, **more: Any) -> dict[str, Any]:
    chat = job.kind == "chat.completion"
    kind = "chat.completion.chunk" if chat and chunk else job.kind
    frame = {"id": job.id, "object": kind, "created": int(time.time()), "model": job.model}
    return {**frame, **more, **({"note": job.note} if job.note else {})}


def _usage(job: Job) -> dict[str, int]:
    prompt, answer = len(job.ids), job.tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


# %% [markdown]
r"""
Streamed: one event for each piece, an event with the reason of the end, and the usage if the client
asked for it. A piece without text is sent only to those who want its logprob.
"""


# %%
#| export
async def stream_answer(job: Job) -> AsyncIterator[str]:
    """Server-sent events of one answer."""
    chat = job.kind == "chat.completion"

    def chunk(piece: Piece | None, reason: str | None, text: str = "") -> str:
        logprobs = _logprobs(job, [piece]) if piece else None
        choice = {"index": 0, "finish_reason": reason, "logprobs": logprobs}
        if not chat:
            return event(_frame(job, True, choices=[{**choice, "text": text}]))
        delta: dict[str, Any] = {} if reason else {"content": text}
        if piece is None and not reason:
            delta["role"] = "assistant"
        elif piece is not None and piece.kind != "text":
            delta["part"] = {"type": piece.kind, "text": piece.text, "opens": piece.opens}
        return event(_frame(job, True, choices=[{**choice, "delta": delta}]))

    if chat:
        yield chunk(None, None)
    async for piece, shown in job.run():
        if piece.kind == "end":
            yield chunk(None, piece.text if piece.text != "cancelled" else "stop")
        elif shown or piece.kind != "text" or job.logprobs:
            yield chunk(piece, None, shown if piece.kind == "text" else "")
    if job.usage:
        yield event(_frame(job, True, choices=[], usage=_usage(job)))
    job.finished = True
    yield event("[DONE]")


# %% [markdown]
r"""
Whole: collect, then answer once. Nobody would notice that the client has left, so we ask now and
then; a model that writes for nobody is the dearest kind of waste.
"""


# %%
#| export
async def whole_answer(job: Job, gone: Callable[[], Any]) -> dict[str, Any]:
    """The complete answer as one object; stops early when `gone()` says the client has left."""
    pieces, parts, reason = [], [], "stop"
    async for piece, shown in job.run():
        if piece.kind == "end":
            reason = piece.text if piece.text != "cancelled" else "stop"
        else:
            pieces.append(piece)
            add_piece(parts, replace(piece, text=shown))
        if job.tokens % 8 == 0 and await gone():
            job.metrics.disconnects += 1
            break
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    choice = {"index": 0, "finish_reason": reason, "logprobs": _logprobs(job, pieces)}
    if job.kind == "text_completion":
        choice["text"] = text
    else:
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        if any(part["type"] != "text" for part in parts):
            choice["message"]["parts"] = parts
    return _frame(job, False, choices=[choice], usage=_usage(job))


# %% [markdown]
r"""
## Admission

The body is read block by block, so that one of a gigabyte is refused after its first 256 KB, and
one that trickles in byte by byte is given up after a while. A client that hangs up before the end
is no error of ours; 499 is the usual number for it, which only our counters see.
"""


# %%
#| export
async def read_body(request: Any, limits: Limits) -> dict[str, Any]:
    """The JSON body of a request, read no further and no longer than the limits say.

    Raises ApiError when it is too long, too slow, no JSON object, or when the client hangs up.
    """
    from starlette.requests import ClientDisconnect

    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "Send the body as application/json.")

    async def read() -> bytes:
        data = bytearray()
        async for block in request.stream():
            data += block
            if len(data) > limits.body_bytes:
                raise ApiError(413, f"The body may have {limits.body_bytes} bytes.")
        return bytes(data)

    try:
        return parse_json(await asyncio.wait_for(read(), limits.seconds))
    except asyncio.TimeoutError:
        raise ApiError(408, "The body did not arrive in time.") from None
    except ClientDisconnect:
        raise ApiError(499, "The client has left.") from None


# %% [markdown]
r"""
Building the prompt runs the tokenizer, which is work as well; it will happen in the engine thread.
"""


# %%
#| export
def make_prompt(
    engine: Any, tokenizer: Tokenizer, source: Any, settings: ChatSettings
) -> tuple[list[int], str]:
    """Ids of a conversation or of a plain text, and a note when old turns were left out."""
    window = engine.model.config.seq_len
    reserve = min(settings.max_tokens, max(1, window // 4))
    if not isinstance(source, str):
        ids, left_out = fit_context(source, tokenizer, window, reserve)
        return ids, f"{left_out} older messages did not fit." if left_out else ""
    ids = tokenizer.encode(source, bos=True)
    if len(ids) + reserve > window:
        raise UserError(
            f"The prompt has {len(ids)} tokens; {window - reserve} of the model's {window} are "
            f"free for it. Shorten it."
        )
    return ids, ""


# %% [markdown]
r"""
`ChatServer` ties it together: check the request, take a slot, make a job. From the slot on, every
way out must pass `release`.
"""


# %%
#| export
class ChatServer:
    """Everything the web application needs, without the web framework."""

    def __init__(self, engines: Any, tokenizer: Tokenizer | None, limits: Limits) -> None:
        self.engines, self.tokenizer, self.limits = name_engines(engines), tokenizer, limits
        self.metrics, self.engine_thread = Metrics(), EngineThread()
        self.slots = Slots(limits, self.metrics)

    def choose(self, values: dict[str, Any]) -> tuple[str, Any, Tokenizer]:
        """The engine a request names; without a name, the first."""
        name = values.get("model", next(iter(self.engines)))
        if name not in self.engines:
            known = ", ".join(self.engines)
            raise ApiError(404, f"There is no model {name!r:.60}; there are: {known}.", "model")
        engine = self.engines[name]
        return name, engine, self.tokenizer or engine.tokenizer

    async def admit(
        self, body: dict[str, Any], chat: bool, client: str, gone: Callable[[], Any]
    ) -> Job:
        """Check a request, wait for a slot (while the client is not `gone`) and prepare its job."""
        deadline = time.perf_counter() + self.limits.seconds
        values = check_fields(body, self.limits)
        name, engine, tokenizer = self.choose(values)
        settings, stops = read_settings(values, self.limits), StopStrings(read_stops(body))
        source = read_messages(body, self.limits) if chat else read_prompt(body, self.limits)
        logprobs, top = read_logprobs(body, values, chat)
        usage = bool((values.get("stream_options") or {}).get("include_usage"))
        release, stop = await self.slots.take(client, gone), threading.Event()

        def prepare() -> tuple[list[int], str, Iterator[Piece]]:
            ids, note = make_prompt(engine, tokenizer, source, settings)
            pieces = generate_pieces(engine, tokenizer, ids, settings, stop, tools=chat)
            if top:
                length = settings.max_tokens
                pieces = read_along(pieces, engine.model, tokenizer, ids, length, top)
            return ids, note, pieces

        try:
            ids, note, pieces = await self.engine_thread.call(prepare)
        except BaseException:
            release()
            raise
        self.metrics.prompt_tokens += len(ids)
        kind, key = ("chat.completion", "chatcmpl-") if chat else ("text_completion", "cmpl-")
        owned = (pieces, stop, stops, release, self.engine_thread, self.metrics, deadline)
        return Job(key + secrets.token_hex(12), name, kind, ids, *owned, note, logprobs, usage)


# %% [markdown]
r"""
## The page

A browser needs one page. Ours is one file of HTML, CSS and JavaScript, without a library, and it
loads nothing from any other machine. We write it in small pieces. The first is how it looks:
variables for the colours, and other values for them when the reader's system is dark.
"""


# %%
#| export
PAGE_CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d1f23; --quiet: #5c626b; --line: #d5d9df;
  --user: #dcebf7; --model: #f3f4f6; --accent: #0067a6; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e8eaed; --quiet: #a2a9b4;
  --line: #3a3f47; --user: #17415f; --model: #24272d; --accent: #6cb8ec; --bad: #ff9d94; } }
* { box-sizing: border-box; }
body { margin: 0; height: 100dvh; display: flex; flex-direction: column; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
header, #settings, footer, #talk > * { width: 100%; max-width: 46rem; margin-inline: auto; }
header { display: flex; gap: .5rem; align-items: center; padding: .6rem 1rem; flex-wrap: wrap; }
h1 { font-size: 1.1rem; margin: 0 auto 0 0; }
button, select, input, textarea { font: inherit; color: inherit; background: var(--paper);
  border: 1px solid var(--line); border-radius: .5rem; padding: .35rem .7rem; }
button { cursor: pointer; } button:disabled { opacity: .45; cursor: default; }
button:hover:enabled { border-color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
button.main { background: var(--accent); color: var(--paper); border-color: var(--accent); }
#settings { padding: .2rem 1rem .8rem; display: grid; gap: .6rem 1rem;
  grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
#settings[hidden] { display: none; }
#settings label { display: flex; flex-direction: column; font-size: .85rem; color: var(--quiet); }
#settings input { color: var(--ink); min-width: 0; } #settings .wide { grid-column: 1 / -1; }
#settings .check { flex-direction: row; align-items: center; gap: .4rem; }
#talk { flex: 1; overflow-y: auto; border-top: 1px solid var(--line); padding: .5rem 0; }
.turn { padding: .25rem 1rem; display: flex; flex-direction: column; align-items: flex-start; }
.turn.user { align-items: flex-end; }
.bubble { max-width: 90%; padding: .1rem .9rem; border-radius: 1rem; background: var(--model);
  overflow-wrap: anywhere; }
.user .bubble { background: var(--user); white-space: pre-wrap; padding: .5rem .9rem; }
.bubble p, .bubble ul, .bubble ol, .bubble pre, .bubble details { margin: .45rem 0; }
.bubble ul, .bubble ol { padding-left: 1.5rem; }
.bubble pre { overflow-x: auto; padding: .5rem .7rem; border-radius: .5rem;
  background: var(--paper); white-space: pre-wrap; }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; }
:not(pre) > code { background: var(--paper); border-radius: .3rem; padding: .05rem .3rem; }
summary { cursor: pointer; color: var(--quiet); }
.tools { font-size: .8rem; color: var(--quiet); display: flex; gap: .6rem; padding: .1rem .4rem; }
.tools button { border: 0; padding: 0; background: none; color: inherit;
  text-decoration: underline; }
.columns { display: flex; gap: .5rem; overflow-x: auto; padding: 0 1rem; }
.column { flex: 1 1 0; min-width: 11rem; font-size: .95em; } .column .bubble { max-width: none; }
.column h2 { font-size: .8rem; margin: .3rem .9rem; color: var(--quiet); }
.token { white-space: pre-wrap; border-radius: .2rem; }
#said { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.hint { text-align: center; color: var(--quiet); padding: 2rem 1rem; }
#alert { color: var(--bad); padding: 0 1rem; min-height: 0; }
footer { padding: .6rem 1rem 1rem; } footer form { display: flex; gap: .5rem; }
textarea { flex: 1; resize: none; min-height: 2.7rem; max-height: 9rem; min-width: 0; }
#status { font-size: .8rem; color: var(--quiet); min-height: 1.2rem; padding: .2rem .2rem 0; }
"""


# %% [markdown]
r"""
Then what is there. Each field has a label, a hidden `log` tells a screen reader each answer when it
is complete, and nothing carries an `onclick`: the **content security policy** that we send with the
page forbids scripts inside the markup. Only the one script with today's `nonce`, a random word that
the server invents for each visit, may run. Should hostile text ever slip into the page, the browser
itself refuses to execute it.
"""


# %%
#| export
PAGE_HTML = """
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>nanochat</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' \
viewBox='0 0 16 16'%3E%3Ccircle cx='8' cy='8' r='7' fill='%230067a6'/%3E%3C/svg%3E">
<style nonce="NONCE">CSS</style>
</head>
<body>
<header>
<h1>nanochat</h1>
<select id="model" aria-label="Model"></select>
<button id="new" type="button">New chat</button>
<button id="more" type="button" aria-expanded="false" aria-controls="settings">Settings</button>
</header>
<section id="settings" aria-label="Settings" hidden>
<label class="wide">System prompt <input id="system" maxlength="4000"></label>
<label>Temperature
<input id="temperature" type="number" min="0" max="2" step="0.1" value="0.8"></label>
<label>Top-k (0: all) <input id="top_k" type="number" min="0" max="1000" value="50"></label>
<label>Top-p <input id="top_p" type="number" min="0.05" max="1" step="0.05" value="1"></label>
<label>Max tokens <input id="max_tokens" type="number" min="1" max="4096" value="512"></label>
<label>Seed (empty: random) <input id="seed" type="number" min="0" max="2147483647"></label>
<label>Access token <input id="token" type="password" autocomplete="off"></label>
<label class="check wide"><input id="shade" type="checkbox"> Show token probabilities</label>
<div class="wide"><button id="save" type="button">Save as file</button>
<button id="load" type="button">Load a file</button>
<input id="file" type="file" accept=".json" hidden></div>
</section>
<main id="talk" aria-label="Conversation" tabindex="0"></main>
<div id="said" role="log" aria-label="Answers"></div>
<div id="alert" role="alert"></div>
<footer>
<form id="form">
<textarea id="box" rows="1" placeholder="Ask something" aria-label="Message"
 autofocus></textarea>
<button id="send" class="main" type="submit">Send</button>
<button id="stop" type="button" disabled>Stop</button>
<button id="compare" type="button" hidden
 title="Ask all models the message, or the last question">Compare</button>
</form>
<div id="status" role="status">Enter sends, Shift+Enter starts a new line, Escape stops.</div>
</footer>
<script nonce="NONCE">SCRIPT</script>
</body>
</html>
"""


# %% [markdown]
r"""
The script, part one: from text to page. It follows the same plan as `markdown_html` in chapter 11,
and its safety has the same shape. `append` with a string always makes a *text node*; the browser
never parses it. The word `innerHTML` does not occur in this file.
"""


# %%
#| export
PAGE_JS_TEXT = r"""
"use strict";
const $ = (id) => document.getElementById(id);

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function inline(into, text) {
  const marks = /`([^`\n]+)`|\*\*([^*\n]+)\*\*|\*([^*\s][^*\n]*)\*/g;
  let at = 0;
  for (const m of text.matchAll(marks)) {
    into.append(text.slice(at, m.index));
    const tag = m[1] ? "code" : m[2] ? "strong" : "em";
    into.append(el(tag, {}, m[1] || m[2] || m[3]));
    at = m.index + m[0].length;
  }
  into.append(text.slice(at));
}

function block(lines, kind) {
  const node = el(kind);
  lines.forEach((line, i) => {
    if (kind !== "p") {
      const item = el("li");
      inline(item, line.replace(/^\s{0,8}([-*+]|\d{1,9}[.)])\s+/, ""));
      node.append(item);
      return;
    }
    if (i) node.append(el("br"));
    inline(node, line.replace(/^#{1,6}\s+(.*)$/, "**$1**"));
  });
  return node;
}

function markdown(into, text) {
  text.split(/^\s{0,3}```.*$\n?/m).forEach((chunk, number) => {
    if (number % 2) return into.append(el("pre", {}, el("code", {}, chunk)));
    let lines = [], kind = null;
    for (const line of [...chunk.split("\n"), ""]) {
      const item = /^\s{0,8}(?:([-*+])|\d{1,9}[.)])\s+/.exec(line);
      const now = item ? (item[1] ? "ul" : "ol") : line.trim() ? "p" : null;
      if (now !== kind && lines.length) { into.append(block(lines, kind)); lines = []; }
      kind = now;
      if (now) lines.push(line);
    }
  });
}
"""


# %% [markdown]
r"""
Part two: the conversation is a list here as well, and drawing means making the bubbles agree with
it. With "Show token probabilities" a bubble shows its tokens, shaded as in the widget.
"""


# %%
#| export
PAGE_JS_BUBBLE = r"""
const state = { messages: [], compared: null, running: null, editing: null, drawing: false,
  growing: [], tokens: 0, first: 0 };
const FIELDS = ["model", "system", "temperature", "top_k", "top_p", "max_tokens", "seed",
  "token"];

function shaded([text, logprob, forced]) {
  const p = Math.exp(Math.min(logprob, 0));
  const title = forced ? "written by the calculator" : "p = " + p.toFixed(3);
  const node = el("span", { class: "token", title }, text || "·");
  node.style.background = forced ? "#8883" : `rgba(213, 94, 0, ${0.75 * (1 - p)})`;
  return node;
}

function fill(bubble, message) {
  bubble.replaceChildren();
  if (message.role === "user") return bubble.append(message.content);
  const parts = message.content;
  if ($("shade").checked && message.tokens)
    return bubble.append(el("p", {}, ...message.tokens.map(shaded)));
  parts.forEach((part, i) => {
    if (part.type === "text") return markdown(bubble, part.text);
    if (part.type !== "python") return;
    const next = parts[i + 1];
    const result = next && next.type === "python_output" ? next.text : "(no result)";
    bubble.append(el("details", {}, el("summary", {}, "used the calculator"),
      el("pre", {}, part.text + "\n= " + result)));
  });
  if (!parts.some((part) => part.text)) bubble.append(el("p", { "aria-label": "waiting" }, "…"));
}

function link(text, action) {
  const button = el("button", { type: "button" }, text);
  button.disabled = Boolean(state.running);
  button.addEventListener("click", action);
  return button;
}

function turn(message, ...actions) {
  const bubble = el("div", { class: "bubble" });
  fill(bubble, message);
  state.growing.push([bubble, message]);
  const label = message.role === "user" ? "You" : "Model";
  return el("article", { class: "turn " + message.role, "aria-label": label },
    bubble, el("div", { class: "tools" }, ...actions, message.end || ""));
}

function column([name, message]) {
  return el("section", { class: "column", "aria-label": name }, el("h2", {}, name), turn(message));
}
"""


# %% [markdown]
r"""
While a reply grows only its own bubble is filled again, at most once per frame of the screen.
`state.growing` holds the bubbles that a running stream fills: one, or one for each model when
models are compared.
"""


# %%
#| export
PAGE_JS_TALK = r"""
function draw() {
  const talk = $("talk"), { messages, compared, running } = state;
  talk.replaceChildren();
  if (!messages.length && !compared)
    talk.append(el("p", { class: "hint" }, "Say hello to the model."));
  messages.forEach((message, i) => {
    state.growing = [];
    const last = i === messages.length - 1;
    if (message.role === "user") talk.append(turn(message, link("Edit", () => startEdit(i))));
    else talk.append(turn(message, ...(last ? [link("Regenerate", regenerate)] : [])));
  });
  if (compared) {
    talk.append(turn({ role: "user", content: compared.text }));
    state.growing = [];
    talk.append(el("div", { class: "columns", role: "group", "aria-label": "Comparison" },
      ...Object.entries(compared.answers).map(column)));
  }
  talk.scrollTop = talk.scrollHeight;
  $("stop").disabled = !running;
  for (const name of ["send", "compare", "new", "load"]) $(name).disabled = Boolean(running);
}

function drawLast() {
  if (state.drawing) return;
  state.drawing = true;
  requestAnimationFrame(() => {
    state.drawing = false;
    const talk = $("talk");
    const atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80;
    for (const [bubble, message] of state.growing) fill(bubble, message);
    if (atEnd) talk.scrollTop = talk.scrollHeight;
  });
}
"""


# %% [markdown]
r"""
Part three reads the stream. `fetch` gives us bytes in arbitrary portions: an event, and even a
letter, may be cut in two. `TextDecoder` in stream mode keeps half letters; we keep half events.
Stop is `abort()`: the browser closes the connection, the server notices and frees the slot.
"""


# %%
#| export
PAGE_JS_STREAM = r"""
async function api(path, options) {
  const headers = { "Content-Type": "application/json" };
  if ($("token").value) headers.Authorization = "Bearer " + $("token").value;
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  throw new Error(body.error ? body.error.message : "The server answered " + answer.status + ".");
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection ended early.");
    const pieces = (rest + value).split("\n\n");
    rest = pieces.pop();
    for (const piece of pieces) {
      const data = piece.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

"""


# %% [markdown]
r"""
With the events at hand, following one answer is short: build the request, then sort each event into
the answer's parts and tokens. It is `read_pieces` and `add_piece` in another language.
"""


# %%
#| export
PAGE_JS_FOLLOW = r"""
function request(talk, model) {
  const number = (name) => ($(name).value === "" ? null : Number($(name).value));
  const system = $("system").value.trim();
  const messages = talk.map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: "system", content: system });
  return JSON.stringify({ model: model || null, messages, stream: true, logprobs: true,
    temperature: number("temperature"), top_k: number("top_k"), top_p: number("top_p"),
    max_tokens: number("max_tokens"), seed: number("seed") });
}

function take(answer, { delta, logprobs }) {
  const part = delta.part || { type: "text", text: delta.content || "" };
  const last = answer.content.at(-1), forced = part.type === "python_output";
  for (const row of logprobs?.content || [])
    answer.tokens.push([part.text, row.logprob, forced]);
  if (last && last.type === part.type && !(delta.part && part.opens)) last.text += part.text;
  else if (part.text || part.type !== "text")
    answer.content.push({ type: part.type, text: part.text });
}

async function follow(talk, model, answer) {
  const options = { method: "POST", body: request(talk, model), signal: state.running.signal };
  for await (const chunk of events(await api("v1/chat/completions", options))) {
    if (chunk.error) throw new Error(chunk.error.message);
    const choice = chunk.choices[0];
    if (!choice) continue;
    if (chunk.note) $("alert").textContent = chunk.note;
    if (choice.finish_reason === "length") answer.end = "cut at the length limit";
    if (choice.finish_reason || choice.delta.role) continue;
    state.tokens += 1;
    state.first = state.first || performance.now();
    take(answer, choice);
    drawLast();
  }
}
"""


# %% [markdown]
r"""
Part four: what the buttons do. Editing, regenerating and sending end in the same function, as in
`ChatSession`, and when no answer comes the talk is again what it was: the older answer stays, and a
new question goes back into the box, above what has been typed there since. Comparing opens one
stream for each model; the engine thread lets them take turns.
"""


# %%
#| export
PAGE_JS_ACTIONS = r"""
async function run(answers, work) {
  state.running = new AbortController();
  state.tokens = state.first = 0;
  $("alert").textContent = "";
  draw();
  const begin = performance.now();
  let fine = true;
  try { await work(); } catch (error) {
    fine = error.name === "AbortError";
    if (!fine) $("alert").textContent = error.message;
    else for (const answer of answers) answer.end = "stopped";
  }
  const { tokens, first } = state, now = performance.now();
  if (tokens > 1) $("status").textContent = tokens + " tokens · first after " +
    ((first - begin) / 1000).toFixed(2) + " s · " +
    (1000 * (tokens - 1) / Math.max(now - first, 1)).toFixed(0) + " tokens/s";
  state.running = null;
  $("said").replaceChildren(el("p", {},
    answers.map(({ content }) => content.map(({ text }) => text).join("")).join("\n")));
  draw();
  keep();
  $("box").focus();
  return fine;
}

async function ask(talk) {
  const before = state.messages, answer = { role: "assistant", content: [], tokens: [] };
  state.messages = [...talk, answer];
  state.compared = null;
  if (await run([answer], () => follow(talk, $("model").value, answer))) return true;
  const isNew = talk.length > before.length;  // nothing older had to go for this answer
  if (isNew && answer.content.length) return true;  // so what has come of it may stay
  state.messages = before;
  draw();
  keep();
  return false;
}

function compare() {
  const text = $("box").value, last = state.messages.findLastIndex(({ role }) => role === "user");
  if (state.running || (!text.trim() && last < 0)) return;
  const talk = text.trim() ? [...state.messages, { role: "user", content: text }] :
    state.messages.slice(0, last + 1);
  const names = [...$("model").options].map(({ value }) => value), answers = {};
  for (const name of names) answers[name] = { role: "assistant", content: [], tokens: [] };
  state.compared = { text: talk.at(-1).content, answers };
  run(Object.values(answers), async () => {
    const ends = await Promise.allSettled(names.map((name) => follow(talk, name, answers[name])));
    const failed = ends.find(({ status }) => status === "rejected");
    if (failed) throw failed.reason;
  });
}
"""


# %%
#| export
PAGE_JS_BUTTONS = r"""
function startEdit(i) {
  state.editing = i;
  $("box").value = state.messages[i].content;
  $("status").textContent = "Editing an earlier question: Send replaces it and all that followed.";
  grow();
  $("box").focus();
}

function regenerate() {
  ask(state.messages.slice(0, -1));
}

function putBack(question) {
  $("box").value = [question, $("box").value].filter(Boolean).join("\n");
  grow();
}

async function send(event) {
  event.preventDefault();
  const text = $("box").value, { editing, messages } = state;
  if (state.running || !text.trim()) return;
  state.editing = null;
  $("box").value = "";
  grow();
  const talk = editing === null ? messages : messages.slice(0, editing);
  if (await ask([...talk, { role: "user", content: text }])) return;
  state.editing = editing;
  putBack(text);
}
"""


# %% [markdown]
r"""
Part five: keeping. A conversation is saved to a file and loaded from one, in the format of
`save_session`. If it ends with a question, the question goes into the box, as after a failure. A
conversation also survives a reload of the page, because it lies in the tab's session storage.
"""


# %%
#| export
PAGE_JS_FILES = r"""
function saveFile() {
  const data = { format: "nanochat conversation", version: 1, system: $("system").value,
    messages: state.messages.map(({ role, content }) => ({ role, content })) };
  const url = URL.createObjectURL(new Blob([JSON.stringify(data, null, 2)]));
  el("a", { href: url, download: "conversation.json" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

async function loadFile() {
  try {
    const data = JSON.parse(await $("file").files[0].text());
    if (data.format !== "nanochat conversation") throw new Error();
    state.messages = data.messages.map(({ role, content }) => ({ role: String(role),
      content: role === "user" ? String(content) : typeof content === "string" ?
        [{ type: "text", text: content }] : content.map((part) =>
          ({ type: String(part.type), text: String(part.text) })) }));
    $("system").value = String(data.system || "");
    state.editing = state.compared = null;
    if (state.messages.at(-1)?.role === "user") putBack(state.messages.pop().content);
    $("status").textContent = $("alert").textContent = "";
  } catch { $("alert").textContent = "This file is not a saved conversation."; }
  $("file").value = "";
  draw();
  keep();
}

function keep() {
  const values = Object.fromEntries(FIELDS.map((name) => [name, $(name).value]));
  sessionStorage.setItem("nanochat", JSON.stringify({ messages: state.messages, values }));
}
"""


# %%
#| export
PAGE_JS_START = r"""
function grow() {
  const box = $("box");
  box.style.height = "auto";
  box.style.height = Math.min(box.scrollHeight + 2, 144) + "px";
}

async function listModels() {
  try {
    const list = await (await api("v1/models")).json();
    const chosen = $("model").value || $("model").dataset.wanted;
    $("model").replaceChildren(...list.data.map(({ id }) => el("option", { value: id }, id)));
    if (list.data.some(({ id }) => id === chosen)) $("model").value = chosen;
    $("compare").hidden = list.data.length < 2;
    $("alert").textContent = "";
  } catch (error) { $("alert").textContent = error.message; }
}

function start() {
  const kept = JSON.parse(sessionStorage.getItem("nanochat") || "null");
  if (kept) {
    state.messages = kept.messages;
    for (const name of FIELDS) if (name !== "model") $(name).value = kept.values[name] ?? "";
    $("model").dataset.wanted = kept.values.model;
  }
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    $("token").value = given;
    history.replaceState(null, "", location.pathname);
    keep();
  }
  listModels();
  draw();
}
"""


# %% [markdown]
r"""
The last piece ties keys and buttons to these functions, and Python puts the file together.
"""


# %%
#| export
PAGE_JS_EVENTS = r"""
$("form").addEventListener("submit", send);
$("box").addEventListener("input", grow);
$("box").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (state.running) return state.running.abort();
  if (state.editing !== null) { state.editing = null; $("box").value = ""; grow(); }
  $("status").textContent = "";
});
$("stop").addEventListener("click", () => state.running && state.running.abort());
$("compare").addEventListener("click", compare);
$("shade").addEventListener("change", draw);
$("new").addEventListener("click", () => {
  state.messages = [];
  state.editing = state.compared = null;
  $("status").textContent = $("alert").textContent = "";
  draw();
  keep();
  $("box").focus();
});
$("more").addEventListener("click", () => {
  $("settings").hidden = !$("settings").hidden;
  $("more").setAttribute("aria-expanded", String(!$("settings").hidden));
});
$("save").addEventListener("click", saveFile);
$("load").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", loadFile);
for (const name of FIELDS) $(name).addEventListener("change", keep);
$("token").addEventListener("change", listModels);
start();
"""


# %%
#| export
def page(nonce: str) -> str:
    """The web page as one file; only style and script that carry `nonce` are obeyed."""
    script = PAGE_JS_TEXT + PAGE_JS_BUBBLE + PAGE_JS_TALK + PAGE_JS_STREAM + PAGE_JS_FOLLOW
    script += PAGE_JS_ACTIONS + PAGE_JS_BUTTONS + PAGE_JS_FILES + PAGE_JS_START + PAGE_JS_EVENTS
    text = PAGE_HTML.lstrip().replace("NONCE", nonce).replace("CSS", PAGE_CSS, 1)
    return text.replace("SCRIPT", script, 1)


# %%
text = page("example")
print(f"{len(text.encode()) / 1024:.0f} KB, {text.count('://')} addresses in it,", end=" ")
print(f"innerHTML: {text.count('innerHTML')}, inline handlers: {text.count(' onclick')}")

# %% [markdown]
r"""
(The one address is the name of the SVG format, which is never visited.)

## The guard at the door

A server on your own machine can be reached by every web page you visit: a page may send requests to
`127.0.0.1`. Three rules keep strangers out. A request must name this machine in its `Host` line;
that defeats tricks with domain names that are pointed at your machine later. A body must be
`application/json`, which a foreign page cannot send without our consent, and we give none (no CORS
headers, except to sites named in `origins`). And as soon as the server listens to the network,
everything but the empty page and `/health` needs a token, compared in constant time.

The guard also counts requests, and sees to it that an error inside shows no path and no traceback.
It stands in front of the application as ASGI middleware: a function that gets each request first
and sees each answer last.

A token travels in a line of the request's head. Not every character arrives there as it was sent,
so tokens with other characters are refused before the door is built.
"""


# %%
#| export
def check_token(token: str) -> str:
    """Return an access token that a request's head can carry, else raise UserError.

    The error does not repeat the token.
    """
    if not token or not all("!" <= letter <= "~" for letter in token):
        wrong = "holds another character" if token else "is empty"
        raise UserError(
            f"An access token is made of ASCII letters, digits and signs, without spaces; the one "
            f"given {wrong}: choose another."
        )
    return token


# %%
#| export
async def _send_json(send: Any, status: int, body: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


# %%
#| export
class Guard:
    """ASGI middleware: host and token checks, safe headers, counters, errors without details."""

    PATHS = ("/", "/health", "/metrics", "/openapi.json", "/v1/models", "/v1/completions",
             "/v1/chat/completions")  # fmt: skip

    def __init__(self, app: Any, token: str | None, metrics: Metrics) -> None:
        self.app, self.token, self.metrics = app, token, metrics

    def refusal(self, scope: dict[str, Any]) -> ApiError | None:
        """Why a request may not pass, or None."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self.token is None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
            if name not in ("localhost", "127.0.0.1", "[::1]"):
                return ApiError(421, "This server answers to localhost only.")
        elif scope["path"] not in ("/", "/health"):
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.token.encode()):
                return ApiError(401, "A valid access token is required (Authorization: Bearer).")
        return None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = [0]

        async def send_safely(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                safe = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]
                safe += [(b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message["headers"], *safe]}
            await send(message)

        error = self.refusal(scope)
        try:
            if error is None:
                await self.app(scope, receive, send_safely)
        except Exception:
            logging.getLogger("nanochat.serve").exception("a request failed")
            error = ApiError(500, "Something went wrong inside the server.")
        if error is not None and not status[0]:
            await _send_json(send_safely, error.status, error.body())
        path = scope["path"] if scope["path"] in self.PATHS else "other"
        key = (path, status[0])
        self.metrics.requests[key] = self.metrics.requests.get(key, 0) + 1


# %% [markdown]
r"""
> **Exercise A5.3.** Which of the three rules stops a page that sends an HTML form to
> `127.0.0.1:8000`? Which one stops a name that is pointed to `127.0.0.1` after the page has loaded?
> (In the sheet: `A5-door`.)

## The application

FastAPI maps paths to functions. It is the one large library of this appendix and an optional extra,
so it is imported inside the functions, and its absence is one clear sentence.

The streamed response has a class of its own for one reason: whatever ends it, a last token, an
error, a reader who left, or one who reads so slowly that time is up, `job.close()` must run.
"""


# %%
#| export
def _need_serve_extra() -> None:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError(
            'Serving needs FastAPI and uvicorn; install them: pip install "nanochat[serve]"'
        ) from None


# %%
#| export
async def _safe_events(job: Job) -> AsyncIterator[str]:
    """The events of an answer; an error in the middle becomes a last event without details."""
    try:
        async for text in stream_answer(job):
            yield text
    except Exception:
        logging.getLogger("nanochat.serve").exception("a stream failed")
        yield event(ApiError(500, "Something went wrong inside the server.").body())


def stream_response(job: Job) -> Any:
    """A streaming response that gives the job's slot back however it ends."""
    import anyio
    from starlette.responses import StreamingResponse

    class TokenStream(StreamingResponse):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                grace = max(0.0, job.deadline - time.perf_counter()) + 5
                with anyio.move_on_after(grace):
                    await super().__call__(scope, receive, send)
            finally:
                job.metrics.disconnects += not job.finished
                job.close()

    return TokenStream(_safe_events(job), media_type="text/event-stream")


# %% [markdown]
r"""
The pages that only tell something: the chat page with its policy, health, counters, and the list of
models.
"""


# %%
#| export
def _add_pages(app: Any, server: ChatServer) -> None:
    """Add the chat page and the addresses that only tell something."""
    from fastapi.responses import HTMLResponse, PlainTextResponse

    @app.get("/", response_class=HTMLResponse)
    async def front_page() -> Any:
        nonce = secrets.token_urlsafe(16)
        policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
        policy += "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        policy += "frame-ancestors 'none'"
        return HTMLResponse(page(nonce), headers={"content-security-policy": policy})

    @app.get("/health")
    async def health() -> Any:
        return {"status": "ok", "models": len(server.engines)}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Any:
        return PlainTextResponse(server.metrics.text())

    def about(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "nanochat"}

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [about(name) for name in server.engines]}

    @app.get("/v1/models/{name:path}")  # a name may hold a slash
    async def model(name: str) -> Any:
        return about(server.choose({"model": name})[0])


# %% [markdown]
r"""
The two endpoints that write text share one function, which differs in `chat` alone.
"""


# %%
#| export
def _add_completions(app: Any, server: ChatServer, path: str, chat: bool) -> None:
    """Add one of the two endpoints that write text."""
    from fastapi import Request

    async def complete(request: Request) -> Any:
        body = await read_body(request, server.limits)
        client, gone = request.client.host if request.client else "", request.is_disconnected
        job = await server.admit(body, chat, client, gone)
        if body.get("stream"):
            return stream_response(job)
        try:
            return await whole_answer(job, gone)
        finally:
            job.close()

    name = "chat_completions" if chat else "completions"
    app.post(path, openapi_extra=request_schema(chat, server.limits), name=name)(complete)


# %%
#| export
def create_app(
    engines: Any,
    tokenizer: Tokenizer | None = None,
    *,
    token: str | None = None,
    limits: Limits | None = None,
    origins: Sequence[str] = (),
) -> Any:
    """A FastAPI application around one engine or a dict of them.

    Without `token` it answers requests to localhost only. `limits` bounds what clients may use.
    `origins` are the web sites whose pages may call it ("https://my.site"; none by default).
    Raises UserError when the token cannot be sent or the extra `serve` is not installed.
    """
    _need_serve_extra()
    token = None if token is None else check_token(token)
    from fastapi import FastAPI
    from fastapi.middleware.cors import CORSMiddleware
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    server = ChatServer(engines, tokenizer, limits or Limits())
    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None)
    app.state.server, app.state.token = server, token
    app.add_middleware(Guard, token=token, metrics=server.metrics)
    if origins:
        allowed = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), **allowed)

    def refuse(error: ApiError, headers: Any = None) -> Any:
        return JSONResponse(error.body(), error.status, headers)

    app.exception_handler(ApiError)(lambda _, error: refuse(error))
    app.exception_handler(UserError)(lambda _, error: refuse(ApiError(400, str(error))))
    app.exception_handler(HTTPException)(
        lambda _, error: refuse(ApiError(error.status_code, str(error.detail)), error.headers)
    )
    _add_pages(app, server)
    _add_completions(app, server, "/v1/chat/completions", chat=True)
    _add_completions(app, server, "/v1/completions", chat=False)
    return app


# %% [markdown]
r"""
## Starting it

`run_server` binds to `127.0.0.1`, where only this machine can connect. For any other address it
insists on a token: if none is given it makes one and prints it with the address, as Jupyter does.
A word after `#` in an address is never sent to a server, so the token does not land in any log.
There `+`, `%` and `&` have a meaning of their own, so `quote` writes them in code.
"""


# %%
#| export
def _bind(host: str, port: int) -> socket.socket:
    """A listening socket, or a UserError that says why not."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"Cannot listen on {host} port {port}: {reason}. Choose another port or stop the "
            "program that uses it."
        ) from None
    return sock


def _uvicorn(app: Any) -> Any:
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=3,
        )
    )


# %%
#| export
def run_server(
    engines: Any,
    tokenizer: Tokenizer | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    limits: Limits | None = None,
    origins: Sequence[str] = (),
) -> None:
    """Serve the web page and the endpoint until Ctrl-C.

    Any host but loopback needs a token; without one, a random token is made and printed.
    Raises UserError when the port is taken, the token cannot be sent or the extra `serve` is
    missing.
    """
    _need_serve_extra()
    if token is None and host not in ("127.0.0.1", "localhost", "::1"):
        token = secrets.token_urlsafe(24)
    app = create_app(engines, tokenizer, token=token, limits=limits, origins=origins)
    with _bind(host, port) as sock:
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{sock.getsockname()[1]}/"
        address += f"#token={urllib.parse.quote(token, safe='')}" if token else ""
        print(f"nanochat is at {address} (Ctrl-C stops it)", flush=True)
        with suppress(KeyboardInterrupt):
            _uvicorn(app).run(sockets=[sock])


# %% [markdown]
r"""
`background_server` runs the same thing in a thread, inside a `with`: for this appendix, for tests,
and for a notebook that wants a server for a while.
"""


# %%
#| export
@contextmanager
def background_server(app: Any, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve an application in a thread inside a `with`; yields its address. Port 0: a free one."""
    sock, server = _bind(host, port), _uvicorn(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://{host}:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()


# %% [markdown]
r"""
What does it say to requests that it should not serve? One bad value, one foreign `Host`, one model
that is not there, one missing token.
"""


# %%
def refused(url, body, headers=None):
    try:
        post(url + "/v1/chat/completions", body, headers).read()
    except urllib.error.HTTPError as error:
        print(error.code, json.load(error)["error"]["message"])


app, request = create_app({"parrot": parrot}), {"messages": hello}
with background_server(app) as address:
    refused(address, {**request, "temperature": 99})
    refused(address, request, {"Host": "evil.example"})
    refused(address, {**request, "model": "gpt-9"})
with background_server(create_app(parrot, token="a-secret")) as address:
    refused(address, request, {"Authorization": "Bearer a guess"})

# %% [markdown]
r"""
And do requests take turns? Three readers ask at once; we note in one string whose text arrives, in
the order of arrival. Without turns it would read `AAAA...BBBB...CCCC`.
"""

# %%
import threading

arrived = []


def reader(name, address):
    with post(address + "/v1/chat/completions", {**request, "stream": True}) as response:
        arrived.extend(name for line in response if b'"content": "' in line)


with background_server(app) as address:
    readers = [threading.Thread(target=reader, args=(name, address)) for name in "ABC"]
    for one in readers:
        one.start()
    for one in readers:
        one.join()
print("".join(arrived))

# %% [markdown]
r"""
## The widget here, the model there

The model may live on a machine with a GPU, and the notebook on a laptop. Then an *engine* is
something that asks an endpoint. `stream_reply` of chapter 11 lets an engine that has a method
`stream_messages` do its own rendering, so all we need is a class that sends messages and turns
each event back into pieces.
"""


# %%
#| export
def chunk_pieces(chunk: Any) -> Iterator[Piece]:
    """The pieces in one streamed event of a chat completion. UserError when it is none."""
    try:
        if "error" in chunk:
            raise UserError(f"The endpoint failed: {chunk['error']['message']}")
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if "note" in chunk and "role" in delta:
                yield Piece("note", str(chunk["note"]))
            part = delta.get("part") or {"type": "text", "text": delta.get("content") or ""}
            rows = (choice.get("logprobs") or {}).get("content") or [{"logprob": 0.0}]
            kind, forced = str(part["type"]), part["type"] == "python_output"
            if part["text"] or "part" in delta:
                opens, logprob = bool(part.get("opens")), float(rows[0]["logprob"])
                yield Piece(kind, str(part["text"]), -1, logprob, forced, opens)
            if choice.get("finish_reason"):
                yield Piece("end", str(choice["finish_reason"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError("The endpoint sent something that is not a chat completion.") from None


# %% [markdown]
r"""
Much can go wrong between here and there, and Python has an exception of its own for each: a
connection that breaks, an answer that is no HTTP, an address that is none. `explain` turns them
into words. It repeats what the network says, never what we sent, for that may hold the token.
"""


# %%
#| export
NETWORK_ERRORS = (OSError, http.client.HTTPException, ValueError, RecursionError)


def explain(error: Exception) -> str:
    """What one of NETWORK_ERRORS means, in words that hold nothing of what was sent."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, OSError):
        return str(cause) or type(cause).__name__
    if isinstance(error, http.client.IncompleteRead):
        return "the answer broke off"
    if isinstance(error, (urllib.error.URLError, http.client.InvalidURL, ValueError)):
        return "the address is not valid"
    return "the answer is no HTTP"


# %%
#| export
class RemoteEngine:
    """A model behind an OpenAI-compatible endpoint, for ChatWidget, ChatSession and terminal_chat.

    `url` is the address up to /v1, `token` its access token. Raises UserError when the endpoint
    cannot be reached, refuses, or answers something else; nothing is sent before a question is.
    """

    tokenizer = None  # the endpoint renders prompts itself

    def __init__(self, url: str, model: str, token: str = "", timeout: float = 120.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"An endpoint's address begins with http:// or https://; found {url}.")
        self.url, self.model, self.timeout = url.rstrip("/"), model, timeout
        self.token = check_token(token.strip()) if token.strip() else ""

    def open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The response to a request, not read yet; a body is sent by POST.

        Raises UserError when there is none, or when it is an error.
        """
        data = json.dumps(body).encode() if body is not None else None
        try:
            request = urllib.request.Request(self.url + path, data)
            request.add_header("Content-Type", "application/json")
            if self.token:  # never sent on, should this address point to another one
                request.add_unredirected_header("Authorization", f"Bearer {self.token}")
            return urllib.request.urlopen(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            with suppress(*NETWORK_ERRORS, KeyError, TypeError):  # it may hang up on us
                raise UserError(json.loads(error.read(10_000))["error"]["message"]) from None
            said = "wants a valid access token" if error.code == 401 else f"said {error.code}"
            raise UserError(f"{self.url} {said}.") from None
        except NETWORK_ERRORS as error:
            raise UserError(
                f"Cannot reach {self.url}: {explain(error)}. Is the server running, and is this "
                "its address?"
            ) from None

    def _read(self, body: dict[str, Any], lines: queue.Queue, gone: threading.Event) -> None:
        """The reading thread: lines of the answer, then None; or the error."""
        try:
            with self.open("/chat/completions", body) as response:
                for line in response:
                    lines.put(line.decode("utf-8", errors="replace"))
                    if gone.is_set():
                        return
            lines.put(None)
        except NETWORK_ERRORS as error:
            lines.put(UserError(f"The connection to {self.url} was lost: {explain(error)}."))
        except Exception as error:
            lines.put(error)


# %% [markdown]
r"""
Stop needs care once more. Reading a line from the network blocks for as long as the server is
silent. So a thread reads and puts lines into a queue, and the generator looks at the queue and at
the stop event in turns. When the generator ends, the thread closes the connection at its next line,
and the server frees the slot.
"""


# %%
#| export
def _stream_messages(
    self: RemoteEngine,
    messages: list[dict[str, Any]],
    settings: ChatSettings,
    stop: threading.Event | None = None,
) -> Iterator[Piece]:
    """Stream the pieces of the answer to a conversation; the last one has kind "end".

    Raises UserError when the endpoint fails or falls silent.
    """
    body = {"model": self.model, "messages": messages, "stream": True, "logprobs": True}
    body.update((name, value) for name, value in asdict(settings).items() if value is not None)
    body["top_k"] = settings.top_k or 0
    lines: queue.Queue = queue.Queue()
    gone = threading.Event()
    threading.Thread(target=self._read, args=(body, lines, gone), daemon=True).start()
    try:
        while stop is None or not stop.is_set():
            try:
                line = lines.get(timeout=0.05)
            except queue.Empty:
                continue
            if isinstance(line, Exception):
                raise line
            if line is None:
                raise UserError(
                    "The endpoint closed the connection before the answer was complete."
                )
            if line.startswith("data:") and "[DONE]" in line[:14]:
                return
            for data in read_events(iter([line])):
                yield from chunk_pieces(data)
        yield Piece("end", "cancelled")
    finally:
        gone.set()


RemoteEngine.stream_messages = _stream_messages


# %%
#| export
def remote_engines(url: str, token: str = "") -> dict[str, RemoteEngine]:
    """All models of an endpoint, by name: `ChatWidget(remote_engines("http://127.0.0.1:8000/v1"))`.

    Raises UserError when there is no such endpoint.
    """
    with RemoteEngine(url, "", token).open("/models") as response:
        try:
            names = [str(entry["id"]) for entry in json.load(response)["data"]]
        except (*NETWORK_ERRORS, KeyError, TypeError):
            raise UserError(
                f"{url} is not an OpenAI-compatible endpoint: it sent no list of models."
            ) from None
    return {name: RemoteEngine(url, name, token) for name in names}


# %% [markdown]
r"""
The widget of chapter 11, now around a server. It does not notice the difference.
"""

# %%
from IPython.display import HTML, display

from nanochat.ui import ChatWidget, transcript_html

with background_server(app) as address:
    widget = ChatWidget(remote_engines(address + "/v1"))
    widget.controls.box.value = "Is anybody **far away**?"
    widget.controls.send.click()
    widget.wait()
display(HTML(transcript_html(widget.session.messages)))

# %% [markdown]
r"""
## What streaming buys

Now the measurement that we promised. We ask the server for answers of different lengths, once
streamed and once whole, and note when the **first** text is in our hands: the *time to first
token*. As a control we ask the engine directly, without HTTP: the distance between the two is what
the network part costs.

The speed of a model does not depend on what it has learnt, so the one with random weights will do.
One thing would spoil the measurement: an answer that ends early. `Steady` passes over stop tokens.
Each number is the best of three runs.
"""

# %%
lengths = [4, 32, 96, 160]


def first_text(url, length, stream):
    """Seconds until the first text of a plain completion of `length` tokens is here."""
    body = {"prompt": "x", "max_tokens": length, "stream": stream}
    begin = time.perf_counter()
    with post(url + "/v1/completions", body) as response:
        times = [time.perf_counter() - begin for line in response if b'"text"' in line]
    return times[0]


class Steady:
    """The model's speed without early ends: stop tokens are passed over."""

    def __init__(self, engine):
        self.engine, self.model, self.tokenizer = engine, engine.model, engine.tokenizer

    def generate(self, prompt, max_tokens=256, stop=None, **options):
        made = 0
        while made < max_tokens and not (stop is not None and stop.is_set()):
            for token in self.engine.generate(ids, max_tokens - made, stop=stop):
                made += 1
                yield Token(3, "a ", token.logprob, False)


# %%
def first_alone(length):
    """Seconds until the engine's first token, without HTTP."""
    begin = time.perf_counter()
    next(steady.generate(ids, length))
    return time.perf_counter() - begin


steady, whole, streamed, alone = Steady(engine), [], [], []
with background_server(create_app(steady)) as address:
    first_text(address, 2, True)  # warm up
    for _ in range(3):
        whole.append([first_text(address, n, False) for n in lengths])
        streamed.append([first_text(address, n, True) for n in lengths])
        alone.append([first_alone(n) for n in lengths])

# %%
import matplotlib.pyplot as plt

from nanochat.common import COLORS, figure

fig, ax = figure(
    "Streaming: the first words no longer wait for the last",
    "length of the answer (tokens)",
    "time to first text (ms)",
    alt="Time until the first text against the length of the answer. Whole answers: a rising line. "
    "Streamed answers and the engine without HTTP: two flat lines near zero.",
)
rows = [("whole answer", whole, 1, "s-"), ("streamed", streamed, 0, "o-")]
rows.append(("engine alone, no HTTP", alone, 2, "^--"))
for label, runs, color, style in rows:
    best = [1000 * min(times) for times in zip(*runs)]
    ax.plot(lengths, best, style, label=label, color=COLORS[color], markersize=4)
    print(f"{label:22}", " ".join(f"{ms:6.1f}" for ms in best), "ms")
ax.set_ylim(bottom=0)
ax.legend(fontsize=8, loc="upper left")
plt.show()

# %%
longest = [min(times[-1] for times in runs) for runs in (whole, streamed)]
assert longest[0] > 2 * longest[1], longest

# %% [markdown]
r"""
The line of whole answers rises with every token; the streamed one is flat, and lies a little above
the engine alone. The model is exactly as slow in all three.

> **Exercise A5.4.** Let four threads ask this model at once. The time to first token stays small,
> because requests take turns, and the time per token grows by much less than four times, because
> their tokens are computed together. From how many requests on does it grow in proportion, and why
> (chapter 8)?

## Recap

What `nanochat` can do now that it could not before:

- `nanochat.serve.run_server(engine)` serves the web page and `/v1/chat/completions`,
  `/v1/completions`, `/v1/models`, `/health`, `/metrics`; `python -m nanochat serve` calls it;
- `create_app` gives the same application to a server of your own, `background_server` to a `with`;
- `Limits` holds the numbers that no request may pass, `check_fields`, `read_messages`,
  `read_settings` and `read_stops` check one, and `ApiError` is the answer when it fails;
- `EngineThread`, `Slots` and `Job` let many requests share an engine, and `Metrics` counts them;
- `event` and `read_events` write and read a stream; `StopStrings` cuts one; `ReadAlong` tells what
  else was likely;
- `Guard` keeps strangers out;
- `remote_engines(url)` lets widget and terminal talk to such a server, anywhere.

## Pitfalls

- **Half a letter, half an event.** The network cuts anywhere. Decode with a decoder that waits
  (`TextDecoder` in the page), and split at empty lines only.
- **Slots that leak.** A client that vanishes at the wrong moment must not keep its place. Give it
  back in a `finally` that runs whatever happened, and test with clients that hang up.
- **Open doors.** Chat servers in the wild listen on `0.0.0.0` with CORS open and no token. Then
  every page you visit can talk to your model, and through it to what your model may use.
- **Limits on tokens only.** A short request can be dear as well: a body that never ends, a reader
  that never reads, a place in the queue that is never given back. Each needs its own number.
- **One model per visitor.** A notebook server that renders the widget as a page starts a kernel,
  and so loads a copy of the model, for each visitor. That is why our page is a light one.

## Readings

- WHATWG, *HTML Living Standard*, section "Server-sent events": the format in two pages.
- W3C, *Content Security Policy Level 3*: what a nonce promises and what not.
- OWASP, *Cross-Site Request Forgery Prevention Cheat Sheet*: why a JSON body and no CORS headers
  keep foreign pages out.
- Yu et al. (2022), *Orca: A Distributed Serving System for Transformer-Based Generative Models*:
  requests that join and leave between two steps.
- Kwon et al. (2023), *Efficient Memory Management for Large Language Model Serving with
  PagedAttention*: what comes after taking turns.
"""
