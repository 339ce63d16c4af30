"""Students' answers run in processes of their own; only data goes in and only data comes out.

The grader keeps checks and expected values to itself. A `Nursery` starts a process for each answer
and an `Answer` speaks to it: it is called like the function it stands for. Whatever code in there
prints, patches, deletes or returns, all the grader ever sees is None, numbers, text, lists, tuples,
dicts, sets, tensors and dtypes, or an error. Nothing is pickled.
"""

import builtins
import contextlib
import importlib
import inspect
import json
import os
import random
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import psutil
import torch

import nanochat
from nanochat.common import UserError
from nanochat.sandbox import environment, kill_tree, protect

ROOT = Path(__file__).resolve().parents[1]
CALL_SECONDS, EXERCISE_SECONDS = 10.0, 30.0
TEXT_LIMIT, BLOB_LIMIT = 8 * 2**20, 32 * 2**20  # bytes of one message: its JSON, its tensors
MEMORY_MB = 2048  # what an answer may take beyond what Python and torch have taken
FORKS = sys.platform == "linux"  # elsewhere a fork of a process that has loaded torch may crash


class Elsewhere(str):
    """A text as another process has it: equal, with another hash. It may be sent to an answer."""

    def __hash__(self) -> int:
        return ~str.__hash__(self)


def pack(message: tuple, functions: list | None = None) -> bytes:
    """A message as bytes. Functions in it are added to `functions`, their number is sent."""
    blobs, size = [], 0

    def put(data: bytes) -> list[int]:
        nonlocal size
        blobs.append(data)
        size += len(data)
        return [size - len(data), size]

    def tree(x: Any) -> Any:
        if x is None or isinstance(x, bool):
            return x
        if isinstance(x, Elsewhere):
            return {"elsewhere": str(x)}
        for kind in (int, float, str):
            if isinstance(x, kind):
                return kind(x)
        if isinstance(x, list):
            return [tree(y) for y in x]
        if isinstance(x, (tuple, set, frozenset)):
            return {"tuple" if isinstance(x, tuple) else "set": [tree(y) for y in x]}
        if isinstance(x, dict):
            return {"dict": [[tree(k), tree(v)] for k, v in x.items()]}
        if isinstance(x, bytes):
            return {"bytes": put(x)}
        if isinstance(x, torch.dtype):
            return {"dtype": str(x).split(".")[1]}
        if isinstance(x, torch.Tensor):
            flat = x.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            place = put(flat.view(torch.uint8).numpy().tobytes())
            return {"tensor": [str(x.dtype).split(".")[1], list(x.shape), *place]}
        if callable(x) and functions is not None:
            functions.append(x)
            return {"function": len(functions) - 1}
        wanted = "plain data (numbers, text, lists, tuples, dicts, sets, tensors)"
        raise TypeError(f"an answer takes and returns {wanted}, not {type(x).__name__}")

    text = json.dumps(tree(message)).encode()
    if len(text) > TEXT_LIMIT or size > BLOB_LIMIT:
        raise ValueError(f"{(len(text) + size) / 2**20:.0f} MB is too much for an answer")
    return b"".join([struct.pack(">II", len(text), size), text, *blobs])


def unpack(data: bytes, function: Any = None) -> tuple:
    """The message; `function(number)` makes what stands in for a function of the other side."""
    size = 8 + struct.unpack(">II", data[:8])[0]
    text, blob = data[8:size], data[size:]

    def value(x: Any) -> Any:
        if isinstance(x, list):
            return [value(y) for y in x]
        if not isinstance(x, dict):
            return x
        ((kind, content),) = x.items()
        if kind in ("tuple", "set"):
            return (tuple if kind == "tuple" else set)(value(y) for y in content)
        if kind == "dict":
            return {value(k): value(v) for k, v in content}
        if kind == "bytes":
            return blob[content[0] : content[1]]
        if kind == "elsewhere":
            return (Elsewhere if function else str)(content)  # what comes back is plain text
        if kind == "dtype":
            return dtype(content)
        if kind == "tensor":
            name, shape, start, end = content
            part = bytearray(blob[start:end])
            flat = torch.frombuffer(part, dtype=dtype(name)) if part else torch.empty(0)
            return flat.to(dtype(name)).reshape(shape)
        return function(content)

    def dtype(name: str) -> torch.dtype:
        found = getattr(torch, name)
        if not isinstance(found, torch.dtype):
            raise TypeError(name)
        return found

    return value(json.loads(text))


class Channel:
    """Messages over a socket. A deadline is a time of `time.monotonic()`."""

    def __init__(self, sock: socket.socket):
        self.sock = sock
        for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, buffer, 1 << 20)

    def send(self, data: bytes, deadline: float | None = None) -> None:
        self.sock.settimeout(max(deadline - time.monotonic(), 1e-3) if deadline else None)
        self.sock.sendall(data)

    def receive(self, deadline: float | None = None, function: Any = None) -> tuple:
        head = self.read(8, deadline)
        text, blob = struct.unpack(">II", head)
        if text > TEXT_LIMIT or blob > BLOB_LIMIT:
            raise ValueError("too large a message")
        return unpack(head + self.read(text + blob, deadline), function)

    def read(self, size: int, deadline: float | None) -> bytes:
        data, have = bytearray(size), 0
        while have < size:
            self.sock.settimeout(max(deadline - time.monotonic(), 1e-3) if deadline else None)
            n = self.sock.recv_into(memoryview(data)[have:])
            if not n:
                raise EOFError
            have += n
        return bytes(data)


class Nursery:
    """Starts the processes of answers: on Linux forks of a clean one that has imported torch.

    `modules` of the package are imported there once, before any answer is known.
    """

    def __init__(self, modules: tuple[str, ...] = ()):
        self.modules, self.mother, self.lone = modules, None, {}

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *_: object) -> None:
        if self.mother:
            self.control.close()  # she ends her children, then herself
            self.mother.wait()
        for process in self.lone.values():
            kill_tree(process)

    def start(self) -> tuple[Channel, int]:
        """A channel to a new process, and its number."""
        if not FORKS:
            return self.start_alone()
        if not self.mother or self.mother.poll() is not None:  # or the system has killed her
            self.control, hers = socket.socketpair()
            self.mother = self.python(f"mother({hers.fileno()}, {self.modules!r})", [hers.fileno()])
            hers.close()
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self.control, [struct.pack(">q", 0)], [theirs.fileno()])
        return Channel(ours), struct.unpack(">q", Channel(self.control).read(8, None))[0]

    def start_alone(self) -> tuple[Channel, int]:
        token = secrets.token_hex(16)
        with socket.create_server(("127.0.0.1", 0)) as server:
            process = self.python(f"lone({server.getsockname()[1]}, input())")
            process.stdin.write(f"{token}\n".encode())
            process.stdin.flush()
            server.settimeout(60)
            while True:
                channel = Channel(server.accept()[0])
                if secrets.compare_digest(channel.read(32, time.monotonic() + 5), token.encode()):
                    break
        self.lone[process.pid] = process
        return channel, process.pid

    def python(self, call: str, handles: list[int] = ()) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-X", "utf8", "-c", f"import book.answering as a; a.{call}"],
            cwd=ROOT,
            env={**environment(tempfile.gettempdir()), "PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE if not handles else subprocess.DEVNULL,
            **(dict(pass_fds=handles, start_new_session=True) if os.name == "posix" else {}),
        )

    def end(self, pid: int) -> None:
        """Kill a process and all of its group."""
        if pid in self.lone:
            process = self.lone.pop(pid)
            kill_tree(process)
            process.wait()
        else:
            with contextlib.suppress(OSError, EOFError):
                self.control.sendall(struct.pack(">q", pid))
                Channel(self.control).read(8, None)


def mother(handle: int, modules: tuple[str, ...]) -> None:
    """Import, then fork a child for each handle that comes in, and kill each whose number does."""
    control, children = socket.socket(fileno=handle), set()
    torch.set_num_threads(1)
    for module in modules:
        importlib.import_module(f"nanochat.{module}")
    while True:
        data, handles, _, _ = socket.recv_fds(control, 8, 1)
        if handles:
            pid = os.fork()
            if pid == 0:
                os.setsid()
                os.dup2(handles[0], 3)
                os.closerange(4, 1024)
                answer_process(Channel(socket.socket(fileno=3)))
            os.close(handles[0])
            children.add(pid)
            control.sendall(struct.pack(">q", pid))
            continue
        for pid in [struct.unpack(">q", data)[0]] if data else children.copy():
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:  # not yet the leader of its group
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)  # until here its number is not given to another process
            children.remove(pid)
        if not data:
            os._exit(0)
        control.sendall(data)


def lone(port: int, token: str) -> None:
    """The process of one answer where there is no fork."""
    sock = socket.create_connection(("127.0.0.1", port))
    sock.sendall(token.encode())
    torch.set_num_threads(1)
    answer_process(Channel(sock))


def answer_process(channel: Channel) -> None:
    """Put up the walls, run the given cells and the answer, then answer calls. Never returns."""
    try:
        folder, given, source, name, replaced = channel.receive()
        wall_in(folder)
        block(replaced)
        names = {"__name__": "exercises"}
        exec(compile(given, "<given>", "exec"), names)
        names.update({k: lambda *_: None for k in ("check", "hint", "progress")})
        exec(compile(source, "<answer>", "exec"), names)
        if name not in names:
            raise NameError(f"the cell does not define {name!r}")
        answer = names[name]
        reply = ("function",) if callable(answer) else ("value", answer)
    except BaseException as error:
        reply = ("error", *words_of(error))

    dropped: list[int] = []  # results of functions that the answer no longer holds

    def function(number: int) -> Any:
        def ask(*args: Any, **kwargs: Any) -> Any:
            gone = dropped[:]
            del dropped[: len(gone)]
            channel.send(pack(("ask", number, args, kwargs, gone)))
            kind, *rest = channel.receive(function=function)
            if kind == "error":
                raise error_of(*rest)
            value, place = rest
            if isinstance(value, torch.Tensor):
                weakref.finalize(value, dropped.append, place)
            return value

        return ask

    while True:
        try:
            data = pack(reply)
        except BaseException as error:
            data = pack(("error", *words_of(error)))
        try:
            channel.send(data)
            args, kwargs = channel.receive(function=function)
        except BaseException:
            os._exit(0)
        try:
            reply = "value", answer(*args, **kwargs)
        except BaseException as error:
            reply = ("error", *words_of(error))


def wall_in(folder: str) -> None:
    """No terminal, no repository, no other files, no network, no processes, little memory."""
    null = os.open(os.devnull, os.O_RDWR)
    for handle in (0, 1, 2):
        os.dup2(null, handle)
    os.close(null)
    os.chdir(folder)
    os.environ.update(TMPDIR=folder, TEMP=folder, TMP=folder)
    tempfile.tempdir = folder
    sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != ROOT]
    sys.path.append(str(Path(nanochat.__file__).parent))  # for `protect`: this may be read
    protect(folder, EXERCISE_SECONDS, psutil.Process().memory_info().vms // 2**20 + MEMORY_MB)
    sys.path.pop()
    random.seed(0)
    torch.manual_seed(0)
    closed = "/proc", *(str(ROOT / name) for name in ("exercises", "work", "tests", "book"))
    refused = {"subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty"}
    refused |= {"os.posix_spawn", "os.spawn", "os.startfile", "ctypes.dlopen"}
    real_path = os.path.realpath

    def guard(event: str, args: tuple) -> None:
        if event in refused or event.startswith("socket."):
            raise PermissionError(f"an answer may not use {event}")
        looks = event in ("open", "os.listdir", "os.scandir") and isinstance(args[0], (str, bytes))
        if looks and real_path(os.fsdecode(args[0])).startswith(closed):
            raise PermissionError(f"an answer may not read {args[0]!r}")

    sys.addaudithook(guard)


def block(replaced: str) -> None:
    """Make the function of the package that an exercise asks for raise, wherever it is held."""
    if not replaced:
        return
    module, name = replaced.split(".")
    original = getattr(importlib.import_module(f"nanochat.{module}"), name)

    def asked_for(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"nanochat.{replaced} is what you are asked to write")

    put_in_place(original, asked_for)


def put_in_place(old: Any, new: Any) -> None:
    """Put `new` where a loaded module of the package holds `old`, as a name or as a default."""
    for module in [m for n, m in sys.modules.items() if n.startswith("nanochat.") and m]:
        for name in [n for n, value in vars(module).items() if value is old]:
            setattr(module, name, new)
        for one in [f for f in vars(module).values() if inspect.isfunction(f)]:
            if old in (one.__defaults__ or ()):
                one.__defaults__ = tuple(new if d is old else d for d in one.__defaults__)
            for name in [n for n, d in (one.__kwdefaults__ or {}).items() if d is old]:
                one.__kwdefaults__[name] = new


def words_of(error: BaseException) -> tuple[str, str]:
    """The name of the error's type (the nearest built-in one) and its text."""
    known = [c for c in type(error).__mro__ if c.__module__ == "builtins" or c is UserError]
    try:
        text = str(error)[:300]
    except BaseException:
        text = ""
    if type(error) is NameError and error.name:
        text += " (of a notebook only the marked cell is read: define in it what it needs)"
    return known[0].__name__, text.encode("utf-8", "replace").decode()


def error_of(kind: str, text: str) -> Exception:
    """A harmless exception of the named built-in type."""
    found = UserError if kind == "UserError" else getattr(builtins, str(kind), None)
    if isinstance(found, type) and issubclass(found, Exception):
        try:
            return found(text)
        except TypeError:  # UnicodeDecodeError wants more
            pass
    return RuntimeError(f"{kind}: {text}")


class Answer:
    """An answer in a process of its own: call it like the function that it is.

    A process that hangs or dies is replaced by a fresh one at the next call, so that one bad case
    costs one property; all calls together have EXERCISE_SECONDS.
    """

    def __init__(self, nursery: Nursery, given: str, source: str, name: str, replaced: str = ""):
        self.nursery, self.task = nursery, (given, source, name, replaced)
        self.channel, self.left = None, EXERCISE_SECONDS

    def __enter__(self) -> "Answer":
        return self

    def __exit__(self, *_: object) -> None:
        if self.channel:
            self.channel.sock.close()
            self.nursery.end(self.pid)
            self.channel = None
            shutil.rmtree(self.folder, ignore_errors=True)

    def value(self) -> Any:
        """What the checks are given: this object for a function, else the value itself."""
        self.channel, self.pid = self.nursery.start()
        self.folder = os.path.realpath(tempfile.mkdtemp(prefix="nanochat-"))
        kind, *rest = self.exchange(pack((self.folder, *self.task)))
        return self if kind == "function" else rest[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.channel:
            self.value()
        functions: list = []
        return self.exchange(pack((args, kwargs), functions), functions)[1]

    def exchange(self, data: bytes, functions: list = ()) -> tuple:
        """Send and wait for the reply, calling `functions` on the way; raise what it raised."""
        begin, limit, held = time.monotonic(), min(CALL_SECONDS, self.left), {}
        try:
            self.channel.send(data, begin + limit)
            while (reply := self.channel.receive(begin + limit))[0] == "ask":
                self.channel.send(answer_ask(functions, held, *reply[1:]), begin + limit)
            if reply[0] not in ("value", "function", "error"):
                raise ValueError(reply[0])
        except TimeoutError:
            self.__exit__()
            raise TimeoutError(f"no answer within {max(limit, 0):.0f} seconds") from None
        except Exception:  # its process ended, or speaks nonsense
            self.__exit__()
            raise RuntimeError("its process ended: it left, crashed or took too much") from None
        finally:
            self.left -= time.monotonic() - begin
        if reply[0] == "error":
            raise error_of(*reply[1:])
        return reply


def answer_ask(
    functions: list, held: dict, number: int, args: tuple, kwargs: dict, dropped: list
) -> bytes:
    """Call one of the functions that a check handed to the answer.

    Its result lives here for as long as the answer holds it: a check may look whether it does.
    """
    for place in dropped:
        held.pop(place, None)
    place = max(held, default=0) + 1
    try:
        held[place] = functions[number](*args, **kwargs)
        return pack(("value", held[place], place))
    except Exception as error:
        return pack(("error", *words_of(error)))
