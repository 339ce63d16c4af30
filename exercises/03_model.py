# %% [markdown]
r"""
# Exercises for chapter 3: the model

The parts of a GPT, what they cost, and how to see that one is broken. `check(id, answer)` says at
once which properties your answer has and what is likely wrong with the others. `hint(id)` helps,
three times. `progress()` shows your points. An answer is a plain function: it takes and returns
tensors and numbers, and changes none of its arguments.

Two of the functions here can take the place of the book's: when yours pass, `make capstone MINE=1`
trains with them.
"""

# %%
#| given
import math

import torch
import torch.nn.functional as F
from torch import Tensor

# %%
from book.graded import check, hint, progress

# %% [markdown]
r"""
## 1. RMSNorm

Our GPT divides every vector by its root mean square before each layer. Attention and the MLP then
see inputs of one size, whatever the residual stream has grown to; without it, training at depth
diverges. Write it. The mean of squares of bfloat16 numbers loses digits, so compute in float32 and
return the dtype that came in.
"""


# %%
#| exercise id=03-rmsnorm points=2 minutes=10 level=1 answer=rms_norm
def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Divide each vector by sqrt(mean of its squares + eps).

    Args:
        x: (..., n_embd), float32 or bfloat16.
    Returns:
        (..., n_embd), the dtype of x.
    """
    # BEGIN SOLUTION
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    # END SOLUTION


# %%
check("03-rmsnorm", rms_norm)


# %%
#| checks 03-rmsnorm
def vectors():
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)) * 5


@says("agrees with the formula", "The mean is over the last dimension only, of the squares.")
def _(rms_norm):
    x = vectors()
    assert close(rms_norm(x), F.rms_norm(x, (8,), eps=1e-6))


@says("keeps the dtype", "What came in as bfloat16 goes out as bfloat16.")
def _(rms_norm):
    assert rms_norm(vectors().bfloat16()).dtype == torch.bfloat16


@says(
    "computes in float32",
    "Each operation on bfloat16 numbers rounds its result to eight bits. Convert first and last, "
    "so that only the result is rounded.",
)
def _(rms_norm):
    x = torch.randn(4, 2048, generator=torch.Generator().manual_seed(1)).mul(3).bfloat16()
    exact = rms_norm(x.float())
    same = (rms_norm(x).bfloat16() == exact.bfloat16()).float().mean().item()
    assert same > 0.999, f"{1 - same:.0%} of the numbers are not those of float32, rounded"


@says("a vector of zeros stays zeros", "Without eps inside the root, 0 / 0 is NaN.")
def _(rms_norm):
    assert close(rms_norm(torch.zeros(1, 8)), torch.zeros(1, 8))


# %%
#| hints 03-rmsnorm
hints = [
    "Square, average, take the root, divide: which of these steps reduces a dimension?",
    "`mean(-1, keepdim=True)` keeps the shape broadcastable against x.",
    "`x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)`, in float32.",
]


# %%
#| wrong 03-rmsnorm: keeps the dtype
def rms_norm(x, eps=1e-6):
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


# %%
#| wrong 03-rmsnorm: a vector of zeros stays zeros
def rms_norm(x, eps=1e-6):
    wide = x.float()
    return (wide / wide.square().mean(-1, keepdim=True).sqrt()).to(x.dtype)


# %%
#| wrong 03-rmsnorm: agrees with the formula
def rms_norm(x, eps=1e-6):
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


# %%
#| wrong 03-rmsnorm: computes in float32
def rms_norm(x, eps=1e-6):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


# %%
#| right 03-rmsnorm
def rms_norm(x, eps=1e-6):
    size = (x.float().pow(2).sum(-1) / x.shape[-1] + eps) ** 0.5
    return (x.float() / size.unsqueeze(-1)).to(x.dtype)


# %% [markdown]
r"""
## 2. Rotary positions

Attention has no idea of order until queries and keys are turned. Take the channels in pairs
$(i, i + D/2)$ and turn the pair at position $t$ *clockwise* by the angle whose cosine and sine are
given:

$$\begin{pmatrix} a' \\ b' \end{pmatrix} =
\begin{pmatrix} \cos & \sin \\ -\sin & \cos \end{pmatrix}
\begin{pmatrix} a \\ b \end{pmatrix}.$$

There are two conventions for the pairs, (0, 1), (2, 3), ... and ours, and two directions. All four
train equally well, and that is the trap: with the wrong one your own model is fine, and weights
made by somebody else speak nonsense. This function replaces the book's when it passes.

`cos` and `sin` are (T, D/2). In a batch whose rows stand at different positions (chapter 8) they
are (B, T, D/2).
"""


# %%
#| exercise id=03-rope points=3 minutes=20 level=2 answer=rotate replaces=model.rotate
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + D/2) of every head clockwise by the angles.

    Args:
        x: (B, T, H, D), float32 or bfloat16.
        cos, sin: (T, D/2) or (B, T, D/2), float32.
    Returns:
        (B, T, H, D), the dtype of x.
    """
    # BEGIN SOLUTION
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)  # (..., T, 1, D/2)
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos + right * sin, right * cos - left * sin), dim=-1)
    # END SOLUTION


# %%
check("03-rope", rotate)


# %%
#| checks 03-rope
def angles(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 3 + 0.1


@says(
    "channel i is paired with channel i + D/2",
    "The vector is cut into a left and a right half; neighbours (0, 1), (2, 3) are another "
    "convention.",
)
def _(rotate):
    angle = angles(1, 4)
    for i in range(4):
        x = torch.zeros(1, 1, 1, 8)
        x[..., i] = 1.0
        expected = torch.zeros(1, 1, 1, 8)
        expected[..., i], expected[..., i + 4] = angle[0, i].cos().abs(), angle[0, i].sin().abs()
        assert close(rotate(x, angle.cos(), angle.sin()).abs(), expected), f"channel {i}"


@says(
    "a pair turns clockwise",
    "(1, 0) turned by a quarter is (0, -1). The other direction has the minus at the other sine.",
)
def _(rotate):
    x = torch.randn(2, 3, 3, 2, generator=torch.Generator().manual_seed(0))
    for angle in (0.3, 1.5, 2.8):  # the same at every position
        cos, sin = torch.full((3, 1), math.cos(angle)), torch.full((3, 1), math.sin(angle))
        turned = torch.view_as_complex(x) * complex(math.cos(angle), -math.sin(angle))
        assert close(rotate(x, cos, sin), torch.view_as_real(turned)), f"angle {angle}"


@says(
    "the angle follows the position, the same for all heads",
    "x is (B, T, H, D): the angles belong to dimension 1 and must be spread over dimension 2.",
)
def _(rotate):
    angle = angles(3, 1)
    x = torch.zeros(2, 3, 3, 2)
    x[..., 0] = 1.0
    found = rotate(x, angle.cos(), angle.sin())[..., 0]
    assert close(found, angle.cos().view(1, 3, 1).expand(2, 3, 3).contiguous())


@says(
    "rows of a batch may stand at different positions",
    "cos may be (B, T, D/2). Put the dimension of the heads in from the right, not from the left.",
)
def _(rotate):
    angle = angles(2, 4, 1)
    x = torch.zeros(2, 4, 3, 2)
    x[..., 0] = 1.0
    found = rotate(x, angle.cos(), angle.sin())[..., 0]
    assert close(found, angle.cos().expand(2, 4, 3).contiguous())


@says("keeps the dtype", "bfloat16 times float32 is float32: bring cos and sin to the dtype of x.")
def _(rotate):
    angle = angles(3, 2)
    x = torch.ones(1, 3, 3, 4, dtype=torch.bfloat16)
    found = rotate(x, angle.cos(), angle.sin())
    assert found.dtype == torch.bfloat16 and found.shape == x.shape


# %%
#| hints 03-rope
hints = [
    "x.chunk(2, dim=-1) gives the left and the right half. Each result is a sum of two products.",
    "cos must meet (B, T, H, D/2). Which dimension is missing in (T, D/2), and where must it go so "
    "that (B, T, D/2) works as well?",
    "cos.unsqueeze(-2).to(x.dtype), the same for sin; then left * cos + right * sin beside "
    "right * cos - left * sin, joined along the last dimension.",
]


# %%
#| wrong 03-rope: channel i is paired with channel i + D/2
def rotate(x, cos, sin):
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos + odd * sin, odd * cos - even * sin), dim=-1).flatten(-2)


# %%
#| wrong 03-rope: a pair turns clockwise
def rotate(x, cos, sin):
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


# %%
#| wrong 03-rope: rows of a batch may stand at different positions
def rotate(x, cos, sin):
    cos, sin = cos[None, :, None].to(x.dtype), sin[None, :, None].to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos + right * sin, right * cos - left * sin), dim=-1)


# %%
#| wrong 03-rope: keeps the dtype
def rotate(x, cos, sin):
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos + right * sin, right * cos - left * sin), dim=-1)


# %%
#| wrong 03-rope: the angle follows the position, the same for all heads
def rotate(x, cos, sin):
    if cos.dim() == 2:  # as if x were (B, H, T, D)
        cos, sin = cos[None, None].to(x.dtype), sin[None, None].to(x.dtype)
    else:
        cos, sin = cos.unsqueeze(2).to(x.dtype), sin.unsqueeze(2).to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos + right * sin, right * cos - left * sin), dim=-1)


# %%
#| right 03-rope
def rotate(x, cos, sin):
    left, right = x.float().chunk(2, dim=-1)
    turn = torch.complex(cos, -sin).unsqueeze(-2)
    turned = torch.complex(left.contiguous(), right.contiguous()) * turn
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


# %% [markdown]
r"""
## 3. Attention

Write the function that the whole model rests on. Query $t$ takes a weighted mean of the values at
positions $s \le t$, with weights $\operatorname{softmax}_s(q_t \cdot k_s / \sqrt D)$. In real use
three things come on top:

- **grouped queries**: there may be fewer key heads than query heads. With 4 and 2, query heads 0
  and 1 share key head 0, heads 2 and 3 share key head 1;
- **a cache** (chapter 8): there may be more keys than queries. The queries are then the *last* of
  the positions. A causal mask that starts in the upper left corner would let a new token see the
  oldest keys only;
- **a mask** of booleans, (B, 1, T, S), True where a query may look. If one is given it *replaces*
  the causal rule.

Matrix products and a softmax will do, and so will `F.scaled_dot_product_attention` with the right
mask, which is faster. This function replaces the book's when it passes.
"""


# %%
#| exercise id=03-attend points=4 minutes=35 level=3 answer=attend replaces=model.attend
def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention; the T queries are the last T of the S positions.

    Args:
        q: (B, H, T, D); k, v: (B, H_kv, S, D) with S >= T, and H a multiple of H_kv.
        mask: None, or (B, 1, T, S) bool, True where a query may look, instead of the causal rule.
    Returns:
        (B, H, T, D), the dtype of q.
    """
    # BEGIN SOLUTION
    n_new, n_all = q.size(2), k.size(2)
    if mask is None and 1 < n_new < n_all:
        mask = torch.ones(n_new, n_all, dtype=torch.bool, device=q.device).tril(n_all - n_new)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and n_new > 1,
        enable_gqa=q.size(1) != k.size(1),
    )
    # END SOLUTION


# %%
check("03-attend", attend)


# %%
#| checks 03-attend
def qkv(H=2, H_kv=2, T=6, S=6, D=4, B=2):
    generator = torch.Generator().manual_seed(H * 100 + T)
    shapes = ((B, H, T, D), (B, H_kv, S, D), (B, H_kv, S, D))
    return [torch.randn(shape, generator=generator) * 2 for shape in shapes]


def by_loops(q, k, v):
    out = torch.zeros_like(q)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        weights = torch.stack([q[b, h, t] @ k[b, h, s] for s in range(t + 1)]) / q.size(3) ** 0.5
        out[b, h, t] = weights.softmax(0) @ v[b, h, : t + 1]
    return out


@says(
    "agrees with the formula",
    "Three things to look at: the future must be hidden before the softmax, scores are divided by "
    "sqrt(D), and the softmax runs over the keys.",
)
def _(attend):
    q, k, v = qkv()
    assert close(attend(q, k, v), by_loops(q, k, v), atol=1e-4)


@says(
    "neighbouring query heads share a key head",
    "With 4 query heads and 2 key heads the order is 0 0 1 1, not 0 1 0 1.",
)
def _(attend):
    for H, H_kv in ((4, 2), (6, 2), (3, 1)):
        q, k, v = qkv(H, H_kv)
        k_all, v_all = (x.repeat_interleave(H // H_kv, dim=1) for x in (k, v))
        assert close(attend(q, k, v), attend(q, k_all, v_all), atol=1e-4), (H, H_kv)


@says(
    "the queries are the last positions",
    "With T queries and S keys, query 0 stands at position S - T and sees all keys up to there.",
)
def _(attend):
    q, k, v = qkv()
    whole = attend(q, k, v)
    for T in (1, 2, 5):
        assert close(attend(q[:, :, -T:], k, v), whole[:, :, -T:].contiguous(), atol=1e-4), T


@says(
    "a mask replaces the causal rule",
    "Where a mask is given it alone decides, in both directions: it may hide the past and show "
    "what comes later.",
)
def _(attend):
    q, k, v = qkv()
    every = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    flipped = attend(q, k.flip(2), v.flip(2), every)
    assert close(attend(q, k, v, every), flipped, atol=1e-4), "with all shown, order is no matter"
    late = every.clone()
    late[..., :2] = False
    found, fewer = attend(q, k, v, late), attend(q, k[:, :, 2:], v[:, :, 2:], every[..., 2:])
    assert close(found, fewer, atol=1e-4), "hidden keys still count"
    some = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    some[..., 3] = True  # everybody sees something
    whole = attend(q, k, v, some)
    for T in (1, 2, 4):  # with a cache, the mask has fewer rows than columns
        found = attend(q[:, :, -T:], k, v, some[:, :, -T:])
        assert close(found, whole[:, :, -T:].contiguous(), atol=1e-4), f"{T} queries, 6 keys"


@says("keeps the dtype", "bfloat16 goes in and comes out.")
def _(attend):
    q, k, v = (x.bfloat16() for x in qkv())
    found = attend(q, k, v)
    assert found.dtype == torch.bfloat16 and found.shape == q.shape


# %%
#| hints 03-attend
hints = [
    "First the plain case: scores (B, H, T, S), a mask, a softmax, a product. attend_matrix in "
    "chapter 3 is close.",
    "For the cache: a lower triangle whose diagonal is moved to the right by S - T, see the "
    "argument of tril. For grouped queries: each key head is needed H / H_kv times, one after the "
    "other.",
    "F.scaled_dot_product_attention takes attn_mask, is_causal and enable_gqa. is_causal is right "
    "only for T = S; for 1 < T < S give the moved triangle as mask; for T = 1 give none at all.",
]


# %%
#| wrong 03-attend: agrees with the formula
def attend(q, k, v, mask=None):
    n_new, n_all = q.size(2), k.size(2)
    if mask is None:
        mask = torch.ones(n_new, n_all, dtype=torch.bool).tril(n_all - n_new)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=1.0)


# %%
#| wrong 03-attend: agrees with the formula
def attend(q, k, v, mask=None):
    n_new, n_all = q.size(2), k.size(2)
    if mask is None:  # off by one: each query sees one token of the future
        mask = torch.ones(n_new, n_all, dtype=torch.bool).tril(n_all - n_new + 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


# %%
#| wrong 03-attend: neighbouring query heads share a key head
def attend(q, k, v, mask=None):
    n_new, n_all, times = q.size(2), k.size(2), q.size(1) // k.size(1)
    if mask is None:
        mask = torch.ones(n_new, n_all, dtype=torch.bool).tril(n_all - n_new)
    k, v = k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1)
    # with a single key head both orders are the same
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


# %%
#| wrong 03-attend: the queries are the last positions
def attend(q, k, v, mask=None):
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


# %%
#| wrong 03-attend: a mask replaces the causal rule
def attend(q, k, v, mask=None):
    n_new, n_all = q.size(2), k.size(2)
    causal = torch.ones(n_new, n_all, dtype=torch.bool).tril(n_all - n_new)
    mask = causal if mask is None else causal & mask
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


# %%
#| wrong 03-attend: keeps the dtype
def attend(q, k, v, mask=None):
    n_new, n_all = q.size(2), k.size(2)
    if mask is None:
        mask = torch.ones(n_new, n_all, dtype=torch.bool).tril(n_all - n_new)
    q, k, v = q.float(), k.float(), v.float()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


# %%
#| wrong 03-attend: a mask replaces the causal rule
def attend(q, k, v, mask=None):
    n_new, n_all = q.size(2), k.size(2)
    if n_new < n_all:  # a cache: the triangle is put in the place of any mask
        mask = torch.ones(n_new, n_all, dtype=torch.bool).tril(n_all - n_new)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and n_new > 1, enable_gqa=True
    )


# %%
#| right 03-attend
def attend(q, k, v, mask=None):
    (B, H, T, D), (_, H_kv, S, _) = q.shape, k.shape
    q = q.reshape(B, H_kv, H // H_kv, T, D)
    scores = torch.einsum("bghtd,bgsd->bghts", q.float(), k.float()) / math.sqrt(D)
    t, s = torch.arange(S - T, S), torch.arange(S)
    seen = (s[None] <= t[:, None]) if mask is None else mask[:, :, None]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    y = torch.einsum("bghts,bgsd->bghtd", weights, v.float())
    return y.reshape(B, H, T, D).to(v.dtype)


# %% [markdown]
r"""
## 4. A window

Newer versions of nanochat let three layers in four look back only a short way. A query at position
$t$ then sees itself and the `window` positions before it, $t - \text{window}, \ldots, t$: one more
than `window` in all. Other programs count the query itself as part of the window. So it is easy to
be off by one, and nothing fails if you are: the model is a little better or a little worse, and no
longer the one that others can load.

Write the mask, for queries that are the last `n_new` of `n_all` positions. With
`n_new = n_all = 5` and `window = 2`:

| | 0 | 1 | 2 | 3 | 4 |
|---|---|---|---|---|---|
| **0** | yes | | | | |
| **1** | yes | yes | | | |
| **2** | yes | yes | yes | | |
| **3** | | yes | yes | yes | |
| **4** | | | yes | yes | yes |
"""


# %%
#| exercise id=03-window points=2 minutes=15 level=2 answer=window_mask
def window_mask(n_new: int, n_all: int, window: int) -> Tensor:
    """(n_new, n_all) bool, True where a query may look; the queries are the last positions.

    A query may look at itself and at the `window` positions before it.
    """
    # BEGIN SOLUTION
    t = torch.arange(n_all - n_new, n_all)[:, None]
    s = torch.arange(n_all)[None, :]
    return (s <= t) & (s >= t - window)
    # END SOLUTION


# %%
check("03-window", window_mask)


# %%
#| checks 03-window
@says("nobody sees the future", "A window reaches back, not ahead: s <= t as in any causal mask.")
def _(window_mask):
    for n, window in ((6, 2), (5, 5), (4, 9)):
        assert not window_mask(n, n, window).bool().triu(1).any(), (n, window)


@says(
    "a query sees itself and as many positions before it as the window has",
    "window = 1 leaves the position itself and one before it. Near the beginning there is less to "
    "see.",
)
def _(window_mask):
    for n, window in ((7, 1), (7, 3), (5, 8)):
        past = window_mask(n, n, window).bool().tril()
        expected = [list(range(max(0, t - window), t + 1)) for t in range(n)]
        assert [row.nonzero().flatten().tolist() for row in past] == expected, (n, window)


@says(
    "the queries are the last positions",
    "Row 0 belongs to position n_all - n_new; with a cache that is not position 0.",
)
def _(window_mask):
    whole = window_mask(8, 8, 3)
    for n_new in (1, 3, 7):
        assert torch.equal(window_mask(n_new, 8, 3), whole[8 - n_new :]), n_new


@says("the mask is boolean", "Attention reads a mask of numbers as something to add to the scores.")
def _(window_mask):
    assert window_mask(3, 5, 2).dtype == torch.bool


# %%
#| hints 03-window
hints = [
    "Two conditions on the query's position t and the key's position s, joined by &.",
    "t is a column of the last n_new of n_all numbers, s a row of all of them. Comparing them "
    "broadcasts to (n_new, n_all).",
    "(s <= t) & (s >= t - window), with t = torch.arange(n_all - n_new, n_all)[:, None].",
]


# %%
#| wrong 03-window: a query sees itself and as many positions before it as the window has
def window_mask(n_new, n_all, window):
    t, s = torch.arange(n_all - n_new, n_all)[:, None], torch.arange(n_all)
    return (s <= t) & (s > t - window)


# %%
#| wrong 03-window: nobody sees the future
def window_mask(n_new, n_all, window):
    t, s = torch.arange(n_all - n_new, n_all)[:, None], torch.arange(n_all)
    return (s - t).abs() <= window


# %%
#| wrong 03-window: the queries are the last positions
def window_mask(n_new, n_all, window):
    every = torch.ones(n_new, n_all, dtype=torch.bool)
    return every.tril() & every.triu(-window)


# %%
#| wrong 03-window: the mask is boolean
def window_mask(n_new, n_all, window):
    t, s = torch.arange(n_all - n_new, n_all)[:, None], torch.arange(n_all)
    return ((s <= t) & (s >= t - window)).float()


# %%
#| right 03-window
def window_mask(n_new, n_all, window):
    every = torch.ones(n_all, n_all, dtype=torch.bool)
    return (every.tril() ^ every.tril(-window - 1))[n_all - n_new :]


# %% [markdown]
r"""
## 5. The token before the chunk

Smear adds to each embedding a little of the one before it, so that the first layer already sees
pairs of tokens:

$$y_t = x_t + \text{scale} \cdot \sigma(w \cdot x_t) \cdot x_{t-1}, \qquad y_0 = x_0.$$

The gate looks only at the first few channels of $x_t$, as many as $w$ has. In a chat the text comes
in chunks: the prompt, then token after token, then the next question. `last` is the embedding that
ended the chunk before. nanochat's code for this works in training, for a prompt, and for one token
at a time:

```python
def smear(x, last, w, scale):
    gate = scale * torch.sigmoid(x[..., : len(w)] @ w).unsqueeze(-1)
    if x.size(1) == 1 and last is not None:
        return x + gate * last
    return torch.cat((x[:, :1], x[:, 1:] + gate[:, 1:] * x[:, :-1]), dim=1)
```

But a *second* chunk of several tokens forgets the token before its first one. The model reads a
slightly different text than in training, and nothing says so. Mend it.
"""


# %%
#| exercise id=03-smear points=2 minutes=15 level=2 answer=smear
def smear(x: Tensor, last: Tensor | None, w: Tensor, scale: float) -> Tensor:
    """Add to each embedding a gated share of the one before it.

    Args:
        x: (B, T, C) float32, the embeddings of a chunk.
        last: (B, 1, C), the embedding before the chunk, or None at the beginning of a text.
        w: (c,) float32 with c <= C, the weights of the gate.
        scale: how much an open gate adds.
    Returns:
        (B, T, C).
    """
    # BEGIN SOLUTION
    first = torch.zeros_like(x[:, :1]) if last is None else last
    before = torch.cat((first, x[:, :-1]), dim=1)
    gate = scale * torch.sigmoid(x[..., : len(w)] @ w).unsqueeze(-1)
    return x + gate * before
    # END SOLUTION


# %%
check("03-smear", smear)

# %%
#| checks 03-smear
generator = torch.Generator().manual_seed(0)
X, W = torch.randn(2, 8, 6, generator=generator), torch.randn(3, generator=generator)


def one_by_one(x, w, scale):
    y = x.clone()
    for b in range(x.size(0)):
        for t in range(1, x.size(1)):
            z = sum((w[c] * x[b, t, c]).item() for c in range(len(w)))
            y[b, t] += scale / (1 + math.exp(-z)) * x[b, t - 1]
    return y


@says(
    "inside a chunk it follows the formula",
    "The gate belongs to the token that receives, and what it adds is the embedding before, as it "
    "was before any smearing.",
)
def _(smear):
    for scale in (0.7, -2.0):
        assert close(smear(X, None, W, scale)[:, 1:], one_by_one(X, W, scale)[:, 1:].contiguous())


@says(
    "the first token of a text stays as it is",
    "Nothing stands before it: not the end of the row, and not the token itself.",
)
def _(smear):
    assert close(smear(X, None, W, 0.7)[:, :1], X[:, :1].contiguous())
    assert close(smear(X[:, :1], None, W, 0.7), X[:, :1].contiguous())


@says(
    "chunks of any size give what one chunk gives",
    "Every chunk but the first has a token before it, also a chunk of several tokens.",
)
def _(smear):
    whole = smear(X, None, W, 0.7)
    for sizes in ((3, 1, 4), (1, 7), (2, 2, 2, 2), (7, 1)):
        last, parts = None, []
        for chunk in X.split(sizes, dim=1):
            parts.append(smear(chunk, last, W, 0.7))
            last = chunk[:, -1:]
        assert close(torch.cat(parts, dim=1)[:, 1:], whole[:, 1:].contiguous()), sizes


# %%
#| hints 03-smear
hints = [
    "Follow a chunk of three tokens with a `last` through the broken code. Where is `last` used?",
    "Build one tensor of the shape of x that holds, for each token, the embedding before it. Only "
    "its first place differs between a first chunk and a later one.",
    "before = torch.cat((last or zeros, x[:, :-1]), dim=1); then x + gate * before, and no case "
    "for a single token is needed.",
]


# %%
#| wrong 03-smear: chunks of any size give what one chunk gives
def smear(x, last, w, scale):
    gate = scale * torch.sigmoid(x[..., : len(w)] @ w).unsqueeze(-1)
    if x.size(1) == 1 and last is not None:
        return x + gate * last
    return torch.cat((x[:, :1], x[:, 1:] + gate[:, 1:] * x[:, :-1]), dim=1)


# %%
#| wrong 03-smear: inside a chunk it follows the formula
def smear(x, last, w, scale):
    first = torch.zeros_like(x[:, :1]) if last is None else last
    before = torch.cat((first, x[:, :-1]), dim=1)
    gate = scale * torch.sigmoid(before[..., : len(w)] @ w).unsqueeze(-1)  # of the wrong token
    return x + gate * before


# %%
#| wrong 03-smear: the first token of a text stays as it is
def smear(x, last, w, scale):
    before = x.roll(1, dims=1)
    if last is not None:
        before = torch.cat((last, before[:, 1:]), dim=1)
    return x + scale * torch.sigmoid(x[..., : len(w)] @ w).unsqueeze(-1) * before


# %%
#| right 03-smear
def smear(x, last, w, scale):
    y, b = x.clone(), last
    for t in range(x.size(1)):
        if b is not None:
            gate = scale / (1 + torch.exp(-(x[:, t, : len(w)] * w).sum(-1)))
            y[:, t] += gate[:, None] * b[:, 0]
        b = x[:, t : t + 1]
    return y


# %% [markdown]
r"""
## 6. The softcap, in the right order

Logits are capped smoothly: $\text{cap} \cdot \tanh(z / \text{cap})$. The first nanochat did it in
the dtype of the activations and went to float32 afterwards:

```python
def softcap(logits, cap=15.0):
    return (cap * torch.tanh(logits / cap)).float()
```

bfloat16 has eight bits of precision. Near 12 its neighbours are 0.0625 apart, so many different
tokens end up with exactly the same score, and the conversion at the end brings nothing back. Mend
it: the result and all that leads to it is float32.
"""


# %%
#| exercise id=03-softcap points=1 minutes=8 level=1 answer=softcap
def softcap(logits: Tensor, cap: float = 15.0) -> Tensor:
    """cap * tanh(logits / cap), computed in float32; logits are (..., V) of any dtype."""
    # BEGIN SOLUTION
    return cap * torch.tanh(logits.float() / cap)
    # END SOLUTION


# %%
check("03-softcap", softcap)


# %%
#| checks 03-softcap
@says(
    "float32 logits follow the curve",
    "Along the diagonal near zero, smoothly flat at the cap; a clamp has a corner and no gradient.",
)
def _(softcap):
    z = torch.linspace(-40, 40, 81)
    expected = torch.tensor([15 * math.tanh(x / 15) for x in z.tolist()])
    assert close(softcap(z), expected, atol=1e-4)


@says("the cap is the one that is asked for", "15 is only the usual value.")
def _(softcap):
    z = torch.linspace(-20, 20, 41)
    assert close(softcap(2 * z, 30.0), 2 * softcap(z, 15.0), atol=1e-4)
    assert close(softcap(z / 3, cap=5.0), softcap(z, cap=15.0) / 3, atol=1e-4)


@says(
    "everything is computed in float32",
    "Digits that bfloat16 has lost do not come back: convert before the division, not after.",
)
def _(softcap):
    z = torch.linspace(-20, 20, 41).bfloat16()
    assert close(softcap(z), softcap(z.float()), atol=1e-6)


# %%
#| hints 03-softcap
hints = [
    "Which operation is the first to round its result to bfloat16?",
    "The conversion costs the same wherever it stands.",
    "cap * torch.tanh(logits.float() / cap).",
]


# %%
#| wrong 03-softcap: everything is computed in float32
def softcap(logits, cap=15.0):
    return (cap * torch.tanh(logits / cap)).float()


# %%
#| wrong 03-softcap: float32 logits follow the curve
def softcap(logits, cap=15.0):
    return logits.float().clamp(-cap, cap)


# %%
#| wrong 03-softcap: the cap is the one that is asked for
def softcap(logits, cap=15.0):
    return 15 * torch.tanh(logits.float() / 15)


# %%
#| right 03-softcap
def softcap(logits, cap=15.0):
    e = torch.exp(-2 * logits.float().abs() / cap)
    return logits.float().sign() * cap * (1 - e) / (1 + e)


# %% [markdown]
r"""
## 7. Count before you build

How many parameters has a GPT, and how many FLOPs does one token cost in training? Both follow from
the sizes, before a single tensor exists. People rent machines by these numbers.

The model of chapter 3: an embedding and a head of their own (untied), no biases, no weights in the
norms. A block has four attention matrices, of which keys and values are narrower with grouped
queries, and two MLP matrices, four times as wide inside. Training on a token costs 6 FLOPs for each
weight that *multiplies*, and attention $12 \cdot L \cdot C \cdot T$ on top.
"""


# %%
#| exercise id=03-count points=3 minutes=20 level=2 answer=count
def count(
    vocab_size: int, seq_len: int, n_layer: int, n_head: int, n_kv_head: int, n_embd: int
) -> dict[str, int]:
    """{"embedding", "head", "matrix": parameters, "flops": per token of training}.

    "matrix" counts all matrices in the blocks.
    """
    # BEGIN SOLUTION
    kv_width = n_embd // n_head * n_kv_head
    attention = 2 * n_embd * n_embd + 2 * n_embd * kv_width
    mlp = 2 * n_embd * 4 * n_embd
    matrix, table = n_layer * (attention + mlp), vocab_size * n_embd
    flops = 6 * (matrix + table) + 12 * n_layer * n_embd * seq_len
    return {"embedding": table, "head": table, "matrix": matrix, "flops": flops}
    # END SOLUTION


# %%
check("03-count", count)

# %%
#| checks 03-count
from torch import nn


def built(n_head, n_kv_head, n_embd):
    """Parameters of one block, counted on layers without storage."""
    with torch.device("meta"):
        kv = n_embd // n_head * n_kv_head
        shapes = [(n_embd, n_embd), (n_embd, kv), (n_embd, kv), (n_embd, n_embd)]
        shapes += [(n_embd, 4 * n_embd), (4 * n_embd, n_embd)]
        layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in shapes)
    return sum(p.numel() for p in layers.parameters())


@says(
    "embedding and head are two tables",
    "Untied: each has one row of n_embd numbers for every token.",
)
def _(count):
    found = count(2048, 256, 4, 4, 4, 256)
    assert found["embedding"] == found["head"] == 2048 * 256, found


@says(
    "the matrices of the blocks, without grouped queries",
    "Queries, keys, values and projection are C x C each; the MLP has two matrices of C x 4C.",
)
def _(count):
    for L, H, C in ((4, 4, 256), (12, 6, 768), (20, 10, 1280)):
        assert count(65536, 2048, L, H, H, C)["matrix"] == L * built(H, H, C), (L, C)


@says(
    "grouped queries make keys and values narrower",
    "Keys and values have n_kv_head heads of n_embd / n_head channels; queries and the projection "
    "stay as wide.",
)
def _(count):
    for L, H, H_kv, C in ((4, 4, 2, 256), (12, 6, 1, 768), (3, 8, 2, 512)):
        saved = count(512, 64, L, H, H, C)["matrix"] - count(512, 64, L, H, H_kv, C)["matrix"]
        assert saved == L * (built(H, H, C) - built(H, H_kv, C)), (H, H_kv, saved)


@says(
    "FLOPs of a token",
    "6 for each weight of blocks and head: the embedding looks up a row and multiplies nothing. "
    "Attention comes on top.",
)
def _(count):
    for sizes in ((2048, 256, 4, 4, 4, 256), (65536, 2048, 20, 10, 10, 1280)):
        found, (_, T, L, _, _, C) = count(*sizes), sizes
        assert found["flops"] == 6 * (found["matrix"] + found["head"]) + 12 * L * C * T, sizes


# %%
#| hints 03-count
hints = [
    "Write down the shape of each of the six matrices of a block, then multiply and add.",
    "kv_width = n_embd // n_head * n_kv_head. Two attention matrices are C x C and two are C x "
    "kv_width.",
    "matrix = L * (2 C C + 2 C kv_width + 8 C C); table = V C, twice; flops = 6 (matrix + table) + "
    "12 L C T.",
]


# %%
#| wrong 03-count: FLOPs of a token
def count(vocab_size, seq_len, n_layer, n_head, n_kv_head, n_embd):
    kv_width = n_embd // n_head * n_kv_head
    matrix = n_layer * (2 * n_embd * (n_embd + kv_width) + 8 * n_embd**2)
    table = vocab_size * n_embd
    flops = 6 * (matrix + 2 * table) + 12 * n_layer * n_embd * seq_len
    return {"embedding": table, "head": table, "matrix": matrix, "flops": flops}


# %%
#| wrong 03-count: grouped queries make keys and values narrower
def count(vocab_size, seq_len, n_layer, n_head, n_kv_head, n_embd):
    matrix, table = 12 * n_layer * n_embd**2, vocab_size * n_embd
    flops = 6 * (matrix + table) + 12 * n_layer * n_embd * seq_len
    return {"embedding": table, "head": table, "matrix": matrix, "flops": flops}


# %%
#| wrong 03-count: embedding and head are two tables
def count(vocab_size, seq_len, n_layer, n_head, n_kv_head, n_embd):
    kv_width = n_embd // n_head * n_kv_head
    matrix = n_layer * (2 * n_embd * (n_embd + kv_width) + 8 * n_embd**2)
    flops = 6 * matrix + 12 * n_layer * n_embd * seq_len
    return {"embedding": vocab_size * n_embd, "head": 0, "matrix": matrix, "flops": flops}


# %%
#| wrong 03-count: the matrices of the blocks, without grouped queries
def count(vocab_size, seq_len, n_layer, n_head, n_kv_head, n_embd):
    kv_width = n_embd // n_head * n_kv_head
    matrix = n_layer * (2 * n_embd * (n_embd + kv_width) + 4 * n_embd**2)
    table = vocab_size * n_embd
    flops = 6 * (matrix + table) + 12 * n_layer * n_embd * seq_len
    return {"embedding": table, "head": table, "matrix": matrix, "flops": flops}


# %%
#| right 03-count
def count(vocab_size, seq_len, n_layer, n_head, n_kv_head, n_embd):
    channels = n_embd // n_head
    shapes = [(n_embd, n_head * channels)] * 2 + [(n_embd, n_kv_head * channels)] * 2
    shapes += [(n_embd, 4 * n_embd), (4 * n_embd, n_embd)]
    found = {name: vocab_size * n_embd for name in ("embedding", "head")}
    found["matrix"] = n_layer * sum(a * b for a, b in shapes)
    attention = 3 * 2 * 2 * n_layer * seq_len * n_head * channels  # two products, three passes
    return {**found, "flops": attention + 6 * (found["matrix"] + found["head"])}


# %% [markdown]
r"""
## 8. Parameters that are only looked up

Predict before you build. *Value embeddings* are further tables like the embedding: in every other
layer, the last one included, each token has a row of its own, and attention adds it to the token's
values. The model has 12 layers, a width of 768, as many key heads as query heads, and a vocabulary
of 32,768. (A small gate decides how much of the row counts; leave it out.)

- `"tables"`: how many tables are there?
- `"parameters"`: how many parameters do they hold together?
- `"read"`: how many of these numbers does one token read on its way through the model?
- `"why"`: these parameters add next to nothing to the FLOPs of a token. Which reason is right?
    - **A** They are not trained, so they need no backward pass.
    - **B** A row is chosen by the token's id and added: no vector is multiplied by the table.
    - **C** They stand in half of the layers only.
    - **D** They are so much smaller than the matrices of the blocks.
"""

# %%
#| exercise id=03-values points=2 minutes=12 level=1 answer=values
# {"tables": ..., "parameters": ..., "read": ..., "why": "a letter"}
# BEGIN SOLUTION
values = {"tables": 6, "parameters": 6 * 32768 * 768, "read": 6 * 768, "why": "B"}
# END SOLUTION

# %%
check("03-values", values)

# %%
#| checks 03-values
with torch.device("meta"):
    TABLES = [torch.nn.Embedding(32768, 768) for layer in range(12) if (11 - layer) % 2 == 0]
    ROWS = [table(torch.zeros(1, dtype=torch.int64)) for table in TABLES]


@says("how many tables", "Every other layer of twelve, the last one included: 11, 9, 7, ...")
def _(values):
    assert close(values["tables"], len(TABLES), atol=0)


@says(
    "how many parameters",
    "A table has a row for each token of the vocabulary, as wide as the values of all heads "
    "together.",
)
def _(values):
    assert close(values["parameters"], sum(table.weight.numel() for table in TABLES), atol=0)


@says("what one token reads", "One row of each table, and of no other row a single number.")
def _(values):
    assert close(values["read"], sum(row.numel() for row in ROWS), atol=0)


@says(
    "why they cost no FLOPs",
    "Count: the tables together are larger than all matrices of the blocks, and they are trained. "
    "What does the model do with a table, and what with a matrix?",
)
def _(values):
    letter = str(values["why"]).strip().upper()
    assert letter == "B", f"you chose {letter}"


# %%
#| hints 03-values
hints = [
    "Write down the shape of one table. How many layers have one?",
    "32,768 rows of 768 numbers, six times. A token looks up one row in each.",
    "6 tables, 150,994,944 parameters, 4,608 numbers read. The 12 * 12 * 768^2 numbers in the "
    "blocks are fewer, so neither size nor number is the reason.",
]

# %%
#| wrong 03-values: how many tables
values = {"tables": 12, "parameters": 150_994_944, "read": 4608, "why": "B"}

# %%
#| wrong 03-values: how many parameters
values = {"tables": 6, "parameters": 6 * 12 * 768**2, "read": 4608, "why": "B"}

# %%
#| wrong 03-values: what one token reads
values = {"tables": 6, "parameters": 150_994_944, "read": 150_994_944, "why": "B"}

# %%
#| wrong 03-values: why they cost no FLOPs
values = {"tables": 6, "parameters": 150_994_944, "read": 4608, "why": "D"}

# %%
#| right 03-values
values = {"tables": 6.0, "parameters": 6 * 2**15 * 768, "read": 12 * 384, "why": "b"}

# %% [markdown]
r"""
## 9. The matrix that nobody should store

Predict before you run. `attend_matrix` of chapter 3 stores the scores of all heads. Take 16 heads,
a batch of 8 rows and 4,096 tokens, one layer, in float32.

- `"numbers"`: how many scores are there?
- `"gigabytes"`: how much memory is that, in units of 10⁹ bytes?
- `"twice_as_long"`: by which factor does it grow with 8,192 tokens?
- `"grouped"`: by which factor does it change when the 16 query heads share 4 key heads?
- `"crossing"`: at a width of 768, at which sequence length do the FLOPs of attention,
  $12 \cdot L \cdot C \cdot T$, equal those of the block matrices, $6 \cdot 12 \cdot L \cdot C^2$?
"""

# %%
#| exercise id=03-scores points=2 minutes=12 level=1 answer=scores
# {"numbers": ..., "gigabytes": ..., "twice_as_long": ..., "grouped": ..., "crossing": ...}
# BEGIN SOLUTION
scores = {
    "numbers": 8 * 16 * 4096**2,
    "gigabytes": 8 * 16 * 4096**2 * 4 / 1e9,
    "twice_as_long": 4,
    "grouped": 1,
    "crossing": 6 * 768,
}
# END SOLUTION

# %%
check("03-scores", scores)


# %%
#| checks 03-scores
def stored(B=8, H=16, T=4096):
    """Scores of one layer, on a device without storage."""
    return torch.empty(B, H, T, T, device="meta")


@says("how many scores", "Every query meets every key: T x T numbers for each head and each row.")
def _(scores):
    assert close(scores["numbers"], stored().numel(), atol=0)


@says("how many gigabytes", "A float32 has four bytes; units of 10**9, not of 2**30.")
def _(scores):
    assert abs(scores["gigabytes"] - stored().numel() * 4 / 1e9) < 0.05


@says("twice as long", "Both the queries and the keys become twice as many.")
def _(scores):
    assert close(scores["twice_as_long"], stored(T=8192).numel() / stored().numel(), atol=0)


@says(
    "with shared keys",
    "Each query head still has scores of its own. What becomes smaller is the cache of keys and "
    "values.",
)
def _(scores):
    q, k = torch.zeros(1, 16, 8, 4), torch.zeros(1, 4, 8, 4)
    shared = q @ k.repeat_interleave(4, dim=1).mT
    own = q @ torch.zeros(1, 16, 8, 4).mT
    assert close(scores["grouped"], shared.numel() / own.numel(), atol=0)


@says("where attention costs as much as the weights", "Set the two equal and solve for T.")
def _(scores):
    T = scores["crossing"]
    assert close(12 * 1 * 768 * T, 6 * 12 * 1 * 768**2, atol=0)


# %%
#| hints 03-scores
hints = [
    "The scores have the shape (batch, query heads, queries, keys).",
    "8 x 16 x 4096 x 4096 numbers of 4 bytes. Which of these four sizes does grouping change?",
    "2.147e9 numbers; about 8.6; a factor of 4; grouping changes none of them, so 1; T = 6 C.",
]

# %%
#| wrong 03-scores: with shared keys
scores = {
    "numbers": 2**31,
    "gigabytes": 8.59,
    "twice_as_long": 4,
    "grouped": 0.25,
    "crossing": 4608,
}

# %%
#| wrong 03-scores: twice as long
scores = {"numbers": 2**31, "gigabytes": 8.59, "twice_as_long": 2, "grouped": 1, "crossing": 4608}

# %%
#| wrong 03-scores: how many gigabytes
scores = {"numbers": 2**31, "gigabytes": 4.3, "twice_as_long": 4, "grouped": 1, "crossing": 4608}

# %%
#| wrong 03-scores: how many scores
scores = {"numbers": 2**28, "gigabytes": 8.59, "twice_as_long": 4, "grouped": 1, "crossing": 4608}

# %%
#| wrong 03-scores: where attention costs as much as the weights
scores = {"numbers": 2**31, "gigabytes": 8.59, "twice_as_long": 4, "grouped": 1, "crossing": 9216}


# %%
#| right 03-scores
scores = {"numbers": 2**31, "gigabytes": 8.6, "twice_as_long": 4, "grouped": 1.0, "crossing": 4608}

# %% [markdown]
r"""
## 10. The first loss tells the scale of the head

Predict before you run. The width is 768, the vocabulary 32,768. The vector that reaches the head
has been normalised: the mean of its squares is 1. The weights of the head are independent normal
numbers of some spread. What is the loss before the first step?

If $z$ has the variance $\sigma^2$ and the vocabulary is large, the mean of $e^z$ is
$e^{\sigma^2/2}$. A logit is a sum of 768 products. The cap at 15 hardly matters here.

Give the loss in nats, to two digits behind the point, for three spreads: `"zero"` (the book's
choice), `"gpt2"` (0.02, as in GPT-2) and `"fan_in"` ($1/\sqrt{768}$, the usual default). Read it
the other way round, too: a log that starts at 10.90 instead of 10.40 tells you what the head was.
"""

# %%
#| exercise id=03-start points=2 minutes=15 level=3 answer=start
# {"zero": nats, "gpt2": nats, "fan_in": nats}
# BEGIN SOLUTION
start = {
    "zero": math.log(32768),
    "gpt2": math.log(32768) + 768 * 0.02**2 / 2,
    "fan_in": math.log(32768) + 1 / 2,
}
# END SOLUTION

# %%
check("03-start", start)


# %%
#| checks 03-start
def measured(spread):
    """Loss of a random head on random normalised vectors, mean over all targets."""
    generator = torch.Generator().manual_seed(0)
    x = F.rms_norm(torch.randn(16, 768, generator=generator), (768,))
    logits = x @ (torch.randn(4096, 768, generator=generator) * spread).T
    logits = 15 * torch.tanh(logits / 15)
    return (logits.logsumexp(1) - logits.mean(1)).mean().item() + math.log(32768 / 4096)


@says("a head of zeros", "All logits are equal, so every token has probability 1 / V.")
def _(start):
    assert close(start["zero"], measured(0.0), atol=0.01)


@says(
    "a head with spread 0.02",
    "The variance of a logit is 768 times the square of the spread, and half of it is added.",
)
def _(start):
    assert close(start["gpt2"], measured(0.02), atol=0.02)


@says(
    "a head with spread 1 / sqrt(768)",
    "The logits then have variance 1. Being sure of something random costs more than having no "
    "opinion.",
)
def _(start):
    assert close(start["fan_in"], measured(768**-0.5), atol=0.02)


# %%
#| hints 03-start
hints = [
    "The loss is ln(sum of e^z) minus the logit of the target, whose mean is 0.",
    "The sum over V tokens is V times the mean of e^z, so its logarithm is ln V + sigma^2 / 2.",
    "sigma^2 = 768 * spread^2: 0, then 0.3072, then 1. Add half of it to ln 32768 = 10.397.",
]

# %%
#| wrong 03-start: a head with spread 1 / sqrt(768)
start = {"zero": 10.40, "gpt2": 10.55, "fan_in": 10.40}

# %%
#| wrong 03-start: a head with spread 0.02
start = {"zero": 10.40, "gpt2": 10.41, "fan_in": 10.90}

# %%
#| wrong 03-start: a head of zeros
start = {"zero": 0.0, "gpt2": 10.55, "fan_in": 10.90}


# %%
#| right 03-start
start = {"zero": 10.40, "gpt2": 10.55, "fan_in": 10.90}

# %% [markdown]
r"""
## 11. Catch a model that looks ahead

A mask that is off by one gives a wonderful training loss and a model that cannot write a sentence:
it has learnt to copy the answer. Chapter 3 tests for this by changing the second half of a text and
looking at the logits of the first. That test has a gap. Which leaks does it miss?

Write a test without the gap. `model` maps ids (1, T) to logits (1, T, V). Say whether *any* logit
depends on *any* later token: not only the next one, and not only around the middle.
"""


# %%
#| exercise id=03-leak points=3 minutes=20 level=2 answer=leaks
def leaks(model, ids: Tensor) -> bool:
    """True when a logit of the model at some position depends on a later token.

    Args:
        model: a function from ids (1, T) int64 to logits (1, T, V) float32; no state, no noise.
        ids: (1, T) int64, all below V.
    """
    # BEGIN SOLUTION
    before = model(ids)
    for t in range(1, ids.size(1)):
        changed = ids.clone()
        changed[:, t:] = (ids[:, t:] + 1) % before.size(2)
        if not torch.equal(model(changed)[:, :t], before[:, :t]):
            return True
    return False
    # END SOLUTION


# %%
check("03-leak", leaks)


# %%
#| checks 03-leak
def reader(reads):
    """A model whose logits at t are the counts of the tokens at the positions reads(t, T)."""

    def model(ids):
        T = ids.size(1)
        seen = F.one_hot(ids, 11).float()
        return torch.stack(
            [sum(seen[:, s] * (s + 1) for s in reads(t, T) if s < T) for t in range(T)], dim=1
        )

    return model


IDS = torch.randint(0, 11, (1, 12), generator=torch.Generator().manual_seed(0))


@says(
    "a causal model gives no alarm",
    "Position t may depend on token t itself: after a change at t, only earlier logits must stay.",
)
def _(leaks):
    for reads in (lambda t, T: range(t + 1), lambda t, T: [t], lambda t, T: [0, t]):
        assert leaks(reader(reads), IDS) is False


@says(
    "a mask that is off by one is caught, however little comes through",
    "Every position reads one token too far, and a softmax may give it a thousandth of the weight. "
    "Logits that do not depend on a token do not move at all: compare exactly.",
)
def _(leaks):
    past, ahead = reader(lambda t, T: range(t + 1)), reader(lambda t, T: [min(t + 1, T - 1)])
    for weight in (1.0, 1e-3):
        assert leaks(lambda ids, w=weight: past(ids) + w * ahead(ids), IDS) is True, weight


@says(
    "a leak at a single place is caught",
    "Changing one fixed part of the text shows only what is read across its border. Try all "
    "borders.",
)
def _(leaks):
    for place in (0, 3, 8):
        assert leaks(reader(lambda t, T, p=place: range(t + 1 + (t == p))), IDS) is True, place


@says(
    "a leak from far ahead is caught",
    "A position may read a token much later than the next one: look at all earlier logits.",
)
def _(leaks):
    for place in (0, 4):
        model = reader(lambda t, T, p=place: [*range(t + 1), *[T - 1] * (t == p)])
        assert leaks(model, IDS) is True, place


# %%
#| hints 03-leak
hints = [
    "Change something, run the model again and compare. Two questions: what to change, and where "
    "nothing may move?",
    "If all tokens from t on change, no logit before t may move. One t shows only leaks across t.",
    "For every t from 1 to T - 1: a copy of ids with all tokens from t on replaced by other ones, "
    "(ids + 1) % V; compare the logits before t with those of the original.",
]


# %%
#| wrong 03-leak: a leak at a single place is caught
def leaks(model, ids):
    half = ids.size(1) // 2
    changed = ids.clone()
    changed[:, half:] = (ids[:, half:] + 1) % 11
    moved = (model(changed) - model(ids)).abs().amax(dim=(0, 2))
    return moved[:half].max().item() > 0


# %%
#| wrong 03-leak: a leak at a single place is caught
def leaks(model, ids):
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 11
    return not torch.equal(model(changed)[:, :-1], model(ids)[:, :-1])


# %%
#| wrong 03-leak: a leak from far ahead is caught
def leaks(model, ids):
    before = model(ids)
    for t in range(ids.size(1) - 1):
        changed = ids.clone()
        changed[:, t + 1] = (ids[:, t + 1] + 1) % before.size(2)
        if not torch.equal(model(changed)[:, t], before[:, t]):
            return True
    return False


# %%
#| wrong 03-leak: a causal model gives no alarm
def leaks(model, ids):
    before = model(ids)
    for t in range(1, ids.size(1)):
        changed = ids.clone()
        changed[:, t:] = (ids[:, t:] + 1) % before.size(2)
        if not torch.equal(model(changed)[:, : t + 1], before[:, : t + 1]):
            return True
    return False


# %%
#| wrong 03-leak: a mask that is off by one is caught, however little comes through
def leaks(model, ids):
    before = model(ids)
    for t in range(1, ids.size(1)):
        changed = ids.clone()
        changed[:, t:] = (ids[:, t:] + 1) % before.size(2)
        if not torch.allclose(model(changed)[:, :t], before[:, :t], atol=0.1):
            return True
    return False


# %%
#| right 03-leak
def leaks(model, ids):
    before, found = model(ids), False
    for s in range(ids.size(1)):
        changed = ids.clone()
        changed[0, s] = (ids[0, s] + 5) % before.shape[-1]
        found = found or bool((model(changed) - before)[0, :s].abs().sum() > 0)
    return found


# %% [markdown]
r"""
## Open question

At depth 4 and a vocabulary of 32,768, almost all parameters are the two tables. Tying them, one
table used twice, would nearly halve the model. What would the first loss be, when the embedding has
spread 1 and every block begins as the identity: which token does such a model predict before it has
learnt anything? What would you change so that tying works? (No marks.)
"""

# %%
progress()
