"""Muon for matrices and AdamW for the rest, with parameter groups and schedules.

Exported from chapters/04_optimizer.py (chapter 04, The optimizer); edit there, not here.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nanochat.model import GPT

__all__ = [
    "MuonAdamW",
    "PLAIN",
    "POLAR_EXPRESS",
    "SCALARS",
    "TUNED",
    "adamw_rule",
    "adamw_update",
    "build_optimizer",
    "compiled",
    "compiler_failed",
    "decay_multiplier",
    "equilibrate",
    "even_out",
    "lr_multiplier",
    "muon_momentum",
    "muon_rule",
    "muon_update",
    "orthogonalize",
    "param_groups",
    "run_rule",
    "set_norm",
]


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
