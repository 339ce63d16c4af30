"""The training loop that pretraining, midtraining and fine-tuning share.

Exported from chapters/05_pretraining.py (chapter 05, Pretraining); edit there, not here.
"""

import atexit
import contextlib
import gc
import importlib
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.common import MetricsLog, Progress, UserError, keep_freed_memory
from nanochat.model import GPT
from nanochat.optim import (
    MuonAdamW,
    compiler_failed,
    decay_multiplier,
    lr_multiplier,
    muon_momentum,
)

__all__ = [
    "EarlyWarnings",
    "Gradients",
    "Meter",
    "SingleProcess",
    "TRACKERS",
    "TrackedLog",
    "accumulate_gradients",
    "fit",
    "gradient_norm",
    "open_tracker",
    "plain_numbers",
    "spared_garbage",
    "stream_size",
    "under_way",
]


class SingleProcess:
    """The world of a run that is one process; chapter 6 has the same for many."""

    rank, world_size, is_main = 0, 1, True

    def __init__(self, device: torch.device):
        self.device = device

    def average_gradients(self, model: torch.nn.Module) -> None:
        """Average gradients over the processes: there is one, so they stay."""

    def gradient_norm(self, model: torch.nn.Module) -> Tensor:
        """Return the length of the averaged gradient."""
        return gradient_norm(model)

    def sum(self, value: Tensor) -> Tensor:
        """Add a tensor up over the processes: there is one, so it is the sum."""
        return value

    def barrier(self) -> None:
        """Wait for the other processes: there are none."""


def accumulate_gradients(
    model: torch.nn.Module, micro_batches: list[tuple[Tensor, Tensor]], world: Any
) -> tuple[Tensor, Tensor]:
    """Add up the gradients of a list of (inputs, targets); return (mean loss, trained tokens).

    Both are 0-d tensors on the device, so that nobody has to wait for them. The loss is the mean in
    nats over all targets that count (not -1) in the whole global batch, so the result does not
    depend on how the batch is cut into micro-batches or processes.
    """
    device = world.device
    counted = float(sum(int((y != -1).sum()) for _, y in micro_batches))
    n_tokens = world.sum(torch.full((), counted, device=device)).clamp(min=1)
    total = torch.zeros((), device=device)
    for inputs, targets in micro_batches:
        inputs, targets = (t.to(device, non_blocking=True) for t in (inputs, targets))
        loss = model(inputs, targets, reduction="sum") / n_tokens  # this rank's share of the mean
        (loss * world.world_size).backward()  # average_gradients divides by world_size
        total += loss.detach()
    world.average_gradients(model)
    return world.sum(total), n_tokens


class Gradients:
    """Gradients of global batches, by a compiled model where that works, in pieces that fit.

    `compiled` and `pieces` (of each micro-batch) say what it has come to.
    """

    def __init__(self, model: GPT, world: Any, compile_model: bool):
        self.model, self.world, self.pieces, self.compiled = model, world, 1, compile_model
        self.run = torch.compile(model, dynamic=False) if compile_model else model

    def add_up(self, micro_batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """As `accumulate_gradients`; what fails is tried again in a smaller way, and said."""
        while True:
            try:
                return accumulate_gradients(self.run, self.cut(micro_batches), self.world)
            except RuntimeError as error:
                self.give_way(error, micro_batches[0][0].size(0))
            self.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()  # does nothing without a GPU

    def cut(self, micro_batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Return every micro-batch in `pieces` parts, by rows."""
        rows = max(1, micro_batches[0][0].size(0) // self.pieces)
        return [part for x, y in micro_batches for part in zip(x.split(rows), y.split(rows))]

    def give_way(self, error: RuntimeError, rows: int) -> None:
        """Choose a smaller way after an error; raise it when there is none."""
        alone = self.world.world_size == 1
        if isinstance(error, torch.OutOfMemoryError) and alone and rows > self.pieces:
            self.pieces *= 2
            parts = f"{max(1, rows // self.pieces)} rows, {self.pieces} times as many of them"
            print(f"out of memory with {2 * rows // self.pieces} rows: going on with {parts}")
        elif self.compiled and compiler_failed(error):
            self.compiled, self.run, kind = False, self.model, type(error).__name__
            print(f"torch.compile does not work here ({kind}): going on without it")
        else:
            raise error


class EarlyWarnings:
    """Looks at the numbers of each step and says, once of each kind, what begins to go wrong."""

    def __init__(self) -> None:
        self.norms, self.times = deque(maxlen=50), deque(maxlen=20)
        self.first_size, self.said = None, set()

    def check(
        self, loss: float, norm: float, seconds: float, waited: float, size: float | None = None
    ) -> list[tuple[str, str]]:
        """Return (kind, sentence) for what is new.

        `loss` in nats, `norm` of the gradient, `seconds` of the step and how many of them were
        spent `waited` for data, `size` the root mean square of the residual stream, if measured.
        """
        usual = statistics.median(self.norms) if len(self.norms) >= 10 else math.inf
        self.norms.append(norm)
        self.times.append((waited, seconds))
        share = sum(w for w, _ in self.times) / max(sum(s for _, s in self.times), 1e-9)
        self.first_size = self.first_size or size
        grown = size / self.first_size if size else 1.0
        found = []
        if not math.isfinite(loss):
            found.append(("loss", f"the loss is not a number ({loss}); try lower rates"))
        elif not math.isfinite(norm):
            found.append(("loss", f"the gradient is not a number ({norm}); try lower rates"))
        if norm > 10 * usual:
            found.append(("gradient", f"the gradient's norm is {norm:.3g}, usual is {usual:.3g}"))
        if not grown <= 100:
            found.append(("activation", f"the activations are {grown:.0f} times those at first"))
        lost = sum(w for w, _ in self.times) / len(self.times)
        if len(self.times) >= 10 and share > 0.2 and lost > 0.01:  # less than 10 ms are no loss
            found.append(("data", f"{share:.0%} of the time goes into waiting for data"))
        new = [(kind, text) for kind, text in found if kind not in self.said]
        self.said |= {kind for kind, _ in new}
        return new


def gradient_norm(model: torch.nn.Module) -> Tensor:
    """Return the length of the whole gradient, a 0-d tensor on the model's device."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a cut model, chapter 6


@torch.no_grad()
def stream_size(model: GPT, idx: Tensor) -> Tensor:
    """Return the root mean square of what the last block gives for ids (B, T), a 0-d tensor."""
    seen = []
    hook = model.blocks[-1].register_forward_hook(lambda block, given, x: seen.append(x))
    try:
        model(idx.to(model.device, non_blocking=True), last_only=True)
    finally:
        hook.remove()
    return seen[0].float().square().mean().sqrt()


def under_way(step: dict[str, Any]) -> dict[str, Any]:
    """Return a step's facts with their tensors being copied from the GPU, complete at `ready`."""
    facts = {
        name: value.to("cpu", non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in step.items()
    }
    ready = torch.cuda.Event()
    ready.record()
    return {**facts, "ready": ready}


class Meter:
    """Reads the numbers of each step, one step late on a GPU; logs, warns, keeps the speed."""

    def __init__(self, log: MetricsLog, bar: Progress, world: Any, start_step: int, n_steps: int):
        self.log, self.bar, self.world, self.n_steps = log, bar, world, n_steps
        self.first_timed = start_step + min(10, (n_steps - start_step) // 4)
        self.warnings, self.pending = EarlyWarnings(), None
        self.loss, self.seconds, self.tokens = math.nan, 0.0, 0
        self.clock = time.perf_counter()

    def add(self, **step: Any) -> None:
        """Take a step that has been handed to the device; on a GPU read the one before."""
        if self.world.device.type == "cuda":
            step = under_way(step)
            self.settle()
        self.pending = step
        if self.world.device.type != "cuda":  # the work is done: nothing to overlap with
            self.settle()

    def settle(self) -> None:
        """Read what has not been read."""
        before, self.pending = self.pending, None
        if before:
            self.read(**before)

    def read(
        self, step: int, loss: Any, norm: Any, tokens: Any, waited: float, size: Any, **copies: Any
    ) -> None:
        """Wait for a step's numbers; log and warn. UserError for a loss or norm not finite."""
        if copies:
            copies["ready"].synchronize()
        self.loss, norm, tokens = float(loss), float(norm), int(tokens)
        now = time.perf_counter()
        took, self.clock = now - self.clock, now
        if step >= self.first_timed:
            self.seconds, self.tokens = self.seconds + took, self.tokens + tokens
        if step % max(1, self.n_steps // 100) == 0 or step == self.n_steps - 1:
            facts = dict(tokens=tokens, seconds=took, waited=waited, gradient_norm=norm)
            self.log.write("step", step=step, loss=self.loss, **facts)
        size = None if size is None else float(size)
        for kind, text in self.warnings.check(self.loss, norm, took, waited, size):
            self.log.write("warning", step=step, kind=kind, text=text)
            if kind == "loss":
                raise UserError(f"at step {step} {text}.")
            if self.world.is_main:
                print(f"warning at step {step}: {text}", flush=True)
        if self.world.is_main:
            self.bar.update(loss=self.loss)


@contextlib.contextmanager
def spared_garbage():
    """Let Python's garbage collector pass over what exists now, until the block ends."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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

    A step takes `accumulation` pairs (inputs, targets) from `batches.next()`, each (B, T) int64.
    `schedule(step, n_steps)` is the factor on every rate; momentum and decay follow chapter 4.
    `evaluate(step)` returns metrics to log, every `eval_every` steps and at the end; `save(step)`
    keeps a checkpoint after so many steps; `start_step` resumes. Events "step", "eval", "warning"
    go to `log`. Returns the last loss (nats) and the speed. UserError if the loss is not finite.
    """
    world, log = world or SingleProcess(model.device), log or MetricsLog(None)
    if model.device.type == "cpu":
        keep_freed_memory()
    gradients, look_every = Gradients(model, world, compile_model), max(1, n_steps // 10)
    bar = Progress(n_steps, label, quiet=10.0 if world.is_main else float("inf"))
    with spared_garbage(), bar:
        bar.skip(start_step)
        meter = Meter(log, bar, world, start_step, n_steps)
        for step in range(start_step, n_steps):
            judging = evaluate and eval_every and step % eval_every == 0
            saving = save and save_every and step % save_every == 0 and step > start_step
            if judging or saving:
                meter.settle()
                if judging:
                    log.write("eval", step=step, **evaluate(step))
                if saving:
                    save(step)
                meter.clock = time.perf_counter()
            decay = decay_multiplier(step, n_steps)
            optimizer.set_schedule(schedule(step, n_steps), muon_momentum(step), decay)
            began = time.perf_counter()
            micro_batches = [batches.next() for _ in range(accumulation)]
            waited = time.perf_counter() - began
            loss, n_tokens = gradients.add_up(micro_batches)
            norm = world.gradient_norm(model)
            size = None if step % look_every else stream_size(model, micro_batches[0][0][:1])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            meter.add(step=step, loss=loss, norm=norm, tokens=n_tokens, waited=waited, size=size)
        meter.settle()
    if evaluate:
        log.write("eval", step=n_steps, **evaluate(n_steps))
    return {"loss": meter.loss, "tokens_per_second": meter.tokens / max(meter.seconds, 1e-9)}


def plain_numbers(event: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of an event, named "<stage>/<field>"."""
    stage = event.get("stage", "train")
    numbers = {k: v for k, v in event.items() if isinstance(v, (int, float))}
    return {f"{stage}/{k}": v for k, v in numbers.items() if not isinstance(v, bool)}


TRACKERS = ("wandb", "tensorboard", "trackio")


def open_tracker(name: str, run: str, folder: str | Path) -> Callable[[dict[str, Any]], None]:
    """Return a function that shows an event's numbers in "wandb", "tensorboard" or "trackio".

    `run` names the run, `folder` is where files may be left. Names are "<stage>/<field>", the step
    is a field like the others where a tool wants it to rise over all stages. Raises UserError for
    an unknown name and a missing package.
    """
    if name not in TRACKERS:
        raise UserError(f"unknown tracker {name!r}; choose one of {', '.join(TRACKERS)}.")
    try:
        tool = importlib.import_module(name)
    except ModuleNotFoundError:
        raise UserError(
            f"the tracker {name} is not installed; run `pip install {name}`, or go on "
            f"without a tracker: metrics.jsonl has every number."
        ) from None
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(Path(folder) / "tensorboard"))
        atexit.register(writer.close)

        def show(event: dict[str, Any]) -> None:
            for key, value in plain_numbers(event).items():
                writer.add_scalar(key, value, event.get("step"))
            writer.flush()

        return show
    tool.init(project="nanochat", name=run)
    atexit.register(tool.finish)
    return lambda event: tool.log(plain_numbers(event))


class TrackedLog(MetricsLog):
    """A log that hands each event to a tracker as well."""

    def __init__(self, path: str | Path | None, track: Callable[[dict], None], **static: Any):
        super().__init__(path, **static)
        self.track = track

    def bind(self, **static: Any) -> "TrackedLog":
        """Return a log to the same file and tracker with more static fields."""
        return TrackedLog(self.path, self.track, **{**self.static, **static})

    def write(self, event: str, **fields: Any) -> None:
        """Append one event and hand it on."""
        super().write(event, **fields)
        self.track({"event": event, **self.static, **fields})
