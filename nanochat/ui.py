"""Chat sessions, safe rendering, the notebook widget and the terminal chat.

Exported from chapters/11_chat_ui.py (chapter 11, Talking to it); edit there, not here.
"""

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

__all__ = [
    "Bubbles",
    "CHAT_CSS",
    "COMPOSER_CSS",
    "COMPOSER_JS",
    "ChatControls",
    "ChatSession",
    "ChatSettings",
    "ChatView",
    "ChatWidget",
    "Composer",
    "MARKDOWN_TAGS",
    "Piece",
    "ReplyStats",
    "ReplyThread",
    "add_piece",
    "answer_text",
    "arrange",
    "bubble_html",
    "check_messages",
    "comparison_html",
    "content_html",
    "fit_context",
    "generate_pieces",
    "last_answer",
    "last_question",
    "load_session",
    "make_button",
    "markdown_html",
    "name_engines",
    "plain_text",
    "read_pieces",
    "save_session",
    "stream_reply",
    "terminal_chat",
    "tokens_html",
    "transcript_html",
]


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


def add_piece(parts: list[dict[str, str]], piece: Piece) -> None:
    """Append a piece to the parts of an assistant message, in place (schema of chapter 9)."""
    if piece.kind not in ("text", "python", "python_output"):
        return
    new = piece.opens or not parts or parts[-1]["type"] != piece.kind
    if new and (piece.text or piece.kind != "text"):
        parts.append({"type": piece.kind, "text": piece.text})
    elif parts and piece.text:
        parts[-1]["text"] += piece.text


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


def last_question(messages: list[dict[str, Any]]) -> tuple[int, str]:
    """Index and text of the last question of a conversation; UserError if there is none."""
    asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        raise UserError("There is no question yet: write a message first.")
    return asked[-1], messages[asked[-1]]["content"]


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


def answer_text(content: Any) -> str:
    """The text of an answer (a text, or parts) without what the calculator wrote."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def last_answer(session: ChatSession) -> str:
    """The text of the last answer; "" when there is none."""
    last = session.messages[-1] if session.messages else {"role": "user"}
    return answer_text(last["content"]) if last["role"] == "assistant" else ""


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


def save_session(session: ChatSession, path: str | Path) -> None:
    """Write conversation, system prompt and settings as JSON, atomically.

    Raises UserError when the file cannot be written, or while a reply is.
    """
    session._refuse_busy()
    content = {"format": "nanochat conversation", "version": 1, "system": session.system}
    write_json(
        path, {**content, "settings": asdict(session.settings), "messages": session.messages}
    )


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


def make_button(text: str, help: str, **options: Any) -> ipywidgets.Button:
    """A button as wide as its text, with a tooltip."""
    layout = {"width": "auto", "flex": "0 0 auto"}
    return ipywidgets.Button(description=text, tooltip=help, layout=layout, **options)


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


def name_engines(engines: Any) -> dict[str, Any]:
    """One engine or a dict of them, as a dict; an empty dict is refused."""
    named = dict(engines) if isinstance(engines, dict) else {"nanochat": engines}
    if not named:
        raise UserError("There is no engine to talk to: pass an Engine or a dict of engines.")
    return named


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


def plain_text(text: str) -> str:
    """Text without control characters (but with newlines and tabs): safe to print."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable() or c.isspace() and c > "\x85")


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
