# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# 11. Talk to it

By the end of this chapter you have shown that one short loop over tokens can feed a notebook
widget, a terminal and a web server, that the reply appears while it is still being written, and
that the Stop button works within two tenths of a second.

A chat window does not care who answers. So we begin without a model: the engine below is a
**parrot**. It has the one method the engine of chapter 8 has, `generate`, and yields the same
`Token` objects, ten milliseconds apart. Everything we build in this chapter must work with the
parrot first; the model comes later and needs no change.
"""

# %%
import time
from types import SimpleNamespace

from nanochat.engine import Token


class Parrot:
    """An engine that repeats the last question. It has everything a chat window asks of a model."""

    def __init__(self, tokenizer, delay=0.01, window=512):
        self.tokenizer, self.delay = tokenizer, delay
        self.model = SimpleNamespace(config=SimpleNamespace(seq_len=window))

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
The cold open: the finished widget around the parrot. We type into its box and click its button
from code, because a chapter has no hands. In a live notebook, ending a cell with `widget` shows it.
"""

# %%
from IPython.display import HTML, display

from nanochat.tinyworld import World, document
from nanochat.tokenizer import Tokenizer
from nanochat.ui import ChatWidget, transcript_html

world = World(seed=0)
texts = [document(world, i) for i in range(300)]
parrot = Parrot(Tokenizer.train(texts, 512))

widget = ChatWidget(parrot)
widget.controls.box.value = "Hello, is **anybody** there?"
widget.controls.send.click()
widget.wait()
display(HTML(transcript_html(widget.session.messages)))

# %% [markdown]
r"""
**You will be able to**

1. stream a reply and say what "time to first token" measures;
2. put text from a model into a page so that it can never become markup or script;
3. explain why a button handler must not compute, and fix it with a thread and an event;
4. measure how long Stop takes, and say what sets that time;
5. write and read server-sent events, and call our server from any client that speaks OpenAI's API;
6. name the limits a server needs before it may listen to anybody but you.

**Before this**: chapters 8 (the engine) and 9 (the chat format). **To read**: 40 minutes.
**To run**: about 40 seconds on two CPU cores, offline. The server part needs the extra
`pip install "nanochat[serve]"`.
"""

# %% tags=["parameters"]
profile = "quick"
model = ""  # a checkpoint directory such as "runs/laptop/sft"; empty: train a small model here
train_steps, talks_count = 100, 3000  # how long the small model trains, and on how many talks
depth, width, seq_len, vocab_size = 2, 128, 256, 768
seed = 0

# %%
#| default_exp ui

# %%
#| export
import html
import math
import re
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import traitlets

from nanochat.chat import render_prompt
from nanochat.common import UserError, read_json, write_json
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

# %% [markdown]
r"""
## From tokens to pieces

The engine yields tokens. A reader sees parts: ordinary text, a call of the calculator, the result
of the call. The borders between parts are special tokens, so a small state machine is enough.
We call what it yields a `Piece`: a bit of text, and which kind of part it belongs to.

    token   <|python_start|>  12  *  3  <|python_end|>  <|output_start|>  36  <|output_end|>  So
    kind    python            python    -               python_output     "   -               text
    opens   yes               no                        yes               no                  yes

`opens` marks the first piece of a part. Without it, two calls in a row would melt into one.
"""


# %%
#| export
@dataclass(frozen=True)
class Piece:
    """A bit of a reply.

    kind is "text", "python" or "python_output" (a token of such a part), "start" (the question is
    noted, nothing is generated yet), "note" (a remark by the session, not by the model) or "end"
    (`text` says why: "stop", "length" or "cancelled"). `opens` is true when a new part begins.
    `top` holds the likeliest (text, logprob) at this place where somebody has asked for them.
    """

    kind: str
    text: str = ""
    id: int = -1
    logprob: float = 0.0
    forced: bool = False
    opens: bool = False
    top: tuple[tuple[str, float], ...] = ()


# %%
#| export
def read_pieces(tokens: Iterator[Any], tokenizer: Tokenizer) -> Iterator[Piece]:
    """Turn the engine's tokens into pieces; special tokens steer and never appear as text."""
    special = {name.strip("<|>"): tokenizer.special(name) for name in SPECIAL_TOKENS}
    opening = {special["python_start"]: "python", special["output_start"]: "python_output"}
    closing = {special["python_end"], special["output_end"]}
    kind, opens = "text", True
    for token in tokens:
        if token.id in (special["assistant_end"], special["bos"]):
            yield Piece("end", "stop", token.id, token.logprob, token.forced)
            return
        if token.id in opening:
            kind, opens = opening[token.id], True
        elif token.id in closing:
            kind, opens = "text", True
        text = "" if token.id in special.values() else token.text
        opens_now = opens and token.id not in closing
        yield Piece(kind, text, token.id, token.logprob, token.forced, opens_now)
        opens = opens and not opens_now


# %%
#| export
def add_piece(parts: list[dict[str, str]], piece: Piece) -> None:
    """Append a piece to the parts of an assistant message, in place (schema of chapter 9)."""
    if piece.kind not in ("text", "python", "python_output"):
        return
    new = piece.opens or not parts or parts[-1]["type"] != piece.kind
    if new and (piece.text or piece.kind != "text"):
        parts.append({"type": piece.kind, "text": piece.text})
    elif parts and piece.text:
        parts[-1]["text"] += piece.text


# %% [markdown]
r"""
We check it on a hand-made stream: words, a calculator call, its result, words, the end.
"""

# %%
#| test
_tok = Tokenizer.train(["12*3 is 36 and so on"] * 3, 270)


def _token(name):
    return Token(_tok.special(name), "", -0.5, False)


_stream = [Token(1, "It is ", -0.1, False), _token("python_start"), Token(2, "12*3", -0.1, False)]
_stream += [_token("python_end"), _token("output_start"), Token(3, "36", 0.0, True)]
_stream += [_token("output_end"), Token(4, "36", -0.1, False), _token("assistant_end")]
_parts = []
_pieces = list(read_pieces(iter(_stream), _tok))
for _piece in _pieces:
    add_piece(_parts, _piece)
assert [p["type"] for p in _parts] == ["text", "python", "python_output", "text"]
assert [p["text"] for p in _parts] == ["It is ", "12*3", "36", "36"]
assert _pieces[-1] == Piece("end", "stop", _tok.special("assistant_end"), -0.5)

# %% [markdown]
r"""
## The window is finite

A model that was trained on rows of `seq_len` tokens has never seen position `seq_len + 1`. A long
talk reaches that border. Three choices: fail, silently cut, or cut and say so. We drop the oldest
whole turns, keep the system message, and tell the reader.

How many turns must go? Rendering and counting after each dropped turn costs one rendering per turn.
The question "does the rest fit?" flips from no to yes only once, so we can search by halving.
"""


# %%
#| export
def fit_context(
    messages: list[dict[str, Any]], tokenizer: Tokenizer, window: int, reserve: int
) -> tuple[list[int], int]:
    """Render the newest turns that leave `reserve` of `window` tokens free for the answer.

    Returns the prompt's ids and the number of messages left out. The system message always stays.
    Raises UserError when the last turn alone is too long.
    """
    first = 1 if messages and messages[0]["role"] == "system" else 0
    cuts = [i for i in range(first, len(messages)) if messages[i]["role"] == "user"]
    if not cuts:
        raise UserError("The conversation holds no question: add a user message.")
    cuts[0] = first

    def prompt(cut: int) -> list[int]:
        return render_prompt({"messages": messages[:first] + messages[cut:]}, tokenizer)

    keep = bisect_left(cuts, True, key=lambda cut: len(prompt(cut)) + reserve <= window)
    if keep == len(cuts):
        raise UserError(
            f"The message is too long: with the system prompt it takes {len(prompt(cuts[-1]))} "
            f"tokens, and {window - reserve} of the model's {window} are free for it. Shorten it."
        )
    return prompt(cuts[keep]), cuts[keep] - first


# %% [markdown]
r"""
A long talk with a window of 120 tokens: the first question that still fits moves up, and the number
of tokens never passes the border we set.
"""

# %%
talk = []
for turn in range(8):
    talk.append({"role": "user", "content": f"Question {turn}: what did we say before?"})
    ids, left_out = fit_context(talk, parrot.tokenizer, window=120, reserve=30)
    print(
        f"turn {turn}: {len(ids):3d} prompt tokens, {left_out:2d} of {len(talk)} messages left out"
    )
    talk.append({"role": "assistant", "content": "We said nothing."})

# %% [markdown]
r"""
## Settings and one reply

Temperature, top-k, top-p, length and seed belong together, so we keep them in one small object that
knows what is allowed. Three front ends will check their input by the same rule.
"""


# %%
#| export
@dataclass(frozen=True)
class ChatSettings:
    """How tokens are chosen. temperature 0 takes the likeliest token; top_k None keeps all."""

    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float | None = None
    max_tokens: int = 256
    seed: int = 0

    def check(self) -> "ChatSettings":
        """Return self, or raise UserError that names the field, the value and the range."""
        ranges = {"temperature": (0, 2), "top_k": (1, 100_000), "top_p": (1e-6, 1)}
        ranges.update(max_tokens=(1, 10**9), seed=(0, 2**63 - 1))
        for one in fields(self):
            value, (low, high) = getattr(self, one.name), ranges[one.name]
            if value is None and one.name in ("top_k", "top_p"):
                continue
            whole = one.name in ("top_k", "max_tokens", "seed")
            kinds = (int,) if whole else (int, float)
            fine = isinstance(value, kinds) and not isinstance(value, bool)
            if not (fine and low <= value <= high):
                kind = "a whole number" if whole else "a number"
                raise UserError(
                    f"{one.name} must be {kind} from {low} to {high}; found {value!r:.40}."
                )
        return self


# %%
#| export
def generate_pieces(
    engine: Any,
    tokenizer: Tokenizer,
    ids: list[int],
    settings: ChatSettings,
    stop: threading.Event | None = None,
    tools: bool = True,
) -> Iterator[Piece]:
    """Stream the pieces of one continuation of `ids`; the last piece has kind "end"."""
    room = min(settings.max_tokens, engine.model.config.seq_len - len(ids))
    options = {**asdict(settings), "max_tokens": room, "stop": stop, "tools": tools}
    count = 0
    for piece in read_pieces(engine.generate(ids, **options), tokenizer):
        yield piece
        if piece.kind == "end":
            return
        count += 1
        if stop is not None and stop.is_set():
            break
    cancelled = stop is not None and stop.is_set()
    yield Piece("end", "cancelled" if cancelled else "length" if count >= room else "stop")


# %%
#| export
def stream_reply(
    engine: Any,
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    settings: ChatSettings,
    stop: threading.Event | None = None,
) -> Iterator[Piece]:
    """Stream the answer to a conversation; a note comes first when old turns did not fit.

    An engine with a method `stream_messages` (an endpoint, appendix A5) renders the prompt itself.
    """
    if hasattr(engine, "stream_messages"):
        yield from engine.stream_messages(messages, settings, stop)
        return
    window = engine.model.config.seq_len
    reserve = min(settings.max_tokens, max(1, window // 4))
    ids, left_out = fit_context(messages, tokenizer, window, reserve)
    if left_out:
        yield Piece("note", f"{left_out} older messages no longer fit and were left out.")
    yield from generate_pieces(engine, tokenizer, ids, settings, stop)


# %% [markdown]
r"""
Now we can stream. The loop prints every piece the moment it comes; the parrot needs 10 ms a token,
so the first words are there long before the last.
"""

# %%
begin = time.perf_counter()
arrivals = []
question = [{"role": "user", "content": "Streaming makes waiting shorter."}]
for piece in stream_reply(parrot, parrot.tokenizer, question, ChatSettings()):
    arrivals.append(time.perf_counter() - begin)
    print(piece.text if piece.kind == "text" else f"[{piece.kind}: {piece.text}]", end="|")
first, last = arrivals[0], arrivals[-1]
print(f"\nthe first of {len(arrivals) - 1} tokens came after {first / last:.0%} of the whole time")

# %% [markdown]
r"""
The reader of a reply reads at five to ten tokens a second. What feels slow is the wait for the
first one: **time to first token**. Streaming does not make the model faster; it moves almost all of
the waiting behind the reading.

## A conversation is a list that is edited

A session holds the messages and offers what people do with a talk: send, stop, edit an earlier
question, ask for another answer, start over, save, load. All three front ends will use this class,
so none of them holds state of its own.

Editing question $i$ means: forget everything from message $i$ on, then send the new text.
Regenerating is editing the last question into itself, with another seed. So the three are one
generator with different beginnings.

First the check that everything from outside must pass: a file somebody gives you, or a request to
the server.
"""


# %%
#| export
def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Return a clean copy of a conversation, or raise UserError that says what is wrong where."""
    if not isinstance(messages, list):
        raise UserError("messages must be a list of {role, content} objects.")
    clean, turn = [], "user"
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role == "system" and i == 0:
            clean.append({"role": role, "content": _check_content(message, i, ("text",))})
            continue
        if role != turn:
            raise UserError(f"messages[{i}] must have role {turn!r}; found {role!r:.40}.")
        kinds = ("text",) if role == "user" else ("text", "python", "python_output")
        clean.append({"role": role, "content": _check_content(message, i, kinds)})
        turn = "assistant" if role == "user" else "user"
    return clean


def _check_content(message: dict[str, Any], i: int, kinds: tuple[str, ...]) -> Any:
    """Text, or a list of parts of the allowed kinds; a user's parts are joined to one text."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    good = isinstance(content, list) and all(
        isinstance(p, dict) and p.get("type") in kinds and isinstance(p.get("text"), str)
        for p in content
    )
    if not good:
        raise UserError(f"messages[{i}].content must be text or a list of parts {list(kinds)}.")
    if message["role"] != "assistant":
        return "".join(p["text"] for p in content)
    return [{"type": p["type"], "text": p["text"]} for p in content]


# %%
#| export
@dataclass
class ReplyStats:
    """What one reply cost: tokens, seconds to the first token, seconds in all."""

    tokens: int = 0
    first_seconds: float = 0.0
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def count(self) -> None:
        """Note that a token has arrived."""
        self.tokens += 1
        self.seconds = time.perf_counter() - self.started
        if self.tokens == 1:
            self.first_seconds = self.seconds

    def __str__(self) -> str:
        rate = (self.tokens - 1) / max(self.seconds - self.first_seconds, 1e-9)
        speed = f" · {rate:.0f} tokens/s" if self.tokens > 1 else ""
        return f"{self.tokens} tokens · first after {self.first_seconds:.2f} s{speed}"


# %%
#| export
class ChatSession:
    """A conversation with an engine. `send`, `edit` and `regenerate` yield `Piece` objects.

    They are generators: nothing happens until the first piece is asked for. `messages` follows the
    conversation schema of chapter 9 and always holds what has arrived so far. A failed reply leaves
    the conversation as it was; a stopped one keeps the part that came.
    """

    def __init__(
        self,
        engine: Any,
        tokenizer: Tokenizer,
        system: str = "",
        settings: ChatSettings | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.system = engine, tokenizer, system
        self.settings = settings or ChatSettings()
        self.messages: list[dict[str, Any]] = []  # without the system message
        self.pieces: list[Piece] = []  # of the latest reply
        self.compared: dict[str, list[dict[str, str]]] = {}  # parts by model, see `compare`
        self.compared_text = ""
        self.stats, self.finish_reason, self.replies = ReplyStats(), "", 0
        self._stop, self._busy = threading.Event(), threading.Lock()

    def send(self, text: str, **settings: Any) -> Iterator[Piece]:
        """Ask; keywords override `self.settings` for this reply."""
        yield from self._reply(self.messages, text, settings)

    def edit(self, i: int, text: str, **settings: Any) -> Iterator[Piece]:
        """Replace question `i` (an index into messages), forget what followed, ask again."""
        if not (0 <= i < len(self.messages)) or self.messages[i]["role"] != "user":
            raise UserError(f"Only a question can be edited; messages[{i}] is none.")
        yield from self._reply(self.messages[:i], text, settings)

    def regenerate(self, **settings: Any) -> Iterator[Piece]:
        """Ask the last question again; the seed moves on, so the answer may differ."""
        i, text = self._last_question()
        yield from self.edit(i, text, **settings)

    def stop(self) -> None:
        """End the running reply before its next token; what has come stays."""
        self._stop.set()

    def clear(self) -> None:
        """Forget the conversation; the seed starts over too."""
        self._refuse_busy()
        self.messages, self.pieces, self.replies, self.compared = [], [], 0, {}
        self.stats, self.finish_reason = ReplyStats(), ""

    def _last_question(self) -> tuple[int, str]:
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise UserError("There is no question yet: write a message first.")
        return asked[-1], self.messages[asked[-1]]["content"]

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system.strip() else []
        return system + messages

    def _refuse_busy(self) -> None:
        if self._busy.locked():
            raise UserError("A reply is still being written: stop it or wait for its end.")


# %% [markdown]
r"""
The generator behind the three needs care in one place: what happens when it does not run to its
end. The engine may fail (then the conversation goes back to what it was), the reader may stop
(then the part that came stays), or the program may simply drop the generator.
The `finally` clause frees the session in every case.
"""


# %%
#| export
def _reply(
    self: ChatSession, before: list[dict[str, Any]], text: str, changes: dict[str, Any]
) -> Iterator[Piece]:
    """Append a question and its growing answer to `before`, yielding the pieces."""
    settings = replace(self.settings, seed=self.settings.seed + self.replies)
    settings = replace(settings, **changes).check()
    if not text.strip():
        raise UserError("The message is empty: write something to send.")
    self._refuse_busy()
    with self._busy:
        self._stop.clear()
        asked = [*before, {"role": "user", "content": text}]
        backup, parts = self.messages, []
        self.messages = [*asked, {"role": "assistant", "content": parts}]
        self.pieces, self.stats, self.finish_reason = [], ReplyStats(), "cancelled"
        self.replies, self.compared = self.replies + 1, {}
        prompt = self._with_system(asked)
        try:
            yield Piece("start")
            for piece in stream_reply(self.engine, self.tokenizer, prompt, settings, self._stop):
                if piece.kind == "end":
                    self.finish_reason = piece.text
                elif piece.kind != "note":
                    self.stats.count()
                    self.pieces.append(piece)
                    add_piece(parts, piece)
                yield piece
        except Exception:
            self.messages, self.finish_reason = backup, "error"
            raise


ChatSession._reply = _reply


# %%
#| export
def last_answer(session: ChatSession) -> str:
    """The text of the last answer, without what the calculator wrote."""
    parts = session.messages[-1]["content"] if session.messages else []
    return "".join(part["text"] for part in parts if part["type"] == "text")


# %% [markdown]
r"""
The session at work: a question, a change of mind, a stop in the middle. `stop()` may be called from
any thread; that will be the button's part.
"""

# %%
session = ChatSession(parrot, parrot.tokenizer)
for _ in session.send("One"):
    pass
for _ in session.edit(0, "Two, and a longer text so that there is something to stop"):
    if session.stats.tokens == 8:
        session.stop()
print(session.messages)
print(session.finish_reason, "after", session.stats.tokens, "tokens")

# %%
assert [m["role"] for m in session.messages] == ["user", "assistant"]
assert session.finish_reason == "cancelled" and 8 <= session.stats.tokens <= 10

# %% [markdown]
r"""
A recipe leaves several models behind: base, midtrained, fine-tuned, reinforced. The best way to see
what a stage did is one question to all of them, side by side. The models take turns, one token
each, so all columns grow together and the fastest does not win the reader's eye. The conversation
itself stays as it is.
"""


# %%
#| export
def _compare(
    self: ChatSession, engines: dict[str, Any], text: str = "", **settings: Any
) -> Iterator[Piece]:
    """Ask several engines `text`, or the last question again; `compared` holds their answers."""
    settings = replace(self.settings, **settings).check()
    talk = self.messages
    if not text.strip():
        i, text = self._last_question()
        talk = talk[:i]
    prompt = self._with_system([*talk, {"role": "user", "content": text}])
    self._refuse_busy()
    with self._busy:
        self._stop.clear()
        self.compared, self.compared_text = {name: [] for name in engines}, text
        self.stats, self.finish_reason = ReplyStats(), "cancelled"
        yield Piece("start")
        streams = {}
        for name, engine in engines.items():
            tokenizer = getattr(engine, "tokenizer", None) or self.tokenizer
            streams[name] = stream_reply(engine, tokenizer, prompt, settings, self._stop)
        while streams:
            for name in list(streams):
                piece = next(streams[name], None)
                if piece is None:
                    del streams[name]
                elif piece.kind in ("end", "note"):
                    self.finish_reason = piece.text if piece.kind == "end" else self.finish_reason
                else:
                    self.stats.count()
                    add_piece(self.compared[name], piece)
                    yield piece


ChatSession.compare = _compare

# %%
calm, hasty = Parrot(parrot.tokenizer, delay=0.01), Parrot(parrot.tokenizer, delay=0.001)
for _ in session.compare({"calm": calm, "hasty": hasty}, "Who is faster?"):
    if session.stats.tokens == 12:
        session.stop()
print({name: "".join(part["text"] for part in parts) for name, parts in session.compared.items()})

# %% [markdown]
r"""
A conversation is worth keeping, so a session can be written to JSON and read back. Two things are
saved: what was said, and how the answers were chosen.
"""


# %%
#| export
def save_session(session: ChatSession, path: str | Path) -> None:
    """Write conversation, system prompt and settings as JSON, atomically."""
    session._refuse_busy()
    content = {"format": "nanochat conversation", "version": 1, "system": session.system}
    write_json(
        path, {**content, "settings": asdict(session.settings), "messages": session.messages}
    )


def load_session(session: ChatSession, path: str | Path) -> None:
    """Replace a session's conversation and settings by those of a file; check them first."""
    session._refuse_busy()
    saved = read_json(path)
    if not isinstance(saved, dict) or saved.get("format") != "nanochat conversation":
        raise UserError(f"{Path(path).name} is not a saved conversation; choose another file.")
    messages, system = check_messages(saved.get("messages")), saved.get("system", "")
    wrong = not isinstance(system, str) or not isinstance(saved.get("settings", {}), dict)
    if wrong or set(saved.get("settings", {})) - {one.name for one in fields(ChatSettings)}:
        raise UserError(f"{Path(path).name} has settings this version does not know.")
    settings = ChatSettings(**saved.get("settings", {})).check()
    session.clear()
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
    session.messages, session.system, session.settings = messages, system, settings


# %% [markdown]
r"""
## Text that can never become a page

A notebook cell and a browser page are made of HTML, and the model writes whatever it likes. If it
writes `<img src=x onerror=...>` and we put that into the page, the browser runs it. It need not be
malice: a model that has read web pages writes tags. The naive bubble:
"""

# %%
evil = 'Look: <img src=x onerror="alert(1)"> **done**'
naive = f"<div class='bubble'>{evil}</div>"
print(naive)
print(f"<div class='bubble'>{html.escape(evil)}</div>")

# %% [markdown]
r"""
`html.escape` turns the five dangerous characters `& < > " '` into entities, and the text is only
text again. But we also want a little Markdown: code, bold, lists. The usual way is to turn Markdown
into HTML and then remove what is dangerous from the result. Removing is a list of known evils, and
the list is never complete.

We go the other way. Split the **raw** text at the marks we know; escape every leaf; put tags from
our own short list around the leaves. No character of the model's text gets into the page without
passing `html.escape`, so there is nothing to remove. Links and images are not on the list: an image
would call another machine just by being shown.
"""


# %%
#| export
MARKDOWN_TAGS = ("p", "br", "pre", "code", "strong", "em", "ul", "ol", "li")
_INLINE = r"`([^`\n]+)`|\*\*([^*\n]+)\*\*|\*([^*\s][^*\n]*)\*"
_ITEM = r"\s{0,8}(?:([-*+])|\d{1,9}[.)])\s+(.*)"


def _inline_html(text: str) -> str:
    """One line: code, bold and emphasis; every leaf is escaped."""
    out, at = [], 0
    for match in re.finditer(_INLINE, text):
        tag = ("code", "strong", "em")[match.lastindex - 1]
        out.append(html.escape(text[at : match.start()]))
        out.append(f"<{tag}>{html.escape(match[match.lastindex])}</{tag}>")
        at = match.end()
    return "".join(out) + html.escape(text[at:])


def _block_html(lines: list[str]) -> str:
    """Neighbouring lines of one kind: a list or a paragraph."""
    items = [re.fullmatch(_ITEM, line) for line in lines]
    if items[0]:
        tag = "ul" if items[0][1] else "ol"
        return f"<{tag}>" + "".join(f"<li>{_inline_html(m[2])}</li>" for m in items) + f"</{tag}>"
    plain = (re.sub(r"^#{1,6}\s+(.*)$", r"**\1**", line) for line in lines)
    return "<p>" + "<br>".join(_inline_html(line) for line in plain) + "</p>"


def markdown_html(text: str) -> str:
    """Render a small, safe Markdown (code, bold, emphasis, lists) using only MARKDOWN_TAGS.

    Every character of `text` is escaped; links, images and HTML stay visible as plain text.
    """
    out = []
    for number, chunk in enumerate(re.split(r"(?m)^\s{0,3}```.*$\n?", text)):
        if number % 2:
            out.append(f"<pre><code>{html.escape(chunk)}</code></pre>")
            continue
        block, kind = [], None
        for line in [*chunk.split("\n"), ""]:
            match = re.fullmatch(_ITEM, line)
            now = ("ul" if match[1] else "ol") if match else "p" if line.strip() else None
            if now != kind and block:
                out.append(_block_html(block))
                block = []
            kind = now
            if now:
                block.append(line)
    return "".join(out)


# %%
print(markdown_html(evil + "\n\n- `1 < 2`\n- two\n\n```\nfor i in x: <b>\n```"))

# %% [markdown]
r"""
The claim "only our tags" can be checked by a machine: feed hostile text, list every tag that comes
out. Python's own HTML parser is the referee. The test file does the same with thousands of
generated texts.
"""

# %%
#| test
from html.parser import HTMLParser

_hostile = [
    "<script>alert(1)</script>",
    "`<b>` **<i>** *<u>*",
    "- <li onclick=x>\n- ![a](http://x/y.png)",
    "```\n</code></pre><script>\n```",
    "**a `b** c`",
    "[x](javascript:alert(1))",
    "&lt;script&gt; &#60;b>",
]
_seen = set()
_parser = HTMLParser()
_parser.handle_starttag = lambda tag, attrs: _seen.add((tag, *attrs))
for _text in _hostile:
    _parser.feed(markdown_html(_text))
assert _seen <= {(tag,) for tag in MARKDOWN_TAGS}, _seen

# %% [markdown]
r"""
## A bubble

One function draws one message. The calculator's part is folded into a `<details>` element: a click
opens it, and no script is needed. The colours are Jupyter's own variables, with a fallback behind
the comma, and a see-through blue, so the dark theme needs no second style sheet.
"""


# %%
#| export
CHAT_CSS = """
.nc-chat { max-width: 46em; font-size: 14px; line-height: 1.45;
  color: var(--jp-ui-font-color1, inherit); }
.nc-turn { line-height: 1.45; margin: 6px 4px; padding: 2px 12px; border-radius: 12px;
  width: fit-content; max-width: 88%; overflow-wrap: anywhere;
  background: var(--jp-layout-color2, #8881);
  border: 1px solid var(--jp-border-color2, #8884); color: var(--jp-ui-font-color1, inherit); }
.nc-user { margin-left: auto; background: #2f95d840; }
.nc-turn p, .nc-turn ul, .nc-turn ol { margin: 6px 0; }
.nc-turn ul, .nc-turn ol { padding-left: 1.6em; }
.nc-turn pre { margin: 6px 0; padding: 6px 8px; overflow-x: auto; border-radius: 6px;
  background: var(--jp-layout-color1, #8882); color: inherit; }
.nc-turn code { font-family: var(--jp-code-font-family, monospace); font-size: 13px;
  color: inherit; }
.nc-turn details { margin: 6px 0; opacity: .9; }
.nc-turn summary { cursor: pointer; }
.nc-wait { opacity: .6; }
.nc-turn :not(pre) > code { background: var(--jp-layout-color1, #8882); border-radius: 3px;
  padding: 0 3px; }
.nc-token { border-radius: 3px; white-space: pre-wrap; }
.nc-columns { display: flex; gap: 8px; overflow-x: auto; }
.nc-column { flex: 1 1 0; min-width: 10em; } .nc-column > b { margin-left: 8px; font-size: 12px; }
.nc-column .nc-turn { max-width: none; }
"""


def content_html(content: Any) -> str:
    """The inside of a bubble: Markdown text, and tool calls folded together with their results."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    out = []
    for i, part in enumerate(parts):
        if part["type"] == "text":
            out.append(markdown_html(part["text"]))
        elif part["type"] == "python":
            follows = i + 1 < len(parts) and parts[i + 1]["type"] == "python_output"
            result = parts[i + 1]["text"] if follows else "(no result)"
            body = f"<pre>{html.escape(part['text'])}\n= {html.escape(result)}</pre>"
            out.append(f"<details><summary>used the calculator</summary>{body}</details>")
        elif i == 0 or parts[i - 1]["type"] != "python":
            out.append(f"<pre>{html.escape(part['text'])}</pre>")
    return "".join(out) or '<p class="nc-wait" aria-label="waiting">…</p>'


def bubble_html(message: dict[str, Any]) -> str:
    """One message as a bubble, with a label for screen readers."""
    who = {"user": "You", "assistant": "Model"}.get(message["role"], message["role"].title())
    kind = "user" if message["role"] == "user" else "model"
    inside = content_html(message["content"])
    return f'<div class="nc-turn nc-{kind}" role="article" aria-label="{who}">{inside}</div>'


# %%
#| export
def comparison_html(question: str, answers: dict[str, Any]) -> str:
    """One question and the answers of several models (content by name), side by side."""
    columns = ""
    for name, content in answers.items():
        bubble = bubble_html({"role": "assistant", "content": content})
        name = html.escape(name)
        columns += f'<section class="nc-column" aria-label="{name}"><b>{name}</b>{bubble}</section>'
    asked = bubble_html({"role": "user", "content": question})
    return f'{asked}<div class="nc-columns" role="group" aria-label="Comparison">{columns}</div>'


def transcript_html(messages: list[dict[str, Any]]) -> str:
    """A whole conversation as static HTML: what a printed notebook can show."""
    bubbles = "".join(bubble_html(message) for message in messages)
    return f'<style>{CHAT_CSS}</style><div class="nc-chat">{bubbles}</div>'


# %%
example = [
    {"role": "user", "content": "What is 12 * 3? <b>Show</b> your work."},
    {
        "role": "assistant",
        "content": [
            {"type": "python", "text": "12*3"},
            {"type": "python_output", "text": "36"},
            {
                "type": "text",
                "text": "It is **36**:\n\n1. ten threes are 30\n2. two more make `36`",
            },
        ],
    },
]
display(HTML(transcript_html(example)))

# %% [markdown]
r"""
The engine also knows how sure it was of each token. A second view paints that: the darker a token,
the less likely it was. Hovering shows the number. The text is escaped here too.
"""


# %%
#| export
def tokens_html(pieces: list[Piece]) -> str:
    """The tokens of a reply, shaded by probability p: pale when p is near 1, dark when small."""
    out = []
    for piece in pieces:
        p = math.exp(min(piece.logprob, 0.0))
        title = "written by the calculator" if piece.forced else f"p = {p:.3f}"
        shade = "#8883" if piece.forced else f"rgba(213, 94, 0, {0.75 * (1 - p):.2f})"
        text = html.escape(piece.text) or "·"
        out.append(
            f'<span class="nc-token" title="{title}" style="background: {shade}">{text}</span>'
        )
    return f'<div class="nc-turn nc-model" role="article"><p>{"".join(out)}</p></div>'


# %% [markdown]
r"""
## A button that does not freeze

Now the widget, from an empty cell. Three pieces of `ipywidgets`: a box to type in, a button, and an
`HTML` field whose value we replace while the text grows. The obvious handler streams inside the
click. We add a Stop button that notes when it was heard.
"""

# %%
view = ipywidgets.HTML()
heard = []
stop_button = ipywidgets.Button(description="Stop")
stop_button.on_click(lambda _: heard.append(time.perf_counter()))


def naive_click(_):
    for _piece in stream_reply(parrot, parrot.tokenizer, question, ChatSettings()):
        view.value = html.escape(view.value + _piece.text)


button = ipywidgets.Button(description="Send")
button.on_click(naive_click)
begin = time.perf_counter()
button.click()
blocked = time.perf_counter() - begin
print(f"the kernel was deaf for {blocked:.2f} s, as long as the whole reply")

# %% [markdown]
r"""
A notebook kernel handles one message at a time. While the handler of Send runs, the click on Stop
waits in the queue and is heard when there is nothing left to stop.

The cure has two halves. A **thread** computes, so the handler returns at once. An **event**
(`threading.Event`) carries the wish to stop: the button sets it, the generator looks at it between
two tokens. No thread is killed; it is asked. So Stop takes at most the time of one token, and a
little for drawing.
"""

# %%
stop_event = threading.Event()


def stream_in_thread():
    for _piece in stream_reply(parrot, parrot.tokenizer, question, ChatSettings(), stop_event):
        view.value += html.escape(_piece.text)


def patient_click(_):
    threading.Thread(target=stream_in_thread, daemon=True).start()


button = ipywidgets.Button(description="Send")
button.on_click(patient_click)
begin = time.perf_counter()
button.click()
print(f"deaf for {(time.perf_counter() - begin) * 1000:.1f} ms instead of {blocked * 1000:.0f} ms")
time.sleep(0.05)
stop_event.set()

# %% [markdown]
r"""
One more trap: every change of `value` sends the **whole** text to the browser. A reply of $n$
tokens, drawn at each token, sends $1 + 2 + \dots + n \approx n^2/2$ tokens. We draw at most every
50 ms (nobody reads faster), and only the last bubble; older bubbles are not touched.

The controls are plain `ipywidgets` with a description, which is also what a screen reader says.
One part `ipywidgets` does not have: a box of several lines in which Enter *sends*, Shift+Enter
starts a new line and Escape stops. `anywidget` lets us write such a part ourselves, as a page of
JavaScript inside a Python class. Its two halves share **traits**: what one side sets, the other
side sees. `value` is the text, and `sent` and `stopped` count the two keys. They are counters, so
that pressing the same key twice is a change twice; and text and counter travel in one message, so
they cannot overtake each other.

The last trait, `said`, is for people who do not see the screen. A screen reader reads aloud what is
added to an element with the role `log`. Reading every token would be a stutter, so we hand it the
whole answer once, when it is complete. The browser's half:
"""

# %%
#| export
COMPOSER_JS = """
export default { render({ model, el }) {
  const box = document.createElement("textarea"), log = document.createElement("div");
  let known = box.value = model.get("value");
  box.rows = 3;
  box.dataset.lmSuppressShortcuts = "true";  // else Notebook 7 runs the cell on Shift+Enter
  box.setAttribute("aria-label", "Message");
  box.placeholder = "Ask something. Enter sends, Shift+Enter starts a line, Escape stops.";
  log.setAttribute("role", "log");
  log.setAttribute("aria-label", "Answers");
  const tell = (changes) => {
    known = box.value;
    model.set({ value: box.value, ...changes });
    model.save_changes();
  };
  box.addEventListener("change", () => tell({}));
  box.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.isComposing) return;
    if (event.key === "Escape") tell({ stopped: model.get("stopped") + 1 });
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    tell({ sent: model.get("sent") + 1 });
  });
  model.on("change:value", () => {  // but never overwrite what is being typed meanwhile
    if (box.value === known) box.value = model.get("value");
    known = model.get("value");
  });
  model.on("change:said", () => {
    const line = document.createElement("p");
    line.textContent = model.get("said");
    log.replaceChildren(line);
  });
  el.append(box, log);
} };
"""

# %% [markdown]
r"""
Python's half declares the traits, and brings the looks; the log is there for the ear only.
"""

# %%
#| export
COMPOSER_CSS = """
.nc-composer textarea { box-sizing: border-box; width: 100%; padding: 6px 10px; resize: vertical;
  font: inherit; font-size: 14px; line-height: 1.4; border-radius: 8px;
  color: var(--jp-ui-font-color1, inherit); background: var(--jp-layout-color1, transparent);
  border: 1px solid var(--jp-border-color1, #888a); }
.nc-composer textarea:focus { outline: 2px solid var(--jp-brand-color1, #2f95d8); }
.nc-composer [role=log] { position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%); }
"""


class Composer(anywidget.AnyWidget):
    """A box of several lines: Enter adds one to `sent`, Escape adds one to `stopped`.

    `value` is the text; setting `said` makes a screen reader read that text aloud.
    """

    _esm, _css = COMPOSER_JS, COMPOSER_CSS
    value = traitlets.Unicode().tag(sync=True)
    sent = traitlets.Int().tag(sync=True)
    stopped = traitlets.Int().tag(sync=True)
    said = traitlets.Unicode().tag(sync=True)


# %% [markdown]
r"""
The other controls need no JavaScript of ours:
"""


# %%
#| export
class ChatControls:
    """The visible parts of a ChatWidget; it only builds them, `ChatWidget` gives them life."""

    def __init__(self, names: list[str], settings: ChatSettings, system: str) -> None:
        wide = {"layout": {"width": "95%"}, "style": {"description_width": "90px"}}
        make = ipywidgets
        self.box = Composer()
        self.box.add_class("nc-composer")
        self.send = self._button("Send", "Send the message (Enter)", button_style="primary")
        self.stop = self._button("Stop", "Stop the reply", disabled=True)
        self.again = self._button("Regenerate", "Answer the last question again")
        self.compare = self._button("Compare", "Ask all models the message, or the last question")
        self.clear = self._button("Clear", "Forget the conversation")
        self.more = make.ToggleButton(description="Settings", layout={"width": "auto"})
        self.model = make.Dropdown(options=names, description="Model", **wide)
        self.system = make.Text(value=system, description="System", **wide)
        warmth, top_p = settings.temperature, settings.top_p or 1.0  # sliders have no spoken name
        self.temperature = make.BoundedFloatText(
            warmth, min=0, max=2, step=0.1, description="Temperature", **wide
        )
        top_k, length = settings.top_k or 0, settings.max_tokens
        self.top_k = make.BoundedIntText(top_k, min=0, max=1000, description="Top-k", **wide)
        self.top_k.tooltip = "0 keeps all tokens"
        self.top_p = make.BoundedFloatText(
            top_p, min=0.05, max=1, step=0.05, description="Top-p", **wide
        )
        self.max_tokens = make.BoundedIntText(
            length, min=1, max=4096, description="Max tokens", **wide
        )
        self.seed = make.BoundedIntText(settings.seed, min=0, max=2**31, description="Seed", **wide)
        self.shade = make.Checkbox(description="Show token probabilities", indent=False)
        self.file = make.Text("conversation.json", description="File", **wide)
        self.save = self._button("Save", "Write the conversation to the file")
        self.load = self._button("Load", "Read a conversation from the file")
        rigid = {"flex": "0 0 auto", "width": "100%"}  # or the scrolling box would squeeze its rows
        self.status, self.rows = make.HTML(), make.VBox(layout=rigid)
        self.columns = make.HTML(layout=rigid)  # a comparison of models
        self.view = self._arrange()

    def _button(self, text: str, help: str, **options: Any) -> ipywidgets.Button:
        return ipywidgets.Button(
            description=text, tooltip=help, layout={"width": "auto", "flex": "0 0 auto"}, **options
        )

    def _arrange(self) -> ipywidgets.VBox:
        row, column = ipywidgets.HBox, ipywidgets.VBox
        scroll = {"max_height": "480px", "overflow": "auto", "flex_flow": "column-reverse"}
        options = [self.system, self.temperature, self.top_k, self.top_p, self.max_tokens]
        options += [self.seed, self.shade, self.file, row([self.save, self.load])]
        settings = column(options, layout={"display": "none"})
        show = {True: "flex", False: "none"}
        self.more.observe(lambda c: settings.layout.set_trait("display", show[c.new]), "value")
        style = ipywidgets.HTML(f"<style>{CHAT_CSS}</style>")
        several = len(self.model.options) > 1
        rows = column([self.rows, self.columns], layout={"flex": "0 0 auto", "width": "100%"})
        talk = ipywidgets.Box([rows], layout=scroll)
        buttons = [self.send, self.stop, self.again, self.clear]
        buttons += [*([self.compare] if several else []), self.more]
        parts = [style, *([self.model] if several else []), talk, self.status, self.box]
        return column([*parts, row(buttons), settings])


# %% [markdown]
r"""
The talk lies in a box with `column-reverse`: browsers keep such a box scrolled to its **end** while
it grows, which saves us a script.

Now the life. `_start` runs a generator of pieces in a thread; `draw` makes the bubbles agree with
the session; `_draw_last` redraws only the growing one.
"""


# %%
#| export
def name_engines(engines: Any) -> dict[str, Any]:
    """One engine or a dict of them, as a dict; an empty dict is refused."""
    named = dict(engines) if isinstance(engines, dict) else {"nanochat": engines}
    if not named:
        raise UserError("There is no engine to talk to: pass an Engine or a dict of engines.")
    return named


# %% [markdown]
r"""
What each button does:
"""


# %%
#| export
class _ChatActions:
    """What the buttons of a ChatWidget do; mixed into it below."""

    def send(self) -> None:
        """Send what stands in the box; after Edit it replaces that question."""
        text, i = self.controls.box.value, self.editing
        self._apply()
        if self.busy or not text.strip():
            raise UserError("Write a message first." if not self.busy else "Wait, or press Stop.")
        self._start(self.session.send(text) if i is None else self.session.edit(i, text))
        self.editing, self.controls.box.value = None, ""

    def regenerate(self) -> None:
        """Answer the last question again with the next seed."""
        self._apply()
        self._start(self.session.regenerate())

    def compare(self) -> None:
        """Ask all models what stands in the box, or the last question, side by side."""
        self._apply()
        self._start(self.session.compare(self.engines, self.controls.box.value))

    def edit(self, i: int) -> None:
        """Put question `i` into the box; Send then replaces it and all that followed."""
        self.editing, self.controls.box.value = i, self.session.messages[i]["content"]
        self._draw_status()

    def clear(self) -> None:
        """Forget the conversation."""
        self.session.clear()
        self.editing, self._note = None, ""
        self.draw()

    def save(self) -> None:
        """Write the conversation to the file named in the settings."""
        self._apply()
        save_session(self.session, self.controls.file.value)
        self._note = "Saved."

    def load(self) -> None:
        """Read a conversation from the file named in the settings."""
        load_session(self.session, self.controls.file.value)
        c, settings = self.controls, self.session.settings
        c.system.value, c.temperature.value = self.session.system, settings.temperature
        c.top_k.value, c.top_p.value = settings.top_k or 0, settings.top_p or 1.0
        c.max_tokens.value, c.seed.value = settings.max_tokens, settings.seed
        self.editing, self._note = None, "Loaded."
        self.draw()

    def _apply(self) -> None:
        """Read model, system prompt and settings from the controls."""
        if self.busy:
            raise UserError("A reply is still being written: press Stop or wait for its end.")
        c, engine = self.controls, self.engines[self.controls.model.value]
        self.session.engine, self.session.tokenizer = engine, self.tokenizer or engine.tokenizer
        self.session.system = c.system.value
        top_p = c.top_p.value if c.top_p.value < 1 else None
        self.session.settings = ChatSettings(
            c.temperature.value, c.top_k.value or None, top_p, c.max_tokens.value, c.seed.value
        )


# %%
#| export
class _ChatDrawing:
    """The thread and the status line of a ChatWidget; mixed into it below."""

    @property
    def busy(self) -> bool:
        """True while a reply is being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the running reply is complete; False when `timeout` seconds pass first."""
        if self._thread is not None:
            self._thread.join(timeout)
        return not self.busy

    def _start(self, pieces: Iterator[Piece]) -> None:
        """Note the question here, at once; leave the computing to a thread."""
        next(pieces)  # the piece "start": bad input fails here, and an early Stop is not lost
        self._note, self._running = "", True
        self.draw()
        self._set_busy(True)
        self._thread = threading.Thread(target=self._stream, args=(pieces,), daemon=True)
        self._thread.start()

    def _stream(self, pieces: Iterator[Piece]) -> None:
        """The worker: let the session grow and redraw the last bubble every `refresh` seconds."""
        drawn = 0.0
        try:
            for piece in pieces:
                if piece.kind == "note":
                    self._note = piece.text
                elif time.perf_counter() - drawn >= self.refresh:
                    self._draw_last()
                    drawn = time.perf_counter()
        except UserError as error:
            self._failure = str(error)
        except Exception as error:  # shown in the widget: a thread has no cell to fail in
            self._failure = f"The engine failed: {type(error).__name__}: {error}"
        finally:
            self._running = False
            self.draw()
            self._set_busy(False)
            self.controls.box.said = self._failure or last_answer(self.session)

    def _set_busy(self, busy: bool) -> None:
        c = self.controls
        c.stop.disabled = not busy
        for button in (c.send, c.again, c.compare, c.clear, c.save, c.load):
            button.disabled = busy

    def _draw_status(self) -> None:
        """The line below the talk: what failed, what is being edited, or how fast it went."""
        text = str(self.session.stats) if self.session.stats.tokens else ""
        ends = {"cancelled": "stopped", "length": "cut at the length limit"}
        why = "" if self._running else ends.get(self.session.finish_reason, "")
        editing = "editing an earlier question" if self.editing is not None else ""
        words = [self._failure or editing, self._note, text, why]
        line = html.escape(" · ".join(word for word in words if word))
        kind = "alert" if self._failure else "status"
        self.controls.status.value = f'<div role="{kind}" aria-live="polite">{line}</div>'


# %% [markdown]
r"""
And the drawing of the talk itself. Rows that have not changed keep their widget.
"""


# %%
#| export
class _ChatBubbles:
    """The rows of bubbles of a ChatWidget; mixed into it below."""

    def draw(self) -> None:
        """Make the bubbles agree with the session; rows that have not changed are kept."""
        rows, messages = list(self.controls.rows.children), self.session.messages
        for i in range(len(rows), len(messages)):
            bubble = ipywidgets.HTML(layout={"flex": "1 1 auto", "min_width": "0"})
            row = [bubble]
            if i % 2 == 0:
                row.append(self.controls._button("Edit", "Edit this question and ask again"))
                row[1].on_click(lambda _, i=i: self._try(lambda: self.edit(i)))
            rows.append(ipywidgets.HBox(row, layout={"flex": "0 0 auto", "align_items": "center"}))
        for row, message in zip(rows, messages[:-1]):
            row.children[0].value = bubble_html(message)  # nothing is sent if it is the same
        self.controls.rows.children = rows[: len(messages)]
        self._draw_last()

    def _draw_last(self) -> None:
        if self.session.messages:
            shade = self.controls.shade.value and self.session.pieces
            message = self.session.messages[-1]
            value = tokens_html(self.session.pieces) if shade else bubble_html(message)
            self.controls.rows.children[-1].children[0].value = value
        compared = self.session.compared
        columns = comparison_html(self.session.compared_text, compared) if compared else ""
        self.controls.columns.value = columns
        self._draw_status()


# %% [markdown]
r"""
The widget itself only joins the two: it makes the controls, ties each button to its action, and
turns an error that a person can mend into a line of text below the talk.
"""


# %%
#| export
class ChatWidget(_ChatActions, _ChatDrawing, _ChatBubbles):
    """A chat in a notebook cell, around one engine or several (`{"base": ..., "sft": ...}`).

    Put it last in a cell, or `display(widget)`. The session is `widget.session`; `wait()` waits for
    the running reply (for scripts and tests).
    """

    def __init__(
        self,
        engines: Any,
        tokenizer: Tokenizer | None = None,
        *,
        system: str = "",
        settings: ChatSettings | None = None,
        refresh: float = 0.05,
    ) -> None:
        self.engines, self.tokenizer, self.refresh = name_engines(engines), tokenizer, refresh
        first = next(iter(self.engines.values()))
        settings = (settings or ChatSettings()).check()
        self.session = ChatSession(first, tokenizer or first.tokenizer, system, settings)
        self.controls = ChatControls(list(self.engines), settings, system)
        self.editing: int | None = None
        self._thread: threading.Thread | None = None
        self._note, self._failure, self._running = "", "", False
        self._connect()
        self.draw()

    def _connect(self) -> None:
        """Tie every control to its action; an error a user can mend becomes a line of text."""
        c = self.controls
        pairs = [(c.send, self.send), (c.stop, self.session.stop), (c.again, self.regenerate)]
        pairs += [(c.clear, self.clear), (c.save, self.save), (c.load, self.load)]
        for button, action in [*pairs, (c.compare, self.compare)]:
            button.on_click(lambda _, action=action: self._try(action))
        c.box.observe(lambda _: self._try(self.send), "sent")
        c.box.observe(lambda _: self._try(self.session.stop), "stopped")
        c.shade.observe(lambda _: self.draw(), "value")

    def _try(self, action: Callable[[], None]) -> None:
        try:
            self._failure = ""
            action()
        except UserError as error:
            self._failure = str(error)
        self._draw_status()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.controls.view)


# %% [markdown]
r"""
Does Stop hold its promise? We let the parrot speak slowly and a lot, press Stop after a while, and
measure how long the widget still works. Six tries at each of three speeds: if our explanation is
right, the dots lie between zero and the time of one token, wherever in a token the click falls.
"""

# %%
import matplotlib.pyplot as plt

from nanochat.common import COLORS, figure


def stop_latency(engine, tries=6):
    times = []
    for attempt in range(tries):
        chat = ChatWidget(engine)
        chat.controls.box.value = "so many words that nobody wants to read them " * 4
        chat.controls.send.click()
        time.sleep(0.12 + 0.017 * attempt)
        begin = time.perf_counter()
        chat.controls.stop.click()
        chat.wait()
        times.append(time.perf_counter() - begin)
    return times


speeds = [0.01, 0.03, 0.06]
latencies = [stop_latency(Parrot(parrot.tokenizer, delay=delay)) for delay in speeds]
fig, ax = figure(
    "Stop takes no longer than about one token",
    "time per token (ms)",
    "from click to silence (ms)",
    alt="Dots of measured stop latencies for three token times, spread between zero and about the "
    "time of one token, far below the promise of 200 ms.",
)
for delay, times in zip(speeds, latencies):
    ax.plot([1000 * delay] * len(times), [1000 * t for t in times], "o", color=COLORS[0], alpha=0.6)
ax.plot([0, 70], [0, 70], "--", color=COLORS[6], label="time of one token")
ax.axhline(200, color=COLORS[1], label="our promise")
ax.set_ylim(0, 220)
ax.legend(fontsize=8)
plt.show()

# %%
middle = [sorted(times)[len(times) // 2] for times in latencies]
assert max(middle) < 0.2, middle

# %% [markdown]
r"""
## The same session in a terminal

A terminal needs no thread. Python turns Ctrl-C into a `KeyboardInterrupt`, which leaves the loop;
the session keeps what has come. One thing must be cleaned here as well: a terminal obeys escape
sequences, so a model that writes the escape character could recolour, move or retitle your window.
"""


# %%
#| export
def plain_text(text: str) -> str:
    """Text without control characters (but with newlines and tabs): safe to print."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable() or c.isspace() and c > "\x85")


class _Commands:
    """The slash commands of `terminal_chat`: each method `do_NAME(argument)` returns a line."""

    def __init__(self, session: ChatSession, engines: dict[str, Any]) -> None:
        self.session, self.engines = session, engines

    def run(self, line: str) -> str:
        name, _, argument = line[1:].partition(" ")
        action = getattr(self, f"do_{name.lower()}", None)
        if action is None:
            raise UserError(f"There is no command /{name}; /help lists them.")
        return action(argument.strip())

    def do_help(self, _: str) -> str:
        return (
            "/clear  /again  /system TEXT  /temperature 0.8  /topk 50 (0: all)  /topp 0.9  "
            "/max 256  /seed 0  /model [NAME]  /save FILE  /load FILE  /quit"
        )

    def do_clear(self, _: str) -> str:
        self.session.clear()
        return "A new conversation."

    def do_system(self, argument: str) -> str:
        self.session.system = argument
        return f"System prompt: {argument or '(none)'}"

    def do_model(self, name: str) -> str:
        if name:
            if name not in self.engines:
                raise UserError(f"There is no model {name!r}; found {', '.join(self.engines)}.")
            self.session.engine = self.engines[name]
        mine = [n for n, engine in self.engines.items() if engine is self.session.engine]
        return f"Model {mine[0]} of {', '.join(self.engines)}."

    def do_save(self, name: str) -> str:
        save_session(self.session, name or "conversation.json")
        return f"Saved to {name or 'conversation.json'}."

    def do_load(self, name: str) -> str:
        load_session(self.session, name or "conversation.json")
        return f"Loaded {len(self.session.messages)} messages."


# %%
#| export
def _change_setting(self: _Commands, argument: str, name: str, kind: type) -> str:
    """Read one setting; top-k 0 and top-p 1 mean "off"."""
    try:
        value = kind(argument)
    except ValueError:
        raise UserError(f"{name} needs a number; found {argument!r:.40}.") from None
    off = (name, value) in (("top_k", 0), ("top_p", 1.0))
    changed = replace(self.session.settings, **{name: None if off else value})
    self.session.settings = changed.check()
    return f"{name} is {value} now."


_Commands.do_temperature = lambda self, text: _change_setting(self, text, "temperature", float)
_Commands.do_topk = lambda self, text: _change_setting(self, text, "top_k", int)
_Commands.do_topp = lambda self, text: _change_setting(self, text, "top_p", float)
_Commands.do_max = lambda self, text: _change_setting(self, text, "max_tokens", int)
_Commands.do_seed = lambda self, text: _change_setting(self, text, "seed", int)


def _print_reply(pieces: Iterator[Piece], write: Callable[[str], Any]) -> None:
    """Print pieces as they come; Ctrl-C ends the reply, not the program."""
    inside = "text"
    try:
        for piece in pieces:
            if piece.kind == "note":
                write(f"[{piece.text}]\n")
            elif piece.kind in ("text", "python", "python_output"):
                if piece.opens and piece.kind != inside:
                    write({"python": " [", "python_output": " = ", "text": "] "}[piece.kind])
                    inside = piece.kind
                write(plain_text(piece.text))
    except KeyboardInterrupt:
        write("\n[stopped]")
    finally:
        pieces.close()
    write("\n")


# %%
#| export
def terminal_chat(
    engines: Any,
    tokenizer: Tokenizer | None = None,
    prompt: str | None = None,
    *,
    system: str = "",
    settings: ChatSettings | None = None,
    read: Callable[[str], str] = input,
    write: Callable[[str], Any] | None = None,
) -> str:
    """Chat in a terminal until /quit, Ctrl-D, or Ctrl-C at the prompt.

    With `prompt`, answer that one question and return. Returns the last answer's text.
    """
    engines = name_engines(engines)
    write = write or _write_now
    engine = next(iter(engines.values()))
    session = ChatSession(engine, tokenizer or engine.tokenizer, system, settings)
    commands = _Commands(session, engines)
    if prompt is not None:
        _print_reply(session.send(prompt), write)
        return last_answer(session)
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() a history and arrow keys)
    write(f"Talking to {next(iter(engines))}. /help lists the commands; Ctrl-C stops a reply.\n")
    while True:
        try:
            line = read("you> ").strip()
            if line in ("/quit", "/exit"):
                break
            if line == "/again":
                _print_reply(session.regenerate(), write)
            elif line.startswith("/"):
                write(plain_text(commands.run(line)) + "\n")
            elif line:
                _print_reply(session.send(line), write)
        except UserError as error:
            write(f"{error}\n")
        except (EOFError, KeyboardInterrupt):
            write("\n")
            break
    return last_answer(session)


def _write_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


# %%
typed = iter(["Hello, terminal", "/temperature 0", "/temperature warm", "/again", "/quit"])
written = []
answer = terminal_chat(parrot, read=lambda ask: next(typed), write=written.append)
print("".join(written))

# %% [markdown]
r"""
## A model to talk to

Enough of the parrot. We train a model of half a million parameters on two kinds of conversation of
the tiny world: questions about itself, and word problems that it solves with the calculator. It
knows nothing else, and it will show. If you have a better one, name its folder in `model`.
"""

# %%
import torch

from nanochat.checkpoint import load_checkpoint
from nanochat.common import seed_everything
from nanochat.engine import Engine
from nanochat.finetune import ConversationBatches
from nanochat.model import GPT, GPTConfig, init_weights
from nanochat.optim import build_optimizer
from nanochat.tinyworld import conversation
from nanochat.train import fit


def small_chat_model():
    """Train a tiny chat model from nothing; returns its Engine."""
    seed_everything(seed)
    talks = [conversation(world, i, ("identity", "arithmetic")[i % 2]) for i in range(talks_count)]
    texts = [content_html(m["content"]) for talk in talks[:600] for m in talk["messages"]]
    tokenizer = Tokenizer.train([html.unescape(text) for text in texts], vocab_size)
    config = GPTConfig(vocab_size, seq_len, depth, n_head=2, n_kv_head=2, n_embd=width)
    net = GPT(config)
    init_weights(net, seed=seed)
    batches = ConversationBatches(talks, tokenizer, 8, seq_len, train_on="assistant", seed=seed)
    fit(net, build_optimizer(net), batches, train_steps, label="chat model")
    return Engine(net.eval(), tokenizer)


if model:
    folder = Path(model)
    engine = Engine(
        load_checkpoint(folder).model.eval(), Tokenizer.load(folder.parent / "tokenizer")
    )
else:
    engine = small_chat_model()
print(f"{engine.model.num_params()['total']:,} parameters, window {engine.model.config.seq_len}")

# %% [markdown]
r"""
The widget does not notice that the parrot is gone. We ask three questions, the last one again after
an edit.
"""

# %%
widget = ChatWidget(
    {"nano": engine, "parrot": parrot}, settings=ChatSettings(temperature=0.0, max_tokens=120)
)


def ask(text):
    widget.controls.box.value = text
    widget.controls.send.click()
    widget.wait()


ask("Who are you?")
ask("Mira finds 14 nuts and Nils finds 29 nuts. How many nuts do they have together?")
ask("Are you a person?")
widget.edit(4)
ask("What can you do?")
display(HTML(transcript_html(widget.session.messages)))
print(widget.session.stats.tokens, "tokens in the last answer")

# %% [markdown]
r"""
Click on the folded line to see the call of the calculator. In a live notebook, end a cell with
`widget` to go on talking, or pick the parrot in its list of models.

What did the training buy? We ask the model and a twin that never trained, side by side. In the
widget the button *Compare* does this with all its models: after the capstone these are the base,
midtrained, fine-tuned and reinforced ones.
"""

# %%
twin = GPT(engine.model.config)
init_weights(twin, seed=seed)
stages = {"untrained": Engine(twin.eval(), engine.tokenizer), "trained": engine}
session = ChatSession(engine, engine.tokenizer)
for _ in session.compare(stages, "Who are you?", max_tokens=25):
    pass
shown = comparison_html(session.compared_text, session.compared)
display(HTML(f'<style>{CHAT_CSS}</style><div class="nc-chat">{shown}</div>'))

# %% [markdown]
r"""
How sure was the model? A fresh question at temperature 1, each token shaded by its probability. The
numbers that the calculator wrote are grey: the model had no say in them.
"""

# %%
session = ChatSession(engine, engine.tokenizer, settings=ChatSettings(1.0, None, seed=seed))
for _ in session.send("Vera had 20 nuts but lost 15 of them. How many nuts does Vera still have?"):
    pass
display(HTML(f'<style>{CHAT_CSS}</style><div class="nc-chat">{tokens_html(session.pieces)}</div>'))
sure = sum(piece.logprob > math.log(0.9) for piece in session.pieces)
print(f"{sure} of {len(session.pieces)} tokens had a probability above 0.9")
