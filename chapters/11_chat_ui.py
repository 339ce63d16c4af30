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
    """

    kind: str
    text: str = ""
    id: int = -1
    logprob: float = 0.0
    forced: bool = False
    opens: bool = False


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

    An engine with a method `stream_messages` (a server, see below) renders the prompt itself.
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

# %% [markdown]
r"""
## From one reader to many: a server

The widget lives in the notebook's kernel. Everybody else speaks HTTP. Most programs that talk to a
language model speak one dialect of it, OpenAI's: `POST /v1/chat/completions` with JSON messages.
If our server speaks it, those programs work with our model unchanged.

How can an HTTP answer arrive in pieces? The server does not say how long the answer will be, and
keeps the connection open. The common shape is **server-sent events**: lines that begin with
`data: `, an empty line after each event. The dialect ends the stream with the event `[DONE]`.
"""

# %%
#| export serve
import asyncio
import hmac
import json
import logging
import queue
import secrets
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from nanochat.common import UserError
from nanochat.tokenizer import Tokenizer


# %%
#| export serve
def event(data: Any) -> str:
    """One server-sent event that carries JSON (or the word [DONE])."""
    text = data if isinstance(data, str) else json.dumps(data)
    return f"data: {text}\n\n"


def read_events(lines: Iterator[str]) -> Iterator[Any]:
    """The JSON of each server-sent event in a stream of lines, up to [DONE]."""
    for line in lines:
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data == "[DONE]":
            return
        if line.startswith("data:"):
            yield json.loads(data)


# %%
stream = event({"token": "Hel"}) + event({"token": "lo\n"}) + event("[DONE]")
print(stream)
print(list(read_events(iter(stream.splitlines()))))

# %% [markdown]
r"""
A newline inside the text is no trouble: JSON writes it as `\n`, so an event stays one line. We let
JSON escape everything that is not ASCII too. Unicode knows other line ends (U+2028, for one), and
some clients cut there, in the middle of an event.

## Limits before features

A server that listens meets requests that nobody would type: a body of a gigabyte, a temperature of
`NaN`, a thousand connections that never read. Every resource gets a number, and passing it is a
clear 4xx answer. One address may not take all the places either, and even a body that trickles in
byte by byte has to arrive in time. The defaults fit a laptop.
"""


# %%
#| export serve
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
The fields of a request stand in one table: name, type, lowest and highest value. The table checks
requests, and it also becomes the schema that the server publishes at `/openapi.json`.
"""


# %%
#| export serve
FIELDS = {
    "model": ("string", None, None),
    "temperature": ("number", 0, 2),
    "top_p": ("number", 0, 1),
    "top_k": ("integer", 0, 100_000),  # 0 keeps all tokens
    "max_tokens": ("integer", 1, None),
    "max_completion_tokens": ("integer", 1, None),
    "seed": ("integer", -(2**63), 2**63 - 1),
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


# %%
#| export serve
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
#| export serve
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
A stop string may arrive in two tokens, so text that *could* be its beginning must wait until it is
sure. `StopStrings` holds back as little as possible: the longest end of the text that is a
beginning of a stop string.
"""


# %%
#| export serve
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
## One thread owns the model

Sixteen people ask at once. Sixteen threads that all compute would fight for two cores, and nobody
could say who gets the next turn. We keep **one** engine thread and a queue of steps. A step is one
token of one reply. The loop of each request puts its next step at the end of the queue, so the
requests take turns, token by token, and nobody waits for somebody else's whole reply.

Taking turns need not mean working for one at a time. The streams of one engine share its loop
(chapter 8): whoever asks first has a token computed for all of them together, and the others find
theirs ready when their turn comes. The server knows nothing of it; it only asks for the next piece.

Two more things fall out of the queue. The engine is never used by two threads. And a client that
disconnects simply puts no further step into it.

A `Job` is one admitted request. Closing it gives back everything, exactly once, whatever happened:
the end, an error, a disconnect, the time limit.
"""


# %%
#| export serve
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


# %%
#| export serve
class Slots:
    """Admit `concurrent` jobs, `per_client` from one address; let `waiting` more queue.

    The rest is turned away with 429.
    """

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self.limits, self.metrics = limits, metrics
        self.free = asyncio.Semaphore(limits.concurrent)
        self.clients: Counter[str] = Counter()  # requests by address, waiting or running

    async def take(self, client: str) -> Callable[[], None]:
        """Wait for a slot; returns the function that gives it back (calling twice is harmless)."""
        metrics, most = self.metrics, self.limits.per_client
        if self.clients[client] >= most:
            raise ApiError(429, f"At most {most} requests at a time from one client: wait for one.")
        if self.free.locked() and metrics.waiting >= self.limits.waiting:
            raise ApiError(429, "The server is busy: too many requests wait. Try again later.")
        metrics.waiting += 1
        self.clients[client] += 1
        try:
            await asyncio.wait_for(self.free.acquire(), self.limits.seconds)
        except BaseException as error:
            self._forget(client)
            if not isinstance(error, asyncio.TimeoutError):
                raise
            raise ApiError(503, "The server is busy: no free slot in time. Try again.") from None
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

    def _forget(self, client: str) -> None:
        self.clients[client] -= 1
        if not self.clients[client]:
            del self.clients[client]


# %%
#| export serve
@dataclass
class Job:
    """One admitted request: where its pieces come from, and what to give back at the end."""

    id: str
    model: str
    kind: str  # "chat.completion" or "text_completion"
    ids: list[int]
    pieces: Iterator[Piece]
    stop: threading.Event
    stops: StopStrings
    release: Callable[[], None]
    engine: EngineThread
    metrics: Metrics
    deadline: float
    note: str = ""
    logprobs: bool = False
    usage: bool = False
    tokens: int = 0
    finished: bool = False

    def close(self) -> None:
        """Stop computing and free the slot; harmless when called again."""
        self.stop.set()
        self.engine.close(self.pieces)
        self.release()

    async def run(self) -> AsyncIterator[Piece]:
        """The pieces, cut at stop strings and at the deadline, counted; the last one is "end"."""
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
                yield replace(piece, text=shown)
                if found:
                    break
            else:
                if held := self.stops.flush():
                    yield Piece("text", held)
                yield piece
            if time.perf_counter() > self.deadline:
                end = Piece("end", "length")
                break
        if held := self.stops.flush():
            yield Piece("text", held)
        yield end


# %% [markdown]
r"""
## The two shapes of an answer

A chat answer and a plain completion differ in names only, and each comes streamed or whole. Text
goes into `content`. What the calculator wrote has no place in the dialect, so it travels beside it,
as `part` (streamed) or `parts` (whole); other clients ignore what they do not know.
"""


# %%
#| export serve
def _logprobs(job: Job, pieces: list[Piece]) -> dict[str, Any] | None:
    """Log probabilities in the shape of the endpoint, or None when nobody asked."""
    if not job.logprobs:
        return None
    real = [piece for piece in pieces if piece.id >= 0]
    texts, values = [piece.text for piece in real], [piece.logprob for piece in real]
    if job.kind == "text_completion":
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": None}
    rows = zip(texts, values)
    return {
        "content": [
            {"token": t, "logprob": v, "bytes": list(t.encode()), "top_logprobs": []}
            for t, v in rows
        ],
        "refusal": None,
    }


def _frame(job: Job, chunk: bool, **more: Any) -> dict[str, Any]:
    chat = job.kind == "chat.completion"
    kind = "chat.completion.chunk" if chat and chunk else job.kind
    frame = {"id": job.id, "object": kind, "created": int(time.time()), "model": job.model}
    return {**frame, **more, **({"note": job.note} if job.note else {})}


def _usage(job: Job) -> dict[str, int]:
    prompt, answer = len(job.ids), job.tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


# %%
#| export serve
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
    async for piece in job.run():
        if piece.kind == "end":
            yield chunk(None, piece.text if piece.text != "cancelled" else "stop")
        elif piece.text or piece.kind != "text" or job.logprobs:
            yield chunk(piece, None, piece.text if piece.kind == "text" else "")
    if job.usage:
        yield event(_frame(job, True, choices=[], usage=_usage(job)))
    job.finished = True
    yield event("[DONE]")


async def whole_answer(job: Job, gone: Callable[[], Any]) -> dict[str, Any]:
    """The complete answer as one object; stops early when `gone()` says the client has left."""
    pieces, parts, reason = [], [], "stop"
    async for piece in job.run():
        if piece.kind == "end":
            reason = piece.text if piece.text != "cancelled" else "stop"
        else:
            pieces.append(piece)
            add_piece(parts, piece)
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

`ChatServer` ties it together: read the body up to its limit, check it, take a slot, make a job.
Building the prompt runs the tokenizer, which is work as well, so it goes to the engine thread.
"""


# %%
#| export serve
class ChatServer:
    """Everything the web application needs, without the web framework."""

    def __init__(self, engines: Any, tokenizer: Tokenizer | None, limits: Limits) -> None:
        self.engines, self.tokenizer, self.limits = name_engines(engines), tokenizer, limits
        self.metrics, self.engine_thread = Metrics(), EngineThread()
        self.slots = Slots(limits, self.metrics)

    async def body(self, request: Any) -> dict[str, Any]:
        """The JSON body of a request, read no further and no longer than the limits say."""
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "Send the body as application/json.")
        try:
            return parse_json(await asyncio.wait_for(self._read(request), self.limits.seconds))
        except asyncio.TimeoutError:
            raise ApiError(408, "The body did not arrive in time.") from None

    async def _read(self, request: Any) -> bytes:
        data = bytearray()
        async for block in request.stream():
            data += block
            if len(data) > self.limits.body_bytes:
                raise ApiError(413, f"The body may have {self.limits.body_bytes} bytes.")
        return bytes(data)

    def choose(self, values: dict[str, Any]) -> tuple[str, Any, Tokenizer]:
        """The engine a request names; without a name, the first."""
        name = values.get("model", next(iter(self.engines)))
        if name not in self.engines:
            known = ", ".join(self.engines)
            raise ApiError(404, f"There is no model {name!r:.60}; there are: {known}.", "model")
        engine = self.engines[name]
        return name, engine, self.tokenizer or engine.tokenizer

    async def admit(self, body: dict[str, Any], chat: bool, client: str) -> Job:
        """Check a request, wait for a slot and prepare its job."""
        deadline = time.perf_counter() + self.limits.seconds
        values = check_fields(body, self.limits)
        name, engine, tokenizer = self.choose(values)
        settings, stops = read_settings(values, self.limits), StopStrings(read_stops(body))
        source = read_messages(body, self.limits) if chat else read_prompt(body, self.limits)
        release, stop = await self.slots.take(client), threading.Event()

        def prepare() -> tuple[list[int], str, Iterator[Piece]]:
            ids, note = make_prompt(engine, tokenizer, source, settings)
            return ids, note, generate_pieces(engine, tokenizer, ids, settings, stop, tools=chat)

        try:
            ids, note, pieces = await self.engine_thread.call(prepare)
        except BaseException:
            release()
            raise
        self.metrics.prompt_tokens += len(ids)
        kind, key = ("chat.completion", "chatcmpl-") if chat else ("text_completion", "cmpl-")
        job = Job(key + secrets.token_hex(12), name, kind, ids, pieces, stop, stops, release,
                  self.engine_thread, self.metrics, deadline, note)  # fmt: skip
        asked = body.get("logprobs")
        job.logprobs = bool(asked) if chat else isinstance(asked, int) and asked is not False
        job.usage = bool((values.get("stream_options") or {}).get("include_usage"))
        return job


# %%
#| export serve
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
## The page

A browser needs one page. Ours is one file of HTML, CSS and JavaScript, without a library, and it
loads nothing from any other machine. We write it in four small pieces. The first is how it looks:
variables for the colours, and other values for them when the reader's system is dark.
"""


# %%
#| export serve
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
page forbids scripts inside the markup. Only the one script with today's `nonce`, a random word the
server invents for each visit, may run. Should hostile text ever slip into the page, the browser
itself
refuses to execute it.
"""


# %%
#| export serve
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
The script, part one: from text to page. It follows the same plan as our `markdown_html`, and its
safety has the same shape. `append` with a string always makes a *text node*; the browser never
parses it. The word `innerHTML` does not occur in this file.
"""


# %%
#| export serve
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
it. While a reply grows only its own bubble is filled again (or its column, when models are
compared), at most once per frame of the screen. With "Show token probabilities" a bubble shows its
tokens, shaded as in the widget. The list survives a reload of the page, because it is kept in the
tab's session storage.
"""


# %%
#| export serve
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
`state.growing` holds the bubbles that a running stream fills: one, or one for each model.
"""


# %%
#| export serve
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
#| export serve
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
#| export serve
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
`ChatSession`. Comparing opens one stream for each model; the engine thread lets them take turns.
"""


# %%
#| export serve
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

async function ask() {
  const talk = [...state.messages], answer = { role: "assistant", content: [], tokens: [] };
  state.messages.push(answer);
  state.compared = null;
  if (await run([answer], () => follow(talk, $("model").value, answer))) return;
  if (answer.content.length) return;
  state.messages.pop();  // nothing came: the question goes back into the box
  $("box").value = $("box").value || state.messages.pop().content;
  draw();
  keep();
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
#| export serve
PAGE_JS_BUTTONS = r"""
function startEdit(i) {
  state.editing = i;
  $("box").value = state.messages[i].content;
  $("status").textContent = "Editing an earlier question: Send replaces it and all that followed.";
  grow();
  $("box").focus();
}

function regenerate() {
  state.messages.pop();
  ask();
}

function send(event) {
  event.preventDefault();
  const text = $("box").value;
  if (state.running || !text.trim()) return;
  if (state.editing !== null) state.messages.splice(state.editing);
  state.editing = null;
  state.messages.push({ role: "user", content: text });
  $("box").value = "";
  grow();
  ask();
}
"""


# %%
#| export serve
PAGE_JS_START = r"""
function grow() {
  const box = $("box");
  box.style.height = "auto";
  box.style.height = Math.min(box.scrollHeight + 2, 144) + "px";
}

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
    state.compared = null;
    $("alert").textContent = "";
  } catch { $("alert").textContent = "This file is not a saved conversation."; }
  $("file").value = "";
  draw();
  keep();
}

function keep() {
  const values = Object.fromEntries(FIELDS.map((name) => [name, $(name).value]));
  sessionStorage.setItem("nanochat", JSON.stringify({ messages: state.messages, values }));
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
#| export serve
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


def page(nonce: str) -> str:
    """The web page as one file; only style and script that carry `nonce` are obeyed."""
    script = PAGE_JS_TEXT + PAGE_JS_BUBBLE + PAGE_JS_TALK + PAGE_JS_STREAM + PAGE_JS_FOLLOW
    script += PAGE_JS_ACTIONS + PAGE_JS_BUTTONS + PAGE_JS_START + PAGE_JS_EVENTS
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

The guard also counts requests and makes sure that an error inside shows no path and no traceback.
"""


# %%
#| export serve
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


async def _send_json(send: Any, status: int, body: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


# %% [markdown]
r"""
## The application

FastAPI maps paths to functions. It is the one large library of this chapter and an optional extra,
so it is imported inside the functions, and its absence is one clear sentence.

The streamed response has its own small class for one reason: whatever ends it, a last token, an
error, a reader who left, or one who reads so slowly that time is up, `job.close()` must run.
"""


# %%
#| export serve
def _need_serve_extra() -> None:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError(
            'Serving needs FastAPI and uvicorn; install them: pip install "nanochat[serve]"'
        ) from None


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


# %%
#| export serve
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
    Raises UserError when the extra `serve` is not installed.
    """
    _need_serve_extra()
    from fastapi import FastAPI, Request
    from fastapi.middleware.cors import CORSMiddleware
    from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
    from starlette.exceptions import HTTPException

    server = ChatServer(engines, tokenizer, limits or Limits())
    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None)
    app.state.server, app.state.token = server, token
    app.add_middleware(Guard, token=token, metrics=server.metrics)
    if origins:
        allowed = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), **allowed)

    def refuse(error: ApiError) -> Any:
        return JSONResponse(error.body(), error.status)

    app.exception_handler(ApiError)(lambda _, error: refuse(error))
    app.exception_handler(UserError)(lambda _, error: refuse(ApiError(400, str(error))))
    app.exception_handler(HTTPException)(
        lambda _, error: refuse(ApiError(error.status_code, str(error.detail)))
    )

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

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Any:
        return about(server.choose({"model": name})[0])

    for path, chat in (("/v1/chat/completions", True), ("/v1/completions", False)):
        _add_completions(app, server, path, chat, Request)
    return app


# %%
#| export serve
def _add_completions(
    app: Any, server: ChatServer, path: str, chat: bool, request_type: Any
) -> None:
    """Add one of the two endpoints that write text."""

    async def complete(request: Any) -> Any:
        body = await server.body(request)
        job = await server.admit(body, chat, request.client.host if request.client else "")
        if body.get("stream"):
            return stream_response(job)
        try:
            return await whole_answer(job, request.is_disconnected)
        finally:
            job.close()

    complete.__annotations__ = {"request": request_type}
    name = "chat_completions" if chat else "completions"
    app.post(path, openapi_extra=request_schema(chat, server.limits), name=name)(complete)


# %% [markdown]
r"""
## Starting it

`run_server` binds to `127.0.0.1`, where only this machine can connect. For any other address it
insists on a token: if none is given it makes one and prints it with the address, as Jupyter does.
A word after `#` in an address is never sent to a server, so the token does not land in any log.

`background_server` runs the same thing in a thread, for this chapter and for the tests.
"""


# %%
#| export serve
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


# %%
#| export serve
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
    Raises UserError when the port is taken or the extra `serve` is missing.
    """
    _need_serve_extra()
    if token is None and host not in ("127.0.0.1", "localhost", "::1"):
        token = secrets.token_urlsafe(24)
    app = create_app(engines, tokenizer, token=token, limits=limits, origins=origins)
    with _bind(host, port) as sock:
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{sock.getsockname()[1]}/" + (f"#token={token}" if token else "")
        print(f"nanochat is at {address} (Ctrl-C stops it)", flush=True)
        with suppress(KeyboardInterrupt):
            _uvicorn(app).run(sockets=[sock])


# %% [markdown]
r"""
We start it on a free port with two models and talk to it with nothing but Python's own `urllib`.
First the list of models, then an answer as it streams: the raw lines as they come over the wire.
"""

# %%
import urllib.error
import urllib.request


def post(url, body, headers=None):
    """POST JSON; returns the open response, which can be read line by line."""
    data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(url, data, {**kind, **(headers or {})}))


question = [{"role": "user", "content": "Who are you?"}]
request = {"model": "nano", "messages": question, "temperature": 0, "stream": True}
app = create_app({"nano": engine, "parrot": parrot})
with background_server(app) as address:
    listed = json.load(urllib.request.urlopen(address + "/v1/models"))
    with post(address + "/v1/chat/completions", request) as response:
        lines = [line.decode().strip() for line in response]
print([entry["id"] for entry in listed["data"]])
deltas = [line for line in lines if '"delta"' in line]
print(len(deltas), "events; the delta of the first five:")
for line in deltas[:5]:
    print("  ", json.loads(line.removeprefix("data: "))["choices"][0]["delta"])
print("the last line:", [line for line in lines if line][-1])

# %% [markdown]
r"""
And what does it say to requests that it should not serve? One bad value, one foreign `Host`, one
missing token, one model that is not there.
"""


# %%
def refused(url, body, headers=None):
    try:
        post(url + "/v1/chat/completions", body, headers).read()
    except urllib.error.HTTPError as error:
        print(error.code, json.load(error)["error"]["message"])


with background_server(app) as address:
    refused(address, {**request, "temperature": 99})
    refused(address, request, {"Host": "evil.example"})
    refused(address, {**request, "model": "gpt-9"})
with background_server(create_app(parrot, token="a secret")) as address:
    refused(address, request, {"Authorization": "Bearer a guess"})

# %% [markdown]
r"""
## The widget here, the model there

The model may live on a machine with a GPU, and the notebook on a laptop. Then an *engine* is
something that asks an endpoint. `stream_reply` asks an engine that has a method `stream_messages`
to do its own rendering, so all we need is a class that sends messages and turns each event back
into pieces.

Stop needs care once more. Reading a line from the network blocks for as long as the server is
silent. So a thread reads and puts lines into a queue, and the generator looks at the queue and at
the stop event in turns. When the generator ends, the thread closes the connection at its next line,
and the server frees the slot.
"""


# %%
#| export serve
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


# %%
#| export serve
class RemoteEngine:
    """A model behind an OpenAI-compatible endpoint, for ChatWidget, ChatSession and terminal_chat.

    `url` is the address up to /v1, `token` its access token. Raises UserError when the endpoint
    cannot be reached, refuses, or answers something else; nothing is sent before a question is.
    """

    tokenizer = None  # the endpoint renders prompts itself

    def __init__(self, url: str, model: str, token: str = "", timeout: float = 120.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"An endpoint's address begins with http:// or https://; found {url}.")
        self.url, self.model, self.token, self.timeout = url.rstrip("/"), model, token, timeout

    def open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The response to a request, not read yet; a body is sent by POST."""
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data)
        request.add_header("Content-Type", "application/json")
        if self.token:  # never sent on, should this address point to another one
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        try:
            return urllib.request.urlopen(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            with suppress(ValueError, KeyError, TypeError, OSError):  # it may hang up on us
                raise UserError(json.loads(error.read(10_000))["error"]["message"]) from None
            said = "wants a valid access token" if error.code == 401 else f"said {error.code}"
            raise UserError(f"{self.url} {said}.") from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise UserError(f"Cannot reach {self.url}: {reason}. Is the server running?") from None

    def _read(self, body: dict[str, Any], lines: queue.Queue, gone: threading.Event) -> None:
        """The reading thread: lines of the answer, then None; or the error."""
        try:
            with self.open("/chat/completions", body) as response:
                for line in response:
                    lines.put(line.decode("utf-8"))
                    if gone.is_set():
                        return
            lines.put(None)
        except Exception as error:
            lines.put(error)


# %%
#| export serve
def _stream_messages(
    self: RemoteEngine,
    messages: list[dict[str, Any]],
    settings: ChatSettings,
    stop: threading.Event | None = None,
) -> Iterator[Piece]:
    """Stream the pieces of the answer to a conversation; the last one has kind "end"."""
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


def remote_engines(url: str, token: str = "") -> dict[str, RemoteEngine]:
    """All models of an endpoint, by name: `ChatWidget(remote_engines("http://127.0.0.1:8000/v1"))`.

    Raises UserError when there is no such endpoint.
    """
    with RemoteEngine(url, "", token).open("/models") as response:
        try:
            names = [str(entry["id"]) for entry in json.load(response)["data"]]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{url} is not an OpenAI-compatible endpoint.") from None
    return {name: RemoteEngine(url, name, token) for name in names}


# %% [markdown]
r"""
The widget of the beginning, now around a server. It shows the same folded calculator, and its Stop
still closes the stream.
"""

# %%
with background_server(app) as address:
    widget = ChatWidget(remote_engines(address + "/v1"), settings=ChatSettings(0.0, max_tokens=60))
    ask("Mira finds 14 nuts and Nils finds 29 nuts. How many nuts do they have together?")
display(HTML(transcript_html(widget.session.messages)))

# %% [markdown]
r"""
## What streaming buys

Now the measurement that the chapter promised. We ask the server for answers of different lengths,
once streamed and once whole, and note when the **first** text is in our hands. As a control we ask
the engine directly, without HTTP: the distance between the two is what the network part costs.
"""

# %%
prompt_ids = render_prompt({"messages": question}, engine.tokenizer)
lengths = [4, 8, 16, 32, 64, 128]


def first_text(url, length, stream):
    """Seconds until the first text of a raw completion of at most `length` tokens, and its size."""
    body = {"prompt": "x", "model": "steady", "max_tokens": length, "stream": stream}
    begin = time.perf_counter()
    with post(url + "/v1/completions", body) as response:
        if not stream:
            return json.load(response) and time.perf_counter() - begin
        for line in response:
            if b'"text"' in line:
                return time.perf_counter() - begin


class Steady:
    """The model's speed without its habit of ending early: stop tokens are passed over."""

    def __init__(self, engine):
        self.engine, self.model, self.tokenizer = engine, engine.model, engine.tokenizer

    def generate(self, ids, max_tokens=256, stop=None, **options):
        made = 0
        while made < max_tokens:
            for token in self.engine.generate(prompt_ids, max_tokens - made, stop=stop):
                made += 1
                yield Token(3, "a ", token.logprob, False)
            if stop is not None and stop.is_set():
                return


# %%
steady = Steady(engine)
with background_server(create_app({"steady": steady})) as address:
    first_text(address, 2, True)  # warm up
    streamed = [[first_text(address, n, True) for n in lengths] for _ in range(3)]
    whole = [[first_text(address, n, False) for n in lengths] for _ in range(3)]
direct = []
for n in lengths:
    begin = time.perf_counter()
    next(steady.generate(prompt_ids, n))
    direct.append(time.perf_counter() - begin)

# %%
fig, ax = figure(
    "Streaming: the first words no longer wait for the last",
    "length of the answer (tokens)",
    "time to first text (ms)",
    alt="Time until the first text against the length of the answer. Whole answers: a rising line. "
    "Streamed answers and the engine without HTTP: two flat lines near zero.",
)
rows = [("whole answer", whole, 1, "s-"), ("streamed", streamed, 0, "o-")]
rows.append(("engine alone, no HTTP", [direct], 2, "^--"))
for label, runs, color, style in rows:
    middle = [1000 * sorted(times)[len(times) // 2] for times in zip(*runs)]
    ax.plot(lengths, middle, style, label=label, color=COLORS[color], markersize=4)
ax.set_ylim(bottom=0)
ax.legend(fontsize=8)
plt.show()

# %%
longest = [min(times[-1] for times in runs) for runs in (whole, streamed)]
assert longest[0] > 2 * longest[1], longest

# %% [markdown]
r"""
The line of whole answers rises with every token; the streamed one is flat, and lies a few
milliseconds above the engine alone. The model is exactly as slow in all three.

**Exercise for the curious**: let four threads ask at once. The time to first text stays small,
because the requests take turns at the engine, and the time per token grows by much less than four
times, because their tokens are computed together. From how many requests on does it grow in
proportion, and why (chapter 8)?

## Recap

What `nanochat` can do now that it could not before:

- `nanochat.ui.ChatWidget(engine)` chats in a notebook, `terminal_chat(engine)` in a terminal;
- `ChatSession` holds a conversation for all of them: `send`, `edit`, `regenerate`, `stop`, `clear`,
  and `save_session`, `load_session`;
- `stream_reply` and `generate_pieces` turn tokens into `Piece`s; `fit_context` keeps the newest
  turns;
- `ChatSession.compare` asks several models the same question; the widget and the page have a button
  for it;
- `markdown_html`, `transcript_html`, `comparison_html` and `tokens_html` draw text that can never
  become markup;
- `nanochat.serve.run_server(engine)` serves the web page and `/v1/chat/completions`,
  `/v1/completions`, `/v1/models`, `/health`, `/metrics`; `create_app` is the same for your own
  server, `Limits` its numbers, `background_server` its version inside a `with`;
- `remote_engines(url)` lets widget and terminal talk to such a server, anywhere.

## Pitfalls

- **Cleaning HTML instead of never making it.** Every list of forbidden tags has had a hole. Escape
  at the leaves, and add a content security policy for the day you err.
- **Computing in the callback.** It works in every demonstration, until somebody presses Stop.
- **A stop that comes too early.** If the worker clears the event when it *starts*, a quick click is
  lost. Here the event is cleared in the click on Send, before the thread exists.
- **Half a letter.** A token may end inside a UTF-8 character. Decode with a decoder that waits
  (`StreamDecoder` in chapter 1, `TextDecoder` in the page), never token by token.
- **Slots that leak.** A client that vanishes at the wrong moment must not keep its place. Give it
  back in a `finally` that runs whatever happened, and test with clients that hang up.
- **Open doors.** Chat servers in the wild listen on `0.0.0.0` with CORS open and no token. Then
  every page you visit can talk to your model, and through it to what your model may use.
- **One model per visitor.** A notebook server that renders the widget as a page starts a kernel,
  and so loads a copy of the model, for each visitor. That is why our page is a light one.

## Readings

- WHATWG, *HTML Living Standard*, section "Server-sent events": the format in two pages.
- OWASP, *Cross Site Scripting Prevention Cheat Sheet*: escaping by context.
- W3C, *Content Security Policy Level 3*: what a nonce promises and what not.
- Nielsen (1993), *Usability Engineering*, chapter 5: why 0.1 s, 1 s and 10 s are the limits.
- Kwon et al. (2023), *Efficient Memory Management for Large Language Model Serving with
  PagedAttention*: what comes after taking turns.
"""
