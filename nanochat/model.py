"""The GPT model: configuration, layers, forward pass, initialisation and cost formulas.

Exported from chapters/03_model.py (chapter 03, The model); edit there, not here.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

__all__ = [
    "Additions",
    "Attention",
    "Block",
    "GPT",
    "GPTConfig",
    "Linear",
    "MLP",
    "MODERN",
    "NoAdditions",
    "Rotary",
    "ValueGate",
    "attend",
    "attend_blocks",
    "attend_window",
    "capped_loss",
    "init_weights",
    "reduced",
    "rms_norm",
    "rotary_angles",
    "rotate",
    "token_loss",
    "training_flops",
    "window_rule",
]


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


class Linear(nn.Linear):
    """A linear layer without bias: float32 weights, multiplied in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return F.linear(x, self.weight.to(x.dtype))


def rms_norm(x: Tensor) -> Tensor:
    """Divide each vector of x (..., C) by its root mean square. Zhang and Sennrich (2019)."""
    return F.rms_norm(x, (x.size(-1),))


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


def capped_loss(logits: Tensor, targets: Tensor, cap: float) -> Tensor:
    """`token_loss(cap * tanh(logits / cap), targets, "none")` as a compiler likes it: (B, T)."""
    below = -2 * cap * torch.sigmoid(logits * (-2 / cap))  # the capped logits, less the cap
    chosen = torch.arange(logits.size(-1), device=logits.device) == targets.unsqueeze(-1)
    loss = below.exp().sum(-1).log() - torch.where(chosen, below, 0.0).sum(-1)
    return torch.where(targets == -1, 0.0, loss)


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


def training_flops(config: GPTConfig, weights: int) -> int:
    """Floating-point operations to train on one token, forward and backward.

    6 for each of the `weights` that multiply, and 12 per channel, layer and position attended to,
    with the causal half counted whole. Chowdhery et al. (2022), appendix B.
    """
    seen = sum(window or config.seq_len for window in config.window_sizes())
    return 6 * weights + 12 * config.n_embd * seen


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


class ValueGate(Linear):
    """Adds looked-up values to the computed ones, weighed by a gate in (0, 3) for each head."""

    def __init__(self, config: GPTConfig):
        super().__init__(min(12, config.n_embd), config.n_kv_head)

    def forward(self, x: Tensor, v: Tensor, value: Tensor) -> Tensor:
        """Return v (B, T, H_kv, D) plus gated value (B, T, H_kv * D); x is (B, T, C)."""
        gate = 3 * torch.sigmoid(super().forward(x[..., : self.in_features]))  # (B, T, H_kv)
        return v + gate.unsqueeze(-1) * value.view_as(v).to(v.dtype)


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
