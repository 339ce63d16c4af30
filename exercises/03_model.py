# %% [markdown]
r"""
# Exercises for chapter 3: the model

`check(id, answer)` says at once which properties your answer has and what is likely wrong with
the others. `hint(id)` helps, three times. `progress()` shows your points. An answer is a plain
function: it takes and returns tensors and numbers, and changes none of its arguments.
"""

# %%
#| given
import torch
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
import torch.nn.functional as F


def vectors():
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)) * 5


@says("agrees with the formula", "The mean is over the last dimension only, of the squares.")
def _(rms_norm):
    x = vectors()
    assert close(rms_norm(x), F.rms_norm(x, (8,), eps=1e-6))


@says("keeps the dtype", "Compute in float32, then go back with .to(x.dtype).")
def _(rms_norm):
    assert rms_norm(vectors().bfloat16()).dtype == torch.bfloat16


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
#| right 03-rmsnorm
def rms_norm(x, eps=1e-6):
    size = (x.float().pow(2).sum(-1) / x.shape[-1] + eps) ** 0.5
    return (x.float() / size.unsqueeze(-1)).to(x.dtype)
