"""More than a hundred attacks on the sandbox and the calculator; every one has to fail.

A sandbox attack that succeeds prints BREACH. Attacks that end by themselves run together, one
child process for each group; bombs and hangs have one each, with small limits. A group is skipped
where the system has none of the walls that it attacks (see `Result.protections`).
"""

import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from test_calculator import REFUSED

from nanochat.calculator import calculate
from nanochat.sandbox import run_python

WALLS = set(run_python("pass", timeout=60).protections)
assert WALLS, "the sandbox did not start"

FILES = {
    "passwords": "open('/etc/passwd').read()",
    "hashed passwords": "open('/etc/shadow').read()",
    "a secret": "open(SECRET).read()",
    "a secret, relative": "open(os.path.relpath(SECRET)).read()",
    "a secret, many dots": "open('../' * 40 + SECRET.lstrip('/')).read()",
    "a secret through a symbolic link": "os.symlink(SECRET, 'a'); open('a').read()",
    "a secret through a hard link": "os.link(SECRET, 'b'); open('b').read()",
    "a secret through /proc": "open('/proc/self/root' + SECRET).read()",
    "a secret through the parent": "open(f'/proc/{os.getppid()}/root' + SECRET).read()",
    "a secret through libc": ("f = libc.open(SECRET.encode(), 0); assert f >= 0 and os.read(f, 1)"),
    "a secret through openat": "os.open(os.path.basename(SECRET), 0, dir_fd=os.open(FOLDER, 0))",
    "a secret in a memory map": "import mmap; mmap.mmap(os.open(SECRET, 0), 0, prot=1)",
    "a secret as a module": (
        "import importlib.machinery as m; m.SourceFileLoader('x', SECRET).load_module()"
    ),
    "a secret in a copy": "import shutil; shutil.copyfile(SECRET, 'c')",
    "a secret moved here": "os.rename(SECRET, 'd')",
    "a secret as a database": (
        "import sqlite3; sqlite3.connect(SECRET).execute('select * from sqlite_master')"
    ),
    "the folder of a secret": "os.listdir(FOLDER)",
    "the root": "os.scandir('/')",
    "the home": "os.listdir(os.path.expanduser('~'))",
    "other people's temporary files": "os.listdir(TEMP)",
    "the parent's environment": "open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "the parent's memory": "open(f'/proc/{os.getppid()}/mem', 'r+b')",
    "the parent's open files": "os.listdir(f'/proc/{os.getppid()}/fd')",
    "the machine's memory": "open('/dev/mem', 'rb')",
    "the kernel's log": "open('/dev/kmsg').read()",
    "overwrite": "open(SECRET, 'w')",
    "append": "open(SECRET, 'a').write('x')",
    "truncate": "os.truncate(SECRET, 0)",
    "remove": "os.remove(SECRET)",
    "remove the folder": "import shutil; shutil.rmtree(FOLDER)",
    "a new file elsewhere": "open(FOLDER + '/new', 'w')",
    "a new folder elsewhere": "os.mkdir(FOLDER + '/new')",
    "a file in shared memory": "open('/dev/shm/nanochat-attack', 'w')",
    "a change of Python": "open(os.__file__, 'a').write('x')",
    "a new module for Python": "open(os.path.join(sys.prefix, 'evil.pth'), 'w')",
    "a device": "os.mknod('e', 0o20666, os.makedev(1, 1)); open('e')",
    "another root": "os.chroot('.')",
    "a file by its handle": "assert libc.open_by_handle_at(3, b'\\0' * 16, 0) >= 0",
    "the terminal": "open('/dev/tty', 'w').write('x')",
    "a program of its own": "open('p', 'w').write('#!/bin/sh'); os.execv('p', ['p'])",
}
NETWORK = {
    "TCP": "socket.create_connection(('127.0.0.1', PORT), 1)",
    "TCP, version 6": "socket.create_connection(('::1', PORT), 1)",
    "a web page": "import urllib.request as u; u.urlopen(f'http://127.0.0.1:{PORT}', timeout=1)",
    "UDP": "socket.socket(2, 2).sendto(b'x', ('127.0.0.1', PORT))",
    "raw packets": "socket.socket(socket.AF_PACKET, 3)",
    "a server": "socket.create_server(('0.0.0.0', 0))",
    "names": "socket.getaddrinfo('example.com', 80)",
    "a socket of this machine": "socket.socket(socket.AF_UNIX).connect('\\0nanochat-attack')",
    "the kernel's own": "socket.socket(16, 3, 0)",
    "the socket call itself": "assert libc.syscall(41 if X86 else 198, 2, 1, 0) >= 0",
    "io_uring": "assert libc.syscall(425, 4, b'\\0' * 120) >= 0",
}
PROCESSES = {
    "fork": "os.fork()",
    "forkpty": "os.forkpty()",
    "fork, the call itself": "assert not X86 or libc.syscall(57) > 0; assert X86",
    "fork by an old number": "assert libc.syscall(0x40000039) > 0",
    "vfork": "assert libc.syscall(58 if X86 else 1079, 0) > 0",
    "clone": "assert libc.syscall(56 if X86 else 220, 17, 0, 0, 0, 0) > 0",
    "clone3": "assert libc.syscall(435, (17).to_bytes(88, 'little'), 88) > 0",
    "a shell": "assert os.system('true') == 0",
    "a program": "import subprocess; subprocess.run(['true'])",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "exec": "os.execv('/bin/true', ['true'])",
    "exec of a descriptor": "os.execve(os.open(sys.executable, 0), ['x'], {})",
    "a worker": "import multiprocessing as m; m.get_context('fork').Process(target=print).start()",
    "a program in memory": "os.memfd_create('x')",
    "a pool": (
        "from concurrent.futures import ProcessPoolExecutor as P; P(1).submit(abs, 1).result(1)"
    ),
}
OTHERS = {
    "kill the parent": "os.kill(os.getppid(), 9)",
    "kill all": "os.kill(-1, 9)",
    "kill the first": "os.kill(1, 0)",
    "kill the parent's group": "os.killpg(os.getpgid(os.getppid()), 9)",
    "kill a thread of it": (
        "p = os.getppid(); assert libc.syscall(234 if X86 else 131, p, p, 9) == 0"
    ),
    "a signal with a value": "assert libc.sigqueue(os.getppid(), 10, None) == 0",
    "a signal by descriptor": (
        "import signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)"
    ),
    "trace the parent": "assert libc.ptrace(16, os.getppid(), 0, 0) == 0",
    "read its memory": "assert libc.process_vm_readv(os.getppid(), None, 0, None, 0, 0) == 0",
    "its limits": "import resource as r; r.prlimit(os.getppid(), r.RLIMIT_CPU, (1, 1))",
    "its priority": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "its processors": "os.sched_setaffinity(os.getppid(), {0})",
    "own limits, memory": "import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))",
    "own limits, time": "import resource as r; r.setrlimit(r.RLIMIT_CPU, (10**6, 10**6))",
    "own limits, files": "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (-1, -1))",
    "own limits, by prlimit": "import resource as r; r.prlimit(0, r.RLIMIT_AS, (-1, -1))",
    "a namespace": "assert libc.unshare(0x10000000) == 0",
    "another namespace": "assert libc.setns(os.open('/proc/1/ns/net', 0), 0) == 0",
    "a mount": "assert libc.mount(b't', b'/', b'tmpfs', 0, None) == 0",
    "an unmount": "assert libc.umount2(os.getcwd().encode(), 2) == 0",
    "the clock": "import time; time.clock_settime(0, 0)",
    "the host's name": "socket.sethostname('x')",
    "a kernel module": "assert libc.syscall(175 if X86 else 105, 0, 0, b'') == 0",
    "a kernel program": "assert libc.syscall(321 if X86 else 280, 0, 0, 0) >= 0",
    "counters of the kernel": (
        "assert libc.syscall(298 if X86 else 241, b'\\0' * 128, 0, -1, -1, 0) >= 0"
    ),
    "keys of the kernel": "assert libc.syscall(250 if X86 else 219, 0, -3, 1) >= 0",
    "page faults by hand": "assert libc.syscall(323 if X86 else 282, 1) >= 0",
    "memory that outlives it": "assert libc.shmget(0, 4096, 0o1600) >= 0",
    "a queue that outlives it": "assert libc.msgget(0, 0o1600) >= 0",
    "another personality": "assert libc.personality(0x0008) not in (-1, 0xFFFFFFFF)",
    "root": "os.setuid(0) if os.getuid() else 1 / 0",
    "its real root": "assert libc.pivot_root(b'.', b'.') == 0",
    "a restart": "assert libc.syscall(169 if X86 else 142, 0xFEE1DEAD, 672274793, 0) == 0",
}
BOMBS = {  # (program, wall, what stderr must tell: any of these words)
    "a list": ("x = []\nwhile 1: x.append(bytearray(10**6))", "memory limit", "MemoryError"),
    "one string": ("'a' * 10**11", "memory limit", "MemoryError"),
    "a doubling": ("x = [0]\nwhile 1: x += x", "memory limit", "MemoryError"),
    "a shift": ("1 << 10**11", "memory limit", "MemoryError OverflowError"),
    "a memory map": ("import mmap; mmap.mmap(-1, 10**11)", "memory limit", "OSError memory"),
    "an array": ("import numpy; numpy.ones(10**11)", "memory limit", "MemoryError"),
    "threads": (
        "import threading, time\nwhile 1: threading.Thread(target=time.sleep, args=(1,)).start()",
        "memory limit",
        "RuntimeError MemoryError",
    ),
    "descriptors": ("x = []\nwhile 1: x.append(open('a', 'w'))", "open-files limit", "OSError"),
    "a large file": (
        "f = open('a', 'wb')\nwhile 1: f.write(b'x' * 2**20)", "file-size limit", "OSError"
    ),
    "a file with a hole": (
        "import os; os.truncate(os.open('a', 66), 10**12)", "file-size limit", "OSError"
    ),
    "many files": (
        "for i in range(99): open(str(i), 'wb').write(b'x' * 2**20)",
        "private file system",
        "OSError",
    ),
    "many names": (
        "for i in range(10**6): open(str(i), 'w').close()", "private file system", "OSError"
    ),
    "recursion": ("f = lambda: f()\nf()", None, "RecursionError"),
    "deep brackets": ("eval('(' * 5000)", None, "SyntaxError MemoryError Recursion"),
    "deep JSON": ("import json; json.loads('[' * 10**6)", None, "RecursionError MemoryError"),
    "a crash": ("import ctypes; ctypes.string_at(0)", None, ""),
}  # fmt: skip
HANGS = {
    "a loop": "while 1: pass",
    "sleep": "import time; time.sleep(99)",
    "sleep that cannot be interrupted": (
        "import signal, time\nfor s in range(1, 65):\n try: signal.signal(s, lambda *a: 0)\n"
        " except (OSError, ValueError): pass\nwhile 1: time.sleep(1)"
    ),
    "a large power": "10**10**9",
    "a slow pattern": "import re; re.match('(a+)+$', 'a' * 50 + 'b')",
    "a thread that stays": (
        "import threading, time; threading.Thread(target=time.sleep, args=(99,)).start()"
    ),
    "at the exit": "import atexit, time; atexit.register(time.sleep, 99)",
    "in a destructor": (
        "import time\nclass A:\n def __del__(self, sleep=time.sleep): sleep(99)\na = A()"
    ),
    "with closed output": "import os; os.closerange(0, 64)\nwhile 1: pass",
    "in a session of its own": "import os; os.setpgid(0, 0) if 0 else None\nwhile 1: pass",
    "a pipe that nobody reads": "import os; r, w = os.pipe()\nwhile 1: os.write(w, b'x' * 4096)",
    "a lock": "import threading; a = threading.Lock(); a.acquire(); a.acquire()",
    "a stopped process": "import os; os.kill(os.getpid(), 19)",
}  # fmt: skip
FLOODS = {
    "stdout": "while 1: print('x' * 1000)",
    "stderr": "import sys\nwhile 1: sys.stderr.write('x' * 1000)",
    "bytes": "import os\nwhile 1: os.write(1, b'\\xff' * 4096)",
    "one line": "import sys\nwhile 1: sys.stdout.write('x')",
    "both": "import os\nwhile 1: os.write(1, b'\\0' * 99); os.write(2, b'\\x1b[2J' * 9)",
}
CALCULATOR = [
    *REFUSED,
    *("\U0001d7cf+1", "1\u200b+1", "1\u202e+1", "\ufeff1", "1\u2044 2"),
    *("'a'.count.__self__", "'a'.count.__call__('a')", "''.join.__class__", "'{0.x}'.format()"),
    *("().__class__.__bases__[0].__subclasses__()", "(1).__class__", "1 .real", "1..imag"),
    *("(x:=1)", "[i for i in (1,)]", "await 1", "yield 1", "*1", "**1"),
    *("9**9**9**9", "99**99", "(9**30)**3", "10**-10**10", "2**0.5**-999", "(2**99)%0", "1e999"),
    *("0.1**999", "-" * 499 + "1", "(" * 250 + "1" + ")" * 250, "1" + "+1" * 249, "9" * 400),
    *("%" * 499, "1%" * 200, "'" * 499, '"a".count("a"' * 9, ".count" * 80, "1.count(1)"),
    *("exec('1')", "eval('1')", "open('x')", "input()", "globals()", "exit()", "1;import os"),
]  # fmt: skip


def everything(groups) -> int:
    return sum(map(len, groups))


def test_there_are_more_than_a_hundred():
    assert everything((FILES, NETWORK, PROCESSES, OTHERS, BOMBS, HANGS, FLOODS)) > 100
    assert len(set(CALCULATOR)) > 100


@pytest.mark.parametrize("expression", CALCULATOR[len(REFUSED) :])
def test_calculator(expression):
    assert calculate(expression) is None


def attempt(attacks, **names) -> str:
    """Run all attacks of a group in one child and return what it printed."""
    program = (
        "import ctypes, os, socket, sys\n"
        f"X86, TEMP = {platform.machine() == 'x86_64'}, {tempfile.gettempdir()!r}\n"
        f"libc, names = ctypes.CDLL(None), {names!r}\n"
        "globals().update(names)\n"
        f"for name, attack in {attacks!r}.items():\n"
        "    try:\n"
        "        exec(attack, dict(globals()))\n"
        "        print('BREACH', name, flush=True)\n"
        "    except Exception as error: print('refused:', name, type(error).__name__)\n"
        "    except BaseException: print('BREACH', name)\n"
    )
    result = run_python(program, timeout=60)
    assert not result.timed_out and result.exit_code == 0, result
    assert result.stdout.count("refused:") + result.stdout.count("BREACH") == len(attacks)
    for slip in ("NameError", "SyntaxError", "ImportError", "ModuleNotFoundError"):
        assert slip not in result.stdout  # an attack must fail because of the wall
    return "\n".join(line for line in result.stdout.splitlines() if "BREACH" in line)


def needs(*walls):
    if not set(walls) <= WALLS:
        pytest.skip(f"this system has no {' and no '.join(set(walls) - WALLS)}")


def test_an_attack_that_works_is_noticed():
    assert attempt({"nothing": "pass", "wrong": "1 / 0"}) == "BREACH nothing"


def test_files(tmp_path):
    needs("landlock", "seccomp")
    secret = tmp_path / "secret.txt"
    secret.write_text("s3cret")
    before = sorted(Path(sys.prefix).iterdir()), Path(os.__file__).stat().st_size
    assert attempt(FILES, SECRET=str(secret), FOLDER=str(tmp_path)) == ""
    assert secret.read_text() == "s3cret" and os.listdir(tmp_path) == ["secret.txt"]
    assert (sorted(Path(sys.prefix).iterdir()), Path(os.__file__).stat().st_size) == before


def test_network():
    needs("seccomp")
    reached = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)

        def listen():
            while not done.is_set():
                try:
                    server.accept()
                    reached.set()
                except TimeoutError:
                    continue

        done = threading.Event()
        thread = threading.Thread(target=listen)
        thread.start()
        try:
            assert attempt(NETWORK, PORT=server.getsockname()[1]) == ""
        finally:
            done.set()
            thread.join()
    assert not reached.is_set()


@pytest.mark.parametrize("group", [PROCESSES, OTHERS], ids=["processes", "others"])
def test_processes_and_administration(group):
    needs("seccomp")
    assert attempt(group) == ""


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name):
    program, wall, words = BOMBS[name]
    if wall:
        needs(wall)
    result = run_python(program, timeout=60, memory_mb=192)
    assert (result.ok, result.timed_out) == (False, False)
    assert not words or any(word in result.stderr for word in words.split()), result.stderr[-300:]


@pytest.mark.parametrize("name", HANGS)
def test_hangs(name):
    result = run_python(HANGS[name] + "\nprint('BREACH')", timeout=0.8, memory_mb=192)
    assert result.timed_out and not result.ok


@pytest.mark.parametrize("name", FLOODS)
def test_floods(name):
    result = run_python(FLOODS[name], timeout=60, output_limit=4000)
    assert result.truncated and not result.ok and not result.timed_out
    assert len(result.stdout) <= 4000 and len(result.stderr) <= 4000 + 1024


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the 32-bit door is of x86-64")
def test_the_door_for_old_programs():
    needs("seccomp")
    code = r"b'\xb8\x02\x00\x00\x00\xcd\x80\xc3'"  # mov eax, fork; int 0x80; ret
    program = (
        f"import ctypes, mmap\ncode = {code}\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(code)\n"
        "f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\n"
        "print('BREACH' if f() >= 0 else 'refused')"
    )
    result = run_python(program)
    assert "BREACH" not in result.stdout  # refused, or no such door in this kernel: a crash


def test_nothing_is_left_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for program in (BOMBS["many files"][0], HANGS["a loop"], FLOODS["stdout"]):
        run_python(program, timeout=0.8)
    assert os.listdir(tmp_path) == []
    if Path("/proc/self/task").exists():
        children = subprocess.run(
            ["ps", "-o", "stat=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True
        ).stdout
        assert "sandbox.py" not in children


def test_the_walls_cannot_be_forged():
    forged = 'import sys; sys.stderr.write(\'["landlock", "moat"]\\n\')'
    assert "moat" not in run_python(forged).protections
