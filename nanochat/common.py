"""Shared helpers: errors, devices, progress, metrics, safe files and figures.

Exported from chapters/00_start_here.py (chapter 00, Start here); edit there, not here.
"""

import contextlib
import ctypes
import html
import importlib.util
import json
import os
import random
import secrets
import shutil
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

__all__ = [
    "COLORS",
    "MetricsLog",
    "NEEDED",
    "Progress",
    "UserError",
    "atomic_write",
    "doctor",
    "figure",
    "format_seconds",
    "in_live_notebook",
    "keep_freed_memory",
    "pick_device",
    "pick_dtype",
    "read_json",
    "read_metrics",
    "seed_everything",
    "show_bar",
    "synchronize",
    "usable_cores",
    "write_json",
]


class UserError(Exception):
    """A mistake a user can mend: one sentence with what is wrong, what was found, what to do.

    The command line prints the sentence without a traceback and exits with code 2 (appendix A4).
    """


def pick_device(name: str = "auto") -> torch.device:
    """Return the device to compute on; "auto" takes CUDA, then the CPU (MPS only by name).

    Raises UserError when the named device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    kind, colon, index = name.partition(":")
    if not available.get(kind, False) or (colon and not index.isdecimal()):
        found = ", ".join(kind for kind, there in available.items() if there)
        raise UserError(f"device {name!r} is not available; found {found}; choose one of these.")
    return torch.device(name)


def pick_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device multiplies it in hardware, float32 elsewhere.

    In hardware means CUDA with compute capability 8.0 or more, or a CPU with AVX-512 BF16 or AMX.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    if device.type == "cpu" and has_bfloat16():
        return torch.bfloat16
    return torch.float32


def usable_cores() -> int:
    """Return how many processor cores this process may use; at least 1."""
    if hasattr(os, "sched_getaffinity"):  # Linux knows what was lent to us, others what there is
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for its next tensors; True if that worked.

    glibc, the C library of most Linux systems, returns large blocks to the system at once, and the
    next tensor of that size is given fresh pages, each filled with zeros first. Elsewhere nothing
    is changed. The process stays as large as it once was.
    """
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return False
    trim_threshold, mmap_threshold = -1, -3  # of mallopt(3), in bytes
    return bool(
        library.mallopt(mmap_threshold, 2**30) and library.mallopt(trim_threshold, 2**31 - 1)
    )


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work (a no-op on the CPU)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators with one number."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


NEEDED = ("datasets", "ipywidgets", "matplotlib", "pyarrow", "regex", "safetensors", "tiktoken")


def doctor() -> list[tuple[str, str, bool, str]]:
    """Look at this machine; return (name, found, ok, fix) for each thing that a run needs.

    `fix` says what to do when `ok` is False. Nothing is changed and no network is used.
    """
    python, memory = sys.version_info[:3], psutil.virtual_memory().total / 2**30
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    device, disk = pick_device(), shutil.disk_usage(Path.cwd()).free / 2**30
    kind = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU: small runs only"
    )
    dtype = str(pick_dtype(device)).removeprefix("torch.")
    install = "run `make env`, or `pip install -e .` in the folder of the book"
    return [
        ("python", ".".join(map(str, python)), (3, 10) <= python[:2] <= (3, 13),
         "install Python 3.10 to 3.13 and make the environment again"),
        ("torch", torch.__version__, release >= (2, 9), install),
        ("packages", f"missing {', '.join(missing)}" if missing else f"{len(NEEDED)} found",
         not missing, install),
        ("device", f"{device.type} ({kind}), computes in {dtype}", True, ""),
        ("cores", f"{usable_cores()}, torch uses {torch.get_num_threads()}", True, ""),
        ("memory", f"{memory:.0f} GiB", memory > 3.5, "close other programs; a run wants 4 GiB"),
        ("disk", f"{disk:,.0f} GiB free", disk > 2,
         "free some space; a small run wants 2 GiB"),
    ]  # fmt: skip


def _why(error: Exception) -> str:
    """What an OSError says; Python's ValueErrors here are all about the name."""
    return getattr(error, "strerror", None) or "no file can have this name"


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file so that a crash leaves the old content or the new one, never half of it.

    The data goes to a temporary name in the same folder, is synced to disk and renamed. Text is
    written in UTF-8, half a character (of a surrogate pair) as the escape that JSON has for it. A
    full disk, a folder that cannot be made, or a name that no file can have raises UserError and
    leaves nothing behind.
    """
    path, temporary = Path(path), None
    payload = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    try:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        if temporary is not None:
            with contextlib.suppress(OSError, ValueError):
                temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path} ({len(payload):,} bytes): {_why(error)}; free some space or "
            f"choose another name or folder, then run again."
        ) from error


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically; UserError as in `atomic_write`."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or broken one, or a folder, raises UserError with its name."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path or run the stage before.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {_why(error)}; check the path.") from None
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it and run again.") from None


class MetricsLog:
    """Append-only log of a run: one JSON object a line, read by every plot and report.

    `static` fields (stage, seed) are added to each line. `path=None` keeps nothing.
    """

    def __init__(self, path: str | Path | None, **static: Any):
        self.path = Path(path) if path is not None else None
        self.static = static
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def bind(self, **static: Any) -> "MetricsLog":
        """Return a log to the same file with more static fields."""
        return MetricsLog(self.path, **{**self.static, **static})

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; a line that a killed process left torn is ended first."""
        if self.path is None:
            return
        line = json.dumps({"event": event, **self.static, **fields}, ensure_ascii=False) + "\n"
        with open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode("utf-8"))


def read_metrics(path: str | Path, event: str | None = None, **where: Any) -> list[dict]:
    """Read the events of a log in order; keep one kind of event and matching fields.

    A torn last line, left by a process that was killed while it wrote, is skipped.
    """
    path, events = Path(path), []
    if not path.exists():
        return events
    for line in path.read_bytes().split(b"\n"):
        try:
            entry = json.loads(line)
        except ValueError:  # not JSON, or torn in the middle of a character
            continue
        if event in (None, entry.get("event")) and all(entry.get(k) == v for k, v in where.items()):
            events.append(entry)
    return events


def format_seconds(seconds: float) -> str:
    """Write a duration as people say it: 8s, 3m 05s, 2h 10m."""
    seconds = int(round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m {seconds % 60:02d}s"
    return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"


def in_live_notebook() -> bool:
    """Return True in a notebook with a person in front of it, not under papermill or a pipe."""
    front_ends = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")
    return "ipykernel" in sys.modules and any(name in os.environ for name in front_ends)


def show_bar(handle: Any, done: int, total: int, line: str) -> Any:
    """Draw a bar and a line in a live notebook, in the place of `handle`; return the handle."""
    from IPython.display import HTML, display

    bar = f'<progress value="{done}" max="{total}"></progress> '
    page = HTML(bar + html.escape(line))
    if handle is None:
        return display(page, display_id=True)
    handle.update(page)
    return handle


class Progress:
    """A progress line with the time left: `with Progress(300, "pretrain") as bar: bar.update()`.

    It is a live bar in a running notebook, one rewritten line in a terminal, and a few plain
    lines (one each tenth, at most every `quiet` seconds) in papermill, pipes and CI.
    """

    def __init__(self, total: int, label: str, unit: str = "step", quiet: float = 10.0):
        self.total, self.label, self.unit, self.quiet = max(total, 1), label, unit, quiet
        self.done, self.fields, self.handle = 0, {}, None
        self.first = self.done
        self.start = self.shown = time.perf_counter()
        self.mode = "live" if in_live_notebook() else "tty" if sys.stdout.isatty() else "plain"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.done > self.first and exc_info[0] is None:
            self.show(last=True)
        if self.mode == "tty":
            print()

    def skip(self, n: int) -> None:
        """Count n units as done before this run began (a resumed run); they cost no time."""
        self.done = self.first = n

    def update(self, n: int = 1, **fields: Any) -> None:
        """Advance by n units and show `fields`, such as `loss=2.31`, now and then."""
        tenth = self.total / 10
        crossed = (self.done + n) // tenth > self.done // tenth
        self.done += n
        self.fields = fields or self.fields
        waited, plain = time.perf_counter() - self.shown, self.mode == "plain"
        due = waited > (self.quiet / 4 if crossed else self.quiet) if plain else waited > 0.2
        if due and self.done < self.total:  # __exit__ shows the last line
            self.show()

    def text(self, last: bool = False) -> str:
        """Return the line as shown: label, count, fields, time spent or left."""
        spent = time.perf_counter() - self.start
        left = spent / max(self.done - self.first, 1) * (self.total - self.done)
        clock = f"{format_seconds(spent)} in all" if last else f"{format_seconds(left)} left"
        head = f"{self.label} {self.done:,}/{self.total:,} {self.unit}s"
        values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in self.fields.items()}
        return " | ".join([head, *(f"{k} {v}" for k, v in values.items()), clock])

    def show(self, last: bool = False) -> None:
        """Show the line in the way that fits the place."""
        self.shown = time.perf_counter()
        line = self.text(last)
        if self.mode == "tty":
            print("\r" + line.ljust(100)[:160], end="", flush=True)
        elif self.mode == "plain":
            print(line, flush=True)
        else:
            self.handle = show_bar(self.handle, self.done, self.total, line)


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")


def figure(
    title: str,
    xlabel: str = "",
    ylabel: str = "",
    size: tuple[float, float] = (5, 3),
    alt: str = "",
) -> tuple[Any, Any]:
    """Return (fig, ax) in the book's style: small, quiet, colour-blind-safe, title = the finding.

    `size` is in inches. `alt` describes the picture in words; it is kept as the figure's label,
    and printed notebooks have it as alt text. A long title takes several lines. Colours after Okabe
    and Ito (2008).
    """
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=size, dpi=110, layout="constrained")
    ax.set_prop_cycle(color=COLORS)
    ax.set_title(textwrap.fill(title, int(13 * size[0] - 9)), fontsize=10, loc="left")
    ax.set_xlabel(xlabel, fontsize=9)
    ax.set_ylabel(ylabel, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)
    fig.set_label(alt or title)
    return fig, ax
