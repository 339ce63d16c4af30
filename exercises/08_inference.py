# %% [markdown]
r"""
# Exercises for chapter 8: inference

Generation is a loop around a model. Everything in that loop, from the cache to the calculator, can
be wrong without an error message: the model just writes worse. So each exercise compares your
function with a slower or simpler one that is certainly right. `check(id, answer)`,
`hint(id)` and `progress()` work as on the other sheets.
"""

# %%
#| given
import ast
import math
import operator
import re

import torch
import torch.nn.functional as F
from torch import Tensor

# %%
from book.graded import check, hint, progress

# %% [markdown]
r"""
## 1. Append and attend

A model that writes reads its own text again for every token, unless it keeps the keys and values
of what it has read. Then a new token brings its query, key and value; the key and value join the
cache, and the query looks at all of it. The result must be the *same* as the last row of the
whole pass. A cache that is nearly right gives text that is nearly right, and nobody finds out.

For each head: $y = \text{softmax}(q K^\top / \sqrt{D})\, V$, where $K$ and $V$ hold the old
tokens and the new one.
"""


# %%
#| exercise id=08-cache points=2 minutes=15 level=2 answer=append_and_attend
def append_and_attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of one new token over a cache.

    Args:
        q, k, v: (B, H, 1, D), of the new token.
        keys, values: (B, H, S, D), of the S tokens before it; S may be 0. Not changed.
    Returns:
        The output (B, H, 1, D), and keys and values (B, H, S + 1, D) for the next token.
    """
    # BEGIN SOLUTION
    keys, values = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
    scores = q @ keys.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, 1, S + 1)
    return scores.softmax(dim=-1) @ values, keys, values
    # END SOLUTION


# %%
check("08-cache", append_and_attend)


# %%
#| checks 08-cache
def whole(T=6):
    q, k, v = torch.randn(3, 2, 3, T, 8, generator=torch.Generator().manual_seed(0))
    return q, k, v, F.scaled_dot_product_attention(q, k, v, is_causal=True)


def step(append_and_attend, t):
    q, k, v, _ = whole()
    new = (x[:, :, t : t + 1].clone() for x in (q, k, v))
    return append_and_attend(*new, k[:, :, :t].clone(), v[:, :, :t].clone())


@says("one token equals its row of the whole pass", "The new token sees all old ones and itself.")
def _(append_and_attend):
    expected = whole()[3]
    for t in range(1, 6):
        y = step(append_and_attend, t)[0]
        assert close(y, expected[:, :, t : t + 1])


@says("the first token meets an empty cache", "With nothing before it, a token sees itself alone.")
def _(append_and_attend):
    assert close(step(append_and_attend, 0)[0], whole()[2][:, :, :1])


@says("the new key and value stand last in the cache", "Old tokens first; slots keep their order.")
def _(append_and_attend):
    _, k, v, _ = whole()
    for t in (0, 3):
        _, keys, values = step(append_and_attend, t)
        assert close(keys, k[:, :, : t + 1]) and close(values, v[:, :, : t + 1])


# %%
#| hints 08-cache
hints = [
    "First make the cache one longer, along the dimension of the tokens; then attend over it.",
    "One query needs no causal mask: everything in the cache lies in its past.",
    "torch.cat((keys, k), dim=2), scores = q @ keysᵀ / sqrt(D), softmax over the last dimension.",
]


# %%
#| wrong 08-cache: one token equals its row of the whole pass
def append_and_attend(q, k, v, keys, values):
    keys, values = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
    y = F.scaled_dot_product_attention(q, keys, values, is_causal=True)  # sees the first key only
    return y, keys, values


# %%
#| wrong 08-cache: one token equals its row of the whole pass
def append_and_attend(q, k, v, keys, values):
    keys, values = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
    return (q @ keys.transpose(-2, -1)).softmax(-1) @ values, keys, values


# %%
#| wrong 08-cache: the new key and value stand last in the cache
def append_and_attend(q, k, v, keys, values):
    keys, values = torch.cat((k, keys), dim=2), torch.cat((v, values), dim=2)
    return F.scaled_dot_product_attention(q, keys, values), keys, values


# %%
#| wrong 08-cache: the first token meets an empty cache
def append_and_attend(q, k, v, keys, values):
    grown = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
    seen = grown if keys.size(2) else (keys, values)  # "nothing to look at yet"
    return F.scaled_dot_product_attention(q, *seen), *grown


# %%
#| right 08-cache
def append_and_attend(q, k, v, keys, values):
    B, H, S, D = keys.shape
    grown = torch.empty(2, B, H, S + 1, D, dtype=k.dtype)
    grown[0, :, :, :S], grown[1, :, :, :S] = keys, values
    grown[:, :, :, S:] = torch.stack((k, v))
    weights = torch.einsum("bhtd,bhsd->bhts", q * D**-0.5, grown[0]).softmax(-1)
    return torch.einsum("bhts,bhsd->bhtd", weights, grown[1]), grown[0], grown[1]


# %% [markdown]
r"""
## 2. The second chunk (a real kind of bug)

A long prompt may be read in chunks. The first chunk works in every engine; the second one is where
they break, because the cache is no longer empty (nanochat's own engine got the first token of a
second chunk wrong). Here rows of different lengths also stand flush right: row b begins at slot
`starts[b]`, and the slots before it are padding.

```python
def padded_view(starts, length, n_new):
    if starts is None:
        return None, None
    slots = torch.arange(length + n_new)
    new = torch.arange(n_new)[:, None]                      # (T, 1)
    positions = (new.T - starts[:, None]).clamp(min=0)      # (B, T)
    visible = (slots <= new) & (slots >= starts[:, None, None])
    return positions, (visible | (slots == new)).unsqueeze(1)
```

With an empty cache this is right. With `length` slots filled, both the positions and the mask are
wrong. Mend it. The rules: a token's position counts from where its row begins (padding has
position 0); a query sees the slots of its own row up to and including its own; a padding slot
sees itself alone, since a softmax over nothing is 0/0.
"""


# %%
#| exercise id=08-view points=3 minutes=25 level=3 answer=padded_view replaces=engine.padded_view
def padded_view(
    starts: Tensor | None, length: int, n_new: int
) -> tuple[Tensor | None, Tensor | None]:
    """Positions and mask of n_new slots that come after `length` filled ones.

    Args:
        starts: (B,) int64, the slot at which each row begins; None when no row is padded.
        length: slots in the cache, S = length + n_new with the new ones.
        n_new: T, the number of new slots of every row.
    Returns:
        positions (B, T) int64 and mask (B, 1, T, S) bool, True where a query may look, both on
        the device of starts; (None, None) when starts is None.
    """
    # BEGIN SOLUTION
    if starts is None:
        return None, None
    slots = torch.arange(length + n_new, device=starts.device)  # (S,)
    new = slots[length:, None]  # (T, 1)
    positions = (new.T - starts[:, None]).clamp(min=0)  # (B, T)
    visible = (slots <= new) & (slots >= starts[:, None, None])  # (B, T, S)
    return positions, (visible | (slots == new)).unsqueeze(1)
    # END SOLUTION


# %%
check("08-view", padded_view)


# %%
#| checks 08-view
def brute_mask(starts, n):
    rows = [[[s == t or b <= s <= t for s in range(n)] for t in range(n)] for b in starts]
    return torch.tensor(rows).unsqueeze(1)


@says("no padding needs no view", "starts None gives (None, None): the model then counts itself.")
def _(padded_view):
    assert tuple(padded_view(None, 3, 2)) == (None, None)


@says("positions count from where the row begins", "Slot minus start, and 0 for padding.")
def _(padded_view):
    expected = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]])
    assert close(padded_view(torch.tensor([0, 2]), 0, 4)[0], expected)


@says("nothing of the future is seen", "A query sees slots up to and including its own.")
def _(padded_view):
    assert close(padded_view(torch.tensor([0, 0]), 0, 4)[1], brute_mask([0, 0], 4))


@says("padding is hidden, except from itself", "Before its start a row has nothing to look at.")
def _(padded_view):
    assert close(padded_view(torch.tensor([0, 2]), 0, 4)[1], brute_mask([0, 2], 4))


@says("a later chunk has the positions of one pass", "The first new slot is slot `length`, not 0.")
def _(padded_view):
    for first in (1, 2, 4):
        starts = torch.tensor([0, 2, 3])
        one_pass, chunk = padded_view(starts, 0, 5)[0], padded_view(starts, first, 5 - first)[0]
        assert chunk.shape == (3, 5 - first) and torch.equal(chunk, one_pass[:, first:])


@says("a later chunk sees what it sees in one pass", "Line the mask up with the *last* slots.")
def _(padded_view):
    for first in (1, 2, 4):
        starts = torch.tensor([0, 2, 3])
        one_pass, chunk = padded_view(starts, 0, 5)[1], padded_view(starts, first, 5 - first)[1]
        assert chunk.shape == (3, 1, 5 - first, 5)
        assert torch.equal(chunk, one_pass[:, :, first:])


# %%
#| hints 08-view
hints = [
    "Write down the slot numbers of the new tokens when 3 slots are filled and 2 are new.",
    "They are 3 and 4: the last n_new numbers of `slots`. One line of the old code is wrong.",
    "new = slots[length:, None] mends positions and mask together; mind the device of starts.",
]


# %%
#| wrong 08-view: a later chunk has the positions of one pass
def padded_view(starts, length, n_new):
    if starts is None:
        return None, None
    slots = torch.arange(length + n_new)
    new = slots[length:, None]
    positions = (torch.arange(n_new) - starts[:, None]).clamp(min=0)
    visible = (slots <= new) & (slots >= starts[:, None, None])
    return positions, (visible | (slots == new)).unsqueeze(1)


# %%
#| wrong 08-view: a later chunk sees what it sees in one pass
def padded_view(starts, length, n_new):
    if starts is None:
        return None, None
    slots = torch.arange(length + n_new)
    new = torch.arange(n_new)[:, None]
    positions = (slots[length:] - starts[:, None]).clamp(min=0)
    visible = (slots <= new) & (slots >= starts[:, None, None])
    return positions, (visible | (slots == new)).unsqueeze(1)


# %%
#| wrong 08-view: padding is hidden, except from itself
def padded_view(starts, length, n_new):
    if starts is None:
        return None, None
    slots = torch.arange(length + n_new)
    new = slots[length:, None]
    positions = (new.T - starts[:, None]).clamp(min=0)
    return positions, ((slots <= new) & (slots >= starts[:, None, None])).unsqueeze(1)


# %%
#| wrong 08-view: positions count from where the row begins
def padded_view(starts, length, n_new):
    if starts is None:
        return None, None
    slots = torch.arange(length + n_new)
    new = slots[length:, None]
    visible = (slots <= new) & (slots >= starts[:, None, None])
    return new.T - starts[:, None], (visible | (slots == new)).unsqueeze(1)


# %%
#| wrong 08-view: no padding needs no view
def padded_view(
    starts: Tensor | None, length: int, n_new: int
) -> tuple[Tensor | None, Tensor | None]:
    if starts is None:
        starts = torch.zeros(1, dtype=torch.int64)
    slots = torch.arange(length + n_new, device=starts.device)  # (S,)
    new = slots[length:, None]  # (T, 1)
    positions = (new.T - starts[:, None]).clamp(min=0)  # (B, T)
    visible = (slots <= new) & (slots >= starts[:, None, None])  # (B, T, S)
    return positions, (visible | (slots == new)).unsqueeze(1)


# %%
#| right 08-view
def padded_view(starts, length, n_new):
    if starts is None:
        return None, None
    S = length + n_new
    row = torch.arange(S).expand(len(starts), S)
    positions = torch.relu(row - starts.view(-1, 1))[:, length:]
    own = torch.eye(S, dtype=torch.bool)
    real = row >= starts.view(-1, 1)
    mask = own | (own.new_ones(S, S).tril() & real.unsqueeze(1))
    return positions, mask[:, None, length:]


# %% [markdown]
r"""
## 3. One number, one token

Stand the probabilities of a row on one another, like the rungs of a ladder, and throw one uniform
number: the rung it hits is the token. When each row brings its own number, no row's text depends
on who else is in the batch. We draw the first token whose cumulative probability is *greater* than
`uniform` times the sum of the row. Greater, not equal: otherwise the number 0 would pick a token
that has been filtered out. With 32,768 rungs, add them up in float64.
"""


# %%
#| exercise id=08-draw points=2 minutes=15 level=2 answer=draw replaces=engine.draw
def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw one id per row.

    Args:
        probabilities: (B, V) float, none negative; a row need not sum to one.
        uniform: (B,) float in [0, 1), the random number of each row.
    Returns:
        (B,) int64, each 0 to V - 1.
    """
    # BEGIN SOLUTION
    ladder = probabilities.double().cumsum(dim=-1)  # (B, V)
    target = uniform.double()[:, None] * ladder[:, -1:]
    last = probabilities.size(-1) - 1
    return torch.searchsorted(ladder, target, right=True).squeeze(-1).clamp(max=last)
    # END SOLUTION


# %%
check("08-draw", draw)


# %%
#| checks 08-draw
def table(B=5, V=7):
    p = torch.rand(B, V, generator=torch.Generator().manual_seed(1)) + 0.01
    return p / p.sum(1, keepdim=True)


def climb(p, u):
    total, height, p = sum(p), 0.0, [float(x) for x in p]
    for i, rung in enumerate(p):
        height += rung
        if height > u * total:
            return i
    return len(p) - 1


@says("draws the rung that the number hits", "Find the first cumulative sum above the number.")
def _(draw):
    p = table(1)
    numbers = [0.003, 0.13, 0.31, 0.47, 0.66, 0.82, 0.97, 0.9999]
    found = [int(draw(p, torch.tensor([u], dtype=torch.float64))[0]) for u in numbers]
    assert found == [climb(p[0].tolist(), u) for u in numbers]


@says("each row has its own number", "Row b is decided by uniform[b] alone.")
def _(draw):
    p, u = table(1).expand(4, 7), torch.tensor([0.9, 0.05, 0.5, 0.9], dtype=torch.float64)
    found, alone = draw(p, u), [draw(p[:1], u[b : b + 1])[0] for b in range(4)]
    assert found.tolist() == [int(x) for x in alone] and len(set(found.tolist())) > 1


@says("gives (B,) int64", "One id a row, as whole numbers that can index.")
def _(draw):
    found = draw(table(3), torch.tensor([0.1, 0.5, 0.9]))
    assert found.shape == (3,) and found.dtype == torch.int64


@says("rows need not sum to one", "Scale the number by the sum of the row.")
def _(draw):
    p, u = table(), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.97], dtype=torch.float64)
    assert draw(3 * p, u).tolist() == draw(p, u).tolist() == draw(p / 4, u).tolist()


@says("a token of probability 0 is never drawn", "Strictly greater: what happens at exactly 0?")
def _(draw):
    p = torch.tensor([[0.0, 0.5, 0.0, 0.5]]).expand(2, 4)
    assert draw(p, torch.tensor([0.0, 0.5], dtype=torch.float64)).tolist() == [1, 3]


@says("adds the rungs in float64", "In float32 a thousand rungs do not stand where they should.")
def _(draw):
    extra = torch.randint(2**20, (512,), generator=torch.Generator().manual_seed(2))
    counts = 2**20 + torch.stack((extra, -extra), 1).flatten()  # 1,024 rungs of 2**30 in all
    below = torch.arange(6, 1023, 8)
    edges = counts.cumsum(0)[below].double()  # exact
    p = (counts / 2**30).expand(2 * len(below), 1024)
    found = draw(p, torch.cat((edges - 0.5, edges + 0.5)) / 2**30)
    assert found.tolist() == [*below.tolist(), *(below + 1).tolist()]


# %%
#| hints 08-draw
hints = [
    "A cumulative sum is sorted. Which torch function finds a place in something sorted?",
    "`torch.searchsorted(ladder, target, right=True)` gives the first place that is greater.",
    "target is uniform.double()[:, None] * ladder[:, -1:]; squeeze, and clamp at V - 1.",
]


# %%
#| wrong 08-draw: a token of probability 0 is never drawn
def draw(probabilities, uniform):
    ladder = probabilities.double().cumsum(-1)
    target = uniform.double()[:, None] * ladder[:, -1:]
    return torch.searchsorted(ladder, target).squeeze(-1)


# %%
#| wrong 08-draw: rows need not sum to one
def draw(probabilities, uniform):
    ladder = probabilities.double().cumsum(-1)
    found = torch.searchsorted(ladder, uniform.double()[:, None], right=True)
    return found.squeeze(-1).clamp(max=probabilities.size(-1) - 1)


# %%
#| wrong 08-draw: adds the rungs in float64
def draw(probabilities, uniform):
    ladder = probabilities.cumsum(-1)
    target = uniform[:, None].float() * ladder[:, -1:]
    return torch.searchsorted(ladder, target, right=True).squeeze(-1)


# %%
#| wrong 08-draw: adds the rungs in float64
def draw(probabilities, uniform):
    ladder = probabilities.cumsum(-1).double()
    target = uniform.double()[:, None] * ladder[:, -1:]
    found = torch.searchsorted(ladder, target, right=True).squeeze(-1)
    return found.clamp(max=probabilities.size(-1) - 1)


# %%
#| wrong 08-draw: gives (B,) int64
def draw(probabilities, uniform):
    ladder = probabilities.double().cumsum(-1)
    target = uniform.double()[:, None] * ladder[:, -1:]
    return torch.searchsorted(ladder, target, right=True).squeeze(-1).int()


# %%
#| right 08-draw
def draw(probabilities, uniform):
    ladder = probabilities.to(torch.float64).cumsum(dim=1)
    reached = ladder <= uniform.to(torch.float64).view(-1, 1) * ladder[:, [-1]]
    return reached.sum(dim=1).clamp(max=ladder.size(1) - 1)


# %% [markdown]
r"""
## 4. Four knobs

Most silly words come from the tail of the distribution: a thousand tokens, each nearly impossible,
together likely enough. Four knobs change that. In this order:

1. divide the logits by the temperature; at temperature 0, all probability goes to the largest;
2. `top_k`: keep the k largest;
3. `top_p`: of what is left (as probabilities that sum to one), keep the fewest tokens, likeliest
   first, that together hold at least `top_p`. The token that reaches the limit is kept;
4. `min_p`: keep tokens at least `min_p` times as likely as the likeliest.

None switches a knob off. In the end the probabilities sum to one.
"""


# %%
#| exercise id=08-knobs points=3 minutes=25 level=2 answer=shaped
def shaped(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """The probabilities from which the next token is drawn.

    Args:
        logits: (V,) float32, all different.
        temperature: 0 (greedy) or a positive number.
        top_k, top_p, min_p: see above; None is off.
    Returns:
        (V,) float32, sums to one.
    """
    # BEGIN SOLUTION
    if temperature == 0:
        return torch.zeros_like(logits).index_fill(0, logits.argmax(), 1.0)
    p = (logits / temperature).softmax(0)
    if top_k is not None:
        p = p * (p >= p.topk(min(top_k, len(p))).values[-1])
        p = p / p.sum()
    if top_p is not None:
        ordered, where = p.sort(descending=True)
        before = ordered.cumsum(0) - ordered  # what the likelier tokens hold
        p = torch.zeros_like(p).scatter(0, where, ordered * (before < top_p))
    if min_p is not None:
        p = p * (p >= min_p * p.max())
    return p / p.sum()
    # END SOLUTION


# %%
check("08-knobs", shaped)

# %%
#| checks 08-knobs
P = torch.tensor([0.1, 0.4, 0.2, 0.3])


def kept(*numbers):
    p = torch.zeros(4)
    p[list(numbers)] = P[list(numbers)]
    return p / p.sum()


@says("temperature divides the logits", "Above 1 is flatter, below 1 sharper.")
def _(shaped):
    for temperature in (0.5, 1.0, 3.0):
        expected = P ** (1 / temperature)
        assert close(shaped(P.log(), temperature), expected / expected.sum())


@says("temperature 0 is greedy", "A limit, not a division: everything goes to the largest logit.")
def _(shaped):
    assert close(shaped(P.log(), 0.0), torch.tensor([0.0, 1.0, 0.0, 0.0]))


@says("top_k keeps the k likeliest", "Keep k tokens; k may be more than there are.")
def _(shaped):
    assert close(shaped(P.log(), top_k=3), kept(1, 2, 3)) and close(shaped(P.log(), top_k=9), P)
    assert close(shaped(P.log(), top_k=1), kept(1))


@says("top_p keeps the token that reaches the limit", "0.4 is not 0.65 yet, so a second one stays.")
def _(shaped):
    assert close(shaped(P.log(), top_p=0.65), kept(1, 3))
    assert close(shaped(P.log(), top_p=0.01), kept(1))
    assert close(shaped(P.log(), top_p=0.85), kept(1, 2, 3)) and close(
        shaped(P.log(), top_p=1.0), P
    )


@says(
    "min_p is relative to the likeliest token", "Compare with min_p times the largest probability."
)
def _(shaped):
    assert close(shaped(P.log(), min_p=0.6), kept(1, 3)) and close(
        shaped(P.log(), min_p=0.3), kept(1, 2, 3)
    )


@says("top_p counts what top_k has left", "After top_k the rest is shared out anew, to sum to one.")
def _(shaped):
    assert close(shaped(P.log(), top_k=2, top_p=0.5), kept(1))


# %%
#| hints 08-knobs
hints = [
    "Go knob by knob, always from probabilities that sum to one to such that do.",
    "For top_p sort, then look at what the tokens *before* each one hold: cumsum minus itself.",
    "Keep where that is below top_p; scatter back to the old places; divide by the sum.",
]


# %%
#| wrong 08-knobs: top_p keeps the token that reaches the limit
def shaped(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    if temperature == 0:
        return F.one_hot(logits.argmax(), len(logits)).float()
    logits = logits / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, len(logits))).values[-1], -1e9)
    p = logits.softmax(0)
    if top_p is not None:
        ordered, where = p.sort(descending=True)
        keep = ordered.cumsum(0) <= top_p + 1e-6
        keep[0] = True
        p = torch.zeros_like(p).scatter(0, where, ordered * keep)
    if min_p is not None:
        p = p * (p >= min_p * p.max())
    return p / p.sum()


# %%
#| wrong 08-knobs: min_p is relative to the likeliest token
def shaped(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    if temperature == 0:
        return F.one_hot(logits.argmax(), len(logits)).float()
    logits = logits / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, len(logits))).values[-1], -1e9)
    p = logits.softmax(0)
    if top_p is not None:
        ordered, where = p.sort(descending=True)
        p = torch.zeros_like(p).scatter(0, where, ordered * (ordered.cumsum(0) - ordered < top_p))
    if min_p is not None:
        p = p * (p >= min_p)
    return p / p.sum()


# %%
#| wrong 08-knobs: top_p counts what top_k has left
def shaped(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    if temperature == 0:
        return F.one_hot(logits.argmax(), len(logits)).float()
    p = (logits / temperature).softmax(0)
    keep = torch.ones_like(p)
    if top_k is not None:
        keep = keep * (p >= p.topk(min(top_k, len(p))).values[-1])
    if top_p is not None:
        ordered, where = p.sort(descending=True)
        keep = keep * torch.zeros_like(p).scatter(
            0, where, (ordered.cumsum(0) - ordered < top_p).float()
        )
    if min_p is not None:
        keep = keep * (p >= min_p * p.max())
    return p * keep / (p * keep).sum()


# %%
#| wrong 08-knobs: temperature 0 is greedy
def shaped(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    from nanochat.engine import Sampling, next_token_probabilities

    knobs = Sampling(temperature or 1.0, top_k, top_p, min_p)  # "0 means off"
    return next_token_probabilities(logits, knobs)


# %%
#| wrong 08-knobs: temperature divides the logits
def shaped(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    if temperature == 0:
        return torch.zeros_like(logits).index_fill(0, logits.argmax(), 1.0)
    p = (logits * temperature).softmax(0)
    if top_k is not None:
        p = p * (p >= p.topk(min(top_k, len(p))).values[-1])
        p = p / p.sum()
    if top_p is not None:
        ordered, where = p.sort(descending=True)
        before = ordered.cumsum(0) - ordered  # what the likelier tokens hold
        p = torch.zeros_like(p).scatter(0, where, ordered * (before < top_p))
    if min_p is not None:
        p = p * (p >= min_p * p.max())
    return p / p.sum()


# %%
#| wrong 08-knobs: top_k keeps the k likeliest
def shaped(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    if temperature == 0:
        return torch.zeros_like(logits).index_fill(0, logits.argmax(), 1.0)
    p = (logits / temperature).softmax(0)
    if top_k is not None:
        p = p * (p >= p.topk(top_k).values[-1])
        p = p / p.sum()
    if top_p is not None:
        ordered, where = p.sort(descending=True)
        before = ordered.cumsum(0) - ordered  # what the likelier tokens hold
        p = torch.zeros_like(p).scatter(0, where, ordered * (before < top_p))
    if min_p is not None:
        p = p * (p >= min_p * p.max())
    return p / p.sum()


# %%
#| right 08-knobs
def shaped(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    order = sorted(range(len(logits)), key=lambda i: -float(logits[i]))
    if temperature == 0:
        order, temperature = order[:1], 1.0
    order = order[:top_k]
    weights = [math.exp((float(logits[i]) - float(logits[order[0]])) / temperature) for i in order]
    p, held, chosen = [w / sum(weights) for w in weights], 0.0, {}
    for i, share in zip(order, p):
        if top_p is not None and held >= top_p:
            break
        held += share
        if min_p is None or share >= min_p * p[0]:
            chosen[i] = share
    total = sum(chosen.values())
    return torch.tensor([chosen.get(i, 0.0) / total for i in range(len(logits))])


# %% [markdown]
r"""
## 5. Predict the speed before you rent the machine

A d24 of the classic recipe: 24 layers, 12 key-value heads of 128 channels each, 730 million
weights that multiply. Weights and cache are in bfloat16, 2 bytes a number. The GPU fetches
3.35e12 bytes a second from its memory. In each step of decoding it fetches all weights once and
the keys and values of every row; the arithmetic is so little that we forget it.

Predict, on paper, with every row 1,024 tokens long:

- `cache_bytes`: bytes of keys and values for **one token** of one row;
- `grouped_bytes`: the same with 2 key-value heads instead of 12;
- `alone`: tokens per second, at most, with one row;
- `sixteen`: tokens per second of all rows together, at most, with 16 rows.

Within 3 % is right.
"""

# %%
#| exercise id=08-roofline points=2 minutes=15 level=2 answer=prediction
# A dict: {"cache_bytes": ..., "grouped_bytes": ..., "alone": ..., "sixteen": ...}
# BEGIN SOLUTION
prediction = {
    "cache_bytes": 2 * 24 * 12 * 128 * 2,
    "grouped_bytes": 2 * 24 * 2 * 128 * 2,
    "alone": 3.35e12 / (2 * 730e6 + 1024 * 147_456),
    "sixteen": 16 * 3.35e12 / (2 * 730e6 + 16 * 1024 * 147_456),
}
# END SOLUTION

# %%
check("08-roofline", prediction)

# %%
#| checks 08-roofline
from nanochat.engine import KVCache
from nanochat.model import GPTConfig


def bytes_of_cache(n_kv_head, n_tokens=1, B=1):
    config = GPTConfig(32, 2048, 24, 12, n_kv_head, 12 * 128)
    cache = KVCache(config, B, n_tokens, "meta", torch.bfloat16)
    return sum(x.numel() * x.element_size() for x in (cache.keys, cache.values))


def per_second(B):
    return B * 3.35e12 / (2 * 730e6 + bytes_of_cache(12, 1024, B))


def near(found, expected):
    return abs(found - expected) < 0.03 * expected


@says("bytes of one token's cache", "Keys and values, of every layer and head, 2 bytes a number.")
def _(answer):
    assert near(answer["cache_bytes"], bytes_of_cache(12))


@says("bytes with 2 key-value heads", "The cache shrinks as the number of key-value heads does.")
def _(answer):
    assert near(answer["grouped_bytes"], bytes_of_cache(2))


@says("speed of one row", "Bandwidth over bytes per step; weights and 1,024 tokens of cache.")
def _(answer):
    assert near(answer["alone"], per_second(1))


@says("speed of sixteen rows", "The weights are fetched once for all rows, the caches 16 times.")
def _(answer):
    assert near(answer["sixteen"], per_second(16))


# %%
#| hints 08-roofline
hints = [
    "How many numbers does one token leave in one layer? Two vectors, of which size?",
    "Time of a step = (bytes of weights + rows x 1,024 x bytes per token) / bandwidth.",
    "2 x 24 x 12 x 128 x 2 bytes; a step gives as many tokens as there are rows.",
]


# %%
#| wrong 08-roofline: bytes of one token's cache
prediction = {
    "cache_bytes": 24 * 12 * 128 * 2,
    "grouped_bytes": 2 * 24 * 2 * 128 * 2,
    "alone": 2079,
    "sixteen": 13_842,
}

# %%
#| wrong 08-roofline: speed of sixteen rows
prediction = {"cache_bytes": 147_456, "grouped_bytes": 24_576, "alone": 2079, "sixteen": 16 * 2079}

# %%
#| wrong 08-roofline: speed of one row
prediction = {"cache_bytes": 147_456, "grouped_bytes": 24_576, "alone": 2295, "sixteen": 13_842}

# %%
#| wrong 08-roofline: bytes with 2 key-value heads
prediction = {"cache_bytes": 147_456, "grouped_bytes": 147_456, "alone": 2079, "sixteen": 13_842}

# %%
#| right 08-roofline
prediction = {"cache_bytes": 147e3, "grouped_bytes": 24.6e3, "alone": 2080.0, "sixteen": 13.8e3}

# %% [markdown]
r"""
## 6. The comma that was counted away (a real bug)

People write 1,234 and Python does not read it. So nanochat's calculator began like this:

```python
def without_commas(expression):
    return expression.replace(",", "")
```

The calculator can also count letters, and now `"a,b,c".count(",")` becomes `"abc".count("")`: the
tool answers 4 with full confidence. Mend it. Only a comma that groups thousands goes, as in
1,234,567: one to three digits, then groups of exactly three. Inside quotes, single or double,
nothing changes.
"""


# %%
#| exercise id=08-commas points=2 minutes=15 level=2 answer=without_commas
def without_commas(expression: str) -> str:
    """Take the thousands commas out of the numbers of an expression.

    Args:
        expression: what the model wrote between python_start and python_end; quotes are paired,
            and there are no backslashes.
    Returns:
        The expression without these commas, otherwise unchanged.
    """
    # BEGIN SOLUTION
    pieces = re.split(r"""("[^"]*"|'[^']*')""", expression)  # plain, quoted, plain, ...
    number = r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])"
    pieces[::2] = [re.sub(number, lambda m: m[0].replace(",", ""), plain) for plain in pieces[::2]]
    return "".join(pieces)
    # END SOLUTION


# %%
check("08-commas", without_commas)


# %%
#| checks 08-commas
@says("thousands commas go", "One to three digits, then groups of three; there may be several.")
def _(without_commas):
    assert without_commas("1,234 + 12,345,678") == "1234 + 12345678"
    assert without_commas("(999,999.5*2)/1,000") == "(999999.5*2)/1000"


@says("quoted text stays as it is", "Split at the quotes first, whatever stands between them.")
def _(without_commas):
    for text in ('"a,b,c".count(",")', "'1,234'.count('1')", '"1,000 it\'s 2,000".count("0")'):
        assert without_commas(text) == text


@says("a comma that groups no thousands stays", "1,23 and 1,2345 are typing errors; leave them.")
def _(without_commas):
    for text in ("1,23 + 4", "1,2345", "12,34,567", "1,,234", ",500"):
        assert without_commas(text) == text


@says("numbers beside quoted text lose theirs", "The part outside the quotes is treated as ever.")
def _(without_commas):
    assert without_commas('"x".count("x") + 1,000') == '"x".count("x") + 1000'


# %%
#| hints 08-commas
hints = [
    "Two steps: cut the text into quoted and plain pieces, then treat the plain ones only.",
    "re.split with a group in brackets keeps the separators: every second piece is quoted.",
    r"A number: \d{1,3}(,\d{3})+ with no digit, point or comma before, no digit or comma after.",
]


# %%
#| wrong 08-commas: a comma that groups no thousands stays
def without_commas(expression):
    pieces = re.split(r"""("[^"]*"|'[^']*')""", expression)
    return "".join(p if i % 2 else p.replace(",", "") for i, p in enumerate(pieces))


# %%
#| wrong 08-commas: quoted text stays as it is
def without_commas(expression):
    number = r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])"
    return re.sub(number, lambda m: m[0].replace(",", ""), expression)


# %%
#| wrong 08-commas: numbers beside quoted text lose theirs
def without_commas(expression):
    if '"' in expression or "'" in expression:
        return expression
    number = r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])"
    return re.sub(number, lambda m: m[0].replace(",", ""), expression)


# %%
#| wrong 08-commas: thousands commas go
def without_commas(expression):
    pieces = re.split(r"""("[^"]*"|'[^']*')""", expression)
    number = r"(?<![\d.,])(\d{1,3}),(\d{3})(?![\d,])"  # one comma and no more
    pieces[::2] = [re.sub(number, r"\1\2", plain) for plain in pieces[::2]]
    return "".join(pieces)


# %%
#| right 08-commas
def without_commas(expression):
    out, quote, i = "", "", 0
    while i < len(expression):
        c = expression[i]
        run = re.match(r"[\d.,]+", expression[i:]) if not quote else None
        if run:
            whole, point, rest = run[0].partition(".")
            groups = whole.split(",")
            good = 1 <= len(groups[0]) <= 3 and all(len(g) == 3 for g in groups[1:])
            out += ("".join(groups) if good else whole) + point + rest
            i += len(run[0])
            continue
        quote = ("" if c == quote else quote) if quote else (c if c in "\"'" else "")
        out, i = out + c, i + 1
    return out


# %% [markdown]
r"""
## 7. A calculator that cannot be talked into anything

The text comes from a model that anybody may talk to, so `eval` is out of the question. Parse the
text with `ast.parse(text, mode="eval")` and compute the few kinds of node that you know: numbers,
the operators `+ - * / // % **`, and a sign. Whatever else the tree holds has no meaning and gives
None. So does everything that cannot be computed, and everything too large: a text longer than 500
characters, a number beyond 1e30. `7**7**7` is seven characters long and has 700,000 digits, so
look at a power *before* you compute it: its exponent must lie between -100 and 100.
"""


# %%
#| exercise id=08-calculator points=4 minutes=35 level=3 answer=value_of
def value_of(expression: str) -> int | float | None:
    """The value of an arithmetic expression, or None for whatever is not one.

    Args:
        expression: any text at all.
    Returns:
        A number of at most 1e30 in size, or None. Never raises.
    """
    # BEGIN SOLUTION
    operators = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
        ast.FloorDiv: operator.floordiv,
        ast.Mod: operator.mod,
        ast.Pow: operator.pow,
        ast.USub: operator.neg,
        ast.UAdd: operator.pos,
    }

    def compute(node):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            value = node.value
        elif isinstance(node, ast.BinOp) and type(node.op) in operators:
            left, right = compute(node.left), compute(node.right)
            if isinstance(node.op, ast.Pow) and abs(right) > 100:
                raise ValueError("the exponent is too large")
            value = operators[type(node.op)](left, right)
        elif isinstance(node, ast.UnaryOp) and type(node.op) in operators:
            value = operators[type(node.op)](compute(node.operand))
        else:
            raise ValueError("not arithmetic")
        if isinstance(value, complex) or not abs(value) <= 1e30:
            raise ValueError("too large, or not a number")
        return value

    try:
        return (
            compute(ast.parse(expression.strip(), mode="eval").body)
            if len(expression) <= 500
            else None
        )
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return None
    # END SOLUTION


# %%
check("08-calculator", value_of)


# %%
#| checks 08-calculator
@says("computes what Python computes", "All seven operators, brackets, signs and precedence.")
def _(value_of):
    for text in (
        "2 + 3 * 4",
        "-(7 - 9) * +2",
        "7 / 2",
        "7 // 2",
        "-7 % 3",
        "2 ** 10",
        "2 ** -1",
        "0.5 * .5",
    ):
        assert close(value_of(text), eval(text), 1e-12), text


@says("knows nothing but arithmetic", "Names, calls, texts, lists, comparisons and True give None.")
def _(value_of):
    texts = ("x", "abs(-1)", "(1).real", "[1, 2][0]", "'ab'.count('a')", "1 < 2", "True + True")
    texts += (
        "1 if 2 else 3",
        "().__class__.__name__.__len__()",
        "1 + 'a'",
        "1 & 3",
        "~1",
        "2j * 2j",
    )
    assert [t for t in texts if value_of(t) is not None] == []


@says("refuses what is too large", "A limit on the text, on exponents, and on every number.")
def _(value_of):
    texts = ("7 ** 7 ** 7", "10 ** 20 * 10 ** 20", "9 ** 99", "1e31", "1e999", "1" + " + 1" * 400)
    texts += ("1 ** 101", "(-1) ** 200", "1 ** -101", "(-10) ** 31", "-6e29 * 3")
    assert [t for t in texts if value_of(t) is not None] == []
    assert value_of("10 ** 30") == 10**30 and value_of("1 ** 100") == 1
    assert value_of("1" + 499 * " ") == 1 and value_of("1" + 500 * " ") is None


@says("never raises", "A division by zero, a broken text, a root of -1: all of them are None.")
def _(value_of):
    texts = ("1 / 0", "5 % 0", "0 ** -1", "", "2 +", "((1)", "1; 2", "(-8) ** 0.5", "\x00", "1 = 1")
    texts += ("1e30 ** 100",)  # Python cannot say how much that is
    assert [t for t in texts if value_of(t) is not None] == []


# %%
#| hints 08-calculator
hints = [
    "Write compute(node) that calls itself; three kinds of node: Constant, BinOp, UnaryOp.",
    "A dict from ast.Add and its like to functions of `operator` is the list of what you know.",
    "type(value) in (int, float), as True is an int too; check the size of every node's value.",
]


# %%
#| wrong 08-calculator: knows nothing but arithmetic
def value_of(expression):
    try:
        powers = [int(n) for n in re.findall(r"\*\*\s*-?(\d+)", expression)]
        if len(expression) > 500 or max(powers, default=0) > 100:
            return None
        value = eval(expression, {"__builtins__": {}})  # "nothing can happen without builtins"
        return value if abs(value) <= 1e30 and not isinstance(value, complex) else None
    except Exception:
        return None


# %%
#| wrong 08-calculator: refuses what is too large
def value_of(expression):
    operators = {
        **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul},
        **{ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod},
        **{ast.Pow: operator.pow, ast.USub: operator.neg, ast.UAdd: operator.pos},
    }

    def compute(node):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, ast.UnaryOp):
            return operators[type(node.op)](compute(node.operand))
        return operators[type(node.op)](compute(node.left), compute(node.right))

    try:
        value = compute(ast.parse(expression, mode="eval").body)
        return None if isinstance(value, complex) else value
    except (SyntaxError, ValueError, ArithmeticError, LookupError, AttributeError):
        return None


# %%
#| wrong 08-calculator: refuses what is too large
def value_of(expression):
    operators = {
        **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul},
        **{ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod},
        **{ast.Pow: operator.pow, ast.USub: operator.neg, ast.UAdd: operator.pos},
    }

    def compute(node):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            value = node.value
        elif isinstance(node, ast.UnaryOp) and type(node.op) in operators:
            value = operators[type(node.op)](compute(node.operand))
        elif isinstance(node, ast.BinOp) and type(node.op) in operators:
            left, right = compute(node.left), compute(node.right)
            if isinstance(node.op, ast.Pow) and abs(right) > 100:
                raise ValueError
            value = operators[type(node.op)](left, right)
        else:
            raise ValueError
        if isinstance(value, complex) or value > 1e30:  # but what of -1e31?
            raise ValueError
        return value

    try:
        return compute(ast.parse(expression, mode="eval").body) if len(expression) <= 500 else None
    except (SyntaxError, ValueError, ArithmeticError):
        return None


# %%
#| wrong 08-calculator: never raises
def value_of(expression):
    operators = {
        **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul},
        **{ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod},
        **{ast.Pow: operator.pow, ast.USub: operator.neg, ast.UAdd: operator.pos},
    }

    def compute(node):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            value = node.value
        elif isinstance(node, ast.UnaryOp) and type(node.op) in operators:
            value = operators[type(node.op)](compute(node.operand))
        elif isinstance(node, ast.BinOp) and type(node.op) in operators:
            left, right = compute(node.left), compute(node.right)
            if isinstance(node.op, ast.Pow) and abs(right) > 100:
                raise ValueError
            value = operators[type(node.op)](left, right)
        else:
            raise ValueError
        if isinstance(value, complex) or not abs(value) <= 1e30:
            raise ValueError
        return value

    try:
        return compute(ast.parse(expression, mode="eval").body) if len(expression) <= 500 else None
    except (SyntaxError, ValueError, ZeroDivisionError):  # but an OverflowError is neither
        return None


# %%
#| wrong 08-calculator: never raises
def value_of(expression):
    operators = {
        **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul},
        **{ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod},
        **{ast.Pow: operator.pow, ast.USub: operator.neg, ast.UAdd: operator.pos},
    }

    def compute(node):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, ast.UnaryOp) and type(node.op) in operators:
            return operators[type(node.op)](compute(node.operand))
        if not isinstance(node, ast.BinOp) or type(node.op) not in operators:
            raise ValueError
        left, right = compute(node.left), compute(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > 100:
            raise ValueError
        return operators[type(node.op)](left, right)

    if len(expression) > 500:
        return None
    try:
        value = compute(ast.parse(expression, mode="eval").body)
        return value if abs(value) <= 1e30 else None
    except (SyntaxError, ValueError):
        return None


# %%
#| wrong 08-calculator: knows nothing but arithmetic
def value_of(expression):
    operators = {
        **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul},
        **{ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod},
        **{ast.Pow: operator.pow, ast.USub: operator.neg, ast.UAdd: operator.pos},
    }

    def compute(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            value = node.value
        elif isinstance(node, ast.UnaryOp):
            value = operators[type(node.op)](compute(node.operand))
        else:
            left, right = compute(node.left), compute(node.right)
            if isinstance(node.op, ast.Pow) and abs(right) > 100:
                raise ValueError
            value = operators[type(node.op)](left, right)
        if isinstance(value, complex) or abs(value) > 1e30:
            raise ValueError
        return value

    try:
        return compute(ast.parse(expression, mode="eval").body) if len(expression) <= 500 else None
    except Exception:
        return None


# %%
#| wrong 08-calculator: refuses what is too large
def value_of(expression):
    operators = {
        **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul},
        **{ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod},
        **{ast.Pow: operator.pow, ast.USub: operator.neg, ast.UAdd: operator.pos},
    }

    def compute(node):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            value = node.value
        elif isinstance(node, ast.UnaryOp) and type(node.op) in operators:
            value = operators[type(node.op)](compute(node.operand))
        elif isinstance(node, ast.BinOp) and type(node.op) in operators:
            value = operators[type(node.op)](compute(node.left), compute(node.right))
        else:
            raise ValueError
        if isinstance(value, complex) or not abs(value) <= 1e30:  # but the power was computed
            raise ValueError
        return value

    try:
        return compute(ast.parse(expression, mode="eval").body) if len(expression) <= 500 else None
    except (SyntaxError, ValueError, ArithmeticError):
        return None


# %%
#| wrong 08-calculator: computes what Python computes
def value_of(expression: str) -> int | float | None:
    operators = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
        ast.FloorDiv: operator.floordiv,
        ast.Mod: math.fmod,
        ast.Pow: operator.pow,
        ast.USub: operator.neg,
        ast.UAdd: operator.pos,
    }

    def compute(node):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            value = node.value
        elif isinstance(node, ast.BinOp) and type(node.op) in operators:
            left, right = compute(node.left), compute(node.right)
            if isinstance(node.op, ast.Pow) and abs(right) > 100:
                raise ValueError("the exponent is too large")
            value = operators[type(node.op)](left, right)
        elif isinstance(node, ast.UnaryOp) and type(node.op) in operators:
            value = operators[type(node.op)](compute(node.operand))
        else:
            raise ValueError("not arithmetic")
        if isinstance(value, complex) or not abs(value) <= 1e30:
            raise ValueError("too large, or not a number")
        return value

    try:
        return (
            compute(ast.parse(expression.strip(), mode="eval").body)
            if len(expression) <= 500
            else None
        )
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return None


# %%
#| right 08-calculator
def value_of(expression):
    """A parser written by hand: no Python syntax tree at all."""
    if len(expression) > 500 or not re.fullmatch(r"[-+*/%(). 0-9e]*", expression):
        return None
    tokens = re.findall(r"\d+\.?\d*(?:e\d+)?|\.\d+|\*\*|//|\S", expression) + ["end"]
    tables = [{"+": operator.add, "-": operator.sub}]
    tables += [
        {"*": operator.mul, "/": operator.truediv, "//": operator.floordiv, "%": operator.mod}
    ]

    def small(value):
        if isinstance(value, complex) or not abs(value) <= 1e30:
            raise ValueError
        return value

    def chain(level):
        if level == len(tables):
            return sign()
        value = chain(level + 1)
        while tokens[0] in tables[level]:
            value = small(tables[level][tokens.pop(0)](value, chain(level + 1)))
        return value

    def sign():
        if tokens[0] in "+-":
            return -sign() if tokens.pop(0) == "-" else sign()
        value = atom()
        if tokens[0] != "**":
            return value
        tokens.pop(0)
        exponent = sign()
        if abs(exponent) > 100:
            raise ValueError
        return small(value**exponent)

    def atom():
        token = tokens.pop(0)
        if token == "(":
            value = chain(0)
            if tokens.pop(0) != ")":
                raise ValueError
            return value
        return small(int(token) if token.isdigit() else float(token))

    try:
        value = chain(0)
        return value if tokens == ["end"] else None
    except (ValueError, ArithmeticError, IndexError, RecursionError):
        return None


# %% [markdown]
r"""
## Open question

Two people send prompts to your engine. One sends 50 tokens and wants 500, the other sends 500 and
wants 50. Which of the two costs you more on a GPU, and which on your laptop? Should they share a
batch? (No marks.)
"""

# %%
progress()
