"""The training loop that pretraining, midtraining and fine-tuning share.

Exported from chapters/05_pretraining.py (chapter 05, Pretraining); edit there, not here.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanochat.common import MetricsLog, Progress, UserError, synchronize
from nanochat.model import GPT
from nanochat.optim import MuonAdamW, lr_multiplier, muon_momentum

__all__ = ["SingleProcess", "accumulate_gradients", "fit"]


class SingleProcess:
    """The world of a run that is one process; chapter 6 has the same for many."""

    rank, world_size, is_main = 0, 1, True

    def __init__(self, device: torch.device):
        self.device = device

    def average_gradients(self, model: torch.nn.Module) -> None:
        """Average gradients over the processes: there is one, so they stay."""

    def sum(self, value: Tensor) -> Tensor:
        """Add a tensor up over the processes: there is one, so it is the sum."""
        return value

    def barrier(self) -> None:
        """Wait for the other processes: there are none."""


def accumulate_gradients(
    model: torch.nn.Module, batches: Any, accumulation: int, world: Any
) -> tuple[float, int]:
    """Add up the gradients of `accumulation` micro-batches; return (mean loss, trained tokens).

    The loss is the mean in nats over all targets that count (not -1) in the whole global batch, so
    the result does not depend on how the batch is cut into micro-batches or processes.
    """
    micro_batches = [batches.next() for _ in range(accumulation)]
    counted = torch.tensor(sum(int((y != -1).sum()) for _, y in micro_batches), device=world.device)
    n_tokens = max(int(world.sum(counted)), 1)
    total = torch.zeros((), device=world.device)
    for inputs, targets in micro_batches:
        inputs = inputs.to(world.device, non_blocking=True)
        targets = targets.to(world.device, non_blocking=True)
        loss = model(inputs, targets, reduction="sum") / n_tokens  # this rank's share of the mean
        (loss * world.world_size).backward()  # average_gradients divides by world_size
        total += loss.detach()
    world.average_gradients(model)
    return float(world.sum(total)), n_tokens


def fit(
    model: GPT,
    optimizer: MuonAdamW,
    batches: Any,
    n_steps: int,
    *,
    accumulation: int = 1,
    schedule: Callable[[int, int], float] = lr_multiplier,
    world: Any = None,
    log: MetricsLog | None = None,
    label: str = "train",
    evaluate: Callable[[int], dict[str, float]] | None = None,
    eval_every: int = 0,
    save: Callable[[int], None] | None = None,
    save_every: int = 0,
    start_step: int = 0,
    compile_model: bool = False,
) -> dict[str, float]:
    """Train for n_steps optimizer steps: the one loop of pretraining, midtraining and SFT.

    `batches.next()` gives (inputs, targets), each (B, T) int64. `schedule(step, n_steps)` is the
    factor on every rate. `evaluate(step)` returns metrics to log, every `eval_every` steps and at
    the end; `save(step)` keeps a checkpoint after that many steps. `start_step` resumes. Events
    "step" and "eval" go to `log`. Returns the last loss and the speed. Raises UserError when the
    loss is no longer a number.
    """
    world, log = world or SingleProcess(model.device), log or MetricsLog(None)
    run = torch.compile(model, dynamic=False) if compile_model else model
    log_every, loss, seconds, timed = max(1, n_steps // 100), float("nan"), 0.0, 0
    with Progress(n_steps, label, quiet=10.0 if world.is_main else float("inf")) as bar:
        bar.skip(start_step)
        for step in range(start_step, n_steps):
            if evaluate and eval_every and step % eval_every == 0:
                log.write("eval", step=step, **evaluate(step))
            synchronize(world.device)
            began = time.perf_counter()
            optimizer.set_schedule(schedule(step, n_steps), muon_momentum(step))
            loss, n_tokens = accumulate_gradients(run, batches, accumulation, world)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            synchronize(world.device)
            took = time.perf_counter() - began
            if loss != loss:
                raise UserError(f"the loss is not a number at step {step}; try lower rates.")
            if step - start_step >= min(10, n_steps // 4):  # the first steps compile and warm up
                seconds, timed = seconds + took, timed + n_tokens
            if step % log_every == 0 or step == n_steps - 1:
                log.write("step", step=step, loss=loss, tokens=n_tokens, seconds=took)
            if world.is_main:
                bar.update(loss=loss)
            if save and save_every and (step + 1) % save_every == 0 and step + 1 < n_steps:
                save(step + 1)
    if evaluate:
        log.write("eval", step=n_steps, **evaluate(n_steps))
    return {"loss": loss, "tokens_per_second": timed / seconds if seconds else 0.0}
