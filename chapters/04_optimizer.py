# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# 4. The optimizer

By the end of this chapter you have built the optimizer that trains the book's models, Muon for
the matrices and AdamW for the tables, and you have shown that it reaches a given loss in fewer
steps than AdamW alone, at rates tuned for both.
"""

# %%
import torch

from nanochat.model import GPT, GPTConfig
from nanochat.optim import build_optimizer

model = GPT(GPTConfig.for_depth(2, vocab_size=512, seq_len=64))
for group in build_optimizer(model).param_groups:
    shapes = [tuple(p.shape) for p in group["params"]]
    print(f"{group['kind']:6s} rate {group['lr']:.3f}  {len(shapes)} of shape {shapes[0]}")

# %% [markdown]
r"""
This is the finished thing looking at a small model: two tables go to AdamW, each with its own
rate, and every matrix inside the blocks goes to Muon, grouped by shape. The chapter explains why
a matrix deserves another treatment than a table.

**What you will be able to do**

- derive momentum and Adam from the trouble that each one mends;
- write AdamW in eight lines and prove it equal to PyTorch's;
- explain what orthogonalising an update means, and do it with matrix products alone;
- say what each of Muon's four refinements mends, and measure it;
- split a model's parameters into groups, give each its rate, and compile the update once;
- tell a real difference between optimizers from a badly tuned baseline.

**Before you start**: chapter 3; gradients; singular values (we recall them). Reading takes 50
minutes, running under a minute on two CPU cores.
"""

# %% tags=["parameters"]
profile = "quick"
steps = 50  # training steps per run in the comparison

# %%
#| default_exp optim

# %%
#| export
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nanochat.model import GPT

# %%
import matplotlib.pyplot as plt

import nanochat.optim as package  # the variants of section 3 swap functions of this module
from nanochat.common import COLORS, figure
from nanochat.tinyworld import World, document
from nanochat.tokenizer import Tokenizer

# %% [markdown]
r"""
## 1. Downhill, and its trouble

The gradient says in which direction the loss rises fastest. **Gradient descent** takes a step the
other way, $w \leftarrow w - \eta\, g$; the **learning rate** $\eta$, or rate, says how far. On a
round bowl that works at once. Loss surfaces are not round: they are valleys, steep across and flat
along. We take the simplest valley,

$$f(x, y) = \tfrac12\,(x^2 + 50\,y^2),\qquad g = (x,\; 50\,y),$$

and follow a step: $x$ is multiplied by $1-\eta$ and $y$ by $1-50\,\eta$. If $\eta$ is above
$2/50$, the second factor is below $-1$ and $y$ grows for ever. So the steep direction sets the
largest rate, and with it $x$ shrinks by at most four percent a step. The ratio of the two
curvatures, here 50, is what makes a problem slow.
"""


# %%
def descend(update, n_steps=60):
    """Walk down the valley f(x, y) = (x^2 + 50 y^2) / 2 from (4, 1); return the path."""
    w, state, path = torch.tensor([4.0, 1.0]), {}, []
    for _ in range(n_steps):
        path.append(w.clone())
        update(w, w * torch.tensor([1.0, 50.0]), state)
    return torch.stack(path)


def sgd(w, grad, state, lr=0.03):
    """Plain gradient descent."""
    w -= lr * grad


def heavy_ball(w, grad, state, lr=0.009, beta=0.8):
    """Descent with momentum: a running sum of gradients remembers the way."""
    state["sum"] = beta * state.get("sum", torch.zeros_like(w)) + grad
    w -= lr * state["sum"]


# %% [markdown]
r"""
**Momentum** adds up gradients, and older ones count less by a factor $\beta$ a step. Across the
valley the gradients alternate and cancel. Along it they agree, and the sum of a constant gradient
is $g\,(1+\beta+\beta^2+\dots) = g/(1-\beta)$: with $\beta=0.8$, five times as far for the same
rate.

**Adam** goes further and gives each weight its own rate. It keeps two running means, $m$ of the
gradient and $v$ of its square, which forget by $\beta_1$ and $\beta_2$ a step, and moves by

$$w \leftarrow w - \eta\,\frac{\hat m}{\sqrt{\hat v} + \epsilon},\qquad
\hat m = \frac{m}{1-\beta_1^t},\quad \hat v = \frac{v}{1-\beta_2^t}.$$

Where the gradient keeps its sign, numerator and root are equal and the weight moves by $\eta$,
whether the direction is steep or flat. Where the gradient is noise around zero, $m$ is small
against $\sqrt v$ and the weight stays. The hats correct for the start, when the running means are
still mostly zeros, and the small $\epsilon$ keeps the division finite. **AdamW** adds *decoupled*
weight decay: before the step, shrink the weight by a factor $1-\eta\lambda$, apart from the
gradient and its scaling.

The rule itself works on tensors and numbers alone. Its arithmetic is in float32 whatever the dtype
of the parameter.
"""


# %%
#| export
def adamw_rule(
    param: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Change param and its two running means, all of one shape, by AdamW's step number `step`.

    The numbers may be 0-d tensors. Loshchilov and Hutter (2019).
    """
    grad = grad.float()
    m = mean.float().lerp(grad, 1 - beta1)
    v = square.float().lerp(grad.square(), 1 - beta2)
    root = (v / (1 - beta2**step)).sqrt()
    shrunk = param.float() * (1 - lr * weight_decay)
    param.copy_(shrunk - lr * (m / (1 - beta1**step)) / (root + eps))
    mean.copy_(m)
    square.copy_(v)


# %% [markdown]
r"""
A rule is called in one of two ways: as it stands, or compiled. Until section 5, which says why,
read `run_rule` as a plain call.
"""


# %%
#| export
@functools.cache
def compiled(rule: Callable[..., None]) -> Callable[..., None]:
    """Return a rule as torch.compile makes it, one for the whole process (section 5)."""
    return torch.compile(rule, dynamic=False)


def run_rule(
    rule: Callable[..., None],
    tensors: list[Tensor],
    numbers: list[float],
    group: dict[str, Any],
    *constants: Any,
) -> None:
    """Call a rule on tensors, numbers and constants, compiled if the group says so and it works."""
    if group.get("compiled"):
        scalars = [torch.tensor(float(x)) for x in numbers]
        try:
            return compiled(rule)(*tensors, *scalars, *constants)
        except RuntimeError as error:
            if not compiler_failed(error):
                raise
            group["compiled"] = False
    rule(*tensors, *numbers, *constants)


def compiler_failed(error: Exception) -> bool:
    """Say whether an error is torch.compile's, which needs a C++ compiler, and not ours."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


# %% [markdown]
r"""
`adamw_update` keeps what the rule needs from one step to the next: the two running means and the
number of the step.
"""


# %%
#| export
def adamw_update(param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """One AdamW step on one parameter, in place.

    `state` holds `step`, `mean` and `square` (shaped like param); `group` holds lr, betas, eps and
    weight_decay.
    """
    if not state:
        state.update(step=0, mean=torch.zeros_like(param), square=torch.zeros_like(param))
    state["step"] += 1
    tensors = [param, grad, state["mean"], state["square"]]
    numbers = [state["step"], group["lr"], *group["betas"], group["eps"], group["weight_decay"]]
    run_rule(adamw_rule, tensors, numbers, group)


# %%
#| test
for decay in (0.0, 0.1):
    ours, theirs = torch.ones(3, 2), torch.nn.Parameter(torch.ones(3, 2))
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.95), weight_decay=decay)
    group, state = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-8, weight_decay=decay), {}
    for step in range(5):
        theirs.grad = torch.randn(3, 2, generator=torch.Generator().manual_seed(step))
        reference.step()
        adamw_update(ours, theirs.grad, state, group)
    assert torch.allclose(ours, theirs.detach(), atol=1e-6)


# %%
def adam(w, grad, state, lr=0.25):
    """The function we keep, on the valley."""
    adamw_update(w, grad, state, dict(lr=lr, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0))


fig, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.6), dpi=85, layout="constrained")
fig.set_label(
    "Left: contours of a valley with three paths. Right: their heights fall, descent last."
)
fig.suptitle("Descent creeps along the floor; momentum and Adam get further", fontsize=10)
x, y = torch.meshgrid(torch.linspace(-1, 4.3, 60), torch.linspace(-1.1, 1.3, 40), indexing="xy")
for ax in (left, right):
    ax.set_prop_cycle(color=COLORS)
left.contour(x, y, (x**2 + 50 * y**2) / 2, levels=[0.3, 2, 8, 20], colors="#bbbbbb", linewidths=0.8)
for rule in (sgd, heavy_ball, adam):
    path = descend(rule)
    left.plot(*path[:25].T, marker=".", markersize=4, linewidth=1)
    height = (path[:, 0] ** 2 + 50 * path[:, 1] ** 2) / 2
    right.semilogy(height, label=rule.__name__.replace("_", " "))
left.set_xlabel("x (flat direction)", fontsize=9)
left.set_ylabel("y (steep direction)", fontsize=9)
right.set_xlabel("step", fontsize=9)
right.set_ylabel("f(x, y)", fontsize=9)
right.legend(fontsize=8, frameon=False)
plt.show()

# %% [markdown]
r"""
Why decay apart from the gradient? We take 2,000 weights of 1 whose gradients are nothing but
noise, half of them small noise and half large. Decay should pull all of them to zero alike.
"""


# %%
def mean_weights(decoupled, decay=0.5, n_steps=200):
    """Adam on pure noise of spread 0.1 and 10; returns the mean weight of each half."""
    w, state = torch.ones(2, 1000), {}
    group = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=decay * decoupled)
    generator = torch.Generator().manual_seed(0)
    for _ in range(n_steps):
        noise = torch.randn(2, 1000, generator=generator) * torch.tensor([[0.1], [10.0]])
        adamw_update(w, noise + decay * (not decoupled) * w, state, group)
    return w.mean(1)


for name, decoupled in (("added to the gradient", False), ("decoupled (AdamW)", True)):
    small, large = mean_weights(decoupled)
    print(f"decay {name:22s} small noise: {small:5.2f}   large noise: {large:5.2f}")

# %% [markdown]
r"""
Added to the gradient, decay is divided by the root like everything else: where gradients are large
it all but vanishes. Decoupled, it is the same for every weight.

> **Exercise 4.1.** `adamw_update` with `betas=(0, 0)` and no decay has a simple closed form.
> Which? *(It is an optimizer with a name of its own.)*

## 2. Why a matrix is not a bag of numbers

Adam treats a weight matrix as a long list of independent numbers. But a matrix is a map: it
stretches some directions of its input a lot and others little. The stretch factors are its
**singular values**, $G = U\,\mathrm{diag}(s)\,V^\top$: turn by $V^\top$, stretch by $s$, turn by
$U$.

We ask a precise question. A step $\Delta$ changes the loss by about $\langle G, \Delta\rangle$, the
sum of the products of their entries. *Among all steps of one size, which lowers the loss most?* The
answer depends on what we call the size of a matrix:

| the size of $\Delta$ is | the best step is | known as |
|---|---|---|
| the root of the sum of squares | $-\eta\,G/\lVert G\rVert$ | gradient descent |
| the largest single entry | $-\eta\,\mathrm{sign}(G)$ | Adam, without its running means |
| the largest stretch, $s_{\max}(\Delta)$ | $-\eta\,UV^\top$ | **Muon** |

The third size is the natural one for a layer: an update whose largest stretch is $\eta$ changes no
output by more than $\eta$ times the length of the input. $UV^\top$ uses that allowance fully: it
keeps the directions of $G$ and moves *every* one of them by $\eta$. In two dimensions we can see
it.
"""

# %%
G = torch.tensor([[2.0, 1.2], [0.3, 0.9]])
u, s, vh = torch.linalg.svd(G)
angle = torch.linspace(0, 2 * torch.pi, 100)
circle = torch.stack([angle.cos(), angle.sin()])
fig, axes = plt.subplots(1, 3, figsize=(7, 2.4), dpi=85, layout="constrained")
fig.set_label("An ellipse, a line and a circle, each with two marked arrows.")
for ax, (name, step) in zip(axes, {"G": G, "sign(G)": G.sign(), "UV^T": u @ vh}.items()):
    ax.plot(*circle, color="#bbbbbb", linewidth=0.8)
    ax.plot(*(step @ circle), color=COLORS[0])
    for i in range(2):
        ax.annotate("", step @ vh[i], (0, 0), arrowprops=dict(arrowstyle="->", color=COLORS[1]))
    gain = float((G * step).sum() / torch.linalg.svdvals(step)[0])
    ax.set_title(f"${name}$ gains {gain:.2f}", fontsize=10, loc="left")
    ax.set(aspect="equal", xlim=(-2.6, 2.6), ylim=(-2, 2))
    ax.tick_params(labelsize=7)
fig.suptitle("$UV^T$ keeps a circle of inputs a circle, and gains most", fontsize=10)
plt.show()

# %% [markdown]
r"""
Each panel shows where a step sends the grey circle of inputs (the arrows: where the singular
directions of $G$ end) and what it gains when scaled to a largest stretch of one. The gradient
spends most of its step on one direction. The sign matrix, here, even forgets the other one and maps
the circle to a line. $UV^\top$ turns the circle and keeps it a circle. Its gain is the sum of the
singular values, and no step of that stretch gains more. We try.
"""

# %%
others = torch.randn(10_000, 2, 2, generator=torch.Generator().manual_seed(0))
others /= torch.linalg.svdvals(others)[:, :1, None]  # largest stretch 1
best_other = (G * others).sum((1, 2)).max()
print(f"the best of 10,000 random steps gains {best_other:.2f}, UV^T {s.sum():.2f}")

# %% [markdown]
r"""
Now look at the gradient of a matrix in a model that has begun to train.
"""

# %%
torch.set_num_threads(1)  # matrices as small as these gain nothing from a second thread
world = World()
texts = [document(world, i) for i in range(1200)]
tokenizer = Tokenizer.train(texts[:300], vocab_size=512)
stream = torch.tensor([t for text in texts for t in tokenizer.encode(text, bos=True)])
rows = stream[: len(stream) // 129 * 129].view(-1, 129)
val_rows, train_rows = rows[:16], rows[16:]
config = GPTConfig.for_depth(2, tokenizer.vocab_size, 128, head_dim=32)


def batch_at(step, size=6):
    """The same random rows for the same step, in every run."""
    chosen = torch.randint(
        0, len(train_rows), (size,), generator=torch.Generator().manual_seed(step)
    )
    return train_rows[chosen]


def train(optimizer, model, n_steps, schedule=lambda step: 1.0):
    """A bare training loop with a factor on every rate; returns the loss of every step."""
    initial, losses = [group["lr"] for group in optimizer.param_groups], []
    for step in range(n_steps):
        for group, rate in zip(optimizer.param_groups, initial):
            group["lr"] = rate * schedule(step)
        idx = batch_at(step)
        loss = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %%
model = GPT(config)
train(torch.optim.AdamW(model.parameters(), lr=0.003), model, 20)
gradient = model.blocks[1].mlp.up.weight.grad
values = torch.linalg.svdvals(gradient)
half = int((values.square().cumsum(0) / values.square().sum() < 0.5).sum()) + 1
print(f"{len(values)} directions; the largest {half} hold half of the gradient's energy")

# %% [markdown]
r"""
Energy is the sum of squares. The gradient is dominated by a few directions. A step along it changes
those and hardly touches the rest, though the rest may hold what is rare and still to be learnt.
Setting all singular values to one gives the rare directions their turn.

An exact singular value decomposition is slow on a GPU. But a polynomial will do. For an odd
polynomial $p(x)=ax+bx^3+cx^5$, the matrix expression

$$p(G) = aG + b\,(GG^\top)G + c\,(GG^\top)^2 G$$

applies $p$ to each singular value and leaves $U$ and $V$ alone: it needs matrix products only.
After division by the norm of $G$ all singular values lie in $[0, 1]$; we choose a polynomial that
pushes them towards 1 and repeat it. Which one?

- **Newton-Schulz**, the textbook's, is $1.5\,x-0.5\,x^3$. It ends at exactly 1, but it multiplies a
  small value by only 1.5 in each step.
- **Muon's** triple (3.4445, -4.7750, 2.0315) multiplies it by 3.4. It never settles: values end
  anywhere between 0.7 and 1.2, which does no harm.
- **Polar Express** takes another triple in each step, the best possible for the interval that the
  step before it leaves. The first multiplies a small value by 8.
"""

# %%
#| export
POLAR_EXPRESS = (
    (8.156554525, -22.48329293, 15.87876992),
    (4.042929935, -2.808917465, 0.5000178451),
    (3.891667802, -2.772484153, 0.5060648179),
    (3.285753658, -2.368129493, 0.4644902423),
    (2.346541326, -1.709782838, 0.4232355169),
)


def orthogonalize(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return (..., m, n) with the same singular vectors and all singular values near 1.

    Five quintic steps X <- aX + (bA + cA^2)X with A = XX^T, computed in `dtype`; coefficients
    from Polar Express, Amsel et al. (2025).
    """
    x = matrix.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrix.dtype)


# %%
schemes = {
    "Newton-Schulz": [(1.5, -0.5, 0.0)] * 5,
    "Muon's triple": [(3.4445, -4.7750, 2.0315)] * 5,
    "Polar Express": POLAR_EXPRESS,
}


def five_steps(x, triples):
    """Five steps of the polynomials on the singular values themselves."""
    for a, b, c in triples:
        x = a * x + b * x**3 + c * x**5
    return x


x, share = torch.logspace(-4, 0, 300), values / values.norm() / 1.01
fig, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.6), dpi=85, layout="constrained")
fig.set_label(
    "Left: three curves that rise to 1, Polar Express first. Right: a falling line, levelled."
)
fig.suptitle("Five steps of Polar Express lift even two thousandths to about one", fontsize=10)
for ax in (left, right):
    ax.set_prop_cycle(color=COLORS)
right.semilogy(share, color="#444444", linestyle="--", label="before")
for name, triples in schemes.items():
    left.semilogx(x, five_steps(x, triples), label=name)
    right.semilogy(five_steps(share, triples), label=name)
left.set_xlabel("singular value before (share of the norm)", fontsize=8)
right.set_xlabel("singular values of the gradient, largest first", fontsize=8)
left.set_ylabel("singular value", fontsize=8)
for ax in (left, right):
    ax.tick_params(labelsize=7)
    ax.legend(fontsize=7, frameon=False)
plt.show()

# %%
#| test
matrix = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
found = torch.linalg.svdvals(orthogonalize(matrix))
assert s.max() / s.min() > 3 and (found - 1).abs().max() < 0.3
assert ((u.T @ orthogonalize(matrix) @ vh.T).diagonal() > 0.7).all()  # the same directions

# %% [markdown]
r"""
## 3. Muon

Muon in its first form is short. Momentum comes first, so that the noise of single batches averages
out *before* the singular values are levelled. (It is Nesterov's kind: the gradient of the step is
mixed into the running mean once more.) Then the orthogonal matrix takes the place of the gradient.
An orthogonal map keeps the length of its input. When it spreads that length over more outputs than
there are inputs, each of them moves less; so a tall matrix ($m>n$) gets its rate multiplied by
$\sqrt{m/n}$.
"""


# %%
def first_muon(weight, grad, state, lr, beta=0.95):
    """Muon as of 2024: momentum, five steps with one triple, in place."""
    momentum = state.setdefault("momentum", torch.zeros_like(grad)).lerp_(grad, 1 - beta)
    x = grad.lerp(momentum, beta)
    tall = x.size(0) > x.size(1)
    x = x.mT if tall else x
    x = x / x.norm()
    for a, b, c in schemes["Muon's triple"]:
        x = a * x + (b * x @ x.mT + c * x @ x.mT @ x @ x.mT) @ x
    weight -= lr * max(1, weight.size(0) / weight.size(1)) ** 0.5 * (x.mT if tall else x)


ours, theirs, state = torch.ones(48, 16), nn.Parameter(torch.ones(48, 16)), {}
reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, momentum=0.95)
for step in range(5):
    theirs.grad = torch.randn(48, 16, generator=torch.Generator().manual_seed(step))
    reference.step()
    first_muon(ours, theirs.grad, state, lr=0.1)
moved, apart = (ours - 1).norm(), (ours - theirs.detach()).norm()
print(f"after five steps {apart / moved:.1%} apart from torch.optim.Muon, which works in bfloat16")

# %% [markdown]
r"""
Four refinements have been found since. Each is a line or two, and each mends something that we can
measure.

1. **Level the rows first** (MuonEq). Five steps are too few for a direction that holds less than
   about two thousandths of the norm: it is left behind. A few rows with large gradients push the
   others there. So every row is first scaled to the root mean square of all row norms.
2. **Set the norm after** (Muon+). An orthogonal $m\times n$ matrix has norm $\sqrt{\min(m,n)}$.
   What was left behind is missing from it. Scaling to exactly that norm makes the size of a step
   independent of how many directions the five steps have reached.
3. **Even out** (NorMuon). Some rows of $UV^\top$ are systematically larger than others. Divide each
   row by its running size and rescale, so that the whole keeps its norm. (In a wide matrix the rows
   of $UV^\top$ are all of length one already; there we take the columns.)
4. **Cautious decay**: shrink a weight only where the step shrinks it as well. Decay then never
   fights the gradient.
"""


# %%
#| export
def equilibrate(matrix: Tensor) -> Tensor:
    """Scale every row of (..., m, n) to the root mean square of the row norms; zero rows stay zero.

    MuonEq, Chang et al. (2026).
    """
    rows = matrix.norm(dim=-1, keepdim=True)
    return matrix * (rows.square().mean(-2, keepdim=True).sqrt() / rows.clamp(min=1e-10))


def set_norm(update: Tensor) -> Tensor:
    """Scale (..., m, n) to the norm sqrt(min(m, n)) of an orthogonal matrix; zeros stay. Muon+."""
    norm = update.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10)
    return update * (math.sqrt(min(update.shape[-2:])) / norm)


def even_out(update: Tensor, square: Tensor, beta: float) -> Tensor:
    """Give the rows (or columns, in a wide matrix) of update (k, m, n) the same running size.

    `square` (k, m, 1) or (k, 1, n) is the running mean of squares, updated in place. The norm of
    each matrix is kept. NorMuon, Li et al. (2025).
    """
    dim = -1 if square.size(-1) == 1 else -2
    square.lerp_(update.square().mean(dim, keepdim=True), 1 - beta)
    scaled = update / square.sqrt().clamp(min=1e-10)
    before, after = (t.norm(dim=(-2, -1), keepdim=True) for t in (update, scaled))
    return scaled * (before / after.clamp(min=1e-10))


# %% [markdown]
r"""
Three matrices of the model from above show what the first three do. *Left behind* is the share of
directions whose singular value is below one half after five steps, *norm* is against the goal, and
*rows* is the largest row of the update as a multiple of the smallest.
"""


# %%
def show(name, update):
    """Print the three measures of an update."""
    behind = float((torch.linalg.svdvals(update) < 0.5).float().mean())
    rows = update.norm(dim=1)
    norm = update.norm() / min(update.shape) ** 0.5
    print(f"  {name:26s} {behind:12.0%} {norm:7.2f} {rows.max() / rows.min():7.1f}")


print(f"{'':28s}  left behind    norm    rows")
for part in ("attention.q", "attention.v", "mlp.up"):
    G = model.get_submodule(f"blocks.1.{part}").weight.grad
    G = G[G.norm(dim=1) > 0]  # rows of dead neurons have no gradient at all
    print(part)
    show("orthogonalised", orthogonalize(G))
    update = orthogonalize(equilibrate(G))
    show("rows levelled first", update)
    update = set_norm(update)
    show("... norm set", update)
    show("... evened out", even_out(update[None], torch.zeros(1, len(update), 1), beta=0.9)[0])

# %% [markdown]
r"""
Fewer directions are left behind, the norm is what it should be, and no row of a layer learns many
times faster than the others. The fourth shows in one dimension. The loss $\frac12(w-1)^2$ pulls a
weight up to 1 while decay pulls it down to 0.
"""


# %%
def pulled(cautious, w=0.2, decay=0.5):
    """Where a weight ends that the loss (w - 1)^2 / 2 pulls up and decay pulls down."""
    for _ in range(200):
        update = w - 1
        acts = update * w >= 0 or not cautious
        w -= 0.1 * (update + decay * w * acts)
    return w


print(f"plain decay ends at {pulled(False):.2f}, cautious decay at {pulled(True):.2f}")

# %% [markdown]
r"""
Plain decay settles on a compromise that neither wanted. Cautious decay lets the loss have its way
and shrinks only what has gone too far.

Now the whole rule.
"""


# %%
#| export
def muon_rule(
    param: Tensor,
    grad: Tensor,
    momentum: Tensor,
    square: Tensor,
    lr: float,
    beta: float,
    beta2: float,
    weight_decay: float,
    dtype: torch.dtype,
) -> None:
    """Change stacked matrices (k, m, n), momentum alike and square as in `even_out` by one step.

    Nesterov momentum, rows levelled, orthogonalised in `dtype`, norm set, evened out, times
    lr * sqrt(max(1, m / n)); weight decay only where it pulls the way the step does (cautious
    decay, Chen et al. 2025). All tensors float32; the numbers may be 0-d tensors. Jordan et al.
    (2024), with the refinements of nanochat's recipe of July 2026.
    """
    momentum.lerp_(grad, 1 - beta)
    update = equilibrate(grad.lerp(momentum, beta))
    update = even_out(set_norm(orthogonalize(update, dtype)), square, beta2)
    decay = weight_decay * param * (update * param >= 0)
    param.sub_(lr * math.sqrt(max(1.0, param.size(-2) / param.size(-1))) * (update + decay))


# %% [markdown]
r"""
Around the rule, `muon_update` stacks all matrices of one shape, so that each product is one batched
call for all of them, and copies the results back.
"""


# %%
#| export
def muon_update(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
) -> None:
    """One Muon step on k matrices of one shape (m, n), in place.

    A state holds `momentum` (m, n) and `square`; `group` holds lr, momentum, beta2, weight_decay
    and the dtype to orthogonalise in.
    """
    m, n = params[0].shape
    for param, state in zip(params, states):
        if not state:
            shape = (m, 1) if m >= n else (1, n)
            state.update(momentum=torch.zeros_like(param), square=param.new_zeros(shape))
    momenta, squares = ([state[key] for state in states] for key in ("momentum", "square"))
    stacks = [torch.stack(tensors).float() for tensors in (params, grads, momenta, squares)]
    numbers = [group["lr"], group["momentum"], group["beta2"], group["weight_decay"]]
    run_rule(muon_rule, stacks, numbers, group, group["dtype"])
    for tensors, stack in zip((params, momenta, squares), (stacks[0], *stacks[2:])):
        torch._foreach_copy_(tensors, list(stack))


# %%
#| test
update = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
even = even_out(update, torch.zeros(2, 6, 1), beta=0.9)
assert torch.allclose(even.norm(dim=(1, 2)), update.norm(dim=(1, 2)), atol=1e-5)
for sizes in (even.norm(dim=-1), equilibrate(update).norm(dim=-1)):
    assert torch.allclose(sizes, sizes.mean(-1, keepdim=True).expand_as(sizes), atol=1e-5)
assert torch.allclose(set_norm(update).norm(dim=(1, 2)), torch.tensor(2.0))

# %% [markdown]
r"""
> **Exercise 4.2.** Momentum first or orthogonalisation first: swap the two in a copy of
> `muon_rule` and train. Which is worse, and why? *(Think of what orthogonalising does to the
> noise of one small batch.)*

## 4. One optimizer, two kinds of group

PyTorch's optimizers already work on *groups* of parameters with settings of their own. Ours adds
two settings: `kind` says which rule the group follows, `compiled` how the rule is run. State can be
saved as named tensors (chapter 5 puts them into a file that executes nothing when loaded), and one
call sets the schedule of the step.
"""


# %%
#| export
class MuonAdamW(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the rest, told apart by each group's `kind`.

    A group of kind "muon" holds matrices of one shape with lr, momentum, beta2, weight_decay and
    the dtype to orthogonalise in; one of kind "adamw" holds lr, betas, eps and weight_decay. With
    `compiled=True` in a group its update is compiled.
    """

    def __init__(self, param_groups: list[dict[str, Any]]):
        super().__init__(param_groups, defaults={})
        for group in self.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group.setdefault("initial_decay", group["weight_decay"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["kind"] == "muon" and params:
                muon_update(
                    params, [p.grad for p in params], [self.state[p] for p in params], group
                )
            elif group["kind"] == "adamw":
                for param in params:
                    adamw_update(param, param.grad, self.state[param], group)

    def named_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the state as tensors named `<parameter>.<key>`, ready for safetensors."""
        names = {param: name for name, param in model.named_parameters()}
        return {
            f"{names[param]}.{key}": torch.as_tensor(value)
            for param, state in self.state.items()
            for key, value in state.items()
        }

    def load_named_state(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Take back what `named_state` gave; parameters without an entry start afresh."""
        params = dict(model.named_parameters())
        mine = {param for group in self.param_groups for param in group["params"]}
        for name, tensor in tensors.items():
            owner, key = name.rsplit(".", 1)
            if params[owner] in mine:
                value = int(tensor) if key == "step" else tensor.to(params[owner].device).clone()
                self.state[params[owner]][key] = value

    def set_schedule(self, lr: float, momentum: float, decay: float = 1.0) -> None:
        """Scale every group's initial rate by `lr`; set Muon's momentum, scale Muon's decay."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * lr
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = group["initial_decay"] * decay


# %% [markdown]
r"""
Who goes where? Muon is for matrices that *map vectors to vectors*: the six of every block. The
**embedding** is a table: only the rows of tokens that occurred get a gradient, and levelling its
singular values would stir all the others. The **head** maps to logits of which a few matter at a
time. Both go to AdamW, with rates that differ by a factor of forty.

A modern model (chapter 3, section 9) brings more. **Value embeddings** are tables again. The gates
of the values are matrices of the blocks and go to Muon. The **scalars** of smear, backout and the
residual stream are single numbers that must move by tenths, so their rates are high; smear's small
gate goes with them. The factors of the stream itself multiply up over the layers and may only
creep.

The two scalars of the residual stream, `stream_scale` and `start_scale`, need care. Their rates
were found with batches of 2^19 tokens. A smaller batch has a noisier gradient, which shakes these
numbers, and with them the whole stream. Chapter 5 lowers `matrix_lr` with the root of the batch,
and here the rates of these two follow it. That is no detail: at depth 12, after 62 million tokens
in batches of 2^16, three seeds came to 1.1101 ± 0.0004 bits per byte with the high rates, and one
of them to 1.0964 with rates that follow the batch (on an H200, `benchmarks/RESULTS.md`).
"""


# %%
#| export
PLAIN = dict(kind="adamw", betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)
TUNED = {
    "head": dict(betas=(0.8, 0.96), weight_decay=0.01),
    "embedding": dict(betas=(0.8, 0.995), weight_decay=0.001),
    "values": dict(betas=(0.8, 0.995), weight_decay=0.01),
}
SCALARS = {
    "stream_scale": dict(lr=0.005, weight_decay=0.05),
    "start_scale": dict(lr=0.5, betas=(0.96, 0.95)),
    "smear_gate.weight": dict(lr=0.2),
    "smear_scale": dict(lr=0.2),
    "backout_scale": dict(lr=0.2),
}


# %% [markdown]
r"""
A classic model has the `PLAIN` settings of nanochat's first recipe. The `TUNED` ones for the tables
of a modern model are those of its newest, found by a search.

Adam's rates shrink as $1/\sqrt{\text{width}}$, anchored at width 768, so that one set of numbers
serves every depth. Muon needs no such rule: its update has the same scale at every width by
construction. Value embeddings learn at half the embedding's rate.

The scalars get a larger $\epsilon$. In a fresh model all blocks are the identity and the last norm
forgets sizes, so the true gradient of a residual scalar is *zero*, and what arrives is rounding,
about $10^{-9}$. Divided by its own root it would become a full step in a random direction.
"""


# %%
#| export
def param_groups(
    model: GPT,
    matrix_lr: float = 0.02,
    embedding_lr: float = 0.3,
    head_lr: float = 0.008,
    weight_decay: float = 0.0,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """Split a model's parameters: block matrices by shape to Muon, all the rest to AdamW.

    AdamW's rates are given at width 768 and scaled by (width / 768)^-0.5 (nanochat's rule). Those
    of the residual scalars stand for a matrix_lr of 0.02 and follow it. `weight_decay` is Muon's.
    `compiled` compiles the updates of all but gates and scalars, which pays on a GPU.
    """
    width_rule = (model.config.n_embd / 768) ** -0.5
    parts = {"head": (model.head, head_lr), "embedding": (model.embedding, embedding_lr)}
    if model.additions.values:
        parts["values"] = (model.additions.values, embedding_lr / 2)
    groups = []
    for name, (part, lr) in parts.items():
        tuned = TUNED[name] if model.config.additions() else {}
        group = dict(params=list(part.parameters()), lr=lr * width_rule)
        groups.append({**PLAIN, **tuned, **group})
    for name, param in model.additions.named_parameters():
        if name in SCALARS:
            groups.append({**PLAIN, "params": [param], "eps": 1e-6, **SCALARS[name]})
        if name in ("stream_scale", "start_scale"):
            groups[-1]["lr"] *= matrix_lr / 0.02
    by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for param in model.blocks.parameters():
        by_shape.setdefault(tuple(param.shape), []).append(param)
    dtype = torch.bfloat16 if model.compute_dtype == torch.bfloat16 else torch.float32
    muon = dict(kind="muon", momentum=0.95, beta2=0.9, weight_decay=weight_decay, dtype=dtype)
    groups += [dict(params=params, lr=matrix_lr, **muon) for params in by_shape.values()]
    large = [compiled and group["params"][0].numel() > 1000 for group in groups]
    return [{**group, "compiled": chosen} for group, chosen in zip(groups, large)]


def build_optimizer(model: GPT, **rates: float) -> MuonAdamW:
    """Return a MuonAdamW over `param_groups(model, **rates)`."""
    return MuonAdamW(param_groups(model, **rates))


# %% [markdown]
r"""
## 5. Compile once, change the rate every step

`adamw_rule` reads and writes memory a dozen times, once for each operation. On a GPU that is most
of its cost. `torch.compile` fuses the operations into one pass. But the compiler treats a Python
number as a constant of the program: a new rate is a new program, and a schedule changes the rate in
every step. A tensor of no dimensions is data. `run_rule` makes one of each number when it compiles.
Here we let a compiler count that only counts.
"""


# %%
def count_programs(as_number):
    """Run AdamW's rule with three rates; returns how many programs are compiled for it."""
    programs = []

    def only_count(graph, inputs):
        programs.append(graph)
        return graph.forward

    rule = torch.compile(adamw_rule, backend=only_count, dynamic=False)
    tensors = [torch.zeros(4) for _ in range(4)]
    for step, lr in enumerate((0.3, 0.2, 0.1), start=1):
        rule(*tensors, *(as_number(x) for x in (step, lr, 0.8, 0.95, 1e-8, 0.0)))
    torch.compiler.reset()
    return len(programs)


print("three steps with Python numbers:", count_programs(float), "programs")
print("three steps with 0-d tensors:   ", count_programs(torch.tensor), "program")

# %% [markdown]
r"""
A real compilation takes seconds for each shape. A modern model of depth 12 has eight shapes, and
four of them hold all its weights but 482: the tables share one, and the matrices of the blocks have
three. `param_groups` compiles those and leaves gates and scalars as they are. On one H200 the
optimizer's share of a step went from 17.5 to 11.4 milliseconds, after 18 seconds of compiling
(`benchmarks/RESULTS.md`). On a CPU the compiled step of a model of depth 2 took three quarters of
the time of the plain one, after half a minute of the compiler's (`benchmarks/optimizer.py`): our
runs are too short to win that back. So `build_optimizer(model, compiled=True)` is for GPUs, and off
by default. Where the compiler fails, as it does without a C++ compiler beside it, `run_rule` goes
on with the plain rule; `compiler_failed` tells its errors from ours.

## 6. Schedules

The rate starts high, stays there, and falls in a line to a small value over the last part of
training: the **warm-down**. High rates explore; the fall lets the weights settle, and much of the
loss is gained there. Momentum starts lower, at 0.85, because the first gradients point in
directions that soon turn.

Weight decay keeps the weights small while they still move a lot. At the end it would only undo what
was learnt, so Muon's decay follows half a cosine down to zero.

A schedule is a small function, and a fine place for large bugs. In nanochat's fine-tuning the rate
went to *minus* 127 times the base rate, because the code counted micro-batches as steps and ran
past the end of the line. Ours can never be negative and counts optimizer steps. The test says so.
"""


# %%
#| export
def lr_multiplier(
    step: int, n_steps: int, warmup: float = 0.0, warmdown: float = 0.5, final: float = 0.05
) -> float:
    """Return the rate's factor at a step: a ramp up, a plateau, a line down to `final`.

    `warmup` and `warmdown` are shares of n_steps. Always in (0, 1]; past the end it stays at the
    final value, never below.
    """
    if step < warmup * n_steps:
        return (step + 1) / (warmup * n_steps + 1)
    left = max(n_steps - step, 0) / max(warmdown * n_steps, 1e-9)
    return final + (1 - final) * min(1.0, left)


def decay_multiplier(step: int, n_steps: int) -> float:
    """Return the factor on Muon's weight decay: half a cosine from 1 to 0, where it stays."""
    return 0.5 + 0.5 * math.cos(math.pi * min(step / n_steps, 1.0))


def muon_momentum(step: int, ramp: int = 300) -> float:
    """Return Muon's momentum: 0.85 at first, 0.95 after `ramp` steps."""
    return 0.85 + 0.10 * min(step / ramp, 1.0)


# %%
#| test
for n_steps in (1, 7, 100):
    factors = [lr_multiplier(step, n_steps, warmup=0.1) for step in range(3 * n_steps)]
    assert all(0 < f <= 1 for f in factors) and factors[-1] == 0.05
    decays = [decay_multiplier(step, n_steps) for step in range(3 * n_steps)]
    assert decays[0] == 1 and decays[-1] == 0 and decays == sorted(decays, reverse=True)

# %%
fig, ax = figure(
    "The rate rises, holds and falls; the decay only falls",
    "share of training",
    "factor on the initial value",
    alt="A line that rises in the first twentieth, stays at 1 until half and falls to 0.05.",
)
for warmdown, color in ((0.2, COLORS[2]), (0.5, COLORS[0]), (1.0, COLORS[1])):
    shape = [lr_multiplier(step, 200, warmup=0.05, warmdown=warmdown) for step in range(200)]
    ax.plot(torch.arange(200) / 200, shape, color=color, label=f"warm-down {warmdown:.0%}")
decay = [decay_multiplier(step, 200) for step in range(200)]
ax.plot(torch.arange(200) / 200, decay, color=COLORS[6], linestyle=":", label="weight decay")
ax.legend(fontsize=8, frameon=False, loc=(0.1, 0.03))
plt.show()

# %% [markdown]
r"""
## 7. Does it help? A fair comparison

"Our optimizer beats Adam" is a claim that is easily produced by tuning one side only. So all get
the same treatment: the same model, the same batches, the same schedule, and a small sweep of the
rate, wide enough that the best rate has a worse one on either side.

There is a second trap. Ours differs from plain AdamW in *two* ways: it has a rate for each group,
and it uses Muon for the matrices. So there is a run between the two: AdamW for everything, with the
embedding and the head at our rates, and the rate of the matrices swept. SGD with momentum is the
control that shows what no adaptation gives (0.3 was the best of three rates).
"""


# %%
def final_loss(build, lr):
    """Train a fresh model; return (loss curve, validation loss in nats per token)."""
    model = GPT(config)
    losses = train(build(model, lr), model, steps, lambda step: lr_multiplier(step, steps))
    with torch.no_grad():
        return losses, model(val_rows[:, :-1], val_rows[:, 1:]).item()


def by_groups(model, lr):
    """AdamW alone, with our rates for embedding and head; lr is that of the matrices."""
    tables = [g for g in param_groups(model) if g["kind"] == "adamw"]
    groups = [{key: g[key] for key in ("params", "lr", "betas")} for g in tables]
    return torch.optim.AdamW([*groups, dict(params=model.blocks.parameters(), lr=lr)])


builders = {
    "SGD + momentum": lambda m, lr: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.9),
    "AdamW": lambda m, lr: torch.optim.AdamW(m.parameters(), lr=lr, betas=(0.9, 0.95)),
    "AdamW by groups": by_groups,
    "Muon + AdamW": lambda m, lr: build_optimizer(m, matrix_lr=lr),
}
rates = {
    "SGD + momentum": [0.3],
    "AdamW": [0.004, 0.008, 0.016],
    "AdamW by groups": [0.002, 0.005, 0.012],
    "Muon + AdamW": [0.02, 0.04, 0.08],
}

# %%
curves, best = {}, {}
for name, build in builders.items():
    runs = {lr: final_loss(build, lr) for lr in rates[name]}
    lr = min(runs, key=lambda lr: runs[lr][1])
    curves[name], best[name] = runs[lr][0], runs[lr][1]
    print(f"{name:15s} best rate {lr:<6}", {lr: round(loss, 3) for lr, (_, loss) in runs.items()})

# %%
fig, ax = figure(
    "Rates by group close most of the gap; Muon goes below what they reach",
    "step",
    "training loss (nats per token, mean of 5 steps)",
    size=(6, 3.2),
    alt="Four loss curves; SGD and AdamW are highest, AdamW by groups near Muon, which is lowest.",
)
curves = {name: torch.tensor(losses).unfold(0, 5, 1).mean(1) for name, losses in curves.items()}
for name, losses in curves.items():
    ax.plot(losses, label=f"{name}: {best[name]:.2f} in validation")
ax.legend(fontsize=8, frameon=False)
plt.show()
for name in ("AdamW", "AdamW by groups"):
    reached = int((curves["Muon + AdamW"] <= curves[name][-1]).nonzero()[0]) + 5
    print(f"Muon + AdamW reaches the last loss of {name} after {reached} of {steps} steps")

# %% [markdown]
r"""
Had we left out the third row, Muon would get the credit for the embedding's rate. What is left to
Muon is smaller: some 0.07 nats here, and 0.03 and 0.04 with other weights and batches, each time
the best of three rates against the best of three. And the refinements of section 3? We switch the
first three off.
"""

# %%
kept = {name: getattr(package, name) for name in ("equilibrate", "set_norm", "even_out")}
package.equilibrate = package.set_norm = lambda matrix: matrix
package.even_out = lambda update, square, beta: update
plain = final_loss(lambda m, lr: package.build_optimizer(m, matrix_lr=lr), 0.04)[1]
for name, function in kept.items():
    setattr(package, name, function)
print(f"without the three refinements {plain:.3f}, with them {best['Muon + AdamW']:.3f}")

# %% [markdown]
r"""
That is less than what another seed changes here (about 0.05). nanochat's author found much the
same: a very slight gain from rows and norm at depth 12 and 24, a very small one from evening out,
and a solid one from cautious decay, which needs long runs to act. They cost next to nothing, so
they stay.

What the figure shows is the kind of evidence to ask for: the best of each, a control, one
difference at a time. It is evidence about two layers and fifty steps. What holds at depth 12 only a
run at depth 12 can show.

> **Play.** Which rate matters most? In `by_groups`, put the embedding or the head at the rate of
> the matrices and run it again.

## 8. What it costs

Orthogonalising takes matrix products, fifteen per matrix and step, whatever the batch. With width
$C$ that is about $300\,C^3$ operations per block, while the batch costs $72\,C^2$ per token: at
width 768 and half a million tokens the optimizer is half a percent of the work. In our small
runs, with batches of a thousand tokens, it is not. Muon is made for large batches.
"""

# %%
for depth, tokens in ((2, 1024), (4, 4096), (12, 2**19), (24, 2**20)):
    width = 64 * depth
    share = 300 * width**3 / (300 * width**3 + 72 * width**2 * tokens)
    print(
        f"depth {depth:2d}, {tokens:>9,} tokens a step: {share:6.1%} of the block's work is Muon's"
    )

# %% [markdown]
r"""
## Recap

`nanochat.optim` now holds `MuonAdamW`, `build_optimizer` and `param_groups`; the rules `adamw_rule`
and `muon_rule` with `adamw_update` and `muon_update` around them, `run_rule` to call them, and
`compiler_failed`;
`orthogonalize`, `equilibrate`, `set_norm` and `even_out`; and the schedules `lr_multiplier`,
`decay_multiplier` and `muon_momentum`.

**Pitfalls**

- *Rates that go negative* when steps are counted in the wrong unit. Clamp the schedule and test
  it beyond its end.
- *Two copies of an optimizer*, one for one GPU and one for many, of which only one gets a fix.
  Chapter 6 shards this very class.
- *A tuned method against an untuned baseline.* Sweep both, and change one thing at a time.
- *A program for every rate.* A compiled step that takes the rate as a Python number is compiled
  again in every step, or, after a few of them, quietly not at all.
- *Optimizer state in another order after loading.* Ours is saved by parameter name, not by
  position.

**Readings**

- Kingma and Ba, *Adam* (2014), and Loshchilov and Hutter, *Decoupled Weight Decay Regularization*
  (2019).
- Jordan et al., *Muon: an optimizer for hidden layers* (2024).
- Amsel et al., *The Polar Express* (2025): the coefficients.
- Li et al., *NorMuon* (2025): evening out the rows. Chang et al., *MuonEq* (2026): levelling them
  first.
- Bernstein and Newhouse, *Old Optimizer, New Norm* (2024): steepest descent, and what size means.
"""
