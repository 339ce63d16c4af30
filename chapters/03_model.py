# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# 3. The model

By the end of this chapter you have written the GPT that the rest of the book trains, and you have
shown five things about it: it starts with a loss of exactly $\ln V$, it cannot look into the
future, its cost per token follows from its sizes by a formula, without attention or positions it
is no better than a table of token pairs, and in a short run two more numbers in each layer make it
learn faster.
"""

# %%
import torch

from nanochat.model import GPT, GPTConfig

config = GPTConfig.for_depth(4, vocab_size=2048, seq_len=256, head_dim=64)
model = GPT(config)
logits = model(torch.tensor([[11, 42, 7]]))
print(f"{model.num_params()['total']:,} parameters turn 3 ids into logits {tuple(logits.shape)}")

# %% [markdown]
r"""
That is the finished thing: ids go in, and for every position a score for every token of the
vocabulary comes out. The score says how likely that token is to come *next*. Everything a chat
model does, from spelling to sums, is this one function called again and again.

**What you will be able to do**

- explain what each line of a GPT computes, with its shapes;
- write attention as a loop, as three matrix products, and as one library call, and prove them
  equal;
- show that rotary positions make scores depend on distance alone;
- derive parameters and FLOPs from the depth, and check both against a counter;
- measure what a design choice is worth, beside a baseline and a control, and say when a run
  cannot tell;
- build nanochat's modern model from its classic one, one field at a time.

**Before you start**: chapters 1 and 2 (tokens and batches); matrix products; PyTorch tensors.
Reading takes an hour, running under a minute on two CPU cores. No GPU is needed.
"""

# %% tags=["parameters"]
profile = "quick"
steps = 110  # training steps per variant in section 8; a third of that in section 9
seeds = 1  # more seeds give error bars, and take as much longer

# %%
#| default_exp model

# %%
#| export
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# %%
import time

import matplotlib.pyplot as plt

from nanochat.common import COLORS, figure, seed_everything

# %% [markdown]
r"""
## 1. The shape of the thing

A language model is a function from a prefix to a distribution over the next token. A
*decoder-only transformer* computes all prefixes of a text at once. It keeps one vector of
`n_embd` numbers per position, the **residual stream**, and passes it through `n_layer` blocks. A
block does two things, and *adds* the result of each to the stream:

- **attention** moves information between positions: what have earlier tokens to tell this one?
- the **MLP** works on each position alone: what follows from what is now known here?

Shapes are written with the same letters throughout: B rows in a batch, T positions, C = `n_embd`
channels, H heads of D channels, V tokens in the vocabulary.
"""


# %%
def draw_model():
    """Draw the residual stream from ids to logits."""
    fig, ax = plt.subplots(figsize=(7, 1.7), dpi=110, layout="constrained")
    fig.set_label("Eight boxes in a row from ids to logits; attention and MLP repeat as a block.")
    ax.set_title("Each block adds to the stream twice", fontsize=10, loc="left")
    boxes = "ids\n(B, T)|embedding|norm|+ attention|+ MLP|norm|head|logits\n(B, T, V)".split("|")
    for i, label in enumerate(boxes):
        face = "#dcecf7" if label[0] == "+" else "#f2f2f2"
        ax.add_patch(plt.Rectangle((i * 1.3, 0), 1.1, 1, facecolor=face, edgecolor="#444444"))
        ax.text(i * 1.3 + 0.55, 0.5, label, ha="center", va="center", fontsize=8)
        if i:
            ax.annotate("", (i * 1.3, 0.5), (i * 1.3 - 0.2, 0.5), arrowprops=dict(arrowstyle="->"))
    ax.plot([3.8, 3.8, 6.4, 6.4], [-0.15, -0.3, -0.3, -0.15], color="#444444")
    ax.text(5.1, -0.62, "a block, n_layer times", ha="center", fontsize=8)
    ax.set(xlim=(-0.1, 10.4), ylim=(-0.9, 1.1))
    ax.axis("off")
    plt.show()


draw_model()

# %% [markdown]
r"""
All sizes follow from a handful of numbers. We keep them in one dataclass. `for_depth` is the
book's **one dial**: give it a number of layers and it derives the width (64 channels per layer) and
the number of heads. The fields after `n_embd`, and the methods that read them, belong to section 9.
Until then they are off, and the model is the *classic* one.
"""


# %%
#| export
@dataclass
class GPTConfig:
    """Sizes of a GPT, and its additions to the classic model (section 9), all of them off.

    `for_depth` derives the sizes from one dial, the number of layers.
    """

    vocab_size: int = 32768
    seq_len: int = 2048
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    rope_base: float = 10000.0
    qk_scale: float = 1.0  # of queries and keys after their norm
    vocab_multiple: int = 1  # both vocabulary tables are padded up to a multiple of this
    value_embeddings: bool = False
    residual_scalars: bool = False
    smear: bool = False
    backout: bool = False
    windows: str = "L"  # pattern over the layers: L sees everything, S a quarter; the last is L

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together, with the sizes in the sentence."""
        if not self.windows or set(self.windows) - set("LS"):
            raise ValueError(f"windows {self.windows!r} must be made of the letters L and S.")
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head or self.head_dim % 2:
            raise ValueError(
                f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head} with an even "
                f"quotient, and n_head a multiple of n_kv_head {self.n_kv_head}."
            )

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab(self) -> int:
        """Rows of the vocabulary tables: vocab_size, or the next multiple of vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def window_sizes(self) -> list[int | None]:
        """For each layer, how many earlier tokens it sees, or None for all of them."""
        short = -(-self.seq_len // (4 * 128)) * 128
        letters = [self.windows[i % len(self.windows)] for i in range(self.n_layer - 1)] + ["L"]
        return [short if c == "S" and short < self.seq_len else None for c in letters]

    def value_layers(self) -> list[int]:
        """Layers that have value embeddings: every other one, the last included."""
        every_other = range((self.n_layer - 1) % 2, self.n_layer, 2)
        return list(every_other) if self.value_embeddings else []

    def additions(self) -> list[str]:
        """Names of the fields in which this differs from the classic model."""
        return [name for name in MODERN if getattr(self, name) != getattr(GPTConfig, name)]

    @classmethod
    def for_depth(
        cls,
        depth: int,
        vocab_size: int,
        seq_len: int,
        aspect: int = 64,
        head_dim: int = 128,
        **additions: Any,
    ) -> "GPTConfig":
        """Derive the sizes from the depth: width `aspect * depth`, heads of `head_dim` channels.

        The width is rounded up to a whole number of heads (nanochat's rule).
        """
        n_head = math.ceil(aspect * depth / head_dim)
        return cls(vocab_size, seq_len, depth, n_head, n_head, n_head * head_dim, **additions)

    @classmethod
    def classic(cls, *sizes: int, **named: int) -> "GPTConfig":
        """The model of nanochat's first recipe: sizes as in `for_depth`, no additions."""
        return cls.for_depth(*sizes, **named)

    @classmethod
    def modern(cls, *sizes: int, **named: int) -> "GPTConfig":
        """The model of nanochat's recipe of 2026: sizes as in `for_depth`, every addition."""
        return cls.for_depth(*sizes, **named, **MODERN)

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes as a plain dict; `GPTConfig(**d)` reads it back."""
        return asdict(self)


# %% [markdown]
r"""
The *modern* model has all of section 9's fields set, to these values.
"""

# %%
#| export
MODERN = dict(
    rope_base=100000.0,
    qk_scale=1.2,
    vocab_multiple=64,
    value_embeddings=True,
    residual_scalars=True,
    smear=True,
    backout=True,
    windows="SSSL",
)


# %%
for depth in (2, 4, 12, 20):
    size = GPTConfig.for_depth(depth, vocab_size=32768, seq_len=2048)
    print(f"depth {depth:2d}: width {size.n_embd:4d}, heads {size.n_head:2d} of {size.head_dim}")

# %% [markdown]
r"""
Two helpers come first. **`Linear`** stores its weights in float32, where the optimizer can make
tiny changes, but multiplies in the dtype of its input. Feed it bfloat16 and the product runs on
the fast units of the hardware; no context manager decides behind our back. There are no biases
anywhere in this model: they cost little and bring nothing.

**RMSNorm** keeps the stream's vectors at a common size. It divides a vector by its root mean
square,

$$\operatorname{norm}(x) = \frac{x}{\sqrt{\frac1C\sum_i x_i^2}},$$

and, unlike LayerNorm, neither subtracts a mean nor learns a scale.
"""


# %%
#| export
class Linear(nn.Linear):
    """A linear layer without bias: float32 weights, multiplied in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return F.linear(x, self.weight.to(x.dtype))


def rms_norm(x: Tensor) -> Tensor:
    """Divide each vector of x (..., C) by its root mean square. Zhang and Sennrich (2019)."""
    return F.rms_norm(x, (x.size(-1),))


# %%
#| test
x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) * 100
assert torch.allclose(rms_norm(x).square().mean(-1), torch.ones(5), atol=1e-4)
assert torch.allclose(rms_norm(x), rms_norm(3 * x), atol=1e-5)  # size is forgotten, direction kept

# %% [markdown]
r"""
## 2. Attention, three times

In *Mira lost her ring and looked for it*, the stream at *it* can know what was lost only if
something moves there from *ring*. Attention moves it. Position $t$ asks a question, its **query**
$q_t$. Every earlier position $s \le t$ has a **key** $k_s$ that says what it offers and a **value**
$v_s$ that it hands over. The match $q_t\cdot k_s$, scaled and pushed through a softmax, says how
much of each value to take:

$$y_t = \sum_{s\le t} w_{ts}\, v_s,\qquad
w_{t\cdot} = \operatorname{softmax}_s\!\left(\frac{q_t\cdot k_s}{\sqrt D}\right).$$

Written as it reads, it is two loops.
"""


# %%
def attend_loops(q, k, v):
    """Attention of one head as the formula reads; q, k, v (T, D)."""
    rows = []
    for t in range(len(q)):
        scores = torch.stack([q[t] @ k[s] / q.size(1) ** 0.5 for s in range(t + 1)])
        weights = scores.softmax(0)
        rows.append(sum(w * v[s] for s, w in enumerate(weights)))
    return torch.stack(rows)


def attend_matrix(q, k, v):
    """The same as three matrix operations: scores, a mask for the future, a weighted sum."""
    T, D = q.shape[-2:]
    scores = q @ k.mT / D**0.5  # (..., T, T)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ v


# %% [markdown]
r"""
The second form does all positions at once. The mask puts $-\infty$ where a query would look
ahead, which the softmax turns into a weight of zero. It still builds the $T\times T$ matrix of
scores. The third form is PyTorch's `scaled_dot_product_attention`, which computes the same
numbers block by block and never stores that matrix. On a GPU it chooses among several kernels; on
NVIDIA's Hopper it takes the fastest, cuDNN's, by itself (appendix A3 measures them). That one we
keep.

Two details make `attend` ready for real use. With **grouped queries**, several query heads share
one key and value head, which shrinks the cache of chapter 8. And when there are more keys than
queries, because earlier keys come from that cache, the queries are the *last* of the positions.
"""


# %%
#| export
def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention of q (B, H, T, D) over k, v (B, H_kv, S, D), S >= T; returns (B, H, T, D).

    The T queries are the last T of the S positions. `mask` (B, 1, T, S), True where a query may
    look, replaces the causal rule (rows of different lengths in one batch, chapter 8).
    """
    n_new, n_all = q.size(2), k.size(2)
    if mask is None and 1 < n_new < n_all:
        mask = torch.ones(n_new, n_all, dtype=torch.bool, device=q.device).tril(n_all - n_new)
    causal = mask is None and n_new > 1
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )


# %%
seed_everything(0)
q, k, v = torch.randn(3, 1, 1, 256, 64)


def milliseconds(function, repeats):
    """Best time of a few calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


loops = attend_loops(q[0, 0], k[0, 0], v[0, 0])
for name, result in {"matrix": attend_matrix(q, k, v), "kept": attend(q, k, v)}.items():
    print(f"{name:6s} differs from the loops by at most {(result - loops).abs().max():.1e}")
slow = milliseconds(lambda: attend_loops(q[0, 0], k[0, 0], v[0, 0]), 1)
fast = milliseconds(lambda: attend(q, k, v), 20)
print(
    "the loops take",
    "more" if slow > 100 * fast else "less",
    "than 100 times as long as the kept form",
)

# %% [markdown]
r"""
> **Exercise 3.1.** Before you run it: how many numbers does `attend_matrix` store for its scores
> with 16 heads, a batch of 8 and 4,096 tokens? How many gigabytes is that in float32? *(Predict,
> then compute.)*

## 3. Where am I? Rotary positions

Attention as written has no idea of order: shuffle the earlier tokens and each query still finds the
same keys. Rotary embedding tells the position by *turning* queries and keys. Take the channels in
pairs, and turn pair $i$ at position $t$ by the angle $t\,\theta_i$, with $\theta_i =
10000^{-2i/D}$: fast for the first pairs, hardly at all for the last. When two vectors that were
turned by $t\theta$ and $s\theta$ meet in a dot product, only the difference $(t-s)\theta$ is left.
With $\theta=0.1$, a query at 20 and a key at 15 are turned by 2.0 and 1.5, at 50 and 45 by 5.0 and
4.5: the angle between them changes by 0.5 both times.
"""


# %%
#| export
def rotary_angles(seq_len: int, head_dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (seq_len, head_dim / 2) float32, of position times frequency."""
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + D/2) of x (B, T, H, D) by their angles. Su et al. (2021).

    cos and sin are (T, D/2), or (B, T, D/2) when rows of a batch stand at different positions.
    The turn is clockwise, as in nanochat: scores depend on the distance either way.
    """
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)  # (..., T, 1, D/2)
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos + right * sin, right * cos - left * sin), dim=-1)


# %%
#| test
cos, sin = rotary_angles(64, 16)
q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))


def score_at(t, s):
    return (
        rotate(q, cos[t : t + 1], sin[t : t + 1]) * rotate(k, cos[s : s + 1], sin[s : s + 1])
    ).sum()


assert torch.allclose(score_at(20, 15), score_at(50, 45), atol=1e-4)  # same distance, same score
assert not torch.allclose(score_at(20, 15), score_at(20, 10), atol=1e-2)

# %%
ones = torch.ones(1, 1, 1, 64)
cos, sin = rotary_angles(256, 64)
still = rotate(ones, cos[:1], sin[:1])
scores = [
    (still * rotate(ones, cos[d : d + 1], sin[d : d + 1])).sum().item() / 64 for d in range(256)
]
fig, ax = figure(
    "The same query and key match less as they move apart",
    "distance (tokens)",
    "score (1 = no distance)",
    alt="A curve that starts at 1, falls fast within 20 tokens and then wavers around a low value.",
)
ax.plot(scores)
ax.axhline(0, color="#444444", linewidth=0.6)
plt.show()

# %% [markdown]
r"""
The picture shows what the angles alone do to two equal vectors: near neighbours match well,
distant ones less, with ripples. A head that wants to look far away can put its content into the
slow channels, which hardly turn at all.

> **Play.** Change the base from 10,000 to 100 in `rotary_angles(256, 64, base=100.0)` and draw
> the curve again. Which base would you choose for texts of 100,000 tokens?

The attention layer puts it together: four linear maps, a norm on queries and keys, the turn, and
`attend`. The **QK norm** bounds every score by $\sqrt D$, so no head can drive its softmax into a
corner early in training. A turn changes no length, so norm and turn may come in either order; in
this one the gradient of both is one pass over memory, for a compiler. (`window`, `gate` and
`qk_scale` belong to section 9.) If a `kv_cache` is given (chapter 8), it stores the new keys and
values and gives back all of them.
"""


# %%
#| export
class Attention(nn.Module):
    """Causal self-attention with grouped queries, rotary positions and normalised q and k."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.config, self.window = layer, config, config.window_sizes()[layer]
        kv_width = config.n_kv_head * config.head_dim
        self.q = Linear(config.n_embd, config.n_embd)
        self.k = Linear(config.n_embd, kv_width)
        self.v = Linear(config.n_embd, kv_width)
        self.proj = Linear(config.n_embd, config.n_embd)
        self.gate = ValueGate(config) if layer in config.value_layers() else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: Any = None, value: Tensor | None = None
    ) -> Tensor:
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.config.n_head, -1)  # (B, T, H, D)
        k = self.k(x).view(B, T, self.config.n_kv_head, -1)  # (B, T, H_kv, D)
        v = self.v(x).view(B, T, self.config.n_kv_head, -1)
        v = v if self.gate is None else self.gate(x, v, value)  # section 9
        q, k = (rotate(self.config.qk_scale * rms_norm(t), cos, sin) for t in (q, k))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        mask = None
        if kv_cache is not None:
            k, v = kv_cache.update(self.layer, k, v)  # (B, H_kv, S, D)
            mask = kv_cache.mask
        if self.window is None:
            y = attend(q, k, v, mask)
        else:
            y = attend_window(q, k, v, mask, self.window)  # section 9
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


# %% [markdown]
r"""
## 4. The MLP and the block

The MLP widens each vector fourfold, applies a nonlinearity and narrows it again. We use the
**squared ReLU**: zero for negative inputs, $x^2$ for positive ones. It is cheap, it has no corner
at zero, and many of its outputs are exactly zero.

A block adds both parts to the stream. Each part reads a *normalised copy* and writes into the
*raw* stream, so the stream itself is never squeezed, and the gradient has a free path from the
loss to the embedding.
"""


# %%
#| export
class MLP(nn.Module):
    """The two-layer perceptron of a block, four times as wide inside, with squared ReLU."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = Linear(config.n_embd, 4 * config.n_embd)
        self.down = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    """One layer: attention, then MLP, each added to the residual stream it has normalised."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attention, self.mlp = Attention(config, layer), MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: Any = None, value: Tensor | None = None
    ) -> Tensor:
        x = x + self.attention(rms_norm(x), cos, sin, kv_cache, value)
        return x + self.mlp(rms_norm(x))


# %% [markdown]
r"""
## 5. From logits to loss

The last norm and a linear **head** give one logit per token of the vocabulary. Two things happen
before the softmax. The logits become float32, because a sum over thousands of exponentials is no
place for 8 bits of precision. And a **softcap**, $15\tanh(z/15)$, keeps them between -15 and 15:
no single logit can run away.
"""

# %%
z = torch.linspace(-40, 40, 200)
fig, ax = figure(
    "The softcap spares small logits and stops large ones",
    "logit before",
    "logit after",
    alt="An S-shaped curve along the diagonal near zero, flat at plus and minus 15.",
)
ax.plot(z, z, color="#999999", linewidth=0.8, label="no cap")
ax.plot(z, 15 * torch.tanh(z / 15), label="15 tanh(z / 15)")
ax.set_ylim(-20, 20)
ax.legend(fontsize=8, frameon=False)
plt.show()

# %% [markdown]
r"""
The loss is the cross-entropy: the surprise $-\ln p$ of the token that really came next, in
**nats**, averaged. A token that had $p=1/2$ costs 0.69 nats, one with $p=1/2048$ costs 7.62.
Targets of -1 do not count; fine-tuning uses that to train on the assistant's words only. If *no*
target counts, the sum is zero and so is our mean. The obvious mean of `F.cross_entropy` divides 0
by 0 there and poisons the weights with NaN, a bug that real projects have shipped.
"""


# %%
#| export
def token_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of logits (B, T, V) against targets (B, T); targets -1 are ignored.

    "mean" and "sum" are over the targets that count, "none" gives (B, T). A mean over no
    targets is 0, not NaN: a micro-batch whose targets are all masked is harmless.
    """
    loss = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none"
    ).view_as(targets)
    return reduced(loss, targets, reduction)


def reduced(loss: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Reduce losses (B, T), 0 where a target is -1, as `token_loss` says."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / (targets != -1).sum().clamp(min=1)


# %%
#| test
logits = torch.zeros(1, 4, 10)
assert torch.isclose(token_loss(logits, torch.tensor([[1, 2, 3, 4]])), torch.tensor(10.0).log())
assert token_loss(logits, torch.full((1, 4), -1)) == 0  # nothing to learn, no NaN

# %% [markdown]
r"""
The logits are by far the largest thing in a training step: with a vocabulary of 32,768, 65,536
tokens have 4 GB of them in two bytes each. On a GPU a compiler (`torch.compile`, chapter 5) reads
them once for the loss and once more for the gradient, if the formula allows it. `F.cross_entropy`
first looks for the largest logit of a row, lest an exponential overflow, and its gradient sums over
the row again. Softcap and loss written together need neither. Capped logits lie between $-c$ and
$c$, so we subtract $c$ and not the largest: no exponent is above 0 or below $-2c=-30$, which
float32 holds with ease. And $c\tanh(z/c)-c$ is $-2c\,\sigma(-2z/c)$, with a sigmoid $\sigma$ that
is cheaper than a tanh. The logit of the target is a sum over the row with all others set to zero. A
compiled model computes its loss so; the test says that it is the same loss.
"""


# %%
#| export
def capped_loss(logits: Tensor, targets: Tensor, cap: float) -> Tensor:
    """`token_loss(cap * tanh(logits / cap), targets, "none")` as a compiler likes it: (B, T)."""
    below = -2 * cap * torch.sigmoid(logits * (-2 / cap))  # the capped logits, less the cap
    chosen = torch.arange(logits.size(-1), device=logits.device) == targets.unsqueeze(-1)
    loss = below.exp().sum(-1).log() - torch.where(chosen, below, 0.0).sum(-1)
    return torch.where(targets == -1, 0.0, loss)


# %%
#| test
logits, targets = 40 * torch.randn(2, 3, 10), torch.tensor([[1, 2, -1], [0, 9, 5]])
expected = token_loss(15 * torch.tanh(logits / 15), targets, "none")
assert torch.allclose(capped_loss(logits, targets, 15.0), expected, atol=1e-5)

# %% [markdown]
r"""
## 6. The whole model

The model is the picture from section 1 in code. Two parts come first.

The angles of all positions are computed once, and a call only slices them. With a cache the new
tokens stand after those in it; when the rows of a batch have got to different lengths, the cache
knows the position of each (chapter 8).
"""


# %%
#| export
class Rotary(nn.Module):
    """Cos and sin of the rotary angles of every position; no checkpoint holds them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        cos, sin = rotary_angles(config.seq_len, config.head_dim, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, n_new: int, kv_cache: Any = None) -> tuple[Tensor, Tensor]:
        """Return cos and sin, (n_new, D/2) or (B, n_new, D/2), of the positions after the cache.

        Raises ValueError when they run past seq_len.
        """
        start = 0 if kv_cache is None else kv_cache.length
        if start + n_new > len(self.cos):
            raise ValueError(f"{start + n_new} tokens do not fit in seq_len {len(self.cos)}.")
        if kv_cache is not None and kv_cache.positions is not None:  # (B, n_new)
            return self.cos[kv_cache.positions], self.sin[kv_cache.positions]
        return self.cos[start : start + n_new], self.sin[start : start + n_new]


# %% [markdown]
r"""
And there are four places where section 9 will add something: at the start of the stream, before
each block, to the values of attention, and at the end. The classic model adds nothing there.
"""


# %%
#| export
class NoAdditions(nn.Module):
    """The four places where a model may add to the classic one, with nothing added."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.ModuleDict()  # tables of value embeddings, by layer

    def smear(self, x: Tensor, kv_cache: Any = None) -> Tensor:
        return x

    def mix(self, layer: int, x: Tensor, start: Tensor) -> Tensor:
        return x

    def value(self, layer: int, idx: Tensor) -> Tensor | None:
        return None

    def back_out(self, x: Tensor, middle: Tensor) -> Tensor:
        return x

    def init_weights(self, draw: Callable[[Tensor, float], None]) -> None:
        pass


# %% [markdown]
r"""
Now the model itself. The token embedding and the head are *untied*: two tables, not one used twice.
Tying saves memory but makes one matrix serve two masters with very different learning rates
(chapter 4).

`last_only` skips the head for all positions but the last, which is all that generation needs. At
depth 8 and a vocabulary of 32,768 that saves two fifths of the multiplications with weights.
`positions` does the same for scoring, which needs logits at some places of a batch (chapter 7). The
two methods at the end count weights and work; section 7 has their formulas.
"""


# %%
#| export
class GPT(nn.Module):
    """A decoder-only transformer: token ids in, logits or loss out (chapter 3).

    Parameters are float32; `compute_dtype` (default float32) is the dtype of the activations.
    """

    def __init__(self, config: GPTConfig, seed: int = 0, softcap: float = 15.0):
        super().__init__()
        self.config, self.softcap, self.compute_dtype = config, softcap, torch.float32
        self.embedding = nn.Embedding(config.padded_vocab, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.head = Linear(config.n_embd, config.padded_vocab)
        self.additions = Additions(config) if config.additions() else NoAdditions()
        self.rotary = Rotary(config)
        if self.device.type != "meta":  # on "meta" a model has sizes and no memory
            init_weights(self, seed)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.embedding.weight.device

    def restore_angles(self) -> None:
        """Compute the rotary angles, which no checkpoint holds, on the parameters' device."""
        self.rotary = Rotary(self.config).to(self.device)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        kv_cache: Any = None,
        reduction: str = "mean",
        last_only: bool = False,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Map ids (B, T) int64 to float32 logits (B, T, V), or to the loss when targets are given.

        `last_only` gives the logits of the last position alone, (B, 1, V); `positions` (n,) int64,
        counted row after row (b * T + t), those of n positions, (n, V). With a `kv_cache` the ids
        are the next T of each row. `reduction` is as in `token_loss`.
        """
        cos, sin = self.rotary(idx.size(1), kv_cache)
        x = rms_norm(self.embedding(idx).to(self.compute_dtype))  # (B, T, C)
        add = self.additions
        x = start = middle = add.smear(x, kv_cache)
        for i, block in enumerate(self.blocks):
            x = add.mix(i, x, start)
            x = block(x, cos, sin, kv_cache, add.value(i, idx))
            middle = x if i == len(self.blocks) // 2 else middle
        if kv_cache is not None:
            kv_cache.advance(idx.size(1))
        x = add.back_out(x, middle)
        x = x if positions is None else x.flatten(0, 1)[positions]  # (n, C)
        x = rms_norm(x[:, -1:] if last_only else x)
        logits = self.head(x)[..., : self.config.vocab_size].float()  # (B, T, V)
        if targets is not None and torch.compiler.is_compiling():
            return reduced(capped_loss(logits, targets, self.softcap), targets, reduction)
        logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if targets is None else token_loss(logits, targets, reduction)

    def num_params(self) -> dict[str, int]:
        """Count parameters: total, block matrices, embedding, head, additions outside of blocks."""
        parts = {"total": self, "matrix": self.blocks, "embedding": self.embedding}
        parts.update(head=self.head, additions=self.additions)
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token, as `training_flops` counts them."""
        params = self.num_params()
        return training_flops(self.config, params["matrix"] + params["head"])


# %% [markdown]
r"""
**Initial weights.** The embedding has spread 1. A matrix that reads the stream has spread
$1/\sqrt{\text{in}}$, so that its output has about the size of its input. Everything that *writes*
(both projections back into the stream, and the head) starts at **zero**. So every block starts as
the identity, every logit at 0, and every token gets probability $1/V$. The loss must then be $\ln
V$, to the last digit, before the first step. It is the cheapest test of a language model there
is: if your model starts higher, something is wrong already.
"""


# %%
#| export
@torch.no_grad()
def init_weights(model: GPT, seed: int = 0) -> None:
    """Draw fresh weights: embedding N(0, 1), matrices scaled by their shape, the rest zero.

    A matrix has standard deviation min(1, sqrt(out / in)) / sqrt(in). Both projections back to the
    residual stream and the head start at zero: each block starts as the identity, all logits
    at 0, the loss at ln(vocab_size). The draw depends on the seed alone, not on the device.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(weight: Tensor, std: float) -> None:
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    draw(model.embedding.weight, 1.0)
    model.head.weight.zero_()
    for block in model.blocks:
        attention, mlp = block.attention, block.mlp
        for layer in (attention.q, attention.k, attention.v, mlp.up):
            fan_out, fan_in = layer.weight.shape
            draw(layer.weight, min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in))
        attention.proj.weight.zero_()
        mlp.down.weight.zero_()
    model.additions.init_weights(draw)
    for gate in (block.attention.gate for block in model.blocks if block.attention.gate):
        gate.weight.copy_(torch.rand(gate.weight.shape, generator=generator) * 0.02)


# %%
#| test
small = GPT(GPTConfig(vocab_size=300, seq_len=32, n_layer=2, n_head=2, n_kv_head=1, n_embd=32))
ids = torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(0))
assert abs(small(ids, ids).item() - math.log(300)) < 1e-5

# %% [markdown]
r"""
And the model must not see the future. We change the second half of a text and ask whether any
logit of the first half moves.
"""

# %%
seed_everything(0)
with torch.no_grad():
    for p in small.parameters():
        p.normal_(0, 0.2)  # zero projections would hide a leak
    changed = ids.clone()
    changed[:, 16:] = torch.randint(0, 300, (4, 16))
    moved = (small(ids) - small(changed)).abs().amax(dim=(0, 2))
fig, ax = figure(
    "Changing tokens 16 to 31 moves no earlier logit",
    "position (tokens)",
    "largest change of a logit",
    alt="Bars at zero for positions 0 to 15 and tall bars from 16 on.",
)
ax.bar(range(32), moved)
plt.show()
assert moved[:16].max() == 0

# %% [markdown]
r"""
## 7. What does it cost?

Count the weights of a block: queries, keys, values and projection are $4C^2$, the two MLP
matrices $8C^2$, together $12C^2$. With $L$ layers and a vocabulary of $V$,

$$N = 12\,L\,C^2 + 2\,V C .$$

Each weight that multiplies costs one multiplication and one addition per token forward, and twice
that backward: **6 FLOPs per weight and token**. The embedding only looks up a row and costs
nothing. Attention adds $12\,L\,C\,T$: two products of length $C$ with $T$ positions, times six.
(The future half is counted too; the convention of the field.)
"""


# %%
#| export
def training_flops(config: GPTConfig, weights: int) -> int:
    """Floating-point operations to train on one token, forward and backward.

    6 for each of the `weights` that multiply, and 12 per channel, layer and position attended to,
    with the causal half counted whole. Chowdhery et al. (2022), appendix B.
    """
    seen = sum(window or config.seq_len for window in config.window_sizes())
    return 6 * weights + 12 * config.n_embd * seen


# %% [markdown]
r"""
We compare the formula with a counter that watches every operation.
"""

# %%
from torch.utils.flop_counter import FlopCounterMode

model = GPT(GPTConfig.for_depth(2, vocab_size=1024, seq_len=128))
ids = torch.zeros(4, 128, dtype=torch.long)
plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
with plain, FlopCounterMode(display=False) as counter:
    model(ids, ids).backward()
counted, formula = counter.get_total_flops() / ids.numel(), model.flops_per_token()
print(f"counted {counted:,.0f} FLOPs per token, formula {formula:,}: ratio {counted / formula:.3f}")

# %%
print("depth   width     parameters   in blocks   FLOPs/token")
for depth in (4, 8, 12, 20, 26):
    size = GPTConfig.classic(depth, vocab_size=65536, seq_len=2048)
    with torch.device("meta"):  # sizes only: depth 26 would take 4 GB
        params, flops = (big := GPT(size)).num_params(), big.flops_per_token()
    row = f"{depth:5d} {size.n_embd:7d} {params['total'] / 1e6:12.1f} M"
    print(f"{row} {params['matrix'] / params['total']:11.0%} {flops / 1e9:11.2f} G")

# %% [markdown]
r"""
The counts are those that nanochat published for its first recipe (561.0 million at depth 20).
Note the column "in blocks": at depth 4 only a twelfth of the parameters sit there. Small models
are mostly vocabulary, which is why our laptop runs use 2,048 tokens and not 65,536.

> **Exercise 3.2.** At which sequence length do attention's FLOPs equal those of the weights in a
> block? *(Take the two formulas, solve for T, and check at depth 12.)*

## 8. What is each part worth?

Opinions are cheap; runs decide. We train the same small model on the tiny world (appendix A1) and
change one thing at a time. The **baseline** is a bigram table, which knows only the current
token. The **control** is our full model trained on shuffled tokens: whatever it gains there comes
from token frequencies alone.
"""

# %%
from nanochat.tinyworld import World, document
from nanochat.tokenizer import Tokenizer

torch.set_num_threads(1)  # matrices as small as these gain nothing from a second thread
world = World()
texts = [document(world, i) for i in range(3000)]
tokenizer = Tokenizer.train(texts[:400], vocab_size=512)
stream = torch.tensor([t for text in texts for t in tokenizer.encode(text, bos=True)])


def rows_of(seq_len, n_val=2400):
    """Cut the stream into rows of seq_len + 1 tokens: (for training, for validation)."""
    rows = stream[: len(stream) // (seq_len + 1) * (seq_len + 1)].view(-1, seq_len + 1)
    held_out = n_val // (seq_len + 1)
    return rows[held_out:], rows[:held_out]


train_rows, val_rows = rows_of(96)
print(f"{train_rows.numel():,} training tokens, {val_rows.numel():,} for validation")


# %%
class NoRotary(Attention):
    """Attention without positions: the angles are all zero."""

    def forward(self, x, cos, sin, *others):
        return super().forward(x, torch.ones_like(cos), torch.zeros_like(sin), *others)


def change(model, variant):
    """Turn a fresh model into a variant of itself, in place."""
    for block in model.blocks:
        if variant == "no positions":
            block.attention.__class__ = NoRotary
        elif variant == "no attention":
            block.attention.proj.weight.requires_grad_(False)  # stays zero: writes nothing
    return model


# %%
def parameter_groups(model):
    """Rates for AdamW until chapter 4: high for tables and single numbers, low for matrices."""
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    scalars = [p for p in model.parameters() if p.ndim == 1]
    taken = {id(p) for p in tables + scalars}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    return [
        {"params": tables, "lr": 0.2},
        {"params": scalars, "lr": 0.1, "eps": 1e-6},  # why such an eps: see the pitfalls
        {"params": rest, "lr": 0.01},
    ]


def train_variant(variant, seed, size, steps, batch):
    """Train a variant for some steps; return its validation loss in nats per token."""
    rows, held_out = rows_of(size.seq_len)
    model = change(GPT(size, seed=seed), variant)
    optimizer = torch.optim.AdamW(parameter_groups(model), betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = rows[torch.randint(0, len(rows), (batch,), generator=order)]
        if variant == "control: shuffled":
            chosen = chosen[:, torch.randperm(size.seq_len + 1, generator=order)]
        model(chosen[:, :-1], chosen[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    with torch.no_grad():
        return model(held_out[:, :-1], held_out[:, 1:]).item()


# %%
variants = ["full model", "no positions", "no attention", "control: shuffled"]
size = GPTConfig.for_depth(2, tokenizer.vocab_size, 96, aspect=48, head_dim=32)
losses = {v: [train_variant(v, seed, size, steps, 12) for seed in range(seeds)] for v in variants}
counts = torch.ones(tokenizer.vocab_size, tokenizer.vocab_size) * 0.01  # bigrams, smoothed
counts.index_put_(
    (train_rows[:, :-1].flatten(), train_rows[:, 1:].flatten()), torch.tensor(1.0), True
)
chances = counts / counts.sum(1, keepdim=True)
bigram = -chances[val_rows[:, :-1], val_rows[:, 1:]].log().mean().item()
for variant, values in losses.items():
    spread = f" +- {(max(values) - min(values)) / 2:.3f}" if seeds > 1 else ""
    print(f"{variant:20s} {sum(values) / len(values):.3f}{spread} nats per token")
print(f"{'baseline: bigram':20s} {bigram:.3f}     (it has seen every training token)")

# %%
fig, ax = figure(
    "Without attention or positions the model is no better than bigrams",
    "validation loss (nats per token, lower is better)",
    size=(6, 2.6),
    alt="Horizontal bars of validation loss for four variants with the bigram baseline as a line.",
)
means = [sum(losses[v]) / seeds for v in variants]
errors = [(max(losses[v]) - min(losses[v])) / 2 for v in variants]
ax.barh(variants[::-1], means[::-1], xerr=errors[::-1], color=COLORS[0])
ax.axvline(bigram, color=COLORS[1], linestyle="--", label="bigram table")
ax.axvline(
    math.log(tokenizer.vocab_size), color="#444444", linestyle=":", label="ln V, before training"
)
ax.legend(fontsize=7, loc="upper right")
plt.show()

# %% [markdown]
r"""
Read the figure as a comparison, not as a law: the runs are short, the model tiny, the seed a
single one. What survives that are the large differences. A model that cannot look back at all
ends above the bigram table, and one that looks back without knowing where is no better than
it; only the full model gets clearly below. And the control shows how far token frequencies alone
would get us.

> **Play.** Set `seeds = 3` and run the last three cells again. Which differences are larger than
> the spread?
"""

# %% [markdown]
r"""
## 9. Eight additions, one at a time

The model so far is nanochat's first recipe, of October 2025. Nine months and some hundreds of
experiments later its recipe has eight additions. Each is one field of `GPTConfig`, each is off in
`GPTConfig.classic`, and `GPTConfig.modern` has them all. We take them one by one, from the idea
to the code, and then measure.

**Windows.** Most of what attention needs is near. A layer with a window lets a query see itself and
the $W$ positions before it, and costs $T\cdot W$ scores where full attention costs $T\cdot T$. We
take a quarter of the row, rounded up to a multiple of 128: $W = 512$ of 2,048. Reach is not lost:
two layers with windows see $2W$ far, as two convolutions do, and every fourth layer (and always the
last) sees everything.

A mask would give the right numbers, but it would build the whole $T\times T$ matrix to throw most
of it away. So we treat the first $W$ queries as always and cut the rest into blocks of $W/4$. A
block needs its own keys and the $W$ before it, and one small mask that is the same for every block.
Over a cache (chapter 8) it is simpler: one new token reads the last $W+1$ keys, and for a few new
tokens a whole mask is small.

PyTorch has another way, FlexAttention: one writes the rule as a function of two positions, and a
compiler makes a GPU kernel that skips the blocks where the rule says no. Blocks of ours need no
compiler and run everywhere, gradients included (FlexAttention has none on a CPU). But with a mask
PyTorch may not use its fastest kernels. `benchmarks/windows.py` times both beside full attention:
on one H200, with rows of 2,048, forward and backward took four times as long in blocks, and as long
as full attention with FlexAttention. So a compiled model on a GPU, which is one that trains, takes
FlexAttention, and all others the blocks.
"""


# %%
def draw_window(T=20, W=8, b=2):
    """Draw which key each query sees under a window, and the blocks that are computed."""
    fig, ax = plt.subplots(figsize=(3.4, 3.2), dpi=110, layout="constrained")
    fig.set_label("A square of 8 by 8, then frames of 2 by 10 that step down a blue diagonal band.")
    t, s = torch.arange(T)[:, None], torch.arange(T)[None]
    ax.imshow(((s <= t) & (s >= t - W)).float(), cmap="Blues", vmax=1.6)
    for top in (0, *range(W, T, b)):
        left, height = max(top - W, 0), b if top else W
        box = plt.Rectangle((left - 0.5, top - 0.5), top + height - left, height, fill=False)
        box.set(edgecolor=COLORS[1], linewidth=1.6)
        ax.add_patch(box)
    ax.set(xticks=range(0, T, 4), yticks=range(0, T, 4))
    ax.tick_params(labelsize=8)
    ax.set_title(f"Window of {W}: blue is needed,\nframed is computed", fontsize=10, loc="left")
    ax.set_xlabel("key (position)", fontsize=9)
    ax.set_ylabel("query (position)", fontsize=9)
    plt.show()


draw_window()


# %%
#| export
def attend_window(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, window: int) -> Tensor:
    """`attend` where a query sees itself and `window` positions before it.

    Shapes as in `attend`. In training no (T, T) mask is made: a compiled model on a GPU takes
    FlexAttention, others work block by block. One new token over a cache reads only the keys in
    its window.
    """
    n_new, n_all, grouped = q.size(2), k.size(2), q.size(1) != k.size(1)
    if n_all <= window + 1:  # nothing is out of sight
        return attend(q, k, v, mask)
    if n_new == 1:
        mask = None if mask is None else mask[..., -window - 1 :]
        return attend(q, k[:, :, -window - 1 :], v[:, :, -window - 1 :], mask)
    if n_new < n_all or mask is not None:  # several tokens over a cache
        slots = torch.arange(n_all, device=q.device)
        distance = slots[-n_new:, None] - slots  # (T, S)
        near = (distance >= 0) & (distance <= window)
        near = near if mask is None else near & mask
        return F.scaled_dot_product_attention(q, k, v, attn_mask=near, enable_gqa=grouped)
    if q.is_cuda and torch.compiler.is_compiling():
        rule = window_rule(n_all, window, q.device)
        return flex_attention(q, k, v, block_mask=rule, enable_gqa=grouped)
    return attend_blocks(q, k, v, window)


# %% [markdown]
r"""
First the blocks. The queries of each become a batch of their own, beside the keys that they may
need.
"""


# %%
#| export
def attend_blocks(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """`attend_window` of T tokens, T > window, in blocks of a quarter of the window."""
    B, T, block, grouped = q.size(0), q.size(2), max(1, window // 4), q.size(1) != k.size(1)
    q, k, v = (F.pad(t, (0, 0, 0, (window - T) % block)) for t in (q, k, v))
    first = attend(q[:, :, :window], k[:, :, :window], v[:, :, :window])
    q = q[:, :, window:].unflatten(2, (-1, block)).transpose(1, 2).flatten(0, 1)
    parts = (t.unfold(2, window + block, block) for t in (k, v))  # (B, H_kv, blocks, D, keys)
    k, v = (t.transpose(1, 2).flatten(0, 1).transpose(-1, -2) for t in parts)
    keys, queries = (torch.arange(n, device=q.device) for n in (window + block, block))
    ahead = keys - queries[:, None]  # (block, keys)
    near = (ahead >= 0) & (ahead <= window)
    later = F.scaled_dot_product_attention(q, k, v, attn_mask=near, enable_gqa=grouped)
    later = later.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)  # (B, H, T - window, D)
    return torch.cat((first, later), dim=2)[:, :, :T]


# %% [markdown]
r"""
Then FlexAttention. It cuts queries and keys into blocks of 128. It wants to know which pairs of
blocks to look at with the rule in hand, and which lie inside of the window whole, so that there is
nothing to ask. The distance of two blocks decides that.
"""


# %%
#| export
def window_rule(seq_len: int, window: int, device: torch.device) -> BlockMask:
    """Return a window over seq_len positions as FlexAttention wants it, made from block numbers."""

    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key <= window)

    blocks = torch.arange(-(-seq_len // 128), device=device)
    least = 128 * (blocks[:, None] - blocks) - 127  # distance of the nearest query and key
    some, whole = (least > -255) & (least <= window), (least > 0) & (least + 254 <= window)
    lists = []
    for chosen in (some & ~whole, whole):  # how many blocks a row has, and which: those first
        count, order = chosen.sum(-1), chosen.int().argsort(dim=-1, descending=True, stable=True)
        lists += [count.int()[None, None], order.int()[None, None]]
    return BlockMask.from_kv_blocks(*lists, 128, near, (seq_len, seq_len))


# %%
#| test
q, k, v = torch.randn(3, 2, 2, 37, 8, generator=torch.Generator().manual_seed(0))
distance = torch.arange(37)[:, None] - torch.arange(37)
near = (distance >= 0) & (distance <= 5)
assert torch.allclose(attend_window(q, k, v, None, 5), attend(q, k, v, near), atol=1e-5)

# %% [markdown]
r"""
**Value embeddings.** Attention moves *values* from token to token, and a value is made from a
stream that already mixes many things. A value embedding is a second vocabulary table: in every
other layer each token has, beside its computed value, one of its own, looked up. It says "I was
the token *cat*" however much the stream has changed. A gate per head, computed from twelve
channels of the stream, decides how much of it counts. Look-ups are nearly free, so this adds
parameters, and what they remember, at almost no cost in FLOPs.
"""


# %%
#| export
class ValueGate(Linear):
    """Adds looked-up values to the computed ones, weighed by a gate in (0, 3) for each head."""

    def __init__(self, config: GPTConfig):
        super().__init__(min(12, config.n_embd), config.n_kv_head)

    def forward(self, x: Tensor, v: Tensor, value: Tensor) -> Tensor:
        """Return v (B, T, H_kv, D) plus gated value (B, T, H_kv * D); x is (B, T, C)."""
        gate = 3 * torch.sigmoid(super().forward(x[..., : self.in_features]))  # (B, T, H_kv)
        return v + gate.unsqueeze(-1) * value.view_as(v).to(v.dtype)


# %% [markdown]
r"""
**Residual scalars.** Before each block the stream becomes $r_i\,x + z_i\,x_0$, with two learned
numbers per layer and $x_0$ the stream as it started. A deep layer can refresh its memory of the
token itself.

**Smear.** Many tokens are halves of words. Smear adds to each embedding a little of the one
before it, $x_t \leftarrow x_t + s\,\sigma(w\cdot x_t)\,x_{t-1}$, so that the first layer already
sees pairs. The number $s$ and the vector $w$ are learned, $\sigma$ is the sigmoid, and $w$ reads
only the first 24 channels. When we generate token by token, the embedding before comes out of the
cache.

**Backout.** The last thing before the head: subtract a learned share of what the stream was half
way up. What the early layers wrote for the later ones to read need not reach the logits.

**Padded vocabulary.** Matrix units like sizes that divide by 64, so both tables get a few rows
that no token uses, and the logits of those rows are cut off.

**A scale and a base.** The last two are single numbers: queries and keys are scaled by 1.2 after
their norm, which lets a softmax grow sharper, and the rotary base is 100,000.

Everything that does not live inside a block goes into one module, in the places that `NoAdditions`
left empty. Each method does nothing when its addition is off.
"""


# %%
#| export
class Additions(NoAdditions):
    """What a modern model adds around its blocks; each method changes nothing when it is off."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        width = config.n_kv_head * config.head_dim
        tables = {str(i): nn.Embedding(config.padded_vocab, width) for i in config.value_layers()}
        self.values = nn.ModuleDict(tables)
        if config.residual_scalars:
            self.stream_scale = nn.Parameter(torch.empty(config.n_layer))
            self.start_scale = nn.Parameter(torch.empty(config.n_layer))
        if config.smear:
            self.smear_gate = Linear(min(24, config.n_embd), 1)
            self.smear_scale = nn.Parameter(torch.empty(1))
        if config.backout:
            self.backout_scale = nn.Parameter(torch.empty(1))

    def smear(self, x: Tensor, kv_cache: Any = None) -> Tensor:
        """Add to each embedding of x (B, T, C) a gated share of the one before it in its row."""
        if not self.config.smear:
            return x
        last = None if kv_cache is None else kv_cache.last  # (B, 1, C): of the chunk before
        before = torch.zeros_like(x[:, :1]) if last is None else last
        before = torch.cat((before, x[:, :-1]), dim=1)
        if kv_cache is not None:
            kv_cache.last = x[:, -1:]
            if kv_cache.positions is not None:  # what stands before a row's first token is padding
                before = before * (kv_cache.positions > 0).unsqueeze(-1)
        gate = torch.sigmoid(self.smear_gate(x[..., : self.smear_gate.in_features]))
        return x + self.smear_scale[0] * gate * before

    def mix(self, layer: int, x: Tensor, start: Tensor) -> Tensor:
        """Scale the stream before a layer and add a share of the stream as it started."""
        if not self.config.residual_scalars:
            return x
        return self.stream_scale[layer] * x + self.start_scale[layer] * start

    def value(self, layer: int, idx: Tensor) -> Tensor | None:
        """Look up the layer's value embeddings of ids (B, T): (B, T, H_kv * D), or None."""
        name = str(layer)
        return self.values[name](idx) if name in self.values else None

    def back_out(self, x: Tensor, middle: Tensor) -> Tensor:
        """Subtract from the last stream a share of the stream half way up."""
        return x - self.backout_scale[0] * middle if self.config.backout else x

    def init_weights(self, draw: Callable[[Tensor, float], None]) -> None:
        """Start near the classic model: scalars close to 1 and 0, tables spread like values."""
        for table in self.values.values():
            draw(table.weight, 1 / math.sqrt(self.config.n_embd))
        if self.config.residual_scalars:
            self.stream_scale.copy_(torch.linspace(1.15, 1.05, self.config.n_layer))
            self.start_scale.copy_(torch.linspace(0.20, 0.05, self.config.n_layer))
        if self.config.smear:
            draw(self.smear_gate.weight, 0.01)
            self.smear_scale.zero_()
        if self.config.backout:
            self.backout_scale.fill_(0.2)


# %% [markdown]
r"""
### What each addition is worth

The same small model, the same steps, the same rows, and one addition at a time. The model has three
layers, so that there is a layer half way up to back out, and its rows are 256 tokens long, so that
a window of 128 hides something. A padded vocabulary is left out: 512 divides by 64 already.
"""

# %%
added = {
    "classic": {},
    "value embeddings": dict(value_embeddings=True),
    "residual scalars": dict(residual_scalars=True),
    "smear": dict(smear=True),
    "backout": dict(backout=True),
    "windows": dict(windows="SL"),
    "scale 1.2, base 100,000": dict(qk_scale=1.2, rope_base=100000.0),
    "all of them": {**MODERN, "windows": "SL"},
}
worth = {}
for name, fields in added.items():
    size = GPTConfig.for_depth(3, tokenizer.vocab_size, 256, aspect=32, head_dim=32, **fields)
    worth[name] = [train_variant(name, seed, size, steps // 3, 3) for seed in range(seeds)]
    gain = sum(worth["classic"]) / seeds - sum(worth[name]) / seeds
    print(f"{name:23s} {sum(worth[name]) / seeds:.3f} nats per token, {gain:+.3f} gained")

# %%
fig, ax = figure(
    "In a run this short only the residual scalars leave the seed's band",
    "validation loss gained over the classic model (nats per token)",
    size=(6, 2.6),
    alt="Bars of the loss gained: residual scalars and all together much, others in the grey band.",
)
names = [name for name in added if name != "classic"][::-1]
gains = [(sum(worth["classic"]) - sum(worth[name])) / seeds for name in names]
ax.barh(names, gains, color=[COLORS[0] if n == "all of them" else "#9ecae1" for n in names])
ax.axvline(0, color="#444444", linewidth=0.8)
ax.axvspan(-0.1, 0.1, color="#dddddd", zorder=0, label="what another seed changes")
ax.legend(fontsize=7, loc="center right")
plt.show()

# %% [markdown]
r"""
The grey band is about what a change of the seed brings: with four seeds the gain of value
embeddings went from about -0.07 to +0.14, that of windows from -0.10 to +0.03. The residual scalars
lie outside of it with every seed. They help from the first step on, and they carry the model that
has everything. Of the others this run cannot tell, and that is no verdict on them. A value
embedding is worth something once its token has come by many times. Smear starts at zero and has
hardly moved in so few steps. Windows are there for speed: they need only lose nothing. This is the
usual state of affairs. An improvement of one percent is worth having, ten of them make a better
model, and each alone takes many seeds or a large run to see.

`benchmarks/ablation.py` is the program for that: the classic model, the modern one, each addition
put into the first and taken out of the second, over several seeds, with error bars. On one H200, a
model of depth 4 after 5 million tokens of real text, three seeds, bits per byte gained (mean of
pairs ± standard error; `benchmarks/RESULTS.md`):

| addition | put into the classic model | taken out of the modern model |
|---|---|---|
| value embeddings | +0.037 ± 0.001 | -0.021 ± 0.002 |
| smear | +0.034 ± 0.000 | -0.009 ± 0.014 |
| windows | +0.011 ± 0.000 | -0.009 ± 0.001 |
| scale 1.2 of queries and keys | +0.010 ± 0.000 | -0.004 ± 0.000 |
| backout | +0.008 ± 0.000 | +0.026 ± 0.004 |
| rotary base 100,000 | -0.004 ± 0.001 | +0.002 ± 0.001 |
| residual scalars | -0.004 ± 0.003 | +0.026 ± 0.001 |
| all of them | +0.054 ± 0.005 | |

Read it twice. Three additions help alone and are missed when they are gone: value embeddings,
windows and the scale. Smear helps alone, and of its absence three seeds cannot tell. Backout helps
alone and does harm in company. The residual scalars, the only ones that stood out in our figure, do
not help here at all: what helps depends on the size of the run, and on the rates. With all rates
four times as high, those for batches of 2^19 tokens, they *cost* 0.054 ± 0.007 (chapter 4 tells
what follows from it). Yet in so short a run those rates were better for every model, classic and
modern (1.80 and 1.78 bits per byte instead of 1.93 and 1.88), and all additions together were worth
less, 0.019 ± 0.010.
The log of nanochat's author has results of large runs. At depth 12 the residual scalars were worth
0.008 bits per byte and value embeddings were a large gain. Smear and backout failed in January and
helped in March, after the rates had been tuned again.

And the speed of windows: the same attention over 4,096 positions, with and without.
"""

# %%
q, k, v = torch.randn(3, 1, 2, 4096, 64, generator=torch.Generator().manual_seed(0))
whole = milliseconds(lambda: attend(q, k, v), 5)
near = milliseconds(lambda: attend_window(q, k, v, None, 512), 5)
print(f"a window of 512 takes {near / whole:.0%} of the time of full attention over 4,096")
for config in (GPTConfig.classic(12, 32768, 2048), GPTConfig.modern(12, 32768, 2048)):
    with torch.device("meta"):
        size = GPT(config)
    params, flops = size.num_params()["total"] / 1e6, size.flops_per_token() / 1e9
    kind = f"depth 12, windows {config.windows:4s}"
    print(f"{kind}: {params:6.1f} M parameters, {flops:.2f} GFLOP/token")

# %% [markdown]
r"""
At depth 12 the modern model holds more than twice the parameters of the classic one and costs
*less* per token: the new ones are only looked up, and the windows save more than the gates cost.

> **Play.** Train three times as long (`steps = 330`) with `seeds = 3`, over a coffee. Which of the
> additions leave the grey band now?

## Recap

`nanochat.model` now holds `GPTConfig`, `GPT` and their parts: `Linear`, `rms_norm`,
`rotary_angles`, `rotate`, `Rotary`, `attend`, `attend_window` with `attend_blocks` and
`window_rule`, `Attention`, `ValueGate`, `MLP`, `Block`, `NoAdditions`, `Additions`, `token_loss`
with `reduced` and `capped_loss`, `init_weights` and `training_flops`. You can build a model from
one number, classic or modern, and say beforehand what it weighs and costs.

**Pitfalls**

- *NaN from a fully masked batch.* The mean over zero targets is 0/0. nanochat's fine-tuning met
  this on short contexts; `token_loss` returns 0.
- *A leak through the mask.* If a causal mask is off by one, training loss looks wonderful and
  generation is garbage. Test by changing the future, as above.
- *Zero-initialised layers hide bugs.* With both projections at zero a broken attention changes
  nothing at first. Tests need random weights.
- *A cache that forgets.* Smear needs the embedding before. nanochat's own model loses it between
  two chunks of a prompt, and the first token of the second chunk comes out wrong. Whatever looks
  back must be in the cache, and a test must cut everywhere.
- *Noise with a gradient.* The last norm forgets sizes, so a fresh model's scalars have a true
  gradient of zero, and Adam turns rounding errors into full steps (chapter 4 has the remedy).
- *The sign of the rotation.* Turning clockwise or counter-clockwise trains equally well, but
  weights made for one do not work with the other. We turn as nanochat does, so its classic
  weights fit; our tests compare the logits with the Hugging Face implementation.

**Readings**

- Vaswani et al., *Attention Is All You Need* (2017): the transformer.
- Su et al., *RoFormer* (2021): rotary positions.
- Zhang and Sennrich, *Root Mean Square Layer Normalization* (2019).
- So et al., *Primer* (2021): the squared ReLU, found by search.
- Zhou et al., *Value Residual Learning* (2024), and Jordan et al., *modded-nanogpt* (2024-2026):
  where value embeddings, residual scalars, smear and backout were found.
- Beltagy et al., *Longformer* (2020): attention in windows.
- Chowdhery et al., *PaLM* (2022), appendix B: counting FLOPs.
"""
