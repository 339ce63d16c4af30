"""The GPT model: configuration, layers, forward pass, initialisation and cost formulas.

Exported from chapters/03_model.py (chapter 03, The model); edit there, not here.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Attention",
    "Block",
    "GPT",
    "GPTConfig",
    "Linear",
    "MLP",
    "attend",
    "init_weights",
    "rms_norm",
    "rotary_angles",
    "rotate",
    "token_loss",
]


@dataclass
class GPTConfig:
    """Sizes of a GPT. `for_depth` derives all of them from one dial, the number of layers."""

    vocab_size: int = 32768
    seq_len: int = 2048
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together, with the sizes in the sentence."""
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head or self.head_dim % 2:
            raise ValueError(
                f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head} with an even "
                f"quotient, and n_head a multiple of n_kv_head {self.n_kv_head}."
            )

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.n_embd // self.n_head

    @classmethod
    def for_depth(
        cls, depth: int, vocab_size: int, seq_len: int, aspect: int = 64, head_dim: int = 128
    ) -> "GPTConfig":
        """Derive the sizes from the depth: width `aspect * depth`, heads of `head_dim` channels.

        The width is rounded up to a whole number of heads (nanochat's rule).
        """
        n_head = math.ceil(aspect * depth / head_dim)
        return cls(vocab_size, seq_len, depth, n_head, n_head, n_head * head_dim)

    def to_dict(self) -> dict[str, int]:
        """Return the sizes as a plain dict; `GPTConfig(**d)` reads it back."""
        return asdict(self)


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
        self.layer, self.config = layer, config
        kv_width = config.n_kv_head * config.head_dim
        self.q = Linear(config.n_embd, config.n_embd)
        self.k = Linear(config.n_embd, kv_width)
        self.v = Linear(config.n_embd, kv_width)
        self.proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: Any = None) -> Tensor:
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.config.n_head, -1)  # (B, T, H, D)
        k = self.k(x).view(B, T, self.config.n_kv_head, -1)  # (B, T, H_kv, D)
        v = self.v(x).view(B, T, self.config.n_kv_head, -1)
        q, k = rms_norm(rotate(q, cos, sin)), rms_norm(rotate(k, cos, sin))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        mask = None
        if kv_cache is not None:
            k, v = kv_cache.update(self.layer, k, v)  # (B, H_kv, S, D)
            mask = kv_cache.mask
        y = attend(q, k, v, mask)
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: Any = None) -> Tensor:
        x = x + self.attention(rms_norm(x), cos, sin, kv_cache)
        return x + self.mlp(rms_norm(x))


def token_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of logits (B, T, V) against targets (B, T); targets -1 are ignored.

    "mean" and "sum" are over the targets that count, "none" gives (B, T). A mean over no
    targets is 0, not NaN: a micro-batch whose targets are all masked is harmless.
    """
    loss = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none"
    ).view_as(targets)
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / (targets != -1).sum().clamp(min=1)


class GPT(nn.Module):
    """A decoder-only transformer: token ids in, logits or loss out (chapter 3).

    Parameters are float32; `compute_dtype` (default float32) is the dtype of the activations.
    """

    def __init__(self, config: GPTConfig, seed: int = 0, softcap: float = 15.0):
        super().__init__()
        self.config, self.softcap, self.compute_dtype = config, softcap, torch.float32
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.head = Linear(config.n_embd, config.vocab_size)
        cos, sin = rotary_angles(config.seq_len, config.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        init_weights(self, seed)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.embedding.weight.device

    def angles(self, n_new: int, kv_cache: Any = None) -> tuple[Tensor, Tensor]:
        """Return cos and sin for the next n_new positions, after those in the cache."""
        start = 0 if kv_cache is None else kv_cache.length
        if start + n_new > self.config.seq_len:
            raise ValueError(f"{start + n_new} tokens do not fit in seq_len {self.config.seq_len}.")
        if kv_cache is not None and kv_cache.positions is not None:  # (B, T)
            return self.cos[kv_cache.positions], self.sin[kv_cache.positions]
        return self.cos[start : start + n_new], self.sin[start : start + n_new]

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        kv_cache: Any = None,
        reduction: str = "mean",
        last_only: bool = False,
    ) -> Tensor:
        """Map ids (B, T) int64 to float32 logits (B, T, V), or to the loss when targets are given.

        `last_only` gives the logits of the last position alone, (B, 1, V). With a `kv_cache`
        the ids are the next T of each row. `reduction` is as in `token_loss`.
        """
        cos, sin = self.angles(idx.size(1), kv_cache)
        x = rms_norm(self.embedding(idx).to(self.compute_dtype))  # (B, T, C)
        for block in self.blocks:
            x = block(x, cos, sin, kv_cache)
        if kv_cache is not None:
            kv_cache.advance(idx.size(1))
        x = rms_norm(x[:, -1:] if last_only else x)
        logits = self.head(x).float()  # (B, T, V)
        logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if targets is None else token_loss(logits, targets, reduction)

    def num_params(self) -> dict[str, int]:
        """Count parameters: total, block matrices, embedding, head."""
        total = sum(p.numel() for p in self.parameters())
        embedding, head = self.embedding.weight.numel(), self.head.weight.numel()
        matrix = total - embedding - head
        return {"total": total, "matrix": matrix, "embedding": embedding, "head": head}

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token, forward and backward.

        6 per weight that multiplies (the embedding only looks up), and 12 per channel, layer and
        position attended to, with the causal half counted whole. Chowdhery et al. (2022), app. B.
        """
        size, params = self.config, self.num_params()
        attention = 12 * size.n_layer * size.n_embd * size.seq_len
        return 6 * (params["matrix"] + params["head"]) + attention


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
