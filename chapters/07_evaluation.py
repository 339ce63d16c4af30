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
2. score a question by likelihood, by hand and in batches, with the same answer;
3. build a few-shot prompt exactly as the CORE benchmark does;
4. put an error bar on a score and say how many items a claim needs;
5. run four controls beside a score, and read what they say.

Prerequisites: chapters 1 to 5. Reading: 25 minutes. Running: under 60 seconds on two CPU cores,
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
import gzip
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import COLORS, UserError, figure, read_json
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

An examination needs somebody to examine. We train a small GPT on the tiny world for about fifteen
seconds. The loop is the bare one of chapter 5. A copy of the model as it was at birth stays
beside it: every number below is shown before and after.
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

The loss is in nats per *token*, and a token is whatever our tokenizer says it is. A tokenizer
with more words in it makes fewer, harder predictions over the same text. To see how much that
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

# %% [markdown]
r"""
## Why the loss is not enough

Bits per byte is smooth, cheap and hard to fool. But it is an average over *all* tokens, and most
tokens are easy: the end of a word that has begun, the full stop, the little words between. What
we care about sits in few tokens. Here is one sentence of the validation text with the cost of
each token.
"""


# %%
def token_costs(model, text):
    """Return the pieces of a text and the bits each one costs."""
    ids = tokenizer.encode(text, bos=True)
    x = torch.tensor([ids])
    with torch.no_grad():
        bits = model(x[:, :-1], x[:, 1:], reduction="none")[0] / math.log(2)
    return [tokenizer.decode([i]) for i in ids[1:]], bits.tolist()


sentence = next(text for text in source.documents("val") if "\n" not in text)[:200].rsplit(" ", 1)[
    0
]
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
ax.bar(
    range(len(bits)),
    bits,
    color=[COLORS[1] if i in order[:half] else COLORS[0] for i in range(len(bits))],
)
ax.set_xticks(range(len(bits)), [p.replace("\n", "\\n") for p in pieces], rotation=90, fontsize=6)
plt.show()

# %% [markdown]
r"""
A model may lower its average by getting better at the blue bars alone, and know no more
about the world. So we also ask questions.

## One question, step by step

A base model does not answer questions; it continues text. But it can tell us how *likely* a text
is. So a multiple-choice question becomes several texts, one for each choice, and we look at which
one the model finds least surprising. Only the tokens that differ between the texts are scored;
the common beginning says nothing about the choice.
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
            missing = [name for name in KINDS[self.kind] if name not in item]
            options = item.get(OPTIONS.get(self.kind))
            if missing or (options is not None and not 0 <= item["gold"] < len(options)):
                problem = f"lacks {', '.join(missing)}" if missing else "has no choice number gold"
                raise UserError(f"task {self.name}: item {number} {problem}; mend its file.")


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
This is what the model really reads for one item with two shots. We print the text of the right
choice.
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
    """One text as tokens; the span ids[start:end] is what gets scored."""

    ids: list[int]
    start: int
    end: int


def common_length(texts: list[list[int]]) -> int:
    """Return how many leading tokens all texts share."""
    n = 0
    for column in zip(*texts):
        if len(set(column)) > 1:
            break
        n += 1
    return n


def spans(kind: str, texts: list[list[int]]) -> list[Row]:
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


def crop(row: Row, seq_len: int) -> Row:
    """Cut a row from the left so that seq_len tokens remain: the question is at the end."""
    cut = max(0, len(row.ids) - seq_len)
    return Row(row.ids[cut:], max(1, row.start - cut), row.end - cut)


# %%
#| test
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
The kept version puts many texts in one batch. Three things make it fast and keep it exact:

- rows are sorted by length, so a batch needs little padding;
- padding stands on the *right*, where causal attention cannot see it;
- the loss is computed for scored positions only: a 32,768-word softmax over the ten shots
  would be the most expensive part, and nobody would look at it.
"""


# %%
#| export
def length_batches(rows: list[Row], batch_tokens: int) -> Iterator[list[int]]:
    """Yield row numbers grouped by length, longest first, about `batch_tokens` a batch."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    while order:
        n = max(1, batch_tokens // len(rows[order[0]].ids))
        yield order[:n]
        order = order[n:]


@torch.no_grad()
def score_rows(
    model: Any, rows: list[Row], pad_id: int = 0, batch_tokens: int = 8192
) -> list[tuple[float, bool]]:
    """Return (mean loss in nats, greedy decoding would write it) of each row's span, in order.

    `model(ids)` gives logits (B, T, V), or an object that has them as `.logits`. Padding and
    batching change the losses by float rounding at most. Equal rows are scored once, so that they
    tie exactly.
    """
    device = next(model.parameters()).device
    keys = [(tuple(row.ids), row.start, row.end) for row in rows]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    owners = [first[key] for key in keys]
    kept = sorted(first.values())
    results: dict[int, tuple[float, bool]] = {}
    for batch in length_batches([rows[i] for i in kept], batch_tokens):
        numbers = [kept[i] for i in batch]
        longest = len(rows[numbers[0]].ids)
        ids = torch.full((len(numbers), longest), pad_id)
        scored = torch.zeros(len(numbers), longest - 1, dtype=torch.bool)
        for b, i in enumerate(numbers):
            ids[b, : len(rows[i].ids)] = torch.tensor(rows[i].ids)
            scored[b, rows[i].start - 1 : rows[i].end - 1] = True
        ids, scored = ids.to(device), scored.to(device)
        out = model(ids[:, :-1])  # (B, T, V)
        logits = getattr(out, "logits", out)[scored].float()  # (n, V), row after row
        target = ids[:, 1:][scored]  # (n,)
        losses = F.cross_entropy(logits, target, reduction="none").cpu().double()
        hits = (logits.argmax(-1) == target).cpu()
        lengths = [rows[i].end - rows[i].start for i in numbers]
        for i, loss, hit in zip(numbers, losses.split(lengths), hits.split(lengths)):
            results[i] = (loss.mean().item(), bool(hit.all()))
    return [results[i] for i in owners]


# %%
for batch_tokens in (1, 300, 100_000):
    batched = score_rows(model, rows, tokenizer.bos_id, batch_tokens)
    for row, (loss, hit) in zip(rows, batched):
        alone = score_one(model, row)
        assert abs(alone[0] - loss) < 1e-4 and alone[1] == hit

# %%
many = rows * 12
start = time.perf_counter()
for row in many:
    score_one(model, row)
middle = time.perf_counter()
score_rows(model, many, tokenizer.bos_id)
end = time.perf_counter()
print(f"batched scoring is faster here: {end - middle < middle - start} ({len(many)} texts)")

# %% [markdown]
r"""
On two cores the gain is modest, because a single short text already keeps them busy. On a GPU it is
large. What counts is the test above: same decisions either way.

A task is now a loop over its items. The choice with the lowest mean loss wins; on an exact tie,
the first. That rule explains the cold open: to a newborn model all choices are tied, so it always
picks the first, and its score is the share of items whose answer happens to stand there.
"""


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
    batch_tokens: int = 8192,
    chunk: int = 256,
) -> Iterator[dict]:
    """Yield one decision for each item: index, correct, choice, losses (one an option).

    The items are shuffled with `seed` and cut to `limit` before shots are drawn, as in nanochat.
    A process of rank r takes items r, r + world_size, ... `chunk` items are batched together.
    """
    items = list(task.items)
    random.Random(seed).shuffle(items)
    task = replace(task, items=items[:limit])
    seq_len = context_length(model)
    mine = range(rank, len(task.items), world_size)
    for first in range(0, len(mine), chunk):
        groups = []
        for index in mine[first : first + chunk]:
            texts = tokenizer.encode_batch(render(task, index), bos=True)
            groups.append([crop(row, seq_len) for row in spans(task.kind, texts)])
        rows = [row for group in groups for row in group]
        scores = iter(score_rows(model, rows, tokenizer.bos_id, batch_tokens))
        for index, group in zip(mine[first : first + chunk], groups):
            yield decide(task, index, [next(scores) for _ in group])


def decide(task: Task, index: int, scores: list[tuple[float, bool]]) -> dict:
    """Turn the scores of one item's rows into a decision."""
    losses = [loss for loss, _ in scores]
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
CORE has a task with 32 items and one with 100. Those two move by several points from one training
run to the next and pull the mean with them. It is why two runs of one recipe differ by about 0.01
in CORE (seven published runs of one nanochat recipe went from 0.2512 to 0.2677), and why nobody
should choose between two ideas by CORE of one run.

Now the two functions people will call: one task, and a list of tasks.
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
    batch_tokens: int = 8192,
) -> dict:
    """Return accuracy, centered, n, the accuracy's 95 % interval (low, high) and the baseline.

    With a `world`, its processes share the items and all get the same result.
    """
    n = len(task.items[:limit])
    correct = torch.zeros(n, dtype=torch.float64)
    rank, world_size = (0, 1) if world is None else (world.rank, world.world_size)
    for decision in score_task(model, tokenizer, task, limit, seed, rank, world_size, batch_tokens):
        correct[decision["index"]] = float(decision["correct"])
    if world is not None:
        correct = sum_over(world, correct)
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
    }


def evaluate_core(
    model: Any,
    tokenizer: Any,
    tasks: list[Task],
    limit: int | None = None,
    progress: Any = None,
    world: Any = None,
    done: dict[str, dict] | None = None,
    on_task: Callable[[str, dict], None] | None = None,
) -> dict:
    """Score a list of tasks: {"core", "low", "high", "n_tasks", "tasks": {name: result}}.

    `core` is the mean centred accuracy. `progress.update(1, task=..., centered=...)` is called
    after each task, and `on_task(name, result)`; `done` holds results to keep (a resumed run).
    """
    results: dict[str, dict] = {}
    for task in tasks:
        if done and task.name in done:
            results[task.name] = done[task.name]
        else:
            results[task.name] = evaluate_task(model, tokenizer, task, limit, world=world)
            if on_task is not None:
                on_task(task.name, results[task.name])
        if progress is not None:
            progress.update(1, task=task.name, centered=results[task.name]["centered"])
    return summarize(results)


def summarize(results: dict[str, dict], seed: int = 0, draws: int = 2000) -> dict:
    """Return the mean of the centred accuracies with its bootstrap interval, and the results."""
    if not results:
        raise UserError("no tasks to score; give evaluate_core at least one task.")
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
## CORE, from a folder

CORE is the mean centred score over 22 public tasks, chosen by the DCLM project (Li et al. 2024)
because small models already show progress on them. GPT-2 with 1.5 billion parameters scores
0.2565. The tasks come as one JSON-lines file each, with a list that names kind, shots, delimiter
and baseline. Two layouts of that folder are in use; we read both.
"""


# %%
#| export
def read_items(path: Path) -> list[dict]:
    """Read the items of a JSON-lines file, gzipped or not; UserError names a broken file."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; get the whole folder of tasks again.") from None
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); get the file again.") from None


def bundle_entries(folder: Path) -> list[dict]:
    """Read the task list of the DCLM bundle: core.yaml and eval_meta_data.csv."""
    import csv

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


def load_core(folder: str | Path) -> list[Task]:
    """Load the CORE tasks of a folder with manifest.json, or of the DCLM bundle (core.yaml).

    Baselines are percents in the files and shares in `Task`. A listed task without a file is
    left out; a missing or broken file raises UserError.
    """
    folder = Path(folder)
    if (folder / "manifest.json").is_file():
        entries = read_json(folder / "manifest.json")["tasks"]
    elif (folder / "core.yaml").is_file():
        entries = bundle_entries(folder)
    else:
        raise UserError(
            f"{folder} holds no CORE tasks: neither manifest.json nor core.yaml was found; "
            f"give the folder that holds one of them."
        )
    return [
        Task(
            entry["label"],
            entry["task_type"],
            read_items(folder / entry["file"]),
            entry["num_fewshot"],
            entry.get("continuation_delimiter", " "),
            entry["random_baseline"] / 100,
        )
        for entry in entries
        if entry.get("file")
    ]


# %% [markdown]
r"""
With the folder on disk, the whole benchmark is one line, on any model that gives logits:

```python
evaluate_core(model, tokenizer, load_core("path/to/core"), progress=Progress(22, "CORE", "task"))
```

If a task is left out, the mean is over other tasks and must not be compared with a published one
to the last digit.

Results are read in a table and in a picture. Both show the interval and the baseline, always.
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

Public benchmarks are too hard for a model that trains in seconds; it would score zero on all of
them before and after, and we would learn nothing. So we build thirteen small tasks of the same
three kinds from the tiny world of appendix A1. Its exam asks for facts that stand in the training
text, in wordings that do not.

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


# %%
#| export
def topic(world: World, item: dict) -> str:
    """Return what an exam item is about: people, places or things (its id names the subject)."""
    _, relation, subject, _ = item["id"].split("/")
    if subject in world.people:
        return "people"
    places = ("market", "landmark", "festival", "north", "south", "east", "west", "road")
    return "places" if relation in places else "things"


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
A score without its rule is half a number. One more experiment, on shots. We ask the same
questions about things with 0, 1, 2 and 4 solved examples in front. Everything else stays.
"""

# %%
for shots in (0, 1, 2, 4):
    r = evaluate_task(model, tokenizer, replace(by_name["things: questions"], shots=shots))
    print(f"{shots} shots: {r['accuracy']:.2f}, 95 % interval {r['low']:.2f} to {r['high']:.2f}")

# %% [markdown]
r"""
Read the intervals before the numbers. If they overlap, this experiment has not shown that shots
help *this* model. In large models they do, and strongly; learning from examples in the prompt is
an ability that comes with size.

## Signature result: before, after, and what else could explain it

Thirteen tasks, before and after training, with intervals, guessing, and the best control of each
task. One result counts as learned when its interval lies above guessing *and* above the best
control. (With thirteen tasks and 95 % intervals, about one table in three will show a task that
passed by luck. Remember that when somebody shows you the best of many.)
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
The loss fell by more than half. Yet in most tasks about facts the model is hardly better than
guessing: it has learned how texts of this world *sound* before learning what they *say*. Both are
true of one and the same model, and only the second can be seen in a table like this one. Chapter
12 trains longer, and the facts arrive.

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
`evaluate_core`) with `centered` accuracy and a `bootstrap_interval`; run `controls`
(`majority_class`, `longest_answer`, `shuffle_labels`, `remove_question`); load the public tasks
(`load_core`) and build offline ones (`tinyworld_core`); and show a result (`core_table`,
`plot_core`).

**Pitfalls** (all of them happened somewhere)
- A validation set that moves: "the last shard on disk" is another shard after the next download.
- Bits per byte with the wrong bytes: measuring the decoded text of a token gives 3 bytes for
  every broken character. Two figures computed in these two ways are not comparable.
- Evaluation that depends on the batch size, because means are averaged.
- Asking for fewer items than shots: nothing to draw from. Here the shots are clamped.
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
