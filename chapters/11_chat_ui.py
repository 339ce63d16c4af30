# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# 11. Talking to it

By the end of this chapter you have shown that one short loop over tokens feeds a notebook widget
and a terminal alike, that a reply appears while it is still being written, and that the Stop button
works within two tenths of a second.

A chat window does not care who answers. So we begin without a model: the engine below is a
**parrot**. Like the engine of chapter 8 it has a method `generate` that yields `Token` objects,
here ten milliseconds apart. Everything we build in this chapter works with the parrot first; the
model comes later and needs no change.
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

1. turn tokens into parts of a message, and stream them;
2. keep a talk inside a finite window, and say what was left out;
3. put text from a model into a page so that it can never become markup or script;
4. explain why a button handler must not compute, and mend it with a thread and an event;
5. measure how long Stop takes, and say what sets that time;
6. show how sure a model was of each of its tokens.

**Before this**: chapters 8 (the engine) and 9 (the chat format). **To read**: 30 minutes.
**To run**: about 20 seconds on two CPU cores, offline.
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


# %% [markdown]
r"""
`read_pieces` is that machine. Its state is the kind of the part we are in, and whether the next
piece opens it.
"""


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


# %% [markdown]
r"""
A message of chapter 9 holds parts, not pieces. `add_piece` lets them grow, one piece at a time.
"""


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
We check both on a hand-made stream: words, a call of the calculator, its result, words, the end.
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
> **Exercise 11.1.** Write the whole way from tokens to parts in one function. (In the sheet:
> `11-parts`.)

## The window is finite

A model that was trained on rows of `seq_len` tokens has never seen position `seq_len + 1`. A long
talk reaches that border. Three choices: fail, silently cut, or cut and say so. We drop the oldest
whole turns, keep the system message, and tell the reader.

How many turns must go? Rendering and counting after each dropped turn costs one rendering per turn.
The question "does the rest fit?" flips from no to yes only once, so we can search by halving. Some
room must stay free for the answer; we call it `reserve`.
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
> **Exercise 11.2.** Which turns go? Say it without rendering anything. (In the sheet: `11-window`.)

## Settings and one reply

Temperature, top-k, top-p, length and seed (chapter 8) belong together, so we keep them in one small
object that knows what is allowed. Widget, terminal and server check their input by the same rule.
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


# %% [markdown]
r"""
`generate_pieces` runs the engine on a prompt and says at the end why it ended: the model had said
all ("stop"), the room was used up ("length"), or somebody pressed Stop ("cancelled"). Stop is a
`threading.Event` that is looked at between two tokens; we come back to it at the button.
"""


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


# %% [markdown]
r"""
`stream_reply` is the same for a whole conversation: it fits the talk into the window first. This is
the short loop that everything else in this chapter pulls from.
"""


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
People read five to ten tokens a second. What feels slow is the wait for the first one: the **time
to first token**. Streaming does not make the model faster; it moves almost all of the waiting
behind the reading.

## A conversation is a list that is edited

A conversation may come from outside: from a file that somebody gives you, or in a request to a
server (appendix A5). Then nothing about it may be taken for granted, not even that it is a list.
`check_messages` returns a clean copy, or says what is wrong where.
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
for saved in (["hello"], [{"role": "assistant", "content": "I begin."}], "hello"):
    try:
        check_messages(saved)
    except UserError as error:
        print(error)

# %% [markdown]
r"""
What did a reply cost? Below each answer stands a line such as "41 tokens · first after 0.02 s · 95
tokens/s". `ReplyStats` does the counting.
"""


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


# %% [markdown]
r"""
Now the conversation itself. A session holds the messages and offers what people do with a talk:
send, stop, edit an earlier question, ask for another answer, start over. Widget and terminal both
use this class, so neither holds a conversation of its own.

Editing question $i$ means: forget everything from message $i$ on, then send the new text.
Regenerating is editing the last question into itself, with another seed. So the three are one
generator with different beginnings. To find that last question is a function of its own.
"""


# %%
#| export
def last_question(messages: list[dict[str, Any]]) -> tuple[int, str]:
    """Index and text of the last question of a conversation; UserError if there is none."""
    asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        raise UserError("There is no question yet: write a message first.")
    return asked[-1], messages[asked[-1]]["content"]


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
        self.stats, self.replies = ReplyStats(), 0
        self.note, self.finish_reason = "", ""  # the reason is "" while a reply is being written
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
        yield from self.edit(*last_question(self.messages), **settings)

    def stop(self) -> None:
        """End the running reply before its next token; what has come stays."""
        self._stop.set()

    def clear(self) -> None:
        """Forget the conversation; the seed starts over too."""
        self._refuse_busy()
        self.messages, self.pieces, self.replies, self.compared = [], [], 0, {}
        self.stats, self.note, self.finish_reason = ReplyStats(), "", ""

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
(then the part that came stays), or the program may drop the generator half way. Python closes a
dropped generator, and then leaves its `with` and `finally` as well, so the session is free again
in every case.
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
        self.pieces, self.stats, self.note, self.finish_reason = [], ReplyStats(), "", ""
        self.replies, self.compared = self.replies + 1, {}
        prompt = self._with_system(asked)
        try:
            yield Piece("start")
            for piece in stream_reply(self.engine, self.tokenizer, prompt, settings, self._stop):
                if piece.kind == "end":
                    self.finish_reason = piece.text
                elif piece.kind == "note":
                    self.note = piece.text
                else:
                    self.stats.count()
                    self.pieces.append(piece)
                    add_piece(parts, piece)
                yield piece
        except Exception:
            self.messages, self.finish_reason = backup, "error"
            raise
        finally:
            self.finish_reason = self.finish_reason or "cancelled"


ChatSession._reply = _reply


# %% [markdown]
r"""
The other end of a talk is wanted too: by the terminal, and by a screen reader. What is read aloud
is the text of an answer, without what the calculator wrote.
"""


# %%
#| export
def answer_text(content: Any) -> str:
    """The text of an answer (a text, or parts) without what the calculator wrote."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def last_answer(session: ChatSession) -> str:
    """The text of the last answer; "" when there is none."""
    last = session.messages[-1] if session.messages else {"role": "user"}
    return answer_text(last["content"]) if last["role"] == "assistant" else ""


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
A run leaves several models behind: base, midtrained, fine-tuned, reinforced. The best way to see
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
        i, text = last_question(talk)
        talk = talk[:i]
    prompt = self._with_system([*talk, {"role": "user", "content": text}])
    self._refuse_busy()
    with self._busy:
        self._stop.clear()
        self.compared, self.compared_text = {name: [] for name in engines}, text
        self.stats, self.note, self.finish_reason = ReplyStats(), "", ""
        streams = {}
        for name, engine in engines.items():
            tokenizer = getattr(engine, "tokenizer", None) or self.tokenizer
            streams[name] = stream_reply(engine, tokenizer, prompt, settings, self._stop)
        try:
            yield Piece("start")
            while streams:
                for name in list(streams):
                    piece = next(streams[name], None)
                    if piece is None:
                        del streams[name]
                    elif piece.kind == "end":
                        self.finish_reason = piece.text
                    elif piece.kind == "note":  # windows differ, so it says whose it is
                        said = f"{name}: {piece.text}"
                        self.note = f"{self.note} · {said}" if self.note else said
                    else:
                        self.stats.count()
                        add_piece(self.compared[name], piece)
                        yield piece
        finally:
            self.finish_reason = self.finish_reason or "cancelled"


ChatSession.compare = _compare

# %%
calm, hasty = Parrot(parrot.tokenizer, delay=0.01), Parrot(parrot.tokenizer, delay=0.001)
for _ in session.compare({"calm": calm, "hasty": hasty}, "Who is faster?"):
    if session.stats.tokens == 12:
        session.stop()
print({name: answer_text(parts) for name, parts in session.compared.items()})

# %% [markdown]
r"""
A conversation is worth keeping, so a session can be written to JSON and read back. Two things are
saved: what was said, and how the answers were chosen. Reading checks everything before it changes
anything, so a broken file leaves the session as it was. A file may end with a question. In a
session each question has its answer, so `load_session` returns that one to whoever can ask it.
"""


# %%
#| export
def save_session(session: ChatSession, path: str | Path) -> None:
    """Write conversation, system prompt and settings as JSON, atomically.

    Raises UserError when the file cannot be written, or while a reply is.
    """
    session._refuse_busy()
    content = {"format": "nanochat conversation", "version": 1, "system": session.system}
    write_json(
        path, {**content, "settings": asdict(session.settings), "messages": session.messages}
    )


# %%
#| export
def load_session(session: ChatSession, path: str | Path) -> str:
    """Replace a session's conversation and settings by those of a file; check them first.

    A question at the end, which has no answer yet, is not made part of the conversation: it is
    returned, to be sent again or edited; "" if there is none. Raises UserError when the file cannot
    be read or is no saved conversation.
    """
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
    open_question = bool(messages) and messages[-1]["role"] == "user"
    question = messages.pop()["content"] if open_question else ""
    session.messages, session.system, session.settings = messages, system, settings
    return question


# %% [markdown]
r"""
## Text that can never become a page

A notebook cell and a browser page are made of HTML, and the model writes whatever it likes. If it
writes `<img src=x onerror=...>` and we put that into the page, the browser runs it. It need not be
malice: a model that has read web pages writes tags. The naive bubble, and the escaped one:
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
into HTML and then to remove what is dangerous from the result. Removing needs a list of all known
evils, and the list is never complete.

We go the other way. Split the **raw** text at the marks we know; escape every leaf; put tags from
our own short list around the leaves. No character of the model's text gets into the page without
passing `html.escape`, so there is nothing to remove. Links and images are not on our list: an image
calls another machine just by being shown. One line first: code, bold and emphasis.
"""


# %%
#| export
MARKDOWN_TAGS = ("p", "br", "pre", "code", "strong", "em", "ul", "ol", "li")
_INLINE = r"`([^`\n]+)`|\*\*([^*\n]+)\*\*|\*([^*\s][^*\n]*)\*"


def _inline_html(text: str) -> str:
    """One line: code, bold and emphasis; every leaf is escaped."""
    out, at = [], 0
    for match in re.finditer(_INLINE, text):
        tag = ("code", "strong", "em")[match.lastindex - 1]
        out.append(html.escape(text[at : match.start()]))
        out.append(f"<{tag}>{html.escape(match[match.lastindex])}</{tag}>")
        at = match.end()
    return "".join(out) + html.escape(text[at:])


# %% [markdown]
r"""
Then lines that belong together, a list or a paragraph (a heading becomes a bold line), and at last
the whole text: a fence of three backticks switches between code and everything else.
"""


# %%
#| export
_ITEM = r"\s{0,8}(?:([-*+])|\d{1,9}[.)])\s+(.*)"


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
out. Python's own HTML parser is the referee. The tests of the package do the same with thousands of
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
> **Exercise 11.3.** Let links in, and nothing but links. (In the sheet: `11-links`.)

## A bubble

A message is drawn as a bubble. The colours are Jupyter's own variables, with a fallback behind the
comma, and a see-through blue, so the dark theme needs no second style sheet.
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

# %% [markdown]
r"""
The calculator's part is folded into a `<details>` element: a click opens it, and no script is
needed. What we call `content` is a text, or the list of parts that `add_piece` made.
"""


# %%
#| export
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


# %% [markdown]
r"""
Bubbles side by side make a comparison, and bubbles below one another a transcript.
"""


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
The engine also reports how likely the model found each token. A second view paints that: the darker
a token, the less likely it was. Hovering shows the number. The text is escaped here too.
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
click.
"""

# %%
view = ipywidgets.HTML()


def naive_click(_):
    for _piece in stream_reply(parrot, parrot.tokenizer, question, ChatSettings()):
        view.value += html.escape(_piece.text)


button = ipywidgets.Button(description="Send")
button.on_click(naive_click)
begin = time.perf_counter()
button.click()
blocked = time.perf_counter() - begin
print(f"the kernel was deaf for {blocked:.2f} s, as long as the whole reply")

# %% [markdown]
r"""
A notebook kernel handles one message at a time. While the handler of Send runs, a click on Stop
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
50 ms (nobody reads faster), and only the last bubble.

`ReplyThread` is the thread that we keep. It does not know what is drawn; it calls `draw` now and
then, and `done` at the end. An error cannot be raised there, for a thread has no cell to fail in,
so `done` gets it as a sentence.
"""


# %%
#| export
class ReplyThread:
    """Pulls the pieces of a reply in a thread of its own.

    `draw()` is called at most every `refresh` seconds, and `done(failure)` once at the end, with a
    sentence, or "" if all went well.
    """

    def __init__(
        self, draw: Callable[[], None], done: Callable[[str], None], refresh: float
    ) -> None:
        self.draw, self.done, self.refresh = draw, done, refresh
        self.thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """True while a reply is being written."""
        return self.thread is not None and self.thread.is_alive()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the reply is complete; False when `timeout` seconds pass first."""
        if self.thread is not None:
            self.thread.join(timeout)
        return not self.busy

    def start(self, pieces: Iterator[Piece]) -> None:
        """Begin to pull; returns at once."""
        self.thread = threading.Thread(target=self._run, args=(pieces,), daemon=True)
        self.thread.start()

    def _run(self, pieces: Iterator[Piece]) -> None:
        drawn, failure = 0.0, ""
        try:
            for _ in pieces:
                if time.perf_counter() - drawn >= self.refresh:
                    self.draw()
                    drawn = time.perf_counter()
        except UserError as error:
            failure = str(error)
        except Exception as error:
            failure = f"The engine failed: {type(error).__name__}: {error}"
        finally:
            self.done(failure)


# %% [markdown]
r"""
> **Exercise 11.4.** At which pieces is the window drawn? (In the sheet: `11-draws`.)

## A box in which Enter sends

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
    const value = model.get("value");
    if (box.value === known) box.value = value;
    else if (value) box.value = value + "\\n" + box.value;
    known = value;
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
## The widget

It has four parts. `ReplyThread` we know. `Bubbles` draws the talk; rows that have not changed keep
their widget, and nothing is sent for them. Beside each question stands a button, Edit.
"""


# %%
#| export
def make_button(text: str, help: str, **options: Any) -> ipywidgets.Button:
    """A button as wide as its text, with a tooltip."""
    layout = {"width": "auto", "flex": "0 0 auto"}
    return ipywidgets.Button(description=text, tooltip=help, layout=layout, **options)


# %%
#| export
class Bubbles:
    """The talk as it is seen: one row for each message, and the columns of a comparison.

    `edit(i)` is called when the button beside question `i` is clicked.
    """

    def __init__(self, edit: Callable[[int], None]) -> None:
        rigid = {"flex": "0 0 auto", "width": "100%"}  # or the scrolling box would squeeze its rows
        self.rows, self.columns = ipywidgets.VBox(layout=rigid), ipywidgets.HTML(layout=rigid)
        scroll = {"max_height": "480px", "overflow": "auto", "flex_flow": "column-reverse"}
        inside = ipywidgets.VBox([self.rows, self.columns], layout=rigid)
        self.view, self.edit = ipywidgets.Box([inside], layout=scroll), edit

    def draw(self, session: ChatSession, shade: bool) -> None:
        """Make the rows agree with the session."""
        messages, rows = session.messages, list(self.rows.children)
        rows += [self._row(i) for i in range(len(rows), len(messages))]
        for row, message in zip(rows, messages[:-1]):
            row.children[0].value = bubble_html(message)  # nothing is sent if it is the same
        self.rows.children = rows[: len(messages)]
        self.draw_last(session, shade)

    def draw_last(self, session: ChatSession, shade: bool) -> None:
        """Draw what grows: the last bubble (its tokens, if `shade`), and a comparison."""
        if session.messages:
            last = session.messages[-1]
            shaded = shade and session.pieces
            value = tokens_html(session.pieces) if shaded else bubble_html(last)
            self.rows.children[-1].children[0].value = value
        text, answers = session.compared_text, session.compared
        self.columns.value = comparison_html(text, answers) if answers else ""

    def _row(self, i: int) -> ipywidgets.HBox:
        row = [ipywidgets.HTML(layout={"flex": "1 1 auto", "min_width": "0"})]
        if i % 2 == 0:
            row.append(make_button("Edit", "Edit this question and ask again"))
            row[1].on_click(lambda _: self.edit(i))
        return ipywidgets.HBox(row, layout={"flex": "0 0 auto", "align_items": "center"})


# %% [markdown]
r"""
The talk lies in a box with `column-reverse`: browsers keep such a box scrolled to its **end** while
it grows, which saves us a script.

The third part is what can be clicked and filled in. `ChatControls` translates between the fields
and `ChatSettings`; in a field, top-k 0 and top-p 1 mean "off".
"""


# %%
#| export
class ChatControls:
    """The buttons and fields of a ChatWidget; it only holds them, `ChatWidget` gives them life."""

    def __init__(self, names: list[str], settings: ChatSettings, system: str) -> None:
        self.box = Composer()
        self.box.add_class("nc-composer")
        self.send = make_button("Send", "Send the message (Enter)", button_style="primary")
        self.stop = make_button("Stop", "Stop the reply", disabled=True)
        self.again = make_button("Regenerate", "Answer the last question again")
        self.compare = make_button("Compare", "Ask all models the message, or the last question")
        self.clear = make_button("Clear", "Forget the conversation")
        self.save = make_button("Save", "Write the conversation to the file")
        self.load = make_button("Load", "Read a conversation from the file")
        wide = {"layout": {"width": "95%"}, "style": {"description_width": "90px"}}
        text, whole = ipywidgets.Text, ipywidgets.BoundedIntText
        real = ipywidgets.BoundedFloatText  # sliders have no spoken name
        self.model = ipywidgets.Dropdown(options=names, description="Model", **wide)
        self.system = text(description="System", **wide)
        self.temperature = real(min=0, max=2, step=0.1, description="Temperature", **wide)
        self.top_k = whole(min=0, max=1000, description="Top-k", tooltip="0: all", **wide)
        self.top_p = real(min=0.05, max=1, step=0.05, description="Top-p", **wide)
        self.max_tokens = whole(min=1, max=4096, description="Max tokens", **wide)
        self.seed = whole(min=0, max=2**31, description="Seed", **wide)
        self.shade = ipywidgets.Checkbox(description="Show token probabilities", indent=False)
        self.file = text("conversation.json", description="File", **wide)
        self.status = ipywidgets.HTML()
        self.show(settings, system)

    def show(self, settings: ChatSettings, system: str) -> None:
        """Fill the fields; a value beyond what a field offers widens the field."""
        self.system.value, self.temperature.value = system, settings.temperature
        bounded = {self.top_k: settings.top_k or 0, self.top_p: settings.top_p or 1.0}
        bounded.update({self.max_tokens: settings.max_tokens, self.seed: settings.seed})
        for one, value in bounded.items():
            one.min, one.max = min(one.min, value), max(one.max, value)
            one.value = value

    def put_back(self, question: str) -> None:
        """Put a question without an answer into the box, above what is typed there."""
        self.box.value = "\n".join(text for text in (question, self.box.value) if text)

    def settings(self) -> ChatSettings:
        """What the fields say."""
        top_k, top_p = self.top_k.value or None, self.top_p.value if self.top_p.value < 1 else None
        length, seed = self.max_tokens.value, self.seed.value
        return ChatSettings(self.temperature.value, top_k, top_p, length, seed)

    def set_busy(self, busy: bool) -> None:
        """While a reply is being written only Stop can be clicked."""
        self.stop.disabled = not busy
        for one in (self.send, self.again, self.compare, self.clear, self.save, self.load):
            one.disabled = busy


# %% [markdown]
r"""
How these parts lie below one another is a function of its own. The settings hide behind a button,
and what needs several models is there only if there are several.
"""


# %%
#| export
def arrange(controls: ChatControls, talk: ipywidgets.Widget) -> ipywidgets.VBox:
    """The whole widget: model, talk, status, message box, buttons, and settings on demand."""
    c, row, column = controls, ipywidgets.HBox, ipywidgets.VBox
    fields = [c.system, c.temperature, c.top_k, c.top_p, c.max_tokens, c.seed, c.shade, c.file]
    settings = column([*fields, row([c.save, c.load])], layout={"display": "none"})
    more = ipywidgets.ToggleButton(description="Settings", layout={"width": "auto"})
    show = {True: "flex", False: "none"}
    more.observe(lambda change: settings.layout.set_trait("display", show[change.new]), "value")
    several = len(c.model.options) > 1
    buttons = [c.send, c.stop, c.again, c.clear, *([c.compare] if several else []), more]
    style = ipywidgets.HTML(f"<style>{CHAT_CSS}</style>")
    parts = [style, *([c.model] if several else []), talk, c.status, c.box]
    return column([*parts, row(buttons), settings])


# %% [markdown]
r"""
The fourth part lets a session grow on the screen. Between the click on Send and the last token:
`run` takes the piece "start" while still in the click, so bad input fails where it can be shown,
the question stands there at once, and an early Stop is not lost. `_done` runs in the thread. A
failed reply leaves no trace in the session, so `_done` puts the question back into the box.
"""


# %%
#| export
class ChatView:
    """A session on the screen: bubbles, a status line, and the thread of the running reply."""

    def __init__(
        self,
        session: ChatSession,
        controls: ChatControls,
        edit: Callable[[int], None],
        refresh: float,
    ) -> None:
        self.session, self.controls, self.bubbles = session, controls, Bubbles(edit)
        self.whole = arrange(controls, self.bubbles.view)
        self.reply = ReplyThread(self._draw_last, self._done, refresh)
        self.note, self.failure, self.asked = "", "", ""
        self.editing: int | None = None  # the question that Send will replace
        self.edited: int | None = None  # the one that the running reply replaces

    def run(self, pieces: Iterator[Piece], asked: str = "") -> None:
        """Note the question here, at once; leave the computing to a thread.

        `asked` is the text that it takes from the box; it returns there when the reply fails.
        """
        next(pieces)
        self.note, self.asked = "", asked
        if asked:
            self.edited, self.editing, self.controls.box.value = self.editing, None, ""
        self.draw()
        self.controls.set_busy(True)
        self.reply.start(pieces)

    def _done(self, failure: str) -> None:
        self.failure = failure
        if failure and self.asked:
            self.editing = self.edited if self.editing is None else self.editing
            self.controls.put_back(self.asked)
        self.draw()
        self.controls.set_busy(False)
        answers = [f"{name}: {answer_text(c)}" for name, c in self.session.compared.items()]
        self.controls.box.said = failure or "\n".join(answers) or last_answer(self.session)

    def draw(self) -> None:
        """Make bubbles and status agree with the session."""
        self.bubbles.draw(self.session, self.controls.shade.value)
        self.draw_status()

    def _draw_last(self) -> None:
        self.bubbles.draw_last(self.session, self.controls.shade.value)
        self.draw_status()

    def draw_status(self) -> None:
        """The line below the talk: what failed, what is being edited, or how fast it went."""
        session = self.session
        editing = "editing an earlier question" if self.editing is not None else ""
        speed = str(session.stats) if session.stats.tokens else ""
        ends = {"cancelled": "stopped", "length": "cut at the length limit"}
        end = ends.get(session.finish_reason, "")
        words = [self.failure or editing, self.note or session.note, speed, end]
        line = html.escape(" · ".join(word for word in words if word))
        kind = "alert" if self.failure else "status"
        self.controls.status.value = f'<div role="{kind}" aria-live="polite">{line}</div>'


# %% [markdown]
r"""
`ChatWidget` joins the four. It takes one engine or several by name. It ties each button to its
action, and turns an error that a person can mend into a line of text below the talk.
"""


# %%
#| export
def name_engines(engines: Any) -> dict[str, Any]:
    """One engine or a dict of them, as a dict; an empty dict is refused."""
    named = dict(engines) if isinstance(engines, dict) else {"nanochat": engines}
    if not named:
        raise UserError("There is no engine to talk to: pass an Engine or a dict of engines.")
    return named


# %%
#| export
class ChatWidget:
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
        self.engines, self.tokenizer = name_engines(engines), tokenizer
        first = next(iter(self.engines.values()))
        settings = (settings or ChatSettings()).check()
        self.session = ChatSession(first, tokenizer or first.tokenizer, system, settings)
        self.controls = ChatControls(list(self.engines), settings, system)
        self.view = ChatView(
            self.session, self.controls, lambda i: self._try(lambda: self.edit(i)), refresh
        )
        self.draw, self.wait = self.view.draw, self.view.reply.wait
        self._connect()
        self.draw()

    @property
    def busy(self) -> bool:
        """True while a reply is being written."""
        return self.view.reply.busy

    def _connect(self) -> None:
        c = self.controls
        pairs = [(c.send, self.send), (c.stop, self.session.stop), (c.again, self.regenerate)]
        pairs += [(c.clear, self.clear), (c.save, self.save), (c.load, self.load)]
        for button, action in [*pairs, (c.compare, self.compare)]:
            button.on_click(lambda _, action=action: self._try(action))
        c.box.observe(lambda _: self._try(self.send), "sent")
        c.box.observe(lambda _: self._try(self.session.stop), "stopped")
        c.shade.observe(lambda _: self.draw(), "value")

    def _try(self, action: Callable[[], None]) -> None:
        self.view.failure = ""
        try:
            action()
        except UserError as error:
            self.view.failure = str(error)
        self.view.draw_status()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.view.whole)


# %% [markdown]
r"""
What the buttons do comes in two groups. Four ask the model; they first hand the choices in the
fields to the session.
"""


# %%
#| export
def _apply(self: ChatWidget) -> None:
    """Read model, system prompt and settings from the controls."""
    if self.busy:
        raise UserError("A reply is still being written: press Stop or wait for its end.")
    engine = self.engines[self.controls.model.value]
    self.session.engine, self.session.tokenizer = engine, self.tokenizer or engine.tokenizer
    self.session.system = self.controls.system.value
    self.session.settings = self.controls.settings()


def _on_send(self: ChatWidget) -> None:
    """Send what stands in the box; after Edit it replaces that question."""
    self._apply()
    text, i = self.controls.box.value, self.view.editing
    if not text.strip():
        raise UserError("Write a message first.")
    self.view.run(self.session.send(text) if i is None else self.session.edit(i, text), text)


def _on_regenerate(self: ChatWidget) -> None:
    """Answer the last question again with the next seed."""
    self._apply()
    self.view.run(self.session.regenerate())


def _on_compare(self: ChatWidget) -> None:
    """Ask all models what stands in the box, or the last question, side by side."""
    self._apply()
    self.view.run(self.session.compare(self.engines, self.controls.box.value))


ChatWidget._apply, ChatWidget.send = _apply, _on_send
ChatWidget.regenerate, ChatWidget.compare = _on_regenerate, _on_compare


# %% [markdown]
r"""
The others change the conversation without a model.
"""


# %%
#| export
def _on_edit(self: ChatWidget, i: int) -> None:
    """Put question `i` into the box; Send then replaces it and all that followed."""
    self.view.editing, self.controls.box.value = i, self.session.messages[i]["content"]
    self.view.draw_status()


def _on_clear(self: ChatWidget) -> None:
    """Forget the conversation."""
    self.session.clear()
    self.view.editing, self.view.note = None, ""
    self.draw()


def _on_save(self: ChatWidget) -> None:
    """Write the conversation to the file named in the settings."""
    self._apply()
    save_session(self.session, self.controls.file.value)
    self.view.note = "Saved."


def _on_load(self: ChatWidget) -> None:
    """Read a conversation from the file named in the settings; an open question goes to the box."""
    self.controls.put_back(load_session(self.session, self.controls.file.value))
    self.controls.show(self.session.settings, self.session.system)
    self.view.editing, self.view.note = None, "Loaded."
    self.draw()


ChatWidget.edit, ChatWidget.clear = _on_edit, _on_clear
ChatWidget.save, ChatWidget.load = _on_save, _on_load


# %% [markdown]
r"""
## How long does Stop take?

We let the parrot speak slowly and a lot, press Stop after a while, and measure how long the widget
still works. Six tries at each of three speeds: if our explanation is right, the dots lie between
zero and the time of one token, wherever in a token the click falls.
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
The dots lie below the dashed line or close to it, and far below our promise. The time of Stop is
the time of a token: a model that needs a second for each would take up to a second to stop, and no
button could change it.

## The same session in a terminal

A terminal needs no thread. Python turns Ctrl-C into a `KeyboardInterrupt`, which leaves the loop;
the session keeps what has come. One thing must be cleaned here as well: a terminal obeys escape
sequences, so a model that writes the escape character could recolour, move or retitle your window.
An endpoint could do the same with its errors and the names of its models, so every word is cleaned.
"""


# %%
#| export
def plain_text(text: str) -> str:
    """Text without control characters (but with newlines and tabs): safe to print."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable() or c.isspace() and c > "\x85")


# %% [markdown]
r"""
In a terminal the buttons are words behind a slash. Each method `do_NAME` is one of them; five words
change a setting, and a table says which.
"""


# %%
#| export
_KNOBS = {
    "temperature": ("temperature", float),
    "topk": ("top_k", int),
    "topp": ("top_p", float),
    "max": ("max_tokens", int),
    "seed": ("seed", int),
}


def _change_setting(session: ChatSession, word: str, text: str) -> str:
    """Set the knob behind `/word`; top-k 0 and top-p 1 mean "off". UserError for a bad value."""
    name, kind = _KNOBS[word]
    try:
        value = kind(text)
    except ValueError:
        raise UserError(f"{name} needs a number; found {text!r:.40}.") from None
    off = (name, value) in (("top_k", 0), ("top_p", 1.0))
    session.settings = replace(session.settings, **{name: None if off else value}).check()
    return f"{name} is {value} now."


# %%
#| export
class _Commands:
    """The slash commands of `terminal_chat`: each method `do_NAME(argument)` returns a line."""

    def __init__(self, session: ChatSession, engines: dict[str, Any]) -> None:
        self.session, self.engines = session, engines

    def run(self, line: str) -> str:
        word, _, argument = line[1:].partition(" ")
        word, argument = word.lower(), argument.strip()
        if word in _KNOBS:
            return _change_setting(self.session, word, argument)
        action = getattr(self, f"do_{word}", None)
        if action is None:
            raise UserError(f"There is no command /{word}; /help lists them.")
        return action(argument)

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
            engine = self.session.engine = self.engines[name]
            self.session.tokenizer = getattr(engine, "tokenizer", None) or self.session.tokenizer
        mine = [n for n, engine in self.engines.items() if engine is self.session.engine]
        return f"Model {mine[0]} of {', '.join(self.engines)}."

    def do_save(self, name: str) -> str:
        save_session(self.session, name or "conversation.json")
        return f"Saved to {name or 'conversation.json'}."

    def do_load(self, name: str) -> str:
        question = load_session(self.session, name or "conversation.json")
        open_end = f" This question has no answer yet; ask it again: {question}" if question else ""
        return f"Loaded {len(self.session.messages)} messages.{open_end}"


# %% [markdown]
r"""
A reply is printed piece by piece; what the calculator does stands in brackets. `read` and `write`
can be replaced, which is how the cell below types.
"""


# %%
#| export
def _write_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


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
                write(piece.text)
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
    write: Callable[[str], Any] = _write_now,
) -> str:
    """Chat in a terminal until /quit, Ctrl-D, or Ctrl-C at the prompt.

    With `prompt`, answer that one question and return. Returns the last answer's text. Raises
    UserError when the one answer fails; in a chat that is a line.
    """

    def say(text: str) -> None:
        write(plain_text(text))

    engines = name_engines(engines)
    engine = next(iter(engines.values()))
    session = ChatSession(engine, tokenizer or engine.tokenizer, system, settings)
    commands = _Commands(session, engines)
    if prompt is not None:
        _print_reply(session.send(prompt), say)
        return last_answer(session)
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() a history and arrow keys)
    say(f"Talking to {next(iter(engines))}. /help lists the commands; Ctrl-C stops a reply.\n")
    while True:
        try:
            line = read("you> ").strip()
            if line in ("/quit", "/exit"):
                break
            if line == "/again":
                _print_reply(session.regenerate(), say)
            elif line.startswith("/"):
                say(commands.run(line) + "\n")
            elif line:
                _print_reply(session.send(line), say)
        except UserError as error:
            say(f"{error}\n")
        except (EOFError, KeyboardInterrupt):
            say("\n")
            break
    return last_answer(session)


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
knows nothing else. If you have a better one, name its folder in `model`.
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
    texts = [answer_text(m["content"]) for talk in talks[:600] for m in talk["messages"]]
    tokenizer = Tokenizer.train(texts, vocab_size)
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
Click on the folded line to see the call of the calculator. The sum is right because the calculator
did it; the words around it are the model's own, and a model of this size mixes them up. In a live
notebook, end a cell with `widget` to go on talking, or pick the parrot in its list of models.

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
*Try it:* set the temperature to 2 and look at the shades again. Does the model get less sure, or
does it only choose less likely tokens? (The probabilities are those at temperature 1, whatever the
settings; chapter 8 says why.)

## Recap

What `nanochat` can do now that it could not before:

- `nanochat.ui.ChatWidget(engine)` chats in a notebook, `terminal_chat(engine)` in a terminal, and
  `python -m nanochat chat` with a finished run;
- `ChatSession` holds a conversation for both: `send`, `edit`, `regenerate`, `stop`, `clear`,
  `compare`; `save_session` and `load_session` keep it in a file that `check_messages` checks;
- `stream_reply` and `generate_pieces` turn tokens into `Piece`s, `read_pieces` and `add_piece` turn
  tokens into parts of a message;
- `fit_context` keeps the newest turns that fit and says how many did not;
- `markdown_html`, `transcript_html`, `comparison_html` and `tokens_html` draw text that can never
  become markup; `plain_text` does the same for a terminal.

Appendix A5 puts a server around the same engine: a web page, and an endpoint for other programs.

## Pitfalls

- **Cleaning HTML instead of never making it.** Every list of forbidden tags has had a hole. Escape
  at the leaves.
- **Computing in the callback.** It works in every demonstration, until somebody presses Stop.
- **A stop that comes too early.** If the worker clears the event when it *starts*, a quick click is
  lost. Here the event is cleared in the click on Send, before the thread exists.
- **Half a letter.** A token may end inside a UTF-8 character. Decode with a decoder that waits
  (`StreamDecoder` in chapter 1), never token by token.
- **The silent cut.** A chat that drops old turns without a word looks like a model that lies about
  what you said. Say what was left out.
- **Whose words are they?** A user can type `<|assistant_start|>`. Only `render_prompt` (chapter 9)
  makes special tokens; text from outside is encoded as text.

## Readings

- OWASP, *Cross Site Scripting Prevention Cheat Sheet*: escaping by context.
- Nielsen (1993), *Usability Engineering*, chapter 5: why 0.1 s, 1 s and 10 s are the limits.
- W3C, *WAI-ARIA 1.2*, the roles `log`, `status` and `alert`: what a screen reader does with them.
- ipywidgets, *Asynchronous Widgets*, and anywidget, *Getting started*: the two libraries under our
  widget.
"""
