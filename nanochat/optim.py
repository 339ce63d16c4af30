"""Muon for matrices and AdamW for the rest, with parameter groups and schedules.

Exported from chapters/04_optimizer.py (chapter 04, The optimizer); edit there, not here.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from nanochat.model import GPT

__all__ = [
    "MuonAdamW",
    "POLAR_EXPRESS",
    "SCALAR_RATES",
    "adamw_update",
    "build_optimizer",
    "even_out",
    "lr_multiplier",
    "muon_momentum",
    "muon_update",
    "orthogonalize",
    "param_groups",
]


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
