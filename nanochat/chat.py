"""Conversations to tokens and loss masks, and back.

Exported from chapters/09_chat_finetuning.py (chapter 09, From text to chat); edit there, not here.
"""

import html
from collections.abc import Sequence

from nanochat.common import UserError
from nanochat.tokenizer import Tokenizer

__all__ = [
    "CHAT_TEMPLATE",
    "PART_TYPES",
    "ROLES",
    "TokenView",
    "WRAPPERS",
    "message_parts",
    "parse",
    "render",
    "render_prompt",
    "render_turn",
    "reply_text",
    "turns",
]


ROLES = ("system", "user", "assistant")
PART_TYPES = ("text", "python", "python_output")
WRAPPERS = {
    "python": ("python_start", "python_end"),
    "python_output": ("output_start", "output_end"),
}


def message_parts(message: dict, where: str = "a message") -> list[dict]:
    """Return the content of one message as a list of parts `{"type", "text"}`.

    A string is one text part. Only an assistant may have parts of the types python and
    python_output. Raises UserError with `where` in its text when the content has another form.
    """
    role, content = message["role"], message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if role != "assistant" or not isinstance(content, list):
        kinds = "a string or a list of parts" if role == "assistant" else "a string"
        raise UserError(
            f"The content of {where} ({role}) must be {kinds}, not {type(content).__name__}."
        )
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in PART_TYPES or not isinstance(part.get("text"), str):
            raise UserError(
                f'A part of {where} must look like {{"type": "text", "text": "..."}} with a type '
                f"out of {', '.join(PART_TYPES)}; found {str(part)[:80]!r}."
            )
    return content


def turns(conversation: dict, training: bool = False) -> list[tuple[str, list[dict]]]:
    """Check a conversation and return its turns as (role, parts).

    The first turn is the user's (a leading system message is put before it, with a blank line
    between), then roles alternate. With `training` the last turn must be the assistant's.
    Raises UserError that says which message is wrong.
    """
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError('A conversation must be {"messages": [...]} with at least one message.')
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            found = message.get("role") if isinstance(message, dict) else message
            raise UserError(
                f"Message {number} has the role {found!r}; roles are {', '.join(ROLES)}."
            )
    system, rest = [], messages
    if messages[0]["role"] == "system":
        system, rest = message_parts(messages[0], "message 0"), messages[1:]
    result = []
    for number, message in enumerate(rest):
        expected = ("user", "assistant")[number % 2]
        position = number + len(messages) - len(rest)
        if message["role"] != expected:
            raise UserError(
                f"Message {position} is from {message['role']!r} where {expected!r} must speak: "
                "after an optional system message, user and assistant alternate."
            )
        result.append((expected, message_parts(message, f"message {position}")))
    if not result:
        raise UserError("A conversation needs a user message after its system message.")
    if system:
        first = system[0]["text"] + "\n\n" + result[0][1][0]["text"]
        result[0] = ("user", [{"type": "text", "text": first}])
    if training and result[-1][0] != "assistant":
        raise UserError("The last message of a training conversation must be the assistant's.")
    return result


def render_turn(role: str, parts: Sequence[dict], tokenizer: Tokenizer):
    """Return (ids, mask) of one turn with its start and end tokens; both are lists of int.

    mask 1 marks what the assistant must learn to write: its text, its calls, its end token.
    """
    special, speaks = tokenizer.special, int(role == "assistant")
    ids, mask = [special(f"{role}_start")], [0]
    for part in parts:
        piece = tokenizer.encode(part["text"])
        if part["type"] in WRAPPERS:
            start, end = WRAPPERS[part["type"]]
            piece = [special(start), *piece, special(end)]
        ids += piece
        mask += [speaks if part["type"] != "python_output" else 0] * len(piece)
    return ids + [special(f"{role}_end")], mask + [speaks]


def render(
    conversation: dict, tokenizer: Tokenizer, max_tokens: int | None = None
) -> tuple[list[int], list[int]]:
    """Render a training conversation: (ids, mask), two lists of int of the same length.

    mask[i] is 1 when the model is trained to predict ids[i]: assistant text, calls of the tool and
    assistant_end; 0 for bos, the user's turns, assistant_start and tool output. Longer
    conversations are cut after `max_tokens` tokens. Raises UserError for a malformed one.
    """
    ids, mask = [tokenizer.bos_id], [0]
    for role, parts in turns(conversation, training=True):
        turn_ids, turn_mask = render_turn(role, parts, tokenizer)
        ids += turn_ids
        mask += turn_mask
    return ids[:max_tokens], mask[:max_tokens]


def render_prompt(conversation: dict, tokenizer: Tokenizer) -> list[int]:
    """Return the ids that ask for the assistant's next turn; they end with assistant_start.

    If the conversation ends with the assistant, that last turn is dropped first: the same
    conversation serves as training example and as question.
    """
    spoken = turns(conversation)
    spoken = spoken[:-1] if spoken[-1][0] == "assistant" else spoken
    ids = [tokenizer.bos_id]
    for role, parts in spoken:
        ids += render_turn(role, parts, tokenizer)[0]
    return ids + [tokenizer.special("assistant_start")]


def parse(ids: Sequence[int], tokenizer: Tokenizer) -> list[dict]:
    """Return the parts of an assistant's reply, the inverse of rendering them.

    Reads up to assistant_end or bos. A call that is never closed becomes a python part all the
    same, so nothing that the model wrote is lost; stray special tokens are skipped.
    """
    special = tokenizer.special
    opens = {special(start): kind for kind, (start, _) in WRAPPERS.items()}
    closes = {special(end) for _, end in WRAPPERS.values()}
    stops = {special("assistant_end"), tokenizer.bos_id}
    others = {
        special(f"{role}_{end}") for role in ("user", "assistant") for end in ("start", "end")
    }
    parts, kind, piece = [], "text", []

    def close(next_kind):
        nonlocal kind, piece
        if piece or kind != "text":
            parts.append({"type": kind, "text": tokenizer.decode(piece)})
        kind, piece = next_kind, []

    for token in map(int, ids):
        if token in stops:
            break
        if token in opens or token in closes:
            close(opens.get(token, "text"))
        elif token not in others:
            piece.append(token)
    close("text")
    return parts


def reply_text(parts: str | Sequence[dict]) -> str:
    """Return what a person reads of an assistant's content: its text parts, joined."""
    if isinstance(parts, str):
        return parts
    return "".join(part["text"] for part in parts if part["type"] == "text")


class TokenView:
    """Rendered tokens for looking at: trained tokens coloured, the others grey.

    In a notebook it shows as HTML; `print` gives the text with trained tokens in [brackets].
    """

    COLOURS = {1: ("#004d40", "#b2dfdb"), 0: ("#555555", "#eeeeee")}

    def __init__(self, ids: Sequence[int], mask: Sequence[int], tokenizer: Tokenizer):
        self.pieces = [(tokenizer.decode([i]), int(m)) for i, m in zip(ids, mask)]

    def __str__(self) -> str:
        return "".join(f"[{text}]" if m else text for text, m in self.pieces)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        spans = []
        for text, trained in self.pieces:
            ink, paper = self.COLOURS[trained]
            shown = html.escape(text).replace("\n", "&#8629;<br>").replace(" ", "&nbsp;")
            weight = "font-weight:600;" if trained else ""
            spans.append(
                f'<span style="color:{ink};background:{paper};{weight}'
                f'border-right:1px solid #fff">{shown}</span><wbr>'
            )
        return f'<div style="font-family:monospace;line-height:1.7">{"".join(spans)}</div>'


CHAT_TEMPLATE = (
    "{%- set ns = namespace(system='') -%}<|bos|>"
    "{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{%- set ns.system = m.content + '\n\n' -%}"
    "{%- elif m.role == 'user' -%}"
    "{{- '<|user_start|>' + ns.system + m.content + '<|user_end|>' -}}"
    "{%- set ns.system = '' -%}"
    "{%- else -%}{{- '<|assistant_start|>' -}}"
    "{%- if m.content is string -%}{{- m.content -}}{%- else -%}{%- for p in m.content -%}"
    "{%- if p.type == 'python' -%}{{- '<|python_start|>' + p.text + '<|python_end|>' -}}"
    "{%- elif p.type == 'python_output' -%}{{- '<|output_start|>' + p.text + '<|output_end|>' -}}"
    "{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '<|assistant_end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}"
)
