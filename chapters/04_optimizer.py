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
- split a model's parameters into groups and give each its rate;
- tell a real difference between optimizers from a badly tuned baseline.

**Before you start**: chapter 3; gradients; singular values (we recall them). Reading takes 35
minutes, running under a minute on two CPU cores.
"""

# %% tags=["parameters"]
profile = "quick"
steps = 70  # training steps per run in the comparison

# %%
#| default_exp optim

# %%
#| export
import math
from typing import Any

import torch
from torch import Tensor, nn

from nanochat.model import GPT

# %%
import matplotlib.pyplot as plt

from nanochat.common import COLORS, figure, seed_everything
from nanochat.tinyworld import World, document
from nanochat.tokenizer import Tokenizer

# %% [markdown]
r"""
## 1. Downhill, and its trouble

The gradient says in which direction the loss rises fastest. **Gradient descent** takes a step the
other way, $w \leftarrow w - \eta\, g$. On a round bowl that works at once. Loss surfaces are not
round: they are valleys, steep across and flat along. A rate small enough not to bounce between
the walls is far too small to get along the floor.
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


def heavy_ball(w, grad, state, lr=0.03, beta=0.8):
    """Descent with momentum: a running sum of gradients remembers the way."""
    state["sum"] = beta * state.get("sum", torch.zeros_like(w)) + grad
    w -= lr * 0.3 * state["sum"]


# %% [markdown]
r"""
**Momentum** keeps a running mean of gradients. Across the valley the gradients alternate and
cancel; along it they agree and add up.

**Adam** goes further and gives each weight its own rate. It keeps a running mean $m$ of the
gradient and $v$ of its square, and steps by

$$w \leftarrow w - \eta\,\frac{\hat m}{\sqrt{\hat v} + \epsilon},\qquad
\hat m = \frac{m}{1-\beta_1^t},\quad \hat v = \frac{v}{1-\beta_2^t}.$$

Dividing by the root of the mean square makes the step nearly the same size for steep and flat
directions: each coordinate moves about $\eta$ per step. The hats correct for the start, when the
running means are still mostly zeros. **AdamW** adds *decoupled* weight decay: before the step,
shrink the weight by a factor $1-\eta\lambda$, apart from the gradient and its scaling.
"""


# %%
#| export
def adamw_update(param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """One AdamW step on one parameter, in place. Loshchilov and Hutter (2019).

    `state` holds `step`, `mean` and `square` (shaped like param); `group` holds lr, betas, eps and
    weight_decay.
    """
    if not state:
        state.update(step=0, mean=torch.zeros_like(param), square=torch.zeros_like(param))
    beta1, beta2 = group["betas"]
    state["step"] += 1
    state["mean"].lerp_(grad, 1 - beta1)
    state["square"].lerp_(grad.square(), 1 - beta2)
    mean = state["mean"] / (1 - beta1 ** state["step"])
    root = (state["square"] / (1 - beta2 ** state["step"])).sqrt()
    param.mul_(1 - group["lr"] * group["weight_decay"])
    param.sub_(group["lr"] * mean / (root + group["eps"]))


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


fig, ax = figure(
    "In a valley, momentum and Adam get along the floor faster",
    "step",
    "height above the lowest point",
    alt="Three falling curves on a log scale; plain descent falls slowest at the end.",
)
for rule in (sgd, heavy_ball, adam):
    x, y = descend(rule).T
    ax.semilogy((x**2 + 50 * y**2) / 2, label=rule.__name__.replace("_", " "))
ax.legend(fontsize=8, frameon=False)
plt.show()

# %% [markdown]
r"""
> **Exercise 4.1.** `adamw_update` with `betas=(0, 0)` and no decay has a simple closed form.
> Which? *(It is an optimizer with a name of its own.)*

## 2. Why a matrix is not a bag of numbers

Adam treats a weight matrix as a long list of independent numbers. But a matrix is a map: it
stretches some directions of its input a lot and others little. The stretch factors are its
**singular values**, $G = U\,\mathrm{diag}(s)\,V^\top$. Look at the gradient of a matrix in a
model that has begun to train.
"""

# %%
torch.set_num_threads(1)  # matrices as small as these gain nothing from a second thread
world = World()
texts = [document(world, i) for i in range(1200)]
tokenizer = Tokenizer.train(texts[:300], vocab_size=1024)
stream = torch.tensor([t for text in texts for t in tokenizer.encode(text, bos=True)])
rows = stream[: len(stream) // 129 * 129].view(-1, 129)
val_rows, train_rows = rows[:16], rows[16:]
config = GPTConfig.for_depth(2, tokenizer.vocab_size, 128, head_dim=32)


def batch_at(step, size=8):
    """The same random rows for the same step, in every run."""
    chosen = torch.randint(
        0, len(train_rows), (size,), generator=torch.Generator().manual_seed(step)
    )
    return train_rows[chosen]


def train(optimizer, model, n_steps):
    """A bare training loop; returns the loss of every step."""
    losses = []
    for step in range(n_steps):
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
The gradient is dominated by a few directions. A step along it changes those and hardly touches
the rest, though the rest may hold what is rare and still to be learnt. **Muon**'s idea: keep the
directions $U$ and $V$, but set all singular values to one. The update becomes $UV^\top$, the
orthogonal matrix nearest to $G$: every direction moves by the same amount.

An exact singular value decomposition is slow on a GPU. But a polynomial will do. For an odd
polynomial $p(x)=ax+bx^3+cx^5$, the matrix expression

$$p(G) = aG + b\,(GG^\top)G + c\,(GG^\top)^2 G$$

applies $p$ to each singular value and leaves $U$ and $V$ alone: it needs matrix products only.
Choose coefficients that push any value in $(0,1]$ towards 1 and repeat. The five triples below
come from the Polar Express paper; each is the best possible for the interval that the step before
it leaves.
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
x = torch.linspace(0, 1, 400)
fig, ax = figure(
    "Five steps push almost every singular value close to one",
    "singular value before",
    "after",
    alt="After one, three and five steps; after five the curve is near 1 except close to 0.",
)
y = x.clone()
for i, (a, b, c) in enumerate(POLAR_EXPRESS, start=1):
    y = a * y + b * y**3 + c * y**5
    if i in (1, 3, 5):
        ax.plot(x, y, label=f"after {i}", color=COLORS[i // 2])
ax.legend(fontsize=8, frameon=False)
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

The full step has four parts:

1. **Nesterov momentum** on the raw gradient, so that the noise of single batches averages out
   *before* the singular values are levelled.
2. **Orthogonalise.** All matrices of one shape are stacked and done in one batched product.
3. **Even out** (the NorMuon refinement): some rows of $UV^\top$ are still systematically larger.
   Divide each row by its running size and rescale so that the whole keeps its norm.
4. **Cautious decay**: shrink a weight only where the step shrinks it as well. Decay then never
   fights the gradient.

Last, a tall matrix ($m>n$) gets its rate multiplied by $\sqrt{m/n}$, because an orthogonal update
has the same size for each *input* direction, however many outputs it feeds.
"""


# %%
#| export
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


def muon_update(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
) -> None:
    """One Muon step on k matrices of one shape (m, n), in place. Jordan et al. (2024).

    Nesterov momentum, orthogonalised, evened out, times lr * sqrt(max(1, m / n)); weight decay
    only where it pulls the way the step does (cautious decay, Chen et al. 2025).
    """
    m, n = params[0].shape
    for param, state in zip(params, states):
        if not state:
            shape = (m, 1) if m >= n else (1, n)
            state.update(momentum=torch.zeros_like(param), square=param.new_zeros(shape))
    momentum, grad = torch.stack([s["momentum"] for s in states]), torch.stack(grads)  # (k, m, n)
    momentum.lerp_(grad, 1 - group["momentum"])
    update = orthogonalize(grad.lerp(momentum, group["momentum"]), group["dtype"])
    square = torch.stack([s["square"] for s in states])
    update = even_out(update, square, group["beta2"])
    lr = group["lr"] * math.sqrt(max(1.0, m / n))
    for i, (param, state) in enumerate(zip(params, states)):
        state["momentum"].copy_(momentum[i])
        state["square"].copy_(square[i])
        decay = param * (update[i] * param >= 0) * group["weight_decay"]
        param.sub_(lr * (update[i] + decay))


# %%
#| test
update = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
even = even_out(update, torch.zeros(2, 6, 1), beta=0.9)
assert torch.allclose(even.norm(dim=(1, 2)), update.norm(dim=(1, 2)), atol=1e-5)
row_sizes = even.square().mean(-1)
assert torch.allclose(row_sizes, row_sizes.mean(-1, keepdim=True).expand_as(row_sizes), atol=1e-5)

# %% [markdown]
r"""
> **Exercise 4.2.** Momentum first or orthogonalisation first: swap the two in a copy of
> `muon_update` and train. Which is worse, and why? *(Think of what orthogonalising does to the
> noise of one small batch.)*

## 4. One optimizer, two kinds of group

PyTorch's optimizers already work on *groups* of parameters with settings of their own. Ours adds
one setting, `kind`. State can be saved as named tensors (chapter 5 puts them into a file that
executes nothing when loaded), and one call sets the schedule of the step.
"""


# %%
#| export
class MuonAdamW(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the rest, told apart by each group's `kind`.

    A group of kind "muon" holds matrices of one shape with lr, momentum, beta2, weight_decay and
    the dtype to orthogonalise in; one of kind "adamw" holds lr, betas, eps and weight_decay.
    """

    def __init__(self, param_groups: list[dict[str, Any]]):
        super().__init__(param_groups, defaults={})
        for group in self.param_groups:
            group.setdefault("initial_lr", group["lr"])

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

    def set_schedule(self, lr: float, momentum: float) -> None:
        """Scale every group's initial rate by `lr`; set Muon's momentum."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * lr
            if group["kind"] == "muon":
                group["momentum"] = momentum


# %% [markdown]
r"""
Who goes where? Muon is for matrices that *map vectors to vectors*: the six of every block. The
**embedding** is a table: only the rows of tokens that occurred get a gradient, and levelling its
singular values would stir all the others. The **head** maps to logits of which a few matter at a
time. Both go to AdamW, with rates that differ by a factor of forty.

Adam's rates shrink as $1/\sqrt{\text{width}}$, anchored at width 768, so that one set of numbers
serves every depth. Muon needs no such rule: its update has the same scale at every width by
construction.

A modern model (chapter 3, section 9) brings more: **value embeddings** are tables again, at half
the embedding's rate; the **scalars** of smear, backout and the residual stream are single numbers
that must move by tenths, so their rates are high, except for the factors of the stream itself,
which multiply up over the layers and may only creep. The gates are matrices of the blocks.

The scalars also get a larger $\epsilon$. In a fresh model all blocks are the identity and the last
norm forgets sizes, so the true gradient of a residual scalar is *zero*, and what arrives is
rounding, about $10^{-9}$. Divided by its own root it would become a full step in a random
direction.
"""


# %%
#| export
SCALAR_RATES = {
    "stream_scale": 0.005,
    "start_scale": 0.5,
    "smear_gate.weight": 0.2,
    "smear_scale": 0.2,
    "backout_scale": 0.2,
}


def param_groups(
    model: GPT,
    matrix_lr: float = 0.02,
    embedding_lr: float = 0.3,
    head_lr: float = 0.008,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Split a model's parameters: block matrices by shape to Muon, all the rest to AdamW.

    AdamW's rates are given at width 768 and scaled by (width / 768)^-0.5 (nanochat's rule).
    """
    width_rule = (model.config.n_embd / 768) ** -0.5
    dtype = torch.bfloat16 if model.compute_dtype == torch.bfloat16 else torch.float32
    adamw = dict(kind="adamw", betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)
    groups = [
        dict(params=[model.head.weight], lr=head_lr * width_rule, **adamw),
        dict(params=[model.embedding.weight], lr=embedding_lr * width_rule, **adamw),
    ]
    tables = list(model.additions.values.parameters())
    if tables:
        groups.append(dict(params=tables, lr=embedding_lr / 2 * width_rule, **adamw))
    for name, param in model.additions.named_parameters():
        if name in SCALAR_RATES:
            groups.append({**adamw, "params": [param], "lr": SCALAR_RATES[name], "eps": 1e-6})
    by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for param in model.blocks.parameters():
        by_shape.setdefault(tuple(param.shape), []).append(param)
    muon = dict(kind="muon", momentum=0.95, beta2=0.9, weight_decay=weight_decay, dtype=dtype)
    groups += [dict(params=params, lr=matrix_lr, **muon) for params in by_shape.values()]
    return groups


def build_optimizer(model: GPT, **rates: float) -> MuonAdamW:
    """Return a MuonAdamW over `param_groups(model, **rates)`."""
    return MuonAdamW(param_groups(model, **rates))


# %% [markdown]
r"""
## 5. Schedules

The rate starts high, stays there, and falls in a line to a small value over the last part of
training: the **warm-down**. High rates explore; the fall lets the weights settle, and most of the
loss is gained there. Momentum starts lower, at 0.85, because the first gradients point in
directions that soon turn.

A schedule is a small function, and a fine place for large bugs. In one project the rate went to
*minus* 127 times the base rate, because the code counted micro-batches as steps and ran past the
end of the line. Ours can never be negative and counts optimizer steps. The test says so.
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


def muon_momentum(step: int, ramp: int = 300) -> float:
    """Return Muon's momentum: 0.85 at first, 0.95 after `ramp` steps."""
    return 0.85 + 0.10 * min(step / ramp, 1.0)


# %%
#| test
for n_steps in (1, 7, 100):
    factors = [lr_multiplier(step, n_steps, warmup=0.1) for step in range(3 * n_steps)]
    assert all(0 < f <= 1 for f in factors) and factors[-1] == 0.05

# %%
fig, ax = figure(
    "Warm up briefly, hold, fall",
    "share of training",
    "factor on the rate",
    alt="A line that rises in the first twentieth, stays at 1 until half and falls to 0.05.",
)
for warmdown, color in ((0.2, COLORS[2]), (0.5, COLORS[0]), (1.0, COLORS[1])):
    shape = [lr_multiplier(step, 200, warmup=0.05, warmdown=warmdown) for step in range(200)]
    ax.plot(torch.arange(200) / 200, shape, color=color, label=f"warm-down {warmdown:.0%}")
ax.legend(fontsize=8, frameon=False)
plt.show()

# %% [markdown]
r"""
## 6. Does it help? A fair comparison

"Our optimizer beats Adam" is a claim that is easily produced by tuning one side only. So both get
the same treatment: the same model, the same batches, the same schedule, and a small sweep of the
rate. We compare the **best** of each, and keep SGD with momentum as the control that shows what
no adaptation gives.
"""


# %%
def final_loss(build, lr):
    """Train a fresh model; return (loss curve, validation loss in nats per token)."""
    model = GPT(config)
    optimizer = build(model, lr)
    initial, losses = [group["lr"] for group in optimizer.param_groups], []
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, initial):
            group["lr"] = rate * lr_multiplier(step, steps)
        losses += train_step(optimizer, model, step)
    with torch.no_grad():
        return losses, model(val_rows[:, :-1], val_rows[:, 1:]).item()


def train_step(optimizer, model, step):
    """One step on the batch of that number; returns [loss]."""
    idx = batch_at(step)
    loss = model(idx[:, :-1], idx[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return [loss.item()]


builders = {
    "SGD + momentum": lambda m, lr: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.9),
    "AdamW": lambda m, lr: torch.optim.AdamW(m.parameters(), lr=lr, betas=(0.9, 0.95)),
    "Muon + AdamW": lambda m, lr: build_optimizer(m, matrix_lr=lr),
}
rates = {
    "SGD + momentum": (0.3, 1.0),
    "AdamW": (0.002, 0.005, 0.012),
    "Muon + AdamW": (0.01, 0.02, 0.04),
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
    "At its best rate, Muon + AdamW needs fewer steps than AdamW",
    "step",
    "training loss (nats per token, mean of 5 steps)",
    alt="Three loss curves; the one of Muon with AdamW is lowest.",
)
for name, losses in curves.items():
    smooth = torch.tensor(losses).unfold(0, 5, 1).mean(1)
    ax.plot(smooth, label=f"{name}: {best[name]:.2f} in validation")
ax.legend(fontsize=8, frameon=False)
plt.show()
reached = next(i for i, loss in enumerate(curves["Muon + AdamW"]) if loss < curves["AdamW"][-1])
print(f"Muon + AdamW reaches AdamW's final loss after {reached} of {steps} steps")

# %% [markdown]
r"""
On a two-layer model and a text this simple, the embedding's high rate explains part of the gap,
and three rates are a coarse sweep. Chapter A2 and the reference runs measure the same at sizes
where it matters. What the figure does show is the kind of evidence to ask for: the best of each,
a control, the same everything else.

> **Play.** Give AdamW the two-group treatment: the embedding at 0.3, the head at 0.008 (both
> width-scaled) and the matrices by AdamW. How much of the gap closes?

## 7. What it costs

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

`nanochat.optim` now holds `MuonAdamW`, `build_optimizer` and `param_groups`, the two rules
`adamw_update` and `muon_update` with `orthogonalize` and `even_out`, and the schedules
`lr_multiplier` and `muon_momentum`.

**Pitfalls**

- *Rates that go negative* when steps are counted in the wrong unit. Clamp the schedule and test
  it beyond its end.
- *Two copies of an optimizer*, one for one GPU and one for many, of which only one gets a fix.
  Chapter 6 shards this very class.
- *A tuned method against an untuned baseline.* Sweep both.
- *Optimizer state in another order after loading.* Ours is saved by parameter name, not by
  position.

**Readings**

- Kingma and Ba, *Adam* (2014), and Loshchilov and Hutter, *Decoupled Weight Decay Regularization*
  (2019).
- Jordan et al., *Muon: an optimizer for hidden layers* (2024).
- Amsel et al., *The Polar Express* (2025): the coefficients.
- Li et al., *NorMuon* (2025): evening out the rows.
"""
