# %% [markdown]
r"""
# Exercises for chapter 6: many processes

No processes are started here. A list holds what each rank has, and a function that is handed to you
plays the wire: it takes what one rank sends and gives what the other receives. That is enough to
make every mistake that costs hours on eight GPUs, and to see it at once. `check(id, answer)` looks
at an answer, `hint(id)` helps, `progress()` shows your points (sheet 0 says how).
"""

# %%
#| given
import math

import torch
from torch import Tensor

# %%
from book.graded import check, hint, progress

# %% [markdown]
r"""
## 1. Round the ring

Eight ranks add up a gradient. If all send theirs to rank 0, that rank's wire carries seven tensors
in and seven out while the others wait. In a **ring** each rank sends only to the next one (rank 7
to rank 0), always one *chunk* of the tensor, and all wires are busy. In $n-1$ rounds the sums
travel round until each rank has one complete chunk; in $n-1$ more rounds the complete chunks
travel round. So each rank sends $2\,(n-1)/n$ times the tensor, less than twice its size, whatever
$n$ is.

`tensors[r]` is what rank `r` has. Nothing may pass from rank to rank but through
`send(source, target, chunk)`, which returns the chunk as it arrives. The length need not divide by
the number of ranks: cut with `tensor_split(n)`.
"""


# %%
#| exercise id=06-ring points=4 minutes=35 level=3 answer=ring_all_reduce
def ring_all_reduce(tensors: list[Tensor], send) -> list[Tensor]:
    """Give every rank the sum, by messages round a ring.

    Args:
        tensors: one (L,) tensor for each of n ranks, float32.
        send: send(source, target, chunk) -> the chunk that arrives at rank `target`.
    Returns:
        n tensors (L,), new ones.
    """
    # BEGIN SOLUTION
    n = len(tensors)
    chunks = [list(tensor.clone().tensor_split(n)) for tensor in tensors]
    for step in range(2 * (n - 1)):
        summing = step < n - 1
        parcels = []
        for rank in range(n):
            c = (rank - step + (0 if summing else n)) % n
            parcels.append((c, chunks[rank][c].clone()))
        for rank, (c, parcel) in enumerate(parcels):
            target = (rank + 1) % n
            arrived = send(rank, target, parcel)
            chunks[target][c] = chunks[target][c] + arrived if summing else arrived
    return [torch.cat(parts) for parts in chunks]
    # END SOLUTION


# %%
check("06-ring", ring_all_reduce)


# %%
#| checks 06-ring
def draw(n, length):
    return list(torch.randn(n, length, generator=torch.Generator().manual_seed(n)))


def all_equal(results, tensors):
    total = torch.stack(tensors).double().sum(0).float()
    return len(results) == len(tensors) and all(close(r, total) for r in results)


def wire(source, target, chunk):
    return chunk.clone()


@says(
    "every rank ends with the sum",
    "Follow one chunk: n - 1 rounds add it up on its way, n - 1 rounds hand out what is complete.",
)
def _(ring_all_reduce):
    for n in (2, 4, 5):
        tensors = draw(n, 20)
        assert all_equal(ring_all_reduce(tensors, wire), tensors), f"wrong with {n} ranks."


@says(
    "a length that does not divide by the ranks",
    "tensor_split makes chunks of different lengths; 10 numbers for 4 ranks are 3, 3, 2 and 2.",
)
def _(ring_all_reduce):
    tensors = draw(4, 10)
    assert all_equal(ring_all_reduce(tensors, wire), tensors)


@says(
    "each rank sends to the next one only",
    "The target of rank r is (r + 1) % n, in every round.",
)
def _(ring_all_reduce):
    pairs = set()
    ring_all_reduce(
        draw(4, 20), lambda source, target, chunk: (pairs.add((source, target)), chunk)[1]
    )
    assert pairs <= {(r, (r + 1) % 4) for r in range(4)}, f"messages went {sorted(pairs)}."


@says(
    "no rank sends more than twice the tensor",
    "Send chunks, not whole tensors: 2 (n - 1) chunks a rank.",
)
def _(ring_all_reduce):
    sent = [0] * 5

    def send(source, target, chunk):
        sent[source] += chunk.numel()
        return chunk.clone()

    ring_all_reduce(draw(5, 20), send)
    assert max(sent) <= 2 * 4 * 4, f"a rank sent {max(sent)} numbers of a tensor of 20."


@says(
    "the numbers travel through send",
    "With a dead wire that delivers zeros nobody can know the sum.",
)
def _(ring_all_reduce):
    tensors = draw(3, 6)
    total = torch.stack(tensors).sum(0)
    found = ring_all_reduce(tensors, lambda source, target, chunk: torch.zeros_like(chunk))
    assert not any(close(result, total) for result in found)


# %%
#| hints 06-ring
hints = [
    "Draw three ranks with three chunks each, and write into every box whose numbers it holds "
    "after each round.",
    "In round `step` of the first phase rank r sends chunk (r - step) % n, and the next rank adds "
    "it to its own. Collect all parcels of a round before you deliver any.",
    "In the second phase rank r sends chunk (r + 1 - step) % n with step counted from 0 again, and "
    "the next rank keeps it in place of its own. Cut with tensor_split(n), join with torch.cat.",
]


# %%
#| wrong 06-ring: no rank sends more than twice the tensor
def ring_all_reduce(tensors, send):
    n = len(tensors)
    totals, travelling = [t.clone() for t in tensors], [t.clone() for t in tensors]
    for _ in range(n - 1):
        travelling = [send((r - 1) % n, r, travelling[(r - 1) % n]) for r in range(n)]
        totals = [total + guest for total, guest in zip(totals, travelling)]
    return totals


# %%
#| wrong 06-ring: each rank sends to the next one only
def ring_all_reduce(tensors, send):
    n = len(tensors)
    chunks = [list(tensor.tensor_split(n)) for tensor in tensors]
    sums = []
    for owner in range(n):
        others = [r for r in range(n) if r != owner]
        arrived = [send(r, owner, chunks[r][owner].clone()) for r in others]
        sums.append(sum(arrived, chunks[owner][owner].clone()))
    return [
        torch.cat([s if r == owner else send(owner, r, s) for owner, s in enumerate(sums)])
        for r in range(n)
    ]


# %%
#| wrong 06-ring: a length that does not divide by the ranks
def ring_all_reduce(tensors, send):
    n = len(tensors)
    chunks = [list(tensor.clone().view(n, -1)) for tensor in tensors]
    for step in range(2 * (n - 1)):
        parcels = [((r - step) % n, chunks[r][(r - step) % n].clone()) for r in range(n)]
        for rank, (c, parcel) in enumerate(parcels):
            target = (rank + 1) % n
            arrived = send(rank, target, parcel)
            chunks[target][c] = chunks[target][c] + arrived if step < n - 1 else arrived
    return [torch.cat(parts) for parts in chunks]


# %%
#| wrong 06-ring: the numbers travel through send
def ring_all_reduce(tensors, send):
    n = len(tensors)
    for rank in range(n):
        send(rank, (rank + 1) % n, tensors[rank])
    return [torch.stack(tensors).sum(0) for _ in tensors]


# %%
#| right 06-ring
def ring_all_reduce(tensors, send):
    n = len(tensors)
    held = [[part.clone() for part in t.tensor_split(n)] for t in tensors]
    for c in range(n):  # chunk c starts at rank c and goes round twice, less two stops
        parcel = held[c][c]
        for hop in range(2 * n - 2):
            source, target = (c + hop) % n, (c + hop + 1) % n
            parcel = send(source, target, parcel)
            if hop < n - 1:
                parcel = parcel + held[target][c]
            held[target][c] = parcel
    return [torch.cat(parts) for parts in held]


# %% [markdown]
r"""
## 2. Pieces that do not divide

The sharded optimizer gives each rank its own piece of a tensor to update. nanochat cuts along the
first dimension and stops with an error when that does not divide by the number of ranks. Cut the
flat tensor of `n` numbers instead: all ranks get pieces of one width, rounded *up*, and whoever
comes last gets a shorter one, or nothing.

With the width rounded down, the last numbers of every tensor would never be trained. Nothing would
crash.
"""


# %%
#| exercise id=06-pieces points=2 minutes=15 level=1 answer=cut_pieces
def cut_pieces(n: int, n_ranks: int) -> list[tuple[int, int]]:
    """Cut n numbers into one piece for each rank.

    Args:
        n: how many numbers; may be fewer than ranks.
    Returns:
        (start, stop) for each rank, in order, start <= stop.
    """
    # BEGIN SOLUTION
    width = -(-n // n_ranks)
    return [(min(r * width, n), min((r + 1) * width, n)) for r in range(n_ranks)]
    # END SOLUTION


# %%
check("06-pieces", cut_pieces)


# %%
#| checks 06-pieces
@says(
    "every number belongs to exactly one rank",
    "Written one after the other, the pieces must count from 0 to n - 1, no more and no less.",
)
def _(cut_pieces):
    for n, n_ranks in ((12, 4), (10, 4), (7, 2), (1001, 8)):
        together = [i for start, stop in cut_pieces(n, n_ranks) for i in range(start, stop)]
        assert together == list(range(n)), f"{n} numbers over {n_ranks} ranks: {len(together)}."


@says(
    "no rank gets more than the width rounded up",
    "One long piece at the end makes all ranks wait for its owner.",
)
def _(cut_pieces):
    for n, n_ranks in ((12, 4), (10, 4), (1001, 8), (15, 8)):
        longest = max(stop - start for start, stop in cut_pieces(n, n_ranks))
        assert longest <= -(-n // n_ranks), f"{n} numbers over {n_ranks} ranks: one has {longest}."


@says(
    "a rank without work has an empty piece",
    "There must be one pair for each rank, and no start may lie behind its stop.",
)
def _(cut_pieces):
    for n, n_ranks in ((5, 4), (2, 8), (0, 3)):
        found = cut_pieces(n, n_ranks)
        assert len(found) == n_ranks and all(start <= stop for start, stop in found), f"{found}"


# %%
#| hints 06-pieces
hints = [
    "How wide is a piece if 10 numbers go to 4 ranks? Where would the fourth piece end?",
    "`-(-n // n_ranks)` rounds up. Neither a start nor a stop may lie beyond n.",
    "(min(r * width, n), min((r + 1) * width, n)) for each rank r.",
]


# %%
#| wrong 06-pieces: every number belongs to exactly one rank
def cut_pieces(n, n_ranks):
    width = n // n_ranks
    return [(r * width, (r + 1) * width) for r in range(n_ranks)]


# %%
#| wrong 06-pieces: no rank gets more than the width rounded up
def cut_pieces(n, n_ranks):
    width = n // n_ranks
    pieces = [(r * width, (r + 1) * width) for r in range(n_ranks - 1)]
    return [*pieces, ((n_ranks - 1) * width, n)]


# %%
#| wrong 06-pieces: a rank without work has an empty piece
def cut_pieces(n, n_ranks):
    width = -(-n // n_ranks)
    return [(r * width, min((r + 1) * width, n)) for r in range(n_ranks)]


# %%
#| right 06-pieces
def cut_pieces(n, n_ranks):
    lengths = [len(part) for part in torch.arange(n).tensor_split(n_ranks)]
    stops = [sum(lengths[: r + 1]) for r in range(n_ranks)]
    return [(stop - length, stop) for stop, length in zip(stops, lengths)]


# %% [markdown]
r"""
## 3. The mean of means, again

Each rank sums the losses of its own tokens, multiplies the sum by a factor, and calls `backward`.
Then an all-reduce makes the **mean** of the gradients over the ranks, as ours and PyTorch's do.
Which factor makes that the gradient of the mean loss over all tokens of all ranks?

With factor one over *its own* tokens, a rank with 10 trained tokens counts as much as one with
1,000. Chapter 5 had the same trap within one process. Here there is a second one: somebody who has
read chapter 5 divides by the number of all tokens, and gets gradients that are too small, by a
factor that depends on how many GPUs were rented. (Adam forgives a constant factor; clipping, and
plain descent, do not.)

`counts` holds the number of trained tokens of every rank (one small all-reduce finds it out). A
rank may have none; all may have none.
"""


# %%
#| exercise id=06-factor points=2 minutes=15 level=2 answer=loss_factor
def loss_factor(counts: list[int], rank: int) -> float:
    """What a rank multiplies the sum of its losses by, before gradients are averaged over ranks.

    Args:
        counts: trained tokens of each rank.
        rank: which one this is.
    Returns:
        A finite number.
    """
    # BEGIN SOLUTION
    return len(counts) / max(sum(counts), 1)
    # END SOLUTION


# %%
check("06-factor", loss_factor)


# %%
#| checks 06-factor
@says(
    "one rank alone takes the mean",
    "With one rank there is nothing to average: the factor is one over its tokens.",
)
def _(loss_factor):
    assert close(loss_factor([40], 0), 1 / 40, atol=1e-9) and loss_factor([1], 0) == 1


@says(
    "the mean over the ranks is the mean over all tokens",
    "Averaging divides by the number of ranks. Make up for it, and let every token weigh the same.",
)
def _(loss_factor):
    for counts in ([8, 8], [1, 7, 100, 4]):
        losses = torch.rand(sum(counts), generator=torch.Generator().manual_seed(0)).split(counts)
        shares = [loss_factor(counts, r) * float(own.sum()) for r, own in enumerate(losses)]
        expected = float(torch.cat(losses).mean())
        assert close(sum(shares) / len(counts), expected), f"wrong for {counts} tokens."


@says(
    "a rank with nothing to train gets a number",
    "Its own count is 0: do not divide by it.",
)
def _(loss_factor):
    assert math.isfinite(loss_factor([0, 5], 0))


@says(
    "so do all ranks when nobody has anything to train",
    "The sum of the counts may be 0 as well.",
)
def _(loss_factor):
    assert math.isfinite(loss_factor([0, 0], 1))


# %%
#| hints 06-factor
hints = [
    "Write down what comes out of the averaging: the sum over ranks of factor * (sum of losses), "
    "divided by the number of ranks. What should it be?",
    "The same factor serves every rank, whatever its own count is.",
    "number of ranks / number of all trained tokens, and at least 1 token.",
]


# %%
#| wrong 06-factor: the mean over the ranks is the mean over all tokens
def loss_factor(counts, rank):
    return 1 / max(counts[rank], 1)


# %%
#| wrong 06-factor: the mean over the ranks is the mean over all tokens
def loss_factor(counts, rank):
    return 1 / max(sum(counts), 1)


# %%
#| wrong 06-factor: a rank with nothing to train gets a number
def loss_factor(counts, rank):
    if not any(counts):
        return 0.0
    share = counts[rank] / sum(counts)
    return share * len(counts) / counts[rank]


# %%
#| wrong 06-factor: so do all ranks when nobody has anything to train
def loss_factor(counts, rank):
    return len(counts) / sum(counts)


# %%
#| right 06-factor
def loss_factor(counts, rank):
    mean_count = sum(counts) / len(counts)
    return 1 / mean_count if mean_count else 0.0


# %% [markdown]
r"""
## 4. Clipping a gradient that nobody has

nanochat's first release clipped each rank's *own* gradient and averaged afterwards. Ranks were
clipped by different factors, and a mean of clipped gradients is not the clipped mean. Clip after
the exchange, then. But with a sharded optimizer no rank has the whole mean: after the
reduce-scatter each has its piece only. The norm of the whole needs one more collective.

This is the code of one rank. `all_reduce(number)` returns the sum of what all ranks put in. It is
a collective: **every rank must call it, exactly once**, also one whose piece is empty or whose
numbers are small; the others would wait for ever.
"""


# %%
#| exercise id=06-clip points=3 minutes=20 level=2 answer=clip_piece
def clip_piece(piece: Tensor, max_norm: float, all_reduce) -> Tensor:
    """Clip this rank's piece of a gradient by the norm of the whole gradient.

    Args:
        piece: (k,), float32; this rank's part of the averaged gradient, perhaps empty.
        all_reduce: all_reduce(float) -> float, the sum over all ranks.
    Returns:
        (k,): piece, shortened by the factor that brings the whole to max_norm if it is longer.
    """
    # BEGIN SOLUTION
    norm = math.sqrt(all_reduce(float(piece.square().sum())))
    return piece * (max_norm / norm) if norm > max_norm else piece
    # END SOLUTION


# %%
check("06-clip", clip_piece)


# %%
#| checks 06-clip
def run(clip_piece, pieces, max_norm):
    """What each rank returns, and how often each called all_reduce."""
    squares, calls, found = [float((p * p).sum()) for p in pieces], [0] * len(pieces), []
    for rank, piece in enumerate(pieces):

        def all_reduce(number, rank=rank):
            calls[rank] += 1
            return float(number) + sum(squares) - squares[rank]  # what the others put in

        found.append(clip_piece(piece, max_norm, all_reduce))
    return found, calls


whole = torch.randn(12, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 4, 12)
pieces = list(whole.split(5))  # 5, 5 and 2 numbers


@says(
    "the whole gradient is clipped to max_norm",
    "Squares add up over the ranks, norms do not: exchange the sum of squares and take the root "
    "afterwards.",
)
def _(clip_piece):
    found, _ = run(clip_piece, pieces, 2.0)
    assert close(torch.cat(found), whole * (2.0 / whole.norm().item()))


@says(
    "a short gradient stays as it is",
    "Shorten only if the norm of the whole is above max_norm.",
)
def _(clip_piece):
    found, _ = run(clip_piece, pieces, 100.0)
    assert torch.equal(torch.cat(found), whole)


@says("a gradient of zeros stays zeros", "Its norm is 0; do not divide by it.")
def _(clip_piece):
    found, _ = run(clip_piece, [torch.zeros(3), torch.zeros(2)], 1.0)
    assert close(torch.cat(found), torch.zeros(5))


@says(
    "every rank calls all_reduce once",
    "A collective inside a branch that one rank takes and another does not hangs the job. An empty "
    "piece puts in 0.",
)
def _(clip_piece):
    for case in ([*pieces, torch.zeros(0)], [torch.tensor([1e-3]), torch.tensor([9.0])]):
        _, calls = run(clip_piece, case, 1.0)
        assert calls == [1] * len(case), f"the ranks called it {calls} times."


# %%
#| hints 06-clip
hints = [
    "What must be summed over the ranks so that the norm of the whole comes out?",
    "The squares. Call all_reduce before any `if`.",
    "norm = math.sqrt(all_reduce(float(piece.square().sum()))); then multiply by max_norm / norm "
    "if norm > max_norm.",
]


# %%
#| wrong 06-clip: the whole gradient is clipped to max_norm
def clip_piece(piece, max_norm, all_reduce):
    norm = all_reduce(float(piece.norm()))
    return piece * (max_norm / norm) if norm > max_norm else piece


# %%
#| wrong 06-clip: every rank calls all_reduce once
def clip_piece(piece, max_norm, all_reduce):
    if len(piece) == 0:
        return piece
    norm = math.sqrt(all_reduce(float(piece.square().sum())))
    return piece * (max_norm / norm) if norm > max_norm else piece


# %%
#| wrong 06-clip: a short gradient stays as it is
def clip_piece(piece, max_norm, all_reduce):
    norm = math.sqrt(all_reduce(float(piece.square().sum())))
    return piece * (max_norm / max(norm, 1e-6))


# %%
#| wrong 06-clip: a gradient of zeros stays zeros
def clip_piece(piece, max_norm, all_reduce):
    norm = math.sqrt(all_reduce(float(piece.square().sum())))
    return piece * min(1.0, max_norm / norm)


# %%
#| right 06-clip
def clip_piece(piece, max_norm, all_reduce):
    total = all_reduce(torch.dot(piece, piece).item())
    if total <= max_norm**2:
        return piece.clone()
    return piece * max_norm * total**-0.5


# %% [markdown]
r"""
## 5. What fits on eight GPUs?

Predict the memory of one rank, in GB ($10^9$ bytes), when a model of depth 24 trains on 8 GPUs:
1536 channels, a vocabulary of 32,768. Embedding and head together have $2\,V\,C$ parameters and
train with AdamW, the matrices have $12\,L\,C^2$ and train with Muon. Everything is kept in
float32, 4 bytes. (Muon's row sizes and all activations are left out.)

- `"state"`: the whole optimizer state, not shared out;
- `"plain"`: weights, gradients and state of one rank in plain data parallel;
- `"stage 1"`: the same with the state shared out over the ranks;
- `"stage 2"`: the same when each rank also keeps only its own part of the averaged gradients.

Within 1 per cent.
"""

# %%
#| exercise id=06-memory points=2 minutes=15 level=2 answer=memory
# memory = {"state": ..., "plain": ..., "stage 1": ..., "stage 2": ...}
# BEGIN SOLUTION
tables, matrices = 2 * 32768 * 1536, 12 * 24 * 1536**2
weights, state = 4 * (tables + matrices) / 1e9, (8 * tables + 4 * matrices) / 1e9
memory = {
    "state": state,
    "plain": weights + weights + state,
    "stage 1": weights + weights + state / 8,
    "stage 2": weights + weights / 8 + state / 8,
}
# END SOLUTION

# %%
check("06-memory", memory)

# %%
#| checks 06-memory
shapes = {"adamw": [(32768, 1536)] * 2, "muon": [(1536, 1536)] * 96 + [(6144, 1536)] * 48}
kept = {"adamw": 2, "muon": 1}  # numbers of state for each parameter
size = {kind: sum(m * n for m, n in every) for kind, every in shapes.items()}
state = sum(4 * kept[kind] * size[kind] for kind in size) / 1e9
weights = sum(4 * n for n in size.values()) / 1e9


def near(found, expected):
    return close(found, expected, atol=0.01 * expected)


@says(
    "the optimizer's state",
    "AdamW keeps a mean and a mean square of every number; Muon keeps one momentum.",
)
def _(memory):
    assert near(memory["state"], state)


@says(
    "plain data parallel",
    "Every rank has all weights, all gradients and your whole state.",
)
def _(memory):
    assert near(memory["plain"], 2 * weights + memory["state"])


@says(
    "stage 1",
    "Only the state is shared out: each rank keeps an eighth of it, and all weights and gradients.",
)
def _(memory):
    assert near(memory["stage 1"], 2 * weights + memory["state"] / 8)


@says(
    "stage 2",
    "Gradients and state by eight; the weights are whole on every rank, for the forward pass.",
)
def _(memory):
    assert near(memory["stage 2"], weights + weights / 8 + memory["state"] / 8)


# %%
#| hints 06-memory
hints = [
    "Count parameters first: tables and matrices. Then bytes for each: weight, gradient, state.",
    "100.7 million numbers in the tables, 679.5 million in the matrices; AdamW keeps 8 bytes for "
    "each, Muon 4.",
    "Weights are 3.12 GB, gradients as much, the state 3.52 GB. Divide by 8 what is shared out.",
]

# %%
#| wrong 06-memory: the optimizer's state
memory = {"state": 6.24, "plain": 12.48, "stage 1": 7.02, "stage 2": 4.29}

# %%
#| wrong 06-memory: stage 1
memory = {"state": 3.52, "plain": 9.76, "stage 1": 1.22, "stage 2": 3.95}

# %%
#| wrong 06-memory: stage 2
memory = {"state": 3.52, "plain": 9.76, "stage 1": 6.68, "stage 2": 1.22}


# %%
#| wrong 06-memory: plain data parallel
tables, matrices = 2 * 32768 * 1536, 12 * 24 * 1536**2
weights, state = 4 * (tables + matrices) / 1e9, (8 * tables + 4 * matrices) / 1e9
memory = {
    "state": state,
    "plain": weights + state,
    "stage 1": weights + weights + state / 8,
    "stage 2": weights + weights / 8 + state / 8,
}


# %%
#| right 06-memory
memory = {"state": 3.52, "plain": 9.76, "stage 1": 6.68, "stage 2": 3.95}

# %% [markdown]
r"""
## 6. Is it worth eight GPUs?

Before you rent eight GPUs for a week you time one optimizer step on 1, 2, 4 and 8 of them. Here is
such a table; its numbers are made up, and rounded for easy arithmetic. **Strong** scaling keeps
the global batch: all GPUs together train on 524,288 tokens. **Weak** scaling keeps the batch of
each GPU at 65,536 tokens, so the global batch grows.

| GPUs | strong (s) | weak (s) |
|---:|---:|---:|
| 1 | 8.00 | 1.00 |
| 2 | 4.10 | 1.03 |
| 4 | 2.20 | 1.06 |
| 8 | 1.28 | 1.10 |

The **efficiency** is the speed in tokens per second, over the number of GPUs times the speed of
one. Give the efficiency of both at 8 GPUs, and `"cost"`: how many times the dollars of one GPU the
same training costs on eight, in the strong column, when GPUs are paid by the hour. And `"why"`:
strong scaling falls off faster, because

- `"a"`: the ring carries eight times as many bytes for each rank as with one neighbour;
- `"b"`: each GPU computes less, while the gradients to be exchanged stay as large as they are;
- `"c"`: a smaller batch on each GPU needs more steps to train on the same tokens;
- `"d"`: eight gradients must be averaged, and the noise of their mean is larger.
"""

# %%
#| exercise id=06-scaling points=2 minutes=15 level=1 answer=reading
# reading = {"strong": ..., "weak": ..., "cost": ..., "why": "a", "b", "c" or "d"}
# BEGIN SOLUTION
reading = {"strong": 8.00 / (8 * 1.28), "weak": 1.00 / 1.10, "cost": 8 * 1.28 / 8.00, "why": "b"}
# END SOLUTION

# %%
check("06-scaling", reading)


# %%
#| checks 06-scaling
def efficiency(tokens_one, seconds_one, tokens_all, seconds_all, n):
    return (tokens_all / seconds_all) / (n * tokens_one / seconds_one)


@says(
    "the efficiency of strong scaling",
    "Eight GPUs should take an eighth of the time. How much of that speed do they reach?",
)
def _(reading):
    assert close(reading["strong"], efficiency(2**19, 8.00, 2**19, 1.28, 8), atol=0.005)


@says(
    "the efficiency of weak scaling",
    "Eight GPUs do eight times the work in a step here; they should take as long as one.",
)
def _(reading):
    assert close(reading["weak"], efficiency(2**16, 1.00, 2**19, 1.10, 8), atol=0.005)


@says(
    "the cost",
    "Eight GPUs are paid for 1.28 seconds, or one for 8.00.",
)
def _(reading):
    assert close(reading["cost"], (8 * 1.28) / (1 * 8.00), atol=0.01)


@says(
    "the reason",
    "Ask of each candidate whether it is true at all, and then whether it is true of the strong "
    "column only. Exercise 1 has what a ring carries.",
)
def _(reading):
    assert reading["why"].strip().lower() == "b"


# %%
#| hints 06-scaling
hints = [
    "Turn each row into tokens per second first.",
    "Strong: 8.00 / (8 * 1.28). Weak: the time should not grow at all.",
    "The cost is one over the strong efficiency. For the reason, ask what of a step gets shorter "
    "with more GPUs and what does not.",
]

# %%
#| wrong 06-scaling: the efficiency of strong scaling
reading = {"strong": 6.25, "weak": 0.909, "cost": 1.28, "why": "b"}

# %%
#| wrong 06-scaling: the efficiency of weak scaling
reading = {"strong": 0.781, "weak": 1 / (8 * 1.10), "cost": 1.28, "why": "b"}

# %%
#| wrong 06-scaling: the cost
reading = {"strong": 0.781, "weak": 0.909, "cost": 0.16, "why": "b"}

# %%
#| wrong 06-scaling: the reason
reading = {"strong": 0.781, "weak": 0.909, "cost": 1.28, "why": "a"}

# %%
#| right 06-scaling
reading = {"weak": 0.91, "strong": 0.78, "cost": 1 / 0.78125, "why": "b"}

# %% [markdown]
r"""
## Open question

`ShardedMuonAdamW.overlap` lets the exchange of gradients begin while the backward pass still runs.
How much of it can hide behind computing, for depths 12 and 24, with the bandwidth of the machine at
hand (`python -m nanochat.distributed --check`) and the FLOPs of chapter 3? How large should a
bucket (`bucket_bytes`) be, and what goes wrong at either end? Predict, then measure with
`benchmarks/distributed.py`. (No marks.)
"""

# %%
progress()
