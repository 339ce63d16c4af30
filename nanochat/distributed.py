"""Training in several processes: process group, launcher and sharded optimizer.

Exported from chapters/06_distributed.py (chapter 06, Many processes); edit there, not here.
"""

import argparse
import hashlib
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
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from nanochat.checkpoint import save_checkpoint
from nanochat.common import (
    UserError,
    atomic_write,
    pick_device,
    read_json,
    synchronize,
    usable_cores,
)
from nanochat.model import GPT, GPTConfig
from nanochat.optim import MuonAdamW, adamw_update, muon_update, param_groups
from nanochat.train import SingleProcess, gradient_norm

__all__ = [
    "BUS_FACTORS",
    "Cluster",
    "FullyShardedMuonAdamW",
    "LaunchError",
    "Layout",
    "Piece",
    "ProcessGroup",
    "Reducer",
    "ShardedMuonAdamW",
    "all_gather",
    "available_processes",
    "buckets",
    "build_sharded_optimizer",
    "calibrated",
    "check",
    "code_digest",
    "collective",
    "compare_folders",
    "compare_ranks",
    "exchange",
    "find_failure",
    "gather_model",
    "gather_state",
    "launch",
    "launch_environment",
    "main",
    "mean_over_ranks",
    "measure",
    "own_facts",
    "own_state",
    "print_whole_lines",
    "recut",
    "reduce_scatter",
    "reduction_layouts",
    "refuse_to_repeat",
    "report_errors",
    "save_together",
    "setup",
    "shard_model",
    "share_out",
    "share_rows",
    "start_all_gather",
    "start_reduce_scatter",
    "step_range",
    "step_seconds",
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


def mean_over_ranks(tensors: list[Tensor], dtype: torch.dtype, bucket_bytes: int) -> None:
    """Replace tensors, in place, by their means over the ranks; summed in `dtype`. A collective."""
    started = []
    for bucket in buckets(tensors, bucket_bytes):
        flat = torch.cat([t.reshape(-1).to(dtype) for t in bucket])
        started.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
    for bucket, flat, work in started:
        work.wait()
        parts = flat.div_(dist.get_world_size()).split([t.numel() for t in bucket])
        for tensor, part in zip(bucket, parts):
            tensor.copy_(part.view_as(tensor))


def exchange(store: dist.Store, key: str, rank: int, n_ranks: int, value: Any) -> list[Any]:
    """Write this rank's value under `key` in a job's store; return all ranks' values, in order."""
    store.set(f"{key}/{rank}", json.dumps(value))
    return [json.loads(store.get(f"{key}/{other}")) for other in range(n_ranks)]  # get waits


class ProcessGroup:
    """All ranks of a job, as one of them sees it: the world of a run in many processes.

    Every method is a collective: all ranks must call it, in the same order. Gradients are summed
    in `reduce_dtype`, in buckets of `bucket_bytes`. `store` is the job's dictionary.
    """

    def __init__(
        self,
        device: torch.device,
        reduce_dtype: torch.dtype = torch.float32,
        bucket_bytes: int = 64 << 20,
        store: dist.Store | None = None,
    ):
        self.device, self.reduce_dtype, self.bucket_bytes = device, reduce_dtype, bucket_bytes
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.is_main, self.store, self.rounds = self.rank == 0, store, 0
        self.reducer: Any = None  # of a sharded optimizer, which does the averaging (section 7)

    def average_gradients(self, model: nn.Module) -> None:
        """Replace each gradient by its mean over the ranks; a missing one counts as zero.

        The gradients of a sharded optimizer are only sent on their way, to their owners.
        """
        if self.reducer and next(model.parameters()) in self.reducer.bucket_of:
            return self.reducer.start_rest()
        params = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        for param in params:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        mean_over_ranks([p.grad for p in params], self.reduce_dtype, self.bucket_bytes)

    def gradient_norm(self, model: nn.Module) -> Tensor:
        """Return the length of the averaged gradient, also when its pieces are at their owners."""
        if self.reducer and next(model.parameters()) in self.reducer.bucket_of:
            return self.reducer.norm()
        return gradient_norm(model)

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks, as a new tensor where the old one was."""
        total = value.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(value.device)

    def exchange(self, value: Any) -> list[Any]:
        """Give a small value that JSON can write; return those of all ranks, in order."""
        values = exchange(self.store, f"round {self.rounds}", self.rank, self.world_size, value)
        if self.rounds:  # whoever has written this round has read the one before
            self.store.delete_key(f"round {self.rounds - 1}/{self.rank}")
        self.rounds += 1
        return values

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


def code_digest() -> str:
    """Return a short hash of the package's source: equal where the same code runs."""
    digest = hashlib.sha256()
    for file in sorted(Path(sys.modules["nanochat"].__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def own_facts(device: torch.device) -> dict[str, str]:
    """Return what must be the same on all ranks, and the host, which may differ."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    python = ".".join(map(str, sys.version_info[:2]))
    facts = dict(python=python, torch=torch.__version__, code=code_digest(), device=kind)
    return {**facts, "host": socket.gethostname()}


def compare_ranks(ranks: list[dict[str, str]]) -> None:
    """Raise UserError if ranks differ in more than their host; it names the odd ones."""
    for what in [key for key in ranks[0] if key != "host"]:
        ((usual, n), *others) = Counter(facts[what] for facts in ranks).most_common()
        if others:
            odd = {rank: facts for rank, facts in enumerate(ranks) if facts[what] != usual}
            hosts = ", ".join(sorted({facts["host"] for facts in odd.values()}))
            found = ", ".join(sorted({facts[what] for facts in odd.values()}))
            raise UserError(
                f"rank {', '.join(map(str, odd))} on {hosts} has {what} {found}, and {n} of "
                f"{len(ranks)} ranks have {usual}; make all nodes the same, then start again."
            )


def report_errors() -> None:
    """Let this process print an uncaught exception and write it where torchrun looks for it.

    The report is there whole or not at all: torchrun may kill this process while it writes.
    """
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        try:
            lines = traceback.format_exception(kind, error, trace)
            told = [f"error: {error}\n"] if issubclass(kind, UserError) else lines
            sys.stdout.flush()
            print("".join(told), end="", file=sys.stderr, flush=True)
            details = {"py_callstack": "".join(lines), "timestamp": str(int(time.time()))}
            message = {"message": f"{kind.__name__}: {error}", "extraInfo": details}
            atomic_write(name, json.dumps({"message": message}))
        finally:
            os._exit(1)  # at once: the other ranks may be stuck in a collective with us

    if name:
        sys.excepthook = hook


def print_whole_lines() -> None:
    """Let this process write lines of up to 8,192 bytes at once, also under `python -u`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, write_through=False)


def refuse_to_repeat() -> None:
    """After a restart: raise the UserError that ended the attempt before, if it was one.

    A dead rank is worth another attempt; a mistake of the user's is not mended by one.
    """
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if name and count:
        before = Path(name).parents[2] / f"attempt_{count - 1}"
        for file in sorted(before.glob("*/error.json")):
            message = read_json(file)["message"]["message"]
            if "UserError: " in message:
                raise UserError(message.partition("UserError: ")[2])


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
    seconds for another rank fails. Raises UserError when a rank has no GPU of its own, or when
    the ranks differ in software or kind of device.
    """
    if "RANK" not in os.environ:
        return SingleProcess(pick_device(device))
    print_whole_lines()
    report_errors()
    refuse_to_repeat()
    watch_launcher()
    place, local_rank = pick_device(device), int(os.environ.get("LOCAL_RANK", 0))
    if place.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: this machine has "
                f"{torch.cuda.device_count()}; start at most that many processes on it."
            )
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    limit = timedelta(seconds=timeout)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it outlives a restart
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        store = dist.PrefixStore(f"attempt {attempt}", store)
    compare_ranks(exchange(store, "facts", rank, world_size, own_facts(place)))
    cuda = dict(backend="nccl", device_id=place) if place.type == "cuda" else dict(backend="gloo")
    dist.init_process_group(store=store, rank=rank, world_size=world_size, timeout=limit, **cuda)
    return ProcessGroup(place, store=dist.PrefixStore("nanochat", store))


class LaunchError(RuntimeError):
    """A rank failed. `rank` is its number (None if unknown), `traceback` its own traceback."""

    def __init__(self, message: str, rank: int | None = None, traceback: str = ""):
        super().__init__(f"{message}\n{traceback}".rstrip())
        self.rank, self.traceback = rank, traceback


def available_processes(device: str = "auto") -> int:
    """Return how many ranks this machine can serve: its GPUs, or on the CPU its cores."""
    if pick_device(device).type == "cuda":
        return torch.cuda.device_count()
    return usable_cores()


def launch_environment(nproc: int) -> dict[str, str]:
    """Return the environment of the ranks that `launch` starts."""
    env = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "RANK", "WORLD_SIZE")}
    cores = available_processes("cpu")
    package = Path(sys.modules["nanochat"].__file__).parents[1]  # import the same nanochat there
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package), env.get("PYTHONPATH", "")]))
    env.update(OMP_NUM_THREADS=str(max(1, cores // nproc)), PYTHONUNBUFFERED="1")
    env.update(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")  # a fresh store after each restart
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
    restarts: int = 0,
) -> None:
    """Run `python -m module args` in `nproc` ranks on this machine and wait for them.

    `module` may also be the path of a .py file. Each line that a rank prints goes to `on_line`
    (default: print), with "[rank 1] " before those of ranks other than 0. `env` is added to the
    environment. When a rank fails, all are started again, up to `restarts` times; then LaunchError
    is raised. An interrupt stops all ranks and is raised again. The module should call `setup()`
    first, and go on from its last checkpoint.
    """
    on_line = on_line or (lambda line: print(line, flush=True))
    target = [module] if module.endswith(".py") else ["-m", module]
    own_session = dict(start_new_session=True) if os.name == "posix" else dict(creationflags=0x200)
    with tempfile.TemporaryDirectory(prefix="nanochat-launch-") as logs:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={nproc}", f"--max-restarts={restarts}"]
        command += ["--log-dir", logs, "--tee", "3", *target, *args]
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
    pattern = r"rank\s*: (\d+) \(local_rank.*?\n\s*exitcode\s*: (-?\d+) \(pid: (\d+)"
    ends = [tuple(map(int, found)) for found in re.findall(pattern, summary)]
    slow = {int(pid) for pid in re.findall(r"Unable to shutdown process (\d+)", summary)}
    fatal = (-4, -7, -9, -11)  # of ranks that torchrun did not kill itself
    killed = [(rank, -end) for rank, end, pid in ends if end in fatal and pid not in slow]
    if killed:
        rank, number = killed[0]
        name = signal.Signals(number).name
        hint = "; SIGKILL often means that memory ran out" if name == "SIGKILL" else ""
        return LaunchError(f"rank {rank} was killed by {name}{hint}.", rank)
    attempts = sorted(logs.glob("*/attempt_*"), key=lambda f: int(f.name.removeprefix("attempt_")))
    last = attempts[-1] if attempts else logs
    reports = sorted(last.glob("*/error.json"), key=lambda f: f.stat().st_mtime_ns)
    if reports:
        message = read_json(reports[0])["message"]
        rank, trace = int(reports[0].parent.name), message["extraInfo"]["py_callstack"]
        return LaunchError(f"rank {rank} failed: {message['message']}", rank, trace)
    failed = {rank for rank, end, _ in ends if end > 0}  # by themselves; torchrun ended the others
    ranks = sorted(int(file.parent.name) for file in last.glob("*/stderr.log"))
    for rank in sorted(ranks, key=lambda rank: rank not in failed):
        file = last / str(rank) / "stderr.log"
        text = file.read_text(encoding="utf-8", errors="replace").strip()
        if text:
            tail = "\n".join(text.splitlines()[-30:])
            return LaunchError(f"rank {rank} failed: {tail.splitlines()[-1]}", rank, tail)
    tail = "\n".join(summary.splitlines()[-20:])
    return LaunchError(f"the launcher ended with code {code} before a rank said why.", None, tail)


# The collectives on flat tensors; newer versions of PyTorch have other names for them.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def collective(name: str, flat: Tensor, n: int) -> Callable[[], Any]:
    """Return a call that runs one collective over a flat tensor whose length divides by n."""
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


def compare_folders(world: Any, folder: str) -> None:
    """Raise UserError unless all ranks see the same folder; it is made if it is not there."""
    mark = Path(folder) / f".seen-{os.getpid()}"
    if world.is_main:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    if world.world_size > 1:
        mark = Path(world.exchange(str(mark))[0])  # also waits until rank 0 has written it
    blind = int(world.sum(torch.tensor(int(not mark.exists()))))
    if world.is_main:
        mark.unlink()
    if blind:
        raise UserError(
            f"{blind} of {world.world_size} ranks do not see {folder} of rank 0; put it on a file "
            f"system that all nodes share (NANOCHAT_RUNS says where runs are)."
        )


def check(
    world: Any, sizes: list[int], at_least: float = 0.0, folder: str = ""
) -> Iterator[dict[str, Any]]:
    """Yield what a job should know before it starts: each rank's facts, a sum, and speeds.

    Raises UserError when a sum is wrong, when not all ranks see `folder`, or when the largest
    all-reduce moves fewer than `at_least` GB/s of bus bandwidth.
    """
    here = dict(what="rank", rank=world.rank, threads=torch.get_num_threads())
    here.update(own_facts(world.device))
    yield from world.exchange(here) if world.world_size > 1 else [here]
    total = int(world.sum(torch.tensor(world.rank + 1)))
    if total != world.world_size * (world.world_size + 1) // 2:
        raise UserError(f"the ranks 1 to {world.world_size} add up to {total}; the wire is broken.")
    if folder:
        compare_folders(world, folder)
    speed = 0.0
    for line in measure(world, sizes):
        yield line
        speed = line["gb_per_s"] if line["what"] == "all_reduce" else speed
    if world.world_size > 1 and speed < at_least:
        raise UserError(
            f"the all-reduce of {max(sizes):,} bytes reached {speed:.3g} GB/s and you asked for "
            f"{at_least:g}; look for a wrong network card (NCCL_DEBUG=INFO names it)."
        )


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
    parser.add_argument("--at-least", type=float, default=0.0, help="GB/s, or it is an error")
    parser.add_argument("--folder", default="", help="a folder that all ranks must see")
    options = parser.parse_args(argv)
    world = setup(options.device)
    for line in check(world, sorted(options.sizes), options.at_least, options.folder):
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
    """Where pieces lie in a flat tensor of n_ranks equal parts; `share[rank]` are a rank's."""

    def __init__(self, share: list[list[Piece]], dtype: torch.dtype | None = None):
        self.share = share
        self.width = max(sum(p.stop - p.start for p in pieces) for pieces in share)
        self.params = list(dict.fromkeys(piece.param for pieces in share for piece in pieces))
        self.dtype, self.device = dtype or self.params[0].dtype, self.params[0].device

    def empty(self) -> Tensor:
        """Return a new flat tensor (n_ranks * width,), not filled yet."""
        return torch.empty(len(self.share) * self.width, dtype=self.dtype, device=self.device)

    def part(self, flat: Tensor, rank: int) -> Tensor:
        """Return the part of one rank, (width,), a view."""
        return flat[rank * self.width : (rank + 1) * self.width]

    def slots(self, part: Tensor, rank: int) -> Iterator[tuple[Piece, Tensor]]:
        """Yield each piece of a rank with its place in the rank's part, a view."""
        at = 0
        for piece in self.share[rank]:
            yield piece, part[at : at + piece.stop - piece.start]
            at += piece.stop - piece.start


def start_reduce_scatter(layout: Layout) -> tuple[Tensor, Any]:
    """Start to sum gradients, which are freed; returns (the rank's own part, handle to wait for).

    A gradient that is missing counts as zero.
    """
    flat = layout.empty().zero_()
    for owner in range(len(layout.share)):
        for piece, place in layout.slots(layout.part(flat, owner), owner):
            if piece.param.grad is not None:
                place.copy_(piece.of(piece.param.grad))
    for param in layout.params:
        param.grad = None
    own = torch.empty(layout.width, dtype=flat.dtype, device=flat.device)
    return own, reduce_scatter(own, flat, async_op=True)


def start_all_gather(layout: Layout, rank: int) -> tuple[Tensor, Any]:
    """Start to send the rank's weights to all; returns (flat, handle to wait for)."""
    flat = layout.empty()
    own = torch.empty_like(layout.part(flat, rank))
    for piece, place in layout.slots(own, rank):
        place.copy_(piece.of(piece.param))
    return flat, all_gather(flat, own, async_op=True)


def reduction_layouts(
    groups: list[dict[str, Any]], shares: list[list[list[Piece]]], world: ProcessGroup
) -> list[Layout]:
    """Return the buckets in which gradients are reduced: small tensors together, last layers first.

    `shares` is what `share_out` gave. A bucket has at most `world.bucket_bytes`, or one tensor, or
    one matrix for each rank; of matrices as many for each rank as fit.
    """
    pieces = [[p for share in shares for p in share[rank]] for rank in range(world.world_size)]
    small_first = sorted(
        (p for g in groups if g["kind"] == "adamw" for p in g["params"]), key=Tensor.numel
    )
    cuts = list(buckets(small_first, world.bucket_bytes))
    for params in (g["params"][::-1] for g in groups if g["kind"] == "muon"):
        each = world.world_size * params[0].nbytes  # a matrix for each rank
        cuts += buckets(params, max(1, world.bucket_bytes // each) * each)
    layouts = []
    for cut in map(set, cuts):
        share = [[piece for piece in own if piece.param in cut] for own in pieces]
        layouts.append(Layout(share, world.reduce_dtype))
    return layouts


class Reducer:
    """Averages gradients over the ranks, each piece at its owner, one reduce-scatter a bucket.

    After `watch` a bucket starts from inside the backward pass; without it all start in
    `start_rest`. What `take` returns is valid until the next backward pass.
    """

    def __init__(self, layouts: list[Layout], world: ProcessGroup):
        self.layouts, self.world, self.passes = layouts, world, 0
        self.order: list[int] = []  # of the buckets; agreed on in the first step
        self.bucket_of = {param: i for i, each in enumerate(layouts) for param in each.params}
        self.hooks: list[Any] = []
        self.reset()

    def reset(self) -> None:
        """Forget the step that is over."""
        self.missing = [self.passes * len(layout.params) for layout in self.layouts]
        self.full: list[int] = []
        self.started: dict[int, tuple[Tensor, Any]] = {}

    def watch(self, passes: int) -> None:
        """From now on start each bucket in the last of a step's `passes` backward passes."""
        self.passes, self.order = passes, []
        self.reset()
        hook = Tensor.register_post_accumulate_grad_hook
        self.hooks = self.hooks or [hook(param, self.count) for param in self.bucket_of]

    def count(self, param: Tensor) -> None:
        """Note that a gradient has been finished once more; start what is full and next in line."""
        bucket = self.bucket_of[param]
        self.missing[bucket] -= 1
        if self.missing[bucket] == 0:
            self.full.append(bucket)
        for following in self.order[len(self.started) :]:
            if following not in self.full:
                break
            self.start(following)

    def start(self, bucket: int) -> None:
        """Put a bucket on the wire."""
        self.started[bucket] = start_reduce_scatter(self.layouts[bucket])

    def start_rest(self) -> None:
        """Put all buckets on the wire that are not there yet; all ranks call it together."""
        if not self.order:
            rest = [i for i in range(len(self.layouts)) if i not in self.full]
            self.order = self.world.exchange(self.full + rest)[0]
        for bucket in self.order[len(self.started) :]:
            self.start(bucket)

    def norm(self) -> Tensor:
        """Wait for all averaged gradients; return their length over all ranks. A collective."""
        for _, work in self.started.values():
            work.wait()
        parts = [part.float() for part, _ in self.started.values()]
        mine = torch.nn.utils.get_total_norm(parts)
        return self.world.sum(mine.square()).sqrt() / self.world.world_size

    def take(self, params: list[Tensor]) -> dict[Tensor, Tensor]:
        """Wait for averaged gradients and return them: {param: this rank's piece, flat}."""
        found = {}
        for bucket in dict.fromkeys(self.bucket_of[param] for param in params):
            layout, (part, work) = self.layouts[bucket], self.started[bucket]
            work.wait()
            for piece, place in layout.slots(part, self.world.rank):
                found[piece.param] = place.to(piece.param.dtype) / self.world.world_size
        return {param: found[param] for param in params if param in found}


class ShardedMuonAdamW(MuonAdamW):
    """MuonAdamW whose state, update and averaged gradients are shared out over a world's ranks.

    `world.average_gradients` then sends gradients straight to the rank that owns them; after
    `overlap`, while the backward pass still runs. ZeRO stage 2, Rajbhandari et al. (2020).
    """

    def __init__(self, param_groups: list[dict[str, Any]], world: Any):
        super().__init__(param_groups)
        self.world = world
        self.shares = share_out(self.param_groups, world.world_size)
        if world.world_size > 1:
            self.layouts = [Layout(share) for share in self.shares]
            reductions = reduction_layouts(self.param_groups, self.shares, world)
            world.reducer = self.reducer = Reducer(reductions, world)

    def overlap(self, passes: int = 1) -> None:
        """Send gradients while they are computed, in the last of a step's `passes` passes."""
        if self.world.world_size > 1:
            self.reducer.watch(passes)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update this rank's pieces and collect everybody's; all ranks call it together."""
        rank, n_ranks = self.world.rank, self.world.world_size
        if n_ranks == 1:
            return super().step()
        self.reducer.start_rest()
        gathering = []
        for group, layout in zip(self.param_groups, self.layouts):
            self.update_own(group, layout.share[rank])
            gathering.append((layout, *start_all_gather(layout, rank)))
        for layout, flat, work in gathering:
            work.wait()
            for owner in (r for r in range(n_ranks) if r != rank):
                for piece, place in layout.slots(layout.part(flat, owner), owner):
                    piece.of(piece.param).copy_(place)
        self.reducer.reset()

    def update_own(self, group: dict[str, Any], pieces: list[Piece]) -> None:
        """Update this rank's pieces of one group."""
        grads = self.reducer.take(group["params"])
        params, states = [p.param for p in pieces], [self.state[p.param] for p in pieces]
        if group["kind"] == "muon" and pieces:
            muon_update(params, [grads[p].view_as(p) for p in params], states, group)
        elif group["kind"] == "adamw":
            for piece, state in zip(pieces, states):
                adamw_update(piece.of(piece.param), grads[piece.param], state, group)

    def named_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the full state on rank 0 and {} elsewhere; a collective. See gather_state."""
        if self.world.world_size == 1:
            return super().named_state(model)
        return gather_state(self, model)

    def load_named_state(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Keep this rank's part of a full state, of a run with any number of ranks."""
        own = own_state(self, model, tensors) if self.world.world_size > 1 else tensors
        super().load_named_state(model, own)


def gather_state(optimizer: ShardedMuonAdamW, model: nn.Module) -> dict[str, Tensor]:
    """Put the state of all ranks together on rank 0, as MuonAdamW.named_state; {} elsewhere.

    A collective. State of no dimension is a count, of one a slice of AdamW's, of two Muon's.
    """
    names = {param: name for name, param in model.named_parameters()}
    world, mine, facts = optimizer.world, {}, {}
    for piece in (p for share in optimizer.shares for p in share[world.rank]):
        for key, value in optimizer.state.get(piece.param, {}).items():
            name, value = f"{names[piece.param]}.{key}", torch.as_tensor(value)
            mine[name] = piece, value
            shape = piece.param.shape if value.dim() == 1 else value.shape
            dtype = str(value.dtype).removeprefix("torch.")
            facts[name] = int(value) if value.dim() == 0 else (list(shape), dtype)
    everyone = {name: fact for facts in world.exchange(facts) for name, fact in facts.items()}
    full = {}
    for name, fact in sorted(everyone.items()):
        if isinstance(fact, int):
            full[name] = torch.tensor(fact)
            continue
        whole = torch.zeros(fact[0], dtype=getattr(torch, fact[1]), device=world.device)
        if name in mine:
            piece, value = mine[name]
            (piece.of(whole) if value.dim() == 1 else whole).copy_(value)
        dist.reduce(whole, dst=0)  # the others hold zeros there, so the sum is exact
        if world.is_main:
            full[name] = whole.cpu()
    return full if world.is_main else {}


def own_state(
    optimizer: ShardedMuonAdamW, model: nn.Module, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Cut this rank's part out of a full named state."""
    names, own = {param: name for name, param in model.named_parameters()}, {}
    for group, share in zip(optimizer.param_groups, optimizer.shares):
        for piece in share[optimizer.world.rank]:
            own[names[piece.param]] = piece, group["kind"]
    kept = {}
    for name, tensor in tensors.items():
        piece, kind = own.get(name.rsplit(".", 1)[0], (None, None))
        if piece is not None:
            kept[name] = piece.of(tensor) if kind == "adamw" and tensor.dim() else tensor
    return kept


def build_sharded_optimizer(model: GPT, world: Any, *args: Any, **settings: Any) -> MuonAdamW:
    """Return chapter 4's `build_optimizer` with the same settings, shared as the model asks for.

    Over one process it is that one; over several, ShardedMuonAdamW, and for a model that
    `shard_model` has cut, FullyShardedMuonAdamW.
    """
    groups = param_groups(model, *args, **settings)
    cut = isinstance(model.head.weight, DTensor)
    return (FullyShardedMuonAdamW if cut else ShardedMuonAdamW)(groups, world)


def save_together(
    world: Any, directory: str | Path, step: int, model: GPT, optimizer: Any, *args: Any, **kw: Any
) -> None:
    """Call `save_checkpoint` of chapter 5 from all ranks: rank 0 writes, the others send and wait.

    Takes save_checkpoint's further arguments (meta, keep).
    """
    state = optimizer.named_state(model) if optimizer is not None else None
    whole = gather_model(model)
    if world.is_main:
        save_checkpoint(directory, step, whole, state, *args, **kw)
    world.barrier()


def shard_model(model: GPT, world: ProcessGroup, recompute: bool = False) -> None:
    """Cut a model's parameters and gradients over the ranks, in place (FSDP2, ZeRO stage 3).

    Each rank keeps a range of rows of every parameter on `world.device`, as a DTensor. Blocks are
    gathered in the model's compute_dtype; gradients are averaged in `world.reduce_dtype`. All
    ranks then call the model together. `recompute` frees the activations inside of blocks.
    """
    mesh = init_device_mesh(world.device.type, (world.world_size,))
    half = model.compute_dtype if model.compute_dtype != torch.float32 else None
    for block in model.blocks:
        if recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        policy = MixedPrecisionPolicy(half, world.reduce_dtype, cast_forward_inputs=False)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    policy = MixedPrecisionPolicy(reduce_dtype=world.reduce_dtype)  # tables stay in float32
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def gather_model(model: GPT) -> Any:
    """Return what `save_checkpoint` needs of a model: its config, and on rank 0 all its weights.

    A collective if `shard_model` has cut the model; otherwise it returns the model itself.
    """
    if not isinstance(model.head.weight, DTensor):
        return model
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    return SimpleNamespace(config=model.config, state_dict=lambda: weights)


def recut(rows: Tensor, like: Tensor, n: int, start: int, end: int) -> Tensor:
    """Exchange a rank's part of (n, *like.shape), cut along `start`, for its part along `end`."""
    shape = torch.empty((n, *like.shape), device="meta")
    cut = DTensor.from_local(
        rows, like.device_mesh, [Shard(start)], shape=shape.shape, stride=shape.stride()
    )
    return cut.redistribute(placements=[Shard(end)]).to_local()


def share_rows(groups: list[dict[str, Any]], n_ranks: int) -> list[list[list[Piece]]]:
    """Share parameters out as `fully_shard` and `recut` cut them; [group][rank] -> pieces.

    AdamW's tensors are cut by rows, as many on each rank (the last has fewer, or none). Muon's
    matrices stay whole and go to the ranks in order, as many to each.
    """
    shares = []
    for group in groups:
        params, share = group["params"], [[] for _ in range(n_ranks)]
        many = -(-len(params) // n_ranks)  # matrices a rank, and below rows a rank, rounded up
        for i, param in enumerate(params):
            if group["kind"] == "muon":
                share[i // many].append(Piece(param, 0, param.numel()))
                continue
            height = param.shape[0]
            row, rows = param.numel() // height, -(-height // n_ranks)
            for rank in range(-(-height // rows)):
                stop = min((rank + 1) * rows, height)
                share[rank].append(Piece(param, rank * rows * row, stop * row))
        shares.append(share)
    return shares


class FullyShardedMuonAdamW(ShardedMuonAdamW):
    """MuonAdamW for a model that `shard_model` has cut: it keeps state for what a rank owns.

    AdamW updates the rows that a rank stores. Muon's matrices are put together, each on one rank,
    updated there, and cut again.
    """

    def __init__(self, param_groups: list[dict[str, Any]], world: Any):
        MuonAdamW.__init__(self, param_groups)
        self.world, self.shares = world, share_rows(self.param_groups, world.world_size)

    def overlap(self, passes: int = 1) -> None:
        """Do nothing: FSDP sends gradients while the backward pass runs, in every pass."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update everything that has a gradient; all ranks call it together."""
        for group, share in zip(self.param_groups, self.shares):
            pieces = share[self.world.rank]
            if group["kind"] == "muon":
                self.update_matrices(group, [self.state[p.param] for p in pieces])
                continue
            for param in (piece.param for piece in pieces):
                rows, grad = param.to_local().view(-1), param.grad.to_local().view(-1)
                adamw_update(rows, grad, self.state[param], group)

    def update_matrices(self, group: dict[str, Any], states: list[dict[str, Any]]) -> None:
        """Update the matrices of one Muon group; `states` are those of this rank's."""
        params, k = group["params"], len(group["params"])
        rows = torch.stack([param.to_local() for param in params])  # (k, m / n_ranks, n)
        grads = torch.stack([param.grad.to_local() for param in params])
        whole, grads = (recut(t, params[0], k, 1, 0) for t in (rows, grads))  # (k / n_ranks, m, n)
        if states:
            muon_update(list(whole), list(grads), states, group)
        for param, new in zip(params, recut(whole, params[0], k, 0, 1)):
            param.to_local().copy_(new)


class Cluster(NamedTuple):
    """What a prediction assumes: FLOPs a second of one GPU, bus bandwidths in bytes a second."""

    flops: float  # that a GPU reaches in this training, not its peak
    node_wire: float  # between the GPUs of one node
    net_wire: float  # between nodes, all network cards of a node together
    gpus_a_node: int = 8


def step_seconds(
    config: GPTConfig, n_ranks: int, batch_tokens: int, cluster: Cluster
) -> dict[str, float]:
    """Predict the seconds of one step's parts, sharded as by ShardedMuonAdamW, none overlapped.

    "compute" is forward and backward, "muon" the orthogonalising of this rank's matrices, "reduce"
    and "gather" the exchange of 4 bytes a parameter. Latency, stragglers, data and AdamW's memory
    traffic count as nothing; batch_tokens is the global batch.
    """
    with torch.device("meta"):
        model = GPT(config)
    muon = 0  # five steps of x xT, its square, and their product with x (chapter 4)
    for param in model.blocks.parameters():
        m, n = sorted(param.shape)
        muon += 5 * (4 * m * m * n + 2 * m**3)
    wire = cluster.node_wire
    if n_ranks > cluster.gpus_a_node:
        wire = min(wire, cluster.net_wire)
    moved = 4 * model.num_params()["total"] * (n_ranks - 1) / n_ranks / wire
    compute = model.flops_per_token() * batch_tokens / (n_ranks * cluster.flops)
    return dict(compute=compute, muon=muon / (n_ranks * cluster.flops), reduce=moved, gather=moved)


def step_range(parts: dict[str, float]) -> tuple[float, float]:
    """Return the seconds of a step whose exchange is hidden where it can be, and not at all.

    The reduction hides behind the backward pass (two thirds of computing), the gather behind Muon.
    """
    late = max(0.0, parts["reduce"] - parts["compute"] * 2 / 3)
    best = parts["compute"] + late + max(parts["muon"], parts["gather"])
    return best, sum(parts.values())


def calibrated(
    config: GPTConfig, batch_tokens: int, seconds: float, node_wire: float, net_wire: float = 1.0
) -> Cluster:
    """Return a Cluster one GPU of which makes a step of batch_tokens in the seconds given."""
    flops = sum(step_seconds(config, 1, batch_tokens, Cluster(1.0, 1.0, 1.0)).values())
    return Cluster(flops / seconds, node_wire, net_wire)


if __name__ == "__main__":
    main()
