# %% [markdown]
r"""
# Exercises for chapter 4: the optimizer

The optimizer is the part of training where a mistake stays quiet: the loss still falls, only less.
So each exercise here comes with the numbers that would show the mistake. An answer is a plain
function; it returns new tensors and changes none of its arguments. `check(id, answer)` looks at an
answer, `hint(id)` helps, `progress()` shows your points (sheet 0 says how).
"""

# %%
#| given
import math

import torch
from torch import Tensor

POLAR_EXPRESS = (
    (8.156554525, -22.48329293, 15.87876992),
    (4.042929935, -2.808917465, 0.5000178451),
    (3.891667802, -2.772484153, 0.5060648179),
    (3.285753658, -2.368129493, 0.4644902423),
    (2.346541326, -1.709782838, 0.4232355169),
)

# %%
from book.graded import check, hint, progress

# %% [markdown]
r"""
## 1. One step of AdamW

AdamW trains the embedding and the head, and in most other projects everything. Write one step.
With $t$ the number of this step, counted from 1:

$$m \leftarrow \beta_1 m + (1-\beta_1)\,g,\qquad v \leftarrow \beta_2 v + (1-\beta_2)\,g^2,$$

$$w \leftarrow (1-\eta\lambda)\,w -
\eta\,\frac{m/(1-\beta_1^t)}{\sqrt{v/(1-\beta_2^t)} + \epsilon}.$$

What is remembered between steps is $m$ and $v$ as they stand in the first line. Four details are
easy to get wrong, and a run with any of them wrong still trains, a little worse.
"""


# %%
#| exercise id=04-adamw points=3 minutes=20 level=2 answer=adamw_step
def adamw_step(
    param: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One AdamW step.

    Args:
        param, grad, mean, square: of one shape, float32; the means are those of the last step.
        step: the number of this step; the first is 1.
    Returns:
        (param, mean, square) after the step, new tensors.
    """
    # BEGIN SOLUTION
    beta1, beta2 = betas
    mean = mean.lerp(grad, 1 - beta1)
    square = square.lerp(grad.square(), 1 - beta2)
    root = (square / (1 - beta2**step)).sqrt()
    param = param * (1 - lr * weight_decay)
    return param - lr * (mean / (1 - beta1**step)) / (root + eps), mean, square
    # END SOLUTION


# %%
check("04-adamw", adamw_step)


# %%
#| checks 04-adamw
def draw(n, seed):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def remembered(values, beta):
    """A running mean written out: the latest of n values weighs 1 - beta, each older one less."""
    n = len(values)
    return sum((1 - beta) * beta ** (n - 1 - i) * value for i, value in enumerate(values))


@says(
    "remembers the two running means",
    "What you return for the next step is m and v themselves, as in the first line of formulas.",
)
def _(adamw_step):
    grads = [draw(3, seed) for seed in range(3)]
    mean = square = torch.zeros(3, 4)
    for step, grad in enumerate(grads, 1):
        answer = adamw_step(draw(3, 9), grad, mean, square, step, 0.1, (0.8, 0.95), 1e-8, 0.0)
        _, mean, square = answer
    assert close(mean, remembered(grads, 0.8))
    assert close(square, remembered([grad**2 for grad in grads], 0.95))


@says(
    "the first step moves every weight by the rate",
    "At first m and v are mostly zeros. Dividing by 1 - beta^t makes up for that, in both.",
)
def _(adamw_step):
    grad, zero = draw(3, 0) * torch.tensor([1e-3, 1.0, 10.0, 1e3]), torch.zeros(3, 4)
    found = adamw_step(draw(3, 9), grad, zero, zero, 1, 0.1, (0.8, 0.95), 1e-10, 0.0)[0]
    assert close(found, draw(3, 9) - 0.1 * grad.sign())


@says(
    "decay does not go through the gradient",
    "Decoupled decay shrinks the weight by 1 - lr * weight_decay. Added to the gradient, it would "
    "be divided by the root like everything else.",
)
def _(adamw_step):
    zero = torch.zeros(3, 4)
    found = adamw_step(draw(3, 9), zero, zero, zero, 1, 0.1, (0.8, 0.95), 1e-8, 0.5)[0]
    assert close(found, draw(3, 9) * 0.95)


@says(
    "eps stands beside the root, not in it",
    "Take the root first, then add eps.",
)
def _(adamw_step):
    ones = torch.ones(3, 4)
    found = adamw_step(draw(3, 9), ones, ones, ones, 10**6, 0.1, (0.8, 0.95), 0.25, 0.0)[0]
    assert close(found, draw(3, 9) - 0.1 / 1.25)


# %%
#| hints 04-adamw
hints = [
    "Write the three formulas one below the other, and give the corrected means names of their "
    "own so that they do not overwrite the ones you return.",
    "`mean.lerp(grad, 1 - beta1)` is the running mean. The decay is a factor on param and needs "
    "neither gradient nor moments.",
    "param * (1 - lr * weight_decay) - lr * (mean / (1 - beta1**step)) / "
    "((square / (1 - beta2**step)).sqrt() + eps)",
]


# %%
#| wrong 04-adamw: remembers the two running means
def adamw_step(param, grad, mean, square, step, lr, betas, eps, weight_decay):
    mean = mean.lerp(grad, 1 - betas[0]) / (1 - betas[0] ** step)
    square = square.lerp(grad.square(), 1 - betas[1]) / (1 - betas[1] ** step)
    return param * (1 - lr * weight_decay) - lr * mean / (square.sqrt() + eps), mean, square


# %%
#| wrong 04-adamw: the first step moves every weight by the rate
def adamw_step(param, grad, mean, square, step, lr, betas, eps, weight_decay):
    mean, square = mean.lerp(grad, 1 - betas[0]), square.lerp(grad.square(), 1 - betas[1])
    return param * (1 - lr * weight_decay) - lr * mean / (square.sqrt() + eps), mean, square


# %%
#| wrong 04-adamw: decay does not go through the gradient
def adamw_step(param, grad, mean, square, step, lr, betas, eps, weight_decay):
    grad = grad + weight_decay * param
    mean, square = mean.lerp(grad, 1 - betas[0]), square.lerp(grad.square(), 1 - betas[1])
    root = (square / (1 - betas[1] ** step)).sqrt()
    return param - lr * mean / (1 - betas[0] ** step) / (root + eps), mean, square


# %%
#| wrong 04-adamw: eps stands beside the root, not in it
def adamw_step(param, grad, mean, square, step, lr, betas, eps, weight_decay):
    mean, square = mean.lerp(grad, 1 - betas[0]), square.lerp(grad.square(), 1 - betas[1])
    root = (square / (1 - betas[1] ** step) + eps).sqrt()
    param = param * (1 - lr * weight_decay)
    return param - lr * mean / (1 - betas[0] ** step) / root, mean, square


# %%
#| right 04-adamw
def adamw_step(param, grad, mean, square, step, lr, betas, eps, weight_decay):
    mean = betas[0] * mean + (1 - betas[0]) * grad
    square = betas[1] * square + (1 - betas[1]) * grad * grad
    correct = math.sqrt(1 - betas[1] ** step)
    size = lr * correct / (1 - betas[0] ** step)
    new = param - lr * weight_decay * param - size * mean / (square**0.5 + eps * correct)
    return new, mean, square


# %% [markdown]
r"""
## 2. Orthogonalise

The heart of Muon: keep the singular vectors of a matrix and bring all its singular values near 1,
with matrix products alone. `POLAR_EXPRESS` holds five triples $(a, b, c)$. First divide the matrix
by 1.01 times its norm plus $10^{-6}$: then every singular value lies between 0 and 1. Then, for
each triple,

$$A = XX^\top,\qquad X \leftarrow aX + (bA + cA^2)X.$$

$A$ has as many rows as $X$. For a tall matrix (768 rows of 64 numbers, say) that is the expensive
side; its transpose gives the same answer for a fraction of the work. Our optimizer stacks all
matrices of one shape, so the input may have leading dimensions.

What you write here can replace the book's function in the capstone.
"""


# %%
#| exercise id=04-muon points=4 minutes=30 level=3 answer=orthogonalize replaces=optim.orthogonalize
def orthogonalize(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same singular vectors, all singular values near 1, by five Polar Express steps.

    Args:
        matrix: (..., m, n); each matrix of the stack is treated by itself.
        dtype: what to compute in.
    Returns:
        (..., m, n), the dtype of matrix.
    """
    # BEGIN SOLUTION
    x = matrix.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrix.dtype)
    # END SOLUTION


# %%
check("04-muon", orthogonalize)

# %%
#| checks 04-muon
import time


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def by_svd(matrix):
    """The polynomials applied to the singular values themselves, in float64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / (s.square().sum().sqrt() * 1.01 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return (u * s @ vh).float()


def seconds(function, matrix):
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)  # on a busy machine a second thread mostly waits
    for _ in range(10):
        start = time.perf_counter()
        function(matrix)
        times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return min(times)


@says(
    "agrees with the polynomials of the singular values",
    "Compare scale (norm * 1.01 + 1e-6, over all elements), the three coefficients, and the "
    "products: A = X X^T, and A^2 is a matrix product.",
)
def _(orthogonalize):
    assert close(orthogonalize(draw(6, 10)), by_svd(draw(6, 10)), atol=1e-4)


@says(
    "treats each matrix of a stack by itself",
    "The norm must be taken over the last two dimensions and kept, one number a matrix.",
)
def _(orthogonalize):
    for shape in ((3, 6, 10), (3, 10, 6)):
        stack = draw(*shape) * torch.tensor([1e-3, 1.0, 50.0]).view(3, 1, 1)
        expected = torch.stack([orthogonalize(one) for one in stack])
        assert close(orthogonalize(stack), expected, atol=1e-4)


@says(
    "a long thin matrix is cheap, tall or wide",
    "When there are more rows than columns, and only then, work on the transpose and turn the "
    "result back.",
)
def _(orthogonalize):
    tall = draw(768, 8)
    assert close(orthogonalize(tall), orthogonalize(tall.T.contiguous()).T, atol=1e-3)
    square = seconds(orthogonalize, draw(64, 96))  # as many numbers
    for thin in (tall, tall.T.contiguous()):
        ratio = seconds(orthogonalize, thin) / (square + 0.0005)
        assert ratio < 8, f"{tuple(thin.shape)} takes {ratio:.0f} times as long as (64, 96)."


@says(
    "computes in dtype and returns the dtype of the matrix",
    "Cast at the start with .to(dtype) and at the end with .to(matrix.dtype).",
)
def _(orthogonalize):
    exact, coarse = orthogonalize(draw(6, 10)), orthogonalize(draw(6, 10), torch.bfloat16)
    assert coarse.dtype == torch.float32, f"returned {coarse.dtype} for a float32 matrix."
    assert 1e-4 < (exact - coarse).abs().max() < 0.2, "bfloat16 leaves a trace in the last digits."


@says("a matrix of zeros stays zeros", "0 / 0 is NaN; the 1e-6 in the divisor prevents it.")
def _(orthogonalize):
    assert close(orthogonalize(torch.zeros(4, 6)), torch.zeros(4, 6))


# %%
#| hints 04-muon
hints = [
    "Four parts: cast and perhaps transpose; divide by the norm; loop over the triples; undo the "
    "transposing and the cast.",
    "`x.mT` transposes the last two dimensions; `x.norm(dim=(-2, -1), keepdim=True)` is one norm "
    "a matrix.",
    "In the loop: square = x @ x.mT; x = a * x + (b * square + c * square @ square) @ x.",
]


# %%
#| wrong 04-muon: agrees with the polynomials of the singular values
def orthogonalize(matrix, dtype=torch.float32):
    x = matrix.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    for _ in range(5):  # the first Muon's triple, five times
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).to(matrix.dtype)


# %%
#| wrong 04-muon: treats each matrix of a stack by itself
def orthogonalize(matrix, dtype=torch.float32):
    x = matrix.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm() * 1.01 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrix.dtype)


# %%
#| wrong 04-muon: a long thin matrix is cheap, tall or wide
def orthogonalize(matrix, dtype=torch.float32):
    x = matrix.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.to(matrix.dtype)


# %%
#| wrong 04-muon: computes in dtype and returns the dtype of the matrix
def orthogonalize(matrix, dtype=torch.float32):
    x = matrix.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


# %%
#| wrong 04-muon: a matrix of zeros stays zeros
def orthogonalize(matrix, dtype=torch.float32):
    x = matrix.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01)
    for a, b, c in POLAR_EXPRESS:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrix.dtype)


# %%
#| right 04-muon
def orthogonalize(matrix, dtype=torch.float32):
    if matrix.shape[-2] > matrix.shape[-1]:
        return orthogonalize(matrix.transpose(-1, -2), dtype).transpose(-1, -2)
    x = matrix.to(dtype)
    size = x.square().sum((-2, -1), keepdim=True).sqrt()
    x = x / (1.01 * size + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        once = x @ x.transpose(-1, -2) @ x
        x = a * x + b * once + c * (x @ x.transpose(-1, -2) @ once)
    return x.to(matrix.dtype)


# %% [markdown]
r"""
## 3. A schedule that stays positive

A step against the gradient makes the loss fall. A step with a *negative* rate makes it rise, and
nothing warns you. So a schedule must give a good answer for every step it may be asked about, also
one past the end.

Write the factor on the rate: up for the first `warmup * n_steps` steps, where step $i$ gets $(i +
1)$ over (`warmup * n_steps` $+ 1$); then 1; then, over the last `warmdown * n_steps` steps, in a
straight line from 1 down to `final`, which is reached at step `n_steps` and kept for ever after.
Both shares may be 0. Yours can replace the book's.
"""


# %%
#| exercise id=04-rate points=3 minutes=20 level=2 answer=lr_multiplier replaces=optim.lr_multiplier
def lr_multiplier(
    step: int, n_steps: int, warmup: float = 0.0, warmdown: float = 0.5, final: float = 0.05
) -> float:
    """The factor on the rate at a step: a ramp up, a plateau, a line down to `final`.

    Args:
        step: 0, 1, ...; may lie past the end.
        warmup, warmdown: shares of n_steps.
    Returns:
        A number between final and 1, or, on the ramp up, between 0 and 1.
    """
    # BEGIN SOLUTION
    if step < warmup * n_steps:
        return (step + 1) / (warmup * n_steps + 1)
    left = max(n_steps - step, 0) / max(warmdown * n_steps, 1e-9)
    return final + (1 - final) * min(1.0, left)
    # END SOLUTION


# %%
check("04-rate", lr_multiplier)


# %%
#| checks 04-rate
@says(
    "falls in a straight line to final",
    "At n_steps - step = warmdown * n_steps the factor is 1, at step n_steps it is final; halfway "
    "between it is halfway between.",
)
def _(lr_multiplier):
    for final in (0.0, 0.05, 0.5):
        line = torch.linspace(1.0, final, 41, dtype=torch.float64).tolist()
        found = [lr_multiplier(60 + i, 100, warmdown=0.4, final=final) for i in range(41)]
        assert all(close(f, e, atol=1e-9) for f, e in zip(found, line))
    assert close(lr_multiplier(20, 25, final=0.0), 5 / 12.5, atol=1e-9), "warmdown * n_steps = 12.5"
    assert close(lr_multiplier(50, 100, 0.5, 0.8, 0.0), 5 / 8, atol=1e-9), "no plateau between"


@says(
    "stays at final past the end",
    "The line must not go on below final: clamp the share that is left at 0.",
)
def _(lr_multiplier):
    for step in (101, 200, 12_700):
        found = lr_multiplier(step, 100)
        assert close(found, 0.05, atol=1e-9), f"the factor at step {step} of 100 is {found}."


@says(
    "the ramp begins above zero",
    "Step 0 already trains: it gets 1 / (warmup * n_steps + 1), not 0.",
)
def _(lr_multiplier):
    ramp = [lr_multiplier(i, 100, warmup=0.04) for i in range(5)]
    assert all(close(f, (i + 1) / 5, atol=1e-9) for i, f in enumerate(ramp))
    assert close(lr_multiplier(2, 25, warmup=0.1), 3 / 3.5, atol=1e-9), "warmup * n_steps = 2.5"


@says(
    "shares of zero and runs of one step work",
    "warmdown * n_steps may be 0, and then nothing may be divided by it.",
)
def _(lr_multiplier):
    assert [lr_multiplier(i, 10, warmdown=0.0) for i in (0, 9)] == [1.0, 1.0]
    assert lr_multiplier(0, 1) == 1.0


# %%
#| hints 04-rate
hints = [
    "Three cases: the ramp, the plateau and the line. Which share of the warm-down is still left?",
    "left = (n_steps - step) / (warmdown * n_steps) is above 1 on the plateau, and between 0 and 1 "
    "on the line. Where is it negative?",
    "final + (1 - final) * min(1.0, left), with max(n_steps - step, 0) over "
    "max(warmdown * n_steps, 1e-9) as left.",
]


# %%
#| wrong 04-rate: stays at final past the end
def lr_multiplier(step, n_steps, warmup=0.0, warmdown=0.5, final=0.05):
    if step < warmup * n_steps:
        return (step + 1) / (warmup * n_steps + 1)
    left = (n_steps - step) / max(warmdown * n_steps, 1e-9)
    return final + (1 - final) * min(1.0, left)


# %%
#| wrong 04-rate: the ramp begins above zero
def lr_multiplier(step, n_steps, warmup=0.0, warmdown=0.5, final=0.05):
    if step < warmup * n_steps:
        return step / (warmup * n_steps)
    left = max(n_steps - step, 0) / max(warmdown * n_steps, 1e-9)
    return final + (1 - final) * min(1.0, left)


# %%
#| wrong 04-rate: falls in a straight line to final
def lr_multiplier(step, n_steps, warmup=0.0, warmdown=0.5, final=0.05):
    if step < warmup * n_steps:
        return (step + 1) / (warmup * n_steps + 1)
    left = max(n_steps - step, 0) / max(warmdown * n_steps, 1e-9)
    return max(final, min(1.0, left))


# %%
#| wrong 04-rate: shares of zero and runs of one step work
def lr_multiplier(step, n_steps, warmup=0.0, warmdown=0.5, final=0.05):
    if step < warmup * n_steps:
        return (step + 1) / (warmup * n_steps + 1)
    left = max(n_steps - step, 0) / (warmdown * n_steps)
    return final + (1 - final) * min(1.0, left)


# %%
#| right 04-rate
def lr_multiplier(step, n_steps, warmup=0.0, warmdown=0.5, final=0.05):
    n_up, n_down = warmup * n_steps, warmdown * n_steps
    if step < n_up:
        return (1 + step) / (1 + n_up)
    if step >= n_steps:
        return final
    if step <= n_steps - n_down:
        return 1.0
    done = (step - (n_steps - n_down)) / n_down
    return 1.0 - done * (1.0 - final)


# %% [markdown]
r"""
## 4. Minus 127

A real project's fine-tuning took its rate from a schedule without a clamp, $1 - i / n$, where $n$
is the number of **optimizer steps** of the run. The loop asked for the rate at every
**micro-batch**, and $i$ was the number of the micro-batch, from 0. The run destroyed the weights it
had begun with, ended without an error and reported success.

Say the optimizer steps after every 128th micro-batch, with the rate just computed. Predict, with
pencil and paper, for $n = 1000$: the factor of the last optimizer step, and how many
of the 1000 steps had a positive factor.
"""

# %%
#| exercise id=04-minus points=1 minutes=10 level=1 answer=predicted
# predicted = {"last factor": a number, "good steps": a whole number}
# BEGIN SOLUTION
predicted = {"last factor": 1 - (128 * 1000 - 1) / 1000, "good steps": 7}
# END SOLUTION

# %%
check("04-minus", predicted)

# %%
#| checks 04-minus
factors = [1 - micro / 1000 for micro in range(128 * 1000) if (micro + 1) % 128 == 0]


@says(
    "the factor of the last step",
    "How many micro-batches are there in all, and which number has the last one?",
)
def _(predicted):
    assert close(predicted["last factor"], factors[-1], atol=0.01)


@says(
    "the number of steps with a positive factor",
    "1 - i / 1000 is positive for i < 1000. Which micro-batch does each optimizer step fall on? "
    "The first falls on number 127.",
)
def _(predicted):
    assert predicted["good steps"] == sum(factor > 0 for factor in factors)


# %%
#| hints 04-minus
hints = [
    "1000 steps of 128 micro-batches: what is the largest i?",
    "Step k (from 0) uses the factor of micro-batch 128 k + 127.",
    "The largest i is 127,999. 128 k + 127 < 1000 holds for k = 0 to 6.",
]

# %%
#| wrong 04-minus: the factor of the last step
predicted = {"last factor": 0.0, "good steps": 7}

# %%
#| wrong 04-minus: the number of steps with a positive factor
predicted = {"last factor": -126.999, "good steps": 1000 / 128}

# %%
#| right 04-minus
predicted = {
    "good steps": len([k for k in range(1000) if 128 * k + 127 < 1000]),
    "last factor": -127.0 + 0.001,
}

# %% [markdown]
r"""
## 5. Mend the loop

Here is that loop, without the training. `factor(step, n_steps)` is any schedule; clamping it, as
you did above, would only hide the mistake: the run would sit at the lowest rate from the eighth
step on.

```python
def rates_of_run(n_micro, accumulation, factor):
    n_steps, rates = math.ceil(n_micro / accumulation), []
    for micro in range(n_micro):
        rate = factor(micro, n_steps)
        if (micro + 1) % accumulation == 0:
            rates.append(rate)  # optimizer.step() with this rate
    return rates
```

Return the factors that the optimizer steps should have. Micro-batches left over at the end that do
not fill a step are not trained on. (There is a second, smaller mistake in the code.)
"""


# %%
#| exercise id=04-count points=2 minutes=15 level=1 answer=rates_of_run
def rates_of_run(n_micro: int, accumulation: int, factor) -> list[float]:
    """The factor of every optimizer step of a run.

    Args:
        n_micro: micro-batches in the data.
        accumulation: micro-batches of one optimizer step.
        factor: factor(step, n_steps) -> float, the schedule.
    Returns:
        One factor for each optimizer step.
    """
    # BEGIN SOLUTION
    n_steps = n_micro // accumulation
    return [factor(step, n_steps) for step in range(n_steps)]
    # END SOLUTION


# %%
check("04-count", rates_of_run)


# %%
#| checks 04-count
@says(
    "asks the schedule about optimizer steps",
    "Its first argument must count 0, 1, 2, ... once for each optimizer step.",
)
def _(rates_of_run):
    found = rates_of_run(12, 4, lambda step, n_steps: float(step))
    assert found == [0.0, 1.0, 2.0], f"the schedule was asked about steps {found}."


@says(
    "tells the schedule how many steps there are",
    "Its second argument is the number of optimizer steps, in the same unit as the first.",
)
def _(rates_of_run):
    assert set(rates_of_run(12, 4, lambda step, n_steps: float(n_steps))) == {3.0}


@says(
    "leftover micro-batches make no step, and do not count",
    "14 micro-batches are 3 steps of 4. Round down, and tell the schedule so.",
)
def _(rates_of_run):
    ends = rates_of_run(14, 4, lambda step, n_steps: 1.0)
    assert len(ends) == 3, f"{len(ends)} steps from 14 micro-batches by 4."


# %%
#| hints 04-count
hints = [
    "Count in one unit only. Which one does the schedule want?",
    "The optimizer's step of a micro-batch is its number divided by accumulation, rounded down.",
    "n_steps = n_micro // accumulation, and factor(step, n_steps) for each step below it.",
]


# %%
#| wrong 04-count: asks the schedule about optimizer steps
def rates_of_run(n_micro, accumulation, factor):
    n_steps, rates = n_micro // accumulation, []
    for micro in range(n_micro):
        rate = factor(micro, n_steps)
        if (micro + 1) % accumulation == 0:
            rates.append(rate)
    return rates


# %%
#| wrong 04-count: tells the schedule how many steps there are
def rates_of_run(n_micro, accumulation, factor):
    return [factor(step, n_micro) for step in range(n_micro // accumulation)]


# %%
#| wrong 04-count: leftover micro-batches make no step, and do not count
def rates_of_run(n_micro, accumulation, factor):
    n_steps = math.ceil(n_micro / accumulation)
    return [factor(step, n_steps) for step in range(n_steps)]


# %%
#| right 04-count
def rates_of_run(n_micro, accumulation, factor):
    n_steps, rates = n_micro // accumulation, []
    for micro in range(n_micro):
        if (micro + 1) % accumulation == 0:
            rates.append(factor(micro // accumulation, n_steps))
    return rates


# %% [markdown]
r"""
## 6. Who goes where?

Muon is for matrices that map vectors to vectors. The embedding and the head are matrices too, but
tables in use: AdamW trains them. So it does everything that is not a matrix, such as a gain for
each channel. Muon's matrices are grouped by shape, to be stacked.

You are given the names and shapes of all parameters. Return the groups: a dictionary from the
group's name to the list of its parameters, in the order given. The AdamW group is called `adamw`;
Muon's are called by their shape, `muon 256x64` for example. Names that begin with `blocks.` lie
inside the blocks. Beware of the small models of this book: with 1,024 tokens and 256 channels, the
embedding has the shape of an MLP matrix.
"""


# %%
#| exercise id=04-groups points=2 minutes=15 level=2 answer=group_parameters
def group_parameters(shapes: dict[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Sort parameters into one AdamW group and a Muon group for each shape of matrix.

    Args:
        shapes: name -> shape, in the order of the model.
    Returns:
        group name -> names of its parameters; no empty groups.
    """
    # BEGIN SOLUTION
    groups: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        muon = name.startswith("blocks.") and len(shape) == 2
        group = f"muon {shape[0]}x{shape[1]}" if muon else "adamw"
        groups.setdefault(group, []).append(name)
    return groups
    # END SOLUTION


# %%
check("04-groups", group_parameters)

# %%
#| checks 04-groups
from nanochat.model import GPT, GPTConfig
from nanochat.optim import param_groups

config = GPTConfig(vocab_size=64, seq_len=8, n_layer=2, n_head=2, n_kv_head=1, n_embd=16)
model = GPT(config)  # vocab_size = 4 * n_embd
shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
names = {id(p): name for name, p in model.named_parameters()}
expected = [sorted(names[id(p)] for p in g["params"]) for g in param_groups(model)]
muon = [g for g in expected if g[0].startswith("blocks.")]


@says(
    "the tables go to AdamW, whatever their shape",
    "embedding.weight and head.weight are matrices by shape only. Look at the name.",
)
def _(group_parameters):
    found = group_parameters(shapes)
    tables = {"embedding.weight", "head.weight"}
    assert tables <= set(found["adamw"])


@says(
    "one Muon group for each shape",
    "Matrices of 64 x 16 and of 16 x 64 cannot be stacked; those of one shape belong together.",
)
def _(group_parameters):
    found = group_parameters({n: s for n, s in shapes.items() if n.startswith("blocks.")})
    assert sorted(map(sorted, found.values())) == sorted(muon)
    assert "muon 64x16" in found and "muon 16x64" in found


@says(
    "what is not a matrix goes to AdamW",
    "A vector has no singular values to level: Muon needs exactly two dimensions.",
)
def _(group_parameters):
    found = group_parameters({"blocks.0.gain": (16,), "blocks.0.mlp.up.weight": (64, 16)})
    assert found == {"adamw": ["blocks.0.gain"], "muon 64x16": ["blocks.0.mlp.up.weight"]}


# %%
#| hints 04-groups
hints = [
    "Two questions decide: does the name lie inside the blocks, and has the shape two numbers?",
    "`groups.setdefault(key, []).append(name)` begins a list where there is none yet.",
    "The key is f'muon {shape[0]}x{shape[1]}' if name.startswith('blocks.') and len(shape) == 2, "
    "else 'adamw'.",
]


# %%
#| wrong 04-groups: the tables go to AdamW, whatever their shape
def group_parameters(shapes):
    groups = {}
    for name, shape in shapes.items():
        group = f"muon {shape[0]}x{shape[1]}" if len(shape) == 2 else "adamw"
        groups.setdefault(group, []).append(name)
    groups.setdefault("adamw", [])
    return {group: names for group, names in groups.items() if names}


# %%
#| wrong 04-groups: one Muon group for each shape
def group_parameters(shapes):
    groups = {}
    for name, shape in shapes.items():
        muon = name.startswith("blocks.") and len(shape) == 2
        group = f"muon {max(shape)}x{min(shape)}" if muon else "adamw"
        groups.setdefault(group, []).append(name)
    return groups


# %%
#| wrong 04-groups: what is not a matrix goes to AdamW
def group_parameters(shapes):
    groups = {}
    for name, shape in shapes.items():
        muon = name.startswith("blocks.")
        group = "muon " + "x".join(map(str, shape)) if muon else "adamw"
        groups.setdefault(group, []).append(name)
    return groups


# %%
#| right 04-groups
def group_parameters(shapes):
    def group(name):
        inside, shape = name.split(".")[0] == "blocks", shapes[name]
        return "muon {}x{}".format(*shape) if inside and len(shape) == 2 else "adamw"

    kinds = sorted({group(name) for name in shapes})
    return {kind: [name for name in shapes if group(name) == kind] for kind in kinds}


# %% [markdown]
r"""
## 7. Cautious decay

Weight decay pulls every weight towards zero; the step pulls it wherever the gradient says. Where
the two disagree, plain decay undoes a part of what the step has just learnt. **Cautious** decay
shrinks a weight only where the step does not make it larger: where `update * param` is not
negative (the update is *subtracted*). nanochat's log notes a solid gain from it.

Return `param` after a step of rate `lr` along `update`, with cautious decay. Like the step, the
decay is multiplied by the rate.
"""


# %%
#| exercise id=04-cautious points=2 minutes=10 level=2 answer=cautious_step
def cautious_step(param: Tensor, update: Tensor, lr: float, weight_decay: float) -> Tensor:
    """Subtract lr * update, and lr * weight_decay * param where the two pull the same way.

    Args:
        param, update: (m, n), float32.
    Returns:
        (m, n), the new parameter.
    """
    # BEGIN SOLUTION
    decay = param * (update * param >= 0) * weight_decay
    return param - lr * (update + decay)
    # END SOLUTION


# %%
check("04-cautious", cautious_step)


# %%
#| checks 04-cautious
@says(
    "shrinks a weight that the step shrinks",
    "Where update and param have the same sign, subtracting the update shrinks: there the decay "
    "is added.",
)
def _(cautious_step):
    param, update = torch.tensor([[2.0, -2.0]]), torch.tensor([[0.5, -0.5]])
    assert close(cautious_step(param, update, 1.0, 0.1), torch.tensor([[1.3, -1.3]]))


@says(
    "leaves a weight alone that the step makes larger",
    "Where the signs differ, the result is param - lr * update and nothing else.",
)
def _(cautious_step):
    param, update = torch.tensor([[2.0, -2.0]]), torch.tensor([[-0.5, 0.5]])
    assert close(cautious_step(param, update, 1.0, 0.1), torch.tensor([[2.5, -2.5]]))


@says(
    "shrinks a weight that the step does not move",
    "An update of exactly zero does not disagree: its weight decays.",
)
def _(cautious_step):
    param, update = torch.tensor([[2.0, -2.0]]), torch.zeros(1, 2)
    assert close(cautious_step(param, update, 1.0, 0.1), torch.tensor([[1.8, -1.8]]))


@says(
    "the rate scales step and decay",
    "When the rate falls at the end of training, the decay must fall with it: multiply both by lr.",
)
def _(cautious_step):
    param, update = torch.tensor([[2.0]]), torch.tensor([[3.0]])
    assert close(cautious_step(param, update, 0.01, 0.5), torch.tensor([[2.0 - 0.03 - 0.01]]))


# %%
#| hints 04-cautious
hints = [
    "Take one weight of 2 and an update of 0.5. Where does the step move it, where does decay?",
    "A comparison such as (update * param >= 0) is a mask; a mask times a tensor keeps or drops.",
    "param - lr * (update + weight_decay * param * (update * param >= 0))",
]


# %%
#| wrong 04-cautious: leaves a weight alone that the step makes larger
def cautious_step(param, update, lr, weight_decay):
    return param - lr * (update + weight_decay * param)


# %%
#| wrong 04-cautious: shrinks a weight that the step does not move
def cautious_step(param, update, lr, weight_decay):
    return param - lr * (update + weight_decay * param * (update * param > 0))


# %%
#| wrong 04-cautious: the rate scales step and decay
def cautious_step(param, update, lr, weight_decay):
    return param - lr * update - weight_decay * param * (update * param >= 0)


# %%
#| right 04-cautious
def cautious_step(param, update, lr, weight_decay):
    against = (update > 0) & (param < 0) | (update < 0) & (param > 0)
    shrunk = torch.where(against, param, param * (1 - lr * weight_decay))
    return shrunk - lr * update


# %% [markdown]
r"""
## 8. Read a sweep

The validation losses (nats per token) of a small model after 70 steps, with three optimizers. The
vocabulary has 1,024 tokens, and $\ln 1024 = 6.93$.

| optimizer | rate: loss | rate: loss | rate: loss |
|---|---|---|---|
| SGD + momentum | 0.3: 3.61 | 1.0: 8.76 | |
| AdamW | 0.002: 4.20 | 0.005: 3.32 | 0.012: 3.25 |
| Muon + AdamW | 0.01: 2.96 | 0.02: 2.82 | 0.04: 2.68 |

`"sgd"`: what does the 8.76 say?

- `"a"`: 70 steps are too few for that rate.
- `"b"`: The rate is too high: the model ends worse than one that knows nothing.
- `"c"`: SGD cannot train a transformer.

`"next"`: which runs would you add first?

- `"a"`: Higher rates for AdamW and for Muon + AdamW.
- `"b"`: Higher rates for Muon + AdamW, to see how low it gets.
- `"c"`: Rates between those in the table, for both.

`"claim"`: which sentence does the table support?

- `"a"`: Muon + AdamW is better than AdamW.
- `"b"`: Muon + AdamW needs no tuning: each of its rates beats each of AdamW's.
- `"c"`: In this model and at the best of the rates tried, Muon + AdamW ends lower after 70 steps.
"""

# %%
#| exercise id=04-sweep points=1 minutes=10 level=1 answer=reading
# reading = {"sgd": letter, "next": letter, "claim": letter}
# BEGIN SOLUTION
reading = {"sgd": "b", "next": "a", "claim": "c"}
# END SOLUTION

# %%
check("04-sweep", reading)


# %%
#| checks 04-sweep
@says(
    "what the 8.76 says",
    "Hold it against 6.93, and against the other rate of the same optimizer.",
)
def _(reading):
    assert reading["sgd"].strip().lower() == "b"


@says(
    "which runs come next",
    "Where in its row does the best rate of each optimizer lie? A best value at the edge of a "
    "sweep is not known to be the best, and a fair comparison treats both sides alike.",
)
def _(reading):
    assert reading["next"].strip().lower() == "a"


@says(
    "which claim is supported",
    "One model, one length, one seed, three rates: a claim must not be wider than its evidence.",
)
def _(reading):
    assert reading["claim"].strip().lower() == "c"


# %%
#| hints 04-sweep
hints = [
    "A sweep is finished when its best value has a worse one on either side.",
    "For the claim, ask of each sentence what else you would have to measure before you sign it.",
    "The best rates of both, 0.012 and 0.04, are the highest that were tried.",
]

# %%
#| wrong 04-sweep: what the 8.76 says
reading = {"sgd": "c", "next": "a", "claim": "c"}

# %%
#| wrong 04-sweep: which runs come next
reading = {"sgd": "b", "next": "b", "claim": "c"}

# %%
#| wrong 04-sweep: which claim is supported
reading = {"sgd": "b", "next": "a", "claim": "a"}

# %%
#| right 04-sweep
reading = dict(zip(("claim", "next", "sgd"), "cab"))

# %% [markdown]
r"""
## Open question

Swap two parts of Muon in a copy of `muon_rule`: orthogonalise each gradient first and take the
momentum of the results. Train both versions at three rates each, with batches of 4 and of 64 rows.
When does the order matter, and what does orthogonalising do to the noise of a small batch?
(No marks.)
"""

# %%
progress()
