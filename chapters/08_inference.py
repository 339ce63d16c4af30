# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# 8. Inference

By the end of this chapter we have made a model write several times faster without changing a
single token of what it writes, and let it use a calculator and run programs that cannot hurt us.

First the finished thing: an engine, a prompt, and tokens that arrive one by one. The model is
untrained, so it babbles. Everything around it already works.
"""

# %%
import nanochat.engine as finished
from nanochat.model import GPT, GPTConfig
from nanochat.tinyworld import World, arithmetic_problem, document
from nanochat.tokenizer import Tokenizer

world = World(0)
tokenizer = Tokenizer.train((document(world, i) for i in range(2000)), vocab_size=1024)
newborn = GPT(GPTConfig(tokenizer.vocab_size, 64, n_layer=2, n_head=2, n_kv_head=2, n_embd=64))
stream = finished.Engine(newborn, tokenizer).generate([tokenizer.bos_id], max_tokens=12, seed=1)
print([token.text for token in stream], stream.finish_reason)

# %% [markdown]
r"""
**You will be able to**
1. say from two numbers of a machine whether memory or arithmetic limits generation;
2. build a key-value cache and prove that it changes nothing but the time;
3. shape a distribution with temperature, top-k, top-p and min-p, and repeat any draw by its
   seed;
4. let requests of different lengths join and leave one batch, with the results of one by one;
5. let a model call a calculator, token by token, and refuse everything that is not arithmetic;
6. run a program you do not trust, and say which walls stood around it.

Prerequisites: chapters 1, 3 and 5. Reading: 40 minutes. Running: under 60 seconds on two CPU
cores, no network, under 1 GB. Times below are from such a machine; yours will differ.
"""

# %% tags=["parameters"]
profile = "quick"
seed = 0
n_layer, n_embd, seq_len = 4, 256, 512
train_steps, batch_size, train_len = 40, 8, 64
naive_tokens = 160
batch_sizes = (1, 2, 4, 8, 16, 32)

# %%
#| default_exp engine

# %%
import tempfile
import time

import matplotlib.pyplot as plt

from nanochat.common import COLORS, figure
from nanochat.data import TokenBatches, open_source, prepare_tokens
from nanochat.optim import build_optimizer, lr_multiplier, muon_momentum

# %% [markdown]
r"""
## A model to talk to

We train a small GPT on the tiny world for some seconds, with the bare loop of chapter 5. This
chapter is about *how* tokens come out, not about which, so a little training is enough.
"""

# %%
source = open_source("tinyworld", seed=seed)
folder = tempfile.TemporaryDirectory()
n_tokens = train_steps * batch_size * train_len
shards = prepare_tokens(source, tokenizer, folder.name, "train", n_tokens + train_len)
batches = TokenBatches(shards, batch_size, train_len, seed=seed)
config = GPTConfig(tokenizer.vocab_size, seq_len, n_layer, n_embd // 64, n_embd // 64, n_embd)
model = GPT(config)
optimizer = build_optimizer(model)
for step_number in range(train_steps):
    optimizer.set_schedule(lr_multiplier(step_number, train_steps), muon_momentum(step_number))
    loss = model(*batches.next())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
print(f"{model.num_params()['total']:,} parameters, loss {loss.item():.2f} nats per token")

# %% [markdown]
r"""
## Writing, the obvious way

A GPT gives the probabilities of the next token. To write, we take one, append it, and ask again.
The simplest program does exactly this, and reads the whole text again for every token.
"""

# %%
import torch


@torch.inference_mode()
def naive_generate(model, ids, n_new):
    """Greedy continuation of ids (list of int), and the seconds after each token."""
    ids, seconds, start = list(ids), [], time.perf_counter()
    for _ in range(n_new):
        logits = model(torch.tensor([ids]))  # (1, T, V): all positions, for the sake of the last
        ids.append(int(logits[0, -1].argmax()))
        seconds.append(time.perf_counter() - start)
    return ids, seconds


prompt = tokenizer.encode("Mira lives in", bos=True)
naive_ids, naive_seconds = naive_generate(model, prompt, naive_tokens)
print(tokenizer.decode(naive_ids[1:60]))
print(f"{naive_tokens} tokens in {naive_seconds[-1]:.2f} s")

# %% [markdown]
r"""
Token number $t$ costs a forward pass over $t$ positions, so $n$ tokens cost $1 + 2 + \dots + n
\approx n^2/2$ of them. Nearly all of that is work done before: the model is causal, position 5
cannot see position 6, so nothing about position 5 changes when the text grows.

## The key-value cache

What does a new token need from the old ones? Look through the layers of chapter 3. Embedding,
norms, projections and MLP work on each position alone. Only attention looks back, and of an old
position it reads two things: its key and its value. So we keep those, and nothing else.

The model of chapter 3 is ready for this. Its attention hands the new keys and values to an
object with three duties: `update` stores them and returns all of them, `length` says how many
there are, and `advance` counts on. Memory is taken once, for the longest text we allow, because
growing a tensor copies it.

$$\text{bytes per token} = 2 \cdot n_\text{layer} \cdot n_\text{kv\_head} \cdot d_\text{head}
\cdot \text{bytes per number}$$
"""

# %%
#| export engine
import copy
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanochat.common import UserError, synchronize
from nanochat.decode import decoder, pack_heads, power_of_two
from nanochat.model import GPT, GPTConfig, rms_norm
from nanochat.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer


# %%
#| export engine
class KVCache:
    """Keys and values of every token read so far, for all layers, in memory taken once.

    `keys` and `values` are (n_layer, B, n_kv_head, max_len, head_dim); the first `length` slots
    are filled. Rows of different lengths stand flush right: row b begins at slot `starts[b]`, and
    what lies before is padding that `mask` hides (see `prepare`).
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        starts: Sequence[int] | None = None,
    ):
        self.config, self.max_len, self.length = config, max_len, 0
        self.slots = [max_len] * config.n_layer
        shape = (config.n_layer, batch_size, config.n_kv_head, max_len, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.groups = {max_len: (list(range(config.n_layer)), self.keys, self.values)}
        padded = starts is not None and any(starts)
        self.starts = torch.tensor(starts, device=device) if padded else None  # (B,)
        self.positions: Tensor | None = None  # (B, T): the model's rotary positions
        self.mask: Tensor | None = None  # (B, 1, T, S): True where a query may look
        self.last: Tensor | None = None  # (B, 1, C): the last embedding, if the model smears

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, n_kv_head, T, head_dim) of one layer; return all S of them."""
        end = self.length + k.size(2)
        if end > self.max_len:
            raise ValueError(f"{end} tokens do not fit in a cache of {self.max_len}.")
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, n_new: int) -> None:
        """Count n_new slots as filled; the model calls this once, after its last layer."""
        self.length += n_new

    def prepare(self, n_new: int) -> None:
        """Set `positions` and `mask` for the next n_new tokens (None when no row is padded)."""
        self.positions, self.mask = padded_view(self.starts, self.length, n_new)

    def recent(self, slots: int, n: int) -> Tensor:
        """Return the slots of the last n tokens of a layer, oldest first, int64."""
        return torch.arange(self.length - n, self.length, device=self.keys.device)

    def begin_like(self, other: "KVCache", n: int, last: Tensor | None) -> None:
        """Copy the first n tokens of another cache into this empty one; `last` is as above."""
        self.keys[:, :, :, :n] = other.keys[:, :, :, :n]
        self.values[:, :, :, :n] = other.values[:, :, :, :n]
        self.length, self.last = n, last


# %% [markdown]
r"""
`prepare` is for rows of different lengths. They need positions that are counted from where each row
begins, and a mask that hides the padding before it. We come back to this when we write many rows at
once. There we also copy from cache to cache: `groups` and `recent` say what lies where, and with
`begin_like` a cache begins as a copy of another.
"""


# %%
#| export engine
def padded_view(
    starts: Tensor | None, length: int, n_new: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return positions (B, T) and mask (B, 1, T, S) of n_new slots after `length` filled ones.

    `starts` (B,) is the slot at which each row begins; None means that no row is padded, and gives
    (None, None). A padding slot sees itself alone: attention over nothing would be 0/0.
    """
    if starts is None:
        return None, None
    slots = torch.arange(length + n_new, device=starts.device)  # (S,)
    new = slots[length:, None]  # (T, 1)
    positions = (new.T - starts[:, None]).clamp(min=0)  # (B, T)
    visible = (slots <= new) & (slots >= starts[:, None, None])  # (B, T, S)
    return positions, (visible | (slots == new)).unsqueeze(1)


# %% [markdown]
r"""
Does the cache change anything? We feed a text whole, and in chunks; the logits must agree.
"""

# %%
#| test
_config = GPTConfig(50, 32, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
_model, _idx = GPT(_config), torch.arange(24).view(2, 12)
for _i, _param in enumerate(_model.parameters()):  # no zero weights: every path carries signal
    torch.nn.init.normal_(_param, std=0.3, generator=torch.Generator().manual_seed(_i))
for _chunks in ([12], [1] * 12, [5, 1, 6]):
    _cache = KVCache(_config, batch_size=2, max_len=12)
    with torch.no_grad():
        _parts = [_model(_piece, kv_cache=_cache) for _piece in _idx.split(_chunks, dim=1)]
        assert torch.allclose(torch.cat(_parts, 1), _model(_idx), atol=1e-5)

# %% [markdown]
r"""
Now the same greedy writer with a cache. The first pass reads the whole prompt (*prefill*); each
later pass feeds one token (*decode*). `last_only` saves the logits that nobody asked for.
"""


# %%
@torch.inference_mode()
def cached_generate(model, ids, n_new):
    """The same continuation as naive_generate, with a cache."""
    cache = KVCache(model.config, 1, len(ids) + n_new)
    ids, new, seconds, start = list(ids), list(ids), [], time.perf_counter()
    for _ in range(n_new):
        logits = model(torch.tensor([new]), kv_cache=cache, last_only=True)  # (1, 1, V)
        new = [int(logits[0, -1].argmax())]
        ids += new
        seconds.append(time.perf_counter() - start)
    return ids, seconds


cached_ids, cached_seconds = cached_generate(model, prompt, naive_tokens)
assert cached_ids == naive_ids
print(f"{naive_tokens} tokens in {cached_seconds[-1]:.2f} s, the same tokens")

# %%
fig, ax = figure(
    "Without a cache the time grows quadratically",
    "tokens written", "seconds since the start",
    alt="Seconds over tokens written: a parabola for naive generation, a line with a cache.",
)  # fmt: skip
ax.plot(naive_seconds, label="the whole text again", color=COLORS[1])
ax.plot(cached_seconds, label="key-value cache", color=COLORS[0])
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
r"""
## What limits the cached writer

With the cache, one token needs two floating-point operations per weight, a multiplication and an
addition. But it also needs the weight itself, fetched from memory: four bytes of it (two in
bfloat16). The ratio of operations to bytes is the **arithmetic intensity**, here 0.5 to 1. A
machine has such a ratio too: what it can compute in a second over what it can fetch. When ours
is below the machine's, memory decides the speed and the arithmetic units wait. This picture of
two ceilings is the *roofline*.

$$t_\text{step} \ge \max\left(\frac{\text{bytes}}{\text{bandwidth}},
\frac{\text{operations}}{\text{peak}}\right), \quad
\text{bytes} = \underbrace{b\,P}_\text{weights} + B \cdot
\underbrace{2 b\,L\,d_\text{kv}\,T}_\text{cache}, \quad
\text{operations} = B\,(2P + 4 L\,d\,T)$$

$P$ counts the weights that multiply (embeddings are only looked up), $b$ the bytes of a number,
$B$ the rows of the batch, $T$ the tokens in the cache, $L$ the layers, $d$ the width of the model
and $d_\text{kv}$ that of its keys. The weights are fetched once for all rows: that is why batches
pay. We measure the two ceilings of this machine and put a large model on a large GPU beside it.
"""


# %%
def best_seconds(work, repeats=5):
    """The fastest of several runs; the slower ones were disturbed."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


big, square = torch.ones(16_000_000), torch.ones(768, 768)
bandwidth = big.numel() * 4 / best_seconds(lambda: big.sum())  # bytes read per second
peak = 2 * 768**3 / best_seconds(lambda: square @ square)  # operations per second
print(f"this machine: {bandwidth / 1e9:.0f} GB/s, {peak / 1e9:.0f} GFLOP/s, "
      f"{peak / bandwidth:.0f} operations per byte")  # fmt: skip


# %%
def step_floor(config, batch, context, machine, itemsize):
    """Least seconds for one decoding step (B rows), from bandwidth and from arithmetic."""
    weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    kv = 2 * config.n_layer * config.n_kv_head * config.head_dim * context
    operations = batch * (2 * weights + 4 * config.n_layer * config.n_embd * context)
    return itemsize * (weights + batch * kv) / machine[0], operations / machine[1]


d24 = GPTConfig.for_depth(24, vocab_size=32768, seq_len=2048)
places = {
    "our model, this machine": (config, 100, (bandwidth, peak), 4),
    "d24, one H100": (d24, 1024, (3.35e12, 989e12), 2),  # NVIDIA's data sheet, SXM, dense bf16
}
print(f"{'':24} {'batch':>5} {'memory':>10} {'arithmetic':>10} {'tokens/s at most':>17}")
for name, (size, context, machine, itemsize) in places.items():
    for batch in (1, 8, 64, 512):
        memory, compute = step_floor(size, batch, context, machine, itemsize)
        print(f"{name:24} {batch:5} {memory * 1e3:7.2f} ms {compute * 1e3:7.2f} ms "
              f"{batch / max(memory, compute):17,.0f}")  # fmt: skip

# %% [markdown]
r"""
For one reader, a d24 on an H100 cannot write more than about two thousand tokens a second, and its
arithmetic units are busy for less than a hundredth of that time. Eight readers cost less than twice
as much as one. Then the cache takes over: from 64 rows of 1,024 tokens on, most of the bytes are
keys and values, not weights, and larger batches gain little. That is the case for fewer key-value
heads (grouped queries) and for windows.

Our small model is far from its own floor when it writes alone: most of a token's time goes into
Python, which says what is to be done. On a GPU that is the first thing to remove.

*Try it:* set the context to 2,048 and the key-value heads of `d24` to 2, and watch batch 512.

## Choosing the next token

Greedy writing takes the likeliest token. It is repeatable and, for a small model, soon walks in
circles. The other way is to draw from the distribution, which is sometimes silly: a thousand tokens
that are each nearly impossible are together not so unlikely. Four knobs move between the two.

- **temperature** $\tau$: $p_i \propto e^{z_i / \tau}$. Below 1 sharpens, above 1 flattens, 0 is
  greedy.
- **top-k**: only the $k$ likeliest may be drawn.
- **top-p** (nucleus): only the fewest tokens that together hold probability $p$. The number
  adapts to how sure the model is.
- **min-p**: only tokens at least $p$ times as likely as the likeliest.

A fifth knob is against circles: **frequency penalty** $f$ takes $f$ times the number of its
appearances so far from a token's logit.
"""


# %%
#| export engine
@dataclass(frozen=True)
class Sampling:
    """The knobs of sampling. temperature 0 is greedy; top_k None or 0, top_p 1, min_p 0 are off."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values outside their ranges, with the value in the sentence."""
        wrong = None
        if self.temperature != 0 and not 1e-6 <= self.temperature < math.inf:
            wrong = f"temperature is {self.temperature}; use 0 (greedy) or a number from 1e-6 on"
        elif self.top_k is not None and self.top_k < 0:
            wrong = f"top_k is {self.top_k}; use a positive whole number, or None for no limit"
        elif self.top_p is not None and not 0 < self.top_p <= 1:
            wrong = f"top_p is {self.top_p}; use a number above 0 and at most 1"
        elif self.min_p is not None and not 0 <= self.min_p <= 1:
            wrong = f"min_p is {self.min_p}; use a number from 0 to 1"
        elif not -100 <= self.frequency_penalty <= 100:
            wrong = (
                f"frequency_penalty is {self.frequency_penalty}; use a number near 0, such as 0.5"
            )
        if wrong:
            raise UserError(wrong + ".")

    @property
    def effort(self) -> int:
        """0: take the likeliest, 1: draw, 2: filter (which needs a sort) and draw."""
        filters = self.top_k or self.min_p or (self.top_p or 1) < 1
        return 0 if self.temperature == 0 else 2 if filters else 1

    def numbers(self) -> list[float]:
        """Return the five knobs; one that is off has a value that changes nothing."""
        top_p = 2.0 if self.top_p in (None, 1) else self.top_p
        cut = [self.top_k or math.inf, top_p, self.min_p or 0.0]
        return [self.temperature, *cut, self.frequency_penalty]


# %% [markdown]
r"""
A batch may hold rows with different knobs. So the knobs of all rows come as one tensor, and all
filters work on one sorted copy of the probabilities.
"""


# %%
#| export engine
def row_probabilities(logits: Tensor, knobs: Tensor, filters: bool) -> Tensor:
    """Turn logits (B, V) into weights (B, V) to draw from, by knobs (B, 5) as in `numbers`.

    In this order: divide by the temperature, keep the top_k largest, keep the fewest tokens that
    hold top_p of what is left (Holtzman et al. 2019), drop those below min_p times the largest.
    Weights need not sum to one. Without `filters` only the temperature counts.
    """
    temperature, top_k, top_p, min_p, _ = knobs[:, :, None].unbind(1)  # (B, 1) each
    p = (logits / (temperature + (temperature == 0))).softmax(dim=-1)
    if not filters:
        return p
    ordered, where = p.sort(dim=-1, descending=True)
    ordered = ordered * (torch.arange(p.size(-1), device=p.device) < top_k)
    before = ordered.cumsum(dim=-1) - ordered  # the mass of the likelier tokens
    keep = (before < top_p * ordered.sum(dim=-1, keepdim=True)) & (
        ordered >= min_p * ordered[:, :1]
    )
    return torch.zeros_like(p).scatter(-1, where, ordered * keep)


def next_token_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Turn logits (..., V) into the float32 probabilities (..., V) from which we draw."""
    if sampling.temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, best, 1.0)
    rows = logits.reshape(-1, logits.size(-1))
    knobs = torch.tensor([sampling.numbers()], device=logits.device).expand(len(rows), -1)
    p = row_probabilities(rows, knobs, filters=True)
    return (p / p.sum(dim=-1, keepdim=True)).view_as(logits)


# %% [markdown]
r"""
Here they are on one real distribution: what our model expects after a few words.
"""

# %%
with torch.no_grad():
    logits = model(torch.tensor([prompt]), last_only=True)[0, -1]  # (V,)
order = logits.argsort(descending=True)[:20]
panels = [("temperature 1", {}), ("temperature 0.5", {"temperature": 0.5}),
          ("temperature 2", {"temperature": 2.0}), ("top-k 5", {"top_k": 5}),
          ("top-p 0.5", {"top_p": 0.5}), ("min-p 0.2", {"min_p": 0.2})]  # fmt: skip
fig, axes = plt.subplots(2, 3, figsize=(8, 4), sharey=True, layout="constrained", dpi=110)
for ax, (title, knobs), color in zip(axes.flat, panels, COLORS):
    p = next_token_probabilities(logits, Sampling(**knobs))
    ax.bar(range(len(order)), p[order], color=color)
    ax.set_title(f"{title}: {int((p > 0).sum())} tokens left", fontsize=9, loc="left")
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
fig.supxlabel("the 20 likeliest tokens, in order", fontsize=9)
fig.supylabel("probability", fontsize=9)
fig.set_label("Six bar charts of one distribution under six settings of the sampling knobs.")
plt.show()

# %% [markdown]
r"""
Temperature keeps every token alive and moves mass; the other three cut the tail off.

To draw, we stand the probabilities on one another like the rungs of a ladder from 0 to 1, and
throw one uniform number: the rung it hits is the token. One number per row and token has a
pleasant consequence. If each row brings its own numbers, made from its own seed, then what a row
draws does not depend on who shares the batch with it.
"""


# %%
#| export engine
def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw one id per row: the first whose cumulative probability exceeds uniform (B,) in [0, 1).

    probabilities float (B, V), need not sum to one; returns int64 (B,). One number decides one
    row, so a row's draw depends on no other row.
    """
    ladder = probabilities.double().cumsum(dim=-1)  # (B, V)
    target = uniform.double()[:, None] * ladder[:, -1:]
    last = probabilities.size(-1) - 1
    return torch.searchsorted(ladder, target, right=True).squeeze(-1).clamp(max=last)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """Choose the next id of each row from logits (B, V); returns int64 (B,).

    Randomness comes from `uniform` (B,) when given, else from the generator. UserError for a knob
    out of its range.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    if uniform is None:
        device = generator.device if generator is not None else logits.device
        kind = torch.float64 if device.type != "mps" else torch.float32
        uniform = torch.rand(len(logits), generator=generator, device=device, dtype=kind)
    probabilities = next_token_probabilities(logits, Sampling(temperature, top_k, top_p, min_p))
    return draw(probabilities, uniform.to(logits.device))


# %%
#| test
_p = torch.tensor([0.5, 0.0, 0.3, 0.2])
_drawn = [int(draw(_p[None], torch.tensor([u]))) for u in (0.0, 0.49, 0.5, 0.79, 0.99)]
assert _drawn == [0, 0, 2, 2, 3]
_ids = sample(_p.log().expand(5000, 4), generator=torch.Generator().manual_seed(0))
assert torch.allclose(_ids.bincount(minlength=4) / 5000, _p, atol=0.03)
assert int(sample(_p.log()[None], temperature=0)) == 0
_sharp = next_token_probabilities(_p.log(), Sampling(temperature=0.5))
assert torch.allclose(_sharp, _p**2 / (_p**2).sum())

# %% [markdown]
r"""
## A calculator that cannot be talked into anything

Small models are bad at sums and good at noticing that one is due. So we give them a tool.
Between the special tokens `python_start` and `python_end` the model writes an expression. We
compute it and *force* the next tokens: `output_start`, the result, `output_end`. The model reads
the result as if it had written it, and goes on.

The text comes from a model that anybody may talk to, so Python's `eval` is out of the question:
filters in front of it have always been broken. We parse the text into a syntax tree instead and
compute the few kinds of node we know. `2*(3+4)` becomes

```
    Mult
    ├── 2
    └── Add
        ├── 3
        └── 4
```

What is not on the list of kinds has no meaning, hence no danger. Danger of the second kind is size:
`9**9**9` is short and would run until the memory is full. So lengths, depths, exponents and values
have limits, checked *before* the work.
"""

# %%
#| export calculator
import ast
import math
import re
from decimal import Decimal

from nanochat.tokenizer import Tokenizer

MAX_LENGTH, MAX_DEPTH, MAX_VALUE, MAX_EXPONENT = 500, 50, 1e30, 100
OPERATORS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.Pow: lambda a, b: power(a, b),
    ast.UAdd: lambda a: a,
    ast.USub: lambda a: -a,
}


def power(base: float, exponent: float) -> float:
    """Return base ** exponent; ValueError before the work when the result would be too large."""
    if abs(exponent) > MAX_EXPONENT or (base and exponent * math.log10(abs(base)) > 30):
        raise ValueError("the power is too large")
    return base**exponent


# %% [markdown]
r"""
One thing beside arithmetic is allowed, because counting letters is where tokens fail a model:
`"strawberry".count("r")`. `evaluate` walks the tree from the leaves to the root.
"""


# %%
#| export calculator
def count_call(node: ast.AST) -> int:
    """Compute `"text".count("t")`, the one call there is; ValueError for any other node."""
    match node:
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(text)), attr="count"),
            args=[ast.Constant(value=str(part))],
            keywords=[],
        ):
            return text.count(part)
    raise ValueError(f"{type(node).__name__} is not allowed")


def evaluate(node: ast.AST, depth: int = 0) -> int | float:
    """Compute a syntax tree of allowed nodes; ValueError for any other node or size."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = evaluate(node.left, depth + 1), evaluate(node.right, depth + 1)
        value = OPERATORS[type(node.op)](left, right)
    elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](evaluate(node.operand, depth + 1))
    else:
        value = count_call(node)
    if isinstance(value, complex) or not abs(value) <= MAX_VALUE:  # `not <=` is true for NaN
        raise ValueError("the number is too large")
    return value


# %% [markdown]
r"""
`calculate` takes thousands commas out of the numbers, but not out of quoted text, lets no letters
near the parser, and turns every refusal into `None`.
"""


# %%
#| export calculator
QUOTED = re.compile(r"""("[^"\\\n]*"|'[^'\\\n]*')""")
THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?![\d,])")


def format_number(value: int | float) -> str:
    """Write a number as the training data do: 12 not 12.0, 0.3 not 0.30000000000000004."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        return str(value)
    return format(Decimal(f"{value:.12g}"), "f")


def calculate(expression: str) -> str | None:
    """Return the value of a short expression as text, or None for whatever is not one.

    Allowed: + - * / // % **, parentheses, decimal numbers (with thousands commas) and
    `"text".count("t")`. Nothing is ever executed: the text is parsed, and the tree is computed
    node by node with limits on length, depth, size and exponents.
    """
    if len(expression) > MAX_LENGTH:
        return None
    pieces = QUOTED.split(expression.strip())  # plain, quoted, plain, quoted, ..., plain
    for i in range(0, len(pieces), 2):
        plain = pieces[i] = THOUSANDS.sub(lambda m: m[0].replace(",", ""), pieces[i])
        if not re.fullmatch(r"[0-9.+\-*/%() ]*", plain.replace(".count", "")):
            return None
        if plain.count("(") > MAX_DEPTH:
            return None
    try:
        tree = ast.parse("".join(pieces), mode="eval")
        return format_number(evaluate(tree.body))
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return None


# %%
for expression in ("7/2", "0.1+0.2", "12/4", "1,234 * 2", "2**10", '"a, b, c".count(",")',
                   "9**9**9", "__import__('os')", "'a' * 10**9", "50%", "1/0"):  # fmt: skip
    print(f"{expression:24} -> {calculate(expression)}")

# %% [markdown]
r"""
Results look as they do in the training data: 3.5, and 0.3 rather than 0.30000000000000004. After a
refusal no output is forced, and the model has to cope.

The model writes its call one token at a time. So something must watch the tokens go by, collect
what stands between the two signs, and say what is to be forced after the second one.
"""


# %%
#| export calculator
class ToolCalls:
    """Watches the ids that a model chooses, and answers its calls of the calculator."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.start, self.end = map(tokenizer.special, ("python_start", "python_end"))
        self.expression: list[int] | None = None  # ids since python_start; None outside of a call

    def push(self, id: int) -> list[int]:
        """Take one id; return the ids to force next: none unless it closes a call with a value."""
        if id == self.start:
            self.expression = []
        elif self.expression is None:
            return []
        elif id == self.end:
            value = calculate(self.tokenizer.decode(self.expression))
            self.expression = None
            if value is not None:
                output, special = self.tokenizer.encode(value), self.tokenizer.special
                return [special("output_start"), *output, special("output_end")]
        else:
            self.expression.append(id)
        return []


# %%
#| test
_tokenizer = Tokenizer.train(["12 + 30 = 42"], 270)
_calls, _special = ToolCalls(_tokenizer), _tokenizer.special
for _text, _value in (("12+30", "42"), ("1/0", None)):
    _call = [_special("python_start"), *_tokenizer.encode(_text), _special("python_end")]
    *_before, _forced = [_calls.push(_id) for _id in [7, *_call]]
    assert not any(_before) and _tokenizer.decode(_forced[1:-1]) == (_value or "")

# %% [markdown]
r"""
## One request on its way

An answer is made of tokens for those who stream, a completion for those who wait, and a transcript
that tells text from tool talk. A token may be half of a character, so pieces of text come from the
stream decoder of chapter 1, which holds back bytes until they make a character.
"""


# %%
#| export engine
@dataclass
class Token:
    """One generated token. `text` is whole characters; `kind` is text, python, output, special."""

    id: int
    text: str
    logprob: float
    forced: bool = False
    kind: str = "text"


@dataclass
class Completion:
    """All that one prompt led to. `mask` is 1 where the model chose the token, 0 where a tool did.

    `ids` ends with the token that stopped it, if one did. `text` is the reply outside of tool calls
    and outputs. `logprobs` are under the model's own distribution, at temperature 1 and unfiltered.
    """

    ids: list[int]
    mask: list[int]
    text: str
    logprobs: list[float]
    finish_reason: str = "length"  # or "stop", "cancelled"


# %%
#| export engine
class Transcript:
    """Reads ids one by one and tells, for each, its kind and the text it completes."""

    INSIDE = {"python_start": "python", "output_start": "output"}

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.kind = tokenizer, "text"
        self.decoder = StreamDecoder(tokenizer)
        self.special = {tokenizer.special(n): n.strip("<|>") for n in SPECIAL_TOKENS}

    def push(self, id: int) -> tuple[str, str]:
        """Return (kind, text) of one id; bytes that never become a character are dropped."""
        name = self.special.get(id)
        if name is None:
            return self.kind, self.decoder.push(id)
        self.kind = self.INSIDE.get(name, "text")
        self.decoder.flush()
        return "special", ""


# %% [markdown]
r"""
A `Row` is one request, with all that makes it differ from others: its knobs, random numbers, budget
and stop button. It decides, after each token, what follows from it: a stop token ends the row, a
closed tool call fills the queue of forced tokens, the last token of the budget ends it too. The
mask remembers which tokens the model chose (1) and which were forced on it (0); reinforcement
learning must praise and blame the model for the first kind only.
"""


# %%
#| export engine
class Row:
    """One request on its way: its tokens, its own random numbers, and its calls of the tool."""

    def __init__(
        self,
        prompt: Sequence[int],
        budget: int,
        tokenizer: Tokenizer,
        sampling: Sampling,
        seed: int = 0,
        stop: threading.Event | None = None,
        tools: bool = True,
    ):
        self.prompt, self.budget, self.tokenizer = list(prompt), budget, tokenizer
        self.sampling, self.effort, self.stop = sampling, sampling.effort, stop
        self.calls = ToolCalls(tokenizer) if tools else None
        self.ids, self.mask, self.logprobs = [], [], []
        self.queue: deque[int] = deque()  # tokens that must come next, whatever the model wants
        self.stop_ids = {tokenizer.special("assistant_end"), tokenizer.special("bos")}
        self.finish_reason: str | None = None if budget else "length"
        self.error: Exception | None = None
        generator = torch.Generator().manual_seed(seed % 2**64)
        self.uniforms = torch.rand(max(budget, 1), generator=generator, dtype=torch.float64)

    @property
    def n_read(self) -> int:
        """Tokens that the model has read: all but the one chosen last."""
        return len(self.prompt) + len(self.ids) - 1

    def ended(self) -> bool:
        """Return whether the row goes no further, after a look at its stop button."""
        if self.stop is not None and self.stop.is_set():
            self.finish_reason = self.finish_reason or "cancelled"
        return self.finish_reason is not None

    def take(self, id: int, logprob: float) -> None:
        """Append the next token and decide what follows from it; UserError for a logprob of NaN."""
        forced = bool(self.queue)
        if forced:
            self.queue.popleft()
        elif math.isnan(logprob):
            raise UserError("the model's output is not a number (NaN); load an earlier checkpoint.")
        self.mask.append(int(not forced))
        self.logprobs.append(logprob)
        self.ids.append(id)  # last: another thread that sees the id finds the rest
        if not forced and id in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.budget:
            self.finish_reason = "length"
        elif self.calls and not forced:
            self.queue.extend(self.calls.push(id))

    def completion(self) -> Completion:
        """Return what the row has become."""
        transcript = Transcript(self.tokenizer)
        pieces = [transcript.push(id) for id in self.ids]
        text = "".join(piece for kind, piece in pieces if kind == "text")
        return Completion(self.ids, self.mask, text, self.logprobs, self.finish_reason or "length")


# %% [markdown]
r"""
## Many rows at once

A step for sixteen rows fetches the weights once, as a step for one row does. Reading prompts
together is easy: we push them to the right, so that all rows end in the same slot. The slots
before a short prompt hold padding. Rotary positions are counted from where the row really begins,
and a mask hides the padding: `padded_view` above. A padding slot may see itself, since a softmax
over nothing is 0/0, and a NaN in the cache would spread.

Writing together is harder, because requests do not come and end together. We want rows to **join
and leave between two steps** (*continuous batching*; Yu et al. 2022), each with its own length, and
no memory to move.

The trick is a clock. All rows write into the same slot, the clock modulo the number of slots: there
the hand stands. A row of length $n$ is always *the last $n$ slots before the hand*. So a row that
joins is copied to the $n$ slots before the hand; a row that leaves is simply forgotten; and a slot
is visible to a row if its *age*, the steps since it was written, is not more than the row's length.

```
slots      0   1   2   3   4   5   6   7        the hand is at 2: age of slot 1 is 1,
row A      a6  a7  ^   a1  a2  a3  a4  a5       of slot 7 it is 3, of slot 3 it is 7
row B      b1  b2  ^   .   .   .   .   .        B has joined with two tokens
```

A ring pays twice. A layer with a window (chapter 3, section 9) never looks further back than
`window` tokens: its ring has `window + 1` slots, and the old tokens fall out by themselves.
"""


# %%
#| export engine
class RingCache:
    """Keys and values of rows that decode together, one token a step, in memory that never moves.

    All rows write into slot `clock % slots`; row b is the last `lengths[b]` slots before it. Layers
    have `size` slots, those with a window at most window + 1. Clock and lengths are tensors, so
    that a step needs nothing from Python. `groups` holds layers with the same number of slots in
    one piece: by that number their layers, keys and values (layers, B, n_kv_head, slots, head_dim).
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.config, self.size, self.length = config, size, 0
        self.slots = [size if w is None else min(size, w + 1) for w in config.window_sizes()]
        self.keys, self.values, self.groups = [None] * config.n_layer, [None] * config.n_layer, {}
        for n in set(self.slots):
            layers = [i for i, slots in enumerate(self.slots) if slots == n]
            shape = (2, len(layers), batch_size, config.n_kv_head, n, config.head_dim)
            keys, values = torch.zeros(shape, device=device, dtype=dtype)
            self.groups[n] = layers, keys, values
            for i, k, v in zip(layers, keys, values):
                self.keys[i], self.values[i] = k, v
        self.clock = torch.zeros(1, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.last = self.before = None
        if config.smear:
            self.before = torch.zeros(batch_size, 1, config.n_embd, device=device, dtype=dtype)
            self.last = self.before
        self.positions: Tensor | None = None  # (B, 1)
        self.mask: Tensor | None = None  # (B, 1, 1, slots) of the layer that has just updated

    def prepare(self) -> None:
        """Work out where the next token of each row goes and what it may see."""
        self.positions = self.lengths[:, None].clamp(max=self.config.seq_len - 1)
        self.hand, self.masks = {}, {}
        for n in set(self.slots):
            age = (self.clock - torch.arange(n, device=self.clock.device)) % n  # (slots,)
            self.hand[n] = self.clock % n
            self.masks[n] = (age <= self.lengths[:, None])[:, None, None]  # (B, 1, 1, slots)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, n_kv_head, 1, head_dim) of one layer; return all slots of it."""
        n = self.slots[layer]
        self.mask = self.masks[n]
        self.keys[layer].index_copy_(2, self.hand[n], k)
        self.values[layer].index_copy_(2, self.hand[n], v)
        return self.keys[layer], self.values[layer]

    def advance(self, n_new: int) -> None:
        """Let the clock tick; the model calls this once, after its last layer."""
        self.clock += 1
        self.lengths += 1
        if self.before is not None:
            self.before.copy_(self.last)
            self.last = self.before

    def recent(self, slots: int, n: int) -> Tensor:
        """Return the slots of the last n tokens of a layer with so many slots, oldest first."""
        return (self.clock + torch.arange(-n, 0, device=self.clock.device)) % slots


# %% [markdown]
r"""
Two more moves. Rows come in together, from a `KVCache`, where their prompts were read, or from
another ring, and layers with equally many slots are copied at once. A shorter row brings along what
stood before it, which its length hides. And a row goes out into a `KVCache`, to be kept. A ring
that has forgotten old tokens leaves zeros there; no window reaches them.
"""


# %%
#| export engine
CHUNK, GROUP_TOKENS = 512, 16384  # of one prompt, and of several together, read at a time


def copy_in(
    ring: RingCache, seats: Tensor, source: KVCache | RingCache, numbers: Tensor,
    lengths: Sequence[int],
) -> None:  # fmt: skip
    """Seat rows `numbers` (R,) of a cache, of so many tokens each, as rows `seats` of the ring."""
    for here, there in set(zip(ring.slots, source.slots)):
        mine, theirs, n = ring.groups[here], source.groups[there], min(max(lengths), here, there)
        both = [i for i in mine[0] if i in theirs[0]]
        places = [[group[0].index(i) for i in both] for group in (mine, theirs)]
        places = torch.tensor(places, device=seats.device)[:, :, None, None]  # (2, layers, 1, 1)
        to, of = ring.recent(here, n), source.recent(there, n)
        some = max(1, GROUP_TOKENS // (n * len(lengths)))  # layers at a time: copies take memory
        for a, b in zip(*(each.split(some) for each in places)):
            for new, old in zip(mine[1:], theirs[1:]):
                new[a, seats[:, None], :, to] = old[b, numbers[:, None], :, of]
    ring.lengths[seats] = torch.tensor(lengths, device=ring.clock.device)
    if ring.before is not None:
        ring.before[seats] = source.last[numbers]


def copy_out(ring: RingCache, b: int, length: int) -> KVCache:
    """Return row b of the ring, of `length` tokens, as a KVCache of one row."""
    k = ring.keys[0]
    cache = KVCache(ring.config, 1, length, k.device, k.dtype)
    cache.keys.zero_(), cache.values.zero_()
    for layer, slots in enumerate(ring.slots):
        n = min(length, slots)
        where = ring.recent(slots, n)
        cache.keys[layer, 0, :, length - n :] = ring.keys[layer][b][:, where]
        cache.values[layer, 0, :, length - n :] = ring.values[layer][b][:, where]
    cache.length = length
    cache.last = None if ring.before is None else ring.before[b : b + 1].clone()
    return cache


# %% [markdown]
r"""
The proof: two rows of lengths 3 and 6 decode together, for several rounds of the clock in a layer
with a window of two. Half way they move to another ring. The logits are those of the whole text
each time.
"""


# %%
#| test
@dataclass
class _Narrow(GPTConfig):
    def window_sizes(self):
        return [2 if i % 2 == 0 else None for i in range(self.n_layer - 1)] + [None]


_config = _Narrow(50, 32, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, smear=True)
_model, _idx = GPT(_config), torch.arange(40).view(2, 20) % 50
for _i, _param in enumerate(_model.parameters()):
    torch.nn.init.normal_(_param, std=0.3, generator=torch.Generator().manual_seed(_i))
with torch.no_grad():
    _ring, _n, _both = RingCache(_config, 2, 16), [3, 6], torch.arange(2)
    for _b in (0, 1):
        _cache = KVCache(_config, 1, 6)
        _model(_idx[_b : _b + 1, : _n[_b]], kv_cache=_cache)
        copy_in(_ring, _both[_b : _b + 1], _cache, torch.tensor([0]), [_n[_b]])
    for _step in range(8):
        if _step == 4:  # both move to another ring; the first goes out and comes in once more
            _old, _ring = _ring, RingCache(_config, 2, 15)
            copy_in(_ring, _both, _old, _both, _n)
            copy_in(_ring, _both[:1], copy_out(_ring, 0, _n[0]), torch.tensor([0]), _n[:1])
        _next = torch.stack([_idx[_b, _n[_b]] for _b in (0, 1)])
        _ring.prepare()
        _out = _model(_next[:, None], kv_cache=_ring)
        _n = [_n[0] + 1, _n[1] + 1]
        for _b in (0, 1):
            _whole = _model(_idx[_b : _b + 1, : _n[_b]])[:, -1]
            assert torch.allclose(_out[_b], _whole, atol=1e-4)


# %% [markdown]
r"""
### One step

A batch is what the *device* holds of the rows: their cache, the token each chose last, their knobs
and random numbers. `advance` reads those tokens, and chooses the next ones. Nothing in it asks a
tensor for its value, grows or moves anything. We shall see what that is good for.

`choose` gives each row what its own knobs say. Finding the `k` likeliest or the top `p` takes a
sort, which is slow, so we sort only when a row in the batch asks for it. That is the *effort* of a
step: 0 if all rows are greedy, 1 if some draw, 2 if some filter as well.
"""


# %%
#| export engine
def choose(
    logits: Tensor, knobs: Tensor, uniform: Tensor, counts: Tensor, forced: Tensor, effort: int
) -> tuple[Tensor, Tensor]:
    """Choose the next id of every row of logits (B, V); return ids and logprobs, both (B,).

    knobs (B, 5) are `Sampling.numbers` of each row, uniform (B,) its random numbers, counts
    (B, known) how often it has written each token, forced (B,) an id, or -1 for a free choice.
    effort 0 serves greedy rows only, 1 draws too, 2 filters too. A head padded beyond the known
    tokens has logits that stand for nothing; they are not chosen.
    """
    shown = logits[:, : counts.size(1)] - knobs[:, 4:] * counts
    ids = shown.argmax(dim=-1)
    if effort:
        drawn = draw(row_probabilities(shown, knobs, filters=effort == 2), uniform)
        ids = torch.where(knobs[:, 0] == 0, ids, drawn)
    ids = torch.where(forced >= 0, forced, ids)
    chosen = logits.gather(-1, ids[:, None]).squeeze(-1)
    return ids, chosen - logits.logsumexp(dim=-1)


# %% [markdown]
r"""
What a step has chosen must come to Python. It travels in a slot of memory that a GPU can write to
(*pinned*), with a flag (an *event*) that goes up when it is there. Ids and log-probabilities go
together, as float64, which holds both exactly. There are two slots; why, we shall see.

On a GPU the batch may have help. The `decoder` of appendix A6 reads a token of each of up to 16
rows with kernels of its own, and with effort 0 it chooses the next ones too. Elsewhere it is None,
and the model does the work.
"""


# %%
#| export engine
class Post:
    """Carries what steps have chosen from the device to Python; two steps may be under way."""

    def __init__(self, n_rows: int, device: torch.device):
        gpu = device.type == "cuda"
        kind = dict(dtype=torch.float64, pin_memory=gpu)
        self.device, self.sent = device, deque()
        slots = [torch.zeros(2, n_rows, **kind) for _ in range(2)]
        self.free = deque((slot, torch.cuda.Event() if gpu else None) for slot in slots)

    def send(self, results: Tensor, live: list[tuple[int, Row]]) -> None:
        """Send for the results (2, B) of a step of these seats and rows, and do not wait."""
        slot, event = self.free.popleft()
        slot.copy_(results, non_blocking=True)
        if event:
            event.record(torch.cuda.current_stream(self.device))
        self.sent.append((live, slot, event))

    def receive(self) -> None:
        """Wait for the oldest results, and let each row that has not ended take its token."""
        live, slot, event = self.sent.popleft()
        if event:
            event.synchronize()
        ids, logprobs = slot.tolist()
        self.free.append((slot, event))
        for b, row in live:
            if not row.finish_reason:
                row.take(int(ids[b]), logprobs[b])

    def clear(self) -> None:
        """Let go of what is under way."""
        self.free.extend(sent[1:] for sent in self.sent)
        self.sent.clear()


# %%
#| export engine
class Batch:
    """What the device holds of rows that decode together. Seats without a row are None."""

    def __init__(self, model: GPT, n_rows: int, size: int, known: int):
        device, dtype, seq_len = model.device, model.compute_dtype, model.config.seq_len
        self.model, self.rows = model, [None] * n_rows
        self.cache = RingCache(model.config, n_rows, size, device, dtype)
        self.decode = decoder(model, self.cache)  # does all that the model does, or is None
        self.ids = torch.zeros(n_rows, dtype=torch.int64, device=device)  # chosen, not yet read
        self.made = torch.zeros_like(self.ids)  # tokens chosen so far
        self.forced, self.forcing = torch.full_like(self.ids, -1), False
        self.knobs = torch.zeros(n_rows, 5, device=device)
        self.counts = torch.zeros(n_rows, known, device=device)
        self.uniforms = torch.zeros(n_rows, seq_len, dtype=torch.float64, device=device)
        self.results = torch.zeros(2, n_rows, dtype=torch.float64, device=device)  # ids, logprobs
        self.post = Post(n_rows, device)
        self.graphs: dict[int, Callable[[], None]] = {}  # by effort: see `record`

    def put(
        self, seats: Sequence[int], rows: Sequence[Row], cache: KVCache, numbers: Sequence[int]
    ) -> None:
        """Seat rows that have chosen their first token; row i has read row numbers[i] of cache."""
        device, n_read = self.ids.device, [row.n_read for row in rows]
        places, numbers = torch.tensor([seats, numbers], device=device)  # (R,) each
        copy_in(self.cache, places, cache, numbers, n_read)
        facts = [[row.ids[-1], *row.sampling.numbers()] for row in rows]
        facts = torch.tensor(facts, dtype=torch.float64).to(device)  # (R, 6)
        uniforms = pad_sequence([row.uniforms for row in rows], batch_first=True).to(device)
        ids = facts[:, 0].long()
        self.ids[places], self.knobs[places] = ids, facts[:, 1:].float()
        self.made.index_fill_(0, places, 1)
        self.counts.index_fill_(0, places, 0.0)[places, ids] = 1.0
        self.uniforms[places, : uniforms.size(1)] = uniforms
        for b, row in zip(seats, rows):
            self.rows[b] = row

    def advance(self, effort: int) -> None:
        """Read one token of every row and choose the next, without a word to Python."""
        if self.decode and effort == 0:
            return self.decode.step(self)
        if self.decode:
            logits = self.decode(self.ids)  # (B, V)
        else:
            self.cache.prepare()
            logits = self.model(self.ids[:, None], kv_cache=self.cache, last_only=True)[:, -1]
        place = self.made.clamp(max=self.uniforms.size(1) - 1)[:, None]
        uniform = self.uniforms.gather(1, place).squeeze(1)
        ids, logprobs = choose(logits, self.knobs, uniform, self.counts, self.forced, effort)
        self.ids.copy_(ids)
        torch.stack((ids.double(), logprobs.double()), out=self.results)
        self.counts.scatter_add_(1, ids[:, None], torch.ones_like(self.counts[:, :1]))
        self.made += 1

    def live(self) -> list[tuple[int, Row]]:
        """Return the seats and rows that have not ended."""
        return [(b, row) for b, row in enumerate(self.rows) if row and not row.finish_reason]


# %% [markdown]
r"""
When a table becomes too small, its rows move to a larger one. All that the device knows of them is
there already, so it goes from tensor to tensor.
"""


# %%
#| export engine
def move_rows(old: Batch, new: Batch) -> None:
    """Seat the live rows of a batch on the first seats of another, which may have been used."""
    live = old.live()
    new.rows = [row for _, row in live] + [None] * (len(new.rows) - len(live))
    new.post.clear()
    if not live:
        return
    seats = torch.tensor([[b for b, _ in live], range(len(live))], device=new.ids.device)
    copy_in(new.cache, seats[1], old.cache, seats[0], [row.n_read for _, row in live])
    for name in ("ids", "made", "knobs", "counts", "uniforms"):
        getattr(new, name)[: len(live)] = getattr(old, name)[seats[0]]


# %% [markdown]
r"""
### Record once, replay

How many operations does Python ask for in one step of our small model?
"""

# %%
from torch.utils._python_dispatch import TorchDispatchMode


class Counter(TorchDispatchMode):
    """Counts operations on tensors."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **(kwargs or {}))


trial = Batch(model, 1, 64, tokenizer.vocab_size)
with torch.inference_mode(), Counter() as counter:
    trial.advance(1)
print(f"{counter.count} operations for {n_layer} layers")

# %% [markdown]
r"""
On a GPU Python only *asks*: it puts an operation into a queue, which takes some microseconds, and
goes on. With 24 layers the same count is about 1,400. A quarter of these only look at a tensor in
another shape, and the GPU never hears of them; a thousand are left. So several milliseconds pass in
Python, while the GPU could do the work in about half of one.

Our step always does the same operations on the same memory. So CUDA can **record** them, while
Python asks for them once, and **replay** the whole queue at a single request. Such a recording is a
*CUDA graph*. The conditions are those that `advance` keeps: no result may be looked at, nothing may
come from Python, and what goes in and out has a fixed place.

Before it is recorded a step is rehearsed once, on another stream, because first calls load programs
and take memory. The rehearsal must leave no trace. The small tensors are put back, and what was
written into the cache lies in the slot that the real step writes next.
"""


# %%
#| export engine
def rehearse(batch: Batch, effort: int) -> None:
    """Make a step and undo it."""
    cache = batch.cache
    state = [batch.ids, batch.made, batch.counts, cache.clock, cache.lengths]
    state += [] if cache.before is None else [cache.before]
    kept = [tensor.clone() for tensor in state]
    batch.advance(effort)
    for tensor, old in zip(state, kept):
        tensor.copy_(old)


@lru_cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a CUDA device on which steps are recorded."""
    return torch.cuda.Stream(device)


def record(
    device: torch.device, work: Callable[[], None], rehearsal: Callable[[], None]
) -> Callable[[], None]:
    """Record what `work` asks of a CUDA device as a graph, and return what replays it."""
    side, graph = side_stream(device), torch.cuda.CUDAGraph()
    now = torch.cuda.current_stream(device)
    side.wait_stream(now)
    with torch.cuda.stream(side):
        rehearsal()
        torch.cuda.empty_cache()  # what is free may be needed, and cannot be had while recording
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            work()  # recorded, not run
        finally:
            graph.capture_end()
    now.wait_stream(side)
    return graph.replay


# %% [markdown]
r"""
A recording takes the time of some plain steps, once for each table and effort. A compiler
(`torch.compile`) would also merge small operations into few. We tried it: on a CPU a step took 3.04
ms in place of 3.20, after 33 seconds of compiling (`benchmarks/RESULTS.md`). We leave it out.

### One step late

With a step of half a millisecond there is one more thing to lose. Python looks at every token: has
the row ended, does it call the tool, who wants to read it? Meanwhile the GPU has nothing to do. But
it needs no answer: the next step reads its token from the device's own memory. So we begin step
$n + 1$ *before* we look at the tokens of step $n$.

```
looked at at once    Python   ask 1 | wait ........ | look 1 | ask 2 | wait ........ | look 2
                     GPU            | === step 1 == |                | === step 2 == |

one step late        Python   ask 1 | ask 2 | wait  | look 1 | ask 3 | wait  | look 2 | ask 4
                     GPU            | === step 1 == | === step 2 == | === step 3 == |
```

This can be tried without a GPU: a thread that sleeps for 2 ms is the device, and Python needs 1 ms.
"""

# %%
from concurrent.futures import ThreadPoolExecutor


def pretend(late, steps=30, device=0.002, python=0.001):
    """Milliseconds per token with a device that is a sleeping thread."""
    start = time.perf_counter()
    with ThreadPoolExecutor(1) as queue:
        current = queue.submit(time.sleep, device)
        for _ in range(steps):
            following = queue.submit(time.sleep, device) if late else None
            current.result()
            time.sleep(python)
            current = following or queue.submit(time.sleep, device)
    return (time.perf_counter() - start) / steps * 1e3


print(f"at once {pretend(late=False):.1f} ms a token, one step late {pretend(late=True):.1f} ms")

# %% [markdown]
r"""
What if the token of step $n$ ended its row? Then step $n + 1$ has read that last token and chosen
one too many, which nobody takes. The last token's key and value are right, and a chat that goes on
needs them anyway. What if step $n$ opened a tool call? Nothing happens before the call is *closed*,
which is a step later at the earliest; so while a row is inside a call, the loop looks at every
token at once.
"""


# %%
#| export engine
def runs_on(row: Row, slots: int) -> bool:
    """Return whether the token after the row's next may be chosen before we know the next.

    Not inside a tool call, and not past the budget or a cache of so many slots.
    """
    calling = row.queue or (row.calls is not None and row.calls.expression is not None)
    return not calling and len(row.ids) + 1 < row.budget and row.n_read + 1 < slots


def begin_step(batch: Batch, live: list[tuple[int, Row]], graph: bool) -> None:
    """Bring these seats and rows forward by one token, and send for it."""
    queued = [(b, row.queue[0]) for b, row in live if row.queue]
    if queued or batch.forcing:  # now, or in the step before
        forced = torch.full((len(batch.rows),), -1)
        for b, id in queued:
            forced[b] = id
        batch.forced.copy_(forced)
        batch.forcing = bool(queued)
    effort = max(row.effort for _, row in live)
    if not graph:
        batch.advance(effort)
    else:
        if effort not in batch.graphs:
            step, rehearsal = partial(batch.advance, effort), partial(rehearse, batch, effort)
            batch.graphs[effort] = record(batch.ids.device, step, rehearsal)
        batch.graphs[effort]()
    batch.post.send(batch.results, live)


# %% [markdown]
r"""
### Reading prompts, and remembering them

A prompt is read in chunks, with a step for everybody else between two chunks, so that a long
prompt does not make the others wait. Prompts of similar length are read together, and one that
several rows share is read once.

In a chat every turn repeats all turns before it. An engine may keep the keys and values of its last
few rows, and a prompt that begins like one of them starts from there. This is right only as long as
the weights stay as they are, so it is off unless asked for (`remember=8`). Two details: `smear`
(chapter 3) looks at the token before, which no key or value holds, so we look it up again. And a
layer with a window has forgotten what fell out of its ring: such a row can only be continued where
it ended.
"""


# %%
#| export engine
def last_embedding(model: GPT, last: Tensor) -> Tensor | None:
    """Return what `smear` needs of the last tokens (B, 1), (B, 1, C); None without smear."""
    if not model.config.smear:
        return None
    return rms_norm(model.embedding(last).to(model.compute_dtype))


# %%
#| export engine
class Prefixes:
    """Keys and values of the last `limit` finished rows, for prompts that begin like them."""

    def __init__(self, limit: int):
        self.limit, self.entries = limit, deque(maxlen=limit)  # of (ids, KVCache)

    def keep(self, ids: list[int], cache: KVCache) -> None:
        """Remember a cache that holds exactly these ids; it replaces those that it continues."""
        longer = [e for e in self.entries if e[0] != ids[: len(e[0])]]
        self.entries.clear()
        self.entries.extend([*longer, (ids, cache)])

    def start(self, model: GPT, prompt: Sequence[int], cache: KVCache) -> None:
        """Fill the empty cache of a prompt with as many of its first tokens as are known."""
        found = [(self.usable(ids, prompt, model.config), old) for ids, old in self.entries]
        n, old = max(found, key=lambda pair: pair[0], default=(0, None))
        if n == 0:
            return
        last = torch.tensor([[prompt[n - 1]]], device=model.device)
        cache.begin_like(old, n, last_embedding(model, last))

    @staticmethod
    def usable(ids: list[int], prompt: Sequence[int], config: GPTConfig) -> int:
        """Return how many first tokens of the prompt are these ids, with all that they saw.

        At least one token of the prompt is left to read. A row longer than a window holds only the
        last window + 1 tokens of such a layer: it can be cut before its last token, not earlier.
        """
        most = min(len(ids), len(prompt) - 1)
        same = next((i for i in range(most) if ids[i] != prompt[i]), most)
        forgotten = any(w is not None and len(ids) > w + 1 for w in config.window_sizes())
        return same if not forgotten or same >= len(ids) - 1 else 0


# %%
#| export engine
def next_group(waiting: deque[Row], free: int, max_tokens: int) -> list[Row]:
    """Take rows to be read together: the first that waits, and others about as long.

    At most `free` rows and, beyond the first, `max_tokens` tokens with their padding. The others
    keep their order.
    """
    group, others, first = [], [], len(waiting[0].prompt)
    longest = first
    while waiting:
        row = waiting.popleft()
        n = len(row.prompt)
        alike = first <= 2 * n and n <= 2 * first
        small = not group or max(n, longest) * (len(group) + 1) <= max_tokens
        if alike and small and len(group) < free:
            group.append(row)
            longest = max(longest, n)
        else:
            others.append(row)
    waiting.extend(others)
    return group


# %%
#| export engine
def prefill(
    model: GPT, rows: Sequence[Row], prefixes: Prefixes, chunk: int, beginnings: Any = None
) -> Iterator[tuple[KVCache, list[int], Tensor] | None]:
    """Read the prompts of rows in chunks; yields None between two, at last the whole.

    That is (cache, numbers, logits): the i-th row is row numbers[i] of the cache, since equal
    prompts are read once, and logits (B, V) are those after its prompt. `beginnings` (see
    Beginnings) reads the first chunk of a single prompt.
    """
    prompts = list(dict.fromkeys(tuple(row.prompt) for row in rows))
    numbers = [prompts.index(tuple(row.prompt)) for row in rows]
    longest = max(map(len, prompts))
    starts = [longest - len(prompt) for prompt in prompts]
    device, dtype = model.device, model.compute_dtype
    cache = KVCache(model.config, len(prompts), longest, device, dtype, starts)
    if len(prompts) == 1:
        prefixes.start(model, prompts[0], cache)
    filled = [[0] * start + list(prompt) for start, prompt in zip(starts, prompts)]
    idx = torch.tensor(filled, device=device)  # (B, T)
    order = torch.tensor(numbers, device=device)
    while cache.length < longest:
        part = idx[:, cache.length : cache.length + chunk]
        if beginnings and len(idx) == 1 and cache.length == 0:
            logits = beginnings.read(part, cache)
        else:
            cache.prepare(part.size(1))
            logits = model(part, kv_cache=cache, last_only=True)[:, -1]
        if cache.length < longest:
            yield None
    yield cache, numbers, logits[order]


# %% [markdown]
r"""
Until the first token is there, a reader looks at an empty line, and here too Python is the slower
one: a prompt of a few hundred tokens is a few milliseconds of work for a GPU, and a thousand
operations or more have to be asked for. So we record the reading of a prompt as well. A recording
has one size, prompts have many. We take the next power of two and let anything stand *behind* the
prompt: the model is causal, so no token of the prompt sees it. The logits are taken at the prompt's
last token, whose place is a number on the device. Keys and values are copied out of the recording's
own cache, which the next prompt overwrites.
"""


# %%
#| export engine
class Beginning:
    """Reads the first tokens of a prompt, at most `size`, always by the same operations."""

    def __init__(self, model: GPT, size: int):
        self.model, device = model, model.device
        self.cache = KVCache(model.config, 1, size, device, model.compute_dtype)
        self.ids = torch.zeros(1, size, dtype=torch.int64, device=device)
        self.end = torch.zeros(1, dtype=torch.int64, device=device)  # the place of the last token

    def advance(self) -> None:
        """Read all of `ids`; logits (1, V) and the last embedding are those at `end`."""
        self.cache.length, self.cache.last = 0, None
        self.logits = self.model(self.ids, kv_cache=self.cache, positions=self.end)
        self.last = last_embedding(self.model, self.ids[:, self.end])

    def read(self, part: Tensor, cache: KVCache, replay: Callable[[], None]) -> Tensor:
        """Read tokens (1, n) into an empty cache, and return the logits (1, V) after them."""
        n = part.size(1)
        self.ids[:, :n] = part  # behind it stands what an earlier prompt has left
        self.end.fill_(n - 1)
        replay()
        cache.begin_like(self.cache, n, None if self.last is None else self.last.clone())
        return self.logits.clone()


# %%
#| export engine
class Beginnings:
    """Recordings of `Beginning`, by size: powers of two from 64 to 512, made when first needed."""

    def __init__(self, model: GPT):
        self.model = model
        self.kept: dict[int, tuple[Beginning, Callable[[], None]]] = {}

    def read(self, part: Tensor, cache: KVCache) -> Tensor:
        """Read tokens (1, n), n <= CHUNK, into an empty cache; return the logits (1, V)."""
        size = bucket(max(part.size(1), SMALLEST), coarse=True)
        size = min(size, CHUNK, self.model.config.seq_len)
        if size not in self.kept:
            one = Beginning(self.model, size)
            self.kept[size] = one, record(part.device, one.advance, one.advance)
        one, replay = self.kept[size]
        return one.read(part, cache, replay)


# %% [markdown]
r"""
Four recordings are made at most. For a model of 24 layers in bfloat16 their caches take 140 MB, and
what the operations need in between some tens of MB each. Groups of different prompts, later chunks
and prompts with a remembered beginning are read as before. Without a GPU nothing is recorded, but
we can see that what stands behind is harmless.
"""

# %%
#| test
_model = GPT(GPTConfig(50, 32, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, smear=True))
for _i, _param in enumerate(_model.parameters()):
    torch.nn.init.normal_(_param, std=0.3, generator=torch.Generator().manual_seed(_i))
_one, _idx = Beginning(_model, 16), torch.arange(20)[None]
with torch.inference_mode():
    for _n in (16, 5, 11, 1):
        _plain, _cache = KVCache(_model.config, 1, 20), KVCache(_model.config, 1, 20)
        _logits = _model(_idx[:, :_n], kv_cache=_plain)[:, -1]
        assert torch.allclose(_one.read(_idx[:, :_n], _cache, _one.advance), _logits, atol=1e-4)
        _next = [_model(_idx[:, _n : _n + 1], kv_cache=_each) for _each in (_plain, _cache)]
        assert torch.allclose(*_next, atol=1e-4)

# %% [markdown]
r"""
The logits after a prompt give its row the first token. From there on the batch takes over.
"""


# %%
#| export engine
def first_tokens(rows: Sequence[Row], logits: Tensor, known: int) -> None:
    """Choose the first token of each row from logits (B, V); a row that has ended takes none."""
    knobs = torch.tensor([row.sampling.numbers() for row in rows])
    uniform = torch.stack([row.uniforms[0] for row in rows])
    knobs, uniform = (t.to(logits.device, non_blocking=True) for t in (knobs, uniform))
    counts, forced = logits.new_zeros(len(rows), known), torch.full_like(uniform, -1).long()
    effort = max(row.effort for row in rows)
    ids, logprobs = choose(logits, knobs, uniform, counts, forced, effort)
    for row, id, logprob in zip(rows, *torch.stack((ids.double(), logprobs.double())).tolist()):
        if not row.ended():
            row.take(int(id), logprob)


# %% [markdown]
r"""
### The loop

All requests share one house. Rows wait at the door; the prompts of some are being read there
(`arriving`). The others sit at the table and get one token each, a step at a time. First the door.
"""


# %%
#| export engine
class Door:
    """Rows that wait, and those whose prompts are being read."""

    def __init__(self, model: GPT, prefixes: Prefixes, graph: bool):
        self.model, self.prefixes = model, prefixes
        self.beginnings = Beginnings(model) if graph else None
        self.waiting: deque[Row] = deque()
        self.arriving: list[Row] = []
        self.reading: Iterator | None = None

    def rows(self) -> list[Row]:
        """Return all rows that have no seat yet."""
        return [*self.waiting, *self.arriving]

    def busy(self, free: int) -> bool:
        """Return whether there is a prompt to read, when there are so many free seats."""
        return self.reading is not None or bool(free and self.waiting)

    def read(self, free: int) -> tuple[list[Row], KVCache, list[int], Tensor] | None:
        """If busy: read a chunk for at most `free` rows; after the last, rows and `prefill`'s."""
        if self.reading is None:
            most = 1 if self.prefixes.limit else free  # each prompt has its own beginning
            self.arriving = next_group(self.waiting, most, GROUP_TOKENS)
            self.reading = prefill(self.model, self.arriving, self.prefixes, CHUNK, self.beginnings)
        found = next(self.reading)
        if found is None:
            return None
        rows, self.arriving, self.reading = self.arriving, [], None
        if self.prefixes.limit:
            self.prefixes.keep(rows[0].prompt, found[0])
        return rows, *found

    def leave(self) -> None:
        """Let go of rows that have ended while they waited."""
        if self.waiting:
            self.waiting = deque(row for row in self.waiting if not row.ended())

    def clear(self) -> None:
        """Forget everybody, and all that was recorded."""
        self.waiting.clear()
        self.arriving, self.reading = [], None
        if self.beginnings:
            self.beginnings.kept.clear()


# %% [markdown]
r"""
Then the table. Who has finished frees a seat. When the table is too small, or far too large,
everybody moves to another one. Sizes come from a short list, 1, 2, 3, 4, 6, 8, 12, 16, ..., so that
moves are rare. Where every size costs a recording the list is shorter still, and the tables used
last are kept for the next time, as many as hold no more tokens than one full table.
"""


# %%
#| export engine
SMALLEST = 64  # slots of a cache


def bucket(n: int, coarse: bool = False) -> int:
    """Return the smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... (coarse: powers of 2) from n on."""
    power = power_of_two(n)
    return power * 3 // 4 if not coarse and power >= 4 and power * 3 // 4 >= n else power


# %%
#| export engine
class Seats:
    """The batch at the table, and with `graph` those that were there before and may come back."""

    def __init__(self, model: GPT, known: int, max_batch: int, graph: bool):
        self.model, self.known, self.max_batch, self.graph = model, known, max_batch, graph
        self.batch = self.empty = Batch(model, 0, 1, known)
        self.kept: dict[tuple[int, int], Batch] = {}  # by rows and slots; the last used come last

    def rows(self) -> list[Row]:
        """Return the rows that have a seat."""
        return [row for row in self.batch.rows if row]

    def another(self, seats: int, size: int) -> Batch:
        """Return a batch of these sizes to be used next, a kept one if there is one."""
        batch = self.kept.pop((seats, size), None) or Batch(self.model, seats, size, self.known)
        if self.graph:
            self.kept[seats, size] = batch
            while sum(n * m for n, m in self.kept) > self.max_batch * self.model.config.seq_len:
                del self.kept[next(iter(self.kept))]
        return batch

    def move(self, seats: int, longest: int = 0) -> None:
        """Move everybody to a batch of so many seats, with room for more than `longest` tokens."""
        live = self.batch.live()
        longest = max([longest, *(row.n_read for _, row in live)])
        seats = min(seats, max(self.max_batch, len(live)))
        room = max(longest + 1, 4 * SMALLEST if self.graph else SMALLEST)
        new = self.another(seats, min(bucket(room, self.graph), self.model.config.seq_len))
        move_rows(self.batch, new)
        self.batch = new

    def clear(self) -> None:
        """Forget everybody, and all that was computed."""
        self.batch = self.empty
        self.kept.clear()


# %%
#| export engine
class Table(Seats):
    """The rows that write: they sit down, get tokens, and leave."""

    def put(self, rows: Sequence[Row], cache: KVCache, numbers: Sequence[int]) -> None:
        """Seat rows that have not ended; row i has read what is row numbers[i] of the cache."""
        going = [(row, number) for row, number in zip(rows, numbers) if not row.finish_reason]
        if not going:
            return
        seats, longest = len(self.rows()) + len(going), max(row.n_read for row, _ in going)
        if seats > len(self.batch.rows) or longest >= self.batch.cache.size:
            self.move(max(bucket(seats, self.graph), len(self.batch.rows)), longest)
        free = [b for b, row in enumerate(self.batch.rows) if row is None]
        rows, numbers = zip(*going)
        self.batch.put(free[: len(rows)], rows, cache, numbers)

    def step(self, late: bool) -> None:
        """Begin a step if we may, and take the tokens of it, or with `late` of the one before."""
        batch, live, waiting = self.batch, self.batch.live(), len(self.batch.post.sent)
        slots = batch.cache.size
        if live and not waiting and max(row.n_read for _, row in live) >= slots:
            self.move(len(batch.rows))
            batch, live = self.batch, self.batch.live()
        if live and (not waiting or (late and all(runs_on(row, slots) for _, row in live))):
            begin_step(batch, live, self.graph)
        if batch.post.sent and (waiting or not late):
            batch.post.receive()

    def settle(self) -> None:
        """Take the tokens that are under way: before rows join or move."""
        while self.batch.post.sent:
            self.batch.post.receive()

    def leave(self, prefixes: Prefixes) -> None:
        """Free the seats of rows that have ended, and remember what they have read."""
        batch = self.batch
        for b, row in enumerate(batch.rows):
            if row is not None and row.ended():
                batch.rows[b] = None
                if prefixes.limit and row.finish_reason != "cancelled":
                    n = row.n_read + len(batch.post.sent)  # a step under way reads the last token
                    prefixes.keep((row.prompt + row.ids)[:n], copy_out(batch.cache, b, n))
        if not any(batch.rows):
            self.batch = self.empty

    def shrink(self, prefixes: Prefixes) -> None:
        """Move to fewer seats if most are free."""
        if bucket(len(self.rows()), self.graph) <= 0.75 * len(self.batch.rows):
            self.settle()
            self.leave(prefixes)
            if self.rows():
                self.move(bucket(len(self.rows()), self.graph))


# %% [markdown]
r"""
In each round of the loop rows leave, rows join, and everybody at the table gets a token. It has no
thread of its own: whoever wants a token runs it, and makes a step for all. While prompts are being
read it does not run ahead, so that those who join find nothing under way.
"""


# %%
#| export engine
class Loop:
    """One loop for all requests of an engine: rows join and leave between two steps.

    Whoever wants a token calls `run` from any thread; who holds the lock makes a step for all. With
    `graph` steps and short prompts are recorded, with `late` steps are looked at one step late.
    """

    def __init__(
        self, model: GPT, known: int, max_batch: int, remember: int, graph: bool, late: bool
    ):
        self.prefixes, self.lock, self.late = Prefixes(remember), threading.Lock(), late
        self.door = Door(model, self.prefixes, graph)
        self.table = Table(model, known, max_batch, graph)

    def run(self, rows: Sequence[Row], done: Callable[[], bool]) -> None:
        """Make steps until done() is true; `rows` are new ones that join."""
        if rows:
            with self.lock:
                self.door.waiting.extend(rows)
        while not done():
            with self.lock, torch.inference_mode():
                try:
                    self.step()
                except BaseException as error:
                    self.fail(error)
                    raise

    def rows(self) -> list[Row]:
        """Return all rows in the house."""
        return self.door.rows() + self.table.rows()

    def free(self) -> int:
        """Return how many rows may join."""
        return self.table.max_batch - len(self.table.rows())

    def step(self) -> None:
        """Let rows leave and join, read a chunk of a prompt, and give everybody a token."""
        door, table = self.door, self.table
        self.leave()
        if door.busy(self.free()):
            table.settle()
            self.leave()
        if door.busy(self.free()):
            found = door.read(self.free())
            if found:
                rows, cache, numbers, logits = found
                first_tokens(rows, logits, table.known)
                table.put(rows, cache, numbers)
        table.step(self.late and not door.busy(self.free()))
        self.leave()
        if not door.waiting and not door.arriving:
            table.shrink(self.prefixes)

    def leave(self) -> None:
        """Let go of rows that have ended."""
        self.door.leave()
        self.table.leave(self.prefixes)

    def fail(self, error: BaseException) -> None:
        """After an error nobody can go on: end all rows, with the error if it is one."""
        for row in self.rows():
            row.error = error if isinstance(error, Exception) else None
            row.finish_reason = row.finish_reason or "cancelled"
        self.door.clear()
        self.table.clear()


# %% [markdown]
r"""
## The engine

What remains is a front: check the request, make its rows, and stream one or return many. Streams
*pull*: whoever asks for a token that is not there yet makes a step for everybody, and the others
find theirs ready. So the requests of several threads become one batch.

The engine holds the caller's model, not a copy, so a model that is being trained speaks with its
newest weights. On a GPU a copy in bfloat16, made once, halves the bytes of every step; `pack_heads`
lays its matrices in memory as the kernels of appendix A6 want them. Eight-bit weights would halve
the bytes again; we leave it at bfloat16.
"""


# %%
#| export engine
class Stream:
    """The tokens of one request as they come; afterwards `finish_reason` and `completion()`.

    It joins the loop with its first token. A stream that nobody holds any more leaves the loop.
    """

    def __init__(self, row: Row, loop: Loop):
        self.row, self.loop, self.count = row, loop, 0
        self.new, self.transcript = [row], Transcript(row.tokenizer)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Token:
        row, new = self.row, self.new
        if row.stop is not None and row.stop.is_set():
            self.cancel()
        self.new = []
        if not row.finish_reason and self.count == len(row.ids):
            self.loop.run(new, lambda: len(row.ids) > self.count or row.finish_reason)
        if row.error is not None:
            raise row.error
        if self.count >= len(row.ids):
            raise StopIteration
        self.count += 1
        id, forced = row.ids[self.count - 1], not row.mask[self.count - 1]
        kind, text = self.transcript.push(id)
        return Token(id, text, row.logprobs[self.count - 1], forced, kind)

    def cancel(self) -> None:
        """End here; tokens that were made ahead of the reader are dropped."""
        row = self.row
        with self.loop.lock, torch.inference_mode():
            if not row.finish_reason or self.count < len(row.ids):
                row.finish_reason = "cancelled"
            for made in (row.ids, row.mask, row.logprobs):
                del made[self.count :]
            self.loop.leave()

    def __del__(self) -> None:
        self.row.finish_reason = self.row.finish_reason or "cancelled"

    @property
    def finish_reason(self) -> str | None:
        """None while running; then "stop", "length" or "cancelled"."""
        ended = self.row.finish_reason and self.count >= len(self.row.ids)
        return self.row.finish_reason if ended else None

    def completion(self) -> Completion:
        """Return what has been generated so far."""
        return self.row.completion()


# %%
#| export engine
def prepared_copy(model: GPT, dtype: torch.dtype) -> GPT:
    """Return a copy of the model for inference whose weights and activations have `dtype`."""
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    for weight in twin.parameters():
        weight.grad, weight.data = None, weight.data.to(dtype)
    pack_heads(twin)
    twin.compute_dtype = dtype
    return twin


# %%
#| export engine
@torch.no_grad()
def copy_weights(twin: GPT, model: GPT) -> None:
    """Give a prepared copy the weights of its model anew, in the memory that it has."""
    for mine, new in zip(twin.parameters(), model.parameters()):
        mine.copy_(new)


# %%
#| export engine
def check_tokenizer(model: GPT, tokenizer: Tokenizer) -> None:
    """Raise UserError when the tokenizer has tokens that the model does not know."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model only "
            f"{model.config.vocab_size:,}; use the tokenizer that it was trained with."
        )


# %%
#| export engine
def request(
    model: GPT, tokenizer: Tokenizer, ids: Sequence[int], max_tokens: int, *options: Any
) -> Row:
    """Return the Row of a prompt, or UserError; `options` are those of Row from sampling on."""
    seq_len, last = model.config.seq_len, tokenizer.vocab_size - 1
    if not len(ids):
        raise UserError("the prompt is empty; begin it with the token bos.")
    if len(ids) > seq_len:
        raise UserError(
            f"the prompt has {len(ids):,} tokens and the model's context window holds "
            f"{seq_len:,}; shorten the prompt or start a new conversation."
        )
    if not 0 <= min(ids) <= max(ids) <= last:
        raise UserError(f"the prompt has an id outside 0 .. {last}, the tokens there are.")
    if max_tokens < 0:
        raise UserError(f"max_tokens is {max_tokens}; use 0 or more.")
    return Row(ids, min(max_tokens, seq_len - len(ids)), tokenizer, *options)


# %% [markdown]
r"""
An engine can also read: how likely does the model find each token of a text that is already there,
and what did it expect in its place?
"""


# %%
#| export engine
@torch.inference_mode()
def token_probabilities(
    model: GPT, tokenizer: Tokenizer, ids: Sequence[int], top: int = 5
) -> list[dict]:
    """Tell for each id of a sequence how likely the model found it, and what else it expected.

    One dict per id: id, text, probability (None for the first id, before which nothing was
    read) and top, the `top` likeliest (text, probability) at that place. UserError for bad ids.
    """
    row = request(model, tokenizer, ids, 0, Sampling())
    idx = torch.tensor([row.prompt], device=model.device)
    p = model(idx)[0, :-1].softmax(dim=-1)  # (T - 1, V)
    known = tokenizer.vocab_size
    values, where = p[:, :known].topk(min(top, known), dim=-1)
    own = p.gather(-1, idx[0, 1:, None]).squeeze(-1).tolist()
    texts = [[tokenizer.decode([i]) for i in line] for line in where.tolist()]
    tops = [list(zip(*pair)) for pair in zip(texts, values.tolist())]
    return [
        {"id": id, "text": tokenizer.decode([id]), "probability": own, "top": tops}
        for id, own, tops in zip(row.prompt, [None, *own], [[], *tops])
    ]


# %%
#| export engine
def row_seeds(seed: int | Sequence[int], n: int) -> list[int]:
    """Return a seed for each of n rows; UserError when those that are given are not n."""
    if isinstance(seed, int):
        return [seed + 1_000_003 * i for i in range(n)]
    if len(seed) != n:
        raise UserError(f"there are {n} prompts and {len(seed)} seeds; give one for each.")
    return list(seed)


# %% [markdown]
r"""
Both ways of asking make rows. A stream hands its row to the loop when somebody wants the first
token; a batch hands in all rows and waits for the last one to end.
"""


# %%
#| export engine
class Engine:
    """Generates text with a model and its tokenizer: `generate` streams, `generate_batch` returns.

    The model is the caller's own, so every change of its weights is seen; `dtype` makes a copy in
    that dtype instead (bfloat16 is best on a GPU), until `refresh()`. At most `max_batch` rows
    decode together. `remember` keeps keys and values of so many finished rows for prompts that
    continue them: for weights that do not change. `graph` records steps, and how one prompt is
    read, as CUDA graphs (then weights must stay where they are); `late` looks at tokens a step
    late. Both are done on CUDA.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype | None = None,
        max_batch: int = 128, remember: int = 0, graph: bool | None = None,
        late: bool | None = None,
    ):  # fmt: skip
        check_tokenizer(model, tokenizer)
        on_gpu = model.device.type == "cuda"
        options = max_batch, remember, *(on_gpu if x is None else x for x in (graph, late))
        self.source, self.tokenizer = model, tokenizer
        self.model = model if dtype is None else prepared_copy(model, dtype)
        self.loop = Loop(self.model, tokenizer.vocab_size, *options)

    def refresh(self) -> None:
        """Forget all prompts; a copy in another dtype takes over the weights as they are now."""
        with self.loop.lock:
            if self.model is not self.source:
                copy_weights(self.model, self.source)
            self.loop.prefixes.entries.clear()

    def row(self, *asked: Any) -> Row:
        """Check one request and return its Row: see `request`."""
        return request(self.model, self.tokenizer, *asked)

    def generate(
        self, ids: Sequence[int], max_tokens: int = 256, temperature: float = 1.0,
        top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
        seed: int = 0, stop: threading.Event | None = None, tools: bool = True,
        frequency_penalty: float = 0.0,
    ) -> Stream:  # fmt: skip
        """Stream the Tokens that follow the prompt `ids`, the stopping token (text "") included.

        Ends at assistant_end or bos ("stop"), after max_tokens or at the end of the context window
        ("length"), or when another thread sets `stop` ("cancelled"). UserError for a bad prompt.
        Streams of one engine decode together, from one thread or from several.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, frequency_penalty)
        return Stream(self.row(ids, max_tokens, sampling, seed, stop, tools), self.loop)

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], max_tokens: int = 256, temperature: float = 1.0,
        top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
        seed: int | Sequence[int] = 0, stop: threading.Event | None = None, tools: bool = True,
        frequency_penalty: float = 0.0,
    ) -> list[Completion]:  # fmt: skip
        """Complete many prompts, of any lengths, together; the results come in their order.

        `seed` is one number (row i then draws with seed + 1,000,003 i) or one per prompt. What a
        row becomes does not depend on the other rows, up to rounding.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, frequency_penalty)
        pairs = zip(prompts, row_seeds(seed, len(prompts)))
        rows = [self.row(ids, max_tokens, sampling, s, stop, tools) for ids, s in pairs]
        self.loop.run(rows, lambda: all(row.finish_reason for row in rows))
        for error in (row.error for row in rows if row.error):
            raise error
        return [row.completion() for row in rows]

    def token_probabilities(self, ids: Sequence[int], top: int = 5) -> list[dict]:
        """Tell how likely the model found each id of a sequence: see `token_probabilities`."""
        return token_probabilities(self.model, self.tokenizer, ids, top)


# %% [markdown]
r"""
Is it fast? `benchmark` times a batch of requests that no
token can stop. The share of the bandwidth compares the bytes that a step cannot avoid with what the
device can read in that time.
"""


# %%
#| export engine
def read_bandwidth(device: torch.device) -> float:
    """Return the bytes per second of summing a large array, the best of six."""
    data = torch.ones((2**30 if device.type == "cuda" else 2**26) // 4, device=device)
    seconds = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        data.sum()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return data.numel() * 4 / min(seconds)


# %%
#| export engine
def benchmark(engine: Engine, batch: int, prompt: int, new: int) -> dict[str, Any]:
    """Time `batch` greedy requests of `prompt` tokens, `new` tokens each; return the figures.

    ttft_ms is until every row has its first token, tpot_ms the mean of each later step.
    """
    model, loop, device = engine.model, engine.loop, engine.model.device
    letters = min(256, engine.tokenizer.vocab_size)  # no two prompts are alike
    prompts = [[(7 * b + i) % letters for i in range(prompt)] for b in range(batch)]
    rows = [engine.row(ids, new, Sampling(0.0), 0, None, False) for ids in prompts]
    for row in rows:
        row.stop_ids = set()
    synchronize(device)
    start = time.perf_counter()
    loop.run(rows, lambda: all(row.ids for row in rows))
    first, cache = time.perf_counter() - start, loop.table.batch.cache
    loop.run([], lambda: all(row.finish_reason for row in rows))
    synchronize(device)
    each = (time.perf_counter() - start - first) / (new - 1)
    params, size, item = model.num_params(), model.config, cache.keys[0].element_size()
    seen = sum(min(prompt + new / 2, w or math.inf) for w in size.window_sizes())
    kv = 2 * size.n_kv_head * size.head_dim * seen * batch
    return {
        "batch": batch,
        "ttft_ms": round(first * 1e3, 3),
        "tpot_ms": round(each * 1e3, 3),
        "tokens_per_second": round(batch / each, 1),
        "bytes_per_second": item * (params["matrix"] + params["head"] + kv) / each,
        "cache_bytes": sum(2 * k.numel() * item for k in cache.keys),
        "memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


# %%
#| export engine
def bench(
    engine: Engine, batches: Sequence[int], prompt: int, new: int, repeats: int = 3
) -> dict[str, Any]:
    """Print a table of `benchmark` over batch sizes (the medians of repeats); return its facts."""
    device, results = engine.model.device, []
    bandwidth = read_bandwidth(device)
    print(f"{'batch':>6} {'first token':>13} {'per token':>10} {'tokens/s':>9} {'bandwidth':>10} "
          f"{'cache':>9}")  # fmt: skip
    for batch in batches:
        benchmark(engine, batch, prompt, new)  # to warm up, and to record steps
        runs = [benchmark(engine, batch, prompt, new) for _ in range(repeats)]
        found = sorted(runs, key=lambda run: run["tpot_ms"])[repeats // 2]
        found["bandwidth_share"] = round(found.pop("bytes_per_second") / bandwidth, 4)
        results.append(found)
        print(f"{batch:6} {found['ttft_ms']:10.1f} ms {found['tpot_ms']:7.2f} ms "
              f"{found['tokens_per_second']:9,.0f} {found['bandwidth_share']:10.1%} "
              f"{found['cache_bytes'] / 2**20:6.1f} MB")  # fmt: skip
    facts = {"prompt": prompt, "new": new, "threads": torch.get_num_threads()}
    facts |= {"device": str(device), "dtype": str(engine.model.compute_dtype).split(".")[1]}
    facts |= {"torch": torch.__version__, "read_gb_per_second": round(bandwidth / 1e9, 1)}
    return {**facts, "results": results}


# %%
engine = Engine(model, tokenizer)
measured = bench(engine, (1, 4), prompt=64, new=16, repeats=1)

# %% [markdown]
r"""
On one H200 a model of 24 layers has its first token 8 ms after a prompt of 512, and then one every
0.57 ms: 1,770 a second, 65 % of what the memory delivers to a plain sum there. 128 readers together
get 19,800 a second (`benchmarks/RESULTS.md`). Up to sixteen rows are read by the kernels of
appendix A6, more by the model itself.

Several beginnings at once, drawn at temperature 0.8:
"""

# %%
beginnings = ("Mira lives in", "The market of", "Once upon a time there was", "A cat")
prompts = [tokenizer.encode(text, bos=True) for text in beginnings]
for number, completion in enumerate(engine.generate_batch(prompts, 24, temperature=0.8, seed=seed)):
    print(repr(beginnings[number] + completion.text))

# %%
#| test
_texts = ["the cat sat on the mat"] * 3
_tokenizer = Tokenizer.train(_texts, 270)
_model = GPT(GPTConfig(_tokenizer.vocab_size, 32, n_layer=2, n_head=2, n_kv_head=1, n_embd=16))
for _i, _param in enumerate(_model.parameters()):
    torch.nn.init.normal_(_param, std=0.3, generator=torch.Generator().manual_seed(_i))
_engine, _prompts = Engine(_model, _tokenizer), [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [4]]
for _temperature in (0.0, 1.0):
    _together = _engine.generate_batch(_prompts, 10, _temperature, seed=[1, 2, 3, 4])
    for _i, _done in enumerate(_together):
        _alone = _engine.generate(_prompts[_i], 10, _temperature, seed=_i + 1)
        assert [_token.id for _token in _alone] == _done.ids

# %% [markdown]
r"""
Greedy writing is where circles show best. The penalty breaks them.
"""

# %%
for penalty in (0.0, 0.7):
    text = engine.generate_batch([prompt], 40, temperature=0.0, frequency_penalty=penalty)[0].text
    print(f"penalty {penalty}: ...{text!r}")

# %% [markdown]
r"""
### What a batch buys

The same prompt and twenty tokens for more and more rows. A step for several rows takes longer than
a step for one, but not as many times longer as there are rows. So the tokens per second of all rows
together climb, if less than in proportion: each row brings a cache and arithmetic of its own.
"""


# %%
def tokens_per_second(batch, n_new=20):
    """Greedy tokens of all rows together per second, prefill included; best of two runs."""
    rows = [prompt] * batch
    done = engine.generate_batch(rows, n_new, temperature=0.0, tools=False)
    made = sum(len(completion.ids) for completion in done)
    return made / best_seconds(lambda: engine.generate_batch(rows, n_new, 0.0, tools=False), 2)


speeds = [tokens_per_second(batch) for batch in batch_sizes]
fig, ax = figure(
    f"{batch_sizes[-1]} rows together are {speeds[-1] / speeds[0]:.0f} times as fast as one",
    "rows in the batch", "tokens per second, all rows",
    alt="Tokens per second over batch size, climbing less than in proportion.",
)  # fmt: skip
ax.plot(batch_sizes, speeds, "o-", label="measured")
ax.plot(batch_sizes, [speeds[0] * b for b in batch_sizes], ":", label="in proportion")
ax.set(xscale="log", yscale="log", xticks=batch_sizes, xticklabels=batch_sizes)
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
r"""
### What joining and leaving buys

Sixteen requests of different lengths, a table with four seats. With *fixed* batches four sit down
together, and the seats of those who finish stay empty until the slowest has finished. In the loop
the next one sits down at once. Below, every line is a request.
"""


# %%
def serve(engine, requests, before=0):
    """Run requests to their ends; the steps (after `before`) at which each began and ended."""
    rows = [engine.row(p, n, Sampling(0.0), 0, None, False) for p, n in requests]
    written = []  # tokens of each row after each step

    def watch():
        written.append([len(row.ids) for row in rows])
        return all(row.finish_reason for row in rows)

    engine.loop.run(rows, watch)
    columns = list(zip(*written))
    spans = [(sum(n == 0 for n in c) - 1, sum(n < c[-1] for n in c)) for c in columns]
    return [(before + first, before + last) for first, last in spans]


lengths = [4, 6, 8, 60, 5, 40, 7, 9, 50, 4, 6, 8, 10, 5, 30, 6]
requests = [([*prompt, 300 + i], n) for i, n in enumerate(lengths)]
seated = {}
four = Engine(model, tokenizer, max_batch=4)
start = time.perf_counter()
seated["fixed"] = []
for first in range(0, 16, 4):
    steps = max((last for _, last in seated["fixed"]), default=0)
    seated["fixed"] += serve(four, requests[first : first + 4], steps)
middle = time.perf_counter()
seated["joining and leaving"] = serve(four, requests)
seconds = {"fixed": middle - start, "joining and leaving": time.perf_counter() - middle}

# %%
fig, axes = plt.subplots(1, 2, figsize=(8, 2.6), sharex=True, layout="constrained", dpi=110)
for ax, (name, spans), color in zip(axes, seated.items(), COLORS):
    ax.barh(range(16), [b - a for a, b in spans], left=[a for a, _ in spans], color=color)
    steps = max(last for _, last in spans)
    ax.set_title(f"{name}: {steps} steps, {seconds[name]:.2f} s", fontsize=9, loc="left")
    ax.set_yticks(range(0, 16, 5))
    ax.invert_yaxis()
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("request", fontsize=9)
fig.supxlabel("step", fontsize=9)
fig.set_label("Bars of 16 requests over steps; fixed batches leave gaps, the loop leaves none.")
plt.show()

# %% [markdown]
r"""
The tokens are the same in both, and would be the same alone: no row looks at another.

### What remembering buys

A chat of six turns. Without memory the engine reads the whole conversation for every answer; with
`remember` it reads the new question. What it remembers has to be copied and looked at, so that line
may rise a little too, and times of milliseconds jitter. At the first turn there is nothing to
remember yet.
"""

# %%
engines = {"read it all again": engine, "remember": Engine(model, tokenizer, remember=2)}
first_token, written = {name: [] for name in engines}, {}
for name, one in engines.items():
    history = list(prompt)
    for turn in range(6):
        history += tokenizer.encode(document(world, 40 + turn))[:60]  # somebody says something
        stream = one.generate(history, 12, temperature=0.0, tools=False)
        start = time.perf_counter()
        next(stream)
        first_token[name].append((time.perf_counter() - start) * 1e3)
        history += [stream.row.ids[0], *(token.id for token in stream)]
    written[name] = history
assert written["remember"] == written["read it all again"]

# %%
fig, ax = figure(
    "With memory, a turn costs what is new in it", "turn", "ms to the first token", size=(5, 2.2),
    alt="Milliseconds to the first token over turns: rising without memory, lower with it.",
)  # fmt: skip
for (name, milliseconds), color in zip(first_token.items(), COLORS[1::-1]):
    ax.plot(range(1, 7), milliseconds, "o-", label=name, color=color)
ax.set(ylim=(0, None))
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
r"""
## Streaming and stopping

A puppet helps us look at the machinery: a "model" whose next token is written in a script. First
a text of characters that take up to four bytes, one byte per token. No piece is ever broken.
"""


# %%
class Puppet(torch.nn.Module):
    """Says the ids of a script, one after another, whatever it reads."""

    def __init__(self, script):
        super().__init__()
        self.config = GPTConfig(tokenizer.vocab_size, 256, 1, 1, 1, 2)
        self.script, self.device, self.compute_dtype = script, torch.device("cpu"), torch.float32

    def forward(self, idx, kv_cache, last_only):
        place = 0 if kv_cache.positions is None else int(kv_cache.positions)  # of the newest token
        kv_cache.advance(idx.size(1))
        logits = torch.zeros(len(idx), 1, tokenizer.vocab_size)
        logits[:, :, self.script[min(place, len(self.script) - 1)]] = 30.0
        return logits


end = tokenizer.special("assistant_end")
single_bytes = [tokenizer.encoding.encode_single_token(bytes([b])) for b in "é, 🐈!".encode()]
stream = Engine(Puppet([*single_bytes, end]), tokenizer).generate([1])
print([token.text for token in stream], stream.finish_reason)

# %% [markdown]
r"""
A person who has read enough presses Stop. The button sets an event; the engine looks at it
between two tokens. Every way to end has a name.
"""

# %%
pressed = threading.Event()
stream = engine.generate(prompt, max_tokens=200, seed=seed, stop=pressed)
for count, _ in enumerate(stream, start=1):
    if count == 5:
        pressed.set()
print("stopped:", count, stream.finish_reason)
print("budget: ", engine.generate_batch([prompt], 5, seed=seed)[0].finish_reason)
print("window: ", [len(c.ids) for c in engine.generate_batch([[7] * (seq_len - 3)], 50)])
try:
    engine.generate([7] * (seq_len + 1))
except UserError as error:
    print("refused:", error)

# %% [markdown]
r"""
## The calculator at work

The puppet now plays a well-trained assistant. It opens a call, writes the expression, closes it,
and would then say "0000". The forced tokens take that place.
"""

# %%
problem = arithmetic_problem(world, 3)
call, answer = problem["parts"][0]["text"], problem["parts"][2]["text"]
result = tokenizer.encode(calculate(call))
script = [tokenizer.special("python_start"), *tokenizer.encode(call)]
script += [tokenizer.special("python_end"), *tokenizer.encode("0") * (len(result) + 2)]
script += [*tokenizer.encode(answer), end]
stream = Engine(Puppet(script), tokenizer).generate([1], temperature=0.0)
print(problem["question"])
for token in list(stream)[: len(script) - len(tokenizer.encode(answer)) + 1]:
    shown = tokenizer.decode([token.id])
    print(f"{shown:18} {token.kind:8} {'forced' if token.forced else ''} {token.logprob:8.2f}")
print("text for the reader:", repr(stream.completion().text))

# %% [markdown]
r"""
The log-probability in the last column is the model's own, at temperature 1 and before any filter,
as reinforcement learning needs it: the model was sure of what it said, and would never have said
what was forced.

And here is what the model thinks of a sentence that it did not write:
"""

# %%
for entry in engine.token_probabilities(tokenizer.encode("The cat lives in", bos=True), top=3)[1:]:
    others = ", ".join(f"{text!r} {p:.2f}" for text, p in entry["top"])
    print(f"{entry['text']!r:10} {entry['probability']:.3f}   likeliest: {others}")

# %% [markdown]
r"""
## Programs we did not write

Some benchmarks ask for a Python function and run it (HumanEval, chapter 9). A filter on the text is
hopeless here; the program needs walls *around* it, made by the operating system. So we run it in a
child process, and let the child wall itself in before it looks at the program.

| danger | wall | where |
|---|---|---|
| runs forever | the parent kills it and all it started, after a time limit | everywhere |
| reads your keys from the environment | an environment without your variables | everywhere |
| prints without end | output is cut, the program killed | everywhere |
| eats memory, CPU, disk | resource limits | Linux, partly macOS |
| talks to the network | no network: namespace, no sockets: seccomp | Linux |
| fills the disk, file by file | a private file system of 64 MB, 4,096 files | Linux, mostly |
| reads or changes your files | Landlock: Python and its own folder only | Linux 5.13 or later |
| fork bombs, signals to others | seccomp refuses those system calls | Linux, x86-64 and ARM |

On macOS and Windows the lower half of the table is missing. There, run only programs that you
would run yourself, or use a container. `Result.protections` says what was there; we never
promise more. `tests/test_attacks.py` holds more than a hundred attacks, each of which must fail.

The limits first. They are one-way doors: a process can lower them and never raise them again.
"""

# %%
#| export sandbox
import contextlib
import ctypes
import json
import math
import os
import platform
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from dataclasses import dataclass
from importlib.util import find_spec

FILE_MB, FILE_SYSTEM_MB, MAX_FILES, MAX_PROCESSES, MAX_OPEN_FILES = 16, 64, 4096, 64, 64
START_SECONDS = 30.0  # what a busy machine may need to start Python and put up the walls


@dataclass
class Result:
    """What a program did. `protections` names the walls that stood on this machine (see text)."""

    ok: bool  # ended by itself, with exit code 0, within all limits
    stdout: str
    stderr: str
    timed_out: bool = False
    truncated: bool = False  # printed more than the output limit, and was stopped for it
    exit_code: int | None = None
    protections: tuple[str, ...] = ()
    finished: bool = False  # reached its last line; a program that exits before has not


# %%
#| export sandbox
def set_limits(timeout: float, memory_mb: int) -> list[str]:
    """Limit this process for good; return the names of the limits that the system took."""
    try:
        import resource
    except ImportError:  # Windows has none of these
        return []
    cpu, file_size = math.ceil(timeout) + 1, FILE_MB * 2**20
    wanted = {
        "cpu limit": ("RLIMIT_CPU", cpu),
        "memory limit": ("RLIMIT_AS", memory_mb * 2**20),
        "file-size limit": ("RLIMIT_FSIZE", file_size),
        "open-files limit": ("RLIMIT_NOFILE", MAX_OPEN_FILES),
        "process limit": ("RLIMIT_NPROC", MAX_PROCESSES),
        "no core dumps": ("RLIMIT_CORE", 0),
    }
    done = []
    for name, (constant, value) in wanted.items():
        try:
            resource.setrlimit(getattr(resource, constant), (value, value))
            done.append(name)
        except (AttributeError, ValueError, OSError):
            continue
    if os.getuid() == 0 and "process limit" in done:
        done.remove("process limit")  # the kernel does not count root's processes
    return done


# %% [markdown]
r"""
On Linux a process may step into a *namespace* of its own: a world with its own network, which
has no cables, and its own file systems. *Landlock* is a list of folders that may be read or
written from now on.
"""


# %%
#| export sandbox
def enter_namespaces(folder: str) -> list[str]:
    """Linux: leave the network and give `folder` its own small memory file system.

    Needs unprivileged user namespaces; raises OSError where they are switched off.
    """
    user, network, mounts = 0x10000000, 0x40000000, 0x00020000  # CLONE_NEWUSER, _NEWNET, _NEWNS
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(user | network | mounts) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    options = f"size={FILE_SYSTEM_MB}m,nr_inodes={MAX_FILES},mode=700".encode()
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 2 | 4, options) != 0:  # nosuid, nodev
        return ["network namespace"]
    os.chdir(folder)
    return ["network namespace", "private file system"]


# %%
#| export sandbox
def enter_namespaces_if_possible(folder: str) -> list[str]:
    """Try in a forked child first: a namespace that is entered by half cannot be left again."""
    child_id = os.fork()
    if child_id == 0:
        try:
            enter_namespaces(folder)
            os._exit(0)
        except BaseException:
            os._exit(1)
    works = os.waitpid(child_id, 0)[1] == 0
    return enter_namespaces(folder) if works else []


# %%
#| export sandbox
def readable_paths() -> list[str]:
    """Return what a Python program must be able to read: Python itself and shared libraries."""
    paths = {sys.prefix, sys.base_prefix, *filter(os.path.isabs, sys.path)}
    paths |= {"/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"}
    return sorted(path for path in paths if os.path.exists(path) and path != "/")


def restrict_files(folder: str) -> list[str]:
    """Linux 5.13 and later: Landlock. Read Python, read and write `folder`, touch nothing else.

    From version 6 of its interface on, signals and sockets to processes outside are cut as well.
    """
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    create, add, restrict = 444, 445, 446
    version = syscall(create, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return []
    rights = (1 << (13 + sum(version >= v for v in (2, 3, 5)))) - 1  # all the kernel knows
    network, scopes = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = struct.pack("QQQ", rights, network, scopes)[:size]
    handle = syscall(create, ruleset, ctypes.c_size_t(size), 0)
    read, read_folder, write = 1 << 2, 1 << 3, 1 << 1
    allowed = {path: read | read_folder for path in readable_paths()}
    allowed |= {"/dev/null": read | write, "/dev/urandom": read, folder: rights & ~1}
    for path, access in allowed.items():
        descriptor = os.open(path, os.O_RDONLY)
        access &= rights if os.path.isdir(path) else read | write
        rule = struct.pack("=Qi", access, descriptor)
        failed = syscall(add, handle, 1, rule, 0)
        os.close(descriptor)
        if failed:
            return []
    done = syscall(restrict, handle, 0) == 0
    os.close(handle)
    return ["landlock"] if done else []


# %% [markdown]
r"""
The last wall stands at the kernel's door. Every effect a program has on the world goes through a
system call, and *seccomp* lets us hand the kernel a little program, in a machine language of its
own, that judges each call. Ours refuses new processes, sockets, signals to others and all
administration. Threads stay allowed: they are `clone` with a flag. Changes of permissions get a
polite lie ("done"), because copying a file in Python ends with one.
"""

# %%
#| export sandbox
# Each line: what to answer, then name, number on x86-64, number on 64-bit ARM ("-": has none).
SYSTEM_CALLS = """
refuse fork 57 - vfork 58 - execve 59 221 execveat 322 281 socket 41 198 ptrace 101 117
refuse tkill 200 130 rt_sigqueueinfo 129 138 rt_tgsigqueueinfo 297 240 pidfd_send_signal 424 424
refuse pidfd_open 434 434 pidfd_getfd 438 438 process_vm_readv 310 270 process_vm_writev 311 271
refuse process_madvise 440 440 setns 308 268 unshare 272 97 mount 165 40 umount2 166 39
refuse pivot_root 155 41 chroot 161 51 fsopen 430 430 fsmount 432 432 move_mount 429 429
refuse open_tree 428 428 mount_setattr 442 442 open_by_handle_at 304 265 io_uring_setup 425 425
refuse io_uring_enter 426 426 bpf 321 280 perf_event_open 298 241 userfaultfd 323 282
refuse keyctl 250 219 add_key 248 217 request_key 249 218 memfd_create 319 279 shmget 29 194
refuse msgget 68 186 semget 64 190 mq_open 240 180 personality 135 92 setpriority 141 140
refuse sched_setscheduler 144 119 sched_setaffinity 203 122 sched_setattr 314 274 ioprio_set 251 30
refuse init_module 175 105 finit_module 313 273 delete_module 176 106 kexec_load 246 104
refuse kexec_file_load 320 294 reboot 169 142 swapon 167 224 swapoff 168 225 acct 163 89
refuse settimeofday 164 170 clock_settime 227 112 adjtimex 159 171 clock_adjtime 305 266
refuse sethostname 170 161 setdomainname 171 162 quotactl 179 60 syslog 103 116 setxattr 188 5
refuse lsetxattr 189 6 fsetxattr 190 7 removexattr 197 14 lremovexattr 198 15 fremovexattr 199 16
pretend chmod 90 - fchmod 91 52 fchmodat 268 53 fchmodat2 452 452 chown 92 - fchown 93 55
pretend lchown 94 - fchownat 260 54 utime 132 - utimes 235 - futimesat 261 - utimensat 280 88
absent clone3 435 435
threads clone 56 220
self kill 62 129 tgkill 234 131
selfzero prlimit64 302 261
"""


# %%
#| export sandbox
def filter_program(machine: str, pid: int) -> bytes | None:
    """Return the seccomp filter (classic BPF, 8 bytes an instruction) for this machine, or None."""
    column, arch = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}.get(machine, (0, 0))
    if not arch:
        return None
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, error = 0x7FFF0000, 0x00050000
    refuse, absent = error | 1, error | 38  # EPERM, ENOSYS

    def op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    program = op(load, 4) + op(equal, arch, 1, 0) + op(answer, refuse)  # a foreign call table
    program += op(load, 0) + op(at_least, 0x40000000, 0, 1) + op(answer, refuse)  # x32
    for line in SYSTEM_CALLS.strip().splitlines():
        action, *words = line.split()
        for number in (n for n in words[1 + column :: 3] if n != "-"):
            match = {  # the first argument of a call is at byte 16
                "refuse": op(answer, refuse),
                "pretend": op(answer, error),  # error number 0: "done", though nothing was
                "absent": op(answer, absent),
                "threads": op(load, 16) + op(any_bit, 0x10000, 0, 1) + op(answer, allow),
                "self": op(load, 16) + op(equal, pid, 0, 1) + op(answer, allow),
                "selfzero": op(load, 16) + op(equal, 0, 0, 1) + op(answer, allow),
            }[action]
            if action in ("threads", "self", "selfzero"):
                match += op(answer, refuse)
            program += op(equal, int(number), 0, len(match) // 8) + match
    return program + op(answer, allow)


# %%
#| export sandbox
def restrict_system_calls() -> list[str]:
    """Linux: refuse new processes, sockets, signals to others and all administration."""
    program = filter_program(platform.machine(), os.getpid()) if sys.maxsize > 2**32 else None
    libc = ctypes.CDLL(None, use_errno=True)
    if program is None:
        return []
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    zero = ctypes.c_ulong(0)
    done = libc.prctl(22, ctypes.c_ulong(2), header, zero, zero) == 0  # seccomp, filter
    return ["seccomp"] if done else []


# %% [markdown]
r"""
The child puts up all walls that the system has, one after another, and then runs the program.
"""


# %%
#| export sandbox
def protect(folder: str, timeout: float, memory_mb: int) -> list[str]:
    """Put up every wall this system offers around the current process; return their names."""
    done = ["scrubbed environment"]
    linux = sys.platform.startswith("linux")
    if hasattr(os, "nice"):
        os.nice(5)
    walls = [lambda: set_limits(timeout, memory_mb)]
    if linux:
        walls = [
            lambda: enter_namespaces_if_possible(folder),
            lambda: restrict_files(folder),
            *walls,
        ]
        walls += [restrict_system_calls]
    if linux:  # the promise never to gain privileges, which Landlock and seccomp ask for
        ctypes.CDLL(None).prctl(38, *map(ctypes.c_ulong, (1, 0, 0, 0)))
    for wall in walls:
        try:
            done += wall()
        except (OSError, AttributeError):
            continue
    return done


# %% [markdown]
r"""
One question is left: did the program do what it was run for? Exit status 0 says only that it did
not crash. HumanEval puts its tests behind a function that the model wrote. If that function calls
`sys.exit(0)`, the program ends before any test has failed, with status 0. So the parent sends a
random number along, the *proof*, and the child writes it to stderr after the program's last line.
Only then is `finished` true.

This catches every early exit. It does not catch a program that searches the interpreter's own
frames for the number: who shares a process with the judge can bribe him. Training on rewards
(chapter 10) finds such tricks, so read what is rewarded.
"""


# %%
#| export sandbox
def child() -> None:
    """Be the sandboxed process: read the request, put up the walls, run the code."""
    request = json.loads(sys.stdin.buffer.read())
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    walls = protect(os.getcwd(), request["timeout"], request["memory_mb"])
    print(json.dumps(walls), file=sys.stderr, flush=True)
    sys.argv, sys.path = ["program"], [*sys.path, os.getcwd()]
    try:
        exec(compile(request["code"], "<program>", "exec"), {"__name__": "__main__"})
    except Exception as error:
        trace = error.__traceback__.tb_next  # without our own frame
        traceback.print_exception(type(error), error, trace)
        sys.exit(1)
    os.write(2, request["proof"].encode())


if __name__ == "__main__" and sys.argv[0].endswith("sandbox.py"):
    child()


# %% [markdown]
r"""
The parent holds the clock and the knife. The clock starts when the child reports its walls: on a
busy machine, starting Python may take longer than the program. A program may have started others,
so all its kin is killed with it. What it prints is read while it runs, and who prints without end
is killed for that.
"""


# %%
#| export sandbox
def kill_tree(process: subprocess.Popen) -> None:
    """Kill a process and all that it started."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        command = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
        subprocess.run(command, capture_output=True, check=False)
    process.kill()


# %%
#| export sandbox
class Capture(threading.Thread):
    """Reads a pipe to its end, keeps the first `limit` bytes and calls `on_flood` beyond them."""

    def __init__(self, pipe, limit: int, on_flood):
        super().__init__(daemon=True)
        self.pipe, self.limit, self.on_flood = pipe, limit, on_flood
        self.data, self.flooded = bytearray(), False
        self.began = threading.Event()  # something came, or the end
        self.start()

    def run(self) -> None:
        while piece := self.pipe.read1(65536):
            self.began.set()
            room = self.limit - len(self.data)
            self.data += piece[:room]
            if len(piece) > room and not self.flooded:
                self.flooded = True
                self.on_flood()
        self.began.set()
        self.pipe.close()


def environment(folder: str) -> dict[str, str]:
    """Return the few variables a program sees: none of the caller's, HOME among the missing."""
    kept = {k: os.environ[k] for k in ("SYSTEMROOT", "SYSTEMDRIVE") if k in os.environ}
    threads = {k: "1" for k in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    return {"PATH": os.defpath, "TMPDIR": folder, "TEMP": folder, "TMP": folder, **threads, **kept}


# %%
#| export sandbox
def run_python(
    code: str, timeout: float = 5.0, memory_mb: int = 256, output_limit: int = 65536
) -> Result:
    """Run a Python program in a limited child process and return its Result.

    `timeout` is in seconds of wall-clock time from the moment at which the walls are up and the
    program begins, `memory_mb` counts address space, `output_limit` is in bytes for each of stdout
    and stderr. The program starts in an empty folder that is deleted afterwards; it has no input,
    no environment, no children and, where the system allows, no network and no other files. See
    `Result.protections`; without "landlock" and "seccomp" among them, run only code that you would
    run yourself.
    """
    script = find_spec("nanochat.sandbox").origin
    detach = {"start_new_session": True} if os.name == "posix" else {"creationflags": 0x200}
    pipe, timed_out, proof = subprocess.PIPE, False, secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="nanochat-", ignore_cleanup_errors=True) as folder:
        folder = os.path.realpath(folder)
        process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", script], stdin=pipe, stdout=pipe, stderr=pipe,
            cwd=folder, env=environment(folder), **detach,
        )  # fmt: skip
        captures = [
            Capture(stream, output_limit + extra, lambda: kill_tree(process))
            for stream, extra in ((process.stdout, 0), (process.stderr, 1024))
        ]
        request = {"code": code, "timeout": timeout, "memory_mb": memory_mb, "proof": proof}
        try:
            process.stdin.write(json.dumps(request).encode())
            process.stdin.close()
        except OSError:  # the child died early; its stderr says why
            pass
        try:
            captures[1].began.wait(START_SECONDS)  # the walls come first on stderr
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            kill_tree(process)
            exit_code = process.wait()
        for capture in captures:
            capture.join(1.0)  # no longer: what escaped may hold the pipe open
    return make_result(exit_code, timed_out, proof, *captures)


# %%
#| export sandbox
def make_result(exit_code: int, timed_out: bool, proof: str, out: Capture, err: Capture) -> Result:
    """Put a Result together of what stderr holds: the child's walls, its text, and the proof."""
    first, _, stderr = err.data.decode("utf-8", "replace").partition("\n")
    walls = tuple(json.loads(first)) if first.startswith("[") else ()
    stderr = stderr if walls else err.data.decode("utf-8", "replace")
    flooded = out.flooded or err.flooded
    ok = exit_code == 0 and not timed_out and not flooded
    stdout = out.data.decode("utf-8", "replace")
    text = stderr.replace(proof, "")
    return Result(ok, stdout, text, timed_out, flooded, exit_code, walls, text != stderr)


# %%
print("walls here:", ", ".join(run_python("pass").protections))

# %%
programs = {
    "good": "import numpy as np; print(np.arange(5).sum())",
    "own files": "open('a.txt', 'w').write('mine'); print(open('a.txt').read())",
    "endless loop": "while True: pass",
    "memory bomb": "x = 'a' * 10**11",
    "output flood": "while True: print('spam' * 100)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "network": "import socket; socket.create_connection(('127.0.0.1', 80), 1)",
    "your files": "print(open('/etc/passwd').read())",
    "kill its parent": "import os; os.kill(os.getppid(), 9)",
    "your secrets": "import os; print(os.environ.get('HOME'))",
    "an early exit": "import sys; sys.exit(0)",
}
for name, code in programs.items():
    done = run_python(code, timeout=1.5)
    last = (done.stderr.strip().splitlines() or [done.stdout[:20].strip()])[-1]
    how = "time is up" if done.timed_out else "output cut" if done.truncated else last
    print(f"{name:16} ok={done.ok!s:6} finished={done.finished!s:6} {how[:64]}")

# %%
#| test
assert run_python("print(6 * 7)").stdout == "42\n"
assert run_python("while True: pass", timeout=0.5).timed_out
assert "ZeroDivisionError" in run_python("1/0").stderr
_early, _whole = run_python("import sys; sys.exit(0)"), run_python("print('tested')")
assert _early.ok and _whole.ok and _whole.finished and not _early.finished

# %% [markdown]
r"""
## Guessing ahead (optional)

A step for nine tokens costs little more than a step for one, as long as memory is the limit. So if
we *guess* the next eight tokens, one pass tells how many of them the model would have written, and
we keep those (*speculative decoding*; Leviathan et al. 2023). A small second model may guess. But
text also repeats itself: we look for the last place where the last two tokens stood together, and
propose what followed them there (*prompt lookup*). A wrong guess costs a little time and never a
token: a pass always yields one token that is the model's own.
"""


# %%
#| export engine
def look_up(ids: list[int], n: int) -> list[int]:
    """Return up to n ids that followed the last two ids where they last stood before."""
    for place in range(len(ids) - 3, -1, -1):
        if ids[place : place + 2] == ids[-2:]:
            return ids[place + 2 : place + 2 + n]
    return []


@torch.inference_mode()
def generate_with_lookup(
    model: GPT, prompt: Sequence[int], n_new: int, draft: int = 8
) -> tuple[list[int], int]:
    """Return the greedy continuation, n_new ids, and how many passes of the model it took.

    Each pass checks up to `draft` ids that `look_up` proposes (Saxena 2023, prompt lookup).
    """
    total, passes = len(prompt) + n_new, 0
    cache = KVCache(model.config, 1, total, model.device, model.compute_dtype)
    ids, new = list(prompt), list(prompt)
    while len(ids) < total:
        guess = look_up(ids, min(draft, total - len(ids) - 1))
        logits = model(torch.tensor([new + guess], device=model.device), kv_cache=cache)
        best = logits[0, len(new) - 1 :].argmax(dim=-1).tolist()  # after new, and after each guess
        right = next((i for i, id in enumerate(guess) if id != best[i]), len(guess))
        ids += best[: right + 1]
        cache.length -= len(guess) - right  # what was guessed wrongly has never been read
        cache.last = last_embedding(model, torch.tensor([ids[-2:-1]], device=model.device))
        new, passes = ids[-1:], passes + 1
    return ids[len(prompt) :], passes


# %%
start = time.perf_counter()
guessed, passes = generate_with_lookup(model, prompt, naive_tokens)
seconds = time.perf_counter() - start
assert guessed == naive_ids[len(prompt) :]
print(f"{naive_tokens} tokens in {passes} passes, {seconds:.2f} s; one by one "
      f"{cached_seconds[-1]:.2f} s; the same tokens")  # fmt: skip

# %% [markdown]
r"""
Our model walks in circles, so the guesser has an easy life here. Ordinary prose repeats itself less
than code and quotations do. Sampled text needs a rule for accepting guesses that keeps the
distribution; greedy text needs only equality.

## The signature result

Eight prompts of different lengths, 40 tokens each, greedy. The same model, the same machine,
three ways. The baseline is the naive writer; the control is that all three write *exactly* the
same tokens.
"""

# %%
texts = [document(world, 100 + i) for i in range(8)]
prompts = [tokenizer.encode(text, bos=True)[: 8 + 5 * i] for i, text in enumerate(texts)]
options = dict(max_tokens=40, temperature=0.0, tools=False)


def ended(ids):
    """ids up to the token that ends a text, as the engine cuts them."""
    stops = [i for i, id in enumerate(ids) if id in (tokenizer.bos_id, end)]
    return ids[: stops[0] + 1] if stops else ids


ways = {
    "naive, one by one": lambda: [
        ended(naive_generate(model, p, 40)[0][len(p) :]) for p in prompts
    ],
    "cache, one by one": lambda: [[t.id for t in engine.generate(p, **options)] for p in prompts],
    "cache, one batch": lambda: [c.ids for c in engine.generate_batch(prompts, **options)],
}
outputs, rates = {}, {}
for name, way in ways.items():
    start = time.perf_counter()
    outputs[name] = way()
    rates[name] = sum(map(len, outputs[name])) / (time.perf_counter() - start)
assert outputs["naive, one by one"] == outputs["cache, one by one"] == outputs["cache, one batch"]
for name, rate in rates.items():
    print(f"{name:18} {rate:7.0f} tokens/s   {rate / rates['naive, one by one']:5.1f} x")

# %%
fig, ax = figure(
    f"The same tokens, {rates['cache, one batch'] / rates['naive, one by one']:.0f} times as fast",
    "tokens per second", "", size=(5, 2),
    alt="Bars of tokens per second: naive, with cache, and with cache in a batch.",
)  # fmt: skip
ax.barh(list(rates)[::-1], list(rates.values())[::-1], color=COLORS[:3])
plt.show()
folder.cleanup()

# %% [markdown]
r"""
## Recap

`nanochat` can write now:
- `Engine(model, tokenizer)` with `generate` (a `Stream` of `Token`), `generate_batch` (a list of
  `Completion`) and `token_probabilities`; `Sampling` holds the knobs. Requests share its `Loop`;
  `remember` keeps what a chat has read; on CUDA steps are recorded and looked at late, and reading
  a prompt is recorded too, and up to sixteen rows are read by the kernels of `nanochat.decode`
  (appendix A6);
- `KVCache`, `RingCache`, `sample`, `next_token_probabilities` and `generate_with_lookup` for
  those who build their own loop;
- `nanochat.calculator`: `calculate`, and `ToolCalls` that answers calls in a stream of tokens;
- `nanochat.sandbox.run_python` with `Result` for programs of strangers;
- `bench`, which `python -m nanochat bench` and `benchmarks/inference.py` call.

**Pitfalls, all of them met in real projects**
- A time limit made of signals works in the main thread of a POSIX system only. Limits on the
  calculator's *input* work everywhere.
- Removing all commas before computing breaks `"a,b".count(",")`: the tool then lies.
- Printing each token's own text breaks every character that spans tokens.
- One random generator for a batch: all rows change when one row is added.
- Keys and values kept across turns while the weights are trained. Forget them (`refresh`).
- A head padded to a round size has logits for tokens that do not exist. They must not be drawn.
- A sandbox that removes functions from modules is not a wall: the program can import them anew.
- Exit status 0 taken for "all tests passed": `sys.exit(0)` has it too.

**Readings**
- Pope et al. (2022), *Efficiently Scaling Transformer Inference*: the roofline of decoding, in
  full.
- Williams, Waterman, Patterson (2009), *Roofline: an insightful visual performance model*.
- Holtzman et al. (2019), *The Curious Case of Neural Text Degeneration*: why greedy text is
  dull, and top-p.
- Yu et al. (2022), *Orca: A Distributed Serving System for Transformer-Based Generative Models*:
  rows that join and leave; Kwon et al. (2023), *Efficient Memory Management for Large Language
  Model Serving with PagedAttention*: caches for many users.
- Leviathan, Kalman, Matias (2023), *Fast Inference from Transformers via Speculative Decoding*.
- The Linux kernel's documentation of Landlock and of seccomp filters.
"""
