"""Training in several processes: process group, launcher and sharded optimizer.

Exported from chapters/06_distributed.py (chapter 06, Many processes); edit there, not here.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.checkpoint import save_checkpoint
from nanochat.common import UserError, pick_device, synchronize
from nanochat.model import GPT
from nanochat.optim import MuonAdamW, adamw_update, muon_update, param_groups
from nanochat.train import SingleProcess

__all__ = [
    "BUS_FACTORS",
    "LaunchError",
    "Layout",
    "Piece",
    "ProcessGroup",
    "ShardedMuonAdamW",
    "available_processes",
    "buckets",
    "build_sharded_optimizer",
    "check",
    "collective",
    "find_failure",
    "gather_state",
    "launch",
    "launch_environment",
    "main",
    "measure",
    "own_state",
    "report_errors",
    "save_together",
    "setup",
    "share_out",
    "start_all_gather",
    "start_reduce_scatter",
    "stop",
    "watch_launcher",
]


BUS_FACTORS = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
}


def buckets(tensors: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Cut a list of tensors, in order, into lists of at most `limit` bytes (a larger one alone)."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > limit:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


class ProcessGroup:
    """All ranks of a job, as one of them sees it: the world of a run in many processes.

    Every method is a collective: all ranks must call it, in the same order. Gradients are summed
    in `reduce_dtype`, in buckets of `bucket_bytes`.
    """

    def __init__(
        self,
        device: torch.device,
        reduce_dtype: torch.dtype = torch.float32,
        bucket_bytes: int = 64 << 20,
    ):
        self.device, self.reduce_dtype, self.bucket_bytes = device, reduce_dtype, bucket_bytes
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.is_main = self.rank == 0

    def average_gradients(self, model: nn.Module) -> None:
        """Replace each gradient by its mean over the ranks; a missing one counts as zero."""
        params = [p for p in model.parameters() if p.requires_grad]
        for param in params:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        started = []
        for bucket in buckets([p.grad for p in params], self.bucket_bytes):
            flat = torch.cat([g.reshape(-1).to(self.reduce_dtype) for g in bucket])
            started.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, work in started:
            work.wait()
            parts = flat.div_(self.world_size).split([g.numel() for g in bucket])
            for grad, part in zip(bucket, parts):
                grad.copy_(part.view_as(grad))

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks, as a new tensor where the old one was."""
        total = value.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(value.device)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier()

    @torch.no_grad()
    def broadcast(self, model: nn.Module) -> None:
        """Give every rank the parameters and buffers of rank 0, in place."""
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor, src=0)

    def close(self) -> None:
        """Leave the group; the process is alone afterwards."""
        dist.destroy_process_group()


def report_errors() -> None:
    """Write an uncaught exception of this process where torchrun looks for it, then print it."""

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        name = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if name:
            text = "".join(traceback.format_exception(kind, error, trace))
            details = {"py_callstack": text, "timestamp": str(int(time.time()))}
            message = {"message": f"{kind.__name__}: {error}", "extraInfo": details}
            Path(name).write_text(json.dumps({"message": message}), encoding="utf-8")
        sys.__excepthook__(kind, error, trace)
        sys.stderr.flush()
        os._exit(1)  # at once: the other ranks may be stuck in a collective with us

    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        sys.excepthook = hook


def watch_launcher() -> None:
    """End this process when the one that launched it is gone, even by kill -9."""
    parent = os.getppid()

    def watch() -> None:
        if os.environ.get("NANOCHAT_LAUNCHED"):  # standard input is a pipe that `launch` holds
            while os.read(0, 1):
                pass
        else:
            while os.getppid() == parent:
                time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def setup(device: str = "auto", timeout: float = 600.0) -> Any:
    """Join the job this process belongs to; returns its world (SingleProcess when it is alone).

    Rank and size come from torchrun's environment. A collective that waits longer than `timeout`
    seconds for another rank fails. Raises UserError when a rank has no GPU of its own.
    """
    if "RANK" not in os.environ:
        return SingleProcess(pick_device(device))
    report_errors()
    watch_launcher()
    place, local_rank = pick_device(device), int(os.environ.get("LOCAL_RANK", 0))
    limit = timedelta(seconds=timeout)
    if place.type != "cuda":
        dist.init_process_group("gloo", timeout=limit)
        return ProcessGroup(place)
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
            f"start at most that many processes on it."
        )
    place = torch.device("cuda", local_rank)
    torch.cuda.set_device(place)
    dist.init_process_group("nccl", device_id=place, timeout=limit)
    return ProcessGroup(place)


class LaunchError(RuntimeError):
    """A rank failed. `rank` is its number (None if unknown), `traceback` its own traceback."""

    def __init__(self, message: str, rank: int | None = None, traceback: str = ""):
        super().__init__(f"{message}\n{traceback}".rstrip())
        self.rank, self.traceback = rank, traceback


def available_processes(device: str = "auto") -> int:
    """Return how many ranks this machine can serve: its GPUs, or on the CPU its cores."""
    if pick_device(device).type == "cuda":
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch_environment(nproc: int) -> dict[str, str]:
    """Return the environment of the ranks that `launch` starts."""
    env = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "RANK", "WORLD_SIZE")}
    cores = available_processes("cpu")
    package = Path(sys.modules["nanochat"].__file__).parents[1]  # import the same nanochat there
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package), env.get("PYTHONPATH", "")]))
    env.update(OMP_NUM_THREADS=str(max(1, cores // nproc)), PYTHONUNBUFFERED="1")
    env.update(NANOCHAT_LAUNCHED="1", TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="[rank ${rank}]:")
    env.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if sys.platform != "win32":  # one machine: talk through the loopback, whatever its host name
        env.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    return env


def stop(process: subprocess.Popen, patience: float = 3.0) -> None:
    """End a launcher and its ranks: close their pipe, ask, and after `patience` seconds insist."""
    group = getattr(os, "killpg", None)
    if process.stdin:
        process.stdin.close()  # the ranks watch this pipe
    for force in (False, True):
        if process.poll() is None:
            try:
                if group:
                    group(process.pid, signal.SIGKILL if force else signal.SIGTERM)
                else:
                    process.kill() if force else process.terminate()
                process.wait(patience)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


def launch(
    module: str,
    args: list[str],
    nproc: int,
    on_line: Callable[[str], None] | None = None,
    env: dict[str, str] | None = None,
) -> None:
    """Run `python -m module args` in `nproc` ranks on this machine and wait for them.

    `module` may also be the path of a .py file. Each line that a rank prints goes to `on_line`
    (default: print), with "[rank 1] " before those of ranks other than 0. `env` is added to the
    environment. Raises LaunchError when a rank fails; an interrupt stops all ranks and is raised
    again. The module should call `setup()` first.
    """
    on_line = on_line or (lambda line: print(line, flush=True))
    target = [module] if module.endswith(".py") else ["-m", module]
    own_session = dict(start_new_session=True) if os.name == "posix" else dict(creationflags=0x200)
    with tempfile.TemporaryDirectory(prefix="nanochat-launch-") as logs:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={nproc}", "--log-dir", logs, "--tee", "3", *target, *args]
        process = subprocess.Popen(
            command,
            env={**launch_environment(nproc), **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            **own_session,
        )
        summary = []  # what the launcher itself says
        try:
            for line in process.stdout:
                said = re.match(r"\[rank (\d+)\]:(.*)", line.rstrip("\r\n"))
                if said:
                    on_line(said[2] if said[1] == "0" else f"[rank {said[1]}] {said[2]}")
                else:
                    summary.append(line)
            process.wait()
        finally:
            stop(process)
            process.stdout.close()
        if process.returncode:
            raise find_failure(Path(logs), "".join(summary), process.returncode)


def find_failure(logs: Path, summary: str, code: int) -> LaunchError:
    """Say which rank failed first, and why, from the launcher's log folder and its summary."""
    ends = re.findall(r"rank\s*: (\d+) \(local_rank.*?\n\s*exitcode\s*: (-?\d+)", summary)
    killed = [(int(rank), -int(end)) for rank, end in ends if int(end) in (-4, -7, -9, -11)]
    if killed:
        rank, number = killed[0]
        name = signal.Signals(number).name
        hint = "; SIGKILL often means that memory ran out" if name == "SIGKILL" else ""
        return LaunchError(f"rank {rank} was killed by {name}{hint}.", rank)
    reports = sorted(logs.glob("*/attempt_*/*/error.json"), key=lambda f: f.stat().st_mtime_ns)
    if reports:
        message = json.loads(reports[0].read_text(encoding="utf-8"))["message"]
        rank, trace = int(reports[0].parent.name), message["extraInfo"]["py_callstack"]
        return LaunchError(f"rank {rank} failed: {message['message']}", rank, trace)
    for file in sorted(logs.glob("*/attempt_*/*/stderr.log")):
        text = file.read_text(encoding="utf-8", errors="replace").strip()
        if text:
            rank, tail = int(file.parent.name), "\n".join(text.splitlines()[-30:])
            return LaunchError(f"rank {rank} failed: {tail.splitlines()[-1]}", rank, tail)
    tail = "\n".join(summary.splitlines()[-20:])
    return LaunchError(f"the launcher ended with code {code} before a rank said why.", None, tail)


def collective(name: str, flat: Tensor, n: int) -> Callable[[], Any]:
    """Return a call that runs one collective over a flat tensor whose length divides by n."""
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    part = torch.empty(flat.numel() // n, dtype=flat.dtype, device=flat.device)
    return {
        "all_reduce": lambda: dist.all_reduce(flat),
        "reduce_scatter": lambda: reduce_scatter(part, flat),
        "all_gather": lambda: all_gather(flat, part),
        "copy": lambda: flat.clone(),
    }[name]


def measure(world: Any, sizes: list[int], repeats: int = 5) -> Iterator[dict[str, Any]]:
    """Time a memory copy and, with several ranks, each collective; yields one dict a measurement.

    `sizes` are bytes of float32. `gb_per_s` is 10^9 bytes of the bus a second (see BUS_FACTORS;
    a copy counts what it reads and writes) of the median of `repeats` runs.
    """
    n = world.world_size
    for name in ["copy", *BUS_FACTORS] if n > 1 else ["copy"]:
        for size in sizes:
            flat = torch.zeros(max(size // 4 // n, 1) * n, device=world.device)
            run, seconds = collective(name, flat, n), []
            for _ in range(repeats + 1):
                world.barrier()
                synchronize(world.device)
                start = time.perf_counter()
                run()
                synchronize(world.device)
                seconds.append(time.perf_counter() - start)
            median = sorted(seconds[1:])[repeats // 2]  # the first run warms up
            factor = 2.0 if name == "copy" else BUS_FACTORS[name](n)
            speed = flat.nbytes * factor / median / 1e9
            yield dict(what=name, bytes=flat.nbytes, seconds=median, gb_per_s=speed)


def check(world: Any, sizes: list[int]) -> Iterator[dict[str, Any]]:
    """Yield what a job should know before it starts: each rank's place, a sum, and speeds.

    Raises UserError when ranks differ in their torch version or when a sum is wrong.
    """
    here = dict(what="rank", rank=world.rank, host=socket.gethostname(), torch=torch.__version__)
    here.update(device=str(world.device), threads=torch.get_num_threads())
    ranks = [here] * world.world_size
    if world.world_size > 1:
        dist.all_gather_object(ranks, here)
    yield from ranks
    versions = sorted({rank["torch"] for rank in ranks})
    if len(versions) > 1:
        raise UserError(
            f"the ranks run different versions of torch ({', '.join(versions)}); "
            f"install the same one everywhere."
        )
    total = int(world.sum(torch.tensor(world.rank + 1)))
    if total != world.world_size * (world.world_size + 1) // 2:
        raise UserError(f"the ranks 1 to {world.world_size} add up to {total}; the wire is broken.")
    yield from measure(world, sizes)


def main(argv: list[str] | None = None) -> None:
    """Check this machine or job: one JSON line for each rank and each measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m nanochat.distributed", description=main.__doc__
    )
    parser.add_argument(
        "--check", action="store_true", help="check ranks and measure (the default)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**k for k in (3, 4, 5, 6, 7)])
    options = parser.parse_args(argv)
    world = setup(options.device)
    for line in check(world, options.sizes):
        if world.is_main:
            print(json.dumps(line), flush=True)
    if isinstance(world, ProcessGroup):
        world.close()


class Piece(NamedTuple):
    """The elements start..stop of a flattened parameter: what one rank updates."""

    param: Tensor
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return this piece of a tensor shaped like the parameter, flat."""
        return tensor.reshape(-1)[self.start : self.stop]


def share_out(groups: list[dict[str, Any]], n_ranks: int) -> list[list[list[Piece]]]:
    """Share the parameters of optimizer groups out; returns [group][rank] -> pieces.

    AdamW's tensors are cut into n_ranks equal pieces. Muon's matrices stay whole and go, large
    ones first, to the rank that has the fewest elements so far. The same on every rank.
    """
    loads, shares = [0] * n_ranks, []
    for group in groups:
        share: list[list[Piece]] = [[] for _ in range(n_ranks)]
        for param in sorted(group["params"], key=lambda p: -p.numel()):
            n = param.numel()
            if group["kind"] == "muon":
                owner = loads.index(min(loads))
                share[owner].append(Piece(param, 0, n))
                loads[owner] += n
                continue
            width = -(-n // n_ranks)  # rounded up; the last piece may be shorter, or empty
            for rank in range(min(n_ranks, -(-n // width))):
                share[rank].append(Piece(param, rank * width, min((rank + 1) * width, n)))
        shares.append(share)
    return shares


class Layout:
    """Where the pieces of one group lie in a flat tensor of n_ranks equal parts."""

    def __init__(self, share: list[list[Piece]]):
        self.share = share
        self.width = max(sum(p.stop - p.start for p in pieces) for pieces in share)
        first = next(piece for pieces in share for piece in pieces).param
        self.dtype, self.device = first.dtype, first.device

    def empty(self) -> Tensor:
        """Return a new flat tensor (n_ranks * width,)."""
        return torch.zeros(len(self.share) * self.width, dtype=self.dtype, device=self.device)

    def part(self, flat: Tensor, rank: int) -> Tensor:
        """Return the part of one rank, (width,), a view."""
        return flat[rank * self.width : (rank + 1) * self.width]

    def slots(self, part: Tensor, rank: int) -> Iterator[tuple[Piece, Tensor]]:
        """Yield each piece of a rank with its place in the rank's part, a view."""
        at = 0
        for piece in self.share[rank]:
            yield piece, part[at : at + piece.stop - piece.start]
            at += piece.stop - piece.start


def start_reduce_scatter(layout: Layout, rank: int) -> tuple[Tensor, Any]:
    """Start to sum a group's gradients; returns (the rank's own part, handle to wait for)."""
    flat = layout.empty()
    for owner in range(len(layout.share)):
        for piece, place in layout.slots(layout.part(flat, owner), owner):
            if piece.param.grad is not None:
                place.copy_(piece.of(piece.param.grad))
    own = torch.empty(layout.width, dtype=flat.dtype, device=flat.device)
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return own, call(own, flat, async_op=True)


def start_all_gather(layout: Layout, rank: int) -> tuple[Tensor, Any]:
    """Start to send the rank's weights to all; returns (flat, handle to wait for)."""
    flat = layout.empty()
    own = layout.part(layout.empty(), rank)
    for piece, place in layout.slots(own, rank):
        place.copy_(piece.of(piece.param))
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return flat, call(flat, own, async_op=True)


def gather_state(optimizer: "ShardedMuonAdamW", model: nn.Module) -> dict[str, Tensor]:
    """Put the state of all ranks together on rank 0, as MuonAdamW.named_state; {} elsewhere.

    A collective. State of no dimension is a count, of one a slice of AdamW's, of two Muon's.
    """
    names = {param: name for name, param in model.named_parameters()}
    world, mine, facts = optimizer.world, {}, {}
    for piece in (p for layout in optimizer.layouts for p in layout.share[world.rank]):
        for key, value in optimizer.state.get(piece.param, {}).items():
            name, value = f"{names[piece.param]}.{key}", torch.as_tensor(value)
            mine[name] = piece, value
            shape = piece.param.shape if value.dim() == 1 else value.shape
            facts[name] = int(value) if value.dim() == 0 else (shape, value.dtype)
    everyone: list[Any] = [None] * world.world_size
    dist.all_gather_object(everyone, facts)
    full = {}
    for name, fact in sorted({k: v for facts in everyone for k, v in facts.items()}.items()):
        if isinstance(fact, int):
            full[name] = torch.tensor(fact)
            continue
        whole = torch.zeros(fact[0], dtype=fact[1], device=world.device)
        if name in mine:
            piece, value = mine[name]
            (piece.of(whole) if value.dim() == 1 else whole).copy_(value)
        dist.reduce(whole, dst=0)  # the others hold zeros there, so the sum is exact
        if world.is_main:
            full[name] = whole.cpu()
    return full if world.is_main else {}


class ShardedMuonAdamW(MuonAdamW):
    """MuonAdamW whose state and work are shared out over the ranks of a world; same results.

    ZeRO, Rajbhandari et al. (2020). With `gradients="averaged"` (stage 1) the caller averages the
    gradients first, as `fit` does; with "local" (stage 2) `step` reduces them itself, each rank
    gets the mean of its own part, and nobody else may average them.
    """

    def __init__(self, param_groups: list[dict[str, Any]], world: Any, gradients: str = "averaged"):
        super().__init__(param_groups)
        if gradients not in ("averaged", "local"):
            raise ValueError(f"gradients is 'averaged' or 'local', not {gradients!r}.")
        self.world, self.gradients = world, gradients
        self.layouts = [Layout(s) for s in share_out(self.param_groups, world.world_size)]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update this rank's pieces and collect everybody's; all ranks call it together."""
        rank, n_ranks = self.world.rank, self.world.world_size
        if n_ranks == 1:
            return super().step()
        local = self.gradients == "local"
        reducing = [
            start_reduce_scatter(layout, rank) if local else None for layout in self.layouts
        ]
        gathering = []
        for group, layout, reduction in zip(self.param_groups, self.layouts, reducing):
            self.update_own(group, layout, reduction)
            gathering.append((layout, *start_all_gather(layout, rank)))
        for layout, flat, work in gathering:
            work.wait()
            for owner in (r for r in range(n_ranks) if r != rank):
                for piece, place in layout.slots(layout.part(flat, owner), owner):
                    piece.of(piece.param).copy_(place)

    def update_own(self, group: dict[str, Any], layout: Layout, reduction: Any) -> None:
        """Update this rank's pieces of one group, with the reduced or the averaged gradients."""
        rank, pieces = self.world.rank, layout.share[self.world.rank]
        if reduction:
            part, work = reduction
            work.wait()
            part.div_(self.world.world_size)
            grads = [place for _, place in layout.slots(part, rank)]
        else:
            pieces = [piece for piece in pieces if piece.param.grad is not None]
            grads = [piece.of(piece.param.grad) for piece in pieces]
        params, states = [p.param for p in pieces], [self.state[p.param] for p in pieces]
        if group["kind"] == "muon" and pieces:
            grads = [grad.view_as(param) for grad, param in zip(grads, params)]
            muon_update(params, grads, states, group)
        elif group["kind"] == "adamw":
            for piece, grad, state in zip(pieces, grads, states):
                adamw_update(piece.of(piece.param), grad, state, group)

    def named_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the full state on rank 0 and {} elsewhere; a collective. See gather_state."""
        return (
            gather_state(self, model) if self.world.world_size > 1 else super().named_state(model)
        )

    def load_named_state(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Keep this rank's part of a full state, of a run with any number of ranks."""
        own = own_state(self, model, tensors) if self.world.world_size > 1 else tensors
        super().load_named_state(model, own)


def own_state(
    optimizer: ShardedMuonAdamW, model: nn.Module, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Cut this rank's part out of a full named state."""
    names, own = {param: name for name, param in model.named_parameters()}, {}
    for group, layout in zip(optimizer.param_groups, optimizer.layouts):
        for piece in layout.share[optimizer.world.rank]:
            own[names[piece.param]] = piece, group["kind"]
    kept = {}
    for name, tensor in tensors.items():
        piece, kind = own.get(name.rsplit(".", 1)[0], (None, None))
        if piece is not None:
            kept[name] = piece.of(tensor) if kind == "adamw" and tensor.dim() else tensor
    return kept


def build_sharded_optimizer(model: GPT, world: Any, **rates: float) -> MuonAdamW:
    """Return `build_optimizer(model, **rates)` of chapter 4, sharded if there are several ranks."""
    return ShardedMuonAdamW(param_groups(model, **rates), world)


def save_together(
    world: Any, directory: str | Path, step: int, model: GPT, optimizer: Any, *args: Any, **kw: Any
) -> None:
    """Call `save_checkpoint` of chapter 5 from all ranks: rank 0 writes, the others send and wait.

    Takes save_checkpoint's further arguments (meta, keep).
    """
    state = optimizer.named_state(model) if optimizer is not None else None
    if world.is_main:
        save_checkpoint(directory, step, model, state, *args, **kw)
    world.barrier()


if __name__ == "__main__":
    main()
