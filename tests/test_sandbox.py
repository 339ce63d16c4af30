"""nanochat.sandbox: programs that behave, and programs that do not."""

import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanochat import sandbox
from nanochat.sandbox import Result, environment, filter_program, kill_tree, run_python

WALLS = run_python("pass", timeout=60).protections
assert WALLS, "the sandbox did not start"
needs = {
    wall: pytest.mark.skipif(wall not in WALLS, reason=f"this system has no {wall}")
    for wall in ("seccomp", "landlock", "network namespace", "private file system", "memory limit",
                 "file-size limit")
}  # fmt: skip


def test_a_good_program():
    result = run_python("print('hello é')\nimport sys; print('warn', file=sys.stderr)")
    assert result.ok and result.stdout == "hello é\n" and result.stderr == "warn\n"
    assert not result.timed_out and not result.truncated and result.exit_code == 0
    assert "scrubbed environment" in result.protections


def test_numpy_tempfile_and_own_files():
    code = (
        "import numpy as np, tempfile, os, json\n"
        "assert os.listdir('.') == []\n"
        "with tempfile.NamedTemporaryFile('w') as f: f.write('x')\n"
        "open('a.txt', 'w').write('b'); print(open('a.txt').read(), int(np.arange(4).sum()))\n"
        "open('helper.py', 'w').write('value = 7'); import helper; print(helper.value)\n"
        "os.mkdir('d'); os.rename('a.txt', 'd/b.txt'); print(os.listdir('d'))\n"
    )
    result = run_python(code, timeout=20)
    assert result.stdout == "b 6\n7\n['b.txt']\n", result.stderr


def test_errors_and_exit_codes():
    result = run_python("1/0")
    assert not result.ok and "ZeroDivisionError" in result.stderr and result.exit_code == 1
    assert "sandbox" not in result.stderr  # only the program's own frames
    assert "SyntaxError" in run_python("def").stderr
    assert run_python("import sys; sys.exit(3)").exit_code == 3
    assert not run_python("import sys; sys.exit('no')").ok
    assert "RecursionError" in run_python("def f(): f()\nf()").stderr
    assert run_python("import ctypes; ctypes.string_at(0)").ok is False


@pytest.mark.parametrize(
    "leaving",
    ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "exit()"],
)
def test_an_early_exit_is_not_finished(leaving):
    early = run_python(f"print('a', flush=True)\ndef f():\n    {leaving}\nf()\nprint('b')")
    assert early.ok and early.stdout == "a\n" and not early.finished


def test_finished_is_the_last_line_and_leaves_no_trace():
    noise = "import sys, io; sys.stdout = sys.stderr = io.StringIO(); x = 1"
    for code in ("print('x', file=__import__('sys').stderr)", noise, ""):
        result = run_python(code)
        assert result.ok and result.finished and result.stderr in ("", "x\n")
    for code in ("1/0", "def", "import os; os.abort()"):
        assert not run_python(code).finished
    assert not run_python("while True: pass", timeout=0.5).finished


def test_two_runs_share_nothing():
    run_python("open('left.txt', 'w').write('x')")
    assert run_python("import os; print(os.listdir('.'))").stdout == "[]\n"


def test_environment_is_scrubbed(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    result = run_python("import os; print(os.environ.get('HOME'), 's3cret' in str(os.environ))")
    assert result.stdout == "None False\n"
    assert "HOME" not in environment("x")


def test_no_input():
    assert "EOFError" in run_python("input()").stderr


def test_infinite_loop_ends_in_time():
    start = time.monotonic()
    result = run_python("print('start', flush=True)\nwhile True: pass", timeout=3)
    assert result.timed_out and not result.ok and time.monotonic() - start < 60
    assert result.stdout == "start\n"
    assert run_python("import time; time.sleep(60)", timeout=0.5).timed_out
    ignoring = "import signal\nfor s in (15, 2, 1): signal.signal(s, signal.SIG_IGN)\nwhile 1: pass"
    assert run_python(ignoring, timeout=0.7).timed_out


def run_in(tmp_path, monkeypatch, script, code, timeout):
    """Run a program in a sandbox whose child process starts with another script."""
    (tmp_path / "sandbox.py").write_text(script)
    other = SimpleNamespace(origin=str(tmp_path / "sandbox.py"))
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "find_spec", lambda name: other)
        return run_python(code, timeout=timeout)


PATH = f"import sys\nsys.path.insert(0, {str(Path(sandbox.__file__).parents[1])!r})\n"


def test_the_clock_starts_with_the_program(tmp_path, monkeypatch):
    """A machine that takes long to start Python takes nothing from the program's time."""
    script = PATH + "import time\ntime.sleep(2)\nfrom nanochat import sandbox\nsandbox.child()\n"
    result = run_in(tmp_path, monkeypatch, script, "print('done')", timeout=1.9)
    assert result.ok and result.stdout == "done\n", result


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is POSIX")
def test_a_grandchild_that_escapes_does_not_hold_the_parent_up(tmp_path, monkeypatch):
    """Without seccomp a program can start another in a session of its own: it keeps the pipe."""
    script = "from nanochat import sandbox\nsandbox.restrict_system_calls = lambda: []\n"
    code = (
        "import os, time\n"
        "if os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\n"
        "else:\n    print('started', flush=True)\n    time.sleep(600)\n"
    )
    start = time.monotonic()
    result = run_in(tmp_path, monkeypatch, f"{PATH}{script}sandbox.child()\n", code, timeout=2)
    assert result.timed_out and result.stdout == "started\n", result
    assert time.monotonic() - start < 50


def test_output_flood_is_cut():
    result = run_python("while True: print('x' * 1000)", timeout=60, output_limit=5000)
    assert result.truncated and not result.ok and len(result.stdout) == 5000
    assert not result.timed_out
    just = run_python("print('x' * 4999)", output_limit=5000)
    assert just.ok and not just.truncated and len(just.stdout) == 5000
    result = run_python("import sys\nwhile True: sys.stderr.write('x' * 1000)", output_limit=5000)
    assert result.truncated and len(result.stderr) < 7000


@needs["memory limit"]
def test_memory_bomb():
    result = run_python("x = []\nwhile True: x.append(bytearray(10**7))", timeout=10)
    assert not result.ok and "MemoryError" in result.stderr and not result.timed_out


@needs["file-size limit"]
def test_a_large_file_is_refused():
    code = "f = open('big', 'wb')\nwhile True: f.write(b'x' * 2**20)"
    assert "Error" in run_python(code).stderr


@needs["private file system"]
def test_many_files_are_refused():
    code = "for i in range(200): open(f'f{i}', 'wb').write(b'x' * 2**20)"
    assert "No space left" in run_python(code).stderr


@needs["seccomp"]
@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/sh', ['sh'])",
        "import os; os.posix_spawn('/bin/sh', ['sh'], {})",
        "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(1, 0)",
        "import os; os.killpg(os.getpgid(os.getppid()), 0)",
        "import resource, os; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
        "import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))",
        "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "import ctypes, os; c = ctypes.CDLL(None); assert c.ptrace(16, os.getppid(), 0, 0) == 0",
        "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
        "import socket; socket.socket()",
        "import os; os.memfd_create('x')",
        "import ctypes; assert ctypes.CDLL(None).mount(b't', b'/', b'tmpfs', 0, None) == 0",
    ],
)
def test_no_processes_signals_or_administration(code):
    result = run_python(code, timeout=5)
    assert not result.ok and not result.timed_out
    assert any(word in result.stderr for word in ("Error", "not permitted")), result


def test_fork_bomb_leaves_nothing_behind():
    code = "import os, time\nfor _ in range(20): os.fork()\ntime.sleep(30)"
    if "seccomp" not in WALLS and "process limit" not in WALLS:
        pytest.skip("neither seccomp nor a process limit here: not tried")
    start = time.monotonic()
    assert not run_python(code, timeout=2).ok
    assert time.monotonic() - start < 6


@needs["seccomp"]
def test_threads_still_work():
    code = (
        "from concurrent.futures import ThreadPoolExecutor as P\n"
        "print(list(P(3).map(abs, [-1, 2])))"
    )
    assert run_python(code).stdout == "[1, 2]\n"


def test_no_network():
    if not {"seccomp", "network namespace"} & set(WALLS):
        pytest.skip("this system offers no wall before the network")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, reached = server.getsockname()[1], threading.Event()
        server.settimeout(1.0)
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1).send(b'x')"

        def accept():
            try:
                server.accept()
                reached.set()
            except TimeoutError:
                pass

        thread = threading.Thread(target=accept)
        thread.start()
        result = run_python(code)
        thread.join()
    assert not result.ok and not reached.is_set()


@needs["landlock"]
def test_other_files_cannot_be_read_or_written(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("s3cret")
    target = repr(str(secret))
    for action in (
        f"print(open({target}).read())",
        f"open({target}, 'w')",
        f"import os; os.remove({target})",
        f"import os; os.truncate({target}, 0)",
        f"import os; print(os.listdir({str(tmp_path)!r}))",
        f"import os; os.mkdir({str(tmp_path / 'd')!r})",
        f"import os; os.symlink({target}, 'link'); print(open('link').read())",
        f"import os; os.link({target}, 'link')",
        "print(open('/etc/passwd').read())",
        "import os; print(open(f'/proc/{os.getppid()}/environ').read())",
        "import os; open(f'/proc/{os.getppid()}/mem', 'r+b')",
        f"open({str(Path(sys.prefix) / 'evil.txt')!r}, 'w')",
    ):
        result = run_python(action)
        assert not result.ok and "s3cret" not in result.stdout, action
        assert secret.read_text() == "s3cret"


@needs["seccomp"]
def test_permissions_of_other_files_stay(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("x")
    mode, when = secret.stat().st_mode, secret.stat().st_mtime
    run_python(f"import os; os.chmod({str(secret)!r}, 0); os.utime({str(secret)!r}, (1, 1))")
    assert (secret.stat().st_mode, secret.stat().st_mtime) == (mode, when)


def test_folder_is_deleted_whatever_happens(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_python("import os; os.makedirs('a/b/c'); os.chmod('a', 0); open('x', 'w').write('y')")
    run_python("while True: pass", timeout=0.5)
    assert os.listdir(tmp_path) == []


def test_large_and_odd_code():
    assert run_python("x = 1\n" * 50_000 + "print(x)").stdout == "1\n"
    assert not run_python("\x00").ok
    assert "UnicodeEncodeError" in run_python("print('\ud800')").stderr
    assert run_python("").ok


def test_filter_program_is_well_formed():
    for machine in ("x86_64", "aarch64"):
        program = filter_program(machine, 1234)
        assert len(program) % 8 == 0 and len(program) // 8 < 4096
        for i in range(0, len(program), 8):
            code, jt, jf = (
                int.from_bytes(program[i : i + 2], sys.byteorder),
                *program[i + 2 : i + 4],
            )
            if code in (0x15, 0x35, 0x45):
                assert i // 8 + 1 + max(jt, jf) < len(program) // 8
    assert filter_program("riscv64", 1) is None
    assert Result(True, "", "").protections == ()


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX")
def test_kill_tree_takes_children_too():
    import subprocess

    code = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    child = int(parent.stdout.readline())
    kill_tree(parent)
    parent.wait()
    parent.stdout.close()
    for _ in range(50):
        try:
            os.kill(child, 0)
            state = Path(f"/proc/{child}/stat")
            if state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                break
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the grandchild lives on")
