"""A sandbox that runs short Python programs in a limited child process.

Exported from chapters/08_inference.py (chapter 08, Inference); edit there, not here.
"""

import contextlib
import ctypes
import json
import math
import os
import platform
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from dataclasses import dataclass
from importlib.util import find_spec

__all__ = [
    "Capture",
    "FILE_MB",
    "FILE_SYSTEM_MB",
    "MAX_FILES",
    "MAX_OPEN_FILES",
    "MAX_PROCESSES",
    "Result",
    "START_SECONDS",
    "SYSTEM_CALLS",
    "child",
    "enter_namespaces",
    "enter_namespaces_if_possible",
    "environment",
    "filter_program",
    "kill_tree",
    "make_result",
    "protect",
    "readable_paths",
    "restrict_files",
    "restrict_system_calls",
    "run_python",
    "set_limits",
]


FILE_MB, FILE_SYSTEM_MB, MAX_FILES, MAX_PROCESSES, MAX_OPEN_FILES = 16, 64, 4096, 64, 64
START_SECONDS = 30.0  # what a busy machine may need to start Python and put up the walls


@dataclass
class Result:
    """What a program did. `protections` names the walls that stood on this machine (see text)."""

    ok: bool  # ended by itself, with exit code 0, within all limits
    stdout: str
    stderr: str
    timed_out: bool = False
    truncated: bool = False  # printed more than the output limit, and was stopped for it
    exit_code: int | None = None
    protections: tuple[str, ...] = ()
    finished: bool = False  # reached its last line; a program that exits before has not


def set_limits(timeout: float, memory_mb: int) -> list[str]:
    """Limit this process for good; return the names of the limits that the system took."""
    try:
        import resource
    except ImportError:  # Windows has none of these
        return []
    cpu, file_size = math.ceil(timeout) + 1, FILE_MB * 2**20
    wanted = {
        "cpu limit": ("RLIMIT_CPU", cpu),
        "memory limit": ("RLIMIT_AS", memory_mb * 2**20),
        "file-size limit": ("RLIMIT_FSIZE", file_size),
        "open-files limit": ("RLIMIT_NOFILE", MAX_OPEN_FILES),
        "process limit": ("RLIMIT_NPROC", MAX_PROCESSES),
        "no core dumps": ("RLIMIT_CORE", 0),
    }
    done = []
    for name, (constant, value) in wanted.items():
        try:
            resource.setrlimit(getattr(resource, constant), (value, value))
            done.append(name)
        except (AttributeError, ValueError, OSError):
            continue
    if os.getuid() == 0 and "process limit" in done:
        done.remove("process limit")  # the kernel does not count root's processes
    return done


def enter_namespaces(folder: str) -> list[str]:
    """Linux: leave the network and give `folder` its own small memory file system.

    Needs unprivileged user namespaces; raises OSError where they are switched off.
    """
    user, network, mounts = 0x10000000, 0x40000000, 0x00020000  # CLONE_NEWUSER, _NEWNET, _NEWNS
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(user | network | mounts) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    options = f"size={FILE_SYSTEM_MB}m,nr_inodes={MAX_FILES},mode=700".encode()
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 2 | 4, options) != 0:  # nosuid, nodev
        return ["network namespace"]
    os.chdir(folder)
    return ["network namespace", "private file system"]


def enter_namespaces_if_possible(folder: str) -> list[str]:
    """Try in a forked child first: a namespace that is entered by half cannot be left again."""
    child_id = os.fork()
    if child_id == 0:
        try:
            enter_namespaces(folder)
            os._exit(0)
        except BaseException:
            os._exit(1)
    works = os.waitpid(child_id, 0)[1] == 0
    return enter_namespaces(folder) if works else []


def readable_paths() -> list[str]:
    """Return what a Python program must be able to read: Python itself and shared libraries."""
    paths = {sys.prefix, sys.base_prefix, *filter(os.path.isabs, sys.path)}
    paths |= {"/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"}
    return sorted(path for path in paths if os.path.exists(path) and path != "/")


def restrict_files(folder: str) -> list[str]:
    """Linux 5.13 and later: Landlock. Read Python, read and write `folder`, touch nothing else.

    From version 6 of its interface on, signals and sockets to processes outside are cut as well.
    """
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    create, add, restrict = 444, 445, 446
    version = syscall(create, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return []
    rights = (1 << (13 + sum(version >= v for v in (2, 3, 5)))) - 1  # all the kernel knows
    network, scopes = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = struct.pack("QQQ", rights, network, scopes)[:size]
    handle = syscall(create, ruleset, ctypes.c_size_t(size), 0)
    read, read_folder, write = 1 << 2, 1 << 3, 1 << 1
    allowed = {path: read | read_folder for path in readable_paths()}
    allowed |= {"/dev/null": read | write, "/dev/urandom": read, folder: rights & ~1}
    for path, access in allowed.items():
        descriptor = os.open(path, os.O_RDONLY)
        access &= rights if os.path.isdir(path) else read | write
        rule = struct.pack("=Qi", access, descriptor)
        failed = syscall(add, handle, 1, rule, 0)
        os.close(descriptor)
        if failed:
            return []
    done = syscall(restrict, handle, 0) == 0
    os.close(handle)
    return ["landlock"] if done else []


# Each line: what to answer, then name, number on x86-64, number on 64-bit ARM ("-": has none).
SYSTEM_CALLS = """
refuse fork 57 - vfork 58 - execve 59 221 execveat 322 281 socket 41 198 ptrace 101 117
refuse tkill 200 130 rt_sigqueueinfo 129 138 rt_tgsigqueueinfo 297 240 pidfd_send_signal 424 424
refuse pidfd_open 434 434 pidfd_getfd 438 438 process_vm_readv 310 270 process_vm_writev 311 271
refuse process_madvise 440 440 setns 308 268 unshare 272 97 mount 165 40 umount2 166 39
refuse pivot_root 155 41 chroot 161 51 fsopen 430 430 fsmount 432 432 move_mount 429 429
refuse open_tree 428 428 mount_setattr 442 442 open_by_handle_at 304 265 io_uring_setup 425 425
refuse io_uring_enter 426 426 bpf 321 280 perf_event_open 298 241 userfaultfd 323 282
refuse keyctl 250 219 add_key 248 217 request_key 249 218 memfd_create 319 279 shmget 29 194
refuse msgget 68 186 semget 64 190 mq_open 240 180 personality 135 92 setpriority 141 140
refuse sched_setscheduler 144 119 sched_setaffinity 203 122 sched_setattr 314 274 ioprio_set 251 30
refuse init_module 175 105 finit_module 313 273 delete_module 176 106 kexec_load 246 104
refuse kexec_file_load 320 294 reboot 169 142 swapon 167 224 swapoff 168 225 acct 163 89
refuse settimeofday 164 170 clock_settime 227 112 adjtimex 159 171 clock_adjtime 305 266
refuse sethostname 170 161 setdomainname 171 162 quotactl 179 60 syslog 103 116 setxattr 188 5
refuse lsetxattr 189 6 fsetxattr 190 7 removexattr 197 14 lremovexattr 198 15 fremovexattr 199 16
pretend chmod 90 - fchmod 91 52 fchmodat 268 53 fchmodat2 452 452 chown 92 - fchown 93 55
pretend lchown 94 - fchownat 260 54 utime 132 - utimes 235 - futimesat 261 - utimensat 280 88
absent clone3 435 435
threads clone 56 220
self kill 62 129 tgkill 234 131
selfzero prlimit64 302 261
"""


def filter_program(machine: str, pid: int) -> bytes | None:
    """Return the seccomp filter (classic BPF, 8 bytes an instruction) for this machine, or None."""
    column, arch = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}.get(machine, (0, 0))
    if not arch:
        return None
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, error = 0x7FFF0000, 0x00050000
    refuse, absent = error | 1, error | 38  # EPERM, ENOSYS

    def op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    program = op(load, 4) + op(equal, arch, 1, 0) + op(answer, refuse)  # a foreign call table
    program += op(load, 0) + op(at_least, 0x40000000, 0, 1) + op(answer, refuse)  # x32
    for line in SYSTEM_CALLS.strip().splitlines():
        action, *words = line.split()
        for number in (n for n in words[1 + column :: 3] if n != "-"):
            match = {  # the first argument of a call is at byte 16
                "refuse": op(answer, refuse),
                "pretend": op(answer, error),  # error number 0: "done", though nothing was
                "absent": op(answer, absent),
                "threads": op(load, 16) + op(any_bit, 0x10000, 0, 1) + op(answer, allow),
                "self": op(load, 16) + op(equal, pid, 0, 1) + op(answer, allow),
                "selfzero": op(load, 16) + op(equal, 0, 0, 1) + op(answer, allow),
            }[action]
            if action in ("threads", "self", "selfzero"):
                match += op(answer, refuse)
            program += op(equal, int(number), 0, len(match) // 8) + match
    return program + op(answer, allow)


def restrict_system_calls() -> list[str]:
    """Linux: refuse new processes, sockets, signals to others and all administration."""
    program = filter_program(platform.machine(), os.getpid()) if sys.maxsize > 2**32 else None
    libc = ctypes.CDLL(None, use_errno=True)
    if program is None:
        return []
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    zero = ctypes.c_ulong(0)
    done = libc.prctl(22, ctypes.c_ulong(2), header, zero, zero) == 0  # seccomp, filter
    return ["seccomp"] if done else []


def protect(folder: str, timeout: float, memory_mb: int) -> list[str]:
    """Put up every wall this system offers around the current process; return their names."""
    done = ["scrubbed environment"]
    linux = sys.platform.startswith("linux")
    if hasattr(os, "nice"):
        os.nice(5)
    walls = [lambda: set_limits(timeout, memory_mb)]
    if linux:
        walls = [
            lambda: enter_namespaces_if_possible(folder),
            lambda: restrict_files(folder),
            *walls,
        ]
        walls += [restrict_system_calls]
    if linux:  # the promise never to gain privileges, which Landlock and seccomp ask for
        ctypes.CDLL(None).prctl(38, *map(ctypes.c_ulong, (1, 0, 0, 0)))
    for wall in walls:
        try:
            done += wall()
        except (OSError, AttributeError):
            continue
    return done


def child() -> None:
    """Be the sandboxed process: read the request, put up the walls, run the code."""
    request = json.loads(sys.stdin.buffer.read())
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    walls = protect(os.getcwd(), request["timeout"], request["memory_mb"])
    print(json.dumps(walls), file=sys.stderr, flush=True)
    sys.argv, sys.path = ["program"], [*sys.path, os.getcwd()]
    try:
        exec(compile(request["code"], "<program>", "exec"), {"__name__": "__main__"})
    except Exception as error:
        trace = error.__traceback__.tb_next  # without our own frame
        traceback.print_exception(type(error), error, trace)
        sys.exit(1)
    os.write(2, request["proof"].encode())


def kill_tree(process: subprocess.Popen) -> None:
    """Kill a process and all that it started."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        command = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
        subprocess.run(command, capture_output=True, check=False)
    process.kill()


class Capture(threading.Thread):
    """Reads a pipe to its end, keeps the first `limit` bytes and calls `on_flood` beyond them."""

    def __init__(self, pipe, limit: int, on_flood):
        super().__init__(daemon=True)
        self.pipe, self.limit, self.on_flood = pipe, limit, on_flood
        self.data, self.flooded = bytearray(), False
        self.began = threading.Event()  # something came, or the end
        self.start()

    def run(self) -> None:
        while piece := self.pipe.read1(65536):
            self.began.set()
            room = self.limit - len(self.data)
            self.data += piece[:room]
            if len(piece) > room and not self.flooded:
                self.flooded = True
                self.on_flood()
        self.began.set()
        self.pipe.close()


def environment(folder: str) -> dict[str, str]:
    """Return the few variables a program sees: none of the caller's, HOME among the missing."""
    kept = {k: os.environ[k] for k in ("SYSTEMROOT", "SYSTEMDRIVE") if k in os.environ}
    threads = {k: "1" for k in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    return {"PATH": os.defpath, "TMPDIR": folder, "TEMP": folder, "TMP": folder, **threads, **kept}


def run_python(
    code: str, timeout: float = 5.0, memory_mb: int = 256, output_limit: int = 65536
) -> Result:
    """Run a Python program in a limited child process and return its Result.

    `timeout` is in seconds of wall-clock time from the moment at which the walls are up and the
    program begins, `memory_mb` counts address space, `output_limit` is in bytes for each of stdout
    and stderr. The program starts in an empty folder that is deleted afterwards; it has no input,
    no environment, no children and, where the system allows, no network and no other files. See
    `Result.protections`; without "landlock" and "seccomp" among them, run only code that you would
    run yourself.
    """
    script = find_spec("nanochat.sandbox").origin
    detach = {"start_new_session": True} if os.name == "posix" else {"creationflags": 0x200}
    pipe, timed_out, proof = subprocess.PIPE, False, secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="nanochat-", ignore_cleanup_errors=True) as folder:
        folder = os.path.realpath(folder)
        process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", script], stdin=pipe, stdout=pipe, stderr=pipe,
            cwd=folder, env=environment(folder), **detach,
        )  # fmt: skip
        captures = [
            Capture(stream, output_limit + extra, lambda: kill_tree(process))
            for stream, extra in ((process.stdout, 0), (process.stderr, 1024))
        ]
        request = {"code": code, "timeout": timeout, "memory_mb": memory_mb, "proof": proof}
        try:
            process.stdin.write(json.dumps(request).encode())
            process.stdin.close()
        except OSError:  # the child died early; its stderr says why
            pass
        try:
            captures[1].began.wait(START_SECONDS)  # the walls come first on stderr
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            kill_tree(process)
            exit_code = process.wait()
        for capture in captures:
            capture.join(1.0)  # no longer: what escaped may hold the pipe open
    return make_result(exit_code, timed_out, proof, *captures)


def make_result(exit_code: int, timed_out: bool, proof: str, out: Capture, err: Capture) -> Result:
    """Put a Result together of what stderr holds: the child's walls, its text, and the proof."""
    first, _, stderr = err.data.decode("utf-8", "replace").partition("\n")
    walls = tuple(json.loads(first)) if first.startswith("[") else ()
    stderr = stderr if walls else err.data.decode("utf-8", "replace")
    flooded = out.flooded or err.flooded
    ok = exit_code == 0 and not timed_out and not flooded
    stdout = out.data.decode("utf-8", "replace")
    text = stderr.replace(proof, "")
    return Result(ok, stdout, text, timed_out, flooded, exit_code, walls, text != stderr)


if __name__ == "__main__":
    child()
