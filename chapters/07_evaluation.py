# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# 7. Evaluation

By the end of this chapter we have shown, with error bars and controls, that a small model has
learned some things about its world and has not learned others, and we own a scorer
whose every decision can be checked by hand.

First the finished thing. An untrained model sits an exam of several small tasks. Nobody expects
it to know anything, so every score should be near zero.
"""

# %%
import nanochat.evaluation as finished
from nanochat.model import GPT, GPTConfig
from nanochat.tinyworld import World, document
from nanochat.tokenizer import Tokenizer

world = World(0)
tokenizer = Tokenizer.train((document(world, i) for i in range(1500)), vocab_size=512)
newborn = GPT(GPTConfig(tokenizer.vocab_size, 256, n_layer=1, n_head=2, n_kv_head=2, n_embd=64))
exam_tasks = finished.tinyworld_core(world, n=40)
print(finished.core_table(finished.evaluate_core(newborn, tokenizer, exam_tasks)))

# %% [markdown]
r"""
Some scores are not near zero, although this model gives every token the same probability.
A score can be wrong in more ways than a loss can. That is what this chapter is about.

**You will be able to**
1. compute bits per byte and say why it is comparable across tokenizers and batch sizes;
2. score a question by likelihood, by hand and in batches, with the same answer, and read what
   several texts share only once;
3. build a few-shot prompt exactly as the CORE benchmark does, and score any model with it;
4. put an error bar on a score, on a mean of scores and on a difference between two models;
5. run four controls beside a score, and look for the exam in the training text.

Prerequisites: chapters 1 to 6. Reading: 40 minutes. Running: under 60 seconds on two CPU cores,
no network, under 1 GB.
"""

# %% tags=["parameters"]
profile = "quick"
seed = 0
vocab_size = 768
seq_len = 128
depth, width = 2, 64
batch_size = 8
train_steps = 700
items_per_task = 100

# %%
#| default_exp evaluation

# %%
#| export
import copy
import inspect
import math
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat.common import COLORS, UserError, figure, usable_cores
from nanochat.tinyworld import (
    World,
    arithmetic_problem,
    choices_prompt,
    exam,
    validation_document,
)

# %%
import tempfile
import time

import matplotlib.pyplot as plt

from nanochat.data import TokenBatches, open_source, prepare_tokens
from nanochat.optim import build_optimizer, lr_multiplier, muon_momentum

torch.manual_seed(seed)

# %% [markdown]
r"""
## A patient to examine

An examination needs somebody to examine. We train a small GPT on the tiny world for some seconds,
with the bare loop of chapter 5. A copy of the model as it was at birth stays beside it, for
comparison.
"""

# %%
source = open_source("tinyworld", seed=seed)
tokenizer = Tokenizer.train((document(world, i) for i in range(2000)), vocab_size=vocab_size)
folder = tempfile.TemporaryDirectory()
n_tokens = train_steps * batch_size * seq_len
train_shards = prepare_tokens(source, tokenizer, folder.name, "train", n_tokens + seq_len)
val_shards = prepare_tokens(source, tokenizer, folder.name, "val", 60_000)
config = GPTConfig(tokenizer.vocab_size, seq_len, depth, n_head=2, n_kv_head=2, n_embd=width)
newborn, model = GPT(config), GPT(config)
print(f"{model.num_params()['total']:,} parameters, {n_tokens:,} training tokens")

# %%
batches = TokenBatches(train_shards, batch_size, seq_len, seed=seed)
optimizer = build_optimizer(model)
losses = []
for step in range(train_steps):
    optimizer.set_schedule(lr_multiplier(step, train_steps), muon_momentum(step))
    loss = model(*batches.next())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {sum(losses[-20:]) / 20:.2f} nats per token")

# %% [markdown]
r"""
## Bits per byte

The loss is in nats per *token*, and a token is whatever our tokenizer says it is. With a larger
vocabulary there are fewer predictions over the same text, and harder ones. To see how much that
matters, take the dumbest model there is, one that knows only how frequent each token is, and
give it two tokenizers. The text is the same.
"""

# %%
text = "\n".join(document(world, i) for i in range(200))
n_bytes = len(text.encode("utf-8"))
for size in (300, vocab_size):
    ids = Tokenizer.train((document(world, i) for i in range(500)), size).encode(text)
    counts = torch.bincount(torch.tensor(ids)).double()
    p = counts[counts > 0] / counts.sum()
    entropy = -(p * p.log()).sum().item()  # nats per token
    bits = entropy * len(ids) / math.log(2) / n_bytes
    print(f"vocabulary {size:4}: {entropy:.2f} nats per token, {bits:.2f} bits per byte")

# %% [markdown]
r"""
Per token the larger vocabulary looks *worse*; per byte of text it is clearly *better*. Bytes
do not depend on the tokenizer, so we divide by them:

$$\text{bits per byte} = \frac{\sum_i \text{loss}_i}{\ln 2 \cdot \sum_i \text{bytes}_i}$$

The sums run over target tokens. Special tokens have no bytes; they are left out above and below.

The obvious way to compute a validation loss is to average the losses of the batches. This is
subtly wrong as soon as batches hold different numbers of scored tokens: the answer then
depends on how the rows were grouped. Twelve rows, some nearly all masked:
"""

# %%
val_batches = TokenBatches(val_shards, 12, seq_len, seed=seed)
inputs, targets = val_batches.next()
targets = targets.clone()
targets[:4, 16:] = -1  # a third of the rows are mostly masked
with torch.no_grad():
    for size in (2, 3, 12):
        means = [model(x, y) for x, y in zip(inputs.split(size), targets.split(size))]
        print(f"batches of {size:2}: mean of means {torch.stack(means).mean():.4f}")

# %% [markdown]
r"""
One model, one text, different numbers. The kept version sums first and divides once, in double
precision. With several processes, the two sums are added over all of them before the
division.
"""


# %%
#| export
@torch.no_grad()
def bits_per_byte(
    model: Any, batches: Any, n_batches: int, token_bytes: Tensor, world: Any = None
) -> float:
    """Return the bits a model needs per byte of text, over `n_batches` batches.

    `batches` has `.next()` (or is an iterator) giving (inputs, targets), each (B, T) int64.
    `token_bytes` (V,) is the length of each token, 0 for specials: those and targets -1 do not
    count. `world` adds the sums of all its processes. No bytes at all gives infinity.
    """
    device = next(model.parameters()).device
    token_bytes = token_bytes.to(device).long()
    nats = torch.zeros((), dtype=torch.float64)
    n_bytes = torch.zeros((), dtype=torch.float64)
    for _ in range(n_batches):
        inputs, targets = batches.next() if hasattr(batches, "next") else next(batches)
        inputs, targets = inputs.to(device), targets.to(device)
        losses = model(inputs, targets, reduction="none")  # (B, T) nats
        length = token_bytes[targets.clamp(min=0)] * (targets >= 0)  # (B, T)
        nats += losses[length > 0].cpu().double().sum()
        n_bytes += length.sum().cpu()
    if world is not None:
        nats, n_bytes = sum_over(world, torch.stack([nats, n_bytes]))
    return float(nats / (math.log(2) * n_bytes)) if n_bytes > 0 else math.inf


def sum_over(world: Any, values: Tensor) -> Tensor:
    """Add float64 values over the processes of a world; the result is on the CPU."""
    values = values.to(world.device)
    added = world.sum(values)
    return (values if added is None else added).cpu()


# %%
#| test
tiny = GPT(GPTConfig(20, 8, n_layer=1, n_head=1, n_kv_head=1, n_embd=8))
torch.nn.init.normal_(tiny.head.weight, generator=torch.Generator().manual_seed(0))
ids = torch.arange(6 * 9).reshape(6, 9) % 20
x, y, sizes = ids[:, :-1], ids[:, 1:].masked_fill(ids[:, 1:] == 7, -1), torch.arange(20) % 4
one = bits_per_byte(tiny, zip(x.split(1), y.split(1)), 6, sizes)
assert abs(one - bits_per_byte(tiny, iter([(x, y)]), 1, sizes)) < 1e-5  # grouping changes nothing
assert bits_per_byte(tiny, iter([(x, -torch.ones_like(y))]), 1, sizes) == math.inf


# %%
def validation(model):
    return bits_per_byte(
        model, TokenBatches(val_shards, 8, seq_len, seed=0), 16, tokenizer.token_bytes()
    )


bpb_before, bpb_after = validation(newborn), validation(model)
print(f"bits per byte: {bpb_before:.3f} at birth, {bpb_after:.3f} after training")
print(f"on the validation text {val_shards.fingerprint()[:12]}")

# %% [markdown]
r"""
The odd name in the last line is a hash of the validation tokens. Two values of bits per byte may be
compared only when their hashes are equal.

> **Exercise 7.1.** How many bits per byte does a model need that knows nothing, not even which
> token is frequent? Work it out for a vocabulary of the 256 bytes and for ours, then compare with
> the value at birth above.

## Why the loss is not enough

Bits per byte is smooth, cheap and hard to fool. But it is an average over *all* tokens, and most
tokens are easy: the end of a word that has begun, the full stop, the little words between. Here is
the beginning of a validation text with the cost of each token.
"""


# %%
def token_costs(model, text):
    """Return the pieces of a text and the bits each one costs."""
    ids = tokenizer.encode(text, bos=True)
    x = torch.tensor([ids])
    with torch.no_grad():
        bits = model(x[:, :-1], x[:, 1:], reduction="none")[0] / math.log(2)
    return [tokenizer.decode([i]) for i in ids[1:]], bits.tolist()


sentence = next(text for text in source.documents("val") if "\n" not in text)
sentence = sentence[:200].rpartition(" ")[0]
pieces, bits = token_costs(model, sentence)
order = np.argsort(bits)[::-1]
half = int(np.searchsorted(np.cumsum(np.sort(bits)[::-1]), sum(bits) / 2)) + 1
fig, ax = figure(
    f"{half} of {len(bits)} tokens carry half of the loss",
    "",
    "bits",
    (8, 2.6),
    alt="Bar for each token of a sentence; a few bars are far higher than the rest",
)
colors = [COLORS[1] if i in order[:half] else COLORS[0] for i in range(len(bits))]
ax.bar(range(len(bits)), bits, color=colors)
ax.set_xticks(range(len(bits)), [p.replace("\n", "\\n") for p in pieces], rotation=90, fontsize=6)
plt.show()

# %% [markdown]
r"""
A model may lower its average by getting better at the blue bars alone, and know no more
about the world. So we also ask questions.

## One question, step by step

A base model does not answer questions; it continues text. But it can tell us how *likely* a text
is. So a multiple-choice question becomes several texts, one for each choice, and the one that the
model finds least surprising is its answer. Only the tokens that differ between the texts are
scored; the common beginning says nothing about the choice.
"""

# %%
item = exam(world, "multiple_choice", 8, seed=1)[3]
print(item["query"])
for choice in item["choices"]:
    mark = "*" if choice == item["choices"][item["gold"]] else " "
    pieces, bits = token_costs(model, item["query"] + " " + choice)
    n_common = len(tokenizer.encode(item["query"]))
    shown = " ".join(f"{p!r}:{b:.1f}" for p, b in zip(pieces[n_common:], bits[n_common:]))
    total, n = sum(bits[n_common:]), len(bits) - n_common
    print(f"{mark} {choice:12} sum {total:5.1f}  mean {total / n:5.2f}  {shown}")

# %% [markdown]
r"""
There are two ways to compare the choices. The *sum* of the bits is the honest probability of the
text, but a longer answer has more tokens and nearly always costs more. The *mean* per token
removes that bias and brings in another: a long name whose last tokens are certain looks cheap.
CORE uses the mean. Neither is right; what matters is that everybody uses the same one.

## Few-shot prompts

A base model does not know what form of answer we want. We can show it: put some solved
examples, the *shots*, in front of the question. The rules of CORE are simple, and every detail of
them changes the score:

- a **multiple choice** item is `query + delimiter + choice`;
- a **schema** item has several contexts and one continuation: `context + delimiter +
  continuation`, and the continuation is scored after each context;
- a **language modelling** item is `context + delimiter + continuation`, right when greedy
  decoding gives every token of the continuation;
- shots are solved items of the same file, joined by a blank line. Item number `i` draws its shots
  with the seed `1234 + i`, never drawing itself. The file is shuffled once with seed 1337.
"""


# %%
#| export
KINDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}


@dataclass(frozen=True)
class Task:
    """One test: items of one kind and how to ask them.

    `items` are dicts with the fields of `KINDS[kind]`; `shots` solved examples stand before
    each; `baseline` is the accuracy of blind guessing, between 0 and 1.
    """

    name: str
    kind: str
    items: list[dict]
    shots: int = 0
    delimiter: str = " "
    baseline: float = 0.0

    def __post_init__(self) -> None:
        """Refuse an unknown kind, no items, a missing field or an impossible answer."""
        if self.kind not in KINDS:
            raise UserError(
                f"task {self.name}: kind {self.kind!r} is unknown; use one of {', '.join(KINDS)}."
            )
        if not self.items:
            raise UserError(f"task {self.name} has no items; check its file or leave it out.")
        for number, item in enumerate(self.items):
            problem = fault(self.kind, item, self.delimiter)
            if problem:
                raise UserError(f"task {self.name}: item {number} {problem}; mend its file.")


# %% [markdown]
r"""
Items come from files that other people wrote. A missing field or an answer that is not among the
choices is found here, and not in the middle of an evaluation.
"""


# %%
#| export
def fault(kind: str, item: Any, delimiter: str = " ") -> str | None:
    """Say what is wrong with an item of a kind, or None."""
    if not isinstance(item, dict):
        return "is not an object with fields"
    missing = [name for name in KINDS[kind] if name not in item]
    if missing:
        return f"lacks {', '.join(missing)}"
    options, gold = item.get(OPTIONS.get(kind), [""]), item.get("gold")
    texts = [item[name] for name in KINDS[kind] if name not in ("gold", OPTIONS.get(kind))]
    if kind in OPTIONS:
        if not isinstance(options, list) or not options:
            return f"has no list of {OPTIONS[kind]}"
        if type(gold) is not int or not 0 <= gold < len(options):
            return f"has no option number {gold!r} (gold)"
    if not all(isinstance(text, str) for text in texts + options):
        return "has a field that is no text"
    shared = delimiter or "".join(texts).strip()  # what stands in every text of the item
    return None if shared or all(options) else "has no text to score"


# %% [markdown]
r"""
Three functions make the prompts: one fills an option into an item, one draws the shots, and
`render` puts both together.
"""


# %%
#| export
def completed(task: Task, item: dict, option: int | None = None) -> str:
    """Return an item as text with one option filled in; by default the right one."""
    option = item.get("gold") if option is None else option
    if task.kind == "multiple_choice":
        return item["query"] + task.delimiter + item["choices"][option]
    if task.kind == "schema":
        return item["context_options"][option] + task.delimiter + item["continuation"]
    return item["context"].strip() + task.delimiter + item["continuation"]


def draw_shots(task: Task, index: int) -> list[dict]:
    """Draw the solved examples for item `index`: seed 1234 + index, never the item itself."""
    others = range(len(task.items) - 1)
    drawn = random.Random(1234 + index).sample(others, min(task.shots, len(others)))
    return [task.items[j + (j >= index)] for j in drawn]  # step over the item


def render(task: Task, index: int) -> list[str]:
    """Return the texts to score for item `index`: one for each option.

    For language modelling: the prompt alone, stripped so that its tokens begin the second text,
    and the prompt with its continuation. Rules of CORE (DCLM, Li et al. 2024).
    """
    item = task.items[index]
    shots = "".join(completed(task, shot) + "\n\n" for shot in draw_shots(task, index))
    if task.kind == "language_modeling":
        prompt = shots + item["context"].strip() + task.delimiter
        return [prompt.strip(), shots + completed(task, item)]
    n_options = len(item[OPTIONS[task.kind]])
    return [shots + completed(task, item, option) for option in range(n_options)]


# %% [markdown]
r"""
This is what the model reads for one item with two shots, here with the right choice.
"""

# %%
small_task = Task(
    "who and where",
    "multiple_choice",
    exam(world, "multiple_choice", 8, seed=1),
    shots=2,
    baseline=0.25,
)
print(render(small_task, 3)[small_task.items[3]["gold"]])

# %% [markdown]
r"""
## From text to scored tokens

Now tokens. For each text we need its ids and the span `[start, end)` to score. Where does the
span start? Tokenizing the parts one by one and gluing them together would be wrong, since tokens
may span the seam. So we tokenize whole texts and *look* for the common part: a common prefix for
multiple choice, a common suffix for schema items.
"""


# %%
#| export
@dataclass
class Row:
    """One text as tokens, a list or an array; the span ids[start:end] is what gets scored."""

    ids: Sequence[int]
    start: int
    end: int


def common_length(texts: list[Sequence[int]]) -> int:
    """Return how many leading tokens all texts share."""
    n = min(len(ids) for ids in texts)
    table = np.array([ids[:n] for ids in texts])  # (texts, n)
    differ = (table != table[0]).any(axis=0)
    return int(differ.argmax()) if differ.any() else n


def spans(kind: str, texts: list[Sequence[int]]) -> list[Row]:
    """Locate the scored span in the token lists of one item; each span has a token or more."""
    if kind == "schema":
        shared = common_length([ids[::-1] for ids in texts])
        shared = max(1, min(shared, *(len(ids) - 1 for ids in texts)))
        return [Row(ids, len(ids) - shared, len(ids)) for ids in texts]
    start = common_length(texts)
    if kind == "language_modeling":
        texts = texts[1:]
    start = max(1, min(start, *(len(ids) - 1 for ids in texts), len(texts[0]) - 1))
    return [Row(ids, start, len(ids)) for ids in texts]


# %% [markdown]
r"""
Prompts with many shots may be longer than the model's context window. They lose their beginning,
which is the part that matters least. How many items that happened to is part of each result.
"""


# %%
#| export
def crop(row: Row, seq_len: int) -> Row:
    """Cut a row from the left so that seq_len tokens remain: the question is at the end."""
    cut = max(0, len(row.ids) - seq_len)
    return Row(row.ids[cut:], max(1, row.start - cut), row.end - cut)


# %%
#| test
assert common_length([[5, 6, 7], [5, 6], [5, 6, 8]]) == 2 and common_length([[1], [2]]) == 0
three = [[9, 1, 2, 3], [9, 1, 2, 4, 5], [9, 1, 2, 4]]
assert [(r.start, r.end) for r in spans("multiple_choice", three)] == [(3, 4), (3, 5), (3, 4)]
two = [[9, 1, 7, 8], [9, 2, 2, 7, 8]]
assert [(r.start, r.end) for r in spans("schema", two)] == [(2, 4), (3, 5)]
assert spans("language_modeling", [[9, 1], [9, 1, 6, 7]]) == [Row([9, 1, 6, 7], 2, 4)]
assert crop(Row([9, 1, 6, 7], 2, 4), 3) == Row([1, 6, 7], 1, 3)

# %% [markdown]
r"""
A common prefix is a matter of tokens, not of letters. If two choices begin with the same letters,
that shared beginning is not scored either, which is right: it does not tell them apart.

## Scoring: one by one, then in batches

The model's logits at position `t` predict token `t + 1`, so the loss of token `start` is found at
position `start - 1`. Off by one here, and the score measures something else. The naive scorer
takes one text at a time:
"""


# %%
def score_one(model, row):
    """Mean loss of the span and whether greedy decoding would write it."""
    x = torch.tensor([row.ids])
    with torch.no_grad():
        logits = model(x)[0, row.start - 1 : row.end - 1]  # (n, V)
    target = x[0, row.start : row.end]
    return F.cross_entropy(logits, target).item(), bool((logits.argmax(-1) == target).all())


rows = []
for i in range(len(small_task.items)):
    rows += spans("multiple_choice", tokenizer.encode_batch(render(small_task, i), bos=True))
print([round(score_one(model, row)[0], 2) for row in rows[12:16]])

# %% [markdown]
r"""
The kept version puts many texts in one batch. Rows have different lengths, so they are padded on
the *right*, where causal attention cannot see it, and sorted by length, so that there is little of
it. The loss is computed for scored positions only.

That alone still reads most tokens several times. With ten shots a question may have a thousand
tokens in front of its four choices, and the model reads them four times. How much of all reading is
repetition?
"""

# %%
task = Task("four shots", "multiple_choice", exam(world, "multiple_choice", 60, seed=1), shots=4)
many = []
for i in range(len(task.items)):
    many += spans(task.kind, tokenizer.encode_batch(render(task, i), bos=True))
tokens = sum(len(row.ids) for row in many)
once = sum(row.start for row in many[::4]) + sum(len(row.ids) - row.start for row in many)
print(f"{tokens:,} tokens in {len(many)} texts; {once:,} if each beginning were read once")

# %% [markdown]
r"""
What the model computes for a token depends on the tokens before it and on nothing after it. So a
beginning can be read once, and what later tokens need of it, the keys and values of every layer,
can be kept:

```
    the shots and the question         Berin.        read once, kept         |  read for each
    the shots and the question         Korva.   ->   the shots and the       |  Berin.
    the shots and the question         the sea.      question                |  Korva.
    the shots and the question         a mill.                               |  the sea.  ...
```

Chapter 8 builds such a cache for writing text. Here a few lines do: a `Prefix` is filled by a first
pass, and in a second one it puts its keys and values in front of the new ones. In between, its rows
are dealt out: row 0 of the prefix to the four choices of question 0, and so on.
"""


# %%
#| export
class Prefix:
    """Keys and values of tokens that were read once, for rows that go on from there.

    The model of chapter 3 takes it as `kv_cache`: the first pass fills it, the second one reads it.
    """

    positions = mask = None  # nothing is padded on the left

    def __init__(self) -> None:
        self.keys: list[Tensor] = []  # of each layer, (B, n_kv_head, P, head_dim)
        self.values: list[Tensor] = []
        self.length, self.last = 0, None  # last: (B, 1, C), if the model smears

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return all keys and values of a layer; k, v are the new (B, n_kv_head, T, head_dim)."""
        if layer == len(self.keys):
            self.keys.append(k)
            self.values.append(v)
            return k, v
        return torch.cat((self.keys[layer], k), dim=2), torch.cat((self.values[layer], v), dim=2)

    def advance(self, n_new: int) -> None:
        """Count n_new tokens as read; the model calls this once a pass."""
        self.length += n_new

    def batch_select_indices(self, rows: Tensor) -> None:
        """Deal the rows out, in place: row i becomes what row rows[i] was; repeats are allowed."""
        self.keys = [k.index_select(0, rows) for k in self.keys]
        self.values = [v.index_select(0, rows) for v in self.values]
        self.last = None if self.last is None else self.last.index_select(0, rows)


# %% [markdown]
r"""
One function must know what kind of model it has before it. Ours takes a `kv_cache`, those of
Hugging Face `past_key_values`; anything else reads everything at once. Ours also gives logits where
they are asked for and nowhere else. That matters: with a vocabulary of 32,768 the logits of a batch
weigh more than everything else in it, and only one position in twenty is scored.
"""


# %%
#| export
def cache_argument(model: Any) -> str | None:
    """Return the name under which a model takes a cache, or None if it takes none."""
    takes = inspect.signature(model.forward).parameters
    return next((name for name in ("kv_cache", "past_key_values") if name in takes), None)


def read_on(
    model: Any, ids: Tensor, cache: Any = None, positions: np.ndarray | None = None
) -> tuple:
    """Return (logits (n, V), cache) of ids (B, T) that follow what `cache` holds.

    The logits are those of `positions` (n,), counted row after row: b * T + t; None asks for
    few, whichever cost least. Works with our model, with causal models of Hugging Face, and with
    anything else that gives logits: that one has no cache, and gets None back.
    """
    name, takes = cache_argument(model), inspect.signature(model.forward).parameters
    if name == "kv_cache":
        cache = cache or Prefix()
        few = {"last_only": True} if positions is None else {"positions": send(positions, model)}
        return model(ids, kv_cache=cache, **few), cache
    B, T = ids.shape
    at = np.arange(B) * T + T - 1 if positions is None else positions
    few = {"logits_to_keep": T - int((at % T).min())} if "logits_to_keep" in takes else {}
    out = model(ids, **({"past_key_values": cache, "use_cache": True} if name else {}), **few)
    logits = getattr(out, "logits", out)  # of the last columns: (B, kept, V)
    at = at // T * logits.size(1) + at % T - (T - logits.size(1))
    return logits.flatten(0, 1)[send(at, model)], getattr(out, "past_key_values", None)


def send(values: np.ndarray, model: Any) -> Tensor:
    """Copy an array to the model's device, without waiting for the work that is queued there."""
    device, values = next(model.parameters()).device, torch.from_numpy(values)
    values = values.pin_memory() if device.type == "cuda" else values
    return values.to(device, non_blocking=device.type == "cuda")


# %% [markdown]
r"""
Which rows share a beginning? We need not know about questions and choices: sorted alphabetically,
rows that begin alike stand side by side. A row joins the group before it while at least half of
what the group shares survives. So the choices of one question find each other, and where all items
of a task have the same shots, all of them do.

Groups of about equal beginnings are then read together, cut to the shortest of them. What was cut
off is read with the rest, so there is no padding on the left at all. A row alone in its group
shares with nobody and is read whole; so are rows that share a few tokens only, which are not worth
a pass of their own.
"""


# %%
#| export
@dataclass
class Group:
    """Rows, by number, that have their first `shared` tokens in common."""

    shared: int
    rows: list[int]


LEAST = 16  # tokens; a shorter beginning is not worth a pass of its own


def shared_groups(rows: list[Row]) -> list[Group]:
    """Put rows that begin alike into groups, each row into one; the longest beginnings first.

    The token before a span stays out of the shared part: its logits predict the span's first.
    """
    groups: list[Group] = []
    names = [np.array(row.ids, ">u4").tobytes() for row in rows]  # these sort as the ids do
    for i in sorted(range(len(rows)), key=names.__getitem__):
        shared = rows[i].start - 1
        if groups:
            group = groups[-1]
            common = common_length([rows[group.rows[-1]].ids, rows[i].ids])
            common = min(group.shared, shared, common)
            if 2 * common >= group.shared:
                group.shared = common
                group.rows.append(i)
                continue
        groups.append(Group(shared, [i]))
    for group in groups:
        if len(group.rows) == 1 or group.shared < LEAST:
            group.shared = 0
    return sorted(groups, key=lambda group: -group.shared)


# %%
#| export
def group_batches(groups: list[Group], batch_tokens: int) -> Iterator[list[Group]]:
    """Yield groups to read together: at most `batch_tokens` shared tokens, of similar lengths."""
    while groups:
        longest = groups[0].shared
        most = max(1, batch_tokens // max(longest, 1))
        least = min(longest - LEAST, longest * 0.8)
        near = [group for group in groups[:most] if group.shared >= least]
        yield near
        groups = groups[len(near) :]


KEPT = 4  # a batch may have this many times as many tokens in its cache as it reads


def length_batches(lengths: list[int], batch_tokens: int, shared: int = 0) -> Iterator[list[int]]:
    """Yield row numbers grouped by length, longest first, at most `batch_tokens` read a batch.

    The `shared` tokens that each row has before it count too, against KEPT * batch_tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        longest = lengths[order[0]]
        n = max(1, min(batch_tokens // longest, KEPT * batch_tokens // (shared + longest)))
        yield order[:n]
        order = order[n:]


# %% [markdown]
r"""
`read_shared` reads the beginnings; `score_rest` scores what follows them, or whole rows with an
empty cache. `score_rows` puts the two together and hands the results back in order.

A GPU works through a queue. Python writes kernels into it and runs ahead, as long as it never asks
for a result: each question waits until the queue is empty, and then the GPU waits for Python. So
ids travel one way, a batch in one copy (`send`), and the losses stay on the device until the last
batch is queued.
"""


# %%
#| export
def read_shared(model: Any, groups: list[Group], rows: list[Row]) -> tuple[int, Any]:
    """Read what groups share, a row each: (tokens read, cache); (0, None) where nothing is kept."""
    shared = min(group.shared for group in groups)
    if not shared:
        return 0, None
    ids = np.array([rows[group.rows[0]].ids[:shared] for group in groups])
    cache = read_on(model, send(ids, model))[1]
    return (shared, cache) if hasattr(cache, "batch_select_indices") else (0, None)


# %%
#| export
def score_rest(model: Any, cache: Any, rows: list[Row], shared: int, pad_id: int) -> Tensor:
    """Score rows whose first `shared` tokens are in the cache.

    Returns the loss of each scored token and whether greedy decoding would write it, row after
    row, (2, n) float32 on the model's device.
    """
    lengths = [row.end - 1 - shared for row in rows]  # the last token is a target, not read
    ids = np.full((len(rows), max(lengths)), pad_id)
    positions, targets = [], []
    for b, (row, length) in enumerate(zip(rows, lengths)):
        ids[b, :length] = row.ids[shared : row.end - 1]
        end = b * ids.shape[1] + length
        positions.append(np.arange(end - (row.end - row.start), end))
        targets.append(row.ids[row.start : row.end])
    logits = read_on(model, send(ids, model), cache, np.concatenate(positions))[0].float()
    target = send(np.concatenate(targets), model)  # (n,)
    losses = F.cross_entropy(logits, target, reduction="none")
    return torch.stack((losses, (logits.argmax(-1) == target).float()))


# %%
#| export
def row_means(parts: list[Tensor], rows: list[Row]) -> list[tuple[float, bool]]:
    """Return (mean loss, every token hit) of each row from what `score_rest` gave for them."""
    losses, hits = torch.cat(parts, dim=1).cpu().double().numpy()  # here we wait for the device
    lengths = np.array([row.end - row.start for row in rows])
    first = np.cumsum(lengths) - lengths
    means = np.add.reduceat(losses, first) / lengths
    return list(zip(means.tolist(), (np.minimum.reduceat(hits, first) > 0).tolist()))


# %% [markdown]
r"""
One more trap waits on a GPU. PyTorch has several attention kernels, and on NVIDIA's Hopper it takes
cuDNN's, which makes a plan for each new shape: tens of milliseconds. In training there is one
shape. Here nearly every batch has its own, and the plans would take longer than the reading. We
leave that kernel out.
"""


# %%
#| export
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@torch.no_grad()
@sdpa_kernel(KERNELS)
def score_rows(
    model: Any,
    rows: list[Row],
    pad_id: int = 0,
    batch_tokens: int | None = None,
    share: bool = True,
) -> list[tuple[float, bool]]:
    """Return (mean loss in nats, greedy decoding would write it) of each row's span, in order.

    `model(ids)` gives logits (B, T, V), or an object that has them as `.logits`. Beginnings that
    rows share are read once, if the model has a cache (`share=False` reads all of every row).
    Sharing, padding and batching change the losses by float rounding at most. Equal rows are
    scored once, so that they tie exactly.
    """
    device = next(model.parameters()).device
    size = batch_tokens or (32768 if device.type == "cuda" else 2048)
    keys = [(np.array(row.ids).tobytes(), row.start, row.end) for row in rows]
    unique = dict(zip(keys, rows))
    names, texts = list(unique), list(unique.values())
    share = share and cache_argument(model) is not None
    groups = shared_groups(texts) if share else [Group(0, list(range(len(texts))))]
    order, found = [], []
    for batch in group_batches(groups, size):
        shared, cache = read_shared(model, batch, texts)
        owners = [(g, i) for g, group in enumerate(batch) for i in group.rows]
        lengths = [texts[i].end - 1 - shared for _, i in owners]
        parts = list(length_batches(lengths, size, shared))
        for numbers in parts:
            part = copy.deepcopy(cache) if len(parts) > 1 else cache
            if part is not None:
                from_group = np.array([owners[k][0] for k in numbers])
                part.batch_select_indices(send(from_group, model))
            chosen = [owners[k][1] for k in numbers]
            found.append(score_rest(model, part, [texts[i] for i in chosen], shared, pad_id))
            order += chosen
    results = dict(zip((names[i] for i in order), row_means(found, [texts[i] for i in order])))
    return [results[key] for key in keys]


# %%
for batch_tokens in (1, 300, 100_000):
    for share in (True, False):
        batched = score_rows(model, rows, tokenizer.bos_id, batch_tokens, share)
        for row, (loss, hit) in zip(rows, batched):
            alone = score_one(model, row)
            assert abs(alone[0] - loss) < 1e-4 and alone[1] == hit

# %%
times = [time.perf_counter()]
one_by_one = [score_one(model, row) for row in many]
times.append(time.perf_counter())
batched = score_rows(model, many, tokenizer.bos_id, share=False)
times.append(time.perf_counter())
shared = score_rows(model, many, tokenizer.bos_id)
times.append(time.perf_counter())
seconds = np.diff(times)
print(f"in batches {seconds[0] / seconds[1]:.1f} times as fast as one by one,")
print(f"and with beginnings read once {seconds[0] / seconds[2]:.1f} times")
assert all(abs(a[0] - b[0]) < 1e-4 and a[1] == b[1] for a, b in zip(one_by_one, shared))

# %% [markdown]
r"""
> **Exercise 7.2.** Questions with four choices and very long prompts: how much faster can reading
> beginnings once be at most? And for language modelling, with other shots for each item? Change
> `shots` and the kind of the task above, and see.

The first factor comes from keeping the machine busy, the rest from not doing work twice. Which one
is larger depends on the machine, the model and the texts. On one H200 a model of depth 12 scored 21
tasks of CORE, 73,674 items, in 141 seconds, 8 times as fast as one by one
(`benchmarks/RESULTS.md`). The last line of the cell checks what matters more: the losses are the
same, but for rounding.

A task is now a loop over its items, some hundreds at a time. Python prepares their rows: it writes
the texts, encodes them and looks for the spans. The GPU need not wait for that: a thread prepares
the next items while the present ones are scored. The choice with the lowest mean loss wins; on an
exact tie, the first. That rule explains the cold open: to a newborn model all choices are tied, so
it always picks the first, and its score is the share of items whose answer happens to stand there.
A broken model, whose losses are `nan`, would get the same score; `decide` refuses it.
"""


# %%
#| export
def one_ahead(items: Iterable) -> Iterator:
    """Yield the items, none of them None; while one is in use, a thread makes the next."""
    items = iter(items)
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(next, items, None)
        while (item := later.result()) is not None:
            later = pool.submit(next, items, None)
            yield item


def prepare(
    task: Task, tokenizer: Any, seq_len: int, numbers: Sequence[int]
) -> tuple[Sequence[int], list[list[Row]], list[bool]]:
    """Return the numbers of some items, and for each item its rows and whether one was cropped."""
    texts = [render(task, index) for index in numbers]
    flat = [text for several in texts for text in several]
    encoded = tokenizer.encode_batch(flat, bos=True, num_threads=usable_cores())
    encoded = [np.array(ids) for ids in encoded]  # millions of tokens: lists would be slow
    ids = iter(encoded)
    groups = [spans(task.kind, [next(ids) for _ in several]) for several in texts]
    cropped = [max(len(row.ids) for row in group) > seq_len for group in groups]
    return numbers, [[crop(row, seq_len) for row in group] for group in groups], cropped


# %%
#| export
def score_task(
    model: Any,
    tokenizer: Any,
    task: Task,
    limit: int | None = None,
    seed: int = 1337,
    rank: int = 0,
    world_size: int = 1,
    batch_tokens: int | None = None,
    chunk: int | None = None,
    share: bool = True,
) -> Iterator[dict]:
    """Yield one decision for each item: index, correct, choice, losses (one an option), cropped.

    The items are shuffled with `seed` and cut to `limit` before shots are drawn, as in nanochat.
    A process of rank r takes items r, r + world_size, ... `chunk` items are scored together, by
    default 256, on a GPU 1024; `batch_tokens` and `share` are as in `score_rows`.
    """
    items = list(task.items)
    random.Random(seed).shuffle(items)
    task = replace(task, items=items[:limit])
    chunk = chunk or (1024 if next(model.parameters()).is_cuda else 256)
    mine = range(rank, len(task.items), world_size)
    parts = [mine[first : first + chunk] for first in range(0, len(mine), chunk)]
    ready = map(partial(prepare, task, tokenizer, context_length(model)), parts)
    for numbers, groups, cropped in one_ahead(ready):
        rows = [row for group in groups for row in group]
        scores = iter(score_rows(model, rows, tokenizer.bos_id, batch_tokens, share))
        for index, group, cut in zip(numbers, groups, cropped):
            yield {**decide(task, index, [next(scores) for _ in group]), "cropped": cut}


# %%
#| export
def decide(task: Task, index: int, scores: list[tuple[float, bool]]) -> dict:
    """Turn the scores of one item's rows into a decision; UserError if a loss is no number."""
    losses = [loss for loss, _ in scores]
    if not all(map(math.isfinite, losses)):
        raise UserError(
            f"task {task.name}: the losses of item {index} are {losses}, and no score can be made "
            f"of these; look for nan in the model's weights, or take an earlier checkpoint."
        )
    if task.kind == "language_modeling":
        return {"index": index, "correct": scores[0][1], "choice": None, "losses": losses}
    choice = losses.index(min(losses))
    correct = choice == task.items[index]["gold"]
    return {"index": index, "correct": correct, "choice": choice, "losses": losses}


def context_length(model: Any) -> int:
    """Return how many tokens a model reads at once, ours or a Hugging Face one."""
    for name in ("seq_len", "n_positions", "max_position_embeddings"):
        if hasattr(model.config, name):
            return getattr(model.config, name)
    return 2048


# %% [markdown]
r"""
## What a score is worth

Guessing among four choices is right in 25 % of the cases, among two in 50 %. To compare tasks we
*centre*: zero is guessing, one is perfect, below zero is worse than guessing.

$$\text{centred} = \frac{\text{accuracy} - b}{1 - b}$$

And every accuracy is a sample. Another draw of items from the same source would give another
number. The *bootstrap* estimates by how much, using only the sample we have: draw as many items
from it as it has, with replacement, take the mean, and repeat. The middle 95 % of these means is
the interval.
"""


# %%
#| export
def centered(accuracy: float, baseline: float) -> float:
    """Return the accuracy on a scale where guessing is 0 and perfect is 1."""
    return (accuracy - baseline) / (1 - baseline)


def bootstrap_interval(
    values: Iterable[float], seed: int = 0, level: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """Return the (low, high) percentile bootstrap interval of the mean. Efron (1979).

    When 0/1 values are all equal, resampling shows no spread; the exact binomial bound is used
    instead, so that 0 right of 20 does not claim to be certain.
    """
    values = np.asarray(list(values), dtype=np.float64)
    tail, n = (1 - level) / 2, len(values)
    if n == 0:
        return math.nan, math.nan
    if np.all(values == 0):
        return 0.0, 1 - tail ** (1 / n)
    if np.all(values == 1):
        return tail ** (1 / n), 1.0
    rng = np.random.default_rng(seed)
    if np.isin(values, (0, 1)).all():  # the mean of a resample is binomial
        means = rng.binomial(n, values.mean(), draws) / n
    else:
        means = np.array([values[rng.integers(0, n, n)].mean() for _ in range(draws)])
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)


# %%
#| test
assert centered(0.25, 0.25) == 0 and centered(1.0, 0.62) == 1 and centered(0.0, 0.5) == -1
low, high = bootstrap_interval([0, 1] * 200)
assert low < 0.5 < high and abs((high - low) / 2 - 1.96 * math.sqrt(0.25 / 400)) < 0.01
assert bootstrap_interval([0] * 20)[1] > 0.1

# %% [markdown]
r"""
How many items does a claim need? Suppose a model's true accuracy is 30 % where guessing gives 25
%. We simulate the exam with more and more items.
"""

# %%
rng = np.random.default_rng(seed)
sizes = [20, 50, 100, 200, 500, 1000, 2000, 5000]
bounds = np.array([bootstrap_interval((rng.random(n) < 0.30).astype(float)) for n in sizes])
enough = next(n for n, (low, _) in zip(sizes, bounds) if low > 0.25)
fig, ax = figure(
    f"To tell 30 % from 25 % takes about {enough} items",
    "items in the exam",
    "accuracy",
    alt="Interval of the accuracy narrowing as the number of items grows",
)
ax.fill_between(sizes, bounds[:, 0], bounds[:, 1], alpha=0.3, label="95 % interval")
ax.axhline(0.30, color=COLORS[0], label="true accuracy")
ax.axhline(0.25, color=COLORS[1], linestyle="--", label="guessing")
ax.set_xscale("log")
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
r"""
An interval is a promise: in 95 of 100 exams, the truth lies inside. We test it where we know the
truth, on two thousand exams of random length and difficulty.
"""

# %%
inside, exams = 0, 2000
for number in range(exams):
    p, n = rng.uniform(0.1, 0.9), int(rng.integers(50, 500))
    low, high = bootstrap_interval((rng.random(n) < p).astype(float), seed=number, draws=1000)
    inside += low <= p <= high
print(f"the truth was inside {inside / exams:.1%} of the intervals")
assert abs(inside / exams - 0.95) < 4 * math.sqrt(0.95 * 0.05 / exams)

# %% [markdown]
r"""
### How noisy is CORE?

CORE, the benchmark this chapter works towards, is the mean of 22 centred accuracies. The tasks
have very different sizes: five with ten thousand items or more, one with 32. A task of $n$ items
with accuracy $a$ and baseline $b$ moves the mean by about

$$\frac{1}{22} \cdot \frac{1}{1-b}\sqrt{\frac{a(1-a)}{n}}$$

from one draw of items to the next. Centring makes it worse where guessing is good: `boolq`, a
yes-no question with a baseline of 62 %, is stretched by 2.6. We draw this for a weak model that
is a tenth of the way from guessing to perfect everywhere.
"""

# %%
core_sizes = {  # items and baseline of the 22 tasks
    "hellaswag_zeroshot": (10042, 0.25), "hellaswag": (10042, 0.25), "jeopardy": (2117, 0.0),
    "bigbench_qa_wikidata": (20321, 0.0), "arc_easy": (2376, 0.25), "arc_challenge": (1172, 0.25),
    "copa": (100, 0.5), "commonsense_qa": (1221, 0.2), "piqa": (1838, 0.5),
    "openbook_qa": (500, 0.25), "lambada_openai": (5153, 0.0), "winograd": (273, 0.5),
    "winogrande": (1267, 0.5), "bigbench_dyck_languages": (1000, 0.0),
    "agi_eval_lsat_ar": (230, 0.2), "bigbench_cs_algorithms": (1320, 0.0),
    "bigbench_operators": (210, 0.0), "bigbench_repeat_copy_logic": (32, 0.0),
    "squad": (10570, 0.0), "coqa": (7983, 0.0), "boolq": (3270, 0.62),
    "bigbench_language_identification": (10000, 0.091),
}  # fmt: skip
noise = {}
for name, (n, b) in core_sizes.items():
    a = b + 0.1 * (1 - b)
    noise[name] = math.sqrt(a * (1 - a) / n) / (1 - b)
total = math.sqrt(sum(x**2 for x in noise.values())) / 22
worst = sorted(noise, key=noise.get)[-8:]
share = sum(noise[name] ** 2 for name in worst[-3:]) / sum(x**2 for x in noise.values())
fig, ax = figure(
    f"Three of 22 tasks make {share:.0%} of the noise of CORE",
    "standard error of the centred score",
    size=(6, 2.6),
    alt="Bars: the standard error of the eight noisiest CORE tasks, copa first",
)
ax.barh(worst, [noise[name] for name in worst])
plt.show()
print(f"standard error of CORE, from the items alone: {total:.3f}")

# %% [markdown]
r"""
So two models whose true scores are equal easily come out 0.01 apart. And this counts only the
luck of the items. The luck of the training run (its seed, the order of its data) comes on top:
seven published runs of one nanochat recipe scored from 0.2512 to 0.2677. So a difference of 0.01
between two single runs shows nothing. Bits per byte is steadier; CORE tells whether the steadier
number means anything.

`evaluate_task` scores one task, `evaluate_core` a list of them, and `summarize` puts the error bar
on their mean.
"""


# %%
#| export
def evaluate_task(
    model: Any,
    tokenizer: Any,
    task: Task,
    limit: int | None = None,
    seed: int = 1337,
    world: Any = None,
    batch_tokens: int | None = None,
    progress: Any = None,
) -> dict:
    """Return accuracy, centered, n, the accuracy's 95 % interval (low, high) and the baseline.

    `correct` is a string with a 1 or 0 for each item, in the shuffled order; `cropped` says of how
    many items a prompt was too long for the model's window. With a `world`, its processes share the
    items and all get the same result. `progress.update(n)` is told of every n items. Warns when
    there are too few items for the shots.
    """
    if limit is not None and limit < 1:
        raise UserError(f"task {task.name}: limit {limit} leaves no items; use 1 or more, or None.")
    n = len(task.items[:limit])
    if n <= task.shots:
        warnings.warn(
            f"task {task.name}: {n} items are too few for {task.shots} shots beside the question; "
            f"asked with {n - 1}, which is another test than the full one; raise the limit.",
            stacklevel=2,
        )
    found = torch.zeros(2, n, dtype=torch.float64)  # correct, cropped
    rank, world_size = (0, 1) if world is None else (world.rank, world.world_size)
    for decision in score_task(model, tokenizer, task, limit, seed, rank, world_size, batch_tokens):
        found[:, decision["index"]] = torch.tensor([decision["correct"], decision["cropped"]])
        if progress is not None:
            progress.update(world_size)
    correct, cropped = found if world is None else sum_over(world, found)
    accuracy = correct.mean().item()
    low, high = bootstrap_interval(correct.tolist())
    return {
        "kind": task.kind,
        "shots": min(task.shots, n - 1),
        "n": n,
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "baseline": task.baseline,
        "centered": centered(accuracy, task.baseline),
        "cropped": int(cropped.sum()),
        "correct": "".join(str(int(value)) for value in correct),
    }


# %%
#| export
def evaluate_core(
    model: Any,
    tokenizer: Any,
    tasks: list[Task],
    limit: int | None = None,
    world: Any = None,
    progress: Any = None,
) -> dict:
    """Score a list of tasks: {"core", "low", "high", "n_tasks", "tasks": {name: result}}.

    `core` is the mean centred accuracy; `progress` is as in `evaluate_task`. Raises UserError for
    no tasks, or two of one name.
    """
    file_names(tasks)
    results = {}
    for task in tasks:
        results[task.name] = evaluate_task(
            model, tokenizer, task, limit, world=world, progress=progress
        )
    return summarize(results)


def file_names(tasks: Sequence[Task]) -> list[str]:
    """Return a file's name for each task's result; UserError when two tasks would share one."""
    names, owners = [re.sub(r"[^\w.-]+", "_", task.name) for task in tasks], {}
    for task, name in zip(tasks, names):
        key = name.lower()  # on some machines A and a are one file
        if key in owners:
            raise UserError(
                f"two tasks are called {owners[key]!r} and {task.name!r}, and their results would "
                f"share one place; rename one of them."
            )
        owners[key] = task.name
    return names


def summarize(results: dict[str, dict], seed: int = 0, draws: int = 2000) -> dict:
    """Return the mean of the centred accuracies with its bootstrap interval, and the results."""
    if not results:
        raise UserError("there are no tasks to score; give at least one.")
    rng, total = np.random.default_rng(seed), np.zeros(draws)
    for result in results.values():
        n = result["n"]
        total += centered(rng.binomial(n, result["accuracy"], draws) / n, result["baseline"])
    low, high = np.quantile(total / len(results), (0.025, 0.975))
    mean = sum(result["centered"] for result in results.values()) / len(results)
    return {
        "core": mean,
        "low": float(low),
        "high": float(high),
        "n_tasks": len(results),
        "tasks": results,
    }


# %% [markdown]
r"""
### A fair comparison

Two models, two scores, two intervals that overlap: is there no difference? That would be asking
the wrong question. Both models sat the *same* exam. Easy items are right for both, hopeless ones
wrong for both; what tells them apart is the items on which they disagree. So we take the difference
item by item and put the interval around *that*.
"""


# %%
#| export
def compare(one: dict, other: dict, seed: int = 0, draws: int = 2000) -> dict:
    """Compare two results of `evaluate_core` on the same items: {"difference", "low", "high"}.

    The difference is other - one in the mean centred score, with the bootstrap interval of the
    differences item by item. Raises UserError when the two did not sit the same exam.
    """
    a, b = one["tasks"], other["tasks"]
    if {n: len(r["correct"]) for n, r in a.items()} != {n: len(r["correct"]) for n, r in b.items()}:
        raise UserError("these two results are not of the same tasks and items; score both anew.")
    rng, total, mean = np.random.default_rng(seed), np.zeros(draws), 0.0
    for name in a:
        pairs = Counter(int(y) - int(x) for x, y in zip(a[name]["correct"], b[name]["correct"]))
        n, scale = len(a[name]["correct"]), len(a) * (1 - a[name]["baseline"])
        drawn = rng.multinomial(n, [pairs[-1] / n, pairs[0] / n, pairs[1] / n], draws)
        total += (drawn[:, 2] - drawn[:, 0]) / n / scale
        mean += (pairs[1] - pairs[-1]) / n / scale
    low, high = np.quantile(total, (0.025, 0.975))
    return {"difference": mean, "low": float(low), "high": float(high)}


# %% [markdown]
r"""
Here are two invented models. The second is the first with a little more knowledge: it gets a few of
the wrong items right and loses very few.
"""

# %%
first = rng.random(400) < 0.45
second = np.where(rng.random(400) < 0.1, rng.random(400) < 0.8, first)
results = []
for answers in (first, second):
    low, high = bootstrap_interval(answers.astype(float))
    accuracy = float(answers.mean())
    print(f"accuracy {accuracy:.3f}, alone somewhere in {low:.3f} to {high:.3f}")
    bits = "".join(str(int(x)) for x in answers)
    results.append({"tasks": {"exam": {"correct": bits, "baseline": 0.0}}})
paired = compare(*results)
print(f"difference {paired['difference']:.3f}, paired: {paired['low']:.3f} to {paired['high']:.3f}")
assert paired["low"] > 0

# %% [markdown]
r"""
The two intervals overlap, and yet the second model is better beyond reasonable doubt. The rest of
a fair comparison is discipline:

- the same items, shots, order, delimiter and scoring rule (mean or sum) for both;
- every model with the tokenizer and context length it was trained with, and a word about prompts
  that were cropped;
- the same number of attempts: the best of five checkpoints is not comparable with one;
- nothing tuned on the exam itself, and no exam in the training text (below we look for it);
- several seeds, when the claim is about a *recipe* and not about one set of weights.

## Controls

A score above the baseline still does not mean that the model understood the question. There are
cheaper ways to score well, and each has a control that measures it:

| control | what it would explain |
|---|---|
| **majority class** | the answer is usually the same one |
| **longest answer** | the right choice is often the longest: careful authors qualify what is true |
| **question removed** | the right choice is the most natural text, whatever the question says |
| **shuffled labels** | a bug: with wrong answers in the key nobody should do better than guessing |

The first two need no model. The last two are the same exam, changed, and given to the model.
"""


# %%
#| export
def majority_class(task: Task) -> float:
    """Return the accuracy of always giving the commonest answer (position or continuation)."""
    name = "continuation" if task.kind == "language_modeling" else "gold"
    counts = Counter(item[name] for item in task.items)
    return counts.most_common(1)[0][1] / len(task.items)


def longest_answer(task: Task) -> float:
    """Return the accuracy of always picking the option with the most characters.

    Ties are shared out evenly. Without options (language modelling) it is 0.
    """
    if task.kind == "language_modeling":
        return 0.0
    right = 0.0
    for item in task.items:
        lengths = [len(option) for option in item[OPTIONS[task.kind]]]
        winners = [i for i, length in enumerate(lengths) if length == max(lengths)]
        right += (item["gold"] in winners) / len(winners)
    return right / len(task.items)


def shuffle_labels(task: Task, seed: int = 0) -> Task:
    """Return the task with its answers dealt out again at random among the items.

    Items with the same number of options exchange answers, so each key is still a legal one.
    """
    rng, groups = random.Random(seed), {}
    name = "continuation" if task.kind == "language_modeling" else "gold"
    for number, item in enumerate(task.items):
        size = 0 if name == "continuation" else len(item[OPTIONS[task.kind]])
        groups.setdefault(size, []).append(number)
    items = list(task.items)
    for numbers in groups.values():
        answers = [task.items[number][name] for number in numbers]
        rng.shuffle(answers)
        for number, answer in zip(numbers, answers):
            items[number] = {**items[number], name: answer}
    return replace(task, name=task.name + ", labels shuffled", items=items)


# %%
#| export
def remove_question(task: Task) -> Task:
    """Return the task without what is asked: only the options (or the answer's form) remain.

    Multiple choice loses its query, language modelling its context. In a schema item the
    contexts are compared as texts on their own, without the continuation they should fit.
    """
    name, kind = task.name + ", question removed", task.kind
    if kind == "multiple_choice":
        return replace(task, name=name, items=[{**item, "query": ""} for item in task.items])
    if kind == "language_modeling":
        return replace(task, name=name, items=[{**item, "context": ""} for item in task.items])
    items = [
        {"query": "", "choices": item["context_options"], "gold": item["gold"]}
        for item in task.items
    ]
    return replace(task, name=name, kind="multiple_choice", items=items)


def controls(
    model: Any, tokenizer: Any, task: Task, limit: int | None = None, world: Any = None
) -> dict[str, float]:
    """Return the accuracies that need no understanding: four controls beside a score."""
    shuffled = evaluate_task(model, tokenizer, shuffle_labels(task), limit, world=world)
    removed = evaluate_task(model, tokenizer, remove_question(task), limit, world=world)
    return {
        "majority_class": majority_class(task),
        "longest_answer": longest_answer(task),
        "shuffled_labels": shuffled["accuracy"],
        "question_removed": removed["accuracy"],
    }


# %%
#| test
lopsided = Task(
    "lopsided",
    "multiple_choice",
    [{"query": "q", "choices": ["no", "certainly"], "gold": int(i % 4 > 0)} for i in range(20)],
    baseline=0.5,
)
assert majority_class(lopsided) == longest_answer(lopsided) == 0.75
shuffled = shuffle_labels(lopsided)
assert sorted(i["gold"] for i in shuffled.items) == sorted(i["gold"] for i in lopsided.items)
assert render(remove_question(lopsided), 0) == [" no", " certainly"]

# %% [markdown]
r"""
## CORE

CORE is the mean centred score over 22 public tasks, chosen by the DCLM project (Li et al. 2024)
because small models already show progress on them. GPT-2 with 1.5 billion parameters scores
0.2565. The tasks come as one JSON-lines file each, with a list that names kind, shots, delimiter
and baseline. Two layouts of that folder are in use; we read both.
"""


# %%
#| export core
import csv
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from nanochat.common import Progress, UserError, atomic_write, read_json, write_json
from nanochat.data import cache_folder, download, leads_out, retrying
from nanochat.model import GPT


# %%
#| export core
MAX_TASK_BYTES = 500_000_000  # of one task's file, unpacked


def read_items(path: Path, max_bytes: int = MAX_TASK_BYTES) -> list[dict]:
    """Read the items of a JSON-lines file, gzipped or not.

    UserError names a file that is missing, broken or, counted as it unpacks, over `max_bytes`.
    """
    opener, items, left = gzip.open if path.suffix == ".gz" else open, [], max_bytes
    try:
        with opener(path, "rb") as file:
            while line := file.readline(left + 1):
                left -= len(line)
                if left < 0:
                    raise UserError(
                        f"{path} holds more than {max_bytes:,} bytes; get the file again, or split "
                        f"its items among several tasks."
                    )
                if line.strip():
                    items.append(json.loads(line.decode("utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; get the whole folder of tasks again.") from None
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); get the file again.") from None
    return items


# %%
#| export core
def bundle_entries(folder: Path) -> list[dict]:
    """Read the task list of the DCLM bundle: core.yaml and eval_meta_data.csv."""
    try:
        import yaml
    except ImportError:
        raise UserError("core.yaml needs the package pyyaml: pip install pyyaml.") from None
    with open(folder / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    baselines = {row["Eval Task"]: float(row["Random baseline"]) for row in table}
    listed = yaml.safe_load((folder / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
    return [
        {
            "label": task["label"],
            "file": str(Path("eval_data") / task["dataset_uri"]),
            "task_type": task["icl_task_type"],
            "num_fewshot": task["num_fewshot"][0],
            "continuation_delimiter": task.get("continuation_delimiter", " "),
            "random_baseline": baselines[task["label"]],
        }
        for task in listed
    ]


# %%
#| export core
def load_core(folder: str | Path) -> list[Task]:
    """Load the CORE tasks of a folder with manifest.json, or of the DCLM bundle (core.yaml).

    Baselines are percents in the files and shares in `Task`. A listed task without a file is
    left out; a missing or broken file raises UserError.
    """
    folder = Path(folder)
    lists = [folder / name for name in ("manifest.json", "core.yaml")]
    found = next((path for path in lists if path.is_file()), None)
    if found is None:
        raise UserError(
            f"{folder} holds no CORE tasks: neither manifest.json nor core.yaml was found; "
            f"give the folder that holds one of them."
        )
    try:
        whole = found.suffix == ".yaml"
        entries = bundle_entries(folder) if whole else read_json(found)["tasks"]
        facts = [
            (
                entry["label"],
                entry["task_type"],
                folder / entry["file"],
                int(entry["num_fewshot"]),
                entry.get("continuation_delimiter", " "),
                float(entry["random_baseline"]) / 100,
            )
            for entry in entries
            if entry.get("file")
        ]
    except UserError:
        raise
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{found} is no list of tasks ({said}); get the folder again.") from None
    return [
        Task(label, kind, read_items(path), shots, delimiter, baseline)
        for label, kind, path, shots, delimiter, baseline in facts
    ]


# %% [markdown]
r"""
### Getting the bundle, and opening a stranger's archive

The tasks of nanochat's CORE are published as one zip archive of about 160 MB. Three things can be
wrong with a file from the network, and each has its guard:

- *It is another file*. We know the SHA-256 of the right one and compare.
- *It writes where it should not.* A name inside an archive may be `../../.bashrc`, or a link to
  somewhere else. We accept plain relative names and plain files.
- *It is a bomb*: a megabyte that unpacks to a terabyte of zeros. The sizes written in an archive
  may be lies, so we count the bytes as they come, and stop. `read_items` above does the same with
  a gzipped file.

It is unpacked beside its place and renamed when it is complete, so a killed run leaves nothing that
looks finished. A folder of your own is read as it is, by `load_core`.
"""


# %%
#| export core
CORE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
CORE_SHA256 = "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200"
MAX_FILES, MAX_BYTES = 1000, 2 * 10**9


def member_path(info: zipfile.ZipInfo) -> PurePosixPath:
    """Return the path of an archive's member; UserError unless it is a plain relative file name."""
    path, kind = PurePosixPath(info.filename), stat.S_IFMT(info.external_attr >> 16)
    if leads_out(info.filename) or not path.parts or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UserError(
            f"the archive holds {info.filename!r}, which is no plain file inside of it; "
            f"do not use this archive."
        )
    return path


# %%
#| export core
def unpack(archive: Path, folder: Path, max_bytes: int = MAX_BYTES) -> None:
    """Unpack a zip file into a new folder, complete or not at all.

    Refuses names that lead out of the folder, links, more than MAX_FILES members and, counted as
    they come, more than `max_bytes` bytes (UserError). Checksums inside the archive are checked.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as place:
        target, left = Path(place) / "files", max_bytes
        target.mkdir()
        try:
            with zipfile.ZipFile(archive) as source:
                members = source.infolist()
                if len(members) > MAX_FILES:
                    raise UserError(f"{archive} holds {len(members):,} files; do not use it.")
                for info in members:
                    path = target / member_path(info)
                    if info.is_dir():
                        continue
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with source.open(info) as packed, open(path, "wb") as file:
                        while block := packed.read(1 << 20):
                            left -= len(block)
                            if left < 0:
                                raise UserError(
                                    f"{archive} unpacks to more than {max_bytes:,} bytes; "
                                    f"do not use it."
                                )
                            file.write(block)
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
            raise UserError(f"{archive} is no sound zip file ({error}); get it again.") from None
        except OSError as error:
            raise UserError(
                f"{archive} cannot be unpacked ({error}); free some space or get it again."
            ) from None
        shutil.rmtree(folder, ignore_errors=True)
        target.rename(folder)


# %%
#| export core
def archive_size(url: str) -> int:
    """Ask the server for the size of a file in bytes; UserError when that is missing or absurd."""

    def ask() -> int:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "nanochat"})
        with urllib.request.urlopen(request, timeout=20) as response:
            return int(response.headers.get("Content-Length") or 0)

    size = retrying(ask, f"size of {url}")
    if not 0 < size <= MAX_BYTES:
        raise UserError(f"{url} says it has {size:,} bytes; check the address, or use a folder.")
    return size


# %%
#| export core
def fetch_core(
    folder: str | Path | None = None, url: str = CORE_URL, digest: str = CORE_SHA256
) -> Path:
    """Return the folder of the CORE bundle, after downloading it if it is not here yet.

    It is kept in `folder`, or in $NANOCHAT_CACHE or ~/.cache/nanochat under `core/`. The archive is
    verified by its SHA-256, unpacked and thrown away; when a file has changed its size since, it is
    fetched again. Raises UserError without a network or when anything is wrong with the file.
    """
    place = Path(folder) if folder else cache_folder() / "core"
    files, note, archive = place / "files", place / "unpacked.json", place / "eval_bundle.zip"

    def sizes() -> dict[str, int]:
        paths = sorted(path for path in files.rglob("*") if path.is_file())
        return {path.relative_to(files).as_posix(): path.stat().st_size for path in paths}

    known = read_json(note) if note.is_file() else None
    if known != {"sha256": digest, "sizes": sizes()}:
        size = archive_size(url)
        with Progress(size, "download of CORE", "byte") as bar:
            download(url, archive, size, digest, arrived=bar.update)
        unpack(archive, files)
        archive.unlink()
        write_json(note, {"sha256": digest, "sizes": sizes()})
    lists = sorted(files.glob("**/core.yaml")) + sorted(files.glob("**/manifest.json"))
    if not lists:
        raise UserError(f"the archive at {url} holds no CORE tasks; use a folder that does.")
    return lists[0].parent


# %%
#| test
with tempfile.TemporaryDirectory() as place:
    archive = Path(place) / "a.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("good/zeros", bytes(10**6))
        file.writestr("../../outside", "x")
    for limit, said in ((10**5, "unpacks to more"), (10**7, "no plain file")):
        try:
            unpack(archive, Path(place) / "out", max_bytes=limit)
        except UserError as error:
            assert said in str(error) and os.listdir(place) == ["a.zip"]
        else:
            raise AssertionError("an unsafe archive was unpacked")

# %% [markdown]
r"""
### Any model that has logits

A score is worth more when we can check the scorer. GPT-2's CORE is published: 0.1139 for the
model of 124 million parameters, 0.1849, 0.2146 and 0.2565 for its larger sisters. So we want to
put *that* model through *our* code. Nothing in the scoring asks for our own architecture: it
needs logits and, to be fast, a cache. For a model of Hugging Face only the tokenizer needs an
adapter: few methods, under the names that we use.

We load weights from safetensors files only and run no code that comes with a model; a repository
that offers nothing else is refused.
"""


# %%
#| export core
class HubTokenizer:
    """A tokenizer of Hugging Face with the methods of ours that scoring needs.

    Texts begin with the model's bos token, or with its end-of-text token where it has no bos.
    """

    def __init__(self, inner: Any):
        self.inner = inner
        bos, end = inner.bos_token_id, inner.eos_token_id
        self.bos_id = end if bos is None else bos
        if self.bos_id is None:
            raise UserError("this tokenizer has neither a bos nor an eos token; use another model.")

    def encode_batch(
        self, texts: Sequence[str], bos: bool = False, num_threads: int = 0
    ) -> list[list[int]]:
        """Encode several texts; `bos` puts that token in front of each."""
        rows = self.inner(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [[self.bos_id, *row] if bos else list(row) for row in rows]

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Encode one text."""
        return self.encode_batch([text], bos)[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids."""
        return self.inner.decode(list(ids))

    def fingerprint(self) -> str:
        """Return a hash of the vocabulary."""
        vocabulary = json.dumps(sorted(self.inner.get_vocab().items()))
        return hashlib.sha256(vocabulary.encode()).hexdigest()


# %%
#| export core
def load_hub_model(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, HubTokenizer]:
    """Return (model, tokenizer) of a causal model of Hugging Face, by name or folder.

    Reads safetensors only and runs no code of the repository. Needs the extra `eval-hf`. Raises
    UserError when the package, the model or its safetensors file is not there.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UserError(
            "models of Hugging Face need the package transformers: pip install -e '.[eval-hf]'."
        ) from None
    safe = dict(use_safetensors=True, trust_remote_code=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(name, **safe)
    except (OSError, ValueError, KeyError, ImportError) as error:
        said = " ".join(str(error).split())[:160]
        raise UserError(
            f"there is no causal model with safetensors and a tokenizer at {name!r} ({said}); "
            f"check the name, the network, or give a folder."
        ) from None
    return model.to(device=device, dtype=dtype).eval(), HubTokenizer(tokenizer)


# %% [markdown]
r"""
### Results that survive

A full CORE is 91,037 items; on a small machine that takes hours. `run_core` writes the result of
each task as soon as it has it. Killed and started again, it goes on with the next task. How does
it know that the old results still count? It keeps, with each, a hash of the weights, of the
tokenizer and of the task itself. Results of other weights are refused: a mean of two models is
nobody's score.
"""


# %%
#| export core
def model_digest(model: Any) -> str:
    """Return a SHA-256 over all weights of a model; of ours, also how it computes with them."""
    how = f"{model.config} {model.compute_dtype}" if isinstance(model, GPT) else ""
    digest = hashlib.sha256(how.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def kept_result(path: Path, about: dict) -> dict | None:
    """Return the result kept at a path, None if there is none; UserError if of something else."""
    if not path.is_file():
        return None
    kept = read_json(path)
    other = [key for key in about if kept.get(key) != about[key]]
    if other:
        raise UserError(
            f"{path} belongs to another {' and '.join(other)}; choose another folder for these "
            f"results, or delete that one."
        )
    return kept["result"]


# %%
#| export core
def run_core(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    folder: str | Path,
    limit: int | None = None,
    world: Any = None,
    title: str = "CORE",
) -> dict:
    """Score tasks as `evaluate_core` does, keep each result in `folder` at once, and go on there.

    Writes `tasks/NAME.json`, and at the end core.json, core.md (a table) and core.png (a picture).
    With a `world` all processes share the items and the first one writes. Raises UserError when two
    tasks would share a file, or a file holds the result of something else.
    """
    folder, main = Path(folder), world is None or world.is_main
    paths = [folder / "tasks" / f"{name}.json" for name in file_names(tasks)]
    common = {"model": model_digest(model), "tokenizer": tokenizer.fingerprint(), "limit": limit}
    abouts = []
    for task in tasks:
        text = json.dumps(asdict(task), sort_keys=True)
        abouts.append({**common, "task": hashlib.sha256(text.encode()).hexdigest()})
    kept = [kept_result(path, about) for path, about in zip(paths, abouts)]
    if world is not None:  # only what every process can see counts as done
        seen = sum_over(world, torch.tensor([float(r is not None) for r in kept]).double())
        kept = [r if n == world.world_size else None for r, n in zip(kept, seen.tolist())]
    results = {}
    n_items = sum(len(task.items[:limit]) for task in tasks)
    with Progress(n_items, title, "item") if main else nullcontext() as bar:
        if main:
            bar.skip(sum(result["n"] for result in kept if result))
        for task, result, path, about in zip(tasks, kept, paths, abouts):
            if result is None:
                result = evaluate_task(model, tokenizer, task, limit, world=world, progress=bar)
                if main:
                    write_json(path, {**about, "result": result})
            results[task.name] = result
    summary = {**summarize(results), **common}
    if main:
        save_core(summary, folder, title)
    return summary


# %%
#| export core
def save_core(summary: dict, folder: Path, title: str) -> None:
    """Write a result of `run_core` as core.json, core.md and core.png."""
    import matplotlib.pyplot as plt

    write_json(folder / "core.json", summary)
    atomic_write(folder / "core.md", f"# {title}\n\n{core_table(summary)}\n")
    found = f"{title}: {summary['core']:.4f} ({summary['low']:.4f} to {summary['high']:.4f})"
    fig, _ = plot_core({"accuracy": summary}, title=found)
    fig.savefig(folder / "core.png")
    plt.close(fig)


# %% [markdown]
r"""
### The same for chats

A model that chats is asked in its own form, and chapter 9 builds the questions: exams answered by
a letter, sums and programs answered in full. Their mean is called ChatCORE: six tasks, each centred
on its own guessing (a quarter for the three with four choices, nothing for the others). One rule
belongs here, since it is about means: a mean over *some* of the tasks is another number. Published
values from before and after the spelling task differ by 0.14 for this reason alone.
"""


# %%
#| export core
CHAT_CORE = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spelling")


def chat_core(results: dict[str, dict]) -> dict:
    """Return ChatCORE with its interval, as `summarize` does, of the results of all six tasks.

    A result holds accuracy, chance, centered and n. Raises UserError when a task is missing.
    """
    missing = [name for name in CHAT_CORE if name not in results]
    if missing:
        raise UserError(
            f"ChatCORE is the mean of {len(CHAT_CORE)} tasks and {', '.join(missing)} did not run; "
            f"run them, or report the tasks one by one."
        )
    return summarize({k: {**results[k], "baseline": results[k]["chance"]} for k in CHAT_CORE})


# %% [markdown]
r"""
From the command line the same is

```
python -m nanochat eval --core                        # the bundle, fetched once; the last model
python -m nanochat eval --core path/to/folder --limit 500
python -m nanochat eval --core --hf openai-community/gpt2
torchrun --nproc_per_node=8 -m nanochat eval --core   # eight processes share the items
python -m nanochat eval --chat --samples 8            # ChatCORE, and pass@k of written replies
```

If a task is left out or cut to a limit, the number is of another exam and must not be compared with
a published one to the last digit. Cropped prompts make a slightly different exam, too: nanochat's
model reads a prompt that is longer than its window whole, where ours loses the beginning, as ten
shots of `squad` with their passages may. `cropped` in `core.json` counts such items of each task.
Two published lists differ in the baselines of three tasks
(`commonsense_qa`, `agi_eval_lsat_ar` and `bigbench_language_identification`), so they also give two
values of CORE for one model; `core.md` shows which were used.

Results are read in a table and in a picture. Both show the interval and the baseline.
"""


# %%
#| export
def core_table(result: dict) -> str:
    """Return a result of `evaluate_core` as a Markdown table, one row a task and the mean last."""
    lines = [
        "| task | kind | shots | items | accuracy | 95 % interval | guessing | centred |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in result["tasks"].items():
        lines.append(
            f"| {name} | {r['kind'].replace('_', ' ')} | {r['shots']} | {r['n']} "
            f"| {r['accuracy']:.3f} | {r['low']:.3f} to {r['high']:.3f} "
            f"| {r['baseline']:.3f} | {r['centered']:+.3f} |"
        )
    interval = f"{result['low']:+.3f} to {result['high']:+.3f}"
    lines.append(f"| **mean** | | | | | centred {interval} | | **{result['core']:+.3f}** |")
    return "\n".join(lines)


# %%
#| export
def plot_core(
    results: dict[str, dict], controls: dict[str, dict[str, float]] | None = None, title: str = ""
) -> tuple[Any, Any]:
    """Draw the accuracies of several results, {label: result}, with intervals and baselines.

    `controls` is {task name: {control: accuracy}}; the best control of a task is marked.
    """
    names = list(next(iter(results.values()))["tasks"])
    size = (7, 0.35 * len(names) + 1.3)
    fig, ax = figure(title or "Accuracy", "accuracy", "", size, alt=title or "Accuracy by task")
    for k, (label, result) in enumerate(results.items()):
        rows = [result["tasks"][name] for name in names]
        y = np.arange(len(names)) + 0.12 * (k - (len(results) - 1) / 2)
        x = np.array([r["accuracy"] for r in rows])
        spread = np.array([[r["accuracy"] - r["low"], r["high"] - r["accuracy"]] for r in rows])
        ax.errorbar(x, y, xerr=spread.clip(0).T, fmt="o", ms=4, color=COLORS[k], label=label)
    guess = [next(iter(results.values()))["tasks"][name]["baseline"] for name in names]
    ax.plot(guess, range(len(names)), "|", ms=14, color=COLORS[6], label="guessing")
    if controls:
        best = [max(controls.get(name, {"": math.nan}).values()) for name in names]
        ax.plot(best, range(len(names)), "x", ms=6, color=COLORS[3], label="best control")
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    ax.legend(fontsize=8, loc="lower right")
    return fig, ax


# %% [markdown]
r"""
## A CORE for the tiny world

Public benchmarks are too hard for a model that trains in seconds. So we build thirteen small tasks
of the same three kinds from the tiny world of appendix A1. Its exam asks for facts that stand in
the training text, in wordings that do not.

| task | kind | what it needs |
|---|---|---|
| people, places, things: questions | multiple choice, 3 shots | a fact, and the form of an answer |
| people, places, things: sentences | multiple choice | a fact, as the end of a sentence |
| letters | multiple choice | a fact, and its letter |
| he or she | multiple choice | whether a name is a woman's or a man's |
| endings | multiple choice | which last sentence belongs to a text |
| who fits | schema | of whom something is true |
| recall | language modelling | a fact, written without help |
| last word | language modelling | the last word of an unseen text |
| sums | language modelling | arithmetic, shown the expression |
"""


# %% [markdown]
r"""
Facts come first, each asked in two ways: as a question, and as a sentence to be ended. Every item's
id names its subject, which sorts the items into people, places and things.
"""


# %%
#| export
def topic(world: World, item: dict) -> str:
    """Return what an exam item is about: people, places or things (its id names the subject)."""
    _, relation, subject, _ = item["id"].split("/")
    if subject in world.people:
        return "people"
    places = ("market", "landmark", "festival", "north", "south", "east", "west", "road")
    return "places" if relation in places else "things"


# %%
#| export
def fact_tasks(world: World, n: int) -> list[Task]:
    """Return the tasks that ask for facts by likelihood, n items each at most."""
    tasks, asked = [], exam(world, "multiple_choice", seed=7)
    unfinished = exam(world, "cloze", seed=7)
    for name in ("people", "places", "things"):
        items = [
            {**item, "query": f"Question: {item['query']}"}
            for item in asked
            if topic(world, item) == name
        ]
        tasks.append(
            Task(f"{name}: questions", "multiple_choice", items[:n], 3, "\nAnswer: ", 0.25)
        )
        items = [item for item in unfinished if topic(world, item) == name]
        tasks.append(Task(f"{name}: sentences", "multiple_choice", items[:n], 0, " ", 0.25))
    letters = [
        {
            "query": choices_prompt(item["query"], item["choices"]),
            "choices": list("ABCD"),
            "gold": item["gold"],
        }
        for item in asked[-n:]
    ]
    return [*tasks, Task("letters", "multiple_choice", letters, 0, "\n", 0.25)]


# %% [markdown]
r"""
The schema task turns the question round: one ending, two beginnings, and only one of them makes the
ending true.
"""


# %%
#| export
def who_fits(world: World, n: int) -> Task:
    """Return the schema task: two subjects in one sentence, and an ending true of one of them."""
    items, rng = [], random.Random(7)
    for item in exam(world, "cloze", seed=8)[:n]:
        _, relation, subject, k = item["id"].split("/")
        others = [
            fact
            for fact in world.facts
            if fact.relation == relation and fact.object != item["answer"]
        ]
        other = world.wordings[rng.choice(others)].exam_stems[int(k)]
        gold = rng.randrange(2)
        contexts = [other, item["query"]] if gold else [item["query"], other]
        items.append({"context_options": contexts, "continuation": item["answer"], "gold": gold})
    return Task("who fits", "schema", items, 0, " ", 0.5)


# %% [markdown]
r"""
The other tasks need texts that were never trained on, cut into sentences.
"""


# %%
#| export
def unseen_texts(world: World, n: int) -> list[list[str]]:
    """Return n validation documents of one paragraph and four sentences or more, as sentences."""
    texts, index = [], 0
    while len(texts) < n:
        text = validation_document(world, index)
        index += 1
        sentences = text.replace(". ", ".\n").split("\n")
        plain = "\n" not in text and not any(c.isdigit() for c in text)
        if plain and len(sentences) >= 4 and sentences[-1][-2:-1].isalpha():
            texts.append(sentences)
    return texts


# %%
#| export
def text_tasks(world: World, n: int) -> list[Task]:
    """Return the tasks made from unseen text, people and sums, n items each at most."""
    rng, texts = random.Random(7), unseen_texts(world, n)
    endings, words = [], []
    for number, sentences in enumerate(texts):
        others = [t[-1] for i, t in enumerate(texts) if i != number and t[-1] != sentences[-1]]
        choices = [sentences[-1], *rng.sample(sorted(set(others)), 3)]
        rng.shuffle(choices)
        context = " ".join(sentences[:-1])
        gold = choices.index(sentences[-1])
        endings.append({"query": context, "choices": choices, "gold": gold})
        before, _, last = " ".join(sentences).rstrip(".!?").rpartition(" ")
        words.append({"context": before, "continuation": last})
    pronouns = [
        {"query": start.format(n=p.name, j=p.job), "choices": ["he", "she"], "gold": int(p.woman)}
        for start in ("{n} the {j} is tired. Then", "In the evening {n} goes home. Then")
        for p in world.people.values()
    ]
    rng.shuffle(pronouns)
    problems = [arithmetic_problem(world, i, "test") for i in range(n)]
    sums = [
        {
            "context": f"{p['question']} {spaced(p['parts'][0]['text'])} =",
            "continuation": p["answer"],
        }
        for p in problems
    ]
    return [
        Task("he or she", "multiple_choice", pronouns[:n], 0, " ", 0.5),
        Task("endings", "multiple_choice", endings, 0, " ", 0.25),
        Task("last word", "language_modeling", words),
        Task("sums", "language_modeling", sums),
    ]


# %%
#| export
def spaced(expression: str) -> str:
    """Write "3*7" as the training text does: "3 * 7"."""
    return "".join(f" {c} " if c in "+-*/" else c for c in expression)


def tinyworld_core(world: World, n: int = 200) -> list[Task]:
    """Return thirteen small tasks of the three kinds over the tiny world, n items each at most.

    Facts are asked in wordings that no training document uses; texts come from the validation
    split. The same world and n give the same items.
    """
    stems = exam(world, "cloze", seed=9)[:n]
    recall = [{"context": item["query"], "continuation": item["answer"]} for item in stems]
    return [
        *fact_tasks(world, n),
        who_fits(world, n),
        Task("recall", "language_modeling", recall),
        *text_tasks(world, n),
    ]


# %%
#| test
tasks = tinyworld_core(World(0), 40)
assert len(tasks) == 13 and {task.kind for task in tasks} == set(KINDS)
assert all(len(task.items) == 40 for task in tasks)
assert [t.items for t in tasks] == [t.items for t in tinyworld_core(World(0), 40)]

# %% [markdown]
r"""
Now the question from above, sum or mean, on more than one item. We score the unfinished sentences
both ways.
"""

# %%
by_name = {task.name: task for task in tinyworld_core(world, items_per_task)}
for name in ("people: sentences", "places: sentences", "things: sentences"):
    task, right = by_name[name], Counter()
    for index, item in enumerate(task.items):
        options = spans(task.kind, tokenizer.encode_batch(render(task, index), bos=True))
        means = np.array([loss for loss, _ in score_rows(model, options, tokenizer.bos_id)])
        sums = means * [row.end - row.start for row in options]
        right["mean"] += int(means.argmin() == item["gold"])
        right["sum"] += int(sums.argmin() == item["gold"])
    print(f"{name}: right by mean {right['mean']}, by sum {right['sum']} of {len(task.items)}")

# %% [markdown]
r"""
The two rules give two scores for one model, so a score is told with its rule. What about shots? We
ask the same questions about things with 0, 1, 2 and 4 solved examples in front.
"""

# %%
for shots in (0, 1, 2, 4):
    r = evaluate_task(model, tokenizer, replace(by_name["things: questions"], shots=shots))
    print(f"{shots} shots: {r['accuracy']:.2f}, 95 % interval {r['low']:.2f} to {r['high']:.2f}")

# %% [markdown]
r"""
The intervals overlap: this experiment has not shown that shots help *this* model. Learning from
examples in the prompt is an ability that comes with size.

## Signature result: before, after, and what else could explain it

Thirteen tasks, before and after training, with intervals, guessing, and the best control of each
task. One result counts as learned when its interval lies above guessing *and* above the best
control. (With thirteen tasks and 95 % intervals, up to one table in four shows a task that passed
by luck.)
"""

# %%
tasks = list(by_name.values())
before = evaluate_core(newborn, tokenizer, tasks)
after = evaluate_core(model, tokenizer, tasks)
beside = {task.name: controls(model, tokenizer, task) for task in tasks}
print(core_table(after))

# %%
learned = [
    name
    for name, r in after["tasks"].items()
    if r["low"] > max(r["baseline"], *beside[name].values())
]
plot_core(
    {"before training": before, "after training": after},
    beside,
    f"{len(learned)} of {len(tasks)} tasks lie above guessing and above every control",
)
plt.show()

# %%
print(
    f"mean centred score: {before['core']:+.3f} before, {after['core']:+.3f} after "
    f"(95 % interval {after['low']:+.3f} to {after['high']:+.3f})"
)
print(f"bits per byte: {bpb_before:.2f} before, {bpb_after:.2f} after")
print("learned, by the rule above:", ", ".join(learned))

# %%
name = max(learned, key=lambda name: after["tasks"][name]["centered"])
print(f"{name}: {after['tasks'][name]['accuracy']:.2f} and its controls")
for control, accuracy in beside[name].items():
    print(f"  {control.replace('_', ' '):17} {accuracy:.2f}")

# %%
assert after["core"] > max(before["core"], 0) and after["low"] > before["core"]
assert learned and bpb_after < 0.5 * bpb_before

# %% [markdown]
r"""
The bits per byte fell by more than half. Yet in most tasks about facts the model is hardly better
than guessing: it has learned how texts of this world *sound* before learning what they *say*, and
only a table like this one shows it.

## Has the exam leaked?

All controls above trust one thing: that the model has not seen the answers. A web-sized training
text holds copies of public exams, and a model may know them by heart. The usual check looks for
common *n-grams*: runs of n words, often 13, that stand in the exam and in the training text. Long
runs of words do not repeat by chance.

The training text is huge and the exam is small, so we turn the problem around. The exam's
words get random 64-bit codes; a word that no question has gets 0, and no run through a 0 can match.
A run of codes is hashed by one multiplication and addition a word, for a million positions at a
time, and looked up among the sorted hashes of the exam. The training text streams by, once.
"""


# %%
#| export core
WORD = re.compile(r"\w+")
SHORTEST = 5  # words; a text of fewer says nothing about where it comes from


def run_hashes(codes: np.ndarray, n: int) -> np.ndarray:
    """Hash each run of n codes (W,) uint64 into (W - n + 1,) uint64; 0 where the run holds a 0."""
    count = max(0, len(codes) - n + 1)
    hashes, known = np.zeros(count, np.uint64), np.ones(count, bool)
    for j in range(n):
        part = codes[j : j + count]
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + part  # modulo 2**64
        known &= part != 0
    return np.where(known, hashes, np.uint64(0))


def code_blocks(
    documents: Iterable[str], codes: dict[str, int], block: int
) -> Iterator[np.ndarray]:
    """Yield the codes of the documents' words, about `block` at a time, a 0 between documents."""
    words: list[int] = []
    for text in documents:
        words.append(0)
        words.extend(codes.get(word, 0) for word in WORD.findall(text.lower()))
        if len(words) >= block:
            yield np.array(words, np.uint64)
            words = []
    yield np.array(words, np.uint64)


# %%
#| export core
def contamination(
    texts: Sequence[str], documents: Iterable[str], n: int = 13, block: int = 1_000_000
) -> np.ndarray:
    """Return for each text the share of its runs of n words that some document holds, (texts,).

    Case, punctuation and spaces do not count. A text of fewer than n words is looked for as a
    whole; one of fewer than SHORTEST words gets NaN. Reads the documents once.
    """
    split = [WORD.findall(text.lower()) for text in texts]
    vocabulary = sorted({word for words in split for word in words})
    drawn = np.random.default_rng(0).integers(1, 2**64, len(vocabulary), np.uint64)
    codes = dict(zip(vocabulary, drawn.tolist()))
    lengths = [min(n, len(words)) for words in split]
    runs = [
        run_hashes(np.array([codes[word] for word in words], np.uint64), length)
        for words, length in zip(split, lengths)
    ]
    wanted = {
        length: np.unique(np.concatenate([r for r, m in zip(runs, lengths) if m == length]))
        for length in {m for m in lengths if m >= SHORTEST}
    }
    found = {length: np.zeros(len(hashes), bool) for length, hashes in wanted.items()}
    for part in code_blocks(documents, codes, block) if wanted else ():
        for length, hashes in wanted.items():
            seen = run_hashes(part, length)
            at = np.searchsorted(hashes, seen).clip(max=len(hashes) - 1)
            found[length][at[hashes[at] == seen]] = True
    return np.array(
        [
            found[m][np.searchsorted(wanted[m], r)].mean() if m in wanted else math.nan
            for r, m in zip(runs, lengths)
        ]
    )


# %%
#| test
poem = "one two three four five six seven eight"
shares = contamination([poem, poem + " nine", "six five four three two", "a b"], [poem.upper()], 5)
assert shares[:3].tolist() == [1.0, 0.8, 0.0] and math.isnan(shares[3])

# %% [markdown]
r"""
To see that it finds what it should, we plant a leak: every fifth question about people goes into
the training text, answer included, each in one document.
"""

# %%
task = replace(by_name["people: questions"], shots=0)
full = [completed(task, item) for item in task.items]
planted = list(range(0, len(full), 5))
texts = [document(world, i) for i in range(3000)]
leaky = list(texts)
for number in planted:
    leaky[17 * number] += "\n" + full[number]
start = time.perf_counter()
shares = contamination(full, leaky)
speed = sum(map(len, leaky)) / 1e6 / (time.perf_counter() - start)
flagged = np.flatnonzero(shares > 0.5).tolist()
print(f"{len(flagged)} of {len(full)} questions found, planted were {len(planted)}")
print(f"none in the clean text: {contamination(full, texts).max() == 0}; over 1 MB/s: {speed > 1}")
assert flagged == planted

# %% [markdown]
r"""
What does a leak do to a score? We train a copy of the model a little further: the usual batches,
with one row in eight made of the leaked lines. Then we ask the leaked questions and the others
apart.
"""

# %%
student = copy.deepcopy(model)
optimizer = build_optimizer(student)
line = tokenizer.encode("\n".join(full[number] for number in planted) + "\n")
stream = torch.tensor((line * 40)[: 40 * len(line)])
for step in range(120):
    at = step * 97 % (len(stream) - seq_len - 1)
    row = stream[at : at + seq_len + 1]
    x, y = batches.next()
    x, y = torch.cat((x[:-1], row[None, :-1])), torch.cat((y[:-1], row[None, 1:]))
    optimizer.set_schedule(0.3 * lr_multiplier(step, 120), muon_momentum(step))
    student(x, y).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

# %%
fresh = [item for number, item in enumerate(task.items) if number not in planted]
parts = {"leaked": [task.items[number] for number in planted], "others": fresh}
accuracy = {}
for who, patient in (("before", model), ("after", student)):
    for part, items in parts.items():
        r = evaluate_task(patient, tokenizer, replace(task, items=items))
        accuracy[who, part] = r["accuracy"]
        print(f"{who:6} {part}: {r['accuracy']:.2f}  ({r['low']:.2f} to {r['high']:.2f})")

# %%
gain = {part: accuracy["after", part] - accuracy["before", part] for part in parts}
assert gain["leaked"] > 0.3 and gain["leaked"] > gain["others"] + 0.2

# %% [markdown]
r"""
The leaked questions are answered from memory; the others, about the same people, are not better
known than before. Reporting the two apart is the honest way out when a leak cannot be undone. And
the scan has a limit worth knowing: it finds words, not meanings. An exam that was rephrased or
translated passes it unseen.

> **Exercise 7.3.** Exchange two neighbouring words in every planted line and scan again. How many
> are found with n = 13, how many with n = 5? What does a small n cost on the clean text?

## Play

Change `shots`, the delimiter or the `kind` of a task of your own and look at `render(task, 0)`.
Try a question whose answer the model cannot know, and see how confident its likelihoods are.
"""

# %%
mine = Task(
    "mine",
    "multiple_choice",
    [
        {"query": "A good baker", "choices": ["bakes bread.", "bakes shoes."], "gold": 0},
        {
            "query": "Every day the cook",
            "choices": ["cooks meals.", "cooks cats."],
            "gold": 0,
        },
    ],
    baseline=0.5,
)
for decision in score_task(model, tokenizer, mine):
    print(decision)
folder.cleanup()

# %% [markdown]
r"""
## Recap

`nanochat.evaluation` can now: measure `bits_per_byte`; describe a test as a `Task`, `render` its
prompts and find their `spans`; score it (`score_rows`, `score_task`, `evaluate_task`,
`evaluate_core`), each shared beginning once (`shared_groups`, `Prefix`); give `centered` accuracy
with a `bootstrap_interval`, and `compare` two models item by item; run `controls`
(`majority_class`, `longest_answer`, `shuffle_labels`, `remove_question`); build offline tasks
(`tinyworld_core`); and show a result (`core_table`, `plot_core`).

`nanochat.core` puts that to the public benchmark: `fetch_core` and `load_core` get the tasks,
`load_hub_model` a model of Hugging Face, `run_core` keeps results and goes on after a kill,
`chat_core` is the mean over chats, and `contamination` looks for an exam in a training text.

**Pitfalls** (all of them happened somewhere)
- A validation set that moves: "the last shard on disk" is another shard after the next download.
- Bits per byte with the wrong bytes: the decoded text of a token has 3 bytes for every broken
  character.
- Evaluation that depends on the batch size, because means are averaged.
- A scorer nobody checked. Our tests compare ours, item by item, with a slow one written from the
  rules.
- Results of an older checkpoint, found in the folder and quietly averaged with new ones.
- A test that repeats the training data: for weeks nanochat's spelling test drew the same words as
  its training set, because Python's generator treats the seeds `s` and `-s` alike.
- Choosing between two recipes by CORE of one run: its noise is larger than most improvements.

**Readings**
- Li et al. (2024), *DataComp-LM*: where CORE comes from.
- Brown et al. (2020), *Language Models are Few-Shot Learners*: prompting with shots, and why
  likelihoods are normalised.
- Holtzman et al. (2021), *Surface Form Competition*: why the likeliest answer is not always the
  best one.
- Zhao et al. (2021), *Calibrate Before Use*: order and labels of shots move the score.
- Miller (2024), *Adding Error Bars to Evals*.
"""
