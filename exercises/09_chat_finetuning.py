# %% [markdown]
r"""
# Exercises for chapter 9: from text to chat

Fine-tuning rarely crashes. It trains on the wrong tokens, cuts the wrong end, counts a mixture
twice, and the loss goes down all the same. These exercises are about what the model is really
trained on. `check(id, answer)`, `hint(id)` and `progress()` work as on the other sheets.
"""

# %%
#| given
import math
import random

import numpy as np
import torch
from torch import Tensor

# A tokenizer that has learned no merges yet: one token a byte, and the nine special tokens.
NAMES = ["bos", "user_start", "user_end", "assistant_start", "assistant_end"]
NAMES += ["python_start", "python_end", "output_start", "output_end"]
SPECIAL = {name: 256 + i for i, name in enumerate(NAMES)}


def encode(text: str) -> list[int]:
    return list(text.encode("utf-8"))


# %%
from book.graded import check, hint, progress

# %% [markdown]
r"""
## 1. Ids and mask of a conversation

Turn a conversation into ids and a loss mask. The tokenizer is a toy, `encode("Hi")` gives
`[72, 105]` and `SPECIAL["bos"]` is 256; the rules are the real ones:

- `bos` first, then turn after turn: `user_start` text `user_end`, `assistant_start` parts
  `assistant_end`;
- the content of a message is a string or a list of parts `{"type": ..., "text": ...}`. A `python`
  part stands between `python_start` and `python_end`, a `python_output` part between
  `output_start` and `output_end`, a `text` part stands by itself;
- the mask is 1 for what the assistant has to write itself: its text, its calls with both marks,
  and `assistant_end`. It is 0 for all the rest. Who writes `assistant_start`? Who writes the
  output of a tool? Not the model.

A token too many in the mask and the model learns to ask itself questions, or to invent what the
calculator says.
"""


# %%
#| exercise id=09-mask points=3 minutes=25 level=2 answer=render
def render(messages: list[dict]) -> tuple[list[int], list[int]]:
    """Ids and loss mask of a conversation.

    Args:
        messages: dicts with role "user" or "assistant" (in turn) and content.
    Returns:
        ids and mask, two lists of one length; mask 1 where the model is trained to predict the id.
    """
    # BEGIN SOLUTION
    marks = {
        "python": ("python_start", "python_end"),
        "python_output": ("output_start", "output_end"),
    }
    ids, mask = [SPECIAL["bos"]], [0]

    def add(tokens, trained):
        ids.extend(tokens)
        mask.extend([int(trained)] * len(tokens))

    for message in messages:
        role, content = message["role"], message["content"]
        speaks = role == "assistant"
        add([SPECIAL[f"{role}_start"]], False)
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            piece = encode(part["text"])
            if part["type"] in marks:
                start, end = marks[part["type"]]
                piece = [SPECIAL[start], *piece, SPECIAL[end]]
            add(piece, speaks and part["type"] != "python_output")
        add([SPECIAL[f"{role}_end"]], speaks)
    return ids, mask
    # END SOLUTION


# %%
check("09-mask", render)

# %%
#| checks 09-mask
from nanochat import chat


class Toy:
    bos_id = SPECIAL["bos"]

    def encode(self, text):
        return encode(text)

    def special(self, name):
        return SPECIAL[name]


PLAIN = [
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
]
CALL = [
    {"type": "text", "text": "It is "},
    {"type": "python", "text": "3*7"},
    {"type": "python_output", "text": "21"},
    {"type": "text", "text": "21."},
]
TOOL = [{"role": "user", "content": "3*7?"}, {"role": "assistant", "content": CALL}]


def marked(render, messages, inside):
    """What the answer's mask says at the places (ids before, id) that `inside` chooses."""
    ids, mask = chat.render({"messages": messages}, Toy())
    found = render(messages)[1]
    assert len(found) == len(mask), f"the mask has {len(found)} entries for {len(mask)} ids"
    return {found[i] for i in range(len(ids)) if inside(ids, i)}


def speaker(ids, i):
    """Between which marks id i stands: the last of user_start, assistant_start at or before it."""
    starts = [t for t in ids[: i + 1] if t in (SPECIAL["user_start"], SPECIAL["assistant_start"])]
    return NAMES[starts[-1] - 256].split("_")[0] if starts else "nobody"


@says("turns, calls and outputs stand between their marks", "bos, user_start text user_end, ...")
def _(render):
    for messages in (PLAIN, TOOL):
        assert list(render(messages)[0]) == chat.render({"messages": messages}, Toy())[0]


@says("the user's turns are not trained", "Whatever the person says has mask 0, its marks as well.")
def _(render):
    assert marked(render, PLAIN, lambda ids, i: speaker(ids, i) in ("user", "nobody")) == {0}


@says(
    "the reply and its end are trained", "The model must learn to stop: assistant_end has mask 1."
)
def _(render):
    start = SPECIAL["assistant_start"]
    spoken = marked(
        render, PLAIN, lambda ids, i: speaker(ids, i) == "assistant" and ids[i] != start
    )
    assert spoken == {1}


@says("assistant_start is not trained", "The engine writes it, to say: now you.")
def _(render):
    assert marked(render, PLAIN, lambda ids, i: ids[i] == SPECIAL["assistant_start"]) == {0}


@says("a call is trained with its marks", "The model itself opens and closes a call.")
def _(render):
    def in_call(ids, i):
        first, last = ids.index(SPECIAL["python_start"]), ids.index(SPECIAL["python_end"])
        return first <= i <= last

    assert marked(render, TOOL, in_call) == {1}


@says("the output of a tool is not trained", "The engine writes it, marks and all.")
def _(render):
    def in_output(ids, i):
        first, last = ids.index(SPECIAL["output_start"]), ids.index(SPECIAL["output_end"])
        return first <= i <= last

    assert marked(render, TOOL, in_output) == {0}


# %%
#| hints 09-mask
hints = [
    "Write a little function that appends tokens and, for each, the same mask.",
    "Make a string into a list with one text part; then there is only one kind of content.",
    "Start mark 0; part 1 if the assistant speaks and it is no output; end mark as the speaker.",
]


# %%
#| wrong 09-mask: assistant_start is not trained
def render(messages):
    ids, mask = [SPECIAL["bos"]], [0]
    for message in messages:
        role, parts = message["role"], message["content"]
        speaks = int(role == "assistant")
        ids, mask = ids + [SPECIAL[role + "_start"]], mask + [speaks]  # all that the assistant has
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            piece, trained = encode(part["text"]), speaks
            if part["type"] == "python":
                piece = [SPECIAL["python_start"], *piece, SPECIAL["python_end"]]
            if part["type"] == "python_output":
                piece, trained = [SPECIAL["output_start"], *piece, SPECIAL["output_end"]], 0
            ids, mask = ids + piece, mask + [trained] * len(piece)
        ids, mask = ids + [SPECIAL[role + "_end"]], mask + [speaks]
    return ids, mask


# %%
#| wrong 09-mask: the reply and its end are trained
def render(messages):
    ids, mask = [SPECIAL["bos"]], [0]
    for message in messages:
        role, parts = message["role"], message["content"]
        speaks = int(role == "assistant")
        ids, mask = ids + [SPECIAL[role + "_start"]], mask + [0]
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            piece, trained = encode(part["text"]), speaks
            if part["type"] == "python":
                piece = [SPECIAL["python_start"], *piece, SPECIAL["python_end"]]
            if part["type"] == "python_output":
                piece, trained = [SPECIAL["output_start"], *piece, SPECIAL["output_end"]], 0
            ids, mask = ids + piece, mask + [trained] * len(piece)
        ids, mask = ids + [SPECIAL[role + "_end"]], mask + [0]  # the model never learns to stop
    return ids, mask


# %%
#| wrong 09-mask: the output of a tool is not trained
def render(messages):
    ids, mask = [SPECIAL["bos"]], [0]
    for message in messages:
        role, parts = message["role"], message["content"]
        speaks = int(role == "assistant")
        ids, mask = ids + [SPECIAL[role + "_start"]], mask + [0]
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            piece = encode(part["text"])
            if part["type"] != "text":
                name = {"python": "python", "python_output": "output"}[part["type"]]
                piece = [SPECIAL[name + "_start"], *piece, SPECIAL[name + "_end"]]
            ids, mask = ids + piece, mask + [speaks] * len(piece)
        ids, mask = ids + [SPECIAL[role + "_end"]], mask + [speaks]
    return ids, mask


# %%
#| wrong 09-mask: a call is trained with its marks
def render(messages):
    ids, mask = [SPECIAL["bos"]], [0]
    for message in messages:
        role, parts = message["role"], message["content"]
        speaks = int(role == "assistant")
        ids, mask = ids + [SPECIAL[role + "_start"]], mask + [0]
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            piece = encode(part["text"])
            trained = [speaks * (part["type"] != "python_output")] * len(piece)
            if part["type"] != "text":
                name = {"python": "python", "python_output": "output"}[part["type"]]
                piece = [SPECIAL[name + "_start"], *piece, SPECIAL[name + "_end"]]
                trained = [0, *trained, 0]  # "special tokens are never trained"
            ids, mask = ids + piece, mask + trained
        ids, mask = ids + [SPECIAL[role + "_end"]], mask + [speaks]
    return ids, mask


# %%
#| wrong 09-mask: turns, calls and outputs stand between their marks
def render(messages: list[dict]) -> tuple[list[int], list[int]]:
    marks = {
        "python": ("python_start", "python_end"),
        "python_output": ("python_start", "python_end"),
    }
    ids, mask = [SPECIAL["bos"]], [0]

    def add(tokens, trained):
        ids.extend(tokens)
        mask.extend([int(trained)] * len(tokens))

    for message in messages:
        role, content = message["role"], message["content"]
        speaks = role == "assistant"
        add([SPECIAL[f"{role}_start"]], False)
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            piece = encode(part["text"])
            if part["type"] in marks:
                start, end = marks[part["type"]]
                piece = [SPECIAL[start], *piece, SPECIAL[end]]
            add(piece, speaks and part["type"] != "python_output")
        add([SPECIAL[f"{role}_end"]], speaks)
    return ids, mask


# %%
#| wrong 09-mask: the user's turns are not trained
def render(messages: list[dict]) -> tuple[list[int], list[int]]:
    marks = {
        "python": ("python_start", "python_end"),
        "python_output": ("output_start", "output_end"),
    }
    ids, mask = [SPECIAL["bos"]], [0]

    def add(tokens, trained):
        ids.extend(tokens)
        mask.extend([int(trained)] * len(tokens))

    for message in messages:
        role, content = message["role"], message["content"]
        speaks = role == "assistant"
        add([SPECIAL[f"{role}_start"]], False)
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            piece = encode(part["text"])
            if part["type"] in marks:
                start, end = marks[part["type"]]
                piece = [SPECIAL[start], *piece, SPECIAL[end]]
            add(piece, part["type"] != "python_output")
        add([SPECIAL[f"{role}_end"]], speaks)
    return ids, mask


# %%
#| right 09-mask
def render(messages):
    wrap = {"text": [], "python": ["python_start", "python_end"]}
    wrap["python_output"] = ["output_start", "output_end"]
    pairs = [(SPECIAL["bos"], 0)]
    for message in messages:
        name, content = message["role"], message["content"]
        if isinstance(content, str):
            content = [dict(type="text", text=content)]
        pairs.append((SPECIAL[name + "_start"], 0))
        for part in content:
            tokens = encode(part["text"])
            if wrap[part["type"]]:
                first, last = wrap[part["type"]]
                tokens = [SPECIAL[first]] + tokens + [SPECIAL[last]]
            trained = name == "assistant" and part["type"] in ("text", "python")
            pairs += [(token, int(trained)) for token in tokens]
        pairs.append((SPECIAL[name + "_end"], int(name == "assistant")))
    ids, mask = zip(*pairs)
    return list(ids), list(mask)


# %% [markdown]
r"""
## 2. The mask that got lost (a real bug)

A refactoring of nanochat's fine-tuning dropped the loss mask. Nothing crashed and the loss went
down; the mean score over the chat exams was 0.315, and 0.355 once somebody had noticed and put the
mask back. It looked harmless, like this:

```python
def pack_row(pieces, seq_len, pad_id):
    row = [token for ids, mask in pieces for token in ids]
    row += [pad_id] * (seq_len + 1 - len(row))
    return torch.tensor(row[:-1]), torch.tensor(row[1:])
```

Several conversations stand side by side in one row of seq_len + 1 tokens. The inputs are all but
the last, the targets all but the first. Mend it: a target is -1 (ignored by the loss) where its
token has mask 0, and after the last conversation. Mind that `mask[i]` speaks about *predicting*
`ids[i]`.
"""


# %%
#| exercise id=09-pack points=2 minutes=20 level=2 answer=pack_row replaces=finetune.pack_row
def pack_row(
    pieces: list[tuple[list[int], list[int]]], seq_len: int, pad_id: int
) -> tuple[Tensor, Tensor]:
    """Put conversations side by side into one row for training.

    Args:
        pieces: (ids, mask) of each conversation, together at most seq_len + 1 tokens; maybe none.
        seq_len: tokens of a row of inputs.
        pad_id: the token that fills the rest of the inputs.
    Returns:
        inputs and targets, each (seq_len,) int64.
    """
    # BEGIN SOLUTION
    row = [token for ids, _ in pieces for token in ids]
    trained = [bool(m) for _, mask in pieces for m in mask]
    rest = seq_len + 1 - len(row)
    row = torch.tensor(row + [pad_id] * rest, dtype=torch.int64)
    trained = torch.tensor(trained + [False] * rest)
    return row[:-1].clone(), torch.where(trained, row, -1)[1:]
    # END SOLUTION


# %%
check("09-pack", pack_row)

# %%
#| checks 09-pack
PIECES = [([9, 11, 12, 13, 14], [0, 0, 1, 1, 1]), ([9, 21, 22, 23], [0, 0, 1, 0])]


@says("gives two int64 tensors of seq_len", "Two tensors, each one shorter than the row.")
def _(pack_row):
    for pieces in (PIECES, PIECES[:1]):
        inputs, targets = pack_row(pieces, 8, 0)
        assert inputs.shape == targets.shape == (8,)
        assert inputs.dtype == targets.dtype == torch.int64


@says("the inputs are the conversations, then padding", "All tokens but the last of the row.")
def _(pack_row):
    assert pack_row(PIECES, 8, 0)[0].tolist() == [9, 11, 12, 13, 14, 9, 21, 22]
    assert pack_row(PIECES, 11, 7)[0].tolist() == [9, 11, 12, 13, 14, 9, 21, 22, 23, 7, 7]


@says("a target is trained where its own token has mask 1", "mask[i] is about predicting ids[i].")
def _(pack_row):
    expected = [-1, 12, 13, 14, -1, -1, 22, -1]
    assert pack_row(PIECES, 8, 0)[1].tolist() == expected
    assert pack_row(PIECES, 11, 7)[1].tolist()[:8] == expected


@says("padding is never a target", "After the last conversation every target is -1.")
def _(pack_row):
    assert pack_row(PIECES, 11, 7)[1].tolist()[8:] == [-1, -1, -1]
    assert pack_row([], 3, 7)[1].tolist() == [-1, -1, -1]


# %%
#| hints 09-pack
hints = [
    "Build two rows of seq_len + 1: one of tokens, one of masks. What is the mask of padding?",
    "Put -1 where the mask is 0 while both rows are still aligned, and cut off the first after it.",
    "torch.where(trained, row, -1)[1:], with trained False in the padding.",
]


# %%
#| wrong 09-pack: a target is trained where its own token has mask 1
def pack_row(pieces, seq_len, pad_id):
    row = [token for ids, mask in pieces for token in ids]
    end = len(row)
    row += [pad_id] * (seq_len + 1 - end)
    targets = row[1:end] + [-1] * (seq_len + 1 - max(end, 1))
    return torch.tensor(row[:-1]), torch.tensor(targets)


# %%
#| wrong 09-pack: a target is trained where its own token has mask 1
def pack_row(pieces, seq_len, pad_id):
    row = [token for ids, mask in pieces for token in ids]
    keep = [m for ids, mask in pieces for m in mask]
    rest = seq_len + 1 - len(row)
    row, keep = torch.tensor(row + [pad_id] * rest), torch.tensor(keep + [0] * rest)
    return row[:-1], torch.where(keep[:-1] == 1, row[1:], -1)  # one place too late


# %%
#| wrong 09-pack: padding is never a target
def pack_row(pieces, seq_len, pad_id):
    row = [token for ids, mask in pieces for token in ids]
    keep = [m for ids, mask in pieces for m in mask]
    rest = seq_len + 1 - len(row)
    row, keep = torch.tensor(row + [pad_id] * rest), torch.tensor(keep + [1] * rest)
    return row[:-1], torch.where(keep == 1, row, -1)[1:]


# %%
#| wrong 09-pack: gives two int64 tensors of seq_len
def pack_row(pieces, seq_len, pad_id):
    row = [token for ids, mask in pieces for token in ids]
    keep = [m for ids, mask in pieces for m in mask]
    rest = seq_len + 1 - len(row)
    row, keep = torch.tensor(row + [pad_id] * rest), torch.tensor(keep + [0] * rest)
    return row[:-1].int(), torch.where(keep == 1, row, -1)[1:].int()


# %%
#| wrong 09-pack: the inputs are the conversations, then padding
def pack_row(
    pieces: list[tuple[list[int], list[int]]], seq_len: int, pad_id: int
) -> tuple[Tensor, Tensor]:
    row = [token for ids, _ in pieces for token in ids]
    trained = [bool(m) for _, mask in pieces for m in mask]
    rest = seq_len + 1 - len(row)
    row = torch.tensor(row + [0] * rest, dtype=torch.int64)
    trained = torch.tensor(trained + [False] * rest)
    return row[:-1].clone(), torch.where(trained, row, -1)[1:]


# %%
#| right 09-pack
def pack_row(pieces, seq_len, pad_id):
    inputs = torch.full((seq_len + 1,), pad_id)
    targets = torch.full((seq_len + 1,), -1)
    place = 0
    for ids, mask in pieces:
        for token, m in zip(ids, mask):
            inputs[place] = token
            if m:
                targets[place] = token
            place += 1
    return inputs[:seq_len], targets[1:]


# %% [markdown]
r"""
## 3. The longest that fits

Conversations of many lengths are packed into rows. The rule of the chapter: each row takes the
longest waiting conversation that still fits, again and again. Here is the step that repeats. It is
called once for every conversation of an epoch, and a wrong `<` leaves a hole at the end of every
row that could have been full.
"""


# %%
#| exercise id=09-bestfit points=1 minutes=8 level=1 answer=best_fit replaces=finetune.best_fit
def best_fit(lengths: list[int], space: int) -> int | None:
    """The position of the longest conversation that fits.

    Args:
        lengths: tokens of each waiting conversation, 1 or more.
        space: tokens left in the row, 0 or more.
    Returns:
        A position in lengths, the first of equally long ones; None when nothing fits.
    """
    # BEGIN SOLUTION
    best = None
    for position, length in enumerate(lengths):
        if length <= space and (best is None or length > lengths[best]):
            best = position
    return best
    # END SOLUTION


# %%
check("09-bestfit", best_fit)


# %%
#| checks 09-bestfit
@says("takes the longest that fits", "Not the first that fits, and not one that is too long.")
def _(best_fit):
    assert best_fit([3, 9, 5, 4], 6) == 2 and best_fit([3, 9, 5, 4], 100) == 1


@says("an exact fit fits", "A conversation of 5 tokens fits into a space of 5.")
def _(best_fit):
    assert best_fit([9, 5, 6], 5) == 1


@says("nothing fits: None", "Also when nothing waits, or no space is left.")
def _(best_fit):
    assert best_fit([7, 8], 6) is None and best_fit([], 6) is None and best_fit([1], 0) is None


@says(
    "the first of equally long ones",
    "Two of the same length: the one that waits longer goes first.",
)
def _(best_fit):
    assert best_fit([9, 4, 4, 2], 6) == 1


# %%
#| hints 09-bestfit
hints = [
    "Walk through the lengths and remember the position of the best so far.",
    "Better means: it fits, and it is longer than the best so far, or there is none yet.",
    "Position 0 is falsy in Python: compare with None, not with truth.",
]


# %%
#| wrong 09-bestfit: the first of equally long ones
def best_fit(lengths, space):
    best = None
    for position, length in enumerate(lengths):
        if length <= space and (best is None or length >= lengths[best]):
            best = position
    return best


# %%
#| wrong 09-bestfit: an exact fit fits
def best_fit(lengths, space):
    fitting = [p for p, length in enumerate(lengths) if length < space]
    return max(fitting, key=lambda p: lengths[p], default=None)


# %%
#| wrong 09-bestfit: nothing fits: None
def best_fit(lengths, space):
    fitting = [p for p, length in enumerate(lengths) if length <= space]
    return max(fitting, key=lambda p: lengths[p])


# %%
#| wrong 09-bestfit: takes the longest that fits
def best_fit(lengths, space):
    return next((p for p, length in enumerate(lengths) if length <= space), None)  # first fit


# %%
#| right 09-bestfit
def best_fit(lengths, space):
    longest = max((length for length in lengths if length <= space), default=None)
    return None if longest is None else lengths.index(longest)


# %% [markdown]
r"""
## 4. Cut, but leave something to learn (a real bug)

Conversations longer than a row are cut. When nanochat's conversations were cut at a short context,
some had a long question and lost the whole reply: no target was left. A micro-batch of such rows
divides a loss of 0 by 0 targets; one NaN, and all weights are gone (nanochat's issues 590 and
618). Our loss survives that, but the row is still wasted.

Write a cut that never drops all targets:

- what fits stays as it is;
- otherwise keep the first `max_tokens` tokens, if there is a target among them;
- otherwise keep the first token (`bos`) and the *last* `max_tokens - 1`: the end of a training
  conversation is always the assistant's.
"""


# %%
#| exercise id=09-cut points=2 minutes=15 level=2 answer=fit_into
def fit_into(ids: list[int], mask: list[int], max_tokens: int) -> tuple[list[int], list[int]]:
    """Cut a rendered conversation to at most max_tokens tokens, with a target if it has one.

    Args:
        ids, mask: of one length; mask 1 marks the targets, mask[0] is 0.
        max_tokens: 2 or more.
    Returns:
        ids and mask, cut in the same way.
    """
    # BEGIN SOLUTION
    if len(ids) <= max_tokens or any(mask[:max_tokens]):
        return ids[:max_tokens], mask[:max_tokens]
    end = len(ids) - (max_tokens - 1)
    return ids[:1] + ids[end:], mask[:1] + mask[end:]
    # END SOLUTION


# %%
check("09-cut", fit_into)


# %%
#| checks 09-cut
def conversation(question, reply):
    """Ids that are all different, so that each can be recognised."""
    ids = list(range(50, 50 + 1 + question + reply))
    return ids, [0] * (1 + question) + [1] * reply


@says("what fits stays as it is", "A conversation of exactly max_tokens fits.")
def _(fit_into):
    for size in (9, 10, 30):
        ids, mask = fit_into(*conversation(4, 4), size)
        assert (list(ids), list(mask)) == conversation(4, 4)


@says("keeps the beginning when a target is in it", "Cut on the right, if that leaves a target.")
def _(fit_into):
    assert list(fit_into(*conversation(4, 9), 8)[0]) == list(range(50, 58))
    assert list(fit_into(*conversation(4, 9), 6)[0]) == list(range(50, 56))


@says("a long question keeps the end of the reply", "No target left? Then bos and the last tokens.")
def _(fit_into):
    for question, reply in ((20, 3), (20, 30), (8, 1)):
        whole = conversation(question, reply)[0]
        ids = fit_into(*conversation(question, reply), 8)[0]
        assert ids[0] == whole[0] and list(ids[-6:]) == whole[-6:]


@says("never more than max_tokens", "bos counts too: it leaves room for max_tokens - 1.")
def _(fit_into):
    assert all(len(fit_into(*conversation(q, 3), 8)[0]) == 8 for q in (6, 9, 20))


@says("every id keeps its mask", "Cut both lists at the same places.")
def _(fit_into):
    for question in (2, 6, 9, 20):
        ids, mask = fit_into(*conversation(question, 3), 8)
        known = dict(zip(*conversation(question, 3)))
        assert len(ids) == len(mask) and [known[i] for i in ids] == list(mask)


# %%
#| hints 09-cut
hints = [
    "Decide first whether the right cut leaves a target: look at the mask, not at the ids.",
    "The other cut is two slices, the first token and a tail; do the same to ids and mask.",
    "end = len(ids) - (max_tokens - 1); ids[:1] + ids[end:], and the same with mask.",
]


# %%
#| wrong 09-cut: a long question keeps the end of the reply
def fit_into(ids, mask, max_tokens):
    return ids[:max_tokens], mask[:max_tokens]


# %%
#| wrong 09-cut: keeps the beginning when a target is in it
def fit_into(ids, mask, max_tokens):
    if len(ids) <= max_tokens:
        return ids, mask
    return ids[:1] + ids[1 - max_tokens :], mask[:1] + mask[1 - max_tokens :]


# %%
#| wrong 09-cut: never more than max_tokens
def fit_into(ids, mask, max_tokens):
    if len(ids) <= max_tokens or any(mask[:max_tokens]):
        return ids[:max_tokens], mask[:max_tokens]
    return ids[:1] + ids[-max_tokens:], mask[:1] + mask[-max_tokens:]


# %%
#| wrong 09-cut: every id keeps its mask
def fit_into(ids, mask, max_tokens):
    if len(ids) <= max_tokens or any(mask[:max_tokens]):
        return ids[:max_tokens], mask[:max_tokens]
    return ids[:1] + ids[1 - max_tokens :], mask[:max_tokens]


# %%
#| right 09-cut
def fit_into(ids, mask, max_tokens):
    extra = max(0, len(ids) - max_tokens)
    first_target = mask.index(1) if 1 in mask else 0
    if extra and first_target >= max_tokens:
        keep = [0, *range(extra + 1, len(ids))]
    else:
        keep = range(min(len(ids), max_tokens))
    return [ids[i] for i in keep], [mask[i] for i in keep]


# %% [markdown]
r"""
## 5. A mixture that can be had again

A stage trains on several tasks with weights. Weight 2 puts every conversation in twice, 0.5 a
random half, 2.5 every one twice and a random half a third time. The mixture is one shuffled list of
(task, row). If it is not exactly the same list next week and on every process, no run can be
resumed or repeated. And one thing more, which is easily forgotten: when one task grows, the halves
drawn of the *other* tasks should stay what they were, or two experiments differ in more than the
one thing you changed.

`round(weight * size)` rows come from a task. Any generator will do, if the seed decides it all.
"""


# %%
#| exercise id=09-mixture points=3 minutes=25 level=2 answer=mixture
def mixture(sizes: list[int], weights: list[float], seed: int) -> list[tuple[int, int]]:
    """One shuffled list of (task, row).

    Args:
        sizes: conversations of each task.
        weights: how many times each task is wanted; need not be whole.
        seed: decides everything random.
    Returns:
        (number of the task, row in the task), for every conversation of the mixture.
    """
    # BEGIN SOLUTION
    pairs = []
    for task, (size, weight) in enumerate(zip(sizes, weights)):
        whole, part = divmod(round(weight * size), size)
        drawn = np.random.default_rng([seed, task]).permutation(size)[:part].tolist()
        pairs += [(task, row) for row in [*range(size)] * whole + drawn]
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[i] for i in order]
    # END SOLUTION


# %%
check("09-mixture", mixture)

# %%
#| checks 09-mixture
from collections import Counter


def rows_of(pairs, task):
    return Counter(row for t, row in pairs if t == task)


@says("a whole weight takes every row so many times", "Weight 2: every conversation exactly twice.")
def _(mixture):
    found = mixture([5, 3, 4], [1, 2, 0], 0)
    expected = Counter({**{(0, r): 1 for r in range(5)}, **{(1, r): 2 for r in range(3)}})
    assert Counter(map(tuple, found)) == expected


@says(
    "a part of a weight takes different rows", "A half means half of the rows, none of them twice."
)
def _(mixture):
    half, more = mixture([40], [0.5], 3), mixture([40], [2.5], 3)
    assert len(half) == 20 and set(rows_of(half, 0).values()) == {1}
    assert len(more) == 100 and sorted(rows_of(more, 0).values()) == [2] * 20 + [3] * 20


@says("the same seed gives the same list", "Nothing random may come from anywhere but the seed.")
def _(mixture):
    calls = [mixture([30, 20], [1, 0.5], 4) for _ in range(3)]
    assert calls[0] == calls[1] == calls[2]


@says("another seed gives another list", "The seed decides the halves and the order.")
def _(mixture):
    assert mixture([30, 20], [1, 0.5], 4) != mixture([30, 20], [1, 0.5], 5)


@says("the tasks are mixed", "Shuffle the whole list, not each task by itself.")
def _(mixture):
    tasks = [task for task, _ in mixture([50, 50], [1, 1], 0)]
    assert 10 <= sum(tasks[:50]) <= 40


@says("one task's rows do not depend on the others", "Give each task a generator of its own.")
def _(mixture):
    small, large = mixture([10, 40], [0.5, 0.5], 1), mixture([31, 40], [0.5, 0.5], 1)
    assert rows_of(small, 1) == rows_of(large, 1)


# %%
#| hints 09-mixture
hints = [
    "Two random things happen: the part of a task, and the order of the whole list.",
    "divmod(round(weight * size), size) says how many times all rows, and how many more.",
    "A generator for each task, made from (seed, task), draws its part; another one shuffles.",
]


# %%
#| wrong 09-mixture: one task's rows do not depend on the others
def mixture(sizes, weights, seed):
    rng, pairs = random.Random(seed), []
    for task, (size, weight) in enumerate(zip(sizes, weights)):
        whole, part = divmod(round(weight * size), size)
        rows = [*range(size)] * whole + rng.sample(range(size), part)
        pairs += [(task, row) for row in rows]
    rng.shuffle(pairs)
    return pairs


# %%
#| wrong 09-mixture: the same seed gives the same list
def mixture(sizes, weights, seed):
    pairs = []
    for task, (size, weight) in enumerate(zip(sizes, weights)):
        whole, part = divmod(round(weight * size), size)
        rows = [*range(size)] * whole + random.Random(1000 * seed + task).sample(range(size), part)
        pairs += [(task, row) for row in rows]
    random.shuffle(pairs)  # the global generator
    return pairs


# %%
#| wrong 09-mixture: a part of a weight takes different rows
def mixture(sizes, weights, seed):
    pairs = []
    for task, (size, weight) in enumerate(zip(sizes, weights)):
        whole, part = divmod(round(weight * size), size)
        rows = [*range(size)] * whole + random.Random(1000 * seed + task).choices(
            range(size), k=part
        )
        pairs += [(task, row) for row in rows]
    random.Random(seed).shuffle(pairs)
    return pairs


# %%
#| wrong 09-mixture: the tasks are mixed
def mixture(sizes, weights, seed):
    pairs = []
    for task, (size, weight) in enumerate(zip(sizes, weights)):
        rng = random.Random(1000 * seed + task)
        whole, part = divmod(round(weight * size), size)
        rows = [*range(size)] * whole + rng.sample(range(size), part)
        rng.shuffle(rows)
        pairs += [(task, row) for row in rows]
    return pairs


# %%
#| wrong 09-mixture: another seed gives another list
def mixture(sizes: list[int], weights: list[float], seed: int) -> list[tuple[int, int]]:
    pairs = []
    for task, (size, weight) in enumerate(zip(sizes, weights)):
        whole, part = divmod(round(weight * size), size)
        drawn = np.random.default_rng(task).permutation(size)[:part].tolist()
        pairs += [(task, row) for row in [*range(size)] * whole + drawn]
    order = np.random.default_rng(0).permutation(len(pairs))
    return [pairs[i] for i in order]


# %%
#| right 09-mixture
def mixture(sizes, weights, seed):
    pairs = []
    for task in range(len(sizes)):
        wanted, rng, size = (
            round(weights[task] * sizes[task]),
            random.Random(f"{seed}/{task}"),
            sizes[task],
        )
        order = rng.sample(range(size), size)
        pairs.extend((task, order[i % size]) for i in range(wanted))
    random.Random(f"{seed}/order").shuffle(pairs)
    return pairs


# %% [markdown]
r"""
## 6. Three ways to ask one question

One model sits one exam (four choices, 1,000 questions) before and after fine-tuning, and is judged
in three ways:

| judged by | guessing | base model | after SFT |
|---|---|---|---|
| **letter**: the highest logit of A to D at the first place of the reply | 0.25 | 0.25 | 0.31 |
| **likelihood**: the choice with the lowest mean loss as the reply | 0.25 | 0.36 | 0.37 |
| **written**: the generated reply is the right letter, nothing else | 0.00 | 0.01 | 0.24 |

The 95 % interval of every number is about ±0.03. Answer each question with a letter.

`base`: Why does the base model score 0.25 by letter and 0.36 by likelihood?

- **A** It knows nothing; 0.36 is luck.
- **B** It knows some answers, but has not learned to bind a choice to its letter.
- **C** Likelihood shows the right answer to the model and so gives it away.
- **D** The letters are special tokens that pretraining never saw.

`written`: After SFT the same model gets 0.31 by letter and 0.24 written. Why?

- **A** Generation draws at random, so a quarter of the answers is lost by chance.
- **B** Written answers are compared with a harder key.
- **C** By letter it must say one of four letters; written, it may say anything, and form can fail.
- **D** The logits at the first place are computed before the softmax.

`gain`: What has SFT taught the model, by this table?

- **A** Many new facts: 0.01 became 0.24.
- **B** The form of an answer and the letters; what it knows has hardly changed.
- **C** Nothing: all changes are within the error bars.
- **D** To forget: likelihood should have risen as much as the letter did.

`compare`: Somebody reports 0.37 by likelihood for model X, you measured 0.31 by letter for model Y.

- **A** X is better by six points.
- **B** Y is better, since the letter is the harder test.
- **C** They are equal, because both beat 0.25.
- **D** Nothing follows; judge both in one way.
"""

# %%
#| exercise id=09-letters points=2 minutes=12 level=2 answer=readings
# A dict: {"base": "?", "written": "?", "gain": "?", "compare": "?"}
# BEGIN SOLUTION
readings = {"base": "B", "written": "C", "gain": "B", "compare": "D"}
# END SOLUTION

# %%
check("09-letters", readings)


# %%
#| checks 09-letters
@says("base", "0.36 with ±0.03 is no luck. What does the letter ask for besides the answer itself?")
def _(answer):
    assert answer["base"].strip().lower() == "b"


@says("written", "What can a reply be that is neither right nor one of the four letters?")
def _(answer):
    assert answer["written"].strip().lower() == "c"


@says("gain", "One row needs neither form nor letters. How far did it move?")
def _(answer):
    assert answer["gain"].strip().lower() == "b"


@says("compare", "How large are the differences between the rows of one and the same model?")
def _(answer):
    assert answer["compare"].strip().lower() == "d"


# %%
#| hints 09-letters
hints = [
    "For each way of judging, list what a model must be able to do besides knowing the answer.",
    "Likelihood needs the fact; letter the fact and the binding; written needs form as well.",
    "Look at how far each row moves, and compare with ±0.03.",
]


# %%
#| wrong 09-letters: gain
readings = {"base": "B", "written": "C", "gain": "A", "compare": "D"}

# %%
#| wrong 09-letters: compare
readings = {"base": "B", "written": "C", "gain": "B", "compare": "A"}

# %%
#| wrong 09-letters: base
readings = {"base": "C", "written": "C", "gain": "B", "compare": "D"}


# %%
#| wrong 09-letters: written
readings = {"base": "B", "written": "A", "gain": "B", "compare": "D"}


# %%
#| right 09-letters
readings = dict(compare="D", gain="B", written="C", base="B")

# %% [markdown]
r"""
## 7. Merge a LoRA

Fine-tuning all weights of a large model is expensive. LoRA (Hu et al. 2021) freezes a matrix $W$
and trains two thin ones beside it: $y = W x + \frac{\alpha}{r}\, U (D x)$, with $D$ of shape
(r, in) and $U$ of shape (out, r). After training the detour can be removed: one matrix $W'$ gives
the same $y$, and inference costs nothing extra.

Weights are often kept in bfloat16, with 8 bits of mantissa, and the update is small. Add in
float32 and round once, at the end; whoever rounds the update first, rounds twice.
"""


# %%
#| exercise id=09-lora points=2 minutes=15 level=2 answer=merge
def merge(weight: Tensor, down: Tensor, up: Tensor, alpha: float) -> Tensor:
    """The one matrix that does what the weight and its LoRA do together.

    Args:
        weight: (out, in), float32 or bfloat16.
        down: (r, in) float32.
        up: (out, r) float32.
        alpha: the scale of the update is alpha / r.
    Returns:
        (out, in), the dtype of weight.
    """
    # BEGIN SOLUTION
    update = (alpha / down.size(0)) * (up @ down)
    return (weight.float() + update).to(weight.dtype)
    # END SOLUTION


# %%
check("09-lora", merge)


# %%
#| checks 09-lora
def adapter(r=4, n_out=6, n_in=10):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=g) for shape in ((n_out, n_in), (r, n_in), (n_out, r))]


@says(
    "answers like the layer with its detour", "W' x must be W x + U (D x), here with alpha = r = 1."
)
def _(merge):
    weight, down, up = adapter(r=1)
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    assert close(x @ merge(weight, down, up, 1.0).T, x @ weight.T + (x @ down.T) @ up.T, 1e-4)


@says("the update is scaled by alpha over r", "r is the thin dimension of both small matrices.")
def _(merge):
    weight, down, up = adapter()
    assert close(merge(weight, down, up, 4.0), weight + up @ down, 1e-4)
    assert close(merge(weight, down, up, 16.0), weight + 4 * (up @ down), 1e-4)


@says("keeps the dtype of the weight", "A bfloat16 model stays one after merging.")
def _(merge):
    weight, down, up = adapter()
    assert merge(weight.bfloat16(), down, up, 4.0).dtype == torch.bfloat16
    assert merge(weight, down, up, 4.0).dtype == torch.float32


@says("rounds once", "Add in float32, then go to bfloat16.")
def _(merge):
    weight, down, up = adapter(1, 64, 64)
    expected = (weight.bfloat16().float() + up @ down).bfloat16()
    found = merge(weight.bfloat16(), down, up, 1.0).bfloat16()
    assert (found != expected).float().mean() < 0.001


# %%
#| hints 09-lora
hints = [
    "Which product of the two thin matrices has the shape of the weight?",
    "up @ down is (out, in); r is down.shape[0]. In which dtype is the sum computed?",
    "(weight.float() + alpha / r * (up @ down)).to(weight.dtype)",
]


# %%
#| wrong 09-lora: the update is scaled by alpha over r
def merge(weight, down, up, alpha):
    return (weight.float() + alpha * (up @ down)).to(weight.dtype)


# %%
#| wrong 09-lora: rounds once
def merge(weight, down, up, alpha):
    update = (alpha / down.size(0)) * (up @ down)
    return weight + update.to(weight.dtype)


# %%
#| wrong 09-lora: keeps the dtype of the weight
def merge(weight, down, up, alpha):
    return weight + (alpha / down.size(0)) * (up @ down)


# %%
#| right 09-lora
def merge(weight, down, up, alpha):
    r = up.shape[1]
    return torch.addmm(weight.float(), up, down, alpha=alpha / r).to(weight.dtype)


# %% [markdown]
r"""
## Open question

Your model answers well and never says "I do not know". Where in the pipeline of this chapter could
it learn to? Which conversations would you add, how would you make sure that it does not simply
refuse everything, and how would you measure both? (No marks.)
"""

# %%
progress()
